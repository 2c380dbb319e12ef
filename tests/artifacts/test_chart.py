"""The chart of layers: sums as of one vector, and lines that fit any terminal."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import chart

NAMES = st.lists(st.sampled_from("abcde"), min_size=1, max_size=5).map(".".join)
ROWS = st.lists(
    st.builds(
        lambda name, size, share, norm: {
            "name": name, "size": size, "count": int(size * share), "bytes": 4 * int(size * share), "norm": norm,
        },
        NAMES, st.integers(1, 10**12), st.floats(0, 1), st.floats(0, 1e6),
    ),
    min_size=1, max_size=60, unique_by=lambda row: row["name"],
)  # fmt: skip


@given(ROWS, st.integers(1, 6))
def test_groups_sum_to_the_whole_at_every_depth(rows, depth):
    groups = chart.grouped(rows, depth)
    for key in ("count", "size", "bytes"):
        assert sum(row[key] for row in groups) == sum(row[key] for row in rows)
    assert sum(row["tensors"] for row in groups) == len(rows)
    assert len({row["name"] for row in groups}) == len(groups)
    assert all(row["name"].count(".") < depth for row in groups)
    whole = math.hypot(*(row["norm"] for row in rows if row["count"]))
    assert math.hypot(*(row["norm"] for row in groups)) == pytest.approx(whole)


@given(ROWS)
def test_the_deepest_grouping_is_the_tensors_themselves(rows):
    for group, row in zip(chart.grouped(rows, 6), rows, strict=True):
        assert {key: group[key] for key in ("name", "count", "size", "bytes")} == {
            key: row[key] for key in ("name", "count", "size", "bytes")
        }
        assert group["norm"] == (row["norm"] if row["count"] else 0)


@given(ROWS, st.integers(80, 250))
def test_no_line_is_wider_than_the_terminal(rows, width):
    rows = chart.grouped(rows, 6)
    cells = [
        max(len(title), *(len(form(row[key])) for row in rows)) for key, (title, form) in chart._COLUMNS.items()
    ]
    lines = chart.lines(rows, width)
    if sum(cells) + 2 * (len(cells) + 2) + 12 + 2 * 6 <= width:  # numbers are never cut: else they are wider
        assert max(map(len, lines)) <= width
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:], strict=True):
        assert f"{row['count']:,}" in line and f"{row['size']:,}" in line


def test_long_names_keep_their_end_in_a_terminal_and_are_whole_in_a_pipe():
    name = "model." * 20 + "weight"
    rows = [{"name": name, "count": 1, "size": 2, "density": 0.5, "bytes": 4, "norm": None}]
    narrow, wide = chart.lines(rows, 80)[1], chart.lines(rows, None)[1]
    assert len(narrow) <= 80 and narrow.startswith("…") and ".model.weight " in narrow
    assert wide.startswith(f"{name} ")


def test_bars_are_in_proportion_and_nothing_chosen_is_invisible():
    rows = [
        {"name": str(n), "count": n, "size": 10**6, "density": 0, "bytes": None, "norm": None}
        for n in (1, 500, 1000, 0)
    ]
    ends = [line.split()[-1] for line in chart.lines(rows, None)[1:]]
    assert ends[:3] == ["▏", "█" * 12, "█" * 24] and "█" not in ends[3]
    header = chart.lines(rows, None)[0].split()
    assert "bytes" not in header and "change" not in header


def model(layers, per_layer=16):
    names = [f"bert.encoder.layer.{i}.part{j // 4}.weight{j}" for i in range(layers) for j in range(per_layer)]
    return [{"name": name, "count": 1, "size": 2} for name in [*names, "classifier.weight"]]


@pytest.mark.parametrize(
    ("layers", "depth", "rows"), [(1, 6, 17), (2, 6, 33), (12, 4, 13), (24, 4, 25), (200, 3, 2)]
)
def test_a_deep_model_is_shown_layer_by_layer(layers, depth, rows):
    tensors = model(layers)
    assert chart.readable_depth(tensors) == depth
    assert len(chart.grouped(tensors, depth)) == rows


def test_many_flat_tensors_are_not_hidden():
    rows = [{"name": f"w{i}", "count": 1, "size": 2} for i in range(99)]
    assert chart.readable_depth(rows) == 1 and len(chart.grouped(rows, 1)) == 99
    assert chart.readable_depth([]) == 1
