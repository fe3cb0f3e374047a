"""Efficiency: our counts against torch's own counter, built models and numbers worked by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig

from hf_costeff.configuration_costeff import CostEffConfig
from hf_costeff.efficiency import (
    Latency,
    checkpoint_bytes,
    count_parameters,
    cumulative_flops,
    embedding_flops,
    exit_head_flops,
    full_depth_flops,
    layer_flops,
    mean_flops,
    measure_alternating,
    measure_latency,
    parameter_count,
    ratio,
    stock_flops,
)
from hf_costeff.exit_criteria import ExitConfig
from hf_costeff.modeling_costeff import CostEffForSequenceClassification

SEQ = 11
UNEVEN = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": [3, 0, 1, 2, 0],
    "attention_head_size": 8,
    "intermediate_size": [7, 16, 0, 1, 0],
    "max_position_embeddings": 20,
    "num_labels": 3,
}
CONFIGS = {
    "uneven widths, zero heads and neurons": UNEVEN,
    "factorised embedding": UNEVEN | {"embedding_rank": 5},
    "some exits": UNEVEN | {"exit_layers": [2, 5]},
    "no token types": UNEVEN | {"type_vocab_size": 0, "embedding_rank": 24},
    "linear gates": UNEVEN | {"skip_gates": "linear"},
    "attention gates": UNEVEN | {"skip_gates": "attention", "gate_size": 6},
    "attention heads": UNEVEN | {"exit_head": "attention", "exit_head_size": 8, "exit_layers": [2, 5]},
}
all_configs = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())

SLIM_BERT = {"num_attention_heads": 2, "intermediate_size": 256, "embedding_rank": 128}


def build(config: CostEffConfig, skipped: Sequence[int] = ()) -> CostEffForSequenceClassification:
    """A model whose gates skip these layers and no other."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"  # torch's counter sees the attention products as plain matrix products
    model = CostEffForSequenceClassification(config).eval().requires_grad_(False)
    for layer, gate in enumerate(model.costeff.gates, start=1):
        gate.decision.bias.fill_(9.0 if layer in skipped else -9.0)
    return model


def counted_flops(function) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@all_configs
def test_forward_flops_equal_torchs_count_exactly(settings: dict) -> None:
    config = CostEffConfig(**settings)
    model = build(config)
    input_ids = torch.ones(1, SEQ, dtype=torch.long)
    assert full_depth_flops(config, SEQ, all_exits=True) == counted_flops(lambda: model(input_ids))


@all_configs
def test_predict_at_full_depth_runs_the_last_head_alone(settings: dict) -> None:
    config = CostEffConfig(**settings)
    model = build(config)
    input_ids = torch.ones(1, SEQ, dtype=torch.long)
    assert full_depth_flops(config, SEQ) == counted_flops(lambda: model.predict(input_ids, early_exit=False))


@pytest.mark.parametrize("checked", [None, [2, 4], [3, 5], []])
def test_a_row_that_leaves_costs_what_torch_counts_up_to_its_exit(checked: list[int] | None) -> None:
    config = CostEffConfig(**UNEVEN, embedding_rank=5)
    model = build(config)
    input_ids = torch.ones(1, SEQ, dtype=torch.long)
    spent = cumulative_flops(config, SEQ, checked)
    for leave_at in config.exit_layers if checked is None else {*checked, 5}:
        threshold = [1.0 if layer == leave_at else 1e-9 for layer in config.exit_layers]
        settings = ExitConfig(threshold=threshold, checked_exits=checked)
        assert int(model.predict(input_ids, early_exit=settings).exit_layer) == leave_at
        assert spent[leave_at - 1] == counted_flops(lambda s=settings: model.predict(input_ids, early_exit=s))


