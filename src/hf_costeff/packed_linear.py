"""Linear layers that store and multiply only the blocks that pruning left: dense panels with lists of indices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

COLUMNS, ROWS = "columns", "rows"
PANELS, TILES, SPARSE_BLOCKS, DENSE = "panels", "tiles", "sparse_blocks", "dense"
LAYOUTS = (PANELS, TILES, SPARSE_BLOCKS, DENSE)
TILE = 256  # rows of an input whose results stay in the cache until they are transposed
LARGEST_SHORT = torch.iinfo(torch.int16).max
PACKABLE = ("attention.query_key_value", "attention.output", "feed_forward.intermediate", "feed_forward.output")


@dataclass(frozen=True)
class Packing:
    """What stays of a matrix, by count: enough to know every shape. Which rows or columns stay is among the weights.

    The matrix is cut into slabs side by side along its columns, and each slab keeps some of its rows; or along its
    rows, and each slab keeps some of its columns. What a slab keeps is one dense panel.

    Args:
        along: `"columns"` or `"rows"`.
        slabs: Width (or height) of each slab; they add up to the matrix.
        kept: Rows (or columns) that each slab keeps.
        block: Rows and columns of the blocks that were pruned, for the layout `"sparse_blocks"`.
        layout: How it is multiplied: `"panels"` panel by panel, which leaves the result of column slabs transposed in
            memory; `"tiles"` the same for a few rows of the input at a time, put in order at once; `"sparse_blocks"` by
            torch's block-sparse rows, where it has them for the numbers at hand, and else by panels; `"dense"` as one
            matrix that is filled up with zeros when it is first used.
    """

    along: str
    slabs: tuple[int, ...]
    kept: tuple[int, ...]
    block: tuple[int, int]
    layout: str = PANELS

    @classmethod
    def from_dict(cls, given: Any, out_features: int, in_features: int) -> Packing:
        """From plain values, checked against the matrix it is for.

        Args:
            given: As [`Packing.to_dict`] returns it.
            out_features: Rows of the matrix.
            in_features: Columns of the matrix.

        Raises:
            ValueError: For anything that does not describe a part of such a matrix.
        """
        names = ("along", "slabs", "kept", "block", "layout")
        if not isinstance(given, Mapping) or sorted(given) != sorted(names):
            raise ValueError(f"It must be a dict with {', '.join(names)}.")
        if given["along"] not in (COLUMNS, ROWS) or given["layout"] not in LAYOUTS:
            raise ValueError(f"`along` must be {COLUMNS} or {ROWS}, and `layout` one of {', '.join(LAYOUTS)}.")
        length, other = (in_features, out_features) if given["along"] == COLUMNS else (out_features, in_features)
        for name, low, high in (("slabs", 1, length), ("kept", 0, other), ("block", 1, max(length, other))):
            values = given[name]
            is_list = isinstance(values, (list, tuple)) and len(values) <= max(2, length)
            if not is_list or not all(type(value) is int and low <= value <= high for value in values):
                raise ValueError(f"`{name}` must be a list of whole numbers in {low}..{high}.")
        if sum(given["slabs"]) != length or len(given["kept"]) != len(given["slabs"]) or len(given["block"]) != 2:
            raise ValueError(
                f"`slabs` must add up to {length}, with one entry of `kept` each; `block` has two numbers."
            )
        made = cls(given["along"], tuple(given["slabs"]), tuple(given["kept"]), tuple(given["block"]), given["layout"])
        if made.layout not in made.layouts(out_features, in_features):
            possible = ", ".join(made.layouts(out_features, in_features))
            raise ValueError(f"`layout` is {made.layout}, and such a matrix can have {possible}.")
        return made

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def layouts(self, out_features: int, in_features: int) -> tuple[str, ...]:
        """The layouts that such a matrix can have: torch's block-sparse rows need square blocks, cut evenly."""
        height, width = self.block
        even = height == width and out_features % height == 0 and in_features % width == 0
        possible = {PANELS: True, TILES: self.along == COLUMNS, SPARSE_BLOCKS: even, DENSE: True}
        return tuple(layout for layout in LAYOUTS if possible[layout])

    @property
    def num_weights(self) -> int:
        """Weights that are stored."""
        return sum(slab * kept for slab, kept in zip(self.slabs, self.kept, strict=True))

    @property
    def num_indices(self) -> int:
        """Indices that are stored beside them."""
        return sum(self.kept)

    def index_dtype(self, out_features: int, in_features: int) -> torch.dtype:
        """Type of the indices: 16 bits where they fit, else 32."""
        largest = (out_features if self.along == COLUMNS else in_features) - 1
        return torch.int16 if largest <= LARGEST_SHORT else torch.int32


