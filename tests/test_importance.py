"""Importance against a plain loop over autograd, a loss whose gradient is known, and what must stay as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import random_batch, tiny_model
from hf_costeff.importance import Importance, compute_importance

HEAD_SIZE = 4


def labelled_batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of unequal lengths and sizes, with labels of three classes."""
    lengths = ([5, 9, 3], [7, 2], [4, 4, 6, 8])
    generator = torch.Generator().manual_seed(5)
    batches = [random_batch(list(lengths[index % 3]), seed=index) for index in range(count)]
    for batch in batches:
        batch["labels"] = torch.randint(3, (len(batch["input_ids"]),), generator=generator)
    return batches


def all_exits_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def last_exit_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**inputs).exit_logits[-1], batch["labels"])


def assert_same(found: Importance, expected: Importance) -> None:
    torch.testing.assert_close(found.head_importance, expected.head_importance, rtol=0, atol=0)
    torch.testing.assert_close(found.neuron_importance, expected.neuron_importance, rtol=0, atol=0)


def scores_by_a_plain_loop(
    model: nn.Module, batches: list, loss_function
) -> tuple[list[list[float]], list[list[float]]]:
    """|w| * sum over batches of |gradient|, one weight at a time, then added up per head and per neuron."""
    heads, neurons = [], []
    layers = list(model.costeff.layers)
    names = [(layer.attention.output, layer.feed_forward.intermediate, layer.feed_forward.output) for layer in layers]
    weights = [linear.weight for triple in names for linear in triple]
    sums = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        gradients = torch.autograd.grad(loss_function(model, batch), weights, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.abs()
    scored = [(weight.detach().abs() * total).tolist() for weight, total in zip(weights, sums, strict=True)]
    for number in range(len(layers)):
        context, intermediate, output = scored[3 * number : 3 * number + 3]
        num_heads = len(context[0]) // HEAD_SIZE if context[0] else 0
        heads.append(
            [
                sum(row[column] for row in context for column in range(head * HEAD_SIZE, (head + 1) * HEAD_SIZE))
                for head in range(num_heads)
            ]
        )
        neurons.append(
            [sum(row) + sum(out[neuron] for out in output) for neuron, row in enumerate(intermediate)]
            if intermediate
            else []
        )
    return heads, neurons


@pytest.mark.parametrize("loss_function", [all_exits_loss, last_exit_loss])
def test_scores_equal_a_plain_loop_over_autograd_at_uneven_widths(loss_function):
    model, batches = tiny_model(), labelled_batches()
    heads, neurons = scores_by_a_plain_loop(model, batches, loss_function)
    found = compute_importance(model, batches, loss_function)
    assert [len(scores) for scores in found.head_importance] == [2, 0, 1, 3]
    assert [len(scores) for scores in found.neuron_importance] == [10, 7, 0, 16]
    for layer in range(4):
        torch.testing.assert_close(found.head_importance[layer], torch.tensor(heads[layer]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.neuron_importance[layer], torch.tensor(neurons[layer]), rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_linear_in_one_weight_scores_that_units_weight_times_the_slopes():
    """Batches of slope 2 and -3 on one weight: its head scores |w| * (2 + 3), and no other unit scores."""
    model = tiny_model()
    weight = model.costeff.layers[3].attention.output.weight

    def slope(model: nn.Module, factor: float) -> Tensor:
        return factor * model.costeff.layers[3].attention.output.weight[5, HEAD_SIZE + 1]  # a column of the second head

    found = compute_importance(model, [2.0, -3.0], slope)
    expected = [0.0, 5 * abs(weight[5, HEAD_SIZE + 1].item()), 0.0]
    torch.testing.assert_close(found.head_importance[3], torch.tensor(expected))
    assert sum(scores.sum() for scores in (*found.head_importance[:3], *found.neuron_importance)) == 0


def test_a_neurons_score_adds_its_row_of_the_first_matrix_and_its_column_of_the_second():
    model = tiny_model()
    feed_forward = model.costeff.layers[0].feed_forward

    def loss(model: nn.Module, _: None) -> Tensor:
        block = model.costeff.layers[0].feed_forward
        return block.intermediate.weight[2].sum() + 10 * block.output.weight[:, 7].sum()

    found = compute_importance(model, [None], loss).neuron_importance[0]
    expected = torch.zeros(10)
    expected[2] = feed_forward.intermediate.weight[2].abs().sum()
    expected[7] = 10 * feed_forward.output.weight[:, 7].abs().sum()
    torch.testing.assert_close(found, expected)


def test_absolute_values_are_taken_per_batch_so_that_opposite_gradients_do_not_cancel():
    model = tiny_model()

    def slope(model: nn.Module, factor: float) -> Tensor:
        return factor * model.costeff.layers[0].attention.output.weight.sum()

    assert compute_importance(model, [1.0, -1.0], slope).head_importance[0].min() > 0


def test_scores_of_all_exits_rank_otherwise_than_scores_of_the_last_exit_alone():
    model, batches = tiny_model(), labelled_batches()
    aware = compute_importance(model, batches, all_exits_loss)
    final = compute_importance(model, batches, last_exit_loss)
    ranks = [
        [scores.argsort().tolist() for scores in found.neuron_importance if len(scores)] for found in (aware, final)
    ]
    assert ranks[0] != ranks[1]


def test_equilibrium_scales_the_scores_of_a_layer_by_its_number_of_deeper_exits_and_keeps_its_ranking():
    model, batches = tiny_model(), labelled_batches()

    def loss(equilibrium: bool):
        return lambda model, batch: model(**batch, gradient_equilibrium=equilibrium).loss

    balanced = compute_importance(model, batches, loss(True))
    plain = compute_importance(model, batches, loss(False))
    for layer, exits_at_or_after in enumerate((4, 3, 2, 1)):
        torch.testing.assert_close(
            balanced.neuron_importance[layer] * exits_at_or_after, plain.neuron_importance[layer], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_weights_and_mode_has_no_gradients_left_and_is_scored_without_dropout(training):
    model = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes: list[bool] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        modes.extend(module.training for module in model.modules())
        return all_exits_loss(model, batch)

    first, second = (compute_importance(model, labelled_batches(), loss) for _ in range(2))
    assert not any(modes)
    assert_same(first, second)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradients_that_were_there_before_do_not_count():
    model, batches = tiny_model(), labelled_batches(1)
    expected = compute_importance(model, batches, all_exits_loss)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    assert_same(compute_importance(model, batches, all_exits_loss), expected)


def test_it_scores_inside_a_block_without_gradients_and_batches_may_be_a_generator():
    model, batches = tiny_model(), labelled_batches()
    expected = compute_importance(model, batches, all_exits_loss)
    with torch.no_grad():
        found = compute_importance(model, (batch for batch in batches), all_exits_loss)
    assert_same(found, expected)


def test_without_a_batch_there_is_nothing_to_score():
    model = tiny_model().train()
    with pytest.raises(ValueError, match="No batch to score importance on"):
        compute_importance(model, [], all_exits_loss)
    assert model.training
