"""Tests that every store keeps the contract of docs/guides/gallery.md."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch
from gallery_stores import DIM, STRANGER, A, B, C, gate_of, short_lease, stores, url, vectors

from simplexfix.functional import cosine_topk
from simplexfix.gallery import AdmissionError, Gallery, StrangerError, _traffic
from simplexfix.models import ModelIdentity

__all__ = ["url"]  # a fixture

IDS = np.arange(40)


@pytest.fixture
def gallery(url: str) -> Gallery:
    """Returns a gallery of 40 rows by model A, with payload."""
    made = Gallery.create(url, model=A)
    made.add(IDS, vectors(IDS), model=A, payload={"shop": IDS % 3, "name": [f"item {id_}" for id_ in IDS]})
    return made


def upgraded(gallery: Gallery, replaced: object = ()) -> Gallery:
    """Admits B and replaces the vectors of the ids in `replaced` by those of B."""
    gallery.admit(B, gate_of(A, B))
    if len(np.asarray(replaced)):
        gallery.replace(replaced, vectors(replaced, 1), model=B)
    return gallery


def stored_rows(gallery: Gallery) -> dict[int, tuple[int, bytes, Any]]:
    """Returns version, bytes of the vector and payload of every row, by id."""
    rows = gallery.read()
    columns = zip(rows.ids, rows.versions, rows.vectors, rows.payload, strict=True)
    return {int(id_): (int(version), vector.tobytes(), payload) for id_, version, vector, payload in columns}


# 1. identity in every call


def test_a_model_that_was_not_admitted_is_refused_by_every_call(gallery: Gallery) -> None:
    before = stored_rows(gallery)
    calls = {
        "add": lambda model: gallery.add([99], vectors([99]), model=model),
        "search": lambda model: gallery.search(vectors([1]), 1, model=model),
        "replace": lambda model: gallery.replace([1], vectors([1]), model=model),
    }
    for name, call in calls.items():
        with pytest.raises(StrangerError, match=rf"version 1 \(photos v1\) cannot {name} .* it was not admitted; gall"):
            call(B)
        with pytest.raises(StrangerError, match=r"not admitted; class 3 of namespace 'default' has slot 3 in the gal"):
            call(STRANGER)
        with pytest.raises(TypeError, match=r"model must be a ModelIdentity, got int; EmbeddingModel\.identity"):
            call(1)
    assert stored_rows(gallery) == before
    upgraded(gallery)
    for name, call in calls.items():
        with pytest.raises(StrangerError, match=rf"cannot {name} .* version 1 here is another model, of fingerprint"):
            call(STRANGER)
        same = ModelIdentity.from_dict({**B.to_dict(), "version": 7})
        with pytest.raises(StrangerError, match=r"it is version 1 here: pass its identity\(version=1\)"):
            call(same)
    with pytest.raises(StrangerError, match="replaced by those of the model that serves, version 1"):
        calls["replace"](A)


def test_a_stranger_is_never_admitted_whatever_the_gate_says(gallery: Gallery) -> None:
    for options in ({"gate": gate_of(A, STRANGER)}, {"force": "we need it"}):
        with pytest.raises(StrangerError, match=r"version 1 .* cannot search vectors of version 0 .* has slot"):
            gallery.admit(STRANGER, **options)
    with pytest.raises(StrangerError, match=r"version 0 \(photos v0\) of this gallery is another model: .*version=1"):
        gallery.admit(ModelIdentity.from_dict({**B.to_dict(), "version": 0}), gate_of(A, B))
    with pytest.raises(StrangerError, match="this model is version 0"):
        gallery.admit(ModelIdentity.from_dict({**A.to_dict(), "version": 4}), gate_of(A, A))
    assert gallery.model == A


def test_admission_needs_a_passed_gate_of_exactly_these_models(gallery: Gallery) -> None:
    refused = [
        ({}, AdmissionError, r"needs the result of upgrade_gate\(old, new\), or force= with the reason"),
        (
            {"gate": gate_of(A, B, passes=False)},
            AdmissionError,
            "did not pass the gate: gain of the new quer.*fail",
        ),
        ({"gate": gate_of(None, B)}, AdmissionError, "does not say which models it judged: give their fingerprints"),
        ({"gate": gate_of(A, C)}, AdmissionError, "the gate judged another new model, of fingerprint .*version 1"),
        ({"gate": gate_of(C, B)}, AdmissionError, "the gate judged another old model, of fingerprint .*version 0"),
        ({"gate": gate_of(B, A)}, AdmissionError, "the gate judged another old model"),
        ({"gate": True}, TypeError, "gate must be a GateResult, got bool"),
        ({"force": " "}, TypeError, "force must be the reason, as text"),
        ({"gate": gate_of(C, B), "force": "why"}, AdmissionError, "the gate judged another old model"),
    ]
    for options, kind, message in refused:
        with pytest.raises(kind, match=message):
            gallery.admit(B, **options)
    assert gallery.model == A
    assert [event["event"] for event in gallery.history()] == ["created"]
    gallery.admit(B, gate_of(A, B))
    event = gallery.history()[-1]
    assert (event["event"], event["version"], event["before"], event["force"]) == ("admitted", 1, 0, None)
    assert event["gate"]["fingerprints"] == [A.fingerprint, B.fingerprint]
    with pytest.raises(AdmissionError, match=r"version 1 \(photos v1\) is admitted already$"):
        gallery.admit(B, gate_of(A, B))
    with pytest.raises(AdmissionError, match=r"version 0 \(photos v0\) is admitted already; rollback\(\) leads back"):
        gallery.admit(A, gate_of(B, A))
    gallery.admit(C, gate_of(B, C, passes=False), force="the shop opens tomorrow")
    assert gallery.history()[-1]["force"] == "the shop opens tomorrow"
    assert gallery.history()[-1]["gate"]["passed"] is False


# 2. one ranking, thresholds


def mixed_rows() -> tuple[np.ndarray, np.ndarray]:
    """Returns rows, some tied, equal, zero, tiny or huge, and alternating versions 0 and 1."""
    rows = vectors(IDS)
    rows[5] = rows[6] = rows[7] = rows[20]
    rows[8] = 2 * rows[20]
    rows[9] = rows[10] = 0
    rows[11] = 1e38 * rows[12] / np.abs(rows[12]).max()
    rows[13] = 1e-30 * rows[12]
    return rows, IDS % 2


def test_a_mixed_gallery_is_one_ranking_with_ties_by_lower_id(url: str) -> None:
    rows, versions = mixed_rows()
    gallery = Gallery.create(url, model=A)
    order = np.random.default_rng(0).permutation(IDS)
    gallery.add(order, rows[order], model=A)
    gallery.admit(B, force="test")
    new = IDS[versions == 1]
    gallery.replace(new, rows[new], model=B)
    queries = np.concatenate([rows[[20, 12, 9, 30]], vectors([500, 501])])
    for k in (1, 5, 40, 43):
        hits = gallery.search(queries, k, model=B)
        scores, ids = (x.numpy() for x in cosine_topk(torch.from_numpy(queries), torch.from_numpy(rows), k))
        np.testing.assert_allclose(hits.scores, scores, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(hits.ids, ids)
        np.testing.assert_array_equal(hits.versions, np.where(ids < 0, -1, versions[ids]))
    scores, ids = gallery.mirror().search(queries, 40)
    hits = gallery.search(queries, 40, model=A)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_array_equal(hits.scores, scores)


def test_a_zero_vector_has_a_cosine_of_0(url: str) -> None:
    gallery = Gallery.create(url, model=A)
    away = -np.ones((50, DIM), "f") * np.arange(1, 51, dtype="f")[:, None]
    gallery.add(range(50), away, model=A)
    gallery.add([90, 80], np.zeros((2, DIM), "f"), model=A)
    hits = gallery.search(np.concatenate([np.ones((1, DIM), "f"), np.zeros((1, DIM), "f")]), 3, model=A)
    assert hits.ids.tolist() == [[80, 90, 0], [0, 1, 2]]
    np.testing.assert_allclose(hits.scores, [[0, 0, -1], [0, 0, 0]], rtol=0, atol=1e-6)


def test_a_filter_on_payload_searches_the_matching_rows_alone(gallery: Gallery) -> None:
    upgraded(gallery, IDS[::4])
    everything = gallery.search(vectors([7]), 40, model=B)
    for where, kept in (
        ({"shop": 1}, IDS % 3 == 1),
        ({"shop": [0, 2.0]}, IDS % 3 != 1),
        ({"shop": 1, "name": ["item 7", "item 8"]}, IDS == 7),
        ({"name": "item 8"}, IDS == 8),
        ({"shop": True}, IDS < 0),
        ({"shop": "1"}, IDS < 0),
        ({"nothing": None}, IDS < 0),
        ({"shop": []}, IDS < 0),
        ({}, IDS >= 0),
    ):
        hits = gallery.search(vectors([7]), 40, model=B, where=where)
        expected = everything.ids[np.isin(everything.ids, IDS[kept])]
        np.testing.assert_array_equal(hits.ids[0], np.append(expected, [-1] * (40 - len(expected))))
        np.testing.assert_array_equal(np.isinf(hits.scores), hits.ids < 0)
    gallery.add([100], vectors([100]), model=B, payload=[{"a b": None, "flag": True}])
    assert gallery.search(vectors([7]), 1, model=B, where={"a b": None, "flag": [True, "x"]}).ids == 100


def test_a_filter_finds_the_same_keys_and_values_in_every_store(url: str) -> None:
    """Text is compared character by character; numbers as integers within 64 bits, and beyond them as float64."""
    texts = [
        '"] or id >= 0 or facts in ["', "'; drop", "\\", "\\u0061", "%", "_", "\n", "", "{}", "a\tb", "é", "e\u0301",
        "😀", "1", "true", "null", "\x7f", "a.b", "$", "#", "[0]", "*",
    ]  # fmt: skip
    numbers = [
        *(0, 1, -0.0, 0.5, -1, 1.0, 2**53 + 1, 2.0**53, 2**62, 2.0**62, -(2**63), 2**63, 2**63 + 1, 2.0**63),
        *(10**300, 1e300, 5e-324),
    ]
    values = [None, True, False, *texts, *numbers]
    rows = [{"a": value} for value in values] + [{key: 7} for key in (*texts, "facts", "key", "born", "$meta")]
    never = [{"a": "1\0"}, {"a\0": 7}, {"a": 10**400}, {"a": [1, True, None]}, {"a": {"b": 1}}, {'"\0': 7}]
    ids = np.arange(len(rows) + len(never))
    gallery = Gallery.create(url, model=A)
    gallery.add(ids, vectors(ids), model=A, payload=rows + never)
    assert gallery.read().payload == rows + never

    def compared(value: object) -> tuple[str, object]:
        if type(value) not in (int, float):
            return type(value).__name__, value
        return "number", value if -(2**63) <= value < 2**63 else float(value)

    def found(where: dict[str, object]) -> list[int]:
        hits = gallery.search(vectors([0]), len(ids), model=A, where=where)
        return sorted(hits.ids[hits.ids >= 0].tolist())

    for ((key, value),) in (row.items() for row in rows):
        expected = [at for at, row in enumerate(rows) if key in row and compared(row[key]) == compared(value)]
        assert found({key: value}) == expected, {key: value}
    expected = [
        at for at, value in enumerate(values) if compared(value) in (("number", 0), ("number", 1), ("str", "1"))
    ]
    assert found({"a": [*range(3000), *map(str, range(3000))]}) == expected


def test_thresholds_are_of_the_pair_of_versions_and_applied_per_row(url: str) -> None:
    gallery = Gallery.create(url, model=A, threshold=0.5)
    gallery.add(IDS, vectors(IDS), model=A)
    assert gallery.search(vectors([3]), 40, model=A).accepted.sum() == 1
    with pytest.raises(ValueError, match=r"missing of \(query version, vector version\) \(0, 1\), \(1, 0\), \(1, 1\)"):
        gallery.admit(B, gate_of(A, B))
    with pytest.raises(ValueError, match=r"pairs \(query version, vector version\) of 0, 1 as keys, got \(1, 2\)"):
        gallery.admit(B, gate_of(A, B), thresholds={(1, 2): 0.5})
    with pytest.raises(ValueError, match=r"the threshold of \(1, 1\) is a cosine and must lie in \[-1, 1\], got 50"):
        gallery.admit(B, gate_of(A, B), thresholds={(1, 1): 50})
    assert gallery.model == A
    gallery.admit(B, gate_of(A, B), thresholds={(1, 0): 0.3, (1, 1): 0.999, (0, 1): None})
    gallery.replace(IDS[::2], vectors(IDS[::2], 1), model=B)
    queries = vectors(IDS, 1)
    hits = gallery.search(queries, 2, model=B)
    np.testing.assert_array_equal(hits.ids[:, 0], IDS)
    np.testing.assert_array_equal(hits.versions[:, 0], (IDS + 1) % 2)
    np.testing.assert_array_equal(hits.thresholds, np.where(hits.versions == 1, 0.999, 0.3))
    np.testing.assert_array_equal(hits.accepted, hits.scores >= hits.thresholds)
    assert hits.accepted[:, 0].all()  # the same bits, or a score of about 0.99 above 0.3
    gallery.set_thresholds({(1, 0): 0.9999})
    np.testing.assert_array_equal(gallery.search(queries, 1, model=B).accepted[:, 0], IDS % 2 == 0)
    with pytest.raises(ValueError, match="no threshold for these queries on vectors of version 1: call set_thresholds"):
        _ = gallery.search(queries, 1, model=A).accepted
    gallery.set_thresholds({(0, 1): -1.0})
    assert gallery.search(queries[:1], 1, model=A).accepted.all()
    assert not gallery.search(queries[:1], 41, model=A).accepted[0, 40]
    events = [event for event in gallery.history() if event["event"] == "thresholds"]
    assert {"queries": 1, "vectors": 0, "threshold": 0.9999} in events[0]["thresholds"]
    gallery.replace(IDS, vectors(IDS, 1), model=B)
    gallery.retire(0)
    assert gallery.status()["thresholds"] == [{"queries": 1, "vectors": 1, "threshold": 0.999}]


# 3. replace, roll back, retire


def test_after_a_rollback_all_stored_bits_are_as_before(gallery: Gallery) -> None:
    before, found = stored_rows(gallery), gallery.search(vectors(IDS, 1), 5, model=A)
    upgraded(gallery, IDS[:25])
    assert gallery.replace(IDS[20:30], vectors(IDS[20:30], 1), model=B, payload=[{"shop": -1}] * 10) == 5
    assert stored_rows(gallery)[27] == (1, vectors([27], 1).tobytes(), {"shop": -1})
    assert stored_rows(gallery)[3] == (1, vectors([3], 1).tobytes(), before[3][2])
    gallery.add([70], vectors([70], 1), model=B)
    status = gallery.status()
    assert [(entry["rows"], entry["old_rows"]) for entry in status["versions"]] == [(10, 30), (31, 0)]
    assert (status["stale"], status["rolls_back_to"], status["serving"]) == (10, 0, 1)
    event = gallery.rollback()
    assert (event["rows_restored"], event["rows_that_stay"], event["to"]) == (30, 1, 0)
    assert {id_: row for id_, row in stored_rows(gallery).items() if id_ != 70} == before
    after = gallery.search(vectors(IDS, 1), 5, model=A, where={"shop": [0, 1, 2]})
    np.testing.assert_array_equal(after.ids, found.ids)
    np.testing.assert_array_equal(after.scores, found.scores)
    # a row that the new model added is still found, and is stale
    assert gallery.search(vectors([70]), 1, model=A).ids == 70
    assert gallery.search(vectors([70]), 1, model=B).versions == 1
    with pytest.raises(StrangerError, match=r"was rolled back; add with version 0 \(photos v0\), which serves, or adm"):
        gallery.add([71], vectors([71]), model=B)
    (batch,) = gallery.stale()
    assert batch.tolist() == [70]
    assert gallery.replace(batch, vectors(batch), model=A) == 1
    assert gallery.status()["stale"] == 0
    with pytest.raises(ValueError, match=r"nothing to roll back to: version 0 .* is the only model that has served"):
        gallery.rollback()
    # once more, with two upgrades in a row
    gallery.admit(B, gate_of(A, B))
    gallery.replace(IDS[:25], vectors(IDS[:25], 1), model=B)
    between = stored_rows(gallery)
    gallery.admit(C, gate_of(B, C))
    gallery.replace(IDS[10:], vectors(IDS[10:], 2), model=C)
    gallery.rollback()
    assert stored_rows(gallery) == between
    gallery.rollback()
    assert {id_: row for id_, row in stored_rows(gallery).items() if id_ != 70} == before


def test_every_bit_of_a_float32_comes_back(url: str) -> None:
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2**32, size=(300, DIM), dtype=np.uint32).view(np.float32)
    rows[~np.isfinite(rows)] = -0.0  # the other numbers have all exponents; some are subnormal
    rows[:3] = [[0.0] * DIM, [-0.0] * DIM, [1e-45] * DIM]
    rows[3], rows[4] = 3e38, np.where(IDS[:DIM] % 2, 3e38, -1e-45)
    gallery = Gallery.create(url, model=A)
    gallery.add(range(300), rows, model=A)
    gallery.admit(B, force="test")
    gallery.replace(range(300), rows[::-1], model=B)
    assert gallery.read().vectors.tobytes() == rows[::-1].tobytes()
    gallery.rollback()
    assert gallery.read().vectors.tobytes() == rows.tobytes()
    scores, ids = gallery.mirror().search(rows, 5)
    hits = gallery.search(rows, 5, model=A)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_array_equal(hits.scores, scores)


def test_versions_of_several_widths_are_one_ranking(url: str) -> None:
    """A wider model's queries are compared with narrow rows on their leading dimensions."""
    wide = ModelIdentity("ab" * 32, 1, "", "oca", DIM + 7, ancestors=((A.fingerprint, DIM),))
    rows = np.random.default_rng(0).standard_normal((40, DIM + 7)).astype(np.float32)
    gallery = Gallery.create(url, model=A)
    gallery.add(IDS, rows[:, :DIM], model=A)
    other = Gallery.open(url)
    assert other.search(rows[:1, :DIM], 1, model=A).ids == 0
    gallery.admit(wide, force="test")
    assert other.search(rows, 1, model=wide).ids.ravel().tolist() == IDS.tolist()
    gallery.replace(IDS[::2], rows[::2], model=wide)
    found = [
        cosine_topk(torch.from_numpy(rows[:, :width]), torch.from_numpy(rows[first::2, :width]), 20)
        for first, width in ((0, DIM + 7), (1, DIM))
    ]
    scores = np.concatenate([part[0].numpy() for part in found], axis=1)
    ids = np.concatenate([2 * part[1].numpy() + first for first, part in enumerate(found)], axis=1)
    order = np.lexsort((ids, -scores), axis=1)
    for each in (gallery, other):
        hits = each.search(rows, 40, model=wide)
        np.testing.assert_array_equal(hits.ids, np.take_along_axis(ids, order, axis=1))
        np.testing.assert_array_equal(hits.scores, np.take_along_axis(scores, order, axis=1))
        with pytest.raises(
            ValueError, match=r"queries are 33 wide and rows of version 1 are 40: search with a model of"
        ):
            each.search(rows[:, :DIM], 1, model=A)
        with pytest.raises(
            ValueError, match="these rows have vectors of several widths: pass the ids of rows of one version"
        ):
            each.read()
    gallery.rollback()
    assert other.search(rows[:, :DIM], 1, model=A).ids.ravel().tolist() == IDS.tolist()
    np.testing.assert_array_equal(gallery.read().vectors, rows[:, :DIM])


