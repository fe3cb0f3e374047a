"""Choose exit settings on held-out logits: temperatures, then thresholds, for a largest loss or a speed-up.

Exits do not change later computation, so the logits of all exits, computed once, answer for every threshold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from .configuration_costeff import CostEffConfig
from .efficiency import mean_flops
from .exit_criteria import (
    CRITERIA,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    ExitConfig,
    ThresholdCriterion,
    decision_log_probabilities,
    simulate_exits,
)
from .guarantees import last_safe, p_value, rows_needed, sample_needed, split_rows, upper_bound, zero_loss_rows
from .metrics import LOWER_IS_BETTER, METRICS, check_metric

NO_EXITS: list[int] | None = []
SHARES = torch.linspace(0.005, 1.0, 200, dtype=torch.float64)
GRID = tuple(step / 200 for step in range(201))
ERROR_LEVELS = (0.0, *np.geomspace(0.0005, 1.0, 100).tolist())
TEMPERATURES = (0.05, 20.0)  # where temperatures are looked for
FEWEST_ROWS = 20  # to fit temperatures on

GOALS = ("max_accuracy_drop", "max_metric_drop", "max_disagreement", "target_speedup")
GUARANTEED = ("max_accuracy_drop", "max_disagreement")


@dataclass(frozen=True)
class ExitLogits:
    """What a model said at every exit on a data set.

    Args:
        logits: Raw logits, shape (rows, exits, labels).
        seq_lengths: Real tokens of each row, shape (rows,).
        labels: True labels, shape (rows,) or (rows, labels); `None` if there are none.
        row_keys: A whole number made from each row's content, shape (rows,); needed for a guarantee only, which splits
            the rows by it. `None` if there are none.
    """

    logits: Tensor
    seq_lengths: Tensor
    labels: Tensor | None = None
    row_keys: Sequence[int] | None = None

    def known_labels(self) -> np.ndarray:
        """The labels as an array.

        Raises:
            ValueError: If there are none.
        """
        if self.labels is None:
            raise ValueError("The rows have no labels, so no metric can be computed. Add a label column.")
        return self.labels.numpy()

    def select(self, rows: np.ndarray) -> ExitLogits:
        """Some of the rows, by position, without their keys."""
        labels = None if self.labels is None else self.labels[rows]
        return ExitLogits(self.logits[rows], self.seq_lengths[rows], labels)


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


class ExitReplay:
    """Replays any number of exit settings on stored logits; each exit is measured once per criterion."""

    def __init__(self, records: ExitLogits, config: CostEffConfig) -> None:
        """Take the logits of all exits and the configuration of the model they come from."""
        self.records, self.config = records, config
        self.problem_type: str = config.resolved_problem_type
        self.exit_layers = torch.tensor(config.exit_layers)
        self._rows = torch.arange(len(records.logits))
        self._measured: dict[tuple[str, tuple[float, ...]], list[Tensor]] = {}

    def exits(self, settings: ExitConfig | None) -> Tensor:
        """0-based exit index of each row, as [`simulate_exits`] gives it; `None` is full depth; shape (rows,)."""
        last = len(self.exit_layers) - 1
        index = torch.full_like(self._rows, last)
        if settings is None:
            return index
        criterion = settings.build_criterion(last + 1, self.problem_type)
        if not isinstance(criterion, ThresholdCriterion):
            return simulate_exits(self.records.logits, settings, self.config.exit_layers, self.problem_type)
        key = (settings.criterion, tuple(criterion.temperatures))
        if key not in self._measured:
            self._measured[key] = [criterion.measured(self.records.logits[:, exit], exit) for exit in range(last)]
        for exit in reversed(range(last)):  # the first exit that a row passes is written last
            if settings.is_checked(self.config.exit_layers[exit]):
                index[criterion.passes(self._measured[key][exit], exit)] = exit
        return index

    def mean_flops(self, settings: ExitConfig | None) -> float:
        """FLOPs per row at the rows' own lengths; at full depth the last exit alone is executed."""
        checked = NO_EXITS if settings is None else settings.checked_exits
        layers = self.exit_layers[self.exits(settings)]
        return mean_flops(self.config, layers, self.records.seq_lengths, checked)

    def metric(self, settings: ExitConfig | None, metric: str) -> float:
        """The task metric of the answers under these settings."""
        logits = self.records.logits[self._rows, self.exits(settings)]
        return METRICS[self.problem_type][metric](logits.numpy(), self.records.known_labels())

    def outcome(self, settings: ExitConfig | None, metric: str) -> ExitOutcome:
        """Metric and cost together."""
        layer = float(self.exit_layers[self.exits(settings)].float().mean())
        flops = self.mean_flops(settings)
        return ExitOutcome(self.metric(settings, metric), layer, flops, self.mean_flops(None) / flops)

    def losses(self, goal: str) -> np.ndarray:
        """What answering at each exit would cost a row: True where a row loses, shape (rows, exits).

        Args:
            goal: `"max_accuracy_drop"`: full depth is right and the exit wrong. Otherwise: the exit's answer differs
                from full depth's. A multi-label answer is the whole set of labels.
        """
        answers = _answers(self.records.logits, self.problem_type)
        if goal != "max_accuracy_drop":
            return _differ(answers, answers[:, -1:])
        labels = self.records.known_labels()[:, None]
        wrong = _differ(answers, labels > 0.5 if self.problem_type == MULTI_LABEL else labels)
        return wrong & ~wrong[:, -1:]

    def lost(self, losses: np.ndarray, settings: ExitConfig) -> int:
        """Rows that lose under these settings, from [`losses`]."""
        return int(losses[self._rows.numpy(), self.exits(settings).numpy()].sum())


