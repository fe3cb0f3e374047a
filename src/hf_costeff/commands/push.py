"""`hf-costeff push`: upload a model folder and its card to the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..hub import CARD, check_model_folder, push_folder
from ..model_card import write_model_card
from .command import Command


@dataclass
class PushArguments:
    """What goes where."""

    model: str = field(metadata={"help": "Folder of a slim model, e.g. the output_dir of a compression run."})
    repo_id: str = field(metadata={"help": "Repository on the Hub, e.g. org/name; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private. Default: the Hub's."})
    token: str | None = field(default=None, metadata={"help": "Access token. Default: the one you are logged in with."})
    revision: str | None = field(default=None, metadata={"help": "Branch, made if it is not there. Default: main."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of writing."})
    license: str | None = field(
        default=None,
        metadata={"help": "The Hub's name of the licence, e.g. apache-2.0, for the card. Default: as stated before."},
    )
    commit_message: str = field(default="Upload model", metadata={"help": "First line of the commit."})


def run(wanted: PushArguments) -> str:
    """Write the card if nobody has written one, push the folder, and say where it is; a failed push changes nothing."""
    check_model_folder(wanted.model)
    card = Path(wanted.model) / CARD
    before = card.read_bytes() if card.exists() else None
    write_model_card(wanted.model, wanted.repo_id, wanted.license)
    try:
        commit = push_folder(
            wanted.model,
            wanted.repo_id,
            commit_message=wanted.commit_message,
            private=wanted.private or None,
            token=wanted.token,
            revision=wanted.revision,
            create_pr=wanted.create_pr,
        )
    except Exception:
        if before is None:
            card.unlink(missing_ok=True)
        else:
            card.write_bytes(before)
        raise
    return f"Pushed to {commit.pr_url or commit.commit_url}"


PUSH = Command("push", "upload a model folder and its card to the Hub", (PushArguments,), run, first="model")
