"""Exit thresholds on hand-made logits, where the right one is known, and against a plain loop over rows."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from functools import partial

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from helpers import tiny_config
from hf_costeff import CostEffConfig
from hf_costeff.calibration import (
    ExitSearch,
    candidate_settings,
    choose_exit_config,
    describe_seen,
    exit_curve,
    fit_temperatures,
)
from hf_costeff.calibration_goals import UnreachableGoalError, check_goal
from hf_costeff.efficiency import mean_flops
from hf_costeff.exit_criteria import ExitConfig, simulate_exits
from hf_costeff.exit_replay import ExitLogits, ExitOutcome, ExitReplay, ExitTimes, ReferenceLogits
from hf_costeff.guarantees import describe_promise, split_rows

GATED = tiny_config(skip_gates="linear")
choose = partial(choose_exit_config, search=ExitSearch(fit_temperatures=False))  # thresholds worked by hand

CONFIG = tiny_config(num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2)
LENGTH = 8

# (probability the first exit gives to its answer, whether it is right), sure to unsure; the last exit is always right.
# Normalised entropies: 0.081, 0.286, 0.469, 0.722, 0.971.
ROWS = [(0.99, True)] * 4 + [(0.95, False)] + [(0.9, True)] * 3 + [(0.8, False)] + [(0.6, True)]


def logits_for(probability: float, answer: int) -> list[float]:
    logit = math.log(probability / (1 - probability))
    return [0.0, logit] if answer else [logit, 0.0]


def exit_outcome(records: ExitLogits, settings: ExitConfig | None, config, metric: str) -> ExitOutcome:
    return ExitReplay(records, config).outcome(settings, metric)


def records_of(rows, last_right=None) -> ExitLogits:
    """Two exits; labels alternate; `last_right` says where the last exit is right (everywhere if `None`)."""
    last_right = [True] * len(rows) if last_right is None else last_right
    logits, labels = [], []
    for number, ((probability, right), last) in enumerate(zip(rows, last_right, strict=True)):
        label = number % 2
        first = logits_for(probability, label if right else 1 - label)
        logits.append([first, logits_for(0.999, label if last else 1 - label)])
        labels.append(label)
    return ExitLogits(torch.tensor(logits), torch.full((len(rows),), LENGTH), torch.tensor(labels))


def normalized_entropy(probability: float) -> float:
    return -sum(p * math.log2(p) for p in (probability, 1 - probability))


def flops_at(layer: int, heads_executed: int) -> int:
    """Two per multiply-accumulate, by hand: 2 heads of 4, 16 neurons, hidden 12."""
    width = 8
    one_layer = LENGTH * (4 * 12 * width + 2 * 12 * 16) + 2 * LENGTH * LENGTH * width
    return 2 * (layer * one_layer + heads_executed * 12 * 2)


FULL_DEPTH = flops_at(2, 1)


def plain_outcome(rows, threshold: float) -> tuple[float, float, float]:
    """(accuracy, mean exit layer, FLOPs per row) of a threshold, one row at a time; the last exit is always right."""
    right, layers, flops = 0, 0, 0
    for probability, correct in rows:
        leaves = threshold >= 1 or normalized_entropy(probability) < threshold
        right += correct if leaves else 1
        layers += 1 if leaves else 2
        flops += flops_at(1, 1) if leaves else flops_at(2, 2 if threshold > 0 else 1)  # at 0 it is not asked
    return right / len(rows), layers / len(rows), flops / len(rows)


# --- replaying


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_an_outcome_equals_a_plain_loop_over_rows(threshold):
    outcome = exit_outcome(records_of(ROWS), ExitConfig(threshold=threshold), CONFIG, "accuracy")
    accuracy, layer, flops = plain_outcome(ROWS, threshold)
    assert (outcome.metric, outcome.mean_exit_layer, outcome.flops_per_row) == pytest.approx((accuracy, layer, flops))
    assert outcome.speedup == pytest.approx(FULL_DEPTH / flops)


def test_full_depth_runs_one_exit_head_and_is_the_unit_of_the_speed_up():
    outcome = exit_outcome(records_of(ROWS), None, CONFIG, "accuracy")
    assert (outcome.metric, outcome.mean_exit_layer, outcome.speedup) == (1.0, 2.0, 1.0)
    assert outcome.flops_per_row == FULL_DEPTH


def test_rows_are_counted_at_their_own_lengths():
    records = records_of(ROWS[:2])
    uneven = ExitLogits(records.logits, torch.tensor([4, 20]), records.labels)
    each = [
        exit_outcome(
            ExitLogits(records.logits[:1], torch.tensor([length]), records.labels[:1]), None, CONFIG, "accuracy"
        )
        for length in (4, 20)
    ]
    found = exit_outcome(uneven, None, CONFIG, "accuracy").flops_per_row
    assert found == pytest.approx((each[0].flops_per_row + each[1].flops_per_row) / 2)


def test_the_curve_goes_from_nobody_to_everybody_without_repeated_points():
    curve = exit_curve(records_of(ROWS), CONFIG, "accuracy")
    assert [point.mean_exit_layer for point in curve] == pytest.approx([2.0, 1.6, 1.5, 1.2, 1.1, 1.0])
    assert [point.metric for point in curve] == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.8, 0.8])


def test_a_metric_needs_labels():
    records = ExitLogits(torch.zeros(3, 2, 2), torch.full((3,), LENGTH))
    with pytest.raises(ValueError, match="The rows have no labels"):
        exit_outcome(records, None, CONFIG, "accuracy")


# --- a largest drop


@pytest.mark.parametrize(
    ("drop", "threshold", "accuracy", "layer"),
    [
        (0.0, 0.285, 1.0, 1.6),  # 0.29 would let out the first wrong row (0.286)
        (9.9, 0.285, 1.0, 1.6),
        (10.0, 0.72, 0.9, 1.2),  # 0.725 would let out the second wrong row (0.722)
        (20.0, 1.0, 0.8, 1.0),
        (100.0, 1.0, 0.8, 1.0),
    ],
)
def test_the_boldest_threshold_within_the_drop_is_chosen(drop, threshold, accuracy, layer):
    settings = choose(records_of(ROWS), CONFIG, "accuracy", max_metric_drop=drop)
    assert (settings.criterion, settings.threshold) == ("entropy", threshold)
    _, _, flops = plain_outcome(ROWS, threshold)
    assert settings.calibration == {
        "goal": {"max_metric_drop": drop},
        "metric": "accuracy",
        "rows": 10,
        "full_depth": 1.0,
        "early_exit": pytest.approx(accuracy),
        "disagreement": pytest.approx(1 - accuracy),  # the last exit is always right
        "mean_exit_layer": pytest.approx(layer),
        "speedup_over_full_depth": pytest.approx(FULL_DEPTH / flops),
    }


def test_a_bolder_threshold_does_not_count_if_a_more_careful_one_drops_too_much():
    """The 0.9 rows repair at the first exit what the last gets wrong, so bolder thresholds look good again."""
    records = records_of(ROWS, last_right=[True] * 5 + [False] * 3 + [True] * 2)
    assert exit_outcome(records, ExitConfig(threshold=0.72), CONFIG, "accuracy").metric == pytest.approx(0.9)
    assert exit_outcome(records, None, CONFIG, "accuracy").metric == pytest.approx(0.7)
    settings = choose(records, CONFIG, "accuracy", max_metric_drop=0.0)
    assert settings.threshold == 0.285


def test_if_the_first_exit_is_useless_nobody_leaves():
    settings = choose(records_of([(0.999999, False)] * 6), CONFIG, "accuracy", max_metric_drop=0.0)
    assert settings.calibration["mean_exit_layer"] == 2.0
    outcome = exit_outcome(records_of([(0.999999, False)] * 6), settings, CONFIG, "accuracy")
    assert outcome.mean_exit_layer == 2.0 and outcome.metric == 1.0


# --- a speed-up

FINE_GRID = [step / 5000 for step in range(5001)]


@pytest.mark.parametrize("target", [0.5, 1.0, 1.1, 1.3, 1.6, 1.9])
def test_the_most_careful_threshold_that_reaches_the_speed_up_is_chosen(target):
    settings = choose(records_of(ROWS), CONFIG, "accuracy", target_speedup=target)
    careful = next(t for t in FINE_GRID if FULL_DEPTH / plain_outcome(ROWS, t)[2] >= target)
    assert plain_outcome(ROWS, settings.threshold) == pytest.approx(plain_outcome(ROWS, careful))
    assert settings.calibration["goal"] == {"target_speedup": target}
    assert settings.calibration["speedup_over_full_depth"] >= target


def test_the_speed_up_may_be_measured_against_a_teacher():
    reference = 5.0 * FULL_DEPTH
    settings = choose(records_of(ROWS), CONFIG, "accuracy", target_speedup=6.0, reference_flops=reference)
    careful = next(t for t in FINE_GRID if reference / plain_outcome(ROWS, t)[2] >= 6.0)
    assert plain_outcome(ROWS, settings.threshold) == pytest.approx(plain_outcome(ROWS, careful))
    assert settings.calibration["speedup_over_full_depth"] == pytest.approx(
        FULL_DEPTH / plain_outcome(ROWS, settings.threshold)[2]
    )


def test_a_speed_up_out_of_reach_says_the_largest():
    largest = FULL_DEPTH / flops_at(1, 1)
    with pytest.raises(UnreachableGoalError, match=f"speed-up of 30 cannot be reached: .* it is {largest:.2f}"):
        choose(records_of(ROWS), CONFIG, "accuracy", target_speedup=30)
    exactly = choose(records_of(ROWS), CONFIG, "accuracy", target_speedup=largest)
    assert exactly.calibration["mean_exit_layer"] == 1.0


# --- time

SLOW_QUESTIONS = ExitTimes([1.0, 4.0], 0.5, batch_size=8, threads=2, precision="bfloat16", hardware={"cpu": "one"})


def plain_ms(threshold: float) -> float:
    """Mean time of a row, one by one; at 0 the first exit is not asked."""
    leaves = [threshold >= 1 or normalized_entropy(probability) < threshold for probability, _ in ROWS]
    return sum(1.0 if left else 4.0 + 0.5 * (threshold > 0) for left in leaves) / len(ROWS)


@pytest.mark.parametrize(("limit", "threshold"), [(4.0, 0.0), (3.99, 0.1), (3.0, 0.3), (1.5, 0.73), (1.0, 1.0)])
def test_the_most_careful_threshold_that_keeps_a_latency_is_chosen(limit, threshold):
    settings = choose(records_of(ROWS), CONFIG, "accuracy", max_latency_ms=limit, exit_times=SLOW_QUESTIONS)
    careful = next(t for t in FINE_GRID if plain_ms(t) <= limit)
    assert plain_outcome(ROWS, settings.threshold) == pytest.approx(plain_outcome(ROWS, careful))
    assert plain_outcome(ROWS, careful) == plain_outcome(ROWS, threshold)  # by hand
    assert settings.calibration["timed"] == {
        "ms_per_text": pytest.approx(plain_ms(careful)),
        "full_depth_ms": 4.0,
        **{"batch_size": 8, "threads": 2, "precision": "bfloat16", "hardware": {"cpu": "one"}},
    }


def test_with_times_a_speed_up_is_one_of_time():
    settings = choose(records_of(ROWS), CONFIG, "accuracy", target_speedup=2.0, exit_times=SLOW_QUESTIONS)
    careful = next(t for t in FINE_GRID if 4.0 / plain_ms(t) >= 2.0)
    assert plain_outcome(ROWS, settings.threshold) == pytest.approx(plain_outcome(ROWS, careful))
    assert settings.calibration["speedup_over_full_depth"] < 1.9  # in FLOPs


def test_with_times_the_exits_that_save_time_are_checked_and_not_those_that_save_flops():
    """Half the rows may leave at the first exit, all at the second; asking the first costs more than it saves."""
    records = three_exits([6.0, 6.0, -4.0, -4.0])
    goal = {"max_accuracy_drop": 0.0, "search": ExitSearch(per_exit=True, fit_temperatures=False)}
    assert choose_exit_config(records, THREE, "accuracy", **goal).checked_exits is None
    times = ExitTimes([2.0, 2.1, 4.0], 1.0, batch_size=1, threads=1, precision="float32", hardware={})
    assert choose_exit_config(records, THREE, "accuracy", exit_times=times, **goal).checked_exits == [2]


def test_a_latency_out_of_reach_says_the_least():
    with pytest.raises(ValueError, match=r"A mean latency of 0.9 ms cannot be reached: .* it is 1 ms"):
        choose(records_of(ROWS), CONFIG, "accuracy", max_latency_ms=0.9, exit_times=SLOW_QUESTIONS)


def test_a_latency_needs_times_of_this_model():
    with pytest.raises(ValueError, match="`max_megaflops` counts FLOPs, and `exit_times` are given"):
        choose(records_of(ROWS), CONFIG, "accuracy", max_megaflops=1.0, exit_times=SLOW_QUESTIONS)
    with pytest.raises(ValueError, match=r"`max_latency_ms` needs `exit_times`.*measure_exit_times"):
        choose(records_of(ROWS), CONFIG, "accuracy", max_latency_ms=1.0)
    with pytest.raises(ValueError, match="`exit_times` has 2 exits and the model 4"):
        choose(population(50), DEEP, "accuracy", max_latency_ms=1.0, exit_times=SLOW_QUESTIONS)
    with pytest.raises(ValueError, match="Both `exit_times` and `reference_flops` are given"):
        choose(records_of(ROWS), CONFIG, "accuracy", target_speedup=1.0, exit_times=SLOW_QUESTIONS, reference_flops=1.0)


# --- other problem types


def test_multi_label_leaves_by_its_least_sure_label():
    config = tiny_config(num_labels=2, problem_type="multi_label_classification")
    sure, unsure = 8.0, 0.1
    first = [[sure, -sure], [sure, unsure], [unsure, -unsure]]
    last = [[sure, -sure], [sure, -sure], [-sure, sure]]
    logits = torch.tensor([[a, a, a, b] for a, b in zip(first, last, strict=True)])
    records = ExitLogits(logits, torch.full((3,), LENGTH), torch.tensor([[1, 0], [1, 0], [0, 1]]))
    settings = choose(records, config, "accuracy", max_metric_drop=0.0)
    assert settings.calibration["early_exit"] == settings.calibration["full_depth"] == 1.0
    assert settings.calibration["mean_exit_layer"] == pytest.approx((1 + 4 + 4) / 3)


VALUES = torch.tensor(  # four exits; the last is right
    [
        [1.00, 1.01, 1.02, 1.0],
        [2.00, 2.01, 2.50, 2.0],
        [5.00, 3.00, 3.02, 3.0],
        [9.00, 0.00, 7.00, 4.0],
        [5.20, 5.21, 5.10, 5.0],
    ]
)


def regression_records() -> ExitLogits:
    return ExitLogits(VALUES.unsqueeze(-1), torch.full((5,), LENGTH), VALUES[:, -1].clone())


def plain_regression_exits(tolerance: float) -> list[int]:
    """0-based exit of each row: the first whose change from the exit before is below the tolerance."""
    exits = []
    for row in VALUES.tolist():
        steps = (index for index in (1, 2) if abs(row[index] - row[index - 1]) < tolerance)
        exits.append(next(steps, 3))
    return exits


def test_regression_is_calibrated_by_patience_with_a_tolerance_in_label_units():
    config = tiny_config(num_labels=1)
    settings = choose(regression_records(), config, "spearman", max_metric_drop=0.0)
    assert (settings.criterion, settings.patience, settings.threshold) == ("patience", 1, None)
    assert settings.tolerance > 0
    expected = [(1, 2, 3, 4)[index] for index in plain_regression_exits(settings.tolerance)]
    assert settings.calibration["mean_exit_layer"] == pytest.approx(sum(expected) / 5)
    assert settings.calibration["early_exit"] == pytest.approx(1.0)
    *path, _ = candidate_settings(regression_records(), config, "patience")
    bolder = [candidate.tolerance for candidate in path if candidate.tolerance > settings.tolerance]
    outcome = exit_outcome(
        regression_records(), ExitConfig("patience", patience=1, tolerance=bolder[0]), config, "spearman"
    )
    assert outcome.metric < 1.0


def test_regression_reaches_a_speed_up_at_the_most_careful_tolerance():
    config = tiny_config(num_labels=1)
    settings = choose(regression_records(), config, "spearman", target_speedup=1.2)
    *path, _ = candidate_settings(regression_records(), config, "patience")
    for candidate in path:
        if candidate.tolerance < settings.tolerance:
            attempt = dataclasses.replace(candidate, checked_exits=settings.checked_exits)
            assert exit_outcome(regression_records(), attempt, config, "spearman").speedup < 1.2
    assert settings.calibration["speedup_over_full_depth"] >= 1.2


def test_the_boldest_patience_waits_for_no_agreement_and_the_boldest_tolerance_for_one():
    config = tiny_config(num_labels=1)
    for first, checked in ((1.0, None), (2.0, [2, 3])):
        *_, tolerant, boldest = candidate_settings(regression_records(), config, "patience", checked_exits=checked)
        assert (boldest.patience, boldest.tolerance, boldest.checked_exits) == (0, None, checked)
        layers = [
            exit_outcome(regression_records(), s, config, "spearman").mean_exit_layer for s in (tolerant, boldest)
        ]
        assert layers == [first + 1, first]  # one agreement needs two exits


def shallow_exits_are_poor(rows: int = 300) -> ExitLogits:
    """Regression with four exits: the first two know little, the third is as good as the last."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(rows, generator=generator)
    noise = torch.randn(rows, 4, generator=generator) * torch.tensor([2.0, 2.0, 0.2, 0.2])
    return ExitLogits((truth[:, None] + noise).unsqueeze(-1), torch.full((rows,), LENGTH), truth)


