"""NICE on a planted task: does what it selects raise the expected reward, more than LESS's choice and random ones?

    python scripts/bench/nice.py

A prompt is a letter, and its answer a digit. The reward looks at the last digit of a response, whatever is said before.
The references of the target set say more: the digit comes after the same long sentence. A tenth of the pool answers
shortly and rightly, a tenth with the references' sentence and a wrong digit, half shortly and wrongly; the rest is
noise. A small model is trained on the whole pool first, so that all of this is what it might say. Then each selector
takes a tenth of the pool, on which the model is trained a little further, and the expected reward is measured on
responses to the targets' prompts that no selector has seen. LESS goes by the references, NICE by the reward.

Writes docs/benchmarks/nice.json.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from absl import flags

from dataflex_jax import cli
from dataflex_jax.configs import base
from dataflex_jax.data.batch import Batch
from dataflex_jax.data.listed import ListedRows
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.rows import Row
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.library import open_tokenizer
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.model import Model
from dataflex_jax.policies import Evidence, Generations, Request, Selector
from dataflex_jax.policies.common.rewards import reward
from dataflex_jax.policies.selectors.less import less
from dataflex_jax.policies.selectors.nice import nice
from dataflex_jax.policies.selectors.random import random
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import ModelSignals
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training import run_config
from dataflex_jax.training.optim import adamw

LETTERS = "abcdefgh"
SENTENCE = "let me think it over: it is "
KINDS = {"right": 0.1, "worded like a reference": 0.1, "wrong": 0.5, "noise": 0.3}  # shares of the pool
PATTERN = "([0-9])"
SHARE = 0.1  # of the pool, that is selected
SHAPE = {
    "architecture": "qwen2",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SAMPLING = {"temperature": 0.7, "max_new_tokens": 40}

_SEEDS = flags.DEFINE_integer("seeds", 3, "Repetitions, each with a pool and a model of its own.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 400, "Of the pool.", lower_bound=20)
_STEPS = flags.DEFINE_integer("steps", 300, "On the whole pool, before anything is selected.", lower_bound=1)
_MORE = flags.DEFINE_integer("more_steps", 30, "On what is selected.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("mc_samples", 16, "Responses to each target that NICE looks at.", lower_bound=2)
_MEASURED = flags.DEFINE_integer("measured", 64, "Responses to each target that measure the reward.", lower_bound=1)
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/nice.json", "The result.")


def answer_of(letter: str) -> int:
    return 3 * LETTERS.index(letter) % 10


class Pool(NamedTuple):
    """The candidates, and the kind of each."""

    rows: ListedRows
    kinds: np.ndarray


def row(letter: str, response: str, tokenizer: Tokenizer) -> Row:
    """A prompt and what is said to it; the loss is on the latter."""
    prompt, said = tokenizer.encode_batch([f"{letter}? ", response])
    tokens = [*prompt, *said, tokenizer.eos_id]
    return Row(np.array(tokens, np.int32), np.arange(1, len(tokens)) >= len(prompt))


def pool_of(rng: np.random.Generator, tokenizer: Tokenizer) -> Pool:
    """A pool in which every kind has its share."""
    counts = [round(share * _ROWS.value) for share in KINDS.values()]
    kinds = rng.permutation(np.repeat(np.arange(len(KINDS)), counts))
    names = list(KINDS)

    def response(letter: str, kind: str) -> str:
        wrong = (answer_of(letter) + rng.integers(1, 10)) % 10
        if kind == "noise":
            return "".join(rng.choice(list("ijklmnopq rstuv"), 12))
        return {"right": str(answer_of(letter)), "wrong": str(wrong)}.get(kind, f"{SENTENCE}{wrong}")

    letters = rng.permutation(np.resize(list(LETTERS), len(kinds)))
    made = [row(letter, response(letter, names[kind]), tokenizer) for letter, kind in zip(letters, kinds, strict=True)]
    return Pool(ListedRows(made), kinds)


class Trainer:
    """Trains a model on rows, with the optimizer that a run has."""

    def __init__(self):
        self.config = base.get_config()
        self._optimizer = adamw(self.config.optim, optax.constant_schedule(3e-3))
        self._step = jax.jit(self._stepped)

    def _stepped(self, model: Model, opt_state: Any, batch: Batch) -> tuple[Any, Any]:
        def loss(params):
            losses = model.with_params(params).token_losses(batch).losses
            return jnp.mean(jnp.sum(batch.mask * losses, axis=1) / batch.row_tokens)

        updates, opt_state = self._optimizer.update(jax.grad(loss)(model.params), opt_state, model.params)
        return optax.apply_updates(model.params, updates), opt_state

    def train(self, model: Model, rows: ListedRows, ids: np.ndarray, steps: int, seed: int) -> tuple[Model, AdamState]:
        """The model and the optimizer's state after some steps of 32 random rows among `ids`."""
        rng, loader = np.random.default_rng(seed), Loader(rows.pool(), make_mesh({}))
        opt_state = self._optimizer.init(model.params)
        for _ in range(steps):
            params, opt_state = self._step(model, opt_state, loader.load(rng.choice(ids, 32)))
            model = model.with_params(params)
        optim = self.config.optim
        return model, AdamState(opt_state, optim.b1, optim.b2, optim.eps)


