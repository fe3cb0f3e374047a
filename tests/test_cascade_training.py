"""A cascade from checkpoints and rows: fine-tuned, told what is hard, calibrated and asked, by hand and by command."""

from __future__ import annotations

import copy
import csv
import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from sklearn.metrics import roc_auc_score
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, BertModel

from helpers import balance_gates, sentence_rows, tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff import (
    CostEffCascade,
    CostEffTrainingArguments,
    cascade_training,
    load_cascade,
    make_cascade,
    save_cascade,
)
from hf_costeff.cascade_training import CascadeArguments, MemberTrainer, train_cascade
from hf_costeff.cli import main
from hf_costeff.commands.cascade import CASCADE_CALIBRATE
from hf_costeff.data import DataArguments, make_collator
from hf_costeff.difficulty import Difficulty, mark_hard_rows
from hf_costeff.evaluation import collect_exit_logits, exit_reliability

COLLATOR = make_collator(word_tokenizer())
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    disable_progress_bars()


def member_arguments(folder, **changes) -> CostEffTrainingArguments:
    fixed = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1}
    sgd = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "max_steps": 1}
    return CostEffTrainingArguments(output_dir=str(folder), **{**fixed, **sgd, **changes})


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_stock_member_learns_labels_and_difficulty_by_their_written_out_gradient(tmp_path, weight):
    rows = mark_hard_rows(token_rows(4), [False, True, False, False])
    model = tiny_bert(**NO_DROPOUT)
    twin = copy.deepcopy(model)
    arguments = member_arguments(tmp_path, difficulty_weight=weight, difficulty_margin=0.4)
    MemberTrainer(model, arguments, train_dataset=rows, data_collator=COLLATOR).train()
    batch = COLLATOR([{name: value for name, value in row.items() if name != "hard"} for row in rows])
    logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    sure = logits.softmax(-1).amax(-1)
    hinge = sum(torch.relu(0.4 - (sure[i] - sure[1])) for i in (0, 2, 3)) / 3
    (functional.cross_entropy(logits, batch["labels"]) + weight * hinge).backward()
    for (name, after), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.05 * before.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_difficulty_is_logged_by_name_and_is_no_part_of_the_evaluation(tmp_path):
    """Its pairs are drawn at random, so two evaluations of the same weights would differ."""
    rows = mark_hard_rows(token_rows(8), [False, True] * 4)
    model = tiny_bert(**NO_DROPOUT)
    weighted = member_arguments(tmp_path, difficulty_weight=0.5, difficulty_margin=1.0, eval_on_start=True)
    trainer = MemberTrainer(model, weighted, train_dataset=rows, eval_dataset=rows, data_collator=COLLATOR)
    trainer.train()
    first, step = trainer.state.log_history[:2]
    assert first["eval_loss"] == pytest.approx(step["task_loss"], abs=1e-3) and step["difficulty_loss"] > 0
    assert step["loss"] == pytest.approx(step["task_loss"] + 0.5 * step["difficulty_loss"], abs=1e-3)


def test_rows_that_skip_a_layer_are_left_out_of_what_its_exit_is_worth():
    model = balance_gates(tiny_model(skip_gates="linear", exit_pooling="mean"))
    rows = token_rows(60)
    records = collect_exit_logits(model, rows, COLLATOR, show_progress=False)
    for exit, found in enumerate(exit_reliability(model, rows, COLLATOR, show_progress=False)):
        ran = ~records.skipped[:, exit].numpy() if exit < 3 else np.ones(60, dtype=bool)
        right = (records.logits[:, exit].argmax(-1) == records.labels).numpy()[ran]
        assert 0 < ran.sum() < 60 or exit == 3
        assert found.metric == pytest.approx(right.mean())


