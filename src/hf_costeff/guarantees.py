"""Promises that hold on new data: exact binomial tests along a path of settings, from careful to bold.

Learn then Test (Angelopoulos et al. 2021, sections 2 and 4: fixed-sequence testing), as used for early exit by
Jazbec et al. 2024. A loss of 0 or 1 per row needs no approximation: its sum over rows is binomial.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom

FITTING_SHARE = 3  # one row in so many fits temperatures and the path; the others test it
MOST_ROWS = 1_000_000
LOSSES = {
    "max_accuracy_drop": "{reference} is right and the early answer wrong",
    "max_disagreement": "the early answer differs from that of {reference}",
}
FULL_DEPTH, GATED_FULL_DEPTH = "full depth", "full depth with its gates"


def split_rows(row_keys: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint parts of a sample, whatever order its rows stand in.

    Which part a row falls in depends on its own content and on the whole sample's, so that another sample is split
    afresh: a split by the row's content alone would test on one fixed half of the population and promise for that
    half only. Rows of equal content are told apart by their number.

    Args:
        row_keys: A digest of each row's content, shape (rows,).

    Returns:
        Positions of the rows to fit on, a third of all, and of those to test on, both ascending.

    Example:
        >>> fitting, testing = split_rows([11, 12, 13, 14, 15, 16])
        >>> len(fitting), len(testing), sorted(fitting.tolist() + testing.tolist())
        (2, 4, [0, 1, 2, 3, 4, 5])
    """
    keys = [int(key) for key in row_keys]
    sample = hashlib.sha256(repr(sorted(keys)).encode()).hexdigest()
    seen: dict[int, int] = {}
    digests = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        digests.append(hashlib.sha256(f"{sample} {key} {seen[key]}".encode()).digest())
    order = sorted(range(len(keys)), key=digests.__getitem__)
    count = len(keys) // FITTING_SHARE
    return np.array(sorted(order[:count]), dtype=int), np.array(sorted(order[count:]), dtype=int)


def p_value(flips: int, rows: int, epsilon: float) -> float:
    """Chance of so few losses if the true rate were `epsilon` or more.

    Args:
        flips: Rows that lost.
        rows: Rows looked at.
        epsilon: Rate, a fraction.

    Example:
        >>> p_value(0, 2, 0.5)
        0.25
    """
    return float(binom.cdf(flips, rows, epsilon))


def last_safe(flips: Sequence[int], rows: int, epsilon: float, delta: float) -> tuple[int, int] | None:
    """The boldest setting on a path whose loss rate is proved to be at most `epsilon`.

    Settings are tested in the given order, each at level `delta`, until the first that is not proved. With
    probability at least 1 - `delta`, every setting before that keeps to `epsilon` (fixed-sequence testing), if the
    path was laid without a look at these rows.

    Args:
        flips: Rows that lost under each setting, careful to bold.
        rows: Rows each was tested on.
        epsilon: Largest rate, a fraction above 0 and below 1.
        delta: Largest chance of a broken promise, above 0 and below 1.

    Returns:
        Position of the setting and its `flips`; `None` if not even the first is proved.

    Example: with 400 rows and 1%, one flip is few enough at delta 0.1 (p = 0.091) and two are not.

        >>> last_safe([0, 1, 2, 0], 400, 0.01, 0.1)
        (1, 1)
    """
    unproved = np.flatnonzero(binom.cdf(flips, rows, epsilon) > delta)
    proved = int(unproved[0]) if len(unproved) else len(flips)
    return (proved - 1, flips[proved - 1]) if proved else None


def zero_loss_rows(epsilon: float, delta: float) -> int:
    """Fewest rows to test on that can prove anything, when none of them loses: ln(delta) / ln(1 - epsilon).

    Example:
        >>> [zero_loss_rows(epsilon, 0.1) for epsilon in (0.005, 0.01, 0.02)]
        [460, 230, 114]
    """
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def rows_needed(epsilon: float, delta: float, flip_share: float) -> int | None:
    """About how many rows to test on prove a setting.

    Args:
        epsilon: Largest rate, a fraction.
        delta: Largest chance of a broken promise.
        flip_share: Share of the rows that will lose, a fraction above 0.

    Returns:
        Rows; `None` if a million are too few.

    Example:
        >>> rows_needed(0.01, 0.1, 0.01) is None, 500 < rows_needed(0.01, 0.1, 0.005) < 1000
        (True, True)
    """
    if flip_share >= epsilon:
        return None
    rows = np.unique(np.geomspace(1, MOST_ROWS, 2000).astype(int))
    enough = rows[binom.cdf(np.ceil(flip_share * rows), rows, epsilon) <= delta]
    return int(enough[0]) if len(enough) else None


def sample_needed(test_rows: int) -> int:
    """Smallest sample of which [`split_rows`] leaves so many rows to test on.

    Example:
        >>> sample_needed(460)
        689
    """
    sample = test_rows
    while sample - sample // FITTING_SHARE < test_rows:
        sample += 1
    return sample


def describe_promise(promise: Mapping[str, Any]) -> str:
    """A promise in a sentence.

    Args:
        promise: What `calibration` holds of an [`ExitConfig`] under `"promise"`.

    Example:
        >>> numbers = {"epsilon": 0.01, "delta": 0.1, "rows": 800, "flips": 2}
        >>> print(describe_promise({"loss": "max_disagreement", **numbers}))
        Promised for new rows of the same kind, with probability 0.9: for at most 1.00% of them the early answer differs
        from that of full depth. It was tested on 800 rows, of which 2 lost.
    """
    loss = LOSSES[promise["loss"]].format(reference=promise.get("reference", FULL_DEPTH))
    return (
        f"Promised for new rows of the same kind, with probability {1 - promise['delta']:g}: for at most "
        f"{promise['epsilon']:.2%} of them {loss}. It was tested on {promise['rows']:,} rows, of which "
        f"{promise['flips']:,} lost."
    )
