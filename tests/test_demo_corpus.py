from __future__ import annotations

import random
from collections import Counter

import pytest
from datasets import ClassLabel
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from demo_corpus import (
    ADJECTIVES,
    DIFFICULTY_SHARES,
    MAX_WORDS,
    MIN_WORDS,
    Writer,
    drop_contained,
    make_corpus,
    make_splits,
    train_tokenizer,
    words_of,
)

SIZE = 6000


@pytest.fixture(scope="module")
def corpus() -> list[dict]:
    return make_corpus(SIZE, seed=0)


@pytest.fixture(scope="module")
def splits():
    return make_splits(train=600, calibration=151, validation=200, seed=3)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([row["text"] for row in corpus[:2000]], vocab_size=800)


def contained_pairs(texts: list[str], others: list[str]) -> list[tuple[str, str]]:
    """Every pair in which a text stands inside, or equals, one of the others; found the slow way."""
    spaced = [f" {' '.join(words_of(text))} " for text in texts]
    others_spaced = [f" {' '.join(words_of(text))} " for text in others]
    return [(a, b) for a in spaced for b in others_spaced if a in b]


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another():
    assert make_corpus(200, seed=7) == make_corpus(200, seed=7)
    assert make_corpus(200, seed=7) != make_corpus(200, seed=8)


def test_the_global_random_state_neither_matters_nor_changes():
    random.seed(1)
    first, state = make_corpus(50, seed=7), random.getstate()
    assert random.getstate() == state
    random.seed(2)
    assert make_corpus(50, seed=7) == first


@pytest.mark.parametrize("size", [0, 1, 2, 7, 101])
def test_the_corpus_has_the_wanted_number_of_rows(size):
    assert len(make_corpus(size, seed=0)) == size


def test_a_negative_size_is_refused_with_its_value():
    with pytest.raises(ValueError, match="-1"):
        make_corpus(-1, seed=0)
    with pytest.raises(ValueError, match=r"`calibration` is -5"):
        make_splits(train=10, calibration=-5, validation=10, seed=0)


def test_both_labels_are_balanced_in_every_difficulty(corpus):
    counts = Counter((row["difficulty"], row["label"]) for row in corpus)
    for difficulty, share in DIFFICULTY_SHARES.items():
        assert abs(counts[difficulty, 0] - counts[difficulty, 1]) <= 1
        assert counts[difficulty, 0] + counts[difficulty, 1] == pytest.approx(share * SIZE, abs=3)


def test_no_text_occurs_twice(corpus):
    assert len({words_of(row["text"]) for row in corpus}) == len(corpus)


def test_no_text_of_the_corpus_stands_inside_another():
    texts = [row["text"] for row in make_corpus(600, seed=2)]
    assert len(contained_pairs(texts, texts)) == len(texts)  # each in itself


def test_dropping_contained_texts_keeps_the_longer_one_and_ignores_parts_of_words():
    texts = ["An art.", "We saw an art, and left.", "An art lover.", "The cart.", "a cart", "A  CART!", "Cart."]
    assert drop_contained(texts) == ["We saw an art, and left.", "An art lover.", "The cart.", "a cart", "A  CART!"]


def test_texts_are_between_three_and_forty_words_and_spread_over_that_range(corpus):
    lengths = [len(row["text"].split()) for row in corpus]
    assert min(lengths) == MIN_WORDS == 3
    assert 30 <= max(lengths) <= MAX_WORDS == 40


def test_texts_are_tidy(corpus):
    for row in corpus:
        text = row["text"]
        assert text.endswith(".") and text[0].isupper()
        assert "  " not in text and ",," not in text and ",." not in text and ",;" not in text
        assert " i " not in text and " a a" not in text


def test_no_word_gives_the_label_of_a_case_away_that_is_not_easy(corpus):
    counts: dict[str, list[int]] = {}
    for row in corpus:
        if row["difficulty"] != "easy":
            for word in set(words_of(row["text"])):
                counts.setdefault(word, [0, 0])[row["label"]] += 1
    precision = {word: max(pair) / sum(pair) for word, pair in counts.items() if sum(pair) >= 50}
    assert len(precision) > 150
    assert max(precision.values()) <= 0.75, max(precision, key=precision.get)


