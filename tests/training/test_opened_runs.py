"""What the scripts write is opened by irpe.load and by the command, without being told anything."""

import timm
from cls_command import TINY
from PIL import Image

import irpe
from irpe.files.read import read_weights
from irpe.tools.command import main
from models.text import CausalLM

K = "rpe-1.9-product-ctx-1-k"


def test_a_classifier(cls, tmp_path, capsys):
    status, _, err = cls("--epochs=1", f"--rpe={K}", "--rpe_where=blocks.1.*", "--data.mean=[0.3]")
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    small = {"img_size": 8, "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 2}
    assert f"--model.kwargs={{{', '.join(f'{k}: {small[k]}' for k in list(small)[2:])}" in TINY[3]
    model = timm.create_model("vit_tiny_patch16_224", **small, num_heads=2, num_classes=10)
    for path in (folder, folder / "checkpoints/last.safetensors"):
        if path == folder:
            assert irpe.load(model, path).attached == {"blocks.1.attn": K}
        else:
            irpe.load(model, path)
        saved = read_weights(path)
        assert all((saved[name] == value).all() for name, value in model.state_dict().items())
    Image.new("RGB", (40, 40), "white").save(tmp_path / "a.png")
    for argv, says in (
        (["attention", folder, tmp_path / "a.png"], f"with {K}, trained weights"),
        (["tables", folder], f": {K}, offsets of a grid of 2x2"),
    ):
        assert main(list(map(str, argv))) == 0, capsys.readouterr().err
        assert says in capsys.readouterr().out
    from irpe.tools.models import opened, prepared

    image, _ = prepared(opened(str(folder))[1], Image.new("RGB", (8, 8), "white"), None)
    assert image.shape == (1, 1, 8, 8)
    assert abs(float(image[0, 0, 0, 0]) - 0.7 / 0.5) < 1e-5  # (1 - mean) / std, as in the run


def test_a_language_model(lm, tmp_path):
    spec = "t5,buckets=8,max=20"
    status, _, err = lm(f"--encoding={spec}", "--epochs=1")
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    saved = read_weights(folder)
    sizes = {"dim": 16, "depth": 2, "num_heads": 2}
    vocab, dim = saved["body.embedding.weight"].shape
    model = CausalLM(vocab, spec, **{**sizes, "dim": dim})
    assert not irpe.load(model, folder).attached
    assert all((saved[name] == value).all() for name, value in model.state_dict().items())
