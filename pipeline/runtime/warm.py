"""A warm process that stages are forked from, so that a repro pays for imports once.

torch, transformers, scikit-learn and MLflow take 5-15 s to import on two cores; DVC starts a process per stage.
``fishmask repro`` therefore starts one process that imports them and listens on a socket; ``python -m stages.X``,
as DVC runs it, hands its arguments, environment and terminal over to a fork of that process and waits for its exit
code. Without a listener (plain ``dvc repro``) a stage runs by itself: the same code, hence the same bytes.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from pipeline.runtime.cpu import set_up_cpu
from pipeline.runtime.process import end_with_parent

SOCKET = "FISHMASK_WARM"
"""The environment variable that names the socket."""

_IMPORTS = (
    "stages.runner",
    "torch._dynamo",  # asked for by torch.optim when it makes its first optimizer
    "torch.distributed.run",
    "pipeline.fisher",
    "pipeline.deltas.delta",
    "pipeline.deltas.format",
    "pipeline.masks.select",
    "pipeline.tasks.fetch",
    "pipeline.tasks.probe",
    "pipeline.tasks.sharing",
    "pipeline.distributed.launch",
    "pipeline.reports.page",
    "mlflow.tracking",
    "sklearn.metrics",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto.tokenization_auto",
)
_MESSAGE = 1 << 20  # bytes; arguments and environment are far smaller


@contextlib.contextmanager
def warm_process() -> Iterator[dict[str, str]]:
    """Keep a warm process while the block runs.

    Yields:
        The environment variables to start DVC with.
    """
    with tempfile.TemporaryDirectory(prefix="fishmask-") as folder:
        address = str(Path(folder) / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()  # from here on stages wait in the queue, until the imports are done
            number = listener.fileno()
            command = [sys.executable, "-m", "pipeline.runtime.warm", str(number)]
            process = subprocess.Popen(command, pass_fds=[number])
        try:
            yield {SOCKET: address}
        finally:
            process.terminate()
            process.wait()


def hand_over() -> None:
    """Run this process's stage in a fork of the warm process, and exit as it does; return if there is none.

    So do the workers that a stage starts under torchrun: they inherit the socket's name. A SIGTERM, or the end of
    whoever started this process, is passed on; the fork's own end is waited for.
    """
    address, options = os.environ.get(SOCKET), sys.orig_argv[1:]
    while options[:1] == ["-u"]:  # as torchrun starts its workers
        options.pop(0)
    if address is None or sys.argv[:1] != ["-m"] or options[:1] != ["-m"]:
        return
    module = options[1]
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(socket.socket(socket.AF_UNIX))
        try:
            link.connect(address)
        except OSError:
            return
        end_with_parent()
        signal.signal(signal.SIGTERM, lambda *_: _hang_up(link))
        work = {"module": module, "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(link, [json.dumps(work).encode()], [0, 1, 2])
        answer = link.recv(16)
    if not answer:
        print(f"{module}: its process ended without an exit code", file=sys.stderr)
    # Not sys.exit: this runs while a package is being imported, and nothing here needs cleaning up.
    os._exit(int(answer or b"1"))


def _hang_up(link: socket.socket) -> None:
    """Tell the fork to stop, as ``_end_with`` hears it; its exit code can still come."""
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_WR)


def serve(number: int) -> None:
    """Import what stages need, then fork one child for each that asks at the socket; ends with its parent."""
    set_up_cpu()
    # A fork of a process that has asked the CUDA runtime for its devices cannot use them: imports ask the driver's
    # library instead. Children get the environment of whoever asked for them.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    with socket.socket(fileno=number) as listener:
        for module in _IMPORTS:
            with contextlib.suppress(ImportError):
                import_module(module)
        gc.freeze()
        end_with_parent()
        while True:
            link, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _become(link)
            link.close()


def _become(link: socket.socket) -> None:
    """Be the stage that asked: its terminal, folder, environment and arguments; never returns."""
    message, files, _, _ = socket.recv_fds(link, _MESSAGE, 3)
    code = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        work = json.loads(message)
        os.chdir(work["cwd"])
        os.environ.clear()
        os.environ.update(work["env"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_with, args=(link,), daemon=True).start()
        sys.argv = [work["module"], *work["argv"]]
        sys.path[0] = work["cwd"]
        runpy.run_module(work["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            link.sendall(str(code).encode())
        os._exit(code)


def _end_with(link: socket.socket) -> None:
    """Stop when the process that asked is gone: its end of the link closes with it."""
    with contextlib.suppress(OSError):
        if not link.recv(1):
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
