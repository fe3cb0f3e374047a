"""Choose exit settings on held-out logits: temperatures, exits to check and thresholds, for one goal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise, repeat
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from transformers.utils import logging

from .calibration_goals import BUDGETS, GOALS, UnreachableGoalError, check_goal, default_criterion
from .configuration_cascade import CostEffCascadeConfig
from .exit_criteria import (
    CRITERIA,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    ExitConfig,
    ThresholdCriterion,
    answers,
    decision_log_probabilities,
)
from .exit_replay import (
    Costs,
    ExitingConfig,
    ExitLogits,
    ExitOutcome,
    ExitReplay,
    ExitTimes,
    ReplayedExits,
    ReplayedPath,
    ThresholdPath,
)
from .guarantees import (
    FULL_DEPTH,
    GATED_FULL_DEPTH,
    last_safe,
    p_value,
    rows_needed,
    sample_needed,
    split_rows,
    zero_loss_rows,
)
from .metrics import LOWER_IS_BETTER, METRICS, paired_bootstrap, worse_by

logger = logging.get_logger(__name__)

SHARES = np.linspace(0.005, 1.0, 200)
GRID = tuple(step / 200 for step in range(201))
ERROR_LEVELS = (0.0, *np.geomspace(0.0005, 1.0, 100).tolist())
TEMPERATURES = (0.05, 20.0)  # where temperatures are looked for
FEWEST_ROWS = 20  # to fit temperatures on
RESAMPLES = 200  # to tell two settings apart
MOST_LEFT_OUT = 4  # members before the last of which each may be left out; of more, only the first ones


def fit_temperatures(records: ExitLogits, problem_type: str, asked: np.ndarray | None = None) -> list[float]:
    """The temperature of each exit that makes its probabilities most likely (Guo et al. 2017).

    Args:
        records: Logits of all exits. Without labels, each exit is fitted to the answers of full depth, and the last
            keeps 1.
        problem_type: As upstream's `config.problem_type`; regression has no probabilities and keeps 1 everywhere.
        asked: Which rows an exit is asked about, shape (rows, exits): it is fitted to them, and keeps 1, of which there
            is a warning, where they are fewer than `FEWEST_ROWS`. `None`: all.

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
        targets = answers(records.logits[:, -1], problem_type)
    targets = (targets > 0.5).long() if problem_type == MULTI_LABEL else targets.long().unsqueeze(-1)

    def loss(log_temperature: float, logits: Tensor, right: Tensor) -> float:
        scores = decision_log_probabilities(logits / math.exp(log_temperature), problem_type)
        return -float(scores.gather(-1, right.unsqueeze(-1)).double().mean())

    bounds = tuple(map(math.log, TEMPERATURES))
    fitted = []
    asked = np.ones(records.logits.shape[:2], dtype=bool) if asked is None else asked
    few = asked.sum(0) < min(FEWEST_ROWS, len(asked))
    if few.any():
        logger.warning(
            f"Exits {', '.join(map(str, np.flatnonzero(few) + 1))} of {num_exits}, counted from 1, are asked about "
            f"fewer than {FEWEST_ROWS} rows, the others skip their layers. Their temperatures stay 1. Give more rows."
        )
    exact = records.logits.double()  # so exactly that the order of classes and rows leaves no trace
    for logits, own, too_few in zip(exact.unbind(1), asked.T, few, strict=True):
        if too_few:
            fitted.append(1.0)
            continue
        given = (logits[own], targets[own])
        best = minimize_scalar(loss, bounds=bounds, args=given, method="bounded", options={"xatol": 1e-6})
        fitted.append(round(math.exp(best.x), 4))
    return fitted if records.labels is not None else [*fitted[:-1], 1.0]


