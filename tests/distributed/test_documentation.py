"""The loop in docs/distributed.md, run as it stands there: by two workers, and alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_loop_of_ones_own(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)
    (tmp_path / "train.py").write_text(code)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "train.py"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    for size, command in ((1, alone), (2, [*torchrun, "--nproc-per-node", "2", "train.py"])):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said = re.findall(r"rank (\d) of (\d): accuracy ([\d.]+), (\d+) merges, (\d+) bytes", done.stdout)
        assert sorted(int(rank) for rank, *_ in said) == list(range(size))
        assert len({accuracy for _, _, accuracy, *_ in said}) == 1
        for _, of, accuracy, merges, sent in said:
            assert (int(of), int(merges)) == (size, 20)
            assert float(accuracy) > 0.9
            assert (int(sent) > 0) == (size > 1)
