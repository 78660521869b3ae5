"""Generation against the full forward pass, transformers and NumPy; what a row must not depend on."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.models import decoder, parts
from dataflex_jax.models.config import LoraConfig
from dataflex_jax.models.generation import generate as generation
from dataflex_jax.models.generation.generate import generate
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from tests.models.make_golden import MODELS, random_params, torch_model

LENGTHS = np.array([12, 3, 9, 1])  # Mistral's window, 7, is passed before the first new token, and after it
STEPS = 40


@functools.cache
def build(name, **overrides):
    cfg = from_hf(MODELS[name], **({"dtype": "float32"} | overrides))
    model = jax.eval_shape(functools.partial(Model.random, cfg), jax.random.key(0))
    params, frozen = random_params(cfg, seed=0), None
    # With tied embeddings a token's own vector would outweigh what the blocks add to it: always the same next token.
    params["embed_tokens"]["embedding"] *= 0.2
    if cfg.lora is not None:
        rng = np.random.RandomState(1)
        model, frozen = model.training(parts.is_adapter), params
        params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype("f4"), model.params)
    filled = model.having(params, frozen)
    jax.tree.map(lambda array, shape: np.testing.assert_equal(array.shape, shape.shape), filled, model)
    return filled


@functools.cache
def prompts(padded_length=12):
    tokens = np.random.RandomState(2).randint(0, 31, (len(LENGTHS), padded_length))
    tokens[:, :12] = np.random.RandomState(3).randint(0, 31, (len(LENGTHS), 12))
    return tokens


@jax.jit
def log_probs_of(model, tokens):
    params = model.whole()
    hidden, _ = decoder.hidden_states(model.graphdef, params, tokens)
    return jax.nn.log_softmax((hidden @ decoder.output_weight(params)).astype(jnp.float32))


def assert_continues(generated, model, greedy, atol):
    """Every new token's log-probability is that of one pass over the whole text; greedy ones are the best there."""
    tokens, lengths, log_probs = map(np.asarray, generated)
    assert tokens.shape == log_probs.shape == (len(LENGTHS), STEPS)
    assert (lengths == STEPS).all()
    assert log_probs.dtype == np.float32
    texts = np.zeros((len(LENGTHS), prompts().shape[1] + STEPS), np.int32)
    for row, prompt, length, new in zip(texts, prompts(), LENGTHS, tokens, strict=True):
        row[: length + STEPS] = [*prompt[:length], *new]
    expected = np.asarray(log_probs_of(model, texts))
    expected = np.stack([row[n - 1 : n - 1 + STEPS] for row, n in zip(expected, LENGTHS, strict=True)])
    if greedy:
        np.testing.assert_array_equal(tokens, expected.argmax(-1))
    chosen = np.take_along_axis(expected, tokens[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(log_probs, chosen, rtol=0, atol=atol)
    assert len(np.unique(tokens)) > (2 if greedy else 20)


# Stop tokens that no row meets, so that the functions which are compiled serve several tests.
GREEDY = {"max_new_tokens": STEPS, "stop_tokens": [-1, -1]}
SAMPLED = GREEDY | {"temperature": 1.5, "seeds_B": np.arange(4)}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_the_full_forward_pass_at_every_step(name):
    model = build(name)
    assert_continues(generate(model, prompts(), LENGTHS, **GREEDY), model, True, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "overrides", "atol"),
    [
        ("qwen3", {}, 2e-5),
        ("mistral", {}, 2e-5),
        ("qwen2_untied", {"dtype": "bfloat16"}, 0.15),
        ("mistral", {"dtype": "bfloat16", "sliding_window": 14}, 0.15),  # the window is passed while generating
        ("llama3", {"lora": LoraConfig(rank=2)}, 2e-5),
    ],
)
def test_sampled_tokens_have_the_log_probabilities_of_the_full_forward_pass(name, overrides, atol):
    model = build(name, **overrides)
    assert_continues(generate(model, prompts(), LENGTHS, **SAMPLED), model, False, atol)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers_where_torch_is_installed(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = build(name)
    stops = [5, 11]
    tokens, lengths, _ = generate(model, prompts(), LENGTHS, **(GREEDY | {"stop_tokens": stops}))
    transformer = torch_model(MODELS[name], model.params).eval()
    padded = np.zeros_like(prompts())
    for row, prompt, length in zip(padded, prompts(), LENGTHS, strict=True):
        row[len(row) - length :] = prompt[:length]
    mask = np.arange(padded.shape[1]) >= padded.shape[1] - LENGTHS[:, None]
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    theirs = transformer.generate(torch.tensor(padded), attention_mask=torch.tensor(mask.astype(int)), **options)
    theirs = theirs[:, padded.shape[1] :].numpy()
    np.testing.assert_array_equal(np.asarray(tokens)[:, : theirs.shape[1]], theirs)
    assert lengths.max() == theirs.shape[1]


def test_two_sampled_tokens_have_the_models_joint_distribution():
    model = build("qwen2_untied")
    draws, temperature, top_k = 6000, 1.3, 3
    prompt = prompts()[:1]
    many = np.tile(prompt, (draws, 1))
    options = {"temperature": temperature, "top_k": top_k, "seeds_B": np.arange(draws)}
    tokens = np.asarray(generate(model, many, np.full(draws, 12), max_new_tokens=2, **options).tokens)

    def next_token(text):
        log_probs = np.asarray(log_probs_of(model, np.array([text])))[0, -1].astype(np.float64)
        best = np.argsort(-log_probs)[:top_k]
        weights = np.exp(log_probs[best] / temperature)
        return dict(zip(best.tolist(), weights / weights.sum(), strict=True))

    expected = {}
    for first, p in next_token([*prompt[0]]).items():
        expected |= {(first, second): p * q for second, q in next_token([*prompt[0], first]).items()}
    counts = dict.fromkeys(expected, 0)
    for pair in map(tuple, tokens.tolist()):
        counts[pair] += 1
    assert_binomial(counts, expected, draws)


def assert_binomial(counts, probabilities, draws):
    """Frequencies within 5 standard deviations, nothing outside the support and nothing of it missing."""
    assert counts.keys() == probabilities.keys()
    for event, p in probabilities.items():
        assert abs(counts[event] - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)) + 1e-9, (event, counts[event], p)


def warped(logits, temperature, top_k, top_p):
    """Probabilities after Hugging Face's temperature, top-k and top-p processors, of one row without ties."""
    scores = np.asarray(logits, np.float64) / temperature
    if top_k is not None:
        scores = np.where(scores < np.sort(scores)[-top_k], -np.inf, scores)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    if top_p is not None:
        ascending = np.argsort(probabilities, kind="stable")
        removed = np.cumsum(probabilities[ascending]) <= 1 - top_p
        removed[-1] = False
        probabilities[ascending[removed]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (1, None), (5, None), (12, None), (None, 0.3), (None, 0.9), (6, 0.75), (5, 1.0)]
)
def test_samplers_draw_from_the_distribution_of_numpy(monkeypatch, temperature, top_k, top_p):
    """`generate` on a stand-in for a model, whose logits are known."""
    logits = np.random.RandomState(4).standard_normal(12).astype(np.float32)
    logits[3] = -30.0
    monkeypatch.setattr(generation, "next_token_logits", lambda hidden, head: jnp.tile(logits, (len(hidden), 1, 1)))
    cfg = from_hf(MODELS["llama_biased"] | {"vocab_size": 12, "num_hidden_layers": 1}, dtype="float32")
    model = Model.random(cfg, jax.random.key(0))
    draws = 8000
    sampled = jax.jit(
        lambda seeds: generate(
            model,
            np.zeros((draws, 1), int),
            np.ones(draws, int),
            max_new_tokens=1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds_B=seeds,
        )
    )(np.arange(draws))
    expected = {i: p for i, p in enumerate(warped(logits, temperature, top_k, top_p)) if p > 1e-6}
    tokens, counts = np.unique(sampled.tokens, return_counts=True)
    assert_binomial(dict(zip(tokens.tolist(), counts.tolist(), strict=True)), expected, draws)
    # The model's own probabilities, whatever was drawn from.
    log_probs = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(sampled.log_probs[:, 0], log_probs[sampled.tokens[:, 0]], rtol=0, atol=1e-6)


