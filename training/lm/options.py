"""The options of train_lm.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from training.options import (
    OPTIM_RULES,
    SCHEDULE_RULES,
    OptimConfig,
    Rule,
    SchedConfig,
    ScriptConfig,
)
from training.text.options import (
    ExcerptConfig,
    ProtocolConfig,
    QuestionConfig,
    SegmentConfig,
    StageConfig,
    TextConfig,
)


@dataclass(kw_only=True)
class LmModelConfig:
    """The transformer."""

    dim: int = 128
    """channels of a token"""
    depth: int = 4
    """blocks"""
    num_heads: int = 4
    """attention heads, a divisor of dim"""
    mlp_ratio: float = 4.0
    """hidden channels of the MLP, as a multiple of dim"""
    tied: bool = True
    """language: whether output layer and embedding share weights"""
    drop: float = 0.0
    """dropout on embeddings and outputs of attention and MLP"""
    attn_drop: float = 0.0
    """dropout on attention probabilities"""
    act_drop: float = 0.0
    """dropout on the MLP's hidden channels"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""
    pretrained: str | None = None
    """questions: folder of a released BERT (config.json, weights, and vocab.txt or tokenizer.json),
    which sets all sizes; encoding must be the same as in config.json"""


@dataclass(kw_only=True)
class LmConfig(ScriptConfig):
    """Train or evaluate a model of text, with any position encoding."""

    # Tuples, since jsonargparse merges lists of several sources.
    task: Literal["language", "excerpts", "questions"] = "language"
    """language: predict the next token; excerpts: classify texts by their package; questions: find
    the answer in a text"""
    encoding: str | None = "rope"
    """position encoding, such as rope, alibi, t5, shaw,clip=64, huang4,clip=64, sinusoidal,
    learned,length=512 or pia; several as a sum, such as sinusoidal + t5; null: none"""
    attach: str | None = None
    """a further encoding for a model that was trained without it (checkpoint): shaw, huang1 to
    huang4 and t5 do not change outputs until they are trained"""
    backend: str = "auto"
    """backend of the attention: auto, reference, eager, sdpa or triton"""
    epochs: int = 10
    """language: parts of a run, each followed by an evaluation and a checkpoint; else passes over
    the texts"""
    steps_per_epoch: int = 100
    """language: optimiser steps of an epoch"""
    budget: int = 8192
    """language: tokens of a step, in all processes and accumulated batches"""
    stages: tuple[StageConfig, ...] = (StageConfig(length=256),)
    """language: stages of training with different lengths of windows"""
    order: Literal["shuffled", "stripes"] = "shuffled"
    """language: windows in random order, or each row of a batch continues the row before"""
    memory: float = 0.0
    """language: length of the memory from step to step, in windows (1: the tokens of a window);
    needs order: stripes and an encoding in attention"""
    segments: SegmentConfig = field(default_factory=SegmentConfig)
    protocols: tuple[ProtocolConfig, ...] = (ProtocolConfig(),)
    """language: scoring protocols; the first one after each epoch, all of them at the end"""
    eval_tokens: int | None = 65536
    """language: number of tokens of the held-out text to score, from its start; null: all"""
    sample: int = 400
    """language: number of tokens to generate at the end of a run; without a memory, at most the
    rest of a window"""
    temperature: float = 0.8
    """language: temperature of the generated text; 0: always the most likely token"""
    batch_size: int = 32
    """excerpts, questions: texts per optimiser step, in all processes and accumulated batches"""
    eval_batch_size: int = 32
    """windows or texts per forward pass of each process in evaluation; with a memory, the number of
    stripes of the text"""
    split: Literal["validation", "test"] = "validation"
    """language, excerpts: the split to evaluate on"""
    data: TextConfig = field(default_factory=TextConfig)
    excerpts: ExcerptConfig = field(default_factory=ExcerptConfig)
    questions: QuestionConfig = field(default_factory=QuestionConfig)
    model: LmModelConfig = field(default_factory=LmModelConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-3, weight_decay=0.1, clip_grad=1.0)
    )
    sched: SchedConfig = field(default_factory=lambda: SchedConfig(warmup_epochs=1))

    rules = (
        Rule("data.root data.val_root data.test_root data.extensions", "data.name: files", "",
             lambda c: c.data.name != "stdlib" and c.data.name[:5] != "hfds/"),
        Rule("data.train_split data.val_split data.test_split data.column data.kwargs",
             "data.name not stdlib or files", ": use hfds/NAME"),
        Rule("data.vocab_size data.tokenizer", "data.tokens: bpe"),
        Rule("data.vocab_size", "data.tokenizer: null"),
        Rule("backend", "encoding not null", "", lambda c: c.encoding or c.attach),
        Rule("steps_per_epoch budget stages order memory segments protocols eval_tokens sample "
             "temperature model.tied", "task: language"),
        Rule("batch_size", "task: excerpts or questions",
             "; budget is the size of a step of task: language"),
        Rule("excerpts", "task: excerpts"),
        Rule("questions model.pretrained", "task: questions"),
        Rule("questions.root questions.val_root", "questions.name: files", "",
             lambda c: c.questions.name != "stdlib" and c.questions.name[:5] != "hfds/"),
        Rule("questions.train_split questions.val_split questions.kwargs",
             "questions.name not stdlib or files", ": use hfds/NAME"),
        Rule("questions.context", "questions.name: stdlib"),
        Rule("memory", "order: stripes", ", as shuffled windows do not continue one another"),
        Rule("temperature", "sample above 0"),
        Rule("segments.long_length segments.alpha segments.placement segments.content "
             "segments.prefix", "segments.method not none"),
        *SCHEDULE_RULES,
        *OPTIM_RULES,
    )  # fmt: skip
