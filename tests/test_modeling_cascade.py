"""A cascade answers as a plain loop over its members would, row by row, and is one model to save and load."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from helpers import random_batch, select_rows, tiny_bert, tiny_model
from hf_costeff import CostEffCascade, ExitConfig

LENGTHS = [7, 3, 11, 2, 9, 5, 4, 12]
NAMES = ("bad", "fair", "good")
THRESHOLDS = [0.705, 0.5, 0.5, 0.0]  # rows leave at every member
SETTINGS = ExitConfig(threshold=THRESHOLDS)


def names(*order: str) -> dict:
    return {"id2label": dict(enumerate(order)), "label2id": {name: index for index, name in enumerate(order)}}


def distilbert(seed: int = 2):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 41, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 24}
    model = DistilBertForSequenceClassification(DistilBertConfig(**sizes, **names(*NAMES)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def cascade():
    """A stock BERT, a model with exits and settings of its own and labels in another order, a DistilBERT, a BERT."""
    inner = ExitConfig(threshold=0.6).to_dict()
    members = [
        tiny_bert(seed=2, num_hidden_layers=2, **names(*NAMES)),
        tiny_model(seed=6, exit_config=inner, **names("good", "bad", "fair")),
        distilbert(),
        tiny_bert(seed=5, **names(*NAMES)),
    ]
    return CostEffCascade.from_members(members)


@pytest.fixture
def batch():
    return random_batch(LENGTHS)


def by_hand(cascade, batch, thresholds):
    """Row after row, alone and unpadded: (member, layer, logits), with the entropy written out."""
    found = []
    for row, length in enumerate(LENGTHS):
        inputs = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
        for number, member in enumerate(cascade.members, start=1):
            if number == 2:
                prediction = member.predict(**inputs, early_exit=ExitConfig(threshold=0.6))
                logits, layer = prediction.logits[0][[1, 2, 0]], int(prediction.exit_layer)
            else:
                taken = {name: inputs[name] for name in inputs if number != 3 or name != "token_type_ids"}
                with torch.no_grad():
                    logits, layer = member(**taken).logits[0], member.config.num_hidden_layers
            chances = logits.double().softmax(-1)
            unsure = -(chances * chances.log()).sum() / math.log(3)
            if unsure < thresholds[number - 1] or number == len(cascade.members):
                found.append((number, layer, logits))
                break
    return found


@pytest.mark.parametrize("thresholds", [THRESHOLDS, [0.7] * 4, [0.84, 0.56, 0.6, 0.0]])
def test_predict_equals_a_plain_loop_over_rows_and_members(cascade, batch, thresholds):
    uniform = len(set(thresholds)) == 1
    prediction = cascade.predict(**batch, early_exit=0.7 if uniform else ExitConfig(threshold=thresholds))
    expected = by_hand(cascade, batch, thresholds)
    assert prediction.exit_model.tolist() == [member for member, _, _ in expected]
    assert prediction.exit_layer.tolist() == [layer for _, layer, _ in expected]
    torch.testing.assert_close(prediction.logits, torch.stack([logits for _, _, logits in expected]), rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.probabilities, prediction.logits.softmax(-1))
    torch.testing.assert_close(prediction.confidence, prediction.probabilities.amax(-1))


def test_the_batch_tells_members_and_inner_exits_apart(cascade, batch):
    """The test above would say little if all rows left at the same place."""
    prediction = cascade.predict(**batch, early_exit=SETTINGS)
    assert set(prediction.exit_model.tolist()) == {1, 2, 3, 4}
    assert len(set(prediction.layers_run[:, 1].tolist()) - {0}) >= 2


def test_only_deferred_rows_reach_the_next_member_cropped_to_their_longest(cascade, batch):
    shapes: dict[int, list] = {number: [] for number in range(1, 5)}
    for number in (1, 3, 4):
        cascade.members[number - 1].register_forward_pre_hook(
            lambda module, args, kwargs, seen=shapes[number]: seen.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
    rows = [0, 1, 4, 5]  # the longest leaves first
    prediction = cascade.predict(**select_rows(batch, rows), early_exit=SETTINGS)
    lengths = [LENGTHS[row] for row in rows]
    for number in (1, 3, 4):
        came = [length for length, layers in zip(lengths, prediction.layers_run[:, number - 1], strict=True) if layers]
        assert shapes[number] == ([(len(came), max(came))] if came else [])


def test_layers_run_are_those_of_every_member_that_a_row_came_to(cascade, batch):
    prediction = cascade.predict(**batch, early_exit=SETTINGS)
    for model, layer, layers in zip(
        *(prediction[k].tolist() for k in ("exit_model", "exit_layer", "layers_run")), strict=True
    ):
        assert layers[model - 1] == layer and all(layers[:model]) and not any(layers[model:])
        assert layers[0] == 2 and layers[2] in (0, 2) and layers[3] in (0, 4)


def test_a_row_answers_alike_in_any_batch(cascade, batch):
    whole = cascade.predict(**batch, early_exit=SETTINGS)
    for rows in ([3], [7, 0], [6, 5, 4, 3, 2, 1, 0, 7]):
        part = cascade.predict(**select_rows(batch, rows), early_exit=SETTINGS)
        assert part.exit_model.tolist() == whole.exit_model[rows].tolist()
        torch.testing.assert_close(part.logits, whole.logits[rows], rtol=0, atol=1e-5)


def test_full_depth_is_the_last_member_alone_and_equals_forward(cascade, batch):
    asked = []
    for member in cascade.members[:-1]:
        member.register_forward_hook(lambda *_: asked.append(1))
    for early_exit in (None, False, 0.0):
        prediction = cascade.predict(**batch, early_exit=early_exit)
        assert prediction.exit_model.tolist() == [4] * 8 and prediction.layers_run.tolist() == [[0, 0, 0, 4]] * 8
        torch.testing.assert_close(prediction.logits, cascade(**batch).logits, rtol=0, atol=1e-5)
    assert not asked


def test_full_depth_does_not_use_the_exits_of_the_last_member(batch):
    last = tiny_model(seed=2, exit_config=ExitConfig(threshold=1.0).to_dict())
    cascade = CostEffCascade.from_members([tiny_bert(num_hidden_layers=1), last])
    assert cascade.predict(**batch, early_exit=False).exit_layer.tolist() == [4] * 8
    bold = cascade.predict(**batch, early_exit=ExitConfig("confidence", threshold=[0.999, 0.5]))
    assert bold.exit_layer[bold.exit_model == 2].unique().tolist() == [1]


def test_a_threshold_of_one_lets_everybody_leave_at_the_first_member(cascade, batch):
    prediction = cascade.predict(**batch, early_exit=1.0)
    assert prediction.layers_run.tolist() == [[2, 0, 0, 0]] * 8


def test_a_member_that_lets_nobody_leave_is_not_run(cascade, batch):
    prediction = cascade.predict(**batch, early_exit=ExitConfig(threshold=[0.705, 0.0, 0.6, 0.0]))
    assert prediction.layers_run[:, 1].tolist() == [0] * 8 and 3 in prediction.exit_model
    unchecked = cascade.predict(**batch, early_exit=ExitConfig(threshold=[0.705, 0.3, 0.6, 0.0], checked_exits=[1, 3]))
    assert unchecked.exit_model.tolist() == prediction.exit_model.tolist()


def test_patience_means_members_that_agree(cascade, batch):
    prediction = cascade.predict(**batch, early_exit=ExitConfig("patience", patience=1))
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    first, third = cascade.members[0](**batch).logits.argmax(-1), cascade.members[2](**plain).logits.argmax(-1)
    second = cascade.members[1].predict(**batch).logits[:, [1, 2, 0]].argmax(-1)
    answers = zip(first.tolist(), second.tolist(), third.tolist(), strict=True)
    expected = [2 if one == two else 3 if two == three else 4 for one, two, three in answers]
    assert prediction.exit_model.tolist() == expected and len(set(expected)) == 3


def test_temperatures_of_members_shape_probabilities_and_not_logits(cascade, batch):
    settings = ExitConfig(threshold=1.0, temperatures=[2.0, 1.0, 1.0, 1.0])
    prediction = cascade.predict(**batch, early_exit=settings)
    torch.testing.assert_close(prediction.probabilities, (prediction.logits / 2).softmax(-1))


def test_forward_is_the_last_member_with_loss_and_its_own_kind_of_output(cascade, batch):
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    ours, own = cascade(**batch, labels=labels), cascade.members[-1](**batch, labels=labels)
    assert type(ours) is type(own) and torch.equal(ours.loss, own.loss) and torch.equal(ours.logits, own.logits)


def test_predict_leaves_every_mode_as_it_was_and_runs_without_dropout(cascade, batch):
    quiet = cascade.predict(**batch, early_exit=SETTINGS).logits
    cascade.train()
    torch.testing.assert_close(cascade.predict(**batch, early_exit=SETTINGS).logits, quiet)
    assert all(module.training for module in cascade.modules())


def test_it_saves_one_file_with_a_prefix_per_member_and_loads_alike(cascade, batch, tmp_path):
    cascade.config.exit_config = SETTINGS.to_dict()
    cascade.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        prefixes = {".".join(name.split(".")[:3]) for name in file.keys()}  # noqa: SIM118
    assert {"members.0.bert", "members.1.costeff", "members.2.distilbert", "members.3.bert"} <= prefixes
    again, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is CostEffCascade and not any(report.values())
    state = again.state_dict()
    assert state.keys() == cascade.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in cascade.state_dict().items())
    before, after = cascade.predict(**batch, early_exit=True), again.predict(**batch)
    assert before.layers_run.tolist() == after.layers_run.tolist()
    torch.testing.assert_close(before.logits, after.logits, rtol=0, atol=1e-6)


def test_members_of_several_precisions_get_the_widest_and_keep_their_values(batch, tmp_path):
    members = [distilbert().bfloat16(), tiny_model(seed=6), tiny_bert(seed=5).half()]
    weights = [{name: tensor.float() for name, tensor in member.state_dict().items()} for member in members]
    CostEffCascade.from_members(members).save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in again.parameters()} == {torch.float32}
    for member, before in zip(again.members, weights, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in member.state_dict().items())
    both = CostEffCascade.from_members([tiny_bert().half(), tiny_bert(seed=5).half()])
    assert {tensor.dtype for tensor in both.parameters()} == {torch.float16}


def test_its_precision_is_asked_for_as_of_any_model(cascade, tmp_path):
    for member in cascade.members:
        member.config.dtype = torch.float32  # as loading leaves it
    cascade.save_pretrained(tmp_path)
    cascade.bfloat16().save_pretrained(tmp_path / "half")
    for folder, dtype, expected in (
        (tmp_path, torch.bfloat16, torch.bfloat16),
        (tmp_path, "auto", torch.float32),
        (tmp_path / "half", "auto", torch.bfloat16),
        (tmp_path / "half", torch.float32, torch.float32),
    ):
        again = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        assert {tensor.dtype for tensor in again.parameters()} == {expected}
    again = CostEffCascade.from_pretrained(tmp_path, config=cascade.config, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.parameters()} == {torch.bfloat16}


def test_settings_of_members_that_change_later_are_saved_too(cascade, tmp_path):
    cascade.members[1].config.exit_config = ExitConfig(threshold=0.125).to_dict()
    cascade.config.save_pretrained(tmp_path)
    again = type(cascade.config).from_pretrained(tmp_path)
    assert again.members[1].exit_config["threshold"] == 0.125


def test_a_family_that_pads_with_another_token_answers_alike():
    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
    config = {**sizes, "max_position_embeddings": 26, "pad_token_id": 1}
    members = [RobertaForSequenceClassification(RobertaConfig(**config, num_hidden_layers=depth)) for depth in (1, 2)]
    cascade = CostEffCascade.from_members(members)
    batch = {name: tensor for name, tensor in random_batch(LENGTHS, pad_token_id=1).items() if name != "token_type_ids"}
    threshold = float(
        cascade.predict(**batch, early_exit=1.0).logits.softmax(-1).log().neg().amin(-1).median()
    ) / math.log(3)
    whole = cascade.predict(**batch, early_exit=min(0.9999, threshold))
    for row, length in enumerate(LENGTHS):
        alone = cascade.predict(batch["input_ids"][row : row + 1, :length], early_exit=min(0.9999, threshold))
        torch.testing.assert_close(alone.logits[0], whole.logits[row], rtol=0, atol=1e-5)


def test_attention_is_switched_in_every_member(cascade):
    cascade.set_attn_implementation("eager")
    assert {member.config._attn_implementation for member in cascade.members} == {"eager"}


def test_a_broken_member_is_named_with_the_row(cascade, batch):
    with torch.no_grad():
        cascade.members[2].classifier.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"row \d in member 3"):
        cascade.predict(**batch, early_exit=0.3)


def test_what_cannot_be_answered_is_refused(cascade, batch):
    with pytest.raises(ValueError, match="non-empty"):
        cascade.predict(batch["input_ids"][:0], early_exit=0.5)
    with pytest.raises(ValueError, match="all padding"):
        cascade.predict(batch["input_ids"], torch.zeros_like(batch["input_ids"]))
    with pytest.raises(ValueError, match="has none"):
        cascade.predict(**batch, early_exit=True)
    with pytest.raises(ValueError, match="one per exit"):
        cascade.predict(**batch, early_exit=ExitConfig(threshold=[0.5, 0.5]))


def test_rows_that_a_stock_member_cannot_read_are_refused_by_name(cascade):
    long, foreign = torch.full((2, 25), 5), torch.full((2, 4), 41)
    for rows, said in (
        (long, "25 tokens long"),
        (foreign, "indices up to 41, and it has 24 positions and a vocabulary"),
    ):
        with pytest.raises(ValueError, match=f"Member 1 cannot read these rows.*{said}"):
            cascade.predict(rows, early_exit=0.5)
        with pytest.raises(ValueError, match=f"Member 4 cannot read these rows.*{said}"):
            cascade(rows)
    cascade.members[3].classifier.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        cascade(long[:, :5])


def test_one_model_is_not_two_members():
    same = tiny_bert()
    with pytest.raises(ValueError, match="same model is given as two members"):
        CostEffCascade.from_members([same, same])


def test_token_indices_are_refused_where_members_read_differently(cascade, batch):
    cascade.config.member_tokenizers = ["tokenizer_1", "tokenizer_2", "tokenizer_3", ""]
    with pytest.raises(ValueError, match="predict_texts"):
        cascade.predict(**batch, early_exit=0.5)
    assert cascade.predict(**batch).exit_model.tolist() == [4] * 8  # they are the last member's own


def test_regression_cascades_by_patience(batch):
    cascade = CostEffCascade.from_members([tiny_bert(seed=s, num_hidden_layers=s, num_labels=1) for s in (1, 2, 3)])
    values = [member(**batch).logits[:, 0] for member in cascade.members]
    change = (values[1] - values[0]).abs()
    tolerance = float(change.detach().median())
    prediction = cascade.predict(**batch, early_exit=ExitConfig("patience", patience=1, tolerance=tolerance))
    assert prediction.exit_model.tolist() == [2 if small < tolerance else 3 for small in change.tolist()]
    torch.testing.assert_close(prediction.logits[:, 0], torch.where(change < tolerance, values[1], values[2]))
    assert prediction.confidence is None
