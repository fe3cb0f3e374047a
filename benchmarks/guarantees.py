"""How often promises and plain sweeps break, on samples drawn from a pool whose loss is known.

    python benchmarks/guarantees.py --model runs/sst2-fast-42 --data DIR [--rows 1000 500] [--logits DIR]

`--model` is a folder that `real_run.py` made. The pool is its validation and its calibration rows, which no stage
trained on; `--logits` is a folder that keeps their exit logits. Each sample is drawn from the pool with
replacement. A choice is broken if its loss on the whole pool is above epsilon: the share of rows that full depth has
right and early exit wrong, or that differ; beside it, the net drop in accuracy. The result goes to
benchmarks/results/guarantees-<task>.json as it comes; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from cached_logits import joined, load_logits
from hf_costeff import CostEffConfig
from hf_costeff.calibration import ExitSearch, choose_exit_config
from hf_costeff.exit_replay import ExitLogits, ExitReplay

EPSILONS = (0.005, 0.01, 0.02)
DELTA = 0.1
GOALS = ("max_accuracy_drop", "max_disagreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--logits", help="Folder that keeps exit logits.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 500], help="Rows of each sample.")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--criterion")
    parser.add_argument("--per_exit", action="store_true")
    given = parser.parse_args()
    config = CostEffConfig.from_pretrained(given.model)
    pool = joined(load_logits(given.model, given.data, given.logits))
    search = ExitSearch(given.criterion, given.per_exit)
    about = {
        "model": Path(given.model).name,
        "pool_rows": len(pool.logits),
        "pool_accuracy": ExitReplay(pool, config).full_depth.metric("accuracy"),
        "samples": given.samples,
        "delta": DELTA,
        "allowed_share_broken": DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / given.samples),
        "search": vars(search),
    }
    task = Path(given.model).name.split("-")[0]
    output = Path(__file__).parent / "results" / f"guarantees-{task}.json"
    output.parent.mkdir(exist_ok=True)
    before = json.loads(output.read_text()) if output.exists() else {}
    runs = before["runs"] if {**before, "runs": []} == {**about, "runs": []} else []
    done = [{name: run[name] for name in ("rows", "goal", "epsilon", "guarantee")} for run in runs]
    for rows, goal, epsilon, guarantee in product(given.rows, GOALS, EPSILONS, (True, False)):
        asked = {"rows": rows, "goal": goal, "epsilon": epsilon, "guarantee": guarantee}
        if asked in done:
            continue
        runs.append(asked | repeat(pool, config, search, **asked, samples=given.samples))
        output.write_text(json.dumps({**about, "runs": runs}, indent=1))
        print(json.dumps(runs[-1]), flush=True)


def repeat(
    pool: ExitLogits,
    config: CostEffConfig,
    search: ExitSearch,
    *,
    goal: str,
    epsilon: float,
    guarantee: bool,
    rows: int,
    samples: int,
) -> dict[str, float]:
    """Shares over the samples, and the speed-up that was kept."""
    whole = ExitReplay(pool, config)
    losses = whole.losses(goal)
    full = whole.full_depth.metric("accuracy")
    broken, dropped, fell_back, speedups, seconds = 0, 0, 0, [], 0.0
    generator = np.random.default_rng(0)
    for _ in tqdm(range(samples), desc=f"{goal} {epsilon} {'promise' if guarantee else 'sweep'}", leave=False):
        drawn = generator.integers(len(pool.logits), size=rows)
        keys = [pool.row_keys[row] for row in drawn]
        sample = ExitLogits(pool.logits[drawn], pool.seq_lengths[drawn], pool.labels[drawn], keys)
        limit = {goal: 100 * epsilon}
        start = time.process_time()
        settings = choose_exit_config(
            sample, config, "accuracy", **limit, search=search, guarantee=guarantee, delta=DELTA
        )
        seconds += time.process_time() - start
        exits = whole.at(settings)
        broken += exits.total(losses) > epsilon * len(pool.logits)
        dropped += full - exits.metric("accuracy") > epsilon + 1e-12
        fell_back += "no_promise" in settings.calibration
        speedups.append(whole.full_depth.mean_flops / exits.mean_flops)
    return {
        "share_broken": broken / samples,
        "share_accuracy_dropped_more": dropped / samples,
        "share_fell_back": fell_back / samples,
        "mean_speedup": float(np.mean(speedups)),
        "speedup_quartiles": np.quantile(speedups, [0.25, 0.5, 0.75]).tolist(),
        "seconds_per_choice": seconds / samples,
    }


if __name__ == "__main__":
    main()
