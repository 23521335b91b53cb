"""A program's settings: one dataclass, and from it the command line, the TOML file and the help.

    @dataclass(frozen=True)
    class Recipe:
        steps: int = setting("optimizer", 200, "optimizer steps in the whole run", minimum=1)

    recipe = Settings(Recipe, presets={"tiny": {}}, usage=..., description=..., epilog=...).command_line(sys.argv[1:])

A field is an int, float, bool, str, Path or tuple of names, or one of them or None. train.py is the user; this imports
nothing heavy, so that help and typing errors are answered before the seconds that torch takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import textwrap
import tomllib
import types
import typing
from dataclasses import field, fields, replace
from pathlib import Path

from halny.model.exits import Refused, unknown

NAMES = tuple[str, ...]
KIND_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a name", Path: "a path",
    NAMES: "a name or several",
}  # fmt: skip


def setting(
    group: str,
    default,
    help: str,
    *,
    minimum=None,
    above=None,
    below=None,
    choices=None,
    word=None,
    bare=None,
    shown=None,
):
    """A field: the group it is listed under, its help line, and the values it admits.

    word: what may stand for a value of its type ("auto"); bare: the value that the flag alone stands for, if it may
    stand alone; shown: what the help shows for its value.
    """
    limits = dict(minimum=minimum, above=above, below=below, choices=choices, word=word)
    return field(default=default, metadata=dict(group=group, help=help, **limits, bare=bare, shown=shown))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(message)


def _kind(hint):
    """A type without its "| None"."""
    of = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(kind for kind in of if kind is not types.NoneType)


def _as_toml(value, where: str) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_as_toml(v, where) for v in value)}]"
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    text = str(value)
    if any("\ud800" <= c <= "\udfff" for c in text):  # bytes of a name that are no UTF-8
        raise Refused(f"{where} {text!r} is not valid Unicode, which a TOML file must be; rename it")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # else JSON's escapes are TOML's


class Settings:
    """The settings of a dataclass whose fields are made by ``setting`` and one of which is run_dir.

    presets      name -> settings; the first is taken where none is named
    usage, description, epilog    of the help
    """

    def __init__(self, recipe: type, presets: dict[str, dict], **help: str):
        self.recipe, self.presets, self.help = recipe, presets, help
        self.fields = {f.name: f for f in fields(recipe)}
        self.kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(recipe).items()}

    def convert(self, name: str, value, where: str):
        """A flag's text or a TOML value as its setting's type; Refused, naming where and the value, if it is none."""
        kind, limits = self.kinds[name], self.fields[name].metadata
        if limits["word"] is not None and value == limits["word"]:
            return value
        or_word = f" or {limits['word']}" if limits["word"] else ""
        wrong = Refused(f"{where} must be {KIND_NAMES[kind]}{or_word}, got {value!r}")
        if kind == NAMES:
            names = [value] if isinstance(value, str) else value
            if not (
                isinstance(names, list) and names and all(isinstance(n, str) and n and "\0" not in n for n in names)
            ):
                raise wrong
            return tuple(names)
        if isinstance(value, bool) != (kind is bool) or (kind in (str, Path, int) and isinstance(value, float)):
            raise wrong
        if kind in (str, Path) and not (isinstance(value, str) and value and "\0" not in value):
            raise wrong
        try:
            value = kind(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if kind is float and not math.isfinite(value):
            raise Refused(f"{where} must be finite, got {value}")
        for bound, words, broken in (
            ("minimum", "at least", lambda limit: value < limit),
            ("above", "more than", lambda limit: value <= limit),
            ("below", "less than", lambda limit: value >= limit),
        ):
            if limits[bound] is not None and broken(limits[bound]):
                raise Refused(f"{where} must be {words} {limits[bound]}, got {value}")
        if limits["choices"] and value not in limits["choices"]:
            raise Refused(f"{where} must be one of {', '.join(limits['choices'])}, got {value!r}")
        return value

    def read_toml(self, path: Path) -> dict:
        """A recipe file: settings under the names of their flags, and ``preset``, the one it starts from."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise Refused(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path} is not valid TOML: {error}") from None
        preset = table.pop("preset", next(iter(self.presets)))
        if not isinstance(preset, str) or preset not in self.presets:
            raise unknown("preset", f"{preset} in {path}", self.presets)
        values = {}
        for key, value in table.items():
            name = key.replace("-", "_")
            if name not in self.fields:
                raise unknown(f"key in {path}:", key, self.fields)
            if name in values:
                raise Refused(f"{name} is named twice in {path}, with - and with _")
            values[name] = self.convert(name, value, f"{key} in {path}")
        return self.presets[preset] | values

    def _parser(self) -> Parser:
        parser = Parser(
            prog="train.py",
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=110),
            **self.help,
        )
        parser._negative_number_matcher = re.compile(r"-\.?\d|-(inf|nan)")  # argparse takes -1e-3 for a flag otherwise
        default = next(iter(self.presets))
        parser.add_argument("preset", nargs="?", metavar="PRESET", help=f"preset or recipe file [{default}]")
        parser.add_argument(
            "--print-config",
            action="store_true",
            default=argparse.SUPPRESS,
            help="print the recipe that the rest of the command line makes, as a FILE.toml, and exit",
        )
        groups = {}
        for name, s in self.fields.items():
            if s.metadata["group"] not in groups:
                groups[s.metadata["group"]] = parser.add_argument_group(s.metadata["group"])
            options = dict(default=argparse.SUPPRESS, help=s.metadata["help"].replace("%", "%%"))
            if s.default is not None:
                options["help"] += f" [{s.default}]"
            kind, choices = self.kinds[name], s.metadata["choices"]
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                plain = {int: "N", float: "X", Path: "DIR", str: "NAME", NAMES: "DIR[:WEIGHT]"}[kind]
                options["metavar"] = "{" + ",".join(choices) + "}" if choices else s.metadata["shown"] or plain
                if s.metadata["bare"] is not None:
                    options |= dict(nargs="?", const=s.metadata["bare"])
                if kind == NAMES:
                    options["nargs"] = "+"
            groups[s.metadata["group"]].add_argument(flag(name), **options)
        return parser

    def command_line(self, arguments: list[str]):
        """The recipe of a command line: preset or TOML file, then flags; of a repeated one the last. Or Refused."""
        given, rest = self._parser().parse_known_args(arguments)
        if rest:
            raise unknown("argument", rest[0].partition("=")[0], [*map(flag, self.fields), "--print-config"])
        values = vars(given)
        print_only = values.pop("print_config", False)
        preset = values.pop("preset")
        for (
            name,
            value,
        ) in values.items():  # a flag that takes all the names that follow, or one or none, takes a preset too
            bare = self.fields[name].metadata["bare"]
            *names, last = value if self.kinds[name] == NAMES else [bare, value]
            if preset is None and names and names != [None] and (last in self.presets or str(last).endswith(".toml")):
                preset, values[name] = last, names if self.kinds[name] == NAMES else bare
        preset = preset or next(iter(self.presets))
        if preset.endswith(".toml"):
            base, run_name = self.read_toml(Path(preset)), Path(preset).stem
        elif preset in self.presets:
            base, run_name = self.presets[preset], preset
        else:
            raise unknown("preset", preset, self.presets)
        values = {name: self.convert(name, value, flag(name)) for name, value in values.items()}
        recipe = self.recipe(**(base | values))
        recipe = recipe if recipe.run_dir else replace(recipe, run_dir=Path("runs") / run_name)
        if print_only:
            if os.environ.get("RANK", "0") == "0":  # torchrun starts as many of us as it has ranks
                print(self.to_toml(recipe), end="")
            raise SystemExit(0)
        return recipe

    def to_toml(self, recipe) -> str:
        """The recipe as a file that ``read_toml`` takes for the same one: each setting below its help line.

        What is left open (None) is a comment, for TOML has no null and its help says what then holds.
        """
        lines, group = [], None
        for name, s in self.fields.items():
            if s.metadata["group"] != group:
                group = s.metadata["group"]
                lines += ["", f"# ---- {group}"]
            value = getattr(recipe, name)
            comment = textwrap.wrap(s.metadata["help"], 118, break_on_hyphens=False)
            lines += ["", *(f"# {line}" for line in comment)]
            lines.append(f"# {name} =" if value is None else f"{name} = {_as_toml(value, flag(name))}")
        return "\n".join(lines[1:]) + "\n"
