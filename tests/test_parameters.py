"""The flat space of parameters: names, digests, and reading and writing by coordinate whatever the strides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import MismatchError
from pipeline.parameters import (
    ParameterIndex,
    base_digest,
    byte_view,
    digest_of_digests,
    put_,
    take,
    tensor_bytes,
    tensor_digest,
    unwrapped,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.decode = nn.Linear(3, 4)
        self.decode.weight = self.embed.weight
        self.decode_norm = nn.LayerNorm(4)


def layouts() -> dict[str, Tensor]:
    base = torch.arange(24.0).reshape(2, 3, 4)
    return {
        "contiguous": base.clone(),
        "transposed": base.clone().transpose(0, 2),
        "strided": torch.arange(48.0).reshape(2, 3, 8)[..., ::2],
        "offset": torch.arange(30.0)[6:].reshape(4, 6),
        "scalar": torch.tensor(3.0),
    }


@pytest.mark.parametrize("layout", layouts())
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_take_and_put_use_row_major_coordinates(layout: str, data: st.DataObject) -> None:
    tensor = layouts()[layout]
    chosen = sorted(data.draw(st.sets(st.integers(0, tensor.numel() - 1))))
    coordinates = torch.tensor(chosen, dtype=torch.int64)
    whole = len(chosen) == tensor.numel() and data.draw(st.booleans())
    before = tensor.clone().contiguous().reshape(-1)
    taken = take(tensor, None if whole else coordinates)
    assert taken.tolist() == before[coordinates].tolist()
    put_(tensor, None if whole else coordinates, taken + 100)
    after = tensor.contiguous().reshape(-1)
    wanted = before.clone()
    wanted[coordinates] += 100
    assert torch.equal(after, wanted)
    assert taken.tolist() == before[coordinates].tolist()  # a copy: the write did not reach it


@pytest.mark.parametrize("layout", layouts())
def test_bytes_and_digests_are_of_the_values_and_not_of_the_strides(layout: str) -> None:
    tensor = layouts()[layout]
    plain = torch.tensor(tensor.tolist())
    assert bytes(tensor_bytes(tensor)) == plain.numpy().tobytes() == bytes(byte_view(tensor).tolist())
    assert tensor_digest(tensor) == tensor_digest(plain)
    assert tensor_digest(tensor) != tensor_digest(plain.reshape(-1)[None])
    assert tensor_digest(tensor) != tensor_digest(plain.double())


def test_bytes_of_tensors_of_odd_strides() -> None:
    empty = torch.from_numpy(torch.arange(6).numpy()[3:3])
    single = torch.arange(10)[3::9]
    assert bytes(tensor_bytes(empty)) == b"" and bytes(tensor_bytes(single)) == bytes([3, *[0] * 7])


def test_writing_moves_the_version_counter() -> None:
    tensor = nn.Parameter(torch.zeros(4))
    version = tensor._version
    put_(tensor, torch.tensor([1]), torch.ones(1))
    assert tensor._version > version and tensor.tolist() == [0, 1, 0, 0]


def test_tied_weights_count_once_and_frozen_ones_not() -> None:
    model = Tied()
    index = ParameterIndex.of(model)
    assert list(index) == ["embed.weight", "decode.bias", "decode_norm.weight", "decode_norm.bias"]
    assert index.offsets == {
        "embed.weight": 0,
        "decode.bias": 12,
        "decode_norm.weight": 16,
        "decode_norm.bias": 20,
    }
    assert index.total == 24
    model.decode.bias.requires_grad_(False)
    assert "decode.bias" not in ParameterIndex.of(model)


def test_modules_are_matched_by_module_and_not_by_substring() -> None:
    index = ParameterIndex.of(Tied())
    assert index.within(["decode"]) == ["decode.bias"]
    assert index.within(["decode_norm", "embed.weight"]) == [
        "embed.weight",
        "decode_norm.weight",
        "decode_norm.bias",
    ]
    with pytest.raises(MismatchError, match="module 'deco'; top-level modules of this model: decode"):
        index.within(["deco"])


def test_wrappers_change_neither_index_nor_digest() -> None:
    model = Tied()
    compiled = torch.compile(model, backend="eager")
    assert (
        unwrapped(compiled) is model and unwrapped(nn.DataParallel(model)) is model and unwrapped(model) is model
    )
    assert ParameterIndex.of(compiled) == ParameterIndex.of(model)
    assert base_digest(compiled) == base_digest(model)


def test_the_base_digest_is_of_every_bit_of_every_parameter() -> None:
    model = Tied()
    tensors = dict(model.named_parameters())
    digest = base_digest(model)
    assert digest == base_digest(dict(reversed(tensors.items())))
    assert digest == digest_of_digests({name: tensor_digest(t) for name, t in tensors.items()})
    without = base_digest(model, without=["decode.bias"])
    with torch.no_grad():
        model.decode.bias[3] = torch.nextafter(model.decode.bias[3], torch.tensor(9.0))
    assert base_digest(model) != digest and base_digest(model, without=["decode.bias"]) == without != digest
