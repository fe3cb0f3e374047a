"""Training of gates: what learns and what does not, the contrasts, the budget, resuming, and equal gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import disable_progress_bars
from torch.nn import functional
from transformers import DataCollatorWithPadding, TrainerCallback

from helpers import tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff import CostEffTrainer, CostEffTrainingArguments
from hf_costeff.losses import cross_layer_contrastive_loss

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
COLLATOR = DataCollatorWithPadding(word_tokenizer())
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "max_steps": 1}
ADAM = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 6, "save_steps": 2, "save_strategy": "steps"}
GATED = {"skip_gates": "linear", "exit_pooling": "mean"}
ATTENTION = {"skip_gates": "attention", "gate_size": 4, "exit_head": "attention", "exit_head_size": 8}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    disable_progress_bars()


def make_trainer(folder, model, teacher=None, rows=None, callbacks=None, **settings) -> CostEffTrainer:
    common = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return CostEffTrainer(
        model,
        CostEffTrainingArguments(output_dir=str(folder), **{**common, **quiet, **settings}),
        teacher=teacher,
        train_dataset=token_rows(16) if rows is None else rows,
        eval_dataset=token_rows(10, seed=1),
        data_collator=COLLATOR,
        callbacks=callbacks,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def batch_of(rows) -> dict[str, torch.Tensor]:
    return dict(COLLATOR([rows[index] for index in range(len(rows))]))


# --- which parts learn


def is_exit_before_the_last(name: str) -> bool:
    return any(f"exits.{layer}." in name for layer in (1, 2, 3))


@pytest.mark.parametrize("sizes", [{}, GATED, ATTENTION], ids=["no gates", "linear", "attention"])
@pytest.mark.parametrize("parts", ["backbone", "exits"])
def test_parts_that_do_not_learn_stay_bit_for_bit_in_spite_of_weight_decay(parts, sizes, tmp_path):
    model = tiny_model(**sizes)
    before = weights(model)
    trainer = make_trainer(tmp_path, model, trained_parts=parts, **ADAM)
    trainer.train()
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    learning = {
        name
        for name, tensor in before.items()
        if tensor.numel() and is_exit_before_the_last(name) == (parts == "exits")
    }
    assert moved <= learning
    matrices = {name for name in learning if before[name].dim() > 1 and "position" not in name}
    assert matrices <= moved
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) < len(list(model.parameters()))


@pytest.mark.parametrize(("parts", "asked"), [("all", [0, 1, 2, 3]), ("backbone", [3]), ("exits", [0, 1, 2])])
def test_the_task_loss_is_that_of_the_exits_that_learn(parts, asked, tmp_path):
    model, batch = tiny_model(**NO_DROPOUT), batch_of(token_rows(6))
    trainer = make_trainer(tmp_path, model, trained_parts=parts)
    logits = model(batch["input_ids"], batch["attention_mask"]).exit_logits
    expected = sum(functional.cross_entropy(logits[index], batch["labels"]) for index in asked)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    teacher = tiny_bert()
    imitating = make_trainer(tmp_path, model, teacher, trained_parts=parts, representation_weight=0)
    with torch.no_grad():
        target = teacher(batch["input_ids"], batch["attention_mask"]).logits.softmax(-1)
    expected = sum(functional.cross_entropy(logits[index], target) for index in asked)
    torch.testing.assert_close(imitating.compute_loss(model, dict(batch)), expected)


def test_what_is_frozen_runs_without_dropout(tmp_path):
    """With dropout in the encoder and none in the exits, training the exits is deterministic."""
    model, batch = tiny_model(hidden_dropout_prob=0.5, classifier_dropout=0.0), batch_of(token_rows(6))
    trainer = make_trainer(tmp_path, model, trained_parts="exits")
    quiet = trainer.compute_loss(model.eval(), dict(batch))
    model.train()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), quiet)
    whole = make_trainer(tmp_path, model.train(), trained_parts="all")
    losses = {whole.compute_loss(model, dict(batch)).item() for _ in range(3)}
    assert len(losses) == 3


def test_the_backbone_gets_the_gradient_of_the_last_exit_without_equilibrium(tmp_path):
    rows, model = token_rows(8), tiny_model(**NO_DROPOUT)
    twin, batch = copy.deepcopy(model), batch_of(rows)
    make_trainer(
        tmp_path, model, rows=rows, trained_parts="backbone", **{**SGD, "per_device_train_batch_size": 8}
    ).train()
    logits = twin(batch["input_ids"], batch["attention_mask"], gradient_equilibrium=False).logits
    functional.cross_entropy(logits, batch["labels"]).backward()
    for (name, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        step = 0 if wanted.grad is None else 0.05 * wanted.grad
        torch.testing.assert_close(found, wanted - step, rtol=1e-5, atol=1e-6, msg=name)


# --- contrasts


def contrast(trainer, states, mask, heads, temperature):
    projected = [head(state) for head, state in zip(heads, states, strict=True)]
    return cross_layer_contrastive_loss(projected, mask, temperature)


def test_the_contrast_of_layers_compares_what_each_layer_takes(tmp_path):
    model, batch = tiny_model(**NO_DROPOUT).train(), batch_of(token_rows(6))
    trainer = make_trainer(tmp_path, model, contrastive_weight=0.3, contrastive_temperature=0.7)
    outputs = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    expected = contrast(trainer, outputs.hidden_states[:-1], batch["attention_mask"], trainer.contrast.layers, 0.7)
    task = sum(functional.cross_entropy(logits, batch["labels"]) for logits in outputs.exit_logits)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), task + 0.3 * expected)
    torch.testing.assert_close(trainer.compute_loss(model.eval(), dict(batch)), task)  # nothing to learn from it there


def test_projections_learn_are_averaged_over_accumulation_and_stay_out_of_the_model(tmp_path):
    found = {}
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = tiny_model(**NO_DROPOUT)
        names = set(model.state_dict())
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path, model, rows=token_rows(8), contrastive_weight=0.5, **{**SGD, **steps})
        start = weights(trainer.contrast.heads)
        trainer.train()
        end = weights(trainer.contrast.heads)
        assert all(each.grad is None for each in trainer.contrast.heads.parameters())  # nothing is carried over
        assert all(not torch.equal(start[name], end[name]) for name in start if "weight" in name)
        trainer.save_model(str(tmp_path / "saved"))
        assert set(model.state_dict()) == names and not list((tmp_path / "saved").glob("contrastive*"))
        found[size] = {**weights(model), **end}
    for size in (4, 2):
        for name, tensor in found[8].items():
            torch.testing.assert_close(found[size][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


class Stop(TrainerCallback):
    """Ends training after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


