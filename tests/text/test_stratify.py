"""The order of documents: every beginning has each kind of text in the whole's shares."""

import random
from itertools import accumulate

import pytest
from threadpoolctl import threadpool_limits

from moefy.text import stratify
from moefy.text.stratify import spread

LETTERS = {"prose": "etaoinsh", "code": "()=_:.[]", "numbers": "01234567"}
SHARES = {"prose": 140, "code": 40, "numbers": 20}


def corpus(seed=0, least=200, most=400):
    """Shuffled documents, each with the name of its kind; only their letters tell it."""
    draw = random.Random(seed)
    found = [
        (name, "".join(draw.choices(LETTERS[name] + " ", k=draw.randint(least, most))))
        for name, num in SHARES.items()
        for _ in range(num)
    ]
    draw.shuffle(found)
    return found


def worst(order, found, most=10_000):
    """How far a kind is from its share of any beginning, in documents of the longest."""
    sizes = {name: [min(len(t), most) * (kind == name) for kind, t in found] for name in SHARES}
    total = sum(map(sum, sizes.values()))
    longest = max(map(max, sizes.values()))
    done = list(accumulate(min(len(found[n][1]), most) for n in order))
    off = 0.0
    for size in sizes.values():
        have = accumulate(size[n] for n in order)
        off = max(off, *(abs(h - d * sum(size) / total) for h, d in zip(have, done, strict=True)))
    return off / longest


@pytest.mark.parametrize("seed", range(4))
def test_every_beginning_has_all_kinds_shares(seed):
    found = corpus(seed)
    order = spread([text for _, text in found], 10_000)
    assert sorted(order) == list(range(len(found)))
    assert worst(order, found) < 1.5
    assert worst(range(len(found)), found) > 2  # the shuffled order alone does not do it


def test_kinds_of_long_documents_have_their_share_of_characters():
    found = [(name, text * (5 if name == "code" else 1)) for name, text in corpus()]
    texts = [text for _, text in found]
    assert worst(spread(texts, 10_000), found) < 1.5
    assert worst(spread(texts, 300), found, most=300) < 1.5


def test_within_a_kind_the_order_stays():
    texts = [f"{'word ' * 50}{n}" for n in range(20)] + [f"{'012() ' * 50}{n}" for n in range(20)]
    order = spread(texts, 10_000)
    kind, _ = stratify._kinds(texts)
    for number in range(stratify.KINDS):
        members = [n for n in order if kind[n] == number]
        assert members == sorted(members)


def test_few_documents_stay_as_they_are():
    texts = [text for _, text in corpus()][: 2 * stratify.KINDS - 1]
    assert spread(texts, 10_000) == list(range(len(texts)))
    assert spread([], 10_000) == []


@pytest.mark.parametrize("texts", [["same"] * 50, ["ab"] * 50, ["x"] * 25 + ["ab"] * 25])
def test_alike_and_short_documents_are_no_fault(texts):
    assert sorted(spread(texts, 10_000)) == list(range(50))


def test_threads_change_nothing():
    texts = [text[:60] for seed in range(16) for _, text in corpus(seed)]
    orders = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            orders.append(spread(texts, 10_000))
    assert orders[0] == orders[1] == orders[2]


def test_kinds_are_found_from_a_sample(monkeypatch):
    fitted = []

    class Fit(stratify.MiniBatchKMeans):
        def fit(self, rows):
            fitted.append(rows.shape[0])
            return super().fit(rows)

    monkeypatch.setattr(stratify, "MiniBatchKMeans", Fit)
    monkeypatch.setattr(stratify, "SAMPLE", 60)
    found = corpus()
    assert worst(spread([text for _, text in found], 10_000), found) < 2
    assert fitted == [50]  # every fourth of 200


def test_text_without_weight_is_no_fault():
    assert sorted(spread([""] * 40, 100)) == list(range(40))
    assert sorted(spread(["some words"] * 40, 0)) == list(range(40))