def _answers(logits: Tensor, problem_type: str) -> np.ndarray:
    values = logits.numpy()
    return values > 0 if problem_type == MULTI_LABEL else values.argmax(-1)


def _differ(answers: np.ndarray, others: np.ndarray) -> np.ndarray:
    different = answers != others
    return different.any(-1) if different.ndim == 3 else different


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
    return ExitReplay(records, config).outcome(settings, metric)


def fit_temperatures(records: ExitLogits, problem_type: str) -> list[float]:
    """The temperature of each exit that makes its probabilities most likely (Guo et al. 2017).

    Args:
        records: Logits of all exits. Without labels, each exit is fitted to the answers of full depth, and the last
            keeps 1.
        problem_type: As upstream's `config.problem_type`; regression has no probabilities and keeps 1 everywhere.

    Returns:
        One number per exit, within 0.05..20.

    Example: logits of 4 that are right three times in four deserve ln 3, so they are divided by 3.64.

        >>> logits = torch.tensor([[4.0, 0.0]] * 4).unsqueeze(1)
        >>> records = ExitLogits(logits, torch.ones(4), torch.tensor([0, 0, 0, 1]))
        >>> round(fit_temperatures(records, "single_label_classification")[0], 2)
        3.64
    """
    num_exits = records.logits.shape[1]
    if problem_type == REGRESSION:
        return [1.0] * num_exits
    targets = records.labels
    if targets is None:
        targets = torch.from_numpy(_answers(records.logits[:, -1], problem_type))
    targets = (targets > 0.5).long() if problem_type == MULTI_LABEL else targets.long().unsqueeze(-1)

    def loss(log_temperature: float, logits: Tensor) -> float:
        scores = decision_log_probabilities(logits / math.exp(log_temperature), problem_type)
        return -float(scores.gather(-1, targets.unsqueeze(-1)).double().mean())

    bounds = tuple(map(math.log, TEMPERATURES))
    fitted = []
    for logits in records.logits.unbind(1):
        best = minimize_scalar(loss, bounds=bounds, args=(logits,), method="bounded", options={"xatol": 1e-3})
        fitted.append(round(math.exp(best.x), 6))
    return fitted if records.labels is not None else [*fitted[:-1], 1.0]


def default_criterion(problem_type: str) -> str:
    """Name of the criterion that thresholds are chosen for unless the user names another."""
    return "patience" if problem_type == REGRESSION else "entropy"


