"""What a checkpoint's name may be, and what is said of one that cannot be loaded, by every command alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from helpers import TINY, sentence_rows, tiny_bert, tiny_model, word_tokenizer
from hf_costeff.checkpoints import load_classifier, load_config, load_tokenizer, load_unfinished_classifier
from hf_costeff.cli import main


@pytest.fixture
def slim(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "slim")
    word_tokenizer().save_pretrained(tmp_path / "slim")
    return tmp_path / "slim"


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_whole_checkpoint_loads(slim):
    expected = tiny_model()
    assert load_config(str(slim)).to_dict() == load_classifier(str(slim)).config.to_dict()
    found = load_classifier(str(slim)).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())
    assert load_tokenizer(str(slim))("a good film")["input_ids"] == word_tokenizer()("a good film")["input_ids"]


COMMANDS = {
    "predict": "predict {name} --file {rows}",
    "calibrate": "calibrate {name} --validation_file {rows} --max_accuracy_drop 1 --output_dir {out}",
    "report": "report {name} --validation_file {rows} --output_dir {out}",
    "benchmark": "benchmark {name} --choose_exits --validation_file {rows} --output_dir {out}",
    "the benchmark's teacher": "benchmark {slim} --teacher {name} --validation_file {rows} --output_dir {out}",
    "export": "export {name} --output_dir {out}",
    "compress": "compress --teacher {name} --train_file {rows} --output_dir {out}",
    "the assistant's start": "compress --teacher {stock} --pretrained {name} --train_file {rows} --output_dir {out}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_or_a_misspelt_folder_is_one_clear_error_in_every_command(command, slim, tmp_path, capsys):
    sentence_rows(5).to_csv(tmp_path / "rows.csv")
    tiny_bert().save_pretrained(tmp_path / "stock")
    places = {"rows": tmp_path / "rows.csv", "out": tmp_path / "out", "slim": slim, "stock": tmp_path / "stock"}
    for name, words in (
        (slim / "config.json", [f"config.json' is a file. Give the folder it lies in: '{slim}'."]),
        (tmp_path / "slmi", ["slmi' (there is no local folder of that name; did you mean", "local folder with a con"]),
    ):
        assert main(COMMANDS[command].format(name=name, **places).split()) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"hf-costeff {COMMANDS[command].split()[0]}: ")
        assert [word for word in words if word not in error] == []
    assert not (tmp_path / "out").exists()


def test_only_a_model_folder_with_a_name_like_it_is_suggested(slim):
    (slim.parent / "slims").mkdir()  # holds no model
    with pytest.raises(ValueError, match=rf"did you mean '{slim}'\?"):
        load_config(str(slim.parent / "slimm"))
    for name in (slim.parent / "elsewhere", "org/nothing"):
        with pytest.raises(ValueError, match=r"\(there is no local folder of that name\) cannot be loaded: .*Hub id"):
            load_config(str(name))


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter, not a model\. Merge it into its model first"):
        load_config(str(tmp_path))


def test_a_damaged_checkpoint_is_told_so(slim, tmp_path):
    for name, damage, words in (
        ("no-config", lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        ("no-type", lambda folder: (folder / "config.json").write_text("{}"), "Give a Hub id, or a local folder"),
        ("no-weights", lambda folder: (folder / "model.safetensors").unlink(), "Save it again, or copy or download"),
        ("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"12345678{"), "Save it again, or copy"),
    ):
        shutil.copytree(slim, tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(ValueError, match=rf"The checkpoint '.*{name}' cannot be loaded: .*{words}"):
            load_classifier(str(tmp_path / name))


def test_a_tokenizer_that_is_missing_or_broken_is_told_so(slim):
    (slim / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"The tokenizer of '.*' cannot be loaded: .*tokenizer\.save_pretrained"):
        load_tokenizer(str(slim))
    for file in slim.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"The tokenizer of '.*' cannot be loaded: .*tokenizer\.save_pretrained"):
        load_tokenizer(str(slim))


def test_weights_that_do_not_fit_the_config_are_refused_by_name(slim):
    change_config(slim, intermediate_size=[10, 7, 0, 15])
    with pytest.raises(ValueError, match=r"layers\.3\.feed_forward\.intermediate\.bias is \(16,\), not \(15,\)"):
        load_classifier(str(slim))


def test_weights_that_were_never_saved_are_not_made_up(tmp_path):
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "max_position_embeddings")}
    bare = BertModel(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16))
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights .*: classifier\.bias, classifier\.weight\. Without them"):
        load_classifier(str(tmp_path))
    model, missing = load_unfinished_classifier(str(tmp_path), dtype=torch.bfloat16)
    assert missing == ["classifier.bias", "classifier.weight"] and model.dtype == torch.bfloat16


def test_a_long_list_of_weights_is_cut_short(slim):
    change_config(
        slim,
        num_hidden_layers=5,
        exit_layers=[1, 2, 3, 4, 5],
        num_attention_heads=[2, 0, 1, 3, 1],
        intermediate_size=[10, 7, 0, 16, 4],
    )
    with pytest.raises(ValueError, match=r"lacks weights .* and 11 more\. Without them its answers mean nothing"):
        load_classifier(str(slim))


@pytest.mark.parametrize("make", [tiny_bert, tiny_model])
def test_a_checkpoint_without_a_tokenizer_is_not_read_with_an_empty_one(make, tmp_path):
    make().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"The tokenizer of .* cannot be loaded: .*tokenizer.save_pretrained"):
        load_tokenizer(str(tmp_path / "model"))
