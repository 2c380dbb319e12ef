"""`fishmask checkpoint`: what it prints is what lies on the disk; what it writes is the state, bit for bit."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import Chain, Mask, ParameterIndex, cli
from pipeline.artifacts import chains
from tests.artifacts.test_application import tune, write_base

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["fishmask", "checkpoint", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=[True, False], ids=["base kept", "base elsewhere"])
def kept(request):
    return request.param


@pytest.fixture
def states(tmp_path, kept):
    """A chain of four steps; its states."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))
    chain = Chain.create(tmp_path / "chain", model, keep_base=kept, info={"task": "toy"})
    found = [copy.deepcopy(model.state_dict())]
    for step in range(4):
        shapes = ParameterIndex.of(model).shapes
        mask = Mask.from_bool({name: torch.rand(shape) < 0.1 for name, shape in shapes.items()})
        with torch.no_grad():
            for name, at in mask.indices.items():
                model.get_parameter(name).view(-1)[at] = torch.randn(at.numel())
        model[1].num_batches_tracked += 1
        chain.append(model, mask, info={"epoch": step, "accuracy": 0.5})
        found.append(copy.deepcopy(model.state_dict()))
    save_file(found[0], tmp_path / "base.safetensors")
    return found


def test_list_counts_the_bytes_on_the_disk(tmp_path, states, kept, run):
    code, out, _ = run("list", tmp_path / "chain", "--json")
    facts = json.loads(out)
    dense = sum(t.numel() * t.element_size() for t in states[0].values())
    assert code == 0 and [row["step"] for row in facts["steps"]] == [1, 2, 3, 4]
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "chain").iterdir())
    assert (facts["state_bytes"], facts["dense_bytes"]) == (dense, (4 + kept) * dense)
    assert facts["ratio"] == facts["dense_bytes"] / facts["bytes"]
    code, out, _ = run("list", tmp_path / "chain")
    assert code == 0 and "accuracy=0.5, epoch=3" in out and f"{facts['bytes']:,} bytes" in out


def test_restore_writes_each_state(tmp_path, states, kept, run):
    base = () if kept else ("--base", tmp_path / "base.safetensors")
    for step in (0, 1, 2, 3, 4, -1, -2):
        code, out, _ = run(
            "restore", tmp_path / "chain", "--step", step, "-o", tmp_path / "s.safetensors", *base, "--force"
        )
        number = step if step >= 0 else 5 + step
        assert code == 0 and f"step {number} of" in out
        written = load_file(tmp_path / "s.safetensors")
        assert written.keys() == states[number].keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in states[number].items())
    for arguments, part, expected in (
        (("--step", "9"), "has no step 9; it has 1, 2, 3, 4", 2),
        (("-o", tmp_path / "folder"), "does not say what its model is", 2),
        (("-o", tmp_path / "no" / "s.safetensors"), "create the folder first", 7),
        (("-o", tmp_path / "s.safetensors"), "exists; add --force to replace it", 2),
        (("-o", tmp_path / "chain" / "base.safetensors", "--force"), "lies in", 2),
        (("-o", tmp_path / "chain", "--force"), "is " + str(tmp_path / "chain"), 2),
    ):
        given = ("-o", tmp_path / "x.safetensors", *arguments, *base)
        code, _, err = run("restore", tmp_path / "chain", *given)
        assert (code, err.count("\n")) == (expected, 1) and part in err
    assert not (tmp_path / "x.safetensors").exists() and not (tmp_path / "folder").exists()


def test_squash_and_prune_keep_what_they_say(tmp_path, states, kept, run):
    chain, out = tmp_path / "chain", tmp_path / "s.safetensors"
    base = () if kept else ("--base", tmp_path / "base.safetensors")
    assert run("squash", chain, 2, 3)[0] == 0
    assert [row["step"] for row in json.loads(run("list", chain, "--json")[1])["steps"]] == [1, 3, 4]
    assert run("prune", chain, "--step", 3, "--step", 4)[0] == 0
    assert run("prune", chain, "--keep", 2)[1].startswith("2 steps, ")
    for step in (3, 4):
        assert run("restore", chain, "--step", step, "-o", out, *base, "--force")[0] == 0
        assert all(torch.equal(load_file(out)[name], tensor) for name, tensor in states[step].items())
    for arguments, part in (
        (("squash", chain, 4, 3), "has no steps 4 to 3 to join; it has 3, 4"),
        (("squash", chain, 1, 9), "has no steps 1 to 9 to join"),
        (("prune", chain), "either --keep N"),
        (("prune", chain, "--keep", 1, "--step", 3), "either --keep N"),
        (("prune", chain, "--step", 1), "has no step 1"),
    ):
        code, _, err = run(*arguments)
        assert (code, err.count("\n")) == (2, 1) and part in err
    assert run("list", tmp_path)[0] == 5


