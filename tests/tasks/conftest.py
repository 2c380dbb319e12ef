"""Small made data and models: folders in every format, and a tiny BERT saved as the hub lays it out."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch

WORDS = [f"w{i}" for i in range(40)]


@dataclass(frozen=True)
class Data:
    source: str = "unused"
    revision: str | None = None
    text: tuple[str, ...] | None = ("text",)
    label: str | None = "label"
    limit: dict[str, int] | None = None


@dataclass(frozen=True)
class Model:
    source: str
    revision: str | None = None
    max_length: int | None = 16


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    if "data" not in os.environ.get("PYTEST_CURRENT_TEST", ""):
        monkeypatch.delenv("FISHMASK_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A BERT of 2 layers and 16 units without a classifier, and its tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, model_input_names=inputs, **special
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def sentences(count: int, start: int = 0) -> list[str]:
    """Texts of 1 to 9 words, no two alike in a row."""
    return [" ".join(WORDS[(i * 7 + j) % 40] for j in range(1 + i % 9)) for i in range(start, start + count)]


def write(folder: Path, **splits: dict) -> Path:
    """Write dicts of columns as parquet, one file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def examples(count: int, start: int = 0, classes: int = 3) -> dict:
    return {"text": sentences(count, start), "label": [i % classes for i in range(count)]}


@pytest.fixture(scope="session")
def made():
    """The makers of this file, for tests to use."""
    return SimpleNamespace(Data=Data, Model=Model, sentences=sentences, write=write, examples=examples)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"), train=examples(100), validation=examples(30, 500))


@pytest.fixture
def make(tmp_path, bert):
    """Fetch a text folder with the tiny BERT's tokenizer, and open it."""

    def run(folder: Path, *, metric: str = "accuracy", out: str = "fetched", **settings) -> Task:
        target = tmp_path / out
        target.mkdir()
        model = Model(str(bert))
        data = Data(source=str(folder), **settings)
        fetch("made", kind="text", data=data, model=model, out=target, metric=metric)
        return Task.load(target, model, metric)

    return run
