"""Splits from every kind of source, the cut without overlap, tokenising, and the whole preparation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import random

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, CanineTokenizer, HfArgumentParser, PreTrainedTokenizerFast

from hf_costeff.columns import Columns
from hf_costeff.data import (
    DataArguments,
    SplitArguments,
    class_weights,
    encode_texts,
    hold_out,
    load_splits,
    make_collator,
    open_dataset,
    prepare_data,
    prepare_split,
    resolve_max_length,
    tokenize,
)

WORDS = "a an the film story is was very good bad not but and dull bright slow plot cast music ends well".split()  # noqa: SIM905
TEXT = Columns(("text",), "label")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    disable_progress_bars()


@pytest.fixture(autouse=True)
def cache_in_the_tests_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=32,
    )


def sentences(count: int, seed: int = 0, length: tuple[int, int] = (6, 12)) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(*length))) for _ in range(count)]


def rows(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"text": sentences(count, seed), "label": [row % 2 for row in range(count)]})


def overlap(kept: list[str], held: list[str]) -> list[tuple[str, str]]:
    """Pairs of which one contains the other on word boundaries; a plain double loop."""
    padded = [[f" {' '.join(text.lower().split())} " for text in side] for side in (kept, held)]
    return [(a, b) for a, b in itertools.product(*padded) if a in b or b in a]


# --- sources


def test_the_arguments_are_command_line_flags():
    flags = ["--dataset", "glue", "--text_columns", "one", "two", "--calibration_rows", "50"]
    (arguments,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(flags)
    assert arguments == DataArguments(dataset="glue", text_columns=["one", "two"], calibration_rows=50)


def test_the_arguments_for_one_split_are_those_that_one_split_needs():
    """What cuts, names and samples the other splits is for a whole run alone."""
    names = {kind: {item.name for item in dataclasses.fields(kind)} for kind in (SplitArguments, DataArguments)}
    assert names[SplitArguments] < names[DataArguments]
    assert not [name for name in names[SplitArguments] if "train" in name or "calibration" in name]
    with pytest.raises(ValueError, match=r"No data is named\. Give `dataset` .* or `validation_file`"):
        open_dataset(SplitArguments())
    with pytest.raises(ValueError, match=r"Both `dataset` \('a'\) and files \('b.csv'\) .* or `validation_file`"):
        SplitArguments(dataset="a", validation_file="b.csv")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "a", "train_file": "b.csv"}, "Both `dataset` .'a'. and files"),
        ({"text_columns": ["a", "b", "c"]}, "one column, or two"),
        ({"calibration_rows": 0}, "`calibration_rows` is 0"),
        ({"max_length": -1}, "`max_length` is -1"),
        ({"calibration_split": "train"}, "must differ"),
        ({"calibration_split": "dev", "validation_split": "dev"}, "must differ"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**fields)


def write(data: Dataset, path) -> str:
    if path.suffix in (".csv", ".tsv"):
        data.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.to_json(path, lines=path.suffix == ".jsonl")
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_file_format_gives_the_same_rows(ending, tmp_path):
    train, validation = rows(6), rows(4, seed=1)
    splits, _ = load_splits(
        DataArguments(
            train_file=write(train, tmp_path / f"t{ending}"), validation_file=write(validation, tmp_path / f"v{ending}")
        )
    )
    assert list(splits) == ["train", "validation"]
    assert splits["train"].to_dict() == train.to_dict()
    assert splits["validation"].to_dict() == validation.to_dict()


def test_csv_texts_such_as_null_stay_texts_and_empty_cells_become_empty_texts(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nNA,0\n,1\nnull,0\nNone,1\n", encoding="utf-8")
    splits, _ = load_splits(
        DataArguments(train_file=str(tmp_path / "t.csv"), validation_file=str(tmp_path / "t.csv")),
    )
    assert splits["train"]["text"][:] == ["NA", "", "null", "None"]


def test_quotation_marks_in_a_tsv_are_text(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tlabel\n"well\t0\nsaid " he\t1\n', encoding="utf-8")
    splits, _ = load_splits(
        DataArguments(train_file=str(tmp_path / "t.tsv"), validation_file=str(tmp_path / "t.tsv")),
    )
    assert splits["train"]["text"][:] == ['"well', 'said " he']


def make_folder(folder) -> str:
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        write(rows(6), folder / name / "train.parquet")
        write(rows(4, seed=1), folder / name / "held.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}/train.parquet}}\n"
        f"  - {{split: dev, path: {name}/held.parquet}}\n"
        for name in ("one", "two")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    return str(folder)


def test_a_folder_with_configurations_loads_and_dev_serves_as_validation(tmp_path):
    splits, _ = load_splits(DataArguments(dataset=make_folder(tmp_path / "set"), dataset_config="two"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 4}
    assert splits["validation"].to_dict() == rows(4, seed=1).to_dict()


@pytest.mark.parametrize("config", [None, "three"])
def test_a_missing_configuration_is_refused_with_those_that_exist(config, tmp_path):
    with pytest.raises(ValueError, match=rf"`dataset_config` is {config!r}, but .* has: one, two"):
        load_splits(DataArguments(dataset=make_folder(tmp_path / "set"), dataset_config=config))


def test_a_folder_from_save_to_disk_loads(tmp_path):
    DatasetDict({"train": rows(6), "validation": rows(4, seed=1)}).save_to_disk(tmp_path / "set")
    assert len(load_splits(str(tmp_path / "set"))[0]["validation"]) == 4


def test_splits_are_taken_by_the_names_given():
    data = DatasetDict({"big": rows(6), "test": rows(5, seed=1), "cal": rows(4, seed=2), "dev": rows(3, seed=3)})
    splits, _ = load_splits(data, DataArguments(train_split="big", calibration_split="cal", validation_split="test"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "calibration": 4, "validation": 5}
    assert len(load_splits(data, DataArguments(train_split="big"))[0]["validation"]) == 3
    assert len(load_splits(data, DataArguments(train_split="big", calibration_split="dev"))[0]["validation"]) == 5


def test_what_is_not_there_is_refused_with_what_is(tmp_path):
    data = DatasetDict({"train": rows(6), "dev": rows(4)})
    with pytest.raises(ValueError, match=r"`calibration_split` is 'cal', but the splits are: train, dev"):
        load_splits(data, DataArguments(calibration_split="cal"))
    with pytest.raises(ValueError, match=r"The file '.*no.csv' does not exist"):
        load_splits(DataArguments(train_file=str(tmp_path / "no.csv")))
    with pytest.raises(ValueError, match=r"ends in '.txt'. Known endings are .csv, .tsv"):
        load_splits(DataArguments(train_file="rows.txt"))
    (tmp_path / "broken.json").write_text('{"text": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken.json' cannot be read as json"):
        load_splits(DataArguments(train_file=str(tmp_path / "broken.json")))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*local folder"):
        load_splits(str(tmp_path / "nowhere" / "set"))
    with pytest.raises(ValueError, match=r"No data is named\. Give `dataset` .* or `train_file`"):
        load_splits(DataArguments())
    with pytest.raises(TypeError, match="is a IterableDataset"):
        load_splits(rows(3).to_iterable_dataset())


def test_an_empty_dataset_is_refused_by_split(tmp_path):
    with pytest.raises(ValueError, match="The split 'validation' has no rows"):
        load_splits(DatasetDict({"train": rows(3), "validation": rows(3).select([])}))
    (tmp_path / "t.csv").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"t.csv' is empty"):
        load_splits(DataArguments(train_file=str(tmp_path / "t.csv")))


def test_without_a_validation_split_one_is_cut_from_train_with_a_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        raw = prepare_data(rows(40), tokenizer, max_positions=16).raw
    assert "There is no validation split: 10 rows were cut from train" in caplog.text
    assert len(raw["validation"]) == 10 and len(raw["train"]) + len(raw["calibration"]) == 30
    assert overlap(raw["train"]["text"], raw["validation"]["text"]) == []


# --- the cut


@pytest.fixture(scope="module")
def nested() -> Dataset:
    """Whole sentences and many of their pieces, as in SST-2, with odd case and spacing."""
    generator = random.Random(3)
    texts = sentences(60, seed=5)
    for sentence in sentences(60, seed=5):
        words = sentence.split()
        for _ in range(4):
            start = generator.randrange(len(words) - 1)
            piece = words[start : start + generator.randint(2, 6)]
            texts.append("  ".join(piece).upper() if generator.random() < 0.5 else " ".join(piece) + " ")
    generator.shuffle(texts)
    return Dataset.from_dict({"text": texts, "label": [0] * len(texts)})


def test_no_held_out_text_contains_or_is_contained_in_a_training_text(nested):
    whole = {f"{text}" for text in sentences(60, seed=5)}
    train, held = hold_out(nested, TEXT, 12, seed=1)
    assert len(held) == 12
    assert overlap(train["text"], held["text"]) == []
    assert set(held["text"]) <= whole
    gone = len(nested) - len(train) - len(held)
    assert gone == len(overlap_rows(nested["text"], held["text"])) - len(held)


def overlap_rows(texts: list[str], held: list[str]) -> list[str]:
    return [text for text in texts if overlap([text], held)]


def test_the_cut_depends_on_the_seed_alone_and_keeps_the_order(nested):
    first, again, other = (hold_out(nested, TEXT, 12, seed=seed)[1]["text"][:] for seed in (1, 1, 2))
    assert first == again != other
    train, _ = hold_out(nested, TEXT, 12, seed=1)
    positions = iter(nested["text"])
    assert all(text in positions for text in train["text"])


def test_rows_are_held_back_rather_than_drop_more_than_the_limit(nested, caplog):
    with caplog.at_level(logging.WARNING):
        train, held = hold_out(nested, TEXT, 50, limit=0.1)
    assert 0 < len(held) < 50
    assert len(nested) - len(train) - len(held) <= 0.1 * len(nested)
    assert f"{len(held)} instead of 50 rows" in caplog.text


def test_case_and_punctuation_do_not_hide_containment_and_word_boundaries_limit_it():
    data = Dataset.from_dict({"text": ["Good film", "a good film.", "such good films", "a nongood film"]})
    for seed in range(5):  # nothing may be dropped, so that only texts without overlap can be held out
        _, held = hold_out(data, Columns(("text",), None), 2, seed=seed, limit=0.0)
        assert set(held["text"]) == {"such good films", "a nongood film"}


def test_texts_without_spaces_between_words_are_compared_by_character():
    data = Dataset.from_dict({"text": ["这部电影很好看", "电影", "天气不错", "我不知道", "再见朋友"]})
    for seed in range(5):
        train, held = hold_out(data, Columns(("text",), None), 2, seed=seed, limit=1.0)
        assert "电影" not in held["text"]
        assert not ("这部电影很好看" in held["text"] and "电影" in train["text"])


def test_copies_of_a_text_stay_together():
    texts = sentences(20, seed=4) * 2
    train, held = hold_out(Dataset.from_dict({"text": texts}), Columns(("text",), None), 9)
    assert len(held) == 8 and len(train) == 32
    assert not set(train["text"]) & set(held["text"])


def test_a_pair_contains_another_if_both_texts_do_in_either_order():
    pairs = [("the film is good", "a dull plot"), ("film", "dull plot"), ("a dull plot", "the film is good")]
    apart = [("slow music ends", "bright cast"), ("music", "slow")]  # only one text in the right place: no overlap
    one, two = zip(*pairs, *apart, strict=True)
    data = Dataset.from_dict({"one": one, "two": two})
    for seed in range(5):  # nothing may be dropped, so that only pairs without overlap can be held out
        _, held = hold_out(data, Columns(("one", "two"), None), 2, seed=seed, limit=0.0)
        assert set(zip(held["one"], held["two"], strict=True)) == set(apart)


def test_the_default_is_a_tenth_between_200_and_2000_and_at_most_a_quarter():
    sizes = {40: 10, 1000: 200, 3000: 300}
    for total, expected in sizes.items():
        data = Dataset.from_dict({"text": [f"row number {row}" for row in range(total)]})
        assert len(hold_out(data, Columns(("text",), None))[1]) == expected


def test_a_cut_that_is_impossible_is_refused():
    columns = Columns(("text",), None)
    same = Dataset.from_dict({"text": ["the same"] * 10})
    with pytest.raises(ValueError, match="No rows can be held out of 10"):
        hold_out(same, columns, 2)
    with pytest.raises(ValueError, match="Cannot hold out 10 of 10 rows"):
        hold_out(same, columns, 10)


# --- tokens


def test_rows_are_tokenised_as_one_by_one(tokenizer):
    data = Dataset.from_dict({"text": ["the film is good", "", "zzz"], "labels": [0, 1, 0]})
    tokens = tokenize(data, tokenizer, TEXT, 16)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for row, text in enumerate(data["text"]):
        assert tokens[row]["input_ids"] == tokenizer(text)["input_ids"]
        assert tokens[row]["attention_mask"] == [1] * len(tokens[row]["input_ids"])
    assert tokens[1]["input_ids"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert tokens["labels"][:] == [0, 1, 0]


def test_pairs_get_both_texts_and_their_types(tokenizer):
    data = Dataset.from_dict({"one": ["the film"], "two": ["good"]})
    tokens = tokenize(data, tokenizer, Columns(("one", "two"), None), 16)
    assert tokens[0]["input_ids"] == tokenizer("the film", "good")["input_ids"]
    assert tokens[0]["token_type_ids"] == tokenizer("the film", "good")["token_type_ids"]


def test_long_rows_are_cut_with_one_warning_that_counts_them(tokenizer, caplog):
    data = Dataset.from_dict({"text": ["the film is good", "good", "the film is not good"] * 700})
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(data, tokenizer, TEXT, 5)
    assert [len(ids) for ids in tokens["input_ids"][:3]] == [5, 3, 5]
    assert tokens[2]["input_ids"][-1] == tokenizer.sep_token_id
    assert [record.message for record in caplog.records] == [
        "1400 of 2100 rows are longer than 5 tokens and were cut to that."
    ]


def test_a_slow_tokenizer_counts_its_cuts_as_a_fast_one_does(tokenizer):
    """CANINE's tokens are characters, and it has no fast form."""
    encoding, cut = encode_texts(CanineTokenizer(), [["abc", "abcdefgh", "abcd", "xyzxyz"]], 6)
    assert cut == 2 and [len(ids) for ids in encoding["input_ids"]] == [5, 6, 6, 6]
    texts = [["the film", "the film is very good"], ["a story", "not bad"]]
    encoding, cut = encode_texts(tokenizer, texts, 8)
    assert cut == 1 and [len(ids) for ids in encoding["input_ids"]] == [7, 8]


