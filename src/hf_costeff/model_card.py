"""The model card: what a compression run or a training measured, as a page for people who never saw it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .calibration import describe_seen
from .checkpoints import public_name
from .configuration_costeff import CostEffConfig
from .efficiency import PAPER_SEQ_LENGTH, cumulative_flops
from .evaluation import TIMED_BATCHES, ReportRow, format_table
from .exit_criteria import REGRESSION
from .group_outcomes import GroupOutcome
from .guarantees import describe_promise
from .hub import CARD, MARKER, TAGS, is_written_by_hand, plain_card, read_json
from .markdown import markdown_table, quoted
from .report import COMPRESSION, PRUNING, SKIPPING
from .skip_diagnostics import SkipDiagnostics

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_CLASSES = 10
CHARTS = ("pareto.png", "skipping.png")
CHOSEN = {"token_replacement_rate", "soft_label_exit"}
"""Settings that a stage may have chosen by itself, and written down."""
SETTINGS = {
    "recipe": "recipe",
    "compression": "parameters at most teacher /",
    "flops_ratio": "FLOPs at most teacher /",
    "num_attention_heads": "heads per layer",
    "intermediate_size": "neurons per layer",
    "embedding_rank": "embedding rank",
    "token_replacement_rate": "tokens replaced",
    "soft_label_exit": "teacher of the exits, same depth or last:",
    "allocation": "allocation",
    "gates": "gates",
    "target_layers": "layers to run",
    "skip_weight": "weight of the incentive to skip",
    "hard_gate_ratio": "share of hard weights",
    "contrastive_weight": "weight of the contrast between layers",
    "exit_pooling": "exits look at",
    "ratio": "share of the blocks pruned",
    "threshold": "blocks pruned below a norm of",
    "importance": "blocks ranked by",
    "rows": "rows of a block",
    "columns": "columns of a block",
    "row_slabs": "slabs of rows",
    "column_slabs": "slabs of columns",
    "across_matrices": "one budget for all matrices",
    "strength": "strength of the penalty",
    "reweighted": "penalty reweighted",
    "proximal": "proximal steps",
    "metric": "chosen by",
    "precision": "precision",
    "batch_size": "batch size",
    "seed": "seed",
}


@dataclass(frozen=True)
class ReportCard(ABC):
    """A card from the report of a recipe. A sentence whose measurement is missing is left out.

    Args:
        name: How the model is called where the card will be read: `org/name`, or a folder's name.
        report: What `FILE` holds.
        config: The model's.
        charts: Which of `CHARTS` lie beside.
    """

    name: str
    report: dict[str, Any]
    config: CostEffConfig
    charts: Sequence[str] = ()

    FILE: ClassVar[str]
    SOURCE: ClassVar[str]
    """The setting that names what the model was made from."""
    OTHERS: ClassVar[tuple[str, ...]]
    """Names of the measured lines that are of other models."""
    PAPERS: ClassVar[tuple[str, ...]]
    """What to cite."""

    def render(self) -> ModelCard:
        """The card, metadata and text."""
        report, settings, hardware = self.report, self.report["settings"], self.report["hardware"]
        calibrated = (self.config.exit_config or {}).get("calibration")
        source = public_name(settings.get(self.SOURCE))
        chosen = {key: record[key] for record in report["stages"].values() for key in CHOSEN & set(record)}
        known = {**settings, **chosen}
        if known.get("target_layers") is not None:  # which adapts the weight
            known["skip_weight"] = None
        return ModelCard.from_template(
            self.metadata(),
            template_path=str(TEMPLATES / "model_card.md"),
            marker=MARKER,
            name=self.name,
            what=self.what(f"[{source}](https://huggingface.co/{source})" if source else None),
            use=how_to_use(self.name, self.config, pair=len(report["data"]["text_columns"]) == 2, exits=self.has_exits),
            validation_rows=f"{report['data']['rows']['validation']:,}",
            dataset_phrase=self.dataset_phrase(),
            table=format_table(self.rows, report["metric"]),
            paper_length=PAPER_SEQ_LENGTH,
            hardware=f"{hardware['accelerator'] or hardware['cpu']} (threads: {hardware['threads']})",
            timed=f"batches of {' and '.join(map(str, TIMED_BATCHES))} texts",
            charts=self.charts,
            skipping=self.skipping(),
            exit_table=self.exit_table() if self.has_exits else "",
            exit_note=self.exit_note(),
            calibration=None if calibrated is None else describe_calibration(calibrated),
            class_table=self.class_table(),
            class_note=self.class_note(),
            who_pays=self.who_pays(),
            recipe="; ".join(f"{said} {known[key]}" for key, said in SETTINGS.items() if known.get(key) is not None)
            + ".",
            stage_table=self.stage_table(),
            train_rows=f"{report['data']['rows']['train']:,}",
            record=self.FILE,
            citation=citation(*self.PAPERS),
        )

    @property
    def has_exits(self) -> bool:
        """Whether exits before the last were trained."""
        return len(self.config.exit_layers) > 1

    @abstractmethod
    def what(self, source: str | None) -> str:
        """What the model is and what it was made from.

        Args:
            source: A link to that; `None` if it has no public name.
        """

    def skipping(self) -> str:
        """What the gates do; empty without any."""
        return ""

    @property
    def rows(self) -> list[ReportRow]:
        """The measured lines that still hold: early exit only under the settings that the model has now."""
        rows = [ReportRow(**row) for row in self.report["rows"]]
        return rows if self.report["exit_config"] in (None, self.config.exit_config) else rows[:-1]

    @property
    def early_exit_holds(self) -> bool:
        """Whether the last line is early exit under the settings that the model has now."""
        return self.report["exit_config"] is not None and self.report["exit_config"] == self.config.exit_config

    def metadata(self) -> ModelCardData:
        """What the Hub reads: base model, data set, and results on a data set that the Hub knows."""
        settings = self.report["settings"]
        known: dict[str, Any] = {}
        if teacher := public_name(settings.get(self.SOURCE)):
            known["base_model"] = teacher
        if source := public_name(settings.get("dataset")):
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
                for row in self.rows
                if row.name not in self.OTHERS
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
        source = public_name(settings.get("dataset"))
        return f" of {' '.join(filter(None, (source, settings.get('dataset_config'))))}" if source else ""

    @property
    def classes(self) -> list[GroupOutcome]:
        """What early exit does to each class, the class that loses most first; empty where nobody looked."""
        if len(self.rows) < len(self.report["rows"]):  # measured with other exit settings
            return []
        return [GroupOutcome(**outcome) for outcome in self.report.get("classes") or []]

    @property
    def full_depth(self) -> str:
        """What early exit is compared with."""
        return "full depth" if self.config.skip_gates is None else "full depth with skipping"

    def class_table(self) -> str:
        """A line per class, at most `SHOWN_CLASSES`."""
        lines = [
            [
                *(quoted(outcome.name), f"{outcome.rows:,}", f"{outcome.full_depth:.1%}"),
                *(f"{outcome.early_exit:.1%}", f"{outcome.mean_exit_layer:.2f}"),
            ]
            for outcome in self.classes[:SHOWN_CLASSES]
        ]
        columns = ["class", "rows", self.full_depth, "early exit", "mean exit layer"]
        return markdown_table(columns, lines) if lines else ""

    def class_note(self) -> str:
        """Where the classes are that the table has no room for."""
        more = len(self.classes) - SHOWN_CLASSES
        return f"{more} classes more are in `{self.FILE}`." if more > 0 else ""

    def who_pays(self) -> str:
        """Which class pays for early exit, as far as it was measured."""
        general = f"{'Early exit' if self.has_exits else 'A smaller model'} does not treat all classes alike"
        if not self.classes:
            return f"{general}: rare or subtle ones may lose more than the mean says. Measured here is the mean alone."
        worst = self.classes[0]
        if worst.early_exit >= worst.full_depth:
            return f"{general}. On these rows none lost right answers to it; rare or subtle ones may elsewhere."
        return (
            f"{general}: of {quoted(worst.name)}, {worst.full_depth:.1%} are answered right at {self.full_depth} and "
            f"{worst.early_exit:.1%} with early exit."
        )

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
        if self.early_exit_holds:
            columns["share of rows"] = [f"{share:.1%}" for share in self.rows[-1].exit_shares]
        return markdown_table(list(columns), list(zip(*columns.values(), strict=True)))

    def exit_note(self) -> str:
        """Which rows the columns of the exit table speak of."""
        notes = ["FLOPs are those of a text that leaves there and skips no layer, exits on the way included."]
        if None not in self.exit_metrics():
            notes.append(f"The {self.report['metric']} is on the rows held out for choosing settings.")
        if self.early_exit_holds:
            notes.append("Shares are on the validation rows.")
        elif self.config.exit_config is not None:
            notes.append("The exit settings were replaced after these measurements, so shares are not told.")
        else:
            notes.append("No exit settings are stored: choose some by calibration, or name a threshold.")
        return " ".join(notes)

    def stage_table(self) -> str:
        """A line per stage: steps, batch size, peak learning rate, losses, time, and the widths it left."""
        lines = []
        for name, record in self.report["stages"].items():
            widths = [record[key] for key in ("num_attention_heads", "intermediate_size") if key in record]
            rank = [record["embedding_rank"] or "full"] if "embedding_rank" in record else []
            steps = str(record.get("steps", ""))
            rate = f"{record['learning_rate']:g}" if "learning_rate" in record else ""
            losses = describe_losses(record.get("loss_weights", {}))
            minutes = f"{record['seconds'] / 60:.1f}" if "seconds" in record else ""
            batch_size = str(record.get("batch_size", ""))
            lines.append([name, steps, batch_size, rate, losses, minutes, ", ".join(map(str, [*widths, *rank]))])
        columns = ["stage", "steps", "batch size", "learning rate", "losses", "minutes"]
        columns += ["heads, neurons, embedding rank"]
        return markdown_table(columns, lines)


@dataclass(frozen=True)
class CompressionCard(ReportCard):
    """The card of a compressed model."""

    FILE = COMPRESSION
    SOURCE = "teacher"
    OTHERS = ("teacher", "assistant")
    PAPERS = ("costeff",)

    def what(self, source: str | None) -> str:
        """Slim, and how much smaller than its teacher."""
        teacher, slim = self.rows[0], self.rows[-1]
        return (
            f"A slim encoder classifier with exits after layers {', '.join(map(str, self.config.exit_layers))}: easy "
            f"texts leave early, hard ones run all layers.\nIt was made from {source or 'a local teacher'} by "
            "[COST-EFF](https://arxiv.org/abs/2210.15523) with\n`hf_costeff`: "
            f"{slim.parameters:,} parameters, {teacher.parameters / slim.parameters:.1f} times fewer than the teacher."
        )


@dataclass(frozen=True)
class SkippingCard(ReportCard):
    """The card of a model that was trained to skip layers."""

    FILE = SKIPPING
    SOURCE = "model"
    OTHERS = ("model as given",)
    PAPERS = ("smartbert", "costeff")

    def what(self, source: str | None) -> str:
        """How many layers, and the two ways to save some."""
        config, ways = self.config, []
        if config.skip_gates is not None:
            ways.append("a gate before each decides, text by text, whether to skip it")
        if self.has_exits:
            ways.append(f"easy texts leave early, after one of layers {', '.join(map(str, config.exit_layers))}")
        return (
            f"An encoder classifier of {config.num_hidden_layers} layers: {'; '.join(ways)}.\nIt was made from "
            f"{source or 'a local checkpoint'} by [SmartBERT](https://arxiv.org/abs/2303.09266) with\n"
            "`hf_costeff`."
        )

    @property
    def has_exits(self) -> bool:
        """As the report says: exits that were left out of training are in the model, with random weights."""
        return super().has_exits and self.report["exits_trained"]

    def skipping(self) -> str:
        """How many layers a text runs, and whether that depends on the text."""
        found = self.report["skipping"]
        return "" if found is None else SkipDiagnostics(**found).describe()


@dataclass(frozen=True)
class PruningCard(ReportCard):
    """The card of a model that was pruned block by block."""

    FILE = PRUNING
    SOURCE = "model"
    OTHERS = ("model as given", "pruned")
    PAPERS = ("blockpruning", "costeff")

    def what(self, source: str | None) -> str:
        """How much of its matrices is left, and in which form."""
        before, after = self.report["matrix_bytes"]
        left = "nothing is left of them" if not after else f"they take {before / after:.1f} times fewer bytes"
        exits = f", with exits after layers {', '.join(map(str, self.config.exit_layers))}" if self.has_exits else ""
        return (
            f"An encoder classifier of {self.config.num_hidden_layers} layers{exits}, whose matrices were pruned block "
            f"by block and packed: {left}.\nIt was made from {source or 'a local checkpoint'} by "
            "[block-structured\npruning](https://arxiv.org/abs/2009.08065) with `hf_costeff`."
        )


CARDS: tuple[type[ReportCard], ...] = (PruningCard, SkippingCard, CompressionCard)
"""By the report that lies in the folder, the first that is there: each works on what the next ones make."""


@dataclass(frozen=True)
class TrainingCard:
    """A card from what a Trainer knows at its end. A sentence whose measurement is missing is left out.

    Args:
        name: How the model is called where the card will be read.
        config: The model's.
        parameters: Everything counted.
        evaluation: The last logged metrics, `eval_exit_<layer>_<metric>` among them; empty if nobody looked.
        training: How it was trained, in a sentence.
        teacher: Name of the teacher; `None` if there was none.
        metadata: What `ModelCardData` takes: `license`, `language`, `base_model`, `datasets`.
    """

    name: str
    config: CostEffConfig
    parameters: int
    evaluation: Mapping[str, float]
    training: str
    teacher: str | None
    metadata: Mapping[str, Any]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that were logged for every exit."""
        prefix = f"eval_exit_{self.config.exit_layers[-1]}_"
        return [name.removeprefix(prefix) for name in self.evaluation if name.startswith(prefix)]

    def render(self) -> ModelCard:
        """The card, metadata and text."""
        settings = {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": list(TAGS)}
        teacher = public_name(self.teacher)
        linked = f"[{teacher}](https://huggingface.co/{teacher})" if teacher else "a local teacher"
        return ModelCard.from_template(
            ModelCardData(**settings, **({"metrics": self.metrics} if self.metrics else {}), **self.metadata),
            template_path=str(TEMPLATES / "training_card.md"),
            marker=MARKER,
            name=self.name,
            layers=self.config.num_hidden_layers,
            exit_layers=", ".join(map(str, self.config.exit_layers)),
            gated=self.config.skip_gates is not None,
            parameters=f"{self.parameters:,}",
            teacher=f", with {linked} as its teacher" if self.teacher is not None else "",
            use=how_to_use(self.name, self.config),
            exit_table=self.exit_table(),
            step=f"{self.evaluation.get('step', 0):,}",
            training=self.training,
            citation=citation("costeff"),
        )

    def exit_table(self) -> str:
        """A line per exit, a column per metric; empty if nothing was logged."""
        if not self.metrics:
            return ""
        flops = cumulative_flops(self.config, PAPER_SEQ_LENGTH)
        lines = [
            [
                *(str(layer), f"{flops[layer - 1] / 1e6:,.1f}M"),
                *(f"{self.evaluation[f'eval_exit_{layer}_{metric}']:.4f}" for metric in self.metrics),
            ]
            for layer in self.config.exit_layers
        ]
        return markdown_table(["exit after layer", f"FLOPs, {PAPER_SEQ_LENGTH} tokens", *self.metrics], lines)


def describe_losses(weights: Mapping[str, float]) -> str:
    """Names of the losses and their weights, those without weight left out.

    >>> describe_losses({"task_loss": 0.0, "soft_label_loss": 1.0, "representation_loss": 0.5})
    'soft_label_loss x 1, representation_loss x 0.5'
    """
    return ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight)


