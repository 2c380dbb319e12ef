"""Where a number comes from: settings, data, masks, deltas, DVC's hashes, MLflow's runs, the commit."""

import json
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ParamsError, unknown
from pipeline.runtime.workspace import Workspace
from pipeline.runtime.yaml_files import read_yaml

_STAGES = ("train", "checkpoint", "distribute")
"""Those that give scores; a name that several have means the first's, or stands behind ``STAGE/``."""


def print_why(name: str, as_json: bool) -> None:
    """Trace a cell's number to its artifacts, its MLflow runs and the commit that recorded it.

    Raises:
        ParamsError: if no metrics of that cell are there; names the closest cell.
    """
    here = Workspace.here()
    files = [file for stage in _STAGES for file in (here.root / "metrics" / stage).glob("*.json")]
    known = {file.stem: file for file in reversed(files)} | {f"{f.parent.name}/{f.stem}": f for f in files}
    if name not in known:
        raise ParamsError(f"metrics of {', '.join(_STAGES)}: unknown cell {unknown(name, known)}")
    stage, cell = known[name].parent.name, known[name].stem
    metrics = json.loads(known[name].read_text())
    scores = [seed["metric"] for seed in metrics["seeds"].values()]
    finite = [score for score in scores if score is not None]
    facts: dict[str, Any] = {
        "stage": stage,
        "cell": cell,
        metrics["metric"]: scores,
        "mean": statistics.mean(finite) if finite else None,
        "params": metrics["params"],
        "data": metrics["data"],
        "masks": {s: value["mask_digest"] for s, value in metrics["seeds"].items() if "mask_digest" in value},
        "deltas": {
            seed: value.get("delta_digest", value.get("state_digest")) for seed, value in metrics["seeds"].items()
        },
        "dvc": dict(_locked_outs(here.root, stage, cell)),
        "commit": _git(here.root, "log", "-1", "--format=%h %s", "--", str(known[name])) or "not committed",
        "mlflow": _runs(here, stage, cell),
    }
    if as_json:
        print(json.dumps(facts))
    else:
        print("\n".join(_lines(facts)))


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A line a fact, what belongs together indented below its name."""
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        else:
            text = "  ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{indent}{key:<{width}}  {text}"


def _runs(here: Workspace, stage: str, name: str) -> list[str]:
    from pipeline.tracking import runs_of

    return runs_of(here.home, {"stage": stage, "cell": name})


def _locked_outs(root: Path, stage: str, name: str) -> Iterator[tuple[str, str]]:
    lock = root / "dvc.lock"
    if lock.is_file():
        wanted = {"mask", stage} if stage == "train" else {stage}
        for locked in read_yaml(lock).get("stages", {}).values():
            for out in locked.get("outs", []):
                path = Path(out["path"])
                if name in path.parts and wanted & set(path.parts):
                    yield out["path"], out["md5"]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
