"""Replaced tokens: which stay, where new ones come from, how many there are."""

from __future__ import annotations

import torch

from hf_costeff.augmentation import replace_tokens

SPECIAL = (0, 1, 2)


def batch(rows: int = 64, seq: int = 50) -> torch.Tensor:
    """Rows of ordinary tokens 3..9 between token 1 and token 2, the second half of each padded with 0."""
    ids = torch.randint(3, 10, (rows, seq), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, seq // 2] = 1, 2
    ids[:, seq // 2 + 1 :] = 0
    return ids


def test_special_tokens_stay_where_they_are_and_never_come_anew():
    before = batch()
    after = replace_tokens(before, SPECIAL, rate=1.0)
    special = before < 3
    assert torch.equal(after[special], before[special])
    assert (after[~special] >= 3).all()


def test_new_tokens_follow_the_frequencies_of_the_batch():
    before = torch.tensor([[1] + [5] * 30 + [7] * 10 + [2]]).repeat(200, 1)
    after = replace_tokens(before, SPECIAL, rate=1.0)
    ordinary = after[:, 1:-1]
    assert set(ordinary.unique().tolist()) == {5, 7}
    assert abs((ordinary == 5).float().mean().item() - 0.75) < 0.02


def test_the_rate_is_the_share_of_ordinary_tokens_drawn_anew():
    before = torch.arange(3, 1003).repeat(20, 1)  # a drawn token is almost surely another one
    share = (replace_tokens(before, SPECIAL, rate=0.3) != before).float().mean().item()
    assert abs(share - 0.3) < 0.02


def test_the_batch_given_is_not_changed_and_rate_0_or_only_special_tokens_change_nothing():
    before = batch()
    copy = before.clone()
    replace_tokens(before, SPECIAL, rate=0.5)
    assert torch.equal(before, copy)
    assert torch.equal(replace_tokens(before, SPECIAL, rate=0.0), copy)
    only_special = torch.tensor([[1, 2, 0, 0]])
    assert torch.equal(replace_tokens(only_special, SPECIAL, rate=1.0), only_special)
