"""`hf-costeff benchmark`: what a slim model gains on this machine's clock."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..benchmark_report import write_benchmark
from ..benchmarking import PRECISIONS, BenchmarkGrid, benchmark
from ..checkpoints import load_classifier
from ..data import SplitArguments, make_collator, prepare_split
from ..exit_times import choose_exits
from .command import Command, load_slim, save_settings, writable_folder


@dataclass
class BenchmarkArguments:
    """Which models, in which settings.

    Raises:
        ValueError: Neither a teacher nor `choose_exits`.
    """

    model: str = field(metadata={"help": "A multi-exit model: a local folder or a Hub id."})
    teacher: str | None = field(default=None, metadata={"help": "The stock classifier that it is compared with."})
    split: str = field(default="validation", metadata={"help": "Split of the data whose rows are answered."})
    output_dir: str = field(default="benchmark", metadata={"help": "Folder for benchmark.json and the charts."})
    devices: list[str] = field(default_factory=lambda: ["cpu"], metadata={"help": "As torch names them, e.g. cuda."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32, 128], metadata={"help": "Rows run together."})
    lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Tokens per row; 0: the rows' own lengths. Default: 0, 32 and 128, as far as the model takes them."
        },
    )
    threads: list[int] = field(default_factory=lambda: [1], metadata={"help": "CPU threads."})
    precisions: list[str] = field(
        default_factory=lambda: ["float32"], metadata={"help": f"Some of {', '.join(PRECISIONS)}."}
    )
    rows: int = field(default=128, metadata={"help": "Rows answered per round, at most."})
    rounds: int = field(default=7, metadata={"help": "Timed rounds."})
    choose_exits: bool = field(
        default=False,
        metadata={
            "help": "Measure, on the first device, at the first batch size and thread count, which of the model's "
            "checked exits cost more time than they save, and store the others in the model."
        },
    )

    def __post_init__(self) -> None:
        if self.teacher is None and not self.choose_exits:
            raise ValueError("Nothing to compare with. Give --teacher, or --choose_exits.")

    def grid(self) -> BenchmarkGrid:
        """The settings to measure."""
        names = ("devices", "batch_sizes", "lengths", "threads", "precisions", "rows", "rounds")
        given = {name: getattr(self, name) for name in names}
        return BenchmarkGrid(**{name: value for name, value in given.items() if value is not None})


def run(wanted: BenchmarkArguments, data: SplitArguments) -> str:
    """Choose the exits if asked to, measure if there is a teacher, and say what came out."""
    grid = wanted.grid()
    folder = writable_folder(wanted.model, None) if wanted.choose_exits else ""
    model, tokenizer = load_slim(wanted.model)
    positions = model.config.longest_text
    if wanted.lengths is None:
        grid = dataclasses.replace(grid, lengths=[length for length in grid.lengths if length <= positions])
    rows = prepare_split(
        data, wanted.split, tokenizer, config=model.config, max_positions=positions, require_labels=False
    )
    collator, said = make_collator(tokenizer), []
    if wanted.choose_exits:
        chosen = choose_exits(model, rows, collator, grid).checked_exits
        save_settings(model, tokenizer, wanted.model, folder)
        kept = f"after layers {', '.join(map(str, chosen))}" if chosen else "nowhere but at the end"
        said.append(
            f"Saved in {folder}: at batch size {grid.batch_sizes[0]} on this machine exits pay {kept}. Thresholds are "
            "as they were; `hf-costeff calibrate` chooses both anew."
        )
    if wanted.teacher is not None:
        teacher = load_classifier(wanted.teacher)
        found = benchmark(model, teacher, rows, collator, grid)
        said += [write_benchmark(found, wanted.output_dir), f"Figures and charts are in {wanted.output_dir}."]
    return "\n\n".join(said)


BENCHMARK = Command(
    "benchmark", "time a model against its teacher", (BenchmarkArguments, SplitArguments), run, first="model"
)
