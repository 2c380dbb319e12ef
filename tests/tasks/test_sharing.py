"""Shards: disjoint, whole, even; decided by the seed alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.sharing import seed_of, shard_of


@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 9))
def test_shards_are_disjoint_whole_and_even(count, size, seed):
    rows = np.arange(count, dtype=np.int64) * 3
    shards = [shard_of(rows, rank, size, seed) for rank in range(size)]
    assert sorted(np.concatenate(shards).tolist()) == rows.tolist()
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all((np.diff(shard) > 0).all() for shard in shards)
    assert all(np.array_equal(shard, shard_of(rows, r, size, seed)) for r, shard in enumerate(shards))


def test_one_worker_has_all_rows_and_the_runs_own_seed():
    rows = np.array([3, 1, 2])
    assert shard_of(rows, 0, 1, 5) is rows
    assert seed_of(7, 0) == 7
    assert len({seed_of(seed, rank) for seed in range(3) for rank in range(3)}) == 9
