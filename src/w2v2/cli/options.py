"""A recipe and the command line's overrides of its leaves become one typed configuration."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from w2v2.errors import UsageError

if TYPE_CHECKING:
    import torch

    from w2v2.data.config import DataConfig


T = TypeVar("T")


Run = Callable[[argparse.Namespace, list[str]], None]


AddVerb = Callable[..., argparse.ArgumentParser]
"""(name, what runs it, what it does, further arguments of a parser; ``overrides=True``: settings may follow)."""


def configure(args: argparse.Namespace, rest: list[str], kind: type[T], *, need_data: bool = True) -> T:
    """The recipe, with the shape of the model that the run starts from, if any, and the command line's overrides."""
    from w2v2.recipes import load_recipe, recipe_names

    names = ", ".join(recipe_names(kind))
    if args.recipe is None:
        if args.help:
            args.parser.epilog = f"Recipes: {names}. {args.parser.epilog}"
            args.parser.print_help()
            raise SystemExit(0)
        raise UsageError(f"name a recipe: one of {names}, or FILE.py:FUNCTION")
    config: Any = load_recipe(args.recipe, kind)
    if getattr(args, "init_from", None) is not None:
        from w2v2.checkpoint.formats import read

        config.adopt_architecture(read(args.init_from).config)
    if args.help:
        args.parser.print_help()
        rest = ["--help"]
    config = override(config, rest, f"w2v2 {args.verb} {args.recipe}")
    if args.data is not None:
        config.data.sources = tuple(args.data)
    if need_data and not config.data.sources:
        raise UsageError("name the audio with --data DIR: a prepared corpus, or a folder of audio")
    done: T = config
    return done


def override(config: T, args: Sequence[str], prog: str) -> T:
    """Set leaves of a configuration from arguments such as ``--train.max-steps 100``.

    Raises:
        UsageError: an unknown field, or a value of another type.
    """
    import tyro

    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(config), default=config, args=list(args), config=markers, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """tyro's framed complaint as one line, with its first suggestion."""
    frame = set("─-+╭╮╰╯│| ")
    lines = [line.strip("│| \t") for line in box.splitlines() if set(line) - frame and line[0] not in "╭+"]
    asides = ("Perhaps you meant", "Argument helptext", "Got errors", "For full helptext")
    problem = " ".join(itertools.takewhile(lambda line: not line.startswith(asides), lines))
    hints = [line.split()[0] for line in lines[1:] if line.startswith("--")]
    return f"{problem}; did you mean {hints[0]}?" if "Unrecognized" in problem and hints else problem


def as_options(message: str, args: argparse.Namespace) -> str:
    """The message with its settings, fields in backticks, spelled as the options of the verb that runs.

    A field such as ``data.num_workers`` is the option whose ``dest`` is its last name, if the verb has one, otherwise
    that of its full name, if settings can follow the verb.
    """
    names: dict[str, str] = {
        action.dest: action.option_strings[-1] for action in args.parser._actions if action.option_strings
    }

    def spell(field: re.Match[str]) -> str:
        dotted = f"--{field[1].replace('_', '-')}" if args.overrides else field[0]
        return names.get(field[1].rpartition(".")[2], dotted)

    return re.sub(r"`([a-z]\w*(?:\.\w+)*)`", spell, message)


def run_folder(args: argparse.Namespace) -> Path:
    """Where a run goes: ``--out``, or a new name under ``runs``."""
    if args.out is not None:
        return Path(args.out)
    name = Path(args.recipe.rpartition(":")[0]).stem if ":" in args.recipe else args.recipe
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def reading(**given: Any) -> DataConfig:
    """How a verb reads a corpus whole, from its options; those that are None are as they are by default.

    Raises:
        UsageError: impossible numbers.
    """
    from w2v2.data.config import DataConfig

    config = DataConfig(**{name: value for name, value in given.items() if value is not None})
    config.check()
    return config


def place(model: torch.nn.Module, device: str | None) -> None:
    """Move a model to the device of ``--device``; None: to a GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used: {reason}; expected cpu, or what is there") from None
