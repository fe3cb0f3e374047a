"""Logits over a data set against single forward passes, and the figures of a report against plain counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import DataCollatorWithPadding

from helpers import balance_gates, tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff import CostEffCascade, CostEffForSequenceClassification, ExitConfig
from hf_costeff.calibration import describe_seen
from hf_costeff.efficiency import cumulative_flops, stock_flops
from hf_costeff.evaluation import (
    Contender,
    ReportRow,
    calibrate,
    collect_exit_logits,
    format_table,
    model_inputs,
    report_rows,
    row_keys,
)
from hf_costeff.exit_replay import ExitTimes
from hf_costeff.promises import weights_fingerprint
from hf_costeff.stages import StageStore

COLLATOR = DataCollatorWithPadding(word_tokenizer(), pad_to_multiple_of=8)
SINGLE = "single_label_classification"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    disable_progress_bars()


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return token_rows(23, seed=4)


def single_rows(model, rows, **settings) -> list:
    """The model's outputs on every row alone, without padding."""
    with torch.no_grad():
        return [model(torch.tensor([ids]), **settings) for ids in rows["input_ids"]]


# --- logits of all exits


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_logits_of_every_exit_come_back_in_the_data_sets_order(batch_size, rows):
    model = tiny_model()
    records = collect_exit_logits(model, rows, COLLATOR, batch_size=batch_size, show_progress=False)
    expected = torch.stack([torch.cat(outputs.exit_logits) for outputs in single_rows(model, rows)])
    assert records.logits.shape == (23, 4, 3) and records.logits.dtype == torch.float32
    torch.testing.assert_close(records.logits, expected, rtol=1e-5, atol=1e-5)
    assert records.seq_lengths.tolist() == [len(ids) for ids in rows["input_ids"]]
    assert records.labels.tolist() == rows["labels"]


def test_a_stock_classifier_has_one_exit(rows):
    model = tiny_bert()
    records = collect_exit_logits(model, rows, COLLATOR, batch_size=5, show_progress=False)
    expected = torch.stack([outputs.logits for outputs in single_rows(model, rows)])
    torch.testing.assert_close(records.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [tiny_model(), tiny_bert()], ids=["multi-exit", "stock"])
def test_a_model_without_gates_skips_nothing_and_cannot_be_told_to(model, rows):
    records = collect_exit_logits(model, rows, COLLATOR, show_progress=False, skip_layers=False)
    assert records.skipped is None
    with pytest.raises(ValueError, match=r"`skip_layers` is True, and this model has no gates\..*add_skip_gates"):
        collect_exit_logits(model, rows, COLLATOR, show_progress=False, skip_layers=True)


def test_a_model_with_gates_skips_unless_told_otherwise(rows):
    model = balance_gates(tiny_model(seed=3, skip_gates="linear", exit_pooling="mean"))
    by_default, on, off = (
        collect_exit_logits(model, rows, COLLATOR, show_progress=False, skip_layers=wanted)
        for wanted in (None, True, False)
    )
    assert torch.equal(by_default.skipped, on.skipped) and on.skipped.any() and off.skipped is None


@pytest.mark.parametrize(
    ("labels", "settings"), [(1, {"max_metric_drop": 5.0}), (3, {"max_disagreement": 5.0, "criterion": "patience"})]
)
def test_patience_of_a_gated_model_is_refused_before_it_runs(labels, settings, rows):
    model = tiny_model(num_labels=labels, skip_gates="linear")
    model.forward = None
    with pytest.raises(ValueError, match=r"The patience criterion .*from_pretrained\(\.\.\., skip_gates=None\)"):
        calibrate(model, rows, COLLATOR, show_progress=False, **settings)


