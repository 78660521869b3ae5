"""The shape of a decoder, with Hugging Face's own field names, and how to run it."""

import dataclasses
import math

from dataflex_jax.errors import InputError
from dataflex_jax.models import families
from dataflex_jax.models.checks import check_bool, check_choice, check_not_negative, check_positive
from dataflex_jax.models.layout import ATTENTION_MODULES, EXPERT_MODULES, LORA_MODULES

DTYPES = ("bfloat16", "float32")
REMAT_POLICIES = ("none", "full", "dots", "attention")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "cudnn")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Of a mixture of experts; None in a dense model.
EXPERT_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "router_z_loss_coef",
)
# Far beyond any model: what is larger was written by mistake, and only listing the tensors would take all memory.
LARGEST = {
    "vocab_size": 1 << 26,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 13,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
    "num_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 22,
    "shared_expert_intermediate_size": 1 << 22,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The "llama3" stretching of rotary embeddings: frequencies with wavelengths beyond the original context slow down.

    Attributes:
        factor: by how much the slowest frequencies are divided.
        low_freq_factor: wavelengths above original_max_position_embeddings / low_freq_factor are divided by `factor`.
        high_freq_factor: wavelengths below original_max_position_embeddings / high_freq_factor stay as they are.
        original_max_position_embeddings: the context, in tokens, before stretching.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_positive(f"rope_scaling.{field.name}", getattr(self, field.name), field.type)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"model rope_scaling.high_freq_factor={self.high_freq_factor}: "
                f"must be above low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + scale * B A dropout(x), W frozen.

    Attributes:
        rank: r, the inner width of the factors.
        alpha: numerator of the scale; None: 2 * rank.
        dropout: share of an adapter's inputs that are zeroed while training.
        use_rslora: scale = alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732).
        target_modules: names of linear layers of the blocks, or "all" among them for all seven; kept in the order of
            `LORA_MODULES`. Of a mixture of experts "all" are those of the attention; by name the others are each
            expert's, which have an adapter of their own (a shared expert has none).
        base_dtype: of the frozen parameters.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ("all",)
    base_dtype: str = "bfloat16"

    def __post_init__(self):
        check_positive("lora rank", self.rank, int, LARGEST["hidden_size"])
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        check_positive("lora alpha", self.alpha, float)
        object.__setattr__(self, "alpha", float(self.alpha))
        check_bool("lora use_rslora", self.use_rslora)
        if not 0 <= self.dropout < 1:
            raise InputError(f"model lora dropout={self.dropout!r}: must be a number >= 0 and < 1")
        check_choice("lora base_dtype", self.base_dtype, DTYPES)
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise InputError(f"model lora target_modules={self.target_modules!r}: must be a tuple of names")
        for name in self.target_modules:
            check_choice("lora target_modules", name, ("all", *LORA_MODULES))
        everything = "all" in self.target_modules
        object.__setattr__(self, "_all", everything)
        object.__setattr__(
            self, "target_modules", tuple(m for m in LORA_MODULES if everything or m in self.target_modules)
        )

    def of_mixture(self, architecture: str) -> "LoraConfig":
        """The adapters of a mixture of experts: "all" are those of the attention.

        Raises:
            InputError: dropout of experts' adapters, to which rows come in no order of their own.
        """
        if self._all:
            return dataclasses.replace(self, target_modules=ATTENTION_MODULES)
        for name in self.target_modules:
            if name in EXPERT_MODULES and self.dropout > 0:
                raise InputError(
                    f"model lora target_modules={name!r}: adapters of the experts of {architecture!r} have no dropout; "
                    f"lora dropout={self.dropout} must be 0"
                )
        return self

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder: Hugging Face's fields, then how this framework runs it. Hashable, so it may be a static argument.

    Left as None, `head_dim` is hidden_size / num_attention_heads, `num_key_value_heads` is num_attention_heads,
    `attention_bias` and `qk_norm` are what the family has, and so are the fields of a mixture of experts.

    Attributes:
        architecture: the name of a family in `families` (Hugging Face's model_type).
        rope_scaling: None or the "llama3" parameters.
        attention_bias: biases of the q, k and v projections; where the family has it so also of the output projection.
        qk_norm: RMSNorm over each head of the queries and keys.
        sliding_window: None, or how many keys a query sees, itself included, in every layer.
        num_experts: of a mixture of experts, in each block. None, as the fields to come, in a dense model.
        num_experts_per_tok: how many of them a token is routed to.
        moe_intermediate_size: the width of an expert, where the family has that field; else it is intermediate_size.
        shared_expert_intermediate_size: the width of the expert that all tokens go through, where the family has one.
        norm_topk_prob: the probabilities of the chosen experts are divided by their sum.
        router_aux_loss_coef: what the load-balancing loss is multiplied by when it is added to the training loss.
        router_z_loss_coef: as much of the mean squared logsumexp of the router's logits (Zoph et al. 2022,
            https://arxiv.org/abs/2202.08906); no family has it by itself.
        initializer_range: standard deviation of random kernels and embeddings.
        dtype: of the activations and matmuls; norms, softmax, rotary embeddings and losses are float32.
        param_dtype: of the stored parameters.
        remat: what the backward pass recomputes: "none" (only casts and weight gathers; in half precision all but
            products), "dots" (all but the outputs of the projections and of cuDNN's attention), "attention" (all but
            the q, k, v projections and the attention output), "full" (the block).
        scan_layers: the layers are one program in a loop, which compiles several times faster; False: in the train step
            they are written out one after the other, which saves copies on GPUs. See `depth`.
        attention: "auto" (cuDNN where it is valid, else XLA), "xla" or "cudnn".
        lora: adapters of the blocks' linear layers, whose factors are parameters beside each kernel; None: none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None
    qk_norm: bool | None = None
    sliding_window: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: float | None = None
    router_z_loss_coef: float | None = None
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"
    scan_layers: bool = True
    attention: str = "auto"
    lora: LoraConfig | None = None

    def __post_init__(self):
        family = self.family
        for name in REQUIRED:
            check_positive(name, getattr(self, name), int, LARGEST[name])
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "attention_bias": family.attention_bias or False,
            "qk_norm": family.qk_norm,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        for name in ("num_key_value_heads", "head_dim"):
            check_positive(name, getattr(self, name), int, LARGEST[name])
        check_positive("max_position_embeddings", self.max_position_embeddings, int)
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            check_positive(name, getattr(self, name), float)
        if self.sliding_window is not None:
            check_positive("sliding_window", self.sliding_window, int)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model num_key_value_heads={self.num_key_value_heads}: "
                f"must divide num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"model head_dim={self.head_dim}: rotary embeddings need an even number")
        for name in ("tie_word_embeddings", "attention_bias", "scan_layers"):
            check_bool(name, getattr(self, name))
        check_choice("hidden_act", self.hidden_act, ("silu",))
        check_choice("qk_norm", self.qk_norm, (family.qk_norm,))
        if family.attention_bias is not None:
            check_choice("attention_bias", self.attention_bias, (family.attention_bias,))
        if not family.window.supported:
            check_choice("sliding_window", self.sliding_window, (None,))
        self._check_experts()
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("param_dtype", self.param_dtype, DTYPES)
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)

    def _check_experts(self):
        experts = self.family.experts
        if experts is None:
            for name in EXPERT_FIELDS:
                check_choice(name, getattr(self, name), (None,))
            return
        defaults = {"norm_topk_prob": experts.norm_topk_prob or False, "router_z_loss_coef": 0.0}
        for name, value in (dict(self.family.defaults) | defaults).items():
            if name in EXPERT_FIELDS and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        widths = {"moe_intermediate_size": experts.own_width, "shared_expert_intermediate_size": experts.shared}
        for name in (*EXPERT_FIELDS[:2], *widths):
            if widths.get(name, True):
                check_positive(name, getattr(self, name), int, LARGEST[name])
            else:
                check_choice(name, getattr(self, name), (None,))
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"model num_experts_per_tok={self.num_experts_per_tok}: must be at most num_experts={self.num_experts}"
            )
        check_bool("norm_topk_prob", self.norm_topk_prob)
        if experts.norm_topk_prob is not None:
            check_choice("norm_topk_prob", self.norm_topk_prob, (experts.norm_topk_prob,))
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            check_not_negative(name, getattr(self, name))
        if self.lora is not None:
            object.__setattr__(self, "lora", self.lora.of_mixture(self.architecture))

    @property
    def family(self) -> families.Family:
        """The record of the architecture."""
        return families.family(self.architecture)

    @property
    def mixture(self) -> str | None:
        """The name of the blocks' mixture of experts among the parameters; None: a dense model."""
        return None if self.family.experts is None else self.family.experts.block

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias and self.family.output_bias

    @property
    def expert_width(self) -> int:
        """Of each expert that tokens are routed to."""
        return self.moe_intermediate_size or self.intermediate_size

    def num_params(self) -> int:
        """How many numbers the parameters hold, without adapters; tied embeddings count once."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        block = self._block_matmul_params(self.num_experts) + 2 * self.hidden_size
        block += (query + 2 * key_value) * self.attention_bias + self.hidden_size * self.output_bias
        block += sum(self.qk_norm_widths()) * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * block + embeddings + self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs to train on one token of a row of `seq_len` tokens: forward and backward, nothing recomputed.

        6 * M + 12 * num_hidden_layers * num_attention_heads * head_dim * k, where M counts the weights that are
        multiplied (the projections, the MLP or the router and the experts that a token is routed to, the output head,
        not the embedding lookup) and k is the mean number of keys that a query sees: (seq_len + 1) / 2 under the causal
        mask, fewer with a sliding window. With adapters 4 * M + 6 * (numbers in the adapters) takes the place of 6 * M:
        frozen weights have no gradient.
        """
        window = min(self.sliding_window or seq_len, seq_len)
        mean_keys = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
        block = self._block_matmul_params(self.num_experts_per_tok)
        matmul_params = self.num_hidden_layers * block + self.vocab_size * self.hidden_size
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * mean_keys
        if self.lora is None:
            return 6 * matmul_params + attention
        return 4 * matmul_params + 6 * self._lora_params(self.num_experts_per_tok) + attention

    def num_lora_params(self) -> int:
        """How many numbers the adapters hold."""
        return 0 if self.lora is None else self._lora_params(self.num_experts)

    def _lora_params(self, experts: int | None) -> int:
        """The numbers of the adapters, with those of so many of the experts."""
        widths, total = self.adapter_widths(), 0
        for name in self.lora.target_modules:
            total += sum(widths[name]) * (experts if name not in self.linear_widths() else 1)
        return self.num_hidden_layers * self.lora.rank * total

    def adapter_widths(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of what may have an adapter, by its name in `LORA_MODULES`; of experts, of each."""
        hidden, width = self.hidden_size, self.expert_width
        experts = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        return experts | self.linear_widths()

    def linear_widths(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a block, experts aside, by its name in `LORA_MODULES`."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (query, hidden),
        }
        if self.family.experts is not None:
            return attention
        return attention | {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}

    def qk_norm_widths(self) -> tuple[int, int]:
        """Of the norms of the queries and of the keys."""
        if self.family.qk_norm_over_heads:
            return self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.head_dim, self.head_dim

    def _block_matmul_params(self, experts: int | None) -> int:
        """The weights of a block's products, with so many of the experts."""
        dense = sum(inputs * outputs for inputs, outputs in self.linear_widths().values())
        if experts is None:
            return dense
        mixture = 3 * experts * self.expert_width + self.num_experts
        if self.shared_expert_intermediate_size is not None:
            mixture += 3 * self.shared_expert_intermediate_size + 1
        return dense + self.hidden_size * mixture


def check_mixture(model: ModelConfig, reason: str) -> None:
    """Refuses a dense model.

    Args:
        model: the configuration.
        reason: why, of a dense model.

    Raises:
        InputError: says the reason and which families are mixtures of experts.
    """
    if model.family.experts is None:
        mixtures = [repr(name) for name in families.names() if families.family(name).experts is not None]
        raise InputError(
            f"model architecture={model.architecture!r} is dense and {reason}; accepted: {', '.join(mixtures)}"
        )


def check_experts(model: ModelConfig, devices: int) -> None:
    """Refuses to split experts over devices where there are none, or where some device would have more than others.

    Args:
        model: the configuration.
        devices: the size of the mesh's axis "expert".

    Raises:
        InputError: names the axis.
    """
    if devices == 1:
        return
    reason = None
    if model.family.experts is None:
        reason = f"model architecture={model.architecture!r} is dense and has no experts to split; must be 1"
    elif model.num_experts % devices:
        reason = f"must divide the model's num_experts={model.num_experts}"
    if reason is not None:
        raise InputError(reason, option="mesh.expert", value=devices)
