"""What exits take on the clock, and which of them pay; on models too small for times to mean anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import tiny_model, token_rows, word_tokenizer
from hf_costeff import ExitConfig, exit_times
from hf_costeff.benchmarking import BenchmarkGrid
from hf_costeff.data import make_collator
from hf_costeff.efficiency import Latency
from hf_costeff.exit_criteria import MULTI_LABEL, REGRESSION, SINGLE_LABEL, simulate_exits
from hf_costeff.exit_replay import ExitTimes
from hf_costeff.exit_times import choose_exits, measure_exit_times
from hf_costeff.exiting_rows import ExitPlan

SMALL = BenchmarkGrid(batch_sizes=[1, 4], rows=8, rounds=2)
COLLATOR = make_collator(word_tokenizer())


# --- what is measured


@pytest.mark.parametrize("kind", [{}, {"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_all_rows_leave_at_each_exit_in_turn_and_at_none_with_every_exit_asked(kind, monkeypatch):
    model, layers, stops = tiny_model(seed=3, **kind), [], []
    predict = model.predict

    def watched(early_exit: Any, **batch: Any) -> Any:
        found = predict(early_exit=early_exit, **batch)
        layers.append(set(found.exit_layer.tolist()))
        stops.append(early_exit if early_exit is False else early_exit.checked_exits)
        return found

    monkeypatch.setattr(model, "predict", watched)
    measure_exit_times(model, token_rows(8), COLLATOR, batch_size=4, rows=4, rounds=1)
    assert layers[:5] == layers[5:] == [{1}, {2}, {3}, {4}, {4}]  # warm-up, then the timed round
    assert stops[:5] == [[1], [2], [3], False, None]


@pytest.mark.parametrize("gap", [1.0, 30.0, 60.0])
@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
def test_where_nobody_is_to_leave_every_exit_is_asked_and_nobody_is_sure_enough(problem_type, gap):
    regression = problem_type == REGRESSION
    values = [[[gap], [gap + 1e-5 * gap], [gap], [0.0]]] if regression else [[[gap, -gap / 3]] * 4]
    logits, settings = torch.tensor(values), exit_times._nobody_leaves(regression)
    plan = ExitPlan.make(settings, [1, 2, 3, 4], problem_type)
    assert plan.stops == [1, 2, 3, 4]
    assert simulate_exits(logits, settings, [1, 2, 3, 4], problem_type).tolist() == [3]
    for seen in (1, 2, 3):
        evidence = plan.evidence(logits[:, :seen], seen)
        assert evidence is not None and plan.passes(evidence.tolist(), seen) == [False]


def test_times_are_per_text_and_say_what_they_were_measured_under(monkeypatch):
    medians = {"1": 8.0, "2": 20.0, "3": 16.0, "full depth": 32.0, "every exit asked": 44.0}

    def measured(runs: dict[str, Any], **options: Any) -> dict[str, Latency]:
        assert list(runs) == list(medians) and torch.get_num_threads() == 2
        return {name: Latency(median, median, 1) for name, median in medians.items()}

    monkeypatch.setattr(exit_times, "measure_alternating", measured)
    found = measure_exit_times(tiny_model(), token_rows(9), COLLATOR, batch_size=2, threads=2, rows=4)
    assert found.leaving_ms == [2.0, 5.0, 5.0, 8.0]  # four texts; that layer 3 looks faster than 2 is noise
    assert found.question_ms == pytest.approx((44 - 32) / 4 / 3)
    assert (found.batch_size, found.threads, found.precision) == (2, 2, "float32")
    assert found.hardware["torch"] == torch.__version__ and "threads" not in found.hardware


def test_the_clock_really_runs():
    found = measure_exit_times(tiny_model(seed=3), token_rows(6), COLLATOR, rows=3, rounds=2)
    assert len(found.leaving_ms) == 4 and found.leaving_ms[0] > 0 and found.question_ms >= 0


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"threads": 0}, {"rows": 0}, {"rounds": 0}])
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="It must be at least 1"):
        measure_exit_times(tiny_model(), token_rows(4), COLLATOR, **wrong)


def test_without_rows_there_is_nothing_to_time():
    with pytest.raises(ValueError, match="There are no rows to time"):
        measure_exit_times(tiny_model(), token_rows(4).select([]), COLLATOR)


# --- which exits pay


def chosen(monkeypatch, question_ms: float, **settings: Any) -> tuple[Any, ExitConfig]:
    leaving = [1 + question_ms, 2 + question_ms, 3 + question_ms, 4.0]
    times = ExitTimes(leaving, question_ms, batch_size=1, threads=1, precision="float32", hardware={})
    monkeypatch.setattr(exit_times, "measure_exit_times", lambda *anything, **more: times)
    model = tiny_model(seed=3, exit_config={"threshold": 0.5, **settings})
    return model, choose_exits(model, token_rows(60), COLLATOR, SMALL)


def test_exits_that_cost_nothing_are_all_kept(monkeypatch):
    assert chosen(monkeypatch, 0.0)[1].checked_exits == [1, 2, 3]


def test_exits_that_cost_more_than_the_model_are_all_left_out(monkeypatch):
    model, kept = chosen(monkeypatch, 100.0, calibration={"rows": 5}, temperatures=2.0)
    assert kept == ExitConfig(threshold=0.5, checked_exits=[], temperatures=2.0)
    assert model.config.exit_config == kept.to_dict()


@pytest.mark.parametrize("question_ms", [0.1, 0.5, 1.5])
def test_no_single_exit_more_or_less_would_be_faster(monkeypatch, question_ms):
    model, kept = chosen(monkeypatch, question_ms)
    rows = token_rows(60)

    def cost(checked: list[int]) -> float:
        """By predicting row by row and adding up."""
        settings, total = ExitConfig(threshold=0.5, checked_exits=checked), 0.0
        for row in rows:
            layer = int(model.predict(torch.tensor([row["input_ids"]]), early_exit=settings).exit_layer)
            total += layer + question_ms * sum(exit <= layer for exit in checked)
        return total / len(rows)

    best = cost(kept.checked_exits)
    for left_out in kept.checked_exits:
        assert cost([layer for layer in kept.checked_exits if layer != left_out]) > best - 1e-9
    assert best <= cost([1, 2, 3]) + 1e-9


def test_only_exits_that_were_checked_before_are_kept(monkeypatch):
    assert set(chosen(monkeypatch, 0.0, checked_exits=[2])[1].checked_exits) <= {2}


def test_the_exits_of_a_real_clock_are_some_of_those_that_were_checked():
    model = tiny_model(seed=3, exit_config=ExitConfig(threshold=0.5).to_dict())
    assert set(choose_exits(model, token_rows(8), COLLATOR, SMALL).checked_exits) <= {1, 2, 3}


def test_exits_cannot_be_chosen_before_a_threshold():
    with pytest.raises(ValueError, match="no exit settings"):
        choose_exits(tiny_model(), token_rows(4), COLLATOR, SMALL)


def test_exits_are_not_chosen_by_times_of_an_export():
    grid = BenchmarkGrid(precisions=["int8", "float32"])
    with pytest.raises(ValueError, match="`precisions` begins with int8"):
        choose_exits(tiny_model(), token_rows(4), COLLATOR, grid)
