"""What early exit saves on the clock, what it costs where nobody leaves, and what offline prediction holds in memory.

    python benchmarks/prediction.py --model DIR --data train.parquet --overhead --throughput --memory [--threads 1]

Each flag fills its part of benchmarks/results/prediction.json and leaves the others as they are.

- overhead: `predict` with a threshold that never fires beside the plain forward, and beside `predict` at full depth,
  on the same batches of sorted texts, with the share of the forward's FLOPs that the asked exits are. Asked: at most 5%
  over the forward.
- throughput: `predict_texts` with early exit beside the same at full depth, tokenization included, at the threshold
  whose mean exit layer comes nearest to half the depth and at the saved settings. Asked: 1.5 times at half the depth.
- memory: resident memory while every row of the file is predicted, from the first answer on. Asked: less than 100 MB.

Candidates are timed in alternation. A ratio is the median over the rounds of the two times of one round; beside it
stand the quartiles. On a machine that others use too, --cpu_seconds counts the seconds that the process really ran.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hf_costeff import CostEffForSequenceClassification, ExitConfig, predict_texts
from hf_costeff.columns import find_columns
from hf_costeff.efficiency import cumulative_flops, full_depth_flops, measure_alternating, ratio
from hf_costeff.report import describe_hardware

RESULTS = Path(__file__).parent / "results" / "prediction.json"
NEVER = 1e-9
"""A threshold that no row of a trained model passes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="Default: the model's folder.")
    parser.add_argument("--data", required=True, help="A parquet file with texts.")
    parser.add_argument("--rows", type=int, default=1024, help="Rows for the clock, a random sample.")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu_seconds", action="store_true", help="CPU seconds of the process, not the wall clock.")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    if given.cpu_seconds and given.threads != 1:
        parser.error("CPU seconds of several threads add up and say nothing of the clock: use --threads 1.")
    clock = time.process_time if given.cpu_seconds else time.perf_counter
    torch.set_num_threads(given.threads)
    model = CostEffForSequenceClassification.from_pretrained(given.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer or given.model)
    rows = Dataset.from_parquet(given.data)
    (column,) = find_columns(rows).text
    sample = random.Random(42).sample(range(len(rows)), min(given.rows, len(rows)))
    texts = [rows[index][column] for index in sample]
    parts: dict[str, Callable[[], Any]] = {
        "overhead": lambda: overhead(model, tokenizer, texts, given.rounds, clock),
        "throughput": lambda: throughput(model, tokenizer, texts, given.rounds, clock),
        "memory": lambda: memory(model, tokenizer, rows),
    }
    for name, measure in parts.items():
        if getattr(given, name):
            about = {
                "model": Path(given.model).resolve().name,
                "layers": model.config.num_hidden_layers,
                "threads": given.threads,
                "clock": clock.__name__,
                "hardware": describe_hardware(torch.device("cpu")),
            }
            found = {**about, "data": Path(given.data).stem, **measure()}
            saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            saved[name] = found
            RESULTS.write_text(json.dumps(saved, indent=1))
            print(name, json.dumps(saved[name], indent=1), flush=True)


def overhead(model, tokenizer, texts, rounds, clock) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for batch_size in (1, 8, 32):
        chosen = sorted(texts[: 32 if batch_size == 1 else 128], key=len)
        chunks = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
        batches = [tokenizer(chunk, return_tensors="pt", padding=True, truncation=True) for chunk in chunks]

        @torch.inference_mode()
        def forward(batches=batches) -> None:
            for batch in batches:
                model(**batch)

        def predict(early_exit, batches=batches) -> set[int]:
            return {
                layer
                for batch in batches
                for layer in model.predict(**batch, early_exit=early_exit).exit_layer.tolist()
            }

        assert predict(NEVER) == {model.config.num_hidden_layers}
        candidates = {"forward": forward, "full": lambda: predict(False), "never": lambda: predict(NEVER)}
        times = measure_alternating(candidates, warmup=1, repeats=rounds, clock=clock)
        base = times["forward"].times_ms
        found[f"batch {batch_size}"] = {
            "forward_ms_per_batch": times["forward"].median_ms / len(batches),
            "never_over_forward": asdict(ratio(times["never"].times_ms, base)),
            "full_depth_over_forward": asdict(ratio(times["full"].times_ms, base)),
            "share_of_the_forward_in_asked_exits": asked_share(model, batches),
        }
    return {"threshold": NEVER, "rounds": rounds, **found}


def asked_share(model, batches) -> float:
    """FLOPs of all exit heads but the last over those of the whole forward, padding counted."""
    config = model.config
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    whole = sum(cumulative_flops(config, length)[-1] for length in lengths)
    return 1 - sum(full_depth_flops(config, length) for length in lengths) / whole


def throughput(model, tokenizer, texts, rounds, clock) -> dict[str, Any]:
    def answer(early_exit) -> float:
        """The mean exit layer."""
        settings = {"early_exit": early_exit, "show_progress": False}
        return statistics.mean(row["exit_layer"] for row in predict_texts(model, tokenizer, texts, **settings))

    half = model.config.num_hidden_layers / 2
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if answer(middle) > half else (low, middle)
    candidates = {"full": False, "half": high}
    if model.config.exit_config is not None:
        candidates["saved"] = ExitConfig.from_dict(model.config.exit_config)
    layers = {name: answer(early_exit) for name, early_exit in candidates.items()}
    runs = {name: lambda e=e: answer(e) for name, e in candidates.items()}
    times = measure_alternating(runs, warmup=1, repeats=rounds, clock=clock)
    return {
        "rows": len(texts),
        "rounds": rounds,
        "full_depth_rows_per_second": 1e3 * len(texts) / times["full"].median_ms,
        **{
            name: {
                "threshold": getattr(candidates[name], "threshold", candidates[name]),
                "mean_exit_layer": layers[name],
                "times_the_throughput": asdict(ratio(times["full"].times_ms, times[name].times_ms)),
            }
            for name in candidates
            if name != "full"
        },
    }


def memory(model, tokenizer, rows) -> dict[str, Any]:
    answers = predict_texts(model, tokenizer, rows, show_progress=True)
    next(answers)
    first = highest = resident_mb()
    count, layers = 1, 0
    for count, row in enumerate(answers, start=2):
        layers += row["exit_layer"]
        if count % 2048 == 0:
            highest = max(highest, resident_mb())
    last = resident_mb()
    return {
        "rows": count,
        "mean_exit_layer": layers / (count - 1),
        "first_mb": first,
        "growth_to_the_last_mb": last - first,
        "growth_to_the_highest_mb": max(highest, last) - first,
    }


def resident_mb() -> float:
    """Resident memory of this process, megabytes (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
