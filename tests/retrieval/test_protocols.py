"""Tests search protocols against hand-computed values and a loop, and edge cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from versions import pair

from simplexfix.retrieval import instance, nearest_class_mean


def test_by_hand() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [-1.0, 0.0]])
    gallery_labels = torch.tensor([7, 7, 2**40, 2**40])
    # the template of class 7 points to (1, 1), that of class 2^40 to (-1, 3)
    query = torch.tensor([[1.0, 0.2], [-1.0, 0.5], [0.1, 1.0]])
    query_labels = torch.tensor([7, 2**40, 7])
    assert nearest_class_mean.score(pair(query, query_labels, gallery, gallery_labels)) == pytest.approx(2 / 3)
    # nearest items: 0 (class 7), 3 (class 2^40), and 1 before 2, whose cosines are equal (class 7)
    assert instance.score(pair(query, query_labels, gallery, gallery_labels)) == 1.0
    assert nearest_class_mean.hits(pair(query, query_labels, gallery, gallery_labels)).tolist() == [True, True, False]
    assert instance.hits(pair(query, query_labels, gallery, gallery_labels)).tolist() == [True, True, True]


def test_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (400,), generator=generator) * 3 - 5
    rows = torch.randn(400, 16, generator=generator) + F.one_hot((labels + 5) // 3, 16)
    query, gallery, query_labels, gallery_labels = rows[:150], rows[150:], labels[:150], labels[150:]
    classes = gallery_labels.unique().tolist()
    templates = torch.stack([F.normalize(gallery[gallery_labels == c].double().mean(0), dim=0) for c in classes])
    right = [
        classes[int((templates @ q.double()).argmax())] == y for q, y in zip(query, query_labels.tolist(), strict=True)
    ]
    assert nearest_class_mean.score(pair(query, query_labels, gallery, gallery_labels)) == sum(right) / 150
    nearest = (F.normalize(query.double()) @ F.normalize(gallery.double()).T).argmax(1)
    expected = (gallery_labels[nearest] == query_labels).double().mean().item()
    assert instance.score(pair(query, query_labels, gallery, gallery_labels)) == expected


@pytest.mark.parametrize("protocol", [nearest_class_mean, instance])
def test_a_class_the_gallery_lacks_counts_as_wrong(protocol) -> None:
    rows = torch.eye(3)
    assert protocol.score(pair(rows, torch.tensor([0, 1, 9]), rows, torch.tensor([0, 1, 2]))) == pytest.approx(2 / 3)


@pytest.mark.parametrize("protocol", [nearest_class_mean, instance])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.eye(3), torch.arange(2), torch.eye(3), torch.arange(3)),
            ValueError,
            r"query has 3 rows, query_labels has shape \[2\]",
        ),
        ((torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(4)), ValueError, "gallery has 3 rows"),
        ((torch.eye(3), torch.rand(3), torch.eye(3), torch.arange(3)), TypeError, "query_labels must be integers"),
        ((torch.eye(3).tolist(), torch.arange(3), torch.eye(3), torch.arange(3)), TypeError, "query must be a torch.T"),
        ((torch.eye(3)[0], torch.arange(3), torch.eye(3), torch.arange(3)), ValueError, "query must have 2 dim"),
        ((torch.eye(3)[:0], torch.arange(0), torch.eye(3), torch.arange(3)), ValueError, "query_labels is empty"),
        (
            (torch.eye(3) / 0, torch.arange(3), torch.eye(3), torch.arange(3)),
            ValueError,
            "query row 0 holds nan or inf",
        ),
    ],
)
def test_bad_input(protocol, arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        protocol.score(pair(*arguments))
