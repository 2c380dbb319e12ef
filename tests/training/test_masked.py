"""MaskedParameters: frozen is frozen, O(k), and the same θ as an independent oracle."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from pipeline.errors import MismatchError, ModelError, ParamsError
from pipeline.losses import example_losses, to_device
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.training import embeddings
from pipeline.training.masked import MaskedParameters

pytestmark = pytest.mark.usefixtures("one_thread_seeded", "repeatable")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class TinyResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def tiny_bert(vocabulary: int = 60) -> nn.Module:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def text_batch(step: int, vocabulary: int = 60) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(0, vocabulary, (4, 7), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def image_batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(6, 1, 6, 6, generator=draw), torch.randint(0, 3, (6,), generator=draw)


def on(place: torch.device, batch, dtype: torch.dtype = torch.float32):
    """The batch there, its images in a dtype."""
    return to_device(batch if isinstance(batch, dict) else (batch[0].to(dtype), batch[1]), place)


CASES = {"bert": (tiny_bert, text_batch), "resnet": (TinyResNet, image_batch)}


def random_mask(model: nn.Module, density: float = 0.2, seed: int = 1, whole: tuple[str, ...] = ()) -> Mask:
    """Some coordinates, two tensors without any, and the named modules whole."""
    draw = torch.Generator().manual_seed(seed)
    index = ParameterIndex.of(model)
    flags = {name: torch.rand(shape, generator=draw) < density for name, shape in index.shapes.items()}
    for name in list(index)[3:5]:
        flags[name][:] = False
    for name in index.within(whole):
        flags[name][:] = True
    return Mask.from_bool(flags)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_frozen(model: nn.Module, before: dict[str, Tensor], mask: Mask) -> None:
    for name, flag in mask.to_bool().items():
        after = dict(model.named_parameters())[name].detach()
        flag = flag.to(after.device)
        assert torch.equal(after[~flag].view(torch.uint8), before[name][~flag].view(torch.uint8)), name


class Oracle:
    """Plain dense training, masked from outside: one leaf of the gathered values."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self.model = model
        self.named = dict(model.named_parameters())
        self.flags = {name: flag.to(self.named[name].device) for name, flag in mask.to_bool().items()}
        gathered = [self.named[name].detach()[flag].float() for name, flag in self.flags.items()]
        self.leaf = nn.Parameter(torch.cat(gathered))

    def collect(self) -> None:
        """Set the leaf's gradient from the dense gradients accumulated so far."""
        parts = []
        for name, flag in self.flags.items():
            grad = self.named[name].grad
            parts.append(self.leaf.new_zeros(int(flag.sum())) if grad is None else grad[flag].float())
        self.leaf.grad = torch.cat(parts)
        self.model.zero_grad()

    @torch.no_grad()
    def write(self) -> None:
        position = 0
        for name, flag in self.flags.items():
            count = int(flag.sum())
            part = self.leaf[position : position + count]
            self.named[name][flag] = part.to(self.named[name].dtype)
            position += count


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.05),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, weight_decay=0.01),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_frozen_is_frozen_and_theta_is_the_oracles(
    case: str, optimizer: str, dtype: torch.dtype, place: torch.device
) -> None:
    make, batches = CASES[case]
    model = make().to(place, dtype)
    twin = copy.deepcopy(model)
    mask = random_mask(model, whole=("classifier",) if case == "bert" else ("fc",))
    before = state_of(model)
    oracle = Oracle(twin, mask)
    masked = MaskedParameters(model, mask)
    assert masked.values.dtype == torch.float32 and masked.values.shape == (mask.nnz,)
    assert torch.equal(masked.values, oracle.leaf)
    ours, plain = OPTIMIZERS[optimizer]([masked.values]), OPTIMIZERS[optimizer]([oracle.leaf])
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.2, 1.0, 3) for o in (ours, plain)]
    for step in range(4):
        batch = on(place, batches(step), dtype)
        example_losses(model, batch).mean().backward()
        assert all(p.grad is None for p in model.parameters())
        example_losses(twin, batch).mean().backward()
        oracle.collect()
        torch.testing.assert_close(masked.values.grad, oracle.leaf.grad, rtol=0, atol=1e-6)
        for theta, opt, schedule in ((masked.values, ours, schedules[0]), (oracle.leaf, plain, schedules[1])):
            nn.utils.clip_grad_norm_([theta], 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()
        masked.write_()
        oracle.write()
    assert_frozen(model, before, mask)
    torch.testing.assert_close(
        masked.values, oracle.leaf, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 2e-3
    )
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= {n for n in mask.index if mask.count(n)}


@pytest.mark.parametrize("case", CASES)
def test_autocast_with_a_gradient_scaler_gives_the_oracles_theta(case: str, place: torch.device) -> None:
    make, batches = CASES[case]
    model = make().to(place)
    twin = copy.deepcopy(model)
    mask = random_mask(model)
    before = state_of(model)
    masked, oracle = MaskedParameters(model, mask), Oracle(twin, mask)
    thetas = [masked.values, oracle.leaf]
    opts = [torch.optim.SGD([theta], lr=0.05, momentum=0.9, weight_decay=0.01) for theta in thetas]
    scalers = [torch.amp.GradScaler(place.type, init_scale=1024.0) for _ in thetas]
    for step in range(3):
        for net, opt, scaler, theta in zip((model, twin), opts, scalers, thetas, strict=True):
            with torch.autocast(place.type, torch.bfloat16):
                loss = example_losses(net, on(place, batches(step))).mean()
            scaler.scale(loss).backward()
            if theta is oracle.leaf:
                oracle.collect()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_([theta], 1.0)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        masked.write_()
        oracle.write()
    assert_frozen(model, before, mask)
    torch.testing.assert_close(masked.values, oracle.leaf, rtol=1e-3, atol=1e-4)
    start = torch.cat([before[n].reshape(-1)[mask.indices[n].to(place)] for n in mask.index])
    assert float((masked.values.detach() - start).abs().max()) > 1e-3


def test_fp16_weights_keep_an_fp32_master(place: torch.device) -> None:
    weight = nn.Linear(8, 8, bias=False).to(place, torch.float16)
    mask = Mask.top_k({"weight": weight.weight.detach().float().abs()}, 0.5)
    masked = MaskedParameters(weight, mask)
    start = masked.values.detach().clone()
    before = weight.weight.detach().clone()
    opt = torch.optim.SGD([masked.values], lr=1e-5)
    for _ in range(200):  # each update is below half an fp16 step; together they are above it
        masked.values.grad = torch.ones_like(masked.values)
        opt.step()
        masked.write_()
    torch.testing.assert_close(masked.values.detach(), start - 2e-3, rtol=0, atol=1e-5)
    moved = weight.weight.detach() != before
    assert int(moved.sum()) == mask.nnz


def test_float64_models_keep_their_precision() -> None:
    model = nn.Linear(5, 5).double()
    before = state_of(model)
    masked = MaskedParameters(model, random_mask_of_all(model))
    masked.write_()
    assert masked.values.dtype == torch.float64
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def random_mask_of_all(model: nn.Module) -> Mask:
    index = ParameterIndex.of(model)
    return Mask.covering(index, list(index))


def test_optimizer_state_is_k_sized() -> None:
    model = tiny_bert()
    mask = random_mask(model, 0.01)
    masked = MaskedParameters(model, mask)
    opt = torch.optim.AdamW([masked.values])
    example_losses(model, text_batch(0)).mean().backward()
    opt.step()
    held = sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values())
    assert held == 2 * 4 * mask.nnz + 4
    assert masked.values.grad is not None and masked.values.grad.numel() == mask.nnz


