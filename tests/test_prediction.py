"""Offline prediction: the answers of `predict`, in order, for any kind and number of rows, deep layers run full."""

from __future__ import annotations

import logging
import platform
import random
import subprocess
import sys

import pytest
import torch
from datasets import Dataset

from helpers import WORDS, tiny_model, word_tokenizer
from hf_costeff import ExitConfig, predict_texts
from hf_costeff.exiting_rows import RunningRows
from hf_costeff.modeling_costeff import inference
from hf_costeff.prediction import TextReader, WaitingRows, chunked

SETTINGS = ExitConfig(threshold=[0.305, 0.391, 0.785, 0.0])  # about a quarter of `TEXTS` leaves at each exit


def texts_of(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 16))) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    names = {0: "bad", 1: "fair", 2: "good"}
    return tiny_model(seed=3, id2label=names, label2id={name: index for index, name in names.items()})


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


TEXTS = texts_of(60)
PAIRS = list(zip(texts_of(9, seed=1), texts_of(9, seed=2), strict=True))


def answers(model, tokenizer, rows=TEXTS, **settings) -> list[dict]:
    return list(predict_texts(model, tokenizer, rows, **{"early_exit": SETTINGS, "show_progress": False, **settings}))


def alone(model, tokenizer, row, early_exit=SETTINGS):
    """What `predict` says of one row."""
    texts = (row,) if isinstance(row, str) else tuple(row)
    inputs = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=24)
    return model.predict(**inputs, early_exit=early_exit)


def check(found, expected, names):
    best = int(expected.probabilities.argmax())
    assert (found["label"], found["exit_layer"]) == (names[best], int(expected.exit_layer))
    assert found["score"] == pytest.approx(float(expected.probabilities[0, best]), abs=1e-5)


# --- the answers


@pytest.mark.parametrize(("batch_size", "window"), [(4, 1000), (8, 20), (1, 7), (100, 100)])
def test_every_answer_is_that_of_the_row_alone_in_the_order_of_the_rows(model, tokenizer, batch_size, window):
    found = answers(model, tokenizer, batch_size=batch_size, window=window)
    assert len(found) == len(TEXTS) and len({answer["exit_layer"] for answer in found}) == 4
    for text, answer in zip(TEXTS, found, strict=True):
        check(answer, alone(model, tokenizer, text), model.config.id2label)


@pytest.mark.parametrize(("early_exit", "layer"), [(False, 4), (0.0, 4), (1, 1)])
def test_where_all_or_none_leave_at_the_first_exit_everybody_is_answered(model, tokenizer, early_exit, layer):
    found = answers(model, tokenizer, early_exit=early_exit, batch_size=8)
    assert [answer["exit_layer"] for answer in found] == [layer] * len(TEXTS)
    check(found[7], alone(model, tokenizer, TEXTS[7], early_exit), model.config.id2label)


def test_patience_goes_on_across_merged_batches(model, tokenizer):
    settings = ExitConfig(criterion="patience", patience=1, checked_exits=[1, 3])
    found = answers(model, tokenizer, early_exit=settings, batch_size=8)
    assert {answer["exit_layer"] for answer in found} == {3, 4}
    for text, answer in zip(TEXTS, found, strict=True):
        check(answer, alone(model, tokenizer, text, settings), model.config.id2label)


def test_scores_are_after_the_exits_temperature(model, tokenizer):
    settings = ExitConfig(threshold=0.99, temperatures=[2.0, 0.5, 1.0, 3.0])
    for text, answer in zip(TEXTS, answers(model, tokenizer, early_exit=settings), strict=True):
        check(answer, alone(model, tokenizer, text, settings), model.config.id2label)


def test_with_top_k_the_labels_come_best_first_and_never_more_than_there_are(model, tokenizer):
    one, two, many = (answers(model, tokenizer, TEXTS[:5], top_k=top_k) for top_k in (1, 2, 9))
    for text, first, both, all_of_them in zip(TEXTS, one, two, many, strict=False):
        chances, order = alone(model, tokenizer, text).probabilities[0].sort(descending=True)
        assert all_of_them["labels"] == [model.config.id2label[int(label)] for label in order]
        assert all_of_them["scores"] == pytest.approx(chances.tolist(), abs=1e-5)
        assert both["labels"] == all_of_them["labels"][:2] and first["labels"] == both["labels"][:1]
        assert set(first) == {"labels", "scores", "exit_layer"}


def test_a_regression_models_score_is_its_value(tokenizer):
    model = tiny_model(num_labels=1, problem_type="regression")
    settings = ExitConfig(criterion="patience", patience=1, tolerance=0.5)
    for text, answer in zip(TEXTS[:9], answers(model, tokenizer, TEXTS[:9], early_exit=settings), strict=True):
        expected = alone(model, tokenizer, text, settings)
        assert answer["score"] == pytest.approx(expected.logits.item(), abs=1e-5)
        assert (answer["label"], answer["exit_layer"]) == ("LABEL_0", int(expected.exit_layer))


