"""The central claims of COST-EFF, one variant each, at equal parameters and equal training steps.

    python benchmarks/ablations.py --task sst2 --data DIR --run runs/sst2-fast-42 [--steps 1000] [--seeds 42]

Every variant starts from the assistant of a finished run (benchmarks/real_run.py), is slenderized in one shot and
recovers for the same number of steps, so that only the named thing differs:

    base            exit-aware importance, assistant as teacher, exit by exit, exits trained jointly
    final-exit      importance from the final exit alone
    single-exit     the single-exit teacher instead of the assistant
    last-exit       the assistant's last exit teaches all exits
    two-stage       backbone and final exit first, then the other exits on the frozen backbone, half the steps each
    squat           the first half of the layers, wider, instead of all layers
    random          units kept at random: the control for importance

Rows go to benchmarks/results/ablation-<task>.json, one by one, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_costeff import CostEffForSequenceClassification, CostEffTrainer, CostEffTrainingArguments, slenderize
from hf_costeff.data import DataArguments, PreparedData, make_collator, prepare_data
from hf_costeff.distillation import bf16_pays, importance_against, prepared, random_batches, training_arguments
from hf_costeff.efficiency import PAPER_SEQ_LENGTH, count_parameters, full_depth_flops, stock_flops
from hf_costeff.evaluation import collect_exit_logits
from hf_costeff.importance import Importance, compute_importance
from hf_costeff.metrics import METRICS
from hf_costeff.recipes import fast_recipe
from hf_costeff.slenderization import Budget, SlenderizationPlan, Widths, describe_widths, solve_widths
from hf_costeff.teacher import Teacher
from real_run import METRIC, SPLITS, best_at_flops

VARIANTS = ("base", "final-exit", "single-exit", "last-exit", "two-stage", "squat", "random")


@dataclass
class Setting:
    """What all variants of a task share."""

    data: PreparedData
    tokenizer: Any
    collator: Any
    assistant: CostEffForSequenceClassification
    teacher: Any
    metric: str
    max_parameters: int
    steps: int
    learning_rate: float
    token_replacement_rate: float
    seed: int
    device: torch.device
    bf16: bool

    def train(self, model: CostEffForSequenceClassification, teacher: Any, steps: int, **weights: Any) -> None:
        """Recover on predictions and representations for a number of steps."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(
                CostEffTrainingArguments,
                folder,
                steps=steps,
                learning_rate=self.learning_rate,
                batch_size=32,
                device=self.device,
                bf16=self.bf16,
                seed=self.seed,
                save_strategy="no",
                disable_tqdm=True,
                token_replacement_rate=self.token_replacement_rate,
                **weights,
            )
            CostEffTrainer(
                model,
                arguments,
                teacher=teacher,
                train_dataset=self.data.train,
                data_collator=self.collator,
                processing_class=self.tokenizer,
            ).train()

    def importance(self, exits: slice) -> Importance:
        """Scores of the assistant's units, from the given exits, on 640 training rows."""
        model = copy.deepcopy(self.assistant).requires_grad_(True)
        batches = random_batches(
            self.data.train,
            self.collator,
            rows=640,
            batch_size=32,
            device=self.device,
            seed=self.seed,
            description="Importance",
        )
        teacher = Teacher(self.assistant, model.config)
        loss = importance_against(teacher, self.data.problem_type, device=self.device, bf16=self.bf16, exits=exits)
        return compute_importance(model, batches, loss)

    def slim(
        self, source: CostEffForSequenceClassification, importance: Importance
    ) -> CostEffForSequenceClassification:
        """One-shot slenderization to the budget."""
        widths = solve_widths(source.config, Budget(max_parameters=self.max_parameters))
        plan = SlenderizationPlan.by_layer(importance, widths)
        return prepared(slenderize(source, plan).requires_grad_(True), self.device, self.bf16)

    def report(self, model: CostEffForSequenceClassification) -> dict[str, Any]:
        """Metric at full depth, mean over exits, and at 1/19 of the teacher's FLOPs, on validation."""
        model.eval()
        validation = collect_exit_logits(model, self.data.validation, self.collator, show_progress=False)
        calibration = collect_exit_logits(model, self.data.calibration, self.collator, show_progress=False)
        function, labels = METRICS[self.data.problem_type][self.metric], validation.known_labels()
        by_exit = [function(validation.logits[:, exit_].numpy(), labels) for exit_ in range(validation.logits.shape[1])]
        budget = stock_flops(self.teacher.config, PAPER_SEQ_LENGTH) / 19
        return {
            "full_depth": by_exit[-1],
            "mean_exit": float(np.mean(by_exit)),
            "by_exit": by_exit,
            "at_paper_flops": best_at_flops(calibration, validation, model.config, self.metric, budget),
            "parameters": count_parameters(model),
            "flops_at_128": full_depth_flops(model.config, PAPER_SEQ_LENGTH),
            "widths": describe_widths(Widths.of(model.config)),
        }


