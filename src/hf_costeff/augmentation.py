"""Changed inputs for distillation: a teacher can label any text, so a student need not see the same ones again."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def replace_tokens(input_ids: Tensor, special_ids: Collection[int], rate: float) -> Tensor:
    """A batch in which a share of the ordinary tokens is replaced by ordinary tokens of the same batch.

    New tokens are drawn with replacement from all ordinary tokens of the batch, so they follow the data's own
    frequencies. Unlike the n-gram replacement of Tang et al. 2019 ("Distilling Task-Specific Knowledge from BERT"),
    single tokens are replaced, and anew in every step.

    Args:
        input_ids: Tokens, shape (batch, seq).
        special_ids: Tokens that stay and are never drawn: [CLS], [SEP], padding and the like.
        rate: Probability that an ordinary token is replaced, in 0..1.

    Returns:
        Tokens, shape (batch, seq).

    Example: one ordinary token can only be replaced by itself.

        >>> replace_tokens(torch.tensor([[101, 7, 102, 0]]), special_ids=[0, 101, 102], rate=1.0)
        tensor([[101,   7, 102,   0]])
    """
    special = torch.tensor(sorted(special_ids), dtype=input_ids.dtype, device=input_ids.device)
    ordinary = ~torch.isin(input_ids, special)
    replaced = ordinary & (torch.rand(input_ids.shape, device=input_ids.device) < rate)
    if not replaced.any():
        return input_ids
    pool = input_ids[ordinary]
    changed = input_ids.clone()
    changed[replaced] = pool[torch.randint(len(pool), (int(replaced.sum()),), device=pool.device)]
    return changed
