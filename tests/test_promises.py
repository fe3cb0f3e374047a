"""A promise belongs to weights: kept through saving, void after any change to them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from helpers import random_batch, tiny_model
from hf_costeff import ExitConfig
from hf_costeff.promises import logger, warn_if_void, weights_fingerprint

INPUTS = random_batch([5, 3])


@pytest.fixture(autouse=True)
def nothing_was_said_before():
    logger.warning_once.cache_clear()


def promising_model():
    model = tiny_model()
    calibration = {"promise": {"fingerprint": weights_fingerprint(model.costeff)}}
    model.config.exit_config = ExitConfig(threshold=0.5, calibration=calibration).to_dict()
    return model


def void(caplog) -> int:
    return sum("promise is void" in record.getMessage() for record in caplog.records)


def test_with_the_weights_it_was_made_for_nothing_is_said(caplog, tmp_path):
    model = promising_model()
    model.predict(**INPUTS, early_exit=True)
    model.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path).predict(**INPUTS)
    assert void(caplog) == 0


def change_one_weight(model):
    with torch.no_grad():
        model.costeff.layers[3].attention.output.weight[0, 0] += 1e-3
    return model


def replace_a_head(model):
    model.costeff.exits["2"].classifier = nn.Linear(12, 3)
    return model


def wrap_a_layer(model):
    """As adapters do: the weights stay, under another name."""
    model.costeff.exits["2"].classifier = nn.Sequential(model.costeff.exits["2"].classifier)
    return model


@pytest.mark.parametrize("change", [change_one_weight, replace_a_head, wrap_a_layer, lambda model: model.bfloat16()])
def test_with_other_weights_precision_or_adapters_it_is_void_and_that_is_said_once(change, caplog):
    model = promising_model()
    model.predict(**INPUTS, early_exit=True)
    change(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model.predict(**INPUTS, early_exit=True)
    assert void(caplog) == 1


def test_a_threshold_of_ones_own_and_full_depth_promise_nothing(caplog):
    model = change_one_weight(promising_model())
    model.predict(**INPUTS, early_exit=0.5)
    model.predict(**INPUTS, early_exit=False)
    warn_if_void(model, None)
    warn_if_void(model, {"promise": None})
    assert void(caplog) == 0


@pytest.mark.parametrize(
    ("calibration", "threshold", "said"),
    [
        ({"skip_threshold": 0.5}, 0.5, None),
        (
            {"skip_threshold": 0.5},
            0.7,
            "chosen with a skip threshold of 0.5, and the model answers with a skip threshold of 0.7",
        ),
        ({"skip_threshold": 0.5}, None, "chosen with a skip threshold of 0.5, and the model answers without skipping"),
        ({"disagreement": 0.0}, 0.5, None),
        (
            {"skip_threshold": 0.5, "promise": {}},
            0.7,
            "promised with a skip threshold of 0.5, and the model answers with",
        ),
        ({"promise": {}}, 0.7, "promised without skipping, and the model answers with"),
        ({"promise": {}}, None, None),
    ],
)
def test_settings_for_other_paths_are_told_promised_or_not(calibration, threshold, said, caplog):
    model = nn.Linear(2, 2)
    if "promise" in calibration:
        calibration["promise"]["fingerprint"] = weights_fingerprint(model)
    warn_if_void(model, calibration, threshold)
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == (said is not None) and all(said in text for text in found)
    assert void(caplog) == (said is not None and "promise" in calibration)


def test_weights_are_read_again_only_after_a_change(monkeypatch):
    model, read = promising_model(), []
    monkeypatch.setattr("hf_costeff.promises.weights_fingerprint", lambda model, _: read.append(model) or "same")
    for _ in range(3):
        model.predict(**INPUTS, early_exit=True)
    assert len(read) == 1
    change_one_weight(model).predict(**INPUTS, early_exit=True)
    assert len(read) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_has_its_own_fingerprint(dtype):
    layer = nn.Linear(2, 2)
    other = nn.Linear(2, 2).to(dtype)
    with torch.no_grad():
        for parameter in (*layer.parameters(), *other.parameters()):
            parameter.zero_()
    assert (weights_fingerprint(layer) == weights_fingerprint(other)) == (dtype == torch.float32)
