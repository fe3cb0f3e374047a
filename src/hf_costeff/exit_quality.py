"""What every exit is worth on labelled rows, which rows early exit answers otherwise, and how sure the curve is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score
from torch import Tensor

from .exit_criteria import (
    MULTI_LABEL,
    REGRESSION,
    ExitConfig,
    decision_log_probabilities,
    spread,
)
from .exit_replay import ExitReplay
from .metrics import METRICS

BINS = 10
CURVE_POINTS = 25
RESAMPLES = 200


@dataclass(frozen=True)
class ReliabilityBin:
    """Decisions of about the same confidence.

    Args:
        confidence: Their mean confidence, a fraction.
        accuracy: The share of them that is right.
        count: How many there are.
    """

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class ExitQuality:
    """One exit, on the labelled rows that it is asked about: not those that skip its layer, but for the last exit.

    What needs probabilities is `None` or empty for regression, and everything where no row is asked.

    Args:
        layer: 1-based layer after which it stands.
        asked: Share of the rows that it is asked about, if none leave before.
        metric: The task metric if all these rows left here.
        share: Share of the rows that leave here under the exit settings.
        before: Reliability at temperature 1, least confident first.
        after: Reliability at the temperature of the exit settings.
        discrimination: Chance that a right decision is more confident than a wrong one (area under the ROC curve; the
            difficulty inversion score of CascadeBERT, Li et al. 2021). `None` where all are right or all are wrong.
    """

    layer: int
    asked: float
    metric: float | None
    share: float
    before: list[ReliabilityBin]
    after: list[ReliabilityBin]
    discrimination: float | None


@dataclass(frozen=True)
class CurvePoint:
    """Exit settings on the speed-accuracy curve.

    Args:
        flops_per_row: Mean FLOPs of a row at its own length.
        mean_exit_layer: Mean 1-based layer at which rows leave.
        metric: The task metric.
        low: 2.5th percentile of the metric over samples drawn from the rows with replacement.
        high: 97.5th percentile.
    """

    flops_per_row: float
    mean_exit_layer: float
    metric: float
    low: float
    high: float


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean gap of confidence and accuracy over the bins, weighted by their decisions (Guo et al. 2017, equation 5).

    Example:
        >>> expected_calibration_error([ReliabilityBin(0.5, 0.5, 1), ReliabilityBin(0.75, 0.25, 3)])
        0.375
    """
    return sum(part.count * abs(part.confidence - part.accuracy) for part in bins) / sum(part.count for part in bins)


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[ReliabilityBin]:
    """Decisions in ten bins of equal width over 0..1; empty bins are left out.

    Args:
        confidence: Of each decision, a fraction, shape (decisions,).
        right: Whether it is right, shape (decisions,).

    Example:
        >>> for part in reliability(np.array([0.5, 0.75, 0.75]), np.array([True, True, False])):
        ...     print(part)
        ReliabilityBin(confidence=0.5, accuracy=1.0, count=1)
        ReliabilityBin(confidence=0.75, accuracy=0.5, count=2)
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    parts = ((confidence[bins == number], right[bins == number]) for number in np.unique(bins))
    return [ReliabilityBin(float(sure.mean()), float(good.mean()), len(sure)) for sure, good in parts]


def exit_qualities(replay: ExitReplay, settings: ExitConfig, metric: str) -> list[ExitQuality]:
    """Every exit, shallow first.

    Args:
        replay: Labelled rows.
        settings: Exit settings, for their temperatures and for the share of rows.
        metric: See `hf_costeff.metrics.METRICS`.
    """
    records, shares = replay.records, replay.at(settings).exit_shares
    labels, layers = records.known_labels(), replay.config.exit_layers
    temperatures = spread("temperatures", settings.temperatures, len(layers))
    found = []
    for exit, (layer, temperature) in enumerate(zip(layers, temperatures, strict=True)):
        own = replay.askable[:, exit]
        logits, truth = records.logits[own, exit], labels[own]
        value = METRICS[replay.problem_type][metric](logits.numpy(), truth) if own.any() else None
        if replay.problem_type == REGRESSION or value is None:
            found.append(ExitQuality(layer, float(own.mean()), value, shares[exit], [], [], None))
            continue
        (before, right, _), (after, _, _) = (
            _decisions(scaled, truth, replay.problem_type) for scaled in (logits, logits / temperature)
        )
        area = difficulty_inversion_score(logits / temperature, truth, replay.problem_type)
        bins = [reliability(confidence, right) for confidence in (before, after)]
        found.append(ExitQuality(layer, float(own.mean()), value, shares[exit], bins[0], bins[1], area))
    return found


def difficulty_inversion_score(logits: Tensor, labels: np.ndarray, problem_type: str) -> float | None:
    """Chance that a right decision is more confident than a wrong one, in 0..1 (CascadeBERT, Li et al. 2021).

    The area under the ROC curve of confidence as a sign of being right, taken on log-odds in double precision: as
    probabilities very sure decisions would all be 1.

    Args:
        logits: Of one exit or one member, shape (rows, labels).
        labels: True labels, shape (rows,) or (rows, labels).
        problem_type: As upstream's `config.problem_type`.

    Returns:
        `None` where all decisions are right or all wrong, and for regression.

    Example: of the three pairs of a right and a wrong row, two are in order.

        >>> import torch
        >>> logits = torch.tensor([[5.0, 0.0], [1.0, 0.0], [9.0, 0.0], [2.0, 0.0]])
        >>> round(difficulty_inversion_score(logits, np.array([0, 0, 0, 1]), "single_label_classification"), 3)
        0.667
    """
    if problem_type == REGRESSION:
        return None
    _, right, odds = _decisions(logits, labels, problem_type)
    return None if right.all() or not right.any() else float(roc_auc_score(right, odds))


def _decisions(logits: Tensor, labels: np.ndarray, problem_type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, rightness and log-odds of every decision, shape (decisions,) each: one per row, or per row and label.

    The log-odds order decisions as the confidence does, and tell very sure ones apart that are all 1 as probabilities.
    """
    chances = decision_log_probabilities(logits.double(), problem_type)
    truth = labels > 0.5 if problem_type == MULTI_LABEL else labels[:, None]
    best, answered = chances.max(-1)
    others = chances.scatter(-1, answered.unsqueeze(-1), -np.inf).logsumexp(-1)
    right = (answered.numpy() == truth).ravel()
    return best.exp().numpy().ravel(), right, (best - others).numpy().ravel()


