"""All ranks go on from the newest state that every one of them has."""

import pytest
import torch
from torch import nn

from pipeline.distributed.joint_resume import JointResume
from pipeline.training.resume import Position


class Wire:
    """Stands for ranks whose other members hold the given states."""

    rank = 0

    def __init__(self, *others):
        self.others = others

    def gather(self, name, tensor):
        return torch.stack([tensor, *(torch.tensor([step << 24 for step in steps]) for steps in self.others)])

    def largest(self, name, value):
        return max(value, *(0 for _ in self.others), 0)


def saved(folder, *steps):
    model, resume = nn.BatchNorm1d(2), JointResume(folder / "rank-0.safetensors", "f", 0, Wire())
    for step in steps:
        resume.save(Position(step=step), model, torch.full((3,), float(step)))
    return model


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [
        ((4, 8), [(4, 8)], 8),
        ((4, 8), [(4, 0)], 4),  # the other one was killed before it saved step 8
        ((4, 8), [(8, 12)], 8),
        ((4, 8, 12), [(12, 8), (8, 4)], 8),
        ((4, 8), [(-1, -1)], None),
        ((), [(4, 8)], None),
    ],
)
def test_the_newest_common_state(tmp_path, mine, others, expected):
    saved(tmp_path, *mine)
    state, note = JointResume(tmp_path / "rank-0.safetensors", "f", 0, Wire(*others)).load()
    assert note == ""
    if expected is None:
        assert state is None
    else:
        assert state.position.step == expected and float(state.tensors["theta"][0]) == expected


def test_going_on_never_overwrites_the_state_it_went_on_from(tmp_path):
    model = saved(tmp_path, 4, 8)
    resume = JointResume(tmp_path / "rank-0.safetensors", "f", 0, Wire((4, 0)))
    assert resume.load()[0].position.step == 4
    resume.save(Position(step=9), model, torch.zeros(3))
    again = JointResume(tmp_path / "rank-0.safetensors", "f", 0, Wire((4, 0)))
    assert again.load()[0].position.step == 4
    again.clear()
    assert not list(tmp_path.iterdir())


def test_another_runs_states_are_not_used(tmp_path):
    saved(tmp_path, 4, 8)
    state, note = JointResume(tmp_path / "rank-0.safetensors", "g", 0, Wire()).load()
    assert state is None and "another run" in note
