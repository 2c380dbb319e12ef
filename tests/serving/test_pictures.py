"""Images: a folder of files, a column of encoded bytes; answers are the model's on the pixels, normalised."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import DataError
from pipeline.serving.predictor import Predictor
from pipeline.serving.questions import read_rows
from tests.serving.folders import make_tuned

pytestmark = pytest.mark.usefixtures("one_thread")
FORM = {"shape": [1, 8, 8], "mean": [0.3], "std": [0.4]}
CLASSES = ("one", "two", "three")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "digits"
    return folder, make_tuned(folder, "builtin:resnet-digits", CLASSES, kind="image", image=FORM)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def expected(model, arrays):
    x = torch.from_numpy(np.stack(arrays)).float()[:, None] / 255
    with torch.no_grad():
        return model((x - 0.3) / 0.4).softmax(1).numpy()


@pytest.mark.parametrize("batch_size", [2, 64])
def test_encoded_images_in_a_column(digits, pixels, batch_size):
    folder, model = digits
    files = [png(array) for array in pixels]
    files[2], files[5] = None, b"no image"
    answers = Predictor(folder, batch_size=batch_size, device="cpu").answer(
        pa.table({"n": range(7), "photo": files})
    )
    p = expected(model, pixels)
    assert answers.missing == {"photo": 2}
    for row in range(7):
        found = [answers.columns[f"p_{name}"][row].as_py() for name in CLASSES]
        if row in (2, 5):
            assert found == [None] * 3
        else:
            np.testing.assert_allclose(found, p[row], rtol=1e-5)
            assert answers.columns["prediction"][row].as_py() == CLASSES[p[row].argmax()]


def test_folders_of_image_files(digits, pixels, tmp_path):
    folder, model = digits
    for row, name in enumerate(("three", "one", "three", "two", "one", "two", "one")):
        (tmp_path / "named" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat").mkdir(exist_ok=True)
        for place in (tmp_path / "named" / name, tmp_path / "flat"):
            (place / f"{row}.png").write_bytes(png(pixels[row]))
    (tmp_path / "flat" / "notes.txt").write_text("no image")

    def run(*arguments):
        done = CliRunner().invoke(app, [str(a) for a in (*arguments, "--device", "cpu")])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    run("predict", "-d", folder, "-i", tmp_path / "flat", "-o", tmp_path / "flat.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "flat.jsonl").read_text().splitlines()]
    wanted = [CLASSES[p.argmax()] for p in expected(model, pixels)]
    assert [row["prediction"] for row in rows] == wanted
    assert [row["file"].rpartition("/")[2] for row in rows] == [f"{row}.png" for row in range(7)]
    (result,) = json.loads(run("evaluate", "-d", folder, "-i", tmp_path / "named", "--json"))
    truth = ("three", "one", "three", "two", "one", "two", "one")
    assert result["rows"] == 7 and result["scores"]["accuracy"] == np.mean(np.array(truth) == wanted)


def test_a_table_without_images_is_refused(digits, tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="t.parquet: no column of encoded images; expected one, or a folder"):
        Predictor(digits[0], device="cpu").answer(read_rows(str(tmp_path / "t.parquet"), []))


@pytest.mark.filterwarnings("ignore")  # of MLflow's imports
def test_a_request_holds_images_and_never_paths(digits, pixels, tmp_path):
    """What MLflow hands over: bytes. A path is a text, and no image is read from it."""
    import pandas as pd
    from mlflow.exceptions import MlflowException

    from pipeline.serving.served import Served

    class Context:
        artifacts = {"deltas": str(digits[0].parent)}
        model_config = {
            "base": "builtin:resnet-digits", "deltas": ["digits"], "text": None, "max_length": None,
            "device": "cpu", "precision": "auto", "batch_size": 8, "max_new_tokens": None, "max_rows": 9,
            "max_characters": 99,
        }  # fmt: skip

    served = Served()
    served.load_context(Context())
    (tmp_path / "x.png").write_bytes(png(pixels[0]))
    found = served.predict(Context(), pd.DataFrame({"image": [png(pixels[0]), None, b"junk"]}))
    wanted = Predictor(digits[0], device="cpu").answer({"image": [png(pixels[0])]}).columns
    assert found["prediction"].tolist() == [wanted["prediction"][0].as_py(), None, None]
    for name in ("image", "file"):
        with pytest.raises(MlflowException, match="expected an image|no column of encoded images"):
            served.predict(Context(), pd.DataFrame({name: [str(tmp_path / "x.png")]}))
    with pytest.raises(MlflowException, match="no column of encoded images"):
        served.predict(Context(), pd.DataFrame({"file": [str(tmp_path / "x.png")], "class": ["one"]}))
