"""Tests the embeddings of a tensor, a data set and a loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

from simplexfix.data import DatasetRows
from simplexfix.models import EmbeddingModel, LinearHead


@pytest.fixture
def model() -> EmbeddingModel:
    torch.manual_seed(0)
    return EmbeddingModel(nn.Sequential(nn.Linear(6, 5), nn.Dropout()), LinearHead(5))


ROWS = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))


class Arrays(Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, row: int) -> tuple[np.ndarray, str]:
        return ROWS[row].numpy(), "a label"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Arrays(), TensorDataset(ROWS), DatasetRows.in_memory(ROWS), ROWS])
def test_rows_are_extracted_in_order_and_in_batches(model, dataset, workers: int) -> None:
    state = torch.get_rng_state()
    found = model.extract(dataset, workers=workers)
    size = len(ROWS) if isinstance(dataset, torch.Tensor) else 128
    expected = [model.extract(batch) for batch in ROWS.split(size)]
    assert torch.equal(found, torch.cat(expected))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_has_its_own_batches(model) -> None:
    found = model.extract(DataLoader(Arrays(), batch_size=50, num_workers=1))
    assert torch.equal(found, torch.cat([model.extract(batch) for batch in ROWS.split(50)]))
    batches = BatchSampler(SequentialSampler(ROWS), 50, drop_last=False)
    assert torch.equal(found, model.extract(DataLoader(Arrays(), batch_sampler=batches)))
    assert torch.equal(found, model.extract(DataLoader(ROWS, batch_size=50)))


def test_prepare_is_called_for_each_batch(model) -> None:
    sizes = []

    def prepare(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.float() / 2

    expected = model.extract(ROWS.double().float() / 2)
    torch.testing.assert_close(model.extract(DatasetRows.in_memory(ROWS.double()), prepare=prepare), expected)
    assert sizes == [128, 128, 44]
    torch.testing.assert_close(model.extract(ROWS, prepare=prepare), expected)
    assert sizes[3:] == [300]


@pytest.mark.parametrize(
    ("input", "options", "error", "message"),
    [
        ({"image": ROWS, "label": 0}, {}, TypeError, "got dict of image, label; pass the entry that is a tensor"),
        ([ROWS[0], ROWS[1]], {}, TypeError, "got list of Tensor; torch.stack makes a tensor of inputs"),
        ((), {}, TypeError, "got tuple of nothing; torch.stack"),
        (ROWS.numpy(), {}, TypeError, "got ndarray; torch.as_tensor makes a tensor of an array"),
        (
            DataLoader(TensorDataset(ROWS), shuffle=True),
            {},
            ValueError,
            "the DataLoader shuffles: .*; pass shuffle=False",
        ),
        (DataLoader(TensorDataset(ROWS), 50, drop_last=True), {}, ValueError, "drop_last=True: the last items"),
        (
            DataLoader(TensorDataset(ROWS), batch_sampler=BatchSampler(SequentialSampler(ROWS), 7, True)),
            {},
            ValueError,
            "drop_last=True: the last items",
        ),
        (DataLoader([{"a": ROWS[0]}]), {}, TypeError, "batches of the DataLoader must be tensors.*got dict of a; give"),
        (DataLoader(TensorDataset(ROWS)), {"workers": 2}, ValueError, r"DataLoader\(dataset, num_workers=\.\.\.\)"),
        (DataLoader([]), {}, ValueError, "input must have a row, this DataLoader has none"),
        (TensorDataset(ROWS[:0]), {}, ValueError, "dataset must have an item, this TensorDataset has none"),
    ],
)
def test_bad_input(model, input, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        model.extract(input, **options)
    assert all(module.training for module in model.modules())
