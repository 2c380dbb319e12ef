"""Table 1 on a bare machine: two processes find what the stages find one after the other, without the trackers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from stages.runner import Stage

ROOT = Path(__file__).parent.parent.parent
BARE = """\
import sys
GONE = ("mlflow", "mlflow_skinny", "dvc", "datasets")
class Bare:
    rest = [*sys.meta_path]
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in GONE:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.rest)), None)
    def find_distributions(self, context=None):
        for finder in self.rest:
            for found in getattr(finder, "find_distributions", lambda _: ())(context):
                if found.metadata["Name"].replace("-", "_") not in GONE:
                    yield found
sys.meta_path[:] = [Bare()]
"""


def begin(template, root):
    root.mkdir()
    shutil.copytree(template / "data", root / "data")
    shutil.copy(template / "params.yaml", root)
    return root


def bench(root, *arguments):
    bare = root.parent / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "sitecustomize.py").write_text(BARE)
    paths = os.pathsep.join([str(bare), str(ROOT)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.glue", "--out", str(root), *arguments]
    return subprocess.run(command, cwd=root.parent, env=env, capture_output=True, text=True)


def test_two_processes_find_what_one_finds_and_go_on_where_they_stopped(template, tmp_path, monkeypatch):
    from stages import fetch, mask, score, train
    from stages.tune_lr import tune

    root, alone = begin(template, tmp_path / "bench"), begin(template, tmp_path / "alone")
    asked = ["--reach", "1", "--jobs", "2", "--result", str(tmp_path / "r.md")]
    first = bench(root, *asked, "--method", "dense")
    assert first.returncode == 0, first.stdout + first.stderr
    done = bench(root, *asked, "--method", "dense", "--method", "fish", "--sweep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reviews dense" in first.stdout and "reviews dense" not in done.stdout
    assert "train reviews-dense-main: " in first.stdout and "dense-main" not in done.stdout

    monkeypatch.chdir(alone)
    workspace, file = Workspace(alone, alone), alone / "params.yaml"

    def run(stage, *cell):
        stage.run(Stage(Cell(*cell), Params.load(file), workspace, track=False))

    run(fetch, "fetch", "reviews")
    run(score, "score", "reviews")
    for method in ("dense", "fish"):
        tune(workspace, Params.load(file), "reviews", [method], 2, write=True, reach=1)
    cells = [("dense", "main"), ("fish", "denser"), ("fish", "main")]
    for method, setting in cells:
        run(mask, "mask", "reviews", method, setting)
        run(train, "train", "reviews", method, setting)
    assert file.read_text() == (root / "params.yaml").read_text() != (template / "params.yaml").read_text()
    for made in sorted((alone / "metrics").rglob("*.json")):
        other = root / "metrics" / made.relative_to(alone / "metrics")
        assert json.loads(made.read_text()) == json.loads(other.read_text()), made.name
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(cell["method"], cell["setting"]) for cell in result["cells"]] == cells
    assert all(set(cell["scores"]) == {"0", "1"} for cell in result["cells"])
    assert set(result["rates"]["reviews"]["methods"]) == {"dense", "fish"}
    assert "fish" in (tmp_path / "r.md").read_text() and (root / "reports" / "index.html").is_file()