def test_a_step_is_the_same_however_its_rows_are_accumulated(tmp_path):
    states = []
    for size, steps in ((8, 1), (2, 4)):
        model = tiny_bert(**NO_DROPOUT)
        arguments = member_arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        MemberTrainer(model, arguments, train_dataset=token_rows(8), data_collator=COLLATOR).train()
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_difficulty_without_marks_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="needs a column 'hard'"):
        MemberTrainer(tiny_bert(), member_arguments(tmp_path, difficulty_weight=1.0), train_dataset=token_rows(4))


def test_reliability_of_every_member_and_exit_is_the_area_under_its_own_curve():
    """Against scikit-learn on the logits of a plain forward; for two classes the margin orders as confidence does."""
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "num_labels": 2}
    swapped = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}, "num_labels": 2}
    cascade = CostEffCascade.from_members([tiny_model(**swapped), tiny_bert(num_hidden_layers=2, **names)])
    rows = token_rows(40, num_labels=2)
    found = exit_reliability(cascade, rows, COLLATOR, show_progress=False)
    assert [(exit.member, exit.layer) for exit in found] == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)]
    batch, labels = COLLATOR(list(rows)), np.array(rows["labels"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        exits = [logits.flip(-1) for logits in cascade.members[0](**inputs).exit_logits]
        exits.append(cascade.members[1](**inputs).logits)
    for exit, logits in zip(found, exits, strict=True):
        right = logits.argmax(-1).numpy() == labels
        assert exit.metric == pytest.approx(right.mean())
        assert exit.discrimination == pytest.approx(roc_auc_score(right, (logits[:, 0] - logits[:, 1]).abs().double()))
    assert (
        exit_reliability(cascade.members[1], rows, COLLATOR, show_progress=False)[0].discrimination
        == found[-1].discrimination
    )


@pytest.fixture
def checkpoints(tmp_path):
    """Two encoders without a head, a classifier for the same labels, and files of rows."""
    sizes = {"small": 1, "large": 3}
    for name, depth in sizes.items():
        body = tiny_bert(seed=depth, num_hidden_layers=depth, model_class=BertModel)
        body.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}, "num_labels": 2}
    tiny_bert(seed=7, num_hidden_layers=4, **names).save_pretrained(tmp_path / "whole")
    word_tokenizer().save_pretrained(tmp_path / "whole")
    rows = sentence_rows(120)
    for name, part in (("train", rows.select(range(80))), ("held_out", rows.select(range(80, 120)))):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((row["text"], ["bad", "good"][row["label"]]) for row in part)
    return tmp_path


FAST = {"epochs": 0.5, "difficulty_folds": 2, "difficulty_seeds": 2, "learning_rate": 1e-3}


def arguments(folder, *models, **changes) -> CascadeArguments:
    settings = {**FAST, **changes}
    return CascadeArguments([str(folder / name) for name in models], str(folder / "cascade"), **settings)


def data(folder, **changes) -> DataArguments:
    return DataArguments(train_file=str(folder / "train.csv"), validation_file=str(folder / "held_out.csv"), **changes)


def test_only_the_smallest_member_learns_difficulty_and_a_run_goes_on(checkpoints, monkeypatch, caplog):
    calls = []
    train = MemberTrainer.train

    def noted(self, *args, **kwargs):
        marked = "hard" in self.train_dataset.column_names
        calls.append(
            (self.model.config.num_hidden_layers, len(self.train_dataset), self.args.difficulty_weight, marked)
        )
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(MemberTrainer, "train", noted)
    with pytest.raises(KeyboardInterrupt):
        train_cascade(arguments(checkpoints, "large", "small"), data(checkpoints))
    assert "order of their cost" in caplog.text
    result = train_cascade(arguments(checkpoints, "large", "small"), data(checkpoints))
    folds, rest = calls[:5], calls[5:]
    assert all(call[0] == 1 and call[1] < 70 and call[2:] == (0.0, False) for call in folds)
    assert [call[0] for call in rest] == [1, 3] and rest[0][2:] == (0.5, True) and rest[1][2:] == (0.0, False)
    assert 0 < result.hard_share < 1 and [exit.member for exit in result.exits] == [1, 2]
    cascade, _ = load_cascade(result.path)
    assert [member.config.num_hidden_layers for member in cascade.members] == [1, 3]
    assert cascade.config.id2label == {0: "bad", 1: "good"}
    again = train_cascade(arguments(checkpoints, "large", "small"), data(checkpoints))
    assert len(calls) == 7 and again.hard_share == result.hard_share


