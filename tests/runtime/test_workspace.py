"""Where things lie, and by what resume state is told apart."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

import pipeline


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """A copy of the library, and its digest."""
    package = tmp_path / "pipeline"
    shutil.copytree(Path(pipeline.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location("copied", package / "runtime" / "workspace.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied", module)
    spec.loader.exec_module(module)
    return package, module.code_digest.__wrapped__


@pytest.mark.parametrize("changed", ["training/loop.py", "files.py", "runtime/cpu.py"])
def test_a_change_anywhere_in_the_library_changes_its_digest(digest, changed):
    """Resume state must not outlive the code that wrote it, wherever that code stands."""
    package, code_digest = digest
    before = code_digest()
    assert before == code_digest()
    with (package / changed).open("a") as file:
        file.write("\n# changed\n")
    assert code_digest() != before
