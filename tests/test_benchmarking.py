"""What the benchmark measures and says, and which exits it keeps; on models too small for times to mean anything."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from helpers import sentence_rows, tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff import ExitConfig, benchmarking
from hf_costeff.benchmark_report import format_benchmark, write_benchmark
from hf_costeff.benchmarking import (
    EARLY,
    FULL,
    TEACHER,
    BenchmarkGrid,
    Measurement,
    benchmark,
    rows_of_length,
)
from hf_costeff.cli import main
from hf_costeff.data import make_collator
from hf_costeff.efficiency import cumulative_flops, full_depth_flops, mean_flops, stock_flops

SAVED = ExitConfig(threshold=0.5)
COLLATOR = make_collator(word_tokenizer())
SMALL = BenchmarkGrid(batch_sizes=[1, 4], lengths=[0, 6], rows=8, rounds=2)


def slim(**changes: Any) -> Any:
    return tiny_model(seed=3, **{"exit_config": SAVED.to_dict(), **changes})


@pytest.fixture(scope="module")
def found() -> list[Measurement]:
    return benchmark(slim(), tiny_bert(), token_rows(12), make_collator(word_tokenizer()), SMALL)


# --- what is measured


def test_every_contender_is_measured_in_every_setting(found):
    keys = [(one.length, one.batch_size, one.name) for one in found]
    names = (TEACHER, FULL, EARLY)
    assert keys == [(length, size, name) for length in (0, 6) for size in (1, 4) for name in names]
    assert all(one.median_ms <= one.p95_ms <= one.p99_ms and one.texts_per_second > 0 for one in found)
    assert all(
        0 < one.peak_share < 1 and one.speedup_quartiles[0] <= one.speedup <= one.speedup_quartiles[1] for one in found
    )


def test_the_teacher_is_the_reference(found):
    for one in found:
        if one.name == TEACHER:
            assert (one.speedup, one.speedup_quartiles, one.flops_ratio) == (1.0, (1.0, 1.0), 1.0)


def test_the_flops_ratio_counts_padding_and_executed_exits(found):
    """Every batch is padded to a multiple of 8 tokens, so rows of 6 run at 8."""
    model, teacher = slim(), tiny_bert()
    rows = rows_of_length(token_rows(12), 6, 8)
    layers = model.predict(torch.tensor([row["input_ids"] for row in rows]), early_exit=True).exit_layer
    one = next(one for one in found if (one.length, one.batch_size, one.name) == (6, 4, EARLY))
    assert one.mean_exit_layer == pytest.approx(float(layers.float().mean())) and one.mean_exit_layer < 4
    expected = stock_flops(teacher.config, 8) / mean_flops(model.config, layers, 8)
    assert one.flops_ratio == pytest.approx(expected)
    full = next(one for one in found if (one.length, one.batch_size, one.name) == (6, 4, FULL))
    assert full.flops_ratio == pytest.approx(stock_flops(teacher.config, 8) / full_depth_flops(model.config, 8))


def test_an_exit_that_nobody_can_leave_at_is_not_run_and_its_flops_are_not_counted():
    saved = ExitConfig(threshold=[0.0, 0.0, 0.5, 0.0])
    model, run = slim(exit_config=saved.to_dict()), set()
    for layer, head in model.costeff.exits.items():
        head.register_forward_hook(lambda *_, layer=int(layer): run.add(layer))
    model.predict(torch.tensor([token_rows(12)[0]["input_ids"]]), early_exit=True)
    assert run <= {3, 4}
    grid = dataclasses.replace(SMALL, batch_sizes=[4], lengths=[6])
    found = {one.name: one for one in benchmark(model, tiny_bert(), token_rows(12), COLLATOR, grid)}
    spent = [cumulative_flops(model.config, 8, checked_exits=[3])[layer - 1] for layer in (1, 2, 3, 4)]
    mean = sum(share * flops for share, flops in zip(found[EARLY].exit_shares, spent, strict=True))
    assert found[EARLY].flops_ratio == pytest.approx(stock_flops(tiny_bert().config, 8) / mean)


def test_without_saved_settings_there_is_no_early_exit_to_measure():
    grid = dataclasses.replace(SMALL, batch_sizes=[2], lengths=[0])
    model = tiny_model()
    found = benchmark(model, tiny_bert(), token_rows(4), make_collator(word_tokenizer()), grid)
    assert [one.name for one in found] == [TEACHER, FULL]


def test_a_model_with_gates_is_named_so_and_refused_in_int8_before_anything_runs():
    model = slim(skip_gates="linear")
    grid = dataclasses.replace(SMALL, batch_sizes=[2], lengths=[0])
    assert [one.name for one in benchmark(model, tiny_bert(), token_rows(4), COLLATOR, grid)] == [
        *(TEACHER, "slim, full depth with skipping", EARLY)
    ]
    grid = dataclasses.replace(grid, precisions=["float32", "int8"])
    with pytest.raises(ValueError, match="int8 needs a model whose rows all run the same layers"):
        benchmark(model, None, None, None, grid)


def test_models_and_threads_are_left_as_they_were():
    model = slim().train()
    before = torch.get_num_threads()
    grid = BenchmarkGrid(batch_sizes=[2], lengths=[0], threads=[2], precisions=["bfloat16"], rows=2, rounds=2)
    found = benchmark(model, tiny_bert(), token_rows(4), make_collator(word_tokenizer()), grid)
    assert {(one.threads, one.precision) for one in found} == {(2, "bfloat16")}
    assert model.training and model.dtype == torch.float32 and torch.get_num_threads() == before


def test_answers_are_compared_with_those_in_float32(found, monkeypatch):
    assert {one.agreement for one in found} == {1.0}
    assert "| 100.0% |" in format_benchmark(found)
    grid = BenchmarkGrid(batch_sizes=[8], lengths=[0], precisions=["bfloat16"], rows=8, rounds=2)
    others = (token_rows(8), make_collator(word_tokenizer()), grid)
    placed = benchmarking.on_device

    def broken(model: Any, device: str, precision: str) -> Any:
        own = placed(model, device, precision)
        if precision == "bfloat16" and hasattr(own, "costeff"):
            own.costeff.exits["4"].classifier.weight.data.neg_()
        return own

    monkeypatch.setattr(benchmarking, "on_device", broken)
    found = {one.name: one for one in benchmark(slim(), tiny_bert(), *others)}
    assert found[TEACHER].agreement > 0.7 and found[FULL].agreement < 0.5
    shares = benchmark(slim(num_labels=1, exit_config=None), tiny_bert(num_labels=1), *others)
    assert {one.agreement for one in shares} == {None}


def test_the_metric_is_that_of_all_rows(found):
    """And not of the timed ones alone."""
    rows = token_rows(12)
    for one in found:
        model = tiny_bert() if one.name == TEACHER else slim()
        right = 0
        for row in rows:
            tokens = torch.tensor([row["input_ids"]])
            if one.name == TEACHER:
                logits = model(tokens).logits
            else:
                logits = model.predict(tokens, early_exit=one.name == EARLY).logits
            right += int(logits.argmax()) == row["labels"]
        assert one.score == pytest.approx(right / 12) and one.score_change == 0


def test_int8_is_the_export_and_is_measured_on_the_cpu_alone():
    grid = BenchmarkGrid(["cpu", "cuda"], [4], [0], [1], ["int8"], rows=8, rounds=2)
    assert [setting[0] for setting in grid.settings()] == ["cpu"]
    found = benchmark(slim(), tiny_bert(), token_rows(8), make_collator(word_tokenizer()), grid)
    assert [(one.name, one.precision) for one in found] == [(name, "int8") for name in (TEACHER, FULL, EARLY)]
    assert all(one.agreement >= 0.7 and one.score is not None for one in found)
    assert found[1].mean_exit_layer == 4 > found[2].mean_exit_layer
    with pytest.raises(ValueError, match="int8 needs a collator with a tokenizer"):
        benchmark(slim(), tiny_bert(), token_rows(8), lambda rows: make_collator(word_tokenizer())(rows), grid)


def test_int8_gives_a_teacher_only_what_its_forward_takes():
    """DistilBERT's third argument is no token types, and a tokenizer may make some all the same."""
    sizes = {"dim": 24, "n_layers": 4, "n_heads": 3, "hidden_dim": 16, "max_position_embeddings": 24}
    torch.manual_seed(0)
    teacher = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=60, num_labels=3, **sizes)).eval()
    grid = BenchmarkGrid(["cpu"], [4], [0], [1], ["int8"], rows=8, rounds=2)
    tokenizer = word_tokenizer()
    assert "token_type_ids" in tokenizer.model_input_names
    rows = token_rows(8).map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])})
    found = benchmark(slim(type_vocab_size=0), teacher, rows, make_collator(tokenizer), grid)
    assert found[0].name == TEACHER and found[0].agreement >= 0.7


