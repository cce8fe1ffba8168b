"""Options that have no effect with the others raise, in all three scripts."""

from pathlib import Path

import pytest

from training import config
from training.cls.options import ClsConfig
from training.det.options import DetConfig
from training.errors import UserError
from training.lm.options import LmConfig

CLS, DET, LM = ClsConfig, DetConfig, LmConfig
UNUSED = [
    # script, arguments, the option without effect and the one that decides
    (CLS, ["--data.root=/some/where"], ["data.root: '/some/where'", "data.name: digits", "folder"]),
    (CLS, ["--data.val_split=test"], ["data.val_split: 'test'", "data.name: digits"]),
    (CLS, ["--data.class_map=a.txt"], ["data.class_map: 'a.txt'", "data.name: digits"]),
    (CLS, ["--data.kwargs.a=1"], ["data.kwargs", "data.name: digits"]),
    (CLS, ["--data.name=folder", "--data.download"], ["data.download", "data.name: folder"]),
    (CLS, ["--rpe_where=blocks.0"], ["rpe_where: 'blocks.0'", "rpe: null"]),
    (CLS, ["--aug.mixup_prob=0.5"], ["aug.mixup_prob: 0.5", "aug.mixup: 0.0"]),
    (CLS, ["--aug.aa=v0", "--aug.color_jitter=0.1"], ["aug.color_jitter: 0.1", "aug.aa: v0"]),
    (CLS, ["--optim.lr=0.1", "--optim.lr_base=0.2"], ["optim.lr_base: 0.2", "optim.lr: 0.1"]),
    (CLS, ["--ema.decay=0.9"], ["ema.decay: 0.9", "ema.enabled: false"]),
    (CLS, ["--eval-only", "--resume=auto"], ["resume: 'auto'", "eval_only: true"]),
    (CLS, ["--model.pretrained", "--checkpoint=a"], ["model.pretrained", "checkpoint: a"]),
    (DET, ["--coco_path=/some/where"], ["coco_path: '/some/where'", "data.name: digits", "coco"]),
    (DET, ["--data.val_images=a"], ["data.val_images: 'a'", "data.name: digits"]),
    (DET, ["--data.name=coco", "--data.root=a"], ["data.root: 'a'", "data.name: coco"]),
    (DET, ["--sched.sched=cosine", "--lr_drop=3"], ["lr_drop: 3", "sched.sched: cosine"]),
    (DET, ["--sched.decay_epochs=3"], ["sched.decay_epochs: 3", "lr_drop: 200"]),
    (LM, ["--data.root=a"], ["data.root: 'a'", "data.name: stdlib", "files"]),
    (LM, ["--data.vocab_size=99"], ["data.vocab_size: 99", "data.tokens: bytes", "bpe"]),
    (LM, ["--batch_size=8"], ["batch_size: 8", "task: language", "budget"]),
    (LM, ["--task=questions", "--budget=8"], ["budget: 8", "task: questions"]),
    (LM, ["--questions.length=8"], ["questions", "task: language"]),
    (LM, ["--encoding=null", "--backend=triton"], ["backend: 'triton'", "encoding: null"]),
]


@pytest.mark.parametrize(("kind", "given", "parts"), UNUSED, ids=[" ".join(x[1]) for x in UNUSED])
def test_an_option_without_effect_raises(kind: type, given: list[str], parts: list[str]):
    with pytest.raises(UserError, match="has no effect with") as caught:
        config.parse(kind, given, "x")
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def test_the_command_line_may_switch_off_what_a_file_sets(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("rpe: rope\nrpe_where: blocks.0\nema: {enabled: true, decay: 0.9}\n")
    given = ["--config", str(file), "--rpe=null", "--ema.enabled=false"]
    assert config.parse(CLS, given, "x").rpe is None
    with pytest.raises(UserError, match="rpe_where"):
        config.parse(CLS, [*given, "--rpe_where=blocks.1"], "x")
    file.write_text("data: {root: here}\n")  # the file contradicts itself
    with pytest.raises(UserError, match=r"data\.root"):
        config.parse(CLS, ["--config", str(file)], "x")
