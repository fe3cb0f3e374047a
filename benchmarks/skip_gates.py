"""Layer skipping on real tasks: curves against early exit, ablations, soft and hard weights, FLOPs and time.

    python benchmarks/skip_gates.py train --task rte --data DIR --model DIR [--seeds 42 43 44] [--variants full skips]
    python benchmarks/skip_gates.py train --task rte --data DIR --model DIR --variants full skips --targets 1.8 2.8
    python benchmarks/skip_gates.py chart --tasks rte wnli

`train` runs the recipe per seed, variant and target (`free` is without a target). `exits` has no gates: its full depth
is the ungated model that everything is held against, so it goes first. All other variants start from the ungated model
of the same seed, exits included, and learn from its answers: fresh gates mix every layer half and half, which harms an
encoder that is still learning the task. They thus see `--epochs` more than the ungated model does. Variants that differ
in the settings of exits alone share one backbone. `--ungated` starts from ungated models of other runs.

Of each run a row is kept: metric, layers run and FLOPs on validation by skipping alone, by both, and with settings
chosen on calibration rows for 2 and 3 times fewer FLOPs than the ungated model, with paired bootstrap intervals; the
metric with soft weights; how many paths rows take; milliseconds per text at batch 32. What is seen on the calibration
rows, to choose settings of the training by, has names of its own. Rows go to benchmarks/results/skip-<task>.json one by
one, so an interrupted run goes on. Other settings are refused there: name another --suffix. `chart` draws exits alone,
skipping alone and both; exits come from the file without suffix where that with one has none.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from hf_costeff import CostEffForSequenceClassification
from hf_costeff.calibration import ExitSearch, choose_exit_config
from hf_costeff.calibration_goals import UnreachableGoalError
from hf_costeff.charts import new_figure
from hf_costeff.configuration_costeff import SKIP_GATES
from hf_costeff.data import DataArguments
from hf_costeff.evaluation import collect_exit_logits, model_inputs
from hf_costeff.exit_replay import ExitReplay, ReplayedExits
from hf_costeff.layer_skipping import OF_EXITS, LayerSkipping, LayerSkippingArguments
from hf_costeff.metrics import METRICS, paired_bootstrap
from hf_costeff.report import SKIPPING
from real_run import METRIC, SPLITS
from results_file import RESULTS, ResultsFile, rows_of

TASKS = ("rte", "wnli", "mrpc", "cola", "sst2")
UNGATED = "exits"
VARIANTS: dict[str, dict[str, Any]] = {
    UNGATED: {"gates": "none", "contrastive_weight": 0.0, "exit_contrastive_weight": 0.0},
    "full": {},
    "skips": {"exit_epochs": 0.0},
    "soft weights only": {"hard_gate_ratio": 0.0},
    "hard weights only": {"hard_gate_ratio": 1.0},
    "no incentive": {"skip_weight": 0.0},
    "no contrast": {"contrastive_weight": 0.0, "exit_contrastive_weight": 0.0},
    "no contrast of layers": {"contrastive_weight": 0.0},
    "no contrast of exits": {"exit_contrastive_weight": 0.0},
}
LINES = {UNGATED: "tab:blue", "full": "tab:red"}
POINTS = {"full": "tab:green", "skips": "tab:green"}
GOALS = (2.0, 3.0)


SETTINGS = ("gates", "exit_head", "epochs", "exit_epochs", "learning_rate", "rows")
"""Flags that decide what the rows of a file say."""


def train(given: argparse.Namespace) -> None:
    settings = {name: getattr(given, name) for name in SETTINGS}
    results = ResultsFile(RESULTS / f"skip-{given.task}{given.suffix}.json", settings)
    variants = [name for name in given.variants if name != UNGATED]
    if given.ungated is None:
        variants = [UNGATED, *variants]
    for seed in given.seeds:
        for variant in variants:
            for target in [None] if variant in (UNGATED, "no incentive") else given.targets or [None]:
                name = f"{variant}/{'free' if target is None else f'{target:g}'}/{seed}"
                if name in results.rows:
                    continue
                job = LayerSkipping(arguments(given, variant, target, seed), data(given))
                result = job.run()
                facts = json.loads((result.model_path / SKIPPING).read_text())
                row = {"metric": job.metric, **measured(job, facts)}
                results.add(name, row, shown={key: value for key, value in row.items() if key != "curve"})


def folder(given: argparse.Namespace, variant: str, target: float | None, seed: int) -> str:
    """Of a run, one for all variants with the same backbone: its name is that of the first of them."""
    first = next(name for name in VARIANTS if of_backbone(name) == of_backbone(variant))
    budget = "free" if target is None else f"{target:g}"
    return str(Path(given.runs) / f"skip-{given.task}{given.suffix}-{first.replace(' ', '-')}-{budget}-{seed}")


def of_backbone(variant: str) -> dict[str, Any]:
    return {name: value for name, value in VARIANTS[variant].items() if name not in OF_EXITS}


def arguments(given: argparse.Namespace, variant: str, target: float | None, seed: int) -> LayerSkippingArguments:
    made = given.ungated is not None
    ungated = given.ungated.format(seed=seed) if made else folder(given, UNGATED, None, seed)
    start = {"model": ungated, "teacher": ungated, "gates": given.gates}
    if variant == UNGATED:
        start = {"model": given.model, "exit_head": given.exit_head}
    lengths = {name: getattr(given, name) for name in ("epochs", "exit_epochs", "learning_rate")}
    return LayerSkippingArguments(
        output_dir=folder(given, variant, target, seed),
        metric=METRIC.get(given.task, "accuracy"),
        target_layers=target,
        seed=seed,
        **{**start, **lengths, **VARIANTS[variant]},
    )


def data(given: argparse.Namespace) -> DataArguments:
    return DataArguments(
        dataset=given.data,
        dataset_config=given.task,
        max_train_rows=given.rows,
        max_validation_rows=given.rows,
        **SPLITS.get(given.task, {}),
    )


def measured(job: LayerSkipping, facts: dict[str, Any]) -> dict[str, Any]:
    """One run's row."""
    model = AutoModelForSequenceClassification.from_pretrained(job.arguments.output_dir).to(job.device)
    replays = replayed(model, job)
    references = replays if facts["skipping"] is None else replayed(job.given, job)  # what gated models start from
    ungated = {name: replay.full_depth for name, replay in references.items()}
    by_name = {row["name"]: row for row in facts["rows"]}
    last = facts["rows"][-1]
    found: dict[str, Any] = {
        "last": {key: last[key] for key in ("name", "flops_per_row", "mean_exit_layer")},
        "last_metric": last["metrics"][job.metric],
        "ungated_metric": ungated["validation"].metric(job.metric),
        "curve": [[point["flops_per_row"], point["metric"]] for point in facts["curve"]],
        "ms_per_text_32": {name: row["ms_per_text"]["32"] for name, row in by_name.items()},
        "flops_per_row": {name: row["flops_per_row"] for name, row in by_name.items()},
    }
    if facts["skipping"] is not None:
        found |= {
            "skips_metric": by_name["skipping"]["metrics"][job.metric],
            "skips_difference_95": difference(replays["validation"].full_depth, ungated["validation"], job),
            "skips_speedup": ungated["validation"].mean_flops / by_name["skipping"]["flops_per_row"],
            "soft_metric": soft_metric(model, job),
            "calibration_metric": replays["calibration"].full_depth.metric(job.metric),
            "calibration_ungated": ungated["calibration"].metric(job.metric),
            "calibration_speedup": ungated["calibration"].mean_flops / replays["calibration"].full_depth.mean_flops,
            "layers_run": facts["skipping"]["layers_run"],
            "paths": len(facts["skipping"]["paths"]),
            "commonest_path": next(iter(facts["skipping"]["paths"].values())),
            "clocked_over_counted": clocked_over_counted(by_name["all layers"], by_name["skipping"]),
            "last_clocked_over_counted": clocked_over_counted(by_name["all layers"], last),
        }
    if job.trains_exits:
        found["at"] = {f"{goal:g}x": at_speedup(replays, ungated, goal, job) for goal in GOALS}
    return found


