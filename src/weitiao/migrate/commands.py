"""Shell scripts → the training commands in them, as text: nothing is run, and no variable is looked up outside.

    PRE_SEQ_LEN=128
    torchrun --nproc_per_node=2 main.py --pre_seq_len $PRE_SEQ_LEN --do_train
    → Command(program="main.py", options={"pre_seq_len": "128", "do_train": True}, devices=2)

Variables are filled that the script itself sets.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import RecipeError

_CLI = ("llamafactory-cli", "llmtuner", "lmf")
_ASSIGNMENT = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)=(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_DEVICE_OPTIONS = ("nproc_per_node", "num_processes", "num_gpus")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One training command."""

    program: str
    """The script that is run, or ``llamafactory-cli``: the last part of its path."""
    words: tuple[str, ...]
    """What follows the program and is no option, such as paths."""
    options: dict[str, object]
    """By name, dashes as underscores; True for an option without a value."""
    devices: int
    """On how many devices it runs."""
    launcher: dict[str, object]
    """The options of ``torchrun``, ``accelerate launch`` or ``deepspeed``, and the environment before the command."""


def read_commands(text: str) -> list[Command]:
    """Every command of a shell script that starts a Python script or LLaMA-Factory.

    Raises:
        RecipeError: a quotation mark that is not closed.
    """
    variables: dict[str, str] = {}
    found = []
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise RecipeError(f"A line of the script cannot be read ({error}): {line.strip()[:80]}") from None
        for part in _parts([_filled(word, variables) for word in words]):
            environment: dict[str, str] = {}
            while part and (assigned := _ASSIGNMENT.match(part[0])):
                environment[assigned[1]] = assigned[2]
                part = part[1:]
            if not part:
                variables |= environment
            elif (command := _command(part, environment)) is not None:
                found.append(command)
    return found


def _parts(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, without what their output is sent to."""
    part: list[str] = []
    silent = False  # behind > or |
    for word in words:
        if word in ("&&", "||", ";"):
            yield part
            part, silent = [], False
        elif silent or re.match(r"^(\d?>|&>|<|\||&$)", word):
            silent = True
        elif not (not part and word in ("!", "$", "nohup", "export")):
            part.append(word.removesuffix(";"))
            if word.endswith(";"):
                yield part
                part = []
    yield part


def _filled(word: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda seen: variables.get(seen[1] or seen[2], seen[0]), word)


def _command(words: list[str], environment: dict[str, str]) -> Command | None:
    """The command that `words` are; None where they start neither a Python script nor LLaMA-Factory."""
    starts = [n for n, word in enumerate(words) if word.endswith(".py") or PurePosixPath(word).name in _CLI]
    if not starts:
        return None
    start = starts[0]
    _, launcher = _options(words[1:start])
    rest, options = _options(words[start + 1 :])
    visible = [number for number in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if number.strip()]
    counts = [str(launcher[name]) for name in _DEVICE_OPTIONS if name in launcher]
    devices = int(counts[0]) if counts and counts[0].isdecimal() else max(1, len(visible))
    return Command(
        program=PurePosixPath(words[start]).name,
        words=tuple(rest),
        options=options,
        devices=devices,
        launcher={**environment, **launcher},
    )


def _options(words: list[str]) -> tuple[list[str], dict[str, object]]:
    """The words before the first option, and the options; of an option given twice the last counts, as in argparse."""
    free: list[str] = []
    options: dict[str, object] = {}
    name: str | None = None
    values: list[str] = []

    def finish() -> None:
        if name is not None:
            options[name] = values[0] if len(values) == 1 else (list(values) or True)

    for word in words:
        if word.startswith("--") and len(word) > 2:
            finish()
            name, sign, value = word[2:].partition("=")
            name, values = name.replace("-", "_"), [value] if sign else []
        elif name is None:
            free.append(word)
        else:
            values.append(word)
    finish()
    return free, options
