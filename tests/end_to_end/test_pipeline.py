"""The whole pipeline in a temporary project: real DVC, real git, real MLflow, a user's own files."""

import csv
import json
import random
import sqlite3
import time
from html.parser import HTMLParser

import pytest

from pipeline import Delta, Mask
from pipeline.masks.ranking import Ranking

MAIN = ["dense", "fish", "random"]


def test_the_first_repro_runs_every_cell_and_leaves_git_clean(finished):
    assert sorted(finished.ran) == sorted(
        ["fetch@reviews", "score@reviews", "aggregate", "mask-ranked@reviews-fish-main"]
        + ["mask@reviews-dense-main", "mask@reviews-random-main", "mask-sweep@reviews-fish-denser"]
        + [f"train@reviews-{method}-main" for method in MAIN]
        + ["train-sweep@reviews-fish-denser"]
    )
    assert finished.run("git", "status", "--porcelain").stdout == ""
    assert finished.repro() == []
    assert finished.run("git", "status", "--porcelain").stdout == ""


def test_the_report_shows_the_metrics_of_the_cells(finished):
    page = (finished.root / "reports" / "index.html").read_text()
    HTMLParser().feed(page)
    metrics = finished.metrics("train/reviews-fish-main")
    scores = [seed["metric"] for seed in metrics["seeds"].values()]
    assert len(scores) == 2
    assert f"{100 * sum(scores) / 2:.1f}" in page or f"{sum(scores) / 2:.3f}" in page


def test_every_mask_and_delta_says_where_it_comes_from(finished):
    """Base, data, seed, density and code; the ranking that a mask was cut from, the mask that a delta trained."""
    folder, masks = finished.root / "artifacts", 0
    for file in folder.glob("mask/*/seed-*/mask.safetensors"):
        mask, seed = Mask.load(file), int(file.parent.name.removeprefix("seed-"))
        ranked = mask.info["method"] == "fish"
        file = file.parents[1].name + f"/seed-{seed}/delta.safetensors"
        rankings = [Ranking.load(r) for r in folder.glob(f"score/reviews/seed-{seed}/*.safetensors")]
        ground = rankings[0].info
        assert {key: mask.info[key] for key in ("base", "data", "model", "seed", "fishmask")} == {
            key: ground[key] for key in ("base", "data", "model", "seed", "fishmask")
        }
        assert mask.info["density"] == pytest.approx(mask.density, abs=1e-3)
        parents = {r.digest: r.info for r in rankings}
        if ranked:
            assert {key: mask.info[key] for key in ("kind", "power", "examples")} == {
                key: parents[mask.info["parent"]][key] for key in ("kind", "power", "examples")
            }
        else:
            assert not {"parent", "kind", "examples"} & mask.info.keys()
        delta = Delta.load(folder / "train" / file)
        assert delta.info["parent"] == mask.digest == delta.mask.digest and delta.mask.info == mask.info
        assert (delta.info["data"], delta.info["seed"]) == (ground["data"], seed)
        masks += 1
    assert masks == 8


def test_dense_training_learns_what_the_words_mean(finished):
    """Labels follow from two of seven words; a coin gets 0.5."""
    seeds = finished.metrics("train/reviews-dense-main")["seeds"].values()
    assert min(seed["metric"] for seed in seeds) > 0.8


def test_changing_one_methods_lr_reruns_its_cells_alone(finished, fork):
    project = fork(finished)
    project.edit("random: {lr: {reviews: 1.0e-2}}", "random: {lr: {reviews: 2.0e-2}}")
    assert sorted(project.repro()) == ["aggregate", "train@reviews-random-main"]
    changed = project.dvc("params", "diff").stdout
    assert "methods.random.lr.reviews" in changed
    assert "metrics/train/reviews-random-main.json" in project.dvc("metrics", "diff", "--all").stdout


