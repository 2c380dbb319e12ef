"""A tiny BERT that has learnt nothing, and reviews whose words tell their class."""

import csv
import random

import pytest

GOOD = "good great fine lovely happy bright kind warm sweet calm".split()
BAD = "bad awful poor ugly sad dark cruel cold bitter angry".split()
PLAIN = "the a film story day house road song walk meal was is felt seemed".split()


def review(i, draw):
    words = draw.choices(PLAIN, k=3) + draw.choices((BAD, GOOD)[i % 2], k=3)
    draw.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="session")
def reviews():
    """Texts and their verdicts.

    Returns:
        A function: how many -> [(text, verdict)], each call's rows the first of the same.
    """

    def make(count, seed=0):
        draw = random.Random(seed)
        return [(review(i, draw), ("bad", "good")[i % 2]) for i in range(count)]

    return make


@pytest.fixture
def write_csv(tmp_path):
    def write(name, header, rows, encoding="utf-8", **dialect):
        with open(tmp_path / name, "w", newline="", encoding=encoding) as file:
            writer = csv.writer(file, **dialect)
            writer.writerow(header)
            writer.writerows(rows)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert") / "bert"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    import torch

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """Make a tiny decoder with a tokenizer of whole words.

    Returns:
        A function: ``gpt2`` or ``llama`` -> the folder of an untrained language model.
    """
    made = {}

    def make(name):
        if name not in made:
            made[name] = write_decoder(name, tmp_path_factory.mktemp(name) / name)
        return made[name]

    return make


def write_decoder(name, folder):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *GOOD, *BAD, *PLAIN, "verdict", ":", "good_one", "bad_one"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "unk_token": "<unk>"}
    if name == "llama":  # begins every text, as the real one does
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        special["bos_token"] = "<s>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=24,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    if name == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=24, **sizes)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=24, **sizes,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path, one_thread):
    """Each test works in its own folder, off the hub, with its own store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for name in ("FISHMASK_DATA", "MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
