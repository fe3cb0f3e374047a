"""What all recipes share: where they train, their rows, and stages that are gone through once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from .checkpoints import load_classifier_of_same_rows
from .checksums import fingerprint, fingerprint_of
from .configuration_cascade import require_single_model
from .data import PreparedData, make_collator
from .distillation import bf16_pays, log_to_stderr, prepared, stage_arguments
from .evaluation import collect_exit_logits, row_keys
from .exit_criteria import answers
from .metrics import check_metric, default_metric
from .recipes import Phase
from .regularizer import Regularizer
from .report import describe_hardware, without_folders
from .stages import StageStore, working_folder
from .trainer import CostEffTrainer, ResumableTrainer
from .training_args import CostEffTrainingArguments

logger = logging.get_logger(__name__)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


@dataclass(frozen=True)
class Stage:
    """A named piece of a recipe.

    Args:
        name: Of its folder.
        run: Makes what writes the stage's files into a folder, and a record of what happened, JSON-ready.
    """

    name: str
    run: Callable[[], tuple[Callable[[Path], Any], dict[str, Any]]]

    @classmethod
    def of_model(cls, name: str, train: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]) -> Stage:
        """A stage that makes a model, and a record."""

        def run() -> tuple[Callable[[Path], Any], dict[str, Any]]:
            model, record = train()
            return model.save_pretrained, record

        return cls(name, run)


def settings_key(arguments: object, names: Sequence[str]) -> str:
    """Short name of these settings, for stages that others may stand beside."""
    return fingerprint(repr(getattr(arguments, name)) for name in names)[:8]


def settings_of_run(
    arguments: Any,
    data: PreparedData,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    without: Sequence[str],
    fresh: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that decides what a run makes of a model, as [`StageStore`] wants it.

    Args:
        arguments: Of the recipe, a dataclass.
        data: The rows.
        model: What the run starts from.
        teacher: What it learns from, if anything.
        without: Arguments that decide nothing, or name the stages that they decide.
        fresh: Weights of the model that were drawn just now.
    """
    wanted = {name: value for name, value in vars(arguments).items() if name not in ("output_dir", *without)}
    return {
        **wanted,
        "model_fingerprint": fingerprint_of(model, without=fresh),
        "teacher_fingerprint": None if teacher is None else fingerprint_of(teacher),
        "data_fingerprint": data.fingerprint(),
        "max_length": data.max_length,
    }


