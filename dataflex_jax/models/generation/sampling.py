"""The next token of every row from its logits: greedy, or drawn with a temperature, the top k and the nucleus."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def next_tokens(
    logits_BxV: Float[Array, "B V"],
    keys_B: Key[Array, " B"],
    *,
    temperature: Float[Array, ""] | None = None,
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
    candidates: int | None = None,
) -> Int[Array, " B"]:
    """One token a row; ties go to the smaller id.

    As in Hugging Face's generate the temperature comes first, then the k best tokens are kept, and of these the fewest
    whose probabilities, renormalised over the k, sum to at least `top_p`. What is None is off, at compile time.

    Args:
        logits_BxV: float32, not yet divided by the temperature.
        keys_B: a key a row: a row's draw depends on its logits and its key alone.
        temperature: above 0; None: the most likely token, and the rest is ignored.
        top_k: at least 1.
        top_p: above 0, at most 1.
        candidates: how many of the best tokens to sort, at least `top_k`; None: all V.
    """
    if temperature is None:
        return jnp.argmax(logits_BxV, axis=-1)
    # Below the maximum, the quotient overflows to a probability of 0 and not to an undefined one.
    scaled = (logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)) / temperature
    draw = jax.vmap(jax.random.categorical)
    if top_k is None and top_p is None:
        return draw(keys_B, scaled)
    scaled, ids = jax.lax.top_k(scaled, logits_BxV.shape[-1] if candidates is None else candidates)
    if top_k is not None:
        scaled = jnp.where(jnp.arange(scaled.shape[-1]) < top_k, scaled, -jnp.inf)
    if top_p is not None:
        probabilities = jax.nn.softmax(scaled, axis=-1)
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        scaled = jnp.where(mass_before < top_p, scaled, -jnp.inf)
    return jnp.take_along_axis(ids, draw(keys_B, scaled)[:, None], axis=-1)[:, 0]
