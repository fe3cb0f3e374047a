"""A pruned model made really smaller: dead units out, panels in place of matrices, the fastest layout measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .block_pruning import BlockMasks, zero_blocks
from .efficiency import measure_alternating
from .encoder_layers import eager_attention
from .modeling_costeff import CostEffForSequenceClassification, CostEffModel, inference
from .packed_linear import COLUMNS, DENSE, PACKABLE, PANELS, ROWS, PackedLinear, Packing
from .slenderization import SlenderizationPlan, slenderize

WORTH = 0.95
"""Share of the dense block's time below which another layout is taken."""
PREFIX = CostEffForSequenceClassification.base_model_prefix


def pack(model: CostEffForSequenceClassification, masks: BlockMasks) -> CostEffForSequenceClassification:
    """A new model that stores only what masks keep, and answers as the given one with the pruned blocks at zero.

    Heads and neurons that nothing reads or writes any more go altogether: what they still add, a constant, goes into
    the output bias. Of every other pruned matrix the kept rows of each column slab (or columns of each row slab, where
    blocks are higher than wide) become one dense panel. Embeddings stay whole. Every packed layer has the layout
    `"panels"`; [`choose_layouts`] measures whether that pays.

    Args:
        model: The model that the masks were made for, or one trained under them; not changed.
        masks: What stays.

    Returns:
        A model that saves, loads, trains and predicts like any other, without exit settings.

    Raises:
        ValueError: If the masks are those of another model.
    """
    pruned = zero_blocks(model, masks)
    alive = _alive_units(pruned, masks)
    _fold_constants(pruned, alive)
    slim = slenderize(pruned, alive)
    config = copy.deepcopy(slim.config)
    state = dict(slim.state_dict())
    packed_layers = {}
    for layer in range(config.num_hidden_layers):
        for part in PACKABLE:
            name = f"layers.{layer}.{part}"
            matrix = state[f"{PREFIX}.{name}.weight"]
            if name not in masks.masks or not matrix.numel():
                continue
            packing, kept = _packing(masks, name, *_alive_lines(part, alive, layer, config.attention_head_size))
            del state[f"{PREFIX}.{name}.weight"]
            state[f"{PREFIX}.{name}.values"], indices = _panels(matrix, packing, kept)
            state[f"{PREFIX}.{name}.index"] = indices.to(packing.index_dtype(*matrix.shape))
            packed_layers[name] = packing.to_dict()
    config.packed_layers = packed_layers
    config.validate()
    packed = type(model)(config).to(device=model.device, dtype=model.dtype)
    packed.load_state_dict(state)
    return packed.train(model.training)


def _alive_units(model: CostEffForSequenceClassification, masks: BlockMasks) -> SlenderizationPlan:
    """Heads whose values are written and read, and neurons alike; every unit where a matrix was not pruned."""
    config, base = model.config, model.costeff
    head_masks, neuron_masks = [], []

    def mask(layer: int, part: str) -> Tensor:
        name = f"layers.{layer}.{part}"
        whole = torch.ones_like(base.get_parameter(f"{name}.weight"), dtype=torch.bool, device="cpu")
        return masks.weight_mask(name) if name in masks.masks else whole

    for layer, (heads, neurons) in enumerate(zip(config.num_attention_heads, config.intermediate_size, strict=True)):
        fused, mixed, up, down = (mask(layer, part) for part in PACKABLE)
        written = fused.reshape(3, heads, -1)[2].any(dim=1) if heads else torch.ones(0, dtype=torch.bool)
        read = mixed.reshape(config.hidden_size, heads, -1).any(dim=2).any(dim=0) if heads else written
        head_masks.append(tuple((written & read).tolist()))
        alive = up.any(dim=1) & down.any(dim=0) if neurons else torch.ones(0, dtype=torch.bool)
        neuron_masks.append(tuple(alive.tolist()))
    return SlenderizationPlan(tuple(head_masks), tuple(neuron_masks))


