"""What may be asked of a model about rows: signals as values, and where the answers come from.

A signal is a small hashable value that says what is wanted; a row set answers it by one sweep over its rows. The module
dataflex_jax/signals knows how each kind is computed, and a plugin registers kinds of its own there.

    losses = signals.candidates.sweep(Losses())
    gradients = signals.targets.sweep(Gradients(Projection("sketch", 8192)))
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

# (last hidden states [B, T, D], 1 where an input is no padding [B, T]) -> [B, E]
Embed = Callable[[Float[Array, "B T D"], Float[Array, "B T"]], Float[Array, "B E"]]


METHODS = ("sketch", "rademacher", "kronecker", "none")
EPS_MODES = ("outside", "inside")
PARAMETERS = ("blocks", "all")
LAYERS = ("last", "all")


class Projection(NamedTuple):
    """A random map from a gradient to `dim` numbers that keeps inner products; `signals.projections` has the maths.

    Attributes:
        method: one of `METHODS`; "none" keeps every number.
        dim: numbers an example has after the projection; "none" ignores it.
        seed: of the maps.
    """

    method: str = "sketch"
    dim: int = 8192
    seed: int = 0


class Preconditioner(NamedTuple):
    """How Adam's moments shape a row's gradient; see algorithm "less".

    Attributes:
        eps_mode: one of `EPS_MODES`; "outside": `m / (sqrt(v) + eps)`; "inside": `m / sqrt(v + eps)`.
        bias_correction: whether to divide the moments by `1 - b^t`.
    """

    eps_mode: str = "outside"
    bias_correction: bool = False


@dataclasses.dataclass(frozen=True)
class Losses:
    """Token-mean loss of each row in nats, [n]; NaN for a row without a token in the loss."""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """`embed` of each row's last hidden states, [n, E], or `then(embeddings, operand)`.

    Attributes:
        embed: hidden states and where inputs are no padding -> [B, E].
        whole: whether a row's last token, which is only predicted otherwise, is an input too.
        then: keeps only what is wanted of the E numbers [B, E] -> [B, ...]; traced into the sweep.
        layers: after which layers the hidden states are taken, each by itself: [n, M, E], and as much for `then`.
            Numbers from 1, or from -1 at the end, where they are the last hidden states; or how many evenly spaced
            layers (of L, the i-th of M is `i (L + 1) // (M + 1)`), all where there are fewer. None: the last hidden
            states alone, without that axis.
    """

    embed: Embed
    whole: bool = False
    then: Callable[[Float[Array, "B *M E"], PyTree], Float[Array, "B *F"]] | None = None  # noqa: F821 - a shape
    layers: tuple[int, ...] | int | None = None


@dataclasses.dataclass(frozen=True)
class FixedEmbeddings:
    """Embeddings of length 1 [n, E] that stay as they are while the model learns: another model's, or the user's own.

    They are made ready before the first step, so a policy that asks for them has them among its `needs`.

    Attributes:
        of: what the embedding model is asked; its hidden states are of all tokens of a row's text.
        model: the embedding model, a checkpoint with a tokenizer of its own; None: both files are given.
        target_prefix: text that the embedding model reads before each target.
        candidates: a file with the candidates' embeddings; None: they are the model's.
        targets: a file with the targets'.
    """

    of: Embeddings
    model: str | None = None
    target_prefix: str = ""
    candidates: str | None = None
    targets: str | None = None


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Each row's projected gradient of its token-mean loss [n, P], or `then(gradients, operand)`.

    Attributes:
        projection: from the trained parameters to P numbers; the same map for all row sets.
        adam: precondition by the optimizer's state; None: the plain gradient.
        then: keeps only what is wanted of the P numbers [B, P] -> [B, ...]; traced into the sweep.
        parameters: one of `PARAMETERS`; "blocks": the adapters where there are any, else the kernels of the blocks'
            linear layers, those of experts too; "all": all trained ones, embeddings, head, norms and biases too.
    """

    projection: Projection
    adam: Preconditioner | None = None
    then: Callable[[Float[Array, "B P"], PyTree], Float[Array, "B *F"]] | None = None  # noqa: F821 - a shape
    parameters: str = "blocks"


