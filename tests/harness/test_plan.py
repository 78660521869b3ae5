"""What is read for many requests: texts with their questions, and groups of texts that begin alike."""

import itertools
import random

import pytest

from dataflex_jax.harness import plan
from dataflex_jax.harness.plan import Question, bucket, groups_of, texts_of


def _random_requests(rng):
    def tokens(most):
        return tuple(rng.randint(0, 1) for _ in range(rng.randint(1, most)))

    return [(tokens(6), tokens(3)) for _ in range(rng.randint(1, 12))]


def _most_saved(texts):
    """The tokens that the best groups save, by the definition: a branch as one group, or its own branches."""
    if len(texts) == 1:
        return 0
    depth = _shared(texts)
    cuts = [0, *(i for i in range(1, len(texts)) if _shared(texts[i - 1 : i + 1]) == depth), len(texts)]
    branches = [texts[start:stop] for start, stop in itertools.pairwise(cuts)]
    return max((len(texts) - 1) * depth, sum(map(_most_saved, branches)))


def _shared(texts):
    most = min(min(text.free, len(text.tokens)) for text in texts)
    return next((i for i in range(most) if len({text.tokens[i] for text in texts}) > 1), most)


@pytest.mark.parametrize("seed", range(100))
def test_groups_save_the_most_and_never_share_what_is_asked_about(seed, monkeypatch):
    monkeypatch.setattr(plan, "_WORTH", 0)
    requests = _random_requests(random.Random(seed))
    texts = texts_of(requests, 5)
    groups = groups_of(texts)
    assert [text for group in groups for text in group.texts] == texts
    for group in groups:
        assert len({text.tokens[: group.shared] for text in group.texts}) == 1
        assert all(text.free >= group.shared for text in group.texts)
    assert sum((len(group.texts) - 1) * group.shared for group in groups) == _most_saved(texts)
    # Every request is asked once, of the tokens that the harness would read for it.
    asked = {question.request: (text, question) for text in texts for question in text.questions}
    assert sorted(asked) == list(range(len(requests)))
    for number, (context, continuation) in enumerate(requests):
        text, question = asked[number]
        read = (context + continuation)[-6:-1]
        assert text.tokens[: len(read)] == read
        assert (text.tokens + (None,) * 9)[question.first + 1 :][: len(continuation) - 1] == continuation[:-1]
        assert question.first + len(question.labels) == len(read)


def test_choices_of_one_token_are_one_text():
    texts = texts_of([((1, 2, 3), (choice,)) for choice in (7, 8)] + [((1, 2, 3), (7, 9))], 100)
    assert [text.tokens for text in texts] == [(1, 2, 3, 7)]
    assert sorted(texts[0].questions) == [Question(0, 2, (7,)), Question(1, 2, (8,)), Question(2, 2, (7, 9))]


def test_a_group_must_be_worth_its_own_pass():
    def shared(length):
        contexts = [(*range(length), 100 + i) for i in range(2)]
        return [group.shared for group in groups_of(texts_of([(context, (1,)) for context in contexts], 500))]

    assert shared(20) == [0, 0]
    assert shared(200) == [200]


def test_no_requests_are_no_groups():
    assert groups_of(texts_of([], 5)) == []


def test_buckets_are_few_and_waste_little():
    sizes = [bucket(n) for n in range(1, 2049)]
    assert sizes == sorted(sizes)
    assert all(n <= size < max(17, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 15
