"""Whether live texts still look like those that exit settings were chosen on, told without labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .configuration_costeff import CostEffConfig
from .exit_criteria import answer_confidence, probabilities
from .exit_replay import ExitLogits, ExitReplay, stored_settings

BETS: tuple[Callable[[float], float], ...] = (  # each has mean 1 over p in 0..1
    lambda p: 0.5 + p,  # on values above those seen before
    lambda p: 1.5 - p,  # below
    lambda p: 0.5 + 6 * (p - 0.5) ** 2,  # at both ends
    lambda p: 1.5 - 6 * (p - 0.5) ** 2,  # in the middle
)
BINS_PER_NAT = 4
WIDEST_LOG_ODDS = 10.0
CONFIDENCE_BINS = int(2 * WIDEST_LOG_ODDS * BINS_PER_NAT) + 1


class RankMartingale:
    """Bets against the claim that the numbers of a stream come in no particular order (conformal test martingale).

    The rank of each new number among all before it, ties broken at random, is uniform if the claim holds, and
    independent of the ranks before. So the capital of whoever bets on ranks is a nonnegative martingale that starts at
    1 and ever reaches 1/alpha with probability alpha at most (Vovk, Gammerman and Shafer 2022, Algorithmic Learning in
    a Random World, chapter 8; Ville 1939). Unlike the simple jumper of Vovk et al. 2021, it expects a change at any
    time: after t numbers 1/(t + 1) of the first capital still sleeps, so a long calm costs only its length's logarithm.

    Args:
        counts: How often each value was seen, by its whole number from 0 on.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = np.array(counts, dtype=np.int64)
        self.steps = 0
        self.capital = [0.0] * len(BETS)

    @property
    def wealth(self) -> float:
        """Present capital, sleeping and betting; 1 at the start."""
        return 1 / (self.steps + 1) + sum(self.capital)

    def update(self, value: int, tie: float) -> None:
        """Bet on one more number.

        Args:
            value: A whole number below the length of `counts`.
            tie: A random number in 0..1, drawn for this step alone.
        """
        equal = self.counts[value] + 1
        p = float((self.counts[:value].sum() + tie * equal) / (self.counts.sum() + 1))
        woken = (1 / (self.steps + 1) - 1 / (self.steps + 2)) / len(BETS)
        self.capital = [(share + woken) * bet(p) for share, bet in zip(self.capital, BETS, strict=True)]
        self.counts[value] += 1
        self.steps += 1