# --- kinds of rows


def kinds_of_pairs():
    dicts = [{"id": 4, "sentence1": first, "sentence2": second} for first, second in PAIRS]
    return {
        "tuples": (PAIRS, None),
        "lists": ([list(pair) for pair in PAIRS], None),
        "dicts": (dicts, None),
        "dataset": (Dataset.from_list(dicts), None),
        "named": ([{"a": first, "b": second, "text": "no"} for first, second in PAIRS], ["a", "b"]),
        "generator": ((pair for pair in PAIRS), None),
    }


@pytest.mark.parametrize("kind", kinds_of_pairs())
def test_pairs_may_be_tuples_lists_dicts_or_columns(model, tokenizer, kind):
    rows, columns = kinds_of_pairs()[kind]
    for pair, answer in zip(PAIRS, answers(model, tokenizer, rows, text_columns=columns), strict=True):
        check(answer, alone(model, tokenizer, pair), model.config.id2label)


@pytest.mark.parametrize(
    "rows",
    [
        (text for text in TEXTS),
        [{"text": text} for text in TEXTS],
        Dataset.from_dict({"label": [0] * len(TEXTS), "review": TEXTS}),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    ],
    ids=["generator", "dicts", "dataset", "streamed"],
)
def test_single_texts_may_come_from_anything_that_yields_them(model, tokenizer, rows):
    assert answers(model, tokenizer, rows) == answers(model, tokenizer)


def test_no_rows_give_no_answers(model, tokenizer):
    assert answers(model, tokenizer, []) == []


def test_an_empty_text_is_answered_and_an_endless_one_is_cut_with_a_warning(model, tokenizer, caplog):
    endless = ("good film " * 10_000)[:100_000]
    with caplog.at_level(logging.WARNING, "hf_costeff.prediction"):
        empty, cut, short = answers(model, tokenizer, ["", endless, "good"])
    for text, answer in (("", empty), (endless, cut), ("good", short)):
        check(answer, alone(model, tokenizer, text), model.config.id2label)
    assert "1 of 3 rows had more than 24 tokens and were cut" in caplog.text


def test_a_shorter_length_is_kept_to(model, tokenizer):
    cut = [" ".join(text.split()[:3]) for text in TEXTS]
    assert answers(model, tokenizer, max_length=5) == answers(model, tokenizer, cut)


# --- what is wrong


BAD_ROWS = [
    (None, "Row 5 is None. It must be one text, as the rows before it"),
    (7, "Row 5 is 7. It must be one text"),
    (["a", "b"], r"Row 5 is \['a', 'b'\]. It must be one text"),
    (("a", "b", "c"), "Row 5 is .*. It must be one text"),
    ({"text": None}, "Row 5 is {'text': None}. It must be one text"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_ROWS, ids=repr)
def test_a_row_that_is_no_text_is_named_after_all_rows_before_it_were_answered(model, tokenizer, bad, words):
    done = []
    with pytest.raises(ValueError, match=words):
        done.extend(answer for answer in predict_texts(model, tokenizer, [*TEXTS[:5], bad, "good"], window=3))
    assert len(done) == 5


@pytest.mark.parametrize("bad", [None, 7, (), ("a", None), {"text": 3}, ["a", "b", "c"]], ids=repr)
def test_a_bad_first_row_is_told_what_a_row_may_be(model, tokenizer, bad):
    with pytest.raises(ValueError, match=r"Row 0 is .* a string, a pair of strings or a dict of them"):
        answers(model, tokenizer, [bad])


def failing(count):
    yield from TEXTS[:count]
    raise OSError("the disk is gone")


@pytest.mark.parametrize("count", [0, 5, 6])
def test_a_generator_that_fails_loses_nothing_and_the_error_says_where(model, tokenizer, count):
    done = []
    with pytest.raises(ValueError, match=f"Row {count} could not be read: OSError: the disk is gone") as caught:
        for answer in predict_texts(model, tokenizer, failing(count), early_exit=SETTINGS, window=3):
            done.append(answer)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(done) == count
    for text, answer in zip(TEXTS, done, strict=False):
        check(answer, alone(model, tokenizer, text), model.config.id2label)


def test_logits_that_are_not_finite_name_the_callers_row(tokenizer):
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("dull")] = float("nan")
    rows = ["good", "bad film", "bright and well", "dull", "a"]
    with pytest.raises(ValueError, match=r"row 3 after layer 1 are .*checkpoint is broken"):
        answers(model, tokenizer, rows)


@pytest.mark.parametrize("rows", ["a text", b"bytes", {"train": TEXTS}, 3, None])
def test_what_is_no_collection_of_texts_is_refused_at_once(model, tokenizer, rows):
    with pytest.raises(TypeError, match=r"`rows` is a .* Pass texts in a list"):
        predict_texts(model, tokenizer, rows)


