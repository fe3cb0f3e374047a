"""Training of skip gates: which parts learn, the contrast between depths, and the incentive to skip with its budget."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .configuration_costeff import CostEffConfig
from .efficiency import PAPER_SEQ_LENGTH, gate_flops, layer_flops, relative_layer_flops
from .losses import cross_layer_contrastive_loss, skip_loss
from .modeling_costeff import CostEffForSequenceClassification
from .regularizer import Regularizer
from .skip_diagnostics import COLLAPSED
from .skip_gates import is_skipped
from .training_args import ALL, BACKBONE, EXITS, CostEffTrainingArguments

logger = logging.get_logger(__name__)
PROJECTION_SIZE = 128
LEARNING_EXITS = {ALL: slice(None), BACKBONE: slice(-1, None), EXITS: slice(-1)}
"""Which exits, shallow first, have a loss."""


def frozen_modules(model: CostEffForSequenceClassification, trained_parts: str) -> list[nn.Module]:
    """What does not learn.

    Args:
        model: The model.
        trained_parts: As in [`CostEffTrainingArguments`].
    """
    if trained_parts == ALL:
        return []
    *before, last = model.costeff.exits.values()
    if trained_parts == BACKBONE:
        return before
    return [last, *(module for name, module in model.costeff.named_children() if name != "exits")]


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients for these modules inside, so that no optimizer touches them, not even by weight decay."""
    parameters = [each for module in modules for each in module.parameters() if each.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def check_skip_settings(args: CostEffTrainingArguments, config: CostEffConfig) -> None:
    """Refuse settings of skipping that the model has no use for.

    Args:
        args: Of the training.
        config: Of the model.

    Raises:
        ValueError: Naming the setting and the remedy.
    """
    gated = config.skip_gates is not None
    for name in ("skip_weight", "target_layers"):
        if getattr(args, name) and not gated:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, but the model has no gates. Add them: add_skip_gates."
            )
        if getattr(args, name) and args.trained_parts == EXITS:
            raise ValueError(f"`{name}` is {getattr(args, name)}, and gates do not learn with `trained_parts` 'exits'.")
    if args.trained_parts == EXITS and len(config.exit_layers) == 1:
        raise ValueError("`trained_parts` is 'exits', and the model has none before the last. Leave this phase out.")
    if args.contrastive_weight and args.trained_parts == EXITS:
        raise ValueError("`contrastive_weight` is for layers, which do not learn with `trained_parts` 'exits'.")
    if args.exit_contrastive_weight:
        if args.trained_parts == BACKBONE:
            raise ValueError("`exit_contrastive_weight` is for exits, of which one learns with 'backbone'.")
        if len(config.exit_layers[LEARNING_EXITS[args.trained_parts]]) == 1:
            raise ValueError("`exit_contrastive_weight` compares exits that learn, and only one does. Set it to 0.")
        if config.exit_head != "attention":
            raise ValueError(
                f"`exit_contrastive_weight` needs heads with token states, and the model's are {config.exit_head}. "
                "Set it to 0, or build the model with exit_head='attention'."
            )
    if args.target_layers is not None:
        check_target_layers(args.target_layers, config)


def check_target_layers(target: float, config: CostEffConfig) -> None:
    """Refuse a budget that skipping cannot reach, or that saves less than the gates cost.

    Args:
        target: Layers that a row shall run on average, each counted by its FLOPs.
        config: Of a model with gates.

    Raises:
        ValueError: With the largest target that saves anything, or the least; or naming layers that cost no more than
            an attention gate, where a linear one would cost less.
    """
    layers, gate = config.num_hidden_layers, gate_flops(config, PAPER_SEQ_LENGTH)
    costs = [layer_flops(config, layer, PAPER_SEQ_LENGTH) for layer in range(1, layers + 1)]
    if not 0 < target < layers:
        raise ValueError(
            f"`target_layers` is {target:g}. It must lie above 0 and below {layers}, the number of layers."
        )
    if layers * gate >= sum(costs):
        raise ValueError("The gates cost no less than all layers together, so no `target_layers` saves anything.")
    lighter = "" if config.skip_gates == "linear" else " Or take lighter gates from the start: linear ones."
    of_gates = layers * layers * gate / sum(costs)
    largest = layers - of_gates
    if target >= largest:
        raise ValueError(
            f"`target_layers` is {target:g}, which saves no more than the gates themselves cost. It must be below "
            f"{largest:.2f} here.{lighter}"
        )
    if target < of_gates:
        raise ValueError(
            f"`target_layers` is {target:g}, and the gates alone cost as much as {of_gates:.2f} layers. It must be at "
            f"least that.{lighter}"
        )
    dear = [layer for layer, cost in enumerate(costs, start=1) if cost <= gate]
    if dear and config.skip_gates != "linear":
        raise ValueError(
            f"`target_layers` is {target:g}, and layers {', '.join(map(str, dear))} cost no more than their gates, so "
            f"skipping them saves nothing. Leave it out.{lighter}"
        )


