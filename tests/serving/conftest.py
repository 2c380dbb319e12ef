"""Tuned folders over one tiny BERT; tests must not change them."""

import contextlib
import os

import pytest

from tests.serving.folders import make_tuned


@pytest.fixture(scope="session")
def reviews(bert, tmp_path_factory):
    """A classifier of two classes.

    Returns:
        Its folder and its model.
    """
    folder = tmp_path_factory.mktemp("tuned") / "reviews"
    return folder, make_tuned(folder, bert)


@pytest.fixture(scope="session")
def others(bert, tmp_path_factory):
    """Over the same base: another classifier of two, one of three classes that reads pairs, and a regression.

    Returns:
        Name -> folder and model.
    """
    root = tmp_path_factory.mktemp("others")
    return {
        "again": (root / "again", make_tuned(root / "again", bert, seed=2)),
        "pairs": (root / "pairs", make_tuned(root / "pairs", bert, ("x", "y", "z"), ("one", "two"), 3, head=5)),
        "stars": (root / "stars", make_tuned(root / "stars", bert, (), seed=4, label="stars", head=6)),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A project of its own, with its own store."""
    root = tmp_path_factory.mktemp("project")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root / 'mlflow.db'}"
    with contextlib.chdir(root):
        yield root
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before
