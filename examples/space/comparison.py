"""What the Space computes and shows: answers and times of a slim model beside its teacher. No web framework in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_costeff import CostEffForSequenceClassification, ExitConfig
from hf_costeff.calibration import choose_exit_config, describe_seen
from hf_costeff.checkpoints import load_classifier, load_tokenizer
from hf_costeff.data import make_collator, prepare_split
from hf_costeff.efficiency import measure_alternating
from hf_costeff.evaluation import Contender, collect_exit_logits
from hf_costeff.exit_criteria import SINGLE_LABEL, probabilities
from hf_costeff.exit_replay import ExitLogits

MAX_TEXTS = 50
TEACHER, FULL, EARLY = "teacher", "slim, all layers", "slim, at this budget"


@dataclass(frozen=True)
class Answer:
    """What both models say of one text; `by_exit` is the slim model's confidence at every exit, shallow first."""

    text: str
    label: str
    confidence: float
    exit_layer: int
    by_exit: list[float]
    teacher_label: str
    teacher_confidence: float


@dataclass(frozen=True)
class Comparison:
    """Answers to some texts under one budget; `ms_per_text` by contender, measured on these very texts."""

    answers: list[Answer]
    settings: ExitConfig
    ms_per_text: dict[str, float]


class SideBySide:
    """A slim model, its teacher, and held-out rows on which a budget is turned into exit settings."""

    def __init__(
        self,
        slim: CostEffForSequenceClassification,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: ExitLogits,
    ) -> None:
        """Take loaded models; `records` are the slim model's logits on the held-out rows, with labels."""
        if slim.config.resolved_problem_type != SINGLE_LABEL:
            raise ValueError(f"The Space shows one label per text; this model is {slim.config.resolved_problem_type}.")
        if teacher.config.id2label != slim.config.id2label:
            raise ValueError(
                f"The teacher's labels are {teacher.config.id2label}, the slim model's {slim.config.id2label}. Name "
                "the teacher it was made from."
            )
        self.slim, self.teacher, self.tokenizer, self.records = slim.eval(), teacher.eval(), tokenizer, records
        self.exit_layers, self.depth = slim.config.exit_layers, slim.config.num_hidden_layers

    @classmethod
    def load(cls, slim: str, teacher: str, rows: str | Dataset) -> SideBySide:
        """From folders or Hub ids, and rows in a file (csv, tsv, json, jsonl, parquet) or a data set."""
        student, master = (load_classifier(name).float() for name in (slim, teacher))
        tokenizer = load_tokenizer(slim)
        if not isinstance(student, CostEffForSequenceClassification):
            raise ValueError(f"{slim} is a {student.config.model_type} model without exits. Compress it first.")
        held_out = prepare_split(
            rows, "train", tokenizer, config=student.config, max_positions=student.config.longest_text
        )
        records = collect_exit_logits(student, held_out, make_collator(tokenizer), description="Held-out rows")
        return cls(student, master, tokenizer, records)

    def settings(self, budget: float) -> ExitConfig:
        """Exit settings that cost at most `budget` points of accuracy on the held-out rows, against all layers."""
        return choose_exit_config(self.records, self.slim.config, "accuracy", max_accuracy_drop=budget)

    def compare(self, texts: Sequence[str], budget: float, repeats: int = 5) -> Comparison:
        """Answers of both models at a budget, and the median time of `repeats` calls in turn."""
        settings = self.settings(budget)
        limit = self.slim.config.longest_text
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=limit)
        contenders = {
            TEACHER: Contender(TEACHER, self.teacher, self.records),
            FULL: Contender(FULL, self.slim, self.records),
            EARLY: Contender(EARLY, self.slim, self.records, settings),
        }
        calls = {name: partial(contender.answer, batch) for name, contender in contenders.items()}
        times = measure_alternating(calls, warmup=1, repeats=repeats)
        said = probabilities(calls[TEACHER]().logits, SINGLE_LABEL)
        early = calls[EARLY]()
        by_exit = self._confidence_of_every_exit(batch, settings)
        names = self.slim.config.id2label
        answers = [
            Answer(
                text=text,
                label=names[int(chances.argmax())],
                confidence=float(chances.max()),
                exit_layer=int(layer),
                by_exit=confidences.tolist(),
                teacher_label=names[int(others.argmax())],
                teacher_confidence=float(others.max()),
            )
            for text, chances, layer, confidences, others in zip(
                texts, early.probabilities, early.exit_layer, by_exit, said, strict=True
            )
        ]
        return Comparison(answers, settings, {name: time.median_ms / len(texts) for name, time in times.items()})

    def _confidence_of_every_exit(self, batch: dict[str, torch.Tensor], settings: ExitConfig) -> torch.Tensor:
        """Largest probability at every exit, at its temperature, shape (texts, exits)."""
        with torch.inference_mode():
            exits = self.slim(**batch).exit_logits
        criterion = settings.build_criterion(len(exits), SINGLE_LABEL)
        scaled = [criterion.scaled(logits, index) for index, logits in enumerate(exits)]
        return torch.stack([probabilities(logits, SINGLE_LABEL).amax(-1) for logits in scaled], dim=1)


