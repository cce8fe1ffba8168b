"""The options of text: sources, windows and scoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class SourceConfig:
    """The embedded standard library of Python, files, or a Hugging Face data set."""

    name: str = "stdlib"
    """stdlib (embedded), files (those of root), hfds/NAME (Hugging Face data set)"""
    root: str | None = None
    """text file, or folder that is read recursively; one tenth is held out, one is for testing;
    questions: SQuAD's JSON file"""
    val_root: str | None = None
    """file or folder to evaluate on; root is then not split"""
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
    """file or folder to test on; root is then not split"""
    extensions: list[str] | None = None
    """suffixes of the files of a folder to read, such as [.txt, .md]; null: all files"""
    test_split: str = "test"
    """split of a Hugging Face data set to test on"""
    column: str = "text"
    """column of a Hugging Face data set with the text"""
    separator: str = "\n\n"
    """text between two documents"""
    tokens: Literal["bytes", "bpe"] = "bytes"
    """bytes: 256 tokens; bpe: byte pairs, trained on the training text"""
    vocab_size: int = 8192
    """number of tokens of the byte pair encoding"""
    tokenizer: str | None = None
    """tokenizer.json of a byte-level encoding to use instead of a new one"""
    folder: str | None = None
    """folder to store byte pairs and tokens of this text for other runs; null: keep them in
    memory"""


@dataclass(kw_only=True)
class StageConfig:
    """One stage of training with windows of one length; their number follows from the budget."""

    length: int
    """tokens of a window"""
    until: float | None = None
    """end of the stage: a fraction of all steps if below 1, else a step; null: the last step"""


@dataclass(kw_only=True)
class SegmentConfig:
    """Windows of segments of a longer text, whose tokens keep their positions."""

    method: Literal["none", "chunk", "prefix", "randompos", "full"] = "none"
    """chunk: 1/alpha chunks in order; prefix: tokens before a scored suffix; randompos: a plain
    window with random positions; full: the long text"""
    long_length: int | None = None
    """tokens of the long text; all positions are less"""
    alpha: float = 0.25
    """length of a chunk, or of the suffix, as a fraction of the window; 1/alpha is an integer"""
    placement: Literal["free", "grid"] = "free"
    """chunks at any position, or at multiples of their length"""
    content: Literal["true", "skip"] = "true"
    """true: the text at the positions; skip: contiguous text with the positions of chunks, as in
    PoSE (chunk only)"""
    prefix: Literal["tokens", "spans"] = "tokens"
    """draw single tokens for the prefix, or spans of the suffix's length"""


@dataclass(kw_only=True)
class ProtocolConfig:
    """A scoring protocol; results of different protocols cannot be compared."""

    kind: Literal["nonoverlapping", "sliding", "token"] = "nonoverlapping"
    """disjoint windows, a window that slides by stride, or one that slides by a token"""
    length: int | None = None
    """tokens of a window; null: the training length"""
    stride: int | None = None
    """tokens that the sliding window advances"""
    memory: bool = False
    """read the text once, in order, with the model's memory"""


@dataclass(kw_only=True)
class ExcerptConfig:
    """Excerpts of files, to classify by package."""

    size: int = 512
    """bytes of an excerpt"""
    min_files: int = 8
    """minimum number of files of a package"""
    per_class: int | None = None
    """maximum number of excerpts of a package in each split; null: all"""


@dataclass(kw_only=True)
class QuestionConfig(SourceConfig):
    """Questions whose answer is a span of their context, as in SQuAD."""

    context: int = 512
    """maximum characters of a context of the embedded text"""
    length: int = 640
    """maximum tokens of an input: question, context and three special tokens"""
    stride: int = 256
    """tokens between the starts of two parts of a long context"""
    longest_question: int = 100
    """maximum tokens of a question; the rest is cut off"""
    longest_answer: int = 80
    """maximum tokens of an answer"""
