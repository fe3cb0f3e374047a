"""The whole recipe on a tiny teacher and made-up sentences: what comes out, going on after a stop, and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
)

import hf_costeff.compression
import hf_costeff.staged_run
from helpers import sentence_rows, tiny_bert, word_tokenizer
from hf_costeff import CostEffForSequenceClassification, compress
from hf_costeff.columns import Columns
from hf_costeff.compression import Compression
from hf_costeff.compression_args import CompressionArguments
from hf_costeff.data import DataArguments, make_collator, tokenize
from hf_costeff.efficiency import count_parameters, full_depth_flops, stock_flops
from hf_costeff.evaluation import calibrate
from hf_costeff.exit_criteria import answers
from hf_costeff.recipes import RECIPES, Phase, Recipe
from hf_costeff.report import CompressionResult
from loopback_hub import LoopbackHub, run_python

WIDE = {"num_labels": 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LABELS = {"id2label": {0: "dull", 1: "bright"}, "label2id": {"dull": 0, "bright": 1}}


def few_steps(rows: int, num_attention_heads: int, num_labels: int = 2) -> Recipe:
    """Every phase of a run, a few steps each."""
    return Recipe(
        name="fast",
        teacher=Phase(1, 1e-3, max_steps=4),
        assistant_representation=Phase(1, 1e-3, max_steps=2),
        assistant_prediction=Phase(1, 1e-3, max_steps=3),
        assistant_representation_weight=1.0,
        interval=Phase(1, 1e-3, max_steps=2, representation_only_ratio=0.5),
        interval_growth=0.1,
        events=2,
        importance_rows=16,
        representation=Phase(1, 1e-3, max_steps=2),
        prediction=Phase(1, 1e-3, max_steps=4),
        token_replacement_rate=0.2,
        soft_label_exit="last",
        exit_pooling="cls",
        batch_size=8,
    )


STAGES = [*("assistant-representation", "assistant", "slenderize-01", "slenderize-02", "representation", "prediction")]


@pytest.fixture(scope="module", autouse=True)
def tiny_recipe():
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "fast", few_steps)
        yield


@pytest.fixture(autouse=True)
def cache_in_the_tests_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_data() -> DatasetDict:
    """Splits of 40, 16 and 16 rows; among the training rows an empty text and one longer than the position table."""
    train = sentence_rows(38)
    train = Dataset.from_dict({"text": [*train["text"], "", "good film " * 40], "label": [*train["label"], 0, 1]})
    return DatasetDict(train=train, held=sentence_rows(16, seed=1), validation=sentence_rows(16, seed=2))


SPLIT = {"calibration_split": "held"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_bert(**WIDE, **LABELS).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory) -> CompressionResult:
    """One whole run at half the parameters."""
    return compress(teacher, make_data(), tmp_path_factory.mktemp("run") / "slim", compression=2, **SPLIT)


# --- what comes out


def test_the_output_folder_holds_everything_a_user_needs(finished):
    names = {path.name for path in finished.model_path.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "efficiency.json",
        "SUMMARY.md",
        "pareto.png",
    } <= names
    stages = sorted(path.name for path in (finished.model_path / "stages").iterdir())
    assert stages == sorted([*STAGES, "run.json", "train_keys.npy"])  # nothing half-done is left
    assert not [path for path in finished.model_path.rglob("*") if path.suffix in (".bin", ".pickle", ".pkl")]


def test_calibrating_knows_the_texts_that_the_run_was_trained_on(finished, monkeypatch):
    said = []
    monkeypatch.setattr("hf_costeff.evaluation.logger.warning", said.append)
    model = CostEffForSequenceClassification.from_pretrained(finished.model_path)
    columns, data = Columns(("text",), "label"), make_data()
    for texts in (data["train"].select(range(30)), data["held"]):
        rows = tokenize(texts.rename_column("label", "labels"), word_tokenizer(), columns, 24)
        calibrate(model, rows, make_collator(word_tokenizer()), target_speedup=1.0, fit_temperatures=False)
    shared = len(set(data["held"]["text"]) & set(data["train"]["text"]))
    assert said[0].startswith("30 of 30 calibration rows have texts that the model was trained on")
    assert len(said) == 1 + bool(shared)


def test_the_model_reloads_by_its_auto_class_and_leaves_early(finished, teacher):
    model, report = AutoModelForSequenceClassification.from_pretrained(finished.model_path, output_loading_info=True)
    assert isinstance(model, CostEffForSequenceClassification) and not any(report.values())
    assert model.config.id2label == LABELS["id2label"] and model.config.label2id == LABELS["label2id"]
    tokenizer = AutoTokenizer.from_pretrained(finished.model_path)
    batch = tokenizer(["a good film", "the story was bad and dull"], return_tensors="pt", padding=True)
    answer = model.predict(**batch, early_exit=True)
    assert answer.logits.shape == (2, 2) and answer.exit_layer.tolist() <= [2, 2]
    assert AutoTokenizer.from_pretrained(teacher)("a good film")["input_ids"] == batch["input_ids"][0, :5].tolist()


def test_the_plan_is_kept_to_the_parameter(finished):
    model = AutoModelForSequenceClassification.from_pretrained(finished.model_path)
    total = count_parameters(tiny_bert(**WIDE))
    assert finished.plan.teacher_parameters == total
    assert count_parameters(model) == finished.plan.parameters <= total / 2
    assert full_depth_flops(model.config, 128) == finished.plan.flops
    assert finished.plan.teacher_flops == stock_flops(BertConfig(**WIDE, vocab_size=41), 128)
    weights = (finished.model_path / "model.safetensors").stat().st_size
    assert finished.plan.file_bytes <= weights <= finished.plan.file_bytes + 20_000


def test_the_report_tells_what_the_models_do_on_validation(finished, teacher):
    rows = make_data()["validation"]
    tokenizer = word_tokenizer()
    stock = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    slim = AutoModelForSequenceClassification.from_pretrained(finished.model_path)
    answers_of, layers = {"teacher": [], "slim, full depth": [], "slim, early exit": []}, []
    for text in rows["text"]:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            answers_of["teacher"].append(stock(**inputs).logits.argmax().item())
        answers_of["slim, full depth"].append(slim.predict(**inputs, early_exit=False).logits.argmax().item())
        early = slim.predict(**inputs, early_exit=True)
        answers_of["slim, early exit"].append(early.logits.argmax().item())
        layers.append(early.exit_layer.item())
    lines = {row.name: row for row in finished.rows}
    assert list(lines) == ["teacher", "assistant", "slim, full depth", "slim, early exit"]
    for name, found in answers_of.items():
        right = sum(answer == label for answer, label in zip(found, rows["label"], strict=True))
        assert lines[name].metrics["accuracy"] == pytest.approx(right / 16), name
    assert lines["slim, early exit"].mean_exit_layer == pytest.approx(sum(layers) / 16)
    assert lines["teacher"].parameters == finished.plan.teacher_parameters
    assert finished.table() in (finished.model_path / "SUMMARY.md").read_text()


def test_settings_stages_and_the_exit_threshold_are_written_down(finished):
    report = json.loads((finished.model_path / "efficiency.json").read_text())
    assert list(report["stages"]) == STAGES
    assert [report["stages"][name]["steps"] for name in STAGES] == [2, 3, 2, 2, 2, 4]
    assert {report["stages"][name]["batch_size"] for name in STAGES} == {few_steps(40, 1).batch_size}
    assert report["stages"]["assistant"]["loss_weights"]["task_loss"] == 0.5
    assert report["stages"]["prediction"]["loss_weights"]["task_loss"] == 0.0
    assert report["stages"]["prediction"]["token_replacement_rate"] == few_steps(40, 1).token_replacement_rate
    widths = report["plan"]["widths"]
    last = report["stages"]["slenderize-02"]
    assert {name: last[name] for name in widths} == widths and last["parameters"] == finished.plan.parameters
    assert last["parameters"] < report["stages"]["slenderize-01"]["parameters"]
    assert report["data"]["rows"] == {"train": 40, "validation": 16, "calibration": 16}
    assert report["data"]["truncated_rows"] == {"train": 1, "validation": 0, "calibration": 0}
    assert report["exit_config"]["calibration"]["rows"] == 16  # the calibration rows, never the validation rows
    assert report["exit_config"]["calibration"]["goal"] == {"max_metric_drop": 0.5}
    config = json.loads((finished.model_path / "config.json").read_text())
    assert config["exit_config"] == report["exit_config"]
    early = next(row for row in report["rows"] if row["name"] == "slim, early exit")
    assert sum(found["rows"] for found in report["classes"]) == 16
    right = sum(found["rows"] * found["early_exit"] for found in report["classes"])
    assert right == pytest.approx(16 * early["metrics"]["accuracy"])
    for name in ("assistant", "prediction"):
        assert "eval_mean_exit_accuracy" in report["stages"][name]["calibration_metrics"]
    assert report["settings"]["compression"] == 2 and report["settings"]["seed"] == 42


def test_learning_rates_grow_from_event_to_event(teacher, tmp_path, monkeypatch):
    seen = {}

    def record(self, stage, model, teacher, phase, **options):
        seen[stage] = phase.learning_rate
        return model, {}

    monkeypatch.setattr(Compression, "_distil", record)
    monkeypatch.setattr(Compression, "_report", lambda self, plan, stages, loaded: None)
    compress(teacher, make_data(), tmp_path / "slim", num_attention_heads=1, events=3, **SPLIT)
    assert [seen[f"slenderize-0{event}"] for event in (1, 2, 3)] == pytest.approx([1e-3, 1.1e-3, 1.21e-3])


@pytest.mark.parametrize(("allocation", "equilibrium"), [("uniform", None), ("uneven", False)])
def test_every_stage_trains_on_its_own_losses_and_layers_are_compared_without_equilibrium(
    allocation, equilibrium, teacher, tmp_path, monkeypatch
):
    """None of them trains here: what their trainers were given is looked at."""
    given, scored = {}, []

    def look(self, trainer, evaluate=True):
        given[Path(trainer.args.output_dir).name.removesuffix(".working")] = trainer.args
        return trainer.model, {}

    def scores_against(*args, gradient_equilibrium, **kwargs):
        scored.append(gradient_equilibrium)
        return against(*args, gradient_equilibrium=gradient_equilibrium, **kwargs)

    against = hf_costeff.compression.importance_against
    monkeypatch.setattr(Compression, "_run_trainer", look)
    monkeypatch.setattr(Compression, "_report", lambda self, plan, stages, loaded: None)
    monkeypatch.setattr(hf_costeff.compression, "importance_against", scores_against)
    compress(teacher, make_data(), tmp_path / "slim", compression=2, allocation=allocation, **SPLIT)
    names = ("task_weight", "soft_label_weight", "representation_weight", "representation_only_ratio")
    found = {stage: [getattr(args, name) for name in names] for stage, args in given.items()}
    assert found == {
        "assistant-representation": [None, 0.0, 1.0, 0.0],
        "assistant": [0.5, 0.5, 1.0, 0.0],
        "slenderize-01": [None, 1.0, 1.0, 0.5],
        "slenderize-02": [None, 1.0, 1.0, 0.5],
        "representation": [None, 0.0, 1.0, 0.0],
        "prediction": [None, 1.0, 1.0, 0.0],
    }
    assert {stage: args.token_replacement_rate for stage, args in given.items() if args.token_replacement_rate} == {
        "prediction": 0.2
    }
    assert [stage for stage, args in given.items() if args.soft_label_exit == "last"] == ["prediction"]
    assert {stage for stage, args in given.items() if args.load_best_model_at_end} == {"assistant", "prediction"}
    assert {given[stage].metric_for_best_model for stage in ("assistant", "prediction")} == {"mean_exit_accuracy"}
    assert scored == [equilibrium, equilibrium]


@pytest.mark.parametrize(
    ("asked", "mean", "chosen"),
    [
        ("auto", 0.73, "last"),
        ("auto", 0.74, "same"),
        ("auto", 0.8, "same"),
        ("same", 0.1, "same"),
        ("last", 0.8, "last"),
    ],
)
def test_weak_exits_of_the_assistant_teach_nobody(asked, mean, chosen, teacher, tmp_path, monkeypatch):
    """Weak: less than 92% of the last exit's 0.8, which is 0.736."""
    given = {}

    def look(self, trainer, evaluate=True):
        given[Path(trainer.args.output_dir).name.removesuffix(".working")] = trainer.args.soft_label_exit
        return trainer.model, {"calibration_metrics": {"eval_mean_exit_accuracy": mean, "eval_accuracy": 0.8}}

    monkeypatch.setattr(Compression, "_run_trainer", look)
    monkeypatch.setattr(Compression, "_report", lambda self, plan, stages, loaded: None)
    compress(teacher, make_data(), tmp_path / "slim", compression=2, soft_label_exit=asked, **SPLIT)
    assert given.pop("prediction") == chosen and set(given.values()) == {"same"}
    record = json.loads((tmp_path / "slim" / "stages" / "prediction" / "stage.json").read_text())
    assert record["soft_label_exit"] == chosen


