"""Parse YAML and the command line into a typed dataclass, with one-line errors.

jsonargparse parses and validates. In addition, the error for an unknown key lists the nearest and
all valid keys, option names may have dashes instead of underscores, and a boolean option needs no
value (``--eval-only``).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import operator
import re
import sys
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from training.errors import UserError, one_line

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists, and no references."""

    ignore_aliases = staticmethod(lambda data: True)


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))
_PAIR = re.compile(r"[A-Za-z_]\w*=")
# Names of options in other training codes, and the names here.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "num_workers": "workers",
    "num_epochs": "epochs",
    "output_dir": "output",
    "drop_rate": "drop",
    "image_size": "img_size",
    "data_path": "root",
    "data_dir": "root",
}


def parse(kind: type[Config], argv: Sequence[str] | None, prog: str) -> Config:
    """Parse arguments into an instance of a dataclass.

    ``--config FILE`` reads YAML; later options override earlier ones.

    Args:
        kind: the dataclass; its docstring is the description in ``--help``.
        argv: the arguments; None: ``sys.argv[1:]``.
        prog: name of the script.

    Raises:
        UserError: states the key, the value and what is valid.
    """
    tokens = _normalise(kind, list(sys.argv[1:] if argv is None else argv))
    files = [token.partition("=")[2] for token in tokens if token.startswith("--config=")]
    files += [after for token, after in itertools.pairwise(tokens) if token == "--config"]
    for path in files:
        _check_mapping(kind, _read_yaml(path), path)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--KEY VALUE ...]",
        description=(kind.__doc__ or "").strip(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file; later options override it")
    parser.add_class_arguments(kind)
    try:
        parsed = vars(parser.instantiate(parser.parse_args(tokens)))
    except Exception as error:
        raise UserError(_explain(kind, str(error))) from error
    config = kind(**{name: value for name, value in parsed.items() if name != "config"})
    check_used(config, {token[2:].partition("=")[0] for token in tokens if token[:2] == "--"})
    return config


def check_used(config: Any, given: Collection[str] = ()) -> None:
    """Raise for an option without effect, by the ``rules`` of the dataclass.

    Args:
        config: the configuration.
        given: options of the command line. Such an option may switch off options of a file without
            an error, as ``--ema.enabled false``.

    Raises:
        UserError: if an option has no effect.
    """
    default = type(config)()
    for rule in getattr(type(config), "rules", ()):
        if rule.used(config):
            continue
        for name in rule.options.split():
            get, under = operator.attrgetter(name), f"{name}."
            if get(config) == get(default):
                continue
            typed = name in given or any(key.startswith(under) for key in given)
            if typed or rule.switch not in given:
                value = f"{get(config)!r:.300}" if not dataclasses.is_dataclass(get(config)) else ""
                switch = yaml.safe_dump(operator.attrgetter(rule.switch)(config)).partition("\n")[0]
                raise UserError(
                    f"{name}: {value} has no effect with {rule.switch}: {switch:.300}; "
                    f"it needs {rule.needs}{rule.note}"
                )


def dump(config: Any) -> str:
    """Return the dataclass ``config`` as YAML, which :func:`parse` reads."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, width=100)


def keys(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of the dataclass ``kind`` with its type, with sections."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found.update(keys(typing.cast(type, hint), f"{prefix}{name}."))
    return found


def _normalise(kind: type, argv: list[Any]) -> list[str]:
    """Check option names, allow dashes in them, complete flags, and read ``key=value`` pairs."""
    valid, tokens = keys(kind), []
    for position, token in enumerate(argv):
        if token is None:  # a pair that an earlier option consumed
            continue
        if not token.startswith("--") or token == "--":
            tokens.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name in ("help", "config", "print_config"):
            tokens.append(f"--{name}{equals}{value}")
            continue
        _check_key(valid, name, "the command line")
        following = argv[position + 1 : position + 2]
        if typing.get_origin(valid.get(name)) is dict:
            after = [] if equals else list(itertools.takewhile(_PAIR.match, argv[position + 1 :]))
            pairs = [pair for part in ([value] if equals else after) for pair in part.split(",")]
            if pairs and all(map(_PAIR.match, pairs)):
                argv[position + 1 : position + 1 + len(after)] = [None] * len(after)
                tokens += [f"--{name}.{pair}" for pair in pairs]
                continue
            _check_spaces(name, value if equals else "".join(following))
        if valid.get(name) is bool and not equals and (not following or following[0][:2] == "--"):
            equals, value = "=", "true"
        tokens.append(f"--{name}{equals}{value}")
    return tokens


def _check_spaces(name: str, text: str) -> None:
    """Raise for ``{depth:6}``, which YAML reads as the key ``depth:6``."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    for key, value in content.items() if isinstance(content, dict) else ():
        if value is None and ":" in str(key):
            first, _, rest = str(key).partition(":")
            raise UserError(
                f"{name}: {text!r} needs a space after the colon of {key!r}: write "
                f"{{{first}: {rest}}}, or {first}={rest} without braces"
            )


def _read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader: tags that build Python objects are errors."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the config file {path!r}: {reason}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path!r} is not valid YAML: {one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config file {path!r} must have `key: value` lines, not {content!r:.60}")
    return content


