"""From a dataset's name to tokenised train, calibration and validation splits that fit the teacher's labels.

The steps are plain functions, each usable alone: `load_splits` -> `find_columns` -> `resolve_labels` ->
`encode_labels` -> `hold_out` -> `tokenize`; `prepare_data` runs them all. What is wrong with the data is found here,
with the split and the row named, before anything is trained.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from .checksums import fingerprint
from .columns import Columns, LabelInfo, check_texts, encode_labels, find_columns, is_string, resolve_labels
from .exit_criteria import SINGLE_LABEL

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "validation_matched", "dev", "test")
FILE_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Only an empty cell is missing: "NA", "null" and "None" are words that people write.
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    # GLUE's kind of tsv: quotation marks are part of the text (3 is csv.QUOTE_NONE).
    ".tsv": ("csv", {"keep_default_na": False, "na_values": [""], "sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
MAX_DROPPED_SHARE = 0.2
"""`hold_out` stops before the training rows dropped for overlap pass this share of all rows."""

# Scripts written without spaces get one word per character, so that containment has boundaries there too.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+|[^\\w\\s]")


@dataclass
class SplitArguments:
    """Where the rows come from and how they are read; every field is a command-line flag.

    Raises:
        ValueError: Fields that contradict each other or lie out of range.
    """

    file_flags: ClassVar[tuple[str, ...]] = ("validation_file",)

    dataset: str | None = field(default=None, metadata={"help": "Hub id or local folder of a dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset, e.g. sst2."})
    validation_file: str | None = field(
        default=None,
        metadata={"help": f"Rows in {', '.join(name[1:] for name in FILE_READERS)}, instead of a dataset."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "The text column, or the two of a pair. Default: found by the usual names."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "The label column. Default: found by the usual names."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per row, longer rows are cut. Default: what the model can take."}
    )
    max_validation_rows: int | None = field(
        default=None, metadata={"help": "Use a random sample of this many rows to report on. Default: all."}
    )
    data_seed: int = field(default=42, metadata={"help": "Seed of every sample and cut."})

    @property
    def files(self) -> dict[str, str]:
        """The files that are named, by split."""
        files = {flag.removesuffix("_file"): getattr(self, flag) for flag in self.file_flags}
        return {split: path for split, path in files.items() if path}

    def named_split(self, split: str | None) -> str | None:
        """The split that is asked for, or that of the file; `None` if neither is named."""
        return split or ("validation" if self.validation_file else None)

    def __post_init__(self) -> None:
        if self.dataset and self.files:
            raise ValueError(
                f"Both `dataset` ({self.dataset!r}) and files ({next(iter(self.files.values()))!r}) are given. "
                f"Give either `dataset`, or {' and '.join(f'`{flag}`' for flag in self.file_flags)}."
            )
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise ValueError(f"`text_columns` is {self.text_columns}. It must name one column, or two for text pairs.")
        for name in ("max_length", "max_validation_rows"):
            self._check_count(name)

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}. It must be at least 1; leave it out for the default.")


@dataclass
class DataArguments(SplitArguments):
    """The rows to train, calibrate and report on: [`SplitArguments`], and which splits do what.

    Raises:
        ValueError: Fields that contradict each other or lie out of range.
    """

    file_flags = ("train_file", "validation_file")

    train_file: str | None = field(
        default=None,
        metadata={"help": "Training rows in one of the same formats; validation is cut from them if need be."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    calibration_split: str | None = field(
        default=None,
        metadata={"help": "Split to choose checkpoints and thresholds on. Default: cut from train, without overlap."},
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to report on. Default: validation, validation_matched, dev or test, else a cut."},
    )
    calibration_rows: int | None = field(
        default=None,
        metadata={"help": "Rows to cut for calibration. Default: a tenth of train, at least 200 and at most 2000."},
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Use a random sample of this many training rows. Default: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibration_rows", "max_train_rows"):
            self._check_count(name)
        splits = (self.train_split, self.calibration_split, self.validation_split)
        named = [split for split in splits if split is not None]
        if len(set(named)) < len(named):
            raise ValueError(
                f"`train_split`, `calibration_split` and `validation_split` are {splits}. They must differ: thresholds "
                "chosen, or results reported, on rows that were trained on mean nothing."
            )


@dataclass(frozen=True)
class PreparedData:
    """Everything the stages need to know of the data.

    `train`, `calibration` and `validation` hold `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer makes
    them, and `labels` where the rows have any. `raw` holds the same rows as text, labels in the model's order.
    """

    train: Dataset
    calibration: Dataset
    validation: Dataset
    raw: DatasetDict
    columns: Columns
    label_names: list[str] | None
    problem_type: str
    num_labels: int
    max_length: int
    notes: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Counts and choices for a report, JSON-ready: rows per split, how each was made, rows dropped and cut."""
        return {
            "rows": {name: len(split) for name, split in self.raw.items()},
            "text_columns": list(self.columns.text),
            "label_column": self.columns.label,
            "problem_type": self.problem_type,
            "num_labels": self.num_labels,
            "label_names": self.label_names,
            "max_length": self.max_length,
            **self.notes,
        }

    def fingerprint(self) -> str:
        """Of every row as text, so that a run knows its own rows again."""
        return fingerprint(repr(row) for split in self.raw.values() for row in split)

    def label(self, config: PreTrainedConfig) -> None:
        """Give a config, in place, the names, number and problem type of these labels."""
        if self.label_names is not None:
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {name: index for index, name in enumerate(self.label_names)}
        else:
            config.num_labels = self.num_labels
        config.problem_type = self.problem_type


def load_splits(
    data: DataArguments | DatasetDict | Dataset | str, arguments: DataArguments | None = None
) -> tuple[DatasetDict, DataArguments]:
    """The splits `train` and, where there are such, `validation` and `calibration`, whatever the source calls them.

    Works offline for plain files, for folders with a `configs:` block in their README and for `save_to_disk` folders.

    Args:
        data: Arguments, a loaded dataset, or a Hub id, folder or file.
        arguments: Splits, columns and seed to use when `data` is not itself a `DataArguments`.

    Returns:
        The splits, and the arguments that were used.

    Raises:
        ValueError: A dataset, configuration, file or split that is not there (the message says what is), or no rows.
        TypeError: `data` is of another kind, e.g. a streaming dataset.
    """
    arguments = data if isinstance(data, DataArguments) else arguments or DataArguments()
    dataset = open_dataset({arguments.train_split: data} if isinstance(data, Dataset) else data, arguments)
    wanted = {"train": arguments.train_split, "calibration": arguments.calibration_split}
    if arguments.train_file:
        wanted["train"] = "train"
    names = (name for name in VALIDATION_NAMES if name in dataset and name not in wanted.values())
    wanted["validation"] = arguments.validation_split or next(names, None)
    splits = {role: _pick(dataset, name, f"{role}_split") for role, name in wanted.items() if name is not None}
    return DatasetDict(splits), arguments


def open_dataset(
    data: SplitArguments | Mapping[str, Dataset] | Dataset | str, arguments: SplitArguments | None = None
) -> DatasetDict:
    """The dataset with all its splits under their own names; a single one is `train`.

    Raises:
        ValueError: As at `load_splits`.
        TypeError: As at `load_splits`.
    """
    if isinstance(data, SplitArguments):
        if data.files:
            return DatasetDict({name: _read_file(path) for name, path in data.files.items()})
        if not data.dataset:
            raise ValueError(f"No data is named. Give `dataset` (Hub id or local folder) or `{data.file_flags[0]}`.")
        return _open_named(data.dataset, data.dataset_config)
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.suffix.lower() in FILE_READERS and not path.is_dir():
            return DatasetDict({"train": _read_file(str(path))})
        return _open_named(str(data), None if arguments is None else arguments.dataset_config)
    if isinstance(data, Dataset):
        return DatasetDict({"train": data})
    if isinstance(data, Mapping) and all(isinstance(split, Dataset) for split in data.values()):
        return DatasetDict(data)
    raise TypeError(
        f"The data is a {type(data).__name__}. Expected arguments, a Dataset, a DatasetDict, or the name of a Hub "
        "dataset, folder or file; load a streaming dataset into memory first."
    )


def hold_out(
    train: Dataset, columns: Columns, rows: int | None = None, seed: int = 42, limit: float = MAX_DROPPED_SHARE
) -> tuple[Dataset, Dataset]:
    """Cut rows from train such that no held-out text contains, or is contained in, a text that stays.

    A random cut is not held out where rows are pieces of other rows (two thirds of SST-2's training rows are). Held
    out are random texts that no other text contains, whole sentences that is; what they contain is dropped from train.
    Texts are compared as sequences of words and signs, without case and whitespace. A pair contains another if each of
    its texts contains one of the other's, in either order. Copies of a text stay together.

    Args:
        train: Rows with the text columns.
        columns: From `find_columns`.
        rows: Rows to hold out; `None`: 10% of train, at least 200 (but no more than a quarter), at most 2,000.
        seed: Seed of the choice.
        limit: Largest share of all rows that may be dropped for overlap; fewer rows are held out rather than pass it.

    Returns:
        (what stays, what is held out), each in the order of `train`. Fewer than `rows` are held out, with a warning,
        if no more texts qualify.

    Raises:
        ValueError: `rows` outside 1..len(train) - 1, or no row can be held out.
    """
    total = len(train)
    rows = max(1, min(2000, max(total // 10, min(200, total // 4)))) if rows is None else rows
    if not 0 < rows < total:
        raise ValueError(f"Cannot hold out {rows} of {total} rows. It must be at least 1 and leave rows to train on.")
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, text in enumerate(zip(*(train[name] for name in columns.text), strict=True)):
        groups[tuple(f" {' '.join(_WORD.findall(part.casefold()))} " for part in text)].append(row)
    members = list(groups.values())
    held, dropped = _choose_texts(list(groups), [len(group) for group in members], rows, seed, int(limit * total))
    held_rows = sorted(row for text in held for row in members[text])
    gone = {row for text in held | dropped for row in members[text]}
    if not held_rows or len(gone) == total:
        raise ValueError(
            f"No rows can be held out of {total}: nearly every text contains or repeats another. Name rows kept apart "
            "with `calibration_split` and `validation_split` (or `validation_file`)."
        )
    if len(held_rows) < rows:
        logger.warning(
            "%d instead of %d rows are held out of %d: more would drop over %.0f%% of train for overlap, or no other "
            "text qualifies.",
            *(len(held_rows), rows, total, 100 * limit),
        )
    return train.select([row for row in range(total) if row not in gone]), train.select(held_rows)


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, columns: Columns, max_length: int) -> Dataset:
    """`input_ids`, `attention_mask`, `token_type_ids` if the tokenizer makes them, and `labels` if there are any.

    Not padded. Rows longer than `max_length` tokens are cut (the longer text of a pair first), with one warning. An
    empty text is fine: it has special tokens only.

    Args:
        dataset: From `encode_labels`.
        tokenizer: The teacher's tokenizer.
        columns: From `find_columns`.
        max_length: Tokens per row, special tokens included.

    Raises:
        ValueError: A text that is missing or no string (the row is named).
    """
    tokens, cut = _tokenize(dataset, tokenizer, columns, max_length)
    _warn_of_cuts(cut, len(dataset), max_length)
    return tokens


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], max_length: int
) -> tuple[BatchEncoding, int]:
    """The tokens of texts or pairs, not padded, and how many rows were cut.

    Args:
        tokenizer: Fast or slow.
        texts: The texts, or the first and the second texts of pairs.
        max_length: Tokens per row, special tokens included.
    """
    encoding = tokenizer(*map(list, texts), truncation=True, max_length=max_length)
    if encoding.encodings is not None:
        return encoding, sum(bool(row.overflowing) for row in encoding.encodings)
    whole = tokenizer(*map(list, texts), verbose=False)  # a slow tokenizer does not tell what it cuts
    return encoding, sum(len(ids) > max_length for ids in whole["input_ids"])


def resolve_max_length(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_positions: int, pair: bool = False
) -> int:
    """Tokens per row: `max_length` if given, else the smaller of the tokenizer's and the model's limit.

    Raises:
        ValueError: More than the model's `max_positions`, or too few for one token besides the special ones.
    """
    limit = min(tokenizer.model_max_length, max_positions) if max_length is None else max_length
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if not special < limit <= max_positions:
        raise ValueError(
            f"`max_length` is {limit}. It must lie in {special + 1}..{max_positions}: more than the {special} special "
            "tokens, and no more than the model has positions. Leave it out for the largest."
        )
    return limit


def prepare_data(
    data: DataArguments | DatasetDict | Dataset | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    arguments: DataArguments | None = None,
    teacher_config: PreTrainedConfig | None = None,
    max_positions: int,
) -> PreparedData:
    """Train, calibration and validation, checked, cut without overlap, labelled in the model's order and tokenised.

    Args:
        data: As at `load_splits`.
        tokenizer: The teacher's tokenizer.
        arguments: As at `load_splits`.
        teacher_config: As at `resolve_labels`.
        max_positions: Longest row the model can take, in tokens (without RoBERTa's position offset).

    Raises:
        ValueError: Anything wrong with the data; see the single steps.
        TypeError: As at `load_splits`.
    """
    splits, arguments = load_splits(data, arguments)
    columns, labels = _columns_and_labels(splits, arguments, teacher_config)
    raw = DatasetDict({name: encode_labels(split, columns, labels, name) for name, split in splits.items()})
    raw, notes = _complete(raw, columns, arguments)
    _check_labelled(raw, labels)
    max_length = resolve_max_length(tokenizer, arguments.max_length, max_positions, len(columns.text) == 2)
    tokens = {name: _tokenize(split, tokenizer, columns, max_length) for name, split in raw.items()}
    notes["truncated_rows"] = {name: cut for name, (_, cut) in tokens.items()}
    _warn_of_cuts(sum(notes["truncated_rows"].values()), sum(map(len, raw.values())), max_length)
    return PreparedData(
        **{name: split for name, (split, _) in tokens.items()},
        raw=raw,
        columns=columns,
        label_names=labels.label_names,
        problem_type=labels.problem_type,
        num_labels=labels.num_labels,
        max_length=max_length,
        notes=notes,
    )


def prepare_split(
    data: SplitArguments | DatasetDict | Dataset | str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    arguments: SplitArguments | None = None,
    config: PreTrainedConfig,
    max_positions: int,
    require_labels: bool = True,
) -> Dataset:
    """One split, tokenised for a finished model: what calibrating or measuring it needs.

    Args:
        data: As at `load_splits`; nothing is cut here.
        split: Name of the split at the source. At most `max_validation_rows` of its rows are used.
        tokenizer: The model's tokenizer.
        arguments: As at `load_splits`.
        config: The model's configuration, which gives the labels and their order.
        max_positions: As at `prepare_data`.
        require_labels: Whether a split without labels is an error.

    Raises:
        ValueError: As at `prepare_data`; among others if the split has no labels and needs them.
        TypeError: As at `load_splits`.
    """
    rows = _pick(open_dataset(data, arguments), split, "split")
    arguments = data if isinstance(data, SplitArguments) else arguments or SplitArguments()
    columns = find_columns(rows, arguments.text_columns, arguments.label_column)
    if columns.label is None and require_labels:
        raise ValueError(
            f"No label column was found in split {split!r} among: {', '.join(rows.column_names)}. Name it with "
            "`label_column`."
        )
    rows = encode_labels(rows, columns, resolve_labels(rows, columns, config), split)
    max_length = resolve_max_length(tokenizer, arguments.max_length, max_positions, len(columns.text) == 2)
    return tokenize(_sample(rows, arguments.max_validation_rows, arguments.data_seed), tokenizer, columns, max_length)


def class_weights(labels: Sequence[int] | np.ndarray, num_labels: int) -> list[float]:
    """Weights that make every class count the same: rows / (num_labels * rows of the class), mean 1 over the rows.

    Args:
        labels: Class indices, shape (rows,).
        num_labels: Number of classes.

    Raises:
        ValueError: A class without rows, whose weight would be infinite, or a label outside 0..num_labels - 1.

    >>> class_weights([0, 0, 0, 1], 2)
    [0.6666666666666666, 2.0]
    """
    values = np.asarray(labels, dtype=np.int64)
    if values.size and not 0 <= values.min() <= values.max() < num_labels:
        raise ValueError(f"Labels lie in {values.min()}..{values.max()}. They must lie in 0..{num_labels - 1}.")
    counts = np.bincount(values, minlength=num_labels)
    missing = np.flatnonzero(counts == 0).tolist()
    if missing:
        raise ValueError(
            f"Training rows of the classes {missing} are missing, so their weight is undefined. Add rows of every "
            f"class (0..{num_labels - 1}) or train without class weights."
        )
    return [float(len(values) / (num_labels * count)) for count in counts]


def make_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Pads each batch to its longest row, rounded up to a multiple of 8 tokens.

    Raises:
        ValueError: The tokenizer has no padding token.
    """
    if tokenizer.pad_token is None:
        raise ValueError("The tokenizer has no padding token. Set one: `tokenizer.pad_token = '[PAD]'`.")
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"The tokenizer pads on the {tokenizer.padding_side}: a row's first token would then depend on its batch. "
            'Set tokenizer.padding_side = "right".'
        )
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)


def _read_file(path: str) -> Dataset:
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_READERS:
        raise ValueError(f"The file {path!r} ends in {suffix!r}. Known endings are {', '.join(FILE_READERS)}.")
    if not Path(path).is_file():
        raise ValueError(f"The file {path!r} does not exist. Give the path of a file ({', '.join(FILE_READERS)}).")
    if not Path(path).stat().st_size:
        raise ValueError(f"The file {path!r} is empty. Give a file with at least one row.")
    builder, options = FILE_READERS[suffix]
    try:
        dataset = datasets.load_dataset(builder, data_files={"train": [path]}, split="train", **options)
    except Exception as error:  # the readers raise whatever their parser raises
        reason = error.__cause__ or error
        if "corresponds to no data" in str(reason):
            raise ValueError(f"The file {path!r} has no rows. Give a file with at least one row.") from error
        raise ValueError(
            f"The file {path!r} cannot be read as {suffix[1:]}: {reason}. Correct or rename it."
        ) from error
    strings = [name for name in dataset.column_names if is_string(dataset.features[name])]
    if builder == "csv" and any(dataset.data.column(name).null_count for name in strings):  # an empty cell is ""
        dataset = dataset.map(lambda row: {name: row[name] or "" for name in strings}, keep_in_memory=True)
    return dataset


def _open_named(name: str, config: str | None) -> DatasetDict:
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config)
    except Exception as error:  # network, Hub, configuration and file errors have no common base
        configs = datasets.get_dataset_config_names(name) if "config" in str(error).lower() else []
        if configs and config not in configs:
            raise ValueError(
                f"`dataset_config` is {config!r}, but {name!r} has: {', '.join(configs)}. Name one of them."
            ) from error
        raise ValueError(
            f"The dataset {name!r} cannot be loaded: {str(error).rstrip('.')}. Give a local folder, the id of a Hub "
            "dataset that can be reached (or is in the cache), or `train_file`."
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _pick(dataset: DatasetDict, name: str, flag: str) -> Dataset:
    if name not in dataset:
        raise ValueError(f"`{flag}` is {name!r}, but the splits are: {', '.join(dataset)}. Name one of them.")
    if not len(dataset[name]):
        raise ValueError(f"The split {name!r} has no rows. Give one with at least one row as `{flag}`.")
    return dataset[name].with_format(None)


def _sample(dataset: Dataset, rows: int | None, seed: int) -> Dataset:
    if rows is None or rows >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).choice(len(dataset), rows, replace=False)))


def _cut(splits: DatasetDict, role: str, columns: Columns, rows: int | None, seed: int) -> DatasetDict:
    before = len(splits["train"])
    train, held = hold_out(splits["train"], columns, rows, seed)
    logger.log(
        logging.WARNING if role == "validation" else logging.INFO,
        "There is no %s split: %d rows were cut from train, %d rows that overlap them were dropped, %d stay.",
        *(role, len(held), before - len(train) - len(held), len(train)),
    )
    return DatasetDict({**splits, "train": train, role: held})


def _columns_and_labels(
    splits: DatasetDict, arguments: DataArguments, teacher_config: PreTrainedConfig | None
) -> tuple[Columns, LabelInfo]:
    """The columns, and what the labels mean; unlabelled training rows leave that to the validation rows."""
    train, validation = splits["train"], splits.get("validation")
    named = arguments.label_column
    only_validation = validation is not None and named in validation.column_names and named not in train.column_names
    columns = find_columns(train, arguments.text_columns, None if only_validation else named)
    if only_validation and columns.label is not None:
        raise ValueError(
            f"`label_column` names {named!r}, which only the validation rows have; the training rows have "
            f"{columns.label!r}. Give the column one name in all splits, or take it out of the training rows."
        )
    if only_validation:
        logger.warning("Only the validation rows have the column %r: the training rows count as unlabelled.", named)
    if columns.label is None and validation is not None:
        columns = find_columns(validation, columns.text, named)
        return columns, resolve_labels(validation, columns, teacher_config)
    return columns, resolve_labels(train, columns, teacher_config)


def _complete(raw: DatasetDict, columns: Columns, arguments: DataArguments) -> tuple[DatasetDict, dict[str, Any]]:
    """Samples the splits, cuts those that are missing, and notes how each came about."""
    notes: dict[str, Any] = {"data_seed": arguments.data_seed, "dropped_train_rows": {}}
    for role, rows in (("train", arguments.max_train_rows), ("validation", arguments.max_validation_rows)):
        if role in raw:
            raw[role] = _sample(raw[role], rows, arguments.data_seed)
    for role, rows in (("validation", arguments.max_validation_rows), ("calibration", arguments.calibration_rows)):
        notes[f"{role}_from"] = "a split of its own"
        if role not in raw:
            before = len(raw["train"])
            raw = _cut(raw, role, columns, rows, arguments.data_seed)
            notes[f"{role}_from"] = "cut from train without overlapping texts"
            notes["dropped_train_rows"][role] = before - len(raw["train"]) - len(raw[role])
    return raw, notes


def _check_labelled(raw: DatasetDict, labels: LabelInfo) -> None:
    if "labels" not in raw["validation"].column_names:
        raise ValueError(
            "The validation rows have no label column, so nothing can be reported. Name a labelled split with "
            "`validation_split` (or `validation_file`), or the column with `label_column`."
        )
    if labels.problem_type == SINGLE_LABEL and "labels" in raw["train"].column_names:
        absent = sorted(set(range(labels.num_labels)) - set(raw["train"]["labels"]))
        if absent:
            logger.warning("The labels %s of 0..%d have no training rows.", absent, labels.num_labels - 1)


def _choose_texts(
    texts: list[tuple[str, ...]], sizes: list[int], rows: int, seed: int, limit: int
) -> tuple[set[int], set[int]]:
    """Texts to hold out and texts to drop, as positions in `texts`; `sizes` are the rows of each."""
    words = [set(" ".join(text).split()) for text in texts]
    frequency = Counter(word for present in words for word in present)
    with_word: dict[str, list[int]] = defaultdict(list)
    with_rarest: dict[str, list[int]] = defaultdict(list)
    rarest = [min(present, key=lambda word: (frequency[word], word), default="") for present in words]
    for position, present in enumerate(words):
        with_rarest[rarest[position]].append(position)
        for word in present:
            with_word[word].append(position)
    held: set[int] = set()
    dropped: set[int] = set()
    held_rows = dropped_rows = failures = 0
    for position in np.random.default_rng(seed).permutation(len(texts)).tolist():
        if held_rows == rows or failures == 50:
            break
        text = texts[position]
        if position in dropped or not words[position] or sizes[position] > rows - held_rows:
            continue
        if any(_contains(texts[other], text) for other in with_word[rarest[position]] if other != position):
            continue
        candidates = {other for word in words[position] for other in with_rarest[word]} - dropped - {position}
        inside = {other for other in candidates if _contains(text, texts[other])}
        cost = sum(sizes[other] for other in inside)
        if dropped_rows + cost > limit:
            failures += 1
            continue
        held.add(position)
        dropped |= inside
        held_rows, dropped_rows = held_rows + sizes[position], dropped_rows + cost
    return held, dropped


def _contains(large: tuple[str, ...], small: tuple[str, ...]) -> bool:
    if len(large) == 1:
        return small[0] in large[0]
    return (small[0] in large[0] and small[1] in large[1]) or (small[0] in large[1] and small[1] in large[0])


def _tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, columns: Columns, max_length: int
) -> tuple[Dataset, int]:
    """The tokenised rows, and how many of them were cut."""
    check_texts(dataset, columns, None)
    cut = 0

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal cut
        encoding, too_long = encode_texts(tokenizer, [batch[name] for name in columns.text], max_length)
        cut += too_long
        return {name: encoding[name] for name in token_features}

    names = list(tokenizer("", *[""] * (len(columns.text) - 1)))
    types = {"input_ids": "int32", "attention_mask": "int8", "token_type_ids": "int8"}
    token_features = {name: datasets.List(datasets.Value(types[name])) for name in types if name in names}
    features = dict(token_features)
    if "labels" in dataset.column_names:
        features["labels"] = dataset.features["labels"]
    tokens = dataset.map(
        encode,
        batched=True,
        remove_columns=[name for name in dataset.column_names if name not in features],
        features=datasets.Features(features),
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="Tokenizing",
    )
    return tokens, cut


def _warn_of_cuts(cut: int, rows: int, max_length: int) -> None:
    if cut:
        logger.warning("%d of %d rows are longer than %d tokens and were cut to that.", cut, rows, max_length)
