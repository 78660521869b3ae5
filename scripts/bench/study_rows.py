"""The rows of the study's two tables: which policies, with which fields, and what they cost beside training."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row.

    Attributes:
        label: its name for people.
        policies: as the argument of configs/base.py.
        fields: of the configuration, by dotted names; a number of steps may be a share of the run's, see `Share`.
        beside: what it takes beside training the model, in words.
    """

    label: str
    policies: str = ""
    fields: Mapping[str, Any] = {}  # nobody changes it
    beside: str = "-"


class Share(NamedTuple):
    """A number of steps as a part of the run's."""

    part: float

    def of(self, steps: int) -> int:
        return max(1, round(self.part * steps))


_BANDIT = {"warmup_step": Share(0.1), "update_step": 5}

PRETRAINING = {
    "static": Row("natural (static)"),
    "uniform": Row("uniform (static)", fields={"data.proportions": "uniform"}),
    "odm": Row("ODM, training reward", "mixer=odm", _BANDIT),
    "odm_validation": Row(
        "ODM, validation reward",
        "mixer=odm",
        _BANDIT | {"update_step": 10, "mixer.reward": "validation", "mixer.reward_scale": 10.0},
        "losses of the held-out rows that policies may look at, every 10 steps",
    ),
    "ado": Row(
        "ADO",
        "mixer=ado",
        {"update_step": Share(0.1), "mixer.ignore": Share(0.1), "mixer.smoothing": 4},
        "a fit of scaling laws every tenth of the run",
    ),
    "doge": Row("DoGE", "mixer=doge", {"update_step": 10}, "a gradient of each domain every 10 steps"),
    "doremi": Row("DoReMi", beside="a reference model, and a proxy for each model"),
    "loss_softmax": Row("loss_softmax", "mixer=loss_softmax", _BANDIT),
    "swarm": Row("the swarm's proposal", beside="one swarm for all models"),
}

_BY_INFLUENCE = "gradients of all candidates, one by one, at each of 2 updates"
_EMBEDDED = "embeddings of all candidates at each of 2 updates"
_LOSSES = "losses of all candidates at each of 2 updates"

INSTRUCTION = {
    "full": Row("full (no selection)"),
    "weigh_none": Row("rows weigh the same", "weighter=none"),
    "weigh_loss": Row("weighter loss", "weighter=loss"),
    "weigh_adapt": Row(
        "weighter adapt",
        "weighter=adapt",
        {"weighter.refresh_interval": Share(1 / 3)},
        "embeddings of the targets at each of 2 updates",
    ),
    "random": Row("random", "selector=random"),
    "loss": Row("loss", "selector=loss", beside=_LOSSES),
    "less": Row("LESS (exact)", "selector=less", {"selector.projection": "exact"}, _BY_INFLUENCE),
    "near": Row("NEAR", "selector=near", beside=_EMBEDDED),
    "rds": Row("RDS+", "selector=rds", beside=_EMBEDDED),
    "delta_loss": Row("delta_loss", "selector=delta_loss", beside=_LOSSES),
    "tsds": Row("TSDS", "selector=tsds", beside=_EMBEDDED),
    "icons": Row("ICONS", "selector=icons", {"selector.projection": "exact"}, _BY_INFLUENCE),
    "nice": Row(
        "NICE (token F1)",
        "selector=nice",
        {"selector.reward": "token_f1", "selector.mc_samples": 2, "selector.max_new_tokens": 16},
        f"{_BY_INFLUENCE}, and sampled responses to the targets",
    ),
}
ALONE = tuple(name for name, row in INSTRUCTION.items() if row.policies.startswith("selector="))
BASELINES = {"pretraining": "static", "instruction": "full"}
