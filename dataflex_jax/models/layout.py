"""The parameters by name: how each is split over a mesh, and where it is in a checkpoint of Hugging Face or PEFT.

`TABLE` is the only place that knows these names together. A part of the model with parameters of its own needs rows
here, and is then placed, gathered, decayed, read and written as the others are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from dataflex_jax import sharding

LAYERS = "layers/"
_Axes = str | tuple[str, ...] | None  # mesh axes of a dimension
# Of the inputs of kernels whose outputs "tensor" does not split. Outputs over "fsdp" would have to be transposed after
# each gather, for the next product, and moments at each step.
_INPUTS = ("tensor", "fsdp")
FACTORS = ("lora_a", "lora_b")


class Row(NamedTuple):
    """A parameter.

    Attributes:
        path: its "/"-joined path.
        axes: the mesh axes of each dimension.
        hf: the name of the tensor in a checkpoint; of a parameter that is many tensors there, stacked here, with a "{}"
            for the index on each leading axis.
        linear: whether it is the kernel, or a factor of the adapter, of a linear layer of the blocks.
        float32: whether it is used in float32, not in the compute dtype.
    """

    path: str
    axes: P
    hf: str
    linear: bool = False
    float32: bool = False

    @property
    def kind(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def factor(self) -> str | None:
        """Which of `FACTORS` it is, of an adapter; None: it is of none."""
        return next((factor for factor in FACTORS if self.path.endswith(factor)), None)

    @property
    def stacked(self) -> int:
        """How many leading axes number tensors of a checkpoint."""
        return self.hf.count("{}")

    @property
    def matrix(self) -> bool:
        """Whether it multiplies something, other than scales and biases, which have one axis a tensor."""
        return len(self.axes) - self.stacked > 1

    @property
    def transposed(self) -> bool:
        """Whether it is [in, out] here and [out, in] in a checkpoint."""
        return self.matrix and self.kind != "embedding"

    @property
    def routed(self) -> bool:
        """Whether it is a weight of experts, each of which sees the tokens that are routed to it."""
        return "/experts/" in self.path

    @property
    def split_by_inputs(self) -> bool:
        """Of a linear layer's weight: whether a mesh splits its inputs, not its outputs, over "tensor"."""
        return (self.linear or self.routed) and self.axes[-2] in ("tensor", _INPUTS)


def _vector(path: str, axis: str | None, hf: str) -> Row:
    """The row of a vector of the blocks."""
    return Row(f"{LAYERS}{path}", P(None, axis), f"model.layers.{{}}.{hf}")


def _linear(path: str, hf: str, inputs: _Axes, outputs: _Axes, bias: bool = False) -> list[Row]:
    """The rows of a linear layer of the blocks, whose kernel's inputs and outputs are split over these axes."""
    # Adapters follow the kernel's channels over "tensor", where their activations are split anyway. They are whole on
    # "fsdp": next to the base they are small, and each layer would wait for up to 14 small gathers in both passes.
    tensor_in, tensor_out = ("tensor" if axes in ("tensor", _INPUTS) else None for axes in (inputs, outputs))
    kernel, adapter = f"model.layers.{{}}.{hf}", f"base_model.model.model.layers.{{}}.{hf}"
    return [
        Row(f"{LAYERS}{path}/kernel", P(None, inputs, outputs), f"{kernel}.weight", linear=True),
        *([_vector(f"{path}/bias", tensor_out, f"{hf}.bias")] if bias else []),
        Row(f"{LAYERS}{path}/lora_a", P(None, tensor_in, None), f"{adapter}.lora_A.weight", linear=True),
        Row(f"{LAYERS}{path}/lora_b", P(None, None, tensor_out), f"{adapter}.lora_B.weight", linear=True),
    ]


def _mixture(block: str, gate: str, up: str, down: str) -> list[Row]:
    """The rows of a router and of experts, whose layers have these names in a checkpoint."""

    # Whole experts where their number allows it: gathered, these lie as products want them. Adapters are split as well:
    # there are as many as experts.
    def experts(name: str, hf: str, inputs: str, outputs: str) -> list[Row]:
        path, hf = f"{layer}experts/{name}", f"{hf_layer}experts.{{}}.{hf}"
        tensor_in, tensor_out = (axis if axis == "tensor" else None for axis in (inputs, outputs))
        a, b = P(None, ("expert", "fsdp"), tensor_in, None), P(None, ("expert", "fsdp"), None, tensor_out)
        return [
            Row(path, P(None, ("expert", "fsdp"), inputs, outputs), f"{hf}.weight"),
            Row(f"{path}_lora_a", a, f"base_model.model.{hf}.lora_A.weight"),
            Row(f"{path}_lora_b", b, f"base_model.model.{hf}.lora_B.weight"),
        ]

    layer, hf_layer = f"{LAYERS}{block}/", f"model.layers.{{}}.{block}."
    return [
        Row(f"{layer}router/kernel", P(None, None, None), f"{hf_layer}gate.weight", linear=True, float32=True),
        *experts("gate_proj", gate, "fsdp", "tensor"),
        *experts("up_proj", up, "fsdp", "tensor"),
        *experts("down_proj", down, "tensor", "fsdp"),
    ]