def seeded(seeds, **options):
    samplers = {"temperature": 1.2, "top_k": 9, "top_p": 0.9}
    return {"max_new_tokens": 10, "seeds_B": np.array(seeds), **samplers, **options}


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_padding_does_not_matter(name):
    model = build(name)
    reference = generate(model, prompts(), LENGTHS, **seeded([7, 1, 4, 4]))
    padded = generate(model, prompts(25), LENGTHS, **seeded([7, 1, 4, 4]))
    garbage = np.where(np.arange(25) < LENGTHS[:, None], prompts(25), -100)
    unread = generate(model, garbage, LENGTHS, **seeded([7, 1, 4, 4]))
    for other in (padded, unread):
        np.testing.assert_array_equal(other.tokens, reference.tokens)
        np.testing.assert_allclose(other.log_probs, reference.log_probs, rtol=0, atol=1e-5)
    assert len(np.unique(reference.tokens)) > 8


def test_a_row_does_not_depend_on_the_others_or_on_its_place():
    model = build("qwen2_tied")
    together = generate(model, prompts(), LENGTHS, **seeded([7, 1, 4, 2**32 - 1]))
    # Under vmap this generator would give a row other bits in another batch.
    with jax.default_prng_impl("rbg"):
        apart = generate(model, prompts()[[3, 1]], LENGTHS[[3, 1]], **seeded([2**32 - 1, 1]))
    np.testing.assert_array_equal(apart.tokens, np.asarray(together.tokens)[[3, 1]])
    same_prompt = generate(model, prompts()[[0] * 4], LENGTHS[[0] * 4], **seeded([7, 8, 7, 9]))
    tokens = np.asarray(same_prompt.tokens)
    np.testing.assert_array_equal(tokens[[0, 2]], np.asarray(together.tokens)[[0, 0]])
    assert len(np.unique(tokens, axis=0)) == 3