def test_where_a_speed_up_must_be_reached_nobody_goes_deeper_than_it_takes():
    """At three layers each the third exit can answer all rows; a little less, and some must leave at the second."""
    config = tiny_config(num_labels=1, num_attention_heads=2, intermediate_size=16)
    records = shallow_exits_are_poor()
    replay = ExitReplay(records, config)
    all_at_three = replay.outcome(ExitConfig("patience", patience=0, checked_exits=[3]), "spearman")
    enough = choose(records, config, "spearman", target_speedup=all_at_three.speedup)
    assert (enough.patience, enough.checked_exits) == (0, [3])
    bit_more = choose(records, config, "spearman", target_speedup=1.05 * all_at_three.speedup)
    shares = replay.at(bit_more).exit_shares
    assert bit_more.patience[2] == 0 and bit_more.patience[1] == 1 and shares[2] > 0.7 and shares[3] == 0
    anyone = choose(
        *(records, config, "spearman"),
        target_speedup=1.05 * all_at_three.speedup,
        search=ExitSearch(checked_exits=[1, 2, 3]),
    )
    assert bit_more.calibration["early_exit"] > anyone.calibration["early_exit"] + 0.05


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_other_exits_are_checked_only_where_that_is_better_by_more_than_chance(seed):
    """All exits are alike, so that other exits than all look best here by chance."""
    records = shallow_exits_are_poor()
    noise = torch.randn(300, 4, 1, generator=torch.Generator().manual_seed(seed))
    alike = dataclasses.replace(records, logits=records.labels[:, None, None] + noise)
    settings = choose(alike, tiny_config(num_labels=1), "spearman", target_speedup=1.3)
    assert settings.checked_exits is None and settings.patience == 1


