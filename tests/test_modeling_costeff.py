from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

import hf_costeff
from helpers import TINY, random_batch, select_rows, tiny_config, tiny_model
from hf_costeff import CostEffForSequenceClassification, CostEffModel, ExitConfig
from hf_costeff.exit_criteria import CRITERIA, probabilities, simulate_exits
from hf_costeff.exit_heads import LinearExitHead
from hf_costeff.modeling_costeff import inference

LENGTHS = [7, 3, 11, 2, 9, 5, 11, 4, 6, 2, 8, 10]
ATTENTION = ["eager", "sdpa"]


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def plain_model(model: CostEffModel, tokens: list[int], types: list[int]) -> tuple[list, list]:
    """Hidden states (layers + 1, each seq x hidden) and exit logits of one unpadded row, written from the paper."""
    weights, config = model.state_dict(), model.config

    def linear(vector, name):
        return weights[f"{name}.weight"] @ vector + weights[f"{name}.bias"]

    def norm(vector, name):
        centred = vector - vector.mean()
        scaled = centred / (centred.pow(2).mean() + config.layer_norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(rows, layer, heads):
        prefix, size = f"layers.{layer}.attention", config.attention_head_size
        fused = [linear(row, f"{prefix}.query_key_value") for row in rows]
        mixed = []
        for query_row in fused:
            context = [torch.zeros(0)]
            for head in range(heads):
                parts = [slice((part * heads + head) * size, (part * heads + head + 1) * size) for part in range(3)]
                scores = torch.stack([query_row[parts[0]] @ row[parts[1]] for row in fused]) / math.sqrt(size)
                context.append(sum(share * row[parts[2]] for share, row in zip(scores.softmax(0), fused, strict=True)))
            mixed.append(linear(torch.cat(context), f"{prefix}.output"))
        return mixed

    rows = []
    for position, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        row = weights["embeddings.word_embeddings.weight"][token]
        if config.embedding_rank is not None:
            row = weights["embeddings.projection.weight"] @ row
        row = row + weights["embeddings.position_embeddings.weight"][position + config.position_offset]
        if config.type_vocab_size:
            row = row + weights["embeddings.token_type_embeddings.weight"][kind]
        rows.append(norm(row, "embeddings.norm"))
    hidden_states, exit_logits = [torch.stack(rows)], []
    for layer, heads in enumerate(config.num_attention_heads):
        mixed = attend(rows, layer, heads)
        rows = [norm(row + new, f"layers.{layer}.attention_norm") for row, new in zip(rows, mixed, strict=True)]
        for index, row in enumerate(rows):
            neurons = F.gelu(linear(row, f"layers.{layer}.feed_forward.intermediate"))
            new = linear(neurons, f"layers.{layer}.feed_forward.output")
            rows[index] = norm(row + new, f"layers.{layer}.feed_forward_norm")
        hidden_states.append(torch.stack(rows))
        if layer + 1 in config.exit_layers:
            exit_logits.append(linear(rows[0].tanh(), f"exits.{layer + 1}.classifier"))
    return hidden_states, exit_logits


# Forward


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embedding_rank": 5, "exit_layers": [2, 4]},
        {"type_vocab_size": 0, "position_offset": 2, "pad_token_id": 1},
        {"num_attention_heads": 0, "intermediate_size": 0, "exit_layers": [4]},
    ],
    ids=["uneven", "factorised", "roberta positions", "biases only"],
)
@torch.no_grad()
def test_the_model_equals_a_hand_written_loop_row_by_row_without_padding(changes, attention):
    model = tiny_model(model_class=CostEffModel, attn_implementation=attention, **changes)
    batch = random_batch([5, 1, 3], pad_token_id=model.config.pad_token_id)
    outputs = model(**batch, output_hidden_states=True)
    assert len(outputs.exit_logits) == len(model.config.exit_layers)
    for row, length in enumerate([5, 1, 3]):
        tokens, types = batch["input_ids"][row, :length].tolist(), batch["token_type_ids"][row, :length].tolist()
        hidden_states, exit_logits = plain_model(model, tokens, types)
        for found, expected in zip(outputs.hidden_states, hidden_states, strict=True):
            assert_close(found[row, :length], expected)
        for found, expected in zip(outputs.exit_logits, exit_logits, strict=True):
            assert_close(found[row], expected)


@torch.no_grad()
def test_eager_and_sdpa_attention_agree():
    batch = random_batch(LENGTHS)
    eager, sdpa = (tiny_model(attn_implementation=name)(**batch, output_hidden_states=True) for name in ATTENTION)
    real = batch["attention_mask"].bool()
    for one, other in zip(eager.hidden_states, sdpa.hidden_states, strict=True):
        assert_close(one[real], other[real])
    assert_close(torch.stack(eager.exit_logits), torch.stack(sdpa.exit_logits))


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_an_all_padding_row_is_finite_and_changes_no_other_row(attention):
    model = tiny_model(attn_implementation=attention)
    batch = random_batch([4, 6, 3])
    alone = model(**select_rows(batch, [0, 2])).logits
    batch["attention_mask"][1] = 0
    together = model(**batch).logits
    assert together.isfinite().all()
    assert_close(together[[0, 2]], alone)


