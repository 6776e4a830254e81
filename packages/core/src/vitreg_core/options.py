"""Command-line options of a config: `--section.field value`, checked as the config checks itself."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel

from vitreg_core.config import C, field_names, nearest, override
from vitreg_core.errors import InputError

ACTIONS = {"config", "print_config"}
"""Options that are not fields."""


def parse_options(default: C, arguments: Sequence[str], program: str) -> C:
    """Replace fields of a config by what stands in a file, and then by what stands on the command line.

    `--field value` or `--field=value` sets a field, dots reach into sections, a tuple takes several values or the
    option several times, a boolean may stand alone, and `none` empties an optional field. Of an option given twice the
    last counts. `--config FILE` reads a YAML file with some or all of the fields, and `--print-config` prints such a
    file with all of them and exits; `--help` prints them with their meaning, and exits.

    Raises:
        InputError: unknown option (with the nearest name), a missing value, one that the field refuses, or a file that
            cannot be read.
    """
    groups = list(split_arguments([argument for argument in arguments if argument not in {"-h", "--help"}]))
    for name, values in groups:
        if name == "config":
            default = with_file(default, values)
    changes: dict[str, Any] = {}
    for name, values in groups:
        if name in ACTIONS:
            continue
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
    if any(name == "print_config" for name, _ in groups):
        print_config(changed)
    return changed


def with_file(default: C, values: Sequence[str]) -> C:
    """Replace fields of a config by those of the YAML file that `--config` names.

    Raises:
        InputError: not one file, a file that is no YAML of names and values, an unknown field (with the nearest name),
            or a value that the field refuses.
    """
    import yaml  # only these options need it

    if len(values) != 1:
        raise InputError(f"option --config takes one file, got {len(values)}")
    path = Path(values[0])
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give --config a YAML file") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not valid YAML ({reason}); --print-config prints a file to start from") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds no names and values; --print-config prints a file to start from")
    changes = dict(flatten(content, default))
    known = set(field_names(type(default)))
    for name in changes:
        if name not in known:
            raise InputError(f"{path}: unknown field {name}{nearest(name, known)}; --print-config prints all")
    return override(default, changes, where=f"{path}:")


def flatten(content: Mapping[Any, Any], config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a file under their dotted names, as deep as the config has sections."""
    for name, value in content.items():
        section = getattr(config, str(name), None)
        if isinstance(value, Mapping) and isinstance(section, BaseModel):
            yield from flatten(value, section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def print_config(config: BaseModel) -> None:
    """Print a config as YAML that `--config` takes, and exit with 0."""
    import yaml

    sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    sys.exit(0)


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
        description=f"{type(default).__doc__}\n\n--config FILE reads fields from a YAML file, which the command line "
        "overrides; --print-config prints all fields as such a file.",
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
    except BrokenPipeError:  # whoever read what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