def candidate_settings(
    records: ExitLogits,
    config: ExitingConfig,
    criterion: str,
    *,
    temperatures: float | list[float] = 1.0,
    losses: np.ndarray | None = None,
    checked_exits: list[int] | None = None,
    deepest_exit: int | None = None,
) -> Sequence[ExitConfig]:
    """Settings from the most careful (nobody leaves early) to the boldest (all leave at the first exit they can).

    That is the first checked exit whose layer a row runs. No row ever leaves later under a bolder one. Thresholds: an
    even grid and the quantiles of what was seen, or, with `losses`, one threshold per exit. Patience: ever fewer
    agreeing exits, down to none; for regression one, with growing tolerance, then none.

    Args:
        records: Logits of all exits.
        config: The model's.
        criterion: A key of `CRITERIA`.
        temperatures: As in [`ExitConfig`].
        losses: Of [`ExitReplay.losses`], shape (rows, exits). At each of a row of growing levels, an exit's threshold
            is the boldest at which the share of losers among the rows that leave there keeps to the level. `None`: one
            threshold for all exits.
        checked_exits: As in [`ExitConfig`].
        deepest_exit: One of the checked layers: from there on everybody leaves at the first checked exit whose layer it
            runs, under the most careful settings too. `None`: the model's last.

    Raises:
        ValueError: Unknown criterion, or thresholds per exit for patience, which has none.
    """
    settings = ExitConfig(criterion, threshold=0.0, temperatures=temperatures, checked_exits=checked_exits)
    last = config.exit_layers.index(deepest_exit or config.exit_layers[-1])
    checked = [exit for exit in range(last) if settings.is_checked(config.exit_layers[exit])]
    if criterion == "patience":
        if losses is not None:
            raise ValueError("Patience has one limit for all exits, no threshold per exit. Leave `per_exit` out.")
        path = _patience_path(records.logits[:, [*checked, last]], config.resolved_problem_type)
        behind = [0] * (len(config.exit_layers) - last)
        return [
            ExitConfig(
                criterion,
                patience=count if deepest_exit is None else [count] * last + behind,
                tolerance=tolerance,
                checked_exits=checked_exits,
            )
            for count, tolerance in path
        ]
    steps = _threshold_path(records, settings, config, losses, checked, last)
    return ThresholdPath(settings, steps)


def _threshold_path(
    records: ExitLogits,
    settings: ExitConfig,
    config: ExitingConfig,
    losses: np.ndarray | None,
    checked: list[int],
    last: int,
) -> list[float] | list[list[float]]:
    logits, problem_type, asked = records.logits, config.resolved_problem_type, records.asked_at(config.exit_layers)
    num_exits = logits.shape[1]
    rule = settings.build_criterion(num_exits, problem_type)
    assert isinstance(rule, ThresholdCriterion)
    classes = 2 if problem_type == MULTI_LABEL else logits.shape[-1]
    top = rule.everybody_leaves if rule.everybody_leaves < math.inf else 1.01 * math.log(classes)
    low, high, sign = (0.0, top, 1) if rule.lower_is_surer else (-1.0, 0.0, -1)
    measured = [sign * rule.measured(logits[:, exit], exit).double() for exit in checked]
    if losses is not None:
        found = _thresholds_per_exit(measured, losses[:, checked], asked[:, checked], low, high)
    else:
        answered = [values.numpy()[asked[:, exit]] for values, exit in zip(measured, checked, strict=True)]
        at_all = np.concatenate(answered) if answered else np.empty(0)
        seen = np.quantile(at_all, SHARES).clip(low, high).tolist() if len(at_all) else []
        steps = sorted({*(low + (high - low) * step for step in GRID), *seen})
        if last == num_exits - 1:
            return [abs(step) for step in steps]
        found = np.array(steps)[:, None]
    limits = np.full((len(found), num_exits), low)
    limits[:, checked], limits[:, last:] = found, high
    return np.abs(limits).tolist()


def _patience_path(logits: Tensor, problem_type: str) -> list[tuple[int, float | None]]:
    """Patience and tolerance, careful to bold, for exits of which all but the last are checked."""
    if problem_type != REGRESSION:
        return [(count, None) for count in range(logits.shape[1], -1, -1)]
    changes = (logits[:, 1:] - logits[:, :-1]).abs().flatten().double()
    tolerances = {0.0}
    if changes.numel():  # the last is past the largest change, because a change must be below the tolerance
        quantiles = np.quantile(changes.numpy(), SHARES)
        tolerances |= {*quantiles.tolist(), 1.01 * float(changes.max())}
    return [*((1, tolerance) for tolerance in sorted(tolerances)), (0, None)]


