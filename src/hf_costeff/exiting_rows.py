"""Rows on their way through the layers: where they stop to be asked, who leaves there, and how the rest goes on.

A set of rows can wait at a stop and go on later, alone or merged with others that have come as far. Nothing here runs
a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .exit_criteria import REGRESSION, ExitConfig, ExitCriterion

Value = TypeVar("Value")


@dataclass(frozen=True)
class ExitPlan:
    """Which exits are asked on the way, and who may leave there.

    Args:
        criterion: Decides at every stop but the last; `None` for full depth.
        exit_layers: 1-based layers that own an exit, ascending; the last is the model's depth.
        stops: 1-based layers whose exit is evaluated, ascending; the last is the model's depth, where everybody leaves.
            An exit that is not checked, or whose threshold lets nobody leave, costs nothing.
        problem_type: As upstream's `config.problem_type`.
        skips: Whether gates decide which layers a row runs. The exit after a layer that a row skips is not asked about
            it, but for the last, which always answers.
    """

    criterion: ExitCriterion | None
    exit_layers: list[int]
    stops: list[int]
    problem_type: str
    skips: bool = False

    @classmethod
    def make(
        cls, settings: ExitConfig | None, exit_layers: list[int], problem_type: str, skips: bool = False
    ) -> ExitPlan:
        """The plan that these settings mean for a model with these exits.

        Args:
            settings: `None` for full depth.
            exit_layers: 1-based layers that own an exit.
            problem_type: As upstream's `config.problem_type`.
            skips: Whether gates decide which layers a row runs.

        Raises:
            ValueError: Settings that do not fit the model, or its gates.
        """
        depth = exit_layers[-1]
        if settings is None:
            return cls(None, exit_layers, [depth], problem_type, skips)
        if stray := set(settings.checked_exits or ()) - set(exit_layers):
            raise ValueError(f"`checked_exits` names layers without an exit: {sorted(stray)}. Exits: {exit_layers}.")
        criterion = settings.build_criterion(len(exit_layers), problem_type)
        asked = [settings.is_checked(layer) and criterion.can_leave(index) for index, layer in enumerate(exit_layers)]
        stops = [layer for layer, ask in zip(exit_layers, asked, strict=True) if ask or layer == depth]
        if skips and criterion.looks_back and len(stops) > 1:
            raise ValueError(
                f"The {criterion.name} criterion compares the exits that a row has passed, and a row that skips a "
                "layer has no answer there. Use the entropy, confidence or margin criterion (there is none for "
                "regression), full depth with early_exit=False, or run every layer with skip_layers=False."
            )
        return cls(criterion, exit_layers, stops, problem_type, skips)

    def next_stop(self, depth: int) -> int:
        """The first stop behind layer `depth` (0: the embeddings)."""
        return next(stop for stop in self.stops if stop > depth)

    @property
    def looks_back(self) -> bool:
        """Whether the logits of earlier stops matter."""
        return self.criterion is not None and self.criterion.looks_back

    def evidence(self, seen: Tensor, depth: int) -> Tensor | None:
        """By what rows are judged at the stop after layer `depth`; `None` where everybody leaves.

        Args:
            seen: Raw logits at the stops so far, this one last, shape (rows, seen, labels); this one alone where the
                criterion does not look back.
            depth: 1-based layer.

        Returns:
            Shape (rows,).
        """
        if self.criterion is None or depth == self.stops[-1]:
            return None
        return self.criterion.evidence(seen, self.exit_layers.index(depth))

    def passes(self, evidence: Sequence[float], depth: int) -> list[bool]:
        """Which rows with this evidence leave at the stop after layer `depth`."""
        if self.criterion is None:
            return [True] * len(evidence)
        index = self.exit_layers.index(depth)
        return [self.criterion.passes(value, index) for value in evidence]

    def scaled(self, logits: Tensor, exit_layer: int) -> Tensor:
        """Logits of one exit over its temperature, shape as given; a regression model's values as they are."""
        if self.criterion is None or self.problem_type == REGRESSION:
            return logits
        return self.criterion.scaled(logits, self.exit_layers.index(exit_layer))


@dataclass(frozen=True)
class LeavingRows:
    """Rows that left together.

    Args:
        numbers: The caller's number of each row.
        exit_layer: 1-based layer they left after.
        logits: Their answers, shape (rows, labels).
        skipped: 1-based layers that each row has skipped, ascending.
    """

    numbers: list[int]
    exit_layer: int
    logits: Tensor
    skipped: list[tuple[int, ...]]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.numbers)