# --- going on


class Stopped(BaseException):
    """Stands for a process that ends here."""


def stop_at_call(patch: pytest.MonkeyPatch, owner, name: str, number: int) -> None:
    """From the given call on (1 is the first) the function ends the process."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) >= number:
            raise Stopped
        return original(*args, **kwargs)

    patch.setattr(owner, name, stopping)


def watch_stages(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that train from now on."""
    trained: list[str] = []
    original = Compression._distil

    def watching(self, stage, *args, **kwargs):
        trained.append(stage)
        return original(self, stage, *args, **kwargs)

    patch.setattr(Compression, "_distil", watching)
    return trained


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


STOPS = {
    # owner, function, call that stops, stages that the second call trains
    "in the second importance pass": (hf_costeff.compression, "compute_importance", 2, STAGES[3:]),
    "before the report": (Compression, "_report", 1, []),
}


@pytest.mark.parametrize("stop", STOPS)
def test_the_same_command_goes_on_after_a_stop_and_ends_with_the_same_model(stop, teacher, finished, tmp_path):
    owner, name, number, remaining = STOPS[stop]
    folder = tmp_path / "slim"
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, owner, name, number)
        with pytest.raises(Stopped):
            compress(teacher, make_data(), folder, compression=2, **SPLIT)
    assert not (folder / "config.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        trained = watch_stages(patch)
        result = compress(teacher, make_data(), folder, compression=2, **SPLIT)
    assert trained == remaining
    expected = state_of(finished.model_path)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state_of(folder).items())
    assert [row.metrics for row in result.rows] == [row.metrics for row in finished.rows]