@torch.no_grad()
def test_optional_inputs_have_the_usual_defaults():
    model = tiny_model()
    ids = random_batch([6, 6])["input_ids"]
    expected = model(ids).logits
    assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, expected)
    assert_close(model(ids, token_type_ids=torch.zeros_like(ids)).logits, expected)
    assert_close(model(ids, position_ids=torch.arange(6)[None]).logits, expected)
    assert not torch.allclose(model(ids, position_ids=torch.arange(6).flip(0)[None]).logits, expected, atol=1e-2)


@torch.no_grad()
def test_a_model_without_token_types_ignores_them():
    model = tiny_model(type_vocab_size=0)
    batch = random_batch([6, 4])
    with_types = model(**batch).logits
    del batch["token_type_ids"]
    assert torch.equal(model(**batch).logits, with_types)


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 5])
def test_inputs_embeds_are_what_the_input_embedding_returns(rank):
    model = tiny_model(embedding_rank=rank)
    ids = random_batch([6, 6])["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    assert embeds.shape[-1] == (rank or TINY["hidden_size"])
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match=f"width {rank or 12}"):
        model(inputs_embeds=torch.zeros(1, 3, 4))


def test_exactly_one_kind_of_input_is_required():
    model = tiny_model()
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(torch.ones(1, 2, dtype=torch.long), inputs_embeds=torch.zeros(1, 2, 12))


@pytest.mark.parametrize(("offset", "longest"), [(0, 24), (2, 22)])
def test_too_many_tokens_are_refused_with_the_length_that_fits(offset, longest):
    model = tiny_model(position_offset=offset, pad_token_id=1)
    fits = torch.full((1, longest), 5)
    model(fits)
    model.predict(fits)
    too_long = torch.full((1, longest + 1), 5)
    for run in (model, model.predict):
        with pytest.raises(ValueError, match=rf"{longest + 1} tokens.*max_length={longest}"):
            run(too_long)


@torch.no_grad()
def test_hidden_states_are_the_embedding_output_and_every_layers():
    model = tiny_model(model_class=CostEffModel)
    batch = random_batch([5, 3])
    outputs = model(**batch, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    embedded = model.embeddings(batch["input_ids"], batch["token_type_ids"], None, None)
    assert torch.equal(outputs.hidden_states[0], embedded)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert model(**batch).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 5
    assert model(**batch, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_eager_attention_weights_sum_to_one_over_real_tokens():
    model = tiny_model(attn_implementation="eager")
    batch = random_batch([5, 3])
    attentions = model(**batch, output_attentions=True).attentions
    assert attentions[1] is None  # the layer without heads
    for heads, weights in zip([2, 1, 3], [attentions[0], attentions[2], attentions[3]], strict=True):
        assert weights.shape == (2, heads, 5, 5)
        assert_close(weights.sum(-1), torch.ones(2, heads, 5))
        assert weights[1, :, :, 3:].abs().max() == 0
    assert model(**batch).attentions is None


@torch.no_grad()
def test_return_dict_false_gives_the_same_values_in_a_tuple():
    model = tiny_model()
    batch, labels = random_batch([5, 3]), torch.tensor([0, 2])
    outputs = model(**batch, labels=labels)
    loss, logits, exit_logits = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)
    assert torch.equal(torch.stack(exit_logits), torch.stack(outputs.exit_logits))
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)
    assert model.predict(**batch).logits.shape == (2, 3)


@torch.no_grad()
def test_logits_are_those_of_the_last_exit():
    outputs = tiny_model()(**random_batch([5, 3]))
    assert torch.equal(outputs.logits, outputs.exit_logits[-1])
    assert outputs.loss is None


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_bf16_runs_and_is_close_to_fp32(attention):
    model = tiny_model(attn_implementation=attention)
    batch = random_batch(LENGTHS)
    exact = torch.stack(model(**batch).exit_logits)
    rough = torch.stack(model.bfloat16()(**batch).exit_logits)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.1
    prediction = model.predict(**batch, early_exit=0.9)
    assert prediction.logits.dtype == torch.bfloat16
    assert prediction.logits.isfinite().all()


