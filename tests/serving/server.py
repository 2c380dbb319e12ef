"""MLflow's scoring server, and a client that asks it over HTTP on the loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

JSON = "application/json"


class Client:
    """Asks the server at a port of the loopback."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def ask(self, body, kind=JSON, path="/invocations", method="POST"):
        """Send a request.

        Returns:
            Status and body.
        """
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {} if kind is None else {"Content-Type": kind}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answers(self, columns, params=None):
        rows = {"columns": list(columns), "data": list(zip(*columns.values(), strict=True))}
        status, body = self.ask({"dataframe_split": rows} | ({"params": params} if params else {}))
        assert status == 200, body
        return json.loads(body, parse_constant=pytest.fail)["predictions"]


class Server(Client):
    """``mlflow models serve`` in a process of its own."""

    def __init__(self, uri, log, **environment):
        super().__init__()
        self.log = log
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local",
                   "--host", "127.0.0.1", "--port", str(self.port)]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | environment
        environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self):
        """Poll until it answers or ends.

        Returns:
            Whether it answers.
        """
        until = time.monotonic() + 400
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                return self.ask(None, None, "/ping", method="GET")[0] == 200
            time.sleep(0.2)
        return False

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)
        until = time.monotonic() + 60  # its worker, of the same group, answers until it has shut down
        while time.monotonic() < until:
            try:
                self.ask(None, None, "/ping", method="GET")
            except OSError:
                return
            time.sleep(0.2)
        pytest.fail("the server still answers")


class Thread(Client):
    """The same application in a thread of this process: as real over HTTP, and cheaper to start."""

    def __init__(self, uri):
        import mlflow.pyfunc
        import uvicorn
        from mlflow.pyfunc import scoring_server

        super().__init__()
        app = scoring_server.init(mlflow.pyfunc.load_model(uri))
        self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", self.port, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    def end(self):
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
