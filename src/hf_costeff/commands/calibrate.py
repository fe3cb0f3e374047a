"""`hf-costeff calibrate`: choose a model's exit settings on held-out rows and save them in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import describe_seen
from ..calibration_goals import check_guarantee, one_goal
from ..checkpoints import load_classifier_of_same_rows
from ..data import SplitArguments, make_collator, prepare_split
from ..evaluation import calibrate
from ..exit_criteria import CRITERIA, ExitConfig
from ..exit_times import measure_exit_times
from ..guarantees import describe_promise
from .command import Command, load_slim, save_settings, writable_folder


@dataclass
class SettingsArguments:
    """What exit settings are chosen for, of a model or a cascade: exactly one goal, and which settings are tried."""

    model: str = field(metadata={"help": "A multi-exit model: a local folder, or a Hub id with --output_dir."})
    split: str | None = field(
        default=None, metadata={"help": "Split to choose on, of rows that no training saw. Not needed with a file."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where to save. Default: the model's folder."})
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Classifier that losses, promises and the speed-up are against, e.g. the teacher. Default: the "
            "model's own full depth."
        },
    )
    max_accuracy_drop: float | None = field(default=None, metadata={"help": "Goal: points that accuracy may lose."})
    max_metric_drop: float | None = field(default=None, metadata={"help": "Goal: points the metric may lose."})
    max_disagreement: float | None = field(
        default=None,
        metadata={"help": "Goal: share of the rows, in points, that may answer otherwise."},
    )
    target_speedup: float | None = field(
        default=None, metadata={"help": "Goal: FLOPs ratio to full depth, or to the reference."}
    )
    max_megaflops: float | None = field(
        default=None, metadata={"help": "Goal: millions of FLOPs per row on average, at the rows' own lengths."}
    )
    metric: str | None = field(default=None, metadata={"help": "For --max_metric_drop. Default: by problem type."})
    guarantee: bool = field(
        default=False,
        metadata={
            "help": "Promise the goal for new rows too. For --max_accuracy_drop and --max_disagreement; if nothing can "
            "be promised, nobody leaves early."
        },
    )
    delta: float = field(default=0.1, metadata={"help": "Largest chance that a promise is broken."})
    criterion: str | None = field(
        default=None,
        metadata={"help": f"Rule for leaving: {', '.join(CRITERIA)}. Default: entropy, for regression patience."},
    )
    per_exit: bool = field(default=False, metadata={"help": "One threshold per exit, not one for all."})
    fit_temperatures: bool = field(default=True, metadata={"help": "Fit each exit's temperature before thresholds."})
    checked_exits: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers whose exit may be asked. Default: as benchmark --choose_exits left them, else chosen."
        },
    )

    def __post_init__(self) -> None:
        goal, limit = one_goal(self.goals)
        if self.guarantee:
            check_guarantee(goal, limit, self.delta)

    @property
    def goals(self) -> dict[str, Any]:
        """All goals, of which one is given."""
        names = ("max_accuracy_drop", "max_metric_drop", "max_disagreement", "target_speedup", "max_megaflops")
        return {name: getattr(self, name) for name in names}


@dataclass
class CalibrationArguments(SettingsArguments):
    """What the command is asked for: a model, and exactly one goal, which may be a time."""

    max_latency_ms: float | None = field(
        default=None, metadata={"help": "Goal: milliseconds per text on average, measured on this machine."}
    )
    measured: bool = field(
        default=False,
        metadata={
            "help": "Measure what each exit takes on this machine. --target_speedup counts time then, and within a "
            "largest loss the fastest settings are taken."
        },
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Texts that run together when times are measured. Default: 1."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads when times are measured. Default: 1."})

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = [f"`{name}`" for name in ("batch_size", "threads") if getattr(self, name) is not None]
        if idle and not self.timed:
            raise ValueError(f"{' and '.join(idle)} set how times are measured, and none are. Add `measured`.")
        if self.measured and self.max_megaflops is not None:
            raise ValueError("`max_megaflops` counts FLOPs, and `measured` counts time. Leave one out.")

    @property
    def goals(self) -> dict[str, Any]:
        """All goals, of which one is given."""
        return {**super().goals, "max_latency_ms": self.max_latency_ms}

    @property
    def timed(self) -> bool:
        """Whether times are measured."""
        return self.measured or self.max_latency_ms is not None


def run(wanted: CalibrationArguments, data: SplitArguments) -> str:
    """Choose the exit settings, save them in the model, and say what was seen and promised."""
    folder = writable_folder(wanted.model, wanted.output_dir)
    model, tokenizer = load_slim(wanted.model)
    if len(model.config.exit_layers) == 1:
        raise ValueError(
            f"{wanted.model} has one exit, after its last layer, so nobody can leave early. Compress with more "
            "--exit_layers."
        )
    reference = load_reference(wanted.reference, tokenizer)
    split = split_to_choose_on(wanted, data)
    rows = prepare_split(
        data,
        split,
        tokenizer,
        config=model.config,
        max_positions=model.config.longest_text,
        require_labels=wanted.max_disagreement is None,
    )
    collator, times = make_collator(tokenizer), None
    if wanted.timed:
        sizes = {name: getattr(wanted, name) for name in ("batch_size", "threads")}
        given = {name: size for name, size in sizes.items() if size is not None}
        times = measure_exit_times(model, rows, collator, **given)
    settings = calibrate(
        model,
        rows,
        collator,
        metric=wanted.metric,
        **wanted.goals,
        reference=reference,
        exit_times=times,
        guarantee=wanted.guarantee,
        delta=wanted.delta,
        criterion=wanted.criterion,
        per_exit=wanted.per_exit,
        fit_temperatures=wanted.fit_temperatures,
        checked_exits=wanted.checked_exits,
    )
    save_settings(model, tokenizer, wanted.model, folder)
    seen = settings.calibration or {}
    return (
        f"Saved in {folder}: {settings.criterion} criterion with {describe_limit(settings)}. {describe_seen(seen)}"
        f"{describe_what_holds(seen)}"
    )


def load_reference(name: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """What losses are counted against, if it is named.

    Args:
        name: Local folder or Hub id.
        tokenizer: That the rows were cut with.

    Raises:
        ValueError: If it cannot be loaded, or cuts texts into other pieces.
    """
    return None if name is None else load_classifier_of_same_rows(name, tokenizer, "reference")


def split_to_choose_on(wanted: SettingsArguments, data: SplitArguments) -> str:
    """The split that is named, or that of the file.

    Raises:
        ValueError: If neither is.
    """
    split = data.named_split(wanted.split)
    if split is None:
        raise ValueError(
            "No rows to choose on are named. Give --split, of rows that no training saw and no report is made on, or "
            "--validation_file."
        )
    return split


def describe_limit(settings: ExitConfig) -> str:
    """Thresholds or patience of exit settings, and the exits they check."""
    limits = {"threshold": settings.threshold, "patience": settings.patience, "tolerance": settings.tolerance}
    parts = [f"{name} {_numbers(value)}" for name, value in limits.items() if value is not None]
    if settings.checked_exits is not None:
        parts.append(f"exits checked after layers {', '.join(map(str, settings.checked_exits))}")
    return "; ".join(parts)


def _numbers(value: float | Sequence[float]) -> str:
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return f"{', '.join(f'{number:g}' for number in value)} (one per exit)"


def describe_what_holds(seen: dict[str, Any]) -> str:
    """What a calibration promised, or why it promised nothing; empty if it was not asked to."""
    if reason := seen.get("no_promise"):
        return f" Nobody leaves early, because nothing can be promised. {reason}"
    return f" {describe_promise(seen['promise'])}" if "promise" in seen else ""


CALIBRATE = Command(
    "calibrate",
    "choose a model's exit threshold on held-out rows",
    (CalibrationArguments, SplitArguments),
    run,
    first="model",
)
