"""Stages forked from the warm process can use the GPU: nothing that it imports may have touched it."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.runtime.warm import warm_process

ROOT = Path(__file__).parent.parent.parent


def test_forks_of_the_warm_process_use_the_gpu(tmp_path, monkeypatch):
    folder = tmp_path / "stages"
    folder.mkdir()
    (folder / "__init__.py").write_text("from pipeline.runtime.warm import hand_over\nhand_over()\n")
    (folder / "probe.py").write_text(
        "import sys\n"
        "warm = 'torch' in sys.modules\n"
        "import torch\n"
        "print(warm, torch.cuda.is_available(), torch.arange(5.0, device='cuda').sum().item())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    with warm_process() as environment:
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-m", "stages.probe"], env=os.environ | environment, timeout=300,
                capture_output=True, text=True,
            )  # fmt: skip
            assert (done.returncode, done.stdout) == (0, "True True 10.0\n"), done.stderr
