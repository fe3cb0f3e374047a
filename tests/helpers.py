"""Tiny models and batches that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_costeff import CostEffConfig, CostEffForSequenceClassification

TINY: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": [2, 0, 1, 3],
    "attention_head_size": 4,
    "intermediate_size": [10, 7, 0, 16],
    "max_position_embeddings": 24,
    "num_labels": 3,
}


def tiny_config(**changes: Any) -> CostEffConfig:
    """A four-layer model with uneven widths, one layer without heads and one without neurons; `changes` win."""
    return CostEffConfig(**{**TINY, **changes})


def tiny_model(seed: int = 0, model_class: type = CostEffForSequenceClassification, **changes: Any) -> Any:
    """A tiny model in eval mode, every weight random: rows differ, and its exits agree often but not always."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = name.endswith("norm.weight")
            is_small = is_norm_weight or name.endswith("bias")
            spread = 0.2 if is_small else 0.25 if "layers." in name else 1.0
            parameter.copy_(is_norm_weight + spread * torch.randn_like(parameter))
        first, *others = getattr(model, "costeff", model).exits.values()
        for head in others:
            head.classifier.weight.mul_(0.4).add_(first.classifier.weight)
    return model.eval()


def random_batch(
    lengths: list[int], seed: int = 0, pad_token_id: int = 0, width: int | None = None
) -> dict[str, Tensor]:
    """Right-padded rows of the given lengths; real tokens are never the padding token."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    shape = (len(lengths), width)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, TINY["vocab_size"], shape, generator=generator)
    types = torch.randint(0, 2, shape, generator=generator)
    return {
        "input_ids": torch.where(mask, tokens, pad_token_id),
        "attention_mask": mask.long(),
        "token_type_ids": types * mask,
    }


def select_rows(batch: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    """The same rows of every tensor."""
    return {name: tensor[rows] for name, tensor in batch.items()}