def test_a_lower_mean_squared_error_is_no_drop_and_a_higher_one_is():
    config = tiny_config(num_labels=1)
    settings = choose(regression_records(), config, "mse", max_metric_drop=0.1)
    assert settings.calibration["full_depth"] == 0.0
    assert settings.calibration["early_exit"] <= 0.001


@pytest.mark.parametrize(("num_labels", "metric"), [(1, "spearman"), (2, "accuracy")])
def test_a_model_with_one_exit_has_nothing_to_choose_and_says_full_depth(num_labels, metric):
    config = tiny_config(num_labels=num_labels, exit_layers=[4])
    labels = torch.tensor([0.0, 1.0, 0.0]) if num_labels == 1 else torch.tensor([0, 1, 0])
    logits = torch.randn(3, 1, num_labels, generator=torch.Generator().manual_seed(0))
    records = ExitLogits(logits, torch.full((3,), LENGTH), labels)
    settings = choose(records, config, metric, max_metric_drop=0.0)
    assert settings.calibration["mean_exit_layer"] == 4.0


# --- bad input


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "Goals given: none. Give exactly one of `max_accuracy_drop`, `max_metric_drop`, `max_disagreement`"),
        ({"max_metric_drop": 1.0, "target_speedup": 2.0}, "`max_metric_drop` = 1, `target_speedup` = 2. Give exactly"),
        ({"max_accuracy_drop": -1.0}, r"`max_accuracy_drop` is -1\.0\. It must be 0 or more"),
        ({"max_disagreement": math.nan}, "`max_disagreement` is nan"),
        ({"max_metric_drop": -0.5}, r"`max_metric_drop` is -0\.5\. It must be 0 or more, in points"),
        ({"max_metric_drop": math.nan}, "`max_metric_drop` is nan"),
        ({"target_speedup": 0.0}, r"`target_speedup` is 0\.0\. It must be above 0"),
        ({"target_speedup": math.nan}, "`target_speedup` is nan"),
        ({"max_latency_ms": 0.0}, r"`max_latency_ms` is 0\.0\. It must be above 0"),
        ({"max_latency_ms": 1.0, "target_speedup": 2.0}, "`target_speedup` = 2, `max_latency_ms` = 1. Give exactly"),
    ],
)
def test_exactly_one_goal_in_its_range_is_needed(goal, message):
    with pytest.raises(ValueError, match=message):
        choose(records_of(ROWS), CONFIG, "accuracy", **goal)