@dataclasses.dataclass(frozen=True)
class GradientNorms:
    """The norm of each row's gradient of its token-mean loss, [n].

    Attributes:
        parameters: see `Gradients`; of "blocks" no weight's gradient is formed.
    """

    parameters: str = "blocks"


@dataclasses.dataclass(frozen=True)
class Influences:
    """<g, D> / |g| of each row's gradient g along G directions D, exact, [n, G], or `then(influences)`.

    The sweep's operand has the directions, as `RowSet.gradient_sums` gives them, and thereby says with respect to which
    parameters. NaN where a row's gradient is zero or not finite.

    Attributes:
        adam: precondition g by the optimizer's state; None: the plain gradient.
        then: keeps only what is wanted of the G numbers [B, G] -> [B, ...]; traced into the sweep.
    """

    adam: Preconditioner | None = None
    then: Callable[[Float[Array, "B G"]], Float[Array, "B *F"]] | None = None  # noqa: F821 - a shape


@dataclasses.dataclass(frozen=True)
class Alignments:
    """<g, direction> of each row's gradient g, exact, [n, G]; the sweep's operand has the G directions stacked."""


@dataclasses.dataclass(frozen=True)
class GateLoads:
    """How many of each row's tokens every expert of a mixture of experts gets: [n, E], with "all" [n, L, E].

    All inputs count, those without a loss too; a token counts once for each expert that it is routed to.

    Attributes:
        layers: one of `LAYERS`: of the last block's router, or of every block's.
    """

    layers: str = "last"


@dataclasses.dataclass(frozen=True)
class Generations:
    """How responses are sampled from the model; see `models.generation.generate`.

    Attributes:
        samples: responses to each prompt.
        max_new_tokens: of a response, its stop token included.
        temperature: 0: the most likely response, which all samples then are.
        top_k: draw from this many most likely tokens; None: from all.
        top_p: draw from the most likely tokens that have this much probability; None: from all.
    """

    samples: int = 4
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None


class Task(NamedTuple):
    """A target as something to be answered.

    Attributes:
        place: in the target set.
        where: it comes from, for messages, such as "record 3 of 'algebra'".
        prompt: the text that its response follows, as the model reads it: with the template's words.
        reference: its own response.
    """

    place: int
    where: str
    prompt: str
    reference: str


class Exchange(NamedTuple):
    """A task with a response to it.

    Attributes:
        task: what was asked.
        response: what the model said, without the token that ends it.
        text: prompt and response with all of their control tokens.
    """

    task: Task
    response: str
    text: str


class Responses(NamedTuple):
    """What a model has answered to M targets, S times each.

    Attributes:
        rows: M * S rows, those of a target side by side: prompt and response, whose tokens alone count in the loss.
        lengths: tokens of each response that count, the one that ends it included.
        exchanges: of each row.
    """

    rows: "RowSet"
    lengths: Int[np.ndarray, "M S"]
    exchanges: Sequence[Exchange]


@dataclasses.dataclass(frozen=True)
class Targets:
    """Something that a policy needs: the target set."""


TARGETS = Targets()


@dataclasses.dataclass(frozen=True)
class Texts:
    """Something that a policy needs: the texts of rows, and no model."""


TEXTS = Texts()


@dataclasses.dataclass(frozen=True)
class Examples:
    """Something that a policy needs: one example a row, as for texts and embeddings, not several packed into one."""


