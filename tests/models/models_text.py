"""Small language models for the tests, one for each encoding, tables drawn at random."""

import torch

from models.text import CausalLM

F64 = torch.float64
V = 19
IN_ATTENTION = [
    None,
    "rope",
    "rope,layout=half,fraction=0.5",
    "alibi",
    "t5,buckets=8,max=20",
    "shaw,clip=3",
    "shaw,clip=3,on=kv,shared=0",
    "huang1,clip=3",
    "huang2,clip=3",
    "huang3,clip=3",
    "huang4,clip=3",
    "pia",
]
AT_INPUT = ["sinusoidal", "learned,length=64"]
# Frequencies depend on the longest text of a batch.
BY_LENGTH = [
    "rope,scaling=dynamic,factor=4,original=8",
    "rope,scaling=longrope,attention_factor=1.1,original=8,short_factor=1:1:1:1,"
    "long_factor=1:2:3:4",
]
SPECS = [*IN_ATTENTION, *AT_INPUT]


def model(spec, seed=0, **options):
    """Two blocks of two heads in float64."""
    torch.manual_seed(seed)
    options = {"dim": 16, "depth": 2, "num_heads": 2, **options}
    made = CausalLM(V, spec, **options).double()
    for name, parameter in made.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(parameter)
    return made.eval()


def tokens(batch=3, length=21, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (batch, length), generator=generator)
