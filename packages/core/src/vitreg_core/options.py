"""Command-line options of a config: `--section.field value`, checked as the config checks itself."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_origin

from pydantic import BaseModel

from vitreg_core.config import C, field_names, nearest, override
from vitreg_core.errors import InputError


def parse_options(default: C, arguments: Sequence[str], program: str) -> C:
    """Replace fields of a config by what stands on the command line.

    `--field value` or `--field=value` sets a field, dots reach into sections, a tuple takes several values or the
    option several times, a boolean may stand alone, and `none` empties an optional field. Of an option given twice the
    last counts. `--help` prints all fields with the values that stand on the command line, and exits.

    Raises:
        InputError: unknown option (with the nearest name), a missing value, or one that the field refuses.
    """
    changes: dict[str, Any] = {}
    for name, values in split_arguments([argument for argument in arguments if argument not in {"-h", "--help"}]):
        annotation = field_type(type(default), name)
        if get_origin(annotation) is tuple:
            changes[name] = (*changes.get(name, ()), *values)
        elif annotation is bool and not values:
            changes[name] = True
        elif len(values) != 1:
            raise InputError(f"option --{name} takes one value, got {len(values)}")
        else:
            changes[name] = None if values[0].lower() == "none" else values[0]
    changed = override(default, changes, where="option")
    if "--help" in arguments or "-h" in arguments:
        print_help(changed, program)
    return changed


def split_arguments(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Group a command line into options and the values after each."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.removeprefix("--").partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            raise InputError(f"unexpected argument {argument!r}; options look like --name value")
    return iter(groups)


def field_type(cls: type[BaseModel], dotted: str) -> Any:  # noqa: ANN401 (any type a field may have)
    """Type of a field, by dotted name.

    Raises:
        InputError: no such field; names the nearest.
    """
    section: Any = cls
    for part in dotted.split("."):
        fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        if part not in fields:
            raise InputError(f"unknown option --{dotted}{nearest(dotted, field_names(cls))}; --help lists all")
        section = fields[part].annotation
    return section


def print_help(default: BaseModel, program: str) -> None:
    """Print every option with its meaning and present value, and exit with 0."""
    import tyro  # only --help needs it, and it takes a tenth of a second

    tyro.cli(
        type(default),
        default=default,
        args=["--help"],
        prog=program,
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program with one line on stderr and exit code 2 when the user's input cannot be used."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        sys.exit(2)