RESUMED = {
    "contrast": ({}, {"contrastive_weight": 0.5}),
    "budget": (GATED, {"target_layers": 2.5, "trained_parts": "backbone", "hard_gate_ratio": 0.5}),
    "exits": (ATTENTION, {"exit_contrastive_weight": 0.5, "trained_parts": "exits"}),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind, tmp_path):
    sizes, settings = RESUMED[kind]
    whole = make_trainer(tmp_path / "whole", tiny_model(**sizes), **ADAM, **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", tiny_model(**sizes), callbacks=[Stop(5)], **ADAM, **settings).train()
    resumed = make_trainer(tmp_path / "cut", tiny_model(seed=3, **sizes), **ADAM, **settings, seed=42)
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in ((resumed.model, whole.model), (resumed.contrast.heads, whole.contrast.heads)):
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert resumed.incentive.weight == whole.incentive.weight and resumed.incentive.around == whole.incentive.around


def test_a_checkpoint_of_a_run_without_the_contrast_is_refused(tmp_path):
    make_trainer(tmp_path, tiny_model(), **ADAM).train()
    with pytest.raises(ValueError, match="written without contrast"):
        make_trainer(tmp_path, tiny_model(), **ADAM, contrastive_weight=0.5).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="written without gates"):
        make_trainer(tmp_path, tiny_model(**GATED), **ADAM).train(resume_from_checkpoint=True)


def test_the_contrast_of_exits_compares_the_token_states_inside_the_heads_that_learn(tmp_path):
    model, batch = tiny_model(**ATTENTION, **NO_DROPOUT).train(), batch_of(token_rows(6))
    trainer = make_trainer(tmp_path, model, trained_parts="exits", exit_contrastive_weight=0.3)
    mask = batch["attention_mask"]
    outputs = model(batch["input_ids"], mask, hard_gates=True, output_exit_states=True)
    assert len(trainer.contrast.exits) == 3
    expected = contrast(trainer, outputs.exit_states[:3], mask, trainer.contrast.exits, 0.55) / 2
    task = sum(functional.cross_entropy(logits, batch["labels"]) for logits in outputs.exit_logits[:3])
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), task + 0.3 * expected)


