"""The bookkeeping of one early-exit pass: who is still in the batch, and what those who left answered."""

from __future__ import annotations

import torch
from torch import Tensor

from .exit_criteria import ExitCriterion


class ExitingRows:
    """Who is still in a running batch, and what those who left answered.

    Made anew for every `predict` call. Decisions are taken on the device; one transfer per checked exit tells the host
    which rows left. Lengths are known to the host from the start, so cropping costs no transfer.
    """

    def __init__(
        self,
        criterion: ExitCriterion | None,
        checked: list[int],
        exit_layers: list[int],
        input_ids: Tensor,
        attention_mask: Tensor | None,
    ) -> None:
        """Start with every row in the batch.

        Args:
            criterion: Decides at the checked exits; `None` for full depth.
            checked: 1-based layers whose exit is evaluated.
            exit_layers: 1-based layers that own an exit; the last is the model's depth.
            input_ids: Shape (batch, seq).
            attention_mask: 1 for real tokens, shape (batch, seq); `None` where nothing is padded.

        Raises:
            ValueError: If a row is all padding.
        """
        self.criterion = criterion
        self.exit_layers = exit_layers
        self.evaluated = {*checked, exit_layers[-1]} if criterion is not None else {exit_layers[-1]}
        batch, seq = input_ids.shape
        self.remaining = torch.arange(batch)
        self.ends, self.counts = _ends_and_counts(attention_mask, batch, seq)
        if not self.counts.all():
            raise ValueError(
                f"Row {int(self.counts.argmin())} of `attention_mask` is all padding. Drop the row, or tokenize it: "
                "even an empty text has its special tokens."
            )
        self.history: Tensor | None = None
        self.left_rows: list[Tensor] = []
        self.left_logits: list[Tensor] = []
        self.left_layers: list[Tensor] = []

    @property
    def longest(self) -> int:
        """Columns that the rows still in need: up to the last real token of the longest."""
        return int(self.ends[self.remaining].max())

    @property
    def padded(self) -> bool:
        """Whether any row still in has padding within `longest` columns."""
        return int(self.counts[self.remaining].min()) < self.longest

    def leave(self, depth: int, logits: Tensor) -> Tensor | None:
        """Let rows leave after layer `depth`.

        Args:
            depth: 1-based layer whose exit was evaluated.
            logits: Raw logits of the rows still in, shape (rows, labels).

        Returns:
            Positions of the survivors among the rows still in, on the device, shape (survivors,); `None` if
            nobody left.
        """
        if self.criterion is None or depth == self.exit_layers[-1]:
            leaving = torch.ones(len(logits), dtype=torch.bool)
        else:
            seen = logits.unsqueeze(1)
            self.history = seen if self.history is None else torch.cat([self.history, seen], dim=1)
            leaving = self.criterion.leaves(self.history, self.exit_layers.index(depth)).cpu()
            if not leaving.any():
                return None
        positions = leaving.nonzero().flatten()
        self.left_rows.append(self.remaining[positions])
        self.left_logits.append(logits[positions.to(logits.device)])
        self.left_layers.append(torch.full((len(positions),), depth))
        staying = (~leaving).nonzero().flatten()
        self.remaining = self.remaining[staying]
        survivors = staying.to(logits.device)
        if self.history is not None:
            self.history = self.history[survivors]
        return survivors

    def answers(self) -> tuple[Tensor, Tensor]:
        """Logits (batch, labels) and 1-based exit layers (batch,) in the caller's order, once everybody has left."""
        order = torch.cat(self.left_rows).argsort()
        logits = torch.cat(self.left_logits)
        return logits[order.to(logits.device)], torch.cat(self.left_layers)[order].to(logits.device)


def _ends_and_counts(attention_mask: Tensor | None, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """Position after the last real token and number of real tokens of each row, on the host, shape (batch,) each."""
    if attention_mask is None:
        return torch.full((batch,), seq), torch.full((batch,), seq)
    real = attention_mask != 0
    positions = torch.arange(1, seq + 1, device=attention_mask.device)
    ends, counts = torch.stack([(positions * real).amax(dim=1), real.sum(dim=1)]).cpu()
    return ends, counts