@pytest.mark.parametrize("padded", [True, False])
def test_the_full_depth_forward_compiles_as_one_graph_without_an_eager_run_before(padded):
    torch.compiler.reset()
    model = tiny_model()
    batch, labels = random_batch([5, 3] if padded else [5, 5]), torch.tensor([0, 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits = compiled(**batch).logits
    assert_close(logits, model(**batch).logits)
    if not padded:
        return
    compiled(**batch, labels=labels).loss.backward()  # with gradient equilibrium
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert_close(gradient, parameter.grad)


# Training


TASKS = {
    "single_label_classification": (3, torch.tensor([0, 2, 1])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])),
    "regression": (1, torch.tensor([0.5, -2.0, 3.0])),
}


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    if problem_type == "single_label_classification":
        return -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
    if problem_type == "multi_label_classification":
        chances = logits.sigmoid()
        return -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean()
    return (logits.squeeze(-1) - labels).pow(2).mean()


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("problem_type", TASKS)
def test_the_loss_is_the_problem_types_loss_summed_over_exits(problem_type, stated):
    num_labels, labels = TASKS[problem_type]
    model = tiny_model(num_labels=num_labels, exit_layers=[1, 3, 4], problem_type=problem_type if stated else None)
    outputs = model(**random_batch([5, 3, 4]), labels=labels)
    assert_close(outputs.loss, sum(plain_loss(logits, labels, problem_type) for logits in outputs.exit_logits))
    assert model.config.problem_type == problem_type


def gradients(model, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


@pytest.mark.parametrize("exit_layers", [None, [2, 4], [1, 2, 4], [4]])
def test_with_gradient_equilibrium_a_layers_gradient_is_the_mean_over_this_and_all_deeper_exits(exit_layers):
    model = tiny_model(exit_layers=exit_layers)
    exit_layers = model.config.exit_layers
    batch, labels = random_batch([5, 3, 4]), torch.tensor([0, 2, 1])

    plain = model(**batch, gradient_equilibrium=False)
    per_exit = {
        layer: gradients(model, plain_loss(logits, labels, "single_label_classification"))
        for layer, logits in zip(exit_layers, plain.exit_logits, strict=True)
    }
    equilibrium = gradients(model, model(**batch, labels=labels).loss)
    summed = gradients(model, model(**batch, labels=labels, gradient_equilibrium=False).loss)

    for name in equilibrium:
        parts = name.removeprefix("costeff.").split(".")
        own_layer = int(parts[1]) + 1 if parts[0] == "layers" else 0
        stacked = torch.stack([per_exit[layer][name] for layer in exit_layers if layer >= own_layer])
        assert_close(summed[name], stacked.sum(0))
        if parts[0] == "exits":
            assert_close(equilibrium[name], per_exit[int(parts[1])][name])
        else:
            assert_close(equilibrium[name], stacked.mean(0))
    assert all(gradient.norm() > 0.01 for gradient in equilibrium.values() if gradient.numel())


@torch.no_grad()
def test_gradient_equilibrium_never_changes_a_result():
    batch = random_batch([5, 3])
    with torch.enable_grad():
        on, off = (tiny_model(gradient_equilibrium=flag)(**batch).exit_logits for flag in (True, False))
    assert torch.equal(torch.stack(on), torch.stack(off))
    assert torch.equal(torch.stack(tiny_model()(**batch).exit_logits), torch.stack(on))


def test_the_config_says_whether_equilibrium_is_on_and_the_argument_overrides_it():
    batch, labels = random_batch([5, 3]), torch.tensor([0, 2])

    def embedding_gradient(config_flag, argument):
        model = tiny_model(gradient_equilibrium=config_flag)
        return gradients(model, model(**batch, labels=labels, gradient_equilibrium=argument).loss)[
            "costeff.embeddings.word_embeddings.weight"
        ]

    on, off = embedding_gradient(True, None), embedding_gradient(False, None)
    assert_close(off, 4 * on)
    assert torch.equal(embedding_gradient(False, True), on)
    assert torch.equal(embedding_gradient(True, False), off)


def test_every_parameter_gets_a_gradient_even_in_layers_without_heads_or_neurons():
    """DistributedDataParallel stops at the first parameter that gets none."""
    model = tiny_model(num_attention_heads=[2, 0, 1, 0], intermediate_size=[0, 0, 4, 4], embedding_rank=5)
    batch = random_batch([5, 3])
    model(**batch, labels=torch.tensor([0, 2])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    batch, labels = random_batch([5, 3]), torch.tensor([0, 2])
    expected = gradients(model, model(**batch, labels=labels).loss)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    runs = []
    model.costeff.layers[2].attention.register_forward_hook(lambda *_: runs.append(1))
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert len(runs) == 2  # once forward, once again backward
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name])


def rows_for_training(count: int) -> list[dict]:
    """Rows of one length whose label is readable from the second token."""
    ids = random_batch([6] * count, seed=1)["input_ids"]
    return [{"input_ids": row, "attention_mask": torch.ones(6).long(), "labels": int(row[1]) % 3} for row in ids]


def train_with_plain_trainer(folder, **arguments) -> Trainer:
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    defaults = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    data = rows_for_training(16)
    args = TrainingArguments(str(folder), **{**defaults, **arguments})
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