def _plain(path: str, inputs: _Axes, outputs: _Axes) -> Row:
    """The row of a linear layer of the blocks that has neither a bias nor an adapter."""
    hf = path.replace("/", ".")
    return Row(f"{LAYERS}{path}/kernel", P(None, inputs, outputs), f"model.layers.{{}}.{hf}.weight", linear=True)


# The order of the linear layers is that of their dropout keys.
TABLE: tuple[Row, ...] = (
    Row("embed_tokens/embedding", P("tensor", "fsdp"), "model.embed_tokens.weight"),
    _vector("input_layernorm/scale", None, "input_layernorm.weight"),
    *_linear("attention/q_proj", "self_attn.q_proj", "fsdp", "tensor", bias=True),
    *_linear("attention/k_proj", "self_attn.k_proj", "fsdp", "tensor", bias=True),
    *_linear("attention/v_proj", "self_attn.v_proj", "fsdp", "tensor", bias=True),
    *_linear("attention/o_proj", "self_attn.o_proj", _INPUTS, None, bias=True),
    _vector("attention/q_norm/scale", None, "self_attn.q_norm.weight"),
    _vector("attention/k_norm/scale", None, "self_attn.k_norm.weight"),
    _vector("post_attention_layernorm/scale", None, "post_attention_layernorm.weight"),
    *_linear("mlp/gate_proj", "mlp.gate_proj", "fsdp", "tensor"),
    *_linear("mlp/up_proj", "mlp.up_proj", "fsdp", "tensor"),
    *_linear("mlp/down_proj", "mlp.down_proj", _INPUTS, None),
    *_mixture("mlp", "gate_proj", "up_proj", "down_proj"),
    _plain("mlp/shared_expert/gate_proj", "fsdp", "tensor"),
    _plain("mlp/shared_expert/up_proj", "fsdp", "tensor"),
    _plain("mlp/shared_expert/down_proj", _INPUTS, None),
    _plain("mlp/shared_expert_gate", None, None),
    *_mixture("block_sparse_moe", "w1", "w3", "w2"),
    Row("norm/scale", P(None), "model.norm.weight"),
    Row("lm_head/kernel", P("fsdp", "tensor"), "lm_head.weight"),
)
_ROWS = {row.path: row for row in TABLE}
# The linear layers of the blocks that may have an adapter, by module name: their rows by factor.
ADAPTERS: dict[str, dict[str, Row]] = {
    row.path.split("/")[-2]: {factor: _ROWS[row.path.removesuffix("lora_a") + factor] for factor in FACTORS}
    for row in TABLE
    if row.kind == "lora_a"
}
LORA_MODULES = tuple(ADAPTERS)
EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")
ATTENTION_MODULES = tuple(name for name in LORA_MODULES if f"{LAYERS}attention/{name}/kernel" in _ROWS)
_FLOAT32 = frozenset(row.path for row in TABLE if row.float32)
RULES: sharding.Rules = tuple((row.path, row.axes) for row in TABLE)


def row(path: str | KeyPath) -> Row:
    """The row of a parameter.

    Raises:
        KeyError: it has none.
    """
    if not isinstance(path, str):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
    return _ROWS[path]


def adapter(module: str, mixture: str | None = None) -> dict[str, Row]:
    """The rows of a module's adapter by factor.

    Args:
        module: one of `LORA_MODULES`.
        mixture: the block's mixture of experts, by its name among the parameters; None: a dense model.
    """
    if mixture is None or module not in EXPERT_MODULES:
        return ADAPTERS[module]
    return {factor: _ROWS[f"{LAYERS}{mixture}/experts/{module}_{factor}"] for factor in FACTORS}


def adapted_module(path: str | KeyPath) -> str:
    """The module, one of `LORA_MODULES`, of whose adapter this parameter is a factor."""
    found = row(path)
    return found.kind.removesuffix(f"_{found.factor}") if found.routed else found.path.split("/")[-2]


def in_blocks(path: str) -> bool:
    """Whether the parameter is a weight of a linear layer of the blocks or of their experts."""
    return is_linear(path) or (path in _ROWS and _ROWS[path].routed)


def is_linear(path: str) -> bool:
    """Whether the parameter is a weight of a linear layer of the blocks; adapters' factors are."""
    return path in _ROWS and _ROWS[path].linear


def param_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """`sharding.param_shardings` of parameters, or of optimizer state, by this table."""
    return sharding.param_shardings(mesh, tree, RULES)


def placed(mesh: Mesh, shapes: PyTree) -> PyTree:
    """`sharding.placed` by this table."""
    return sharding.placed(mesh, shapes, RULES)


def cast_weights(params: PyTree, dtype: jnp.dtype, prefix: str) -> PyTree:
    """`sharding.cast_weights` by this table."""
    return sharding.cast_weights(params, dtype, prefix, RULES, as_stored=_FLOAT32)


def gather_weights(params: PyTree, dtype: jnp.dtype, prefix: str) -> PyTree:
    """`sharding.gather_weights` by this table."""
    return sharding.gather_weights(params, dtype, prefix, RULES, as_stored=_FLOAT32)
