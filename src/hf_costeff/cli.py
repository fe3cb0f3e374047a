"""The command line: `hf-costeff <command> --flags`. What a command does is in `commands`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError

from .commands import COMMANDS, Command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print its result.

    Args:
        arguments: Without the program name; `None` takes them from the command line.

    Returns:
        Exit status: 0 for success, 2 for a mistake in the call, 1 for an error on the way, 130 if it was interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {command.name:<19}{command.purpose}" for command in COMMANDS.values())
    usage = f"usage: hf-costeff <command> [--flags]\n\n{listing}\n\nhf-costeff <command> --help lists its flags."
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage + "\n")
        return 0 if words else 2
    taken = 2 if " ".join(words[:2]) in COMMANDS else 1
    name = " ".join(words[:taken])
    if name not in COMMANDS:
        group = ", ".join(known for known in COMMANDS if known.startswith(f"{words[0]} "))
        hint = f". Give one of: {group}" if group else ""
        sys.stderr.write(f"hf-costeff: unknown command {' '.join(words[: 2 if group else 1])!r}{hint}\n{usage}\n")
        return 2
    command = COMMANDS[name]
    try:
        if result := command(words[taken:]):
            sys.stdout.write(result + "\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"\nhf-costeff {command.name}: interrupted. What trains goes on with the same command.\n")
        return 130
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        strict = isinstance(error, StrictDataclassError) and error.__cause__ is not None
        message = _with_flags(str(error.__cause__ if strict else error), command)
        sys.stderr.write(f"hf-costeff {command.name}: {message}\n")
        return 1
    return 0


def _with_flags(message: str, command: Command) -> str:
    """The message with the names of arguments, which it has as in Python, as they are typed here."""
    flags = {action.dest for action in command.parser()._actions}
    return re.sub(r"`(\w+)`", lambda name: f"`--{name[1]}`" if name[1] in flags else name[0], message)
