"""A drawing in our own style, as svg text: same numbers, same bytes.

One style throughout: a method keeps its marker and its colour (Okabe and Ito's palette, which colour-blind readers
can tell apart); bars are the sample standard deviation over seeds; small dots are single seeds.
"""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

INK, _GRID = "#333333", "#dddddd"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "oDs^vPX"
_STYLES: dict[str, tuple[str, str]] = {
    method: style
    for method, style in zip(
        ("fish", "random", "bitfit", "magnitude", "head", "lora"),
        zip(_COLOURS, "Ds^vPX", strict=True),
        strict=True,
    )
} | {"dense": ("#555555", "o")}
_SETTINGS: Any = {  # Any: the stubs want each key as a literal
    "svg.hashsalt": "fishmask",  # ids would differ from run to run otherwise
    "svg.fonttype": "none",  # text stays text: small, searchable, readable aloud
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: the stem of its file.
        title: its caption.
        description: in words what it shows, for those who cannot see it.
        svg: the picture, with title and description inside.
    """

    name: str
    title: str
    description: str
    svg: str


@contextmanager
def drawing(panels: int, width: float, height: float, **options: Any) -> Iterator[tuple["Drawing", list["Axes"]]]:
    """Make an empty drawing in our own style.

    Args:
        panels: how many; at most three stand in a row.
        width: of a panel, in inches.
        height: likewise.
        options: of each panel, as ``add_subplot`` takes them.

    Yields:
        The figure and its panels.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the bytes
        matplotlib.rcParams.update(_SETTINGS)
        columns = min(panels, 3)
        rows = -(-panels // columns)
        figure = Drawing(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasSVG(figure)
        axes = [figure.add_subplot(rows, columns, i + 1, **options) for i in range(panels)]
        yield figure, axes


def finish(figure: "Drawing", name: str, title: str, description: str) -> Figure:
    """Write the svg without date and creator, with its title and description, scaling with the page.

    Returns:
        The figure.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are unique within one picture only; several stand in one page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    named = f'role="img" aria-labelledby="{name}-title {name}-desc" '
    words = f'<title id="{name}-title">{html.escape(title)}</title>\n'
    words += f' <desc id="{name}-desc">{html.escape(description)}</desc>'
    head, tail = svg.split(">", 1)
    return Figure(name, title, description, f"{head.replace('<svg ', '<svg ' + named, 1)}>\n {words}{tail}")


def style(method: str) -> tuple[str, str]:
    """Choose colour and marker; a method without one of its own gets one by its name.

    Returns:
        Both, as matplotlib takes them.
    """
    return _STYLES.get(method, (_COLOURS[sum(method.encode()) % len(_COLOURS)], "*"))
