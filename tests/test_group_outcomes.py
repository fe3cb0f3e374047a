"""Who pays for early exit, class by class."""

from __future__ import annotations

import pytest
import torch

from helpers import random_batch, tiny_config, tiny_model
from hf_costeff import ExitConfig
from hf_costeff.exit_replay import ExitLogits, ExitReplay
from hf_costeff.group_outcomes import class_outcomes


def replay_of(logits: torch.Tensor, labels: torch.Tensor, config) -> ExitReplay:
    return ExitReplay(ExitLogits(logits, torch.full((len(logits),), 8), labels), config)


def test_every_class_is_counted_as_predict_answers_its_rows():
    model, inputs = tiny_model(), random_batch([5, 9, 3, 7, 2, 8, 11, 4, 6, 10, 3, 5])
    labels = torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 1, 0, 0, 2])
    settings = ExitConfig(threshold=0.8)
    early, full = (model.predict(**inputs, early_exit=how) for how in (settings, False))
    assert len(set(early.exit_layer.tolist())) > 1
    logits = torch.stack(model(**inputs).exit_logits, dim=1).detach()
    found = {outcome.name: outcome for outcome in class_outcomes(replay_of(logits, labels, model.config), settings)}
    assert set(found) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    for label in range(3):
        rows = [row for row in range(12) if labels[row] == label]
        outcome = found[f"LABEL_{label}"]
        assert outcome.rows == len(rows)
        for answer, share in ((full, outcome.full_depth), (early, outcome.early_exit)):
            right = [answer.logits[row].argmax() == label for row in rows]
            assert share == pytest.approx(sum(right) / len(rows))
        assert outcome.mean_exit_layer == pytest.approx(sum(early.exit_layer[row].item() for row in rows) / len(rows))


def test_the_class_that_loses_most_comes_first_and_one_without_rows_not_at_all():
    always = torch.eye(3)[torch.zeros(6, dtype=torch.long)]  # the first exits say 0 to everybody
    right = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 0])]
    logits = torch.stack([always, always, always, right], dim=1)
    outcomes = class_outcomes(
        replay_of(logits, torch.tensor([0, 0, 1, 1, 1, 0]), tiny_config()), ExitConfig(threshold=1.0)
    )
    assert [(outcome.name, outcome.early_exit) for outcome in outcomes] == [("LABEL_1", 0.0), ("LABEL_0", 1.0)]


def test_a_row_counts_as_it_is_answered_at_the_exit_where_it_leaves():
    """All rows are of class 0: one is sure and right at once, one sure and wrong, one unsure and then right."""
    sure, wrong, unsure = [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.1, 0.0]
    logits = torch.tensor([[sure] * 4, [wrong, sure, sure, sure], [unsure, sure, wrong, wrong]])
    (outcome,) = class_outcomes(
        replay_of(logits, torch.zeros(3, dtype=torch.long), tiny_config()), ExitConfig(threshold=0.5)
    )
    assert (outcome.rows, outcome.full_depth, outcome.early_exit) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert outcome.mean_exit_layer == pytest.approx((1 + 1 + 2) / 3)


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_where_a_row_has_no_single_class_there_is_nothing_to_tell(settings):
    logits, labels = torch.zeros(2, 4, settings.get("num_labels", 3)), torch.zeros(2)
    assert class_outcomes(replay_of(logits, labels, tiny_config(**settings)), ExitConfig(threshold=1.0)) == []
