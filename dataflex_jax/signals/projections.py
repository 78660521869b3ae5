"""Random maps from a gradient to `dim` numbers that keep inner products: E[<Sx, Sy>] = <x, y>, S linear.

A gradient is many arrays (one a parameter and layer); each has a map of its own, and the images are summed. The maps
depend on the seed, the parameter's path and the layer alone, so they are the same for every batch, mesh and side of a
comparison. Variances below are over the maps, for x and y as vectors of all selected parameters; k stands for `dim`.

  sketch      Random signs and a hash: coordinate i is added to bucket h(i) with sign s(i). Chunks of at most k
              neighbours are shifted in a circle of k buckets, so neighbours never meet, and coordinates of different
              chunks meet with probability 1/k. Var = (1/k) sum over pairs (i, j) of different chunks of
              x_i^2 y_j^2 + x_i y_i x_j y_j, at most (|x|^2 |y|^2 + <x,y>^2) / k. As a count sketch (Charikar et al.
              2002; Weinberger et al. 2009, https://arxiv.org/abs/0902.2206), but shifts move memory in runs.
  rademacher  Independent entries +-1/sqrt(k) (Achlioptas 2003).
              Var = (1/k) (|x|^2 |y|^2 + <x,y>^2 - 2 sum_i x_i^2 y_i^2).
  kronecker   P_in^T X P_out of each matrix X, entries +-1/sqrt(k_in) and +-1/sqrt(k_out), k_in k_out <= k; so
              sum_t a_t d_t^T needs only P_in^T a_t and P_out^T d_t. From a single matrix,
              Var <= (2/k_in + 2/k_out + 4/(k_in k_out)) |x|^2 |y|^2, which rank one nearly reaches; different matrices
              add as in rademacher.
"""

import math
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dataflex_jax.models import layout
from dataflex_jax.policies import options
from dataflex_jax.policies.signals import METHODS, Projection
from dataflex_jax.sharding import program_device

_BLOCK = 1024  # coordinates whose dense map is in memory at once
_SIGNS = 2**25  # how many of a dense map a GPU makes at a time, a byte each
_FUSED_LEVELS = 3  # of the sketch's tree that are one kernel; 1 and 2 move more memory, more take long to compile


def check(projection: Projection) -> None:
    """Refuses an impossible projection.

    Raises:
        ValueError: begins with the field's name.
    """
    dim = projection.dim
    options.one_of("method", projection.method, METHODS)
    options.require("dim", dim, isinstance(dim, int) and not isinstance(dim, bool) and dim >= 1, "a positive integer")


def project(
    projection: Projection, path: str, layer: int | Int[Array, ""], gradient: Float[Array, "..."]
) -> Float[Array, " dim"]:
    """The "sketch" or "rademacher" image of one parameter's gradient, float32.

    Args:
        projection: which map.
        path: the parameter's, "/"-joined.
        layer: its layer; 0 for parameters outside the layers.
        gradient: of that layer, of any shape.
    """
    matrix = jnp.atleast_1d(gradient.astype(jnp.float32))
    matrix = matrix.reshape(matrix.shape[0], -1)
    if matrix.shape[1] > 1 and not layout.row(path).split_by_inputs:
        matrix = matrix.T  # chunks are runs along the second axis, so parts of the first stay on their devices
    key = _parameter_key(projection.seed, path, layer)
    return {"sketch": _sketch, "rademacher": _rademacher}[projection.method](matrix, key, projection.dim)


def kronecker_signs(
    projection: Projection, path: str, layer: int | Int[Array, ""], inputs: int, outputs: int
) -> tuple[Float[Array, "I K"], Float[Array, "O L"]]:
    """The signs of (P_in, P_out) for one matrix [inputs, outputs]: +-1; divide P_in^T X P_out by sqrt(K L)."""
    keys = jax.random.split(_parameter_key(projection.seed, path, layer))
    k_in, k_out = kronecker_widths(projection.dim)
    return _signs(keys[0], (inputs, k_in)), _signs(keys[1], (outputs, k_out))


