"""Training: the total loss and its gradients against plain sums, what is logged, resuming, and the teacher's part."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars
from safetensors import safe_open
from torch.nn import functional
from transformers import DataCollatorWithPadding, EvalPrediction, HfArgumentParser, TrainerCallback, TrainingArguments

import hf_costeff
from helpers import tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff import CostEffTrainer, CostEffTrainingArguments
from hf_costeff.difficulty import mark_hard_rows
from hf_costeff.trainer import TeacherTrainer, newest_whole_checkpoint

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
COLLATOR = DataCollatorWithPadding(word_tokenizer())
PARTS = ("task_loss", "soft_label_loss", "representation_loss")
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "max_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    disable_progress_bars()


def training_arguments(folder: Path, **changes) -> CostEffTrainingArguments:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return CostEffTrainingArguments(output_dir=str(folder), **{**settings, **changes})


def make_trainer(folder: Path, model=None, teacher=None, rows=None, trainer_options=None, **changes) -> CostEffTrainer:
    return CostEffTrainer(
        model if model is not None else tiny_model(),
        training_arguments(folder, **changes),
        teacher=teacher,
        train_dataset=rows if rows is not None else token_rows(16),
        eval_dataset=token_rows(10, seed=1),
        data_collator=COLLATOR,
        **(trainer_options or {}),
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or {"rtol": 0, "atol": 0}))


def batch_of(rows) -> dict[str, torch.Tensor]:
    return dict(COLLATOR([rows[index] for index in range(len(rows))]))


def plain_loss(model, teacher, batch, weights: dict[str, float], class_weights=None, smoothing=0.0) -> torch.Tensor:
    """The joint objective written out: loops over exits, layers and rows."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = model(**inputs, output_hidden_states=True)
    total = torch.zeros(())
    for logits in ours.exit_logits:
        cost = functional.cross_entropy(logits, batch["labels"], weight=class_weights, label_smoothing=smoothing)
        total = total + weights["task_loss"] * cost
    if teacher is None:
        return total
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True)
    targets = theirs.exit_logits if "exit_logits" in theirs else [theirs.logits] * len(ours.exit_logits)
    for logits, target in zip(ours.exit_logits, targets, strict=True):
        cost = -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        total = total + weights["soft_label_loss"] * cost
    lengths = inputs["attention_mask"].sum(1)
    for mine, his in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for row, length in enumerate(lengths):
            distance = (mine[row, :length] - his[row, :length]).square().mean()
            total = total + weights["representation_loss"] * distance / len(lengths)
    return total


# --- the total loss


@pytest.mark.parametrize("kind", ["stock", "multi-exit"])
def test_the_total_loss_is_the_weighted_sum_of_all_parts_over_all_exits_and_layers(kind, tmp_path):
    model, teacher = tiny_model(), tiny_bert() if kind == "stock" else tiny_model(seed=7)
    factors = {"task_weight": 0.3, "soft_label_weight": 2.0, "representation_weight": 0.7}
    trainer = make_trainer(tmp_path, model, teacher, **factors)
    batch = batch_of(token_rows(6))
    expected = plain_loss(model, teacher, batch, dict(zip(PARTS, factors.values(), strict=True)))
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_teacher_the_loss_is_the_task_loss_of_every_exit(tmp_path):
    model = tiny_model()
    trainer, batch = make_trainer(tmp_path, model), batch_of(token_rows(6))
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    expected = plain_loss(model, None, batch, {"task_loss": 1.0})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(outputs.exit_logits) == 4 and outputs.hidden_states is None


def test_with_a_teacher_true_labels_count_only_if_asked_for(tmp_path):
    model, teacher, batch = tiny_model(), tiny_bert(), batch_of(token_rows(6))
    trainer = make_trainer(tmp_path, model, teacher)
    expected = plain_loss(model, teacher, batch, dict(zip(PARTS, (0.0, 1.0, 1.0), strict=True)))
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_and_label_smoothing_act_on_the_true_labels(tmp_path):
    model, batch = tiny_model(), batch_of(token_rows(8))
    for settings, plain in (
        ({"class_weights": [0.2, 3.0, 1.0]}, {"class_weights": torch.tensor([0.2, 3.0, 1.0])}),
        ({"label_smoothing_factor": 0.3}, {"smoothing": 0.3}),
    ):
        trainer = make_trainer(tmp_path, model, **settings)
        expected = plain_loss(model, None, batch, {"task_loss": 1.0}, **plain)
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_temperature_divides_both_sides_of_the_soft_labels(tmp_path):
    model, teacher, batch = tiny_model(), tiny_bert(), batch_of(token_rows(5))
    trainer = make_trainer(tmp_path, model, teacher, representation_weight=0.0, temperature=3.0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    target = (teacher(**inputs).logits / 3).softmax(-1)
    expected = sum(-(target * (logits / 3).log_softmax(-1)).sum(-1).mean() for logits in model(**inputs).exit_logits)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("problem_type", "num_labels"), [("regression", 1), ("multi_label_classification", 3)])
