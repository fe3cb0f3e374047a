"""`hf-costeff cascade train | calibrate | predict`: a cascade of complete models, from checkpoints to answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..calibration import describe_seen
from ..cascade import load_cascade, save_cascade
from ..cascade_training import CascadeArguments, train_cascade
from ..conversion import longest_text
from ..data import DataArguments, SplitArguments, make_collator, prepare_split
from ..evaluation import calibrate
from .calibrate import SettingsArguments, describe_limit, describe_what_holds, load_reference, split_to_choose_on
from .command import Command, writable_folder
from .predict import PredictionArguments, answer_all


@dataclass
class CascadeCalibrationArguments(SettingsArguments):
    """What a calibration of single models is asked for, with members for exits."""

    model: str = field(metadata={"help": "A cascade: a local folder, or a Hub id with --output_dir."})
    target_speedup: float | None = field(
        default=None,
        metadata={"help": "Goal: FLOPs ratio to the last member at its own exit settings, or to the reference."},
    )
    per_exit: bool = field(default=False, metadata={"help": "One threshold per member, not one for all."})
    fit_temperatures: bool = field(default=True, metadata={"help": "Fit each member's temperature before thresholds."})
    checked_exits: list[int] | None = field(
        default=None, metadata={"help": "Members, counted from 1, that may answer before the last. Default: chosen."}
    )


def run_train(wanted: CascadeArguments, data: DataArguments) -> str:
    """Make the cascade, and say what its members are worth."""
    result = train_cascade(wanted, data)
    lines = [f"| member | layer | {result.metric} | DIS |", "|---|---|---|---|"]
    for exit in result.exits:
        area = "n/a" if exit.discrimination is None else f"{exit.discrimination:.3f}"
        lines.append(f"| {exit.member} | {exit.layer} | {exit.metric:.4f} | {area} |")
    hard = (
        "" if result.hard_share is None else f" Of the training rows {result.hard_share:.1%} are hard for the smallest."
    )
    return "\n".join(
        [*lines, "", f"The cascade is in {result.path}.{hard} Choose its thresholds: hf-costeff cascade calibrate."]
    )


def run_calibrate(wanted: CascadeCalibrationArguments, data: SplitArguments) -> str:
    """Choose the cascade's thresholds, save them, and say what was seen and promised."""
    folder = writable_folder(wanted.model, wanted.output_dir)
    cascade, tokenizers = load_cascade(wanted.model)
    split = split_to_choose_on(wanted, data)
    each = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(cascade.config.members)
    reference = load_reference(wanted.reference, each[-1])
    longest = [longest_text(member) for member in cascade.config.members]
    rows = [
        prepare_split(
            data,
            split,
            tokenizer,
            config=cascade.config,
            max_positions=positions if isinstance(tokenizers, list) else min(longest),
            require_labels=wanted.max_disagreement is None,
        )
        for tokenizer, positions in zip(each, longest, strict=True)
    ]
    elsewhere = ("model", "split", "output_dir", "reference")
    goals = {name: value for name, value in vars(wanted).items() if name not in elsewhere}
    collators = [make_collator(tokenizer) for tokenizer in each]
    settings = calibrate(cascade, rows, collators, reference=reference, **goals)
    if wanted.output_dir is None:  # only the settings change, so the weights are not written again
        cascade.config.save_pretrained(folder)
    else:
        save_cascade(cascade, tokenizers, folder)
    seen = settings.calibration or {}
    return (
        f"Saved in {folder}, where members count as layers: {settings.criterion} criterion with "
        f"{describe_limit(settings)}. {describe_seen(seen)}{describe_what_holds(seen)}"
    )


def run_predict(wanted: PredictionArguments) -> str:
    """Answer every row and write the answers as they come; returns what to print."""
    return answer_all(wanted, load_cascade)


CASCADE_TRAIN = Command(
    "cascade train", "make a cascade of two or more models", (CascadeArguments, DataArguments), run_train
)
CASCADE_CALIBRATE = Command(
    "cascade calibrate",
    "choose a cascade's thresholds on held-out rows",
    (CascadeCalibrationArguments, SplitArguments),
    run_calibrate,
    first="model",
)
CASCADE_PREDICT = Command(
    "cascade predict", "answer texts with a cascade", (PredictionArguments,), run_predict, first="model"
)