def bert_chain(folder):
    """A chain that names its model, of one step; the model as it is then."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30000, hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder / "bert")
    (folder / "bert" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]) + "\n"
    )
    (folder / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    info = {"model": str(folder / "bert"), "kind": "text", "outputs": 3, "classes": None, "seed": 0}
    chain = Chain.create(folder / "chain", model, info=info)
    mask = Mask.covering(ParameterIndex.of(model), ["classifier.weight"])
    with torch.no_grad():
        model.classifier.weight.normal_()
    chain.append(model, mask)
    return model


def content(path):
    """A file's bytes, those of a folder's files by name, or None."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None


def test_a_chain_that_names_its_model_is_restored_as_a_folder(tmp_path, run):
    from transformers import AutoModelForSequenceClassification

    model = bert_chain(tmp_path)
    before = content(tmp_path / "chain")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "stale.txt").write_text("of an older model")
    assert "--force" in run("restore", tmp_path / "chain", "-o", tmp_path / "tuned")[2]
    code, _, err = run("restore", tmp_path / "chain", "-o", tmp_path / "tuned", "--force")
    assert code == 0 and not (tmp_path / "tuned" / "stale.txt").exists(), err
    assert content(tmp_path / "chain") == before
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert all(torch.equal(tuned.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["folder", "shards", "index", "file"])
def test_the_base_may_be_given_as_any_checkpoint(tmp_path, run, layout):
    from transformers import AutoModelForSequenceClassification

    source = write_base(tmp_path / "bert", layout, head=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    chain = Chain.create(tmp_path / "chain", model, keep_base=False)
    mask = tune(model, 1)
    chain.append(model, mask)
    out = tmp_path / "s.safetensors"
    code, said, err = run("restore", tmp_path / "chain", "-o", out, "--base", source, "--json")
    assert code == 0, err
    assert json.loads(said) == {"out": str(out), "step": 1, "state": chain.steps[-1].state}
    written = load_file(out)
    assert written.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in model.named_parameters())
    code, _, err = run("restore", tmp_path / "chain", "-o", out, "--base", out, "--force")
    assert code == 2 and "which is read" in err
    shutil.copy(out, tmp_path / "tuned.safetensors")
    code, _, err = run(
        "restore", tmp_path / "chain", "-o", out, "--base", tmp_path / "tuned.safetensors", "--force"
    )
    assert code == 6 and "is not the delta's base" in err


def restore_until_killed(chain, out):
    draw = random.Random(os.getpid())
    while True:
        chains.restore(chain, draw.randrange(2), out, None, force=True)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of Python 3.12
@pytest.mark.parametrize("name", ["state.safetensors", "folder"])
def test_what_is_restored_is_whole_whenever_the_command_is_killed(tmp_path, name):
    """Killed at random moments, some of them in the midst of writing, as is seen by what lies beside then."""
    bert_chain(tmp_path)
    chain, out, made = tmp_path / "chain", tmp_path / name, []
    before = content(chain)
    for step in range(2):
        chains.restore(chain, step, out, None, force=True)
        made.append(content(out))
    assert made[0] != made[1]
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    draw, seen, torn, patience = random.Random(1), [None], 0, 1.0
    for kill in range(300):
        if kill >= 30 and torn >= 3 and all(state in seen for state in made):
            break
        child = os.fork()
        if child == 0:
            try:
                restore_until_killed(chain, out)
            finally:
                os._exit(1)  # only an error gets here
        time.sleep(patience * draw.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the writer failed before it was killed"
        seen.append(content(out))
        assert seen[-1] in made or seen == [None] * len(seen)
        assert content(chain) == before
        left = [path for path in tmp_path.iterdir() if path.name.startswith(f".{name}.")]
        torn += any(content(path) not in made for path in left)
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if seen[-2] == seen[-1]:
            patience = min(1.1 * patience, 5)  # on a loaded machine a writer gets less far
    assert torn >= 3 and all(state in seen for state in made)


MEMORY = """
import resource, sys
from pathlib import Path
from pipeline.artifacts import chains
from pipeline.deltas.chain import Chain

Chain.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chains.restore(Path(sys.argv[1]), -1, Path(sys.argv[2]), None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_restoring_a_file_holds_one_state_at_most(tmp_path):
    """What a step leaves alone is written from the base's file, and no copy of the whole is made."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))  # 96 MiB
    chain = Chain.create(tmp_path / "chain", model)
    mask = Mask(ParameterIndex.of(model), {"0.weight": torch.arange(9)})
    with torch.no_grad():
        model[0].weight.view(-1)[:9] += 1
    chain.append(model, mask)
    out = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "chain", out], capture_output=True, text=True, check=True
    )
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_file(out).items())
    assert int(done.stdout) < 1.2 * chain.state_nbytes / 1024