def test_a_finished_run_is_not_repeated_and_takes_another_goal_without_training(teacher, finished):
    before = state_of(finished.model_path)
    with pytest.MonkeyPatch.context() as patch:
        trained, said = watch_stages(patch), []
        patch.setattr(hf_costeff.staged_run.logger, "warning", said.append)
        again = compress(teacher, make_data(), finished.model_path, compression=2, target_speedup=0.5, **SPLIT)
    assert trained == []
    assert said == [f"Going on in {finished.model_path}; done before: {', '.join(STAGES)}."]
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(again.model_path).items())
    config = json.loads((again.model_path / "config.json").read_text())
    assert config["exit_config"]["calibration"]["goal"] == {"target_speedup": 0.5}
    compress(teacher, make_data(), finished.model_path, compression=2, **SPLIT)  # as it was, for the other tests


PUSHED = """
import sys
sys.path[:0] = sys.argv[3:]
from hf_costeff import compress
from hf_costeff.recipes import RECIPES
from test_compression import SPLIT, few_steps, make_data
RECIPES["fast"] = few_steps
compress(sys.argv[1], make_data(), sys.argv[2], compression=2, push_to_hub="org/slim", **SPLIT)
"""


def test_a_finished_run_is_pushed_when_asked_for(teacher, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(hf_costeff.compression, "push_folder", lambda *given: pytest.fail("nobody asked for that"))
    compress(teacher, make_data(), finished.model_path, compression=2, **SPLIT)
    here = Path(__file__).parent
    with LoopbackHub() as hub:
        run = run_python(
            PUSHED, hub.environment(tmp_path), tmp_path, teacher, finished.model_path, here, here.parent / "src"
        )
        assert run.returncode == 0, run.stderr
        files = hub.files("org/slim")
        edited = b"---\ntags: []\n---\nTheirs.\n"
        hub.add_commit("org/slim", "main", {**files, "README.md": edited})
        run = run_python(
            PUSHED, hub.environment(tmp_path), tmp_path, teacher, finished.model_path, here, here.parent / "src"
        )
        assert run.returncode == 0, run.stderr
        assert hub.files("org/slim")["README.md"] == edited
    assert files["model.safetensors"] == (finished.model_path / "model.safetensors").read_bytes()
    assert 'from_pretrained("org/slim")' in files["README.md"].decode()
    assert {"config.json", "modeling_costeff.py", "tokenizer.json", "efficiency.json"} <= set(files)
    assert not [name for name in files if name.startswith("stages/") or name.endswith(".bin")]
    with pytest.raises(Exception, match="org//slim"):
        compress(teacher, make_data(), finished.model_path, compression=2, push_to_hub="org//slim", **SPLIT)


def test_a_damaged_stage_is_refused_with_its_remedy_and_nothing_else_is_lost(teacher, tmp_path):
    folder = tmp_path / "slim"
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, hf_costeff.compression, "compute_importance", 1)
        with pytest.raises(Stopped):
            compress(teacher, make_data(), folder, compression=2, **SPLIT)
    weights = folder / "stages" / "assistant" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"assistant is damaged.*Delete this folder .*run the same command again"):
        compress(teacher, make_data(), folder, compression=2, **SPLIT)
    weights.write_bytes(whole)
    with pytest.MonkeyPatch.context() as patch:
        trained = watch_stages(patch)
        compress(teacher, make_data(), folder, compression=2, **SPLIT)
    assert trained == STAGES[2:]


