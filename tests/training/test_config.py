"""Tests that configurations are read as intended, or rejected with a reason."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from simplexfix.training.config import ConfigError, overridden, read_config, read_mapping
from simplexfix.training.resume import check_resumable, describe, differences
from simplexfix.training.schedule import Schedule


@dataclass(frozen=True)
class Whole:
    schedule: Schedule
    name: str = "x"
    counts: tuple[int, ...] = (1, 2)
    limits: dict[int, float] = field(default_factory=dict)
    deep: bool = False
    ema: float | None = None


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("schedule:\n  steps: 5\n  learning_rate: 1\ncounts: [3]\nlimits: {2: 0.5}\n")
    (tmp_path / "a.json").write_text(
        '{"schedule": {"steps": 5, "learning_rate": 1}, "counts": [3], "limits": {"2": 0.5}}'
    )
    for name in ("a.yaml", "a.json"):
        content = read_mapping(tmp_path / name)
        assert read_config(Whole, content) == Whole(Schedule(5, 1.0), counts=(3,), limits={2: 0.5})
        changed = overridden(content, ["schedule.steps=7", "deep=true", "name=y", "ema=0.9", "counts=[4, 5]"])
        assert read_config(Whole, changed) == Whole(Schedule(7, 1.0), "y", (4, 5), limits={2: 0.5}, deep=True, ema=0.9)
        assert read_config(Whole, overridden(changed, ["ema=null"])).ema is None
        assert content["schedule"]["steps"] == 5


def test_a_key_of_digits_is_overridden_in_place(tmp_path: Path) -> None:
    """YAML parses the key as a number; other values below it stay."""
    (tmp_path / "a.yaml").write_text("schedule: {steps: 5, learning_rate: 1}\nlimits: {2: 0.5, 3: 1.0}\n")
    content = read_mapping(tmp_path / "a.yaml")
    assert read_config(Whole, overridden(content, ["limits.2=0.25"])).limits == {2: 0.25, 3: 1.0}
    nested = {"1": {"a": 1, "b": 2}, 2: {"a": 3, "b": 4}}
    changed = overridden({"x": nested}, ["x.1.a=5", "x.2.a=6"])
    assert changed == {"x": {"1": {"a": 5, "b": 2}, 2: {"a": 6, "b": 4}}}
    with pytest.raises(ConfigError, match=r"limits has a key twice: 2, '2'"):
        read_config(Whole, {**GOOD, "limits": {2: 0.5, "2": 1.0}})


@pytest.mark.parametrize("text", ["2024", "1.50", "1e3", "-0"])
def test_a_string_option_takes_the_text_of_a_number(text: str) -> None:
    """This holds only on the command line: a file distinguishes strings from numbers."""
    assert read_config(Whole, overridden(GOOD, [f"name={text}"])).name == text
    assert type(read_config(Whole, overridden(GOOD, ["schedule.steps=7"])).schedule.steps) is int
    with pytest.raises(ConfigError, match="name must be a string, got 2024"):
        read_config(Whole, {**GOOD, "name": 2024})


GOOD = {"schedule": {"steps": 5, "learning_rate": 1.0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["schedule.learningrate=1"], r"schedule\.learningrate is unknown; did you mean learning_rate\?"),
        (["qqqq=1"], "qqqq is unknown; known: schedule, name, counts, limits, deep, ema"),
        (["schedule.steps=1.5"], r"schedule\.steps must be an integer, got 1\.5"),
        (["schedule.steps=true"], r"schedule\.steps must be an integer, got True"),
        (["schedule.steps=0"], "schedule: steps, batch and accumulate must be at least 1, got 0, 128 and 1"),
        (["schedule.learning_rate=fast"], r"schedule\.learning_rate must be a finite number, got 'fast'$"),
        (["schedule.learning_rate=NaN"], r"schedule\.learning_rate must be a finite number, got nan"),
        (["schedule=3"], "schedule must be keys and values, got 3"),
        (["counts=3"], "counts must be a list, got 3"),
        (["counts=[1, null]"], r"counts\[1\] must be an integer, got None"),
        (["limits.x=1"], "limits must be an integer, got 'x'"),
        (["deep=1"], "deep must be true or false, got 1"),
        (["name=true"], "name must be a string, got True"),
        (["name"], "'name' must be key=value"),
        (["=3"], "'=3' must be key=value"),
        (["name=x", "name.sub=1"], r"'name\.sub=1': name is the value 'x', not a section"),
    ],
)
def test_bad_values_are_refused(change: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(Whole, overridden(GOOD, change))


def test_missing_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.learning_rate must be given"):
        read_config(Whole, {"schedule": {"steps": 1}})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [1", r"a\.yaml cannot be read: while parsing"),
        ("a.yaml", "a: 1\na: 2", r"a\.yaml cannot be read: key 'a' comes twice"),
        ("a.json", '{"a": 1, "a": 2}', r"a\.json cannot be read: key 'a' comes twice"),
        ("a.json", "[1]", r"a\.json must hold keys and values, got list"),
        ("a.toml", "", r"a\.toml cannot be read: it must be \.json, \.yaml or \.yml"),
    ],
)
def test_files_without_a_configuration_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_mapping(tmp_path / name)


def test_a_number_that_yaml_reads_as_text_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("schedule: {steps: 1, learning_rate: 1e-3}")
    with pytest.raises(ConfigError, match=r"got '1e-3'; YAML reads that as text, write 0\.001"):
        read_config(Whole, read_mapping(tmp_path / "a.yaml"))


def test_changed_settings_are_named() -> None:
    then = {"a": {"b": 1, "c": float("nan")}, "d": (1, 2), "e": 3}
    assert differences(then, {"a": {"b": 1, "c": float("nan")}, "d": [1, 2], "e": 3}) == []
    now = {"a": {"b": 2, "c": float("nan")}, "d": [1], "f": "x"}
    found = ["a.b: was 1, is 2", "d: was [1, 2], is [1]", "e: was 3, is absent", "f: was absent, is 'x'"]
    assert differences(then, now) == found
    with pytest.raises(ValueError, match=r"run was written with other settings or data.*\n  a\.b: was 1, is 2\n"):
        check_resumable(then, now, "run")


def test_descriptions_do_not_depend_on_the_process() -> None:
    class Thing:
        def __init__(self) -> None:
            self.size, self._cache, self.group = 3, object(), object()

    assert describe(Thing())["size"] == 3
    assert set(describe(Thing())) == {"type", "size"}
    assert describe(test_changed_settings_are_named).endswith("test_changed_settings_are_named")
    assert describe(Schedule(1, 1.0))["steps"] == 1
    assert describe({"b", "a"}) == ["a", "b"]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])),
        (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (partial(sorted, reverse=True), partial(sorted, reverse=False)),
        (partial(max, 1), partial(max, 2)),
        ({1, 2}, {1, 3}),
    ],
)
def test_descriptions_of_different_contents_differ(then: object, now: object) -> None:
    assert describe(then) == describe(copy.deepcopy(then))
    assert differences(describe({"x": then}), describe({"x": now}))
    json.dumps(describe(then))  # checkpoints store it
