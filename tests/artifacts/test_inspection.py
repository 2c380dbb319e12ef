"""Inspection: what it says of masks, rankings and deltas is what they hold, whatever the terminal."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from pipeline import cli
from pipeline.artifacts import inspection
from pipeline.deltas.chain import Chain
from pipeline.deltas.delta import Delta
from pipeline.errors import ArtifactError, MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking

INFO = {
    "task": "words", "model": "package:x", "kind": "label", "power": "square", "examples": 1024, "seed": 3,
    "data": "d" * 64, "base": "b" * 64, "parent": "p" * 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mask, a ranking, and the delta of a network with buffers with and without its base."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifacts")
    blocks = [nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20)) for _ in range(12)]
    base = nn.Sequential()
    base.add_module("layers", nn.ModuleList(blocks))
    base.add_module("classifier", nn.Linear(20, 2))
    trained = copy.deepcopy(base)
    scores = {name: torch.rand(p.shape) for name, p in base.named_parameters()}
    mask = Mask.top_k(scores, 0.1, ["classifier"], info=INFO)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.view(-1)[mask.indices[name]] += torch.randn(mask.count(name))
    info = {"kind": "text", "method": "fish", "seed": 3, "data": "d" * 64, "parent": "p" * 64, "mask": INFO}
    mask.save(folder / "mask.safetensors")
    Ranking.of(scores, 0.2, ["classifier"], INFO).save(folder / "ranking.safetensors")
    Delta.of(trained, mask, base=base, info=info).save(folder / "delta.safetensors")
    Delta.of(trained, mask, base=base, keep_base=True, info=info).save(folder / "whole.safetensors")
    save_file(base.state_dict(), folder / "base.safetensors")
    save_file(trained.state_dict(), folder / "trained.safetensors")
    return folder


@pytest.mark.parametrize("name", ["mask", "ranking", "delta", "whole"])
def test_counts_and_bytes_sum_to_the_file(folder, name):
    facts = inspection.describe(folder / f"{name}.safetensors")
    artifact = inspection.load(folder / f"{name}.safetensors")
    mask = artifact if isinstance(artifact, Mask) else artifact.mask
    assert facts["digest"] == artifact.digest
    assert facts["bytes"] == sum(facts["sizes"].values()) == (folder / f"{name}.safetensors").stat().st_size
    assert facts["ratio"] == facts["dense_bytes"] / facts["bytes"]
    assert {row["name"]: row["count"] for row in facts["layers"]} == {n: mask.count(n) for n in mask.index}
    assert sum(row["size"] for row in facts["layers"]) == facts["parameters"]
    for row in facts["layers"]:
        assert row["density"] == row["count"] / row["size"]
        assert row["bytes"] == (None if name == "mask" else 4 * row["count"])
    assert (facts["sizes"]["values"] > 0) == (name != "mask")
    assert (facts["sizes"]["buffers"] > 0) == (name in ("delta", "whole"))


def test_the_dense_model_counts_its_buffers(folder):
    facts = inspection.describe(folder / "delta.safetensors")
    held = Delta.load(folder / "delta.safetensors")
    parameters = sum(4 * row["size"] for row in facts["layers"])
    buffers = sum(b.numel() * b.element_size() for b in held.buffers.values())
    assert facts["dense_bytes"] == parameters + buffers and buffers > 0


def test_the_change_is_the_same_from_kept_values_and_from_the_base(folder):
    kept = inspection.describe(folder / "whole.safetensors")["layers"]
    against = inspection.describe(folder / "delta.safetensors", str(folder / "base.safetensors"))["layers"]
    unknown = inspection.describe(folder / "delta.safetensors")["layers"]
    norms = Delta.load(folder / "whole.safetensors").norms()
    assert [row["norm"] for row in kept] == [row["norm"] for row in against]
    assert {row["name"]: row["norm"] for row in kept if row["count"]} == norms
    assert all(row["norm"] is None for row in unknown)


def test_a_thin_delta_is_described_without_its_base_and_measured_with_it(tmp_path):
    torch.manual_seed(0)
    base = nn.Linear(128, 128)
    trained = copy.deepcopy(base)
    mask = Mask.top_k({name: torch.rand(p.shape) for name, p in base.named_parameters()}, 0.5)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.view(-1)[mask.indices[name]] *= 1 + 1e-4
    delta = Delta.of(trained, mask, base=base, keep_base=True)
    Delta.of(trained, mask, base=base).save(tmp_path / "thin.safetensors", base=base)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    assert Delta.load(tmp_path / "thin.safetensors").thin is not None
    facts = inspection.describe(tmp_path / "thin.safetensors")
    assert facts["digest"] == delta.digest and all(row["norm"] is None for row in facts["layers"])
    measured = inspection.describe(tmp_path / "thin.safetensors", str(tmp_path / "base.safetensors"))
    assert {row["name"]: row["norm"] for row in measured["layers"]} == delta.norms()


def test_a_chain_is_described_step_by_step(tmp_path, run):
    torch.manual_seed(0)
    model = nn.Linear(40, 10)
    chain = Chain.create(tmp_path / "chain", model)
    masks = [Mask.top_k({n: torch.rand(p.shape) for n, p in model.named_parameters()}, d) for d in (0.1, 0.2)]
    for mask in masks:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.view(-1)[mask.indices[name]] += 1
        chain.append(model, mask)
    facts = json.loads(run(tmp_path / "chain", "--json"))
    assert [(row["step"], row["count"]) for row in facts["steps"]] == [(1, masks[0].nnz), (2, masks[1].nnz)]
    files = sum(file.stat().st_size for file in (tmp_path / "chain").glob("*.safetensors"))
    assert facts["bytes"] == files and facts["ratio"] == facts["dense_bytes"] / files
    assert sum(row["bytes"] for row in facts["steps"]) == facts["steps_bytes"] < files
    assert all(sum(row["sizes"].values()) == row["bytes"] for row in facts["steps"])
    for options in ((), ("--json",)):  # one description, whichever command is asked
        listed = CliRunner().invoke(cli.app, ["checkpoint", "list", str(tmp_path / "chain"), *options])
        assert run(tmp_path / "chain", *options, columns=200) == listed.stdout


def test_a_base_that_is_not_the_deltas_is_refused(folder):
    with pytest.raises(MismatchError):
        inspection.describe(folder / "delta.safetensors", str(folder / "trained.safetensors"))
    with pytest.raises(ParamsError, match="--base"):
        inspection.describe(folder / "mask.safetensors", str(folder / "base.safetensors"))


@pytest.mark.parametrize("name", ["mask", "ranking", "delta"])
def test_provenance_has_one_name_for_each_thing(folder, name):
    facts = inspection.describe(folder / f"{name}.safetensors")
    found = facts["provenance"]
    common = {key: INFO[key] for key in ("data", "seed", "kind", "power", "examples", "task", "model", "parent")}
    assert {key: found[key] for key in common} == common
    base = Delta.load(folder / "delta.safetensors").base if name == "delta" else INFO["base"]
    assert found["base"] == base


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``fishmask inspect``.

    Returns:
        A function from arguments to the output.
    """

    def run(*arguments, columns=None):
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["fishmask", "inspect", *map(str, arguments)])
        cli.app(prog_name="fishmask", standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["mask", "ranking", "whole"])
