"""Bring the module lists of dvc.yaml up to date with the code's imports: `python dev/modules.py --write`.

Without `--write` it prints the result. A room of the library is listed as a folder, single files one by one: DVC
reads and writes the whole of dvc.lock after every stage, and with every file of every room in it that took longer
than the stages (dev/LOG.md). tests/stages/test_contract.py imports the functions and holds dvc.yaml against them.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("artifacts", "fisher", "masks", "deltas", "training", "distributed", "tasks", "reports", "runtime")


def imports(file: Path) -> list[str]:
    """Name every module that a file imports anywhere, but for those only type checkers see."""
    found: list[str] = []

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.extend(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0 and node.module, f"{file}: relative import"
            found.append(node.module)
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(file.read_text()))
    return found


def files_of(module: str) -> Iterator[Path]:
    """Yield the project's files that importing a module runs: its packages' __init__ files and itself."""
    parts = module.split(".")
    if parts[0] in ("pipeline", "stages"):
        for depth in range(1, len(parts) + 1):
            path = ROOT.joinpath(*parts[:depth])
            yield from (f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file())


@cache
def closure(file: Path) -> frozenset[Path]:
    """The files that running ``file`` can reach."""
    seen: set[Path] = set()
    todo = [file]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo.extend(f for module in imports(here) for f in files_of(module))
    return frozenset(seen)


def with_code(files: Iterable[Path]) -> set[str]:
    """Name the files that are not empty, from the project's root."""
    return {str(f.relative_to(ROOT)) for f in files if f.read_text().strip()}


def used_by(stage: str) -> set[str]:
    """Name the files that ``python -m stages.<stage>`` runs."""
    return with_code(closure(ROOT / "stages" / f"{stage}.py") | {ROOT / "stages" / "__init__.py"})


def dependencies(stage: str) -> list[str]:
    """What dvc.yaml lists for a stage: the rooms and the single files that it uses."""
    used = {room_of(path) for path in used_by(stage)}
    return sorted(used, key=lambda path: (path.startswith("pipeline"), path))


def room_of(path: str) -> str:
    """The room that a file lies in, or the file where it lies in none."""
    return next((f"pipeline/{room}" for room in ROOMS if path.startswith(f"pipeline/{room}/")), path)


def main() -> None:
    """Print or write the lists."""
    lines = (ROOT / "dvc.yaml").read_text().splitlines()
    written, stage = [], ""
    for line in lines:
        stage = match.group(1) if (match := re.search(r"python -m stages\.(\w+)", line)) else stage
        if re.fullmatch(r"      - (pipeline|stages)\S*", line):
            continue
        if line == "    params:" and stage:
            written += [f"      - {path}" for path in dependencies(stage)]
        written.append(line)
    text = "\n".join(written) + "\n"
    if "--write" in sys.argv:
        (ROOT / "dvc.yaml").write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
