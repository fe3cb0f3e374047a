"""Export a slim model to ONNX and answer texts from the export folder.

    python examples/export_onnx.py --model slim --output_dir exported --texts "a gripping film." "the soup was cold."

The folder works alone: copy it to a machine with numpy, onnxruntime and tokenizers and run `python runner.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff import export_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a slim model.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--int8", action="store_true", help="Run matrix products in 8 bits.")
    parser.add_argument("--texts", nargs="+", required=True)
    given = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    done = export_onnx(model, tokenizer, given.output_dir, int8=given.int8)
    print(f"graphs end after layers {done.stops}; {done.megabytes:.1f} MB")
    run = [sys.executable, str(done.folder / "runner.py"), *given.texts]
    print(subprocess.run(run, check=True, capture_output=True, text=True).stdout, end="")


if __name__ == "__main__":
    main()