def base(setting: Setting) -> CostEffForSequenceClassification:
    model = setting.slim(setting.assistant, setting.importance(slice(None)))
    setting.train(model, setting.assistant, setting.steps)
    return model


def final_exit_importance(setting: Setting) -> CostEffForSequenceClassification:
    model = setting.slim(setting.assistant, setting.importance(slice(-1, None)))
    setting.train(model, setting.assistant, setting.steps)
    return model


def single_exit_teacher(setting: Setting) -> CostEffForSequenceClassification:
    model = setting.slim(setting.assistant, setting.importance(slice(None)))
    setting.train(model, setting.teacher, setting.steps)
    return model


def last_exit_of_assistant(setting: Setting) -> CostEffForSequenceClassification:
    model = setting.slim(setting.assistant, setting.importance(slice(None)))
    setting.train(model, setting.assistant, setting.steps, soft_label_exit="last")
    return model


def two_stage_exits(setting: Setting) -> CostEffForSequenceClassification:
    """First the backbone and the final exit, then all other exits with everything else frozen."""
    joint = setting.slim(setting.assistant, setting.importance(slice(-1, None)))
    config = copy.deepcopy(joint.config)
    config.exit_layers = [config.num_hidden_layers]
    single = CostEffForSequenceClassification(config)
    single.load_state_dict({name: joint.state_dict()[name] for name in single.state_dict()})
    setting.train(prepared(single, setting.device, setting.bf16), setting.assistant, setting.steps // 2)
    joint.load_state_dict(single.state_dict(), strict=False)
    for name, parameter in joint.named_parameters():
        parameter.requires_grad = ".exits." in name
    setting.train(joint, setting.assistant, setting.steps - setting.steps // 2, representation_weight=0.0)
    return joint


def squat(setting: Setting) -> CostEffForSequenceClassification:
    """Half the layers, each wider, at the same parameters; layer l answers to the assistant's layer 2l."""
    scores, source = setting.importance(slice(None)), setting.assistant
    kept = source.config.num_hidden_layers // 2
    halved = Importance(scores.head_importance[:kept], scores.neuron_importance[:kept])
    model = setting.slim(source.truncate(kept), halved)
    setting.train(model, source, setting.steps)
    return model


def random_units(setting: Setting) -> CostEffForSequenceClassification:
    generator = torch.Generator().manual_seed(setting.seed)
    config = setting.assistant.config
    scores = Importance(
        tuple(torch.rand(heads, generator=generator) for heads in config.num_attention_heads),
        tuple(torch.rand(neurons, generator=generator) for neurons in config.intermediate_size),
    )
    model = setting.slim(setting.assistant, scores)
    setting.train(model, setting.assistant, setting.steps)
    return model


RUNS: dict[str, Callable[[Setting], CostEffForSequenceClassification]] = {
    "base": base,
    "final-exit": final_exit_importance,
    "single-exit": single_exit_teacher,
    "last-exit": last_exit_of_assistant,
    "two-stage": two_stage_exits,
    "squat": squat,
    "random": random_units,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", required=True, type=Path, help="A finished run of benchmarks/real_run.py.")
    parser.add_argument("--teacher", help="The single-exit teacher, if the run did not fine-tune one.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--token_replacement_rate", type=float, default=fast_recipe(0, 0).token_replacement_rate)
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    given = parser.parse_args()
    output = Path(__file__).parent / "results" / f"ablation-{given.task}.json"
    output.parent.mkdir(exist_ok=True)
    rows = json.loads(output.read_text()) if output.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(given.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = bf16_pays(device)
    assistant = prepared(CostEffForSequenceClassification.from_pretrained(given.run / "stages/assistant"), device, bf16)
    teacher = prepared(
        AutoModelForSequenceClassification.from_pretrained(given.teacher or given.run / "stages/teacher"), device, bf16
    )
    data = prepare_data(
        DataArguments(dataset=given.data, dataset_config=given.task, **SPLITS.get(given.task, {})),
        tokenizer,
        teacher_config=teacher.config,
        max_positions=assistant.config.longest_text,
    )
    for seed in given.seeds:
        for variant in given.variants:
            name = f"{variant}-{seed}"
            if name in rows:
                continue
            set_seed(seed)
            setting = Setting(
                data=data,
                tokenizer=tokenizer,
                collator=make_collator(tokenizer),
                assistant=copy.deepcopy(assistant),
                teacher=teacher,
                metric=METRIC.get(given.task, "accuracy"),
                max_parameters=int(count_parameters(teacher) / given.compression),
                steps=given.steps,
                learning_rate=given.learning_rate,
                token_replacement_rate=given.token_replacement_rate,
                seed=seed,
                device=device,
                bf16=bf16,
            )
            rows[name] = {**setting.report(RUNS[variant](setting)), "steps": given.steps}
            output.write_text(json.dumps(rows, indent=1))
            print(name, json.dumps(rows[name]), flush=True)


if __name__ == "__main__":
    main()
