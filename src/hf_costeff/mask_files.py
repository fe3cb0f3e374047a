"""Masks on disk: one safetensors file that says which model it belongs to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .block_pruning import BlockMasks, BlockShape


def save_masks(masks: BlockMasks, file: str | Path) -> None:
    """Write masks in one step; they take one byte per block.

    Args:
        masks: What stays.
        file: To write; its folder must be there.
    """
    described = {
        "blocks": dataclasses.asdict(masks.blocks),
        "shapes": {name: list(shape) for name, shape in masks.shapes.items()},
        "fingerprint": masks.fingerprint,
    }
    draft = Path(file).with_suffix(".draft")
    tensors = {name: mask.to(torch.uint8).contiguous() for name, mask in masks.masks.items()}
    save_file(tensors, draft, {"block_masks": json.dumps(described)})
    draft.rename(file)


def load_masks(file: str | Path) -> BlockMasks:
    """Read masks; whether they fit a model, [`BlockMasks.check`] says.

    Args:
        file: From [`save_masks`].

    Raises:
        ValueError: If the file is not there, damaged, or no mask file.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            described = json.loads((opened.metadata() or {})["block_masks"])
            masks = {name: opened.get_tensor(name).bool() for name in opened.keys()}  # noqa: SIM118
        blocks = BlockShape(**described["blocks"])
        shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in described["shapes"].items()}
        loaded = BlockMasks(blocks, {name: masks[name] for name in shapes}, shapes, str(described["fingerprint"]))
        for name, mask in loaded.masks.items():
            height, width = blocks.size_in(*shapes[name], name)
            if tuple(mask.shape) != (-(-shapes[name][0] // height), -(-shapes[name][1] // width)):
                raise ValueError(f"{name} has masks of shape {tuple(mask.shape)} for a matrix of {shapes[name]}")
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is no mask file that can be read ({error}). Prune again to make one.") from error
    return loaded
