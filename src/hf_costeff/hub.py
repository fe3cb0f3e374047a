"""To the Hub: which files of a model folder travel, the one way to push them, and a card for a model without one."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.dynamic_module_utils import get_relative_import_files

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CARD = "README.md"
FIGURES = (
    *("SUMMARY.md", "efficiency.json", "pareto.png"),
    *("layer_skipping.json", "skipping.png", "block_pruning.json"),
)
REPORT_FILES = (CARD, *FIGURES)
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.jinja", "*.spm", "spiece.model", "sentencepiece*.model"),
)
TOKENIZER_FOLDER = "tokenizer_"
"""What the subfolders are called in which the members of a cascade keep tokenizers of their own, before a number."""
WEIGHT_FILES = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
MODEL_FILES = (CONFIG, *WEIGHT_FILES, *TOKENIZER_FILES, *REPORT_FILES)
MODEL_TYPES = ("costeff", "costeff_cascade")

TAGS = ("costeff", "early-exit", "custom_code")
MARKER = "<!-- written by hf_costeff; remove this line to keep your changes -->"
PLAIN_CARD = """# {repo_id}

{what} (model type `{model_type}`). No measurements were saved with these weights.

```python
import hf_costeff
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("{repo_id}")
```

Without that package, leave out its import and pass `trust_remote_code=True`.
"""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload the model files of a folder in one commit: all of them arrive, or nothing changes.

    Only files that make up a model travel ([`MODEL_FILES`] and [`code_files`]): no pickles, no checkpoints, no stages.
    Weights of an earlier push that this folder does not have are removed, and its figures if the card there is one of
    ours; everything else in the repository stays. A card that somebody has written on the Hub stays too, unless
    somebody has written the folder's.

    Args:
        folder: A saved model; as it was afterwards.
        repo_id: `name` or `org/name`; made if it is not there.
        commit_message: First line of the commit.
        commit_description: The rest of the commit's message.
        private: Whether a new repository is private; `None` is the Hub's default.
        token: Access token; `None` uses the one you are logged in with.
        revision: Branch, made if it is not there; `None` is `main`.
        create_pr: Whether to open a pull request instead.
        tags: Added to those of the card.

    Returns:
        The commit.

    Raises:
        ValueError: If the folder holds no model with exits or lacks its code, or `repo_id` is no name for a repository.
        PermissionError: If the Hub does not let you write there.
        ConnectionError: If the Hub cannot be reached or the connection breaks; pushing again is safe.
    """
    check_model_folder(folder)
    travelling = [*MODEL_FILES, *code_files(folder)]
    api = HfApi(token=token)
    with clear_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        on_the_hub = card_on_the_hub(repo_id, token, revision)
        stale = [*WEIGHT_FILES]  # of an earlier push; what is uploaded now stays
        if on_the_hub is not None and MARKER in on_the_hub:  # without it, figures may be somebody's own
            stale += FIGURES
        with card_to_push(Path(folder) / CARD, on_the_hub, tags):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                allow_patterns=[*travelling, *(f"{TOKENIZER_FOLDER}*/{name}" for name in TOKENIZER_FILES)],
                delete_patterns=stale,
                ignore_patterns=_folders_that_stay(folder),
            )


def _folders_that_stay(folder: str | Path) -> list[str]:
    """Patterns of stages, checkpoints and whatever else lies in folders below."""
    below = (path.name for path in Path(folder).iterdir() if path.is_dir())
    return [f"{name}/*" for name in below if not name.startswith(TOKENIZER_FOLDER)] + [f"{TOKENIZER_FOLDER}*/*/*"]


@contextmanager
def clear_errors(repo_id: str) -> Iterator[None]:
    """Say what was asked of the Hub and what to do, where it refuses or cannot be reached."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"The Hub does not let you write to {repo_id!r} (status {error.response.status_code}). Log in with a token "
            "that may write there (`hf auth login`), pass `token`, or choose a `repo_id` of your own."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:  # refused, cut, timed out
        raise ConnectionError(
            f"The connection to the Hub broke while pushing to {repo_id!r} ({error}). A push is one commit, so nothing "
            "is there by halves. Push again."
        ) from error


def check_model_folder(folder: str | Path) -> None:
    """Refuse to push what is not a saved model with exits.

    Raises:
        ValueError: Naming what is missing.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file() or not any(path.glob("model*.safetensors")):
        raise ValueError(
            f"{folder} is no saved model: it needs {CONFIG} and model.safetensors. Give the output_dir of a "
            "compression run, or a folder that save_pretrained wrote."
        )
    found = read_json(path / CONFIG).get("model_type")
    if found not in MODEL_TYPES:
        raise ValueError(
            f"{folder} holds a model of type {found!r}, not {' or '.join(map(repr, MODEL_TYPES))}. Compress it first, "
            "or push it with its own push_to_hub."
        )


