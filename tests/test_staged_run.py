"""What all recipes share, with stages that write one file each."""

from __future__ import annotations

import pytest
import torch

import hf_costeff.staged_run
from helpers import sentence_rows, tiny_bert, word_tokenizer
from hf_costeff.data import prepare_data
from hf_costeff.evaluation import row_keys
from hf_costeff.staged_run import Stage, StagedRun
from hf_costeff.stages import train_keys


def new_run(folder, metric=None, number_labels=False, seed=7):
    rows = sentence_rows(60)
    if number_labels:
        rows = rows.map(lambda row: {"label": row["label"] + 0.25})
    run, tokenizer = StagedRun(str(folder), seed=seed), word_tokenizer()
    run._take_rows(prepare_data(rows, tokenizer, max_positions=32), tokenizer, metric)
    return run


def writing(name, done, draws):
    """A stage that notes its name and the first random number it drew."""

    def run():
        done.append(name)
        draws.append(torch.rand(1).item())
        return (lambda folder: (folder / "text").write_text(name)), {"name": name}

    return Stage(name, run)


def test_stages_run_once_in_order_each_from_the_same_seed(tmp_path, monkeypatch):
    done, draws, said = [], [], []
    run = new_run(tmp_path / "run")
    run._go_through([writing("one", done, draws)], {"a": 1})
    monkeypatch.setattr(hf_costeff.staged_run.logger, "warning", said.append)
    again = new_run(tmp_path / "run")
    again._go_through([writing(name, done, draws) for name in ("one", "two", "three")], {"a": 1})
    assert done == ["one", "two", "three"] and len(set(draws)) == 1
    assert said == [f"Going on in {tmp_path / 'run'}; done before: one."]
    assert [again.store.files(name).joinpath("text").read_text() for name in done] == done
    assert again.store.record("two")["name"] == "two" and again.store.record("two")["seconds"] >= 0
    assert train_keys(tmp_path / "run") == set(row_keys(again.data.train, ["input_ids"]))
    with pytest.raises(ValueError, match="a was 1, now 2"):
        new_run(tmp_path / "run")._go_through([], {"a": 2})


def test_a_run_without_stages_was_trained_on_nothing(tmp_path):
    new_run(tmp_path)._go_through([], {})
    assert train_keys(tmp_path) is None


def test_the_model_of_a_stage_comes_back_as_it_was_saved(tmp_path):
    model = tiny_bert(num_labels=2)
    run = new_run(tmp_path)
    run._go_through([Stage.of_model("model", lambda: (model, {"steps": 3}))], {})
    found = run._load("model")
    assert run.store.record("model")["steps"] == 3 and next(found.parameters()).device.type == run.device.type
    assert all(torch.equal(tensor, found.state_dict()[name].cpu()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("metric", "number_labels", "error"), [("mse", True, "falls as models improve"), ("spearman", False, "spearman")]
)
def test_a_metric_that_cannot_choose_is_refused(tmp_path, metric, number_labels, error):
    with pytest.raises(ValueError, match=error):
        new_run(tmp_path, metric, number_labels)
    assert not any(tmp_path.iterdir())


def test_the_metric_is_by_default_that_of_the_problem(tmp_path):
    assert (new_run(tmp_path).metric, new_run(tmp_path, number_labels=True).metric) == ("accuracy", "spearman")


@pytest.mark.parametrize(("precision", "bf16"), [("fp32", False), ("bf16", True)])
def test_a_precision_that_is_named_is_taken(tmp_path, precision, bf16):
    assert StagedRun(str(tmp_path), 0, precision).bf16 is bf16
