"""`hf-costeff export`: a model as ONNX graphs with a runner that needs neither torch nor this package."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data import SplitArguments, prepare_split
from ..export import Int8Loss, export_onnx
from .command import Command, load_slim

FORMATS = ("onnx",)


@dataclass
class ExportArguments:
    """Which model, and where to.

    Raises:
        ValueError: For an unknown format, or rows that nothing would be measured on.
    """

    model: str = field(metadata={"help": "A multi-exit model: a local folder or a Hub id."})
    output_dir: str = field(
        metadata={"help": "Folder to write, not the model's own; an earlier export in it is replaced."}
    )
    format: str = field(default="onnx", metadata={"help": f"One of {', '.join(FORMATS)}."})
    int8: bool = field(default=False, metadata={"help": "Run matrix products in 8 bits."})
    split: str | None = field(
        default=None,
        metadata={"help": "Split of the data on which the change by --int8 is measured. Not needed with a file."},
    )

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"`format` is {self.format!r}. It must be one of {', '.join(FORMATS)}.")


def run(wanted: ExportArguments, data: SplitArguments) -> str:
    """Export the model, and say what was checked and what int8 changed.

    Raises:
        ValueError: If rows are named and int8 is off, among others.
    """
    split, rows = data.named_split(wanted.split), None
    if split is not None and not wanted.int8:
        name = "split" if wanted.split else "validation_file"
        raise ValueError(f"`{name}` names rows to measure int8 on, and int8 is off. Give --int8 too.")
    model, tokenizer = load_slim(wanted.model)
    if split is not None:
        positions = model.config.longest_text
        rows = prepare_split(data, split, tokenizer, config=model.config, max_positions=positions, require_labels=False)
    done = export_onnx(model, tokenizer, wanted.output_dir, int8=wanted.int8, rows=rows)
    return (
        f"{len(done.stops)} graphs, {done.megabytes:.1f} MB, and runner.py are in {done.folder}. In fp32 they leave at "
        f"the same exits as the model, and logits differ by at most {done.max_difference:.0e}."
        f"{'' if done.int8_loss is None else describe_int8(done.int8_loss)}"
    )


def describe_int8(loss: Int8Loss) -> str:
    """What int8 changed, in a sentence."""
    parts = [] if loss.agreement is None else [f"{loss.agreement:.2%} of the answers are the same"]
    if loss.metrics_fp32 is not None and loss.metrics_int8 is not None:
        parts += [f"{name} {value:.4f} -> {loss.metrics_int8[name]:.4f}" for name, value in loss.metrics_fp32.items()]
    ratio = loss.fp32.median_ms / loss.int8.median_ms
    gain = f"int8 is {ratio:.2f} times as fast as fp32" if ratio > 1 else f"no gain here: {ratio:.2f} times as fast"
    return f"\nint8 against fp32 on {loss.rows} rows at full depth: {'; '.join([*parts, gain])}."


EXPORT = Command(
    "export", "write a model as ONNX graphs with a runner", (ExportArguments, SplitArguments), run, first="model"
)
