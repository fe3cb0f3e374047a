"""`hf-costeff compress`: the whole recipe, or its plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..compression import Compression
from ..compression_args import CompressionArguments
from ..data import DataArguments
from .command import Command


@dataclass
class DryRunArguments:
    """Whether the command stops at the plan."""

    dry_run: bool = field(default=False, metadata={"help": "Only print the plan: parameters, FLOPs, file size."})


def run(compression: CompressionArguments, data: DataArguments, stop_at: DryRunArguments) -> str:
    """The whole recipe, or with `--dry_run` its plan; returns what to print."""
    job = Compression(compression, data)
    if stop_at.dry_run:
        return job.plan().describe()
    result = job.run()
    summary = result.model_path / "SUMMARY.md"
    return f"{result.table()}\n\nThe slim model is in {result.model_path}. Read {summary} first."


COMPRESS = Command(
    "compress",
    "make a slim multi-exit model from a fine-tuned classifier",
    (CompressionArguments, DataArguments, DryRunArguments),
    run,
)