@pytest.mark.parametrize("skipped", [[], [1], [2, 3], [5], [1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("form", ["linear gates", "attention gates"])
def test_a_row_that_skips_layers_costs_what_torch_counts(form: str, skipped: list[int]) -> None:
    config = CostEffConfig(**CONFIGS[form], exit_head="attention", exit_head_size=8)
    model, input_ids = build(config, skipped), torch.ones(1, SEQ, dtype=torch.long)
    for checked in ([], [2, 4], [1, 2, 3, 4]):
        never = ExitConfig(threshold=1e-9, checked_exits=checked)
        found = model.predict(input_ids, early_exit=never)
        counted = counted_flops(lambda s=never: model.predict(input_ids, early_exit=s))
        assert cumulative_flops(config, SEQ, checked, skipped)[-1] == counted
        assert mean_flops(config, found.exit_layer, SEQ, checked, found.skipped_layers) == counted
        counted = counted_flops(lambda s=never: model.predict(input_ids, early_exit=s, skip_layers=False))
        assert cumulative_flops(config, SEQ, checked, None)[-1] == mean_flops(config, [5], SEQ, checked) == counted


def test_rows_on_paths_of_their_own_cost_what_torch_counts() -> None:
    config = CostEffConfig(**CONFIGS["attention gates"])
    model, checked = build(config, [2]), [1, 2, 3, 4]
    for gate in model.costeff.gates:
        gate.decision.weight.normal_()
        gate.decision.bias.zero_()
    rows = torch.randint(1, 40, (12, SEQ), generator=torch.Generator().manual_seed(0))
    settings = ExitConfig(threshold=0.999, checked_exits=checked)
    found = model.predict(rows, early_exit=settings)
    counted = sum(counted_flops(lambda r=row: model.predict(r[None], early_exit=settings)) for row in rows)
    assert mean_flops(config, found.exit_layer, SEQ, checked, found.skipped_layers) == counted / 12
    assert len({tuple(path) for path in found.skipped_layers.tolist()}) > 2 and len(set(found.exit_layer.tolist())) > 1


def test_padding_counts_as_run() -> None:
    config = CostEffConfig(**UNEVEN)
    model = build(config)
    input_ids = torch.ones(2, SEQ, dtype=torch.long)
    mask = torch.tensor([[1] * SEQ, [1] * 4 + [0] * (SEQ - 4)])
    assert 2 * full_depth_flops(config, SEQ, all_exits=True) == counted_flops(lambda: model(input_ids, mask))


@all_configs
def test_parameters_from_the_config_equal_a_built_models(settings: dict) -> None:
    config = CostEffConfig(**settings)
    assert parameter_count(config) == count_parameters(build(config))


def test_a_shared_tensor_is_counted_once() -> None:
    first, second = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 6


def test_bert_base_at_one_eighth_has_the_published_sizes() -> None:
    config = CostEffConfig(**SLIM_BERT)
    assert parameter_count(config) == 13_920_024
    # V e + e H + 514 H + 2 H + 12 layers + 12 heads, written out
    layer = 4 * 128 * 768 + 3 * 128 + 768 + 2 * 768 * 256 + 256 + 768 + 4 * 768
    assert parameter_count(config) == 30522 * 128 + 128 * 768 + 514 * 768 + 2 * 768 + 12 * layer + 12 * (768 * 2 + 2)
    assert round(stock_flops(BertConfig(), 128) / 1e9, 2) == 22.35
    assert round(stock_flops(BertConfig(), 128) / full_depth_flops(config, 128), 2) == 8.79


def test_bert_base_at_full_width_has_the_published_size() -> None:
    assert round(parameter_count(CostEffConfig()) / 1e6, 2) == 108.91


STOCK = {
    "bert": BertConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20),
    "roberta": RobertaConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20),
    "distilbert": DistilBertConfig(dim=24, n_heads=3, n_layers=2, hidden_dim=20),
    "electra": ElectraConfig(
        hidden_size=24, embedding_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20
    ),
}


@pytest.mark.parametrize("family", STOCK)
def test_stock_flops_equal_torchs_count_of_the_stock_classifier(family: str) -> None:
    config = STOCK[family]
    config.num_labels = 3
    model = (
        AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    )
    input_ids = torch.full((1, SEQ), 7)
    assert stock_flops(config, SEQ) == counted_flops(lambda: model(input_ids))


def test_parts_worked_by_hand() -> None:
    config = CostEffConfig(**UNEVEN, embedding_rank=5)
    assert embedding_flops(config, 10) == 2 * 10 * 5 * 24
    assert exit_head_flops(config, 7) == 2 * 24 * 3
    # layer 3: one head of 8, no neurons: q, k, v, output, then two products of 10 x 10 x 8
    assert layer_flops(config, 3, 10) == 2 * (4 * 10 * 24 * 8 + 2 * 10 * 10 * 8)
    # layer 2: no heads, 16 neurons
    assert layer_flops(config, 2, 10) == 2 * (2 * 10 * 24 * 16)
    assert layer_flops(config, 5, 10) == 0
    assert embedding_flops(CostEffConfig(**UNEVEN), 10) == 0


def test_mean_of_early_exits_worked_by_hand() -> None:
    # hidden 4, no heads, one neuron per layer: a layer costs 2 * S * 4 * 2 = 16 S, a head (1 label) 2 * 4 = 8
    config = CostEffConfig(hidden_size=4, num_hidden_layers=3, num_attention_heads=0, intermediate_size=1, num_labels=1)
    assert cumulative_flops(config, 10) == [168, 336, 504]
    assert cumulative_flops(config, 10, [2]) == [160, 328, 496]
    assert cumulative_flops(config, 10, []) == [160, 320, 488]
    # rows: leaves at 1 with 10 tokens: 168; at 3 with 5 tokens: 3 * 88; at 2 with 1 token: 2 * 24
    expected = (168 + 264 + 48) / 3
    assert mean_flops(config, [1, 3, 2], [10, 5, 1]) == expected
    assert mean_flops(config, torch.tensor([1, 3, 2]), torch.tensor([10, 5, 1])) == expected
    assert mean_flops(config, [3, 3], 10, checked_exits=[]) == full_depth_flops(config, 10)
    assert mean_flops(config, [1, 2], 10) == (168 + 336) / 2


def test_checkpoint_bytes_are_close_to_the_file(tmp_path) -> None:
    config = CostEffConfig(**UNEVEN)
    build(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint_bytes(config) <= size <= checkpoint_bytes(config) + 20_000
    assert checkpoint_bytes(config, bytes_per_parameter=2) * 2 == checkpoint_bytes(config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda config: layer_flops(config, 0, 8), r"no layer 0.*1\.\.5"),
        (lambda config: layer_flops(config, 6, 8), r"no layer 6.*1\.\.5"),
        (lambda config: layer_flops(config, 1, 0), "seq_length"),
        (lambda config: cumulative_flops(config, 0), "seq_length"),
        (lambda config: cumulative_flops(config, 8, [9]), r"\[9\].*have no exit"),
        (lambda config: mean_flops(config, [0, 1], 8), r"0\.\.1.*1\.\.5"),
        (lambda config: mean_flops(config, [1, 6], 8), r"1\.\.6.*1\.\.5"),
        (lambda config: mean_flops(config, [1, 5], 8, None, torch.zeros(2, 3)), r"\(2, 3\).*must be \(2, 5\)"),
        (lambda config: mean_flops(config, [1, 2], [8]), "one entry per row"),
        (lambda config: mean_flops(config, [], []), "at least one row"),
        (lambda config: measure_latency(int, repeats=0), "repeats"),
        (lambda config: measure_latency(int, warmup=-1), "warmup"),
    ],
)
def test_values_out_of_range_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(CostEffConfig(**UNEVEN))


