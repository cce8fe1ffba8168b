"""A run of a language model from its configuration to its folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

import irpe
from models.text import CausalLM, generate
from training import run
from training.curves import LANGUAGE
from training.engine import make_accelerator
from training.errors import UserError
from training.lm.data import open_text
from training.lm.language import Held, Language, tokens_of
from training.lm.model import build_language_model, encoding_name, specs
from training.lm.options import LmConfig
from training.optim import make_optimizer
from training.runfolder import RunFolder
from training.seeding import derive
from training.text.protocols import Score
from training.text.staged import TextPlan
from training.text.tokens import Tokens


def evaluate(config: LmConfig) -> list[dict[str, Any]]:
    """Score ``config.checkpoint`` under every protocol; print and return the figures."""
    if config.checkpoint is None:
        raise UserError("eval_only needs checkpoint: FILE")
    _check(config)
    accelerator = make_accelerator(config.run)
    tokens, (stream,) = open_text(config.data, accelerator, config.split)
    held = _held(config, accelerator, tokens, stream, config.stages[-1].length)
    model = build_language_model(config, tokens.vocab_size).to(accelerator.device)
    scores = [held.score(model, plan) for plan in held.plans]
    if accelerator.is_main_process:
        print(table(scores))
    return [score.record() for score in scores]


def train(config: LmConfig) -> dict[str, Any]:
    """Train, leave a run folder, and return the last epoch's record."""
    _check(config)
    accelerator = make_accelerator(config.run)
    tokens, (stream, held_out) = open_text(config.data, accelerator, "train", config.split)
    plan = make_plan(config, len(stream))
    plan.check_shards(accelerator.num_processes * config.grad_accum_steps)
    held = _held(config, accelerator, tokens, held_out, plan.lengths[-1])
    _check_positions(config, max(plan.spans), *(scoring.length for scoring in held.plans))
    model = build_language_model(config, tokens.vocab_size).to(accelerator.device)

    def task_of(say: Any) -> Language:
        say(f"{len(stream):,} tokens to train on, {len(held_out):,} held out")
        return Language(
            accelerator,
            plan,
            stream,
            held,
            steps_per_epoch=config.steps_per_epoch,
            accumulate=config.grad_accum_steps,
            memory=config.memory,
        )

    def finish(task: Language, folder: RunFolder | None, model: nn.Module) -> None:
        scores = [held.score(model, plan) for plan in held.plans]  # type: ignore[arg-type]
        if folder is None:
            return
        folder.write_json("scores.json", [score.record() for score in scores])
        print(table(scores))
        if config.sample:
            text = sample(config, model, tokens, held_out, accelerator)  # type: ignore[arg-type]
            folder.write_text("sample.txt", text + "\n")
            print(f"a sample, after {PROMPT} tokens of held-out text:\n{text}\n")

    spec = encoding_name(config)
    return run.train(
        config,
        accelerator,
        model,
        lambda model: make_optimizer(model, config.optim, config.batch_size),
        task_of,
        name=f"lm-{spec}-seed{config.seed}",
        spec=None,
        steps=config.steps_per_epoch,
        best="bits_per_byte",
        lower=True,
        unit="tokens",
        clip_grad=config.optim.clip_grad,
        about={"model": "lm", "encoding": spec},
        advice="a lower optim.lr, a longer sched.warmup_epochs, optim.clip_grad: 1.0 or "
        "run.precision: fp32 may help",
        line=_line,
        panels=LANGUAGE,
        verdict=_verdict,
        finish=finish,
    )


def make_plan(config: LmConfig, tokens: int) -> TextPlan:
    """Return the plan of all steps on a stream of so many tokens."""
    return TextPlan(
        tokens,
        budget=config.budget,
        steps=config.epochs * config.steps_per_epoch,
        stages=config.stages,
        seed=config.seed,
        order=config.order,
        segments=config.segments,
    )


PROMPT = 64


