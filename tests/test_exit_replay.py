"""Replayed exits equal what `predict` does row by row. Costs and metrics are tested with the search, in calibration."""

from __future__ import annotations

import pytest
import torch

from helpers import random_batch, tiny_model
from hf_costeff import ExitConfig
from hf_costeff.exit_criteria import answer_confidence, probabilities
from hf_costeff.exit_replay import ExitLogits, ExitReplay, stored_settings

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


def test_lost_counts_the_rows_that_lose_where_they_leave():
    records = ExitLogits(torch.tensor([[[0.0, 9.0]] * 4, [[0.1, 0.0]] * 4]), torch.tensor([3, 3]))
    replay = ExitReplay(records, tiny_model(num_labels=2).config)
    losses = torch.tensor([[True, False, False, False], [False, False, False, True]]).numpy()
    assert replay.at(ExitConfig(threshold=0.5)).total(losses) == 2
    assert replay.full_depth.total(losses) == 1


def test_a_model_that_was_never_calibrated_has_no_stored_settings():
    with pytest.raises(ValueError, match="The model has no exit settings"):
        stored_settings(tiny_model().config)
    settings = ExitConfig(threshold=0.3)
    assert stored_settings(tiny_model(exit_config=settings.to_dict()).config) == settings
