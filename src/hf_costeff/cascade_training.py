"""From checkpoints and rows to a cascade: members without a head are fine-tuned, the smallest with difficulty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from .cascade import make_cascade, save_cascade
from .cascade_costs import classifier_flops
from .checkpoints import load_config, load_tokenizer, load_unfinished_classifier
from .checksums import fingerprint_of
from .configuration_cascade import FEWEST_MEMBERS, match_labels, naming_member
from .conversion import longest_text
from .data import DataArguments, PreparedData, make_collator, prepare_data
from .difficulty import (
    HARD,
    RIGHT_FILE,
    RULES,
    Difficulty,
    check_hard_rows,
    difficulty_labels,
    difficulty_part,
    mark_hard_rows,
)
from .distillation import stage_arguments
from .efficiency import PAPER_SEQ_LENGTH
from .evaluation import ExitReliability, exit_reliability
from .exit_criteria import REGRESSION
from .recipes import Phase, check_ranges
from .staged_run import Stage, StagedRun, settings_key
from .stages import working_folder
from .trainer import TeacherTrainer
from .training_args import CostEffTrainingArguments

logger = logging.get_logger(__name__)
TELLS = ("difficulty_folds", "difficulty_seeds")
"""What decides which rows are hard."""
OF_DIFFICULTY = (*TELLS, "difficulty_rule", "difficulty_weight", "difficulty_margin")


class MemberTrainer(TeacherTrainer):
    """Fine-tunes a stock classifier on true labels, with difficulty-aware regularisation where its weight is above 0.

    With it, `task_loss` and `difficulty_loss` are logged by name. It takes no part in evaluation.

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
        parts = difficulty_part(model, [outputs.logits], hard, self.problem_type, self.args)
        if parts:
            self._record({"task_loss": loss, **parts})
            loss = loss + self.args.difficulty_weight * parts["difficulty_loss"]
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
        if len(set(self.models)) < len(self.models):
            raise ValueError(
                f"`models` is {self.models}, one of them twice. A second copy answers what the first does."
            )
        least = {"difficulty_folds": 2, "difficulty_seeds": 1, "difficulty_weight": 0, "batch_size": 1, "seed": 0}
        check_ranges(self, least, above_zero=("epochs", "learning_rate"))
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
        data_arguments: Rows. The last member with a head decides the labels, or the last that has names for them.
        dataset: Loaded rows, instead of those that `data_arguments` names.

    Raises:
        ValueError: For checkpoints or rows that cannot be used.
    """
    return CascadeTraining(arguments, data_arguments, dataset).run()


class CascadeTraining(StagedRun):
    """One run. [`train_cascade`] is the way in."""

    def __init__(
        self,
        arguments: CascadeArguments,
        data_arguments: DataArguments,
        dataset: datasets.Dataset | datasets.DatasetDict | None,
    ) -> None:
        """Look at the members' configs and put them in the order of their cost; nothing is loaded or written yet."""
        super().__init__(arguments.output_dir, arguments.seed)
        self.arguments, self.data_arguments, self.dataset = arguments, data_arguments, dataset
        configs = {name: load_config(name) for name in arguments.models}
        self.names = sorted(arguments.models, key=lambda name: classifier_flops(configs[name], PAPER_SEQ_LENGTH))
        if self.names != arguments.models:
            logger.warning(f"The members are put in the order of their cost: {', '.join(self.names)}.")
        self.tokenizers = [load_tokenizer(name) for name in self.names]

    def run(self) -> CascadeResult:
        """Go through the stages that are not done yet, then put the members together and look at their exits."""
        loaded = [load_unfinished_classifier(name, dtype=torch.float32) for name in self.names]
        finished = [model.config for model, missing in loaded if not missing]
        self.label_config = naming_member(finished) if finished else None
        if finished:
            match_labels(finished)
        self.rows = [
            self._prepare(model, tokenizer) for (model, _), tokenizer in zip(loaded, self.tokenizers, strict=True)
        ]
        self._take_rows(self.rows[-1], self.tokenizers[-1])
        self.with_difficulty = bool(loaded[0][1] and self.arguments.difficulty_weight)
        if self.with_difficulty and self.data.problem_type == REGRESSION:
            raise ValueError("The labels are numbers, which are neither easy nor hard. Give --difficulty_weight 0.")
        unfinished = {number: f"member-{number}" for number, (_, missing) in enumerate(loaded, start=1) if missing}
        if self.with_difficulty:
            self.difficulty_stage = f"difficulty-{settings_key(self.arguments, TELLS)}"
            unfinished[1] += f"-{settings_key(self.arguments, OF_DIFFICULTY)}"
        stages = [Stage.of_model(name, partial(self._fine_tune, number, name)) for number, name in unfinished.items()]
        if self.with_difficulty:
            stages.insert(0, Stage(self.difficulty_stage, self._tell_difficulty))
        self._go_through(stages, self._settings(loaded))
        members = [
            self._load(unfinished[number]) if number in unfinished else model
            for number, (model, _) in enumerate(loaded, start=1)
        ]
        for member in members:
            member.set_attn_implementation("sdpa")
        cascade, tokenizers = make_cascade(members, self.tokenizers)
        save_cascade(cascade, tokenizers, self.output_dir)
        validation, collators = [rows.validation for rows in self.rows], [make_collator(one) for one in self.tokenizers]
        exits = exit_reliability(cascade.to(self.device), validation, collators, metric=self.metric)
        hard_share = float(np.mean(self._hard_rows())) if self.with_difficulty else None
        return CascadeResult(self.output_dir, self.metric, exits, hard_share)

    def _prepare(self, model: PreTrainedModel, tokenizer: Any) -> PreparedData:
        return prepare_data(
            self.data_arguments if self.dataset is None else self.dataset,
            tokenizer,
            arguments=self.data_arguments,
            teacher_config=self.label_config,
            max_positions=longest_text(model.config),
        )

    def _settings(self, loaded: list[tuple[PreTrainedModel, list[str]]]) -> dict[str, Any]:
        others = ("output_dir", *OF_DIFFICULTY)  # those name the stages that they decide
        values = {name: value for name, value in vars(self.arguments).items() if name not in others}
        return {
            **values,
            "models": self.names,
            "weights": [fingerprint_of(model, without=missing) for model, missing in loaded],
            "data_fingerprint": self.data.fingerprint(),
            "max_length": [rows.max_length for rows in self.rows],
        }

    def _fresh(self, number: int) -> PreTrainedModel:
        """The checkpoint with a new head, in the state that the seed gives it."""
        name = self.names[number - 1]
        config = load_config(name)
        self.rows[number - 1].label(config)
        model, _ = load_unfinished_classifier(name, config=config, dtype=torch.float32)
        return self._prepared(model)

    # Stages

    def _tell_difficulty(self) -> tuple[Callable[[Path], Any], dict[str, Any]]:
        def train(rows: datasets.Dataset, seed: int, folder: Path) -> PreTrainedModel:
            return self._train(1, rows, seed, folder)[0]

        wanted = self.arguments
        found = difficulty_labels(
            self.rows[0].train,
            make_collator(self.tokenizers[0]),
            train,
            working_folder(self.output_dir, self.difficulty_stage),
            folds=wanted.difficulty_folds,
            seeds=[wanted.seed + number for number in range(wanted.difficulty_seeds)],
        )
        return lambda folder: np.save(folder / RIGHT_FILE, found.right), {"right": float(found.right.mean())}

    def _hard_rows(self) -> np.ndarray:
        right = np.load(self.store.files(self.difficulty_stage) / RIGHT_FILE)
        return Difficulty(right).hard(self.arguments.difficulty_rule)

    def _fine_tune(self, number: int, stage: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        rows, weight = self.rows[number - 1].train, 0.0
        if number == 1 and self.with_difficulty:
            hard = self._hard_rows()
            if hard.any() and not hard.all():
                rows, weight = mark_hard_rows(rows, hard), self.arguments.difficulty_weight
            else:
                logger.warning(
                    f"Of {len(hard)} rows {'all' if hard.any() else 'none'} are hard for the smallest member, so it is "
                    "trained without difficulty. Another --difficulty_rule or more --difficulty_seeds may tell some "
                    "apart, in the same folder."
                )
        model, record = self._train(number, rows, self.seed, working_folder(self.output_dir, stage), weight)
        return model, {**record, "rows": len(rows), "difficulty_weight": weight}

    def _train(
        self, number: int, rows: datasets.Dataset, seed: int, folder: Path, difficulty_weight: float = 0.0
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The member from its checkpoint, trained on these rows."""
        set_seed(seed)
        wanted = self.arguments
        arguments = stage_arguments(
            CostEffTrainingArguments,
            str(folder),
            Phase(wanted.epochs, wanted.learning_rate),
            len(rows),
            batch_size=wanted.batch_size,
            device=self.device,
            bf16=self.bf16,
            seed=seed,
            difficulty_weight=difficulty_weight,
            difficulty_margin=wanted.difficulty_margin,
        )
        collator = make_collator(self.tokenizers[number - 1])
        trainer = MemberTrainer(self._fresh(number), arguments, train_dataset=rows, data_collator=collator)
        return self._run_trainer(trainer, evaluate=False)
