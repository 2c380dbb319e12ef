"""Delta: exact apply, revert and swap; a wrong base refused; all or nothing."""

import copy
from itertools import combinations
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from pipeline.deltas import target as writing
from pipeline.deltas.delta import Delta
from pipeline.deltas.thin import content_digest
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, base_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread_seeded")


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.fc(F.relu(x + self.norm2(self.conv2(x))).mean(dim=(2, 3)))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


CASES = {"bert": (bert, "classifier"), "resnet": (SmallResNet, "fc")}


def mask_of(model: nn.Module, seed: int = 1, density: float = 0.1, whole: tuple[str, ...] = ()) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    index = ParameterIndex.of(model)
    flags = {name: torch.rand(shape, generator=draw) < density for name, shape in index.shapes.items()}
    for name in index.within(whole):
        flags[name][:] = True
    return Mask.from_bool(flags)


@torch.no_grad()
def train(base: nn.Module, mask: Mask, seed: int = 2) -> nn.Module:
    """Stand in for training: every chosen value and every buffer gets other bits, odd ones included."""
    draw = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf])
    for name, parameter in model.named_parameters():
        coordinates = mask.indices[name]
        if coordinates.numel():
            values = torch.randn(coordinates.numel(), generator=draw) * 0.1
            values[: len(odd)] = odd[: len(values)]
            parameter.view(-1)[coordinates] = values.to(parameter.dtype)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.add_(torch.rand(buffer.shape, generator=draw).to(buffer.dtype))
        if name.endswith("num_batches_tracked"):
            buffer.add_(17)
    return model


def bits(model: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for name, t in state.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["module", "state dict", "digest", "partial digest"])
@pytest.mark.parametrize("case", CASES)
def test_apply_gives_the_trained_model_and_revert_the_base(case: str, given: str, dtype: torch.dtype) -> None:
    make, head = CASES[case]
    base = make().to(dtype)
    mask = mask_of(base, whole=(head,))
    trained = train(base, mask)
    whole = [name for name in mask.index if mask.whole(name)]
    source = {
        "module": base,
        "state dict": base.state_dict(),
        "digest": base_digest(base),
        "partial digest": base_digest(base, without=whole),
    }[given]
    delta = Delta.of(trained, mask, base=source)
    model = copy.deepcopy(base)
    if given != "digest":  # a head drawn anew is replaced whole and does not matter
        model.get_submodule(head).reset_parameters()
    before = bits(model)
    delta.apply_(model)
    assert_same(bits(model), bits(trained))
    delta.revert_(model)
    assert_same(bits(model), before)
    assert all(values.dtype == dtype for values in delta.values.values())


def test_a_digest_of_the_whole_base_does_not_accept_another_head() -> None:
    base = bert()
    mask = mask_of(base, whole=("classifier",))
    delta = Delta.of(train(base, mask), mask, base=base_digest(base))
    base.classifier.reset_parameters()
    with pytest.raises(MismatchError, match="not the delta's base"):
        delta.apply_(base)


def test_the_delta_is_a_copy_of_its_models() -> None:
    base = SmallResNet()
    mask = mask_of(base, whole=("fc",))
    trained = train(base, mask)
    delta = Delta.of(trained, mask, base=base, keep_base=True)
    wanted, digest = bits(trained), delta.digest
    start = bits(base)
    model = copy.deepcopy(base)
    for tensor in [*trained.state_dict().values(), *base.state_dict().values()]:
        tensor.zero_()
    delta.apply_(model)
    assert_same(bits(model), wanted)
    delta.revert_(model)
    assert_same(bits(model), start)
    assert delta.digest == digest


def test_state_dicts_and_compiled_models_are_written_in_place() -> None:
    base = SmallResNet()
    mask = mask_of(base)
    trained = train(base, mask)
    delta = Delta.of(torch.compile(trained, backend="eager"), mask, base=torch.compile(base, backend="eager"))
    state = {name: t.clone() for name, t in base.state_dict().items()}
    start = bits(state)
    delta.apply_(state)
    assert_same(bits(state), bits(trained))
    delta.revert_(state)
    assert_same(bits(state), start)
    model = copy.deepcopy(base)
    delta.apply_(torch.compile(model, backend="eager"))
    assert_same(bits(model), bits(trained))
    delta.revert_(model)  # the same model, unwrapped
    assert_same(bits(model), start)


