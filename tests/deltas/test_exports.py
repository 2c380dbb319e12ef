"""Exports, each loaded back by the package that it is for, on a base as the hub has it: a bare encoder."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from pipeline.artifacts.exporting import FORMATS, export
from pipeline.deltas import adapter, exports
from pipeline.deltas.adapter import adapter_of
from pipeline.deltas.delta import Delta
from pipeline.errors import MismatchError, ModelError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.tasks.saved import load_model

INFO = {"kind": "text", "outputs": 3, "classes": ["a", "b", "c"], "seed": 4}
HALF_ULP = 2.0**-24  # of a float32, relative


pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch's, of PEFT's tensors
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A model folder in the hub's layout, of an encoder alone: its tensors have no `bert.` before their names."""
    from tests.conftest import write_bert

    folder = tmp_path_factory.mktemp("models") / "bert"
    write_bert(folder)
    return str(folder)


def tuned(base: nn.Module, flags: dict[str, Tensor], size: float = 0.3) -> tuple[nn.Module, Delta]:
    """Stand in for training at the flagged coordinates."""
    index = ParameterIndex.of(base)
    mask = Mask.from_bool({
        name: flags.get(name, torch.zeros(shape, dtype=torch.bool)) for name, shape in index.shapes.items()
    })
    model, draw = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, at in mask.indices.items():
            flat = model.get_parameter(name).view(-1)
            flat[at] += (torch.randn(at.numel(), generator=draw) * size).to(flat.dtype)
    return model, Delta.of(model, mask, base=base, info=INFO)


def some(
    base: nn.Module, ends: tuple[str, ...], density: float, whole: tuple[str, ...] = ("classifier",)
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    flags = {
        n: torch.rand(p.shape, generator=draw) < density for n, p in base.named_parameters() if n.endswith(ends)
    }
    return flags | {
        n: torch.ones(p.shape, dtype=torch.bool) for n, p in base.named_parameters() if n.startswith(whole)
    }


LINEAR = ("query.weight", "value.weight", "intermediate.dense.weight")
EVERYWHERE = ("weight", "bias")


@pytest.fixture
def fitting(encoder: str, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A delta of sparse linear weights and a whole head: the trained model and the file."""
    base = load_model(encoder, info=INFO)
    model, delta = tuned(base, some(base, LINEAR, 0.05))
    delta.save(tmp_path / "delta.safetensors")
    return model, tmp_path / "delta.safetensors"


@pytest.fixture
def scattered(encoder: str, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A delta with coordinates in every tensor."""
    base = load_model(encoder, info=INFO)
    model, delta = tuned(base, some(base, EVERYWHERE, 0.02))
    delta.save(tmp_path / "delta.safetensors")
    return model, tmp_path / "delta.safetensors"


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 30, (5, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[n].contiguous().view(-1).view(torch.uint8), two[n].contiguous().view(-1).view(torch.uint8))
        for n in one
    )


def held_by_peft(base: nn.Module, folder: Path) -> nn.Module:
    peft = pytest.importorskip("peft", reason="pip install -e '.[dev]' installs it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that goes
        return peft.PeftModel.from_pretrained(base, folder)


def test_peft_gives_the_same_logits(fitting, encoder: str, tmp_path: Path) -> None:
    model, file = fitting
    done = export(file, encoder, "peft", tmp_path / "adapter")
    assert done.facts["whole"] == ["classifier"] and len(done.facts["sparse"]) == 6
    held = held_by_peft(load_model(encoder, info=INFO | {"seed": 9}), tmp_path / "adapter")  # another fresh head
    torch.testing.assert_close(logits(held), logits(model), rtol=1e-5, atol=1e-5)
    with held.disable_adapter():
        assert not torch.allclose(logits(held), logits(model), atol=1e-2)
    merged, base = held.merge_and_unload(), dict(load_model(encoder, info=INFO).named_parameters())
    inexact = 0
    for name, parameter in model.named_parameters():
        got, wanted = merged.get_parameter(name).double(), parameter.double()
        bound = HALF_ULP * (1 + HALF_ULP) * ((wanted - base[name].double()).abs() + got.abs())
        assert bool(((got - wanted).abs() <= (0.0 if name.startswith("classifier") else bound)).all()), name
        inexact += int((got != wanted).sum())
    assert inexact == done.facts["inexact"]


def test_peft_saves_the_adapter_as_it_was_written(fitting, encoder: str, tmp_path: Path) -> None:
    _, file = fitting
    export(file, encoder, "peft", tmp_path / "adapter")
    held = held_by_peft(load_model(encoder, info=INFO), tmp_path / "adapter")
    held.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / adapter.TENSORS) for name in ("adapter", "again"))
    assert same_bits(ours, theirs)
    saved = json.loads((tmp_path / "again" / adapter.CONFIG).read_text())
    written = json.loads((tmp_path / "adapter" / adapter.CONFIG).read_text())
    assert {k: saved[k] for k in ("r", "peft_type", "target_modules", "modules_to_save")} == {
        k: written[k] for k in ("r", "peft_type", "target_modules", "modules_to_save")
    }


