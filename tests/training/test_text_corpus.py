"""Corpora and tokens: what is read, in which order and split, and what is refused."""

import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from common import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import UserError
from training.lm.run import open_text
from training.text.corpus import SPLITS, Document, open_corpus, split_of, standard_library
from training.text.options import TextConfig
from training.text.tokens import ByteTokens, encode, find_pairs, make_tokens, map_stream, read_pairs


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def names(documents) -> list[str]:
    return [document.name for document in documents]


def files(root: Path, **options) -> TextConfig:
    return TextConfig(name="files", root=str(root), **options)


# --- the standard library ------------------------------------------------------------------------


def test_library_leaves_out_tests_and_what_only_some_machines_have(tmp_path, monkeypatch):
    kept = ["abc.py", "json/__init__.py", "json/tool.py", "xml/dom/minidom.py"]
    dropped = [
        "test/test_abc.py", "json/tests/test_tool.py", "idlelib/run.py", "site-packages/a.py",
        "dist-packages/b.py", "json/__pycache__/tool.py", "_sysconfigdata__linux.py",
        "config-3.11-x86_64-linux-gnu/python-config.py", "sitecustomize.py", "readme.txt",
        ".hidden/c.py", "tkinter/__init__.py", "pydoc_data/topics.py",
    ]  # fmt: skip
    write(tmp_path, {name: f"# {name}\r\nx = 1\r\n" for name in kept + dropped})
    write(tmp_path, {"json/empty.py": " \n"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    documents = standard_library()
    assert names(documents) == kept
    assert documents[0].text == "# abc.py\nx = 1\n"  # the same bytes where files are CRLF
    assert [document.package for document in documents] == ["abc", "json", "json", "xml"]


def test_library_of_this_python():
    parts = {split: list(open_corpus(TextConfig(), split)) for split in SPLITS}
    whole = names(standard_library())
    assert whole == sorted(whole)
    assert sorted(name for part in parts.values() for name in names(part)) == whole
    assert "json/decoder.py" in whole
    assert not [name for name in whole if "test" in name.split("/")]
    for split, part in parts.items():
        assert {split_of(name) for name in names(part)} == {split}
        assert all(document.text.strip() for document in part)


def test_split_is_a_fixed_function_of_the_name():
    # It belongs to the corpus and must never move.
    assert {name: split_of(name) for name in FIXED} == FIXED
    drawn = [split_of(f"module{number}.py") for number in range(4000)]
    shares = [drawn.count(split) / 4000 for split in SPLITS]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.02), shares


FIXED = {
    "abc.py": "test",
    "json/decoder.py": "train",
    "_pydecimal.py": "validation",
    "__phello__/spam.py": "test",
}


# --- files ---------------------------------------------------------------------------------------


def test_folder_is_read_in_the_order_of_names_and_split_by_name(tmp_path):
    write(
        tmp_path, {f"{letter}/{number}.txt": f"{number}" for letter in "ba" for number in range(40)}
    )
    write(
        tmp_path,
        {
            "b/41.txt": b"\xef\xbb\xbf41",
            "a/picture.png": b"\x89PNG\0",
            "a/empty.txt": "",
            ".git/x.txt": "no",
        },
    )
    parts = [list(open_corpus(files(tmp_path, extensions=[".txt"]), split)) for split in SPLITS]
    assert [names(part) for part in parts] == [sorted(names(part)) for part in parts]
    together = sorted(name for part in parts for name in names(part))
    expected = [f"{letter}/{number}.txt" for letter in "ab" for number in range(40)]
    assert together == sorted([*expected, "b/41.txt"])
    for document in parts[0] + parts[1] + parts[2]:
        assert document.text == Path(document.name).stem


@given(text=st.text(alphabet="ab\né", min_size=30, max_size=300).filter(str.strip))
def test_single_file_is_cut_without_loss(text, tmp_path_factory):
    root = write(tmp_path_factory.mktemp("cut"), {"a.txt": text})
    parts = [open_corpus(files(root / "a.txt"), split)[0].text for split in SPLITS]
    assert "".join(parts) == text
    assert all(parts)
    assert abs(len(parts[0]) - 0.8 * len(text)) <= 0.05 * len(text) + 1


def test_single_file_is_cut_after_lines(tmp_path):
    path = write(tmp_path, {"a.txt": "line of text\n" * 100}) / "a.txt"
    parts = [open_corpus(files(path), split)[0].text for split in SPLITS]
    assert [len(part) % 13 for part in parts] == [0, 0, 0]


def test_held_out_files_of_their_own(tmp_path):
    write(tmp_path, {"train/a.txt": "train", "val.txt": "val"})
    config = files(tmp_path / "train", val_root=str(tmp_path / "val.txt"))
    assert [document.text for document in open_corpus(config, "train")] == ["train"]
    assert [document.text for document in open_corpus(config, "validation")] == ["val"]
    with pytest.raises(UserError, match="test_root is not set"):
        open_corpus(config, "test")


def test_bad_files(tmp_path, monkeypatch):
    write(tmp_path, {
        "empty.txt": " \n", "zeros.txt": b"text\0text", "latin.txt": "é".encode("latin-1"),
        "mixed/a.txt": "text", "mixed/b.bin": b"\xff\xfe\0", "none/.hidden": "text",
        "one/a.txt": "text", "short.txt": "ab",
    })  # fmt: skip
    cases = [
        (files(tmp_path / "missing"), ["data.root", "missing", "does not exist"]),
        (files(tmp_path / "empty.txt"), ["empty.txt", "is empty"]),
        (files(tmp_path / "zeros.txt"), ["zeros.txt", "not text", "UTF-8"]),
        (files(tmp_path / "latin.txt"), ["latin.txt", "byte 0", "UTF-8"]),
        (files(tmp_path / "mixed"), ["b.bin", "not text", "data.extensions"]),
        (files(tmp_path / "none"), ["none", "no text file"]),
        (files(tmp_path / "mixed", extensions=[".md"]), ["no text file ending in .md"]),
        (files(tmp_path / "one"), ["none of 1 files", "'test'", "data.val_root"]),
        (files(tmp_path / "short.txt"), ["short.txt", "too short to be split"]),
        (files(tmp_path / "one", val_root=str(tmp_path / "gone"), test_root="gone"), ["gone"]),
        (TextConfig(name="files"), ["data.root is not set"]),
        (TextConfig(name="stdlb"), ["'stdlb'", "valid: stdlib, files, hfds/NAME"]),
    ]
    for config, parts in cases:
        refuses(lambda c=config: list(open_corpus(c, "test")), *parts, error=UserError)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(UserError, match="finds no Python files"):
        open_corpus(TextConfig(), "train")


# --- Hugging Face data sets ----------------------------------------------------------------------


class Rows(list):
    """What datasets.load_dataset returns, as far as it is used."""

    @property
    def column_names(self):
        return list(self[0])


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package; return the calls that it got."""
    calls = []

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        if path != "org/wiki":
            raise FileNotFoundError(f"{path} doesn't exist on the Hub")
        return Rows([{"text": f"{split} one"}, {"text": ""}, {"text": "two"}])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub(hub):
    config = TextConfig(name="hfds/org/wiki", kwargs={"name": "raw"}, val_split="train[90%:]")
    documents = open_corpus(config, "validation")
    assert hub == [("org/wiki", "raw", "train[90%:]")]
    for _ in range(2):  # again and again
        assert [document.text for document in documents] == ["train[90%:] one", "", "two"]
    stream = encode(documents, ByteTokens(), "|")
    assert bytes(stream) == b"train[90%:] one||two"


def test_bad_hub(hub, monkeypatch):
    with pytest.raises(UserError, match="cannot open data set 'org/none'.*doesn't exist"):
        open_corpus(TextConfig(name="hfds/org/none"), "train")
    with pytest.raises(UserError, match="no column page; it has text"):
        open_corpus(TextConfig(name="hfds/org/wiki", column="page"), "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_corpus(TextConfig(name="hfds/org/wiki"), "train")


# --- tokens --------------------------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x\n", "naïve café, 東京 \U0001f600\n\n\ttabs", "  spaces  \n"] * 20
DOCUMENTS = [Document(str(number), text) for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def pairs():
    pytest.importorskip("tokenizers")
    return find_pairs(DOCUMENTS, 290)


@given(text=st.text(max_size=50))
def test_bytes_are_reversible(text):
    tokens = ByteTokens()
    ids = tokens.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokens.decode(ids) == text
    assert tokens.byte_counts[ids].sum() == len(text.encode())


@pytest.mark.parametrize("path", [None, "tokens.bin"])
def test_stream_holds_all_documents_with_separators(tmp_path, path):
    tokens = ByteTokens()
    documents = [Document("a", "one"), Document("b", ""), Document("c", "é")]
    target = None if path is None else tmp_path / path
    stream = encode(documents, tokens, "\n", target)
    assert stream.dtype == np.uint8
    assert bytes(stream) == "one\n\né".encode()
    if target is not None:
        assert isinstance(stream, np.memmap)
        assert [file.name for file in tmp_path.iterdir()] == [path]
        assert bytes(map_stream(target, tokens)) == bytes(stream)


@pytest.mark.parametrize("path", [None, "tokens.bin"])
def test_empty_stream(tmp_path, path):
    with pytest.raises(UserError, match="no text|no tokens"):
        encode([Document("a", "")], ByteTokens(), "\n", path and tmp_path / path)


def test_unwritable_stream(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        encode(DOCUMENTS, ByteTokens(), path=tmp_path / "none" / "tokens.bin")


def test_pairs_are_reversible_and_count_bytes(pairs):
    assert pairs.vocab_size == 290
    for text in [*TEXTS[:3], "unseen Ω ÿ \x00\x7f <|endoftext|>", "a\nb" * 50]:
        ids = pairs.encode(text)
        assert pairs.decode(ids) == text
        assert pairs.byte_counts[ids].sum() == len(text.encode())
    assert len(pairs.encode(TEXTS[0])) < len(TEXTS[0])
    assert encode(DOCUMENTS, pairs).dtype == np.uint16


def kept(folder, source, **options):
    """Open a text with a folder; its training tokens, and the text that they stand for."""
    config = TextConfig(name="files", root=str(source), folder=str(folder), **options)
    tokens, (stream,) = open_text(config, Accelerator(cpu=True), "train")
    return tokens, tokens.decode(stream)


def training_part(source):
    return open_corpus(files(source), "train")[0].text


def resize(path, change):
    path.write_bytes(change(path.read_bytes()))


LINES = "a line of text, naïve café\n" * 300
OTHER = "another text altogether\n" * 300


@pytest.mark.parametrize("code", ["bytes", "bpe"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, source: source.write_text(OTHER, encoding="utf-8"),
        lambda folder, source: source.write_text(LINES[:-1] + "!", encoding="utf-8"),
        lambda folder, source: resize(next(folder.glob("*.bin")), lambda x: x[:-2]),
        lambda folder, source: resize(next(folder.glob("*.bin")), lambda x: x + x[:2]),
        lambda folder, source: resize(next(folder.glob("*.bin")), lambda x: b"??" + x[2:]),
        lambda folder, source: next(folder.glob("*.bin")).unlink(),
        lambda folder, source: [p.write_text("{}") for p in folder.glob("bpe-*.json")],
    ],
    ids=["text", "last character", "shorter", "longer", "changed", "gone", "pairs"],
)
def test_a_kept_stream_is_that_of_the_text(damage, code, tmp_path, capsys):
    folder, source = tmp_path / "kept", tmp_path / "t.txt"
    source.write_text(LINES, encoding="utf-8")
    options = {"tokens": code, "vocab_size": 270} if code == "bpe" else {}
    _, text = kept(folder, source, **options)
    assert text == training_part(source)
    assert kept(folder, source, **options)[1] == text
    assert "created again" not in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    damage(folder, source)
    tokens, text = kept(folder, source, **options)
    assert text == training_part(source)
    if {path: path.stat().st_mtime_ns for path in folder.iterdir()} != before:
        assert (
            "created again" in capsys.readouterr().out or damage.__code__.co_names[-1] == "unlink"
        )
    capsys.readouterr()
    assert kept(folder, source, **options)[1] == text
    assert "created again" not in capsys.readouterr().out


def test_a_kept_stream_is_that_of_the_tokenizer(tmp_path, capsys):
    source, own = tmp_path / "t.txt", tmp_path / "tokenizer.json"
    source.write_text("".join(TEXTS) * 9, encoding="utf-8")
    options = {"tokens": "bpe", "tokenizer": str(own)}
    find_pairs(DOCUMENTS, 270).save(own)
    first, text = kept(tmp_path / "kept", source, **options)
    find_pairs([Document("other", LINES)], 270).save(own)
    second, again = kept(tmp_path / "kept", source, **options)
    assert first.vocab_size == second.vocab_size and first.digest != second.digest
    assert text == again
    assert "tokenizer changed" in capsys.readouterr().out


def test_bad_tokenizers(pairs, tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "words.json"))
    lower = tokenizers.Tokenizer.from_str(pairs.tokenizer.to_str())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(tmp_path / "lower.json"))
    write(tmp_path, {"text.json": "text"})
    for name, part in [("words", "byte-level"), ("lower", "byte-level"), ("text", "cannot read"),
                       ("none", "cannot read")]:  # fmt: skip
        with pytest.raises(UserError, match=f"{part}.*") as caught:
            read_pairs(tmp_path / f"{name}.json")
        assert f"{name}.json" in str(caught.value)
    with pytest.raises(UserError, match="vocab_size: 255"):
        find_pairs(DOCUMENTS, 255)


def byte_level(alphabet=True):
    """A tokenizer of the tokenizers package."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=letters
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def changed(change):
    """A tokenizer's JSON with a change, through a file."""
    import json

    layout = json.loads(byte_level().to_str())
    change(layout)
    return json.dumps(layout)


def added(content, **options):
    from tokenizers import AddedToken

    made = byte_level()
    made.add_tokens([AddedToken(content, **options)])
    return made.to_str()


def steps(*kinds):
    own = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return lambda layout: layout.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*kinds, own]}
    )


