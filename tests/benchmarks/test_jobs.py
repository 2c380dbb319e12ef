"""Parts of work: each after those it needs, the best first; what fails takes with it what needs it, no more."""

import operator
import os
import sys
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from benchmarks.jobs import Board, Job, work  # noqa: E402


def job(name, *after, rank=(), cost=0.0, call=(int,), then=None, goal=""):
    return Job(name, lambda: call, rank, cost, frozenset(after), then, goal)


@st.composite
def graphs(draw):
    """Parts, each of which needs some of those before it, in any order; and some that fail."""
    count = draw(st.integers(1, 12))
    jobs = [
        job(str(i), *map(str, draw(st.sets(st.integers(0, i - 1)) if i else st.just(set()))),
            rank=(draw(st.integers(0, 2)),), cost=draw(st.integers(0, 3)))
        for i in range(count)
    ]  # fmt: skip
    return draw(st.permutations(jobs)), draw(st.sets(st.sampled_from([j.name for j in jobs])))


@given(graphs(), st.integers(1, 4))
def test_every_part_is_done_once_after_what_it_needs_unless_that_failed(graph, workers):
    jobs, bad = graph
    board, running, taken = Board(), [], []
    for one in jobs:
        board.add(one)
    while True:
        while len(running) < workers and (one := board.take()) is not None:
            assert one.after <= board.done
            able = [o for o in board.waiting.values() if o.after <= board.done]
            assert all((one.rank, -one.cost) <= (o.rank, -o.cost) for o in able)
            running.append(one)
            taken.append(one.name)
        if not running:
            break
        one = running.pop(0)
        board.fail(one.name, "bad") if one.name in bad else board.finish(one.name)
    needs = {o.name: o.after for o in jobs}

    def lost(name):
        return any(n in bad or lost(n) for n in needs[name])

    assert len(taken) == len(set(taken)) and not board.waiting
    assert set(taken) == {name for name in needs if not lost(name)}
    assert board.done == set(taken) - bad and set(board.failed) == {n for n in needs if n in bad or lost(n)}


def test_processes_do_it_and_a_part_that_dies_or_raises_harms_no_other(tmp_path):
    board, told, found = Board(), {}, []

    def more(value):
        found.append(value)
        board.add(job("third", "second", call=(operator.add, value, 1), then=found.append))

    board.add(job("second", "first", call=(operator.mul, 6, 7), then=more))
    board.add(job("first", call=(os.getpid,), then=lambda pid: found.append(pid != os.getpid())))
    board.add(job("raises", call=(operator.truediv, 1, 0), goal="goal"))
    board.add(job("dies", call=(os._exit, 3)))
    board.add(job("needs the goal", "goal"))
    board.add(job("needs the dead", "dies"))
    whole = work(
        board, 2, (os.chdir, tmp_path), tmp_path / "logs", tell=lambda name, _, why: told.update({name: why})
    )
    assert found == [True, 42, 43] and whole
    assert told["raises"] == "ZeroDivisionError: division by zero" and "exit code 3" in told["dies"]
    assert board.failed["needs the goal"] == "needs goal" and board.failed["needs the dead"] == "needs dies"
    assert board.done == {"first", "second", "third"}


def test_when_time_is_up_what_runs_is_ended_and_nothing_more_begins(tmp_path):
    board, begun = Board(), time.monotonic()
    board.add(job("short", rank=(0,), then=lambda _: board.add(job("endless", call=(time.sleep, 500)))))
    board.add(job("never", "endless"))
    assert not work(board, 1, (os.chdir, tmp_path), tmp_path / "logs", begun + 3)
    assert "short" in board.done and "never" in board.waiting and "endless" not in board.done | {*board.waiting}
