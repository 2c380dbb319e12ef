"""A small mask that uses every coder."""

import pytest
import torch

from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex


@pytest.fixture(scope="session")
def every_coder() -> Mask:
    """Six tensors: a staircase, a whole one, a uniform choice, a band, two coordinates far apart, none."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "stairs": (30, 40),
        "all": (8,),
        "random": (50, 60),
        "band": (200, 200),
        "far": (9999,),
        "none": (5,),
    }
    rows, columns = torch.rand(30, 1, generator=draw), torch.rand(1, 40, generator=draw)
    coordinates = {
        "stairs": (rows * columns > 0.3).flatten().nonzero().flatten(),
        "random": (torch.rand(3000, generator=draw) < 0.1).nonzero().flatten(),
        "band": torch.ones(200, 200).triu(-2).tril(2).flatten().nonzero().flatten(),
        "far": torch.tensor([5, 9000]),
    }
    return Mask.covering(ParameterIndex(shapes), ["all"], coordinates, {"seed": 1})
