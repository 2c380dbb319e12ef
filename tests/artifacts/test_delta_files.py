"""Commands take a delta file, or the folder that holds it."""

import pytest
import torch
from typer.testing import CliRunner

from pipeline.artifacts.delta_files import delta_file
from pipeline.cli import app
from pipeline.deltas.delta import Delta
from pipeline.errors import ArtifactError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.tasks.saved import load_model

INFO = {"kind": "image", "outputs": 10, "seed": 0, "channels": 1, "model": "builtin:resnet-digits"}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "mine"
    folder.mkdir()
    base = load_model("builtin:resnet-digits", info=INFO)
    mask = Mask(ParameterIndex.of(base), {"fc.bias": torch.arange(10)})
    trained = load_model("builtin:resnet-digits", info=INFO)
    with torch.no_grad():
        trained.fc.bias += 1
    Delta.of(trained, mask, base=base, info=INFO).save(folder / "delta.safetensors")
    return folder


def test_a_folder_stands_for_its_delta(tuned, tmp_path):
    assert delta_file(tuned) == tuned / "delta.safetensors"
    assert delta_file(tuned / "delta.safetensors") == tuned / "delta.safetensors"
    assert delta_file(tmp_path / "nothing") == tmp_path / "nothing"  # what it is, its reader says
    with pytest.raises(ArtifactError, match="is a folder without delta.safetensors; name a delta file"):
        delta_file(tmp_path)


def test_commands_take_the_folder(tuned, tmp_path):
    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    digest = Delta.load(tuned / "delta.safetensors").digest
    assert digest in run("inspect", tuned, "--json")
    assert digest in run("apply", tuned, "--base", "builtin:resnet-digits", "--out", tmp_path / "model", "--json")
    trained = tmp_path / "model" / "model.safetensors"
    back = tmp_path / "base.safetensors"
    assert digest in run("revert", tuned, trained, "--base", "builtin:resnet-digits", "--out", back, "--json")
    patch = tmp_path / "patch.safetensors"
    assert digest in run("export", tuned, "--base", "builtin:resnet-digits", "--to", "vllm", "-o", patch, "--json")
    both = tmp_path / "both.safetensors"
    run("compose", tuned, tuned, "--base", "builtin:resnet-digits", "--head", "0", "--out", both, "--json")
    assert both.is_file()
