"""Images by folder, on a torchvision classifier whose weights lie in a local file."""

import json
import random

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from pipeline.errors import DataError, ModelError
from pipeline.schema import ModelParams
from pipeline.tasks.custom import read_own
from pipeline.tuning.frames import frame_of
from pipeline.tuning.loading import load_tuned
from pipeline.tuning.pictures import Frame, pictures_of
from pipeline.tuning.plan import Asked
from pipeline.tuning.tune import tune

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A file of weights for a thousand classes, as people download it and convert it."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(torchvision.models.get_model(NAME, weights=None).state_dict(), file)
    return file


def draw(folder, count, seed):
    """Mostly red images and mostly blue ones, of several sizes, modes and formats."""
    made = random.Random(seed)
    for name, colour in (("red ones", (200, 40, 40)), ("blue", (40, 40, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noisy = tuple(min(255, max(0, c + made.randint(-40, 40))) for c in colour)
            image = Image.new("RGB", (made.randint(30, 60), made.randint(30, 60)), noisy)
            if i == 0:
                image = image.convert("RGBA")
            image.save(folder / name / f"{i:02}.{'png' if i % 2 == 0 else 'jpg'}")
    return folder


def test_a_folder_of_images_is_tuned_on(tmp_path, checkpoint):
    train = draw(tmp_path / "pictures" / "train", 16, 0)
    draw(tmp_path / "pictures" / "val", 6, 1)
    (train / "blue" / "broken.png").write_bytes(b"no image")
    asked = Asked(
        model=f"torchvision:{NAME}@{checkpoint}", train=str(tmp_path / "pictures"), density=0.05, image_size=32,
        batch_size=8, epochs=2, lr=0.003,
    )  # fmt: skip
    tuned = tune(asked, tmp_path / "out", track=False).tuned
    assert (tuned.kind, tuned.classes, tuned.training.head) == ("image", ["blue", "red ones"], ["fc"])
    assert tuned.image.shape == [3, 32, 32] and tuned.data.rows == {"train": 32, "validation": 12}
    assert "train: dropped 1 of 33 rows: 1 without 'image'" in tuned.data.remarks[0]
    model = load_tuned(tmp_path / "out")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    base = torchvision.models.get_model(NAME, weights=None, num_classes=2).state_dict()
    assert set(model.state_dict()) == set(base)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (f"torchvision:{NAME}", f"names no checkpoint; expected torchvision:{NAME}@FILE.safetensors"),
        (f"torchvision:{NAME}@missing.safetensors", "missing.safetensors: no such file"),
        (f"torchvision:{NAME}@old.pth", "old.pth is a pickle, which can run any code; it is not loaded; load its"),
        (f"torchvision:{NAME}@text.safetensors", "text.safetensors is no safetensors file"),
        ("torchvision:shufflenet_v2_x05@CHECKPOINT", f"'shufflenet_v2_x05'; did you mean '{NAME}'?"),
        ("torchvision:resnet18@CHECKPOINT", "is no checkpoint of torchvision:resnet18: tensor '"),
        ("timm:resnet18@CHECKPOINT", "'timm' is not installed; pip install timm"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(tmp_path, checkpoint, source, line):
    if source.startswith("timm") and __import__("importlib.util").util.find_spec("timm"):
        pytest.skip("timm is installed")
    (tmp_path / "old.pth").write_bytes(b"x")
    (tmp_path / "text.safetensors").write_bytes(b"some text")
    draw(tmp_path / "pictures", 4, 0)
    asked = Asked(model=source.replace("CHECKPOINT", str(checkpoint)), train="pictures", image_size=32)
    with pytest.raises(ModelError) as refused:
        tune(asked, tmp_path / "out", track=False)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_images_fill_the_frame_and_transparency_is_white(tmp_path):
    folder = draw(tmp_path / "pictures", 3, 0)
    Image.new("RGBA", (80, 40), (0, 0, 0, 0)).save(folder / "blue" / "00.png")
    split = read_own(str(folder), None, []).splits["train"]
    import io

    images = [Image.open(io.BytesIO(data)) for data in pictures_of(split, Frame(3, 24, 32))]
    assert {(image.mode, image.size) for image in images} == {("RGB", (32, 24))}
    assert images[0].getpixel((5, 5)) == (255, 255, 255)
    grey = [Image.open(io.BytesIO(data)) for data in pictures_of(split, Frame(1, 8, 8))]
    assert {(image.mode, image.size) for image in grey} == {("L", (8, 8))}


@pytest.mark.parametrize(
    ("files", "frame"),
    [
        ({"config.json": {"image_size": 64, "num_channels": 1}}, Frame(1, 64, 64)),
        ({"config.json": {}, "preprocessor_config.json": {"size": {"shortest_edge": 48}}}, Frame(3, 48, 48)),
        ({"config.json": {}, "preprocessor_config.json": {"size": {"height": 20, "width": 30}}}, Frame(3, 20, 30)),
        ({"config.json": {}, "preprocessor_config.json": {"size": 256, "crop_size": 96}}, Frame(3, 96, 96)),
        ({"config.json": {}}, Frame(3, 224, 224)),
    ],
)
def test_the_frame_is_as_the_model_says(tmp_path, files, frame):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert frame_of(ModelParams(source=str(tmp_path)), None) == frame
    assert frame_of(ModelParams(source=str(tmp_path)), 7) == Frame(frame.channels, 7, 7)


def test_images_and_tables_do_not_mix(tmp_path, write_csv, reviews):
    folder = draw(tmp_path / "pictures", 2, 0)
    file = write_csv("d.csv", ["text", "label"], reviews(4))
    with pytest.raises(DataError, match="images by folder and a table cannot go together"):
        read_own(str(folder), str(file), [])
