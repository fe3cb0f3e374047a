"""What a model costs: parameters, bytes, floating-point operations, milliseconds.

FLOPs count 2 per multiply-accumulate of linear layers, of the attention products (queries with keys, weights with
values), of the embedding's projection and of the gates and exit heads that are executed, for every token as run,
padding included. Biases, norms, activations and table look-ups are not counted. On the device a layer saved is not
time saved: [`measure_latency`] and [`measure_alternating`] give milliseconds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .configuration_costeff import EXIT_HEAD_HEADS, GATE_HEADS, CostEffConfig
from .conversion import convert_config
from .packed_linear import DENSE

FLOPS_PER_MAC = 2
PAPER_SEQ_LENGTH = 128  # tokens per row where a figure is to be compared with the paper's


def count_parameters(model: nn.Module) -> int:
    """Parameters of a built model, embeddings and exit heads included, each tensor once however often it is used.

    Args:
        model: Any module.

    Returns:
        Number of scalars.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_count(config: CostEffConfig) -> int:
    """Parameters of the model that `config` describes, everything counted, without building it.

    Args:
        config: Widths, ranks, exits and gates.

    Returns:
        Number of scalars, equal to [`count_parameters`] of the built model.

    Example: BERT-base at 2 heads, 256 neurons and rank 128 per layer (COST-EFF, Shen et al. 2022, at 1/8).

        >>> parameter_count(CostEffConfig(num_attention_heads=2, intermediate_size=256, embedding_rank=128))
        13920024
    """
    hidden, rank = config.hidden_size, config.embedding_rank
    norm = 2 * hidden
    words = config.vocab_size * hidden if rank is None else (config.vocab_size + hidden) * rank
    total = words + (config.max_position_embeddings + config.type_vocab_size) * hidden + norm
    layers = range(1, config.num_hidden_layers + 1)
    for layer in layers:
        for name, (rows, columns) in config.matrix_shapes(layer).items():
            packing = config.packing(name, (rows, columns))
            total += rows + (rows * columns if packing is None else packing.num_weights)
        total += 2 * norm
    return total + len(config.exit_layers) * config.exit_head_parameters + len(layers) * config.gate_parameters


def checkpoint_bytes(config: CostEffConfig, bytes_per_parameter: int = 4) -> int:
    """Bytes the weights take in the checkpoint file; its header adds some kilobytes.

    Args:
        config: Widths, ranks and exits.
        bytes_per_parameter: 4 for float32, 2 for float16 and bfloat16.

    Returns:
        Bytes.
    """
    total = parameter_count(config) * bytes_per_parameter
    for layer in range(1, config.num_hidden_layers + 1):
        for name, shape in config.matrix_shapes(layer).items():
            packing = config.packing(name, shape)
            if packing is not None:
                total += packing.num_indices * packing.index_dtype(*shape).itemsize
    return total


def embedding_flops(config: CostEffConfig, seq_length: int) -> int:
    """FLOPs of one row's embedding: the projection from the rank to the hidden size, 0 if it is not factorised.

    Args:
        config: Sizes.
        seq_length: Tokens as run, padding included.

    Returns:
        FLOPs.
    """
    _check_seq_length(seq_length)
    return FLOPS_PER_MAC * seq_length * (config.embedding_rank or 0) * config.hidden_size


def layer_flops(config: CostEffConfig, layer: int, seq_length: int) -> int:
    """FLOPs of one row in one encoder layer: four projections, two attention products, two feed-forward matrices.

    Of a packed matrix the blocks that are left count, or all of it where its layout is dense.

    Args:
        config: Sizes.
        layer: 1-based layer.
        seq_length: Tokens as run, padding included.

    Returns:
        FLOPs, 0 for a layer without heads and neurons.

    Raises:
        ValueError: If `layer` or `seq_length` is out of range.

    Example: one head of 2, one neuron, hidden size 4, 3 tokens: 3 * (4*4*2 + 2*4*1) + 2 * 3*3*2 = 156 multiply-adds.

        >>> sizes = dict(hidden_size=4, attention_head_size=2, num_attention_heads=1, intermediate_size=1)
        >>> layer_flops(CostEffConfig(num_hidden_layers=1, **sizes), layer=1, seq_length=3)
        312
    """
    _check_seq_length(seq_length)
    if not 1 <= layer <= config.num_hidden_layers:
        raise ValueError(f"There is no layer {layer}: `layer` is 1-based and lies in 1..{config.num_hidden_layers}.")
    multiplied = 0
    for name, (rows, columns) in config.matrix_shapes(layer).items():
        packing = config.packing(name, (rows, columns))
        multiplied += rows * columns if packing is None or packing.layout == DENSE else packing.num_weights
    width = config.num_attention_heads[layer - 1] * config.attention_head_size
    return FLOPS_PER_MAC * seq_length * (multiplied + 2 * seq_length * width)


