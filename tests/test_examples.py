"""The examples run, on a handful of rows and steps."""

from __future__ import annotations

import csv
import dataclasses
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import compress_checkpoint
import train_with_trainer
from demo_corpus import LABEL_NAMES, make_corpus, train_tokenizer
from hf_costeff import ExitConfig
from hf_costeff.recipes import RECIPES, Phase, Recipe, fast_recipe

TEXTS = ("a gripping film.", "the soup was not fresh.")


def recipe_of_few_steps(rows: int, num_attention_heads: int) -> Recipe:
    """The fast recipe with every phase cut to two steps."""
    recipe = fast_recipe(rows, num_attention_heads)
    phases = {name: value for name, value in vars(recipe).items() if isinstance(value, Phase)}
    cut = {name: dataclasses.replace(phase, min_steps=0, max_steps=2) for name, phase in phases.items()}
    return dataclasses.replace(recipe, **cut, events=1, importance_rows=32)


@pytest.fixture
def teacher(tmp_path):
    """A folder with an untrained BERT of two layers and its tokenizer, and a csv file of rows for it."""
    rows = make_corpus(160, seed=0)
    tokenizer = train_tokenizer([str(row["text"]) for row in rows], vocab_size=300)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: index for index, name in enumerate(LABEL_NAMES)},
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["opinion", "verdict"])
        writer.writerows((row["text"], LABEL_NAMES[int(row["label"])]) for row in rows)
    return tmp_path


def run(monkeypatch, example, **flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", *map(str, value))]
    monkeypatch.setattr(sys, "argv", [example.__name__, *words])
    example.main()


def loads_and_leaves_early(folder) -> bool:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = AutoTokenizer.from_pretrained(folder)(list(TEXTS), return_tensors="pt", padding=True)
    assert isinstance(ExitConfig.from_dict(model.config.exit_config), ExitConfig)
    return model.predict(**batch, early_exit=True).exit_layer.shape == (len(TEXTS),)


def test_a_checkpoint_is_compressed_on_rows_from_a_file(teacher, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "fast", recipe_of_few_steps)
    run(
        monkeypatch,
        compress_checkpoint,
        teacher=[teacher / "teacher"],
        train_file=[teacher / "rows.csv"],
        text_columns=["opinion"],
        label_column=["verdict"],
        compression=[2],
        output_dir=[teacher / "slim"],
        texts=TEXTS,
    )
    printed = capsys.readouterr().out
    assert "parameters" in printed and "slim, early exit" in printed
    assert all(text in printed for text in TEXTS)
    assert loads_and_leaves_early(teacher / "slim")


def test_exits_are_trained_with_a_teacher_on_rows_from_a_file(teacher, monkeypatch, capsys):
    (teacher / "named.csv").write_text((teacher / "rows.csv").read_text().replace("opinion,verdict", "text,label", 1))
    run(
        monkeypatch,
        train_with_trainer,
        teacher=[teacher / "teacher"],
        train_file=[teacher / "named.csv"],
        max_steps=[2],
        output_dir=[teacher / "exits"],
    )
    assert "eval_exit_1_accuracy" in capsys.readouterr().out
    assert loads_and_leaves_early(teacher / "exits" / "model")


def test_exits_are_trained_on_the_generated_corpus_without_any_argument_but_sizes(tmp_path, monkeypatch, capsys):
    """A corpus and a small teacher are made on the way."""
    run(monkeypatch, train_with_trainer, rows=[64], max_steps=[2], output_dir=[tmp_path])
    assert "eval_mean_exit_accuracy" in capsys.readouterr().out
    assert loads_and_leaves_early(tmp_path / "model")
