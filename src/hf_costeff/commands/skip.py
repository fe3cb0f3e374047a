"""`hf-costeff skip`: gates that let every row skip layers, and exits that let it leave."""

from __future__ import annotations

from ..data import DataArguments
from ..layer_skipping import LayerSkippingArguments, train_layer_skipping
from .command import Command


def run(wanted: LayerSkippingArguments, data: DataArguments) -> str:
    """The whole run; returns what to print."""
    return train_layer_skipping(wanted, data).describe()


SKIP = Command(
    "skip",
    "train gates that skip layers row by row, and exits with them",
    (LayerSkippingArguments, DataArguments),
    run,
    first="model",
)
