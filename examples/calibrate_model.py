"""Choose from held-out rows when a slim model may leave early: one budget after the other, and save one of them.

    python examples/calibrate_model.py --model slim --rows held_out.csv --budgets 0 0.5 1 2 --save 0.5

The rows must be of no training. `hf-costeff calibrate` does the same for one goal from the command line, and with
guarantees if asked.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff import calibrate
from hf_costeff.data import make_collator, prepare_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of a slim model.")
    parser.add_argument("--rows", required=True, help="csv, tsv, json, jsonl or parquet, with labels.")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="Points of accuracy.")
    parser.add_argument("--save", type=float, help="The budget whose settings are written into the model.")
    given = parser.parse_args()

    model = AutoModelForSequenceClassification.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    positions = model.config.longest_text
    rows = prepare_split(given.rows, "train", tokenizer, config=model.config, max_positions=positions)

    print(f"{'budget':>8}{'full depth':>12}{'early exit':>12}{'mean layer':>12}{'fewer FLOPs':>13}")
    for budget in sorted({*given.budgets, *([] if given.save is None else [given.save])}):
        settings = calibrate(model, rows, make_collator(tokenizer), max_accuracy_drop=budget, show_progress=False)
        seen = settings.calibration
        print(
            f"{budget:>8g}{seen['full_depth']:>12.4f}{seen['early_exit']:>12.4f}{seen['mean_exit_layer']:>12.2f}"
            f"{seen['speedup_over_full_depth']:>12.2f}x"
        )
        if budget == given.save:
            model.config.save_pretrained(given.model)  # the settings live in config.json
            print(f"{'':>8}saved in {given.model}")


if __name__ == "__main__":
    main()