def test_the_maximum_length_is_the_smaller_of_the_tokenizers_and_the_models(tokenizer):
    assert resolve_max_length(tokenizer, None, 512) == 32
    assert resolve_max_length(tokenizer, None, 16) == 16
    assert resolve_max_length(tokenizer, 8, 16) == 8
    with pytest.raises(ValueError, match=r"`max_length` is 20. It must lie in 3..16"):
        resolve_max_length(tokenizer, 20, 16)
    with pytest.raises(ValueError, match=r"`max_length` is 3. It must lie in 4..16"):
        resolve_max_length(tokenizer, 3, 16, pair=True)


def test_a_text_that_is_no_string_is_refused_with_its_row(tokenizer):
    with pytest.raises(ValueError, match="row 1 is None"):
        tokenize(Dataset.from_dict({"text": ["a", None]}), tokenizer, TEXT, 8)


def test_batches_are_padded_to_a_multiple_of_eight(tokenizer):
    data = Dataset.from_dict({"text": ["the film is good", "good"], "labels": [[0.0, 1.0], [1.0, 1.0]]})
    tokens = tokenize(data, tokenizer, TEXT, 16)
    batch = make_collator(tokenizer)([tokens[0], tokens[1]])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 3]
    assert batch["labels"].tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_class_weights_make_every_class_count_the_same():
    labels = [0] * 6 + [1] * 3 + [2]
    weights = class_weights(labels, 3)
    assert [weights[c] * labels.count(c) for c in range(3)] == pytest.approx([10 / 3] * 3)
    with pytest.raises(ValueError, match=r"classes \[1, 3\] are missing"):
        class_weights([0, 2], 4)
    with pytest.raises(ValueError, match=r"lie in 0..2. They must lie in 0..1"):
        class_weights([0, 2], 2)


