"""fisher_diagonal against the float64 one-example-at-a-time oracle, and what it must leave alone."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import DataError, ModelError, ParamsError
from pipeline.fisher import fisher_diagonal, fisher_diagonal_reference
from pipeline.fisher.diagonal import Scorer
from pipeline.losses import example_losses

COMBINATIONS = list(itertools.product(("label", "expect"), ("square", "absolute")))
SLOW = ("replay", "whole")


@pytest.fixture
def routes(monkeypatch):
    """The ways the parameters' scores took in the last batch."""
    seen = {}
    add = Scorer.add

    def spy(self, batch, size):
        add(self, batch, size)
        seen.clear()
        seen.update(self.routes)

    monkeypatch.setattr(Scorer, "add", spy)
    return seen


def assert_matches(scores, expected, tolerance=1e-4, power="square"):
    """Relative to each tensor's largest score (CORRECTNESS 3).

    A key's bias in attention has a zero gradient by symmetry, so that all that is left of it is rounding:
    a millionth of the model's largest gradient counts as zero.
    """
    assert list(scores) == list(expected)
    zero = max(float(t.abs().max()) for t in expected.values()) * (1e-12 if power == "square" else 1e-6)
    for name, want in expected.items():
        got = scores[name]
        assert got.shape == want.shape and got.is_contiguous(), name
        error = float((got.double().cpu() - want.cpu()).abs().max())
        assert error <= max(tolerance * float(want.abs().max()), zero), f"{name}: {error} of {want.abs().max()}"


def on(model, place):
    """The model there; the oracle keeps the one on the CPU."""
    return model if place.type == "cpu" else copy.deepcopy(model).to(place)


@pytest.mark.parametrize(("kind", "power"), COMBINATIONS)
def test_every_layer_kind_matches_the_oracle(case, kind, power, routes, place):
    scores = fisher_diagonal(on(case.model, place), case.batches, kind=kind, power=power)
    assert_matches(scores, fisher_diagonal_reference(case.model, case.batches, kind=kind, power=power))
    assert all(t.dtype == torch.float32 and t.device.type == place.type for t in scores.values())
    slow = {name: way for name, way in routes.items() if way.startswith(SLOW)}
    assert bool(slow) != case.fast, slow


@pytest.mark.parametrize(("kind", "power"), [("label", "square"), ("expect", "square"), ("label", "absolute")])
def test_architectures_match_the_oracle(network, kind, power, routes, place):
    if network.label_only and (kind, power) != ("label", "square"):
        pytest.skip("its convolutions in float64 are slow; label-square covers their rules")
    scores = fisher_diagonal(on(network.model, place), network.batches, kind=kind, power=power)
    assert_matches(
        scores, fisher_diagonal_reference(network.model, network.batches, kind=kind, power=power), power=power
    )
    slow = {name: way for name, way in routes.items() if way.startswith(SLOW)}
    assert bool(slow) != network.fast, slow


def small(outputs=3):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(96, outputs))


def examples(count, outputs=3):
    torch.manual_seed(1)
    return torch.randn(count, 2, 4, 4), torch.randint(outputs, (count,))


def cut(data, sizes):
    return list(zip(data[0].split(sizes), data[1].split(sizes), strict=True))


@settings(max_examples=25, deadline=None)
@given(
    st.permutations(range(12)), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(COMBINATIONS)
)
def test_order_and_batch_size_change_nothing(order, sizes, combination):
    kind, power = combination
    model, (x, y) = small(), examples(12)
    sizes = [*sizes, 12][: sum(1 for _ in sizes)]
    sizes = sizes if sum(sizes) == 12 else [*itertools.takewhile(lambda s: s, sizes[:1]), 12 - sizes[0]]
    shuffled = x[list(order)], y[list(order)]
    one = fisher_diagonal(model, [(x, y)], kind=kind, power=power)
    assert_matches(fisher_diagonal(model, cut(shuffled, sizes), kind=kind, power=power), one, 1e-5)


@given(st.integers(1, 15))
@settings(max_examples=15, deadline=None)
def test_examples_stops_exactly_there(count):
    model, (x, y) = small(), examples(12)
    taken = min(count, 12)
    expected = fisher_diagonal(model, [(x[:taken], y[:taken])])
    assert_matches(fisher_diagonal(model, cut((x, y), [5, 5, 2]), examples=count), expected, 1e-5)


