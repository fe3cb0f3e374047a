"""Masks survive a file, and a file that holds none is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import tiny_bert
from hf_costeff import convert_from_stock
from hf_costeff.block_pruning import BlockShape, prune_blocks
from hf_costeff.mask_files import load_masks, save_masks


@pytest.fixture
def masks():
    return prune_blocks(convert_from_stock(tiny_bert()), BlockShape(rows=2, column_slabs=3), ratio=0.4)


def test_masks_are_the_same_after_a_file(masks, tmp_path):
    save_masks(masks, tmp_path / "masks.safetensors")
    again = load_masks(tmp_path / "masks.safetensors")
    assert (again.blocks, again.shapes, again.fingerprint) == (masks.blocks, masks.shapes, masks.fingerprint)
    assert list(again.masks) == list(masks.masks)
    assert all(again.masks[name].dtype == torch.bool for name in masks.masks)
    assert all(torch.equal(again.masks[name], mask) for name, mask in masks.masks.items())
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]


def test_a_file_without_masks_is_refused(masks, tmp_path):
    file = tmp_path / "masks.safetensors"
    with pytest.raises(ValueError, match="no mask file"):
        load_masks(file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="no mask file"):
        load_masks(file)
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="no mask file"):
        load_masks(file)


def test_masks_whose_shapes_contradict_their_matrices_are_refused(masks, tmp_path):
    file = tmp_path / "masks.safetensors"
    save_masks(masks, file)
    with safe_open(str(file), "pt") as opened:
        described = opened.metadata()
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1]}, file, described)
    with pytest.raises(ValueError, match=f"{name} has masks of shape"):
        load_masks(file)
    del tensors[name]
    save_file(tensors, file, described)
    with pytest.raises(ValueError, match="no mask file"):
        load_masks(file)
