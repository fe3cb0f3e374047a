"""The monitor keeps to its false-alarm rate over a whole stream, sees a shift, and goes on after saving."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from helpers import random_batch, tiny_model
from hf_costeff import ExitConfig
from hf_costeff.exit_replay import ExitLogits
from hf_costeff.monitoring import BETS, ExitMonitor, RankMartingale

SHARES = [0.5, 0.3, 0.2]  # of rows leaving at layers 1, 2, 4


def live(generator: np.random.Generator, rows: int, shares=SHARES, sureness: float = 2.0):
    """Exit layers, and confidences whose log-odds lie around `sureness`."""
    layers = generator.choice([1, 2, 4], size=rows, p=shares)
    return layers, 1 / (1 + np.exp(-generator.normal(sureness, 1.0, rows)))


def test_every_bet_is_fair_and_never_loses_more_than_it_has():
    p = (np.arange(100_000) + 0.5) / 100_000
    for bet in BETS:
        stakes = np.array([bet(value) for value in p])
        assert stakes.mean() == pytest.approx(1.0) and stakes.min() >= 0


def test_the_wealth_is_that_of_one_bettor_per_starting_time():
    """A bettor who starts before step k holds 1/k - 1/(k + 1) of the money, spread over the bets; the others wait."""
    generator = np.random.default_rng(0)
    martingale, ranks, seen = RankMartingale([3, 1, 2]), [], [0, 0, 0, 1, 2, 2]
    for value in generator.integers(3, size=12).tolist():
        tie = generator.random()
        below, equal = sum(other < value for other in seen), sum(other == value for other in seen) + 1
        ranks.append((below + tie * equal) / (len(seen) + 1))
        seen.append(value)
        martingale.update(value, tie)
    expected = 1 / 13
    for start in range(12):
        share = 1 / (start + 1) - 1 / (start + 2)
        expected += sum(share / len(BETS) * math.prod(map(bet, ranks[start:])) for bet in BETS)
    assert martingale.wealth == pytest.approx(expected)


@pytest.mark.parametrize("calibration_rows", [20, 300])
def test_streams_like_the_calibration_sample_raise_no_more_alarms_than_stated(calibration_rows):
    runs, rate = 200, 0.1
    generator = np.random.default_rng(0)
    alarms = 0
    for run in range(runs):
        monitor = ExitMonitor(*live(generator, calibration_rows), depth=4, false_alarm_rate=rate, seed=run)
        alarms += monitor.update(*live(generator, 400))
    assert alarms / runs <= rate + 3 * math.sqrt(rate * (1 - rate) / runs)


@pytest.mark.parametrize(
    ("shift", "what"),
    [
        ({"shares": [0.2, 0.3, 0.5]}, "exit layers"),
        ({"shares": [0.8, 0.1, 0.1]}, "exit layers"),
        ({"sureness": 1.0}, "confidence"),
        ({"sureness": 3.0}, "confidence"),
    ],
)
@pytest.mark.parametrize("calm", [0, 1000])
def test_a_shift_is_found_soon_also_after_a_long_calm(shift, what, calm):
    generator = np.random.default_rng(1)
    monitor = ExitMonitor(*live(generator, 500), depth=4)
    assert not monitor.update(*live(generator, calm)) and "look like the calibration sample" in monitor.describe()
    assert monitor.update(*live(generator, 400, **shift))
    assert calm < monitor.alarm_at <= calm + 400 and monitor.evidence[what] > monitor.alarm_level
    assert f"Since row {monitor.alarm_at:,} of {calm + 400:,} the live rows do not" in monitor.describe()


def test_after_an_alarm_nothing_is_bet_and_rows_are_still_counted():
    monitor = ExitMonitor([1] * 50, None, depth=4)
    assert monitor.update([4] * 30)
    evidence, at = monitor.evidence, monitor.alarm_at
    for _ in range(40):
        monitor.update([4] * 100)
    assert (monitor.evidence, monitor.alarm_at, monitor.rows) == (evidence, at, 4030)
    assert ExitMonitor.from_json(monitor.to_json()).rows == 4030


def test_an_alarm_stays_and_batches_do_not_matter():
    generator = np.random.default_rng(2)
    sample, stream = live(generator, 200), live(generator, 300, shares=[0.0, 0.0, 1.0])
    whole, pieces = (ExitMonitor(*sample, depth=4) for _ in range(2))
    whole.update(*stream)
    for start in range(0, 300, 7):
        pieces.update(*(values[start : start + 7] for values in stream))
    assert whole.alarm and (whole.alarm_at, whole.evidence) == (pieces.alarm_at, pieces.evidence)
    assert whole.update(*live(generator, 5))


def test_a_saved_monitor_goes_on_where_it_stopped():
    generator = np.random.default_rng(3)
    monitor = ExitMonitor(*live(generator, 100), depth=4, false_alarm_rate=0.05)
    monitor.update(*live(generator, 50))
    text = monitor.to_json()
    again = ExitMonitor.from_json(text)
    more = live(generator, 200, sureness=0.0)
    assert monitor.update(*more) and again.update(*more)
    assert again.to_json() == monitor.to_json() and again.alarm_at == monitor.alarm_at
    assert len(monitor.to_json()) < 2 * len(text) and json.loads(text)["alarm_at"] is None


def test_it_starts_from_calibration_records_and_takes_what_predict_returns():
    model = tiny_model(exit_config=ExitConfig(threshold=0.7, temperatures=[0.5, 1.0, 2.0, 1.5]).to_dict())
    batch = random_batch([7, 3, 11, 2, 9, 5, 8, 4])
    with torch.no_grad():
        logits = torch.stack(model(**batch).exit_logits, 1)
    records = ExitLogits(logits, batch["attention_mask"].sum(1))
    predicted = model.predict(**batch, early_exit=True)
    expected = ExitMonitor(predicted.exit_layer, predicted.confidence, depth=4)
    assert ExitMonitor.from_records(records, model.config).to_json() == expected.to_json()
    assert not expected.update(predicted.exit_layer, predicted.confidence) and expected.rows == 8


def test_a_model_without_settings_has_nothing_to_watch():
    with pytest.raises(ValueError, match="The model has no exit settings"):
        ExitMonitor.from_records(ExitLogits(torch.zeros(3, 4, 3), torch.ones(3)), tiny_model().config)


def test_a_regression_model_is_watched_by_its_exit_layers_alone():
    monitor = ExitMonitor([1, 2, 4] * 30, None, depth=4, false_alarm_rate=0.01)
    assert monitor.alarm_level == 100 and list(monitor.evidence) == ["exit layers"]
    with pytest.raises(ValueError, match=r"Given: exit layers, confidence\. Calibration had: exit layers"):
        monitor.update([1], [0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], None), "no calibration rows"),
        (([0, 1], None), r"Exit layers lie in 0..1. They must lie in 1..4"),
        (([1, 5], None), r"must lie in 1..4"),
        (([1, 2], [0.5]), "There are 1 confidences for 2 exit layers"),
        (([1, 2], [0.5, 1.1]), r"There must be one in 0..1 for each"),
        (([1, 2], [0.5, math.nan]), r"There must be one in 0..1 for each"),
    ],
)
def test_rows_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExitMonitor(*arguments, depth=4)


@pytest.mark.parametrize("rate", [0.0, 1.0, math.nan])
def test_a_false_alarm_rate_lies_between_0_and_1(rate):
    with pytest.raises(ValueError, match="It must lie above 0 and below 1"):
        ExitMonitor([1], None, depth=4, false_alarm_rate=rate)
