"""An option of a run's configuration is of what was chosen, or refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from simplexfix.training import PRESETS, ConfigError, MethodConfig, RunConfig, overridden, read_config

FEATURES = {
    "data": {"kind": "features", "path": "feat"},
    "model": {"kind": "mlp", "hidden": [16]},
    "tasks": {"counts": [4, 4]},
    "schedule": {"steps": 6, "learning_rate": 0.01},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["method.name=simplex", "method.negatives=foo"],
            "method: negatives is of name='hoc', got 'foo' with name",
        ),
        (["method.weight=3"], "method: weight is of name='fd' or 'bct' or 'qdc', got 3.0 with name='hoc'"),
        (["method.name=er", "method.mu=3.0"], "method: mu is of name='hoc', got 3.0 with name='er'"),
        (["method.name=er", "method.slots=8"], "method: slots is of name='hoc' or 'simplex', got 8 with name='er'"),
        (["method.name=bct", "method.distance=l2"], "method: distance is of name='fd', got 'l2' with name='bct'"),
        (["method.name=simplex", "method.gather=false"], "method: gather is of name='hoc' or 'qdc', got False"),
        (["tasks.parts=5"], "tasks: parts is of kind='instance_incremental', got 5 with kind='class_incremental'"),
        (["model.stem=foo"], "model: stem is of kind='resnet18', got 'foo' with kind='mlp'"),
        (["model.kind=timm:x"], r"model: hidden is of kind='mlp', got \(16,\) with kind='timm'"),
        (["data.size=-3"], "data: size is of kind='images', got -3 with kind='features'"),
        (["data.mean=[0.5]"], "data: mean is of kind='cifar' or 'images', got"),
        (["data.query_batches=[1]"], "data: query_batches is of kind='cifar', got"),
        (["schedule.momentum=0.1"], "schedule: momentum is of optimizer='sgd', got 0.1 with optimizer='adamw'"),
        (["protocols=[]"], "protocols must name at least one"),
        (
            ["method.name=er", "tasks.hoc_reference=self"],
            "tasks: hoc_reference must be one of 'deployed', 'deployed_or_replacement', 'replacement'",
        ),
    ],
)
def test_an_option_of_something_else_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(RunConfig, overridden(FEATURES, changes))


@pytest.mark.parametrize(
    "changes",
    [
        ["method.name=fd", "method.weight=3", "method.distance=l2", "method.scale=8"],
        ["method.name=bct", "method.weight=3"],
        ["method.name=simplex", "method.slots=8", "method.normalize=true"],
        ["method.mu=3.0", "method.negatives=infonce", "method.gather=false"],
        ["method.name=er", "method.slots=1024"],  # as everywhere
        ["schedule.optimizer=sgd", "schedule.momentum=0.1"],
        ["tasks.kind=instance_incremental", "tasks.counts=[]", "tasks.parts=5"],
    ],
)
def test_an_option_of_what_was_chosen_is_none_of_them(changes: list[str]) -> None:
    read_config(RunConfig, overridden(FEATURES, changes))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["er", "fd", "bct", "simplex", "hoc"])
def test_a_preset_is_for_all_methods(name: str, method: str) -> None:
    """The whole of `method` is given where the preset's has options of another."""
    content = json.loads(json.dumps(asdict(PRESETS[name])))
    config = read_config(RunConfig, overridden(content, [f'method={{"name": "{method}"}}']))
    assert config.method == MethodConfig(name=method)


def test_pre_training_has_the_options_that_it_knows() -> None:
    hoc = MethodConfig(slots=8, normalize=True, scale=4.0, mu=3.0)
    assert hoc.pretraining() == MethodConfig("simplex", slots=8, normalize=True, scale=4.0)
    assert MethodConfig("fd", weight=3.0, distance="l2", scale=4.0).pretraining() == MethodConfig("er", scale=4.0)


@pytest.mark.parametrize("place", ["model", "tasks.replacements.0.model"])
def test_a_pretrained_network_has_its_own_mean_and_std(place: str) -> None:
    changes = [
        'data={"kind": "images", "path": "photographs"}',
        'model={"kind": "resnet18"}',
        'tasks.replacements={"0": {"model": {"kind": "resnet18"}}}',
        f'{place}={{"kind": "timm:resnet50", "pretrained": true}}',
    ]
    with pytest.raises(ConfigError, match=r"data\.mean and data\.std are CIFAR-100's, and timm:resnet50 .*0\.485"):
        read_config(RunConfig, overridden(FEATURES, changes))
    own = ["data.mean=[0.485, 0.456, 0.406]", "data.std=[0.229, 0.224, 0.225]"]
    read_config(RunConfig, overridden(FEATURES, [*changes, *own]))
