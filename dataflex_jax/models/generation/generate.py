"""Text from a decoder: every prompt is read in one pass, then one token a row at a time until all rows have stopped.

Prompts are padded on the right: padding comes after everything that a causal mask shows, so that the first pass is the
training pass and every token keeps its own position. New tokens overwrite the padding's slots in the cache.
"""

import functools
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.errors import InputError
from dataflex_jax.models import layout
from dataflex_jax.models.attention import causal_attention
from dataflex_jax.models.decoder import Params, output_weight, run_blocks
from dataflex_jax.models.generation import kv_cache as kv
from dataflex_jax.models.generation.sampling import next_tokens
from dataflex_jax.models.loss import next_token_logits
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import (
    BATCH_AXES,
    constrain,
    gather_weight,
    map_rows,
    rows_are_split,
    weights_are_split,
)

MIN_TEMPERATURE = 1e-6
_MIN_PADDED_LENGTH = 16


class Codec(Protocol):
    """Texts to token ids and back; a tokenizer is one."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """The tokens at which a text or a turn ends."""

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with what documents begin with."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""


class Generation(NamedTuple):
    """What `generate` returns; on a mesh, whole on every device.

    Attributes:
        tokens: the new tokens of each row, its stop token included; pad_id after it.
        lengths: how many they are, from 1 to N.
        log_probs: float32 nats, log softmax(logits)[token]: of the model itself, before temperature, top k and top p; 0
            where there is no token.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    log_probs: Float[Array, "B N"]


