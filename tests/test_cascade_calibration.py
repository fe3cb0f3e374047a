"""Thresholds of a cascade are chosen by the same calibration as exits, on what its members cost."""

from __future__ import annotations

import logging
from contextlib import suppress
from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from helpers import tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff import CostEffCascade, CostEffCascadeConfig, ExitConfig, calibrate, evaluation
from hf_costeff.calibration import ExitSearch, choose_exit_config
from hf_costeff.cascade_costs import cascade_flops
from hf_costeff.data import make_collator
from hf_costeff.evaluation import collect_member_logits, row_keys
from hf_costeff.exit_replay import ExitLogits, ExitReplay, ExitTimes
from hf_costeff.promises import logger

INNER = ExitConfig(threshold=0.6).to_dict()
COLLATOR = make_collator(word_tokenizer())


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Labels are mostly the last member's answers, so that it is worth asking."""
    dataset, last = token_rows(240, longest=12), members()[-1]
    with torch.no_grad():
        answers = [int(last(torch.tensor([ids])).logits.argmax()) for ids in dataset["input_ids"]]
    generator = np.random.default_rng(0)
    labels = [int(generator.integers(3)) if generator.random() < 0.1 else answer for answer in answers]
    return dataset.remove_columns("labels").add_column("labels", labels)


def members() -> list:
    return [tiny_bert(seed=2, num_hidden_layers=1), tiny_model(seed=6, exit_config=INNER), tiny_bert(seed=5)]


@pytest.fixture
def cascade() -> CostEffCascade:
    return CostEffCascade.from_members(members())


def predicted(cascade, rows, settings):
    """`predict` on all rows, and their mean FLOPs, counted from what was run."""
    batch = COLLATOR([{k: v for k, v in row.items() if k != "labels"} for row in rows])
    prediction = cascade.predict(**{name: batch[name] for name in ("input_ids", "attention_mask")}, early_exit=settings)
    lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
    return prediction, float(cascade_flops(cascade.config, prediction.layers_run, lengths).mean())


@pytest.mark.parametrize(
    "settings",
    [
        ExitConfig(threshold=0.8),
        ExitConfig("confidence", threshold=[0.2, 0.3, 0.0], temperatures=[2.0, 0.5, 1.0]),
        ExitConfig(threshold=[0.0, 0.6, 0.0]),
        ExitConfig(threshold=0.8, checked_exits=[2]),
        ExitConfig("patience", patience=1),
        ExitConfig(threshold=0.0),
        None,
    ],
)
def test_a_replay_says_what_predict_does_and_costs(cascade, rows, settings):
    replay = ExitReplay(collect_member_logits(cascade, rows, COLLATOR, show_progress=False), cascade.config)
    found = replay.at(settings)
    prediction, flops = predicted(cascade, rows, False if settings is None else settings)
    assert (found.exit_index + 1).tolist() == prediction.exit_model.tolist()
    if settings is not None:  # full depth leaves the last member's own exits out
        torch.testing.assert_close(found.logits, prediction.logits, rtol=0, atol=1e-5)
        assert found.mean_flops == pytest.approx(flops, rel=1e-9)


@pytest.mark.parametrize("target", [1.2, 1.6])
def test_a_speedup_is_reached_and_kept_by_predict(cascade, rows, target):
    settings = calibrate(cascade, rows, COLLATOR, target_speedup=target, show_progress=False)
    _, flops = predicted(cascade, rows, True)
    _, whole = predicted(cascade, rows, False)
    assert whole / flops >= target and settings.to_dict() == cascade.config.exit_config
    assert settings.calibration["speedup_over_full_depth"] == pytest.approx(whole / flops, rel=1e-6)


def test_a_budget_is_kept_and_stands_in_the_record(cascade, rows):
    """FLOPs are torch's own count of `predict`, row by row."""
    _, whole = predicted(cascade, rows, False)
    settings = calibrate(cascade, rows, COLLATOR, max_megaflops=0.7e-6 * whole, show_progress=False)
    with FlopCounterMode(display=False) as counter:
        for row in rows:
            cascade.predict(torch.tensor([row["input_ids"]]), early_exit=True)
    assert 0.4 * whole < counter.get_total_flops() / len(rows) <= 0.7 * whole * (1 + 1e-9)
    assert settings.calibration["goal"] == {"max_megaflops": 0.7e-6 * whole}
    with pytest.raises(
        ValueError, match=r"mean of 0\.0001 million FLOPs cannot be reached: .* it is 0\.0\d+ million\. Ask"
    ):
        calibrate(cascade, rows, COLLATOR, max_megaflops=0.0001, show_progress=False)


