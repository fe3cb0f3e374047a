"""What acts on the weights around the optimizer's step, and is kept in the checkpoints of a training."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback


class Regularizer(TrainerCallback):
    """A callback that acts on weights around the optimizer's step and keeps what it knows in the checkpoints."""

    def logs(self) -> dict[str, float]:
        """What to log beside the loss parts."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write what a resumed run needs into a checkpoint."""

    def load(self, folder: str | Path) -> None:
        """Read it back."""