def test_only_retire_deletes_old_vectors(gallery: Gallery) -> None:
    upgraded(gallery, IDS[:30])
    for version, message in (
        (0, r"10 rows are still of version 0 \(photos v0\) and would be lost: replace them first, as `stale\(\)`"),
        (1, r"version 1 \(photos v1\) serves and cannot be retired"),
        (5, "no version 5 in this gallery, which has 0, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.retire(version)
    for batch in gallery.stale():
        gallery.replace(batch, vectors(batch, 1), model=B)
    assert gallery.status()["versions"][0]["old_rows"] == 40
    assert gallery.retire(0)["old_rows_deleted"] == 40
    status = gallery.status()
    assert (status["versions"][0]["old_rows"], status["versions"][0]["standing"]) == (0, "retired")
    assert status["rolls_back_to"] is None
    for call in (gallery.rollback, lambda: gallery.retire(0)):
        with pytest.raises(ValueError, match=r"nothing to roll back to|is retired already"):
            call()
    with pytest.raises(StrangerError, match="was retired, and its vectors are gone; search with version 1"):
        gallery.search(vectors([1]), 1, model=A)
    assert stored_rows(gallery) == {int(i): (1, vectors([i], 1).tobytes(), stored_rows(gallery)[i][2]) for i in IDS}


def test_remove_deletes_a_row_and_its_old_vector(gallery: Gallery) -> None:
    upgraded(gallery, IDS[:10])
    with pytest.raises(KeyError, match="id 99 is not in the gallery"):
        gallery.remove([1, 99])
    gallery.search(vectors([1]), 1, model=B)
    gallery.remove([1, 30])
    assert set(stored_rows(gallery)) == set(IDS.tolist()) - {1, 30}
    assert not np.isin(gallery.search(vectors([1, 30]), 40, model=B).ids, [1, 30]).any()
    assert gallery.status()["versions"][0]["old_rows"] == 9
    gallery.add([1], vectors([1], 1), model=B)
    assert gallery.search(vectors([1]), 1, model=B).ids == 1
    assert gallery.rollback()["rows_that_stay"] == 1
    # a worker continues when a row of its batch is removed
    gallery.admit(B, gate_of(A, B))
    worker = gallery.stale(order=[2, 3])
    batch = next(worker)
    gallery.remove([2])
    assert gallery.replace(batch, vectors(batch, 1), model=B) == 1
    with pytest.raises(KeyError, match="id 2 is not in the gallery"):
        gallery.replace([2], vectors([2], 1), model=B)


def test_the_history_has_every_change(gallery: Gallery) -> None:
    upgraded(gallery)
    for batch in gallery.stale(order=IDS[::-1], batch=30):
        gallery.replace(batch, vectors(batch, 1), model=B)
    gallery.pause()
    gallery.resume()
    gallery.rollback()
    gallery.admit(B, force="again")
    history = gallery.history()
    assert [event["event"] for event in history] == [
        "created", "admitted", "backfill", "backfill finished", "paused", "resumed", "rolled back", "admitted",
    ]  # fmt: skip
    assert (history[2]["order"], history[2]["stale"], history[2]["version"]) == ("given", 40, 1)
    assert ModelIdentity.from_dict(history[1]["model"]) == B
    assert all(event["at"].endswith("+00:00") for event in history)
    assert gallery.status()["since"] == history[-1]["at"]


# 4. and 5. serving while rows are replaced; shared, resumable backfill


def test_stale_gives_every_row_once_in_the_given_order(url: str) -> None:
    gallery = Gallery.create(url, model=A, count_traffic=True)
    gallery.add(IDS, vectors(IDS), model=A)
    for _ in range(3):
        gallery.search(vectors([17, 4, 4]), 1, model=A)
    gallery.search(vectors([30]), 1, model=A)
    gallery.close()  # writes the counts
    upgraded(gallery)
    asked = IDS[[9, 3, 35, 17]]
    given = list(gallery.stale(order=asked, batch=3))
    assert [batch.tolist() for batch in given] == [[9, 3, 35], [17]]
    by_traffic = np.concatenate(list(gallery.stale(order="traffic", batch=7)))
    assert by_traffic.tolist() == [4, 17, 30, *(i for i in IDS.tolist() if i not in (4, 17, 30))]
    at_random = [np.concatenate(list(gallery.stale(batch=7))) for _ in range(2)]
    for batch in at_random:
        assert sorted(batch.tolist()) == IDS.tolist()
    assert at_random[0].tolist() != at_random[1].tolist()
    gallery.replace(IDS[:30], vectors(IDS[:30], 1), model=B)
    assert np.concatenate(list(gallery.stale(order=IDS[::-1]))).tolist() == IDS[:29:-1].tolist()
    for options, message in (
        ({"order": "newest"}, "order must be one of 'random', 'traffic', got 'newest'"),
        ({"order": [1, 1]}, "order must hold each id once, got 1 in rows 0 and 1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"lease": 0}, "lease must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.stale(**options)
    with pytest.raises(KeyError, match="id 99 is not in the gallery"):
        list(gallery.stale(order=[99]))


def test_traffic_counts_are_bounded_and_written_at_intervals(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = Gallery.create(url, model=A, count_traffic=True)
    gallery.add(IDS, vectors(IDS), model=A)
    upgraded(gallery)
    monkeypatch.setattr(_traffic, "_MOST", 6)
    for _ in range(2):
        gallery.search(vectors(IDS[30:33]), 1, model=A)
    gallery.search(vectors(IDS[:8]), 1, model=A)  # too many ids: those with the fewest hits are dropped
    assert len(gallery._traffic._times) == 3
    other = Gallery.open(url)
    assert next(other.stale(order="traffic", batch=3)).tolist() == [0, 1, 2]  # the counts are not written yet
    monkeypatch.setattr(_traffic, "_SECONDS", 0.0)
    gallery.search(vectors([31]), 1, model=A)
    assert next(other.stale(order="traffic", batch=4)).tolist() == [31, 30, 32, 0]


def test_order_by_traffic_needs_counts(gallery: Gallery) -> None:
    with pytest.raises(ValueError, match=r"needs Gallery\.create\(\.\.\., count_traffic=True\); take \"random\""):
        gallery.stale(order="traffic")


def test_workers_share_the_rows_and_take_over_from_one_that_died(url: str, gallery: Gallery) -> None:
    upgraded(gallery)
    other = Gallery.open(url)
    slow = gallery.stale(batch=3, lease=600)
    next(slow)
    died = gallery.stale(batch=16, lease=short_lease(url))
    lost = next(died)
    status = other.status()
    assert status["leased"] == 19
    assert [each["rows"] for each in status["workers"]] == [16, 3]  # the lease that ends first, then that of `slow`
    first, second = gallery.history()[-2:]
    assert [each["worker"] for each in status["workers"]] == [second["worker"], first["worker"]]
    assert second["worker"].split("/")[1] == str(os.getpid())
    for worker, event, seconds in zip(status["workers"], (second, first), (short_lease(url), 600), strict=True):
        began, ends = (datetime.fromisoformat(text) for text in (event["at"], worker["until"]))
        assert abs((ends - began).total_seconds() - seconds) < 60
    slow.close()
    mine = []
    for batch in other.stale(batch=16, lease=60):
        mine.append(batch)
        other.replace(batch, vectors(batch, 1), model=B)
    # first the rows without a lease, then those of the dead worker
    assert [len(batch) for batch in mine] == [16, 8, 16]
    assert sorted(mine[-1].tolist()) == sorted(lost.tolist())
    assert gallery.replace(lost, vectors(lost, 1), model=B) == 0  # the worker was slow, not dead
    assert gallery.status()["stale"] == gallery.status()["leased"] == 0
    assert gallery.status()["workers"] == []


def test_a_pause_or_a_rollback_ends_the_loop_of_a_worker(gallery: Gallery) -> None:
    upgraded(gallery)
    worker = gallery.stale(batch=10)
    next(worker)
    gallery.pause()
    assert gallery.status()["paused"]
    assert list(worker) == list(gallery.stale()) == []
    gallery.resume()
    worker = gallery.stale(batch=10)
    first = next(worker)
    gallery.rollback()
    with pytest.raises(StrangerError, match="was rolled back; replace with version 0"):
        gallery.replace(first, vectors(first, 1), model=B)
    assert list(worker) == []
    gallery.admit(B, gate_of(A, B))
    held = gallery.stale(batch=10)
    next(held)
    gallery.rollback()
    gallery.admit(B, gate_of(A, B))
    (everything,) = gallery.stale(batch=40)  # the leases of the earlier backfill have ended
    assert len(everything) == 40
    for batch in gallery.stale(batch=10):  # the loop ends although each batch leaves a row
        gallery.replace(batch[:9], vectors(batch[:9], 1), model=B)
    assert gallery.status()["stale"] == 4
    assert gallery.status()["leased"] == 0


def test_a_second_process_sees_what_was_committed(url: str, gallery: Gallery) -> None:
    """A second `Gallery` stands for the process: it shares only the store."""
    other = Gallery.open(url)
    assert other.search(vectors([5]), 1, model=A).ids == 5
    gallery.add([60], vectors([60]), model=A)
    assert other.search(vectors([60]), 1, model=A).ids == 60
    upgraded(gallery, [60, 2])
    hits = other.search(vectors([60, 2, 3], 1), 1, model=B)
    assert hits.ids.ravel().tolist() == [60, 2, 3]
    assert hits.versions.ravel().tolist() == [1, 1, 0]
    gallery.remove([2])
    assert other.search(vectors([2], 1), 1, model=B).ids != 2
    gallery.rollback()
    assert other.search(vectors([60]), 1, model=A).versions == 0


def test_a_status_is_of_one_moment(url: str, gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `Gallery`, which stands for another process, rolls back after the first read of the store."""
    upgraded(gallery, IDS)
    other, rolled_back = Gallery.open(url), []

    def then_roll_back(call: Callable[[], object]) -> object:
        found = call()
        if not rolled_back:
            rolled_back.append(other.rollback())
        return found

    for name in ("state", "history", "overview"):
        read = getattr(gallery._store, name)
        monkeypatch.setattr(gallery._store, name, lambda read=read: then_roll_back(read))
    status = gallery.status()
    assert rolled_back
    assert (status["serving"], status["stale"]) == (1, 0)
    assert [version["old_rows"] for version in status["versions"]] == [40, 0]
    assert gallery.status()["serving"] == 0


def test_threads_find_every_row_while_others_replace_and_roll_back(gallery: Gallery) -> None:
    upgraded(gallery)
    stop, missed, searches = threading.Event(), [], [0]

    def look() -> None:
        while not stop.is_set():
            hits = gallery.search(vectors([3], 1), 40, model=A)
            searches[0] += 1
            if sorted(hits.ids[0].tolist()) != IDS.tolist():
                missed.append(hits.ids)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(3):
            for batch in gallery.stale(batch=8):
                gallery.replace(batch, vectors(batch, 1), model=B)
            gallery.rollback()
            gallery.admit(B, force="again")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not missed
    assert searches[0] > 20


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Runs calls in threads that begin at the same time; returns the result or the error of each."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def take(at: int) -> None:
        barrier.wait()
        try:
            results[at] = calls[at]()
        except Exception as error:
            results[at] = error

    threads = [threading.Thread(target=take, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("url", stores("milvus-lite"), indirect=True)
def test_calls_about_the_same_rows_at_the_same_time_take_turns(gallery: Gallery) -> None:
    new = np.arange(100, 5100)
    for ids in (new, new + 5000):
        rows = np.ones((len(ids), DIM), "f")
        results = at_once(
            *[lambda ids=ids[::way], rows=rows: gallery.add(ids, rows, model=A) for way in (1, -1, 1, -1)]
        )
        assert sorted(type(result).__name__ for result in results) == ["NoneType"] + 3 * ["ValueError"], results
    gallery.remove(np.arange(140, 10_100))
    new = np.arange(100, 140)
    for _ in range(3):
        upgraded(gallery)
        results = at_once(
            *[lambda ids=IDS[::way]: gallery.replace(ids, vectors(ids, 1), model=B) for way in (1, -1, 1, -1)]
        )
        assert sorted(results) == [0, 0, 0, 40]
        assert gallery.status()["versions"][0]["old_rows"] == 40
        results = at_once(gallery.rollback, gallery.rollback, lambda: gallery.replace(new, vectors(new, 1), model=B))
        assert sorted(type(result).__name__ for result in results[:2]) == ["ValueError", "dict"], results
        assert results[2] == 40 or isinstance(results[2], StrangerError)
        assert stored_rows(gallery)[3][:2] == (0, vectors([3]).tobytes())
        assert {version for version, *_ in stored_rows(gallery).values()} == {0}
    results = at_once(*[lambda: gallery.remove(new)] * 3)
    assert sorted(type(result).__name__ for result in results) == ["KeyError", "KeyError", "NoneType"], results


def test_the_last_of_several_workers_records_the_end_of_a_backfill(gallery: Gallery) -> None:
    """Two concurrent calls replace half of the rows each, and only the later one leaves no stale row."""
    for _ in range(5):
        upgraded(gallery)
        at_once(*[lambda ids=IDS[first::2]: gallery.replace(ids, vectors(ids, 1), model=B) for first in range(2)])
        assert [event["event"] for event in gallery.history()[-2:]] == ["admitted", "backfill finished"]
        gallery.rollback()


def test_a_model_is_checked_again_where_the_rows_are_written(gallery: Gallery, monkeypatch) -> None:
    """Another process may roll back or retire the model between the first check and the transaction."""
    upgraded(gallery)
    gallery.rollback()
    before = stored_rows(gallery)
    monkeypatch.setattr(Gallery, "_checked", lambda gallery, model, call: model)
    for call in (gallery.add, gallery.replace):
        with pytest.raises(StrangerError, match="was rolled back"):
            call([1], vectors([1], 1), model=B)
    assert stored_rows(gallery) == before


# 6. bad input is refused before anything is sent


BAD_ROWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"vectors": np.full((2, DIM), np.nan, "f")}, ValueError, "vectors row 0 holds nan or inf"),
    ({"vectors": np.array([[1.0] * DIM, [np.inf] * DIM])}, ValueError, "vectors row 1 holds nan or inf"),
    ({"vectors": np.full((2, DIM), 1e39)}, ValueError, "vectors row 0 holds a number past float32's range"),
    ({"vectors": np.ones((2, 7), "f")}, ValueError, "vectors must have 33 columns, as version 0 makes them, got 7"),
    ({"vectors": np.ones((3, DIM), "f")}, ValueError, "vectors has 3 rows, ids has shape"),
    ({"vectors": np.ones((2, DIM), int)}, TypeError, "vectors must be float32, float64 or float16, got int64"),
    ({"vectors": [1.0]}, TypeError, "vectors must be a torch.Tensor or a NumPy array, got list"),
    ({"ids": [50, 50]}, ValueError, "ids must hold each id once, got 50 in rows 0 and 1"),
    ({"ids": [50, -1]}, ValueError, r"ids must lie between 0 and 2\^63 - 2, got -1"),
    ({"ids": [50, 2**63 - 1]}, ValueError, r"ids must lie between 0 and 2\^63 - 2, got 9223372036854775807"),
    ({"ids": [50, 51.5]}, TypeError, "ids must be integers, got float64"),
    ({"ids": ["a", "b"]}, TypeError, "ids must be integers, got text"),
    ({"payload": [{}]}, ValueError, "vectors has 2 rows, payload has 1"),
    ({"payload": "ab"}, TypeError, "payload must be a list of mappings, or a mapping of columns, got str"),
    ({"payload": [{}, 3]}, TypeError, "payload row 1 must be a mapping or None, got int"),
    ({"payload": [{1: 2}, {}]}, TypeError, "payload row 0 has the key 1, keys must be strings"),
    ({"payload": [{}, {"version": 2}]}, ValueError, "payload row 1 has the key 'version', which the gallery its"),
    ({"payload": {"id": [1, 2]}}, ValueError, "payload row 0 has the key 'id'"),
    ({"payload": {"a": [1]}}, ValueError, "vectors has 2 rows, column 'a' of payload has 1"),
    ({"payload": [{}, {"a": float("nan")}]}, ValueError, "payload row 1 is not a JSON object"),
    ({"payload": [{"a": {1, 2}}, {}]}, ValueError, "payload row 0 is not a JSON object"),
    ({"payload": [{}, {"a": "\ud800"}]}, ValueError, "payload row 1 is not a JSON object"),
]


def test_bad_rows_are_refused_and_nothing_is_added(gallery: Gallery) -> None:
    before, good = stored_rows(gallery), {"ids": [50, 51], "vectors": vectors([50, 51]), "payload": None}
    for changes, kind, message in BAD_ROWS:
        given = {**good, **changes}
        with pytest.raises(kind, match=message):
            gallery.add(given["ids"], given["vectors"], model=A, payload=given["payload"])
    upgraded(gallery)
    for changes, kind, message in BAD_ROWS:
        given = {**good, "ids": [0, 1], **changes}
        with pytest.raises(kind, match=message.replace("version 0", "version 1")):
            gallery.replace(given["ids"], given["vectors"], model=B, payload=given["payload"])
    assert stored_rows(gallery) == before


def test_present_ids_are_not_added_and_missing_ids_not_replaced(gallery: Gallery) -> None:
    before = stored_rows(gallery)
    with pytest.raises(ValueError, match="id 7 is in the gallery already: `replace` puts"):
        gallery.add([50, 7], vectors([50, 7]), model=A)
    with pytest.raises(KeyError, match="id 50 is not in the gallery"):
        upgraded(gallery).replace([3, 50], vectors([3, 50], 1), model=B)
    with pytest.raises(KeyError, match="id 50 is not in the gallery"):
        gallery.read([50])
    assert stored_rows(gallery) == before


def test_bad_queries_are_refused(gallery: Gallery) -> None:
    for queries, k, where, kind, message in (
        (np.full((1, DIM), np.nan, "f"), 1, None, ValueError, "queries row 0 holds nan or inf"),
        (np.ones((1, 5), "f"), 1, None, ValueError, "queries must have 33 columns"),
        (vectors([1]), 0, None, ValueError, "k must be at least 1, got 0"),
        (vectors([1]), 1.5, None, TypeError, "k must be an integer, got float"),
        (vectors([1]), 1, ["shop"], TypeError, "where must be a mapping"),
        (vectors([1]), 1, {"shop": {}}, TypeError, r"where\['shop'\] must be a string, a number, a bool or None"),
        (vectors([1]), 1, {3: 1}, TypeError, "where must have strings as keys, got 3"),
        (vectors([1]), 1, {"a\0": 1}, ValueError, r"a key of where, 'a\\x00', must be text without U\+0000"),
        (vectors([1]), 1, {"a": ["b", "a\ud800"]}, ValueError, r"where\['a'\] must be text without .* lone surrogates"),
        (vectors([1]), 1, {"a": float("nan")}, ValueError, r"where\['a'\] must be a finite number in .*, got nan"),
        (
            vectors([1]),
            1,
            {"a": [1, 10**5000]},
            ValueError,
            "finite number in float64's range, got an integer beyond it",
        ),
    ):
        with pytest.raises(kind, match=message):
            gallery.search(queries, k, model=A, where=where)


def test_rows_come_as_tensors_arrays_and_tables(url: str) -> None:
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    gallery = Gallery.create(url, model=A)
    rows = vectors(IDS)
    table = {"shop": [1, 2], "name": ["é", None]}
    gallery.add(torch.tensor([1, 2]), torch.from_numpy(rows[:2]), model=A, payload=pandas.DataFrame({"shop": [1, 2]}))
    gallery.add(np.array([3, 4], np.uint8), rows[:2].astype(np.float64), model=A, payload=pyarrow.table(table))
    gallery.add(range(5, 7), torch.from_numpy(rows[:2]).bfloat16(), model=A, payload=[{"a": [1, {"b": None}]}, None])
    gallery.add([2**63 - 2, 0], rows[:2], model=A)
    gallery.add([], rows[:0], model=A)
    read = gallery.read([1, 4, 5, 6, 2**63 - 2, 0])
    assert read.payload == [{"shop": 1}, {"shop": 2, "name": None}, {"a": [1, {"b": None}]}, {}, {}, {}]
    np.testing.assert_array_equal(read.vectors[[0, 1, 4]], rows[[0, 1, 0]])
    np.testing.assert_array_equal(read.vectors[2], torch.from_numpy(rows[0]).bfloat16().float().numpy())
    twice = pandas.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(ValueError, match="payload has two columns 'a'"):
        gallery.add([9], rows[:1], model=A, payload=twice)


def test_an_empty_gallery_finds_nothing(url: str) -> None:
    gallery = Gallery.create(url, model=A)
    hits = gallery.search(vectors([1, 2]), 3, model=A)
    assert (hits.ids == -1).all()
    assert np.isneginf(hits.scores).all()
    assert not hits.accepted.any()
    assert len(gallery.mirror()) == len(gallery.read().ids) == 0
    assert list(gallery.stale()) == []


def test_an_external_model_is_admitted_with_an_adapter(url: str) -> None:
    first = ModelIdentity.external("text-embedder", "2024-01", 16)
    other = ModelIdentity.external("text-embedder", "2025-03", 16, version=1)
    adapted = ModelIdentity.external("text-embedder", "2025-03", 16, version=1, adapter="5eed", space=first)
    gallery = Gallery.create(url, model=first)
    gallery.add([1], np.ones((1, 16), "f"), model=first)
    with pytest.raises(StrangerError, match="2025-03 and text-embedder 2024-01 are different models, and nothing says"):
        gallery.admit(other, force="it is newer")
    gallery.admit(adapted, gate_of(first, adapted))
    assert gallery.search(np.ones((1, 16), "f"), 1, model=adapted).ids == 1
