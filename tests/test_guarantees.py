"""Binomial promises against sums worked term by term, and a split that neither order nor content can bend."""

from __future__ import annotations

import math
import random

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_costeff.guarantees import (
    last_safe,
    p_value,
    rows_needed,
    sample_needed,
    split_rows,
    zero_loss_rows,
)


def at_most(flips: int, rows: int, rate: float) -> float:
    """Chance of at most `flips` losses in `rows`, term by term."""
    return sum(math.comb(rows, k) * rate**k * (1 - rate) ** (rows - k) for k in range(flips + 1))


@pytest.mark.parametrize(("flips", "rows", "epsilon"), [(0, 50, 0.02), (3, 200, 0.03), (7, 90, 0.1), (90, 90, 0.5)])
def test_a_p_value_is_the_chance_of_so_few_losses_at_the_rate_itself(flips, rows, epsilon):
    assert p_value(flips, rows, epsilon) == pytest.approx(at_most(flips, rows, epsilon))


@pytest.mark.parametrize(("epsilon", "rows"), [(0.005, 460), (0.01, 230), (0.02, 114)])
def test_the_fewest_rows_are_those_whose_zero_losses_prove_it(epsilon, rows):
    assert zero_loss_rows(epsilon, 0.1) == rows
    assert p_value(0, rows, epsilon) <= 0.1 < p_value(0, rows - 1, epsilon)


@pytest.mark.parametrize("share", [0.002, 0.005, 0.008])
def test_rows_that_lose_at_a_rate_below_epsilon_prove_it_if_there_are_enough(share):
    rows = rows_needed(0.01, 0.1, share)
    assert at_most(math.ceil(share * rows), rows, 0.01) <= 0.1
    assert at_most(math.ceil(share * rows / 2), rows // 2, 0.01) > 0.1


def test_a_rate_at_or_above_epsilon_is_never_proved():
    assert rows_needed(0.01, 0.1, 0.01) is None and rows_needed(0.01, 0.1, 0.5) is None
    assert rows_needed(0.01, 0.1, 0.00999) is None  # a million rows are too few


@pytest.mark.parametrize("tests", [1, 114, 230, 460])
def test_a_sample_is_just_large_enough_for_the_rows_to_test_on(tests):
    sample = sample_needed(tests)
    assert len(split_rows(range(sample))[1]) >= tests > len(split_rows(range(sample - 1))[1])


# --- the fixed sequence


def test_testing_stops_at_the_first_setting_that_is_not_proved():
    assert last_safe([0, 1, 9, 0], 400, 0.01, 0.1) == (1, 1)
    assert last_safe([9, 0, 0], 400, 0.01, 0.1) is None


def test_nothing_is_proved_by_too_few_rows_or_an_empty_path():
    assert last_safe([0, 0], 113, 0.02, 0.1) is None
    assert last_safe([0, 0], 114, 0.02, 0.1) == (1, 0)
    assert last_safe([], 1000, 0.02, 0.1) is None


def test_a_true_null_passes_with_chance_delta_at_most():
    """A path whose settings all lose at just epsilon: any choice breaks the promise."""
    generator = random.Random(0)
    runs, rows, epsilon, delta = 2000, 150, 0.04, 0.1
    broken = 0
    for _ in range(runs):
        worst = [generator.random() for _ in range(rows)]
        broken += last_safe([sum(draw < epsilon for draw in worst)] * 3, rows, epsilon, delta) is not None
    exact = at_most(2, rows, epsilon)  # the largest count with p <= delta
    assert at_most(3, rows, epsilon) > delta >= exact
    assert broken / runs == pytest.approx(exact, abs=3 * math.sqrt(exact / runs))


# --- the split


@given(keys=st.lists(st.integers(0, 20), max_size=40), data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_split_is_disjoint_complete_and_blind_to_the_order_of_the_rows(keys, data):
    fitting, testing = split_rows(keys)
    assert sorted([*fitting, *testing]) == list(range(len(keys))) and len(fitting) == len(keys) // 3
    order = data.draw(st.permutations(range(len(keys))))
    again, _ = split_rows([keys[row] for row in order])
    assert sorted(keys[order[row]] for row in again) == sorted(keys[row] for row in fitting)


def test_another_sample_splits_the_same_row_otherwise():
    """By its own content alone, a row would always stand on the same side, and half the population go untested."""
    tested = [0 in split_rows([7, *range(100 * run, 100 * run + 99)])[1] for run in range(1, 301)]
    assert sum(tested) / 300 == pytest.approx(2 / 3, abs=0.1)


def test_rows_of_equal_content_stand_on_both_sides():
    keys = [5] * 30 + [6] * 30
    for part in split_rows(keys):
        assert {keys[row] for row in part} == {5, 6}
