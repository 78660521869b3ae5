"""Random configurations: recipes with some fields set to what is right, nearly right, or nonsense."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.configs import base
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import weighter_sections

NUMBERS = [0, 1, 2, 3, 7, 16, 128, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**63, 10**300, 0.0, 0.3, 0.5, 1.0, 2.5, -0.5]
NUMBERS += [1e-300, 1e300, math.nan, math.inf, -math.inf, True, False, 1j, np.float32(0.5), np.int64(3), np.bool_(True)]
TEXTS = ["", " ", "\0", "\ud800", "é" * 300, "~nobody/x", "$HOME/x", "$NOPE/x"]
_WORDS = "a None 0 ../x ~ ~/x .. x.json x.npy x.jsonl field: field:topic json json.decoder a/b train:1 uniform"
_WORDS += " natural linear cosine constant adam sgd sketch none mean last high official cached model sampling"
_WORDS += " alpaca mmlu local hub dataset_info builtin"
TEXTS += _WORDS.split()
TUPLES = [(), ("a",), ("a", "a"), ("a", "b"), ("",), (1,), (1, 2), (2, 1), (0.5, 0.5), (0.2, 0.3, 0.5), (0.0, 0.0, 0.0)]
TUPLES += [("a", 1), (None,), (True, False), ((),), (math.nan, 1.0), (1e300, 1.0), (2**40, 1), ("held_out",), ([], [])]
TUPLES += [(("a", 0.5), ("b", 0.25), ("c", 0.25)), (("a", 0.5), ("a", 0.5)), (("a", "b"),), [1, 2], ["a"], [], [[1]]]
OTHERS = [None, {}, {"a": 1}, {"a": 0.5, "b": 0.25, "c": 0.25}, {"a": "b"}, b"x", {1, 2}, frozenset("ab"), object]
OTHERS += [Path("x")]
KINDS = {kind: registry.names(kind) for kind in registry.KINDS}
KINDS["weighter"] += ("adapt+loss", "loss+rho1")


class Change(NamedTuple):
    """A field, by its dotted name, and what it is set to."""

    name: str
    value: Any


@st.composite
def choices(draw: st.DrawFn, most_changes: int = 4) -> tuple[str, list[Change]]:
    """The argument of `base.get_config`, random policies, and what to set some of its fields to."""
    chosen = {kind: draw(st.sampled_from(names)) for kind, names in KINDS.items() if draw(st.booleans())}
    variant = ",".join(f"{kind}={name}" for kind, name in chosen.items())
    names = draw(st.lists(st.sampled_from(_places(base.get_config(variant))), max_size=most_changes))
    values = st.sampled_from([*NUMBERS, *TEXTS, *TUPLES, *OTHERS])
    return variant, [Change(name, draw(values)) for name in names]


def made(variant: str, changes: Sequence[Change]) -> ConfigDict:
    """The configuration that `choices` has drawn."""
    config = base.get_config(variant).unlock()
    for section in (config.mixer or {}, config.selector or {}, *weighter_sections(config).values()):
        if "reference" in section:
            section.reference = "runs/reference"  # or else it would always be refused
    change(config, changes)
    return config


def change(config: ConfigDict, changes: Sequence[Change]) -> None:
    """Sets the fields to the values."""
    for name, value in changes:
        _set(config, name, value)


def _places(config: ConfigDict) -> list[str]:
    names = [name for name, _ in configuration.fields(config)]
    sections = {kind: config[kind] for kind in ("mixer", "selector", "order") if config[kind]}
    sections |= weighter_sections(config)
    # Half of them: what policies take is as often wrong as what all else takes.
    names += [*sections, *registry.KINDS]
    return names + [f"{option}.{field}" for option, section in sections.items() for field in section] * 4


def _set(config: ConfigDict, name: str, value: Any) -> None:
    *path, field = name.split(".")
    for part in path:
        if not isinstance(config, ConfigDict) or part not in config:
            return  # a change before this one has put something else there
        config = config[part]
    if isinstance(config, ConfigDict):
        with config.ignore_type():
            config[field] = value
