"""The speed-accuracy curve of one threshold for all exits against a threshold per exit, and of entropy in two units.

    python benchmarks/exit_curves.py --models runs/sst2-fast-42 runs/mrpc-fast-42 --data DIR [--logits DIR]

`--models` are folders that `real_run.py` made; their calibration rows fit temperatures and lay the paths from careful
to bold, their validation rows say what each setting keeps and saves. At equal accuracy: of all settings up to the first
that loses more than so many points of accuracy against full depth, the fastest. The result goes to
benchmarks/results/exit-curves.json and, with matplotlib, exit-curves.png.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from cached_logits import load_logits
from hf_costeff import CostEffConfig, ExitConfig
from hf_costeff.calibration import candidate_settings, fit_temperatures
from hf_costeff.charts import new_figure
from hf_costeff.exit_replay import ExitReplay

SHOWN = 25
LOSSES = (0.0, 0.5, 1.0, 2.0)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)
VARIANTS = {
    "one threshold": {"temperatures": False, "per_exit": False},
    "one threshold, temperatures": {"temperatures": True, "per_exit": False},
    "per exit, temperatures": {"temperatures": True, "per_exit": True},
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--logits", help="Folder that keeps exit logits.")
    given = parser.parse_args()
    output = RESULTS / "exit-curves.json"
    found = json.loads(output.read_text()) if output.exists() else {}
    for path in given.models:
        found[Path(path).name] = compare(path, given.data, given.logits)
        output.write_text(json.dumps(found, indent=1))
        print(Path(path).name, json.dumps(found[Path(path).name]["at_equal_accuracy"], indent=1))
    draw(found)


def compare(path: str, data: str, logits: str | None) -> dict:
    """What validation rows say of each variant's settings, and of the same numbers read as fractions and as nats."""
    config, records = CostEffConfig.from_pretrained(path), load_logits(path, data, logits)
    fitting, measured = (ExitReplay(records[name], config) for name in ("calibration", "validation"))
    curves = {name: curve(fitting, measured, **variant) for name, variant in VARIANTS.items()}
    full = measured.full_depth.metric("accuracy")
    return {
        "rows": {name: len(part.logits) for name, part in records.items()},
        "classes": config.num_labels,
        "full_depth_accuracy": full,
        "at_equal_accuracy": {
            name: {f"{points:g}": fastest(points_of, full, points) for points in LOSSES}
            for name, points_of in curves.items()
        },
        "same_number": {
            criterion: [
                {"threshold": limit, **told(measured, ExitConfig(criterion, threshold=limit))} for limit in THRESHOLDS
            ]
            for criterion in ("entropy", "entropy_nats")
        },
        "largest_entropy_in_nats": math.log(config.num_labels),
        "curves": {name: thinned(points) for name, points in curves.items()},
    }


def curve(fitting: ExitReplay, measured: ExitReplay, *, temperatures: bool, per_exit: bool) -> list[dict]:
    """The validation rows along a path that the calibration rows have laid."""
    fitted = fit_temperatures(fitting.records, fitting.problem_type) if temperatures else 1.0
    losses = fitting.losses("max_accuracy_drop") if per_exit else None
    path = candidate_settings(fitting.records, fitting.config, "entropy", temperatures=fitted, losses=losses)
    return [told(measured, settings) for part in measured.distinct(path) for settings in part]


def told(replay: ExitReplay, settings: ExitConfig) -> dict:
    """Accuracy, depth and FLOPs of the rows."""
    outcome = replay.outcome(settings, "accuracy")
    return {
        "accuracy": outcome.metric,
        "mean_exit_layer": outcome.mean_exit_layer,
        "speedup": outcome.speedup,
    }


def fastest(curve: list[dict], full: float, points: float) -> dict:
    """The last point of a curve before any loses more."""
    kept = curve[0]
    for point in curve:
        if 100 * (full - point["accuracy"]) > points + 1e-9:
            break
        kept = point
    return kept


def thinned(points: list[dict]) -> list[dict]:
    """At most `SHOWN` points, evenly spread, the ends among them; four digits of each figure."""
    places = np.unique(np.linspace(0, len(points) - 1, SHOWN).round().astype(int))
    return [{name: float(f"{value:.4g}") for name, value in points[place].items()} for place in places]


def draw(found: dict) -> None:
    figure = new_figure(4.0 * len(found), 3.6)
    if figure is None:
        return
    for number, (name, result) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), number)
        for variant, points in result["curves"].items():
            axes.plot([point["speedup"] for point in points], [point["accuracy"] for point in points], label=variant)
        axes.set_title(name)
        axes.set_xlabel("times fewer FLOPs than full depth")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(RESULTS / "exit-curves.png", dpi=120)


if __name__ == "__main__":
    main()
