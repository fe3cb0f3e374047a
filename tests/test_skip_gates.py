"""Skip gates: what they compute, how a forward pass mixes by them, and prediction that really skips."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from helpers import random_batch, tiny_config, tiny_model
from hf_costeff import CostEffForSequenceClassification, CostEffModel
from hf_costeff.exit_heads import AttentionExitHead, FirstTokenAttention, pool_mean
from hf_costeff.skip_gates import AttentionGate, HardWeight, LinearGate, SkipMixing

GATED = {"skip_gates": "linear", "exit_pooling": "mean"}
ATTENTION = {"skip_gates": "attention", "gate_size": 6, "exit_head": "attention", "exit_head_size": 8}
FORMS = {"linear": GATED, "attention": ATTENTION}
LENGTHS = [7, 3, 11, 2, 9, 5, 11, 4]


@pytest.fixture(params=FORMS, ids=str)
def gated(request):
    """A tiny model whose gates let about half of the layers be skipped, other ones by other rows."""
    return tiny_model(seed=3, **FORMS[request.param])


def literal_attention(attention: FirstTokenAttention, hidden, mask, num_heads):
    """Queries, keys and values of every token, as the paper writes them, through torch's own attention."""
    states = torch.tanh(hidden @ attention.reduce.weight.T + attention.reduce.bias)
    rows, seq, size = states.shape
    maps = {"query": attention.query, "value": attention.value}
    projected = {name: states @ linear.weight.T + linear.bias for name, linear in maps.items()}
    projected["key"] = states @ attention.key.weight
    split = {name: x.view(rows, seq, num_heads, size // num_heads).transpose(1, 2) for name, x in projected.items()}
    bias = None if mask is None else torch.where(mask[:, None, None] == 1, 0.0, -torch.inf)
    seen = nn.functional.scaled_dot_product_attention(split["query"], split["key"], split["value"], bias)
    return seen.transpose(1, 2).reshape(rows, seq, size)[:, 0]


def hidden_and_mask():
    torch.manual_seed(0)
    return torch.randn(3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("num_heads", [2, 4])
def test_the_narrow_attention_equals_one_with_queries_keys_and_values_of_every_token(num_heads, masked):
    hidden, mask = hidden_and_mask()
    mask = mask if masked else None
    attention = FirstTokenAttention(5, 8, num_heads, dropout=0.5).eval()
    found = attention(attention.states(hidden), mask)
    torch.testing.assert_close(found, literal_attention(attention, hidden, mask, num_heads))


def test_an_attention_gate_is_the_sigmoid_of_a_linear_map_of_what_the_first_token_sees():
    hidden, mask = hidden_and_mask()
    gate = AttentionGate(5, size=6, num_heads=2, attention_dropout=0.5).eval()
    seen = literal_attention(gate.attention, hidden, mask, 2)
    by_hand = torch.sigmoid(seen @ gate.decision.weight[0] + gate.decision.bias)
    torch.testing.assert_close(gate(hidden, mask), by_hand)


def test_a_linear_gate_is_the_sigmoid_of_a_linear_map_of_the_pooled_state():
    hidden, mask = hidden_and_mask()
    gate = LinearGate(5, pool=pool_mean)
    by_hand = torch.sigmoid(pool_mean(hidden, mask) @ gate.decision.weight[0] + gate.decision.bias)
    torch.testing.assert_close(gate(hidden, mask), by_hand)


def test_an_attention_exit_head_is_two_linear_maps_of_what_the_first_token_sees():
    hidden, mask = hidden_and_mask()
    head = AttentionExitHead(5, 3, dropout=0.5, size=8, num_heads=4, attention_dropout=0.5).eval()
    seen = literal_attention(head.attention, hidden, mask, 4)
    by_hand = torch.tanh(seen @ head.dense.weight.T + head.dense.bias) @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(hidden, mask), by_hand)
    states = []
    head(hidden, mask, states)
    torch.testing.assert_close(states, [torch.tanh(head.attention.reduce(hidden))])


def test_the_hard_weight_decides_at_the_threshold_and_passes_the_gradient_on():
    probability = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    weight = HardWeight.apply(probability, 0.5)
    assert weight.tolist() == [0.0, 1.0, 1.0]
    weight.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert probability.grad.tolist() == [1.0, 2.0, 3.0]


def test_a_hard_decision_takes_one_side_to_the_last_bit():
    given, made = torch.randn(2, 3, 4), 1e6 * torch.randn(2, 3, 4)
    mixed = SkipMixing(0.5)(given, made, torch.tensor([0.9, 0.1]))
    assert torch.equal(mixed, torch.stack([given[0], made[1]]))


def plain_forward(model: CostEffModel, batch, weight_of):
    """Layers and gates one by one, written out; returns hidden states, exit logits and skip probabilities."""
    mask = batch["attention_mask"]
    additive = torch.where(mask[:, None, None] == 1, 0.0, -1e9)
    hidden = [model.embeddings(batch["input_ids"], batch["token_type_ids"], None, None)]
    exits, probabilities = [], []
    for layer, gate, head in zip(model.layers, model.gates, model.exits.values(), strict=True):
        made, _ = layer(hidden[-1], additive, model._attention_function())
        probability = gate(hidden[-1], mask)
        weight = weight_of(probability)[:, None, None]
        hidden.append((1 - weight) * made + weight * hidden[-1])
        probabilities.append(probability)
        exits.append(head(hidden[-1] if layer is model.layers[-1] else made, mask))
    return hidden, exits, probabilities


def thresholded(probability):
    return (probability >= 0.5).to(probability.dtype)


@pytest.mark.parametrize("hard", [True, False])
def test_forward_mixes_as_written_out_layer_by_layer(gated, hard):
    batch = random_batch(LENGTHS)
    outputs = gated(**batch, hard_gates=hard, output_hidden_states=True)
    weight_of = thresholded if hard else (lambda probability: probability)
    hidden, exits, probabilities = plain_forward(gated.costeff, batch, weight_of)
    torch.testing.assert_close(list(outputs.exit_logits), exits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(list(outputs.skip_probabilities), probabilities)
    real = batch["attention_mask"].bool()
    for found, expected in zip(outputs.hidden_states, hidden, strict=True):
        torch.testing.assert_close(found[real], expected[real])
    skipped = torch.stack(probabilities) >= 0.5
    assert 0.2 < skipped.float().mean() < 0.8 and len(set(map(tuple, skipped.T.tolist()))) > 1


def test_gates_are_hard_in_eval_mode_and_soft_in_training_mode(gated):
    gated = tiny_model(seed=3, **FORMS[gated.config.skip_gates], hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    batch = random_batch(LENGTHS)
    by_default = gated(**batch).logits
    torch.testing.assert_close(by_default, gated(**batch, hard_gates=True).logits)
    soft = gated(**batch, hard_gates=False).logits
    assert not torch.allclose(by_default, soft)
    torch.testing.assert_close(gated.train()(**batch).logits, soft)


def test_without_the_gates_every_layer_runs(gated):
    plain = tiny_model(seed=3, **{**FORMS[gated.config.skip_gates], "skip_gates": None})
    left = plain.load_state_dict(gated.state_dict(), strict=False)
    assert not left.missing_keys and all(".gates." in name for name in left.unexpected_keys)
    batch = random_batch(LENGTHS)
    outputs = gated(**batch, use_gates=False)
    assert outputs.skip_probabilities is None
    torch.testing.assert_close(outputs.exit_logits, plain(**batch).exit_logits)


def test_hard_gates_learn_from_the_loss_as_if_they_were_soft_at_the_same_place(gated):
    """Straight-through: the gradient of a gate is that of the mixture's weight, taken at the hard weights."""
    batch = random_batch(LENGTHS)
    outputs = gated(**batch, labels=torch.arange(8) % 3, hard_gates=True, gradient_equilibrium=False)
    found = torch.autograd.grad(outputs.loss, list(outputs.skip_probabilities))
    weights = [thresholded(p.detach()).requires_grad_() for p in outputs.skip_probabilities]
    queue = iter(weights)
    _, exits, _ = plain_forward(gated.costeff, batch, lambda p: next(queue) + p - p.detach())  # later gates see it too
    loss = sum(nn.functional.cross_entropy(logits, torch.arange(8) % 3) for logits in exits)
    torch.testing.assert_close(list(found), list(torch.autograd.grad(loss, weights)), rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_equilibrium_leaves_a_gated_layer_and_its_gate_the_mean_gradient_over_the_exits_ahead():
    model = tiny_model(seed=3, **GATED)
    batch, labels = random_batch(LENGTHS), torch.arange(8) % 3

    def gradients(loss, names):
        parameters = dict(model.named_parameters())
        wanted = [parameters[name] for name in names]
        return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)

    names = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(("costeff.layers.1.", "costeff.gates.1.", "costeff.embeddings.norm"))
    ]
    balanced = gradients(model(**batch, labels=labels, hard_gates=False, gradient_equilibrium=True).loss, names)
    exits = model(**batch, hard_gates=False, gradient_equilibrium=False).exit_logits
    by_exit = [gradients(nn.functional.cross_entropy(logits, labels), names) for logits in exits]
    for name, *parts, found in zip(names, *by_exit, balanced, strict=True):
        ahead = len(exits) if "embeddings" in name else len(exits) - 1
        total = sum(part for part in parts if part is not None)
        torch.testing.assert_close(found, total / ahead, rtol=1e-4, atol=1e-6, msg=name)


def test_exit_states_are_those_of_the_heads_and_need_attention_heads():
    model, batch = tiny_model(seed=3, **ATTENTION), random_batch(LENGTHS)
    outputs = model(**batch, output_exit_states=True)
    assert [states.shape for states in outputs.exit_states] == [(8, 11, 8)] * 4
    assert model(**batch).exit_states is None
    with pytest.raises(ValueError, match="`output_exit_states` is True and `exit_head` 'linear'"):
        tiny_model(**GATED)(**batch, output_exit_states=True)


def test_padding_changes_no_gate_and_no_head(gated):
    short = {name: tensor[:, :6] for name, tensor in random_batch([6, 6]).items()}
    padded = {name: nn.functional.pad(tensor, (0, 5)) for name, tensor in short.items()}
    one, other = gated(**short), gated(**padded)
    torch.testing.assert_close(one.skip_probabilities, other.skip_probabilities)
    torch.testing.assert_close(one.exit_logits, other.exit_logits)


def test_fresh_gates_and_attention_heads_start_as_torch_starts_linear_layers():
    torch.manual_seed(0)
    model = CostEffModel(tiny_config(hidden_size=64, **{**ATTENTION, "gate_size": 32, "exit_head_size": 32}))
    for module in (*model.gates.modules(), *model.exits.modules()):
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert all(parameter.abs().max() <= bound for parameter in module.parameters())
            assert module.weight.abs().max() > 0.8 * bound
    batch = random_batch(LENGTHS)
    probabilities = torch.stack(model.eval()(**batch).skip_probabilities)
    assert (probabilities - 0.5).abs().max() < 0.3


def test_a_gated_model_is_saved_and_loaded_as_it_is(gated, tmp_path):
    gated.save_pretrained(tmp_path)
    loaded, report = CostEffForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    batch = random_batch(LENGTHS)
    torch.testing.assert_close(loaded(**batch).skip_probabilities, gated(**batch).skip_probabilities)


def test_a_saved_model_without_the_gates_weights_says_which_are_fresh(tmp_path):
    plain = tiny_model(seed=3, exit_pooling="mean")
    plain.save_pretrained(tmp_path)
    _, report = CostEffForSequenceClassification.from_pretrained(
        tmp_path, skip_gates="linear", output_loading_info=True
    )
    assert {name.split(".")[1] for name in report["missing_keys"]} == {"gates"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_gates": "hard"}, "`skip_gates` is 'hard'. It must be one of attention, linear, None"),
        ({"exit_head": "mlp"}, "`exit_head` is 'mlp'. It must be one of linear, attention"),
        ({"gate_size": 7}, "`gate_size` is 7. It must be a multiple of 2"),
        ({"exit_head_size": 6}, "`exit_head_size` is 6. It must be a multiple of 4"),
        ({"gate_size": 0}, "`gate_size` is 0. It must be a whole number in 2.."),
        ({"skip_threshold": 1.5}, "`skip_threshold` is 1.5. It must be a probability in 0..1"),
        ({"skip_threshold": -0.1}, "`skip_threshold` is -0.1. It must be a probability in 0..1"),
        ({"skip_gates": "attention", "gate_size": 200_000}, "weights; at most"),
    ],
)
def test_settings_that_no_gate_can_have_are_refused(changes, message):
    with pytest.raises(StrictDataclassClassValidationError) as error:
        tiny_config(**changes)
    assert message in str(error.value)
