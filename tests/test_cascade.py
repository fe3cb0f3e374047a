"""Making a cascade of classifiers and their tokenizers, saving it, and loading it again."""

from __future__ import annotations

import logging
import statistics

import pytest
import torch
from tokenizers.normalizers import Lowercase
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from helpers import WORDS, random_batch, tiny_bert, tiny_model, word_tokenizer
from hf_costeff import CostEffCascade, ExitConfig, load_cascade, make_cascade, predict_texts, save_cascade
from hf_costeff.hub import check_model_folder
from loopback_hub import LoopbackHub, run_python

NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
TEXTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(14)]


def shifted_tokenizer():
    """The same words with other numbers: its token indices mean other words to a member."""
    tokenizer = word_tokenizer()
    inner = type(tokenizer.backend_tokenizer.model)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokenizer.backend_tokenizer.model = inner({w: i for i, w in enumerate([*words[:4], *reversed(words[4:])])}, "[UNK]")
    return tokenizer


@pytest.fixture
def folders(tmp_path):
    """Two saved members with one kind of tokenizer, the larger one first."""
    paths = [tmp_path / "large", tmp_path / "small"]
    members = [tiny_bert(seed=5, **NAMES), tiny_bert(seed=2, num_hidden_layers=2, **NAMES)]
    for path, model in zip(paths, members, strict=True):
        model.save_pretrained(path)
        word_tokenizer().save_pretrained(path)
    return paths


