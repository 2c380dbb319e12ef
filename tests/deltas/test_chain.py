"""Chain: every state restores bit for bit whatever was squashed, pruned or killed; what is damaged is refused."""

import copy
import fcntl
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import Chain
from pipeline.deltas import chain_base
from pipeline.deltas import steps as forms
from pipeline.deltas.overlay import merge
from pipeline.errors import ArtifactError, BusyError, FishmaskError, MismatchError, ParamsError, StorageError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
State = dict[str, bytes]


pytestmark = pytest.mark.usefixtures("one_thread_seeded")


class Net(nn.Module):
    """A network with a tied weight, BatchNorm's buffers, a frozen tensor and a buffer that is not saved."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.frozen = nn.Linear(width, 3, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.last = nn.Linear(width, 5)
        self.tied = nn.Linear(5, width, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def mask_of(model: nn.Module, seed: int, density: float = 0.2, whole: tuple[str, ...] = ()) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    index = ParameterIndex.of(model)
    flags = {name: torch.rand(shape, generator=draw) < density for name, shape in index.shapes.items()}
    for name in whole:
        flags[name][:] = True
    return Mask.from_bool(flags, info={"seed": seed})


@torch.no_grad()
def train_(model: nn.Module, mask: Mask, seed: int, buffers: bool = True) -> None:
    """Stand in for training: every chosen value and the buffers get other bits, odd ones included."""
    draw = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf])
    for name, parameter in model.named_parameters():
        coordinates = mask.indices.get(name, torch.empty(0, dtype=torch.int64))
        values = torch.randn(coordinates.numel(), generator=draw)
        values[: len(odd)] = odd[: len(values)]
        parameter.view(-1)[coordinates] = values.to(parameter.dtype)
    if buffers:
        model.norm.running_mean.add_(torch.rand(len(model.norm.running_mean), generator=draw))
        model.norm.num_batches_tracked.add_(seed % 3)


def bits(model: nn.Module | dict[str, Tensor]) -> State:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {
        n: bytes(t.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist()) for n, t in state.items()
    }


def garbage(model: nn.Module) -> nn.Module:
    """The same network with other values everywhere."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.fill_(3)
    return other


def assert_restores(chain: Chain, like: nn.Module, expected: dict[int, State]) -> None:
    """Each state must come back: onto a model full of other values, as tensors, and as a delta of the base."""
    assert [step.number for step in chain.steps] == sorted(number for number in expected if number)
    base = garbage(like)
    chain.restore_(base, 0)
    for number, wanted in expected.items():
        model = garbage(like)
        chain.restore_(model, number)
        assert bits(model) == wanted
        assert model.tied.weight is model.first.weight
        held = bits(chain.state(number))
        assert held == {name: value for name, value in wanted.items() if name != "tied.weight"}
        applied = copy.deepcopy(base)
        chain.delta(number).apply_(applied)
        assert bits(applied) == wanted
    chain.verify()


def grown(folder: Path, masks: list[int], **how: Any) -> tuple[Chain, nn.Module, dict[int, State]]:
    """A chain of steps whose masks are drawn with these seeds."""
    model = Net()
    chain = Chain.create(folder, model, **how)
    expected = {0: bits(model)}
    for number, seed in enumerate(masks, 1):
        mask = mask_of(model, seed)
        train_(model, mask, number)
        assert chain.append(model, mask, info={"epoch": number}).number == number
        expected[number] = bits(model)
    return chain, model, expected


