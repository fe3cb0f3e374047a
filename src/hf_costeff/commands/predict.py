"""`hf-costeff predict`: answers to every row of a file or of the standard input."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.csv import CSVWriter
from pyarrow.parquet import ParquetWriter

from ..data import FILE_READERS, SplitArguments, open_dataset
from ..modeling_cascade import CostEffCascade
from ..prediction import chunked, predict_texts
from .command import Command, load_slim

logger = logging.getLogger(__name__)

Writer = Callable[[list[dict[str, Any]]], Any]
TEXT_ENDING = ".txt"
CHUNK = 1024
"""Answers that are written together."""
CLOSED_PIPE = 141
"""Exit status of a program whose reader has gone, as shells count it (128 + SIGPIPE)."""


@dataclass
class PredictionArguments:
    """Which texts, and what to do with the answers.

    Raises:
        ValueError: For an ending that is not known, or a setting that is none.
    """

    model: str = field(metadata={"help": "A multi-exit model: a local folder or a Hub id."})
    file: str | None = field(
        default=None,
        metadata={
            "help": f"Rows in {', '.join(name[1:] for name in FILE_READERS)}, or txt with one text per line. Default: "
            "standard input, one JSON string or object per line."
        },
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Where the answers go: csv, jsonl or parquet. Default: standard output, as jsonl."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "The text column, or the two of a pair. Default: found by the usual names."}
    )
    early_exit: str | None = field(
        default=None,
        metadata={
            "help": "true: the saved exit settings; false: full depth; a number: threshold on the normalised entropy. "
            "Default: the saved settings, or full depth if there are none."
        },
    )
    skip_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Whether rows skip the layers that the model's gates say; false runs every layer. Default: if "
            "there are gates."
        },
    )
    top_k: int | None = field(default=None, metadata={"help": "Labels to name, best first. Default: the best alone."})
    batch_size: int = field(default=32, metadata={"help": "Rows that run together."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per row, longer rows are cut. Default: what the model can take."}
    )
    device: str = field(default="cpu", metadata={"help": "Where the model runs, e.g. cuda."})

    def __post_init__(self) -> None:
        if self.output is not None and Path(self.output).suffix.lower() not in WRITERS:
            raise ValueError(f"`output` is {self.output!r}. Known endings are {', '.join(WRITERS)}.")
        if (
            self.file is not None
            and self.output is not None
            and Path(self.file).resolve() == Path(self.output).resolve()
        ):
            raise ValueError(f"`output` is {self.output!r}, the file that is read. Name another one.")
        if self.top_k is not None and Path(self.output or "").suffix.lower() == ".csv":
            raise ValueError(f"`output` is {self.output!r}, and csv holds no lists. Leave `top_k` out, or use jsonl.")
        self.exit_choice()

    def exit_choice(self) -> bool | float | None:
        """`early_exit` as `predict` takes it."""
        words = {None: None, "true": True, "false": False}
        word = self.early_exit and self.early_exit.lower()
        if word in words:
            return words[word]
        try:
            return float(word or "")
        except ValueError:
            raise ValueError(f"`early_exit` is {self.early_exit!r}. Give true, false or a number.") from None


def run(wanted: PredictionArguments) -> str:
    """Answer every row and write the answers as they come; returns what to print."""
    return answer_all(wanted, load_slim)


def answer_all(wanted: PredictionArguments, load: Callable[[str], tuple[Any, Any]]) -> str:
    """Answer every row with the model that `load` makes of its name, and say what was done.

    Args:
        wanted: Texts and settings.
        load: Name -> model and tokenizer, as `predict_texts` takes them.
    """
    rows = read_lines(_standard_input()) if wanted.file is None else read_file(wanted.file)
    model, tokenizer = load(wanted.model)
    is_cascade = isinstance(model, CostEffCascade)
    try:
        model.to(wanted.device)
    except (RuntimeError, AssertionError) as error:  # torch has no one error for a device that is not there
        raise ValueError(f"`device` is {wanted.device!r}, which cannot be used here: {error}") from error
    answers = predict_texts(
        model,
        tokenizer,
        rows,
        early_exit=wanted.exit_choice(),
        skip_layers=wanted.skip_layers,
        top_k=wanted.top_k,
        text_columns=wanted.text_columns,
        batch_size=wanted.batch_size,
        max_length=wanted.max_length,
        show_progress=sys.stderr.isatty(),
    )
    if wanted.output is None:
        last = write_lines(answers)
        if not last:
            logger.warning("Nothing to answer: there are no rows in %s.", wanted.file or "the standard input")
        return last
    done, depths, unit = 0, 0, "exit_model" if is_cascade else "exit_layer"
    where = ["exit_model"] * is_cascade + ["exit_layer"]
    if not is_cascade and model.costeff.exit_plan(wanted.exit_choice(), wanted.skip_layers).skips:
        where.append("layers_run")
    with WRITERS[Path(wanted.output).suffix.lower()](wanted.output, schema(wanted.top_k, where)) as write:
        try:
            for chunk in chunked(answers, CHUNK):
                write(chunk)
                done, depths = done + len(chunk), depths + sum(answer[unit] for answer in chunk)
        except ValueError as error:
            raise ValueError(f"{error} {done} answers are in {wanted.output}.") from error
    most = len(model.members) if is_cascade else model.config.num_hidden_layers
    named = unit.replace("_", " ")
    return f"{done} answers are in {wanted.output}. Mean {named}: {depths / max(1, done):.2f} of {most}."


def read_file(path: str) -> Iterable[Any]:
    """The rows of a file: the lines of a txt file, or a `datasets.Dataset`."""
    if Path(path).suffix.lower() == TEXT_ENDING:
        return (line.rstrip("\r\n") for line in open(path, encoding="utf-8"))
    return open_dataset(SplitArguments(validation_file=path))["validation"]


def _standard_input() -> Iterable[str]:
    if sys.stdin.isatty():
        logger.warning("Waiting for rows: one JSON string or object per line; Ctrl-D ends them.")
    return sys.stdin


def read_lines(lines: Iterable[str]) -> Iterator[Any]:
    """What the lines hold as JSON; blank lines are skipped.

    Raises:
        ValueError: A line is no JSON.

    >>> list(read_lines(['"a text"', "", '{"text": "another"}']))
    ['a text', {'text': 'another'}]
    """
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"the line {line.strip()!r:.80} is no JSON ({error}). Write a text in quotation marks or as "
                '{"text": "..."}, or give plain texts in a file, one per line: --file texts.txt'
            ) from error
        yield row


def write_lines(answers: Iterable[dict[str, Any]]) -> str:
    """Write answers to the standard output, one JSON object per line; the last is returned, to be printed.

    Raises:
        SystemExit: If nobody reads the output any more.
    """
    line = ""
    try:
        try:
            for answer in answers:
                sys.stdout.write(line)
                line = _json_line(answer)
        except ValueError:
            sys.stdout.write(line)
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(CLOSED_PIPE) from None
    return line.rstrip("\n")


def _json_line(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"


def schema(top_k: int | None, where: Iterable[str] = ("exit_layer",)) -> pa.Schema:
    """Names and types of the columns of a table of answers; with `top_k`, labels and scores are lists.

    Args:
        top_k: As for `predict_texts`.
        where: Names of the numbers that say where rows left.
    """
    numbers = [(name, pa.int32()) for name in where]
    if top_k is None:
        return pa.schema([("label", pa.string()), ("score", pa.float64()), *numbers])
    return pa.schema([("labels", pa.list_(pa.string())), ("scores", pa.list_(pa.float64())), *numbers])


@contextmanager
def write_table(make: Callable[..., Any], path: str, columns: pa.Schema) -> Iterator[Writer]:
    """A function that writes answers to a table file; the file is whole when the block is left, by an error too."""
    with make(path, columns) as file:
        yield lambda answers: file.write_table(pa.Table.from_pylist(answers, columns))


@contextmanager
def write_jsonl(path: str, columns: pa.Schema) -> Iterator[Writer]:
    """A function that writes answers to a file, one JSON object per line."""
    with open(path, "w", encoding="utf-8") as file:
        yield lambda answers: file.writelines(map(_json_line, answers))


WRITERS: dict[str, Callable[[str, pa.Schema], AbstractContextManager[Writer]]] = {
    ".csv": partial(write_table, CSVWriter),
    ".jsonl": write_jsonl,
    ".parquet": partial(write_table, ParquetWriter),
}
PREDICT = Command("predict", "answer the texts of a file or a stream", (PredictionArguments,), run, first="model")
