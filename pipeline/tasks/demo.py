"""The embedded tasks, from packages that pip installs: `words` and `digits`."""

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.tasks.draws import split_by_class, split_by_group
from pipeline.tasks.sources import package_file

_HELD_OUT = 0.2
_WORD = re.compile(r"(?=.*[aeiouy])[a-z]{3,}")
_SUFFIXES = sorted(
    """s es ed d er r ers rs ing ings est st ly y ily ness nesses ment ful fully fulness less able ably ability
    ible tion ion ions ive ous al ism isms ist ists ize ise ic ical ity ance ant or ors ory ish ier iest ies iness
    ied ying ie some ship dom e en ens ened ate ates age th ling ee ess""".split(),
    key=lambda suffix: (-len(suffix), suffix),
)
_PREFIXES = ("un", "dis", "mis", "in", "im", "ir", "il", "non", "over", "under", "re")


def words() -> dict[str, pa.Table]:
    """Positive and negative English words of the VADER lexicon (Hutto & Gilbert 2014), split by word family.

    Each entry was rated from -4 to 4 by ten people; the label is the sign of the mean. Kept are entries of three
    or more letters a-z with a vowel: no emoticons, phrases or most acronyms. An entry listed twice counts with the
    mean of its ratings. One fifth of the words, whole families at a time, is the validation split.

    Returns:
        ``train`` and ``validation`` with columns ``text``, ``label`` (negative, positive) and ``family`` (int64).

    Raises:
        DataError: if vaderSentiment is not installed, or its lexicon is not as expected.
    """
    path = package_file("vaderSentiment", "vader_lexicon.txt", "data.source")
    ratings: dict[str, list[float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry = line.split("\t")
        try:
            if _WORD.fullmatch(entry[0]):
                ratings.setdefault(entry[0], []).append(float(entry[1]))
        except (IndexError, ValueError):
            raise DataError(f"{path}: line {number} holds no rating; expected word, mean rating, ...") from None
    signs = {word: sum(means) for word, means in sorted(ratings.items()) if sum(means) != 0}
    family = families(list(signs))
    table = pa.table({
        "text": pa.array(list(signs)),
        "label": pa.array(["positive" if sign > 0 else "negative" for sign in signs.values()]),
        "family": pa.array(family),
    })
    train, validation = split_by_group(family, _HELD_OUT, 0)
    return {"train": table.take(train), "validation": table.take(validation)}


def families(words: list[str]) -> np.ndarray:
    """Group words that share an origin: ``paranoid`` and ``paranoids``, ``happy`` and ``unhappily``.

    Two words are of one family if they share the first five letters, or one is the other, or its first four
    letters, behind a prefix (un-, dis-, ...) or before a suffix (-s, -ing, ...), and so on from word to word.
    This joins too much (``compel`` and ``compete``) rather than too little: a family lies in one split, so
    nothing of a held-out word was seen in training.

    Returns:
        int64 [len(words)]: each word's family, numbered by first appearance.
    """
    known = set(words)
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for word in words:
        for key in _kin(word, known):
            parent[root(key)] = root(word)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(root(word), len(numbers)) for word in words], dtype=np.int64)


def _kin(word: str, known: set[str]) -> Iterator[str]:
    """Keys that a word shares with its family: other words, or five letters and a hyphen."""
    yield word
    if len(word) >= 5:
        yield word[:5] + "-"
    if word[:4] in known:
        yield word[:4]
    for suffix in _SUFFIXES:
        stem = word.removesuffix(suffix)
        if stem != word and len(stem) >= 2:
            single = stem[:-1] if len(stem) > 3 and stem[-1] == stem[-2] else stem
            yield from (known & {stem, stem + "e", stem + "y", single}) - {word}
    for prefix in _PREFIXES:
        rest = word.removeprefix(prefix)
        if rest != word and len(rest) >= 4 and rest in known:
            yield rest


def digits() -> dict[str, pa.Table]:
    """scikit-learn's 1,797 handwritten digits, 8x8, scaled from 0..16 to 0..255; one fifth of each class held out.

    Returns:
        ``train`` and ``validation`` with columns ``pixels`` (64 bytes, [1, 8, 8]) and ``label`` (int64).
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8)
    table = pa.table({
        "pixels": pa.array([row.tobytes() for row in pixels], pa.binary(64)),
        "label": pa.array(labels.astype(np.int64)),
    })
    train, validation = split_by_class(labels, _HELD_OUT, 0)
    return {"train": table.take(train), "validation": table.take(validation)}
