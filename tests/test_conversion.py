"""Conversion: our encoder against the stock one, hidden state by hidden state."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from helpers import random_batch, tiny_bert, tiny_model
from hf_costeff.conversion import (
    SUPPORTED_FAMILIES,
    convert_config,
    convert_from_stock,
    convert_state_dict,
    convert_to_stock,
)
from hf_costeff.modeling_costeff import CostEffForSequenceClassification

VOCAB, HIDDEN, HEADS, NEURONS, LAYERS, POSITIONS = 50, 32, 4, 48, 2, 24
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "initializer_range": 0.2}
BERT_SIZES = dict(
    hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=NEURONS, num_hidden_layers=LAYERS, **COMMON
)
STOCK_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "bert": (BertConfig, dict(BERT_SIZES, layer_norm_eps=1e-3)),
    "roberta": (RobertaConfig, dict(BERT_SIZES, type_vocab_size=1)),
    "xlm-roberta": (XLMRobertaConfig, dict(BERT_SIZES, type_vocab_size=1, hidden_act="relu")),
    "camembert": (CamembertConfig, dict(BERT_SIZES, pad_token_id=3)),
    "distilbert": (DistilBertConfig, dict(dim=HIDDEN, n_heads=HEADS, hidden_dim=NEURONS, n_layers=LAYERS, **COMMON)),
    "electra": (ElectraConfig, dict(BERT_SIZES, embedding_size=HIDDEN)),
}
ROBERTA_KIND = ("roberta", "xlm-roberta", "camembert")
all_families = pytest.mark.parametrize("family", STOCK_CONFIGS)


def stock_config(family: str, **changes) -> PreTrainedConfig:
    config_class, sizes = STOCK_CONFIGS[family]
    return config_class(**(sizes | changes))


def stock_model(family: str, auto_class=AutoModelForSequenceClassification, attention: str = "sdpa", **changes):
    """A random stock model in which no two tensors could be mistaken for each other: biases and norms random too."""
    torch.manual_seed(0)
    model = auto_class.from_config(stock_config(family, **changes), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_for(config: PreTrainedConfig, padded: bool) -> dict[str, torch.Tensor]:
    """Three rows of 9 tokens; with padding, two of them are shorter."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, VOCAB, (3, 9), generator=generator)
    batch = {"input_ids": input_ids}
    if padded:
        mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 2 + [0] * 7])
        input_ids[mask == 0] = config.pad_token_id
        batch["attention_mask"] = mask
    if getattr(config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.randint(0, 2, (3, 9), generator=generator)
    return batch


def assert_same_hidden_states(converted, stock, batch) -> None:
    with torch.no_grad():
        expected = stock(**batch, output_hidden_states=True).hidden_states
        actual = converted(**batch, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == LAYERS + 1
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # padding positions too


def test_every_family_of_the_table_is_tested() -> None:
    assert set(STOCK_CONFIGS) == set(SUPPORTED_FAMILIES)


@all_families
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_hidden_state_equals_the_stock_models(family: str, padded: bool, attention: str) -> None:
    stock = stock_model(family, attention=attention)
    converted = convert_from_stock(stock)
    assert converted.config._attn_implementation == attention
    assert_same_hidden_states(converted, stock, batch_for(stock.config, padded))


@all_families
def test_token_types_left_out_mean_type_zero_as_in_the_stock_model(family: str) -> None:
    stock = stock_model(family)
    batch = batch_for(stock.config, padded=True)
    batch.pop("token_type_ids", None)
    assert_same_hidden_states(convert_from_stock(stock), stock, batch)


@pytest.mark.parametrize("family", ROBERTA_KIND)
def test_positions_skip_padding_ids_inside_and_before_the_text(family: str) -> None:
    stock = stock_model(family)
    pad = stock.config.pad_token_id
    converted = convert_from_stock(stock)
    assert converted.config.position_offset == pad + 1
    input_ids = torch.tensor([[6, 7, pad, 8, 9], [pad, pad, 6, 7, 8], [6, 7, 8, pad, pad]])
    assert_same_hidden_states(converted, stock, {"input_ids": input_ids})
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert_same_hidden_states(converted, stock, {"input_ids": input_ids, "attention_mask": mask})


@pytest.mark.parametrize("family", ROBERTA_KIND)
def test_masked_tokens_that_are_not_padding_still_take_a_position(family: str) -> None:
    stock = stock_model(family)
    mask = torch.tensor([[1, 0, 0, 1, 1]])
    batch = {"input_ids": torch.tensor([[6, 7, 8, 9, 10]]), "attention_mask": mask}
    assert_same_hidden_states(convert_from_stock(stock), stock, batch)


@pytest.mark.parametrize("family", STOCK_CONFIGS)
def test_the_longest_text_of_the_stock_model_fits(family: str) -> None:
    stock = stock_model(family)
    longest = POSITIONS - (stock.config.pad_token_id + 1 if family in ROBERTA_KIND else 0)
    batch = {"input_ids": torch.full((1, longest), 7)}
    assert_same_hidden_states(convert_from_stock(stock), stock, batch)


@all_families
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
def test_bare_encoders_and_other_heads_convert_too(family: str, auto_class) -> None:
    stock = stock_model(family, auto_class)
    converted = convert_from_stock(stock)
    batch = batch_for(stock.config, padded=True)
    assert_same_hidden_states(converted, stock, batch)


def test_settings_and_labels_are_carried_over() -> None:
    labels = {0: "sad", 1: "glad", 2: "mad"}
    stock = stock_config(
        "bert",
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        problem_type="multi_label_classification",
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.4,
        classifier_dropout=0.5,
        hidden_act="gelu_new",
    )
    config = convert_config(stock, exit_layers=(2,))
    assert config.id2label == labels
    assert config.label2id == {"sad": 0, "glad": 1, "mad": 2}
    assert config.num_labels == 3
    assert config.problem_type == "multi_label_classification"
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.4)
    assert config.classifier_dropout == 0.5
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu_new", 1e-3)
    assert (config.num_attention_heads, config.intermediate_size) == ([4, 4], [48, 48])
    assert (config.attention_head_size, config.embedding_rank) == (8, None)
    assert config.exit_layers == [2]
    assert config.position_offset == 0


def test_only_a_multi_exit_model_is_made_stock() -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification is no multi-exit model"):
        convert_to_stock(tiny_bert())


def test_label_indices_follow_from_the_names_where_the_stock_config_lacks_them() -> None:
    config = convert_config(stock_config("bert", id2label={0: "sad", 1: "glad"}, label2id=None))
    assert config.label2id == {"sad": 0, "glad": 1}


def test_settings_that_distilbert_names_otherwise_are_carried_over() -> None:
    stock = stock_config(
        "distilbert", dropout=0.3, attention_dropout=0.4, seq_classif_dropout=0.5, activation="relu", pad_token_id=7
    )
    config = convert_config(stock)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.4)
    assert config.classifier_dropout == 0.5
    assert (config.hidden_act, config.type_vocab_size, config.pad_token_id) == ("relu", 0, 7)
    assert (config.hidden_size, config.layer_norm_eps, config.exit_layers) == (HIDDEN, 1e-12, [1, 2])


