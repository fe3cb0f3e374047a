"""Answers texts with an exported multi-exit classifier: numpy, onnxruntime and tokenizers are all that it needs.

`hf-costeff export` copies this file into the export folder as `runner.py`. There it is a module,

    from runner import Runner
    Runner(threads=1).predict(["a good film", "a dull plot"], early_exit=0.3)

and a program: `python runner.py --early_exit 0.3 "a good film"`, or with one text per line on its standard input.
Rows that are sure at an exit leave there; the rest is cropped, regrouped into full batches and goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "runner_config.json"
TOKENIZER = "tokenizer.json"
WINDOW = 2048  # rows that are sorted and answered together
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"

Array = Any  # numpy.ndarray; its generic type says less than the docstrings


def decision_log_probabilities(logits: Array, problem_type: str) -> Array:
    """Log-probabilities of every decision a row takes: one for single-label, one yes/no per label for multi-label.

    Args:
        logits: Shape (..., labels).
        problem_type: `"single_label_classification"` or `"multi_label_classification"`.

    Returns:
        Natural logarithms, shape (..., decisions, classes): (..., 1, labels) or (..., labels, 2).

    Example:
        >>> np.exp(decision_log_probabilities(np.zeros((1, 2)), "single_label_classification")).tolist()
        [[[0.5, 0.5]]]
    """
    choices = logits[..., None, :] if problem_type == SINGLE_LABEL else np.stack([np.zeros_like(logits), logits], -1)
    shifted = choices - choices.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def probabilities(logits: Array, problem_type: str) -> Array:
    """Class probabilities, label probabilities, or the values themselves for regression, shape (rows, labels)."""
    if problem_type == REGRESSION:
        return logits
    decisions = np.exp(decision_log_probabilities(logits, problem_type))
    return decisions[..., 0, :] if problem_type == SINGLE_LABEL else decisions[..., 1]


def entropy(log_probabilities: Array) -> Array:
    """Entropy in nats of the least sure decision, shape (...), from shape (..., decisions, classes).

    Example:
        >>> entropy(decision_log_probabilities(np.zeros((1, 2)), "single_label_classification")).round(4).tolist()
        [0.6931]
    """
    return (-np.exp(log_probabilities) * log_probabilities).sum(-1).max(-1)


def normalized_entropy(log_probabilities: Array) -> Array:
    """Entropy of the least sure decision over ln(classes), between 0 and 1, shape (...)."""
    return entropy(log_probabilities) / math.log(log_probabilities.shape[-1])


def normalized_confidence(log_probabilities: Array) -> Array:
    """Largest probability of the least sure decision; 0 is a uniform guess, 1 certainty; shape (...)."""
    uniform = 1 / log_probabilities.shape[-1]
    return ((np.exp(log_probabilities).max(-1) - uniform) / (1 - uniform)).min(-1).clip(0, 1)


def margin(log_probabilities: Array) -> Array:
    """Gap between the two largest probabilities of the least sure decision, in 0..1, shape (...)."""
    ordered = np.sort(np.exp(log_probabilities), axis=-1)
    return (ordered[..., -1] - ordered[..., -2]).min(-1)


@dataclass(frozen=True)
class Measure:
    """What a threshold is compared with.

    Args:
        of: From log-probabilities (rows, decisions, classes) to shape (rows,).
        lower_is_surer: Whether a row leaves strictly below its threshold, or strictly above.
        everybody_leaves: A threshold here or past it lets every row leave, by definition.
    """

    of: Callable[[Array], Array]
    lower_is_surer: bool
    everybody_leaves: float


MEASURES = {
    "entropy": Measure(normalized_entropy, True, 1.0),
    "entropy_nats": Measure(entropy, True, math.inf),
    "confidence": Measure(normalized_confidence, False, 0.0),
    "margin": Measure(margin, False, 0.0),
}
PATIENCE = "patience"


@dataclass(frozen=True)
class ExitSettings:
    """When a row may leave: the fields and meanings of hf_costeff's `ExitConfig`.

    Args:
        criterion: `"entropy"` (over ln(classes)), `"entropy_nats"`, `"confidence"`, `"margin"` or `"patience"`.
        threshold: Limit of the criterion, one number or one per exit: in 0..1, for `"entropy_nats"` 0 or more.
        patience: Agreeing exits in a row, one number or one per exit; 0 lets everybody leave.
        tolerance: Largest change that still agrees, in label units; patience on a regression model.
        temperatures: Divisor of the logits, above 0, one number or one per exit.
        checked_exits: 1-based layers whose exit is asked; `None` asks all.
        calibration: What was seen when the settings were chosen; not used here.

    Raises:
        ValueError: For a value out of its range.
    """

    criterion: str = "entropy"
    threshold: float | list[float] | None = None
    patience: int | list[int] | None = None
    tolerance: float | None = None
    temperatures: float | list[float] = 1.0
    checked_exits: list[int] | None = None
    calibration: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.criterion not in (*MEASURES, PATIENCE):
            raise ValueError(f"`criterion` is {self.criterion!r}. It must be one of {', '.join(MEASURES)}, {PATIENCE}.")
        high = math.inf if self.criterion == "entropy_nats" else 1.0
        _check("threshold", self.threshold, lambda number: 0 <= number <= high, f"a number in 0..{high:g}")
        _check("temperatures", self.temperatures, lambda number: 0 < number < math.inf, "a number above 0")
        whole = "a whole number, 0 or more"
        _check("patience", self.patience, lambda number: isinstance(number, int) and number >= 0, whole)
        _check("tolerance", self.tolerance, lambda number: number >= 0, "0 or more, in label units")
        _check("checked_exits", self.checked_exits, lambda number: isinstance(number, int), "1-based layers")
        needed = "patience" if self.criterion == PATIENCE else "threshold"
        if getattr(self, needed) is None:
            raise ValueError(f"The {self.criterion} criterion needs `{needed}`: one number, or one per exit.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExitSettings:
        """Settings from a dict such as `ExitConfig.to_dict()` makes; an unknown key is an error."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"Unknown exit settings {sorted(unknown)}. Known: {', '.join(sorted(known))}.")
        return cls(**values)

    @classmethod
    def resolve(cls, early_exit: Any, saved: Mapping[str, Any] | None) -> ExitSettings | None:
        """What `early_exit` means where these settings were saved; `None` for full depth.

        Args:
            early_exit: `None` the saved settings, or full depth if there are none; `False` full depth; `True` the saved
                settings; a number a threshold on the normalised entropy (1 or more: everybody leaves), with the saved
                temperatures and checked exits; a dict of settings, or [`ExitSettings`].
            saved: Settings of the exported model.

        Raises:
            ValueError: `True` without saved settings, or settings out of range.
            TypeError: For anything else.
        """
        if early_exit is False:
            return None
        stored = None if saved is None else cls.from_dict(saved)
        if early_exit is None or early_exit is True:
            if early_exit and stored is None:
                raise ValueError(
                    "early_exit=True uses the settings that the model was exported with, and there are none. Calibrate "
                    "before the export, or pass a threshold: early_exit=0.3."
                )
            return stored
        if isinstance(early_exit, cls):
            return early_exit
        if isinstance(early_exit, Mapping):
            return cls.from_dict(early_exit)
        if isinstance(early_exit, Real):
            threshold = min(float(early_exit), 1.0)
            if stored is None:
                return cls(threshold=threshold)
            return cls(threshold=threshold, temperatures=stored.temperatures, checked_exits=stored.checked_exits)
        raise TypeError(f"early_exit is {early_exit!r}. Pass None, True, False, a number or a dict of settings.")


