"""Figures where people would rather look than read; matplotlib is optional (`pip install hf_costeff[charts]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from .calibration import ExitOutcome
from .evaluation import ReportRow

logger = logging.get_logger(__name__)


def draw_pareto_chart(path: Path, rows: Sequence[ReportRow], curve: Sequence[ExitOutcome], metric: str) -> bool:
    """Metric against FLOPs: every contender as a point, and the slim model's early-exit curve.

    Args:
        path: PNG to write.
        rows: Contenders, the teacher first.
        curve: The slim model at every threshold.
        metric: Shown on the vertical axis.

    Returns:
        Whether the chart was drawn; without matplotlib it is left out with one message.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No chart: matplotlib is not installed. Run `pip install hf_costeff[charts]`.")
        return False
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    ordered = sorted(curve, key=lambda point: point.flops_per_row)
    axes.plot(
        [point.flops_per_row / 1e6 for point in ordered],
        [point.metric for point in ordered],
        color="tab:blue",
        label="slim, all thresholds",
    )
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
