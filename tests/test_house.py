"""The rules of the house, checked on the source files themselves."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_imports

import hf_costeff
from helpers import balance_gates, random_batch, tiny_model
from hf_costeff import ExitConfig

SOURCE = Path(hf_costeff.__file__).parent

# Imports point down only: a file may import files of its own tier or a lower one.
TIERS = {
    0: "configuration_costeff exit_criteria exit_heads encoder_layers exiting_rows hub promises modeling_outputs "
    "modeling_costeff pipeline_costeff skip_gates packed_linear configuration_cascade modeling_cascade",
    1: "augmentation conversion gating importance slenderization losses block_pruning packing efficiency calibration "
    "calibration_goals exit_replay guarantees metrics group_outcomes exit_quality monitoring cascade_costs "
    "skip_diagnostics teacher",
    2: "markdown training_args regularizer block_training skip_training trainer checkpoints checksums mask_files data "
    "columns evaluation recipes distillation compression_args stages staged_run compression block_compression "
    "layer_skipping report exit_report charts prediction difficulty model_card onnx_runner export benchmarking "
    "benchmark_report exit_times cascade cascade_training",
    3: "commands cli",
}
TIER = {name: tier for tier, names in TIERS.items() for name in names.split()}
TOP = ("__init__", "__main__")  # may import everything

ON_THE_HUB = {"torch", "transformers", "huggingface_hub"}
GLUE = {"accelerate", "datasets", "evaluate", "matplotlib", "peft"}
GLUE_NAMES = {"Trainer", "TrainingArguments", "AutoTokenizer", "PreTrainedTokenizerBase", "HfArgumentParser"}

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def unit_of(file: Path) -> str:
    """What the tiers speak of: a file, or a folder as a whole."""
    return Path(file.relative_to(SOURCE).parts[0]).stem


TIER_0 = [file for file in FILES if TIER.get(unit_of(file)) == 0]
TIER_1 = [file for file in FILES if TIER.get(unit_of(file)) == 1]


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(file: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every import anywhere in the file; level 0 is absolute, 1 is a sibling."""
    found = []
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def siblings(file: Path) -> set[str]:
    """Names of the package's own files that this file imports, however it writes the import; a folder is one file."""
    found = set()
    for level, module, names in imports(file):
        if 0 < level < len(file.relative_to(SOURCE).parts):
            continue  # inside one folder
        if level:
            found |= {module.split(".")[0]} if module else set(names)
        elif module.split(".")[0] == "hf_costeff":
            found |= {module.split(".")[1]} if "." in module else set(names) or {"__init__"}
    return found


def roots(file: Path) -> set[str]:
    """Top-level names of the absolute imports that are not in the standard library."""
    found = {module.split(".")[0] for level, module, _ in imports(file) if level == 0}
    return found - set(sys.stdlib_module_names)


def test_every_file_has_a_tier():
    homeless = [name_of(file) for file in FILES if unit_of(file) not in TIER and unit_of(file) not in TOP]
    assert not homeless, f"Give these files a tier in {Path(__file__).name}: {homeless}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down_only(file):
    if unit_of(file) in TOP:
        return
    upward = [name for name in siblings(file) if TIER.get(name, 4) > TIER[unit_of(file)]]
    assert not upward, f"{name_of(file)} (tier {TIER[unit_of(file)]}) imports {upward} from above."


