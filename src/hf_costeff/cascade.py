"""A cascade and its tokenizers: made of classifiers in the order of their cost, saved, and loaded again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .cascade_costs import classifier_flops
from .checkpoints import load_classifier, load_tokenizer, read_alike
from .configuration_cascade import FEWEST_MEMBERS, match_labels
from .efficiency import PAPER_SEQ_LENGTH
from .hub import TOKENIZER_FOLDER
from .modeling_cascade import CostEffCascade

logger = logging.get_logger(__name__)

Tokenizers: TypeAlias = PreTrainedTokenizerBase | list[PreTrainedTokenizerBase]
"""The one that all members share, or one per member."""


def make_cascade(
    members: Sequence[str | Path | PreTrainedModel], tokenizers: Sequence[PreTrainedTokenizerBase] | None = None
) -> tuple[CostEffCascade, Tokenizers]:
    """A cascade of two or more classifiers that answer the same question.

    Args:
        members: Names, folders or loaded models: stock sequence classifiers or models of this package, of any
            architecture and size. They are put in the order of their FLOPs, with a warning if it was another.
        tokenizers: Of the members, in the same order; `None` loads each from where its member is.

    Returns:
        The cascade, not yet calibrated, and its tokenizers: a single one if all members read texts alike.

    Raises:
        ValueError: Fewer than two members, labels that do not agree, or a model in memory without its tokenizer.
    """
    if isinstance(members, (str, Path)) or len(members) < FEWEST_MEMBERS:
        raise ValueError(
            f"`members` is {members!r:.200}. A cascade takes {FEWEST_MEMBERS} or more models, smallest first."
        )
    if tokenizers is not None and len(tokenizers) != len(members):
        raise ValueError(f"There are {len(tokenizers)} tokenizers for {len(members)} members. Give one per member.")
    loaded = [_load(member) for member in members]
    found = [_tokenizer_of(model) for model in loaded] if tokenizers is None else list(tokenizers)
    costs = [classifier_flops(model.config, PAPER_SEQ_LENGTH) / 1e6 for model in loaded]
    order = sorted(range(len(loaded)), key=costs.__getitem__)
    if order != list(range(len(loaded))):
        logger.warning(
            f"The members cost {', '.join(f'{cost:,.0f}M' for cost in costs)} FLOPs at {PAPER_SEQ_LENGTH} tokens. They "
            f"are put in the order of their cost: {', '.join(str(number + 1) for number in order)}."
        )
        loaded, found = [loaded[number] for number in order], [found[number] for number in order]
    match_labels([model.config for model in loaded])
    if all(read_alike(found[0], other) for other in found[1:]):
        return CostEffCascade.from_members(loaded), max(found, key=lambda one: len(one.model_input_names))
    folders = [f"{TOKENIZER_FOLDER}{number}" for number in range(1, len(found))]
    return CostEffCascade.from_members(loaded, [*folders, ""]), found


def save_cascade(cascade: CostEffCascade, tokenizers: Tokenizers, folder: str | Path) -> None:
    """Save the model and its tokenizers in one folder, from which [`load_cascade`] takes both.

    Args:
        cascade: The model.
        tokenizers: As [`make_cascade`] returns them.
        folder: Made if it is not there.
    """
    cascade.save_pretrained(folder)
    if isinstance(tokenizers, PreTrainedTokenizerBase):
        tokenizers.save_pretrained(folder)
        return
    for tokenizer, name in zip(tokenizers, cascade.config.member_tokenizers or (), strict=True):
        tokenizer.save_pretrained(Path(folder) / name)


def load_cascade(name: str | Path) -> tuple[CostEffCascade, Tokenizers]:
    """A saved cascade and its tokenizers.

    Args:
        name: Local folder or Hub id.

    Raises:
        ValueError: If it is not there, or no cascade.
    """
    model = load_classifier(str(name))
    if not isinstance(model, CostEffCascade):
        raise ValueError(
            f"{name} is a {model.config.model_type} model, no cascade. Make one: hf-costeff cascade train."
        )
    folders = model.config.member_tokenizers
    if folders is None:
        return model, load_tokenizer(str(name))
    return model, [load_tokenizer(str(name), folder) for folder in folders]


def _load(member: str | Path | PreTrainedModel) -> PreTrainedModel:
    return load_classifier(str(member)) if isinstance(member, (str, Path)) else member


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    if not model.name_or_path:
        raise ValueError(
            f"A member is a {type(model).__name__} in memory that was not loaded from anywhere, so its tokenizer is "
            "unknown. Pass `tokenizers`, one per member."
        )
    return load_tokenizer(model.name_or_path)