def test_what_does_not_fit_peft_is_named_or_kept_whole(scattered, encoder: str, tmp_path: Path) -> None:
    model, file = scattered
    with pytest.raises(
        MismatchError, match="do not fit a PEFT adapter: 'bert.embeddings.*Embedding.*--whole"
    ) as refused:
        export(file, encoder, "peft", tmp_path / "adapter")
    assert "\n" not in str(refused.value) and not (tmp_path / "adapter").exists()
    done = export(file, encoder, "peft", tmp_path / "adapter", whole=True)
    held = held_by_peft(load_model(encoder, info=INFO), tmp_path / "adapter")
    torch.testing.assert_close(logits(held), logits(model), rtol=1e-5, atol=1e-5)
    assert "bert.embeddings.word_embeddings" in done.facts["whole"]


@pytest.mark.parametrize(
    ("ends", "density", "sparse", "whole"),
    [
        ((), 0.0, 0, ["classifier"]),  # a head alone
        (("query.weight",), 0.9, 0, 3),  # so many that whole layers are smaller
        (("query.weight", "output.dense.bias"), 0.05, 2, None),  # a bias of its own
    ],
)
def test_peft_holds_each_layer_in_the_smaller_form(
    ends, density, sparse, whole, encoder: str, tmp_path: Path
) -> None:
    base = load_model(encoder, info=INFO)
    model, delta = tuned(base, some(base, ends, density) if ends else some(base, ("nothing",), 0.0))
    made = adapter_of(delta, load_model(encoder, info=INFO), whole=True)
    assert len(made.sparse) == sparse
    assert whole is None or (made.whole == whole if isinstance(whole, list) else len(made.whole) == whole)
    delta.save(tmp_path / "delta.safetensors")
    export(tmp_path / "delta.safetensors", encoder, "peft", tmp_path / "adapter", whole=True)
    held = held_by_peft(load_model(encoder, info=INFO), tmp_path / "adapter")
    torch.testing.assert_close(logits(held), logits(model), rtol=1e-5, atol=1e-5)


def test_one_dense_layer_among_sparse_ones_does_not_blow_up_the_others(encoder: str) -> None:
    base = load_model(encoder, info=INFO)
    flags = some(base, LINEAR, 0.02) | some(base, ("layer.0.attention.self.query.weight",), 0.3)
    _, delta = tuned(base, flags)
    made = adapter_of(delta, load_model(encoder, info=INFO))
    assert "bert.encoder.layer.0.attention.self.query" in made.whole and len(made.sparse) == 5
    assert made.config["r"] == 1


def test_tied_weights_and_other_models_do_not_fit_peft() -> None:
    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config)
    _, delta = tuned(base, some(base, ("wte.weight", "c_fc.weight"), 0.1, ()))
    with pytest.raises(MismatchError, match="'transformer.wte.weight' is tied to another"):
        adapter_of(delta, base, whole=True)
    base = GPT2LMHeadModel(config)
    _, delta = tuned(base, some(base, ("c_fc.weight",), 0.1, ()))
    with pytest.raises(MismatchError, match="'transformer.h.0.mlp.c_fc.weight' is of a Conv1D"):
        adapter_of(delta, base)
    with pytest.raises(MismatchError, match="not the delta's base|is not in this model"):
        adapter_of(delta, GPT2LMHeadModel(config))


def test_dense_is_what_transformers_loads(scattered, encoder: str, tmp_path: Path) -> None:
    model, file = scattered
    export(file, encoder, "dense", tmp_path / "dense")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(logits(loaded), logits(model))


