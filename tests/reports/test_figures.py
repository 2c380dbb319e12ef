"""Figures: valid, deterministic svg that says in words what it shows."""

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from pipeline.reports.figures import all_figures, layout_figure, methods_figure, sweep_figure
from pipeline.reports.reading import load_results

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def results(demo):
    return load_results(demo)


def test_there_is_a_figure_for_all_there_is(results):
    names = [figure.name for figure in all_figures(results)]
    assert names == ["methods", "sweep-density", "sweep-examples", "layout-words", "curves"]


def test_nothing_measured_is_nothing_drawn(tmp_path):
    assert all_figures(load_results(tmp_path)) == []


def test_the_same_numbers_give_the_same_bytes_whatever_the_readers_settings(results):
    before = [figure.svg for figure in all_figures(results)]
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "svg.hashsalt": "other"}):
        assert [figure.svg for figure in all_figures(results)] == before
        assert matplotlib.rcParams["font.size"] == 20  # and leaves them alone


def test_each_figure_is_a_named_picture_without_date_or_network(results):
    for figure in all_figures(results):
        root = ElementTree.fromstring(figure.svg)
        assert root.tag == f"{SVG}svg" and root.get("role") == "img" and root.get("viewBox")
        named = {
            element.get("id"): element.text for element in root if element.tag in {f"{SVG}title", f"{SVG}desc"}
        }
        assert root.get("aria-labelledby").split() == list(named)
        assert list(named.values()) == [figure.title, figure.description]
        assert not re.search(r"<metadata|<script|20\d\d-\d\d-\d\d", figure.svg)
        assert not re.search(r'(href|src)="(?!#|data:)', figure.svg)


def test_ids_are_unique_across_figures_and_references_hold(results):
    ids, used = [], []
    for figure in all_figures(results):
        ids += re.findall(r'\bid="([^"]+)"', figure.svg)
        used += re.findall(r'href="#([^"]+)"', figure.svg) + re.findall(r"url\(#([^)]+)\)", figure.svg)
    assert len(ids) == len(set(ids)) and used and set(used) <= set(ids)


def test_the_description_has_the_numbers(results):
    said = methods_figure(results).description
    assert (
        "words: dense 92.0 ± 1.0, fish 91.0 ± 1.0, random 89.0 ± 1.0" in said
        and "digits: dense 98.0 ± 1.0" in said
    )
    assert sweep_figure(results, "density").description == "words, fish: 86.0 ± 1.0 at 0.1 %, 91.0 ± 1.0 at 0.5 %."


def test_layout_shares_by_hand(results):
    said = layout_figure(results, "words").description
    # fish: 6 of 10 in encoder.layer.10, 4 in the classifier, none of encoder.layer.2; all: 150, 50 and 200 of 400
    assert "fish: most in encoder.layer.10 (60 %), classifier (40 %);" in said
    assert "all parameters: most in classifier (50 %), encoder.layer.2 (38 %), encoder.layer.10 (12 %)" in said
    svg = layout_figure(results, "words").svg
    assert svg.index(">encoder.layer.2<") < svg.index(">encoder.layer.10<")  # the model's order
    assert layout_figure(results, "digits") is None


def test_a_method_without_a_score_is_shown_as_such(results):
    assert "no score" in methods_figure(results).svg
