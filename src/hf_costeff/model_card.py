"""The model card: what a compression run measured, as a page for people who never saw the run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .calibration import describe_seen
from .configuration_costeff import CostEffConfig
from .efficiency import PAPER_SEQ_LENGTH, cumulative_flops
from .evaluation import TIMED_BATCHES, ReportRow, format_table
from .hub import CARD, TAGS, plain_card

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
SETTINGS = {
    "recipe": "recipe",
    "compression": "parameters at most teacher /",
    "flops_ratio": "FLOPs at most teacher /",
    "num_attention_heads": "heads per layer",
    "intermediate_size": "neurons per layer",
    "embedding_rank": "embedding rank",
    "allocation": "allocation",
    "exit_pooling": "exits look at",
    "metric": "chosen by",
    "precision": "precision",
    "batch_size": "batch size",
    "seed": "seed",
}


@dataclass(frozen=True)
class CompressionCard:
    """A card from what stands in a model's folder. A sentence whose measurement is missing is left out.

    Args:
        name: How the model is called where the card will be read: `org/name`, or a folder's name.
        report: What `efficiency.json` holds.
        config: The model's.
        chart: Whether `pareto.png` lies beside.
    """

    name: str
    report: dict[str, Any]
    config: CostEffConfig
    chart: bool = False

    @property
    def rows(self) -> list[ReportRow]:
        """The measured lines that still hold: early exit only under the settings that the model has now."""
        rows = [ReportRow(**row) for row in self.report["rows"]]
        return rows if self.report["exit_config"] == self.config.exit_config else rows[:-1]

    def render(self) -> ModelCard:
        """The card, metadata and text."""
        report, settings = self.report, self.report["settings"]
        teacher, slim = self.rows[0], self.rows[-1]
        source = settings.get("teacher") or ""
        hardware = report["hardware"]
        calibrated = (self.config.exit_config or {}).get("calibration")
        return ModelCard.from_template(
            self.metadata(),
            template_path=str(TEMPLATE),
            name=self.name,
            exit_layers=", ".join(map(str, self.config.exit_layers)),
            teacher=f"[{source}](https://huggingface.co/{source})" if HUB_ID.fullmatch(source) else "a local teacher",
            parameters=f"{slim.parameters:,}",
            smaller=f"{teacher.parameters / slim.parameters:.1f}",
            example='"a text"' if len(report["data"]["text_columns"]) == 1 else '"a text", "and its pair"',
            threshold=self.config.exit_config is not None,
            validation_rows=f"{report['data']['rows']['validation']:,}",
            dataset_phrase=self.dataset_phrase(),
            table=format_table(self.rows, report["metric"]),
            paper_length=PAPER_SEQ_LENGTH,
            hardware=f"{hardware['accelerator'] or hardware['cpu']} (threads: {hardware['threads']})",
            timed=f"batches of {' and '.join(map(str, TIMED_BATCHES))} texts",
            chart=self.chart,
            exit_table=self.exit_table(),
            exit_note=self.exit_note(),
            calibration=None if calibrated is None else describe_calibration(calibrated),
            recipe="; ".join(f"{said} {settings[key]}" for key, said in SETTINGS.items() if settings.get(key)) + ".",
            stage_table=self.stage_table(),
            train_rows=f"{report['data']['rows']['train']:,}",
        )

    def metadata(self) -> ModelCardData:
        """What the Hub reads: base model, data set, and results on a data set that the Hub knows."""
        settings, source = self.report["settings"], self.report["settings"].get("dataset") or ""
        known = {}
        if HUB_ID.fullmatch(settings.get("teacher") or ""):
            known["base_model"] = settings["teacher"]
        if HUB_ID.fullmatch(source):
            known["datasets"] = [source]
            known["eval_results"] = [
                EvalResult(
                    task_type="text-classification",
                    dataset_type=source,
                    dataset_name=" ".join(filter(None, (source, settings.get("dataset_config")))),
                    dataset_config=settings.get("dataset_config"),
                    dataset_split=settings.get("validation_split"),
                    metric_type=self.report["metric"],
                    metric_name=f"{self.report['metric']}, {row.name}",
                    metric_value=row.metrics[self.report["metric"]],
                )
                for row in self.rows[2:]
            ]
            known["model_name"] = self.name
        return ModelCardData(
            library_name="transformers",
            pipeline_tag="text-classification",
            tags=list(TAGS),
            metrics=[self.report["metric"]],
            **known,
        )

    def dataset_phrase(self) -> str:
        """Which data the rows came from, if it has a public name."""
        settings = self.report["settings"]
        source = settings.get("dataset") or ""
        named = " ".join(filter(None, (source, settings.get("dataset_config"))))
        return f" of {named}" if HUB_ID.fullmatch(source) else ""

    def exit_metrics(self) -> list[float | None]:
        """What each exit would score if every calibration row left there; `None` where nobody looked."""
        trained = [record for record in self.report["stages"].values() if "calibration_metrics" in record]
        last = trained[-1]["calibration_metrics"] if trained else {}
        return [last.get(f"eval_exit_{layer}_{self.report['metric']}") for layer in self.config.exit_layers]

    def exit_table(self) -> str:
        """A line per exit: cost, score, and share of rows, as far as they were measured."""
        flops = cumulative_flops(self.config, PAPER_SEQ_LENGTH)
        columns = {
            "exit after layer": list(map(str, self.config.exit_layers)),
            f"FLOPs, {PAPER_SEQ_LENGTH} tokens": [
                f"{flops[layer - 1] / 1e6:,.1f}M" for layer in self.config.exit_layers
            ],
        }
        scores = [score for score in self.exit_metrics() if score is not None]
        if len(scores) == len(self.config.exit_layers):
            columns[f"{self.report['metric']} if all leave here"] = [f"{score:.4f}" for score in scores]
        if len(self.rows) == len(self.report["rows"]):
            columns["share of rows"] = [f"{share:.1%}" for share in self.rows[-1].exit_shares]
        lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def exit_note(self) -> str:
        """Which rows the columns of the exit table speak of."""
        notes = ["FLOPs are those of a text that leaves there, exits on the way included."]
        if None not in self.exit_metrics():
            notes.append(f"The {self.report['metric']} is on the rows held out for choosing settings.")
        if len(self.rows) == len(self.report["rows"]):
            notes.append("Shares are on the validation rows.")
        else:
            notes.append("The exit settings were replaced after these measurements, so shares are not told.")
        return " ".join(notes)

    def stage_table(self) -> str:
        """A line per stage: steps, time, and the widths it left."""
        lines = ["| stage | steps | minutes | heads, neurons, embedding rank |", "|---|---|---|---|"]
        for name, record in self.report["stages"].items():
            widths = [record[key] for key in ("num_attention_heads", "intermediate_size") if key in record]
            rank = [record["embedding_rank"] or "full"] if "embedding_rank" in record else []
            steps = record.get("steps", "")
            minutes = f"{record['seconds'] / 60:.1f}" if "seconds" in record else ""
            lines.append(f"| {name} | {steps} | {minutes} | {', '.join(map(str, [*widths, *rank]))} |")
        return "\n".join(lines)


def describe_calibration(seen: dict[str, Any]) -> str:
    """What the exit settings were chosen for, what was seen, and what is promised, if anything.

    Args:
        seen: The `calibration` record of an [`ExitConfig`].
    """
    text = f"The settings were chosen on rows held out from training. {describe_seen(seen)}"
    promise = seen.get("promise")
    if promise is None:
        return f"{text} That was seen on these rows; nothing is promised for others."
    losses = {
        "max_accuracy_drop": "full depth is right and the early answer wrong",
        "max_disagreement": "the early answer differs from that of full depth",
    }
    return (
        f"{text} Promised for new rows of the same kind, with probability {1 - promise['delta']:g}: for at most "
        f"{promise['epsilon']:.2%} of them {losses[promise['loss']]}. It was tested on {promise['rows']:,} rows, of "
        f"which {promise['flips']:,} lost."
    )


def write_model_card(folder: str | Path, name: str) -> None:
    """Write the card of a model folder, unless somebody has written one.

    A card that this function wrote before is written anew, so that name and exit settings are those of now.

    Args:
        folder: A saved model, with the `efficiency.json` of its run or without.
        name: How the model is called where the card will be read.
    """
    folder = Path(folder)
    card = folder / CARD
    marker = "<!-- written by hf_costeff; remove this line to keep your changes -->"
    if card.exists() and marker not in card.read_text(encoding="utf-8"):
        return
    report = folder / "efficiency.json"
    if report.exists():
        config = CostEffConfig.from_pretrained(folder)
        chart = (folder / "pareto.png").exists()
        written = CompressionCard(name, json.loads(report.read_text(encoding="utf-8")), config, chart).render()
    else:
        written = plain_card(name, folder)
    card.write_text(f"{str(written).rstrip()}\n\n{marker}\n", encoding="utf-8")