def citation(*papers: str) -> str:
    """What to cite, as a block of BibTeX.

    Args:
        papers: Names of files in `templates/citations`.
    """
    entries = ((TEMPLATES / "citations" / f"{paper}.bib").read_text(encoding="utf-8") for paper in papers)
    return f"```bibtex\n{''.join(entries)}```"


def how_to_use(name: str, config: CostEffConfig, pair: bool = False, exits: bool = True) -> str:
    """The three ways to load and ask the model."""
    uncalibrated = "False" if config.resolved_problem_type == REGRESSION or not exits else "0.5"
    early_exit = uncalibrated if config.exit_config is None else "True"
    return (
        (TEMPLATES / "use.md")
        .read_text(encoding="utf-8")
        .rstrip()
        .format(
            name=name,
            example='"a text", "and its pair"' if pair else '"a text"',
            early_exit=early_exit,
            runs="answers at full depth" + (" with skipping" if config.skip_gates else ""),
        )
    )


def describe_calibration(seen: dict[str, Any]) -> str:
    """What the exit settings were chosen for, what was seen, and what is promised, if anything.

    Args:
        seen: The `calibration` record of an [`ExitConfig`].
    """
    text = f"The settings were chosen by calibration. {describe_seen(seen)}"
    promise = seen.get("promise")
    if promise is None:
        return f"{text} That was seen on these rows; nothing is promised for others."
    return f"{text} {describe_promise(promise)}"


def write_model_card(folder: str | Path, name: str, license: str | None = None) -> None:
    """Write the card of a model folder, unless somebody has written one.

    A card that this function wrote before is written anew, so that name and exit settings are those of now; its licence
    stays.

    Args:
        folder: A saved model, with the report of its run or without.
        name: How the model is called where the card will be read.
        license: The Hub's identifier of a licence, e.g. `apache-2.0`; `None` states none that was not stated before.

    Raises:
        ValueError: If there is a card that somebody has written, and a licence to put into it.
    """
    folder = Path(folder)
    card = folder / CARD
    if is_written_by_hand(card):
        if license is not None:
            raise ValueError(f"{card} is your own card. Write `license: {license}` into its first lines instead.")
        return
    if license is None and card.exists():
        license = ModelCard.load(card).data.license
    kind = next((kind for kind in CARDS if (folder / kind.FILE).exists()), None)
    if kind is None:
        written = plain_card(name, folder)
    else:
        charts = [chart for chart in CHARTS if (folder / chart).exists()]
        written = kind(name, read_json(folder / kind.FILE), CostEffConfig.from_pretrained(folder), charts).render()
    written.data.license = license
    card.write_text(f"{str(written).rstrip()}\n", encoding="utf-8")
