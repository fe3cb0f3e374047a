"""Task metrics on plain arrays: GLUE's usual numbers per problem type, and a paired bootstrap between two models.

Computed here and with scipy, because `evaluate.load` needs the network, and a search over exit thresholds asks for them
thousands of times. Every metric is finite for every input: a correlation with a constant side, which mathematics leaves
undefined, is 0.0 here (no association shown).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats

from .exit_criteria import MULTI_LABEL, REGRESSION, SINGLE_LABEL

MetricFunction = Callable[[np.ndarray, np.ndarray], float]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of rows whose largest logit is the label's.

    Args:
        logits: Shape (rows, labels).
        labels: Class indices, shape (rows,).

    >>> accuracy(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
    0.5
    """
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 when there are two labels (GLUE's, for MRPC and QQP), else the mean F1 over the classes seen.

    A class that nobody predicts has F1 0.0. Classes that occur neither in labels nor in predictions are not counted.

    Args:
        logits: Shape (rows, labels).
        labels: Class indices, shape (rows,).

    >>> f1(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), np.array([1, 0, 0])) == 2 / 3
    True
    """
    return f1_of(confusion_matrix(np.argmax(logits, axis=-1), labels, logits.shape[-1]))


def f1_of(confusion: np.ndarray) -> float:
    """[`f1`] from a [`confusion_matrix`]."""
    seen = confusion.sum(0) + confusion.sum(1)
    counted = np.arange(len(seen)) == 1 if len(seen) == 2 else seen > 0
    return float(np.mean(2 * confusion.diagonal()[counted] / np.maximum(seen[counted], 1)))


def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of predicted and true classes, in [-1, 1] (GLUE's metric for CoLA).

    0.0 when predictions or labels are constant. For more than two classes the R_K statistic (Gorodkin 2004).

    Args:
        logits: Shape (rows, labels).
        labels: Class indices, shape (rows,).
    """
    return matthews_of(confusion_matrix(np.argmax(logits, axis=-1), labels, logits.shape[-1]))


