"""Stages on disk: all or nothing, never mixed with another run, and damage is told with its remedy."""

from __future__ import annotations

import json
import shutil

import pytest

from hf_costeff.stages import StageStore, working_folder

SETTINGS = {"compression": 8.0, "seed": 42, "events": None, "layers": (1, 2)}


def save_weights(folder) -> None:
    (folder / "weights.bin").write_bytes(b"12345678")


class Killed(BaseException):
    """Stands for a process that ends here."""


def save_half(folder) -> None:
    (folder / "weights.bin").write_bytes(b"1234")
    raise Killed


@pytest.fixture
def store(tmp_path):
    return StageStore(tmp_path / "run", SETTINGS)


def test_a_finished_stage_keeps_its_files_and_record(store):
    store.finish("assistant", save_weights, {"steps": 3})
    assert store.is_finished("assistant") and not store.is_finished("prediction")
    assert store.record("assistant") == {"steps": 3}
    assert (store.files("assistant") / "weights.bin").read_bytes() == b"12345678"


def test_a_stage_that_was_interrupted_while_saving_is_not_finished_and_can_be_saved_again(store):
    with pytest.raises(Killed):
        store.finish("assistant", save_half, {"steps": 3})
    reopened = StageStore(store.output_dir, SETTINGS)
    assert not reopened.is_finished("assistant")
    with pytest.raises(ValueError, match="damaged"):
        reopened.files("assistant")
    reopened.finish("assistant", save_weights, {"steps": 3})
    assert (reopened.files("assistant") / "weights.bin").read_bytes() == b"12345678"
    assert sorted(path.name for path in reopened.folder.iterdir()) == ["assistant", "run.json"]


def test_a_complete_draft_that_was_not_renamed_yet_is_not_finished(store):
    store.finish("assistant", save_weights, {})
    (store.folder / "assistant").rename(store.folder / "assistant.draft")
    assert not store.is_finished("assistant")


def test_what_a_stage_works_on_survives_until_it_is_finished(store):
    checkpoint = working_folder(store.output_dir, "assistant") / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    with pytest.raises(Killed):
        store.finish("assistant", save_half, {})
    reopened = StageStore(store.output_dir, SETTINGS)
    assert checkpoint.is_dir()
    reopened.finish("assistant", save_weights, {})
    assert not checkpoint.exists()


def test_the_same_settings_go_on_with_the_finished_stages(store):
    store.finish("assistant", save_weights, {"steps": 3})
    reopened = StageStore(str(store.output_dir), dict(reversed(SETTINGS.items())))
    assert reopened.is_finished("assistant") and reopened.record("assistant") == {"steps": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"seed was 42, now 7"),
        ({"compression": 4.0, "seed": 7}, r"compression was 8\.0, now 4\.0, seed was 42, now 7"),
        ({"new": "x"}, r"new was None, now 'x'"),
    ],
)
def test_other_settings_are_refused_naming_what_differs(change, message, store):
    with pytest.raises(ValueError, match=message) as error:
        StageStore(store.output_dir, {**SETTINGS, **change})
    assert "holds the stages of another run" in str(error.value) and "Choose another `output_dir`" in str(error.value)
    assert StageStore(store.output_dir, SETTINGS)  # nothing was changed by the refusal


def test_what_changed_is_said_in_words_and_another_recipe_is_called_so(tmp_path):
    settings = {"seed": 42, "data_fingerprint": "a1"}
    StageStore(tmp_path / "run", settings)
    with pytest.raises(ValueError, match=r"another run \(the rows changed\)"):
        StageStore(tmp_path / "run", {**settings, "data_fingerprint": "b2"})
    with pytest.raises(ValueError, match=r"another run \(of another recipe\)"):
        StageStore(tmp_path / "run", {"ratio": 0.5, "data_fingerprint": "a1"})


@pytest.mark.parametrize("name", ["config.json", "stages/notes.txt", "a/b/c"])
def test_a_folder_with_other_files_is_refused_and_left_alone(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run to go on with"):
        StageStore(tmp_path, SETTINGS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_an_empty_folder_or_one_to_be_made_is_fine(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        store = StageStore(folder, SETTINGS)
        assert json.loads((store.folder / "run.json").read_text())["layers"] == [1, 2]
        shutil.rmtree(store.folder)


@pytest.mark.parametrize("left", [[], ["run.draft"]])
def test_a_run_killed_before_it_wrote_its_settings_starts_anew(left, tmp_path):
    (tmp_path / "stages").mkdir()
    for name in left:
        (tmp_path / "stages" / name).write_text('{"compre')
    StageStore(tmp_path, SETTINGS)
    assert json.loads((tmp_path / "stages" / "run.json").read_text())["seed"] == 42


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights.bin").write_bytes(b"1234"),
        lambda folder: (folder / "weights.bin").unlink(),
        lambda folder: (folder / "stage.json").write_text('{"steps": 4}'),
        lambda folder: (folder / "checksums.json").unlink(),
    ],
)
def test_a_damaged_stage_is_refused_with_the_remedy_and_the_remedy_works(damage, store):
    store.finish("teacher", save_weights, {})
    store.finish("assistant", save_weights, {})
    damage(store.folder / "assistant")
    with pytest.raises(ValueError, match=r"assistant is damaged.*Delete this folder .*run the same command again"):
        store.files("assistant")
    shutil.rmtree(store.folder / "assistant")
    reopened = StageStore(store.output_dir, SETTINGS)
    assert reopened.is_finished("teacher") and not reopened.is_finished("assistant")
    reopened.finish("assistant", save_weights, {})
    assert reopened.files("assistant")
