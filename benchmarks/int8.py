"""Which int8 path is faster here: CPU time and agreement of one model at full depth, in alternation, on one thread.

    python benchmarks/int8.py --model runs/sst2-fast-42 --data validation.parquet

Compared: torch in fp32, torch's dynamic quantization, and the ONNX export in fp32 and int8. CPU seconds of the process
are counted, so that a loaded machine does not change the ratios. Results go to benchmarks/results/int8.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hf_costeff import CostEffForSequenceClassification, export_onnx
from hf_costeff.columns import find_columns
from hf_costeff.data import make_collator
from hf_costeff.efficiency import measure_alternating, ratio
from hf_costeff.onnx_runner import Runner
from hf_costeff.report import describe_hardware

RESULTS = Path(__file__).parent / "results" / "int8.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="Default: the model's folder.")
    parser.add_argument("--data", required=True, help="A parquet file with texts.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = CostEffForSequenceClassification.from_pretrained(given.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer or given.model)
    data = Dataset.from_parquet(given.data)
    (column,) = find_columns(data).text
    texts = sorted(data[: given.rows][column], key=len, reverse=True)
    rows = [dict(row) for row in map(tokenizer, texts)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still there
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    with TemporaryDirectory() as folder:
        export_onnx(model, tokenizer, f"{folder}/fp32")
        export_onnx(model, tokenizer, f"{folder}/int8", int8=True)
        runners = {name: Runner(f"{folder}/{name}", threads=1) for name in ("fp32", "int8")}
        sizes = {name: sum(f.stat().st_size for f in Path(folder, name).glob("*.onnx")) / 1e6 for name in runners}

    def in_torch(chosen: Any, batch_size: int) -> torch.Tensor:
        pad = make_collator(tokenizer)
        chunks = [pad(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        return torch.cat([chosen.predict(**chunk, early_exit=False).logits for chunk in chunks])

    def in_onnx(name: str, batch_size: int) -> torch.Tensor:
        answers = runners[name].predict_tokens(rows, False, batch_size=batch_size)
        return torch.tensor([answer["logits"] for answer in answers])

    candidates: dict[str, Callable[[int], torch.Tensor]] = {
        "torch fp32": lambda size: in_torch(model, size),
        "torch int8": lambda size: in_torch(quantized, size),
        "onnxruntime fp32": lambda size: in_onnx("fp32", size),
        "onnxruntime int8": lambda size: in_onnx("int8", size),
    }
    found: dict[str, Any] = {
        "model": Path(given.tokenizer or given.model).resolve().name,
        "rows": len(rows),
        "rounds": given.rounds,
        "hardware": {**describe_hardware(torch.device("cpu")), "onnxruntime": onnxruntime.__version__},
        "graphs_mb": sizes,
    }
    exact = candidates["torch fp32"](32)
    for name, run in candidates.items():
        logits = run(32)
        same = float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
        found[name] = {"agreement": same, "largest_difference": float((logits - exact).abs().max())}
    for batch_size in (1, 32):
        runs = {name: partial(run, batch_size) for name, run in candidates.items()}
        times = measure_alternating(runs, warmup=1, repeats=given.rounds, clock=time.process_time)
        for name, latency in times.items():
            found[name][f"batch {batch_size}"] = {
                "cpu_ms_per_row": latency.median_ms / len(rows),
                "times_as_fast_as_torch_fp32": asdict(ratio(times["torch fp32"].times_ms, latency.times_ms)),
            }
    RESULTS.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
