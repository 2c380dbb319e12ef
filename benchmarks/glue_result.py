"""What `benchmarks.glue` leaves to read: the scores as JSON, the tables as markdown, and how they came about."""

import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.files import write_bytes, write_json


def write_scores(file: Path, root: Path) -> None:
    """Write every seed's score, every rate that was tried, and seconds, as far as a project has them."""
    cells, metrics = [], root / "metrics"
    for path in sorted(metrics.glob("train/*.json")):
        known: dict[str, Any] = json.loads(path.read_text())
        cell = {key: known[key] for key in ("task", "method", "setting", "metric", "lr")}
        for key, name in (("scores", "metric"), ("nnz", "nnz"), ("delta_bytes", "delta_bytes")):
            cell[key] = {seed: own.get(name) for seed, own in known["seeds"].items()}
        with contextlib.suppress(OSError):
            cell["seconds"] = json.loads((root / "timings" / "train" / path.name).read_text())["seconds"]
        cells.append(cell)
    rates = {path.stem: json.loads(path.read_text()) for path in sorted(metrics.glob("tune-lr/*.json"))}
    write_json(file, {"command": _command(), "machine": _machine(), "cells": cells, "rates": rates})


def write_tables(file: Path, root: Path, how: str, missing: Sequence[str]) -> None:
    """Write the tables as they stand in the report, below where and how they were made."""
    head = ["# GLUE, methods side by side", "", f"`{_command()}`", ""]
    head += [f"{datetime.now(UTC):%Y-%m-%d}, {_machine()}; {how}.", ""]
    if missing:
        head += [f"Not run to the end: {', '.join(missing)}.", ""]
    tables = [path.read_text() for path in sorted((root / "reports" / "tables").glob("*.md"))]
    write_bytes(file, "\n".join([*head, *tables]).encode())


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.glue", *sys.argv[1:]])


@cache
def _machine() -> str:
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"cpu ({platform.processor() or platform.machine()})"
    return f"{device}, {os.cpu_count()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}"
