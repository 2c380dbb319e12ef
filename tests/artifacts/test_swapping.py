"""`fishmask swap`: every variant of a base, bit for bit; what does not belong to it is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from pipeline import cli
from pipeline.artifacts import swapping
from pipeline.deltas.delta import Delta
from pipeline.deltas.variants import Variants
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import digest_of_digests, tensor_digest
from pipeline.tasks.saved import load_model
from tests.artifacts.test_application import INFO, tune, write_base

pytestmark = pytest.mark.usefixtures("one_thread")


def variant(base: nn.Module, seed: int) -> tuple[nn.Module, Mask]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.load_state_dict(base.state_dict())
    return model, tune(model, seed, whole=("2",) if seed == 2 else ())


@pytest.fixture(params=[False, True], ids=["whole", "thin"])
def family(tmp_path, request):
    """A base's file and three deltas of it; the states that they stand for."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    states = {}
    for seed in (1, 2, 3):
        model, mask = variant(base, seed)
        file = tmp_path / f"{seed}.delta"
        Delta.of(model, mask, base=base).save(file, base=base if request.param else None)
        states[str(file)] = model.state_dict()
    return tmp_path / "base.safetensors", states


def state_digest(state):
    return digest_of_digests({name: tensor_digest(tensor) for name, tensor in state.items()})


def test_every_variant_is_the_trained_model(family):
    base, states = family
    done = CliRunner().invoke(cli.app, ["swap", *states, "--base", str(base), "--rounds", "3", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert {row["file"]: row["state"] for row in facts["variants"]} == {
        name: state_digest(state) for name, state in states.items()
    }
    assert facts["state"] == state_digest(load_file(base))
    assert facts["swaps"] == 16 and facts["dense_bytes"] == sum(t.nbytes for t in load_file(base).values())
    for row in facts["variants"]:
        assert 0 < row["swap_ms"]["least"] <= row["swap_ms"]["median"] <= row["swap_ms"]["most"]
    done = CliRunner().invoke(cli.app, ["swap", *states, "--base", str(base), "--rounds", "1"])
    assert done.exit_code == 0 and "8 swaps; every variant and, in the end, the base again" in done.stdout


def test_a_swap_that_is_not_exact_is_an_error(family, monkeypatch):
    base, states = family
    exact = Variants.use

    def inexact(self, name):
        model = exact(self, name)
        if name and name.endswith("2.delta"):
            model["0.weight"][0, 0] += 1
        return model

    monkeypatch.setattr(Variants, "use", inexact)
    with pytest.raises(MismatchError, match=r"2\.delta: swap 0 did not give it back bit for bit"):
        swapping.rehearse([*states], str(base), rounds=1)


def test_others_are_refused(family, tmp_path):
    base, states = family
    files = list(states)
    with pytest.raises(ParamsError, match="named twice"):
        swapping.rehearse([files[0], files[0]], str(base))
    other = load_file(base)
    other["0.weight"][0, 0] += 1
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match=r"delta '.*1\.delta': .*tensor '0\.weight' differs"):
        swapping.rehearse(files, str(tmp_path / "other.safetensors"))
    del other["2.weight"]
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match=r"lacks tensor '2\.weight'"):
        swapping.rehearse(files, str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_heads_that_the_base_lacks_are_swapped_too(tmp_path, layout, dtype):
    source = write_base(tmp_path / "base", layout, dtype)
    files = []
    for seed in (1, 2):
        model, base = (load_model(str(source), info=INFO).to(dtype) for _ in range(2))
        mask = tune(model, seed)
        files.append(tmp_path / f"{seed}.delta")
        Delta.of(model, mask, base=base, info=INFO).save(files[-1], base=base)
    facts = swapping.rehearse(files, str(source), rounds=2)
    assert [row["delta"] for row in facts["variants"]] == [Delta.load(file).digest for file in files]