def test_another_teacher_or_other_texts_under_the_same_names_are_another_run(finished, teacher, tmp_path):
    data = make_data()
    data["train"] = data["train"].select(list(range(39, -1, -1)))
    with pytest.raises(ValueError, match=r"another run .*the rows changed"):
        compress(teacher, data, finished.model_path, compression=2, **SPLIT)
    settings = {"processing_class": word_tokenizer(), "events": 1, "compression": 2, **SPLIT}
    models = [tiny_bert(seed=seed, **WIDE, **LABELS) for seed in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, Compression, "_train_assistant", 1)
        with pytest.raises(Stopped):
            compress(models[0], make_data(), tmp_path / "slim", **settings)
    with pytest.raises(ValueError, match=r"another run .*the teacher's weights changed"):
        compress(models[1], make_data(), tmp_path / "slim", **settings)


def test_a_folder_of_another_run_or_with_other_files_is_refused(teacher, finished, tmp_path):
    with pytest.raises(ValueError, match=r"another run .*compression was 2, now 1\.5"):
        compress(teacher, make_data(), finished.model_path, compression=1.5, **SPLIT)
    with pytest.raises(ValueError, match="holds the stages of another run"):
        compress(teacher, make_data(), finished.model_path, compression=2, max_train_rows=30, **SPLIT)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        compress(teacher, make_data(), tmp_path, compression=2, **SPLIT)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from datasets import disable_progress_bars
