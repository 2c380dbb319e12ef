"""A project's metrics, written by hand so that every expected number can be worked out on paper."""

import json

import pytest

DATA = {
    "source": "package:words", "revision": "3.3", "rows": {"train": 3000, "validation": 1400, "test": 9},
    "reported": "validation", "remarks": {"train": "3000 of 5697 rows"}, "digest": "ab" * 16,
}  # fmt: skip


class Metrics:
    """Writes metrics files of the stages' form."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, stage, name, content):
        file = self.folder / stage / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    def train(self, task, method, scores, setting="main", density=0.005, examples=1024, **more):
        seeds = {
            str(seed): {
                "metric": score, "nnz": int(200_000 * density), "density": density, "parameters": 200_000,
                "delta_bytes": 1000 + 100 * seed, "dense_bytes": 800_000, "diverged": score is None,
                "epochs": [{"epoch": 1, "loss": 1, "accuracy": 0.5}, {"epoch": 2, "loss": 0, "accuracy": score}],
            }
            for seed, score in enumerate(scores)
        }  # fmt: skip
        content = {"stage": "train", "task": task, "method": method, "setting": setting, "metric": "accuracy"}
        content |= {"lr": 0.001, "examples": examples, "data": DATA, "seeds": seeds} | more
        self.write("train", f"{task}-{method}-{setting}", content)

    def mask(self, task, method, counts, setting="main"):
        layers = [
            {"layer": "encoder.layer.2", "count": counts[0], "numel": 150},
            {"layer": "encoder.layer.10", "count": counts[1], "numel": 50},
            {"layer": "classifier", "count": counts[2], "numel": 200},
        ]
        seed = {"nnz": sum(counts), "density": sum(counts) / 400, "bytes": 2 * sum(counts), "layers": layers}
        seeds = {str(s): seed | {"digest": f"{method}{s}"} for s in range(3)}
        content = {"task": task, "method": method, "setting": setting, "seeds": seeds}
        self.write("mask", f"{task}-{method}-{setting}", content)


@pytest.fixture
def metrics(tmp_path):
    return Metrics(tmp_path / "metrics")


@pytest.fixture
def demo(metrics):
    """Two tasks, a sweep, masks; `digits` lacks a method and has a seed without a score."""
    metrics.train("words", "dense", [0.91, 0.92, 0.93], density=1.0)
    metrics.train("words", "fish", [0.90, 0.91, 0.92])
    metrics.train("words", "random", [0.88, 0.90, 0.89])
    metrics.train("words", "fish", [0.85, 0.86, 0.87], setting="density-low", density=0.001)
    metrics.train("words", "fish", [0.89, 0.89, 0.89], setting="examples-few", examples=32)
    metrics.train("digits", "dense", [0.97, 0.98, 0.99], density=1.0)
    metrics.train("digits", "fish", [0.96, None, 0.97])
    for method, counts in (("fish", (0, 6, 4)), ("random", (4, 1, 5))):
        metrics.mask("words", method, counts)
    metrics.write("fetch", "words", {"task": "words", "digest": "cd" * 16, "note": "<script>alert(1)</script>"})
    return metrics.folder
