"""The options of text: where it comes from, how it is cut into batches and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class SourceConfig:
    """The embedded standard library of Python, files, or a Hugging Face data set."""

    name: str = "stdlib"
    """stdlib (embedded), files (those of root), hfds/NAME (Hugging Face data set)"""
    root: str | None = None
    """text file, or folder that is searched through; a tenth each is held out and for testing.
    questions: SQuAD's JSON file"""
    val_root: str | None = None
    """file or folder to evaluate on; root then is not split"""
    train_split: str = "train"
    """split of a Hugging Face data set to train on"""
    val_split: str = "validation"
    """split of a Hugging Face data set to evaluate on"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of datasets.load_dataset, such as {name: wikitext-103-raw-v1}"""


@dataclass(kw_only=True)
class TextConfig(SourceConfig):
    """The text."""

    test_root: str | None = None
    """file or folder to test on; root then is not split"""
    extensions: list[str] | None = None
    """ends of the names of a folder's files to read, such as [.txt, .md]; null: all files"""
    test_split: str = "test"
    """split of a Hugging Face data set to test on"""
    column: str = "text"
    """column of a Hugging Face data set that holds the text"""
    separator: str = "\n\n"
    """text between two documents"""
    tokens: Literal["bytes", "bpe"] = "bytes"
    """bytes: 256 tokens; bpe: byte pairs, found in the training text"""
    vocab_size: int = 8192
    """tokens of the byte pair encoding"""
    tokenizer: str | None = None
    """tokenizer.json of a byte-level encoding to use instead of a new one"""
    folder: str | None = None
    """folder of this text where byte pairs and tokens are kept for other runs; null: they are
    made for this run, in memory"""


@dataclass(kw_only=True)
class StageConfig:
    """One stage of training: windows of one length, as many a step as the budget allows."""

    length: int
    """tokens of a window"""
    until: float | None = None
    """where the stage ends: below 1 a share of all steps, from 1 on a step; null: at the end"""


@dataclass(kw_only=True)
class SegmentConfig:
    """Windows made of segments of a longer text, whose tokens keep their positions."""

    method: Literal["none", "chunk", "prefix", "randompos", "full"] = "none"
    """chunk: 1/alpha pieces in order; prefix: tokens before a scored suffix; randompos: a plain
    window with positions drawn at random; full: the long text itself"""
    long_length: int | None = None
    """tokens of the long text; all positions lie below it"""
    alpha: float = 0.25
    """share of the window that one chunk, or the suffix, takes; 1/alpha is a whole number"""
    placement: Literal["free", "grid"] = "free"
    """chunks anywhere, or on multiples of their length"""
    content: Literal["true", "skip"] = "true"
    """true: the text that stands at the positions; skip: adjoining text with the positions of
    chunks, as PoSE does (chunk only)"""
    prefix: Literal["tokens", "spans"] = "tokens"
    """draw the prefix token by token, or in spans as long as the suffix"""


@dataclass(kw_only=True)
class ProtocolConfig:
    """How a text is scored; results of different protocols cannot be compared."""

    kind: Literal["nonoverlapping", "sliding", "token"] = "nonoverlapping"
    """disjoint windows, a window that slides by stride, or one that slides by a token"""
    length: int | None = None
    """tokens of a window; null: that of training"""
    stride: int | None = None
    """tokens that the sliding window advances"""
    memory: bool = False
    """read the text once, in order, and hand the model its own memory of what came before"""


@dataclass(kw_only=True)
class ExcerptConfig:
    """Excerpts of files: which package is this from?"""

    size: int = 512
    """bytes of an excerpt"""
    min_files: int = 8
    """a package with fewer files is left out"""
    per_class: int | None = None
    """excerpts of a package in each split, at most; null: all"""


@dataclass(kw_only=True)
class QuestionConfig(SourceConfig):
    """Questions whose answer is a span of their context, as in SQuAD."""

    context: int = 512
    """characters of a context made from the embedded text, at most"""
    length: int = 640
    """tokens that the model reads at once: question, context and three marks"""
    stride: int = 256
    """tokens from one part of a context that is longer to the next"""
    longest_question: int = 100
    """tokens that are kept of a question"""
    longest_answer: int = 80
    """tokens of an answer, at most"""
