"""Exit heads: the small classifiers after a layer, and what they look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


class FreshLinear(nn.Linear):
    """A linear layer that starts with torch's own default values, whatever the encoder's `initializer_range`."""


class FirstTokenAttention(nn.Module):
    """A small self-attention without output map, residual and norm, read at the first token (SmartBERT, section 3).

    The states are tanh(W h), narrower than the hidden states. Since one token alone asks, the maps of keys and values
    are applied to its query and to the mixed states, not to every token: the same function for a fraction of the work.
    A bias of the keys would change nothing and is left out.
    """

    def __init__(self, hidden_size: int, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = size // num_heads
        self.reduce = FreshLinear(hidden_size, size)
        self.query = FreshLinear(size, size)
        self.key = FreshLinear(size, size, bias=False)
        self.value = FreshLinear(size, size)
        self.dropout = nn.Dropout(dropout)

    def states(self, hidden_states: Tensor) -> Tensor:
        """Every token's narrow state, shape (batch, seq, size), from hidden states of shape (batch, seq, hidden)."""
        return torch.tanh(self.reduce(hidden_states))

    def forward(self, states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """What the first token sees, shape (batch, size).

        Args:
            states: From [`FirstTokenAttention.states`], shape (batch, seq, size).
            padding_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` where nothing is padded.
        """
        by_head = (self.num_heads, self.head_size)
        own = torch.eye(self.num_heads, dtype=states.dtype, device=states.device)[..., None]  # a head's own columns
        query = (self.query(states[:, 0]).unflatten(-1, (1, *by_head)) * own).flatten(2)
        scores = torch.bmm(self.key(query), states.transpose(1, 2)) * self.head_size**-0.5
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask[:, None] == 0, torch.finfo(scores.dtype).min)
        mixed = torch.bmm(self.dropout(scores.softmax(-1)), states)  # (batch, heads, size)
        return (self.value(mixed).unflatten(-1, by_head) * own).sum(2).flatten(1)


class LinearExitHead(nn.Module):
    """classifier(dropout(tanh(pooled))): no dense pooler (COST-EFF, Shen et al. 2022)."""

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        dropout: float,
        pool: Callable[[Tensor, Tensor | None], Tensor],
        **attention: Any,
    ) -> None:
        """Take the sizes; what an attention head would need besides is ignored."""
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


class AttentionExitHead(nn.Module):
    """classifier(dropout(tanh(dense(what the first token sees)))), with a narrow attention of four heads (SmartBERT).

    Unlike the paper's code, padding is masked out of the attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        dropout: float,
        size: int,
        num_heads: int,
        attention_dropout: float,
        **pooling: Any,
    ) -> None:
        """Take the sizes; the pooling of a linear head is ignored."""
        super().__init__()
        self.attention = FirstTokenAttention(hidden_size, size, num_heads, attention_dropout)
        self.dense = FreshLinear(size, size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = FreshLinear(size, num_labels)

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None, exit_states: list[Tensor] | None = None
    ) -> Tensor:
        """Raw logits of shape (batch, labels).

        Args:
            hidden_states: Shape (batch, seq, hidden).
            padding_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` where nothing is padded.
            exit_states: The head's token states are appended here, shape (batch, seq, size).
        """
        states = self.attention.states(hidden_states)
        if exit_states is not None:
            exit_states.append(states)
        seen = torch.tanh(self.dense(self.attention(states, padding_mask)))
        return self.classifier(self.dropout(seen))


EXIT_POOLING_FUNCTIONS = {"cls": pool_first, "mean": pool_mean}
EXIT_HEAD_CLASSES: dict[str, type[nn.Module]] = {"linear": LinearExitHead, "attention": AttentionExitHead}
