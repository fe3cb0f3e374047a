"""A packed model answers as the masked one, is as small as it says, and goes wherever a model goes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from helpers import random_batch, tiny_bert, tiny_model
from hf_costeff import SlenderizationPlan, convert_from_stock, convert_to_stock, slenderize
from hf_costeff.block_pruning import BlockShape, prune_blocks, zero_blocks
from hf_costeff.efficiency import Latency, checkpoint_bytes, count_parameters, layer_flops, parameter_count
from hf_costeff.export import plain_model
from hf_costeff.importance import compute_importance
from hf_costeff.packed_linear import PackedLinear
from hf_costeff.packing import choose_layouts, pack, packed_linears, set_layouts, unpack

SHAPES = {
    "rows of column slabs": BlockShape(columns=4),
    "uneven slabs": BlockShape(columns=5),
    "columns of row slabs": BlockShape(rows=5, columns=1),
    "rectangles": BlockShape(rows=4, columns=3),
    "balanced squares": BlockShape(rows=2, columns=2, balanced=True),
    "whole rows": BlockShape(rows=1),
    "two slabs": BlockShape(column_slabs=2),
}
BATCH = random_batch([7, 3, 11, 2, 9, 5])


@pytest.fixture
def model():
    return convert_from_stock(tiny_bert())


def same_answers(packed, masked):
    for early_exit in (False, 0.9):
        found, expected = (model.predict(**BATCH, early_exit=early_exit) for model in (packed, masked))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.exit_layer, expected.exit_layer)


@pytest.mark.parametrize("blocks", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ratio", [0, 0.5, 0.9])
def test_a_packed_model_answers_as_the_masked_one(model, blocks, ratio):
    masks = prune_blocks(model, blocks, ratio=ratio)
    packed, masked = pack(model, masks), zero_blocks(model, masks)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    same_answers(packed, masked)
    for name, _ in packed_linears(packed.costeff):
        set_layouts(packed, {name: "sparse_blocks" if blocks.rows and blocks.rows == blocks.columns else "dense"})
    same_answers(packed, masked)


@pytest.mark.parametrize("changes", [{"num_attention_heads": [2, 0, 1, 3]}, {"exit_pooling": "mean"}], ids=str)
def test_slim_multi_exit_models_are_packed(changes):
    slim = tiny_model(**changes)
    masks = prune_blocks(slim, BlockShape(column_slabs=3), ratio=0.44)
    same_answers(pack(slim, masks), zero_blocks(slim, masks))


def families():
    sizes = {"vocab_size": 41, "max_position_embeddings": 26, "num_labels": 3}
    torch.manual_seed(0)
    yield RobertaForSequenceClassification(
        RobertaConfig(**sizes, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16)
    )
    yield DistilBertForSequenceClassification(DistilBertConfig(**sizes, dim=12, n_layers=2, n_heads=3, hidden_dim=16))


@pytest.mark.parametrize("stock", families(), ids=lambda stock: stock.config.model_type)
def test_other_families_are_packed(stock):
    ours = convert_from_stock(stock).eval()
    masks = prune_blocks(ours, BlockShape(columns=6), ratio=0.5)
    same_answers(pack(ours, masks), zero_blocks(ours, masks))


def test_units_that_nothing_reads_or_writes_leave_the_shape(model):
    masks = prune_blocks(model, BlockShape(columns=4), ratio=0)
    layer = "layers.1."
    masks.masks[f"{layer}attention.query_key_value"][28:32] = False  # values of head 1: it passes on its bias
    masks.masks[f"{layer}attention.output"][:, 2] = False  # nobody reads head 2
    masks.masks[f"{layer}feed_forward.intermediate"][3] = False  # a constant neuron
    masks.masks[f"{layer}feed_forward.output"][:, 2] = False  # neurons 8 to 11 are not read
    packed = pack(model, masks)
    assert packed.config.num_attention_heads == [3, 1, 3, 3] and packed.config.intermediate_size == [16, 11, 16, 16]
    slabs = packed.config.packed_layers[f"{layer}feed_forward.output"]["slabs"]
    assert slabs == [3, 4, 4]
    same_answers(packed, zero_blocks(model, masks))


def test_a_layer_that_lost_everything_keeps_its_biases(model):
    masks = prune_blocks(model, BlockShape(columns=4), ratio=1, allow_empty=True)
    packed = pack(model, masks)
    assert packed.config.num_attention_heads == [0] * 4 and packed.config.intermediate_size == [0] * 4
    same_answers(packed, zero_blocks(model, masks))


def test_a_saved_model_is_rebuilt_from_its_config_and_is_as_small_as_it_says(model, tmp_path):
    masks = prune_blocks(model, BlockShape(columns=4), ratio=0.5)
    packed = pack(model, masks)
    packed.save_pretrained(tmp_path)
    again, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again.predict(**BATCH).logits, packed.predict(**BATCH).logits)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("index")} == {torch.int16}
    assert sum(tensor.nbytes for tensor in tensors.values()) == checkpoint_bytes(again.config)
    assert parameter_count(again.config) == count_parameters(again) == count_parameters(packed)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.int16} == {
        name for name in tensors if name.endswith("index")
    }
    assert half.predict(**BATCH).logits.isfinite().all()


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_the_file_of_wide_blocks_keeps_95_percent_of_the_nominal_compression(ratio):
    """10 weights and a 16-bit index take 42 bytes of 40; blocks of 9 columns no longer reach 0.95 of it."""
    wide = convert_from_stock(tiny_bert(hidden_size=90, intermediate_size=180, num_attention_heads=9))
    shares = {}
    for columns in (9, 10):
        masks = prune_blocks(wide, BlockShape(columns=columns, balanced=True), ratio=ratio)
        packed = pack(wide, masks)
        stored = sum(layer.values.nbytes + layer.index.nbytes for _, layer in packed_linears(packed.costeff))
        full = 4 * sum(rows * columns for rows, columns in masks.shapes.values())
        shares[columns] = full / stored / masks.compression
    assert shares[9] < 0.95 <= shares[10]


def test_flops_are_those_of_the_panels(model):
    masks = prune_blocks(model, BlockShape(columns=4), ratio=0.5)
    packed = pack(model, masks)
    hidden = torch.randn(2, 7, 12)
    for layer in range(4):
        block = packed.costeff.layers[layer]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block.feed_forward(hidden)
            projected = block.attention.query_key_value(hidden)[..., : block.attention.output.in_features]
            block.attention.output(projected)
        width = block.attention.num_heads * 4
        assert counter.get_total_flops() == 2 * (layer_flops(packed.config, layer + 1, 7) - 2 * 2 * 7 * 7 * width)
    dense = {name: "dense" for name, _ in packed_linears(packed.costeff)}
    before = layer_flops(packed.config, 1, 7)
    set_layouts(packed, dense)
    assert layer_flops(packed.config, 1, 7) > before


def test_layouts_are_for_packed_layers(model):
    with pytest.raises(ValueError, match=r"layers\.9 is no packed layer\. The model has: none, pack it first"):
        set_layouts(model, {"layers.9": "dense"})


def test_unpacking_gives_the_masked_matrices_back(model):
    masks = prune_blocks(model, BlockShape(columns=4, balanced=True), ratio=0.3)
    full = unpack(pack(model, masks))
    masked = zero_blocks(model, masks)
    assert full.config.packed_layers is None
    assert full.config.to_dict() == {**masked.config.to_dict(), "packed_layers": None}
    for name, tensor in masked.state_dict().items():
        assert torch.equal(full.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in full.parameters())


def test_what_needs_full_matrices_says_so(model):
    packed = pack(model, prune_blocks(model, BlockShape(columns=4), ratio=0.3))
    config = packed.config
    plan = SlenderizationPlan(
        tuple((True,) * n for n in config.num_attention_heads), tuple((True,) * n for n in config.intermediate_size)
    )
    for action in (
        lambda: slenderize(packed, plan),
        lambda: convert_to_stock(packed),
        lambda: compute_importance(packed, [BATCH], lambda model, batch: model(**batch).exit_logits[0].sum()),
        lambda: prune_blocks(packed, BlockShape(columns=4), ratio=0.5),
    ):
        with pytest.raises(ValueError, match=r"this model is packed\. Unpack it first"):
            action()
    torch.testing.assert_close(slenderize(unpack(packed), plan).predict(**BATCH).logits, packed.predict(**BATCH).logits)


def test_a_packed_model_is_truncated_quantized_and_made_ready_for_export(model):
    packed = pack(model, prune_blocks(model, BlockShape(columns=4), ratio=0.3))
    shallow = packed.truncate(2)
    expected = packed(**BATCH).exit_logits[1]
    torch.testing.assert_close(shallow(**BATCH).logits, expected)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(packed), {nn.Linear}, dtype=torch.qint8)
    assert quantized.predict(**BATCH).logits.isfinite().all()
    assert any(isinstance(module, PackedLinear) for module in quantized.modules())
    exported = plain_model(packed.costeff)
    assert not any(isinstance(module, PackedLinear) for module in exported.modules())
    torch.testing.assert_close(exported(**BATCH).exit_logits[-1], packed(**BATCH).logits)


def test_the_fastest_layout_is_chosen_and_kept(model, tmp_path, monkeypatch):
    masks = prune_blocks(model, BlockShape(rows=2, columns=2), ratio=0.5)
    packed = pack(model, masks)
    before = packed.predict(**BATCH)
    order = iter(["panels", "tiles", "dense", "sparse_blocks"] * 99)
    monkeypatch.setattr("hf_costeff.packing.measure_alternating", fake_measurement(order))
    measured = choose_layouts(packed, batch_size=2, seq_length=4, repeats=1)
    chosen = {name: next(iter(times)) for name, times in measured.items()}
    assert set(chosen.values()) == {"panels", "tiles", "dense", "sparse_blocks"}
    assert chosen == {name: value["layout"] for name, value in packed.config.packed_layers.items()}
    assert chosen == {name: layer.packing.layout for name, layer in packed_linears(packed.costeff)}
    packed.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again.predict(**BATCH).logits, before.logits, rtol=1e-5, atol=1e-5)
    assert chosen == {name: layer.packing.layout for name, layer in packed_linears(again.costeff)}
    assert json.loads((tmp_path / "config.json").read_text())["packed_layers"] == again.config.packed_layers


@pytest.mark.parametrize(
    ("panels", "whole", "layout"),
    [(0.90, 0.99, "panels"), (0.96, 0.99, "dense"), (0.90, 1.01, "dense")],
    ids=["faster", "hardly faster", "slower in the whole"],
)
def test_a_model_stays_dense_unless_it_gains(model, monkeypatch, panels, whole, layout):
    def measure(candidates, **settings):
        times = {"panels": panels, "chosen": whole}
        return {name: Latency(times.get(name, 1.0), 2.0, 1) for name in candidates}

    monkeypatch.setattr("hf_costeff.packing.measure_alternating", measure)
    packed = pack(model, prune_blocks(model, BlockShape(columns=4), ratio=0.5))
    measured = choose_layouts(packed, batch_size=2, seq_length=4)
    assert {next(iter(times)) for times in measured.values()} == {layout}
    assert {value["layout"] for value in packed.config.packed_layers.values()} == {layout}
    assert all(set(times) == {"panels", "tiles", "dense"} for times in measured.values())


def fake_measurement(order):
    """A measurement whose fastest candidate is the next of `order`."""

    def measure(candidates, **settings):
        winner = "chosen" if "chosen" in candidates else next(order)
        for run in candidates.values():
            run()
        return {name: Latency(1.0 + (name != winner), 2.0, 1) for name in candidates}

    return measure


def test_a_matrix_that_shrinks_below_its_blocks_is_packed(tmp_path):
    """Neurons die whole, and what is left of their matrices is smaller than a block was."""
    wide = convert_from_stock(tiny_bert(intermediate_size=96))
    for blocks in (BlockShape(rows=1), BlockShape(column_slabs=1), BlockShape(row_slabs=2, columns=1)):
        masks = prune_blocks(wide, blocks, ratio=0.9)
        packed = pack(wide, masks)
        same_answers(packed, zero_blocks(wide, masks))
        packed.save_pretrained(tmp_path)
        same_answers(AutoModelForSequenceClassification.from_pretrained(tmp_path), packed)
    assert max(packed.config.intermediate_size) < 48


@pytest.mark.parametrize("layout", ["panels", "tiles", "sparse_blocks", "dense"])
def test_a_packed_model_learns_after_it_answered_and_answers_by_what_it_learnt(model, layout):
    packed = pack(model, prune_blocks(model, BlockShape(rows=2, columns=2), ratio=0.5))
    set_layouts(packed, {name: layout for name, _ in packed_linears(packed.costeff)})
    packed.eval()
    before = packed.predict(**BATCH, early_exit=False).logits
    packed(**BATCH, labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
    torch.optim.AdamW(packed.parameters(), lr=1e-2, fused=True).step()
    after = packed.predict(**BATCH, early_exit=False).logits
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, unpack(packed).predict(**BATCH, early_exit=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["panels", "tiles", "sparse_blocks", "dense"])
def test_every_layout_answers_in_half_precision_and_under_autocast(model, layout):
    masks = prune_blocks(model, BlockShape(rows=2, columns=2), ratio=0.5)
    packed, masked = pack(model, masks), zero_blocks(model, masks)
    set_layouts(packed, {name: layout for name, _ in packed_linears(packed.costeff)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (each.predict(**BATCH, early_exit=False).logits for each in (packed, masked))
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.02)
    found, expected = (each.bfloat16().predict(**BATCH, early_exit=False).logits for each in (packed, masked))
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("layout", ["panels", "tiles", "sparse_blocks", "dense"])
def test_gradients_pass_through_a_frozen_packed_model(model, layout):
    masks = prune_blocks(model, BlockShape(rows=2, columns=2), ratio=0.5)
    packed, masked = pack(model, masks).eval(), zero_blocks(model, masks).eval()
    set_layouts(packed, {name: layout for name, _ in packed_linears(packed.costeff)})
    found = []
    for each in (packed, masked):
        embeddings = each.requires_grad_(False).get_input_embeddings()
        embeddings.requires_grad_(True)
        each(**BATCH).logits.sum().backward()
        found.append(embeddings.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_not_packed_has_no_layouts_to_choose(model):
    assert choose_layouts(model) == {} and model.config.packed_layers is None


def test_a_packed_model_learns(model):
    packed = pack(model, prune_blocks(model, BlockShape(columns=4), ratio=0.5))
    layer = packed.costeff.layers[1].feed_forward.output
    optimizer = torch.optim.AdamW(packed.parameters(), lr=1e-2)
    labels, losses = torch.tensor([0, 1, 2, 0, 1, 2]), []
    before = layer.values.detach().clone()
    for _ in range(5):
        loss = packed(**BATCH, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(layer.values, before)