@torch.no_grad()
def _fold_constants(model: CostEffForSequenceClassification, alive: SlenderizationPlan) -> None:
    """Add to the output biases what units that go still add: their bias, through activation and output matrix.

    A head without values of its own mixes equal ones, so it passes on its value bias whatever it attends to.
    """
    for layer, head_mask, neuron_mask in zip(model.costeff.layers, alive.head_mask, alive.neuron_mask, strict=True):
        attention: Any = layer.attention
        feed_forward: Any = layer.feed_forward
        dead = ~torch.tensor(head_mask, dtype=torch.bool).repeat_interleave(attention.head_size)
        values = attention.query_key_value.bias.view(3, -1)[2]
        attention.output.bias += attention.output.weight[:, dead] @ values[dead]
        dead = ~torch.tensor(neuron_mask, dtype=torch.bool)
        constant = feed_forward.activation(feed_forward.intermediate.bias[dead])
        feed_forward.output.bias += feed_forward.output.weight[:, dead] @ constant


def _alive_lines(
    part: str, alive: SlenderizationPlan, layer: int, head_size: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows and which columns of a matrix are left without the dead units; `None` for all."""
    heads = torch.tensor(alive.head_mask[layer], dtype=torch.bool).repeat_interleave(head_size)
    neurons = torch.tensor(alive.neuron_mask[layer], dtype=torch.bool)
    left: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "attention.query_key_value": (heads.repeat(3), None),
        "attention.output": (None, heads),
        "feed_forward.intermediate": (neurons, None),
        "feed_forward.output": (None, neurons),
    }
    return left[part]


def _packing(masks: BlockMasks, name: str, rows: Tensor | None, columns: Tensor | None) -> tuple[Packing, Tensor]:
    """How a matrix is packed, and what each slab keeps: shape (lines, slabs), True = keep, dead lines left out."""
    height, width = masks.blocks.size_in(*masks.shapes[name], name)
    mask, along, slab, block = masks.masks[name], COLUMNS, width, height
    (lines, length), alive_lines, alive_length = masks.shapes[name], rows, columns
    if height > width:
        mask, along, slab, block = mask.T, ROWS, height, width
        lines, length, alive_lines, alive_length = length, lines, columns, rows
    kept = mask.repeat_interleave(block, 0)[:lines]
    kept = kept if alive_lines is None else kept[alive_lines]
    left = torch.ones(length, dtype=torch.long) if alive_length is None else alive_length.long()
    sizes = torch.stack([part.sum() for part in left.split(slab)])
    kept, slabs = kept[:, sizes > 0], tuple(sizes[sizes > 0].tolist())
    left_of = (len(kept), sum(slabs)) if along == COLUMNS else (sum(slabs), len(kept))
    block_left = (min(height, left_of[0]), min(width, left_of[1]))
    return Packing(along, slabs, tuple(kept.sum(dim=0).tolist()), block_left), kept


def _panels(matrix: Tensor, packing: Packing, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The values of [`PackedLinear`], shape (weights,), and its indices, shape (indices,)."""
    values, indices = [matrix.new_zeros(0)], [torch.zeros(0, dtype=torch.long)]
    for slab, (start, stop) in enumerate(pairwise(accumulate(packing.slabs, initial=0))):
        index = kept[:, slab].nonzero().flatten()
        lines = index.to(matrix.device)
        panel = matrix[lines, start:stop] if packing.along == COLUMNS else matrix[start:stop][:, lines]
        values.append(panel.flatten())
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def unpack(model: CostEffForSequenceClassification) -> CostEffForSequenceClassification:
    """A new model with full matrices, zero where blocks were pruned; one that is not packed is copied.

    Args:
        model: Packed or not; not changed.

    Returns:
        A model that answers alike and can be slenderized, pruned and converted.
    """
    full = copy.deepcopy(model)
    unpack_layers(full.costeff)
    full.config.packed_layers = None
    return full


def unpack_layers(model: CostEffModel) -> None:
    """Put full linear layers in the place of a model's packed ones."""
    for name, layer in list(packed_linears(model)):
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta", dtype=layer.values.dtype)
        linear.weight = nn.Parameter(layer.dense().detach().contiguous(), requires_grad=layer.values.requires_grad)
        linear.bias = layer.bias
        model.set_submodule(name, linear.train(layer.training))


def packed_linears(model: CostEffModel) -> Iterator[tuple[str, PackedLinear]]:
    """Name and layer of everything packed in a model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


def set_layouts(model: CostEffForSequenceClassification, layouts: dict[str, str]) -> None:
    """Choose how packed layers are multiplied, in the model and in its config.

    Args:
        model: A packed model; changed in place, its answers stay the same.
        layouts: Name of a packed layer -> layout.

    Raises:
        ValueError: If a layer is not packed, or cannot have its layout.
    """
    packed = dict(packed_linears(model.costeff))
    if unknown := sorted(set(layouts) - set(packed)):
        raise ValueError(
            f"{unknown[0]} is no packed layer. The model has: {', '.join(packed) or 'none, pack it first'}."
        )
    described = copy.deepcopy(model.config.packed_layers or {})
    for name, layout in layouts.items():
        packed[name].set_layout(layout)
        described[name]["layout"] = layout
    model.config.packed_layers = described


def choose_layouts(
    model: CostEffForSequenceClassification, batch_size: int = 32, seq_length: int = 64, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Give every packed layer the layout that is fastest here, measured inside its own attention or feed-forward block.

    A layer stays dense unless another layout saves a twentieth of its block's time, and all do unless the whole model
    gains by the layouts chosen. What is stored does not depend on the layout, so a model can be measured again on
    another machine.

    Args:
        model: A packed model; its layouts are changed in place.
        batch_size: Rows of the batch to measure with.
        seq_length: Tokens per row.
        repeats: Timed calls of every candidate.

    Returns:
        Per layer: layout -> median milliseconds of the block that the layer is in, the chosen one first.
    """
    if not model.config.packed_layers:
        return {}
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, eager_attention)
    shape = (batch_size, seq_length, model.config.hidden_size)
    hidden = torch.randn(shape, device=model.device, dtype=model.dtype)
    measured = {}
    with inference(model):
        for name, layer in packed_linears(model.costeff):
            block: Any = model.costeff.get_submodule(name.rpartition(".")[0])
            others = (None, attend) if name.split(".")[2] == "attention" else ()
            run = partial(block, hidden, *others)
            candidates = {layout: partial(_run_with, layer, layout, run) for layout in _runnable(layer, run)}
            times = measure_alternating(candidates, warmup=1, repeats=repeats)
            by_time = sorted(times, key=lambda layout: times[layout].median_ms * (WORTH if layout == DENSE else 1))
            measured[name] = {layout: times[layout].median_ms for layout in by_time}
            layer.forget()
            layer.set_layout(by_time[0])
        chosen = {name: next(iter(times)) for name, times in measured.items()}
        if not _gains(model, chosen, shape[:2], repeats):
            chosen = dict.fromkeys(chosen, DENSE)
    set_layouts(model, chosen)
    return {name: {chosen[name]: times[chosen[name]], **times} for name, times in measured.items()}


