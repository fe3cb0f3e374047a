"""Run models over a data set and tell what they kept and what they save: metric, size, FLOPs, measured time."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import ExitSearch, choose_exit_config
from .calibration_goals import GOALS, check_goal
from .cascade_costs import member_flops
from .checkpoints import public_name
from .checksums import fingerprint
from .configuration_costeff import check_skip_layers, problem_type_of
from .conversion import longest_text
from .efficiency import (
    PAPER_SEQ_LENGTH,
    count_parameters,
    measure_alternating,
    stock_flops,
)
from .exit_criteria import ExitConfig
from .exit_quality import difficulty_inversion_score
from .exit_replay import ExitLogits, ExitReplay, ExitTimes, ReferenceLogits
from .markdown import markdown_table
from .metrics import METRICS, compute_metrics, default_metric
from .modeling_cascade import CostEffCascade
from .modeling_costeff import MODEL_INPUTS, CostEffForSequenceClassification, inference
from .promises import weights_fingerprint
from .skip_gates import is_skipped
from .stages import train_keys
from .teacher import check_same_labels

logger = logging.get_logger(__name__)
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
TIMED_BATCHES = (32, 1)


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model's forward takes from a batch, labels left out, on the model's device."""
    accepted = set(inspect.signature(model.forward).parameters) - {"labels"}
    return {name: tensor.to(model.device) for name, tensor in batch.items() if name in accepted}