def test_rows_without_labels_or_no_rows_are_refused():
    records = records_of(ROWS)
    for bad in (
        ExitLogits(records.logits, records.seq_lengths),
        ExitLogits(records.logits[:0], records.seq_lengths[:0], records.labels[:0]),
    ):
        with pytest.raises(ValueError, match="needs held-out rows with labels, and there are none"):
            choose(bad, CONFIG, "accuracy", max_metric_drop=1.0)


def test_an_unknown_metric_is_refused_naming_the_known_ones():
    with pytest.raises(ValueError, match=r"'bleu'.*accuracy, f1, matthews"):
        choose(records_of(ROWS), CONFIG, "bleu", max_metric_drop=1.0)


def test_the_settings_are_plain_values_that_survive_json():
    settings = choose(records_of(ROWS), CONFIG, "accuracy", max_metric_drop=0.0)
    assert ExitConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_a_regression_model_has_no_accuracy_and_no_answer_to_disagree_with():
    for goal in ("max_accuracy_drop", "max_disagreement"):
        with pytest.raises(ValueError, match=rf"`{goal}` is 1, and this is a regression model.* Use `max_metric_drop`"):
            choose(regression_records(), tiny_config(num_labels=1), "spearman", **{goal: 1.0})


def test_an_accuracy_goal_and_another_metric_contradict_each_other():
    with pytest.raises(ValueError, match=r"`max_accuracy_drop` is 1, and the metric is 'f1'. Use `max_metric_drop`"):
        choose(records_of(ROWS), CONFIG, "f1", max_accuracy_drop=1.0)


def test_logits_that_are_not_finite_are_refused_naming_the_row():
    records = records_of(ROWS)
    records.logits[3, 1, 0] = math.nan
    with pytest.raises(ValueError, match=r"The logits of row 3 hold nan at exit layer 2. They must be finite"):
        choose(records, CONFIG, "accuracy", max_metric_drop=1.0)


def test_rows_of_one_class_serve_no_accuracy_goal_and_no_temperature():
    records = population(50)
    one = dataclasses.replace(records, labels=torch.ones_like(records.labels))
    with pytest.raises(ValueError, match="All 50 rows have class 1"):
        choose(one, DEEP, "accuracy", max_accuracy_drop=1.0)
    with pytest.raises(ValueError, match="All 50 rows have class 1"):
        choose_exit_config(one, DEEP, "accuracy", max_disagreement=1.0)
    assert choose(one, DEEP, "accuracy", max_disagreement=1.0).calibration["rows"] == 50


def test_temperatures_need_twenty_rows():
    with pytest.raises(ValueError, match=r"There are 19 rows to fit temperatures on, and it takes 20"):
        choose_exit_config(population(19), DEEP, "accuracy", max_disagreement=1.0)


def test_an_unknown_criterion_is_refused_naming_the_known_ones():
    with pytest.raises(ValueError, match=r"`criterion` is 'luck'. It must be one of entropy"):
        ExitSearch("luck")


def test_patience_has_no_threshold_per_exit():
    with pytest.raises(ValueError, match=r"Patience has one limit for all exits.* Leave `per_exit` out"):
        choose(population(50), DEEP, "accuracy", max_disagreement=1.0, search=ExitSearch("patience", per_exit=True))


# --- rows whose exits grow surer with depth

DEEP = tiny_config(num_hidden_layers=4, num_labels=3)
CRITERIA = ["entropy", "entropy_nats", "confidence", "margin", "patience"]


