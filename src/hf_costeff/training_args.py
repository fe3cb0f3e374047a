"""Arguments of [`CostEffTrainer`]: upstream's, and the weights of the multi-exit objective."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class CostEffTrainingArguments(TrainingArguments):
    """Upstream's `TrainingArguments` plus what the joint exit-aware distillation loss needs.

    Args:
        task_weight: Weight of the true labels at all exits. `None`: 1 without a teacher, 0 with one, because
            COST-EFF trains the student on soft labels and representations alone.
        soft_label_weight: Weight of the teacher's predictions at all exits; unused without a teacher.
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

    Raises:
        ValueError: For a weight below 0, a ratio, rate or margin outside 0..1 or a temperature that is not above 0.
    """

    task_weight: float | None = field(default=None, metadata={"help": "Weight of the true labels at all exits."})
    soft_label_weight: float = field(default=1.0, metadata={"help": "Weight of the teacher's predictions."})
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("task_weight", "soft_label_weight", "representation_weight", "difficulty_weight"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` is {value}. A loss weight must be 0 or more.")
        for name in ("representation_only_ratio", "token_replacement_rate", "difficulty_margin"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value}. It must lie in 0..1.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}. It must be above 0; 1 changes nothing.")