Action = tuple[str, int, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from([
            "append",
            "append",
            "append",
            "again",
            "whole",
            "empty",
            "buffers",
            "squash",
            "keep",
            "only",
        ]),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(actions=ACTIONS, dtype=st.sampled_from(DTYPES), reopen=st.booleans())
def test_every_state_comes_back_whatever_was_done(
    tmp_path_factory: pytest.TempPathFactory, actions: list[Action], dtype: torch.dtype, reopen: bool
) -> None:
    folder = tmp_path_factory.mktemp("chain") / "run"
    torch.manual_seed(0)
    model = Net().to(dtype)
    model.norm.float()  # as mixed precision keeps it
    chain = Chain.create(folder, model)
    expected, mask = {0: bits(model)}, mask_of(model, 0)
    for kind, a, b in actions:
        numbers = [number for number in expected if number]
        if kind in ("append", "again", "whole", "empty", "buffers"):
            if kind != "again":
                density = {"append": 0.2, "whole": 0.1, "empty": 0.0, "buffers": 0.0}[kind]
                mask = mask_of(model, a % 5, density, ("last.weight",) if kind == "whole" else ())
            train_(model, mask, b, buffers=kind in ("append", "buffers"))
            expected[chain.append(model, mask, info={"kind": kind}).number] = bits(model)
        elif numbers and kind == "squash":
            first, last = sorted((numbers[a % len(numbers)], numbers[b % len(numbers)]))
            chain.squash(first, last)
            expected = {n: state for n, state in expected.items() if not first <= n < last}
        elif numbers and kind == "keep":
            chain.prune(1 + a % len(numbers))
            expected = {n: s for n, s in expected.items() if not n or n in numbers[-(1 + a % len(numbers)) :]}
        elif numbers:
            kept = {numbers[a % len(numbers)], numbers[b % len(numbers)]}
            chain.prune(kept)
            expected = {n: state for n, state in expected.items() if not n or n in kept}
            chain.restore_(model)
        if reopen:
            chain = Chain.open(folder)
    assert_restores(chain, model, expected)
    assert_restores(Chain.open(folder), model, expected)
    assert chain.nbytes == sum(file.stat().st_size for file in folder.iterdir())
    assert len([f for f in folder.iterdir() if f.name.startswith("mask-")]) == len({s.mask for s in chain.steps})


WRITES = st.lists(
    st.none() | st.sets(st.integers(0, 11), min_size=1).map(sorted),
    min_size=1,
    max_size=6,
)


@given(writes=WRITES)
def test_merged_patches_do_what_they_do_one_after_the_other(writes: list[list[int] | None]) -> None:
    replayed, patches = torch.full((12,), -1.0), []
    for number, at in enumerate(writes):
        coordinates = None if at is None else torch.tensor(at)
        values = torch.arange(12 if at is None else len(at)) + 100.0 * number
        replayed[:] = values if at is None else replayed.index_copy(0, torch.tensor(at), values)
        patches.append({"x": (coordinates, values)})
    (at_once, values) = merge(patches)["x"]
    result = torch.full((12,), -1.0)
    if at_once is None:
        result[:] = values
    else:
        assert bool((at_once[1:] > at_once[:-1]).all())
        result[at_once] = values
    assert result.equal(replayed)


def test_a_fixed_mask_costs_its_coordinates_once_and_files_are_what_is_counted(tmp_path: Path) -> None:
    chain, model, _ = grown(tmp_path / "run", [1, 1, 1, 2, 1])
    rows = chain.steps
    assert [row.nbytes["coordinates"] > 0 for row in rows] == [True, False, False, True, False]
    for row in rows:
        size = (tmp_path / "run" / forms.step_file(row.number)).stat().st_size
        assert sum(row.nbytes.values()) - row.nbytes["coordinates"] == size
        assert 0 < row.nbytes["values"] <= 4 * row.count == 4 * mask_of(model, 2 if row.number == 4 else 1).nnz
        assert row.info == {"epoch": row.number}
    norm = 4 * len(model.norm.running_mean)
    assert [row.nbytes["buffers"] for row in rows] == [
        norm + 8,
        norm + 8,
        norm,
        norm + 8,
        norm + 8,
    ]  # only changes
    state = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if n != "tied.weight")
    assert (chain.state_nbytes, chain.dense_nbytes) == (state, 6 * state)
    assert chain.nbytes == sum(file.stat().st_size for file in (tmp_path / "run").iterdir())


