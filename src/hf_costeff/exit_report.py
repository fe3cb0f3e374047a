"""Who pays for early exit: a page with tables and charts, as HTML or Markdown, for a local reader.

It may quote texts of the data, so the command refuses to write those into a model's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .calibration import curve_settings, describe_seen
from .calibration_goals import default_criterion
from .charts import MOST_PATHS, draw_curve_chart, draw_reliability_chart, draw_skip_chart
from .configuration_costeff import CostEffConfig
from .exit_criteria import MULTI_LABEL, REGRESSION, ExitConfig, answers
from .exit_quality import (
    ExitQuality,
    curve_with_bands,
    exit_qualities,
    expected_calibration_error,
    flipped_rows,
)
from .exit_replay import ExitLogits, ExitReplay, stored_settings
from .group_outcomes import GroupOutcome, class_outcomes, length_outcomes
from .guarantees import describe_promise
from .markdown import markdown_table, quoted
from .skip_diagnostics import SkipDiagnostics, diagnose_skipping

RARE_SHARE = 0.05
FEW_ROWS = 30
MOST_TEXTS = 100
STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;line-height:1.4}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Heading:
    """A line above a part."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain words."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of plain text under column names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A PNG beside the page, and what it shows in words."""

    file: str
    text: str


Block = Heading | Paragraph | Table | Chart


def write_exit_report(
    records: ExitLogits,
    config: CostEffConfig,
    metric: str,
    folder: str | Path,
    *,
    texts: Sequence[str] | None = None,
    markdown: bool = False,
) -> Path:
    """Write the report on labelled rows: `report.html` or `report.md`, with its charts beside it.

    Args:
        records: Logits of all exits, with labels.
        config: The model's, with the exit settings to report on.
        metric: See `hf_costeff.metrics.METRICS`.
        folder: Made if it is not there; not the model's.
        texts: The rows' texts; those that early exit answers otherwise than full depth are quoted. `None` quotes none.
        markdown: Markdown; otherwise HTML.

    Returns:
        The page.

    Raises:
        ValueError: No exit settings, or no labels.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = list(_blocks(ExitReplay(records, config), metric, folder, texts))
    page = folder / ("report.md" if markdown else "report.html")
    page.write_text(to_markdown(blocks) if markdown else to_html(blocks), encoding="utf-8")
    return page


def settings_to_report(config: CostEffConfig) -> ExitConfig:
    """The stored exit settings; full depth for a gated model without any: there is skipping to report on.

    Raises:
        ValueError: If there are neither.
    """
    if config.exit_config is not None or config.skip_gates is None:
        return stored_settings(config)
    if config.resolved_problem_type == REGRESSION:
        return ExitConfig("patience", patience=0, checked_exits=[])
    return ExitConfig(default_criterion(config.resolved_problem_type), threshold=0.0, checked_exits=[])


def _blocks(replay: ExitReplay, metric: str, folder: Path, texts: Sequence[str] | None) -> Iterator[Block]:
    config, records = replay.config, replay.records
    settings = settings_to_report(config)
    chosen, full = replay.outcome(settings, metric), replay.full_depth.metric(metric)
    qualities = exit_qualities(replay, settings, metric)
    yield Heading("Who pays for early exit")
    went = f"runs {replay.at(settings).mean_layers_run:.2f} of {config.num_hidden_layers} layers on average"
    if records.skipped is not None:
        went += f", leaves after layer {chosen.mean_exit_layer:.2f}"
    yield Paragraph(
        f"On {len(records.logits):,} rows {metric} is {full:.4f} at full depth and {chosen.metric:.4f} with early "
        f"exit. A row {went} and takes "
        f"{chosen.speedup:.2f} times fewer FLOPs than at full depth."
    )
    yield from _promised(settings)
    if skipping := diagnose_skipping(records, config):
        yield from _skipping(skipping, folder)
    yield Heading("Exit by exit")
    yield _exit_table(qualities, metric, skips=records.skipped is not None)
    yield Paragraph(
        f"{metric} if all rows left at the exit, and the share that does. The calibration error is the mean gap "
        "between confidence and the share that is right, before and after the temperatures. Discrimination is the "
        "chance that a right answer is more confident than a wrong one: 0.5 is no better than a coin."
    )
    if records.skipped is not None:
        yield Paragraph(
            "A row that skips a layer is not asked at the exit behind it. Each exit is judged on the rows asked, if "
            "none leave before; the last on all. The share that leaves is one of all rows."
        )
    if qualities[-1].before and draw_reliability_chart(folder / "reliability.png", qualities):
        yield Chart("reliability.png", "Confidence against the share that is right, exit by exit")
    yield Heading("Speed and accuracy")
    curve = curve_with_bands(replay, curve_settings(records, config), metric)
    if draw_curve_chart(folder / "curve.png", curve, chosen, metric):
        yield Chart("curve.png", f"{metric} against FLOPs, with 95% intervals point by point")
    yield Table(
        ("million FLOPs per text", "mean exit layer", metric, "95% interval"),
        [
            (
                *(f"{point.flops_per_row / 1e6:,.1f}", f"{point.mean_exit_layer:.2f}", f"{point.metric:.4f}"),
                f"{point.low:.4f} to {point.high:.4f}",
            )
            for point in curve
        ],
    )
    yield from _damage(replay, settings)
    if texts is not None and replay.problem_type != REGRESSION:
        yield from _flips(replay, settings, texts)


