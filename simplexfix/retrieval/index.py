"""An exact cosine index that is kept: rows come and go, with an id each, and it is written to a file."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _native
from .._checks import check_integer, check_name
from ..labelled import Ids, Rows, read_features, read_ids, read_integers, to_float32
from . import _faiss
from ._plain_index import PlainIndex

__all__ = ["CosineIndex"]

_MAX_DIM = 2**31 - 2


class CosineIndex:
    """Finds, for each query, the k stored vectors nearest by cosine, exactly.

        g = F.normalize(vectors)                    # in float64, rounded to float32, and to bfloat16 if so stored
        q = F.normalize(query)                      # in float64, rounded to float32
        scores, rows = (q.double() @ g.double().T).float().topk(k)
        ids = ids[rows]

    A score is the float64 dot product, rounded to float32; order is by score, then by lower id.  Batch, threads,
    instruction set, and the order in which rows came, change nothing.  A zero vector scores 0.

    Beside each vector lies a copy in codes of eight bits, from which a first pass tells which rows cannot be among
    the best.  Memory per row, in bytes: 5 d + 12 with float32, 3 d + 12 with bfloat16; 8 more unless the ids are 0, 1,
    2, ...; about 40 more once ids are not ascending.  Any thread may call anything at any time: searches run beside
    each other, changes alone; other Python threads run meanwhile.  Ctrl-C ends a call within a second, and nothing is
    changed then.  An index is not copied or pickled: a second one is loaded from a file.

    A process may fork at any time.  The child has an index of its own with the same rows, whoever was searching or
    saving in the parent.  Where another thread was adding or removing, the rows are lost in the child: every call
    raises RuntimeError there.

    Args:
        dim: d, 1 to 2^31 - 2.
        dtype: how vectors are stored, "float32" or "bfloat16".  What is stored is what is searched: with "bfloat16"
            the scores are exact for the rounded vectors, which differ from the given ones by up to 2^-9 of each number.
        threads: what one call may use; None: as many as torch (`torch.get_num_threads()`).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, dim: int, *, dtype: str = "float32", threads: int | None = None) -> None:
        dim = _check_int("dim", dim, _MAX_DIM)
        check_name("dtype", dtype, ("float32", "bfloat16"))
        self._index: Any = _kind()(dim, dtype, _threads(threads))

    def add(self, vectors: Rows, ids: Ids | None = None) -> NDArray[np.int64]:
        """Adds rows: all of them or, after an error, none.

        Args:
            vectors: [n, dim] float32, float64, float16 or bfloat16, finite: an array, a CPU tensor, lists of numbers or
                a column as of `VersionFeatures`.  float64 is rounded to float32 first.
            ids: [n] integers in [0, 2^63 - 2], none of them twice nor in the index.  None: counted on from the highest
                id that the index ever held, from 0 at first.

        Returns:
            The ids [n] int64.

        Raises:
            TypeError: not numbers of these kinds.
            ValueError: wrong shape; a row that holds nan or inf, or an id that may not be, by name.
        """
        rows = self._rows("vectors", vectors)
        names = None if ids is None else read_ids("ids", ids, "vectors", len(rows))
        first = self._index.add(rows, names)
        return np.arange(first, first + len(rows)) if names is None else names.copy()

    def search(
        self,
        query: Rows,
        k: int,
        *,
        include: Ids | None = None,
        exclude: Ids | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best for each query, of all rows or of some, as if the index held no others.

        Args:
            query: [Q, dim], as the vectors of `add`.
            k: 1 to 2^31 - 1.
            include: [n] integers, the ids that are searched; each in the index.
            exclude: [n] integers, ids that are not searched; those that are not in the index are ignored.

        Returns:
            scores [Q, k] float32 descending and ids [Q, k] int64; where fewer than k rows are searched, score -inf
            with id -1 follows.

        Raises:
            TypeError, ValueError: as `add`; or both include and exclude.
            KeyError: an id to include is not in the index, by name.
        """
        k = _check_int("k", k, 2**31 - 1)
        if include is not None and exclude is not None:
            raise ValueError("give include or exclude, not both; to search some of the ids, include these alone")
        rows = self._rows("query", query)
        names = None
        if include is not None:
            names = read_integers("include", include)
        elif exclude is not None:
            names = read_integers("exclude", exclude)
        scores, ids = self._index.search(rows, k, names, exclude is not None)
        return scores, ids

    @property
    def ids(self) -> NDArray[np.int64]:
        """The ids [n] int64 of the rows, in the order in which they were added; a copy."""
        ids: NDArray[np.int64] = self._index.ids
        return ids

    def __contains__(self, id: SupportsIndex) -> bool:
        id = check_integer("id", id)
        return 0 <= id < 2**63 and id in self._index

    def vectors(self, ids: Ids) -> NDArray[np.float32]:
        """What is stored: the normalised rows, rounded to the index's dtype.

        Args:
            ids: [n] integers, each in the index.

        Returns:
            [n, dim] float32, in the order of the ids.

        Raises:
            KeyError: an id is not in the index, by name.
        """
        vectors: NDArray[np.float32] = self._index.vectors(read_integers("ids", ids))
        return vectors

    def remove(self, ids: Ids) -> int:
        """Removes rows: all of these or, after an error, none.  Takes one pass over the rows behind the first of them.

        Args:
            ids: [n] integers, each in the index and none twice.

        Returns:
            n.  The ids are not given out again by `add` without ids.

        Raises:
            KeyError: an id is not in the index, by name.
            ValueError: an id is given twice, by name.
        """
        gone = read_integers("ids", ids)
        self._index.remove(gone)
        return len(gone)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a file, which appears whole or not at all: docs/formats.md.

        A file that was there is replaced by one of the same mode; a symbolic link stays, and its target is replaced.

        Raises:
            OSError: the file cannot be written, or the path is a directory, device, pipe or socket; what was there is
                as before.
        """
        self._index.save(_replaceable(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> CosineIndex:
        """Reads an index that `save` wrote.  Everything in the file is checked: it may come from anywhere.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file, or damaged; with the reason.
        """
        index = cls.__new__(cls)
        try:
            index._index = _kind().load(_file(path), _threads(threads))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no index, or damaged: {error}") from None
        return index

    def to_faiss(self) -> Any:
        """A faiss index of the same rows and ids: an IndexIDMap2 of an IndexFlatIP.

        Its scores are cosines where the query is normalised, as by `faiss.normalize_L2`.

        Raises:
            ModuleNotFoundError: faiss is not installed (`pip install 'simplexfix[faiss]'`).
        """
        ids, vectors = self._index.rows()
        return _faiss.to_flat(ids, vectors)

    @classmethod
    def from_faiss(cls, index: Any, *, dtype: str = "float32", threads: int | None = None) -> CosineIndex:
        """An index of the rows and ids of a flat faiss index, whose rows are of length 1.

        With such rows cosine ranks as faiss does, by inner product or by L2.

        Args:
            index: a faiss IndexFlat, IndexFlatIP or IndexFlatL2, or an IndexIDMap or IndexIDMap2 of one.
            dtype, threads: as of `CosineIndex`.

        Raises:
            ModuleNotFoundError: faiss is not installed (`pip install 'simplexfix[faiss]'`).
            TypeError: it is not such an index.
            ValueError: its metric is another; a row, by number, is not of length 1 up to 10^-3, or 0; an id that may
                not be, by name.
        """
        ids, vectors = _faiss.from_flat(index)
        made = cls(vectors.shape[1], dtype=dtype, threads=threads)
        made.add(vectors, ids)
        return made

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a CosineIndex is neither copied nor pickled: save(path) and CosineIndex.load(path) make another"
        )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def dim(self) -> int:
        return int(self._index.dim)

    @property
    def dtype(self) -> str:
        """ "float32" or "bfloat16"."""
        return str(self._index.dtype)

    @property
    def threads(self) -> int:
        return int(self._index.threads)

    @property
    def nbytes(self) -> int:
        """Memory that the rows take, in bytes, with what is set aside for more: it comes in pieces of about 1 MiB."""
        return int(self._index.nbytes)

    def __repr__(self) -> str:
        return f"CosineIndex(dim={self.dim}, dtype={self.dtype!r}, threads={self.threads}) with {len(self)} rows"

    def _rows(self, name: str, rows: Rows) -> NDArray[np.float32]:
        """A number past float32's range becomes inf, which the index refuses with its row."""
        given = read_features(name, np.asarray(rows) if isinstance(rows, (list, tuple)) else rows)
        if isinstance(given, torch.Tensor) and given.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {given.device}; pass {name}.cpu()")
        if given.shape[1] != self.dim:
            raise ValueError(f"{name} must have shape [n, {self.dim}], got {list(given.shape)}")
        return to_float32(given)


def _kind() -> Any:
    """The class behind an index: the library's, or the reference implementation."""
    return PlainIndex if _native.library is None else _native.library.CosineIndex


def _threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    return _check_int("threads", threads, 1024)


def _check_int(name: str, value: int, most: int) -> int:
    value = check_integer(name, value)
    if not 1 <= value <= most:
        raise ValueError(f"{name} must lie between 1 and {most}, got {value}")
    return value


_SPECIAL = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def _replaceable(path: str | os.PathLike[str]) -> bytes:
    """The file to put in place: a link's target.  A rename onto anything but a regular file would destroy that."""
    file = _file(path)
    target = os.path.realpath(file) if os.path.islink(file) else file
    try:
        found = os.stat(path)
    except FileNotFoundError:  # a new file, or the target of a dangling link
        return target
    if not stat.S_ISREG(found.st_mode):
        kind = _SPECIAL.get(stat.S_IFMT(found.st_mode), "no regular file")
        number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(number, f"an index is saved as a regular file, and this is {kind}", os.fspath(path))
    if not os.path.exists(target):  # /proc/self/fd/N of a file that was deleted
        raise OSError(errno.ENOENT, "the link leads to a file that has no name any more", os.fspath(path))
    return target


def _file(path: str | os.PathLike[str]) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:  # C++ would end the path there: another file
        raise ValueError("path: embedded null byte")
    return name
