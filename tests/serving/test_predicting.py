"""`fishmask predict` and `fishmask evaluate`: files in, answers and scores out, in one command."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, recall_score
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import DataError, FishmaskError, ParamsError
from pipeline.serving.predictor import Predictor

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [
    {"id": 7, "review": "a good, \"kind\" film", "verdict": "good"},
    {"id": 3, "review": "", "verdict": "bad"},
    {"id": 5, "review": "awful\nroad", "verdict": "bad"},
    {"id": 1, "review": "the story was ugly and the day was dark and the house was cold", "verdict": None},
    {"id": 9, "review": "1984", "verdict": "good"},
]  # fmt: skip


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, FishmaskError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def write(path, rows=ROWS):
    if path.suffix in {".csv", ".tsv"}:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = path.suffix == ".jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def read(path):
    if path.suffix in {".csv", ".tsv"}:
        with open(path, newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(path.read_text())
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_goes_in_and_comes_out_in_order(reviews, tmp_path, suffix):
    source, out = write(tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}"
    done = run("predict", "--delta", reviews[0], "--input", source, "-o", out, "--device", "cpu", "--json")
    facts = json.loads(done.stdout)
    assert facts["rows"] == 5 and facts["columns"] == ["id", "review", "verdict", "prediction", "p_bad", "p_good"]
    assert "1 of 5 rows lack 'review': no answer there" in done.stderr
    assert (
        "1 texts are longer than the model takes and are cut" in done.stderr
        and "predict reviews: 4/4" in done.stderr
    )
    wanted = Predictor(reviews[0], device="cpu").answer({"review": [row["review"] for row in ROWS]}).columns
    rows = read(out)
    assert [int(row["id"]) for row in rows] == [7, 3, 5, 1, 9]
    assert [row["review"] for row in rows] == [row["review"] for row in ROWS]
    assert [row["prediction"] or None for row in rows] == wanted["prediction"].to_pylist()
    found = [np.float32(row["p_good"]) if row["p_good"] not in ("", None) else None for row in rows]
    assert found == wanted["p_good"].to_pylist()  # not a bit is lost on the way through a file
    assert [path.name for path in tmp_path.iterdir()] == sorted({source.name, out.name}) or suffix
    assert not list(tmp_path.glob(".*"))


def test_printed_as_csv_and_the_columns_of_several_deltas(reviews, others, tmp_path):
    source = write(tmp_path / "in.csv", [row | {"one": "good", "two": "day"} for row in ROWS])
    again, pairs, stars = (others[name][0] for name in ("again", "pairs", "stars"))
    deltas = ["-d", reviews[0], "-d", again, "-d", f"p={pairs}", "-d", stars / "delta.safetensors"]
    done = run("predict", *deltas, "-i", source, "--only", "--device", "cpu")
    rows = list(csv.reader(io.StringIO(done.stdout)))
    assert rows[0] == [
        *(f"{name}.{column}" for name in ("reviews", "again") for column in ("prediction", "p_bad", "p_good")),
        *("p.prediction", "p.p_x", "p.p_y", "p.p_z", "stars.prediction"),
    ]
    alone = run("predict", "-d", stars, "-i", source, "--only", "--device", "cpu").stdout
    assert [row[-1:] for row in rows[1:]] == list(csv.reader(io.StringIO(alone)))[1:]
    assert len(rows) == 6


def test_what_predict_refuses(reviews, bert, tmp_path):
    source = write(tmp_path / "in.csv")
    common = ("predict", "--delta", reviews[0], "--device", "cpu")
    for out, why in (
        ("in.csv", "is the input; write elsewhere"),
        ("out.xlsx", "unknown format '.xlsx'; expected .csv"),
        (".", "unknown format|is a folder"),
    ):
        with pytest.raises(ParamsError, match=why):
            run(*common, "-i", source, "-o", tmp_path / out)
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(ParamsError, match="exists; add --force"):
        run(*common, "-i", source, "-o", tmp_path / "out.csv")
    with pytest.raises(DataError, match="nothing.csv: no such file; name the rows with --input"):
        run(*common, "-i", tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="no column 'review' .known: text"):
        run(*common, "-i", write(tmp_path / "other.csv", [{"text": "x"}]), "-o", tmp_path / "out.csv", "--force")
    assert (tmp_path / "out.csv").read_text() == "mine"
    run(*common, "-i", source, "-o", tmp_path / "out.csv", "--force")
    with pytest.raises(DataError, match="has a column 'prediction', as the answers do; add --only"):
        run(*common, "-i", tmp_path / "out.csv")
    with pytest.raises(ParamsError, match="two are named 'reviews'; write --delta NAME=PATH"):
        run(*common, "--delta", reviews[0], "-i", source)


def test_columns_that_a_file_cannot_hold_are_left_out_and_said(reviews, tmp_path):
    rows = [{"review": "good", "tags": ["a", "b"], "raw": b"\x00", "score": float("nan")}]
    source = write(tmp_path / "in.parquet", rows)
    done = run("predict", "-d", reviews[0], "-i", source, "-o", tmp_path / "o.csv", "--device", "cpu")
    assert "o.csv: .csv cannot hold tags, raw: left out" in done.stderr
    assert list(read(tmp_path / "o.csv")[0]) == ["review", "score", "prediction", "p_bad", "p_good"]
    run("predict", "-d", reviews[0], "-i", source, "-o", tmp_path / "o.jsonl", "--device", "cpu")
    (row,) = read(tmp_path / "o.jsonl")
    assert row["tags"] == ["a", "b"] and row["score"] is None and "raw" not in row


def test_evaluate_scores_what_predict_answers(reviews, others, tmp_path):
    source = write(tmp_path / "in.csv", ROWS * 3)
    arguments = ("-d", reviews[0], "-d", others["again"][0], "-i", source, "--device", "cpu")
    done = run("evaluate", *arguments, "--json")
    assert "3 of 15 rows lack 'verdict': left out" in done.stderr
    assert "3 rows lack 'review': left out" in done.stderr
    rows = list(csv.DictReader(io.StringIO(run("predict", *arguments).stdout)))
    rows = [row for row in rows if row["review"] and row["verdict"]]
    for result in json.loads(done.stdout):
        truth, found = zip(*((row["verdict"], row[f"{result['delta']}.prediction"]) for row in rows), strict=True)
        assert result["rows"] == 9 and result["metric"] == "accuracy"
        assert result["scores"]["accuracy"] == accuracy_score(truth, found)
        losses = [-np.log(float(row[f"{result['delta']}.p_{row['verdict']}"])) for row in rows]
        assert result["scores"]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        recalls = recall_score(truth, found, average=None, labels=["bad", "good"], zero_division=0)
        assert [row["recall"] for row in result["classes"]] == list(recalls)
        assert [(row["name"], row["rows"]) for row in result["classes"]] == [("bad", 3), ("good", 6)]
    shown = run("evaluate", "-d", reviews[0], "-i", source, "--metric", "matthews", "--device", "cpu").stdout
    assert "matthews" in shown and "recall" in shown


def test_labels_by_number_regression_and_what_does_not_fit(reviews, others, tmp_path):
    numbered = write(tmp_path / "n.csv", [row | {"verdict": int(row["verdict"] == "good")} for row in ROWS])
    named = write(tmp_path / "v.csv", [row | {"verdict": row["verdict"] or "bad"} for row in ROWS])
    both = [
        run("evaluate", "-d", reviews[0], "-i", file, "--json", "--device", "cpu") for file in (numbered, named)
    ]
    assert both[0].stdout == both[1].stdout
    stars = [row | {"stars": number / 2} for number, row in enumerate(ROWS)]
    source = write(tmp_path / "s.csv", stars)
    (result,) = json.loads(
        run("evaluate", "-d", others["stars"][0], "-i", source, "--json", "--device", "cpu").stdout
    )
    assert result["metric"] == "pearson" and result["rows"] == 4 and "classes" not in result
    wrong = write(tmp_path / "w.csv", [row | {"verdict": "meh"} for row in ROWS])
    for delta, file, more, why in (
        (reviews[0], wrong, (), "label 'meh' in column 'verdict', row 0 .*expected one of bad, good"),
        (others["stars"][0], source, ("--label", "verdict"), "'good' in column 'verdict', row 0 .*is no number"),
        (reviews[0], source, ("--label", "verdicts"), r"no column 'verdicts'; did you mean 'verdict'\?"),
    ):
        with pytest.raises(DataError, match=why):
            run("evaluate", "-d", delta, "-i", file, "--device", "cpu", *more)
    with pytest.raises(ParamsError, match="'pearson' does not fit the delta; expected one of accuracy"):
        run("evaluate", "-d", reviews[0], "-i", named, "--metric", "pearson", "--device", "cpu")
