"""Scores to plan to narrower model: width targets and budgets, the frozen plan, and the surgery.

Three steps that never mix: `solve_widths` says how wide, a `SlenderizationPlan` says which units stay, and
`slenderize` builds a new, narrower model from the plan by index selection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from .configuration_costeff import CostEffConfig
from .efficiency import full_depth_flops, parameter_count
from .importance import Importance
from .modeling_costeff import CostEffForSequenceClassification
from .packed_linear import require_unpacked


@dataclass(frozen=True)
class Widths:
    """How wide a model is, where it can be cut.

    Args:
        num_attention_heads: Heads per layer.
        intermediate_size: Feed-forward neurons per layer.
        embedding_rank: Rank of the word embedding; `None` for one full matrix.
    """

    num_attention_heads: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    embedding_rank: int | None

    @classmethod
    def of(cls, config: CostEffConfig) -> Widths:
        """The widths of an existing model."""
        return cls(tuple(config.num_attention_heads), tuple(config.intermediate_size), config.embedding_rank)

    @classmethod
    def even(cls, num_layers: int, heads: int, neurons: int, embedding_rank: int | None) -> Widths:
        """The same heads and neurons in every layer."""
        return cls((heads,) * num_layers, (neurons,) * num_layers, embedding_rank)

    def apply_to(self, config: CostEffConfig) -> CostEffConfig:
        """A copy of `config` with these widths."""
        narrowed = copy.deepcopy(config)
        narrowed.num_attention_heads = list(self.num_attention_heads)
        narrowed.intermediate_size = list(self.intermediate_size)
        narrowed.embedding_rank = self.embedding_rank
        narrowed.validate()
        return narrowed


def check_widths(config: CostEffConfig, target: Widths) -> None:
    """Refuse widths that the model does not have.

    Raises:
        ValueError: Naming layer, value and range, or because the model is packed.
    """
    require_unpacked(config, "Slenderization")
    for name, kept, present in (
        ("num_attention_heads", target.num_attention_heads, config.num_attention_heads),
        ("intermediate_size", target.intermediate_size, config.intermediate_size),
    ):
        if len(kept) != len(present):
            raise ValueError(f"`{name}` has {len(kept)} entries, the model has {len(present)} layers. Give one each.")
        for layer, (count, available) in enumerate(zip(kept, present, strict=True), start=1):
            if not 0 <= count <= available:
                unit = "attention heads" if name == "num_attention_heads" else "neurons"
                raise ValueError(
                    f"Cannot keep {count} {unit} in layer {layer}: it has {available}. "
                    f"`{name}` must lie in 0..{available}."
                )
    largest = config.embedding_rank or config.hidden_size
    if target.embedding_rank is None and config.embedding_rank is not None:
        raise ValueError(
            f"The embedding is factorised already (rank {largest}); `embedding_rank` must be in 1..{largest}."
        )
    if target.embedding_rank is not None and not 1 <= target.embedding_rank <= largest:
        raise ValueError(f"`embedding_rank` is {target.embedding_rank}. It must lie in 1..{largest}.")


@dataclass(frozen=True)
class SlenderizationPlan:
    """Which units stay. Frozen: made once from scores, applied by [`slenderize`].

    Args:
        head_mask: Per layer, one bool per head, True = keep.
        neuron_mask: Per layer, one bool per neuron, True = keep.
        embedding_rank: Rank to factorise the word embedding to; `None` leaves the embedding as it is.
    """

    head_mask: tuple[tuple[bool, ...], ...]
    neuron_mask: tuple[tuple[bool, ...], ...]
    embedding_rank: int | None = None

    @property
    def num_attention_heads(self) -> tuple[int, ...]:
        """Heads kept per layer."""
        return tuple(sum(mask) for mask in self.head_mask)

    @property
    def intermediate_size(self) -> tuple[int, ...]:
        """Neurons kept per layer."""
        return tuple(sum(mask) for mask in self.neuron_mask)

    @classmethod
    def by_layer(cls, importance: Importance, widths: Widths) -> SlenderizationPlan:
        """Keep each layer's best units: `widths` says how many per layer (COST-EFF's way).

        Example:
            >>> scores = Importance((torch.tensor([1.0, 3.0]),), (torch.tensor([2.0, 1.0, 3.0]),))
            >>> SlenderizationPlan.by_layer(scores, Widths((1,), (2,), None)).neuron_mask
            ((True, False, True),)
        """
        return cls(
            tuple(
                _top(scores, keep)
                for scores, keep in zip(importance.head_importance, widths.num_attention_heads, strict=True)
            ),
            tuple(
                _top(scores, keep)
                for scores, keep in zip(importance.neuron_importance, widths.intermediate_size, strict=True)
            ),
            widths.embedding_rank,
        )

    @classmethod
    def across_layers(cls, importance: Importance, widths: Widths) -> SlenderizationPlan:
        """Keep the best units of the whole model: the totals of `widths` are kept, its layers are not.

        The scores must come from a pass with gradient equilibrium off. Unlike the paper, which keeps layers even.

        Example:
            >>> heads = (torch.tensor([1.0, 3.0]), torch.tensor([4.0, 2.0]))
            >>> scores = Importance(heads, (torch.ones(1), torch.ones(1)))
            >>> SlenderizationPlan.across_layers(scores, Widths((1, 1), (1, 1), None)).head_mask
            ((False, True), (True, False))
        """
        return cls(
            _split(importance.head_importance, sum(widths.num_attention_heads)),
            _split(importance.neuron_importance, sum(widths.intermediate_size)),
            widths.embedding_rank,
        )


ALLOCATIONS: dict[str, Callable[[Importance, Widths], SlenderizationPlan]] = {
    "uniform": SlenderizationPlan.by_layer,
    "uneven": SlenderizationPlan.across_layers,
}


def _top(scores: Tensor, keep: int) -> tuple[bool, ...]:
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.cpu().argsort(descending=True, stable=True)[:keep]] = True
    return tuple(mask.tolist())


def _split(scores: Sequence[Tensor], keep: int) -> tuple[tuple[bool, ...], ...]:
    flat = _top(torch.cat(list(scores)), keep)
    edges = [0]
    for layer in scores:
        edges.append(edges[-1] + len(layer))
    return tuple(flat[low:high] for low, high in pairwise(edges))


def factorize_embedding(matrix: Tensor, rank: int, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` product for an embedding matrix: truncated SVD, or its row-weighted form.

    Minimises sum_v weight_v * |matrix_v - (factor @ projection^T)_v|^2. With equal weights this is the truncated SVD of
    COST-EFF: factor = U S, projection = V. Weights by token frequency spend the rank on the tokens that occur.

    Args:
        matrix: Shape (vocab, hidden).
        rank: In 1..hidden.
        row_weights: Non-negative weight of each token, shape (vocab,); `None` weighs all alike.

    Returns:
        factor of shape (vocab, rank) and projection of shape (hidden, rank), in the matrix's dtype.

    Example:
        >>> matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> factor, projection = factorize_embedding(matrix, 1)
        >>> (factor @ projection.T).round().abs()
        tensor([[3., 0.],
                [0., 0.]])
    """
    exact = matrix.double()
    weighted = exact if row_weights is None else exact * row_weights.double().to(exact.device).unsqueeze(1)
    # The right singular vectors are the eigenvectors of the (hidden, hidden) Gram matrix; eigh sorts ascending.
    projection = torch.linalg.eigh(exact.T @ weighted).eigenvectors[:, -rank:].flip(1)
    return (exact @ projection).to(matrix.dtype), projection.to(matrix.dtype)


