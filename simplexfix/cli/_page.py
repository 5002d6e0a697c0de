"""The evaluation report as one page of HTML: nothing is loaded from elsewhere, and no script runs.

Each number of report.json stands in a `<data>` element whose value is the number itself, every digit of it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..compatibility import EvaluationReport, Interval, Upgrade
from ._colours import DARK, LIGHT, Theme, readable, shade
from ._figures import ORDER_WORDS, Drawn, Shown

__all__ = ["Verdict", "render", "verdict"]

NUMBERED = 12  # versions whose cells have room for a decimal and a mark
REGRESSION_HEAD = ("query", "class", "found class", "score", "own class’s", "margin", "found item", "own item")


class Verdict(NamedTuple):
    """Attributes: tone: "good", "unsure" or "bad"; words: one sentence; then: what that means for the service."""

    tone: str
    words: str
    then: str


def verdict(report: EvaluationReport) -> Verdict:
    """What the last upgrade does to the gallery that is in service."""
    upgrade = report.last_upgrade
    if upgrade is None:
        words = f"{report.names[0]} finds {100 * report.matrix[0, 0]:.1f} % of its queries."
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


def render(
    report: EvaluationReport, content: Mapping[str, Any], figures: Mapping[str, Drawn], sheet: Sequence[Shown]
) -> str:
    """The page.

    Args:
        content: what report.json holds.
        figures: by file name.
    """
    sections = [
        _head(report),
        _matrix(report),
        _upgrades(report, figures),
        _backfill(report, figures),
        _pairs(report, figures),
        _regressions(report, sheet),
        _criteria(report),
        _cells(report),
        _provenance(report, content),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(_title(report))}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _title(report: EvaluationReport) -> str:
    names = report.names
    return f"Compatibility report: {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")


def _head(report: EvaluationReport) -> str:
    tone, words, then = verdict(report)
    counts, upgrade = report.counts, report.last_upgrade
    ac, aa = report.criteria.ac, report.criteria.aa
    tiles = []
    if upgrade is not None:
        sure = f"{100 * report.confidence:g} %"
        tiles += [
            _tile(
                "Gain on the old gallery",
                f"{_data(upgrade.gain, _signed(upgrade.gain))}<small> points</small>",
                f"{sure} interval {_signed(upgrade.low)} to {_signed(upgrade.high)}",
                "good" if upgrade.low > 0 else "bad" if upgrade.high < 0 else "",
            ),
            _tile(
                "Queries that break",
                f"{_data(upgrade.negative_flip_rate, _percent(upgrade.negative_flip_rate))}<small> %</small>",
                f"{upgrade.losses:,} break, {upgrade.gains:,} mend",
                "",
            ),
            _tile(
                "AC, upgrades that are compatible",
                _data(ac, f"{ac:.2f}"),
                f"{sum(u.compatible for u in report.upgrades)} of {len(report.upgrades)} pairs of versions",
                "",
            ),
        ]
    tiles.append(
        _tile(
            "AA, average accuracy",
            f"{_data(aa, _percent(aa))}<small> %</small>",
            f"newest on its own gallery: {_percent(report.matrix[-1, -1])} %",
            "",
        )
    )
    notes = []
    if counts.queries_of_classes_not_in_gallery:
        notes.append(
            f"<strong>{counts.queries_of_classes_not_in_gallery:,} of {counts.queries:,} queries</strong> are of "
            f"{counts.classes_not_in_gallery:,} classes that the gallery lacks. No version can find them; they count "
            "as wrong for every version."
        )
    notes += [escape(remark) for remark in report.remarks]
    if counts.classes_without_queries:
        notes.append(f"{counts.classes_without_queries:,} classes of the gallery have no query: nothing tests them.")
    return (
        f'<header class="{tone}">\n<p class="eyebrow">Compatibility report</p>\n<h1>{escape(words)}</h1>\n'
        f'<p class="then">{escape(then)}</p>\n'
        f'<p class="facts">{len(report.names)} version{"s" * (len(report.names) > 1)} · {counts.queries:,} queries · '
        f"{counts.gallery:,} gallery items · {counts.classes:,} classes · {_protocol(report)}</p>\n</header>\n"
        f'<div class="tiles">{"".join(tiles)}</div>\n' + "".join(f'<p class="note">{note}</p>\n' for note in notes)
    )


def _matrix(report: EvaluationReport) -> str:
    size = len(report.matrix)
    low, high = float(np.nanmin(report.matrix)), float(np.nanmax(report.matrix))
    dense = size > NUMBERED
    head = "".join(f'<th scope="col" title="{escape(name)}">{escape(_short(name))}</th>' for name in report.names)
    rows = []
    for i, name in enumerate(report.names):
        shares = (report.matrix[i] - low) / (high - low) if high > low else np.full(size, 0.5)
        cells = [_heat_cell(report, i, j, shares[j], dense) for j in range(i + 1)] + ["<td></td>"] * (size - i - 1)
        rows.append(f'<tr><th scope="row" title="{escape(name)}">{escape(_short(name))}</th>{"".join(cells)}</tr>')
    scales = "".join(
        f'<i class="{name}" style="background:linear-gradient(90deg,{",".join(theme.scale)})"></i>'
        for name, theme in (("light", LIGHT), ("dark", DARK))
    )
    marks = (
        "Outlined in red: an upgrade that finds less than the version that made the gallery, or as much."
        if dense
        else "✓ finds more there than the version that made the gallery; ✗ does not."
    )
    return _section(
        "Who can search whose gallery",
        "Score in percent: a row’s version sends the queries, a column’s version extracted the gallery, which was "
        "never processed again. On the diagonal each version searches its own.",
        f'<div class="scroll"><table class="heat{" dense" * dense}"><thead><tr>'
        f'<td class="corner">query ↓<br>gallery →</td>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
        f'<p class="legend">{_percent(low)} % <span class="scale">{scales}</span> {_percent(high)} %'
        f'<span class="marks">{marks if size > 1 else ""}</span></p>',
        f"C[i, j] = {_score(report)}, with queries by version i and the gallery by version j. "
        "✓ is the empirical compatibility criterion, C[i, j] > C[j, j].",
    )


def _heat_cell(report: EvaluationReport, i: int, j: int, share: float, dense: bool) -> str:
    value, (low, high), good = report.matrix[i, j], report.intervals[i, j], report.table.compatible[i, j]
    colours = [colour for theme in (LIGHT, DARK) for colour in (shade(theme, share), readable(shade(theme, share)))]
    style = ";".join(f"--{name}:{colour}" for name, colour in zip(("l", "li", "d", "di"), colours, strict=True))
    hint = f"{report.names[i]} searches the gallery of {report.names[j]}: {_percent(value)} %"
    hint += f" [{_percent(low)}, {_percent(high)}]"
    kind, mark = "own", ""
    if i != j:
        kind, words = ("yes", "compatible") if good else ("no", "not compatible")
        hint += f", {words}"
        if not dense:
            mark = f'<span class="mark" role="img" aria-label="{words}">{"✓" if good else "✗"}</span>'
    shown = _data(value, f"{100 * value:.0f}" if dense else _percent(value), f"C-{i}-{j}")
    return f'<td class="{kind}" style="{style}" title="{escape(hint)}">{shown}{mark}</td>'


def _upgrades(report: EvaluationReport, figures: Mapping[str, Drawn]) -> str:
    if not report.upgrades:
        return ""
    steps = report.successive_upgrades
    every = (
        f"<details><summary>All {len(report.upgrades)} pairs of versions</summary>"
        f"{_upgrade_table(report, report.upgrades)}</details>"
        if len(report.upgrades) > len(steps)
        else ""
    )
    return _section(
        "What each upgrade changes",
        "On the gallery of the version before, as it is in service. An upgrade that gains on average still breaks "
        "single queries, and users notice those.",
        _figure(figures["flips.svg"]) + _upgrade_table(report, steps) + every,
        "Gain = C[new, old] − C[old, old], its interval by a paired bootstrap over the queries. Broken: right before "
        "and wrong after (negative flips, as a share of all queries NFR); mended: the other way (PFR). p: McNemar’s "
        "exact test, the chance that a fair coin splits broken and mended so unevenly, two-sided, each upgrade by "
        "itself.",
    )


def _upgrade_table(report: EvaluationReport, upgrades: Iterable[Upgrade]) -> str:
    head = ("upgrade", "before", "after", "gain", f"{100 * report.confidence:g} % interval", "NFR", "PFR", "p", "")
    rows = []
    for u in upgrades:
        tone = "good" if u.low > 0 else "bad" if u.high < 0 else ""
        rows.append(
            f'<tr><th scope="row">{escape(_short(report.names[u.old]))} → {escape(_short(report.names[u.new]))}</th>'
            f"<td>{_data(u.before, _percent(u.before))}</td><td>{_data(u.after, _percent(u.after))}</td>"
            f'<td class="{tone}"><b>{_data(u.gain, _signed(u.gain))}</b></td>'
            f"<td>{_data(u.low, _signed(u.low))} to {_data(u.high, _signed(u.high))}</td>"
            f"<td>{_data(u.negative_flip_rate, _percent(u.negative_flip_rate))}</td>"
            f"<td>{_data(u.positive_flip_rate, _percent(u.positive_flip_rate))}</td>"
            f"<td>{_data(u.p_value, _p(u.p_value))}</td>"
            f"<td>{_badge('compatible', 'good') if u.compatible else _badge('not compatible', 'bad')}</td></tr>"
        )
    return _table(head, rows)


def _backfill(report: EvaluationReport, figures: Mapping[str, Drawn]) -> str:
    upgrade = report.last_upgrade
    if upgrade is None:
        return ""
    old, new = escape(report.names[upgrade.old]), escape(report.names[upgrade.new])
    if not report.backfill:
        return _section("If the gallery is extracted again", "Not computed: the two galleries exceed 4 GiB.", "", "")
    first = report.backfill[0]
    drawn = f", by {first.queries:,} queries drawn of {report.counts.queries:,}" * (
        first.queries < report.counts.queries
    )
    rows = [
        f'<tr><th scope="row">{ORDER_WORDS[curve.order_name]}</th>'
        f"<td>{_data(curve.scores[0], _percent(curve.scores[0]))}</td>"
        f"<td>{_data(curve.scores[-1], _percent(curve.scores[-1]))}</td>"
        f"<td><b>{_data(curve.area, _percent(curve.area))}</b></td>"
        f"<td>{_data(curve.above_line, _signed(curve.above_line))}</td></tr>"
        for curve in report.backfill
    ]
    steps = [
        f'<tr><th scope="row">{_data(share, _percent(share))}</th>'
        + "".join(f"<td>{_data(c.scores[at], _percent(c.scores[at]))}</td>" for c in report.backfill)
        + "</tr>"
        for at, share in enumerate(first.shares)
    ]
    heads = ("re-extracted, percent", *(ORDER_WORDS[curve.order_name] for curve in report.backfill))
    return _section(
        "If the gallery is extracted again",
        f"What {new} finds while its rows take the place of those of {old}, one after the other{drawn}.",
        _figure(figures["backfill.svg"])
        + _table(("rows are replaced", "before", "after", "mean over the way", "gain by the order"), rows)
        + f"<details><summary>All points</summary>{_table(heads, steps)}</details>",
        "Mean over the way: the area under the curve, the score that users see on average while the gallery is "
        "extracted at a constant speed. Gain by the order: that minus the mean of the two ends, in points. Orders are "
        "chosen by the old features and the labels alone.",
    )


def _pairs(report: EvaluationReport, figures: Mapping[str, Drawn]) -> str:
    title, pairs = "Match or no match", report.pairs
    if pairs is None:
        return _section(title, "Not computed: all pairs of a query and a gallery item are of one kind.", "", "")
    versions = [(report.names[-1], pairs.before)]
    if pairs.after is not None:
        versions = [(report.names[-2], pairs.before), (report.names[-1], pairs.after)]
    rows = [
        f'<tr><th scope="row">{escape(_short(name))}</th>'
        f"<td>{_data(found.equal_error_rate, f'{100 * found.equal_error_rate:.2f}')}</td>"
        f"<td>{_data(found.area, f'{found.area:.4f}')}</td>"
        + "".join(f"<td>{_data(point.tar, _percent(point.tar))}</td>" for point in found.points)
        + "</tr>"
        for name, found in versions
    ]
    heads = ("", "equal error, percent", "area", *(f"TAR at FAR {100 * far:g} %" for far in pairs.before.fars))
    counts = report.counts
    whole = (pairs.queries, pairs.gallery) == (counts.queries, counts.gallery)
    what = f"{pairs.queries:,} queries with {pairs.gallery:,} items" + ("" if whole else ", drawn at random,")
    return _section(
        title,
        f"For a service that accepts what scores above a threshold: {what} of the gallery of "
        f"{escape(report.names[max(0, len(report.names) - 2)])} make {pairs.before.results.num_genuine:,} pairs of one "
        f"class and {pairs.before.results.num_impostor:,} of two.",
        _threshold(report) + _figure(figures["scores.svg"]) + _figure(figures["roc.svg"]) + _table(heads, rows),
        "FAR, TAR: the shares of pairs of two classes, and of one, whose score reaches the threshold; TAR at FAR: at "
        "the lowest threshold that keeps the FAR. Equal error: where FAR is 1 − TAR. Area: under TAR over FAR.",
    )


def _threshold(report: EvaluationReport) -> str:
    """What the upgrade does to a service's threshold."""
    if report.pairs is None or report.pairs.threshold is None:
        return ""
    move, old, new = report.pairs.threshold, report.names[-2], report.names[-1]
    rows = [
        f'<tr><th scope="row">{escape(words)}</th><td>{_data(point.threshold, f"{point.threshold:.4f}")}</td>'
        f"<td>{_data(point.far, f'{100 * point.far:.3f}')}{far}</td>"
        f"<td>{_data(point.tar, _percent(point.tar))}</td></tr>"
        for words, point, far in (
            (f"{old}, in service", move.before, ""),
            (f"{new}, threshold left as it is", move.unmoved, _ends(move.far_interval, 100, 3)),
            (f"{new}, threshold that keeps the FAR", move.after, ""),
        )
    ]
    ratio = move.unmoved.far / move.before.far
    times = "about as many" if 0.95 < ratio < 1.05 else f"{ratio:.2g} times as many"
    return (
        f'<p class="lead">Left as it is, a threshold of {move.before.threshold:.4f} accepts {times} '
        f"wrong pairs with {escape(new)} as with {escape(old)}, and {_percent(move.unmoved.tar)} % of the right ones "
        f"instead of {_percent(move.before.tar)} %. {move.after.threshold:.4f}{_ends(move.interval, 1, 4)} keeps the "
        "false-accept rate.</p>" + _table(("", "threshold", "FAR, percent", "TAR, percent"), rows)
    )


