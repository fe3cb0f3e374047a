"""The whole run on a tiny model: what it writes, what it shares between ratios, and how it goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from helpers import balance_gates, save_named, sentence_rows, tiny_bert, tiny_model, word_tokenizer
from hf_costeff import CostEffTrainer, block_compression, cli
from hf_costeff.block_compression import BlockPruning, BlockPruningArguments, BlockPruningResult, block_prune
from hf_costeff.block_pruning import block_energies, block_matrices
from hf_costeff.evaluation import ReportRow
from hf_costeff.mask_files import load_masks
from hf_costeff.packed_linear import PackedLinear
from hf_costeff.stages import train_keys

SIZES = {"vocab_size": 60, "max_position_embeddings": 30, "num_labels": 2}
SHORT = {"penalty_epochs": 0.2, "retrain_epochs": 0.2, "batch_size": 8, "columns": 4}


@pytest.fixture
def folder(tmp_path):
    """A stock classifier and a slim multi-exit one, each with its tokenizer."""
    for name, model in (("stock", tiny_bert(num_labels=2)), ("slim", tiny_model(num_labels=2))):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def prune(folder, model="stock", **settings):
    arguments = BlockPruningArguments(str(folder / model), str(folder / "packed"), **{**SHORT, **settings})
    return block_prune(arguments, sentence_rows(300))


def report(folder):
    return json.loads((folder / "packed" / "block_pruning.json").read_text())


def stages(folder):
    return {path.name.split("-")[0]: path for path in (folder / "packed" / "stages").iterdir() if path.is_dir()}


def test_a_stock_classifier_becomes_a_packed_model(folder):
    result = prune(folder, teacher=str(folder / "stock"), proximal=True)
    model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert any(isinstance(module, PackedLinear) for module in model.modules()) and model.config.exit_layers == [4]
    assert result.compression == pytest.approx(2, rel=0.01)
    assert [row["name"] for row in report(folder)["rows"]] == ["model as given", "pruned", "pruned and packed"]
    assert "2.00 times fewer weights" in result.describe()
    masks = load_masks(stages(folder)["prune"] / "masks.safetensors")
    retrained = AutoModelForSequenceClassification.from_pretrained(stages(folder)["retrain"])
    masks.check(retrained)
    tokens = {"input_ids": torch.randint(4, 20, (3, 7))}
    torch.testing.assert_close(model.predict(**tokens).logits, retrained.predict(**tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_slim_multi_exit_model_keeps_its_exits(folder):
    result = prune(folder, model="slim", columns=None, column_slabs=2, ratio=0.44)
    model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert model.config.exit_layers == [1, 2, 3, 4] and model.config.exit_config is None
    assert {row["name"]: len(row["exit_shares"]) for row in report(folder)["rows"]}["pruned and packed"] == 4


def test_a_ratio_of_one_leaves_nothing_of_the_matrices_and_says_so(folder):
    result = prune(folder, "slim", ratio=1.0, allow_empty=True, penalty_epochs=0, retrain_epochs=0)
    assert result.compression is None and "Pruned matrices: nothing is left." in result.describe()
    for file in (result.model_path / "block_pruning.json", stages(folder)["prune"] / "stage.json"):
        assert json.loads(file.read_text(), parse_constant=pytest.fail)["compression"] is None
    model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert model.config.num_attention_heads == [0] * 4 and model.config.intermediate_size == [0] * 4


def test_without_retraining_the_pruned_blocks_are_zero_all_the_same(folder):
    prune(folder, retrain_epochs=0)
    masks = load_masks(stages(folder)["prune"] / "masks.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(stages(folder)["retrain"])
    for name, weight in block_matrices(model).items():
        assert not weight[~masks.weight_mask(name)].any() and weight.any()


def test_a_run_whose_teacher_was_trained_anew_is_refused(folder):
    prune(folder, model="slim", teacher=str(folder / "stock"))
    tiny_bert(num_labels=2, seed=7).save_pretrained(folder / "stock")
    with pytest.raises(ValueError, match="the teacher's weights changed"):
        prune(folder, model="slim", teacher=str(folder / "stock"), ratio=0.8)


def test_the_given_model_is_measured_as_it_came(folder):
    arguments = BlockPruningArguments(str(folder / "slim"), str(folder / "packed"), **SHORT | {"learning_rate": 0.1})
    job = BlockPruning(arguments, sentence_rows(300))
    before = {name: tensor.clone() for name, tensor in job.given.state_dict().items()}
    job.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.given.state_dict().items())


def test_kept_blocks_of_dead_units_are_told_as_nothing_left():
    line = ReportRow("a model", {"accuracy": 0.5}, 9, 9.0, 9.0, 1.0, [1.0], {"32": 2.0, "1": 3.0})
    nothing = BlockPruningResult(Path(), [line] * 3, "accuracy", 194.4, (100, 0), {})
    assert "Pruned matrices: nothing is left." in nothing.describe()


def test_the_folder_tells_what_came_out_and_goes_on_doing_so_once_exits_are_chosen(folder):
    result = prune(folder, "slim", column_slabs=2, columns=None)
    packed = folder / "packed"
    card = (packed / "README.md").read_text()
    assert (
        "with exits after layers 1, 2, 3, 4" in card
        and "share of the blocks pruned 0.5; blocks ranked by taylor" in card
    )
    assert "{li2020blockpruning" in card and "`block_pruning.json`" in card and "No exit settings are stored" in card
    given, pruned, kept = result.rows
    assert pruned.metrics == kept.metrics and pruned.parameters == given.parameters > kept.parameters
    assert f"| pruned and packed | {kept.metrics['accuracy']:.4f} |" in card
    assert result.summary() in (packed / "SUMMARY.md").read_text() and str(folder) not in card
    sentence_rows(200, seed=3).to_csv(folder / "rows.csv")
    words = ["calibrate", str(packed), "--validation_file", str(folder / "rows.csv"), "--max_metric_drop", "5"]
    assert cli.main(words) == 0
    assert (packed / "SUMMARY.md").exists() and "## Exit settings" in (packed / "README.md").read_text()


def test_a_card_of_one_exit_speaks_of_none(folder):
    prune(folder)
    card = (folder / "packed" / "README.md").read_text()
    assert "## Exits" not in card and "A smaller model does not treat all classes alike" in card
    assert "early_exit=0.5" not in card and "Early exit" not in card


@pytest.mark.parametrize(
    ("setting", "words"), [({"strength": 50.0}, "`strength` is 50"), ({"proximal": True}, "`prox")]
)
def test_settings_of_a_penalty_that_is_left_out_are_refused(setting, words):
    with pytest.raises(ValueError, match=f"{words}.*`penalty_epochs` is 0"):
        BlockPruningArguments("model", "packed", penalty_epochs=0, **setting)
    assert BlockPruningArguments("model", "packed", penalty_epochs=0).strength == 0


def test_ratios_share_the_penalised_model(folder, monkeypatch):
    prune(folder, ratio=0.5)
    monkeypatch.setattr(block_compression.BlockPruning, "_penalise", None)
    second = prune(folder, ratio=0.8)
    assert second.compression == pytest.approx(5, rel=0.05)
    assert len(list((folder / "packed" / "stages").glob("prune-*"))) == 2


def test_blocks_are_ranked_by_taylor_scores_of_the_penalised_model_or_by_magnitude(folder, monkeypatch):
    settings = {"ratio": 0.5, "penalty_epochs": 0, "retrain_epochs": 0}
    seen = []

    def weakest_first(model, blocks, batches, loss, embeddings):
        seen.extend((loss(model, batch).item(), batch) for batch in batches)
        return {name: -energies for name, energies in block_energies(model, blocks, embeddings).items()}

    monkeypatch.setattr(block_compression, "compute_block_importance", weakest_first)
    found = {}
    for importance in ("taylor", "magnitude"):
        prune(folder, "slim", importance=importance, **settings)
        newest = max((folder / "packed" / "stages").glob("prune-*"), key=lambda path: path.stat().st_mtime_ns)
        found[importance] = load_masks(newest / "masks.safetensors").masks
    for name, kept in found["magnitude"].items():
        assert kept.float().mean() == pytest.approx(0.5, abs=0.05)
        assert (found["taylor"][name] == kept).sum() <= kept.numel() % 2  # the middle one of an odd number
    model = AutoModelForSequenceClassification.from_pretrained(folder / "packed" / "stages" / "penalty").eval()
    value, batch = seen[0]
    exits = model(batch["input_ids"], batch["attention_mask"]).exit_logits
    expected = sum(torch.nn.functional.cross_entropy(logits, batch["labels"]).item() for logits in exits)
    assert value == pytest.approx(expected, rel=0.02)
    assert sum(len(batch["labels"]) for _, batch in seen) == len(train_keys(folder / "packed"))


@pytest.mark.parametrize("across", [False, True])
def test_layers_that_compete_are_scored_without_gradient_equilibrium(across, folder, monkeypatch):
    gradients = []

    def scored(model, blocks, batches, loss, embeddings):
        batch, weight = next(iter(batches)), model.costeff.layers[0].feed_forward.output.weight
        loss(model, batch).backward()
        gradients.append(weight.grad.clone())
        model.zero_grad()
        outputs = model(batch["input_ids"], batch["attention_mask"], gradient_equilibrium=False if across else None)
        sum(torch.nn.functional.cross_entropy(logits, batch["labels"]) for logits in outputs.exit_logits).backward()
        gradients.append(weight.grad.clone())
        model.zero_grad()
        return block_energies(model, blocks, embeddings)

    monkeypatch.setattr(block_compression, "compute_block_importance", scored)
    prune(folder, "slim", penalty_epochs=0, retrain_epochs=0, across_matrices=across)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * gradients[1].abs().max().item())


def test_rows_without_labels_are_learnt_from_a_teacher_and_refused_without_one(folder):
    rows = sentence_rows(300)
    train = rows.select(range(60, 300)).remove_columns("label")
    unlabelled = DatasetDict(train=train, validation=rows.select(range(60)))
    unlabelled["calibration"] = sentence_rows(50, seed=5).remove_columns("label")
    arguments = {"model": str(folder / "slim"), "output_dir": str(folder / "packed"), **SHORT}
    for importance in ("taylor", "magnitude"):
        with pytest.raises(ValueError, match="neither labels nor a teacher"):
            block_prune(BlockPruningArguments(**arguments, importance=importance), unlabelled)
    assert not (folder / "packed").exists()
    block_prune(BlockPruningArguments(**arguments, teacher=str(folder / "stock")), unlabelled)
    assert report(folder)["stages"]["penalty"]["steps"] > 0


def test_a_teacher_that_cuts_texts_otherwise_is_refused(folder):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(folder / "stock")
    with pytest.raises(ValueError, match="cuts texts into other pieces"):
        prune(folder, "slim", teacher=str(folder / "stock"))


def test_a_stock_classifier_whose_exit_would_stay_as_drawn_is_refused(folder):
    with pytest.raises(ValueError, match="`penalty_epochs` and `retrain_epochs` are 0"):
        prune(folder, penalty_epochs=0, retrain_epochs=0, importance="magnitude")


def test_a_model_that_skips_layers_goes_on_skipping_them(folder):
    model = balance_gates(tiny_model(num_labels=2, skip_gates="linear", exit_pooling="mean"))
    model.save_pretrained(folder / "slim")
    prune(folder, "slim", teacher=str(folder / "stock"), column_slabs=2, columns=None)
    packed = AutoModelForSequenceClassification.from_pretrained(folder / "packed")
    assert packed.config.skip_gates == "linear"
    trained = report(folder)["stages"]["penalty"]
    assert trained["loss_weights"]["representation_loss"] == 0
    assert trained["loss_weights"]["soft_label_loss"] == 1


def test_a_threshold_is_a_magnitude():
    arguments = BlockPruningArguments("model", "packed", threshold=0.1)
    assert arguments.importance == "magnitude" and BlockPruningArguments("model", "packed").importance == "taylor"


def test_a_run_whose_rows_were_cut_at_another_length_is_refused(folder, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(block_compression.BlockPruning, "_penalise", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(folder)
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 6
    tokenizer.save_pretrained(folder / "stock")
    with pytest.raises(ValueError, match="max_length was 24, now 6"):
        prune(folder)


def test_a_run_killed_between_the_phases_goes_on(folder, monkeypatch):
    def killed(self, stage, masks):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(block_compression.BlockPruning, "_retrain", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(folder)
    assert set(stages(folder)) == {"penalty", "prune"}
    monkeypatch.setattr(block_compression.BlockPruning, "_penalise", None)
    interrupted = prune(folder)
    monkeypatch.undo()
    (folder / "packed").rename(folder / "first")
    whole = prune(folder)
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(folder / name).state_dict() for name in ("first", "packed")
    )
    assert interrupted.rows[-1].metrics == whole.rows[-1].metrics
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_figures_and_weights_in_the_folder_are_of_one_run_though_another_was_killed_while_measuring(
    folder, monkeypatch
):
    prune(folder)
    before = {path.name: path.read_bytes() for path in (folder / "packed").iterdir() if path.is_file()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(block_compression, "report_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, ratio=0.8)
    assert before == {path.name: path.read_bytes() for path in (folder / "packed").iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (
            RobertaConfig(**SIZES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
            RobertaForSequenceClassification,
        ),
        (DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=2, hidden_dim=32), DistilBertForSequenceClassification),
    ],
    ids=["roberta", "distilbert"],
)
def test_other_families_go_the_whole_way(config, model_class, tmp_path):
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path / "stock")
    word_tokenizer().save_pretrained(tmp_path / "stock")
    result = prune(tmp_path, teacher=str(tmp_path / "stock"))
    model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert result.compression == pytest.approx(2, rel=0.02) and result.rows[1].metrics == result.rows[2].metrics


def test_without_training_under_it_there_is_no_penalty():
    strengths = [BlockPruningArguments("model", "packed", **given).strength for given in ({}, {"strength": 0.0})]
    assert strengths == [30, 0] and BlockPruningArguments("model", "packed", penalty_epochs=0.0).strength == 0


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"columns": 40}, "A block of 40 columns is larger than"),
        ({"ratio": 1.0}, "`ratio` is 1.0"),
        ({"ratio": 0.5, "threshold": 0.1}, "either `ratio` or `threshold`"),
        ({"importance": "norm"}, "`importance` is 'norm'. It must be magnitude or taylor"),
        ({"importance": "taylor", "threshold": 0.1}, "A `threshold` is a magnitude"),
        ({"penalty_epochs": 0.0}, "the exit that a stock classifier gets would be as it was drawn"),
        ({"penalty_epochs": -1.0}, "`penalty_epochs` is -1.0"),
        ({"penalty_epochs": float("inf")}, "`penalty_epochs` is inf"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0"),
        ({"retrain_learning_rate": float("nan")}, "`retrain_learning_rate` is nan"),
        ({"refresh_epochs": 0.0}, "`refresh_epochs` is 0.0"),
        ({"strength": -1.0}, "`strength` is -1.0"),
        ({"metric": "spearman"}, "spearman"),
        ({"teacher": "turned"}, "The teacher has the labels \\['b', 'a'\\] and the model \\['a', 'b'\\]"),
    ],
)
def test_what_cannot_work_is_refused_before_training(folder, settings, error, monkeypatch):
    monkeypatch.setattr(CostEffTrainer, "train", None)
    if "teacher" in settings:
        settings = {"model": save_named(folder, "a", "b"), "teacher": save_named(folder, "b", "a")}
    with pytest.raises(ValueError, match=error):
        prune(folder, **settings)
    assert not (folder / "packed").exists()  # so the corrected run is not refused


def test_the_command_prunes_and_says_what_came_of_it(folder, capsys):
    sentence_rows(300).to_csv(folder / "rows.csv")
    words = ["--penalty_epochs", "0", "--importance", "magnitude", "--retrain_epochs", "0.1"]
    words += ["--rows", "3", "--columns", "1", "--ratio", "0.3"]
    files = ["--train_file", str(folder / "rows.csv"), "--output_dir", str(folder / "packed")]
    assert cli.main(["block-prune", str(folder / "stock"), *words, *files]) == 0
    assert "1.40 times fewer weights" in capsys.readouterr().out
    assert cli.main(["block-prune", str(folder / "stock"), *words[:-1], "1", *files]) == 1
    assert "ratio` is 1.0" in capsys.readouterr().err
