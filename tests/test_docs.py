"""The reference page is complete and up to date."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import hf_costeff
from hf_costeff import cli

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference.md"
sys.path.insert(0, str(ROOT / "docs"))
make_reference = importlib.import_module("make_reference")


@pytest.mark.parametrize("name", hf_costeff.__all__)
def test_a_public_name_stands_in_the_reference(name):
    assert re.search(rf"^### `{name}`$", PAGE.read_text(), re.MULTILINE), f"docs/reference.md lacks {name}."


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_stands_in_the_reference(command):
    assert f"### `hf-costeff {command}`" in PAGE.read_text()


def test_the_reference_is_what_the_code_says():
    text = PAGE.read_text()
    assert make_reference.render(text) == text, "Run `python docs/make_reference.py`."


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_prints_its_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(action.option_strings[0] in out for action in cli.COMMANDS[command].parser()._actions)


def test_every_public_name_says_what_it_is():
    assert [name for name in hf_costeff.__all__ if not (getattr(hf_costeff, name).__doc__ or "").strip()] == []