def test_tied_weights_are_written_under_all_their_names() -> None:
    config = GPT2Config(
        bos_token_id=0,
        eos_token_id=0,
        vocab_size=20,
        n_positions=6,
        n_embd=8,
        n_layer=1,
        n_head=2,
        tie_word_embeddings=True,
    )
    base = GPT2LMHeadModel(config)
    mask = mask_of(base, density=0.2)
    trained = train(base, mask)
    delta = Delta.of(trained, mask, base=base)
    assert "lm_head.weight" not in delta.values and delta.layout.ties == {
        "lm_head.weight": "transformer.wte.weight"
    }
    state = {name: t.clone() for name, t in base.state_dict().items()}  # now two tensors
    delta.apply_(state)
    assert_same(bits(state), bits(trained))
    alone = {name: t.clone() for name, t in base.state_dict().items() if name != "transformer.wte.weight"}
    delta.apply_(alone)
    assert torch.equal(
        alone["lm_head.weight"].view(torch.uint8), trained.lm_head.weight.detach().view(torch.uint8)
    )
    split = {name: t.clone() for name, t in base.state_dict().items()}
    split["lm_head.weight"].zero_()
    with pytest.raises(MismatchError, match="tied tensor 'transformer.wte.weight'"):
        delta.apply_(split)
    model = copy.deepcopy(base)
    delta.apply_(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same(bits(model), bits(trained))


def test_channels_last_models_are_written_by_logical_coordinate() -> None:
    base = SmallResNet()
    mask = mask_of(base, density=0.3)
    trained = train(base, mask)
    delta = Delta.of(copy.deepcopy(trained).to(memory_format=torch.channels_last), mask, base=base)
    assert delta == Delta.of(trained, mask, base=base)
    model = copy.deepcopy(base).to(memory_format=torch.channels_last)
    delta.apply_(model)
    assert_same(bits(model), bits(trained))


@pytest.mark.parametrize("keeps", ["digest", "module"])
def test_a_wrong_base_is_refused_before_anything_is_written(keeps: str) -> None:
    base = SmallResNet()
    mask = mask_of(base, whole=("fc",))
    delta = Delta.of(train(base, mask), mask, base=base_digest(base) if keeps == "digest" else base)
    other = copy.deepcopy(base)
    other.conv2.weight.data[0, 0, 0, 0] = torch.nextafter(other.conv2.weight.data[0, 0, 0, 0], torch.tensor(9.0))
    before = bits(other)
    named = "'conv2.weight' differs.*" if keeps == "module" else ""
    with pytest.raises(MismatchError, match=f"not the delta's base.*{named}load the base"):
        delta.apply_(other)
    assert_same(bits(other), before)


def wider() -> nn.Module:
    model = SmallResNet()
    model.fc = nn.Linear(4, 5)
    return model


def longer() -> nn.Module:
    model = SmallResNet()
    model.fc2 = nn.Linear(4, 5)
    return model


def shorter() -> nn.Module:
    model = SmallResNet()
    del model.norm2
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (wider, r"'fc.weight' is \[5, 4\] in this model and \[3, 4\]"),
        (longer, "'fc2.weight' of this model is unknown"),
        (shorter, "'norm2.weight' .* is not in this model"),
        (lambda: SmallResNet().bfloat16(), "'conv.weight' is bfloat16 in this model and float32"),
        (lambda: {n: t for n, t in SmallResNet().state_dict().items() if "mean" not in n}, "'norm.running_mean'"),
    ],
)
def test_another_model_is_refused_by_the_first_tensor_that_differs(make, named: str) -> None:
    base = SmallResNet()
    mask = mask_of(base)
    delta = Delta.of(train(base, mask), mask, base=base)
    model = make()
    before = bits(model)
    with pytest.raises(MismatchError, match=named):
        delta.apply_(model)
    assert_same(bits(model), before)


def test_training_outside_the_mask_is_noticed() -> None:
    base = SmallResNet()
    mask = mask_of(base, whole=("fc",))
    trained = train(base, mask)
    free = int((~mask.to_bool()["conv2.weight"]).reshape(-1).nonzero()[0])
    trained.conv2.weight.data.view(-1)[free] += 1
    with pytest.raises(MismatchError, match="'conv2.weight' of the trained model differs"):
        Delta.of(trained, mask, base=base)


