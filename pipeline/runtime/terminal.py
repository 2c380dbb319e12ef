"""Tables in a terminal: one light style for all that the command prints."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_ENDLESS = 10_000  # a line that is too long is the terminal's to break: a number never loses a digit


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1, notes: int = 0, title: str = ""
) -> None:
    """Print a table on stdout; cells are shown as they are, whatever marks they hold.

    Args:
        columns: the headings.
        rows: a cell for each of them.
        words: so many columns from the left hold words and are set flush left; the others hold numbers.
        notes: likewise from the right.
        title: above it.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title) if title else None, title_justify="left")
    for place, name in enumerate(columns):
        wordy = place < words or place >= len(columns) - notes
        table.add_column(Text(name), justify="left" if wordy else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=_ENDLESS, highlight=False).print(table)
