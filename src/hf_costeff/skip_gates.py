"""Skip gates: before each layer, whether a row runs it or goes past it, and how training mixes the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .exit_heads import FirstTokenAttention, FreshLinear


class AttentionGate(nn.Module):
    """sigmoid(linear(what the first token sees)), with a narrow attention of two heads (SmartBERT, Hu et al. 2023).

    Unlike the paper's code, padding is masked out of the attention.
    """

    def __init__(self, hidden_size: int, size: int, num_heads: int, attention_dropout: float, **pooling: Any) -> None:
        """Take the sizes; the pooling of a linear gate is ignored."""
        super().__init__()
        self.attention = FirstTokenAttention(hidden_size, size, num_heads, attention_dropout)
        self.decision = FreshLinear(size, 1)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Probability of skipping, in single precision at least, shape (batch,).

        Args:
            hidden_states: What the layer would take, shape (batch, seq, hidden).
            padding_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` where nothing is padded.
        """
        seen = self.attention(self.attention.states(hidden_states), padding_mask)
        return _probability(self.decision(seen))


class LinearGate(nn.Module):
    """sigmoid(linear(pooled)): for slim models, where an attention gate may cost half the layer that it skips."""

    def __init__(self, hidden_size: int, pool: Callable[[Tensor, Tensor | None], Tensor], **attention: Any) -> None:
        """Take the size and the pooling; what an attention gate would need besides is ignored."""
        super().__init__()
        self.pool = pool
        self.decision = FreshLinear(hidden_size, 1)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """As [`AttentionGate.forward`]."""
        return _probability(self.decision(self.pool(hidden_states, padding_mask)))


def _probability(logits: Tensor) -> Tensor:
    logits = logits.squeeze(-1)
    return torch.sigmoid(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits)


def is_skipped(probability: Tensor, threshold: float) -> Tensor:
    """Booleans: whether a gate's probability makes a row skip the layer, any shape.

    >>> is_skipped(torch.tensor([0.4, 0.5]), 0.5)
    tensor([False,  True])
    """
    return probability >= threshold


class HardWeight(torch.autograd.Function):
    """1 where a probability reaches the threshold, else 0; backward the identity (straight-through)."""

    @staticmethod
    def forward(ctx: Any, probability: Tensor, threshold: float) -> Tensor:
        """Any shape to the same."""
        return is_skipped(probability, threshold).to(probability.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The gradient itself."""
        return gradient, None


class SkipMixing:
    """Mixes what a layer makes of rows with what it was given, by their probabilities of skipping.

    Attributes:
        probabilities: Of every layer mixed so far, shape (batch,) each, with gradients.
    """

    def __init__(self, threshold: float | None) -> None:
        """Start with no layer.

        Args:
            threshold: A row with a probability of this or more keeps what the layer was given, any other takes what
                the layer made (hard weights). `None`: the probability is the weight of what was given (soft weights).
        """
        self.threshold = threshold
        self.probabilities: list[Tensor] = []

    def __call__(self, given: Tensor, made: Tensor, probability: Tensor) -> Tensor:
        """The rows after the layer, shape (batch, seq, hidden).

        Args:
            given: What the layer took, shape (batch, seq, hidden).
            made: What it made of it, the same shape.
            probability: Of skipping, shape (batch,).

        Example:
            >>> mixing = SkipMixing(threshold=None)
            >>> mixing(torch.tensor([[[0.0]]]), torch.tensor([[[8.0]]]), torch.tensor([0.25]))
            tensor([[[6.]]])
        """
        self.probabilities.append(probability)
        weight = probability if self.threshold is None else HardWeight.apply(probability, self.threshold)
        return torch.lerp(made, given, weight.to(made.dtype)[:, None, None])  # exact where the weight is 0 or 1


SKIP_GATE_CLASSES: dict[str, type[nn.Module]] = {"attention": AttentionGate, "linear": LinearGate}