class StagedRun:
    """One run of a recipe. Recipes build on it: first the rows, then the stages, then what they report."""

    def __init__(self, output_dir: str, seed: int, precision: str = "auto") -> None:
        """Choose where and how to train; nothing is loaded or written yet.

        Args:
            output_dir: The run's folder.
            seed: Of order, dropout and new weights, the same for every stage.
            precision: fp32, bf16 (mixed) or auto: bf16 where it pays.
        """
        self.output_dir = Path(output_dir)
        self.seed = seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = bf16_pays(self.device) if precision == "auto" else precision == "bf16"

    def _take_rows(self, data: PreparedData, tokenizer: PreTrainedTokenizerBase, metric: str | None = None) -> None:
        """Use these rows, and choose checkpoints by the metric; default: by problem type.

        Raises:
            ValueError: If the metric is not one of the problem type, or falls as models improve.
        """
        self.data, self.tokenizer, self.collator = data, tokenizer, make_collator(tokenizer)
        self.calibration = data.calibration
        self.metric = metric or default_metric(data.problem_type)
        check_metric(self.metric, data.problem_type)
        if self.metric == "mse":
            raise ValueError("`metric` is 'mse', which falls as models improve. Choose by spearman or pearson.")

    def _load_teacher(self, name: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """A teacher that takes the same rows, or `None` for none.

        Raises:
            ValueError: If it cannot be loaded, or cuts texts into other pieces.
        """
        if name is None:
            return None
        return self._prepared(load_classifier_of_same_rows(name, tokenizer, dtype=torch.float32))

    def _require_answers(self, teacher: PreTrainedModel | None) -> None:
        """Refuse training rows that nothing can be learnt from.

        Raises:
            ValueError: If they have no labels and there is no teacher.
        """
        if teacher is None and "labels" not in self.data.train.column_names:
            raise ValueError(
                "The training rows have neither labels nor a teacher to learn from. Name a `teacher`, or add a label "
                "column."
            )

    def _label_calibration(self, teacher: PreTrainedModel | None) -> None:
        """Where the calibration rows came without labels, let the teacher's answers stand in, if there is one."""
        rows = self.data.calibration
        if teacher is None or "labels" in rows.column_names:
            return
        logger.warning("The calibration rows have no labels; the teacher's answers stand in for them.")
        logits = collect_exit_logits(teacher, rows, self.collator, description="Labelling").logits[:, -1]
        self.calibration = rows.add_column("labels", answers(logits, self.data.problem_type).tolist())

    def _prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        require_single_model(model.config, model.name_or_path)
        return prepared(model, self.device, self.bf16)

    def _go_through(self, stages: Sequence[Stage], settings: Mapping[str, Any]) -> None:
        """Run the stages that are not done yet, under a progress bar.

        Args:
            stages: In order. None of them trains on other rows than the run's own.
            settings: Everything that decides the result, see [`StageStore`].

        Raises:
            ValueError: If the folder holds another run or other files.
        """
        self.store = StageStore(self.output_dir, settings)
        if stages:
            self.train_keys = row_keys(self.data.train, ["input_ids"])
            self.store.keep_train_keys(self.train_keys)
        if finished := [stage.name for stage in stages if self.store.is_finished(stage.name)]:
            logger.warning(f"Going on in {self.output_dir}; done before: {', '.join(finished)}.")
        for stage in (bar := tqdm(stages, desc="Stages", disable=not stages)):
            bar.set_postfix_str(stage.name)
            if not self.store.is_finished(stage.name):
                set_seed(self.seed)
                started = time.monotonic()
                save, record = stage.run()
                self.store.finish(stage.name, save, {**record, "seconds": round(time.monotonic() - started, 1)})

    def _facts(self, stages: Sequence[Stage], settings: Mapping[str, Any]) -> dict[str, Any]:
        """What every report tells beside its figures, JSON-ready. Of local paths only the last part: it may be pushed.

        Args:
            stages: That were gone through.
            settings: That were asked for, where the rows came from included.
        """
        return {
            "data": self.data.summary(),
            "settings": {name: without_folders(value) for name, value in settings.items()},
            "stages": {stage.name: self.store.record(stage.name) for stage in stages},
            "hardware": describe_hardware(self.device),
        }

    def _load(self, stage: str) -> PreTrainedModel:
        """The model of a finished stage."""
        files = self.store.files(stage)
        return self._prepared(AutoModelForSequenceClassification.from_pretrained(files, dtype=torch.float32))

    def _training_arguments(
        self, kind: type[Arguments], stage: str, phase: Phase, *, batch_size: int, best_by: str | None, **extra: Any
    ) -> Arguments:
        """What a stage trains with, see [`stage_arguments`]; its checkpoints lie in its working folder.

        A recipe may ask before the run's folder is opened, so that what cannot work is known early.
        """
        return stage_arguments(
            kind,
            str(working_folder(self.output_dir, stage)),
            phase,
            len(self.data.train),
            batch_size=batch_size,
            best_by=best_by,
            device=self.device,
            bf16=self.bf16,
            seed=self.seed,
            **extra,
        )

    def _train_multi_exit(
        self,
        model: PreTrainedModel,
        arguments: CostEffTrainingArguments,
        teacher: PreTrainedModel | None,
        regularizer: Regularizer | None = None,
        evaluate: bool = True,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train a multi-exit model on the run's rows; the record has the weights of the losses too."""
        trainer = CostEffTrainer(
            model,
            arguments,
            teacher=teacher,
            regularizer=regularizer,
            train_dataset=self.data.train,
            eval_dataset=self.calibration,
            data_collator=self.collator,
            processing_class=self.tokenizer,
        )
        trained, record = self._run_trainer(trainer, evaluate)
        return trained, {**record, "loss_weights": trainer.loss_weights}

    def _run_trainer(self, trainer: ResumableTrainer, evaluate: bool = True) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train, going on from the latest whole checkpoint, and write down how it went."""
        log_to_stderr(trainer)
        trainer.train(resume_from_checkpoint=True)
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        record: dict[str, Any] = {
            "steps": trainer.state.global_step,
            "learning_rate": trainer.args.learning_rate,
            "batch_size": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
            "last_log": losses[-1] if losses else {},
        }
        if evaluate:
            record["calibration_metrics"] = trainer.evaluate()
        return trainer.model, record
