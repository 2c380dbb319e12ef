"""Labels: what becomes classes, what is regressed, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.tasks.columns import encode_labels, text_column
from pipeline.tasks.raw import RawSplit


def raw(**splits):
    return {name: RawSplit(pa.table({"label": values}), f"{name}.csv") for name, values in splits.items()}


def test_whole_numbers_are_classes():
    labels, classes = encode_labels(raw(train=[0, 1, 2, 0], validation=[2, 2]), "label")
    assert classes == ["0", "1", "2"]
    assert labels["validation"].tolist() == [2, 2] and labels["train"].dtype == np.int64


@pytest.mark.parametrize(
    ("train", "names"),
    [
        (["yes", "no", "yes"], ["no", "yes"]),
        ([True, False, True], ["false", "true"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["b", "a", "b"], pa.large_string()), ["a", "b"]),
    ],
)
def test_text_becomes_classes_in_sorted_order(train, names):
    labels, classes = encode_labels(raw(train=train, validation=train), "label")
    assert classes == names and labels["train"].tolist() == [1, 0, 1]


def test_text_that_names_known_classes_keeps_their_order():
    """F1 is that of class 1: of `equivalent`, as in the published data, not of what sorts last."""
    known = ["not_equivalent", "equivalent"]
    labels, classes = encode_labels(
        raw(train=["equivalent", "not_equivalent"], test=["equivalent"]), "label", known
    )
    assert classes == known and labels["train"].tolist() == [1, 0]
    assert encode_labels(raw(train=["a", "equivalent"]), "label", known)[1] == ["a", "equivalent"]


def test_decimal_numbers_are_regressed():
    labels, classes = encode_labels(raw(train=[0.5, 1.0], validation=[1, 2]), "label")
    assert classes is None and labels["validation"].dtype == np.float32 and labels["train"].tolist() == [0.5, 1.0]


def test_the_metric_settles_what_numbers_are():
    numbers = raw(train=[0.0, 1.0, 1.0], validation=[1.0, 0.0, 1.0])
    assert encode_labels(numbers, "label", regression=False)[1] == ["0", "1"]
    assert encode_labels(raw(train=[0, 1, 5], validation=[7]), "label", regression=True)[1] is None


def test_a_files_own_class_names_win():
    info = b'{"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}'
    table = pa.table({"label": [1, 1, 0]}).replace_schema_metadata({b"huggingface": info})
    splits = {"train": RawSplit(table, "train"), "validation": RawSplit(table, "validation")}
    assert encode_labels(splits, "label", ["a", "b", "c"])[1] == ["no", "yes"]


@pytest.mark.parametrize("test", [{"label": [-1, -1]}, {"label": [None, None]}, {"other": [1, 2]}])
def test_a_test_split_may_be_unlabelled(test):
    splits = raw(train=[0, 1], validation=[1, 0]) | {"test": RawSplit(pa.table(test), "test.csv")}
    labels, _ = encode_labels(splits, "label")
    assert labels["test"] is None and labels["validation"].tolist() == [1, 0]


BAD = [
    (dict(train=[0, 1, -1], validation=[0]), "train.csv: label -1 in column 'label', row 2"),
    (
        dict(train=[0, 1, 7], validation=[0]),
        "label 7 in column 'label', row 2 (rows count from 0), is out of range",
    ),
    (dict(train=[1, 2, 3], validation=[1]), "expected classes 0..2, as train holds 3 distinct labels"),
    (dict(train=[0, 1], validation=[0, 2]), "validation.csv: label 2 in column 'label', row 1"),
    (dict(train=[0, 0], validation=[0]), "holds one label only"),
    (dict(train=["a", "a"], validation=["a"]), "holds 'a' only"),
    (dict(train=["a", "b"], validation=["a", "c"]), "label 'c' in column 'label', row 1"),
    (dict(train=["a", ""], validation=["a"]), "is blank in row 1"),
    (dict(train=["a", "b"], validation=[0, 1]), "validation.csv: column 'label' (data.label) holds int64"),
    (dict(train=[0, None, 1, None], validation=[0]), "lacks 2 of 4 values, the first in row 1"),
    (dict(train=[0.5, float("nan")], validation=[1.0]), "label nan in column 'label', row 1"),
    (dict(train=[[1], [2]], validation=[[1]]), "holds list<item: int64>; expected text or numbers"),
    (dict(train=[str(i) for i in range(300)], validation=["1"]), "is it the right column?"),
    (dict(train=[0, 1], test=[-1, -1]), "test.csv: label -1"),
]


@pytest.mark.parametrize(("splits", "why"), BAD)
def test_labels_that_do_not_fit_are_named(splits, why):
    with pytest.raises(DataError) as caught:
        encode_labels(raw(**splits), "label")
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_decimals_are_refused_where_the_metric_needs_classes():
    with pytest.raises(DataError, match=r"label 0\.5 in column 'label', row 1"):
        encode_labels(raw(train=[0.0, 0.5, 1.0], validation=[1.0]), "label", regression=False)
    with pytest.raises(DataError, match="the metric needs numbers"):
        encode_labels(raw(train=["a", "b"], validation=["a"]), "label", regression=True)


def test_known_classes_bound_the_labels():
    with pytest.raises(DataError, match=r"label 2 .* expected classes 0\.\.1 \(no, yes\)"):
        encode_labels(raw(train=[0, 1, 2], validation=[0]), "label", ["no", "yes"])


def test_a_missing_column_names_those_there_and_the_closest():
    with pytest.raises(DataError) as caught:
        encode_labels(raw(train=[0, 1], validation=[0]), "lable")
    assert str(caught.value) == ("train.csv: data.label: no column 'lable'; did you mean 'label'? (known: label)")


def test_text_columns_hold_text_in_every_row():
    split = RawSplit(
        pa.table({"a": ["x", None], "b": [1, 2], "c": pa.array(["x", ""], pa.large_string())}), "t.csv"
    )
    with pytest.raises(DataError, match="column 'a' lacks 1 of 2 values, the first in row 1"):
        text_column(split, "a")
    with pytest.raises(DataError, match=r"column 'b' \(data.text\) holds int64; expected text"):
        text_column(split, "b")
    assert text_column(split, "c").to_pylist() == ["x", ""]
