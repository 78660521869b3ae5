"""What LESS is for: it finds the examples of the targets' kind, and its scores foretell what a step on one does."""

import json
import random
import shutil

import jax
import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.targets import open_targets
from dataflex_jax.policies import registry
from dataflex_jax.policies.base import Request
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.policies.selectors.less import less
from dataflex_jax.selection.choosing import Chooser
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.rows import map_named, selected_paths
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.validation.study import Design, validate
from tests.helpers import tiny_chat

POOL, PLANTED, TARGETS = 100, 10, 12


def sentence(rng, step):
    """Eight letters in a circle, and one of two grammars: the next letter is mostly `step` further on."""
    letters = [rng.randrange(8)]
    for _ in range(19):
        letters.append((letters[-1] + (step if rng.random() < 0.9 else rng.randrange(8))) % 8)
    return "".join("abcdefgh"[i] for i in letters)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A pool with a tenth in the targets' grammar, at random places."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    steps = [3] * PLANTED + [1] * (POOL - PLANTED)
    rng.shuffle(steps)
    for name, steps_of_lines in {"pool": steps, "targets": [3] * TARGETS}.items():
        (folder / name).mkdir()
        lines = [{"instruction": "?", "output": sentence(rng, step), "step": step} for step in steps_of_lines]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / "sentences.jsonl").write_text(text)
    return tiny_chat.config(
        folder / "pool",
        selector="less",
        selector__warmup_step=20,
        selector__proj_dim=512,
        train_step=21,
        checkpoint_every=100,
        data__valid_fraction=0.0,
        targets__source="local",
        targets__root=str(folder / "targets"),
        targets__formatting="alpaca",
    )


@pytest.fixture(scope="module")
def pool(config):
    return Pool(open_domains(config.data, progress=False)[0])


@pytest.fixture(scope="module")
def planted(pool):
    """Whether each candidate is of the targets' grammar."""
    (domain,) = pool.domains
    return np.array(domain.store.values("train", "step")) == 3


def test_less_finds_what_is_of_the_targets_kind(config, planted, tmp_path):
    assert (len(planted), planted.sum()) == (POOL, PLANTED)
    train_and_evaluate(config, tmp_path)
    scores = tiny_chat.selections(tmp_path)[20]["all_scores"]
    assert planted[np.argsort(-scores)[:PLANTED]].mean() >= 0.9


@pytest.mark.slow
def test_less_foretells_what_models_on_subsets_learn(config, tmp_path):
    train_and_evaluate(config, tmp_path / "run")
    scores = tmp_path / "less.npz"
    shutil.copy(tmp_path / "run" / "selections" / "step_00000020.npz", scores)
    longer = config.copy_and_resolve_references()
    longer.train_step = 40
    found = validate(longer, [scores], Design(subsets=32, alpha=0.5), tmp_path / "validate")
    overall = found.lds["less"].overall
    assert overall.value > 0.3
    assert overall.low > 0
    assert found.by_chance.low < 0 < found.by_chance.high


def test_random_finds_a_tenth(pool, planted):
    built = registry.build("selector", registry.policy_config("selector", "random"), Schedule(0, 1, -1))
    chooser = Chooser(built, pool, pool.groups(by_domain=False))

    class Signals:
        class candidates:
            num_rows = POOL

    shares = []
    for seed in range(60):
        request = Request(np.int32(1), np.int32(1), jax.random.key(seed))
        chosen, _ = chooser.choose({}, Signals, request, [PLANTED])
        shares.append(planted[chosen.ids].mean())
    assert abs(np.mean(shares) - 0.1) < 0.04  # its standard error is 0.011
    assert max(shares) < 0.5


@pytest.mark.slow
def test_scores_foretell_the_first_order_change_of_the_target_loss(config):
    """<g_z, g_target> is what a small step of plain gradient descent on z takes off the target loss."""
    domains, tokenizer = open_domains(config.data, progress=False)
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        of = tiny_chat.model_signals(config, domains, tokenizer, mesh)
        selector = less(gradient_type="sgd", projection="none", target_agg="cos_of_mean")
        scores = np.asarray(selector.score({}, of, None)[0].rows)
        model = of.candidates._subject.model
        paths = selected_paths(model.params, None)
        batch = Loader(Pool(domains), mesh).load(np.arange(40))
        targets = open_targets(config, domains, config.data.tokenizer)
        target = Loader(targets.pool, mesh).load(targets.ids)

        def losses(params, batch):
            token_losses = model.having(params).token_losses(batch).losses
            return (token_losses * batch.mask).sum(axis=1) / batch.row_tokens

        @jax.jit
        def norms_and_changes(params):
            def of_row(row):
                gradient = jax.grad(lambda p: losses(p, jax.tree.map(lambda x: x[None], row))[0])(params)
                gradient = map_named(lambda path, leaf: leaf if path in paths else 0 * leaf, gradient)
                norm = jax.numpy.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
                stepped = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
                return norm, losses(stepped, target).mean() - losses(params, target).mean()

            return jax.lax.map(of_row, batch)

        norms, changes = map(np.asarray, norms_and_changes(model.params))
    assert np.corrcoef(-changes, scores[:40] * norms)[0, 1] > 0.95
    assert np.ptp(changes) > 20 * np.finfo(np.float32).eps * 6  # the losses are about 6
