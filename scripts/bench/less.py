"""LESS's scoring pass beside DataFlex's: the same model, adapters, optimizer state and rows, in turns on one device.

    python scripts/bench/less.py --peer_python=dataflex-env/bin/python   # third_party/dataflex/README.md makes it
    python scripts/bench/less.py --peer_python=python3 --hidden_size=1024 --length=1024 --output=...   # on a GPU

A Python that has PyTorch, transformers and PEFT but not DataFlex does what its selector does; only that is on the GPU.

Both give a score to every candidate: its Adam-preconditioned gradient against those of the target set. The peer's is
its `LessSelector` as it is, which takes one example at a time and projects densely; ours is `selector=less` through the
sweep that training uses, as `--projection` says. Scores are also compared with those of whole gradients (projection
"none"). Writes docs/benchmarks/less.json.
"""

import dataclasses
import functools
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from absl import flags
from scipy.stats import spearmanr

from dataflex_jax import cli
from dataflex_jax.configs import base
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import Row
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models import parts
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.hf import peft
from dataflex_jax.models.hf import weights as hf
from dataflex_jax.models.model import Model
from dataflex_jax.policies.base import Request
from dataflex_jax.policies.selectors.less import less
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import ModelSignals
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training import run_config
from dataflex_jax.training.optim import adamw

LANGUAGES = 4  # of the candidates; the targets are in the first
NU = 1e-8  # Adam's second moment of every parameter, about the square of its gradient

_PEER = cli.define_path("peer_python", None, "The Python of DataFlex's environment, or one with PyTorch.")
_CANDIDATES = flags.DEFINE_integer("candidates", 512, "Rows that are scored.", lower_bound=2)
_PEER_CANDIDATES = flags.DEFINE_integer("peer_candidates", 96, "How many of them the peer scores.", lower_bound=2)
_TARGETS = flags.DEFINE_integer("targets", 8, "Rows of the target set.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of the longest rows; the shortest have a quarter.", lower_bound=8)
_PROJ_DIM = flags.DEFINE_integer("proj_dim", 1024, "Numbers that a gradient is projected to.", lower_bound=1)
_PROJECTION = flags.DEFINE_string("projection", "exact", "Of ours; the peer's is dense.")
_HIDDEN = flags.DEFINE_integer("hidden_size", 256, "Width of the four-layer model.", lower_bound=16)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of both.", lower_bound=1)
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/less.json", "The result.")


class ArrayRows(NamedTuple):
    """Rows in memory; see `dataflex_jax.data.rows.Rows`."""

    tokens: np.ndarray
    counted: list[np.ndarray]
    buckets: tuple[int, ...]
    packed: bool = False
    bytes_per_target: float = 1.0

    @property
    def num_rows(self) -> int:
        return len(self.counted)

    def length(self, i: int) -> int:
        return len(self.counted[i])

    def lengths(self) -> np.ndarray:
        return np.array([len(counted) for counted in self.counted])

    def row(self, i: int) -> Row:
        return Row(self.tokens[i, : self.length(i) + 1], self.counted[i])


