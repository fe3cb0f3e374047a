"""Choose an exit threshold on held-out logits, for a largest loss or a speed-up.

Exits do not change later computation, so the logits of all exits, computed once, answer for every threshold.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .configuration_costeff import CostEffConfig
from .efficiency import mean_flops
from .exit_criteria import (
    REGRESSION,
    ExitConfig,
    decision_log_probabilities,
    normalized_entropy,
    simulate_exits,
)
from .metrics import LOWER_IS_BETTER, METRICS, check_metric

NO_EXITS: list[int] | None = []
SHARES = torch.linspace(0.005, 1.0, 200, dtype=torch.float64)
THRESHOLDS = tuple(step / 200 for step in range(201))


@dataclass(frozen=True)
class ExitLogits:
    """What a model said at every exit on a data set.

    Args:
        logits: Raw logits, shape (rows, exits, labels).
        seq_lengths: Real tokens of each row, shape (rows,).
        labels: True labels, shape (rows,) or (rows, labels); `None` if there are none.
    """

    logits: Tensor
    seq_lengths: Tensor
    labels: Tensor | None = None

    def known_labels(self) -> np.ndarray:
        """The labels as an array.

        Raises:
            ValueError: If there are none.
        """
        if self.labels is None:
            raise ValueError("The rows have no labels, so no metric can be computed. Add a label column.")
        return self.labels.numpy()


@dataclass(frozen=True)
class ExitOutcome:
    """What exit settings do on a data set.

    Args:
        metric: The task metric with early exit.
        mean_exit_layer: Mean 1-based layer at which rows left.
        flops_per_row: Mean FLOPs of a row at its own length, executed exits counted.
        speedup: Mean FLOPs at full depth over `flops_per_row`.
    """

    metric: float
    mean_exit_layer: float
    flops_per_row: float
    speedup: float


def exit_outcome(records: ExitLogits, settings: ExitConfig | None, config: CostEffConfig, metric: str) -> ExitOutcome:
    """Replay exit settings on stored logits.

    Args:
        records: Logits of all exits, with labels.
        settings: Criterion and threshold; `None` for full depth, with the last exit alone executed.
        config: The model's.
        metric: A metric of the problem type, see `hf_costeff.metrics.METRICS`.

    Returns:
        Metric and cost.
    """
    rows = torch.arange(len(records.logits))
    problem_type = config.resolved_problem_type
    layers = torch.tensor(config.exit_layers)
    if settings is None:
        index, checked = torch.full_like(rows, len(layers) - 1), NO_EXITS
    else:
        index, checked = (
            simulate_exits(records.logits, settings, config.exit_layers, problem_type),
            settings.checked_exits,
        )
    flops = mean_flops(config, layers[index], records.seq_lengths, checked)
    full = mean_flops(config, torch.full_like(rows, config.num_hidden_layers), records.seq_lengths, NO_EXITS)
    value = METRICS[problem_type][metric](records.logits[rows, index].numpy(), records.known_labels())
    return ExitOutcome(value, float(layers[index].float().mean()), flops, full / flops)


def candidate_settings(records: ExitLogits, problem_type: str) -> list[ExitConfig]:
    """Settings from the most careful (nobody leaves early) to the boldest (everybody leaves at once).

    Classification: thresholds on the normalised entropy, an even grid and the quantiles of what was seen. Regression:
    patience 1 with growing tolerance, quantiles of the changes between neighbouring exits.
    """
    if problem_type != REGRESSION:
        measured = (
            normalized_entropy(decision_log_probabilities(records.logits[:, :-1], problem_type)).flatten().double()
        )
        seen = torch.quantile(measured, SHARES).clamp(0.0, 1.0).tolist() if measured.numel() else []
        return [ExitConfig(threshold=threshold) for threshold in sorted({*THRESHOLDS, *seen})]
    changes = (records.logits[:, 1:] - records.logits[:, :-1]).abs().flatten().double()
    tolerances = {0.0}
    if changes.numel():  # the last is past the largest change, because a change must be below the tolerance
        quantiles = torch.quantile(changes, SHARES)
        tolerances |= {*quantiles.tolist(), 1.01 * float(changes.max())}
    return [ExitConfig("patience", patience=1, tolerance=tolerance) for tolerance in sorted(tolerances)]


def exit_curve(records: ExitLogits, config: CostEffConfig, metric: str) -> list[ExitOutcome]:
    """The whole speed-accuracy curve, careful to bold, without repeated points.

    Args:
        records: Logits of all exits, with labels.
        config: The model's.
        metric: See [`exit_outcome`].
    """
    outcomes = (
        exit_outcome(records, settings, config, metric)
        for settings in candidate_settings(records, config.resolved_problem_type)
    )
    return list(dict.fromkeys(outcomes))


def choose_exit_config(
    records: ExitLogits,
    config: CostEffConfig,
    metric: str,
    *,
    max_metric_drop: float | None = None,
    target_speedup: float | None = None,
    reference_flops: float | None = None,
) -> ExitConfig:
    """One threshold for all exits, from exactly one goal.

    With `max_metric_drop`: the boldest setting such that it and every more careful one keep the metric within the drop
    from full depth. With `target_speedup`: the most careful setting that reaches it.

    Args:
        records: Logits of all exits on held-out rows, with labels.
        config: The model's.
        metric: What may drop, see `hf_costeff.metrics.METRICS`.
        max_metric_drop: Points (hundredths) that the metric may lose against full depth, 0 or more.
        target_speedup: FLOPs of the reference over FLOPs with early exit, above 0.
        reference_flops: FLOPs per row of what the speed-up is measured against; `None`: this model at full depth.

    Returns:
        Settings whose `calibration` says what was asked, on how many rows, and what was seen there.

    Raises:
        ValueError: Not exactly one goal, no labels, no rows, a goal out of range or out of reach.
    """
    _check_goal(records, max_metric_drop, target_speedup)
    problem_type = config.resolved_problem_type
    check_metric(metric, problem_type)
    full = exit_outcome(records, None, config, metric)
    candidates = candidate_settings(records, problem_type)
    chosen, seen = candidates[0], full
    for settings in candidates:
        outcome = exit_outcome(records, settings, config, metric)
        if max_metric_drop is not None:
            if 100 * worse_by(full.metric, outcome.metric, metric) > max_metric_drop + 1e-9:
                break
            chosen, seen = settings, outcome
        else:
            chosen, seen = settings, outcome
            if (reference_flops or full.flops_per_row) / outcome.flops_per_row >= (target_speedup or 0):
                break
    else:
        if target_speedup is not None:
            largest = (reference_flops or full.flops_per_row) / seen.flops_per_row
            raise ValueError(
                f"A speed-up of {target_speedup:g} cannot be reached: with every row leaving as early as it can it is "
                f"{largest:.2f}. Ask for less, or compress further."
            )
    goal = {"max_metric_drop": max_metric_drop, "target_speedup": target_speedup}
    record = {
        "goal": {name: value for name, value in goal.items() if value is not None},
        "metric": metric,
        "rows": len(records.logits),
        "full_depth": full.metric,
        "early_exit": seen.metric,
        "mean_exit_layer": seen.mean_exit_layer,
        "speedup_over_full_depth": seen.speedup,
    }
    return dataclasses.replace(chosen, calibration=record)


def worse_by(before: float, after: float, metric: str) -> float:
    """How much of a metric was lost, positive if it is worse than before, also where less is better.

    >>> worse_by(0.5, 0.75, "mse"), worse_by(0.5, 0.75, "accuracy")
    (0.25, -0.25)
    """
    return after - before if metric in LOWER_IS_BETTER else before - after


def _check_goal(records: ExitLogits, max_metric_drop: float | None, target_speedup: float | None) -> None:
    if (max_metric_drop is None) == (target_speedup is None):
        raise ValueError(
            f"`max_metric_drop` is {max_metric_drop} and `target_speedup` is {target_speedup}. Give exactly one."
        )
    if max_metric_drop is not None and not max_metric_drop >= 0:
        raise ValueError(f"`max_metric_drop` is {max_metric_drop}. It must be 0 or more, in points.")
    if target_speedup is not None and not target_speedup > 0:
        raise ValueError(f"`target_speedup` is {target_speedup}. It must be above 0.")
    if records.labels is None or not len(records.logits):
        raise ValueError("Choosing a threshold needs held-out rows with labels, and there are none.")
