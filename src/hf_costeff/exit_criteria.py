"""When a row may leave: criteria over the exit logits seen so far, and the settings that choose one.

A criterion is a pure function of the logits a row has produced at the checked exits up to now. It holds no state
between rows or calls, so a row's answer cannot depend on its batch, and the same object replays stored logits
(`simulate_exits`) when thresholds are chosen.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"


def decision_log_probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Log-probabilities of every decision a row takes: one for single-label, one yes/no per label for multi-label.

    Args:
        logits: Raw logits, shape (..., labels).
        problem_type: `"single_label_classification"` or `"multi_label_classification"`.

    Returns:
        Natural logarithms, shape (..., decisions, classes): (..., 1, labels) or (..., labels, 2). Computed by
        log-softmax in at least single precision, so finite for logits of any finite size.

    Raises:
        ValueError: For regression, where a number has no probability.

    Example:
        >>> decision_log_probabilities(torch.zeros(1, 2), "single_label_classification").exp()
        tensor([[[0.5000, 0.5000]]])
        >>> decision_log_probabilities(torch.zeros(1, 3), "multi_label_classification").shape
        torch.Size([1, 3, 2])
    """
    scores = torch.log_softmax(_choices(logits, problem_type), dim=-1)
    return scores.unsqueeze(-2) if problem_type == SINGLE_LABEL else scores


def decision_probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Probabilities of the choices a row has: its classes, or no and yes of every label.

    Args:
        logits: Raw logits, shape (..., labels).
        problem_type: As for [`decision_log_probabilities`].

    Returns:
        Shape (..., labels), or (..., labels, 2) for multi-label, in at least single precision.

    Raises:
        ValueError: For regression, where a number has no probability.

    Example:
        >>> decision_probabilities(torch.zeros(1, 2), "multi_label_classification")
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    return torch.softmax(_choices(logits, problem_type), dim=-1)


def _choices(logits: Tensor, problem_type: str) -> Tensor:
    """Logits of the choices, shape (..., labels) or (..., labels, 2)."""
    if problem_type == REGRESSION:
        raise ValueError(
            "A regression model has no class probabilities, so entropy, confidence and margin do not exist. "
            'Use ExitConfig(criterion="patience", patience=..., tolerance=<label units>).'
        )
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits if problem_type == SINGLE_LABEL else torch.stack([torch.zeros_like(logits), logits], -1)


def probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Class probabilities (softmax), label probabilities (sigmoid), or the values themselves for regression.

    Args:
        logits: Raw logits, shape (batch, labels).
        problem_type: As upstream's `config.problem_type`.

    Returns:
        Shape (batch, labels).

    Example:
        >>> probabilities(torch.zeros(1, 4), "single_label_classification")
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if problem_type == REGRESSION:
        return logits
    chances = decision_probabilities(logits, problem_type)
    return chances if problem_type == SINGLE_LABEL else chances[..., 1]


def answers(logits: Tensor, problem_type: str) -> Tensor:
    """What logits answer.

    Args:
        logits: Raw logits, shape (..., labels).
        problem_type: As upstream's `config.problem_type`.

    Returns:
        Classes, shape (...); for multi-label 0 or 1 per label, shape (..., labels); for regression values, shape (...).

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> answers(logits, "single_label_classification"), answers(logits, "multi_label_classification")
        (tensor([1]), tensor([[1., 1.]]))
    """
    if problem_type == REGRESSION:
        return logits[..., 0]
    return (logits > 0).float() if problem_type == MULTI_LABEL else logits.argmax(dim=-1)


def same_answers(found: Tensor, others: Tensor, problem_type: str) -> Tensor:
    """Whether answers are the same, row by row; a multi-label answer is the whole set of labels.

    Args:
        found: From [`answers`], shape (...) or, for multi-label, (..., labels).
        others: Answers or true labels of the same shape, or one that spreads to it.
        problem_type: As upstream's `config.problem_type`.

    Returns:
        Booleans, shape (...).

    Example:
        >>> same_answers(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), "multi_label_classification")
        tensor([False])
    """
    same = found == others
    return same.all(-1) if problem_type == MULTI_LABEL else same


