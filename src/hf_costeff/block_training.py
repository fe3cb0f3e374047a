"""Training towards blocks that can go, and under masks once they are gone: regularizers of [`CostEffTrainer`]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from .block_pruning import BlockMasks, BlockShape, bands_of_matrices, block_matrices
from .modeling_costeff import CostEffForSequenceClassification
from .regularizer import Regularizer

STATE_FILE = "regularizer.safetensors"


class BlockPenalty(Regularizer):
    """Group Lasso over blocks, reweighted so that weak blocks are pulled to zero and strong ones are left alone.

    The penalty is `strength` times the mean over all blocks of weight_g * |w_g|, with weight_g = 1 / (|w_g| + 0.001)
    held constant between refreshes. It starts at `strength` however the blocks are cut, so one setting serves all
    sizes; the paper's lambda is strength / number of blocks. Its gradient joins after clipping, just before the
    optimizer's step, so a large penalty cannot crowd out the task. Unlike the paper, which clips both together.

    `proximal=True` is for short runs, where an adaptive optimizer moves no weight far enough: after the optimizer's
    step every block shrinks by the factor max(0, 1 - lr * strength * weight_g * mean |w|^2 / |w_g|), the mean over the
    blocks of its matrix (Yuan, Lin 2006: the proximal step of group Lasso). A block of typical norm thus shrinks by
    lr * strength per step, whatever its size, and weak ones reach zero.

    Args:
        blocks: How the matrices are cut.
        strength: Factor above, 0 or more.
        reweighted: Whether weak blocks are pulled harder; otherwise all blocks of a matrix alike, 1 / their mean norm.
        refresh_epochs: Weights are taken anew after so many epochs, may be a fraction. The paper's is 4.
        refresh_steps: The same in optimizer steps, instead.
        proximal: Whether to shrink after the step instead of adding a gradient before it.
        embeddings: As for [`hf_costeff.block_pruning.block_matrices`].

    Raises:
        ValueError: For a strength below 0, or a refresh that is not above 0 or given twice.
    """

    EPSILON = 1e-3

    def __init__(
        self,
        blocks: BlockShape,
        strength: float,
        *,
        reweighted: bool = True,
        refresh_epochs: float | None = None,
        refresh_steps: int | None = None,
        proximal: bool = False,
        embeddings: bool = False,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"`strength` is {strength}. It must be 0 or more, and finite; 0 pulls at nothing.")
        if refresh_epochs is not None and refresh_steps is not None:
            raise ValueError("Weights are refreshed by `refresh_epochs` or by `refresh_steps`. Leave one out.")
        for name, value in (("refresh_epochs", refresh_epochs), ("refresh_steps", refresh_steps)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` is {value}. It must be above 0; leave both out for once per epoch.")
        self.blocks = blocks
        self.strength = strength
        self.reweighted = reweighted
        self.refresh_epochs = 1.0 if refresh_epochs is None else refresh_epochs
        self.refresh_steps = refresh_steps
        self.proximal = proximal
        self.embeddings = embeddings
        self.block_weights: dict[str, Tensor] = {}
        self._period = 0
        self._matrices: dict[str, nn.Parameter] = {}

    def penalty(self) -> Tensor:
        """Its present value, a scalar."""
        parts = [(self.block_weights[name] * norms).sum() for name, norms in self._norms()]
        return self.strength * torch.stack(parts).sum() / self._num_blocks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the weights from the model as it is, unless the run was resumed.

        Raises:
            ValueError: If the model has no matrix to prune, or the checkpoint's blocks were cut otherwise.
        """
        self._matrices = block_matrices(kwargs["model"], self.embeddings)
        if not self._matrices:
            raise ValueError("The model has no matrix whose blocks could be penalised: all its layers have no width.")
        if state.global_step == 0 or not self.block_weights:
            self._period = 0
            self._refresh()
        cut = {name: weights.shape for name, weights in self.block_weights.items()}
        if cut != {name: norms.shape for name, norms in self._norms()}:
            raise ValueError(
                "The checkpoint's blocks were cut otherwise than these. Repeat the first cut to go on, or start afresh "
                "in another output_dir."
            )
        self.block_weights = {name: self.block_weights[name].to(self._matrices[name].device) for name in self._matrices}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take them anew where that is due."""
        if self.refresh_steps is not None:
            period = state.global_step // self.refresh_steps
        else:
            period = int((state.epoch or 0) / self.refresh_epochs + 1e-6)
        if period != self._period:
            self._period = period
            self._refresh()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient to the clipped one."""
        if self.proximal:
            return
        for name, norms in self._norms():
            matrix = self._matrices[name]
            if matrix.grad is not None:
                scale = self.strength / self._num_blocks * self.block_weights[name] / norms.clamp(min=1e-12)
                matrix.grad.add_(matrix * self.blocks.spread(scale, *matrix.shape).to(matrix.dtype))

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink the blocks, if the step is proximal."""
        if not self.proximal:
            return
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        for name, norms in self._norms():
            matrix = self._matrices[name]
            if not matrix.requires_grad:
                continue
            typical = self._per_matrix(name, norms.square())
            pull = rate * self.strength * self.block_weights[name] * typical
            factor = (1 - pull / norms.clamp(min=1e-12)).clamp(min=0)
            matrix.mul_(self.blocks.spread(factor, *matrix.shape).to(matrix.dtype))

    def logs(self) -> dict[str, float]:
        """The penalty, and the share of the blocks whose norm is below a tenth of their matrix's mean."""
        weak = [norms < self._per_matrix(name, norms) / 10 for name, norms in self._norms()]
        share = torch.cat([mask.flatten() for mask in weak]).float().mean()
        return {"block_penalty": round(self.penalty().item(), 4), "weak_blocks": round(share.item(), 4)}

    def save(self, folder: str | Path) -> None:
        """Write the weights of the blocks."""
        tensors = {name: weights.contiguous() for name, weights in self.block_weights.items()}
        save_file(tensors, Path(folder) / STATE_FILE, {"period": str(self._period)})

    def load(self, folder: str | Path) -> None:
        """Read the weights of the blocks; a checkpoint without them is one of a run without this penalty.

        Raises:
            ValueError: If the checkpoint has none.
        """
        file = Path(folder) / STATE_FILE
        if not file.exists():
            raise ValueError(
                f"The checkpoint {folder} was written without a block penalty. Start afresh, in another output_dir."
            )
        with safe_open(str(file), "pt") as opened:
            self._period = int(opened.metadata()["period"])
        self.block_weights = load_file(file)

    @property
    def _num_blocks(self) -> int:
        return sum(weights.numel() for weights in self.block_weights.values())

    @torch.no_grad()
    def _norms(self) -> list[tuple[str, Tensor]]:
        return [(name, self.blocks.norms(matrix.detach(), name)) for name, matrix in self._matrices.items()]

    def _per_matrix(self, name: str, values: Tensor) -> Tensor:
        """The mean over the blocks of a matrix, for each of its blocks; queries, keys and values are three matrices."""
        bands = bands_of_matrices(self.blocks, name, *self._matrices[name].shape)
        return torch.cat([own.mean().expand_as(own) for own in values.split(bands)])

    def _refresh(self) -> None:
        for name, norms in self._norms():
            basis = norms if self.reweighted else self._per_matrix(name, norms)
            self.block_weights[name] = 1 / (basis + self.EPSILON)


