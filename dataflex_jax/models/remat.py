"""What of a block the forward pass keeps for the backward pass, by the names in `config.REMAT_POLICIES`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dataflex_jax.errors import InputError
from dataflex_jax.models.attention import is_fused_attention
from dataflex_jax.models.config import REMAT_POLICIES

Policy = Callable[..., bool]  # of `jax.checkpoint`: whether a value is kept


def remat_policy(name: str, dtype: jnp.dtype) -> Policy:
    """The policy of a name.

    Args:
        name: of the policy.
        dtype: the compute dtype.

    Raises:
        InputError: an unknown name.
    """
    dots = _save_attention_and("q", "k", "v", "projected")
    policies = {
        "none": _save_all_but_gathered_weights,
        "full": jax.checkpoint_policies.nothing_saveable,
        # By name, as each adapted projection has three products, of which only the sum is worth keeping.
        "dots": dots,
        "attention": _save_attention_and("q", "k", "v", "attended"),
    }
    if dtype != jnp.float32:
        # What is between two products is float32 there, twice as large as they are, and cheaper to redo than to read.
        policies["none"] = jax.checkpoint_policies.save_from_both_policies(dots, jax.checkpoint_policies.dots_saveable)
    if name not in policies:
        raise InputError(f"model remat={name!r} is not supported; accepted: {', '.join(map(repr, REMAT_POLICIES))}")
    return policies[name]


def _save_attention_and(*names: str) -> Callable[..., bool]:
    by_name = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_from_both_policies(by_name, is_fused_attention)


def _save_all_but_gathered_weights(primitive, *operands, **_) -> bool:
    # Kept, every layer's gathered weights would be on every device. `gather_weight` is the block's only function of one
    # array with a derivative of its own; casts are as cheap to redo as to read.
    gathers = primitive.name == "custom_vjp_call" and len(operands) == 1
    return not gathers and primitive.name != "convert_element_type"
