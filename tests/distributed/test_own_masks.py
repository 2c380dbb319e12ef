"""Masks of the workers' own: disjoint, of exactly k coordinates, dealt out of the ranking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.distributed.own_masks import interleaved, random_scores
from pipeline.errors import ParamsError
from pipeline.masks.budget import budget
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex

SHAPES = {"a.weight": (7, 5), "b": (11,), "fc.weight": (2, 3), "fc.bias": (2,), "c": (4, 4, 2)}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), workers=st.integers(1, 4), ties=st.booleans())
def test_together_they_are_the_top_of_the_ranking(seed, workers, ties):
    scores = random_scores(ParameterIndex(SHAPES), seed)
    if ties:
        scores = {name: (score * 3).floor() for name, score in scores.items()}
    density = 0.2
    masks = [interleaved(scores, density, workers, rank, ["fc"]) for rank in range(workers)]
    head, k = 8, budget(density, 86)
    assert all(mask.nnz == k for mask in masks)
    union = masks[0]
    for mask in masks[1:]:
        assert (union & mask).nnz == head  # nothing but the head is shared
        union = union | mask
    assert union == Mask.top_k(scores, (head + workers * (k - head)) / 86 + 1e-9, ["fc"])


def test_each_takes_every_w_th_of_the_ranking():
    scores = {"w": torch.tensor([5.0, 1, 9, 7, 3, 8, 2, 6]), "fc": torch.zeros(2)}
    first, second = (interleaved(scores, 0.5, 2, rank, ["fc"]) for rank in (0, 1))
    assert first.indices["w"].tolist() == [0, 2, 3]  # ranks 0, 2, 4: scores 9, 7, 5
    assert second.indices["w"].tolist() == [4, 5, 7]  # ranks 1, 3, 5: scores 8, 6, 3


def test_masks_that_do_not_fit_beside_each_other_are_refused():
    reason = "3 masks of 35 coordinates each do not fit into the 78 outside the head"
    with pytest.raises(ParamsError, match=reason):
        interleaved(random_scores(ParameterIndex(SHAPES), 0), 0.5, 3, 0, ["fc"])
