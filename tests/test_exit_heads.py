"""Exit heads and poolings against plain sums."""

import pytest
import torch

from helpers import tiny_config, tiny_model
from hf_costeff import CostEffForSequenceClassification
from hf_costeff.exit_heads import LinearExitHead, pool_first, pool_mean


def hidden_and_mask():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    return torch.randn(3, 4, 5), mask


def test_the_first_token_is_pooled_whatever_the_mask_says():
    hidden, mask = hidden_and_mask()
    assert torch.equal(pool_first(hidden, mask), hidden[:, 0])


def test_the_mean_is_over_the_real_tokens_of_each_row():
    hidden, mask = hidden_and_mask()
    by_hand = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0), hidden[2, 0]])
    torch.testing.assert_close(pool_mean(hidden, mask), by_hand)


def test_without_a_mask_the_mean_is_over_all_tokens():
    hidden, _ = hidden_and_mask()
    torch.testing.assert_close(pool_mean(hidden, None), hidden.sum(1) / 4)


def test_the_head_is_a_linear_map_of_the_tanh_of_the_pooled_state():
    hidden, mask = hidden_and_mask()
    head = LinearExitHead(5, 2, dropout=0.5, pool=pool_mean).eval()
    by_hand = torch.tanh(pool_mean(hidden, mask)) @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(hidden, mask), by_hand)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_change_an_exit(pooling):
    torch.manual_seed(1)
    model = CostEffForSequenceClassification(tiny_config(exit_pooling=pooling)).eval()
    ids = torch.randint(1, model.config.vocab_size, (2, 6))
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    mask = (torch.arange(11) < 6).long().expand(2, -1)
    for exit_, with_padding in zip(model(ids).exit_logits, model(padded, mask).exit_logits, strict=True):
        torch.testing.assert_close(exit_, with_padding, atol=1e-5, rtol=0)


def test_mean_pooled_rows_leave_the_same_in_any_batch():
    model = tiny_model(exit_pooling="mean")
    lengths = torch.randint(2, 12, (10,))
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(1, model.config.vocab_size, (10, 12)) * mask
    together = model.predict(ids, mask, early_exit=0.5)
    assert len(set(together.exit_layer.tolist())) > 1
    for row, length in enumerate(lengths.tolist()):
        alone = model.predict(ids[row : row + 1, :length], early_exit=0.5)
        assert alone.exit_layer.item() == together.exit_layer[row].item()
        torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=0)
