"""The shape of a decoder, with Hugging Face's own field names, and how to run it."""

import dataclasses
import math

from dataflex_jax.errors import InputError
from dataflex_jax.models import families
from dataflex_jax.models.checks import check_bool, check_choice, check_positive
from dataflex_jax.models.layout import LORA_MODULES

DTYPES = ("bfloat16", "float32")
REMAT_POLICIES = ("none", "full", "dots", "attention")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "cudnn")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Far beyond any model: what is larger was written by mistake, and only listing the tensors would take all memory.
LARGEST = {
    "vocab_size": 1 << 26,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 13,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
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
            `LORA_MODULES`.
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
        object.__setattr__(
            self, "target_modules", tuple(m for m in LORA_MODULES if everything or m in self.target_modules)
        )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder: Hugging Face's fields, then how this framework runs it. Hashable, so it may be a static argument.

    Left as None, `head_dim` is hidden_size / num_attention_heads, `num_key_value_heads` is num_attention_heads, and
    `attention_bias` and `qk_norm` are what the family has.

    Attributes:
        architecture: the name of a family in `families` (Hugging Face's model_type).
        rope_scaling: None or the "llama3" parameters.
        attention_bias: biases of the q, k and v projections; where the family has it so also of the output projection.
        qk_norm: RMSNorm over each head of the queries and keys.
        sliding_window: None, or how many keys a query sees, itself included, in every layer.
        initializer_range: standard deviation of random kernels and embeddings.
        dtype: of the activations and matmuls; norms, softmax, rotary embeddings and losses are float32.
        param_dtype: of the stored parameters.
        remat: what the backward pass recomputes: "none" (only casts and weight gathers), "dots" (all but the outputs of
            the projections and of cuDNN's attention), "attention" (all but the q, k, v projections and the attention
            output), "full" (the block).
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
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"
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
        for name in ("tie_word_embeddings", "attention_bias"):
            check_bool(name, getattr(self, name))
        check_choice("hidden_act", self.hidden_act, ("silu",))
        check_choice("qk_norm", self.qk_norm, (family.qk_norm,))
        if family.attention_bias is not None:
            check_choice("attention_bias", self.attention_bias, (family.attention_bias,))
        if not family.window.supported:
            check_choice("sliding_window", self.sliding_window, (None,))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("param_dtype", self.param_dtype, DTYPES)
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)

    @property
    def family(self) -> families.Family:
        """The record of the architecture."""
        return families.family(self.architecture)

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias and self.family.output_bias

    def num_params(self) -> int:
        """How many numbers the parameters hold, without adapters; tied embeddings count once."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        block = self._block_matmul_params() + 2 * self.hidden_size
        block += (query + 2 * key_value) * self.attention_bias + self.hidden_size * self.output_bias
        block += 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * block + embeddings + self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs to train on one token of a row of `seq_len` tokens: forward and backward, nothing recomputed.

        6 * M + 12 * num_hidden_layers * num_attention_heads * head_dim * k, where M counts the weights that are
        multiplied (the projections, the MLP, the output head, not the embedding lookup) and k is the mean number of
        keys that a query sees: (seq_len + 1) / 2 under the causal mask, fewer with a sliding window. With adapters
        4 * M + 6 * (numbers in the adapters) takes the place of 6 * M: frozen weights have no gradient.
        """
        window = min(self.sliding_window or seq_len, seq_len)
        mean_keys = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
        matmul_params = self.num_hidden_layers * self._block_matmul_params() + self.vocab_size * self.hidden_size
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * mean_keys
        if self.lora is None:
            return 6 * matmul_params + attention
        return 4 * matmul_params + 6 * self.num_lora_params() + attention

    def num_lora_params(self) -> int:
        """How many numbers the adapters hold."""
        if self.lora is None:
            return 0
        widths = self.linear_widths()
        return self.num_hidden_layers * self.lora.rank * sum(sum(widths[name]) for name in self.lora.target_modules)

    def linear_widths(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a block, by its name in `LORA_MODULES`."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, mlp),
            "up_proj": (hidden, mlp),
            "down_proj": (mlp, hidden),
        }

    def _block_matmul_params(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linear_widths().values())