def _promised(settings: ExitConfig) -> Iterator[Block]:
    seen = settings.calibration or {}
    if "mean_exit_layer" in seen:
        yield Paragraph(f"The settings were chosen before: {describe_seen(seen)}")
    if "promise" in seen:
        yield Paragraph(describe_promise(seen["promise"]))


def _skipping(skipping: SkipDiagnostics, folder: Path) -> Iterator[Block]:
    yield Heading("Layers skipped")
    yield Paragraph(f"At full depth, before any row leaves: {skipping.describe()}")
    if draw_skip_chart(folder / "skipping.png", skipping):
        yield Chart("skipping.png", "Share of the rows that skip each layer, and the commonest paths")
    groups = {"all": skipping.shares, **skipping.class_shares}
    shares = [(name, *(f"{share:.0%}" for share in group)) for name, group in groups.items()]
    yield Table(("rows that skip layer", *(str(layer + 1) for layer in range(len(skipping.shares)))), shares)
    paths = [(path or "none", f"{share:.1%}") for path, share in list(skipping.paths.items())[:MOST_PATHS]]
    yield Table(("layers run", "share of rows"), paths)


def _exit_table(qualities: Sequence[ExitQuality], metric: str, skips: bool) -> Table:
    rows = []
    for quality in qualities:
        gaps = [f"{expected_calibration_error(bins):.3f}" if bins else "" for bins in (quality.before, quality.after)]
        area = "" if quality.discrimination is None else f"{quality.discrimination:.3f}"
        asked = [f"{quality.asked:.1%}"] if skips else []
        value = "" if quality.metric is None else f"{quality.metric:.4f}"
        rows.append((str(quality.layer), *asked, value, f"{quality.share:.1%}", *gaps, area))
    names = (metric, "share of rows", "calibration error", "after temperatures", "discrimination")
    return Table(("exit after layer", *(["rows asked"] if skips else []), *names), rows)


def _damage(replay: ExitReplay, settings: ExitConfig) -> Iterator[Block]:
    groups = {"class": class_outcomes(replay, settings), "length": length_outcomes(replay, settings)}
    for name, outcomes in groups.items():
        if outcomes:
            yield Heading(f"Damage by {name}")
            yield _outcome_table(name, outcomes)
    if groups["length"]:
        yield Paragraph(
            "The share of right answers at full depth and with early exit, and in points what early exit adds. A rare "
            "group tells little: with one row more or less wrong its share jumps."
        )


def _outcome_table(name: str, outcomes: Sequence[GroupOutcome]) -> Table:
    total = sum(outcome.rows for outcome in outcomes)
    rows = []
    for outcome in outcomes:
        rare = outcome.rows < max(FEW_ROWS, RARE_SHARE * total)
        change = 100 * (outcome.early_exit - outcome.full_depth)
        numbers = (f"{outcome.rows:,}", f"{outcome.full_depth:.1%}", f"{outcome.early_exit:.1%}", f"{change:+.1f}")
        rows.append((outcome.name, *numbers, f"{outcome.mean_exit_layer:.2f}", "rare" if rare else ""))
    return Table((name, "rows", "full depth", "early exit", "points", "mean exit layer", "note"), rows)


def _flips(replay: ExitReplay, settings: ExitConfig, texts: Sequence[str]) -> Iterator[Block]:
    rows, exits = flipped_rows(replay, settings), replay.at(settings)
    labels = replay.records.known_labels()
    full, early = (answers(found.logits, replay.problem_type) for found in (replay.full_depth, exits))
    yield Heading("Texts that flip")
    yield Paragraph(
        f"{len(rows):,} of {len(labels):,} rows are answered otherwise than at full depth"
        + (f"; the first {MOST_TEXTS} are shown." if len(rows) > MOST_TEXTS else ".")
    )
    yield Table(
        ("text", "label", "full depth", "early exit", "exit after layer"),
        [
            (
                texts[row],
                *(_name(answer[row].tolist(), replay.config) for answer in (labels, full, early)),
                str(exits.exit_layer[row].item()),
            )
            for row in rows[:MOST_TEXTS]
        ],
    )


def _name(answer: Any, config: CostEffConfig) -> str:
    """A class, or the labels that are on."""
    if config.resolved_problem_type != MULTI_LABEL:
        return str(config.id2label[int(answer)])
    return ", ".join(str(config.id2label[label]) for label, on in enumerate(answer) if on > 0.5) or "none"


def to_html(blocks: Sequence[Block]) -> str:
    """A page that quotes any text as text.

    Example:
        >>> "<p>a &lt;b&gt; c</p>" in to_html([Paragraph("a <b> c")])
        True
    """
    body = "\n".join(map(_html, blocks))
    head = f'<meta charset="utf-8"><title>Who pays for early exit</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def to_markdown(blocks: Sequence[Block]) -> str:
    r"""The same as Markdown, every text quoted.

    Example:
        >>> print(to_markdown([Table(["a"], [["x | <b> *y*"]])]))
        | a |
        | --- |
        | x \| &lt;b&gt; \*y\* |
    """
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Chart(file, text):
            return f'<p><img src="{escape(file)}" alt="{escape(text)}"></p>'
        case Table(columns, rows):
            head = "".join(f"<th>{escape(name)}</th>" for name in columns)
            lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
            return f"<table>\n<tr>{head}</tr>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {quoted(text)}"
        case Paragraph(text):
            return quoted(text)
        case Chart(file, text):
            return f"![{quoted(text)}]({file})"
        case Table(columns, rows):
            return markdown_table([*map(quoted, columns)], [[*map(quoted, row)] for row in rows])