def test_the_source_is_neither_changed_nor_shared() -> None:
    stock = stock_model("bert")
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    converted = convert_from_stock(stock)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.fill_(7.0)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for tensor in convert_state_dict(stock.base_model.state_dict(), stock.config).values():
        tensor.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())


def test_dtype_and_mode_of_the_source_are_kept() -> None:
    stock = stock_model("bert").to(torch.bfloat16).train()
    converted = convert_from_stock(stock)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    assert converted.training
    assert not convert_from_stock(stock.eval()).training


def test_exit_heads_are_fresh_and_stand_where_asked() -> None:
    stock = stock_model("bert", num_labels=3)
    converted = convert_from_stock(stock, exit_layers=[2])
    assert list(converted.costeff.exits) == ["2"]
    head = converted.costeff.exits["2"].classifier
    assert head.weight.shape == (3, HIDDEN)
    assert head.weight.isfinite().all()
    assert not torch.equal(head.weight, stock.classifier.weight)


@all_families
def test_saving_and_loading_a_converted_model_changes_nothing(family: str, tmp_path) -> None:
    stock = stock_model(family)
    converted = convert_from_stock(stock, exit_layers=[2])
    converted.save_pretrained(tmp_path)
    loaded, report = CostEffForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    saved_state, loaded_state = converted.state_dict(), loaded.state_dict()
    assert saved_state.keys() == loaded_state.keys()
    assert all(torch.equal(saved_state[name], loaded_state[name]) for name in saved_state)
    assert_same_hidden_states(loaded.eval(), stock, batch_for(stock.config, padded=True))