def kronecker_widths(dim: int) -> tuple[int, int]:
    """(k_in, k_out): the most even division of `dim`; where there is only a lopsided one, the floor of its root twice
    or nearly, which leaves fewer than sqrt(dim) of the numbers zero."""
    root = math.isqrt(dim)
    k_in = next((k for k in range(root, root // 2, -1) if dim % k == 0), root)
    return k_in, dim // k_in


def _parameter_key(seed: int, path: str, layer: int | Int[Array, ""]) -> PRNGKeyArray:
    # The generator is named, as JAX's default one may be configured to differ between devices.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(path.encode()))
    return jax.random.fold_in(key, layer)


def _signs(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Float[Array, "A B"]:
    """Independent +-1, one random bit each."""
    rows, columns = shape
    words = jax.random.bits(key, (rows, -(-columns // 32)), jnp.uint32)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1 - 2 * bits.reshape(rows, -1)[:, :columns].astype(dtype)


def _sketch(matrix: Float[Array, "A B"], key: PRNGKeyArray, dim: int) -> Float[Array, " dim"]:
    sign_key, shift_key = jax.random.split(key)
    chunks = _chunks(matrix * _signs(sign_key, matrix.shape), dim)
    # Chunk c is shifted by the sum of the shifts of c's binary digits (and of the last, by which parameters differ).
    # The difference of two chunks' shifts is then uniform, which is all that the variance asks for.
    shifts = jax.random.randint(shift_key, (chunks.shape[0].bit_length() + 1,), 0, dim)
    level = 0
    chunks = jnp.pad(chunks, ((0, 0), (0, dim - chunks.shape[1])))
    while (number := chunks.shape[0]) > 1:
        pairs = chunks[: number - number % 2].reshape(number // 2, 2, dim)
        rest = chunks[number - number % 2 :]
        chunks = jnp.concatenate([pairs[:, 0] + jnp.roll(pairs[:, 1], shifts[level], axis=-1), rest])
        level += 1
        if level % _FUSED_LEVELS == 0:
            # XLA's GPU compiler would make one kernel of all levels, which reads each number many times.
            chunks = jax.lax.optimization_barrier(chunks)
    return jnp.roll(chunks[0], shifts[-1])


def _chunks(matrix: Float[Array, "A B"], dim: int) -> Float[Array, "C L"]:
    """The numbers in order, in chunks of at most `dim`; padded only where no division comes near `dim`."""
    rows, columns = matrix.shape
    if columns > dim:
        least = -(-columns // dim)
        parts = next((p for p in range(least, 2 * least) if columns % p == 0), least)
        matrix = jnp.pad(matrix, ((0, 0), (0, -columns % parts)))
        return matrix.reshape(rows * parts, -1)
    most = min(rows, dim // columns)
    group = next((g for g in range(most, most // 2, -1) if rows % g == 0), most)
    return jnp.pad(matrix, ((0, -rows % group), (0, 0))).reshape(-1, group * columns)


def _rademacher(matrix: Float[Array, "A B"], key: PRNGKeyArray, dim: int) -> Float[Array, " dim"]:
    size = min(_BLOCK, matrix.size)
    blocks = jnp.pad(matrix.reshape(-1), (0, -matrix.size % size)).reshape(-1, size)
    on_cpu = program_device().platform == "cpu"
    # A GPU waits longer for the start of a small product than for the product.
    together = 1 if on_cpu else max(1, min(blocks.shape[0], _SIGNS // (size * dim)))
    blocks = jnp.pad(blocks, ((0, -blocks.shape[0] % together), (0, 0)))
    dtype = jnp.float32 if on_cpu else jnp.int8

    def add(total, numbered):
        of_blocks, numbers = numbered
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, of_blocks)
        signs = jax.vmap(lambda key: _signs(key, (size, dim), dtype))(keys).reshape(-1, dim)
        return total + _times_signs(numbers.reshape(-1), signs), None

    numbered = jnp.arange(blocks.shape[0]).reshape(-1, together), blocks.reshape(-1, together, size)
    total, _ = jax.lax.scan(add, jnp.zeros(dim, jnp.float32), numbered)
    return total / math.sqrt(dim)


def _times_signs(numbers: Float[Array, " N"], signs: Float[Array, "N dim"]) -> Float[Array, " dim"]:
    """numbers @ signs in float32's precision."""
    if signs.dtype == jnp.float32:
        return jnp.matmul(numbers, signs, precision="highest")
    # In bfloat16, where signs are exact and three parts of 8 bits are a float32, the product of all parts costs little
    # more than that of one. `reduce_precision` is a cast that the compiler may not leave out.
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(numbers, exponent_bits=8, mantissa_bits=7))
        numbers = numbers - parts[-1]
    # What costs most is to write and read the signs: behind the barrier they are bytes, and the product's own kernel
    # casts them.
    signs = jax.lax.optimization_barrier(signs).astype(jnp.bfloat16)
    products = jnp.matmul(jnp.stack(parts).astype(jnp.bfloat16), signs, preferred_element_type=jnp.float32)
    return jnp.sum(products, axis=0)