def _check_mapping(kind: type, content: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raise for the first key of ``content`` that the dataclass ``kind`` does not have."""
    valid = keys(kind, prefix)
    for key, value in content.items():
        _check_key(valid, f"{prefix}{key}", repr(where))
        hint = valid.get(f"{prefix}{key}")
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key}: {value!r} is not valid; expected {describe(hint)}")
            _check_mapping(typing.cast(type, hint), value, where, f"{prefix}{key}.")


def _check_key(valid: dict[str, Any], name: str, where: str) -> None:
    """Raise unless ``name`` is a valid key, or in a free mapping such as model.kwargs."""
    parent = name
    while parent and parent not in valid:
        parent = parent.rpartition(".")[0]
    if parent and (parent == name or typing.get_origin(valid[parent]) is dict):
        return
    section = parent if dataclasses.is_dataclass(valid.get(parent)) else ""
    inside = f"{section}." if section else ""
    siblings = [key for key in valid if key.startswith(inside) and "." not in key[len(inside) :]]
    # A key without its section (`mixup` for `aug.mixup`) is the most likely mistake.
    last = name.rpartition(".")[2]
    last = _OTHER_NAMES.get(last, last)
    near = [key for key in valid if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    place = f" of {section!r}" if section else ""
    raise UserError(
        f"unknown key {name!r} in {where}{hint}; valid keys{place}: {', '.join(siblings)}"
    )


def _explain(kind: type, message: str) -> str:
    """Return a jsonargparse message as one line with key, value and the expected type."""
    message = one_line(message)
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    name = key.group(1) if key else ""
    hint = keys(kind).get(name)
    value = re.search(r"(?:Got value|Given value): (.*)$", message)
    unknown = re.search(r"Option '(\w+)' is not accepted", message)
    if unknown and typing.get_origin(hint) is tuple:
        valid = ", ".join(keys(typing.get_args(hint)[0]))
        return f"unknown key {unknown.group(1)!r} in {name!r}; valid keys: {valid}"
    if hint is None or value is None:
        alone = re.search(r"argument --([\w.]+): expected one argument", message)
        if alone:
            expected = describe(keys(kind).get(alone.group(1), str))
            return f"option --{alone.group(1)} has no value; expected {expected}"
        return message
    return f"{name}: {value.group(1)!r} is not valid; expected {describe(hint)}"


def describe(hint: Any) -> str:
    """Describe the values of a type in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names[type(None)] = "null"
    if hint in names:
        return names[hint]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in inner)
    if origin is list or (origin is tuple and inner[-1] is Ellipsis):
        return f"a list, each {describe(inner[0])}"
    if origin is tuple:
        return "a list of " + " and ".join(describe(part) for part in inner)
    if origin is dict:
        return "a mapping `{key: value}`"
    if dataclasses.is_dataclass(hint):
        fields = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"a mapping with keys out of: {fields}"
    return str(hint)
