"""Time from a cold process to the first prediction: a slim model, and a stock DistilBERT of equal file size.

    python benchmarks/cold_start.py --slim DIR [--rounds 10]

Both are timed in fresh processes, in turn: imports, loading config, weights and tokenizer, one text answered. The
DistilBERT has random weights, a width that makes its file as large as the slim model's, and the same tokenizer.
Target: slim / DistilBERT <= 1.2, as the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

from hf_costeff.report import describe_hardware

LOAD = """
import sys
{imports}
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
batch = tokenizer("a charming , funny film", return_tensors="pt")
assert {call}.logits.shape[0] == 1
"""
SLIM = LOAD.format(imports="import hf_costeff", call="model.predict(**batch, early_exit=True)")
STOCK = LOAD.format(imports="import torch", call="model(batch['input_ids'], attention_mask=batch['attention_mask'])")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slim", required=True, help="Folder of a slim model with tokenizer and exit settings.")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as stock:
        build_stock(Path(stock), Path(given.slim))
        sizes = {"slim": weights_bytes(Path(given.slim)), "distilbert": weights_bytes(Path(stock))}
        calls = {"slim": (SLIM, given.slim), "distilbert": (STOCK, stock)}
        for code, folder in calls.values():  # once for the file cache of the operating system
            seconds(code, folder)
        rounds = [{name: seconds(*call) for name, call in calls.items()} for _ in range(given.rounds)]
    ratios = sorted(times["slim"] / times["distilbert"] for times in rounds)
    result = {
        "ratio": statistics.median(ratios),
        "ratio_lowest": ratios[0],
        "ratio_highest": ratios[-1],
        "seconds": {name: statistics.median(times[name] for times in rounds) for name in calls},
        "rounds": given.rounds,
        "file_bytes": sizes,
        "hardware": describe_hardware(torch.device("cpu")),
    }
    output = Path(__file__).parent / "results" / "cold_start.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def build_stock(folder: Path, slim: Path) -> None:
    """A DistilBERT of six layers whose width makes its file as large as the slim model's, within 2%."""
    tokenizer = AutoTokenizer.from_pretrained(slim)
    wanted = weights_bytes(slim)

    def build(hidden: int, neurons: int) -> DistilBertForSequenceClassification:
        sizes = {"dim": hidden, "hidden_dim": neurons, "n_heads": hidden // 8, "n_layers": 6}
        return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=len(tokenizer), **sizes))

    def file_bytes(hidden: int, neurons: int) -> int:
        with torch.device("meta"):
            return 4 * sum(parameter.numel() for parameter in build(hidden, neurons).parameters())

    hidden = max((width for width in range(8, 1024, 8) if file_bytes(width, width) <= wanted), default=8)
    neurons = min(range(8, 8 * hidden, 8), key=lambda count: abs(file_bytes(hidden, count) - wanted))
    build(hidden, neurons).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if abs(weights_bytes(folder) / wanted - 1) > 0.02:
        raise SystemExit(f"No DistilBERT came near {wanted:,} bytes; the nearest has {weights_bytes(folder):,}.")


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def seconds(code: str, folder: str) -> float:
    """Wall-clock time of a fresh process that answers one text."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
