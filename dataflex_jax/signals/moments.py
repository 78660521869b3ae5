"""Adam's state as a signal: the preconditioned gradient of one example."""

import dataclasses
import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from dataflex_jax.policies import options
from dataflex_jax.policies.signals import EPS_MODES, Preconditioner

logger = logging.getLogger(__name__)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("mu", "nu", "count"),
    meta_fields=("b1", "b2", "eps", "eps_mode", "bias_correction"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Adam's live state of the trained parameters; a pytree of `mu`, `nu` and `count`, the rest is static.

    Attributes:
        mu: m, the moving average of the gradients, like the parameters.
        nu: v, that of their squares.
        count: steps that are in them.
        b1: decay of m.
        b2: decay of v.
        eps: added to the denominator.
        eps_mode: "outside" the root (PyTorch, optax) or "inside" it, with v (the code of LESS).
        bias_correction: divide m' and v' by 1 - b^(count + 1).
    """

    mu: PyTree
    nu: PyTree
    count: Int[Array, ""]
    b1: float
    b2: float
    eps: float
    eps_mode: str = "outside"
    bias_correction: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamState:
    """The state of an optimizer that has Adam in it, and Adam's constants.

    Attributes:
        opt_state: of any optax chain.
        b1: as the optimizer has it; so are `b2` and `eps`.
        b2: see `b1`.
        eps: see `b1`.
    """

    opt_state: PyTree
    b1: float = dataclasses.field(metadata={"static": True})
    b2: float = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(metadata={"static": True})

    def moments(self, preconditioner: Preconditioner) -> Moments:
        """The moments in it, to be used as `preconditioner` says."""
        return adam_moments(self.opt_state, b1=self.b1, b2=self.b2, eps=self.eps, **preconditioner._asdict())


def adam_moments(
    opt_state: PyTree,
    *,
    b1: float,
    b2: float,
    eps: float,
    eps_mode: str = "outside",
    bias_correction: bool = False,
) -> Moments:
    """The moments inside the state of any optax chain that has Adam in it.

    Args:
        opt_state: the optimizer's state.
        b1: as the optimizer has it; so are `b2` and `eps`.
        b2: see `b1`.
        eps: see `b1`.
        eps_mode: see `Moments`; also `bias_correction`.
        bias_correction: see `eps_mode`.

    Raises:
        ValueError: an unknown `eps_mode`; a state without moments (SGD), or with several of them.
    """
    options.one_of("eps_mode", eps_mode, EPS_MODES)
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "mu")
    owners = [path[-1].tuple_name for path, _ in found if isinstance(path[-1], optax.tree_utils.NamedTupleKey)]
    if len(owners) != 1:
        number = "no" if not owners else "more than one"
        raise ValueError(f"opt_state: has {number} Adam state (fields mu, nu and count); must have one")

    def field(name):
        def of_owner(path, _):
            return getattr(path[-1], "tuple_name", None) == owners[0]

        return optax.tree_utils.tree_get(opt_state, name, filtering=of_owner)

    return Moments(
        mu=found[0][1],
        nu=field("nu"),
        count=field("count"),
        b1=b1,
        b2=b2,
        eps=eps,
        eps_mode=eps_mode,
        bias_correction=bias_correction,
    )


def say_if_fresh(adam: AdamState) -> None:
    """Says once that moments without any step in them are used, as those of imported weights are."""
    if int(adam.moments(Preconditioner()).count) == 0:
        _say_fresh()


@cache
def _say_fresh() -> None:
    logger.warning(
        "Gradients are preconditioned by Adam's moments, and the optimizer has taken no step: these are zero, and the "
        "result is close to the gradient's signs. Train some steps before, or choose plain gradients "
        '(gradient_type "sgd" of a selector).'
    )


def preconditioned(moments: Moments, gradient: Float[Array, "..."]) -> Float[Array, "..."]:
    """m' / (sqrt(v') + eps), float32, with m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2.

    LESS's Gamma (Xia et al. 2024, https://arxiv.org/abs/2402.04333, section 3.1).

    Args:
        moments: whose `mu` and `nu` are arrays that broadcast with the gradient.
        gradient: of one example.
    """
    gradient = gradient.astype(jnp.float32)
    mu = moments.b1 * moments.mu.astype(jnp.float32) + (1 - moments.b1) * gradient
    nu = moments.b2 * moments.nu.astype(jnp.float32) + (1 - moments.b2) * gradient**2
    if moments.bias_correction:
        steps = (moments.count + 1).astype(jnp.float32)
        mu, nu = mu / (1 - moments.b1**steps), nu / (1 - moments.b2**steps)
    if moments.eps_mode == "inside":
        return mu * jax.lax.rsqrt(nu + moments.eps)
    return mu / (jnp.sqrt(nu) + moments.eps)
