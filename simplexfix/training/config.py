"""Configuration: one file, typed, and no word in it that nobody reads."""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from .._files import read_text

__all__ = ["ConfigError", "check_fits", "overridden", "plain", "read_config", "read_mapping"]

_T = TypeVar("_T")


class ConfigError(ValueError):
    """A configuration says something that it cannot; the message names the place."""


def read_mapping(path: Path) -> dict[str, Any]:
    """What a .json, .yaml or .yml file says; YAML needs PyYAML.

    Raises:
        ConfigError: it cannot be read, names a key twice, or holds no mapping.
        OSError: it is not there.
    """
    try:
        text = read_text(path)
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=_no_key_twice)
        elif path.suffix in (".yaml", ".yml"):
            content = _parsed_yaml(text)
        else:
            raise ValueError("it must be .json, .yaml or .yml")
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


def overridden(content: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The content with `key.sub=value` put in, one after the other; a value is JSON, and else a string.

    A number keeps its text, for `read_config` where a string is wanted: a folder may be called 2024.

    Raises:
        ConfigError: an assignment without "=", or below a key that holds a value.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        *above, last = name.split(".")
        if not equals or not all((*above, last)):
            raise ConfigError(f"{assignment!r} must be key=value or key.sub=value")
        try:
            value = json.loads(text, parse_int=_written(_Integer), parse_float=_written(_Float))
        except ValueError:
            value = text
        level: dict[Any, Any] = result
        for name in above:
            key = _as_written(name, level)
            below = level.get(key)
            if not isinstance(below, (Mapping, type(None))):
                raise ConfigError(f"{assignment!r}: {key} holds {below!r}, which nothing is below")
            level[key] = dict(below or {})
            level = level[key]
        level[_as_written(last, level)] = value
    return result


class _Integer(int):
    text: str


class _Float(float):
    text: str


def _written(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        value.text = text
        return value

    return read


def _as_written(name: str, level: Mapping[Any, Any]) -> Any:
    """The key of that name: YAML reads those of digits as numbers."""
    return next((key for key in level if str(key) == name), name)


def read_config(kind: type[_T], content: Mapping[str, Any], place: str = "") -> _T:
    """A dataclass of that content; fields that are dataclasses are read in the same way.

    Types are those of the annotations: an integer will do for a float, nothing else for anything else.

    Raises:
        ConfigError: an unknown key, with the nearest known one; a key that is missing; a value of another type; what
            the dataclass itself refuses.
    """
    assert is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    for key in content:
        if key not in known:
            raise ConfigError(_unknown(f"{place}{key}", str(key), list(known)))
    missing = [
        name
        for name, field in known.items()
        if name not in content and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{', '.join(place + name for name in missing)} must be given")
    values = {key: _typed(value, hints[key], f"{place}{key}") for key, value in content.items()}
    try:
        return typing.cast(_T, kind(**values))
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place.rstrip('.') or 'configuration'}: {error}") from None


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as JSON gives it back."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return content


def check_fits(options: Any, choice: str, belongs: Mapping[str, Sequence[str]]) -> None:
    """Of a dataclass: an option that belongs to other values of `choice` must be at its default, for nobody reads it.

    Raises:
        ValueError: one is not; names it, and what it belongs to.
    """
    chosen = getattr(options, choice).partition(":")[0]
    for option in fields(options):
        value = getattr(options, option.name)
        if chosen not in belongs.get(option.name, (chosen,)) and value != option.default:
            raise ValueError(
                f"{option.name} is of {choice}={' or '.join(map(repr, belongs[option.name]))}, got {value!r} with "
                f"{choice}={chosen!r}; leave it out, or put {json.dumps({choice: chosen})} in place of all"
            )


def _unknown(name: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{name} is unknown; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


def _typed(value: Any, hint: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _typed(value, hint, place)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return read_config(typing.cast(type, hint), value, f"{place}.")
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(entry, arguments[0], f"{place}[{i}]") for i, entry in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            keys = [_typed(_number(key), arguments[0], place) for key in value]
            if len(set(keys)) != len(keys):
                raise ConfigError(f"{place} has a key twice: {', '.join(map(repr, value))}")
            entries = (_typed(entry, arguments[1], f"{place}.{key}") for key, entry in value.items())
            return dict(zip(keys, entries, strict=True))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif hint is str and isinstance(value, (_Integer, _Float)):
        return value.text
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return int(value) if hint is int else value
    raise ConfigError(f"{place} must be {_name(hint)}, got {value!r}{_hint_of_yaml(value, hint)}")


def _number(key: Any) -> Any:
    """Keys of JSON are strings."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is tuple:
        return "a list"
    return "keys and values"


def _hint_of_yaml(value: Any, hint: Any) -> str:
    """YAML 1.1 reads 1e-3 as text."""
    if hint is float and isinstance(value, str):
        try:
            return f"; YAML reads that as text, write {float(value)}"
        except ValueError:
            pass
    return ""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in names if names.count(key) > 1)!r} comes twice")
    return content


def _parsed_yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "YAML needs PyYAML: pip install 'simplexfix[train]', or write JSON", name="yaml"
        ) from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        pairs = [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
        return _no_key_twice(pairs)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