# --- the whole


def sentiment(count: int, seed: int) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    return rows(count, seed).cast(features)


def test_preparing_gives_three_splits_in_the_teachers_label_order(tokenizer):
    data = DatasetDict({"train": sentiment(60, 0), "test": sentiment(10, 1)})
    config = BertConfig(id2label={0: "POS", 1: "NEG"}, label2id={"POS": 0, "NEG": 1})
    prepared = prepare_data(data, tokenizer, teacher_config=config, max_positions=16)
    assert len(prepared.train) + len(prepared.calibration) <= 60
    assert len(prepared.calibration) == 15 and len(prepared.validation) == 10
    assert prepared.validation["labels"][:] == [1 - label for label in data["test"]["label"]]
    assert prepared.raw["validation"]["text"][:] == data["test"]["text"][:]
    assert overlap(prepared.raw["train"]["text"], prepared.raw["calibration"]["text"]) == []
    for name in ("train", "calibration", "validation"):
        raw, tokens = prepared.raw[name], getattr(prepared, name)
        assert raw["labels"][:] == tokens["labels"][:]
        assert tokens[0]["input_ids"] == tokenizer(raw[0]["text"])["input_ids"]
    assert (prepared.label_names, prepared.num_labels, prepared.max_length) == (["POS", "NEG"], 2, 16)