def test_changed_files_of_a_data_folder_are_fetched_again(finished, fork):
    """DVC compares settings alone, and would bring the former rows back from its run cache."""
    project = fork(finished)
    before, file = project.artifacts(), project.root / "data" / "reviews" / "validation.csv"
    text = file.read_text()
    file.write_text(text.removesuffix("\n").rpartition("\n")[0] + "\n")  # a row less
    assert "fetch@reviews" in project.fishmask("plan").stdout
    project.fishmask("repro", "--dry")
    assert project.artifacts() == before  # to look is not to run
    assert project.repro()[0] == "fetch@reviews"
    assert project.metrics("fetch/reviews")["splits"]["validation"]["rows"] == 59
    assert project.metrics("train/reviews-fish-main") != finished.metrics("train/reviews-fish-main")
    assert project.repro() == []
    file.write_text(text)
    assert project.repro()[0] == "fetch@reviews" and project.artifacts() == before
    (project.root / "data" / "reviews").rename(project.root / "data" / "elsewhere")  # fetched data is enough
    assert project.repro() == []


def test_dvc_experiments_log_to_the_real_project(finished, fork):
    project = fork(finished)
    project.dvc("exp", "run", "--temp", "-S", "methods.random.lr.reviews=0.003", "--name", "slower")
    assert "slower" in project.dvc("exp", "show", "--csv").stdout
    runs = query(project, "select name from experiments")
    assert ("fishmask-test/slower",) in runs
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_push_and_pull_bring_the_artifacts_back(finished, fork, tmp_path):
    project = fork(finished)
    before = project.artifacts()
    project.dvc("remote", "add", "-d", "store", str(tmp_path / "store"))
    project.dvc("push", "-q")
    import shutil

    shutil.rmtree(project.root / ".dvc" / "cache")
    shutil.rmtree(project.root / "artifacts")
    project.dvc("pull", "-q")
    assert project.artifacts() == before


def test_single_stages_give_the_same_bytes_as_dvc(finished, fork):
    project = fork(finished)
    before = project.artifacts()
    metrics = project.run("git", "status", "--porcelain").stdout
    for stage in ("fetch", "score"):
        project.fishmask(stage, "--task", "reviews")
    for stage in ("mask", "train"):
        project.fishmask(stage, "--task", "reviews", "--method", "fish", "--seed", "1")
    assert project.artifacts() == before
    assert project.run("git", "status", "--porcelain").stdout == metrics


