"""
Settings of every command: the fields of a dataclass, each with its range beside it, given by flags or a JSON file.

    @dataclass
    class Config(Settings):
        images: tuple[str, ...]                             # no default: by position
        batch_size: Count = 8
        guidance_scale: Annotated[float, ">= 0"] = 2.0
        precision: Literal["auto", "fp32", "bf16"] = "auto"

    config = parse_settings(Config, argv, __doc__)

A value out of its range is a ValueError with one sentence. Every number is finite, whatever its range.
"""

import argparse
import dataclasses
import difflib
import json
import math
import operator
import os
import sys
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

Text = Annotated[str, "that is not empty"]
Count = Annotated[int, ">= 1", "<= 1e9"]
Whole = Annotated[int, ">= 0", "<= 1e9"]
Processes = Annotated[int, ">= 1", "<= 1024"]
Pixels = Annotated[int, ">= 1", "<= 16384"]
Seed = Annotated[int, ">= 0", "<= 9e18"]
Beams = Annotated[int, ">= 1", "<= 100"]
Guidance = Annotated[float, ">= 0", "<= 1000"]
Steps = Annotated[int, ">= 1", "<= 1000"]  # of denoising: as many as Stable Diffusion was trained with

OPERATORS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", Path: "a path"}


def check_names(names, known, where: str) -> None:
    """Raises ValueError for the first name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: there is no {name!r}; did you mean {near!r}?")


def take_apart(annotation) -> tuple:
    """(type, bounds, whether None is allowed): int | None with bounds gives (int, (">= 1",), True)."""
    options = get_args(annotation) if NoneType in get_args(annotation) else (annotation,)
    kind = next(option for option in options if option is not NoneType)
    bounds = kind.__metadata__ if get_origin(kind) is Annotated else ()
    return (get_args(kind)[0] if bounds else kind), bounds, len(options) > 1


def describe_range(annotation) -> str:
    """What a value must be, in words: "a whole number >= 1 and <= 1000"."""
    kind, bounds, _ = take_apart(annotation)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list {' '.join(bounds)}".strip() + f", each {describe_range(get_args(kind)[0])}"
    return f"{WORDS.get(kind, kind.__name__)} {' and '.join(bounds)}".strip()


def check(name: str, value, annotation):
    """The value, converted to the type where that loses nothing (the text of a flag, 1 for 1.0). Raises ValueError, with
    the name, when it is not what the annotation says."""
    kind, bounds, optional = take_apart(annotation)
    wrong = ValueError(f"{name} is {value!r}, but must be {describe_range(annotation)}")
    if value is None and optional:
        return None
    if get_origin(kind) is Literal:
        for option in get_args(kind):
            if str(option) == str(value):
                return option
        near = difflib.get_close_matches(str(value), map(str, get_args(kind)), n=1, cutoff=0)[0]
        raise ValueError(f"{wrong}; did you mean {near!r}?")
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not value and "that is not empty" in bounds:
            raise wrong
        return tuple(check(name, item, get_args(kind)[0]) for item in value)
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = kind(value) if isinstance(value, str) else value
            value = float(number) if kind is float else number
        except (ValueError, OverflowError):
            raise wrong from None
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise wrong
    if kind in (int, float):
        limits = [bound.split() for bound in bounds]
        if kind is float and not math.isfinite(value) or not all(OPERATORS[sign](value, float(limit)) for sign, limit in limits):
            raise wrong
    if value == "" and "that is not empty" in bounds:
        raise wrong
    return value


class Settings:
    """Base of the dataclasses with settings: checks, and where needed converts, every field of a new one."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, check(field.name, getattr(self, field.name), field.type))


def read_json(path: str | Path) -> dict:
    """What a JSON file with an object holds. Raises ValueError with its name when it is missing or something else."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, but must hold an object: {{...}}")
    return values


def raise_value_error(message: str):
    raise ValueError(message)


def read_flags(cls, argv, doc: str, **more) -> dict:
    """The values that the command line gives, by field, and those of `more`, {flag: its help}. Raises ValueError."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.error = raise_value_error
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS)
    for name, field in fields.items():
        kind, _, _ = take_apart(field.type)
        positional = field.default is dataclasses.MISSING
        flag = name if positional else f"--{name}"
        kwargs = dict(default=argparse.SUPPRESS, help=describe_range(field.type).replace("%", "%%"))
        if not positional:
            kwargs["help"] += f"; default: {str(field.default) or 'none'}".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **kwargs)
            continue
        if get_origin(kind) is tuple:
            several = Ellipsis in get_args(kind)
            kwargs["nargs"] = ("*" if positional else "+") if several else len(get_args(kind))
            kwargs["default"] = [] if positional else argparse.SUPPRESS
        parser.add_argument(flag, metavar=None if positional else name.upper(), **kwargs)
    flags, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        check_names([flag.split("=")[0].lstrip("-")], [*fields, *more], "command line")
    flags = vars(flags)
    return {name: check(name, value, fields[name].type) if name in fields else value for name, value in flags.items()}


def read_flags_and_file(cls, argv, doc: str) -> dict:
    """The values that flags and the JSON file of --config give, by field; flags override the file. The file may have values of one
    stage under stage1 and stage2. Raises ValueError with the nearest name for unknown ones."""
    flags = read_flags(cls, argv, doc, config="JSON file with settings, and with those of one stage under stage1 or stage2")
    if "config" not in flags:
        return flags
    path, names = flags.pop("config"), [field.name for field in dataclasses.fields(cls)]
    settings = read_json(path)
    stages = {key: settings.pop(key, {}) for key in ("stage1", "stage2")}
    check_names(settings, names, path)
    for key, values in stages.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {key} is {values!r}, but must be an object: {{...}}")
        check_names(values, [name for name in names if name != "stage"], f"{path}, {key}")
    stage = flags.get("stage", settings.get("stage", 1))
    return settings | stages.get(f"stage{stage}", {}) | flags


def parse_settings(cls, argv, doc: str):
    """The settings that the command line gives, as an instance of cls. Leaves the program with one sentence when they
    are wrong."""
    try:
        return cls(**read_flags(cls, argv, doc))
    except ValueError as error:
        sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def same_as_before(file: Path, settings: dict, mend: str) -> None:
    """Writes down what a folder's contents were made with, or, where that stands there already, raises ValueError when
    it was something else: what is there and what would come must not be mixed."""
    if file.exists():
        before = read_json(file)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(f"{file.parent} was made with {name} {before.get(name)!r}, and now it is {value!r}; {mend}")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n")


def printable(text) -> str:
    """A name on one line and in UTF-8: what is not printable in it is escaped."""
    text = str(text)
    if text.isprintable():  # almost always, and the loader asks for each image
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
