"""What a compression run tells at its end: a table, a chart, plain words, and everything as JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .charts import draw_pareto_chart
from .compression_args import CompressionPlan
from .evaluation import ReportRow, format_table
from .exit_replay import ExitOutcome
from .hub import read_json

COMPRESSION, SKIPPING, PRUNING = "efficiency.json", "layer_skipping.json", "block_pruning.json"
"""What the recipes call their reports."""
REPORTS = (COMPRESSION, SKIPPING, PRUNING)


@dataclass(frozen=True)
class CompressionResult:
    """Where the slim model is and how it did.

    Args:
        model_path: Folder of the model, loadable with `from_pretrained`.
        plan: What was aimed at.
        rows: Report lines: teacher, assistant, full depth, early exit, on validation.
        metric: The metric that choices were made by.
    """

    model_path: Path
    plan: CompressionPlan
    rows: list[ReportRow]
    metric: str

    def table(self) -> str:
        """The report as a Markdown table."""
        return format_table(self.rows, self.metric)


def write_report(result: CompressionResult, curve: Sequence[ExitOutcome], facts: Mapping[str, Any]) -> None:
    """Write `efficiency.json`, `SUMMARY.md` and `pareto.png` into the model's folder.

    Args:
        result: Rows and plan.
        curve: The slim model at every threshold.
        facts: JSON-ready: `exit_config`, `data`, `settings`, `stages`, `hardware`, `widths`.
    """
    report = {
        "metric": result.metric,
        "rows": [dataclasses.asdict(row) for row in result.rows],
        "curve": [dataclasses.asdict(point) for point in curve],
        "plan": {**dataclasses.asdict(result.plan), "widths": facts["widths"]},
        **{name: fact for name, fact in facts.items() if name != "widths"},
    }
    (result.model_path / COMPRESSION).write_text(json.dumps(report, indent=1))
    (result.model_path / "SUMMARY.md").write_text(summarize(result, report))
    draw_pareto_chart(result.model_path / "pareto.png", result.rows, curve, result.metric)


def drop_exit_figures(folder: str | Path) -> bool:
    """Take out of a model's folder what was measured with exit settings that it no longer has.

    The report of a recipe keeps everything else: teacher, assistant, full depth, plan, stages. `SUMMARY.md` and
    `pareto.png` speak of early exit throughout, where any was measured, and are then removed.

    Args:
        folder: A saved model, with the report of its run or without.

    Returns:
        Whether there was a report, of which a card can be made.

    Raises:
        ValueError: If a report is damaged.
    """
    folder = Path(folder)
    reports = {file: read_json(file) for name in REPORTS if (file := folder / name).exists()}
    with_exits = {file: report for file, report in reports.items() if report["exit_config"] is not None}
    for file, report in with_exits.items():
        report |= {"rows": report["rows"][:-1], "exit_config": None, "classes": [], "curve": []}
        file.write_text(json.dumps(report, indent=1))
    for name in ("SUMMARY.md", "pareto.png") if with_exits else ():
        (folder / name).unlink(missing_ok=True)
    return bool(reports)


def without_folders(value: Any) -> Any:
    """A path, absolute or there, as `./name`; anything else as it is.

    >>> without_folders("/teacher"), without_folders("org/teacher"), without_folders(3)
    ('./teacher', 'org/teacher', 3)
    """
    if not isinstance(value, str):
        return value
    path = Path(value)
    is_path = path.is_absolute() or (len(path.parts) > 1 and path.exists())  # a bare name tells nothing of folders
    return f"./{path.name}" if is_path else value


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """As [`describe_device`], and how many CPU threads torch uses now."""
    return {**describe_device(device), "threads": torch.get_num_threads()}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Processor, accelerator and version of torch, for a report; no host names or paths."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else platform.machine()
    return {"cpu": cpu, "accelerator": accelerator, "torch": torch.__version__}


def summarize(result: CompressionResult, report: dict[str, Any]) -> str:
    """What was kept and what was saved, in plain words and one table."""
    teacher, _, full, early = result.rows
    metric, hardware = result.metric, report["hardware"]
    depth = len(full.exit_shares)
    shares = ", ".join(f"{share:.0%}" for share in early.exit_shares)
    return f"""# What came out

The slim model has {full.parameters:,} parameters, {teacher.parameters / full.parameters:.1f} times fewer than the
teacher's {teacher.parameters:,}. On {report["data"]["rows"]["validation"]:,} validation rows its {metric} is
{full.metrics[metric]:.4f} at full depth and {early.metrics[metric]:.4f} with early exit; the teacher's is
{teacher.metrics[metric]:.4f}.

With early exit a text runs {early.mean_exit_layer:.2f} layers on average and takes
{teacher.flops_per_row / early.flops_per_row:.1f} times fewer FLOPs than the teacher at the texts' real lengths (the
table counts every text at 128 tokens, as the paper does). On this machine
({hardware["accelerator"] or hardware["cpu"]}, {hardware["threads"]} threads, float32, real text lengths) that was
{teacher.ms_per_text["32"] / early.ms_per_text["32"]:.1f} times faster at batch 32 and
{teacher.ms_per_text["1"] / early.ms_per_text["1"]:.1f} times faster one text at a time.

Share of rows per exit, shallow to deep ({depth} exits): {shares}.{_hint(early.exit_shares)}

{result.table()}

The exit threshold was chosen on {report["exit_config"]["calibration"]["rows"]:,} rows that no stage trained on; the
validation rows were used for this report alone. Full settings, every stage and the whole speed-accuracy curve are in
`efficiency.json`.
"""


def _hint(exit_shares: Sequence[float]) -> str:
    """What to make of it if all rows do the same."""
    if len(exit_shares) > 1 and exit_shares[0] == 1:
        return (
            "\nEvery row left at the first exit, so no deeper layer answered. Calibrate for a smaller loss to use them."
        )
    if len(exit_shares) > 1 and exit_shares[-1] == 1:
        return "\nNo row left early. Calibrate for a larger loss, or use the model at full depth."
    return ""
