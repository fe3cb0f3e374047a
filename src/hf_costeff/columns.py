"""Which columns hold the texts and the labels, and what the labels mean to the model.

What is wrong with a column is said here, with the split and the row named, and how rows are counted.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig

from .exit_criteria import MULTI_LABEL, REGRESSION, SINGLE_LABEL

logger = logging.getLogger(__name__)

COUNTING = "Rows count from 0, without header and blank lines."
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
TEXT_NAMES = ("text", "sentence", "content", "review", "document", "comment", "tweet", "utterance", "body", "query")
LABEL_NAMES = (
    *("label", "labels", "target", "targets", "class", "intent", "category", "sentiment", "emotion", "stars"),
    *("rating", "score", "topic"),
)


@dataclass(frozen=True)
class Columns:
    """The columns that matter: one text column or the two of a pair, and the label column (`None`: unlabelled)."""

    text: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class LabelInfo:
    """How the label column becomes the model's labels.

    Args:
        problem_type: As in Transformers: single_label_classification, multi_label_classification or regression.
        label_names: Name of every model label, in the model's order; `None` if nobody gave names.
        num_labels: Size of the model's output; 1 for regression.
        mapping: Label in the data -> index in the model; `None` for regression and 0/1 lists.
    """

    problem_type: str
    label_names: list[str] | None
    num_labels: int
    mapping: dict[Any, int] | None

    def encode(self, values: Iterable[Any], split: str = "train") -> list[Any]:
        """The labels as the model wants them: ints, floats (regression) or lists of `num_labels` floats (multi-label).

        Raises:
            ValueError: A missing, NaN, negative, unknown or out-of-range label; the message names split and row.
        """
        one = {SINGLE_LABEL: self._index, MULTI_LABEL: self._multi_hot, REGRESSION: _number}[self.problem_type]
        encoded = []
        for row, value in enumerate(values):
            try:
                encoded.append(one(value))
            except _BadLabel as error:
                raise ValueError(
                    f"The label of row {row} in split '{split}' is {value!r}: {error} Correct or remove it. {COUNTING}"
                ) from None
        return encoded

    def _index(self, value: Any) -> int:
        mapping = self.mapping or {}
        if not isinstance(value, str):
            value = _number(value)
            if value < 0:
                raise _BadLabel("labels count from 0; negative ones mark rows without an answer.")
        elif not value.strip():
            raise _BadLabel("the label is missing.")
        index = mapping.get(value, mapping.get(_plain(value)))
        if index is None:
            names = f" ({', '.join(self.label_names)})" if self.label_names else ""
            raise _BadLabel(f"the labels are 0..{self.num_labels - 1}{names}, by the teacher or the training rows.")
        return index

    def _multi_hot(self, value: Any) -> list[float]:
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise _BadLabel("a list was expected, as in the other rows.")
        if self.mapping is not None:
            present = {self._index(item) for item in value}
            return [float(index in present) for index in range(self.num_labels)]
        numbers = [_number(item) for item in value]
        if len(numbers) != self.num_labels or not all(0 <= number <= 1 for number in numbers):
            raise _BadLabel(f"{self.num_labels} numbers in 0..1 were expected, one per label.")
        return numbers


class _BadLabel(Exception):
    """What is wrong with one label; `LabelInfo.encode` adds the place."""


def find_columns(
    dataset: Dataset, text_columns: Sequence[str] | None = None, label_column: str | None = None
) -> Columns:
    """The text and label columns, as named or found by the usual names (case does not matter for the latter).

    Pairs are looked for before single texts. A lone string column is the text whatever its name. No label column is
    no error: unlabelled text can be learned from a teacher's soft labels.

    Raises:
        ValueError: A named column is not there, or none of the usual text columns is; the message lists what is.
    """
    existing = dataset.column_names
    for flag, name in [*(("text_columns", text) for text in text_columns or ()), ("label_column", label_column)]:
        if name is not None and name not in existing:
            raise ValueError(f"`{flag}` names {name!r}, but the columns are: {', '.join(existing)}. Name one of them.")
    by_name = {name.lower(): name for name in reversed(existing)}
    label = label_column or next(
        (by_name[name] for name in LABEL_NAMES if name in by_name and by_name[name] not in (text_columns or ())), None
    )
    text = tuple(text_columns or ())
    if not text:
        by_name = {lower: name for lower, name in by_name.items() if name != label}
        candidates = [*TEXT_PAIRS, *((name,) for name in TEXT_NAMES)]
        text = next((tuple(by_name[n] for n in names) for names in candidates if set(names) <= set(by_name)), ())
    if not text:
        strings = tuple(name for name in existing if is_string(dataset.features[name]) and name != label)
        text = strings if len(strings) == 1 else ()
    if not text:
        raise ValueError(
            f"No text column was found among: {', '.join(existing)}. Name it, or the two of a pair, with "
            "`text_columns` (usual names such as text, sentence, sentence1 + sentence2 are found by themselves)."
        )
    return Columns(text, label)


def resolve_labels(dataset: Dataset, columns: Columns, teacher_config: PreTrainedConfig | None = None) -> LabelInfo:
    """The problem type, the labels in the model's order, and how the data's labels map to them.

    The teacher decides where it has a say: its number of labels, and its names unless they are LABEL_0, LABEL_1, ...
    Class names of the dataset that are the same set in another order are matched by name, others by index with a
    warning. Text labels are matched by name, or sorted where the teacher has no names. Lists are multi-label; floats
    are regression, unless the teacher has several labels.

    Args:
        dataset: The rows whose labels are looked at, normally train.
        columns: From `find_columns`. Without a label column, everything comes from the teacher.
        teacher_config: Configuration of a teacher *with* a classification head; `None` if there is none.

    Raises:
        ValueError: Teacher and data disagree on number or kind of labels, every label is missing, or there are
            neither labels nor a teacher.
    """
    count, teacher_names, teacher_type = _teacher_labels(teacher_config)
    if columns.label is None or columns.label not in dataset.column_names:
        if count is None or teacher_type is None:
            raise ValueError(
                f"No label column was found among: {', '.join(dataset.column_names)}; and there is no teacher to give "
                "soft labels. Name the column with `label_column`, or give a teacher with a classification head."
            )
        mapping = None if teacher_type == REGRESSION else {index: index for index in range(count)}
        return LabelInfo(teacher_type, teacher_names, count, mapping)
    found = _describe_labels(dataset, columns.label, count)
    explicit = getattr(teacher_config, "problem_type", None)
    if explicit not in (None, found.kind) or (count is not None and (found.kind == REGRESSION) != (count == 1)):
        raise ValueError(
            f"The teacher has num_labels = {count} and does {teacher_type}, but column '{columns.label}' (e.g. "
            f"{found.example!r}) is data for {found.kind}. Use a teacher trained for it or another `label_column`."
        )
    if found.kind == REGRESSION:
        return LabelInfo(REGRESSION, teacher_names, 1, None)
    free = found.textual and teacher_names  # text labels are looked up in the teacher's names, row by row
    if count is not None and (found.names or found.multi_hot) and found.count != count and not free:
        names = f" ({', '.join(found.names[:20])})" if found.names else ""
        raise ValueError(
            f"The teacher has num_labels = {count}, but column '{columns.label}' has {found.count} labels{names}. "
            "Use a teacher fine-tuned on these labels, or the dataset (or `label_column`) that it was fine-tuned on."
        )
    if count is not None and teacher_names is None and found.textual:
        logger.warning(
            "The teacher does not name its labels, so the words of the data are numbered in alphabetical order: %s. "
            "If it was trained with another order, set its id2label first.",
            ", ".join(f"{index} = {name}" for index, name in enumerate(found.names or [])),
        )
    mapping = None if found.multi_hot else _label_mapping(found, teacher_names, count or found.count)
    return LabelInfo(found.kind, teacher_names or found.names, count or found.count, mapping)


def encode_labels(dataset: Dataset, columns: Columns, labels: LabelInfo, split: str = "train") -> Dataset:
    """The text columns and, if the split has the label column, `labels` in the model's order (int64 or float32).

    Raises:
        ValueError: A missing column, a text that is missing or no string, a bad label; with split and row.
    """
    check_texts(dataset, columns, split)
    result = dataset.select_columns(list(columns.text))
    if columns.label is None or columns.label not in dataset.column_names:
        return result
    feature = {
        SINGLE_LABEL: datasets.Value("int64"),
        MULTI_LABEL: datasets.List(datasets.Value("float32")),
        REGRESSION: datasets.Value("float32"),
    }[labels.problem_type]
    return result.add_column("labels", labels.encode(dataset[columns.label], split), feature=feature)


def check_texts(dataset: Dataset, columns: Columns, split: str | None = None) -> None:
    """Nothing, if every text is a string.

    Raises:
        ValueError: A text column is missing, or a text is missing or no string; with split (if named) and row.
    """
    place = f" of split '{split}'" if split else ""
    for name in columns.text:
        if name not in dataset.column_names:
            raise ValueError(
                f"Text column {name!r} is missing{place}; its columns are: {', '.join(dataset.column_names)}. Rename "
                "one there, or name a column that every split has with `text_columns`."
            )
        for row, text in enumerate(dataset[name]):
            if not isinstance(text, str):
                raise ValueError(
                    f"The text in column {name!r}, row {row}{place} is {text!r}. Texts must be strings: remove the "
                    f"row, write an empty string, or name another column with `text_columns`. {COUNTING}"
                )


def is_string(feature: Any) -> bool:
    """Whether a column of this `datasets` feature holds plain strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


