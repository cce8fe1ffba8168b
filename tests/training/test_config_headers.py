"""Every shipped configuration parses, names its encoding by its string, and says what to expect."""

from pathlib import Path

import pytest
from cls_command import ROOT

import irpe
from training import config
from training.cls.options import ClsConfig
from training.det.options import DetConfig
from training.lm.options import LmConfig

# Kind, and the option of the encoding
SCRIPTS = {"cls": (ClsConfig, "rpe"), "det": (DetConfig, "enc_rpe2d"), "lm": (LmConfig, "encoding")}
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.cases(12)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_says_what_to_expect(path: Path):
    script = path.parent.name
    kind, option = SCRIPTS[script]
    spec = getattr(config.parse(kind, ["--config", str(path)], f"train_{script}.py"), option)
    assert spec is None or str(irpe.parse(spec)) == spec
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("command:", "hardware:", "time:", "expected:", f"configs/{script}/{path.name}"):
        assert word in header, word
