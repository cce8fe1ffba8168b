"""YAML and command line into a typed dataclass, with errors of one line.

jsonargparse does the parsing and the validation. Around it: every unknown key is answered with the
nearest valid one and the list of valid keys, dashes may stand for underscores in option names, and
a yes-or-no option may stand alone (``--eval-only``).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from training.errors import UserError, one_line

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


def parse(kind: type[Config], argv: Sequence[str] | None, prog: str) -> Config:
    """Parse ``argv`` (``None``: the process's own) into an instance of the dataclass ``kind``.

    ``--config FILE`` reads YAML; what stands later on the command line wins. The dataclass's
    docstring is the head of ``--help``. Raises :class:`UserError` naming the key, the value and
    what is valid.
    """
    tokens = _normalise(kind, list(sys.argv[1:] if argv is None else argv))
    for path in _config_files(tokens):
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
    return kind(**{name: value for name, value in parsed.items() if name != "config"})


def dump(config: Any) -> str:
    """Return the dataclass ``config`` as YAML that :func:`parse` reads back to an equal one."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, width=100)


def keys(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of the dataclass ``kind`` with its type, sections included."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found.update(keys(typing.cast(type, hint), f"{prefix}{name}."))
    return found


def _normalise(kind: type, argv: list[str]) -> list[str]:
    """Check option names, allow dashes in them, and complete options that stand alone."""
    valid, tokens = keys(kind), []
    for position, token in enumerate(argv):
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
        if valid.get(name) is bool and not equals and (not following or following[0][:2] == "--"):
            equals, value = "=", "true"
        tokens.append(f"--{name}{equals}{value}")
    return tokens


def _config_files(tokens: list[str]) -> list[str]:
    """Return the files that ``--config`` names, in order."""
    files = [token.partition("=")[2] for token in tokens if token.startswith("--config=")]
    files += [after for token, after in itertools.pairwise(tokens) if token == "--config"]
    return files


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
        raise UserError(f"config file {path!r} must hold `key: value` lines, not {content!r:.60}")
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
    """Raise unless ``name`` is a valid key, or lies inside a free mapping such as model.kwargs."""
    parent = name
    while parent:
        if parent in valid:
            if parent == name or typing.get_origin(valid[parent]) is dict:
                return
            break
        parent = parent.rpartition(".")[0]
    section = parent if dataclasses.is_dataclass(valid.get(parent)) else ""
    inside = f"{section}." if section else ""
    siblings = [key for key in valid if key.startswith(inside) and "." not in key[len(inside) :]]
    # A misplaced key (`mixup` for `aug.mixup`) is a nearer miss than any spelling.
    last = name.rpartition(".")[2]
    near = [key for key in valid if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    place = f" of {section!r}" if section else ""
    raise UserError(
        f"unknown key {name!r} in {where}{hint}; valid keys{place}: {', '.join(siblings)}"
    )


def _explain(kind: type, message: str) -> str:
    """Rewrite a jsonargparse message as one line that names key, value and what is expected."""
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
    """Say in words what values a type allows."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    if hint is type(None):
        return "null"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list, each {describe(inner[0])}"
    if origin is tuple:
        return "a list of " + " and ".join(describe(part) for part in inner)
    if origin is list:
        return f"a list, each {describe(inner[0])}"
    if origin is dict:
        return "a mapping `{key: value}`"
    if dataclasses.is_dataclass(hint):
        fields = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"a mapping with keys out of: {fields}"
    return str(hint)
