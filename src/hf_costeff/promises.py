"""Whether a stored promise was made for the weights, and the skipping, at hand."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(model: nn.Module) -> str:
    """A short digest of names, shapes, precision and values of the parameters, the same on every device.

    Values are summed bit pattern by bit pattern as whole numbers, which is exact in any order. Adapters change names
    or values.
    """
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        total = _bits(tensor.detach()).sum(dtype=torch.int64).item()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}\n".encode())
    return digest.hexdigest()[:16]


def warn_if_void(model: nn.Module, calibration: dict[str, Any] | None, skip_threshold: float | None = None) -> None:
    """Warn once when exit settings were calibrated for other paths, or promised for other weights, than the model's.

    Args:
        model: The model that answers. Weights are read again only after they were replaced or written to.
        calibration: `ExitConfig.calibration`. Weights matter to a promise alone; paths also where rows skipped layers.
        skip_threshold: At which probability rows skip layers; `None` where none is skipped.
    """
    seen = calibration or {}
    promised = (seen.get("promise") or {}).get("fingerprint")
    chosen_for = seen.get("skip_threshold", None if promised else skip_threshold)
    if chosen_for != skip_threshold:
        done, void = ("promised", " The promise is void.") if promised else ("chosen", "")
        logger.warning_once(
            f"The exit settings were {done} for a skip threshold of {chosen_for}, and it is {skip_threshold} (None: no "
            f"layer is skipped).{void} Run `hf-costeff calibrate` again."
        )
    if promised is None:
        return
    state = [(name, p.data_ptr(), 0 if p.is_inference() else p._version) for name, p in model.named_parameters()]
    known, found = getattr(model, "_known_fingerprint", (None, ""))
    if known != state:
        found = weights_fingerprint(model)
        object.__setattr__(model, "_known_fingerprint", (state, found))
    if found != promised:
        logger.warning_once(
            f"The exit settings were promised for the weights {promised}, and these are {found}: other weights, "
            "precision or adapters. The promise is void. Run `hf-costeff calibrate` again on this model."
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(WORDS[tensor.element_size()])