def test_the_summary_is_json_and_tells_how_the_splits_were_made(tokenizer):
    prepared = prepare_data(rows(60), tokenizer, max_positions=12, arguments=DataArguments(calibration_rows=5))
    summary = json.loads(json.dumps(prepared.summary()))
    assert summary["rows"]["calibration"] == 5
    assert summary["calibration_from"] == summary["validation_from"] == "cut from train without overlapping texts"
    assert sum(summary["rows"].values()) + sum(summary["dropped_train_rows"].values()) == 60
    assert sum(summary["truncated_rows"].values()) == sum(len(text.split()) > 10 for text in sentences(60))


def test_the_whole_preparation_warns_once_of_cut_rows(tokenizer, caplog):
    data = DatasetDict({"train": rows(30), "validation": rows(10, seed=1), "cal": rows(10, seed=2)})
    with caplog.at_level(logging.WARNING):
        prepare_data(data, tokenizer, max_positions=4, arguments=DataArguments(calibration_split="cal"))
    assert [record.message for record in caplog.records] == [
        "50 of 50 rows are longer than 4 tokens and were cut to that."
    ]


def test_samples_are_random_seeded_and_as_large_as_asked(tokenizer):
    data = DatasetDict({"train": rows(60), "validation": rows(20, seed=1)})

    def prepare(seed: int):
        arguments = DataArguments(max_train_rows=30, max_validation_rows=7, calibration_rows=5, data_seed=seed)
        return prepare_data(data, tokenizer, max_positions=16, arguments=arguments).raw

    first, again, other = prepare(1), prepare(1), prepare(2)
    assert len(first["validation"]) == 7 and len(first["train"]) + len(first["calibration"]) <= 30
    for name in ("train", "validation"):
        assert first[name].to_dict() == again[name].to_dict() != other[name].to_dict()


