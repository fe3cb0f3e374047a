"""The teacher: which of its exits and layers a student answers to, and answers that are not computed twice."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithPadding

from helpers import tiny_bert, tiny_model, token_rows, word_tokenizer
from hf_costeff.teacher import Teacher

COLLATOR = DataCollatorWithPadding(word_tokenizer())


def batch_of(rows, order=None) -> dict[str, torch.Tensor]:
    batch = dict(COLLATOR([rows[index] for index in (range(len(rows)) if order is None else order)]))
    batch.pop("labels")
    return batch


@pytest.mark.parametrize(
    ("layers", "exit_layers", "hidden", "exits"),
    [
        (4, [1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3]),
        (4, [2, 4], [0, 1, 2, 3, 4], [1, 3]),
        (2, [1, 2], [0, 2, 4], [1, 3]),
        (1, [1], [0, 4], [3]),
        (3, [1, 2, 3], [0, 1, 3, 4], [0, 2, 3]),
    ],
)
def test_a_students_layers_and_exits_answer_to_the_teachers_at_the_same_relative_depth(
    layers, exit_layers, hidden, exits
):
    widths = {"num_hidden_layers": layers, "num_attention_heads": 1, "intermediate_size": 4}
    student = tiny_model(exit_layers=exit_layers, **widths)
    teacher = tiny_model(seed=3)
    batch = batch_of(token_rows(4))
    signals = Teacher(teacher, student.config).signals(batch, hidden_states=True)
    with torch.no_grad():
        outputs = teacher(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    for found, expected in zip(signals.hidden_states, (outputs.hidden_states[index] for index in hidden), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(signals.exit_logits, (outputs.exit_logits[index] for index in exits), strict=True):
        assert torch.equal(found, expected)


def test_a_multi_exit_teacher_without_an_exit_there_teaches_by_its_next_deeper_one():
    student, teacher = tiny_model(), tiny_model(seed=3, exit_layers=[2, 4])
    batch = batch_of(token_rows(4))
    signals = Teacher(teacher, student.config).signals(batch, hidden_states=False)
    with torch.no_grad():
        first, last = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).exit_logits
    for found, expected in zip(signals.exit_logits, (first, first, last, last), strict=True):
        assert torch.equal(found, expected)
    assert signals.hidden_states == ()


def test_a_stock_teachers_one_answer_teaches_every_exit_and_its_inputs_may_hold_more_than_it_takes():
    student, teacher = tiny_model(exit_layers=[1, 4]), tiny_bert()
    batch = batch_of(token_rows(4))
    signals = Teacher(teacher, student.config).signals({**batch, "unknown": torch.zeros(1)}, hidden_states=True)
    with torch.no_grad():
        logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert len(signals.exit_logits) == 2 and len(signals.hidden_states) == 5
    assert all(torch.equal(found, logits) for found in signals.exit_logits)
    assert not any(tensor.requires_grad for tensor in (*signals.exit_logits, *signals.hidden_states))


# --- memory


def remembering(model) -> tuple[Teacher, list[int]]:
    """A teacher with memory, and how many rows the model ran on in each of its calls."""
    calls: list[int] = []
    model.register_forward_hook(lambda module, _, outputs: calls.append(len(outputs.logits)))
    return Teacher(model, tiny_model().config, remembers=True), calls


@pytest.mark.parametrize("model", [tiny_bert(), tiny_model(seed=3)], ids=["stock", "multi-exit"])
def test_answers_from_memory_are_those_of_the_model_whatever_the_order_and_padding(model):
    rows = token_rows(12)
    plain = Teacher(model, tiny_model().config).signals(batch_of(rows), hidden_states=False).exit_logits
    teacher, calls = remembering(model)
    for order in ([0, 1, 2, 3], [3, 7, 1, 4, 4], [11, 10, 9, 8, 7, 6, 5], list(range(12)), [5], [8, 2]):
        found = teacher.signals(batch_of(rows, order), hidden_states=False)
        assert found.hidden_states == ()
        for logits, expected in zip(found.exit_logits, plain, strict=True):
            torch.testing.assert_close(logits, expected[order], rtol=1e-5, atol=1e-6)
    assert len({tuple(row["input_ids"]) for row in rows}) == 12
    assert calls == [4, 3, 6]  # a row met twice in one batch is run twice, later ones are not run at all


def test_rows_that_differ_in_one_token_type_or_in_length_alone_are_others():
    teacher, calls = remembering(tiny_bert())
    ids = torch.tensor([[2, 7, 8, 3], [2, 7, 8, 3], [2, 7, 8, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    types = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]])
    for row in range(3):
        one = {"input_ids": ids[[row]], "attention_mask": mask[[row]], "token_type_ids": types[[row]]}
        found = teacher.signals(one, hidden_states=False).exit_logits[0]
        with torch.no_grad():
            torch.testing.assert_close(found, teacher.model(**one).logits, rtol=0, atol=0)
    assert calls == [1] * 6  # three by the teacher, three to compare with
    unmasked = {"input_ids": ids[:2], "token_type_ids": types[:2]}
    teacher.signals(unmasked, hidden_states=False)
    assert calls[6:] == []  # no mask says what a mask of ones says


def test_hidden_states_are_never_from_memory():
    teacher, calls = remembering(tiny_bert())
    batch = batch_of(token_rows(4))
    for _ in range(2):
        assert len(teacher.signals(batch, hidden_states=True).hidden_states) == 5
    assert calls == [4, 4]
