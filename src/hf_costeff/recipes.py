"""How long and how fast each stage trains: the quick recipe, and the schedule of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

AUTO = "auto"
IMPORTANCE_ROWS = 640
"""Training rows that a quick importance pass looks at."""
WEAK_EXITS = 0.92
"""Exits are weak if the mean of the metric over all of them is less than this share of the last one's."""


def check_ranges(arguments: object, at_least: Mapping[str, float], above_zero: Sequence[str] = ()) -> None:
    """Refuse settings that no training can use.

    Args:
        arguments: Of a recipe.
        at_least: Setting -> the least that it may be.
        above_zero: Settings of which 0 is too little.

    Raises:
        ValueError: Naming the first that is out of range, or not finite.
    """
    for name, least in at_least.items():
        if not least <= getattr(arguments, name) < math.inf:
            raise ValueError(f"`{name}` is {getattr(arguments, name)}. It must be at least {least:g}, and finite.")
    for name in above_zero:
        if not 0 < getattr(arguments, name) < math.inf:
            raise ValueError(f"`{name}` is {getattr(arguments, name)}. It must be above 0, and finite.")


@dataclass(frozen=True)
class Phase:
    """One training run of a stage.

    Args:
        epochs: Passes over the training rows, may be a fraction; 0 leaves the phase out.
        learning_rate: Peak of the linear schedule.
        min_steps: At least so many optimizer steps, for small data sets.
        max_steps: At most so many; `None` for no limit.
        representation_only_ratio: Share of the steps, from the start, on representations alone.
    """

    epochs: float
    learning_rate: float
    min_steps: int = 0
    max_steps: int | None = None
    representation_only_ratio: float = 0.0

    def steps(self, rows: int, batch_size: int) -> int:
        """Optimizer steps for so many training rows.

        >>> Phase(epochs=2, learning_rate=1e-4, min_steps=100).steps(rows=320, batch_size=32)
        100
        """
        if self.epochs == 0:
            return 0
        wanted = max(self.min_steps, int(self.epochs * -(-rows // batch_size)), 1)
        return wanted if self.max_steps is None else min(wanted, self.max_steps)


@dataclass(frozen=True)
class Recipe:
    """Every phase of a compression run, in order.

    Args:
        name: `"fast"` or `"paper"`.
        teacher: Fine-tuning, if the teacher came without a classification head.
        assistant_representation: Assistant on the teacher's hidden states.
        assistant_prediction: Assistant's exits on the teacher's predictions and the true labels, half each.
        assistant_representation_weight: Of the teacher's hidden states in that phase, beside the predictions.
        interval: One interval of the iterative slenderization; an event follows each.
        interval_growth: r in learning rate * (1 + r)^n for the interval before event n + 1.
        events: Slenderization events; `None`: one per head, as the paper.
        importance_rows: Training rows an importance pass looks at, at most; `None` for all.
        representation: Recovery on hidden states alone.
        prediction: Recovery on predictions and hidden states together.
        token_replacement_rate: Of the texts in that phase, see [`CostEffTrainingArguments`].
        soft_label_exit: Which exit of the assistant teaches each exit in that phase, see [`CostEffTrainingArguments`];
            `"auto"` is `"last"` if its exits are weak on held-out rows.
        exit_pooling: What the exits look at, see [`CostEffConfig`].
        batch_size: Rows per optimizer step.
    """

    name: str
    teacher: Phase
    assistant_representation: Phase
    assistant_prediction: Phase
    assistant_representation_weight: float
    interval: Phase
    interval_growth: float
    events: int | None
    importance_rows: int | None
    representation: Phase
    prediction: Phase
    token_replacement_rate: float
    soft_label_exit: str
    exit_pooling: str
    batch_size: int = 32


def fast_recipe(rows: int, num_attention_heads: int, num_labels: int = 2) -> Recipe:
    """Minutes on a CPU: few events, and higher learning rates, which a narrow model takes well. Unlike the paper.

    At last all exits learn from the assistant's last exit, and not each from the one at its depth, if the assistant's
    exits are weak (`WEAK_EXITS`): those of its first layers hardly know more than chance where two texts are compared.

    Args:
        rows: Training rows; does not matter here.
        num_attention_heads: Heads kept per layer; does not matter here.
        num_labels: Classes. A batch of 32 shows few of many, so that heads trained on labels get 20 steps per class.
    """
    for_classes = 20 * num_labels
    return Recipe(
        name="fast",
        teacher=Phase(3, 5e-5, min_steps=max(400, for_classes)),
        assistant_representation=Phase(0, 0),
        assistant_prediction=Phase(1, 1e-4, min_steps=max(400, for_classes), max_steps=2000),
        assistant_representation_weight=1.0,
        interval=Phase(0.2, 1e-4, min_steps=60, max_steps=300, representation_only_ratio=0.7),
        interval_growth=1.0,
        events=3,
        importance_rows=IMPORTANCE_ROWS,
        representation=Phase(1, 3e-4, min_steps=300, max_steps=2000),
        prediction=Phase(3, 3e-4, min_steps=max(1500, for_classes), max_steps=10_000),
        token_replacement_rate=0.15,
        soft_label_exit=AUTO,
        exit_pooling="mean",
    )


# Epochs by heads kept, for small (MRPC), medium (SST-2) and large (MNLI) data: stage 3 per event, stage 4, stage 5.
_PAPER_EPOCHS = {
    2: ((2, 20, 10), (0.5, 10, 6), (0.3, 5, 3)),
    3: ((2, 18, 8), (0.55, 10, 5), (0.33, 5, 2)),
    4: ((2, 16, 7), (0.5, 9, 4), (0.37, 4, 2)),
    5: ((2, 14, 6), (0.55, 9, 4), (0.28, 4, 2)),
    6: ((2, 12, 5), (0.5, 8, 3), (0.33, 3, 2)),
    7: ((2, 10, 4), (0.4, 7, 3), (0.2, 3, 1)),
    8: ((2, 8, 3), (0.5, 6, 2), (0.25, 2, 1)),
}


def paper_recipe(rows: int, num_attention_heads: int, num_labels: int = 2) -> Recipe:
    """The schedule of COST-EFF's pipeline at batch size 32, by size of the data set and heads kept of 12.

    Unlike the pipeline: the first interval decays over its own steps; the warm-up has no floor of 10 steps; rows are
    grouped by length and incomplete batches kept; an importance pass sees every row once and not a draw with
    replacement; epochs follow the number of rows and not the name of the task; and the assistant starts from the
    teacher unless `pretrained` names its origin.

    Args:
        rows: Training rows: under 20,000 is small, under 200,000 medium.
        num_attention_heads: Heads kept per layer; outside 2..8 the nearest column of the pipeline's table is taken.
        num_labels: Classes; does not matter here.
    """
    size = 0 if rows < 20_000 else 1 if rows < 200_000 else 2
    interval, representation, prediction = _PAPER_EPOCHS[min(8, max(2, num_attention_heads))][size]
    tuning = (12, 5, 3)[size]
    return Recipe(
        name="paper",
        teacher=Phase(tuning, 2e-5),
        assistant_representation=Phase(tuning // 3, 2e-5),
        assistant_prediction=Phase(tuning, 2e-5),
        assistant_representation_weight=0.0,
        interval=Phase(interval, 1e-5, representation_only_ratio=0.5 if size == 0 else 0.7),
        interval_growth=0.12,
        events=None,
        importance_rows=None,
        representation=Phase(representation, 3e-5),
        prediction=Phase(prediction, 2e-5),
        token_replacement_rate=0.0,
        soft_label_exit="same",
        exit_pooling="cls",
    )


RECIPES: dict[str, Callable[[int, int, int], Recipe]] = {"fast": fast_recipe, "paper": paper_recipe}
