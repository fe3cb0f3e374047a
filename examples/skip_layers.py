"""Train gates that let every text skip layers, and exits that let it leave, on a fine-tuned classifier.

    python examples/skip_layers.py
    python examples/skip_layers.py --model org/my-finetuned-bert --train_file reviews.csv --target_layers 4 8

Without `--train_file` a small corpus is generated, and without `--model` a small BERT is trained on it first. Every
target in layers is a run of its own; without one the weight of the incentive decides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from demo import train_teacher
from demo_corpus import make_splits
from hf_costeff import LayerSkippingArguments, train_layer_skipping
from hf_costeff.data import DataArguments

TEXTS = ["a gripping film.", "the soup was not fresh."]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/skipping"))
    parser.add_argument("--model", help="A fine-tuned classifier; default: a small one, trained here.")
    parser.add_argument("--train_file", help="csv, tsv, json, jsonl or parquet; default: a generated corpus.")
    parser.add_argument("--target_layers", type=float, nargs="*", default=[2.0], help="Layers to run on average.")
    parser.add_argument("--gates", help="attention, linear or none. Default: by the model.")
    parser.add_argument("--epochs", type=float, default=5.0, help="Of the gates and the encoder.")
    parser.add_argument("--exit_epochs", type=float, default=4.0, help="Of the exits; 0 leaves them out.")
    parser.add_argument("--rows", type=int, default=4000, help="Rows to generate.")
    parser.add_argument("--texts", nargs="+", default=TEXTS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.train_file is None:
        data = make_splits(train=given.rows, calibration=500, validation=500, seed=0)
    elif given.model is None:
        raise SystemExit("--train_file needs a --model that was fine-tuned on such data.")
    else:
        data = DataArguments(train_file=given.train_file)
    if given.model is None:
        given.model = str(given.output_dir.with_name("teacher"))
        train_teacher(Path(given.model), data, epochs=4)

    targets = [] if given.gates == "none" else given.target_layers
    for target in targets or [None]:
        folder = given.output_dir / ("free" if target is None else f"{target:g}-layers")
        arguments = LayerSkippingArguments(
            model=given.model,
            output_dir=str(folder),
            teacher=given.model,  # learns from the answers of what it was
            gates=given.gates,
            target_layers=target,
            epochs=given.epochs,
            exit_epochs=given.exit_epochs,
            max_metric_drop=1.0 if given.exit_epochs else None,
        )
        print(f"\n{train_layer_skipping(arguments, data).describe()}")

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = model.predict(**tokenizer(given.texts, return_tensors="pt", padding=True))
    print()
    skipped_layers = answer.skipped_layers
    if skipped_layers is None:  # a model without gates skips none
        skipped_layers = torch.zeros(len(given.texts), model.config.num_hidden_layers)
    for text, chances, left, skipped in zip(
        given.texts, answer.probabilities, answer.exit_layer, skipped_layers, strict=True
    ):
        label = model.config.id2label[int(chances.argmax())]
        ran = [layer for layer in range(1, int(left) + 1) if not skipped[layer - 1]]
        print(f"{label} ({float(chances.max()):.2f})  layers {ran}, left after {int(left)}  {text}")


if __name__ == "__main__":
    main()
