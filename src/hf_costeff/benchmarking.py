"""What a slim model gains on this machine's clock, beside what its FLOPs promise, setting by setting.

Everybody answers the same batches in turn, batch by batch, so that a noisy machine favours nobody; ratios are taken
within a round.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from .configuration_costeff import require_no_gates
from .conversion import convert_config
from .efficiency import mean_flops, measure_alternating, ratio, stock_flops
from .evaluation import Collator, Contender
from .exit_criteria import REGRESSION, ExitConfig, answers, same_answers
from .exit_replay import ExitLogits, stored_settings
from .exiting_rows import ExitPlan
from .export import export_onnx, quantize_graph, write_stock_graph
from .metrics import compute_metrics, default_metric
from .modeling_costeff import MODEL_INPUTS, CostEffForSequenceClassification, CostEffPrediction
from .onnx_runner import Runner, open_session

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"
"""Not torch but the ONNX export."""
PRECISIONS = (*DTYPES, INT8)
CPU_ALONE, NOT_CPU = (INT8,), ("float16",)
REAL = 0
"""In place of a length: every row at its own."""
PEAK_SIZE = 512
GAIN = 1.02
"""A median ratio below this, or one whose lower quartile is not above 1, counts as no gain."""
NOTHING = ExitLogits(torch.zeros(1, 1, 1), torch.ones(1, dtype=torch.long), None)
"""In place of a contender's logits, where only its time matters."""
TEACHER, FULL, EARLY = "teacher", "slim, full depth", "slim, early exit"
SKIPPING = f"{FULL} with skipping"
"""In place of `FULL`, for a model with gates; its early exit skips too."""


