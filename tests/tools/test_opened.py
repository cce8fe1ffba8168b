"""The commands open run folders and files of irpe.save by themselves."""

import pytest
import timm
import torch
from hosting import fill
from PIL import Image

import irpe
from irpe.tools.command import main

K = "rpe-1.9-product-ctx-1-k"
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}


@pytest.fixture
def saved(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    irpe.attach(model, K)
    irpe.save(fill(model), tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    picture = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "a.png")
    return tmp_path


def run(capsys, *argv):
    status = main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_file_of_irpe_save(saved, capsys):
    status, out, err = run(capsys, "attention", saved / "a.safetensors", saved / "a.png")
    assert status == 0, err
    assert f"vit_tiny_patch16_224 with {K}, trained weights" in out and "4x4 patches" in out
    assert "layer 3, the query's attention" in out and "encoding adds" in out
    status, out, err = run(
        capsys, "attention", saved / "a.safetensors", saved / "a.png", "--size", "96x64"
    )
    assert status == 0 and "6x4 patches" in out, err
    status, out, err = run(capsys, "tables", saved / "a.safetensors")
    assert status == 0 and out.startswith(
        f"{saved / 'a.safetensors'}: {K}, offsets of a grid of 4x4"
    )


def test_a_checkpoint_needs_neither_spec_nor_classes(saved, capsys):
    words = ["attention", "vit_tiny_patch16_224", saved / "a.png", "--size", 64]
    words += ["--checkpoint", saved / "a.safetensors"]
    kwargs = ["--model-kwargs", "embed_dim=32", "depth=3", "num_heads=2"]
    status, out, err = run(capsys, *words, *kwargs)
    assert status == 0 and f"with {K}, trained" in out, err
    status, out, err = run(capsys, *words)
    assert status == 2 and "--model-kwargs" in err and err.count("\n") == 1
    status, out, err = run(capsys, "attention", saved / "a.pth", saved / "a.png")
    assert status == 2 and "does not contain the architecture" in err and "--checkpoint" in err
    status, out, err = run(
        capsys, "attention", saved / "a.safetensors", saved / "a.png", "--rpe", K
    )
    assert status == 2 and "leave --rpe out" in err


def test_tables_of_several_encodings(tmp_path, capsys):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    bias = "rpe-2.0-product-bias-0-k"
    irpe.attach(model, {"blocks.0.*": f"rope-axial + {K}", "blocks.1.*": bias})
    irpe.save(fill(model), tmp_path / "a.safetensors")
    status, out, err = run(capsys, "tables", tmp_path / "a.safetensors")
    assert status == 0 and f"{K}, {bias}, offsets" in out, err
    irpe.detach(model)
    irpe.attach(model, "rope-axial")
    irpe.save(model, tmp_path / "a.safetensors")
    status, out, err = run(capsys, "tables", tmp_path / "a.safetensors")
    assert status == 2 and "encodings are rope-axial: none is an image encoding" in err


def test_cost_takes_model_arguments_and_names_what_is_uncounted(capsys):
    words = ["cost", "vit_tiny_patch16_224", "--size", 64]
    words += ["--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "global_pool=avg"]
    status, out, err = run(capsys, *words, "--rpe", K)
    assert status == 0 and "are not counted" not in out, err
    status, out, err = run(capsys, *words, "--rpe", f"rope-axial + {K}")
    assert status == 0 and "multiply-adds of rope-axial are not counted" in out, err
    with pytest.raises(SystemExit):
        run(capsys, *words, "no")
    assert "'no' is not KEY=VALUE" in capsys.readouterr().err
