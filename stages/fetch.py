"""Fetch one task's data, check it, and write it in one normal form.

    python -m stages.fetch words        # or: fishmask fetch --task words

Writes ``artifacts/fetch/<task>/``: one parquet file a split, tokenised once, and ``manifest.json``. Takes
seconds for the embedded tasks, the hub's time otherwise. Of a folder the metrics keep a digest of its files: DVC
compares settings alone, and ``fishmask repro`` sees by it that the files have changed.
"""

from pipeline.tasks.fetch import fetch
from pipeline.tasks.raw import source_digest
from pipeline.training.fingerprint import fingerprint
from stages.runner import Stage, main


def run(stage: Stage) -> None:
    """Fetch ``stage.cell.task`` into the stage's output folder."""
    kind, data, model = stage.of_task("kind"), stage.of_task("data"), stage.of_task("model")
    metric = stage.of_task("metric")
    with stage.held(fingerprint(cell=stage.cell, settings=stage.settings)):
        files = source_digest(stage.cell.task, data)  # before reading: a change meanwhile will show
        manifest = fetch(stage.cell.task, kind=kind, data=data, model=model, metric=metric, out=stage.work)
        stage.record(**(manifest | ({"files": files} if files else {})))


if __name__ == "__main__":
    main("fetch", run, ("task",))