def matthews_of(confusion: np.ndarray) -> float:
    """[`matthews`] from a [`confusion_matrix`]."""
    predicted, true, rows = (confusion.sum(axis).astype(float) for axis in (0, 1, None))
    spread = (rows**2 - predicted @ predicted) * (rows**2 - true @ true)
    return float((np.trace(confusion) * rows - predicted @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def confusion_matrix(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Rows by true and by answered class, shape (classes, classes).

    Args:
        answers: Class indices, shape (rows,).
        labels: The true ones, shape (rows,).
        classes: How many there are.

    >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    pairs = np.asarray(labels, dtype=np.int64) * classes + answers
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def multi_label_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of rows in which every label is right (exact match); a label is predicted when its logit is above 0.

    Args:
        logits: Shape (rows, labels).
        labels: 0 or 1 per label, shape (rows, labels).
    """
    return float(np.mean(np.all((logits > 0) == (labels > 0.5), axis=-1)))


def multi_label_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Micro F1 over all rows and labels; a label is predicted when its logit is above 0 (probability above 0.5).

    0.0 when nothing is predicted and nothing is true.

    Args:
        logits: Shape (rows, labels).
        labels: 0 or 1 per label, shape (rows, labels).
    """
    predicted, true = logits > 0, labels > 0.5
    wrong_or_twice_right = int(predicted.sum()) + int(true.sum())
    return float(2 * int((predicted & true).sum()) / wrong_or_twice_right) if wrong_or_twice_right else 0.0


def pearson(logits: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of predictions and labels; 0.0 when one of them is constant or there are fewer than 2 rows.

    Args:
        logits: Predicted values, shape (rows, 1) or (rows,).
        labels: True values, shape (rows,) or (rows, 1).
    """
    return _correlation(stats.pearsonr, logits, labels)


def spearman(logits: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation of predictions and labels; 0.0 in the cases named at `pearson`.

    Args:
        logits: Predicted values, shape (rows, 1) or (rows,).
        labels: True values, shape (rows,) or (rows, 1).
    """
    return _correlation(stats.spearmanr, logits, labels)


def mse(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error, in squared label units. The only metric here of which less is better.

    Args:
        logits: Predicted values, shape (rows, 1) or (rows,).
        labels: True values, shape (rows,) or (rows, 1).
    """
    return float(np.mean((_column(logits) - _column(labels)) ** 2))


METRICS: dict[str, dict[str, MetricFunction]] = {
    SINGLE_LABEL: {"accuracy": accuracy, "f1": f1, "matthews": matthews},
    MULTI_LABEL: {"f1": multi_label_f1, "accuracy": multi_label_accuracy},
    REGRESSION: {"spearman": spearman, "pearson": pearson, "mse": mse},
}
"""Problem type -> metric name -> function of logits (rows, labels) and labels. The first name is the default."""

CONFUSION_METRICS: dict[str, Callable[[np.ndarray], float]] = {"f1": f1_of, "matthews": matthews_of}
"""Those of single-label problems that a search computes from a [`confusion_matrix`], without going back to logits."""

LOWER_IS_BETTER = frozenset({"mse"})
"""Names of the metrics of which less is better; of all others more is better."""


def default_metric(problem_type: str) -> str:
    """Name of the metric by which checkpoints and thresholds are chosen unless the user names another.

    Raises:
        ValueError: Unknown `problem_type`.

    >>> default_metric("regression")
    'spearman'
    """
    return next(iter(_metrics_of(problem_type)))


def check_metric(name: str, problem_type: str) -> None:
    """Nothing, if `name` is a metric of the problem type.

    Raises:
        ValueError: It is not; the message lists the valid names.
    """
    valid = _metrics_of(problem_type)
    if name not in valid:
        raise ValueError(f"The metric is {name!r}. For {problem_type} it must be one of: {', '.join(valid)}.")


def compute_metrics(logits: np.ndarray, labels: np.ndarray, problem_type: str) -> dict[str, float]:
    """Every metric of the problem type, by name; each is finite.

    Args:
        logits: Shape (rows, labels); for regression (rows, 1) or (rows,).
        labels: Class indices (rows,), 0/1 (rows, labels) for multi-label, values (rows,) for regression.
        problem_type: A key of `METRICS`.

    Raises:
        ValueError: No rows, shapes that do not fit each other, non-finite logits or labels, unknown `problem_type`.

    >>> compute_metrics(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 1]), "single_label_classification")
    {'accuracy': 1.0, 'f1': 1.0, 'matthews': 1.0}
    """
    functions = _metrics_of(problem_type)
    logits, labels = _checked(logits, labels, problem_type)
    return {name: function(logits, labels) for name, function in functions.items()}


def worse_by(before: float, after: float, metric: str) -> float:
    """How much of a metric was lost, positive if it is worse than before, also where less is better.

    >>> worse_by(0.5, 0.75, "mse"), worse_by(0.5, 0.75, "accuracy")
    (0.25, -0.25)
    """
    return after - before if metric in LOWER_IS_BETTER else before - after


def paired_bootstrap(
    metric_fn: MetricFunction,
    logits_a: np.ndarray,
    logits_b: np.ndarray,
    labels: np.ndarray,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much better model a is than model b on the same rows, with a 95% interval.

    The rows are drawn with replacement, the same ones for both models, so that what both find hard cancels out. If
    the interval holds 0, the rows do not tell the two apart (Efron and Tibshirani 1993, percentile interval).

    Args:
        metric_fn: A function of `METRICS`, or any other of logits and labels.
        logits_a: Logits of model a, shape (rows, labels).
        logits_b: Logits of model b, shape (rows, labels).
        labels: Shape (rows,) or (rows, labels).
        samples: Number of resamples, at least 1.
        seed: Seed of the resampling.

    Returns:
        (metric of a minus metric of b on all rows, 2.5th percentile, 97.5th percentile), in the metric's units.

    Raises:
        ValueError: No rows, row counts that differ, or `samples` below 1.
    """
    logits_a, logits_b, labels = np.asarray(logits_a), np.asarray(logits_b), np.asarray(labels)
    rows = len(labels)
    if not rows or len(logits_a) != rows or len(logits_b) != rows:
        raise ValueError(
            f"There are {len(logits_a)} and {len(logits_b)} rows of logits for {rows} labels. The three must be equal "
            "and above 0: evaluate both models on the same split."
        )
    if samples < 1:
        raise ValueError(f"`samples` is {samples}. It must be at least 1; 1000 is usual.")
    generator = np.random.default_rng(seed)
    differences = np.empty(samples)
    for sample in range(samples):
        drawn = generator.integers(0, rows, rows)
        differences[sample] = metric_fn(logits_a[drawn], labels[drawn]) - metric_fn(logits_b[drawn], labels[drawn])
    low, high = np.percentile(differences, [2.5, 97.5])
    return metric_fn(logits_a, labels) - metric_fn(logits_b, labels), float(low), float(high)


def _metrics_of(problem_type: str) -> dict[str, MetricFunction]:
    if problem_type not in METRICS:
        raise ValueError(f"`problem_type` is {problem_type!r}. It must be one of: {', '.join(METRICS)}.")
    return METRICS[problem_type]


def _checked(logits: np.ndarray, labels: np.ndarray, problem_type: str) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits), np.asarray(labels)
    if problem_type == REGRESSION:
        fits = logits.shape[:1] == labels.shape[:1] and logits.size == labels.size == len(labels)
    elif problem_type == MULTI_LABEL:
        fits = logits.ndim == 2 and logits.shape == labels.shape
    else:
        fits = logits.ndim == 2 and labels.shape == logits.shape[:1]
    if not fits or not labels.size:
        raise ValueError(
            f"Logits have shape {logits.shape} and labels {labels.shape}, which do not make a {problem_type} with at "
            "least one row. Expected (rows, labels) with (rows,), or (rows, labels) twice for multi-label."
        )
    for name, values in (("logits", logits), ("labels", labels)):
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{int((~finite).sum())} of {len(values)} rows have non-finite {name} (first: row "
                f"{int(np.argmin(finite))}). Metrics need finite numbers: if these are logits, training diverged, so "
                "lower the learning rate."
            )
    return logits, labels


def _column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _correlation(function: Callable, logits: np.ndarray, labels: np.ndarray) -> float:
    predicted, true = _column(logits), _column(labels)
    if len(true) < 2 or _is_constant(predicted) or _is_constant(true):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly constant input: answered by 0.0 below
        value = float(function(predicted, true).statistic)
    return value if np.isfinite(value) else 0.0


def _is_constant(values: np.ndarray) -> bool:
    """Whether values differ by no more than rounding, of which a correlation would be noise."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())