def _check(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    for number in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not holds(number):
            raise ValueError(f"`{name}` is {value!r}. It must be {expected}.")


def spread(name: str, value: float | Sequence[float], num_exits: int) -> list[float]:
    """One number per exit, from one number or a list of the right length.

    >>> spread("threshold", 0.5, 3)
    [0.5, 0.5, 0.5]
    """
    if isinstance(value, (int, float)):
        return [value] * num_exits
    if len(value) != num_exits:
        raise ValueError(f"`{name}` has {len(value)} entries and the model has {num_exits} exits. Give one per exit.")
    return list(value)


class ExitRule:
    """Which rows leave: exit settings, spread over the exits of one model."""

    def __init__(self, settings: ExitSettings, num_exits: int, problem_type: str) -> None:
        """Take the settings apart.

        Args:
            settings: Thresholds, temperatures and counts.
            num_exits: Exits of the model, asked or not.
            problem_type: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.

        Raises:
            ValueError: A list without one entry per exit, or a criterion that cannot serve the problem type.
        """
        self.problem_type = problem_type
        self.temperatures = spread("temperatures", settings.temperatures, num_exits)
        self.measure = MEASURES.get(settings.criterion)
        self.tolerance = settings.tolerance or 0.0
        limit = settings.patience if self.measure is None else settings.threshold
        self.limits = spread("patience" if self.measure is None else "threshold", limit or 0, num_exits)
        if problem_type == REGRESSION and self.measure is not None:
            raise ValueError(
                f"The {settings.criterion} criterion needs class probabilities, and this is a regression model. Use "
                '{"criterion": "patience", "patience": ..., "tolerance": <label units>}.'
            )
        if problem_type == REGRESSION and any(self.limits) and settings.tolerance is None:
            raise ValueError("Patience on a regression model needs `tolerance`: the largest change, in label units.")

    def scaled(self, logits: Array, exit_index: int) -> Array:
        """Logits of one exit over its temperature, shape as given; a regression model's values as they are."""
        return logits if self.problem_type == REGRESSION else logits / self.temperatures[exit_index]

    def leaves(self, history: Array, exit_index: int) -> Array:
        """Which rows leave.

        Args:
            history: Raw logits of the exits asked so far, this one last, shape (rows, seen, labels).
            exit_index: 0-based position of this exit among the model's exits.

        Returns:
            Booleans, shape (rows,).
        """
        limit = self.limits[exit_index]
        if self.measure is None:
            return self._agrees(history, int(limit))
        end = self.measure.everybody_leaves
        if limit >= end if self.measure.lower_is_surer else limit <= end:
            return np.ones(len(history), dtype=bool)
        scaled = self.scaled(history[:, -1], exit_index)
        measured = self.measure.of(decision_log_probabilities(scaled, self.problem_type)).astype(np.float64)
        return measured < limit if self.measure.lower_is_surer else measured > limit

    def _agrees(self, history: Array, patience: int) -> Array:
        if history.shape[1] <= patience:
            return np.zeros(len(history), dtype=bool)
        window = history[:, -patience - 1 :]
        if self.problem_type == REGRESSION:
            agrees = np.abs(window[:, 1:] - window[:, :-1]).max(-1) < self.tolerance
        else:
            answered = window > 0 if self.problem_type == MULTI_LABEL else window.argmax(-1)
            agrees = answered[:, 1:] == answered[:, :-1]
        return agrees.reshape(len(history), -1).all(-1)


@dataclass
class Rows:
    """Rows that have come equally far.

    Args:
        numbers: Position of each row among the caller's.
        lengths: Tokens of each row.
        states: What the next segment takes: token ids and types by name, shape (rows, seq), or hidden states, shape
            (rows, seq, hidden).
        seen: Raw logits of the exits asked so far, shape (rows, seen, labels).
    """

    numbers: list[int]
    lengths: list[int]
    states: dict[str, Array]
    seen: Array

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.numbers)


