"""Seconds to choose exit settings from 10,000 rows of cached logits on one core.

    OMP_NUM_THREADS=1 python benchmarks/calibration_speed.py

The logits are made up: six exits that grow surer with depth, 2 and 150 classes. Seconds are of the processor, the best
of three. The result goes to benchmarks/results/calibration_speed.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from hf_costeff import CostEffConfig
from hf_costeff.calibration import ExitSearch, choose_exit_config
from hf_costeff.exit_replay import ExitLogits
from hf_costeff.report import describe_hardware

ROWS, EXITS = 10_000, 6
ASKED = {
    "accuracy": {"max_accuracy_drop": 0.5},
    "accuracy, promised": {"max_accuracy_drop": 0.5, "guarantee": True},
    "accuracy, promised, a threshold per exit": {
        "max_accuracy_drop": 0.5,
        "guarantee": True,
        "search": ExitSearch(per_exit=True),
    },
    "disagreement, promised, patience": {
        "max_disagreement": 2.0,
        "guarantee": True,
        "search": ExitSearch("patience"),
    },
    "F1": {"metric": "f1", "max_metric_drop": 0.5},
    "F1, whatever is lost": {"metric": "f1", "max_metric_drop": 100.0},
    "half the FLOPs": {"target_speedup": 2.0},
}


def main() -> None:
    torch.set_num_threads(1)
    found: dict = {"rows": ROWS, "exits": EXITS, "hardware": describe_hardware(torch.device("cpu")), "seconds": {}}
    for classes in (2, 150):
        config = CostEffConfig(num_hidden_layers=EXITS, num_labels=classes)
        records = made_up(classes)
        for name, options in ASKED.items():
            found["seconds"][f"{classes} classes: {name}"] = best_of_three(records, config, **options)
            print(classes, name, found["seconds"][f"{classes} classes: {name}"], flush=True)
    output = Path(__file__).parent / "results" / "calibration_speed.json"
    output.write_text(json.dumps(found, indent=1))


def made_up(classes: int) -> ExitLogits:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (ROWS,), generator=generator)
    ease = torch.rand(ROWS, 1, generator=generator)
    logits = torch.randn(ROWS, EXITS, classes, generator=generator)
    logits[torch.arange(ROWS), :, truth] += torch.linspace(1.0, 6.0, EXITS) * (0.4 + 1.5 * ease)
    return ExitLogits(logits, torch.randint(4, 60, (ROWS,), generator=generator), truth, list(range(ROWS)))


def best_of_three(records: ExitLogits, config: CostEffConfig, metric: str = "accuracy", **options) -> float:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        choose_exit_config(records, config, metric, **options)
        seconds.append(time.process_time() - start)
    return round(min(seconds), 3)


if __name__ == "__main__":
    main()
