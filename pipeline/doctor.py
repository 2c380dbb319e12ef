"""What this machine and project are like: device and why, versions, disk, database, data."""

import importlib.metadata
import json
import os
import platform
import shutil
from typing import Any

from pipeline import profiles
from pipeline.runtime.workspace import VERSION, Workspace

_PACKAGES = ("torch", "torchvision", "transformers", "datasets", "dvc", "mlflow", "typer", "safetensors", "numpy")


def print_doctor(as_json: bool) -> None:
    """Print what this machine and project are like."""
    import torch

    from pipeline.tracking import tracking_uri
    from pipeline.training.device import choose_device

    here = Workspace.here()
    facts: dict[str, Any] = {
        "fishmask": VERSION,
        "device": choose_device().reason,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "free disk": f"{shutil.disk_usage(here.root).free / 2**30:.1f} GiB",
        "project": str(here.root),
        "mlflow": tracking_uri(here.home),
        "data folder": os.environ.get(
            "FISHMASK_DATA", "FISHMASK_DATA is not set; data comes from packages or the hub"
        ),
        "profile": profiles.current(),
    } | {name: _version_of(name) for name in _PACKAGES}
    if as_json:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{key:<{width}}  {value}" for key, value in facts.items()))


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