def test_a_plain_trainer_trains_it_and_predicts_the_last_exits_logits(tmp_path):
    trainer = train_with_plain_trainer(
        tmp_path, max_steps=25, learning_rate=1e-2, per_device_train_batch_size=8, lr_scheduler_type="constant"
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    predictions = trainer.predict(trainer.eval_dataset).predictions
    ids = torch.stack([row["input_ids"] for row in trainer.eval_dataset])
    assert predictions.shape == (16, 3)
    assert_close(torch.tensor(predictions), trainer.model.eval()(ids).logits.detach())


def test_a_plain_trainer_accumulates_to_the_gradient_of_the_whole_batch(tmp_path):
    def weights(batch_size, steps):
        arguments = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        trainer = train_with_plain_trainer(
            tmp_path,
            max_steps=1,
            learning_rate=0.5,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            **arguments,
        )
        return trainer.model.costeff.layers[0].feed_forward.output.weight.detach()

    whole, accumulated = weights(8, 1), weights(2, 4)
    moved = (whole - tiny_model().costeff.layers[0].feed_forward.output.weight).abs().max()
    assert moved > 1e-3
    assert_close(accumulated, whole)


# Early exit


def boundaries(name: str, exit_logits: torch.Tensor, problem_type: str) -> list[float]:
    """Per exit, the middle of the widest gap among the central measures, so that about half of the rows leave."""
    criterion = CRITERIA[name](ExitConfig(criterion=name, threshold=0.5), exit_logits.shape[1], problem_type)
    found = []
    for index in range(exit_logits.shape[1]):
        central = criterion.measured(exit_logits[:, index], index).sort().values[3:-3]
        widest = int(central.diff().argmax())
        found.append(float(central[widest : widest + 2].mean()))
    return found


def early_exit_cases() -> list:
    cases = []
    for problem_type in ("single_label_classification", "multi_label_classification"):
        for name in ("entropy", "entropy_nats", "confidence", "margin"):
            cases.append((problem_type, {"criterion": name, "threshold": "per exit"}))
        cases.append((problem_type, {"criterion": "entropy", "threshold": "one", "temperatures": [2.0, 0.7, 1.0, 3.0]}))
        cases.append((problem_type, {"criterion": "margin", "threshold": "per exit", "checked_exits": [2, 3]}))
        cases.append((problem_type, {"criterion": "patience", "patience": 1}))
        cases.append((problem_type, {"criterion": "patience", "patience": 2}))
        cases.append((problem_type, {"criterion": "patience", "patience": 1, "checked_exits": [1, 3]}))
    cases.append(("regression", {"criterion": "patience", "patience": 1, "tolerance": 0.5}))
    cases.append(("regression", {"criterion": "patience", "patience": 2, "tolerance": 1.0, "temperatures": 3.0}))
    return cases


def chosen_settings(settings: dict, exit_logits: torch.Tensor, problem_type: str) -> ExitConfig:
    if "threshold" not in settings:
        return ExitConfig(**settings)
    temperatures = torch.tensor(settings.get("temperatures", [1.0] * exit_logits.shape[1]))
    thresholds = boundaries(settings["criterion"], exit_logits / temperatures[None, :, None], problem_type)
    return ExitConfig(**{**settings, "threshold": thresholds if settings["threshold"] == "per exit" else thresholds[0]})


@pytest.mark.parametrize(
    ("problem_type", "settings"), early_exit_cases(), ids=lambda value: value if isinstance(value, str) else None
)
@pytest.mark.parametrize("changes", [{}, {"position_offset": 2, "pad_token_id": 1, "type_vocab_size": 0}])
def test_a_rows_answer_is_its_own_in_any_batch_order_and_size(problem_type, settings, changes):
    model = tiny_model(
        seed=3, problem_type=problem_type, num_labels=1 if problem_type == "regression" else 3, **changes
    )
    pad = model.config.pad_token_id
    batch = random_batch(LENGTHS, seed=5, pad_token_id=pad, width=14)
    with torch.no_grad():
        exit_logits = torch.stack(model(**batch).exit_logits, dim=1)
    settings = chosen_settings(settings, exit_logits, problem_type)
    whole = model.predict(**batch, early_exit=settings)
    assert len(set(whole.exit_layer.tolist())) > 1

    # The replay on stored logits says the same.
    exit_index = simulate_exits(exit_logits, settings, model.config.exit_layers, problem_type)
    assert (whole.exit_layer - 1).tolist() == exit_index.tolist()
    assert_close(whole.logits, exit_logits[torch.arange(len(LENGTHS)), exit_index])

    # Row by row, without any padding.
    for row, length in enumerate(LENGTHS):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items() if name != "attention_mask"}
        prediction = model.predict(**alone, early_exit=settings)
        assert prediction.exit_layer.tolist() == [whole.exit_layer[row]]
        assert_close(prediction.logits[0], whole.logits[row])
        assert_close(prediction.probabilities[0], whole.probabilities[row])

    # Shuffled, and in batches of other sizes.
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0))
    for size in (len(LENGTHS), 5, 2):
        for rows in order.split(size):
            part = model.predict(**select_rows(batch, rows), early_exit=settings)
            assert part.exit_layer.tolist() == whole.exit_layer[rows].tolist()
            assert_close(part.logits, whole.logits[rows])