def cutting(behavior):
    return {"type": "Split", "pattern": {"String": "e"}, "behavior": behavior, "invert": False}


TURNED_OFF = {
    "truncation": lambda made: made.enable_truncation(8),
    "truncation from the left": lambda made: made.enable_truncation(8, stride=2, direction="left"),
    "padding": lambda made: made.enable_padding(length=4096),
    "padding to multiples": lambda made: made.enable_padding(pad_to_multiple_of=64),
    "dropout": lambda made: setattr(made.model, "dropout", 0.5),
}


@pytest.mark.parametrize("name", TURNED_OFF)
def test_what_a_tokenizer_cuts_or_adds_is_turned_off(name, tmp_path):
    made, text = byte_level(), "".join(TEXTS)
    wanted = made.encode(text).ids
    TURNED_OFF[name](made)
    made.save(str(tmp_path / "tokenizer.json"))
    pairs = read_pairs(tmp_path / "tokenizer.json")
    assert pairs.encode(text).tolist() == wanted and pairs.decode(wanted) == text


REFUSED = {
    "no bytes": (lambda: byte_level(alphabet=False).to_str(), "lacks .* of the 256 bytes"),
    "one byte gone": (lambda: changed(lambda x: x["model"]["vocab"].pop("~")), "lacks 1 of"),
    "lstrip": (lambda: added("<m>", lstrip=True), "added tokens"),
    "rstrip": (lambda: added("<m>", rstrip=True), "added tokens"),
    "added byte": (lambda: added("\u00e9"), "added tokens"),
    "prefix": (
        lambda: changed(lambda x: x["pre_tokenizer"].update(add_prefix_space=True)),
        "other characters",
    ),
    "lower": (lambda: changed(lambda x: x.update(normalizer={"type": "Lowercase"})), "Lowercase"),
    "nfc": (lambda: changed(lambda x: x.update(normalizer={"type": "NFC"})), "NFC"),
    "removed": (lambda: changed(steps(cutting("Removed"))), "Split can drop"),
    "blanks": (lambda: changed(steps({"type": "WhitespaceSplit"})), "WhitespaceSplit can drop"),
    "decoder": (lambda: changed(lambda x: x.update(decoder=None)), "other characters"),
    "suffix": (
        lambda: changed(lambda x: x["model"].update(end_of_word_suffix="</w>")),
        "other characters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_loses_text_is_refused(name, tmp_path):
    make, reason = REFUSED[name]
    (tmp_path / "tokenizer.json").write_text(make(), encoding="utf-8")
    with pytest.raises(UserError, match=f"tokenizer.json.*{reason}"):
        read_pairs(tmp_path / "tokenizer.json")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_accepted_tokenizer_returns_the_text(data, tmp_path_factory):
    """Of any settings: refused, or lossless over all of unicode."""
    draw, made = data.draw, byte_level(alphabet=data.draw(st.sampled_from([True, True, False])))
    from tokenizers import AddedToken

    for content in draw(st.lists(st.text(min_size=1, max_size=4), max_size=3)):
        stripped = draw(st.sampled_from([{}, {}, {"lstrip": True}, {"single_word": True}]))
        special = draw(st.booleans())
        made.add_tokens([AddedToken(content, special=special, normalized=not special, **stripped)])
    for name in draw(st.sets(st.sampled_from(sorted(TURNED_OFF)), max_size=3)):
        TURNED_OFF[name](made)
    path = tmp_path_factory.mktemp("drawn") / "tokenizer.json"
    made.save(str(path))
    try:
        pairs = read_pairs(path)
    except UserError:
        return
    for text in draw(st.lists(st.text(), min_size=4, max_size=12)):
        ids = pairs.encode(text)
        assert pairs.decode(ids) == text and pairs.byte_counts[ids].sum() == len(text.encode())


def test_long_words_take_bounded_work():
    """Words of a text without blanks are cut: pairs are found in time linear in its length."""
    text = "ab" * 200_000 + " c\n"
    pairs = find_pairs([Document("long", text)], 300)
    assert pairs.decode(pairs.encode(text)) == text


def test_released_vocabularies_are_not_cut(tmp_path):
    from training.text.answers import read_released

    made = byte_level()
    made.enable_truncation(8)
    made.enable_padding(length=512)
    made.save(str(tmp_path / "tokenizer.json"))
    text = "".join(TEXTS)
    ids, spans = read_released(tmp_path).encode(text)
    assert ids.tolist() == byte_level().encode(text).ids and spans[-1, 1] == len(text)


def test_pairs_without_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        make_tokens(TextConfig(tokens="bpe"), DOCUMENTS)
    assert make_tokens(TextConfig(), []).vocab_size == 256


# --- options -------------------------------------------------------------------------------------
