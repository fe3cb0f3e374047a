"""Offline prediction: any number of texts through a model, fast, in order and in constant memory.

Texts are read in windows. A window is sorted by length and cut into batches; rows that have not left at an exit wait
there until enough have come as far to make a full batch, so deep layers run as full as the first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .columns import find_columns
from .conversion import longest_text
from .data import encode_texts, make_collator, resolve_max_length
from .exit_criteria import ExitConfig
from .exiting_rows import ExitPlan, LeavingRows, RunningRows
from .modeling_cascade import CostEffCascade, CostEffCascadePrediction, run_cascade
from .modeling_costeff import (
    MODEL_INPUTS,
    CostEffForSequenceClassification,
    CostEffModel,
    CostEffPrediction,
    inference,
)

logger = logging.getLogger(__name__)

Text = tuple[str, ...]
"""One text, or the two of a pair."""
Item = TypeVar("Item")
LARGE_BLOCK = 31 << 20
"""Bytes; just below the largest block, 32 MB, that glibc learns from."""


def predict_texts(
    model: CostEffForSequenceClassification | CostEffCascade,
    tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase],
    rows: Iterable[Any],
    *,
    early_exit: bool | float | ExitConfig | None = None,
    skip_layers: bool | None = None,
    top_k: int | None = None,
    text_columns: Sequence[str] | None = None,
    batch_size: int = 32,
    window: int = 2048,
    max_length: int | None = None,
    show_progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Answers to any number of texts, one after the other, in the order of the rows.

    A row's answer is that of `predict`, whatever its neighbours. Memory depends on `window`, not on the number of rows.

    Args:
        model: A multi-exit classifier, or a cascade; it runs where it is.
        tokenizer: Its tokenizer; of a cascade whose members have their own, one per member.
        rows: A list, a `datasets.Dataset`, a generator, ...: of strings, of pairs of strings, or of dicts.
        early_exit: As for `predict`.
        skip_layers: As for `predict`; not for a cascade.
        top_k: How many labels to name, best first; more than there are means all. `None` names the best alone.
        text_columns: Key of the text in a dict, or the two of a pair; `None` finds them by the usual names.
        batch_size: Rows that run together.
        window: Rows that are read, sorted and answered together. A larger one pads less and runs deep layers fuller;
            answers come later and take more memory.
        max_length: Tokens per row, longer rows are cut; `None`: what the model can take.
        show_progress: Whether to show a progress bar.

    Returns:
        An iterator of dicts, with `label`, `score` (its probability, after the exit's temperature; for regression the
        value) and `exit_layer` (the layer after which the row left, from 1), of a cascade also `exit_model` (the member
        that answered, from 1; the layer is the one within it). Where layers may be skipped, `layers_run` says how many
        of those up to the exit were not. With `top_k` there are `labels` and `scores`, two lists,
        instead of the first two.

    Raises:
        ValueError: For an argument out of range, at once. Later, after every row before it was answered, for a row
            that is no text or could not be read; or if the model's logits are not finite. The message names the row,
            counted from 0.
        TypeError: If `rows` is one text or a mapping.
    """
    for name, value in (("batch_size", batch_size), ("window", window), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}. It must be at least 1.")
    if text_columns is not None and len(text_columns) not in (1, 2):
        raise ValueError(f"`text_columns` is {text_columns}. It must name one column, or two for text pairs.")
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(
            f"`rows` is a {type(rows).__name__}. Pass texts in a list, one split of a dataset, a generator."
        )
    keep_freed_memory()
    if isinstance(model, CostEffCascade):
        if skip_layers is not None:
            raise ValueError(f"`skip_layers` is {skip_layers}, and no member of a cascade has gates. Leave it out.")
        readers = _member_readers(model, tokenizer, text_columns, max_length, batch_size)
        return _cascade_answers(model, readers, model.exit_plan(early_exit), rows, top_k, window, show_progress)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` is a {type(tokenizer).__name__}. A single model has a single tokenizer.")
    max_length = resolve_max_length(tokenizer, max_length, model.config.longest_text)
    reader = TextReader(tokenizer, text_columns, max_length, batch_size)
    plan = model.costeff.exit_plan(early_exit, skip_layers)
    return _answers(model, reader, plan, rows, top_k, window, show_progress)


def _answers(
    model: CostEffForSequenceClassification,
    reader: TextReader,
    plan: ExitPlan,
    rows: Iterable[Any],
    top_k: int | None,
    window: int,
    show_progress: bool,
) -> Iterator[dict[str, Any]]:
    total = len(rows) if isinstance(rows, Sized) else None
    with tqdm(desc="Predicting", total=total, unit=" rows", disable=not show_progress) as bar:
        for batches in reader.windows(rows, window):
            waiting = WaitingRows(model.costeff, plan, reader.batch_size)
            left = []
            with inference(model):  # never held while the caller has the turn
                for leaving in waiting.run(batches):
                    left.append(leaving)
                    bar.update(len(leaving))
            prediction = model.costeff.answer(left, plan)
            yield from _named(prediction, model.config.id2label, top_k)


def _member_readers(
    cascade: CostEffCascade,
    tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase],
    text_columns: Sequence[str] | None,
    max_length: int | None,
    batch_size: int,
) -> list[TextReader]:
    """One reader per member; with a tokenizer of all, it cuts texts to what the shortest of them takes."""
    longest = [longest_text(member) for member in cascade.config.members]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizers, longest = [tokenizer] * len(longest), [min(longest)] * len(longest)
    else:
        tokenizers = list(tokenizer)
    expected = 1 if cascade.config.member_tokenizers is None else len(longest)
    if len(tokenizers) != len(longest) or (isinstance(tokenizer, PreTrainedTokenizerBase) and expected > 1):
        raise ValueError(
            f"The cascade has {expected} tokenizer{'s' * (expected > 1)} for {len(longest)} members. Pass "
            f"{'one per member, in their order' if expected > 1 else 'that one'}, as load_cascade returns it."
        )
    return [
        TextReader(reads, text_columns, resolve_max_length(reads, max_length, positions), batch_size)
        for reads, positions in zip(tokenizers, longest, strict=True)
    ]


def _cascade_answers(
    cascade: CostEffCascade,
    readers: list[TextReader],
    plan: ExitPlan,
    rows: Iterable[Any],
    top_k: int | None,
    window: int,
    show_progress: bool,
) -> Iterator[dict[str, Any]]:
    total, count = len(rows) if isinstance(rows, Sized) else None, 0
    with tqdm(desc="Predicting", total=total, unit=" rows", disable=not show_progress) as bar:
        for texts in chunked(readers[0].texts(rows), window):
            prediction = answer_texts(cascade, readers, plan, texts)
            count += len(texts)
            bar.update(len(texts))
            yield from _named(prediction, cascade.config.id2label, top_k)
    max(readers, key=lambda reader: reader.cut_rows).warn_of_cuts(count)


def answer_texts(
    cascade: CostEffCascade, readers: Sequence[TextReader], plan: ExitPlan, texts: Sequence[Text]
) -> CostEffCascadePrediction:
    """What a cascade says of texts: each member reads, with its own tokenizer, what those before it left over.

    Args:
        cascade: Runs where it is.
        readers: One per member.
        plan: From `cascade.exit_plan`.
        texts: At least one.
    """

    def ask(member: int, rows: list[int]) -> tuple[Tensor, Tensor]:
        numbers, logits, layers = [], [], []
        for positions, inputs in readers[member - 1].batches([texts[row] for row in rows]):
            on_device = {name: tensor.to(cascade.device) for name, tensor in inputs.items()}
            found, exit_layer = cascade.ask_member(member, on_device, full_depth=plan.criterion is None)
            numbers += positions
            logits.append(found)
            layers.append(exit_layer)
        order = torch.tensor(numbers).argsort().to(cascade.device)
        return torch.cat(logits)[order], torch.cat(layers)[order]

    with inference(cascade):
        return run_cascade(plan, len(cascade.members), len(texts), ask)


def _named(prediction: CostEffPrediction, names: dict[int, str], top_k: int | None) -> Iterator[dict[str, Any]]:
    chances = prediction["probabilities"].float()
    best = chances.topk(min(top_k or 1, chances.shape[-1]), dim=-1)
    where = {name: prediction[name].tolist() for name in ("exit_model", "exit_layer") if name in prediction}
    if "skipped_layers" in prediction:
        where["layers_run"] = (prediction["exit_layer"] - prediction["skipped_layers"].sum(1)).tolist()
    for row, (scores, labels) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        found = [names[label] for label in labels]
        named = {"label": found[0], "score": scores[0]} if top_k is None else {"labels": found, "scores": scores}
        yield {**named, **{name: numbers[row] for name, numbers in where.items()}}


class WaitingRows:
    """The rows on their way through a model, which wait at each stop until a full batch has come as far."""

    def __init__(self, model: CostEffModel, plan: ExitPlan, batch_size: int) -> None:
        """Start with nobody.

        Args:
            model: Runs the rows.
            plan: Where they stop, and who may leave.
            batch_size: Rows of a full batch.
        """
        self.model = model
        self.plan = plan
        self.batch_size = batch_size
        self.groups: dict[int, list[RunningRows]] = {depth: [] for depth in (0, *plan.stops[:-1])}

    def run(self, batches: Iterable[tuple[list[int], Mapping[str, Tensor]]]) -> Iterator[LeavingRows]:
        """All batches to the end; yields rows as they leave, in no order.

        Args:
            batches: Numbers of the rows, and what the model takes: `input_ids`, `attention_mask` and, if the tokenizer
                makes them, `token_type_ids`, shape (batch, seq) each.
        """
        for numbers, inputs in batches:
            on_device = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            self.groups[0].append(self.model.enter(**on_device, numbers=numbers))
            yield from self._advance(fewest=self.batch_size)
        yield from self._advance(fewest=1)

    def _advance(self, fewest: int) -> Iterator[LeavingRows]:
        """Run every batch of at least `fewest` rows; shallow stops first, since they feed the deep ones."""
        for groups in self.groups.values():
            while sum(map(len, groups)) >= fewest:
                leaving, staying = self.model.advance(self._next_batch(groups), self.plan)
                if staying is not None:
                    self.groups[staying.depth].append(staying)
                if leaving is not None:
                    yield leaving

    def _next_batch(self, groups: list[RunningRows]) -> RunningRows:
        """A full batch of those who wait longest, or all if they are fewer; taken out of `groups`."""
        chosen: list[RunningRows] = []
        room = self.batch_size
        while groups and room:
            group = groups.pop(0)
            if len(group) > room:
                groups.insert(0, group.select(range(room, len(group))))
                group = group.select(range(room))
            chosen.append(group)
            room -= len(group)
        return RunningRows.merge(chosen)


@dataclass
class TextReader:
    """Reads rows of texts and makes batches of them.

    Args:
        tokenizer: Of the model.
        text_columns: Key of the text in a dict, or the two of a pair; `None` finds them in the first row.
        max_length: Tokens per row; longer rows are cut, with a warning at the end.
        batch_size: Rows per batch.
    """

    tokenizer: PreTrainedTokenizerBase
    text_columns: Sequence[str] | None
    max_length: int
    batch_size: int
    cut_rows: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        make_collator(self.tokenizer)  # refuses a tokenizer without padding, or with padding on the left
        values = (self.tokenizer.pad_token_id, 0, self.tokenizer.pad_token_type_id)
        self.padding = dict(zip(MODEL_INPUTS, values, strict=True))

    def windows(self, rows: Iterable[Any], size: int) -> Iterator[Iterator[tuple[list[int], dict[str, Tensor]]]]:
        """The rows' batches, window by window.

        Args:
            rows: Strings, pairs or dicts.
            size: Rows per window.

        Yields:
            For every window its batches, longest rows first: numbers of the rows, and tensors of shape (batch, seq).

        Raises:
            ValueError: For a row that is no text or cannot be read, after the window of the rows before it.
        """
        start = 0
        for window in chunked(self.texts(rows), size):
            yield self.batches(window, start)
            start += len(window)
        self.warn_of_cuts(start)

    def warn_of_cuts(self, rows: int) -> None:
        """Say how many of these rows were cut, if any was."""
        if self.cut_rows:
            logger.warning("%d of %d rows had more than %d tokens and were cut.", self.cut_rows, rows, self.max_length)

    def batches(self, window: Sequence[Text], start: int = 0) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of these texts, longest first: numbers of the rows, from `start`, and tensors, shape (batch, seq)."""
        encoded, cut = encode_texts(self.tokenizer, list(zip(*window, strict=True)), self.max_length)
        self.cut_rows += cut
        names = [name for name in MODEL_INPUTS if name in encoded]
        if "token_type_ids" in names and not any(map(any, encoded["token_type_ids"])):
            names.remove("token_type_ids")  # the model's default
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            yield (
                [start + row for row in chosen],
                {name: padded([encoded[name][row] for row in chosen], self.padding[name]) for name in names},
            )

    def texts(self, rows: Iterable[Any]) -> Iterator[Text]:
        """The text or pair of every row; whatever is wrong is a ValueError that names the row."""
        if isinstance(rows, Dataset):  # other columns need not be decoded
            self.text_columns = find_columns(rows, self.text_columns).text
            rows = rows.select_columns(list(self.text_columns))
        iterator, count = iter(rows), 0
        width: int | None = None
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # a caller's generator raises what it likes
                raise ValueError(
                    f"Row {count} could not be read: {type(error).__name__}: {error}. All rows before it were answered."
                ) from error
            text = self._text(row)
            if not text or not all(isinstance(part, str) for part in text) or len(text) != (width or len(text)):
                expected = {None: "a string, a pair of strings or a dict of them", 1: "one text", 2: "a pair of texts"}
                raise ValueError(
                    f"Row {count} is {_shown(row)}. It must be {expected[width]}"
                    f"{', as the rows before it' if width else ''}. All rows before it were answered: repair or remove "
                    "this one."
                )
            yield text
            count, width = count + 1, len(text)

    def _text(self, row: Any) -> tuple[Any, ...]:
        if isinstance(row, Mapping):
            if self.text_columns is None:
                self.text_columns = find_columns(Dataset.from_list([dict(row)])).text
            return tuple(row.get(name) for name in self.text_columns)
        if isinstance(row, (tuple, list)):
            return tuple(row) if len(row) == 2 else ()
        return (row,)


def keep_freed_memory() -> None:
    """Make the C library keep some 60 MB that tensors gave back, instead of returning them to the system every time.

    Batches of changing sizes otherwise return and fetch the same pages again and again, which a slim model feels. Under
    glibc, freeing one large block raises the limits up to which freed memory is kept (mallopt(3), `M_MMAP_THRESHOLD`);
    the block itself is never touched and takes no memory. Elsewhere nothing happens.
    """
    torch.empty(LARGE_BLOCK, dtype=torch.uint8)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of numbers as one tensor, shape (rows, longest), short rows continued with `value`.

    `DataCollatorWithPadding` does the same in many times the time, which a slim model feels.

    >>> padded([[1, 2], [3]], 0)
    tensor([[1, 2],
            [3, 0]])
    """
    longest = max(map(len, rows))
    return torch.from_numpy(np.array([[*row, *[value] * (longest - len(row))] for row in rows], dtype=np.int64))


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` items; if reading fails, those before the failure come first.

    >>> list(chunked("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while True:
        chunk: list[Item] = []
        try:
            for item in islice(iterator, size):
                chunk.append(item)
        except Exception:
            if chunk:
                yield chunk
            raise
        if not chunk:
            return
        yield chunk


def _shown(value: Any, longest: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