def relative_layer_flops(config: CostEffConfig) -> list[float]:
    """FLOPs of each layer over those of the mean layer, on a row of 128 tokens: what it counts in a budget of layers.

    Args:
        config: Sizes.

    Returns:
        One number per layer, whose mean is 1; all of them 1 where layers are alike.

    Example: the middle one of three layers has neither heads nor neurons.

        >>> sizes = dict(hidden_size=4, attention_head_size=2, num_hidden_layers=3)
        >>> relative_layer_flops(CostEffConfig(num_attention_heads=[1, 0, 1], intermediate_size=[8, 0, 8], **sizes))
        [1.5, 0.0, 1.5]
    """
    layers = config.num_hidden_layers
    costs = [layer_flops(config, layer, PAPER_SEQ_LENGTH) for layer in range(1, layers + 1)]
    return [cost * layers / sum(costs) if sum(costs) else 1.0 for cost in costs]


def exit_head_flops(config: CostEffConfig, seq_length: int) -> int:
    """FLOPs of one row in one exit head: one vector through the classifier; pooling adds no multiplications.

    An attention head also maps every token to its width, and attends from the first one.

    Args:
        config: Form and sizes.
        seq_length: Tokens as run, padding included.

    Returns:
        FLOPs.
    """
    _check_seq_length(seq_length)
    labels, size = config.num_labels or 0, config.exit_head_size
    if config.exit_head == "linear":
        return FLOPS_PER_MAC * config.hidden_size * labels
    attention = _first_token_attention_flops(config.hidden_size, size, EXIT_HEAD_HEADS, seq_length)
    return attention + FLOPS_PER_MAC * size * (size + labels)


def gate_flops(config: CostEffConfig, seq_length: int) -> int:
    """FLOPs of one row in one gate; 0 without gates.

    Args:
        config: Form and sizes.
        seq_length: Tokens as run, padding included.

    Returns:
        FLOPs.

    Example: at MiniLM's width, gates of the two forms against the layer that they may save.

        >>> config = CostEffConfig(hidden_size=384, attention_head_size=32, intermediate_size=1536)
        >>> for form in ("attention", "linear"):
        ...     config.skip_gates = form
        ...     print(f"{form}: {gate_flops(config, 128) / layer_flops(config, 1, 128):.4f}")
        attention: 0.0269
        linear: 0.0000
    """
    _check_seq_length(seq_length)
    if config.skip_gates is None:
        return 0
    if config.skip_gates == "linear":
        return FLOPS_PER_MAC * config.hidden_size
    attention = _first_token_attention_flops(config.hidden_size, config.gate_size, GATE_HEADS, seq_length)
    return attention + FLOPS_PER_MAC * config.gate_size


def _first_token_attention_flops(hidden_size: int, size: int, num_heads: int, seq_length: int) -> int:
    """All tokens to the small width, scores and mixture of each head, one query and each head's key and value."""
    tokens = seq_length * size * (hidden_size + 2 * num_heads)
    return FLOPS_PER_MAC * (tokens + size * size * (1 + 2 * num_heads))


