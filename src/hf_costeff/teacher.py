"""What a student learns from a frozen classifier: its answers and its hidden states, aligned to the student's depth."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_costeff import CostEffConfig, label_names

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class TeacherSignals:
    """What a student is to imitate, aligned to its own exits and layers.

    Args:
        exit_logits: One tensor per student exit, shape (batch, labels).
        hidden_states: Embedding output and one tensor per student layer, shape (batch, seq, hidden); may be empty.
    """

    exit_logits: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...]


def check_same_labels(other: PreTrainedConfig, config: PreTrainedConfig, role: str = "teacher") -> None:
    """Refuse a classifier whose answers mean other labels than the model's.

    Args:
        other: Config of a stock classifier or a multi-exit model.
        config: The model's.
        role: What the classifier is to the model, for the message.

    Raises:
        ValueError: If the numbers of labels differ, or both have names and these differ.
    """
    if other.num_labels != config.num_labels:
        raise ValueError(
            f"The {role} has {other.num_labels} labels and the model {config.num_labels}. Take one with the model's "
            "labels."
        )
    names = label_names(other), label_names(config)
    if None not in names and names[0] != names[1]:
        raise ValueError(
            f"The {role} has the labels {list(other.id2label.values())} and the model "
            f"{list(config.id2label.values())}. Its answers are taken by their order, so give both the same "
            "`id2label`."
        )


class Teacher:
    """A frozen classifier and how its layers and exits map onto a student's.

    Student layer l of L answers to teacher layer round(l * T / L) of T, so equal depths match layer to layer, and so do
    exits. With `soft_label_exit` `"last"` the teacher's last exit teaches every exit of the student; a stock classifier
    has no other.

    Args:
        model: The classifier, which is frozen.
        student: Config of who learns from it.
        soft_label_exit: As in [`CostEffTrainingArguments`].
        remembers: Whether answers to rows are kept, so that a row seen again is not run again. Takes the logits of all
            its exits and some 700 bytes a row; of no use where rows change from step to step. Hidden states are never
            kept.

    Raises:
        ValueError: If it cannot teach, see [`check_same_labels`].
    """

    def __init__(
        self, model: PreTrainedModel, student: CostEffConfig, soft_label_exit: str = "same", remembers: bool = False
    ) -> None:
        check_same_labels(model.config, student)
        self.model = model.requires_grad_(False).eval()
        self.accepted = set(inspect.signature(model.forward).parameters)
        depth, width = model.config.num_hidden_layers, model.config.hidden_size
        self.same_width = width == student.hidden_size
        self.hidden_indices = [
            round(layer * depth / student.num_hidden_layers) for layer in range(student.num_hidden_layers + 1)
        ]
        exits = model.config.exit_layers if isinstance(model.config, CostEffConfig) else [depth]
        self.exit_indices = [
            next(index for index, layer in enumerate(exits) if layer >= self.hidden_indices[student_exit])
            for student_exit in student.exit_layers
        ]
        if soft_label_exit == "last":
            self.exit_indices = [len(exits) - 1] * len(student.exit_layers)
        self._remembers = remembers
        self._answers: dict[bytes, Tensor] = {}

    def signals(self, inputs: dict[str, Any], hidden_states: bool) -> TeacherSignals:
        """Run the teacher without gradients on inputs that may hold more than it takes."""
        known = {name: value for name, value in inputs.items() if name in self.accepted}
        remembered = self._remembers and not hidden_states
        exits, states = self._remembered(known) if remembered else self._run(known, hidden_states)
        return TeacherSignals(tuple(exits[index] for index in self.exit_indices), states)

    @torch.no_grad()
    def _run(self, inputs: dict[str, Any], hidden_states: bool = False) -> tuple[Tensors, Tensors]:
        """Logits of all exits, and hidden states for the student's layers."""
        outputs = self.model(**inputs, output_hidden_states=hidden_states, return_dict=True)
        exits = outputs.exit_logits if "exit_logits" in outputs else (outputs.logits,)
        return exits, tuple(outputs.hidden_states[index] for index in self.hidden_indices) if hidden_states else ()

    def _remembered(self, inputs: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """As [`_run`] without hidden states; the teacher runs on those rows alone that it has not met."""
        keys = token_keys(inputs)
        if new := [row for row, key in enumerate(keys) if key not in self._answers]:
            exits, _ = self._run({name: value[new] for name, value in inputs.items()})
            answers = torch.stack(exits, dim=1).unbind(0)
            self._answers |= zip((keys[row] for row in new), answers, strict=True)
        return torch.stack([self._answers[key] for key in keys]).unbind(1), ()


def token_keys(inputs: dict[str, Tensor]) -> list[bytes]:
    """One short key per row, by its real tokens: padding makes no other row of it.

    Args:
        inputs: Tensors of shape (batch, seq, ...), with or without `attention_mask`.
    """
    arrays = {name: value.cpu().numpy() for name, value in inputs.items()}
    mask = arrays.pop("attention_mask", None)
    rows = len(next(iter(arrays.values())))
    real = [slice(None)] * rows if mask is None else mask.astype(bool)
    return [
        hashlib.blake2b(b"".join(each[row][real[row]].tobytes() for each in arrays.values()), digest_size=16).digest()
        for row in range(rows)
    ]
