"""What a cascade costs, against costs added up by hand and against torch's own counter."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, ElectraConfig, ModernBertConfig

from helpers import random_batch, tiny_bert, tiny_config, tiny_model
from hf_costeff import CostEffCascade, CostEffCascadeConfig, ExitConfig
from hf_costeff.cascade_costs import cascade_flops, classifier_flops, member_flops
from hf_costeff.efficiency import cumulative_flops, stock_flops


def test_cumulative_cost_of_a_fixed_length_is_the_papers_formula():
    """S = cost_big / (cost_small + (1 - p) cost_big), for p = share of rows that leave at the small model."""
    small, big = BertConfig(num_hidden_layers=2), BertConfig(num_hidden_layers=12)
    config = CostEffCascadeConfig(members=[small, big])
    leaving, rows = 3, 8
    layers_run = torch.tensor([[2, 0]] * leaving + [[2, 12]] * (rows - leaving))
    mean = float(cascade_flops(config, layers_run, torch.full((rows,), 64)).mean())
    costs = [stock_flops(member, 64) for member in (small, big)]
    assert mean == pytest.approx(costs[0] + (1 - leaving / rows) * costs[1], rel=1e-12)


def test_rows_cost_what_their_own_length_and_inner_exit_cost():
    inner = tiny_config(exit_config=ExitConfig(threshold=0.5, checked_exits=[2]).to_dict())
    config = CostEffCascadeConfig(members=[inner, BertConfig(num_labels=3)])
    found = cascade_flops(config, torch.tensor([[2, 0], [4, 12], [2, 12]]), torch.tensor([5, 9, 9]))
    spent = {length: cumulative_flops(inner, length, [2, 4]) for length in (5, 9)}
    whole = stock_flops(BertConfig(num_labels=3), 9)
    assert found.tolist() == [spent[5][1], spent[9][3] + whole, spent[9][1] + whole]


def test_members_that_read_texts_in_other_lengths_are_counted_by_their_own():
    config = CostEffCascadeConfig(members=[BertConfig(num_hidden_layers=1), BertConfig(num_hidden_layers=2)])
    found = cascade_flops(config, torch.tensor([[1, 2]]), torch.tensor([[4, 7]]))
    assert found.tolist() == [stock_flops(config.members[0], 4) + stock_flops(config.members[1], 7)]


def test_what_a_prediction_ran_is_what_is_counted():
    """Against the operations that torch sees while rows run alone, pooler and heads included."""
    cascade = CostEffCascade.from_members([tiny_bert(seed=2, num_hidden_layers=2), tiny_bert(seed=5)])
    cascade.set_attn_implementation("eager")  # the counter does not know the CPU's own attention
    lengths = [7, 3, 11, 2]
    batch = random_batch(lengths)
    layers_run, counted = [], []
    chances = cascade.members[0](**{**batch, "token_type_ids": None}).logits.softmax(-1)
    threshold = float((-(chances * chances.log()).sum(-1) / math.log(3)).detach().median()) + 1e-4
    for row, length in enumerate(lengths):
        with FlopCounterMode(display=False) as counter:
            alone = cascade.predict(batch["input_ids"][row : row + 1, :length], early_exit=threshold)
        layers_run.append(alone.layers_run)
        counted.append(counter.get_total_flops())
    layers = torch.cat(layers_run)
    assert 0 in layers and int(layers.max()) == 4
    assert cascade_flops(cascade.config, layers, torch.tensor(lengths)).tolist() == counted


def test_at_full_depth_the_exits_of_the_last_member_cost_nothing():
    last = tiny_model(num_attention_heads=2, intermediate_size=16, exit_config=ExitConfig(threshold=0.5).to_dict())
    cascade = CostEffCascade.from_members([tiny_bert(num_hidden_layers=1), last])
    cascade.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        layers = cascade.predict(random_batch([7])["input_ids"], early_exit=False).layers_run
    lengths = torch.tensor([7])
    assert cascade_flops(cascade.config, layers, lengths, full_depth=True).tolist() == [counter.get_total_flops()]
    assert float(cascade_flops(cascade.config, layers, lengths)) > counter.get_total_flops()


@pytest.mark.parametrize("config", [ElectraConfig(num_hidden_layers=2), ModernBertConfig(num_hidden_layers=2)])
def test_other_families_are_counted_by_torch(config):
    config.vocab_size = max(config.vocab_size, 100)
    assert classifier_flops(config, 16) > 2 * 16 * config.num_hidden_layers * 4 * config.hidden_size**2
    assert member_flops(config, [0, 2], torch.tensor([8, 16])).tolist() == [0, classifier_flops(config, 16)]


def test_a_model_of_ours_costs_its_last_exit_alone():
    model = tiny_model()
    assert classifier_flops(model.config, 8) == cumulative_flops(model.config, 8, [])[-1]


def test_shapes_that_do_not_fit_are_refused():
    config = CostEffCascadeConfig(members=[BertConfig(), BertConfig()])
    for layers, lengths in ((torch.ones(2, 3), [1, 1]), (torch.ones(2, 2), [1]), (torch.ones(0, 2), [])):
        with pytest.raises(ValueError, match="Give what `predict` returned"):
            cascade_flops(config, layers.long(), torch.tensor(lengths))