class Task:
    """A pool, a target set of all letters, and what is asked of models about them."""

    def __init__(self, seed: int, tokenizer: Tokenizer):
        self.pool, self._tokenizer = pool_of(np.random.default_rng(seed), tokenizer), tokenizer
        self._mesh = make_mesh({})
        references = [row(letter, f"{SENTENCE}{answer_of(letter)}", tokenizer) for letter in LETTERS]
        targets = ListedRows(references).pool()
        ids = np.arange(len(LETTERS))
        self._targets = TargetSet(targets, ids, np.zeros_like(ids), ("letters",)), source(targets, self._mesh)
        self._candidates, self._sweeper = source(self.pool.rows.pool(), self._mesh), Sweeper(self._mesh)

    def signals(self, model: Model, adam: AdamState | None = None) -> ModelSignals:
        """Of a model."""
        subject = Subject(model, adam)
        return ModelSignals(subject, self._sweeper, self._candidates, self._targets, codec=self._tokenizer)

    def expected_reward(self, model: Model, seed: int) -> float:
        """The mean reward of new responses."""
        signals = self.signals(model)
        # A stream of its own: what NICE has looked at is not what is measured.
        key = jax.random.fold_in(jax.random.key(seed), 1)
        responses = signals.respond(Generations(samples=_MEASURED.value, **SAMPLING), key)
        return float(reward("regex", PATTERN).rewards(responses.exchanges, signals).mean())

    def selected(self, selector: Selector, signals: ModelSignals, seed: int) -> np.ndarray:
        """The ids of the share of the pool that a selector takes."""
        request = Request(jnp.int32(1), jnp.int32(1), jax.random.key(seed))
        evidence, _ = selector.score({}, signals, request)
        evidence = Evidence(jax.tree.map(jnp.asarray, evidence.rows), evidence.shared)
        return np.asarray(selector.choose(evidence, request, round(SHARE * _ROWS.value)).ids)


def contestants() -> dict[str, Callable[[], Selector]]:
    return {
        "random": random,
        "less": less,
        "nice": lambda: nice(reward="regex", pattern=PATTERN, mc_samples=_SAMPLES.value, baseline="mean", **SAMPLING),
    }


def repetition(seed: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Rewards before and after, and what was selected, of one pool."""
    task, trainer = Task(seed, tokenizer), Trainer()
    everything = np.arange(_ROWS.value)
    config = ModelConfig(**SHAPE, dtype="float32", param_dtype="float32", remat="none")
    start = Model.random(config, jax.random.key(seed))
    model, adam = trainer.train(start, task.pool.rows, everything, _STEPS.value, seed)
    found = {"before": task.expected_reward(model, seed)}
    for name, make in contestants().items():
        ids = task.selected(make(), task.signals(model, adam), seed)
        further, _ = trainer.train(model, task.pool.rows, ids, _MORE.value, seed + 1000)
        kinds = np.bincount(task.pool.kinds[ids], minlength=len(KINDS)) / len(ids)
        found[name] = {
            "reward": task.expected_reward(further, seed),
            "selected": dict(zip(KINDS, kinds.tolist(), strict=True)),
        }
        print(f"seed {seed}, {name}: reward {found['before']:.3f} -> {found[name]['reward']:.3f}, {found[name]}")
    return found


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    tokenizer = open_tokenizer("bytes")
    with jax.set_mesh(make_mesh({})):
        runs = [repetition(seed, tokenizer) for seed in range(_SEEDS.value)]
    result = {
        **results.describe(run_config.resolved(base.get_config())),
        "model": SHAPE,
        "rows": _ROWS.value,
        "share": SHARE,
        "kinds": KINDS,
        "steps": {"before": _STEPS.value, "after": _MORE.value},
        "mc_samples": _SAMPLES.value,
        "measured": _MEASURED.value * len(LETTERS),
        "reward_before": results.spread([run["before"] for run in runs]),
        "selectors": {
            name: {
                "reward": results.spread([run[name]["reward"] for run in runs]),
                "selected": {kind: float(np.mean([run[name]["selected"][kind] for run in runs])) for kind in KINDS},
            }
            for name in contestants()
        },
    }
    results.write(_OUTPUT.value, result)


if __name__ == "__main__":
    cli.run(main)