@pytest.mark.parametrize("case", CASES)
def test_one_dense_gradient_is_alive_at_a_time(case: str, place: torch.device) -> None:
    make, batches = CASES[case]
    model = make().to(place)
    MaskedParameters(model, random_mask(model, 0.3))
    seen: list[int] = []
    trained = [p for p in model.parameters() if p.requires_grad]

    def look(parameter: Tensor) -> None:
        seen.append(sum(p.grad is not None for p in trained))

    for parameter in trained:
        parameter.register_hook(look)  # runs when its gradient arrives, before it is stored
        parameter.register_post_accumulate_grad_hook(look)  # runs after the product's hook of the same tensor
    example_losses(model, on(place, batches(0))).mean().backward()
    assert len(seen) >= 2 * len(trained) and max(seen) == 0  # before its own arrives, and after it was taken


def test_no_gradient_is_formed_for_tensors_without_coordinates() -> None:
    model = tiny_bert()
    mask = random_mask(model)
    MaskedParameters(model, mask)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in mask.index if mask.count(n)}


@pytest.mark.parametrize("cover", ["some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_embeddings_give_the_dense_gradient_without_forming_it(
    cover: str, dtype: torch.dtype, place: torch.device
) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(embeddings.SPARSE_ROWS, 4, padding_idx=1), nn.Linear(4, 3))
    model = model.to(place, dtype)
    twin = copy.deepcopy(model)
    mask = random_mask_of_all(model) if cover == "all" else random_mask(model, 0.3)
    oracle = Oracle(twin, mask)
    masked = MaskedParameters(model, mask)
    layouts = []
    model[0].weight.register_hook(lambda g: layouts.append(g.layout))
    ids = torch.randint(0, 40, (5, 9)).to(place)  # repeated tokens, and the padding row
    for part in ids.split(2):
        model(part).float().square().sum().backward()
        twin(part).float().square().sum().backward()
    oracle.collect()
    assert layouts == [torch.sparse_coo] * 3
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(masked.values.grad, oracle.leaf.grad, rtol=tolerance, atol=tolerance)
    masked.release()
    assert model[0].sparse is False


