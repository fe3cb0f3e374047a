"""A cascade of two models: the small one learns which texts are hard, the large one answers those it is not sure of.

    python examples/cascade.py
    python examples/cascade.py --models google/bert_uncased_L-2_H-768_A-12 bert-base-uncased --train_file reviews.csv

Without `--train_file` a small corpus is generated, and without `--models` two small encoders are trained on it from
scratch: they are no pre-trained models, and the cascade is only as good as they are.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from transformers import BertConfig, BertModel, PreTrainedTokenizerBase, set_seed

from demo_corpus import make_splits, train_tokenizer
from hf_costeff import CascadeArguments, calibrate, load_cascade, predict_texts, train_cascade
from hf_costeff.data import DataArguments, make_collator, prepare_split

TEXTS = ["a gripping film.", "the soup was not fresh.", "the plot is witty, but the ending ruins it."]


def new_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase, layers: int) -> str:
    """A BERT with random weights and no head."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/cascade"))
    parser.add_argument("--models", nargs="+", help="Smallest first; default: two small encoders, made here.")
    parser.add_argument("--train_file", help="csv, tsv, json, jsonl or parquet; default: a generated corpus.")
    parser.add_argument("--rows", type=int, default=4000, help="Rows to generate.")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--folds", type=int, default=3, help="Folds in which difficulty is told.")
    parser.add_argument("--target_speedup", type=float, default=2.0)
    given = parser.parse_args()
    set_seed(0)
    corpus = None
    if given.train_file is None:
        corpus = make_splits(train=given.rows, calibration=500, validation=500, seed=0)
    if given.models is None:
        if corpus is None:
            raise SystemExit("--train_file needs --models that were pre-trained.")
        tokenizer = train_tokenizer(corpus["train"]["text"][:], vocab_size=1000)
        sizes = {"small": 1, "large": 4}
        folder = given.output_dir / "encoders"
        given.models = [new_encoder(folder / name, tokenizer, layers) for name, layers in sizes.items()]

    held_out = "calibration" if corpus is not None else None
    data = DataArguments(train_file=given.train_file, calibration_split=held_out)
    arguments = CascadeArguments(
        given.models,
        str(given.output_dir / "model"),
        difficulty_folds=given.folds,
        epochs=given.epochs,
        learning_rate=4e-4 if corpus is not None else 5e-5,
    )
    result = train_cascade(arguments, data, corpus)
    for exit in result.exits:
        print(f"member {exit.member}: {result.metric} {exit.metric:.4f}, DIS {exit.discrimination}")
    if result.hard_share is not None:
        print(f"hard for the smallest: {result.hard_share:.1%} of the training rows")
    cascade, tokenizer = load_cascade(result.path)
    if corpus is None:
        print("Choose thresholds on rows kept apart: hf-costeff cascade calibrate")
        return
    rows = prepare_split(corpus, "calibration", tokenizer, config=cascade.config, max_positions=64)
    settings = calibrate(cascade, rows, make_collator(tokenizer), target_speedup=given.target_speedup)
    cascade.config.save_pretrained(result.path)
    print(f"thresholds {settings.threshold}: {settings.calibration}")
    for text, answer in zip(TEXTS, predict_texts(cascade, tokenizer, TEXTS, show_progress=False), strict=True):
        print(f"{answer['label']:<9} {answer['score']:.0%}  by member {answer['exit_model']}   {text}")
    texts = corpus["validation"]["text"][:]
    print(Counter(answer["exit_model"] for answer in predict_texts(cascade, tokenizer, texts)))


if __name__ == "__main__":
    main()
