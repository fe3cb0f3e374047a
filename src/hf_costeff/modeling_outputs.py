"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class CostEffModelOutput(ModelOutput):
    """What [`hf_costeff.CostEffModel`] returns.

    Args:
        last_hidden_state: Output of the last layer, shape (batch, seq, hidden).
        exit_logits: Raw logits of every exit, shallow first, each of shape (batch, labels).
        hidden_states: With `output_hidden_states=True`: embedding output and what went on after every layer, layers + 1
            tensors of shape (batch, seq, hidden).
        attentions: With `output_attentions=True` and eager attention: shape (batch, heads, seq, seq) per layer, `None`
            for a layer without heads.
        skip_probabilities: The probability that a row skips a layer, as its gate says, with gradients, per layer of
            shape (batch,); `None` without gates or with `use_gates=False`.
        exit_states: With `output_exit_states=True`: the token states of every attention exit head, shallow first, each
            of shape (batch, seq, exit_head_size).
    """

    last_hidden_state: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None
    skip_probabilities: tuple[Tensor, ...] | None = None
    exit_states: tuple[Tensor, ...] | None = None


@dataclass
class CostEffClassifierOutput(ModelOutput):
    """What [`hf_costeff.CostEffForSequenceClassification`] returns.

    Args:
        loss: Sum of the task loss over all exits, a scalar; only if labels were given.
        logits: Raw logits of the last exit, shape (batch, labels).
        exit_logits: As in [`CostEffModelOutput`].
        hidden_states: As in [`CostEffModelOutput`].
        attentions: As in [`CostEffModelOutput`].
        skip_probabilities: As in [`CostEffModelOutput`].
        exit_states: As in [`CostEffModelOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None
    skip_probabilities: tuple[Tensor, ...] | None = None
    exit_states: tuple[Tensor, ...] | None = None


@dataclass
class CostEffPrediction(ModelOutput):
    """What `predict` returns, in the caller's row order.

    Args:
        logits: Raw logits of the exit each row left at, shape (batch, labels).
        exit_layer: 1-based layer each row left after, shape (batch,).
        probabilities: Softmax or sigmoid of the temperature-scaled logits, the values themselves for regression, shape
            (batch, labels).
        confidence: Largest probability (single label) or that of the least sure label's decision (multi-label), shape
            (batch,); `None` for regression.
        skipped_layers: Whether each row skipped each layer, shape (batch, layers), as its gate said; False for layers
            behind the one it left after. `None` without gates or with `skip_layers=False`.
    """

    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    probabilities: Tensor | None = None
    confidence: Tensor | None = None
    skipped_layers: Tensor | None = None