def test_regression_and_multi_label_train_and_name_their_metrics(problem_type, num_labels, tmp_path):
    def relabel(row):
        value = float(row["labels"])
        return {"targets": value if num_labels == 1 else [float(value > 0), float(value > 1), 1.0]}

    rows = token_rows(12).map(relabel, remove_columns="labels").rename_column("targets", "labels")
    model = tiny_model(num_labels=num_labels, problem_type=problem_type)
    trainer = CostEffTrainer(
        model,
        training_arguments(tmp_path, max_steps=2),
        teacher=tiny_bert(num_labels=num_labels),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=COLLATOR,
    )
    trainer.train()
    names = set(trainer.evaluate())
    metric = "spearman" if num_labels == 1 else "f1"
    assert {f"eval_{metric}", f"eval_mean_exit_{metric}", f"eval_exit_1_{metric}"} <= names


# --- gradients


def plain_sgd_step(rows, teacher, factors) -> dict[str, torch.Tensor]:
    """Weights after one step of gradient descent on all rows at once."""
    model = tiny_model(**NO_DROPOUT).train()
    plain_loss(model, teacher, batch_of(rows), factors).backward()
    stepped = weights(model)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            stepped[name] -= SGD["learning_rate"] * parameter.grad
    return stepped


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_accumulation_gives_the_gradients_of_the_whole_batch(batch_size, accumulation, tmp_path):
    rows, model, teacher = token_rows(8), tiny_model(**NO_DROPOUT), tiny_bert()
    trainer = make_trainer(
        tmp_path,
        model,
        teacher,
        rows,
        task_weight=0.5,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **SGD,
    )
    trainer.train()
    expected = plain_sgd_step(rows, teacher, {"task_loss": 0.5, "soft_label_loss": 1.0, "representation_loss": 1.0})
    assert_same_weights(weights(model), expected, rtol=1e-5, atol=1e-6)
    start = weights(tiny_model(**NO_DROPOUT))
    assert max((expected[name] - start[name]).abs().max() for name in start if start[name].numel()) > 1e-3


TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[3:]
import torch
from accelerate import PartialState, debug_launcher

def train(folder):
    import test_trainer
    from pathlib import Path
    torch.set_num_threads(1)
    trainer = getattr(test_trainer, sys.argv[2])(Path(folder), per_device_train_batch_size=4)
    assert trainer.args.world_size == 2 and trainer.args.per_device_train_batch_size == 4
    trainer.train()
    if trainer.args.process_index == 0:
        result = {"weights": test_trainer.weights(trainer.model), "log": trainer.state.log_history[0]}
        torch.save(result, f"{folder}/result.pt")

