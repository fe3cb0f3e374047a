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
    """Warn once when the promise in a calibration record is for other weights than the model's, or other paths.

    Args:
        model: The model that answers. Weights are read again only after they were replaced or written to.
        calibration: `ExitConfig.calibration`; nothing happens without a promise that names its weights.
        skip_threshold: At which probability rows skip layers; `None` where none is skipped.
    """
    promised = ((calibration or {}).get("promise") or {}).get("fingerprint")
    if promised is None:
        return
    promised_for = (calibration or {}).get("skip_threshold")
    if promised_for != skip_threshold:
        logger.warning_once(
            f"The exit settings were promised for a skip threshold of {promised_for}, and it is {skip_threshold} "
            "(None: no layer is skipped). The promise is void. Run `hf-costeff calibrate` again."
        )
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
