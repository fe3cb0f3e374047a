"""The block penalty pulls as its formula says, survives a resume, and masked training keeps zeros at zero."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from helpers import tiny_bert, token_rows, word_tokenizer
from hf_costeff import CostEffTrainer, CostEffTrainingArguments, convert_from_stock
from hf_costeff.block_pruning import BlockShape, block_matrices, prune_blocks, zero_blocks
from hf_costeff.block_training import BlockPenalty, MaskedTraining
from hf_costeff.data import make_collator

BLOCKS = BlockShape(columns=4)


def fresh():
    return convert_from_stock(tiny_bert(num_hidden_layers=2))


def train(model, folder, regularizer, steps=4, resume=False, teacher=None, callbacks=None, **settings):
    arguments = CostEffTrainingArguments(
        output_dir=str(folder),
        **{"max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2},
        **{"learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **settings},
    )
    trainer = CostEffTrainer(
        model,
        arguments,
        teacher=teacher,
        train_dataset=token_rows(12),
        data_collator=make_collator(word_tokenizer()),
        regularizer=regularizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def begun(penalty, model, **state):
    """A penalty as training has it after its begin."""
    where = SimpleNamespace(**{"global_step": 0, "epoch": 0.0, **state})
    penalty.on_train_begin(None, where, None, model=model)
    return where


@pytest.mark.parametrize("blocks", [BLOCKS, BlockShape(columns=12), BlockShape(rows=3, columns=2)], ids=str)
@pytest.mark.parametrize("reweighted", [True, False])
def test_the_penalty_starts_at_its_strength_whatever_the_blocks(blocks, reweighted):
    penalty = BlockPenalty(blocks, 7.0, reweighted=reweighted)
    begun(penalty, fresh())
    assert penalty.penalty().item() == pytest.approx(7.0, rel=0.01)


@pytest.mark.parametrize("reweighted", [True, False])
def test_its_gradient_is_that_of_its_formula_with_constant_weights(reweighted):
    model = fresh()
    penalty = BlockPenalty(BlockShape(rows=5, columns=3), 3.0, reweighted=reweighted)
    where = begun(penalty, model)
    matrices = block_matrices(model)
    weights, terms = {}, []
    for name, matrix in matrices.items():
        norms = {}
        for top in range(0, matrix.shape[0], 5):
            for left in range(0, matrix.shape[1], 3):
                norms[top, left] = matrix[top : top + 5, left : left + 3].norm()
        own = {at: at[0] * 3 // len(matrix) if name.endswith("query_key_value") else 0 for at in norms}
        for at, norm in norms.items():
            mean = torch.stack([other for place, other in norms.items() if own[place] == own[at]]).mean().item()
            weights[(name, *at)] = 1 / ((norm.item() if reweighted else mean) + 1e-3)
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.add_(0.05 * torch.randn_like(matrix))  # the weights stay those of the beginning
    for (name, top, left), weight in weights.items():
        terms.append(weight * matrices[name][top : top + 5, left : left + 3].norm())
    (3.0 * torch.stack(terms).mean()).backward()
    expected = {name: matrix.grad.clone() for name, matrix in matrices.items()}
    for matrix in matrices.values():
        matrix.grad.fill_(0.25)
    penalty.on_pre_optimizer_step(None, where, None)
    for name, matrix in matrices.items():
        torch.testing.assert_close(matrix.grad, expected[name] + 0.25, rtol=1e-4, atol=1e-6)


def test_the_penalty_takes_no_part_in_gradient_clipping(tmp_path):
    model = fresh()
    before = {name: matrix.detach().clone() for name, matrix in block_matrices(model).items()}
    penalty = BlockPenalty(BLOCKS, 50.0)
    settings = {"optim": "sgd", "max_grad_norm": 1e-9, "lr_scheduler_type": "constant", "learning_rate": 0.1}
    train(model, tmp_path, penalty, steps=1, **settings)
    twin = BlockPenalty(BLOCKS, 50.0)
    begun(twin, fresh())
    blocks = sum(weights.numel() for weights in twin.block_weights.values())
    for name, matrix in block_matrices(model).items():
        norms = BLOCKS.norms(before[name])
        pull = BLOCKS.spread(50.0 / blocks / (norms + 1e-3) / norms, *matrix.shape)
        torch.testing.assert_close(matrix.detach(), before[name] * (1 - 0.1 * pull), rtol=1e-4, atol=1e-6)


def test_a_proximal_step_shrinks_blocks_by_the_soft_threshold():
    model = fresh()
    penalty = BlockPenalty(BLOCKS, 2.0, proximal=True)
    where = begun(penalty, model)
    before = {name: matrix.detach().clone() for name, matrix in block_matrices(model).items()}
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    penalty.on_pre_optimizer_step(None, where, None)
    penalty.on_optimizer_step(None, where, None, optimizer=optimizer)
    gone = 0
    for name, matrix in block_matrices(model).items():
        norms = BLOCKS.norms(before[name])
        thirds = norms.chunk(3) if name.endswith("query_key_value") else [norms]
        limit = torch.cat([0.1 * 2.0 * third.square().mean() / (third + 1e-3) for third in thirds])
        for row in range(matrix.shape[0]):
            for slab in range(norms.shape[1]):
                part = before[name][row, 4 * slab : 4 * slab + 4]
                kept = max(0.0, 1 - float(limit[row, slab] / norms[row, slab]))
                gone += kept == 0
                torch.testing.assert_close(matrix.detach()[row, 4 * slab : 4 * slab + 4], part * kept)
    assert gone > 0 and all(matrix.grad is None for matrix in block_matrices(model).values())


def test_frozen_matrices_are_not_shrunk_and_can_be_masked(tmp_path):
    model = fresh()
    before = {name: matrix.detach().clone() for name, matrix in block_matrices(model).items()}
    train(model, tmp_path / "1", BlockPenalty(BLOCKS, 50.0, proximal=True), steps=2, trained_parts="exits")
    assert all(torch.equal(matrix, before[name]) for name, matrix in block_matrices(model).items())
    masks = prune_blocks(model, BLOCKS, ratio=0.6)
    train(model, tmp_path / "2", MaskedTraining(masks), steps=2, trained_parts="exits")
    for name, matrix in block_matrices(model).items():
        assert torch.equal(matrix, before[name] * masks.weight_mask(name))


def test_reweighting_pulls_weak_blocks_harder_than_plain_group_lasso(tmp_path):
    spread = {}
    for reweighted in (True, False):
        model = fresh()
        start = BLOCKS.norms(model.costeff.layers[0].feed_forward.output.weight)
        penalty = BlockPenalty(BLOCKS, 30.0, reweighted=reweighted, proximal=True)
        train(model, tmp_path / str(reweighted), penalty, steps=6)
        end = BLOCKS.norms(model.costeff.layers[0].feed_forward.output.weight)
        order = start.flatten().argsort()
        lost = 1 - (end / start).flatten()[order]
        spread[reweighted] = (lost[:12].mean() - lost[-12:].mean()).item()
    assert spread[True] > spread[False] + 0.05


class BlockWeights(TrainerCallback):
    """Records the weights of one block after each step."""

    def __init__(self, penalty):
        self.penalty, self.seen = penalty, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.penalty.block_weights["layers.0.attention.output"][0, 0].item())


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [({"refresh_steps": 2}, [2, 4]), ({"refresh_epochs": 1}, [3]), ({"refresh_epochs": 0.5}, [2, 3, 5])],
    ids=str,
)
def test_weights_are_refreshed_on_schedule(tmp_path, schedule, changes):
    """12 rows in batches of 4 are 3 steps per epoch."""
    penalty = BlockPenalty(BLOCKS, 5.0, **schedule)
    record = BlockWeights(penalty)
    train(fresh(), tmp_path, penalty, steps=6, callbacks=[record])
    assert [step for step in range(1, 6) if record.seen[step] != record.seen[step - 1]] == changes


REGULARIZERS = {
    "gradient": lambda: BlockPenalty(BLOCKS, 5.0, refresh_steps=3),
    "proximal": lambda: BlockPenalty(BLOCKS, 5.0, refresh_steps=3, proximal=True),
    "masks": lambda: MaskedTraining(prune_blocks(fresh(), BLOCKS, ratio=0.6)),
}


@pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, regularizer):
    whole, halved = fresh(), fresh()
    settings = {"lr_scheduler_type": "constant"}
    train(whole, tmp_path / "whole", regularizer(), steps=6, **settings)
    train(halved, tmp_path / "halved", regularizer(), steps=4, **settings)
    again = fresh()
    trainer = train(again, tmp_path / "halved", regularizer(), steps=6, resume=True, **settings)
    assert trainer.state.global_step == 6
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("other", [BlockShape(rows=1), BlockShape(columns=3)], ids=str)
def test_a_checkpoint_whose_blocks_were_cut_otherwise_is_refused(tmp_path, other):
    train(fresh(), tmp_path, BlockPenalty(other, 1.0), steps=2)
    with pytest.raises(ValueError, match="blocks were cut otherwise"):
        train(fresh(), tmp_path, BlockPenalty(BLOCKS, 1.0), resume=True)


def test_a_checkpoint_without_block_weights_is_refused(tmp_path):
    train(fresh(), tmp_path, None, steps=2)
    with pytest.raises(ValueError, match="without a block penalty"):
        train(fresh(), tmp_path, BlockPenalty(BLOCKS, 1.0), steps=4, resume=True)


def test_the_penalty_is_logged_beside_the_loss_parts_of_a_teacher(tmp_path):
    trainer = train(fresh(), tmp_path, BlockPenalty(BLOCKS, 5.0), steps=2, teacher=tiny_bert(num_hidden_layers=2))
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["block_penalty"] == pytest.approx(5.0, rel=0.05) and 0 <= entry["weak_blocks"] <= 1
    assert "soft_label_loss" in entry and entry["loss"] == pytest.approx(
        entry["soft_label_loss"] + entry["representation_loss"], rel=1e-2
    )


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"strength": -1.0}, "`strength` is -1.0"),
        ({"strength": float("nan")}, "`strength` is nan"),
        ({"strength": float("inf")}, "`strength` is inf"),
        ({"strength": 1.0, "refresh_steps": 0}, "`refresh_steps` is 0"),
        ({"strength": 1.0, "refresh_epochs": -0.5}, "`refresh_epochs` is -0.5"),
        ({"strength": 1.0, "refresh_epochs": 1, "refresh_steps": 10}, "Leave one out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        BlockPenalty(BLOCKS, **settings)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_pruned_blocks_stay_zero_and_the_others_learn(tmp_path, optimizer):
    model = fresh()
    masks = prune_blocks(model, BLOCKS, ratio=0.6)
    pruned = zero_blocks(model, masks)
    before = {name: matrix.detach().clone() for name, matrix in block_matrices(pruned).items()}
    trainer = train(
        pruned,
        tmp_path,
        MaskedTraining(masks),
        teacher=tiny_bert(num_hidden_layers=2),
        **{"weight_decay": 0.1, "optim": optimizer, "learning_rate": 0.01},
    )
    for name, matrix in block_matrices(pruned).items():
        mask = masks.weight_mask(name)
        assert (matrix[~mask] == 0).all() and (matrix[mask] != before[name][mask]).float().mean() > 0.9
        assert all((value[~mask] == 0).all() for value in trainer.optimizer.state[matrix].values() if value.dim() == 2)
    assert not pruned.costeff.layers[0].feed_forward.output.weight._backward_hooks


def test_the_model_that_was_scored_is_pruned_when_masked_training_begins(tmp_path):
    model = fresh()
    masks = prune_blocks(model, BLOCKS, ratio=0.6)
    train(model, tmp_path, MaskedTraining(masks), steps=2)
    masks.check(model)
    assert (
        not model.costeff.layers[0].feed_forward.output.weight[~masks.weight_mask("layers.0.feed_forward.output")].any()
    )


def test_masks_of_another_model_stop_training_before_it_begins(tmp_path):
    masks = prune_blocks(fresh(), BLOCKS, ratio=0.6)
    other = convert_from_stock(tiny_bert(seed=1, num_hidden_layers=2))
    with pytest.raises(ValueError, match="masks are those of another model"):
        train(other, tmp_path, MaskedTraining(masks))
