"""Ranking: every mask cut from it is the mask of all scores."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import files
from pipeline.errors import ArtifactError, MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import FORMAT, VERSION, Ranking


def scores_of(seed: int, levels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Scores of few levels (many ties), among them zeros."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (20, 10), "a.bias": (20,), "head.weight": (3, 10), "head.bias": (3,), "none": (0,)}
    return {n: (torch.randint(0, levels, s, generator=g) / 7).to(dtype) for n, s in shapes.items()}


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 3, 1000]), st.floats(0.01, 1), st.floats(0, 1), st.booleans())
def test_a_cut_is_the_top_k_of_all_scores(seed: int, levels: int, keep: float, share: float, headed: bool) -> None:
    scores = scores_of(seed, levels, [torch.float32, torch.bfloat16][seed % 2])
    density, always = max(0.005, keep * share), ["head"] if headed else []
    ranking = Ranking.of(scores, keep=keep)
    try:
        expected = Mask.top_k(scores, density, always)
    except ParamsError as refusal:
        with pytest.raises(ParamsError) as same:
            ranking.cut(density, always)
        assert str(same.value) == str(refusal)
    else:
        assert ranking.cut(density, always) == expected


def test_what_it_keeps() -> None:
    scores = scores_of(0, 1000)
    ranking = Ranking.of(scores, keep=0.2, always=["head"], info={"seed": 3})
    assert ranking.mask == Mask.top_k(scores, 0.2) and ranking.nnz == int(0.2 * 253)
    for name, score in scores.items():
        row = ranking.summary[name]
        assert row["count"] == ranking.mask.count(name) == len(ranking.scores[name])
        assert row["sum"] == pytest.approx(float(score.double().sum()))
        assert row["max"] == (float(score.max()) if score.numel() else 0)
        assert ranking.scores[name].equal(score.flatten()[ranking.mask.indices[name]])
    cut = ranking.cut(0.15)
    assert cut.whole("head.weight") and cut.info == {"seed": 3, "density": 0.15, "parent": ranking.digest}
    with pytest.raises(ParamsError, match=r"density 0\.21 is above the 0\.2 that"):
        ranking.cut(0.21)
    with pytest.raises(MismatchError, match="'tail'"):
        Ranking.of(scores, always=["tail"])


def test_double_scores_are_rounded_first() -> None:
    scores = scores_of(0, 1000, torch.float64)
    rounded = {name: score.float() for name, score in scores.items()}
    assert Ranking.of(scores, keep=0.5).cut(0.2) == Mask.top_k(rounded, 0.2)


def test_the_ranking_keeps_its_own_scores() -> None:
    scores = scores_of(0, 1000)
    ranking = Ranking.of(scores, keep=1.0)
    digest, before = ranking.digest, ranking.cut(0.1)
    scores["a.weight"].zero_()
    assert Ranking.of(scores, keep=1.0).digest != digest and ranking.cut(0.1) == before


def test_save_and_load_is_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    ranking = Ranking.of(scores_of(1, 50), keep=0.3, always=["head"], info={"seed": 3})
    assert ranking.save(path) == path.stat().st_size
    again = Ranking.load(path)
    assert (again.digest, again.mask, again.keep) == (ranking.digest, ranking.mask, 0.3)
    assert (again.always, again.summary, again.info) == (["head"], ranking.summary, {"seed": 3})
    assert all(again.scores[n].equal(ranking.scores[n]) for n in ranking.index)
    assert again.cut(0.2) == ranking.cut(0.2)
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_a_sound_file_with_an_unsound_ranking_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    Ranking.of(scores_of(1, 50), keep=0.3).save(path)
    meta, sections = files.read_file(path, format=FORMAT, version=VERSION)
    for changed, parts, why in (
        (meta | {"digest": "0"}, sections, "not the ranking the header names"),
        ({k: v for k, v in meta.items() if k != "keep"}, sections, "keep, always or summary is missing"),
        (meta | {"summary": 3}, sections, "keep, always or summary is missing"),
        (meta, sections | {"scores": sections["scores"][:-1]}, "expected 75 fp32 scores"),
        (meta, sections | {"scores": sections["scores"].double()}, "expected 75 fp32 scores"),
    ):
        files.write_file(path, format=FORMAT, version=VERSION, meta=changed, sections=parts)
        with pytest.raises(ArtifactError, match=why):
            Ranking.load(path)
    Mask.top_k(scores_of(1, 50), 0.3).save(path)
    with pytest.raises(ArtifactError, match="is a fishmask-mask file; expected a fishmask-ranking"):
        Ranking.load(path)
