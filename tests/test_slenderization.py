"""Surgery against masking, the factorisation against torch's SVD, schedules and budgets against the paper and loops."""

from __future__ import annotations

import copy
import itertools
from math import prod

import pytest
import torch

from helpers import random_batch, tiny_model
from hf_costeff import CostEffConfig, CostEffForSequenceClassification, ExitConfig
from hf_costeff.efficiency import count_parameters, full_depth_flops
from hf_costeff.importance import Importance
from hf_costeff.slenderization import (
    Budget,
    SlenderizationPlan,
    Widths,
    check_widths,
    describe_widths,
    factorize_embedding,
    iterative_schedule,
    slenderize,
    solve_widths,
)

BATCH = random_batch([7, 3, 11, 5])
HEAD_SIZE = 4


def full_model(**changes):
    """Three heads and twelve neurons in each of three layers."""
    return tiny_model(**{"num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 12, **changes})


def random_plan(model, seed: int = 0, embedding_rank: int | None = None) -> SlenderizationPlan:
    """About half of the units of each layer, whatever their number."""
    generator = torch.Generator().manual_seed(seed)

    def masks(widths):
        return tuple(tuple((torch.rand(width, generator=generator) > 0.5).tolist()) for width in widths)

    config = model.config
    return SlenderizationPlan(masks(config.num_attention_heads), masks(config.intermediate_size), embedding_rank)


def masked(model, plan: SlenderizationPlan):
    """A copy of the full model in which every removed unit's output weights are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, heads, neurons in zip(model.costeff.layers, plan.head_mask, plan.neuron_mask, strict=True):
            for head, keep in enumerate(heads):
                if not keep:
                    layer.attention.output.weight[:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE] = 0
            for neuron, keep in enumerate(neurons):
                if not keep:
                    layer.feed_forward.output.weight[:, neuron] = 0
    return model


def assert_same_answers(found, expected, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        outputs, wanted = (model(**BATCH, output_hidden_states=True) for model in (found, expected))
    real = BATCH["attention_mask"].bool()
    for ours, theirs in zip(outputs.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(outputs.exit_logits, wanted.exit_logits, rtol=tolerance, atol=tolerance)


def keep_all(model, embedding_rank: int | None = None) -> SlenderizationPlan:
    config = model.config
    return SlenderizationPlan(
        tuple((True,) * heads for heads in config.num_attention_heads),
        tuple((True,) * neurons for neurons in config.intermediate_size),
        embedding_rank,
    )


# --- surgery


PLANS = {
    "uneven": (
        ((True, False, True), (False, True, False), (True, True, True)),
        ((True, False) * 6, (False, False, True) * 4, (True,) * 12),
    ),
    "no heads in one layer": (
        ((False,) * 3, (True, True, False), (False, False, True)),
        ((True,) * 12, (True, False) * 6, (False, True) * 6),
    ),
    "no neurons in one layer": (
        ((True, True, False), (False, True, True), (True, False, False)),
        ((True, True, False) * 4, (False,) * 12, (False, True) * 6),
    ),
    "nothing but biases": (((False,) * 3,) * 3, ((False,) * 12,) * 3),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PLANS)
def test_removing_equals_masking(name, attention):
    model, plan = full_model(), SlenderizationPlan(*PLANS[name])
    model.set_attn_implementation(attention)
    slim = slenderize(model, plan)
    assert slim.config.num_attention_heads == [sum(mask) for mask in plan.head_mask]
    assert slim.config.intermediate_size == [sum(mask) for mask in plan.neuron_mask]
    assert slim.config._attn_implementation == attention
    assert_same_answers(slim, masked(model, plan))


@pytest.mark.parametrize("seed", range(3))
def test_removing_equals_masking_in_a_model_that_is_uneven_and_factorised_already(seed):
    model = tiny_model(embedding_rank=6)
    plan = random_plan(model, seed)
    assert_same_answers(slenderize(model, plan), masked(model, plan))


def test_another_plan_gives_another_model():
    model = full_model()
    first, second = (slenderize(model, random_plan(model, seed)) for seed in (0, 1))
    with pytest.raises(AssertionError):
        assert_same_answers(first, second)


@pytest.mark.parametrize("embedding_rank", [None, 6])
def test_slenderizing_to_the_present_widths_is_the_identity(embedding_rank):
    model = tiny_model(embedding_rank=embedding_rank)
    slim = slenderize(model, keep_all(model, embedding_rank))
    assert slim.config.to_dict() == model.config.to_dict()
    state = slim.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_slenderizing_twice_equals_once_with_the_final_plan():
    model = full_model()
    first = random_plan(model, 3)
    halfway = slenderize(model, first)
    second = random_plan(halfway, 4)

    def composed(early, late):
        """Of what the first plan kept, what the second kept."""
        masks = []
        for before, after in zip(early, late, strict=True):
            left = iter(after)
            masks.append(tuple(keep and next(left) for keep in before))
        return tuple(masks)

    at_once = SlenderizationPlan(
        composed(first.head_mask, second.head_mask), composed(first.neuron_mask, second.neuron_mask)
    )
    twice, once = slenderize(halfway, second), slenderize(model, at_once)
    assert twice.config.to_dict() == once.config.to_dict()
    assert all(torch.equal(twice.state_dict()[name], tensor) for name, tensor in once.state_dict().items())


def test_the_source_model_stays_untouched_and_shares_no_memory():
    model = full_model(exit_config=ExitConfig(threshold=0.5).to_dict())
    config, before = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slim = slenderize(model, random_plan(model, embedding_rank=5))
    assert slim.config.exit_config is None  # thresholds belong to the wider model
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.fill_(7.0)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dtype_mode_exits_and_labels_come_along():
    model = full_model(exit_layers=[2, 3], exit_pooling="mean", id2label={0: "bad", 1: "so-so", 2: "good"})
    slim = slenderize(model.to(torch.bfloat16).train(), random_plan(model, embedding_rank=5))
    assert slim.training and slim.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in slim.parameters())
    assert slim.config.exit_layers == [2, 3] and slim.config.exit_pooling == "mean"
    assert slim.config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert not slenderize(model.eval(), random_plan(model)).training


def test_a_slim_model_reloads_from_its_config_alone(tmp_path):
    model = full_model()
    slim = slenderize(model, SlenderizationPlan(*PLANS["uneven"], embedding_rank=5))
    slim.save_pretrained(tmp_path)
    assert_same_answers(CostEffForSequenceClassification.from_pretrained(tmp_path), slim, tolerance=0)


@pytest.mark.parametrize(
    ("heads", "neurons"),
    [(((True,) * 3,) * 3, ((True,) * 11,) * 3), (((True,) * 2,) * 3, ((True,) * 12,) * 3), (((True,) * 3,) * 2, ())],
)
def test_a_plan_for_other_widths_is_refused(heads, neurons):
    with pytest.raises(ValueError, match=r"The plan covers heads .* the model has \(3, 3, 3\) and \(12, 12, 12\)"):
        slenderize(full_model(), SlenderizationPlan(heads, neurons))


def test_a_plan_is_frozen():
    with pytest.raises(AttributeError):
        keep_all(full_model()).embedding_rank = 3


# --- the embedding


def embedding_of(model) -> torch.Tensor:
    """The whole (vocab, hidden) table a model looks words up in."""
    embeddings = model.costeff.embeddings
    matrix = embeddings.word_embeddings.weight
    return (matrix if embeddings.projection is None else matrix @ embeddings.projection.weight.T).detach()


def best_approximation(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_factorisation_is_the_best_approximation_of_its_rank(rank):
    matrix = torch.randn(41, 12, generator=torch.Generator().manual_seed(0))
    factor, projection = factorize_embedding(matrix, rank)
    assert factor.shape == (41, rank) and projection.shape == (12, rank)
    torch.testing.assert_close(factor @ projection.T, best_approximation(matrix, rank), rtol=1e-5, atol=1e-5)


def test_full_rank_reproduces_every_answer():
    model = full_model()
    assert_same_answers(slenderize(model, keep_all(model, embedding_rank=12)), model)


def test_a_lower_rank_replaces_the_embedding_alone_by_its_truncated_svd():
    model = full_model()
    slim = slenderize(model, keep_all(model, embedding_rank=5))
    torch.testing.assert_close(embedding_of(slim), best_approximation(embedding_of(model), 5), rtol=1e-5, atol=1e-5)
    before = {name: tensor for name, tensor in model.state_dict().items() if "word_embeddings" not in name}
    assert all(torch.equal(slim.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_factorised_embedding_is_factorised_anew_from_the_product():
    model = full_model(embedding_rank=8)
    slim = slenderize(model, keep_all(model, embedding_rank=3))
    torch.testing.assert_close(embedding_of(slim), best_approximation(embedding_of(model), 3), rtol=1e-5, atol=1e-5)


def test_two_truncations_equal_the_smaller_one():
    model = full_model()
    twice = slenderize(slenderize(model, keep_all(model, 9)), keep_all(model, 4))
    torch.testing.assert_close(embedding_of(twice), best_approximation(embedding_of(model), 4), rtol=1e-5, atol=1e-5)


def test_weighing_rows_reaches_the_lowest_possible_weighted_error():
    """The optimum is the tail of the singular values of sqrt(weight) * matrix (Eckart and Young)."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(41, 12, generator=generator)
    weights = torch.rand(41, generator=generator) ** 4 * 100
    weights[:5] = 0  # tokens that never occur

    def weighted_error(factors):
        return (weights[:, None] * (matrix - factors[0] @ factors[1].T) ** 2).sum().item()

    tail = torch.linalg.svdvals(weights.sqrt()[:, None].double() * matrix.double())[5:]
    lowest = tail.square().sum().item()
    found = weighted_error(factorize_embedding(matrix, 5, weights))
    assert found == pytest.approx(lowest, rel=1e-4)
    assert found < 0.9 * weighted_error(factorize_embedding(matrix, 5))


def test_equal_weights_change_nothing():
    matrix = torch.randn(41, 12, generator=torch.Generator().manual_seed(2))
    plain, weighted = (factorize_embedding(matrix, 5, weights) for weights in (None, torch.full((41,), 3)))
    torch.testing.assert_close(weighted[0] @ weighted[1].T, plain[0] @ plain[1].T, rtol=1e-5, atol=1e-5)


def test_slenderizing_uses_the_weights_of_the_tokens():
    model = full_model()
    weights = torch.ones(41)
    weights[7] = 1e6
    slim = slenderize(model, keep_all(model, embedding_rank=2), token_weights=weights)
    torch.testing.assert_close(embedding_of(slim)[7], embedding_of(model)[7], rtol=1e-3, atol=1e-3)


# --- plans


def importance(heads: list[list[float]], neurons: list[list[float]]) -> Importance:
    return Importance(tuple(map(torch.tensor, heads)), tuple(map(torch.tensor, neurons)))


def test_the_best_units_of_each_layer_stay_in_their_order():
    scores = importance([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]], [[5.0, 1.0, 4.0, 2.0], [0.0, 0.0, 9.0, 1.0]])
    plan = SlenderizationPlan.by_layer(scores, Widths((2, 1), (3, 2), 7))
    assert plan.head_mask == ((False, True, True), (True, False, False))
    assert plan.neuron_mask == ((True, False, True, True), (False, False, True, True))
    assert (plan.num_attention_heads, plan.intermediate_size, plan.embedding_rank) == ((2, 1), (3, 2), 7)


def test_of_equal_units_the_first_stay():
    scores = importance([[1.0, 1.0, 1.0]], [[2.0, 2.0, 2.0, 2.0]])
    plan = SlenderizationPlan.by_layer(scores, Widths((2,), (3,), None))
    assert plan.head_mask == ((True, True, False),)
    assert plan.neuron_mask == ((True, True, True, False),)


def test_across_layers_the_totals_stay_and_the_best_of_the_model_are_kept():
    generator = torch.Generator().manual_seed(0)
    heads = [torch.rand(4, generator=generator).tolist() for _ in range(3)]
    heads[1] = [9.0, 8.0, 7.0, 6.0]  # one layer that matters more than all others
    neurons = [torch.rand(10, generator=generator).tolist() for _ in range(3)]
    plan = SlenderizationPlan.across_layers(importance(heads, neurons), Widths.even(3, 2, 5, None))
    assert sum(plan.num_attention_heads) == 3 * 2 and sum(plan.intermediate_size) == 3 * 5
    assert plan.num_attention_heads[1] == 4
    for scores, masks, total in ((heads, plan.head_mask, 6), (neurons, plan.neuron_mask, 15)):
        best = sorted(itertools.chain.from_iterable(scores), reverse=True)[:total]
        pairs = zip(itertools.chain.from_iterable(scores), itertools.chain.from_iterable(masks), strict=True)
        kept = [score for score, keep in pairs if keep]
        assert sorted(kept, reverse=True) == best


def test_an_uneven_plan_builds_and_costs_what_the_even_one_costs():
    model = full_model()
    generator = torch.Generator().manual_seed(1)
    scores = importance([torch.rand(3, generator=generator).tolist() for _ in range(3)], [[1.0] * 12, [2.0] * 12, []])
    scores = Importance(scores.head_importance, (*scores.neuron_importance[:2], 3 * torch.ones(12)))
    widths = Widths.even(3, 1, 8, 4)
    even, uneven = (
        slenderize(model, make(scores, widths))
        for make in (SlenderizationPlan.by_layer, SlenderizationPlan.across_layers)
    )
    assert uneven.config.intermediate_size == [0, 12, 12]
    assert count_parameters(uneven) == count_parameters(even)


# --- widths


CONFIG = CostEffConfig(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    attention_head_size=6,
    intermediate_size=40,
    max_position_embeddings=16,
    num_labels=3,
)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (14, r"Cannot keep 14 attention heads in layer 3: it has 12\. `num_attention_heads` must lie in 0\.\.12\."),
        (-1, r"Cannot keep -1 attention heads in layer 3: it has 12\."),
    ],
)
def test_widths_that_are_not_there_are_refused_with_layer_value_and_range(heads, message):
    config = CostEffConfig(num_hidden_layers=3)
    with pytest.raises(ValueError, match=message):
        check_widths(config, Widths((12, 0, heads), (3072, 0, 1), None))


