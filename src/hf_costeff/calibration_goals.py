"""What a calibration may be asked for, and which model, metric and clock can serve it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .configuration_cascade import CostEffCascadeConfig
from .configuration_costeff import require_no_gates
from .exit_criteria import CRITERIA, REGRESSION
from .exit_replay import ExitingConfig, ExitTimes
from .metrics import check_metric

GUARANTEED = ("max_accuracy_drop", "max_disagreement")
BUDGETS = ("target_speedup", "max_megaflops", "max_latency_ms")
GOALS = ("max_accuracy_drop", "max_metric_drop", "max_disagreement", *BUDGETS)


class UnreachableGoalError(ValueError):
    """A goal that no settings keep to on the rows at hand."""


def default_criterion(problem_type: str) -> str:
    """Name of the criterion that thresholds are chosen for unless the user names another."""
    return "patience" if problem_type == REGRESSION else "entropy"


def check_goal(
    config: ExitingConfig,
    metric: str,
    *,
    criterion: str | None = None,
    guarantee: bool = False,
    delta: float = 0.1,
    reference_flops: float | None = None,
    exit_times: ExitTimes | None = None,
    **goals: float | None,
) -> tuple[str, float]:
    """Name and value of the only goal that is given, if this model, metric and clock could serve it on some rows.

    Args:
        config: The model's.
        metric: As in [`choose_exit_config`], as all others.
        criterion: A key of `CRITERIA`; `None`: [`default_criterion`].
        guarantee: Whether a promise is asked for.
        delta: Largest chance of a broken one.
        reference_flops: What a speed-up is measured against.
        exit_times: What exits take.
        **goals: One of `GOALS`; the others `None`.

    Raises:
        ValueError: No goal or several, one out of range, or one that cannot be served.
    """
    goal, limit = one_goal(goals)
    _check_served(goal, limit, metric, config.resolved_problem_type)
    _check_criterion(criterion, config)
    _check_times(exit_times, config, goal, reference_flops)
    if guarantee:
        check_guarantee(goal, limit, delta)
    return goal, limit


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
    if name in BUDGETS:
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` is {value}. It must be above 0.")
    elif not value >= 0:
        raise ValueError(f"`{name}` is {value}. It must be 0 or more, in points (hundredths).")
    return name, value


def _check_served(goal: str, limit: float, metric: str, problem_type: str) -> None:
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


def _check_criterion(criterion: str | None, config: ExitingConfig) -> None:
    gates, problem_type = getattr(config, "skip_gates", None), config.resolved_problem_type
    name = criterion or default_criterion(problem_type)
    if gates is None or not CRITERIA[name].looks_back:
        return
    others = "" if problem_type == REGRESSION else "Use the entropy, confidence or margin criterion, or load "
    raise ValueError(
        f"The {name} criterion compares the exits that a row has passed, and with skip gates ({gates!r}) a row has no "
        f"answer after a layer that it skips. {others or 'There is no other criterion for regression. Load '}the model "
        "without them: from_pretrained(..., skip_gates=None)."
    )


def check_guarantee(goal: str, limit: float, delta: float) -> None:
    """Refuse a promise that no rows could serve.

    Args:
        goal: One of `GOALS`.
        limit: Its value, in points.
        delta: Largest chance of a broken promise.

    Raises:
        ValueError: A goal without a 0/1 loss, or a number out of range.
    """
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


def _check_times(times: ExitTimes | None, config: ExitingConfig, goal: str, reference_flops: float | None) -> None:
    if isinstance(config, CostEffCascadeConfig) and (times is not None or goal == "max_latency_ms"):
        raise ValueError(
            f"`{goal if times is None else 'exit_times'}` is given for a cascade. Times are measured of the exits of a "
            "single model, and there are none of a cascade's members. Choose by FLOPs: `target_speedup`, over the last "
            "member or over `reference_flops`."
        )
    if times is None:
        if goal == "max_latency_ms":
            raise ValueError(
                "`max_latency_ms` needs `exit_times`, and there are none. Measure them on the machine that will serve: "
                "hf_costeff.exit_times.measure_exit_times."
            )
        return
    require_no_gates(config, "Calibrating by time")
    if len(times.leaving_ms) != len(config.exit_layers):
        raise ValueError(
            f"`exit_times` has {len(times.leaving_ms)} exits and the model {len(config.exit_layers)}. Measure them "
            "with this model."
        )
    if goal == "max_megaflops":
        raise ValueError("`max_megaflops` counts FLOPs, and `exit_times` are given. Leave them out, or ask for a time.")
    if reference_flops is not None:
        raise ValueError("Both `exit_times` and `reference_flops` are given. A speed-up counts time or FLOPs.")
