"""Config dataclasses as command-line flags and YAML files, by jsonargparse.

A field `kl_coef: float = arg(0.05, "Weight of the KL penalty.", at_least=0)` is the flag --kl-coef and the YAML key
kl_coef. A mapping is given as JSON, or as pairs: --columns prompt=question completion=answer.
Every mistake is a ValueError of one line. It names the key, the file or section, what was expected, the nearest name.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from rlhf_fast.config.fields import bounds_of
from rlhf_fast.config.stages import StageConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


class _Formatter(argparse.HelpFormatter):
    """One line per flag on a terminal of usual width."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 38, **options})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, ActionYesNo):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        return super()._format_action_invocation(action)


def make_parser(config_class: type, prog: str) -> ArgumentParser:
    """A parser of the fields of `config_class`, grouped by the class that declares them.

    It requires no field, because a field may come from the YAML file; `parse` says which are missing.
    """
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [flags]",
        description=_summary(config_class),
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
        print_config=None,
    )
    hints = get_type_hints(config_class)
    classes = [cls for cls in config_class.__mro__ if dataclasses.is_dataclass(cls)]
    required = parser.add_argument_group("required")
    groups = {cls: parser.add_argument_group(_title(cls, cls is config_class)) for cls in classes}
    for field in dataclasses.fields(config_class):
        declared_by = [cls for cls in classes if field.name in cls.__annotations__][-1]
        group = required if _is_required(field) else groups[declared_by]
        hint = hints[field.name]
        if hint is bool:
            kind: dict[str, Any] = {"action": ActionYesNo(no_prefix="no-")}
        elif item := _item(hint):
            kind = {
                "type": item,
                "nargs": "*",
                "metavar": "NAME" if get_origin(item) is Literal else _type_name(item).upper(),
            }
        else:
            names = {Literal: "NAME", dict: "PAIRS"}
            kind = {"type": hint, "metavar": names.get(get_origin(_given(hint)), _type_name(hint).upper())}
        group.add_argument(_flag(field.name), default=_listed(_default(field), hint), help=_help(field, hint), **kind)
    general = parser.add_argument_group("general")
    general.add_argument("--config", action="config", metavar="FILE", help="YAML file with these keys; flags win.")
    general.add_argument("--print-config", action="store_true", help="Print the resulting config as YAML and stop.")
    if issubclass(config_class, StageConfig):
        help = "Print the memory plan of this config and stop; no weights are loaded."
        general.add_argument("--dry-run", action="store_true", help=help)
    general.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    general.add_argument("-h", "--help", action="help", help="Show this help and stop.")
    return parser


def parse(config_class: type[Config], arguments: list[str], prog: str) -> Config | None:
    """The config that YAML file and flags describe; flags win wherever they stand. None after --print-config.

    --help prints and exits, as argparse does. Raises ValueError naming the wrong flag or key.
    """
    parser = make_parser(config_class, prog)
    names = [field.name for field in dataclasses.fields(config_class)]
    hints = get_type_hints(config_class)
    general = ["config", "print_config", "debug", "help", *["dry_run"] * issubclass(config_class, StageConfig)]
    for token in arguments:
        flag = re.match(r"--(?:no-)?([\w-]+)", token)
        if flag and flag[1].replace("-", "_") not in (*names, *general):
            raise ValueError(f"unknown flag {nearest(flag[0], [_flag(name) for name in names])}")
    arguments = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), token) for token in arguments]
    arguments = _with_mappings(arguments, config_class)
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    before.add_argument("--config")
    try:
        file, flags = before.parse_known_args(arguments)
        if file.config:
            parser.set_defaults(check_file(config_class, file.config))
        parsed = parser.parse_args(_together(flags, config_class))
    except (ArgumentError, argparse.ArgumentError) as error:
        raise ValueError(_one_line(error, config_class)) from error
    values = {name: _alone(parsed[name], hints[name]) for name in names}
    config = _build(config_class, values, flag_names=True)
    if parsed.print_config:
        print(yaml.safe_dump(values, sort_keys=False), end="")
        return None
    return config


def _with_mappings(arguments: list[str], config_class: type) -> list[str]:
    """`--columns prompt=question completion=answer` as JSON, which jsonargparse reads: {"prompt": "question", ...}."""
    hints = {_flag(name): get_args(hint) for name, hint in get_type_hints(config_class).items() if _is_mapping(hint)}
    out, rest = [], list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        values = [value] if equals else []
        while flag in hints and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if flag in hints and values and all(re.match(r"[\w.-]+=", pair) for pair in values):
            read = str if hints[flag][1] is str else yaml.safe_load
            pairs = [pair.partition("=") for pair in values]
            out += [flag, json.dumps({name: read(text) for name, _, text in pairs})]
        else:
            out += [f"{flag}={value}", *values[1:]] if equals else [flag, *values]
    return out


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is dict


