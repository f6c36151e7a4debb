"""
The settings of every command are the fields of a dataclass, and become its flags, as SampleConfig in
sample.py. A number's type says its range: Annotated[int, from, to]. A field without a default is given by
position.
"""

import argparse
import inspect
import io
import json
import os
import re
import sys
import tarfile
from dataclasses import MISSING, fields
from functools import cache
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
    """How argparse reads a value of this type: its options "type" and so on, and, as "help", what the value
    is. A value out of the type's range is an ArgumentTypeError."""
    origin, options = get_origin(kind), get_args(kind)
    if NoneType in options:  # int | None
        return reader(options[0])
    if origin is tuple:
        one = reader(options[0])
        count = "*" if Ellipsis in options else len(options)
        return one | {"nargs": count, "help": one["help"].replace("one of", "any of")}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": "true or false"}
    about = {str: "text", Path: "a path"}.get(kind)
    if origin is Literal:
        about = "one of " + ", ".join(map(str, options))
    if origin is Annotated:
        number, low, high = options
        to = f" to {high:,}" if high < 10**9 else ""
        about = f"a {'whole ' * (number is int)}number from {low:,}{to}"

    def convert(text: str):
        try:
            if origin is Literal:
                return next(option for option in options if str(option) == text)
            value = number(text) if origin is Annotated else kind(text)
            if (origin is Annotated and not low <= value <= high) or (kind is Path and not text):
                raise ValueError
            return value
        except (ValueError, OverflowError, StopIteration):
            raise argparse.ArgumentTypeError(f"it is {text!r}, but must be {about}") from None

    return {"type": convert, "help": about}


@cache
def comments_of(cls) -> dict[str, str]:
    """The comment of each field of a dataclass: above it, or at the end of its line."""
    found, field = {}, r"((?:^    # .*\n)*)^    (\w+):[^#\n]*(?:# (.*))?$"
    for base in cls.__mro__[-2::-1]:
        for above, name, beside in re.findall(field, inspect.getsource(base), re.MULTILINE):
            found[name] = " ".join(f"{above} {beside}".replace("# ", "").split())
    return found


def parse(cls, argv, doc: str, defaults: dict | None = None) -> dict:
    """The values that arguments give, by field. defaults: {field: its default in words}, where it is not one
    value. Raises ValueError."""
    comments, defaults = comments_of(cls), defaults or {}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in fields(cls):
        options = reader(field.type)
        about = "; ".join(filter(None, [options["help"], comments.get(field.name)])).replace("%", "%%")
        if field.default is MISSING:
            default = {"default": []} if options.get("nargs") == "*" else {}
            parser.add_argument(field.name, **options | default | {"help": about})
        else:
            default = defaults.get(field.name, field.default)
            about += f" (default: {'none' if default in (None, '', ()) else default})"
            parser.add_argument(f"--{field.name}", **options | {"help": about})

    def fail(message: str):
        message = message.replace("ignored explicit argument", "it takes no value, but has")
        raise ValueError(message.removeprefix("argument "))

    parser.error = fail
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"there is no setting {unknown[0].split('=')[0]!r}: --help lists them")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()}


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        bad = any(isinstance(item, dict) or str(item).startswith("--") for item in items)
        if bad or name in ("help", "config"):
            raise ValueError(f"{name} cannot be {json.dumps(value)}")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def parse_with_file(cls, argv, doc: str, defaults: dict | None = None) -> dict:
    """The values that flags and the JSON file of --config give; flags go before the file. It is read as
    flags, too, and may have values of one stage under stage1 or stage2. Raises ValueError."""
    given = parse(cls, argv, doc, defaults)
    if "config" not in given:
        return given
    path = given.pop("config")
    values = read_json(path)
    sections = [values, values.pop("stage1", {}), values.pop("stage2", {})]
    try:
        for section in sections[1:]:
            if not isinstance(section, dict) or "stage" in section:
                raise ValueError("stage1 and stage2 are objects of settings, without a stage")
        common, *of_stage = [parse(cls, as_flags(section), doc) for section in sections]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return common | of_stage[given.get("stage", common.get("stage", 1)) - 1] | given


def read_settings(cls, argv, doc: str):
    """An instance of cls with what the command line gives. Exits with one sentence if that is wrong."""
    try:
        return cls(**parse(cls, argv, doc))
    except ValueError as error:
        sys.exit(f"error: {error}")


def read_json(path: str | Path) -> dict:
    """What a JSON file with an object holds. Raises ValueError, with its name, for anything else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}, not an object")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def write_atomically(path: Path, write):
    """Calls write(another path), and gives the result the name: the file at `path` is always whole. Returns
    what write does."""
    unfinished = path.with_name(f".{os.uname().nodename}.{os.getpid()}.unfinished")
    try:
        result = write(unfinished)
        os.replace(unfinished, path)
        return result
    finally:
        unfinished.unlink(missing_ok=True)


def write_lines(path: Path, lines) -> None:
    """The file, whole, with these lines."""
    write_atomically(path, lambda file: file.write_text("".join(line + "\n" for line in lines), **TEXT))


def write_json(path: Path, values: dict) -> None:
    write_lines(path, [json.dumps(values, indent=2, default=str)])


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
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
