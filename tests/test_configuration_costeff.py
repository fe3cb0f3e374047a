from __future__ import annotations

import json
import tracemalloc

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from helpers import tiny_config
from hf_costeff import CostEffConfig, CostEffModel

REFUSED = (StrictDataclassError, ValueError, TypeError)


def test_a_scalar_width_holds_for_every_layer():
    config = tiny_config(num_attention_heads=3, intermediate_size=0)
    assert config.num_attention_heads == [3, 3, 3, 3]
    assert config.intermediate_size == [0, 0, 0, 0]


def test_a_list_of_widths_is_kept_and_not_shared_with_the_caller():
    widths = [2, 0, 1, 3]
    config = tiny_config(num_attention_heads=widths)
    widths[0] = 99
    assert config.num_attention_heads == [2, 0, 1, 3]


def test_every_layer_owns_an_exit_by_default():
    assert tiny_config().exit_layers == [1, 2, 3, 4]
    assert tiny_config(exit_layers=[2, 4]).exit_layers == [2, 4]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 2}, "single_label_classification"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"num_labels": 3, "problem_type": "regression"}, "regression"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "multi_label_classification"),
    ],
)
def test_the_problem_type_follows_the_number_of_labels_unless_it_is_set(settings, expected):
    assert tiny_config(**settings).resolved_problem_type == expected


def test_a_saved_config_comes_back_equal(tmp_path):
    config = tiny_config(
        embedding_rank=5,
        exit_layers=[1, 4],
        position_offset=1,
        classifier_dropout=0.3,
        gradient_equilibrium=False,
        exit_config={"criterion": "margin", "threshold": [0.5, 0.1], "temperatures": 1.5},
        id2label={0: "no", 1: "maybe", 2: "yes"},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CostEffConfig
    assert loaded.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_config_json_holds_plain_widths_that_other_tools_can_read(tmp_path):
    tiny_config(num_attention_heads=2).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "costeff"
    assert stored["num_attention_heads"] == [2, 2, 2, 2]
    assert stored["exit_layers"] == [1, 2, 3, 4]


HOSTILE = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", "4"),
    ("num_hidden_layers", True),
    ("num_hidden_layers", None),
    ("num_hidden_layers", 4.0),
    ("num_attention_heads", -1),
    ("num_attention_heads", 10**9),
    ("num_attention_heads", [1, 1, 1]),
    ("num_attention_heads", [1, 1, 1, -1]),
    ("num_attention_heads", [1, 1, 1, "1"]),
    ("num_attention_heads", [1, 1, 1, 1.5]),
    ("num_attention_heads", "2"),
    ("num_attention_heads", None),
    ("num_attention_heads", True),
    ("intermediate_size", [8] * 5),
    ("intermediate_size", 10**9),
    ("intermediate_size", -8),
    ("attention_head_size", 0),
    ("hidden_size", 0),
    ("hidden_size", 10**9),
    ("hidden_size", "12"),
    ("vocab_size", 0),
    ("vocab_size", 10**12),
    ("embedding_rank", 0),
    ("embedding_rank", 13),
    ("embedding_rank", 2.5),
    ("max_position_embeddings", 0),
    ("position_offset", 24),
    ("position_offset", -1),
    ("type_vocab_size", -1),
    ("pad_token_id", 41),
    ("pad_token_id", -1),
    ("exit_layers", []),
    ("exit_layers", [1, 2]),
    ("exit_layers", [2, 1, 4]),
    ("exit_layers", [1, 1, 4]),
    ("exit_layers", [0, 4]),
    ("exit_layers", [1, 4, 5]),
    ("exit_layers", [1.0, 4]),
    ("exit_layers", "4"),
    ("exit_layers", 4),
    ("exit_head", "deep"),
    ("exit_pooling", "max"),
    ("exit_config", [0.5]),
    ("hidden_act", "import os"),
    ("hidden_dropout_prob", 1.5),
    ("hidden_dropout_prob", float("nan")),
    ("attention_probs_dropout_prob", -0.1),
    ("attention_probs_dropout_prob", "0.1"),
    ("classifier_dropout", 2),
    ("layer_norm_eps", -1.0),
    ("layer_norm_eps", "1e-12"),
    ("initializer_range", float("inf")),
    ("gradient_equilibrium", "yes"),
    ("problem_type", "multiple_choice"),
    ("num_labels", 0),
    ("num_labels", -3),
    ("num_labels", 10**9),
    ("num_labels", "3"),
    ("id2label", ["no", "yes"]),
    ("id2label", {"a": "no"}),
    ("id2label", {"5": "no"}),
    ("id2label", {"0": ["no"]}),
    ("id2label", 7),
    ("exit_config", {"criterion": "entropy", "threshold": -1}),
    ("exit_config", {"criterion": ["entropy"]}),
    ("exit_config", {"unheard": 1}),
    ("exit_config", {"threshold": 0.5, "calibration": "much"}),
    ("exit_config", {"threshold": [[0.5], 0.5]}),
]


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_a_hostile_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(REFUSED) as refusal:
        tiny_config(**{name: value})
    assert name in str(refusal.value)
    offender = [part for part in value if part not in (1, 8)] or [len(value)] if isinstance(value, list) else [value]
    assert str(value) in str(refusal.value) or str(offender[0]) in str(refusal.value)


