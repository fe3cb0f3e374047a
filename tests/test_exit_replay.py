"""Replayed exits equal what `predict` does row by row. Costs and metrics are tested with the search, in calibration."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import balance_gates, random_batch, tiny_config, tiny_model
from hf_costeff import ExitConfig
from hf_costeff.efficiency import mean_flops
from hf_costeff.exit_criteria import answer_confidence, probabilities, simulate_exits
from hf_costeff.exit_replay import ExitLogits, ExitReplay, ThresholdPath, stored_settings
from hf_costeff.exiting_rows import ExitPlan
from hf_costeff.metrics import METRICS

SINGLE = "single_label_classification"
LENGTHS = [7, 3, 11, 2, 9, 5, 8, 4]
SETTINGS = {
    "one threshold": ExitConfig(threshold=0.7, temperatures=[0.5, 1.0, 2.0, 1.5]),
    "per exit": ExitConfig("margin", threshold=[1.0, 0.4, 0.0, 0.0], checked_exits=[2, 3]),
    "patience": ExitConfig("patience", patience=[2, 1, 0, 0], checked_exits=[1, 2, 3]),
    "full depth": None,
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_replay_leaves_and_answers_as_predict_does(settings):
    model, batch = tiny_model(), random_batch(LENGTHS)
    with torch.no_grad():
        records = ExitLogits(torch.stack(model(**batch).exit_logits, 1), torch.tensor(LENGTHS))
    exits = ExitReplay(records, model.config).at(settings)
    predicted = model.predict(**batch, early_exit=settings if settings is not None else False)
    layers = predicted.exit_layer.tolist()
    assert exits.exit_layer.tolist() == layers and exits.mean_exit_layer == pytest.approx(sum(layers) / 8)
    assert exits.exit_shares == [layers.count(layer) / 8 for layer in (1, 2, 3, 4)]
    torch.testing.assert_close(exits.logits, predicted.logits, rtol=1e-5, atol=1e-5)
    if settings is not None:
        scaled = exits.scaled_logits(settings)
        expected = (predicted.probabilities, predicted.confidence)
        found = (probabilities(scaled, SINGLE), answer_confidence(probabilities(scaled, SINGLE), SINGLE))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["entropy", "entropy_nats", "confidence", "margin"])
def test_a_row_next_to_a_threshold_leaves_in_a_replay_as_in_predict(name):
    """By less than single precision can tell."""
    model, batch = tiny_model(), random_batch([7])
    first = model.predict(**batch, early_exit=ExitConfig(threshold=1.0, checked_exits=[1])).logits
    with torch.no_grad():
        logits = torch.stack([first, *model(**batch).exit_logits[1:]], 1)
    value = ExitConfig(name, threshold=0.5).build_criterion(4, SINGLE).measured(first, 0).item()
    layers = []
    for threshold in (math.nextafter(value, 0), value, math.nextafter(value, math.inf)):
        settings = ExitConfig(name, threshold=threshold, checked_exits=[1])
        layers.append(model.predict(**batch, early_exit=settings).exit_layer.tolist())
        replayed = ExitReplay(ExitLogits(logits, torch.tensor([7])), model.config).at(settings)
        assert replayed.exit_layer.tolist() == layers[-1]
        assert (simulate_exits(logits, settings, [1, 2, 3, 4], SINGLE) + 1).tolist() == layers[-1]
    assert layers == ([[4], [4], [1]] if name.startswith("entropy") else [[1], [4], [4]])


@pytest.mark.parametrize("problem_type", [SINGLE, "multi_label_classification", "regression"])
def test_the_confidence_is_that_of_predict(problem_type):
    labels = 1 if problem_type == "regression" else 3
    model, batch = tiny_model(problem_type=problem_type, num_labels=labels), random_batch(LENGTHS)
    predicted = model.predict(**batch, early_exit=False)
    found = answer_confidence(probabilities(predicted.logits, problem_type), problem_type)
    if problem_type == "regression":
        assert found is None and predicted.confidence is None
    else:
        torch.testing.assert_close(found, predicted.confidence)


@pytest.mark.parametrize("criterion", ["entropy", "entropy_nats", "confidence", "margin"])
@pytest.mark.parametrize("checked", [None, [1, 3], [2]])
def test_a_gated_model_is_replayed_row_by_row_as_it_predicts(criterion, checked):
    """Where a row leaves, what it answers, and what it costs at its own length."""
    model = balance_gates(tiny_model(seed=3, skip_gates="linear", exit_pooling="mean"))
    lengths = [2 + row % 10 for row in range(40)]
    batch = random_batch(lengths)
    with torch.no_grad():
        outputs = model(**batch)
    skipped = torch.stack(outputs.skip_probabilities, 1) >= 0.5
    records = ExitLogits(torch.stack(outputs.exit_logits, 1), torch.tensor(lengths), skipped=skipped)
    replay, seen = ExitReplay(records, model.config), set()
    for threshold in (0.0, 0.3, 0.6, 0.9, 1.0):
        settings = ExitConfig(criterion, threshold=threshold, checked_exits=checked)
        predicted, replayed = model.predict(**batch, early_exit=settings), replay.at(settings)
        assert torch.equal(predicted.exit_layer, replayed.exit_layer)
        torch.testing.assert_close(predicted.logits, replayed.logits, atol=1e-5, rtol=1e-5)
        cost = mean_flops(model.config, predicted.exit_layer, lengths, replayed.asked, predicted.skipped_layers)
        assert replayed.mean_flops == pytest.approx(cost)
        path = replay.along(ThresholdPath(settings, [threshold]))[0]
        assert path.mean_costs(replay.flops)[0] == pytest.approx(cost)
        seen |= set(replayed.exit_layer.tolist())
    assert len(seen) > (1 if checked == [2] else 2)
    full = model.predict(**batch, early_exit=False)
    cost = mean_flops(model.config, full.exit_layer, lengths, [4], full.skipped_layers)
    assert replay.full_depth.mean_flops == pytest.approx(cost)


def test_rows_that_skip_keep_their_paths_when_some_are_selected():
    records = dataclasses.replace(rows_of(0), skipped=torch.rand(60, 4) > 0.5)
    chosen = records.select(np.array([5, 2]))
    assert torch.equal(chosen.skipped, records.skipped[[5, 2]])


def test_patience_is_refused_where_rows_skip_layers():
    records = dataclasses.replace(rows_of(0), skipped=torch.zeros(60, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="The patience criterion compares"):
        ExitReplay(records, tiny_config(skip_gates="linear")).at(ExitConfig("patience", patience=1))


def test_lost_counts_the_rows_that_lose_where_they_leave():
    records = ExitLogits(torch.tensor([[[0.0, 9.0]] * 4, [[0.1, 0.0]] * 4]), torch.tensor([3, 3]))
    replay = ExitReplay(records, tiny_model(num_labels=2).config)
    losses = torch.tensor([[True, False, False, False], [False, False, False, True]]).numpy()
    assert replay.at(ExitConfig(threshold=0.5)).total(losses) == 2
    assert replay.full_depth.total(losses) == 1


def rows_of(seed: int, rows: int = 60, labels: int = 3) -> ExitLogits:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (rows,), generator=generator)
    return ExitLogits(
        2 * torch.randn(rows, 4, labels, generator=generator),
        lengths,
        torch.randint(0, labels, (rows,), generator=generator),
    )


@given(
    seed=st.integers(0, 10**6),
    steps=st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.3]), min_size=4, max_size=4), min_size=1, max_size=6),
    criterion=st.sampled_from(["entropy", "entropy_nats", "confidence", "margin"]),
    checked=st.sampled_from([None, [1, 3], [2], []]),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_path_adds_up_to_what_each_of_its_settings_comes_to(seed, steps, criterion, checked):
    """Thresholds that grow step by step, from those that let nobody leave; every fifth step lets many."""
    records, config = rows_of(seed), tiny_config()
    limits = np.minimum(np.array(steps).cumsum(0), 1.0)
    limits = limits if criterion.startswith("entropy") else 1 - limits
    path = ThresholdPath(ExitConfig(criterion, threshold=0.0, checked_exits=checked), limits.tolist())
    replay = ExitReplay(records, config)
    values = torch.rand(60, 4, generator=torch.Generator().manual_seed(seed)).numpy()
    pieces = replay.along(path)
    assert [own for piece in pieces for own in piece.settings] == list(path)
    costs = np.concatenate([piece.mean_costs(replay.flops) for piece in pieces])
    totals = np.concatenate([piece.totals(values) for piece in pieces])
    for settings, cost, total in zip(path, costs, totals, strict=True):
        exits = simulate_exits(records.logits, settings, config.exit_layers, SINGLE)
        assert torch.equal(replay.at(settings).exit_index, exits)
        asked = ExitPlan.make(settings, config.exit_layers, SINGLE).stops
        assert cost == pytest.approx(mean_flops(config, exits + 1, records.seq_lengths, asked))
        assert total == pytest.approx(sum(values[row, exit] for row, exit in enumerate(exits.tolist())))


@pytest.mark.parametrize("criterion", ["entropy", "margin"])
def test_a_row_whose_measure_is_just_the_threshold_stays(criterion):
    records = rows_of(3)
    rule = ExitConfig(criterion, threshold=0.5).build_criterion(4, SINGLE)
    limit = float(rule.measured(records.logits[7:8, 0], 0))
    bolder = limit + 1e-7 if criterion == "entropy" else limit - 1e-7
    replay = ExitReplay(records, tiny_config())
    settings = [ExitConfig(criterion, threshold=at, checked_exits=[1]) for at in (limit, bolder)]
    assert [int(replay.at(own).exit_index[7]) for own in settings] == [3, 0]


def test_settings_that_treat_all_rows_as_the_ones_before_are_left_out():
    replay = ExitReplay(rows_of(0), tiny_config())
    path = [ExitConfig(threshold=limit) for limit in (0.0, 1e-9, 1e-8, 0.5, 0.5, 0.9)]
    (first,), others = replay.distinct(path)
    assert [first.threshold, *(own.threshold for own in others)] == [0.0, 0.5, 0.9]


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_a_metric_is_that_of_the_logits_that_answer(metric):
    exits = ExitReplay(records := rows_of(1), tiny_config()).at(ExitConfig(threshold=0.8))
    assert len(set(exits.exit_index.tolist())) > 2
    assert exits.metric(metric) == METRICS[SINGLE][metric](exits.logits.numpy(), records.labels.numpy())


@pytest.mark.parametrize("patience", [4, [3, 3, 3, 0]])
def test_a_patience_that_nobody_has_the_exits_for_costs_no_questions(patience):
    replay = ExitReplay(rows_of(2), tiny_config())
    exits = replay.at(ExitConfig("patience", patience=patience))
    assert exits.asked == (4,) and exits.mean_flops == replay.full_depth.mean_flops


def test_a_model_that_was_never_calibrated_has_no_stored_settings():
    with pytest.raises(ValueError, match="The model has no exit settings"):
        stored_settings(tiny_model().config)
    settings = ExitConfig(threshold=0.3)
    assert stored_settings(tiny_model(exit_config=settings.to_dict()).config) == settings
