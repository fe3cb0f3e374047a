"""What a model said at every exit, stored, and any exit settings replayed on it.

Exits do not change later computation, so the logits of all exits, computed once, answer for every threshold. Neither
do they change what gates decide, so the layers that a row skips are stored too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from .configuration_cascade import CostEffCascadeConfig
from .configuration_costeff import CostEffConfig
from .efficiency import embedding_flops, exit_head_flops, gate_flops, layer_flops
from .exit_criteria import (
    MULTI_LABEL,
    SINGLE_LABEL,
    ExitConfig,
    ThresholdCriterion,
    answers,
    same_answers,
    simulate_exits,
    spread,
)
from .exiting_rows import ExitPlan
from .metrics import CONFUSION_METRICS, METRICS, confusion_matrix

ExitingConfig: TypeAlias = CostEffConfig | CostEffCascadeConfig
"""Of a model whose rows may leave: at its exits, or at the members of a cascade, which are then meant by exits."""


@dataclass(frozen=True)
class ReferenceLogits:
    """What another classifier said on the same rows, which losses are counted against.

    Args:
        name: Of the classifier, as it is to be spoken of.
        logits: Raw logits, shape (rows, labels).
    """

    name: str
    logits: Tensor


@dataclass(frozen=True)
class ExitLogits:
    """What a model said at every exit on a data set.

    Args:
        logits: Raw logits, shape (rows, exits, labels).
        seq_lengths: Real tokens of each row, shape (rows,).
        labels: True labels, shape (rows,) or (rows, labels); `None` if there are none.
        row_keys: A whole number made from each row's content, shape (rows,); needed for a guarantee only, which splits
            the rows by it. `None` if there are none.
        member_flops: Of a cascade: FLOPs of each row in each member by itself, shape (rows, members). `None` for a
            single model, whose cost follows from its configuration.
        skipped: Whether each row skips each layer, shape (rows, layers): it does not leave after those, but for the
            last. `None` where every row runs every layer.
        reference: What losses are counted against; `None`: the last exit or member.
    """

    logits: Tensor
    seq_lengths: Tensor
    labels: Tensor | None = None
    row_keys: Sequence[int] | None = None
    member_flops: Tensor | None = None
    skipped: Tensor | None = None
    reference: ReferenceLogits | None = None

    def asked_at(self, exit_layers: Sequence[int]) -> np.ndarray:
        """Whether each row can be asked at each exit, shape (rows, exits): not after a layer that it skips.

        Args:
            exit_layers: 1-based layer of each exit, ascending; the last always answers.
        """
        asked = np.ones(self.logits.shape[:2], dtype=bool)
        if self.skipped is not None:
            asked[:, :-1] = ~self.skipped.numpy()[:, np.array(exit_layers[:-1], dtype=int) - 1]
        return asked

    def known_labels(self) -> np.ndarray:
        """The labels as an array.

        Raises:
            ValueError: If there are none.
        """
        if self.labels is None:
            raise ValueError("The rows have no labels, so no metric can be computed. Add a label column.")
        return self.labels.numpy()

    def select(self, rows: np.ndarray) -> ExitLogits:
        """Some of the rows, by position, without their keys."""
        labels = None if self.labels is None else self.labels[rows]
        flops = None if self.member_flops is None else self.member_flops[rows]
        skipped = None if self.skipped is None else self.skipped[rows]
        other = self.reference
        return ExitLogits(
            self.logits[rows],
            self.seq_lengths[rows],
            labels,
            member_flops=flops,
            skipped=skipped,
            reference=None if other is None else dataclasses.replace(other, logits=other.logits[rows]),
        )


@dataclass(frozen=True)
class ExitOutcome:
    """What exit settings do on a data set.

    Args:
        metric: The task metric with early exit.
        mean_exit_layer: Mean 1-based layer at which rows left.
        flops_per_row: Mean FLOPs of a row at its own length, executed exits counted.
        speedup: Mean FLOPs at full depth over `flops_per_row`.
    """

    metric: float
    mean_exit_layer: float
    flops_per_row: float
    speedup: float


CONDITIONS = ("batch_size", "threads", "precision", "hardware")


class ThresholdPath(Sequence[ExitConfig]):
    """Settings that differ in their thresholds alone, made one by one as they are asked for.

    Args:
        settings: Everything else.
        thresholds: One entry per settings: a number, or one per exit.
    """

    def __init__(self, settings: ExitConfig, thresholds: Sequence[float] | Sequence[list[float]]) -> None:
        self.settings, self.thresholds = settings, thresholds

    def __len__(self) -> int:
        """How many settings there are."""
        return len(self.thresholds)

    @overload
    def __getitem__(self, position: int) -> ExitConfig: ...

    @overload
    def __getitem__(self, position: slice) -> ThresholdPath: ...

    def __getitem__(self, position: int | slice) -> ExitConfig | ThresholdPath:
        """Settings at a position, or a part of the path."""
        if isinstance(position, slice):
            return ThresholdPath(self.settings, self.thresholds[position])
        return dataclasses.replace(self.settings, threshold=self.thresholds[position])


Costs = Callable[[Sequence[int]], np.ndarray]
"""What a row costs that leaves at each exit, shape (rows, exits) or (exits,), by the layers whose exits are asked."""


@dataclass(frozen=True)
class ExitTimes:
    """How long leaving at each exit takes on one machine, see `hf_costeff.exit_times.measure_exit_times`.

    Args:
        leaving_ms: Milliseconds per text if all texts leave at an exit and no other is asked, shallow first; the last
            is full depth.
        question_ms: Milliseconds per text for every exit more that is asked on the way.
        batch_size: Texts that ran together.
        threads: CPU threads.
        precision: Of the weights, as torch names it.
        hardware: Processor or accelerator, and versions.
    """

    leaving_ms: list[float]
    question_ms: float
    batch_size: int
    threads: int
    precision: str
    hardware: dict[str, Any]

    def costs(self, exit_layers: Sequence[int], asked: Sequence[int]) -> np.ndarray:
        """Milliseconds of a text that leaves at each exit, shape (exits,).

        Args:
            exit_layers: 1-based layers that own an exit.
            asked: Those of them whose exit is asked on the way.

        Example: leaving at the second exit takes 3 ms, and half a one more if the first is asked before.

            >>> times = ExitTimes([2.0, 3.0], 0.5, batch_size=1, threads=1, precision="float32", hardware={})
            >>> times.costs([1, 2], asked=[1, 2]).tolist(), times.costs([1, 2], asked=[2]).tolist()
            ([2.0, 3.5], [2.0, 3.0])
        """
        before = np.cumsum([0, *(layer in asked for layer in exit_layers[:-1])])
        return np.array(self.leaving_ms) + self.question_ms * before

    def conditions(self) -> dict[str, Any]:
        """Time at full depth, and what it was measured under, for a record."""
        record = dataclasses.asdict(self)
        return {"full_depth_ms": self.leaving_ms[-1], **{name: record[name] for name in CONDITIONS}}


@dataclass(frozen=True)
class ReplayedExits:
    """Where rows leave under exit settings, and what that comes to.

    Args:
        replay: The rows and the model's configuration.
        exit_index: 0-based exit of each row, shape (rows,).
        asked: 1-based layers whose exit is evaluated on the way, as `predict` does; the last is the model's depth.
    """

    replay: ExitReplay
    exit_index: Tensor
    asked: tuple[int, ...]

    @cached_property
    def exit_layer(self) -> Tensor:
        """1-based layer at which each row leaves, shape (rows,)."""
        return torch.tensor(self.replay.config.exit_layers)[self.exit_index]

    @cached_property
    def mean_exit_layer(self) -> float:
        """Mean 1-based layer at which rows leave."""
        return float(self.exit_layer.double().mean())

    @cached_property
    def mean_layers_run(self) -> float:
        """Mean number of layers that rows run before they leave, skipped ones not counted."""
        skipped = self.replay.records.skipped
        if skipped is None:
            return self.mean_exit_layer
        run = (~skipped).cumsum(1).gather(1, self.exit_layer.unsqueeze(1) - 1)
        return float(run.double().mean())

    @cached_property
    def exit_shares(self) -> list[float]:
        """Share of the rows that leave at each exit, shallow first."""
        counts = torch.bincount(self.exit_index, minlength=len(self.replay.config.exit_layers))
        return (counts.double() / len(self.exit_index)).tolist()

    @cached_property
    def mean_flops(self) -> float:
        """FLOPs per row at the rows' own lengths, executed exits or members counted."""
        return self.mean_cost(self.replay.flops)

    def mean_cost(self, costs: Costs) -> float:
        """Mean over the rows of what leaving there costs."""
        return self.total(costs(self.asked)) / len(self.exit_index)

    def total(self, values: np.ndarray) -> float:
        """Sum over the rows of the value at the exit where each leaves.

        Args:
            values: Per row and exit, shape (rows, exits), such as [`ExitReplay.losses`], or (exits,).
        """
        index = self.exit_index.numpy()
        return float(values[index].sum() if values.ndim == 1 else values[np.arange(len(index)), index].sum())

    @cached_property
    def logits(self) -> Tensor:
        """Raw logits of the exit that answers, shape (rows, labels)."""
        return self.replay.records.logits[torch.arange(len(self.exit_index)), self.exit_index]

    def scaled_logits(self, settings: ExitConfig) -> Tensor:
        """The answering exits' logits over their temperatures, as `predict` takes probabilities of; (rows, labels)."""
        temperatures = spread("temperatures", settings.temperatures, len(self.replay.config.exit_layers))
        return self.logits / self.logits.new_tensor(temperatures)[self.exit_index].unsqueeze(-1)

    def metric(self, name: str) -> float:
        """A metric of the problem type over the answers, see `hf_costeff.metrics.METRICS`."""
        labels = self.replay.records.known_labels()
        if self.replay.problem_type == SINGLE_LABEL and name in CONFUSION_METRICS:
            answered = self.replay.answers[torch.arange(len(self.exit_index)), self.exit_index].numpy()
            return CONFUSION_METRICS[name](confusion_matrix(answered, labels, self.replay.records.logits.shape[-1]))
        return METRICS[self.replay.problem_type][name](self.logits.numpy(), labels)


