"""The model card says what was measured, all of it and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers import tiny_config, tiny_model
from hf_costeff.model_card import CompressionCard, write_model_card

GOLDEN = Path(__file__).parent / "golden_model_card.md"
CALIBRATION = {
    "metric": "accuracy",
    "rows": 1200,
    "full_depth": 0.88,
    "early_exit": 0.875,
    "mean_exit_layer": 1.5,
    "speedup_over_full_depth": 2.5,
}
SETTINGS = {"criterion": "entropy", "threshold": 0.3, "temperatures": 1.0, "calibration": CALIBRATION}


def line(name: str, metric: float, parameters: int, flops: float, shares: list[float]) -> dict:
    figures = {"parameters": parameters, "flops_per_row": flops, "flops_per_row_at_128": 10 * flops}
    speed = {"mean_exit_layer": 2.0, "exit_shares": shares, "ms_per_text": {"32": flops / 1e5, "1": flops / 2e4}}
    return {"name": name, "metrics": {"accuracy": metric}, **figures, **speed}


def make_report(**settings) -> dict:
    full = [0.0, 0.0, 0.0, 1.0]
    scores = {f"eval_exit_{layer}_accuracy": 0.8 + layer / 100 for layer in (1, 2, 3, 4)}
    return {
        "metric": "accuracy",
        "rows": [
            line("teacher", 0.9, 8_000_000, 2e6, [1.0]),
            line("assistant", 0.91, 7_900_000, 2e6, full),
            line("slim, full depth", 0.88, 1_000_000, 4e5, full),
            line("slim, early exit", 0.87, 1_000_000, 1e5, [0.5, 0.25, 0.125, 0.125]),
        ],
        "exit_config": SETTINGS,
        "data": {"rows": {"train": 5000, "validation": 2345}, "text_columns": ["text"]},
        "settings": {"teacher": "org/bert", "dataset": "org/films", "recipe": "fast", "compression": 8, **settings},
        "stages": {
            "assistant": {"steps": 300, "seconds": 90.0},
            "slenderize-01": {
                **{"steps": 60, "seconds": 30.0, "num_attention_heads": 2},
                **{"intermediate_size": [10, 7, 0, 16], "embedding_rank": None},
            },
            "prediction": {"steps": 900, "seconds": 120.0, "calibration_metrics": scores},
        },
        "hardware": {"cpu": "a processor", "threads": 2, "accelerator": None, "torch": "2"},
    }


def card_of(report: dict, exit_config: dict | None = SETTINGS, **options) -> str:
    return str(CompressionCard("org/slim", report, tiny_config(exit_config=exit_config), **options).render())


def test_the_whole_card_reads_as_it_was_written_down():
    assert card_of(make_report(), chart=True).strip() == GOLDEN.read_text().strip()


@pytest.mark.parametrize("settings", [{}, {"teacher": None, "dataset": None}, {"teacher": "./bert"}])
@pytest.mark.parametrize("exit_config", [SETTINGS, None, {**SETTINGS, "calibration": None}])
def test_nothing_is_left_blank_or_guessed(settings, exit_config):
    card = card_of(make_report(**settings), exit_config)
    for word in ("None", "Unknown", "nan", "More Information", "{{", "{%"):
        assert word not in card.replace("title     = {{COST-EFF}", "")


def test_metadata_names_model_data_and_every_result_by_the_hubs_own_fields():
    data = yaml.safe_load(card_of(make_report(dataset_config="en", validation_split="test")).split("---\n")[1])
    assert data["base_model"] == "org/bert" and data["datasets"] == ["org/films"]
    assert data["pipeline_tag"] == "text-classification" and "custom_code" in data["tags"]
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "org/films en", "type": "org/films", "config": "en", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [0.88, 0.87]


def test_what_the_hub_does_not_know_is_no_metadata():
    data = yaml.safe_load(card_of(make_report(teacher="./bert", dataset="./films")).split("---\n")[1])
    assert not {"base_model", "datasets", "model-index"} & set(data)
    assert "films" not in card_of(make_report(teacher="./bert", dataset="./films"))


def test_early_exit_figures_go_when_the_settings_they_were_measured_with_are_replaced():
    card = card_of(make_report(), {**SETTINGS, "threshold": 0.4})
    assert "| slim, early exit |" not in card and "share of rows" not in card
    assert "The exit settings were replaced after these measurements" in card
    assert "| slim, full depth | 0.8800 |" in card


def test_a_promise_is_told_with_its_odds_and_its_test():
    promise = {
        "loss": "max_disagreement",
        "epsilon": 0.01,
        "delta": 0.05,
        "rows": 800,
        "flips": 2,
        "upper_bound": 0.008,
    }
    card = card_of(make_report(), {**SETTINGS, "calibration": {**CALIBRATION, "promise": promise}})
    assert "with probability 0.95: for at most 1.00% of them the early answer differs from that of full depth" in card
    assert "tested on 800 rows, of which 2 lost" in card and "nothing is promised" not in card


def test_a_card_of_ours_is_brought_up_to_date_and_one_of_yours_is_not_touched(tmp_path):
    tiny_model(exit_config=SETTINGS).save_pretrained(tmp_path)
    (tmp_path / "efficiency.json").write_text(json.dumps(make_report()))
    write_model_card(tmp_path, "slim")
    assert 'from_pretrained("slim")' in (tmp_path / "README.md").read_text()
    write_model_card(tmp_path, "org/slim")
    text = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("org/slim")' in text and 'from_pretrained("slim")' not in text
    assert "![" not in text  # no chart lies beside
    (tmp_path / "README.md").write_text("Mine.")
    write_model_card(tmp_path, "org/slim")
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_without_a_record_of_a_run_the_card_claims_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    write_model_card(tmp_path, "org/slim")
    text = (tmp_path / "README.md").read_text()
    assert "No measurements were" in text and "4 layers with exits after layers 1, 2, 3, 4" in text