def slenderize(
    model: CostEffForSequenceClassification, plan: SlenderizationPlan, token_weights: Tensor | None = None
) -> CostEffForSequenceClassification:
    """A new, narrower model with the units the plan keeps; the given model is not touched.

    Removing a unit equals zeroing its output weights. Biases of the attention output and of the feed-forward output
    stay, as do position and type embeddings, norms and exits. Saved exit settings are dropped, because they belong to
    the wider model.

    Args:
        model: Any widths, also already slenderized or factorised.
        plan: One mask entry per present head and neuron.
        token_weights: Importance of each token for the embedding factorisation, shape (vocab,); see
            [`factorize_embedding`].

    Returns:
        A model on the same device, in the same dtype, in training mode like the given one.

    Raises:
        ValueError: If the plan was made for other widths.
    """
    config = model.config
    found = (tuple(map(len, plan.head_mask)), tuple(map(len, plan.neuron_mask)))
    expected = (tuple(config.num_attention_heads), tuple(config.intermediate_size))
    if found != expected:
        raise ValueError(
            f"The plan covers heads {found[0]} and neurons {found[1]}; the model has {expected[0]} and {expected[1]}. "
            "Make the plan from this model's importance."
        )
    rank = config.embedding_rank if plan.embedding_rank is None else plan.embedding_rank
    widths = Widths(plan.num_attention_heads, plan.intermediate_size, rank)
    check_widths(config, widths)
    narrowed_config = widths.apply_to(config)
    narrowed_config.exit_config = None
    state = dict(model.state_dict())
    for layer in range(config.num_hidden_layers):
        _select_heads(state, f"costeff.layers.{layer}.attention.", plan.head_mask[layer], config.attention_head_size)
        _select_neurons(state, f"costeff.layers.{layer}.feed_forward.", plan.neuron_mask[layer])
    if plan.embedding_rank is not None:
        _factorize(state, plan.embedding_rank, token_weights)
    narrowed = type(model)(narrowed_config).to(device=model.device, dtype=model.dtype)
    narrowed.load_state_dict(state)
    return narrowed.train(model.training)


