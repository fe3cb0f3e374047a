"""Whether a stored promise was made for the weights, and the skipping, at hand."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(model: nn.Module, settings: str = "") -> str:
    """A short digest of names, shapes, precision and values of the parameters, the same on every device.

    Values are summed bit pattern by bit pattern as whole numbers, which is exact in any order. Adapters change names
    or values.

    Args:
        model: Whose parameters.
        settings: What else decides its answers, as text.
    """
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        total = _bits(tensor.detach()).sum(dtype=torch.int64).item()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}\n".encode())
    digest.update(settings.encode())
    return digest.hexdigest()[:16]


def warn_if_void(
    model: nn.Module, calibration: dict[str, Any] | None, skip_threshold: float | None = None, settings: str = ""
) -> None:
    """Warn once when exit settings were calibrated for other paths, or promised for other weights, than the model's.

    Args:
        model: The model that answers. Weights are read again only after they were replaced or written to.
        calibration: `ExitConfig.calibration`. Weights matter to a promise alone; paths also where rows skipped layers.
        skip_threshold: At which probability rows skip layers; `None` where none is skipped.
        settings: As for [`weights_fingerprint`].
    """
    seen = calibration or {}
    promised = (seen.get("promise") or {}).get("fingerprint")
    chosen_for = seen.get("skip_threshold", None if promised else skip_threshold)
    if chosen_for != skip_threshold:
        done, void = ("promised", " The promise is void.") if promised else ("chosen", "")
        logger.warning_once(
            f"The exit settings were {done} {_skipping(chosen_for)}, and the model answers {_skipping(skip_threshold)}."
            f"{void} Run `hf-costeff calibrate` again."
        )
    if promised is None:
        return
    tensors = [(name, p.data_ptr(), 0 if p.is_inference() else p._version) for name, p in model.named_parameters()]
    state = (settings, tensors)
    known, found = getattr(model, "_known_fingerprint", (None, ""))
    if known != state:
        found = weights_fingerprint(model, settings)
        object.__setattr__(model, "_known_fingerprint", (state, found))
    if found != promised:
        logger.warning_once(
            f"The exit settings were promised for the weights {promised}, and these are {found}: other weights, "
            f"precision or adapters{', or other settings of the members' if settings else ''}. The promise is void. "
            f"Run `hf-costeff {'cascade calibrate' if settings else 'calibrate'}` again on this model."
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(WORDS[tensor.element_size()])


def _skipping(threshold: float | None) -> str:
    return "without skipping" if threshold is None else f"with a skip threshold of {threshold:g}"
