"""The model card says what was measured, all of it and nothing else."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from helpers import random_batch, tiny_config, tiny_model
from hf_costeff import ExitConfig
from hf_costeff.guarantees import describe_promise
from hf_costeff.model_card import CHARTS, CompressionCard, SkippingCard, TrainingCard, how_to_use, write_model_card

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
            "assistant": {
                **{"steps": 300, "learning_rate": 1e-4, "seconds": 90.0},
                "calibration_metrics": dict.fromkeys(scores, 0.5),  # of a model that is not this one
            },
            "slenderize-01": {
                **{"steps": 60, "seconds": 30.0, "num_attention_heads": 2},
                **{"intermediate_size": [10, 7, 0, 16], "embedding_rank": None},
            },
            "prediction": {
                **{"steps": 900, "seconds": 120.0, "batch_size": 32},
                "loss_weights": {"task_loss": 0.0, "soft_label_loss": 1.0, "representation_loss": 0.5},
                "calibration_metrics": scores,
            },
        },
        "classes": [
            {"name": "bright", "rows": 345, "full_depth": 0.8, "early_exit": 0.75, "mean_exit_layer": 2.5},
            {"name": "dull", "rows": 2000, "full_depth": 0.9, "early_exit": 0.9, "mean_exit_layer": 1.25},
        ],
        "hardware": {"cpu": "a processor", "threads": 2, "accelerator": None, "torch": "2"},
    }


def card_of(report: dict, exit_config: dict | None = SETTINGS, **options) -> str:
    return str(CompressionCard("org/slim", report, tiny_config(exit_config=exit_config), **options).render())


def test_the_whole_card_reads_as_it_was_written_down():
    assert card_of(make_report(), charts=["pareto.png"]).strip() == GOLDEN.read_text().strip()


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
    card = card_of(make_report(teacher="./bert", dataset="./films", dataset_config="en"))
    assert "films" not in card and "./bert" not in card and "made from a local teacher by" in card


def test_a_folder_here_is_no_name_on_the_hub_even_if_it_reads_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "base_model: org/bert" in card_of(make_report()) and "org/films" in card_of(make_report())
    for folder in ("org/bert", "org/films"):
        (tmp_path / folder).mkdir(parents=True)
    card = card_of(make_report())
    assert "org/bert" not in card and "org/films" not in card and "made from a local teacher by" in card
    assert "org/bert" not in training_card() and "with a local teacher as its teacher" in training_card()


def test_the_results_are_read_back_from_the_card_by_the_hubs_own_reader():
    results = ModelCard(card_of(make_report())).data.eval_results
    assert [(result.dataset_type, result.metric_type, result.metric_value) for result in results] == [
        ("org/films", "accuracy", 0.88),
        ("org/films", "accuracy", 0.87),
    ]


def test_either_card_says_what_to_cite():
    for card in (card_of(make_report()), training_card()):
        assert card.count("```bibtex\n@inproceedings{shen2022costeff,\n") == 1
        assert "title     = {{COST-EFF}: Collaborative" in card and "note      = {arXiv:2210.15523}\n}\n```" in card


def test_early_exit_figures_go_when_the_settings_they_were_measured_with_are_replaced():
    card = card_of(make_report(), {**SETTINGS, "threshold": 0.4})
    assert "| slim, early exit |" not in card and "share of rows" not in card
    assert "The exit settings were replaced after these measurements" in card
    assert "| slim, full depth | 0.8800 |" in card


def test_scores_of_exits_are_told_if_every_exit_has_one():
    report = make_report()
    assert "| accuracy if all leave here |" in card_of(report)
    del report["stages"]["prediction"]["calibration_metrics"]["eval_exit_2_accuracy"]
    assert "if all leave here" not in card_of(report) and "held out for choosing" not in card_of(report)


def test_a_model_of_pairs_is_asked_for_a_pair():
    report = make_report()
    assert '**tokenizer("a text", return_tensors="pt")' in card_of(report)
    report["data"]["text_columns"] = ["premise", "hypothesis"]
    assert '**tokenizer("a text", "and its pair", return_tensors="pt")' in card_of(report)


def test_a_promise_is_told_with_its_odds_and_its_test():
    promise = {
        "loss": "max_disagreement",
        "epsilon": 0.01,
        "delta": 0.05,
        "rows": 800,
        "flips": 2,
    }
    card = card_of(make_report(), {**SETTINGS, "calibration": {**CALIBRATION, "promise": promise}})
    assert describe_promise(promise) in card and "nothing is promised" not in card


def test_who_pays_for_early_exit_is_told_by_class_or_not_claimed():
    report = make_report()
    assert "of bright, 80.0% are answered right at full depth and 75.0% with early exit" in card_of(report)
    assert "| dull | 2,000 | 90.0% | 90.0% | 1.25 |" in card_of(report)
    for card in (card_of({**report, "classes": []}), card_of(report, {**SETTINGS, "threshold": 0.4})):
        assert "Who pays" not in card and "Measured here is the mean alone" in card
    even = [{**outcome, "early_exit": outcome["full_depth"]} for outcome in report["classes"]]
    assert "On these rows none lost right answers to it" in card_of({**report, "classes": even})
    many = [{**report["classes"][0], "name": f"class {number}"} for number in range(150)]
    card = card_of({**report, "classes": many})
    assert "| class 9 |" in card and "| class 10 |" not in card and "140 classes more are in `efficiency.json`" in card


def test_a_class_may_have_any_name():
    outcome = {"rows": 5, "full_depth": 1.0, "early_exit": 0.5, "mean_exit_layer": 1.0}
    card = card_of({**make_report(), "classes": [{"name": "<script>\n| a |</script>", **outcome}]})
    assert "<script" not in card and "| &lt;script&gt; \\| a \\|&lt;/script&gt; | 5 |" in card


@pytest.mark.parametrize("exit_config", [None, ExitConfig(threshold=0.5).to_dict()])
@pytest.mark.parametrize("problem_type", ["regression", "single_label_classification", "multi_label_classification"])
def test_the_early_exit_that_the_card_shows_is_one_that_the_model_takes(problem_type, exit_config):
    num_labels = 1 if problem_type == "regression" else 3
    if problem_type == "regression" and exit_config is not None:
        exit_config = ExitConfig(criterion="patience", patience=1, tolerance=0.1).to_dict()
    model = tiny_model(num_labels=num_labels, problem_type=problem_type, exit_config=exit_config)
    (shown,) = re.findall(r"early_exit=(.*)\)\n", how_to_use("org/slim", model.config))
    assert shown == ("True" if exit_config else "False" if num_labels == 1 else "0.5")
    model.predict(**random_batch([3, 5]), early_exit=ast.literal_eval(shown))


def test_a_licence_is_stated_once_and_kept(tmp_path):
    tiny_model(exit_config=SETTINGS).save_pretrained(tmp_path)
    (tmp_path / "efficiency.json").write_text(json.dumps(make_report()))
    write_model_card(tmp_path, "slim")
    assert "license" not in front_matter(tmp_path)
    write_model_card(tmp_path, "slim", license="apache-2.0")
    write_model_card(tmp_path, "org/slim")
    assert front_matter(tmp_path)["license"] == "apache-2.0" and front_matter(tmp_path)["base_model"] == "org/bert"
    (tmp_path / "README.md").write_text("Mine.")
    with pytest.raises(ValueError, match="Write `license: mit` into its first lines"):
        write_model_card(tmp_path, "org/slim", license="mit")


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def training_card(**changes) -> str:
    scores = {f"eval_exit_{layer}_{metric}": layer / 10 for layer in (1, 2, 3, 4) for metric in ("accuracy", "f1")}
    facts = {
        "name": "org/trained",
        "config": tiny_config(),
        "parameters": 12345,
        "evaluation": {**scores, "eval_accuracy": 0.4, "eval_mean_exit_f1": 0.25, "eval_loss": 1.0, "step": 1500},
        "training": "1,500 steps in batches of 8.",
        "teacher": "org/bert",
        "metadata": {"license": "mit", "language": None, "base_model": None, "datasets": ["org/films"]},
    }
    return str(TrainingCard(**{**facts, **changes}).render())


def test_a_trainers_card_tells_every_metric_of_every_exit_and_when():
    card = training_card()
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    assert lines[0] == "| exit after layer | FLOPs, 128 tokens | accuracy | f1 |" and len(lines) == 6
    assert lines[3].startswith("| 2 |") and lines[3].endswith("| 0.2000 | 0.2000 |")
    assert "after 1,500 training steps" in card and "12,345 parameters" in card
    assert (
        "with [org/bert](https://huggingface.co/org/bert) as its teacher" in card
        and "1,500 steps in batches of 8." in card
    )
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["license"] == "mit" and data["datasets"] == ["org/films"] and data["metrics"] == ["accuracy", "f1"]
    assert not {"language", "base_model"} & set(data)


def test_a_trainers_card_says_that_gates_skip_layers():
    card, plain = training_card(config=tiny_config(skip_gates="linear")), training_card()
    for words in ("a gate before each layer decides", "gates skipping layers before it", "and skips no layer"):
        assert words in card and words not in plain


@pytest.mark.parametrize("changes", [{}, {"evaluation": {}}, {"teacher": None}, {"teacher": "/me-only/bert"}])
def test_a_trainers_card_leaves_nothing_blank_or_guessed(changes):
    card = training_card(**changes)
    for word in ("None", "Unknown", "nan", "{{", "{%", "{name}", "/me-only"):
        assert word not in card.replace("title     = {{COST-EFF}", "")
    assert ("## Results" in card) == (changes.get("evaluation") != {})
    assert ("as its teacher" in card) == (changes.get("teacher", "") is not None)


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


def skipping_report(gated: bool = True, **changes) -> dict:
    settings = {"gates": "attention", "target_layers": 3.0} if gated else {"gates": "none"}
    report = make_report(model="org/bert", skip_weight=0.04, **settings)
    report["rows"] = [line("model as given", 0.9, 8_000_000, 2e6, [1.0]), *report["rows"][2:]]
    shares = {
        "rows": 40,
        "layers_run": 2.5,
        "layers_run_by_flops": 2.5,
        "shares": [0.5, 0.5, 0.5, 0.0],
        "class_shares": {},
        "paths": {"1 4": 0.75, "4": 0.25},
    }
    del report["settings"]["teacher"], report["settings"]["recipe"], report["settings"]["compression"]
    return {**report, "skipping": shares if gated else None, "exits_trained": True, **changes}


@pytest.mark.parametrize("exit_config", [SETTINGS, None, {**SETTINGS, "calibration": None}])
def test_a_model_that_skips_layers_has_a_card_of_its_own(exit_config):
    config = tiny_config(exit_config=exit_config, skip_gates="attention")
    card = str(SkippingCard("org/gated", skipping_report(), config, CHARTS).render())
    assert "a gate before each decides, text by text, whether to skip it; easy texts leave early" in card
    assert "75% take the commonest, layers 1 4" in card and "![Share of texts that skip each layer]" in card
    assert "base_model: org/bert" in card and "2303.09266" in card and "layers to run 3.0" in card
    assert "incentive" not in card  # its weight adapts, so the setting was not used
    assert "{hu2023smartbert" in card and "{shen2022costeff" in card and "`layer_skipping.json`" in card
    values = [result.metric_value for result in ModelCard(card).data.eval_results]
    assert values == ([0.88, 0.87] if exit_config == SETTINGS else [0.88])
    assert ("No exit settings are stored" in card) == (exit_config is None)
    for word in ("None", "Unknown", "nan", "More Information", "{{", "{%"):
        assert word not in card.replace("{{COST-EFF}", "").replace("{{SmartBERT}", "")


def test_a_card_of_exits_alone_says_nothing_of_gates():
    card = str(SkippingCard("org/exits", skipping_report(gated=False), tiny_config(exit_config=SETTINGS)).render())
    assert "gate before" not in card and "## Skipping" not in card and "easy texts leave early" in card
    assert "weight of the incentive to skip 0.04" in card


def test_exits_that_were_never_trained_are_not_offered():
    report = skipping_report(exits_trained=False, exit_config=None)
    card = str(SkippingCard("org/gated", report, tiny_config(skip_gates="linear")).render())
    assert "leave early" not in card and "early_exit=False" in card and "## Exits" not in card
    assert "## Skipping" in card and "skipping.png" not in card  # no chart lies beside


def test_what_a_stage_chose_by_itself_is_told():
    report = make_report(soft_label_exit=None)
    report["stages"]["prediction"]["soft_label_exit"] = "last"
    assert "teacher of the exits, same depth or last: last" in card_of(report)


def test_without_a_record_of_a_run_the_card_claims_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    write_model_card(tmp_path, "org/slim")
    text = (tmp_path / "README.md").read_text()
    assert "No measurements were" in text and "4 layers with exits after layers 1, 2, 3, 4" in text