def _select_heads(state: dict[str, Tensor], prefix: str, mask: Sequence[bool], head_size: int) -> None:
    columns = torch.tensor(mask, dtype=torch.bool).repeat_interleave(head_size)
    rows = columns.repeat(3)
    state[prefix + "query_key_value.weight"] = state[prefix + "query_key_value.weight"][rows]
    state[prefix + "query_key_value.bias"] = state[prefix + "query_key_value.bias"][rows]
    state[prefix + "output.weight"] = state[prefix + "output.weight"][:, columns]


def _select_neurons(state: dict[str, Tensor], prefix: str, mask: Sequence[bool]) -> None:
    kept = torch.tensor(mask, dtype=torch.bool)
    state[prefix + "intermediate.weight"] = state[prefix + "intermediate.weight"][kept]
    state[prefix + "intermediate.bias"] = state[prefix + "intermediate.bias"][kept]
    state[prefix + "output.weight"] = state[prefix + "output.weight"][:, kept]


def _factorize(state: dict[str, Tensor], rank: int, token_weights: Tensor | None) -> None:
    words, projection = "costeff.embeddings.word_embeddings.weight", "costeff.embeddings.projection.weight"
    matrix = state[words]
    if projection in state:
        if matrix.shape[1] == rank:
            return
        matrix = matrix @ state[projection].T
    state[words], state[projection] = factorize_embedding(matrix, rank, token_weights)


def iterative_schedule(config: CostEffConfig, target: Widths, events: int | None = None) -> list[Widths]:
    """Widths after each event of an iterative slenderization, the last being the target.

    After event n of E every width is int(present - (present - target) * n / E): the schedule of COST-EFF's pipeline.

    Args:
        config: The model to start from.
        target: The widths to arrive at.
        events: E; 1 is one-shot. `None`: one per head that the widest-cut layer loses, as the paper.

    Returns:
        One entry per event.

    Example:
        >>> config = CostEffConfig(num_hidden_layers=1)
        >>> steps = iterative_schedule(config, Widths.even(1, 10, 1024, 384))
        >>> [(step.num_attention_heads[0], step.intermediate_size[0], step.embedding_rank) for step in steps]
        [(11, 2048, 576), (10, 1024, 384)]
    """
    check_widths(config, target)
    if events is None:
        lost = (now - kept for now, kept in zip(config.num_attention_heads, target.num_attention_heads, strict=True))
        events = max(1, *lost)
    elif events < 1:
        raise ValueError(f"`events` is {events}. It must be at least 1, which slenderizes in one shot.")

    def at(event: int, present: int, final: int) -> int:
        return (present * events - (present - final) * event) // events

    def each(event: int, present: Sequence[int], final: Sequence[int]) -> tuple[int, ...]:
        return tuple(at(event, now, then) for now, then in zip(present, final, strict=True))

    def rank(event: int) -> int | None:
        if target.embedding_rank is None:
            return None
        return at(event, config.embedding_rank or config.hidden_size, target.embedding_rank)

    return [
        Widths(
            each(event, config.num_attention_heads, target.num_attention_heads),
            each(event, config.intermediate_size, target.intermediate_size),
            rank(event),
        )
        for event in range(1, events + 1)
    ]


@dataclass(frozen=True)
class Budget:
    """Limits that a slenderized model must keep, everything counted.

    Args:
        max_parameters: Parameters at most; `None` for no limit.
        max_flops: FLOPs of one full-depth row at most, at `seq_length` tokens; `None` for no limit.
        seq_length: Tokens per row for the FLOPs.
    """

    max_parameters: int | None = None
    max_flops: int | None = None
    seq_length: int = 128

    def costs(self) -> list[tuple[Callable[[CostEffConfig], int], int, str]]:
        """(cost of a config, limit, unit) for each limit that is set."""
        limits: list[tuple[Callable[[CostEffConfig], int], int | None, str]] = [
            (parameter_count, self.max_parameters, "parameters"),
            (lambda config: full_depth_flops(config, self.seq_length), self.max_flops, "FLOPs per row"),
        ]
        return [(cost, limit, unit) for cost, limit, unit in limits if limit is not None]