def _gains(
    model: CostEffForSequenceClassification, chosen: dict[str, str], shape: tuple[int, int], repeats: int
) -> bool:
    """Whether the whole model is faster with the layouts chosen than with all of them dense."""
    rows, tokens = shape
    batch = torch.ones(rows, min(tokens, model.config.longest_text), dtype=torch.long, device=model.device)
    layers = dict(packed_linears(model.costeff))

    def run(layouts: dict[str, str]) -> None:
        for name, layout in layouts.items():
            layers[name].set_layout(layout)
        model.predict(batch, early_exit=False)

    candidates = {"chosen": partial(run, chosen), DENSE: partial(run, dict.fromkeys(chosen, DENSE))}
    times = measure_alternating(candidates, warmup=1, repeats=repeats)
    for layer in layers.values():
        layer.forget()
    return times["chosen"].median_ms < times[DENSE].median_ms


def _run_with(layer: PackedLinear, layout: str, run: Callable[[], Any]) -> None:
    layer.set_layout(layout)
    run()


def _runnable(layer: PackedLinear, run: Callable[[], Any]) -> list[str]:
    """The layouts that this torch can run on this device; block-sparse rows are missing in some builds."""
    found = []
    for layout in layer.packing.layouts(layer.out_features, layer.in_features):
        try:
            _run_with(layer, layout, run)
        except RuntimeError:
            if layout in (PANELS, DENSE):
                raise
        else:
            found.append(layout)
    return found