debug_launcher(train, (sys.argv[1],), num_processes=2)
"""


def one_distillation_step(folder: Path, **changes) -> CostEffTrainer:
    return make_trainer(
        folder, tiny_model(**NO_DROPOUT), tiny_bert(), token_rows(8), task_weight=0.5, **{**SGD, **changes}
    )


def one_teacher_step(folder: Path, **changes) -> TeacherTrainer:
    """A stock classifier on eight rows."""
    return TeacherTrainer(
        tiny_bert(problem_type="single_label_classification", hidden_dropout_prob=0, attention_probs_dropout_prob=0),
        TrainingArguments(
            **{**SGD, **changes},
            **{"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
            output_dir=str(folder),
        ),
        train_dataset=token_rows(8),
        data_collator=COLLATOR,
    )


def one_step_of_gates(folder: Path, **changes) -> CostEffTrainer:
    """Two of them, so that the second stands on what the first counted; projections of the contrasts learn too."""
    gated = tiny_model(skip_gates="linear", exit_pooling="mean", **NO_DROPOUT)
    parts = {"target_layers": 2.0, "contrastive_weight": 0.5, "hard_gate_ratio": 0.5}
    settings = {**SGD, **parts, "max_steps": 2, **changes}
    return make_trainer(folder, gated, rows=token_rows(16), **settings)


def in_two_processes(folder: Path, trainer: str) -> dict:
    """Weights and first log after training what the function of that name makes, half of each batch per process."""
    paths = [str(Path(__file__).parent), str(Path(hf_costeff.__file__).parents[1])]
    command = [sys.executable, "-c", TWO_PROCESSES, str(folder), trainer, *paths]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "result.pt")


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """Also with layers without heads or neurons: every parameter takes part, or DDP would complain."""
    found = in_two_processes(tmp_path, "one_distillation_step")
    rows, teacher = token_rows(8), tiny_bert()
    expected = plain_sgd_step(rows, teacher, {"task_loss": 0.5, "soft_label_loss": 1.0, "representation_loss": 1.0})
    assert_same_weights(found["weights"], expected, rtol=1e-5, atol=1e-6)
    alone = one_distillation_step(tmp_path / "one", per_device_train_batch_size=8)
    alone.train()
    for part in PARTS:
        assert found["log"][part] == pytest.approx(alone.state.log_history[0][part], abs=2e-4)


def test_gates_learn_the_same_in_two_processes_as_in_one(tmp_path):
    found = in_two_processes(tmp_path, "one_step_of_gates")
    alone = one_step_of_gates(tmp_path / "one", per_device_train_batch_size=8)
    before = weights(alone.model)
    alone.train()
    assert_same_weights(found["weights"], weights(alone.model), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(before[name], tensor) for name, tensor in found["weights"].items() if "gates" in name)
    for part in ("skip_loss", "contrastive_loss", "layers_run", "skip_weight"):
        assert found["log"][part] == pytest.approx(alone.state.log_history[0][part], abs=2e-4)


def plain_teacher_step() -> dict[str, torch.Tensor]:
    """A stock classifier's weights after one step of gradient descent on upstream's own loss."""
    model = one_teacher_step(Path("never")).model.train()
    model(**batch_of(token_rows(8))).loss.backward()
    return {
        name: tensor - SGD["learning_rate"] * model.get_parameter(name).grad
        if name in dict(model.named_parameters())
        else tensor
        for name, tensor in weights(model).items()
    }


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_a_teacher_is_fine_tuned_on_the_gradients_of_the_whole_batch(batch_size, accumulation, tmp_path):
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = one_teacher_step(tmp_path, **sizes)
    trainer.train()
    assert_same_weights(weights(trainer.model), plain_teacher_step(), rtol=1e-5, atol=1e-6)


def test_a_teachers_classes_are_weighed_as_asked(tmp_path):
    weighed = TeacherTrainer(
        one_teacher_step(tmp_path).model, TrainingArguments(tmp_path), class_weights=[0.5, 1.0, 4.0]
    )
    batch = batch_of(token_rows(8))
    logits = weighed.model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    expected = functional.cross_entropy(logits, batch["labels"], weight=torch.tensor([0.5, 1.0, 4.0]))
    torch.testing.assert_close(weighed.compute_loss(weighed.model, dict(batch)), expected)
    assert abs(expected - functional.cross_entropy(logits, batch["labels"])) > 1e-3


def test_a_teacher_is_fine_tuned_on_the_same_gradients_by_two_processes(tmp_path):
    found = in_two_processes(tmp_path, "one_teacher_step")
    assert_same_weights(found["weights"], plain_teacher_step(), rtol=1e-5, atol=1e-6)


# --- logs and metrics


class Watch(TrainerCallback):
    """Calls a function at the end of every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step, kwargs["model"])


def test_every_loss_part_is_logged_by_name_as_its_mean_since_the_last_log(tmp_path):
    teacher, rows = tiny_bert(), token_rows(8)
    trainers = [
        make_trainer(tmp_path, tiny_model(**NO_DROPOUT), teacher, rows, task_weight=0.5, logging_steps=every, seed=3)
        for every in (1, 2)
    ]
    logs = []
    for trainer in trainers:
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert [len(log) for log in logs] == [4, 2]
    for entry in logs[0]:
        total = 0.5 * entry["task_loss"] + entry["soft_label_loss"] + entry["representation_loss"]
        assert entry["loss"] == pytest.approx(total, abs=5e-4)
    for index, entry in enumerate(logs[1]):
        for part in PARTS:
            pair = [step[part] for step in logs[0][2 * index : 2 * index + 2]]
            assert entry[part] == pytest.approx(sum(pair) / 2, abs=2e-4)


