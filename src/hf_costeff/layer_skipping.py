"""Layer skipping from end to end: add gates, train them, train the exits, calibrate, report; in resumable stages.

    backbone, gates and last exit -> exits before the last -> exit threshold

Settings of the exits share the first stage: others in the same folder start at the second.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import PreTrainedModel

from .calibration import exit_curve
from .calibration_goals import check_goal
from .charts import draw_pareto_chart, draw_skip_chart
from .checkpoints import load_classifier, load_tokenizer, load_unfinished_classifier
from .configuration_costeff import EXIT_HEADS, EXIT_POOLINGS, SKIP_GATES
from .conversion import convert_from_stock, longest_text
from .data import DataArguments, prepare_data
from .evaluation import Contender, ReportRow, calibrate, collect_exit_logits, format_table, report_rows
from .exit_criteria import REGRESSION, ExitConfig
from .exit_replay import ExitLogits, ExitReplay
from .gating import add_skip_gates
from .group_outcomes import class_outcomes
from .model_card import write_model_card
from .modeling_costeff import CostEffForSequenceClassification
from .recipes import Phase, check_ranges
from .report import SKIPPING
from .skip_diagnostics import SkipDiagnostics, diagnose_skipping
from .skip_training import check_skip_settings
from .staged_run import Stage, StagedRun, settings_key, settings_of_run
from .teacher import check_same_labels
from .training_args import BACKBONE, EXITS, CostEffTrainingArguments

NO_GATES = "none"
NEAR = 0.1
"""Of the depth: how far from the target is still near it."""
GOALS = ("max_metric_drop", "target_speedup")
OF_NEW_EXITS = ("exit_head", "exit_pooling", "exit_layers")
OF_EXITS = ("exit_epochs", "exit_learning_rate", "exit_contrastive_weight", "exit_contrastive_temperature")


@dataclass
class LayerSkippingArguments:
    """What skips layers, how it is trained, and how far it goes.

    Raises:
        ValueError: For a value out of range.
    """

    model: str = field(
        metadata={"help": "A multi-exit model, a fine-tuned classifier or a bare encoder: a Hub id or a local folder."}
    )
    output_dir: str = field(metadata={"help": "Where the model and the stages of the run go."})
    teacher: str | None = field(
        default=None, metadata={"help": "Learn from this classifier's answers; default: from the true labels."}
    )
    gates: str | None = field(
        default=None,
        metadata={
            "help": "attention, linear, or none (exits alone). Default: attention, for a multi-exit model linear."
        },
    )
    exit_head: str | None = field(
        default=None, metadata={"help": "attention or linear. Default: attention; a multi-exit model keeps its."}
    )
    exit_pooling: str | None = field(
        default=None,
        metadata={
            "help": "What linear gates and heads look at: cls or mean. Default: mean; a multi-exit model keeps its."
        },
    )
    exit_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers with an exit. Default: all; a multi-exit model keeps its."}
    )
    target_layers: float | None = field(
        default=None,
        metadata={
            "help": "Layers that a row shall run on average, counted by FLOPs. Default: what `skip_weight` gives."
        },
    )
    skip_weight: float = field(default=0.04, metadata={"help": "Weight of the incentive to skip; 0 for none."})
    hard_gate_ratio: float = field(
        default=0.4, metadata={"help": "Share of the epochs with hard weights: 0 soft only, 1 hard only."}
    )
    contrastive_weight: float = field(default=0.01, metadata={"help": "Of the contrast between layers; 0 for none."})
    contrastive_temperature: float = field(default=0.5, metadata={"help": "Divisor of the cosines in it."})
    epochs: float = field(default=5.0, metadata={"help": "Training of everything but the exits before the last."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of these."})
    exit_contrastive_weight: float | None = field(
        default=None, metadata={"help": "Of the contrast between exits; default: 0.05, for linear heads 0."}
    )
    exit_contrastive_temperature: float = field(default=0.55, metadata={"help": "Divisor of the cosines in it."})
    exit_epochs: float = field(default=4.0, metadata={"help": "Training of the exits; 0 leaves them out: skip only."})
    exit_learning_rate: float = field(default=5e-4, metadata={"help": "Of these, on an encoder that stays as it is."})
    batch_size: int = field(default=16, metadata={"help": "Rows per optimizer step."})
    metric: str | None = field(default=None, metadata={"help": "Metric to choose by. Default: by problem type."})
    max_metric_drop: float | None = field(
        default=None,
        metadata={"help": "Points that early exit may lose to full depth with skipping. Default: 0.5."},
    )
    target_speedup: float | None = field(
        default=None, metadata={"help": "FLOPs ratio to full depth with skipping to reach instead."}
    )
    seed: int = field(default=42, metadata={"help": "Of order, dropout and new weights."})

    def __post_init__(self) -> None:
        goals = [name for name in GOALS if getattr(self, name) is not None]
        if goals and not self.exit_epochs:
            raise ValueError(
                f"`{goals[0]}` is {getattr(self, goals[0])}, a goal of exits, and `exit_epochs` is 0: none is trained. "
                "Leave one out."
            )
        if self.target_layers is not None and not self.epochs:
            raise ValueError(
                f"`target_layers` is {self.target_layers:g}, and `epochs` is 0: gates do not learn. Leave one out."
            )
        for name, known in (
            ("gates", (None, NO_GATES, *SKIP_GATES)),
            ("exit_head", (None, *EXIT_HEADS)),
            ("exit_pooling", (None, *EXIT_POOLINGS)),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(str(choice) for choice in known if choice is not None)
                raise ValueError(f"`{name}` is {getattr(self, name)!r}. It must be one of {choices}.")
        least = {"epochs": 0, "exit_epochs": 0, "batch_size": 1, "seed": 0}
        check_ranges(self, least, above_zero=("learning_rate", "exit_learning_rate"))
        if self.gates == NO_GATES and self.target_layers is not None:
            raise ValueError("`target_layers` needs gates, and `gates` is 'none'. Leave one out.")


@dataclass(frozen=True)
class LayerSkippingResult:
    """Where the model is and how it did.

    Args:
        model_path: Folder of the model, loadable with `from_pretrained`.
        rows: Report lines on validation: what was given, if it could answer; all layers; skipping; with early exit.
        metric: The metric that choices were made by.
        skipping: What the gates do on validation; `None` without gates.
        target_layers: Layers that a row was to run, counted by FLOPs; `None` if none were named.
    """

    model_path: Path
    rows: list[ReportRow]
    metric: str
    skipping: SkipDiagnostics | None
    target_layers: float | None

    def describe(self) -> str:
        """The result in words, with the table, and where the model is."""
        return f"{self.summary()}\n\nThe model is in {self.model_path}."

    def summary(self) -> str:
        """The result in words, with the table; of no folder."""
        reference, last = self.rows[0], self.rows[-1]
        before, after = reference.metrics[self.metric], last.metrics[self.metric]
        lines = [
            f"On validation {self.metric} is {before:.4f} ({reference.name}) and {after:.4f} ({last.name}), which "
            f"takes {last.flops_per_row / reference.flops_per_row:.2f} of the FLOPs at the lengths of these rows, "
            "gates and exits counted."
        ]
        if self.skipping is not None:
            lines.append(self.skipping.describe())
            if self.target_layers is not None:
                lines.append(self._target(self.skipping))
        return "\n".join(lines) + f"\n\n{format_table(self.rows, self.metric)}"

    def _target(self, skipping: SkipDiagnostics) -> str:
        reached = skipping.layers_run_by_flops
        text = f"Asked for: {self.target_layers:g} layers. Reached: {reached:.2f}, each layer counted by its FLOPs."
        if abs(reached - cast(float, self.target_layers)) > NEAR * len(skipping.shares):
            text += " That is not near: train longer, or at a higher learning rate."
        return text


def train_layer_skipping(
    arguments: LayerSkippingArguments, data: DataArguments | datasets.Dataset | datasets.DatasetDict
) -> LayerSkippingResult:
    """Make a model that skips layers and leaves early, row by row (SmartBERT, Hu et al. 2023).

    A stock checkpoint is converted, with gates before all layers; a multi-exit model gets gates and keeps its exits. A
    run that was killed goes on where it stopped.

    Args:
        arguments: What to train and how.
        data: Where the rows come from, or the rows themselves.

    Returns:
        The model's folder, and what it loses and saves.

    Raises:
        ValueError: For anything that cannot work, before training starts where that can be known.
    """
    return LayerSkipping(arguments, data).run()


class LayerSkipping(StagedRun):
    """One run. [`train_layer_skipping`] is the way in."""

    def __init__(
        self, arguments: LayerSkippingArguments, data: DataArguments | datasets.Dataset | datasets.DatasetDict
    ) -> None:
        """Load the model and the rows and add the gates, so that what cannot work is known before training."""
        super().__init__(arguments.output_dir, arguments.seed)
        self.arguments = arguments
        self.rows_from = vars(data) if isinstance(data, DataArguments) else {}
        given, self.missing = load_unfinished_classifier(arguments.model, dtype=torch.float32)
        if self.missing and isinstance(given, CostEffForSequenceClassification):
            load_classifier(arguments.model)  # says what is missing
        self.given = self._prepared(given)
        tokenizer = load_tokenizer(arguments.model)
        self.teacher = self._load_teacher(arguments.teacher, tokenizer)
        rows = prepare_data(
            data,
            tokenizer,
            teacher_config=None if self.missing else given.config,
            max_positions=longest_text(given.config),
        )
        self._take_rows(rows, tokenizer, arguments.metric)
        self.start = self._with_gates(given)
        if self.teacher is not None:
            check_same_labels(self.teacher.config, self.start.config)
        self._require_answers(self.teacher)
        self._check()

    def _with_gates(self, given: PreTrainedModel) -> CostEffForSequenceClassification:
        wanted = self.arguments
        torch.manual_seed(wanted.seed)
        gates = wanted.gates
        if isinstance(given, CostEffForSequenceClassification):
            for name in OF_NEW_EXITS:
                if getattr(wanted, name) is not None:
                    raise ValueError(
                        f"`{name}` is {getattr(wanted, name)!r}, and a multi-exit model keeps its exits. Leave it out."
                    )
            model = copy.deepcopy(given)  # the report is to measure the given one as it came
            gates = gates or model.config.skip_gates or "linear"
        else:
            if self.missing:
                self.data.label(given.config)
            model = convert_from_stock(
                given,
                exit_layers=wanted.exit_layers,
                exit_pooling=wanted.exit_pooling or "mean",
                exit_head=wanted.exit_head or "attention",
            )
            gates = gates or "attention"
        if gates == NO_GATES and model.config.skip_gates is not None:
            raise ValueError("`gates` is 'none', and the model has gates. Give one without, or leave `gates` out.")
        if gates in (NO_GATES, model.config.skip_gates):
            return model
        return add_skip_gates(model, gates)

    def _check(self) -> None:
        wanted, config = self.arguments, self.start.config
        self.trains_exits = wanted.exit_epochs > 0 and len(config.exit_layers) > 1
        if config.skip_gates is None and not self.trains_exits:
            raise ValueError(
                f"`gates` is 'none', `exit_epochs` is {wanted.exit_epochs:g} and exits are at {config.exit_layers}, so "
                "no row would save anything. Take gates, or train exits before the last."
            )
        has_exits = isinstance(self.given, CostEffForSequenceClassification)
        if not wanted.epochs and not (has_exits and config.skip_gates == self.given.config.skip_gates):
            raise ValueError(
                "`epochs` is 0, and the model as given lacks gates or exits, which would stay as they are drawn. Train "
                "for an epoch at least, or give a multi-exit model that has what is asked for."
            )
        if self.data.problem_type == REGRESSION and self.trains_exits and config.skip_gates is not None:
            raise ValueError(
                "Exits of a regression answer by patience, which looks back at exits that a row may have skipped. Set "
                "`exit_epochs` to 0, or `gates` to 'none'."
            )
        if self.trains_exits:
            check_goal(config, self.metric, **self._goals())
        self.trainings = self._stage_trainings()
        for arguments in self.trainings.values():
            check_skip_settings(arguments, config)

    def _goals(self) -> dict[str, Any]:
        found = {name: getattr(self.arguments, name) for name in GOALS}
        return found if any(goal is not None for goal in found.values()) else {**found, "max_metric_drop": 0.5}

    def _stage_trainings(self) -> dict[str, CostEffTrainingArguments]:
        """What every stage trains with, in order.

        Of the backbone the checkpoint that skips and answers best is kept; with a target, among those near it.
        """
        wanted, config = self.arguments, self.start.config
        found = {
            BACKBONE: self._stage_training(
                BACKBONE,
                Phase(wanted.epochs, wanted.learning_rate),
                best_by=self.metric if wanted.target_layers is None else f"{self.metric}_on_target",
                trained_parts=BACKBONE,
                skip_weight=0.0 if config.skip_gates is None else wanted.skip_weight,
                target_layers=wanted.target_layers,
                hard_gate_ratio=wanted.hard_gate_ratio,
                contrastive_weight=wanted.contrastive_weight,
                contrastive_temperature=wanted.contrastive_temperature,
            )
        }
        if self.trains_exits:
            contrast = wanted.exit_contrastive_weight
            if contrast is None:  # between token states of two exits or more
                contrast = 0.05 if config.exit_head == "attention" and len(config.exit_layers) > 2 else 0.0
            stage = f"{EXITS}-{settings_key(wanted, OF_EXITS)}"
            found[stage] = self._stage_training(
                stage,
                Phase(wanted.exit_epochs, wanted.exit_learning_rate),
                trained_parts=EXITS,
                exit_contrastive_weight=contrast,
                exit_contrastive_temperature=wanted.exit_contrastive_temperature,
            )
        return found

    def _stage_training(
        self, stage: str, phase: Phase, best_by: str | None = None, **settings: Any
    ) -> CostEffTrainingArguments:
        return self._training_arguments(
            CostEffTrainingArguments,
            stage,
            phase,
            batch_size=self.arguments.batch_size,
            best_by=best_by,
            representation_weight=0.0,  # a layer that is skipped cannot be like the teacher's
            **settings,
        )

    def run(self) -> LayerSkippingResult:
        """Go through the stages that are not done yet, then calibrate and report."""
        self._label_calibration(self.teacher)
        stages = [Stage.of_model(name, partial(self._train, name)) for name in self.trainings]
        settings = settings_of_run(
            self.arguments, self.data, self.given, self.teacher, without=(*GOALS, *OF_EXITS), fresh=self.missing
        )
        self._go_through(stages, settings)
        return self._report(stages)

    def _train(self, stage: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        model = self._prepared(self.start) if stage == BACKBONE else self._load(BACKBONE)
        arguments = self.trainings[stage]
        if not arguments.max_steps:
            return model, {"steps": 0}
        return self._train_multi_exit(model, arguments, self.teacher)

    # The report

    def _contenders(self, model: PreTrainedModel, settings: ExitConfig | None) -> list[Contender]:
        def records(asked: PreTrainedModel, name: str, **options: Any) -> ExitLogits:
            description = f"Validating {name}"
            return collect_exit_logits(asked, self.data.validation, self.collator, description=description, **options)

        found = []
        if not self.missing:
            found.append(Contender("model as given", self.given, records(self.given, "the given model")))
        gated = model.config.skip_gates is not None
        own = records(model, "the model")
        if gated:
            whole = records(model, "all layers", skip_layers=False)
            found.append(Contender("all layers", model, whole, skip_layers=False))
        found.append(Contender("skipping" if gated else "all layers", model, own))
        if settings is not None:
            found.append(Contender("skipping and early exit" if gated else "early exit", model, own, settings))
        return found

    def _exits_fit(self) -> bool:
        """Whether the exits have learnt on the encoder as it now is: here, or before if it has not moved since."""
        given_with_exits = isinstance(self.given, CostEffForSequenceClassification)
        return self.trains_exits or (given_with_exits and not self.trainings[BACKBONE].max_steps)

    def _report(self, stages: list[Stage]) -> LayerSkippingResult:
        folder, model = self.output_dir, self._load(stages[-1].name)
        for each in (model, self.given):
            each.set_attn_implementation("sdpa")
        settings = None
        if self.trains_exits:
            settings = calibrate(
                model,
                self.calibration,
                self.collator,
                metric=self.metric,
                fit_temperatures=False,
                trained_keys=self.train_keys,
                **self._goals(),
            )
        contenders = self._contenders(model, settings)
        records = contenders[-1].records
        skipping = diagnose_skipping(records, model.config)
        rows = report_rows(contenders, self.data.validation, self.collator, self.data.problem_type)
        result = LayerSkippingResult(folder, rows, self.metric, skipping, self.arguments.target_layers)
        curve, outcomes = [], []
        if settings is not None:
            curve = exit_curve(records, model.config, self.metric)
            outcomes = class_outcomes(ExitReplay(records, model.config), settings)
        facts = {
            "metric": self.metric,
            "rows": [dataclasses.asdict(row) for row in rows],
            "curve": [dataclasses.asdict(point) for point in curve],
            "skipping": None if skipping is None else dataclasses.asdict(skipping),
            "target_layers": result.target_layers,
            "exits_trained": self._exits_fit(),
            "exit_config": None if settings is None else settings.to_dict(),
            "classes": [dataclasses.asdict(outcome) for outcome in outcomes],
            **self._facts(stages, {**self.rows_from, **vars(self.arguments)}),
        }
        model.save_pretrained(folder)  # not before the figures beside it can be written too
        self.tokenizer.save_pretrained(folder)
        (folder / SKIPPING).write_text(json.dumps(facts, indent=1))
        (folder / "SUMMARY.md").write_text(f"# What came out\n\n{result.summary()}\n")
        draw_pareto_chart(folder / "pareto.png", rows, curve, self.metric)
        if skipping is not None:
            draw_skip_chart(folder / "skipping.png", skipping)
        write_model_card(folder, folder.resolve().name)
        return result