def cumulative_flops(
    config: CostEffConfig,
    seq_length: int,
    checked_exits: Sequence[int] | None = None,
    skipped: Collection[int] | None = (),
) -> list[int]:
    """FLOPs of one row that leaves at layer 1, 2, ..., layers: embedding, gates, layers, and heads executed by then.

    Args:
        config: Sizes, exits and gates.
        seq_length: Tokens as run, padding included.
        checked_exits: 1-based layers whose head is executed on the way, as `ExitConfig.checked_exits`. `None`: every
            exit of the model, as in a forward pass; empty: none but the last. The last layer's head always counts.
        skipped: 1-based layers that the row skips, with the heads after them; their gates count, as all do. `None`: the
            gates are not asked, as with `skip_layers=False`.

    Returns:
        FLOPs, one entry per layer, ascending. At a layer without a checked exit, what has been spent by then.

    Raises:
        ValueError: If `checked_exits` names a layer without an exit, or `seq_length` is below 1.
    """
    depth = config.num_hidden_layers
    checked = set(config.exit_layers if checked_exits is None else checked_exits) | {depth}
    if unknown := sorted(checked - set(config.exit_layers)):
        raise ValueError(
            f"`checked_exits` names layers {unknown}, which have no exit. The model's exits stand after layers "
            f"{config.exit_layers}."
        )
    gate, head = 0 if skipped is None else gate_flops(config, seq_length), exit_head_flops(config, seq_length)
    left_out = set(skipped or ())
    spent = embedding_flops(config, seq_length)
    result = []
    for layer in range(1, depth + 1):
        spent += gate
        spent += 0 if layer in left_out else layer_flops(config, layer, seq_length)
        spent += head if layer == depth or layer in checked - left_out else 0
        result.append(spent)
    return result


def full_depth_flops(config: CostEffConfig, seq_length: int, all_exits: bool = False) -> int:
    """FLOPs of one row through all layers.

    Args:
        config: Sizes and exits.
        seq_length: Tokens as run, padding included.
        all_exits: Whether every exit head is executed, as in a forward pass; otherwise the last one alone, as in
            `predict(early_exit=False)`.

    Returns:
        FLOPs.

    Example:
        >>> slim = CostEffConfig(num_attention_heads=2, intermediate_size=256, embedding_rank=128)
        >>> round(full_depth_flops(slim, seq_length=128) / 1e9, 2)
        2.54
    """
    return cumulative_flops(config, seq_length, None if all_exits else ())[-1]


def mean_flops(
    config: CostEffConfig,
    exit_layers: Sequence[int] | Tensor,
    seq_lengths: int | Sequence[int] | Tensor,
    checked_exits: Sequence[int] | None = None,
    skipped_layers: Tensor | None = None,
) -> float:
    """Mean FLOPs per row of a data set answered with early exit.

    Args:
        config: Sizes, exits and gates.
        exit_layers: Layer each row left at (1-based), as `predict` returns it, shape (rows,).
        seq_lengths: Tokens each row ran with, padding included, shape (rows,), or one number for all. Rows that are
            cropped later on, when longer ones have left their batch, are still counted at this length.
        checked_exits: As in [`cumulative_flops`].
        skipped_layers: Whether each row skipped each layer, as `predict` returns it, shape (rows, layers); `None` where
            no gates were asked.

    Returns:
        FLOPs per row.

    Raises:
        ValueError: If there are no rows, the shapes differ, or an exit layer lies outside the model.
    """
    layers = torch.as_tensor(exit_layers)
    lengths = torch.as_tensor(seq_lengths)
    lengths = lengths.expand(layers.shape) if lengths.ndim == 0 else lengths
    if layers.ndim != 1 or layers.shape != lengths.shape or not len(layers):
        raise ValueError(
            f"`exit_layers` has shape {tuple(layers.shape)} and `seq_lengths` {tuple(lengths.shape)}. Give one entry "
            "per row in each, and at least one row."
        )
    if int(layers.min()) < 1 or int(layers.max()) > config.num_hidden_layers:
        raise ValueError(
            f"`exit_layers` lies in {int(layers.min())}..{int(layers.max())}. Exit layers are 1-based: they must lie "
            f"in 1..{config.num_hidden_layers}."
        )
    if skipped_layers is not None and skipped_layers.shape != (len(layers), config.num_hidden_layers):
        raise ValueError(
            f"`skipped_layers` has shape {tuple(skipped_layers.shape)}. It must be "
            f"{(len(layers), config.num_hidden_layers)}: one entry per row and layer, as `predict` returns it."
        )
    paths = [None] * len(layers) if skipped_layers is None else map(_layers_marked, skipped_layers.tolist())
    rows = Counter(zip(layers.tolist(), lengths.tolist(), paths, strict=True))
    spent = (
        count * cumulative_flops(config, length, checked_exits, path)[layer - 1]
        for (layer, length, path), count in rows.items()
    )
    return sum(spent) / len(layers)


def _layers_marked(marks: Sequence[bool]) -> tuple[int, ...]:
    return tuple(layer for layer, marked in enumerate(marks, start=1) if marked)


