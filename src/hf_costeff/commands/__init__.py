"""The commands of `hf-costeff`, one file each. A new one is a file here and a line in the table."""

from .calibrate import CALIBRATE
from .command import Command
from .compress import COMPRESS
from .push import PUSH

COMMANDS: dict[str, Command] = {command.name: command for command in (COMPRESS, CALIBRATE, PUSH)}

__all__ = ["COMMANDS", "Command"]