def test_members_are_loaded_and_put_in_the_order_of_their_cost_with_a_warning(folders, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_costeff"):
        cascade, tokenizer = make_cascade(folders)
    assert [member.config.num_hidden_layers for member in cascade.members] == [2, 4]
    assert "order of their cost: 2, 1" in caplog.text
    assert tokenizer.get_vocab() == word_tokenizer().get_vocab() and cascade.config.member_tokenizers is None


def test_a_shared_tokenizer_lies_beside_the_model_as_ever(folders, tmp_path):
    save_cascade(*make_cascade(folders[::-1]), tmp_path / "cascade")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cascade")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cascade")
    again, same = load_cascade(tmp_path / "cascade")
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert same(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    torch.testing.assert_close(
        again.predict(**inputs, early_exit=0.8).logits, model.predict(**inputs, early_exit=0.8).logits
    )
    check_model_folder(tmp_path / "cascade")


def test_the_tokenizer_with_token_types_serves_all_members():
    plain = word_tokenizer()
    plain.model_input_names = ["input_ids", "attention_mask"]
    members = [tiny_bert(num_hidden_layers=1), tiny_bert()]
    for tokenizers in ([plain, word_tokenizer()], [word_tokenizer(), plain]):
        assert "token_type_ids" in make_cascade(members, tokenizers)[1].model_input_names


def asked(member, tokenizer, text):
    """Class probabilities of one text alone, and their entropy over ln 3."""
    with torch.no_grad():
        chances = member(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
    return chances, float(-(chances * chances.log()).sum() / torch.tensor(3.0).log())


def texts_by_hand(members, tokenizers, threshold):
    """Each text alone, member after member, each with its own tokenizer: (label, member, probability)."""
    found = []
    for text in TEXTS:
        for number, (member, tokenizer) in enumerate(zip(members, tokenizers, strict=True), start=1):
            chances, entropy = asked(member, tokenizer, text)
            if entropy < threshold or number == len(members):
                found.append((NAMES["id2label"][int(chances.argmax())], number, float(chances.max())))
                break
    return found


@pytest.mark.parametrize("own_tokenizers", [False, True])
def test_texts_are_answered_in_order_as_one_by_one(own_tokenizers, tmp_path):
    members = [tiny_bert(seed=2, num_hidden_layers=2, **NAMES), tiny_bert(seed=5, **NAMES)]
    tokenizers = [shifted_tokenizer() if own_tokenizers else word_tokenizer(), word_tokenizer()]
    cascade, found = make_cascade(members, tokenizers)
    assert (found is not None) and isinstance(found, list) == own_tokenizers
    save_cascade(cascade, found, tmp_path / "cascade")
    cascade, found = load_cascade(tmp_path / "cascade")
    threshold = statistics.median(asked(members[0], tokenizers[0], text)[1] for text in TEXTS)
    settings = {"early_exit": threshold, "batch_size": 3, "window": 5, "show_progress": False}
    answers = list(predict_texts(cascade, found, iter(TEXTS), **settings))
    expected = texts_by_hand(members, tokenizers, threshold)
    assert {number for _, number, _ in expected} == {1, 2}
    assert [(a["label"], a["exit_model"]) for a in answers] == [(label, number) for label, number, _ in expected]
    assert [a["score"] for a in answers] == pytest.approx([score for _, _, score in expected], abs=1e-5)
    assert [a["exit_layer"] for a in answers] == [2 if number == 1 else 4 for _, number, _ in expected]


def test_texts_are_cut_to_what_the_shortest_member_takes(caplog):
    members = [tiny_bert(num_hidden_layers=1, max_position_embeddings=6, **NAMES), tiny_bert(**NAMES)]
    cascade, tokenizer = make_cascade(members, [word_tokenizer()] * 2)
    with caplog.at_level(logging.WARNING):
        answers = list(predict_texts(cascade, tokenizer, ["a " * 10], early_exit=0.0, show_progress=False))
    assert answers[0]["exit_model"] == 2 and "more than 6 tokens" in caplog.text


def test_tokenizers_of_one_vocabulary_that_read_otherwise_stay_apart():
    lower = word_tokenizer()
    lower.backend_tokenizer.normalizer = Lowercase()
    members = [tiny_bert(num_hidden_layers=1, **NAMES), tiny_bert(**NAMES)]
    cased = word_tokenizer()
    assert lower.get_vocab() == cased.get_vocab() and lower("THE film")["input_ids"] == cased("the film")["input_ids"]
    cascade, tokenizers = make_cascade(members, [lower, cased])
    assert isinstance(tokenizers, list) and cascade.config.member_tokenizers == ["tokenizer_1", ""]


def test_a_row_that_is_no_text_is_named_after_the_rows_before_it_were_answered():
    members = [tiny_bert(num_hidden_layers=1, **NAMES), tiny_bert(**NAMES)]
    cascade, tokenizer = make_cascade(members, [word_tokenizer()] * 2)
    answers = predict_texts(cascade, tokenizer, [*TEXTS[:3], None], early_exit=0.8, show_progress=False)
    assert len([next(answers) for _ in range(3)]) == 3
    with pytest.raises(ValueError, match="Row 3"):
        next(answers)


def test_members_with_exits_cascade_outside_of_their_own():
    inner = tiny_model(seed=3, exit_config=ExitConfig(threshold=0.4).to_dict(), **NAMES)
    cascade, tokenizer = make_cascade([inner, tiny_bert(num_hidden_layers=8, **NAMES)], [word_tokenizer()] * 2)
    answers = list(predict_texts(cascade, tokenizer, TEXTS, early_exit=0.32, show_progress=False))
    inner_layers = {a["exit_layer"] for a in answers if a["exit_model"] == 1}
    assert len(inner_layers) > 1 and inner_layers <= {1, 2, 3, 4}
    assert {a["exit_layer"] for a in answers if a["exit_model"] == 2} == {8}


def test_what_cannot_make_a_cascade_is_refused(tmp_path):
    bert, tokenizer = tiny_bert(**NAMES), word_tokenizer()
    with pytest.raises(ValueError, match="2 or more"):
        make_cascade([bert], [tokenizer])
    with pytest.raises(ValueError, match="2 or more"):
        make_cascade("bert")
    with pytest.raises(ValueError, match="1 tokenizers for 2 members"):
        make_cascade([bert, bert], [tokenizer])
    with pytest.raises(ValueError, match="Pass `tokenizers`"):
        make_cascade([bert, bert])
    other = tiny_bert(id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    with pytest.raises(ValueError, match=r"\['x', 'y', 'z'\] and the last member \['bad', 'fair', 'good'\]"):
        make_cascade([other, bert], [tokenizer] * 2)
    BertModel(bert.config).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="lacks weights"):
        make_cascade([tmp_path / "headless", bert], [tokenizer] * 2)
    bert.save_pretrained(tmp_path / "single")
    with pytest.raises(ValueError, match="no cascade"):
        load_cascade(tmp_path / "single")


def test_tokenizers_must_be_as_many_as_the_cascade_has():
    members = [tiny_bert(num_hidden_layers=1, **NAMES), tiny_bert(**NAMES)]
    shared, one = make_cascade(members, [word_tokenizer()] * 2)
    own, several = make_cascade(members, [shifted_tokenizer(), word_tokenizer()])
    for cascade, tokenizers in ((shared, [one, one, one]), (own, several[0]), (own, several[:1])):
        with pytest.raises(ValueError, match="as load_cascade returns it"):
            predict_texts(cascade, tokenizers, TEXTS)
    with pytest.raises(TypeError, match="single tokenizer"):
        predict_texts(tiny_model(), [one], TEXTS)


def test_the_base_model_class_says_that_it_knows_no_cascade(folders, tmp_path):
    save_cascade(*make_cascade(folders[::-1]), tmp_path / "cascade")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_pretrained(tmp_path / "cascade")
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path / "cascade"), CostEffCascade)


