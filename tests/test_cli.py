"""The command line: help, the plan without training, calibration of a saved model, and errors with their status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import disable_progress_bars
from transformers import AutoModelForSequenceClassification, GPT2Config

from helpers import sentence_rows, tiny_bert, tiny_model, word_tokenizer
from hf_costeff import ExitConfig
from hf_costeff.cli import COMMANDS, main
from hf_costeff.model_card import write_model_card
from hf_costeff.promises import weights_fingerprint
from test_model_card import make_report


@pytest.fixture(scope="module", autouse=True)
def quiet():
    disable_progress_bars()


@pytest.fixture(autouse=True)
def cache_in_the_tests_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def wide_bert():
    return tiny_bert(num_labels=2, hidden_size=32, num_attention_heads=4, intermediate_size=128)


@pytest.fixture
def teacher(tmp_path) -> str:
    """A folder with a config and no weights: a plan needs nothing else."""
    wide_bert().config.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


# --- help and mistakes in the call


def test_help_shows_what_comes_first_and_no_default_that_is_decided_later(capsys):
    with pytest.raises(SystemExit):
        main(["block-prune", "--help"])
    told = capsys.readouterr().out
    assert "usage: hf-costeff block-prune MODEL [--flags]" in told
    assert "(default: None)" not in told and "(default: 42)" in told


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_the_commands(words, capsys):
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(command in out for command in COMMANDS)


def test_without_a_command_the_usage_is_shown_and_the_call_counts_as_a_mistake(capsys):
    assert main([]) == 2
    assert "usage: hf-costeff" in "".join(capsys.readouterr())


def test_an_unknown_command_is_named_and_the_known_ones_listed(capsys):
    assert main(["compres"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "unknown command 'compres'" in err and "calibrate" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"hf-costeff {command}" in out
    assert all(action.option_strings[0] in out for action in COMMANDS[command].parser()._actions)


def test_a_flag_that_switches_off_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert (
        out.count("Quote the texts whose answer changes.") == 1 and "--no_texts, --no-texts Switch --texts off." in out
    )


def test_the_package_runs_as_a_module_with_the_same_exit_status():
    found = subprocess.run([sys.executable, "-m", "hf_costeff", "nonsense"], capture_output=True, text=True)
    assert found.returncode == 2 and "unknown command 'nonsense'" in found.stderr


@pytest.mark.parametrize("command", ["calibrate", "report", "benchmark", "export"])
def test_a_command_on_one_split_lists_no_flags_that_it_would_ignore(command):
    """Those that name, cut or sample the splits of a whole run."""
    flags = {action.dest for action in COMMANDS[command].parser()._actions}
    assert {"dataset", "validation_file", "text_columns", "label_column", "split"} <= flags
    assert not flags & {"train_file", "train_split", "validation_split", "calibration_split", "calibration_rows"}
    assert "max_train_rows" not in flags


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    class Interrupted:
        name, purpose = "skip", ""

        def __call__(self, words):
            raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "skip", Interrupted())
    assert main(["skip", "model"]) == 130
    assert capsys.readouterr().err == "\nhf-costeff skip: interrupted. What trains goes on with the same command.\n"


def test_a_missing_flag_is_a_mistake_in_the_call(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compress", "--output_dir", "x"])
    assert stop.value.code == 2 and "--teacher" in capsys.readouterr().err


# --- the plan


def test_a_dry_run_prints_the_plan_from_the_config_alone_and_writes_nothing(teacher, tmp_path, capsys):
    out_dir = tmp_path / "slim"
    words = ["compress", "--teacher", teacher, "--output_dir", str(out_dir), "--compression", "2", "--dry_run"]
    assert main(words) == 0
    out = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in wide_bert().parameters())
    lines = {line[:19].strip(): line[19:] for line in out.strip().splitlines()}
    assert list(lines) == [
        *("heads per layer", "neurons per layer", "embedding rank", "parameters", "FLOPs, 128 tokens", "weights file")
    ]
    slim = int(lines["parameters"].split()[0].replace(",", ""))
    assert lines["parameters"] == f"{slim:,} of {total:,} ({total / slim:.2f}x smaller)"
    assert 0.3 * total < slim <= total / 2
    assert lines["weights file"] == f"{4 * slim / 1e6:.1f} MB (float32)"
    assert not out_dir.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compression", "1000"], ["cannot be reached: the smallest possible is", "Ask for less compression"]),
        (["--compression", "0.5"], ["`--compression` is 0.5. It must be at least 1"]),
        (["--num_attention_heads", "14"], ["Cannot keep 14 attention heads in layer 1: it has 4"]),
        (["--embedding_rank", "0"], ["`--embedding_rank` is 0. It must lie in 1..32"]),
        (["--recipe", "slow"], ["`--recipe` is 'slow'. It must be one of fast, paper"]),
        (["--allocation", "odd"], ["`--allocation` is 'odd'. It must be one of uniform, uneven"]),
        (["--precision", "fp8"], ["`--precision` is 'fp8'"]),
        (["--exit_pooling", "max"], ["`--exit_pooling` is 'max'"]),
        (["--exit_layers", "1", "9"], ["`--exit_layers` is [1, 9]"]),
        (["--max_metric_drop", "1", "--target_speedup", "2"], ["Both `--max_metric_drop` and `--target_speedup`"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_errors_go_to_stderr_in_one_message_with_status_1(flags, words, teacher, capsys):
    status = main(["compress", "--teacher", teacher, "--output_dir", "never", "--dry_run", *flags])
    out, err = capsys.readouterr()
    assert status == 1 and out == ""
    assert err.startswith("hf-costeff compress: ") and "Traceback" not in err
    for word in words:
        assert word in err


def test_a_teacher_that_is_not_there_or_no_encoder_is_an_error(tmp_path, capsys):
    GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path / "gpt2")
    for name, words in (
        (tmp_path / "gpt2", "type 'gpt2'. Supported are encoders"),
        (tmp_path / "none", "cannot be loaded"),
    ):
        assert main(["compress", "--teacher", str(name), "--output_dir", "never", "--dry_run"]) == 1
        assert words in capsys.readouterr().err


# --- calibrate


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Flags that name a validation file, and its split; a later `--split` wins."""
    sentence_rows(20, seed=1).to_csv(tmp_path / "validation.csv")
    return ["--split", "validation", "--validation_file", str(tmp_path / "validation.csv")]


