"""How a stage of the recipe trains and scores: precision, training arguments, importance against a teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from .exit_criteria import answers
from .losses import importance_loss
from .modeling_costeff import CostEffForSequenceClassification
from .recipes import Phase
from .teacher import Teacher

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def bf16_pays(device: torch.device) -> bool:
    """Whether mixed precision is native: bf16 instructions on a CPU, or a GPU that has it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def prepared(model: PreTrainedModel, device: torch.device, bf16: bool) -> PreTrainedModel:
    """The model on its device, with the attention that is fastest there."""
    if bf16 and device.type == "cpu":
        model.set_attn_implementation("eager")  # measured: bf16 sdpa is slow on CPUs
    return model.to(device)


def training_arguments(
    kind: type[Arguments],
    output_dir: str,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    device: torch.device,
    bf16: bool,
    seed: int,
    **extra: Any,
) -> Arguments:
    """What all training of a recipe has in common: warm-up over a tenth, weight decay, rows grouped by length.

    Args:
        kind: Class of the arguments.
        output_dir: For checkpoints.
        steps: Optimizer steps.
        learning_rate: Peak of the linear schedule.
        batch_size: Rows per optimizer step, over all devices.
        device: Where it trains.
        bf16: Whether in mixed precision.
        seed: Of order, dropout and new weights.
        **extra: Further arguments of the class.
    """
    return kind(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=max(1, batch_size // max(1, torch.cuda.device_count())),
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=seed,
        logging_steps=max(1, steps // 10),
        report_to="none",
        **extra,
    )


def stage_arguments(
    kind: type[Arguments],
    output_dir: str,
    phase: Phase,
    rows: int,
    *,
    batch_size: int,
    best_by: str | None = None,
    **common: Any,
) -> Arguments:
    """[`training_arguments`] of a stage that goes on after a kill: some five checkpoints, the best kept if asked for.

    Args:
        kind: Class of the arguments.
        output_dir: For checkpoints.
        phase: Steps and learning rate.
        rows: Training rows.
        batch_size: Rows per optimizer step, over all devices.
        best_by: Metric by which a checkpoint is chosen, the larger the better; `None` keeps the last.
        **common: The rest of [`training_arguments`].
    """
    steps = phase.steps(rows, batch_size)
    every = max(50, -(-steps // 5))
    return training_arguments(
        kind,
        output_dir,
        steps=steps,
        learning_rate=phase.learning_rate,
        batch_size=batch_size,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        eval_strategy="steps" if best_by else "no",
        eval_steps=every if best_by else None,
        load_best_model_at_end=best_by is not None,
        metric_for_best_model=best_by,
        greater_is_better=None if best_by is None else True,
        **common,
    )


class ProgressOnStderr(ProgressCallback):
    """Upstream's progress bar, with the logs on the standard error too, where the bar is."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write the logs above the bar."""
        with redirect_stdout(sys.stderr):
            super().on_log(*args, **kwargs)


def log_to_stderr(trainer: Trainer) -> None:
    """Keep the standard output for results: logs go above the bar, and nowhere where there is none.

    A notebook's table stays as it is.
    """
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressOnStderr())


def random_batches(
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    rows: int | None,
    batch_size: int,
    device: torch.device,
    seed: int,
    description: str,
) -> Iterator[dict[str, Tensor]]:
    """Batches of randomly chosen rows, each at most once, under a progress bar.

    Args:
        dataset: Tokenised rows.
        collator: Pads rows to a batch.
        rows: How many at most; `None` for all.
        batch_size: Rows per batch.
        device: Where the batches go.
        seed: Of the choice.
        description: Of the progress bar.
    """
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:rows]
    for start in tqdm(range(0, len(chosen), batch_size), desc=description, leave=False):
        batch = collator([dataset[int(row)] for row in chosen[start : start + batch_size]])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def importance_against(
    teacher: Teacher,
    problem_type: str,
    *,
    device: torch.device,
    bf16: bool,
    exits: slice = slice(None),
    gradient_equilibrium: bool | None = None,
) -> Callable[[CostEffForSequenceClassification, dict[str, Tensor]], Tensor]:
    """The loss that importance is scored by; rows without labels are scored on the teacher's answers.

    Args:
        teacher: Whose exits and hidden states are to be kept.
        problem_type: As upstream's `config.problem_type`.
        device: Where the model is.
        bf16: Whether in mixed precision.
        exits: Which exits count; all of them make the score exit-aware.
        gradient_equilibrium: Overrides the config's; `False` for a ranking across layers.

    Returns:
        (model, batch) -> scalar, for [`compute_importance`].
    """

    def loss(model: CostEffForSequenceClassification, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            signals = teacher.signals(inputs, hidden_states=True)
            outputs = model(**inputs, output_hidden_states=True, gradient_equilibrium=gradient_equilibrium)
        labels = batch.get("labels")
        return importance_loss(
            outputs.exit_logits[exits],
            signals.exit_logits[exits],
            outputs.hidden_states,
            signals.hidden_states,
            answers(signals.exit_logits[-1], problem_type) if labels is None else labels,
            inputs.get("attention_mask"),
            problem_type,
        )

    return loss
