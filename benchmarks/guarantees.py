"""How often promises and plain sweeps break, on samples drawn from a pool whose loss is known.

    python benchmarks/guarantees.py --task sst2 --model slim --data DIR --split validation --logits sst2.pt

The pool is a labelled split that no training saw; `--logits` keeps its exit logits (written once, then read). Each
sample is drawn from the pool with replacement. A choice is broken if its loss on the whole pool is above epsilon: the
share of rows that full depth has right and early exit wrong, or that differ; beside it, the net drop in accuracy.
The result goes to benchmarks/results/guarantees-<task>.json as it comes; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff import CostEffConfig
from hf_costeff.calibration import ExitSearch, choose_exit_config
from hf_costeff.data import DataArguments, make_collator, prepare_split
from hf_costeff.evaluation import collect_exit_logits, row_keys
from hf_costeff.exit_replay import ExitLogits, ExitReplay

EPSILONS = (0.005, 0.01, 0.02)
DELTA = 0.1
GOALS = ("max_accuracy_drop", "max_disagreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="Names the result; with --data also the dataset's config.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="Dataset that holds the pool; not needed if --logits is there.")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--logits", help="File of the pool's exit logits.")
    parser.add_argument("--rows", type=int, default=1000, help="Rows of each sample.")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--criterion")
    parser.add_argument("--per_exit", action="store_true")
    given = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(given.model)
    pool = load_pool(given, model)
    search = ExitSearch(given.criterion, given.per_exit)
    about = {
        "task": given.task,
        "pool_rows": len(pool.logits),
        "sample_rows": given.rows,
        "samples": given.samples,
        "delta": DELTA,
        "allowed_share_broken": DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / given.samples),
        "search": vars(search),
    }
    output = Path(__file__).parent / "results" / f"guarantees-{given.task}.json"
    output.parent.mkdir(exist_ok=True)
    before = json.loads(output.read_text()) if output.exists() else {}
    runs = before["runs"] if {**before, "runs": []} == {**about, "runs": []} else []
    wanted = [
        {"goal": goal, "epsilon": epsilon, "guarantee": guarantee}
        for goal in GOALS
        for epsilon in EPSILONS
        for guarantee in (True, False)
    ]
    for asked in wanted[len(runs) :]:
        runs.append(asked | repeat(pool, model.config, search, **asked, rows=given.rows, samples=given.samples))
        output.write_text(json.dumps({**about, "runs": runs}, indent=1))
        print(json.dumps(runs[-1]))


def load_pool(given: argparse.Namespace, model) -> ExitLogits:
    """The pool's logits, from the file if it is there."""
    file = Path(given.logits) if given.logits else None
    if file is not None and file.exists():
        return ExitLogits(**torch.load(file))
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    longest = model.config.longest_text
    data = DataArguments(dataset=given.data, dataset_config=given.task)
    rows = prepare_split(data, given.split, tokenizer, config=model.config, max_positions=longest)
    found = collect_exit_logits(model, rows, make_collator(tokenizer))
    pool = ExitLogits(found.logits, found.seq_lengths, found.labels, row_keys(rows))
    if file is not None:
        torch.save(vars(pool), file)
    return pool


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
    broken, dropped, fell_back, speedups = 0, 0, 0, []
    generator = np.random.default_rng(0)
    for _ in tqdm(range(samples), desc=f"{goal} {epsilon} {'promise' if guarantee else 'sweep'}", leave=False):
        drawn = generator.integers(len(pool.logits), size=rows)
        keys = [pool.row_keys[row] for row in drawn]
        sample = ExitLogits(pool.logits[drawn], pool.seq_lengths[drawn], pool.labels[drawn], keys)
        limit = {goal: 100 * epsilon}
        settings = choose_exit_config(
            sample, config, "accuracy", **limit, search=search, guarantee=guarantee, delta=DELTA
        )
        exits = whole.at(settings)
        broken += exits.lost(losses) > epsilon * len(pool.logits)
        dropped += full - exits.metric("accuracy") > epsilon + 1e-12
        fell_back += "no_promise" in settings.calibration
        speedups.append(whole.full_depth.mean_flops / exits.mean_flops)
    return {
        "share_broken": broken / samples,
        "share_accuracy_dropped_more": dropped / samples,
        "share_fell_back": fell_back / samples,
        "mean_speedup": float(np.mean(speedups)),
    }


if __name__ == "__main__":
    main()