@pytest.fixture
def slim(tmp_path) -> str:
    tiny_model(num_labels=2).save_pretrained(tmp_path / "slim")
    word_tokenizer().save_pretrained(tmp_path / "slim")
    return str(tmp_path / "slim")


def test_calibrate_chooses_a_threshold_and_saves_it_with_the_model(slim, files, capsys):
    assert main(["calibrate", slim, *files, "--target_speedup", "1.2"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(slim)
    settings = ExitConfig.from_dict(model.config.exit_config)
    assert settings.calibration["goal"] == {"target_speedup": 1.2} and settings.calibration["rows"] == 20
    out = capsys.readouterr().out
    assert f"Saved in {slim}: entropy criterion with threshold {settings.threshold:g}. On 20 rows" in out
    assert f"{settings.calibration['speedup_over_full_depth']:.2f}x fewer FLOPs" in out
    inputs = word_tokenizer()(["the film was good"], return_tensors="pt")
    assert 1 <= model.predict(**inputs, early_exit=True).exit_layer.item() <= 4


def calibrated(slim) -> ExitConfig:
    return ExitConfig.from_dict(AutoModelForSequenceClassification.from_pretrained(slim).config.exit_config)


def test_calibrate_says_that_twenty_rows_are_too_few_for_a_promise_and_lets_nobody_leave(slim, files, capsys):
    assert main(["calibrate", slim, *files, "--max_disagreement", "1", "--guarantee"]) == 0
    out = capsys.readouterr().out
    assert "Nobody leaves early, because nothing can be promised. To promise at most 1 points" in out
    assert "takes 344 rows at least, 230 of them to test on, and there are 20." in out
    assert calibrated(slim).calibration["mean_exit_layer"] == 4.0


def test_calibrate_states_its_promise_and_for_which_weights(slim, files, capsys):
    flags = ["--max_disagreement", "60", "--guarantee", "--delta", "0.2", "--no_fit_temperatures"]
    assert main(["calibrate", slim, *files, *flags, "--criterion", "margin"]) == 0
    out = capsys.readouterr().out
    settings = calibrated(slim)
    promise = settings.calibration["promise"]
    assert f"margin criterion with threshold {settings.threshold:g}." in out
    assert "Promised for new rows of the same kind, with probability 0.8: for at most 60.00% of them the early" in out
    assert f"tested on 14 rows, of which {promise['flips']} lost." in out
    model = AutoModelForSequenceClassification.from_pretrained(slim)
    assert promise["fingerprint"] == weights_fingerprint(model.costeff)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--per_exit"], "(one per exit)"),
        (["--criterion", "patience"], "patience criterion with patience 0."),
    ],
)
def test_calibrate_names_the_limits_it_chose(flags, words, slim, files, capsys):
    assert main(["calibrate", slim, *files, "--max_disagreement", "0", *flags]) == 0
    assert words in capsys.readouterr().out


