"""Give a model skip gates: a new model with fresh gates around the layers of a given one."""

from __future__ import annotations

import copy
import logging

from .configuration_costeff import CostEffConfig
from .efficiency import PAPER_SEQ_LENGTH, exit_head_flops, gate_flops, layer_flops
from .modeling_costeff import CostEffForSequenceClassification

logger = logging.getLogger(__name__)
DEAR = 0.25
"""Gates are dear that take, with their exit heads, this share of their layer's FLOPs."""


def add_skip_gates(
    model: CostEffForSequenceClassification,
    skip_gates: str = "attention",
    *,
    gate_size: int = 128,
    exit_head: str | None = None,
    exit_head_size: int = 128,
) -> CostEffForSequenceClassification:
    """A new model with a fresh gate before every layer, which has to be trained; the given model is not touched.

    Fresh values are drawn by torch's generator (`torch.manual_seed`). Until the gates are trained they skip about half
    of the layers, whichever; `predict(..., skip_layers=False)` still answers as the given model. Its saved exit
    settings are dropped, because they were chosen for rows that run every layer.

    Args:
        model: Of any widths, converted, slenderized or packed. There is a warning of layers of whose FLOPs a gate and
            its exit head take a quarter or more.
        skip_gates: `"attention"` or `"linear"`, see [`CostEffConfig`]. With `exit_pooling="cls"` there is a warning of
            linear gates: the first one cannot tell rows apart.
        gate_size: Width of an attention gate.
        exit_head: Form of the exit heads, `"linear"` or `"attention"`; another one than they have makes them fresh.
            `None` keeps them.
        exit_head_size: Width of attention exit heads that are made fresh.

    Returns:
        A model on the same device, in the same dtype, in training mode like the given one, of the same name; what is
        frozen there is frozen here.

    Raises:
        ValueError: If it is no multi-exit classifier, or has gates already.
        StrictDataclassError: As [`CostEffConfig`], for a form or width that no gate or head can have.
    """
    if not isinstance(model, CostEffForSequenceClassification):
        raise ValueError(
            f"Gates go into a CostEffForSequenceClassification, and this is a {type(model).__name__}. Load it with "
            "AutoModelForSequenceClassification, or make one of a stock classifier: hf_costeff.convert_from_stock."
        )
    config = copy.deepcopy(model.config)
    if config.skip_gates is not None:
        raise ValueError(
            f"The model has skip gates already ({config.skip_gates!r}). Train these, or load it without them: "
            "from_pretrained(..., skip_gates=None)."
        )
    config.skip_gates, config.gate_size, config.exit_config = skip_gates, gate_size, None
    fresh = ["gates."]
    if exit_head is not None and exit_head != config.exit_head:
        config.exit_head, config.exit_head_size = exit_head, exit_head_size
        fresh.append("exits.")
    config.validate()
    _warn_of_dear_gates(config)
    if skip_gates == "linear" and config.exit_pooling == "cls":
        logger.warning(
            "The linear gate of layer 1 decides the same for every row: it sees the first token, which has not read "
            'the text yet. Convert with exit_pooling="mean", or take attention gates.'
        )
    gated = type(model)(config).to(device=model.device, dtype=model.dtype)
    places = tuple(f"{model.base_model_prefix}.{name}" for name in fresh)
    own = {name: tensor for name, tensor in gated.state_dict().items() if name.startswith(places)}
    given = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(places)}
    gated.load_state_dict(given | own)
    gated.name_or_path = model.name_or_path
    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters() if name in given}
    for name, parameter in gated.named_parameters():
        parameter.requires_grad_(kept.get(name, True))
    return gated.train(model.training)


def _warn_of_dear_gates(config: CostEffConfig) -> None:
    gate, head = gate_flops(config, PAPER_SEQ_LENGTH), exit_head_flops(config, PAPER_SEQ_LENGTH)
    dear = []
    for layer in range(1, config.num_hidden_layers + 1):
        added = gate + (head if layer in config.exit_layers else 0)
        if added >= DEAR * layer_flops(config, layer, PAPER_SEQ_LENGTH):
            dear.append(layer)
    if dear:
        logger.warning(
            "The gates of layers %s take, with their exit heads, %d%% of the FLOPs of the layers themselves or more "
            "(gate %s, head %s per row of %d tokens), so skipping saves little. Linear gates and heads cost least.",
            *(", ".join(map(str, dear)), 100 * DEAR, f"{gate:,}", f"{head:,}", PAPER_SEQ_LENGTH),
        )