def test_left_padded_rows_answer_the_same_in_any_batch():
    model = tiny_model(seed=3, position_offset=2, pad_token_id=1)
    right = random_batch(LENGTHS, seed=5, pad_token_id=1)
    left = {
        name: torch.stack([row.roll(len(row) - length) for row, length in zip(tensor, LENGTHS, strict=True)])
        for name, tensor in right.items()
    }
    for settings in (False, 0.8):
        found = model.predict(**left, early_exit=settings)
        for row in range(len(LENGTHS)):
            alone = model.predict(**select_rows(left, [row]), early_exit=settings)
            assert alone.exit_layer.item() == found.exit_layer[row]
            assert_close(alone.logits[0], found.logits[row])


@pytest.mark.parametrize("name", ["entropy", "confidence", "margin"])
def test_a_looser_threshold_never_raises_the_mean_exit_layer(name):
    model, batch = tiny_model(), random_batch(LENGTHS)
    ladder = [step / 10 for step in range(11)]
    layers = [
        model.predict(**batch, early_exit=ExitConfig(criterion=name, threshold=value)).exit_layer
        for value in (ladder if name == "entropy" else ladder[::-1])
    ]
    assert all((looser <= tighter).all() for tighter, looser in itertools.pairwise(layers))
    assert layers[0].tolist() == [4] * len(LENGTHS)
    assert layers[-1].tolist() == [1] * len(LENGTHS)


def test_full_depth_prediction_equals_the_forward():
    model, batch = tiny_model(), random_batch(LENGTHS)
    expected = model(**batch).logits.detach()
    for early_exit in (None, False, 0, 0.0):
        prediction = model.predict(**batch, early_exit=early_exit)
        assert_close(prediction.logits, expected)
        assert prediction.exit_layer.tolist() == [4] * len(LENGTHS)


@pytest.mark.parametrize("everybody", [1, 1.0, 3])
def test_one_or_more_lets_everybody_leave_at_the_first_exit(everybody):
    model, batch = tiny_model(exit_layers=[2, 3, 4]), random_batch(LENGTHS)
    prediction = model.predict(**batch, early_exit=everybody)
    assert prediction.exit_layer.tolist() == [2] * len(LENGTHS)
    assert_close(prediction.logits, model(**batch).exit_logits[0].detach())


def test_true_means_the_saved_settings_and_one_means_a_threshold():
    saved = ExitConfig(criterion="patience", patience=2).to_dict()
    model, batch = tiny_model(exit_config=saved), random_batch(LENGTHS)
    expected = model.predict(**batch, early_exit=ExitConfig.from_dict(saved))
    assert min(expected.exit_layer.tolist()) == 3
    for early_exit in (True, None):
        assert torch.equal(model.predict(**batch, early_exit=early_exit).exit_layer, expected.exit_layer)
    assert model.predict(**batch, early_exit=1).exit_layer.tolist() == [1] * len(LENGTHS)
    assert model.predict(**batch, early_exit=False).exit_layer.tolist() == [4] * len(LENGTHS)


def test_true_without_saved_settings_names_calibrate():
    with pytest.raises(ValueError, match="hf-costeff calibrate"):
        tiny_model().predict(**random_batch([3]), early_exit=True)


def test_saved_temperatures_and_checked_exits_apply_to_a_number_too():
    saved = ExitConfig(threshold=0.1, temperatures=[0.5, 2.0, 1.0, 1.0], checked_exits=[2, 3]).to_dict()
    model, batch = tiny_model(exit_config=saved), random_batch(LENGTHS)
    found = model.predict(**batch, early_exit=0.7)
    same = ExitConfig(threshold=0.7, temperatures=[0.5, 2.0, 1.0, 1.0], checked_exits=[2, 3])
    assert torch.equal(found.exit_layer, model.predict(**batch, early_exit=same).exit_layer)
    assert model.predict(**batch, early_exit=1).exit_layer.tolist() == [2] * len(LENGTHS)


def test_probabilities_are_scaled_by_the_temperature_of_the_exit_and_logits_are_raw():
    temperatures = [1.2, 0.8, 1.5, 0.5]
    for problem_type in ("single_label_classification", "multi_label_classification"):
        model, batch = tiny_model(problem_type=problem_type), random_batch(LENGTHS)
        found = model.predict(**batch, early_exit=ExitConfig(threshold=0.8, temperatures=temperatures))
        assert len(set(found.exit_layer.tolist())) > 1
        with torch.no_grad():
            raw = torch.stack(model(**batch).exit_logits, dim=1)[torch.arange(len(LENGTHS)), found.exit_layer - 1]
        assert_close(found.logits, raw)
        scaled = raw / torch.tensor(temperatures)[found.exit_layer - 1].unsqueeze(-1)
        expected = scaled.sigmoid() if problem_type.startswith("multi") else scaled.softmax(-1)
        assert_close(found.probabilities, expected)
        if problem_type.startswith("multi"):
            assert_close(found.confidence, torch.maximum(expected, 1 - expected).min(-1).values)
        else:
            assert_close(found.confidence, expected.max(-1).values)


