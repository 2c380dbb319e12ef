"""`fishmask distribute` in a project: workers by torchrun, one delta and MLflow run, the same end after a kill."""

import signal
import time

from pipeline.deltas.delta import Delta

SECTION = """
distribute:
  main: {workers: 2, every: 4, warmup: 1, epochs: 3, own_masks: true, renew: 2, average: sum}
"""
COMMAND = ("distribute", "--task", "reviews", "--method", "fish", "--seed", "0", "--debug")


def test_workers_train_a_cell_and_go_on_after_a_kill(template, fork):
    project = fork(template)
    file = project.root / "params.yaml"
    file.write_text(file.read_text() + SECTION)
    project.fishmask("fetch", "--task", "reviews", "--no-mlflow")
    done = project.fishmask(*COMMAND)
    assert done.stdout.count("wrote") == 1  # the launcher's; workers are silent
    folder = project.root / "artifacts" / "distribute" / "reviews-fish-main" / "seed-0"
    seed = project.metrics("distribute/reviews-fish-main")["seeds"]["0"]
    sent = seed["bytes"]
    assert seed["workers"] == 2
    # After the last merge the workers only agree that they have ended.
    assert sum(sent.values()) - sent["control"] <= seed["merges"][-1]["bytes"] <= sum(sent.values())
    assert seed["metric"] == seed["merges"][-1]["accuracy"]
    delta = Delta.load(folder / "delta.safetensors")
    assert delta.digest == seed["delta_digest"]
    assert not [f for f in (project.root / ".resume" / "distribute").iterdir() if f.is_dir()]

    from pipeline.tracking import runs_of

    assert len(runs_of(project.root, {"stage": "distribute", "cell": "reviews-fish-main", "level": "cell"})) == 1
    whole = {f.name: f.read_bytes() for f in folder.iterdir()}

    other = project.start("sh", "-c", f"exec python -m pipeline.cli {' '.join(COMMAND)} --no-mlflow")
    resume = project.root / ".resume" / "distribute"
    while not list(resume.glob("*/rank-*")) and other.poll() is None:
        time.sleep(0.02)
    other.send_signal(signal.SIGTERM)
    output = other.communicate(timeout=60)[0]
    assert other.returncode in (0, 143), output  # 0: it was faster
    assert "Traceback" not in output
    project.fishmask(*COMMAND, "--no-mlflow")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == whole
