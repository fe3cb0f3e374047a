"""Folders that know whether they are whole: a list of digests, written last."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
    return hashlib.sha256(path.read_bytes()).hexdigest()
