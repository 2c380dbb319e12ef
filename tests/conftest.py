"""A temporary project with git, DVC, the real code, a user's own small csv data and a tiny local BERT."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from pipeline.runtime.cpu import set_up_cpu

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which `repeatable` needs, before CUDA starts
set_up_cpu()  # before torch: tests compare their own process with stages in processes of their own, bit for bit
hypothesis.settings.register_profile("fishmask", deadline=None)  # nothing is timed: these machines are noisy
hypothesis.settings.load_profile("fishmask")

ROOT = Path(__file__).parent.parent
GOOD = "good great fine lovely happy bright kind warm sweet calm".split()
BAD = "bad awful poor ugly sad dark cruel cold bitter angry".split()
PLAIN = "the a film story day house road song walk meal was is felt seemed".split()

PARAMS = """\
profile: test
seeds: [0, 1]
threads: 1
device: cpu
precision: fp32
grid:
  tasks: [reviews]
  methods: [dense, fish, random]
  ranked: [fish]
  unranked: [dense, random]
  learned: []
  settings: [main]
  sweep:
    {tasks: [reviews], methods: [fish], settings: [denser], unranked: {tasks: [], methods: [], settings: []}}
  checkpoint: {tasks: [], methods: [], settings: [], leak: {tasks: [], methods: [], settings: []}}
  distribute:
    table2: {tasks: [], methods: [], settings: []}
    table2_dense: {tasks: [], methods: [], settings: []}
    table3: {tasks: [], methods: [], settings: []}
    table3_dense: {tasks: [], methods: [], settings: []}
tasks:
  reviews:
    kind: text
    data: {source: data/reviews, text: [text], label: label}
    model: {source: data/bert, max_length: 16}
    head: [classifier]
    metric: accuracy
    density: 0.05
    score: {kind: label, power: square, examples: [16, 64], batch_size: 16, keep: 0.5}
    train: {epochs: 6, batch_size: 16, optimizer: adamw, schedule: linear, warmup: 0.1, clip: 1.0}
settings:
  main: {density: null, examples: null}
  denser: {density: 0.2, examples: 16}
methods:
  dense: {lr: {reviews: 3.0e-3}}
  fish: {lr: {reviews: 1.0e-2}}
  random: {lr: {reviews: 1.0e-2}}
"""


class Project:
    """The temporary project: a folder and the commands that people run in it."""

    def __init__(self, root):
        self.root = root
        bin_ = str(Path(sys.executable).parent)
        drop = {"MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "FISHMASK_DATA", "DVC_EXP_NAME"}
        self.env = {k: v for k, v in os.environ.items() if k not in drop} | {
            "PATH": os.pathsep.join([bin_, os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *command, check=True):
        done = subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def start(self, *command):
        return subprocess.Popen(
            command, cwd=self.root, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def fishmask(self, *arguments, check=True):
        return self.run(sys.executable, "-m", "pipeline.cli", *arguments, check=check)

    def dvc(self, *arguments, check=True):
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check)

    def repro(self):
        """Run the pipeline as `fishmask repro` does: DVC, its stages forked from a warm process.

        Returns:
            The names of the stages that ran.
        """
        out = self.fishmask("repro").stdout
        return [line.split()[1] for line in out.splitlines() if re.match(r"\[\d+/\d+\] ", line)]

    def commit(self, message="state"):
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", message)

    def artifacts(self):
        """Read every output.

        Returns:
            Path below artifacts/ -> bytes.
        """
        folder = self.root / "artifacts"
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

    def metrics(self, name):
        return json.loads((self.root / "metrics" / f"{name}.json").read_text())

    def edit(self, old, new):
        file = self.root / "params.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))


def write_reviews(folder):
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for split, rows in (("train", 160), ("validation", 60)):
        lines = ["text,label"]
        for i in range(rows):
            words = draw.choices(PLAIN, k=5) + draw.choices((BAD, GOOD)[i % 2], k=2)
            draw.shuffle(words)
            lines.append(f"{' '.join(words)},{('negative', 'positive')[i % 2]}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


def write_bert(folder):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    import torch

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder with a tiny BERT encoder and its tokenizer; tests must not change it."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    write_bert(folder)
    return folder


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """The project before its first repro, made once."""
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    (root / "params.yaml").write_text(PARAMS)
    write_reviews(root / "data" / "reviews")
    write_bert(root / "data" / "bert")
    project = Project(root)
    project.run("git", "init", "-q")
    project.dvc("init", "-q")
    project.dvc("config", "core.analytics", "false")
    project.commit("template")
    return root


@pytest.fixture(scope="session")
def finished(template, tmp_path_factory):
    """A project after one whole repro; tests must not change it (copy it with ``fork``)."""
    root = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(template, root, symlinks=True)
    project = Project(root)
    project.ran = project.repro()
    project.commit("results")
    return project


@pytest.fixture
def fork(tmp_path):
    """Copy a project.

    Returns:
        A function from a project or folder to the copy's Project.
    """

    def copy(source):
        root = tmp_path / "project"
        shutil.copytree(source.root if isinstance(source, Project) else source, root, symlinks=True)
        return Project(root)

    return copy


def pytest_generate_tests(metafunc):
    """Run what takes a ``place`` on the CPU, and on CUDA where there is one."""
    if "place" in metafunc.fixturenames:
        import torch

        there = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []
        metafunc.parametrize("place", ["cpu", *there], indirect=True)


@pytest.fixture
def place(request):
    """The device to compute on."""
    import torch

    return torch.device(request.param)


@pytest.fixture
def repeatable():
    """Deterministic kernels on CUDA, so that two runs can be compared bit for bit; what has none is refused."""
    import torch

    torch.use_deterministic_algorithms(torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Compute on one thread, so that results do not depend on the machine's cores."""
    import torch  # here, for the tests of what a process does before it is loaded

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread_seeded(one_thread):
    """The same, torch's generator at a fixed start."""
    import torch

    torch.manual_seed(0)
