"""Turn the metrics of every cell into the tables, figures and the page that people read.

    python -m stages.aggregate        # or: fishmask aggregate

Writes ``reports/`` (tables as csv and md, figures as svg, one self-contained ``index.html``). Takes seconds.
"""

from pipeline.reports.page import write_report
from pipeline.training.resume import fingerprint
from stages.runner import Stage, main


def run(stage: Stage) -> None:
    """Write the report of the whole project."""
    profile = stage.read("profile")
    with stage.held(fingerprint(settings=stage.settings)):
        write_report(stage.workspace.root / "metrics", stage.work, profile)


if __name__ == "__main__":
    main("aggregate", run, ())
