"""
The settings of every command are the fields of dataclasses, and become its flags (see SampleConfig).
A number's type says its range: Annotated[int, from, to]. A field without a default is given by position.
"""

import argparse
import inspect
import io
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

Count = Annotated[int, 1, 10**9]
NonNegative = Annotated[int, 0, 2**62]
Pixels = Annotated[int, 1, 16384]
Steps = Annotated[int, 1, 1000]  # of denoising
# How texts are written: "backslashreplace" makes JSON's own escape of a name's byte that is not UTF-8
TEXT = dict(encoding="utf-8", errors="backslashreplace", newline="\n")


def reader(kind) -> dict:
    """How argparse reads a value of this type: its options "type" and so on, and "help": what it is."""
    origin, options = get_origin(kind), get_args(kind)
    if NoneType in options:  # int | None
        return reader(options[0])
    if origin is tuple:
        return reader(options[0]) | {"nargs": "*" if Ellipsis in options else len(options)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": "true or false"}
    about = {str: "text", Path: "a path"}.get(kind) or f"one of {', '.join(map(str, options))}"
    if origin is Annotated:
        about = f"a {'whole ' * (options[0] is int)}number from {options[1]:,} to {options[2]:,}"

    def convert(text: str):
        with suppress(ValueError, OverflowError, StopIteration):
            if origin is Literal:
                return next(option for option in options if str(option) == text)
            value = options[0](text) if origin is Annotated else kind(text)
            if kind is str or text and (kind is Path or options[1] <= value <= options[2]):
                return value
        raise argparse.ArgumentTypeError(f"it is {text!r}, but must be {about}")

    return {"type": convert, "help": about}


def comments_of(cls) -> dict[str, str]:
    """The comment of each field of a dataclass: above it, or at the end of its line."""
    field = r"((?:^    # .*\n)*)^    (\w+):[^#\n]*(?:# (.*))?$"
    found = re.findall(field, inspect.getsource(cls), re.MULTILINE)
    return {name: " ".join(f"{above} {beside}".replace("# ", "").split()) for above, name, beside in found}


def parse(argv, doc: str, *classes, defaults: dict | None = None) -> dict:
    """The values that arguments give, by field. defaults: {field: its default in words}, where it is not one
    value. Raises ValueError."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for cls in classes:
        comments = comments_of(cls)
        for field in fields(cls):
            options = reader(field.type)
            about = "; ".join(filter(None, [options.pop("help"), comments[field.name]])).replace("%", "%%")
            if field.default is MISSING:
                options |= {"default": []} if options.get("nargs") == "*" else {}
                parser.add_argument(field.name, **options, help=about)
            else:
                default = (defaults or {}).get(field.name, field.default)
                about += f" (default: {'none' if default in (None, '', ()) else default})"
                parser.add_argument(f"--{field.name}", **options, help=about)

    def fail(message: str):
        raise ValueError(message.removeprefix("argument "))

    parser.error = fail
    values = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def parse_with_file(argv, doc: str, *classes, defaults: dict | None = None) -> dict:
    """The values that flags and the JSON file of --config give; flags go before the file. It is read as
    flags, too, and may have values of one stage under stage1 or stage2. Raises ValueError."""
    given = parse(argv, doc, *classes, defaults=defaults)
    if "config" not in given:
        return given
    path = given.pop("config")
    values = read_json(path)
    sections = [values, values.pop("stage1", {}), values.pop("stage2", {})]
    try:
        common, *of_stage = [parse(as_flags(section), doc, *classes) for section in sections]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return common | of_stage[given.get("stage", common.get("stage", 1)) - 1] | given


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def read_settings(cls, argv, doc: str):
    """An instance of cls with what the command line gives. Exits with one sentence if that is wrong."""
    try:
        return cls(**parse(argv, doc, cls))
    except ValueError as error:
        sys.exit(f"error: {error}")


def read_json(path: str | Path) -> dict:
    """What a JSON file holds. Raises ValueError, with its name, if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def read_json_lines(path: Path) -> list:
    """What the lines of a file hold; [] if there is none. Half a last line, of a killed call or a full disk,
    is left out. Raises ValueError."""
    values = []
    for line in open(path, **TEXT) if path.exists() else []:
        try:
            values.append(json.loads(line))
        except ValueError:
            if line.endswith("\n"):
                raise
    return values


def write_atomically(path: Path, write) -> None:
    """Calls write(another path), and gives the result the name: the file at `path` is always whole."""
    unfinished = path.with_name(f".{os.uname().nodename}.{os.getpid()}.unfinished")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_lines(path: Path, lines) -> None:
    """The file, whole, with these lines."""
    write_atomically(path, lambda file: file.write_text("".join(line + "\n" for line in lines), **TEXT))


def write_json(path: Path, values: dict) -> None:
    write_lines(path, [json.dumps(values, indent=2, default=str)])


def append(path: Path, line: str) -> None:
    with open(path, "a", **TEXT) as file:
        file.write(line + "\n")


def add_to_tar(tar, name: str, data: bytes) -> None:
    info = tar.tarinfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def same_as_before(file: Path, settings: dict, hint: str) -> None:
    """Writes down what a folder is made with. Raises ValueError if that was something else before."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    before = read_json(file)
    for name, now in settings.items():
        if before.get(name) != now:
            was = f"{file.parent} was made with {name} {before.get(name)!r}"
            raise ValueError(f"{was}, and now it is {now!r}; {hint}")


def printable(text) -> str:
    """A file's name on one line and in UTF-8: what cannot be printed is escaped."""
    escape = lambda c: c.encode("unicode_escape", "surrogatepass").decode()
    return "".join(c if c.isprintable() else escape(c) for c in str(text))
