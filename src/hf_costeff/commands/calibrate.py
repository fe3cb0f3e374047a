"""`hf-costeff calibrate`: choose a model's exit threshold on held-out rows and save it in the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data import DataArguments, make_collator, prepare_split
from ..evaluation import calibrate
from .command import Command, load_slim, longest_text, writable_folder


@dataclass
class CalibrationArguments:
    """What the command is asked for: a model, and exactly one goal."""

    model: str = field(metadata={"help": "A multi-exit model: a local folder, or a Hub id with --output_dir."})
    split: str | None = field(
        default=None, metadata={"help": "Split to choose on, of rows that no training saw. Not needed with a file."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where to save. Default: the model's folder."})
    metric: str | None = field(default=None, metadata={"help": "What may drop. Default: by problem type."})
    max_metric_drop: float | None = field(default=None, metadata={"help": "Points the metric may lose."})
    target_speedup: float | None = field(default=None, metadata={"help": "FLOPs ratio to this model's full depth."})


def run(wanted: CalibrationArguments, data: DataArguments) -> str:
    """Choose the exit threshold, save it in the model, and say what was seen."""
    folder = writable_folder(wanted.model, wanted.output_dir)
    model, tokenizer = load_slim(wanted.model)
    split = wanted.split or ("validation" if data.validation_file else None)
    if split is None:
        raise ValueError(
            "No rows to choose on are named. Give --split, of rows that no training saw and no report is made on, or "
            "--validation_file."
        )
    rows = prepare_split(data, split, tokenizer, config=model.config, max_positions=longest_text(model.config))
    settings = calibrate(
        model,
        rows,
        make_collator(tokenizer),
        metric=wanted.metric,
        max_metric_drop=wanted.max_metric_drop,
        target_speedup=wanted.target_speedup,
    )
    if wanted.output_dir is None:  # only the settings change, so the weights are not written again
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    seen = settings.calibration or {}
    limit = settings.tolerance if settings.threshold is None else settings.threshold
    return (
        f"Saved in {folder}: {settings.criterion} criterion with limit {limit:g}. On {seen['rows']} held-out rows: "
        f"{seen['metric']} {seen['full_depth']:.4f} at full depth, {seen['early_exit']:.4f} with early exit, mean exit "
        f"layer {seen['mean_exit_layer']:.2f}, {seen['speedup_over_full_depth']:.2f}x fewer FLOPs."
    )


CALIBRATE = Command(
    "calibrate",
    "choose a model's exit threshold on held-out rows",
    (CalibrationArguments, DataArguments),
    run,
    first="model",
)