@pytest.mark.parametrize(
    ("sizes", "num_rows", "change"),
    [
        ({"fsdp": 4, "tensor": 2}, 8, {}),
        ({"data": 4, "tensor": 2}, 3, {}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 4, {"temperature": 0}),
        pytest.param({"fsdp": 2, "tensor": 4}, 4, {}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_same_tokens(sizes, num_rows, change):
    model = build("qwen2_untied", vocab_size=32)
    rows = np.arange(num_rows) % 4
    options = seeded(range(num_rows), stop_tokens=[20, 3]) | change
    reference = generate(model, prompts()[rows], LENGTHS[rows], **options)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(model, param_shardings(mesh, model))
        result = generate(on_mesh, prompts()[rows], LENGTHS[rows], **options)
    np.testing.assert_array_equal(result.tokens, reference.tokens)
    np.testing.assert_array_equal(result.lengths, reference.lengths)
    np.testing.assert_allclose(result.log_probs, reference.log_probs, rtol=0, atol=1e-5)
    assert all(array.is_fully_replicated for array in result)


def test_the_cache_is_updated_in_place_and_stays_on_its_devices():
    model = build("qwen3", num_hidden_layers=8)
    slots = 1031
    cache_bytes = 2 * 8 * (16 // 8) * 2 * slots * 8 * 4  # keys and values, layers, rows a device, heads, ..., channels
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(model, param_shardings(mesh, model))
        call = functools.partial(generate, max_new_tokens=slots)
        compiled = jax.jit(call).lower(on_mesh, np.zeros((16, 1), int), np.ones(16, int)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.6 * cache_bytes
    assert re.search(rf"f32\[8,2,2,{slots},8\]\S* dynamic-update-slice", compiled.as_text())
    assert not re.search(rf"[\[,]{slots},8\]\S* (all-gather|all-to-all|all-reduce|collective)", compiled.as_text())


def test_rows_end_at_their_stop_tokens():
    model = build("mistral")
    options = SAMPLED | {"pad_id": 30}
    unstopped = generate(model, prompts(), LENGTHS, **options)
    free = np.asarray(unstopped.tokens)

    def assert_stopped(generated, stops):
        for row in range(4):
            ends = np.flatnonzero(np.isin(free[row], stops[row]))
            length = ends[0] + 1 if ends.size else STEPS
            assert generated.lengths[row] == length
            np.testing.assert_array_equal(generated.tokens[row, :length], free[row, :length])
            np.testing.assert_array_equal(generated.tokens[row, length:], 30)
            np.testing.assert_allclose(
                generated.log_probs[row, :length], unstopped.log_probs[row, :length], rtol=0, atol=1e-5
            )
            np.testing.assert_array_equal(generated.log_probs[row, length:], 0)

    shared = free[[0, 1], [5, 9]]
    generated = generate(model, prompts(), LENGTHS, **(options | {"stop_tokens": shared}))
    assert_stopped(generated, [shared] * 4)
    own = np.array([[free[0, 0], -1], [free[1, 4], free[1, 2]], [-1, -1], [-1, free[3, 7]]])
    generated = generate(model, prompts(), LENGTHS, **(options | {"stop_tokens": own}))
    assert_stopped(generated, own)
    assert generated.lengths[0] == 1
    assert generated.lengths[2] == STEPS


def test_the_loop_ends_when_all_rows_have_stopped(monkeypatch):
    model = build("mistral")
    free = np.asarray(generate(model, prompts(), LENGTHS, **GREEDY).tokens)
    widths = []

    def counted(graphdef, params, tokens, *args, **kwargs):
        jax.debug.callback(lambda: widths.append(tokens.shape[1]))
        return run_blocks(graphdef, params, tokens, *args, **kwargs)

    run_blocks = generation.run_blocks
    monkeypatch.setattr(generation, "run_blocks", counted)
    # A length of its own, so that it is not compiled yet.
    generate(model, prompts(), LENGTHS, max_new_tokens=STEPS + 1, stop_tokens=free[:, 3:5])
    jax.effects_barrier()
    longest = max(next(i for i, token in enumerate(row) if token in row[3:5]) for row in free)
    assert widths == [12] + [1] * longest


def test_values_of_samplers_seeds_and_stops_compile_nothing_new(monkeypatch):
    model = build("llama_biased")
    traced = []

    def counted(*args, **kwargs):
        traced.append(args)
        return next_tokens(*args, **kwargs)

    next_tokens = generation.next_tokens
    monkeypatch.setattr(generation, "next_tokens", counted)
    options = {"max_new_tokens": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.8, "seeds_B": np.arange(4)}
    options |= {"stop_tokens": [3], "pad_id": 1}
    generate(model, prompts(), LENGTHS, **options)
    assert len(traced) == 2  # before the loop and in it
    for change in ({"temperature": 2}, {"top_k": 8}, {"top_p": 0.1}, {"seeds_B": np.arange(4) + 9}, {"pad_id": 2}):
        generate(model, prompts(), LENGTHS[::-1].copy(), **(options | change | {"stop_tokens": [9]}))
    assert len(traced) == 2


def test_a_vanishing_temperature_is_greedy():
    model = build("qwen3")
    greedy = generate(model, prompts(), LENGTHS, **GREEDY, temperature=0, top_k=3, top_p=0.5)
    sampled = generate(model, prompts(), LENGTHS, **(SAMPLED | {"temperature": 1e-6}))
    np.testing.assert_array_equal(sampled.tokens, greedy.tokens)