def answer_confidence(chances: Tensor, problem_type: str) -> Tensor | None:
    """How probable the answer is: its own probability, or that of the least sure label.

    Args:
        chances: From [`probabilities`], shape (batch, labels).
        problem_type: As upstream's `config.problem_type`.

    Returns:
        Shape (batch,); `None` for regression.

    Example:
        >>> answer_confidence(torch.tensor([[0.75, 0.25]]), "single_label_classification")
        tensor([0.7500])
    """
    if problem_type == REGRESSION:
        return None
    return torch.maximum(chances, 1 - chances).amin(-1) if problem_type == MULTI_LABEL else chances.amax(-1)


def entropy(chances: Tensor) -> Tensor:
    """Entropy in nats, between 0 and ln(classes).

    Args:
        chances: From [`decision_probabilities`], shape (..., classes).

    Returns:
        Shape (...).

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    return torch.special.entr(chances).sum(-1)


def normalized_entropy(chances: Tensor) -> Tensor:
    """Entropy over ln(classes), between 0 and 1, shape (...), from probabilities of shape (..., classes)."""
    return entropy(chances) / math.log(chances.shape[-1])


def normalized_confidence(chances: Tensor) -> Tensor:
    """Largest probability, rescaled so that 0 is a uniform guess and 1 is certainty.

    Args:
        chances: Shape (..., classes).

    Returns:
        (p_max - 1/C) / (1 - 1/C), shape (...).
    """
    uniform = 1 / chances.shape[-1]
    return ((chances.amax(-1) - uniform) / (1 - uniform)).clamp(0, 1)  # 1 despite rounding


def margin(chances: Tensor) -> Tensor:
    """Gap between the two largest probabilities, in 0..1, shape (...), from probabilities of shape (..., classes)."""
    top = chances.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


class ExitCriterion(ABC):
    """A rule for leaving. Subclasses answer for a batch of rows at one checked exit."""

    name: ClassVar[str]
    looks_back: ClassVar[bool] = False
    """Whether earlier exits' logits matter too."""

    def __init__(self, settings: ExitConfig, num_exits: int, problem_type: str) -> None:
        """Spread the settings over the exits.

        Args:
            settings: Thresholds, temperatures and counts; one value serves all exits.
            num_exits: Exits of the model, checked or not.
            problem_type: As upstream's `config.problem_type`.

        Raises:
            ValueError: If a list has not one entry per exit, or the criterion cannot serve the problem type.
        """
        self.problem_type = problem_type
        self.temperatures = spread("temperatures", settings.temperatures, num_exits)

    def scaled(self, logits: Tensor, exit_index: int) -> Tensor:
        """Logits over the exit's temperature, shape as given."""
        temperature = self.temperatures[exit_index]
        return logits if temperature == 1 else logits / temperature

    def can_leave(self, exit_index: int) -> bool:
        """Whether any logits let a row leave at this exit; where none do, and it tells later exits nothing, `False`."""
        return True

    def leaves(self, history: Tensor, exit_index: int) -> Tensor:
        """Which rows leave at this exit: booleans, True = leaves, shape (rows,); arguments as for [`evidence`].

        Compared in double precision, as `predict` does on the host.
        """
        return self.passes(self.evidence(history, exit_index).double(), exit_index)

    @abstractmethod
    def evidence(self, history: Tensor, exit_index: int) -> Tensor:
        """The number by which each row is judged at this exit.

        Args:
            history: Raw logits of the checked exits so far, this one last, shape (rows, seen, labels); this one alone
                is enough for a criterion that does not look back.
            exit_index: 0-based position of this exit in the model's list of exits.

        Returns:
            Floating point, shape (rows,).
        """

    @abstractmethod
    def passes(self, evidence: Tensor | float, exit_index: int) -> Any:
        """Whether rows with this evidence leave: a boolean for a number, booleans for a tensor of the same shape.

        A tensor must be in double precision: in a lower one the threshold would be rounded.
        """


