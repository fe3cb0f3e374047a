"""Figures where people would rather look than read; matplotlib is optional (`pip install matplotlib`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .evaluation import ReportRow
from .exit_quality import CurvePoint, ExitQuality, ReliabilityBin
from .exit_replay import ExitOutcome
from .skip_diagnostics import SkipDiagnostics

logger = logging.get_logger(__name__)
COLUMNS = 3  # small charts side by side
MOST_CLASSES, MOST_PATHS = 6, 10


def draw_pareto_chart(path: Path, rows: Sequence[ReportRow], curve: Sequence[ExitOutcome], metric: str) -> bool:
    """Metric against FLOPs: every contender as a point, and the last one's early-exit curve.

    Args:
        path: PNG to write.
        rows: Contenders, the reference first.
        curve: The last one at every threshold; may be empty.
        metric: Shown on the vertical axis.

    Returns:
        Whether the chart was drawn; without matplotlib it is left out with one message.
    """
    figure = new_figure(7.5, 4.8)
    if figure is None:
        return False
    axes = figure.add_subplot()
    ordered = sorted(curve, key=lambda point: point.flops_per_row)
    flops = [point.flops_per_row / 1e6 for point in ordered]
    if curve:
        axes.plot(flops, [point.metric for point in ordered], color="tab:blue", label="all thresholds")
    for row, marker in zip(rows, "s^oD", strict=False):
        axes.scatter(row.flops_per_row / 1e6, row.metrics[metric], marker=marker, s=60, label=row.name, zorder=3)
    axes.set_xscale("log")
    axes.set_xlabel("million FLOPs per text (log scale)")
    axes.set_ylabel(metric)
    axes.set_title("What a text costs and what it gets")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    return True


def draw_curve_chart(path: Path, curve: Sequence[CurvePoint], chosen: ExitOutcome, metric: str) -> bool:
    """Metric against FLOPs with a 95% band, and the stored settings as a point.

    Args:
        path: PNG to write.
        curve: Settings from bold to careful or the other way round.
        chosen: The stored settings.
        metric: Shown on the vertical axis.

    Returns:
        As [`draw_pareto_chart`].
    """
    figure = new_figure(7.5, 4.8)
    if figure is None:
        return False
    axes = figure.add_subplot()
    points = sorted(curve, key=lambda point: point.flops_per_row)
    flops = [point.flops_per_row / 1e6 for point in points]
    axes.fill_between(flops, [point.low for point in points], [point.high for point in points], alpha=0.2, label="95%")
    axes.plot(flops, [point.metric for point in points], label="all limits")
    axes.scatter(chosen.flops_per_row / 1e6, chosen.metric, marker="D", s=60, label="stored settings", zorder=3)
    axes.set_xlabel("million FLOPs per text")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    return True


def draw_reliability_chart(path: Path, qualities: Sequence[ExitQuality]) -> bool:
    """Accuracy against confidence, one small chart per exit, before and after the temperatures.

    Args:
        path: PNG to write.
        qualities: The exits, shallow first.

    Returns:
        As [`draw_pareto_chart`].
    """
    lines = -(-len(qualities) // COLUMNS)
    figure = new_figure(3 * COLUMNS, 2.8 * lines)
    if figure is None:
        return False
    for number, quality in enumerate(qualities, start=1):
        axes = figure.add_subplot(lines, COLUMNS, number)
        axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=0.8)
        for name, bins, marker in (("before", quality.before, "o"), ("after", quality.after, "s")):
            axes.plot(*_corners(bins), marker=marker, markersize=3, label=name)
        axes.set_title(f"exit after layer {quality.layer}", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel("confidence")
    figure.supylabel("share that is right")
    figure.savefig(path, dpi=150)
    return True


def draw_skip_chart(path: Path, skipping: SkipDiagnostics) -> bool:
    """Share of the rows that skip each layer, over all and by class, and the commonest paths.

    Args:
        path: PNG to write.
        skipping: Of the model on some rows.

    Returns:
        As [`draw_pareto_chart`].
    """
    figure = new_figure(9, 4.2)
    if figure is None:
        return False
    by_layer, by_path = figure.subplots(1, 2)
    layers = range(1, len(skipping.shares) + 1)
    by_layer.bar(layers, skipping.shares, color="tab:gray", alpha=0.5, label="all rows")
    for name, shares in list(skipping.class_shares.items())[:MOST_CLASSES]:
        by_layer.plot(layers, shares, marker="o", markersize=4, label=name)
    by_layer.set_xticks(layers)
    by_layer.set_ylim(0, 1)
    by_layer.set_xlabel("layer")
    by_layer.set_ylabel("share of rows that skip it")
    by_layer.legend(fontsize=8)
    paths = list(skipping.paths.items())[:MOST_PATHS]
    by_path.barh([layers_run or "none" for layers_run, _ in paths], [share for _, share in paths])
    by_path.invert_yaxis()
    by_path.set_xlim(0, 1)
    by_path.set_xlabel("share of rows")
    by_path.set_title(f"layers run: {len(skipping.paths)} paths", fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def _corners(bins: Sequence[ReliabilityBin]) -> tuple[list[float], list[float]]:
    return [part.confidence for part in bins], [part.accuracy for part in bins]


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches; `None`, with a message, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No chart: matplotlib is not installed. Run `pip install matplotlib`.")
        return None
    return Figure(figsize=(width, height), layout="constrained")