def test_calibrate_does_not_write_over_a_file(slim, files, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("text,label\n")
    assert main(["calibrate", slim, *files, "--max_metric_drop", "1", "--output_dir", str(tmp_path / "rows.csv")]) == 1
    assert "rows.csv', a file, which would be overwritten. Name a folder." in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text() == "text,label\n"


def test_calibrate_counts_losses_against_a_reference_that_is_named(slim, files, tmp_path, capsys):
    teacher = tiny_bert(num_labels=2)
    teacher.save_pretrained(tmp_path / "teacher")
    word_tokenizer().save_pretrained(tmp_path / "teacher")
    words = ["calibrate", slim, *files, "--reference", str(tmp_path / "teacher")]
    assert main([*words, "--max_metric_drop", "100"]) == 0
    assert re.search(r"accuracy [\d.]+ of teacher, [\d.]+ at full depth, [\d.]+ with early", capsys.readouterr().out)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    before = Path(slim, "config.json").read_text()
    assert main([*words, "--max_metric_drop", "50"]) == 1
    assert f"The reference {tmp_path / 'teacher'} cuts texts into other pieces" in capsys.readouterr().err
    assert Path(slim, "config.json").read_text() == before


def test_calibrate_needs_no_labels_to_limit_disagreement(slim, tmp_path, capsys):
    sentence_rows(40).remove_columns("label").to_csv(tmp_path / "texts.csv")
    words = ["calibrate", slim, "--validation_file", str(tmp_path / "texts.csv")]
    assert main([*words, "--max_disagreement", "5"]) == 0
    out = capsys.readouterr().out
    record = AutoModelForSequenceClassification.from_pretrained(slim).config.exit_config["calibration"]
    assert record["disagreement"] <= 0.05 and "metric" not in record
    assert f"{100 * record['disagreement']:.2f}% answer otherwise than at full depth, mean exit layer" in out
    assert main([*words, "--max_metric_drop", "5"]) == 1
    assert "No label column was found" in capsys.readouterr().err


def test_calibrate_may_save_elsewhere(slim, files, tmp_path):
    words = ["calibrate", "--model", slim, *files, "--max_metric_drop", "1", "--output_dir", str(tmp_path / "new")]
    assert main(words) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["exit_config"]
    assert (
        "exit_config" not in json.loads((tmp_path / "slim" / "config.json").read_text())
        or not json.loads((tmp_path / "slim" / "config.json").read_text())["exit_config"]
    )
    assert (tmp_path / "new" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target_speedup", "2", "--guarantee", "--measured"], "A guarantee is asked for `--target_speedup`"),
        (["--max_metric_drop", "1", "--threads", "2"], "`--threads` set how times are measured, and none are."),
        (["--max_latency_ms", "1", "--threads", "0"], "`--threads`"),
    ],
)
def test_calibrate_refuses_before_the_clock_runs(flags, words, slim, files, capsys, monkeypatch):
    monkeypatch.setattr("hf_costeff.exit_times.measure_alternating", lambda *given, **more: pytest.fail("it ran"))
    before = Path(slim, "config.json").read_text()
    assert main(["calibrate", slim, *files, *flags]) in (1, 2)
    assert words in capsys.readouterr().err and Path(slim, "config.json").read_text() == before


def test_calibrate_keeps_a_latency_that_was_measured_here(slim, files, capsys):
    assert main(["calibrate", slim, *files, "--max_latency_ms", "1000", "--batch_size", "2"]) == 0
    seen = calibrated(slim).calibration
    assert seen["goal"] == {"max_latency_ms": 1000.0} and seen["mean_exit_layer"] == 4.0  # no need to leave early
    assert 0 < seen["timed"]["ms_per_text"] == seen["timed"]["full_depth_ms"] < 1000
    assert (seen["timed"]["batch_size"], seen["timed"]["threads"], seen["timed"]["precision"]) == (2, 1, "float32")
    assert "ms per text on average" in (out := capsys.readouterr().out) and "(batch 2, threads 1, float32)" in out


def test_calibrate_reaches_a_speed_up_in_time_only_when_asked_to(slim, files):
    assert main(["calibrate", slim, *files, "--target_speedup", "1"]) == 0
    assert "timed" not in calibrated(slim).calibration
    assert main(["calibrate", slim, *files, "--target_speedup", "1", "--measured"]) == 0
    assert calibrated(slim).calibration["timed"]["batch_size"] == 1


