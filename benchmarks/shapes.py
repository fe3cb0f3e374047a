"""Measured speed-up beside the ratio of FLOPs, at full depth and with every row leaving half-way, on random weights.

    python benchmarks/shapes.py [--shapes bert-base minilm] [--rounds 9]

A stock classifier, and a slim one of 1/8 of its parameters made of the same shape, answer the same random tokens in
alternation: `forward` of the one, `predict` of the other. Speed depends on shapes alone, so nothing is trained.
Half-way means that everybody leaves at the exit in the middle and those before it are asked. What is wanted of the
ratio of FLOPs at batch 32: 0.85 on BERT-base shapes and 0.75 on MiniLM's, where norms and residuals stay at full
width; 0.6 at batch 1.

Results go to benchmarks/results/shapes.json, shape by shape.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_costeff import CostEffForSequenceClassification, ExitConfig
from hf_costeff.conversion import convert_config
from hf_costeff.efficiency import count_parameters, mean_flops, measure_alternating, ratio, stock_flops
from hf_costeff.exit_times import NEVER
from hf_costeff.report import describe_hardware
from hf_costeff.slenderization import Budget, describe_widths, solve_widths

RESULTS = Path(__file__).parent / "results" / "shapes.json"
SHAPES = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--length", type=int, default=32, help="Tokens per row.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu_seconds", action="store_true", help="CPU seconds of the process, not the wall clock.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for shape in given.shapes:
        saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        saved[shape] = measured(BertConfig(**SHAPES[shape]), given)
        RESULTS.write_text(json.dumps(saved, indent=1))
        print(shape, json.dumps(saved[shape], indent=1), flush=True)


def measured(stock_config: BertConfig, given: argparse.Namespace) -> dict[str, Any]:
    clock = time.process_time if given.cpu_seconds else time.perf_counter
    stock = BertForSequenceClassification(stock_config).eval()
    full = convert_config(stock_config)
    widths = solve_widths(full, Budget(max_parameters=int(count_parameters(stock) / given.compression)))
    config = widths.apply_to(full)
    slim = CostEffForSequenceClassification(config).eval()
    half = config.num_hidden_layers // 2
    thresholds = [1.0 if layer == half else NEVER for layer in config.exit_layers]
    exits = {"full depth": False, "half depth": ExitConfig(threshold=thresholds)}
    found: dict[str, Any] = {
        "tokens": given.length,
        "clock": clock.__name__,
        "rounds": given.rounds,
        "widths": describe_widths(widths),
        "parameters": count_parameters(slim),
        "hardware": describe_hardware(torch.device("cpu")),
    }
    for batch_size in (1, 32):
        tokens = torch.randint(1000, stock_config.vocab_size, (batch_size, given.length))

        @torch.inference_mode()
        def teacher(tokens=tokens) -> None:
            stock(tokens)

        runs: dict[str, Any] = {"teacher": teacher}
        for name, settings in exits.items():
            runs[name] = lambda settings=settings, tokens=tokens: slim.predict(tokens, early_exit=settings)
        times = measure_alternating(runs, warmup=2, repeats=given.rounds, clock=clock)
        for name, settings in exits.items():
            layers = runs[name]().exit_layer
            stops = slim.costeff.exit_plan(settings).stops
            flops = stock_flops(stock_config, given.length) / mean_flops(config, layers, given.length, stops)
            faster = ratio(times["teacher"].times_ms, times[name].times_ms)
            found[f"batch {batch_size}, {name}"] = {
                "teacher_ms": times["teacher"].median_ms,
                "ms": times[name].median_ms,
                "times_as_fast": asdict(faster),
                "flops_ratio": flops,
                "share_of_the_flops_ratio": faster.median / flops,
            }
    return found


if __name__ == "__main__":
    main()
