"""What people put around a Transformers model works around ours: pipeline, evaluator, PEFT, Trainer, accelerate."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from datasets import Features, IterableDataset, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from helpers import random_batch, sentence_rows, tiny_model, token_rows, word_tokenizer
from hf_costeff import CostEffTrainer, CostEffTrainingArguments

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


def test_an_adapter_of_a_gated_model_comes_back_with_the_modules_it_was_told_to_save(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model(num_labels=2, skip_gates="attention", gate_size=6, exit_head="attention", exit_head_size=8)
    base.save_pretrained(tmp_path / "base")
    saved = ["attention.reduce", "attention.query", "attention.key", "attention.value", "dense", "decision"]
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, modules_to_save=saved)
    model = peft.get_peft_model(base, settings)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert not [name for name in frozen if (".exits." in name or ".gates." in name) and "original_module" not in name]
    with torch.no_grad():  # what training might do
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected = model.eval()(**INPUTS)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    found = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(**INPUTS)
    for kind in ("exit_logits", "skip_probabilities"):
        torch.testing.assert_close(found[kind], expected[kind])


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


def test_streamed_rows_train_the_model_in_upstreams_trainer_and_in_ours(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = sentence_rows(64).to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=16)
    stream = rows.map(lambda row: {**tokenizer(row["text"]), "labels": row["label"]}, remove_columns=["text", "label"])
    assert isinstance(stream, IterableDataset)
    settings = {"max_steps": 12, "use_cpu": True, "report_to": "none", "learning_rate": 0.01, "logging_steps": 1}
    for trainer_class, arguments_class in ((Trainer, TrainingArguments), (CostEffTrainer, CostEffTrainingArguments)):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        before = [head.classifier.weight.clone() for head in model.costeff.exits.values()]
        arguments = arguments_class(tmp_path / trainer_class.__name__, save_strategy="no", **settings)
        trainer = trainer_class(
            model, arguments, train_dataset=stream, eval_dataset=stream.take(16), processing_class=tokenizer
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
        after = [head.classifier.weight for head in model.costeff.exits.values()]
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [("regression", 1), ("single_label_classification", 3), ("multi_label_classification", 3)],
)
def test_upstreams_trainer_trains_every_problem_type(problem_type, num_labels, tmp_path):
    model = tiny_model(num_labels=num_labels, problem_type=problem_type)
    rows = token_rows(16)
    if problem_type != "single_label_classification":
        values = [[float(label == 0), float(label == 1), 1.0][:num_labels] for label in rows["labels"]]
        rows = rows.remove_columns("labels").add_column(
            "labels", [value if num_labels > 1 else value[0] for value in values]
        )
    arguments = TrainingArguments(
        tmp_path, max_steps=30, use_cpu=True, report_to="none", learning_rate=0.01, logging_steps=1, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=word_tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# --- placing weights


def test_accelerate_fills_an_empty_model_and_keeps_some_layers_on_disk(folder, tmp_path):
    expected = AutoModelForSequenceClassification.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForSequenceClassification.from_config(expected.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    places = {"costeff.embeddings": "cpu", "costeff.exits": "cpu"}
    places |= {f"costeff.layers.{layer}": "disk" if layer in (0, 3) else "cpu" for layer in range(4)}
    model = load_checkpoint_and_dispatch(
        model, str(folder / "model.safetensors"), device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    assert model.costeff.layers[3].attention.output.weight.is_meta
    assert not model.costeff.layers[1].feed_forward.output.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUTS).logits, expected(**INPUTS).logits, rtol=1e-5, atol=1e-5)
    found, wanted = (one.predict(**INPUTS, early_exit=0.1) for one in (model, expected))
    assert torch.equal(found.exit_layer, wanted.exit_layer) and len(set(found.exit_layer.tolist())) > 1


def test_accelerate_plans_devices_without_splitting_a_layer(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    one_layer = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in model.costeff.layers)
    places = infer_auto_device_map(
        model, max_memory={"cpu": 2 * one_layer, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert set(places.values()) == {"cpu", "disk"}
    inside = [name for name in places if name.startswith("costeff.layers.") and name.count(".") > 2]
    assert inside == []


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_loads_the_model_where_it_says(folder, device_map):
    model = AutoModelForSequenceClassification.from_pretrained(folder, device_map=device_map)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert not any(parameter.is_meta for parameter in model.parameters())
    inputs = {name: tensor.to(model.device) for name, tensor in INPUTS.items()}
    torch.testing.assert_close(model(**inputs).logits.cpu(), plain(**INPUTS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_a_dtype_is_kept_when_it_is_asked_for_and_when_it_is_saved(folder, dtype, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.dtype == wanted and torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)


def test_every_load_mode_in_the_docs_names_a_test_that_is_there():
    folder = Path(__file__).parent
    page = (folder.parent / "docs" / "how-to" / "save-and-load.md").read_text()
    rows = re.findall(r"^\|.*\| `(test_\w+)`(?: in `tests/(\w+\.py)`)? \|$", page, re.MULTILINE)
    assert len(rows) == page.count("`test_") >= 9
    missing = [name for name, file in rows if f"def {name}(" not in (folder / (file or "test_hub.py")).read_text()]
    assert missing == []


def test_model_and_tokenizer_load_from_a_subfolder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "models" / "small")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "models", subfolder="small")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models", subfolder="small")
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    with pytest.raises((OSError, ValueError), match=str(tmp_path / "models")):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "models", subfolder="large")
