"""The pipeline that leaves early, beside upstream's, which does not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from helpers import tiny_bert, tiny_model, word_tokenizer
from hf_costeff import CostEffClassificationPipeline, ExitConfig, make_cascade
from hf_costeff.exit_criteria import decision_probabilities, normalized_entropy

TEXTS = [
    "a good film",
    "the plot was not very bright",
    "dull",
    "the cast was good but the story slow",
    "a",
    "ends well",
]


def settings_that_split(model) -> ExitConfig:
    """Half of the texts leave at the first exit."""
    with torch.no_grad():
        logits = model(**word_tokenizer()(TEXTS, padding=True, return_tensors="pt")).exit_logits[0]
    measured = normalized_entropy(decision_probabilities(logits / 2, "single_label_classification"))
    return ExitConfig(threshold=float(measured.sort().values[2:4].mean()), temperatures=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("slim")
    names = {0: "bad", 1: "fair", 2: "good"}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    model = tiny_model(seed=3, **labels)
    model.config.exit_config = settings_that_split(model).to_dict()
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def classify(folder):
    return pipeline("costeff-classification", model=folder, device="cpu")


def predicted(model, text, pair=None, **settings):
    return model.predict(**word_tokenizer()(text, pair, return_tensors="pt"), **settings)


def check(answer, expected, model):
    best = int(expected.probabilities.argmax())
    assert answer["label"] == model.config.id2label[best]
    assert answer["score"] == pytest.approx(float(expected.probabilities[0, best]), abs=1e-5)
    assert answer["exit_layer"] == int(expected.exit_layer)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_answers_as_predict_does_with_the_saved_settings(classify, model, batch_size):
    assert isinstance(classify, CostEffClassificationPipeline)
    answers = classify(TEXTS, batch_size=batch_size)
    assert len({answer["exit_layer"] for answer in answers}) > 1
    for text, answer in zip(TEXTS, answers, strict=True):
        check(answer, predicted(model, text), model)


@pytest.mark.parametrize("early_exit", [False, 1, 0.35, ExitConfig(criterion="patience", patience=1)])
def test_early_exit_is_taken_in_the_call_and_when_the_pipeline_is_made(classify, folder, model, early_exit):
    made = pipeline("costeff-classification", model=folder, device="cpu", early_exit=early_exit)
    for text in TEXTS:
        expected = predicted(model, text, early_exit=early_exit)
        check(classify(text, early_exit=early_exit)[0], expected, model)
        check(made(text)[0], expected, model)
        check(made(text, early_exit=None)[0], predicted(model, text), model)


def test_pairs_are_dicts_as_upstream_or_tuples(classify, model):
    for pair in ({"text": TEXTS[0], "text_pair": TEXTS[1]}, (TEXTS[0], TEXTS[1])):
        for answer in (classify(pair), classify([pair])[0]):
            check(answer, predicted(model, TEXTS[0], TEXTS[1]), model)


def test_what_is_no_pair_and_a_model_without_exits_are_refused(classify):
    with pytest.raises(ValueError, match=r"a tuple of 3: .*A pair of texts has two"):
        classify([("a", "b", "c")])
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no exits .*text-classification"):
        pipeline("costeff-classification", model=tiny_bert(), tokenizer=word_tokenizer(), device="cpu")


def test_with_top_k_every_label_carries_the_exit_layer(classify, model):
    expected = predicted(model, TEXTS[3])
    answers = classify(TEXTS[3], top_k=2)
    chances, labels = expected.probabilities[0].topk(2)
    assert [answer["label"] for answer in answers] == [model.config.id2label[int(label)] for label in labels]
    assert [answer["score"] for answer in answers] == pytest.approx(chances.tolist(), abs=1e-5)
    assert {answer["exit_layer"] for answer in answers} == {int(expected.exit_layer)}
    assert len(classify(TEXTS[3], top_k=None)) == 3
    with pytest.raises(ValueError, match="`top_k` is 0"):
        classify(TEXTS[3], top_k=0)


def test_a_function_is_applied_to_the_raw_logits(classify, model):
    expected = predicted(model, TEXTS[0]).logits[0]
    (none,), (sigmoid,) = (classify(TEXTS[0], function_to_apply=name) for name in ("none", "sigmoid"))
    assert none["score"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert sigmoid["score"] == pytest.approx(float(expected.max().sigmoid()), abs=1e-5)


def test_a_regression_models_score_is_its_value(tmp_path):
    model = tiny_model(num_labels=1, problem_type="regression")
    classify = pipeline("costeff-classification", model=model, tokenizer=word_tokenizer(), device="cpu")
    answers = classify(TEXTS, batch_size=3)
    values = [float(predicted(model, text).logits) for text in TEXTS]
    assert [answer["score"] for answer in answers] == pytest.approx(values, abs=1e-5)


def test_upstreams_pipeline_still_runs_all_layers(folder, model):
    upstream = pipeline("text-classification", model=folder, device="cpu")
    for text in TEXTS:
        (answer,) = upstream(text)
        expected = predicted(model, text, early_exit=False).logits.softmax(-1)[0]
        assert set(answer) == {"label", "score"} and answer["score"] == pytest.approx(float(expected.max()), abs=1e-5)


def test_a_saved_pipeline_comes_back_with_its_code(classify, tmp_path):
    classify.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline_costeff.py").is_file() and (tmp_path / "modeling_costeff.py").is_file()
    again = pipeline("costeff-classification", model=str(tmp_path), device="cpu", trust_remote_code=True)
    assert type(again).__module__.startswith("transformers_modules")
    found, expected = again(TEXTS), classify(TEXTS)
    torch.testing.assert_close(*(torch.tensor([answer["score"] for answer in each]) for each in (found, expected)))
    assert [answer["exit_layer"] for answer in found] == [answer["exit_layer"] for answer in expected]


def test_a_cascade_says_which_member_answered(tmp_path):
    cascade, tokenizer = make_cascade([tiny_bert(num_hidden_layers=1), tiny_bert()], [word_tokenizer()] * 2)
    pipe = pipeline("costeff-classification", model=cascade, tokenizer=tokenizer, early_exit=1.0)
    assert [(answer["exit_model"], answer["exit_layer"]) for answer in pipe(["a good film", "bad"])] == [(1, 1)] * 2
    assert pipe("a good film", early_exit=False)[0]["exit_model"] == 2
