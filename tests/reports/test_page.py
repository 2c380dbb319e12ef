"""The page: one file, no network, everything escaped, nothing invented, the same bytes each time."""

import re
from html.parser import HTMLParser

import pytest

from pipeline.errors import StorageError
from pipeline.reports.page import summary, write_report
from pipeline.reports.reading import load_results


class Reader(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = {"meta", "br", "link", "img", "input", "hr", "path", "use", "image"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


@pytest.fixture
def page(demo, tmp_path):
    return write_report(demo, tmp_path / "out", "demo")[0].read_text()


def test_the_report_is_all_that_it_lists(demo, tmp_path):
    out = tmp_path / "deep" / "out"
    files = write_report(demo, out, "demo")
    assert files[0] == out / "index.html" and len(files) == len(set(files))
    assert sorted(files) == sorted(f for f in out.rglob("*") if f.is_file())
    assert {f.relative_to(out).as_posix() for f in files} >= {
        "tables/main.csv", "tables/main.md", "tables/differences.csv", "figures/methods.svg",
    }  # fmt: skip


def test_the_same_metrics_give_the_same_bytes(demo, tmp_path):
    one, two = (write_report(demo, tmp_path / name, "demo") for name in ("a", "b"))
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    assert str(tmp_path).encode() not in b"".join(f.read_bytes() for f in one)


def test_the_page_fetches_nothing(page):
    for tag, attributes in read(page).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert re.match(r"#|data:|tables/[\w-]+\.csv$", attributes.get(name) or "#")
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_the_page_can_be_found_ones_way_in(page):
    reader = read(page)
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    links = [a["href"][1:] for t, a in reader.tags if t == "a" and a.get("href", "").startswith("#")]
    assert len(ids) == len(set(ids)) and links and set(links) <= set(ids)
    assert ("html", {"lang": "en"}) in reader.tags
    tables = sum(tag == "table" for tag, _ in reader.tags)
    assert tables >= 6 and sum(tag == "thead" for tag, _ in reader.tags) == tables
    assert all("scope" in a for t, a in reader.tags if t == "th")
    assert all("role" in a and "aria-labelledby" in a for t, a in reader.tags if t == "svg")


def test_the_page_holds_every_number_and_its_source(page):
    for text in ("91.0 ± 1.0", "<strong>91.0 ± 1.0</strong>", "ab" * 16, "cd" * 16, "fish0", "seeds 0, 1, 2"):
        assert text in page
    assert "fishmask profile use demo" in page and "scored on 1,400 validation rows" in page


def test_text_from_metrics_and_profile_is_escaped(metrics, tmp_path):
    evil = "<script>alert('x')</script>&\""
    metrics.train(
        f"t{evil[:8]}",
        "fish",
        [0.5, 0.6, 0.7],
        data={"rows": {evil: 3}, "remark": evil, "digest": evil, "source": evil},
    )
    metrics.folder.joinpath("score").mkdir()
    metrics.write("fetch", "x", {"note": evil})
    html = write_report(metrics.folder, tmp_path / "out", evil)[0].read_text()
    assert "<script" not in html
    assert evil in "".join(read(html).text)


def test_missing_cells_are_dashes_and_missing_parts_are_absent(metrics, tmp_path):
    metrics.train("words", "fish", [0.9, 0.9, 0.9])
    metrics.train("digits", "dense", [0.9, 0.9, 0.9])
    html = write_report(metrics.folder, tmp_path / "out", "demo")[0].read_text()
    assert html.count("<td>–</td>") >= 10
    assert 'id="sweeps"' not in html and 'id="masks"' not in html
    assert "On digits fish has no score yet; cells that have one: 1." in html


def test_a_project_without_metrics_says_so(tmp_path):
    files = write_report(tmp_path / "metrics", tmp_path / "out", "demo")
    assert "Nothing was trained yet" in files[0].read_text()


def test_the_summary_is_computed(demo, metrics):
    words = next(s for s in summary(load_results(demo)) if s.startswith("On words"))
    assert words == (
        "On words (accuracy, %) fish trains 0.5 % of the parameters and reaches 91.0 ± 1.0 (mean ± SD over 3 "
        "seeds), training all parameters 92.0 ± 1.0 (fish −1.00, 95 % interval −1.00 to −1.00), random masks of "
        "the same size 89.0 ± 1.0 (fish +2.00, 95 % interval +1.00 to +3.00). Its artifact takes 1.1 kB, a dense "
        "checkpoint 800 kB (727 times as much)."
    )
    metrics.train("words", "random", [0.90, 0.92, 0.91])
    words = next(s for s in summary(load_results(demo)) if s.startswith("On words"))
    assert "not told apart" in words


def test_a_folder_that_cannot_be_made_is_one_line(demo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the report's folder"):
        write_report(demo, tmp_path / "file" / "out", "demo")
