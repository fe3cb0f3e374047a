"""What a CostEffTrainer step costs beside its unavoidable parts.

    python benchmarks/trainer_step.py --teacher DIR [--rounds 30]

Compares, alternating in one run: (a) one CostEffTrainer step with teacher, soft labels and representations; (b) one
teacher forward plus one step of the same student on hard labels at all exits, same optimizer. Target: a / b <= 1.15.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from hf_costeff import CostEffTrainer, CostEffTrainingArguments, convert_from_stock
from hf_costeff.efficiency import PAPER_SEQ_LENGTH, count_parameters, measure_alternating
from hf_costeff.report import describe_hardware
from hf_costeff.slenderization import Budget, Widths, describe_widths, solve_widths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seq_length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.manual_seed(42)
    teacher = AutoModelForSequenceClassification.from_pretrained(given.teacher).eval()
    full = convert_from_stock(teacher)
    widths = solve_widths(
        full.config, Budget(max_parameters=count_parameters(teacher) // 8, seq_length=PAPER_SEQ_LENGTH)
    )
    student = type(full)(widths.apply_to(full.config))
    batch = {
        "input_ids": torch.randint(1000, 20_000, (given.batch_size, given.seq_length)),
        "attention_mask": torch.ones(given.batch_size, given.seq_length, dtype=torch.long),
        "labels": torch.randint(0, 2, (given.batch_size,)),
    }
    steps = {"joint distillation": stepper(student, teacher, batch), "hard labels": stepper(student, None, batch)}
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def parts() -> None:
        with torch.no_grad():
            teacher(**inputs)
        steps["hard labels"]()

    times = measure_alternating(
        {"CostEffTrainer step": steps["joint distillation"], "teacher forward + hard-label step": parts},
        warmup=5,
        repeats=given.rounds,
    )
    whole, unavoidable = (latency.median_ms for latency in times.values())
    row = {
        "ratio": whole / unavoidable,
        "step_ms": whole,
        "parts_ms": unavoidable,
        "batch_size": given.batch_size,
        "seq_length": given.seq_length,
        "student": describe_widths(Widths.of(student.config)),
        "hardware": describe_hardware(torch.device("cpu")),
    }
    output = Path(__file__).parent / "results" / "trainer_step.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(row, indent=1))
    print(json.dumps(row, indent=1))


def stepper(student, teacher, batch):
    """One optimizer step of a Trainer on a fixed batch: forward, loss, backward, clip, update."""
    arguments = CostEffTrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", learning_rate=1e-4, max_steps=1
    )
    trainer = CostEffTrainer(student, arguments, teacher=teacher)
    optimizer = trainer.create_optimizer()

    def step() -> None:
        student.train()
        trainer.compute_loss(student, dict(batch)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