def test_embeddings_with_no_masked_row_in_the_batch_get_zero(place: torch.device) -> None:
    model = nn.Sequential(nn.Embedding(embeddings.SPARSE_ROWS, 4), nn.Linear(4, 3)).to(place)
    index = ParameterIndex.of(model)
    mask = Mask(index, {"0.weight": torch.tensor([0, 5, 4 * embeddings.SPARSE_ROWS - 1])})
    masked = MaskedParameters(model, mask)
    # An overflow in a frozen row stays there.
    (model(torch.tensor([[7, 9]], device=place)).sum() * torch.inf).backward()
    assert masked.values.grad.tolist() == [0.0] * 3
    model(torch.zeros(0, 2, dtype=torch.int64, device=place)).sum().backward()
    assert masked.values.grad.tolist() == [0.0] * 3


def test_tied_weights_count_once_and_stay_dense(place: torch.device) -> None:
    config = GPT2Config(
        vocab_size=embeddings.SPARSE_ROWS, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=True,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(place)
    twin = copy.deepcopy(model)
    mask = random_mask(model, 0.1)
    assert "lm_head.weight" not in mask.index
    before = state_of(model)
    masked, oracle = MaskedParameters(model, mask), Oracle(twin, mask)
    assert model.transformer.wte.sparse is False
    ids = torch.randint(0, 50, (2, 6)).to(place)
    for net in (model, twin):
        net(ids, labels=ids).loss.backward()
    oracle.collect()
    torch.testing.assert_close(masked.values.grad, oracle.leaf.grad, rtol=1e-5, atol=1e-7)
    opts = [torch.optim.AdamW([theta], lr=0.1) for theta in (masked.values, oracle.leaf)]
    for opt in opts:
        opt.step()
    masked.write_()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_frozen(model, before, mask)


def test_the_gradient_accumulates_like_one_larger_batch(place: torch.device) -> None:
    model = tiny_bert().to(place)
    masked = MaskedParameters(model, random_mask(model))
    losses = example_losses(model, on(place, text_batch(0)))
    losses.sum().backward()
    whole = masked.values.grad.clone()
    masked.values.grad = None
    losses = example_losses(model, on(place, text_batch(0)))
    losses[:1].sum().backward(retain_graph=True)
    losses[1:].sum().backward()
    torch.testing.assert_close(masked.values.grad, whole, rtol=1e-4, atol=1e-6)
    masked.values.grad.zero_()  # zero_grad(set_to_none=False)
    example_losses(model, on(place, text_batch(0))).sum().backward()
    torch.testing.assert_close(masked.values.grad, whole, rtol=1e-4, atol=1e-6)


def test_gradients_of_two_steps_are_two_tensors() -> None:
    model = tiny_bert()
    masked = MaskedParameters(model, random_mask(model))
    example_losses(model, text_batch(0)).sum().backward()
    first, copied = masked.values.grad, masked.values.grad.clone()
    masked.values.grad = None
    example_losses(model, text_batch(1)).sum().backward()
    assert torch.equal(first, copied) and not torch.equal(first, masked.values.grad)


@pytest.mark.parametrize("cover", ["some", "all"])
def test_a_tensor_unused_in_a_backward_counts_as_zero_gradient(cover: str, place: torch.device) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).to(place)
    index = ParameterIndex.of(model)
    some = Mask(index, {"used.weight": torch.tensor([0, 4]), "idle.weight": torch.tensor([1, 2, 5])})
    masked = MaskedParameters(model, random_mask_of_all(model) if cover == "all" else some)
    x, (used, idle) = torch.ones(1, 3, device=place), (8, 8) if cover == "all" else (2, 3)
    for _ in range(2):
        model["used"](x).sum().backward()
        assert masked.values.grad.tolist() == [1.0] * used + [0.0] * idle
        model["idle"](x).sum().backward()  # the first for its tensors, the second for θ
        model["used"](x).sum().backward()
        assert masked.values.grad.tolist() == [2.0] * used + [1.0] * idle
        masked.values.grad = None


