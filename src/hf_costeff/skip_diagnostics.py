"""What the gates of a model do on a data set: which layers, for which classes, and whether rows differ at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .configuration_costeff import CostEffConfig
from .efficiency import relative_layer_flops
from .exit_criteria import SINGLE_LABEL
from .exit_replay import ExitLogits


@dataclass(frozen=True)
class SkipDiagnostics:
    """Skipping at full depth, before any row leaves early.

    Args:
        rows: How many were looked at.
        layers_run: By a row, on average.
        layers_run_by_flops: The same with each layer counted by its FLOPs over those of the mean layer, as a target is.
        shares: Share of the rows that skip each layer, shape (layers,).
        class_shares: The same of every class that has rows; empty unless every row has one known class.
        paths: Share of the rows by the layers that they run, joined by spaces, the commonest path first.
    """

    rows: int
    layers_run: float
    layers_run_by_flops: float
    shares: list[float]
    class_shares: dict[str, list[float]]
    paths: Mapping[str, float]

    def describe(self) -> str:
        """In words: how many layers, and whether that depends on the row."""
        path, share = next(iter(self.paths.items()))
        run, by_flops = f"{self.layers_run:.2f}", f"{self.layers_run_by_flops:.2f}"
        counted = "" if run == by_flops else f", {by_flops} counted by their FLOPs"
        ran = f"A row runs {run} of {len(self.shares)} layers on average{counted}."
        if self.layers_run == 0:
            return f"{ran} Every row skips every layer, so the answer does not depend on the encoder. {COLLAPSED}"
        if self.layers_run == len(self.shares):
            return f"{ran} No row skips any layer. Train longer, raise `skip_weight`, or set a lower `target_layers`."
        if len(self.paths) == 1:
            return f"{ran} All take the same path, {name_path(path)}: the gates are static and do not look at the row."
        return f"{ran} They take {len(self.paths)} different paths; {share:.0%} take the commonest, {name_path(path)}."


COLLAPSED = "Lower `skip_weight`, or set `target_layers`, which holds skipping back."


def name_path(path: str) -> str:
    """A path in words.

    >>> name_path("1 4"), name_path("")
    ('layers 1 4', 'no layer')
    """
    return f"layers {path}" if path else "no layer"


def diagnose_skipping(records: ExitLogits, config: CostEffConfig) -> SkipDiagnostics | None:
    """What the gates did on rows; `None` for a model without gates.

    Args:
        records: With the layers that each row skips.
        config: The model's.

    Example: of two rows one skips the second layer.

        >>> import torch
        >>> skipped = torch.tensor([[False, True], [False, False]])
        >>> records = ExitLogits(torch.zeros(2, 2, 2), torch.tensor([4, 5]), torch.tensor([0, 1]), skipped=skipped)
        >>> found = diagnose_skipping(records, CostEffConfig(num_hidden_layers=2, id2label={0: "dull", 1: "bright"}))
        >>> found.shares, found.class_shares["dull"], dict(found.paths)
        ([0.0, 0.5], [0.0, 1.0], {'1': 0.5, '1 2': 0.5})
        >>> found.describe()
        'A row runs 1.50 of 2 layers on average. They take 2 different paths; 50% take the commonest, layers 1.'
    """
    if records.skipped is None:
        return None
    skipped = records.skipped.numpy()
    shares = skipped.mean(axis=0)
    paths = Counter(" ".join(map(str, 1 + np.flatnonzero(~row))) for row in skipped)
    classes = {}
    if config.resolved_problem_type == SINGLE_LABEL and records.labels is not None:
        labels = records.known_labels()
        for label in np.unique(labels).tolist():
            classes[str(config.id2label[label])] = skipped[labels == label].mean(axis=0).tolist()
    return SkipDiagnostics(
        rows=len(skipped),
        layers_run=float((1 - shares).sum()),
        layers_run_by_flops=float((1 - shares) @ np.array(relative_layer_flops(config))),
        shares=shares.tolist(),
        class_shares=classes,
        paths={path: count / len(skipped) for path, count in paths.most_common()},
    )
