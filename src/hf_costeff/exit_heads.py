"""Exit heads: the small classifiers after a layer, and what they look at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def pool_first(hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The first token's state, shape (batch, hidden), from hidden states of shape (batch, seq, hidden)."""
    return hidden_states[:, 0]


def pool_mean(hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The mean state of the real tokens, shape (batch, hidden), from hidden states of shape (batch, seq, hidden)."""
    if padding_mask is None:
        return hidden_states.mean(dim=1)
    weights = padding_mask.to(hidden_states.dtype).unsqueeze(-1)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class LinearExitHead(nn.Module):
    """classifier(dropout(tanh(pooled))): no dense pooler (COST-EFF, Shen et al. 2022)."""

    def __init__(
        self, hidden_size: int, num_labels: int, dropout: float, pool: Callable[[Tensor, Tensor | None], Tensor]
    ) -> None:
        super().__init__()
        self.pool = pool
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Raw logits of shape (batch, labels) from hidden states (batch, seq, hidden) and a mask (batch, seq)."""
        return self.classifier(self.dropout(torch.tanh(self.pool(hidden_states, padding_mask))))


EXIT_POOLING_FUNCTIONS = {"cls": pool_first, "mean": pool_mean}
EXIT_HEAD_CLASSES: dict[str, type[nn.Module]] = {"linear": LinearExitHead}