def stock_flops(stock_config: PreTrainedConfig, seq_length: int) -> int:
    """FLOPs of one row in the stock sequence classifier of a config, the figure that ratios refer to.

    The heads differ in name and activation and cost the same in every supported family: one dense layer of the hidden
    size (BERT's pooler, the others' own) and the classifier, both on the first token.

    Args:
        stock_config: Config of a model of one of the `SUPPORTED_FAMILIES`.
        seq_length: Tokens as run, padding included.

    Returns:
        FLOPs.

    Raises:
        ValueError: For a config that [`convert_config`] refuses.

    Example:
        >>> from transformers import BertConfig
        >>> round(stock_flops(BertConfig(), seq_length=128) / 1e9, 2)
        22.35
    """
    config = convert_config(stock_config)
    dense = FLOPS_PER_MAC * config.hidden_size * config.hidden_size
    return full_depth_flops(config, seq_length) + dense


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call.

    Args:
        median_ms: Median, milliseconds.
        p95_ms: 95th percentile (nearest rank: the time that 95% of the calls kept to), milliseconds.
        repeats: Timed calls.
        times_ms: Every timed call, in order, milliseconds.
    """

    median_ms: float
    p95_ms: float
    repeats: int
    times_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """How two times relate, round by round.

    Args:
        median: Over the rounds.
        lower_quartile: The same.
        upper_quartile: The same.
    """

    median: float
    lower_quartile: float
    upper_quartile: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower_quartile:.2f} to {self.upper_quartile:.2f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The ratio of two candidates' times within a round, which a machine that slows down for a while leaves as it is.

    Args:
        above: Times of the rounds of [`measure_alternating`], shape (rounds,).
        below: Times of the other candidate in the same rounds.

    Example:
        >>> print(ratio([4.0, 8.0, 6.0], [2.0, 4.0, 2.0]))
        2.00 (2.00 to 2.50)
    """
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, low, high)


def measure_latency(function: Callable[[], Any], *, warmup: int = 3, repeats: int = 20) -> Latency:
    """Time of `function()`, warmed up, as median and 95th percentile.

    Args:
        function: Called without arguments; its result is thrown away.
        warmup: Untimed calls before the timed ones, 0 or more.
        repeats: Timed calls, at least 1.

    Returns:
        Milliseconds per call.

    Raises:
        ValueError: If `warmup` or `repeats` is too small.
    """
    return measure_alternating({"function": function}, warmup=warmup, repeats=repeats)["function"]


def measure_alternating(
    functions: Mapping[str, Callable[[], Any]],
    *,
    warmup: int = 3,
    repeats: int = 20,
    clock: Callable[[], float] | None = None,
) -> dict[str, Latency]:
    """Times of several candidates, called in turn (a b c a b c ...), so that a noisy machine favours none of them.

    Work queued on a GPU is waited for before and after every timed call.

    Args:
        functions: Name -> candidate, called without arguments.
        warmup: Untimed rounds over all candidates, 0 or more.
        repeats: Timed rounds, at least 1.
        clock: Gives seconds; `None` for the wall clock. `time.process_time` counts those that this process ran, on a
            machine that others use too; with several threads they add up.

    Returns:
        Name -> milliseconds per call, in the given order; empty for no candidates.

    Raises:
        ValueError: If `warmup` or `repeats` is too small.
    """
    if warmup < 0 or repeats < 1:
        raise ValueError(
            f"`warmup` is {warmup} and `repeats` {repeats}. `warmup` must be 0 or more, `repeats` 1 or more."
        )
    times_ms: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(warmup + repeats):
        for name, function in functions.items():
            elapsed_ms = _timed_ms(function, clock or time.perf_counter)
            if round_index >= warmup:
                times_ms[name].append(elapsed_ms)
    return {name: _summary(values) for name, values in times_ms.items()}


def _timed_ms(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    function()
    _synchronize()
    return (clock() - start) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(values_ms: list[float]) -> Latency:
    nearest_rank = math.ceil(0.95 * len(values_ms)) - 1
    return Latency(statistics.median(values_ms), sorted(values_ms)[nearest_rank], len(values_ms), tuple(values_ms))


def _check_seq_length(seq_length: int) -> None:
    if seq_length < 1:
        raise ValueError(f"`seq_length` is {seq_length}. A row has at least 1 token.")
