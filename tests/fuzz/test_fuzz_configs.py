"""Command lines and YAML files of the three scripts: a config that reads back, or UserError."""

import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from fuzz_inputs import LETTERS, examples, mutated
from hypothesis import given
from hypothesis import strategies as st

from training import config
from training.cls.options import ClsConfig
from training.det.options import DetConfig
from training.errors import UserError
from training.lm.options import LmConfig

KINDS = {"cls": ClsConfig, "det": DetConfig, "lm": LmConfig}

words = st.text(alphabet=LETTERS + "[]{}:'\"!&*#%@`|>?~/\\$", max_size=8)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    words,
    mutated(),
    st.sampled_from(["true", "1e-3", "null", "[1, 2]", "{a: 1}", "!!python/name:os.system"]),
    st.dates(),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)


@st.composite
def keys(draw, kind):
    """A key of the config, one like it, or any."""
    key = draw(st.sampled_from(sorted(config.keys(kind))))
    match draw(st.sampled_from(["own"] * 6 + ["near", "any", "deeper"])):
        case "near":
            at = draw(st.integers(0, len(key)))
            return key[:at] + draw(st.sampled_from(LETTERS)) + key[at + 1 :]
        case "any":
            return draw(words)
        case "deeper":
            return f"{key}.{draw(words)}"
    return key


@st.composite
def command_lines(draw, kind):
    tokens = []
    for _ in range(draw(st.integers(1, 3))):
        key, value = draw(keys(kind)), draw(values)
        value = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
        value = value.removesuffix("...\n").strip("\n")
        shape = draw(st.sampled_from(["one", "two", "alone", "stray"]))
        tokens += {
            "one": [f"--{key}={value}"],
            "two": [f"--{key}", value],
            "alone": [f"--{key}"],
            "stray": [value],
        }[shape]
    ends = ("--help", "-h", "--print", "--config")  # which exit, or read another file
    return [token for token in tokens if not token.startswith(ends)]


@st.composite
def files(draw, kind):
    """Text of a YAML file: a mapping by the keys, or nearly one, or anything."""
    content = {}
    for _ in range(draw(st.integers(0, 4))):
        section, *inner = draw(keys(kind)).split(".")
        if inner and isinstance(content.setdefault(section, {}), dict):
            content[section][inner[0]] = draw(values)
        else:
            content[section] = draw(values)
    text = yaml.safe_dump(content, allow_unicode=True)
    match draw(st.sampled_from(["as it is"] * 4 + ["cut", "put", "any"])):
        case "cut":
            return text[: draw(st.integers(0, len(text)))].encode()
        case "put":
            at = draw(st.integers(0, len(text)))
            return (text[:at] + draw(words) + text[at:]).encode(errors="replace")
        case "any":
            return draw(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
    return text.encode()


def same(a, b):
    """Equality in which a NaN is equal to itself."""
    match a, b:
        case dict(), dict():
            return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        case (list() | tuple(), list() | tuple()):
            return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", KINDS)
def test_configs(name):
    kind, outcomes = KINDS[name], Counter()
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name, "a.yaml")

    @examples(15, parts=3)
    @given(command_lines(kind) | st.just([]), files(kind) | st.none())
    def check(argv, content):
        if content is not None:
            file.write_bytes(content)
            argv = [f"--config={file}", *argv]
        try:
            found = config.parse(kind, argv, f"train_{name}.py")
        except UserError as error:
            assert "\n" not in str(error), str(error)
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        file.write_text(config.dump(found), encoding="utf-8")
        again = config.parse(kind, [f"--config={file}"], f"train_{name}.py")
        assert same(asdict(again), asdict(found))

    with folder:
        check()
    assert min(outcomes["read"], outcomes["refused"]) > 0, outcomes