def _ends(interval: Interval, times: float, digits: int) -> str:
    return f" [{times * interval.low:.{digits}f}, {times * interval.high:.{digits}f}]"


def _regressions(report: EvaluationReport, sheet: Sequence[Shown]) -> str:
    upgrade = report.last_upgrade
    if upgrade is None:
        return ""
    if not upgrade.losses:
        return _section("Worst regressions", "The last upgrade breaks no query.", "", "")
    instance = report.protocol == "instance"
    rows = [
        f'<tr><th scope="row">{r.query}</th><td>{r.label}</td><td>{r.found_label}</td>'
        f"<td>{_data(r.score, f'{r.score:.3f}')}</td><td>{_data(r.own_score, f'{r.own_score:.3f}')}</td>"
        f"<td><b>{_data(r.margin, f'{r.margin:.3f}')}</b></td><td>{r.found_item}</td><td>{r.own_item}</td></tr>"
        for r in report.regressions
    ]
    seen = 0 if sheet else 12  # images tell more
    table = _table(REGRESSION_HEAD, rows[:seen]) if seen else ""
    if len(rows) > seen:
        table += f"<details><summary>The worst {len(rows)}</summary>{_table(REGRESSION_HEAD, rows)}</details>"
    cards = "".join(_card(shown) for shown in sheet)
    what = "the nearest item" if instance else "a class’s template"
    return _section(
        "Worst regressions",
        f"{upgrade.losses:,} queries were right with {escape(report.names[upgrade.old])} and are wrong with "
        f"{escape(report.names[upgrade.new])} on the gallery of {escape(report.names[upgrade.old])}; the most "
        "confidently wrong come first.",
        (f'<div class="cards">{cards}</div>' if cards else "") + table,
        f"Margin = cosine of the query and what is found, {what}, minus that of the query and its own class’s. "
        "Queries and items are row numbers, from 0" + ("." if instance else "; items are the nearest of their class."),
    )


