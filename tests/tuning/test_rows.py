"""A user's table becomes rows to train on: what is guessed and done is said, what cannot be is refused."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError, ParamsError
from pipeline.tasks.custom import read_own
from pipeline.tuning.columns import choose
from pipeline.tuning.rows import prepare

PLAIN = "text,label\na,x\nb,y\n"


def made(tmp_path, train, validation=None, text=(), label=None, objective=None):
    """Read, choose, prepare.

    Returns:
        choice, classes, split -> rows as dicts, and what was said.
    """
    told = []
    own = read_own(str(train), validation and str(validation), told)
    choice = choose(own, text, label, objective)
    out = tmp_path / "prepared"
    out.mkdir(exist_ok=True)
    classes = prepare(own, choice, None, out, told)
    return (
        choice,
        classes,
        {s: pq.read_table(out / f"{s}.parquet").to_pylist() for s in ("train", "validation")},
        told,
    )


def test_every_format_gives_the_same_rows(tmp_path, reviews, write_csv):
    rows = reviews(40)
    header = ["movie snippet", "verdict"]
    plain = write_csv("a.csv", header, rows)
    expected = made(tmp_path, plain)
    assert expected[0].text == ("movie snippet",) and expected[1] == ["bad", "good"]
    assert {row["movie snippet"] for split in expected[2].values() for row in split} == {text for text, _ in rows}
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    write_csv("a.tsv", header, rows, delimiter="\t")
    write_csv("semi.csv", header, rows, delimiter=";")
    objects = [dict(zip(header, row, strict=True)) for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(objects))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(objects), tmp_path / "a.parquet")
    (tmp_path / "utf16.csv").write_text(plain.read_text(), encoding="utf-16")
    columns = {name: [row[name] for row in objects] for name in header}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    (tmp_path / "pandas.json").write_text(
        json.dumps({name: dict(enumerate(values)) for name, values in columns.items()})
    )
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": objects}))
    names = "a.csv.gz a.tsv semi.csv a.json a.jsonl a.jsonl.gz a.parquet utf16.csv columns.json pandas.json"
    for name in [*names.split(), "wrapped.json"]:
        assert made(tmp_path, tmp_path / name)[1:3] == expected[1:3], name


def test_mixed_encodings_are_read_line_by_line(tmp_path):
    lines = ["text,label", "caf\u00e9 one,good", "na\u00efve two,bad", *(f"plain {i},good" for i in range(8))]
    data = b"\n".join(line.encode("cp1252") if "two" in line else line.encode("utf-8") for line in lines)
    (tmp_path / "mixed.csv").write_bytes(data)
    *_, rows, told = made(tmp_path, tmp_path / "mixed.csv")
    texts = {row["text"] for split in rows.values() for row in split}
    assert {"caf\u00e9 one", "na\u00efve two"} <= texts
    assert any("1 of 11 lines are no UTF-8" in line for line in told)


@pytest.mark.parametrize(
    ("header", "values", "text", "label", "objective"),
    [
        (
            ["id", "premise", "hypothesis", "label"], ["{i}", "a b {i}", "c d {i}", "{abc}"],
            ("premise", "hypothesis"), "label", "classification",
        ),
        (["class", "from"], ["{abc}", "some words {i}"], ("from",), "class", "classification"),
        (["review text", "stars"], ["some words {i}", "{five}"], ("review text",), "stars", "classification"),
        (["text", "score"], ["some words {i}", "{tenth}"], ("text",), "score", "regression"),
        (["text", "score"], ["some words {i}", "{many}"], ("text",), "score", "regression"),
        (["Comment", "kind of"], ["some words {i}", "{abc}"], ("Comment",), "kind of", "classification"),
        (
            ["select", "lambda", "None"], ["{abc}", "some longer words {i}", "{i}"],
            ("lambda",), "select", "classification",
        ),
    ],
)  # fmt: skip
def test_columns_are_guessed_and_said(tmp_path, write_csv, header, values, text, label, objective):
    rows = [
        [v.format(i=i, abc="abc"[i % 3], five=1 + i % 5, tenth=i % 7 / 10 + 0.05, many=i * 3) for v in values]
        for i in range(60)
    ]
    choice, classes, _, _ = made(tmp_path, write_csv("d.csv", header, rows))
    assert (choice.text, choice.label, choice.objective) == (text, label, objective)
    assert (classes is None) == (objective == "regression")
    for name in (*text, label):
        assert f"'{name}'" in choice.said


def test_given_columns_win_over_guesses(tmp_path, write_csv, reviews):
    file = write_csv(
        "d.csv", ["text", "label", "other"], [(t, v, "xyz"[i % 3]) for i, (t, v) in enumerate(reviews(30))]
    )
    choice, classes, _, _ = made(tmp_path, file, text=("text",), label="other", objective="classification")
    assert choice.said == "" and classes == ["x", "y", "z"]


def test_prompt_and_completion_are_a_causal_task(tmp_path):
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(10)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choice, classes, _, _ = made(tmp_path, tmp_path / "d.jsonl")
    assert (choice.kind, choice.objective, classes) == ("causal", "completion", None)


def test_numbers_are_classes_in_their_order(tmp_path, write_csv):
    file = write_csv("d.csv", ["text", "label"], [(f"some words {i}", f"{i % 11}") for i in range(66)])
    assert made(tmp_path, file)[1] == [str(i) for i in range(11)]


def test_leading_zeros_and_words_for_truth_stay_as_they_are(tmp_path, write_csv):
    file = write_csv("d.csv", ["text", "label"], [(f"{i:03}", ("true", "false")[i % 2]) for i in range(10)])
    _, classes, rows, _ = made(tmp_path, file, text=("text",))
    assert classes == ["false", "true"]
    assert "007" in {row["text"] for split in rows.values() for row in split}


def test_missing_values_are_dropped_and_said(tmp_path, write_csv, reviews):
    rows = [*reviews(20), ("", "good"), ("words without a verdict", ""), ("   ", "bad")]
    _, _, kept, told = made(tmp_path, write_csv("d.csv", ["text", "label"], rows))
    assert len(kept["train"]) + len(kept["validation"]) == 20
    assert (
        "train: dropped 3 of 23 rows: 2 without 'text', 1 without 'label' (the first is row 20, counted from 0)"
        in told
    )


def test_odd_rows_of_a_csv_are_left_out_and_said(tmp_path):
    lines = ["text,label", *(f"words {i},{'ab'[i % 2]}" for i in range(10)), "one,two,three", "alone"]
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    told = made(tmp_path, tmp_path / "d.csv")[3]
    assert "d.csv: left out 2 of 12 rows: another number of cells than the header's 2" in told


def test_five_rows_are_split_so_that_every_class_is_trained(tmp_path, write_csv):
    rows = [("one", "a"), ("two", "b"), ("three", "a"), ("four", "b"), ("five", "a")]
    _, _, kept, told = made(tmp_path, write_csv("d.csv", ["text", "label"], rows))
    assert len(kept["validation"]) == 1 and {row["label"] for row in kept["train"]} == {0, 1}
    assert "held out 1 of 5 rows as validation (of every class alike, drawn with seed 0)" in told


def test_held_out_rows_are_of_every_class_and_equal_texts_stay_together(tmp_path, write_csv):
    rows = [(f"text {i // 2}", "rare" if i % 20 < 2 else "common") for i in range(400)]
    _, classes, kept, _ = made(tmp_path, write_csv("d.csv", ["text", "label"], rows))
    rare = [row for row in kept["validation"] if classes[row["label"]] == "rare"]
    assert len(kept["validation"]) == 80 and len(rare) == 8
    assert not {row["text"] for row in kept["train"]} & {row["text"] for row in kept["validation"]}


def test_rows_that_stand_in_both_files_are_said(tmp_path, write_csv, reviews):
    train, other = reviews(30), reviews(10, seed=1)
    files = [write_csv(n, ["text", "label"], r) for n, r in (("t.csv", train), ("v.csv", other + train[:3]))]
    told = made(tmp_path, *files)[3]
    assert any(line.startswith("warning: 3 of 13 rows of validation stand in train, too") for line in told)


def test_imbalance_is_said(tmp_path, write_csv):
    rows = [(f"some words {i}", "ham" if i % 10 else "spam") for i in range(100)]
    told = made(tmp_path, write_csv("d.csv", ["text", "label"], rows))[3]
    assert any("90% of train is class 'ham' (rarest: 'spam', 8 rows)" in line for line in told)


def test_a_folder_of_splits_brings_its_validation(tmp_path, write_csv, reviews):
    (tmp_path / "data").mkdir()
    write_csv("data/train.csv", ["text", "label"], reviews(20))
    write_csv("data/dev.csv", ["text", "label"], reviews(6, seed=1))
    kept = made(tmp_path, tmp_path / "data")[2]
    assert (len(kept["train"]), len(kept["validation"])) == (20, 6)


def test_a_hub_id_brings_its_columns_and_names(tmp_path, monkeypatch):
    (tmp_path / "glue" / "mrpc").mkdir(parents=True)
    for split, rows in (("train", 12), ("validation", 4)):
        rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2, "idx": i} for i in range(rows)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "glue" / "mrpc" / f"{split}.parquet")
    monkeypatch.setenv("FISHMASK_DATA", str(tmp_path / "glue"))
    choice, classes, kept, _ = made(tmp_path, "nyu-mll/glue:mrpc")
    assert choice.text == ("sentence1", "sentence2") and choice.label == "label"
    assert classes == ["not_equivalent", "equivalent"]
    assert [row["label"] for row in kept["validation"]] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("lines", "options", "error", "line"),
    [
        ("text,label\na,x\nb,x\n", {}, DataError, "holds 'x' only; expected two or more classes"),
        ("text,label\n", {}, DataError, "holds no rows"),
        ("text,label\n,\n ,\n", {}, DataError, "no row has both its text and 'label'"),
        ("a,b\n1,2\n3,4\n", {"label": "b"}, DataError, "no column of texts; the columns are a: add --text"),
        (PLAIN, {"label": "lable"}, DataError, "--label: no column 'lable'; did you mean 'label'?"),
        (PLAIN, {"text": ("txt",)}, DataError, "--text: no column 'txt'; did you mean 'text'?"),
        (PLAIN, {"text": ("text",), "label": "text"}, ParamsError, "'text' is a text column, too"),
        (PLAIN, {"objective": "rank"}, ParamsError, "--objective: unknown 'rank'"),
        (
            "one,two,k\na b c,d e f,x\ng h i,j k l,x\nm n,o p,y\nq,r s,y\n", {}, DataError,
            "cannot tell which column is the text",
        ),
        (
            "x,y1,y2\na b c,0,1\nd e f,1,0\ng h i,0,1\nj k,1,0\n", {}, DataError,
            "cannot tell which column is the label; it could be y1, y2",
        ),
        ("text,text\na,x\n", {}, DataError, "column 'text' appears twice"),
        ('text,label\n"a,x\nb,y\n', {}, DataError, "a quotation mark opens and is never closed"),
        (PLAIN, {"objective": "regression"}, DataError, "holds no numbers; regression needs them"),
        (f"text,label\na,{'x' * 99}\n", {}, DataError, f"holds '{'x' * 40}…' only"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tmp_path, lines, options, error, line):
    (tmp_path / "d.csv").write_text(lines)
    with pytest.raises(error) as refused:
        made(tmp_path, tmp_path / "d.csv", **options)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_validation_file_without_the_column_is_refused(tmp_path, write_csv, reviews):
    train = write_csv("t.csv", ["text", "label"], reviews(10))
    for header in (["Text", "label"], ["text", "Label"]):
        other = write_csv("v.csv", header, reviews(4))
        with pytest.raises(DataError, match=r"v.csv: no column '(text|label)'; did you mean '(Text|Label)'\?"):
            made(tmp_path, train, other)


def test_what_looks_like_a_mistake_is_said(tmp_path, write_csv, reviews):
    rows = reviews(20)
    told = made(tmp_path, write_csv("a.csv", ["text", "label"], [*rows, ("some words", "N/A")]))[3]
    assert any("warning: 'N/A' is taken for a class of 'label' (1 rows)" in line for line in told)
    told = made(tmp_path, write_csv("b.csv", rows[0], rows[1:]))[3]
    assert any("does" in line and "lack a header line?" in line for line in told)
    lines = [*(f"{text},{label}" for text, label in rows), '"never closed,good', "more words,bad"]
    (tmp_path / "c.csv").write_text("\n".join(["text,label", *lines]))
    told = made(tmp_path, tmp_path / "c.csv")[3]
    assert any("c.csv: a quotation mark opens and is never closed" in line for line in told)


def test_a_validation_class_that_train_lacks_is_refused(tmp_path, write_csv, reviews):
    train = write_csv("t.csv", ["text", "label"], reviews(10))
    other = write_csv("v.csv", ["text", "label"], [("words", "ugly")])
    with pytest.raises(
        DataError, match="label 'ugly' of validation does not occur in train; expected one of bad, good"
    ):
        made(tmp_path, train, other)


def test_a_broken_json_line_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": \n')
    with pytest.raises(DataError, match="d.jsonl: cannot be read as jsonl: line 2: "):
        read_own(str(tmp_path / "d.jsonl"), None, [])


def test_what_is_no_data_is_refused(tmp_path):
    (tmp_path / "d.xlsx").write_text("x")
    with pytest.raises(DataError, match="unknown format '.xlsx'; expected .parquet, .csv"):
        read_own(str(tmp_path / "d.xlsx"), None, [])
    with pytest.raises(DataError, match="no such file or folder"):
        read_own(str(tmp_path / "nothing.csv"), None, [])
    (tmp_path / "d.csv.gz").write_text("no gzip")
    with pytest.raises(DataError, match="d.csv.gz: cannot be read as csv"):
        read_own(str(tmp_path / "d.csv.gz"), None, [])