def test_the_terminal_shows_a_deep_model_layer_by_layer(folder, run, name):
    text = run(folder / f"{name}.safetensors", "--depth", 2, columns=90)
    facts = inspection.describe(folder / f"{name}.safetensors")
    head, table = text.split("\n\n")
    assert facts["digest"] in head and "label, square, 1,024 examples" in head
    assert f"{facts['coordinates']:,} of {facts['parameters']:,}" in head
    assert f"header {facts['sizes']['header']:,}" in head
    rows = table.splitlines()[1:]
    assert [row.split()[0] for row in rows[:12]] == [f"layers.{i}" for i in range(12)]
    assert all(len(line) <= 90 for line in table.splitlines()) and "█" in table
    assert ("change" in table) == (name == "whole")


def test_a_pipe_gets_whole_names_and_no_escapes(folder, run):
    text = run(folder / "delta.safetensors", "--depth", 9)
    assert "\x1b" not in text and "…" not in text
    assert all(f"\n{name} " in text for name, count in chosen(folder).items() if count)


def chosen(folder):
    mask = Mask.load(folder / "mask.safetensors")
    return {name: mask.count(name) for name in mask.index}


def test_json_has_tensors_and_groups_where_asked(folder, run):
    facts = json.loads(run(folder / "delta.safetensors", "--json"))
    assert {row["name"]: row["count"] for row in facts["layers"]} == {n: c for n, c in chosen(folder).items() if c}
    assert "groups" not in facts
    facts = json.loads(run(folder / "delta.safetensors", "--json", "--depth", 1))
    assert [row["name"] for row in facts["groups"]] == ["layers", "classifier"]
    assert sum(row["count"] for row in facts["groups"]) == facts["coordinates"]


def test_what_is_none_of_these_is_refused(folder):
    with pytest.raises(ArtifactError, match="not one written by fishmask"):
        inspection.describe(folder / "base.safetensors")
