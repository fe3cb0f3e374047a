"""Blocks of weight matrices: how a matrix is cut into them, how they are scored, and which of them stay.

Li, Kong et al., *Efficient Transformer-based Large Scale Language Representations using Hardware-friendly Block
Structured Pruning*, Findings of EMNLP 2020, arXiv 2009.08065. A matrix is zeroed block by block, so that what stays is
a set of dense panels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .importance import compute_saliency
from .modeling_costeff import CostEffForSequenceClassification
from .packed_linear import PACKABLE, require_unpacked
from .promises import weights_fingerprint

EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.projection")


@dataclass(frozen=True)
class BlockShape:
    """How a matrix is cut into blocks, by size or by count; a cut that does not come out even leaves smaller blocks.

    A block is `rows` high and `columns` wide. The paper's three kinds are `columns=d` (one row of a column slab),
    `rows=h, columns=1` (one column of a row slab), and `rows=r, columns=c`. A count makes blocks of length / count,
    rounded up, so there are fewer slabs where that does not come out even: 5 of 12 columns are 4 slabs of 3.

    Args:
        rows: Rows of a block; `None` is 1, or what `row_slabs` makes of the matrix.
        columns: Columns of a block; `None` is all, or what `column_slabs` makes of the matrix.
        row_slabs: Number of equal cuts of the rows, instead of `rows`.
        column_slabs: Number of equal cuts of the columns, instead of `columns`. The paper's default is 8.
        balanced: Whether every band of blocks side by side keeps the same number of them.

    Raises:
        ValueError: For a size below 1, or size and count for the same direction.

    Example:
        >>> BlockShape(columns=96).size_in(768, 3072), BlockShape(rows=16, column_slabs=8).size_in(768, 3072)
        ((1, 96), (16, 384))
    """

    rows: int | None = None
    columns: int | None = None
    row_slabs: int | None = None
    column_slabs: int | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "row_slabs", "column_slabs"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` is {value!r}. It must be a whole number, at least 1.")
        for size, count in (("rows", "row_slabs"), ("columns", "column_slabs")):
            if getattr(self, size) is not None and getattr(self, count) is not None:
                raise ValueError(f"Blocks are cut by `{size}` or by `{count}`, not by both. Leave one out.")

    def size_in(self, rows: int, columns: int, name: str = "the matrix") -> tuple[int, int]:
        """Rows and columns of a block in a matrix.

        Args:
            rows: Rows of the matrix.
            columns: Columns of the matrix.
            name: What an error calls it.

        Raises:
            ValueError: If the block is larger than the matrix, or there are more slabs than rows or columns.
        """
        height = _cut(self.rows, self.row_slabs, rows, 1, "rows", name)
        return height, _cut(self.columns, self.column_slabs, columns, columns, "columns", name)

    def cut(self, matrix: Tensor, name: str = "the matrix") -> Tensor:
        """The blocks of a matrix, zeros beyond its end, shape (row slabs, column slabs, rows, columns)."""
        height, width = self.size_in(matrix.shape[0], matrix.shape[1], name)
        padded = functional.pad(matrix, (0, -matrix.shape[1] % width, 0, -matrix.shape[0] % height))
        bands, slabs = padded.shape[0] // height, padded.shape[1] // width
        return padded.view(bands, height, slabs, width).transpose(1, 2)

    def norms(self, matrix: Tensor, name: str = "the matrix") -> Tensor:
        """Root of the sum of squares of every block, shape (row slabs, column slabs), in single precision.

        Example:
            >>> BlockShape(columns=2).norms(torch.tensor([[3.0, 4.0, 1.0], [0.0, 0.0, 2.0]]))
            tensor([[5., 1.],
                    [0., 2.]])
        """
        return self.cut(matrix.float(), name).square().sum(dim=(2, 3)).sqrt()

    def spread(self, values: Tensor, rows: int, columns: int) -> Tensor:
        """One value per block to one per weight: shape (row slabs, column slabs) to (rows, columns)."""
        height, width = self.size_in(rows, columns)
        return values.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def _cut(size: int | None, count: int | None, length: int, otherwise: int, unit: str, name: str) -> int:
    if count is not None:
        if count > length:
            raise ValueError(f"{name} has {length} {unit}, too few for {count} slabs. Ask for at most {length}.")
        size = -(-length // count)
    size = otherwise if size is None else size
    if size > length:
        raise ValueError(
            f"A block of {size} {unit} is larger than {name}, which has {length} {unit}. Ask for at most {length}, or "
            "cut by the number of slabs."
        )
    return size


def block_matrices(model: CostEffForSequenceClassification, embeddings: bool = False) -> dict[str, nn.Parameter]:
    """The weight matrices that are cut into blocks, by the name of their module in [`CostEffModel`].

    The four of every layer; those of a layer without heads or neurons are left out. Queries, keys and values are one
    matrix, in which the paper's three are ranked apart, see [`bands_of_matrices`].

    Args:
        model: A multi-exit classifier.
        embeddings: Whether the word embedding and its projection are among them.

    Raises:
        ValueError: If the model is packed, so that its pruned blocks are gone, or no multi-exit classifier.
    """
    if not isinstance(model, CostEffForSequenceClassification):
        raise ValueError(
            f"Blocks are pruned in a CostEffForSequenceClassification, and this is a {type(model).__name__}. Make one "
            "of a stock classifier: hf_costeff.convert_from_stock."
        )
    require_unpacked(model.config, "Pruning blocks")
    base = model.costeff
    names = [f"layers.{layer}.{part}" for layer in range(len(base.layers)) for part in PACKABLE]
    names += [name for name in EMBEDDINGS if embeddings and getattr(base.embeddings, name.split(".")[1]) is not None]
    found = {name: base.get_parameter(f"{name}.weight") for name in names}
    return {name: weight for name, weight in found.items() if weight.numel()}


def bands_of_matrices(blocks: BlockShape, name: str, rows: int, columns: int) -> list[int]:
    """Bands of blocks that belong to each of the matrices that one of ours holds: queries, keys and values are three.

    Each is ranked by itself: values are of a smaller scale than queries, and would go first. A band that
    reaches into the next matrix belongs to the one that it begins in.

    Args:
        blocks: How the matrix is cut.
        name: As in [`block_matrices`].
        rows: Rows of the matrix.
        columns: Columns of it.

    Returns:
        Numbers of bands, top to bottom, without those of matrices in which no band begins.

    Example:
        >>> bands_of_matrices(BlockShape(rows=5), "layers.0.attention.query_key_value", rows=12, columns=4)
        [1, 1, 1]
    """
    height, _ = blocks.size_in(rows, columns, name)
    matrices = 3 if name.endswith(".query_key_value") else 1
    begins = [-(-matrix * (rows // matrices) // height) for matrix in range(matrices)]
    bands = [stop - start for start, stop in pairwise([*begins, -(-rows // height)])]
    return [count for count in bands if count]


def block_energies(
    model: CostEffForSequenceClassification, blocks: BlockShape, embeddings: bool = False
) -> dict[str, Tensor]:
    """Squared norm of every block: the score of pruning by magnitude.

    Args:
        model: A multi-exit classifier.
        blocks: How its matrices are cut.
        embeddings: As for [`block_matrices`].

    Returns:
        Per matrix, shape (row slabs, column slabs).
    """
    matrices = block_matrices(model, embeddings)
    return {name: blocks.norms(weight.detach(), name).square() for name, weight in matrices.items()}


def compute_block_importance(
    model: CostEffForSequenceClassification,
    blocks: BlockShape,
    batches: Iterable[Any],
    loss_function: Callable[[CostEffForSequenceClassification, Any], Tensor],
    embeddings: bool = False,
) -> dict[str, Tensor]:
    """First-order Taylor score of every block: |weight| times the summed |gradient|, summed over the block.

    Unlike the paper, which prunes by magnitude alone.

    Args:
        model: A multi-exit classifier; run without dropout and left with its gradients cleared.
        blocks: How its matrices are cut.
        batches: Whatever `loss_function` takes, one element per batch.
        loss_function: (model, batch) -> scalar loss, a mean over the batch. For a budget across matrices it must run
            the model with `gradient_equilibrium=False`, see [`hf_costeff.importance.compute_importance`].
        embeddings: As for [`block_matrices`].

    Returns:
        Per matrix, shape (row slabs, column slabs).

    Raises:
        ValueError: If there is not a single batch.
    """
    saliency = compute_saliency(model, block_matrices(model, embeddings), batches, loss_function)
    return {name: blocks.cut(values, name).sum(dim=(2, 3)) for name, values in saliency.items()}


@dataclass(frozen=True)
class BlockMasks:
    """Which blocks stay. Frozen: made once from scores, then trained under and packed.

    Args:
        blocks: How the matrices are cut.
        masks: Per matrix, bool, True = keep, shape (row slabs, column slabs).
        shapes: Rows and columns of each matrix.
        fingerprint: Of the model that was scored, see [`hf_costeff.promises.weights_fingerprint`].
    """

    blocks: BlockShape
    masks: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    fingerprint: str

    def weight_mask(self, name: str) -> Tensor:
        """The mask of a matrix weight by weight, shape (rows, columns)."""
        return self.blocks.spread(self.masks[name], *self.shapes[name])

    @property
    def compression(self) -> float:
        """Weights of the matrices divided by those that stay; infinite if none does."""
        kept = sum(int(self.weight_mask(name).sum()) for name in self.masks)
        total = sum(rows * columns for rows, columns in self.shapes.values())
        return total / kept if kept else float("inf")

    def check(self, model: CostEffForSequenceClassification) -> None:
        """Refuse a model that these masks were not made for.

        It must be the model that was scored, or one whose pruned blocks are zero, as after training under the masks.

        Raises:
            ValueError: Naming what differs.
        """
        matrices = block_matrices(model, embeddings=True)
        found = {name: tuple(matrices[name].shape) if name in matrices else None for name in self.masks}
        if differing := [name for name in self.masks if found[name] != tuple(self.shapes[name])]:
            name = differing[0]
            raise ValueError(
                f"The masks are those of another model: {name} is {found[name] or 'missing'} here and "
                f"{tuple(self.shapes[name])} there. Use masks that were made for this model."
            )
        if weights_fingerprint(model) == self.fingerprint:
            return
        for name in self.masks:
            weight = matrices[name].detach()
            if weight.masked_select(~self.weight_mask(name).to(weight.device)).any():
                raise ValueError(
                    f"The masks are those of another model: they were made for the weights {self.fingerprint}, and "
                    f"{name} has weights where they have none. Use masks that were made for this model, in the same "
                    "precision."
                )


def prune_blocks(
    model: CostEffForSequenceClassification,
    blocks: BlockShape,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    scores: Mapping[str, Tensor] | None = None,
    across_matrices: bool = False,
    embeddings: bool = False,
    allow_empty: bool = False,
) -> BlockMasks:
    """Choose the blocks that stay; the model is not changed.

    Args:
        model: A multi-exit classifier, not packed.
        blocks: How its matrices are cut.
        ratio: Share to prune: of the blocks of every matrix (the paper's), or with `across_matrices` of all weights
            together. 0 keeps everything.
        threshold: Prune blocks whose norm is below it, instead of a ratio.
        scores: What a ratio ranks by, per matrix, shape (row slabs, column slabs), a sum over a block's weights;
            `None`: [`block_energies`]. See [`compute_block_importance`].
        across_matrices: Whether all matrices compete for one budget, by score per weight.
        embeddings: As for [`block_matrices`].
        allow_empty: Whether a matrix may lose all its blocks; otherwise its best one stays whatever its score.

    Returns:
        Frozen masks on the CPU.

    Raises:
        ValueError: Both or neither of `ratio` and `threshold`, a ratio outside 0..1, one of 1 without `allow_empty`, a
            block that is larger than a matrix, or a combination that contradicts itself.
    """
    _check_choice(blocks, ratio, threshold, scores is not None, across_matrices, allow_empty)
    energies = block_energies(model, blocks, embeddings)
    scores = _checked(energies if scores is None else scores, energies)
    matrices = block_matrices(model, embeddings)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in matrices.items()}
    bands = {name: bands_of_matrices(blocks, name, *shape) for name, shape in shapes.items()}
    if threshold is not None:
        masks = {name: energies[name].cpu().sqrt() >= threshold for name in energies}
    elif across_matrices:
        masks = _keep_budget(scores, {name: _sizes(blocks, *shapes[name]) for name in scores}, float(ratio or 0))
    else:
        masks = {
            name: torch.cat([_keep_share(own, float(ratio or 0), blocks.balanced) for own in values.split(bands[name])])
            for name, values in scores.items()
        }
    if not allow_empty:
        for name, mask in masks.items():
            for own, values in zip(mask.split(bands[name]), scores[name].split(bands[name]), strict=True):
                own.view(-1)[values.argmax()] |= ~own.any()
    return BlockMasks(blocks, masks, shapes, weights_fingerprint(model))


def _check_choice(
    blocks: BlockShape,
    ratio: float | None,
    threshold: float | None,
    has_scores: bool,
    across_matrices: bool,
    allow_empty: bool,
) -> None:
    if (ratio is None) == (threshold is None):
        raise ValueError("Give either `ratio` or `threshold`.")
    if ratio is not None and not (0 <= ratio < 1 or (ratio == 1 and allow_empty)):
        raise ValueError(
            f"`ratio` is {ratio}. It must be at least 0 and below 1: the share of the blocks that goes. A ratio of 1 "
            "leaves nothing and needs `allow_empty`."
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"`threshold` is {threshold}. It must be a norm, 0 or more.")
    if blocks.balanced and (threshold is not None or across_matrices):
        raise ValueError("Balanced bands keep equal numbers of blocks: give `ratio`, without `across_matrices`.")
    if threshold is not None and (across_matrices or has_scores):
        raise ValueError(
            "`threshold` prunes by norm, block by block. `across_matrices` and `scores` say what a `ratio` ranks by: "
            "give one, or leave them out."
        )


def _checked(scores: Mapping[str, Tensor], energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores in double precision on the CPU, if they are numbers for the same blocks of the same matrices."""
    if set(scores) != set(energies):
        differing = sorted(set(scores) ^ set(energies))
        raise ValueError(
            f"`scores` are not those of this model's matrices: {differing[0]} is on one side only. Compute them for "
            "this model, with the same `embeddings`."
        )
    for name, energy in energies.items():
        if scores[name].shape != energy.shape:
            raise ValueError(
                f"`scores` have the shape {tuple(scores[name].shape)} for {name}, and it has {tuple(energy.shape)} "
                "blocks. Compute them with the same `blocks`."
            )
        if not scores[name].isfinite().all():
            raise ValueError(f"The scores of {name} are not all finite. Look for NaN in its weights or in the loss.")
    return {name: scores[name].detach().cpu().double() for name in energies}


def _sizes(blocks: BlockShape, rows: int, columns: int) -> Tensor:
    return blocks.cut(torch.ones(rows, columns)).sum(dim=(2, 3)).double()


def _keep_share(scores: Tensor, ratio: float, balanced: bool) -> Tensor:
    """The best blocks of a matrix, or of each of its bands; at least one stays unless `ratio` is 1."""
    flat = scores if balanced else scores.view(1, -1)
    pruned = round(ratio * flat.shape[1])
    if ratio < 1:
        pruned = min(pruned, flat.shape[1] - 1)
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask.scatter_(1, flat.argsort(dim=1, stable=True)[:, :pruned], False)
    return mask.view(scores.shape)


def _keep_budget(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The best blocks of all matrices by score per weight, so many that the share `ratio` of the weights goes."""
    weights = torch.cat([sizes[name].flatten() for name in scores])
    density = torch.cat([scores[name].flatten() for name in scores]) / weights
    order = density.argsort(stable=True)
    mask = torch.empty(len(order), dtype=torch.bool)
    mask[order] = weights[order].cumsum(0) > ratio * weights.sum()
    parts = mask.split([values.numel() for values in scores.values()])
    return {name: part.view(values.shape) for (name, values), part in zip(scores.items(), parts, strict=True)}


def zero_blocks(model: CostEffForSequenceClassification, masks: BlockMasks) -> CostEffForSequenceClassification:
    """A copy of a model with the pruned blocks set to zero, and without exit settings, which were chosen for the other.

    Args:
        model: The model that the masks were made for, or one trained under them.
        masks: What stays.

    Raises:
        ValueError: If the masks are those of another model.
    """
    masks.check(model)
    pruned = copy.deepcopy(model)
    pruned.config.exit_config = None
    with torch.no_grad():
        for name, weight in block_matrices(pruned, embeddings=True).items():
            if name in masks.masks:
                weight.mul_(masks.weight_mask(name).to(weight.device))
    return pruned