@pytest.mark.parametrize(
    ("widths", "embedding_rank", "message"),
    [
        (
            Widths((4, 4, 4), (40, 41, 40), None),
            None,
            r"Cannot keep 41 neurons in layer 2: it has 40\. `inter.*0\.\.40",
        ),
        (Widths((4, 4), (40, 40, 40), None), None, r"`num_attention_heads` has 2 entries, the model has 3 layers"),
        (Widths.even(3, 4, 40, 25), None, r"`embedding_rank` is 25\. It must lie in 1\.\.24\."),
        (Widths.even(3, 4, 40, 0), None, r"`embedding_rank` is 0\. It must lie in 1\.\.24\."),
        (Widths.even(3, 4, 40, 9), 8, r"`embedding_rank` is 9\. It must lie in 1\.\.8\."),
        (Widths.even(3, 4, 40, None), 8, r"factorised already \(rank 8\)"),
    ],
)
def test_other_widths_out_of_range_are_refused(widths, embedding_rank, message):
    config = copy.deepcopy(CONFIG)
    config.embedding_rank = embedding_rank
    with pytest.raises(ValueError, match=message):
        check_widths(config, widths)


def test_widths_read_from_a_config_give_it_back():
    config = Widths((1, 0, 4), (0, 7, 40), 5).apply_to(CONFIG)
    assert Widths.of(config) == Widths((1, 0, 4), (0, 7, 40), 5)
    assert Widths.of(CONFIG) == Widths.even(3, 4, 40, None)
    assert CONFIG.embedding_rank is None


