"""Metrics against numbers worked by hand, and the cases in which the textbook formula divides by zero."""

from __future__ import annotations

import doctest
import warnings

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from hf_costeff import metrics
from hf_costeff.metrics import (
    METRICS,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    check_metric,
    compute_metrics,
    f1,
    matthews,
)


def logits_of(classes: list[int], num_labels: int) -> np.ndarray:
    return np.eye(num_labels)[classes] * 3.0


def test_the_docstring_examples_hold():
    assert doctest.testmod(metrics).failed == 0


def test_binary_metrics_equal_the_counts_worked_by_hand():
    # predictions 1 1 1 0 0 0 against 1 1 0 0 0 1: tp 2, fp 1, fn 1, tn 2
    result = compute_metrics(logits_of([1, 1, 1, 0, 0, 0], 2), np.array([1, 1, 0, 0, 0, 1]), SINGLE_LABEL)
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert result["matthews"] == pytest.approx((2 * 2 - 1 * 1) / np.sqrt(3 * 3 * 3 * 3))


def test_f1_of_two_labels_is_that_of_class_one():
    result = compute_metrics(logits_of([0, 0, 0, 1], 2), np.array([0, 0, 0, 0]), SINGLE_LABEL)
    assert result["f1"] == 0.0


def test_f1_of_three_labels_is_the_mean_over_classes():
    # class 0: tp 1 fp 1 fn 0 -> 2/3; class 1: tp 0 fp 0 fn 1 -> 0; class 2: tp 1 -> 1
    result = compute_metrics(logits_of([0, 0, 2], 3), np.array([0, 1, 2]), SINGLE_LABEL)
    assert result["f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_f1_and_matthews_equal_scikit_learns_with_classes_missing_and_all(classes, rows):
    generator = np.random.default_rng(classes * rows)
    for _ in range(20):
        logits, labels = generator.normal(size=(rows, classes)), generator.integers(0, classes, rows)
        answered, average = logits.argmax(-1), "binary" if classes == 2 else "macro"
        assert f1(logits, labels) == pytest.approx(f1_score(labels, answered, average=average, zero_division=0.0))
        with warnings.catch_warnings(action="ignore"):
            assert matthews(logits, labels) == pytest.approx(matthews_corrcoef(labels, answered))


def test_multi_label_f1_is_micro_and_accuracy_is_exact_match():
    logits = np.array([[1.0, -1.0, 2.0], [-1.0, 0.5, -3.0]])
    labels = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    result = compute_metrics(logits, labels, MULTI_LABEL)
    assert result == {"f1": pytest.approx(2 * 3 / (2 * 3 + 0 + 1)), "accuracy": 0.5}


def test_regression_metrics_equal_numpy_on_values_and_on_ranks():
    predicted = np.array([[0.1], [2.0], [1.0], [9.0]])
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    result = compute_metrics(predicted, labels, REGRESSION)
    assert result["pearson"] == pytest.approx(np.corrcoef(predicted[:, 0], labels)[0, 1])
    assert result["spearman"] == pytest.approx(np.corrcoef([0, 2, 1, 3], labels)[0, 1])
    assert result["mse"] == pytest.approx((0.1**2 + 1 + 1 + 36) / 4)


@pytest.mark.parametrize(
    ("logits", "labels", "problem_type"),
    [
        (logits_of([1, 1, 1], 2), np.array([0, 1, 0]), SINGLE_LABEL),
        (logits_of([0, 0], 2), np.array([0, 0]), SINGLE_LABEL),
        (logits_of([2, 2, 2], 3), np.array([0, 1, 2]), SINGLE_LABEL),
        (np.full((3, 2), -1.0), np.zeros((3, 2)), MULTI_LABEL),
        (np.full((3, 1), 2.5), np.array([0.0, 1.0, 2.0]), REGRESSION),
        (np.array([[1.0], [2.0]]), np.array([4.0, 4.0]), REGRESSION),
        (np.array([[1.0]]), np.array([4.0]), REGRESSION),
        (np.array([[0.1], [0.1 + 1e-17], [0.1]]), np.array([0.0, 1.0, 2.0]), REGRESSION),
    ],
)
def test_constant_predictions_or_labels_give_finite_metrics_without_a_warning(logits, labels, problem_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute_metrics(logits, labels, problem_type)
    assert all(np.isfinite(value) for value in result.values())
    for name in {"matthews", "pearson", "spearman"} & set(result):
        assert result[name] == 0.0


def test_nearly_constant_predictions_give_a_finite_correlation_without_a_warning():
    predicted = 1.0 + np.array([0.0, 1.0, 2.0, 1.0]) * 2.3e-16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(METRICS[REGRESSION]["pearson"](predicted, np.arange(4.0)))


def test_the_default_metric_is_one_of_the_problem_types_own():
    assert {kind: metrics.default_metric(kind) for kind in METRICS} == {
        SINGLE_LABEL: "accuracy",
        MULTI_LABEL: "f1",
        REGRESSION: "spearman",
    }
    for kind in METRICS:
        check_metric(metrics.default_metric(kind), kind)


def test_an_unknown_metric_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match=r"'accuracy'.*spearman, pearson, mse"):
        check_metric("accuracy", REGRESSION)
    with pytest.raises(ValueError, match=r"'ranking'.*single_label_classification"):
        metrics.default_metric("ranking")


@pytest.mark.parametrize(
    ("logits", "labels", "problem_type"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), SINGLE_LABEL),
        (np.zeros((0, 2)), np.zeros(0, int), SINGLE_LABEL),
        (np.zeros((3, 2)), np.zeros(3), MULTI_LABEL),
        (np.zeros((3, 2)), np.zeros(3), REGRESSION),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(logits, labels, problem_type):
    with pytest.raises(ValueError, match=r"shape .* least one row"):
        compute_metrics(logits, labels, problem_type)


def test_non_finite_logits_are_refused_with_their_number_and_first_row():
    logits = np.array([[0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0]])
    with pytest.raises(ValueError, match=r"2 of 3 rows have non-finite logits \(first: row 1\)"):
        compute_metrics(logits, np.zeros(3, int), SINGLE_LABEL)


def test_the_bootstrap_of_a_model_against_itself_is_exactly_zero():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 2)), generator.integers(0, 2, 50)
    assert metrics.paired_bootstrap(metrics.accuracy, logits, logits, labels, samples=50) == (0.0, 0.0, 0.0)