def _thresholds_per_exit(
    measured: list[Tensor], losses: np.ndarray, asked: np.ndarray, low: float, high: float
) -> np.ndarray:
    """Thresholds of all exits, lower measures leaving, for growing levels of loss; shape (levels, exits)."""
    path = np.full((len(ERROR_LEVELS) + 1, losses.shape[1]), low)
    for number, level in enumerate(ERROR_LEVELS, start=1):
        remaining = np.arange(len(losses))
        for exit, values in enumerate(tensor.numpy() for tensor in measured):
            here = remaining[asked[remaining, exit]]
            if not len(here):
                continue
            order = here[np.argsort(values[here], kind="stable")]
            share = losses[order, exit].cumsum() / np.arange(1, len(order) + 1)
            cut = np.append(values[order[1:]] > values[order[:-1]], True)  # equal rows leave together
            allowed = np.flatnonzero((share <= level) & cut)
            if len(allowed):
                end = allowed[-1] + 1
                path[number, exit] = high if end == len(order) else min(values[order[end]], high)
                remaining = np.setdiff1d(remaining, order[:end])
    return np.maximum.accumulate(path)


def exit_curve(records: ExitLogits, config: ExitingConfig, metric: str) -> list[ExitOutcome]:
    """The whole speed-accuracy curve, careful to bold, without repeated points.

    It is that of the criterion, the temperatures and the checked exits in `config.exit_config`, of all exits and the
    default criterion where there are no settings.

    Args:
        records: Logits of all exits, with labels.
        config: The model's.
        metric: See `hf_costeff.metrics.METRICS`.
    """
    replay = ExitReplay(records, config)
    parts = replay.distinct(curve_settings(records, config))
    return [replay.outcome(settings, metric) for part in parts for settings in part]


def curve_settings(records: ExitLogits, config: ExitingConfig) -> Sequence[ExitConfig]:
    """The settings that [`exit_curve`] shows: full depth alone where rows skip layers and the criterion looks back."""
    criterion = default_criterion(config.resolved_problem_type)
    stored = (
        ExitConfig(criterion, threshold=0.0) if config.exit_config is None else ExitConfig.from_dict(config.exit_config)
    )
    path = candidate_settings(
        records, config, stored.criterion, temperatures=stored.temperatures, checked_exits=stored.checked_exits
    )
    return path[:1] if records.skipped is not None and CRITERIA[stored.criterion].looks_back else path


SettingsPath = tuple[Sequence[ExitConfig], ...]
"""Settings from careful to bold, in parts that share everything but their limits."""


@dataclass(frozen=True)
class ExitSearch:
    """Which settings are tried.

    Args:
        criterion: A key of `CRITERIA`; `None`: entropy, for regression patience.
        per_exit: One threshold per exit, not one for all.
        fit_temperatures: Fit a temperature per exit before the thresholds; otherwise they stay 1.
        checked_exits: Layers whose exit is checked, as in [`ExitConfig`]; `None`: chosen too, the first of them and the
            deepest at which anybody may still be in. Of a cascade of up to five members, any of them before the last.
    """

    criterion: str | None = None
    per_exit: bool = False
    fit_temperatures: bool = True
    checked_exits: list[int] | None = None

    def __post_init__(self) -> None:
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise ValueError(f"`criterion` is {self.criterion!r}. It must be one of {', '.join(CRITERIA)}.")
        if self.checked_exits == []:
            raise ValueError(
                "No exit may be asked: `checked_exits` is empty, as where no exit pays on the machine that "
                "`hf-costeff benchmark --choose_exits` measured. Everybody runs to the end then and there is nothing "
                "to choose. Name the layers whose exits may be asked with `checked_exits`."
            )

    def criterion_for(self, problem_type: str) -> str:
        """The criterion's name."""
        return self.criterion or default_criterion(problem_type)

    def paths(self, replay: ExitReplay, goal: str) -> list[SettingsPath]:
        """The settings to try on these rows: paths from careful to bold, one for each choice of exits to check.

        The first path checks all exits, the others all from some exit on; of a cascade of few members any, because a
        member that is asked costs its whole run. A path ends with everybody leaving at the first of them whose layer it
        runs. Where a budget must be kept whatever it costs, it goes on from there to earlier exits; the ones behind
        stay for the rows that skip.
        """
        criterion = self.criterion_for(replay.problem_type)
        temperatures: float | list[float] = 1.0
        if self.fit_temperatures and criterion != "patience":
            if len(replay) < FEWEST_ROWS:
                raise ValueError(
                    f"There are {len(replay)} rows to fit temperatures on, and it takes {FEWEST_ROWS}. "
                    "Give more rows, or switch `fit_temperatures` off, which leaves them at 1."
                )
            temperatures = fit_temperatures(replay.records, replay.problem_type, replay.askable)
        losses = replay.losses(goal) if self.per_exit else None
        path = partial(
            candidate_settings, replay.records, replay.config, criterion, temperatures=temperatures, losses=losses
        )
        if self.checked_exits is not None:
            return [(path(checked_exits=self.checked_exits),)]
        early = replay.config.exit_layers[:-1]
        wholes, runs = _exits_to_check(early, isinstance(replay.config, CostEffCascadeConfig))
        found = {chosen: path(checked_exits=list(chosen)) for chosen in wholes}
        paths: list[SettingsPath] = [(path(),), *((own,) for own in found.values())]
        if goal not in BUDGETS:
            return paths
        skips = replay.records.skipped is not None
        from_exit = {layer: tuple(early[start:]) for start, layer in enumerate(early)}
        return paths + [
            (
                found[from_exit[run[-1]]],
                path(checked_exits=list(from_exit[run[0]] if skips else run), deepest_exit=run[-1]),
            )
            for run in runs
        ]


