"""Tests that options of a run's configuration are rejected if the chosen kind does not use them."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from simplexfix import SlotRegistry
from simplexfix.methods import ASNN
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
            "method: negatives needs name='hoc', got 'foo' with name",
        ),
        (["method.weight=3"], "method: weight needs name='fd' or 'bct' or 'qdc', got 3.0 with name='hoc'"),
        (
            ["method.name=er", "method.classification=asnn"],
            "method: classification needs name='fd' or 'bct' or 'hoc', got 'asnn' with name='er'",
        ),
        (
            ["method.queue=100"],
            "method: queue needs name or classification='asnn' or 'nnp', got 100 with name='hoc' and "
            "classification='cross_entropy'; leave it out",
        ),
        (["method.name=asnn", "method.alpha=2"], "method: alpha needs name or classification='nnp', got 2.0 with"),
        (["method.classification=knn"], "classification must be one of 'cross_entropy', 'asnn', 'nnp', got 'knn'"),
        (["method.name=nnp", "method.neighbours=0"], "neighbours must be at least 1 and queue at least 0, got 0"),
        (["method.name=er", "method.mu=3.0"], "method: mu needs name='hoc', got 3.0 with name='er'"),
        (["method.name=er", "method.slots=8"], "method: slots needs name='hoc' or 'simplex', got 8 with name='er'"),
        (["method.name=bct", "method.distance=l2"], "method: distance needs name='fd', got 'l2' with name='bct'"),
        (["method.name=simplex", "method.gather=false"], "method: gather needs name='hoc' or 'qdc', got False"),
        (["tasks.parts=5"], "tasks: parts needs kind='instance_incremental', got 5 with kind='class_incremental'"),
        (["model.stem=foo"], "model: stem needs kind='resnet18', got 'foo' with kind='mlp'"),
        (["model.kind=timm:x"], r"model: hidden needs kind='mlp', got \(16,\) with kind='timm'"),
        (["data.size=-3"], "data: size needs kind='images', got -3 with kind='features'"),
        (["data.mean=[0.5]"], "data: mean needs kind='cifar' or 'images', got"),
        (["data.query_batches=[1]"], "data: query_batches needs kind='cifar', got"),
        (["schedule.momentum=0.1"], "schedule: momentum needs optimizer='sgd', got 0.1 with optimizer='adamw'"),
        (["method.name=oca", "method.embedding_dim=0"], "method: embedding_dim must be at least 1, got 0"),
        (["method.mu=-1.0"], r"method: mu must be positive and finite, got -1\.0"),
        (["method.lambda_=1.5"], r"method: lambda_ must lie in \[0, 1\], got 1\.5"),
        (["method.negatives=infonse"], "method: negatives must be one of .*'infonce', got 'infonse'"),
        (["method.anchor=mine"], "method: anchor must be one of .*got 'mine'"),
        (["method.scale=-1.0"], r"method: scale must be positive and finite, got -1\.0"),
        (["method.extra=8"], "method: extra needs name='oca', got 8 with name='hoc'"),
        (["method.name=oca", "method.scale=8"], "method: scale needs name='bct' or .*, got 8.0 with name='oca'"),
        (
            ["method.name=oca", "tasks.memory_per_class=0"],
            'method.name="oca" needs items of every class in every task, .* tasks.memory_per_class is 0; set it to 1',
        ),
        (["protocols=[]"], "protocols must name at least one"),
        (["tasks.replacement_frozen=1.0"], r"replacement_frozen is a fraction of steps, in \[0, 1\), got 1.0"),
        (["tasks.align=newer"], "tasks: align must be one of 'none', 'older', got 'newer'"),
        (["method.name=oca", "tasks.align=older"], 'method.name="oca" needs tasks.align="none"'),
        (["tasks.denoise=2"], r"tasks: denoise must lie in \[0, 1\], got 2.0"),
        (["method.name=er", "tasks.denoise=0.5"], 'tasks.denoise needs method.name="hoc", .* got method.name="er"$'),
        (["tasks.replacement_junction=new"], "replacement_junction must be one of 'aligned', 'kept', got 'new'"),
        (
            ["tasks.replacement_junction=aligned", "method.classification=nnp"],
            'needs method.name="hoc" or "simplex", and method.classification="cross_entropy"; got "hoc" and "nnp"; set',
        ),
        (
            ["tasks.hoc_reference=all", "tasks.memory_per_class=0"],
            'tasks.hoc_reference="all" needs remembered items, but tasks.memory_per_class is 0; set it to 1 or more',
        ),
        (
            ["method.name=fd", "method.distance=l2", "tasks.hoc_reference=all"],
            'tasks.hoc_reference="all" needs method.name="hoc", or .*, got method.name="fd" with method.distance="l2"',
        ),
        (
            ["method.name=er", "tasks.hoc_reference=self"],
            "tasks: hoc_reference must be one of 'all', 'deployed', 'deployed_or_replacement', 'replacement'",
        ),
    ],
)
def test_options_that_the_chosen_kind_does_not_use_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(RunConfig, overridden(FEATURES, changes))


@pytest.mark.parametrize(
    "changes",
    [
        ["method.name=fd", "method.weight=3", "method.distance=l2", "method.scale=8"],
        ["method.name=bct", "method.weight=3"],
        ["method.name=oca", "method.weights=[1, 2, 3]", "method.rotation=none", "method.embedding_dim=64"],
        ["method.name=oca", "tasks.memory_per_class=0", "tasks.counts=[8]"],
        ["method.name=simplex", "method.slots=8", "method.normalize=true"],
        ["method.mu=3.0", "method.negatives=infonce", "method.gather=false"],
        ["method.name=er", "method.slots=1024"],  # the default is accepted for every method
        ["method.name=nnp", "method.alpha=2", "method.neighbours=5", "method.queue=0"],
        ["method.name=fd", "method.classification=nnp", "method.alpha=2"],
        ["method.classification=asnn", "method.queue=100", "method.mu=3.0"],
        ["schedule.optimizer=sgd", "schedule.momentum=0.1"],
        ["tasks.kind=instance_incremental", "tasks.counts=[]", "tasks.parts=5"],
    ],
)
def test_options_of_the_chosen_kind_are_accepted(changes: list[str]) -> None:
    read_config(RunConfig, overridden(FEATURES, changes))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["er", "fd", "bct", "oca", "simplex", "hoc", "asnn", "nnp"])
def test_every_preset_accepts_every_method(name: str, method: str) -> None:
    """The override replaces the whole `method` section, which may have options of the preset's method."""
    content = json.loads(json.dumps(asdict(PRESETS[name])))
    config = read_config(RunConfig, overridden(content, [f'method={{"name": "{method}"}}']))
    assert config.method == MethodConfig(name=method)