def test_the_bootstrap_interval_of_an_accuracy_difference_has_the_binomial_width():
    # a is always right, b is wrong in 100 of 400 rows: the difference is a mean of 400 coins with p = 1/4
    labels = np.zeros(400, dtype=int)
    right, part = logits_of([0] * 400, 2), logits_of([1] * 100 + [0] * 300, 2)
    difference, low, high = metrics.paired_bootstrap(metrics.accuracy, right, part, labels, samples=2000, seed=1)
    half_width = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert difference == 0.25
    assert low == pytest.approx(0.25 - half_width, abs=0.006)
    assert high == pytest.approx(0.25 + half_width, abs=0.006)


def test_the_bootstrap_draws_the_same_rows_for_both_models():
    # both models are noisy, but b is a shifted by a constant: paired, the squared errors differ by a constant too
    generator = np.random.default_rng(0)
    errors = generator.choice([-1.0, 1.0], size=200)
    labels = np.zeros(200)

    def mean_value(logits: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean(logits))

    difference, low, high = metrics.paired_bootstrap(mean_value, errors + 0.5, errors, labels, samples=100)
    assert (difference, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_bootstrap_repeats_with_its_seed_and_refuses_unequal_rows():
    generator = np.random.default_rng(0)
    a, b, labels = generator.normal(size=(30, 2)), generator.normal(size=(30, 2)), generator.integers(0, 2, 30)
    first = metrics.paired_bootstrap(metrics.matthews, a, b, labels, samples=40, seed=3)
    assert first == metrics.paired_bootstrap(metrics.matthews, a, b, labels, samples=40, seed=3)
    assert first != metrics.paired_bootstrap(metrics.matthews, a, b, labels, samples=40, seed=4)
    with pytest.raises(ValueError, match="30 and 29 rows"):
        metrics.paired_bootstrap(metrics.matthews, a, b[:29], labels)
    with pytest.raises(ValueError, match="`samples` is 0"):
        metrics.paired_bootstrap(metrics.matthews, a, b, labels, samples=0)