HUGE = [
    {"num_hidden_layers": 10**9},
    {"num_labels": 10**9, "id2label": None, "label2id": None},
    {"hidden_size": 10**6, "vocab_size": 10**5},
    {"vocab_size": 10**8, "hidden_size": 10**4},
    {"embedding_rank": 10**6, "hidden_size": 10**6},
    {"num_hidden_layers": 1000, "intermediate_size": 10**6, "num_attention_heads": 1, "exit_layers": None},
    {"num_attention_heads": [10**6] * 4, "attention_head_size": 10**6},
]


@pytest.mark.parametrize("changes", [*HUGE, {"intermediate_size": [-1] * 4}], ids=lambda changes: " ".join(changes))
def test_a_hostile_config_file_is_refused_by_name_before_any_memory_is_taken(tmp_path, changes):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    tracemalloc.start()
    try:
        with pytest.raises(REFUSED, match=next(iter(changes))):
            CostEffModel.from_pretrained(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20e6  # bytes at most
    finally:
        tracemalloc.stop()


def test_a_config_file_that_is_nested_without_end_is_refused_by_its_reader(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    depth = 100_000
    (tmp_path / "config.json").write_text('{"model_type": "costeff", "a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(RecursionError, match="JSON"):
        CostEffModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "largest", "others"),
    [
        ("num_hidden_layers", 1000, {"num_attention_heads": 1, "intermediate_size": 1}),
        ("num_labels", 100_000, {}),
        ("max_position_embeddings", 1_000_000, {}),
        ("vocab_size", 100_000_000, {}),
        ("attention_head_size", 1_000_000, {}),
    ],
)
def test_the_largest_value_is_taken_and_one_more_is_not(name, largest, others):
    assert getattr(tiny_config(**{name: largest}, **others), name) == largest
    with pytest.raises(REFUSED, match=f"{name}.*{largest + 1}"):
        tiny_config(**{name: largest + 1}, **others)


def test_a_hundred_thousand_label_names_are_taken_and_one_more_is_not():
    assert tiny_config(num_labels=100_000, id2label=dict.fromkeys(range(100_000), "name")).num_labels == 100_000
    with pytest.raises(REFUSED, match="id2label"):
        tiny_config(num_labels=100_000, id2label=dict.fromkeys(range(100_001), "name"))


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"embedding_rank": 5}, {"exit_layers": [2, 4]}, {"type_vocab_size": 0}, {"skip_gates": "linear"}),
        {"skip_gates": "attention", "gate_size": 6, "exit_head": "attention", "exit_head_size": 8},
    ],
)
def test_the_weights_that_are_limited_are_those_of_every_matrix_and_all_of_heads_and_gates(changes, monkeypatch):
    parameters = CostEffModel(tiny_config(**changes)).named_parameters()
    counted = [p for name, p in parameters if p.dim() == 2 or name.startswith(("exits.", "gates."))]
    count = sum(weight.numel() for weight in counted)
    monkeypatch.setattr("hf_costeff.configuration_costeff.MAX_WEIGHTS", count)
    tiny_config(**changes)
    monkeypatch.setattr("hf_costeff.configuration_costeff.MAX_WEIGHTS", count - 1)
    with pytest.raises(REFUSED, match=f"make {count:,} weights"):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"id2label": dict.fromkeys(range(7, 5000), "name")}, {"exit_config": {"threshold": [[0.5]] * 5000}}],
    ids=" ".join,
)
def test_what_a_message_quotes_is_cut_short(changes):
    with pytest.raises(REFUSED) as refusal:
        tiny_config(**changes)
    assert len(str(refusal.value)) < 1000


def test_labels_of_any_usual_kind_are_taken():
    assert tiny_config(id2label={"0": "no", "1": "yes", "2": "so"}).id2label[2] == "so"
    assert tiny_config(id2label={1: "yes", 0: "no"}, num_labels=2).id2label == {0: "no", 1: "yes"}
    assert tiny_config(num_labels=5000).num_labels == 5000


def test_positions_that_count_real_tokens_need_a_padding_token():
    with pytest.raises(REFUSED, match="pad_token_id"):
        tiny_config(position_offset=2, pad_token_id=None)
    assert tiny_config(pad_token_id=None).pad_token_id is None


def test_a_width_that_became_invalid_is_refused_when_the_config_is_saved(tmp_path):
    config = tiny_config()
    config.intermediate_size[2] = -5
    with pytest.raises(REFUSED, match="layer 3"):
        config.save_pretrained(tmp_path)


def test_the_edges_of_every_width_are_accepted():
    config = tiny_config(num_attention_heads=0, intermediate_size=0, embedding_rank=12, type_vocab_size=0)
    assert config.embedding_rank == 12
    assert tiny_config(embedding_rank=1).embedding_rank == 1
