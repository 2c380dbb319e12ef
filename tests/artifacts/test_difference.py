"""diff: the exact delta of two checkpoints, applied again to files and to modules."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.artifacts.application import apply, revert
from pipeline.artifacts.difference import diff
from pipeline.deltas.delta import Delta
from pipeline.errors import MismatchError, ParamsError

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def tensors(seed):
    """One tensor of each dtype: some equal, some changed in part, some wholly; a scalar, an empty one."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for dtype in DTYPES:
        bytes_ = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * 7 * dtype.itemsize,), generator=draw)
        state[f"part.{dtype}"] = bytes_.to(torch.uint8).view(dtype).reshape(6, 7)  # NaN of all kinds among them
    return state | {"scalar": torch.tensor(float(seed)), "empty": torch.zeros(0, 3), "same": torch.ones(4, 2)}


@pytest.fixture
def pair(tmp_path):
    base, tuned = tensors(1), tensors(1)
    for name, other in tensors(2).items():
        if name.startswith("part"):
            tuned[name].view(-1)[::3] = other.view(-1)[::3]
    tuned["scalar"] = torch.tensor(-0.0)
    base["scalar"] = torch.tensor(0.0)
    tuned["whole"], base["whole"] = torch.zeros(5), torch.ones(5)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "delta.safetensors"


@pytest.mark.parametrize("form", ["plain", "keep_base", "thin"])
def test_base_plus_diff_is_the_tuned_file_byte_for_byte(pair, tmp_path, form):
    base, tuned, file = pair
    diff(str(base), str(tuned), file, keep_base=form == "keep_base", thin=form == "thin")
    apply(file, str(base), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == tuned.read_bytes()
    revert(file, str(tuned), tmp_path / "again.safetensors", None if form == "keep_base" else str(base))
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()
    state = load_file(base)
    Delta.load(file).apply_(state)
    wanted = load_file(tuned)
    assert all(torch.equal(state[n].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8))
               for n, t in wanted.items() if t.numel())  # fmt: skip


def test_the_mask_is_exactly_where_bits_differ(pair):
    base, tuned, file = pair
    diff(str(base), str(tuned), file)
    mask, before, after = Delta.load(file).mask, load_file(base), load_file(tuned)
    for name in after:
        size = after[name].element_size()
        rows = [t.reshape(-1).view(torch.uint8).reshape(-1, size) if t.numel() else torch.empty(0, 1)
                for t in (before[name], after[name])]  # fmt: skip
        assert torch.equal(mask.indices[name], (rows[0] != rows[1]).any(1).nonzero().reshape(-1)), name
    assert mask.whole("whole") and mask.whole("scalar") and mask.count("same") == 0


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight


def test_a_diff_applies_to_a_module_with_buffers_and_ties(tmp_path):
    base, tuned = Small(), Small()
    with torch.no_grad():
        for model in (base, tuned):
            model.norm(torch.randn(8, 4))
        tuned.norm.num_batches_tracked += 6
    for name, model in (("base", base), ("tuned", tuned)):
        state = {n: t for n, t in model.state_dict().items() if n != "out.weight"}  # as save_pretrained leaves out
        save_file(state, tmp_path / f"{name}.safetensors")
    file = tmp_path / "delta.safetensors"
    diff(str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), file, keep_base=True)
    delta, start = Delta.load(file), {n: t.clone() for n, t in base.state_dict().items()}
    delta.apply_(base)
    assert all(torch.equal(t, tuned.state_dict()[n]) for n, t in base.state_dict().items())
    delta.revert_(base)
    assert all(torch.equal(t, start[n]) for n, t in base.state_dict().items())
    other = Small()
    other.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(MismatchError, match="'extra'"):
        delta.apply_(other)


def test_a_classifier_from_a_bare_encoder(tmp_path):
    from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=12, max_position_embeddings=8)  # fmt: skip
    torch.manual_seed(0)
    base = BertModel(config)
    base.save_pretrained(tmp_path / "base", max_shard_size="2KB")
    tuned = AutoModelForSequenceClassification.from_config(config)
    tuned.bert.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.bert.encoder.layer[0].output.dense.bias[1] += 1
    tuned.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "delta.safetensors"
    done = diff(str(tmp_path / "base"), str(tmp_path / "tuned"), file, thin=True)
    assert done.facts["values"] == 1 + sum(p.numel() for p in tuned.classifier.parameters())
    assert set(done.facts["whole"]) == {"classifier.weight", "classifier.bias"}
    apply(file, str(tmp_path / "base"), tmp_path / "out")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(p, dict(tuned.named_parameters())[n]) for n, p in loaded.named_parameters())
    wanted = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()  # memory aligned alike
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(ids).logits, wanted(ids).logits)
    with pytest.raises(ParamsError, match="lacks tensor 'classifier"):
        diff(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "x", keep_base=True)


def test_equal_checkpoints_give_an_empty_delta_and_one_path_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file(tensors(1), tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    assert diff(a, b, tmp_path / "delta").facts["values"] == 0
    apply(tmp_path / "delta", a, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    changed = tensors(1)
    changed["same"][0] += 1
    save_file(changed, tmp_path / "c.safetensors")
    with pytest.raises(MismatchError, match="'same' differs"):
        apply(tmp_path / "delta", str(tmp_path / "c.safetensors"), tmp_path / "out2")
    with pytest.raises(ParamsError, match="name two"):
        diff(a, a, tmp_path / "again")


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (torch.ones(4, 3), r"'same' is \[4, 2\] in .* and \[4, 3\] in"),
        (torch.ones(4, 2, dtype=torch.float16), "'same' is float32 in .* and float16 in"),
        (torch.ones(4, 2, dtype=torch.uint16), "'same' is uint16; expected one of"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, other, part):
    save_file(tensors(1), tmp_path / "a.safetensors")
    save_file(tensors(1) | {"same": other}, tmp_path / "b.safetensors")
    with pytest.raises(MismatchError, match=part):
        diff(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
