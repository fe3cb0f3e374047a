"""The runner of an export: its formulas against the package's own, how rows travel, and what it refuses."""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import word_tokenizer
from hf_costeff import ExitConfig, onnx_runner
from hf_costeff.exit_criteria import CRITERIA, MULTI_LABEL, REGRESSION, SINGLE_LABEL, simulate_exits
from hf_costeff.exit_criteria import probabilities as torch_probabilities
from hf_costeff.onnx_runner import CONFIG, ExitRule, ExitSettings, Rows, Runner, main, probabilities, regroup

EXITS = [2, 3, 5, 6]
TEXTS = ["a good film", "the plot was not very bright", "dull", "", "a slow story but well cast"] * 3


def random_logits(problem_type: str, labels: int = 3, rows: int = 60) -> torch.Tensor:
    """Shape (rows, exits, labels), from sure of nothing to certain, with values of +-1e4 among them."""
    generator = torch.Generator().manual_seed(labels)
    logits = torch.randn(rows, len(EXITS), labels, generator=generator) * torch.logspace(-2, 1.5, rows)[:, None, None]
    logits[0] = 0
    logits[1, :, 0] = 1e4
    return logits[..., :1] if problem_type == REGRESSION else logits


PER_EXIT = {
    "entropy": [0.2, 0.5, 0.9, 0.0],
    "entropy_nats": [0.1, 0.3, 0.6, 0.0],
    "confidence": [0.9, 0.6, 0.2, 0.0],
    "margin": [0.9, 0.5, 0.2, 0.0],
}
SETTINGS = [ExitConfig(criterion=name, threshold=limits) for name, limits in PER_EXIT.items()]
SETTINGS += [ExitConfig(criterion=name, threshold=end) for name in PER_EXIT for end in (0.0, 0.5, 1.0)]
SETTINGS += [
    ExitConfig(criterion=name, threshold=limits, temperatures=[0.5, 3.0, 2, 1]) for name, limits in PER_EXIT.items()
]
SETTINGS += [ExitConfig(criterion="patience", patience=count) for count in (0, 1, 2, 3, [2, 1, 1, 0])]
SETTINGS += [ExitConfig(threshold=0.6, checked_exits=[3, 5]), ExitConfig(threshold=0.6, checked_exits=[])]
TOLERANT = [ExitConfig(criterion="patience", patience=count, tolerance=size) for count in (1, 2) for size in (0.1, 3.0)]


def replayed(logits: np.ndarray, settings: ExitSettings, problem_type: str) -> list[int]:
    """The layer every row leaves after, by the runner's rule and a plain loop."""
    rule = ExitRule(settings, len(EXITS), problem_type)
    asked = [layer for layer in EXITS if settings.checked_exits is None or layer in settings.checked_exits]
    found = []
    for row in logits:
        seen: list[np.ndarray] = []
        for index, layer in enumerate(EXITS):
            if layer in asked:
                seen.append(row[index])
            last = layer == EXITS[-1]
            if last or (layer in asked and rule.leaves(np.stack(seen)[None], index)[0]):
                found.append(layer)
                break
    return found


# --- the formulas, against the package's


@pytest.mark.parametrize(
    ("problem_type", "settings"),
    [(kind, settings) for kind in (SINGLE_LABEL, MULTI_LABEL) for settings in SETTINGS]
    + [(REGRESSION, settings) for settings in TOLERANT],
)
def test_rows_leave_where_the_package_lets_them_leave(problem_type, settings):
    logits = random_logits(problem_type)
    expected = [EXITS[index] for index in simulate_exits(logits, settings, EXITS, problem_type)]
    own = ExitSettings.from_dict(settings.to_dict())
    assert replayed(logits.numpy(), own, problem_type) == expected


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
@pytest.mark.parametrize("name", PER_EXIT)
def test_a_measure_is_the_packages_to_rounding(problem_type, name):
    logits = random_logits(problem_type)[:, 0]
    settings = ExitConfig(criterion=name, threshold=0.5, temperatures=1.7)
    expected = CRITERIA[name](settings, 1, problem_type).measured(logits, 0)
    scaled = ExitRule(ExitSettings.from_dict(settings.to_dict()), 1, problem_type).scaled(logits.numpy(), 0)
    found = onnx_runner.MEASURES[name].of(onnx_runner.decision_log_probabilities(scaled, problem_type))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
def test_probabilities_are_the_packages(problem_type):
    logits = random_logits(problem_type)[:, 0]
    expected = torch_probabilities(logits, problem_type).numpy()
    np.testing.assert_allclose(probabilities(logits.numpy(), problem_type), expected, atol=1e-6)