def test_git_theta_updates_through_scipy(scattered, encoder: str, tmp_path: Path) -> None:
    model, file = scattered
    export(file, encoder, "git-theta", tmp_path / "updates.safetensors")
    updates = safetensors.numpy.load_file(tmp_path / "updates.safetensors")
    base = safetensors.numpy.load_file(Path(encoder) / "model.safetensors")
    ours = dict(base)
    exports.apply_update(tmp_path / "updates.safetensors", ours)
    wanted = {name.removeprefix("bert."): tensor.numpy() for name, tensor in model.state_dict().items()}
    touched = 0
    for name, before in base.items():
        if f"{name}/data" not in updates:
            assert np.array_equal(before, wanted[name]), name
            continue
        parts = {key: updates[f"{name}/{key}"] for key in ("data", "indices", "indptr", "shape")}
        matrix = scipy.sparse.csr_matrix(
            (parts["data"], parts["indices"], parts["indptr"]), shape=(1, parts["shape"].prod())
        )
        matrix.check_format()
        after = np.reshape(matrix.toarray(), parts["shape"]) + before
        assert after.dtype == before.dtype and np.array_equal(after, ours[name])
        bound = HALF_ULP * (1 + HALF_ULP) * (np.abs(np.float64(wanted[name]) - before) + np.abs(after))
        assert (np.abs(np.float64(after) - wanted[name]) <= bound).all(), name
        reference = scipy.sparse.csr_matrix((wanted[name] - before).reshape(1, -1))  # as git-theta makes its own
        assert np.array_equal(parts["indices"], reference.indices) and np.array_equal(
            parts["data"], reference.data
        )
        assert (
            parts["indices"].dtype == reference.indices.dtype and parts["indptr"].dtype == reference.indptr.dtype
        )
        touched += 1
    assert touched > 20
    assert np.array_equal(updates["classifier.weight"], wanted["classifier.weight"])  # nothing to add it to


