"""The card of a model on the Hugging Face hub: metadata, how to load it, and which galleries its queries may search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .._text import printable
from ..data.augment import Normalize
from ..data.inputs import Drawings, Photographs, Tokens
from .convnet import SmallConvNet
from .identity import ADAPTED, ModelIdentity
from .resnet import ResNet18
from .text import TextEncoder

__all__ = ["card", "pipeline_tag_of"]

_SHOWN = 12  # digits of a fingerprint in a table
_IMAGES = (Drawings, Normalize, Photographs, ResNet18, SmallConvNet)
_TEXTS = (Tokens, TextEncoder)


def pipeline_tag_of(backbone: nn.Module, preprocessing: object) -> str | None:
    """Returns the hub's task name for a model of images or of texts; None for other inputs."""
    if isinstance(preprocessing, _IMAGES) or isinstance(backbone, _IMAGES):
        return "image-feature-extraction"
    return "feature-extraction" if isinstance(preprocessing, _TEXTS) or isinstance(backbone, _TEXTS) else None


def card(
    identity: ModelIdentity,
    repo_id: str,
    *,
    load: str,
    pipeline_tag: str | None,
    license: str | None,
    earlier: Sequence[ModelIdentity],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """Returns the text of a repository's README.md.

    Args:
        identity: identity of the model.
        repo_id: "owner/name" of the repository.
        load: Python code that loads the model and uses it.
        pipeline_tag, license: names as on the hub; None to leave them out.
        earlier: identities of earlier versions, for the table of galleries.
        evaluation: `EvaluationReport.as_dict()` or `GateResult.as_dict()`; None for no scores.

    Raises:
        ValueError: `evaluation` is of neither form, or of another model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="simplexfix", pipeline_tag=pipeline_tag, license=license, tags=["embeddings"])
    facts = {
        "version": str(identity.version) + (f", {_cell(identity.name)}" if identity.name else ""),
        "fingerprint": f"`{identity.fingerprint}`",
        "head": identity.head + ("" if identity.num_slots is None else f" of {identity.num_slots} slots"),
        "dimensions": str(identity.embedding_dim),
        "files": "JSON and safetensors; loading unpickles nothing and executes no code of this repository",
    }
    parts = [
        f"# {repo_id.partition('/')[2]}",
        _table(["", ""], list(facts.items())),
        "With `pip install 'simplexfix[hub]'`:",
        f"```python\n{load}\n```",
        "## Galleries that its queries may search",
        _galleries(identity, earlier),
        *_scores(identity, evaluation),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(parts) + "\n"))


def _galleries(identity: ModelIdentity, earlier: Sequence[ModelIdentity]) -> str:
    """Returns a table with a row per gallery: of this model, of earlier versions, and of further ancestors."""
    rows = [("this model", identity.fingerprint, identity.embedding_dim, "yes")]
    for other in earlier:
        name = f"version {other.version}" + (f", {_cell(other.name)}" if other.name else "")
        reasons = identity.why_not_search(other)
        answer = f"no: {_cell('; '.join(reasons))}" if reasons else _width(identity, other.embedding_dim)
        rows.append((name, other.fingerprint, other.embedding_dim, answer))
    known = {fingerprint for _, fingerprint, _, _ in rows}
    rows += [("an ancestor", f, width, _width(identity, width)) for f, width in identity.ancestors if f not in known]
    text = "The vectors of these galleries stay as they are: nothing is embedded again."
    if identity.head == ADAPTED:
        space = "the same adapter has mapped (`adapter.gallery`)" if identity.space is None else "the old encoder made"
        text = f"Queries are features of the new encoder, mapped by the adapter. They search vectors that {space}."
        if identity.space is not None and identity.space not in known:
            rows.append(("the old encoder", identity.space, identity.embedding_dim, "yes"))
    cells = [(name, f"`{_cell(f)[:_SHOWN]}`", str(width), answer) for name, f, width, answer in rows]
    table = _table(["gallery of", "fingerprint", "dimensions", "may be searched"], cells)
    return f"{text}\n\n{table}\n\n`ModelIdentity.why_not_search` returns the reasons against any other gallery."


def _width(identity: ModelIdentity, width: int) -> str:
    return "yes" if width == identity.embedding_dim else f"yes, by the leading {width} dimensions"


def _scores(identity: ModelIdentity, evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return []
    if "criteria" in evaluation:
        return _report(evaluation)
    if "rules" not in evaluation:
        raise ValueError(
            "evaluation must be EvaluationReport.as_dict() or GateResult.as_dict(), got a mapping without criteria and "
            "rules"
        )
    judged = evaluation["fingerprints"][1]
    if judged not in (None, identity.fingerprint):
        raise ValueError(
            f"evaluation must be of this model, {identity.fingerprint[:_SHOWN]}, got a gate's result about "
            f"{judged[:_SHOWN]}; run the gate on features of this model"
        )
    scores = [(key.replace("_", " "), _percent(score)) for key, score in evaluation["scores"].items()]
    rules = [(_cell(rule["measured"]), rule["demand"], rule["verdict"]) for rule in evaluation["rules"]]
    return [
        "## Upgrade gate",
        f"{'Passed' if evaluation['passed'] else 'Failed'}: {evaluation['queries']} queries, "
        f"{evaluation['gallery']} gallery items, protocol {_cell(evaluation['protocol'])}.",
        _table(["queries on gallery", "score"], scores),
        _table(["measured", "demanded", "verdict"], rules),
    ]


def _report(evaluation: Mapping[str, Any]) -> list[str]:
    names = [_cell(version["name"]) for version in evaluation["versions"]]
    criteria, counts = evaluation["criteria"], evaluation["counts"]
    values = [(name, f"{criteria[name]:.3f}") for name in ("AC", "AA", "BC") if criteria[name] is not None]
    matrix = [
        (name, *("" if score is None else _percent(score) for score in row))
        for name, row in zip(names, evaluation["matrix"], strict=True)
    ]
    return [
        "## Evaluation",
        f"{counts['queries']} queries, {counts['gallery']} gallery items, protocol {_cell(evaluation['protocol'])}. "
        "AC is the fraction of upgrades after which new queries beat the old ones on the old gallery. AA is the mean "
        "of the matrix below, BC the mean gain on older galleries.",
        _table(["criterion", "value"], values),
        _table(["queries on gallery", *names], matrix),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Escapes a name for a cell of a Markdown table."""
    return printable(text).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _percent(score: float) -> str:
    return f"{100 * score:.1f} %"