def test_widths_are_told_in_short_where_all_layers_agree():
    assert describe_widths(Widths((2, 2), (3, 4), None)) == {
        "num_attention_heads": 2,
        "intermediate_size": [3, 4],
        "embedding_rank": None,
    }


# --- the schedule


def test_the_schedule_of_bert_base_has_the_papers_numbers():
    steps = iterative_schedule(CostEffConfig(), Widths.even(12, 2, 256, 128))
    assert [set(step.num_attention_heads) for step in steps] == [{heads} for heads in range(11, 1, -1)]
    neurons = [2790, 2508, 2227, 1945, 1664, 1382, 1100, 819, 537, 256]
    assert [set(step.intermediate_size) for step in steps] == [{width} for width in neurons]
    assert [step.embedding_rank for step in steps] == [704, 640, 576, 512, 448, 384, 320, 256, 192, 128]


@pytest.mark.parametrize("events", [1, 2, 7, 50])
def test_every_schedule_narrows_step_by_step_and_ends_at_the_target(events):
    target = Widths((3, 1, 0), (17, 0, 40), 5)
    steps = [Widths.of(CONFIG), *iterative_schedule(CONFIG, target, events)]
    assert len(steps) == events + 1 and steps[-1] == target
    for before, after in itertools.pairwise(steps):
        pairs = zip(
            (*before.num_attention_heads, *before.intermediate_size, before.embedding_rank or 24),
            (*after.num_attention_heads, *after.intermediate_size, after.embedding_rank),
            strict=True,
        )
        assert all(wide >= narrow for wide, narrow in pairs)