@dataclass(frozen=True)
class _FoundLabels:
    """What a label column shows: the kind of problem, class names if any, the number of labels, and an example."""

    kind: str
    names: list[str] | None
    count: int
    textual: bool
    multi_hot: bool
    example: Any


def _describe_labels(dataset: Dataset, column: str, teacher_count: int | None) -> _FoundLabels:
    feature: Any = dataset.features[column]
    values = [value for value in dataset[column] if value is not None]
    is_list = bool(values) and isinstance(values[0], list)
    leaves = [leaf for value in values for leaf in value] if is_list else values
    leaves = [leaf for leaf in leaves if leaf is not None and leaf == leaf]
    if not leaves:
        raise ValueError(f"Column '{column}' has no labels at all. Name another `label_column`, or remove the column.")
    inner = feature.feature if is_list else feature
    names = list(inner.names) if isinstance(inner, datasets.ClassLabel) else None
    textual, floating = isinstance(leaves[0], str), isinstance(leaves[0], float)
    if textual:
        names = sorted({leaf for leaf in leaves if leaf.strip()}, key=_natural)
    numbers = not textual and names is None
    lengths = {len(value) for value in values} if is_list else set()
    multi_hot = is_list and numbers and (floating or (len(lengths) == 1 and set(leaves) <= {0, 1}))
    multi_hot = multi_hot and (floating or teacher_count is None or lengths == {teacher_count}) and max(lengths) > 1
    if is_list:
        kind = MULTI_LABEL
    else:
        fractional = floating and any(leaf != int(leaf) for leaf in leaves if math.isfinite(leaf))
        one_number = fractional or (floating and teacher_count is None) or (numbers and teacher_count == 1)
        kind = REGRESSION if one_number else SINGLE_LABEL
    if names is not None:
        count = len(names)
    else:
        count = max(lengths) if multi_hot else 1 if kind == REGRESSION else max(1, int(max(leaves)) + 1)
    return _FoundLabels(kind, names, count, textual, multi_hot, values[0])


