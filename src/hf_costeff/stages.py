"""Stages on disk: each is saved and marked done, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checksums import CHECKSUMS, is_whole, write_checksums

STAGES = "stages"
RUN_FILE = "run.json"
RECORD_FILE = "stage.json"
TRAIN_KEYS = "train_keys.npy"
FINGERPRINTS = {
    "data_fingerprint": "the rows changed",
    "model_fingerprint": "the model's weights changed",
    "teacher_fingerprint": "the teacher's weights changed",
}
"""What it means that a digest of a run's settings differs."""


class StageStore:
    """The finished stages of one run, below `<output_dir>/stages`.

    A stage is a folder that was renamed into place once it was complete. What a stage is still working on lives beside
    it in `<name>.working` and survives a kill, so training inside a stage resumes too.
    """

    def __init__(self, output_dir: str | Path, settings: Mapping[str, Any]) -> None:
        """Open the folder of a run, new or interrupted.

        Args:
            output_dir: The run's folder; made if it is not there.
            settings: Everything that decides the result, JSON-ready.

        Raises:
            ValueError: If the folder holds a run with other settings, or files that are no run of this package.
        """
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / STAGES
        run_file = self.folder / RUN_FILE
        wanted = json.loads(json.dumps(settings))
        if run_file.exists():
            self._check_same_run(self._read_settings(run_file), wanted)
        elif self._holds_other_files():
            raise ValueError(
                f"The output folder {self.output_dir} is not empty and holds no run to go on with. "
                "Choose another `output_dir`, or empty it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for finished in self.folder.glob(f"*/{RECORD_FILE}"):  # what a kill just after a rename left behind
            shutil.rmtree(working_folder(output_dir, finished.parent.name), ignore_errors=True)
        if not run_file.exists():
            draft = run_file.with_suffix(".draft")
            draft.write_text(json.dumps(wanted, indent=1))
            draft.rename(run_file)

    def _holds_other_files(self) -> bool:
        """Whether there is anything but what a run leaves that was killed before it wrote its settings."""
        own = (self.folder, (self.folder / RUN_FILE).with_suffix(".draft"))
        return self.output_dir.exists() and any(path not in own for path in self.output_dir.rglob("*"))

    def _read_settings(self, run_file: Path) -> dict[str, Any]:
        try:
            return json.loads(run_file.read_text())
        except ValueError as error:
            raise ValueError(
                f"{run_file} is damaged ({error}), so it cannot be told whose stages these are. Choose another "
                "`output_dir`, or delete this one."
            ) from error

    def _check_same_run(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if differing:
            if found.keys() - wanted.keys() and wanted.keys() - found.keys():
                changes = "of another recipe"
            else:
                changes = ", ".join(
                    FINGERPRINTS.get(key) or f"{key} was {found.get(key)!r}, now {wanted.get(key)!r}"
                    for key in differing
                )
            raise ValueError(
                f"The output folder {self.output_dir} holds the stages of another run ({changes}). "
                "Choose another `output_dir`, delete this one, or repeat the first settings to go on."
            )

    def keep_train_keys(self, keys: Sequence[int]) -> None:
        """Write down which rows are trained on, as digests, for [`train_keys`]."""
        np.save(self.folder / TRAIN_KEYS, np.array(keys, dtype=np.uint64))

    def is_finished(self, name: str) -> bool:
        """Whether a stage was saved and marked done."""
        return (self.folder / name / RECORD_FILE).exists()

    def finish(self, name: str, save: Callable[[Path], Any], record: Mapping[str, Any]) -> None:
        """Save a stage and mark it done, in one rename.

        Args:
            name: The stage.
            save: Writes the stage's files into the folder it is given.
            record: What happened, JSON-ready.
        """
        draft = self.folder / f"{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save(draft)
        (draft / RECORD_FILE).write_text(json.dumps(record, indent=1))
        write_checksums(draft)
        draft.rename(self.folder / name)
        shutil.rmtree(working_folder(self.output_dir, name), ignore_errors=True)

    def record(self, name: str) -> dict[str, Any]:
        """What a finished stage wrote down."""
        return json.loads((self.files(name) / RECORD_FILE).read_text())

    def files(self, name: str) -> Path:
        """The folder of a finished stage, checked for damage.

        Raises:
            ValueError: If a file is missing or changed.
        """
        path = self.folder / name
        if not is_whole(path):
            raise ValueError(
                f"The finished stage {path} is damaged: its files do not match {CHECKSUMS}. Delete this folder and "
                "those of the stages after it, and run the same command again; the stages before it are kept."
            )
        return path


def working_folder(output_dir: str | Path, name: str) -> Path:
    """Where an unfinished stage of a run keeps its checkpoints, whether there is a run yet or not.

    Args:
        output_dir: The run's folder.
        name: The stage.
    """
    return Path(output_dir) / STAGES / f"{name}.working"


def train_keys(model_path: str | Path) -> set[int] | None:
    """Digests of the rows that a model was compressed on, as its run wrote them down beside it.

    Args:
        model_path: The folder of the run.

    Returns:
        What [`StageStore.keep_train_keys`] was given; `None` if no run lies there.
    """
    file = Path(model_path) / STAGES / TRAIN_KEYS
    return set(np.load(file).tolist()) if file.is_file() else None
