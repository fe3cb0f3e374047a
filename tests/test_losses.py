"""Every loss part against plain loops over rows, exits, tokens and classes, and against numbers worked by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hf_costeff.losses import (
    cross_layer_contrastive_loss,
    difficulty_loss,
    importance_loss,
    representation_loss,
    skip_loss,
    soft_label_loss,
    task_loss,
    weighted_sum,
)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
EXITS, BATCH, LABELS = 3, 5, 4


def random_logits(seed: int, labels: int = LABELS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(BATCH, labels, generator=generator) for _ in range(EXITS)]


def log_softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [value - math.log(total) for value in values]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --- true labels


def test_the_task_loss_is_the_mean_cross_entropy_of_every_exit_summed_over_exits():
    logits, labels = random_logits(0), [0, 3, 1, 1, 2]
    expected = 0.0
    for exit_logits in logits:
        for row, label in zip(exit_logits.tolist(), labels, strict=True):
            expected -= log_softmax(row)[label] / BATCH
    assert task_loss(logits, torch.tensor(labels), SINGLE).item() == pytest.approx(expected, rel=1e-5)


def test_two_exits_that_are_75_percent_sure_cost_twice_the_logarithm_of_their_odds():
    logits = torch.tensor([[math.log(3), 0.0]])  # softmax: 3/4 and 1/4
    assert task_loss([logits, logits], torch.tensor([0]), SINGLE).item() == pytest.approx(2 * math.log(4 / 3))
    assert task_loss([logits, logits], torch.tensor([1]), SINGLE).item() == pytest.approx(2 * math.log(4))


def test_class_weights_average_the_rows_by_the_weight_of_their_class():
    logits, labels, weights = random_logits(1), [0, 3, 1, 1, 2], [1.0, 5.0, 0.25, 2.0]
    expected = 0.0
    for exit_logits in logits:
        rows = zip(exit_logits.tolist(), labels, strict=True)
        costs = [-weights[label] * log_softmax(row)[label] for row, label in rows]
        expected += sum(costs) / sum(weights[label] for label in labels)
    found = task_loss(logits, torch.tensor(labels), SINGLE, torch.tensor(weights))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_spreads_its_share_of_the_target_over_all_classes():
    logits, labels, smoothing = random_logits(2), [2, 0, 3, 1, 0], 0.2
    expected = 0.0
    for exit_logits in logits:
        for row, label in zip(exit_logits.tolist(), labels, strict=True):
            target = [smoothing / LABELS + (1 - smoothing) * (index == label) for index in range(LABELS)]
            expected -= sum(p * logp for p, logp in zip(target, log_softmax(row), strict=True)) / BATCH
    found = task_loss(logits, torch.tensor(labels), SINGLE, label_smoothing=smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_multi_label_cost_is_the_mean_binary_cross_entropy_and_weights_multiply_the_positives():
    logits, weights = random_logits(3), [3.0, 1.0, 0.5, 2.0]
    labels = (torch.randn(BATCH, LABELS, generator=torch.Generator().manual_seed(9)) > 0).long()
    for used in (None, weights):
        expected = 0.0
        for exit_logits in logits:
            for row, truth in zip(exit_logits.tolist(), labels.tolist(), strict=True):
                for index, (value, label) in enumerate(zip(row, truth, strict=True)):
                    factor = used[index] if used else 1.0
                    cost = factor * label * math.log(sigmoid(value)) + (1 - label) * math.log(sigmoid(-value))
                    expected -= cost / (BATCH * LABELS)
        found = task_loss(logits, labels, MULTI, None if used is None else torch.tensor(used))
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
def test_regression_cost_is_the_mean_squared_error_whatever_the_shape_of_the_labels(shape):
    logits, values = random_logits(4, labels=1), [0.5, -1.0, 2.0, 0.0, 3.5]
    expected = 0.0
    for exit_logits in logits:
        expected += sum((out[0] - y) ** 2 for out, y in zip(exit_logits.tolist(), values, strict=True)) / BATCH
    found = task_loss(logits, torch.tensor(values, dtype=torch.float64).view(shape), REGRESSION)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# --- soft labels


def test_soft_labels_cost_the_cross_entropy_with_the_teachers_probabilities_without_a_squared_temperature():
    student, teacher = random_logits(5), random_logits(6)
    for temperature in (1.0, 2.5):
        expected = 0.0
        for ours, theirs in zip(student, teacher, strict=True):
            for row, target in zip(ours.tolist(), theirs.tolist(), strict=True):
                log_p = log_softmax([value / temperature for value in row])
                log_q = log_softmax([value / temperature for value in target])
                expected -= sum(math.exp(q) * p for p, q in zip(log_p, log_q, strict=True)) / BATCH
        assert soft_label_loss(student, teacher, SINGLE, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_multi_label_soft_labels_are_the_teachers_sigmoids():
    student, teacher = random_logits(7), random_logits(8)
    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for row, target in zip(ours.tolist(), theirs.tolist(), strict=True):
            for value, wanted in zip(row, target, strict=True):
                q = sigmoid(wanted)
                expected -= (q * math.log(sigmoid(value)) + (1 - q) * math.log(sigmoid(-value))) / (BATCH * LABELS)
    assert soft_label_loss(student, teacher, MULTI).item() == pytest.approx(expected, rel=1e-5)


def test_regression_soft_labels_are_the_teachers_values_at_any_temperature():
    student, teacher = [torch.tensor([[1.0], [4.0]])], [torch.tensor([[3.0], [4.0]])]
    for temperature in (1.0, 3.0):
        assert soft_label_loss(student, teacher, REGRESSION, temperature).item() == pytest.approx(2.0)  # (2^2 + 0) / 2


def test_soft_label_gradients_vanish_where_the_student_says_what_its_teacher_says():
    student = [logits.requires_grad_() for logits in random_logits(9)]
    soft_label_loss(student, [logits.detach() for logits in student], SINGLE, temperature=2.0).backward()
    for logits in student:
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)


def test_a_teacher_with_another_number_of_exits_is_refused():
    with pytest.raises(ValueError, match="zip"):
        soft_label_loss(random_logits(0), random_logits(1)[:2], SINGLE)


# --- representations


def states(seed: int, seq: int = 6, hidden: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, seq, hidden, generator=generator) for _ in range(EXITS)]


LENGTHS = (6, 1, 3, 5, 2)
MASK = (torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]).long()


def test_the_representation_loss_averages_width_then_real_tokens_then_rows_and_sums_layers():
    student, teacher = states(0), states(1)
    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for row, length in enumerate(LENGTHS):
            of_row = 0.0
            for token in range(length):
                pairs = zip(ours[row, token].tolist(), theirs[row, token].tolist(), strict=True)
                of_row += sum((a - b) ** 2 for a, b in pairs) / 8
            expected += of_row / length / BATCH
    assert representation_loss(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_mask_every_token_is_real():
    student, teacher = states(0), states(1)
    expected = sum(torch.nn.functional.mse_loss(a, b).item() for a, b in zip(student, teacher, strict=True))
    assert representation_loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-5)
    assert representation_loss(student, teacher, torch.ones(BATCH, 6)).item() == pytest.approx(expected, rel=1e-5)


def test_what_stands_at_padded_positions_and_how_many_there_are_does_not_matter():
    student, teacher = states(2), states(3)
    before = representation_loss(student, teacher, MASK)
    changed = [torch.where(MASK.bool()[..., None], tensor, 1e3 * torch.randn_like(tensor)) for tensor in student]
    torch.testing.assert_close(representation_loss(changed, teacher, MASK), before)
    wider = [torch.nn.functional.pad(tensor, (0, 0, 0, 5), value=7.0) for tensor in student]
    wider_teacher = [torch.nn.functional.pad(tensor, (0, 0, 0, 5), value=-7.0) for tensor in teacher]
    torch.testing.assert_close(representation_loss(wider, wider_teacher, torch.nn.functional.pad(MASK, (0, 5))), before)


def test_no_gradient_reaches_padded_positions():
    student = [tensor.requires_grad_() for tensor in states(2)]
    representation_loss(student, states(3), MASK).backward()
    for tensor in student:
        assert (tensor.grad[MASK == 0] == 0).all()
        assert (tensor.grad[MASK == 1] != 0).all()


def test_a_long_row_does_not_outweigh_a_short_one():
    """One row of 6 tokens at distance 1, one of a single token at distance 3: the mean of 1 and 9, not (6 + 9) / 7."""
    student = torch.zeros(2, 6, 4)
    teacher = torch.stack([torch.ones(6, 4), 3 * torch.ones(6, 4)])
    mask = torch.tensor([[1] * 6, [1, 0, 0, 0, 0, 0]])
    assert representation_loss([student], [teacher], mask).item() == pytest.approx(5.0)


# --- sums


def test_the_importance_loss_is_nine_tenths_soft_one_tenth_hard_and_all_of_the_representations():
    student, teacher, ours, theirs = random_logits(0), random_logits(1), states(0), states(1)
    labels = torch.tensor([0, 3, 1, 1, 2])
    expected = (
        0.9 * soft_label_loss(student, teacher, SINGLE).item()
        + 0.1 * task_loss(student, labels, SINGLE).item()
        + representation_loss(ours, theirs, MASK).item()
    )
    found = importance_loss(student, teacher, ours, theirs, labels, MASK, SINGLE)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_weighted_sum_is_each_named_part_times_its_weight():
    parts = {"task_loss": torch.tensor(2.0), "soft_label_loss": torch.tensor(3.0), "other": torch.tensor(5.0)}
    weights = {"soft_label_loss": 0.1, "task_loss": 0.5, "other": 2.0, "unused": 9.0}
    assert weighted_sum(parts, weights).item() == pytest.approx(0.5 * 2 + 0.1 * 3 + 2 * 5)


def test_a_part_of_weight_zero_adds_nothing_and_leaves_a_zero_gradient_on_what_it_touches():
    touched, other = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    total = weighted_sum({"a": touched**2, "b": other**2}, {"a": 0.0, "b": 1.0})
    total.backward()
    assert total.item() == 16.0
    assert touched.grad is not None and touched.grad.item() == 0.0
    assert other.grad.item() == 8.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single_precision(dtype):
    student, teacher = [[logits.to(dtype) for logits in random_logits(seed)] for seed in (0, 1)]
    ours, theirs = [[tensor.to(dtype) for tensor in states(seed)] for seed in (0, 1)]
    labels = torch.tensor([0, 3, 1, 1, 2])
    pairs = (
        (task_loss(student, labels, SINGLE), task_loss([x.float() for x in student], labels, SINGLE)),
        (
            soft_label_loss(student, teacher, SINGLE),
            soft_label_loss([x.float() for x in student], [x.float() for x in teacher], SINGLE),
        ),
        (
            representation_loss(ours, theirs, MASK),
            representation_loss([x.float() for x in ours], [x.float() for x in theirs], MASK),
        ),
        (
            representation_loss(ours, theirs, None),
            representation_loss([x.float() for x in ours], [x.float() for x in theirs], None),
        ),
    )
    for found, expected in pairs:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# --- difficulty


def confidences(logits):
    return logits.double().softmax(-1).amax(-1)


@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_difficulty_loss_is_the_mean_hinge_over_easy_rows_summed_over_exits(margin):
    """With one hard row every pair is known."""
    exits = [torch.randn(5, 3, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    expected = 0.0
    for logits in exits:
        sure = confidences(logits)
        expected += sum(max(0.0, margin - float(sure[i] - sure[2])) for i in (0, 1, 3, 4)) / 4
    found = difficulty_loss(exits, torch.tensor([0, 0, 1, 0, 0]), SINGLE, margin)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_difficulty_gradients_pull_easy_rows_up_and_hard_rows_down_by_the_derivative_of_the_softmax():
    """By hand: d max p / d logit_j = p_max (1[j = max] - p_j); saturated pairs have none."""
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.3, 0.1, 0.0], [0.0, 0.4, 0.1]], requires_grad=True)
    difficulty_loss([logits], torch.tensor([False, False, True]), SINGLE, margin=0.2).backward()
    p = logits.detach().softmax(-1)
    active = [0.2 - float(p[i].max() - p[2].max()) > 0 for i in (0, 1)]
    assert active == [False, True]
    slope = [p[i].max() * (torch.nn.functional.one_hot(p[i].argmax(), 3) - p[i]) for i in range(3)]
    expected = torch.stack([0 * slope[0], -slope[1] / 2, slope[2] / 2])
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)


def test_partners_are_drawn_evenly_with_replacement():
    torch.manual_seed(0)
    logits = torch.zeros(6, 2)
    logits[:, 0] = torch.tensor([0.5, 0.5, 0.0, 1.0, 2.0, 3.0])
    hard = torch.tensor([0, 0, 1, 1, 1, 1])
    sure = confidences(logits)
    drawn = torch.stack([difficulty_loss([logits], hard, SINGLE, 1.0) for _ in range(4000)])
    assert float(drawn.mean()) == pytest.approx(float(1 - sure[0] + sure[2:].mean()), abs=0.01)
    assert len(drawn.unique()) == 4 + 6  # both easy rows with one partner, or with two


@pytest.mark.parametrize("hard", [[0, 0, 0], [1, 1, 1]])
def test_a_batch_of_one_kind_teaches_no_difficulty(hard):
    assert float(difficulty_loss([torch.randn(3, 2)], torch.tensor(hard), SINGLE)) == 0


def test_difficulty_of_several_labels_is_that_of_the_least_sure_one():
    logits = torch.tensor([[3.0, 0.2], [1.0, -2.0]])
    sure = torch.maximum(logits.sigmoid(), 1 - logits.sigmoid()).amin(-1)
    found = difficulty_loss([logits], torch.tensor([0, 1]), MULTI, 0.5)
    assert float(found) == pytest.approx(0.5 - float(sure[0] - sure[1]), rel=1e-5)
    with pytest.raises(ValueError, match="no confidence"):
        difficulty_loss([torch.randn(2, 1)], torch.tensor([0, 1]), REGRESSION)


# --- skipping


def random_gates(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(BATCH, generator=generator) for _ in range(EXITS)]


def test_the_skip_loss_is_the_reciprocal_of_the_layers_skipped_on_average():
    gates = random_gates()
    total = sum(sum(layer.tolist()) / BATCH for layer in gates)
    assert skip_loss(gates).item() == pytest.approx(1 / total, rel=1e-5)
    assert skip_loss([torch.ones(BATCH)] * 12).item() == pytest.approx(1 / 12)


def test_the_tangent_of_the_skip_loss_touches_it_and_has_one_slope_for_all_parts_of_a_batch():
    gates = [layer.requires_grad_() for layer in random_gates()]
    total = sum(layer.mean().item() for layer in gates)
    assert skip_loss(gates, around=total).item() == pytest.approx(skip_loss(gates).item(), rel=1e-5)
    whole = torch.autograd.grad(skip_loss(gates), gates)
    for wanted, found in zip(whole, torch.autograd.grad(skip_loss(gates, around=total), gates), strict=True):
        torch.testing.assert_close(found, wanted)
    parts = (skip_loss([layer[rows] for layer in gates], around=total) * len(rows) for rows in ([0, 1, 2], [3, 4]))
    for wanted, found in zip(whole, torch.autograd.grad(sum(parts) / BATCH, gates), strict=True):
        torch.testing.assert_close(found, wanted)


def contrast_by_loops(states: list[Tensor], lengths: list[int], temperature: float) -> float:
    total = 0.0
    for first, second in pairwise(states):
        for row, length in enumerate(lengths):
            for token in range(length):
                cosines = [
                    torch.cosine_similarity(first[row, token], second[row, other], dim=0).item() / temperature
                    for other in range(length)
                ]
                total -= log_softmax(cosines)[token] / length / len(lengths)
    return total


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_contrastive_loss_compares_real_tokens_of_one_text_at_adjacent_depths(temperature):
    generator = torch.Generator().manual_seed(0)
    states, lengths = [torch.randn(3, 6, 4, generator=generator) for _ in range(4)], [6, 3, 1]
    mask = (torch.arange(6)[None] < torch.tensor(lengths)[:, None]).long()
    expected = contrast_by_loops(states, lengths, temperature)
    assert cross_layer_contrastive_loss(states, mask, temperature).item() == pytest.approx(expected, rel=1e-5)
    unpadded = contrast_by_loops(states, [6, 6, 6], temperature)
    assert cross_layer_contrastive_loss(states, None, temperature).item() == pytest.approx(unpadded, rel=1e-5)


def test_texts_of_one_token_and_single_depths_have_no_contrast_and_finite_gradients():
    states = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 0, 0, 0, 0]] * 2)
    loss = cross_layer_contrastive_loss(states, mask)
    assert loss.item() == 0
    assert all(torch.equal(grad, torch.zeros(2, 5, 4)) for grad in torch.autograd.grad(loss, states))
    assert cross_layer_contrastive_loss(states[:1], mask).item() == 0


def test_padding_gets_no_gradient_from_the_contrastive_loss():
    states = [torch.randn(1, 4, 3, requires_grad=True) for _ in range(2)]
    grads = torch.autograd.grad(cross_layer_contrastive_loss(states, torch.tensor([[1, 1, 0, 0]])), states)
    assert all(grad[0, :2].abs().min() > 0 and torch.equal(grad[0, 2:], torch.zeros(2, 3)) for grad in grads)