def test_the_longest_text_counts_positions_before_the_first_word():
    others = (tiny_bert(), token_rows(4), make_collator(word_tokenizer()), BenchmarkGrid(lengths=[23]))
    with pytest.raises(ValueError, match="`lengths` has 23 tokens, and the models take 22"):
        benchmark(slim(position_offset=2, pad_token_id=1), *others)


@pytest.mark.parametrize("length", [2, 5, 11])
def test_rows_of_one_length_begin_and_end_as_texts_do(length):
    rows = [{"input_ids": [2, 10 + n, 20 + n, 3], "attention_mask": [1] * 4} for n in range(3)]
    made = rows_of_length(token_rows(1).from_list(rows), length, 3)
    assert all(len(row["input_ids"]) == len(row["attention_mask"]) == length for row in made)
    assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in made)
    if length == 11:
        assert made[1]["input_ids"] == [2, 11, 21, 2, 12, 22, 2, 10, 20, 2, 3]


def test_float16_is_left_out_on_the_cpu():
    grid = BenchmarkGrid(devices=["cpu", "cuda"], batch_sizes=[1], lengths=[0], threads=[1, 2], precisions=["float16"])
    assert list(grid.settings()) == [("cuda", "float16", 1, 0, 1)]


@pytest.mark.gpu
def test_a_gpu_is_measured_with_its_own_memory():
    grid = BenchmarkGrid(devices=["cuda"], batch_sizes=[4], lengths=[0], precisions=["float16"], rows=8, rounds=2)
    found = benchmark(slim(), tiny_bert(), token_rows(8), make_collator(word_tokenizer()), grid)
    assert all(0 < one.peak_memory_mb < 1000 for one in found)