def test_evaluating_does_not_touch_the_logged_training_parts(tmp_path):
    silent, evaluating = (
        make_trainer(tmp_path, tiny_model(**NO_DROPOUT), tiny_bert(), logging_steps=4, **settings)
        for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1})
    )
    silent.train()
    evaluating.train()
    entries = [[entry for entry in t.state.log_history if "loss" in entry] for t in (silent, evaluating)]
    assert [entry["soft_label_loss"] for entry in entries[0]] == [entry["soft_label_loss"] for entry in entries[1]]


def test_every_exit_is_measured_by_name_with_the_mean_over_exits(tmp_path):
    model = tiny_model(exit_layers=[2, 3, 4])
    rows = token_rows(10, seed=1)
    trainer = make_trainer(tmp_path, model, tiny_bert())
    metrics = trainer.evaluate()
    batch = batch_of(rows)
    with torch.no_grad():
        exits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).exit_logits
    by_exit = [(logits.argmax(-1) == batch["labels"]).float().mean().item() for logits in exits]
    for layer, expected in zip((2, 3, 4), by_exit, strict=True):
        assert metrics[f"eval_exit_{layer}_accuracy"] == pytest.approx(expected)
    assert metrics["eval_accuracy"] == pytest.approx(by_exit[-1])
    assert metrics["eval_mean_exit_accuracy"] == pytest.approx(sum(by_exit) / 3)
    assert "eval_exit_1_accuracy" not in metrics and math.isfinite(metrics["eval_loss"])


def test_a_metric_of_the_users_own_is_computed_once_per_exit(tmp_path):
    shapes = []

    def metric(evaluation: EvalPrediction) -> dict[str, float]:
        shapes.append((evaluation.predictions.shape, evaluation.label_ids.shape))
        return {"mine": float(len(shapes))}

    metrics = make_trainer(tmp_path, trainer_options={"compute_metrics": metric}).evaluate()
    assert shapes == [((10, 3), (10,))] * 4
    assert [metrics[f"eval_exit_{layer}_mine"] for layer in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert metrics["eval_mean_exit_mine"] == 2.5 and metrics["eval_mine"] == 4


def test_predictions_are_the_last_exits(tmp_path):
    model = tiny_model()
    output = make_trainer(tmp_path, model, tiny_bert()).predict(token_rows(10, seed=1))
    batch = batch_of(token_rows(10, seed=1))
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.tensor(output.predictions), logits, rtol=1e-5, atol=1e-5)
    assert output.label_ids.shape == (10,)


def test_the_first_share_of_the_steps_trains_on_representations_alone(tmp_path):
    """Exit heads get no gradient from hidden states, so they stand still until the phase is over."""
    model, heads = tiny_model(**NO_DROPOUT), []
    before = model.costeff.exits["4"].classifier.weight.detach().clone()
    trainer = make_trainer(
        tmp_path,
        model,
        tiny_bert(),
        representation_only_ratio=0.5,
        trainer_options={
            "callbacks": [
                Watch(lambda step, now: heads.append(now.costeff.exits["4"].classifier.weight.detach().clone()))
            ]
        },
        **{**SGD, "max_steps": 4},
    )
    trainer.train()
    moved = [not torch.equal(head, before) for head in heads]
    assert moved == [False, False, True, True]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs[:2]:
        assert entry["loss"] == pytest.approx(entry["representation_loss"], abs=5e-4)
    for entry in logs[2:]:
        assert entry["loss"] == pytest.approx(entry["representation_loss"] + entry["soft_label_loss"], abs=5e-4)


@pytest.mark.parametrize(("ratio", "moves"), [(0.0, True), (1.0, False)])
def test_the_phase_may_be_empty_or_everything(ratio, moves, tmp_path):
    model = tiny_model(**NO_DROPOUT)
    before = model.costeff.exits["1"].classifier.weight.detach().clone()
    make_trainer(tmp_path, model, tiny_bert(), representation_only_ratio=ratio, **{**SGD, "max_steps": 2}).train()
    assert torch.equal(model.costeff.exits["1"].classifier.weight, before) is not moves


