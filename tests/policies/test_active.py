"""The policies of a run together."""

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.policies.base import Mixer, Reference, Weighter
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.policies.weighters.rho1 import rho1

SQUARES = Weighter(init=lambda width: (), weigh=lambda state, seen: seen.losses**2)


def active(mixer, *weighters):
    mixer, *weighters = (Scheduled(f"policy {i}", p, Schedule(0, 1, -1)) for i, p in enumerate((mixer, *weighters)))
    return ActivePolicies(mixer, None, None, tuple(weighters), by_domain=True, mixes=True, save_all_scores=False)


def test_two_policies_may_share_a_reference_but_not_want_two():
    ours = rho1(reference="runs/a", reference_losses="cached")
    mixer = Mixer(init=None, update=None, sampling_weights=None, reference=Reference("runs/a", "cached"))
    assert active(mixer, ours, SQUARES).reference() == Reference("runs/a", "cached")
    assert active(static(), SQUARES).reference() is None
    other = mixer._replace(reference=Reference("runs/b", "cached"))
    with pytest.raises(InputError, match=r"config: the policies want different reference models, .*runs/a.*runs/b"):
        active(other, ours).reference()
