"""Compress a real encoder on a real task and write one row of docs/results.md.

    python benchmarks/real_run.py --task sst2 --data DIR --models DIR [--seed 42] [--recipe fast]

`--data` is a folder with the GLUE tasks as `nyu-mll/glue` has them, `--models` one with `all-minilm-l6-v2` and
`minilm-l6-sst2`. The run is resumable; its row goes to benchmarks/results/<task>-<recipe>-<seed>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from hf_costeff import compress
from hf_costeff.calibration import ExitLogits, choose_exit_config, exit_outcome
from hf_costeff.compression import Compression
from hf_costeff.compression_args import CompressionArguments
from hf_costeff.data import DataArguments, make_collator, prepare_data
from hf_costeff.efficiency import stock_flops
from hf_costeff.evaluation import collect_exit_logits
from hf_costeff.exit_criteria import simulate_exits
from hf_costeff.metrics import METRICS, paired_bootstrap

PAPER_TOKENS, PAPER_RATIO = 128, 19
METRIC = {"mrpc": "f1", "cola": "matthews", "stsb": "spearman"}
SPLITS = {
    "sst2": {"train_split": "train_disjoint", "calibration_split": "calibration"},
    "mnli": {"validation_split": "validation_matched"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=["sst2", "mrpc", "cola", "rte", "stsb", "qnli", "mnli"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument(
        "--teacher", help="A classifier fine-tuned before; default: fine-tuned by the recipe, but for sst2."
    )
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--embedding_rank", type=int)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", default="runs")
    given = parser.parse_args()
    name = f"{given.task}-{given.recipe}-{given.seed}"
    default_teacher = "minilm-l6-sst2" if given.task == "sst2" else "all-minilm-l6-v2"
    options = {
        "dataset_config": given.task,
        "metric": METRIC.get(given.task, "accuracy"),
        "recipe": given.recipe,
        "compression": given.compression,
        "embedding_rank": given.embedding_rank,
        "seed": given.seed,
        **SPLITS.get(given.task, {}),
    }
    teacher = given.teacher or str(Path(given.models) / default_teacher)
    result = compress(teacher, given.data, str(Path(given.runs) / name), **options)
    row = json.loads((result.model_path / "efficiency.json").read_text())
    row["at_paper_flops"] = at_paper_flops(result.model_path, teacher, given.data, options)
    output = Path(__file__).parent / "results" / f"{name}.json"
    output.parent.mkdir(exist_ok=True)
    row["settings"] = {key: value for key, value in row["settings"].items() if key not in ("teacher", "data")}
    output.write_text(json.dumps(row, indent=1))
    print(result.table())
    print(json.dumps(row["at_paper_flops"], indent=1))


def at_paper_flops(model_path: Path, teacher: str, data: str, options: dict) -> dict:
    """The metric at 1/19 of the teacher's FLOPs, threshold chosen on calibration rows, all rows at 128 tokens."""
    stages = model_path / "stages"
    teacher = str(stages / "teacher") if (stages / "teacher").exists() else teacher
    data_names = {field.name for field in dataclasses.fields(DataArguments)}
    arguments = DataArguments(dataset=data, **{key: value for key, value in options.items() if key in data_names})
    run = Compression(CompressionArguments(teacher=teacher, output_dir=str(model_path)), arguments)
    run.tokenizer = run.processing_class = _tokenizer(model_path)
    prepared = prepare_data(
        arguments,
        run.tokenizer,
        teacher_config=run.teacher_config,
        max_positions=run.full_config.max_position_embeddings,
    )
    collator = make_collator(run.tokenizer)
    slim = AutoModelForSequenceClassification.from_pretrained(model_path)
    stock = AutoModelForSequenceClassification.from_pretrained(teacher)
    metric, budget = options["metric"], stock_flops(stock.config, PAPER_TOKENS)
    calibration = _at_128(collect_exit_logits(slim, prepared.calibration, collator))
    validation = _at_128(collect_exit_logits(slim, prepared.validation, collator))
    reference = collect_exit_logits(stock, prepared.validation, collator)
    settings = choose_exit_config(calibration, slim.config, metric, target_speedup=PAPER_RATIO, reference_flops=budget)
    outcome = exit_outcome(validation, settings, slim.config, metric)
    problem_type = slim.config.resolved_problem_type
    exits = simulate_exits(validation.logits, settings, slim.config.exit_layers, problem_type)
    function, labels = METRICS[problem_type][metric], reference.labels.numpy()
    answers = {
        "full_depth": validation.logits[:, -1].numpy(),
        "early_exit": validation.logits[torch.arange(len(exits)), exits].numpy(),
    }
    teacher_logits = reference.logits[:, 0].numpy()
    return {
        "metric": metric,
        "teacher": function(teacher_logits, labels),
        "early_exit": outcome.metric,
        "flops_ratio": budget / outcome.flops_per_row,
        "mean_exit_layer": outcome.mean_exit_layer,
        "difference_to_teacher_95": {
            name: paired_bootstrap(function, logits, teacher_logits, labels) for name, logits in answers.items()
        },
        "curve": [
            {
                "threshold": step / 50,
                **dataclasses.asdict(
                    exit_outcome(
                        validation,
                        dataclasses.replace(settings, threshold=step / 50, calibration=None),
                        slim.config,
                        metric,
                    )
                ),
            }
            for step in range(51)
        ]
        if settings.threshold is not None
        else [],
    }


def _at_128(records: ExitLogits) -> ExitLogits:
    return dataclasses.replace(records, seq_lengths=torch.full_like(records.seq_lengths, PAPER_TOKENS))


def _tokenizer(path: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


if __name__ == "__main__":
    main()
