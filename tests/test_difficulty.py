"""Hard rows: told by models that were not trained on them, kept, and gone on with after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from helpers import tiny_bert, token_rows, word_tokenizer
from hf_costeff.data import make_collator
from hf_costeff.difficulty import HARD, Difficulty, check_hard_rows, difficulty_labels, mark_hard_rows

COLLATOR = make_collator(word_tokenizer())
ROWS = token_rows(30, longest=6)


def key(row) -> tuple:
    return tuple(row["input_ids"])


class Trainer:
    """Stands in for training: notes the rows, and gives a model by seed and number of the call."""

    def __init__(self, fails_at: int | None = None):
        self.calls: list[tuple[set, int]] = []
        self.models: list = []
        self.fails_at = fails_at

    def __call__(self, rows, seed, folder):
        if len(self.calls) + 1 == self.fails_at:
            raise KeyboardInterrupt
        assert folder.is_dir()
        self.calls.append(({key(row) for row in rows}, seed))
        self.models.append(tiny_bert(seed=100 * seed + len(rows), num_hidden_layers=1))
        return self.models[-1]


def label(folder, train, rows=ROWS, **settings):
    return difficulty_labels(
        rows, COLLATOR, train, folder, **{"folds": 3, "seeds": (0, 1), "show_progress": False, **settings}
    )


def test_every_row_is_judged_once_per_seed_by_a_model_that_was_not_trained_on_it(tmp_path):
    train = Trainer()
    found = label(tmp_path, train)
    assert found.right.shape == (30, 2) and [seed for _, seed in train.calls] == [0, 0, 0, 1, 1, 1]
    for seed in (0, 1):
        calls = [(seen, model) for (seen, s), model in zip(train.calls, train.models, strict=True) if s == seed]
        for number, row in enumerate(ROWS):
            [judge] = [model for seen, model in calls if key(row) not in seen]
            with torch.no_grad():
                answer = int(judge(torch.tensor([row["input_ids"]])).logits.argmax())
            assert found.right[number, seed] == (answer == row["labels"])
    folds = [[seen for seen, s in train.calls if s == seed] for seed in (0, 1)]
    assert folds[0] != folds[1]  # each seed cuts other folds


def test_rows_of_equal_tokens_are_held_out_together_and_classes_are_spread(tmp_path):
    doubled = Dataset.from_list([*ROWS, *ROWS])
    train = Trainer()
    label(tmp_path, train, rows=doubled, seeds=(0,))
    everything = {key(row) for row in ROWS}
    assert sum(len(everything - seen) for seen, _ in train.calls) == len(everything)
    labels = {key(row): row["labels"] for row in ROWS}
    for seen, _ in train.calls:
        held = [labels[one] for one in everything - seen]
        share = np.bincount(held, minlength=3) / len(held)
        assert np.abs(share - np.bincount(ROWS["labels"], minlength=3) / 30).max() < 0.15


def test_an_interrupted_run_goes_on_and_comes_to_the_same(tmp_path):
    whole = label(tmp_path / "whole", Trainer())
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path / "cut", Trainer(fails_at=4))
    rest = Trainer()
    again = label(tmp_path / "cut", rest)
    assert len(rest.calls) == 3 and np.array_equal(again.right, whole.right)
    finished = Trainer(fails_at=1)
    assert np.array_equal(label(tmp_path / "cut", finished).right, whole.right)


@pytest.mark.parametrize(
    "changes", [{"folds": 4}, {"seeds": (0, 2)}, {"settings": {"model": "other"}}, {"rows": token_rows(30, 1)}]
)
def test_answers_of_another_run_are_not_taken(changes, tmp_path):
    label(tmp_path, Trainer())
    with pytest.raises(ValueError, match="holds the stages of another run"):
        label(tmp_path, Trainer(), **changes)


def test_easy_is_what_is_right_under_all_seeds_or_the_majority():
    found = Difficulty(np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool))
    assert found.hard().tolist() == [False, True, True, True]
    assert found.hard("majority").tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="all, majority"):
        found.hard("most")


def test_marks_stand_in_a_column_and_replace_older_ones():
    marked = mark_hard_rows(ROWS, [True] + [False] * 29)
    assert marked[HARD] == [1] + [0] * 29 and mark_hard_rows(marked, [False, True] * 15)[HARD] == [0, 1] * 15
    check_hard_rows(marked, "single_label_classification")


@pytest.mark.parametrize(
    ("hard", "said"), [([False] * 30, "none are hard"), ([True] * 30, "all are hard"), ([True], "one mark per row")]
)
def test_marks_that_teach_nothing_are_refused(hard, said):
    with pytest.raises(ValueError, match=said):
        mark_hard_rows(ROWS, hard)


def test_training_rows_without_marks_and_regression_are_refused():
    with pytest.raises(ValueError, match="needs a column 'hard'"):
        check_hard_rows(ROWS, "single_label_classification")
    with pytest.raises(ValueError, match="regression"):
        check_hard_rows(mark_hard_rows(ROWS, [True, False] * 15), "regression")


@pytest.mark.parametrize("changes", [{"folds": 1}, {"folds": 31}, {"seeds": ()}, {"seeds": (1, 1)}])
def test_folds_and_seeds_out_of_range_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"Folds must lie in 2\.\.30"):
        label(tmp_path, Trainer(), **changes)


@pytest.mark.parametrize(
    ("texts", "labels", "said"),
    [
        (range(5), [3, 5, 7, 7, 9], "5 different texts and at most 2 rows of one class.*no more folds than either"),
        ([1, 1, 1, 2, 2, 2], [0] * 6, "2 different texts and at most 6 rows of one class.*no more folds than either"),
    ],
)
def test_more_folds_than_texts_or_rows_of_a_class_are_refused(texts, labels, said, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[number, 1] for number in texts], "labels": labels})
    with pytest.raises(ValueError, match=said):
        label(tmp_path, Trainer(), rows=rows)
    assert not list(tmp_path.iterdir())


def test_rows_whose_labels_are_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither right nor wrong"):
        label(tmp_path, Trainer(), rows=Dataset.from_dict({"input_ids": [[1]] * 9, "labels": [0.5] * 9}))


def test_rows_without_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no `labels`"):
        label(tmp_path, Trainer(), rows=ROWS.remove_columns("labels"))
