"""A model with its parameters, those that are trained apart from those that are not."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dataflex_jax.models import decoder, lora
from dataflex_jax.models.config import ModelConfig, check_mixture
from dataflex_jax.models.decoder import NO_HOOKS, Decoded, Hooks
from dataflex_jax.models.parts import combined, split


class Inputs(Protocol):
    """What a model reads of a batch.

    Attributes:
        tokens: ids; the first T are read, the last T predicted.
        positions: of packed rows, of an input in its example; None: its place in the row.
        segment_ids: of packed rows, of the example that an input belongs to; None: a row is one text.
        most_segments: of packed rows, how many different ids a row has at most; None: unknown.
    """

    tokens: Int[Array, "B T+1"]
    positions: Int[Array, "B T"] | None
    segment_ids: Int[Array, "B T"] | None
    most_segments: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its parameters; a pytree of these, the rest is static.

    Derivatives are taken with respect to `params`, which are all of the model's or, with adapters and other selections,
    those that are trained; `frozen` are the others. Nothing else knows how the two make a whole.

    Attributes:
        config: the model's shape.
        graphdef: its static part, from `decoder.create`.
        params: the trained parameters; None: the shape alone.
        frozen: the parameters beside them; None where all are trained.
    """

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    params: PyTree[Array] | None = None
    frozen: PyTree[Array] | None = None

    @classmethod
    def shape(cls, config: ModelConfig) -> "Model":
        """The model without parameters; computes nothing."""
        graphdef, _ = jax.eval_shape(lambda: decoder.create(config, jax.random.key(0)))
        return cls(config, graphdef)

    @classmethod
    def random(cls, config: ModelConfig, key: PRNGKeyArray) -> "Model":
        """The model with random weights, all of them trained; see `decoder.create`."""
        return cls(config, *decoder.create(config, key))

    def having(self, params: PyTree | None, frozen: PyTree | None = None) -> "Model":
        """The same model with other parameters, all of them."""
        return dataclasses.replace(self, params=params, frozen=frozen)

    def with_params(self, params: PyTree) -> "Model":
        """The same model with other trained parameters beside the same frozen ones."""
        return dataclasses.replace(self, params=params)

    def training(self, trained: Callable[[str], bool]) -> "Model":
        """The same model, of whose parameters those are trained whose paths `trained` accepts."""
        frozen, params = split(self.whole(), trained)
        return self.having(params, frozen or None)

    def whole(self) -> PyTree[Array]:
        """All parameters as one tree."""
        return combined(self.frozen, self.params)

    def without_adapters(self, dtype: str | None = None) -> "Model":
        """A model that computes the same without adapters, all of it trained; itself where it has none.

        Args:
            dtype: of the kernels that adapters were merged into, see `lora.merge`; None: what they had.
        """
        if self.config.lora is None:
            return self
        plain = Model.shape(dataclasses.replace(self.config, lora=None))
        return plain.having(lora.merge(self.whole(), self.config.lora, dtype))

    def token_losses(self, inputs: Inputs, hooks: Hooks = NO_HOOKS) -> Decoded:
        """Cross-entropy of every next token, and what predicted it; see `decoder.token_losses`."""
        return decoder.token_losses(
            self.graphdef,
            self.whole(),
            inputs.tokens,
            positions=inputs.positions,
            segment_ids=inputs.segment_ids,
            most_segments=inputs.most_segments,
            hooks=hooks,
        )

    def hidden_states(self, inputs: Inputs, hooks: Hooks = NO_HOOKS) -> Float[Array, "B T D"]:
        """The last hidden states of the inputs, after the final norm, in the compute dtype."""
        return self._hidden_states(inputs, hooks)[0]

    def of_layers(
        self, inputs: Inputs, numbers: Sequence[int], of_layer: Callable[[Float[Array, "B T D"]], PyTree]
    ) -> list[PyTree]:
        """`of_layer` of the hidden states of the inputs after some layers, in the compute dtype.

        Args:
            inputs: as for `hidden_states`.
            numbers: of the layers, from 1; the last one's hidden states are those after the final norm.
            of_layer: traced into the scan over the layers.
        """
        hidden, aux = self._hidden_states(inputs, NO_HOOKS._replace(of_layer=of_layer))
        last = self.config.num_hidden_layers
        return [
            of_layer(hidden) if number == last else jax.tree.map(lambda kept, n=number: kept[n - 1], aux["of_layer"])
            for number in numbers
        ]

    def of_routers(self, inputs: Inputs, of_router: Callable[[Float[Array, "B T E"]], PyTree]) -> PyTree:
        """`of_router` of the logits of each block's router, stacked over the blocks.

        Args:
            inputs: as for `hidden_states`.
            of_router: traced into the scan over the layers.

        Raises:
            InputError: a dense model.
        """
        check_mixture(self.config, "has no routers to look at")
        return self._hidden_states(inputs, NO_HOOKS._replace(of_router=of_router))[1]["of_router"]

    def _hidden_states(self, inputs: Inputs, hooks: Hooks) -> tuple[Float[Array, "B T D"], PyTree]:
        return decoder.hidden_states(
            self.graphdef,
            self.whole(),
            inputs.tokens[:, :-1],
            positions=inputs.positions,
            segment_ids=inputs.segment_ids,
            most_segments=inputs.most_segments,
            hooks=hooks,
        )

    @property
    def head_is_frozen(self) -> bool:
        """Whether the output weight is a constant to derivatives."""
        head = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return head not in self.params
