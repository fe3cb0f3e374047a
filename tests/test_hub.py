"""Push and pull: every way to load a saved or pushed model, what is uploaded, and what a refusal says.

Loading and pushing run in fresh processes: what is imported there, and which Hub is asked, is the test's to say.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModelForSequenceClassification

from helpers import random_batch, tiny_model, word_tokenizer
from hf_costeff import CostEffConfig, CostEffForSequenceClassification, CostEffModel, ExitConfig
from hf_costeff.cli import main
from hf_costeff.hub import MARKER, card_on_the_hub, card_to_push, clear_errors, code_files, copy_report, push_folder
from hf_costeff.model_card import how_to_use, write_model_card
from loopback_hub import READER, TOKEN, LoopbackHub, run_python
from test_house import SOURCE, siblings


def travelling(name: str) -> set[str]:
    """A file and all that it imports, which is what upstream saves beside a model."""
    return {f"{name}.py"}.union(*(travelling(other) for other in siblings(SOURCE / f"{name}.py")))


CODE = travelling("modeling_costeff")
AUTO_MAP = {
    "AutoConfig": "configuration_costeff.CostEffConfig",
    "AutoModel": "modeling_costeff.CostEffModel",
    "AutoModelForSequenceClassification": "modeling_costeff.CostEffForSequenceClassification",
}
INPUTS = random_batch([7, 3, 11, 2, 9, 5])
OWN_SCRIPT = "own_script.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model folder as `compress` leaves it, with things beside that must not travel, and the answers to expect."""
    root = tmp_path_factory.mktemp("saved")
    model = tiny_model(exit_config=ExitConfig(threshold=0.8).to_dict())
    model.save_pretrained(root / "slim")
    word_tokenizer().save_pretrained(root / "slim")
    (root / "slim" / "README.md").write_text("---\nlibrary_name: transformers\ntags:\n- mine\n---\n\n# Our card\n")
    (root / "slim" / "efficiency.json").write_text(json.dumps({"exit_config": model.config.exit_config}))
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "checksums.json", "notes.json", OWN_SCRIPT):
        (root / "slim" / name).write_text(f"{Path.home()} {TOKEN}")
    for folder in ("stages/assistant", "checkpoint-3"):
        (root / "slim" / folder).mkdir(parents=True)
        (root / "slim" / folder / "config.json").write_text("{}")
        for name in ("model.safetensors", "modeling_costeff.py", "chat_template.jinja"):
            (root / "slim" / folder / name).write_text("not for the Hub")
    prediction = model.predict(**INPUTS, early_exit=True)
    assert len(set(prediction.exit_layer.tolist())) > 1
    expected = {"inputs": INPUTS, "exit_layer": prediction.exit_layer, "logits": prediction.logits}
    torch.save(expected, root / "expected.pt")
    return root


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


def check(run) -> str:
    assert run.returncode == 0, run.stderr
    return run.stdout


# --- what is saved


def test_the_code_travels_with_the_weights_and_every_auto_class_finds_its_own(saved):
    assert {path.name for path in (saved / "slim").glob("*.py")} == {*CODE, OWN_SCRIPT}
    assert json.loads((saved / "slim" / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("model_class", [CostEffModel, CostEffForSequenceClassification])
def test_whichever_class_is_saved_the_map_is_complete(model_class, tmp_path):
    tiny_model(model_class=model_class).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_config_saved_alone_maps_only_to_the_files_that_are_there(tmp_path):
    CostEffConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    code = {path.name for path in tmp_path.glob("*.py")}
    assert "configuration_costeff.py" in code and "modeling_costeff.py" not in code and code < CODE


def test_of_a_folders_code_only_what_the_config_names_is_taken_for_the_models(saved, tmp_path):
    folder = shutil.copytree(saved / "slim", tmp_path / "slim")
    assert code_files(folder) == sorted(CODE)
    file = folder / "config.json"
    pipelines = {"costeff-classification": {"impl": "pipeline_costeff.CostEffClassificationPipeline"}}
    elsewhere = {"AutoModelForTokenClassification": "org/other--modeling_other.Other"}
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "custom_pipelines": pipelines, "auto_map": {**AUTO_MAP, **elsewhere}}))
    (folder / "pipeline_costeff.py").write_text("")
    assert code_files(folder) == sorted([*CODE, "pipeline_costeff.py"])
    for name in ("pipeline_costeff.py", "exit_heads.py"):  # named by the config; imported by what it names
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is missing.*save them again with save_pretrained"):
            code_files(folder)
        file.write_text(json.dumps(config))
    file.write_text(json.dumps({"model_type": "costeff"}))
    assert code_files(folder) == []