def generate(
    model: Model,
    prompts_BxP: ArrayLike,
    prompt_lengths_B: ArrayLike,
    *,
    max_new_tokens: int,
    seeds_B: ArrayLike | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: ArrayLike = (),
    pad_id: int = 0,
) -> Generation:
    """Continues every prompt, greedily or by sampling.

    A row's tokens depend on its prompt, its seed and the samplers: not on the other rows, its place among them, the
    amount or content of the padding, or the mesh (up to the rounding of matmuls whose shapes these change).

    Compiled once per shapes of the arguments, `max_new_tokens` and which of the samplers are on (for top_k: per power
    of two); may be called inside `jax.jit`. Weights that are stored in another dtype are cast to the compute dtype
    first, as a second copy. Under FSDP each layer's weights are gathered at every token: to generate much, hold them on
    a mesh without "fsdp" where they fit.

    Args:
        model: its adapters are used as they are, without dropout; split over the mesh that is set, if any.
        prompts_BxP: token ids, each row's prompt first, then padding of any content.
        prompt_lengths_B: tokens of each prompt, from 1 to P.
        max_new_tokens: N, at least 1.
        seeds_B: of each row's draws, integers in [0, 2^32); needed where the temperature is not 0.
        temperature: 0: greedy; else the logits are divided by it.
        top_k: draw from this many most likely tokens; None: from all.
        top_p: draw from the fewest of these whose probabilities sum to at least this, in (0, 1]; None: from all.
            Without top_k the vocabulary is sorted at every token.
        stop_tokens: ids [S] after any of which a row ends, or [B, S]: each row's own, filled up with negative numbers.
        pad_id: what fills a row after its stop token.

    Raises:
        InputError: an argument outside its range. What arrays on devices contain is not read.
    """
    vocab_size = model.config.vocab_size
    prompts_BxP = _integers("prompts_BxP", prompts_BxP)
    if prompts_BxP.ndim != 2 or 0 in prompts_BxP.shape:
        raise InputError(f"prompts_BxP of shape {prompts_BxP.shape}: must be [B, P] with at least one row and token")
    num_rows, padded_length = prompts_BxP.shape
    prompt_lengths_B = _integers("prompt_lengths_B", prompt_lengths_B, (num_rows,), (1, padded_length))
    if all(isinstance(array, np.ndarray) for array in (prompts_BxP, prompt_lengths_B)):
        read = prompts_BxP[np.arange(padded_length) < prompt_lengths_B[:, None]]
        _check_range("prompts_BxP", read, (0, vocab_size - 1))
    stop_tokens = _integers("stop_tokens", stop_tokens)
    if stop_tokens.ndim != 1 and (stop_tokens.ndim != 2 or stop_tokens.shape[0] != num_rows):
        raise InputError(f"stop_tokens of shape {stop_tokens.shape}: must be [S] or [B, S], where B is {num_rows}")
    _check_number("max_new_tokens", max_new_tokens, numbers.Integral, 1, math.inf)
    _check_number("pad_id", pad_id, numbers.Integral, 0, vocab_size - 1)
    _check_number("temperature", temperature, numbers.Real, 0, math.inf)
    if 0 < temperature < MIN_TEMPERATURE:
        raise InputError(f"temperature={temperature}: must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    if top_k is not None:
        _check_number("top_k", top_k, numbers.Integral, 1, math.inf)
    if top_p is not None:
        _check_number("top_p", top_p, numbers.Real, 0, 1)
        if top_p == 0:
            raise InputError("top_p=0: must be above 0; for the most likely token set temperature to 0")
    if temperature == 0:
        seeds_B = temperature = top_k = top_p = None
    elif seeds_B is None:
        raise InputError(f"seeds_B is missing: temperature={temperature} needs an integer for every row")
    else:
        seeds_B = _integers("seeds_B", seeds_B, (num_rows,), (0, 2**32 - 1)).astype(np.uint32)
    # Python's numbers: of one type each, they compile nothing new.
    temperature, top_p = (None if number is None else float(number) for number in (temperature, top_p))
    top_k = None if top_k is None or top_k >= vocab_size else int(top_k)
    return _generate(
        model,
        prompts_BxP,
        prompt_lengths_B,
        seeds_B,
        stop_tokens,
        int(pad_id),
        (temperature, top_k, top_p),
        max_new_tokens=int(max_new_tokens),
        candidates=None if top_k is None else min(vocab_size, 1 << (top_k - 1).bit_length()),
    )


def generate_texts(
    model: Model,
    codec: Codec,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    batch_size: int = 32,
) -> list[str]:
    """The text with which the model continues each prompt, without the stop token.

    Args:
        model: as in `generate`.
        codec: the model's tokenizer.
        prompts: each a text, or token ids where it holds special tokens, as a chat template's.
        max_new_tokens: as in `generate`.
        seeds: one a prompt; None: 0, 1, 2 and so on.
        temperature: as in `generate`.
        top_k: as in `generate`.
        top_p: as in `generate`.
        stop_tokens: ids; None: the codec's `stop_ids`, its end of text and of a turn.
        batch_size: prompts at a time, those of like length together; few shapes are compiled.

    Raises:
        InputError: an empty prompt, or as in `generate`.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one text: give a list of them")
    encoded = iter(codec.encode_prompts([prompt for prompt in prompts if isinstance(prompt, str)]))
    ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    for i, prompt in enumerate(ids):
        if len(prompt) == 0:
            raise InputError(f"prompts[{i}] is empty: give at least one token")
    _check_number("batch_size", batch_size, numbers.Integral, 1, math.inf)
    seeds = range(len(ids)) if seeds is None else seeds
    if len(seeds) != len(ids):
        raise InputError(f"{len(seeds)} seeds: must be as many as prompts, {len(ids)}")
    stops = np.array(codec.stop_ids if stop_tokens is None else stop_tokens)
    num_rows = min(int(batch_size), _power_of_two(len(ids)))
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(ids), num_rows):
        chosen = by_length[start : start + num_rows]
        # A partial batch is filled up with its last row again, which ends when that row does.
        rows = chosen + chosen[-1:] * (num_rows - len(chosen))
        lengths = np.array([len(ids[i]) for i in rows])
        padded = np.zeros((num_rows, max(_MIN_PADDED_LENGTH, _power_of_two(lengths.max()))), np.int32)
        for row, i in zip(padded, rows, strict=True):
            row[: len(ids[i])] = ids[i]
        generation = generate(
            model,
            padded,
            lengths,
            max_new_tokens=max_new_tokens,
            seeds_B=np.array([seeds[i] for i in rows]),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stops,
        )
        tokens, lengths = jax.device_get((generation.tokens, generation.lengths))
        for i, row, length in zip(chosen, tokens, lengths, strict=False):
            ended = row[length - 1] in stops
            texts[i] = codec.decode(row[: length - int(ended)])
    return [texts[i] for i in range(len(ids))]


class _State(NamedTuple):
    """The loop's, after `step` new tokens; `stopped`: the rows that have had a stop token."""

    step: Int[Array, ""]
    generation: Generation
    stopped: Bool[Array, " B"]
    caches: kv.KVCache | tuple[kv.KVCache, ...]  # of all layers, or of each


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "candidates"))
def _generate(
    model, prompts_BxP, prompt_lengths_B, seeds_B, stop_tokens, pad_id, samplers, *, max_new_tokens, candidates
):
    cfg, graphdef = model.config, model.graphdef
    whole = model.whole()
    params, layers = _in_compute_dtype(whole, jnp.dtype(cfg.dtype)), None
    # A layer's weights out of all layers' are a copy, which costs more than their products with a token a row. Where
    # weights are gathered, that is one anyway, and without the scan all layers' would be gathered at once.
    if not weights_are_split():
        layers = _layers_apart(params["layers"], cfg.num_hidden_layers)
        # The pass over the prompts casts a layer's weights as training does: so there is one copy of all.
        params = params | {"layers": whole["layers"]}
    head = gather_weight(output_weight(params), jnp.dtype(cfg.dtype), ("fsdp", "tensor"))
    num_rows, padded_length = prompts_BxP.shape

    choose = functools.partial(_choose, candidates=candidates)
    if rows_are_split(num_rows):
        # Else the sort of a row's logits would be split or repeated over devices.
        rows = P(BATCH_AXES)
        choose = map_rows(choose, (rows, rows, P(), P()), (rows, rows))

    def append(state: _State, hidden: Float[Array, "B 1 D"]) -> _State:
        """The state with the token that `hidden` predicts."""
        logits = next_token_logits(hidden, head)[:, 0]
        chosen, log_probs = choose(logits, seeds_B, state.step, samplers)
        done = state.generation
        generation = Generation(
            tokens=done.tokens.at[:, state.step].set(jnp.where(state.stopped, pad_id, chosen)),
            lengths=done.lengths + ~state.stopped,
            log_probs=done.log_probs.at[:, state.step].set(jnp.where(state.stopped, 0.0, log_probs)),
        )
        stopped = state.stopped | jnp.any(chosen[:, None] == stop_tokens, axis=-1)
        return _State(state.step + 1, generation, stopped, state.caches)

    def read_prompts(cache, layer, queries, keys, values):
        attended = causal_attention(
            queries, keys, values, sliding_window=cfg.sliding_window, implementation=cfg.attention
        )
        return attended, kv.write_prompts(cache, layer, keys, values, prompt_lengths_B)

    def step(state: _State) -> _State:
        """Reads the last token and appends the next."""
        positions_B = prompt_lengths_B + state.step - 1

        def read_token(caches, layer, queries, keys, values):
            if layers is None:
                caches = kv.write_tokens(caches, layer, keys, values, positions_B)
                return kv.attend(caches, layer, queries, positions_B), caches
            own = kv.write_tokens(caches[layer], 0, keys, values, positions_B)
            return kv.attend(own, 0, queries, positions_B), (*caches[:layer], own, *caches[layer + 1 :])

        last = jax.lax.dynamic_slice_in_dim(state.generation.tokens, state.step - 1, 1, axis=1)
        hidden, caches, *_ = run_blocks(
            graphdef, params, last, positions_B[:, None], read_token, state.caches, layers=layers
        )
        return append(state._replace(caches=caches), hidden)

    # The last new token is not read, so it needs no slot.
    cache = kv.empty(cfg, num_rows, padded_length + max_new_tokens - 1)
    places = jnp.arange(padded_length)[None]
    prompts_BxP = jnp.where(places < prompt_lengths_B[:, None], prompts_BxP, 0)
    hidden, cache, *_ = run_blocks(graphdef, params, prompts_BxP, places, read_prompts, cache)
    last = jnp.take_along_axis(hidden, prompt_lengths_B[:, None, None] - 1, axis=1)
    nothing = Generation(
        tokens=jnp.full((num_rows, max_new_tokens), pad_id, jnp.int32),
        lengths=jnp.zeros(num_rows, jnp.int32),
        log_probs=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
    )
    caches = cache if layers is None else kv.layers_apart(cache)
    state = append(_State(jnp.zeros((), jnp.int32), nothing, jnp.zeros(num_rows, bool), caches), last)
    state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~jnp.all(s.stopped), step, state)
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), state.generation)