def test_a_regression_model_returns_values_and_leaves_by_patience_only():
    model, batch = tiny_model(num_labels=1), random_batch(LENGTHS)
    settings = ExitConfig(criterion="patience", patience=1, tolerance=0.5, temperatures=2.0)
    prediction = model.predict(**batch, early_exit=settings)
    assert torch.equal(prediction.probabilities, prediction.logits)
    assert prediction.confidence is None
    with pytest.raises(ValueError, match='criterion="patience"'):
        model.predict(**batch, early_exit=0.3)


def test_rows_that_leave_are_dropped_and_the_rest_is_cropped_to_its_longest():
    model = tiny_model(model_class=CostEffModel, seed=3)
    batch = random_batch(LENGTHS, width=16)
    shapes = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape[:2])))
    exit_layer = model.predict(**batch, early_exit=0.8).exit_layer
    lengths = torch.tensor(LENGTHS)
    expected = []
    for depth in range(1, int(exit_layer.max()) + 1):
        still_in = exit_layer >= depth
        expected.append((int(still_in.sum()), int(lengths[still_in].max())))
    assert shapes == expected
    assert len(set(shapes)) > 1


def test_layers_stop_when_everybody_has_left():
    model = tiny_model(model_class=CostEffModel)
    runs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    model.predict(**random_batch(LENGTHS), early_exit=1)
    assert len(runs) == 1


def test_only_checked_exits_and_the_last_one_are_evaluated():
    model = tiny_model(model_class=CostEffModel)
    asked = []
    for name, head in model.exits.items():
        head.register_forward_hook(lambda *_, name=name: asked.append(name))
    batch = random_batch(LENGTHS)
    model.predict(**batch, early_exit=False)
    assert asked == ["4"]
    asked.clear()
    model.predict(**batch, early_exit=ExitConfig(threshold=1e-9, checked_exits=[2]))
    assert asked == ["2", "4"]


def test_a_checked_exit_that_does_not_exist_is_refused():
    model = tiny_model(exit_layers=[2, 4])
    with pytest.raises(ValueError, match=r"\[3\].*\[2, 4\]"):
        model.predict(**random_batch([3]), early_exit=ExitConfig(threshold=0.5, checked_exits=[2, 3]))


def test_settings_for_another_number_of_exits_are_refused():
    with pytest.raises(ValueError, match="3 entries and the model has 4 exits"):
        tiny_model().predict(**random_batch([3]), early_exit=ExitConfig(threshold=[0.1, 0.2, 0.3]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (5,), (2, 3, 4)])
def test_an_empty_batch_or_a_wrong_number_of_dimensions_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match="`input_ids` is of shape"):
        tiny_model().predict(torch.ones(shape, dtype=torch.long))


def test_a_missing_input_is_refused():
    with pytest.raises(ValueError, match="`input_ids` is None"):
        tiny_model().predict()


def test_an_all_padding_row_is_refused_by_its_number():
    batch = random_batch([4, 6, 3])
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"Row 1 .*all padding"):
        tiny_model().predict(**batch)


def test_boolean_and_float_masks_mean_the_same_as_whole_numbers():
    model, batch = tiny_model(), random_batch(LENGTHS)
    expected = model.predict(**batch, early_exit=0.8)
    for kind in (torch.bool, torch.float32, torch.int32):
        found = model.predict(**{**batch, "attention_mask": batch["attention_mask"].to(kind)}, early_exit=0.8)
        assert torch.equal(found.exit_layer, expected.exit_layer)
        assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("model_class", [CostEffModel, CostEffForSequenceClassification])
def test_predict_runs_without_dropout_and_gradients_and_restores_every_mode(model_class):
    changes = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model, batch = tiny_model(model_class=model_class, **changes), random_batch(LENGTHS)
    expected = model.predict(**batch, early_exit=0.8)
    model.train()
    base = getattr(model, "costeff", model)
    base.layers[1].eval()
    base.exits["2"].dropout.eval()
    modes = [module.training for module in model.modules()]
    found = model.predict(**batch, early_exit=0.8)
    assert torch.equal(found.logits, expected.logits)
    assert not found.logits.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_predict_restores_the_modes_when_it_fails():
    model = tiny_model().train()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="tokens"):
        model.predict(torch.full((1, 99), 5))
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_predict_works_with_gradient_checkpointing_on():
    model, batch = tiny_model(), random_batch(LENGTHS)
    expected = model.predict(**batch, early_exit=0.8)
    model.gradient_checkpointing_enable()
    model.train()
    assert_close(model.predict(**batch, early_exit=0.8).logits, expected.logits)


