"""`fishmask predict`: a file of rows in, the same rows with answers out."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.artifacts.application import Done
from pipeline.errors import DataError, ParamsError
from pipeline.runtime.progress import ProgressLine
from pipeline.serving.asked import parse_deltas
from pipeline.serving.predictor import Answers, Predictor
from pipeline.serving.questions import read_rows
from pipeline.serving.results import check_format, encoded, write_table
from pipeline.tasks.raw import RawSplit
from pipeline.tasks.sources import parse


def predict(
    deltas: Sequence[str],
    source: str,
    out: Path | None,
    *,
    base: str | None = None,
    text: Sequence[str] = (),
    only: bool = False,
    force: bool = False,
    **options: Any,
) -> Done | None:
    """Answer every row of a file, in order.

    Args:
        deltas: as ``parse_deltas`` takes them; of several, each column is named ``<delta>.<column>``.
        source: the rows, as ``read_rows`` takes them.
        out: the file to write, its extension says the format; None prints csv.
        base: the base's source, where it is another than the one that the deltas name.
        text: the columns to read, where a delta does not say.
        only: leave the input's own columns out.
        force: replace what stands at ``out``.
        options: of ``Predictor``.

    Returns:
        What was written; None where it was printed.

    Raises:
        DataError: if the rows cannot be read, or have a column that is named as an answer.
        ParamsError: if the output cannot be there.
    """  # noqa: DOC502 - the second is raised by what it calls
    if out is not None:
        _check_out(out, Path(source), force)
    predictor = opened(deltas, source, base, text, options)
    rows = read(source)
    answers: dict[str, pa.Array] = {}
    for name in predictor.names:
        found = answered(predictor, name, rows)
        prefix = f"{name}." if len(predictor.names) > 1 else ""
        answers |= {prefix + column: values for column, values in found.columns.items()}
    result = rows.table if not only else rows.table.select([])
    if taken := [column for column in answers if column in result.column_names]:
        raise DataError(f"{source}: has a column '{taken[0]}', as the answers do; add --only to leave its own out")
    for column, values in answers.items():
        result = result.append_column(column, values)
    if out is None:
        sys.stdout.write(encoded(".csv", result)[0].decode())
        return None
    left_out = write_table(out, result)
    if left_out:
        say(f"{out}: {out.suffix} cannot hold {', '.join(left_out)}: left out")
    facts = {"out": str(out), "rows": rows.table.num_rows, "columns": result.column_names}
    digests = {name: predictor.use(name).asked.delta.digest for name in predictor.names}
    return Done(f"{out}: {rows.table.num_rows:,} rows answered", facts | {"deltas": digests})


def opened(
    deltas: Sequence[str], source: str, base: str | None, text: Sequence[str], options: Mapping[str, Any]
) -> Predictor:
    """Load base and deltas as a command names them, if there is something to ask; says where it computes.

    Returns:
        The predictor.

    Raises:
        DataError: if there is no input.
    """
    if not Path(source).expanduser().exists() and parse(source).kind != "hub":
        raise DataError(f"{source}: no such file; name the rows with --input")
    predictor = Predictor(dict(parse_deltas(deltas)), base, text=text or None, **options)
    say(predictor.device.reason)
    return predictor


def read(source: str) -> RawSplit:
    """Read the rows that a command names; liberties that are taken are said on stderr.

    Returns:
        The rows.
    """
    told: list[str] = []
    rows = read_rows(source, told)
    for sentence in told:
        say(sentence)
    return rows


def answered(predictor: Predictor, name: str, rows: RawSplit) -> Answers:
    """Answer by one delta, with progress; what the answers leave out is said on stderr.

    Returns:
        The answers.
    """
    with ProgressLine(f"predict {name}") as line:
        answers = predictor.answer(rows, by=name, progress=line.update)
    for column, count in answers.missing.items():
        say(f"{rows.where}: {count:,} of {rows.table.num_rows:,} rows lack '{column}': no answer there")
    say_cut(rows.where, answers.cut)
    return answers


def say_cut(where: str, count: int) -> None:
    """Say how many texts were cut."""
    if count:
        say(f"{where}: {count:,} texts are longer than the model takes and are cut (--max-length changes that)")


def say(line: str) -> None:
    """Print a remark on stderr: stdout is for results."""
    print(f"fishmask: {line}", file=sys.stderr)


def _check_out(out: Path, source: Path, force: bool) -> None:
    check_format(out)
    if out.is_dir():
        raise ParamsError(f"{out}: is a folder; name a file")
    if out.exists() and source.exists() and out.samefile(source):
        raise ParamsError(f"{out}: is the input; write elsewhere")
    if out.exists() and not force:
        raise ParamsError(f"{out}: exists; add --force to replace it, or write elsewhere")
