"""Scores and masks on a GPU: what they leave alone, what little memory changes, and the CPU's mask."""

import copy

import pytest
import torch
from torch import nn

from pipeline.fisher import fisher_diagonal, fisher_diagonal_reference
from pipeline.masks import select, topk
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.topk import top_coordinates
from pipeline.parameters import ParameterIndex
from pipeline.training.memory import in_pieces_that_fit


class Tagger(nn.Module):
    """An embedding, an LSTM and a head: recurrent layers of cuDNN take no backward in eval mode."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Embedding(30, 8), nn.LSTM(8, 12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(self.lstm(self.embed(x))[0][:, -1])


def assert_close_scores(found, wanted, tolerance=1e-4):
    assert list(found) == list(wanted)
    for name, want in wanted.items():
        error = (found[name].double().cpu() - want.double().cpu()).abs().max()
        assert error <= tolerance * want.abs().max(), name


@pytest.mark.parametrize("kind", ["label", "expect"])
def test_an_lstm_is_scored_and_cudnn_left_on(kind, cuda):
    torch.manual_seed(0)
    model = Tagger()
    batches = [(torch.randint(30, (5, 7)), torch.randint(3, (5,))) for _ in range(2)]
    found = fisher_diagonal(copy.deepcopy(model).to(cuda), batches, kind=kind)
    assert_close_scores(found, fisher_diagonal_reference(model, batches, kind=kind))
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_products_are_in_full_precision_and_the_settings_as_before(precision, cuda):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [backend.fp32_precision for backend in backends]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 5)).to(cuda)
    x, y = torch.randn(8, 16, 8, 8, device=cuda), torch.randint(5, (8,), device=cuda)
    try:
        for backend in backends:
            backend.fp32_precision = precision
        found = fisher_diagonal(model, [(x, y)])
        assert [backend.fp32_precision for backend in backends] == [precision] * 3
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.fp32_precision = was
    # TF32 keeps 11 bits: its errors are about 1e-3 of the largest.
    assert_close_scores(found, fisher_diagonal_reference(model, [(x, y)]), 5e-5)


def wide(place):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 8)).to(place)


def test_scores_in_pieces_that_fit_the_memory_are_the_same(cuda, little_memory):
    model, count = wide(cuda), 1 << 15
    x, y = torch.randn(count, 256, device=cuda), torch.randint(8, (count,), device=cuda)
    said = []

    def score(size):
        return fisher_diagonal(model, list(zip(x.split(size), y.split(size), strict=True)))

    whole = score(count)
    little_memory(torch.cuda.memory_allocated() + (400 << 20))  # one layer of all examples is 512 MiB
    found, size = in_pieces_that_fit(score, count, "scoring batches", said.append)
    assert size < count and said[-1].endswith("from here on")
    assert_close_scores(found, whole)


def test_a_small_chunk_changes_nothing(cuda):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    batch = torch.randn(20, 3, 8, 8), torch.randint(3, (20,))
    whole = fisher_diagonal(model.to(cuda), [batch])
    assert_close_scores(fisher_diagonal(model, [batch], chunk=1), whole, 1e-6)


@pytest.fixture(params=["sampled", "bits"])
def way(request, monkeypatch):
    """Both roads to the same answer (tests/masks/test_topk.py)."""
    if request.param == "bits":
        monkeypatch.setattr(topk, "_collect", lambda *_, **__: None)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.usefixtures("way")
def test_ten_million_scores_give_the_cpus_coordinates(ties, cuda):
    draw = torch.Generator().manual_seed(0)
    sizes = [6_000_000, 3, 3_000_000, 0, 1000, 1_000_000]
    scores = {f"t{i}": torch.randn(n, generator=draw).pow(8) * 10.0**-i for i, n in enumerate(sizes)}
    if ties:  # about forty thousand of each value
        scores = {name: (score * 16).clamp(max=255).round() for name, score in scores.items()}
    there = {name: score.to(cuda) for name, score in scores.items()}
    for k in (0, 1, 50_000, 9_000_000):
        found, wanted = top_coordinates(there, k), top_coordinates(scores, k)
        assert all(torch.equal(found[name], at) for name, at in wanted.items()), k
        assert sum(map(len, found.values())) == k


def test_masks_and_rankings_do_not_depend_on_the_device(cuda):
    model = wide("cpu")
    scores = {name: p.detach().square() for name, p in model.named_parameters()}
    there = {name: score.to(cuda) for name, score in scores.items()}
    assert Mask.top_k(there, 0.05, ["2"]) == Mask.top_k(scores, 0.05, ["2"])
    one, other = (Ranking.of(s, keep=0.1, always=["2"]) for s in (there, scores))
    assert one.digest == other.digest
    index = ParameterIndex.of(model)
    assert ParameterIndex.of(copy.deepcopy(model).to(cuda)) == index
    for name in ("random", "magnitude"):
        masks = [
            select.STRATEGIES[name](copy.deepcopy(model).to(where), density=0.01, seed=3)
            for where in ("cpu", cuda)
        ]
        assert masks[0] == masks[1]
