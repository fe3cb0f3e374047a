"""The command line: `hf-costeff <command> --flags`, one dataclass of arguments per command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from .compression import Compression, load_config
from .compression_args import CompressionArguments
from .data import DataArguments, make_collator, prepare_split
from .evaluation import calibrate
from .modeling_costeff import CostEffForSequenceClassification


def parse(parser: HfArgumentParser, words: Sequence[str]) -> tuple[Any, ...]:
    """The argument dataclasses from a command's words.

    Raises:
        ValueError: For an unknown flag, with the nearest known one.
    """
    *parsed, unknown = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = get_close_matches(unknown[0], flags, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists the flags."
        raise ValueError(f"Unknown: {' '.join(unknown)}. {hint}")
    return tuple(parsed)


@dataclass
class DryRunArguments:
    """Whether `hf-costeff compress` stops at the plan."""

    dry_run: bool = field(default=False, metadata={"help": "Only print the plan: parameters, FLOPs, file size."})


def run_compress(arguments: Sequence[str]) -> str:
    """`hf-costeff compress`: the whole recipe, or with `--dry_run` its plan; returns what to print."""
    parser = HfArgumentParser([CompressionArguments, DataArguments, DryRunArguments], prog="hf-costeff compress")
    compression_arguments, data_arguments, stop_at = parse(parser, arguments)
    run = Compression(compression_arguments, data_arguments)
    if stop_at.dry_run:
        return run.plan().describe()
    result = run.run()
    summary = result.model_path / "SUMMARY.md"
    return f"{result.table()}\n\nThe slim model is in {result.model_path}. Read {summary} first."


@dataclass
class CalibrationArguments:
    """What `hf-costeff calibrate` is asked for: a model, and exactly one goal."""

    model: str = field(metadata={"help": "A multi-exit model: a local folder, or a Hub id with --output_dir."})
    split: str | None = field(
        default=None, metadata={"help": "Split to choose on, of rows that no training saw. Not needed with a file."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where to save. Default: the model's folder."})
    metric: str | None = field(default=None, metadata={"help": "What may drop. Default: by problem type."})
    max_metric_drop: float | None = field(default=None, metadata={"help": "Points the metric may lose."})
    target_speedup: float | None = field(default=None, metadata={"help": "FLOPs ratio to this model's full depth."})


def run_calibrate(arguments: Sequence[str]) -> str:
    """`hf-costeff calibrate`: choose the exit threshold on rows that no training saw, and save it in the model."""
    parser = HfArgumentParser([CalibrationArguments, DataArguments], prog="hf-costeff calibrate")
    words = list(arguments)
    if words and not words[0].startswith("-"):  # the model may come first, without its flag
        words.insert(0, "--model")
    wanted, data_arguments = parse(parser, words)
    load_config(wanted.model)
    if wanted.output_dir is None and not Path(wanted.model).is_dir():
        raise ValueError(f"{wanted.model} is not a local folder, so the result cannot go back. Give --output_dir.")
    model = AutoModelForSequenceClassification.from_pretrained(wanted.model)
    if not isinstance(model, CostEffForSequenceClassification):
        raise ValueError(
            f"{wanted.model} is a {model.config.model_type} model without exits. "
            "Compress it first: hf-costeff compress."
        )
    tokenizer = AutoTokenizer.from_pretrained(wanted.model)
    longest = model.config.max_position_embeddings - model.config.position_offset
    split = wanted.split or ("validation" if data_arguments.validation_file else None)
    if split is None:
        raise ValueError(
            "No rows to choose on are named. Give --split, of rows that no training saw and no report is made on, or "
            "--validation_file."
        )
    rows = prepare_split(data_arguments, split, tokenizer, config=model.config, max_positions=longest)
    settings = calibrate(
        model,
        rows,
        make_collator(tokenizer),
        metric=wanted.metric,
        max_metric_drop=wanted.max_metric_drop,
        target_speedup=wanted.target_speedup,
    )
    folder = wanted.output_dir or wanted.model
    if wanted.output_dir is None:  # only the settings change, so the weights are not written again
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    seen = settings.calibration or {}
    limit = settings.tolerance if settings.threshold is None else settings.threshold
    return (
        f"Saved in {folder}: {settings.criterion} criterion with limit {limit:g}. On {seen['rows']} held-out rows: "
        f"{seen['metric']} {seen['full_depth']:.4f} at full depth, {seen['early_exit']:.4f} with early exit, mean exit "
        f"layer {seen['mean_exit_layer']:.2f}, {seen['speedup_over_full_depth']:.2f}x fewer FLOPs."
    )


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], str], str]] = {
    "compress": (run_compress, "make a slim multi-exit model from a fine-tuned classifier"),
    "calibrate": (run_calibrate, "choose a model's exit threshold on held-out rows"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print its result.

    Args:
        arguments: Without the program name; `None` takes them from the command line.

    Returns:
        Exit status: 0 for success, 2 for a mistake in the call, 1 for an error on the way.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: hf-costeff <command> [--flags]\n\n{listing}\n\nhf-costeff <command> --help lists its flags."
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage + "\n")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        sys.stderr.write(f"hf-costeff: unknown command {words[0]!r}\n{usage}\n")
        return 2
    try:
        sys.stdout.write(COMMANDS[words[0]][0](words[1:]) + "\n")
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        strict = isinstance(error, StrictDataclassError) and error.__cause__ is not None
        sys.stderr.write(f"hf-costeff {words[0]}: {error.__cause__ if strict else error}\n")
        return 1
    return 0
