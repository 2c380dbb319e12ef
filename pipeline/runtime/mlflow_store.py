"""The MLflow store: where it is, how it is opened by many processes at once, how it is written to, its page.

Only ``pipeline.tracking`` and ``pipeline.serving.registry`` use this module; MLflow itself is imported inside the
functions (it takes seconds).
"""

import contextlib
import fcntl
import gc
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import ParamsError, StorageError

_BATCH = 1000  # metrics in one log_batch call, MLflow's limit
_PARAMS_BATCH = 100  # the same for params and tags
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ENVIRONMENT = {  # defaults: what the user has set wins
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "1",
    "MLFLOW_CONFIGURE_LOGGING": "false",  # no "Creating initial tables" between our progress lines
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own 7 retries of 120 s would let training wait for a dead server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def project_root() -> Path:
    """Find the project that outlives this run.

    Returns:
        ``$DVC_ROOT`` if set (under ``dvc exp run --temp`` the working directory is a passing copy), else the
        folder of the nearest params.yaml upwards, else the working directory.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    return workspace_root()


def workspace_root() -> Path:
    """The folder of the nearest params.yaml upwards, else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "params.yaml").is_file()), here)


def tracking_uri(root: Path | None = None) -> str:
    """Name the store.

    Args:
        root: the project's folder; found as in ``project_root`` when absent.

    Returns:
        ``MLFLOW_TRACKING_URI`` if set, else the sqlite file at the project's root as an absolute URI.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root or project_root()).resolve() / 'mlflow.db'}"


@dataclass(frozen=True)
class Store:
    """An open store: MLflow's client and one experiment in it.

    Attributes:
        client: an ``MlflowClient``.
        experiment: the experiment's id.
    """

    client: Any
    experiment: str

    def find(self, fingerprint: str, parent: str | None) -> Any:
        """Find the latest run with this fingerprint.

        Args:
            fingerprint: the value of its tag.
            parent: the id of the run whose child it is; None for a cell's own run.

        Returns:
            MLflow's ``Run``, or None.
        """
        level = f"tags.`mlflow.parentRunId` = '{parent}'" if parent else "tags.level = 'cell'"
        found = self.client.search_runs(
            [self.experiment],
            f"tags.fingerprint = '{fingerprint}' AND {level}",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return found[0] if found else None

    def write(
        self,
        run_id: str,
        *,
        points: Iterable[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write in as few calls as MLflow's limits allow (on sqlite one costs ~16 ms, for one point as for many).

        Args:
            run_id: the run.
            points: (name, value, milliseconds since 1970, step) of each.
            params: settings that the run does not have yet.
            tags: tags to set.
        """
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(*point) for point in points]
        settings = [Param(*item) for item in (params or {}).items()]
        labels = [RunTag(*item) for item in (tags or {}).items()]
        while metrics or settings or labels:
            room = _BATCH - len(settings[:_PARAMS_BATCH]) - len(labels[:_PARAMS_BATCH])
            self.client.log_batch(run_id, metrics[:room], settings[:_PARAMS_BATCH], labels[:_PARAMS_BATCH])
            del metrics[:room], settings[:_PARAMS_BATCH], labels[:_PARAMS_BATCH]


def connect(experiment: str) -> Store:
    """Open the store and the experiment.

    Args:
        experiment: its name; made, or undeleted, where needed.

    Returns:
        The open store. Whatever MLflow raises when it cannot be opened goes through.
    """
    uri = tracking_uri()
    with _first_touch(uri):
        client = open_client(uri)
        return Store(client, _experiment(client, experiment, uri))


@contextlib.contextmanager
def _first_touch(uri: str) -> Iterator[None]:
    """One process at a time: a fresh sqlite database breaks when several set it up together."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_client(uri: str) -> Any:
    """Import MLflow, quietly and with its telemetry off, and open its client.

    Args:
        uri: the store.

    Returns:
        An ``MlflowClient``.
    """
    _set_defaults()
    collecting = gc.isenabled()
    gc.disable()  # MLflow imports 1,300 modules and keeps them: collecting in between is a quarter of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow's imports, not of this project
            from mlflow.tracking.client import MlflowClient

            # It prints a traceback of what it raises all the same, and what it raises is told in one line.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            return MlflowClient(tracking_uri=uri)
    finally:
        if collecting:
            gc.enable()


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, made or undeleted where needed."""
    found = client.get_experiment_by_name(name)
    if found is None:
        folder = project_root() / "mlartifacts" / re.sub(r"[^\w.-]", "_", name)
        # A server decides for itself where its artifacts go.
        return str(client.create_experiment(name, folder.as_uri() if uri.startswith(_DATABASES) else None))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal wait until MLflow is done: inside it, our ``Interrupted`` would be taken for a database error.

    Yields:
        None, while SIGTERM and SIGINT wait (in the main thread; elsewhere no handler runs).
    """
    waiting: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        waiting.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {int(number): signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)


def _set_defaults() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def ui(root: Path | None = None, port: int = 5000, host: str = "127.0.0.1") -> int:
    """Serve MLflow's page on this project's store until Ctrl-C.

    Args:
        root: the project's folder; found as in ``project_root`` when absent.
        port: the TCP port.
        host: the address to listen on; only requests that name this host, or the loopback, are answered.

    Returns:
        The exit code of the server; 0 after Ctrl-C, and where the store is a server that has a page of its own.

    Raises:
        ParamsError: if the port is taken or the host cannot be listened on.
        StorageError: if the store cannot be opened.
    """
    root = (root or project_root()).resolve()
    uri = tracking_uri(root)
    if uri.startswith("http"):
        print(f"The runs are on the server that MLFLOW_TRACKING_URI names: {uri}")
        return 0
    if problem := _not_free(host, port):
        raise ParamsError(f"{host} port {port}: {problem}; choose another with --port")
    _set_defaults()
    os.environ.setdefault(
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"
    )  # six more processes, for features not used here
    os.environ["MLFLOW_TRACKING_URI"] = uri
    named = [f"[{name}]" if ":" in name else name for name in dict.fromkeys((host, *_LOOPBACK))]
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--default-artifact-root",
        (root / "mlartifacts").as_uri(), "--host", host, "--port", str(port), "--workers", "1",
        "--allowed-hosts", ",".join(f"{name}:{port}" for name in named),
    ]  # fmt: skip
    print(f"http://{named[0]}:{port}  starting (about 15 s); Ctrl-C ends it", flush=True)
    try:
        connect("Default")  # a fresh store is made here, under the lock
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise StorageError(f"{uri}: MLflow cannot open the store: {reason}") from None
    server = subprocess.Popen(command, cwd=root)
    try:
        return server.wait()
    except BaseException as stop:
        server.terminate()
        server.wait()
        if isinstance(stop, KeyboardInterrupt):
            return 0
        raise


def _not_free(host: str, port: int) -> str | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
