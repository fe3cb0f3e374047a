"""Answer a file of texts, and see what early exit saves and changes.

    python examples/batch_prediction.py --model slim --file reviews.csv

The same rows are predicted at full depth and with early exit. `hf-costeff predict` writes the answers to a file.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff import predict_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a slim model.")
    parser.add_argument("--file", required=True, help="csv with a text column, or two for pairs.")
    parser.add_argument("--text_columns", nargs="+", help="Default: found by the usual names.")
    parser.add_argument("--threshold", type=float, help="On the normalised entropy. Default: the saved settings.")
    parser.add_argument("--show", type=int, default=5, help="Answers to print.")
    given = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = load_dataset("csv", data_files=given.file, split="train")

    found = {}
    for name, early_exit in (("full depth", False), ("early exit", given.threshold)):
        start = time.perf_counter()
        found[name] = list(
            predict_texts(model, tokenizer, rows, early_exit=early_exit, text_columns=given.text_columns)
        )
        print(f"{name}: {len(rows) / (time.perf_counter() - start):.0f} rows per second")

    answers = found["early exit"]
    same = sum(a["label"] == b["label"] for a, b in zip(answers, found["full depth"], strict=True))
    print(f"answers as at full depth: {same} of {len(rows)}")
    for layer, count in sorted(Counter(answer["exit_layer"] for answer in answers).items()):
        print(f"after layer {layer}: {count} rows")
    for answer in answers[: given.show]:
        print(f"{answer['label']}  {answer['score']:.0%}  after layer {answer['exit_layer']}")


if __name__ == "__main__":
    main()