def replayed(model: CostEffForSequenceClassification, job: LayerSkipping) -> dict[str, ExitReplay]:
    """A model's answers on the rows to choose by and on those to report."""
    parts = {"calibration": job.data.calibration, "validation": job.data.validation}
    records = {name: collect_exit_logits(model, rows, job.collator) for name, rows in parts.items()}
    return {name: ExitReplay(part, model.config) for name, part in records.items()}


def difference(ours: ReplayedExits, theirs: ReplayedExits, job: LayerSkipping) -> tuple[float, float, float]:
    function, labels = METRICS[job.data.problem_type][job.metric], ours.replay.records.known_labels()
    return paired_bootstrap(function, ours.logits.numpy(), theirs.logits.numpy(), labels)


def clocked_over_counted(whole: dict[str, Any], row: dict[str, Any]) -> float:
    """Speed-up at batch 32 by the clock as a share of that in FLOPs, both over the gated model at all layers."""
    clocked = whole["ms_per_text"]["32"] / row["ms_per_text"]["32"]
    return clocked / (whole["flops_per_row"] / row["flops_per_row"])


def at_speedup(
    replays: dict[str, ExitReplay], ungated: dict[str, ReplayedExits], goal: float, job: LayerSkipping
) -> dict[str, Any]:
    """Settings chosen on held-out rows for a FLOPs ratio to the ungated model on these, on validation."""
    chosen_on, reported = replays["calibration"], replays["validation"]
    try:
        settings = choose_exit_config(
            chosen_on.records,
            chosen_on.config,
            job.metric,
            target_speedup=goal,
            reference_flops=ungated["calibration"].mean_flops,
            search=ExitSearch(fit_temperatures=False),
        )
    except UnreachableGoalError as error:
        return {"out_of_reach": str(error)}
    seen, exits = chosen_on.at(settings), reported.at(settings)
    return {
        "chosen_metric": seen.metric(job.metric),
        "chosen_speedup": ungated["calibration"].mean_flops / seen.mean_flops,
        "metric": exits.metric(job.metric),
        "speedup": ungated["validation"].mean_flops / exits.mean_flops,
        "difference_95": difference(exits, ungated["validation"], job),
    }


