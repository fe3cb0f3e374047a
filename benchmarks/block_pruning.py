"""Block pruning on real tasks: what it costs at each compression, how large the file is, how fast the packed model.

    python benchmarks/block_pruning.py quality --task mrpc --data DIR --model DIR [--seeds 42 43 44]
    python benchmarks/block_pruning.py quality --task mrpc --data DIR --model runs/mrpc-fast-42 --name slim
    python benchmarks/block_pruning.py size --model DIR
    python benchmarks/block_pruning.py speed --model DIR

`quality` compares, per seed and ratio: blocks pruned after reweighted group Lasso, after plain group Lasso, after
either at ten times the strength, after proximal reweighted steps, and at once (the same training without a penalty).
They are ranked by Taylor scores, but for "one-shot", which is by magnitude; "one-shot by taylor" is the other. One
penalised run serves every ratio. The dense row is the same model trained as long without pruning. `--model` is a
fine-tuned classifier, or a slim multi-exit model, which is pruned on top. `size` and `speed` need no data: they prune
by magnitude and look at the file, and at CPU time of the whole encoder in alternation, on one thread, batch 32 of 64
tokens and batch 1. Rows go to benchmarks/results/block-<what>.json one by one, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from hf_costeff import BlockShape, CostEffForSequenceClassification, convert_from_stock, pack, prune_blocks
from hf_costeff.block_compression import BlockPruning, BlockPruningArguments
from hf_costeff.block_pruning import zero_blocks
from hf_costeff.data import DataArguments
from hf_costeff.evaluation import collect_exit_logits
from hf_costeff.metrics import METRICS
from hf_costeff.packed_linear import DENSE, PANELS
from hf_costeff.packing import choose_layouts, packed_linears, set_layouts
from hf_costeff.report import describe_hardware
from real_run import METRIC, SPLITS
from results_file import RESULTS, ResultsFile

RATIOS = (0.3, 0.44, 0.5, 0.6, 0.8)  # 1.43, 1.79, 2, 2.5 and 5 times fewer weights
SETTINGS = (
    *("column_slabs", "batch_size", "penalty_epochs", "retrain_epochs"),
    *("learning_rate", "retrain_learning_rate"),
)
"""Flags that decide what the rows of a quality file say, beside those in their names."""
VARIANTS: dict[str, dict[str, Any]] = {
    "reweighted": {},
    "plain": {"reweighted": False},
    "reweighted at 300": {"strength": 300.0},
    "plain at 300": {"strength": 300.0, "reweighted": False},
    "proximal": {"proximal": True},
    "one-shot": {"strength": 0.0, "importance": "magnitude"},
    "one-shot by taylor": {"strength": 0.0},
}
SHAPES = {
    **{f"rows of {width} columns": BlockShape(columns=width) for width in (8, 9, 10, 12, 16, 32, 48, 96, 128, 192)},
    "columns of 96 rows": BlockShape(rows=96, columns=1),
    "squares of 32": BlockShape(rows=32, columns=32),
    "balanced rows of 96 columns": BlockShape(columns=96, balanced=True),  # no neuron dies, so nothing but panels
}
FAST_SHAPES = (
    *("rows of 32 columns", "rows of 96 columns", "rows of 192 columns"),
    *("columns of 96 rows", "squares of 32", "balanced rows of 96 columns"),
)


def quality(given: argparse.Namespace) -> None:
    metric = METRIC.get(given.task, "accuracy")
    settings = {name: getattr(given, name) for name in SETTINGS}
    results = ResultsFile(RESULTS / f"block-quality-{given.task}-{given.name}.json", settings)
    for seed in given.seeds:
        pairs = [("one-shot", 0.0), *((variant, ratio) for variant in given.variants for ratio in given.ratios)]
        for variant, ratio in pairs:
            name = f"{variant}-{ratio:g}-{seed}" if ratio else f"dense-{seed}"
            if name in results.rows:
                continue
            arguments = BlockPruningArguments(
                model=given.model,
                teacher=given.teacher,
                output_dir=folder(given, variant, seed),
                ratio=ratio,
                metric=metric,
                seed=seed,
                **settings,
                **VARIANTS[variant],
            )
            data = DataArguments(dataset=given.data, dataset_config=given.task, **SPLITS.get(given.task, {}))
            job = BlockPruning(arguments, data)
            result = job.run()
            row = {
                "metric": metric,
                "given": result.rows[0].metrics[metric],
                "packed": result.rows[-1].metrics[metric],
                **exit_metrics(job, metric),
                "compression": result.compression,
                "matrix_bytes": result.matrix_bytes,
                "parameters": [result.rows[0].parameters, result.rows[-1].parameters],
            }
            results.add(name, row)


def folder(given: argparse.Namespace, variant: str, seed: int) -> str:
    """Of a run, one for all variants with the same penalty: its name is that of the first of them."""

    def penalty(name: str) -> dict[str, Any]:
        return {setting: value for setting, value in VARIANTS[name].items() if setting != "importance"}

    first = next(name for name in VARIANTS if penalty(name) == penalty(variant))
    return str(Path(given.runs) / f"block-{given.task}-{given.name}-{first}-{seed}")


def exit_metrics(job: BlockPruning, metric: str) -> dict[str, list[float]]:
    """Of a multi-exit model, the metric at every exit on validation, before and after."""
    if not isinstance(job.given, CostEffForSequenceClassification):
        return {}
    packed = AutoModelForSequenceClassification.from_pretrained(job.output_dir)
    function, found = METRICS[job.data.problem_type][metric], {}
    for name, model in (("given", job.given), ("packed", packed.to(job.device))):
        records = collect_exit_logits(model, job.data.validation, job.collator, show_progress=False)
        labels = records.known_labels()
        found[f"{name}_exits"] = [function(logits.numpy(), labels) for logits in records.logits.unbind(1)]
    return found


def size(given: argparse.Namespace) -> None:
    """Bytes of the pruned matrices in the file, indices included, against full bytes * (1 - ratio)."""
    model, results = load(given.model), ResultsFile(RESULTS / "block-size.json")
    for text, blocks in SHAPES.items():
        for ratio in given.ratios:
            masks = prune_blocks(model, blocks, ratio=ratio)
            packed = pack(model, masks)
            with TemporaryDirectory() as folder:
                packed.save_pretrained(folder)
                stored = stored_bytes(Path(folder), [name for name, _ in packed_linears(packed.costeff)])
                whole = (Path(folder) / "model.safetensors").stat().st_size
            full = sum(4 * rows * columns for rows, columns in masks.shapes.values())
            row = {
                "compression": masks.compression,
                "matrix_bytes": [full, stored],
                "share_of_nominal": full / stored * (1 - ratio),
                "file_mb": whole / 1e6,
            }
            results.add(f"{text}, {ratio:g}", row)


def stored_bytes(folder: Path, names: list[str]) -> int:
    """Bytes of the values and indices of packed layers in a saved model."""
    wanted = [f"costeff.{name}.{kind}" for name in names for kind in ("values", "index")]
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in wanted)


def speed(given: argparse.Namespace) -> None:
    """CPU time of the model with full matrices, panels, and chosen layouts; and of one layer in every layout."""
    torch.set_num_threads(1)
    settings = {"hardware": describe_hardware(torch.device("cpu")), "rounds": given.rounds}
    model, results = load(given.model), ResultsFile(RESULTS / "block-speed.json", settings)
    for text in given.shapes:
        for ratio in given.ratios:
            masks = prune_blocks(model, SHAPES[text], ratio=ratio)
            full, packed = zero_blocks(model, masks).eval(), pack(model, masks).eval()
            found: dict[str, Any] = {"compression": masks.compression}
            for batch_size in (32, 1):
                batch = torch.randint(1, model.config.vocab_size, (batch_size, 64))
                exact = full.predict(batch, early_exit=False).logits
                difference = float((packed.predict(batch, early_exit=False).logits - exact).abs().max())
                assert difference < 1e-4, difference
                chosen = copy.deepcopy(packed)
                choose_layouts(chosen, batch_size)
                candidates: dict[str, Callable[[], Any]] = {
                    "full": lambda batch=batch, full=full: full.predict(batch, early_exit=False),
                    "panels": lambda batch=batch, packed=packed: packed.predict(batch, early_exit=False),
                    "chosen": lambda batch=batch, chosen=chosen: chosen.predict(batch, early_exit=False),
                }
                seconds = alternate(candidates, given.rounds if batch_size > 1 else 10 * given.rounds)
                ratios = sorted(a / b for a, b in zip(seconds["full"], seconds["chosen"], strict=True))
                found[f"batch {batch_size}"] = {
                    **{f"{name}_cpu_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
                    "times_as_fast": statistics.median(ratios),
                    "lowest_and_highest": [ratios[0], ratios[-1]],
                    "chosen": Counter(layer.packing.layout for _, layer in packed_linears(chosen.costeff)),
                    "layer_1_cpu_ms": layouts(packed, batch_size, given.rounds),
                }
            results.add(f"{text}, {ratio:g}", found)


def layouts(packed: CostEffForSequenceClassification, batch_size: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of the first layer's two blocks together, in every layout that all four matrices can have."""
    layer = packed.costeff.layers[0]
    hidden = torch.randn(batch_size, 64, packed.config.hidden_size)
    attend = torch.nn.functional.scaled_dot_product_attention
    names = [name for name, _ in packed_linears(packed.costeff) if name.startswith("layers.0.")]
    modules = [packed.costeff.get_submodule(name) for name in names]
    common = [
        layout
        for layout in modules[0].packing.layouts(modules[0].out_features, modules[0].in_features)
        if all(layout in module.packing.layouts(module.out_features, module.in_features) for module in modules)
    ]

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        return attend(query, key, value).transpose(1, 2), None

    def run(layout: str) -> None:
        set_layouts(packed, dict.fromkeys(names, layout))
        with torch.inference_mode():
            layer(hidden, None, attention)

    seconds = alternate({layout: lambda layout=layout: run(layout) for layout in common}, rounds)
    set_layouts(packed, dict.fromkeys(names, PANELS))
    assert DENSE in seconds
    return {layout: 1e3 * statistics.median(values) for layout, values in seconds.items()}


