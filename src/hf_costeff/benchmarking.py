"""What a slim model gains on this machine's clock, beside what its FLOPs promise, setting by setting.

Everybody answers the same batches in turn, batch by batch, so that a noisy machine favours nobody; ratios are taken
within a round.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from .charts import new_figure
from .efficiency import layer_flops, mean_flops, measure_alternating, stock_flops
from .evaluation import Collator, Contender, collect_exit_logits
from .exit_criteria import REGRESSION, SINGLE_LABEL, ExitConfig, answers, same_answers
from .exit_replay import ExitLogits, ExitReplay, stored_settings
from .modeling_costeff import MODEL_INPUTS, CostEffForSequenceClassification
from .report import describe_hardware

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REAL = 0
"""In place of a length: every row at its own."""
PEAK_SIZE = 512
NEVER = 1e-9
"""A threshold that no row of a trained model passes; every exit is asked."""
GAIN = 1.02
"""A median ratio below this, or one whose lower quartile is not above 1, counts as no gain."""
TEACHER, FULL, EARLY = "teacher", "slim, full depth", "slim, early exit"


@dataclass(frozen=True)
class BenchmarkGrid:
    """Which settings are measured: every combination of these.

    Args:
        devices: As torch names them.
        batch_sizes: Rows that run together.
        lengths: Tokens per row; 0 is the rows' own lengths.
        threads: CPU threads; one setting per number on the CPU, and the first alone elsewhere.
        precisions: Keys of `PRECISIONS`; float16 is left out on the CPU.
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
            if is_cpu and precision == "float16":
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
        mean_exit_layer: 1-based.
        agreement: Share of the rows answered as in float32 on the CPU; `None` for regression.
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
    mean_exit_layer: float
    agreement: float | None
    peak_memory_mb: float | None

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
        ValueError: A device that cannot be used, or a length beyond what a model can take.
    """
    grid = grid or BenchmarkGrid()
    longest = min(found.config.max_position_embeddings for found in (model, teacher))
    if max(grid.lengths) > longest:
        raise ValueError(f"`lengths` has {max(grid.lengths)} tokens, and the models take {longest}.")
    found: list[Measurement] = []
    exact = _placed(model, teacher, "cpu", "float32")
    placed: tuple[Any, ...] = ()
    contenders: list[Contender] = []
    peak = 0.0
    for setting in grid.settings():
        device, precision, threads, length, batch_size = setting
        with threads_set(threads):
            if placed != (device, precision, threads):
                contenders, peak = _placed(model, teacher, device, precision), matmul_peak(device, precision)
                placed = (device, precision, threads)
            rows = rows_of_length(dataset, length, grid.rows if batch_size > 1 else max(1, grid.rows // 4))
            batches = [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
            same = [_agreement(*pair, batches) for pair in zip(contenders, exact, strict=True)]
            measured = _measure(contenders, batches, grid.rounds, peak, setting)
            found += [dataclasses.replace(one, agreement=share) for one, share in zip(measured, same, strict=True)]
    return found


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


def _placed(
    model: CostEffForSequenceClassification, teacher: PreTrainedModel, device: str, precision: str
) -> list[Contender]:
    slim, large = (on_device(own, device, precision) for own in (model, teacher))
    nothing = ExitLogits(torch.zeros(1, 1, 1), torch.ones(1, dtype=torch.long), None)
    contenders = [Contender(TEACHER, large, nothing), Contender(FULL, slim, nothing)]
    if model.config.exit_config is not None:
        contenders.append(Contender(EARLY, slim, nothing, stored_settings(model.config)))
    return contenders


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
    reference, reference_flops = times[TEACHER], 0.0
    found = []
    for contender in contenders:
        layer, flops = _spent(contender, batches)
        reference_flops = reference_flops or flops
        per_round = [sum(values) for values in times[contender.name]]
        ratios = [sum(base) / own for base, own in zip(reference, per_round, strict=True)]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        each = [value for values in times[contender.name] for value in values]
        p95, p99 = np.quantile(each, [0.95, 0.99], method="inverted_cdf").tolist()
        seconds = statistics.median(per_round) / 1e3
        found.append(
            Measurement(
                *(contender.name, device, precision, threads, length, batch_size),
                *(statistics.median(each), p95, p99, texts / seconds, middle, (low, high)),
                flops_ratio=reference_flops / flops,
                peak_share=flops * texts / seconds / peak,
                mean_exit_layer=layer,
                agreement=None,
                peak_memory_mb=memory[contender.name],
            )
        )
    return found


def _agreement(contender: Contender, exact: Contender, batches: Sequence[Mapping[str, Tensor]]) -> float | None:
    config = exact.model.config
    problem_type = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)
    if problem_type == REGRESSION:
        return None
    ours, theirs = (
        torch.cat([answers(one.answer(batch).logits.float().cpu(), problem_type) for batch in batches])
        for one in (contender, exact)
    )
    return float(same_answers(ours, theirs, problem_type).float().mean())


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


def _spent(contender: Contender, batches: Sequence[Mapping[str, Tensor]]) -> tuple[float, float]:
    """Mean exit layer, and FLOPs per text, with padding counted as run."""
    lengths = [batch["input_ids"].shape[1] for batch in batches for _ in batch["input_ids"]]
    config = contender.model.config
    if not isinstance(contender.model, CostEffForSequenceClassification):
        flops = {length: stock_flops(config, length) for length in set(lengths)}
        return float(config.num_hidden_layers), statistics.mean(flops[length] for length in lengths)
    layers = torch.cat([contender.answer(batch).exit_layer.cpu() for batch in batches])
    checked = [] if contender.settings is None else contender.settings.checked_exits
    return float(layers.float().mean()), mean_flops(config, layers, lengths, checked)


def matmul_peak(device: str, precision: str) -> float:
    """FLOPs per second of a large matrix product here, the best of a few.

    Args:
        device: As torch names it.
        precision: A key of `PRECISIONS`.
    """
    one = torch.ones(PEAK_SIZE, PEAK_SIZE, device=device, dtype=PRECISIONS[precision])
    runs = [measure_alternating({"product": lambda: one @ one}, warmup=1, repeats=1)["product"] for _ in range(5)]
    return 2 * PEAK_SIZE**3 / (min(run.median_ms for run in runs) / 1e3)


def choose_exits(
    model: CostEffForSequenceClassification, dataset: Dataset, collator: Collator, grid: BenchmarkGrid | None = None
) -> ExitConfig:
    """Store in the model which of its checked exits save more time than they cost, on this machine.

    What a layer and a question take is measured, with everybody at full depth and with every exit asked and nobody
    leaving; layers share the former by their FLOPs. Where rows leave follows from their logits. Then the exits whose
    removal saves the most are left out one by one, until none does. Thresholds stay as they are, and what was seen or
    promised when they were chosen is dropped, since it held for other exits.

    Args:
        model: With saved exit settings, which are replaced.
        dataset: Tokenized rows, on which nothing will be reported.
        collator: Pads rows to a batch.
        grid: Its first device, precision, batch size and thread count are those that the model will serve with.

    Returns:
        The settings, as stored.

    Raises:
        ValueError: Without saved settings, or for a device that cannot be used.
    """
    grid = grid or BenchmarkGrid()
    settings = stored_settings(model.config)
    size = grid.batch_sizes[0]
    rows = rows_of_length(dataset, REAL, max(grid.rows // 4, size))
    batches = [collator(rows[start : start + size]) for start in range(0, len(rows), size)]
    with threads_set(grid.threads[0]):
        placed = on_device(model, grid.devices[0], grid.precisions[0])
        layer_ms, question_ms = _times_of_parts(placed, batches, grid.rounds)
        records = collect_exit_logits(placed, dataset, collator, show_progress=False)
    replay = ExitReplay(records, model.config)
    chosen = [layer for layer in model.config.exit_layers[:-1] if settings.is_checked(layer)]

    def cost(checked: Sequence[int]) -> float:
        exits = replay.at(dataclasses.replace(settings, checked_exits=list(checked)))
        return expected_ms(exits.exit_layers, checked, layer_ms, question_ms)

    while chosen:
        best = min(([layer for layer in chosen if layer != left_out] for left_out in chosen), key=cost)
        if cost(best) >= cost(chosen):
            break
        chosen = best
    stored = dataclasses.replace(settings, checked_exits=chosen, calibration=None)
    model.config.exit_config = stored.to_dict()
    return stored


def on_device(model: Any, device: str, precision: str) -> Any:
    """A copy of a model where and how it is to be measured, in eval mode.

    Args:
        model: Left as it is.
        device: As torch names it.
        precision: A key of `PRECISIONS`.

    Raises:
        ValueError: For a device that cannot be used.
    """
    try:
        return copy.deepcopy(model).to(device, PRECISIONS[precision]).eval()
    except (RuntimeError, AssertionError) as error:  # torch has no one error for a device that is not there
        raise ValueError(f"Device {device!r} cannot be used here: {error}") from error


def _times_of_parts(
    model: CostEffForSequenceClassification, batches: Sequence[Mapping[str, Tensor]], rounds: int
) -> tuple[list[float], float]:
    """Milliseconds of a batch in each layer, and of asking one exit."""
    nothing = ExitLogits(torch.zeros(1, 1, 1), torch.ones(1, dtype=torch.long), None)
    never = ExitConfig(criterion="entropy_nats", threshold=NEVER)
    if model.config.resolved_problem_type == "regression":
        never = ExitConfig(criterion="patience", patience=1, tolerance=0.0)
    runs: dict[str, Callable[[], Any]] = {
        "full": partial(Contender("full", model, nothing).answer_all, batches),
        "asked": partial(Contender("asked", model, nothing, never).answer_all, batches),
    }
    times = measure_alternating(runs, warmup=1, repeats=rounds)
    config = model.config
    seq = max(batch["input_ids"].shape[1] for batch in batches)
    full_ms = times["full"].median_ms / len(batches)
    weights = [layer_flops(config, layer, seq) + 1 for layer in range(1, config.num_hidden_layers + 1)]
    asked = max(1, len(config.exit_layers) - 1)
    question_ms = max(0.0, times["asked"].median_ms - times["full"].median_ms) / len(batches) / asked
    return [full_ms * weight / sum(weights) for weight in weights], question_ms


def expected_ms(
    exit_layers: Tensor, checked_exits: Sequence[int], layer_ms: Sequence[float], question_ms: float
) -> float:
    """Mean time of a row, from the time of each layer and of each question on its way.

    Args:
        exit_layers: 1-based layer that each row leaves after, shape (rows,).
        checked_exits: 1-based layers whose exit is asked, without the last.
        layer_ms: Milliseconds of each layer.
        question_ms: Milliseconds of one question.

    Example: one row leaves after layer 1, one runs both layers; both are asked once.

        >>> expected_ms(torch.tensor([1, 2]), [1], layer_ms=[4.0, 6.0], question_ms=1.0)
        8.0
    """
    depths = torch.arange(1, len(layer_ms) + 1)
    ran = (exit_layers[:, None] >= depths).double()
    total = ran @ torch.tensor(layer_ms, dtype=torch.double)
    asked = sum((exit_layers >= layer).double() for layer in checked_exits)
    return float((total + question_ms * asked).mean())


def write_benchmark(found: Sequence[Measurement], folder: str | Path) -> str:
    """Write `benchmark.json` and, with matplotlib, charts; returns the table of [`format_benchmark`].

    Args:
        found: From [`benchmark`].
        folder: Made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hardware = describe_hardware(torch.device(found[-1].device))
    report = {"hardware": hardware, "measurements": [dataclasses.asdict(one) for one in found]}
    (folder / "benchmark.json").write_text(json.dumps(report, indent=1))
    draw_speedup_chart(folder / "speedup_by_batch.png", found)
    draw_latency_chart(folder / "latency_by_batch.png", found)
    return format_benchmark(found)