def candidate_settings(
    records: ExitLogits,
    problem_type: str,
    *,
    criterion: str | None = None,
    temperatures: float | list[float] = 1.0,
    losses: np.ndarray | None = None,
) -> list[ExitConfig]:
    """Settings from the most careful (nobody leaves early) to the boldest (everybody leaves as early as it can).

    No row ever leaves later under a bolder one. Thresholds: an even grid and the quantiles of what was seen, or, with
    `losses`, one threshold per exit. Patience: ever fewer agreeing exits, for regression one, with growing tolerance.

    Args:
        records: Logits of all exits.
        problem_type: As upstream's `config.problem_type`.
        criterion: A key of `CRITERIA`; `None`: entropy, for regression patience.
        temperatures: As in [`ExitConfig`].
        losses: Of [`ExitReplay.losses`], shape (rows, exits). At each of a row of growing levels, an exit's threshold
            is the boldest at which the share of losers among the rows that leave there keeps to the level. `None`: one
            threshold for all exits.

    Raises:
        ValueError: Unknown criterion, or thresholds per exit for patience, which has none.
    """
    criterion = criterion or default_criterion(problem_type)
    if criterion == "patience":
        if losses is not None:
            raise ValueError("Patience has one limit for all exits, no threshold per exit. Leave `per_exit` out.")
        return _patience_path(records.logits, problem_type)
    settings = ExitConfig(criterion, threshold=0.0, temperatures=temperatures)
    num_exits = records.logits.shape[1]
    rule = settings.build_criterion(num_exits, problem_type)
    assert isinstance(rule, ThresholdCriterion)
    classes = 2 if problem_type == MULTI_LABEL else records.logits.shape[-1]
    top = rule.everybody_leaves if rule.everybody_leaves < math.inf else 1.01 * math.log(classes)
    low, high, sign = (0.0, top, 1) if rule.lower_is_surer else (-1.0, 0.0, -1)
    measured = [sign * rule.measured(records.logits[:, exit], exit).double() for exit in range(num_exits - 1)]
    if losses is not None:
        levels = _thresholds_per_exit(measured, losses, low, high)
        return [dataclasses.replace(settings, threshold=np.abs(level).tolist()) for level in levels]
    seen = torch.quantile(torch.cat(measured), SHARES).clamp(low, high).tolist() if measured else []
    steps = sorted({*(low + (high - low) * step for step in GRID), *seen})
    return [dataclasses.replace(settings, threshold=abs(step)) for step in steps]


def _patience_path(logits: Tensor, problem_type: str) -> list[ExitConfig]:
    if problem_type != REGRESSION:
        return [ExitConfig("patience", patience=count) for count in range(logits.shape[1], 0, -1)]
    changes = (logits[:, 1:] - logits[:, :-1]).abs().flatten().double()
    tolerances = {0.0}
    if changes.numel():  # the last is past the largest change, because a change must be below the tolerance
        quantiles = torch.quantile(changes, SHARES)
        tolerances |= {*quantiles.tolist(), 1.01 * float(changes.max())}
    return [ExitConfig("patience", patience=1, tolerance=tolerance) for tolerance in sorted(tolerances)]


def _thresholds_per_exit(measured: list[Tensor], losses: np.ndarray, low: float, high: float) -> np.ndarray:
    """Thresholds of all exits, lower measures leaving, for growing levels of loss; shape (levels, exits)."""
    path = np.full((len(ERROR_LEVELS) + 1, losses.shape[1]), low)
    for number, level in enumerate(ERROR_LEVELS, start=1):
        remaining = np.arange(len(losses))
        for exit, values in enumerate(tensor.numpy() for tensor in measured):
            if not len(remaining):
                break
            order = remaining[np.argsort(values[remaining], kind="stable")]
            share = losses[order, exit].cumsum() / np.arange(1, len(order) + 1)
            cut = np.append(values[order[1:]] > values[order[:-1]], True)  # equal rows leave together
            allowed = np.flatnonzero((share <= level) & cut)
            if len(allowed):
                end = allowed[-1] + 1
                path[number, exit] = high if end == len(order) else min(values[order[end]], high)
                remaining = order[end:]
    return np.maximum.accumulate(path)


def exit_curve(records: ExitLogits, config: CostEffConfig, metric: str) -> list[ExitOutcome]:
    """The whole speed-accuracy curve, careful to bold, without repeated points.

    Args:
        records: Logits of all exits, with labels.
        config: The model's.
        metric: See [`exit_outcome`].
    """
    replay = ExitReplay(records, config)
    outcomes = (replay.outcome(settings, metric) for settings in candidate_settings(records, replay.problem_type))
    return list(dict.fromkeys(outcomes))


