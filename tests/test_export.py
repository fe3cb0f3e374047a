"""An export answers as the model does, alone in its folder, or it is not kept."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers import sentence_rows, tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff import BlockShape, ExitConfig, export, export_onnx, onnx_runner, pack, predict_texts, prune_blocks
from hf_costeff.cli import main
from hf_costeff.commands.export import describe_int8
from hf_costeff.efficiency import Latency
from hf_costeff.export import Int8Loss
from hf_costeff.onnx_runner import CONFIG, Runner

TEXTS = [*sentence_rows(20)["text"], "", "a good film"]
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))
NAMES = {0: "bad", 1: "fair", 2: "good"}
SAVED = ExitConfig(threshold=[0.6, 0.4, 0.7, 0.0], temperatures=[1.5, 1, 1, 2])


def slim(**changes: Any) -> Any:
    return tiny_model(seed=3, id2label=NAMES, label2id={name: index for index, name in NAMES.items()}, **changes)


@pytest.fixture(scope="module")
def model() -> Any:
    return slim(exit_config=SAVED.to_dict())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return export_onnx(model, word_tokenizer(), tmp_path_factory.mktemp("onnx")).folder


def expected_answers(model: Any, texts: list[Any], early_exit: Any) -> list[dict[str, Any]]:
    return list(predict_texts(model, word_tokenizer(), texts, early_exit=early_exit, show_progress=False))


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(a["label"], a["exit_layer"]) for a in found] == [(a["label"], a["exit_layer"]) for a in expected]
    scores = [torch.tensor([answer["score"] for answer in answers]) for answers in (found, expected)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


# --- the same answers


@pytest.mark.parametrize(
    "early_exit",
    [
        None,
        True,
        False,
        0.7,
        0,
        1,
        ExitConfig(criterion="entropy_nats", threshold=0.4),
        ExitConfig(criterion="confidence", threshold=[0.93, 0.9, 0.6, 0.0], temperatures=0.7),
        ExitConfig(criterion="margin", threshold=0.8, checked_exits=[2, 3]),
        ExitConfig(criterion="patience", patience=1),
        ExitConfig(criterion="patience", patience=1, checked_exits=[1, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_the_runner_answers_as_the_model_does(model, folder, texts, early_exit):
    settings = early_exit.to_dict() if isinstance(early_exit, ExitConfig) else early_exit
    found = Runner(folder, threads=1).predict(texts, settings, batch_size=6)
    assert_same(found, expected_answers(model, texts, early_exit))
    if not isinstance(early_exit, (bool, int)):
        assert len({answer["exit_layer"] for answer in found}) > 1


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"problem_type": "multi_label_classification"}, ExitConfig(threshold=0.9)),
        ({"num_labels": 1, "id2label": {0: "v"}}, ExitConfig(criterion="patience", patience=1, tolerance=0.5)),
        ({"exit_pooling": "mean", "embedding_rank": 5}, ExitConfig(threshold=0.7)),
        (
            {"position_offset": 1, "pad_token_id": 0, "type_vocab_size": 0, "exit_layers": [2, 4]},
            ExitConfig(threshold=0.55),
        ),
        ({"hidden_act": "relu", "num_attention_heads": 1, "exit_layers": [4]}, False),
        ({"num_attention_heads": 0, "intermediate_size": 0, "exit_pooling": "mean"}, ExitConfig(threshold=0.5)),
    ],
    ids=["multi-label", "regression", "mean pooling and rank", "positions from padding", "one exit", "no widths"],
)
def test_every_kind_of_model_is_exported(tmp_path, changes, settings):
    own = tiny_model(seed=3, **changes)
    done = export_onnx(own, word_tokenizer(), tmp_path)
    assert done.stops == own.config.exit_layers and done.max_difference < 1e-4
    found = Runner(tmp_path, threads=1).predict(TEXTS, settings.to_dict() if settings else settings)
    assert_same(found, expected_answers(own, TEXTS, settings))
    assert settings is False or len({answer["exit_layer"] for answer in found}) > 1


def test_graphs_end_at_the_checked_exits_alone(tmp_path):
    own = slim(exit_config={"threshold": 0.7, "checked_exits": [2]})
    assert export_onnx(own, word_tokenizer(), tmp_path).stops == [2, 4]
    assert sorted(file.name for file in tmp_path.glob("*.onnx")) == ["segment_02.onnx", "segment_04.onnx"]
    runner = Runner(tmp_path, threads=1)
    for early_exit in (None, 0.5, False):
        assert_same(runner.predict(TEXTS, early_exit), expected_answers(own, TEXTS, early_exit))
    with pytest.raises(ValueError, match=r"ask the exits after layers \[1, 3\]"):
        runner.predict(TEXTS, {"threshold": 0.5})


def test_an_exit_whose_saved_threshold_lets_nobody_leave_can_still_be_asked(tmp_path):
    own = slim(exit_config={"threshold": [0.0, 0.4, 0.7, 0.0]})
    assert export_onnx(own, word_tokenizer(), tmp_path).stops == [1, 2, 3, 4]
    runner = Runner(tmp_path, threads=1)
    for early_exit, shallowest in ((True, 2), (0.3, 1)):
        found = runner.predict(TEXTS, early_exit)
        assert_same(found, expected_answers(own, TEXTS, early_exit))
        assert min(answer["exit_layer"] for answer in found) == shallowest


def test_saved_settings_that_do_not_fit_are_refused(tmp_path):
    own = slim(exit_config={"threshold": 0.5, "checked_exits": [2, 9]})
    with pytest.raises(ValueError, match=r"layers without an exit: \[9\]"):
        export_onnx(own, word_tokenizer(), tmp_path / "onnx")


def test_a_graph_holds_its_own_layers_and_no_empty_matrix(folder):
    sizes = {}
    for file in sorted(folder.glob("*.onnx")):
        shapes = [list(weight.dims) for weight in onnx.load(file).graph.initializer]
        assert all(0 not in shape for shape in shapes)
        sizes[file.stem] = sum(41 in shape for shape in shapes)
    assert sizes == {"segment_01": 1, "segment_02": 0, "segment_03": 0, "segment_04": 0}  # the word table


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "hf_costeff", "onnx"):
    sys.modules[name] = None
from runner import Runner
print([(answer["label"], answer["exit_layer"]) for answer in Runner(threads=1).predict(sys.argv[1:], 0.7)])
"""