@dataclass(frozen=True)
class BenchmarkGrid:
    """Which settings are measured: every combination of these.

    Args:
        devices: As torch names them.
        batch_sizes: Rows that run together.
        lengths: Tokens per row; 0 is the rows' own lengths.
        threads: CPU threads; one setting per number on the CPU, and the first alone elsewhere.
        precisions: Some of `PRECISIONS`; float16 is left out on the CPU, and int8 elsewhere.
        rows: Rows that are answered per round, at most; fewer at batch 1.
        rounds: Timed rounds, at least 2.

    Raises:
        ValueError: For a number below its least, or an unknown precision.
    """

    devices: Sequence[str] = ("cpu",)
    batch_sizes: Sequence[int] = (1, 8, 32, 128)
    lengths: Sequence[int] = (REAL, 32, 128)
    threads: Sequence[int] = (1,)
    precisions: Sequence[str] = ("float32",)
    rows: int = 128
    rounds: int = 7

    def __post_init__(self) -> None:
        for name, least in (("batch_sizes", 1), ("lengths", 0), ("threads", 1)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"`{name}` is {list(values)}. Give at least one number, each {least} or more.")
        for name, least in (("rows", 1), ("rounds", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least {least}.")
        if not self.precisions or (unknown := set(self.precisions) - set(PRECISIONS)):
            found = list(self.precisions) if not self.precisions else sorted(unknown)
            raise ValueError(f"`precisions` has {found}. Give some of {', '.join(PRECISIONS)}.")

    def settings(self) -> Iterator[tuple[str, str, int, int, int]]:
        """Device, precision, threads, length and batch size of every setting."""
        for device, precision in product(self.devices, self.precisions):
            is_cpu = device == "cpu"
            if precision in (NOT_CPU if is_cpu else CPU_ALONE):
                continue
            for count in self.threads if is_cpu else self.threads[:1]:
                for length, batch_size in product(self.lengths, self.batch_sizes):
                    yield device, precision, count, length, batch_size


@dataclass(frozen=True)
class Measurement:
    """How one contender did in one setting.

    Args:
        name: Who.
        device: Where.
        precision: Of the weights.
        threads: CPU threads.
        length: Tokens per row; 0: the rows' own.
        batch_size: Rows that ran together.
        median_ms: Of a batch.
        p95_ms: Nearest rank, of a batch.
        p99_ms: The same.
        texts_per_second: At the median round.
        speedup: Time of the teacher over this one's, median over rounds.
        speedup_quartiles: Lower and upper, over rounds.
        flops_ratio: FLOPs of the teacher over this one's, padding counted.
        peak_share: FLOPs per second over those of this machine's matrix product in the same setting.
        exit_shares: Share of the timed rows that left after each layer, shallow first.
        score: The problem type's default metric on all rows, in this precision; `None` without labels.
        score_change: The same less that in float32 on the CPU.
        agreement: Share of all rows with the same answer as in float32 on the CPU; `None` for regression.
        peak_memory_mb: On a GPU, of the device while this one ran; on the CPU, of the whole process so far, or `None`
            where the system does not say.
    """

    name: str
    device: str
    precision: str
    threads: int
    length: int
    batch_size: int
    median_ms: float
    p95_ms: float
    p99_ms: float
    texts_per_second: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    flops_ratio: float
    peak_share: float
    exit_shares: tuple[float, ...]
    score: float | None
    score_change: float | None
    agreement: float | None
    peak_memory_mb: float | None

    @property
    def mean_exit_layer(self) -> float:
        """1-based."""
        return sum(layer * share for layer, share in enumerate(self.exit_shares, start=1))

    @property
    def gains(self) -> bool:
        """Whether it is faster than the teacher, beyond the spread of the rounds."""
        return self.speedup >= GAIN and self.speedup_quartiles[0] > 1


def benchmark(
    model: CostEffForSequenceClassification,
    teacher: PreTrainedModel,
    dataset: Dataset,
    collator: Collator,
    grid: BenchmarkGrid | None = None,
) -> list[Measurement]:
    """Time a slim model and its teacher on the same rows, in every setting of a grid.

    Args:
        model: A multi-exit classifier; early exit is measured if it has saved settings.
        teacher: Stock classifier that it came from.
        dataset: Tokenized rows.
        collator: Pads rows to a batch.
        grid: What to measure; `None`: [`BenchmarkGrid`]'s own.

    Returns:
        Teacher, full depth and, with saved settings, early exit, for one setting after the other.

    Raises:
        ValueError: A device that cannot be used, a length beyond what a model can take, or int8 for a model with skip
            gates, which does not export.
    """
    grid = grid or BenchmarkGrid()
    if INT8 in grid.precisions:
        require_no_gates(model.config, "int8")
    longest = min(model.config.longest_text, convert_config(teacher.config).longest_text)
    if max(grid.lengths) > longest:
        raise ValueError(
            f"`lengths` has {max(grid.lengths)} tokens, and the models take {longest}. Leave out what is longer; 0 "
            "stands for the rows' own lengths."
        )
    found: list[Measurement] = []
    placed: tuple[Any, ...] = ()
    contenders: list[Contender] = []
    effects: list[PrecisionEffect] = []
    peak = 0.0
    with TemporaryDirectory() as folder:
        all_rows = AllRows.of(dataset, collator, model.config.resolved_problem_type)
        exact = [all_rows.logits(one) for one in _placed(model, teacher, "cpu", "float32", 1, collator, folder)]
        for setting in grid.settings():
            device, precision, threads, length, batch_size = setting
            with threads_set(threads):
                if placed != (device, precision, threads):
                    placed = (device, precision, threads)
                    contenders = _placed(model, teacher, *placed, collator, folder)
                    effects = [all_rows.effect(*pair) for pair in zip(contenders, exact, strict=True)]
                    peak = matmul_peak(device, precision)
                rows = rows_of_length(dataset, length, grid.rows if batch_size > 1 else max(1, grid.rows // 4))
                batches = batches_of(rows, collator, batch_size)
                measured = _measure(contenders, batches, grid.rounds, peak, setting)
            for one, own in zip(measured, effects, strict=True):
                found.append(dataclasses.replace(one, **dataclasses.asdict(own)))
    return found


def batches_of(rows: Sequence[dict[str, Any]], collator: Collator, size: int) -> list[Mapping[str, Tensor]]:
    """Rows as batches of up to `size`, in order, each of shape (batch, seq)."""
    return [collator(list(rows[start : start + size])) for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class PrecisionEffect:
    """What a precision changes in the answers; the fields are those of [`Measurement`]."""

    score: float | None
    score_change: float | None
    agreement: float | None


@dataclass(frozen=True)
class AllRows:
    """All rows, sorted by length into batches.

    Args:
        batches: Shape (batch, seq) each.
        labels: In the same order; `None` if they are not known.
        problem_type: As upstream's `config.problem_type`.
    """

    batches: list[Mapping[str, Tensor]]
    labels: np.ndarray | None
    problem_type: str

    @classmethod
    def of(cls, dataset: Dataset, collator: Collator, problem_type: str) -> AllRows:
        """The rows of a tokenized data set."""
        lengths = [len(ids) for ids in dataset["input_ids"]]
        ordered = dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
        labels = np.array(ordered["labels"]) if "labels" in dataset.column_names else None
        return cls(batches_of(rows_of_length(ordered, REAL, len(ordered)), collator, 32), labels, problem_type)

    def logits(self, contender: Contender) -> Tensor:
        """What a contender answers to all rows, shape (rows, labels)."""
        return torch.cat([contender.answer(batch).logits.float().cpu() for batch in self.batches])

    def effect(self, contender: Contender, exact: Tensor) -> PrecisionEffect:
        """How a contender's answers differ from exact logits of shape (rows, labels)."""
        logits, agreement = self.logits(contender), None
        if self.problem_type != REGRESSION:
            ours, theirs = (answers(values, self.problem_type) for values in (logits, exact))
            agreement = float(same_answers(ours, theirs, self.problem_type).float().mean())
        if self.labels is None:
            return PrecisionEffect(None, None, agreement)
        name = default_metric(self.problem_type)
        score, before = (
            compute_metrics(values.numpy(), self.labels, self.problem_type)[name] for values in (logits, exact)
        )
        return PrecisionEffect(score, score - before, agreement)


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Inside, torch uses this many CPU threads.

    Raises:
        ValueError: For a number below 1.
    """
    if threads < 1:
        raise ValueError(f"`threads` is {threads}. It must be at least 1.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class OnnxContender(Contender):
    """A contender that answers through graphs in 8 bits.

    Args:
        answer_batch: From a batch of padded rows to logits, and exit layers where there are exits.
    """

    answer_batch: Callable[[Mapping[str, Tensor]], CostEffPrediction] | None = None

    def answer(self, batch: Mapping[str, Tensor]) -> CostEffPrediction:
        """Run the graphs on a batch."""
        assert self.answer_batch is not None
        return self.answer_batch(batch)


def _placed(
    model: CostEffForSequenceClassification,
    teacher: PreTrainedModel,
    device: str,
    precision: str,
    threads: int,
    collator: Collator,
    folder: str,
) -> list[Contender]:
    settings: dict[str, ExitConfig | None] = {FULL if model.config.skip_gates is None else SKIPPING: None}
    if model.config.exit_config is not None:
        settings[EARLY] = stored_settings(model.config)
    if precision == INT8:
        return _in_int8(model, teacher, settings, threads, collator, Path(folder))
    slim, large = (on_device(own, device, precision) for own in (model, teacher))
    return [
        Contender(TEACHER, large, NOTHING),
        *(Contender(name, slim, NOTHING, own) for name, own in settings.items()),
    ]


def _in_int8(
    model: CostEffForSequenceClassification,
    teacher: PreTrainedModel,
    settings: Mapping[str, ExitConfig | None],
    threads: int,
    collator: Collator,
    folder: Path,
) -> list[Contender]:
    """Graphs are written once, sessions made for every thread count."""
    tokenizer = getattr(collator, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "int8 needs a collator with a tokenizer. Make it with hf_costeff.data.make_collator(tokenizer)."
        )
    large, slim = folder / "teacher.onnx", folder / "slim"
    if not large.exists():
        export_onnx(model, tokenizer, slim, int8=True)
        made = [name for name in MODEL_INPUTS if name in tokenizer.model_input_names]
        write_stock_graph(teacher, made, folder / "teacher_fp32.onnx")
        quantize_graph(folder / "teacher_fp32.onnx", large)
    session, runner = open_session(large, threads), Runner(slim, threads=threads)
    names = [one.name for one in session.get_inputs()]

    def one_graph(batch: Mapping[str, Tensor]) -> CostEffPrediction:
        types = torch.zeros_like(batch["input_ids"])  # where the rows came without
        (logits,) = session.run(None, {name: batch.get(name, types).numpy() for name in names})
        return CostEffPrediction(logits=torch.from_numpy(logits))

    def segments(batch: Mapping[str, Tensor], early_exit: Any) -> CostEffPrediction:
        given = {name: batch[name].tolist() for name in ("input_ids", "token_type_ids") if name in batch}
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        rows = [{name: values[row][:length] for name, values in given.items()} for row, length in enumerate(lengths)]
        found = runner.predict_tokens(rows, early_exit, batch_size=len(rows))
        return CostEffPrediction(
            logits=torch.tensor([answer["logits"] for answer in found]),
            exit_layer=torch.tensor([answer["exit_layer"] for answer in found]),
        )

    slims = [
        OnnxContender(
            *(name, model, NOTHING, own),
            answer_batch=partial(segments, early_exit=False if own is None else own.to_dict()),
        )
        for name, own in settings.items()
    ]
    return [OnnxContender(TEACHER, teacher, NOTHING, answer_batch=one_graph), *slims]


def rows_of_length(dataset: Dataset, length: int, count: int) -> list[dict[str, Any]]:
    """Rows for the clock: as they are, or cut and continued with the rows after them to one length.

    The last token, which ends a text, stays the last.

    Args:
        dataset: Tokenized rows.
        length: Tokens per row; 0: as they are.
        count: How many, at most.
    """
    names = [name for name in MODEL_INPUTS if name in dataset.column_names]
    rows = [{name: row[name] for name in names} for row in dataset.select(range(min(count, len(dataset))))]
    if length == REAL:
        return rows
    made = []
    for start in range(len(rows)):
        own: dict[str, list[int]] = {name: [] for name in names}
        while len(own["input_ids"]) < length:
            row = rows[start % len(rows)]
            for name in names:
                own[name] += row[name][:-1] if len(row[name]) > 1 else row[name]
            start += 1
        made.append({name: [*values[: length - 1], row[name][-1]] for name, values in own.items()})
    return made


def _measure(
    contenders: Sequence[Contender], batches: Sequence[Mapping[str, Tensor]], rounds: int, peak: float, setting: Any
) -> list[Measurement]:
    device, precision, threads, length, batch_size = setting
    times: dict[str, list[list[float]]] = {contender.name: [] for contender in contenders}
    memory = {contender.name: _peak_memory_mb(contender, batches, device) for contender in contenders}  # warms up too
    for _ in range(rounds):
        for values in times.values():
            values.append([])
        for batch in batches:
            runs = {contender.name: partial(contender.answer, batch) for contender in contenders}
            for name, latency in measure_alternating(runs, warmup=0, repeats=1).items():
                times[name][-1].append(latency.median_ms)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    per_round = {name: [sum(values) for values in rounds_] for name, rounds_ in times.items()}
    reference_flops = 0.0
    found = []
    for contender in contenders:
        shares, flops = _spent(contender, batches)
        reference_flops = reference_flops or flops
        own = per_round[contender.name]
        faster = ratio(per_round[TEACHER], own)
        each = [value for values in times[contender.name] for value in values]
        p95, p99 = np.quantile(each, [0.95, 0.99], method="inverted_cdf").tolist()
        seconds = statistics.median(own) / 1e3
        found.append(
            Measurement(
                *(contender.name, device, precision, threads, length, batch_size),
                *(statistics.median(each), p95, p99, texts / seconds),
                *(faster.median, (faster.lower_quartile, faster.upper_quartile)),
                flops_ratio=reference_flops / flops,
                peak_share=flops * texts / seconds / peak,
                exit_shares=shares,
                score=None,
                score_change=None,
                agreement=None,
                peak_memory_mb=memory[contender.name],
            )
        )
    return found


def _peak_memory_mb(contender: Contender, batches: Sequence[Mapping[str, Tensor]], device: str) -> float | None:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    contender.answer_all(batches)
    if on_gpu:
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _spent(contender: Contender, batches: Sequence[Mapping[str, Tensor]]) -> tuple[tuple[float, ...], float]:
    """Share of the rows that left after each layer, and FLOPs per text, with padding counted as run."""
    lengths = [batch["input_ids"].shape[1] for batch in batches for _ in batch["input_ids"]]
    config, depth = contender.model.config, contender.model.config.num_hidden_layers
    if not isinstance(contender.model, CostEffForSequenceClassification):
        flops = {length: stock_flops(config, length) for length in set(lengths)}
        return (0.0,) * (depth - 1) + (1.0,), statistics.mean(flops[length] for length in lengths)
    found = [contender.answer(batch) for batch in batches]
    layers = torch.cat([prediction.exit_layer.cpu() for prediction in found])
    skipped = None
    if found[0].skipped_layers is not None:
        skipped = torch.cat([prediction.skipped_layers.cpu() for prediction in found])
    stops = ExitPlan.make(contender.settings, config.exit_layers, config.resolved_problem_type).stops
    shares = (torch.bincount(layers, minlength=depth + 1)[1:] / len(layers)).tolist()
    return tuple(shares), mean_flops(config, layers, lengths, stops, skipped)


def matmul_peak(device: str, precision: str) -> float:
    """FLOPs per second of a large matrix product here, the best of a few.

    Args:
        device: As torch names it.
        precision: One of `PRECISIONS`; for int8, which torch cannot multiply in on every CPU, that of float32.
    """
    one = torch.ones(PEAK_SIZE, PEAK_SIZE, device=device, dtype=DTYPES.get(precision, torch.float32))
    runs = [measure_alternating({"product": lambda: one @ one}, warmup=1, repeats=1)["product"] for _ in range(5)]
    return 2 * PEAK_SIZE**3 / (min(run.median_ms for run in runs) / 1e3)


def on_device(model: Any, device: str, precision: str) -> Any:
    """A copy of a model where and how it is to be measured, in eval mode.

    Args:
        model: Left as it is.
        device: As torch names it.
        precision: A key of `DTYPES`.

    Raises:
        ValueError: For a device that cannot be used.
    """
    try:
        return copy.deepcopy(model).to(device, DTYPES[precision]).eval()
    except (RuntimeError, AssertionError) as error:  # torch has no one error for a device that is not there
        raise ValueError(f"Device {device!r} cannot be used here: {error}") from error