# --- resuming


RESUMED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "logging_steps": 3, "lr_scheduler_type": "linear"}


class Interrupted(Exception):
    """A run that is stopped in the middle."""


def run_until(folder: Path, step: int) -> None:
    def stop(now, model):
        if now == step:
            raise Interrupted

    trainer = make_trainer(folder, tiny_model(), tiny_bert(), trainer_options={"callbacks": [Watch(stop)]}, **RESUMED)
    with pytest.raises(Interrupted):
        trainer.train()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights after eight steps with dropout, in one go."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), tiny_model(), tiny_bert(), **RESUMED)
    trainer.train()
    return weights(trainer.model)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run stopped after its seventh step: checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("interrupted")
    run_until(folder, 7)
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "none": lambda folder: None,
    "truncated weights": lambda folder: truncate(folder / "model.safetensors"),
    "one changed byte": lambda folder: (folder / "optimizer.pt").write_bytes(
        bytes([1, *(folder / "optimizer.pt").read_bytes()[1:]])
    ),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no checksums: killed while writing": lambda folder: (folder / "checksums.json").unlink(),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    damage, uninterrupted, interrupted, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    DAMAGES[damage](folder / "checkpoint-6")
    newest = newest_whole_checkpoint(folder)
    assert newest == str(folder / ("checkpoint-6" if damage == "none" else "checkpoint-4"))
    steps: list[int] = []
    trainer = make_trainer(
        folder,
        tiny_model(seed=5),  # its own weights do not matter
        tiny_bert(),
        trainer_options={"callbacks": [Watch(lambda step, model: steps.append(step))]},
        **RESUMED,
    )
    said: list[str] = []
    monkeypatch.setattr("hf_costeff.trainer.logger.warning", said.append)
    trainer.train(resume_from_checkpoint=True)
    assert said[-1] == f"Going on from {newest}."
    assert steps == ([7, 8] if damage == "none" else [5, 6, 7, 8])
    assert_same_weights(weights(trainer.model), uninterrupted)


def test_with_every_checkpoint_damaged_a_run_starts_afresh(uninterrupted, interrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        truncate(checkpoint / "model.safetensors")
    assert newest_whole_checkpoint(folder) is None
    trainer = make_trainer(folder, tiny_model(), tiny_bert(), **RESUMED)
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(weights(trainer.model), uninterrupted)


WITH_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "earliness",
}


def earliest_is_best() -> dict:
    """A metric that falls with every evaluation, so that the first checkpoint is the best."""
    seen = itertools.count()
    return {"compute_metrics": lambda evaluation: {"earliness": -next(seen)}}


def test_a_run_whose_best_checkpoint_is_damaged_starts_afresh_and_ends_the_same(tmp_path):
    def trainer():
        return make_trainer(
            tmp_path, tiny_model(), tiny_bert(), trainer_options=earliest_is_best(), **RESUMED, **WITH_BEST
        )

    first = trainer()
    first.train()
    best = weights(first.model)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    truncate(tmp_path / "checkpoint-2" / "model.safetensors")
    assert newest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")  # good enough where no best is loaded
    assert newest_whole_checkpoint(tmp_path, with_best=True) is None
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert_same_weights(weights(again.model), best)


def test_a_best_checkpoint_that_is_damaged_while_training_is_a_clear_error(tmp_path):
    def damage(step, model):
        if step == 7:
            truncate(tmp_path / "checkpoint-2" / "model.safetensors")

    options = {**earliest_is_best(), "callbacks": [Watch(damage)]}
    trainer = make_trainer(tmp_path, tiny_model(), tiny_bert(), trainer_options=options, **RESUMED, **WITH_BEST)
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged\. Train again with resume_from_checkpoint=True"):
        trainer.train()


