"""Checkpoints by their names: the one place that loads them and says what is wrong with a name, a folder or a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
PROBES = (("A Charming, naïve café film — #42!",), ("the plot", "Isn't it GOOD?"))
FEWEST_PIECES = 3  # that a tokenizer has beside special tokens; without files upstream makes up to two
SHOWN = 3


def load_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint.

    Args:
        name: Local folder or Hub id; so below.

    Raises:
        ValueError: If there is no such checkpoint, saying where it was looked for.
    """
    with _clear_errors(name, "checkpoint", "Give a Hub id, or a local folder with a config.json."):
        return AutoConfig.from_pretrained(name)


def load_classifier(name: str, **options: Any) -> PreTrainedModel:
    """A sequence classifier, all of whose weights were saved.

    Args:
        name: Local folder or Hub id.
        **options: As for `from_pretrained`.

    Raises:
        ValueError: If there is no such checkpoint, it cannot be read, or it lacks weights.
    """
    model, missing = load_unfinished_classifier(name, **options)
    if missing:
        raise ValueError(
            f"The checkpoint {name!r} lacks weights that its config calls for: {_some(missing)}. Without them its "
            "answers mean nothing. Give a fine-tuned classifier, saved as a whole."
        )
    return model


def load_classifier_of_same_rows(
    name: str, tokenizer: PreTrainedTokenizerBase, role: str = "teacher", **options: Any
) -> PreTrainedModel:
    """A classifier that is to be asked about the rows of a model.

    Args:
        name: Local folder or Hub id.
        tokenizer: The model's.
        role: What the classifier is to the model, for the message.
        **options: As for `from_pretrained`.

    Raises:
        ValueError: As [`load_classifier`], or if it cuts texts into other pieces.
    """
    other = load_classifier(name, **options)
    if not read_alike(load_tokenizer(name), tokenizer):
        raise ValueError(
            f"The {role} {name} cuts texts into other pieces than the model, so its answers to the model's rows would "
            f"be noise. Take a {role} with the model's tokenizer."
        )
    return other


def load_unfinished_classifier(name: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier that may still need its head.

    Args:
        name: Local folder or Hub id.
        **options: As for `from_pretrained`.

    Returns:
        The model, and the names of the weights that were not saved with it and are random.

    Raises:
        ValueError: If there is no such checkpoint, it cannot be read, or weights do not fit its config.
    """
    load_config(name)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _clear_errors(name, "checkpoint", "Save it again, or copy or download it anew."):
        model, report = AutoModelForSequenceClassification.from_pretrained(name, **options)
    if unfit := sorted(report["mismatched_keys"]):
        found = [f"{weight} is {tuple(saved)}, not {tuple(wanted)}" for weight, saved, wanted in unfit]
        raise ValueError(
            f"The weights of {name!r} do not fit its config: {_some(found)}. Use the config.json that was saved with "
            "them."
        )
    return model, sorted(report["missing_keys"])


def load_tokenizer(name: str, subfolder: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint, or in a folder of it.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    remedy = f"Save the one the model was trained with beside it: tokenizer.save_pretrained({name!r})."
    with _clear_errors(name, "tokenizer of", remedy):
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolder)
        if len(tokenizer) < len(set(tokenizer.all_special_ids)) + FEWEST_PIECES:  # upstream found no files
            raise ValueError(f"there is none, and one of {len(tokenizer)} special tokens knows no word")
        return tokenizer


def read_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers make the same rows of the same texts, as far as their pieces and a few probes tell."""
    if one.get_vocab() != other.get_vocab():
        return False
    return all(one(*probe)["input_ids"] == other(*probe)["input_ids"] for probe in PROBES)


def public_name(name: str | None) -> str | None:
    """A name that the Hub could know; `None` for a folder here, a path, or nothing.

    >>> public_name("org/bert"), public_name("/bert"), public_name("")
    ('org/bert', None, None)
    """
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


@contextmanager
def _clear_errors(name: str, what: str, remedy: str) -> Iterator[None]:
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name!r} is a file. Give the folder it lies in: {str(path.parent)!r}.")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{name!r} is an adapter, not a model. Merge it into its model first, with merge_and_unload(), and give "
            "the folder where the merged model was saved."
        )
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        here = "" if path.exists() else f" (there is no local folder of that name{_nearest(path)})"
        said = " ".join(str(error).split()).rstrip(".!")
        raise ValueError(f"The {what} {name!r}{here} cannot be loaded: {said}. {remedy}") from error


def _some(things: Sequence[str]) -> str:
    more = f" and {len(things) - SHOWN} more" if len(things) > SHOWN else ""
    return f"{', '.join(things[:SHOWN])}{more}"


def _nearest(path: Path) -> str:
    """The model folder that may have been meant."""
    names = [config.parent.name for config in path.parent.glob("*/config.json")]
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