def from_dict(config_class: type[Config], values: dict[str, Any], where: str) -> Config:
    """The config of `values`, types checked; `where` (a file, a section) opens every error message."""
    values = check_values(config_class, values, where)
    try:
        return _build(config_class, values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_file(config_class: type, file: str) -> dict[str, Any]:
    """The values in `file`. Raises ValueError unless it is a YAML mapping of known keys to values of the right types.

    A field that takes one value or several has a list here.
    """
    file = os.path.expanduser(file)
    if not Path(file).is_file():
        raise ValueError(f"--config: expected a YAML file, found no {file}")
    try:
        with open(file) as stream:
            values = yaml.safe_load(stream)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected keys and values, got {values!r:.60}")
    hints = get_type_hints(config_class)
    return {name: _listed(value, hints[name]) for name, value in check_values(config_class, values, file).items()}


def check_values(config_class: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values in the types of their fields: "1e-3" as a float, because YAML 1.1 reads it as a string.

    Keys of `PASSED_OVER`, a class variable, are left out: a command that reads another command's file has one.
    Raises ValueError, which `where` opens, for an unknown key and for a value of a wrong type.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    hints = get_type_hints(config_class)
    values = {name: value for name, value in values.items() if name not in getattr(config_class, "PASSED_OVER", ())}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"{where}: unknown key {nearest(str(key), names)}")
        if hints[key] is bool and not isinstance(value, bool):  # ActionYesNo's own error does not name the key
            raise ValueError(f"{where}: {key}: expected bool, got {value!r}")
        if _item(hints[key]) and not isinstance(_listed(value, hints[key]), list | NoneType):
            raise ValueError(f"{where}: {key}: expected {_type_name(hints[key])}, got {value!r}")
    values = {name: _listed(value, hints[name]) for name, value in values.items()}
    try:
        checked = make_parser(config_class, "").parse_object(values, defaults=False)
    except ArgumentError as error:
        raise ValueError(f"{where}: {_one_line(error, config_class)}") from error
    return {name: _alone(checked[name], hints[name]) for name in values}


def _build(config_class: type[Config], values: dict[str, Any], *, flag_names: bool = False) -> Config:
    for field in dataclasses.fields(config_class):
        if _is_required(field) and values.get(field.name) is None:
            name = _flag(field.name) if flag_names else repr(field.name)
            raise ValueError(f"missing {name}: {field.metadata['help']}")
    return config_class(**values)


def _item(hint: Any) -> Any:
    """The type of a list's items where the field takes a list, else None."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((get_args(option)[0] for option in options if get_origin(option) is list), None)


def _given(hint: Any) -> Any:
    """The type without None, where only one type is left."""
    options = [option for option in get_args(hint) if option is not NoneType]
    return options[0] if get_origin(hint) in (Union, UnionType) and len(options) == 1 else hint


def _takes_one_too(hint: Any) -> bool:
    """Whether the field takes one value or a list of such values: `str | list[str]`, or names alike."""
    return get_origin(hint) in (Union, UnionType) and _item(hint) in get_args(hint)


def _listed(value: Any, hint: Any) -> Any:
    """[value] where the field takes one value or several, and this is one."""
    return [value] if isinstance(value, str) and _takes_one_too(hint) else value


def _alone(value: Any, hint: Any) -> Any:
    """The value without its list where it is the only one and the field takes one value or several: `str | list`."""
    return value[0] if isinstance(value, list) and len(value) == 1 and _takes_one_too(hint) else value


def _together(flags: list[str], config_class: type) -> list[str]:
    """The flags, with the values of a repeated flag of a list behind one flag.

    A field that takes one value or several takes one behind each flag: `--reward a --reward b`.
    """
    hints = get_type_hints(config_class)
    lists = {_flag(name) for name, hint in hints.items() if _item(hint)}
    one_each = {_flag(name) for name in hints if _flag(name) in lists and _takes_one_too(hints[name])}
    values: dict[str, list[str]] = {}
    others: list[str] = []
    name, into = "", others
    for token in flags:
        flag, equals, value = token.partition("=")
        if flag in lists:
            name, into = flag, values.setdefault(flag, [])
            into += [value] * bool(equals)
        elif token.startswith("--"):
            name, into = "", others
            others.append(token)
        else:
            into.append(token)
        if name in one_each and (equals or token != name):
            name, into = "", others
    return [*others, *(token for name, given in values.items() for token in (name, *given))]


def _type_name(hint: Any) -> str:
    """The type as `--help` and messages name it: int, float, a|b|c (choices), list of str; None is left out."""
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is list:
        return f"list of {_type_name(get_args(hint)[0])}"
    return "mapping" if get_origin(hint) is dict else hint.__name__


def _one_line(error: Exception, config_class: type) -> str:
    """The error in one line; a wrong type in the words of this package, because jsonargparse's take several lines."""
    message = " ".join(str(error).split())
    wrong = re.match(r'Parser key "([\w.]+)"(?: element \d+)?: .*?(?:Got|Given) value: (.*)', message)
    if not wrong:
        return message
    hint = get_type_hints(config_class)[wrong[1].split(".")[0]]
    return f"{wrong[1]}: expected {_type_name(hint)}, got {wrong[2]!r}"


def nearest(name: str, names: list[str]) -> str:
    """The quoted name, and which of `names` was probably meant."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return repr(name) + (f", did you mean {near[0]!r}?" if near else "")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _help(field: dataclasses.Field, hint: Any) -> str:
    text, default = field.metadata["help"], _default(field)
    if get_origin(named := _item(hint) or _given(hint)) is Literal:
        text += f" {_type_name(named)}"
    if bounds := bounds_of(field, int if int in (hint, *get_args(hint)) else float):
        text += f" {bounds}"
    if default is not None and default != {}:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" [{str(shown).lower() if hint is bool else shown}]"
    return text.replace("%", "%%")


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip()


def _title(cls: type, own: bool) -> str:
    return "options" if own else _summary(cls).splitlines()[0].rstrip(".").lower()