def test_the_folder_works_where_neither_torch_nor_this_package_is(model, folder, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    texts = TEXTS[:5]
    expected = [(answer["label"], answer["exit_layer"]) for answer in expected_answers(model, texts, 0.7)]
    code = [sys.executable, "-c", WITHOUT_TORCH, *texts]
    run = subprocess.run(code, capture_output=True, text=True, timeout=300, cwd=moved)
    assert run.stdout == f"{expected}\n", run.stderr


def test_the_runner_ends_quietly_where_nobody_reads_on(folder):
    command = f"yes a film | head -3000 | {sys.executable} runner.py | head -1; echo ${{PIPESTATUS[2]}}"
    found = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    answer, status = found.stdout.splitlines()
    assert "label" in json.loads(answer) and (status, found.stderr) == ("141", "")


def test_the_model_is_left_as_it_was(tmp_path):
    own = slim().train().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    settings = own.config.to_dict()
    export_onnx(own, word_tokenizer(), tmp_path)
    assert own.training and own.config.to_dict() == settings and own.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())


def test_an_earlier_export_is_replaced(model, folder, tmp_path):
    export_onnx(model, word_tokenizer(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    export_onnx(slim(exit_layers=[3, 4]), word_tokenizer(), tmp_path)
    graphs = {"segment_03.onnx", "segment_04.onnx"}
    assert {file.name for file in tmp_path.iterdir()} == graphs | {CONFIG, "tokenizer.json", "runner.py", "notes.txt"}


# --- int8


def test_int8_graphs_are_saved_and_answer_nearly_alike(model, tmp_path):
    done = export_onnx(model, word_tokenizer(), tmp_path, int8=True, rows=token_rows(30))
    for file in tmp_path.glob("*.onnx"):
        graph = onnx.load(file).graph
        kinds = {node.op_type for node in graph.node}
        assert kinds & {"MatMulInteger", "DynamicQuantizeLinear"}
        assert any(weight.data_type == onnx.TensorProto.INT8 for weight in graph.initializer)
        words = [weight.data_type for weight in graph.initializer if 41 in weight.dims]
        assert words == [onnx.TensorProto.UINT8] * (file.name == "segment_01.onnx")
    found = Runner(tmp_path, threads=1).predict(TEXTS, False)
    expected = Runner(tmp_path, threads=1).predict(TEXTS, False)
    assert found == expected
    exact = torch.tensor([answer["score"] for answer in expected_answers(model, TEXTS, False)])
    scores = torch.tensor([answer["score"] for answer in found])
    assert 0 < (scores - exact).abs().max() < 0.1
    loss = done.int8_loss
    assert loss.rows == 30 and loss.agreement > 0.9 and loss.metrics_fp32.keys() == loss.metrics_int8.keys()


def test_a_packed_model_exports_in_8_bits_too(tmp_path):
    masked = slim(exit_config=SAVED.to_dict())
    packed = pack(masked, prune_blocks(masked, BlockShape(columns=4), ratio=0.5)).eval()
    done = export_onnx(packed, word_tokenizer(), tmp_path, int8=True, rows=token_rows(30))
    assert done.int8_loss.agreement > 0.9
    exact = torch.tensor([answer["score"] for answer in expected_answers(packed, TEXTS, False)])
    scores = torch.tensor([answer["score"] for answer in Runner(tmp_path).predict(TEXTS, False)])
    assert 0 < (scores - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("changes", "label", "metric"),
    [
        ({"problem_type": "multi_label_classification"}, lambda number: [1.0, float(number % 2), 0.0], "f1"),
        ({"num_labels": 1, "id2label": {0: "value"}}, float, "spearman"),
    ],
    ids=["multi-label", "regression"],
)
def test_what_int8_changed_is_measured_for_every_problem_type(tmp_path, changes, label, metric):
    rows = token_rows(20)
    rows = rows.remove_columns("labels").add_column("labels", [label(number) for number in range(20)])
    loss = export_onnx(tiny_model(seed=3, **changes), word_tokenizer(), tmp_path, int8=True, rows=rows).int8_loss
    assert metric in loss.metrics_int8
    assert loss.agreement is None if metric == "spearman" else 0 < loss.agreement <= 1


def test_a_promise_for_the_exact_weights_is_not_made_for_int8(tmp_path):
    own = slim(exit_config={**SAVED.to_dict(), "calibration": {"rows": 5}})
    for int8, kept in ((False, {"rows": 5}), (True, None)):
        export_onnx(own, word_tokenizer(), tmp_path, int8=int8)
        settings = json.loads((tmp_path / CONFIG).read_text())["exit_config"]
        assert settings.get("calibration") == kept and settings["threshold"] == SAVED.threshold
    assert own.config.exit_config["calibration"] == {"rows": 5}


def test_int8_without_rows_measures_nothing(model, tmp_path):
    assert export_onnx(model, word_tokenizer(), tmp_path, int8=True).int8_loss is None


@pytest.mark.parametrize(
    ("int8_ms", "said"), [(5.0, "int8 is 2.00 times as fast as fp32"), (20.0, "no gain here: 0.50 times as fast")]
)
def test_what_int8_changed_is_said_beside_its_speed(int8_ms, said):
    times = Latency(10.0, 11.0, 5), Latency(int8_ms, int8_ms, 5)
    loss = Int8Loss(40, 0.975, {"accuracy": 0.9}, {"accuracy": 0.875}, *times)
    text = describe_int8(loss)
    assert said in text and "97.50% of the answers are the same; accuracy 0.9000 -> 0.8750" in text
    assert "answers" not in describe_int8(Int8Loss(40, None, None, None, *times))


# --- what is not kept, and what is refused


def test_graphs_that_answer_otherwise_are_not_kept(model, folder, tmp_path, monkeypatch):
    def perturbed(own: Any) -> Any:
        plain = original(own)
        plain.exits["2"].classifier.bias.data[0] += 3e-4 * scale
        return plain

    original = export.plain_model
    monkeypatch.setattr(export, "plain_model", perturbed)
    scale = 0.1
    export_onnx(model, word_tokenizer(), tmp_path / "rounding")
    scale = 100
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"differs by|leave after layers"):
        export_onnx(model, word_tokenizer(), tmp_path / "old")
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["notes.txt"]


def test_graphs_whose_rows_leave_elsewhere_are_not_kept(model, tmp_path, monkeypatch):
    entropy = onnx_runner.MEASURES["entropy"]
    surer = dataclasses.replace(entropy, of=lambda log_probabilities: entropy.of(log_probabilities) / 2)
    monkeypatch.setitem(onnx_runner.MEASURES, "entropy", surer)
    with pytest.raises(ValueError, match=r"let rows leave after layers \[1, .* and the model after"):
        export_onnx(model, word_tokenizer(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_models_own_folder_is_no_place_for_an_export(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a model"):
        export_onnx(model, word_tokenizer(), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_model_or_tokenizer_that_cannot_travel_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no exits to export\. Compress it first"):
        export_onnx(tiny_bert(), word_tokenizer(), tmp_path / "onnx")
    left = word_tokenizer()
    left.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the left"):
        export_onnx(model, left, tmp_path / "onnx")

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=word_tokenizer().backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(ValueError, match="slow tokenizer"):
        export_onnx(model, slow, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_library_is_named_with_the_remedy(model, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs {name}, .*`pip install onnx onnxruntime`"):
        export_onnx(model, word_tokenizer(), tmp_path)


# --- the command


@pytest.fixture
def saved(model, tmp_path) -> str:
    model.save_pretrained(tmp_path / "slim")
    word_tokenizer().save_pretrained(tmp_path / "slim")
    return str(tmp_path / "slim")


def test_the_command_exports_and_says_what_was_checked(saved, tmp_path, capsys):
    assert main(["export", saved, "--format", "onnx", "--output_dir", str(tmp_path / "onnx")]) == 0
    out = capsys.readouterr().out
    assert "4 graphs" in out and "same exits as the model" in out
    assert Runner(tmp_path / "onnx").predict(["a"])[0]["label"] in NAMES.values()


def test_the_command_measures_int8_on_a_split(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = sentence_rows(30)
    rows = rows.add_column("verdict", [NAMES[label] for label in rows["label"]]).remove_columns("label")
    rows.to_json(tmp_path / "rows.jsonl")
    words = ["--int8", "--validation_file", str(tmp_path / "rows.jsonl")]
    words += ["--label_column", "verdict"]
    assert main(["export", saved, "--output_dir", str(tmp_path / "onnx"), *words]) == 0
    out = capsys.readouterr().out
    assert "on 30 rows at full depth" in out and "accuracy" in out and "times as fast" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "torchscript"], "`--format` is 'torchscript'"),
        (["--split", "validation"], "Give --int8 too"),
        (["--validation_file", "rows.csv"], "`--validation_file` names rows to measure int8 on, and int8 is off"),
        (["--int8", "--split", "nowhere", "--dataset", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_in_the_call_is_named(saved, tmp_path, capsys, words, message):
    assert main(["export", saved, "--output_dir", str(tmp_path / "onnx"), *words]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "onnx").exists()


def test_the_folder_says_what_it_is(folder):
    settings = json.loads((folder / CONFIG).read_text())
    assert settings["exit_config"] == SAVED.to_dict() and settings["max_length"] == 24
    assert settings["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
