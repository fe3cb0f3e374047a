"""Block pruning from end to end: penalise, prune, train under the masks, pack, measure; in resumable stages.

    penalty -> prune -> retrain -> pack

Ratios share the penalised model: another ratio in the same folder starts at pruning.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .block_pruning import EMBEDDINGS, BlockMasks, BlockShape, compute_block_importance, prune_blocks, zero_blocks
from .block_training import BlockPenalty, MaskedTraining
from .checkpoints import load_classifier, load_tokenizer
from .conversion import convert_from_stock
from .data import DataArguments, prepare_data
from .distillation import random_batches
from .evaluation import Contender, ReportRow, collect_exit_logits, format_table, model_inputs, report_rows
from .exit_criteria import answers
from .losses import task_loss
from .mask_files import load_masks, save_masks
from .model_card import write_model_card
from .modeling_costeff import CostEffForSequenceClassification
from .packed_linear import DENSE
from .packing import choose_layouts, pack, packed_linears
from .recipes import IMPORTANCE_ROWS, Phase, check_ranges
from .regularizer import Regularizer
from .report import PRUNING
from .staged_run import Stage, StagedRun, settings_key, settings_of_run
from .teacher import check_same_labels
from .training_args import CostEffTrainingArguments

MASKS = "masks.safetensors"
MAGNITUDE, TAYLOR = "magnitude", "taylor"
OF_PRUNING = (
    *("ratio", "threshold", "importance", "across_matrices", "allow_empty"),
    *("retrain_epochs", "retrain_learning_rate"),
)


@dataclass
class BlockPruningArguments:
    """What to prune, in which blocks, how far, and how it is trained."""

    model: str = field(metadata={"help": "A multi-exit model, or a fine-tuned classifier: a Hub id or a local folder."})
    output_dir: str = field(metadata={"help": "Where the packed model and the stages of the run go."})
    teacher: str | None = field(
        default=None, metadata={"help": "Learn from this classifier's answers; default: from the true labels."}
    )
    ratio: float | None = field(default=None, metadata={"help": "Share of the blocks to prune. Default: 0.5."})
    threshold: float | None = field(default=None, metadata={"help": "Prune blocks of a smaller norm, instead."})
    importance: str | None = field(
        default=None,
        metadata={
            "help": "Rank blocks by magnitude (the paper's) or taylor. Default: taylor; a threshold is a magnitude."
        },
    )
    across_matrices: bool = field(default=False, metadata={"help": "One budget for all matrices together."})
    allow_empty: bool = field(default=False, metadata={"help": "A matrix may lose all its blocks."})
    rows: int | None = field(default=None, metadata={"help": "Rows of a block. Default: 1."})
    columns: int | None = field(default=None, metadata={"help": "Columns of a block."})
    row_slabs: int | None = field(default=None, metadata={"help": "Cut the rows into so many slabs, instead of rows."})
    column_slabs: int | None = field(
        default=None, metadata={"help": "Cut the columns into so many slabs. Default: 4, if no size is given."}
    )
    balanced: bool = field(default=False, metadata={"help": "Every band of blocks keeps the same number of them."})
    embeddings: bool = field(default=False, metadata={"help": "Prune the embeddings too; they are stored whole."})
    strength: float | None = field(
        default=None, metadata={"help": "Of the penalty, or of proximal steps; 0 trains without. Default: 30."}
    )
    reweighted: bool = field(default=True, metadata={"help": "Pull weak blocks harder; False is plain group Lasso."})
    proximal: bool = field(default=False, metadata={"help": "Shrink blocks after each step; for short runs."})
    refresh_epochs: float = field(default=1.0, metadata={"help": "Take the penalty's weights anew so often."})
    penalty_epochs: float = field(default=4.0, metadata={"help": "Training under the penalty; 0 leaves it out."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Under the penalty."})
    retrain_epochs: float = field(default=4.0, metadata={"help": "Training under the masks; 0 leaves it out."})
    retrain_learning_rate: float = field(
        default=3e-4, metadata={"help": "Under the masks, where much has to be learnt anew."}
    )
    batch_size: int = field(default=32, metadata={"help": "Rows per optimizer step."})
    metric: str | None = field(default=None, metadata={"help": "Metric to choose by. Default: by problem type."})
    seed: int = field(default=42, metadata={"help": "Of order, dropout and new weights."})

    def __post_init__(self) -> None:
        if self.ratio is None and self.threshold is None:
            self.ratio = 0.5
        if self.importance not in (None, MAGNITUDE, TAYLOR):
            raise ValueError(f"`importance` is {self.importance!r}. It must be {MAGNITUDE} or {TAYLOR}.")
        if self.importance == TAYLOR and self.threshold is not None:
            raise ValueError("A `threshold` is a magnitude, and `importance` is 'taylor'. Leave one out.")
        if self.importance is None:
            self.importance = TAYLOR if self.threshold is None else MAGNITUDE
        if (self.rows, self.columns, self.row_slabs, self.column_slabs) == (None,) * 4:
            self.column_slabs = 4
        if not self.penalty_epochs and (self.strength or self.proximal):
            given = f"`strength` is {self.strength:g}" if self.strength else "`proximal` is set"
            raise ValueError(f"{given}, and `penalty_epochs` is 0: nothing trains under a penalty. Leave one out.")
        if self.strength is None:
            self.strength = 30.0 if self.penalty_epochs else 0.0
        least = {"penalty_epochs": 0, "retrain_epochs": 0, "batch_size": 1, "seed": 0}
        check_ranges(self, least, above_zero=("learning_rate", "retrain_learning_rate"))
        self.blocks()

    def blocks(self) -> BlockShape:
        """How the matrices are cut."""
        return BlockShape(self.rows, self.columns, self.row_slabs, self.column_slabs, self.balanced)


@dataclass(frozen=True)
class BlockPruningResult:
    """Where the packed model is and what became of it.

    Args:
        model_path: Folder of the model, loadable with `from_pretrained`.
        rows: Report lines on validation, at full depth: what was given; the pruned model with full matrices; packed.
        metric: The metric that checkpoints were chosen by.
        compression: Weights of the pruned matrices divided by those that stay; `None` if none does.
        matrix_bytes: Bytes of those matrices in the file, before and after, indices included.
        layouts: How many packed layers run in which layout.
    """

    model_path: Path
    rows: list[ReportRow]
    metric: str
    compression: float | None
    matrix_bytes: tuple[int, int]
    layouts: dict[str, int]

    def describe(self) -> str:
        """The result in words, with the table, and where the model is."""
        return f"{self.summary()}\n\nThe packed model is in {self.model_path}."

    def summary(self) -> str:
        """The result in words, with the table; of no folder."""
        given, full, packed = self.rows
        before, after = self.matrix_bytes
        layouts = ", ".join(f"{count} {layout}" for layout, count in self.layouts.items()) or "none is left"
        fewer = "nothing is left"
        if after and self.compression is not None:
            fewer = f"{self.compression:.2f} times fewer weights, {before / after:.2f} times fewer bytes"
        faster = full.ms_per_text["32"] / packed.ms_per_text["32"]
        lines = [
            f"On validation {self.metric} is {given.metrics[self.metric]:.4f} ({given.name}) and "
            f"{packed.metrics[self.metric]:.4f} ({packed.name}).",
            f"Pruned matrices: {fewer}.",
            f"Layers by layout: {layouts}. In batches of 32, packing makes the pruned model {faster:.2f} times as fast "
            "here.",
        ]
        if set(self.layouts) == {DENSE}:
            lines.append("No packed layout beats dense matrices here, so what is left of them runs dense.")
        return "\n".join(lines) + f"\n\n{format_table(self.rows, self.metric)}"


def block_prune(
    arguments: BlockPruningArguments,
    data: DataArguments | datasets.Dataset | datasets.DatasetDict,
) -> BlockPruningResult:
    """Prune a model block by block, train it under the masks, and save it packed.

    A stock classifier gets one exit, after its last layer, which is trained with the rest. A multi-exit model keeps
    all its exits; its exit settings are dropped, so calibrate it again. A run that was killed goes on where it stopped.

    Args:
        arguments: What to prune and how.
        data: Where the rows come from, or the rows themselves.

    Returns:
        The packed model's folder, and what was lost and gained.

    Raises:
        ValueError: For anything that cannot work, before training starts where that can be known.
    """
    return BlockPruning(arguments, data).run()


class BlockPruning(StagedRun):
    """One run. [`block_prune`] is the way in."""

    def __init__(
        self, arguments: BlockPruningArguments, data: DataArguments | datasets.Dataset | datasets.DatasetDict
    ) -> None:
        """Load the model and the rows, and prune once as a trial, so that what cannot work is known before training."""
        super().__init__(arguments.output_dir, arguments.seed)
        self.arguments = arguments
        self.rows_from = vars(data) if isinstance(data, DataArguments) else {}
        self.given = self._prepared(load_classifier(arguments.model, dtype=torch.float32))
        tokenizer = load_tokenizer(arguments.model)
        self.teacher = self._load_teacher(arguments.teacher, tokenizer)
        if isinstance(self.given, CostEffForSequenceClassification):
            self.start = copy.deepcopy(self.given)  # which the report is to measure as it came
        elif not arguments.penalty_epochs and not arguments.retrain_epochs:
            raise ValueError(
                "`penalty_epochs` and `retrain_epochs` are 0, so the exit that a stock classifier gets would stay as "
                "it was drawn. Train it in one of them, or give a multi-exit model."
            )
        elif arguments.importance == TAYLOR and not arguments.penalty_epochs:
            raise ValueError(
                "`penalty_epochs` is 0, so the exit that a stock classifier gets would be as it was drawn when blocks "
                "are ranked, and `importance` 'taylor' looks at its mistakes. Train first, or set `importance` to "
                "'magnitude'."
            )
        else:
            torch.manual_seed(arguments.seed)
            self.start = convert_from_stock(self.given, exit_layers=[self.given.config.num_hidden_layers])
        self._prune(self.start)
        if self.teacher is not None:
            check_same_labels(self.teacher.config, self.start.config)
        self.penalty = BlockPenalty(
            arguments.blocks(),
            cast(float, arguments.strength),
            reweighted=arguments.reweighted,
            refresh_epochs=arguments.refresh_epochs,
            proximal=arguments.proximal,
            embeddings=arguments.embeddings,
        )
        rows = prepare_data(
            data,
            tokenizer,
            teacher_config=self.given.config,
            max_positions=self.start.config.longest_text,
        )
        self._take_rows(rows, tokenizer, arguments.metric)
        learns = arguments.penalty_epochs or arguments.retrain_epochs or arguments.importance == TAYLOR
        if learns:
            self._require_answers(self.teacher)

    def run(self) -> BlockPruningResult:
        """Go through the stages that are not done yet, then pack and report."""
        self._label_calibration(self.teacher)
        key = settings_key(self.arguments, OF_PRUNING)
        prune, retrain = f"prune-{key}", f"retrain-{key}"
        stages = [
            Stage.of_model("penalty", self._penalise),
            Stage(prune, self._choose_blocks),
            Stage.of_model(retrain, lambda: self._retrain(retrain, self._masks(prune))),
        ]
        settings = settings_of_run(self.arguments, self.data, self.given, self.teacher, without=OF_PRUNING)
        self._go_through(stages, settings)
        return self._report(self._load(retrain), self._masks(prune), stages)

    def _prune(self, model: Any, scores: dict[str, Tensor] | None = None) -> BlockMasks:
        wanted = self.arguments
        return prune_blocks(
            model,
            wanted.blocks(),
            ratio=wanted.ratio,
            threshold=wanted.threshold,
            scores=scores,
            across_matrices=wanted.across_matrices,
            embeddings=wanted.embeddings,
            allow_empty=wanted.allow_empty,
        )

    def _choose_blocks(self) -> tuple[Callable[[Path], Any], dict[str, Any]]:
        model = self._load("penalty")
        masks = self._prune(model, self._taylor_scores(model) if self.arguments.importance == TAYLOR else None)
        record = {
            "compression": _finite(masks.compression),
            **{name: getattr(self.arguments, name) for name in OF_PRUNING},
        }
        return lambda folder: save_masks(masks, folder / MASKS), record

    def _taylor_scores(self, model: Any) -> dict[str, Tensor]:
        """Of the blocks, on training rows and their labels, or what the teacher says where they have none."""
        wanted = self.arguments
        batches = random_batches(
            self.data.train,
            self.collator,
            rows=IMPORTANCE_ROWS,
            batch_size=wanted.batch_size,
            device=self.device,
            seed=wanted.seed,
            description="Importance of the blocks",
        )
        return compute_block_importance(model, wanted.blocks(), batches, self._loss_of_labels, wanted.embeddings)

    def _loss_of_labels(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        across = False if self.arguments.across_matrices else None  # layers compete: none is scaled by its depth
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            exit_logits = model(**model_inputs(model, batch), gradient_equilibrium=across).exit_logits
            labels = batch["labels"] if "labels" in batch else self._answers_of_teacher(batch)
        return task_loss(exit_logits, labels, self.data.problem_type)

    @torch.no_grad()
    def _answers_of_teacher(self, batch: dict[str, Tensor]) -> Tensor:
        teacher = cast(PreTrainedModel, self.teacher)
        return answers(teacher(**model_inputs(teacher, batch)).logits, self.data.problem_type)

    def _masks(self, stage: str) -> BlockMasks:
        return load_masks(self.store.files(stage) / MASKS)

    def _penalise(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        phase = Phase(self.arguments.penalty_epochs, self.arguments.learning_rate)
        return self._train("penalty", self.start, phase, self.penalty)

    def _retrain(self, stage: str, masks: BlockMasks) -> tuple[PreTrainedModel, dict[str, Any]]:
        phase = Phase(self.arguments.retrain_epochs, self.arguments.retrain_learning_rate)
        return self._train(stage, zero_blocks(self._load("penalty"), masks), phase, MaskedTraining(masks), best=True)

    def _train(
        self, stage: str, model: Any, phase: Phase, regularizer: Regularizer, best: bool = False
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        if not phase.steps(len(self.data.train), self.arguments.batch_size):
            return model, {"steps": 0}
        gated = model.config.skip_gates is not None
        same_width = self.teacher is not None and self.teacher.config.hidden_size == model.config.hidden_size
        arguments = self._training_arguments(
            CostEffTrainingArguments,
            stage,
            phase,
            batch_size=self.arguments.batch_size,
            best_by=f"mean_exit_{self.metric}" if best else None,
            representation_weight=float(same_width and not gated),  # a layer that is skipped cannot be like another
            hard_gate_ratio=1.0,  # rows of a gated model go on skipping as they do
        )
        return self._train_multi_exit(model, arguments, self.teacher, regularizer)

    # The report

    def _contenders(self, pruned: PreTrainedModel, packed: PreTrainedModel) -> list[Contender]:
        models = {"model as given": self.given, "pruned": pruned, "pruned and packed": packed}
        rows = self.data.validation
        return [
            Contender(name, model, collect_exit_logits(model, rows, self.collator, description=f"Validating: {name}"))
            for name, model in models.items()
        ]

    def _report(self, pruned: PreTrainedModel, masks: BlockMasks, stages: list[Stage]) -> BlockPruningResult:
        folder = self.output_dir
        for each in (pruned, self.given):
            each.set_attn_implementation("sdpa")
        packed = pack(pruned, masks)
        layouts = choose_layouts(packed)
        contenders = self._contenders(pruned, packed)
        full = {name: 4 * rows * columns for name, (rows, columns) in masks.shapes.items()}
        stored = {name: size for name, size in full.items() if name in EMBEDDINGS}
        stored |= {name: layer.values.nbytes + layer.index.nbytes for name, layer in packed_linears(packed.costeff)}
        result = BlockPruningResult(
            folder,
            report_rows(contenders, self.data.validation, self.collator, self.data.problem_type),
            self.metric,
            _finite(masks.compression),
            (sum(full.values()), sum(stored.values())),
            dict(Counter(next(iter(times)) for times in layouts.values())),
        )
        facts = {
            **{name: value for name, value in dataclasses.asdict(result).items() if name != "model_path"},
            "layer_milliseconds": layouts,
            "exit_config": None,
            **self._facts(stages, {**self.rows_from, **vars(self.arguments)}),
        }
        packed.save_pretrained(folder)  # not before the figures beside it can be written too
        self.tokenizer.save_pretrained(folder)
        (folder / PRUNING).write_text(json.dumps(facts, indent=1))
        (folder / "SUMMARY.md").write_text(f"# What came out\n\n{result.summary()}\n")
        write_model_card(folder, folder.resolve().name)
        return result


def _finite(compression: float) -> float | None:
    return compression if math.isfinite(compression) else None  # JSON has no infinity