def test_the_row_in_an_error_is_that_of_the_source_not_of_a_sample_or_cut(tokenizer):
    data = rows(60).to_dict()
    data["label"][43] = -1
    with pytest.raises(ValueError, match="row 43 in split 'train' is -1"):
        prepare_data(Dataset.from_dict(data), tokenizer, max_positions=16, arguments=DataArguments(max_train_rows=20))


def test_unlabelled_training_text_is_prepared_with_labels_to_report_on(tokenizer):
    data = DatasetDict({"train": rows(40).remove_columns("label"), "validation": rows(10, seed=1)})
    prepared = prepare_data(data, tokenizer, teacher_config=BertConfig(num_labels=2), max_positions=16)
    assert "labels" not in prepared.train.column_names
    assert "labels" not in prepared.calibration.column_names
    assert prepared.validation["labels"][:] == data["validation"]["label"][:]


def test_labels_of_an_unusual_name_may_be_in_the_validation_rows_alone(tokenizer, caplog):
    odd = rows(10, seed=1).rename_column("label", "verdict")
    data = DatasetDict({"train": rows(40).remove_columns("label"), "validation": odd})
    named = DataArguments(label_column="verdict")
    settings = {"arguments": named, "teacher_config": BertConfig(num_labels=2), "max_positions": 16}
    with caplog.at_level(logging.WARNING):
        prepared = prepare_data(data, tokenizer, **settings)
    assert "labels" not in prepared.train.column_names
    assert prepared.validation["labels"][:] == odd["verdict"][:]
    assert "Only the validation rows have the column 'verdict'" in caplog.text
    with pytest.raises(ValueError, match=r"'verdict', which only the validation rows have; .* have 'label'"):
        prepare_data(DatasetDict({**data, "train": rows(40)}), tokenizer, **settings)
    with pytest.raises(ValueError, match="`label_column` names 'verdikt', but the columns are: text"):
        prepare_data(data, tokenizer, **{**settings, "arguments": DataArguments(label_column="verdikt")})
    with pytest.raises(ValueError, match=r"validation rows have no label column.* with `label_column`"):
        prepare_data(data, tokenizer, **{**settings, "arguments": None})


