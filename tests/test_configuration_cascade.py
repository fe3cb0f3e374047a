"""A cascade's configuration: whom it takes, how it matches their labels, and that it comes back from JSON."""

from __future__ import annotations

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, DistilBertConfig

from helpers import tiny_config
from hf_costeff import CostEffCascadeConfig
from hf_costeff.configuration_cascade import match_labels

SMALL = {"vocab_size": 41, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 16}


def named(*names: str, **settings) -> BertConfig:
    return BertConfig(
        **SMALL, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **settings
    )


def refusal(**settings) -> str:
    with pytest.raises(StrictDataclassError) as error:
        CostEffCascadeConfig(**settings)
    return str(error.value)


def test_members_keep_their_own_sizes_and_labels_are_those_of_the_last(tmp_path):
    members = [named("no", "yes", num_hidden_layers=2), tiny_config(id2label={0: "yes", 1: "no"}, num_labels=2)]
    CostEffCascadeConfig(members=members, exit_config={"threshold": 0.25}).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is CostEffCascadeConfig
    assert [type(member) for member in again.members] == [type(member) for member in members]
    assert [member.num_hidden_layers for member in again.members] == [2, 4]
    assert again.members[1].num_attention_heads == members[1].num_attention_heads
    assert again.id2label == {0: "yes", 1: "no"} and again.label2id == {"yes": 0, "no": 1} and again.num_labels == 2
    assert again.exit_config == {"threshold": 0.25} and again.exit_layers == [1, 2]
    assert again.resolved_problem_type == "single_label_classification"
    assert again.to_dict() == CostEffCascadeConfig.from_dict(again.to_dict()).to_dict()


def test_the_file_says_nothing_of_where_members_were_loaded_from():
    member = named("no", "yes")
    member._name_or_path, member.auto_map = "folder/of/somebody/bert", {"AutoConfig": "somewhere.Else"}
    written = CostEffCascadeConfig(members=[member, named("no", "yes")]).to_json_string()
    assert "somebody" not in written and "somewhere" not in written
    assert json.loads(written)["members"][0]["model_type"] == "bert"


def test_labels_are_matched_by_name_whatever_their_case_and_order():
    assert match_labels([named("Neutral", "no ", "YES"), named("yes", "neutral", "no")]) == [[2, 0, 1], None]


def test_labels_without_names_are_matched_by_position():
    plain = BertConfig(**SMALL, num_labels=2)
    assert match_labels([plain, named("no", "yes")]) == [None, None]
    assert match_labels([named("no", "yes"), plain]) == [None, None]
    assert match_labels([named("no", "yes"), plain, named("yes", "no")]) == [[1, 0], None, None]
    assert match_labels([plain, plain]) == [None, None]


@pytest.mark.parametrize(("first", "second"), [(("no", "yes"), ("yes", "no")), (("no", "yes"), ("bad", "good"))])
def test_named_members_that_contradict_each_other_are_refused_where_the_last_has_no_names(first, second):
    message = refusal(members=[named(*first), named(*second), BertConfig(**SMALL, num_labels=2)])
    assert f"Member 1 has the labels {[*first]} and member 2 {[*second]}" in message and "`id2label`" in message


def test_the_cascade_has_the_names_that_some_member_has():
    plain = BertConfig(**SMALL, num_labels=2)
    for members in ([named("No", "Yes"), plain], [plain, named("No", "Yes")], [named("no", "yes"), named("No", "Yes")]):
        config = CostEffCascadeConfig(members=members)
        assert config.id2label == {0: "No", 1: "Yes"} and config.label2id == {"No": 0, "Yes": 1}
    assert CostEffCascadeConfig(members=[plain, plain]).id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([named("no", "yes"), named("bad", "good")], ("['no', 'yes']", "['bad', 'good']")),
        ([named("no", "yes"), named("no", "yes", "neutral")], ("2 labels", "3")),
        (
            [named("no", "yes", problem_type="multi_label_classification"), named("no", "yes")],
            ("multi_label", "single"),
        ),
        ([named("no", "yes")], ("cascade of 1", "at least 2")),
        ([], ("cascade of 0",)),
    ],
)
def test_members_that_do_not_fit_are_refused_by_name(members, said):
    message = refusal(members=members)
    assert all(word in message for word in said), message


def test_a_cascade_is_no_member():
    inner = CostEffCascadeConfig(members=[named("no", "yes"), named("no", "yes")])
    assert "itself a cascade" in refusal(members=[inner, named("no", "yes")])


@pytest.mark.parametrize("folders", [["a"], ["..", ""], ["a/b", ""], [1, 2]])
def test_tokenizers_lie_one_per_member_below_the_model(folders):
    members = [named("no", "yes"), DistilBertConfig(id2label={0: "no", 1: "yes"})]
    assert "member_tokenizers" in refusal(members=members, member_tokenizers=folders)


def test_saved_settings_that_nobody_could_use_are_refused():
    members = [named("no", "yes"), named("no", "yes")]
    assert "threshold" in refusal(members=members, exit_config={"threshold": 2})
    with pytest.raises(TypeError, match="must be a configuration"):
        CostEffCascadeConfig(members=["bert", "bert"])