class PackedLinear(nn.Module):
    """A linear layer of which only some blocks are left; answers as the full one with zeros elsewhere.

    Args:
        in_features: Columns of the full matrix.
        out_features: Rows of the full matrix.
        packing: What stays of it.

    Attributes:
        values: The panels one after the other, each row by row, shape (weights,).
        index: Rows (or columns) of each panel in order, 16-bit where they fit, shape (indices,).
        bias: Shape (out_features,).
    """

    index: Tensor

    def __init__(self, in_features: int, out_features: int, packing: Packing) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.packing = packing
        self.values = nn.Parameter(torch.zeros(packing.num_weights))
        self.bias = nn.Parameter(torch.zeros(out_features))
        index = torch.cat([torch.arange(kept) for kept in packing.kept])
        self.register_buffer("index", index.to(packing.index_dtype(out_features, in_features)))
        self._ready: dict[str, tuple[Any, Any]] = {}

    def extra_repr(self) -> str:
        """What is left of which matrix."""
        share = self.packing.num_weights / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept={share:.2f}, "
            f"layout={self.packing.layout}"
        )

    def set_layout(self, layout: str) -> None:
        """Choose how the matrix is multiplied; what is stored stays as it is.

        Raises:
            ValueError: If the matrix cannot have that layout.
        """
        possible = self.packing.layouts(self.out_features, self.in_features)
        if layout not in possible:
            raise ValueError(f"`layout` is {layout!r}. This matrix can have {', '.join(possible)}.")
        self.packing = replace(self.packing, layout=layout)

    def forget(self) -> None:
        """Free what was prepared for the layouts that have been used; it is made again when it is needed."""
        self._ready = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, without what was prepared: torch cannot copy block-sparse rows."""
        return {**super().__getstate__(), "_ready": {}}

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape (..., in_features) to (..., out_features).

        Raises:
            ValueError: If an index lies outside the matrix.
        """
        learns = torch.is_grad_enabled() and self.values.requires_grad
        if learns:  # a fused optimizer's step leaves no trace by which a change is seen
            for layout in (DENSE, SPARSE_BLOCKS):
                self._ready.pop(layout, None)
        if self.packing.layout == DENSE:
            return functional.linear(inputs, self.dense() if learns else self._prepared(DENSE), self.bias)
        flat = inputs.reshape(-1, self.in_features)
        if self.packing.layout == SPARSE_BLOCKS and not learns and has_sparse_blocks(flat):
            output = (self._prepared(SPARSE_BLOCKS) @ flat.T).T + self.bias
        elif self.packing.layout == TILES and not learns:
            output = flat.new_empty(len(flat), self.out_features)
            for start in range(0, len(flat), TILE):
                output[start : start + TILE] = self._add_up_slabs(flat[start : start + TILE])
        elif self.packing.along == COLUMNS:
            output = self._add_up_slabs(flat)
        else:
            output = self._put_slabs_side_by_side(flat)
        return output.view(*inputs.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """The full matrix, shape (out_features, in_features), with gradients to what is stored."""
        full = self.values.new_zeros(self.out_features, self.in_features)
        full = full if self.packing.along == COLUMNS else full.T
        for index, panel, place in self._panels():
            columns = torch.arange(place.start, place.stop, device=index.device)
            part = panel if self.packing.along == COLUMNS else panel.T
            full = full.index_put((index[:, None], columns), part)
        return full if self.packing.along == COLUMNS else full.T

    def _panels(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Per slab: what it keeps, its panel, and where it lies; slabs that keep nothing are left out."""
        slabs, kept = self.packing.slabs, self.packing.kept
        values = self.values.split([slab * count for slab, count in zip(slabs, kept, strict=True)])
        start = 0
        for slab, count, index, part in zip(slabs, kept, self._prepared("index"), values, strict=True):
            if count:
                shape = (count, slab) if self.packing.along == COLUMNS else (slab, count)
                yield index, part.view(shape), slice(start, start + slab)
            start += slab

    def _add_up_slabs(self, flat: Tensor) -> Tensor:
        """Shape (rows, in_features) to (rows, out_features); in memory transposed, so that whole lines are added."""
        transposed, output = flat.T, None
        for index, panel, place in self._panels():
            part = panel @ transposed[place]
            if output is None:
                output = self._bias_alone(len(flat), part.dtype)
            output.index_add_(0, index, part)
        return (self._bias_alone(len(flat), flat.dtype) if output is None else output).T

    def _bias_alone(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.bias.to(dtype)[:, None].expand(-1, rows).clone(memory_format=torch.contiguous_format)

    def _put_slabs_side_by_side(self, flat: Tensor) -> Tensor:
        """Shape (rows, in_features) to (rows, out_features)."""
        in_place = not torch.is_grad_enabled() and flat.dtype == self.values.dtype
        output = flat.new_empty(len(flat), self.out_features) if in_place else self.bias.expand(len(flat), -1).clone()
        if in_place and not all(self.packing.kept):
            output.copy_(self.bias)
        for index, panel, place in self._panels():
            gathered = flat.index_select(1, index)
            if in_place:
                torch.addmm(self.bias[place], gathered, panel.T, out=output[:, place])
            else:
                output[:, place] = output[:, place] + gathered @ panel.T
        return output

    def _prepared(self, what: str) -> Any:
        """Indices, full matrix or block-sparse matrix, made when first asked for and again after a change."""
        tensors = (self.index,) if what == "index" else (self.index, self.values)
        state = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        known, found = self._ready.get(what, (None, None))
        if known != state:
            with torch.inference_mode(False), torch.no_grad():  # else it could not be used in training afterwards
                if what == "index":
                    found = self._checked_indices()
                elif what == DENSE:
                    found = self.dense().contiguous()
                else:
                    found = self._block_sparse()
            self._ready[what] = (state, found)
        return found

    def _block_sparse(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
            return self.dense().contiguous().to_sparse_bsr(self.packing.block)

    def _checked_indices(self) -> tuple[Tensor, ...]:
        length = self.out_features if self.packing.along == COLUMNS else self.in_features
        index = self.index.long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < length:
            raise ValueError(
                f"A packed layer keeps indices {int(index.min())}..{int(index.max())} of {length}. The weights are "
                "damaged or those of another model; download them again."
            )
        return index.split(self.packing.kept)


def has_sparse_blocks(inputs: Tensor) -> bool:
    """Whether torch can multiply its block-sparse rows by these inputs: on a CPU in full precision, with MKL, forward.

    Args:
        inputs: Of a layer.
    """
    if torch.is_grad_enabled() and inputs.requires_grad:
        return False
    if inputs.device.type != "cpu":
        return True
    full = inputs.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return full and torch.backends.mkl.is_available()


def use_packed_layers(model: nn.Module, packed_layers: Mapping[str, Any] | None) -> None:
    """Put packed layers in the place of linear ones, without values; whoever builds a model from its config calls this.

    Args:
        model: A base model whose linear layers have their full shapes.
        packed_layers: Name of a linear layer -> its [`Packing`] as plain values; `None` for none.

    Raises:
        ValueError: If one does not describe a part of its matrix.
    """
    for name, described in (packed_layers or {}).items():
        full = cast(nn.Linear, model.get_submodule(name))
        packing = Packing.from_dict(described, full.out_features, full.in_features)
        model.set_submodule(name, PackedLinear(full.in_features, full.out_features, packing))


def require_unpacked(config: Any, action: str) -> None:
    """Refuse a packed model where full matrices are needed.

    Args:
        config: Of the model.
        action: What cannot be done, as the subject of a sentence.

    Raises:
        ValueError: Saying how to unpack it.
    """
    if config.packed_layers:
        raise ValueError(
            f"{action} needs full matrices, and this model is packed. Unpack it first: hf_costeff.unpack(model)."
        )