# --- what is said


def measurement(**changes: Any) -> Measurement:
    one = Measurement(
        *(FULL, "cpu", "float32", 1, 0, 8),
        *(2.0, 2.5, 3.0, 4000.0, 3.0, (2.8, 3.2)),
        *(4.0, 0.25, (0.0, 0.5, 0.5), 0.875, -0.0125, 0.99, 100.0),
    )
    return dataclasses.replace(one, **changes)


@pytest.mark.parametrize(
    ("speedup", "quartiles", "gains"),
    [(3.0, (2.8, 3.2), True), (1.01, (1.005, 1.02), False), (1.2, (0.9, 1.5), False), (0.8, (0.7, 0.9), False)],
)
def test_where_there_is_no_gain_the_table_says_so(speedup, quartiles, gains):
    one = measurement(speedup=speedup, speedup_quartiles=quartiles)
    assert one.gains == gains
    assert ("no gain here" in format_benchmark([one])) == (not gains)


def test_the_teacher_is_never_told_that_it_gains_nothing():
    assert "no gain" not in format_benchmark([measurement(name=TEACHER, speedup=1.0, speedup_quartiles=(1.0, 1.0))])


def test_figures_and_charts_are_written(found, tmp_path):
    table = write_benchmark(found, tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert [one["name"] for one in saved["measurements"]] == [one.name for one in found]
    assert saved["hardware"]["cpu"]["torch"] == torch.__version__
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == len(found) + 2 and len({line.count("|") for line in lines}) == 1
    for name in ("latency_by_batch", "speedup_by_batch", "metric_by_speed", "exits"):
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_hardware_is_told_of_every_device_and_threads_are_told_row_by_row(tmp_path):
    write_benchmark([measurement(threads=3), measurement(device="meta", threads=5)], tmp_path)
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(saved["hardware"]) == {"cpu", "meta"}
    assert all("threads" not in one for one in saved["hardware"].values())
    assert [one["threads"] for one in saved["measurements"]] == [3, 5]


def test_the_metric_and_what_the_precision_changed_stand_beside_the_speed():
    line = format_benchmark([measurement()]).splitlines()[-1]
    assert "| 3.00x | 2.80..3.20 | 4.00x | 25% | 2.50 | 0.8750 (-1.25) | 99.0% |" in line
    unknown = format_benchmark([measurement(score=None, score_change=None, agreement=None)]).splitlines()[-1]
    assert "| 2.50 |  |  |  |" in unknown


def test_charts_need_labels_and_exits_to_show(tmp_path):
    write_benchmark([measurement(score=None, score_change=None)], tmp_path)
    assert not (tmp_path / "metric_by_speed.png").exists() and not (tmp_path / "exits.png").exists()


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": [0]}, "`threads` is .0."),
        ({"batch_sizes": [8, 0]}, "`batch_sizes` is"),
        ({"lengths": []}, "`lengths` is"),
        ({"rounds": 1}, "`rounds` is 1"),
        ({"rows": 0}, "`rows` is 0"),
        ({"precisions": ["int4"]}, "`precisions` has .'int4'."),
    ],
)
def test_a_setting_that_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkGrid(**settings)


