"""What `fishmask tune` prints at its end: the table, the folder, and the lines that load it."""

from pipeline.runtime.terminal import print_table
from pipeline.tuning.card import labels, lines_to_load
from pipeline.tuning.tune import Result


def show(result: Result) -> None:
    """Print it on stdout."""
    tuned, results = result.tuned, result.results
    rows = []
    for method, label in labels(tuned).items():
        done, scores = results[method], tuned.scores[method]
        values, rate, seconds = (
            form(done[key]) if key in done else ""
            for key, form in (("values", "{:,}".format), ("lr", "{:g}".format), ("seconds", "{:.0f}".format))
        )
        rows.append((label, values, rate, f"{scores[tuned.metric]:.4f}", f"{scores['loss']:.4f}", seconds))
    for method, done in results.items():
        if "diverged" in done:
            rows.append((method, f"{done['values']:,}", f"{done['lr']:g}", "diverged", "", ""))
    print_table(("what was trained", "values", "rate", tuned.metric, "loss", "seconds"), rows, title=tuned.name)
    delta = tuned.delta
    print(
        f"{result.folder}: {delta.bytes:,} bytes hold what {delta.values:,} of {delta.parameters:,} values became"
    )
    print()
    print(lines_to_load(str(result.folder)))
