"""Train a multi-exit model from a teacher with CostEffTrainer, and ask it with early exit.

    python examples/train_with_trainer.py
    python examples/train_with_trainer.py --teacher org/my-finetuned-bert --train_file reviews.csv

Without `--train_file` a small corpus is generated, and without `--teacher` a small BERT is trained on it first. The
student has the teacher's full width: exits alone, nothing is cut (examples/compress_checkpoint.py does that).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from demo import train_teacher
from demo_corpus import make_splits
from hf_costeff import CostEffTrainer, CostEffTrainingArguments, convert_from_stock
from hf_costeff.data import DataArguments, make_collator, prepare_data
from hf_costeff.evaluation import calibrate


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/exits"))
    parser.add_argument("--teacher", help="A fine-tuned classifier; default: a small one, trained here.")
    parser.add_argument("--train_file", help="csv, tsv, json, jsonl or parquet; default: a generated corpus.")
    parser.add_argument("--rows", type=int, default=8000, help="Rows to generate.")
    parser.add_argument("--max_steps", type=int, default=500)
    return parser.parse_args()


def main() -> None:
    given = parse()
    corpus = None
    if given.train_file is None:
        corpus = make_splits(train=given.rows, calibration=500, validation=500, seed=0)
    if given.teacher is None:
        if corpus is None:
            raise SystemExit("--train_file needs a --teacher that was fine-tuned on such data.")
        given.teacher = str(given.output_dir / "teacher")
        train_teacher(Path(given.teacher), corpus, epochs=4)
    teacher = AutoModelForSequenceClassification.from_pretrained(given.teacher)
    tokenizer = AutoTokenizer.from_pretrained(given.teacher)
    student = convert_from_stock(teacher, exit_pooling="mean")

    split = None if corpus is None else "calibration"
    arguments = DataArguments(train_file=given.train_file, calibration_split=split)
    data = prepare_data(
        arguments if corpus is None else corpus,
        tokenizer,
        arguments=arguments,
        teacher_config=teacher.config,
        max_positions=student.config.longest_text,
    )
    trainer = CostEffTrainer(
        student,
        CostEffTrainingArguments(
            output_dir=str(given.output_dir / "training"),
            max_steps=given.max_steps,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            warmup_steps=0.1,
            task_weight=0.5,  # half true labels, half the teacher's
            soft_label_weight=0.5,
            representation_weight=0.0,
            logging_steps=max(1, given.max_steps // 5),
            save_steps=max(1, given.max_steps // 2),
            report_to="none",
        ),
        teacher=teacher,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=make_collator(tokenizer),
    )
    trainer.train(resume_from_checkpoint=True)  # goes on if it was interrupted
    for name, value in trainer.evaluate().items():
        print(f"{name:<32}{value:.4f}")
    settings = calibrate(student, data.calibration, make_collator(tokenizer), max_metric_drop=0.5)
    student.save_pretrained(given.output_dir / "model")
    tokenizer.save_pretrained(given.output_dir / "model")
    print(f"\nSaved in {given.output_dir / 'model'}, with early exit chosen on held-out rows: {settings.calibration}")


if __name__ == "__main__":
    main()