def test_a_length_or_device_that_is_not_there_is_refused():
    others = (slim(), tiny_bert(), token_rows(4), make_collator(word_tokenizer()))
    with pytest.raises(ValueError, match="`lengths` has 25 tokens, and the models take 24"):
        benchmark(*others, BenchmarkGrid(lengths=[25]))
    with pytest.raises(ValueError, match="Device 'cuda:77' cannot be used here"):
        benchmark(*others, BenchmarkGrid(devices=["cuda:77"], lengths=[0]))


# --- the command


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    slim(num_labels=2).save_pretrained(tmp_path / "slim")
    tiny_bert(num_labels=2).save_pretrained(tmp_path / "teacher")
    word_tokenizer().save_pretrained(tmp_path / "slim")
    sentence_rows(8).to_json(tmp_path / "rows.jsonl")
    sizes = ["--batch_sizes", "2", "--lengths", "0", "--rounds", "2", "--rows", "8"]
    return [str(tmp_path / "slim"), "--validation_file", str(tmp_path / "rows.jsonl"), *sizes]


def test_the_command_prints_the_table_and_stores_the_exits(folders, tmp_path, capsys):
    words = ["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "out"), "--choose_exits"]
    assert main(["benchmark", *folders, *words]) == 0
    out = capsys.readouterr().out
    assert "exits pay" in out and "| slim, early exit |" in out and (tmp_path / "out" / "benchmark.json").exists()
    assert "checked_exits" in json.loads((tmp_path / "slim" / "config.json").read_text())["exit_config"]


def test_the_commands_own_lengths_are_those_that_the_model_takes(folders, tmp_path):
    at = folders.index("--lengths")
    words = ["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "out")]
    assert main(["benchmark", *folders[:at], *folders[at + 2 :], *words]) == 0
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert {row["length"] for row in found["measurements"]} == {0}


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "Give --teacher, or --choose_exits"), (["--choose_exits", "--threads", "0"], "`--threads`")],
)
def test_a_mistake_in_the_call_is_named(folders, capsys, words, message):
    assert main(["benchmark", *folders, *words]) == 1
    assert message in capsys.readouterr().err