def test_without_a_number_there_is_one_event_per_head_of_the_widest_cut_layer():
    assert len(iterative_schedule(CONFIG, Widths((3, 1, 4), (40, 40, 40), None))) == 3
    assert len(iterative_schedule(CONFIG, Widths.even(3, 4, 8, None))) == 1


def test_an_embedding_that_stays_whole_is_never_factorised_on_the_way():
    steps = iterative_schedule(CONFIG, Widths.even(3, 1, 8, None))
    assert [step.embedding_rank for step in steps] == [None, None, None]


def test_a_schedule_of_no_events_or_to_wider_widths_is_refused():
    with pytest.raises(ValueError, match="`events` is 0"):
        iterative_schedule(CONFIG, Widths.even(3, 1, 8, 4), events=0)
    with pytest.raises(ValueError, match="Cannot keep 5 attention heads in layer 1"):
        iterative_schedule(CONFIG, Widths.even(3, 5, 8, 4))


# --- budgets


def built_parameters(widths: Widths, config: CostEffConfig = CONFIG) -> int:
    with torch.device("meta"):
        return count_parameters(CostEffForSequenceClassification(widths.apply_to(config)))


def all_widths(multiple_of: int = 8, **decided: int) -> list[Widths]:
    """Every even choice: heads 1..4, neurons and rank in multiples, and the whole embedding."""
    heads = [decided["num_attention_heads"]] if "num_attention_heads" in decided else range(1, 5)
    neurons = [decided["intermediate_size"]] if "intermediate_size" in decided else range(multiple_of, 41, multiple_of)
    ranks = [decided["embedding_rank"]] if "embedding_rank" in decided else [*range(multiple_of, 24, multiple_of), None]
    return [Widths.even(3, *choice) for choice in itertools.product(heads, neurons, ranks)]


