"""A run that finds answers in texts, from its configuration to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from training import run
from training.curves import ANSWERS
from training.engine import make_accelerator, per_process_batch
from training.errors import UserError
from training.lm.answer import Answer
from training.lm.model import build_span_finder, encoding_name, released_config, specs
from training.lm.options import LmConfig
from training.optim import make_optimizer
from training.runfolder import RunFolder
from training.text.answers import Marked, make_readings, mark, read_released
from training.text.corpus import open_corpus
from training.text.questions import open_questions
from training.text.tokens import make_tokens


def evaluate(config: LmConfig) -> dict[str, float]:
    """Evaluate ``config.checkpoint``, print and return its figures."""
    if config.checkpoint is None:
        raise UserError("eval_only needs checkpoint: FILE")
    _check(config)
    accelerator = make_accelerator(config.run)
    code = _code(config)
    task = _task(config, accelerator, code, training=False)
    model = build_span_finder(config, code.vocab_size).to(accelerator.device)
    (figures,) = task.evaluate([model])
    if accelerator.is_main_process:
        print(_verdict(figures))
    return figures


def train(config: LmConfig) -> dict[str, Any]:
    """Train, leave a run folder, and return the last epoch's record."""
    _check(config)
    accelerator = make_accelerator(config.run)
    code = _code(config)
    task = _task(config, accelerator, code, training=True)
    model = build_span_finder(config, code.vocab_size).to(accelerator.device)

    def finish(task: Answer, folder: RunFolder | None, model: nn.Module) -> None:
        answers = task.answers(model)
        if folder is not None:
            # In the form that SQuAD's own script reads.
            folder.write_json("predictions.json", answers)

    spec = encoding_name(config)
    return run.train(
        config,
        accelerator,
        model,
        lambda model: make_optimizer(model, config.optim, config.batch_size),
        lambda say: task,
        name=f"questions-{spec}-seed{config.seed}",
        spec=None,
        steps=run.steps_per_epoch(
            len(task), config.grad_accum_steps, config.batch_size, len(task.train), "texts"
        ),
        best="f1",
        unit="texts",
        clip_grad=config.optim.clip_grad,
        about={"model": "span finder", "encoding": spec},
        advice="a lower optim.lr or run.precision: fp32 may help",
        line=_line,
        panels=ANSWERS,
        verdict=_verdict,
        finish=finish,
    )


def _check(config: LmConfig) -> None:
    run.check_numbers(config)
    if config.eval_batch_size < 1:
        raise UserError(f"eval_batch_size: {config.eval_batch_size} is not at least 1")
    specs(config)
    if config.model.pretrained is not None:
        released_config(Path(config.model.pretrained))


def _code(config: LmConfig) -> Marked:
    """Return the code of texts: that of a released model, or our own."""
    if config.model.pretrained is not None:
        return read_released(Path(config.model.pretrained))
    documents = () if config.data.tokens == "bytes" else open_corpus(config.data, "train")
    return mark(make_tokens(config.data, documents))


def _task(config: LmConfig, accelerator: Accelerator, code: Marked, *, training: bool) -> Answer:
    options = config.questions
    held = list(open_questions(options, "validation"))
    readings = make_readings(open_questions(options, "train"), code, options) if training else []
    return Answer(
        accelerator,
        readings,
        make_readings(held, code, options),
        held,
        padding=code.padding,
        batch_size=per_process_batch(accelerator, config.batch_size, config.grad_accum_steps),
        eval_batch_size=config.eval_batch_size,
        longest=options.longest_answer,
        seed=config.seed,
    )


def _verdict(figures: dict[str, Any]) -> str:
    prefix = "ema_" if "ema_f1" in figures else ""
    exact, overlap = (100 * figures[f"{prefix}{name}"] for name in ("exact", "f1"))
    return f"held-out exact match {exact:.2f}, F1 {overlap:.2f} ({figures['count']} questions)"


def _line(record: dict[str, Any], epochs: int) -> str:
    parts = [
        f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}",
        f"train loss {record['train_loss']:.3f}, both ends {100 * record['train_both_ends']:.1f} %",
    ]
    if "f1" in record:
        parts.append(
            f"held out loss {record['loss']:.3f}, exact {100 * record['exact']:.1f}, "
            f"F1 {100 * record['f1']:.1f}"
        )
    if "ema_f1" in record:
        parts.append(f"averaged weights {100 * record['ema_f1']:.1f}")
    return "  |  ".join(parts)
