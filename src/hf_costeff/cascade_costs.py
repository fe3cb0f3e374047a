"""What a cascade costs: the FLOPs of every member that a row came to, added up.

Counted as in [`hf_costeff.efficiency`], at the rows' own lengths. Members of families that it has no formula for are
counted by torch's own counter on an empty model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from .configuration_cascade import CostEffCascadeConfig, require_single_model
from .configuration_costeff import CostEffConfig
from .conversion import convert_config
from .efficiency import cumulative_flops, stock_flops
from .exit_criteria import ExitConfig
from .exiting_rows import ExitPlan
from .modeling_cascade import build_member


def classifier_flops(config: PreTrainedConfig, seq_length: int) -> int:
    """FLOPs of one row through all of a classifier, stock or ours.

    Args:
        config: Of any sequence classifier.
        seq_length: Tokens as run, padding included.

    Raises:
        ValueError: For a model that can be counted neither by formula nor by running it empty.
    """
    require_single_model(config, "A member")
    if isinstance(config, CostEffConfig):
        return cumulative_flops(config, seq_length, ())[-1]
    try:
        convert_config(config)
    except ValueError:  # no family of ours
        return _counted_flops(config, seq_length)
    return stock_flops(config, seq_length)


def _counted_flops(config: PreTrainedConfig, seq_length: int) -> int:
    with torch.device("meta"), torch.no_grad():
        model = build_member(config).eval()
        tokens = torch.ones(1, seq_length, dtype=torch.long)
        for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": tokens}):
            try:  # some look at their mask, others miss it, and an empty tensor cannot be looked at
                with FlopCounterMode(display=False) as counter:
                    model(**inputs)
                return counter.get_total_flops()
            except (RuntimeError, NotImplementedError) as error:
                reason = error
    raise ValueError(
        f"The FLOPs of a {config.model_type} model cannot be counted: {reason}. Build the cascade of other members."
    )


def member_flops(
    config: PreTrainedConfig, exit_layers: Sequence[int] | Tensor, seq_lengths: Tensor, full_depth: bool = False
) -> Tensor:
    """FLOPs of every row in one member under the exit settings it was saved with.

    Args:
        config: The member's.
        exit_layers: 1-based layer each row ran to, 0 for a row that did not come, shape (rows,).
        seq_lengths: Tokens of each row, shape (rows,).
        full_depth: Whether it answered without these settings, so that no exit but its last was asked.

    Returns:
        Shape (rows,), float64.
    """
    lengths = sorted(set(seq_lengths.tolist()))
    layers = torch.as_tensor(exit_layers)
    if isinstance(config, CostEffConfig):
        settings = ExitConfig.resolve(False if full_depth else None, config.exit_config)
        checked = ExitPlan.make(settings, config.exit_layers, config.resolved_problem_type).stops
        spent = {length: cumulative_flops(config, length, checked) for length in lengths}
        found = [spent[length][layer - 1] if layer else 0 for layer, length in _pairs(layers, seq_lengths)]
    else:
        whole = {length: classifier_flops(config, length) for length in lengths}
        found = [whole[length] if layer else 0 for layer, length in _pairs(layers, seq_lengths)]
    return torch.tensor(found, dtype=torch.float64)


def _pairs(layers: Tensor, lengths: Tensor) -> zip[tuple[int, int]]:
    return zip(layers.tolist(), lengths.tolist(), strict=True)


def cascade_flops(
    config: CostEffCascadeConfig, layers_run: Tensor, seq_lengths: Tensor, full_depth: bool = False
) -> Tensor:
    """FLOPs of every row, over all members that it came to (Li et al. 2021 count layers in the same way).

    Args:
        config: The cascade's.
        layers_run: As `predict` returns it, shape (rows, members).
        seq_lengths: Tokens of each row, shape (rows,), or (rows, members) where tokenizers differ.
        full_depth: Whether `predict` was asked for full depth, where the exits of the last member are not used.

    Returns:
        Shape (rows,), float64.

    Raises:
        ValueError: If the shapes do not fit each other or the cascade.

    Example: two rows, of which the second goes on to the larger member.

        >>> from transformers import BertConfig
        >>> small, large = BertConfig(num_hidden_layers=2), BertConfig(num_hidden_layers=12)
        >>> config = CostEffCascadeConfig(members=[small, large])
        >>> spent = cascade_flops(config, torch.tensor([[2, 0], [2, 12]]), torch.tensor([8, 8]))
        >>> spent.tolist() == [stock_flops(small, 8), stock_flops(small, 8) + stock_flops(large, 8)]
        True
    """
    rows, members = layers_run.shape
    lengths = seq_lengths if seq_lengths.dim() == 2 else seq_lengths[:, None].expand(-1, members)
    if members != len(config.exit_layers) or lengths.shape != layers_run.shape or not rows:
        raise ValueError(
            f"`layers_run` has shape {tuple(layers_run.shape)} and `seq_lengths` {tuple(seq_lengths.shape)} for "
            f"{len(config.exit_layers)} members. Give what `predict` returned, and the length of each row."
        )
    columns = zip(config.members, layers_run.unbind(1), lengths.unbind(1), strict=True)
    return torch.stack([member_flops(*column, full_depth=full_depth) for column in columns]).sum(0)
