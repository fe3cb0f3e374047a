"""The main job in a few minutes, with nothing to download: corpus, teacher, `compress`, report.

    make demo        (or: python examples/demo.py --output_dir build/demo)

A corpus is generated, a small BERT is trained on it as the teacher, and the whole recipe makes a slim multi-exit model
of it. At the end the model is loaded again in a fresh process and asked for a few answers. Killed on the way, the same
command goes on where it stopped. The rows are left as csv files, to try the command line on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from demo_corpus import LABEL_NAMES, make_splits, train_tokenizer
from hf_costeff import compress
from hf_costeff.trainer import TeacherTrainer

RELOAD = """
import csv, itertools, sys
import hf_costeff
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = list(itertools.islice(csv.DictReader(open(sys.argv[2])), 8))
batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
answers, depth = model.predict(**batch, early_exit=True), model.config.num_hidden_layers
for row, chances, layer in zip(rows, answers.probabilities, answers.exit_layer):
    label = model.config.id2label[int(chances.argmax())]
    verdict = "right" if label == row["label"] else "WRONG"
    print(f"  {label} {chances.max():4.0%}  {verdict}  after layer {layer} of {depth}  {row['text']}")
"""


def write_rows(rows: Dataset, path: Path) -> None:
    """Texts and names of their labels as csv."""
    names = [LABEL_NAMES[label] for label in rows["label"]]
    Dataset.from_dict({"text": rows["text"][:], "label": names}).to_csv(path)


def saved_tokenizer(folder: Path, texts: list[str]) -> PreTrainedTokenizerBase:
    """A tokenizer trained once; a second training would number the pieces otherwise, even with the same texts."""
    if not folder.exists():
        draft = folder.with_suffix(".draft")
        train_tokenizer(texts, vocab_size=1000).save_pretrained(draft)
        draft.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def train_teacher(folder: Path, splits: DatasetDict, epochs: int) -> None:
    """A BERT of 4 layers and width 128, trained from scratch on the corpus; its folder appears once it is whole."""
    working = folder.with_name("teacher.working")
    tokenizer = saved_tokenizer(working / "tokenizer", splits["train"]["text"][:])
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: index for index, name in enumerate(LABEL_NAMES)},
        problem_type="single_label_classification",
    )
    model = BertForSequenceClassification(config)
    rows = splits["train"].map(
        lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text", "difficulty"]
    )
    arguments = TrainingArguments(
        output_dir=str(working),
        num_train_epochs=epochs,
        learning_rate=4e-4,
        warmup_steps=0.1,
        per_device_train_batch_size=64,
        train_sampling_strategy="group_by_length",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=200,
        report_to="none",
    )
    trainer = TeacherTrainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train(resume_from_checkpoint=True)
    model.save_pretrained(working / "finished")
    tokenizer.save_pretrained(working / "finished")
    (working / "finished").rename(folder)
    shutil.rmtree(working)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/demo"))
    parser.add_argument("--train_rows", type=int, default=12_000)
    parser.add_argument("--held_out_rows", type=int, default=1000, help="for calibration, and as many for validation")
    parser.add_argument("--teacher_epochs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from a second, and much is lost where cores are shared
    data, teacher, model = (given.output_dir / name for name in ("data", "teacher", "model"))
    held_out = {"calibration": given.held_out_rows, "validation": given.held_out_rows}
    splits = make_splits(train=given.train_rows, **held_out, seed=0)
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write_rows(rows, data / f"{name}.csv")
    if not teacher.exists():
        print("1. Training a small teacher on a generated corpus", flush=True)
        train_teacher(teacher, splits, given.teacher_epochs)
    print("2. Compressing it", flush=True)
    result = compress(str(teacher), splits, model, calibration_split="calibration", label_column="label", compression=8)
    print(f"\n{result.table()}\n\nChart: {model / 'pareto.png'}   Summary: {model / 'SUMMARY.md'}\n")
    print("3. The saved model in a fresh process, with early exit, on the first validation rows", flush=True)
    subprocess.run([sys.executable, "-c", RELOAD, str(model), str(data / "validation.csv")], check=True)
    print("\nWhat to do with it: docs/quickstart.md")


if __name__ == "__main__":
    main()
