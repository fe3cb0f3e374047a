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
    rows, seq, _ = hidden_states.shape
    if padding_mask is None:
        weights = hidden_states.new_full((rows, 1, seq), 1 / seq)
    else:
        real = padding_mask.to(hidden_states.dtype)
        weights = (real / real.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1)
    return torch.bmm(weights, hidden_states).squeeze(1)  # one product is faster than a mean over the middle dimension


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
        pooled = torch.tanh(self.pool(hidden_states, padding_mask))
        if self.dropout.training:  # a call that does nothing would be felt between two small layers
            pooled = self.dropout(pooled)
        return self.classifier(pooled)


EXIT_POOLING_FUNCTIONS = {"cls": pool_first, "mean": pool_mean}
EXIT_HEAD_CLASSES: dict[str, type[nn.Module]] = {"linear": LinearExitHead}