EXAMPLES = Examples()


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Something that a policy needs: held-out rows of every domain."""


HELD_OUT = HeldOut()


@dataclasses.dataclass(frozen=True)
class Routers:
    """Something that a policy needs: a model that is a mixture of experts."""


ROUTERS = Routers()


@dataclasses.dataclass(frozen=True)
class WholeRows:
    """Something that a policy needs: trained weights that see whole rows, as all but those of routed experts do."""


WHOLE_ROWS = WholeRows()


class DomainGradients(NamedTuple):
    """Inner products of the gradients of each domain's mean loss, on fresh training rows.

    Attributes:
        gram: <g_i, g_j>.
        target: <g_i, g_target>, of the target set's mean loss; None without a target set.
        learning_rate: of the coming step.
    """

    gram: Float[Array, "K K"]
    target: Float[Array, " K"] | None
    learning_rate: Float[Array, ""]


class RowSet(Protocol):
    """Rows that signals are asked of.

    Attributes:
        num_rows: n.
        groups: group of each row, in [0, number of groups): the domain of training rows, the task of targets.
        group_names: of the groups.
    """

    num_rows: int
    groups: Int[np.ndarray, " n"]
    group_names: tuple[str, ...]

    def sweep(self, signal: Hashable, ids: Int[np.ndarray, " m"] | None = None, operand: PyTree = None) -> PyTree:
        """The signal of each row, as NumPy arrays with an entry a row, in order.

        Args:
            signal: what is wanted. Compiled once for each value.
            ids: places in the set; None: all.
            operand: arrays that the signal takes, such as directions.

        Raises:
            InputError: something is asked that this model does not have, such as Adam's moments of imported weights,
                or embeddings of packed rows, which have several examples each.
        """

    def texts(self) -> Iterator[str]:
        """The text of each row, in order, read as it is asked for; no model is.

        Raises:
            InputError: packed rows.
        """

    def gradient_sums(self, weights: Float[np.ndarray, "n G"], parameters: str = "blocks") -> PyTree:
        """The sum over rows of weight times gradient, for each of G columns of weights: directions for `Influences`.

        They stay on the devices, float32 and split like the parameters, a dict by parameter path of [G, ...]. A row
        whose weights are all 0 is not looked at.

        Args:
            weights: of the rows.
            parameters: see `Gradients`.
        """


class Signals(Protocol):
    """What a policy may ask of the model as it is now, in evaluation mode, between two steps.

    Rows of non-finite losses give non-finite entries.

    Attributes:
        candidates: the N training rows.
        targets: the target set, another set of rows in named groups, each with at least one; None without one.
        held_out: held-out rows, at most `config.eval_rows` of each domain, their groups being the K domains in order;
            None where no policy needs `HELD_OUT`.
        domains: the training rows domain by domain.
        checkpoints: (weight, signals) of each model that is asked; only this one, with weight 1, while training.
    """

    candidates: RowSet
    targets: RowSet | None
    held_out: RowSet | None
    domains: Sequence[RowSet]
    checkpoints: Sequence[tuple[float, "Signals"]]

    def room_for_directions(self, parameters: str = "blocks") -> int:
        """How many directions fit into a share of a device's memory; the same each time that it is asked.

        Args:
            parameters: see `Gradients`.
        """

    def tasks(self) -> Sequence[Task]:
        """Each target's own prompt and reference: of several responses in a row the last one.

        Raises:
            InputError: a target without a prompt or a response, by name.
        """

    def respond(self, generations: Generations, key: PRNGKeyArray) -> Responses:
        """Responses of the model to each target's own prompt.

        A response depends on its prompt, the key, the target's place and the sample's number: not on the batch.

        Args:
            generations: how they are sampled.
            key: of the draws.

        Raises:
            InputError: see `tasks`.
        """

    def judge(self, judge: str, exchanges: Sequence[Exchange]) -> Float[np.ndarray, " n"]:
        """What a sequence-classification model makes of responses: the sigmoid of its logit, softmax[-1] of several.

        It reads them as its own tokenizer and chat template write the target's conversation with the response in it;
        without a template, or of targets that are no conversations, the text.

        Args:
            judge: a Hugging Face folder or hub id.
            exchanges: with targets of this set.

        Raises:
            InputError: it cannot be read, is of a family that is not supported, or has no head; or its template refuses
                a conversation.
        """

    def domain_gradients(self) -> DomainGradients:
        """The inner products of the domains' gradients on some random rows each, other ones at every step."""