def _teacher_labels(config: PreTrainedConfig | None) -> tuple[int | None, list[str] | None, str | None]:
    """Number of labels, names (`None` if they are LABEL_0, ...) and problem type; all `None` without a teacher."""
    if config is None:
        return None, None, None
    id2label = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    names = [id2label[index] for index in sorted(id2label)]
    default = REGRESSION if config.num_labels == 1 else SINGLE_LABEL
    generic = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return config.num_labels, None if generic else names, config.problem_type or default


def _label_mapping(found: _FoundLabels, teacher_names: list[str] | None, num_labels: int) -> dict[Any, int]:
    """Label in the data -> index in the model. Text labels are also listed in plain form (no case)."""
    identity = {index: index for index in range(num_labels)}
    if found.names is None:
        return identity
    indices = {name: index for index, name in enumerate(teacher_names or found.names)}
    plain = {_plain(name): index for name, index in indices.items()}
    if found.textual:
        return {**plain, **indices}
    if teacher_names is None:
        return identity
    if sorted(plain) == sorted(_plain(name) for name in found.names):
        return {index: plain[_plain(name)] for index, name in enumerate(found.names)}
    logger.warning(
        "The teacher's labels (%s) and the dataset's (%s) have different names and are matched by index.",
        *(", ".join(teacher_names), ", ".join(found.names)),
    )
    return identity


def _plain(name: Any) -> Any:
    return name.strip().casefold() if isinstance(name, str) else name


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which 10 comes after 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _number(value: Any) -> float:
    if value is None or value != value:
        raise _BadLabel("the label is missing.")
    if not isinstance(value, (int, float)) or math.isinf(value):
        raise _BadLabel("a finite number was expected.")
    return float(value)