def regroup(groups: Sequence[Rows], batch_size: int) -> Iterator[Rows]:
    """The same rows in the same order as full batches, each cropped to its longest row and padded with zeros.

    Args:
        groups: Rows that have come equally far.
        batch_size: Rows of a full batch.
    """
    places = [(group, position) for group in groups for position in range(len(group))]
    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        lengths = [group.lengths[position] for group, position in chosen]
        states = {}
        for name, example in groups[0].states.items():
            states[name] = np.zeros((len(chosen), max(lengths), *example.shape[2:]), example.dtype)
            for row, (group, position) in enumerate(chosen):
                states[name][row, : lengths[row]] = group.states[name][position, : lengths[row]]
        numbers = [group.numbers[position] for group, position in chosen]
        yield Rows(numbers, lengths, states, np.stack([group.seen[position] for group, position in chosen]))


class Runner:
    """An exported classifier, ready to answer."""

    def __init__(self, folder: str | Path | None = None, *, threads: int | None = None) -> None:
        """Open the graphs of an export folder.

        Args:
            folder: The export folder; `None` is the one that this file lies in.
            threads: CPU threads of a matrix product, 1 or more; `None` leaves it to onnxruntime.

        Raises:
            ValueError: A thread count below 1, a folder without a file it needs, or a graph that cannot be run here.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"`threads` is {threads!r}. It must be a whole number, 1 or more; leave it out for all.")
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.config = json.loads(self._file(CONFIG).read_text(encoding="utf-8"))
        self.problem_type: str = self.config["problem_type"]
        self.exit_layers: list[int] = self.config["exit_layers"]
        files = {segment["exit_layer"]: self._file(segment["file"]) for segment in self.config["segments"]}
        self.segments = {layer: open_session(file, threads) for layer, file in files.items()}
        self._tokenizer: Any = None

    def predict(self, texts: Sequence[Any], early_exit: Any = None, *, batch_size: int = 32) -> list[dict[str, Any]]:
        """Answers in the order of the texts, each with `label`, `score`, `exit_layer` and raw `logits`.

        Args:
            texts: Strings, or pairs of strings.
            early_exit: `None` as the model was exported to (full depth if it had no settings), `False` full depth,
                `True` the exported settings, a number a threshold on the normalised entropy (0: nobody leaves early, 1:
                everybody leaves at the first exit), or a dict with the fields of [`ExitSettings`].
            batch_size: Rows that run together, 1 or more.

        Raises:
            ValueError: For a row that is no text, settings that do not fit the model, or logits that are not finite.
            TypeError: For one text instead of a list of them.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError("`texts` is one text. Pass a list: predict([text]).")
        return self.predict_tokens(self.tokenize(texts), early_exit, batch_size=batch_size)

    def predict_tokens(
        self, rows: Sequence[Mapping[str, Sequence[int]]], early_exit: Any = None, *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """As [`predict`], for rows that were tokenized elsewhere.

        Args:
            rows: Dicts with `input_ids` and, if they are not all 0, `token_type_ids`; not padded.
            early_exit: As for `predict`.
            batch_size: As for `predict`.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}. It must be at least 1.")
        settings = ExitSettings.resolve(early_exit, self.config["exit_config"])
        rule = None if settings is None else ExitRule(settings, len(self.exit_layers), self.problem_type)
        asked = self._asked(settings)
        answers: list[dict[str, Any]] = []
        for start in range(0, len(rows), WINDOW):
            groups = list(self._batches(rows[start : start + WINDOW], start, batch_size))
            answers += self._answer(groups, rule, asked, batch_size)
        return answers

    def tokenize(self, texts: Iterable[Any]) -> list[dict[str, list[int]]]:
        """Token ids and types of every text or pair, cut to what the model can take.

        Raises:
            ValueError: For a row that is neither a string nor a pair of strings, or without a token.
        """
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self._file(TOKENIZER)))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.config["max_length"])
        rows = [tuple(text) if isinstance(text, (list, tuple)) else (text,) for text in texts]
        for number, row in enumerate(rows):
            if len(row) not in (1, 2) or not all(isinstance(part, str) for part in row):
                raise ValueError(f"Row {number} is {texts_shown(row)}. It must be a string, or a pair of strings.")
        encoded = self._tokenizer.encode_batch([row[0] if len(row) == 1 else row for row in rows])
        return [{"input_ids": encoding.ids, "token_type_ids": encoding.type_ids} for encoding in encoded]

    def _file(self, name: str) -> Path:
        file = self.folder / name
        if not file.is_file():
            raise ValueError(f"{self.folder} has no {name}. Export the model again, and copy the whole folder.")
        return file

    def _asked(self, settings: ExitSettings | None) -> set[int]:
        """Layers whose exit is asked on the way; a graph ends after each of them."""
        if settings is None:
            return set()
        asked = set(self.exit_layers if settings.checked_exits is None else settings.checked_exits)
        if stray := asked - set(self.segments):
            raise ValueError(
                f"The settings ask the exits after layers {sorted(stray)}, and this folder answers after layers "
                f"{sorted(self.segments)}. Name some of them in `checked_exits`, or export again with other settings."
            )
        return asked

    def _batches(self, rows: Sequence[Mapping[str, Sequence[int]]], first: int, batch_size: int) -> Iterator[Rows]:
        """Batches of rows of like length, longest first."""
        lengths = [len(row["input_ids"]) for row in rows]
        longest = self.config["max_length"]
        for number, length in enumerate(lengths, start=first):
            if not 1 <= length <= longest:
                raise ValueError(f"Row {number} has {length} tokens. It must have 1 to {longest}.")
        names = [name for name in self.config["inputs"] if name != "attention_mask"]
        nothing = np.zeros((1, 0, self.config["num_labels"]), np.float32)
        order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
        alone = [
            Rows(
                [first + row],
                [lengths[row]],
                {name: np.array([rows[row].get(name, [0] * lengths[row])], dtype=np.int64) for name in names},
                nothing,
            )
            for row in order
        ]
        yield from regroup(alone, batch_size)

    def _answer(
        self, groups: list[Rows], rule: ExitRule | None, asked: set[int], batch_size: int
    ) -> list[dict[str, Any]]:
        """Run rows from graph to graph until everybody has left; answers in the order of their numbers."""
        answered: dict[int, dict[str, Any]] = {}
        for layer, segment in self.segments.items():
            is_last, staying = layer == self.exit_layers[-1], []
            for rows in groups:
                logits, rows.states = self._run(segment, rows, layer)
                leaves = np.full(len(rows), is_last)
                if is_last or layer in asked:
                    rows.seen = np.concatenate([rows.seen, logits[:, None]], axis=1)
                if rule is not None and not is_last and layer in asked:
                    leaves = rule.leaves(rows.seen, self.exit_layers.index(layer))
                if leaves.any():
                    answered.update(self._named(rows, logits, leaves, layer, rule))
                if not leaves.all():
                    staying.append(_selected(rows, np.flatnonzero(~leaves)) if leaves.any() else rows)
            nobody_left = len(staying) == len(groups) and all(map(operator.is_, staying, groups))
            groups = staying if nobody_left else list(regroup(staying, batch_size))
        return [answered[number] for number in sorted(answered)]

    def _run(self, segment: Any, rows: Rows, layer: int) -> tuple[Array, dict[str, Array]]:
        columns = max(rows.lengths)
        mask = (np.arange(columns) < np.array(rows.lengths)[:, None]).astype(np.int64)
        given = {**rows.states, "attention_mask": mask}
        takes = [entry.name for entry in segment.get_inputs()]  # a graph without heads may not look at the mask
        logits, *hidden = segment.run(None, {name: given[name] for name in takes})
        if not np.isfinite(logits).all():
            row = rows.numbers[int(np.argmin(np.isfinite(logits).all(-1)))]
            raise ValueError(f"The logits of row {row} after layer {layer} are not finite: the checkpoint is broken.")
        return logits, {"hidden_states": hidden[0]} if hidden else {}

    def _named(
        self, rows: Rows, logits: Array, leaves: Array, layer: int, rule: ExitRule | None
    ) -> dict[int, dict[str, Any]]:
        scaled = logits if rule is None else rule.scaled(logits, self.exit_layers.index(layer))
        chances = probabilities(scaled, self.problem_type)
        best = chances.argmax(-1)
        return {
            rows.numbers[row]: {
                "label": self.config["id2label"][str(best[row])],
                "score": float(chances[row, best[row]]),
                "exit_layer": layer,
                "logits": logits[row].tolist(),
            }
            for row in np.flatnonzero(leaves)
        }


def _selected(rows: Rows, positions: Array) -> Rows:
    chosen = positions.tolist()
    lengths = [rows.lengths[position] for position in chosen]
    states = {name: state[positions, : max(lengths)] for name, state in rows.states.items()}
    return Rows([rows.numbers[position] for position in chosen], lengths, states, rows.seen[positions])


def open_session(file: Path, threads: int | None) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        file: An ONNX graph.
        threads: Threads of an operator; `None` leaves it to onnxruntime.

    Raises:
        ValueError: If onnxruntime is not there, or cannot run the graph.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("onnxruntime is not installed. Run `pip install onnxruntime`.") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0  # onnxruntime's word for its own choice
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the other graphs' threads would fight
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common type
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} cannot run {file.name}: {error} The file is damaged, or this build "
            "lacks an operator: copy the folder again, update onnxruntime, or, if it is an int8 export, export "
            "without --int8."
        ) from error


def texts_shown(value: Any, longest: int = 80) -> str:
    """How a value reads in an error message, however long it is.

    >>> texts_shown("abc", longest=3)
    "'ab..."
    """
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def early_exit_choice(word: str) -> bool | float:
    """`early_exit` from the command line: true, false or a number.

    >>> early_exit_choice("true"), early_exit_choice("0.3")
    (True, 0.3)
    """
    return {"true": True, "false": False}[word.lower()] if word.lower() in ("true", "false") else float(word)


def main(words: Sequence[str] | None = None) -> int:
    """Answer texts from the command line or the standard input, one JSON object per line.

    Args:
        words: Command line; `None` takes the program's.

    Returns:
        Exit status: 0, 1 after an error, or 141 where nobody reads the answers any more.
    """
    parser = argparse.ArgumentParser(description="Answer texts with an exported classifier that leaves early.")
    parser.add_argument("texts", nargs="*", help="Texts. Default: the lines of the standard input.")
    parser.add_argument("--pairs", action="store_true", help="A tab separates the two texts of a row.")
    parser.add_argument("--early_exit", type=early_exit_choice, help="true, false or a threshold.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(words)
    try:
        runner = Runner(threads=given.threads)
        lines: Iterable[str] = given.texts or (line.rstrip("\r\n") for line in sys.stdin)
        texts = [tuple(line.split("\t")) if given.pairs else line for line in lines]
        for answer in runner.predict(texts, given.early_exit, batch_size=given.batch_size):
            sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141
    except (ValueError, TypeError) as error:
        sys.stderr.write(f"runner: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