def _card(shown: Shown) -> str:
    r = shown.regression
    words = {
        "query": ("query", f"query {r.query} of class {r.label}"),
        "found": (f"found {r.found_label}", f"found: gallery item {r.found_item} of class {r.found_label}"),
        "own": (f"right {r.label}", f"right: gallery item {r.own_item} of class {r.label}"),
    }
    pictures = "".join(
        f'<span class="{kind}"><img src="{_image_uri(image)}" alt="{words[kind][1]}" width="{image.width}" '
        f'height="{image.height}"><em>{words[kind][0]}</em></span>'
        for kind, image in shown.images.items()
    )
    return f"<figure>{pictures}<figcaption>query {r.query}, margin {r.margin:.3f}</figcaption></figure>"


def _criteria(report: EvaluationReport) -> str:
    c = report.criteria
    meaning = (
        (
            "AC",
            c.ac,
            f"{c.ac:.4f}",
            "share of upgrades that are compatible",
            "2 / (T (T − 1)) · #{ i > j : C[i, j] > C[j, j] }",
        ),
        (
            "AA",
            c.aa,
            f"{_percent(c.aa)} %",
            "mean score, of all versions on all galleries so far",
            "2 / (T (T + 1)) · Σ C[i, j] for j ≤ i",
        ),
        (
            "BC",
            c.bc,
            f"{_signed(c.bc)} points",
            "what the newest gains on old galleries",
            "mean over j &lt; T − 1 of C[T − 1, j] − C[j, j]",
        ),
        (
            "FC",
            c.fc,
            f"{_signed(c.fc)} points",
            "what each gains on the gallery before its own",
            "mean over i ≥ 1 of C[i, i − 1] − C[i, i]",
        ),
    )
    rows = [
        f'<tr><th scope="row">{name}</th><td><b>{_data(value, "–" if math.isnan(value) else shown, name)}</b></td>'
        f'<td class="words">{words}</td><td class="words"><code>{formula}</code></td></tr>'
        for name, value, shown, words, formula in meaning
    ]
    course = [
        f'<tr><th scope="row">{escape(_short(name))}</th><td>{_data(value, _percent(value))}</td></tr>'
        for name, value in zip(report.names, c.aa_t, strict=True)
    ]
    more = (
        f"<details><summary>AA<sub>t</sub>: average accuracy after each version</summary>"
        f"{_table(('up to', 'AA, percent'), course)}</details>"
        if len(course) > 1
        else ""
    )
    return _section(
        "Criteria of the whole history",
        "One number each for all versions together; T versions, counted from 0.",
        _table(("", "value", "meaning", "formula"), rows, words=("meaning", "formula")) + more,
        "AC, AA: Biondi et al., arXiv 2405.02581. A tie counts as not compatible.",
    )


