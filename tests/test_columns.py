"""Finding columns, and mapping the data's labels to the teacher's: every rule, every disagreement."""

from __future__ import annotations

import logging

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig

from hf_costeff.columns import Columns, check_texts, encode_labels, find_columns, resolve_labels
from hf_costeff.exit_criteria import MULTI_LABEL, REGRESSION, SINGLE_LABEL

COLUMNS = Columns(("text",), "label")


def labelled(values: list, feature=None) -> Dataset:
    data = {"text": [f"text {row}" for row in range(len(values))], "label": values}
    return Dataset.from_dict(data, Features({"text": Value("string"), "label": feature}) if feature else None)


def teacher(*names: str, **kwargs) -> BertConfig:
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, **kwargs)


def encoded(values: list, feature=None, config=None) -> list:
    data = labelled(values, feature)
    return encode_labels(data, COLUMNS, resolve_labels(data, COLUMNS, config))["labels"][:]


@pytest.mark.parametrize(
    ("names", "text", "label"),
    [
        (["idx", "sentence", "label"], ("sentence",), "label"),
        (["sentence2", "sentence1", "label"], ("sentence1", "sentence2"), "label"),
        (["premise", "hypothesis", "label"], ("premise", "hypothesis"), "label"),
        (["question", "sentence", "label"], ("question", "sentence"), "label"),
        (["Text", "Intent"], ("Text",), "Intent"),
        (["title", "text", "stars"], ("text",), "stars"),
        (["headline", "idx", "class"], ("headline",), "class"),
        (["text"], ("text",), None),
    ],
)
def test_columns_are_found_by_their_usual_names(names, text, label):
    numbers = {"idx", "stars"}
    data = Dataset.from_dict({name: [0] if name in numbers else ["a"] for name in names})
    assert find_columns(data) == Columns(text, label)


def test_named_columns_win_over_the_usual_names():
    data = Dataset.from_dict({"text": ["a"], "body": ["b"], "label": [0], "target": [1]})
    assert find_columns(data, ["body"], "target") == Columns(("body",), "target")
    assert find_columns(data, ["label"]).label == "target"


def test_a_misnamed_column_is_refused_with_the_columns_that_exist():
    data = Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(ValueError, match=r"`text_columns` names 'txt', but the columns are: text, label"):
        find_columns(data, ["txt"])
    with pytest.raises(ValueError, match=r"`label_column` names 'lable', but the columns are: text, label"):
        find_columns(data, None, "lable")
    with pytest.raises(ValueError, match=r"No text column was found among: one, two, label"):
        find_columns(Dataset.from_dict({"one": ["a"], "two": ["b"], "label": [0]}))


def test_without_a_teacher_text_labels_are_sorted_and_counted():
    data = labelled(["pos", "neg", "pos", "mid"])
    info = resolve_labels(data, COLUMNS)
    assert (info.problem_type, info.label_names, info.num_labels) == (SINGLE_LABEL, ["mid", "neg", "pos"], 3)
    assert info.encode(data["label"]) == [2, 1, 2, 0]


def test_text_labels_that_are_numbers_are_sorted_as_numbers():
    assert resolve_labels(labelled(["10", "2", "1"]), COLUMNS).label_names == ["1", "2", "10"]


def test_text_labels_follow_the_teachers_order_whatever_their_case():
    assert encoded(["positive", "NEGATIVE", "Neutral"], None, teacher("POSITIVE", "neutral", "Negative")) == [0, 2, 1]


def test_text_labels_unknown_to_the_teacher_are_refused_with_the_row():
    with pytest.raises(
        ValueError, match=r"row 1 in split 'train' is 'awful': .*good, bad.*Rows count from 0, without header"
    ):
        encoded(["good", "awful"], None, teacher("good", "bad"))


def test_class_names_in_another_order_are_matched_by_name():
    feature = ClassLabel(names=["negative", "positive"])
    assert encoded([0, 1, 1], feature, teacher("POSITIVE", "NEGATIVE")) == [1, 0, 0]
    assert encoded([0, 1, 1], feature, teacher("negative", "positive")) == [0, 1, 1]


