"""The whole run on a tiny model: what it writes, its ablations, what stages share, and how it goes on after a kill."""

from __future__ import annotations

import dataclasses
import json
from shutil import copytree

import pytest
import torch
from datasets import DatasetDict, Value
from transformers import AutoModelForSequenceClassification, BertModel

from helpers import save_named, sentence_rows, tiny_bert, tiny_model, word_tokenizer
from hf_costeff import cli, layer_skipping, staged_run
from hf_costeff.layer_skipping import LayerSkippingArguments, train_layer_skipping
from hf_costeff.report import drop_exit_figures

SHORT = {"epochs": 0.5, "exit_epochs": 0.5, "batch_size": 8, "gates": "linear"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A stock classifier, its encoder alone, and a slim multi-exit model, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    stock, slim = tiny_bert(num_labels=2), tiny_model(num_labels=2)
    encoder = BertModel(stock.config, add_pooling_layer=False)
    for name, model in (("stock", stock), ("encoder", encoder), ("slim", slim)):
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return folder


def skip(models, folder, model="stock", **settings):
    arguments = LayerSkippingArguments(str(models / model), str(folder), **{**SHORT, **settings})
    return train_layer_skipping(arguments, sentence_rows(200))


def stop_at(kind, patched):
    """Training of a stage ends as by a kill."""
    train = layer_skipping.LayerSkipping._train

    def killed(self, stage):
        if stage.startswith(kind):
            raise KeyboardInterrupt
        return train(self, stage)

    patched.setattr(layer_skipping.LayerSkipping, "_train", killed)


def told(result):
    return json.loads((result.model_path / "layer_skipping.json").read_text())


def stages(folder):
    return {path.name.split("-")[0] for path in (folder / "stages").iterdir() if path.is_dir()}


def test_a_stock_classifier_becomes_one_that_skips_and_leaves(models, tmp_path):
    result = skip(models, tmp_path / "out", target_layers=2.0, teacher=str(models / "stock"))
    model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    config = model.config
    assert config.skip_gates == "linear" and config.exit_head == "attention" and config.exit_config is not None
    answer = model.predict(torch.randint(4, 20, (5, 7)), early_exit=True)
    assert answer.skipped_layers.shape == (5, 4)
    report = told(result)
    assert [row["name"] for row in report["rows"]] == [
        "model as given",
        "all layers",
        "skipping",
        "skipping and early exit",
    ]
    assert report["rows"][2]["flops_per_row"] < report["rows"][1]["flops_per_row"]
    assert report["skipping"]["layers_run_by_flops"] == result.skipping.layers_run_by_flops
    given, whole, skipping, leaving = result.rows
    assert given.layers_run is whole.layers_run is None and skipping.mean_exit_layer == 4
    assert leaving.layers_run <= skipping.layers_run == pytest.approx(result.skipping.layers_run)
    summary = (result.model_path / "SUMMARY.md").read_text()
    assert "mean exit layer | layers run |" in summary and "teacher" not in summary
    reached = result.skipping.layers_run_by_flops
    assert f"Asked for: 2 layers. Reached: {reached:.2f}, each" in summary
    assert ("That is not near: train longer" in summary) == (abs(reached - 2) > 0.4)
    assert str(tmp_path) not in json.dumps(report) + summary
    assert (result.model_path / "pareto.png").exists() and (result.model_path / "skipping.png").exists()
    card = (result.model_path / "README.md").read_text()
    assert result.skipping.describe() in card and f"{result.rows[-1].metrics[result.metric]:.4f}" in card
    assert not [name for name in model.state_dict() if "contrast" in name]
    assert drop_exit_figures(result.model_path) is True
    report = told(result)
    assert [row["name"] for row in report["rows"]] == ["model as given", "all layers", "skipping"]
    assert report["curve"] == [] == report["classes"] and not (result.model_path / "SUMMARY.md").exists()
    assert (result.model_path / "skipping.png").exists()  # speaks of full depth


def test_a_bare_encoder_gets_its_classes_from_the_rows(models, tmp_path):
    result = skip(models, tmp_path / "out", model="encoder", exit_layers=[2, 4])
    model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert model.config.exit_layers == [2, 4] and model.config.num_labels == 2
    assert result.rows[0].name == "all layers"


def test_a_slim_model_keeps_its_exits_and_gets_a_light_gate(models, tmp_path):
    result = skip(models, tmp_path / "out", model="slim", gates=None)
    config = AutoModelForSequenceClassification.from_pretrained(result.model_path).config
    assert (config.skip_gates, config.exit_head, config.exit_layers) == ("linear", "linear", [1, 2, 3, 4])
    again = skip(models, tmp_path / "again", model=str(tmp_path / "out"), gates=None, exit_epochs=0)
    assert again.rows[0].name == "model as given" and again.skipping is not None
    assert told(again)["exits_trained"] is False  # they stand on an encoder that has moved since
    as_it_is = skip(models, tmp_path / "still", model=str(tmp_path / "out"), gates=None, epochs=0, exit_epochs=0)
    assert told(as_it_is)["exits_trained"] is True and told(result)["exits_trained"] is True


def test_a_multi_exit_model_is_measured_as_it_came(models, tmp_path):
    settings = {**SHORT, "gates": "none", "learning_rate": 0.1}
    arguments = LayerSkippingArguments(str(models / "slim"), str(tmp_path / "out"), **settings)
    job = layer_skipping.LayerSkipping(arguments, sentence_rows(200))
    before = {name: tensor.clone() for name, tensor in job.given.state_dict().items()}
    job.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.given.state_dict().items())


