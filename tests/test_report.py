"""What a run writes at its end: the figures as JSON, plain words with the right numbers, and a chart."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import struct
import sys

import pytest
import torch

from hf_costeff.charts import draw_pareto_chart
from hf_costeff.compression_args import CompressionPlan
from hf_costeff.evaluation import ReportRow
from hf_costeff.exit_replay import ExitOutcome
from hf_costeff.report import (
    CompressionResult,
    describe_hardware,
    drop_exit_figures,
    summarize,
    without_folders,
    write_report,
)
from hf_costeff.slenderization import Widths, describe_widths

WIDTHS = Widths((2, 2), (8, 16), 4)
CURVE = [ExitOutcome(0.9, 2.0, 3e5, 1.0), ExitOutcome(0.8, 1.0, 1e5, 3.0)]
FACTS = {
    "widths": describe_widths(WIDTHS),
    "exit_config": {"criterion": "entropy", "threshold": 0.3, "calibration": {"rows": 1200}},
    "data": {"rows": {"train": 5000, "calibration": 1200, "validation": 2345}},
    "settings": {"seed": 42},
    "stages": {"assistant": {"steps": 3}},
    "hardware": {"cpu": "a processor", "threads": 2, "accelerator": None, "torch": "2"},
}


def line(name: str, metric: float, parameters: int, flops: float, layer: float, shares: list[float]) -> ReportRow:
    ms = {"32": flops / 1e5, "1": flops / 2e4}
    return ReportRow(name, {"accuracy": metric}, parameters, flops, 10 * flops, layer, shares, ms)


ROWS = [
    line("teacher", 0.9, 8_000_000, 2e6, 2.0, [1.0]),
    line("assistant", 0.91, 7_900_000, 2e6, 2.0, [0.0, 1.0]),
    line("slim, full depth", 0.88, 1_000_000, 4e5, 2.0, [0.0, 1.0]),
    line("slim, early exit", 0.87, 1_000_000, 1e5, 1.25, [0.75, 0.25]),
]


@pytest.fixture
def result(tmp_path) -> CompressionResult:
    plan = CompressionPlan(WIDTHS, 1_000_000, 8_000_000, 400_000, 2_000_000, 4_000_000)
    return CompressionResult(tmp_path, plan, ROWS, "accuracy")


def test_the_summary_tells_the_figures_in_plain_words(result):
    text = " ".join(summarize(result, FACTS).split())
    for words in (
        "The slim model has 1,000,000 parameters, 8.0 times fewer than the teacher's 8,000,000.",
        "On 2,345 validation rows its accuracy is 0.8800 at full depth and 0.8700 with early exit; the teacher's is",
        "runs 1.25 layers on average and takes 20.0 times fewer FLOPs than the teacher at the texts' real lengths",
        "(a processor, 2 threads",
        "that was 20.0 times faster at batch 32",
        "20.0 times faster one text at a time",
        "shallow to deep (2 exits): 75%, 25%.",
        "chosen on 1,200 rows that no stage trained on",
        "| slim, early exit | 0.8700 | 96.7% |",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([1.0, 0.0], "100%, 0%. Every row left at the first exit, so no deeper layer answered."),
        ([0.0, 1.0], "0%, 100%. No row left early."),
        ([0.99, 0.01], "99%, 1%. |"),
        ([1.0], "100%. |"),
    ],
)
def test_the_summary_says_so_if_all_rows_leave_at_the_same_exit(shares, words, result):
    rows = [*ROWS[:3], dataclasses.replace(ROWS[3], exit_shares=shares)]
    text = " ".join(summarize(dataclasses.replace(result, rows=rows), FACTS).split())
    assert f"exits): {words}" in text


def test_everything_is_written_beside_the_model_and_readable_again(result):
    write_report(result, CURVE, FACTS)
    report = json.loads((result.model_path / "efficiency.json").read_text())
    assert report["metric"] == "accuracy"
    assert [row["name"] for row in report["rows"]] == [row.name for row in ROWS]
    assert report["rows"][3]["exit_shares"] == [0.75, 0.25]
    assert report["curve"][1] == {"metric": 0.8, "mean_exit_layer": 1.0, "flops_per_row": 1e5, "speedup": 3.0}
    assert report["plan"]["widths"] == {"num_attention_heads": 2, "intermediate_size": [8, 16], "embedding_rank": 4}
    assert report["plan"]["teacher_parameters"] == 8_000_000
    assert {name: report[name] for name in FACTS if name != "widths"} == {
        name: fact for name, fact in FACTS.items() if name != "widths"
    }
    assert (result.model_path / "SUMMARY.md").read_text() == summarize(result, FACTS)
    assert result.table() in (result.model_path / "SUMMARY.md").read_text()


def test_the_hardware_is_told_without_names_of_host_user_or_folders():
    facts = describe_hardware(torch.device("cpu"))
    assert set(facts) == {"cpu", "threads", "accelerator", "torch"}
    assert facts["accelerator"] is None and facts["threads"] == torch.get_num_threads()
    told = json.dumps(facts)
    assert platform.node() not in told and os.getcwd() not in told


def test_the_chart_is_a_png(result):
    pytest.importorskip("matplotlib")
    path = result.model_path / "chart.png"
    assert draw_pareto_chart(path, ROWS, CURVE, "accuracy") is True
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600 and height > 400


def test_without_matplotlib_the_chart_is_left_out_with_one_message_and_the_rest_is_written(result, monkeypatch):
    messages: list[str] = []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("hf_costeff.charts.logger.warning", messages.append)
    write_report(result, CURVE, FACTS)
    assert sorted(path.name for path in result.model_path.iterdir()) == ["SUMMARY.md", "efficiency.json"]
    assert len(messages) == 1 and "`pip install matplotlib`" in messages[0]


def test_a_folder_that_is_there_is_told_by_its_last_name_however_it_was_written(tmp_path, monkeypatch):
    (tmp_path / "me" / "bert").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert without_folders("../me/bert") == "./bert" == without_folders(str(tmp_path / "me" / "bert"))
    assert without_folders("me/bert") == "me/bert"  # nothing there: a name on the Hub
    assert without_folders("bert") == "bert" and without_folders(None) is None


def test_a_damaged_report_is_told_so_and_left(tmp_path):
    (tmp_path / "efficiency.json").write_text("{")
    (tmp_path / "SUMMARY.md").write_text("87%")
    with pytest.raises(ValueError, match=r"efficiency\.json is no JSON: .*Restore it"):
        drop_exit_figures(tmp_path)
    assert (tmp_path / "SUMMARY.md").read_text() == "87%" and (tmp_path / "efficiency.json").read_text() == "{"
