import torch

from pipeline.masks.mask import Mask
from pipeline.masks.select import random
from pipeline.parameters import ParameterIndex
from stages.mask import by_layer


def test_coordinates_are_counted_by_layer_in_the_models_order():
    index = ParameterIndex({
        "embed.words.weight": (10, 4), "encoder.layer.2.a.weight": (4, 4), "encoder.layer.2.a.bias": (4,),
        "encoder.layer.10.a.weight": (4, 4), "head.weight": (2, 4),
    })  # fmt: skip
    mask = random(index, 0.5, 0, ["head"])
    layers = by_layer(mask)
    assert [layer["layer"] for layer in layers] == ["embed.words", "encoder.layer.2", "encoder.layer.10", "head"]
    assert [layer["numel"] for layer in layers] == [40, 20, 16, 8]
    assert layers[-1]["count"] == 8 and sum(layer["count"] for layer in layers) == mask.nnz == 42
    alone = Mask(index, {"encoder.layer.2.a.bias": torch.tensor([1, 3])})
    assert [layer["count"] for layer in by_layer(alone)] == [0, 2, 0, 0]
