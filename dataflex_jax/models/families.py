"""Model families: what a Hugging Face model type is, beyond the fields that all of them have.

A family of the user's own, with this decoder's maths, is registered by a module that `config.plugins` names:

    from dataflex_jax.models import families

    families.register_family(families.Family(name="my_model", hf_class="MyModelForCausalLM"))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dataflex_jax.errors import InputError
from dataflex_jax.models.checks import check_bool, check_choice, check_positive, shown

# Fields that several families know or that rewrite their weights, with the only values this decoder computes; some
# embedding models were trained to see what comes after a token.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


class Window(NamedTuple):
    """How a family's config.json says how many keys a query sees, in every layer alike.

    Attributes:
        read: (config.json's fields) -> the window, or None.
        write: (the window or None, the number of layers) -> config.json's fields.
        supported: whether the family's own implementation has a window.
    """

    read: Callable[[Mapping[str, Any]], int | None]
    write: Callable[[int | None, int], dict[str, Any]]
    supported: bool = True


def _one_window(default: int | None) -> Callable[[Mapping[str, Any]], int | None]:
    """Reads "sliding_window", which has this default."""

    def read(hf: Mapping[str, Any]) -> int | None:
        window = hf.get("sliding_window", default)
        return _agreed(hf, window, _FULL if window is None else _SLIDING)

    return read


def _read_window_if_used(hf: Mapping[str, Any]) -> int | None:
    used = hf.get("use_sliding_window")
    check_bool("use_sliding_window", False if used is None else used)
    return _one_window(4096)(hf) if used else _agreed(hf, None, _FULL)


def _write_window_if_used(window: int | None, layers: int) -> dict[str, Any]:
    del layers
    return {"use_sliding_window": window is not None, "sliding_window": window}


def _read_no_window(hf: Mapping[str, Any]) -> int | None:
    return _agreed(hf, hf.get("sliding_window"), _FULL)


def _read_window_from_a_layer_on(hf: Mapping[str, Any]) -> int | None:
    layers, used, first = hf["num_hidden_layers"], hf.get("use_sliding_window"), hf.get("max_window_layers", 28)
    check_bool("use_sliding_window", False if used is None else used)
    window = hf.get("sliding_window", 4096) if used else None
    if window is None:
        first = layers
    elif first != 0:
        check_positive("max_window_layers", first, int)
    kind = _attention(hf, window, [_FULL if i < first else _SLIDING for i in range(layers)])
    return None if kind == _FULL else window


def _write_window_from_a_layer_on(window: int | None, layers: int) -> dict[str, Any]:
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": layers if window is None else 0,
    }


def _agreed(hf: Mapping[str, Any], window: int | None, implied: str) -> int | None:
    """The window, where layer_types says nothing else."""
    kind = _attention(hf, window, [implied])
    if kind != implied:
        raise InputError(f"model layer_types says {kind!r} and sliding_window={window}: they must agree")
    return window


def _attention(hf: Mapping[str, Any], window: int | None, implied: list[str]) -> str:
    """The attention that all layers have: what layer_types says, or else what the other fields imply."""
    given = hf.get("layer_types")
    if given is not None and not (isinstance(given, list) and given and all(isinstance(kind, str) for kind in given)):
        raise InputError(f"model layer_types={shown(given)}: must be a list of {_FULL!r} or {_SLIDING!r}, one a layer")
    kinds = set(implied if given is None else given)
    culprit = "max_window_layers" if given is None else "layer_types"
    if len(kinds) > 1:
        raise InputError(
            f"model {culprit}={shown(hf.get(culprit))}: layers that differ in attention; all must be alike"
        )
    kind = kinds.pop()
    check_choice(culprit, kind, (_FULL, _SLIDING)[: 1 if window is None else 2])
    return kind


NO_WINDOW = Window(_read_no_window, lambda window, layers: {}, supported=False)
ONE_WINDOW = Window(_one_window(4096), lambda window, layers: {"sliding_window": window})
ONE_WINDOW_OR_NONE = Window(_one_window(None), lambda window, layers: {"sliding_window": window})
WINDOW_IF_USED = Window(_read_window_if_used, _write_window_if_used)  # "use_sliding_window", in all layers
# "use_sliding_window", from the layer "max_window_layers" on; "layer_types" overrides both.
WINDOW_FROM_A_LAYER_ON = Window(_read_window_from_a_layer_on, _write_window_from_a_layer_on)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """How a family's blocks route tokens to experts; computed by `moe`.

    Attributes:
        block: the name of the mixture among the parameters, which `layout` knows.
        own_width: whether the width of an expert is "moe_intermediate_size"; else it is "intermediate_size".
        shared: whether every token goes through an expert of its own beside those it is routed to, times the sigmoid of
            a product.
        norm_topk_prob: whether the probabilities of the chosen experts are divided by their sum; None: as the field
            "norm_topk_prob" says.
    """

    block: str = "mlp"
    own_width: bool = False
    shared: bool = False
    norm_topk_prob: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models. All of them are computed by `decoder`.

    Attributes:
        name: Hugging Face's model_type.
        hf_class: Hugging Face's class of the model.
        defaults: what a config.json may leave out, by our field names, and the value that Hugging Face's configuration
            class then takes; 10000 for a "rope_theta" that is not here.
        attention_bias: whether the q, k and v projections have biases; None: as the field "attention_bias" says, which
            only these families have; not where it is left out.
        output_bias: whether, where these have biases, the attention's output projection has one too.
        qk_norm: RMSNorm over each head of the queries and keys.
        qk_norm_over_heads: that norm is over the channels of all heads together.
        experts: of a mixture of experts; None: a dense model.
        window: how the sliding window is read and written.
        neutral: fields with the only values that this decoder computes.
        names: config.json's names of our fields, where they differ, such as {"rope_theta": "rotary_emb_base"}.
    """

    name: str
    hf_class: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_bias: bool | None = None
    output_bias: bool = True
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    experts: Experts | None = None
    window: Window = NO_WINDOW
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=lambda: NEUTRAL)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Makes a family known under its name.

    Raises:
        InputError: another one has that name.
    """
    if _FAMILIES.setdefault(family.name, family) != family:
        raise InputError(f"model family {family.name!r} is registered already, as {_FAMILIES[family.name].hf_class}")


def family(name: Any, field: str = "architecture") -> Family:
    """The family of that name.

    Args:
        name: what the user gave.
        field: where, for messages.

    Raises:
        InputError: there is none; lists those that there are.
    """
    check_choice(field, name, names())
    return _FAMILIES[name]


def names() -> tuple[str, ...]:
    """The registered families, in the order of their registration."""
    return tuple(_FAMILIES)


register_family(
    Family(
        name="qwen2",
        hf_class="Qwen2ForCausalLM",
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        attention_bias=True,
        output_bias=False,
        window=WINDOW_FROM_A_LAYER_ON,
    )
)
register_family(
    Family(
        name="qwen3",
        hf_class="Qwen3ForCausalLM",
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
        qk_norm=True,
        window=WINDOW_FROM_A_LAYER_ON,
    )
)
register_family(Family(name="llama", hf_class="LlamaForCausalLM", defaults={"max_position_embeddings": 2048}))
register_family(
    Family(
        name="mistral",
        hf_class="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        attention_bias=False,
        window=ONE_WINDOW,
    )
)

# Every layer is a mixture of experts.
_SPARSE = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
register_family(
    Family(
        name="mixtral",
        hf_class="MixtralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        attention_bias=False,
        experts=Experts(block="block_sparse_moe", norm_topk_prob=True),
        window=ONE_WINDOW_OR_NONE,
        neutral=NEUTRAL | {"router_jitter_noise": (0,)},
        names={"num_experts": "num_local_experts"},
    )
)
register_family(
    Family(
        name="qwen2_moe",
        hf_class="Qwen2MoeForCausalLM",
        defaults={
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "router_aux_loss_coef": 0.001,
        },
        attention_bias=True,
        output_bias=False,
        experts=Experts(own_width=True, shared=True),
        window=WINDOW_IF_USED._replace(supported=False),
        neutral=NEUTRAL | _SPARSE | {"qkv_bias": (True,), "use_sliding_window": (False,)},
    )
)
register_family(
    Family(
        name="qwen3_moe",
        hf_class="Qwen3MoeForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "router_aux_loss_coef": 0.001,
        },
        qk_norm=True,
        experts=Experts(own_width=True),
        window=WINDOW_IF_USED,
        neutral=NEUTRAL | _SPARSE,
    )
)
register_family(
    Family(
        name="olmoe",
        hf_class="OlmoeForCausalLM",
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01,
        },
        qk_norm=True,
        qk_norm_over_heads=True,
        experts=Experts(),
        neutral=NEUTRAL | {"clip_qkv": (None,)},
    )
)
