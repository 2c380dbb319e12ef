"""The strategies by name."""

from collections import Counter
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import nn

from pipeline.errors import MismatchError, ParamsError
from pipeline.masks import select
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.select import STRATEGIES
from pipeline.parameters import ParameterIndex


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(30, 40))
    model.add_module("norm", nn.LayerNorm(40))
    model.add_module("head", nn.Linear(40, 2))
    return model


MODEL = network()
INDEX = ParameterIndex.of(MODEL)
SCORES = {name: torch.rand(shape) for name, shape in INDEX.shapes.items()}


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_each_holds_the_head_and_its_density(name: str) -> None:
    mask = STRATEGIES[name](MODEL, density=0.2, always=["head"], seed=1, ranking=SCORES)
    assert mask.index == INDEX and mask.whole("head.weight") and mask.whole("head.bias")
    k = int(0.2 * INDEX.total)
    assert mask.nnz == {"bias": 40 + 40 + 82, "dense": INDEX.total, "head": 82}.get(name, k)


def test_fisher_is_top_k_of_scores_or_ranking() -> None:
    expected = Mask.top_k(SCORES, 0.1, ["head"])
    ranking = Ranking.of(SCORES, keep=0.3)
    assert select.fisher(SCORES, 0.1, ["head"]) == select.fisher(ranking, 0.1, ["head"]) == expected
    with pytest.raises(ParamsError, match="needs scores or a ranking"):
        STRATEGIES["fisher"](MODEL, density=0.1)


def test_magnitude_is_top_k_of_absolute_weights() -> None:
    before = {name: p.detach().clone() for name, p in MODEL.named_parameters()}
    expected = Mask.top_k({name: p.abs() for name, p in before.items()}, 0.1, ["head"])
    assert select.magnitude(MODEL, 0.1, ["head"]) == expected
    assert all(p.equal(before[name]) for name, p in MODEL.named_parameters())
    assert select.magnitude(network().bfloat16(), 0.1, ["head"]).nnz == expected.nnz


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_magnitude_looks_through_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A wrapper's prefix on every name must neither drop a tensor nor change the mask."""
    assert select.magnitude(wrap(MODEL), 0.1, ["head"]) == select.magnitude(MODEL, 0.1, ["head"])


def test_bias_goes_by_the_last_component() -> None:
    index = ParameterIndex({"bias.weight": (3,), "a.bias": (2,), "bias": (1,), "a.bias_scale": (2,), "h.w": (2,)})
    mask = select.bias(index, ["h"])
    assert [n for n in index if mask.count(n)] == ["a.bias", "bias", "h.w"]
    with pytest.raises(ParamsError, match="no parameter named 'bias'"):
        select.bias(ParameterIndex({"w": (2,)}))


def test_head_and_dense() -> None:
    assert select.head(INDEX, ["head"]) == Mask.covering(INDEX, ["head.weight", "head.bias"])
    assert select.dense(INDEX).density == 1.0
    with pytest.raises(ParamsError, match="no head is named"):
        select.head(INDEX, [])
    with pytest.raises(MismatchError, match="'tail'"):
        select.head(INDEX, ["tail"])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_random_is_exact_and_reproducible(density: float) -> None:
    mask = select.random(INDEX, density, 3, ["head"])
    state = torch.get_rng_state()
    assert select.random(INDEX, density, 3, ["head"]) == mask and mask.nnz == int(density * INDEX.total)
    assert torch.get_rng_state().equal(state)  # the global generator is not touched
    turned = ParameterIndex(dict(reversed(INDEX.shapes.items())))
    assert select.random(turned, density, 3, ["head"]) == mask
    if density < 1:
        assert select.random(INDEX, density, 4, ["head"]) != mask


def test_random_is_the_same_on_every_machine() -> None:
    """Pinned: masks that are shared between experiments must not change with a version."""
    mask = select.random(ParameterIndex({"w": (1000,)}), 0.005, 0)
    assert mask.indices["w"].tolist() == [44, 239, 760, 933, 963]


@pytest.mark.parametrize("k", [2, 4])
def test_random_sets_are_equally_likely(k: int) -> None:
    """All C(6, k) = 15 subsets, below and above one half; 55 is beyond the 1e-6 quantile of chi-squared(14)."""
    index = ParameterIndex({"a": (2,), "b": (4,)})
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(1500):
        mask = select.random(index, k / 6 + 1e-9, seed)
        seen[tuple(mask.indices["a"].tolist() + [2 + i for i in mask.indices["b"].tolist()])] += 1
    assert set(seen) == set(combinations(range(6), k))
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 55
