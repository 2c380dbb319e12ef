"""The builtin networks: sizes, seeds, and a head small enough for its budget."""

import pytest
import torch

from pipeline.tasks.resnet import BUILTIN, build


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet-digits", 308_074), ("resnet9", 6_573_130), ("resnet18", 11_173_962), ("resnet34", 21_282_122)],
)
def test_sizes_are_the_known_ones(name, parameters):
    """resnet18 and resnet34: torchvision's count, less the 7x7 stem's extra weights and 990 of 1000 classes."""
    channels = 1 if name == "resnet-digits" else 3
    assert sum(p.numel() for p in build(name, channels, 10, 0).parameters()) == parameters


def test_resnet18_counts_as_torchvision_does():
    from torchvision.models import resnet18

    theirs = sum(p.numel() for p in resnet18().parameters())
    assert theirs - 64 * 3 * (49 - 9) - 990 * 513 == 11_173_962


@pytest.mark.parametrize("name", BUILTIN)
def test_a_seed_decides_the_weights(name):
    one, again, other = (build(name, 3, 10, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert not build(name, 3, 10, 0).training


def test_shapes_and_head():
    for name, size in [("resnet-digits", 8), ("resnet9", 32), ("resnet18", 32)]:
        model = build(name, 3, 7, 0)
        assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
        assert isinstance(model.fc, torch.nn.Linear)
    digits = build("resnet-digits", 1, 10, 0)
    assert sum(p.numel() for p in digits.fc.parameters()) == 1290 < 0.01 * 308_074


def test_signals_keep_their_size_at_the_start():
    """He initialisation: the last block's output varies, neither vanished nor blown up, in train mode."""
    for name in ("resnet-digits", "resnet9"):
        model = build(name, 3, 10, 0).train()
        outputs = model(torch.randn(64, 3, 32, 32))
        assert 0.05 < outputs.std() < 5