@dataclass
class RunningRows:
    """Rows that have run the first `depth` layers, and all that they need to run on.

    Lengths are known to the host from the start, so cropping costs no transfer.

    Args:
        numbers: The caller's number of each row.
        ends: Position after the last real token of each row.
        counts: Real tokens of each row; fewer than its end where the padding is on the left.
        hidden_states: Shape (rows, seq, hidden). Written to where some of the rows run a layer and others skip it.
        padding_mask: 1 for real tokens, 0 for padding, shape (rows, seq); `None` where no row has padding.
        skipped: 1-based layers that each row has skipped, ascending.
        depth: Layers that were run or skipped; 0 after the embeddings.
        seen: Raw logits at the stops so far, shape (rows, seen, labels); `None` before the first, and where the
            criterion does not look back.
        attention_mask: What the attention function takes, kept here while the rows stay the same; `None`: not made yet,
            or not needed.
        attend: The attention function.
    """

    numbers: list[int]
    ends: list[int]
    counts: list[int]
    hidden_states: Tensor
    padding_mask: Tensor | None
    skipped: list[tuple[int, ...]]
    depth: int = 0
    seen: Tensor | None = None
    attention_mask: Any = None
    attend: Any = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.numbers)

    @property
    def longest(self) -> int:
        """Columns that the rows need: up to the last real token of the longest."""
        return max(self.ends)

    def leave(
        self, plan: ExitPlan, logits: Tensor, asked: Sequence[int] | None = None
    ) -> tuple[LeavingRows | None, RunningRows | None]:
        """Ask the plan who leaves at the present depth.

        One transfer tells the host by what the rows are judged. Rows are moved only if some leave and some stay.

        Args:
            plan: Who may leave.
            logits: Raw logits of the exit here, shape (asked, labels).
            asked: Positions of the rows that they are of, ascending, at least one; the others stay. `None`: all.

        Returns:
            Who left and who goes on, `None` where nobody does.

        Raises:
            ValueError: If a logit is not finite.
        """
        asked = range(len(self)) if asked is None else asked
        seen = logits.unsqueeze(1)
        if self.seen is not None:
            seen = torch.cat([self.seen, seen], dim=1)
        evidence, sums = plan.evidence(seen, self.depth), logits.sum(-1)
        if evidence is None:
            leaves, on_host = [True] * len(asked), sums.tolist()
        else:
            judged, on_host = torch.stack([evidence, sums]).tolist()  # the one transfer of a checked layer
            leaves = plan.passes(judged, self.depth)
        if not math.isfinite(sum(on_host)):
            self._check_finite(logits, asked)
        if not any(leaves):
            self.seen = seen if plan.looks_back else None
            return None, self
        if all(leaves) and len(asked) == len(self):
            return LeavingRows(self.numbers, self.depth, logits, self.skipped), None
        self.seen = seen if plan.looks_back else None
        leaving = [index for index, leave in enumerate(leaves) if leave]
        answered = logits if all(leaves) else logits[host_index(leaving, logits.device)]
        gone = pick(asked, leaving)
        left = LeavingRows(pick(self.numbers, gone), self.depth, answered, pick(self.skipped, gone))
        return left, self.select(sorted(set(range(len(self))).difference(gone)))

    def _check_finite(self, logits: Tensor, asked: Sequence[int]) -> None:
        broken = (~logits.isfinite().all(-1)).tolist()
        if True not in broken:  # finite logits may have an infinite sum
            return
        position = broken.index(True)
        raise ValueError(
            f"The logits of row {self.numbers[asked[position]]} after layer {self.depth} are "
            f"{logits[position].tolist()}. They must be finite: the checkpoint is broken, or too large for "
            f"{logits.dtype}. Load an intact one, or use dtype=torch.float32."
        )

    def split(self, skips: Sequence[bool]) -> tuple[list[int], RunningRows | None]:
        """Step past the gate before the next layer: who runs it.

        Args:
            skips: Which rows skip the layer.

        Returns:
            Positions of those who run it, and they themselves, cropped to their longest: these very rows where all of
            them do, `None` where nobody does. After the layer [`RunningRows.put`] takes them back.
        """
        running = [position for position, skip in enumerate(skips) if not skip]
        layer = self.depth + 1
        self.skipped = [(*past, layer) if skip else past for past, skip in zip(self.skipped, skips, strict=True)]
        if not running:
            return running, None
        return running, self if len(running) == len(self) else self.select(running)

    def put(self, positions: Sequence[int], rows: RunningRows | None) -> None:
        """Take back the rows that ran a layer, as [`RunningRows.split`] gave them."""
        if rows is not None and rows is not self:
            index = host_index(positions, self.hidden_states.device)
            self.hidden_states[index, : rows.hidden_states.shape[1]] = rows.hidden_states

    def select(self, positions: Sequence[int]) -> RunningRows:
        """Some of the rows, cropped to the longest of them.

        Args:
            positions: Positions among these rows, at least one. A range of neighbours is not copied.
        """
        ends, counts = pick(self.ends, positions), pick(self.counts, positions)
        columns = max(ends)
        index: slice | Tensor
        if isinstance(positions, range):
            index = slice(positions.start, positions.stop, positions.step)
        else:
            index = host_index(positions, self.hidden_states.device)
        padded = min(counts) < columns
        return RunningRows(
            numbers=pick(self.numbers, positions),
            ends=ends,
            counts=counts,
            hidden_states=self.hidden_states[:, :columns][index],
            padding_mask=None if self.padding_mask is None or not padded else self.padding_mask[:, :columns][index],
            skipped=pick(self.skipped, positions),
            depth=self.depth,
            seen=None if self.seen is None else self.seen[index],
            attend=self.attend,
        )

    @staticmethod
    def merge(groups: Sequence[RunningRows]) -> RunningRows:
        """One set of all the rows of several that have come equally far under one plan, in order.

        Shorter groups are padded on the right; a single group comes back as it is.

        Args:
            groups: At least one.
        """
        first, *others = groups
        if not others:
            return first
        rows, columns = sum(map(len, groups)), max(group.longest for group in groups)
        hidden_states = first.hidden_states.new_empty(rows, columns, first.hidden_states.shape[-1])
        padding_mask = None
        if any(group.padding_mask is not None or group.longest < columns for group in groups):
            padding_mask = torch.zeros(rows, columns, dtype=torch.bool, device=hidden_states.device)
        start = 0
        for group in groups:
            own = slice(start, start + len(group))
            hidden_states[own, : group.longest] = group.hidden_states
            hidden_states[own, group.longest :] = 0  # what stands in padding must be finite
            if padding_mask is not None:
                real = True if group.padding_mask is None else group.padding_mask != 0
                padding_mask[own, : group.longest] = real
            start += len(group)
        return RunningRows(
            numbers=[number for group in groups for number in group.numbers],
            ends=[end for group in groups for end in group.ends],
            counts=[count for group in groups for count in group.counts],
            hidden_states=hidden_states,
            padding_mask=padding_mask,
            skipped=[past for group in groups for past in group.skipped],
            depth=first.depth,
            seen=None if first.seen is None else torch.cat([group.seen for group in groups if group.seen is not None]),
            attend=first.attend,
        )


