"""Reweighting: how much each row counts in the loss, while instruction tuning.

python -m dataflex_jax.train --config=configs/reweight.py              # by loss (Sow et al. 2025), a CPU, minutes
python -m dataflex_jax.train --config=configs/reweight.py:adapt        # by similarity to a target set
python -m dataflex_jax.train --config=configs/reweight.py:loss+adapt   # their product
python -m dataflex_jax.train --config=configs/reweight.py:adapt,lora --config.data.root=DIR --config.targets.root=MMLU

Also joint_update_aware, and rho1 with --config.weighter.reference=RUN_DIR.
"""

from dataflex_jax.configs import base, selection, sft
from dataflex_jax.errors import InputError


def get_config(variant: str = "loss"):
    own, policies = base.split(variant, "loss")
    weighters, _, scale = own.partition(",")
    scales = {"quickstart": sft.quickstart, "lora": selection.lora}
    if (scale or "quickstart") not in scales:
        raise InputError(f"unknown scale {scale!r} of the reweight recipe; known: {', '.join(scales)}")
    config = base.get_config(f"weighter={weighters},{policies}")
    scales[scale or "quickstart"](config)
    if scale == "lora" and any(name in weighters for name in ("adapt", "joint_update_aware")):
        config.targets.update(source="local", formatting="mmlu")
    return config