def curve_with_bands(replay: ExitReplay, path: Sequence[ExitConfig], metric: str, seed: int = 0) -> list[CurvePoint]:
    """The speed-accuracy curve along a path, with a 95% interval at each point (percentile bootstrap).

    The intervals hold point by point, not for the curve as a whole.

    Args:
        replay: Labelled rows.
        path: Settings from careful to bold; at most 25 of those that differ are shown, evenly spread.
        metric: See `hf_costeff.metrics.METRICS`.
        seed: Of the resampling.
    """
    distinct = [replay.at(settings) for part in replay.distinct(path) for settings in part]
    distinct.sort(key=lambda exits: exits.mean_flops)
    shown = [distinct[i] for i in np.unique(np.linspace(0, len(distinct) - 1, CURVE_POINTS).round().astype(int))]
    function, labels = METRICS[replay.problem_type][metric], replay.records.known_labels()
    generator = np.random.default_rng(seed)
    draws = [generator.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES)]
    points = []
    for exits in shown:
        logits = exits.logits.numpy()
        low, high = np.percentile([function(logits[rows], labels[rows]) for rows in draws], [2.5, 97.5])
        value = function(logits, labels)
        points.append(CurvePoint(exits.mean_flops, exits.mean_exit_layer, value, float(low), float(high)))
    return points


def flipped_rows(replay: ExitReplay, settings: ExitConfig) -> list[int]:
    """Positions of the rows that early exit answers otherwise than full depth; empty for regression.

    Args:
        replay: The rows; they need no labels.
        settings: Exit settings.
    """
    if replay.problem_type == REGRESSION:
        return []
    index = replay.at(settings).exit_index.numpy()
    return np.flatnonzero(replay.losses("max_disagreement")[np.arange(len(index)), index]).tolist()