def test_every_tensor_of_the_encoder_finds_its_place() -> None:
    stock = stock_model("electra", AutoModel)
    fused = convert_state_dict(stock.state_dict(), stock.config)["layers.1.attention.query_key_value.weight"]
    attention = stock.encoder.layer[1].attention.self
    assert torch.equal(fused[:HIDDEN], attention.query.weight)
    assert torch.equal(fused[HIDDEN : 2 * HIDDEN], attention.key.weight)
    assert torch.equal(fused[2 * HIDDEN :], attention.value.weight)


def test_pooler_and_old_position_buffers_are_dropped_on_purpose() -> None:
    stock = stock_model("bert", AutoModel)
    state = stock.state_dict()
    assert "pooler.dense.weight" in state
    state["embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    assert not [name for name in convert_state_dict(state, stock.config) if "pooler" in name or "position_ids" in name]


def test_a_tensor_without_a_place_is_refused() -> None:
    stock = stock_model("bert", AutoModel)
    state = dict(stock.state_dict(), **{"encoder.layer.0.attention.self.query.lora_A": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lora_A.*Merge adapters"):
        convert_state_dict(state, stock.config)


def test_a_state_dict_with_the_classifiers_prefixes_is_refused() -> None:
    stock = stock_model("bert")
    with pytest.raises(ValueError, match=r"lacks.* and \d+ more.*base_model"):
        convert_state_dict(stock.state_dict(), stock.config)


def test_a_decoder_only_architecture_is_refused_with_the_supported_families() -> None:
    with pytest.raises(ValueError, match=r"'gpt2'.*bert, roberta, xlm-roberta, camembert, distilbert, electra"):
        convert_config(GPT2Config())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("roberta", {"is_decoder": True, "add_cross_attention": True}, "is_decoder=True"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type.*'relative_key'"),
        ("electra", {"embedding_size": 16}, "embedding_size.*16.*32.*factorised"),
        ("bert", {"num_attention_heads": 5}, "5 attention heads do not divide the hidden size 32"),
        ("roberta", {"pad_token_id": None}, "pad_token_id"),
    ],
)
def test_family_members_that_compute_another_function_are_refused(family: str, changes: dict, message: str) -> None:
    config = stock_config(family, **changes)
    with pytest.raises(ValueError, match=message):
        convert_config(config)
    with pytest.raises(ValueError, match=message):
        convert_state_dict({}, config)


def test_a_model_that_is_costeff_already_is_refused_with_a_hint() -> None:
    converted = convert_from_stock(stock_model("bert"))
    with pytest.raises(ValueError, match="COST-EFF model already"):
        convert_from_stock(converted)


def test_a_wrapped_model_is_refused_by_type() -> None:
    with pytest.raises(TypeError, match=r"DataParallel.*\.module"):
        convert_from_stock(torch.nn.DataParallel(stock_model("bert")))


def test_exit_layers_without_the_last_layer_are_refused() -> None:
    with pytest.raises(Exception, match="exit_layers"):
        convert_from_stock(stock_model("bert"), exit_layers=[1])


# --- back to stock

SLIM = {
    "uneven widths": ({}, "bert"),
    "factorised": ({"embedding_rank": 5}, "bert"),
    "positions that skip padding": ({"position_offset": 1, "pad_token_id": 0}, "roberta"),
    "no token types": ({"type_vocab_size": 0, "embedding_rank": 5}, "bert"),
    "several labels": ({"problem_type": "multi_label_classification"}, "bert"),
}


@pytest.mark.parametrize("name", SLIM)
def test_a_slim_model_answers_alike_as_a_stock_one(tmp_path, name):
    changes, model_type = SLIM[name]
    model, batch = tiny_model(**changes), random_batch([7, 3, 11, 2])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    convert_to_stock(model).save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (stock.config.model_type, stock.config.id2label) == (model_type, model.config.id2label)
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_truncated_model_becomes_a_shallower_stock_one():
    model, batch = tiny_model(), random_batch([7, 3])
    stock = convert_to_stock(model.truncate(2))
    assert stock.config.num_hidden_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, model(**batch).exit_logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"exit_pooling": "mean"}, "`exit_pooling` is 'mean'"), ({"attention_head_size": 5}, "Heads of size 5")],
)
def test_what_no_stock_model_computes_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        convert_to_stock(tiny_model(**changes))