def alternate(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, candidates in turn, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def load(name: str) -> CostEffForSequenceClassification:
    torch.manual_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    if not isinstance(model, CostEffForSequenceClassification):
        model = convert_from_stock(model, exit_layers=[model.config.num_hidden_layers])
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "size", "speed"])
    parser.add_argument("--model", required=True, help="A fine-tuned classifier or a slim multi-exit model.")
    parser.add_argument("--teacher", help="For quality: learn from its answers; default: from the true labels.")
    parser.add_argument("--task", help="For quality: a GLUE task.")
    parser.add_argument("--data", help="For quality: a folder with the GLUE tasks as nyu-mll/glue has them.")
    parser.add_argument("--name", default="dense", help="What --model is, for the name of the results.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--column_slabs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--penalty_epochs", type=float, default=4.0)
    parser.add_argument("--retrain_epochs", type=float, default=4.0)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--retrain_learning_rate", type=float, default=3e-4)
    parser.add_argument("--shapes", nargs="+", default=list(FAST_SHAPES), choices=SHAPES, help="For speed.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", default="runs")
    given = parser.parse_args()
    if given.what == "quality" and not (given.task and given.data):
        parser.error("quality needs --task and --data.")
    {"quality": quality, "size": size, "speed": speed}[given.what](given)


if __name__ == "__main__":
    main()
