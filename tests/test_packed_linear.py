"""A packed linear layer answers as the full matrix that it stands for, in every layout."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional

from helpers import tiny_config, tiny_model
from hf_costeff import CostEffConfig
from hf_costeff.packed_linear import COLUMNS, LAYOUTS, ROWS, PackedLinear, Packing, use_packed_layers

NAME = "layers.0.feed_forward.output"  # 12 x 10 in the tiny model
COLUMN_SLABS = {"along": COLUMNS, "slabs": [4, 4, 2], "kept": [3, 0, 12], "block": [1, 4], "layout": "panels"}
ROW_SLABS = {"along": ROWS, "slabs": [5, 7], "kept": [10, 4], "block": [5, 1], "layout": "panels"}
SQUARES = {"along": COLUMNS, "slabs": [2] * 5, "kept": [2, 4, 12, 0, 6], "block": [2, 2], "layout": "panels"}


def filled(described, seed=0):
    """A packed 12 x 10 layer with random contents, and the full matrix, put together weight by weight."""
    torch.manual_seed(seed)
    packing = Packing.from_dict(described, 12, 10)
    layer = PackedLinear(10, 12, packing)
    other = 12 if packing.along == COLUMNS else 10
    block = packing.block[0] if packing.along == COLUMNS else packing.block[1]
    choices = [torch.randperm(other // block)[: kept // block].sort().values for kept in packing.kept]
    lines = [(chosen[:, None] * block + torch.arange(block)).flatten() for chosen in choices]
    layer.load_state_dict(
        {
            "values": torch.randn(packing.num_weights),
            "bias": torch.randn(12),
            "index": torch.cat(lines).to(torch.int16),
        }
    )
    full, read, start = torch.zeros(12, 10), iter(layer.values.tolist()), 0
    for slab, kept in zip(packing.slabs, lines, strict=True):
        inside = range(start, start + slab)
        order = [(row, column) for row in kept.tolist() for column in inside]
        if packing.along == ROWS:
            order = [(row, column) for row in inside for column in kept.tolist()]
        for row, column in order:
            full[row, column] = next(read)
        start += slab
    return layer, full


@pytest.mark.parametrize("described", [COLUMN_SLABS, ROW_SLABS, SQUARES], ids=["columns", "rows", "squares"])
@pytest.mark.parametrize("shape", [(3, 5, 10), (3, 120, 10), (1, 10), (10,), (0, 10)], ids=str)
def test_every_layout_answers_as_the_full_matrix(described, shape):
    layer, full = filled(described)
    inputs = torch.randn(shape)
    expected = functional.linear(inputs, full, layer.bias)
    torch.testing.assert_close(layer.dense(), full)
    layouts = layer.packing.layouts(12, 10)
    expected_layouts = {"columns": ("panels", "tiles", "dense"), "rows": ("panels", "dense")}[described["along"]]
    assert layouts == (LAYOUTS if described is SQUARES else expected_layouts)
    for layout in layouts:
        layer.set_layout(layout)
        for _ in range(2):  # the second call finds everything prepared
            with torch.no_grad():
                torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("described", "layout"),
    [
        *((COLUMN_SLABS, layout) for layout in ("panels", "tiles", "dense")),
        *((ROW_SLABS, layout) for layout in ("panels", "dense")),
        *((SQUARES, layout) for layout in LAYOUTS),
    ],
)
def test_gradients_are_those_of_the_full_matrix_where_it_is_kept(described, layout):
    layer, full = filled(described)
    layer.set_layout(layout)
    inputs, weights = torch.randn(6, 10, requires_grad=True), torch.randn(6, 12)
    (layer(inputs) * weights).sum().backward()
    twin, seen = nn.Linear(10, 12), inputs.grad.clone()
    twin.load_state_dict({"weight": full, "bias": layer.bias.detach()})
    inputs.grad = None
    (twin(inputs) * weights).sum().backward()
    torch.testing.assert_close(seen, inputs.grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    with torch.no_grad():
        layer.values.copy_(layer.values.grad)
    torch.testing.assert_close(layer.dense(), twin.weight.grad * (full != 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_follows_weights_that_change(layout):
    layer, full = filled(SQUARES)
    layer.set_layout(layout)
    inputs = torch.randn(4, 10)
    with torch.no_grad():
        layer(inputs)
        layer.values.mul_(2)
        torch.testing.assert_close(layer(inputs), functional.linear(inputs, 2 * full, layer.bias), rtol=1e-5, atol=1e-5)
        layer.load_state_dict({**layer.state_dict(), "values": layer.values / 2})
        torch.testing.assert_close(layer(inputs), functional.linear(inputs, full, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_has_answered_can_be_copied(layout):
    layer, _ = filled(SQUARES)
    layer.set_layout(layout)
    inputs = torch.randn(4, 10)
    with torch.no_grad():
        answer = layer(inputs)
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        layer.values.zero_()
        for twin in twins:
            torch.testing.assert_close(twin(inputs), answer)


def test_mixed_precision_takes_the_same_way():
    for described in (COLUMN_SLABS, ROW_SLABS):
        layer, full = filled(described)
        inputs = torch.randn(4, 10)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(inputs)
        torch.testing.assert_close(found.float(), functional.linear(inputs, full, layer.bias), rtol=0.05, atol=0.1)


def test_indices_take_16_bits_where_they_fit():
    tall = Packing(COLUMNS, (1,), (0,), (1, 1))
    assert tall.index_dtype(32_768, 1) == torch.int16 and tall.index_dtype(32_769, 1) == torch.int32
    assert Packing(ROWS, (1,), (0,), (1, 1)).index_dtype(32_769, 8) == torch.int16


def test_an_index_outside_the_matrix_is_refused():
    layer, _ = filled(COLUMN_SLABS)
    layer.index[0] = 12
    with pytest.raises(ValueError, match=r"indices 0\.\.12 of 12|indices \d+\.\.12 of 12"):
        layer(torch.zeros(1, 10))
    layer.index[0] = -1
    with pytest.raises(ValueError, match=r"indices -1\.\."):
        layer(torch.zeros(1, 10))


def test_a_layout_that_a_matrix_cannot_have_is_refused():
    layer, _ = filled(COLUMN_SLABS)
    for layout in ("sparse_blocks", "fast"):
        with pytest.raises(ValueError, match=f"{layout}.*panels, tiles, dense"):
            layer.set_layout(layout)


HOSTILE = {
    "not a dict": [1, 2],
    "a key too few": {key: value for key, value in COLUMN_SLABS.items() if key != "kept"},
    "a key too many": {**COLUMN_SLABS, "extra": 1},
    "another direction": {**COLUMN_SLABS, "along": "diagonal"},
    "another layout": {**COLUMN_SLABS, "layout": "exec"},
    "blocks that do not divide": {**COLUMN_SLABS, "layout": "sparse_blocks"},
    "slabs beyond the matrix": {**COLUMN_SLABS, "slabs": [4, 4, 4]},
    "tiles of row slabs": {**ROW_SLABS, "layout": "tiles"},
    "an empty slab": {**COLUMN_SLABS, "slabs": [10, 0, 0]},
    "slabs of text": {**COLUMN_SLABS, "slabs": ["4", 4, 2]},
    "a number as a list": {**COLUMN_SLABS, "kept": 15},
    "more kept than there is": {**COLUMN_SLABS, "kept": [3, 0, 13]},
    "a negative number kept": {**COLUMN_SLABS, "kept": [3, -1, 12]},
    "one count too few": {**COLUMN_SLABS, "kept": [3, 12]},
    "a bool": {**COLUMN_SLABS, "kept": [True, 0, 12]},
    "a huge list": {**COLUMN_SLABS, "kept": [0] * 10**6},
    "three block sizes": {**COLUMN_SLABS, "block": [1, 1, 1]},
    "a block of nothing": {**COLUMN_SLABS, "block": [0, 4]},
    "a list inside": {**COLUMN_SLABS, "along": ["columns"]},
}


@pytest.mark.parametrize("described", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_is_refused_by_the_layers_name(described):
    with pytest.raises(StrictDataclassError) as refused:
        tiny_config(packed_layers={NAME: described})
    assert NAME in str(refused.value.__cause__) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["layers.4.feed_forward.output", "exits.1.classifier", "layers.0", "", 7])
def test_a_packed_layer_that_the_model_does_not_have_is_refused(name):
    with pytest.raises(StrictDataclassError) as refused:
        tiny_config(packed_layers={name: COLUMN_SLABS})
    assert "no such linear layer" in str(refused.value.__cause__)


def test_bad_widths_are_named_before_what_is_packed():
    with pytest.raises(StrictDataclassError) as refused:
        tiny_config(num_attention_heads=[1, 2], packed_layers={NAME: COLUMN_SLABS})
    assert "num_attention_heads" in str(refused.value.__cause__)


def test_the_config_alone_knows_every_shape():
    model = tiny_model(packed_layers={NAME: COLUMN_SLABS})
    again = CostEffConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    with torch.device("meta"):
        empty = type(model)(again)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    assert shapes[f"costeff.{NAME}.values"][0] == (3 * 4 + 12 * 2,)


def test_nothing_is_replaced_without_packed_layers():
    plain = nn.Sequential(nn.Linear(2, 2))
    use_packed_layers(plain, None)
    assert type(plain[0]) is nn.Linear and "layout=panels" in repr(filled(ROW_SLABS)[0])
