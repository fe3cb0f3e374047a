"""Who is still in the batch: lengths, survivors and the order of the answers."""

import pytest
import torch

from hf_costeff.exit_criteria import ExitConfig
from hf_costeff.exiting_rows import ExitingRows

SURE, UNSURE = [9.0, 0.0], [0.1, 0.0]


def rows_of(mask, threshold=0.5, checked=(1, 2)):
    criterion = ExitConfig(threshold=threshold).build_criterion(3, "single_label_classification")
    return ExitingRows(criterion, list(checked), [1, 2, 3], torch.zeros_like(mask), mask)


def test_the_batch_is_as_long_as_its_longest_row():
    rows = rows_of(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    assert (rows.longest, rows.padded) == (3, True)


def test_when_the_long_row_leaves_the_rest_is_shorter_and_unpadded():
    rows = rows_of(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    survivors = rows.leave(1, torch.tensor([SURE, UNSURE]))
    assert survivors.tolist() == [1]
    assert (rows.longest, rows.padded) == (1, False)


def test_padding_on_the_left_counts_as_padding():
    rows = rows_of(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert (rows.longest, rows.padded) == (3, True)


def test_without_a_mask_nothing_is_padded():
    rows = ExitingRows(None, [], [1, 2, 3], torch.zeros(2, 5, dtype=torch.long), None)
    assert (rows.longest, rows.padded) == (5, False)


def test_nobody_leaving_is_told_apart_from_everybody_leaving():
    rows = rows_of(torch.ones(2, 2, dtype=torch.long))
    assert rows.leave(1, torch.tensor([UNSURE, UNSURE])) is None
    assert rows.leave(2, torch.tensor([SURE, SURE])).tolist() == []


def test_answers_come_back_in_the_order_of_the_rows():
    rows = rows_of(torch.ones(3, 2, dtype=torch.long))
    rows.leave(1, torch.tensor([UNSURE, SURE, UNSURE]))
    rows.leave(2, torch.tensor([UNSURE, [0.0, 8.0]]))
    rows.leave(3, torch.tensor([[0.0, 7.0]]))
    logits, layers = rows.answers()
    assert logits.tolist() == [[0.0, 7.0], SURE, [0.0, 8.0]]
    assert layers.tolist() == [3, 1, 2]


def test_only_the_last_exit_is_evaluated_at_full_depth():
    assert ExitingRows(None, [], [1, 2, 3], torch.zeros(1, 2, dtype=torch.long), None).evaluated == {3}


def test_a_row_of_padding_is_refused_by_its_number():
    with pytest.raises(ValueError, match=r"Row 1 .* all padding"):
        rows_of(torch.tensor([[1, 1], [0, 0]]))
