"""What a command of `hf-costeff` is: a name, argument dataclasses whose fields are its flags, and a function."""

from __future__ import annotations

from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, PreTrainedTokenizerBase

from ..checkpoints import load_classifier, load_config, load_tokenizer
from ..configuration_cascade import require_single_model
from ..hub import copy_report_files
from ..model_card import write_model_card
from ..modeling_costeff import CostEffForSequenceClassification
from ..report import drop_exit_figures


class KnownDefaults(ArgumentDefaultsHelpFormatter):
    """Help with the defaults behind it, but for those that are decided later, of which the help itself tells."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Args:
        name: As typed after `hf-costeff`.
        purpose: What it is for, a phrase that follows "to".
        arguments: Dataclasses; every field is a flag.
        run: Takes one instance of each of them and returns what to print.
        first: The flag that the first word answers to if it is given without one; `None` if there is none.
    """

    name: str
    purpose: str
    arguments: tuple[type, ...]
    run: Callable[..., str]
    first: str | None = None

    def parser(self) -> HfArgumentParser:
        """The parser of its flags."""
        parser = HfArgumentParser(list(self.arguments), prog=f"hf-costeff {self.name}", formatter_class=KnownDefaults)
        if self.first is not None:
            parser.usage = f"%(prog)s {self.first.upper()} [--flags]"
        for action in parser._actions:
            if action.option_strings[0] == f"--no_{action.dest}":  # upstream gives it the help of its opposite
                action.help = f"Switch --{action.dest} off."
        return parser

    def __call__(self, words: Sequence[str]) -> str:
        """Parse the words after the command's name, run it, and return what to print."""
        return self.run(*self.parse(words))

    def parse(self, words: Sequence[str]) -> tuple[Any, ...]:
        """The arguments that the words after the command's name give, one instance of each dataclass.

        Raises:
            ValueError: For an unknown flag, with the nearest known one.
        """
        words = list(words)
        if self.first is not None and words and not words[0].startswith("-"):
            words.insert(0, f"--{self.first}")
        parser = self.parser()
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            near = get_close_matches(unknown[0], flags, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists the flags."
            raise ValueError(f"Unknown: {' '.join(unknown)}. {hint}")
        return tuple(parsed)


def load_slim(name: str) -> tuple[CostEffForSequenceClassification, PreTrainedTokenizerBase]:
    """A multi-exit classifier and its tokenizer.

    Args:
        name: Local folder or Hub id.

    Raises:
        ValueError: If it is not there, cannot be read, has no exits, or is a cascade.
    """
    require_single_model(load_config(name), name)
    model = load_classifier(name)
    if not isinstance(model, CostEffForSequenceClassification):
        raise ValueError(
            f"{name} is a {model.config.model_type} model without exits. Compress it first: hf-costeff compress."
        )
    return model, load_tokenizer(name)


def save_settings(
    model: CostEffForSequenceClassification, tokenizer: PreTrainedTokenizerBase, name: str, folder: str
) -> None:
    """Save a model of which nothing but the exit settings has changed, with the figures and the card that still hold.

    Args:
        model: With its new settings.
        tokenizer: The model's.
        name: Where it came from; a Hub id has no files here, so its figures and its card stay behind.
        folder: Where it goes; its own folder gets the settings alone, since the weights are there.
    """
    if Path(folder).resolve() == Path(name).resolve():
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_report_files(name, folder)
    if drop_exit_figures(folder):
        write_model_card(folder, Path(folder).resolve().name)


def writable_folder(name: str, output_dir: str | None) -> str:
    """Where a changed model goes: `output_dir`, or back to the local folder it came from.

    Raises:
        ValueError: If it came from the Hub and no folder is named, there is no such checkpoint, or what is named is a
            file.
    """
    if output_dir is not None and Path(output_dir).is_file():
        raise ValueError(f"`output_dir` is {output_dir!r}, a file, which would be overwritten. Name a folder.")
    if output_dir is None and not Path(name).is_dir():
        load_config(name)
        raise ValueError(f"{name} is not a local folder, so the result cannot go back. Give --output_dir.")
    return output_dir or name