disable_progress_bars()
from transformers import TrainerCallback
import hf_costeff.compression as module
from hf_costeff.recipes import RECIPES
from test_compression import SPLIT, few_steps, make_data
RECIPES["fast"] = few_steps
from transformers import trainer_callback
original = trainer_callback.DefaultFlowCallback.on_step_end
seen = []

def on_step_end(self, args, state, control, **kwargs):
    seen.append(1)
    if len(seen) == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, args, state, control, **kwargs)

trainer_callback.DefaultFlowCallback.on_step_end = on_step_end
module.compress(sys.argv[1], make_data(), sys.argv[2], compression=2, **SPLIT)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(teacher, finished, tmp_path):
    paths = [str(Path(__file__).parent), str(Path(hf_costeff.__file__).parents[1])]
    command = [sys.executable, "-c", KILLED, teacher, str(tmp_path / "slim"), *paths]
    codes = []
    for kill_at in (1, 4, 6, 10**9):
        environment = {**os.environ, "KILL_AT": str(kill_at)}
        codes.append(subprocess.run(command, env=environment, capture_output=True, timeout=600).returncode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0]
    expected = state_of(finished.model_path)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state_of(tmp_path / "slim").items())


# --- other ways in


def test_a_model_in_memory_is_compressed_and_left_as_it_was(tmp_path):
    """A multi-label one."""
    model = tiny_bert(**{**WIDE, "num_labels": 3, "problem_type": "multi_label_classification"}).train()
    data = make_data()
    for name, rows in data.items():
        flags = [[float(word in text) for word in ("good", "film", "dull")] for text in rows["text"]]
        data[name] = rows.remove_columns("label").add_column("label", flags)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    result = compress(
        model, data, tmp_path / "slim", processing_class=word_tokenizer(), events=1, compression=2, **SPLIT
    )
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert result.rows[0].parameters == count_parameters(model)
    slim = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert slim.config.problem_type == "multi_label_classification" and slim.config.num_labels == 3
    chances = slim.predict(torch.tensor([[2, 5, 6, 3]]), early_exit=True).probabilities
    assert chances.shape == (1, 3) and result.metric in result.rows[0].metrics


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("headless")
    tiny_bert(model_class=BertModel, **{**WIDE, "num_labels": 2}).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_teacher_without_a_head_is_fine_tuned_first_on_the_labels_of_the_data(headless, tmp_path, capsys):
    """Three text labels in files, cut by the recipe; uneven allocation, one shot, balanced classes."""
    for name, count, seed in (("train", 60, 0), ("validation", 16, 2)):
        rows = sentence_rows(count, seed)
        labels = [("bad", "so-so", "good")[index % 3] for index in range(count)]
        rows.remove_columns("label").add_column("label", labels).to_csv(tmp_path / f"{name}.csv")
    result = compress(
        headless,
        output_dir=tmp_path / "slim",
        train_file=str(tmp_path / "train.csv"),
        validation_file=str(tmp_path / "validation.csv"),
        calibration_rows=12,
        compression=2,
        events=1,
        allocation="uneven",
        balance_classes=True,
    )
    report = json.loads((result.model_path / "efficiency.json").read_text())
    out, err = capsys.readouterr()
    assert "Stages: " in err and "4/4 " in err  # bars over stages and steps
    assert out == "" and err.count("'train_runtime'") == len(report["stages"])  # logs of every stage, beside the bars
    assert next(iter(report["stages"])) == "teacher" and report["stages"]["teacher"]["steps"] == 4
    assert [name for name in report["stages"] if "slenderize" in name] == ["slenderize-01"]
    assert report["data"]["rows"]["calibration"] == 12
    model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert sorted(model.config.id2label.values()) == ["bad", "good", "so-so"]
    assert sum(model.config.num_attention_heads) == 2 * result.plan.widths.num_attention_heads[0]
    assert sum(model.config.intermediate_size) == 2 * result.plan.widths.intermediate_size[0]
    tuned = BertForSequenceClassification.from_pretrained(result.model_path / "stages" / "teacher")
    assert tuned.config.id2label == model.config.id2label