def test_examples_draws_no_batch_more():
    model, data = small(), examples(10)

    def batches():
        yield from cut(data, [5, 5])
        raise AssertionError("a batch too many was drawn")

    fisher_diagonal(model, batches(), examples=10)


def test_memory_chunk_changes_nothing():
    model, batch = small(), examples(8)
    whole = fisher_diagonal(model, [batch])
    assert_matches(fisher_diagonal(model, [batch], chunk=1), whole, 1e-6)
    assert_matches(fisher_diagonal(model, [batch], chunk=1, power="absolute"), fisher_diagonal(model, [batch], power="absolute"), 1e-6)  # fmt: skip  # noqa: E501


def test_two_classes_take_one_backward_pass_and_more_take_one_less():
    for classes in (2, 3, 5):
        model, batch = small(classes), examples(4, classes)
        passes = []
        model[5].register_full_backward_hook(lambda *_, passes=passes: passes.append(1))
        fisher_diagonal(model, [batch], kind="expect")
        # The hooked head has no rule any more: it is run again per example, which the hook sees as well.
        assert len(passes) == (classes - 1) * (1 + len(batch[0]))


def test_confident_predictions_stay_exact():
    """Probabilities down to 1e-30 must not turn the factor of diag(p) - p pᵀ into NaN or noise."""
    model, batch = small(), examples(6)
    with torch.no_grad():
        model[5].bias.copy_(torch.tensor([40.0, 0.0, -40.0]))
    for power in ("square", "absolute"):
        scores = fisher_diagonal(model, [batch], kind="expect", power=power)
        assert_matches(scores, fisher_diagonal_reference(model, [batch], kind="expect", power=power))


def test_own_loss_is_used():
    model, (x, y) = small(), examples(7)

    def loss(model, batch):
        return 3 * example_losses(model, batch)

    ours = fisher_diagonal(model, cut((x, y), [4, 3]), loss=loss)
    assert_matches(ours, {name: 9 * f for name, f in fisher_diagonal(model, [(x, y)]).items()})