def test_a_gradient_that_the_caller_changed_or_set_is_added_to(place: torch.device) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).to(place)
    masked = MaskedParameters(model, random_mask_of_all(model))
    x = torch.ones(1, 3, device=place)
    model["used"](x).sum().backward()
    masked.values.grad.add_(0.5)
    model["idle"](x).sum().backward()
    assert masked.values.grad.tolist() == [1.5] * 16
    masked.values.grad = torch.full_like(masked.values, 0.5)
    (model["idle"](x) + model["used"](x)).sum().backward()
    assert masked.values.grad.tolist() == [1.5] * 16


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(embeddings.SPARSE_ROWS, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.recompute = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = (
                checkpoint(lambda y, m=layer: m(y).tanh(), x, use_reentrant=False)
                if self.recompute
                else layer(x).tanh()
            )
        return x.mean(1)


@pytest.mark.parametrize("embedding_frozen", [False, True])
@pytest.mark.parametrize("way", ["checkpoint", "compile"])
def test_checkpointing_and_compile_give_the_same_theta(
    way: str, embedding_frozen: bool, place: torch.device
) -> None:
    thetas = []
    for special in (False, True):
        torch.manual_seed(0)
        model = Checkpointed().to(place)
        mask = random_mask(model, 0.3)
        if embedding_frozen:
            mask = mask - Mask.covering(mask.index, ["embed.weight"])
        run: nn.Module = model
        if special and way == "compile":
            torch._dynamo.reset()
            run = torch.compile(model, backend="aot_eager")
        model.recompute = special and way == "checkpoint"
        masked = MaskedParameters(run, mask)
        opt = torch.optim.AdamW([masked.values], lr=1e-2)
        for step in range(3):
            ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(step))
            example_losses(run, on(place, (ids, torch.tensor([0, 1, 2, 3])), ids.dtype)).mean().backward()
            opt.step()
            masked.write_()
            opt.zero_grad()
        thetas.append(masked.values.detach())
    torch.testing.assert_close(thetas[1], thetas[0], rtol=1e-5, atol=1e-6)