def test_a_step_is_restored_without_reading_the_steps_that_it_covers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, model, expected = grown(tmp_path / "run", [1] * 8)
    read: list[str] = []
    original = forms.read_content
    monkeypatch.setattr(forms, "read_content", lambda path, *rest: read.append(path.name) or original(path, *rest))
    chain.restore_(model, 5)
    assert bits(model) == expected[5] and read == [forms.step_file(5)]


def test_the_base_file_is_a_plain_safetensors_file_of_the_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, model, _ = grown(tmp_path / "run", [])
    loaded = load_file(tmp_path / "run" / chain_base.FILE)
    assert bits(loaded) == {name: value for name, value in bits(model).items() if name != "tied.weight"}


def test_a_change_outside_the_mask_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    chain, model, expected = grown(tmp_path / "run", [1, 2])
    before = files_in(tmp_path / "run")
    mask = mask_of(model, 3)
    for name in ("last.bias", "frozen.weight"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            outside = torch.ones(other.get_parameter(name).numel(), dtype=torch.bool)
            outside[mask.indices.get(name, torch.empty(0, dtype=torch.int64))] = False
            other.get_parameter(name).view(-1)[outside.nonzero()[0]] *= -1
        for opened in (chain, Chain.open(tmp_path / "run")):
            with pytest.raises(MismatchError, match=f"tensor '{name}' changed outside the mask since step 2"):
                opened.append(other, mask)
    assert files_in(tmp_path / "run") == before
    assert_restores(chain, model, expected)


def test_a_model_of_another_network_is_refused_before_a_byte_changes(tmp_path: Path) -> None:
    chain, model, _ = grown(tmp_path / "run", [1])
    more = Net()
    more.norm.register_buffer("more", torch.zeros(1))
    for other, part in (
        (Net(7), "first.weight"),
        (nn.Linear(5, 6), "another network"),
        (Net().bfloat16(), "bfloat16"),
        (more, "norm.more"),
    ):
        before = bits(other)
        with pytest.raises(MismatchError, match=part) as refusal:
            chain.restore_(other)
        assert "\n" not in str(refusal.value) and bits(other) == before
        with pytest.raises(MismatchError):
            chain.append(other, mask_of(model, 1))
    with pytest.raises(MismatchError, match="mask is of another model"):
        chain.append(model, mask_of(nn.Linear(2, 2), 1))


def test_state_dicts_and_compiled_models_are_restored_in_place(tmp_path: Path) -> None:
    chain, model, expected = grown(tmp_path / "run", [1, 2])
    state = {name: tensor.clone() for name, tensor in garbage(model).state_dict().items()}
    chain.restore_(state, 1)
    assert bits(state) == expected[1]
    other = garbage(model)
    chain.restore_(torch.compile(other, backend="eager"), 2)
    assert bits(other) == expected[2]


def test_steps_are_named_as_lists_are(tmp_path: Path) -> None:
    chain, model, expected = grown(tmp_path / "run", [1, 2, 3])
    chain.prune([1, 3])
    for step, number in ((-1, 3), (-2, 1), (-3, 0), (1, 1), (0, 0)):
        chain.restore_(model, step)
        assert bits(model) == expected[number]
    for step in (2, 4, -4):
        with pytest.raises(ParamsError, match=f"has no step {step}; it has 1, 3"):
            chain.restore_(model, step)
    for work in (
        lambda: chain.squash(3, 1),
        lambda: chain.squash(0, 3),
        lambda: chain.prune(0),
        lambda: chain.prune([]),
    ):
        with pytest.raises(ParamsError):
            work()


def test_without_the_base_a_chain_restores_onto_it_and_asks_for_it_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = copy.deepcopy(Net())
    torch.manual_seed(0)
    chain, model, expected = grown(tmp_path / "run", [1, 1, 2], keep_base=False)
    assert (tmp_path / "run" / chain_base.FILE).stat().st_size + chain.state_nbytes < 2**14
    assert not chain.keeps_base and chain.dense_nbytes == 3 * chain.state_nbytes
    assert_restores(chain, model, expected)
    opened = Chain.open(tmp_path / "run")
    with pytest.raises(ParamsError, match="base=MODEL"):
        opened.append(model, mask_of(model, 1))
    held = copy.deepcopy(base)
    for number in (1, 2, 1, 3):  # a state with no other coordinates serves as the base does
        opened.restore_(held, number)
        assert bits(held) == expected[number]
    before = bits(held)
    with pytest.raises(MismatchError, match="not the delta's base|cannot be restored"):
        opened.restore_(held, 1)
    assert bits(held) == before
    opened.squash(1, 2)
    opened = Chain.open(tmp_path / "run", base=base)
    assert_restores(opened, model, {n: s for n, s in expected.items() if n != 1})
    with pytest.raises(MismatchError, match="tensor 'first.weight' differs"):
        Chain.open(tmp_path / "run", base=model)


def test_a_restored_model_goes_on_and_a_dropped_step_can_be_written_anew(tmp_path: Path) -> None:
    chain, model, expected = grown(tmp_path / "run", [1, 2, 3])
    chain.restore_(model, 2)
    with pytest.raises(MismatchError, match="changed outside the mask since step 3"):
        chain.append(model, mask_of(model, 4))
    chain.prune([1, 2])
    mask = mask_of(model, 4)
    train_(model, mask, 9)
    assert chain.append(model, mask).number == 3
    assert_restores(chain, model, {**expected, 3: bits(model)})


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_flipped_bits_and_truncations_of_any_file_are_refused_by_name(tmp_path: Path) -> None:
    chain, model, expected = grown(tmp_path / "run", [1, 2])
    draw, folder = random.Random(0), tmp_path / "run"
    for name, data in files_in(folder).items():
        damages = [bytearray(data) for _ in range(150)]
        for damaged in damages:
            bit = draw.randrange(8 * len(data))
            damaged[bit // 8] ^= 1 << bit % 8
        damages += [bytearray(data[: draw.randrange(len(data))]) for _ in range(20)] + [bytearray(data + b"\0")]
        for damaged in damages:
            (folder / name).write_bytes(damaged)
            with pytest.raises(ArtifactError, match=name) as refusal:
                Chain.open(folder).verify()
            assert "section" in str(refusal.value) or len(damaged) != len(data)
            assert "\n" not in str(refusal.value)
        for damaged in damages[:20]:
            (folder / name).write_bytes(damaged)
            held = garbage(model)
            try:
                Chain.open(folder).restore_(held)
            except ArtifactError as refusal:
                assert name in str(refusal) and bits(held) == bits(garbage(model))
            else:
                assert bits(held) == expected[2]  # what was damaged is overwritten by the steps
        (folder / name).write_bytes(data)
    assert_restores(chain, model, expected)


def test_a_damaged_base_is_blamed_and_not_the_model(tmp_path: Path) -> None:
    _, model, _ = grown(tmp_path / "run", [1])
    path = tmp_path / "run" / chain_base.FILE
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="base.safetensors: section '.*' is corrupt"):
        Chain.open(tmp_path / "run").append(model, mask_of(model, 1))


def test_missing_and_misplaced_files_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    grown(folder, [1, 2, 3])
    grown(tmp_path / "other", [4])
    whole = files_in(folder)
    mask = forms.mask_file(Chain.open(folder).steps[1].mask)
    for name, part in (
        (forms.step_file(2), "step-000002.safetensors: is missing, and step 3 follows it"),
        (forms.step_file(1), "step-000001.safetensors: is missing, and step 2 follows it"),
        (mask, "is missing, and step 2 needs it"),
        (chain_base.FILE, "holds no chain: base.safetensors is missing"),
    ):
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=part) as refusal:
            Chain.open(folder)
        assert "\n" not in str(refusal.value)
        (folder / name).write_bytes(whole[name])
    for name, data, part in (
        (forms.step_file(4), whole[forms.step_file(3)], "is no sound step of a chain: it is step 3"),
        (
            forms.step_file(1),
            (tmp_path / "other" / forms.step_file(1)).read_bytes(),
            "does not start from the state",
        ),
        (forms.step_file(4), whole[mask], "expected a fishmask-chain-step file"),
        (forms.step_file(4), b"text", "step-000004.safetensors: section 'header' is corrupt"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=part):
            Chain.open(folder)
        (folder / forms.step_file(4)).unlink(missing_ok=True)
        (folder / name).write_bytes(whole[name]) if name in whole else None
    (folder / mask).write_bytes(whole[forms.mask_file(Chain.open(folder).steps[0].mask)])
    with pytest.raises(ArtifactError, match="is another mask than"):
        Chain.open(folder).verify()
    for absent in (tmp_path / "absent", tmp_path / "run" / chain_base.FILE):
        with pytest.raises(ArtifactError, match="no folder of a chain"):
            Chain.open(absent)


def test_foreign_files_are_passed_over_and_leftovers_removed(tmp_path: Path) -> None:
    chain, model, expected = grown(tmp_path / "run", [1])
    foreign = [
        "notes.txt",
        "step-1.safetensors",
        "step-000002.safetensors.bak",
        "step-000000.safetensors",
        ".gitignore",
    ]
    leftovers = [".step-000002.safetensors.0123456789ab.tmp", "mask-0123456789abcdef.safetensors"]
    for name in foreign + leftovers:
        (tmp_path / "run" / name).write_bytes(b"x")
    chain = Chain.open(tmp_path / "run")
    mask = mask_of(model, 2)
    train_(model, mask, 2)
    chain.append(model, mask)
    assert_restores(Chain.open(tmp_path / "run"), model, {**expected, 2: bits(model)})
    names = set(files_in(tmp_path / "run"))
    assert names >= set(foreign) and not names & set(leftovers)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    chain, model, expected = grown(tmp_path / "run", [1])
    with pytest.raises(ParamsError, match="holds a chain already"):
        Chain.create(tmp_path / "run", model)
    late = Chain.open(tmp_path / "run")
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for work in (lambda: chain.append(model, mask_of(model, 1)), lambda: chain.prune(1)):
        with pytest.raises(BusyError, match="another process is writing"):
            work()
    os.close(handle)
    assert sorted(files_in(tmp_path / "run")) == sorted([
        "base.safetensors",
        "step-000001.safetensors",
        forms.mask_file(chain.steps[0].mask),
    ])
    chain.append(model, mask_of(model, 1))
    with pytest.raises(BusyError, match="open it again"):
        late.append(model, mask_of(model, 1))
    assert_restores(chain, model, {**expected, 2: bits(model)})


class Killed(BaseException):
    pass


def dies_at(moment: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the process 'die' at its n-th change of the disk: that one and all later ones fail.

    Returns:
        A function that tells how many changes were tried.
    """
    from pipeline.runtime import atomic

    count = 0

    def mortal(change: Callable[..., Any], matters: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
        def attempt(*given: Any, **options: Any) -> Any:
            nonlocal count
            if matters(*given):
                count += 1
                if count >= moment:
                    raise Killed
            return change(*given, **options)

        return attempt

    patch.setattr(atomic.os, "open", mortal(os.open, lambda _, flags, *__: bool(flags & os.O_CREAT)))
    patch.setattr(atomic.os, "fsync", mortal(os.fsync))
    patch.setattr(atomic.os, "replace", mortal(os.replace))
    patch.setattr(Path, "unlink", mortal(Path.unlink))
    return lambda: count


@pytest.mark.parametrize(
    "work", ["append", "append again", "squash", "squash all", "prune", "only", "drop newest"]
)
def test_a_death_at_any_change_of_the_disk_loses_nothing(tmp_path: Path, work: str) -> None:
    _, model, expected = grown(tmp_path / "start", [1, 1, 2, 3, 2, 1])
    mask = mask_of(model, 1 if work == "append again" else 7)
    if work.startswith("append"):
        train_(model, mask, 7)
    after = {**expected, 7: bits(model)} if work.startswith("append") else expected
    kept = {
        "append": set(after),
        "append again": set(after),
        "squash": {0, 1, 5, 6},
        "squash all": {0, 6},
        "prune": {0, 5, 6},
        "only": {0, 2, 4},
        "drop newest": {0, 1, 2, 3},
    }[work]
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "start", folder)
        chain = Chain.open(folder)
        act: dict[str, Callable[[], Any]] = {
            "append": lambda: chain.append(model, mask),  # noqa: B023 - called in this round
            "append again": lambda: chain.append(model, mask),  # noqa: B023
            "squash": lambda: chain.squash(2, 5),  # noqa: B023
            "squash all": lambda: chain.squash(1, 6),  # noqa: B023
            "prune": lambda: chain.prune(2),  # noqa: B023
            "only": lambda: chain.prune([2, 4]),  # noqa: B023
            "drop newest": lambda: chain.prune([1, 2, 3]),  # noqa: B023
        }
        with pytest.MonkeyPatch.context() as patch:
            tried = dies_at(moment, patch)
            try:
                act[work]()
                done = True
            except Killed:
                done = False
        found = Chain.open(folder)
        numbers = {0, *(step.number for step in found.steps)}
        assert numbers >= kept - {7} and numbers <= set(after)
        assert_restores(found, model, {number: after[number] for number in numbers})
        if done:
            assert numbers == kept
            break
        if not work.startswith("append"):
            chain = found
            act[work]()  # it can be done again, and nothing is left over
            assert {0, *(step.number for step in chain.steps)} == kept
            assert chain.nbytes == sum(file.stat().st_size for file in folder.iterdir())
            assert_restores(chain, model, {number: after[number] for number in kept})
    assert tried() < moment and moment > 3


def test_a_full_disk_leaves_the_chain_and_the_object_usable(tmp_path: Path) -> None:
    import errno

    from pipeline.runtime import atomic

    chain, model, expected = grown(tmp_path / "run", [1])
    before = files_in(tmp_path / "run")
    mask = mask_of(model, 2)
    train_(model, mask, 2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("replace", "fsync"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic.os, name, full)
            with pytest.raises(StorageError, match="No space left"):
                chain.append(model, mask)
        assert files_in(tmp_path / "run") == before
    chain.append(model, mask)
    assert_restores(chain, model, {**expected, 2: bits(model)})


def work_until_killed(folder: Path) -> None:
    """Append, squash and prune without end; state n is the same whenever it is made."""
    draw = random.Random(os.getpid())
    chain = Chain.open(folder)
    model = Net()
    while True:
        numbers = [step.number for step in chain.steps]
        act = draw.choice(["append"] * 3 + ["squash", "prune", "drop"])
        if act == "append" or len(numbers) < 4:
            number = max(numbers, default=0) + 1
            chain.restore_(model)
            mask = mask_of(model, number % 3)
            train_(model, mask, number)
            chain.append(model, mask)
        elif act == "squash":
            chain.squash(*sorted(draw.choices(numbers, k=2)))
        else:
            count = draw.randint(1, len(numbers))
            chain.prune(count if act == "prune" else numbers[:count])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of Python 3.12
def test_a_chain_killed_again_and_again_is_always_sound(tmp_path: Path) -> None:
    base, folder, seen = Net(), tmp_path / "run", set()
    Chain.create(folder, base)
    model, expected, draw, patience = copy.deepcopy(base), {0: bits(base)}, random.Random(1), 1.0
    for kill in range(400):
        if kill >= 40 and len(seen) > 20:
            break
        child = os.fork()
        if child == 0:
            try:
                work_until_killed(folder)
            finally:
                os._exit(1)  # only an error gets here
        time.sleep(patience * draw.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the writer failed before it was killed"
        chain = Chain.open(folder)
        numbers = {0, *(step.number for step in chain.steps)}
        for number in range(len(expected), max(numbers) + 1):
            train_(model, mask_of(model, number % 3), number)
            expected[number] = bits(model)
        assert_restores(chain, base, {number: expected[number] for number in numbers})
        if numbers <= seen:
            patience *= 1.1  # on a loaded machine a writer gets less far
        seen |= numbers
    assert len(seen) > 20


def hostile(edit: Callable[[dict[str, Any], dict[str, Tensor]], None], path: Path, form: str) -> None:
    """Write a file anew with other content and sound checksums."""
    from pipeline import files

    meta, sections = files.read_file(path, format=form, version=forms.VERSION)
    edit(meta, sections)
    files.write_file(path, format=form, version=forms.VERSION, meta=meta, sections=sections)


@pytest.mark.parametrize(
    "edit",
    [
        lambda meta, sections: meta.pop("mask"),
        lambda meta, sections: meta.update(number="1"),
        lambda meta, sections: meta.update(number=True),
        lambda meta, sections: meta.update(after=-1),
        lambda meta, sections: meta.update(after=1),
        lambda meta, sections: meta.update(buffers=["absent"]),
        lambda meta, sections: meta.update(buffers=[]),
        lambda meta, sections: meta.update(mask="0" * 64),
        lambda meta, sections: meta.update(mask="../../etc/passwd"),
        lambda meta, sections: meta.update(state="0" * 64),
        lambda meta, sections: meta.update(parent="0" * 64),
        lambda meta, sections: meta.update(info=[]),
        lambda meta, sections: sections.pop("values.float32"),
        lambda meta, sections: sections.update({"values.float32": sections["values.float32"][:-1]}),
        lambda meta, sections: sections.update({"values.float32": sections["values.float32"].double()}),
        lambda meta, sections: sections.update({"values.float32": sections["values.float32"] + 1}),
        lambda meta, sections: sections.update(more=torch.zeros(1)),
    ],
)
def test_a_step_that_vouches_for_false_content_is_refused(tmp_path: Path, edit: Callable[..., Any]) -> None:
    _, model, expected = grown(tmp_path / "run", [1])
    hostile(edit, tmp_path / "run" / forms.step_file(1), forms.STEP)
    held = garbage(model)
    before = bits(held)
    with pytest.raises(ArtifactError) as refusal:
        Chain.open(tmp_path / "run").restore_(held)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value) and bits(held) == before


@pytest.mark.parametrize(
    "edit",
    [
        lambda meta, sections: meta.pop("digests"),
        lambda meta, sections: meta["digests"].pop("last.bias"),
        lambda meta, sections: meta["digests"].update({"last.bias": 3}),
        lambda meta, sections: meta.update(parameters=[]),
        lambda meta, sections: meta["parameters"].append(meta["parameters"][0]),
        lambda meta, sections: meta["parameters"][0].__setitem__(1, "float31"),
        lambda meta, sections: meta["parameters"][0].__setitem__(1, "bfloat16"),
        lambda meta, sections: meta["parameters"][0].__setitem__(2, [1]),
        lambda meta, sections: meta["buffers"][0].__setitem__(2, [-1]),
        lambda meta, sections: meta.update(ties={"tied.weight": "absent"}),
        lambda meta, sections: meta.update(keeps_values=False),
        lambda meta, sections: meta.update(keeps_values=1),
        lambda meta, sections: sections.pop("last.bias"),
        lambda meta, sections: sections.update({"last.bias": sections["last.bias"] + 1}),
    ],
)
def test_a_base_that_vouches_for_false_content_is_refused(tmp_path: Path, edit: Callable[..., Any]) -> None:
    _, model, _ = grown(tmp_path / "run", [1])
    hostile(edit, tmp_path / "run" / chain_base.FILE, chain_base.FORMAT)
    held = garbage(model)
    before = bits(held)
    with pytest.raises(FishmaskError) as refusal:
        Chain.open(tmp_path / "run").restore_(held)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value) and bits(held) == before
