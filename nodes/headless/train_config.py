"""Arguments from a file: `--config FILE.toml` or `.json`, whose values those of the command line replace."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...wan_core.errors import FileError, InputError
from .train_arguments import ARGUMENTS, BY_NAME, READ_JSON, REQUIRED, Argument, table
from .validate import nearest

SHIPPED = Path(__file__).resolve().parents[2] / "example_trainings"


def read_toml(text: str) -> dict[str, Any]:
    try:
        from tomllib import loads
    except ImportError:  # before Python 3.11
        try:
            from tomli import loads
        except ImportError:
            raise FileError("This Python reads no TOML. Run 'pip install tomli', or give a .json file.") from None
    return loads(text)


READERS = {".toml": read_toml, ".json": json.loads}


def complete(options: Namespace) -> Namespace:
    """With every argument: as given, else as in the file that `config` names, else by its default."""
    values = {argument.name: argument.default for argument in ARGUMENTS}
    if options.config is not None:
        file = config_file(options.config)
        values |= {BY_NAME[name].name: value for name, value in checked(read_config(file), file)}
    values |= vars(options)
    for name, value in values.items():
        if value is REQUIRED:
            raise InputError(f"--{name} is missing: {BY_NAME[name].help}.")
    return Namespace(**values)


def checked(values: Mapping[str, Any], file: Path) -> Iterator[tuple[str, Any]]:
    """Each name with its value as the argument's own. Raises InputError for what is none, or cannot be its value."""
    for name, value in flat(values):
        if name not in BY_NAME:
            raise InputError(f"{file}: there is no argument {name!r}{nearest(name, BY_NAME)}.")
        yield name, taken(BY_NAME[name], value, file)


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Without the tables that only bring order into a file; their names are free."""
    for name, value in values.items():
        if isinstance(value, dict) and not (name in BY_NAME and BY_NAME[name].type is table):
            yield from value.items()
        else:
            yield name, value


def taken(argument: Argument, value: Any, file: Path) -> Any:
    is_switch = argument.type is bool
    try:
        if is_switch != isinstance(value, bool):
            raise ValueError("it is a switch: true or false" if is_switch else "it is no switch")
        found = value if is_switch else argument.type(as_text(value, argument.type in READ_JSON))
    except (ValueError, ArgumentTypeError) as error:
        raise InputError(f"{file}: {argument.name} cannot be {value!r} ({error}).") from error
    if argument.choices and found not in argument.choices:
        raise InputError(f"{file}: {argument.name} is {value!r}. Choose one of {', '.join(argument.choices)}.")
    return found


def as_text(value: Any, as_json: bool) -> str:
    """As one would write it on the command line."""
    if as_json:
        return value if isinstance(value, str) else json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def read_config(file: Path) -> dict[str, Any]:
    """The values in a file."""
    read = READERS.get(file.suffix.lower())
    if read is None:
        raise FileError(f"{file} is no config. Give a .toml or .json file.")
    try:
        found = read(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise FileError(f"{file} cannot be read ({error}). It has to be {file.suffix[1:].upper()} in UTF-8.") from error
    if not isinstance(found, dict):
        raise FileError(f"{file} holds no names with values.")
    return found


def config_file(name: str) -> Path:
    """The file of this name, or the one that WanFlow is shipped with."""
    for file in (Path(name), SHIPPED / name, SHIPPED / f"{name}.toml"):
        if file.is_file():
            return file
    shipped = [str(file.relative_to(SHIPPED).with_suffix("")) for file in sorted(SHIPPED.rglob("*.toml"))]
    raise FileError(
        f"There is no config {name}{nearest(name, shipped)}. Give a file, or one of WanFlow's such as {shipped[-1]}."
    )
