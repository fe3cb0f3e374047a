"""What people put around a Transformers model works around ours: pipeline, evaluator, PEFT, Trainer."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, Features, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from helpers import random_batch, sentence_rows, tiny_model, token_rows, word_tokenizer

TEXTS = ["a good film", "the plot was not very bright", "dull"]
INPUTS = random_batch([7, 3, 11, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("slim")
    labels = {"id2label": {0: "dull", 1: "bright"}, "label2id": {"dull": 0, "bright": 1}}
    tiny_model(**{"num_labels": 2, **labels}).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_the_stock_pipeline_answers_as_the_model_does(folder):
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    logits = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    answers = classify(TEXTS, batch_size=2)
    assert [answer["label"] for answer in answers] == [model.config.id2label[int(row.argmax())] for row in logits]
    scores = torch.tensor([answer["score"] for answer in answers])
    torch.testing.assert_close(scores, logits.softmax(-1).amax(-1).detach(), rtol=1e-5, atol=1e-5)
    assert len(classify({"text": "a good film", "text_pair": "a bad film"}, top_k=None)) == 2


def test_the_evaluator_takes_the_model(folder):
    evaluate = pytest.importorskip("evaluate")

    class Accuracy(evaluate.Metric):
        def _info(self):
            values = Features({name: Value("int64") for name in ("predictions", "references")})
            return evaluate.MetricInfo(description="", citation="", features=values)

        def _compute(self, predictions, references):
            return {"accuracy": sum(a == b for a, b in zip(predictions, references, strict=True)) / len(references)}

    rows = sentence_rows(8)
    result = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=AutoModelForSequenceClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        data=rows,
        metric=Accuracy(),
        label_mapping={"dull": 0, "bright": 1},
    )
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    answers = [{"dull": 0, "bright": 1}[answer["label"]] for answer in classify(list(rows["text"]))]
    assert result["accuracy"] == sum(a == b for a, b in zip(answers, rows["label"], strict=True)) / len(answers)


def test_a_lora_adapter_trains_with_all_exits_and_comes_back_and_merges(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("query_key_value.lora_A" in name for name in trained)
    assert {int(name.split("exits.")[1].split(".")[0]) for name in trained if "exits." in name} == {1, 2, 3, 4}
    frozen = {name: value.clone() for name, value in model.named_parameters() if name not in trained}
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, use_cpu=True, report_to="none", learning_rate=0.1)
    Trainer(model, arguments, train_dataset=token_rows(16, num_labels=2), processing_class=word_tokenizer()).train()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    expected = [logits.detach() for logits in model.eval()(**INPUTS).exit_logits]
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for found, wanted in zip(loaded(**INPUTS).exit_logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_tokenizer_loads_without_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.records == [] and tokenizer.model_max_length == 24


def test_upstreams_own_trainer_trains_and_evaluates_the_model(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(tmp_path, max_steps=3, use_cpu=True, report_to="none", learning_rate=0.01)
    rows, held = token_rows(16, num_labels=2), token_rows(8, 1, 2)
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=held, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    trainer.train()
    changed = {
        name for name, value in model.named_parameters() if value.numel() and not torch.equal(value, before[name])
    }
    assert all(f"costeff.exits.{layer}.classifier.weight" in changed for layer in (1, 2, 3, 4))
    prediction = trainer.predict(held)
    assert prediction.predictions.shape == (8, 2) and prediction.metrics["test_loss"] > 0


def test_streamed_rows_go_in(folder):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    encoded = tokenizer([row["text"] for row in stream], return_tensors="pt", padding=True)
    assert model.predict(**encoded, early_exit=0.5).logits.shape == (3, 2)