# --- gates


def hard_steps(folder, model, **settings) -> list[bool]:
    """Whether weights were hard, step by step."""
    seen: list[bool] = []

    def note(module, args, kwargs):
        if module.training:
            seen.append(kwargs.get("hard_gates"))

    trainer = make_trainer(folder, model, **settings)
    handle = trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [False] * 3 + [True] * 2),
        ({"hard_gate_ratio": 0.0}, [False] * 5),
        ({"hard_gate_ratio": 1.0}, [True] * 5),
        ({"trained_parts": "exits", "hard_gate_ratio": 0.0}, [True] * 5),
    ],
    ids=str,
)
def test_weights_are_soft_then_hard(settings, expected, tmp_path):
    assert hard_steps(tmp_path, tiny_model(**GATED), max_steps=5, **settings) == expected


def test_a_model_without_gates_is_asked_for_none(tmp_path):
    assert hard_steps(tmp_path, tiny_model(), max_steps=2) == [None, None]


def test_the_incentive_is_added_by_its_weight_at_the_slope_of_fresh_gates(tmp_path):
    model, batch = tiny_model(**GATED, **NO_DROPOUT).train(), batch_of(token_rows(6))
    trainer = make_trainer(tmp_path, model, skip_weight=0.7, hard_gate_ratio=0.0)
    trainer.state.max_steps = 1
    outputs = model(batch["input_ids"], batch["attention_mask"], hard_gates=False)
    task = sum(functional.cross_entropy(logits, batch["labels"]) for logits in outputs.exit_logits)
    total = sum(layer.mean() for layer in outputs.skip_probabilities)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), task + 0.7 * (2 * 2 - total) / 2**2)
    torch.testing.assert_close(
        trainer.compute_loss(model.eval(), dict(batch)),
        sum(functional.cross_entropy(logits, batch["labels"]) for logits in model(**batch).exit_logits),
    )