def test_exits_alone_and_skipping_alone_are_settings(models, tmp_path):
    leaving = skip(models, tmp_path / "exits", gates="none")
    model = AutoModelForSequenceClassification.from_pretrained(leaving.model_path)
    assert model.config.skip_gates is None and model.config.exit_head == "attention" and leaving.skipping is None
    assert [row.name for row in leaving.rows] == ["model as given", "all layers", "early exit"]
    skipping = skip(models, tmp_path / "skips", exit_epochs=0)
    model = AutoModelForSequenceClassification.from_pretrained(skipping.model_path)
    assert model.config.exit_config is None and stages(tmp_path / "skips") == {"backbone"}
    assert skipping.rows[-1].name == "skipping"


def test_the_settings_of_training_reach_it(models, tmp_path, monkeypatch):
    seen = []

    class Noting(staged_run.CostEffTrainer):
        def __init__(self, model, args, **kwargs):
            seen.append(args)
            super().__init__(model, args, **kwargs)

    monkeypatch.setattr(staged_run, "CostEffTrainer", Noting)
    off = {"skip_weight": 0.0, "contrastive_weight": 0.0, "exit_contrastive_weight": 0.0, "hard_gate_ratio": 1.0}
    skip(models, tmp_path / "off", **off)
    skip(models, tmp_path / "on", target_layers=2.0)
    backbone, exits, on, on_exits = seen
    assert (backbone.trained_parts, exits.trained_parts) == ("backbone", "exits")
    assert (backbone.skip_weight, backbone.contrastive_weight, backbone.hard_gate_ratio) == (0.0, 0.0, 1.0)
    assert backbone.metric_for_best_model == "accuracy" and on.metric_for_best_model == "accuracy_on_target"
    assert exits.exit_contrastive_weight == 0 and on_exits.exit_contrastive_weight == 0.05
    assert (on.skip_weight, on.contrastive_weight, on.hard_gate_ratio) == (0.04, 0.01, 0.4)
    assert not exits.load_best_model_at_end and exits.target_layers is None


def test_the_backbone_stays_as_it_is_while_the_exits_learn_and_serves_other_exits(models, tmp_path, monkeypatch):
    skip(models, tmp_path / "out")
    folder = tmp_path / "out" / "stages"
    before = AutoModelForSequenceClassification.from_pretrained(folder / "backbone").state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(next(folder.glob("exits-*"))).state_dict()
    learnt = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert learnt and all(any(f"exits.{layer}." in name for layer in (1, 2, 3)) for name in learnt)
    stop_at("backbone", monkeypatch)
    skip(models, tmp_path / "out", exit_contrastive_weight=0.5, max_metric_drop=2.0)
    assert len(list(folder.glob("exits-*"))) == 2


