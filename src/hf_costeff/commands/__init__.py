"""The commands of `hf-costeff`, one file each. A new one is a file here and a line in the table."""

from .benchmark import BENCHMARK
from .block_prune import BLOCK_PRUNE
from .calibrate import CALIBRATE
from .cascade import CASCADE_CALIBRATE, CASCADE_PREDICT, CASCADE_TRAIN
from .command import Command
from .compress import COMPRESS
from .export import EXPORT
from .predict import PREDICT
from .push import PUSH
from .report import REPORT
from .skip import SKIP

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        *(COMPRESS, CALIBRATE, PREDICT, REPORT, BENCHMARK, EXPORT, PUSH, BLOCK_PRUNE, SKIP),
        *(CASCADE_TRAIN, CASCADE_CALIBRATE, CASCADE_PREDICT),
    )
}

__all__ = ["COMMANDS", "Command"]
