"""Blocks, scores and masks, against plain loops over the matrices."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from helpers import random_batch, tiny_bert, tiny_model
from hf_costeff import convert_from_stock
from hf_costeff.block_pruning import (
    BlockMasks,
    BlockShape,
    block_energies,
    block_matrices,
    compute_block_importance,
    prune_blocks,
    zero_blocks,
)

SHAPES = {
    "rows of column slabs": BlockShape(columns=4),
    "by count": BlockShape(column_slabs=3),
    "columns of row slabs": BlockShape(rows=5, columns=1),
    "rectangles": BlockShape(rows=4, columns=5),
    "balanced rectangles": BlockShape(rows=2, columns=4, balanced=True),
}


def rectangles(blocks, rows, columns):
    """(band, slab, row range, column range) of every block, by counting."""
    height, width = blocks.size_in(rows, columns)
    for band, top in enumerate(range(0, rows, height)):
        for slab, left in enumerate(range(0, columns, width)):
            yield band, slab, slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def owner(name, row, rows):
    """Which of the matrices that one holds a row is in: queries, keys and values lie one below the other."""
    return row * 3 // rows if name.endswith("query_key_value") else 0


@pytest.fixture
def model():
    """Twelve hidden units, three heads of 4 and 16 neurons in each of four layers."""
    return convert_from_stock(tiny_bert())


@pytest.mark.parametrize("blocks", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [(12, 12), (13, 7), (5, 29)], ids=str)
def test_norms_are_those_of_each_rectangle_and_spread_puts_them_back(blocks, size):
    matrix = torch.randn(*size, generator=torch.Generator().manual_seed(0))
    norms = blocks.norms(matrix)
    spread = blocks.spread(norms, *size)
    seen = 0
    for band, slab, rows, columns in rectangles(blocks, *size):
        assert norms[band, slab].item() == pytest.approx(math.sqrt(float((matrix[rows, columns] ** 2).sum())), rel=1e-6)
        assert (spread[rows, columns] == norms[band, slab]).all()
        seen += 1
    assert seen == norms.numel() and spread.shape == matrix.shape


@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        ({"columns": 0}, "`columns` is 0"),
        ({"rows": True}, "`rows` is True"),
        ({"rows": 2.0}, "`rows` is 2.0"),
        ({"columns": 4, "column_slabs": 2}, "not by both"),
    ],
)
def test_a_block_shape_that_makes_no_sense_is_refused(blocks, error):
    with pytest.raises(ValueError, match=error):
        BlockShape(**blocks)


@pytest.mark.parametrize("blocks", [{"columns": 13}, {"rows": 50}, {"column_slabs": 13}, {"row_slabs": 37}], ids=str)
def test_a_block_larger_than_a_matrix_is_refused_by_its_name(model, blocks):
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.\w+ ?(has|, which has) \d+ (rows|columns).*at most"):
        prune_blocks(model, BlockShape(**blocks), ratio=0.5)


@pytest.mark.parametrize("blocks", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ratio", [0, 0.3, 0.8])
def test_a_ratio_prunes_the_weakest_blocks_of_every_matrix(model, blocks, ratio):
    masks = prune_blocks(model, blocks, ratio=ratio)
    for name, weight in block_matrices(model).items():
        competing = {}
        for band, slab, rows, columns in rectangles(blocks, *weight.shape):
            among = (owner(name, rows.start, len(weight)), band if blocks.balanced else None)
            kept = bool(masks.masks[name][band, slab])
            competing.setdefault(among, []).append((weight[rows, columns].norm().item(), kept))
        assert len(competing) > 1 or "query_key_value" not in name
        for found in competing.values():
            weak, strong = [norm for norm, kept in found if not kept], [norm for norm, kept in found if kept]
            assert len(weak) == min(round(ratio * len(found)), len(found) - 1)
            assert max(weak, default=0) <= min(strong)


def test_values_are_pruned_among_themselves_however_small_they_are(model):
    fused = "layers.0.attention.query_key_value"
    with torch.no_grad():
        model.costeff.layers[0].attention.query_key_value.weight[24:].mul_(0.01)
    for settings in ({"ratio": 0.5}, {"ratio": 0.5, "scores": block_energies(model, BlockShape(columns=4))}):
        kept = prune_blocks(model, BlockShape(columns=4), **settings).masks[fused]
        assert [int(third.sum()) for third in kept.split(12)] == [18, 18, 18]
    for settings in ({"threshold": 0.4}, {"ratio": 0.5, "across_matrices": True}):
        kept = prune_blocks(model, BlockShape(columns=4), **settings).masks[fused]
        assert int(kept[24:].sum()) == 1 and kept[:24].sum() > 1, "the best block of the values stays"


def test_a_threshold_prunes_blocks_whose_norm_is_below_it(model):
    blocks = BlockShape(columns=4)
    masks = prune_blocks(model, blocks, threshold=0.6)
    for name, weight in block_matrices(model).items():
        assert torch.equal(masks.masks[name], blocks.norms(weight) >= 0.6)
    assert 1 < masks.compression < 10


def test_one_budget_across_matrices_keeps_the_densest_blocks_of_the_model(model):
    with torch.no_grad():
        model.costeff.layers[0].feed_forward.output.weight.mul_(0.01)
    blocks = BlockShape(rows=2, columns=5)
    masks = prune_blocks(model, blocks, ratio=0.5, across_matrices=True)
    densities = {True: [], False: []}
    for name, weight in block_matrices(model).items():
        for band, slab, rows, columns in rectangles(blocks, *weight.shape):
            part = weight.detach()[rows, columns]
            densities[bool(masks.masks[name][band, slab])].append(float(part.square().sum() / part.numel()))
    shunned = masks.masks["layers.0.feed_forward.output"]
    assert int(shunned.sum()) == 1, "the best block of a weak matrix stays"
    assert sorted(densities[True])[1] >= max(densities[False])  # all but that one
    assert masks.compression == pytest.approx(2, rel=0.03)


def test_a_matrix_is_emptied_only_if_that_is_asked_for(model):
    blocks = BlockShape(columns=4)
    tight = prune_blocks(model, blocks, ratio=0.9999)
    counts = {name: int(mask.sum()) for name, mask in tight.masks.items()}
    assert counts == {name: 3 if name.endswith("query_key_value") else 1 for name in counts}
    huge = prune_blocks(model, blocks, threshold=1e9)
    energies = block_energies(model, blocks)
    assert all(mask.view(-1)[energies[name].argmax()] for name, mask in huge.masks.items())
    assert {name: int(mask.sum()) for name, mask in huge.masks.items()} == counts
    for settings in ({"ratio": 1}, {"threshold": 1e9}, {"ratio": 1, "across_matrices": True}):
        emptied = prune_blocks(model, blocks, **settings, allow_empty=True)
        assert not any(mask.any() for mask in emptied.masks.values()) and emptied.compression == float("inf")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "Give either"),
        ({"ratio": 0.5, "threshold": 1.0}, "Give either"),
        ({"ratio": 1}, "`ratio` is 1.*allow_empty"),
        ({"ratio": -0.1}, "`ratio` is -0.1"),
        ({"ratio": 1.5, "allow_empty": True}, "`ratio` is 1.5"),
        ({"ratio": float("nan")}, "`ratio` is nan"),
        ({"threshold": -1.0}, "`threshold` is -1.0"),
        ({"threshold": 1.0, "across_matrices": True}, "`across_matrices` and `scores`"),
        ({"threshold": 1.0, "scores": {}}, "`across_matrices` and `scores`"),
        ({"ratio": 0.5, "scores": {}}, "on one side only"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(model, settings, error):
    with pytest.raises(ValueError, match=error):
        prune_blocks(model, BlockShape(columns=4), **settings)


def test_scores_of_other_blocks_or_without_a_number_are_refused(model):
    scores = block_energies(model, BlockShape(columns=6))
    with pytest.raises(ValueError, match="the same `blocks`"):
        prune_blocks(model, BlockShape(columns=4), ratio=0.5, scores=scores)
    next(iter(scores.values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not all finite"):
        prune_blocks(model, BlockShape(columns=6), ratio=0.5, scores=scores)


def test_balanced_bands_refuse_limits_that_unbalance_them(model):
    for settings in ({"threshold": 1.0}, {"ratio": 0.5, "across_matrices": True}):
        with pytest.raises(ValueError, match="Balanced"):
            prune_blocks(model, BlockShape(columns=4, balanced=True), **settings)


def test_embeddings_are_pruned_only_if_that_is_asked_for():
    factorised = tiny_model(embedding_rank=6)
    names = {"embeddings.word_embeddings", "embeddings.projection"}
    assert not names & block_matrices(factorised).keys()
    masks = prune_blocks(factorised, BlockShape(column_slabs=2), ratio=0.5, embeddings=True)
    assert names <= masks.masks.keys()
    assert zero_blocks(factorised, masks).costeff.embeddings.word_embeddings.weight.eq(0).float().mean() >= 0.49


def test_a_stock_model_is_refused():
    with pytest.raises(ValueError, match="this is a BertForSequenceClassification"):
        prune_blocks(tiny_bert(), BlockShape(columns=4), ratio=0.5)


def test_layers_without_heads_or_neurons_have_no_matrices():
    found = block_matrices(tiny_model())
    assert "layers.1.feed_forward.output" in found and "layers.0.attention.query_key_value" in found
    assert not any(name.startswith(("layers.1.attention", "layers.2.feed_forward")) for name in found)


def test_taylor_scores_are_weight_times_summed_gradients(model):
    batches = [random_batch([7, 3], seed=seed) | {"labels": torch.tensor([0, 2])} for seed in range(2)]
    blocks = BlockShape(rows=3, columns=4)

    def loss(model, batch):
        return model(**batch).loss

    scores = compute_block_importance(model, blocks, batches, loss)
    name = "layers.2.feed_forward.intermediate"
    weight = model.costeff.layers[2].feed_forward.intermediate.weight
    expected = sum(torch.autograd.grad(loss(model.eval(), batch), weight)[0].abs() for batch in batches) * weight.abs()
    for band, slab, rows, columns in rectangles(blocks, *weight.shape):
        assert scores[name][band, slab].item() == pytest.approx(float(expected.detach()[rows, columns].sum()), rel=1e-4)
    ranked = prune_blocks(model, blocks, ratio=0.5, scores=scores).masks[name]
    assert scores[name][ranked].min() >= scores[name][~ranked].max()


def test_zeroed_blocks_are_zero_and_everything_else_is_as_it_was(model):
    model.config.exit_config = {"threshold": 0.5}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = prune_blocks(model, BlockShape(columns=4), ratio=0.5)
    pruned = zero_blocks(model, masks)
    assert pruned.config.exit_config is None and model.config.exit_config is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        matrix = name.removeprefix("costeff.").removesuffix(".weight")
        expected = tensor * masks.weight_mask(matrix) if matrix in masks.masks else tensor
        assert torch.equal(pruned.state_dict()[name], expected)


def test_masks_fit_the_model_they_were_made_for_and_those_trained_under_them(model):
    masks = prune_blocks(model, BlockShape(columns=4), ratio=0.5)
    trained = zero_blocks(model, masks)
    with torch.no_grad():
        for name, weight in block_matrices(trained).items():
            weight.add_(0.1 * torch.randn_like(weight)).mul_(masks.weight_mask(name))
    masks.check(trained)


def test_masks_of_another_model_are_refused(model):
    masks = prune_blocks(model, BlockShape(columns=4), ratio=0.5)
    other = convert_from_stock(tiny_bert(seed=1))
    with pytest.raises(ValueError, match=f"another model: they were made for the weights {masks.fingerprint}"):
        zero_blocks(other, masks)
    narrow = convert_from_stock(tiny_bert(intermediate_size=8))
    with pytest.raises(ValueError, match=r"another model: layers\.0\.feed_forward\.intermediate is \(8, 12\) here"):
        zero_blocks(narrow, masks)
    missing = dataclasses.replace(
        masks,
        masks={**masks.masks, "layers.9.attention.output": torch.ones(1, 1, dtype=torch.bool)},
        shapes={**masks.shapes, "layers.9.attention.output": (12, 12)},
    )
    with pytest.raises(ValueError, match=r"layers\.9\.attention\.output is missing"):
        missing.check(model)
    assert isinstance(missing, BlockMasks)
