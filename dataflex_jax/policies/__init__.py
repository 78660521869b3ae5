"""Data policies: pure functions over a state pytree that decide what the model trains on.

What a policy is written with is here and in `options`; docs/writing_a_policy.md shows how.
"""

from dataflex_jax.policies.base import (
    Choice,
    Evidence,
    Mixer,
    Observation,
    Order,
    RecordNumbers,
    Reference,
    Request,
    RowObservation,
    ScoreSource,
    Selector,
    Weighter,
)
from dataflex_jax.policies.registry import register_mixer, register_order, register_selector, register_weighter
from dataflex_jax.policies.signals import (
    TARGETS,
    Alignments,
    DomainGradients,
    Embeddings,
    GradientNorms,
    Gradients,
    Influences,
    Losses,
    Preconditioner,
    Projection,
    Signals,
)

__all__ = [
    "TARGETS",
    "Alignments",
    "Choice",
    "DomainGradients",
    "Embeddings",
    "Evidence",
    "GradientNorms",
    "Gradients",
    "Influences",
    "Losses",
    "Mixer",
    "Observation",
    "Order",
    "Preconditioner",
    "Projection",
    "RecordNumbers",
    "Reference",
    "Request",
    "RowObservation",
    "ScoreSource",
    "Selector",
    "Signals",
    "Weighter",
    "register_mixer",
    "register_order",
    "register_selector",
    "register_weighter",
]
