"""The builtin networks: sizes, seeds, and a head small enough for its budget."""

import pytest
import torch

from pipeline.tasks.resnet import BUILTIN, build


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet-digits", 308_074),
        ("resnet9", 6_573_130),
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("vit", 2_680_906),
    ],
)
def test_sizes_are_the_known_ones(name, parameters):
    """resnet18, 34 and 50: torchvision's count, less the 7x7 stem's extra weights and 990 of 1000 classes.

    vit: 6 layers of 12·192² + 13·192, the stem's (48 + 1)·192, a norm of 2·192, and the head.
    """
    channels = 1 if name == "resnet-digits" else 3
    assert sum(p.numel() for p in build(name, channels, 10, 0).parameters()) == parameters


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnets_count_as_torchvisions_do(name, features):
    import torchvision

    theirs = sum(p.numel() for p in getattr(torchvision.models, name)().parameters())
    ours = sum(p.numel() for p in build(name, 3, 10, 0).parameters())
    assert theirs - 64 * 3 * (49 - 9) - 990 * (features + 1) == ours


def test_resnet50_is_torchvisions_on_the_same_weights():
    """Weights taken over in order, the stem aside: the same features from the first block on."""
    import torchvision

    ours, theirs = build("resnet50", 3, 10, 0), torchvision.models.resnet50().eval()
    mine = [m for m in ours.blocks.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.BatchNorm2d)]
    stages = (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    found = [m for s in stages for m in s.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.BatchNorm2d)]
    convolutions, norms = (
        [[m for m in modules if isinstance(m, kind)] for modules in (mine, found)]
        for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    )
    for a, b in (*zip(*convolutions, strict=True), *zip(*norms, strict=True)):
        a.load_state_dict(b.state_dict())
    x = torch.randn(2, 64, 8, 8)
    expected = x
    for stage in stages:
        expected = stage(expected)
    torch.testing.assert_close(ours.blocks(x), expected, rtol=1e-4, atol=1e-4)


def test_vit_attends_as_torchs_layer_does():
    from pipeline.tasks.vit import Layer

    torch.manual_seed(0)
    ours = Layer(24, 3)
    theirs = torch.nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_": ours.qkv, "self_attn.out_proj.": ours.out, "linear1.": ours.up,
        "linear2.": ours.down, "norm1.": ours.norm1, "norm2.": ours.norm2,
    }  # fmt: skip
    theirs.load_state_dict({
        f"{k}{part}": getattr(m, part) for k, m in pairs.items() for part in ("weight", "bias")
    })
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_vit_knows_where_a_patch_is_and_takes_other_sizes():
    model = build("vit", 3, 10, 0)
    x = torch.randn(2, 3, 32, 32)
    swapped = torch.cat([x[..., 16:], x[..., :16]], dim=3)
    assert not torch.allclose(model(x), model(swapped), atol=1e-4)
    assert model(x[..., :24, :16]).shape == (2, 10)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_seed_decides_the_weights(name):
    one, again, other = (build(name, 3, 10, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert not build(name, 3, 10, 0).training


def test_shapes_and_head():
    for name, size in [("resnet-digits", 8), ("resnet9", 32), ("resnet18", 32), ("resnet50", 32), ("vit", 32)]:
        model = build(name, 3, 7, 0)
        assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
        assert isinstance(model.fc, torch.nn.Linear)
    digits = build("resnet-digits", 1, 10, 0)
    assert sum(p.numel() for p in digits.fc.parameters()) == 1290 < 0.01 * 308_074


def test_signals_keep_their_size_at_the_start():
    """He initialisation: the last block's output varies, neither vanished nor blown up, in train mode."""
    for name in ("resnet-digits", "resnet9", "vit"):
        model = build(name, 3, 10, 0).train()
        outputs = model(torch.randn(64, 3, 32, 32))
        assert 0.05 < outputs.std() < 5
