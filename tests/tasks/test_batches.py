"""Orders: an epoch holds each row once, a draw is a prefix of a bigger one, a batch depends on its place alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.batches import Batches, by_length, cut, shuffled

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=400)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_row_once(lengths, size, seed, epoch, bucketed):
    rows = np.arange(len(lengths)) * 2
    lengths = np.repeat(np.array(lengths), 2)
    groups = shuffled(rows, size, lengths if bucketed else None, seed, epoch)
    assert sorted(np.concatenate(groups).tolist()) == rows.tolist()
    assert sorted(map(len, groups), reverse=True)[:-1] == [size] * (len(groups) - 1)
    again = shuffled(rows, size, lengths if bucketed else None, seed, epoch)
    assert all((a == b).all() for a, b in zip(groups, again, strict=True))


@given(LENGTHS, st.integers(1, 40))
def test_evaluation_holds_every_row_once_longest_first(lengths, size):
    lengths = np.array(lengths)
    groups = by_length(np.arange(len(lengths)), size, lengths)
    order = np.concatenate(groups)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[order]) <= 0).all()


def test_epochs_and_seeds_differ():
    rows = np.arange(100)
    orders = {tuple(np.concatenate(shuffled(rows, 8, None, s, e))) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_buckets_pad_less_and_stay_random():
    lengths = np.random.default_rng(0).geometric(0.05, 5000)
    rows = np.arange(5000)

    def padded(groups):
        return sum(len(g) * lengths[g].max() for g in groups) / lengths.sum()

    bucketed = shuffled(rows, 16, lengths, 0, 0)
    assert padded(bucketed) < 1.15 < 2 < padded(shuffled(rows, 16, None, 0, 0))
    means = [lengths[g].mean() for g in bucketed]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_batches_are_a_sequence_made_when_asked_for():
    made = []

    def make(position, rows):
        made.append(position)
        return rows.tolist(), position

    batches = Batches(cut(np.arange(10), 4), make)
    assert len(batches) == 3 and batches.examples == 10 and batches.rows.tolist() == list(range(10)) and not made
    assert batches[-1] == ([8, 9], 2) and batches[1:] == [([4, 5, 6, 7], 1), ([8, 9], 2)]
    assert [position for _, position in batches] == [0, 1, 2]
    with pytest.raises(IndexError, match="batch 3 of 3"):
        batches[3]
