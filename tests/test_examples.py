"""The examples run, on a handful of rows and steps."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
)

import batch_prediction
import block_prune
import calibrate_model
import cascade
import compress_checkpoint
import demo
import export_onnx
import lora
import push
import skip_layers
import train_with_trainer
from demo_corpus import LABEL_NAMES, make_corpus, train_tokenizer
from hf_costeff import ExitConfig, convert_from_stock
from hf_costeff.cli import COMMANDS, main
from hf_costeff.recipes import RECIPES, Phase, Recipe, fast_recipe
from loopback_hub import LoopbackHub, run_python
from test_readme import ROOT, commands

TEXTS = ("a gripping film.", "the soup was not fresh.")


def recipe_of_few_steps(rows: int, num_attention_heads: int, num_labels: int) -> Recipe:
    """The fast recipe with every phase cut to two steps."""
    recipe = fast_recipe(rows, num_attention_heads, num_labels)
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


EXAMPLES = [
    batch_prediction,
    block_prune,
    calibrate_model,
    cascade,
    compress_checkpoint,
    export_onnx,
    lora,
    push,
    skip_layers,
    train_with_trainer,
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_an_example_has_under_90_lines(example):
    assert len(Path(example.__file__).read_text().splitlines()) < 90


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


def test_a_file_is_predicted_at_full_depth_and_with_early_exit(teacher, monkeypatch, capsys):
    stock = AutoModelForSequenceClassification.from_pretrained(teacher / "teacher")
    convert_from_stock(stock).save_pretrained(teacher / "slim")
    AutoTokenizer.from_pretrained(teacher / "teacher").save_pretrained(teacher / "slim")
    flags = {"model": [teacher / "slim"], "file": [teacher / "rows.csv"], "text_columns": ["opinion"]}
    run(monkeypatch, batch_prediction, **flags, threshold=[0.999], show=[3])
    printed = capsys.readouterr().out
    assert "full depth: " in printed and "answers as at full depth: " in printed
    assert printed.count(" after layer ") == 3
    assert sum(int(line.split()[3]) for line in printed.splitlines() if line.startswith("after layer")) == 160


def test_a_model_is_pruned_at_two_ratios_after_one_penalised_run(teacher, monkeypatch, capsys):
    (teacher / "named.csv").write_text((teacher / "rows.csv").read_text().replace("opinion,verdict", "text,label", 1))
    run(
        monkeypatch,
        block_prune,
        model=[teacher / "teacher"],
        train_file=[teacher / "named.csv"],
        ratios=[0.5, 0.8],
        epochs=[0.25],
        output_dir=[teacher / "packed"],
        texts=TEXTS,
    )
    printed = capsys.readouterr().out
    first, second = re.findall(r"Pruned matrices: ([\d.]+) times fewer weights", printed)
    assert float(first) == pytest.approx(2, rel=0.02) and float(second) == pytest.approx(5, rel=0.05)
    assert all(text in printed for text in TEXTS)
    stages = sorted(path.name.split("-")[0] for path in (teacher / "packed" / "stages").iterdir() if path.is_dir())
    assert stages == ["penalty", "prune", "prune", "retrain", "retrain"]


def test_a_model_learns_to_skip_layers_and_tells_which_ran(teacher, monkeypatch, capsys):
    (teacher / "named.csv").write_text((teacher / "rows.csv").read_text().replace("opinion,verdict", "text,label", 1))
    run(
        monkeypatch,
        skip_layers,
        model=[teacher / "teacher"],
        train_file=[teacher / "named.csv"],
        target_layers=[1.5],
        gates=["linear"],
        epochs=[0.25],
        exit_epochs=[0.25],
        output_dir=[teacher / "skipping"],
        texts=TEXTS,
    )
    printed = capsys.readouterr().out
    assert "Asked for: 1.5 layers." in printed and "skipping and early exit" in printed
    assert printed.count("left after") == len(TEXTS)


@pytest.mark.parametrize("left_out", [{"exit_epochs": [0]}, {"gates": ["none"]}], ids=str)
def test_a_model_that_only_skips_or_only_leaves_early_answers_too(left_out, teacher, monkeypatch, capsys):
    (teacher / "named.csv").write_text((teacher / "rows.csv").read_text().replace("opinion,verdict", "text,label", 1))
    settings = {"epochs": [0.25], "exit_epochs": [0.25], "gates": ["linear"], "target_layers": [1.5], **left_out}
    files = {"model": [teacher / "teacher"], "train_file": [teacher / "named.csv"]}
    run(monkeypatch, skip_layers, **files, **settings, output_dir=[teacher / "skipping"], texts=TEXTS)
    assert capsys.readouterr().out.count("left after") == len(TEXTS)


@pytest.fixture
def slim(teacher):
    """A folder with a slim model for the rows in `named.csv` beside it."""
    stock = AutoModelForSequenceClassification.from_pretrained(teacher / "teacher")
    convert_from_stock(stock).save_pretrained(teacher / "slim")
    AutoTokenizer.from_pretrained(teacher / "teacher").save_pretrained(teacher / "slim")
    (teacher / "named.csv").write_text((teacher / "rows.csv").read_text().replace("opinion,verdict", "text,label", 1))
    return teacher / "slim"


def test_a_model_is_exported_and_answers_from_its_folder(slim, monkeypatch, capsys):
    run(monkeypatch, export_onnx, model=[slim], output_dir=[slim / "onnx"], texts=TEXTS)
    first, *answers = capsys.readouterr().out.splitlines()
    assert first.startswith("graphs end after layers [1, 2]")
    assert [json.loads(answer)["exit_layer"] for answer in answers] == [2, 2]


def test_budgets_are_compared_and_one_is_saved(slim, monkeypatch, capsys):
    run(monkeypatch, calibrate_model, model=[slim], rows=[slim.parent / "named.csv"], budgets=[0, 50], save=[50])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "0", "50", "saved"]
    assert loads_and_leaves_early(slim)
    saved = AutoModelForSequenceClassification.from_pretrained(slim).config.exit_config
    assert saved["calibration"]["goal"] == {"max_accuracy_drop": 50}


def test_a_cascade_is_trained_calibrated_and_asked_on_the_generated_corpus(tmp_path, monkeypatch, capsys):
    few = {"rows": [120], "epochs": [0.5], "folds": [2], "target_speedup": [1.1]}
    run(monkeypatch, cascade, output_dir=[tmp_path], **few)
    printed = capsys.readouterr().out
    assert "member 2: accuracy" in printed and "hard for the smallest" in printed
    assert printed.count(" by member ") == 3 and "Counter(" in printed
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert saved.config.exit_config["calibration"]["goal"] == {"target_speedup": 1.1}


def test_an_adapter_is_trained_and_merged(slim, monkeypatch, capsys):
    folders = {"output_dir": [slim.parent / "adapter"], "merge_into": [slim.parent / "merged"]}
    run(monkeypatch, lora, model=[slim], rows=[slim.parent / "named.csv"], max_steps=[2], rank=[2], **folders)
    assert (slim.parent / "adapter" / "adapter_model.safetensors").exists() and "trainable" in capsys.readouterr().out
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(path) for path in (slim, slim.parent / "merged")
    )
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert any("query_key_value" in name for name in changed) and any("exits.1" in name for name in changed)
    assert not any("feed_forward" in name or "embeddings" in name for name in changed)


def test_a_model_is_pushed_and_asked_where_it_now_is(slim):
    words = ["--model", slim, "--repo_id", "org/pushed", "--license", "mit", "--private", "--text", TEXTS[0]]
    start = "import runpy, sys\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')"
    with LoopbackHub() as hub:
        done = run_python(start, hub.environment(slim.parent), slim.parent, push.__file__, *words)
        assert done.returncode == 0, done.stderr
        assert f"Pushed to {hub.endpoint}/org/pushed/commit/" in done.stdout and "after layer 2 of 2" in done.stdout
        assert b"license: mit" in hub.files("org/pushed")["README.md"] and hub.repos["org/pushed"]["private"]


class Killed(BaseException):
    """Stands for a process that ends here."""


class KilledInTheSecondEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch > 1:
            raise Killed


def test_the_demo_goes_on_after_a_kill_and_the_commands_of_the_quickstart_work_on_what_it_leaves(
    tmp_path, monkeypatch, capfd
):
    """From the teacher's second epoch on; then every command of the page on a file of the demo is run, but the push."""
    monkeypatch.setitem(RECIPES, "fast", recipe_of_few_steps)
    monkeypatch.chdir(tmp_path)
    sizes = {"output_dir": ["build/demo"], "train_rows": [256], "held_out_rows": [100], "teacher_epochs": [2]}
    original = demo.TeacherTrainer
    monkeypatch.setattr(demo, "TeacherTrainer", functools.partial(original, callbacks=[KilledInTheSecondEpoch()]))
    with pytest.raises(Killed):
        run(monkeypatch, demo, **sizes)
    assert not Path("build/demo/teacher").exists()
    vocabulary = AutoTokenizer.from_pretrained("build/demo/teacher.working/tokenizer").get_vocab()
    steps: list[int] = []
    counting = LambdaOnStep(steps.append)
    monkeypatch.setattr(demo, "TeacherTrainer", functools.partial(original, callbacks=[counting]))
    run(monkeypatch, demo, **sizes)
    assert steps == [5, 6, 7, 8]  # 256 rows in batches of 64: the first epoch was not repeated
    assert AutoTokenizer.from_pretrained("build/demo/teacher").get_vocab() == vocabulary
    assert {path.name for path in Path("build/demo").iterdir()} == {"data", "teacher", "model"}

    out = capfd.readouterr().out
    with open("build/demo/data/validation.csv") as file:
        gold = list(csv.DictReader(file))
    shown = [line for line in out.splitlines() if "  after layer " in line]
    assert len(gold) == 100 and {row["label"] for row in gold} == set(LABEL_NAMES) and len(shown) == 8
    for line, row in zip(shown, gold, strict=False):
        label, _, verdict, *_ = line.split()
        assert line.endswith(f"  {row['text']}") and verdict == ("right" if label == row["label"] else "WRONG")

    calls = [
        words for words in commands(ROOT / "docs" / "quickstart.md") if any("build/demo" in word for word in words)
    ]
    assert {words[0] for words in calls} == {name for name in COMMANDS if " " not in name}  # cascades have a page
    for words in calls:
        monkeypatch.setattr(sys, "stdin", io.StringIO('"the plot is witty, but the ending ruins it."\n'))
        assert words[0] == "push" or main(words) == 0, words
    for name in (
        "answers.csv",
        "report/report.html",
        "benchmark/benchmark.json",
        "onnx/runner.py",
        "quarter/SUMMARY.md",
    ):
        assert (Path("build/demo") / name).exists(), name


class LambdaOnStep(TrainerCallback):
    """Calls a function with the number of every step that ends."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)
