"""Batches in all their forms: examples counted, images laid out."""

import pytest
import torch

from pipeline.errors import DataError
from pipeline.losses import Batch
from pipeline.training.batch import count_examples, to_channels_last

IMAGES = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, 7), torch.zeros(2)),
        [(torch.zeros(2, 7), torch.zeros(2, 1)), torch.zeros(2)],
        {"name": "x", "ids": torch.zeros(9, 9), "labels": torch.zeros(2)},
        {"name": "x", "ids": torch.zeros(2, 9)},
    ],
)
def test_examples_are_counted(batch: Batch) -> None:
    assert count_examples(batch) == 2


@pytest.mark.parametrize("batch", [(torch.zeros(0, 7), torch.zeros(0)), {"name": "x"}, {"labels": []}])
def test_a_batch_without_examples_is_refused(batch: Batch) -> None:
    with pytest.raises(DataError, match="no examples"):
        count_examples(batch)


def test_images_change_their_layout_and_not_their_values() -> None:
    labels, table = torch.tensor([0, 1]), torch.zeros(2, 3)
    single = to_channels_last((IMAGES, labels))
    several = to_channels_last(((IMAGES, table), labels))
    named = to_channels_last({"pixel_values": IMAGES, "table": table, "labels": labels, "name": "x"})
    for image in (single[0], several[0][0], named["pixel_values"]):
        assert torch.equal(image, IMAGES)
        assert image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    assert single[1] is labels and several[0][1] is table
    assert named["table"] is table and named["labels"] is labels and named["name"] == "x"
