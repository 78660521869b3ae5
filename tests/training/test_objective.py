"""The weights of a batch's tokens against a transcription that goes row by row and token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.batch import Batch
from dataflex_jax.policies.base import Weighter
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.policies.weighters.loss import loss
from dataflex_jax.policies.weighters.rho1 import rho1
from dataflex_jax.training import objective
from dataflex_jax.training.objective import Forward

EVERY_STEP = Schedule(0, 1, -1)
ROWS, TOKENS, DOMAINS = 6, 7, 3
OF_DOMAINS = (2.0, 0.25, 1.5)
SQUARES = Weighter(init=lambda width: (), weigh=lambda state, seen: seen.losses**2)
BY_DOMAIN = Weighter(init=lambda width: (), weigh=lambda state, seen: 1.0 + seen.domains)
BY_TOKEN = Weighter(init=lambda width: (), weigh=lambda state, seen: (seen.token_losses > seen.reference_losses) * 2.0)


def mixer_of(loss_mean):
    weights = None if loss_mean is None else lambda state: state
    return static()._replace(loss_weights=weights, loss_mean=loss_mean or "tokens")


def scheduled(*weighters, schedule=EVERY_STEP):
    return tuple(Scheduled(f"weighter {i}", weighter, schedule) for i, weighter in enumerate(weighters))


def random_batch(seed, rows=ROWS):
    """The last domain has no row; rows have unequal numbers of tokens."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, TOKENS)) < 0.7).astype(np.float32)
    mask[:, 0] = 1
    batch = Batch(
        tokens=np.zeros((rows, TOKENS + 1), np.int32),
        mask=mask,
        lengths=np.full(rows, TOKENS),
        domain=rng.integers(0, DOMAINS - 1, rows),
        drawn_with=np.full(DOMAINS, 1 / DOMAINS),
    )
    losses, reference = rng.uniform(0.5, 6, (2, rows, TOKENS)).astype(np.float32)
    return batch, losses, reference


def weigh(mixer, weighters, batch, losses, reference, step=1):
    forward = Forward(jnp.asarray(losses), (None,) * len(weighters), jnp.asarray(reference))
    states = tuple(scheduled.policy.init(1) for scheduled in weighters)
    batch = jax.tree.map(jnp.asarray, batch)
    return objective.weigh(
        mixer, weighters, jnp.asarray(OF_DOMAINS), states, batch, forward, jnp.int32(step), jax.random.key(0)
    )


def transcription(loss_mean, row_weights, token_weights, batch, losses):
    """(the loss, what of the batch's token losses it is the sum of), in float64.

    Args:
        loss_mean: of the mixer's loss weights; None without.
        row_weights: one list a weighter.
        token_weights: one array a weighter.
        batch: the batch.
        losses: of the tokens.
    """
    mask, domains = batch.mask.astype(np.float64), batch.domain
    factors = np.zeros(mask.shape)
    kept = np.ones(mask.shape)
    for weights in token_weights:
        kept = kept * weights
    domain_tokens = [mask[domains == k].sum() for k in range(DOMAINS)]
    of_rows = np.ones(len(mask))
    for b, k in enumerate(domains if loss_mean else ()):
        of_rows[b] = OF_DOMAINS[k] / (domain_tokens[k] if loss_mean == "domains" else 1)
    if row_weights:
        product = np.prod(row_weights, axis=0)
        if len(row_weights) > 1:
            product = product / product.mean() * np.prod([np.mean(weights) for weights in row_weights])
        having = np.array([(mask[b] * kept[b]).sum() > 0 for b in range(len(mask))])
        product = product * product.mean() / product[having].mean()
        product = product * of_rows / of_rows[having].mean()
        for b in range(len(mask)):
            counted = mask[b] * kept[b]
            factors[b] = product[b] * counted / max(counted.sum(), 1e-30) / having.sum()
    else:
        for b in range(len(mask)):
            factors[b] = of_rows[b] * mask[b] * kept[b]
        if loss_mean != "domains":
            factors = factors / factors.sum()
    return (factors * losses).sum(), factors