class ThresholdCriterion(ExitCriterion):
    """A criterion that compares one measure of the current exit with a threshold."""

    lower_is_surer: ClassVar[bool]
    nobody_leaves: ClassVar[float]
    everybody_leaves: ClassVar[float]

    def __init__(self, settings: ExitConfig, num_exits: int, problem_type: str) -> None:
        super().__init__(settings, num_exits, problem_type)
        if problem_type == REGRESSION:
            raise ValueError(
                f"The {self.name} criterion needs class probabilities, and this is a regression model. "
                'Use ExitConfig(criterion="patience", patience=..., tolerance=<label units>).'
            )
        if settings.threshold is None:
            raise ValueError(f"The {self.name} criterion needs a `threshold`: one number, or one per exit.")
        self.thresholds = spread("threshold", settings.threshold, num_exits)

    @abstractmethod
    def measure(self, chances: Tensor) -> Tensor:
        """The compared quantity of a decision, shape (...), from its probabilities, shape (..., classes)."""

    def measured(self, logits: Tensor, exit_index: int) -> Tensor:
        """The compared quantity of one exit's raw logits (rows, labels), at its temperature, shape (rows,).

        For multi-label that of the least sure label.
        """
        found = self.measure(decision_probabilities(self.scaled(logits, exit_index), self.problem_type))
        if self.problem_type == SINGLE_LABEL:
            return found
        return found.amax(-1) if self.lower_is_surer else found.amin(-1)

    def evidence(self, history: Tensor, exit_index: int) -> Tensor:
        """The exit's own measure, shape (rows,)."""
        return self.measured(history[:, -1], exit_index)

    def passes(self, evidence: Tensor | float, exit_index: int) -> Any:
        """Strict comparison; a threshold at or past the far end lets every row leave, by definition."""
        threshold = self.thresholds[exit_index]
        if (threshold >= self.everybody_leaves) if self.lower_is_surer else (threshold <= self.everybody_leaves):
            return evidence == evidence
        return evidence < threshold if self.lower_is_surer else evidence > threshold

    def can_leave(self, exit_index: int) -> bool:
        """False for a threshold at or past the careful end: the comparison is strict."""
        threshold = self.thresholds[exit_index]
        return threshold > self.nobody_leaves if self.lower_is_surer else threshold < self.nobody_leaves


class EntropyCriterion(ThresholdCriterion):
    """Leave when the normalised entropy, entropy / ln(classes), is strictly below the threshold (a fraction).

    0: nobody leaves early; 1 or more: everybody leaves at the first checked exit. One scale for 2 and for 150 classes
    (COST-EFF, Shen et al. 2022, uses nats; see [`EntropyInNatsCriterion`]).
    """

    name = "entropy"
    lower_is_surer = True
    nobody_leaves = 0.0
    everybody_leaves = 1.0

    def measure(self, chances: Tensor) -> Tensor:
        """Normalised entropy, shape (...)."""
        return normalized_entropy(chances)


class EntropyInNatsCriterion(ThresholdCriterion):
    """Leave when the entropy in nats is strictly below the threshold, as the papers state it (ln C at most)."""

    name = "entropy_nats"
    lower_is_surer = True
    nobody_leaves = 0.0
    everybody_leaves = math.inf

    def measure(self, chances: Tensor) -> Tensor:
        """Entropy in nats, shape (...)."""
        return entropy(chances)


class ConfidenceCriterion(ThresholdCriterion):
    """Leave when the largest probability, rescaled to [0, 1], is strictly above the threshold.

    1: nobody leaves early; 0: everybody leaves at the first checked exit, by definition.
    """

    name = "confidence"
    lower_is_surer = False
    nobody_leaves = 1.0
    everybody_leaves = 0.0

    def measure(self, chances: Tensor) -> Tensor:
        """Rescaled largest probability, shape (...)."""
        return normalized_confidence(chances)


class MarginCriterion(ThresholdCriterion):
    """Leave when the gap of the two largest probabilities is strictly above the threshold; limits as confidence."""

    name = "margin"
    lower_is_surer = False
    nobody_leaves = 1.0
    everybody_leaves = 0.0

    def measure(self, chances: Tensor) -> Tensor:
        """Gap of the two largest probabilities, shape (...)."""
        return margin(chances)


