"""Texts continued in batches, and bad arguments of generation."""

import functools

import numpy as np
import pytest

from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.generation.generate import generate, generate_texts
from tests.models.generation.test_generate import build

GOOD = {"prompts_BxP": [[1, 2], [3, 0]], "prompt_lengths_B": [2, 1], "max_new_tokens": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts_BxP": [[1, 2], [3]]}, "prompts_BxP: rows of unequal length"),
        ({"prompts_BxP": [1, 2]}, r"prompts_BxP of shape \(2,\): must be \[B, P\]"),
        ({"prompts_BxP": np.zeros((2, 0), int)}, r"prompts_BxP of shape \(2, 0\)"),
        ({"prompts_BxP": [[1.0, 2.0], [3.0, 4.0]]}, "prompts_BxP of type float64: must be integers"),
        ({"prompts_BxP": [[1, 31], [3, 0]]}, "prompts_BxP holds 31: must be from 0 to 30"),
        ({"prompt_lengths_B": [2]}, r"prompt_lengths_B of shape \(1,\): must be \(2,\)"),
        ({"prompt_lengths_B": [2, 0]}, "prompt_lengths_B holds 0: must be from 1 to 2"),
        ({"prompt_lengths_B": [3, 1]}, "prompt_lengths_B holds 3: must be from 1 to 2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be an integer from 1 on"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5: must be an integer"),
        ({"temperature": -1}, "temperature=-1: must be a finite number from 0 on"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": 1e-7}, "temperature=1e-07: must be 0 .greedy. or at least 1e-06"),
        ({"temperature": 1}, "seeds_B is missing: temperature=1 needs an integer for every row"),
        ({"temperature": 1, "seeds_B": 0}, r"seeds_B of shape \(\): must be \(2,\)"),
        ({"temperature": 1, "seeds_B": [0, -1]}, "seeds_B holds -1: must be from 0 to 4294967295"),
        ({"top_k": 0}, "top_k=0: must be an integer from 1 on"),
        ({"top_p": 0}, "top_p=0: must be above 0"),
        ({"top_p": 1.1}, "top_p=1.1: must be a finite number from 0 to 1"),
        ({"stop_tokens": 3}, r"stop_tokens of shape \(\): must be \[S\] or \[B, S\], where B is 2"),
        ({"stop_tokens": [[1], [2], [3]]}, r"stop_tokens of shape \(3, 1\)"),
        ({"pad_id": -1}, "pad_id=-1: must be an integer from 0 to 30"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change, message):
    model = build("qwen3")
    with pytest.raises(InputError, match=message) as error:
        generate(model, **(GOOD | change))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("bytes", texts=iter, cache_dir=tmp_path_factory.mktemp("tokenizer"))


TEXTS = ["The quick brown", "a", "fox jumps", "over the dog.", "é"]


def test_texts_are_continued_whatever_the_batches(tokenizer):
    model = build("llama3", vocab_size=257)
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95}
    continued = functools.partial(generate_texts, model, tokenizer, **options)
    texts = continued(TEXTS)
    assert continued(TEXTS, batch_size=2) == texts
    ids = tokenizer.encode_batch(TEXTS)
    assert continued([ids[3], TEXTS[1]], seeds=[3, 1]) == [texts[3], texts[1]]
    assert continued([]) == []

    padded, lengths = np.zeros((2, 16), int), [len(ids[2]), len(ids[0])]
    padded[0, : lengths[0]], padded[1, : lengths[1]] = ids[2], ids[0]
    tokens = generate(model, padded, lengths, seeds_B=[2, 0], stop_tokens=[256], **options).tokens
    assert tokenizer.decode(tokens[0]) == texts[2]
    tokens = np.asarray(tokens)[0].tolist()
    end = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    ended = continued([TEXTS[2], TEXTS[0]], seeds=[2, 0], stop_tokens=[tokens[end]])
    assert ended[0] == tokenizer.decode(tokens[:end])


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        (["a", ""], {}, r"prompts\[1\] is empty"),
        ("abc", {}, "prompts is one text: give a list"),
        (["a"], {"seeds": [1, 2]}, "2 seeds: must be as many as prompts, 1"),
        (["a"], {"batch_size": 0}, "batch_size=0: must be an integer from 1 on"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0"),
        ([[257]], {}, "prompts_BxP holds 257: must be from 0 to 256"),
    ],
)
def test_bad_texts_are_refused(tokenizer, prompts, change, message):
    model = build("llama3", vocab_size=257)
    with pytest.raises(InputError, match=message):
        generate_texts(model, tokenizer, prompts, **({"max_new_tokens": 1} | change))


def test_any_codec_will_do():
    class Numbers:
        stop_ids = (0,)

        def encode_prompts(self, texts):
            return [[int(word) for word in text.split()] for text in texts]

        def decode(self, ids):
            return " ".join(str(int(i)) for i in ids)

    model = build("qwen3")
    (text,) = generate_texts(model, Numbers(), ["3 1 4 1 5"], max_new_tokens=6)
    expected = generate(model, [[3, 1, 4, 1, 5]], [5], max_new_tokens=6, stop_tokens=[0])
    tokens = expected.tokens[0, : int(expected.lengths[0])].tolist()
    assert text == " ".join(str(token) for token in tokens if token)