def test_class_names_that_differ_are_matched_by_index_with_a_warning(caplog):
    data = labelled([0, 1], ClassLabel(names=["neg", "pos"]))
    with caplog.at_level(logging.WARNING):
        info = resolve_labels(data, COLUMNS, teacher("bad", "good"))
    assert info.encode(data["label"]) == [0, 1]
    assert info.label_names == ["bad", "good"]
    assert "bad, good" in caplog.text and "neg, pos" in caplog.text


def test_a_teacher_without_label_names_takes_the_datasets():
    info = resolve_labels(labelled([0, 1], ClassLabel(names=["no", "yes"])), COLUMNS, BertConfig(num_labels=2))
    assert info.label_names == ["no", "yes"]
    assert resolve_labels(labelled([0, 1]), COLUMNS, BertConfig(num_labels=2)).label_names is None


@pytest.mark.parametrize(
    ("values", "feature", "count"),
    [([0, 1], ClassLabel(names=["no", "yes"]), 2), (["a", "b", "c"], None, 3)],
)
def test_a_teacher_with_another_number_of_labels_is_refused_with_both_numbers(values, feature, count):
    with pytest.raises(ValueError, match=rf"num_labels = 5, but column 'label' has {count} labels .*fine-tuned"):
        resolve_labels(labelled(values, feature), COLUMNS, BertConfig(num_labels=5))


def test_fewer_integer_labels_than_the_teacher_has_are_fine_and_more_are_refused_by_row():
    assert encoded([0, 1], None, BertConfig(num_labels=3)) == [0, 1]
    with pytest.raises(ValueError, match=r"row 2 in split 'train' is 3: the labels are 0..2"):
        encoded([0, 1, 3], None, BertConfig(num_labels=3))


def test_float_labels_are_regression():
    info = resolve_labels(labelled([0.5, 2.0]), COLUMNS)
    assert (info.problem_type, info.num_labels, info.mapping) == (REGRESSION, 1, None)
    assert encoded([0.5, 2.0]) == [0.5, 2.0]
    assert resolve_labels(labelled([0.0, 1.0]), COLUMNS).problem_type == REGRESSION


def test_integer_labels_are_regression_if_the_teacher_has_one_output():
    assert encoded([3, 1], None, BertConfig(num_labels=1)) == [3.0, 1.0]


def test_whole_floats_are_classes_if_the_teacher_has_several_labels():
    assert encoded([1.0, 0.0], None, BertConfig(num_labels=2)) == [1, 0]


@pytest.mark.parametrize(
    ("values", "config"),
    [
        ([0.5, 1.0], BertConfig(num_labels=2)),
        (["a", "b"], BertConfig(num_labels=1)),
        ([[0, 1], [1, 1]], BertConfig(num_labels=2, problem_type=SINGLE_LABEL)),
        ([0, 1], BertConfig(num_labels=2, problem_type=MULTI_LABEL)),
    ],
)
def test_labels_of_another_kind_than_the_teachers_are_refused(values, config):
    with pytest.raises(ValueError, match=rf"num_labels = {config.num_labels} and does .* is data for"):
        resolve_labels(labelled(values), COLUMNS, config)


