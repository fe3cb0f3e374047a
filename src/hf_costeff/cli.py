"""The command line: `hf-costeff <command> --flags`, one dataclass of arguments per command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from transformers import HfArgumentParser

from .compression import Compression
from .compression_args import CompressionArguments
from .data import DataArguments


def run_compress(arguments: Sequence[str]) -> str:
    """`hf-costeff compress`: the whole recipe, or with `--dry_run` its plan; returns what to print."""
    parser = HfArgumentParser([CompressionArguments, DataArguments], prog="hf-costeff compress")
    compression_arguments, data_arguments = parser.parse_args_into_dataclasses(list(arguments))
    run = Compression(compression_arguments, data_arguments)
    if compression_arguments.dry_run:
        return run.plan().describe()
    result = run.run()
    summary = result.model_path / "SUMMARY.md"
    return f"{result.table()}\n\nThe slim model is in {result.model_path}. Read {summary} first."


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], str], str]] = {
    "compress": (run_compress, "make a slim multi-exit model from a fine-tuned classifier"),
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
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"hf-costeff {words[0]}: {error}\n")
        return 1
    return 0