def _cells(report: EvaluationReport) -> str:
    rows = [
        f'<tr><th scope="row">{escape(_short(report.names[i]))}</th><td>{escape(_short(report.names[j]))}</td>'
        f"<td><b>{_data(report.matrix[i, j], _percent(report.matrix[i, j]))}</b></td>"
        f"<td>{_percent(report.intervals[i, j, 0])} to {_percent(report.intervals[i, j, 1])}</td></tr>"
        for i in range(len(report.matrix))
        for j in range(i + 1)
    ]
    table = _table(("query by", "gallery by", "score, percent", f"{100 * report.confidence:g} % interval"), rows)
    return _section(
        "How sure each cell is",
        "",
        f"<details><summary>{len(rows)} cell{'s' * (len(rows) > 1)} with intervals</summary>{table}</details>",
        "Percentile bootstrap over the queries, 10,000 resamples; the gallery is taken as it is.",
    )


def _provenance(report: EvaluationReport, content: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td class="words"><code>{escape(path)}</code></td>'
        f"<td>{dimensions}</td></tr>"
        for name, path, dimensions in zip(report.names, content["inputs"], report.dimensions, strict=True)
    ]
    return _section(
        "How this was made",
        f"{escape(str(content['made_by']))} {escape(str(content['simplexfix']))}, {_protocol(report)}, widths "
        f"{report.widths}, seed {content['seed']}. All numbers, every digit: report.json beside this page.",
        _table(("version", "features", "dimensions"), rows, words=("features",)),
        "",
    )


