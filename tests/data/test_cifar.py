"""Tests the reader of CIFAR's binary files: contents, errors for damaged files, and the real images if present."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from simplexfix.data import CIFAR100_MEAN, CIFAR100_STD, CifarFileError, load_cifar10, load_cifar100


def record(*labels: int, seed: int) -> bytes:
    return bytes(labels) + np.random.default_rng(seed).integers(0, 256, 3072, np.uint8).tobytes()


def write_cifar10(folder: Path, *, batches=(1, 2, 3, 4, 5)) -> Path:
    folder.mkdir(parents=True)
    for i in batches:
        (folder / f"data_batch_{i}.bin").write_bytes(record(i, seed=i) + record(9, seed=10 + i))
    (folder / "test_batch.bin").write_bytes(record(0, seed=20))
    (folder / "batches.meta.txt").write_text("\n".join(f"name{i}" for i in range(10)) + "\n\n")
    return folder


def write_cifar100(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(record(19, 99, seed=0) + record(0, 3, seed=1))
    (folder / "test.bin").write_bytes(record(7, 20, seed=2))
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)))
    return folder


@pytest.mark.parametrize("at", [".", "cifar-10-batches-bin"])
def test_cifar10_byte_by_byte(tmp_path, at: str) -> None:
    write_cifar10(tmp_path / "data" / at) if at != "." else write_cifar10(tmp_path / "data")
    train = load_cifar10(tmp_path / "data")
    assert train.images.shape == (10, 3, 32, 32)
    assert train.images.dtype == np.uint8
    assert train.labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    assert train.labels.dtype == np.int64
    assert train.class_names == tuple(f"name{i}" for i in range(10))
    assert train.coarse_labels is None
    raw = record(3, seed=3)
    for channel, row, column in ((0, 0, 0), (0, 1, 0), (1, 0, 31), (2, 31, 31), (1, 17, 5)):
        assert train.images[4, channel, row, column] == raw[1 + 1024 * channel + 32 * row + column]
    assert load_cifar10(str(tmp_path / "data"), "test").labels.tolist() == [0]
    some = load_cifar10(tmp_path / "data", batches=(5, 2))
    assert some.labels.tolist() == [5, 9, 2, 9]
    assert np.array_equal(some.images[2:], train.images[2:4])


def test_cifar100_byte_by_byte(tmp_path) -> None:
    write_cifar100(tmp_path / "cifar-100-binary")
    train = load_cifar100(tmp_path)
    assert train.labels.tolist() == [99, 3]
    assert train.coarse_labels.tolist() == [19, 0]
    assert train.class_names[99] == "fine99"
    assert train.images[1].tobytes() == record(0, 3, seed=1)[2:]
    assert load_cifar100(tmp_path / "cifar-100-binary", "test").labels.tolist() == [20]


def damaged(folder: Path, name: str, change) -> Path:
    file = folder / name
    file.write_bytes(change(file.read_bytes()))
    return folder


def ten(folder: Path, name: str, change):
    return lambda: load_cifar10(damaged(write_cifar10(folder), name, change))


def hundred(folder: Path, name: str, change):
    return lambda: load_cifar100(damaged(write_cifar100(folder), name, change))


@pytest.mark.parametrize(
    ("make", "name", "change", "message"),
    [
        (ten, "data_batch_4.bin", lambda b: b[:-1], "data_batch_4.bin must hold records of 3073 bytes, got 6145 bytes"),
        (ten, "data_batch_4.bin", lambda b: b"", "data_batch_4.bin must hold records of 3073 bytes, got 0 bytes"),
        (ten, "data_batch_2.bin", lambda b: b[:3073] + b"\x0a" + b[3074:], "record 1 has label 10, expected one below"),
        (ten, "batches.meta.txt", lambda b: b[6:], "batches.meta.txt must name 10 classes, one per line, got 9"),
        (hundred, "train.bin", lambda b: b + b"\0", "train.bin must hold records of 3074 bytes, got 6149 bytes"),
        (hundred, "train.bin", lambda b: b"\x14" + b[1:], "train.bin record 0 has label 20, expected one below 20"),
        (hundred, "train.bin", lambda b: b[:1] + b"\x64" + b[2:], "record 0 has label 100, expected one below 100"),
        (hundred, "fine_label_names.txt", lambda b: b + b"\nx", "must name 100 classes, one per line, got 101"),
    ],
)
def test_damaged_files_are_named(tmp_path, make, name: str, change, message: str) -> None:
    with pytest.raises(CifarFileError, match=message) as error:
        make(tmp_path / "d", name, change)()
    assert str(tmp_path / "d" / name) in str(error.value)


def test_missing_files_are_named_with_their_source(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train\.bin, fine_label_names\.txt; expected a folder cifar-100-"):
        load_cifar100(tmp_path / "nowhere")
    folder = write_cifar10(tmp_path / "cifar-10-batches-bin", batches=(1, 3))
    with pytest.raises(FileNotFoundError, match=r"no data_batch_2\.bin, data_batch_4\.bin, .*https://www\.cs\.toronto"):
        load_cifar10(tmp_path)
    assert len(load_cifar10(folder, batches=(1, 3)).labels) == 4


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: load_cifar10(".", "val"), "split must be one of 'train', 'test', got 'val'"),
        (lambda: load_cifar100(".", "val"), "split must be one of 'train', 'test', got 'val'"),
        (lambda: load_cifar10(".", batches=(0, 1)), r"batches must be numbers from 1 to 5, each once, got \[0, 1\]"),
        (lambda: load_cifar10(".", batches=(1, 1)), r"batches must be numbers from 1 to 5, each once, got \[1, 1\]"),
        (lambda: load_cifar10(".", batches=()), r"batches must be numbers from 1 to 5, each once, got \[\]"),
    ],
)
def test_bad_input(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


@pytest.fixture(scope="module")
def real(data_folder, tmp_path_factory):
    """Returns the unpacking module, the folder of image sheets, and a folder in CIFAR's binary version."""
    pytest.importorskip("PIL", reason="Pillow reads the WebP sheets, each with all images of a class")
    script = data_folder / "cifar" / "unpack.py"
    if not script.exists():
        pytest.skip(f"there is no {script} to unpack CIFAR's sheets")
    spec = importlib.util.spec_from_file_location("unpack_cifar", script)
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    folder = tmp_path_factory.mktemp("cifar")
    sheets = script.parent
    fine = sorted(path.stem for path in (sheets / "cifar100_train").glob("*.webp"))
    unpack.write(sheets / "cifar100_train", fine, 300, folder / "cifar-100-binary/train.bin", b"\0")
    (folder / "cifar-100-binary/fine_label_names.txt").write_text("\n".join(fine) + "\n")
    unpack.write(sheets / "cifar10_test", unpack.CIFAR10, 1000, folder / "cifar-10-batches-bin/test_batch.bin", b"")
    (folder / "cifar-10-batches-bin/batches.meta.txt").write_text("\n".join(unpack.CIFAR10) + "\n")
    return unpack, sheets, folder


def test_real_images_have_their_labels_and_their_published_statistics(real) -> None:
    unpack, sheets, folder = real
    train, test = load_cifar100(folder), load_cifar10(folder, "test")
    assert np.bincount(train.labels).tolist() == [300] * 100
    assert np.bincount(test.labels).tolist() == [1000] * 10
    for found, name, side, count in ((train, "orchid", "cifar100_train", 300), (test, "ship", "cifar10_test", 1000)):
        images = found.images[found.labels == found.class_names.index(name)]
        tiles = unpack.tiles(sheets / side / f"{name}.webp", count)
        assert sorted(image.tobytes() for image in images) == sorted(tile.tobytes() for tile in tiles)
    pixels = train.images.transpose(1, 0, 2, 3).reshape(3, -1) / 255.0
    np.testing.assert_allclose(pixels.mean(axis=1), CIFAR100_MEAN, atol=2e-3)
    np.testing.assert_allclose(pixels.std(axis=1), CIFAR100_STD, atol=2e-3)