def solve_widths(
    config: CostEffConfig,
    budget: Budget,
    *,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    embedding_rank: int | None = None,
    multiple_of: int = 8,
) -> Widths:
    """The even widths that keep a budget and come closest to COST-EFF's proportions.

    The paper keeps heads, rank and neurons in the proportions 1 : 1 : 1/2 of what there was. These widths have the
    largest smallest share, min(heads / all, rank / all, 2 * neurons / all), over what the caller has left open, and
    among equals the largest product. For BERT-base at 1/8 of the parameters that is 2 heads, 240 neurons and rank 128;
    the paper's 2, 256 and 128 are 1/7.87. Neurons and rank are multiples of `multiple_of`.

    Args:
        config: The model at its present widths.
        budget: Limits; with none set, widths that are not given stay as they are.
        num_attention_heads: Heads per layer, if the caller has decided.
        intermediate_size: Neurons per layer, if the caller has decided.
        embedding_rank: Embedding rank, if the caller has decided.
        multiple_of: Granularity of neurons and rank.

    Returns:
        Even widths.

    Raises:
        ValueError: If no widths keep the budget; the message says the smallest possible cost.
    """
    layers, heads, neurons = config.num_hidden_layers, max(config.num_attention_heads), max(config.intermediate_size)
    full_rank = config.embedding_rank or config.hidden_size
    wanted = zip((num_attention_heads, intermediate_size, embedding_rank), (heads, neurons, full_rank), strict=True)
    check_widths(config, Widths.even(layers, *(full if value is None else value for value, full in wanted)))
    head_choices = range(1, heads + 1) if num_attention_heads is None else [num_attention_heads]
    neuron_choices = _multiples(neurons, multiple_of) if intermediate_size is None else [intermediate_size]
    rank_choices = _multiples(full_rank, multiple_of) if embedding_rank is None else [embedding_rank]
    if not budget.costs():
        return Widths.even(
            layers,
            head_choices[-1],
            neuron_choices[-1],
            config.embedding_rank if embedding_rank is None else embedding_rank,
        )

    def widths(head: int, neuron: int, rank: int) -> Widths:
        keep_whole = embedding_rank is None and rank == full_rank
        return Widths.even(layers, head, neuron, config.embedding_rank if keep_whole else rank)

    best: tuple[tuple[float, float], Widths] | None = None
    smallest = {unit: _SeparableCost(cost, widths, config) for cost, _, unit in budget.costs()}
    limits = {unit: limit for _, limit, unit in budget.costs()}
    for head in head_choices:
        for rank in rank_choices:
            fitting = [n for n in neuron_choices if all(smallest[u](head, n, rank) <= limits[u] for u in limits)]
            if fitting:
                given = (num_attention_heads, embedding_rank, intermediate_size)
                parts = zip((head, rank, 2 * fitting[-1]), (heads, full_rank, neurons), given, strict=True)
                shares = [part / whole for part, whole, value in parts if value is None]
                kept = (min(shares, default=1.0), prod(shares))
                if best is None or kept > best[0]:
                    best = (kept, widths(head, fitting[-1], rank))
    if best is None:
        least = {unit: cost(head_choices[0], neuron_choices[0], rank_choices[0]) for unit, cost in smallest.items()}
        unit = max(least, key=lambda name: least[name] / limits[name])
        raise ValueError(
            f"The budget of {limits[unit]:,} {unit} cannot be reached: the smallest possible is {least[unit]:,} "
            f"({head_choices[0]} head, {neuron_choices[0]} neurons, rank {rank_choices[0]}; residual width and "
            "positions are never cut). Ask for less compression."
        )
    return best[1]


class _SeparableCost:
    """A cost that adds up from heads, neurons and rank, so that a few evaluations serve the whole grid."""

    def __init__(
        self, cost: Callable[[CostEffConfig], int], widths: Callable[[int, int, int], Widths], config: CostEffConfig
    ) -> None:
        self.cost_at = lambda head, neuron, rank: cost(widths(head, neuron, rank).apply_to(config))
        self.base = self.cost_at(0, 0, 1)
        self.parts: dict[tuple[str, int], int] = {}

    def __call__(self, head: int, neuron: int, rank: int) -> int:
        return self.base + self._part("head", head) + self._part("neuron", neuron) + self._part("rank", rank)

    def _part(self, name: str, value: int) -> int:
        if (name, value) not in self.parts:
            at = {"head": 0, "neuron": 0, "rank": 1, name: value}
            self.parts[name, value] = self.cost_at(at["head"], at["neuron"], at["rank"]) - self.base
        return self.parts[name, value]


def _multiples(largest: int, step: int) -> list[int]:
    """Multiples of `step` up to `largest`, and `largest` itself."""
    return sorted({*range(step, largest + 1, step), largest})


def describe_widths(widths: Widths) -> Mapping[str, Any]:
    """The widths as plain values for logs and JSON: a number where all layers agree, else a list."""

    def short(values: tuple[int, ...]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else list(values)

    return {
        "num_attention_heads": short(widths.num_attention_heads),
        "intermediate_size": short(widths.intermediate_size),
        "embedding_rank": widths.embedding_rank,
    }
