"""What gates do on rows, counted by hand, in words, in a chart and on the report's page."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny_config
from hf_costeff.charts import draw_skip_chart
from hf_costeff.exit_criteria import ExitConfig
from hf_costeff.exit_replay import ExitLogits, ExitReplay
from hf_costeff.exit_report import write_exit_report
from hf_costeff.skip_diagnostics import diagnose_skipping

COSTS = [4 * cost / 8088 for cost in (2672, 168, 1216, 4032)]
"""Multiplications per token in each layer of the tiny model over their mean: matrices, and attention over 128."""
SKIPPED = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]


def config(**changes):
    names = {0: "dull", 1: "bright", 2: "odd"}
    exits = {"criterion": "entropy", "threshold": 0.5}
    return tiny_config(skip_gates="linear", id2label=names, exit_config=exits, **changes)


def records(skipped=SKIPPED, labels=(0, 0, 1, 1, 1)) -> ExitLogits:
    rows = len(skipped)
    logits = torch.randn(rows, 4, 3, generator=torch.Generator().manual_seed(0))
    known = None if labels is None else torch.tensor(labels[:rows])
    return ExitLogits(logits, torch.arange(3, 3 + rows), known, skipped=torch.tensor(skipped).bool())


def test_layers_classes_and_paths_are_counted():
    found = diagnose_skipping(records(), config())
    assert found.shares == pytest.approx([1 / 5, 4 / 5, 1 / 5, 1 / 5]) and found.layers_run == pytest.approx(13 / 5)
    assert set(found.class_shares) == {"dull", "bright"}  # no row is odd
    assert found.class_shares["dull"] == pytest.approx([0, 1 / 2, 0, 0])
    assert found.class_shares["bright"] == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])
    assert next(iter(found.paths.items())) == ("1 3 4", 3 / 5) and found.paths["1 2 3 4"] == found.paths[""] == 1 / 5
    assert found.layers_run_by_flops == pytest.approx(sum(0.8 * cost for cost in COSTS) - 0.6 * COSTS[1])
    assert (
        "2.60 of 4 layers on average, 3.15 counted by their FLOPs" in found.describe()
        and "3 different paths; 60%" in found.describe()
    )


def test_layers_run_are_those_not_skipped_before_the_answer():
    replay = ExitReplay(records(), config())
    assert replay.full_depth.mean_layers_run == pytest.approx(13 / 5)
    leaving = replay.at(ExitConfig("entropy", threshold=0.9))
    layers = leaving.exit_layer.tolist()
    assert min(layers) < 4
    run = [depth - sum(row[:depth]) for row, depth in zip(SKIPPED, layers, strict=True)]
    assert leaving.mean_layers_run == pytest.approx(sum(run) / 5) and leaving.mean_layers_run < leaving.mean_exit_layer


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0, 1, 0, 1], "same path, layers 1 3: the gates are static"),
        ([0] * 4, "No row skips"),
        ([1] * 4, "Lower `skip"),
    ],
)
def test_gates_that_do_not_look_at_the_row_are_said_to(row, said):
    assert said in diagnose_skipping(records([row] * 3), config()).describe()


def test_without_gates_there_is_nothing_and_without_classes_no_classes():
    plain = records()
    assert diagnose_skipping(ExitLogits(plain.logits, plain.seq_lengths, plain.labels), tiny_config()) is None
    assert diagnose_skipping(records(labels=None), config()).class_shares == {}
    several = config(problem_type="multi_label_classification")
    assert diagnose_skipping(records(), several).class_shares == {}


def test_the_chart_is_drawn_and_the_report_of_a_gated_model_has_it(tmp_path):
    assert draw_skip_chart(tmp_path / "skips.png", diagnose_skipping(records(), config()))
    assert (tmp_path / "skips.png").stat().st_size > 5000
    page = write_exit_report(records(), config(), "accuracy", tmp_path / "page", markdown=True)
    text = page.read_text()
    assert "## Layers skipped" in text and "| 1 3 4 | 60.0% |" in text and "| bright | 33% | 100% | 33% | 33% |" in text
    assert (tmp_path / "page" / "skipping.png").exists()
    plain = records()
    whole = ExitLogits(plain.logits, plain.seq_lengths, plain.labels)
    ungated = tiny_config(exit_config={"criterion": "entropy", "threshold": 0.5})
    assert (
        "Layers skipped"
        not in write_exit_report(whole, ungated, "accuracy", tmp_path / "no", markdown=True).read_text()
    )