def test_the_newest_checkpoint_is_told_by_number_and_other_folders_do_not_count(interrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-10")
    (folder / "checkpoint-best").mkdir()
    assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-10")
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None


# --- the teacher


def test_the_teacher_is_frozen_in_eval_mode_unchanged_and_in_no_checkpoint(tmp_path):
    model, teacher = tiny_model(), tiny_bert().train()
    before = weights(teacher)
    trainer = make_trainer(tmp_path, model, teacher, save_strategy="steps", save_steps=2)
    modes = []
    teacher.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.train()
    assert modes and not any(modes)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_same_weights(weights(teacher), before)
    checkpoint = tmp_path / "checkpoint-4"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert sorted(path.name for path in checkpoint.glob("*.safetensors")) == ["model.safetensors"]
    optimized = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert len(optimized) == len(list(model.parameters()))
    assert "teacher" not in json.loads((checkpoint / "config.json").read_text())


def test_unlabelled_rows_train_on_soft_labels_and_representations(tmp_path):
    rows = token_rows(8)
    unlabelled = make_trainer(
        tmp_path, tiny_model(**NO_DROPOUT), tiny_bert(), rows.remove_columns("labels"), max_steps=2
    )
    labelled = make_trainer(tmp_path, tiny_model(**NO_DROPOUT), tiny_bert(), rows, max_steps=2)
    for trainer in (unlabelled, labelled):
        trainer.train()
    assert_same_weights(weights(unlabelled.model), weights(labelled.model))
    logged = next(entry for entry in unlabelled.state.log_history if "loss" in entry)
    assert {"soft_label_loss", "representation_loss"} <= set(logged) and "task_loss" not in logged


def test_neither_labels_nor_teacher_is_a_clear_error(tmp_path):
    trainer = make_trainer(tmp_path, rows=token_rows(8).remove_columns("labels"))
    with pytest.raises(ValueError, match="Nothing to learn from: the rows have no `labels` and there is no teacher"):
        trainer.train()


def test_a_teacher_of_other_labels_or_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match="The teacher has 2 labels and the model 3"):
        make_trainer(tmp_path, tiny_model(), tiny_bert(num_labels=2))
    wide = {"hidden_size": 24, "num_attention_heads": 3}
    with pytest.raises(ValueError, match=r"hidden size is 24 and the student's is 12.*representation_weight=0"):
        make_trainer(tmp_path, tiny_model(), tiny_bert(**wide))
    trainer = make_trainer(tmp_path, tiny_model(), tiny_bert(**wide), representation_weight=0, max_steps=1)
    trainer.train()
    assert "representation_loss" not in trainer.state.log_history[0]


def test_a_teacher_with_the_same_labels_in_another_order_is_refused(tmp_path):
    names = ["bad", "fair", "good"]
    teacher = tiny_bert(id2label=dict(enumerate(reversed(names))))
    with pytest.raises(ValueError, match=r"'good', 'fair', 'bad'.*'bad', 'fair', 'good'.*same `id2label`"):
        make_trainer(tmp_path, tiny_model(id2label=dict(enumerate(names))), teacher)
    make_trainer(tmp_path, tiny_model(id2label=dict(enumerate(reversed(names)))), teacher)
    make_trainer(tmp_path, tiny_model(), teacher)  # LABEL_0, ... are no names


def test_the_last_exit_of_a_multi_exit_teacher_teaches_every_exit_if_asked_for(tmp_path):
    student, teacher = tiny_model(**NO_DROPOUT), tiny_model(seed=3)
    trainer = make_trainer(tmp_path, student, teacher, soft_label_exit="last", representation_weight=0, **SGD)
    rows = token_rows(4)
    batch = batch_of(rows)
    with torch.no_grad():
        wanted = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
        given = student(batch["input_ids"], attention_mask=batch["attention_mask"]).exit_logits
    expected = -sum((wanted * logits.log_softmax(-1)).sum(-1).mean() for logits in given)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def rows_run(teacher) -> list[int]:
    """How many rows the teacher ran on in each of its calls from here on."""
    found: list[int] = []
    teacher.register_forward_hook(lambda module, _, outputs: found.append(len(outputs.logits)))
    return found


def test_a_training_by_answers_alone_runs_the_teacher_on_every_row_once(tmp_path):
    rows, teacher, student = token_rows(16), tiny_bert(), tiny_model(**NO_DROPOUT)
    found = rows_run(teacher)
    trainer = make_trainer(tmp_path, student, teacher, rows, representation_weight=0.0, max_steps=12)
    trainer.train()
    assert trainer.state.epoch == 3
    assert sum(found) == len({tuple(row["input_ids"]) for row in rows}) == 16
    before = len(found)
    trainer.evaluate()
    trainer.evaluate()
    assert sum(found[before:]) == 10


