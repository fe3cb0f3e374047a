"""Adapt a slim model to your own rows with LoRA: all exits train along, the rest stays as it is.

    python examples/lora.py --model slim --rows train.csv --output_dir adapter
    python examples/lora.py --model slim --rows train.csv --output_dir adapter --merge_into merged

The adapter is small beside the model; merged it is a slim model again. Calibrate it anew: the exit settings of the old
weights do not hold for it.
"""

from __future__ import annotations

import argparse

from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import hf_costeff  # noqa: F401  (registers the model type)
from hf_costeff.data import make_collator, prepare_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub id of a slim model.")
    parser.add_argument("--rows", required=True, help="csv, tsv, json, jsonl or parquet, with labels.")
    parser.add_argument("--output_dir", default="adapter")
    parser.add_argument("--merge_into", help="Also save the model with the adapter merged, in this folder.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max_steps", type=int, default=500)
    given = parser.parse_args()

    model = AutoModelForSequenceClassification.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model.config.exit_config = None
    positions = model.config.longest_text
    rows = prepare_split(given.rows, "train", tokenizer, config=model.config, max_positions=positions)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=given.rank, lora_alpha=2 * given.rank))
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        f"{given.output_dir}/training",
        max_steps=given.max_steps,
        learning_rate=5e-4,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to="none",
    )
    Trainer(adapted, arguments, train_dataset=rows, data_collator=make_collator(tokenizer)).train()
    adapted.save_pretrained(given.output_dir)
    print(f"Adapter saved in {given.output_dir}")
    if given.merge_into:
        merged = AutoPeftModelForSequenceClassification.from_pretrained(given.output_dir).merge_and_unload()
        merged.config.exit_config = None
        merged.save_pretrained(given.merge_into)
        tokenizer.save_pretrained(given.merge_into)
        print(f"Merged model saved in {given.merge_into}; choose its exit settings with hf-costeff calibrate.")


if __name__ == "__main__":
    main()
