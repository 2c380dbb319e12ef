"""CIFAR as torchvision lays it out: what torchvision reads, the hub's pixels, and nothing in a file is called."""

import io
import pickle
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch
from pipeline.tasks.python_batches import find_layout, read_layout

NAMES = [f"data_batch_{i}" for i in range(1, 6)]


def old(pixels, labels, key=b"labels"):
    """The bytes of a published file: pickled by Python 2, whose text is bytes."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09(K\x01"
    array += (
        b"J" + struct.pack("<i", len(pixels)) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
    )
    array += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    listed = b"]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}q\x01("
        + text(b"batch_label")
        + text(b"made")
        + text(key)
        + listed
        + text(b"data")
        + array
        + b"u."
    )


def new(protocol):
    def content(pixels, labels, key=b"labels"):
        return pickle.dumps(
            {key.decode(): [int(i) for i in labels], "data": pixels, "filenames": ["a.png"]}, protocol
        )

    return content


def draw(seed, count=4):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), random.integers(0, 10, count)


def lay_out(root, content=old, count=4):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for seed, name in enumerate([*NAMES, "test_batch"]):
        (folder / name).write_bytes(content(*draw(seed, count)))
    (folder / "batches.meta").write_bytes(new(2)(np.zeros(0), [], b"names"))
    return folder


@pytest.mark.parametrize("content", [old, new(2), new(3), new(4), new(5)], ids="python-2 2 3 4 5".split())
def test_it_is_what_torchvision_reads(tmp_path, content, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = lay_out(tmp_path, content)
    monkeypatch.setattr(CIFAR10, "train_list", [(name, None) for name in NAMES])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    tables = read_layout(folder)
    for split in ("train", "test"):
        theirs = CIFAR10(tmp_path, train=split == "train")
        pixels = np.stack([np.frombuffer(p, np.uint8) for p in tables[split].column("pixels").to_pylist()])
        assert (pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) == theirs.data).all()
        assert tables[split].column("label").to_pylist() == [int(label) for label in theirs.targets]
    assert find_layout(tmp_path) == find_layout(folder) == folder and find_layout(tmp_path / "none") is None


@pytest.fixture
def sources(tmp_path):
    """The same images three times: as torchvision has them, as the hub's shards, and as plain parquet."""
    lay_out(tmp_path / "torchvision")
    parts = [draw(seed) for seed in range(6)]
    for split, chosen in (("train", parts[:5]), ("test", parts[5:])):
        images = np.concatenate([pixels for pixels, _ in chosen]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        column = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            column.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"img": column, "label": np.concatenate([labels for _, labels in chosen])})
        for path in (f"hub/plain_text/{split}-00000-of-00001.parquet", f"mine/cifar10/{split}.parquet"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, tmp_path / path)
    return tmp_path


def test_all_sources_give_the_same_batches(sources, made, monkeypatch):
    """Pixels, labels, normalisation and every draw of the augmentation, whichever way the images came."""
    tasks = []
    for number, source in enumerate(["torchvision", "torchvision/cifar-10-batches-py", "hub", "uoft-cs/cifar10"]):
        if source == "uoft-cs/cifar10":
            monkeypatch.setenv("FISHMASK_DATA", str(sources / "mine"))
        place = source if "uoft" in source else str(sources / source)
        (out := sources / f"out{number}").mkdir()
        model = made.Model("builtin:resnet9")
        fetch("cifar10", kind="image", data=made.Data(place, text=None, label=None), model=model, out=out)
        tasks.append(Task.load(out, model, "accuracy"))
    first, *others = tasks
    assert first.classes[:2] == ["airplane", "automobile"] and first.sizes == {"train": 20, "test": 4}
    for other in others:
        assert (other.classes, other.data_digest) == (first.classes, first.data_digest)
        assert other.manifest["image"] == first.manifest["image"]
        for way in ({}, {"seed": 3, "epoch": 2}):
            for one, same in zip(first.batches("train", 7, **way), other.batches("train", 7, **way), strict=True):
                assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])


def test_cifar100_has_two_lists_of_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels, labels = draw(0)
    for name in ("train", "test"):
        content = {b"fine_labels": [99, 0, 7, 8], b"coarse_labels": labels.tolist(), b"data": pixels}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    table = read_layout(find_layout(tmp_path))["train"]
    assert table.column("fine_label").to_pylist() == [99, 0, 7, 8]
    assert table.column("coarse_label").to_pylist() == labels.tolist()
    lay_out(tmp_path)
    with pytest.raises(DataError, match="cifar-10-batches-py and cifar-100-python; name one of them as source"):
        find_layout(tmp_path)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_would_run_code_runs_none(tmp_path):
    folder = lay_out(tmp_path)
    for value in (Harm(tmp_path / "harm"), {b"data": Harm(tmp_path / "harm"), b"labels": []}):
        (folder / "data_batch_3").write_bytes(pickle.dumps(value, 2))
        with pytest.raises(DataError, match="data_batch_3: is no file of CIFAR's Python version"):
            read_layout(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[:-40], lambda c: b"", lambda c: b"PAR1" + c, lambda c: c.replace(b"labels", b"labelz"),
        lambda c: c.replace(b"u1K", b"f8K"), lambda c: c.replace(b"M\x00\x0c", b"M\x00\x0b"),
        lambda c: c.replace(b"K\x01J\x04", b"K\x01J\x05"), lambda c: pickle.dumps([1, 2]),
        lambda c: b"\x80\x02(u.", lambda c: b"\x80\x02h\x05.", lambda c: b"\x80\x02R.",
        lambda c: b"\x80\x02}K\x01b.", lambda c: b"\x80\x02t.",
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, change):
    folder = lay_out(tmp_path)
    (folder / "data_batch_2").write_bytes(change((folder / "data_batch_2").read_bytes()))
    with pytest.raises(DataError) as caught:
        read_layout(folder)
    assert str(folder / "data_batch_2") in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_labels_outside_are_named(tmp_path, made):
    folder = lay_out(tmp_path)
    (folder / "test_batch").write_bytes(old(draw(0)[0], [0, 1, 10, 2]))
    with pytest.raises(DataError, match=r"cifar-10-batches-py test: label 10 in column 'label', row 2"):
        data, model = made.Data(str(tmp_path), text=None, label=None), made.Model("builtin:resnet9")
        fetch("cifar10", kind="image", data=data, model=model, out=tmp_path)
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4: No such file or directory; expected the files of CIFAR's"):
        read_layout(folder)
