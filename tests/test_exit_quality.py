"""What every exit is worth, against sums worked by hand and plain loops over rows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from helpers import tiny_config
from hf_costeff import ExitConfig
from hf_costeff.exit_quality import (
    ReliabilityBin,
    curve_with_bands,
    exit_qualities,
    expected_calibration_error,
    flipped_rows,
    reliability,
)
from hf_costeff.exit_replay import ExitLogits, ExitReplay
from hf_costeff.group_outcomes import length_outcomes

TWO = tiny_config(num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2)
THREE_CLASSES = tiny_config(num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3)
MULTI = tiny_config(
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    num_labels=3,
    problem_type="multi_label_classification",
)
SETTINGS = ExitConfig(threshold=0.8, temperatures=[2.0, 1.0])


def replay_of(config, rows: int = 200, seed: int = 0) -> ExitReplay:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 2, config.num_labels, generator=generator) * torch.tensor([1.0, 3.0])[:, None]
    multi = config.resolved_problem_type == "multi_label_classification"
    labels = (torch.rand(rows, config.num_labels, generator=generator) < logits[:, 1].sigmoid()).float()
    if not multi:
        labels = torch.multinomial(logits[:, 1].softmax(-1), 1, generator=generator).squeeze(-1)
    return ExitReplay(ExitLogits(logits, torch.randint(3, 20, (rows,), generator=generator), labels), config)


def plain_decisions(replay: ExitReplay, exit: int, temperature: float) -> list[tuple[float, bool]]:
    """(confidence, rightness) of every decision of an exit, one at a time."""
    found = []
    for logits, label in zip(replay.records.logits[:, exit].tolist(), replay.records.labels.tolist(), strict=True):
        if isinstance(label, list):
            chances = [1 / (1 + math.exp(-value / temperature)) for value in logits]
            found += [(max(p, 1 - p), (p > 0.5) == (on > 0.5)) for p, on in zip(chances, label, strict=True)]
        else:
            weights = [math.exp(value / temperature) for value in logits]
            found.append((max(weights) / sum(weights), logits.index(max(logits)) == label))
    return found


def plain_error(decisions: list[tuple[float, bool]]) -> float:
    total = 0.0
    for low in range(10):
        part = [d for d in decisions if low / 10 <= d[0] < (low + 1) / 10 or (low == 9 and d[0] == 1.0)]
        if part:
            total += abs(sum(d[0] for d in part) - sum(d[1] for d in part))
    return total / len(decisions)


@pytest.mark.parametrize("config", [TWO, THREE_CLASSES, MULTI], ids=["two", "three", "multi-label"])
def test_calibration_error_and_discrimination_equal_a_plain_loop(config):
    replay = replay_of(config)
    for exit, quality in enumerate(exit_qualities(replay, SETTINGS, "accuracy")):
        decisions = plain_decisions(replay, exit, SETTINGS.temperatures[exit])
        assert expected_calibration_error(quality.after) == pytest.approx(plain_error(decisions), abs=1e-9)
        before = plain_error(plain_decisions(replay, exit, 1.0))
        assert expected_calibration_error(quality.before) == pytest.approx(before, abs=1e-9)
        right, wrong = ([sure for sure, good in decisions if good == side] for side in (True, False))
        area = mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong))
        assert quality.discrimination == pytest.approx(area)


def test_an_exit_tells_its_layer_its_metric_and_its_share_of_rows():
    replay = replay_of(TWO)
    first, last = exit_qualities(replay, SETTINGS, "accuracy")
    left = replay.at(SETTINGS).exit_index == 0
    assert (first.layer, last.layer) == (1, 2)
    assert (first.share, last.share) == (
        pytest.approx(left.sum().item() / 200),
        pytest.approx((~left).sum().item() / 200),
    )
    right = replay.records.logits[:, 0].argmax(-1) == replay.records.labels
    assert first.metric == pytest.approx(right.sum().item() / 200)


@pytest.mark.parametrize("config", [TWO, MULTI], ids=["two", "multi-label"])
def test_an_exit_is_judged_on_the_rows_that_do_not_skip_its_layer(config):
    records = replay_of(config).records
    skipped = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) < 0.4
    found = exit_qualities(ExitReplay(dataclasses.replace(records, skipped=skipped), config), SETTINGS, "accuracy")
    own = (~skipped[:, 0]).numpy()
    alone = exit_qualities(ExitReplay(records.select(own), config), SETTINGS, "accuracy")[0]
    assert found[0].asked == pytest.approx(own.mean()) and found[1].asked == 1.0
    share = found[0].share
    assert found[0] == dataclasses.replace(alone, asked=found[0].asked, share=share)
    assert share == pytest.approx(alone.share * own.mean()) and found[0].metric is not None
    assert found[1].metric == exit_qualities(ExitReplay(records, config), SETTINGS, "accuracy")[1].metric


def test_an_exit_that_nobody_is_asked_at_has_no_metric():
    skipped = torch.tensor([[True, False]]).repeat(200, 1)
    first, last = exit_qualities(
        ExitReplay(dataclasses.replace(replay_of(TWO).records, skipped=skipped), TWO), SETTINGS, "accuracy"
    )
    assert (first.asked, first.metric, first.share, first.before, first.discrimination) == (0.0, None, 0.0, [], None)
    assert last.asked == 1.0 and last.before


def test_very_sure_answers_are_still_told_apart():
    """As probabilities all of them are 1; the wrong ones have the smaller logits."""
    logits = torch.tensor([[0.0, 60.0], [0.0, 70.0], [0.0, 80.0], [0.0, 90.0]]).unsqueeze(1).repeat(1, 2, 1)
    records = ExitLogits(logits, torch.ones(4), torch.tensor([0, 0, 1, 1]))
    quality, _ = exit_qualities(ExitReplay(records, TWO), ExitConfig(threshold=0.5), "accuracy")
    assert quality.discrimination == 1.0


def test_where_all_are_right_nothing_is_told_apart():
    records = ExitLogits(torch.tensor([[[0.0, 1.0]] * 2] * 3), torch.ones(3), torch.ones(3, dtype=torch.long))
    assert exit_qualities(ExitReplay(records, TWO), ExitConfig(threshold=0.5), "accuracy")[0].discrimination is None


def test_reliability_bins_are_half_open_and_the_last_is_closed():
    bins = reliability(np.array([0.0, 0.1, 0.999, 1.0]), np.array([False, True, True, False]))
    assert [part.count for part in bins] == [1, 1, 2]
    assert bins[2] == ReliabilityBin(pytest.approx(0.9995), 0.5, 2)


def test_the_band_holds_the_curve_and_shrinks_with_the_rows():
    path = [ExitConfig(threshold=step / 20) for step in range(21)]
    few, many = (curve_with_bands(replay_of(TWO, rows), path, "accuracy") for rows in (100, 1600))
    for points in (few, many):
        assert all(point.low <= point.metric <= point.high for point in points)
        assert [p.flops_per_row for p in points] == sorted(p.flops_per_row for p in points)
    widths = [np.mean([point.high - point.low for point in points]) for points in (few, many)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)
    expected = 2 * 1.96 * np.sqrt(many[0].metric * (1 - many[0].metric) / 1600)
    assert many[0].high - many[0].low == pytest.approx(expected, rel=0.25)


def test_a_long_path_is_thinned_and_keeps_its_ends():
    path = [ExitConfig(threshold=step / 400) for step in range(401)]
    replay = replay_of(TWO, 400)
    points = curve_with_bands(replay, path, "accuracy")
    assert len(points) == 25
    ends = [replay.at(path[-1]).mean_flops, replay.at(path[0]).mean_flops]
    assert [points[0].flops_per_row, points[-1].flops_per_row] == ends


@pytest.mark.parametrize("config", [THREE_CLASSES, MULTI], ids=["three", "multi-label"])
def test_damage_by_length_equals_a_plain_count(config):
    replay = replay_of(config)
    groups = length_outcomes(replay, SETTINGS)
    assert sum(group.rows for group in groups) == 200 and 1 < len(groups) <= 4
    exits = replay.at(SETTINGS)
    for group in groups:
        low, *_, high = map(int, group.name.removesuffix(" tokens").split(" to ") * 2)
        own = [row for row, n in enumerate(replay.records.seq_lengths.tolist()) if low <= n <= high]
        right = {"full_depth": 0, "early_exit": 0}
        for row in own:
            label = replay.records.labels[row]
            for name, logits in (("full_depth", replay.records.logits[row, -1]), ("early_exit", exits.logits[row])):
                said = (logits > 0).float() if config is MULTI else logits.argmax()
                right[name] += bool((said == label).all())
        assert group.rows == len(own)
        assert (group.full_depth, group.early_exit) == tuple(pytest.approx(n / len(own)) for n in right.values())
        assert group.mean_exit_layer == pytest.approx(exits.exit_layer[own].double().mean().item())


def test_rows_of_one_length_are_one_group():
    records = replay_of(TWO).records
    same = ExitReplay(ExitLogits(records.logits, torch.full((200,), 8), records.labels), TWO)
    assert [group.name for group in length_outcomes(same, SETTINGS)] == ["8 tokens"]


@pytest.mark.parametrize("config", [TWO, MULTI], ids=["two", "multi-label"])
def test_flipped_rows_are_those_whose_answer_changes(config):
    replay, bold = replay_of(config), ExitConfig(threshold=0.99)
    early, full = replay.at(bold).logits, replay.records.logits[:, -1]
    said = [(logits > 0).tolist() if config is MULTI else logits.argmax(-1).tolist() for logits in (early, full)]
    expected = [row for row, (a, b) in enumerate(zip(*said, strict=True)) if a != b]
    assert flipped_rows(replay, bold) == expected != []
    without = ExitLogits(replay.records.logits, replay.records.seq_lengths)
    assert flipped_rows(ExitReplay(without, config), bold) == expected


def test_regression_has_a_metric_per_exit_and_nothing_that_is_right_or_wrong():
    config = tiny_config(num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=1)
    values = torch.arange(20.0)
    records = ExitLogits(torch.stack([-values, values], 1).unsqueeze(-1), torch.full((20,), 8), values)
    replay, settings = ExitReplay(records, config), ExitConfig("patience", patience=1, tolerance=0.5)
    first, last = exit_qualities(replay, settings, "spearman")
    assert (first.metric, last.metric) == (pytest.approx(-1.0), pytest.approx(1.0))
    assert first.before == first.after == [] and first.discrimination is None
    assert length_outcomes(replay, settings) == flipped_rows(replay, settings) == []