def proportions(widths: Widths, decided: dict[str, int]) -> tuple[float, float]:
    """(smallest share, product of shares) of what the caller left open."""
    shares = {
        "num_attention_heads": widths.num_attention_heads[0] / 4,
        "embedding_rank": (widths.embedding_rank or 24) / 24,
        "intermediate_size": 2 * widths.intermediate_size[0] / 40,
    }
    open_shares = [share for name, share in shares.items() if name not in decided]
    return min(open_shares), prod(open_shares)


FULL = built_parameters(Widths.of(CONFIG))


@pytest.mark.parametrize("compression", [1, 1.3, 2, 3, 4])
@pytest.mark.parametrize(
    "decided", [{}, {"num_attention_heads": 1}, {"intermediate_size": 16, "embedding_rank": 20}], ids=str
)
def test_a_parameter_budget_is_kept_by_the_built_model_and_no_other_widths_do_better(compression, decided):
    limit = int(FULL / compression)
    fitting = [widths for widths in all_widths(**decided) if built_parameters(widths) <= limit]
    if not fitting:
        with pytest.raises(ValueError, match="cannot be reached"):
            solve_widths(CONFIG, Budget(max_parameters=limit), **decided)
        return
    found = solve_widths(CONFIG, Budget(max_parameters=limit), **decided)
    assert built_parameters(found) <= limit
    assert proportions(found, decided) == pytest.approx(max(proportions(widths, decided) for widths in fitting))
    for name, value in decided.items():
        assert describe_widths(found)[name] == value


