"""`fishmask compose` and `fishmask export`: files in, files out, one line or JSON; bad options refused."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline import cli
from pipeline.deltas.algebra import add, dare, ties
from pipeline.deltas.delta import Delta
from pipeline.masks.mask import Mask


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 5)


@pytest.fixture
def files(base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The base as a file, and two deltas of it."""
    monkeypatch.chdir(tmp_path)
    save_file(dict(base.state_dict()), "base.safetensors")
    for name, seed in (("a.delta", 1), ("b.delta", 2)):
        draw = torch.Generator().manual_seed(seed)
        mask = Mask.from_bool({"weight": torch.rand(5, 6, generator=draw) < 0.5, "bias": torch.zeros(5).bool()})
        trained = copy.deepcopy(base)
        with torch.no_grad():
            at = mask.indices["weight"]
            trained.weight.view(-1)[at] += torch.randn(at.numel(), generator=draw)
        Delta.of(trained, mask, base=base).save(name)
    return ["a.delta", "b.delta", "--base", "base.safetensors", "-o", "out.delta"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process.

    Returns:
        A function from arguments to (exit code, stdout, stderr).
    """

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["fishmask", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((), lambda d, b: add(d, b)),
        (("--weight", 0.5), lambda d, b: add(d, b, [0.5, 0.5])),
        (("--weight", 1, "--weight", -1), lambda d, b: add(d, b, [1.0, -1.0])),
        (("--method", "ties", "--density", 0.5), lambda d, b: ties(d, b, density=0.5)),
        (("--method", "dare", "--drop", 0.5, "--seed", 3), lambda d, b: dare(d, b, drop=0.5, seed=3)),
    ],
)
def test_compose_writes_what_the_algebra_gives(options, wanted, files: list[str], run, base: nn.Module) -> None:
    code, out, err = run("compose", *files, *options, "--json")
    assert code == 0, err
    made = Delta.load("out.delta")
    assert made == wanted([Delta.load(name) for name in files[:2]], base)
    facts = json.loads(out)
    assert facts["delta"] == made.digest and facts["bytes"] == Path("out.delta").stat().st_size
    assert facts["parents"] == [Delta.load(name).digest for name in files[:2]]


def test_a_thin_composition_is_smaller_and_the_same_delta(files: list[str], run, base: nn.Module) -> None:
    large = nn.Linear(60, 50)
    save_file(dict(large.state_dict()), "base.safetensors")
    for seed, name in enumerate(files[:2]):
        draw = torch.Generator().manual_seed(seed)
        mask = Mask.from_bool({"weight": torch.rand(50, 60, generator=draw) < 0.5, "bias": torch.zeros(50).bool()})
        trained = copy.deepcopy(large)
        with torch.no_grad():
            trained.weight.view(-1)[mask.indices["weight"]] *= 1.0001
        Delta.of(trained, mask, base=large).save(name)
    assert run("compose", *files)[0] == 0
    plain, size = Delta.load("out.delta"), Path("out.delta").stat().st_size
    assert run("compose", *files, "--thin", "--force")[0] == 0
    thin = Delta.load("out.delta")
    assert thin.thin is not None and thin == plain and Path("out.delta").stat().st_size < 0.8 * size
    assert all(torch.equal(thin.resolve(large).values[name], v) for name, v in plain.values.items())


def test_the_report_counts_conflicts(files: list[str], run, base: nn.Module) -> None:
    code, out, _ = run("compose", *files, "--report")
    one, two = (Delta.load(name) for name in files[:2])
    shared = (one.mask & two.mask).nnz
    assert code == 0 and out.startswith("out.delta: add of 2 deltas") and "conflicts" in out
    assert f" {shared} " in out.splitlines()[5]
    _, out, _ = run("compose", *files, "--report", "--json", "--force")
    (pair,) = json.loads(out)["overlap"]["pairs"]
    assert pair["shared"] == shared and 0 <= pair["conflicts"] <= shared


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (("--method", "mean"), 2, "--method mean: expected one of add, ties, dare"),
        (("--density", 0.5), 2, "--density: is no option of --method add"),
        (("--method", "ties", "--seed", 1), 2, "--seed: is no option of --method ties"),
        (("--weight", 1, "--weight", 2, "--weight", 3), 2, "expected 2 finite numbers"),
        (("--buffers", "mean"), 2, "--buffers mean: expected equal, base or"),
        (("--head", 7), 2, "head=7"),
        (("-o", "a.delta", "--force"), 2, "is a.delta, which is read; write elsewhere"),
        (("--base", "missing.safetensors"), 4, "missing.safetensors: no such file"),
        (("--base", "a.delta"), 4, "is a fishmask artifact"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(options, code, named: str, files: list[str], run) -> None:
    before = {path: path.read_bytes() for path in Path().iterdir()}
    found, out, err = run("compose", *files, *options)
    assert (found, out) == (code, "") and named in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_export_says_what_it_wrote_and_refuses_unknown_formats(files: list[str], run) -> None:
    arguments = ("export", "a.delta", "--base", "base.safetensors", "-o", "out")
    code, out, _ = run(*arguments, "--to", "vllm", "--json")
    assert code == 0 and json.loads(out)["bytes"] == Path("out").stat().st_size
    code, _, err = run(*arguments, "--to", "vllm")
    assert code == 2 and "exists; add --force" in err
    code, _, err = run(*arguments, "--to", "onnx")
    assert code == 2 and "--to onnx: expected one of dense, peft, git-theta, vllm" in err