def test_latency_is_the_median_and_the_nearest_rank_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    costs_ms = iter([500.0, 500.0, 1000.0, *range(19, 0, -1)])  # two warm-up calls, an outlier, then 19, 18, ..., 1 ms

    def work() -> None:
        nonlocal now
        now += next(costs_ms) / 1e3

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    latency = measure_latency(work, warmup=2, repeats=20)
    assert latency.repeats == 20
    assert latency.median_ms == pytest.approx(10.5)
    assert latency.p95_ms == pytest.approx(19.0)


def test_candidates_are_called_in_turn() -> None:
    calls: list[str] = []
    names = ("a", "b", "c")
    functions = {name: lambda name=name: calls.append(name) for name in names}
    result = measure_alternating(functions, warmup=1, repeats=2)
    assert "".join(calls) == "abc" * 3
    assert list(result) == ["a", "b", "c"]
    assert all(isinstance(latency, Latency) and latency.repeats == 2 for latency in result.values())


def test_a_slower_candidate_measures_slower() -> None:
    result = measure_alternating({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, warmup=0, repeats=3)
    assert result["slow"].median_ms >= 20 > result["fast"].median_ms


def test_another_clock_counts_what_it_counts():
    """Sleeping takes no processor time."""
    functions = {"asleep": lambda: time.sleep(0.05), "awake": lambda: sum(range(200_000))}
    found = measure_alternating(functions, warmup=0, repeats=3, clock=time.process_time)
    assert found["asleep"].median_ms < found["awake"].median_ms
    assert len(found["awake"].times_ms) == 3 and found["awake"].median_ms in found["awake"].times_ms


def test_a_ratio_is_taken_round_by_round():
    slowed = ratio([1.0, 10.0, 3.0, 4.0, 5.0], [1.0, 10.0, 1.5, 1.0, 1.0])
    assert (slowed.median, slowed.lower_quartile, slowed.upper_quartile) == (2.0, 1.0, 4.0)
    assert str(ratio([3.0], [2.0])) == "1.50 (1.50 to 1.50)"
