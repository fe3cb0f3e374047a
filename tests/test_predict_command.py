"""`hf-costeff predict`: files and streams in and out, what is kept after an error, and exit statuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from pyarrow.parquet import read_table
from transformers import AutoModelForSequenceClassification

from helpers import tiny_bert, tiny_model, word_tokenizer
from hf_costeff import ExitConfig, predict_texts
from hf_costeff.cli import main
from hf_costeff.commands.predict import CLOSED_PIPE

TEXTS = ["a good film", "the plot was not very bright", "dull", "", 'a "slow" story, but well', "cast"] * 3
SETTINGS = ExitConfig(threshold=[0.3, 0.4, 0.8, 0.0])


@pytest.fixture(autouse=True)
def cache_in_the_tests_folder(tmp_path, monkeypatch):
    disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("slim")
    names = {0: "bad", 1: "fair", 2: "good"}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    tiny_model(seed=3, exit_config=SETTINGS.to_dict(), **labels).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(folder) -> list[dict]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return list(predict_texts(model, word_tokenizer(), TEXTS, show_progress=False))


def written(path) -> list[dict]:
    readers = {".csv": Dataset.from_csv, ".jsonl": Dataset.from_json, ".parquet": Dataset.from_parquet}
    return list(readers[path.suffix](str(path)))


def same(found, expected) -> bool:
    def rounded(answer):
        return {**answer, "score": round(answer["score"], 4)}

    return list(map(rounded, found)) == list(map(rounded, expected))


# --- in and out


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".txt"])
@pytest.mark.parametrize("output", [".csv", ".jsonl", ".parquet"])
def test_a_file_is_answered_row_by_row_in_a_file(folder, tmp_path, capsys, expected, ending, output):
    rows = tmp_path / f"rows{ending}"
    table = Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    {
        ".csv": table.to_csv,
        ".jsonl": table.to_json,
        ".parquet": table.to_parquet,
        ".txt": lambda path: path.write_text("\n".join(TEXTS) + "\n"),
    }[ending](rows)
    answers = tmp_path / f"answers{output}"
    assert main(["predict", folder, "--file", str(rows), "--output", str(answers)]) == 0
    assert same(written(answers), expected)
    mean = sum(answer["exit_layer"] for answer in expected) / len(TEXTS)
    assert f"18 answers are in {answers}. Mean exit layer: {mean:.2f} of 4." in capsys.readouterr().out


def stream(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_a_stream_of_json_lines_is_answered_on_the_standard_output(folder, monkeypatch, capsys, expected):
    stream(monkeypatch, *(json.dumps(text) for text in TEXTS[:2]), "", *(json.dumps({"text": t}) for t in TEXTS[2:]))
    assert main(["predict", folder]) == 0
    out, err = capsys.readouterr()
    assert same(map(json.loads, out.splitlines()), expected) and "hf-costeff" not in err


def test_pairs_settings_and_labels_are_chosen_by_flags(folder, monkeypatch, capsys):
    pairs = list(itertools.pairwise(TEXTS))
    stream(monkeypatch, *(json.dumps({"a": first, "text": "no", "b": second}) for first, second in pairs))
    words = ["--text_columns", "a", "b", "--top_k", "2", "--early_exit", "false", "--batch_size", "5"]
    assert main(["predict", "--model", folder, *words, "--max_length", "8"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    settings = {"early_exit": False, "top_k": 2, "max_length": 8, "batch_size": 5, "show_progress": False}
    expected = list(predict_texts(model, word_tokenizer(), pairs, **settings))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


@pytest.mark.parametrize(
    ("word", "layers"), [("0", {4}), ("1", {1}), ("false", {4}), ("False", {4}), ("true", {1, 2, 3, 4})]
)
def test_early_exit_is_a_word_or_a_number(folder, monkeypatch, capsys, word, layers):
    stream(monkeypatch, *map(json.dumps, TEXTS))
    assert main(["predict", folder, "--early_exit", word]) == 0
    found = {json.loads(line)["exit_layer"] for line in capsys.readouterr().out.splitlines()}
    assert found <= layers and (found == layers or word == "true")


def test_lists_are_written_as_lists(folder, tmp_path, monkeypatch):
    stream(monkeypatch, *map(json.dumps, TEXTS))
    answers = tmp_path / "answers.parquet"
    assert main(["predict", folder, "--output", str(answers), "--top_k", "3"]) == 0
    assert all(sorted(row["labels"]) == ["bad", "fair", "good"] and len(row["scores"]) == 3 for row in written(answers))


@pytest.mark.parametrize("output", [[], ["--output", "answers.parquet"]])
def test_no_rows_are_no_error_but_told(folder, tmp_path, monkeypatch, capsys, caplog, output):
    monkeypatch.chdir(tmp_path)
    stream(monkeypatch)
    assert main(["predict", folder, *output]) == 0
    out = capsys.readouterr().out
    if not output:  # not even an empty line, which would be no JSON
        assert out == "" and "Nothing to answer: there are no rows in the standard input." in caplog.text
    assert not output or read_table(tmp_path / "answers.parquet").num_rows == 0


# --- what is wrong


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_what_was_done_before_a_bad_row_is_in_the_file_and_the_status_is_1(
    folder, tmp_path, monkeypatch, capsys, expected, ending
):
    stream(monkeypatch, *map(json.dumps, TEXTS[:5]), "null", '"more"')
    answers = tmp_path / f"answers{ending}"
    assert main(["predict", folder, "--output", str(answers)]) == 1
    assert same(written(answers), expected[:5])
    err = capsys.readouterr().err
    assert "hf-costeff predict: Row 5 is None. It must be one text" in err and f"5 answers are in {answers}." in err


def test_what_was_done_before_a_broken_line_is_on_the_standard_output(folder, monkeypatch, capsys, expected):
    stream(monkeypatch, *map(json.dumps, TEXTS[:5]), "{broken", '"more"')
    assert main(["predict", folder]) == 1
    out, err = capsys.readouterr()
    assert same(map(json.loads, out.splitlines()), expected[:5])
    assert "Row 5 could not be read: ValueError: the line '{broken' is no JSON (Expecting property name" in err


def test_plain_text_on_the_standard_input_is_answered_with_how_to_give_it(folder, monkeypatch, capsys):
    stream(monkeypatch, "a good film")
    assert main(["predict", folder]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "the line 'a good film' is no JSON" in err
    assert 'Write a text in quotation marks or as {"text": "..."}' in err and "--file texts.txt" in err


def test_somebody_who_types_is_told_what_is_waited_for(folder, monkeypatch, capsys, caplog):
    stream(monkeypatch, '"a good film"')
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["predict", folder]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert "Waiting for rows: one JSON string or object per line" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "answers.xlsx"], "Known endings are .csv, .jsonl, .parquet"),
        (["--output", "answers.csv", "--top_k", "2"], "csv holds no lists"),
        (["--early_exit", "perhaps"], "Give true, false or a number"),
        (["--early_exit", "-1"], "`threshold` is -1.0"),
        (["--batch_size", "0"], "`--batch_size` is 0"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["--file", "nowhere.csv"], "does not exist"),
        (["--file", "rows.doc"], "Known endings are"),
        (["--output", "nowhere/answers.jsonl"], "nowhere/answers.jsonl"),
        (["--device", "cuda:77"], "`--device` is 'cuda:77'"),
        (["--device", "toaster"], "`--device` is 'toaster'"),
    ],
)
def test_a_mistake_in_the_call_is_named_and_nothing_is_written(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    stream(monkeypatch, *map(json.dumps, TEXTS))
    assert main(["predict", folder, *words]) == 1
    out, err = capsys.readouterr()
    assert message in err and out == ""
    assert not [file for file in os.listdir(tmp_path) if file.startswith("answers")]


def test_a_model_without_exits_is_refused(tmp_path, monkeypatch, capsys):
    stream(monkeypatch, '"a"')
    tiny_bert().save_pretrained(tmp_path / "stock")
    assert main(["predict", str(tmp_path / "stock")]) == 1
    assert "without exits. Compress it first" in capsys.readouterr().err


def test_a_broken_checkpoint_is_an_error(tmp_path, monkeypatch, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.costeff.exits["1"].classifier.bias[0] = float("nan")
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    stream(monkeypatch, '"a good film"')
    assert main(["predict", str(tmp_path), "--early_exit", "0.5"]) == 1
    assert "checkpoint is broken" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_command_quietly(folder, monkeypatch, capsys):
    """As `hf-costeff predict ... | head -1` does."""
    stream(monkeypatch, *map(json.dumps, TEXTS))
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as stopped:
            main(["predict", folder])
        gone.write("what Python flushes at its end")
    assert stopped.value.code == CLOSED_PIPE
    assert "roken pipe" not in capsys.readouterr().err


def test_the_file_that_is_read_is_never_written(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a good film"}\n')
    assert main(["predict", folder, "--file", str(rows), "--output", f"{tmp_path}/./rows.jsonl"]) != 0
    assert "the file that is read" in capsys.readouterr().err
    assert rows.read_text() == '{"text": "a good film"}\n'