def ends_and_counts(attention_mask: Tensor | None, rows: int, columns: int) -> tuple[list[int], list[int]]:
    """Position after the last real token, and number of real tokens, of each row, on the host.

    Args:
        attention_mask: 1 for real tokens, 0 for padding, shape (rows, columns); `None` where nothing is padded.
        rows: Number of rows.
        columns: Tokens per row, padding included.

    Raises:
        ValueError: If a row is all padding.

    Example:
        >>> ends_and_counts(torch.tensor([[1, 1, 0], [0, 1, 1]]), 2, 3)
        ([2, 3], [2, 2])
    """
    if attention_mask is None:
        return [columns] * rows, [columns] * rows
    real = attention_mask != 0
    positions = torch.arange(1, columns + 1, device=attention_mask.device)
    ends, counts = torch.stack([(positions * real).amax(dim=1), real.sum(dim=1)]).tolist()
    if 0 in counts:
        raise ValueError(
            f"Row {counts.index(0)} of `attention_mask` is all padding. Drop the row, or tokenize it: "
            "even an empty text has its special tokens."
        )
    return ends, counts


def pick(values: Sequence[Value], positions: Iterable[int]) -> list[Value]:
    """The values at these positions.

    >>> pick([4, 5, 6], [2, 0])
    [6, 4]
    """
    return [values[position] for position in positions]


def host_index(positions: Sequence[int], device: torch.device) -> Tensor:
    """Positions that the host knows, on the device, without waiting for it; shape (positions,)."""
    return torch.tensor(positions, dtype=torch.long).to(device, non_blocking=True)
