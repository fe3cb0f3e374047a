"""The README and the pages of docs/ tell the truth: their code runs, their links lead somewhere, their flags exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from hf_costeff.commands import COMMANDS
from hf_costeff.compression_args import CompressionArguments
from hf_costeff.data import DataArguments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9_]*)")

sys.path.insert(0, str(ROOT / "docs"))


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, info: str) -> list[str]:
    """Fenced blocks with exactly this info string, in order, without the indent of a list they may stand in."""
    return [textwrap.dedent(m["body"]) for m in FENCE.finditer(page.read_text()) if m["info"].strip() == info]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page_name(page)}, python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python no-run")], ids=page_name)
def test_code_that_needs_the_hub_names_only_what_is_there(page):
    """It is not run, but it parses, its imports from the package exist, and so do the options of `compress`."""
    options = {item.name for kind in (CompressionArguments, DataArguments) for item in dataclasses.fields(kind)}
    for block in blocks(page, "python no-run"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_costeff":
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "compress":
                assert {keyword.arg for keyword in node.keywords} <= options | {"processing_class"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_code_block_says_what_it_is(page):
    known = {"python", "python no-run", "console", "bibtex", "json", "text"}
    assert {match["info"].strip() for match in FENCE.finditer(page.read_text())} <= known


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_relative_link_leads_somewhere(page):
    for match in LINK.finditer(prose(page)):
        target = match["target"] or match["image"]
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_name(page)} links to {target}, which is not there."
        if anchor:
            assert anchor in anchors(file), f"{page_name(page)} links to {target}, and there is no such heading."


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The calls of `hf-costeff` on a page, as the words after its name; what stands before a pipe is left out."""
    lines = [line for block in blocks(page, "console") for line in block.replace("\\\n", " ").splitlines()]
    calls = [shlex.split(line.removeprefix("$ ").split(" | ")[-1].split(" > ")[0], comments=True) for line in lines]
    return [words[1:] for words in calls if words[:1] == ["hf-costeff"]]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=page_name)
def test_every_command_of_a_page_is_understood(page):
    for call in commands(page):
        if call[0].startswith("<"):
            continue
        taken = 2 if " ".join(call[:2]) in COMMANDS else 1
        command, words = " ".join(call[:taken]), call[taken:]
        parsed = COMMANDS[command].parse(words)
        assert len(parsed) == len(COMMANDS[command].arguments), words


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_flag_named_in_running_text_exists(page):
    actions = [action for command in COMMANDS.values() for action in command.parser()._actions]
    flags = {flag.lstrip("-") for action in actions for flag in action.option_strings}
    named = set(FLAG.findall("\n".join(re.findall(r"`[^`\n]+`", prose(page)))))
    assert named <= flags | OTHER_FLAGS, page_name(page)


OTHER_FLAGS = {"flags", "task", "data", "models", "run", "steps", "seeds", "true_labels_alone"}  # the benchmarks' own


def test_the_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text and "make test" in text


REAL_RUNS = {
    "stsb": "STS-B (Spearman)",
    "mrpc": "MRPC (F1)",
    "sst2": "SST-2 (accuracy)",
    "qnli": "QNLI (accuracy)",
    "mnli": "MNLI (accuracy)",
    "clinc150": "clinc150 (accuracy)",
    "cola": "CoLA (Matthews)",
}


@pytest.mark.parametrize("task", REAL_RUNS)
def test_the_real_runs_in_the_readme_are_those_that_were_measured(task):
    run = json.loads((ROOT / "benchmarks" / "results" / f"{task}-fast-42.json").read_text())
    teacher, _, full, early = run["rows"]
    lines = (ROOT / "README.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| {REAL_RUNS[task]} "))
    *metrics, speedups = [cell.strip() for cell in row.strip("|").split("|")][1:]
    measured = [teacher["metrics"][run["metric"]], full["metrics"][run["metric"]], run["at_paper_flops"]["early_exit"]]
    assert metrics == [f"{value:.3f}" for value in measured]
    for claimed, size in zip(speedups.split(" / "), ("32", "1"), strict=True):
        ratio = teacher["ms_per_text"][size] / early["ms_per_text"][size]
        assert float(claimed.removesuffix("x")) == pytest.approx(ratio, rel=0.03)
