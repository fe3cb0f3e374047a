"""Write the generated parts of docs/reference.md from the code's own signatures and docstrings.

    python docs/make_reference.py

Each part stands between two marker comments and is replaced whole; tests/test_docs.py fails when one is out of date.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments

import hf_costeff
from hf_costeff.commands import COMMANDS

PAGE = Path(__file__).parent / "reference.md"
GENERIC = inspect.signature(PreTrainedConfig).parameters.keys() | inspect.signature(TrainingArguments).parameters.keys()
LONGEST_DEFAULT = 40


def main() -> None:
    PAGE.write_text(render(PAGE.read_text()))


def render(text: str) -> str:
    """The page with its generated parts brought up to date."""
    for name, part in (("public", public_names()), ("flags", command_flags()), ("modules", modules())):
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text)
        assert found == 1, f"{PAGE.name} needs the markers {name}:begin and {name}:end once."
    return text


def public_names() -> str:
    parts = []
    for name in sorted(hf_costeff.__all__, key=str.lower):
        thing = getattr(hf_costeff, name)
        parts.append(f"### `{name}`\n\n`{signature(thing)}`, in `{thing.__module__}`\n\n{first_line(thing)}")
        if members := [f"- `{shown}`: {first_line(member)}" for shown, member in public_members(thing)]:
            parts.append("\n".join(members))
    return "\n\n".join(parts)


def public_members(thing: Any) -> Iterator[tuple[str, Any]]:
    """Signatures of the methods, and names of the properties, that a class of ours itself defines."""
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        if name.startswith(("_", "validate")):
            continue
        if isinstance(member, property):
            yield name, member
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if inspect.isfunction(function) and inspect.unwrap(function).__module__ == thing.__module__:
            yield signature(function, name), function


def command_flags() -> str:
    parts = []
    for command in COMMANDS.values():
        parts.append(f"### `hf-costeff {command.name}`\n\nTo {command.purpose}.")
        rows = ["| flag | default | meaning |", "|---|---|---|"]
        for action in command.parser()._actions:
            flags = [flag for flag in action.option_strings if "-" not in flag.lstrip("-") and flag != "-h"]
            if flags and action.dest != "help":
                shown = "required" if action.required else "" if action.default is None else f"`{action.default}`"
                choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
                rows.append(f"| `{'`, `'.join(flags)}` | {shown} | {action.help or ''}{choices} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def modules() -> str:
    parts = []
    for found in sorted(pkgutil.walk_packages(hf_costeff.__path__, "hf_costeff."), key=lambda module: module.name):
        module = importlib.import_module(found.name)
        lines = [f"- `{signature(thing, name)}`: {first_line(thing)}" for name, thing in own_names(module)]
        if lines:
            parts.append(f"### `{module.__name__}`\n\n{first_line(module)}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def own_names(module: Any) -> Iterator[tuple[str, Any]]:
    """Public functions and classes that a module defines, in the order of the file."""
    for name, thing in vars(module).items():
        is_own = getattr(thing, "__module__", None) == module.__name__
        if is_own and not name.startswith("_") and (inspect.isfunction(thing) or inspect.isclass(thing)):
            yield name, thing


def signature(thing: Any, name: str | None = None) -> str:
    """Name and arguments with their defaults, without annotations; long and upstream's arguments as `...`."""
    name = name or thing.__name__
    if inspect.isclass(thing):
        maker = next(parent for parent in thing.__mro__ if "__init__" in vars(parent))
        if not maker.__module__.startswith("hf_costeff"):
            return f"{name}(...)"  # upstream's arguments, which differ between its versions
    parameters = list(inspect.signature(thing).parameters.values())
    shown = [parameter for parameter in parameters if parameter.name not in ("self", "cls")]
    if inspect.isclass(thing) and issubclass(thing, (PreTrainedConfig, TrainingArguments)):
        kept = [parameter for parameter in shown if parameter.name not in GENERIC]
        return f"{name}({', '.join([*map(written, kept), '...'])})"
    return f"{name}({', '.join(with_separators(shown))})"


def with_separators(parameters: Sequence[inspect.Parameter]) -> list[str]:
    words = []
    for position, parameter in enumerate(parameters):
        starts = parameter.kind is parameter.KEYWORD_ONLY and (
            position == 0 or parameters[position - 1].kind is parameter.POSITIONAL_OR_KEYWORD
        )
        words += ["*"] * starts + [written(parameter)]
    return words


def written(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    if parameter.default is parameter.empty:
        return stars + parameter.name
    default = repr(parameter.default)
    is_field = isinstance(parameter.default, dataclasses.Field) or "factory" in default
    return f"{parameter.name}={'...' if is_field or len(default) > LONGEST_DEFAULT else default}"


def first_line(thing: Any) -> str:
    """The first line of a docstring, with the links of docstrings as plain code."""
    line = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r"\[(`[^`]+`)\]", r"\1", line)


if __name__ == "__main__":
    main()
