"""Reads columns from NumPy, ml_dtypes, pandas, pyarrow and Hugging Face datasets as tensors or arrays."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_features
from .._text import listed

__all__ = [
    "Ids",
    "Rows",
    "code_names",
    "read_column",
    "read_features",
    "read_hits",
    "read_ids",
    "read_integers",
    "read_query_scores",
]

# Accepted inputs.  Columns of pandas, pyarrow or datasets have type Any because these packages are optional.
Rows: TypeAlias = Any
Ids: TypeAlias = "Tensor | NDArray[Any] | Sequence[int] | Sequence[str] | Any"


def read_features(name: str, values: Rows) -> Tensor | NDArray[Any]:
    """Returns features as a tensor or array of shape [rows, d]; tensors and arrays of numbers are not copied.

    Args:
        name: name of the argument in error messages.
        values: a tensor or array (also memory-mapped) of float16, bfloat16, float32 or float64; a pandas DataFrame of
            numbers; or a column of pandas, pyarrow or Hugging Face datasets that holds lists or arrays of equal length.

    Returns:
        [rows, d] in the dtype that was given.

    Raises:
        TypeError: the values are not floating.
        ValueError: the shape is not [rows, d], the lengths differ, or a value is missing; the message names the row.
    """
    array = values if isinstance(values, Tensor) else _as_array(name, values, "a torch.Tensor or a NumPy array")
    if isinstance(array, Tensor):
        check_features(name, array)
    else:
        if isinstance(array, np.ma.MaskedArray):
            if np.ma.is_masked(array):
                raise TypeError(f"{name} must have no masked numbers; pass only the rows without them")
            array = array.data
        if array.dtype.kind == "O":
            array = _stacked(name, array)
        _check_floating(name, array)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"{name} must have 2 dimensions, [rows, d] with d >= 1, got {list(array.shape)}")
    return array


def read_integers(name: str, values: Ids) -> NDArray[np.int64]:
    """Returns a column of integers as [rows] int64.

    Args:
        name: name of the argument in error messages.
        values: [rows] integers in a tensor, an array, a list, or a column of pandas, pyarrow or datasets.

    Raises:
        TypeError: the values are not integers.
        ValueError: the shape is not [rows], a value is missing, or a number exceeds int64.
    """
    column = read_column(name, values, accepted="integers")
    if column.dtype.kind == "U":
        raise TypeError(
            f"{name} must be integers, got text; np.unique(..., return_inverse=True)[1] numbers the names of "
            "all files together"
        )
    return column


def read_ids(name: str, values: Ids, rows_name: str, count: int, *, unique: bool = False) -> NDArray[np.int64]:
    """Returns ids as [count] int64.

    Args:
        name: name of the ids in error messages.
        values: [count] integers, as in `read_integers`.
        rows_name: name of the rows that the ids belong to, for error messages.
        count: the expected number of ids.
        unique: whether duplicate ids raise.

    Raises:
        TypeError: the values are not integers.
        ValueError: the number of ids is not `count`, a value is missing, or an id is a duplicate.
    """
    array = read_integers(name, values)
    if len(array) != count:
        raise ValueError(f"{rows_name} has {count} rows, {name} has shape {list(array.shape)}")
    if unique:
        check_unique(name, array)
    return array


def check_unique(name: str, ids: NDArray[np.int64], names: Sequence[str] | None = None) -> None:
    """Raises ValueError for the first duplicate id, with its rows; `names` holds the text of each id, if any."""
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if len(again):
        first, second = (int(order[again[0] + i]) for i in (0, 1))
        shown = ids[first] if names is None else repr(names[ids[first]])
        raise ValueError(f"{name} must hold each id once, got {shown} in rows {first} and {second}")


def read_hits(name: str, hits: Any, meaning: str = "right or wrong for each query") -> NDArray[np.bool_]:
    """Returns hits as [Q] bool, one per query.

    Args:
        name: name of the argument in error messages.
        hits: [Q] bool tensor or array, Q >= 1.
        meaning: meaning of a value, for the error message.

    Raises:
        TypeError: the dtype is not bool.
        ValueError: the shape is not [Q] with Q >= 1.
    """
    array: NDArray[Any] = np.asarray(hits.detach().cpu() if isinstance(hits, Tensor) else hits)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must have shape [Q] with Q >= 1, got {list(array.shape)}")
    if array.dtype != np.bool_:
        raise TypeError(f"{name} must be bool, {meaning}, got {array.dtype}")
    return array


def read_query_scores(name: str, scores: Any) -> NDArray[np.bool_] | NDArray[np.float64]:
    """Returns the score of each query, either hits [Q] bool or values [Q] float64.

    Args:
        name: name of the argument in error messages.
        scores: [Q] bool, or [Q] floating in [0, 1]; Q >= 1.

    Raises:
        TypeError: the dtype is neither bool nor floating.
        ValueError: the shape is not [Q] with Q >= 1, or a value is outside [0, 1].
    """
    array: NDArray[Any] = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores)
    if array.ndim == 1 and len(array) and array.dtype.kind == "f":
        values = array.astype(np.float64)
        bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
        if len(bad):
            raise ValueError(f"{name} must lie in [0, 1], got {values[bad[0]]} for query {bad[0]}")
        return values
    return read_hits(name, array, "right or wrong for each query, or floating scores")


def read_column(name: str, values: Ids, *, accepted: str = "integers or names") -> NDArray[Any]:
    """Returns a column as [rows] int64 or as [rows] strings.

    Args:
        name: name of the argument in error messages.
        values: [rows] integers or names in a tensor, an array, a list, or a column of pandas, pyarrow or datasets.
        accepted: the kinds that the caller accepts, for the error message.

    Raises:
        TypeError: the values are neither integers nor names.
        ValueError: the shape is not [rows], a value is missing, or a number exceeds int64.
    """
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            dtype = str(values.dtype).removeprefix("torch.")
            raise TypeError(f"{name} must be {accepted}, got {dtype}; if all values are whole, pass {name}.long()")
        array: NDArray[Any] = values.detach().cpu().numpy()
    else:
        given = _as_array(name, values, None, accepted)
        array = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
    if np.ma.is_masked(array):
        raise TypeError(f"{name} must have no masked numbers; pass only the rows without them")
    array = np.asarray(array)
    if not array.size and array.dtype.kind in "fO":
        array = array.astype(np.int64)  # NumPy gives an empty list the dtype float64
    if array.dtype.kind in "OT":  # T: NumPy's variable-width strings
        array = _plain(name, array.astype(object))
    if array.dtype.kind == "f" and np.isnan(array).any():  # pandas stores integers with missing values as floats
        row = int(np.isnan(array.ravel()).argmax())
        raise ValueError(f"{name} row {row} is missing (nan): drop such rows, or give them a label of their own")
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            remedy = f"np.char.decode({name}, encoding) makes text of another encoding"
            raise ValueError(f"{name} must be names in UTF-8, got other bytes: {error}; {remedy}") from None
    if array.dtype.kind not in "iuU":
        raise TypeError(f"{name} must be {accepted}, got {_describe(array)}; {_label_remedy(name, array)}")
    if array.ndim != 1:
        remedy = f"; pass {name}.ravel()" if array.size == max(array.shape, default=0) and array.ndim else ""
        raise ValueError(
            f"{name} must have one dimension, one value for each row, got shape {list(array.shape)}{remedy}"
        )
    if array.dtype.kind == "U":
        return array
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit into int64, at most 2^63 - 1, got {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int64)


def code_names(
    first_name: str, first: NDArray[Any], second_name: str, second: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...] | None]:
    """Returns both columns as int64 codes, and the names in the order of their codes (None for integer columns).

    Names are normalised to Unicode's composed form (NFC) and numbered in the order of their code points.  Two files
    with the same names therefore get the same codes.

    Raises:
        TypeError: one column holds names and the other integers.
    """
    columns = first, second
    strings = [column.dtype.kind == "U" and len(column) > 0 for column in columns]  # an empty column matches both kinds
    if not any(strings):
        return np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64), None
    if not all(is_name or not len(column) for is_name, column in zip(strings, columns, strict=True)):
        kinds = ["names" if is_name else "integers" for is_name in strings]
        raise TypeError(
            f"{first_name} are {kinds[0]} and {second_name} are {kinds[1]}: "
            "both must be names, or both integers, to say which items belong together"
        )
    found, places = np.unique(np.concatenate([first.astype(str), second.astype(str)]), return_inverse=True)
    composed = [unicodedata.normalize("NFC", str(name)) for name in found]
    names = tuple(sorted(set(composed)))
    number = {name: at for at, name in enumerate(names)}
    numbers = np.array([number[name] for name in composed], dtype=np.int64)[places]
    return numbers[: len(first)], numbers[len(first) :], names


def _as_array(name: str, values: Any, expected: str | None, accepted: str = "") -> Tensor | NDArray[Any]:
    """Converts a column of another library, or a sequence; with `expected` set, a sequence raises TypeError.

    `accepted` is for the error message about text and mappings.
    """
    if isinstance(values, np.ndarray):
        return values
    library = type(values).__module__.partition(".")[0]
    if library == "pyarrow":
        return _of_arrow(name, values)
    if library == "datasets":
        return _of_datasets(name, values)
    if hasattr(values, "to_numpy"):  # pandas, polars
        found: NDArray[Any] = np.asarray(values.to_numpy())
        return found
    if hasattr(values, "__array__"):  # JAX
        return np.asarray(values)
    if expected is not None:
        kind = type(values).__name__
        raise TypeError(f"{name} must be {expected}, got {kind}; np.asarray({name}, dtype=np.float32) makes one")
    if isinstance(values, (str, bytes, dict, set)):
        raise TypeError(f"{name} must be {accepted}, one for each row, got {type(values).__name__}")
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must hold one value for each row: {error}") from None


def _of_datasets(name: str, column: Any) -> Tensor | NDArray[Any]:
    """Reads a datasets column from its Arrow table, or through the data set's custom format function if it has one."""
    source: Any = getattr(column, "source", None)
    if hasattr(source, "select_columns") and source.format["type"] != "custom":
        table = source.select_columns([column.column_name]).with_format("arrow")[:]
        return _of_arrow(name, table[column.column_name])
    values = column[:]
    if isinstance(values, (Tensor, np.ndarray)):
        return values
    objects = np.empty(len(values), dtype=object)
    objects[:] = values
    return objects