@dataclass(frozen=True)
class ExitSearch:
    """Which settings are tried.

    Args:
        criterion: A key of `CRITERIA`; `None`: entropy, for regression patience.
        per_exit: One threshold per exit, not one for all.
        fit_temperatures: Fit a temperature per exit before the thresholds; otherwise they stay 1.
    """

    criterion: str | None = None
    per_exit: bool = False
    fit_temperatures: bool = True

    def __post_init__(self) -> None:
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise ValueError(f"`criterion` is {self.criterion!r}. It must be one of {', '.join(CRITERIA)}.")

    def path(self, replay: ExitReplay, goal: str) -> list[ExitConfig]:
        """The settings to try on these rows, careful to bold."""
        criterion = self.criterion or default_criterion(replay.problem_type)
        temperatures: float | list[float] = 1.0
        if self.fit_temperatures and criterion != "patience":
            if len(replay.records.logits) < FEWEST_ROWS:
                raise ValueError(
                    f"There are {len(replay.records.logits)} rows to fit temperatures on, and it takes {FEWEST_ROWS}. "
                    "Give more rows, or leave the temperatures at 1 with `fit_temperatures=False`."
                )
            temperatures = fit_temperatures(replay.records, replay.problem_type)
        losses = replay.losses(goal) if self.per_exit else None
        return candidate_settings(
            replay.records, replay.problem_type, criterion=criterion, temperatures=temperatures, losses=losses
        )


def choose_exit_config(
    records: ExitLogits,
    config: CostEffConfig,
    metric: str,
    *,
    max_accuracy_drop: float | None = None,
    max_metric_drop: float | None = None,
    max_disagreement: float | None = None,
    target_speedup: float | None = None,
    reference_flops: float | None = None,
    search: ExitSearch | None = None,
    guarantee: bool = False,
    delta: float = 0.1,
) -> ExitConfig:
    """Exit settings from exactly one goal.

    With a largest loss: the boldest setting such that it and every more careful one keep to it on these rows. With
    `guarantee`, the boldest one proved to keep to it on new rows of the same distribution: a third of the rows fits
    temperatures and lays the path of settings, the others test it. With `target_speedup`: the most careful setting that
    reaches it.

    Args:
        records: Logits of all exits on held-out rows; with labels, but for `max_disagreement`.
        config: The model's.
        metric: What is reported, and what `max_metric_drop` limits, see `hf_costeff.metrics.METRICS`.
        max_accuracy_drop: Points (hundredths) that accuracy may lose against full depth, 0 or more.
        max_metric_drop: Points (hundredths) that the metric may lose against full depth, 0 or more.
        max_disagreement: Share of the rows, in points, whose answer may differ from full depth's. Needs no labels.
        target_speedup: FLOPs of the reference over FLOPs with early exit, above 0.
        reference_flops: FLOPs per row of what the speed-up is measured against; `None`: this model at full depth.
        search: Which settings are tried; `None`: `ExitSearch()`.
        guarantee: Whether the loss must keep to the goal on new rows too, with probability 1 - `delta` over the
            sample. Needs `row_keys`. The loss of `max_accuracy_drop` is then the share of rows that full depth has
            right and early exit wrong, which is never less than the drop in accuracy.
        delta: Largest chance of a broken promise, above 0 and below 1.

    Returns:
        Settings whose `calibration` says what was asked, on how many rows, what was seen there and, under `"promise"`,
        what is promised. If nothing can be, nobody leaves early and `"no_promise"` says why.

    Raises:
        ValueError: Not exactly one goal, a goal out of range or out of reach, or rows that cannot serve it.
    """
    search = search or ExitSearch()
    goals = (max_accuracy_drop, max_metric_drop, max_disagreement, target_speedup)
    goal, limit = one_goal(dict(zip(GOALS, goals, strict=True)))
    replay = ExitReplay(records, config)
    _check_goal(goal, limit, metric, replay.problem_type)
    _check_records(records, config, goal, search)
    extra: dict[str, Any] = {}
    if guarantee:
        _check_guarantee(goal, limit, delta)
        chosen, extra = _guaranteed(replay, search, goal, limit / 100, delta)
    elif goal == "target_speedup":
        reference = reference_flops or replay.mean_flops(None)
        chosen = _reaching(search.path(replay, goal), lambda settings: reference / replay.mean_flops(settings), limit)
    else:
        chosen = _within(search.path(replay, goal), _loss_of(replay, goal, metric), limit)
    return dataclasses.replace(chosen, calibration={"goal": {goal: limit}, **_seen(replay, chosen, metric), **extra})


def worse_by(before: float, after: float, metric: str) -> float:
    """How much of a metric was lost, positive if it is worse than before, also where less is better.

    >>> worse_by(0.5, 0.75, "mse"), worse_by(0.5, 0.75, "accuracy")
    (0.25, -0.25)
    """
    return after - before if metric in LOWER_IS_BETTER else before - after


