"""Exit logits of a run's validation and calibration rows, which no stage trained on; kept in a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff.data import DataArguments, make_collator, prepare_data
from hf_costeff.evaluation import collect_exit_logits, row_keys
from hf_costeff.exit_replay import ExitLogits


def load_logits(model_path: str, data: str, folder: str | None) -> dict[str, ExitLogits]:
    """The logits of a run's `validation` and `calibration` rows.

    Args:
        model_path: A folder that `real_run.py` made.
        data: The data it was made from.
        folder: Where the logits are kept (written once, then read); `None` keeps none.
    """
    file = Path(folder) / f"{Path(model_path).name}.pt" if folder else None
    if file is not None and file.exists():
        return {name: ExitLogits(**parts) for name, parts in torch.load(file).items()}
    model = AutoModelForSequenceClassification.from_pretrained(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    settings = json.loads((Path(model_path) / "efficiency.json").read_text())["settings"]
    names = {field.name for field in dataclasses.fields(DataArguments)}
    arguments = DataArguments(**{name: settings[name] for name in names & set(settings)} | {"dataset": data})
    prepared = prepare_data(arguments, tokenizer, teacher_config=model.config, max_positions=model.config.longest_text)
    found = {}
    for name, rows in (("validation", prepared.validation), ("calibration", prepared.calibration)):
        logits = collect_exit_logits(model, rows, make_collator(tokenizer))
        found[name] = dataclasses.replace(logits, row_keys=row_keys(rows))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: vars(records) for name, records in found.items()}, file)
    return found


def joined(parts: dict[str, ExitLogits]) -> ExitLogits:
    """All rows as one pool."""
    records = list(parts.values())
    tensors = (torch.cat([getattr(part, name) for part in records]) for name in ("logits", "seq_lengths", "labels"))
    return ExitLogits(*tensors, [key for part in records for key in part.row_keys])