def soft_metric(model: CostEffForSequenceClassification, job: LayerSkipping) -> float:
    """Of the last exit at full depth, if weights were soft in inference too."""
    rows, logits = job.data.validation, []
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = job.collator([rows[index] for index in range(start, min(start + 64, len(rows)))])
            logits.append(model.eval()(**model_inputs(model, batch), hard_gates=False).logits.float().cpu())
    return METRICS[job.data.problem_type][job.metric](torch.cat(logits).numpy(), np.array(rows["labels"]))


def ungated_rows(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of exits alone."""
    return {name: row for name, row in rows.items() if name.startswith(f"{UNGATED}/")}


def chart(given: argparse.Namespace) -> None:
    """Metric against FLOPs, one picture per task: a line per run with exits, a point per run that skips alone."""
    figure = new_figure(4.5 * len(given.tasks), 4)
    for axes, task in zip(figure.subplots(1, len(given.tasks), squeeze=False)[0], given.tasks, strict=True):
        rows = rows_of(RESULTS / f"skip-{task}{given.suffix}.json")
        ungated = ungated_rows(rows) or ungated_rows(rows_of(RESULTS / f"skip-{task}.json"))
        whole = statistics.mean(row["flops_per_row"]["all layers"] for row in ungated.values())
        for name, row in {**ungated, **rows}.items():
            variant = name.split("/")[0]
            if variant in LINES:
                flops, metric = zip(*sorted(row["curve"]), strict=True)
                axes.plot([each / whole for each in flops], metric, color=LINES[variant], alpha=0.6)
            if variant in POINTS:
                axes.scatter(row["flops_per_row"]["skipping"] / whole, row["skips_metric"], color=POINTS[variant], s=18)
        axes.set(title=task, xlabel="FLOPs, share of the ungated model", ylabel=METRIC.get(task, "accuracy"))
        axes.grid(alpha=0.3)
    for label, colour in (("exits alone", "tab:blue"), ("both", "tab:red"), ("skipping alone", "tab:green")):
        figure.axes[0].plot([], [], color=colour, label=label)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / f"skip-curves{given.suffix}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "chart"))
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="Of the chart.")
    parser.add_argument("--data", help="A folder with the GLUE tasks as nyu-mll/glue has them.")
    parser.add_argument("--model", help="A fine-tuned classifier, a bare encoder or a multi-exit model.")
    parser.add_argument("--ungated", help="Made before, e.g. runs/skip-rte-exits-free-{seed}. Default: trained here.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--targets", type=float, nargs="*", default=[], help="Layers; none: the incentive's own weight."
    )
    parser.add_argument("--gates", default="attention", choices=SKIP_GATES)
    parser.add_argument("--exit_head", help="Of the ungated model, whose heads others keep. Default: attention.")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--exit_epochs", type=float, default=4.0)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--rows", type=int, help="For a trial: so many of train and of validation.")
    parser.add_argument("--suffix", default="", help="Of files and folders, e.g. --suffix=-trial.")
    parser.add_argument("--runs", default="runs")
    given = parser.parse_args()
    if given.what == "train" and not (given.task and given.data and given.model):
        parser.error("train needs --task, --data and --model.")
    {"train": train, "chart": chart}[given.what](given)


if __name__ == "__main__":
    main()