class PatienceCriterion(ExitCriterion):
    """Leave when `patience` checked exits in a row repeat the answer of the exit before them (PABEE, Zhou et al. 2020).

    Classification compares the arg-max, multi-label the set of labels above one half, regression the value within
    `tolerance` (label units, strictly). The earliest exit is therefore checked exit number `patience` + 1; where it is
    0, everybody leaves.
    """

    name = "patience"
    looks_back = True

    def __init__(self, settings: ExitConfig, num_exits: int, problem_type: str) -> None:
        super().__init__(settings, num_exits, problem_type)
        if settings.patience is None:
            raise ValueError("The patience criterion needs `patience`: how many agreeing exits in a row, 0 or more.")
        self.patience = [int(count) for count in spread("patience", settings.patience, num_exits)]
        if problem_type == REGRESSION and any(self.patience) and settings.tolerance is None:
            raise ValueError("Patience on a regression model needs `tolerance`: the largest change, in label units.")
        self.tolerance = settings.tolerance or 0.0

    def can_leave(self, exit_index: int) -> bool:
        """False where neither this nor any later exit but the last has seen enough exits to let a row leave.

        With a tolerance of 0 no change is small enough, so that only a patience of 0 lets rows leave.
        """
        fixed = self.problem_type == REGRESSION and self.tolerance == 0
        exits = range(exit_index, len(self.patience) - 1)
        return any(self.patience[later] <= (0 if fixed else later) for later in exits)

    def evidence(self, history: Tensor, exit_index: int) -> Tensor:
        """1 where the exit's `patience` last steps between checked exits all agree, otherwise 0, shape (rows,)."""
        patience = self.patience[exit_index]
        if history.shape[1] <= patience:
            return torch.zeros(len(history), device=history.device)
        window = history[:, -patience - 1 :]
        if self.problem_type == REGRESSION:
            agrees = (window[:, 1:] - window[:, :-1]).abs().amax(-1) < self.tolerance
        else:
            answered = answers(window, self.problem_type)
            agrees = answered[:, 1:] == answered[:, :-1]
        return agrees.flatten(1).all(-1).float()

    def passes(self, evidence: Tensor | float, exit_index: int) -> Any:
        """Whether all agree."""
        return evidence > 0


CRITERIA: dict[str, type[ExitCriterion]] = {
    criterion.name: criterion
    for criterion in (EntropyCriterion, EntropyInNatsCriterion, ConfidenceCriterion, MarginCriterion, PatienceCriterion)
}


