"""From checkpoints and rows to a cascade: members without a head are fine-tuned, the smallest with difficulty."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import logging

from .cascade import make_cascade, save_cascade
from .cascade_costs import classifier_flops
from .checkpoints import load_config, load_tokenizer, load_unfinished_classifier
from .checksums import fingerprint, fingerprint_of
from .configuration_cascade import FEWEST_MEMBERS
from .conversion import longest_text
from .data import DataArguments, PreparedData, make_collator, prepare_data
from .difficulty import HARD, RIGHT_FILE, RULES, Difficulty, check_hard_rows, difficulty_labels, mark_hard_rows
from .distillation import bf16_pays, log_to_stderr, prepared, training_arguments
from .efficiency import PAPER_SEQ_LENGTH
from .evaluation import ExitReliability, exit_reliability, row_keys
from .exit_criteria import REGRESSION
from .losses import difficulty_loss
from .metrics import default_metric
from .stages import StageStore
from .trainer import TeacherTrainer
from .training_args import CostEffTrainingArguments

logger = logging.get_logger(__name__)


class MemberTrainer(TeacherTrainer):
    """Fine-tunes a stock classifier on true labels, with difficulty-aware regularisation where its weight is above 0.

    Args:
        model: A stock sequence classifier. A model of this package has [`CostEffTrainer`].
        args: [`CostEffTrainingArguments`], of which class weights and the difficulty count.
        **kwargs: Everything else upstream's `Trainer` takes.

    Raises:
        ValueError: If difficulty has a weight and the training rows no marks, see [`check_hard_rows`].
    """

    args: CostEffTrainingArguments
    loss_columns = (HARD,)

    def __init__(self, model: PreTrainedModel, args: CostEffTrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, class_weights=args.class_weights, **kwargs)
        if args.difficulty_weight:
            check_hard_rows(self.train_dataset, self.problem_type)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss, plus the weighted difficulty loss of marked rows, and the model's outputs if asked for."""
        hard = inputs.pop(HARD, None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if hard is not None and self.args.difficulty_weight:
            part = difficulty_loss([outputs.logits], hard, self.problem_type, self.args.difficulty_margin)
            loss = loss + self.args.difficulty_weight * part
        return (loss, outputs) if return_outputs else loss


@dataclass
class CascadeArguments:
    """What a cascade is made of and how members are fine-tuned.

    Raises:
        ValueError: For a value out of range.
    """

    models: list[str] = field(
        metadata={
            "help": "Two or more checkpoints, folders or Hub ids. One with a classification head is taken as it is, "
            "one without is fine-tuned."
        }
    )
    output_dir: str = field(default="cascade", metadata={"help": "Where the cascade and the stages go."})
    difficulty_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the difficulty-aware regularisation of the smallest member, if it is fine-tuned."},
    )
    difficulty_margin: float = field(default=0.5, metadata={"help": "Margin of easy over hard rows in confidence."})
    difficulty_folds: int = field(default=5, metadata={"help": "Folds in which difficulty is told."})
    difficulty_seeds: int = field(default=1, metadata={"help": "Times that it is told; the paper's data says 5."})
    difficulty_rule: str = field(
        default="all", metadata={"help": "A row is easy if right under all seeds, or under the majority."}
    )
    epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows, per member and fold."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    batch_size: int = field(default=32, metadata={"help": "Rows per step."})
    seed: int = field(default=42, metadata={"help": "Of order, dropout and new heads."})

    def __post_init__(self) -> None:
        if len(self.models) < FEWEST_MEMBERS:
            raise ValueError(f"`models` is {self.models}. A cascade takes {FEWEST_MEMBERS} or more, smallest first.")
        for name, low in (("difficulty_weight", 0), ("difficulty_seeds", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least {low}.")
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be above 0.")
        if not 0 <= self.difficulty_margin <= 1:
            raise ValueError(f"`difficulty_margin` is {self.difficulty_margin}. It must lie in 0..1.")
        if self.difficulty_rule not in RULES:
            raise ValueError(f"`difficulty_rule` is {self.difficulty_rule!r}. It must be one of {', '.join(RULES)}.")


@dataclass(frozen=True)
class CascadeResult:
    """What a run made.

    Args:
        path: Folder of the cascade.
        metric: Name of the metric in `exits`.
        exits: Every exit of every member on the validation rows.
        hard_share: Share of the training rows that are hard for the smallest member; `None` if nobody asked.
    """

    path: Path
    metric: str
    exits: list[ExitReliability]
    hard_share: float | None


def train_cascade(
    arguments: CascadeArguments,
    data_arguments: DataArguments,
    dataset: datasets.Dataset | datasets.DatasetDict | None = None,
) -> CascadeResult:
    """Fine-tune the members that have no head, put all in the order of their cost, and save them as one cascade.

    A run that was interrupted goes on where it stopped. Thresholds are not chosen yet: `hf_costeff.calibrate`.

    Args:
        arguments: Members and training.
        data_arguments: Rows. The last member with a head decides the labels.
        dataset: Loaded rows, instead of those that `data_arguments` names.

    Raises:
        ValueError: For checkpoints or rows that cannot be used.
    """
    return _CascadeRun(arguments, data_arguments, dataset).run()


class _CascadeRun:
    def __init__(
        self,
        arguments: CascadeArguments,
        data_arguments: DataArguments,
        dataset: datasets.Dataset | datasets.DatasetDict | None,
    ) -> None:
        self.arguments, self.data_arguments, self.dataset = arguments, data_arguments, dataset
        configs = {name: load_config(name) for name in arguments.models}
        self.names = sorted(arguments.models, key=lambda name: classifier_flops(configs[name], PAPER_SEQ_LENGTH))
        if self.names != arguments.models:
            logger.warning(f"The members are put in the order of their cost: {', '.join(self.names)}.")
        self.tokenizers = [load_tokenizer(name) for name in self.names]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = bf16_pays(self.device)
        self.hard_share: float | None = None

    def run(self) -> CascadeResult:
        loaded = [load_unfinished_classifier(name, dtype=torch.float32) for name in self.names]
        finished = [model for model, missing in loaded if not missing]
        self.label_config = finished[-1].config if finished else None
        self.data = [
            self._prepare(model, tokenizer) for (model, _), tokenizer in zip(loaded, self.tokenizers, strict=True)
        ]
        if self.data[0].problem_type == REGRESSION and loaded[0][1] and self.arguments.difficulty_weight:
            raise ValueError("The labels are numbers, which are neither easy nor hard. Give --difficulty_weight 0.")
        self.store = StageStore(self.arguments.output_dir, self._settings(loaded))
        if len(finished) < len(loaded):
            self.store.keep_train_keys(row_keys(self.data[-1].train, ["input_ids"]))
        members = [
            self._fine_tuned(number) if missing else model for number, (model, missing) in enumerate(loaded, start=1)
        ]
        cascade, tokenizers = make_cascade(members, self.tokenizers)
        save_cascade(cascade, tokenizers, self.arguments.output_dir)
        metric = default_metric(self.data[-1].problem_type)
        rows, collators = [data.validation for data in self.data], [make_collator(one) for one in self.tokenizers]
        exits = exit_reliability(cascade.to(self.device), rows, collators, metric=metric)
        return CascadeResult(Path(self.arguments.output_dir), metric, exits, self.hard_share)

    def _prepare(self, model: PreTrainedModel, tokenizer: Any) -> PreparedData:
        return prepare_data(
            self.data_arguments if self.dataset is None else self.dataset,
            tokenizer,
            arguments=self.data_arguments,
            teacher_config=self.label_config,
            max_positions=longest_text(model.config),
        )

    def _settings(self, loaded: list[tuple[PreTrainedModel, list[str]]]) -> dict[str, Any]:
        values = {name: value for name, value in vars(self.arguments).items() if name != "output_dir"}
        bodies = [fingerprint_of(model, without=missing) for model, missing in loaded]
        raw = fingerprint(repr(row) for split in self.data[0].raw.values() for row in split)
        return {**values, "models": self.names, "weights": bodies, "data_fingerprint": raw}

    def _member_config(self, number: int) -> PreTrainedConfig:
        data, config = self.data[number - 1], load_config(self.names[number - 1])
        names = data.label_names or [f"LABEL_{label}" for label in range(data.num_labels)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: label for label, name in enumerate(names)}
        config.problem_type = data.problem_type
        return config

    def _fresh(self, number: int) -> PreTrainedModel:
        """The checkpoint with a new head, in the state that the seed gives it."""
        config = self._member_config(number)
        model, _ = load_unfinished_classifier(self.names[number - 1], config=config, dtype=torch.float32)
        return model

    def _fine_tuned(self, number: int) -> PreTrainedModel:
        name, rows, weight = f"member-{number}", self.data[number - 1].train, 0.0
        if number == 1 and self.arguments.difficulty_weight:
            hard = self._hard_rows()
            self.hard_share, weight = float(np.mean(hard)), self.arguments.difficulty_weight
            rows = mark_hard_rows(rows, hard)
        if not self.store.is_finished(name):
            model = self._train(number, rows, self.arguments.seed, self.store.working_dir(name), weight)
            self.store.finish(name, model.save_pretrained, {"rows": len(rows), "difficulty_weight": weight})
        return AutoModelForSequenceClassification.from_pretrained(self.store.files(name))

    def _hard_rows(self) -> np.ndarray:
        wanted, name = self.arguments, "difficulty"
        if not self.store.is_finished(name):

            def train(rows: datasets.Dataset, seed: int, folder: Path) -> PreTrainedModel:
                return self._train(1, rows, seed, folder, weight=0.0)

            found = difficulty_labels(
                self.data[0].train,
                make_collator(self.tokenizers[0]),
                train,
                self.store.working_dir(name),
                folds=wanted.difficulty_folds,
                seeds=[wanted.seed + number for number in range(wanted.difficulty_seeds)],
            )

            def save(folder: Path) -> None:
                np.save(folder / RIGHT_FILE, found.right)

            self.store.finish(name, save, {"right": float(found.right.mean())})
        return Difficulty(np.load(self.store.files(name) / RIGHT_FILE)).hard(wanted.difficulty_rule)

    def _train(self, number: int, rows: datasets.Dataset, seed: int, folder: Path, weight: float) -> PreTrainedModel:
        """The member from its checkpoint, trained on these rows."""
        set_seed(seed)
        steps = max(1, math.ceil(self.arguments.epochs * len(rows) / self.arguments.batch_size))
        trainer = MemberTrainer(
            prepared(self._fresh(number), self.device, self.bf16),
            training_arguments(
                CostEffTrainingArguments,
                str(folder),
                steps=steps,
                learning_rate=self.arguments.learning_rate,
                batch_size=self.arguments.batch_size,
                device=self.device,
                bf16=self.bf16,
                seed=seed,
                difficulty_weight=weight,
                difficulty_margin=self.arguments.difficulty_margin,
                save_steps=max(1, math.ceil(steps / 4)),
                save_total_limit=1,
            ),
            train_dataset=rows,
            data_collator=make_collator(self.tokenizers[number - 1]),
        )
        log_to_stderr(trainer)
        trainer.train(resume_from_checkpoint=True)
        return trainer.model
