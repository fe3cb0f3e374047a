"""How much each attention head and each feed-forward neuron matters to the loss, by first-order Taylor expansion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .modeling_costeff import CostEffForSequenceClassification
from .packed_linear import require_unpacked


@dataclass(frozen=True)
class Importance:
    """Scores of the units of every layer; higher matters more.

    Args:
        head_importance: One tensor per layer, shape (heads of the layer,).
        neuron_importance: One tensor per layer, shape (neurons of the layer,).
    """

    head_importance: tuple[Tensor, ...]
    neuron_importance: tuple[Tensor, ...]


def compute_importance(
    model: CostEffForSequenceClassification,
    batches: Iterable[Any],
    loss_function: Callable[[CostEffForSequenceClassification, Any], Tensor],
) -> Importance:
    """Score every head and neuron by I(w) = |w| * sum over batches of |d loss / d w|.

    A head's score is the sum over its columns of the attention output matrix; a neuron's is the sum over its row of the
    intermediate matrix and its column of the output matrix (COST-EFF, Shen et al. 2022). Exit-aware scores come from a
    loss that sums over all exits; for a ranking across layers, the loss must run the model with
    `gradient_equilibrium=False`, which otherwise scales a layer's scores by its number of deeper exits.

    Args:
        model: Any widths. It is run without dropout and left with its gradients cleared.
        batches: Whatever `loss_function` takes, one element per batch.
        loss_function: (model, batch) -> scalar loss, a mean over the batch.

    Returns:
        Scores on the model's device, in single precision.

    Raises:
        ValueError: If there is not a single batch, or the model is packed.
    """
    require_unpacked(model.config, "Scoring heads and neurons")
    layers: list[Any] = list(model.costeff.layers)
    scored: dict[str, nn.Parameter] = {
        name: parameter
        for layer, block in enumerate(layers)
        for name, parameter in (
            (f"{layer}.context", block.attention.output.weight),
            (f"{layer}.intermediate", block.feed_forward.intermediate.weight),
            (f"{layer}.output", block.feed_forward.output.weight),
        )
    }
    return _collect(layers, compute_saliency(model, scored, batches, loss_function))


def compute_saliency(
    model: CostEffForSequenceClassification,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss_function: Callable[[CostEffForSequenceClassification, Any], Tensor],
) -> dict[str, Tensor]:
    """|w| * sum over batches of |d loss / d w|, weight by weight.

    Args:
        model: It is run without dropout and left with its gradients cleared.
        parameters: Those of its parameters that are scored, by any name.
        batches: Whatever `loss_function` takes, one element per batch.
        loss_function: (model, batch) -> scalar loss, a mean over the batch.

    Returns:
        Under the same names, in the parameters' shapes and single precision.

    Raises:
        ValueError: If there is not a single batch.
    """
    gradients = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    training = model.training
    model.eval()
    seen = 0
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss_function(model, batch).backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    gradients[name] += parameter.grad.abs()
            seen += 1
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    if not seen:
        raise ValueError("No batch to score importance on. Pass at least one row of training data.")
    return {name: parameter.detach().abs().float() * gradients[name] for name, parameter in parameters.items()}


def _collect(layers: list[Any], weighted: dict[str, Tensor]) -> Importance:
    heads, neurons = [], []
    for layer, block in enumerate(layers):
        columns = weighted[f"{layer}.context"].sum(dim=0)
        heads.append(columns.view(block.attention.num_heads, block.attention.head_size).sum(dim=1))
        neurons.append(weighted[f"{layer}.intermediate"].sum(dim=1) + weighted[f"{layer}.output"].sum(dim=0))
    return Importance(tuple(heads), tuple(neurons))
