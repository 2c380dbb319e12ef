"""Recipes are checked, and name the optimizer they say."""

import pytest
import torch
from torch import nn

from pipeline.errors import ParamsError
from pipeline.training.recipe import Recipe, make_optimizer


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("adam", "Adam"), ("sgd", "SGD")])
def test_the_optimizer_is_the_one_named_with_its_settings(name: str, kind: str) -> None:
    values = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(values, Recipe(1, 0.25, name, weight_decay=0.5, momentum=0.75))
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == kind
    assert group["params"] == [values] and (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.75, True)


def test_sgd_without_momentum_is_plain() -> None:
    values = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(values, Recipe(1, 0.5, "sgd", momentum=0.0))
    values.grad = torch.full((1,), 0.5)
    optimizer.step()
    assert values.tolist() == [0.75] and not optimizer.state[values].get("momentum_buffer")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("optimizer", "lion"),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("schedule", "cosine"),
        ("warmup", 2.0),
        ("clip", 0.0),
        ("accumulate", 0),
    ],
)
def test_a_recipe_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ParamsError, match=f"recipe: {field} is {value!r}; expected"):
        Recipe(**{"epochs": 1, "lr": 0.1, field: value})