@pytest.mark.parametrize("as_saved", [lambda names: {"AutoTokenizer": names}, lambda names: names])
@pytest.mark.parametrize(
    "names", [["own_slow.Slow", "own_fast.Fast"], ["own_slow.Slow", None], [None, "own_fast.Fast"]]
)
def test_a_tokenizers_code_travels_too_in_either_form_of_its_map(names, as_saved, saved, tmp_path):
    folder = shutil.copytree(saved / "slim", tmp_path / "slim")
    for name in ("own_slow.py", "own_fast.py"):
        (folder / name).write_text("")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": as_saved(names)}))
    assert code_files(folder) == sorted([*CODE, *(f"{name.split('.')[0]}.py" for name in names if name)])


class OwnModel(CostEffForSequenceClassification):
    """Somebody's subclass, in a file of theirs."""


def test_a_subclass_from_elsewhere_maps_to_its_own_file_and_to_no_file_that_was_not_saved(tmp_path):
    model = OwnModel(tiny_model(seed=0).config)
    model.config.auto_map = {"AutoModel": "org/other--modeling_costeff.CostEffModel"}
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": AUTO_MAP["AutoConfig"],
        "AutoModelForSequenceClassification": "test_hub.OwnModel",
    }
    assert all((tmp_path / f"{target.split('.')[0]}.py").exists() for target in auto_map.values())


# --- load three ways, from a folder and from the Hub

LOAD = """
import json, sys, torch
name, way, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if way == "absent":
    sys.modules["hf_costeff"] = None  # any import of it fails
if way in ("imported", "both"):
    import hf_costeff
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

if way != "imported":
    settings["trust_remote_code"] = True
expected = torch.load(sys.argv[4])
assert type(AutoConfig.from_pretrained(name, **settings)).__name__ == "CostEffConfig"
for auto in (AutoModelForSequenceClassification, AutoModel):
    model, report = auto.from_pretrained(name, output_loading_info=True, **settings)
    assert not any(report.values()), report
    home = type(model).__module__.split(".")[0]
    assert home == ("hf_costeff" if way in ("imported", "both") else "transformers_modules"), home
    prediction = model.predict(**expected["inputs"], early_exit=True)
    assert torch.equal(prediction.exit_layer, expected["exit_layer"])
    torch.testing.assert_close(prediction.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    if len(sys.argv) > 5:
        model.save_pretrained(sys.argv[5] + auto.__name__)
print("answers alike")
"""
WAYS = ["imported", "absent", "installed"]  # the package, or the code saved with the model; "both": either would do


def load(name, way, saved, environment, folder, *save_again, **settings) -> str:
    arguments = (name, way, json.dumps(settings), saved / "expected.pt", *save_again)
    return check(run_python(LOAD, environment, folder, *arguments))