class MaskedTraining(Regularizer):
    """Trains what masks keep: pruned blocks are zero, get no gradient, and take no part in gradient clipping.

    Matrices that are frozen are zeroed too.

    Args:
        masks: Made for the model that is trained, or for the one that it was trained from.
    """

    def __init__(self, masks: BlockMasks) -> None:
        self.masks = masks
        self._hooks: list[Any] = []
        self._masked: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set pruned blocks to zero.

        Raises:
            ValueError: If the masks are those of another model.
        """
        model: CostEffForSequenceClassification = kwargs["model"]
        self.masks.check(model)
        self._masked = list(_with_masks(block_matrices(model, embeddings=True), self.masks))
        self._hooks = [
            weight.register_hook(mask.to(weight.dtype).mul) for weight, mask in self._masked if weight.requires_grad
        ]
        self._apply()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep them there, whatever the optimizer's momentum says."""
        self._apply()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._masked = [], []

    @torch.no_grad()
    def _apply(self) -> None:
        for weight, mask in self._masked:
            weight.mul_(mask)


def _with_masks(matrices: Mapping[str, nn.Parameter], masks: BlockMasks) -> Iterator[tuple[nn.Parameter, Tensor]]:
    return ((matrices[name], masks.weight_mask(name).to(matrices[name].device)) for name in masks.masks)