def _of_arrow(name: str, column: Any) -> NDArray[Any]:
    """Reads an Arrow column as [rows], or as [rows, d] if it holds lists of equal length."""
    import pyarrow

    chunks = column.chunks if isinstance(column, pyarrow.ChunkedArray) else [column]
    if not all(isinstance(chunk, pyarrow.Array) for chunk in chunks):
        raise TypeError(f"{name} must be one column, got {type(column).__name__}; name the column, as table['vector']")
    arrays, begin = [], 0
    for chunk in chunks:
        arrays.append(_of_arrow_chunk(name, chunk, begin))
        begin += len(chunk)
    if not arrays:
        return np.empty(0, dtype=np.int64)
    widths = {array.shape[1:] for array in arrays}
    if len(widths) > 1:
        raise ValueError(f"{name} holds vectors of different lengths, {listed(sorted(w[0] for w in widths if w))}")
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _of_arrow_chunk(name: str, chunk: Any, begin: int) -> NDArray[Any]:
    import pyarrow
    import pyarrow.types as types

    if isinstance(chunk, pyarrow.ExtensionArray):
        chunk = chunk.storage
    if types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    if chunk.null_count:
        row = int(np.flatnonzero(np.asarray(chunk.is_null()))[0])
        raise ValueError(f"{name} row {begin + row} is missing: drop such rows")
    kind = chunk.type
    if types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind):
        lengths = np.asarray(chunk.value_lengths()) if len(chunk) else np.zeros(0, dtype=np.int64)
        unlike = np.flatnonzero(lengths != lengths[:1])
        if len(unlike):
            row = int(unlike[0])
            raise _unlike(name, begin + row, int(lengths[row]), begin, int(lengths[0]))
        flat = chunk.flatten()
        if flat.null_count:
            at = int(np.flatnonzero(np.asarray(flat.is_null()))[0])
            raise ValueError(f"{name} row {begin + at // int(lengths[0])} has a missing number: drop such rows")
        if not types.is_primitive(flat.type):
            raise TypeError(f"{name} must hold vectors of numbers, got {kind}")
        numbers: NDArray[Any] = flat.to_numpy(zero_copy_only=False)
        return numbers.reshape(len(chunk), -1 if len(numbers) else 0)
    values: NDArray[Any] = chunk.to_numpy(zero_copy_only=False)
    return values


