"""`hf-costeff block-prune`: penalise, prune, retrain and pack a model, block by block."""

from __future__ import annotations

from ..block_compression import BlockPruningArguments, block_prune
from ..data import DataArguments
from .command import Command


def run(wanted: BlockPruningArguments, data: DataArguments) -> str:
    """The whole run; returns what to print."""
    return block_prune(wanted, data).describe()


BLOCK_PRUNE = Command(
    "block-prune",
    "prune a model block by block and store what is left as panels",
    (BlockPruningArguments, DataArguments),
    run,
    first="model",
)
