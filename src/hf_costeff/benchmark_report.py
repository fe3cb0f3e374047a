"""What a benchmark tells: a table with a key to it, everything as JSON, and charts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .benchmarking import EARLY, TEACHER, Measurement
from .charts import new_figure
from .markdown import markdown_table
from .report import describe_device

COLUMNS = (
    *("device", "precision", "threads", "tokens", "batch", "model", "ms, median", "p95", "p99", "texts/s", "faster by"),
    *("quartiles", "fewer FLOPs", "of peak", "mean exit layer", "metric", "answers as in float32", ""),
)
KEY = """\
- ms, p95, p99: of one batch, over all batches of all rounds.
- texts/s: the timed rows over the time of the median round. A round has short and long batches, so this is not the
  batch size over the median batch.
- faster by, quartiles: the teacher's time over this one's, round by round; the median and the quartiles of the rounds.
- fewer FLOPs: the same ratio in arithmetic, padding counted; of peak: arithmetic per second over that of one large
  matrix product (for int8 that of float32).
- mean exit layer: of the timed rows.
- metric, answers as in float32: of all given rows at their own lengths, whatever the line's batch and tokens; in
  brackets what the precision changed, in points against float32 on the CPU. int8 is the ONNX export, for the teacher
  too."""


def write_benchmark(found: Sequence[Measurement], folder: str | Path) -> str:
    """Write `benchmark.json`, which has the hardware by device and the measurements, and, with matplotlib, charts.

    Args:
        found: From [`hf_costeff.benchmarking.benchmark`].
        folder: Made if it is not there.

    Returns:
        The table of [`format_benchmark`] and its key.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hardware = {device: describe_device(torch.device(device)) for device in dict.fromkeys(one.device for one in found)}
    measurements = [{**dataclasses.asdict(one), "mean_exit_layer": one.mean_exit_layer} for one in found]
    (folder / "benchmark.json").write_text(json.dumps({"hardware": hardware, "measurements": measurements}, indent=1))
    draw_speedup_chart(folder / "speedup_by_batch.png", found)
    draw_latency_chart(folder / "latency_by_batch.png", found)
    draw_metric_chart(folder / "metric_by_speed.png", found)
    draw_exit_histogram(folder / "exits.png", found)
    return f"{format_benchmark(found)}\n\n{KEY}"


def format_benchmark(found: Sequence[Measurement]) -> str:
    """A Markdown table, one line per contender and setting, which says where there is no gain.

    Args:
        found: From [`hf_costeff.benchmarking.benchmark`].
    """
    return markdown_table(COLUMNS, [_cells(one) for one in found])


def _cells(one: Measurement) -> list[str]:
    low, high = one.speedup_quartiles
    metric = "" if one.score is None else f"{one.score:.4f}"
    if one.score_change is not None:
        metric += f" ({100 * one.score_change:+.2f})"
    return [
        *(one.device, one.precision, str(one.threads), str(one.length or "own"), str(one.batch_size), one.name),
        *(f"{one.median_ms:.2f}", f"{one.p95_ms:.2f}", f"{one.p99_ms:.2f}", f"{one.texts_per_second:.0f}"),
        *(f"{one.speedup:.2f}x", f"{low:.2f}..{high:.2f}", f"{one.flops_ratio:.2f}x", f"{one.peak_share:.0%}"),
        *(f"{one.mean_exit_layer:.2f}", metric, "" if one.agreement is None else f"{one.agreement:.1%}"),
        "" if one.name == TEACHER or one.gains else "no gain here",
    ]


def draw_metric_chart(path: Path, found: Sequence[Measurement]) -> bool:
    """Metric against texts per second, a point per contender and precision, at the largest batch size.

    Args:
        path: PNG to write.
        found: From [`hf_costeff.benchmarking.benchmark`].

    Returns:
        Whether the chart was drawn: not without labels, nor without matplotlib.
    """
    first, size = found[0], max(one.batch_size for one in found)
    shown = [
        one
        for one in found
        if (one.device, one.threads, one.length, one.batch_size) == (first.device, first.threads, first.length, size)
        and one.score is not None
    ]
    figure = new_figure(7.5, 4.8) if shown else None
    if figure is None:
        return False
    axes = figure.add_subplot()
    names, precisions = (list(dict.fromkeys(getattr(one, field) for one in shown)) for field in ("name", "precision"))
    for one in shown:
        marker, color = "so^Dv"[precisions.index(one.precision)], f"C{names.index(one.name)}"
        axes.scatter(one.texts_per_second, one.score, marker=marker, color=color, label=f"{one.name}, {one.precision}")
    axes.set_xscale("log")
    axes.set_xlabel("texts per second")
    axes.set_ylabel("metric")
    axes.set_title(f"{first.device}; threads: {first.threads}; tokens: {first.length or 'own'}; batch: {size}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def draw_exit_histogram(path: Path, found: Sequence[Measurement]) -> bool:
    """Share of the rows that leave after each layer with early exit, in the first setting.

    Args:
        path: PNG to write.
        found: From [`hf_costeff.benchmarking.benchmark`].

    Returns:
        Whether the chart was drawn: not without early exit, nor without matplotlib.
    """
    early = next((one for one in found if one.name == EARLY), None)
    figure = None if early is None else new_figure(7.5, 4.8)
    if early is None or figure is None:
        return False
    axes = figure.add_subplot()
    axes.bar(range(1, len(early.exit_shares) + 1), early.exit_shares)
    axes.set_xlabel("layer that rows leave after")
    axes.set_ylabel("share of the rows")
    axes.set_title(f"{early.name}; mean exit layer {early.mean_exit_layer:.2f}")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)
    return True


def draw_latency_chart(path: Path, found: Sequence[Measurement]) -> bool:
    """Time of a text against batch size, in the first device, precision, thread count and length.

    Args:
        path: PNG to write.
        found: From [`hf_costeff.benchmarking.benchmark`].

    Returns:
        Whether the chart was drawn; without matplotlib it is left out with one message.
    """
    return _draw_by_batch(path, found, "ms per text", lambda one: 1e3 / one.texts_per_second)


def draw_speedup_chart(path: Path, found: Sequence[Measurement]) -> bool:
    """Speed-up against batch size in the same setting, with the FLOPs ratio dashed; otherwise as latency's."""
    return _draw_by_batch(
        path, found, "times as fast as the teacher (dashed: FLOPs)", lambda one: one.speedup, with_flops=True
    )


def _draw_by_batch(
    path: Path,
    found: Sequence[Measurement],
    label: str,
    value: Callable[[Measurement], float],
    with_flops: bool = False,
) -> bool:
    figure = new_figure(7.5, 4.8)
    if figure is None:
        return False
    axes = figure.add_subplot()
    first = found[0]
    shown = [one for one in found if _place(one) == _place(first)]
    for number, name in enumerate(dict.fromkeys(one.name for one in shown)):
        own = sorted((one for one in shown if one.name == name), key=lambda one: one.batch_size)
        places = [one.batch_size for one in own]
        axes.plot(places, [value(one) for one in own], marker="o", color=f"C{number}", label=name)
        if with_flops:
            axes.plot(places, [one.flops_ratio for one in own], linestyle="--", color=f"C{number}")
    sizes = sorted({one.batch_size for one in shown})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_xlabel("batch size")
    axes.set_ylabel(label)
    device, precision, threads, length = _place(first)
    axes.set_title(f"{device}, {precision}; threads: {threads}; tokens: {length or 'own'}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def _place(one: Measurement) -> tuple[str, str, int, int]:
    return one.device, one.precision, one.threads, one.length
