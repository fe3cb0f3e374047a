"""Exit thresholds on hand-made logits, where the right one is known, and against a plain loop over rows."""

from __future__ import annotations

import json
import math

import pytest
import torch

from helpers import tiny_config
from hf_costeff.calibration import (
    ExitLogits,
    candidate_settings,
    choose_exit_config,
    exit_curve,
    exit_outcome,
)
from hf_costeff.exit_criteria import ExitConfig

CONFIG = tiny_config(num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2)
LENGTH = 8

# (probability the first exit gives to its answer, whether it is right), sure to unsure; the last exit is always right.
# Normalised entropies: 0.081, 0.286, 0.469, 0.722, 0.971.
ROWS = [(0.99, True)] * 4 + [(0.95, False)] + [(0.9, True)] * 3 + [(0.8, False)] + [(0.6, True)]


def logits_for(probability: float, answer: int) -> list[float]:
    logit = math.log(probability / (1 - probability))
    return [0.0, logit] if answer else [logit, 0.0]


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
        flops += flops_at(1, 1) if leaves else flops_at(2, 2)
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
    settings = choose_exit_config(records_of(ROWS), CONFIG, "accuracy", max_metric_drop=drop)
    assert (settings.criterion, settings.threshold) == ("entropy", threshold)
    _, _, flops = plain_outcome(ROWS, threshold)
    assert settings.calibration == {
        "goal": {"max_metric_drop": drop},
        "metric": "accuracy",
        "rows": 10,
        "full_depth": 1.0,
        "early_exit": pytest.approx(accuracy),
        "mean_exit_layer": pytest.approx(layer),
        "speedup_over_full_depth": pytest.approx(FULL_DEPTH / flops),
    }


def test_a_bolder_threshold_does_not_count_if_a_more_careful_one_drops_too_much():
    """The 0.9 rows repair at the first exit what the last gets wrong, so bolder thresholds look good again."""
    records = records_of(ROWS, last_right=[True] * 5 + [False] * 3 + [True] * 2)
    assert exit_outcome(records, ExitConfig(threshold=0.72), CONFIG, "accuracy").metric == pytest.approx(0.9)
    assert exit_outcome(records, None, CONFIG, "accuracy").metric == pytest.approx(0.7)
    settings = choose_exit_config(records, CONFIG, "accuracy", max_metric_drop=0.0)
    assert settings.threshold == 0.285


def test_if_the_first_exit_is_useless_nobody_leaves():
    settings = choose_exit_config(records_of([(0.999999, False)] * 6), CONFIG, "accuracy", max_metric_drop=0.0)
    assert settings.calibration["mean_exit_layer"] == 2.0
    outcome = exit_outcome(records_of([(0.999999, False)] * 6), settings, CONFIG, "accuracy")
    assert outcome.mean_exit_layer == 2.0 and outcome.metric == 1.0


# --- a speed-up

FINE_GRID = [step / 5000 for step in range(5001)]


@pytest.mark.parametrize("target", [0.5, 1.0, 1.1, 1.3, 1.6, 1.9])
def test_the_most_careful_threshold_that_reaches_the_speed_up_is_chosen(target):
    settings = choose_exit_config(records_of(ROWS), CONFIG, "accuracy", target_speedup=target)
    careful = next(t for t in FINE_GRID if FULL_DEPTH / plain_outcome(ROWS, t)[2] >= target)
    assert plain_outcome(ROWS, settings.threshold) == pytest.approx(plain_outcome(ROWS, careful))
    assert settings.calibration["goal"] == {"target_speedup": target}
    assert settings.calibration["speedup_over_full_depth"] >= target


def test_the_speed_up_may_be_measured_against_a_teacher():
    reference = 5.0 * FULL_DEPTH
    settings = choose_exit_config(records_of(ROWS), CONFIG, "accuracy", target_speedup=6.0, reference_flops=reference)
    careful = next(t for t in FINE_GRID if reference / plain_outcome(ROWS, t)[2] >= 6.0)
    assert plain_outcome(ROWS, settings.threshold) == pytest.approx(plain_outcome(ROWS, careful))
    assert settings.calibration["speedup_over_full_depth"] == pytest.approx(
        FULL_DEPTH / plain_outcome(ROWS, settings.threshold)[2]
    )


def test_a_speed_up_out_of_reach_says_the_largest():
    largest = FULL_DEPTH / flops_at(1, 1)
    with pytest.raises(ValueError, match=f"speed-up of 30 cannot be reached: .* it is {largest:.2f}"):
        choose_exit_config(records_of(ROWS), CONFIG, "accuracy", target_speedup=30)
    exactly = choose_exit_config(records_of(ROWS), CONFIG, "accuracy", target_speedup=largest)
    assert exactly.calibration["mean_exit_layer"] == 1.0


# --- other problem types