def spread(name: str, value: float | Sequence[float], num_exits: int) -> list[float]:
    """One number per exit, from one number or a list of the right length.

    >>> spread("threshold", 0.5, 3)
    [0.5, 0.5, 0.5]
    """
    if isinstance(value, (int, float)):
        return [float(value)] * num_exits
    if len(value) != num_exits:
        raise ValueError(
            f"`{name}` has {len(value)} entries and the model has {num_exits} exits. "
            "Give one number, or one per exit (the last exit's is never used)."
        )
    return [float(number) for number in value]


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_number(value: Any, low: float, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_count(value: Any, low: int = 1) -> bool:
    return isinstance(value, int) and _is_number(value, low)


@dataclass(frozen=True)
class ExitConfig:
    """Settings of early exit: to `predict` what `GenerationConfig` is to `generate`.

    Args:
        criterion: A key of `CRITERIA`: `"entropy"` (normalised), `"entropy_nats"`, `"confidence"`, `"margin"`,
            `"patience"`.
        threshold: Limit of the criterion, one number or one per exit: a fraction in 0..1 for entropy, confidence and
            margin; nats for `"entropy_nats"`; unused by patience.
        patience: Agreeing exits in a row, one number or one per exit; 0 lets everybody leave. Patience criterion only.
        tolerance: Largest change between exits that still agrees, in label units; regression only.
        temperatures: Divisor of the logits before the criterion looks at them, one or one per exit, above 0.
        checked_exits: Exit layers (1-based) whose exit is evaluated, ascending; `None` checks all. The last layer
            always answers and need not be listed.
        calibration: What was promised when the thresholds were chosen, and on what data; `None` if set by hand.

    Raises:
        ValueError: For a value out of its range; the message names the range.

    Example:
        >>> ExitConfig(threshold=0.3).to_dict()
        {'criterion': 'entropy', 'threshold': 0.3, 'temperatures': 1.0}
    """

    criterion: str = "entropy"
    threshold: float | list[float] | None = None
    patience: int | list[int] | None = None
    tolerance: float | None = None
    temperatures: float | list[float] = 1.0
    checked_exits: list[int] | None = None
    calibration: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"`criterion` is {self.criterion!r}. It must be one of {', '.join(CRITERIA)}.")
        high = math.inf if self.criterion == "entropy_nats" else 1.0
        if self.threshold is not None:
            for number in _numbers(self.threshold):
                self._require("threshold", number, _is_number(number, 0, high), f"a number in 0..{high:g}")
        for number in _numbers(self.temperatures):
            self._require("temperatures", number, _is_number(number, 0) and 0 < number < math.inf, "a number above 0")
        if self.patience is not None:
            counts = all(_is_count(number, 0) for number in _numbers(self.patience))
            self._require("patience", self.patience, counts, "a whole number, 0 or more, or one per exit")
        if self.tolerance is not None:
            self._require("tolerance", self.tolerance, _is_number(self.tolerance, 0), "0 or more, in label units")
        if self.checked_exits is not None:
            layers = _numbers(self.checked_exits)
            ascending = all(map(_is_count, layers)) and isinstance(self.checked_exits, (list, tuple))
            ascending = ascending and layers == sorted(set(layers))
            self._require("checked_exits", self.checked_exits, ascending, "1-based layers, ascending, without repeats")

    @staticmethod
    def _require(name: str, value: Any, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` is {value!r}. It must be {expected}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that differ from `None`, for `config.json`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitConfig:
        """The settings stored by [`to_dict`]; an unknown key is an error that names the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"Unknown exit settings {sorted(unknown)}. Known: {', '.join(sorted(known))}.")
        return cls(**values)

    @classmethod
    def resolve(cls, early_exit: bool | float | ExitConfig | None, saved: dict[str, Any] | None) -> ExitConfig | None:
        """What `predict(early_exit=...)` means for a model with these saved settings.

        Args:
            early_exit: `None` takes the saved settings, or full depth if there are none; `False` full depth; `True` the
                saved settings, which must exist; a number a threshold on the normalised entropy, with the saved
                temperatures and checked exits; an [`ExitConfig`] itself. Numbers above 1 count as 1.
            saved: `config.exit_config`.

        Returns:
            Settings, or `None` for full depth.

        Raises:
            ValueError: `True` without saved settings, or a threshold below 0.
            TypeError: For anything else.
        """
        if early_exit is False:
            return None
        stored = None if saved is None else cls.from_dict(saved)
        if early_exit is None or early_exit is True:
            if early_exit and stored is None:
                raise ValueError(
                    "early_exit=True uses the settings saved in the model, and this model has none. Run "
                    "`hf-costeff calibrate`, for a cascade `hf-costeff cascade calibrate`, or pass a threshold: "
                    "predict(..., early_exit=0.3)."
                )
            return stored
        if isinstance(early_exit, cls):
            return early_exit
        if isinstance(early_exit, Real):
            threshold = min(float(early_exit), 1.0)
            if stored is None:
                return cls(threshold=threshold)
            return cls(threshold=threshold, temperatures=stored.temperatures, checked_exits=stored.checked_exits)
        raise TypeError(
            f"early_exit is {early_exit!r}. Pass None, True, False, a number (threshold on the normalised entropy), "
            "or an ExitConfig."
        )

    def build_criterion(self, num_exits: int, problem_type: str) -> ExitCriterion:
        """The criterion these settings describe, for a model with `num_exits` exits."""
        return CRITERIA[self.criterion](self, num_exits, problem_type)

    def is_checked(self, exit_layer: int) -> bool:
        """Whether the exit after `exit_layer` (1-based) is evaluated."""
        return self.checked_exits is None or exit_layer in self.checked_exits


def simulate_exits(exit_logits: Tensor, settings: ExitConfig, exit_layers: Sequence[int], problem_type: str) -> Tensor:
    """Where each row would leave, replayed on stored logits of all exits.

    Exits do not change later computation, so this equals running `predict` row by row.

    Args:
        exit_logits: Raw logits, shape (rows, exits, labels).
        settings: Criterion and thresholds.
        exit_layers: 1-based layer of each exit, ascending.
        problem_type: As upstream's `config.problem_type`.

    Returns:
        0-based index of the exit each row leaves at, shape (rows,).

    Example: the first row is sure at the first exit, the second never.

        >>> logits = torch.tensor([[[9.0, 0.0], [9.0, 0.0]], [[0.1, 0.0], [0.2, 0.0]]])
        >>> simulate_exits(logits, ExitConfig(threshold=0.5), [1, 2], "single_label_classification")
        tensor([0, 1])
    """
    rows, num_exits, _ = exit_logits.shape
    criterion = settings.build_criterion(num_exits, problem_type)
    exit_index = torch.full((rows,), num_exits - 1, device=exit_logits.device)
    still_in = torch.ones(rows, dtype=torch.bool, device=exit_logits.device)
    seen: list[int] = []
    for index in range(num_exits - 1):
        if not settings.is_checked(exit_layers[index]):
            continue
        seen.append(index)
        leaving = still_in & criterion.leaves(exit_logits[:, seen], index)
        exit_index[leaving] = index
        still_in &= ~leaving
    return exit_index
