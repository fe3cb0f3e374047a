"""Arguments of [`CostEffTrainer`]: upstream's, and the weights of the multi-exit objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

WEIGHTS = (
    *("task_weight", "soft_label_weight", "representation_weight", "difficulty_weight"),
    *("skip_weight", "contrastive_weight", "exit_contrastive_weight"),
)
SOFT_LABEL_EXITS = ("same", "last")
TRAINED_PARTS = ALL, BACKBONE, EXITS = ("all", "backbone", "exits")


@dataclass
class CostEffTrainingArguments(TrainingArguments):
    """Upstream's `TrainingArguments` plus what the joint exit-aware distillation loss needs.

    Args:
        task_weight: Weight of the true labels at all exits. `None`: 1 without a teacher, 0 with one, because
            COST-EFF trains the student on soft labels and representations alone.
        soft_label_weight: Weight of the teacher's predictions at all exits; unused without a teacher.
        soft_label_exit: Which exit of a multi-exit teacher teaches an exit of the student: `"same"`, the one at its
            depth (COST-EFF), or `"last"`, whose answers are better than those of exits that are weak themselves.
        representation_weight: Weight of the teacher's hidden states at all layers; unused without a teacher.
        temperature: Divisor of both logits in the soft-label loss, above 0; the method uses 1.
        representation_only_ratio: Share of the steps, from the start, that train on representations alone, in 0..1.
        token_replacement_rate: Probability that an ordinary token of a training text is replaced by another of its
            batch, in 0..1, see [`hf_costeff.augmentation.replace_tokens`]. Teacher and student see the same changed
            text, so it needs a teacher, the tokenizer as `processing_class`, and no weight on the true labels.
        class_weights: Weight of each class in the task loss, one per label (with several labels per text, of each
            label's positive rows); `None` weighs all alike. Not for regression.
        difficulty_weight: Weight of the difficulty-aware regularisation at all exits (see
            [`hf_costeff.losses.difficulty_loss`]), which needs a column `hard` in the training rows.
        difficulty_margin: By how much confidence on an easy row shall be above that on a hard one, in 0..1.
        trained_parts: `"all"`; `"backbone"`, which is everything but the exits before the last; or `"exits"`, these
            exits alone. What does not learn gets no weight decay either, and no dropout.
        hard_gate_ratio: Share of the steps, at the end, in which gates weigh layers by 0 or 1, as they will in
            inference, and not by their probabilities; in 0..1. With `trained_parts="exits"` they always do.
        skip_weight: Weight of the incentive to skip, see [`hf_costeff.losses.skip_loss`]; with `target_layers` that of
            the first step alone.
        target_layers: Layers that a row shall run on average, each counted by its FLOPs over those of the mean layer,
            see [`hf_costeff.efficiency.relative_layer_flops`]. The weight of the incentive is adapted after every step
            by what the gates decide on its rows, also to below 0, which holds skipping back. `None` leaves it.
        contrastive_weight: Weight of the contrast between adjacent layers' tokens, see
            [`hf_costeff.losses.cross_layer_contrastive_loss`]. The paper's eta is this / (1 + this).
        contrastive_temperature: Divisor of the cosines in it, above 0.
        exit_contrastive_weight: Weight of the same contrast between the token states inside adjacent exit heads, as
            the mean over pairs; for heads that have such states (`exit_head="attention"`).
        exit_contrastive_temperature: Divisor of the cosines in that, above 0.

    Raises:
        ValueError: For a weight that is below 0 or infinite, a ratio, rate or margin outside 0..1, a temperature that
            is not above 0 or infinite, or unknown parts.
    """

    task_weight: float | None = field(default=None, metadata={"help": "Weight of the true labels at all exits."})
    soft_label_weight: float = field(default=1.0, metadata={"help": "Weight of the teacher's predictions."})
    soft_label_exit: str = field(
        default="same", metadata={"help": "The teacher's exit that teaches each exit: same (depth) or last."}
    )
    representation_weight: float = field(default=1.0, metadata={"help": "Weight of the teacher's hidden states."})
    temperature: float = field(default=1.0, metadata={"help": "Divisor of the logits in the soft-label loss."})
    representation_only_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps, from the start, on representations alone."}
    )
    token_replacement_rate: float = field(
        default=0.0, metadata={"help": "Probability that a token of a training text is replaced."}
    )
    class_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each class, task loss only."})
    difficulty_weight: float = field(default=0.0, metadata={"help": "Weight of the difficulty-aware regularisation."})
    difficulty_margin: float = field(
        default=0.5, metadata={"help": "Margin of the confidence on easy rows over that on hard ones."}
    )

    trained_parts: str = field(
        default="all",
        metadata={"help": "all, backbone (all but the exits before the last), or exits (those alone)."},
    )
    hard_gate_ratio: float = field(
        default=0.4, metadata={"help": "Share of the steps, at the end, in which gates weigh layers by 0 or 1."}
    )
    skip_weight: float = field(default=0.0, metadata={"help": "Weight of the incentive to skip layers."})
    target_layers: float | None = field(
        default=None,
        metadata={"help": "Layers that a row shall run on average, counted by FLOPs; adapts the weight above."},
    )
    contrastive_weight: float = field(default=0.0, metadata={"help": "Weight of the contrast between layers."})
    contrastive_temperature: float = field(default=0.5, metadata={"help": "Divisor of the cosines in it."})
    exit_contrastive_weight: float = field(default=0.0, metadata={"help": "Weight of the contrast between exits."})
    exit_contrastive_temperature: float = field(default=0.55, metadata={"help": "Divisor of the cosines in it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in WEIGHTS:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is {value}. A loss weight must be 0 or more, and finite.")
        for name in ("representation_only_ratio", "token_replacement_rate", "difficulty_margin", "hard_gate_ratio"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value}. It must lie in 0..1.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature}. It must be above 0 and finite; 1 changes nothing.")
        for name in ("contrastive_temperature", "exit_contrastive_temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}. It must be above 0 and finite; the paper's are about 0.5.")
        for name, known in (("trained_parts", TRAINED_PARTS), ("soft_label_exit", SOFT_LABEL_EXITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}. It must be one of {', '.join(known)}.")