@pytest.mark.parametrize("name", ["batch_size", "window", "top_k"])
def test_counts_below_one_are_refused_at_once(model, tokenizer, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0. It must be at least 1"):
        predict_texts(model, tokenizer, TEXTS, **{name: 0})


@pytest.mark.parametrize("max_length", [0, 2, 10_000])
def test_a_length_that_the_model_cannot_serve_is_refused_at_once(model, tokenizer, max_length):
    with pytest.raises(ValueError, match=f"`max_length` is {max_length}. It must lie in 3"):
        predict_texts(model, tokenizer, TEXTS, max_length=max_length)


def test_a_pair_has_two_columns(model, tokenizer):
    with pytest.raises(ValueError, match="one column, or two"):
        predict_texts(model, tokenizer, TEXTS, text_columns=["a", "b", "c"])


def test_settings_are_refused_at_once(model, tokenizer):
    with pytest.raises(ValueError, match="this model has none"):
        predict_texts(model, tokenizer, TEXTS, early_exit=True)


# --- how it runs


def sizes_run(model, tokenizer, **settings) -> list[list[int]]:
    """Rows of every batch, layer by layer."""
    sizes: list[list[int]] = [[] for _ in model.costeff.layers]
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        for layer, seen in zip(model.costeff.layers, sizes, strict=True)
    ]
    found = answers(model, tokenizer, **settings)
    for hook in hooks:
        hook.remove()
    ran = [sum(answer["exit_layer"] > depth for answer in found) for depth in range(4)]
    assert [sum(layer) for layer in sizes] == ran
    return sizes


def test_deep_layers_run_full_batches_of_survivors_of_several(model, tokenizer):
    sizes = sizes_run(model, tokenizer, batch_size=8)
    for layer in sizes:
        assert all(size == 8 for size in layer[:-1]) and 0 < layer[-1] <= 8
    assert len(sizes[3]) < len(sizes[0])


def test_at_full_depth_no_row_waits(model, tokenizer):
    assert sizes_run(model, tokenizer, batch_size=8, early_exit=False) == [[8] * 7 + [4]] * 4


def test_batches_hold_rows_of_like_length(model, tokenizer):
    reader = TextReader(tokenizer, None, 24, 10)
    (window,) = (list(batches) for batches in reader.windows(TEXTS, 100))
    lengths = [inputs["attention_mask"].sum(1).tolist() for _, inputs in window]
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert sorted(number for numbers, _ in window for number in numbers) == list(range(60))


def test_rows_are_read_one_window_ahead_and_no_more(model, tokenizer):
    read = []
    stream = predict_texts(model, tokenizer, (read.append(text) or text for text in TEXTS), window=8, batch_size=4)
    next(stream)
    assert len(read) == 8
    assert torch.is_grad_enabled()  # the caller has the turn


def test_a_window_leaves_nobody_waiting(model, tokenizer):
    plan = model.costeff.exit_plan(SETTINGS)
    waiting = WaitingRows(model.costeff, plan, batch_size=8)
    (batches,) = TextReader(tokenizer, None, 24, 8).windows(TEXTS, 100)
    with inference(model):
        left = list(waiting.run(batches))
    assert sorted(number for rows in left for number in rows.numbers) == list(range(60))
    assert not any(waiting.groups.values())


def test_a_batch_is_made_of_those_who_wait_longest_and_never_too_large(model, tokenizer):
    plan = model.costeff.exit_plan(SETTINGS)
    waiting = WaitingRows(model.costeff, plan, batch_size=4)
    groups = [group(0, 3), group(3, 6), group(9, 1)]
    taken = []
    while groups:
        taken.append(waiting._next_batch(groups).numbers)
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def group(first: int, count: int) -> RunningRows:
    numbers = list(range(first, first + count))
    return RunningRows(numbers, [2] * count, [2] * count, torch.zeros(count, 2, 3), None, [()] * count)


def test_chunks_keep_what_was_read_before_a_failure():
    found = []
    with pytest.raises(OSError):
        found.extend(iter(chunked(failing(5), 2)))
    assert found == [TEXTS[:2], TEXTS[2:4], TEXTS[4:5]]


def test_a_progress_bar_counts_the_rows(model, tokenizer, capsys):
    assert len(list(predict_texts(model, tokenizer, TEXTS, early_exit=SETTINGS))) == 60
    assert "60/60" in capsys.readouterr().err
    answers(model, tokenizer)
    assert capsys.readouterr().err == ""


FAULTS = """
import resource, torch
from hf_costeff.prediction import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1, 3, 2, 4) * 20:
        held = torch.empty(size << 20, dtype=torch.uint8).fill_(1), torch.empty(2 << 20, dtype=torch.uint8).fill_(1)
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a property of glibc")
def test_freed_memory_is_kept_and_not_fetched_from_the_system_again():
    """In a fresh process, since the library remembers."""
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert after < 100 < before
