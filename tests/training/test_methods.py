"""The methods by name: each trains what it says, within the budget, and nothing else."""

from math import floor

import pytest
import torch
from torch import nn

from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.select import STRATEGIES
from pipeline.parameters import ParameterIndex
from pipeline.schema import group_of
from pipeline.training.masked import MaskedParameters
from pipeline.training.methods import METHODS, mask_for, method_named

HEAD = ["fc"]


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = {"stem": nn.Linear(6, width), "norm": nn.LayerNorm(width), "body": nn.Linear(width, width)}
    return nn.ModuleDict({**layers, "fc": nn.Linear(width, 2)})


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand(shape) for name, shape in ParameterIndex.of(model).shapes.items()}


OF_THE_BASE = [name for name, method in METHODS.items() if method.strategy in STRATEGIES]


def test_every_method_names_a_strategy_and_itself() -> None:
    assert OF_THE_BASE == ["dense", "fish", "random", "bitfit", "magnitude", "head"]
    others = {name: method.strategy for name, method in METHODS.items() if name not in OF_THE_BASE}
    assert others == {"lora": "adapter", "shira": "peft", "deviation": "learned", "diff-pruning": "learned"}
    assert all(method.name == name and method.doc for name, method in METHODS.items())
    assert [m.name for m in METHODS.values() if m.needs_ranking] == ["fish"]


@pytest.mark.parametrize("name", OF_THE_BASE)
def test_the_head_is_trained_and_the_mask_fits_the_model(name: str) -> None:
    model = network()
    ranking = Ranking.of(scores_of(model), 0.5)
    mask = mask_for(name, model, density=0.3, head=HEAD, seed=0, ranking=ranking)
    assert mask.whole("fc.weight") and mask.whole("fc.bias")
    assert MaskedParameters(model, mask).values.numel() == mask.nnz
    assert mask.info["method"] == name and mask.info["density"] == mask.density
    budgeted = {"fish", "random", "magnitude"}
    assert (mask.nnz == floor(0.3 * mask.index.total)) == (name in budgeted)


def test_each_method_trains_what_it_says() -> None:
    model = network()
    scores = scores_of(model)

    def cut(name: str, seed: int = 0) -> Mask:
        return mask_for(name, model, density=0.3, head=HEAD, seed=seed, ranking=Ranking.of(scores, 0.5))

    assert cut("dense").density == 1
    assert {n for n in cut("head").index if cut("head").count(n)} == {"fc.weight", "fc.bias"}
    bitfit = cut("bitfit")
    assert {n for n in bitfit.index if bitfit.count(n)} == {"fc.weight", *(n for n in bitfit.index if "bias" in n)}
    assert cut("fish") == Mask.top_k(scores, 0.3, HEAD)
    sizes = {name: p.detach().abs() for name, p in model.named_parameters()}
    assert cut("magnitude") == Mask.top_k(sizes, 0.3, HEAD)
    assert cut("random", 3) == cut("random", 3) != cut("random", 4)
    assert cut("random", 3).info["seed"] == 3 and "seed" not in cut("fish").info


@pytest.mark.parametrize("name", OF_THE_BASE)
def test_a_compiled_model_gets_the_same_mask(name: str) -> None:
    model = network()
    ranking = Ranking.of(scores_of(model), 0.5)
    masks = [
        mask_for(name, net, density=0.3, head=HEAD, seed=0, ranking=ranking)
        for net in (model, torch.compile(model, backend="eager"))
    ]
    assert masks[0] == masks[1]


def test_an_unknown_method_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ParamsError, match="unknown method 'fisch'; did you mean 'fish'"):
        method_named("fisch")
    with pytest.raises(ParamsError, match="'lora' takes more than the base and a ranking"):
        mask_for("lora", network(), density=0.1, head=HEAD, seed=0)
    with pytest.raises(ParamsError, match="unknown method 'xyz' .known: bitfit, dense, deviation"):
        mask_for("xyz", network(), density=0.1, head=HEAD, seed=0)


def test_fish_needs_a_ranking_of_this_very_model() -> None:
    with pytest.raises(ParamsError, match="needs a ranking"):
        mask_for("fish", network(), density=0.3, head=HEAD, seed=0)
    other = Ranking.of(scores_of(network(9)), 0.5)
    with pytest.raises(MismatchError, match="'stem.weight'"):
        mask_for("fish", network(), density=0.3, head=HEAD, seed=0, ranking=other)


def test_fish_by_another_variant_of_the_scores() -> None:
    method = method_named("fish-global")
    assert (method.name, method.variant, method.strategy) == ("fish-global", "global", "fisher")
    model = network()
    ranking = Ranking.of(scores_of(model), 0.5)
    mask = mask_for("fish-global", model, density=0.3, head=HEAD, seed=0, ranking=ranking)
    assert mask == mask_for("fish", model, density=0.3, head=HEAD, seed=0, ranking=ranking)
    assert mask.info["method"] == "fish-global"
    with pytest.raises(ParamsError, match="unknown method 'random-global'"):
        method_named("random-global")


@pytest.mark.parametrize("name", [*METHODS, "fish-x"])
def test_the_grid_puts_a_method_where_its_masks_come_from(name: str) -> None:
    """params.yaml is checked without torch, so that the grid has a rule of its own."""
    method = method_named(name)
    ranked = "ranked" if method.needs_ranking else "unranked"
    assert group_of(name) == ("learned" if method.strategy == "learned" else ranked)
