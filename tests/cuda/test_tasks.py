"""Images, evaluation and the choice of the device, on a GPU."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.losses import sent, to_device
from pipeline.tasks.cifar import augment
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.image import ImageSplit, statistics
from pipeline.training.device import choose_device, peak_memory_bytes, reset_peak_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_augmentation_is_the_cpus_for_the_same_seed(dtype, cuda):
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for seed in range(4):
        assert torch.equal(augment(x.to(cuda), seed).cpu(), augment(x, seed))


def test_images_are_normalised_there_as_on_the_cpu(cuda):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    images = ImageSplit(pixels, torch.arange(50), *statistics(pixels))
    rows = np.array([3, 49, 0, 7])
    (x, y), (on_cpu, labels) = images.batch(rows, cuda), images.batch(rows)
    assert x.device.type == y.device.type == "cuda"
    torch.testing.assert_close(x.cpu(), on_cpu, rtol=1e-6, atol=1e-6)  # a GPU multiplies by 1/255
    assert torch.equal(y.cpu(), labels)


def test_a_batch_is_sent_once_and_whole(cuda):
    x = torch.randn(1000, 33)
    there = sent(x, cuda)
    assert torch.equal(there.cpu(), x) and sent(there, cuda) is there
    torch.cuda._sleep(50_000_000)  # a copy that did not wait would be read before it is there
    assert torch.equal(sent(there + 1, x.device), x + 1)
    batch = to_device({"input_ids": x, "texts": ["a"], "labels": torch.arange(3)}, cuda)
    assert batch["input_ids"].is_cuda and batch["labels"].is_cuda and batch["texts"] == ["a"]


def test_evaluation_gives_the_cpus_metrics(cuda):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4)).train()
    batches = [(torch.randn(n, 10), torch.randint(4, (n,))) for n in (16, 16, 5)]
    expected = evaluate(model, batches, "accuracy", torch.device("cpu"))
    found = evaluate(model.to(cuda), batches, "accuracy", cuda)
    assert found == pytest.approx(expected, rel=1e-5) and found["accuracy"] == expected["accuracy"]
    assert set(evaluate(model, batches, "accuracy", cuda, torch.bfloat16)) == set(expected) and model.training


def test_auto_chooses_the_gpu_and_says_which(cuda):
    chosen = choose_device("auto")
    name, native = torch.cuda.get_device_name(cuda), torch.cuda.get_device_capability(cuda) >= (8, 0)
    assert chosen.device == cuda and name in chosen.reason
    assert chosen.autocast == (torch.bfloat16 if native else None)


def test_peak_memory_is_that_of_tensors(cuda):
    reset_peak_memory(cuda)
    before = peak_memory_bytes(cuda)
    block = torch.empty(64 << 20, dtype=torch.uint8, device=cuda)
    del block
    assert peak_memory_bytes(cuda) - before == 64 << 20