def test_a_budget_equal_to_a_models_size_is_met_and_one_parameter_less_is_not():
    widths = Widths.even(3, 2, 16, 16)
    size = built_parameters(widths)
    decided = {"num_attention_heads": 2, "embedding_rank": 16}
    assert solve_widths(CONFIG, Budget(max_parameters=size), **decided) == widths
    assert solve_widths(CONFIG, Budget(max_parameters=size - 1), **decided).intermediate_size == (8, 8, 8)


def test_a_flops_budget_is_kept_at_its_length_and_no_other_widths_do_better():
    limit = full_depth_flops(CONFIG, 12) // 3
    found = solve_widths(CONFIG, Budget(max_flops=limit, seq_length=12))
    costs = {widths: full_depth_flops(widths.apply_to(CONFIG), 12) for widths in all_widths()}
    assert costs[found] <= limit
    best = max(proportions(widths, {}) for widths, cost in costs.items() if cost <= limit)
    assert proportions(found, {}) == pytest.approx(best)


def test_two_budgets_are_kept_at_once():
    budget = Budget(max_parameters=FULL // 2, max_flops=full_depth_flops(CONFIG, 16) // 4, seq_length=16)
    found = solve_widths(CONFIG, budget)
    assert built_parameters(found) <= FULL // 2
    assert full_depth_flops(found.apply_to(CONFIG), 16) <= full_depth_flops(CONFIG, 16) // 4


@pytest.mark.parametrize(
    ("decided", "smallest"),
    [
        ({}, Widths.even(3, 1, 8, 8)),
        ({"num_attention_heads": 3, "embedding_rank": 20}, Widths.even(3, 3, 8, 20)),
        ({"num_attention_heads": 0, "intermediate_size": 0, "embedding_rank": 1}, Widths.even(3, 0, 0, 1)),
    ],
)
def test_a_budget_out_of_reach_says_the_smallest_possible(decided, smallest):
    with pytest.raises(ValueError, match="cannot be reached") as error:
        solve_widths(CONFIG, Budget(max_parameters=FULL // 50), **decided)
    assert f"The budget of {FULL // 50:,} parameters" in str(error.value)
    assert f"the smallest possible is {built_parameters(smallest):,} " in str(error.value)


def test_a_flops_budget_out_of_reach_says_so_in_flops():
    least = full_depth_flops(Widths.even(3, 1, 8, 8).apply_to(CONFIG), 128)
    with pytest.raises(ValueError, match=f"budget of 10 FLOPs per row .* smallest possible is {least:,}"):
        solve_widths(CONFIG, Budget(max_parameters=FULL, max_flops=10))


def test_widths_the_user_fixes_out_of_range_are_refused_before_anything_is_solved():
    with pytest.raises(ValueError, match="Cannot keep 9 attention heads in layer 1: it has 4"):
        solve_widths(CONFIG, Budget(max_parameters=FULL), num_attention_heads=9)


def test_without_a_budget_what_is_not_given_stays():
    assert solve_widths(CONFIG, Budget()) == Widths.of(CONFIG)
    assert solve_widths(CONFIG, Budget(), num_attention_heads=2) == Widths.even(3, 2, 40, None)
    assert solve_widths(CONFIG, Budget(), intermediate_size=5, embedding_rank=7) == Widths.even(3, 4, 5, 7)


@pytest.mark.parametrize("decided", [{"num_attention_heads": 0}, {"intermediate_size": 0}], ids=str)
def test_a_model_without_heads_or_neurons_still_gets_the_widest_rest(decided):
    limit = FULL // 2
    found = solve_widths(CONFIG, Budget(max_parameters=limit), **decided)
    fitting = [widths for widths in all_widths(**decided) if built_parameters(widths) <= limit]
    assert proportions(found, decided) == pytest.approx(max(proportions(widths, decided) for widths in fitting))


def test_bert_base_at_an_eighth_is_nearly_the_papers_model():
    config = CostEffConfig()
    limit = 109_483_778 // 8  # BertForSequenceClassification of two labels
    found = solve_widths(config, Budget(max_parameters=limit))
    assert found == Widths.even(12, 2, 240, 128)
    assert built_parameters(found, config) <= limit < built_parameters(Widths.even(12, 2, 256, 128), config)
