"""Multi-exit training: upstream's Trainer with the joint exit-aware distillation loss, by hooks only."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, HubStrategy
from transformers.utils import logging

from .augmentation import replace_tokens
from .checksums import is_whole, write_checksums
from .configuration_costeff import CostEffConfig, problem_type_of
from .difficulty import HARD, check_hard_rows, difficulty_part
from .efficiency import count_parameters, relative_layer_flops
from .exit_criteria import MULTI_LABEL, REGRESSION
from .hub import CARD, is_written_by_hand, push_folder
from .losses import representation_loss, soft_label_loss, task_loss, weighted_sum
from .metrics import LOWER_IS_BETTER
from .metrics import compute_metrics as default_metrics
from .model_card import TrainingCard, describe_losses
from .modeling_costeff import CostEffForSequenceClassification
from .regularizer import Regularizer
from .skip_gates import is_skipped
from .skip_training import (
    LEARNING_EXITS,
    ContrastiveHeads,
    SkipIncentive,
    check_skip_settings,
    frozen,
    frozen_modules,
)
from .teacher import Teacher
from .training_args import ALL, EXITS, CostEffTrainingArguments

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """Upstream's Trainer with checksums in its checkpoints, so that a damaged one is noticed and passed over.

    Parts of the loss that a subclass records are logged by name.
    """

    loss_columns: tuple[str, ...] = ()
    """Columns that the loss reads and the model does not; upstream would drop them."""
    _signature_columns: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._logged_parts: dict[str, Tensor] = {}
        self._logged_steps = 0

    def _record(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self._logged_parts[name] = self._logged_parts.get(name, 0) + part.detach()
        self._logged_steps += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Upstream's log, with the mean of every loss part since the last one."""
        if "loss" in logs and self._logged_steps:
            for name, total in self._logged_parts.items():
                mean = self.accelerator.gather(total / self._logged_steps).mean()
                logs[name] = round(mean.item(), 4)
            self._logged_parts, self._logged_steps = {}, 0
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*(self._signature_columns or ()), *self.loss_columns])]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As upstream's; `True` resumes from the newest whole checkpoint, or starts afresh."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir, self.args.load_best_model_at_end)
            if resume_from_checkpoint is not None:
                logger.warning(f"Going on from {resume_from_checkpoint}.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if folder.is_dir():  # rotation may have removed it already
                write_checksums(folder)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_world_process_zero() and not is_whole(Path(best)):
            raise ValueError(
                f"The best checkpoint {best} is damaged. Train again with resume_from_checkpoint=True: it goes on from "
                "a checkpoint that does not need this one, or starts afresh."
            )
        super()._load_best_model()


class TeacherTrainer(ResumableTrainer):
    """Fine-tunes a stock classifier, to be a teacher, on true labels alone.

    Upstream's own loss of a stock classifier grows with the accumulation steps and the number of processes; this one is
    the mean over the rows of a step, however they are spread.

    Args:
        model: A stock classifier.
        args: Upstream's `TrainingArguments`.
        class_weights: Weight of each class; `None` weighs all alike.
        **kwargs: Everything else upstream's `Trainer` takes.

    Raises:
        ValueError: If `class_weights` or label smoothing do not go with the kind of problem.
    """

    loss_is_scaled_for_ga = False  # a mean over its batch

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        class_weights: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, compute_metrics=self._metrics, **kwargs)
        self.problem_type = problem_type_of(model.config)
        self.class_weights = class_weights
        check_class_settings(
            self.problem_type, model.config.num_labels, class_weights, self.args.label_smoothing_factor
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss on the true labels, and the model's outputs if asked for."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=labels.device)
        loss = task_loss([outputs.logits], labels, self.problem_type, weights, self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def _metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        return default_metrics(evaluation.predictions, evaluation.label_ids, self.problem_type)


class CostEffTrainer(ResumableTrainer):
    """Trains all exits at once, on true labels, a teacher's soft labels and a teacher's hidden states.

    The teacher is a plain attribute: frozen, in evaluation mode, never in a checkpoint. With one, rows need no labels.
    Every loss part (`task_loss`, `soft_label_loss`, `representation_loss`, `difficulty_loss`, `skip_loss`,
    `contrastive_loss`, `exit_contrastive_loss`) is logged by name, and every exit's metrics as
    `eval_exit_<layer>_<metric>`, with `eval_mean_exit_<metric>` over all exits (COST-EFF's criterion for the checkpoint
    to keep) and `eval_<metric>` for the last.

    A model with skip gates is trained with soft, then with hard weights, and evaluated as it will predict: `layers_run`
    is what a row runs on average at full depth, and `eval_<metric>` thus the metric with skipping alone. With
    `target_layers` there are also `layers_run_by_flops`, which counts each layer by its FLOPs, and
    `eval_<metric>_on_target`, to keep a checkpoint by: the metric less a point for every hundredth of the depth beyond
    the target and a twentieth.

    Checkpoints carry checksums: `train(resume_from_checkpoint=True)` takes the newest one that is whole.

    Args:
        model: A [`CostEffForSequenceClassification`].
        args: [`CostEffTrainingArguments`].
        teacher: A stock classifier or another multi-exit model with the same labels and tokenizer; `None` trains on
            true labels alone.
        compute_metrics: As upstream's, called once per exit; `None` uses this package's metrics for the problem type.
        regularizer: Acts on the weights around every optimizer step: a [`hf_costeff.block_training.BlockPenalty`], or
            [`hf_costeff.block_training.MaskedTraining`]; `None` for nothing.
        **kwargs: Everything else upstream's `Trainer` takes.

    Raises:
        ValueError: If teacher and student disagree in labels, or in hidden width while representations are trained; if
            tokens are to be replaced without a teacher or a tokenizer, or beside true labels; or if `class_weights` or
            label smoothing do not go with the kind of problem.
    """

    loss_is_scaled_for_ga = False  # every part is a mean over its batch
    loss_columns = (HARD,)

    def __init__(
        self,
        model: CostEffForSequenceClassification,
        args: CostEffTrainingArguments,
        *,
        teacher: PreTrainedModel | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        regularizer: Regularizer | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, CostEffTrainingArguments):
            raise TypeError(f"`args` is {type(args).__name__}. CostEffTrainer needs CostEffTrainingArguments.")
        if getattr(model, "config", None) is None or model.config.model_type != CostEffConfig.model_type:
            raise TypeError(
                f"`model` is {type(model).__name__}, not a multi-exit model. Convert it: convert_from_stock(model)."
            )
        if args.push_to_hub and args.hub_strategy != HubStrategy.END:
            logger.warning("Pushes while training would carry pickles, so `hub_strategy` is set to 'end'.")
            args.hub_strategy = HubStrategy.END
        super().__init__(model, args, compute_metrics=self._metrics_of_every_exit, **kwargs)
        config = self.model.config
        self.metrics_of_one_exit = compute_metrics or self._default_metrics
        self.loss_weights = {"task_loss": args.task_weight if args.task_weight is not None else float(teacher is None)}
        self.teacher: Teacher | None = None
        if teacher is not None:
            remembers = not args.token_replacement_rate  # else a row is another one in every step
            self.teacher = Teacher(teacher.to(args.device), config, args.soft_label_exit, remembers)
            self.loss_weights["soft_label_loss"] = args.soft_label_weight
            self.loss_weights["representation_loss"] = args.representation_weight
            if args.representation_weight and not self.teacher.same_width:
                raise ValueError(
                    f"The teacher's hidden size is {teacher.config.hidden_size} and the student's is "
                    f"{config.hidden_size}: their representations cannot be compared. Set representation_weight=0, "
                    "or use a teacher of equal width."
                )
        check_class_settings(
            config.resolved_problem_type, config.num_labels, args.class_weights, args.label_smoothing_factor
        )
        if args.token_replacement_rate:
            self._check_token_replacement()
        if args.difficulty_weight:
            check_hard_rows(self.train_dataset, config.resolved_problem_type)
            self.loss_weights["difficulty_loss"] = args.difficulty_weight
        check_skip_settings(args, config)
        self.contrast, self.incentive = ContrastiveHeads(args, config), SkipIncentive(args, config)
        self.loss_weights |= self.contrast.weights | self.incentive.weights
        self.regularizers = [self.contrast, self.incentive, *([regularizer] if regularizer else [])]
        for each in self.regularizers:
            self.add_callback(each)

    def _check_token_replacement(self) -> None:
        if self.teacher is None or self.loss_weights["task_loss"]:
            raise ValueError(
                "A text with replaced tokens has no true label. Set `token_replacement_rate` to 0, or pass `teacher=` "
                "and leave `task_weight` at 0."
            )
        if self.processing_class is None:
            raise ValueError(
                "`token_replacement_rate` needs to know the special tokens. Pass the tokenizer: `processing_class=`."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As [`ResumableTrainer.train`]; exit settings saved in the model are dropped, being those of other weights."""
        if self.model.config.exit_config is not None:
            logger.warning(
                "Training changes the weights: the model's saved exit settings are dropped. Calibrate again."
            )
            self.model.config.exit_config = None
        with frozen(frozen_modules(self.model, self.args.trained_parts)):
            return super().train(resume_from_checkpoint, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Upstream's, with the projections of the contrasts."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        for group in self.contrast.parameter_groups(self.args.weight_decay) if is_new else ():
            optimizer.add_param_group(group)
        return optimizer

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save and push the model with its tokenizer and card; no pickles, unlike upstream's.

        The card tells the last evaluation, exit by exit. One that you have written, in the folder or on the Hub, stays.

        Args:
            commit_message: First line of the commit.
            blocking: Whether to wait until all has arrived; if not, do so with `result()` of what is returned.
            token: Access token; `None` takes that of the arguments, then the one you are logged in with.
            revision: Branch; `None` takes that of the arguments, then `main`.
            private: Whether a new repository is private; `None` takes that of the arguments.
            **kwargs: For the card, as upstream's: `license`, `language`, `tags`, `finetuned_from`, `dataset`; what else
                upstream would write into its own is ignored.

        Returns:
            The commit, or with `blocking=False` a future of it; `None` in a process that does not save.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        repo_id = self.args.hub_model_id or folder.resolve().name
        token = self.args.hub_token if token is None else token
        revision = revision or self.args.hub_revision
        tags = [kwargs["tags"]] if isinstance(kwargs.get("tags"), str) else kwargs.get("tags")
        if not is_written_by_hand(folder / CARD):
            self._card(repo_id, kwargs).save(folder / CARD)
        push = partial(
            push_folder,
            folder,
            repo_id,
            commit_message=commit_message,
            private=self.args.hub_private_repo if private is None else private,
            token=token,
            revision=revision,
            tags=tags,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def _card(self, repo_id: str, stated: dict[str, Any]) -> ModelCard:
        evaluations = [entry for entry in self.state.log_history if any(key.startswith("eval_exit_") for key in entry)]
        weights, budget = self.loss_weights, ""
        if self.args.target_layers is not None:
            weights = {name: weight for name, weight in weights.items() if name != "skip_loss"}
            budget = f"; an incentive to skip, adapted to {self.args.target_layers:g} layers per row"
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        training = (
            f"{self.state.global_step:,} steps in batches of {rows:,}, "
            f"learning rate {self.args.learning_rate:g}, seed {self.args.seed}; losses of every exit: "
            f"{describe_losses(weights)}{budget}."
        )
        datasets = [stated["dataset"]] if isinstance(stated.get("dataset"), str) else stated.get("dataset")
        return TrainingCard(
            name=repo_id,
            config=self.model.config,
            parameters=count_parameters(self.model),
            evaluation=evaluations[-1] if evaluations else {},
            training=training,
            teacher=None if self.teacher is None else self.teacher.model.name_or_path,
            metadata={
                **{key: stated.get(key) for key in ("license", "language")},
                "base_model": stated.get("finetuned_from"),
                "datasets": datasets,
            },
        ).render()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the loss parts, and the model's outputs if asked for."""
        labels, hard = inputs.pop("labels", None), inputs.pop(HARD, None)
        if model.training and self.args.token_replacement_rate:
            special_ids = self.processing_class.all_special_ids
            inputs["input_ids"] = replace_tokens(inputs["input_ids"], special_ids, self.args.token_replacement_rate)
        imitates = self.loss_weights.get("representation_loss", 0) > 0
        wants_states = imitates or (model.training and "contrastive_loss" in self.loss_weights)
        options = self._training_options() if model.training else {}
        outputs = model(**inputs, output_hidden_states=wants_states, **options)
        exit_logits = outputs.exit_logits[LEARNING_EXITS[self.args.trained_parts]]
        parts = self._loss_parts(outputs, exit_logits, inputs, labels, imitates)
        parts |= difficulty_part(model, exit_logits, hard, self.model.config.resolved_problem_type, self.args)
        if model.training:
            parts |= self.contrast.parts(outputs, inputs.get("attention_mask")) | self.incentive.parts(outputs)
            self._record(parts)
        loss = weighted_sum(parts, self._weights_now(parts))
        return (loss, outputs) if return_outputs else loss

    def _training_options(self) -> dict[str, Any]:
        """How the model runs in this step, and no dropout where nothing learns: exits see what they will see later."""
        for module in frozen_modules(self.model, self.args.trained_parts):
            module.eval()
        options: dict[str, Any] = {}
        if self.args.trained_parts != ALL:
            options["gradient_equilibrium"] = False
        if self.model.config.skip_gates is not None:
            hard_from = (1 - self.args.hard_gate_ratio) * self.state.max_steps
            options["hard_gates"] = self.args.trained_parts == EXITS or self.state.global_step >= hard_from
        if "exit_contrastive_loss" in self.loss_weights:
            options["output_exit_states"] = True
        return options

    def _loss_parts(
        self,
        outputs: Any,
        exit_logits: tuple[Tensor, ...],
        inputs: dict[str, Any],
        labels: Tensor | None,
        imitates: bool,
    ) -> dict[str, Tensor]:
        problem_type = self.model.config.resolved_problem_type
        parts = {}
        if labels is not None and self.loss_weights["task_loss"]:
            weights = self.args.class_weights
            class_weights = None if weights is None else torch.tensor(weights, device=labels.device)
            parts["task_loss"] = task_loss(
                exit_logits, labels, problem_type, class_weights, self.args.label_smoothing_factor
            )
        if self.teacher is not None:
            with self.accelerator.autocast():
                signals = self.teacher.signals(inputs, imitates)
            targets = signals.exit_logits[LEARNING_EXITS[self.args.trained_parts]]
            parts["soft_label_loss"] = soft_label_loss(exit_logits, targets, problem_type, self.args.temperature)
            if imitates:
                parts["representation_loss"] = representation_loss(
                    outputs.hidden_states, signals.hidden_states, inputs.get("attention_mask")
                )
        if not parts:
            raise ValueError(
                "Nothing to learn from: the rows have no `labels` and there is no teacher. Add a label column, or pass "
                "`teacher=` to learn from unlabelled text."
            )
        return parts

    def _weights_now(self, parts: dict[str, Tensor]) -> dict[str, float]:
        alone_until = self.args.representation_only_ratio * self.state.max_steps
        if self.model.training and "representation_loss" in parts and self.state.global_step < alone_until:
            return {name: self.loss_weights[name] * (name == "representation_loss") for name in parts}
        return {**self.loss_weights, "skip_loss": self.incentive.weight}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`ResumableTrainer.log`], with what the regularizers say."""
        if "loss" in logs and self._logged_steps:
            for regularizer in self.regularizers:
                logs |= regularizer.logs()
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for regularizer in self.regularizers if self.args.should_save else ():
            regularizer.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            for regularizer in self.regularizers:
                regularizer.load(checkpoint)  # first, for they say more clearly what does not fit
        super()._load_optimizer_and_scheduler(checkpoint)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Upstream's loop with every exit's logits gathered for the metrics; predictions are the last exit's."""
        kwargs["ignore_keys"] = [*(kwargs.get("ignore_keys") or []), "hidden_states", "attentions", "exit_states"]
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        predictions = output.predictions
        return output._replace(predictions=predictions[0] if isinstance(predictions, tuple) else predictions)

    def _metrics_of_every_exit(self, evaluation: EvalPrediction) -> dict[str, float]:
        _, exit_logits, *skipping = evaluation.predictions
        by_exit = [self.metrics_of_one_exit(EvalPrediction(logits, evaluation.label_ids)) for logits in exit_logits]
        named = dict(by_exit[-1])
        for name in by_exit[-1]:
            named[f"mean_exit_{name}"] = sum(metrics[name] for metrics in by_exit) / len(by_exit)
            for layer, metrics in zip(self.model.config.exit_layers, by_exit, strict=True):
                named[f"exit_{layer}_{name}"] = metrics[name]
        if skipping:
            named |= self._skip_metrics(by_exit[-1], torch.tensor(np.stack(skipping[0], axis=1)))
        return named

    def _skip_metrics(self, metrics: dict[str, float], chances: Tensor) -> dict[str, float]:
        """Layers run by probabilities of skipping, shape (rows, layers), and metrics of the last exit on the target."""
        config, target = self.model.config, self.args.target_layers
        shares = (~is_skipped(chances, config.skip_threshold)).float().mean(dim=0)
        found = {"layers_run": float(shares.sum())}
        if target is not None:
            by_flops = float(shares @ torch.tensor(relative_layer_flops(config)))
            beyond = max(0.0, (by_flops - target) / config.num_hidden_layers - 0.05)
            found["layers_run_by_flops"] = by_flops
            for name, value in metrics.items():
                found[f"{name}_on_target"] = value + beyond if name in LOWER_IS_BETTER else value - beyond
        return found

    def _default_metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        return default_metrics(evaluation.predictions, evaluation.label_ids, self.model.config.resolved_problem_type)


def check_class_settings(
    problem_type: str, num_labels: int, class_weights: list[float] | None, label_smoothing: float
) -> None:
    """Refuse settings of classes that the task loss cannot use or would ignore.

    Args:
        problem_type: As upstream's `config.problem_type`.
        num_labels: Of the model.
        class_weights: Weight of each class, or of each positive label; `None` weighs all alike.
        label_smoothing: As upstream's `label_smoothing_factor`.

    Raises:
        ValueError: Naming the setting and what it needs.
    """
    if class_weights is not None and problem_type == REGRESSION:
        raise ValueError(f"`class_weights` is {class_weights}, and regression has no classes. Leave it out.")
    if class_weights is not None and len(class_weights) != num_labels:
        raise ValueError(
            f"`class_weights` has {len(class_weights)} entries for {num_labels} labels. Give one each, or leave it out."
        )
    if label_smoothing and problem_type in (REGRESSION, MULTI_LABEL):
        raise ValueError(
            f"`label_smoothing_factor` is {label_smoothing}, and spreads one right label over the others; this is "
            f"{problem_type}. Set it to 0."
        )


def newest_whole_checkpoint(output_dir: str | Path, with_best: bool = False) -> str | None:
    """The newest undamaged `checkpoint-<step>` in a folder, or `None`; broken ones are named in a warning.

    Args:
        output_dir: The trainer's folder.
        with_best: Whether the best checkpoint so far has to be whole too, because it is loaded at the end.
    """
    folders = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    for folder in sorted(folders, key=lambda path: -int(path.name.split("-")[-1])):
        if not is_whole(folder):
            logger.warning(f"Checkpoint {folder} is incomplete or damaged; falling back to the one before it.")
        elif with_best and not is_whole(best := _best_beside(folder)):
            logger.warning(
                f"Checkpoint {folder} needs {best.name}, which is damaged; falling back to the one before it."
            )
        else:
            return str(folder)
    return None


def _best_beside(checkpoint: Path) -> Path:
    """The best checkpoint when this one was written; itself if none was told apart."""
    best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
    return checkpoint if best is None else checkpoint.parent / Path(best).name
