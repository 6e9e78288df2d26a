"""Dataclasses of arguments, read from the command line and from a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from trainer import entry

REQUIRED = dataclasses.MISSING
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", string_to_bool: "true or false"}
NULL, SEQUENCE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:seq"


def arg(default: Any, help: str, **more: Any) -> Any:
    """A field of an argument group; without a default it is REQUIRED.

    `more` goes to argparse: metavar, choices. Of a list with a pair of metavars there are two.
    """
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Switch(argparse.Action):
    """A flag without a value, and its opposite: --x, and --no-x or --no_x."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        names = [name.removeprefix("--") for name in option_strings]
        opposites = [f"--no{mark}{name}" for name in names for mark in "-_"]
        super().__init__([*option_strings, *opposites], dest, nargs=0, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, not (option or "").startswith(("--no-", "--no_")))


class Parser(entry.Parser, HfArgumentParser):
    """HfArgumentParser with switches, with lists of two values, and with help and errors that name
    each flag by one spelling of it."""

    def __init__(self, groups: Any = None, **options: Any) -> None:
        super().__init__(groups, **options)
        for action in self.actions():
            if isinstance(action.metavar, tuple):
                action.nargs = len(action.metavar)
            shown = [f"--{action.dest}"]  # the parser knows the other spellings from here on
            action.option_strings = [*shown, *[f"--no-{action.dest}"] * isinstance(action, Switch)]

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: dataclasses.Field[Any]) -> None:
        if field.type not in (bool, bool | None):
            HfArgumentParser._parse_dataclass_field(parser, field)
            return
        spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        parser.add_argument(*spellings, action=Switch, default=field.default, **field.metadata)

    def actions(self) -> list[argparse.Action]:
        """The actions of the dataclasses' fields."""
        fields = (field for group in self.dataclass_types for field in dataclasses.fields(group))
        names = {field.name for field in fields}
        return [action for action in self._actions if action.dest in names]

    def parse(self, argv: list[str] | None = None) -> dict[str, Any]:
        """The values of all fields: from the command line, else from the file that --config names,
        else the defaults."""
        self.add_argument(
            "--config", metavar="FILE",
            help="a YAML file of flags, named as here without the dashes; the command line "
            "overrides it",
        )  # fmt: skip
        first = entry.Parser(add_help=False)
        first.add_argument("--config", action="append", default=[])
        files = first.parse_known_args(argv)[0].config
        if len(files) > 1:
            self.error(f"--config came {len(files)} times; need one file")
        for file in files:
            values = read_config(Path(file), self.actions())
            self.set_defaults(**values)
            for action in self.actions():
                action.required = action.required and action.dest not in values
        *groups, _, rest = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return {name: value for group in groups for name, value in vars(group).items()}


def read_config(path: Path, actions: Iterable[argparse.Action]) -> dict[str, Any]:
    """The values of a YAML file, checked as the same text on the command line would be."""
    known = {action.dest: action for action in actions}
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--config is {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config is {path}, which is no YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config is {path}, which holds no mapping; need lines of NAME: VALUE")
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for key, node in root.value:
        name, where = str(key.value), f"{path}, line {key.start_mark.line + 1}"
        if name in seen:
            raise ValueError(f"{where}: {name} came twice; need it once")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else "; need a flag's name, as in --help"
            raise ValueError(f"{where}: {name} is no flag{hint}")
        seen.add(name)
        if node.tag != NULL:
            values[name] = value_of(known[name], node, where)
    return values


def value_of(action: argparse.Action, node: yaml.Node, where: str) -> Any:
    """The value that a flag gets from a YAML node. The text counts and not what YAML makes of it,
    so that 1e-5 is a number, `no` a choice and 007 a name."""

    def refuse(needed: str) -> NoReturn:
        shown = ", ".join(map(str, texts)) if texts else "no value"
        raise ValueError(f"{where}: {action.dest} is {shown}; need {needed}")

    nodes = node.value if node.tag == SEQUENCE else [node]
    texts = [each.value for each in nodes if isinstance(each, yaml.ScalarNode)]
    single, count = action.nargs in (None, 0), action.nargs
    if single and (node.tag == SEQUENCE or not texts):
        refuse("one value")
    if not texts or len(texts) != len(nodes):
        refuse("a list of values")
    if isinstance(count, int) and count > 1 and len(texts) != count:
        refuse(f"a list of {count} values")
    kind: Any = string_to_bool if isinstance(action, Switch) else action.type
    try:
        if kind is float:
            texts = [text.replace(".inf", "inf") for text in texts]  # YAML's spelling
        values = [kind(text) for text in texts]
    except (ValueError, argparse.ArgumentTypeError):
        refuse(KINDS.get(kind, "another value"))
    for value in values:
        if action.choices is not None and value not in action.choices:
            refuse(f"one of {', '.join(map(str, action.choices))}")
    return values[0] if single else values