def test_calibrate_drops_the_figures_that_belong_to_the_replaced_settings(slim, files, tmp_path):
    report = make_report()
    (tmp_path / "slim" / "efficiency.json").write_text(json.dumps(report))
    for name in ("SUMMARY.md", "pareto.png"):
        (tmp_path / "slim" / name).write_text("87% with early exit")
    write_model_card(slim, "slim")
    assert "| slim, early exit |" not in (tmp_path / "slim" / "README.md").read_text()  # no settings were stored yet
    copy = tmp_path / "new"
    for flags, folder in ((["--output_dir", str(copy)], copy), ([], tmp_path / "slim")):
        assert main(["calibrate", slim, *files, "--max_metric_drop", "1", *flags]) == 0
        kept = json.loads((folder / "efficiency.json").read_text())
        assert [row["name"] for row in kept["rows"]] == ["teacher", "assistant", "slim, full depth"]
        assert kept["exit_config"] is None and kept["classes"] == [] and kept["stages"] == report["stages"]
        assert not (folder / "SUMMARY.md").exists() and not (folder / "pareto.png").exists()
        card = (folder / "README.md").read_text()
        assert f"# {folder.name}" in card and "The exit settings were replaced after these measurements" in card
        assert "On 20 rows" in card and "87" not in card.split("| slim, full depth |")[0]
        assert (tmp_path / "slim" / "SUMMARY.md").exists() == (folder == copy)  # a copy leaves the model as it was
    assert main(["calibrate", slim, *files, "--max_metric_drop", "2"]) == 0  # and once more


def test_calibrate_keeps_a_card_that_somebody_wrote(slim, files, tmp_path):
    (tmp_path / "slim" / "README.md").write_text("my own words")
    (tmp_path / "slim" / "efficiency.json").write_text(json.dumps(make_report()))
    assert main(["calibrate", slim, *files, "--max_metric_drop", "1", "--output_dir", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "README.md").read_text() == "my own words"


def test_calibrate_asks_for_a_goal_before_it_looks_for_the_model(capsys):
    assert main(["calibrate", "--model", "nowhere"]) == 1
    assert "Give exactly one of `--max_accuracy_drop`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "Give exactly one"),
        (["--max_latency_ms", "0"], "`--max_latency_ms` is 0.0. It must be above 0"),
        (["--max_latency_ms", "1e-9"], "A mean latency of 1e-09 ms cannot be reached"),
        (["--max_latency_ms", "1", "--threads", "0"], "`--threads` is 0. It must be at least 1"),
        (["--max_latency_ms", "1", "--max_disagreement", "1"], "Give exactly one"),
        (["--max_megaflops", "1", "--measured"], "`--max_megaflops` counts FLOPs"),
        (["--max_metric_drop", "1", "--target_speedup", "2"], "Give exactly one"),
        (["--target_speedup", "500"], "A speed-up of 500 cannot be reached"),
        (["--max_metric_drop", "1", "--guarantee"], "A guarantee is asked for `--max_metric_drop`, and there is none"),
        (
            ["--max_accuracy_drop", "1", "--guarantee", "--delta", "2"],
            "`--delta` is 2. It must lie above 0 and",
        ),
        (["--max_accuracy_drop", "1", "--criterion", "luck"], "`--criterion` is 'luck'"),
        (["--max_metric_drop", "1", "--metric", "bleu"], "'bleu'"),
        (["--max_metric_drop", "1", "--label_column", "nothing"], "'nothing'"),
        (["--max_metric_drop", "1", "--split", "nowhere"], "`--split` is 'nowhere', but the splits are: validation"),
    ],
)
def test_calibrate_says_what_is_wrong_and_leaves_the_model_alone(flags, words, slim, files, capsys):
    assert main(["calibrate", "--model", slim, *files, *flags]) == 1
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("hf-costeff calibrate: ") and words in last
    assert AutoModelForSequenceClassification.from_pretrained(slim).config.exit_config is None


def test_a_model_without_exits_cannot_be_calibrated(files, tmp_path, capsys):
    tiny_bert(num_labels=2).save_pretrained(tmp_path / "stock")
    assert main(["calibrate", "--model", str(tmp_path / "stock"), *files, "--max_metric_drop", "1"]) == 1
    assert "is a bert model without exits. Compress it first" in capsys.readouterr().err


def test_a_model_whose_only_exit_is_the_last_cannot_be_calibrated(files, tmp_path, capsys):
    tiny_model(num_labels=2, exit_layers=[4]).save_pretrained(tmp_path / "one")
    word_tokenizer().save_pretrained(tmp_path / "one")
    assert main(["calibrate", str(tmp_path / "one"), *files, "--max_metric_drop", "1"]) == 1
    assert "has one exit, after its last layer, so nobody can leave early" in capsys.readouterr().err


def test_a_mistyped_flag_is_answered_with_the_nearest_one(capsys):
    assert main(["compress", "--teacher", "somewhere", "--output_dir", "slim", "--compresion", "8"]) == 1
    assert "Did you mean --compression?" in capsys.readouterr().err