@dataclass(frozen=True)
class ReplayedPath:
    """Where rows leave under each of many settings, careful to bold, that ask the same exits.

    Since no row leaves later under a bolder setting, all of them together are one number per row and exit.

    Args:
        replay: The rows and the model's configuration.
        settings: Under none of which a row leaves later than under the one before.
        asked: As in [`ReplayedExits`].
        since: Position of the first settings under which a row leaves at an exit or before, shape (rows, exits).
    """

    replay: ExitReplay
    settings: Sequence[ExitConfig]
    asked: tuple[int, ...]
    since: np.ndarray

    def at(self, position: int) -> ReplayedExits:
        """Where each row leaves under one of the settings."""
        return ReplayedExits(self.replay, torch.from_numpy((self.since > position).sum(1)), self.asked)

    def totals(self, values: np.ndarray) -> np.ndarray:
        """[`ReplayedExits.total`] under all settings, shape (settings,)."""
        rows, exits = self.since.shape
        end, values = len(self.settings), np.broadcast_to(values, (rows, exits))
        change = np.zeros(end + 1)
        for exit in range(exits):
            weights = values[:, exit].astype(float)
            change += np.bincount(self.since[:, exit], weights, end + 1)
            if exit:
                change -= np.bincount(self.since[:, exit - 1], weights, end + 1)
        return change[:end].cumsum()

    def mean_costs(self, costs: Costs) -> np.ndarray:
        """[`ReplayedExits.mean_cost`] under all settings, shape (settings,)."""
        return self.totals(costs(self.asked)) / len(self.since)

    @cached_property
    def changes(self) -> np.ndarray:
        """Positions of the settings that treat these rows otherwise than the ones before, the first among them."""
        positions = np.unique(np.append(self.since, 0))
        return positions[positions < len(self.settings)]