def random_rows(count: int, vocab_size: int, seed: int, languages: int = LANGUAGES) -> ArrayRows:
    """Instruction-like rows: a third of each is prompt, which does not count; lengths differ by up to four times.

    Each row is in one of `languages` languages, which share no tokens.
    """
    rng, length = np.random.default_rng(seed), _LENGTH.value
    lengths = rng.integers(length // 4, length, count)
    lengths[0] = length - 1
    words = vocab_size // LANGUAGES
    tokens = rng.integers(1, words, (count, length)) + words * rng.integers(0, languages, (count, 1))
    tokens = tokens.astype(np.int32)
    return ArrayRows(tokens, [np.arange(n) >= n // 3 for n in lengths], (length // 4, length // 2, length))


def domain(name: str, rows: ArrayRows) -> Domain:
    """The rows as a domain without a held-out split."""
    return Domain(name, name, rows, rows, None)


def padded_mask(rows: ArrayRows) -> np.ndarray:
    """1 where a token counts, [n, length - 1]."""
    mask = np.zeros((rows.num_rows, rows.tokens.shape[1] - 1), np.float32)
    for i, counted in enumerate(rows.counted):
        mask[i, : len(counted)] = counted
    return mask


def write_for_peer(folder: Path, model: Model, rows: ArrayRows, wanted: ArrayRows) -> None:
    """What less_peer.py reads."""
    base = dataclasses.replace(model.config, lora=None)
    load_tokenizer("bytes", texts=lambda: iter(()), cache_dir=folder).save(folder / "tokenizer")
    hf.save_pretrained(folder / "model", base, model.frozen, folder / "tokenizer")
    peft.save_adapter(folder / "adapter", model.config.lora, model.params, None)
    np.savez(
        folder / "rows.npz",
        tokens=rows.tokens,
        mask=padded_mask(rows),
        target_tokens=wanted.tokens,
        target_mask=padded_mask(wanted),
        nu=NU,
        proj_dim=_PROJ_DIM.value,
    )


class Peer:
    """DataFlex's selector in a process of its own."""

    def __init__(self, folder: Path):
        command = [_PEER.value, str(Path(__file__).with_name("less_peer.py")), str(folder)]
        self._log = folder / "peer.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.versions = self._answer()

    def run(self, count: int) -> dict[str, Any]:
        """Seconds and scores of a pass over the first `count` candidates."""
        self._process.stdin.write(f"go {count}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._process.wait()
        why = (self._log.read_text().strip() or f"code {self._process.returncode}").splitlines()[-1]
        raise InputError(f"it fails ({why}); see third_party/dataflex/README.md", option="--peer_python")


def our_pass(signals: ModelSignals, **options: Any) -> tuple[float, np.ndarray]:
    """(seconds, scores) of the selector on all candidates."""
    selector = less(group_agg="mean", **options)
    request = Request(jnp.int32(1), jnp.int32(1), jax.random.key(0))
    started = time.perf_counter()
    evidence, _ = selector.score({}, signals, request)
    return time.perf_counter() - started, np.asarray(evidence.rows)


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    if _PEER.value is None:
        raise InputError("--peer_python is missing; third_party/dataflex/README.md says how to make its environment")
    shape = {
        "hidden_size": _HIDDEN.value,
        "intermediate_size": 11 * _HIDDEN.value // 4,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    lora = LoraConfig(rank=8, base_dtype="float32")
    cfg = ModelConfig(architecture="qwen2", **shape, dtype="float32", param_dtype="float32", remat="none", lora=lora)
    model = Model.random(cfg, jax.random.key(0)).training(parts.is_adapter)
    # Away from B = 0, where half of the gradients vanish.
    adapters = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), model.params)
    model = model.with_params(adapters)
    rows, wanted = random_rows(_CANDIDATES.value, 4096, 0), random_rows(_TARGETS.value, 4096, 1, languages=1)

    config = base.get_config()
    config.optim.update(b2=0.999)
    opt_state = adamw(config.optim, optax.constant_schedule(1e-4)).init(adapters)
    opt_state = optax.tree_utils.tree_set(opt_state, nu=jax.tree.map(lambda x: jnp.full_like(x, NU), adapters))
    mesh = make_mesh({"fsdp": -1})
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        write_for_peer(Path(folder), model, rows, wanted)
        peer = Peer(Path(folder))
        pool, target_pool = Pool([domain("pool", rows)]), Pool([domain("targets", wanted)])
        target_set = TargetSet(target_pool, np.arange(wanted.num_rows), np.zeros(wanted.num_rows, int), ("targets",))
        adam = AdamState(opt_state, config.optim.b1, config.optim.b2, config.optim.eps)
        targets = target_set, source(target_pool, mesh)
        signals = ModelSignals(Subject(model, adam), Sweeper(mesh), source(pool, mesh), targets)
        run = functools.partial(our_pass, signals, projection=_PROJECTION.value, proj_dim=_PROJ_DIM.value)
        compiling, scores = run()
        exact = our_pass(signals, projection="none")[1]
        peer.run(2)
        rounds = [(run()[0], peer.run(_PEER_CANDIDATES.value)) for _ in range(_ROUNDS.value)]
        peer.close()
    ours = [(_CANDIDATES.value + _TARGETS.value) / seconds for seconds, _ in rounds]
    theirs = [(_PEER_CANDIDATES.value + _TARGETS.value) / answer["seconds"] for _, answer in rounds]
    of_peer = np.array(rounds[-1][1]["scores"])
    result = {
        **results.describe(run_config.resolved(config)),
        "peer_versions": {"dataflex": "1.1.0", **peer.versions},
        "model": shape,
        "trained": "LoRA, rank 8, all linear layers",
        "projection": _PROJECTION.value,
        "proj_dim": _PROJ_DIM.value,
        "longest_row": _LENGTH.value,
        "rounds": _ROUNDS.value,
        "first_pass_seconds": compiling,
        "examples_per_second": {"ours": results.spread(ours), "peer": results.spread(theirs)},
        "ours_over_peer": results.spread([mine / other for mine, other in zip(ours, theirs, strict=True)]),
        "rank_correlation_with_exact": {
            "ours": float(spearmanr(scores[: len(of_peer)], exact[: len(of_peer)])[0]),
            "peer": float(spearmanr(of_peer, exact[: len(of_peer)])[0]),
        },
    }
    print(f"examples/s: ours {np.median(ours):.1f}, peer {np.median(theirs):.2f}")
    print(f"ours / peer: {result['ours_over_peer']['median']:.1f}")
    print(f"rank correlation with exact scores, of the rows that both score: {result['rank_correlation_with_exact']}")
    results.write(_OUTPUT.value, result)


if __name__ == "__main__":
    cli.run(main)