def test_a_teacher_without_a_head_is_refused_if_it_may_not_be_fine_tuned(headless, tmp_path):
    with pytest.raises(ValueError, match=r"no classification head \(missing: classifier.*fine-tuning is switched off"):
        compress(headless, make_data(), tmp_path / "slim", fine_tune_teacher=False, **SPLIT)
    assert not (tmp_path / "slim").exists()


def test_a_bare_encoder_in_memory_is_refused_before_anything_is_written(tmp_path):
    encoder = tiny_bert(model_class=BertModel, **WIDE)
    with pytest.raises(ValueError, match="The given teacher is a BertModel, not a sequence classifier"):
        compress(encoder, make_data(), tmp_path / "slim", processing_class=word_tokenizer(), compression=2, **SPLIT)
    assert not (tmp_path / "slim").exists()


def test_unlabelled_texts_are_learned_from_the_teacher_alone(teacher, tmp_path):
    data = make_data()
    unlabelled = DatasetDict(
        train=data["train"].remove_columns("label"),
        held=data["held"].remove_columns("label"),
        validation=data["validation"],
    )
    result = compress(teacher, unlabelled, tmp_path / "slim", compression=2, events=1, precision="bf16", **SPLIT)
    report = json.loads((result.model_path / "efficiency.json").read_text())
    for stage in ("assistant", "prediction"):
        log = report["stages"][stage]["last_log"]
        assert "soft_label_loss" in log and "task_loss" not in log
    assert report["exit_config"]["calibration"]["rows"] == 16  # the teacher's answers stand in


