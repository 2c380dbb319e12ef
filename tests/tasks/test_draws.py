"""Draws: permutations that never change, and splits that keep groups whole."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.draws import permutation, split_by_class, split_by_group


def test_the_draw_is_pinned():
    """Another order in another version would be other examples under the same seed."""
    assert permutation(8, 0).tolist() == PINNED


PINNED = [2, 4, 7, 5, 0, 6, 3, 1]


@given(st.integers(0, 300), st.lists(st.integers(0, 1000), min_size=1, max_size=3))
def test_a_permutation_holds_each_row_once(count, key):
    order = permutation(count, *key)
    assert sorted(order.tolist()) == list(range(count))
    assert (order == permutation(count, *key)).all()


def test_other_keys_give_other_orders():
    orders = {tuple(permutation(50, *key).tolist()) for key in [(0,), (1,), (0, 1), (1, 0), (0, 2)]}
    assert len(orders) == 5


@given(st.lists(st.integers(0, 20), min_size=1, max_size=200), st.floats(0.05, 0.95), st.integers(0, 9))
def test_groups_stay_whole_and_the_fraction_is_met(groups, fraction, key):
    groups = np.array(groups)
    kept, held = split_by_group(groups, fraction, key)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(groups)))
    assert not set(groups[kept]) & set(groups[held])
    largest = np.bincount(groups).max()
    assert fraction * len(groups) <= len(held) < fraction * len(groups) + largest


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0.05, 0.95))
def test_every_class_gives_the_same_fraction(labels, fraction):
    labels = np.array(labels)
    kept, held = split_by_class(labels, fraction, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label in set(labels.tolist()):
        count = (labels == label).sum()
        assert (labels[held] == label).sum() == np.ceil(fraction * count)
