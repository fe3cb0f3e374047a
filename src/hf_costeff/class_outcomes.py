"""Who pays for early exit: what each class keeps of its right answers, and how early its rows leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_costeff import CostEffConfig
from .exit_criteria import SINGLE_LABEL, ExitConfig, simulate_exits


@dataclass(frozen=True)
class ClassOutcome:
    """What early exit does to the rows of one class.

    Args:
        name: The class.
        rows: How many rows are of it.
        full_depth: Share of them that full depth answers right (recall).
        early_exit: The same with early exit.
        mean_exit_layer: Mean 1-based layer at which they leave.
    """

    name: str
    rows: int
    full_depth: float
    early_exit: float
    mean_exit_layer: float


def class_outcomes(
    exit_logits: Tensor, labels: Tensor, settings: ExitConfig, config: CostEffConfig
) -> list[ClassOutcome]:
    """An outcome per class that has rows, the class that loses most first.

    A mean over all rows hides a rare class that pays for the speed of the others.

    Args:
        exit_logits: Raw logits of all exits, shape (rows, exits, labels).
        labels: Class indices, shape (rows,).
        settings: Exit settings.
        config: The model's.

    Returns:
        Outcomes; empty unless the problem is single-label, where a row has one class.

    Example: the first exit answers 0 whatever it sees, and everybody leaves there.

        >>> logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> config = CostEffConfig(num_hidden_layers=2, id2label={0: "dull", 1: "bright"})
        >>> for outcome in class_outcomes(logits, torch.tensor([0, 1]), ExitConfig(threshold=1.0), config):
        ...     print(outcome.name, outcome.full_depth, outcome.early_exit, outcome.mean_exit_layer)
        bright 1.0 0.0 1.0
        dull 1.0 1.0 1.0
    """
    if config.resolved_problem_type != SINGLE_LABEL:
        return []
    exits = simulate_exits(exit_logits, settings, config.exit_layers, SINGLE_LABEL)
    early = exit_logits[torch.arange(len(exits)), exits].argmax(-1) == labels
    full = exit_logits[:, -1].argmax(-1) == labels
    layers = torch.tensor(config.exit_layers)[exits].double()
    outcomes = []
    for label in labels.unique().tolist():
        own = labels == label
        shares = [float(values[own].double().mean()) for values in (full, early, layers)]
        outcomes.append(ClassOutcome(str(config.id2label[label]), int(own.sum()), *shares))
    return sorted(outcomes, key=lambda outcome: outcome.early_exit - outcome.full_depth)