def code_files(folder: str | Path) -> list[str]:
    """Names of the files that model and tokenizer take classes from and of what these import; no other code.

    Raises:
        ValueError: If one of them is missing.
    """
    named = []
    for file in (Path(folder) / name for name in (CONFIG, TOKENIZER_CONFIG)):
        config = read_json(file) if file.exists() else {}
        pipelines = [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
        named += [*classes(config.get("auto_map")), *pipelines]
    targets = [target for target in named if "--" not in target]  # with it, the code is in another repository
    try:
        files = [Path(folder) / f"{target.split('.')[0]}.py" for target in targets]
        read = [imported for file in files for imported in (file, *get_relative_import_files(file))]
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is missing: code that {CONFIG} or {TOKENIZER_CONFIG} names or that this code imports. "
            "Load model and tokenizer and save them again with save_pretrained, which puts their code beside them."
        ) from error
    return sorted({Path(file).name for file in read})


def classes(auto_map: Any) -> list[str]:
    """The classes that an `auto_map` names; a tokenizer's may be a list of a slow and a fast one, either missing.

    >>> classes({"AutoTokenizer": ["own.Slow", None], "AutoProcessor": "own.Processor"})
    ['own.Slow', 'own.Processor']
    """
    if isinstance(auto_map, str):
        return [auto_map]
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map or ()
    return [name for value in values for name in classes(value)]


def copy_report(origin: str | Path, folder: str | Path) -> bool:
    """Copy card and figures from one model folder to another if both hold the same model.

    Args:
        origin: Where the model was loaded from; a Hub id or an empty name has no files.
        folder: Where it was saved again.

    Returns:
        Whether there was a card and it still speaks of these weights and exit settings.
    """
    if not str(origin):  # as a path it would be the working directory
        return False
    origin, folder = Path(origin), Path(folder)
    weights = [path.name for path in folder.glob("model*.safetensors")]
    if not all((origin / name).is_file() for name in (CARD, CONFIG, *weights)):
        return False
    same_weights = all(filecmp.cmp(origin / name, folder / name, shallow=False) for name in weights)
    if not same_weights or exit_settings(origin / CONFIG) != exit_settings(folder / CONFIG):
        return False
    copy_report_files(origin, folder)
    return True


def copy_report_files(origin: str | Path, folder: str | Path) -> None:
    """Copy card and figures, as far as there are any, whatever they speak of."""
    for file in (Path(origin) / name for name in REPORT_FILES):
        if file.is_file():
            shutil.copy(file, folder)


def exit_settings(file: Path) -> dict[str, Any] | None:
    """The `exit_config` that a `config.json` or an `efficiency.json` holds."""
    return read_json(file).get("exit_config")


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file of a model folder holds.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Restore it, or save the model again.") from error


@contextmanager
def card_to_push(card: Path, on_the_hub: str | None, tags: list[str] | None) -> Iterator[None]:
    """While a folder is pushed, its card is the one to be on the Hub; then it gets its own back.

    One that somebody has written in the folder comes first, then one that somebody has written on the Hub, then the
    folder's.

    Args:
        card: The folder's, which may be missing.
        on_the_hub: The text of the one that is there already; `None` if there is none.
        tags: Added to those of the card, if there is one.
    """
    own = card.read_bytes() if card.exists() else None
    text = None if own is None else own.decode("utf-8")
    if on_the_hub is not None and MARKER not in on_the_hub and (text is None or MARKER in text):
        text = on_the_hub
    if tags and text is not None:
        tagged = ModelCard(text)
        tagged.data.tags = [*dict.fromkeys([*(tagged.data.tags or []), *tags])]
        text = str(tagged)
    try:
        if text is not None:
            card.write_bytes(text.encode("utf-8"))
        yield
    finally:
        if own is None:
            card.unlink(missing_ok=True)
        else:
            card.write_bytes(own)


def is_written_by_hand(card: Path) -> bool:
    """Whether there is such a file and this package did not write it, or somebody made it theirs since."""
    return card.exists() and MARKER not in card.read_text(encoding="utf-8")


def card_on_the_hub(repo_id: str, token: str | bool | None, revision: str | None) -> str | None:
    """The text of the card that is there, if there is one; a branch that is still to be made begins as `main`."""
    with clear_errors(repo_id):
        try:
            file = hf_hub_download(repo_id, CARD, token=token, revision=revision)
        except RevisionNotFoundError:
            return None if revision is None else card_on_the_hub(repo_id, token, None)
        except (RepositoryNotFoundError, RemoteEntryNotFoundError):
            return None
    return Path(file).read_bytes().decode("utf-8")


def plain_card(repo_id: str, folder: str | Path) -> ModelCard:
    """A card for a model without measurements: what it is and how to load it."""
    config = read_json(Path(folder) / CONFIG)
    if "members" in config:
        types = ", ".join(member["model_type"] for member in config["members"])
        what = f"A cascade of {len(config['members'])} classifiers, smallest first: {types}"
    else:
        layers = config["exit_layers"]
        exits = ", ".join(map(str, layers))
        what = f"An encoder classifier of {layers[-1]} layers with exits after layers {exits}"
    data = ModelCardData(library_name="transformers", pipeline_tag="text-classification", tags=list(TAGS))
    text = PLAIN_CARD.format(repo_id=repo_id, what=what, model_type=config["model_type"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n{MARKER}\n")
