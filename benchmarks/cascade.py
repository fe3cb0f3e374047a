"""CascadeBERT's claims on real models: cascade against exits and students, and difficulty-aware training.

    python benchmarks/cascade.py --task sst2 --data DIR --teacher DIR --pretrained DIR [--run runs/sst2-fast-42]

The last member is the fine-tuned `--teacher`. The first is the lowest `--layers` layers of `--pretrained`, which has
not seen the task, distilled from the teacher in three variants on the same rows:

    none            task and soft labels
    difficulty      the same with difficulty-aware regularisation on out-of-fold labels (--folds x --seeds)
    random          the same with those labels shuffled: the control

All are compared at equal counted FLOPs with students of `--student_layers` layers, distilled alike, used alone and as
the first members of cascades, and with `--run`, a finished run of benchmarks/real_run.py, its assistant and slim model
under entropy and under patience (PABEE's criterion on our exits), and its slim model as the first member of a cascade.
Thresholds are chosen on calibration rows. Differences between two ways of answering come with paired
bootstrap intervals on validation. Members are made from one model by distillation, so this does not test whether
complete models beat truncated ones.

Models are kept below --runs, and rows go to benchmarks/results/cascade-<task>-<seed>.json, so an interrupted run goes
on. Other settings are refused there.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from hf_costeff import CostEffCascade, CostEffTrainer, CostEffTrainingArguments, ExitConfig, convert_from_stock
from hf_costeff.calibration import ExitSearch, choose_exit_config
from hf_costeff.calibration_goals import UnreachableGoalError
from hf_costeff.cascade_costs import cascade_flops, member_flops
from hf_costeff.checkpoints import load_tokenizer
from hf_costeff.data import DataArguments, make_collator, prepare_data
from hf_costeff.difficulty import difficulty_labels, mark_hard_rows
from hf_costeff.distillation import bf16_pays, prepared, training_arguments
from hf_costeff.efficiency import measure_alternating
from hf_costeff.evaluation import collect_exit_logits, collect_member_logits, model_inputs
from hf_costeff.exit_quality import difficulty_inversion_score
from hf_costeff.exit_replay import ExitLogits, ExitReplay
from hf_costeff.metrics import METRICS, paired_bootstrap
from hf_costeff.report import describe_hardware
from real_run import METRIC, SPLITS
from results_file import RESULTS, ResultsFile

VARIANTS = ("none", "difficulty", "random")
TARGETS = (2.0, 3.0, 4.0, 6.0, 8.0)


class Bench:
    """One task: its rows, its teacher, and what is trained for it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher = AutoModelForSequenceClassification.from_pretrained(given.teacher).to(self.device).eval()
        self.bf16 = bf16_pays(self.device)
        self.tokenizer = load_tokenizer(given.pretrained)  # a stage of a run has none beside it
        self.collator = make_collator(self.tokenizer)
        self.folder = Path(given.runs) / f"cascade-{given.task}-{given.seed}"
        self.metric = METRIC.get(given.task, "accuracy")
        self.data = prepare_data(
            DataArguments(
                dataset=given.data,
                dataset_config=None if given.task == "own" else given.task,
                max_train_rows=given.train_rows,
                **SPLITS.get(given.task, {}),
            ),
            self.tokenizer,
            teacher_config=self.teacher.config,
            max_positions=convert_from_stock(self.teacher).config.longest_text,
        )
        self.function = METRICS[self.data.problem_type][self.metric]

    @cached_property
    def fast_teacher(self) -> PreTrainedModel:
        """The teacher with the attention that is fastest in training's precision."""
        return prepared(copy.deepcopy(self.teacher), self.device, self.bf16)

    def student(self, layers: int) -> PreTrainedModel:
        """The lowest layers of the pre-trained encoder with one fresh exit."""
        set_seed(self.given.seed)
        source = AutoModelForSequenceClassification.from_pretrained(
            self.given.pretrained,
            num_labels=self.data.num_labels,
            id2label=self.teacher.config.id2label,
            label2id=self.teacher.config.label2id,
            problem_type=self.data.problem_type,
        )
        whole = convert_from_stock(
            source, exit_layers=sorted({layers, source.config.num_hidden_layers}), exit_pooling="mean"
        )
        return prepared(whole.truncate(layers), self.device, self.bf16)

    def train(
        self, rows: Dataset, seed: int, folder: Path, *, layers: int, teacher: bool, **extra: Any
    ) -> PreTrainedModel:
        """A student trained on rows, with the teacher's soft labels half and half, or on true labels alone."""
        steps = max(1, int(self.given.epochs * len(rows) / 32))
        weights = {"task_weight": 0.5, "soft_label_weight": 0.5, "representation_weight": 0.0} if teacher else {}
        arguments = training_arguments(
            CostEffTrainingArguments,
            str(folder),
            steps=steps,
            learning_rate=self.given.learning_rate,
            batch_size=32,
            device=self.device,
            bf16=self.bf16,
            seed=seed,
            save_steps=max(1, steps // 3),
            save_total_limit=1,
            disable_tqdm=True,
            **weights,
            **extra,
        )
        trainer = CostEffTrainer(
            self.student(layers),
            arguments,
            teacher=self.fast_teacher if teacher else None,
            train_dataset=rows,
            data_collator=self.collator,
        )
        trainer.train(resume_from_checkpoint=True)
        return trainer.model.eval()

    def kept(self, name: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A model from an earlier run, or made now and kept."""
        folder = self.folder / name
        if not (folder / "config.json").exists():
            make().save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder).to(self.device).eval()

    @cached_property
    def hard(self) -> np.ndarray:
        """Out-of-fold difficulty of the training rows for the first member, learned on true labels alone."""
        train = partial(self.train, layers=self.given.layers, teacher=False)
        seeds = [self.given.seed + number for number in range(self.given.seeds)]
        settings = {name: vars(self.given)[name] for name in ("pretrained", "layers", "epochs", "learning_rate")}
        found = difficulty_labels(
            self.data.train,
            self.collator,
            train,
            self.folder / "labels",
            folds=self.given.folds,
            seeds=seeds,
            settings=settings,
        )
        return found.hard()

    def first_member(self, variant: str) -> PreTrainedModel:
        """The first member, distilled in one of the variants."""
        hard = self.hard if variant != "random" else np.random.default_rng(self.given.seed).permutation(self.hard)
        weight = 0.0 if variant == "none" else self.given.difficulty_weight
        soft = not self.given.true_labels_alone
        train = partial(self.train, layers=self.given.layers, teacher=soft, difficulty_weight=weight)
        rows, working = mark_hard_rows(self.data.train, hard), self.folder / f"{variant}.working"
        return self.kept(variant, lambda: train(rows, self.given.seed, working))

    def plain_student(self, layers: int) -> PreTrainedModel:
        if layers == self.given.layers:
            return self.first_member("none")
        train = partial(self.train, layers=layers, teacher=True)
        working = self.folder / f"student-{layers}.working"
        return self.kept(f"student-{layers}", lambda: train(self.data.train, self.given.seed, working))

    # Figures

    @cached_property
    def reference(self) -> dict[str, Any]:
        """The teacher: logits on validation, and FLOPs per row on both kinds of rows."""
        costs = {}
        for part in ("calibration", "validation"):
            lengths = torch.tensor([len(ids) for ids in getattr(self.data, part)["input_ids"]])
            costs[part] = float(member_flops(self.teacher.config, torch.ones(len(lengths)).long(), lengths).mean())
        return {"records": collect_exit_logits(self.teacher, self.data.validation, self.collator), **costs}

    def records(self, model: PreTrainedModel) -> tuple[ExitLogits, ExitLogits]:
        collect = collect_member_logits if isinstance(model, CostEffCascade) else collect_exit_logits
        parts = (self.data.calibration, self.data.validation)
        return tuple(collect(model, rows, self.collator, show_progress=False) for rows in parts)

    def at_speedups(self, name: str, model: PreTrainedModel, criterion: str | None = None) -> dict[str, Any]:
        """Metric on validation at each counted speed-up over the teacher, thresholds from calibration rows."""
        calibration, validation = self.records(model)
        replay, found = ExitReplay(validation, model.config), {}
        for target in TARGETS:
            try:
                settings = choose_exit_config(
                    calibration,
                    model.config,
                    self.metric,
                    target_speedup=target,
                    reference_flops=self.reference["calibration"],
                    search=ExitSearch(criterion),
                )
            except UnreachableGoalError as error:
                found[f"{target:g}x"] = {"unreachable": str(error)}
                continue
            exits = replay.at(settings)
            found[f"{target:g}x"] = {
                "metric": exits.metric(self.metric),
                "speedup": self.reference["validation"] / exits.mean_flops,
                "exit_shares": exits.exit_shares,
                "difference_to_teacher_95": self.difference(exits.logits),
            }
            self.keep_answers(f"{name} at {target:g}x", exits.logits)
        return found

    def keep_answers(self, name: str, logits: torch.Tensor) -> None:
        """For comparisons between ways of answering."""
        folder = self.folder / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", logits.numpy())

    def difference(self, logits: torch.Tensor) -> tuple[float, float, float]:
        teacher = self.reference["records"]
        return paired_bootstrap(self.function, logits.numpy(), teacher.logits[:, 0].numpy(), teacher.known_labels())

    def first_member_figures(self, variant: str) -> dict[str, Any]:
        """Metric and DIS of a first member alone, and what its cascade keeps."""
        model, name = self.first_member(variant), f"first-{variant}"
        records = collect_exit_logits(model, self.data.validation, self.collator, show_progress=False)
        logits, labels = records.logits[:, -1], records.known_labels()
        self.keep_answers(f"{name} alone", logits)
        return {
            "metric": self.function(logits.numpy(), labels),
            "dis": difficulty_inversion_score(logits, labels, self.data.problem_type),
            "cascade": self.at_speedups(name, CostEffCascade.from_members([model, self.teacher])),
        }

    def student_figures(self, layers: int) -> dict[str, Any]:
        """A student alone: its metric, and its speed-up on the same texts; and what it is worth as a first member."""
        model, name = self.plain_student(layers), f"student-{layers}"
        records = collect_exit_logits(model, self.data.validation, self.collator, show_progress=False)
        logits = records.logits[:, -1]
        spent = member_flops(model.config, torch.full_like(records.seq_lengths, layers), records.seq_lengths).mean()
        self.keep_answers(f"{name} alone", logits)
        return {
            "metric": self.function(logits.numpy(), records.known_labels()),
            "speedup": self.reference["validation"] / float(spent),
            "difference_to_teacher_95": self.difference(logits),
            "cascade": self.at_speedups(name, CostEffCascade.from_members([model, self.teacher])),
        }

    def comparisons(self) -> dict[str, Any]:
        """Two ways of answering on the same validation rows: difference of the metric with a 95% interval.

        Difficulty and its control against none, alone (with the DIS) and in the cascade; every other way against the
        cascade without difficulty, at the same target.
        """
        answers = {file.stem: np.load(file) for file in sorted((self.folder / "answers").glob("*.npy"))}
        labels, problem_type = self.reference["records"].known_labels(), self.data.problem_type

        def dis(logits: np.ndarray, truth: np.ndarray) -> float:
            score = difficulty_inversion_score(torch.from_numpy(logits), truth, problem_type)
            return np.nan if score is None else score

        found = {}
        for name, logits in answers.items():
            way, _, where = name.partition(" ")
            base = f"first-none {where}"
            if way == "first-none" or base not in answers:
                continue
            if where != "alone" or way.startswith("first-"):
                found[f"{name}: metric"] = paired_bootstrap(self.function, logits, answers[base], labels)
            if where == "alone" and way.startswith("first-"):
                found[f"{name}: DIS"] = paired_bootstrap(dis, logits, answers[base], labels)
        return found

    def formula_and_clock(self) -> dict[str, Any]:
        """Counted and measured speed-up at batch 32 against big / (small + (1 - p) big), when half of the rows go."""
        model = self.first_member("difficulty")
        length = min(64, self.data.max_length)
        cascade = CostEffCascade.from_members([model, self.teacher]).eval()
        tokens = [token for ids in self.data.validation["input_ids"] for token in ids]
        blocks = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)[: self.given.timed_rows]
        fixed = [{"input_ids": part.to(self.device)} for part in blocks.split(32)]
        rows = self.data.validation.select(range(min(self.given.timed_rows, len(self.data.validation))))
        order = np.argsort([len(ids) for ids in rows["input_ids"]])
        chunks = [order[start : start + 32] for start in range(0, len(order), 32)]
        real = [model_inputs(cascade, self.collator([rows[int(row)] for row in chunk])) for chunk in chunks]
        return {
            "fixed_length": self._speedups(cascade, fixed),
            "real_lengths": self._speedups(cascade, real),
            "hardware": describe_hardware(self.device),
        }

    def _speedups(self, cascade: CostEffCascade, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        confidence = torch.cat([cascade.predict(**batch, early_exit=1.0).confidence for batch in batches])
        classes = cascade.config.num_labels
        threshold = (float(confidence.median()) - 1 / classes) / (1 - 1 / classes)
        settings = ExitConfig("confidence", threshold=min(max(threshold, 1e-6), 1 - 1e-6))
        predictions = [cascade.predict(**batch, early_exit=settings) for batch in batches]
        layers = torch.cat([prediction.layers_run for prediction in predictions]).cpu()
        lengths = torch.cat([self._lengths(batch) for batch in batches])
        small, big = (
            float(member_flops(member, torch.full_like(lengths, member.num_hidden_layers), lengths).mean())
            for member in cascade.config.members
        )
        leaving = float((layers[:, 1] == 0).double().mean())
        runs = {
            "last": lambda: [cascade.predict(**batch, early_exit=False) for batch in batches],
            "cascade": lambda: [cascade.predict(**batch, early_exit=settings) for batch in batches],
        }
        times = measure_alternating(runs, warmup=2, repeats=11)
        ratios = np.divide(times["last"].times_ms, times["cascade"].times_ms)
        formula = big / (small + (1 - leaving) * big)
        return {
            "leaving": leaving,
            "formula": formula,
            "counted": big / float(cascade_flops(cascade.config, layers, lengths).mean()),
            "measured": float(np.median(ratios)),
            "measured_quartiles": np.percentile(ratios, [25, 75]).tolist(),
            "measured_over_formula": float(np.median(ratios)) / formula,
        }

    def _lengths(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows, columns = batch["input_ids"].shape
        return batch["attention_mask"].sum(1).cpu() if "attention_mask" in batch else torch.full((rows,), columns)


def jobs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what makes its figures."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for variant in VARIANTS:
        found[f"first-{variant}"] = partial(bench.first_member_figures, variant)
    for layers in bench.given.student_layers:
        found[f"student-{layers}"] = partial(bench.student_figures, layers)
    if bench.given.run is not None:
        for model, folder in (("assistant", bench.given.run / "stages/assistant"), ("slim", bench.given.run)):
            for criterion in ("entropy", "patience"):
                found[f"{model}-{criterion}"] = partial(exits_figures, bench, f"{model}-{criterion}", folder, criterion)
        found["cascade-slim"] = partial(slim_cascade_figures, bench)
    found["formula-and-clock"] = bench.formula_and_clock
    return found


def load(bench: Bench, folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder).to(bench.device).eval()


def exits_figures(bench: Bench, name: str, folder: Path, criterion: str) -> dict[str, Any]:
    return bench.at_speedups(name, load(bench, folder), criterion)


def slim_cascade_figures(bench: Bench) -> dict[str, Any]:
    return bench.at_speedups("cascade-slim", CostEffCascade.from_members([load(bench, bench.given.run), bench.teacher]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="A GLUE task, or `own` for a data set without configurations.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True, help="The fine-tuned classifier: the last member.")
    parser.add_argument("--pretrained", required=True, help="The encoder that it came from, without the task.")
    parser.add_argument("--run", type=Path, help="A finished run of benchmarks/real_run.py with the same teacher.")
    parser.add_argument("--layers", type=int, default=1, help="Of the first member.")
    parser.add_argument("--student_layers", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--train_rows", type=int, default=10_000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--difficulty_weight", type=float, default=0.5)
    parser.add_argument(
        "--true_labels_alone", action="store_true", help="The first member learns nothing from the teacher."
    )
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--timed_rows", type=int, default=256)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    bench = Bench(given)
    output = given.results / f"cascade-{given.task}-{given.seed}.json"
    unimportant = ("data", "runs", "results", "teacher", "pretrained", "run", "timed_rows")
    settings = {name: value for name, value in vars(given).items() if name not in unimportant}
    results = ResultsFile(output, settings)
    teacher = bench.reference["records"]
    about = {
        "metric": bench.function(teacher.logits[:, 0].numpy(), teacher.known_labels()),
        "name": bench.metric,
        "rows": {name: len(part) for name, part in bench.data.raw.items()},
    }
    results.add("teacher", about)
    for name, job in jobs(bench).items():
        if name not in results.rows:
            results.add(name, job())
    results.add("comparisons", bench.comparisons())


if __name__ == "__main__":
    main()