def _loss_of(replay: ExitReplay, goal: str, metric: str) -> Callable[[ExitConfig], float]:
    """The loss of settings in points."""
    if goal == "max_disagreement":
        losses = replay.losses(goal)
        return lambda settings: 100 * replay.lost(losses, settings) / len(losses)
    full = replay.metric(None, metric)
    return lambda settings: 100 * worse_by(full, replay.metric(settings, metric), metric)


def _within(path: list[ExitConfig], loss: Callable[[ExitConfig], float], limit: float) -> ExitConfig:
    chosen = path[0]
    for settings in path:
        if loss(settings) > limit + 1e-9:
            break
        chosen = settings
    return chosen


def _reaching(path: list[ExitConfig], speedup: Callable[[ExitConfig], float], target: float) -> ExitConfig:
    for settings in path:
        if speedup(settings) >= target:
            return settings
    raise ValueError(
        f"A speed-up of {target:g} cannot be reached: with every row leaving as early as it can it is "
        f"{speedup(path[-1]):.2f}. Ask for less, or compress further."
    )


def _guaranteed(
    replay: ExitReplay, search: ExitSearch, goal: str, epsilon: float, delta: float
) -> tuple[ExitConfig, dict[str, Any]]:
    """Settings, and the promise or why there is none."""
    keys = replay.records.row_keys
    if keys is None or len(keys) != len(replay.records.logits):
        found = "None" if keys is None else f"of {len(keys)} rows"
        raise ValueError(f"`row_keys` is {found}. A guarantee splits {len(replay.records.logits)} rows by them.")
    fitting, testing = (ExitReplay(replay.records.select(rows), replay.config) for rows in split_rows(keys))
    tests, needed = len(testing.records.logits), zero_loss_rows(epsilon, delta)
    wanted = f"at most {100 * epsilon:g} points with probability {1 - delta:g}"
    if tests < needed:
        careful = candidate_settings(replay.records, replay.problem_type, criterion=search.criterion)[0]
        return careful, {
            "no_promise": f"To promise {wanted} takes {sample_needed(needed):,} rows at least, {needed:,} of them to "
            f"test on, and there are {len(keys):,}."
        }
    start, *path = _thinned(search.path(fitting, goal), fitting)
    losses = testing.losses(goal)
    safe = last_safe((testing.lost(losses, settings) for settings in path), tests, epsilon, delta)
    if safe is None:
        flips = testing.lost(losses, path[0]) if path else None
        return start, {"no_promise": f"Cannot promise {wanted}: {_why_not(flips, tests, epsilon, delta)}"}
    position, lost = safe
    promise = {"loss": goal, "epsilon": epsilon, "delta": delta, "rows": tests, "flips": lost}
    return path[position], {"promise": {**promise, "upper_bound": upper_bound(lost, tests, delta)}}


def _thinned(path: list[ExitConfig], replay: ExitReplay) -> list[ExitConfig]:
    """The path without settings that treat these rows as the one before does."""
    steps = pairwise(replay.exits(settings) for settings in path)
    return [path[0], *(new for new, (before, after) in zip(path[1:], steps, strict=True) if not before.equal(after))]


def _why_not(flips: int | None, rows: int, epsilon: float, delta: float) -> str:
    """Why the first step of a path was not proved; `flips` is `None` if there is no step."""
    if flips is None:
        return "no setting lets a row leave early."
    enough = rows_needed(epsilon, delta, flips / rows)
    remedy = "more rows would not help" if enough is None else f"about {sample_needed(enough):,} rows would do"
    return (
        f"the most careful setting loses {flips} of {rows:,} rows (p = {p_value(flips, rows, epsilon):.2f}). At that "
        f"rate {remedy}."
    )


def _seen(replay: ExitReplay, settings: ExitConfig, metric: str) -> dict[str, Any]:
    """What the settings did on all rows; without labels there is no metric, for regression no disagreement."""
    record: dict[str, Any] = {"rows": len(replay.records.logits)}
    if replay.records.labels is not None:
        values = (replay.metric(None, metric), replay.metric(settings, metric))
        record |= {"metric": metric, "full_depth": values[0], "early_exit": values[1]}
    if replay.problem_type != REGRESSION:
        record["disagreement"] = replay.lost(replay.losses("max_disagreement"), settings) / record["rows"]
    layers = replay.exit_layers[replay.exits(settings)].float()
    speedup = replay.mean_flops(None) / replay.mean_flops(settings)
    return {**record, "mean_exit_layer": float(layers.mean()), "speedup_over_full_depth": speedup}