def test_regression_goes_through_and_leaves_by_patience(tmp_path):
    model = tiny_bert(**{**WIDE, "num_labels": 1, "num_hidden_layers": 3})
    data = make_data()
    for name, rows in data.items():
        scores = [0.25 * len(text.split()) + 0.125 for text in rows["text"]]
        data[name] = rows.remove_columns("label").add_column("label", scores)
    result = compress(
        model, data, tmp_path / "slim", processing_class=word_tokenizer(), compression=2, events=1, **SPLIT
    )
    assert result.metric == "spearman" and set(result.rows[0].metrics) == {"spearman", "pearson", "mse"}
    slim = AutoModelForSequenceClassification.from_pretrained(result.model_path)
    assert slim.config.exit_config["criterion"] == "patience"
    assert slim.predict(torch.tensor([[2, 5, 6, 3]]), early_exit=True).exit_layer.item() in (2, 3)


# --- refusals


def test_an_unknown_option_is_a_type_error_that_lists_the_known_ones(teacher):
    with pytest.raises(TypeError, match=r"does not know colour, heads\. Options: allocation, .*compression"):
        compress(teacher, make_data(), colour="red", heads=2)


def test_a_decoder_is_refused_naming_the_families(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=41)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"type 'gpt2'\. Supported are encoders of type bert, roberta"):
        compress(tmp_path / "gpt2", make_data(), tmp_path / "slim")


def test_a_slim_model_cannot_be_the_teacher(finished, tmp_path):
    with pytest.raises(ValueError, match="COST-EFF model already"):
        compress(finished.model_path, make_data(), tmp_path / "slim")


def test_labels_that_disagree_with_the_teachers_are_refused(teacher, tmp_path):
    data = make_data()
    data["train"] = data["train"].remove_columns("label").add_column("label", [index % 3 for index in range(40)])
    with pytest.raises(ValueError, match=r"row 2 in split 'train' is 2|num_labels = 2"):
        compress(teacher, data, tmp_path / "slim", compression=2, **SPLIT)
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 1000}, "cannot be reached: the smallest possible is"),
        ({"num_attention_heads": 5}, "Cannot keep 5 attention heads in layer 1: it has 4"),
        ({"exit_layers": [1]}, r"`exit_layers` is \[1\]"),
        ({"metric": "bleu"}, r"The metric is 'bleu'"),
        ({"metric": "spearman"}, r"The metric is 'spearman'"),
        ({"label_column": "nothing"}, "'nothing'"),
        ({"train_split": "nowhere"}, "`train_split` is 'nowhere'"),
        ({"max_length": 600}, "`max_length` is 600"),
        ({"events": 0}, "`events` is 0"),
        ({"target_speedup": 1e6}, "A speed-up of 1e.06 cannot be reached"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained_or_written(options, message, teacher, tmp_path):
    with pytest.raises(Exception, match=message):
        compress(teacher, make_data(), tmp_path / "slim", **{"compression": 2, **SPLIT, **options})
    assert not (tmp_path / "slim").exists()


def test_a_damaged_pretrained_checkpoint_is_told_so_before_anything_is_trained_or_written(teacher, tmp_path):
    tiny_bert(**WIDE).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"12345678{")
    with pytest.raises(ValueError, match=r"The checkpoint '.*bert' cannot be loaded: .*Save it again, or copy"):
        compress(teacher, make_data(), tmp_path / "slim", compression=2, pretrained=str(tmp_path / "bert"), **SPLIT)
    assert not (tmp_path / "slim").exists()


def test_balanced_classes_need_classes(tmp_path):
    data = make_data()
    for name, rows in data.items():
        scores = [0.25 * len(text) + 0.125 for text in rows["text"]]
        data[name] = rows.remove_columns("label").add_column("label", scores)
    teacher = tiny_bert(**{**WIDE, "num_labels": 1})
    settings = {"processing_class": word_tokenizer(), "compression": 2, **SPLIT}
    with pytest.raises(ValueError, match="`balance_classes` needs single-label data; this is regression"):
        compress(teacher, data, tmp_path / "slim", balance_classes=True, **settings)
    with pytest.raises(ValueError, match="`metric` is 'mse'"):
        compress(teacher, data, tmp_path / "other", metric="mse", **settings)


# --- arguments and the plan


def plan_of(folder: Path, config: BertConfig, **options):
    config.save_pretrained(folder)
    return Compression(CompressionArguments(teacher=str(folder), output_dir="never", **options), DataArguments()).plan()


