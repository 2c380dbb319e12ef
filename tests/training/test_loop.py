"""fit(): the same numbers as plain loops, whatever the batches, and clear ends."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import DataError, DivergedError, Interrupted, ModelError, ParamsError
from pipeline.losses import Batch, example_losses
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.training import ledger
from pipeline.training.device import Device
from pipeline.training.loop import FitResult, Progress, Recipe, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import make_optimizer
from pipeline.training.schedule import make_schedule

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def noisy() -> nn.Module:
    """A network with BatchNorm and dropout."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def smooth() -> nn.Module:
    """A network whose batches do not interact, in float64."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def some(model: nn.Module, density: float = 0.3) -> Mask:
    generator = torch.Generator().manual_seed(5)
    return Mask.from_bool({
        n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()
    })


def everything(model: nn.Module) -> Mask:
    return Mask.from_bool({n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()})


def data(sizes: list[int], dtype: torch.dtype = torch.float32, epoch: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(100 + epoch)
    return [
        (torch.randn(n, 6, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def train(model: nn.Module, batches: object, recipe: Recipe, mask: Mask | None = None, **rest: object):
    with MaskedParameters(model, mask or some(model)) as masked:
        result = fit(model, batches, masked=masked, recipe=recipe, **rest)
        return masked.values.detach().clone(), result


RECIPES = {
    "adamw": Recipe(3, 1e-2, "adamw", weight_decay=0.1, warmup=0.2, clip=0.5),
    "adam": Recipe(3, 1e-2, "adam", weight_decay=0.1, schedule="constant"),
    "sgd": Recipe(3, 0.1, "sgd", weight_decay=5e-4, schedule="piecewise", warmup=0.3),
}


@pytest.mark.parametrize("name", RECIPES)
def test_fit_is_the_plain_loop_bit_for_bit(name: str) -> None:
    recipe, sizes = RECIPES[name], [8, 8, 5]
    model, plain = noisy(), noisy()
    theta, result = train(model, lambda epoch: data(sizes, epoch=epoch), recipe)

    masked = MaskedParameters(plain, some(plain))
    optimizer = make_optimizer(masked.values, recipe)
    factor, step, means = make_schedule(recipe.schedule, 9, recipe.warmup), 0, []
    torch.manual_seed(recipe.seed)
    plain.train()
    for epoch in range(3):
        total = 0.0
        for x, y in data(sizes, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor(step)
            losses = F.cross_entropy(plain(x), y, reduction="none")
            (losses.sum() / len(y)).backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_([masked.values], recipe.clip)
            optimizer.step()
            masked.write_()
            optimizer.zero_grad()
            total += losses.sum().item()
            step += 1
        means.append(total / sum(sizes))

    assert torch.equal(theta, masked.values)
    for (key, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    assert [entry["train_loss"] for entry in result.history] == means
    assert [(entry["epoch"], entry["step"]) for entry in result.history] == [(1, 3), (2, 6), (3, 9)]
    assert result.steps == 9 and result.device == "cpu" and result.resumed_from is None
    assert not model.training


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("adamw", torch.optim.AdamW, {}),
        ("adam", torch.optim.Adam, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_dense_mask_is_torchs_own_training(name: str, kind: type, settings: dict) -> None:
    recipe = Recipe(3, 1e-2, name, weight_decay=0.05, schedule="constant", clip=0.7)
    ours, theirs = smooth(), smooth()
    train(ours, lambda epoch: data([8, 4], torch.float64, epoch), recipe, everything(ours))
    optimizer = kind(theirs.parameters(), lr=1e-2, weight_decay=0.05, **settings)
    for epoch in range(3):
        for x, y in data([8, 4], torch.float64, epoch):
            optimizer.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_frozen_values_stay_bit_identical() -> None:
    model = noisy()
    base, mask = copy.deepcopy(model), some(model)
    theta, _ = train(model, lambda epoch: data([8, 8]), RECIPES["adamw"], mask)
    moved = 0
    for name, chosen in mask.to_bool().items():
        was, now = base.get_parameter(name), model.get_parameter(name)
        assert torch.equal(was[~chosen], now[~chosen]), name
        moved += int((was[chosen] != now[chosen]).sum())
    assert moved > 0.9 * mask.nnz == 0.9 * theta.numel()


def test_accumulated_ragged_batches_equal_the_full_batch() -> None:
    sizes = [5, 3, 1, 6, 2]  # groups of two: 8, 7 and the 2 that are left
    small = data(sizes, torch.float64)
    full = [
        (torch.cat([b[0] for b in group]), torch.cat([b[1] for b in group]))
        for group in (small[:2], small[2:4], small[4:])
    ]
    recipe = Recipe(2, 0.05, "adamw", weight_decay=0.1, warmup=0.4, clip=0.5, accumulate=2)
    one, first = train(smooth(), lambda _: small, recipe)
    two, second = train(smooth(), lambda _: full, Recipe(**{**vars(recipe), "accumulate": 1}))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert first.steps == second.steps == 6
    assert first.history[1]["train_loss"] == pytest.approx(second.history[1]["train_loss"], rel=1e-10)


def test_clipping_bounds_the_step() -> None:
    recipe = Recipe(1, 1.0, "sgd", momentum=0.0, schedule="constant", clip=1e-3)
    model = smooth()
    masked = MaskedParameters(model, some(model))
    before = masked.values.detach().clone()
    fit(model, lambda _: data([8], torch.float64), masked=masked, recipe=recipe)
    # torch divides by norm + 1e-6
    assert float((masked.values.detach() - before).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_two_runs_are_bit_identical_and_the_seed_counts() -> None:
    runs = [train(noisy(), lambda e: data([8, 8], epoch=e), Recipe(2, 0.01, seed=seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_evaluation_leaves_no_trace() -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        torch.rand(7)
        model.train()  # even an evaluation that forgets itself
        with torch.no_grad():
            model[3](torch.ones(5))
        return {"accuracy": torch.tensor(0.25), "correlation": float("nan")}

    alone, _ = train(noisy(), lambda e: data([8, 8], epoch=e), Recipe(3, 0.01))
    watched, result = train(noisy(), lambda e: data([8, 8], epoch=e), Recipe(3, 0.01), evaluate=evaluate)
    assert torch.equal(alone, watched)
    assert seen == [(False, False)] * 3
    assert [type(e["accuracy"]) for e in result.history] == [float] * 3
    assert result.history[0]["accuracy"] == 0.25 and math.isnan(result.history[0]["correlation"])


def test_a_loss_of_ones_own_sees_mappings() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.words(ids).mean(1))

    batches = [{"ids": torch.tensor([[1, 2], [3, 3]]), "labels": torch.tensor([0, 1])}]
    default, _ = train(Text(), lambda _: batches, Recipe(2, 0.1))
    own, _ = train(Text(), lambda _: batches, Recipe(2, 0.1), loss=example_losses)
    halved, _ = train(
        Text(),
        lambda _: [{"ids": batches[0]["ids"]}],
        Recipe(2, 0.1),
        loss=lambda model, batch: model(batch["ids"])[:, 0],
    )
    assert torch.equal(default, own)
    assert not torch.equal(default, halved)


def test_log_and_progress_tell_the_steps() -> None:
    logged: list[tuple[dict[str, float], int]] = []
    shown: list[Progress] = []
    recipe = Recipe(2, 0.01, schedule="linear")
    _, result = train(
        noisy(),
        lambda e: data([8, 8, 8, 8, 8], epoch=e),
        recipe,
        evaluate=lambda _: {"accuracy": 0.5},
        log=lambda values, step: logged.append((values, step)),
        log_every=2,
        progress=shown.append,
    )
    assert [step for _, step in logged] == [2, 4, 5, 6, 8, 10]
    assert [sorted(values) for values, _ in logged[:3]] == [
        ["loss", "lr"],
        ["loss", "lr"],
        ["accuracy", "epoch", "loss", "lr", "train_loss"],
    ]
    # the windows of an epoch, weighted by their steps, make up its mean
    windows = [logged[i][0]["loss"] for i in range(3)]
    assert (2 * windows[0] + 2 * windows[1] + windows[2]) / 5 == pytest.approx(result.history[0]["train_loss"])
    assert logged[0][0]["lr"] == pytest.approx(0.01 * 0.9)
    assert [(p.epoch, p.step) for p in shown] == [(1 + (s > 5), s) for s in range(1, 11)]
    assert {(p.epochs, p.steps) for p in shown} == {(2, 10)}
    assert shown[4].loss == result.history[0]["train_loss"]


def test_losses_are_the_same_however_seldom_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    often = train(noisy(), lambda e: data([8, 8, 5], epoch=e), Recipe(2, 0.01))[1]
    monkeypatch.setattr(ledger.Ledger, "read_every", property(lambda _: 50, lambda *_: None), raising=False)
    seldom = train(noisy(), lambda e: data([8, 8, 5], epoch=e), Recipe(2, 0.01))[1]
    assert often.history == seldom.history


def test_a_loss_that_is_not_finite_ends_the_run_with_its_history() -> None:
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return example_losses(model, batch) * (float("inf") if calls == 6 else 1.0)

    with pytest.raises(DivergedError) as caught:
        train(noisy(), lambda e: data([8, 8, 8, 8]), Recipe(2, 0.5, schedule="constant"), loss=loss)
    assert caught.value.step == 5
    assert [entry["epoch"] for entry in caught.value.history] == [1]
    message = str(caught.value)
    assert "the loss is not finite in epoch 2, step 6 of 8, at learning rate 0.5" in message
    assert "lower lr" in message and "\n" not in message


def test_a_trained_value_that_is_not_finite_is_seen_after_the_last_step() -> None:
    recipe = Recipe(1, 1e38, "sgd", momentum=0.0, schedule="constant")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return 100 * example_losses(model, batch)

    with pytest.raises(DivergedError, match="a trained value is not finite in epoch 1, step 1 of 1"):
        train(noisy(), lambda _: data([8]), recipe, loss=loss)


def test_autocast_computes_in_bf16_and_keeps_theta_in_fp32() -> None:
    seen: set[torch.dtype] = set()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch[0])
        seen.add(outputs.dtype)
        return F.cross_entropy(outputs, batch[1], reduction="none")

    fp32, _ = train(noisy(), lambda _: data([8, 8]), Recipe(2, 1e-2, "sgd"), loss=loss)
    chosen = Device(CPU, torch.bfloat16, "")
    bf16, _ = train(noisy(), lambda _: data([8, 8]), Recipe(2, 1e-2, "sgd"), loss=loss, device=chosen)
    assert seen == {torch.float32, torch.bfloat16}
    assert bf16.dtype == torch.float32
    assert not torch.equal(fp32, bf16)
    torch.testing.assert_close(fp32, bf16, rtol=0, atol=2e-3)


def test_channels_last_changes_the_layout_and_nothing_else() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
        return nn.Sequential(*layers).double()

    images = [(torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    layouts = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        layouts.append(batch[0].is_contiguous(memory_format=torch.channels_last))
        return example_losses(model, batch)

    one, _ = train(network(), lambda _: images, Recipe(2, 0.01), loss=loss)
    two, _ = train(network(), lambda _: images, Recipe(2, 0.01), loss=loss, channels_last=True)
    assert layouts == [False, False, True, True]
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_should_stop_ends_after_the_step_under_way() -> None:
    steps: list[int] = []
    with pytest.raises(Interrupted, match="epoch 1 of 2, after step 3; nothing is saved"):
        train(
            noisy(),
            lambda _: data([8] * 5),
            Recipe(2, 0.01),
            progress=lambda p: steps.append(p.step),
            should_stop=lambda: steps[-1] == 3,
        )
    assert steps == [1, 2, 3]


def test_time_and_memory_are_told() -> None:
    result: FitResult = train(noisy(), lambda _: data([8]), Recipe(1, 0.01))[1]
    assert result.seconds > 0 and result.peak_memory_bytes > 10 << 20


def test_bad_data_and_losses_are_refused() -> None:
    with pytest.raises(DataError, match="epoch 1 has no batches"):
        train(noisy(), lambda _: [], Recipe(1, 0.01))
    with pytest.raises(DataError, match="epoch 2 has 3 batches, an earlier one had 2"):
        train(noisy(), lambda epoch: data([8] * (2 + epoch)), Recipe(2, 0.01))
    with pytest.raises(DataError, match="no examples"):
        train(noisy(), lambda _: data([8, 0]), Recipe(1, 0.01))
    with pytest.raises(ModelError, match=r"shape \[\] for a batch of 8 examples"):
        train(noisy(), lambda _: data([8]), Recipe(1, 0.01), loss=lambda m, b: example_losses(m, b).mean())


def test_what_cannot_be_trained_is_refused() -> None:
    model = noisy()
    nothing = Mask(
        ParameterIndex.of(model), {name: torch.empty(0, dtype=torch.int64) for name in some(model).index}
    )
    with pytest.raises(ParamsError, match="chooses no parameter"):
        train(model, lambda _: data([8]), Recipe(1, 0.01), nothing)
    with pytest.raises(ParamsError, match=r"autocast is torch\.float16"):
        train(model, lambda _: data([8]), Recipe(1, 0.01), autocast=torch.float16)
    with pytest.raises(ModelError, match="on cpu, not on cuda"):
        train(model, lambda _: data([8]), Recipe(1, 0.01), device="cuda")
