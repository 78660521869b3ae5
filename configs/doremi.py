"""DoReMi (arXiv 2305.10429): three runs, each of which reads what the one before wrote. `scripts/doremi.py` runs all.

python -m dataflex_jax.train --config=configs/doremi.py:reference   # a small model on the reference proportions
python -m dataflex_jax.train --config=configs/doremi.py:proxy       # learns domain weights from its excess over it
python -m dataflex_jax.train --config=configs/doremi.py:target      # trains on the weights of the proxy
python -m dataflex_jax.train --config=configs/doremi.py:baseline    # the target's twin on the reference proportions

A scale may follow, and other policies: `proxy,local`, `proxy,slimpajama-6b` (see configs/scales.py; there the reference
and the proxy have the shape of Qwen2.5-0.5B), `proxy,local,weighter=loss`. The runs are looked for in runs/:
--config.mixer.reference=RUN_DIR and --config.mixer.proportions=RUN_DIR/domain_weights.json name others.
"""

from dataflex_jax.configs import base, scales
from dataflex_jax.errors import InputError

ROLES = ("reference", "proxy", "target", "baseline")


def get_config(variant: str = "proxy"):
    own, policies = base.split(variant, "proxy")
    role, _, scale = own.partition(",")
    if role not in ROLES:
        raise InputError(f"unknown variant {role!r} of the doremi recipe; known: {', '.join(ROLES)}")
    config = scales.get_config("doremi" if role == "proxy" else "static", f"{scale},{policies}")
    suffix = f"-{scale}" if scale else ""
    if role in ("reference", "proxy") and config.model.name_or_path is not None:
        config.model.name_or_path = "Qwen/Qwen2.5-0.5B"
    if config.mixer.name == "doremi":
        config.warmup_step = 0
        config.mixer.reference = f"runs/doremi-reference{suffix}"
    if role == "target" and config.mixer.name == "static":
        config.mixer.proportions = f"runs/doremi-proxy{suffix}/domain_weights.json"
    return config