def projection(width: int) -> nn.Sequential:
    """Where states are compared: linear, norm, tanh, linear (SmartBERT)."""
    return nn.Sequential(
        nn.Linear(width, PROJECTION_SIZE),
        nn.LayerNorm(PROJECTION_SIZE),
        nn.Tanh(),
        nn.Linear(PROJECTION_SIZE, PROJECTION_SIZE),
    )


class ContrastiveHeads(Regularizer):
    """The two contrasts, with their projections: one per layer, on what it takes, and one per exit head that learns.

    Projections learn beside the model and stay out of it: they are in the checkpoints alone. They take no part in
    gradient clipping.

    Args:
        args: Of the training; a contrast without weight has no projections.
        config: Of the model.
    """

    FILE = "contrastive_heads.safetensors"

    def __init__(self, args: CostEffTrainingArguments, config: CostEffConfig) -> None:
        self.temperature, self.exit_temperature = args.contrastive_temperature, args.exit_contrastive_temperature
        self.learning_exits = LEARNING_EXITS[args.trained_parts]
        weights = {"contrastive_loss": args.contrastive_weight, "exit_contrastive_loss": args.exit_contrastive_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        layers = config.num_hidden_layers if args.contrastive_weight else 0
        exits = len(config.exit_layers[self.learning_exits]) if args.exit_contrastive_weight else 0
        self.layers = nn.ModuleList(projection(config.hidden_size) for _ in range(layers))
        self.exits = nn.ModuleList(projection(config.exit_head_size) for _ in range(exits))
        self.heads = nn.ModuleDict({"layers": self.layers, "exits": self.exits}).to(args.device)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the optimizer: matrices with weight decay, vectors without."""
        parameters = list(self.heads.parameters())
        groups = [([each for each in parameters if each.dim() > 1], weight_decay)]
        groups += [([each for each in parameters if each.dim() == 1], 0.0)]
        return [{"params": group, "weight_decay": decay} for group, decay in groups if group]

    def parts(self, outputs: Any, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """The loss parts: over layers the sum over pairs, over exits the mean.

        Args:
            outputs: The model's, with hidden states where layers are compared and exit states where exits are.
            attention_mask: 1 for real tokens, shape (batch, seq).
        """
        parts = {}
        if self.layers:
            states = [head(state.float()) for head, state in zip(self.layers, outputs.hidden_states[:-1], strict=True)]
            parts["contrastive_loss"] = cross_layer_contrastive_loss(states, attention_mask, self.temperature)
        if self.exits:
            inside = outputs.exit_states[self.learning_exits]
            states = [head(state.float()) for head, state in zip(self.exits, inside, strict=True)]
            total = cross_layer_contrastive_loss(states, attention_mask, self.exit_temperature)
            parts["exit_contrastive_loss"] = total / max(1, len(states) - 1)
        return parts

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the gradients over processes."""
        for parameter in self.heads.parameters() if args.world_size > 1 else ():
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the gradients, as upstream does the model's."""
        self.heads.zero_grad()

    def save(self, folder: str | Path) -> None:
        """Write the projections."""
        if tensors := self.heads.state_dict():
            save_file(tensors, Path(folder) / self.FILE)

    def load(self, folder: str | Path) -> None:
        """Read them.

        Raises:
            ValueError: If the checkpoint has none.
        """
        if not len(self.heads.state_dict()):
            return
        file = Path(folder) / self.FILE
        if not file.exists():
            raise ValueError(f"The checkpoint {folder} was written without contrast. Start afresh, in another folder.")
        self.heads.load_state_dict(load_file(file))


class SkipIncentive(Regularizer):
    """The incentive to skip, and with a target the weight that reaches it.

    The error is (layers run - target) / layers as the gates decide at their threshold on a step's rows, whether weights
    are soft or hard. The next step pushes the gates with `GAIN` times the error plus a lasting push, which grows by
    `RATE` times the error to 1 at most, and is halved when the error changes its side, so that it does not carry gates
    past the target. Each layer is counted, and its gate pushed, by its FLOPs over those of the mean layer: else a
    target would be met by skipping what costs least. The weight is what makes the incentive push so hard. Unlike the
    paper, whose weight is fixed and found by trial.

    Args:
        args: Of the training.
        config: Of the model; without gates there is no incentive.
    """

    FILE = "skip_incentive.json"
    GAIN, RATE, LEAST = 2.0, 0.05, 1e-3

    def __init__(self, args: CostEffTrainingArguments, config: CostEffConfig) -> None:
        self.learns = config.skip_gates is not None and args.trained_parts != EXITS
        self.num_layers, self.threshold = config.num_hidden_layers, config.skip_threshold
        self.target = args.target_layers
        self.counts = [1.0] * self.num_layers if self.target is None else relative_layer_flops(config)
        self.weight = args.skip_weight
        self.weights = {"skip_loss": self.weight} if self.learns else {}
        self.lasting = 0.0
        self.around = self.num_layers / 2  # fresh gates stand near one half
        self._counted: Tensor | None = None
        self._layers_run: list[tuple[float, float]] = []

    def parts(self, outputs: Any) -> dict[str, Tensor]:
        """The loss part, of a training batch, whose decisions are counted. Its slope is that of the step before.

        Args:
            outputs: The model's.
        """
        if not self.learns:
            return {}
        chances = torch.stack(outputs.skip_probabilities).detach().float()  # (layers, batch)
        run = (~is_skipped(chances, self.threshold)).float().sum(dim=1)
        counts = chances.new_tensor(self.counts)
        rows = chances.new_tensor(chances.shape[1])
        counted = torch.stack([rows, run.sum(), run @ counts, chances.sum(dim=1) @ counts])
        self._counted = counted if self._counted is None else self._counted + counted
        weighed = [each * count for each, count in zip(outputs.skip_probabilities, self.counts, strict=True)]
        return {"skip_loss": skip_loss(weighed, self.around)}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what the step's rows did, for the next one."""
        if self._counted is None:
            return
        counted = reduce(self._counted, "sum") if args.world_size > 1 else self._counted
        rows, run, by_flops, chances = counted.tolist()
        self._counted = None
        self.around = max(chances / rows, self.LEAST)  # gates that all but never skip would divide by nothing
        self._layers_run.append((run / rows, by_flops / rows))
        if self.target is not None:
            error = (by_flops / rows - self.target) / self.num_layers
            before = self.lasting / 2 if error * self.lasting < 0 else self.lasting
            self.lasting = max(-1.0, min(1.0, before + self.RATE * error))
            self.weight = (self.GAIN * error + self.lasting) * self.around**2

    def logs(self) -> dict[str, float]:
        """Layers that a row ran on average since the last log; with a target also by FLOPs, and the weight."""
        if not self._layers_run:
            return {}
        run, by_flops = (sum(counts) / len(counts) for counts in zip(*self._layers_run, strict=True))
        self._layers_run = []
        if run == 0:
            logger.warning(f"Every row now skips every layer. {COLLAPSED}")
        found = {"layers_run": round(run, 4)}
        if self.target is not None:
            found |= {"layers_run_by_flops": round(by_flops, 4), "skip_weight": round(self.weight, 4)}
        return found

    def save(self, folder: str | Path) -> None:
        """Write what the next step starts from."""
        if self.learns:
            state = {"weight": self.weight, "lasting": self.lasting, "around": self.around}
            (Path(folder) / self.FILE).write_text(json.dumps(state))

    def load(self, folder: str | Path) -> None:
        """Read it.

        Raises:
            ValueError: If the checkpoint has none.
        """
        if not self.learns:
            return
        file = Path(folder) / self.FILE
        if not file.exists():
            raise ValueError(f"The checkpoint {folder} was written without gates. Start afresh, in another folder.")
        state = json.loads(file.read_text())
        self.weight, self.lasting, self.around = state["weight"], state["lasting"], state["around"]
