"""A run on a GPU that was stopped goes on to the same bytes, dropout's generator on the device included."""

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from pipeline.errors import Interrupted
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.resume import ResumeFile
from tests.training.test_masked import image_batch, random_mask, text_batch

pytestmark = pytest.mark.usefixtures("repeatable")
STEPS = 9


def bert():
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=3, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def convolutions():
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.4), nn.Flatten(), nn.Linear(128, 3)]
    return nn.Sequential(*layers)


MODELS = {"bert": (bert, text_batch), "convolutions": (convolutions, image_batch)}


def run(name, place, path=None, stop=None, renew=False):
    """Train, stopping after ``stop`` further steps.

    Returns:
        The result, and the bytes that the run determines.
    """
    torch.manual_seed(1)
    make, batch = MODELS[name]
    model = make().to(place)
    mask, other = random_mask(model, 0.4), random_mask(model, 0.4, seed=2)
    resume = ResumeFile(path, "own", every_s=0) if path else None
    asked = iter(range(1, 1000))
    with MaskedParameters(model, mask) as masked:
        result = fit(
            model, lambda epoch: [batch(10 * epoch + i) for i in range(5)], masked=masked,
            recipe=Recipe(3, 1e-2, weight_decay=0.1, clip=1.0, accumulate=2, warmup=0.2),
            autocast=torch.bfloat16 if place.type == "cuda" else None, resume=resume,
            evaluate=lambda m: {"drawn": float(torch.rand(1, device=place))},
            after_epoch=(lambda entry, m, now: other) if renew else None,
            should_stop=lambda: next(asked) == stop,
        )  # fmt: skip
        state = {"theta": masked.values, **model.state_dict(), "drawn": torch.rand(4, device=place)}
    ends = {name: t.detach().cpu().view(torch.uint8).numpy().tobytes() for name, t in state.items() if t.ndim}
    return result, {**ends, "history": json.dumps(result.history)}


@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_stopped_and_started_again_it_ends_with_the_same_bytes(name, renew, cuda, tmp_path):
    _, whole = run(name, cuda, renew=renew)
    path = tmp_path / "state.safetensors"
    for stop in (1, 3, 2):
        with pytest.raises(Interrupted):
            run(name, cuda, path, stop, renew)
    result, ends = run(name, cuda, path, renew=renew)
    assert result.resumed_from == 6 and result.note == ""
    assert ends == whole
    again, same = run(name, cuda, path, renew=renew)  # a finished run returns its end
    assert again.steps == STEPS and again.resumed_from == STEPS
    assert {k: v for k, v in same.items() if k != "drawn"} == {k: v for k, v in whole.items() if k != "drawn"}


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_state_of_another_kind_of_device_is_not_used(first, then, tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        run("bert", torch.device(first), path, 2)
    _, whole = run("bert", torch.device(then))
    result, ends = run("bert", torch.device(then), path)
    assert result.resumed_from is None and result.note.endswith("is the state of another run; started anew")
    assert ends == whole
