"""Turn the metrics of every cell into the tables, figures and the page that people read.

    python -m stages.aggregate        # or: fishmask aggregate

Writes ``reports/`` (tables as csv and md, figures as svg, one self-contained ``index.html``). Takes seconds.
"""

from pipeline.reports.page import write_report
from pipeline.training.fingerprint import fingerprint
from stages.runner import Stage, main


def run(stage: Stage) -> None:
    """Write the report of the grid's cells, and attach its tables and figures to the run."""
    profile, grid = stage.read("profile"), stage.read("grid")
    with stage.held(fingerprint(settings=stage.settings)) as run:
        metrics, chains, shares = stage.workspace.root / "metrics", grid.checkpoint.cells, grid.distribute.cells
        for file in write_report(metrics, stage.work, profile, grid.cells, chains, shares):
            run.figure(file, file.name)


if __name__ == "__main__":
    main("aggregate", run, ())