def test_no_two_files_import_each_other():
    graph: dict[str, set[str]] = {}
    for file in FILES:
        if unit_of(file) not in TOP:
            graph.setdefault(unit_of(file), set()).update(siblings(file))

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"Circular import: {' -> '.join((*path, name))}"
        for other in graph.get(name, ()):
            visit(other, (*path, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("file", TIER_0, ids=name_of)
def test_a_file_that_travels_to_the_hub_imports_only_what_is_there(file):
    assert file.parent == SOURCE, "Hub files are flat siblings."
    assert roots(file) <= ON_THE_HUB
    for level, module, names in imports(file):
        assert level in (0, 1), f"from {'.' * level}{module}: only `from .name import X` travels."
        assert level == 0 or (module and "." not in module and names), "Write `from .name import X`."
        assert module.split(".")[0] != "hf_costeff"


@pytest.mark.parametrize("file", TIER_0, ids=name_of)
def test_the_hubs_own_reading_of_relative_imports_agrees(file):
    """`save_pretrained` finds them by a regular expression, so text inside strings or comments would mislead it."""
    assert set(get_relative_imports(file)) == siblings(file)


@pytest.mark.parametrize("file", TIER_1, ids=name_of)
def test_arithmetic_needs_no_trainer_files_or_tokenizer(file):
    assert not roots(file) & GLUE
    used = {name for level, module, names in imports(file) if level == 0 and module == "transformers" for name in names}
    assert not used & GLUE_NAMES


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_has_at_most_700_lines(file):
    assert len(file.read_text().splitlines()) <= 700


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_function_has_at_most_50_lines(file):
    functions = [node for node in ast.walk(parsed(file)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    too_long = {function.name: code_lines(function) for function in functions if code_lines(function) > 50}
    assert not too_long


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_is_printed(file):
    if unit_of(file) == "cli":  # the one place whose output is for the terminal
        return
    calls = [node for node in ast.walk(parsed(file)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert [call.lineno for call in calls if call.func.id == "print"] == []


def run_python(code: str, *arguments: object) -> str:
    """What a fresh process prints; its errors where it fails."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return run.stdout if run.returncode == 0 else run.stderr


def test_importing_the_package_never_imports_peft():
    """Nor may it import anything that does, as Transformers' Trainer."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import hf_costeff; print('peft' in sys.modules)"
    assert run_python(code, SOURCE.parent) == "False\n"


def test_every_public_name_is_there():
    assert sorted(name for name in hf_costeff.__all__ if not hasattr(hf_costeff, name)) == []


PACKED = {
    "layers.3.feed_forward.output": {
        **{"along": "columns", "slabs": [8, 8], "kept": [5, 12]},
        **{"block": [1, 8], "layout": "panels"},
    }
}

WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["hf_costeff"] = None  # any import of it fails
sys.path.insert(0, sys.argv[1])
from hub_files.modeling_costeff import CostEffForSequenceClassification
from transformers import AutoModel, AutoModelForSequenceClassification

expected = torch.load("expected.pt")
for model_class, settings in (
    (CostEffForSequenceClassification, {}),
    (AutoModelForSequenceClassification, {"trust_remote_code": True}),
    (AutoModel, {"trust_remote_code": True}),
):
    model, report = model_class.from_pretrained("model", output_loading_info=True, **settings)
    assert not any(report.values()), report
    assert type(model).__module__.startswith("transformers_modules." if settings else "hub_files.")
    prediction = model.predict(**expected["inputs"], early_exit=True)
    assert torch.equal(prediction.exit_layer, expected["exit_layer"])
    torch.testing.assert_close(prediction.logits, expected["logits"], rtol=1e-5, atol=1e-5)
print("answers alike")
"""


@pytest.mark.parametrize(
    "kind",
    [
        {"packed_layers": PACKED},
        {"skip_gates": "attention", "gate_size": 6, "exit_head": "attention", "exit_head_size": 8},
    ],
    ids=["packed", "gated"],
)
def test_the_hub_files_answer_alike_where_the_package_is_not_installed(tmp_path, monkeypatch, kind):
    """From the tier-0 files copied to an empty folder, and by `trust_remote_code` from beside the weights."""
    model = balance_gates(tiny_model(exit_config=ExitConfig(threshold=0.8).to_dict(), **kind))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    auto_map = {
        "AutoConfig": "configuration_costeff.CostEffConfig",
        "AutoModel": "modeling_costeff.CostEffModel",
        "AutoModelForSequenceClassification": "modeling_costeff.CostEffForSequenceClassification",
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))
    (tmp_path / "hub_files").mkdir()
    (tmp_path / "hub_files" / "__init__.py").touch()
    for source in TIER_0:
        shutil.copy(source, tmp_path / "hub_files")
        shutil.copy(source, tmp_path / "model")
    inputs = random_batch([7, 3, 11, 2, 9, 5])
    prediction = model.predict(**inputs, early_exit=True)
    assert len(set(prediction.exit_layer.tolist())) > 1
    expected = {"inputs": inputs, "exit_layer": prediction.exit_layer, "logits": prediction.logits}
    torch.save(expected, tmp_path / "expected.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    assert run_python(WITHOUT_THE_PACKAGE, tmp_path) == "answers alike\n"