@pytest.mark.parametrize("loss_mean", [None, "tokens", "domains"])
@pytest.mark.parametrize(
    "weighters", [(), (SQUARES,), (SQUARES, BY_DOMAIN), (BY_TOKEN,), (SQUARES, BY_TOKEN), (BY_TOKEN, BY_TOKEN)]
)
def test_equals_the_transcription(loss_mean, weighters):
    for seed in range(3):
        batch, losses, reference = random_batch(seed)
        row_losses = (batch.mask * losses).sum(1) / batch.mask.sum(1)
        of_rows = {id(SQUARES): row_losses.astype(np.float64) ** 2, id(BY_DOMAIN): 1.0 + batch.domain}
        rows = [of_rows[id(weighter)] for weighter in weighters if weighter is not BY_TOKEN]
        tokens = [2.0 * (losses > reference) for weighter in weighters if weighter is BY_TOKEN]
        expected, factors = transcription(loss_mean, rows, tokens, batch, losses)
        weights = weigh(mixer_of(loss_mean), scheduled(*weighters), batch, losses, reference)
        np.testing.assert_allclose(weights.tokens, factors, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(jnp.sum(weights.tokens * losses), expected, rtol=1e-5)


def test_the_three_losses_in_words():
    """The transcription itself, on what one can read off."""
    batch, losses, reference = random_batch(3)
    mask, domains = batch.mask, batch.domain
    means = [(mask * losses)[domains == k].sum() / mask[domains == k].sum() for k in range(2)]
    row_means = (mask * losses).sum(1) / mask.sum(1)
    of_tokens = mask * np.array(OF_DOMAINS)[domains][:, None]
    for mixer, weighters, expected in (
        (mixer_of(None), (), (mask * losses).sum() / mask.sum()),
        (mixer_of("tokens"), (), (of_tokens * losses).sum() / of_tokens.sum()),
        (mixer_of("domains"), (), OF_DOMAINS[0] * means[0] + OF_DOMAINS[1] * means[1]),
        (mixer_of(None), (loss(strategy="uniform"),), row_means.mean()),
        (mixer_of(None), (loss(r=1e9),), row_means.mean()),
    ):
        weights = weigh(mixer, scheduled(*weighters), batch, losses, reference)
        np.testing.assert_allclose(jnp.sum(weights.tokens * losses), expected, rtol=1e-5)


def test_rho1_is_the_mean_over_the_kept_tokens():
    batch, losses, reference = random_batch(4)
    counted = batch.mask > 0
    excess = np.sort((losses - reference)[counted])[::-1]
    kept = counted & (losses - reference >= excess[round(0.5 * counted.sum()) - 1])
    weights = weigh(static(), scheduled(rho1(keep=0.5, reference="a run")), batch, losses, reference)
    np.testing.assert_allclose(weights.tokens, kept / kept.sum(), rtol=1e-6)


def test_before_its_warmup_and_after_its_last_update_a_weighter_weighs_nothing():
    batch, losses, reference = random_batch(5)
    plain = weigh(static(), scheduled(loss(strategy="uniform")), batch, losses, reference)
    weighted = weigh(static(), scheduled(loss()), batch, losses, reference)
    assert np.abs(weighted.tokens - plain.tokens).max() > 1e-3
    schedule = Schedule(warmup_step=3, update_step=2, update_times=2)
    for step in range(1, 10):
        weights = weigh(static(), scheduled(loss(), schedule=schedule), batch, losses, reference, step)
        expected = weighted if 4 <= step <= 7 else plain
        np.testing.assert_allclose(weights.tokens, expected.tokens, rtol=1e-6)


def test_rows_without_a_target_count_nowhere():
    batch, losses, reference = random_batch(6)
    fewer = jax.tree.map(lambda value: value[:-1], batch.rows_alone())
    fewer = dataclasses.replace(fewer, drawn_with=batch.drawn_with)
    batch.mask[-1] = 0
    for loss_mean in (None, "tokens"):
        for weighters in ((), (loss(),), (loss(), SQUARES)):
            with_it = weigh(mixer_of(loss_mean), scheduled(*weighters), batch, losses, reference)
            without = weigh(mixer_of(loss_mean), scheduled(*weighters), fewer, losses[:-1], reference[:-1])
            assert float(jnp.sum(jnp.abs(with_it.tokens[-1]))) == 0
            np.testing.assert_allclose(with_it.tokens[:-1], without.tokens, rtol=1e-5)


def test_statistics_of_the_weights():
    rows = np.random.default_rng(7).uniform(0, 3, 20).astype(np.float32)
    got = objective.statistics(jnp.asarray(rows))
    np.testing.assert_allclose(got["example_weight_min"], rows.min())
    np.testing.assert_allclose(got["example_weight_max"], rows.max())
    np.testing.assert_allclose(got["example_weight_mean"], rows.mean(), rtol=1e-6)
    np.testing.assert_allclose(got["effective_sample_size"], rows.sum() ** 2 / (rows**2).sum(), rtol=1e-6)
    assert float(objective.statistics(jnp.ones(20))["effective_sample_size"]) == 20


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "linear"])
def test_the_effective_sample_size_falls_as_the_temperature_falls(strategy):
    batch, losses, reference = random_batch(8, rows=32)
    sizes = []
    for r in (1e6, 3.0, 1.0, 0.3, 0.1):
        weights = weigh(static(), scheduled(loss(strategy=strategy, r=r)), batch, losses, reference)
        sizes.append(float(objective.statistics(weights.rows)["effective_sample_size"]))
    assert sizes[0] == pytest.approx(32)
    assert all(np.diff(sizes) < 0)
    assert sizes[-1] < 26


def test_rows_without_a_kept_token_do_not_shrink_the_loss():
    """Equal losses: whatever is kept and however rows are weighted, the loss is that of plain training."""
    batch, _, _ = random_batch(0, rows=8)
    losses, reference = np.full(batch.mask.shape, 2.0, np.float32), np.zeros(batch.mask.shape, np.float32)
    reference[2:] = 3
    of_rows = Weighter(init=lambda width: (), weigh=lambda state, seen: jnp.linspace(0.2, 1.8, 8))
    for weighters in ((of_rows, BY_TOKEN), (of_rows,)):
        weights = weigh(mixer_of(None), scheduled(*weighters), batch, losses, reference)
        np.testing.assert_allclose(jnp.sum(weights.tokens * losses), 2.0, rtol=1e-5)
        np.testing.assert_allclose(weights.rows, np.linspace(0.2, 1.8, 8), rtol=1e-6)