def test_a_vllm_patch_in_five_lines_of_torch(scattered, encoder: str, tmp_path: Path) -> None:
    model, file = scattered
    export(file, encoder, "vllm", tmp_path / "patch.safetensors")
    patch, state = load_file(tmp_path / "patch.safetensors"), load_file(Path(encoder) / "model.safetensors")
    state |= {f"classifier.{part}": torch.empty(shape) for part, shape in (("weight", (3, 32)), ("bias", (3,)))}
    for key in patch:
        if key.endswith(".indices"):
            name = key.removesuffix(".indices")
            state[name].view(-1)[patch[key].long()] = patch[f"{name}.values"]
    wanted = {name.removeprefix("bert."): tensor for name, tensor in model.state_dict().items()}
    assert same_bits({n: state[n] for n in wanted}, wanted)  # the checkpoint may hold more: a pooler, for example
    ours = load_file(Path(encoder) / "model.safetensors")
    exports.apply_patch(tmp_path / "patch.safetensors", ours)
    assert same_bits({n: ours[n] for n in wanted}, wanted)
    for name, shape, dtype, values, indices in exports.read_patch(
        tmp_path / "patch.safetensors"
    ):  # as vLLM checks
        assert values.ndim == indices.ndim == 1 and values.numel() == indices.numel() and values.dtype == dtype
        assert indices.dtype == torch.int32 and bool((indices[1:] > indices[:-1]).all())
        assert 0 <= int(indices[0]) and int(indices[-1]) < ours[name].numel() and tuple(ours[name].shape) == shape


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_updates_and_patches(dtype: torch.dtype, tmp_path: Path) -> None:
    base = small(dtype)
    model, delta = tuned(base, {"0.weight": torch.rand(5, 6) < 0.3})
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    exports.write_patch(tmp_path / "patch", delta, state)
    exports.apply_patch(tmp_path / "patch", state)
    assert same_bits(state, dict(model.state_dict()))
    if dtype == torch.bfloat16:
        with pytest.raises(MismatchError, match="'0.weight' is bfloat16, which git-theta's numpy does not have"):
            exports.write_update(tmp_path / "update", delta, base.state_dict())
        return
    exports.write_update(tmp_path / "update", delta, base.state_dict())
    arrays = {name: tensor.numpy() for name, tensor in base.state_dict().items()}
    exports.apply_update(tmp_path / "update", arrays)
    for name, tensor in model.state_dict().items():
        assert np.allclose(arrays[name], tensor.numpy(), atol=2.0 ** (-24 if dtype == torch.float32 else -11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_rounds_as_few_values_as_it_says_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2)).to(dtype)
    model, delta = tuned(base, {"0.weight": torch.rand(30, 40) < 0.15})
    made = adapter_of(delta, copy.deepcopy(base))
    assert made.tensors["base_model.model.0.shira_weight"].dtype == torch.float32
    (tmp_path / adapter.CONFIG).write_text(json.dumps(made.config))
    save_file(made.tensors, tmp_path / adapter.TENSORS)
    held = held_by_peft(base, tmp_path).merge_and_unload()
    assert int((held[0].weight != model[0].weight).sum()) == made.inexact <= 0.2 * delta.mask.nnz
    torch.testing.assert_close(held[0].weight, model[0].weight, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_buffers_that_changed_are_exported_or_refused(tmp_path: Path) -> None:
    base = small()
    model, delta = tuned(base, {"0.weight": torch.rand(5, 6) < 0.3})
    model[1].running_mean += 1.0
    model[1].num_batches_tracked += 7
    delta = Delta.of(model, delta.mask, base=base)
    exports.write_update(tmp_path / "update", delta, base.state_dict())
    arrays = {name: tensor.numpy() for name, tensor in base.state_dict().items()}
    exports.apply_update(tmp_path / "update", arrays)
    assert arrays["1.num_batches_tracked"] == 7 and np.array_equal(
        arrays["1.running_mean"], model[1].running_mean.numpy()
    )
    with pytest.raises(MismatchError, match=r"'1.num_batches_tracked' \(int64\) holds no float"):
        exports.write_patch(tmp_path / "patch", delta, base.state_dict())
    with pytest.raises(MismatchError, match="'1.num_batches_tracked' is of a BatchNorm1d"):
        adapter_of(delta, small())
    made = adapter_of(delta, small(), whole=True)
    assert made.tensors["base_model.model.1.num_batches_tracked"] == 7
    model[1].num_batches_tracked.zero_()
    with torch.no_grad():
        model[0].weight.view(-1)[delta.mask.indices["0.weight"][0]] = torch.nan
    delta = Delta.of(model, delta.mask, base=base)
    with pytest.raises(MismatchError, match="NaN, which vLLM keeps for unchanged"):
        exports.write_patch(tmp_path / "patch", delta, base.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update"]


def test_tied_weights_are_patched_under_each_name_that_the_checkpoint_has(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    base = GPT2LMHeadModel(config)
    model, delta = tuned(base, some(base, ("wte.weight",), 0.1, ()))
    both = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    one = {name: tensor.clone() for name, tensor in both.items() if name != "transformer.wte.weight"}
    for state in (both, one):
        exports.write_patch(tmp_path / "patch", delta, state)
        exports.apply_patch(tmp_path / "patch", state)
        assert same_bits(state, {name: tensor for name, tensor in model.state_dict().items() if name in state})


@pytest.mark.parametrize("to", FORMATS)
def test_a_thin_delta_is_exported_as_any_other(to: str, encoder: str, tmp_path: Path) -> None:
    base = load_model(encoder, info=INFO)
    _, delta = tuned(base, some(base, LINEAR, 0.3), size=1e-4)
    delta.save(tmp_path / "full")
    delta.save(tmp_path / "thin", base=base)
    assert Delta.load(tmp_path / "thin").thin is not None
    for kind in ("full", "thin"):
        export(tmp_path / kind, encoder, to, tmp_path / f"out-{kind}")
    one, two = (
        [file.read_bytes() for file in sorted(out.rglob("*") if out.is_dir() else [out]) if file.is_file()]
        for out in (tmp_path / "out-full", tmp_path / "out-thin")
    )
    assert one and one == two


@pytest.mark.parametrize("to", FORMATS)
def test_wrong_bases_and_options_write_nothing(to: str, fitting, encoder: str, tmp_path: Path) -> None:
    _, file = fitting
    shutil.copytree(encoder, tmp_path / "other")
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(encoder)).save_pretrained(tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MismatchError, match="not the delta's base"):
        export(file, str(tmp_path / "other"), to, tmp_path / "out")
    with pytest.raises(ModelError, match="no such file or folder"):
        export(file, str(tmp_path / "missing"), to, tmp_path / "out")
    if to != "peft":
        with pytest.raises(ParamsError, match="--whole: is for --to peft"):
            export(file, encoder, to, tmp_path / "out", whole=True)
    else:
        with pytest.raises(ParamsError, match="needs the model's modules, name its folder"):
            export(file, f"{encoder}/model.safetensors", to, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
