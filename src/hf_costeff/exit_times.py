"""What exits take and save on this machine's clock, so that exit settings can be chosen by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from .benchmarking import INT8, BenchmarkGrid, on_device, threads_set
from .configuration_costeff import require_no_gates
from .efficiency import measure_alternating
from .evaluation import Collator, collect_exit_logits, model_inputs
from .exit_criteria import REGRESSION, ExitConfig
from .exit_replay import ExitReplay, ExitTimes, stored_settings
from .modeling_costeff import MODEL_INPUTS, CostEffForSequenceClassification
from .report import describe_device

NEVER = math.ulp(0.0)
"""The least number above 0, as a threshold in nats or a tolerance: every exit is asked, and only an entropy or a change
of exactly 0 could pass, which in single precision takes logits more than 100 apart."""


def measure_exit_times(
    model: CostEffForSequenceClassification,
    dataset: Dataset,
    collator: Collator,
    *,
    batch_size: int = 1,
    threads: int = 1,
    rows: int = 32,
    rounds: int = 5,
) -> ExitTimes:
    """How long leaving at each exit takes here, and asking one exit more on the way.

    All texts leave at the first exit, all at the second, and so on, in turn, so that a noisy machine favours none. What
    a mix of exits takes then follows from where rows leave. At batch size 1 nothing is left out; in larger batches rows
    share what a layer costs whatever its size, so a mix takes a little longer than its parts.

    Args:
        model: As it will serve: its device, its precision.
        dataset: Tokenized rows such as it will serve.
        collator: Pads a list of rows to a batch.
        batch_size: Texts that run together.
        threads: CPU threads.
        rows: How many rows are timed, evenly spread over the data set; at least one batch.
        rounds: Timed rounds; medians are taken.

    Raises:
        ValueError: A batch size, thread count, number of rows or rounds below 1, no rows, or a model with skip gates,
            whose rows take each a time of their own to an exit.
    """
    for name, value in (("batch_size", batch_size), ("threads", threads), ("rows", rows), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}. It must be at least 1.")
    require_no_gates(model.config, "Timing the exits")
    if not len(dataset):
        raise ValueError("There are no rows to time. Give some such as the model will serve.")
    picked = np.unique(np.linspace(0, len(dataset) - 1, max(rows, batch_size)).round().astype(int)).tolist()
    inputs = [name for name in MODEL_INPUTS if name in dataset.column_names]
    examples = [{name: row[name] for name in inputs} for row in dataset.select(picked)]
    starts = range(0, len(examples), batch_size)
    batches = [model_inputs(model, collator(examples[start : start + batch_size])) for start in starts]
    regression = model.config.resolved_problem_type == REGRESSION
    layers = model.config.exit_layers[:-1]
    settings = [*(_everybody_at(layer, regression) for layer in layers), None, _nobody_leaves(regression)]
    names = [*map(str, layers), "full depth", "every exit asked"]
    runs: dict[str, Callable[[], Any]] = {
        name: partial(_answer, model, batches, own) for name, own in zip(names, settings, strict=True)
    }
    with threads_set(threads):
        times = measure_alternating(runs, warmup=1, repeats=rounds)
    *leaving, asked = (latency.median_ms / len(examples) for latency in times.values())
    return ExitTimes(
        leaving_ms=np.maximum.accumulate(leaving).tolist(),  # a deeper exit that looks faster is noise
        question_ms=max(0.0, asked - leaving[-1]) / max(1, len(layers)),
        batch_size=batch_size,
        threads=threads,
        precision=str(model.dtype).removeprefix("torch."),
        hardware=describe_device(model.device),
    )


def _everybody_at(layer: int, regression: bool) -> ExitConfig:
    if regression:
        return ExitConfig("patience", patience=0, checked_exits=[layer])
    return ExitConfig(threshold=1.0, checked_exits=[layer])


def _nobody_leaves(regression: bool) -> ExitConfig:
    if regression:
        return ExitConfig("patience", patience=1, tolerance=NEVER)
    return ExitConfig("entropy_nats", threshold=NEVER)


def _answer(
    model: CostEffForSequenceClassification, batches: Sequence[Mapping[str, Any]], settings: ExitConfig | None
) -> None:
    for batch in batches:
        model.predict(**batch, early_exit=False if settings is None else settings)


def choose_exits(
    model: CostEffForSequenceClassification, dataset: Dataset, collator: Collator, grid: BenchmarkGrid | None = None
) -> ExitConfig:
    """Store in the model which of its checked exits save more time than they cost, on this machine.

    Times are measured as [`measure_exit_times`] does; where rows leave follows from their logits. Then the exits whose
    removal saves the most are left out one by one, until none does. Thresholds stay as they are, and what was seen or
    promised when they were chosen is dropped, since it held for other exits.

    Args:
        model: With saved exit settings, which are replaced.
        dataset: Tokenized rows, on which nothing will be reported.
        collator: Pads rows to a batch.
        grid: Its first device, precision, batch size and thread count are those that the model will serve with.

    Returns:
        The settings, as stored.

    Raises:
        ValueError: Without saved settings, for a device that cannot be used, or for int8.
    """
    grid = grid or BenchmarkGrid()
    if grid.precisions[0] == INT8:
        raise ValueError(
            f"Exits are chosen by times in torch, and `precisions` begins with {INT8}. Name another first."
        )
    settings = stored_settings(model.config)
    size, threads = grid.batch_sizes[0], grid.threads[0]
    placed = on_device(model, grid.devices[0], grid.precisions[0])
    times = measure_exit_times(
        *(placed, dataset, collator),
        batch_size=size,
        threads=threads,
        rows=max(grid.rows // 4, size),
        rounds=grid.rounds,
    )
    with threads_set(threads):
        records = collect_exit_logits(placed, dataset, collator, show_progress=False)
    replay, layers = ExitReplay(records, model.config), model.config.exit_layers
    chosen = [layer for layer in layers[:-1] if settings.is_checked(layer)]

    def cost(checked: Sequence[int]) -> float:
        exits = replay.at(dataclasses.replace(settings, checked_exits=list(checked)))
        return exits.mean_cost(partial(times.costs, layers))

    while chosen:
        best = min(([layer for layer in chosen if layer != left_out] for left_out in chosen), key=cost)
        if cost(best) >= cost(chosen):
            break
        chosen = best
    stored = dataclasses.replace(settings, checked_exits=chosen, calibration=None)
    model.config.exit_config = stored.to_dict()
    return stored
