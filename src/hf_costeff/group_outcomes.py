"""Who pays for early exit: what each class, or short and long texts, keep of their right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .exit_criteria import REGRESSION, SINGLE_LABEL, ExitConfig
from .exit_replay import ExitReplay

LENGTH_GROUPS = 4


@dataclass(frozen=True)
class GroupOutcome:
    """What early exit does to a group of rows.

    Args:
        name: The class, or the lengths.
        rows: How many rows are of it.
        full_depth: Share of them that full depth answers right (of a class, its recall).
        early_exit: The same with early exit.
        mean_exit_layer: Mean 1-based layer at which they leave.
    """

    name: str
    rows: int
    full_depth: float
    early_exit: float
    mean_exit_layer: float


def group_outcomes(
    replay: ExitReplay, settings: ExitConfig, groups: Sequence[tuple[str, np.ndarray]]
) -> list[GroupOutcome]:
    """An outcome per group, in order.

    Args:
        replay: Labelled rows; not of a regression, where no answer is right or wrong.
        settings: Exit settings.
        groups: Names, and which rows are in the group, booleans, shape (rows,); at least one row each.

    Example: the first exit answers 0 whatever it sees, and everybody leaves there.

        >>> import torch
        >>> from hf_costeff import CostEffConfig
        >>> from hf_costeff.exit_replay import ExitLogits
        >>> logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> records = ExitLogits(logits, torch.tensor([5, 9]), torch.tensor([0, 1]))
        >>> replay = ExitReplay(records, CostEffConfig(num_hidden_layers=2, id2label={0: "dull", 1: "bright"}))
        >>> for outcome in class_outcomes(replay, ExitConfig(threshold=1.0)):
        ...     print(outcome.name, outcome.full_depth, outcome.early_exit, outcome.mean_exit_layer)
        bright 1.0 0.0 1.0
        dull 1.0 1.0 1.0
    """
    exits = replay.at(settings)
    index = exits.exit_index.numpy()
    full, early = replay.right[:, -1], replay.right[np.arange(len(index)), index]
    layers = exits.exit_layer.numpy()
    return [
        GroupOutcome(name, int(own.sum()), *(float(values[own].mean()) for values in (full, early, layers)))
        for name, own in groups
    ]


def class_outcomes(replay: ExitReplay, settings: ExitConfig) -> list[GroupOutcome]:
    """An outcome per class that has rows, the class that loses most first.

    A mean over all rows hides a rare class that pays for the speed of the others.

    Args:
        replay: Labelled rows.
        settings: Exit settings.

    Returns:
        Outcomes; empty unless the problem is single-label, where a row has one class.
    """
    if replay.problem_type != SINGLE_LABEL:
        return []
    labels, names = replay.records.known_labels(), replay.config.id2label
    groups = [(str(names[label]), labels == label) for label in np.unique(labels).tolist()]
    return sorted(group_outcomes(replay, settings, groups), key=lambda outcome: outcome.early_exit - outcome.full_depth)


def length_outcomes(replay: ExitReplay, settings: ExitConfig) -> list[GroupOutcome]:
    """What early exit does to short and to long rows: up to four groups of about equal size, shortest first.

    Args:
        replay: Labelled rows.
        settings: Exit settings.

    Returns:
        Outcomes, named by their lengths; empty for regression, where no answer is right or wrong.
    """
    if replay.problem_type == REGRESSION:
        return []
    lengths = replay.records.seq_lengths.numpy()
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:-1]))
    numbers = np.searchsorted(edges, lengths, side="left")
    groups = []
    for number in np.unique(numbers):
        own = numbers == number
        shortest, longest = lengths[own].min(), lengths[own].max()
        groups.append((f"{shortest} tokens" if shortest == longest else f"{shortest} to {longest} tokens", own))
    return group_outcomes(replay, settings, groups)
