"""The main job in a few minutes, with nothing to download: corpus, teacher, `compress`, report.

    make demo        (or: python examples/demo.py --output_dir build/demo)

A corpus is generated, a small BERT is trained on it as the teacher, and the whole recipe makes a slim multi-exit model
of it. At the end the model is loaded again in a fresh process and asked for a few answers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from demo_corpus import LABEL_NAMES, make_splits, train_tokenizer
from hf_costeff import compress

TEXTS = ("a gripping film.", "the soup was not fresh.", "the plot is witty, but the ending ruins it.")
RELOAD = """
import sys
import hf_costeff
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = sys.argv[2:]
answers = model.predict(**tokenizer(texts, return_tensors="pt", padding=True), early_exit=True)
for text, chances, layer in zip(texts, answers.probabilities, answers.exit_layer):
    label = model.config.id2label[int(chances.argmax())]
    print(f"  {label:<9} {chances.max():.0%}  after layer {layer} of {model.config.num_hidden_layers}   {text}")
"""


def train_teacher(folder: Path, splits: DatasetDict, epochs: int) -> PreTrainedTokenizerBase:
    """A BERT of 4 layers and width 128, trained from scratch on the corpus and saved with its tokenizer."""
    set_seed(0)
    tokenizer = train_tokenizer(splits["train"]["text"][:], vocab_size=1000)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: index for index, name in enumerate(LABEL_NAMES)},
    )
    model = BertForSequenceClassification(config)
    model.accepts_loss_kwargs = False
    rows = splits["train"].map(
        lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text", "difficulty"]
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        num_train_epochs=epochs,
        learning_rate=4e-4,
        warmup_steps=0.1,
        per_device_train_batch_size=64,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=200,
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/demo"))
    parser.add_argument("--train_rows", type=int, default=12_000)
    parser.add_argument("--teacher_epochs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from a second, and much is lost where cores are shared
    teacher, model = given.output_dir / "teacher", given.output_dir / "model"
    splits = make_splits(train=given.train_rows, calibration=1000, validation=1000, seed=0)
    if not (teacher / "tokenizer.json").exists():
        print("1. Training a small teacher on a generated corpus", flush=True)
        train_teacher(teacher, splits, given.teacher_epochs)
    print("2. Compressing it", flush=True)
    result = compress(str(teacher), splits, model, calibration_split="calibration", label_column="label", compression=8)
    print(f"\n{result.table()}\n\nChart: {model / 'pareto.png'}   Summary: {model / 'SUMMARY.md'}\n")
    print("3. The saved model in a fresh process, with early exit", flush=True)
    subprocess.run([sys.executable, "-c", RELOAD, str(model), *TEXTS], check=True)


if __name__ == "__main__":
    main()
