"""The recipe: a fine-tuned checkpoint in, a slim multi-exit model out, in resumable stages.

    teacher -> assistant -> slenderization events -> representation recovery -> prediction recovery -> exit threshold

Each stage loads what the one before it saved, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .calibration import exit_curve
from .checkpoints import load_config, load_tokenizer, load_unfinished_classifier
from .checksums import fingerprint_of
from .compression_args import CompressionArguments, CompressionPlan
from .conversion import check_same_shape, convert_config, convert_from_stock
from .data import DataArguments, PreparedData, class_weights, prepare_data
from .distillation import importance_against, random_batches
from .efficiency import (
    PAPER_SEQ_LENGTH,
    checkpoint_bytes,
    count_parameters,
    cumulative_flops,
    full_depth_flops,
    parameter_count,
    stock_flops,
)
from .evaluation import Contender, calibrate, collect_exit_logits, report_rows
from .exit_criteria import MULTI_LABEL, REGRESSION, ExitConfig
from .exit_replay import ExitReplay
from .group_outcomes import class_outcomes
from .hub import push_folder
from .importance import compute_importance
from .model_card import write_model_card
from .recipes import AUTO, RECIPES, WEAK_EXITS, Phase, Recipe
from .report import CompressionResult, write_report
from .slenderization import (
    ALLOCATIONS,
    Budget,
    Widths,
    describe_widths,
    iterative_schedule,
    slenderize,
    solve_widths,
)
from .staged_run import Stage, StagedRun
from .teacher import Teacher
from .trainer import TeacherTrainer
from .training_args import CostEffTrainingArguments

DATA_SOURCES = ("dataset", "train_file", "validation_file")


def compress(
    teacher: str | Path | PreTrainedModel,
    dataset: str | Path | datasets.Dataset | datasets.DatasetDict | None = None,
    output_dir: str | Path = "slim",
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> CompressionResult:
    """Make a slim multi-exit model from a fine-tuned classifier.

    Args:
        teacher: Hub id or folder of a fine-tuned encoder classifier, or the model itself, which is copied.
        dataset: Hub id, local folder, or loaded data; `None` if `train_file` is among the options.
        output_dir: Where the model and the stages go; an interrupted run in it goes on.
        processing_class: The teacher's tokenizer; `None` loads it from where the teacher is.
        **options: Fields of [`CompressionArguments`] and [`hf_costeff.data.DataArguments`].

    Returns:
        Path, plan and report.

    Raises:
        ValueError: For anything that cannot work, before training starts where that can be known.
        TypeError: For an unknown option.
    """
    compression_names = {item.name for item in dataclasses.fields(CompressionArguments)}
    data_names = {item.name for item in dataclasses.fields(DataArguments)}
    if unknown := set(options) - compression_names - data_names:
        raise TypeError(
            f"compress() does not know {', '.join(sorted(unknown))}. Options: "
            f"{', '.join(sorted(compression_names | data_names))}."
        )
    if isinstance(teacher, (str, Path)):
        name, given = str(teacher), None
    else:
        name, given = teacher.name_or_path or type(teacher).__name__, copy.deepcopy(teacher).float()
    chosen = {key: value for key, value in options.items() if key in compression_names}
    arguments = CompressionArguments(teacher=name, output_dir=str(output_dir), **chosen)
    data_options = {key: value for key, value in options.items() if key in data_names}
    if isinstance(dataset, (str, Path)):
        data_options["dataset"], dataset = str(dataset), None
    return Compression(
        arguments,
        DataArguments(**data_options),
        dataset=dataset,
        teacher=given,
        processing_class=processing_class,
    ).run()


class Compression(StagedRun):
    """One run of the recipe. [`compress`] is the way in."""

    def __init__(
        self,
        arguments: CompressionArguments,
        data_arguments: DataArguments,
        dataset: datasets.Dataset | datasets.DatasetDict | None = None,
        teacher: PreTrainedModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Look at the teacher's config; nothing is loaded or written yet.

        Raises:
            ValueError: If the teacher's architecture is not supported, or `pretrained` is of another shape.
        """
        super().__init__(arguments.output_dir, arguments.seed, arguments.precision)
        self.arguments = arguments
        self.data_arguments = data_arguments
        self.dataset = dataset
        self.given_teacher = teacher
        self.processing_class = processing_class
        self.teacher_config = teacher.config if teacher is not None else load_config(arguments.teacher)
        self.full_config = convert_config(self.teacher_config, exit_layers=arguments.exit_layers)
        if arguments.pretrained is not None:
            check_same_shape(load_config(arguments.pretrained), self.teacher_config)

    # The plan

    def plan(self) -> CompressionPlan:
        """Target widths and their cost, from the teacher's config alone."""
        with torch.device("meta"):
            teacher_parameters = count_parameters(AutoModelForSequenceClassification.from_config(self.teacher_config))
        teacher_flops = stock_flops(self.teacher_config, PAPER_SEQ_LENGTH)
        wanted = self.arguments
        budget = Budget(
            max_parameters=None if wanted.compression is None else int(teacher_parameters / wanted.compression),
            max_flops=None if wanted.flops_ratio is None else int(teacher_flops / wanted.flops_ratio),
            seq_length=PAPER_SEQ_LENGTH,
        )
        widths = solve_widths(
            self.full_config,
            budget,
            num_attention_heads=wanted.num_attention_heads,
            intermediate_size=wanted.intermediate_size,
            embedding_rank=wanted.embedding_rank,
        )
        slim = widths.apply_to(self.full_config)
        return CompressionPlan(
            widths=widths,
            parameters=parameter_count(slim),
            teacher_parameters=teacher_parameters,
            flops=full_depth_flops(slim, PAPER_SEQ_LENGTH),
            teacher_flops=teacher_flops,
            file_bytes=checkpoint_bytes(slim),
        )

    # The run

    def run(self) -> CompressionResult:
        """Go through the stages that are not done yet, then report."""
        tokenizer = self._load_tokenizer()
        loaded_teacher = self._load_given_teacher()
        self._take_rows(self._prepare_data(loaded_teacher, tokenizer), tokenizer, self.arguments.metric)
        if loaded_teacher is None and "labels" not in self.calibration.column_names:
            raise ValueError(
                f"The rows have no labels, and the teacher {self.arguments.teacher} has no classification head to "
                "fine-tune without them. Name a fine-tuned teacher, or add a label column."
            )
        self._label_calibration(loaded_teacher)
        self.data.label(self.teacher_config)
        self.data.label(self.full_config)
        plan = self.plan()
        self._check_reachable(plan)
        if self.arguments.pretrained is not None:
            self._load_pretrained(self.arguments.pretrained)  # a damaged one is told before anything is trained
        self.recipe: Recipe = RECIPES[self.arguments.recipe](
            len(self.data.train), max(plan.widths.num_attention_heads), self.data.num_labels
        )
        stages = list(self._stages(plan.widths, loaded_teacher))
        self._go_through(stages, self._settings())
        return self._report(plan, stages, loaded_teacher)

    def _prepare_data(self, loaded_teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
        """The splits, with the labels of the teacher; a teacher without a head has none, so the data's own count."""
        source = self.data_arguments if self.dataset is None else self.dataset
        longest = self.full_config.longest_text
        return prepare_data(
            source,
            tokenizer,
            teacher_config=None if loaded_teacher is None else self.teacher_config,
            max_positions=longest,
            arguments=self.data_arguments,
        )

    def _settings(self) -> dict[str, Any]:
        arguments = dataclasses.asdict(self.arguments)
        for name in ("output_dir", "max_metric_drop", "target_speedup", "push_to_hub"):
            del arguments[name]
        sources = {name: _resolved(getattr(self.data_arguments, name)) for name in DATA_SOURCES}
        return {
            **arguments,
            **dataclasses.asdict(self.data_arguments),
            **sources,
            "soft_label_exit": self._chosen("soft_label_exit"),
            "teacher": _resolved(arguments["teacher"]),
            "pretrained": _resolved(arguments["pretrained"]),
            "teacher_fingerprint": self.teacher_fingerprint,
            "data_fingerprint": self.data.fingerprint(),
        }

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.processing_class is not None:
            return self.processing_class
        if self.given_teacher is not None and not self.given_teacher.name_or_path:
            raise ValueError(
                f"The teacher is a {type(self.given_teacher).__name__} in memory that was not loaded from anywhere, so "
                "its tokenizer is unknown. Pass it: compress(..., processing_class=tokenizer)."
            )
        return load_tokenizer(self.arguments.teacher)

    def _check_reachable(self, plan: CompressionPlan) -> None:
        """Refuse a speed-up that even leaving at the first exit cannot give, before anything is trained."""
        wanted, slim = self.arguments.target_speedup, plan.widths.apply_to(self.full_config)
        first = cumulative_flops(slim, PAPER_SEQ_LENGTH)[slim.exit_layers[0] - 1]
        largest = stock_flops(self.teacher_config, PAPER_SEQ_LENGTH) / first
        if wanted is not None and wanted > 1.1 * largest:  # at other lengths the ratio is a little different
            raise ValueError(
                f"A speed-up of {wanted:g} cannot be reached: if every row left at the first exit it would be about "
                f"{largest:.1f}. Ask for less, or compress further."
            )

    def _load_given_teacher(self) -> PreTrainedModel | None:
        """The teacher if it can classify already, else `None`: it has to be fine-tuned first."""
        if self.given_teacher is not None:
            if not isinstance(self.given_teacher, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(self.teacher_config)]):
                raise ValueError(
                    f"The given teacher is a {type(self.given_teacher).__name__}, not a sequence classifier. Load it "
                    "with AutoModelForSequenceClassification, or pass its name or folder to have it fine-tuned first."
                )
            self.teacher_fingerprint = fingerprint_of(self.given_teacher)
            return self.given_teacher.to(self.device)
        model, missing = load_unfinished_classifier(self.arguments.teacher, dtype=torch.float32)
        self.teacher_fingerprint = fingerprint_of(model, without=missing)
        if not missing:
            return self._prepared(model)
        if not self.arguments.fine_tune_teacher:
            raise ValueError(
                f"The teacher {self.arguments.teacher} has no classification head (missing: "
                f"{', '.join(missing)}), and fine-tuning is switched off. Name a fine-tuned "
                "checkpoint, or leave `fine_tune_teacher` on."
            )
        return None

    def _stages(self, target: Widths, loaded_teacher: PreTrainedModel | None) -> Iterator[Stage]:
        if loaded_teacher is None:
            yield Stage.of_model("teacher", self._fine_tune_teacher)

        def teacher() -> PreTrainedModel:
            return loaded_teacher if loaded_teacher is not None else self._load("teacher")

        latest = None
        if self.recipe.assistant_representation.epochs:
            latest = "assistant-representation"
            yield Stage.of_model(latest, lambda: self._imitate_representations(teacher()))
        start = latest
        yield Stage.of_model("assistant", lambda: self._train_assistant(teacher(), start))
        events = self.arguments.events if self.arguments.events is not None else self.recipe.events
        latest = "assistant"
        for number, widths in enumerate(iterative_schedule(self.full_config, target, events), start=1):
            name = f"slenderize-{number:02d}"
            yield Stage.of_model(name, partial(self._event, name, latest, number, widths))
            latest = name
        last_event = latest
        if self.recipe.representation.epochs:
            yield Stage.of_model(
                "representation",
                lambda: self._recover("representation", last_event, self.recipe.representation, soft_label_weight=0.0),
            )
            latest = "representation"
        before_prediction = latest
        yield Stage.of_model("prediction", lambda: self._recover_predictions(before_prediction))

    # Stages

    def _fine_tune_teacher(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, _ = load_unfinished_classifier(self.arguments.teacher, config=self.teacher_config, dtype=torch.float32)
        trainer = TeacherTrainer(
            self._prepared(model),
            self._training_arguments(
                TrainingArguments, "teacher", self.recipe.teacher, batch_size=self._batch_size, best_by=self.metric
            ),
            class_weights=self._class_weights(),
            train_dataset=self.data.train,
            eval_dataset=self.calibration,
            data_collator=self.collator,
        )
        return self._run_trainer(trainer)

    def _imitate_representations(self, teacher: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
        return self._distil(
            "assistant-representation",
            self._fresh_assistant(teacher),
            teacher,
            self.recipe.assistant_representation,
            soft_label_weight=0.0,
        )

    def _train_assistant(self, teacher: PreTrainedModel, start: str | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Exits learn from the teacher's one prediction and from the true labels, half each (COST-EFF, stage TA-2)."""
        model = self._fresh_assistant(teacher) if start is None else self._load(start)
        labelled = "labels" in self.data.train.column_names
        return self._distil(
            "assistant",
            model,
            teacher,
            self.recipe.assistant_prediction,
            best=True,
            task_weight=0.5 if labelled else 0.0,
            soft_label_weight=0.5 if labelled else 1.0,
            representation_weight=self.recipe.assistant_representation_weight,
            class_weights=self._class_weights(),
        )

    def _event(self, name: str, before: str, number: int, widths: Widths) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train one interval, score, and cut to the next widths; the optimizer is new every time."""
        recipe = self.recipe
        model, assistant = self._load(before), self._load("assistant")
        rate = recipe.interval.learning_rate * (1 + recipe.interval_growth) ** (number - 1)
        phase = dataclasses.replace(recipe.interval, learning_rate=rate)
        model, record = self._distil(name, model, assistant, phase, evaluate=False)
        uneven = self.arguments.allocation == "uneven"
        importance = compute_importance(
            model,
            random_batches(
                self.data.train,
                self.collator,
                rows=recipe.importance_rows,
                batch_size=self._batch_size,
                device=self.device,
                seed=self.arguments.seed,
                description=f"Importance, {name}",
            ),
            importance_against(
                Teacher(assistant, self.full_config),
                self.data.problem_type,
                device=self.device,
                bf16=self.bf16,
                gradient_equilibrium=False if uneven else None,
            ),
        )
        plan = ALLOCATIONS[self.arguments.allocation](importance, widths)
        slim = slenderize(model, plan)
        reached = describe_widths(Widths.of(slim.config))
        return slim, {**record, **reached, "parameters": count_parameters(slim)}

    def _recover(self, name: str, before: str, phase: Phase, **weights: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        best = weights.get("soft_label_weight", 1.0) > 0
        model, record = self._distil(name, self._load(before), self._load("assistant"), phase, best=best, **weights)
        return model, {**weights, **record}

    def _recover_predictions(self, before: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        changes = {name: self._chosen(name) for name in ("token_replacement_rate", "soft_label_exit")}
        if changes["soft_label_exit"] == AUTO:
            seen = self.store.record("assistant")["calibration_metrics"]
            mean, last = seen[f"eval_mean_exit_{self.metric}"], seen[f"eval_{self.metric}"]
            weak = mean < last - (1 - WEAK_EXITS) * abs(last)
            changes["soft_label_exit"] = "last" if weak else "same"
        return self._recover("prediction", before, self.recipe.prediction, **changes)

    # What stages share

    def _chosen(self, name: str) -> Any:
        """A setting, or the recipe's where it is left out."""
        asked = getattr(self.arguments, name)
        return getattr(self.recipe, name) if asked is None else asked

    def _fresh_assistant(self, teacher: PreTrainedModel) -> PreTrainedModel:
        model = convert_from_stock(
            teacher if self.arguments.pretrained is None else self._load_pretrained(self.arguments.pretrained),
            exit_layers=self.arguments.exit_layers,
            exit_pooling=self.arguments.exit_pooling or self.recipe.exit_pooling,
        )
        self.data.label(model.config)
        return self._prepared(model)

    def _load_pretrained(self, name: str) -> PreTrainedModel:
        model, _ = load_unfinished_classifier(name, num_labels=self.data.num_labels, dtype=torch.float32)
        return model

    def _class_weights(self) -> list[float] | None:
        if not self.arguments.balance_classes:
            return None
        if self.data.problem_type in (REGRESSION, MULTI_LABEL):
            raise ValueError(f"`balance_classes` needs single-label data; this is {self.data.problem_type}.")
        return class_weights(self.data.train["labels"], self.data.num_labels)

    @property
    def _batch_size(self) -> int:
        return self.arguments.batch_size or self.recipe.batch_size

    def _distil(
        self,
        stage: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        phase: Phase,
        best: bool = False,
        evaluate: bool = True,
        **weights: Any,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train a multi-exit model for one phase; with `best` the checkpoint best over all exits is kept."""
        arguments = self._training_arguments(
            CostEffTrainingArguments,
            stage,
            phase,
            batch_size=self._batch_size,
            best_by=f"mean_exit_{self.metric}" if best else None,
            representation_only_ratio=phase.representation_only_ratio,
            **weights,
        )
        return self._train_multi_exit(model, arguments, teacher, evaluate=evaluate)

    # The report

    def _choose_exits(self, slim: PreTrainedModel) -> ExitConfig:
        """The exit threshold for the goal, stored in the model. Quick, so no stage: another goal needs no new run."""
        lengths = [len(ids) for ids in self.calibration["input_ids"]]
        return calibrate(
            slim,
            self.calibration,
            self.collator,
            metric=self.metric,
            max_metric_drop=self.arguments.max_metric_drop,
            target_speedup=self.arguments.target_speedup,
            reference_flops=float(np.mean([stock_flops(self.teacher_config, length) for length in lengths])),
            fit_temperatures=False,
            trained_keys=self.train_keys,
        )

    def _report(
        self, plan: CompressionPlan, stages: list[Stage], loaded_teacher: PreTrainedModel | None
    ) -> CompressionResult:
        teacher = loaded_teacher if loaded_teacher is not None else self._load("teacher")
        assistant, slim = self._load("assistant"), self._load("prediction")
        for model in (teacher, assistant, slim):
            model.set_attn_implementation("sdpa")
        settings = self._choose_exits(slim)
        records = {
            name: collect_exit_logits(model, self.data.validation, self.collator, description=f"Validating the {name}")
            for name, model in (("teacher", teacher), ("assistant", assistant), ("slim model", slim))
        }
        contenders = [
            Contender("teacher", teacher, records["teacher"]),
            Contender("assistant", assistant, records["assistant"]),
            Contender("slim, full depth", slim, records["slim model"]),
            Contender("slim, early exit", slim, records["slim model"], settings),
        ]
        rows = report_rows(contenders, self.data.validation, self.collator, self.data.problem_type)
        result = CompressionResult(self.output_dir, plan, rows, self.metric)
        curve = exit_curve(records["slim model"], slim.config, self.metric)
        outcomes = class_outcomes(ExitReplay(records["slim model"], slim.config), settings)
        facts = {
            "widths": describe_widths(Widths.of(slim.config)),
            "exit_config": settings.to_dict(),
            "classes": [dataclasses.asdict(outcome) for outcome in outcomes],
            **self._facts(stages, self._settings()),
        }
        slim.save_pretrained(result.model_path)  # not before the figures beside it can be written too
        self.tokenizer.save_pretrained(result.model_path)
        write_report(result, curve, facts)
        write_model_card(result.model_path, self.arguments.push_to_hub or result.model_path.resolve().name)
        if self.arguments.push_to_hub is not None:
            push_folder(result.model_path, self.arguments.push_to_hub)
        return result


def _resolved(name: str | None) -> str | None:
    """A local path in one spelling; anything else as it is."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name