def test_pre_training_gets_the_options_that_it_uses() -> None:
    hoc = MethodConfig(slots=8, normalize=True, scale=4.0, mu=3.0)
    assert hoc.pretraining() == MethodConfig("simplex", slots=8, normalize=True, scale=4.0)
    assert MethodConfig("fd", weight=3.0, distance="l2", scale=4.0).pretraining() == MethodConfig("er", scale=4.0)
    assert MethodConfig("asnn", neighbours=3).pretraining() == MethodConfig("er")
    assert MethodConfig(slots=8, classification="nnp", alpha=2.0).pretraining() == MethodConfig("simplex", slots=8)


@pytest.mark.parametrize("name", ["asnn", "nnp", "fd", "bct", "hoc"])
def test_classification_by_neighbours_has_its_options(name: str) -> None:
    given = {} if name in ("asnn", "nnp") else {"classification": "nnp", "normalize": name == "hoc"}
    config = MethodConfig(name, neighbours=3, queue=7, **given)
    method = config.method(SlotRegistry(8), "default")
    term = method if isinstance(method, ASNN) else method.classification
    assert (term.kind, term.neighbours, term.queue) == ("asnn" if name == "asnn" else "nnp", 3, 7)
    assert method.head(5).embedding_dim == (7 if name == "hoc" else 5)


@pytest.mark.parametrize("place", ["model", "tasks.replacements.0.model"])
def test_a_pretrained_network_has_its_own_mean_and_std(place: str) -> None:
    changes = [
        'data={"kind": "images", "path": "photographs"}',
        'model={"kind": "resnet18"}',
        'tasks.replacements={"0": {"model": {"kind": "resnet18"}}}',
        f'{place}={{"kind": "timm:resnet50", "pretrained": true}}',
    ]
    with pytest.raises(ConfigError, match=r"set data\.mean and data\.std to those with which timm:resnet50 .*0\.485"):
        read_config(RunConfig, overridden(FEATURES, changes))
    own = ["data.mean=[0.485, 0.456, 0.406]", "data.std=[0.229, 0.224, 0.225]"]
    read_config(RunConfig, overridden(FEATURES, [*changes, *own]))


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("hoc", "all", "all"),
        ("hoc", "replacement", "replacement"),
        ("fd", "all", "all"),
        ("fd", "replacement", None),
        ("bct", "all", None),
    ],
)
def test_the_reference_of_each_method(method: str, given: str, expected: str | None) -> None:
    changes = [f"method.name={method}", f"tasks.hoc_reference={given}"]
    assert read_config(RunConfig, overridden(FEATURES, changes)).hoc_reference == expected
