"""`hf-costeff report`: what early exit costs and whom, on labelled rows, as a page to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..data import SplitArguments, make_collator, prepare_split
from ..evaluation import collect_exit_logits
from ..exit_report import settings_to_report, write_exit_report
from ..metrics import check_metric, default_metric
from ..promises import warn_if_void
from .command import Command, load_slim


@dataclass
class ReportArguments:
    """Which model, on which rows, and where the page goes."""

    model: str = field(metadata={"help": "A multi-exit model with exit settings: a local folder or a Hub id."})
    split: str | None = field(
        default=None, metadata={"help": "Split of labelled rows to report on. Not needed with a file."}
    )
    output_dir: str = field(
        default="exit_report",
        metadata={"help": "Folder of the page and its charts. Not the model's: the page may quote your texts."},
    )
    metric: str | None = field(default=None, metadata={"help": "Metric to show. Default: by problem type."})
    markdown: bool = field(default=False, metadata={"help": "Write Markdown instead of HTML."})
    texts: bool = field(default=True, metadata={"help": "Quote the texts whose answer changes."})


def run(wanted: ReportArguments, data: SplitArguments) -> str:
    """Run the model over the rows at all exits, write the page, and say where it is."""
    folder = Path(wanted.output_dir)
    if wanted.texts and Path(wanted.model).resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"--output_dir {wanted.output_dir} lies in the model's folder, which may be pushed, and the report quotes "
            "texts of your data. Name another folder, or give --no_texts."
        )
    split = data.named_split(wanted.split)
    if split is None:
        raise ValueError("No rows to report on are named. Give --split or --validation_file.")
    model, tokenizer = load_slim(wanted.model)
    settings = settings_to_report(model.config)  # before the model runs over all rows
    gated = model.config.skip_gates is not None
    warn_if_void(model.costeff, settings.calibration, model.config.skip_threshold if gated else None)
    metric = wanted.metric or default_metric(model.config.resolved_problem_type)
    check_metric(metric, model.config.resolved_problem_type)
    rows = prepare_split(data, split, tokenizer, config=model.config, max_positions=model.config.longest_text)
    records = collect_exit_logits(model, rows, make_collator(tokenizer))
    texts = tokenizer.batch_decode(list(rows["input_ids"]), skip_special_tokens=True) if wanted.texts else None
    page = write_exit_report(records, model.config, metric, folder, texts=texts, markdown=wanted.markdown)
    return f"The report is in {page}."


REPORT = Command(
    "report",
    "show what early exit costs and whom, on labelled rows",
    (ReportArguments, SplitArguments),
    run,
    first="model",
)