def test_squares_are_per_example_not_of_the_batch():
    """Two examples with opposite gradients: their mean gradient is zero, their Fisher information is not."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    batch = torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
    # d(f - y)²/dw = -2 y x
    assert fisher_diagonal(model, [batch])["weight"].item() == pytest.approx(4)
    assert fisher_diagonal(model, [batch], power="absolute")["weight"].item() == pytest.approx(2)


def test_float64_model_gives_float64_scores():
    model, (x, y) = small().double(), examples(5)
    scores = fisher_diagonal(model, [(x.double(), y)])
    assert all(t.dtype == torch.float64 for t in scores.values())
    assert_matches(scores, fisher_diagonal_reference(model, [(x.double(), y)]), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_is_summed_in_fp32(dtype, place):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).to(dtype)
    x, y = torch.randn(64, 8).to(dtype), torch.randint(3, (64,))
    scores = fisher_diagonal(on(model, place), [(x, y)])
    assert all(t.dtype == torch.float32 for t in scores.values())
    # The forward and backward round to half precision; the sums must not on top of that.
    assert_matches(scores, fisher_diagonal_reference(model, [(x, y)]), 5e-2 if dtype == torch.bfloat16 else 5e-3)


def test_few_positions_that_cancel_stay_exact():
    """The expansion into pairs of positions loses what the sum over positions cancels."""

    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(80, 96), nn.Linear(96, 3)

        def forward(self, x):
            left, right = self.embed(x).unbind(1)
            return self.head(torch.tanh((left - right) * 1e3))

    torch.manual_seed(0)
    model, x = Difference(), torch.randn(8, 1, 80)
    batch = torch.cat([x, x + 1e-4 * torch.randn_like(x)], 1), torch.randint(3, (8,))
    scores = fisher_diagonal(model, [batch])
    assert_matches(scores, fisher_diagonal_reference(model, [batch]), 3e-3)  # x + 1e-4 itself is rounded to 1e-3


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training)
        for m in model.modules()
    ]
    parameters = [
        (p.requires_grad, None if p.grad is None else p.grad.clone(), p._version) for p in model.parameters()
    ]
    return hooks, parameters, {name: b.clone() for name, b in model.named_buffers()}


def assert_same_state(before, after):
    assert before[0] == after[0]
    for (needs, grad, version), (needs_now, grad_now, version_now) in zip(before[1], after[1], strict=True):
        assert (needs, version) == (needs_now, version_now)
        assert (grad is None) == (grad_now is None) and (grad is None or torch.equal(grad, grad_now))
    assert all(torch.equal(b, after[2][name]) for name, b in before[2].items())


def test_model_is_left_as_it_was(case):
    model = case.model
    model.train()
    list(model.modules())[-1].eval()  # modes may differ by module
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.grad = torch.full_like(p, 2.0) if i % 2 else None
    before, batches = state_of(model), copy.deepcopy(case.batches)
    fisher_diagonal(model, case.batches)
    assert_same_state(before, state_of(model))
    for ours, theirs in zip(batches, case.batches, strict=True):
        pairs = zip(ours.values() if isinstance(ours, dict) else ours, theirs.values() if isinstance(theirs, dict) else theirs, strict=True)  # fmt: skip  # noqa: E501
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("where", ["batches", "loss", "backward"])
def test_model_is_left_as_it_was_on_an_error(where):
    model, batch = small(), examples(4)
    model.train()
    model[1].eval()
    before = state_of(model)

    def batches():
        yield batch
        raise OSError("disk")

    def loss(model, batch):
        losses = example_losses(model, batch)
        if where == "loss":
            raise OSError("loss")
        losses.register_hook(fail)
        return losses * 1

    def fail(_):
        raise OSError("backward")

    with pytest.raises(OSError, match=where if where != "batches" else "disk"):
        fisher_diagonal(model, batches(), loss=None if where == "batches" else loss)
    assert_same_state(before, state_of(model))


def test_post_accumulate_hooks_do_not_fire():
    """MaskedParameters hangs its own on every parameter."""
    model, batch = small(), examples(4)
    fired = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fired.append)
    fisher_diagonal(model, [batch])
    assert not fired


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_surrounding_modes_do_not_matter(context):
    model, batch = small(), examples(6)
    expected = fisher_diagonal(model, [batch])
    with context():
        scores = fisher_diagonal(model, [batch])
    assert_matches(scores, expected, 1e-6)


def test_frozen_parameters_are_left_out_and_unused_ones_score_zero():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model.extra = nn.Linear(2, 2)
    model[0].weight.requires_grad_(False)
    model.forward = lambda x: model[1](model[0](x))
    scores = fisher_diagonal(model, [(torch.randn(5, 4), torch.randint(3, (5,)))])
    assert list(scores) == ["0.bias", "1.weight", "1.bias", "extra.weight", "extra.bias"]
    assert not scores["extra.weight"].any() and scores["0.bias"].all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "labels"}, ["labels", "label, expect"]),
        ({"power": "cube"}, ["cube", "square, absolute"]),
        ({"kind": "expect", "loss": example_losses}, ["expect", "loss"]),
        ({"examples": 0}, ["examples", "0"]),
        ({"chunk": 0}, ["chunk", "0"]),
        ({"device": "meta"}, ["meta", "cpu"]),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ParamsError) as error:
        fisher_diagonal(small(), [examples(2)], **arguments)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize(
    ("batches", "kind", "words"),
    [
        ([], "label", ["no example"]),
        ([(torch.randn(0, 2, 4, 4), torch.zeros(0, dtype=torch.long))], "label", ["no example"]),
        ([{"text": "a"}], "label", ["labels"]),
        ([(torch.full((2, 2, 4, 4), torch.nan), torch.tensor([0, 1]))], "label", ["finite"]),
        ([(torch.randn(2, 2, 4, 4), torch.zeros(2, 5, dtype=torch.long))], "label", ["outputs", "loss="]),
        ([(torch.randn(3, 2, 4, 4), None)], "expect", ["targets"]),
    ],
)
def test_bad_batches_are_refused(batches, kind, words):
    with pytest.raises(DataError) as error:
        fisher_diagonal(small(), batches, kind=kind)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


def test_a_mean_loss_is_refused():
    with pytest.raises(DataError, match="one value per example"):
        fisher_diagonal(small(), [examples(3)], loss=lambda model, batch: example_losses(model, batch).mean())


def test_a_model_without_gradients_is_refused():
    with pytest.raises(ModelError, match="requires a gradient"):
        fisher_diagonal(small().requires_grad_(False), [examples(2)])
    model = small()
    with pytest.raises(ModelError, match="depends on no parameter"):
        fisher_diagonal(model, [examples(2)], loss=lambda model, batch: example_losses(model, batch).detach())