def _exits_to_check(early: list[int], any_of_them: bool) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Exits that may be checked instead of all, and those of which at the deepest everybody leaves.

    Args:
        early: Layers of all exits but the last.
        any_of_them: Whether each may be left out, if they are few; otherwise only the first and the deepest ones.
    """
    if any_of_them and len(early) <= MOST_LEFT_OUT:
        subsets = [chosen for size in range(len(early), 0, -1) for chosen in combinations(early, size)]
        return subsets[1:], [chosen for chosen in subsets if len(chosen) > 1]
    runs = [tuple(early[start : deepest + 1]) for deepest in range(1, len(early)) for start in range(deepest)]
    return [tuple(early[start:]) for start in range(1, len(early))], runs


def choose_exit_config(
    records: ExitLogits,
    config: ExitingConfig,
    metric: str,
    *,
    max_accuracy_drop: float | None = None,
    max_metric_drop: float | None = None,
    max_disagreement: float | None = None,
    target_speedup: float | None = None,
    max_megaflops: float | None = None,
    max_latency_ms: float | None = None,
    reference_flops: float | None = None,
    exit_times: ExitTimes | None = None,
    search: ExitSearch | None = None,
    guarantee: bool = False,
    delta: float = 0.1,
) -> ExitConfig:
    """Exit settings from exactly one goal: which exits are checked, and the limit at which a row leaves.

    Losses are against full depth, or against `records.reference` where there is one. For each choice of exits to check
    there is a path of settings from careful to bold. With a largest loss, each path gives the boldest setting such that
    it and every more careful one keep to it on these rows, and the one with the fewest FLOPs is taken, or the least
    time if times are given. With a budget (`target_speedup`, `max_megaflops`, `max_latency_ms`), each gives the most
    careful one that keeps to it, and the one with the best metric is taken, if it stands out from that with all exits
    checked. With `guarantee`, a third of the rows fits temperatures and chooses a path, the others test it step by
    step, and the boldest setting proved to keep to the loss on new rows of the same distribution is taken.

    Args:
        records: Logits of all exits on held-out rows; with labels, but for `max_disagreement`.
        config: The model's.
        metric: What is reported, and what `max_metric_drop` limits, see `hf_costeff.metrics.METRICS`.
        max_accuracy_drop: Points (hundredths) that accuracy may lose, 0 or more.
        max_metric_drop: Points (hundredths) that the metric may lose, 0 or more.
        max_disagreement: Share of the rows, in points, whose answer may differ. Needs no labels.
        target_speedup: FLOPs of the reference over FLOPs with early exit, above 0; with `exit_times`, measured time at
            full depth over time with early exit.
        max_megaflops: Mean millions of FLOPs per row, at the rows' own lengths, above 0.
        max_latency_ms: Mean milliseconds per text, above 0. Needs `exit_times`.
        reference_flops: FLOPs per row of what the speed-up is measured against; `None`: this model at full depth.
        exit_times: How long leaving at each exit takes, measured on the machine that will serve. `None`: FLOPs count.
        search: Which settings are tried; `None`: `ExitSearch()`.
        guarantee: Whether the loss must keep to the goal on new rows too, with probability 1 - `delta` over the
            sample. Needs `row_keys`. The loss of `max_accuracy_drop` is then the share of rows that full depth, or
            the reference, has right and early exit wrong, which is never less than the drop in accuracy.
        delta: Largest chance of a broken promise, above 0 and below 1.

    Returns:
        Settings whose `calibration` says what was asked, on how many rows, what was seen there, under `"timed"` what
        the clock said and, under `"promise"`, what is promised. If nothing can be, nobody leaves early and
        `"no_promise"` says why.

    Raises:
        ValueError: Not exactly one goal, a goal out of range, or rows that cannot serve it; as
            [`hf_costeff.calibration_goals.UnreachableGoalError`], a budget out of reach, or a loss that full depth
            exceeds against a reference.
    """
    search = search or ExitSearch()
    goals = (max_accuracy_drop, max_metric_drop, max_disagreement, target_speedup, max_megaflops, max_latency_ms)
    goal, limit = check_goal(
        config,
        metric,
        criterion=search.criterion,
        guarantee=guarantee,
        delta=delta,
        reference_flops=reference_flops,
        exit_times=exit_times,
        **dict(zip(GOALS, goals, strict=True)),
    )
    _check_records(records, config, goal, search)
    replay = ExitReplay(records, config)
    costs: Costs = replay.flops if exit_times is None else partial(exit_times.costs, config.exit_layers)
    extra: dict[str, Any] = {}
    if guarantee:
        chosen, extra = _guaranteed(replay, search, goal, limit / 100, delta, exit_times)
    elif goal in BUDGETS:
        reference = reference_flops or replay.full_depth.mean_cost(costs)
        chosen = _reaching(replay, search.paths(replay, goal), metric, costs, goal, limit, reference)
    else:
        paths, loss = search.paths(replay, goal), _loss_of(replay, goal, metric)
        _check_full_depth(replay, paths, loss, goal, limit)
        chosen = _within(replay, paths, loss, limit, costs)[0]
    if reference_flops is not None and records.reference is not None:
        extra["speedup_over_reference"] = reference_flops / replay.at(chosen).mean_flops
    if exit_times is not None:
        extra["timed"] = {"ms_per_text": replay.at(chosen).mean_cost(costs), **exit_times.conditions()}
    return dataclasses.replace(chosen, calibration={"goal": {goal: limit}, **_seen(replay, chosen, metric), **extra})


Loss = Callable[[ReplayedPath], Iterable[float]]


def _loss_of(replay: ExitReplay, goal: str, metric: str) -> Loss:
    """What is lost against the reference under each setting of a path, in points."""
    if goal == "max_disagreement" or metric == "accuracy":
        points = 100 / len(replay)
        lost = replay.losses(goal) if goal == "max_disagreement" else replay.reference_right - 1.0 * replay.right
        return lambda path: points * path.totals(lost)
    reference = replay.reference_metric(metric)

    def losses(path: ReplayedPath) -> Iterator[float]:
        """Computed where rows move, and no further than somebody asks."""
        for start, end in pairwise([*path.changes, len(path.settings)]):
            lost = 100 * worse_by(reference, path.at(start).metric(metric), metric)
            yield from repeat(lost, end - start)

    return losses


def _check_full_depth(replay: ExitReplay, paths: list[SettingsPath], loss: Loss, goal: str, limit: float) -> None:
    """Refuse a largest loss that full depth exceeds, as it may against another model."""
    [careful] = replay.along(paths[0][0][:1])
    [lost] = loss(careful)
    if lost > limit + 1e-9:
        raise UnreachableGoalError(
            f"`{goal}` is {limit:g}, and full depth itself loses {lost:.2f} points against {_reference_of(replay)}. "
            "Settings are tried from there on, as long as they keep to it. Allow more, or train the model further."
        )


def _reference_of(replay: ExitReplay) -> str:
    """What losses are counted against, in words."""
    if replay.records.reference is not None:
        return replay.records.reference.name
    return FULL_DEPTH if replay.records.skipped is None else GATED_FULL_DEPTH


def _within(
    replay: ExitReplay, paths: list[SettingsPath], loss: Loss, limit: float, costs: Costs
) -> tuple[ExitConfig, SettingsPath]:
    """Of the boldest settings of each path that keep to the limit, the ones that cost least; and their path.

    The most careful ones are among them: members of a cascade that release few rows cost more than they save.
    """
    careful = paths[0][0][0]
    found = [(replay.at(careful).mean_cost(costs), careful, paths[0])]  # first, for `min` takes the first of equals
    for path in paths:
        piece, position = _boldest(replay.along(*path), loss, limit)
        found.append((piece.at(position).mean_cost(costs), piece.settings[position], path))
    _, chosen, path = min(found, key=itemgetter(0))
    return chosen, path


def _boldest(pieces: list[ReplayedPath], loss: Loss, limit: float) -> tuple[ReplayedPath, int]:
    """The piece and position of the last settings before any lose more; of the first in any case."""
    boldest = pieces[0], 0
    for piece in pieces:
        for position, lost in enumerate(loss(piece)):
            if lost > limit + 1e-9:
                return boldest
            boldest = piece, position
    return boldest


def _reaching(
    replay: ExitReplay,
    paths: list[SettingsPath],
    metric: str,
    costs: Costs,
    goal: str,
    limit: float,
    reference: float,
) -> ExitConfig:
    """Of the most careful settings of each path that keep to a budget, the ones with the best metric.

    The first path is left only for one that looks better by more than the resampled rows vary (95% paired bootstrap),
    because the best of many always looks better than it is. That it was picked among several is not allowed for, so
    this damps the choice and promises nothing.
    """
    budget = {"target_speedup": reference / limit, "max_megaflops": 1e6 * limit, "max_latency_ms": limit}[goal]
    pieces = [replay.along(*path) for path in paths]
    found = [reached for path in pieces if (reached := _most_careful(path, costs, budget)) is not None]
    if not found:
        least = min(path[-1].mean_costs(costs)[-1] for path in pieces)
        asked, most, remedy = {
            "target_speedup": (f"A speed-up of {limit:g}", f"{reference / least:.2f}", "less"),
            "max_megaflops": (f"A mean of {limit:g} million FLOPs", f"{least / 1e6:.3g} million", "more"),
            "max_latency_ms": (f"A mean latency of {limit:g} ms", f"{least:.3g} ms", "more"),
        }[goal]
        raise UnreachableGoalError(
            f"{asked} cannot be reached: with every row leaving as early as it can it is {most}. Ask for {remedy}, "
            "or compress further."
        )
    best = min(found, key=lambda exits: worse_by(0.0, exits[0].metric(metric), metric))
    return (best if _is_better(best[0], found[0][0], metric) else found[0])[1]


def _most_careful(pieces: list[ReplayedPath], costs: Costs, budget: float) -> tuple[ReplayedExits, ExitConfig] | None:
    """The first settings that keep to a budget, and where rows leave under them."""
    for piece in pieces:
        enough = np.flatnonzero(piece.mean_costs(costs) <= budget * (1 + 1e-12))
        if len(enough):
            return piece.at(enough[0]), piece.settings[enough[0]]
    return None


def _is_better(exits: ReplayedExits, others: ReplayedExits, metric: str) -> bool:
    function = METRICS[exits.replay.problem_type][metric]
    logits, labels = (exits.logits.numpy(), others.logits.numpy()), exits.replay.records.known_labels()
    _, low, high = paired_bootstrap(function, *logits, labels, samples=RESAMPLES)
    return high < 0 if metric in LOWER_IS_BETTER else low > 0


def _guaranteed(
    replay: ExitReplay, search: ExitSearch, goal: str, epsilon: float, delta: float, times: ExitTimes | None
) -> tuple[ExitConfig, dict[str, Any]]:
    """Settings, and the promise or why there is none."""
    keys = replay.records.row_keys
    if keys is None or len(keys) != len(replay):
        found = "None" if keys is None else f"of {len(keys)} rows"
        raise ValueError(f"`row_keys` is {found}. A guarantee splits {len(replay)} rows by them.")
    fitting, testing = (ExitReplay(replay.records.select(rows), replay.config) for rows in split_rows(keys))
    tests, needed = len(testing), zero_loss_rows(epsilon, delta)
    wanted = f"at most {100 * epsilon:g} points with probability {1 - delta:g}"
    if tests < needed:
        careful = candidate_settings(replay.records, replay.config, search.criterion_for(replay.problem_type))[0]
        return careful, {
            "no_promise": f"To promise {wanted} takes {sample_needed(needed):,} rows at least, {needed:,} of them to "
            f"test on, and there are {len(keys):,}."
        }
    known = fitting.losses(goal)
    costs: Costs = fitting.flops if times is None else partial(times.costs, replay.config.exit_layers)
    _, path = _within(
        fitting, search.paths(fitting, goal), lambda path: path.totals(known), epsilon * len(fitting), costs
    )
    steps = fitting.distinct(*path)
    losses = testing.losses(goal)
    lost = np.concatenate([piece.totals(losses) for piece in testing.along(*steps)]).astype(int).tolist()
    untested = int(replay.records.reference is None)  # the first lets nobody leave: it loses nothing to full depth
    safe = last_safe(lost[untested:], tests, epsilon, delta)
    if safe is None:
        named = "the most careful setting" if untested else "full depth itself"
        why = _why_not(named, lost[untested] if len(lost) > untested else None, tests, epsilon, delta)
        return steps[0][0], {"no_promise": f"Cannot promise {wanted}: {why}"}
    position, flips = safe
    counted = {"rows": tests, "flips": flips, "reference": _reference_of(replay)}
    part, own = [(part, own) for part in steps for own in range(len(part))][position + untested]
    return part[own], {"promise": {"loss": goal, "epsilon": epsilon, "delta": delta, **counted}}


def _why_not(named: str, flips: int | None, rows: int, epsilon: float, delta: float) -> str:
    """Why the first step of a path was not proved; `flips` is `None` if there is no step."""
    if flips is None:
        return "no setting lets a row leave early."
    enough = rows_needed(epsilon, delta, flips / rows)
    remedy = "more rows would not help" if enough is None else f"about {sample_needed(enough):,} rows would do"
    return f"{named} loses {flips} of {rows:,} rows (p = {p_value(flips, rows, epsilon):.2f}). At that rate {remedy}."


def _seen(replay: ExitReplay, settings: ExitConfig, metric: str) -> dict[str, Any]:
    """What the settings did on all rows; without labels there is no metric, for regression no disagreement."""
    full, early = replay.full_depth, replay.at(settings)
    record: dict[str, Any] = {"rows": len(replay)}
    if replay.records.labels is not None:
        record |= {"metric": metric, "full_depth": full.metric(metric), "early_exit": early.metric(metric)}
    if replay.problem_type != REGRESSION:
        record["disagreement"] = early.total(replay.losses("max_disagreement")) / record["rows"]
    if replay.records.skipped is not None:
        record["skip_threshold"] = replay.config.skip_threshold
    if replay.records.reference is not None:
        record["reference"] = replay.records.reference.name
        if replay.records.labels is not None:
            record["reference_metric"] = replay.reference_metric(metric)
    speedup = full.mean_flops / early.mean_flops
    return {**record, "mean_exit_layer": early.mean_exit_layer, "speedup_over_full_depth": speedup}


def describe_seen(seen: Mapping[str, Any]) -> str:
    """A sentence on what exit settings did on the rows they were chosen on.

    Args:
        seen: The `calibration` record of an [`ExitConfig`].

    Example:
        >>> describe_seen({"rows": 50, "disagreement": 0.02, "mean_exit_layer": 2.5, "speedup_over_full_depth": 2.0})
        'On 50 rows: 2.00% answer otherwise than at full depth, mean exit layer 2.50, 2.00x fewer FLOPs.'
    """
    full = f"at {GATED_FULL_DEPTH if seen.get('skip_threshold') is not None else FULL_DEPTH}"
    if "metric" in seen:
        other = f"{seen['reference_metric']:.4f} of {seen['reference']}, " if "reference" in seen else ""
        quality = f"{seen['metric']} {other}{seen['full_depth']:.4f} {full}, {seen['early_exit']:.4f} with early exit"
    else:
        quality = f"{100 * seen['disagreement']:.2f}% answer otherwise than {seen.get('reference', full)}"
    trained = seen.get("trained_rows", 0)
    rows = f"{seen['rows']:,} rows, {trained:,} of which were in training" if trained else f"{seen['rows']:,} rows"
    gain = seen.get("speedup_over_reference")
    over = "" if gain is None else f", {gain:.2f}x fewer than {seen['reference']}"
    said = (
        f"On {rows}: {quality}, mean exit layer {seen['mean_exit_layer']:.2f}, "
        f"{seen['speedup_over_full_depth']:.2f}x fewer FLOPs{over}."
    )
    if timed := seen.get("timed"):
        hardware = timed["hardware"]["accelerator"] or timed["hardware"]["cpu"]
        said += (
            f" From the times of the single exits, measured on {hardware} (batch {timed['batch_size']}, threads "
            f"{timed['threads']}, {timed['precision']}), that is {timed['ms_per_text']:.3g} ms per text on average, "
            f"and {timed['full_depth_ms']:.3g} ms at full depth."
        )
    return said


def _check_records(records: ExitLogits, config: ExitingConfig, goal: str, search: ExitSearch) -> None:
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
