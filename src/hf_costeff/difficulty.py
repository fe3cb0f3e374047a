"""Which training rows are hard for a model: those that it gets wrong when it was not trained on them.

A model knows nearly all rows that it was trained on, so difficulty is told out of fold: the rows are cut into folds,
the model is trained on all folds but one and asked about that one (CascadeBERT, Li et al. 2021, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from .checksums import fingerprint
from .configuration_costeff import problem_type_of
from .evaluation import Collator, collect_exit_logits, row_keys
from .exit_criteria import MULTI_LABEL, REGRESSION, SINGLE_LABEL, answers, same_answers
from .losses import difficulty_loss
from .stages import StageStore, working_folder
from .training_args import CostEffTrainingArguments

HARD = "hard"
"""Name of the column that marks hard training rows with 1."""
RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "all": lambda right: right.sum(axis=1) == right.shape[1],
    "majority": lambda right: 2 * right.sum(axis=1) > right.shape[1],
}
"""Name -> which rows are easy, from shape (rows, seeds)."""
RIGHT_FILE = "right.npy"

TrainFold = Callable[[Dataset, int, Path], PreTrainedModel]
"""(training rows, seed, folder for checkpoints) -> a trained model."""


@dataclass(frozen=True)
class Difficulty:
    """How often a model got each row right that it was not trained on.

    Args:
        right: True where the model of a seed got a row right, shape (rows, seeds).
    """

    right: np.ndarray

    def hard(self, rule: str = "all") -> np.ndarray:
        """Which rows are hard, booleans, shape (rows,).

        Args:
            rule: A key of `RULES`: easy is what is right under `"all"` seeds, or under the `"majority"` of them.

        Raises:
            ValueError: An unknown rule.

        Example:
            >>> Difficulty(np.array([[True, True, True], [True, True, False]])).hard("majority").tolist()
            [False, False]
        """
        if rule not in RULES:
            raise ValueError(f"`rule` is {rule!r}. It must be one of {', '.join(RULES)}.")
        return ~RULES[rule](self.right)


def mark_hard_rows(dataset: Dataset, hard: Sequence[bool] | np.ndarray) -> Dataset:
    """The data set with a column `hard` of 0 and 1; one that it had is replaced.

    Args:
        dataset: Training rows.
        hard: One per row.

    Raises:
        ValueError: Not one per row, or nothing to learn from: no row is hard, or every one.
    """
    marks = np.asarray(hard, dtype=np.int64)
    if marks.shape != (len(dataset),):
        raise ValueError(f"`hard` has shape {marks.shape} for {len(dataset)} rows. Give one mark per row.")
    _check_both_kinds(marks)
    rest = dataset.remove_columns(HARD) if HARD in dataset.column_names else dataset
    return rest.add_column(HARD, marks.tolist())


def check_hard_rows(dataset: Any, problem_type: str) -> None:
    """Nothing, if training rows can teach difficulty.

    Raises:
        ValueError: They have no column `hard`, it says the same of all rows, or the task is regression.
    """
    if problem_type == REGRESSION:
        raise ValueError(
            "Difficulty-aware training needs classes, and this is a regression model. Set its weight to 0."
        )
    if HARD not in (getattr(dataset, "column_names", None) or ()):
        raise ValueError(
            f"Difficulty-aware training needs a column {HARD!r} in the training rows, and there is none. Make it with "
            "mark_hard_rows(dataset, difficulty_labels(...).hard()), or set its weight to 0."
        )
    _check_both_kinds(np.asarray(dataset[HARD]))


def difficulty_part(
    model: nn.Module,
    exit_logits: Sequence[Tensor],
    hard: Tensor | None,
    problem_type: str,
    args: CostEffTrainingArguments,
) -> dict[str, Tensor]:
    """The part `difficulty_loss` of a training loss; nothing where it has no weight, or for rows without marks.

    Nothing in evaluation either, because its pairs are drawn at random.

    Args:
        model: In training mode, or not.
        exit_logits: As for [`hf_costeff.losses.difficulty_loss`], as the next two.
        hard: 1 for a hard row, 0 for an easy one, shape (batch,); `None`: no marks.
        problem_type: As upstream's `config.problem_type`.
        args: Weight and margin.
    """
    if hard is None or not model.training or not args.difficulty_weight:
        return {}
    return {"difficulty_loss": difficulty_loss(exit_logits, hard, problem_type, args.difficulty_margin)}


def _check_both_kinds(marks: np.ndarray) -> None:
    if marks.all() or not marks.any():
        count = "all" if len(marks) and marks.all() else "none"
        raise ValueError(
            f"Of {len(marks)} rows {count} are hard, so there is no pair to learn from. Label difficulty by a smaller "
            "model, more seeds or another rule, or train without it."
        )


def difficulty_labels(
    dataset: Dataset,
    collator: Collator,
    train: TrainFold,
    output_dir: str | Path,
    *,
    folds: int = 5,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> Difficulty:
    """Train `folds` models per seed, each without one fold, and note which rows of that fold they get right.

    Rows of equal tokens are in one fold, and classes are spread evenly over the folds. Every model is kept as no more
    than its answers; a run that was interrupted goes on where it stopped, and a finished one is only read.

    Args:
        dataset: Tokenized training rows with `labels`.
        collator: Pads a list of rows to a batch.
        train: Trains a new model of the kind whose difficulty is asked for, from weights that have not seen the rows.
        output_dir: Where answers and unfinished models are kept.
        folds: How many, at least 2.
        seeds: One number per repetition; each cuts other folds too.
        settings: Whatever else decides the result, JSON-ready; another run than the one in `output_dir` is refused.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: Rows without labels or of a regression task, too few rows, texts or folds, too many folds for the
            classes, repeated seeds, or another run in `output_dir`.
    """
    if "labels" not in dataset.column_names:
        raise ValueError(
            "The rows have no `labels`, so nobody knows which of them a model gets wrong. Add a label column."
        )
    if not 2 <= folds <= len(dataset) or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"`folds` is {folds} and `seeds` {list(seeds)} for {len(dataset)} rows. Folds must lie in "
            f"2..{len(dataset)}, and there must be one seed or more, all different."
        )
    if isinstance(dataset[0]["labels"], float):
        raise ValueError("The labels are numbers, which are neither right nor wrong, so no row is easy or hard.")
    groups, classes = _groups_and_classes(dataset)
    most, texts = int(np.bincount(classes).max()), len(np.unique(groups))
    if folds > min(most, texts):
        raise ValueError(
            f"`folds` is {folds}, and the rows have {texts} different texts and at most {most} rows of one class. "
            "Ask for no more folds than either, at least 2, or give more rows."
        )
    data = fingerprint(map(str, row_keys(dataset)))
    store = StageStore(output_dir, {**(settings or {}), "folds": folds, "seeds": list(seeds), "rows": data})
    right = np.zeros((len(dataset), len(seeds)), dtype=bool)
    parts = [(column, *part) for column, seed in enumerate(seeds) for part in _folds(dataset, folds, seed)]
    for column, name, seed, rest, held in (bar := tqdm(parts, desc="Difficulty", disable=not show_progress)):
        bar.set_postfix_str(name)
        if not store.is_finished(name):
            set_seed(seed)
            folder = working_folder(output_dir, name)
            folder.mkdir(exist_ok=True)
            model = train(dataset.select(rest), seed, folder)
            found = _right(model, dataset.select(held), collator)

            def save(folder: Path, found: np.ndarray = found) -> None:
                np.save(folder / RIGHT_FILE, found)

            store.finish(name, save, {"accuracy": float(found.mean()), "rows": len(held)})
        right[held, column] = np.load(store.files(name) / RIGHT_FILE)
    return Difficulty(right)


def _groups_and_classes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the text and of the class of every row; with several labels per row all are of one class."""
    groups = np.unique([str(ids) for ids in dataset["input_ids"]], return_inverse=True)[1]
    labels = np.array(dataset["labels"])
    return groups, np.unique(labels, return_inverse=True)[1] if labels.ndim == 1 else np.zeros(len(labels), dtype=int)


def _folds(dataset: Dataset, folds: int, seed: int) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Name, seed, rows to train on and rows held out of every fold."""
    groups, classes = _groups_and_classes(dataset)
    cut = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed).split(groups, classes, groups)
    for number, (rest, held) in enumerate(cut, start=1):
        yield f"seed-{seed}-fold-{number}", seed, rest, held


def _right(model: PreTrainedModel, held: Dataset, collator: Collator) -> np.ndarray:
    problem_type = problem_type_of(model.config)
    if problem_type not in (SINGLE_LABEL, MULTI_LABEL):
        raise ValueError("A regression model is neither right nor wrong, so its rows have no difficulty of this kind.")
    records = collect_exit_logits(model, held, collator, show_progress=False)
    truth = torch.from_numpy(records.known_labels())
    wanted = truth > 0.5 if problem_type == MULTI_LABEL else truth
    return same_answers(answers(records.logits[:, -1], problem_type), wanted, problem_type).numpy()