def test_a_plan_needs_the_config_alone_and_an_eighth_of_bert_base_is_an_eighth(tmp_path):
    plan = plan_of(tmp_path, BertConfig())
    assert plan.teacher_parameters == 109_483_778
    assert plan.parameters <= 109_483_778 / 8
    assert plan.parameters > 0.97 * 109_483_778 / 8
    assert plan.file_bytes == 4 * plan.parameters


def test_the_papers_widths_of_bert_base_have_the_papers_size_and_flops(tmp_path):
    plan = plan_of(tmp_path, BertConfig(), num_attention_heads=2, intermediate_size=256, embedding_rank=128)
    assert round(plan.parameters / 1e6, 2) == 13.92
    assert round(plan.teacher_flops / plan.flops, 2) == 8.79
    text = plan.describe()
    assert "13,920,024 of 109,483,778 (7.87x smaller)" in text and "8.79x fewer, before early exit" in text
    assert "55.7 MB" in text


def test_a_flops_ratio_is_kept(tmp_path):
    plan = plan_of(tmp_path, BertConfig(), flops_ratio=10)
    assert plan.teacher_flops / plan.flops >= 10
    assert plan.teacher_flops / plan.flops < 10.5


def test_compression_1_keeps_every_width(tmp_path):
    plan = plan_of(tmp_path, BertConfig(**WIDE, vocab_size=41), compression=1)
    assert plan.widths.num_attention_heads == (4, 4) and plan.widths.intermediate_size == (64, 64)
    assert plan.describe().splitlines()[2] == "embedding rank     full"


def test_without_a_target_an_eighth_is_the_target_and_widths_alone_are_a_target():
    settings = {"teacher": "x", "output_dir": "y"}
    assert CompressionArguments(**settings).compression == 8
    for target in ({"flops_ratio": 4.0}, {"num_attention_heads": 2}, {"intermediate_size": 9}, {"embedding_rank": 3}):
        assert CompressionArguments(**settings, **target).compression is None
    assert CompressionArguments(**settings).max_metric_drop == 0.5
    assert CompressionArguments(**settings, target_speedup=3.0).max_metric_drop is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 0.5}, r"`compression` is 0\.5\. It must be at least 1"),
        ({"compression": float("nan")}, "`compression` is nan"),
        ({"flops_ratio": 0.0}, "`flops_ratio` is 0"),
        ({"recipe": "slow"}, r"`recipe` is 'slow'\. It must be one of fast, paper"),
        ({"allocation": "odd"}, r"`allocation` is 'odd'\. It must be one of uniform, uneven"),
        ({"precision": "fp8"}, r"`precision` is 'fp8'\. It must be one of auto, fp32, bf16"),
        ({"exit_pooling": "max"}, r"`exit_pooling` is 'max'\. It must be one of cls, mean"),
        ({"soft_label_exit": "first"}, r"`soft_label_exit` is 'first'\. It must be one of auto, same, last"),
        ({"max_metric_drop": 1.0, "target_speedup": 2.0}, "Choose the threshold by one of them"),
        ({"max_metric_drop": -1.0}, "`max_metric_drop` is -1"),
        ({"target_speedup": 0.0}, "`target_speedup` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"seed": -1}, "`seed` is -1"),
        ({"token_replacement_rate": 1.5}, r"`token_replacement_rate` is 1\.5\. It must lie in 0\.\.1"),
    ],
)
def test_arguments_out_of_range_are_refused_with_value_and_choices(options, message):
    with pytest.raises(ValueError, match=message):
        CompressionArguments(teacher="x", output_dir="y", **options)


def test_the_arguments_are_command_line_flags():
    flags = ["--teacher", "x", "--output_dir", "y", "--exit_layers", "2", "4", "--num_attention_heads", "2"]
    (arguments,) = HfArgumentParser(CompressionArguments).parse_args_into_dataclasses(flags)
    assert arguments == CompressionArguments(teacher="x", output_dir="y", exit_layers=[2, 4], num_attention_heads=2)


def test_answers_are_classes_yes_or_no_per_label_or_values():
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    assert answers(logits, "single_label_classification").tolist() == [1, 0]
    assert answers(logits, "multi_label_classification").tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert answers(logits[:, :1], "regression").tolist() == [1.0, 2.0]
