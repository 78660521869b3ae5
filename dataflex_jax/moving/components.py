"""DataFlex's components as policies: what each parameter of a `components.yaml` is called here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dataflex_jax.moving.draft import Given


class Component(NamedTuple):
    """What a component is here.

    Attributes:
        policy: its name.
        fields: {parameter: (hyperparameter, the component's default)}.
        sets: hyperparameters that make the policy do as the component does.
        values: {parameter: {value: the value here}}, where these differ.
        only: {parameter: the one value that there is a counterpart of}.
        without_effect: parameters that the results do not depend on.
        compares: whether it compares with a target set.
        note: what behaves differently.
    """

    policy: str
    fields: Mapping[str, tuple[str, Any]] = {}
    sets: Mapping[str, Any] = {}
    values: Mapping[str, Mapping[Any, Any]] = {}
    only: Mapping[str, Any] = {}
    without_effect: tuple[str, ...] = ()
    compares: bool = False
    note: str | None = None

    def hyperparameters(self, given: Given, name: str) -> dict[str, Any]:
        """Those of the policy, of the parameters of a component called `name`."""
        for parameter in self.without_effect:
            given.raw(parameter)
        for parameter, value in self.only.items():
            if given.raw(parameter, value) != value:
                given.refuse(parameter, f"no counterpart here; accepted: {'null' if value is None else value}")
        found = dict(self.sets)
        for parameter, (field, default) in self.fields.items():
            if parameter in self.values:
                found[field] = given.one_of(parameter, self.values[parameter], default)
            elif isinstance(default, float):
                number = given.number(parameter, default)
                found[field] = float(number)
            else:
                found[field] = _plain(given.raw(parameter, default))
        if left := given.left():
            given.refuse(left[0], f"no parameter of {name}; accepted: {', '.join(self._accepted())}")
        return found

    def _accepted(self) -> list[str]:
        return sorted({*self.fields, *self.only, *self.without_effect})


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def _named(**names: str) -> dict[str, str]:
    """{a value there: the value here} of values here with their names there."""
    return {there: here for here, several in names.items() for there in several.split()}


_CLUSTERINGS = _named(
    kmeans="kmeans euclidean_kmeans",
    spherical_kmeans="spherical_kmeans cosine_kmeans",
    farthest_first="farthest_first kcenter k_center",
    random_projection_lsh="random_projection_lsh lsh rp_lsh",
    random_partition="random_partition random",
)
_REPRESENTATIVES = _named(
    random="random rand",
    nearest="nearest nearest_to_centroid center centroid",
    farthest="farthest farthest_from_centroid boundary",
    mixed="mixed mixed_center_boundary center_boundary",
)
_CACHE = ("cache_dir",)
_SCORING = (*_CACHE, "score_batch_size", "score_num_workers")
_GRADIENTS = {"gradient_type": ("gradient_type", "adam"), "seed": ("projection_seed", 42)}
_SAVING = (*_CACHE, "save_interval")

SELECTORS = {
    "less": Component("less", {**_GRADIENTS, "proj_dim": ("proj_dim", 8192)}, without_effect=_SAVING, compares=True),
    "icons": Component(
        "icons",
        {**_GRADIENTS, "proj_dim": ("proj_dim", 8192)},
        only={"task_boundaries": None},
        without_effect=_SAVING,
        compares=True,
        note="each dataset of eval_dataset votes",
    ),
    "cluster_less": Component(
        "cluster_less",
        {
            "gradient_type": ("gradient_type", "adam"),
            "proj_dim": ("proj_dim", 4096),
            "cluster_size": ("cluster_size", 64),
            "samples_per_cluster": ("samples_per_cluster", 3),
            "clustering_max_iter": ("kmeans_iterations", 20),
            "clustering_method": ("clustering", "kmeans"),
            "representative_strategy": ("representatives", "random"),
            "seed": ("cluster_seed", 42),
        },
        values={"clustering_method": _CLUSTERINGS, "representative_strategy": _REPRESENTATIVES},
        only={"num_clusters": None, "lsh_num_bits": None, "embedding_model_name_or_path": None, "embedding_layer": -1},
        without_effect=(*_SAVING, "clustering_batch_size", "assignment_chunk_size", "embedding_model_dtype"),
        compares=True,
    ),
    "loss": Component(
        "loss",
        {
            "focus": ("focus", "high"),
            "focus_weight": ("focus_weight", 5.0),
            "quantiles": ("quantiles", (0.33, 0.66)),
            "replacement": ("replacement", False),
            "temperature": ("temperature", 1.0),
        },
        without_effect=_SCORING,
    ),
    "delta_loss": Component(
        "delta_loss", {"window_size": ("window_size", 0.2)}, {"baseline": "warmup"}, without_effect=_SCORING
    ),
    "near": Component(
        "near",
        without_effect=(*_CACHE, "indices_path"),
        compares=True,
        note="neighbours are found by the model's embeddings, or config.selector.embedding_model's; no file is read",
    ),
    "tsds": Component(
        "tsds",
        without_effect=(*_CACHE, "probs_path"),
        compares=True,
        note="the plan is made of the model's embeddings, or config.selector.embedding_model's; no file is read",
    ),
    "coincide": Component(
        "coincide",
        {
            "num_clusters": ("num_clusters", 10000),
            "temperature": ("tau", 1.0),
            "clustering_max_iter": ("kmeans_iterations", 10),
            "seed": ("cluster_seed", 42),
        },
        only={"embedding_model_name_or_path": None, "embedding_layers": None, "single_member_density": 1.0},
        without_effect=(
            *_CACHE,
            "embedding_model_dtype",
            "clustering_batch_size",
            "clustering_num_workers",
            "clustering_device",
            "assignment_chunk_size",
            "density_chunk_size",
        ),
        note="of texts, without images",
    ),
    "random": Component("random", only={"replacement": False}, without_effect=(*_CACHE, "seed")),
}

MIXERS = {
    "random": Component(
        "random", without_effect=("seed",), note="the proportions are drawn anew at each update, not once for all"
    ),
    "odm": Component(
        "odm",
        {
            "alpha": ("alpha", 0.9),
            "reward_scale": ("reward_scale", 15.0),
            "min_exploration_rate": ("min_exploration_rate", 0.03),
            "initial_proportions": ("initial_proportions", None),
        },
        {"variant": "dataflex"},
        without_effect=("warmup_steps",),
        note="each row rewards its own domain; config.mixer.variant=official is the authors' own",
    ),
    "doremi": Component(
        "doremi",
        {
            "reference_model_path": ("reference", None),
            "reweight_eta": ("eta", 1.0),
            "reweight_eps": ("c", 1e-3),
        },
        {"sampling": "natural"},
        note="the domain weights are in the loss, and rows come in the initial proportions throughout",
    ),
}

WEIGHTERS = {
    "loss": Component(
        "loss",
        {"strategy": ("strategy", "linupper"), "delta": ("delta", 1.0)},
        values={
            "strategy": {
                "linupper": "linupper",
                "uniform": "linear",  # whose weights are exponential in the loss
                "quadratic": "quadratic",
                "extremes": "extremes",
            }
        },
    ),
    "adapt": Component(
        "adapt",
        {"tau": ("tau", 1.0), "refresh_interval": ("refresh_interval", 50), "clip": ("clip", None)},
        {"normalize": "sum", "tokens": "all"},
        without_effect=("anchor_batch_size", "eps"),
        compares=True,
        note="the loss grows with the batch, as there; config.weighter.normalize=mean keeps its scale",
    ),
    "joint_update_aware": Component(
        "joint_update_aware",
        {
            "beta": ("beta", 0.1),
            "tau": ("tau", 0.05),
            "fixed_point_iters": ("iterations", 5),
            "damping": ("damping", 1.0),
            "target_update_step": ("refresh_interval", 50),
            "objective_mode": ("objective", "full"),
            "pooling": ("pooling", "last_token"),
        },
        {"tokens": "all"},
        values={"pooling": {"last_token": "last", "mean_pool": "mean"}},
        only={"embed_normalize": True, "embed_layer": -1},
        without_effect=("target_batch_size", "target_num_batches"),
        compares=True,
        note="the target is the mean of all of eval_dataset, not of target_num_batches of it",
    ),
}

OWN = "a class of your own: docs/writing_a_policy.md says how it is written here"
MISSING = {
    "selector": {
        "custom": OWN,
        "nice": "its rewards come from a model that vLLM or a service runs; configs/nice.py has rewards of other kinds",
    },
    "mixer": {"dynamic_moe": "not converted; configs/dynamic_moe.py is its recipe here"},
    "weighter": {"custom": OWN},
}