def read_texts(typed: str) -> list[str]:
    """One text per line, blank lines left out.

    Raises:
        ValueError: If there is none, or more than `MAX_TEXTS`.
    """
    texts = [line.strip() for line in typed.splitlines() if line.strip()]
    if not texts:
        raise ValueError("Type a text, or paste several, one per line.")
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"These are {len(texts)} texts. Give at most {MAX_TEXTS} at once.")
    return texts


def render(comparison: Comparison, exit_layers: Sequence[int]) -> str:
    """The result as HTML; texts and label names are escaped, whatever they hold."""
    cards = "".join(_card(answer, exit_layers) for answer in comparison.answers)
    seen = escape(describe_seen(comparison.settings.calibration or {}))
    return f'<div class="costeff">{_times(comparison)}<p class="note">{seen}</p>{cards}</div>'


def _times(comparison: Comparison) -> str:
    base = comparison.ms_per_text[TEACHER]
    rows = "".join(
        f"<tr><th scope='row'>{name}</th><td>{ms:.2f} ms</td><td>{base / ms:.1f}x</td></tr>"
        for name, ms in comparison.ms_per_text.items()
    )
    layers = [answer.exit_layer for answer in comparison.answers]
    agree = sum(answer.label == answer.teacher_label for answer in comparison.answers)
    return (
        "<table><thead><tr><th></th><th scope='col'>per text</th><th scope='col'>faster by</th></tr></thead>"
        f"<tbody>{rows}</tbody></table><p class='sum'>Mean exit layer {sum(layers) / len(layers):.2f}; "
        f"{agree} of {len(layers)} answers as the teacher's. Times are medians of calls in turn, all texts in one "
        "batch, on this machine just now.</p>"
    )


def _card(answer: Answer, exit_layers: Sequence[int]) -> str:
    depth = exit_layers[-1]
    bars = "".join(
        _bar(layer, confidence, answer.exit_layer)
        for layer, confidence in zip(exit_layers, answer.by_exit, strict=True)
    )
    said = "Teacher" if answer.label == answer.teacher_label else "<em>Teacher differs</em>"
    return (
        f"<section><p class='text'>{escape(answer.text)}</p>"
        f"<p><b>{escape(answer.label)}</b> {answer.confidence:.0%}, after layer {answer.exit_layer} of {depth}. "
        f"{said}: {escape(answer.teacher_label)} {answer.teacher_confidence:.0%}</p>"
        f"<div class='chart'>{bars}</div></section>"
    )


def _bar(layer: int, confidence: float, exit_layer: int) -> str:
    state = "ran" if layer < exit_layer else "left" if layer == exit_layer else "saved"
    said = {"ran": "", "left": ": answer", "saved": ": not run"}[state]
    return (
        f"<div class='exit {state}'><span>layer {layer}{said}</span>"
        f"<i><b style='width:{confidence:.1%}'></b></i><span>{confidence:.0%}</span></div>"
    )
