"""Every shipped text config parses, builds and plans; the recipes are the published ones."""

from pathlib import Path

import pytest
import torch
from cls_command import ROOT

import irpe
from training import config
from training.lm import run as lm_run
from training.lm.language import tokens_of
from training.lm.model import build_classifier, build_language_model, build_span_finder
from training.lm.options import LmConfig
from training.text.answers import Marked, make_readings
from training.text.staged import TextPlan

CONFIGS = sorted((ROOT / "configs" / "lm").glob("*.yaml"))
WIKITEXT = {  # published perplexity on WikiText-103's test set; windows, and steps of the stages
    "wikitext103_baseline": ("19.40", [3072], [286_000]),
    "wikitext103_staged": ("17.56", [128, 3072], [70_050, 286_000]),
    "wikitext103_pia": ("18.55", [512], [286_000]),
    "wikitext103_shortformer": ("18.15", [128, 512], [140_100, 286_000]),
}
HERE = {"stdlib", "lengths", "staged", "shortformer", "segments", "excerpts_512", "excerpts_2048"}


def load(path: Path) -> LmConfig:
    return config.parse(LmConfig, ["--config", str(path)], "train_lm.py")


def test_all_are_here():
    assert {path.stem for path in CONFIGS} == {*HERE, "questions", "squad_huang4", *WIKITEXT}


@pytest.mark.cases(3)
@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_config_builds(path: Path):
    """Options that go together, plans for a text of a million tokens, and the model."""
    settings = load(path)
    settings.model.pretrained = None
    with torch.device("meta"):
        if settings.task == "language":
            lm_run._check(settings)
            model = build_language_model(settings, 256)
        elif settings.task == "excerpts":
            model = build_classifier(settings, [str(n) for n in range(30)])
        else:
            make_readings([], Marked(), settings.questions)
            model = build_span_finder(settings, 259)
    assert sum(p.numel() for p in model.parameters()) > 50_000
    if settings.task != "language":
        return
    plan = TextPlan(10**6 if settings.data.name == "stdlib" else 10**8, settings)
    plan.check_shards(1 if settings.data.name == "stdlib" else 8)
    for protocol in settings.protocols:
        assert protocol.kind != "sliding" or protocol.stride is not None


def test_the_embedded_runs_are_of_stages_and_segments_as_they_say():
    got = load(ROOT / "configs/lm/staged.yaml")
    plan = TextPlan(10**6, got)
    assert plan.lengths == (128, 2048) and plan.ends == (180, 300)
    got = load(ROOT / "configs/lm/segments.yaml")
    plan = TextPlan(10**6, got)
    assert plan.lengths == (128,) and plan.spans == (512,) and got.segments.alpha == 0.25
    got = load(ROOT / "configs/lm/shortformer.yaml")
    assert got.order == "stripes" and tokens_of(got.memory, 128) == 128
    sizes = [load(ROOT / f"configs/lm/excerpts_{size}.yaml").excerpts for size in (512, 2048)]
    assert len({excerpts.size * excerpts.per_class for excerpts in sizes}) == 1


@pytest.mark.parametrize("name", WIKITEXT)
def test_published_recipe(name: str):
    perplexity, lengths, ends = WIKITEXT[name]
    path = ROOT / "configs" / "lm" / f"{name}.yaml"
    text = " ".join(path.read_text().replace("#", " ").split())
    assert f"test perplexity {perplexity}" in text and "not measured by us" in text
    got = load(path)
    plan = TextPlan(10**8, got)
    assert (list(plan.lengths), list(plan.ends)) == (lengths, ends)
    # Windows of a GPU, from the paper's table of batch sizes.
    sizes = {128: 72, 512: 18, 3072: 3}
    assert [plan.batch_size(stage) // 8 for stage in range(len(ends))] == [
        sizes[length] for length in lengths
    ]
    assert (got.model.dim, got.model.depth, got.model.num_heads) == (1024, 16, 8)
    assert (got.model.drop, got.model.attn_drop, got.model.act_drop) == (0.3, 0.1, 0.1)
    assert (got.optim.opt, got.optim.lr, got.optim.momentum) == ("sgd", 1.0, 0.99)
    assert (got.optim.clip_grad, got.optim.weight_decay) == (0.1, 0.0)
    assert got.sched.warmup_epochs * got.steps_per_epoch == 16_000
    memory = name in ("wikitext103_pia", "wikitext103_shortformer")
    assert (got.encoding == "pia") == memory == bool(got.memory)
    with torch.device("meta"):
        model = build_language_model(got, 32_768)
    blocks = 16 * (12 * 1024**2 + 13 * 1024) + 2 * 1024
    assert sum(p.numel() for p in model.parameters()) == blocks + 32_768 * 1024


def test_squad_is_the_published_recipe():
    got = load(ROOT / "configs/lm/squad_huang4.yaml")
    assert (got.batch_size, got.epochs, got.optim.lr) == (48, 2, 3e-5)
    assert (got.questions.length, got.questions.stride) == (512, 128)
    assert str(irpe.parse(got.encoding)) == "huang4,clip=511"
    # The rate falls to nothing in a straight line.
    from training.optim import make_optimizer, make_schedule

    optimizer = make_optimizer(torch.nn.Linear(2, 2), got.optim, got.batch_size)
    schedule, epochs = make_schedule(optimizer, got.sched, got.epochs, 50)
    rates = []
    for step in range(epochs * 50):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    wanted = [3e-5 * (1 - step / 100) for step in range(100)]
    assert rates == pytest.approx(wanted, rel=1e-6)