def test_validation_without_labels_is_refused(tokenizer):
    data = DatasetDict({"train": rows(40), "validation": rows(10, seed=1).remove_columns("label")})
    with pytest.raises(ValueError, match=r"validation rows have no label column.*`validation_split`"):
        prepare_data(data, tokenizer, max_positions=16)


def test_a_class_without_training_rows_is_warned_of(tokenizer, caplog):
    train = rows(20).map(lambda row: {"label": 1})
    with caplog.at_level(logging.WARNING):
        prepare_data(DatasetDict({"train": train, "validation": rows(10, seed=1)}), tokenizer, max_positions=16)
    assert "The labels [0] of 0..1 have no training rows" in caplog.text


def test_one_split_is_prepared_for_a_finished_model(tokenizer):
    data = DatasetDict({"train": sentiment(20, 0), "validation": sentiment(10, 1)})
    config = BertConfig(id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1})
    split = prepare_split(data, "validation", tokenizer, config=config, max_positions=16)
    assert split["labels"][:] == [1 - label for label in data["validation"]["label"]]
    with pytest.raises(ValueError, match=r"`split` is 'dev', but the splits are: train, validation"):
        prepare_split(data, "dev", tokenizer, config=config, max_positions=16)
    bare = DatasetDict({"validation": rows(4).remove_columns("label")})
    with pytest.raises(ValueError, match="No label column was found in split 'validation' among: text"):
        prepare_split(bare, "validation", tokenizer, config=config, max_positions=16)
    split = prepare_split(bare, "validation", tokenizer, config=config, max_positions=16, require_labels=False)
    assert len(split) == 4 and "labels" not in split.column_names


def test_a_dataset_formatted_as_tensors_is_prepared_alike(tokenizer):
    data = DatasetDict({"train": rows(40), "validation": rows(10, seed=1)})
    plain = prepare_data(data, tokenizer, max_positions=16)
    formatted = prepare_data(data.with_format("torch"), tokenizer, max_positions=16)
    assert plain.train.to_dict() == formatted.train.to_dict()