SAVED = {"criterion": "confidence", "threshold": 0.8, "temperatures": [1, 2, 3, 4], "checked_exits": [3]}
WRONG = [
    {"criterion": "guess"},
    {"threshold": 1.5},
    {"threshold": -0.1},
    {"threshold": True},
    {"threshold": "0.5"},
    {"threshold": [0.5, 2]},
    {"threshold": 0.5, "temperatures": 0},
    {"threshold": 0.5, "limit": 3},
    {"criterion": "patience", "patience": 0.5},
    {"criterion": "patience", "patience": -1},
    {"criterion": "patience", "patience": 1, "tolerance": -1},
]


@pytest.mark.parametrize("early_exit", [None, False, True, 0.3, 0, 1, 7])
@pytest.mark.parametrize("saved", [None, SAVED])
def test_early_exit_means_what_it_means_to_the_package(early_exit, saved):
    if early_exit is True and saved is None:
        with pytest.raises(ValueError, match="there are none"):
            ExitSettings.resolve(early_exit, saved)
        return
    expected = ExitConfig.resolve(early_exit, saved)
    found = ExitSettings.resolve(early_exit, saved)
    assert (found and vars(found)) == (expected and vars(expected))


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_settings_that_the_package_refuses_are_refused(values):
    with pytest.raises(ValueError):
        ExitConfig.from_dict(values)
    with pytest.raises(ValueError):
        ExitSettings.resolve(values, None)


@pytest.mark.parametrize("name", ["entropy", "entropy_nats", "confidence", "margin"])
def test_a_threshold_is_compared_in_double_precision(name):
    """A row next to it leaves on the far side alone, though single precision cannot tell the two."""
    history = np.array([[[1.0, 0.3, 0.1]]], np.float32)
    rule = ExitRule(ExitSettings(name, threshold=0.5), 2, SINGLE_LABEL)
    value = float(rule.measure.of(onnx_runner.decision_log_probabilities(history[:, -1], SINGLE_LABEL))[0])
    found = []
    for threshold in (math.nextafter(value, 0), value, math.nextafter(value, math.inf)):
        rule = ExitRule(ExitSettings(name, threshold=threshold), 2, SINGLE_LABEL)
        found.append(rule.leaves(history, 0).tolist()[0])
    assert found == ([False, False, True] if name.startswith("entropy") else [True, False, False])


def test_settings_that_need_a_number_say_so():
    with pytest.raises(ValueError, match="needs `threshold`"):
        ExitSettings(criterion="margin")
    with pytest.raises(ValueError, match="needs `patience`"):
        ExitSettings(criterion="patience")
    with pytest.raises(ValueError, match="has 2 entries and the model has 4 exits"):
        ExitRule(ExitSettings(threshold=[0.1, 0.2]), 4, SINGLE_LABEL)
    with pytest.raises(ValueError, match="needs class probabilities"):
        ExitRule(ExitSettings(threshold=0.5), 4, REGRESSION)
    with pytest.raises(ValueError, match="needs `tolerance`"):
        ExitRule(ExitSettings(criterion="patience", patience=1), 4, REGRESSION)
    with pytest.raises(TypeError, match="early_exit is 'yes'"):
        ExitSettings.resolve("yes", None)


# --- how rows travel, with graphs of plain numpy


class FakeGraph:
    """Stands for a graph: the logits follow from a row's real tokens and the layer, and it notes what it was given."""

    def __init__(self, layer: int, first: bool) -> None:
        self.layer = layer
        self.first = first
        self.broken = False
        self.shapes: list[tuple[int, int]] = []

    def get_inputs(self) -> list[SimpleNamespace]:
        states = "input_ids" if self.first else "hidden_states"
        return [SimpleNamespace(name=name) for name in (states, "attention_mask")]

    def run(self, names: None, given: dict[str, Any]) -> list[np.ndarray]:
        mask = given["attention_mask"]
        states = given["input_ids"].astype(np.float32) if self.first else given["hidden_states"][..., 0]
        assert states.shape == mask.shape
        self.shapes.append(mask.shape)
        total = (states * mask).sum(1)
        logits = np.stack([np.sin(total * self.layer), np.cos(total * 3 + self.layer), total * 0], 1) * self.layer
        if self.broken:
            logits[-1, 0] = np.nan
        return [logits.astype(np.float32), np.repeat(states[..., None], 2, -1).astype(np.float32)]


def write_folder(folder: Path, **changes: Any) -> Path:
    settings = {
        "segments": [{"exit_layer": layer, "file": f"segment_{layer:02d}.onnx"} for layer in EXITS],
        "exit_layers": EXITS,
        "inputs": ["input_ids", "attention_mask"],
        "num_labels": 3,
        "id2label": {"0": "bad", "1": "fair", "2": "good"},
        "problem_type": SINGLE_LABEL,
        "exit_config": None,
        "max_length": 24,
    }
    (folder / CONFIG).write_text(json.dumps({**settings, **changes}))
    word_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    for layer in EXITS:
        (folder / f"segment_{layer:02d}.onnx").touch()
    return folder


