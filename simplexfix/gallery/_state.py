"""The state of a gallery: its models, which of them serves, and thresholds.  Functions return a changed copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from .._checks import check_number
from .._text import listed
from ..compatibility import GateResult, ThresholdMove
from ..models import ModelIdentity

__all__ = [
    "AdmissionError",
    "Change",
    "Member",
    "State",
    "StrangerError",
    "Thresholds",
    "admit",
    "check_member",
    "found",
    "retire",
    "roll_back",
    "set_thresholds",
]

ADMITTED, ROLLED_BACK, RETIRED = "admitted", "rolled back", "retired"
Thresholds: TypeAlias = "Mapping[tuple[int, int], float | ThresholdMove | None]"


class StrangerError(ValueError):
    """Raised if the gallery has not admitted a model, or rejects it for this call; the message holds the reasons."""


class AdmissionError(ValueError):
    """Raised if a compatible model is admitted already, or has neither a passed gate nor a reason (`force`).

    It is also raised, with or without a reason, if the gate judged other models.
    """


@dataclass(frozen=True)
class Member:
    """A model of a gallery, and its standing: "admitted", "rolled back" or "retired"."""

    identity: ModelIdentity
    standing: str = ADMITTED


@dataclass(frozen=True)
class State:
    """State of a gallery: everything that a store holds except rows, history, leases and counts.

    Attributes:
        models: by version, in the order of their first admission.
        serving: versions that served, oldest first; the last one serves, `roll_back` leads to the one before it.
        thresholds: (query version, vector version) -> least score of a match, for all pairs of models that are not
            retired; None: no such queries will be sent.  Empty for a gallery without thresholds.
        counts_traffic: whether searches are counted.
        paused: whether backfills stop.
    """

    models: Mapping[int, Member]
    serving: tuple[int, ...]
    thresholds: Mapping[tuple[int, int], float | None] = field(default_factory=dict)
    counts_traffic: bool = False
    paused: bool = False

    @property
    def served_by(self) -> Member:
        return self.models[self.serving[-1]]

    @property
    def live(self) -> dict[int, Member]:
        """The models that are not retired, by version."""
        return {version: member for version, member in self.models.items() if member.standing != RETIRED}

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON; `from_dict` is its inverse."""
        return {
            "models": [
                {"identity": member.identity.to_dict(), "standing": member.standing} for member in self.models.values()
            ],
            "serving": list(self.serving),
            "thresholds": [[*pair, threshold] for pair, threshold in self.thresholds.items()],
            "counts_traffic": self.counts_traffic,
            "paused": self.paused,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> State:
        members = [Member(ModelIdentity.from_dict(entry["identity"]), entry["standing"]) for entry in saved["models"]]
        return cls(
            models={member.identity.version: member for member in members},
            serving=tuple(saved["serving"]),
            thresholds={(query, vector): threshold for query, vector, threshold in saved["thresholds"]},
            counts_traffic=saved["counts_traffic"],
            paused=saved["paused"],
        )


@dataclass(frozen=True)
class Change:
    """The changes that a store makes in one transaction.

    Attributes:
        state: the new state.
        event: event that is added to the history.
        restore: version whose replacements are undone: the replaced rows are put back; None: nothing is restored.
        drop: version whose kept, replaced rows are deleted; None: nothing is deleted.
    """

    state: State
    event: dict[str, Any]
    restore: int | None = None
    drop: int | None = None


def found(model: ModelIdentity, threshold: float | None, *, counts_traffic: bool) -> State:
    """The state of a new gallery."""
    _check_identity(model)
    state = State({model.version: Member(model)}, (model.version,), counts_traffic=counts_traffic)
    pair = model.version, model.version
    return state if threshold is None else set_thresholds(state, {pair: threshold})


def check_member(state: State, model: ModelIdentity, call: str) -> None:
    """Raises StrangerError unless the model may make this call: "search", "add" or "replace"."""
    _check_identity(model)
    member = state.models.get(model.version)
    serves = state.served_by.identity
    if member is None or member.identity.fingerprint != model.fingerprint:
        reasons = _not_a_member(state, model)
        raise StrangerError(f"{_named(model)} cannot {call} in this gallery: {'; '.join(reasons)}")
    remedy = ""
    if member.standing == RETIRED:
        remedy = f"it was retired, and its vectors are gone; {call} with {_named(serves)}, which serves"
    elif call != "search" and member.standing == ROLLED_BACK:
        remedy = f"it was rolled back; {call} with {_named(serves)}, which serves, or admit the model again"
    elif call == "replace" and model.version != serves.version:
        remedy = f"vectors are replaced by those of the model that serves, {_named(serves)}"
    if remedy:
        raise StrangerError(f"{_named(model)} cannot {call} in this gallery: {remedy}")


def admit(
    state: State, model: ModelIdentity, gate: GateResult | None, force: str | None, thresholds: Thresholds
) -> State:
    """Returns the state in which the model serves.

    Raises:
        StrangerError: the model cannot search the vectors of a model of the gallery, has the version of another model,
            or is in the gallery under another version.
        AdmissionError: the model is admitted already; there is no gate result and no reason; the gate failed without a
            reason, or judged other models.
        TypeError, ValueError: thresholds for pairs of versions that do not exist, or missing thresholds.
    """
    _check_identity(model)
    serves = state.served_by.identity
    held = state.models.get(model.version)
    if held is not None and held.identity.fingerprint != model.fingerprint:
        raise StrangerError(
            f"{_named(held.identity)} of this gallery is another model: pass another number, such as "
            f"identity(version={max(state.models) + 1})"
        )
    for other in state.models.values():
        if other.identity.version != model.version and other.identity.fingerprint == model.fingerprint:
            raise StrangerError(f"this model is {_named(other.identity)} of this gallery already")
    if held is not None and held.standing == ADMITTED:
        raise AdmissionError(
            f"{_named(model)} is admitted already"
            + ("" if model.version == serves.version else "; rollback() leads back to it")
        )
    for version, member in state.live.items():
        reasons = model.why_not_search(member.identity) if version != model.version else []
        if reasons:
            raise StrangerError(
                f"{_named(model)} cannot search vectors of {_named(member.identity)}: {'; '.join(reasons)}; train it "
                "to be compatible, or put an adapter behind it"
            )
    if force is not None and (not isinstance(force, str) or not force.strip()):
        raise TypeError(f"force must be the reason, as text, that the history keeps; got {force!r}")
    _check_gate(gate, serves, model, force)
    new = replace(
        state,
        models={**state.models, model.version: Member(model)},
        serving=(*state.serving, model.version),
        paused=False,
    )
    return set_thresholds(new, thresholds) if thresholds or new.thresholds else new


def set_thresholds(state: State, given: Thresholds) -> State:
    """Returns the state with these thresholds added.  They replace stored thresholds of the same pairs."""
    live = state.live
    merged = {pair: value for pair, value in state.thresholds.items() if pair[0] in live and pair[1] in live}
    for pair, value in given.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or pair[0] not in live or pair[1] not in live:
            raise ValueError(
                f"thresholds must have pairs (query version, vector version) of {listed(sorted(live))} as keys, "
                f"got {pair!r}"
            )
        number = value.after.threshold if isinstance(value, ThresholdMove) else value
        if number is not None:
            check_number(f"the threshold of {pair}", number)
            if not -1 <= number <= 1:
                raise ValueError(f"the threshold of {pair} is a cosine and must lie in [-1, 1], got {number}")
        merged[pair] = None if number is None else float(number)
    missing = [(query, vector) for query in live for vector in live if (query, vector) not in merged]
    if missing:
        raise ValueError(
            f"thresholds are missing of (query version, vector version) {', '.join(map(str, missing))}: a gallery has "
            "one for every pair; `upgrade_threshold` finds them, and None stands for queries that never come"
        )
    return replace(state, thresholds=merged)


def roll_back(state: State) -> State:
    """Returns the state in which the previous model serves again.

    Raises:
        ValueError: there is no previous model.
    """
    if len(state.serving) < 2:
        raise ValueError(
            f"there is nothing to roll back to: {_named(state.served_by.identity)} is the only model that has served "
            "and is not retired"
        )
    version = state.serving[-1]
    models = {**state.models, version: replace(state.models[version], standing=ROLLED_BACK)}
    return replace(state, models=models, serving=state.serving[:-1], paused=False)


def retire(state: State, version: int, rows: Mapping[int, int]) -> State:
    """Returns the state in which a version is retired.

    Args:
        rows: version -> number of its rows in the gallery.

    Raises:
        ValueError: there is no such version, it serves, it is retired, or the gallery has rows of it.
    """
    if version not in state.models:
        raise ValueError(f"there is no version {version} in this gallery, which has {listed(sorted(state.models))}")
    member = state.models[version]
    if member.standing == RETIRED:
        raise ValueError(f"{_named(member.identity)} is retired already")
    if version == state.serving[-1]:
        raise ValueError(f"{_named(member.identity)} serves and cannot be retired; admit another model first")
    if rows.get(version, 0):
        raise ValueError(
            f"{rows[version]} rows are still of {_named(member.identity)} and would be lost: replace them first, "
            "as `stale()` gives them"
        )
    new = replace(
        state,
        models={**state.models, version: replace(member, standing=RETIRED)},
        serving=tuple(served for served in state.serving if served != version),
    )
    pairs = {pair: value for pair, value in state.thresholds.items() if version not in pair}
    return replace(new, thresholds=pairs)


def _check_identity(model: ModelIdentity) -> None:
    if not isinstance(model, ModelIdentity):
        raise TypeError(
            f"model must be a ModelIdentity, got {type(model).__name__}; EmbeddingModel.identity(version=...) and "
            "ModelIdentity.external(...) make one"
        )


def _check_gate(gate: GateResult | None, old: ModelIdentity, new: ModelIdentity, force: str | None) -> None:
    if gate is None:
        if force is None:
            raise AdmissionError(
                f"{_named(new)} needs the result of upgrade_gate(old, new), or force= with the reason to do without"
            )
        return
    if not isinstance(gate, GateResult):
        raise TypeError(f"gate must be a GateResult, got {type(gate).__name__}; upgrade_gate(old, new) makes one")
    if None in gate.fingerprints:
        raise AdmissionError(
            "the gate result does not say which models it judged: give their fingerprints to the features, "
            "items.version(query, gallery, fingerprint=model.fingerprint)"
        )
    for what, expected, got in zip(("old", "new"), (old, new), gate.fingerprints, strict=True):
        if got != expected.fingerprint:
            raise AdmissionError(
                f"the gate judged another {what} model, of fingerprint {str(got)[:12]}; expected {_named(expected)} of "
                f"fingerprint {expected.fingerprint[:12]}: run the gate on features of these two models"
            )
    if not gate.passed and force is None:
        failed = [f"{outcome.measured} {outcome.verdict}" for outcome in gate.outcomes if not outcome.passed]
        raise AdmissionError(f"{_named(new)} did not pass the gate: {'; '.join(failed)}")


def _not_a_member(state: State, model: ModelIdentity) -> list[str]:
    for version, member in state.models.items():
        if member.identity.fingerprint == model.fingerprint:
            return [f"it is version {version} here: pass its identity(version={version})"]
    reasons = []
    if model.version in state.models:
        held = state.models[model.version].identity
        reasons.append(
            f"version {model.version} here is another model, of fingerprint {held.fingerprint[:12]}, and this one's is "
            f"{model.fingerprint[:12]}"
        )
    else:
        reasons.append("it was not admitted")
    reasons += model.why_not_search(state.served_by.identity)
    if len(reasons) == 1:
        reasons.append("gallery.admit(model, upgrade_gate(old, new)) admits it")
    return reasons


def _named(model: ModelIdentity) -> str:
    return f"version {model.version}" + (f" ({model.name})" if model.name else "")
