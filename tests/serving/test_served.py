"""Images and completions over HTTP, a file by `mlflow models predict`: what the Predictor answers, or a 4xx."""

import base64
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline.serving.predictor import Predictor
from pipeline.serving.registry import register
from tests.serving.folders import make_tuned
from tests.serving.server import JSON, Thread
from tests.serving.test_pictures import CLASSES, FORM, png
from tests.tuning.conftest import write_decoder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of MLflow and its server
]


@pytest.fixture(scope="module")
def digits(store):
    """A classifier of images, registered by a folder of image files, and its client."""
    folder = store / "digits"
    make_tuned(folder, "builtin:resnet-digits", CLASSES, kind="image", image=FORM)
    (store / "pictures").mkdir()
    for row, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)):
        (store / "pictures" / f"{row}.png").write_bytes(png(pixels))
    register([str(folder)], "digits", example=str(store / "pictures"), device="cpu")
    client = Thread("models:/digits/1")
    yield folder, client
    client.end()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def writer(request, store):
    """A language model, registered, and its client."""
    base = write_decoder(request.param, store / f"{request.param}-base")
    folder = store / request.param
    make_tuned(folder, base, (), kind="causal", text=("ask",), label="say", max_length=24)
    register([str(folder)], request.param, max_new_tokens=6, device="cpu")
    client = Thread(f"models:/{request.param}/1")
    yield folder, client
    client.end()


def test_images_are_answered_over_http(digits, store):
    folder, client = digits
    files = [path.read_bytes() for path in sorted((store / "pictures").iterdir())]
    sent = [base64.b64encode(data).decode() for data in [*files, b"no image"]]
    wanted = Predictor(folder, device="cpu").answer({"image": [*files, b"no image"]}).columns
    answers = client.answers({"image": sent})
    assert [row["prediction"] for row in answers] == wanted["prediction"].to_pylist()
    assert answers[4] == dict.fromkeys(wanted) and len({row["prediction"] for row in answers}) > 2
    for name in CLASSES:
        assert [row[f"p_{name}"] for row in answers] == wanted[f"p_{name}"].to_pylist()


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_records": [{"image": 7}]},
        {"dataframe_records": [{"image": {"bytes": "aGk="}}]},
        {"dataframe_records": [{"file": "/etc/passwd"}]},
        {"dataframe_records": [{"file": "/etc/passwd", "class": "one"}]},
        {"dataframe_records": [{"image": ["aGk="]}]},
        {"inputs": {"image": [[1, 2], [3, 4]]}},
    ],
)
def test_what_is_no_image_is_answered_with_4xx(digits, body):
    status, text = digits[1].ask(body)
    assert 400 <= status < 500, text


@pytest.mark.parametrize("text", ["/etc/passwd", "file:///etc/passwd", "not base64!", "", "é"])
def test_a_text_in_place_of_an_image_reads_no_file(digits, text):
    status, answer = digits[1].ask({"dataframe_records": [{"image": text}]})
    if status == 200:
        assert json.loads(answer)["predictions"] == [dict.fromkeys(["prediction", *(f"p_{c}" for c in CLASSES)])]
    else:
        assert 400 <= status < 500, answer


def test_completions_are_answered_over_http(writer):
    folder, client = writer
    prompts = ["the film was good verdict :", None, "bad", "the day felt " * 12 + "sad verdict :", "  "]
    wanted = Predictor(folder, max_new_tokens=6, device="cpu").answer({"ask": prompts}).columns
    answers = client.answers({"ask": prompts})
    assert [row["prediction"] for row in answers] == wanted["prediction"].to_pylist()
    assert answers[1] == answers[4] == {"prediction": None}
    for body in ({"dataframe_records": [{"ask": ["a", "b"]}]}, {"dataframe_records": [{"prompt": "a"}]}):
        assert 400 <= client.ask(body)[0] < 500
    status, _ = client.ask({"inputs": {"ask": ["bad"]}, "params": {"max_new_tokens": 10**9}})
    assert status == 200  # MLflow leaves out what the signature does not name


def test_mlflow_models_predict_answers_a_file(digits, store):
    folder, client = digits
    files = [path.read_bytes() for path in sorted((store / "pictures").iterdir())]
    sent = [{"image": base64.b64encode(data).decode()} for data in files]
    (store / "request.json").write_text(json.dumps({"dataframe_records": sent}))
    options = "--env-manager local -i request.json -o answers.json -t json"
    command = [sys.executable, *f"-m mlflow models predict -m models:/digits/1 {options}".split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run(command, env=environment, cwd=store, check=True, capture_output=True)
    found = json.loads((store / "answers.json").read_text())["predictions"]
    wanted = client.ask({"dataframe_records": sent}, JSON)[1]
    for one, other in zip(found, json.loads(wanted)["predictions"], strict=True):
        assert one["prediction"] == other["prediction"]
        np.testing.assert_allclose(one["p_one"], other["p_one"], rtol=1e-5)  # this process may compute in AVX-512