@pytest.fixture
def graphs(monkeypatch) -> dict[int, FakeGraph]:
    made: dict[int, FakeGraph] = {}

    def open_fake(file: Path, threads: int | None) -> FakeGraph:
        layer = int(file.stem.split("_")[1])
        return made.setdefault(layer, FakeGraph(layer, first=not made))

    monkeypatch.setattr(onnx_runner, "open_session", open_fake)
    return made


@pytest.fixture
def runner(tmp_path, graphs) -> Runner:
    return Runner(write_folder(tmp_path))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_an_answer_does_not_depend_on_the_batch(runner, batch_size):
    alone = [runner.predict([text], 0.7)[0] for text in TEXTS]
    assert len({answer["exit_layer"] for answer in alone}) > 1
    assert runner.predict(TEXTS, 0.7, batch_size=batch_size) == alone


def test_windows_do_not_change_answers(runner, monkeypatch):
    expected = runner.predict(TEXTS, 0.7)
    monkeypatch.setattr(onnx_runner, "WINDOW", 4)
    assert runner.predict(TEXTS, 0.7) == expected


def test_survivors_of_several_batches_run_together_and_are_cropped(runner, graphs):
    layers = [answer["exit_layer"] for answer in runner.predict(TEXTS, 0.7, batch_size=4)]
    lengths = [len(row["input_ids"]) for row in runner.tokenize(TEXTS)]
    for before, layer in itertools.pairwise(EXITS):
        running = sorted((n for n, left in zip(lengths, layers, strict=True) if left > before), reverse=True)
        batches = [running[start : start + 4] for start in range(0, len(running), 4)]
        assert sorted(graphs[layer].shapes) == sorted((len(batch), batch[0]) for batch in batches)


@pytest.mark.parametrize(("early_exit", "layers"), [(None, {6}), (False, {6}), (0, {6}), (1, {2}), (1.0, {2})])
def test_nobody_or_everybody_leaves_early(runner, early_exit, layers):
    assert {answer["exit_layer"] for answer in runner.predict(TEXTS, early_exit)} == layers


def test_a_batch_that_has_left_runs_no_deeper_graph(runner, graphs):
    runner.predict(TEXTS, 1)
    assert graphs[2].shapes and not graphs[3].shapes


def test_saved_settings_are_the_default(tmp_path, graphs):
    saved = {"criterion": "margin", "threshold": 0.4}
    runner = Runner(write_folder(tmp_path, exit_config=saved))
    expected = runner.predict(TEXTS, saved)
    assert runner.predict(TEXTS) == runner.predict(TEXTS, True) == expected != runner.predict(TEXTS, False)


