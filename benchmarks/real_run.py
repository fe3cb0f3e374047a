"""Compress a real encoder on a real task and write one row of docs/results.md.

    python benchmarks/real_run.py --task sst2 --data DIR --models DIR [--seed 42] [--recipe fast]

`--data` is a folder with the GLUE tasks as `nyu-mll/glue` has them, or for clinc150 one with its rows; `--models` one
with `all-minilm-l6-v2` and `minilm-l6-sst2`. The run is resumable; its row goes to
benchmarks/results/<task>-<recipe>-<seed>.json (with --embedding_rank, <task>-<recipe>-rank<rank>-<seed>.json).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff import CostEffConfig, ExitConfig, compress
from hf_costeff.calibration import ExitSearch, choose_exit_config
from hf_costeff.data import DataArguments, make_collator, prepare_data
from hf_costeff.efficiency import PAPER_SEQ_LENGTH, stock_flops
from hf_costeff.evaluation import collect_exit_logits
from hf_costeff.exit_criteria import answers
from hf_costeff.exit_replay import ExitLogits, ExitReplay
from hf_costeff.metrics import METRICS, paired_bootstrap
from hf_costeff.training_args import SOFT_LABEL_EXITS

PAPER_RATIO = 19
TASKS = ("sst2", "mrpc", "cola", "rte", "stsb", "qnli", "mnli", "clinc150")
METRIC = {"mrpc": "f1", "cola": "matthews", "stsb": "spearman"}
SPLITS = {
    "sst2": {"train_split": "train_disjoint", "calibration_split": "calibration"},
    "mnli": {"validation_split": "validation_matched"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument(
        "--teacher", help="A classifier fine-tuned before; default: fine-tuned by the recipe, but for sst2."
    )
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--embedding_rank", type=int)
    parser.add_argument("--token_replacement_rate", type=float)
    parser.add_argument("--soft_label_exit", choices=SOFT_LABEL_EXITS, help="Default: the recipe's.")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", default="runs")
    given = parser.parse_args()
    rank = "" if given.embedding_rank is None else f"-rank{given.embedding_rank}"
    soft = "" if given.soft_label_exit is None else f"-{given.soft_label_exit}"
    name = f"{given.task}-{given.recipe}{rank}{soft}-{given.seed}"
    default_teacher = "minilm-l6-sst2" if given.task == "sst2" else "all-minilm-l6-v2"
    options = {
        "dataset_config": None if given.task == "clinc150" else given.task,
        "metric": METRIC.get(given.task, "accuracy"),
        "recipe": given.recipe,
        "compression": given.compression,
        "embedding_rank": given.embedding_rank,
        "token_replacement_rate": given.token_replacement_rate,
        "soft_label_exit": given.soft_label_exit,
        "seed": given.seed,
        **SPLITS.get(given.task, {}),
    }
    teacher = given.teacher or str(Path(given.models) / default_teacher)
    result = compress(teacher, given.data, str(Path(given.runs) / name), **options)
    row = json.loads((result.model_path / "efficiency.json").read_text())
    row["at_paper_flops"] = at_paper_flops(result.model_path, teacher, given.data, options)
    output = Path(__file__).parent / "results" / f"{name}.json"
    output.parent.mkdir(exist_ok=True)
    kept = (
        "recipe",
        "compression",
        "embedding_rank",
        "token_replacement_rate",
        "soft_label_exit",
        "allocation",
        "events",
        "exit_pooling",
        "metric",
        "precision",
        "seed",
    )
    row["settings"] = {name: row["settings"][name] for name in kept}
    output.write_text(json.dumps(row, indent=1))
    print(result.table())
    print(json.dumps(row["at_paper_flops"], indent=1))


def at_paper_flops(model_path: Path, teacher: str, data: str, options: dict) -> dict:
    """The metric at 1/19 of the teacher's FLOPs, with intervals of the difference to the teacher (paired bootstrap).

    Settings are chosen on calibration rows, which may come to a little more or less than 1/19 on validation; and, as
    `on_validation_texts`, on the validation texts without their labels, which comes to just that.
    """
    stages = model_path / "stages"
    teacher = str(stages / "teacher") if (stages / "teacher").exists() else teacher
    names = {field.name for field in dataclasses.fields(DataArguments)}
    arguments = DataArguments(dataset=data, **{key: value for key, value in options.items() if key in names})
    slim = AutoModelForSequenceClassification.from_pretrained(model_path)
    stock = AutoModelForSequenceClassification.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prepared = prepare_data(
        arguments,
        tokenizer,
        teacher_config=stock.config,
        max_positions=slim.config.longest_text,
    )
    collator = make_collator(tokenizer)
    calibration = collect_exit_logits(slim, prepared.calibration, collator)
    validation = collect_exit_logits(slim, prepared.validation, collator)
    reference = collect_exit_logits(stock, prepared.validation, collator)
    metric, problem_type = options["metric"], slim.config.resolved_problem_type
    budget = stock_flops(stock.config, PAPER_SEQ_LENGTH) / PAPER_RATIO
    reached = best_at_flops(calibration, validation, slim.config, metric, budget)
    answered = dataclasses.replace(validation, labels=answers(validation.logits[:, -1], problem_type))
    on_budget = best_at_flops(answered, validation, slim.config, metric, budget)
    settings = ExitConfig.from_dict(reached["exit_config"])
    exits = ExitReplay(validation, slim.config).at(settings)
    function, labels, teacher_logits = (
        METRICS[problem_type][metric],
        reference.known_labels(),
        reference.logits[:, 0].numpy(),
    )
    logits = {
        "full_depth": validation.logits[:, -1].numpy(),
        "early_exit": exits.logits.numpy(),
    }
    return {
        **reached,
        "teacher": function(teacher_logits, labels),
        "difference_to_teacher_95": {
            name: paired_bootstrap(function, found, teacher_logits, labels) for name, found in logits.items()
        },
        "on_validation_texts": {key: on_budget[key] for key in ("early_exit", "flops", "mean_exit_layer")},
    }


def best_at_flops(
    calibration: ExitLogits, validation: ExitLogits, config: CostEffConfig, metric: str, budget: float
) -> dict:
    """The settings that keep a FLOPs budget and have the best metric on calibration rows, every row at 128 tokens."""
    calibration, validation = (
        dataclasses.replace(records, seq_lengths=torch.full_like(records.seq_lengths, PAPER_SEQ_LENGTH))
        for records in (calibration, validation)
    )
    search = ExitSearch(fit_temperatures=False)  # as compress chooses
    settings = choose_exit_config(
        calibration, config, metric, target_speedup=1.0, reference_flops=budget, search=search
    )
    outcome = ExitReplay(validation, config).outcome(settings, metric)
    return {
        "metric": metric,
        "early_exit": outcome.metric,
        "flops": outcome.flops_per_row,
        "flops_budget": budget,
        "mean_exit_layer": outcome.mean_exit_layer,
        "exit_config": settings.to_dict(),
    }


if __name__ == "__main__":
    main()