LOAD_WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["hf_costeff"] = None  # any import of it fails
from transformers import AutoModelForSequenceClassification, AutoTokenizer

cascade = AutoModelForSequenceClassification.from_pretrained("org/cascade", trust_remote_code=True)
assert type(cascade).__module__.startswith("transformers_modules.")
for number, folder in enumerate(cascade.config.member_tokenizers):
    tokenizer = AutoTokenizer.from_pretrained("org/cascade", subfolder=folder, trust_remote_code=True)
    print(tokenizer.convert_tokens_to_ids("film"))
cascade.config.member_tokenizers = None
expected = torch.load(sys.argv[1])
found = cascade.predict(expected["input_ids"], early_exit=True)
assert torch.equal(found.layers_run, expected["layers_run"])
torch.testing.assert_close(found.logits, expected["logits"], rtol=1e-5, atol=1e-5)
print("answers alike")
"""


def test_it_is_pushed_as_one_repository_and_answers_alike_without_the_package(tmp_path):
    inner = tiny_model(seed=3, exit_config=ExitConfig(threshold=0.4).to_dict(), **NAMES)
    tokenizers = [shifted_tokenizer(), word_tokenizer()]
    cascade, _ = make_cascade([inner, tiny_bert(seed=5, num_hidden_layers=8, **NAMES)], tokenizers)
    input_ids = random_batch([9] * 6)["input_ids"]
    cascade.config.member_tokenizers = None
    surest = cascade.predict(input_ids, early_exit=1.0).confidence.median()
    settings = ExitConfig("confidence", threshold=float(1.5 * surest - 0.5))  # 0 at a third, 1 at certainty
    cascade.config.exit_config = settings.to_dict()
    prediction = cascade.predict(input_ids, early_exit=True)
    assert prediction.exit_model.unique().tolist() == [1, 2]
    torch.save({"input_ids": input_ids, **prediction}, tmp_path / "expected.pt")
    cascade.config.member_tokenizers = ["tokenizer_1", ""]
    save_cascade(cascade, tokenizers, tmp_path / "cascade")
    (tmp_path / "cascade" / "stages").mkdir()
    (tmp_path / "cascade" / "stages" / "config.json").touch()
    with LoopbackHub() as hub:
        push = "from hf_costeff.cli import main; raise SystemExit(main())"
        words = ["push", tmp_path / "cascade", "--repo_id", "org/cascade"]
        done = run_python(push, hub.environment(tmp_path), tmp_path, *words)
        assert done.returncode == 0, done.stderr
        files = hub.files("org/cascade")
        assert {"model.safetensors", "modeling_cascade.py", "tokenizer.json", "tokenizer_1/tokenizer.json"} <= set(
            files
        )
        assert not any(name.startswith("stages") for name in files)
        assert b"A cascade of 2 classifiers, smallest first: costeff, bert" in files["README.md"]
        done = run_python(LOAD_WITHOUT_THE_PACKAGE, hub.environment(tmp_path), tmp_path, tmp_path / "expected.pt")
    ids = [tokenizer.convert_tokens_to_ids("film") for tokenizer in tokenizers]
    assert done.stdout == f"{ids[0]}\n{ids[1]}\nanswers alike\n", done.stderr
