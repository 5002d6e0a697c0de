"""An exact cosine index with ids: rows can be added and removed, and the index can be saved to a file."""

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
    """An exact nearest-neighbour index: it returns the k stored vectors with the largest cosine similarity.

        g = F.normalize(vectors)                    # in float64, rounded to float32 (or bfloat16, as stored)
        q = F.normalize(query)                      # in float64, rounded to float32
        scores, rows = (q.double() @ g.double().T).float().topk(k)
        ids = ids[rows]

    A score is the float64 dot product, rounded to float32.  Results are ordered by descending score, then by ascending
    id.  They do not depend on batch size, thread count, instruction set or the order of additions.  A zero vector
    scores 0.

    Memory: each vector has an 8-bit quantized copy, from which a first pass excludes most rows.  A row takes 5 d + 12
    bytes with float32 and 3 d + 12 with bfloat16; 8 more unless the ids are 0, 1, 2, ...; about 40 more once ids are
    not ascending.

    Threads: all methods are thread-safe.  Searches run concurrently, changes run exclusively, and the GIL is released
    meanwhile.  Ctrl-C ends a call within a second and leaves the index unchanged.

    Processes: an index cannot be copied or pickled; load a second one from a file.  After a fork the child has its own
    index with the same rows.  If another thread was adding or removing rows during the fork, every call in the child
    raises RuntimeError.

    Args:
        dim: d, from 1 to 2^31 - 2.
        dtype: storage of vectors, "float32" or "bfloat16".  With "bfloat16" scores are exact for the rounded vectors;
            rounding changes each number by a relative error of at most 2^-9.
        threads: most threads per call, from 1 to 1024; None for `torch.get_num_threads()`.

    Raises:
        TypeError: `dim` or `threads` is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from simplexfix import CosineIndex
        >>> index = CosineIndex(2)
        >>> index.add(np.float32([[1, 0], [1, 1], [0, 2]]), ids=[10, 11, 12])
        array([10, 11, 12])
        >>> scores, ids = index.search(np.float32([[3, 0.1]]), k=2)
        >>> ids
        array([[10, 11]])
        >>> index.remove([10])
        1
        >>> len(index)
        2
    """

    def __init__(self, dim: int, *, dtype: str = "float32", threads: int | None = None) -> None:
        dim = _check_int("dim", dim, _MAX_DIM)
        check_name("dtype", dtype, ("float32", "bfloat16"))
        self._index: Any = _kind()(dim, dtype, _threads(threads))

    def add(self, vectors: Rows, ids: Ids | None = None) -> NDArray[np.int64]:
        """Adds rows; after an error the index is unchanged.

        Args:
            vectors: [n, dim] float32, float64, float16 or bfloat16, finite.  An array, a CPU tensor, lists of numbers,
                or a column of vectors of pandas, pyarrow or Hugging Face datasets.  float64 is rounded to float32.
            ids: [n] integers in [0, 2^63 - 2], unique and not in the index.  None for consecutive ids above the
                highest id that the index ever held, starting at 0.

        Returns:
            The ids [n] int64 of the new rows.

        Raises:
            TypeError: vectors are not floating, or ids are not integers.
            ValueError: the shape is wrong, a row holds nan or inf, or an id is out of range or a duplicate; the message
                names the row or id.
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
        """Returns the k best rows for each query, among all rows or a subset of ids.

        Args:
            query: [Q, dim] in any type that `add` accepts, finite.
            k: from 1 to 2^31 - 1.
            include: [n] integers; only rows with these ids are searched.  Each must be in the index.
            exclude: [n] integers; rows with these ids are not searched.  Ids that are not in the index are ignored.

        Returns:
            scores [Q, k] float32 in descending order, and ids [Q, k] int64.  If fewer than k rows are searched, the
            remaining places hold score -inf and id -1.

        Raises:
            TypeError: the query is not floating, or an id or k is not an integer.
            ValueError: the shape is wrong, a row holds nan or inf, k is out of range, or both `include` and `exclude`
                are given.
            KeyError: an id of `include` is not in the index; the message names it.
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
        """Ids [n] int64 of all rows in the order of addition; a copy."""
        ids: NDArray[np.int64] = self._index.ids
        return ids

    def __contains__(self, id: SupportsIndex) -> bool:
        id = check_integer("id", id)
        return 0 <= id < 2**63 and id in self._index

    def vectors(self, ids: Ids) -> NDArray[np.float32]:
        """Returns stored vectors: normalised, and rounded to the index's dtype.

        Args:
            ids: [n] integers, each in the index.

        Returns:
            [n, dim] float32, in the order of `ids`.

        Raises:
            KeyError: an id is not in the index; the message names it.
        """
        vectors: NDArray[np.float32] = self._index.vectors(read_integers("ids", ids))
        return vectors

    def remove(self, ids: Ids) -> int:
        """Removes rows; after an error the index is unchanged.

        The cost is one pass over the rows behind the first removed row.  `add` without ids does not reuse removed ids.

        Args:
            ids: [n] integers, unique, each in the index.

        Returns:
            n, the number of removed rows.

        Raises:
            KeyError: an id is not in the index; the message names it.
            ValueError: an id is a duplicate; the message names it.
        """
        gone = read_integers("ids", ids)
        self._index.remove(gone)
        return len(gone)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a file atomically; docs/reference/formats.md specifies the format.

        An existing file is replaced and keeps its mode.  A symbolic link stays, and its target is replaced.

        Args:
            path: a regular file, or a new one.

        Raises:
            OSError: the file cannot be written, or the path is a directory, device, pipe or socket; an existing file
                is unchanged.
        """
        self._index.save(_replaceable(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> CosineIndex:
        """Reads an index that `save` wrote; untrusted files are safe, since every field is validated.

        Args:
            path: the file.
            threads: as in the constructor.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not an index, or damaged; the message gives the reason.
        """
        index = cls.__new__(cls)
        try:
            index._index = _kind().load(_file(path), _threads(threads))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not an index, or damaged: {error}") from None
        return index

    def to_faiss(self) -> Any:
        """Returns a faiss IndexIDMap2 of an IndexFlatIP with the same rows and ids.

        Its scores are cosines if queries are normalised, such as by `faiss.normalize_L2`.

        Raises:
            ModuleNotFoundError: faiss is not installed (`pip install 'simplexfix[faiss]'`).
        """
        ids, vectors = self._index.rows()
        return _faiss.to_flat(ids, vectors)

    @classmethod
    def from_faiss(cls, index: Any, *, dtype: str = "float32", threads: int | None = None) -> CosineIndex:
        """Returns an index with the rows and ids of a flat faiss index of unit vectors.

        For unit vectors the order by cosine equals faiss's order by inner product or L2 distance.

        Args:
            index: a faiss IndexFlat, IndexFlatIP or IndexFlatL2, or an IndexIDMap or IndexIDMap2 of one.
            dtype, threads: as in the constructor.

        Raises:
            ModuleNotFoundError: faiss is not installed (`pip install 'simplexfix[faiss]'`).
            TypeError: `index` has another type.
            ValueError: the metric is neither inner product nor L2, the norm of a row is neither 0 nor within 10^-3 of
                1, or an id is negative or a duplicate; the message names the row or id.
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
        """Memory of the rows in bytes, spare capacity included; memory is allocated in chunks of about 1 MiB."""
        return int(self._index.nbytes)

    def __repr__(self) -> str:
        return f"CosineIndex(dim={self.dim}, dtype={self.dtype!r}, threads={self.threads}) with {len(self)} rows"

    def _rows(self, name: str, rows: Rows) -> NDArray[np.float32]:
        """Converts rows to float32; numbers beyond its range become inf, and the index then raises with the row."""
        given = read_features(name, np.asarray(rows) if isinstance(rows, (list, tuple)) else rows)
        if isinstance(given, torch.Tensor) and given.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {given.device}; pass {name}.cpu()")
        if given.shape[1] != self.dim:
            raise ValueError(f"{name} must have shape [n, {self.dim}], got {list(given.shape)}")
        return to_float32(given)


def _kind() -> Any:
    """Returns the compiled index class, or the reference implementation without the library."""
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
    """Returns the path to replace, with links resolved; raises for directories, devices, pipes and sockets."""
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
    if not os.path.exists(target):  # /proc/self/fd/N of a deleted file
        raise OSError(errno.ENOENT, "the path links to a deleted file: save to another path", os.fspath(path))
    return target


def _file(path: str | os.PathLike[str]) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:  # C++ would cut the path there and open another file
        raise ValueError("path: embedded null byte")
    return name
