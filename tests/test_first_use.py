"""A name of irpe's that is first used while a graph is made."""

import subprocess
import sys

import pytest

CODE = """
import sys, torch, irpe

@torch.compile(fullgraph=True, backend="aot_eager")
def compiled(x):
    return irpe.attention(x, x, x)

class Model(torch.nn.Module):
    def forward(self, x):
        return irpe.attention(x, x, x)

assert "irpe.functional" not in sys.modules
x = torch.randn(1, 2, 5, 4, requires_grad=True)
if sys.argv[1] == "compile":
    compiled(x).sum().backward()
    assert torch.allclose(compiled(x), irpe.attention(x, x, x))
else:
    made = torch.export.export(Model(), (x,), strict=True).module()
    assert torch.allclose(made(x), irpe.attention(x, x, x))
assert "irpe.functional" in sys.modules
"""


@pytest.mark.cases(1)
@pytest.mark.parametrize("way", ["compile", "strict"])
def test_first_use_in_a_graph(way):
    run = [sys.executable, "-c", CODE, way]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
