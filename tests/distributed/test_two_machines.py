"""A user's own torchrun on two machines, for which two network namespaces stand; bytes as the interfaces count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from link_worker import MERGES, WAYS, build  # noqa: E402
from test_rounds import ends, outcome, same, start  # noqa: E402

from benchmarks.link import linked, missing  # noqa: E402


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two workers left, each under its own machine's torchrun, as the documentation starts it."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("two")
    drop = {"RANK", "WORLD_SIZE", "FISHMASK_WARM"}
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}", "OMP_NUM_THREADS": "1"}
    with linked() as machines:
        agents = [
            subprocess.Popen(
                end.command(
                    sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines[0].address}:29400",
                    "--rdzv-id", "run1", "--rdzv-conf", f"is_host={int(end is machines[0])}",
                    "--local-addr", end.address, "-m", "link_worker", str(folder), end.interface,
                ),
                env=env | {"GLOO_SOCKET_IFNAME": end.interface}, stderr=subprocess.PIPE, text=True,
            )
            for end in machines
        ]  # fmt: skip
        try:
            errors = [agent.communicate(timeout=240)[1] for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
                agent.communicate()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(errors)
    return folder


def test_two_machines_end_as_one_does(two, tmp_path):
    """Warm-up, own masks, renewed masks and an outer optimizer: the same bytes as two workers of one machine."""
    alone = start(tmp_path / "alone", "everything")
    assert not ends(alone) and alone.returncode == 0
    same(outcome(two), outcome(tmp_path / "alone"))


def test_the_interfaces_count_what_the_project_counts(two):
    """Payload alone is counted; the interfaces see the headers of Ethernet, IP and TCP, and acknowledgements."""
    ranks = [json.loads((two / f"link-{rank}.json").read_text()) for rank in range(2)]
    k = sum(p.numel() for p in build().parameters()) // 2
    for way in WAYS:
        assert ranks[0][way]["digest"] == ranks[1][way]["digest"]
        for rank in ranks:
            counted, seen, resent = rank[way]["counted"], rank[way]["sent"], rank[way]["resent"]
            assert counted <= seen <= 1.08 * counted + 50_000 + 1_514 * resent, (way, counted, seen, resent)
    limit = 2 * (2 - 1) * 4 * k * MERGES
    over = {way: sum(rank[way]["counted"] for rank in ranks) / limit for way in WAYS}
    assert 1 <= over["fp32"] <= 1.02 and 1 <= over["synchronous"] <= 1.02 and 0.5 <= over["bf16"] <= 0.51, over