@pytest.mark.parametrize("settings", [{}, {"target_layers": 3.0}], ids=["fixed", "budget"])
def test_gates_learn_alike_however_a_batch_is_split(settings, tmp_path):
    """Two steps, so that the second stands on what the first has counted."""
    found = {}
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        model = tiny_model(**GATED, **NO_DROPOUT)
        start = weights(model)
        trainer = make_trainer(
            tmp_path, model, rows=token_rows(8), skip_weight=0.5, **settings, **{**SGD, **steps}, hard_gate_ratio=0.5
        )
        trainer.train()
        found[size] = weights(model)
        assert any(not torch.equal(start[name], found[size][name]) for name in start if "gates" in name)
    for size in (4, 2):
        for name, tensor in found[8].items():
            torch.testing.assert_close(found[size][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


SIZES = [4 * 12 * 8 + 2 * 12 * 10, 2 * 12 * 7, 4 * 12 * 4, 4 * 12 * 12 + 2 * 12 * 16]
COSTS = [matrices + 2 * 128 * width for matrices, width in zip(SIZES, (8, 0, 4, 12), strict=True)]
"""Multiplications per token of the tiny model's layers: matrices, and attention over 128 tokens."""


def decided(model, rows, costs=(1, 1, 1, 1)) -> float:
    """Layers that a row runs on average in evaluation, in units of the mean cost."""
    run = [float((layer < 0.5).float().mean()) for layer in model(**batch_of(rows)).skip_probabilities]
    return sum(share * cost for share, cost in zip(run, costs, strict=True)) / (sum(costs) / 4)


@pytest.mark.parametrize("target", [1.5, 2.5, 3.5])
def test_a_budget_in_flops_is_reached_from_both_sides(target, tmp_path):
    for bias in (-1.0, 1.0):
        model, rows = tiny_model(**GATED), token_rows(64)
        for gate in model.costeff.gates:
            torch.nn.init.constant_(gate.decision.bias, bias)
        settings = {"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
        trainer = make_trainer(tmp_path, model, rows=rows, target_layers=target, trained_parts="backbone", **settings)
        trainer.train()
        assert decided(model.eval(), rows, COSTS) == pytest.approx(target, abs=0.3)
        logged = [entry["layers_run_by_flops"] for entry in trainer.state.log_history if "layers_run" in entry]
        assert sum(logged[-10:]) / 10 == pytest.approx(target, abs=0.3)
        assert {"skip_loss", "skip_weight"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("target", [1.0, 2.5, 3.5])
def test_a_budget_of_equal_layers_is_a_number_of_layers(target, tmp_path):
    for bias in (-1.0, 1.0):
        model, rows = tiny_model(**GATED, num_attention_heads=3, intermediate_size=16), token_rows(64)
        for gate in model.costeff.gates:
            torch.nn.init.constant_(gate.decision.bias, bias)
        settings = {"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
        make_trainer(tmp_path, model, rows=rows, target_layers=target, trained_parts="backbone", **settings).train()
        assert decided(model.eval(), rows) == pytest.approx(target, abs=0.3)


def test_layers_that_cost_nothing_do_not_meet_a_budget(tmp_path):
    """Rows run the two layers that have any width, which is all there is to save."""
    rows, target = token_rows(16), {"target_layers": 2.0, "trained_parts": "backbone"}
    model = tiny_model(**GATED, num_attention_heads=[3, 0, 0, 3], intermediate_size=[8, 0, 0, 8])
    for layer, gate in enumerate(model.costeff.gates):
        torch.nn.init.zeros_(gate.decision.weight)
        torch.nn.init.constant_(gate.decision.bias, 3.0 if layer in (1, 2) else -3.0)
    trainer = make_trainer(tmp_path, model, rows=rows, max_steps=1, **target)
    metrics = trainer.evaluate()
    assert (metrics["eval_layers_run"], metrics["eval_layers_run_by_flops"]) == (2, 4)
    assert metrics["eval_accuracy_on_target"] == pytest.approx(metrics["eval_accuracy"] - (0.5 - 0.05))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert (logged["layers_run"], logged["layers_run_by_flops"]) == (2, 4) and logged["skip_weight"] > 0


def test_every_row_skipping_every_layer_is_said_and_a_budget_recovers_from_it(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("hf_costeff.skip_training.logger.warning", said.append)
    model = tiny_model(**GATED)
    for gate in model.costeff.gates:
        torch.nn.init.zeros_(gate.decision.weight)
        torch.nn.init.constant_(gate.decision.bias, 2.0)
    make_trainer(tmp_path, copy.deepcopy(model), skip_weight=5.0, max_steps=2, learning_rate=1e-4).train()
    assert len(said) == 2 and "Lower `skip_weight`" in said[0] and "target_layers" in said[0]
    rows = token_rows(64)
    settings = {"max_steps": 200, "per_device_train_batch_size": 16, "learning_rate": 3e-2, "hard_gate_ratio": 1.0}
    make_trainer(tmp_path, model, rows=rows, target_layers=2.0, **settings).train()
    assert decided(model.eval(), rows, COSTS) == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize("settings", [{"skip_weight": 0.04}, {"skip_weight": 0.0}, {"target_layers": 2.0}], ids=str)
def test_gates_that_all_but_never_skip_keep_all_weights_finite(settings, tmp_path):
    model = tiny_model(**GATED)
    for gate in model.costeff.gates:
        torch.nn.init.constant_(gate.decision.bias, -60.0)
    make_trainer(tmp_path, model, max_steps=3, **settings).train()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_metrics_that_fall_as_models_improve_grow_beyond_the_target(tmp_path):
    model = tiny_model(**GATED, num_labels=1)
    rows = token_rows(10).remove_columns("labels").add_column("labels", [float(row) for row in range(10)])
    trainer = make_trainer(tmp_path, model, rows=rows, target_layers=0.5)
    found = trainer.evaluate(rows)
    beyond = (found["eval_layers_run_by_flops"] - 0.5) / 4 - 0.05
    assert beyond > 0 and found["eval_mse_on_target"] == pytest.approx(found["eval_mse"] + beyond)


def test_weights_in_half_precision_are_contrasted(tmp_path):
    model = tiny_model(**ATTENTION).bfloat16()
    make_trainer(tmp_path, model, max_steps=1, contrastive_weight=0.1, exit_contrastive_weight=0.1).train()


def test_evaluation_is_that_of_skipping_alone_and_says_how_many_layers_ran(tmp_path):
    model, rows = tiny_model(**GATED), token_rows(10, seed=1)
    metrics = make_trainer(tmp_path, model).evaluate()
    ran, batch = decided(model, rows), batch_of(rows)
    assert 0 < ran < 4 and metrics["eval_layers_run"] == pytest.approx(ran)
    logits = model.predict(batch["input_ids"], batch["attention_mask"], early_exit=False).logits
    right = float((logits.argmax(-1) == batch["labels"]).float().mean())
    assert metrics["eval_accuracy"] == pytest.approx(right)
    by_flops = decided(model, rows, COSTS)
    for target, beyond in ((3.5, max(0, by_flops - 3.7) / 4), (1.0, (by_flops - 1.2) / 4)):
        held = make_trainer(tmp_path, model, target_layers=target).evaluate()
        assert held["eval_accuracy_on_target"] == pytest.approx(right - beyond, abs=1e-5)
        assert held["eval_layers_run_by_flops"] == pytest.approx(by_flops)
    assert not [name for name in make_trainer(tmp_path, tiny_model()).evaluate() if "layers_run" in name]


def test_the_checkpoint_that_answers_best_with_skipping_alone_is_kept(tmp_path):
    """Rows of `predict` without early exit, at every evaluation, decide which weights are left at the end."""
    model, rows = tiny_model(**GATED), token_rows(10, seed=1)
    batch, seen = batch_of(rows), []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            logits = model.eval().predict(batch["input_ids"], batch["attention_mask"], early_exit=False).logits
            seen.append((float((logits.argmax(-1) == batch["labels"]).double().mean()), weights(model)))

    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    keeping = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    settings = {"trained_parts": "backbone", "hard_gate_ratio": 0.5, "learning_rate": 3e-2}
    make_trainer(tmp_path, model, callbacks=[Watch()], **steps, **keeping, **settings).train()
    best = max(accuracy for accuracy, _ in seen)
    assert best > seen[-1][0]  # else the last would do
    kept = weights(model)
    first = next(each for accuracy, each in seen if accuracy == best)
    assert all(torch.equal(kept[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ({}, {"skip_weight": 0.1}, "`skip_weight` is 0.1, but the model has no gates"),
        ({}, {"target_layers": 2.0}, "`target_layers` is 2.0, but the model has no gates"),
        (GATED, {"target_layers": 2.0, "trained_parts": "exits"}, "gates do not learn"),
        (GATED, {"target_layers": 4.0}, "above 0 and below 4"),
        (GATED, {"target_layers": 0.0}, "above 0 and below 4"),
        (GATED, {"target_layers": -1.0}, "above 0 and below 4"),
        ({**ATTENTION, "gate_size": 8}, {"target_layers": 0.1}, "the gates alone cost as much as 0.2"),
        ({**ATTENTION, "gate_size": 8}, {"target_layers": 3.9}, "no more than the gates themselves cost. It must be"),
        ({**ATTENTION, "gate_size": 512}, {"target_layers": 1.0}, "cost no less than all layers together"),
        ({**ATTENTION, "gate_size": 16}, {"target_layers": 2.0}, "layers 2 cost no more than their gates"),
        ({**ATTENTION, "gate_size": 16}, {"target_layers": 3.5}, "must be below 3.47"),
        (GATED, {"exit_contrastive_weight": 0.1}, "exit_head='attention'"),
        (ATTENTION, {"exit_contrastive_weight": 0.1, "trained_parts": "backbone"}, "one learns"),
        (ATTENTION, {"contrastive_weight": 0.1, "trained_parts": "exits"}, "do not learn"),
        (
            {**ATTENTION, "exit_layers": [2, 4]},
            {"exit_contrastive_weight": 0.1, "trained_parts": "exits"},
            "only one does",
        ),
        ({"exit_layers": [4]}, {"trained_parts": "exits"}, "none before the last"),
        ({}, {"trained_parts": "gates"}, "`trained_parts` is 'gates'"),
        ({}, {"hard_gate_ratio": 1.5}, "`hard_gate_ratio` is 1.5"),
        ({}, {"contrastive_temperature": 0.0}, "`contrastive_temperature` is 0.0"),
        ({}, {"contrastive_temperature": float("inf")}, "`contrastive_temperature` is inf"),
        ({}, {"skip_weight": -0.1}, "`skip_weight` is -0.1"),
        (GATED, {"skip_weight": float("inf")}, "`skip_weight` is inf"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(sizes, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_model(**sizes), **settings)
