"""Images: decoding, normalising, and the augmentation against a loop over pixels."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError, ModelError
from pipeline.tasks.base import Task
from pipeline.tasks.cifar import augment
from pipeline.tasks.decode import decode as decode_rows
from pipeline.tasks.fetch import fetch
from pipeline.tasks.image import pixel_array, pixel_column, statistics
from pipeline.tasks.raw import RawSplit


def decode(split):
    return decode_rows(split, np.arange(split.table.num_rows))


def encoded(pixels_HWC, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, kind)
    return file.getvalue()


def images(count, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def split(contents, name="img", struct=True):
    column = [{"bytes": c, "path": None} for c in contents] if struct else contents
    return RawSplit(pa.table({"idx": list(range(len(contents))), name: column}), "train.parquet")


@pytest.mark.parametrize("struct", [True, False])
def test_png_decodes_exactly(struct):
    colour = images(5)
    pixels, kind = decode(split([encoded(i) for i in colour], struct=struct))
    assert kind == "PNG" and (pixels == colour.transpose(0, 3, 1, 2)).all()
    grey = images(5, (8, 8))
    assert (decode(split([encoded(i) for i in grey], "picture"))[0] == grey[:, None]).all()


def test_only_the_rows_asked_for_are_decoded():
    colour = images(4)
    contents = [encoded(colour[0]), b"no image", encoded(colour[2])]
    pixels, _ = decode_rows(split(contents), np.array([0, 2]))
    assert (pixels == colour[[0, 2]].transpose(0, 3, 1, 2)).all()
    with pytest.raises(DataError, match="row 1"):
        decode_rows(split(contents), np.array([1, 2]))


def test_grey_among_coloured_becomes_coloured():
    pixels, _ = decode(split([encoded(images(1)[0]), encoded(images(1, (8, 8))[0])]))
    assert pixels.shape == (2, 3, 8, 8) and (pixels[1, 0] == pixels[1, 2]).all()


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        ([b"no image"], "column 'img', row 0 .* is no image that can be decoded"),
        ([encoded(images(1)[0]), encoded(images(1)[0])[:60]], "row 1"),
        ([encoded(images(1)[0]), None], "row 1"),
        ([encoded(images(1)[0]), encoded(images(1, (9, 8, 3))[0])], "image 1 is 8x9 pixels; expected 8x8"),
    ],
)
def test_images_that_do_not_decode_are_named(contents, why):
    with pytest.raises(DataError, match=why):
        decode(split(contents))


def test_a_split_without_images_names_its_columns():
    with pytest.raises(DataError, match=r"its columns are a \(int64\)"):
        decode(RawSplit(pa.table({"a": [1]}), "t"))


def test_pixels_pack_and_unpack():
    pixels = images(6, (3, 4, 5))
    column = pa.chunked_array([pixel_column(pixels)]).slice(1, 4).combine_chunks()
    assert (pixel_array(column, (3, 4, 5)) == pixels[1:5]).all()


def test_statistics_are_those_of_numpy():
    pixels = images(40, (3, 8, 8))
    mean, std = statistics(pixels)
    assert np.allclose(mean, (pixels / 255).mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(std, (pixels / 255).std((0, 2, 3)), atol=1e-4)
    assert statistics(np.full((2, 1, 4, 4), 7, dtype=np.uint8))[1] == [1.0]


def test_augmentation_moves_mirrors_and_cuts():
    """Each result is one of the shifts and mirrors of its image, up to a square of zeros."""
    x = torch.rand(40, 3, 12, 12) + 1
    out = augment(x, 3)
    mirrored, shifts = 0, set()
    for image, result in zip(x, out, strict=True):
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        fits = []
        for flip in (False, True):
            for down in range(9):
                for right in range(9):
                    want = padded[:, down : down + 12, right : right + 12]
                    want = want.flip(-1) if flip else want
                    kept = result != 0
                    cut = (result == 0) & (want != 0)
                    rows, columns = cut[0].any(1).nonzero(), cut[0].any(0).nonzero()
                    square = len(rows) <= 8 and len(columns) <= 8 and (want[kept] == result[kept]).all()
                    if square and cut.sum() <= 3 * 64:
                        fits.append((flip, down, right))
        assert len(fits) == 1
        mirrored += fits[0][0]
        shifts.add(fits[0][1:])
    assert 8 < mirrored < 32 and len(shifts) > 20
    assert (out == 0).any(dim=1).sum(dim=(1, 2)).min() >= 16


def test_augmentation_repeats_with_its_seed_and_leaves_the_generator_alone():
    x = torch.rand(8, 3, 8, 8)
    before = torch.get_rng_state()
    assert torch.equal(augment(x, 1), augment(x, 1)) and not torch.equal(augment(x, 1), augment(x, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(augment(x, 1, padding=0, hole=0).sort(-1).values, x.sort(-1).values)


@pytest.fixture
def cifar(tmp_path, monkeypatch, made):
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    for seed, (name, count) in enumerate({"train": 20, "test": 10}.items()):
        column = [{"bytes": encoded(i, "JPEG"), "path": None} for i in images(count, (32, 32, 3), seed)]
        table = pa.table({"img": column, "label": [i % 10 for i in range(count)]})
        pq.write_table(table, tmp_path / "data" / "cifar10" / f"{name}.parquet")
    monkeypatch.setenv("FISHMASK_DATA", str(tmp_path / "data"))
    model = made.Model("builtin:resnet9")
    (tmp_path / "out").mkdir()
    data = made.Data("uoft-cs/cifar10", text=None, label=None)
    fetch("cifar10", kind="image", data=data, model=model, out=tmp_path / "out")
    return Task.load(tmp_path / "out", model, "accuracy")


def test_cifar_is_reported_on_test_and_says_jpeg(cifar):
    assert cifar.reported == "test" and cifar.sizes == {"train": 20, "test": 10}
    assert cifar.summary()["remarks"] == {"train": "0.04 % of train", "images": "JPEG"}
    assert cifar.classes[0] == "airplane"
    assert set(cifar.evaluate(cifar.model(0), "test", 4)) == {"accuracy", "loss"}


def test_training_images_are_augmented_and_others_are_not(cifar):
    plain = cifar.batches("train", 20)[0][0]
    epochs = [cifar.batches("train", 20, seed=0, epoch=epoch) for epoch in (0, 0, 1)]
    first, again, later = (batches[0][0] for batches in epochs)
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert not torch.equal(first, plain[torch.from_numpy(epochs[0].rows)])
    drawn = cifar.examples(20, 20, seed=0)
    assert torch.equal(drawn[0][0], plain[torch.from_numpy(drawn.rows)])


@pytest.mark.parametrize(
    ("source", "size", "why"),
    [
        ("builtin:resnet9", 4, "Output size is too small"),
        ("builtin:vit", 3, r"sides of \[3, 3\] pixels; expected multiples of the patch's"),
        ("builtin:vit", 30, r"sides of \[30, 30\] pixels"),
    ],
)
def test_images_of_a_size_that_the_network_does_not_take_are_one_line(tmp_path, made, source, size, why):
    for split in ("train", "test"):
        column = [{"bytes": encoded(i), "path": None} for i in images(4, (size, size, 3))]
        pq.write_table(pa.table({"img": column, "label": [0, 1, 2, 3]}), tmp_path / f"{split}.parquet")
    (tmp_path / "out").mkdir()
    model = made.Model(source)
    data = made.Data(str(tmp_path), text=None, label=None)
    fetch("mine", kind="image", data=data, model=model, out=tmp_path / "out")
    with pytest.raises(
        ModelError, match=rf"'{source}' does not take the data's images \[3, {size}, {size}\]: .*{why}"
    ):
        Task.load(tmp_path / "out", model, "accuracy").model(0)
