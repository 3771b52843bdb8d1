"""The words of a verb become its fields; what goes wrong there, and settings in messages, spelled as its options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints

import tyro
from tyro.conf import AvoidSubcommands, FlagConversionOff, FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from w2v2.errors import UsageError

T = TypeVar("T")


class Verb(Protocol):
    """A dataclass of what a verb takes: a field is an option or an argument, its docstring the help."""

    def run(self, named: Collection[str]) -> None:
        """Do it; ``named`` are the options that the command line names, as fields: ``train.max_steps``."""


Settings = Annotated[T, arg(name=""), FlagConversionOff, AvoidSubcommands]
"""A configuration whose leaves are options of the verb."""
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")]
Device = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: cuda if there is one)")]
Workers = Annotated[int, arg(name="workers")]

REQUIRED = "(required)"
MODEL = "Run, folder or file of Hugging Face, fairseq or 'w2v2 export'; address; OWNER/NAME[@REVISION] of the hub"
Language = Annotated[
    str | None,
    arg(
        metavar="CODE",
        help="Of a model with an adapter for each language (MMS), such as deu.",
        help_behavior_hint="(default: that of its weights)",
    ),
]


def default(what: str, metavar: str) -> Any:
    """What help says of an option whose default is not one value."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {what})")


def refuse_without(mode: str, names: Collection[str], named: Collection[str], *, given: bool = False) -> None:
    """Refuse options that are only of a mode, unless that is given (:class:`UsageError`)."""
    if (needless := sorted({*names} & {*named})) and not given:
        raise UsageError(f"`{needless[0]}` is of `{mode}`; add that, or leave `{needless[0]}` out")


def optional_value(without: str, *choices: str) -> Any:
    """An option that may have a value, one of ``choices``, and is ``without`` where it stands alone."""

    def read(words: list[str]) -> str:
        if len(words) > 1 or not {*words} <= {*choices}:
            raise ValueError(f"expected {', '.join(choices)} or nothing, got {' '.join(words)}")
        return words[0] if words else without

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


def parse(kind: Any, argv: Sequence[str], prog: str, **options: Any) -> Any:
    """An instance from the words of a command line; ``options`` are further ones of ``tyro.cli``.

    Raises:
        UsageError: what is wrong with them, in one line.
        SystemExit: help was asked for and printed.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=list(argv), prog=prog, config=(FlagCreatePairsOff,), **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(box.getvalue())) from None


def _one_line(box: str) -> str:
    """tyro's framed complaint as one line, with its first suggestion."""
    frame = set("─-+╭╮╰╯│| ")
    lines = [line.strip("│| \t") for line in box.splitlines() if set(line) - frame and line[0] not in "╭+"]
    asides = ("Perhaps you meant", "Argument helptext", "Got errors", "For full helptext")
    problem = " ".join(itertools.takewhile(lambda line: not line.startswith(asides), lines))
    hints = [line.split()[0] for line in lines[1:] if line.startswith("--")]
    return f"{problem}; did you mean {hints[0]}?" if "Unrecognized" in problem and hints else problem


def parse_run(kind: Any, argv: Sequence[str], prog: str, description: str) -> Any:
    """The same of a verb with a recipe, whose settings are the defaults, in the shape of a model to start from."""
    from w2v2.recipes import load_recipe, recipe_names

    config_kind = kind.__dataclass_fields__["config"].default_factory
    names = recipe_names(config_kind)
    description += f". Recipes: {', '.join(names)}; with RECIPE, this lists its settings as they are in it."
    if "recipe" in named_options(argv):
        raise UsageError("the recipe is named without `recipe`, as the first word after the verb")
    name = next((word for word in argv if word in names or ".py:" in word), None)  # where settings stand before it
    config = config_kind() if name is None else load_recipe(name, config_kind)
    words = list(argv) if name is None else [word for word in argv if word not in ("-h", "--help")]
    first, _ = parse(kind, words, prog, description=description, default=kind(config=config), return_unknown_args=True)
    if not first.recipe:
        raise UsageError(f"name a recipe: one of {', '.join(names)}, or FILE.py:FUNCTION")
    config = load_recipe(first.recipe, config_kind)
    init_from = getattr(first, "init_from", None)
    if init_from is not None:
        from w2v2.checkpoint.formats import read

        config.adopt_architecture(read(init_from, first.language).config)
    return parse(kind, argv, f"{prog} {first.recipe}", description=description, default=kind(config=config))


def named_options(argv: Sequence[str]) -> list[str]:
    """Fields that the options of a command line name, in their order."""
    return [word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")]


def as_options(message: str, verb: Any) -> str:
    """The message with its settings, fields in backticks, spelled as the options of the verb that runs.

    A field such as ``data.num_workers`` is the verb's field of its last name, if it has one, otherwise, if the verb
    takes a recipe's settings, that of its whole name.
    """
    options = _options(verb) if dataclasses.is_dataclass(verb) else {}

    def spell(field: re.Match[str]) -> str:
        dotted = f"--{field[1].removeprefix('config.').replace('_', '-')}" if "config" in options else field[0]
        return options.get(field[1].rpartition(".")[2], dotted)

    return re.sub(r"`([a-z]\w*(?:\.\w+)*)`", spell, message)


def _options(kind: Any) -> dict[str, str]:
    options: dict[str, str] = {}
    for field, hint in get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        name = next((mark.name for mark in marks if getattr(mark, "name", None) is not None), field)
        if name == "" and field != "config":
            options |= _options(hint.__origin__)
        elif Positional not in marks:
            options[field] = f"--{name.replace('_', '-')}"
    return options