def describe_seen(seen: Mapping[str, Any]) -> str:
    """A sentence on what exit settings did on the rows they were chosen on.

    Args:
        seen: The `calibration` record of an [`ExitConfig`].

    Example:
        >>> describe_seen({"rows": 50, "disagreement": 0.02, "mean_exit_layer": 2.5, "speedup_over_full_depth": 2.0})
        'On 50 held-out rows: 2.00% answer otherwise than at full depth, mean exit layer 2.50, 2.00x fewer FLOPs.'
    """
    quality = f"{100 * seen.get('disagreement', 0):.2f}% answer otherwise than at full depth"
    if "metric" in seen:
        quality = f"{seen['metric']} {seen['full_depth']:.4f} at full depth, {seen['early_exit']:.4f} with early exit"
    return (
        f"On {seen['rows']:,} held-out rows: {quality}, mean exit layer {seen['mean_exit_layer']:.2f}, "
        f"{seen['speedup_over_full_depth']:.2f}x fewer FLOPs."
    )


def one_goal(goals: Mapping[str, float | None]) -> tuple[str, float]:
    """Name and value of the only goal that is given.

    Raises:
        ValueError: None or several are given, or the value is out of range.
    """
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        named = ", ".join(f"`{name}` = {value:g}" for name, value in given.items()) or "none"
        raise ValueError(f"Goals given: {named}. Give exactly one of {', '.join(f'`{name}`' for name in goals)}.")
    [(name, value)] = given.items()
    if name == "target_speedup":
        if not 0 < value < math.inf:
            raise ValueError(f"`target_speedup` is {value}. It must be above 0.")
    elif not value >= 0:
        raise ValueError(f"`{name}` is {value}. It must be 0 or more, in points (hundredths).")
    return name, value


def _check_goal(goal: str, limit: float, metric: str, problem_type: str) -> None:
    if problem_type == REGRESSION and goal in GUARANTEED:
        raise ValueError(
            f"`{goal}` is {limit:g}, and this is a regression model, whose answers are numbers that are neither right "
            "nor the same. Use `max_metric_drop` with a metric such as spearman, or `target_speedup`."
        )
    check_metric(metric, problem_type)
    if goal == "max_accuracy_drop" and metric != "accuracy":
        raise ValueError(
            f"`max_accuracy_drop` is {limit:g}, and the metric is {metric!r}. Use `max_metric_drop` for this "
            "metric, or leave the metric out."
        )


def _check_guarantee(goal: str, limit: float, delta: float) -> None:
    if goal not in GUARANTEED:
        raise ValueError(
            f"A guarantee is asked for `{goal}`, and there is none: the loss of each row must be 0 or 1. Use "
            "`max_disagreement`, the share of rows that answer otherwise than full depth, or `max_accuracy_drop`."
        )
    if not 0 < limit < 100:
        raise ValueError(
            f"`{goal}` is {limit:g} points. A guarantee needs a number above 0 and below 100: no sample can prove that "
            "nothing is lost."
        )
    if not 0 < delta < 1:
        raise ValueError(f"`delta` is {delta:g}. It must lie above 0 and below 1: the chance of a broken promise.")


def _check_records(records: ExitLogits, config: CostEffConfig, goal: str, search: ExitSearch) -> None:
    if not len(records.logits) or (records.labels is None and goal != "max_disagreement"):
        raise ValueError(
            f"`{goal}` needs held-out rows with labels, and there are none. Give labelled rows; only "
            "`max_disagreement` does without labels."
        )
    odd = (~torch.isfinite(records.logits)).nonzero()
    if len(odd):
        row, exit, label = odd[0].tolist()
        raise ValueError(
            f"The logits of row {row} hold {float(records.logits[row, exit, label])} at exit layer "
            f"{config.exit_layers[exit]}. They must be finite. Look at this row, and at the model's precision."
        )
    needs_classes = goal == "max_accuracy_drop" or search.fit_temperatures
    if records.labels is None or config.resolved_problem_type != SINGLE_LABEL or not needs_classes:
        return
    if len(classes := records.labels.unique().tolist()) == 1:
        raise ValueError(
            f"All {len(records.labels)} rows have class {classes[0]}, so they cannot show how sure the model may be of "
            "another. Give rows of every class, as they come in use."
        )
