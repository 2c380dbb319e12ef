"""What `fishmask tune` prints at its end: the table, the folder, and the lines that load it."""

from rich.console import Console
from rich.table import Table

from pipeline.tuning import card
from pipeline.tuning.tune import Result


def show(result: Result) -> None:
    """Print it on stdout."""
    tuned, results = result.tuned, result.results
    table = Table("what was trained", "values", "rate", tuned.metric, "loss", "seconds", title=tuned.name)
    names = {label: method for method, label in card.labels(tuned).items()}
    for label, score, loss in card.rows(tuned):
        done = results.get(names[label], {})
        rate = f"{done['lr']:g}" if "lr" in done else ""
        values, seconds = (f"{done[key]:,.0f}" if key in done else "" for key in ("values", "seconds"))
        table.add_row(label, values, rate, score, loss, seconds)
    for method, done in results.items():
        if "diverged" in done:
            table.add_row(method, f"{done['values']:,}", f"{done['lr']:g}", "diverged", "", "")
    Console(width=100).print(table)
    delta = tuned.delta
    print(
        f"{result.folder}: {delta.bytes:,} bytes hold what {delta.values:,} of {delta.parameters:,} values became"
    )
    print()
    print(card.lines_to_load(str(result.folder)))