@pytest.mark.parametrize("changes", [{"representation_weight": 1.0}, {"token_replacement_rate": 0.5}])
def test_states_and_rows_that_change_are_not_remembered(changes, tmp_path):
    teacher = tiny_bert()
    found = rows_run(teacher)
    settings = {"representation_weight": 0.0, "max_steps": 12, **changes}
    tokenizer = {"processing_class": word_tokenizer()}
    trainer = make_trainer(tmp_path, None, teacher, trainer_options=tokenizer, **settings)
    trainer.train()
    assert sum(found) == 48


def test_bf16_training_stays_close_to_single_precision(tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, tiny_model(**NO_DROPOUT), tiny_bert(), task_weight=1.0, bf16=bf16, **SGD)
        trainer.train()
        losses.append(trainer.state.log_history[0])
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    for part in PARTS:
        assert losses[1][part] == pytest.approx(losses[0][part], rel=0.05)


# --- arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_weight": -1.0}, "`task_weight` is -1.0"),
        ({"soft_label_weight": math.nan}, "`soft_label_weight` is nan"),
        ({"representation_weight": -0.1}, "`representation_weight` is -0.1"),
        ({"representation_only_ratio": 1.5}, r"`representation_only_ratio` is 1.5. It must lie in 0\.\.1"),
        ({"soft_label_exit": "first"}, r"`soft_label_exit` is 'first'. It must be one of same, last"),
        ({"token_replacement_rate": -0.1}, r"`token_replacement_rate` is -0.1. It must lie in 0\.\.1"),
        ({"temperature": 0.0}, "`temperature` is 0.0. It must be above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **settings)


def test_class_weights_need_one_entry_per_label(tmp_path):
    with pytest.raises(ValueError, match=r"`class_weights` has 2 entries for 3 labels\. Give one each"):
        make_trainer(tmp_path, class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"`class_weights` has 2 entries for 3 labels\. Give one each"):
        TeacherTrainer(one_teacher_step(tmp_path).model, TrainingArguments(tmp_path), class_weights=[1.0, 2.0])


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"num_labels": 1}, {"class_weights": [2.0]}, r"`class_weights` is \[2\.0\], and regression has no classes"),
        ({"num_labels": 1}, {"label_smoothing_factor": 0.1}, r"factor` is 0\.1.* this is regression\. Set it to 0"),
        (
            {"problem_type": "multi_label_classification"},
            {"label_smoothing_factor": 0.1},
            "this is multi_label_classification",
        ),
    ],
)
def test_settings_of_classes_are_refused_where_the_loss_would_ignore_them(model, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=tiny_model(**model), **settings)
    teacher = tiny_bert(**{"problem_type": "regression", **model})
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=settings.get("label_smoothing_factor", 0.0))
    with pytest.raises(ValueError, match=message):
        TeacherTrainer(teacher, arguments, class_weights=settings.get("class_weights"))


def test_a_push_takes_what_the_arguments_say_unless_the_call_says_otherwise(tmp_path, monkeypatch):
    asked, said = {}, {"hub_model_id": "org/own", "hub_token": "hf_own", "hub_revision": "v2", "hub_private_repo": True}
    monkeypatch.setattr("hf_costeff.trainer.push_folder", lambda folder, repo_id, **given: asked.update(given))
    trainer = make_trainer(tmp_path, **said)
    trainer.push_to_hub()
    options = {"commit_message": "End of training", "private": True, "token": "hf_own", "revision": "v2"}
    assert {name: asked[name] for name in options} == options
    assert asked["tags"] is None and "# org/own" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("By hand.")
    given = {"commit_message": "Hello", "private": False, "token": "hf_other", "revision": "v3"}
    trainer.push_to_hub(**given, tags="film")
    assert {name: asked[name] for name in given} == given
    assert asked["tags"] == ["film"] and (tmp_path / "README.md").read_text() == "By hand."


def test_the_card_of_a_trainer_with_a_budget_tells_the_budget_and_not_the_weight_it_began_with(tmp_path):
    model = tiny_model(skip_gates="linear")
    fixed = make_trainer(tmp_path / "fixed", model=model, skip_weight=0.125)._card("org/fixed", {})
    assert "skip_loss x 0.125" in str(fixed) and "adapted" not in str(fixed)
    adapted = make_trainer(tmp_path / "budget", model=model, skip_weight=0.125, target_layers=2.5)._card("org/b", {})
    assert "skip_loss" not in str(adapted) and "adapted to 2.5 layers per row" in str(adapted)