class Interrupted(BaseException):
    """Not an Exception, as Ctrl-C is none."""


@pytest.mark.parametrize("action", ["apply", "revert", "swap"])
@pytest.mark.parametrize("nth", range(10))
def test_a_write_that_fails_leaves_the_model_as_it_was(
    action: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = SmallResNet()
    mask, other = mask_of(base, 1, whole=("fc",)), mask_of(base, 5)
    delta, second = Delta.of(train(base, mask), mask, base=base), Delta.of(train(base, other, 6), other, base=base)
    model = copy.deepcopy(base)
    if action != "apply":
        delta.apply_(model)
    before = bits(model)
    calls, put_ = 0, writing.put_

    def failing(tensor: Tensor, at: Tensor | None, values: Tensor) -> None:
        nonlocal calls
        put_(tensor, at, values)
        if any(tensor is own for own in model.state_dict(keep_vars=True).values()):
            calls += 1
            if calls == nth + 1:
                raise Interrupted

    monkeypatch.setattr(writing, "put_", failing)
    actions = {
        "apply": lambda: delta.apply_(model),
        "revert": lambda: delta.revert_(model),
        "swap": lambda: Delta.swap_(model, delta, second),
    }
    with pytest.raises(Interrupted):
        actions[action]()
    assert_same(bits(model), before)
    monkeypatch.undo()
    actions[action]()  # and it can be done again
    assert bits(model).keys() == before.keys() and any(not torch.equal(bits(model)[n], before[n]) for n in before)


def test_applying_twice_changes_nothing_where_the_base_is_known_and_is_refused_elsewhere() -> None:
    base = SmallResNet()
    mask = mask_of(base)
    trained = train(base, mask)
    delta = Delta.of(trained, mask, base=base)
    model = copy.deepcopy(base)
    delta.apply_(model)
    delta.apply_(model)
    assert_same(bits(model), bits(trained))
    delta.revert_(model)
    assert_same(bits(model), bits(base))
    with pytest.raises(MismatchError, match="already"):
        delta.apply_(copy.deepcopy(trained))
    keeping = Delta.of(trained, mask, base=base, keep_base=True)
    keeping.apply_(trained)
    spoilt = copy.deepcopy(trained)
    free = int((~mask.to_bool()["conv2.weight"]).reshape(-1).nonzero()[0])
    spoilt.conv2.weight.data.view(-1)[free] += 1
    with pytest.raises(MismatchError):
        keeping.apply_(spoilt)


def test_revert_needs_the_delta_in_place_and_the_bases_values() -> None:
    base = SmallResNet()
    mask = mask_of(base)
    trained = train(base, mask)
    delta = Delta.of(trained, mask, base=base)
    with pytest.raises(MismatchError, match="not known"):
        delta.revert_(copy.deepcopy(trained))
    keeping = Delta.of(trained, mask, base=base, keep_base=True)
    for kept in (keeping, delta.with_base(base)):
        model = copy.deepcopy(trained)
        kept.revert_(model)
        assert_same(bits(model), bits(base))
        assert kept == delta
    with pytest.raises(MismatchError, match="tensor 'conv.weight' does not hold"):
        keeping.revert_(copy.deepcopy(base))
    moved = copy.deepcopy(trained)
    moved.norm.num_batches_tracked += 1
    before = bits(moved)
    with pytest.raises(MismatchError, match="buffer 'norm.num_batches_tracked'"):
        keeping.revert_(moved)
    assert_same(bits(moved), before)
    frozen = copy.deepcopy(trained)
    frozen.conv2.weight.data.view(-1)[int((~mask.to_bool()["conv2.weight"]).reshape(-1).nonzero()[0])] += 1
    with pytest.raises(MismatchError, match="'conv2.weight' differs"):
        keeping.revert_(frozen)
    with pytest.raises(MismatchError, match="not the delta's base"):
        delta.with_base(trained)
    with pytest.raises(ParamsError, match="keep_base"):
        Delta.of(trained, mask, base=base_digest(base), keep_base=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_swaps_drift_by_nothing(dtype: torch.dtype) -> None:
    base = SmallResNet().to(dtype)
    masks = [mask_of(base, seed, whole=whole) for seed, whole in ((1, ("fc",)), (2, ("fc",)), (3, ("fc", "conv")))]
    models = [train(base, mask, seed) for seed, mask in enumerate(masks)]
    deltas = [Delta.of(model, mask, base=base) for model, mask in zip(models, masks, strict=True)]
    assert deltas[0].base == deltas[1].base != deltas[2].base  # another set of whole tensors, the same base
    model = copy.deepcopy(base)
    deltas[0].apply_(model)
    for step in range(1000):
        Delta.swap_(model, deltas[step % 3], deltas[(step + 1) % 3])
        if step % 100 < 3:
            assert_same(bits(model), bits(models[(step + 1) % 3]))
    last = 1000 % 3
    assert_same(bits(model), bits(models[last]))
    deltas[last].revert_(model)
    assert_same(bits(model), bits(base))


def test_swapping_reads_no_frozen_value(monkeypatch: pytest.MonkeyPatch) -> None:
    base = SmallResNet()
    masks = [mask_of(base, 1), mask_of(base, 2)]
    models = [train(base, mask, seed) for seed, mask in enumerate(masks)]
    a, b = (Delta.of(model, mask, base=base) for model, mask in zip(models, masks, strict=True))
    a.apply_(base)
    monkeypatch.setattr(writing, "tensor_digest", lambda tensor: pytest.fail("a whole tensor was hashed"))
    Delta.swap_(base, a, b)
    assert_same(bits(base), bits(models[1]))


def test_swaps_that_cannot_be_exact_are_refused() -> None:
    base, stranger = SmallResNet(), SmallResNet()
    masks = [mask_of(base, 1), mask_of(base, 2)]
    a, b = (Delta.of(train(base, m, i), m, base=base) for i, m in enumerate(masks))
    foreign = Delta.of(train(stranger, masks[1]), masks[1], base=stranger)
    covering = Delta.of(train(base, masks[0] | masks[1]), masks[0] | masks[1], base=base)
    held = train(base, masks[0], 0)  # holds a, which was never applied to it and keeps no base
    before = bits(held)
    with pytest.raises(MismatchError, match="not known"):
        Delta.swap_(held, a, b)
    with pytest.raises(MismatchError, match="different bases"):
        Delta.swap_(held, a, foreign)
    with pytest.raises(MismatchError, match="does not hold"):
        Delta.swap_(held, b, a)
    assert_same(bits(held), before)
    Delta.swap_(held, a, covering)  # replaces all of a: needs no base value
    assert_same(bits(held), bits(train(base, masks[0] | masks[1])))
    with pytest.raises(MismatchError, match="not known"):
        covering.revert_(held)
    other = bert()
    with pytest.raises(MismatchError, match="different models"):
        Delta.swap_(held, covering, Delta.of(other, mask_of(other), base=other))


def test_swapping_back_and_forth_with_kept_base_values_needs_no_apply() -> None:
    base = bert()
    masks = [mask_of(base, 1, whole=("classifier",)), mask_of(base, 2, whole=("classifier",))]
    models = [train(base, mask, seed) for seed, mask in enumerate(masks)]
    a, b = (Delta.of(m, k, base=base, keep_base=True) for m, k in zip(models, masks, strict=True))
    held = copy.deepcopy(models[0])
    Delta.swap_(held, a, b)
    assert_same(bits(held), bits(models[1]))
    b.revert_(held)
    assert_same(bits(held), bits(base))


def test_dense_deltas_replace_any_base() -> None:
    base, other = SmallResNet(), SmallResNet()
    mask = Mask.covering(ParameterIndex.of(base), list(ParameterIndex.of(base)))
    trained = train(base, mask)
    delta = Delta.of(trained, mask, base=base)
    before = bits(other)
    delta.apply_(other)
    assert_same(bits(other), bits(trained))
    delta.revert_(other)
    assert_same(bits(other), before)


def test_summary_and_norms_against_float64() -> None:
    base = SmallResNet()
    mask = mask_of(base, whole=("fc",))
    trained = copy.deepcopy(base)
    for name, parameter in trained.named_parameters():
        parameter.data.view(-1)[mask.indices[name]] += 0.25
    assert Delta.of(trained, mask, base=base).norms() == {}
    delta = Delta.of(trained, mask, base=base, keep_base=True)
    before = dict(base.named_parameters())
    wanted = {
        n: float((p.detach().double() - before[n].detach().double()).norm()) for n, p in trained.named_parameters()
    }
    for row in delta.summary():
        count = mask.count(row["name"])
        assert (row["count"], row["size"]) == (count, before[row["name"]].numel())
        assert row["density"] == count / before[row["name"]].numel()
        if count:
            assert row["norm"] == pytest.approx(wanted[row["name"]], rel=1e-12)
        else:
            assert row["norm"] is None and wanted[row["name"]] == 0
    assert delta.nbytes == 4 * mask.nnz + sum(
        b.numel() * b.element_size() for n, b in trained.named_buffers() if n != "scratch"
    )


def test_the_digest_is_of_the_content_alone() -> None:
    base = SmallResNet()
    mask = mask_of(base)
    trained = train(base, mask)
    delta = Delta.of(trained, mask, base=base, info={"seed": 1})
    assert delta == Delta.of(trained, mask, base=base, keep_base=True, info={"seed": 2})
    assert delta != Delta.of(trained, mask, base="0" * 64)
    assert delta != Delta.of(base, mask, base=base)
    moved = copy.deepcopy(trained)
    moved.norm.num_batches_tracked += 1
    assert delta != Delta.of(moved, mask, base=base)
    assert (
        delta.info == {"seed": 1, "parent": mask.digest}
        and "scratch" not in delta.buffers
        and len(delta.buffers) == 6
    )


def test_the_digest_knows_no_file_order_coder_or_provenance(tmp_path, monkeypatch) -> None:
    """Every way of writing a delta makes another file of the same digest; of a few values some ways agree."""
    base = nn.Sequential(nn.Linear(60, 80), nn.BatchNorm1d(80), nn.Linear(80, 6))
    shapes = ParameterIndex.of(base).shapes
    share = {name: torch.rand(shape[0], 1) * torch.rand(1, prod(shape[1:])) for name, shape in shapes.items()}
    chosen = {n: (share[n] > 0.35).reshape(shape) for n, shape in shapes.items()}  # clustered in rows and columns
    mask = Mask.from_bool(chosen, {"seed": 1})
    trained = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter[chosen[name]] += 1e-3 * torch.randn(mask.count(name))
        trained[1].running_mean += 1
    turned = Mask.from_bool({name: chosen[name] for name in reversed(chosen)}, {"seed": 1})
    renamed = Mask.from_bool(chosen, {"seed": 2})
    assert turned == mask == renamed and list(turned.index) != list(mask.index)
    info = {"seed": 1}
    ways = {
        "plain": Delta.of(trained, mask, base=base, info=info),
        "another order": Delta.of(trained, turned, base=base, info=info),
        "another provenance": Delta.of(trained, mask, base=base, info={"seed": 2}),
        "a mask of another provenance": Delta.of(trained, renamed, base=base, info=info),
        "the base's values kept": Delta.of(trained, mask, base=base, info=info, keep_base=True),
        "the base known by digest alone": Delta.of(
            trained, mask, base=base_digest(base, without=mask.whole_tensors), info=info
        ),
    }
    delta, files, pack = ways["plain"], {}, Mask.pack
    for coder in ("any", "Rice's"):
        for way, each in ways.items():
            for against in (None, base) if each.known.values is None else (None,):
                each.save(tmp_path / "d", base=against)
                files[coder, way, against is not None] = (tmp_path / "d").read_bytes()
                loaded = Delta.load(tmp_path / "d")
                assert (loaded.thin is not None) == (against is not None) and loaded == delta
                loaded.resolve(base)
                found = content_digest(loaded.mask, loaded.base, loaded.values, loaded.buffers)
                assert found == delta.digest and loaded.mask.digest == mask.digest
        monkeypatch.setattr(Mask, "pack", lambda self: pack(self, compact=False))
    assert len(files) == 22 and [(a, b) for a, b in combinations(files, 2) if files[a] == files[b]] == []


def test_bits_are_compared_and_not_values() -> None:
    same, zero = writing.same_bits, torch.tensor([0.0, 1.0])
    nan = torch.tensor([torch.nan])
    assert same(nan, nan.clone()) and not same(zero, -zero) and not same(zero, zero.double())
    assert not same(zero, zero[:1]) and same(zero[::2], torch.tensor([0.0]))
    empty = torch.from_numpy(torch.arange(6).numpy()[3:3])
    assert same(empty, torch.empty(0, dtype=torch.int64)) and same(torch.tensor(3), torch.tensor(3))