def test_predict_leaves_the_callers_tensors_alone():
    model, batch = tiny_model(), random_batch(LENGTHS, width=16)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    model.predict(**batch, early_exit=0.8)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_an_exit_that_is_not_checked_costs_nothing():
    """Neither its head nor a decision; the layers up to the next stop run in one go."""
    model = tiny_model(model_class=CostEffModel)
    decided = []
    plan = model.exit_plan(ExitConfig(threshold=0.5, checked_exits=[3]))
    plan.criterion.evidence = lambda history, exit_index: decided.append(exit_index) or torch.ones(len(history))
    batch = random_batch(LENGTHS)
    with inference(model):
        left, rows = model.advance(model.enter(**batch), plan)
        assert (left, rows.depth, len(rows), rows.seen) == (None, 3, len(LENGTHS), None)
        left, rows = model.advance(rows, plan)
    assert rows is None and left.exit_layer == 4 and decided == [2]


WAITING = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "unique")


@pytest.mark.parametrize("lengths", [[6], LENGTHS])
def test_the_host_waits_once_at_the_start_and_once_per_checked_exit(lengths):
    """On a GPU every one of these calls would wait for the device."""
    model, batch = tiny_model(seed=3), random_batch(lengths)
    waits = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            indexed_by_mask = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
            if indexed_by_mask or name in WAITING:
                waits.append(name)
            return function(*args, **(kwargs or {}))

    with Watch():
        prediction = model.predict(**batch, early_exit=0.3)
    assert len(waits) == 1 + int(prediction.exit_layer.max())
    waits.clear()
    with Watch():
        model.predict(**batch, early_exit=ExitConfig(threshold=1e-9, checked_exits=[2]))
    assert len(waits) == 1 + 2


@pytest.mark.parametrize("early_exit", [False, 1e-9, 0.3])
@pytest.mark.parametrize(
    ("name", "layer"),
    [("layers.1.attention_norm.weight", 2), ("exits.2.classifier.bias", 2), ("embeddings.norm.bias", 1)],
)
def test_a_broken_checkpoint_is_an_error_at_the_first_exit_that_shows_it(name, layer, early_exit):
    model = tiny_model(model_class=CostEffModel, seed=3)
    with torch.no_grad():
        model.get_parameter(name).fill_(float("nan"))
    if early_exit is False:
        layer = 4
        if name.startswith("exits"):  # not asked
            assert model.predict(**random_batch(LENGTHS), early_exit=False).logits.isfinite().all()
            return
    with pytest.raises(ValueError, match=rf"after layer {layer} are \[nan, nan, nan\]. They must be finite"):
        model.predict(**random_batch(LENGTHS), early_exit=early_exit)


@pytest.mark.parametrize("lengths", [[5], LENGTHS])
def test_what_predict_returns_may_be_used_in_training(lengths):
    model, weight = tiny_model(seed=3), torch.ones((), requires_grad=True)
    prediction = model.predict(**random_batch(lengths), early_exit=0.3)
    for values in (prediction.logits, prediction.probabilities, prediction.confidence):
        (values * weight).sum().backward()
        values += 1
    assert weight.grad is not None


def test_one_row_that_goes_on_is_never_moved():
    model = tiny_model(model_class=CostEffModel, seed=3)
    plan = model.exit_plan(1e-9)
    with inference(model):
        rows = first = model.enter(**random_batch([5]))
        for _ in range(3):
            left, rows = model.advance(rows, plan)
            assert left is None and rows is first and rows.attention_mask is None


# Loading and saving


SAVED_CHANGES = {
    "embedding_rank": 5,
    "exit_layers": [2, 3, 4],
    "exit_config": ExitConfig(threshold=[0.8, 0.9, 0.5], temperatures=1.5).to_dict(),
}


@pytest.mark.parametrize("model_class", [CostEffModel, CostEffForSequenceClassification])
def test_a_saved_model_loads_with_equal_weights_config_and_outputs(tmp_path, model_class):
    model = tiny_model(model_class=model_class, **SAVED_CHANGES)
    model.save_pretrained(tmp_path)
    kept = sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".py")  # the code goes along
    assert kept == ["config.json", "model.safetensors"]
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    ours, theirs = model.config.to_dict(), loaded.config.to_dict()
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
    batch = random_batch(LENGTHS)
    found, wanted = loaded.predict(**batch, early_exit=True), model.predict(**batch, early_exit=True)
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert len(set(wanted.exit_layer.tolist())) > 1
    assert_close(found.logits, wanted.logits)


SUBPROCESS = """
import sys, torch
import hf_costeff
assert "peft" not in sys.modules
from transformers import AutoModel, AutoModelForSequenceClassification
batch = torch.load(sys.argv[1] + "/batch.pt")
for saved in ("base", "classifier"):
    for auto in (AutoModel, AutoModelForSequenceClassification):
        name = "CostEffModel" if auto is AutoModel else "CostEffForSequenceClassification"
        model, report = auto.from_pretrained(f"{sys.argv[1]}/{saved}", output_loading_info=True)
        assert type(model).__name__ == name
        assert not any(report.values()), (saved, name, report)
        prediction = model.predict(**batch["inputs"], early_exit=True)
        assert torch.equal(prediction.exit_layer, batch["exit_layer"])
        torch.testing.assert_close(prediction.logits, batch["logits"], rtol=1e-5, atol=1e-5)
        assert len(model(**batch["inputs"]).exit_logits) == 3
print("loaded whole")
"""