def test_scores_are_tempered_and_logits_are_raw(runner):
    (answer,) = runner.predict(["a good film"], {"threshold": 0.0, "temperatures": [1, 1, 1, 4.0]})
    expected = torch.softmax(torch.tensor(answer["logits"]) / 4, -1)
    assert answer["score"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert answer["label"] == ["bad", "fair", "good"][int(expected.argmax())]


def test_no_rows_have_no_answers(runner):
    assert runner.predict([], 0.5) == []


def test_regroup_keeps_the_order_and_pads_with_zeros():
    def rows(number: int, length: int) -> Rows:
        return Rows([number], [length], {"x": np.full((1, 5, 2), number)}, np.full((1, 1, 3), number))

    first, second = regroup([rows(7, 3), rows(8, 2), rows(9, 1)], batch_size=2)
    assert first.numbers == [7, 8] and second.numbers == [9]
    assert first.states["x"][..., 0].tolist() == [[7, 7, 7], [8, 8, 0]] and second.states["x"].shape == (1, 1, 2)
    assert second.seen.tolist() == [[[9, 9, 9]]]


def test_pairs_and_long_texts_are_tokenized_as_the_tokenizer_does(runner):
    pairs = [("a good film", "the plot was dull"), ("dull", "a " * 100_000)]
    expected = word_tokenizer()([p[0] for p in pairs], [p[1] for p in pairs], truncation=True, max_length=24)
    found = runner.tokenize(pairs)
    for name in ("input_ids", "token_type_ids"):
        assert [row[name] for row in found] == expected[name]
    assert {answer["exit_layer"] for answer in runner.predict(pairs)} == {6}


# --- what is wrong


@pytest.mark.parametrize("texts", [["a", None], ["a", 3], ["a", ("a", "b", "c")], ["a", ("b", None)], ["a", {}]])
def test_a_row_that_is_no_text_is_named(runner, texts):
    with pytest.raises(ValueError, match="Row 1 is "):
        runner.predict(texts)


def test_one_text_is_not_a_list_of_texts(runner):
    with pytest.raises(TypeError, match="Pass a list"):
        runner.predict("a good film")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_a_thread_count_below_1_is_refused(tmp_path, graphs, threads):
    with pytest.raises(ValueError, match=r"`threads` is .* 1 or more"):
        Runner(write_folder(tmp_path), threads=threads)


def test_a_batch_size_of_0_is_refused(runner):
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        runner.predict(TEXTS, batch_size=0)


@pytest.mark.parametrize("name", [CONFIG, "segment_03.onnx"])
def test_a_folder_with_a_missing_file_is_refused_at_once(tmp_path, graphs, name):
    (write_folder(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        Runner(tmp_path)


def test_without_a_tokenizer_tokens_are_still_answered(tmp_path, graphs):
    (write_folder(tmp_path) / "tokenizer.json").unlink()
    runner = Runner(tmp_path)
    assert runner.predict_tokens([{"input_ids": [2, 5, 3]}])[0]["exit_layer"] == 6
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        runner.predict(["a"])


@pytest.mark.parametrize("length", [0, 25])
def test_a_row_without_tokens_or_with_too_many_is_refused(runner, length):
    with pytest.raises(ValueError, match=f"Row 1 has {length} tokens. It must have 1 to 24"):
        runner.predict_tokens([{"input_ids": [2]}, {"input_ids": [2] * length}])


def test_a_bad_row_of_a_later_window_has_its_own_number(runner, monkeypatch):
    monkeypatch.setattr(onnx_runner, "WINDOW", 2)
    with pytest.raises(ValueError, match="Row 3 has 25 tokens"):
        runner.predict_tokens([{"input_ids": [2] * length} for length in (1, 2, 3, 25)])


def test_settings_that_ask_an_exit_without_a_graph_are_refused(tmp_path, graphs):
    segments = [{"exit_layer": layer, "file": f"segment_{layer:02d}.onnx"} for layer in (3, 6)]
    runner = Runner(write_folder(tmp_path, segments=segments))
    with pytest.raises(ValueError, match=r"ask the exits after layers \[2, 5\].* layers \[3, 6\]"):
        runner.predict(TEXTS, 0.5)
    layers = {answer["exit_layer"] for answer in runner.predict(TEXTS, {"threshold": 0.7, "checked_exits": [3]})}
    assert layers == {3, 6}


def test_logits_that_are_not_finite_are_an_error_that_names_the_row(runner, graphs):
    graphs[3].broken = True
    with pytest.raises(ValueError, match="row 0 after layer 3 are not finite"):
        runner.predict(["a good film"], 0.0)


def test_a_graph_that_onnxruntime_cannot_run_names_the_file_and_the_remedy(tmp_path, monkeypatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("Could not find an implementation for MatMulInteger(10)")

    class Options:
        def add_session_config_entry(self, name: str, value: str) -> None:
            pass

    fake = SimpleNamespace(__version__="1.0", SessionOptions=Options, InferenceSession=refuse)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(ValueError, match=r"cannot run segment_02\.onnx: .*MatMulInteger.*without --int8"):
        Runner(write_folder(tmp_path))


def test_without_onnxruntime_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        Runner(write_folder(tmp_path))


# --- the program


@pytest.fixture
def program(tmp_path, graphs, monkeypatch) -> Path:
    monkeypatch.setattr(onnx_runner, "__file__", str(write_folder(tmp_path) / "runner.py"))
    return tmp_path


def printed(capsys) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_program_answers_texts_from_the_command_line_and_from_lines(program, capsys, monkeypatch):
    expected = Runner(program).predict(TEXTS[:3], 0.7)
    assert main(["--early_exit", "0.7", *TEXTS[:3]]) == 0 and printed(capsys) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{text}\n" for text in TEXTS[:3])))
    assert main(["--early_exit", "0.7", "--batch_size", "2"]) == 0 and printed(capsys) == expected


def test_the_program_answers_pairs(program, capsys):
    assert main(["--pairs", "--early_exit", "false", "a film\ta plot"]) == 0
    assert printed(capsys) == Runner(program).predict([("a film", "a plot")], False)


@pytest.mark.parametrize("words", [["--threads", "0"], ["--early_exit", "true"], ["--batch_size", "0"]])
def test_a_mistake_is_one_line_and_status_1(program, capsys, words):
    assert main([*words, "a"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("runner: ") and "Traceback" not in err


def test_the_runner_imports_nothing_but_numpy_onnxruntime_and_tokenizers():
    roots = set()
    for node in ast.walk(ast.parse(Path(onnx_runner.__file__).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "tokenizers"}