def test_writing_between_forward_and_backward_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    masked = MaskedParameters(model, random_mask_of_all(model))
    loss = model(torch.ones(1, 3)).sum()
    masked.write_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_channels_last_weights_are_read_and_written_by_logical_coordinate(place: torch.device) -> None:
    model = TinyResNet().to(place).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    mask = random_mask(model, whole=("blocks.0.conv",))
    thetas = []
    for net in (model, twin):
        masked = MaskedParameters(net, mask)
        opt = torch.optim.SGD([masked.values], lr=0.1)
        example_losses(net, on(place, image_batch(0))).mean().backward()
        opt.step()
        masked.write_()
        thetas.append(masked.values.detach())
    assert not model.stem.weight.is_contiguous() or not model.blocks[0].conv.weight.is_contiguous()
    torch.testing.assert_close(thetas[0], thetas[1], rtol=1e-5, atol=1e-6)
    for (_, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw-fused", "adamw-foreach", "sgd-nesterov", "rmsprop"])
def test_moments_follow_the_coordinates_that_stay(name: str, place: torch.device) -> None:
    model = tiny_bert().to(place)
    first, second = random_mask(model, 0.3, seed=1), random_mask(model, 0.3, seed=2, whole=("classifier",))
    masked = MaskedParameters(model, first)
    theta = masked.values
    opt = OPTIMIZERS[name]([theta])
    for step in range(3):
        example_losses(model, on(place, text_batch(step))).mean().backward()
        opt.step()
        opt.zero_grad()
        if step < 2:
            masked.write_()  # the last one is left to remask_

    def spread(vector: Tensor, mask: Mask) -> dict[tuple[str, int], float]:
        names = [(n, int(i)) for n in mask.index for i in mask.indices[n]]
        return dict(zip(names, vector.detach().tolist(), strict=True))

    old_theta = spread(theta, first)
    old = {k: spread(v, first) for k, v in opt.state[theta].items() if v.shape == theta.shape}
    old_step = opt.state[theta].get("step", torch.tensor(0)).item()
    masked.remask_(second, opt)
    assert masked.values is theta and theta.grad is None and theta.numel() == second.nnz
    weights = {n: p.detach().reshape(-1) for n, p in model.named_parameters()}
    for key, value in spread(theta, second).items():
        assert value == old_theta.get(key, float(weights[key[0]][key[1]]))
    for key, value in old_theta.items():  # what was trained and dropped stays in the model as it was
        assert float(weights[key[0]][key[1]]) == value
    assert old
    for moment, was in old.items():
        now = spread(opt.state[theta][moment], second)
        assert now == {key: was.get(key, 0.0) for key in now}
    assert opt.state[theta].get("step", torch.tensor(0)).item() == old_step

    before = state_of(model)
    example_losses(model, on(place, text_batch(9))).mean().backward()
    opt.step()
    masked.write_()
    assert_frozen(model, before, second)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_remask_refuses_what_does_not_fit_and_changes_nothing() -> None:
    model = tiny_bert()
    mask = random_mask(model)
    masked = MaskedParameters(model, mask)
    with pytest.raises(ParamsError, match="does not hold"):
        masked.remask_(mask, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(MismatchError, match="embeddings"):
        masked.remask_(random_mask(tiny_bert(61)))
    assert masked.mask is mask
    example_losses(model, text_batch(0)).mean().backward()
    assert masked.values.grad.shape == (mask.nnz,)


def test_release_gives_the_model_back() -> None:
    model = nn.Sequential(nn.Embedding(embeddings.SPARSE_ROWS, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    mask = random_mask(model)
    with MaskedParameters(model, mask) as masked:
        assert model[0].sparse
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags and not model[0].sparse
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    assert model[2].weight.grad is not None and masked.values.grad is None
    with pytest.raises(ModelError, match="released"):
        masked.write_()
    masked.release()


def test_masking_again_releases_the_earlier_object() -> None:
    model = tiny_bert()
    first = MaskedParameters(model, random_mask(model, seed=1))
    index = first.mask.index
    second = MaskedParameters(model, Mask.covering(index, ["classifier.bias"]))
    example_losses(model, text_batch(0)).mean().backward()
    assert first.values.grad is None and second.values.grad.shape == (3,)
    with pytest.raises(ModelError):
        first.write_()
    second.release()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), r"'1.weight' is \[3, 4\].*\[2, 4\]"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), "'1.weight'.*not in this one"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 1)), "'2.weight'.*requires grad"),
    ],
)
def test_a_mask_of_another_model_is_refused_by_name(other: Callable[[], nn.Module], named: str) -> None:
    mask = random_mask_of_all(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))
    model = other()
    with pytest.raises(MismatchError, match=named):
        MaskedParameters(model, mask)
    assert all(p.requires_grad for p in model.parameters())


def test_models_on_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(ModelError, match="'1.weight' is on meta"):
        MaskedParameters(model, random_mask_of_all(model))


@pytest.mark.parametrize("change", ["moved", "assigned"])
def test_a_model_moved_or_reassigned_while_masked_is_refused(change: str) -> None:
    model = nn.Linear(3, 3)
    masked = MaskedParameters(model, random_mask_of_all(model))
    if change == "moved":
        model.to("meta")
    else:
        model.load_state_dict({n: p.detach().clone() for n, p in model.named_parameters()}, assign=True)
    with pytest.raises(ModelError, match="'weight' was moved or replaced"):
        masked.write_()
