"""What a compression run is asked for, and the plan that follows from it before any training."""

from __future__ import annotations

from dataclasses import dataclass, field

from huggingface_hub.utils import validate_repo_id

from .configuration_costeff import EXIT_POOLINGS
from .recipes import AUTO, RECIPES
from .slenderization import ALLOCATIONS, Widths, describe_widths
from .training_args import SOFT_LABEL_EXITS


@dataclass
class CompressionArguments:
    """What to compress, how far, and how.

    Without any of `compression`, `flops_ratio`, `num_attention_heads`, `intermediate_size` and `embedding_rank`, the
    target is `compression=8`.
    """

    teacher: str = field(metadata={"help": "Fine-tuned classifier: a Hub id or a local folder."})
    output_dir: str = field(metadata={"help": "Where the slim model and the stages of the run go."})
    recipe: str = field(default="fast", metadata={"help": "fast (minutes on a CPU) or paper (the method's schedule)."})
    compression: float | None = field(
        default=None, metadata={"help": "Parameters at most teacher / this, everything counted. Default: 8."}
    )
    flops_ratio: float | None = field(
        default=None, metadata={"help": "Full-depth FLOPs at 128 tokens at most teacher / this."}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads kept per layer."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Feed-forward neurons kept per layer."})
    embedding_rank: int | None = field(default=None, metadata={"help": "Rank of the factorised word embedding."})
    allocation: str = field(
        default="uniform", metadata={"help": "uniform (every layer alike) or uneven (by importance across layers)."}
    )
    events: int | None = field(
        default=None, metadata={"help": "Slenderization events; 1 is one-shot. Default: the recipe's."}
    )
    exit_layers: list[int] | None = field(default=None, metadata={"help": "Layers with an exit. Default: all."})
    exit_pooling: str | None = field(
        default=None, metadata={"help": "What exits look at: cls or mean. Default: the recipe's."}
    )
    token_replacement_rate: float | None = field(
        default=None,
        metadata={"help": "Share of tokens replaced in the last phase; 0 for grammar tasks. Default: the recipe's."},
    )
    soft_label_exit: str | None = field(
        default=None,
        metadata={"help": "The assistant's exit that teaches each: same (depth), last or auto. Default: the recipe's."},
    )
    fine_tune_teacher: bool = field(
        default=True, metadata={"help": "Fine-tune the teacher first if it has no classification head."}
    )
    pretrained: str | None = field(
        default=None, metadata={"help": "Start the assistant here instead of at the teacher (the paper's way)."}
    )
    metric: str | None = field(default=None, metadata={"help": "Metric to choose by. Default: by problem type."})
    max_metric_drop: float | None = field(
        default=None, metadata={"help": "Choose the exit threshold for this loss in points. Default: 0.5."}
    )
    target_speedup: float | None = field(
        default=None, metadata={"help": "Choose the exit threshold for this FLOPs ratio to the teacher instead."}
    )
    balance_classes: bool = field(
        default=False, metadata={"help": "Weigh classes by 1 / frequency in true-label losses."}
    )
    precision: str = field(default="auto", metadata={"help": "Training precision: auto, fp32 or bf16."})
    batch_size: int | None = field(default=None, metadata={"help": "Rows per step. Default: the recipe's."})
    seed: int = field(default=42, metadata={"help": "Seed of every stage."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Repository to push the finished model to, e.g. org/name. Default: none."}
    )

    def __post_init__(self) -> None:
        if self.exit_pooling not in (None, *EXIT_POOLINGS):
            raise ValueError(f"`exit_pooling` is {self.exit_pooling!r}. It must be one of {', '.join(EXIT_POOLINGS)}.")
        for name, choices in (
            ("soft_label_exit", (None, AUTO, *SOFT_LABEL_EXITS)),
            ("recipe", RECIPES),
            ("allocation", ALLOCATIONS),
            ("precision", ("auto", "fp32", "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}. It must be one of {', '.join(filter(None, choices))}."
                )
        for name in ("compression", "flops_ratio"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1, which keeps everything.")
        targets = (
            self.compression,
            self.flops_ratio,
            self.num_attention_heads,
            self.intermediate_size,
            self.embedding_rank,
        )
        if all(target is None for target in targets):
            self.compression = 8.0
        for name in ("events", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1; leave it out for the recipe's.")
        if self.token_replacement_rate is not None and not 0 <= self.token_replacement_rate <= 1:
            raise ValueError(
                f"`token_replacement_rate` is {self.token_replacement_rate}. It must lie in 0..1; 0 leaves texts as "
                "they are."
            )
        if self.push_to_hub is not None:
            validate_repo_id(self.push_to_hub)
        if self.seed < 0:
            raise ValueError(f"`seed` is {self.seed}. It must be 0 or more.")
        if self.max_metric_drop is not None and not self.max_metric_drop >= 0:
            raise ValueError(f"`max_metric_drop` is {self.max_metric_drop}. It must be 0 or more, in points.")
        if self.target_speedup is not None and not self.target_speedup > 0:
            raise ValueError(f"`target_speedup` is {self.target_speedup}. It must be above 0.")
        if self.max_metric_drop is not None and self.target_speedup is not None:
            raise ValueError(
                "Both `max_metric_drop` and `target_speedup` are given. Choose the threshold by one of them."
            )
        if self.max_metric_drop is None and self.target_speedup is None:
            self.max_metric_drop = 0.5


@dataclass(frozen=True)
class CompressionPlan:
    """What a run will make, known before any training.

    Args:
        widths: Target widths.
        parameters: Of the slim model, everything counted.
        teacher_parameters: Of the teacher.
        flops: Full depth, one row at 128 tokens.
        teacher_flops: The same for the teacher.
        file_bytes: Size of the weights file in single precision.
    """

    widths: Widths
    parameters: int
    teacher_parameters: int
    flops: int
    teacher_flops: int
    file_bytes: int

    def describe(self) -> str:
        """The plan in a few lines of text."""
        widths = describe_widths(self.widths)
        return "\n".join(
            [
                f"heads per layer    {widths['num_attention_heads']}",
                f"neurons per layer  {widths['intermediate_size']}",
                f"embedding rank     {widths['embedding_rank'] or 'full'}",
                f"parameters         {self.parameters:,} of {self.teacher_parameters:,} "
                f"({self.teacher_parameters / self.parameters:.2f}x smaller)",
                f"FLOPs, 128 tokens  {self.flops / 1e6:,.1f}M of {self.teacher_flops / 1e6:,.1f}M "
                f"({self.teacher_flops / self.flops:.2f}x fewer, before early exit)",
                f"weights file       {self.file_bytes / 1e6:.1f} MB (float32)",
            ]
        )
