"""The verdict on the last upgrade of a report, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .evaluation import EvaluationReport

__all__ = ["Verdict", "verdict"]


class Verdict(NamedTuple):
    """The verdict on the last upgrade.

    Attributes:
        tone: "good", "unsure" or "bad".
        words: the verdict in one sentence.
        then: its consequence for the service.
    """

    tone: str
    words: str
    then: str


def verdict(report: EvaluationReport) -> Verdict:
    """Returns the verdict: good or bad if interval and test agree at the report's confidence level, else unsure."""
    upgrade = report.last_upgrade
    if upgrade is None:
        score = f"{100 * report.matrix[0, 0]:.1f} %"
        verb = f"scores {score} by {report.protocol}" if report.has_scores else f"finds {score} of its queries"
        words = f"{report.names[0]} {verb}."
        return Verdict("unsure", words, "With one version there is no upgrade to judge.")
    old, new = report.names[upgrade.old], report.names[upgrade.new]
    sure = f"at {100 * report.confidence:g} % confidence"
    if upgrade.low > 0 and upgrade.p_value <= 1 - report.confidence:
        return Verdict(
            "good",
            f"{new} may search the gallery of {old} as it is.",
            f"It finds more there than {old} itself, {sure}: the upgrade needs no re-extraction.",
        )
    if upgrade.high < 0 and upgrade.p_value <= 1 - report.confidence:
        return Verdict(
            "bad",
            f"{new} is not compatible with {old}.",
            f"It finds less in the gallery of {old} than {old} itself, {sure}: extract the gallery again before "
            "switching, or train with compatibility.",
        )
    if not upgrade.gains and not upgrade.losses:
        return Verdict(
            "unsure",
            f"{new} answers every query as {old} does.",
            f"On the gallery of {old} none of {report.counts.queries} queries is mended and none breaks.",
        )
    how = "more" if upgrade.gain > 0 else "less" if upgrade.gain < 0 else "as much"
    than = "than" if upgrade.gain else "as"
    return Verdict(
        "unsure",
        f"Whether {new} is compatible with {old} is not sure.",
        f"It finds {how} in the gallery of {old} {than} {old} itself, but {report.counts.queries} queries do not tell "
        f"that from chance {sure}.",
    )
