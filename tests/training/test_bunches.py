"""Small tensors taken together, as on a GPU: the same bits as one by one, whatever happens in between."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.masks.mask import Mask
from pipeline.masks.select import dense
from pipeline.parameters import ParameterIndex
from pipeline.training import bunches, gathering
from pipeline.training.leak import LeakyParameters
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe
from tests.training.test_masked import CASES, assert_frozen, on, random_mask, state_of

pytestmark = pytest.mark.usefixtures("one_thread_seeded")
CPU = torch.device("cpu")


@pytest.fixture(params=[1 << 23, 150], ids=["all", "few"])
def together(request, monkeypatch):
    """Call it to take tensors together from then on: all at once, or some at a time, large ones alone."""

    def start():
        monkeypatch.setattr(bunches, "DEVICES", {"cpu", "meta"})
        for module in (bunches, gathering):
            monkeypatch.setattr(module, "TOGETHER", request.param)
        monkeypatch.setattr(bunches, "SMALL", request.param)

    return start


def bits(model, theta):
    tensors = {"theta": theta, **model.state_dict()}
    return {
        name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()
    }


def trained(case, dtype, kind, mask_of, optimizer):
    torch.manual_seed(0)
    make, batch = CASES[case]
    model = make().to(dtype)
    before = state_of(model)
    mask, other = mask_of(model, 1), mask_of(model, 2)
    recipe = Recipe(2, 1e-2, optimizer, weight_decay=0.1, clip=0.5, accumulate=2, warmup=0.2)
    with kind(model, mask) as masked:
        fit(
            model, lambda epoch: [on(CPU, batch(10 * epoch + i), dtype) for i in range(5)], masked=masked,
            recipe=recipe, after_epoch=lambda entry, m, now: other,
        )  # fmt: skip
        if kind is MaskedParameters:
            assert_frozen(model, before, mask | other)
        return bits(model, masked.values), len(masked._bunches)


def some(model, seed):
    return random_mask(model, 0.3, seed, whole=list(ParameterIndex.of(model))[-1:])


@pytest.mark.parametrize(
    ("kind", "mask_of"),
    [
        (MaskedParameters, some),
        (MaskedParameters, lambda m, _: dense(ParameterIndex.of(m))),
        (LeakyParameters, some),
    ],
    ids=["masked", "dense", "leaky"],
)
@pytest.mark.parametrize(("dtype", "optimizer"), [(torch.float32, "sgd"), (torch.bfloat16, "adamw")])
@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_with_the_same_bits(case, dtype, optimizer, kind, mask_of, together):
    expected, none = trained(case, dtype, kind, mask_of, optimizer)
    together()
    found, some_together = trained(case, dtype, kind, mask_of, optimizer)
    assert found == expected and none == 0
    assert (some_together > 0) == (kind is MaskedParameters and mask_of is some)


def layers(count=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(count)))


def masked_layers():
    model = layers()
    return model, MaskedParameters(model, random_mask(model, 0.5))


def both(together, gradient):
    """A gradient of θ, with tensors one by one and together."""
    alone = gradient(*masked_layers())
    together()
    return alone, gradient(*masked_layers())


class Broken(Exception):
    """In the midst of a backward."""


def broken_off(model, masked, reset):
    def fail(grad):
        raise Broken

    x = torch.ones(2, 6)
    handle = model[1].weight.register_hook(fail)
    with pytest.raises(Broken):
        model(x).square().sum().backward()
    handle.remove()
    if reset:
        masked.values.grad = None
    model(2 * x).square().sum().backward()
    assert not masked._gathering._waiting if reset else True
    return masked.values.grad


def test_a_backward_that_is_broken_off_leaves_nothing_behind(together):
    alone, found = both(together, lambda model, masked: broken_off(model, masked, reset=True))
    assert torch.equal(alone, found)


def changed(model, masked):
    x = torch.ones(2, 6)
    model(x).square().sum().backward()
    masked.values.grad.add_(0.5)
    model(x).square().sum().backward()
    masked.values.grad = torch.full_like(masked.values, 0.25)
    (model(x) * 3).sum().backward()
    return masked.values.grad


def inside_another(model, masked):
    x = torch.ones(2, 6, requires_grad=True)
    y = checkpoint(lambda x: model[1](model[0](x)).tanh(), x, use_reentrant=True)
    (model[3](model[2](y)).square().sum() + model[0](x).sum()).backward()
    return masked.values.grad


def with_a_graph(model, masked):
    x = torch.ones(2, 6)
    model(x).tanh().square().sum().backward(create_graph=True)
    assert not masked.values.grad.requires_grad
    return masked.values.grad


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("gradient", [changed, inside_another, with_a_graph])
def test_other_ways_to_a_gradient(gradient, together):
    alone, found = both(together, gradient)
    assert torch.equal(alone, found)


def test_gradients_of_two_dtypes(together):
    def gradient(two):
        masked = MaskedParameters(two, random_mask(two, 0.5))
        x = torch.ones(2, 6)
        for _ in range(2):
            (two["a"](x).square().sum() + two["b"](x.bfloat16()).square().sum()).backward()
        with torch.no_grad():
            masked.values.add_(masked.values.grad, alpha=0.1)
        masked.write_()
        return masked.values.grad, bits(two, masked.values)

    def two():
        return nn.ModuleDict({"a": layers(3), "b": layers(3).bfloat16()})

    alone = gradient(two())
    together()
    found = gradient(two())
    assert torch.equal(alone[0], found[0]) and alone[1] == found[1]


def test_every_bit_of_a_frozen_value_stays(together):
    together()
    model, masked = masked_layers()
    odd = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-45]).view(torch.int32)
    odd[1] |= 0x1234  # what a NaN carries
    flags = {name: flag.reshape(-1) for name, flag in masked.mask.to_bool().items()}
    for name, p in model.named_parameters():
        if name in masked.segments:
            frozen = (~flags[name]).nonzero().reshape(-1)[:4]
            p.data.view(-1).view(torch.int32)[frozen] = odd[: len(frozen)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        masked.values.add_(1)
    masked.write_()
    assert_frozen(model, before, masked.mask)
    assert all(torch.isfinite(masked.values)) and masked._bunches


def test_a_tensor_of_other_strides_or_replaced_falls_out_of_its_bunch(together):
    from pipeline.errors import ModelError

    together()
    model, masked = masked_layers()
    model[2].weight.data = model[2].weight.data.t().contiguous().t()  # as a cast or another layout would
    with torch.no_grad():
        masked.values.fill_(7)
    masked.write_()
    for name, flag in masked.mask.to_bool().items():
        assert bool((dict(model.named_parameters())[name][flag] == 7).all()), name
    model[3].bias = nn.Parameter(torch.zeros(6))
    with pytest.raises(ModelError, match="'3.bias' was moved or replaced"):
        masked.write_()


def test_bunches_keep_their_limit_and_leave_single_tensors_alone(monkeypatch):
    monkeypatch.setattr(bunches, "TOGETHER", 10)
    sizes = dict(zip("abcdefghi", [4, 4, 4, 9, 2, 2, 6, 1, 3], strict=True))
    kinds = {"c": torch.float64, "i": torch.float64}
    tensors = {
        name: (torch.zeros(size, dtype=kinds.get(name, torch.float32)), (0, 1, torch.tensor([0]), size))
        for name, size in sizes.items()
    }
    assert [names for names, *_ in bunches.bunched(tensors)] == [["a", "b"], ["e", "f", "g"], ["c", "i"]]
    assert list(bunches.bunched({})) == []


def test_masks_of_one_place_do_not_share_coordinates(together):
    """Two masks whose stretches begin alike: the second is not gathered with the first one's coordinates."""
    together()
    model = layers(2)
    index = ParameterIndex.of(model)
    first, second = ({n: torch.zeros(s, dtype=torch.bool) for n, s in index.shapes.items()} for _ in range(2))
    for name in index:
        first[name].view(-1)[0] = second[name].view(-1)[-1] = True
    masked = MaskedParameters(model, Mask.from_bool(first))
    x = torch.randn(3, 6)
    grads = []
    for mask in (first, second):
        masked.remask_(Mask.from_bool(mask))
        model(x).square().sum().backward()
        grads.append(masked.values.grad.clone())
        masked.values.grad = None
    masked.release()
    model(x).square().sum().backward()
    for grad, mask in zip(grads, (first, second), strict=True):
        assert torch.equal(grad, torch.cat([p.grad[mask[name]] for name, p in model.named_parameters()]))