def draw_latency_chart(path: Path, found: Sequence[Measurement]) -> bool:
    """Time of a text against batch size, in the first device, precision, thread count and length.

    Args:
        path: PNG to write.
        found: From [`benchmark`].

    Returns:
        Whether the chart was drawn; without matplotlib it is left out with one message.
    """
    return _draw_by_batch(path, found, "ms per text", lambda one: 1e3 / one.texts_per_second)


def draw_speedup_chart(path: Path, found: Sequence[Measurement]) -> bool:
    """Speed-up against batch size in the same setting, with the FLOPs ratio dashed; otherwise as latency's."""
    return _draw_by_batch(
        path, found, "times as fast as the teacher (dashed: FLOPs)", lambda one: one.speedup, with_flops=True
    )


def _draw_by_batch(
    path: Path,
    found: Sequence[Measurement],
    label: str,
    value: Callable[[Measurement], float],
    with_flops: bool = False,
) -> bool:
    figure = new_figure(7.5, 4.8)
    if figure is None:
        return False
    axes = figure.add_subplot()
    first = found[0]
    shown = [one for one in found if _place(one) == _place(first)]
    for number, name in enumerate(dict.fromkeys(one.name for one in shown)):
        own = sorted((one for one in shown if one.name == name), key=lambda one: one.batch_size)
        places = [one.batch_size for one in own]
        axes.plot(places, [value(one) for one in own], marker="o", color=f"C{number}", label=name)
        if with_flops:
            axes.plot(places, [one.flops_ratio for one in own], linestyle="--", color=f"C{number}")
    sizes = sorted({one.batch_size for one in shown})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_xlabel("batch size")
    axes.set_ylabel(label)
    device, precision, threads, length = _place(first)
    axes.set_title(f"{device}, {precision}; threads: {threads}; tokens: {length or 'own'}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def _place(one: Measurement) -> tuple[str, str, int, int]:
    return one.device, one.precision, one.threads, one.length


def format_benchmark(found: Sequence[Measurement]) -> str:
    """A Markdown table, one line per contender and setting, which says where there is no gain.

    Args:
        found: From [`benchmark`].
    """
    lines = [
        "| device | precision | threads | tokens | batch | model | ms, median | p95 | p99 | texts/s | faster by "
        "| quartiles | fewer FLOPs | of peak | mean exit layer | same answers | |",
        "|" + "---|" * 17,
    ]
    for one in found:
        low, high = one.speedup_quartiles
        verdict = "" if one.name == TEACHER or one.gains else "no gain here"
        same = "" if one.agreement is None else f"{one.agreement:.1%}"
        lines.append(
            f"| {one.device} | {one.precision} | {one.threads} | {one.length or 'own'} | {one.batch_size} | {one.name} "
            f"| {one.median_ms:.2f} | {one.p95_ms:.2f} | {one.p99_ms:.2f} | {one.texts_per_second:.0f} "
            f"| {one.speedup:.2f}x | {low:.2f}..{high:.2f} | {one.flops_ratio:.2f}x | {one.peak_share:.0%} "
            f"| {one.mean_exit_layer:.2f} | {same} | {verdict} |"
        )
    return "\n".join(lines)
