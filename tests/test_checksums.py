"""A folder is whole if every listed file is there and unchanged, and only once the list itself is complete."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from helpers import tiny_model
from hf_costeff.checksums import CHECKSUMS, fingerprint, fingerprint_of, is_whole, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    (tmp_path / "config.json").write_text("{}")
    write_checksums(tmp_path)
    return tmp_path


def test_the_list_holds_the_sha256_of_every_file_but_its_own(folder):
    recorded = json.loads((folder / CHECKSUMS).read_text())
    assert recorded == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("weights.bin", "config.json")
    }
    assert is_whole(folder)
    assert sorted(path.name for path in folder.iterdir()) == [CHECKSUMS, "config.json", "weights.bin"]


DAMAGES = {
    "truncated": lambda folder: (folder / "weights.bin").write_bytes(bytes(range(255))),
    "one bit": lambda folder: (folder / "weights.bin").write_bytes(bytes([1, *range(1, 256)])),
    "missing file": lambda folder: (folder / "config.json").unlink(),
    "missing list": lambda folder: (folder / CHECKSUMS).unlink(),
    "empty list": lambda folder: (folder / CHECKSUMS).write_text("{}"),
    "cut list": lambda folder: (folder / CHECKSUMS).write_text((folder / CHECKSUMS).read_text()[:-5]),
    "list of another kind": lambda folder: (folder / CHECKSUMS).write_text("[1]"),
    "binary list": lambda folder: (folder / CHECKSUMS).write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage, folder):
    DAMAGES[damage](folder)
    assert not is_whole(folder)


def test_a_list_that_was_being_written_does_not_count(folder):
    (folder / CHECKSUMS).rename(folder / f"{CHECKSUMS}.draft")
    assert not is_whole(folder)


def test_files_that_came_later_and_folders_do_not_matter(folder):
    (folder / "notes.txt").write_text("later")
    (folder / "inner").mkdir()
    assert is_whole(folder)
    write_checksums(folder)
    (folder / "notes.txt").write_text("changed")
    assert not is_whole(folder)


def test_an_empty_or_absent_folder_is_not_whole(tmp_path):
    (tmp_path / "empty").mkdir()
    write_checksums(tmp_path / "empty")
    assert not is_whole(tmp_path / "empty")
    assert not is_whole(tmp_path / "nowhere")


def test_a_fingerprint_tells_texts_and_their_order_apart():
    assert fingerprint(["a", "b"]) == fingerprint(iter(["a", "b"]))
    assert len({fingerprint(texts) for texts in (["a", "b"], ["b", "a"], ["a"], [], ["a", "B"])}) == 5


def test_a_models_fingerprint_changes_with_any_weight_but_those_left_out():
    model = tiny_model()
    before = fingerprint_of(model)
    assert fingerprint_of(tiny_model()) == before != fingerprint_of(tiny_model(seed=1))
    name = "costeff.exits.4.classifier.bias"
    without = fingerprint_of(model, without=[name])
    with torch.no_grad():
        dict(model.named_parameters())[name][0] += 1e-3
    assert fingerprint_of(model) != before
    assert fingerprint_of(model, without=[name]) == without
