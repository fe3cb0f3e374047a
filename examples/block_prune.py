"""Prune a fine-tuned classifier block by block, at several ratios after one penalised run, and ask the packed model.

    python examples/block_prune.py
    python examples/block_prune.py --model org/my-finetuned-bert --train_file reviews.csv --ratios 0.5 0.8

Without `--train_file` a small corpus is generated, and without `--model` a small BERT is trained on it first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from demo import train_teacher
from demo_corpus import make_splits
from hf_costeff import BlockPruningArguments, block_prune
from hf_costeff.data import DataArguments

TEXTS = ["a gripping film.", "the soup was not fresh."]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/packed"))
    parser.add_argument("--model", help="A fine-tuned classifier; default: a small one, trained here.")
    parser.add_argument("--train_file", help="csv, tsv, json, jsonl or parquet; default: a generated corpus.")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.8], help="Shares of the blocks that go.")
    parser.add_argument("--epochs", type=float, default=4.0, help="Under the penalty, and again under the masks.")
    parser.add_argument("--rows", type=int, default=8000, help="Rows to generate.")
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

    for ratio in given.ratios:  # the second one starts at pruning
        arguments = BlockPruningArguments(
            model=given.model,
            output_dir=str(given.output_dir),
            teacher=given.model,  # learns from the answers of what it was
            ratio=ratio,
            column_slabs=4,
            proximal=True,  # few steps: shrink blocks directly
            penalty_epochs=given.epochs,
            retrain_epochs=given.epochs,
        )
        print(f"\nRatio {ratio:g}\n{block_prune(arguments, data).describe()}")

    model = AutoModelForSequenceClassification.from_pretrained(given.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(given.output_dir)
    answer = model.predict(**tokenizer(given.texts, return_tensors="pt", padding=True))
    print()
    for text, chances in zip(given.texts, answer.probabilities, strict=True):
        label = model.config.id2label[int(chances.argmax())]
        print(f"{label} ({float(chances.max()):.2f})  {text}")


if __name__ == "__main__":
    main()