def test_a_largest_loss_is_kept_on_the_rows(cascade, rows):
    calibrate(cascade, rows, COLLATOR, max_accuracy_drop=2, show_progress=False)
    labels = torch.tensor(rows["labels"])
    accuracy = [
        float((predicted(cascade, rows, early_exit)[0].logits.argmax(-1) == labels).double().mean())
        for early_exit in (False, True)
    ]
    assert accuracy[0] - accuracy[1] <= 0.02 + 1e-9


def test_members_that_cost_more_than_they_save_are_not_asked(rows):
    """A second copy of the last member that must not differ from it once: asking it first can only cost."""
    cascade = CostEffCascade.from_members([tiny_bert(seed=4), tiny_bert(seed=5)])
    settings = calibrate(cascade, rows, COLLATOR, max_disagreement=0.5, show_progress=False)
    assert settings.calibration["speedup_over_full_depth"] >= 1
    assert predicted(cascade, rows, True)[0].layers_run[:, 0].sum() == 0


def test_settings_that_are_dearer_all_the_same_come_with_a_warning(cascade, rows, caplog, monkeypatch):
    """As a guarantee may choose them, whose path is laid on other rows than it is tested on."""
    for speedup, warned in ((1.0, False), (0.8, True)):
        chosen = ExitConfig(threshold=0.1, calibration={"speedup_over_full_depth": speedup})
        monkeypatch.setattr(evaluation, "choose_exit_config", lambda *_, chosen=chosen, **__: chosen)
        with caplog.at_level(logging.WARNING, logger="hf_costeff"):
            calibrate(cascade, rows, COLLATOR, max_disagreement=1, show_progress=False)
        assert ("1.25 times the FLOPs of its last member" in caplog.text) == warned


def test_a_promise_holds_the_weights_of_all_members(cascade, rows, caplog):
    cascade = CostEffCascade.from_members([tiny_bert(seed=5, num_hidden_layers=4), cascade.members[2]])
    settings = calibrate(cascade, rows, COLLATOR, max_disagreement=10, guarantee=True, show_progress=False)
    promise = settings.calibration["promise"]
    assert promise["rows"] == 160 and promise["flips"] == 0
    with caplog.at_level(logging.WARNING):
        predicted(cascade, rows, True)
        assert "promise is void" not in caplog.text
        with torch.no_grad():
            cascade.members[0].classifier.bias += 1
        predicted(cascade, rows, True)
        assert "promise is void" in caplog.text


def bolder_inside(cascade):
    cascade.members[0].config.exit_config = ExitConfig(threshold=1.0).to_dict()


def other_labels(cascade):
    cascade.members[0].config.id2label = {0: "c", 1: "b", 2: "a"}


def recalibrated_to_the_same(cascade):
    cascade.members[0].config.exit_config["calibration"] = {"rows": 9}


@pytest.mark.parametrize(
    ("change", "void"), [(bolder_inside, True), (other_labels, True), (recalibrated_to_the_same, False)]
)
def test_a_promise_holds_the_settings_of_all_members_and_their_order_of_labels(rows, change, void, caplog, tmp_path):
    logger.warning_once.cache_clear()
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    inner = tiny_model(seed=6, exit_config=INNER, **names)
    cascade = CostEffCascade.from_members([inner, tiny_bert(seed=5, num_hidden_layers=8, **names)])
    kept = {"show_progress": False, "guarantee": True, "max_disagreement": 99.0}
    settings = calibrate(cascade, rows, COLLATOR, **kept)
    assert "promise" in settings.calibration
    cascade.save_pretrained(tmp_path)
    cascade = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        predicted(cascade, rows, True)
        assert "promise is void" not in caplog.text
        change(cascade)
        predicted(cascade, rows, True)
        assert ("settings of the members. The promise is void. Run `hf-costeff cascade cal" in caplog.text) == void


def test_members_with_other_tokenizers_take_a_data_set_each(cascade, rows):
    both = collect_member_logits(cascade, [rows] * 3, [COLLATOR] * 3, show_progress=False)
    one = collect_member_logits(cascade, rows, COLLATOR, show_progress=False)
    assert torch.equal(both.logits, one.logits) and torch.equal(both.member_flops, one.member_flops)
    shorter = rows.map(lambda row: {"input_ids": row["input_ids"][:2], "attention_mask": [1, 1]})
    mixed = collect_member_logits(cascade, [shorter, rows, rows], COLLATOR, show_progress=False)
    assert not torch.equal(mixed.logits[:, 0], one.logits[:, 0]) and torch.equal(mixed.logits[:, 1:], one.logits[:, 1:])
    assert float(mixed.member_flops[:, 0].std()) == 0
    settings = calibrate(cascade, [rows] * 3, COLLATOR, max_disagreement=20, guarantee=True, show_progress=False)
    assert "promise" in settings.calibration or "no_promise" in settings.calibration


