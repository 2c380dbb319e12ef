"""Scores of a task: heads averaged exactly, a warmed head put back, the selection applied."""

import pytest
import torch

from pipeline.errors import ParamsError
from pipeline.fisher import fisher_diagonal
from pipeline.masks.ranking import Ranking
from pipeline.masks.selection import selected
from pipeline.schema import ScoreParams
from pipeline.tasks.scoring import _NEXT_HEAD, raw_scores, scores_for
from pipeline.training.methods import mask_for

HOW = {"kind": "label", "power": "square"}


def test_heads_are_averaged(make, folder):
    task = make(folder)
    batches = task.examples(20, 8, seed=1)
    three = raw_scores(task, task.model(1), batches, seed=1, heads=3, **HOW)
    each = [fisher_diagonal(task.model(1 + h * _NEXT_HEAD), batches) for h in range(3)]
    for name, score in three.items():
        torch.testing.assert_close(score, sum(e[name] for e in each) / 3)
    assert not torch.equal(each[0]["bert.pooler.dense.weight"], each[1]["bert.pooler.dense.weight"])


def test_a_warmed_head_changes_the_scores_and_leaves_the_model_as_it_was(make, folder):
    task = make(folder)
    model, batches = task.model(0), task.examples(40, 8, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    fresh = raw_scores(task, model, batches, seed=0, **HOW)
    warm = raw_scores(task, model, batches, seed=0, warm_head=3, head=["classifier"], **HOW)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert not torch.allclose(fresh["bert.pooler.dense.weight"], warm["bert.pooler.dense.weight"], rtol=1e-3)
    again = raw_scores(task, model, batches, seed=0, warm_head=3, head=["classifier"], **HOW)
    assert all(torch.equal(warm[name], again[name]) for name in warm)


def test_scores_are_selected_and_methods_without_scores_get_none(make, folder):
    task = make(folder)
    how = ScoreParams(examples=[20], batch_size=8, selection="per-layer", exclude=["bert.pooler"]).how()
    scores = scores_for("fish", task, task.model(0), examples=20, seed=0, head=["classifier"], **how)
    raw = fisher_diagonal(task.model(0), task.examples(20, 8, seed=0))
    for name, score in selected(raw, "per-layer", ["bert.pooler"]).items():
        assert torch.equal(score, scores[name])
    assert scores_for("random", task, task.model(0), examples=20, seed=0, **how) is None


def test_a_density_beyond_the_candidates_is_refused(make, folder):
    task = make(folder)
    model = task.model(0)
    raw = fisher_diagonal(model, task.examples(20, 8, seed=0))
    info = {"exclude": ["bert.embeddings", "bert.encoder"]}
    ranking = Ranking.of(selected(raw, exclude=info["exclude"]), 0.9, ["classifier"], info)
    mask = mask_for("fish", model, density=0.05, head=["classifier"], seed=0, ranking=ranking)
    assert mask.nnz == sum(mask.count(n) for n in mask.index if "pooler" in n or "classifier" in n)
    with pytest.raises(ParamsError, match="more coordinates than lie outside score.exclude"):
        mask_for("fish", model, density=0.5, head=["classifier"], seed=0, ranking=ranking)


def test_variants_override_what_they_name():
    score = ScoreParams(
        examples=[20], batch_size=8, warm_head=2,
        variants={"global": {"selection": "global", "warm_head": 0}, "expect": {"kind": "expect"}},
    )  # fmt: skip
    assert score.variant("") is score
    assert (score.variant("global").warm_head, score.variant("global").kind) == (0, "label")
    assert (score.variant("expect").warm_head, score.variant("expect").kind) == (2, "expect")
    with pytest.raises(ParamsError, match=r"score\.variants: unknown 'globl'; did you mean 'global'"):
        score.variant("globl")
    assert set(score.how(fresh=False)) == {"kind", "power", "selection", "exclude", "batch_size"}