def test_multi_label_leaves_by_its_least_sure_label():
    config = tiny_config(num_labels=2, problem_type="multi_label_classification")
    sure, unsure = 8.0, 0.1
    first = [[sure, -sure], [sure, unsure], [unsure, -unsure]]
    last = [[sure, -sure], [sure, -sure], [-sure, sure]]
    logits = torch.tensor([[a, a, a, b] for a, b in zip(first, last, strict=True)])
    records = ExitLogits(logits, torch.full((3,), LENGTH), torch.tensor([[1, 0], [1, 0], [0, 1]]))
    settings = choose_exit_config(records, config, "accuracy", max_metric_drop=0.0)
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
    settings = choose_exit_config(regression_records(), config, "spearman", max_metric_drop=0.0)
    assert (settings.criterion, settings.patience, settings.threshold) == ("patience", 1, None)
    assert settings.tolerance > 0
    expected = [(1, 2, 3, 4)[index] for index in plain_regression_exits(settings.tolerance)]
    assert settings.calibration["mean_exit_layer"] == pytest.approx(sum(expected) / 5)
    assert settings.calibration["early_exit"] == pytest.approx(1.0)
    tolerances = [candidate.tolerance for candidate in candidate_settings(regression_records(), "regression")]
    bolder = [t for t in tolerances if t > settings.tolerance]
    outcome = exit_outcome(
        regression_records(), ExitConfig("patience", patience=1, tolerance=bolder[0]), config, "spearman"
    )
    assert outcome.metric < 1.0


def test_regression_reaches_a_speed_up_at_the_most_careful_tolerance():
    config = tiny_config(num_labels=1)
    settings = choose_exit_config(regression_records(), config, "spearman", target_speedup=1.2)
    careful = [
        c.tolerance for c in candidate_settings(regression_records(), "regression") if c.tolerance < settings.tolerance
    ]
    for tolerance in careful:
        attempt = ExitConfig("patience", patience=1, tolerance=tolerance)
        assert exit_outcome(regression_records(), attempt, config, "spearman").speedup < 1.2
    assert settings.calibration["speedup_over_full_depth"] >= 1.2


def test_with_the_boldest_tolerance_every_row_leaves_as_early_as_it_can():
    boldest = candidate_settings(regression_records(), "regression")[-1]
    outcome = exit_outcome(regression_records(), boldest, tiny_config(num_labels=1), "spearman")
    assert outcome.mean_exit_layer == 2.0  # one agreement needs two exits


def test_a_lower_mean_squared_error_is_no_drop_and_a_higher_one_is():
    config = tiny_config(num_labels=1)
    settings = choose_exit_config(regression_records(), config, "mse", max_metric_drop=0.1)
    assert settings.calibration["full_depth"] == 0.0
    assert settings.calibration["early_exit"] <= 0.001


@pytest.mark.parametrize(("num_labels", "metric"), [(1, "spearman"), (2, "accuracy")])
def test_a_model_with_one_exit_has_nothing_to_choose_and_says_full_depth(num_labels, metric):
    config = tiny_config(num_labels=num_labels, exit_layers=[4])
    labels = torch.tensor([0.0, 1.0, 0.0]) if num_labels == 1 else torch.tensor([0, 1, 0])
    logits = torch.randn(3, 1, num_labels, generator=torch.Generator().manual_seed(0))
    records = ExitLogits(logits, torch.full((3,), LENGTH), labels)
    settings = choose_exit_config(records, config, metric, max_metric_drop=0.0)
    assert settings.calibration["mean_exit_layer"] == 4.0


# --- bad input


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "`max_metric_drop` is None and `target_speedup` is None. Give exactly one"),
        ({"max_metric_drop": 1.0, "target_speedup": 2.0}, "Give exactly one"),
        ({"max_metric_drop": -0.5}, r"`max_metric_drop` is -0\.5\. It must be 0 or more, in points"),
        ({"max_metric_drop": math.nan}, "`max_metric_drop` is nan"),
        ({"target_speedup": 0.0}, r"`target_speedup` is 0\.0\. It must be above 0"),
        ({"target_speedup": math.nan}, "`target_speedup` is nan"),
    ],
)
def test_exactly_one_goal_in_its_range_is_needed(goal, message):
    with pytest.raises(ValueError, match=message):
        choose_exit_config(records_of(ROWS), CONFIG, "accuracy", **goal)


def test_rows_without_labels_or_no_rows_are_refused():
    records = records_of(ROWS)
    for bad in (
        ExitLogits(records.logits, records.seq_lengths),
        ExitLogits(records.logits[:0], records.seq_lengths[:0], records.labels[:0]),
    ):
        with pytest.raises(ValueError, match="needs held-out rows with labels, and there are none"):
            choose_exit_config(bad, CONFIG, "accuracy", max_metric_drop=1.0)


def test_an_unknown_metric_is_refused_naming_the_known_ones():
    with pytest.raises(ValueError, match=r"'bleu'.*accuracy, f1, matthews"):
        choose_exit_config(records_of(ROWS), CONFIG, "bleu", max_metric_drop=1.0)


def test_the_settings_are_plain_values_that_survive_json():
    settings = choose_exit_config(records_of(ROWS), CONFIG, "accuracy", max_metric_drop=0.0)
    assert ExitConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