def test_every_other_method_goes_through_the_pipeline(template, fork):
    """Table 1's other methods, the learned masks and the adapter among them, each in its own list of the grid."""
    project = fork(template)
    groups = {
        "ranked": ["fish-spread"],
        "unranked": ["bitfit", "magnitude", "head", "lora", "shira"],
        "learned": ["deviation", "diff-pruning"],
    }
    methods = [method for group in groups.values() for method in group]
    for name, old in (("methods", "dense, fish, random"), ("ranked", "fish"), ("unranked", "dense, random")):
        project.edit(f"  {name}: [{old}]", f"  {name}: [{', '.join(groups.get(name, methods))}]")
    project.edit("learned: []", f"learned: [{', '.join(groups['learned'])}]")
    project.edit("{tasks: [reviews], methods: [fish], settings: [denser]", "{tasks: [], methods: [], settings: []")
    project.edit("keep: 0.5}", "keep: 0.5, variants: {spread: {selection: per-tensor, exclude: [bert.pooler]}}}")
    project.edit("seeds: [0, 1]", "seeds: [0]")
    project.edit("epochs: 6", "epochs: 1")
    project.edit("density: 0.05", "density: 0.1")
    with (project.root / "params.yaml").open("a") as file:
        learn = dict.fromkeys(groups["learned"], ", learn: {epochs: 1}")
        file.writelines(f"  {method}: {{lr: {{reviews: 1.0e-2}}{learn.get(method, '')}}}\n" for method in methods)
    masks = {"ranked": "mask-ranked", "unranked": "mask", "learned": "mask-learned"}
    cells = [f"{masks[group]}@reviews-{m}-main" for group, own in groups.items() for m in own]
    cells += [f"train@reviews-{method}-main" for method in methods]
    assert sorted(project.repro()) == sorted(["fetch@reviews", "score@reviews", "aggregate", *cells])
    assert project.repro() == []
    with (project.root / "reports" / "tables" / "main.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(methods)
    for method, row in rows.items():
        seed = project.metrics(f"train/reviews-{method}-main")["seeds"]["0"]
        assert float(row["mean"]) == seed["metric"] and float(row["density"]) == pytest.approx(seed["density"])
        folder = project.root / "artifacts" / "train" / f"reviews-{method}-main" / "seed-0"
        left = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
        assert left == (adapter if method == "lora" else ["delta.safetensors"])
        assert float(row["artifact_bytes"]) == sum((folder / file).stat().st_size for file in left)
    project.edit("dense: {lr: {reviews: 3.0e-3}}", "dense: {lr: {reviews: 2.0e-3}}")  # of which masks are learned
    ran = project.repro()
    assert {name for name in ran if name.startswith("mask")} == set(cells[6:8]), "and no other mask"


def query(project, sql):
    with sqlite3.connect(project.root / "mlflow.db") as database:
        rows = database.execute(sql).fetchall()
    database.close()
    return rows


def test_mlflow_holds_a_run_per_cell_and_a_child_per_seed(finished):
    tags = {}
    for run, key, value in query(finished, "select run_uuid, key, value from tags"):
        tags.setdefault(run, {})[key] = value
    cells = [t for t in tags.values() if t.get("stage") == "train" and "mlflow.parentRunId" not in t]
    assert sorted(t["cell"] for t in cells) == sorted(
        [f"reviews-{m}-main" for m in MAIN] + ["reviews-fish-denser"]
    )
    children = [t for t in tags.values() if "mlflow.parentRunId" in t]
    assert len(children) == 2 * len(cells)
    for child in children:
        assert {"seed", "mask_digest", "data_digest", "git.commit", "git.dirty"} <= set(child)
    assert {status for (status,) in query(finished, "select status from runs")} == {"FINISHED"}
    metrics = query(finished, "select run_uuid, key, step, count(*) from metrics group by 1, 2, 3")
    assert metrics and all(count == 1 for *_, count in metrics), "a step was logged twice"
    logged = {
        value for key, value in query(finished, "select key, value from latest_metrics") if key == "accuracy"
    }
    reported = {
        seed["metric"]
        for file in (finished.root / "metrics" / "train").glob("*.json")
        for seed in json.loads(file.read_text())["seeds"].values()
    }
    assert reported <= logged


@pytest.mark.parametrize("stage", ["fetch", "score", "mask", "train"])
def test_kill_9_during_a_stage_then_repro_gives_the_same_bytes(finished, template, fork, stage):
    project = fork(template)
    for before in {"fetch": [], "score": ["fetch"], "mask": ["fetch", "score"]}.get(
        stage, ["fetch", "score", "mask"]
    ):
        cell = ["--method", "fish"] if before == "mask" else []
        project.fishmask(before, "--task", "reviews", *cell, "--no-mlflow")
    cell = ["reviews"] if stage in ("fetch", "score") else ["reviews", "fish", "main"]
    draw = random.Random(stage)
    for _ in range(2):
        process = project.start("python", "-m", f"stages.{stage}", *cell)
        wait_for_work(project, stage, process, draw.uniform(0.0, 0.6))
        process.kill()
        process.communicate()
    project.repro()
    assert project.artifacts() == finished.artifacts()
    assert not any((project.root / ".resume").rglob("*.safetensors")), "resume state was left behind"


def wait_for_work(project, stage, process, extra):
    """Wait until the stage has begun to write, and a little longer."""
    folder = project.root / "artifacts" / stage
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not list(folder.glob(".*.partial")):
        time.sleep(0.01)
    time.sleep(extra)