def test_other_difficulty_settings_go_on_in_the_same_folder_from_the_answers_that_hold(checkpoints, monkeypatch):
    calls: list[tuple] = []

    def told(rows, *_, folds, seeds, **__):
        """A third of the rows is right under one seed alone, a third under all but the first, and a third under all."""
        calls.append((folds, len(seeds)))
        right = np.ones((len(rows), len(seeds)), dtype=bool)
        right[: len(rows) // 3, 1:], right[len(rows) // 3 : 2 * len(rows) // 3, 0] = False, False
        return Difficulty(right)

    def noted(self, *args, **kwargs):
        hard = round(float(np.mean(self.train_dataset["hard"])), 1) if self.args.difficulty_weight else None
        calls.append((hard, self.args.difficulty_weight, self.args.difficulty_margin))

    monkeypatch.setattr(cascade_training, "difficulty_labels", told)
    monkeypatch.setattr(MemberTrainer, "train", noted)
    first = {"difficulty_seeds": 3}
    plain = (None, 0.0, 0.5)
    for changes, expected in (
        (first, [(2, 3), (0.7, 0.5, 0.5), plain]),
        ({**first, "difficulty_rule": "majority"}, [(0.3, 0.5, 0.5)]),
        ({**first, "difficulty_margin": 0.25}, [(0.7, 0.5, 0.25)]),
        ({**first, "difficulty_weight": 0.25}, [(0.7, 0.25, 0.5)]),
        ({**first, "difficulty_weight": 0.0}, [plain]),
        ({"difficulty_seeds": 2}, [(2, 2), (0.7, 0.5, 0.5)]),
        ({**first, "difficulty_folds": 3}, [(3, 3), (0.7, 0.5, 0.5)]),
        (first, []),
    ):
        calls.clear()
        train_cascade(arguments(checkpoints, "small", "large", **changes), data(checkpoints))
        assert calls == expected


@pytest.mark.parametrize(
    ("changes", "rows", "said"),
    [
        ({"epochs": 0.25}, {}, "epochs was 0.5, now 0.25"),
        ({}, {"max_length": 4}, r"max_length was \[24, 24\], now \[4, 4\]"),
    ],
)
def test_members_of_another_run_are_not_taken(checkpoints, changes, rows, said, monkeypatch):
    monkeypatch.setattr(MemberTrainer, "train", lambda *_, **__: None)
    plain = {"difficulty_weight": 0.0}
    train_cascade(arguments(checkpoints, "small", "large", **plain), data(checkpoints))
    with pytest.raises(ValueError, match=said):
        train_cascade(arguments(checkpoints, "small", "large", **plain, **changes), data(checkpoints, **rows))


def test_where_all_rows_are_alike_difficulty_is_left_out_with_a_warning(checkpoints, monkeypatch, caplog):
    easy = Difficulty(np.ones((60, 2), dtype=bool))
    monkeypatch.setattr(cascade_training, "difficulty_labels", lambda *_, **__: easy)
    with caplog.at_level(logging.WARNING):
        result = train_cascade(arguments(checkpoints, "small", "large"), data(checkpoints))
    assert result.hard_share == 0 and "Of 60 rows none are hard" in caplog.text and "--difficulty_rule" in caplog.text
    [stage] = (result.path / "stages").glob("member-1-*")
    assert json.loads((stage / "stage.json").read_text())["difficulty_weight"] == 0


def test_a_member_with_a_head_is_taken_as_it_is_and_gives_the_labels(checkpoints):
    result = train_cascade(arguments(checkpoints, "small", "whole", difficulty_weight=0), data(checkpoints))
    cascade, _ = load_cascade(result.path)
    before = AutoModelForSequenceClassification.from_pretrained(checkpoints / "whole").state_dict()
    after = cascade.members[1].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert result.hard_share is None and cascade.members[0].config.id2label == {0: "bad", 1: "good"}


def finished(folder, name: str, *labels: str, **sizes) -> None:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    tiny_bert(
        seed=len(name), num_labels=len(labels), **sizes, **(names if labels[0] != "LABEL_0" else {})
    ).save_pretrained(folder / name)
    word_tokenizer().save_pretrained(folder / name)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (("good", "bad"), ("bad", "good"), {0: "bad", 1: "good"}),
        (("bad", "good"), ("good", "bad"), {0: "good", 1: "bad"}),
        (("bad", "good"), ("LABEL_0", "LABEL_1"), {0: "bad", 1: "good"}),
    ],
)
def test_members_with_heads_and_other_orders_of_labels_are_judged_on_the_same_rows(
    checkpoints, first, second, expected
):
    finished(checkpoints, "first", *first, num_hidden_layers=1)
    finished(checkpoints, "second", *second, num_hidden_layers=2)
    result = train_cascade(arguments(checkpoints, "first", "second"), data(checkpoints))
    cascade, tokenizer = load_cascade(result.path)
    assert cascade.config.id2label == expected
    with open(checkpoints / "held_out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for member, names, exit in zip(cascade.members, (first, [*expected.values()]), result.exits, strict=True):
        with torch.no_grad():
            said = [int(member(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
        right = [names[answer] == row["label"] for answer, row in zip(said, rows, strict=True)]
        assert exit.metric == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs"),
        ({"difficulty_margin": 2}, "difficulty_margin"),
        ({"difficulty_rule": "most"}, "all, majority"),
        ({"difficulty_weight": -1}, "difficulty_weight"),
        ({"difficulty_weight": math.nan}, "difficulty_weight"),
        ({"difficulty_folds": 1}, "`difficulty_folds` is 1. It must be at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(checkpoints, changes, said):
    with pytest.raises(ValueError, match=said):
        arguments(checkpoints, "small", "large", **changes)


def test_one_model_is_no_cascade(checkpoints):
    with pytest.raises(ValueError, match="2 or more"):
        arguments(checkpoints, "small")


def test_the_commands_train_calibrate_and_predict(checkpoints, caplog, capsys):
    folder = str(checkpoints / "cascade")
    files = ["--train_file", str(checkpoints / "train.csv"), "--validation_file", str(checkpoints / "held_out.csv")]
    flags = [word for name, value in FAST.items() for word in (f"--{name}", str(value))]
    models = ["--models", str(checkpoints / "small"), str(checkpoints / "large")]
    assert main(["cascade", "train", *models, *files, *flags, "--output_dir", folder]) == 0
    printed = capsys.readouterr().out
    assert "| member | layer | accuracy | DIS |" in printed and "are hard for the smallest" in printed
    trained = ["--validation_file", str(checkpoints / "train.csv")]
    assert main(["cascade", "calibrate", folder, *trained, "--max_disagreement", "50"]) == 0
    assert "of 80 calibration rows have texts that the model was trained on" in caplog.text
    held_out = ["--validation_file", str(checkpoints / "held_out.csv")]
    assert main(["cascade", "calibrate", folder, *held_out, "--max_megaflops", "0.05", "--no_fit_temperatures"]) == 0
    assert "Saved in" in capsys.readouterr().out
    reference = ["--reference", str(checkpoints / "whole"), "--max_disagreement", "100", "--no_fit_temperatures"]
    assert main(["cascade", "calibrate", folder, *held_out, *reference, "--output_dir", f"{folder}-again"]) == 0
    assert " of whole, " in capsys.readouterr().out
    goal = load_cascade(folder)[0].config.exit_config["calibration"]["goal"]
    assert goal == {"max_megaflops": 0.05}
    output = checkpoints / "answers.jsonl"
    assert (
        main(["cascade", "predict", folder, "--file", str(checkpoints / "held_out.csv"), "--output", str(output)]) == 0
    )
    assert "40 answers" in (said := capsys.readouterr().out) and "Mean exit model" in said
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(answers) == 40 and {"label", "score", "exit_model", "exit_layer"} == set(answers[0])
    table = checkpoints / "answers.csv"
    assert (
        main(["cascade", "predict", folder, "--file", str(checkpoints / "held_out.csv"), "--output", str(table)]) == 0
    )
    assert table.read_text().splitlines()[0].replace('"', "") == "label,score,exit_model,exit_layer"


def test_rows_to_calibrate_on_are_cut_for_all_members_to_what_the_shortest_takes(checkpoints, monkeypatch):
    members = [tiny_bert(num_hidden_layers=1, max_position_embeddings=8, num_labels=2), tiny_bert(num_labels=2)]
    folder = str(checkpoints / "both")
    save_cascade(*make_cascade(members, [word_tokenizer()] * 2), folder)

    def noted(_, datasets, *__, **___):
        assert [max(map(len, rows["input_ids"])) for rows in datasets] == [8, 8]
        raise ValueError("noted")

    monkeypatch.setattr("hf_costeff.commands.cascade.calibrate", noted)
    with pytest.raises(ValueError, match="noted"):
        CASCADE_CALIBRATE([folder, "--validation_file", str(checkpoints / "held_out.csv"), "--target_speedup", "2"])


def test_the_commands_say_what_is_missing(checkpoints, capsys):
    for words, said in (
        (["cascade", "calibrate", str(checkpoints / "whole"), "--target_speedup", "2"], "no cascade"),
        (
            ["cascade", "calibrate", "x", "--target_speedup", "2", "--max_megaflops", "1"],
            "Give exactly one of",
        ),
        (["cascade", "predict", str(checkpoints / "nowhere")], "cannot be loaded"),
        (
            ["cascade", "fly"],
            "unknown command 'cascade fly'. Give one of: cascade train, cascade calibrate, cascade predict",
        ),
        (["cascade"], "unknown command 'cascade'. Give one of: cascade train"),
    ):
        assert main(words) in (1, 2)
        assert said in capsys.readouterr().err


def test_commands_for_single_models_point_a_cascade_to_its_own(checkpoints, capsys):
    members = [tiny_bert(num_hidden_layers=1), tiny_bert()]
    save_cascade(*make_cascade(members, [word_tokenizer()] * 2), folder := str(checkpoints / "both"))
    rows = ["--train_file", str(checkpoints / "train.csv")]
    for words in (
        ["calibrate", folder, "--target_speedup", "2"],
        ["predict", folder, "--file", str(checkpoints / "train.csv")],
        ["export", folder, "--output_dir", str(checkpoints / "new")],
        ["skip", "--model", folder, *rows, "--output_dir", str(checkpoints / "new")],
        ["block-prune", "--model", folder, *rows, "--output_dir", str(checkpoints / "new")],
    ):
        assert main(words) == 1
        assert f"{folder} is a cascade, and a single model is needed" in capsys.readouterr().err
    assert main(["cascade", "train", "--models", folder, str(checkpoints / "large"), *rows]) == 1
    assert "A member is a cascade" in capsys.readouterr().err


def test_a_model_named_twice_is_refused(checkpoints):
    with pytest.raises(ValueError, match="one of them twice"):
        arguments(checkpoints, "small", "small")


def test_regression_has_no_difficulty_and_says_so_before_training(checkpoints):
    rows = sentence_rows(60).cast_column("label", cascade_training.datasets.Value("float32"))
    splits = cascade_training.datasets.DatasetDict({"train": rows, "validation": rows})
    with pytest.raises(ValueError, match="--difficulty_weight 0"):
        train_cascade(arguments(checkpoints, "small", "large"), DataArguments(), splits)