@pytest.mark.parametrize(
    ("values", "feature", "expected"),
    [
        ([[0, 1, 1], [0, 0, 0]], None, [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        ([[0.0, 0.5], [1.0, 0.0]], None, [[0.0, 0.5], [1.0, 0.0]]),
        ([[2], [0, 1], []], None, [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        ([["b"], ["a", "b"]], None, [[0.0, 1.0], [1.0, 1.0]]),
        ([[1], [0]], List(ClassLabel(names=["x", "y"])), [[0.0, 1.0], [1.0, 0.0]]),
    ],
)
def test_lists_are_multi_label_as_numbers_per_label_or_as_lists_of_classes(values, feature, expected):
    data = labelled(values, feature)
    info = resolve_labels(data, COLUMNS)
    assert info.problem_type == MULTI_LABEL
    assert info.num_labels == len(expected[0])
    assert info.encode(data["label"]) == expected


def test_a_multi_label_teacher_decides_the_number_and_order_of_labels():
    config = teacher("red", "green", "blue", problem_type=MULTI_LABEL)
    assert encoded([["blue"], ["red", "blue"]], None, config) == [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    assert encoded([[0, 1], [1, 2]], None, config) == [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match="num_labels = 3, but column 'label' has 2 labels"):
        resolve_labels(labelled([[0.0, 1.0]]), COLUMNS, config)


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ([0, None, 1], None, "row 1 in split 'train' is None: the label is missing"),
        ([0.5, float("nan")], None, "row 1 in split 'train' is nan: the label is missing"),
        ([0.5, float("inf")], None, "row 1 in split 'train' is inf: a finite number"),
        ([0.0, float("nan")], BertConfig(num_labels=2), "row 1 in split 'train' is nan: the label is missing"),
        ([1, 0, -1], None, "row 2 in split 'train' is -1: .* rows without an answer"),
        (["yes", " "], None, "row 1 in split 'train' is ' ': the label is missing"),
        ([[0.0, 1.0], [0.5, 2.0]], None, "row 1 .* 2 numbers in 0..1 were expected"),
        ([[0.0, 1.0], [1.0]], None, "row 1 .* 2 numbers in 0..1 were expected"),
        ([[0.0, 1.0], None], None, "row 1 .* a list was expected"),
        ([None, None], None, "Column 'label' has no labels at all"),
    ],
)
def test_a_bad_label_is_refused_with_its_row(values, config, message):
    with pytest.raises(ValueError, match=message):
        encoded(values, None, config)


def test_rows_of_another_split_are_held_to_the_labels_of_train():
    info = resolve_labels(labelled(["a", "b"]), COLUMNS)
    with pytest.raises(ValueError, match=r"row 0 in split 'validation' is 'c': the labels are 0..1 \(a, b\)"):
        info.encode(["c"], "validation")


def test_unlabelled_text_takes_everything_from_the_teacher():
    data = Dataset.from_dict({"text": ["a"]})
    info = resolve_labels(data, Columns(("text",), None), teacher("no", "yes"))
    assert (info.problem_type, info.label_names, info.num_labels) == (SINGLE_LABEL, ["no", "yes"], 2)
    assert encode_labels(data, Columns(("text",), None), info).column_names == ["text"]
    with pytest.raises(ValueError, match=r"No label column was found among: text; .*teacher"):
        resolve_labels(data, Columns(("text",), None))


def test_encoding_keeps_text_and_labels_only():
    data = Dataset.from_dict({"idx": [7, 8], "text": ["a", "b"], "label": [1, 0]})
    result = encode_labels(data, COLUMNS, resolve_labels(data, COLUMNS))
    assert result.column_names == ["text", "labels"]
    assert result.features["labels"].dtype == "int64"


def test_a_text_that_is_missing_or_no_string_is_refused_with_its_row():
    check_texts(Dataset.from_dict({"text": ["", "a"]}), COLUMNS)
    with pytest.raises(
        ValueError, match=r"column 'text', row 1 of split 'train' is None.*Rows count from 0, without h"
    ):
        check_texts(Dataset.from_dict({"text": ["a", None]}), COLUMNS, "train")
    with pytest.raises(ValueError, match="column 'text', row 0 is 3"):
        check_texts(Dataset.from_dict({"text": [3]}), COLUMNS)
    with pytest.raises(ValueError, match=r"'text' is missing of split 'dev'; its columns are: sentence"):
        check_texts(Dataset.from_dict({"sentence": ["a"]}), COLUMNS, "dev")


def test_words_numbered_for_a_teacher_without_label_names_are_shown_in_a_warning(caplog):
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": ["mild", "good", "bad"]})
    with caplog.at_level(logging.WARNING):
        labels = resolve_labels(rows, Columns(("text",), "label"), BertConfig(num_labels=3))
    assert "0 = bad, 1 = good, 2 = mild" in caplog.text
    assert [labels.mapping[word] for word in ("bad", "good", "mild")] == [0, 1, 2]