class ExitMonitor:
    """Watches exit layers and confidences for a change since calibration, and needs no labels.

    A promise holds for texts like those it was made on. Fed with what `predict` returns, in any batches, the monitor
    raises an alarm when exit layers or confidences do not look like the calibration sample any more. As long as they
    come from the same distribution, the chance that it ever does, however long the stream and however often one looks,
    is at most `false_alarm_rate`: exactly, if the settings were not chosen on the calibration rows given here, else
    nearly. It cannot see a change that leaves both as they were.

    Args:
        exit_layers: 1-based layer at which each calibration row left, shape (rows,).
        confidence: Confidence of each calibration row, as `predict` returns it, shape (rows,); `None` for regression.
        depth: Layers of the model.
        false_alarm_rate: Largest chance of a false alarm over the whole stream, above 0 and below 1.
        seed: Of the random numbers that break ties.

    Raises:
        ValueError: No rows, a layer or confidence out of range, or a rate out of range.

    Example: all rows left at layer 1 at calibration, and none does now.

        >>> monitor = ExitMonitor([1] * 50, None, depth=4)
        >>> monitor.update([1, 1, 1]), monitor.update([4] * 30)
        (False, True)
    """

    def __init__(
        self,
        exit_layers: Sequence[int] | Tensor,
        confidence: Sequence[float] | Tensor | None,
        *,
        depth: int,
        false_alarm_rate: float = 0.01,
        seed: int = 0,
    ) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"`false_alarm_rate` is {false_alarm_rate:g}. It must lie above 0 and below 1.")
        self.depth, self.false_alarm_rate = depth, false_alarm_rate
        self.alarm_at: int | None = None
        self.rows = 0
        self._ties = np.random.default_rng(seed)
        streams = self._streams(exit_layers, confidence)
        if not len(streams["exit layers"]):
            raise ValueError("There are no calibration rows to compare with. Give at least one, better some hundreds.")
        sizes = {"exit layers": depth, "confidence": CONFIDENCE_BINS}
        self._martingales = {
            name: RankMartingale(np.bincount(values, minlength=sizes[name]).tolist())
            for name, values in streams.items()
        }

    @classmethod
    def from_records(
        cls, records: ExitLogits, config: CostEffConfig, *, false_alarm_rate: float = 0.01, seed: int = 0
    ) -> ExitMonitor:
        """A monitor that starts from calibration rows, as the settings in `config.exit_config` answer them.

        Args:
            records: Logits of all exits on the calibration rows, see `hf_costeff.evaluation.collect_exit_logits`.
            config: The model's.
            false_alarm_rate: As in the class.
            seed: As in the class.

        Raises:
            ValueError: If the model has no exit settings.
        """
        settings = stored_settings(config)
        exits = ExitReplay(records, config).at(settings)
        chances = probabilities(exits.scaled_logits(settings), config.resolved_problem_type)
        confidence = answer_confidence(chances, config.resolved_problem_type)
        return cls(
            *(exits.exit_layer, confidence),
            depth=config.num_hidden_layers,
            false_alarm_rate=false_alarm_rate,
            seed=seed,
        )

    @property
    def alarm(self) -> bool:
        """Whether there ever was an alarm; it stays, because the texts were not alike from then on."""
        return self.alarm_at is not None

    @property
    def evidence(self) -> dict[str, float]:
        """Odds against "as at calibration" by what is watched, each of which raises an alarm at `alarm_level`.

        They are the present ones, or those of the alarm if there was one: nothing is bet after it.
        """
        return {name: martingale.wealth for name, martingale in self._martingales.items()}

    @property
    def alarm_level(self) -> float:
        """The false-alarm rate is shared among what is watched: with two streams each may raise half of it."""
        return len(self._martingales) / self.false_alarm_rate

    def update(self, exit_layers: Sequence[int] | Tensor, confidence: Sequence[float] | Tensor | None = None) -> bool:
        """Take in live rows, in the order they came.

        Args:
            exit_layers: `exit_layer` of `predict`'s result, shape (rows,).
            confidence: `confidence` of `predict`'s result, shape (rows,); `None` as at calibration.

        Returns:
            Whether there is, or was, an alarm.

        Raises:
            ValueError: Values out of range, or confidences where calibration had none, or the other way round.
        """
        streams = self._streams(exit_layers, confidence)
        if streams.keys() != self._martingales.keys():
            raise ValueError(f"Given: {', '.join(streams)}. Calibration had: {', '.join(self._martingales)}.")
        for row in zip(*streams.values(), strict=True):
            self.rows += 1
            if self.alarm:
                continue
            for martingale, value in zip(self._martingales.values(), row, strict=True):
                martingale.update(int(value), self._ties.random())
            if max(self.evidence.values()) >= self.alarm_level:
                self.alarm_at = self.rows
        return self.alarm

    def describe(self) -> str:
        """A sentence on what was seen."""
        rate = f"(false-alarm rate {self.false_alarm_rate:g})"
        if self.alarm_at is None:
            return f"{self.rows:,} live rows look like the calibration sample {rate}."
        return (
            f"Since row {self.alarm_at:,} of {self.rows:,} the live rows do not look like the calibration sample "
            f"{rate}. What was promised may not hold. Calibrate on new rows."
        )

    def to_json(self) -> str:
        """Everything needed to go on later, as text of constant size; no texts and no rows."""
        state = {
            "depth": self.depth,
            "false_alarm_rate": self.false_alarm_rate,
            "alarm_at": self.alarm_at,
            "rows": self.rows,
            "ties": self._ties.bit_generator.state,
            "martingales": {
                name: {"counts": martingale.counts.tolist(), "steps": martingale.steps, "capital": martingale.capital}
                for name, martingale in self._martingales.items()
            },
        }
        return json.dumps(state)

    @classmethod
    def from_json(cls, text: str) -> ExitMonitor:
        """The monitor that [`to_json`] wrote, going on where it stopped."""
        state: dict[str, Any] = json.loads(text)
        monitor = cls.__new__(cls)
        monitor.depth, monitor.false_alarm_rate = state["depth"], state["false_alarm_rate"]
        monitor.alarm_at, monitor.rows = state["alarm_at"], state["rows"]
        monitor._ties = np.random.default_rng()
        monitor._ties.bit_generator.state = state["ties"]
        monitor._martingales = {}
        for name, kept in state["martingales"].items():
            monitor._martingales[name] = martingale = RankMartingale(kept["counts"])
            martingale.steps, martingale.capital = kept["steps"], kept["capital"]
        return monitor

    def _streams(
        self, exit_layers: Sequence[int] | Tensor, confidence: Sequence[float] | Tensor | None
    ) -> dict[str, np.ndarray]:
        """What is watched, as whole numbers from 0 on; bins are fixed beforehand, so that ranks stay exact."""
        layers = torch.as_tensor(exit_layers).cpu().numpy().astype(np.int64)
        if len(layers) and not (layers.min() >= 1 and layers.max() <= self.depth):
            raise ValueError(f"Exit layers lie in {layers.min()}..{layers.max()}. They must lie in 1..{self.depth}.")
        if confidence is None:
            return {"exit layers": layers - 1}
        sure = torch.as_tensor(confidence).double().cpu().numpy()
        if len(sure) != len(layers) or not ((sure >= 0) & (sure <= 1)).all():
            raise ValueError(
                f"There are {len(sure)} confidences for {len(layers)} exit layers. There must be one in 0..1 for each."
            )
        nearest = math.exp(-WIDEST_LOG_ODDS)
        log_odds = np.log(np.maximum(sure, nearest)) - np.log(np.maximum(1 - sure, nearest))
        bins = np.floor((log_odds.clip(-WIDEST_LOG_ODDS, WIDEST_LOG_ODDS) + WIDEST_LOG_ODDS) * BINS_PER_NAT)
        return {"exit layers": layers - 1, "confidence": bins.astype(np.int64)}
