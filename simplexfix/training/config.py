"""Typed configuration files; unknown or unused keys are errors."""

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

from .._files import read_text, unique_keys

__all__ = ["ConfigError", "check_fits", "overridden", "plain", "read_config", "read_mapping"]

_T = TypeVar("_T")


class ConfigError(ValueError):
    """A configuration is invalid; the message names the key."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a .json, .yaml or .yml file.

    Args:
        path: path of the file.

    Returns:
        The content as nested dicts, lists and values.

    Raises:
        ConfigError: the file has another suffix, cannot be parsed, has a duplicate key, or holds no mapping.
        OSError: the file cannot be opened.
        ModuleNotFoundError: the file is YAML and PyYAML is missing.
    """
    try:
        text = read_text(path)
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=unique_keys)
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
    """Returns a configuration with some values replaced, as the command line does.

    Args:
        content: a configuration, as `read_mapping` returns it; it is not changed.
        assignments: "key=value" or "key.sub=value", applied in order.  A value is parsed as JSON; if it is not JSON it
            is a string.  `read_config` accepts a number as text where a string is expected, such as the folder name
            2024.

    Returns:
        A new mapping.

    Raises:
        ConfigError: an assignment has no "=" or an empty key, or its key lies below a key that holds a value.

    Example:
        >>> from simplexfix.training import overridden
        >>> overridden({"trainer": {"ema": 0.9}}, ["trainer.ema=0.99", "seed=1"])
        {'trainer': {'ema': 0.99}, 'seed': 1}
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
                raise ConfigError(f"{assignment!r}: {key} is the value {below!r}, not a section")
            level[key] = dict(below or {})
            level = level[key]
        level[_as_written(last, level)] = value
    return result


# Numbers in assignments keep their text, for options that are strings.
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
    """Returns the key of `level` with this text, or `name`: YAML parses keys of digits as numbers."""
    return next((key for key in level if str(key) == name), name)


def read_config(kind: type[_T], content: Mapping[str, Any], place: str = "") -> _T:
    """Returns a dataclass with the values of a configuration; fields that are dataclasses are read recursively.

    Values must have the annotated types; an integer is also accepted as a float.

    Args:
        kind: the dataclass, such as `RunConfig`.
        content: its values by field name.
        place: prefix of keys in error messages, such as "trainer.".

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: a key is unknown (the message suggests the most similar one) or missing, a value has another type,
            or the dataclass rejects a value.

    Example:
        >>> from simplexfix.training import RunConfig, read_config
        >>> content = {"tasks": {"counts": [60, 40]}, "schedule": {"steps": 120, "learning_rate": 0.003}}
        >>> read_config(RunConfig, content).tasks.counts
        (60, 40)
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
    """Returns a dataclass as JSON values."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return content


def check_fits(options: Any, choice: str, belongs: Mapping[str, Sequence[str]]) -> None:
    """Checks that unused options have their defaults.

    Args:
        options: a dataclass.
        choice: name of the field whose value decides which options are used, such as "kind".
        belongs: option name -> the values of `choice` that use it; other options are always used.

    Raises:
        ValueError: an unused option has another value; the message names it and the values that use it.
    """
    chosen = getattr(options, choice).partition(":")[0]
    for option in fields(options):
        value = getattr(options, option.name)
        if chosen not in belongs.get(option.name, (chosen,)) and value != option.default:
            raise ValueError(
                f"{option.name} needs {choice}={' or '.join(map(repr, belongs[option.name]))}, got {value!r} with "
                f"{choice}={chosen!r}; leave it out, or replace the section by {json.dumps({choice: chosen})}"
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
    """Converts a key of digits to an integer: JSON keys are strings."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is tuple:
        return "a list"
    return "keys and values"


def _hint_of_yaml(value: Any, hint: Any) -> str:
    """Returns a hint for numbers such as 1e-3, which YAML 1.1 parses as text."""
    if hint is float and isinstance(value, str):
        try:
            return f"; YAML reads that as text, write {float(value)}"
        except ValueError:
            pass
    return ""


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
        return unique_keys(pairs)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
