"""The search of learning rates: which rates it tries, and that the reported split stays unread."""

import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.params import Params
from pipeline.workspace import Cell, Workspace
from stages.tune_lr import best_rate, grid, next_rate, tune


def search(score, start):
    tried = {}
    while (rate := next_rate(tried, start)) is not None:
        tried[rate] = score(rate)
        assert len(tried) < 40
    return tried


@given(st.floats(-5, 0), st.floats(-5, 0))
def test_the_search_climbs_to_the_best_rate_of_the_grid(start, peak):
    tried = search(lambda rate: -abs(math.log10(rate) - peak), 10**start)
    best = best_rate(tried)
    near = [grid(10**peak, move) for move in (-1, 0, 1)]
    assert best in near
    for move in (1, -1):
        assert grid(best, move) in tried or tried[grid(best, -move)] == tried[best]


def test_on_a_plateau_the_search_ends():
    assert set(search(lambda _: 0.5, 1e-3)) == {1e-3, 2e-3, 5e-4}


def test_a_diverged_rate_is_never_the_best_and_a_tie_goes_to_the_lower():
    assert best_rate({1e-3: 0.8, 1e-2: -math.inf}) == 1e-3
    assert best_rate({2e-3: 0.8, 1e-3: 0.8}) == 1e-3


def test_the_grid_has_three_rates_a_decade():
    assert [grid(1e-3, move) for move in range(-2, 3)] == [2e-4, 5e-4, 1e-3, 2e-3, 5e-3]


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    from stages import fetch
    from stages.runner import Stage

    root = tmp_path / "project"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    workspace = Workspace.here()
    fetch.run(Stage(Cell("fetch", "reviews"), Params.load(root / "params.yaml"), workspace, track=False))
    return workspace


def test_the_reported_split_is_never_read_and_only_rates_change(project):
    (project.root / "artifacts" / "fetch" / "reviews" / "validation.parquet").unlink()
    file = project.root / "params.yaml"
    before = file.read_text()
    best = tune(project, Params.load(file), "reviews", ["fish"], 1, write=True)
    after = Params.load(file)
    assert after.methods["fish"].lr["reviews"] == best["fish"]
    assert Params.load(file, {"methods.fish.lr.reviews": 0.01}) == Params.load(
        project.root / "params.yaml", {"methods.fish.lr.reviews": 0.01}
    )
    changed = [line for line in file.read_text().splitlines() if line not in before.splitlines()]
    assert all("fish: {lr:" in line for line in changed)
    assert len(file.read_text().splitlines()) == len(before.splitlines())
