"""Out of memory, injected: smaller pieces, the same result, and a line that says so."""

import pytest
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.losses import example_losses
from pipeline.masks.mask import Mask
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.memory import in_pieces_that_fit
from pipeline.training.resume import ResumeFile

pytestmark = pytest.mark.usefixtures("one_thread")


def train(most, resume=None, stop=None):
    """Train a small network whose loss runs out of memory above ``most`` examples."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    mask = Mask.from_bool({n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters()})
    torch.manual_seed(2)
    batches = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))) for n in (16, 16, 7)]
    said, sizes = [], []

    def loss(model, batch):
        losses = example_losses(model, batch)
        if len(losses) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        sizes.append(len(losses))
        return losses

    with MaskedParameters(model, mask) as masked:
        recipe = Recipe(epochs=3, lr=0.05, accumulate=2, clip=1.0)
        result = fit(
            model, lambda _: batches, masked=masked, recipe=recipe, loss=loss, say=said.append, resume=resume,
            should_stop=stop,
        )  # fmt: skip
        return masked.values.detach().clone(), result, said, sizes


def test_micro_batches_add_up_to_the_same_steps_and_are_said():
    whole, result, said, _ = train(most=100)
    assert said == []
    for most, micro in ((9, 8), (5, 4), (1, 1)):
        values, again, said, sizes = train(most)
        assert max(sizes) == micro
        torch.testing.assert_close(values, whole, rtol=1e-12, atol=1e-12)
        for one, other in zip(result.history, again.history, strict=True):
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)
        assert said[-1] == f"out of memory: micro-batches of {micro} examples instead of {2 * micro} from here on"


def test_a_resumed_run_keeps_its_micro_batches(tmp_path):
    from pipeline.errors import Interrupted

    expected, *_ = train(most=5)
    file = ResumeFile(tmp_path / "state.safetensors", "own", every_s=0)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        train(5, file, lambda: next(asked))
    values, result, said, sizes = train(5, file)
    assert result.resumed_from == 2 and said == [] and max(sizes) == 4
    assert torch.equal(values, expected)


def test_one_example_that_does_not_fit_ends_the_run_in_one_line():
    with pytest.raises(ModelError, match="out of memory with a single example, micro-batches cannot be smaller"):
        train(most=0)


def test_other_errors_go_through():
    def work(size):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        in_pieces_that_fit(work, 8, "batches")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    ],
)
def test_work_is_halved_until_it_fits(error):
    said = []

    def work(size):
        if size > 3:
            raise error
        return size * 10

    assert in_pieces_that_fit(work, 24, "evaluation batches", said.append) == (30, 3)
    assert [line.split()[-4] for line in said] == ["24", "12", "6"]
