"""Rows on their way: who leaves, who goes on, lengths, and merging rows of several batches."""

import pytest
import torch

from hf_costeff.exit_criteria import ExitConfig
from hf_costeff.exiting_rows import ExitPlan, RunningRows, ends_and_counts

SURE, UNSURE = [9.0, 0.0], [0.1, 0.0]


def plan_of(**settings) -> ExitPlan:
    return ExitPlan.make(ExitConfig(**{"threshold": 0.5, **settings}), [1, 2, 3], "single_label_classification")


def rows_of(mask, depth=1, first_number=0, seen=None) -> RunningRows:
    """Rows whose hidden states say the row's number and the column: (rows, seq, 2)."""
    mask = torch.tensor(mask)
    ends, counts = ends_and_counts(mask, *mask.shape)
    numbers = list(range(first_number, first_number + len(mask)))
    places = torch.tensor([[[number, column] for column in range(mask.shape[1])] for number in numbers])
    return RunningRows(numbers, ends, counts, places.float(), mask, [()] * len(numbers), depth, seen)


def test_the_batch_is_as_long_as_its_longest_row():
    rows = rows_of([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert rows.longest == 3


def test_when_the_long_row_leaves_the_rest_is_shorter_and_unpadded():
    left, rest = rows_of([[1, 1, 1], [1, 0, 0]]).leave(plan_of(), torch.tensor([SURE, UNSURE]))
    assert (left.numbers, left.exit_layer, left.logits.tolist()) == ([0], 1, [SURE])
    assert (rest.numbers, rest.longest, rest.padding_mask) == ([1], 1, None)
    assert rest.hidden_states.tolist() == [[[1.0, 0.0]]]


def test_padding_on_the_left_counts_as_padding():
    rows = rows_of([[0, 1, 1], [1, 1, 1], [1, 1, 0]])
    assert rows.longest == 3
    assert rows.select([0, 1]).padding_mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_without_a_mask_nothing_is_padded():
    assert ends_and_counts(None, 2, 5) == ([5, 5], [5, 5])


def test_nobody_leaving_moves_no_row():
    rows = rows_of([[1, 1], [1, 1]])
    before = rows.hidden_states
    left, rest = rows.leave(plan_of(), torch.tensor([UNSURE, UNSURE]))
    assert left is None and rest is rows and rest.hidden_states is before


def test_everybody_leaving_leaves_nobody_behind():
    logits = torch.tensor([SURE, SURE])
    left, rest = rows_of([[1, 1], [1, 1]]).leave(plan_of(), logits)
    assert rest is None and left.numbers == [0, 1] and left.logits is logits


def test_after_the_last_layer_everybody_leaves_however_unsure():
    left, rest = rows_of([[1]], depth=3).leave(plan_of(), torch.tensor([UNSURE]))
    assert rest is None and left.exit_layer == 3


def test_a_criterion_sees_all_stops_so_far_of_each_row():
    """With patience 1 a row leaves when its answer repeats the one before."""
    plan = plan_of(criterion="patience", patience=1)
    rows = rows_of([[1], [1], [1]])
    left, rows = rows.leave(plan, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    assert left is None
    rows.depth = 2
    left, rows = rows.leave(plan, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert left.numbers == [0] and rows.numbers == [1, 2]
    assert rows.seen.argmax(-1).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_logit_that_is_not_finite_is_an_error_that_names_row_and_layer(broken, depth):
    rows = rows_of([[1], [1]], depth=depth, first_number=40)
    with pytest.raises(ValueError, match=rf"row 41 after layer {depth} are .*checkpoint is broken"):
        rows.leave(plan_of(), torch.tensor([SURE, [broken, 0.0]]))


def test_large_finite_logits_are_no_error():
    left, rest = rows_of([[1]]).leave(plan_of(), torch.tensor([[3e38, 3e38]]))
    assert (left, rest.numbers) == (None, [0])


def test_selected_rows_keep_their_states_history_and_numbers():
    rows = rows_of([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], first_number=5, seen=torch.arange(3.0).view(3, 1, 1))
    rows.attention_mask = "of three rows"
    part = rows.select([2, 1])
    assert (part.numbers, part.ends, part.counts, part.depth) == ([7, 6], [3, 2], [3, 2], 1)
    assert part.hidden_states.tolist() == rows.hidden_states[[2, 1], :3].tolist()
    assert part.padding_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert part.seen.flatten().tolist() == [2.0, 1.0]
    assert part.attention_mask is None


def test_merged_rows_are_those_of_the_groups_padded_on_the_right():
    groups = [rows_of([[1, 1], [1, 0]]), rows_of([[0, 1, 1]], first_number=7), rows_of([[1]], first_number=9)]
    groups[2].padding_mask = None
    merged = RunningRows.merge(groups)
    assert (merged.numbers, merged.ends, merged.counts) == ([0, 1, 7, 9], [2, 1, 3, 1], [2, 1, 2, 1])
    assert merged.padding_mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]]
    assert (merged.hidden_states[2] == groups[1].hidden_states[0]).all()
    assert (merged.hidden_states[1, :2] == groups[0].hidden_states[1]).all()
    assert (merged.hidden_states[0, 2] == 0).all() and (merged.hidden_states[3, 1:] == 0).all()
    assert merged.depth == 1 and merged.seen is None
    assert RunningRows.merge([groups[2], groups[2]]).padding_mask is None


def test_a_range_of_neighbours_is_a_view_of_the_same_rows():
    rows = rows_of([[1, 1, 1], [1, 1, 0], [1, 0, 0]], first_number=3, seen=torch.arange(3.0).view(3, 1, 1))
    part = rows.select(range(1, 3))
    assert (part.numbers, part.ends, part.seen.flatten().tolist()) == ([4, 5], [2, 1], [1.0, 2.0])
    assert part.hidden_states.data_ptr() == rows.hidden_states[1:].data_ptr()
    assert torch.equal(part.hidden_states, rows.hidden_states[1:, :2])


def test_merging_what_was_selected_gives_the_rows_back():
    rows = rows_of([[1, 1, 1], [1, 1, 0], [1, 1, 1]], depth=2, seen=torch.rand(3, 2, 2))
    again = RunningRows.merge([rows.select([0]), rows.select([1]), rows.select([2])])
    assert (again.numbers, again.ends, again.counts, again.depth) == (rows.numbers, rows.ends, rows.counts, 2)
    assert torch.equal(again.padding_mask, rows.padding_mask.bool()) and torch.equal(again.seen, rows.seen)
    assert torch.equal(again.hidden_states[rows.padding_mask == 1], rows.hidden_states[rows.padding_mask == 1])


def test_a_single_group_is_not_copied():
    rows = rows_of([[1, 1]])
    assert RunningRows.merge([rows]) is rows


def test_at_full_depth_only_the_last_exit_is_a_stop():
    plan = ExitPlan.make(None, [1, 2, 3], "single_label_classification")
    assert (plan.stops, plan.next_stop(0)) == ([3], 3)


def test_stops_are_the_checked_exits_and_the_last():
    plan = plan_of(checked_exits=[2])
    assert (plan.stops, plan.next_stop(0), plan.next_stop(2)) == ([2, 3], 2, 3)


@pytest.mark.parametrize(
    ("criterion", "threshold"),
    [("entropy", [0.0, 0.5, 0.0]), ("confidence", [1.0, 0.5, 1.0]), ("margin", [1.0, 0.5, 1.0])],
)
def test_an_exit_whose_threshold_lets_nobody_leave_is_no_stop(criterion, threshold):
    settings = ExitConfig(criterion=criterion, threshold=threshold)
    assert ExitPlan.make(settings, [1, 2, 3], "single_label_classification").stops == [2, 3]


def test_patience_stops_where_nobody_can_leave_yet_because_later_exits_look_back():
    settings = ExitConfig(criterion="patience", patience=2)
    assert ExitPlan.make(settings, [1, 2, 3, 4], "single_label_classification").stops == [1, 2, 3, 4]
    assert ExitPlan.make(settings, [1, 2, 3], "single_label_classification").stops == [3]  # two exits are too few


def test_a_tolerance_of_nothing_is_never_kept_so_that_no_exit_is_asked():
    for tolerance, stops in ((0.0, [3]), (1e-9, [1, 2, 3])):
        settings = ExitConfig(criterion="patience", patience=1, tolerance=tolerance)
        assert ExitPlan.make(settings, [1, 2, 3], "regression").stops == stops


def test_a_checked_exit_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"\[4\]. Exits: \[1, 2, 3\]"):
        plan_of(checked_exits=[2, 4])


def test_thresholds_and_temperatures_are_those_of_the_exit_at_the_layer():
    settings = ExitConfig(threshold=[1.0, 0.0], temperatures=[4.0, 2.0])
    plan = ExitPlan.make(settings, [2, 6], "single_label_classification")
    assert plan.passes(plan.evidence(torch.tensor([[UNSURE]]), 2).tolist(), 2) == [True]
    assert plan.scaled(torch.tensor([[8.0, 4.0]]), 6).tolist() == [[4.0, 2.0]]


def test_a_row_of_padding_is_refused_by_its_number():
    with pytest.raises(ValueError, match=r"Row 1 .* all padding"):
        rows_of([[1, 1], [0, 0]])