def collect_exit_logits(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Collator,
    *,
    batch_size: int = 64,
    description: str = "Evaluating",
    show_progress: bool = True,
    skip_layers: bool | None = None,
) -> ExitLogits:
    """Logits of every exit on every row, in the data set's order, and the layers that its gates let a row skip.

    Rows are run sorted by length, so that little is padded.

    Args:
        model: A multi-exit model, or a stock classifier (one exit).
        dataset: Tokenized rows with `input_ids` and, if known, `labels`.
        collator: Pads a list of rows to a batch.
        batch_size: Rows per forward.
        description: Shown at the progress bar.
        show_progress: Whether to show one.
        skip_layers: Whether rows skip layers, as for `predict`; `None`: if the model has gates.

    Returns:
        Logits in single precision on the host.

    Raises:
        ValueError: `skip_layers=True` without gates.
    """
    check_skip_layers(skip_layers, model.config)
    gated = getattr(model.config, "skip_gates", None) is not None
    settings = {"use_gates": False} if gated and skip_layers is False else {}

    def ask(batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = model(**model_inputs(model, batch), **settings)
        logits = torch.stack(outputs.exit_logits if "exit_logits" in outputs else (outputs.logits,), dim=1)
        chances = outputs.get("skip_probabilities")
        if chances is None:
            return (logits,)
        return logits, is_skipped(torch.stack(chances, dim=1), model.config.skip_threshold)

    with inference(model):
        logits, *skipped = _asked(dataset, collator, batch_size, ask, description if show_progress else None)
    return ExitLogits(logits, _lengths(dataset), _labels(dataset), skipped=skipped[0] if skipped else None)


def _lengths(dataset: Dataset) -> Tensor:
    return torch.tensor([len(ids) for ids in dataset["input_ids"]])


def _labels(dataset: Dataset) -> Tensor | None:
    return torch.tensor(np.array(dataset["labels"])) if "labels" in dataset.column_names else None


def _asked(
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    ask: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    description: str | None,
) -> list[Tensor]:
    """What `ask` says of batches, longest rows first, in the data set's order; a description shows a progress bar."""
    order = _lengths(dataset).argsort(descending=True)
    gathered = []
    for rows in tqdm(order.split(batch_size), desc=description, disable=description is None, leave=False):
        found = ask(collator([dataset[row] for row in rows.tolist()]))
        gathered.append([said.float().cpu() if said.is_floating_point() else said.cpu() for said in found])
    return [torch.cat(said)[order.argsort()] for said in zip(*gathered, strict=True)]


def _one_each(
    model: PreTrainedModel, dataset: Dataset | Sequence[Dataset], collator: Collator | Sequence[Collator]
) -> tuple[list[Dataset], list[Collator]]:
    """A data set and a collator for every member of a cascade, and one of each for a single model."""
    members = len(model.config.members) if isinstance(model, CostEffCascade) else 1
    datasets = [dataset] * members if isinstance(dataset, Dataset) else list(dataset)
    collators = [collator] * members if callable(collator) else list(collator)
    if not len(datasets) == len(collators) == members or len({len(rows) for rows in datasets}) != 1:
        models = f"a cascade of {members} members" if isinstance(model, CostEffCascade) else "a single model"
        raise ValueError(
            f"There are data sets of {[len(rows) for rows in datasets]} rows and {len(collators)} collators for "
            f"{models}. Give one for all, or one per member, of the same rows."
        )
    return datasets, collators


def collect_member_logits(
    cascade: CostEffCascade,
    dataset: Dataset | Sequence[Dataset],
    collator: Collator | Sequence[Collator],
    *,
    batch_size: int = 64,
    description: str = "Evaluating",
    show_progress: bool = True,
) -> ExitLogits:
    """What every member of a cascade says of every row under its own exit settings, and what that costs.

    To calibration the members are what exits are to a single model.

    Args:
        cascade: The model.
        dataset: Tokenized rows, or one such data set per member where tokenizers differ, with the same rows.
        collator: Pads a list of rows to a batch; one, or one per member.
        batch_size: Rows per forward.
        description: Shown at the progress bars.
        show_progress: Whether to show them.

    Returns:
        Logits of all members, shape (rows, members, labels), in the cascade's order of labels. The lengths are those of
        the last member.

    Raises:
        ValueError: Data sets that are not one for all or one per member, of equally many rows.
    """
    datasets, collators = _one_each(cascade, dataset, collator)
    logits, flops = [], []
    with inference(cascade):
        for number, (rows, pad) in enumerate(zip(datasets, collators, strict=True), start=1):

            def ask(batch: Mapping[str, Tensor], number: int = number) -> tuple[Tensor, ...]:
                inputs = {name: batch[name].to(cascade.device) for name in MODEL_INPUTS if name in batch}
                return cascade.ask_member(number, inputs)

            shown = f"{description}, member {number}" if show_progress else None
            said, layers = _asked(rows, pad, batch_size, ask, shown)
            logits.append(said)
            flops.append(member_flops(cascade.config.members[number - 1], layers, _lengths(rows)))
    last = datasets[-1]
    return ExitLogits(torch.stack(logits, dim=1), _lengths(last), _labels(last), member_flops=torch.stack(flops, dim=1))


@dataclass(frozen=True)
class ExitReliability:
    """How good an exit is, and how well its confidence tells right answers from wrong ones.

    Args:
        member: Member of a cascade, counted from 1; 1 for a single model.
        layer: 1-based layer of the exit; the depth of a stock member.
        metric: The task metric if every row were answered here; of a gated model every row that runs this layer, and
            `None` if there is none.
        discrimination: [`difficulty_inversion_score`] of these answers, in 0..1.
    """

    member: int
    layer: int
    metric: float | None
    discrimination: float | None


def exit_reliability(
    model: PreTrainedModel,
    dataset: Dataset | Sequence[Dataset],
    collator: Collator | Sequence[Collator],
    *,
    metric: str | None = None,
    show_progress: bool = True,
) -> list[ExitReliability]:
    """Every exit of every member on labelled rows, smallest member and shallowest exit first.

    Args:
        model: A cascade, a multi-exit model or a stock classifier.
        dataset: As for [`collect_member_logits`].
        collator: As for [`collect_member_logits`].
        metric: See `hf_costeff.metrics.METRICS`; `None`: the default of the problem type.
        show_progress: Whether to show progress bars.
    """
    is_cascade = isinstance(model, CostEffCascade)
    members = [model.member(index) for index in range(len(model.members))] if is_cascade else [model]
    orders = model.config.label_positions if is_cascade else [None]
    datasets, collators = _one_each(model, dataset, collator)
    problem_type = problem_type_of(model.config)
    function = METRICS[problem_type][metric or default_metric(problem_type)]
    found = []
    for number, (member, order, rows, pad) in enumerate(
        zip(members, orders, datasets, collators, strict=True), start=1
    ):
        shown = f"Member {number}"
        records = collect_exit_logits(member, rows, pad, description=shown, show_progress=show_progress)
        labels = records.known_labels()
        layers = getattr(member.config, "exit_layers", None) or [member.config.num_hidden_layers]
        answered = records.asked_at(layers)
        for layer, logits, own in zip(layers, records.logits.unbind(1), answered.T, strict=True):
            said, truth = logits[own] if order is None else logits[own][:, order], labels[own]
            value = function(said.numpy(), truth) if own.any() else None
            area = difficulty_inversion_score(said, truth, problem_type) if own.any() else None
            found.append(ExitReliability(number, layer, value, area))
    return found


def calibrate(
    model: CostEffForSequenceClassification | CostEffCascade,
    dataset: Dataset | Sequence[Dataset],
    collator: Collator | Sequence[Collator],
    *,
    metric: str | None = None,
    max_accuracy_drop: float | None = None,
    max_metric_drop: float | None = None,
    max_disagreement: float | None = None,
    target_speedup: float | None = None,
    max_megaflops: float | None = None,
    max_latency_ms: float | None = None,
    reference: PreTrainedModel | None = None,
    reference_flops: float | None = None,
    exit_times: ExitTimes | None = None,
    guarantee: bool = False,
    delta: float = 0.1,
    criterion: str | None = None,
    per_exit: bool = False,
    fit_temperatures: bool = True,
    checked_exits: list[int] | None = None,
    trained_keys: Collection[int] | None = None,
    show_progress: bool = True,
) -> ExitConfig:
    """Choose exit settings on held-out rows from one goal and store them in the model, for `predict(early_exit=True)`.

    Args:
        model: A multi-exit model; its `config.exit_config` is replaced. With gates, every row takes its own path, and
            full depth is that of the gated model. Or a cascade, whose members stand for exits, in
            the order of cost, with the exit settings they have of their own: calibrate those first. Its full depth
            is the last member.
        dataset: Tokenized rows which no training saw, with `labels`, but for `max_disagreement`. For a cascade whose
            members have tokenizers of their own, one data set per member, of the same rows.
        collator: Pads a list of rows to a batch; as the data sets one, or one per member.
        metric: What is reported and what `max_metric_drop` limits; `None`: the default of the problem type, or accuracy
            with `max_accuracy_drop`.
        max_accuracy_drop: Goal: points (hundredths) that accuracy may lose against full depth.
        max_metric_drop: Goal: points that the metric may lose against full depth. Has no guarantee.
        max_disagreement: Goal: share of the rows, in points, that may answer otherwise than full depth. Needs no
            labels.
        target_speedup: Goal: the ratio of FLOPs to reach, or with `exit_times` of time, over full depth. Has no
            guarantee.
        max_megaflops: Goal: millions of FLOPs per row, on average at the rows' own lengths. Has no guarantee.
        max_latency_ms: Goal: milliseconds per text, on average. Needs `exit_times`; has no guarantee.
        reference: A classifier with the model's labels and tokenizer that losses, promises and the speed-up in FLOPs
            are against, such as the teacher or the model before it learnt to skip; of a multi-exit model its full
            depth. It reads what the last member of a cascade reads. `None`: this model at full depth.
        reference_flops: What the speed-up is measured against, FLOPs per row; `None`: the reference.
        exit_times: What the exits take on the machine that will serve, from
            [`hf_costeff.exit_times.measure_exit_times`]. `None`: FLOPs count. There are none for a cascade.
        guarantee: Whether the loss must keep to the goal on new rows of the same distribution, with probability
            1 - `delta` over the sample. The promise names the weights, and of a cascade the settings of its members; if
            none can be made, nobody leaves early.
        delta: Largest chance of a broken promise, above 0 and below 1.
        criterion: A key of `CRITERIA`; `None`: entropy, for regression patience.
        per_exit: Whether every exit gets its own threshold; otherwise one serves all.
        fit_temperatures: Whether each exit's temperature is fitted first; otherwise they are 1.
        checked_exits: Layers whose exit may be asked, as in [`ExitConfig`]. `None`: those of stored settings that were
            chosen by time (`hf-costeff benchmark --choose_exits`), however often was calibrated since; without, chosen
            here too.
        trained_keys: [`row_keys`] of the `input_ids` that the model was trained on; there is a warning if some of the
            rows, as the last member of a cascade reads them, are among them. `None`: what the run that made the model
            wrote down in the folder it was loaded from.
        show_progress: Whether to show a progress bar.

    Returns:
        The settings, as stored.

    Raises:
        ValueError: As [`hf_costeff.calibration.choose_exit_config`], for a model without exits, or for a reference
            that is a cascade, has other labels, or was not timed where the speed-up is one of time.
    """
    if not isinstance(model, CostEffForSequenceClassification | CostEffCascade):
        raise ValueError(f"{type(model).__name__} has no exits to calibrate. Compress it first: hf_costeff.compress.")
    values = (max_accuracy_drop, max_metric_drop, max_disagreement, target_speedup, max_megaflops, max_latency_ms)
    goals: dict[str, Any] = dict(zip(GOALS, values, strict=True))
    goals |= {"reference_flops": reference_flops, "exit_times": exit_times, "guarantee": guarantee, "delta": delta}
    accuracy = "accuracy" if max_accuracy_drop is not None else None
    metric = metric or accuracy or default_metric(model.config.resolved_problem_type)
    by_time = None if checked_exits is not None else _exits_chosen_by_time(model)
    search = ExitSearch(criterion, per_exit, fit_temperatures, by_time if checked_exits is None else checked_exits)
    check_goal(model.config, metric, criterion=criterion, **goals)  # before the model runs over all rows
    datasets, collators = _one_each(model, dataset, collator)
    if reference is not None:
        _check_reference(reference, model, datasets[-1], exit_times if target_speedup is not None else None)
    trained_rows = _count_trained_rows(model, datasets[-1], trained_keys)
    records = _calibration_records(model, datasets, collators, guarantee, show_progress)
    if reference is not None:
        asked = collect_exit_logits(reference, datasets[-1], collators[-1], show_progress=show_progress)
        records = dataclasses.replace(records, reference=ReferenceLogits(_name(reference), asked.logits[:, -1]))
        if target_speedup is not None:
            goals["reference_flops"] = reference_flops or _full_depth_flops(reference, asked)
    settings = choose_exit_config(records, model.config, metric, search=search, **goals)
    _note(settings, model, by_time is not None, trained_rows)
    if isinstance(model, CostEffCascade):
        _warn_if_dearer(settings)
    model.config.exit_config = settings.to_dict()
    return settings


def _check_reference(
    reference: PreTrainedModel, model: PreTrainedModel, dataset: Dataset, exit_times: ExitTimes | None
) -> None:
    if isinstance(reference, CostEffCascade):
        raise ValueError("The reference is a cascade. Losses are counted against a single model: take its last member.")
    if exit_times is not None:
        raise ValueError(
            "`reference` and `exit_times` are given for `target_speedup`, and the reference was not timed. Leave one "
            "out: without times the speed-up counts FLOPs, without a reference it is over this model at full depth."
        )
    check_same_labels(reference.config, model.config, "reference")
    longest, most = int(_lengths(dataset).max()), longest_text(reference.config)
    if longest > most:
        raise ValueError(
            f"The longest row has {longest} tokens, and the reference takes {most}. Give rows that it can read: a "
            "lower `max_length`, or another reference."
        )


def _name(model: PreTrainedModel) -> str:
    """As the Hub knows it, or of its folder, without the path to it."""
    return public_name(model.name_or_path) or Path(model.name_or_path).name or "the reference"


def _full_depth_flops(model: PreTrainedModel, records: ExitLogits) -> float:
    """Mean FLOPs per row at the rows' own lengths, without early exit."""
    if isinstance(model, CostEffForSequenceClassification):
        return ExitReplay(records, model.config).full_depth.mean_flops
    return float(np.mean([stock_flops(model.config, int(length)) for length in records.seq_lengths]))


def _calibration_records(
    model: CostEffForSequenceClassification | CostEffCascade,
    datasets: list[Dataset],
    collators: list[Collator],
    with_keys: bool,
    show_progress: bool,
) -> ExitLogits:
    showing: dict[str, Any] = {"description": "Calibrating", "show_progress": show_progress}
    if isinstance(model, CostEffCascade):
        records = collect_member_logits(model, datasets, collators, **showing)
    else:
        records = collect_exit_logits(model, datasets[0], collators[0], **showing)
    return dataclasses.replace(records, row_keys=row_keys(datasets[-1])) if with_keys else records


def _note(
    settings: ExitConfig, model: CostEffForSequenceClassification | CostEffCascade, by_time: bool, trained_rows: int
) -> None:
    """Write into the record of a calibration what the choice itself does not know."""
    seen = settings.calibration
    assert seen is not None
    if by_time:
        seen["exits_chosen_by_time"] = True
    if trained_rows:
        seen["trained_rows"] = trained_rows
    if "promise" in seen:
        seen["promise"]["fingerprint"] = _promised_for(model)


def _promised_for(model: CostEffForSequenceClassification | CostEffCascade) -> str:
    if isinstance(model, CostEffCascade):
        return weights_fingerprint(model, model.config.member_settings)
    return weights_fingerprint(model.costeff)


def _warn_if_dearer(settings: ExitConfig) -> None:
    gain = (settings.calibration or {})["speedup_over_full_depth"]
    if gain < 1:
        logger.warning(
            f"With these settings the cascade takes {1 / gain:.2f} times the FLOPs of its last member alone: members "
            "before it release too few rows. Allow a larger loss, or take better or cheaper members."
        )


def row_keys(dataset: Dataset, columns: Sequence[str] = ("input_ids", "labels")) -> list[int]:
    """A whole number made from the tokens and the label of each row; equal rows have equal ones.

    Args:
        dataset: Tokenized rows.
        columns: What counts; one that is not there is left out.
    """
    values = [dataset[name] for name in columns if name in dataset.column_names]
    return [int(fingerprint(map(str, row)), 16) for row in zip(*values, strict=True)]


def _exits_chosen_by_time(model: PreTrainedModel) -> list[int] | None:
    """The checked exits of stored settings that no calibration chose; they outlast any number of calibrations."""
    stored = model.config.exit_config or {}
    seen = stored.get("calibration")
    return None if seen and not seen.get("exits_chosen_by_time") else stored.get("checked_exits")


def _count_trained_rows(model: PreTrainedModel, dataset: Dataset, trained_keys: Collection[int] | None) -> int:
    """How many of the rows have texts that the model was trained on, with a warning if any have."""
    if trained_keys is None and model.name_or_path:  # as a path an empty name would be the working directory
        trained_keys = train_keys(model.name_or_path)
    trained = set(trained_keys or ())
    shared = sum(key in trained for key in row_keys(dataset, ["input_ids"])) if trained else 0
    if shared:
        logger.warning(
            f"{shared:,} of {len(dataset):,} calibration rows have texts that the model was trained on. It is surer "
            "and more often right there than on new ones, so what is chosen, seen and promised on them looks better "
            "than it is. Give rows that no training saw."
        )
    return shared


@dataclass(frozen=True)
class Contender:
    """One line of the report: a model and how it answers.

    Args:
        name: As printed.
        model: Stock or multi-exit.
        records: Its logits on the reported rows.
        settings: Exit settings; `None` for full depth.
        skip_layers: Whether rows skip layers, as for `predict`, and as in the records; `None`: if the model has gates.
    """

    name: str
    model: PreTrainedModel
    records: ExitLogits
    settings: ExitConfig | None = None
    skip_layers: bool | None = None

    def answer(self, batch: Mapping[str, Tensor]) -> Any:
        """Run the model on a batch as it would be served."""
        inputs = model_inputs(self.model, batch)
        if isinstance(self.model, CostEffForSequenceClassification):
            inputs = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
            settings = False if self.settings is None else self.settings
            return self.model.predict(**inputs, early_exit=settings, skip_layers=self.skip_layers)
        with torch.inference_mode():  # as predict does: autograd costs time even when it is only off
            return self.model(**inputs)

    def answer_all(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Run the model on every batch, for the clock."""
        for batch in batches:
            self.answer(batch)


@dataclass(frozen=True)
class ReportRow:
    """Measured figures of one contender.

    Args:
        name: As printed.
        metrics: Every metric of the problem type.
        parameters: Everything counted.
        flops_per_row: Mean FLOPs at the rows' own lengths.
        flops_per_row_at_128: The same with every row at 128 tokens, as the paper counts.
        mean_exit_layer: Mean 1-based layer that answered.
        exit_shares: Share of rows per exit, shallow first.
        ms_per_text: Median milliseconds per text, by batch size.
        layers_run: Mean layers run before the answer; `None` where that is the mean exit layer, nothing being skipped.
    """

    name: str
    metrics: dict[str, float]
    parameters: int
    flops_per_row: float
    flops_per_row_at_128: float
    mean_exit_layer: float
    exit_shares: list[float]
    ms_per_text: dict[str, float]
    layers_run: float | None = None


def report_rows(
    contenders: Sequence[Contender], dataset: Dataset, collator: Collator, problem_type: str, timed_rows: int = 64
) -> list[ReportRow]:
    """Figures of all contenders on the same rows, timed in alternation.

    Args:
        contenders: Whom to compare.
        dataset: The rows that their records were collected on.
        collator: Pads rows to a batch.
        problem_type: As upstream's `config.problem_type`.
        timed_rows: Rows used for the clock, at their real lengths.

    Returns:
        One row per contender, in order.
    """
    times = _times(contenders, dataset.select(range(min(timed_rows, len(dataset)))), collator)
    return [_report_row(contender, problem_type, times[contender.name]) for contender in contenders]


def _times(contenders: Sequence[Contender], dataset: Dataset, collator: Collator) -> dict[str, dict[str, float]]:
    rows = [dataset[index] for index in range(len(dataset))]
    times: dict[str, dict[str, float]] = {contender.name: {} for contender in contenders}
    for size in TIMED_BATCHES:
        chosen = rows if size > 1 else rows[: max(1, len(rows) // 4)]
        batches = [collator(chosen[start : start + size]) for start in range(0, len(chosen), size)]
        runs = {contender.name: partial(contender.answer_all, batches) for contender in contenders}
        for name, latency in measure_alternating(runs, warmup=1, repeats=7).items():
            times[name][str(size)] = latency.median_ms / len(chosen)
    return times


def _report_row(contender: Contender, problem_type: str, ms_per_text: dict[str, float]) -> ReportRow:
    model, records, layers_run = contender.model, contender.records, None
    if isinstance(model, CostEffForSequenceClassification):
        exits = ExitReplay(records, model.config).at(contender.settings)
        logits, flops, exit_layer = exits.logits, exits.mean_flops, exits.mean_exit_layer
        as_in_papers = torch.full_like(records.seq_lengths, PAPER_SEQ_LENGTH)
        replay = ExitReplay(dataclasses.replace(records, seq_lengths=as_in_papers), model.config)
        flops_at_128 = replay.at(contender.settings).mean_flops
        shares = exits.exit_shares
        if records.skipped is not None:
            layers_run = exits.mean_layers_run
    else:
        logits, exit_layer, shares = records.logits[:, 0], float(model.config.num_hidden_layers), [1.0]
        flops = _full_depth_flops(model, records)
        flops_at_128 = float(stock_flops(model.config, PAPER_SEQ_LENGTH))
    return ReportRow(
        name=contender.name,
        metrics=compute_metrics(logits.numpy(), records.known_labels(), problem_type),
        parameters=count_parameters(model),
        flops_per_row=flops,
        flops_per_row_at_128=flops_at_128,
        mean_exit_layer=exit_layer,
        exit_shares=shares,
        ms_per_text=ms_per_text,
        layers_run=layers_run,
    )


def format_table(rows: Sequence[ReportRow], metric: str) -> str:
    """A Markdown table of report rows, ratios against the first; layers run are told where any are skipped.

    Args:
        rows: The reference first.
        metric: The metric to show.
    """
    reference = rows[0]
    skips = any(row.layers_run is not None for row in rows)
    columns = ["model", metric, "kept", "parameters", "smaller by", "FLOPs, 128 tokens", "fewer by", "mean exit layer"]
    columns += [
        *(["layers run"] if skips else []),
        "ms per text, batch 32",
        "faster by",
        "ms per text, batch 1",
        "faster by",
    ]
    lines = []
    for row in rows:
        value, base = row.metrics[metric], reference.metrics[metric]
        big, one = (row.ms_per_text[str(size)] for size in TIMED_BATCHES)
        base_big, base_one = (reference.ms_per_text[str(size)] for size in TIMED_BATCHES)
        parameters, flops = row.parameters, row.flops_per_row_at_128
        lines.append(
            [
                *(row.name, f"{value:.4f}", f"{value / base:.1%}" if base else "n/a"),
                *(f"{parameters / 1e6:.2f}M", f"{reference.parameters / parameters:.2f}x"),
                *(f"{flops / 1e6:,.1f}M", f"{reference.flops_per_row_at_128 / flops:.2f}x"),
                f"{row.mean_exit_layer:.2f}",
                *([f"{row.mean_exit_layer if row.layers_run is None else row.layers_run:.2f}"] if skips else []),
                *(f"{big:.3f}", f"{base_big / big:.2f}x", f"{one:.2f}", f"{base_one / one:.2f}x"),
            ]
        )
    return markdown_table(columns, lines)