class ExitReplay:
    """Replays any number of exit settings on stored logits; each exit is measured once per criterion."""

    def __init__(self, records: ExitLogits, config: ExitingConfig) -> None:
        """Take the logits of all exits and the configuration of the model they come from."""
        self.records, self.config = records, config
        self.problem_type: str = config.resolved_problem_type
        self._measured: dict[tuple[str, tuple[float, ...]], np.ndarray] = {}

    @cached_property
    def full_depth(self) -> ReplayedExits:
        """Every row at the last exit or member, which alone is executed."""
        rows, num_exits, _ = self.records.logits.shape
        return ReplayedExits(self, torch.full((rows,), num_exits - 1), (self.config.exit_layers[-1],))

    @cached_property
    def reference_logits(self) -> Tensor:
        """What losses are counted against: the reference's raw logits, or full depth's; shape (rows, labels)."""
        reference = self.records.reference
        return self.full_depth.logits if reference is None else reference.logits

    def reference_metric(self, name: str) -> float:
        """A metric of what losses are counted against."""
        return METRICS[self.problem_type][name](self.reference_logits.numpy(), self.records.known_labels())

    def at(self, settings: ExitConfig | None) -> ReplayedExits:
        """Where each row leaves, as [`simulate_exits`] says; `None` is full depth."""
        return self.full_depth if settings is None else self.along([settings])[0].at(0)

    def along(self, *parts: Sequence[ExitConfig]) -> list[ReplayedPath]:
        """Where each row leaves under each of many settings, in pieces that ask the same exits.

        Args:
            *parts: The settings, under none of which a row leaves later than under the one before, see
                `hf_costeff.calibration.candidate_settings`. Those of a part share everything but their limits.
        """
        return [piece for part in parts for piece in self._pieces(part)]

    def distinct(self, *parts: Sequence[ExitConfig]) -> list[Sequence[ExitConfig]]:
        """The settings that treat these rows otherwise than the ones before, in parts."""
        found: list[Sequence[ExitConfig]] = []
        before: Tensor | None = None
        for piece in self.along(*parts):
            positions = piece.changes.tolist()
            if before is not None and before.equal(piece.at(0).exit_index):
                positions = positions[1:]
            before = piece.at(len(piece.settings) - 1).exit_index
            own = piece.settings
            if isinstance(own, ThresholdPath):
                found.append(ThresholdPath(own.settings, [own.thresholds[position] for position in positions]))
            else:
                found.append([own[position] for position in positions])
        return [part for part in found if len(part)]

    def _pieces(self, path: Sequence[ExitConfig]) -> Iterator[ReplayedPath]:
        layers, first = self.config.exit_layers, path[0]
        rule = first.build_criterion(len(layers), self.problem_type)
        if not isinstance(rule, ThresholdCriterion):
            for asked, group in groupby(path, key=self._asked):
                part, logits = list(group), self.records.logits
                index = torch.stack([simulate_exits(logits, own, layers, self.problem_type) for own in part])
                since = torch.stack([(index > exit).sum(0) for exit in range(len(layers))], 1).numpy()
                yield ReplayedPath(self, part, asked, since)
            return
        thresholds = path.thresholds if isinstance(path, ThresholdPath) else [own.threshold for own in path]
        sign = 1 if rule.lower_is_surer else -1
        limits = sign * np.array(thresholds, dtype=float)
        limits = limits if limits.ndim == 2 else np.tile(limits[:, None], len(layers))
        somebody = limits[:, :-1] > sign * rule.nobody_leaves
        cuts = np.flatnonzero((somebody[1:] != somebody[:-1]).any(1)) + 1
        for start, end in pairwise([0, *cuts.tolist(), len(path)]):
            asked = self._asked(path[start])
            yield ReplayedPath(self, path[start:end], asked, self._since(limits[start:end], rule, sign, asked))

    def _asked(self, settings: ExitConfig) -> tuple[int, ...]:
        skips = self.records.skipped is not None
        return tuple(ExitPlan.make(settings, self.config.exit_layers, self.problem_type, skips).stops)

    def _since(self, limits: np.ndarray, rule: ThresholdCriterion, sign: int, asked: Sequence[int]) -> np.ndarray:
        """See [`ReplayedPath`]; `limits` of shape (settings, exits) let lower measures leave, both turned by `sign`."""
        measures = sign * self._measures(rule)
        limits = np.where(limits >= sign * rule.everybody_leaves, np.inf, limits)
        since = np.full((len(self), limits.shape[1]), len(limits))
        since[:, -1] = 0
        for exit, layer in enumerate(self.config.exit_layers[:-1]):
            if layer in asked:
                since[:, exit] = np.searchsorted(limits[:, exit], measures[:, exit], side="right")
        since[~self.askable] = len(limits)
        return np.minimum.accumulate(since, axis=1)

    def _measures(self, rule: ThresholdCriterion) -> np.ndarray:
        """What the criterion compares at each exit but the last, shape (rows, exits - 1)."""
        key = (rule.name, tuple(rule.temperatures))
        if key not in self._measured:
            exits = range(len(self.config.exit_layers) - 1)
            found = [rule.measured(self.records.logits[:, exit], exit) for exit in exits]
            self._measured[key] = torch.stack(found, 1).double().numpy() if found else np.empty((len(self), 0))
        return self._measured[key]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.records.logits)

    @cached_property
    def askable(self) -> np.ndarray:
        """See [`ExitLogits.asked_at`]."""
        return self.records.asked_at(self.config.exit_layers)

    def flops(self, asked: Sequence[int]) -> np.ndarray:
        """FLOPs of each row, at its own length, if it left at each exit or member, shape (rows, exits).

        Args:
            asked: 1-based layers whose exit is evaluated on the way.
        """
        executed = [layer in asked for layer in self.config.exit_layers[:-1]] + [True]
        if self.records.member_flops is not None:
            return (self.records.member_flops.numpy() * executed).cumsum(1)
        headless, head = self._single_model_flops
        return headless + head * (self.askable & executed).cumsum(1)

    @cached_property
    def _single_model_flops(self) -> tuple[np.ndarray, np.ndarray]:
        """FLOPs up to each exit without any head, shape (rows, exits), and of one head, shape (rows, 1).

        Each part is a quadratic in the length, known from its values at 1, 2 and 3.
        """
        config, skipped = self.config, self.records.skipped
        assert isinstance(config, CostEffConfig)  # the records of a cascade know what its members cost
        layers, lengths = range(1, config.num_hidden_layers + 1), self.records.seq_lengths.numpy()[:, None]

        def parts(length: int) -> np.ndarray:
            fixed = [exit_head_flops(config, length), embedding_flops(config, length), gate_flops(config, length)]
            return np.array([*fixed, *(layer_flops(config, layer, length) for layer in layers)])

        one, two, three = map(parts, (1, 2, 3))
        cost = one + (lengths - 1) * (two - one) + (lengths - 1) * (lengths - 2) // 2 * (three - 2 * two + one)
        head, embedding, gate, own = np.split(cost, [1, 2, 3], axis=1)
        spent = own if skipped is None else gate + own * ~skipped.numpy()
        return embedding + spent.cumsum(1)[:, np.array(config.exit_layers) - 1], head

    def outcome(self, settings: ExitConfig | None, metric: str) -> ExitOutcome:
        """Metric and cost together."""
        exits = self.at(settings)
        speedup = self.full_depth.mean_flops / exits.mean_flops
        return ExitOutcome(exits.metric(metric), exits.mean_exit_layer, exits.mean_flops, speedup)

    @cached_property
    def answers(self) -> Tensor:
        """What every exit answers, shape (rows, exits), or (rows, exits, labels) for multi-label."""
        return answers(self.records.logits, self.problem_type)

    @cached_property
    def right(self) -> np.ndarray:
        """Whether every exit is right, shape (rows, exits); a multi-label answer is the whole set of labels.

        Raises:
            ValueError: If there are no labels.
        """
        return self._are_right(self.answers)

    @cached_property
    def reference_right(self) -> np.ndarray:
        """Whether what losses are counted against is right, shape (rows, 1).

        Raises:
            ValueError: If there are no labels.
        """
        return self._are_right(self._reference_answers)

    @cached_property
    def _reference_answers(self) -> Tensor:
        return answers(self.reference_logits[:, None], self.problem_type)

    def _are_right(self, answered: Tensor) -> np.ndarray:
        labels = torch.from_numpy(self.records.known_labels())[:, None]
        truth = labels > 0.5 if self.problem_type == MULTI_LABEL else labels
        return same_answers(answered, truth, self.problem_type).numpy()

    def losses(self, goal: str) -> np.ndarray:
        """What answering at each exit would cost a row: True where a row loses, shape (rows, exits).

        Args:
            goal: `"max_accuracy_drop"`: the reference is right and the exit wrong. Otherwise: the exit's answer differs
                from the reference's. The reference is full depth unless the records have another.
        """
        if goal == "max_accuracy_drop":
            return ~self.right & self.reference_right
        return (~same_answers(self.answers, self._reference_answers, self.problem_type)).numpy()


def stored_settings(config: ExitingConfig) -> ExitConfig:
    """The exit settings that a model was saved with.

    Raises:
        ValueError: If there are none.
    """
    if config.exit_config is not None:
        return ExitConfig.from_dict(config.exit_config)
    if len(config.exit_layers) == 1:
        raise ValueError(
            "The model has one exit, after its last layer, so no row leaves early. Settings and reports of "
            "exits need one with more `exit_layers`."
        )
    raise ValueError("The model has no exit settings. Choose some first: `hf-costeff calibrate`.")
