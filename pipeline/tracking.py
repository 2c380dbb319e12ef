"""MLflow: the only place that talks to it.

One run per stage and cell, one child run per seed. The store is ``sqlite:///<project>/mlflow.db``, or what
``MLFLOW_TRACKING_URI`` says. MLflow gets curves, settings, identity and small figures and tables; DVC owns the
artifacts. A run is found again by its ``fingerprint`` tag, so that

* a killed run is continued by its rerun: same MLflow run, only steps beyond the last one logged;
* a run that had finished and is executed again becomes a new run with ``attempt`` = 2, 3, ...;
* changed settings are another fingerprint, hence another run.

No failure of MLflow ends a training run: one line on stderr, and that run goes on untracked.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.mlflow_run import Run, line_of, warn
from pipeline.runtime.mlflow_store import (
    connect,
    open_client,
    project_root,
    tracking_uri,
    ui,
    uninterrupted,
    workspace_root,
)
from pipeline.runtime.provenance import dvc_tags, git_tags

__all__ = ["Run", "Tracker", "project_root", "runs_of", "tracking_uri", "ui"]


class Tracker:
    """One experiment of the store. Nothing is imported or opened before the first cell."""

    def __init__(self, experiment: str, enabled: bool) -> None:
        self.experiment = experiment
        self._enabled = enabled

    @classmethod
    def open(cls, experiment: str, *, enabled: bool = True) -> "Tracker":
        """Choose the experiment.

        Args:
            experiment: its name; made at the first cell if it is not there.
            enabled: False for a tracker whose runs record nothing (another rank than 0, ``--no-track``).

        Returns:
            The tracker.
        """
        return cls(experiment, enabled)

    @contextlib.contextmanager
    def cell(
        self, stage: str, cell: str, *, params: Mapping[str, Any], tags: Mapping[str, Any], fingerprint: str
    ) -> Iterator[Run]:
        """Open the parent run of one cell of one stage.

        Args:
            stage: the stage.
            cell: the cell, such as ``words-fish-main``.
            params: the settings it read, flat.
            tags: its identity: task, method, setting, digests. Commit, dirtiness and DVC's hashes are added here.
            fingerprint: of everything that decides the result; hexadecimal.

        Yields:
            The run.
        """
        store = None
        what = f"{stage} {cell}"
        identity = {"stage": stage, "cell": cell, "level": "cell", "fingerprint": fingerprint}
        if self._enabled:
            here = workspace_root()
            source = git_tags(here)
            identity |= source | dvc_tags(here, stage, cell)
            identity |= {"mlflow.source.name": f"fishmask {what}", "mlflow.source.type": "LOCAL"}
            if "git.commit" in source:  # the column that MLflow's own page shows
                identity["mlflow.source.git.commit"] = source["git.commit"]
            with uninterrupted():
                try:
                    store = connect(self.experiment)
                except Exception as error:
                    warn(
                        f"{what}: MLflow at {tracking_uri()} failed; the run goes on without it: {line_of(error)}"
                    )
        run = Run(what, store)
        with run.opened(params, dict(tags) | identity, parent=None):
            yield run


def runs_of(root: Path, tags: Mapping[str, str]) -> list[str]:
    """Find runs by their tags, in every experiment.

    Args:
        root: the project's folder.
        tags: what they must carry, such as ``{"stage": "train", "cell": "words-fish-main"}``.

    Returns:
        Their ids, the latest first; none, with a line on stderr, where the store cannot be read.
    """
    uri = tracking_uri(root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return []
    try:
        client = open_client(uri)
        wanted = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, wanted, order_by=["attributes.start_time DESC"])
    except Exception as error:
        warn(f"MLflow at {uri} failed: {line_of(error)}")
        return []
    return [run.info.run_id for run in found]