def population(rows: int, seed: int = 0, labels: int = 3, exits: int = 4) -> ExitLogits:
    """Rows of uneven difficulty; deeper exits are surer and more often right."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, labels, (rows,), generator=generator)
    ease = torch.rand(rows, 1, generator=generator)
    logits = torch.randn(rows, exits, labels, generator=generator)
    logits[torch.arange(rows), :, truth] += torch.linspace(1.0, 4.0, exits) * (0.4 + 1.5 * ease)
    lengths = torch.randint(2, 20, (rows,), generator=generator)
    return ExitLogits(logits, lengths, truth, torch.randint(2**60, (rows,), generator=generator).tolist())


def reordered(records: ExitLogits, order: list[int]) -> ExitLogits:
    keys = [records.row_keys[row] for row in order]
    return ExitLogits(records.logits[order], records.seq_lengths[order], records.labels[order], keys)


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_replaying_equals_simulating_each_setting(criterion, per_exit):
    if per_exit and criterion == "patience":
        return
    records = population(300)
    replay = ExitReplay(records, DEEP)
    losses = replay.losses("max_disagreement") if per_exit else None
    path = candidate_settings(records, DEEP, criterion, temperatures=[0.5, 1.0, 2.0, 1.0], losses=losses)
    some = [*path[:: max(1, len(path) // 40)], path[-1], dataclasses.replace(path[-1], checked_exits=[2, 3])]
    for settings in some:
        expected = simulate_exits(records.logits, settings, DEEP.exit_layers, SINGLE)
        assert torch.equal(replay.at(settings).exit_index, expected)


@pytest.mark.parametrize(
    ("checked", "deepest", "first", "last"),
    [(None, None, 0, 3), ([2, 3], None, 1, 3), ([1, 3], None, 0, 3), ([1, 2, 3], 3, 0, 2), ([2, 3], 3, 1, 2)],
)
@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_path_leads_from_nobody_to_everybody_and_no_row_ever_leaves_later(
    criterion, per_exit, checked, deepest, first, last
):
    if per_exit and criterion == "patience":
        return
    records, unseen = population(300), population(200, seed=1)
    losses = ExitReplay(records, DEEP).losses("max_accuracy_drop") if per_exit else None
    path = candidate_settings(records, DEEP, criterion, losses=losses, checked_exits=checked, deepest_exit=deepest)
    for rows in (records, unseen):
        exits = torch.stack([simulate_exits(rows.logits, settings, DEEP.exit_layers, SINGLE) for settings in path])
        assert (exits[1:] <= exits[:-1]).all() and (exits[0] == last).all()
    seen = simulate_exits(records.logits, path[-1], DEEP.exit_layers, SINGLE)
    assert (seen == first).all()


def plain_per_exit(records: ExitLogits, level: float) -> list[int]:
    """How many rows leave at each exit when at most a share `level` of them may answer otherwise than full depth."""
    entropies = torch.distributions.Categorical(logits=records.logits.double()).entropy()
    answers = records.logits.argmax(-1)
    remaining, left = list(range(len(answers))), []
    for exit in range(3):
        remaining.sort(key=lambda row: float(entropies[row, exit]))
        flips = [bool(answers[row, exit] != answers[row, 3]) for row in remaining]
        allowed = [n for n in range(1, len(remaining) + 1) if sum(flips[:n]) / n <= level]
        left.append(max(allowed, default=0))
        remaining = remaining[left[-1] :]
    return left


def test_with_one_threshold_per_exit_the_share_of_losers_at_each_exit_keeps_to_the_level():
    records = population(200)
    losses = ExitReplay(records, DEEP).losses("max_disagreement")
    path = candidate_settings(records, DEEP, "entropy", losses=losses)
    exits = simulate_exits(records.logits, path[1], DEEP.exit_layers, SINGLE)  # the first level is 0: no flip at all
    assert torch.bincount(exits, minlength=4).tolist()[:3] == plain_per_exit(records, 0.0)
    assert len({*path[60].threshold[:3]}) > 1 and len(path[60].threshold) == 4


# --- rows that skip layers


def skipping(rows: int, seed: int = 0) -> ExitLogits:
    """As `population`, every layer skipped by about a third of the rows."""
    skipped = torch.rand(rows, 4, generator=torch.Generator().manual_seed(seed + 1)) < 1 / 3
    return dataclasses.replace(population(rows, seed), skipped=skipped)


def plain_exit(records: ExitLogits, row: int, settings: ExitConfig) -> int:
    """0-based exit of one row, exit by exit."""
    rule = settings.build_criterion(4, SINGLE)
    for exit in range(3):
        asked = settings.is_checked(exit + 1) and not records.skipped[row, exit]
        if asked and rule.leaves(records.logits[row : row + 1, exit : exit + 1], exit):
            return exit
    return 3


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("criterion", ["entropy", "entropy_nats", "confidence", "margin"])
def test_rows_leave_only_at_exits_behind_layers_that_they_run_and_no_later_under_bolder_settings(criterion, per_exit):
    records = skipping(150)
    replay = ExitReplay(records, GATED)
    losses = replay.losses("max_disagreement") if per_exit else None
    path = candidate_settings(records, GATED, criterion, temperatures=[0.5, 1.0, 2.0, 1.0], losses=losses)
    exits = torch.stack([replay.at(settings).exit_index for settings in path])
    for position in (*range(0, len(path), 25), -1):
        assert exits[position].tolist() == [plain_exit(records, row, path[position]) for row in range(150)]
    assert (exits[1:] <= exits[:-1]).all() and (exits[0] == 3).all()
    ran = ~records.skipped[:, :3]
    first = torch.where(ran.any(1), ran.int().argmax(1), 3)
    assert torch.equal(exits[-1], first)


def test_a_threshold_per_exit_keeps_to_the_level_among_the_rows_that_the_exit_is_asked_about():
    records = skipping(200)
    path = candidate_settings(records, GATED, "entropy", losses=ExitReplay(records, GATED).losses("max_disagreement"))
    entropies = torch.distributions.Categorical(logits=records.logits.double()).entropy()
    answers, remaining, left = records.logits.argmax(-1), set(range(200)), []
    for exit in range(3):  # the first level is 0: no flip at all
        asked = sorted(
            (row for row in remaining if not records.skipped[row, exit]), key=lambda row: entropies[row, exit]
        )
        flips = [bool(answers[row, exit] != answers[row, 3]) for row in asked]
        leaving = asked[: flips.index(True)] if True in flips else asked
        remaining -= set(leaving)
        left.append(len(leaving))
    found = torch.bincount(ExitReplay(records, GATED).at(path[1]).exit_index, minlength=4).tolist()
    assert found[:3] == left and min(left) > 0


def test_an_exits_temperature_is_fitted_to_the_rows_that_it_is_asked_about():
    records = population(300)
    asked = torch.rand(300, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    asked[:, 2] = torch.arange(300) < 19  # too few
    found = fit_temperatures(records, SINGLE, asked.numpy())
    for exit in (0, 1, 3):
        own = asked[:, exit]
        alone = ExitLogits(records.logits[own, exit : exit + 1], records.seq_lengths[own], records.labels[own])
        assert found[exit] == fit_temperatures(alone, SINGLE)[0]
    assert found[2] == 1.0 != fit_temperatures(records, SINGLE)[2]


@pytest.mark.parametrize(
    "goal", [{"max_disagreement": 5.0}, {"max_accuracy_drop": 2.0}, {"target_speedup": 1.2}], ids=str
)
@pytest.mark.parametrize("per_exit", [False, True])
def test_what_is_chosen_and_seen_is_of_the_rows_own_paths(goal, per_exit):
    records = skipping(300)
    settings = choose_exit_config(records, GATED, "accuracy", search=ExitSearch(per_exit=per_exit), **goal)
    exits = torch.tensor([plain_exit(records, row, settings) for row in range(300)])
    seen, answers = settings.calibration, records.logits.argmax(-1)
    early, full = answers[torch.arange(300), exits], answers[:, -1]
    assert seen["disagreement"] == pytest.approx((early != full).float().mean().item())
    assert seen["early_exit"] == pytest.approx((early == records.labels).float().mean().item())
    assert seen["mean_exit_layer"] == pytest.approx((exits + 1).float().mean().item())
    asked = [layer for layer in (1, 2, 3) if settings.is_checked(layer)] + [4]
    spent = [
        mean_flops(GATED, layers, records.seq_lengths, own, records.skipped)
        for layers, own in ((torch.full((300,), 4), [4]), (exits + 1, asked))
    ]
    assert seen["speedup_over_full_depth"] == pytest.approx(spent[0] / spent[1])
    assert seen["skip_threshold"] == 0.5
    assert seen["speedup_over_full_depth"] >= goal.get("target_speedup", 1.05)


@pytest.mark.parametrize("goal", [{"max_disagreement": 5.0}, {"max_accuracy_drop": 2.0}], ids=str)
def test_rows_that_skip_every_layer_show_nothing_so_nobody_leaves(goal):
    """All settings cost and lose the same on them; a later row that runs a layer is to be sure before it leaves."""
    collapsed = dataclasses.replace(skipping(50), skipped=torch.ones(50, 4, dtype=torch.bool))
    settings = choose_exit_config(collapsed, GATED, "accuracy", **goal)
    assert settings.threshold == 0.0


def test_a_promise_counts_the_losses_of_the_rows_own_paths():
    records = skipping(3000)
    settings = choose_exit_config(records, GATED, "accuracy", max_disagreement=5.0, guarantee=True)
    promise, (_, testing) = settings.calibration["promise"], split_rows(records.row_keys)
    held = records.select(testing)
    exits = torch.tensor([plain_exit(held, row, settings) for row in range(len(testing))])
    answers = held.logits.argmax(-1)
    assert promise["flips"] == int((answers[torch.arange(len(testing)), exits] != answers[:, -1]).sum()) > 0


def test_a_gated_model_is_not_calibrated_by_time_or_by_patience():
    times = ExitTimes([1.0, 2.0, 3.0, 4.0], 0.1, batch_size=1, threads=1, precision="float32", hardware={})
    with pytest.raises(ValueError, match="Calibrating by time needs a model whose rows all run the same layers"):
        choose_exit_config(skipping(100), GATED, "accuracy", max_latency_ms=3.0, exit_times=times)
    with pytest.raises(
        ValueError, match=r"The patience criterion .*Use the entropy.*from_pretrained\(\.\.\., skip_gates=None"
    ):
        choose_exit_config(
            skipping(100), GATED, "accuracy", max_disagreement=3.0, search=ExitSearch(criterion="patience")
        )


def gated_regression() -> tuple[ExitLogits, CostEffConfig]:
    skipped = torch.tensor([[False, True, False, False]]).repeat(5, 1)
    return dataclasses.replace(regression_records(), skipped=skipped), tiny_config(num_labels=1, skip_gates="linear")


def test_gated_regression_is_refused_before_anything_runs():
    records, config = gated_regression()
    message = r"There is no other criterion for regression\. Load the model without them: .*skip_gates=None"
    with pytest.raises(ValueError, match=message):
        check_goal(config, "spearman", max_metric_drop=5.0)
    with pytest.raises(ValueError, match=message):
        choose_exit_config(records, config, "spearman", max_metric_drop=5.0)


def test_the_curve_of_gated_regression_is_full_depth_alone():
    records, config = gated_regression()
    [point] = exit_curve(records, config, "spearman")
    assert (point.metric, point.mean_exit_layer, point.speedup) == (pytest.approx(1.0), 4.0, 1.0)


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("goal", ["target_speedup", "max_disagreement"])
def test_no_row_leaves_later_along_any_path(goal, per_exit):
    replay = ExitReplay(skipping(150), GATED)
    paths = ExitSearch(per_exit=per_exit).paths(replay, goal)
    for path in paths:
        exits = torch.stack([replay.at(settings).exit_index for part in path for settings in part])
        assert (exits[1:] <= exits[:-1]).all()
    assert max(map(len, paths)) == (2 if goal == "target_speedup" else 1)


def test_few_rows_for_a_temperature_are_told(caplog):
    asked = np.ones((300, 4), dtype=bool)
    fit_temperatures(population(300), SINGLE, asked)
    asked[19:, 2] = False
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "hf_costeff.calibration"):
        fit_temperatures(population(300), SINGLE, asked)
    [record] = caplog.records
    assert record.getMessage().startswith("Exits 3 of 4, counted from 1, are asked about fewer than 20 rows")


def test_the_reference_of_losses_is_named_where_rows_skip():
    settings = choose_exit_config(skipping(3000), GATED, "accuracy", max_disagreement=5.0, guarantee=True)
    seen = settings.calibration
    assert "the early answer differs from that of full depth with its gates. " in describe_promise(seen["promise"])
    assert "at full depth with its gates, " in describe_seen(seen)
    plain = choose_exit_config(population(3000), DEEP, "accuracy", max_disagreement=5.0, guarantee=True).calibration
    assert "differs from that of full depth. " in describe_promise(plain["promise"])
    assert "gates" not in describe_seen(plain)
    old = {name: value for name, value in plain["promise"].items() if name != "reference"}  # made by earlier versions
    assert describe_promise(old) == describe_promise(plain["promise"])


# --- losses against another model


def against(records: ExitLogits, share: float) -> ExitLogits:
    """With a reference that answers as full depth does, but for a share of the rows, where it is right."""
    logits = records.logits[:, -1].clone()
    wrong = (logits.argmax(-1) != records.labels).nonzero().squeeze(-1)[: round(share * len(records.labels))]
    logits[wrong, records.labels[wrong]] = 50.0
    return dataclasses.replace(records, reference=ReferenceLogits("org/teacher", logits))


def lost_to_reference(records: ExitLogits, settings: ExitConfig) -> np.ndarray:
    """By hand: rows that the reference has right and early exit wrong."""
    exits = simulate_exits(records.logits, settings, DEEP.exit_layers, SINGLE)
    early = records.logits.argmax(-1)[torch.arange(len(exits)), exits]
    answered = records.reference.logits.argmax(-1)
    return ((answered == records.labels) & (early != records.labels)).numpy()


@pytest.mark.parametrize("goal", ["max_accuracy_drop", "max_metric_drop", "max_disagreement"])
def test_losses_against_a_reference_leave_less_room_than_those_against_full_depth(goal):
    records = against(population(900), 0.02)
    limit = {goal: 4.0}
    settings = choose_exit_config(records, DEEP, "accuracy", **limit)
    seen, answered = settings.calibration, records.reference.logits.argmax(-1)
    exits = simulate_exits(records.logits, settings, DEEP.exit_layers, SINGLE)
    early = records.logits.argmax(-1)[torch.arange(900), exits]
    reference_metric, metric = ((each == records.labels).double().mean().item() for each in (answered, early))
    assert seen["reference_metric"] == pytest.approx(reference_metric) and seen["early_exit"] == pytest.approx(metric)
    assert seen["disagreement"] == pytest.approx((early != answered).double().mean().item())
    lost = seen["disagreement"] if goal == "max_disagreement" else reference_metric - metric
    assert 0.035 < lost <= 0.04 + 1e-9
    alone = choose_exit_config(dataclasses.replace(records, reference=None), DEEP, "accuracy", **limit).calibration
    assert alone["mean_exit_layer"] < seen["mean_exit_layer"] and alone["early_exit"] <= seen["early_exit"]
    assert f"accuracy {reference_metric:.4f} of org/teacher, {seen['full_depth']:.4f} at full depth" in describe_seen(
        seen
    )


@pytest.mark.parametrize("goal", ["max_accuracy_drop", "max_metric_drop", "max_disagreement"])
def test_a_loss_that_full_depth_exceeds_is_refused_with_what_it_loses(goal):
    records = against(population(500), 0.02)
    message = f"`{goal}` is 1.9, and full depth itself loses 2.00 points against org/teacher. Settings are tried from"
    with pytest.raises(UnreachableGoalError, match=message):
        choose_exit_config(records, DEEP, "accuracy", **{goal: 1.9})


def test_what_differs_from_a_reference_needs_no_labels():
    records = dataclasses.replace(against(population(500), 0.02), labels=None)
    seen = choose_exit_config(records, DEEP, "accuracy", max_disagreement=5.0).calibration
    assert "reference_metric" not in seen and 0.02 <= seen["disagreement"] <= 0.05
    assert describe_seen(seen).startswith(f"On 500 rows: {seen['disagreement']:.2%} answer otherwise than org/teacher,")


def test_a_promise_against_a_reference_counts_what_full_depth_loses_too():
    records = against(population(3000), 0.01)
    settings = choose_exit_config(records, DEEP, "accuracy", max_accuracy_drop=3.0, guarantee=True)
    promise, (_, testing) = settings.calibration["promise"], split_rows(records.row_keys)
    assert promise["flips"] == lost_to_reference(records, settings)[testing].sum()
    assert promise["flips"] > lost_to_reference(records, ExitConfig(threshold=0.0))[testing].sum() > 0
    assert "org/teacher is right and the early answer wrong" in describe_promise(promise)
    assert settings.calibration["mean_exit_layer"] < 4


def test_full_depth_itself_is_promised_against_a_reference_only_if_it_was_tested():
    """Against itself it loses nothing, and needs no test; against another model it may lose too much."""
    records = against(population(900), 0.02)
    seen = choose_exit_config(records, DEEP, "accuracy", max_accuracy_drop=2.0, guarantee=True).calibration
    _, testing = split_rows(records.row_keys)
    lost = lost_to_reference(records, ExitConfig(threshold=0.0))[testing].sum()
    assert "promise" not in seen and seen["mean_exit_layer"] == 4.0
    assert (
        f"Cannot promise at most 2 points with probability 0.9: full depth itself loses {lost} of 600"
        in (seen["no_promise"])
    )
    worthless = population(900)  # exits that lose all: nothing but full depth can be promised
    worthless.logits[:, :-1] = 0.0
    settings = choose_exit_config(against(worthless, 0.005), DEEP, "accuracy", max_accuracy_drop=2.0, guarantee=True)
    promise = settings.calibration["promise"]
    assert settings.calibration["mean_exit_layer"] == 4.0
    assert promise["flips"] == lost_to_reference(against(worthless, 0.005), settings)[testing].sum()


THREE = tiny_config(num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=2)


def three_exits(sureness_of_the_first: list[float]) -> ExitLogits:
    """The first exit is as sure as stated, wrong where that is negative; the second is always right and less sure."""
    labels = torch.arange(100) % 2
    sign = (2 * labels - 1).float()
    first = sign * torch.tensor(sureness_of_the_first).repeat(25)
    values = torch.stack([first, 1.0 * sign, 5 * sign], dim=1)
    return ExitLogits(torch.stack([-values, values], -1), torch.full((100,), LENGTH), labels)


@pytest.mark.parametrize("goal", [{"max_accuracy_drop": 0.0}, {"target_speedup": 1.3}])
@pytest.mark.parametrize("criterion", ["entropy", "margin", "patience"])
def test_an_exit_that_is_sure_and_wrong_is_not_checked(criterion, goal):
    records = three_exits([4.0, 4.0, -4.0, -4.0])
    settings = choose(records, THREE, "accuracy", search=ExitSearch(criterion, fit_temperatures=False), **goal)
    assert settings.checked_exits == [2]
    assert (settings.calibration["mean_exit_layer"], settings.calibration["early_exit"]) == (2.0, 1.0)


def test_a_promise_may_leave_exits_unchecked_too():
    small = three_exits([4.0, 4.0, -4.0, -4.0])
    parts = (small.logits, small.seq_lengths, small.labels)
    records = ExitLogits(*(torch.cat([part] * 9) for part in parts), range(900))
    settings = choose_exit_config(records, THREE, "accuracy", max_disagreement=1.0, guarantee=True)
    assert settings.checked_exits == [2] and settings.calibration["mean_exit_layer"] == 2.0
    assert settings.calibration["promise"]["flips"] == 0


def test_thresholds_per_exit_save_more_than_one_for_all_where_exits_differ_in_what_their_sureness_is_worth():
    """Half the rows may leave at the first exit, at a limit that lets nobody leave at the second."""
    records = three_exits([6.0, 6.0, -4.0, -4.0])
    layers = [
        choose(records, THREE, "accuracy", max_accuracy_drop=0.0, search=ExitSearch(None, per_exit, False)).calibration[
            "mean_exit_layer"
        ]
        for per_exit in (False, True)
    ]
    assert layers == [2.0, 1.5]


# --- temperatures

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def honest(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, 3) and labels drawn from just the probabilities they state."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 3, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def test_temperatures_undo_a_scaling_of_honest_logits():
    logits, labels = honest(20_000)
    scales = (0.25, 1.0, 3.0)
    records = ExitLogits(torch.stack([scale * logits for scale in scales], 1), torch.ones(20_000), labels)
    assert fit_temperatures(records, SINGLE) == pytest.approx(scales, rel=0.03)


def test_multi_label_temperatures_undo_a_scaling_too():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(10_000, 2, generator=generator)
    labels = (torch.rand(10_000, 2, generator=generator) < logits.sigmoid()).float()
    records = ExitLogits(torch.stack([2 * logits, logits], 1), torch.ones(10_000), labels)
    assert fit_temperatures(records, MULTI) == pytest.approx([2.0, 1.0], rel=0.05)


def test_without_labels_exits_are_fitted_to_the_answers_of_full_depth_and_the_last_keeps_1():
    records = population(500)
    answers = dataclasses.replace(records, labels=records.logits[:, -1].argmax(-1))
    *expected, _ = fit_temperatures(answers, SINGLE)
    assert fit_temperatures(dataclasses.replace(records, labels=None), SINGLE) == [*expected, 1.0]


def test_temperatures_are_fitted_first_and_stored():
    settings = choose_exit_config(population(500), DEEP, "accuracy", max_accuracy_drop=1.0)
    assert settings.temperatures == fit_temperatures(population(500), SINGLE)


# --- disagreement


def test_disagreement_needs_no_labels_and_keeps_to_the_share():
    records = dataclasses.replace(population(400), labels=None)
    settings = choose_exit_config(records, DEEP, "accuracy", max_disagreement=5.0)
    exits = simulate_exits(records.logits, settings, DEEP.exit_layers, SINGLE)
    answers = records.logits.argmax(-1)
    differ = (answers[torch.arange(400), exits] != answers[:, -1]).float().mean().item()
    assert settings.calibration["disagreement"] == pytest.approx(differ)
    assert 0.04 < differ <= 0.05 + 1e-6 and "metric" not in settings.calibration


def test_a_drop_in_accuracy_counts_net_without_a_guarantee():
    drop = choose(records_of(ROWS), CONFIG, "accuracy", max_accuracy_drop=10.0)
    same = choose(records_of(ROWS), CONFIG, "accuracy", max_metric_drop=10.0)
    assert drop.threshold == same.threshold == 0.72


# --- the guarantee

GOALS = ["max_accuracy_drop", "max_disagreement"]
SEARCHES = [
    ExitSearch(),
    ExitSearch("margin", fit_temperatures=False),
    ExitSearch(per_exit=True),
    ExitSearch("patience"),
]


@given(
    seed=st.integers(0, 10**6),
    goal=st.sampled_from(GOALS),
    search=st.sampled_from(SEARCHES),
    limits=st.tuples(st.floats(0.5, 40.0), st.floats(0.5, 40.0)),
    guarantee=st.booleans(),
)
@hypothesis.example(
    seed=15898, goal="max_disagreement", search=ExitSearch("patience"), limits=(5.0, 7.0), guarantee=False
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_bolder_goal_never_saves_less(seed, goal, search, limits, guarantee):
    records = population(240, seed)
    if guarantee:  # each goal chooses the exits to check for itself
        search = dataclasses.replace(search, checked_exits=[1, 2, 3])
    careful, bold = (
        choose_exit_config(records, DEEP, "accuracy", **{goal: limit}, search=search, guarantee=guarantee)
        for limit in sorted(limits)
    )
    saved, saved_more = (settings.calibration["speedup_over_full_depth"] for settings in (careful, bold))
    assert saved_more >= saved - 1e-12
    if careful.checked_exits == bold.checked_exits:  # other exits may save more on long rows, with more layers a row
        assert bold.calibration["mean_exit_layer"] <= careful.calibration["mean_exit_layer"]


@given(seed=st.integers(0, 10**6), goal=st.sampled_from(GOALS), search=st.sampled_from(SEARCHES), data=st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_neither_the_order_of_the_rows_nor_that_of_the_classes_matters(seed, goal, search, data):
    records = population(240, seed)
    rows = data.draw(st.permutations(range(240)))
    classes = data.draw(st.permutations(range(3)))
    relabelled = dataclasses.replace(
        records, logits=records.logits[:, :, classes], labels=torch.tensor(classes).argsort()[records.labels]
    )
    promise, again, renamed = (
        choose_exit_config(given_rows, DEEP, "accuracy", **{goal: 8.0}, search=search, guarantee=True).calibration
        for given_rows in (records, reordered(records, rows), relabelled)
    )
    for other in (again, renamed):
        assert other.get("promise") == promise.get("promise")
        assert other["mean_exit_layer"] == pytest.approx(promise["mean_exit_layer"])
        assert other["early_exit"] == pytest.approx(promise["early_exit"])


def test_a_promise_states_what_was_tested_and_on_which_rows():
    records = population(900)
    search = ExitSearch(fit_temperatures=False)
    settings = choose_exit_config(records, DEEP, "accuracy", max_accuracy_drop=4.0, guarantee=True, search=search)
    promise = settings.calibration["promise"]
    _, testing = split_rows(records.row_keys)
    exits = simulate_exits(records.logits, settings, DEEP.exit_layers, SINGLE)
    answers = records.logits.argmax(-1)
    right = answers == records.labels[:, None]
    lost = right[:, -1] & ~right[torch.arange(900), exits]
    assert promise["flips"] == int(lost[testing].sum()) > 0 and promise["rows"] == len(testing) == 600
    assert (promise["loss"], promise["epsilon"], promise["delta"]) == ("max_accuracy_drop", 0.04, 0.1)
    assert binomtest(promise["flips"], 600, 0.04, alternative="less").pvalue <= 0.1
    assert settings.calibration["mean_exit_layer"] < 4


def test_too_few_rows_for_a_promise_fall_back_to_full_depth_and_say_how_many_would_do():
    settings = choose_exit_config(population(300), DEEP, "accuracy", max_disagreement=1.0, guarantee=True)
    assert "takes 344 rows at least, 230 of them to test on, and there are 300" in settings.calibration["no_promise"]
    assert settings.calibration["mean_exit_layer"] == 4.0 and "promise" not in settings.calibration


def test_exits_that_are_no_good_fall_back_to_full_depth_and_more_rows_do_not_help():
    records = population(900)
    records.logits[:, :-1] = torch.randn(900, 3, 3, generator=torch.Generator().manual_seed(3))
    settings = choose_exit_config(
        records, DEEP, "accuracy", max_disagreement=2.0, guarantee=True, search=ExitSearch("patience")
    )
    assert "the most careful setting loses" in settings.calibration["no_promise"]
    assert "more rows would not help" in settings.calibration["no_promise"]
    assert settings.calibration["mean_exit_layer"] == 4.0 and settings.calibration["disagreement"] == 0.0


FOUR_TIMES = ExitTimes([1.0, 2.0, 3.0, 4.0], 0.1, batch_size=1, threads=1, precision="float32", hardware={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_metric_drop": 1.0}, "A guarantee is asked for `max_metric_drop`, and there is none.*`max_disagreement`"),
        ({"target_speedup": 1.5}, "A guarantee is asked for `target_speedup`"),
        ({"max_latency_ms": 1.5, "exit_times": FOUR_TIMES}, "A guarantee is asked for `max_latency_ms`"),
        ({"max_disagreement": 0.0}, "`max_disagreement` is 0 points. A guarantee needs a number above 0 and below 100"),
        ({"max_accuracy_drop": 100.0}, "`max_accuracy_drop` is 100 points"),
        ({"max_accuracy_drop": 1.0, "delta": 0.0}, "`delta` is 0. It must lie above 0 and below 1"),
        ({"max_accuracy_drop": 1.0, "delta": 1.0}, "`delta` is 1. It must lie"),
    ],
)
def test_a_guarantee_is_for_losses_of_one_row_and_rates_within_0_and_1(changes, message):
    with pytest.raises(ValueError, match=message):
        choose_exit_config(population(100), DEEP, "accuracy", guarantee=True, **changes)


def test_a_guarantee_needs_one_key_per_row():
    for keys, found in ((None, "None"), ([1, 2], "of 2 rows")):
        records = dataclasses.replace(population(100), row_keys=keys)
        with pytest.raises(ValueError, match=rf"`row_keys` is {found}. A guarantee splits 100 rows"):
            choose_exit_config(records, DEEP, "accuracy", max_disagreement=1.0, guarantee=True)


def share_broken(guarantee: bool, epsilon: float, runs: int) -> tuple[float, float]:
    """Shares of samples from a known population whose settings lose more than `epsilon` there, and that fell back."""
    pool, size = population(5_000, seed=9), 400
    whole = ExitReplay(pool, DEEP)
    losses = whole.losses("max_disagreement")
    search = ExitSearch(fit_temperatures=False)
    broken = fell_back = 0
    for run in range(runs):
        rows = torch.randint(5_000, (size,), generator=torch.Generator().manual_seed(run)).tolist()
        sample = reordered(pool, rows)
        goal = {"max_disagreement": 100 * epsilon}
        settings = choose_exit_config(sample, DEEP, "accuracy", **goal, search=search, guarantee=guarantee)
        broken += whole.at(settings).total(losses) / 5_000 > epsilon
        fell_back += "no_promise" in settings.calibration
    return broken / runs, fell_back / runs


def test_promises_are_broken_no_more_often_than_stated_and_a_plain_sweep_is_more_often():
    runs, delta = 300, 0.1
    broken, fell_back = share_broken(True, 0.02, runs)
    assert broken <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert broken > 0 and fell_back < 0.5  # neither by never promising
    plain, _ = share_broken(False, 0.02, 100)
    assert plain > 2 * broken and plain > 0.3


@pytest.mark.parametrize("goal", [{"max_accuracy_drop": 0.5, "guarantee": True}, {"max_metric_drop": 0.5}])
def test_ten_thousand_rows_of_six_exits_take_under_five_seconds(goal):
    records = population(10_000, exits=6, labels=2)
    start = time.process_time()
    choose_exit_config(
        records,
        tiny_config(num_hidden_layers=6, num_attention_heads=2, intermediate_size=16, num_labels=2),
        "accuracy",
        **goal,
    )
    assert time.process_time() - start < 5