def sample(
    config: LmConfig,
    model: CausalLM,
    tokens: Tokens,
    stream: np.ndarray,
    accelerator: Accelerator,
) -> str:
    """Return the beginning of a text, and how the model goes on, token by token."""
    length = config.stages[-1].length
    prompt = stream[: min(PROMPT, length // 2 or 1)].astype(np.int64)
    state, count = None, config.sample
    if config.memory:
        state = model.memory(length, tokens_of(config.memory, length))
    else:
        count = min(count, length - len(prompt))
    training = model.training
    model.eval()
    with accelerator.autocast():
        ids = generate(
            model,
            torch.from_numpy(prompt)[None].to(accelerator.device),
            count,
            temperature=config.temperature,
            state=state,
            generator=torch.Generator().manual_seed(derive(config.seed, "sample")),
        )
    model.train(training)
    return tokens.decode([*prompt.tolist(), *ids[0].tolist()])


def table(scores: list[Score]) -> str:
    """A line for each protocol."""
    width = max(len(score.protocol) for score in scores)
    return "\n".join(
        f"{score.protocol:{width}}  {score.bits_per_byte:.4f} bits per byte, "
        f"perplexity {score.perplexity:.2f} ({score.tokens:,} tokens)"
        for score in scores
    )


def _check(config: LmConfig) -> None:
    """Raise for what does not go together, before any text is read."""
    run.check_numbers(config)
    for name in ("steps_per_epoch", "budget", "eval_batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} is not at least 1")
    for name in ("memory", "sample", "temperature"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}: {getattr(config, name)} is negative")
    if config.eval_tokens is not None and config.eval_tokens < 1:
        raise UserError(f"eval_tokens: {config.eval_tokens} is not at least 1")
    if config.model.pretrained is not None:
        raise UserError("model.pretrained goes with task: questions, not language")
    if config.optim.lr is None:
        raise UserError("optim.lr is not set, and a language model needs it, such as 2.0e-3")
    if not config.protocols:
        raise UserError("protocols: at least one is needed, such as {kind: nonoverlapping}")
    if not config.stages:
        raise UserError("stages: at least one is needed, such as {length: 256}")
    if config.memory and config.order != "stripes":
        raise UserError(
            f"memory: {config.memory:g} needs order: stripes; in shuffled windows nothing goes on"
        )
    remembers = config.memory or any(protocol.memory for protocol in config.protocols)
    at_input = [str(spec) for spec in specs(config) if spec.at_input]
    if remembers and at_input:
        raise UserError(
            f"memory needs an encoding that acts in attention, as pia or rope; {at_input[0]} is "
            "added at the input, and what layers remember would keep its old positions"
        )


def _check_positions(config: LmConfig, *lengths: int) -> None:
    """Raise for a table of positions that is shorter than a window, before hours of training."""
    for spec in specs(config):
        rows = getattr(spec, "to", None) or getattr(spec, "length", None)
        if rows is not None and rows < max(lengths):
            raise irpe.IrpeError(
                f"{spec} has {rows} rows, but windows have up to {max(lengths)} positions: "
                f"a longer table, or stretch=left,to={max(lengths)}, would do"
            )


def _held(
    config: LmConfig, accelerator: Accelerator, tokens: Tokens, stream: np.ndarray, length: int
) -> Held:
    longest = max(protocol.length or length for protocol in config.protocols)
    kept = len(stream) if config.eval_tokens is None else config.eval_tokens + 1
    if kept <= longest < len(stream):
        raise UserError(f"eval_tokens: {config.eval_tokens} are less than a window of {longest}")
    return Held(
        accelerator,
        stream[:kept],
        tokens.byte_counts,
        config.protocols,
        length=length,
        batch_size=config.eval_batch_size,
        memory=config.memory or 1.0,
    )


def _verdict(figures: dict[str, Any]) -> str:
    prefix = "ema_" if "ema_bits_per_byte" in figures else ""
    return (
        f"held-out {figures[f'{prefix}bits_per_byte']:.4f} bits per byte "
        f"({figures['protocol']}, {figures['tokens']:,} tokens)"
    )


def _line(record: dict[str, Any], epochs: int) -> str:
    parts = [
        f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}, step {record['step']}",
        f"train loss {record['train_loss']:.3f}",
    ]
    if "bits_per_byte" in record:
        parts.append(f"held out {record['bits_per_byte']:.4f} bits per byte ({record['protocol']})")
    if "ema_bits_per_byte" in record:
        parts.append(f"averaged weights {record['ema_bits_per_byte']:.4f}")
    return "  |  ".join(parts)