def test_data_sets_that_do_not_fit_are_refused(cascade, rows):
    for datasets in ([rows] * 2, [rows, rows, rows.select(range(9))]):
        with pytest.raises(ValueError, match="one per member"):
            calibrate(cascade, datasets, COLLATOR, target_speedup=2, show_progress=False)
    with pytest.raises(ValueError, match="2 collators for a single model"):
        calibrate(tiny_model(), rows, [COLLATOR] * 2, target_speedup=2, show_progress=False)
    with pytest.raises(ValueError, match="has no exits to calibrate"):
        calibrate(tiny_bert(), rows, COLLATOR, target_speedup=2, show_progress=False)


def test_a_time_is_refused_because_members_have_none(cascade, rows):
    with pytest.raises(ValueError, match=r"`max_latency_ms` is given for a cascade.*`target_speedup`"):
        calibrate(cascade, rows, COLLATOR, max_latency_ms=5, show_progress=False)
    times = ExitTimes([1.0, 2.0, 3.0], 0.1, batch_size=1, threads=1, precision="float32", hardware={})
    for goal in ({"max_latency_ms": 5}, {"target_speedup": 2}):
        with pytest.raises(ValueError, match="`exit_times` is given for a cascade"):
            calibrate(cascade, rows, COLLATOR, exit_times=times, show_progress=False, **goal)


def test_rows_that_the_last_member_may_have_seen_come_with_a_warning(cascade, rows, caplog):
    """Each member reads the rows with a tokenizer of its own; the keys are of the last one's."""
    shorter = rows.map(lambda row: {"input_ids": row["input_ids"][:1], "attention_mask": [1]})
    for trained, warned in ((row_keys(shorter, ["input_ids"]), False), (row_keys(rows, ["input_ids"])[:9], True)):
        with caplog.at_level(logging.WARNING, logger="hf_costeff"):
            calibrate(
                cascade, [shorter, rows, rows], COLLATOR, max_disagreement=9, trained_keys=trained, show_progress=False
            )
        assert ("of 240 calibration rows have texts that the model was trained on" in caplog.text) == warned


def with_an_idle_middle(members: int, rows: int = 400, seed: int = 0) -> ExitLogits:
    """The first member is right where it is sure; the middle ones know no more than it, and the last everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    sign = 2.0 * labels - 1
    sureness = 4 * torch.rand(rows, generator=generator)
    first = torch.where((sureness < 1.8) & (torch.rand(rows, generator=generator) < 0.5), -sign, sign) * sureness
    middle = [first + 0.3 * torch.randn(rows, generator=generator) for _ in range(members - 2)]
    values = torch.stack([first, *middle, 8 * sign], dim=1)
    costs = torch.tensor([1.0, *[6.0] * (members - 2), 12.0]).expand(rows, -1)
    return ExitLogits(torch.stack([-values, values], -1), torch.full((rows,), 5), labels, member_flops=costs)


def config_of(members: int) -> CostEffCascadeConfig:
    return CostEffCascadeConfig(members=[tiny_bert(num_labels=2).config] * members)


@pytest.mark.parametrize("goal", [{"target_speedup": 2.0}, {"max_accuracy_drop": 1.0}])
@pytest.mark.parametrize("members", [3, 4])
def test_a_middle_member_that_knows_no_more_than_the_first_is_left_out(members, goal):
    """As good, and as cheap, as the best of all choices of members tried one by one."""
    records, config = with_an_idle_middle(members), config_of(members)
    early = range(1, members)
    tried = {}
    for chosen in (list(own) for size in early for own in combinations(early, size)):
        search = ExitSearch(checked_exits=chosen)
        with suppress(ValueError):  # out of reach
            tried[tuple(chosen)] = choose_exit_config(records, config, "accuracy", search=search, **goal).calibration
    assert max(
        tried, key=lambda own: tried[own]["early_exit" if "target_speedup" in goal else "speedup_over_full_depth"]
    ) == (1,)
    settings = choose_exit_config(records, config, "accuracy", **goal)
    assert settings.checked_exits == [1] and settings.calibration == tried[1,]


def test_of_many_members_only_the_first_ones_are_left_out():
    counts = {
        members: {
            goal: len(ExitSearch().paths(ExitReplay(with_an_idle_middle(members), config_of(members)), goal))
            for goal in ("max_accuracy_drop", "target_speedup")
        }
        for members in (2, 3, 5, 6)
    }
    assert counts == {
        2: {"max_accuracy_drop": 1, "target_speedup": 1},
        3: {"max_accuracy_drop": 3, "target_speedup": 4},
        5: {"max_accuracy_drop": 15, "target_speedup": 26},
        6: {"max_accuracy_drop": 5, "target_speedup": 15},
    }


def test_a_speedup_beyond_the_first_member_is_refused(cascade, rows):
    with pytest.raises(ValueError, match="cannot be reached"):
        calibrate(cascade, rows, COLLATOR, target_speedup=50, show_progress=False)
