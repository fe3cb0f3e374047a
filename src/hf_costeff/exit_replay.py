"""What a model said at every exit, stored, and any exit settings replayed on it.

Exits do not change later computation, so the logits of all exits, computed once, answer for every threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from .configuration_cascade import CostEffCascadeConfig
from .configuration_costeff import CostEffConfig
from .efficiency import mean_flops
from .exit_criteria import MULTI_LABEL, ExitConfig, ThresholdCriterion, answers, same_answers, simulate_exits, spread
from .exiting_rows import ExitPlan
from .metrics import METRICS

ExitingConfig: TypeAlias = CostEffConfig | CostEffCascadeConfig
"""Of a model whose rows may leave: at its exits, or at the members of a cascade, which are then meant by exits."""


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
    """

    logits: Tensor
    seq_lengths: Tensor
    labels: Tensor | None = None
    row_keys: Sequence[int] | None = None
    member_flops: Tensor | None = None

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
        return ExitLogits(self.logits[rows], self.seq_lengths[rows], labels, member_flops=flops)


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


@dataclass(frozen=True)
class ReplayedExits:
    """Where rows leave under exit settings, and what that comes to.

    Args:
        records: The rows.
        config: The model's.
        exit_index: 0-based exit of each row, shape (rows,).
        checked_exits: 1-based layers whose exit is evaluated on the way; `None` for all, `[]` for the last alone.
    """

    records: ExitLogits
    config: ExitingConfig
    exit_index: Tensor
    checked_exits: list[int] | None

    @cached_property
    def exit_layers(self) -> Tensor:
        """1-based layer at which each row leaves, shape (rows,)."""
        return torch.tensor(self.config.exit_layers)[self.exit_index]

    @cached_property
    def mean_exit_layer(self) -> float:
        """Mean 1-based layer at which rows leave."""
        return float(self.exit_layers.float().mean())

    @cached_property
    def exit_shares(self) -> list[float]:
        """Share of the rows that leave at each exit, shallow first."""
        counts = torch.bincount(self.exit_index, minlength=len(self.config.exit_layers))
        return (counts.double() / len(self.exit_index)).tolist()

    @cached_property
    def mean_flops(self) -> float:
        """FLOPs per row at the rows' own lengths, executed exits or members counted."""
        if self.records.member_flops is not None:
            executed = torch.zeros(len(self.config.exit_layers), dtype=torch.float64)
            executed[[layer - 1 for layer in self.checked_exits or ()]] = 1
            executed[-1] = 1
            spent = (self.records.member_flops * executed).cumsum(1)
            return float(spent.gather(1, self.exit_index[:, None]).mean())
        assert isinstance(self.config, CostEffConfig)  # the records of a cascade know what its members cost
        return mean_flops(self.config, self.exit_layers, self.records.seq_lengths, self.checked_exits)

    @cached_property
    def logits(self) -> Tensor:
        """Raw logits of the exit that answers, shape (rows, labels)."""
        return self.records.logits[torch.arange(len(self.exit_index)), self.exit_index]

    def scaled_logits(self, settings: ExitConfig) -> Tensor:
        """The answering exits' logits over their temperatures, as `predict` takes probabilities of; (rows, labels)."""
        temperatures = spread("temperatures", settings.temperatures, len(self.config.exit_layers))
        return self.logits / self.logits.new_tensor(temperatures)[self.exit_index].unsqueeze(-1)

    def metric(self, name: str) -> float:
        """A metric of the problem type over the answers, see `hf_costeff.metrics.METRICS`."""
        return METRICS[self.config.resolved_problem_type][name](self.logits.numpy(), self.records.known_labels())

    def lost(self, losses: np.ndarray) -> int:
        """Rows that lose, from [`ExitReplay.losses`]."""
        return int(losses[np.arange(len(losses)), self.exit_index.numpy()].sum())


class ExitReplay:
    """Replays any number of exit settings on stored logits; each exit is measured once per criterion."""

    def __init__(self, records: ExitLogits, config: ExitingConfig) -> None:
        """Take the logits of all exits and the configuration of the model they come from."""
        self.records, self.config = records, config
        self.problem_type: str = config.resolved_problem_type
        self._measured: dict[tuple[str, tuple[float, ...]], list[Tensor]] = {}

    @cached_property
    def full_depth(self) -> ReplayedExits:
        """Every row at the last exit, which alone is executed."""
        rows, num_exits, _ = self.records.logits.shape
        return ReplayedExits(self.records, self.config, torch.full((rows,), num_exits - 1), [])

    def at(self, settings: ExitConfig | None) -> ReplayedExits:
        """Where each row leaves, as [`simulate_exits`] says; `None` is full depth."""
        if settings is None:
            return self.full_depth
        checked = settings.checked_exits
        if self.records.member_flops is not None:  # a member that lets nobody leave is not run
            checked = ExitPlan.make(settings, self.config.exit_layers, self.problem_type).stops
        return ReplayedExits(self.records, self.config, self._exit_index(settings), checked)

    def _exit_index(self, settings: ExitConfig) -> Tensor:
        logits, layers = self.records.logits, self.config.exit_layers
        last = len(layers) - 1
        criterion = settings.build_criterion(last + 1, self.problem_type)
        if not isinstance(criterion, ThresholdCriterion):
            return simulate_exits(logits, settings, layers, self.problem_type)
        key = (settings.criterion, tuple(criterion.temperatures))
        if key not in self._measured:
            self._measured[key] = [criterion.measured(logits[:, exit], exit) for exit in range(last)]
        index = self.full_depth.exit_index.clone()
        for exit in reversed(range(last)):  # the first exit that a row passes is written last
            if settings.is_checked(layers[exit]):
                index[criterion.passes(self._measured[key][exit], exit)] = exit
        return index

    def outcome(self, settings: ExitConfig | None, metric: str) -> ExitOutcome:
        """Metric and cost together."""
        exits = self.at(settings)
        speedup = self.full_depth.mean_flops / exits.mean_flops
        return ExitOutcome(exits.metric(metric), exits.mean_exit_layer, exits.mean_flops, speedup)

    def losses(self, goal: str) -> np.ndarray:
        """What answering at each exit would cost a row: True where a row loses, shape (rows, exits).

        Args:
            goal: `"max_accuracy_drop"`: full depth is right and the exit wrong. Otherwise: the exit's answer differs
                from full depth's. A multi-label answer is the whole set of labels.
        """
        answered = answers(self.records.logits, self.problem_type)
        if goal != "max_accuracy_drop":
            return (~same_answers(answered, answered[:, -1:], self.problem_type)).numpy()
        labels = torch.from_numpy(self.records.known_labels())[:, None]
        wrong = ~same_answers(answered, labels > 0.5 if self.problem_type == MULTI_LABEL else labels, self.problem_type)
        return (wrong & ~wrong[:, -1:]).numpy()


def stored_settings(config: ExitingConfig) -> ExitConfig:
    """The exit settings that a model was saved with.

    Raises:
        ValueError: If there are none.
    """
    if config.exit_config is None:
        raise ValueError("The model has no exit settings. Choose some first: `hf-costeff calibrate`.")
    return ExitConfig.from_dict(config.exit_config)
