"""Results that are written row by row, so that an interrupted benchmark goes on, all of them with the same settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class ResultsFile:
    """A JSON file of rows by name, and of the settings they were made with."""

    def __init__(self, file: Path, settings: dict[str, Any] | None = None) -> None:
        """Open it, or start it.

        Args:
            file: Where it lies or will lie.
            settings: What decides the rows, JSON-ready.

        Raises:
            SystemExit: If it has rows with other settings.
        """
        self.file, self.settings = file, settings or {}
        found = json.loads(file.read_text()) if file.exists() else {"settings": self.settings, "rows": {}}
        if found["settings"] != self.settings:
            raise SystemExit(
                f"{file} has rows with other settings: {found['settings']}. Repeat them, or let the rows go elsewhere."
            )
        self.rows: dict[str, Any] = found["rows"]

    def add(self, name: str, row: dict[str, Any], shown: dict[str, Any] | None = None) -> None:
        """Write a row down, and show it, or what of it is given."""
        self.rows[name] = row
        self.file.parent.mkdir(exist_ok=True, parents=True)
        self.file.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
        print(name, json.dumps(row if shown is None else shown), flush=True)


def rows_of(file: Path) -> dict[str, Any]:
    """The rows of such a file, by name."""
    return json.loads(file.read_text())["rows"]
