"""Table 4 and its figure, from metrics written by hand."""

import csv
import io
import json

import pytest

from pipeline.errors import DataError
from pipeline.reports.checkpoints import checkpoint_table, decay_figure
from pipeline.reports.page import write_report
from pipeline.reports.reading import load_results

BYTES = {"coordinates": 400, "values": 24_000, "buffers": 4000, "header": 1600}


def chain(metrics, method="fish", setting="fixed", scores=(0.9, 0.8, 1.0), every=None, norms=None, **more):
    epochs = [
        {"epoch": 1, "accuracy": 0.5, "bytes": BYTES | {"coordinates": 700}},
        {"epoch": 2, "accuracy": 0.75, "bytes": BYTES | {"coordinates": 100}},
    ]
    for row, norm in zip(epochs, norms or (), strict=False):
        row["frozen_norm"] = norm
    seed = {"density": 0.02, "dense_bytes": 1_200_000, "checkpoints": 2}
    seeds = {str(s): seed | {"metric": score, "epochs": epochs} for s, score in enumerate(scores)}
    content = {
        "task": "digits", "method": method, "setting": setting, "metric": "accuracy", "lr": 0.1, "every": every,
        "weight_decay": 0.0005, "weight_decay_scope": "mask", "seeds": seeds,
        "data": {"rows": {"train": 1433, "validation": 364}, "reported": "validation", "source": "package:x"},
    }  # fmt: skip
    metrics.write("checkpoint", f"digits-{method}-{setting}", content | more)


@pytest.fixture
def chains(metrics):
    metrics.train("digits", "dense", [0.97, 0.98, 0.99], density=1.0)
    chain(metrics, norms=(1.0, 1.0))
    chain(metrics, "random", "often", (0.7, None, 0.9), every=2)
    chain(metrics, setting="leak", norms=(0.5, 0.01), weight_decay_scope="all")
    return metrics.folder


def test_without_such_metrics_nothing_is_shown(demo, tmp_path):
    results = load_results(demo)
    assert checkpoint_table(results) is None and decay_figure(results) is None
    assert not any("checkpoints" in path.name for path in write_report(demo, tmp_path / "out", "demo"))


def test_the_table_tells_what_a_checkpoint_weighs(chains):
    table = checkpoint_table(load_results(chains))
    rows = [[entry.text for entry in row] for row in table.rows]
    assert rows[0] == [
        "digits", "fish", "fixed", "2 %", "90.0 ± 10.0", "3", "400 B", "24 kB", "4 kB", "30 kB", "40", "6",
        "0.0005", "0.1",
    ]  # fmt: skip
    assert rows[1][:6] == ["digits", "random", "every 2 epochs", "2 %", "80.0 ± 14.1", "2"]
    assert rows[2][12] == "0.0005 everywhere"
    assert rows[3][:5] == ["digits", "dense", "–", "100 %", "98.0 ± 1.0"] and rows[3][9] == "800 kB"
    notes = " ".join(table.notes)
    assert "n = 2 to 3 seeds" in notes and "diverged and not counted: seed 1" in notes
    assert "scored on 364 validation rows, trained on 1,433 train rows" in notes
    records = list(csv.DictReader(io.StringIO(table.csv())))
    assert float(records[0]["checkpoint_bytes"]) == 30_000 and float(records[0]["seed_2"]) == 1.0
    assert [record["weight_decay_scope"] for record in records] == ["mask", "mask", "all", ""]


def test_the_figure_sets_decay_against_the_score(chains):
    figure = decay_figure(load_results(chains))
    assert "decay on every weight: 50.0 at 0.5, 75.0 at 0.01" in figure.description
    assert "decay on the mask only: 50.0 at 1, 75.0 at 1" in figure.description
    assert "random" not in figure.description
    assert figure.svg == decay_figure(load_results(chains)).svg


def test_without_a_leak_there_is_no_figure(metrics):
    chain(metrics, norms=(1.0, 1.0))
    results = load_results(metrics.folder)
    assert decay_figure(results) is None and len(checkpoint_table(results).rows) == 1


def test_a_run_that_diverged_at_once_has_no_bytes(metrics):
    lost = {"0": {"metric": None, "density": 0.02, "epochs": [], "diverged": "the loss"}}
    chain(metrics, seeds=lost)
    (row,) = checkpoint_table(load_results(metrics.folder)).rows
    assert [entry.text for entry in row][4:12] == ["–", "0", "–", "–", "–", "–", "–", "0"]


def test_only_the_grids_cells_are_shown(chains, tmp_path):
    results = load_results(chains, None, {("digits", "fish", "fixed")})
    assert list(results.chains) == [("digits", "fish", "fixed")]
    files = write_report(chains, tmp_path / "out", "demo", None, set())
    assert not any("checkpoints" in path.name for path in files)
    shown = write_report(chains, tmp_path / "again", "demo")
    assert {"checkpoints.md", "checkpoints.csv", "decay.svg"} <= {path.name for path in shown}
    assert 'id="checkpoints"' in shown[0].read_text()


def test_a_file_that_lacks_a_key_is_named(chains):
    file = chains / "checkpoint" / "digits-fish-fixed.json"
    content = json.loads(file.read_text())
    del content["every"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"digits-fish-fixed\.json: not the metrics of a chain .*'every' is missing"
    ):
        load_results(chains)