def test_the_model_keeps_its_mode_and_is_run_without_dropout(rows):
    model = tiny_model(hidden_dropout_prob=0.5).train()
    first, second = (collect_exit_logits(model, rows, COLLATOR, show_progress=False).logits for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert all(module.training for module in model.modules())


def test_rows_without_labels_are_collected_and_half_precision_comes_back_in_single(rows):
    model = tiny_model().to(torch.bfloat16)
    records = collect_exit_logits(model, rows.remove_columns("labels"), COLLATOR, show_progress=False)
    assert records.labels is None and records.logits.dtype == torch.float32
    with pytest.raises(ValueError, match="The rows have no labels"):
        records.known_labels()


def test_multi_label_and_regression_labels_keep_their_shape_and_kind(rows):
    bare = rows.remove_columns("labels")
    lists = bare.add_column("labels", [[1.0, 0.0, 1.0]] * 23)
    numbers = bare.add_column("labels", [0.25 * index for index in range(23)])
    model = tiny_model()
    assert collect_exit_logits(model, lists, COLLATOR, show_progress=False).labels.tolist() == lists["labels"]
    assert collect_exit_logits(model, numbers, COLLATOR, show_progress=False).labels.tolist() == numbers["labels"]


def test_a_model_gets_only_the_inputs_its_forward_names():
    batch = {"input_ids": torch.ones(1, 2), "labels": torch.ones(1), "offsets": torch.ones(1)}
    assert list(model_inputs(tiny_bert(), batch)) == ["input_ids"]


# --- calibrating a model


def test_calibrating_stores_settings_that_predict_uses(rows):
    model = tiny_model()
    settings = calibrate(model, rows, COLLATOR, max_metric_drop=5.0, show_progress=False)
    assert ExitConfig.from_dict(model.config.exit_config) == settings
    assert settings.calibration["metric"] == "accuracy" and settings.calibration["rows"] == 23
    layers, right = [], []
    for ids, label in zip(rows["input_ids"], rows["labels"], strict=True):
        answer = model.predict(torch.tensor([ids]), early_exit=True)
        layers.append(answer.exit_layer.item())
        right.append(answer.logits.argmax().item() == label)
    assert settings.calibration["mean_exit_layer"] == pytest.approx(sum(layers) / 23)
    assert settings.calibration["early_exit"] == pytest.approx(sum(right) / 23)
    full = [outputs.logits.argmax().item() == label for outputs, label in zip(single_rows(model, rows), rows["labels"])]  # noqa: B905 - one output per row
    assert settings.calibration["full_depth"] == pytest.approx(sum(full) / 23)


def test_losses_may_be_counted_against_another_model(rows):
    model, teacher = tiny_model(), tiny_bert(seed=1)
    with torch.no_grad():
        theirs = torch.cat([teacher(torch.tensor([ids])).logits for ids in rows["input_ids"]]).argmax(-1)
        early = [model(torch.tensor([ids])).exit_logits[0].argmax().item() for ids in rows["input_ids"]]
    share = (theirs != torch.tensor(early)).double().mean().item()
    seen = calibrate(model, rows, COLLATOR, max_disagreement=100.0, reference=teacher, show_progress=False).calibration
    assert seen["mean_exit_layer"] == 1.0 and seen["disagreement"] == pytest.approx(share)
    assert seen["reference"] == "the reference"  # it was made here, and has no name


@pytest.mark.parametrize("name", ["org/bert", "/models/bert"])
def test_a_reference_is_named_as_the_hub_knows_it_or_by_its_folder(name, rows):
    model, teacher = tiny_model(), tiny_bert(seed=1)
    teacher.name_or_path = name
    settings = calibrate(model, rows, COLLATOR, target_speedup=1.2, reference=teacher, show_progress=False)
    assert settings.calibration["reference"] == ("org/bert" if name == "org/bert" else "bert")


@pytest.mark.parametrize("multi_exit", [False, True])
def test_a_speed_up_counts_against_the_reference_unless_flops_are_named(multi_exit, rows):
    model = tiny_model(num_attention_heads=2)
    teacher = tiny_model(seed=1) if multi_exit else tiny_bert(seed=1)
    lengths = [len(ids) for ids in rows["input_ids"]]
    flops = [
        cumulative_flops(teacher.config, length, checked_exits=[4])[-1]
        if multi_exit
        else stock_flops(teacher.config, length)
        for length in lengths
    ]
    found = {}
    for name, options in {
        "alone": {},
        "against": {"reference": teacher},
        "named": {"reference_flops": sum(flops) / len(flops)},
        "both": {"reference": teacher, "reference_flops": 1.0e12},
    }.items():
        settings = calibrate(model, rows, COLLATOR, target_speedup=2.0, show_progress=False, **options)
        found[name] = settings.calibration["speedup_over_full_depth"]
        if name == "against":
            gain = settings.calibration["speedup_over_reference"]
            full = sum(cumulative_flops(model.config, n, checked_exits=[4])[-1] for n in lengths) / sum(flops)
            assert gain == pytest.approx(found[name] / full) and gain >= 2.0
            assert f"{gain:.2f}x fewer than the reference." in describe_seen(settings.calibration)
    assert found["against"] == found["named"] != found["alone"] >= 2.0 and found["both"] == 1.0


def test_a_reference_must_answer_for_the_model(rows):
    model, times = tiny_model(), ExitTimes([1.0, 2.0, 3.0, 4.0], 0.1, 1, 1, "float32", hardware={})
    cascade = CostEffCascade.from_members([tiny_bert(num_hidden_layers=1), tiny_bert()])
    for reference, options, message in (
        (tiny_bert(num_labels=2), {}, "The reference has 2 labels and the model 3"),
        (cascade, {}, "The reference is a cascade.*take its last member"),
        (tiny_bert(max_position_embeddings=5), {}, "and the reference takes 5. Give rows that it can read"),
        (tiny_bert(), {"exit_times": times}, "`reference` and `exit_times` are given.*was not timed"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, rows, COLLATOR, target_speedup=1.1, reference=reference, **options)
    assert model.config.exit_config is None


def test_exits_that_were_chosen_by_time_are_kept_through_calibrations_and_those_that_were_named_are_not(rows):
    model = tiny_model()
    model.config.exit_config = ExitConfig(threshold=0.5, checked_exits=[2]).to_dict()

    def chosen(**options) -> list[int] | None:
        return calibrate(model, rows, COLLATOR, max_metric_drop=100.0, show_progress=False, **options).checked_exits

    assert chosen() == [2]
    assert chosen() == [2]
    assert chosen(checked_exits=[3]) == [3]
    assert chosen() not in ([2], [3])


def test_where_no_exit_pays_there_is_nothing_to_calibrate(rows):
    model = tiny_model()
    model.config.exit_config = ExitConfig(threshold=0.5, checked_exits=[]).to_dict()
    with pytest.raises(ValueError, match=r"No exit may be asked: `checked_exits` is empty.* Name the layers"):
        calibrate(model, rows, COLLATOR, target_speedup=2.0, show_progress=False)
    assert model.config.exit_config["checked_exits"] == []


def test_a_promise_names_the_weights_and_the_order_of_the_rows_does_not_matter(rows):
    model, seen = tiny_model(), []
    for data in (rows, rows.shuffle(seed=1), rows.remove_columns("labels")):
        goal = {"max_disagreement": 50.0, "delta": 0.3, "guarantee": True, "fit_temperatures": False}
        seen.append(calibrate(model, data, COLLATOR, show_progress=False, **goal).calibration)
        assert ExitConfig.from_dict(model.config.exit_config).calibration == seen[-1]
    assert seen[0]["promise"]["fingerprint"] == weights_fingerprint(model.costeff)
    assert seen[0]["promise"] == seen[1]["promise"] and seen[0]["mean_exit_layer"] == seen[1]["mean_exit_layer"]
    assert seen[2]["promise"]["rows"] == seen[0]["promise"]["rows"] == 16 and "metric" not in seen[2]


def test_the_key_of_a_row_is_made_from_its_tokens_and_its_label(rows):
    keys = row_keys(rows)
    assert len(set(keys)) == 23 and row_keys(rows.select([3, 0])) == [keys[3], keys[0]]
    other = rows.map(lambda row: {"labels": row["labels"] + 1})
    assert not set(row_keys(other)) & set(keys)


def test_an_accuracy_goal_looks_at_accuracy_whatever_the_default_metric_is(rows):
    model = tiny_model(problem_type="multi_label_classification")
    lists = rows.remove_columns("labels").add_column("labels", [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]] * 11 + [[1.0] * 3])
    assert (
        calibrate(model, lists, COLLATOR, max_accuracy_drop=1.0, show_progress=False).calibration["metric"]
        == "accuracy"
    )
    assert calibrate(model, lists, COLLATOR, max_metric_drop=1.0, show_progress=False).calibration["metric"] == "f1"


def test_a_stock_classifier_cannot_be_calibrated(rows):
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no exits to calibrate. Compress it first"):
        calibrate(tiny_bert(), rows, COLLATOR, max_metric_drop=1.0)


def test_what_no_rows_could_serve_is_refused_before_the_model_runs(rows, monkeypatch):
    monkeypatch.setattr("hf_costeff.evaluation.collect_exit_logits", lambda *given, **more: pytest.fail("it ran"))
    for goal in ({}, {"max_metric_drop": 1.0, "metric": "bleu"}, {"max_latency_ms": 1.0}, {"target_speedup": -1.0}):
        with pytest.raises(ValueError):
            calibrate(tiny_model(), rows, COLLATOR, **goal)


def test_rows_that_the_model_was_trained_on_are_told(rows, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_costeff.evaluation.logger.warning", said.append)
    trained = row_keys(rows.select([1, 5, 6]), ["input_ids"])
    relabelled = rows.map(lambda row: {"labels": (row["labels"] + 1) % 3})  # the text counts
    goal = {"max_metric_drop": 1.0, "trained_keys": trained, "show_progress": False}
    settings = calibrate(tiny_model(), relabelled, COLLATOR, **goal)
    assert len(said) == 1 and said[0].startswith("3 of 23 calibration rows have texts that the model was trained on")
    assert describe_seen(settings.calibration).startswith("On 23 rows, 3 of which were in training: ")
    tiny_model().save_pretrained(tmp_path)
    StageStore(tmp_path / "run", {}).keep_train_keys(trained)
    (tmp_path / "run" / "stages").rename(tmp_path / "stages")
    model = CostEffForSequenceClassification.from_pretrained(tmp_path)  # its run wrote them down
    calibrate(model, rows, COLLATOR, max_metric_drop=1.0, show_progress=False)
    assert len(said) == 2 and said[1] == said[0]
    calibrate(model, rows.select([0, 2, 3, 4, 7, 8, 9] * 3), COLLATOR, max_metric_drop=1.0, show_progress=False)
    calibrate(tiny_model(), rows, COLLATOR, max_metric_drop=1.0, show_progress=False)  # nobody knows
    assert len(said) == 2


def test_calibrating_without_labels_or_with_two_goals_leaves_the_model_as_it_was(rows):
    model = tiny_model(exit_config=ExitConfig(threshold=0.4).to_dict())
    for data, goal in (
        (rows.remove_columns("labels"), {"max_metric_drop": 1.0}),
        (rows, {}),
        (rows, {"target_speedup": 1e9}),
    ):
        with pytest.raises(ValueError):
            calibrate(model, data, COLLATOR, show_progress=False, **goal)
        assert model.config.exit_config == {"criterion": "entropy", "threshold": 0.4, "temperatures": 1.0}


# --- the report


@pytest.fixture(scope="module")
def report(rows) -> list[ReportRow]:
    teacher, slim, settings = tiny_bert(), tiny_model(), ExitConfig(threshold=0.8)
    contenders = []
    for name, model, early in (("teacher", teacher, None), ("full", slim, None), ("early", slim, settings)):
        records = collect_exit_logits(model, rows, COLLATOR, show_progress=False)
        contenders.append(Contender(name, model, records, early))
    return report_rows(contenders, rows, COLLATOR, SINGLE, timed_rows=8)


def accuracy_of(answers: list[int], rows: Dataset) -> float:
    return sum(answer == label for answer, label in zip(answers, rows["labels"], strict=True)) / len(answers)


def test_a_stock_models_line_has_its_own_counts(report, rows):
    teacher, model = report[0], tiny_bert()
    assert teacher.metrics["accuracy"] == pytest.approx(
        accuracy_of([outputs.logits.argmax().item() for outputs in single_rows(model, rows)], rows)
    )
    assert teacher.parameters == sum(parameter.numel() for parameter in model.parameters())
    lengths = [len(ids) for ids in rows["input_ids"]]
    assert teacher.flops_per_row == pytest.approx(sum(stock_flops(model.config, n) for n in lengths) / len(lengths))
    assert teacher.flops_per_row_at_128 == stock_flops(model.config, 128)
    assert (teacher.mean_exit_layer, teacher.exit_shares) == (4.0, [1.0])


def test_full_depth_and_early_exit_equal_predicting_row_by_row(report, rows):
    model = tiny_model()
    for line, early in zip(report[1:], (False, ExitConfig(threshold=0.8)), strict=True):
        answers = [model.predict(torch.tensor([ids]), early_exit=early) for ids in rows["input_ids"]]
        layers = [answer.exit_layer.item() for answer in answers]
        assert line.metrics["accuracy"] == pytest.approx(
            accuracy_of([answer.logits.argmax().item() for answer in answers], rows)
        )
        assert line.mean_exit_layer == pytest.approx(sum(layers) / len(layers))
        assert line.exit_shares == pytest.approx([layers.count(layer) / len(layers) for layer in (1, 2, 3, 4)])
        heads = () if early is False else None
        for length, found in ((None, line.flops_per_row), (128, line.flops_per_row_at_128)):
            spent = [
                cumulative_flops(model.config, length or len(ids), heads)[layer - 1]
                for ids, layer in zip(rows["input_ids"], layers, strict=True)
            ]
            assert found == pytest.approx(sum(spent) / len(spent))
    assert 1 < report[2].mean_exit_layer < 4


def test_every_contender_is_timed_at_both_batch_sizes(report):
    for line in report:
        assert set(line.ms_per_text) == {"32", "1"}
        assert all(value > 0 for value in line.ms_per_text.values())


def test_a_contender_answers_as_it_would_be_served(rows):
    batch = COLLATOR([rows[0], rows[1]])
    model, settings = tiny_model(), ExitConfig(threshold=1.0)
    records = collect_exit_logits(model, rows, COLLATOR, show_progress=False)
    assert Contender("early", model, records, settings).answer(batch).exit_layer.tolist() == [1, 1]
    assert Contender("full", model, records).answer(batch).exit_layer.tolist() == [4, 4]
    assert Contender("stock", tiny_bert(), records).answer(batch).logits.shape == (2, 3)


@pytest.mark.parametrize("make", [tiny_bert, tiny_model])
def test_stock_and_slim_models_are_timed_under_the_same_mode(make, monkeypatch):
    """A text alone feels what autograd costs, even when it is only turned off."""
    model, modes, linear = make(), [], torch.nn.functional.linear

    def watched(*tensors: Any) -> Any:
        modes.append(torch.is_inference_mode_enabled())
        return linear(*tensors)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    Contender("one", model, None).answer({"input_ids": torch.tensor([[5, 6, 7]])})
    assert set(modes) == {True}


def line(name: str, metric: float, parameters: int, flops: float, big: float, one: float) -> ReportRow:
    return ReportRow(name, {"accuracy": metric}, parameters, flops / 2, flops, 3.5, [1.0], {"32": big, "1": one})


def test_the_table_gives_every_ratio_against_the_first_line():
    table = format_table(
        [line("teacher", 0.9, 8_000_000, 4e6, 2.0, 10.0), line("slim", 0.81, 1_000_000, 2e5, 0.5, 2.5)], "accuracy"
    ).splitlines()
    assert len(table) == 4 and table[0].count("|") == table[1].count("|") == table[2].count("|")
    cells = [cell.strip() for cell in table[3].strip("|").split("|")]
    assert cells == [
        *("slim", "0.8100", "90.0%", "1.00M", "8.00x", "0.2M", "20.00x", "3.50", "0.500", "4.00x", "2.50", "4.00x")
    ]
    assert "100.0%" in table[2] and "1.00x" in table[2]


def test_the_table_tells_layers_run_where_any_are_skipped():
    lines = [line("whole", 0.9, 1, 4e6, 2.0, 10.0), line("skipping", 0.9, 1, 2e6, 2.0, 10.0)]
    assert "layers run" not in format_table(lines, "accuracy")
    lines[1] = dataclasses.replace(lines[1], layers_run=1.25)
    header, _, whole, skipping = (row.split("|") for row in format_table(lines, "accuracy").splitlines())
    assert [cells[9].strip() for cells in (header, whole, skipping)] == ["layers run", "3.50", "1.25"]
    assert len(header) == len(whole) == len(skipping)


def test_a_teacher_with_metric_zero_has_no_share_to_give():
    table = format_table([line("teacher", 0.0, 1, 1.0, 1.0, 1.0), line("slim", 0.5, 1, 1.0, 1.0, 1.0)], "accuracy")
    assert table.count("n/a") == 2