@pytest.mark.parametrize("way", [*WAYS, "both"])
def test_a_folder_loads_three_ways_and_so_does_what_is_saved_from_it_again(way, saved, hub, tmp_path):
    offline = hub.environment(tmp_path, HF_HUB_OFFLINE="1")
    assert load(saved / "slim", way, saved, offline, tmp_path, "again-") == "answers alike\n"
    config = json.loads((tmp_path / "again-AutoModelForSequenceClassification" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    folder = tmp_path / "again-AutoModelForSequenceClassification"
    assert load(folder, "absent", saved, offline, tmp_path) == "answers alike\n"


@pytest.mark.parametrize("way", ["imported", "absent"])
def test_a_pushed_repository_loads_both_ways_then_offline_and_from_where_it_is_saved_again(way, saved, hub, tmp_path):
    environment = hub.environment(tmp_path)
    check(run_python(PUSH, environment, tmp_path, saved / "slim", "org/slim"))
    reader = hub.environment(tmp_path, token=None)
    assert load("org/slim", way, saved, reader, tmp_path, "again-") == "answers alike\n"
    asked = len(hub.requests)
    offline = hub.environment(tmp_path, token=None, HF_HUB_OFFLINE="1")
    assert load("org/slim", way, saved, offline, tmp_path) == "answers alike\n"
    assert len(hub.requests) == asked
    assert load("org/slim", way, saved, reader, tmp_path, local_files_only=True) == "answers alike\n"
    again = tmp_path / "again-AutoModelForSequenceClassification"
    assert "--" not in json.dumps(json.loads((again / "config.json").read_text())["auto_map"])
    assert load(again, "absent", saved, offline, tmp_path) == "answers alike\n"


def test_code_beside_the_weights_runs_only_where_it_is_trusted(saved, hub, tmp_path):
    offline = hub.environment(tmp_path, HF_HUB_OFFLINE="1")
    code = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    run = run_python(code, offline, tmp_path, saved / "slim")
    assert run.returncode and "trust_remote_code=True" in run.stderr
    assert not list(tmp_path.rglob("modeling_costeff.py"))  # nor is it copied to where it would be imported from


PUSH = """
import sys, hf_costeff
from hf_costeff.hub import push_folder
print(push_folder(sys.argv[1], sys.argv[2]).commit_url)
"""

IMPATIENT = "import time; time.sleep = lambda seconds: None  # between the client's tries"

COMMAND_PUSH = """
import sys
from hf_costeff.cli import main
sys.exit(main(["push", *sys.argv[1:]]))
"""

TRAINER_PUSH = """
import json, sys
from concurrent.futures import Future
from datasets import Dataset
from hf_costeff import CostEffTrainer, CostEffTrainingArguments
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
rows = Dataset.from_list([{"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "labels": 1}] * 4)
steps = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none"}
arguments = CostEffTrainingArguments(
    "out", push_to_hub=True, hub_model_id="org/trained", **steps, **json.loads(sys.argv[3])
)
trainer = CostEffTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.evaluate()
for options in json.loads(sys.argv[2]):
    commit = trainer.push_to_hub(**options)
    if options.get("blocking") is False:
        assert isinstance(commit, Future)
        commit = commit.result()
    print(commit.commit_url)
"""


# --- what arrives


MODEL_PUSH = """
import json, sys, hf_costeff
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
settings = json.loads(sys.argv[3])
if settings.pop("change", False):
    model.costeff.embeddings.norm.bias.data.add_(1)
model.push_to_hub(sys.argv[2], **settings)
"""
FILES = {"config.json", "model.safetensors", "README.md", "efficiency.json", ".gitattributes", *CODE}


VARIABLE = {"SECRET_OF_MINE": "a-variable-of-the-environment"}


def check_secrets(hub: LoopbackHub, *folders: Path) -> None:
    """No commit of any repository holds the home directory, a folder of the test, a token or a variable."""
    pushed = b"".join(content for commit in hub.commits.values() for content in commit.values())
    assert len(pushed) > 10_000
    secrets = [str(Path.home()), *map(str, folders), TOKEN, READER, *VARIABLE, *VARIABLE.values()]
    assert [secret for secret in secrets if secret.encode() in pushed] == []


def test_a_pushed_folder_is_the_model_and_nothing_else(saved, hub, tmp_path):
    environment = hub.environment(tmp_path, **VARIABLE)
    url = check(run_python(PUSH, environment, tmp_path, saved / "slim", "org/slim")).strip()
    files = hub.files("org/slim")
    assert set(files) == {*FILES, "tokenizer.json", "tokenizer_config.json"}
    assert url.startswith(f"{hub.endpoint}/org/slim/commit/")
    assert files["README.md"] == (saved / "slim" / "README.md").read_bytes()
    check_secrets(hub, saved, tmp_path)


OPTIONS = {"commit_message": "First", "commit_description": "And why.", "revision": "v2"}


@pytest.mark.parametrize("create_pr", [False, True])
@pytest.mark.parametrize("private", [None, False, True])
def test_options_reach_the_hubs_own_client_as_they_were_given(create_pr, private, saved, monkeypatch):
    asked = {}

    class Client:
        def __init__(self, token):
            asked["token"] = token

        def create_repo(self, repo_id, **given):
            asked["repository"] = given
            return SimpleNamespace(repo_id=f"org/{repo_id}")

        def create_branch(self, repo_id, branch, exist_ok):
            asked["branch"] = (repo_id, branch)

        def upload_folder(self, **given):
            asked["upload"] = given
            return "the commit"

    monkeypatch.setattr("hf_costeff.hub.HfApi", Client)
    monkeypatch.setattr("hf_costeff.hub.card_on_the_hub", lambda *given: asked.update(card=given))
    given = {**OPTIONS, "create_pr": create_pr}
    assert push_folder(saved / "slim", "slim", token="hf_own", private=private, **given) == "the commit"
    assert asked["card"] == ("org/slim", "hf_own", "v2")
    assert asked["token"] == "hf_own" and asked["repository"] == {"private": private, "exist_ok": True}
    assert asked["upload"].items() >= {**given, "repo_id": "org/slim", "folder_path": saved / "slim"}.items()
    assert asked.get("branch") == (None if create_pr else ("org/slim", "v2"))  # a pull request is a branch already


def test_a_token_given_in_the_call_is_the_one_that_reads_and_writes(saved, hub, tmp_path):
    hub.repos["org/slim"] = {"private": True, "branches": {}}
    hub.add_commit("org/slim", "main", {"README.md": b"---\ntags: []\n---\nTheirs.\n"})
    changed = (saved / "slim", "org/slim", json.dumps({"change": True, "token": TOKEN}))
    check(run_python(MODEL_PUSH, hub.environment(tmp_path, token=None), tmp_path, *changed))
    files = hub.files("org/slim")
    assert "model.safetensors" in files and b"Theirs." in files["README.md"]


def test_a_models_own_push_carries_the_card_of_the_folder_it_came_from(saved, hub, tmp_path):
    environment = hub.environment(tmp_path)
    arguments = (saved / "slim", "slim", json.dumps({"private": True, "commit_message": "First", "tags": ["film"]}))
    check(run_python(MODEL_PUSH, environment, tmp_path, *arguments))
    files = hub.files("org/slim")
    assert set(files) == FILES and hub.repos["org/slim"]["private"]
    assert files["README.md"].decode().endswith("# Our card\n") and b"- mine\n- film\n" in files["README.md"]


def test_a_changed_model_gets_a_card_without_figures_and_leaves_one_that_is_there(saved, hub, tmp_path):
    """The first card's figures were measured on other weights; what somebody wrote on the Hub is theirs."""
    environment = hub.environment(tmp_path)
    changed = (saved / "slim", "org/changed", json.dumps({"change": True}))
    check(run_python(MODEL_PUSH, environment, tmp_path, *changed))
    card = hub.files("org/changed")["README.md"].decode()
    assert "No measurements were" in card and "org/changed" in card and "Our card" not in card
    assert "efficiency.json" not in hub.files("org/changed")
    hub.add_commit("org/changed", "main", {**hub.files("org/changed"), "README.md": b"---\ntags: []\n---\nTheirs.\n"})
    check(run_python(MODEL_PUSH, environment, tmp_path, *changed))
    assert b"Theirs." in hub.files("org/changed")["README.md"]


def test_a_report_goes_along_only_while_weights_and_exit_settings_are_its_own(saved, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(saved / "slim")
    model.save_pretrained(tmp_path / "same")
    assert copy_report(saved / "slim", tmp_path / "same")
    assert (tmp_path / "same" / "efficiency.json").exists()
    model.config.exit_config = ExitConfig(threshold=0.5).to_dict()
    model.save_pretrained(tmp_path / "other-settings")
    assert not copy_report(saved / "slim", tmp_path / "other-settings")
    assert not copy_report("", tmp_path / "same") and not copy_report("org/slim", tmp_path / "same")


def test_the_command_pushes_a_folder_and_prints_where(saved, hub, tmp_path):
    words = (saved / "slim", "--repo_id", "org/slim", "--private", "--revision", "v1", "--commit_message", "Hello")
    out = check(run_python(COMMAND_PUSH, hub.environment(tmp_path), tmp_path, *words))
    assert out.startswith(f"Pushed to {hub.endpoint}/org/slim/commit/")
    assert set(hub.files("org/slim", "v1")) >= FILES and hub.repos["org/slim"]["private"]
    refused = run_python(COMMAND_PUSH, hub.environment(tmp_path, token=READER), tmp_path, *words)
    assert refused.returncode == 1 and "(status 403)" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("request_url", [None, "https://hub/org/slim/discussions/1"])
def test_the_command_passes_on_what_it_was_given_and_says_where_it_went(request_url, tmp_path, monkeypatch, capsys):
    asked = {}

    def push(folder, repo_id, **options):
        asked.update(options, folder=folder, repo_id=repo_id)
        return SimpleNamespace(pr_url=request_url, commit_url="https://hub/org/slim/commit/1")

    monkeypatch.setattr("hf_costeff.commands.push.push_folder", push)
    tiny_model().save_pretrained(tmp_path)
    target = [str(tmp_path), "--repo_id", "org/slim"]
    assert main(["push", *target]) == 0
    defaults = {"commit_message": "Upload model", "private": None, "token": None, "revision": None, "create_pr": False}
    assert asked == {"folder": str(tmp_path), "repo_id": "org/slim", **defaults}
    flags = ["--private", "--token", "hf_own", "--revision", "v2", "--create_pr", "--commit_message", "Hello"]
    assert main(["push", *target, *flags, "--license", "mit"]) == 0
    given = {"commit_message": "Hello", "private": True, "token": "hf_own", "revision": "v2", "create_pr": True}
    assert asked == {"folder": str(tmp_path), "repo_id": "org/slim", **given}
    assert "license: mit" in (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out.endswith(f"Pushed to {request_url or 'https://hub/org/slim/commit/1'}\n")


def test_a_push_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, capsys):
    def broken(*given, **options):
        assert "org/new" in (tmp_path / "README.md").read_text()
        raise ConnectionError("cut")

    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr("hf_costeff.commands.push.push_folder", broken)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["push", str(tmp_path), "--repo_id", "org/new"]) == 1 and "cut" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_model_card(tmp_path, "org/old")
    before["README.md"] = (tmp_path / "README.md").read_bytes()
    assert main(["push", str(tmp_path), "--repo_id", "org/new"]) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_trainer_pushes_model_tokenizer_and_card_and_no_pickle_at_any_time(saved, hub, tmp_path):
    pushes = json.dumps([{"license": "mit", "tags": "film"}])
    run = run_python(TRAINER_PUSH, hub.environment(tmp_path, **VARIABLE), tmp_path, saved / "slim", pushes, "{}")
    check(run)
    assert "`hub_strategy` is set to 'end'" in run.stderr
    assert (tmp_path / "out" / "training_args.bin").exists()
    files = hub.files("org/trained")
    assert set(files) == {*FILES, "tokenizer.json", "tokenizer_config.json"} - {"efficiency.json"}
    card = files["README.md"].decode()
    assert "# org/trained" in card and "license: mit" in card and "- film" in card
    assert "| 1 | 0.7M | " in card and "after 2 training steps" in card and "2 steps in batches of 8" in card
    assert "None" not in card
    check_secrets(hub, saved, tmp_path)
    pushed = {name for commit in hub.commits.values() for name in commit}
    assert not [name for name in pushed if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert sum("/commit/" in request for request in hub.requests) == 1  # none while training


def test_a_trainer_pushes_in_the_background_with_its_own_token_to_a_branch_whose_card_it_leaves(saved, hub, tmp_path):
    hub.repos["org/trained"] = {"private": True, "branches": {}}
    theirs = {name: f"---\ntags: []\n---\nTheirs on {name}.\n".encode() for name in ("main", "draft")}
    for branch, card in theirs.items():
        hub.add_commit("org/trained", branch, {"README.md": card})
    words = (json.dumps([{"blocking": False, "revision": "draft"}]), json.dumps({"hub_token": TOKEN}))
    nobody = hub.environment(tmp_path, token=None)
    out = check(run_python(TRAINER_PUSH, nobody, tmp_path, saved / "slim", *words))
    assert out.strip().endswith(hub.find("org/trained", "draft"))
    files = hub.files("org/trained", "draft")
    assert "model.safetensors" in files and b"Theirs on draft." in files["README.md"]
    assert hub.files("org/trained", "main") == {"README.md": theirs["main"]}


def test_a_new_branch_begins_with_the_card_of_main(saved, hub, tmp_path):
    hub.repos["org/slim"] = {"private": False, "branches": {}}
    hub.add_commit("org/slim", "main", {"README.md": b"---\ntags: []\n---\nTheirs.\n"})
    changed = (saved / "slim", "org/slim", json.dumps({"change": True, "revision": "v2"}))
    check(run_python(MODEL_PUSH, hub.environment(tmp_path), tmp_path, *changed))
    assert b"Theirs." in hub.files("org/slim", "v2")["README.md"]


def test_figures_of_other_weights_do_not_stay_on_the_hub(saved, hub, tmp_path):
    """A card of ours and what belongs to it go with the weights they speak of; what else is there stays."""
    environment = hub.environment(tmp_path)
    check(run_python(PUSH, environment, tmp_path, saved / "slim", "org/slim"))
    files = hub.files("org/slim")
    ours = files["README.md"] + MARKER.encode()
    hub.add_commit("org/slim", "main", {**files, "README.md": ours, "own.txt": b"", "sub/efficiency.json": b""})
    changed = (saved / "slim", "org/slim", json.dumps({"change": True}))
    check(run_python(MODEL_PUSH, environment, tmp_path, *changed))
    files = hub.files("org/slim")
    assert "efficiency.json" not in files and {"own.txt", "sub/efficiency.json"} <= set(files)
    assert b"No measurements were" in files["README.md"] and b"Our card" not in files["README.md"]
    theirs = dict.fromkeys(("SUMMARY.md", "pareto.png", "efficiency.json"), b"of theirs")
    for card in ({"README.md": THEIRS}, {}):
        hub.add_commit("org/slim", "main", {**theirs, **card})
        check(run_python(MODEL_PUSH, environment, tmp_path, *changed))
        assert theirs.items() < hub.files("org/slim").items()


def test_weights_of_an_earlier_push_are_not_loaded_instead_of_the_new_ones(saved, hub, tmp_path):
    """A loader takes a single weights file before shards, and shards of another number would stay for ever."""
    hub.repos["org/slim"] = {"private": False, "branches": {}}
    old = dict.fromkeys(("model.safetensors", "model-00009-of-00009.safetensors"), b"other weights")
    theirs = dict.fromkeys(("models/model.safetensors", "adapter_model.safetensors"), b"theirs")
    hub.add_commit("org/slim", "main", {**old, **theirs})
    environment = hub.environment(tmp_path)
    arguments = (saved / "slim", "org/slim", json.dumps({"max_shard_size": "5KB"}))
    check(run_python(MODEL_PUSH, environment, tmp_path, *arguments))
    files = hub.files("org/slim")
    assert not set(old) & set(files) and set(theirs) < set(files)
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1 and shards < set(files)
    assert load("org/slim", "imported", saved, environment, tmp_path) == "answers alike\n"


def test_the_three_ways_on_the_card_run_as_they_are_written(saved, hub, tmp_path):
    text = how_to_use(str(saved / "slim"), CostEffConfig.from_pretrained(saved / "slim"))
    package, code, pipeline = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    offline = hub.environment(tmp_path, HF_HUB_OFFLINE="1")
    said = check(run_python(package, offline, tmp_path))
    assert said.startswith("tensor([[") and "grad_fn" not in said
    go_on = package[package.index("answer =") :]
    nothing = "import sys; sys.modules['hf_costeff'] = None"
    script = f"{nothing}\n{code}\n{go_on}\n{pipeline}\nprint(classify('a text'))"
    again = check(run_python(script, offline, tmp_path))
    assert again.startswith(said) and "'label': 'LABEL_" in again


def by(whom: str, tag: str = "mine") -> str:
    return f"---\ntags:  [{tag}]  # kept as it is\r\n---\r\n{whom}\n"


OURS = by("Ours.") + MARKER


@pytest.mark.parametrize(
    ("own", "on_the_hub", "pushed"),
    [
        (by("Own."), by("Theirs."), by("Own.")),
        (by("Own."), OURS, by("Own.")),
        (OURS, by("Theirs."), by("Theirs.")),
        (None, by("Theirs."), by("Theirs.")),
        (OURS, by("Old.") + MARKER, OURS),
        (OURS, None, OURS),
        (None, None, None),
    ],
)
def test_a_card_by_hand_is_pushed_before_one_of_ours_and_the_folders_before_the_hubs(own, on_the_hub, pushed, tmp_path):
    card = tmp_path / "README.md"
    if own is not None:
        card.write_bytes(own.encode())
    for tags in (None, ["film"]):
        with card_to_push(card, on_the_hub, tags):
            assert card.exists() == (pushed is not None)
            if pushed is not None and tags is None:
                assert card.read_bytes() == pushed.encode()
            elif pushed is not None:
                assert ModelCard.load(card).data.tags == ["mine", "film"]
                assert ModelCard.load(card).text.strip() == ModelCard(pushed).text.strip()
        assert (card.read_bytes() if card.exists() else None) == (None if own is None else own.encode())


THEIRS = b"---\ntags:\n- mine\n---\nTheirs.\n"


def test_the_command_leaves_a_card_that_was_edited_on_the_hub_every_time(hub, tmp_path):
    """Nor does the folder take it over: a later edit would then give way to an older one."""
    tiny_model().save_pretrained(tmp_path / "slim")
    push = (COMMAND_PUSH, hub.environment(tmp_path), tmp_path, tmp_path / "slim", "--repo_id", "org/slim")
    check(run_python(*push))
    assert b"No measurements were" in hub.files("org/slim")["README.md"]
    for edit in (THEIRS, THEIRS + b"And more.\n"):
        hub.add_commit("org/slim", "main", {**hub.files("org/slim"), "README.md": edit})
        check(run_python(*push))
        assert hub.files("org/slim")["README.md"] == edit
        assert MARKER in (tmp_path / "slim" / "README.md").read_text()
    (tmp_path / "slim" / "README.md").write_bytes(b"---\ntags: []\n---\nMine.\n")
    check(run_python(*push))
    assert b"Mine." in hub.files("org/slim")["README.md"]


def test_an_unchanged_models_own_push_leaves_a_card_that_was_edited_on_the_hub_and_adds_tags(hub, tmp_path):
    tiny_model().save_pretrained(tmp_path / "slim")
    write_model_card(tmp_path / "slim", "slim")
    hub.repos["org/slim"] = {"private": False, "branches": {}}
    hub.add_commit("org/slim", "main", {"README.md": THEIRS})
    push = (MODEL_PUSH, hub.environment(tmp_path), tmp_path, tmp_path / "slim", "slim")  # a bare name
    check(run_python(*push, '{"tags": ["film"]}'))
    assert hub.files("org/slim")["README.md"] == THEIRS.replace(b"- mine\n", b"- mine\n- film\n")


def test_a_branch_is_made_and_loads_by_its_name(saved, hub, tmp_path):
    environment = hub.environment(tmp_path)
    check(run_python(MODEL_PUSH, environment, tmp_path, saved / "slim", "org/slim", json.dumps({"revision": "v2"})))
    assert set(hub.files("org/slim", "main")) == {".gitattributes"}
    for way in WAYS:
        assert load("org/slim", way, saved, environment, tmp_path, revision="v2") == "answers alike\n"
    missing = run_python(
        LOAD, environment, tmp_path, "org/slim", "imported", '{"revision": "v3"}', saved / "expected.pt"
    )
    assert missing.returncode and "v3 is not a valid git identifier" in missing.stderr


def test_a_model_in_a_subfolder_loads(saved, hub, tmp_path):
    environment = hub.environment(tmp_path)
    check(run_python(PUSH, environment, tmp_path, saved / "slim", "org/slim"))
    below = {f"small/{name}": content for name, content in hub.files("org/slim").items()}
    hub.add_commit("org/slim", "main", below)
    assert load("org/slim", "imported", saved, environment, tmp_path, subfolder="small") == "answers alike\n"


def test_pushing_again_is_a_commit_on_the_same_repository(saved, hub, tmp_path):
    for _ in range(2):
        check(run_python(PUSH, hub.environment(tmp_path), tmp_path, saved / "slim", "org/slim"))
    assert hub.requests.count("POST /api/repos/create") == 2 and len(hub.repos) == 1  # the second was a 409


# --- what goes wrong


def test_a_connection_that_is_cut_once_in_mid_upload_is_tried_again(saved, hub, tmp_path):
    hub.drop_commits = 1
    check(run_python(PUSH, hub.environment(tmp_path), tmp_path, saved / "slim", "org/slim"))
    assert set(hub.files("org/slim")) >= FILES


def test_a_connection_that_keeps_being_cut_leaves_the_repository_as_it_was_and_the_next_push_completes_it(
    saved, hub, tmp_path
):
    hub.drop_commits = 100
    environment = hub.environment(tmp_path)
    cut = run_python(IMPATIENT + PUSH, environment, tmp_path, saved / "slim", "org/slim")
    assert cut.returncode
    assert "ConnectionError: The connection to the Hub broke while pushing to 'org/slim'" in cut.stderr
    assert "nothing is there by halves. Push again." in cut.stderr
    assert set(hub.files("org/slim")) == {".gitattributes"} and hub.drop_commits < 99
    hub.drop_commits = 0
    check(run_python(PUSH, environment, tmp_path, saved / "slim", "org/slim"))
    assert set(hub.files("org/slim")) >= FILES


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_wrong", 401), (READER, 403)])
def test_a_token_that_may_not_write_is_told_so_and_how_to_get_one(token, status, saved, hub, tmp_path):
    run = run_python(PUSH, hub.environment(tmp_path, token=token), tmp_path, saved / "slim", "org/slim")
    assert f"The Hub does not let you write to 'org/slim' (status {status})" in run.stderr
    assert "hf auth login" in run.stderr and hub.repos == {}


def refusal(status: int) -> SimpleNamespace:
    """A stand-in for the HTTP library's response: which library that is changes with the Hub client's version."""
    request = SimpleNamespace(url="https://hub", method="POST")
    return SimpleNamespace(status_code=status, headers={}, request=request)


@pytest.mark.parametrize(
    ("status", "expected"), [(401, PermissionError), (403, PermissionError), (500, HfHubHTTPError)]
)
def test_only_a_refusal_is_told_as_one(status, expected):
    refused = HfHubHTTPError("refused", response=refusal(status))
    with pytest.raises(expected) as caught, clear_errors("org/slim"):
        raise refused
    assert type(caught.value) is expected and ("hf auth login" in str(caught.value)) == (status < 500)


@pytest.mark.parametrize("error", [RepositoryNotFoundError, RemoteEntryNotFoundError])
def test_a_card_that_is_missing_on_the_hub_is_no_error(error, monkeypatch):
    def download(*given, **options):
        raise error("not there", response=refusal(404))

    monkeypatch.setattr("hf_costeff.hub.hf_hub_download", download)
    assert card_on_the_hub("org/slim", None, None) is None


def test_without_a_hub_the_error_names_the_repository(saved, hub, tmp_path):
    environment = hub.environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    for code, arguments in ((PUSH, ()), (MODEL_PUSH, ('{"change": true}',))):  # the second asks for the card first
        run = run_python(IMPATIENT + code, environment, tmp_path, saved / "slim", "org/slim", *arguments)
        assert "ConnectionError: The connection to the Hub broke while pushing to 'org/slim'" in run.stderr


def test_a_private_repository_is_not_found_without_a_token(saved, hub, tmp_path):
    environment = hub.environment(tmp_path)
    check(run_python(MODEL_PUSH, environment, tmp_path, saved / "slim", "org/slim", '{"private": true}'))
    assert load("org/slim", "imported", saved, environment, tmp_path, token=TOKEN) == "answers alike\n"
    stranger = hub.environment(tmp_path / "stranger", token=None)
    run = run_python(LOAD, stranger, tmp_path, "org/slim", "imported", "{}", saved / "expected.pt")
    assert run.returncode and "org/slim is not a local folder and is not a valid model identifier" in run.stderr


def test_what_is_no_model_of_this_kind_is_not_pushed(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no saved model: it needs config\.json and model\.safetensors"):
        push_folder(tmp_path / "nowhere", "org/slim")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"config\.json is no JSON: .*Restore it, or save the model again"):
        push_folder(tmp_path, "org/slim")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is no saved model: it needs config\.json and model\.safetensors"):
        push_folder(tmp_path, "org/slim")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds a model of type 'bert', not 'costeff'"):
        push_folder(tmp_path, "org/slim")


@pytest.mark.parametrize("name", ["a/b/c", "", "org/sl im"])
def test_a_name_that_no_repository_can_have_is_refused(name, saved):
    with pytest.raises(ValueError, match="Repo id"):
        push_folder(saved / "slim", name)


def test_metadata_that_the_hub_does_not_take_is_refused_before_anything_is_sent(saved, hub, tmp_path):
    tiny_model().save_pretrained(tmp_path / "slim")
    (tmp_path / "slim" / "README.md").write_text("---\nlicense: no-such\n---\n")
    run = run_python(PUSH, hub.environment(tmp_path), tmp_path, tmp_path / "slim", "org/slim")
    assert "Invalid metadata in README.md" in run.stderr and set(hub.files("org/slim")) == {".gitattributes"}