def test_a_run_whose_rows_were_cut_at_another_length_is_refused(models, tmp_path, monkeypatch):
    stop_at("backbone", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        skip(copytree(models, tmp_path / "models"), tmp_path / "out")
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 6
    tokenizer.save_pretrained(tmp_path / "models" / "stock")
    with pytest.raises(ValueError, match="max_length was 24, now 6"):
        skip(tmp_path / "models", tmp_path / "out")


def test_figures_and_weights_in_the_folder_are_of_one_run_though_another_was_killed_while_measuring(
    models, tmp_path, monkeypatch
):
    skip(models, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_skipping, "exit_curve", killed)
    with pytest.raises(KeyboardInterrupt):
        skip(models, tmp_path / "out", exit_epochs=1.0)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}


def test_a_run_killed_between_the_phases_goes_on(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at("exits", patched)
        with pytest.raises(KeyboardInterrupt):
            skip(models, tmp_path / "cut")
    with monkeypatch.context() as patched:
        stop_at("backbone", patched)
        skip(models, tmp_path / "cut")
    skip(models, tmp_path / "whole")
    cut, whole = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("cut", "whole")
    )
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"target_layers": 4.0}, "above 0 and below 4"),
        ({"target_layers": 2.0, "gates": "none"}, "`target_layers` needs gates"),
        ({"target_layers": 3.9, "gates": "attention"}, "gates themselves cost"),
        ({"exit_epochs": 0.0, "gates": "none"}, "no row would save anything"),
        ({"exit_layers": [4], "gates": "none"}, "exits are at \\[4\\], so no row would save anything"),
        ({"epochs": 0.0}, "`epochs` is 0, and the model as given lacks gates or exits"),
        ({"epochs": 0.0, "gates": "none"}, "lacks gates or exits"),
        ({"epochs": 0.0, "model": "slim"}, "lacks gates or exits"),
        ({"exit_layers": [2, 4], "model": "slim"}, "`exit_layers` is \\[2, 4\\], and a multi-exit model keeps its"),
        ({"exit_pooling": "cls", "model": "slim"}, "`exit_pooling` is 'cls', and a multi-exit model keeps its"),
        ({"exit_head": "linear", "model": "slim"}, "`exit_head` is 'linear', and a multi-exit model keeps its"),
        ({"gates": "hard"}, "`gates` is 'hard'. It must be one of none, attention, linear"),
        ({"exit_head": "mlp"}, "`exit_head` is 'mlp'"),
        ({"epochs": -1.0}, "`epochs` is -1.0"),
        ({"metric": "spearman"}, "spearman"),
        ({"epochs": float("inf")}, "`epochs` is inf"),
        ({"skip_weight": -1.0}, "`skip_weight` is -1.0"),
        ({"skip_weight": float("inf")}, "`skip_weight` is inf.*finite"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0. It must be above 0"),
        ({"exit_learning_rate": -1.0}, "`exit_learning_rate` is -1.0. It must be above 0"),
        ({"exit_contrastive_weight": -1.0}, "`exit_contrastive_weight` is -1.0"),
        ({"exit_contrastive_weight": 0.1, "exit_head": "linear"}, "needs heads with token states"),
        ({"exit_contrastive_temperature": 0.0}, "`exit_contrastive_temperature` is 0.0"),
        ({"target_speedup": -1.0}, "`target_speedup` is -1.0"),
        (
            {"target_speedup": 2.0, "exit_epochs": 0.0},
            "`target_speedup` is 2.0, a goal of exits, and",
        ),
        ({"max_metric_drop": 1.0, "exit_epochs": 0.0}, "`max_metric_drop` is 1.0, a goal of exits"),
        ({"target_layers": 2.0, "epochs": 0.0}, "`target_layers` is 2, and `epochs` is 0: gates do not learn"),
        ({"teacher": "turned"}, "The teacher has the labels \\['b', 'a'\\] and the model \\['a', 'b'\\]"),
    ],
)
def test_what_cannot_work_is_refused_before_training(settings, error, models, tmp_path, monkeypatch):
    monkeypatch.setattr(staged_run.CostEffTrainer, "train", None)
    if "teacher" in settings:
        settings = {"model": save_named(tmp_path, "a", "b"), "teacher": save_named(tmp_path, "b", "a")}
    with pytest.raises(ValueError, match=error):
        skip(models, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_settings_can_be_replaced_one_by_one():
    arguments = LayerSkippingArguments("model", "out")
    assert dataclasses.replace(arguments, exit_epochs=0).max_metric_drop is None
    assert dataclasses.replace(arguments, target_speedup=2.0).max_metric_drop is None


def test_rows_without_labels_are_learnt_from_a_teacher_and_refused_without_one(models, tmp_path):
    rows = sentence_rows(200)
    train = rows.select(range(50, 200)).remove_columns("label")
    unlabelled = DatasetDict(train=train, validation=rows.select(range(50)))
    unlabelled["calibration"] = sentence_rows(40, seed=5).remove_columns("label")
    arguments = {"model": str(models / "stock"), "output_dir": str(tmp_path / "out"), **SHORT}
    with pytest.raises(ValueError, match="neither labels nor a teacher"):
        train_layer_skipping(LayerSkippingArguments(**arguments), unlabelled)
    assert not (tmp_path / "out").exists()
    result = train_layer_skipping(LayerSkippingArguments(**arguments, teacher=str(models / "stock")), unlabelled)
    assert 30 < told(result)["exit_config"]["calibration"]["rows"] <= 40


def test_a_classifier_of_many_labels_skips_and_leaves_and_a_regression_skips(models, tmp_path):
    rows = sentence_rows(120)
    labels = [
        [float(label), float(len(text.split()) > 6)] for text, label in zip(rows["text"], rows["label"], strict=True)
    ]
    kinds = {
        "multi_label_classification": (rows.remove_columns("label").add_column("label", labels), 2, {}),
        "regression": (rows.cast_column("label", Value("float32")), 1, {"exit_epochs": 0.0}),
    }
    for problem_type, (dataset, num_labels, settings) in kinds.items():
        model = tiny_bert(num_labels=num_labels, problem_type=problem_type)
        model.save_pretrained(tmp_path / problem_type)
        word_tokenizer().save_pretrained(tmp_path / problem_type)
        arguments = {"model": str(tmp_path / problem_type), "output_dir": str(tmp_path / f"{problem_type}-out")}
        result = train_layer_skipping(LayerSkippingArguments(**arguments, **{**SHORT, **settings}), dataset)
        model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
        assert (model.config.problem_type, model.config.num_labels) == (problem_type, num_labels)
        answer = model.predict(torch.randint(4, 20, (5, 7)))
        assert answer.logits.shape == (5, num_labels) and answer.skipped_layers.shape == (5, 4)
    arguments = LayerSkippingArguments(str(tmp_path / "regression"), str(tmp_path / "both"), **SHORT)
    with pytest.raises(ValueError, match="patience, which looks back"):
        train_layer_skipping(arguments, dataset)


def test_the_command_says_what_came_of_it(models, tmp_path, capsys):
    sentence_rows(200).to_csv(tmp_path / "rows.csv")
    words = ["--epochs", "0.2", "--exit_epochs", "0", "--gates", "linear", "--batch_size", "8"]
    files = ["--train_file", str(tmp_path / "rows.csv"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["skip", str(models / "stock"), *words, *files]) == 0
    assert "of 4 layers on average" in capsys.readouterr().out
    assert cli.main(["skip", str(models / "stock"), *words, *files, "--gates", "soft"]) == 1
    assert "`--gates` is 'soft'" in capsys.readouterr().err