def _section(title: str, lead: str, body: str, formula: str) -> str:
    return (
        f"<section>\n<h2>{title}</h2>\n"
        + (f'<p class="lead">{lead}</p>\n' if lead else "")
        + body
        + (f'\n<p class="formula">{formula}</p>' if formula else "")
        + "\n</section>"
    )


def _tile(title: str, value: str, below: str, tone: str) -> str:
    return f'<div class="tile {tone}"><h3>{title}</h3><p class="value">{value}</p><p class="below">{below}</p></div>'


def _table(head: Sequence[str], rows: Sequence[str], *, words: Sequence[str] = ()) -> str:
    """`words`: the heads of columns that hold no numbers."""
    left = dict.fromkeys(words, ' class="words"')
    cells = "".join(f'<th scope="col"{left.get(name, "")}>{name}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _figure(drawn: Drawn) -> str:
    light, dark = (_uri(content, "svg+xml") for content in (drawn.light, drawn.dark))
    return (
        f'<picture class="chart"><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(drawn.words)}"></picture>'
    )


def _image_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(file, kind, quality=85)
    return _uri(file.getvalue(), kind)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _badge(words: str, tone: str) -> str:
    return f'<span class="badge {tone}">{words}</span>'


def _data(value: Any, shown: str, name: str = "") -> str:
    """A number for people, and itself: the value as JSON writes it."""
    number = float(value)
    called = f' id="{name}"' if name else ""
    return f'<data value="{"null" if math.isnan(number) else repr(number)}"{called}>{shown}</data>'


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"…{name[-17:]}"


def _protocol(report: EvaluationReport) -> str:
    return report.protocol.replace("_", " ")


def _score(report: EvaluationReport) -> str:
    if report.protocol == "instance":
        return "share of queries whose nearest gallery item, by cosine, is of their class"
    return "share of queries nearest, by cosine, to the template of their class, the mean of its gallery items"


def _variables(theme: Theme) -> str:
    names = ("ground", "ink", "muted", "grid", "old", "new", "good", "bad")
    return "".join(f"--{name}:{getattr(theme, name)};" for name in names)


def _style() -> str:
    return (
        f":root{{{_variables(LIGHT)}--page:#f4f6fa;--soft:#f6f8fb}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}--page:#0e131b;--soft:#1b2330}}}}\n"
        + Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    )
