"""Digests: of a folder's files, so that it knows whether it is whole, and of a model or texts, to tell them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder` to `checksums.json` in it, last and in one step."""
    draft = folder / f"{CHECKSUMS}.draft"
    draft.write_text(json.dumps(_digests(folder), indent=1))
    draft.rename(folder / CHECKSUMS)


def is_whole(folder: Path) -> bool:
    """Whether every file that `checksums.json` lists is there and unchanged."""
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text())
        return bool(recorded) and all(_digest(folder / name) == digest for name, digest in recorded.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(CHECKSUMS))
    return {path.name: _digest(path) for path in files}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(parts: Iterable[str]) -> str:
    """A short digest of some texts in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def fingerprint_of(model: PreTrainedModel, without: Iterable[str] = ()) -> str:
    """A digest of the weights; freshly made ones are left out, because they differ every time."""
    fresh = set(without)
    sums = ((name, tensor) for name, tensor in model.state_dict().items() if name not in fresh)
    return fingerprint(
        f"{name} {hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()}" for name, tensor in sums
    )