def test_a_bag_of_words_solves_the_easy_cases_and_is_lost_on_the_others(corpus):
    train, held_out = corpus[: SIZE * 3 // 4], corpus[SIZE * 3 // 4 :]
    vectorizer = CountVectorizer(token_pattern=r"\w+")
    model = LogisticRegression(max_iter=1000, C=0.5)
    model.fit(vectorizer.fit_transform([row["text"] for row in train]), [row["label"] for row in train])

    def accuracy(rows: list[dict]) -> float:
        return model.score(vectorizer.transform([row["text"] for row in rows]), [row["label"] for row in rows])

    assert accuracy([row for row in held_out if row["difficulty"] == "easy"]) > 0.95
    assert accuracy([row for row in held_out if row["difficulty"] != "easy"]) < 0.65
    assert 0.65 < accuracy(held_out) < 0.88


@pytest.mark.parametrize(
    ("construction", "inside", "positive"),
    [
        ("negated", "not a treat", False),
        ("negated", "by no means dull", True),
        ("negated", "lacks charm", False),
        ("negated", "lacks flaws", True),
        ("seemingly_negated", "not only dull", False),
        ("doubly_negated", "is not without charm", True),
        ("doubly_negated", "is not without flaws", False),
        ("contrast", "for all its charm", False),
        ("contrast", "for all its flaws", True),
    ],
)
def test_the_label_follows_the_construction_and_not_the_words(construction, inside, positive):
    found = 0
    for seed in range(10_000):
        clause = getattr(Writer(random.Random(seed)), construction)()
        # a denial around the whole turns it once more, so only clauses without one are read here
        if inside in clause.text and not clause.text.startswith(("i ", "it is not", "nobody")):
            assert clause.positive is positive, clause.text
            found += 1
    assert found > 0


def test_after_but_the_last_clause_decides_and_beside_although_the_main_one():
    decided = 0
    for seed in range(2_000):
        clause = Writer(random.Random(seed)).contrast()
        but, although = clause.text.split(", but "), clause.text.split(", although ")
        decisive = but[1] if len(but) == 2 else although[0] if len(although) == 2 else ""
        for positive in (False, True):
            if set(decisive.split()) & set(ADJECTIVES[positive]):
                assert clause.positive is positive, clause.text
                decided += 1
    assert decided > 50


def test_a_comparison_that_swaps_sides_swaps_the_label():
    seen = set()
    for seed in range(2_000):
        writer = Writer(random.Random(seed))
        clause = writer.compared()
        if "than" in clause.text and " better " in clause.text:
            praised = clause.text.split(" is ")[0]
            assert clause.positive is (praised not in writer.domain.rivals), clause.text
            seen.add(clause.positive)
    assert seen == {True, False}


def test_somebody_elses_opinion_counts_only_through_agreement():
    seen = set()
    for seed in range(2_000):
        clause = Writer(random.Random(seed)).second_opinion()
        for verb, positive in (("loved", True), ("hated", False)):
            if f" {verb} " in clause.text:
                refused = clause.text.endswith((", but i did not", ", which i did not"))
                if refused or clause.text.endswith((", and so did i", ", and i did too")):
                    assert clause.positive is (positive != refused), clause.text
                    seen.add((positive, refused))
    assert len(seen) == 4


def test_difficulty_counts_the_constructions():
    for seed in range(300):
        assert Writer(random.Random(seed)).text("easy").operations == 0
        assert Writer(random.Random(seed)).text("medium").operations == 1
        assert Writer(random.Random(seed)).text("hard").operations >= 2


def test_splits_have_the_wanted_sizes_columns_and_label_names(splits):
    assert {name: len(split) for name, split in splits.items()} == {"train": 600, "calibration": 151, "validation": 200}
    for split in splits.values():
        assert split.column_names == ["text", "label", "difficulty"]
        assert split.features["label"] == ClassLabel(names=["negative", "positive"])


def test_every_split_is_balanced_and_has_the_mix_of_difficulties(splits):
    for split in splits.values():
        assert abs(sum(split["label"]) - len(split) / 2) <= 2
        for difficulty, share in DIFFICULTY_SHARES.items():
            assert split["difficulty"][:].count(difficulty) == pytest.approx(share * len(split), abs=3)


def test_no_text_of_a_split_stands_inside_a_text_of_another(splits):
    for name, split in splits.items():
        others = [text for other, rows in splits.items() if other != name for text in rows["text"]]
        assert contained_pairs(list(split["text"]), others) == []


def test_splits_are_the_same_for_the_same_seed(splits):
    again = make_splits(train=600, calibration=151, validation=200, seed=3)
    assert all(again[name].to_list() == split.to_list() for name, split in splits.items())


def test_the_tokenizer_frames_texts_and_pairs_as_bert_does(tokenizer):
    pair = tokenizer("A dull film.", "It drags.")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert tokens == ["[CLS]", "a", "dull", "film", ".", "[SEP]", "it", "drags", ".", "[SEP]"]
    assert pair["token_type_ids"] == [0] * 6 + [1] * 4
    assert tokenizer("")["input_ids"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_the_tokenizer_lower_cases_keeps_to_its_size_and_knows_its_corpus(tokenizer, corpus):
    assert tokenizer("DULL Film")["input_ids"] == tokenizer("dull film")["input_ids"]
    assert len(tokenizer) <= 800
    assert tokenizer.pad_token_id == 0 and tokenizer.model_max_length == 64
    ids = tokenizer([row["text"] for row in corpus], truncation=True)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert max(map(len, ids)) <= 64


def test_the_tokenizer_survives_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "My brother hated it, but I did not."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.model_max_length == 64
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text.lower()
