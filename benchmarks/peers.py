"""A slim model beside what a user could take instead: same teacher, same texts, one run, in alternation.

    python benchmarks/peers.py --teacher DIR --run runs/sst2-fast-42 --data DIR --runs runs/peers --train
    python benchmarks/peers.py --teacher DIR --run runs/sst2-fast-42 --data DIR --runs runs/peers --measure

`--train` makes what needs making in the folder --runs, one after the other, and goes on where it stopped; `--measure`
writes benchmarks/results/peers.json and prints a table of it, without those that were not made. Contenders:

    teacher                in torch (fp32, bf16) and in ONNX Runtime (fp32, int8 by dynamic quantization)
    first layer            of the run's assistant, at full width and with its exit, as the assistant's training left it:
                           the fewest FLOPs that leaving out layers can reach
    truncated student      the same, then trained on the assistant as the slim model was, for as many steps
    PABEE                  the assistant: exits trained jointly on the full-width teacher, leaving by patience, which is
                           chosen on the calibration split to lose at most half a point
    static                 model2vec: token vectors distilled from the teacher, and its own classifier trained on the
                           training texts (`pip install model2vec skeletoken`, for this alone)
    slim                   the run's model with its saved settings, and at full depth: torch (fp32, bf16) and its ONNX
                           export (fp32, int8)

Everybody gets strings and gives labels, so tokenization counts. Speed-ups are ratios to the teacher in torch fp32
within a round, medians over the rounds with their quartiles. `batch 1` and `batch 32` take the texts as they come,
`offline` sorts them by length first. Memory is what loading a contender and answering adds to a fresh process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff import (
    CostEffForSequenceClassification,
    CostEffTrainer,
    CostEffTrainingArguments,
    calibrate,
    export_onnx,
    predict_texts,
)
from hf_costeff.data import DataArguments, make_collator, prepare_data
from hf_costeff.distillation import bf16_pays, prepared, training_arguments
from hf_costeff.efficiency import Ratio, measure_alternating, ratio
from hf_costeff.export import quantize_graph, write_stock_graph
from hf_costeff.markdown import markdown_table
from hf_costeff.modeling_costeff import MODEL_INPUTS
from hf_costeff.onnx_runner import Runner, open_session
from hf_costeff.recipes import fast_recipe
from hf_costeff.report import describe_hardware
from real_run import SPLITS

RESULTS = Path(__file__).parent / "results" / "peers.json"
MODES = ("batch 1", "batch 32", "offline")
REFERENCE, TO_BEAT, OURS = "teacher, torch fp32", "teacher, ONNX Runtime int8", "slim"
Answer = Callable[[Sequence[str]], list[int]]
"""From texts, answered as one batch, to label ids."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, type=Path)
    parser.add_argument("--run", required=True, type=Path, help="A finished run of benchmarks/real_run.py.")
    parser.add_argument("--data", required=True, type=Path, help="Folder with a folder per task.")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--runs", required=True, type=Path, help="Folder for what is trained and exported.")
    parser.add_argument("--steps", type=int, default=6824, help="Of the truncated student; the slim model had as many.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Of the truncated student.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=128, help="Texts for the clock; a quarter of them at batch 1.")
    parser.add_argument("--cpu_seconds", action="store_true", help="CPU seconds of the process, not the wall clock.")
    parser.add_argument("--train", nargs="*", choices=MADE, help="What to make. Alone: whatever is not there yet.")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--memory_of", help="Print what one contender adds to this process, in MB, and nothing else.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory_of:
        return print(
            added_memory_mb(partial(CONTENDERS[given.memory_of].make, given), texts_and_labels(given)[0][: given.texts])
        )
    if given.train is not None:
        train(given)
    if given.measure:
        measure(given)


# --- what is made before the clock runs


def train(given: argparse.Namespace) -> None:
    """Make every folder that is wanted and not there yet."""
    for name in given.train or MADE:
        folder = given.runs / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = folder.with_name(f"{name}.part")
            MADE[name](given, unfinished)
            unfinished.rename(folder)
            print(f"{name} is made", flush=True)


def export_teacher(given: argparse.Namespace, folder: Path) -> None:
    """The teacher as one graph, and with its weights in 8 bits as `hf-costeff export --int8` makes them."""
    teacher = AutoModelForSequenceClassification.from_pretrained(given.teacher)
    exact, int8 = folder / "fp32" / "model.onnx", folder / "int8" / "model.onnx"
    for file in (exact, int8):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_stock_graph(teacher, MODEL_INPUTS, exact)
    quantize_graph(exact, int8)


def export_slim(given: argparse.Namespace, folder: Path, int8: bool) -> None:
    model = CostEffForSequenceClassification.from_pretrained(given.run)
    export_onnx(model, AutoTokenizer.from_pretrained(given.run), folder, int8=int8)


def prepared_data(given: argparse.Namespace, tokenizer: Any) -> Any:
    teacher = AutoModelForSequenceClassification.from_pretrained(given.teacher)
    arguments = DataArguments(dataset=str(given.data), dataset_config=given.task, **SPLITS.get(given.task, {}))
    return prepare_data(arguments, tokenizer, teacher_config=teacher.config, max_positions=512)


def assistant_of(given: argparse.Namespace) -> CostEffForSequenceClassification:
    return CostEffForSequenceClassification.from_pretrained(given.run / "stages/assistant")


def choose_patience(given: argparse.Namespace, folder: Path) -> None:
    """The assistant with the patience that loses at most half a point on the calibration split."""
    tokenizer, model = AutoTokenizer.from_pretrained(given.run), assistant_of(given)
    data = prepared_data(given, tokenizer)
    options = {"criterion": "patience", "checked_exits": model.config.exit_layers, "max_metric_drop": 0.5}
    calibrate(model, data.calibration, make_collator(tokenizer), fit_temperatures=False, **options)
    model.save_pretrained(folder)


def cut_assistant(given: argparse.Namespace, folder: Path) -> None:
    assistant_of(given).truncate(1).save_pretrained(folder)


def train_truncated(given: argparse.Namespace, folder: Path) -> None:
    """The first layer on the assistant's predictions and hidden states."""
    tokenizer, device = AutoTokenizer.from_pretrained(given.run), torch.device("cpu")
    bf16, assistant = bf16_pays(device), assistant_of(given)
    arguments = training_arguments(
        CostEffTrainingArguments,
        str(folder),
        steps=given.steps,
        learning_rate=given.learning_rate,
        batch_size=32,
        device=device,
        bf16=bf16,
        seed=42,
        save_strategy="steps",
        save_steps=100,
        save_total_limit=1,
        token_replacement_rate=fast_recipe(0, 0).token_replacement_rate,
    )
    trainer = CostEffTrainer(
        prepared(assistant.truncate(1), device, bf16),
        arguments,
        teacher=prepared(assistant, device, bf16),
        train_dataset=prepared_data(given, tokenizer).train,
        data_collator=make_collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.model.save_pretrained(folder)


def train_static(given: argparse.Namespace, folder: Path) -> None:
    from model2vec import StaticModel
    from model2vec.distill import distill_from_model
    from model2vec.train import StaticModelForClassification

    distilled = given.runs / "static.distilled"
    if not distilled.exists():
        encoder = AutoModelForSequenceClassification.from_pretrained(given.teacher).base_model
        tokenizer = AutoTokenizer.from_pretrained(given.teacher)
        distill_from_model(encoder, tokenizer, device="cpu").save_pretrained(distilled)
    static = StaticModel.from_pretrained(distilled)
    rows = Dataset.from_parquet(str(given.data / given.task / f"{SPLITS[given.task]['train_split']}.parquet"))
    classifier = StaticModelForClassification.from_static_model(model=static)
    classifier.fit(list(rows["sentence"]), list(rows["label"]), device="cpu", max_epochs=10)
    classifier.to_pipeline().save_pretrained(folder)


MADE: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "teacher-onnx": export_teacher,
    "slim-onnx": partial(export_slim, int8=False),
    "slim-int8": partial(export_slim, int8=True),
    "pabee": choose_patience,
    "first-layer": cut_assistant,
    "static": train_static,
    "truncated": train_truncated,
}


# --- who answers


def in_torch(given: argparse.Namespace, folder: Path, dtype: torch.dtype, early_exit: Any = None) -> Answer:
    """A model in torch; `early_exit` is for those that have exits."""
    tokenizer = AutoTokenizer.from_pretrained(given.run)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    has_exits = isinstance(model, CostEffForSequenceClassification)
    call = partial(model.predict, early_exit=early_exit) if has_exits else model

    def answer(texts: Sequence[str]) -> list[int]:
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        with torch.inference_mode():
            return call(**batch).logits.argmax(-1).tolist()

    if has_exits and len(model.config.exit_layers) > 1:
        labels = model.config.label2id

        def offline(texts: Sequence[str]) -> list[int]:
            found = predict_texts(model, tokenizer, texts, early_exit=early_exit, show_progress=False)
            return [labels[row["label"]] for row in found]

        answer.offline = offline
    return answer


def in_onnx(given: argparse.Namespace, name: str) -> Answer:
    """The teacher's graph."""
    tokenizer = AutoTokenizer.from_pretrained(given.run)
    session = open_session(given.runs / "teacher-onnx" / name / "model.onnx", threads=1)

    def answer(texts: Sequence[str]) -> list[int]:
        batch = tokenizer(list(texts), return_tensors="np", padding=True, truncation=True)
        return session.run(None, dict(batch))[0].argmax(-1).tolist()

    return answer


def in_runner(given: argparse.Namespace, name: str, early_exit: Any = None) -> Answer:
    runner = Runner(given.runs / name, threads=1)
    ids = {label: int(number) for number, label in runner.config["id2label"].items()}

    def answer(texts: Sequence[str]) -> list[int]:
        return [ids[row["label"]] for row in runner.predict(texts, early_exit)]

    answer.offline = answer
    return answer


def static(given: argparse.Namespace) -> Answer:
    from model2vec.inference import StaticModelPipeline

    pipeline = StaticModelPipeline.from_pretrained(given.runs / "static")
    return lambda texts: [int(label) for label in pipeline.predict(list(texts))]


FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Contender:
    """Who answers, and what is on disk for it: a pattern in one of the given folders."""

    make: Callable[[argparse.Namespace], Answer]
    files: str


CONTENDERS = {
    REFERENCE: Contender(lambda given: in_torch(given, given.teacher, FP32), "{teacher}/*.safetensors"),
    "teacher, torch bf16": Contender(lambda given: in_torch(given, given.teacher, BF16), "{teacher}/*.safetensors"),
    "teacher, ONNX Runtime fp32": Contender(lambda given: in_onnx(given, "fp32"), "{runs}/teacher-onnx/fp32/*.onnx"),
    TO_BEAT: Contender(lambda given: in_onnx(given, "int8"), "{runs}/teacher-onnx/int8/*.onnx"),
    "first layer, torch fp32": Contender(
        lambda given: in_torch(given, given.runs / "first-layer", FP32), "{runs}/first-layer/*.safetensors"
    ),
    "truncated student, torch fp32": Contender(
        lambda given: in_torch(given, given.runs / "truncated", FP32), "{runs}/truncated/*.safetensors"
    ),
    "PABEE, torch fp32": Contender(
        lambda given: in_torch(given, given.runs / "pabee", FP32), "{runs}/pabee/*.safetensors"
    ),
    "static (model2vec)": Contender(static, "{runs}/static/*"),
    f"{OURS}, full depth, torch fp32": Contender(
        lambda given: in_torch(given, given.run, FP32, False), "{run}/*.safetensors"
    ),
    f"{OURS}, early exit, torch fp32": Contender(lambda given: in_torch(given, given.run, FP32), "{run}/*.safetensors"),
    f"{OURS}, early exit, torch bf16": Contender(lambda given: in_torch(given, given.run, BF16), "{run}/*.safetensors"),
    f"{OURS}, full depth, ONNX Runtime int8": Contender(
        lambda given: in_runner(given, "slim-int8", False), "{runs}/slim-int8/*.onnx"
    ),
    f"{OURS}, early exit, ONNX Runtime fp32": Contender(
        lambda given: in_runner(given, "slim-onnx"), "{runs}/slim-onnx/*.onnx"
    ),
    f"{OURS}, early exit, ONNX Runtime int8": Contender(
        lambda given: in_runner(given, "slim-int8"), "{runs}/slim-int8/*.onnx"
    ),
}


# --- the clock


def texts_and_labels(given: argparse.Namespace) -> tuple[list[str], list[int]]:
    rows = Dataset.from_parquet(str(given.data / given.task / "validation.parquet"))
    return list(rows["sentence"]), list(rows["label"])


def in_batches(answer: Answer, texts: Sequence[str], size: int) -> list[int]:
    return [label for start in range(0, len(texts), size) for label in answer(texts[start : start + size])]


def offline(answer: Answer, texts: Sequence[str]) -> list[int]:
    """All texts at once, in their order: by the contender's own means, or sorted by length into batches of 32."""
    own = getattr(answer, "offline", None)
    if own is not None:
        return own(texts)
    order = sorted(range(len(texts)), key=lambda position: len(texts[position]), reverse=True)
    labels = in_batches(answer, [texts[position] for position in order], 32)
    return [label for _, label in sorted(zip(order, labels, strict=True))]


def measure(given: argparse.Namespace) -> None:
    """Accuracy on all validation texts, times on some, in alternation."""
    texts, labels = texts_and_labels(given)
    there = {name: one for name, one in CONTENDERS.items() if megabytes(given, one.files)}
    answers = {name: contender.make(given) for name, contender in there.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, answer in answers.items():
        right = np.array(offline(answer, texts)) == np.array(labels)
        found[name] = {"accuracy": float(right.mean()), "mb_on_disk": megabytes(given, CONTENDERS[name].files)}
    clock = time.process_time if given.cpu_seconds else time.perf_counter
    few = max(1, given.texts // 4)
    counts = dict(zip(MODES, (few, given.texts, 4 * given.texts), strict=True))
    runs: tuple[Callable[[Answer, Sequence[str]], list[int]], ...] = (
        partial(in_batches, size=1),
        partial(in_batches, size=32),
        offline,
    )
    for (mode, count), run in zip(counts.items(), runs, strict=True):
        times = measure_alternating(
            {name: partial(run, answer, texts[:count]) for name, answer in answers.items()},
            warmup=1,
            repeats=given.rounds,
            clock=clock,
        )
        for name, latency in times.items():
            found[name][mode] = {
                "ms_per_text": latency.median_ms / min(count, len(texts)),
                "times_as_fast_as_the_teacher": asdict(ratio(times[REFERENCE].times_ms, latency.times_ms)),
                "times_as_fast_as_the_teacher_in_int8": asdict(ratio(times[TO_BEAT].times_ms, latency.times_ms)),
            }
    for name, row in found.items():
        row["added_memory_mb"] = float(
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--memory_of", name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
    report = {
        "task": given.task,
        "model": given.run.resolve().name,
        "texts": {mode: min(count, len(texts)) for mode, count in counts.items()},
        "rounds": given.rounds,
        "clock": clock.__name__,
        "hardware": describe_hardware(torch.device("cpu")),
        "not_made_yet": sorted(CONTENDERS.keys() - there.keys()),
        "contenders": found,
        "verdicts": verdicts(found),
    }
    RESULTS.write_text(json.dumps(report, indent=1))
    print(table(report))
    print("\n".join(report["verdicts"]))


def megabytes(given: argparse.Namespace, pattern: str) -> float:
    """Weights on disk; the tokenizer, which all but the static model share, not counted."""
    full = Path(pattern.format(teacher=given.teacher, run=given.run, runs=given.runs))
    return sum(file.stat().st_size for file in full.parent.glob(full.name) if file.is_file()) / 1e6


def added_memory_mb(make: Callable[[], Answer], texts: Sequence[str]) -> float:
    """Highest resident memory while a contender is loaded and answers, over that before (Linux)."""

    def resident(line: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(entry for entry in status if entry.startswith(line)).split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident("VmRSS")
    in_batches(make(), texts, 32)
    return (resident("VmHWM") - before) / 1e6


def verdicts(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the table says of the two goals: three times the int8 teacher's speed, and no peer that dominates ours."""
    said = []
    ours = [name for name in found if name.startswith(OURS)]
    peers = [name for name in found if name not in ours]

    def points(name: str) -> float:
        return 100 * (found[name]["accuracy"] - found[TO_BEAT]["accuracy"])

    for mode in MODES:
        speed = {name: row[mode]["times_as_fast_as_the_teacher_in_int8"]["median"] for name, row in found.items()}
        near = [name for name in ours if points(name) >= -1]
        shown = (
            [max(near, key=speed.__getitem__)] if near else [max(ours, key=points), max(ours, key=speed.__getitem__)]
        )
        told = "; ".join(f"{name}: {points(name):+.2f} points, {speed[name]:.2f} times as fast" for name in shown)
        said.append(f"{mode}, against {TO_BEAT}: {'' if near else 'nobody of ours is within a point. '}{told}.")
        for name in ours:
            over = [peer for peer in peers if points(peer) >= points(name) and speed[peer] >= speed[name]]
            if over:
                said.append(f"{mode}: {name} is dominated by {', '.join(over)}.")
    return said


def table(report: dict[str, Any]) -> str:
    columns = ["", "accuracy"]
    for mode in MODES:
        columns += [f"{mode}: ms per text", "times as fast as the teacher"]
    lines = []
    for name, row in report["contenders"].items():
        line = [name, f"{row['accuracy']:.4f}"]
        for mode in MODES:
            line += [f"{row[mode]['ms_per_text']:.3f}", str(Ratio(**row[mode]["times_as_fast_as_the_teacher"]))]
        lines.append([*line, f"{row['mb_on_disk']:.1f}", f"{row['added_memory_mb']:.0f}"])
    return markdown_table([*columns, "MB on disk", "MB of memory"], lines)


if __name__ == "__main__":
    main()