def test_the_arguments_are_command_line_flags(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--task_weight", "0.5", "--class_weights", "1", "2", "--temperature", "2"]
    (arguments,) = HfArgumentParser(CostEffTrainingArguments).parse_args_into_dataclasses(flags)
    assert (arguments.task_weight, arguments.class_weights, arguments.temperature) == (0.5, [1.0, 2.0], 2.0)


def test_with_replaced_tokens_student_and_teacher_see_the_same_new_text_in_training_and_the_old_one_in_evaluation(
    tmp_path,
):
    teacher, tokenizer = tiny_bert(), word_tokenizer()
    trainer = make_trainer(
        tmp_path,
        tiny_model(**NO_DROPOUT),
        teacher,
        trainer_options={"processing_class": tokenizer},
        token_replacement_rate=0.5,
    )
    seen = {"teacher": [], "student": []}
    for name, model in (("teacher", teacher), ("student", trainer.model)):
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs, name=name: seen[name].append(kwargs["input_ids"].clone()), with_kwargs=True
        )
    batch = batch_of(token_rows(8))
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    trainer.model.eval()
    trainer.compute_loss(trainer.model, dict(batch))
    for taught, learnt in zip(seen["teacher"], seen["student"], strict=True):
        assert torch.equal(taught, learnt)
    training, evaluation = seen["student"]
    assert not torch.equal(training, batch["input_ids"])
    assert torch.equal(evaluation, batch["input_ids"])
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
    assert torch.equal(training[special], batch["input_ids"][special])


@pytest.mark.parametrize(
    ("with_teacher", "with_tokenizer", "changes", "message"),
    [
        (False, True, {}, "has no true label"),
        (True, True, {"task_weight": 0.5}, "has no true label"),
        (True, False, {}, "needs to know the special tokens"),
    ],
)
def test_replaced_tokens_need_a_teacher_alone_and_the_tokenizer(
    with_teacher, with_tokenizer, changes, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path,
            teacher=tiny_bert() if with_teacher else None,
            trainer_options={"processing_class": word_tokenizer()} if with_tokenizer else None,
            token_replacement_rate=0.1,
            **changes,
        )


# --- difficulty


def marked(rows=None):
    return mark_hard_rows(rows or token_rows(16), [number % 4 == 0 for number in range(16)])


def test_difficulty_is_one_more_part_of_the_loss_at_every_exit_with_its_gradient(tmp_path):
    """One full batch with one hard row, so that the pairs are known; against the hinge written out."""
    rows = mark_hard_rows(token_rows(4), [False, True, False, False])
    model = tiny_model(**NO_DROPOUT, gradient_equilibrium=False)
    twin = copy.deepcopy(model)
    weights = {"difficulty_weight": 0.3, "difficulty_margin": 0.4}
    trainer = make_trainer(tmp_path, model=model, rows=rows, **SGD, **weights)
    trainer.train()
    batch = COLLATOR([{name: value for name, value in row.items() if name != "hard"} for row in rows])
    labels = batch.pop("labels")
    total = torch.zeros(())
    for logits in twin(**batch).exit_logits:
        sure = logits.softmax(-1).amax(-1)
        hinge = sum(torch.relu(0.4 - (sure[i] - sure[1])) for i in (0, 2, 3)) / 3
        total = total + functional.cross_entropy(logits, labels) + 0.3 * hinge
    total.backward()
    for (name, after), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.05 * before.grad, rtol=1e-4, atol=1e-6, msg=name)
    logged = next(entry for entry in trainer.state.log_history if "difficulty_loss" in entry)
    assert logged["loss"] == pytest.approx(logged["task_loss"] + 0.3 * logged["difficulty_loss"], abs=2e-4)


def test_difficulty_needs_marks_and_without_its_weight_marks_change_nothing(tmp_path):
    with pytest.raises(ValueError, match="needs a column 'hard'"):
        make_trainer(tmp_path, difficulty_weight=0.5)
    with pytest.raises(ValueError, match="regression"):
        make_trainer(tmp_path, model=tiny_model(num_labels=1), rows=marked(), difficulty_weight=0.5)
    states = []
    for rows in (token_rows(16), marked()):
        trainer = make_trainer(tmp_path, rows=rows)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize(("name", "value"), [("difficulty_weight", -1), ("difficulty_margin", 1.5)])
def test_difficulty_settings_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        training_arguments(tmp_path, **{name: value})