def test_auto_classes_load_either_checkpoint_whole_in_a_fresh_process(tmp_path):
    model = tiny_model(**SAVED_CHANGES)
    model.save_pretrained(tmp_path / "classifier")
    model.costeff.save_pretrained(tmp_path / "base")
    batch = random_batch(LENGTHS)
    prediction = model.predict(**batch, early_exit=True)
    expected = {"exit_layer": prediction.exit_layer, "logits": prediction.logits}
    torch.save({"inputs": batch, **expected}, tmp_path / "batch.pt")
    code = f"import sys; sys.path.insert(0, {str(next(iter(hf_costeff.__path__)) + '/..')!r})\n{SUBPROCESS}"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "loaded whole" in run.stdout, run.stderr


def test_a_checkpoint_without_one_exit_reports_it_and_gets_a_fresh_head(tmp_path):
    tiny_model(exit_layers=[2, 4]).save_pretrained(tmp_path)
    model, report = CostEffForSequenceClassification.from_pretrained(
        tmp_path, exit_layers=[2, 3, 4], output_loading_info=True
    )
    assert report["missing_keys"] == {"costeff.exits.3.classifier.weight", "costeff.exits.3.classifier.bias"}
    fresh = model.costeff.exits["3"].classifier
    assert fresh.bias.tolist() == [0.0] * 3
    assert 0 < fresh.weight.abs().max() < 0.2


def test_fresh_weights_follow_the_config():
    torch.manual_seed(0)
    wide = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64, "embedding_rank": 32}
    model = CostEffModel(tiny_config(initializer_range=0.05, vocab_size=500, **wide))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
    assert (model.embeddings.word_embeddings.weight[0] == 0).all()


def test_exit_heads_are_plain_linear_maps_named_by_their_layer():
    model = tiny_model(exit_layers=[2, 4])
    assert list(model.costeff.exits) == ["2", "4"]
    assert all(isinstance(head, LinearExitHead) for head in model.costeff.exits.values())
    assert "costeff.exits.2.classifier.weight" in model.state_dict()


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("size", [50, 20])
def test_the_vocabulary_can_be_resized(tmp_path, rank, size):
    model = tiny_model(embedding_rank=rank)
    ids = random_batch([6, 6])["input_ids"] % 20
    expected = model(ids).logits.detach()
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert model.get_input_embeddings().weight.shape == (size, rank or TINY["hidden_size"])
    assert_close(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    assert_close(CostEffForSequenceClassification.from_pretrained(tmp_path)(ids).logits, expected)


@pytest.mark.parametrize("rank", [None, 5])
def test_a_word_embedding_of_another_width_is_refused(rank):
    model = tiny_model(embedding_rank=rank)
    width = model.get_input_embeddings().embedding_dim
    with pytest.raises(ValueError, match=f"is {width + 1} wide. It must be {width}"):
        model.set_input_embeddings(torch.nn.Embedding(20, width + 1))
    model.set_input_embeddings(torch.nn.Embedding(7, width))
    assert model.get_input_embeddings().num_embeddings == 7


def test_probabilities_agree_with_the_forward_logits():
    model, batch = tiny_model(), random_batch([5, 3])
    with torch.no_grad():
        expected = probabilities(model(**batch).logits, "single_label_classification")
    assert_close(model.predict(**batch).probabilities, expected)


@pytest.mark.parametrize("exit_layers", [[1, 2, 3, 4], [2, 4]])
def test_a_truncated_model_ends_at_its_exit_and_keeps_the_earlier_ones(tmp_path, exit_layers):
    model, batch = (
        tiny_model(exit_layers=exit_layers, exit_config=ExitConfig(threshold=0.5).to_dict()),
        random_batch([7, 3]),
    )
    shallow = model.truncate(2)
    expected = model(**batch)
    assert shallow.config.exit_layers == [layer for layer in exit_layers if layer <= 2]
    assert shallow.config.exit_config is None and model.config.num_hidden_layers == 4
    assert torch.equal(shallow(**batch).logits, expected.exit_logits[exit_layers.index(2)])
    shallow.save_pretrained(tmp_path)
    again = CostEffForSequenceClassification.from_pretrained(tmp_path)
    assert_close(again.predict(**batch).logits, shallow(**batch).logits)
    with torch.no_grad():
        shallow.costeff.layers[0].attention.output.weight.add_(1)
    assert torch.equal(model(**batch).logits, expected.logits)


def test_a_layer_without_an_exit_is_no_place_to_end():
    with pytest.raises(ValueError, match=r"`exit_layer` is 3, but the exits are after layers 2, 4"):
        tiny_model(exit_layers=[2, 4]).truncate(3)
