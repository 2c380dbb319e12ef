"""The embedded tasks: real words by family, real digits by class."""

from collections import Counter

import numpy as np
import pytest

from pipeline.tasks.demo import digits, families, words


@pytest.fixture(scope="module")
def lexicon():
    return {name: table.to_pydict() for name, table in words().items()}


def test_no_family_lies_in_both_splits(lexicon):
    assert not set(lexicon["train"]["family"]) & set(lexicon["validation"]["family"])
    assert not set(lexicon["train"]["text"]) & set(lexicon["validation"]["text"])


def test_words_of_one_origin_are_on_one_side(lexicon):
    """Told by first letters alone, not by the code's own rule."""
    assert not {w[:5] for w in lexicon["train"]["text"] if len(w) > 4} & {
        w[:5] for w in lexicon["validation"]["text"] if len(w) > 4
    }
    side = {word: name for name, split in lexicon.items() for word in split["text"]}
    for kin in [
        ("paranoid", "paranoids"), ("kill", "killer", "killing"), ("love", "loving", "unloved"), ("sad", "sadly"),
        ("happy", "happiness", "unhappy"), ("safe", "unsafe", "safely"), ("agree", "disagree"), ("bad", "badly"),
    ]:  # fmt: skip
        assert len({side[word] for word in kin if word in side}) == 1, kin


def test_sizes_classes_and_words_are_as_stated(lexicon):
    rows = {name: len(split["text"]) for name, split in lexicon.items()}
    assert sum(rows.values()) == 7135
    assert 0.2 <= rows["validation"] / 7135 < 0.21
    for split in lexicon.values():
        counts = Counter(split["label"])
        assert set(counts) == {"negative", "positive"} and min(counts.values()) / sum(counts.values()) > 0.4
        assert all(word.isascii() and word.isalpha() and word.islower() for word in split["text"])
    labels = {
        word: label
        for split in lexicon.values()
        for word, label in zip(split["text"], split["label"], strict=True)
    }
    assert labels["paranoid"] == "negative" and labels["lovely"] == "positive"


def test_no_family_swallows_the_lexicon(lexicon):
    sizes = Counter(lexicon["train"]["family"]).most_common(1) + Counter(
        lexicon["validation"]["family"]
    ).most_common(1)
    assert max(count for _, count in sizes) < 100


def test_families_join_from_word_to_word():
    found = families(["happy", "happier", "unhappy", "unhappily", "sadness", "sad", "table"])
    assert len(set(found[:4].tolist())) == 1
    assert found[4] == found[5] and len(set(found.tolist())) == 3


def test_families_do_not_depend_on_the_order_of_words():
    listed = ["love", "loving", "unloved", "glove", "kill", "killdeer", "skill", "hope", "hopeful", "hopeless"]
    back = families(listed[::-1])[::-1]
    assert ((families(listed)[:, None] == families(listed)) == (back[:, None] == back)).all()


def test_digits_are_the_eight_by_eight_images():
    from sklearn.datasets import load_digits

    tables = digits()
    found = Counter()
    for table in tables.values():
        for pixels, label in zip(table["pixels"].to_pylist(), table["label"].to_pylist(), strict=True):
            found[pixels, label] += 1
    images, labels = load_digits(return_X_y=True)
    expected = Counter(
        (np.rint(image / 16 * 255).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(images, labels, strict=True)
    )
    assert found == expected
    held = Counter(tables["validation"]["label"].to_pylist())
    for label, count in Counter(labels.tolist()).items():
        assert held[label] == np.ceil(0.2 * count)
