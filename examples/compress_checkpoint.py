"""Compress a fine-tuned checkpoint on your own rows, and look at the result.

    python examples/compress_checkpoint.py --teacher org/my-finetuned-bert --train_file train.csv --output_dir slim

The columns are found by their usual names; `--text_columns` and `--label_column` name others. An interrupted run goes
on when it is started again. `hf-costeff compress` does the same from the command line.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff import compress
from hf_costeff.compression import Compression
from hf_costeff.compression_args import CompressionArguments
from hf_costeff.data import DataArguments


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Hub id or folder of a fine-tuned classifier.")
    parser.add_argument("--train_file", required=True, help="csv, tsv, json, jsonl or parquet.")
    parser.add_argument("--validation_file", help="Rows for the report; default: cut from the training rows.")
    parser.add_argument("--text_columns", nargs="+")
    parser.add_argument("--label_column")
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--max_metric_drop", type=float, default=0.5, help="Points that early exit may cost.")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--output_dir", default="slim")
    parser.add_argument("--texts", nargs="*", default=[], help="Texts to ask the slim model about at the end.")
    return parser.parse_args()


def main() -> None:
    given = parse()
    data = {
        "train_file": given.train_file,
        "validation_file": given.validation_file,
        "text_columns": given.text_columns,
        "label_column": given.label_column,
    }
    target = {"compression": given.compression, "recipe": given.recipe}
    arguments = CompressionArguments(given.teacher, given.output_dir, **target)
    print(Compression(arguments, DataArguments(**data)).plan().describe(), flush=True)  # before any training

    result = compress(
        given.teacher, output_dir=given.output_dir, max_metric_drop=given.max_metric_drop, **target, **data
    )
    print(result.table())
    early = result.rows[-1]
    for layer, share in enumerate(early.exit_shares, start=1):
        print(f"after layer {layer}: {share:.0%} of the validation rows")

    if given.texts:
        model = AutoModelForSequenceClassification.from_pretrained(result.model_path)
        tokenizer = AutoTokenizer.from_pretrained(result.model_path)
        batch = tokenizer(given.texts, return_tensors="pt", padding=True, truncation=True)
        answer = model.predict(**batch, early_exit=True)
        for text, chances, layer in zip(given.texts, answer.probabilities, answer.exit_layer, strict=True):
            print(f"{model.config.id2label[int(chances.argmax())]}, after layer {layer}: {text}")


if __name__ == "__main__":
    main()