def _stacked(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Stacks an array of objects or a column of lists, one vector per row, to [rows, d]."""
    if array.ndim != 1:
        kinds = {type(cell).__name__ for cell in array.ravel() if not isinstance(cell, (int, float))}
        raise TypeError(
            f"{name} must be floating numbers, got Python objects, {listed(sorted(kinds))}; "
            f"pass the columns of numbers, {name}.astype(np.float32)"
        )
    rows: list[NDArray[Any]] = []
    for i, value in enumerate(array):
        if value is None or (isinstance(value, float) and value != value):
            raise ValueError(f"{name} row {i} is missing: drop such rows")
        row = np.asarray(value)
        if row.ndim != 1 or row.dtype.kind not in "fiuV":
            raise TypeError(f"{name} must hold a vector of numbers in each row, got {type(value).__name__} in row {i}")
        if rows and row.shape != rows[0].shape:
            raise _unlike(name, i, len(row), 0, len(rows[0]))
        rows.append(row)
    return np.stack(rows) if rows else np.empty((0, 0), dtype=np.float32)


def _unlike(name: str, row: int, length: int, first: int, first_length: int) -> ValueError:
    return ValueError(
        f"{name} holds vectors of different lengths, {first_length} numbers in row {first} and {length} in row {row}; "
        "all rows must be by one model"
    )


def _check_floating(name: str, array: NDArray[Any]) -> None:
    if (array.dtype.kind == "f" and 2 <= array.dtype.itemsize <= 8) or array.dtype.name == "bfloat16":
        return
    kind = array.dtype.kind
    if kind == "V" and array.dtype.names is None and array.dtype.name.startswith("void"):
        remedy = "save them with .astype(np.float32), or in a .safetensors file"
        raise TypeError(f"{name} must be float32, float64 or float16, got {_describe(array)}: {remedy}")
    remedy = f"; pass {name}.astype(np.float32)" if kind in "iubfV" else ""
    if array.dtype.names:
        remedy = f"; pass one field, such as {name}[{array.dtype.names[0]!r}]"
    raise TypeError(f"{name} must be float32, float64 or float16, got {_describe(array)}{remedy}")


def _plain(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Converts an array of Python objects (the storage of pandas) to strings or integers."""
    flat = array.ravel()
    kinds = {type(value) for value in flat}
    if kinds <= {str, np.str_}:
        return array.astype(str)
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        if max(map(int, flat)) > np.iinfo(np.int64).max or min(map(int, flat)) < np.iinfo(np.int64).min:
            raise ValueError(f"{name} must fit into int64, at most 2^63 - 1, got {max(map(int, flat))}")
        return array.astype(np.int64)
    for i, value in enumerate(flat):
        if value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType":
            raise ValueError(f"{name} row {i} is missing: drop such rows, or give them a label of their own")
    odd = next(
        i for i, value in enumerate(flat) if type(value) is not type(flat[0]) or not isinstance(value, (int, str))
    )
    raise TypeError(
        f"{name} must be integers or names, got Python objects, in row {odd} {type(flat[odd]).__name__}; "
        f"pass np.unique({name}.astype(str), return_inverse=True)[1]"
    )


def _describe(array: NDArray[Any]) -> str:
    if array.dtype.names:
        return f"a structured array with fields {listed(array.dtype.names)}"
    if array.dtype.name.startswith("void"):
        return f"{array.dtype.str}, raw bytes (NumPy saves bfloat16 and float8 arrays of ml_dtypes in this way)"
    return "text" if array.dtype.kind in "US" else str(array.dtype)


def _label_remedy(name: str, array: NDArray[Any]) -> str:
    if array.dtype.names:
        return f"pass one field, such as {name}[{array.dtype.names[0]!r}]"
    if array.dtype.kind == "b":
        return f"pass {name}.astype(np.int64)"
    if array.dtype.name.startswith("void"):
        return f"save {name}.astype(np.int64)"
    if array.dtype.kind in "fV":
        return f"if all values are whole, pass {name}.astype(np.int64)"
    return f"pass np.unique({name}, return_inverse=True)[1]"