def _in_compute_dtype(params, dtype):
    """The weights as the matmuls want them, cast once and not again at every token."""

    # As `gather_weights` does it layer by layer: norms, biases and routers stay as they are.
    def cast(path, leaf):
        row = layout.row(path)
        return leaf.astype(dtype) if row.matrix and not row.float32 else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _layers_apart(stacked: Params, num_layers: int) -> list[Params]:
    return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(num_layers)]


def _choose(logits_BxV, seeds_B, step, samplers, *, candidates):
    """(token, its log-probability) of every row."""
    temperature, top_k, top_p = samplers
    keys = None
    if seeds_B is not None:
        # Not the default generator, which users can change: vmapped, some kinds give a row other bits in another batch.
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step))(seeds_B)
    tokens = next_tokens(
        logits_BxV, keys, temperature=temperature, top_k=top_k, top_p=top_p, candidates=candidates
    ).astype(jnp.int32)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits_BxV), tokens[:, None], axis=-1)[:, 0]
    return tokens, log_probs


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n, for n >= 1."""
    return 1 << max(int(n) - 1, 0).bit_length()


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    noun = "an integer" if kind is numbers.Integral else "a finite number"
    accepted = f"{noun} from {low} on" if high == math.inf else f"{noun} from {low} to {high}"
    if not isinstance(value, kind) or not low <= value <= high or value == math.inf:
        raise InputError(f"{name}={value!r}: must be {accepted}")


def _integers(name, value, shape=None, bounds=None):
    """`value` as an array, NumPy's unless it is JAX's already; its shape is checked, and of NumPy's the range."""
    if not isinstance(value, jax.Array):
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise InputError(f"{name}: rows of unequal length; pad them on the right") from error
        value = value if value.size else value.astype(np.int32)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise InputError(f"{name} of type {value.dtype}: must be integers")
    if shape is not None and value.shape != shape:
        raise InputError(f"{name} of shape {value.shape}: must be {shape}")
    if bounds is not None and isinstance(value, np.ndarray):
        _check_range(name, value, bounds)
    return value


def _check_range(name, values, bounds):
    wrong = values[(values < bounds[0]) | (values > bounds[1])]
    if wrong.size:
        raise InputError(f"{name} holds {wrong.flat[0]}: must be from {bounds[0]} to {bounds[1]}")
