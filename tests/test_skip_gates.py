"""Skip gates: what they compute, how a forward pass mixes by them, and prediction that really skips."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from helpers import (
    balance_gates,
    random_batch,
    select_rows,
    sentence_rows,
    tiny_bert,
    tiny_config,
    tiny_model,
    token_rows,
    word_tokenizer,
)
from hf_costeff import (
    BlockShape,
    CostEffCascade,
    CostEffClassificationPipeline,
    CostEffForSequenceClassification,
    CostEffModel,
    ExitConfig,
    SlenderizationPlan,
    add_skip_gates,
    calibrate,
    convert_from_stock,
    convert_to_stock,
    export_onnx,
    pack,
    predict_texts,
    promises,
    prune_blocks,
    slenderize,
    unpack,
)
from hf_costeff.block_pruning import zero_blocks
from hf_costeff.cli import main
from hf_costeff.data import make_collator
from hf_costeff.efficiency import mean_flops
from hf_costeff.evaluation import Contender, collect_exit_logits, report_rows
from hf_costeff.exit_heads import AttentionExitHead, FirstTokenAttention, pool_mean
from hf_costeff.exit_times import measure_exit_times
from hf_costeff.modeling_costeff import inference
from hf_costeff.onnx_runner import Runner
from hf_costeff.prediction import WaitingRows
from hf_costeff.skip_gates import AttentionGate, HardWeight, LinearGate, SkipMixing

GATED = {"skip_gates": "linear", "exit_pooling": "mean"}
ATTENTION = {"skip_gates": "attention", "gate_size": 6, "exit_head": "attention", "exit_head_size": 8}
FORMS = {"linear": GATED, "attention": ATTENTION}
LENGTHS = [7, 3, 11, 2, 9, 5, 11, 4]


@pytest.fixture(params=FORMS, ids=str)
def gated(request):
    """A tiny model whose gates let about half of the layers be skipped, other ones by other rows."""
    return balance_gates(tiny_model(seed=3, **FORMS[request.param]))


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
    gated.config.hidden_dropout_prob = gated.config.attention_probs_dropout_prob = 0
    state = gated.state_dict()
    gated = CostEffForSequenceClassification(gated.config).eval()
    gated.load_state_dict(state)
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
    model = balance_gates(tiny_model(seed=3, **GATED))
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
    scaled = gradients(model(**batch, labels=labels, hard_gates=False, gradient_equilibrium=True).loss, names)
    exits = model(**batch, hard_gates=False, gradient_equilibrium=False).exit_logits
    by_exit = [gradients(nn.functional.cross_entropy(logits, labels), names) for logits in exits]
    for name, *parts, found in zip(names, *by_exit, scaled, strict=True):
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


# ---- prediction

EARLY = {
    "full depth": False,
    "entropy": ExitConfig(threshold=0.6),
    "entropy in nats": ExitConfig("entropy_nats", threshold=0.8),
    "confidence": ExitConfig("confidence", threshold=0.5),
    "margin": ExitConfig("margin", threshold=[0.4, 0.3, 0.5, 0.9]),
    "some exits": ExitConfig(threshold=0.7, checked_exits=[2, 3]),
}


def by_hand(model, batch, settings):
    """One row by itself, layer by layer, every one of them looked at with `if`, as the method is written down."""
    base, depth = model.costeff, model.config.num_hidden_layers
    hidden, skipped = base.embeddings(batch["input_ids"], batch["token_type_ids"], None, None), []
    rule = None if settings is False else settings.build_criterion(depth, "single_label_classification")
    for layer in range(1, depth + 1):
        skips = bool(base.gates[layer - 1](hidden, None) >= 0.5)
        skipped.append(skips)
        if not skips:
            hidden, _ = base.layers[layer - 1](hidden, None, base._attention_function())
        logits = base.exits[str(layer)](hidden, None)
        asked = layer < depth and not skips and rule is not None and settings.is_checked(layer)
        if asked and rule.leaves(logits[:, None], layer - 1):
            break
    return logits[0], layer, skipped + [False] * (depth - len(skipped))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("early_exit", EARLY.values(), ids=list(EARLY))
def test_every_row_skips_and_leaves_in_a_batch_as_by_hand_alone(gated, early_exit, attention):
    gated.set_attn_implementation(attention)
    lengths = torch.randint(2, 12, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    batch = random_batch(lengths)
    found = gated.predict(**batch, early_exit=early_exit)
    for row, length in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
        with torch.no_grad():
            logits, exit_layer, skipped = by_hand(gated, alone, early_exit)
        assert found.exit_layer[row] == exit_layer
        assert found.skipped_layers[row].tolist() == skipped
        torch.testing.assert_close(found.logits[row], logits, atol=1e-5, rtol=1e-5)
    assert len(set(map(tuple, found.skipped_layers.tolist()))) > 3
    assert early_exit is False or len(set(found.exit_layer.tolist())) > 2


@pytest.mark.parametrize("early_exit", EARLY.values(), ids=list(EARLY))
def test_a_rows_answer_does_not_depend_on_its_batch(gated, early_exit):
    batch = random_batch([7, 3, 11, 2, 9, 5, 11, 4, 8, 8, 6, 10])
    whole = gated.predict(**batch, early_exit=early_exit)
    for rows in ([11, 0, 5], [3], [6, 2, 2, 7, 1, 9, 10], list(range(11, -1, -1))):
        part = gated.predict(**select_rows(batch, rows), early_exit=early_exit)
        assert torch.equal(part.exit_layer, whole.exit_layer[rows])
        assert torch.equal(part.skipped_layers, whole.skipped_layers[rows])
        torch.testing.assert_close(part.logits, whole.logits[rows], atol=1e-5, rtol=1e-5)


def test_full_depth_is_what_the_hard_forward_answers(gated):
    batch = random_batch(LENGTHS)
    found, outputs = gated.predict(**batch, early_exit=False), gated(**batch)
    torch.testing.assert_close(found.logits, outputs.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.skipped_layers, torch.stack(outputs.skip_probabilities, 1) >= 0.5)
    assert found.exit_layer.tolist() == [4] * 8


def test_nothing_is_skipped_where_the_caller_says_so(gated):
    batch = random_batch(LENGTHS)
    found = gated.predict(**batch, early_exit=0.6, skip_layers=False)
    plain = tiny_model(seed=3, **{**FORMS[gated.config.skip_gates], "skip_gates": None})
    plain.load_state_dict(gated.state_dict(), strict=False)
    expected = plain.predict(**batch, early_exit=0.6)
    assert found.skipped_layers is None and torch.equal(found.exit_layer, expected.exit_layer)
    assert torch.equal(found.logits, expected.logits)


def set_gates(model, biases):
    """Gates that decide alike for every row: skip where the bias is positive."""
    with torch.no_grad():
        for gate, bias in zip(model.costeff.gates, biases, strict=True):
            gate.decision.weight.zero_()
            gate.decision.bias.fill_(bias)
    return model


@pytest.mark.parametrize("early_exit", [False, 0.0, 0.6, 1.0])
def test_rows_that_skip_every_layer_are_answered_by_the_last_exit(gated, early_exit):
    model, batch = set_gates(gated, [9.0] * 4), random_batch(LENGTHS)
    found = model.predict(**batch, early_exit=early_exit)
    embedded = model.costeff.embeddings(batch["input_ids"], batch["token_type_ids"], None, None)
    torch.testing.assert_close(found.logits, model.costeff.exits["4"](embedded, batch["attention_mask"]))
    assert found.exit_layer.tolist() == [4] * 8 and found.skipped_layers.all()


def test_the_last_exit_looks_at_every_row_once(gated):
    seen = []
    gated.costeff.exits["4"].register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    found = gated.predict(**random_batch(LENGTHS), early_exit=False)
    assert found.skipped_layers[:, -1].unique().tolist() == [False, True] and seen == [len(LENGTHS)]


@pytest.mark.parametrize("skipped", [[1], [4], [2, 3], []])
def test_layers_that_all_rows_skip_might_as_well_not_be_there(gated, skipped):
    model = set_gates(gated, [9.0 if layer in skipped else -9.0 for layer in range(1, 5)])
    batch = random_batch(LENGTHS)
    for layer in skipped:
        model.costeff.layers[layer - 1].forward = None  # would fail if it ran
    found = model.predict(**batch, early_exit=0.7)
    left = [layer for layer in range(1, 5) if layer not in skipped]
    assert set(found.exit_layer.tolist()) <= {*left, 4}
    assert found.skipped_layers.any(0).tolist() == [layer in skipped for layer in range(1, 5)]


def test_a_gate_at_exactly_the_threshold_skips():
    model = set_gates(tiny_model(seed=3, **GATED), [0.0] * 4)
    assert model.predict(**random_batch([3, 5])).skipped_layers.all()
    model.config.skip_threshold = 0.5001
    assert not model.predict(**random_batch([3, 5])).skipped_layers.any()


def test_who_skips_does_not_pay_for_who_runs(gated):
    """The layer sees the rows that run it alone, cropped to their longest."""
    seen = []
    for layer in gated.costeff.layers:
        layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[:2]))
    lengths = [7, 3, 11, 2, 9, 5, 11, 4]
    found = gated.predict(**random_batch(lengths), early_exit=False)
    running = [
        [length for length, skips in zip(lengths, row, strict=True) if not skips]
        for row in found.skipped_layers.T.tolist()
    ]
    assert seen == [(len(rows), max(rows)) for rows in running if rows]


@pytest.mark.parametrize("early_exit", [False, 0.6, ExitConfig(threshold=0.7, checked_exits=[2])])
def test_rows_merged_on_the_way_answer_as_alone(gated, early_exit):
    batch = random_batch(LENGTHS * 2)
    model, plan = gated.costeff, gated.costeff.exit_plan(early_exit)
    waiting, left = WaitingRows(model, plan, batch_size=5), []
    parts = [[0, 1, 2], [3], [4, 5, 6, 7, 8], list(range(9, 16))]
    with inference(model):
        for leaving in waiting.run((rows, select_rows(batch, rows)) for rows in parts):
            left.append(leaving)
    found, expected = model.answer(left, plan), gated.predict(**batch, early_exit=early_exit)
    assert torch.equal(found.exit_layer, expected.exit_layer)
    assert torch.equal(found.skipped_layers, expected.skipped_layers)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_patience_is_refused_with_gates_and_allowed_without_skipping():
    model, batch = tiny_model(seed=3, **GATED), random_batch(LENGTHS)
    patience = ExitConfig("patience", patience=1)
    with pytest.raises(ValueError, match=r"The patience criterion compares .* Use the entropy, confidence or margin"):
        model.predict(**batch, early_exit=patience)
    assert model.predict(**batch, early_exit=patience, skip_layers=False).skipped_layers is None


def test_skipping_without_gates_is_refused():
    with pytest.raises(ValueError, match=r"`skip_layers` is True, and this model has no gates. .*add_skip_gates"):
        tiny_model().predict(**random_batch([3]), skip_layers=True)
    assert tiny_model().predict(**random_batch([3]), skip_layers=False).skipped_layers is None


def test_logits_that_are_not_finite_name_the_row_that_ran(gated):
    batch = random_batch(LENGTHS)
    skipped = gated.predict(**batch, early_exit=False).skipped_layers[:, 1].tolist()
    with torch.no_grad():
        gated.costeff.exits["2"].classifier.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=f"row {skipped.index(False)} after layer 2"):
        gated.predict(**batch, early_exit=ExitConfig(threshold=0.5, checked_exits=[2]))


# ---- other parts of the package


def head_sizes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items() if ".gates." in name or ".exits." in name}


@pytest.mark.parametrize("form", ["linear", "attention"])
@pytest.mark.parametrize("kind", ["converted", "slenderized", "packed"])
def test_gates_are_added_to_any_model_which_answers_as_before_without_them(kind, form):
    model = convert_from_stock(tiny_bert())
    if kind == "slenderized":
        plan = SlenderizationPlan(((True, False, True),) * 4, ((True, False) * 8,) * 4, embedding_rank=5)
        model = slenderize(model, plan)
    if kind == "packed":
        model = pack(model, prune_blocks(model, BlockShape(columns=4), ratio=0.5))
    model.config.exit_config = ExitConfig(threshold=0.5).to_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    gated = add_skip_gates(model, form, gate_size=6)
    batch = random_batch(LENGTHS)
    assert gated.config.exit_config is None and model.config.skip_gates is None and not gated.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    torch.testing.assert_close(gated(**batch, use_gates=False).exit_logits, model(**batch).exit_logits)
    assert gated.predict(**batch).skipped_layers.shape == (8, 4)
    torch.manual_seed(1)
    again = add_skip_gates(model, form, gate_size=6)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in gated.state_dict().items())


def test_attention_heads_are_made_fresh_where_they_were_linear():
    model = convert_from_stock(tiny_bert())
    gated = add_skip_gates(model, "linear", exit_head="attention", exit_head_size=8)
    assert gated.costeff.exits["1"].classifier.in_features == 8
    torch.testing.assert_close(
        gated(**random_batch(LENGTHS), use_gates=False, output_hidden_states=True).hidden_states,
        model(**random_batch(LENGTHS), output_hidden_states=True).hidden_states,
    )
    kept = add_skip_gates(model, "linear", exit_head="linear")
    assert torch.equal(kept.costeff.exits["1"].classifier.weight, model.costeff.exits["1"].classifier.weight)


def test_a_model_with_fresh_gates_keeps_its_name_and_what_is_frozen():
    model = tiny_model(exit_pooling="mean")
    model.name_or_path = "org/slim"
    model.costeff.layers[1].requires_grad_(False)
    model.costeff.exits["2"].requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    gated = add_skip_gates(model, "linear")
    assert frozen and {name for name, p in gated.named_parameters() if not p.requires_grad} == frozen
    assert gated.name_or_path == "org/slim"
    fresh = add_skip_gates(model, "linear", exit_head="attention", exit_head_size=8)
    assert all(parameter.requires_grad for parameter in fresh.costeff.exits.parameters())


@pytest.mark.parametrize("make", [lambda: CostEffModel(tiny_config()), tiny_bert], ids=["bare", "stock"])
def test_gates_go_into_a_multi_exit_classifier_alone(make):
    with pytest.raises(ValueError, match=r"this is a (CostEffModel|Bert\w+)\. Load it with AutoModelForSequence"):
        add_skip_gates(make())


def test_a_first_gate_that_cannot_tell_rows_apart_is_told(caplog):
    with caplog.at_level(logging.WARNING, "hf_costeff.gating"):
        add_skip_gates(tiny_model(), "attention", gate_size=2)
        add_skip_gates(tiny_model(exit_pooling="mean"), "linear")
        assert "the same for every row" not in caplog.text
        add_skip_gates(tiny_model(), "linear")
    [said] = [record.getMessage() for record in caplog.records if "the same for every row" in record.getMessage()]
    assert 'exit_pooling="mean"' in said and "attention gates" in said


def test_gates_are_added_once():
    gated = add_skip_gates(convert_from_stock(tiny_bert()), "linear")
    with pytest.raises(ValueError, match="The model has skip gates already"):
        add_skip_gates(gated)


def test_an_unknown_form_of_gate_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="`skip_gates` is 'mlp'"):
        add_skip_gates(tiny_model(), "mlp")


def test_gates_that_cost_more_than_their_layers_are_named(caplog):
    model = tiny_model(num_attention_heads=[2, 0, 1, 3], intermediate_size=[10, 0, 0, 16], exit_pooling="mean")
    with caplog.at_level(logging.WARNING, "hf_costeff.gating"):
        gated = add_skip_gates(model, "linear")
        assert [record.getMessage().split(" take")[0] for record in caplog.records] == ["The gates of layers 2"]
        caplog.clear()
        add_skip_gates(model, "attention", gate_size=200)
        assert caplog.records[0].getMessage().startswith("The gates of layers 1, 2, 3, 4 take")
        caplog.clear()
        add_skip_gates(tiny_model(num_attention_heads=2, intermediate_size=16, exit_pooling="mean"), "linear")
        assert not caplog.records
    assert gated.predict(**random_batch(LENGTHS)).skipped_layers.shape == (8, 4)


def test_gates_that_are_dear_only_with_their_exit_heads_are_named(caplog):
    """A gate takes 14% of its layer, and an attention head 19%."""
    model = tiny_model(num_attention_heads=2, intermediate_size=16, exit_pooling="mean", exit_layers=[2, 4])
    with caplog.at_level(logging.WARNING, "hf_costeff.gating"):
        add_skip_gates(model, "attention", gate_size=24)
        assert not caplog.records
        add_skip_gates(model, "attention", gate_size=24, exit_head="attention", exit_head_size=24)
    assert [record.getMessage().split(" of the")[0] for record in caplog.records] == [
        "The gates of layers 2, 4 take, with their exit heads, 25%"
    ]


def test_a_truncated_model_keeps_its_gates_and_answers_rows_that_run_its_last_layer_as_the_exit_did(gated):
    shallow, batch = gated.truncate(2), random_batch(LENGTHS)
    assert len(shallow.costeff.gates) == 2
    outputs, found = gated(**batch), shallow.predict(**batch)
    ran = torch.stack(outputs.skip_probabilities[:2], 1)[:, 1] < 0.5
    assert torch.equal(found.skipped_layers, torch.stack(outputs.skip_probabilities[:2], 1) >= 0.5)
    torch.testing.assert_close(found.logits[ran], outputs.exit_logits[1][ran], atol=1e-5, rtol=1e-5)
    assert ran.any() and not ran.all()


def test_a_gated_model_is_slenderized_with_its_gates(gated):
    heads = tuple((True,) * count for count in gated.config.num_attention_heads)
    neurons = tuple((True,) * count for count in gated.config.intermediate_size)
    batch = random_batch(LENGTHS)
    same = slenderize(gated, SlenderizationPlan(heads, neurons))
    torch.testing.assert_close(same(**batch).exit_logits, gated(**batch).exit_logits)
    assert torch.equal(same.predict(**batch).skipped_layers, gated.predict(**batch).skipped_layers)
    narrow = slenderize(gated, SlenderizationPlan(heads, ((False,) * 10, *neurons[1:])))
    assert head_sizes(narrow) == head_sizes(gated) and narrow.config.intermediate_size[0] == 0


def test_a_gated_model_is_packed_and_unpacked(gated):
    masks, batch = prune_blocks(gated, BlockShape(columns=4), ratio=0.5), random_batch(LENGTHS)
    packed, masked = pack(gated, masks), zero_blocks(gated, masks)
    for model in (packed, unpack(packed)):
        found, expected = model.predict(**batch, early_exit=0.6), masked.predict(**batch, early_exit=0.6)
        assert torch.equal(found.skipped_layers, expected.skipped_layers)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_a_model_is_loaded_without_its_gates_and_answers_as_if_none_skipped(gated, tmp_path):
    gated.save_pretrained(tmp_path)
    plain, batch = CostEffForSequenceClassification.from_pretrained(tmp_path, skip_gates=None), random_batch(LENGTHS)
    assert plain.config.skip_gates is None and not len(plain.costeff.gates)
    expected = gated.predict(**batch, early_exit=0.6, skip_layers=False)
    torch.testing.assert_close(plain.predict(**batch, early_exit=0.6).logits, expected.logits)


def test_what_needs_the_same_layers_of_every_row_refuses_gates(tmp_path):
    model = tiny_model(seed=3, skip_gates="linear")
    times = (model, token_rows(4), make_collator(word_tokenizer()))
    for call, subject in (
        (lambda: convert_to_stock(model), "Becoming a stock model"),
        (lambda: export_onnx(model, word_tokenizer(), tmp_path / "onnx"), "Export to graphs"),
        (lambda: measure_exit_times(*times), "Timing the exits"),
        (lambda: CostEffCascade.from_members([tiny_model(), model]), "A cascade, as member 2,"),
    ):
        with pytest.raises((ValueError, StrictDataclassClassValidationError)) as error:
            call()
        assert f"{subject} needs a model whose rows all run the same layers" in str(error.value)
        assert "from_pretrained(..., skip_gates=None)" in str(error.value)
    with pytest.raises(ValueError, match="`exit_head` is 'attention', and stock classifiers"):
        convert_to_stock(tiny_model(exit_head="attention", exit_head_size=8))


def test_attention_heads_are_exported(tmp_path):
    model = tiny_model(seed=3, exit_head="attention", exit_head_size=8)
    texts = [*sentence_rows(6)["text"], "a good film"]
    folder = export_onnx(model, word_tokenizer(), tmp_path / "onnx").folder
    found = list(Runner(folder).predict(texts, early_exit=0.5))
    expected = list(predict_texts(model, word_tokenizer(), texts, early_exit=0.5, show_progress=False))
    assert [answer["exit_layer"] for answer in found] == [answer["exit_layer"] for answer in expected]
    scores = [torch.tensor([answer["score"] for answer in answers]) for answers in (found, expected)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


# ---- calibrating, comparing, answering texts


def test_calibrated_settings_do_what_was_seen_row_by_row(gated):
    rows, collator = token_rows(40), make_collator(word_tokenizer())
    settings = calibrate(gated, rows, collator, max_disagreement=20.0, show_progress=False)
    full, early, layers = [], [], []
    for ids in rows["input_ids"]:
        answer = gated.predict(torch.tensor([ids]), early_exit=True)
        early.append(answer.logits.argmax().item())
        layers.append(answer.exit_layer.item())
        full.append(gated.predict(torch.tensor([ids]), early_exit=False).logits.argmax().item())
    seen = settings.calibration
    assert seen["mean_exit_layer"] == pytest.approx(sum(layers) / 40) and seen["mean_exit_layer"] < 4
    assert seen["disagreement"] == pytest.approx(sum(a != b for a, b in zip(full, early, strict=True)) / 40)
    assert seen["skip_threshold"] == 0.5


def test_without_skipping_the_records_are_of_a_plain_model(gated):
    rows, collator = token_rows(8), make_collator(word_tokenizer())
    records = collect_exit_logits(gated, rows, collator, show_progress=False, skip_layers=False)
    assert records.skipped is None
    batch = collator([rows[row] for row in range(8)])
    del batch["labels"]
    with torch.no_grad():
        expected = torch.stack(gated(**batch, use_gates=False).exit_logits, 1)
    torch.testing.assert_close(records.logits, expected, atol=1e-4, rtol=1e-5)


def test_a_promise_is_void_where_rows_take_other_paths(caplog):
    model = balance_gates(tiny_model(seed=3, **GATED))
    goal = {"max_disagreement": 50.0, "delta": 0.3, "guarantee": True, "fit_temperatures": False}
    calibrate(model, token_rows(23), make_collator(word_tokenizer()), show_progress=False, **goal)
    batch = random_batch(LENGTHS)
    promises.logger.addHandler(caplog.handler)
    try:
        model.predict(**batch, early_exit=True)
        assert not caplog.records
        model.predict(**batch, early_exit=True, skip_layers=False)
        model.config.skip_threshold = 0.6
        model.predict(**batch, early_exit=True)
    finally:
        promises.logger.removeHandler(caplog.handler)
    said = sorted({record.getMessage().split(". The promise")[0] for record in caplog.records})
    promised = "The exit settings were promised with a skip threshold of 0.5, and the model answers"
    assert said == [f"{promised} with a skip threshold of 0.6", f"{promised} without skipping"]


def test_the_comparison_counts_the_layers_that_ran(gated):
    rows, collator = token_rows(12), make_collator(word_tokenizer())
    records = collect_exit_logits(gated, rows, collator, show_progress=False)
    plain = collect_exit_logits(gated, rows, collator, show_progress=False, skip_layers=False)
    settings = ExitConfig(threshold=0.6)
    contenders = [Contender("skip", gated, records, settings), Contender("exit", gated, plain, settings, False)]
    skip, exit_ = report_rows(contenders, rows, collator, "single_label_classification")
    for found, early in ((skip, None), (exit_, False)):
        spent = []
        for ids in rows["input_ids"]:
            answer = gated.predict(torch.tensor([ids]), early_exit=settings, skip_layers=early)
            at_128 = [128], [1, 2, 3, 4], answer.skipped_layers
            spent.append(
                [mean_flops(gated.config, answer.exit_layer, length, *at_128[1:]) for length in ([len(ids)], at_128[0])]
            )
        own, at_128 = torch.tensor(spent, dtype=torch.float64).mean(0).tolist()
        assert (found.flops_per_row, found.flops_per_row_at_128) == pytest.approx((own, at_128))
    assert skip.flops_per_row != exit_.flops_per_row


@pytest.mark.parametrize("skip_layers", [None, True, False])
def test_texts_are_answered_as_alone_and_say_how_many_layers_ran(gated, skip_layers):
    texts, tokenizer = list(sentence_rows(30)["text"]), word_tokenizer()
    settings = {"early_exit": 0.6, "skip_layers": skip_layers}
    found = list(predict_texts(gated, tokenizer, texts, **settings, batch_size=4, show_progress=False))
    for text, answer in zip(texts, found, strict=True):
        alone = gated.predict(**tokenizer(text, return_tensors="pt"), **settings)
        assert answer["exit_layer"] == alone.exit_layer.item()
        assert answer["score"] == pytest.approx(alone.probabilities.max().item(), abs=1e-5)
        if skip_layers is False:
            assert "layers_run" not in answer
        else:
            skipped = alone.skipped_layers[0].sum().item()
            assert answer["layers_run"] == answer["exit_layer"] - skipped
    classify = CostEffClassificationPipeline(model=gated, tokenizer=tokenizer, device="cpu")
    assert [{**answer, "score": 0} for answer in classify(texts, **settings)] == [{**a, "score": 0} for a in found]


@pytest.mark.parametrize(("flags", "ran"), [([], True), (["--skip_layers", "false"], False)])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_the_command_writes_how_many_layers_ran(tmp_path, monkeypatch, ending, flags, ran):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    balance_gates(tiny_model(seed=3, **GATED)).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.txt").write_text("a good film\ndull\n")
    output = tmp_path / f"answers{ending}"
    assert (
        main(
            ["predict", str(tmp_path / "model"), "--file", str(tmp_path / "rows.txt"), "--output", str(output), *flags]
        )
        == 0
    )
    readers = {".csv": Dataset.from_csv, ".jsonl": Dataset.from_json, ".parquet": Dataset.from_parquet}
    assert ("layers_run" in readers[ending](str(output)).column_names) is ran


def test_skipping_is_not_asked_of_a_cascade():
    cascade = CostEffCascade.from_members([tiny_model(), tiny_model(seed=1)])
    with pytest.raises(ValueError, match="`skip_layers` is True, and no member of a cascade has gates"):
        predict_texts(cascade, word_tokenizer(), ["a good film"], skip_layers=True)
