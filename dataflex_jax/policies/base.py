"""The protocols that policies follow.

A policy is a small set of pure functions over a state pytree, in the manner of an optax transformation: a factory takes
the hyperparameters and returns a NamedTuple of functions. The train step calls those of mixers and weighters inside its
one jitted function; selectors and orders decide between two steps.

Protocols, states and whatever else is passed around are NamedTuples; what checks itself when it is made, such as a
group of options, is a frozen dataclass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

PyTree = Any


class Observation(NamedTuple):
    """What a policy sees of one optimizer step: by-products of the training forward pass over the global batch.

    B rows, T tokens a row, K domains. All statistics are float32 and cover every device, host and microbatch.

    Attributes:
        step: optimizer steps done, this one included (the first observation has step 1).
        steps_since_warmup: `step` minus the schedule's `warmup_step`; <= 0 during the warm-up.
        update: number, from 0, of the last scheduled update at or before this step; -1 during the warm-up.
        key: the run's policy key, the same at every step (fold the step or the update number in).
        drawn_with: the proportions that this batch was drawn with, a distribution over the domains.
        domain_loss: token-mean training loss of each domain's rows in nats; 0 where the domain has no row.
        domain_rows: rows of each domain in the batch.
        domain_tokens: tokens of each domain that count in the loss.
        token_losses: next-token cross-entropy in nats.
        mask: 1 where a token counts in the loss.
        domains: domain index of each row.
        reference_losses: `token_losses` under the reference model; None where no policy has a `Reference`.
    """

    step: Int[Array, ""]
    steps_since_warmup: Int[Array, ""]
    update: Int[Array, ""]
    key: PRNGKeyArray
    drawn_with: Float[Array, " K"]
    domain_loss: Float[Array, " K"]
    domain_rows: Int[Array, " K"]
    domain_tokens: Float[Array, " K"]
    token_losses: Float[Array, "B T"]
    mask: Float[Array, "B T"]
    domains: Int[Array, " B"]
    reference_losses: Float[Array, "B T"] | None = None


class Reference(NamedTuple):
    """A trained model whose token losses a policy compares with.

    Attributes:
        path: a run folder, or the folder of one step in it.
        losses: "model": computed in the step; "cached": read from a store that is computed once.
    """

    path: str
    losses: str


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


class Mixer(NamedTuple):
    """Decides from which domain the next rows come.

    Attributes:
        init: initial proportions [K] (a distribution) -> state.
        update: (state, Observation) -> state; runs after every optimizer step, warm-up included.
        sampling_weights: state -> [K], the distribution that the loader draws from once the schedule publishes it.
        loss_weights: state -> [K], the weight of each domain in the loss, constant to the gradient; None for ones.
        loss_mean: "tokens": `loss_weights` multiply each token, and are normalised over the batch's tokens; "domains":
            they multiply the token-mean loss of each domain in the batch, and are not normalised.
        average: state -> [K], the proportions for later runs to sample with; the run leaves them in
            domain_weights.json. None: it leaves none.
        on_resume: (old state, fresh state) -> state, called where a run resumes with other proportions or further
            domains. Leaves of the old state whose leading axis is K arrive aligned with the new domains, with the fresh
            state's values where a domain is new. None: the fresh state.
        refresh: (state, DomainGradients | None) -> state, jitted, called before each step at which the schedule
            updates, for what is too expensive for every step; None: nothing to do.
        needs: what `refresh` wants: "domain_gradients", and "targets" for those of the target set too.
        reference: the model of Observation.reference_losses; None: not wanted.
        log: state -> what policy.jsonl holds of it: names -> numbers, arrays [K] over the domains, or mappings again;
            called on the host, the state's leaves being NumPy arrays. None: all leaves with fewer than two axes.
    """

    init: Callable[[Float[Array, " K"]], PyTree]
    update: Callable[[PyTree, Observation], PyTree]
    sampling_weights: Callable[[PyTree], Float[Array, " K"]]
    loss_weights: Callable[[PyTree], Float[Array, " K"]] | None = None
    loss_mean: str = "tokens"
    average: Callable[[PyTree], Float[Array, " K"]] | None = None
    on_resume: Callable[[PyTree, PyTree], PyTree] | None = None
    refresh: Callable[[PyTree, DomainGradients | None], PyTree] | None = None
    needs: frozenset[str] = frozenset()
    reference: Reference | None = None
    log: Callable[[PyTree], Mapping[str, PyTree]] | None = None


class RowObservation(NamedTuple):
    """What a weighter sees of the batch whose loss it weights, before the gradient: constants to it.

    Attributes:
        step: number of the step, from 1.
        steps_since_warmup: `step` minus the schedule's `warmup_step`, from 1 (before that a weighter is not asked).
        key: the run's policy key.
        losses: token-mean loss of each row.
        token_losses: next-token cross-entropy in nats.
        mask: 1 where a token counts in the loss.
        domains: domain index of each row.
        embeddings: what the weighter's `embed` made of each row; None without one.
        reference_losses: `token_losses` under the weighter's `Reference`; None without one.
    """

    step: Int[Array, ""]
    steps_since_warmup: Int[Array, ""]
    key: PRNGKeyArray
    losses: Float[Array, " B"]
    token_losses: Float[Array, "B T"]
    mask: Float[Array, "B T"]
    domains: Int[Array, " B"]
    embeddings: Float[Array, "B E"] | None = None
    reference_losses: Float[Array, "B T"] | None = None


# (last hidden states [B, T, D], 1 where an input is no padding [B, T]) -> [B, E]
Embed = Callable[[Float[Array, "B T D"], Float[Array, "B T"]], Float[Array, "B E"]]


class Weighter(NamedTuple):
    """Decides how much each row of a batch counts in its loss.

    The loss is `sum_b w_b l_b / B` of the rows' token-mean losses. Weights whose mean over the batch is 1 keep its
    scale. Several weighters' weights are multiplied, and the product is scaled to the product of their means.

    Attributes:
        init: width of the hidden states -> state.
        weigh: (state, RowObservation) -> weights [B] of rows, or [B, T] of tokens.
        embed: what the weighter wants to know of the last hidden states; None: nothing.
        refresh: (state, Signals) -> state, called when the warm-up is over and every `refresh_interval` steps after,
            e.g. to embed the target set under the current model; None: never.
        refresh_interval: steps between two refreshes.
        needs: "targets" where `refresh` asks for the target set.
        reference: the model of RowObservation.reference_losses; None: not wanted.
    """

    init: Callable[[int], PyTree]
    weigh: Callable[[PyTree, RowObservation], Float[Array, "B *T"]]
    embed: Embed | None = None
    refresh: Callable[[PyTree, "Signals"], PyTree] | None = None
    refresh_interval: int = 1
    needs: frozenset[str] = frozenset()
    reference: Reference | None = None


METHODS = ("sketch", "rademacher", "kronecker", "none")


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
    """How Adam's moments shape a candidate's gradient; see algorithm "less".

    Attributes:
        eps_mode: "outside": `m / (sqrt(v) + eps)`; "inside": `m / sqrt(v + eps)`.
        bias_correction: whether to divide the moments by `1 - b^t`.
    """

    eps_mode: str = "outside"
    bias_correction: bool = False


class Signals(Protocol):
    """What a selector or a weighter may ask of the model as it is now, in evaluation mode, by sweeps over whole sets.

    The N candidates are the training rows, the M targets another set of rows in named groups. Each method runs over
    one set ("candidates" or "targets") or over some of it (`ids`, places in the set), and gives one entry a row, in
    order. Rows of non-finite losses give non-finite entries.

    Attributes:
        num_candidates: N.
        num_targets: M; 0 without a target set.
        target_groups: group of each target, in [0, number of groups).
        group_names: of the groups; each has at least one target.
        checkpoints: (weight, signals) of each model that is asked; only this one, with weight 1, while training.
    """

    num_candidates: int
    num_targets: int
    target_groups: Int[np.ndarray, " M"]
    group_names: tuple[str, ...]
    checkpoints: Sequence[tuple[float, "Signals"]]

    def losses(self, which: str = "candidates", ids: Int[np.ndarray, " n"] | None = None) -> Float[np.ndarray, " n"]:
        """Token-mean loss of each row in nats."""

    def embeddings(
        self, embed: Embed, which: str = "candidates", ids: Int[np.ndarray, " n"] | None = None
    ) -> Float[np.ndarray, "n E"]:
        """`embed` of each row's last hidden states."""

    def gradients(
        self,
        projection: Projection,
        which: str = "candidates",
        ids: Int[np.ndarray, " n"] | None = None,
        *,
        adam: Preconditioner | None = None,
        then: Callable[[Float[Array, "B P"], PyTree], Float[Array, "B *F"]] | None = None,
        operand: PyTree = None,
    ) -> Float[np.ndarray, "n *F"]:
        """Each row's projected gradient of its token-mean loss, or `then(gradients, operand)`.

        Args:
            projection: from the trained parameters to P numbers; the same map for both sets.
            which: the set.
            ids: places in it; None: all.
            adam: precondition by the optimizer's state; None: the plain gradient.
            then: keeps only what is wanted of the P numbers; traced into the sweep, and compiled once if it is the same
                function each time.
            operand: arrays for `then`.

        Raises:
            InputError: `adam` without an Adam state.
        """


class Request(NamedTuple):
    """What is asked of a selector at an update.

    Attributes:
        update: number of the update, from 1.
        updates: how many there are in the run.
        key: of this update's randomness.
    """

    update: Int[Array, ""]
    updates: Int[Array, ""]
    key: PRNGKeyArray


class Choice(NamedTuple):
    """What a selector chose.

    Attributes:
        ids: places among the n candidates that it was given, the best first.
        scores: of the chosen.
        all_scores: of all candidates, for the records.
    """

    ids: Int[Array, " num"]
    scores: Float[Array, " num"]
    all_scores: Float[Array, " n"]


class Selector(NamedTuple):
    """Decides which examples come next.

    Evidence is a pytree of arrays whose leading axis is the candidates'. Before `choose`, candidates with anything
    non-finite in it are taken out; with a mixer, `choose` is called once a domain, with that domain's evidence.

    Attributes:
        score: (state, Signals, Request) -> (evidence, state); runs on the host and asks for sweeps. None, as `choose`
            then is: there is nothing to choose, and the plain pool goes on with its epochs.
        choose: (evidence, Request, num) -> Choice of `num` distinct candidates unless `replacement`; jitted, `num`
            static.
        init: Signals of the untrained model -> state, a dict of arrays that checkpoints hold; None: no state, {}.
        replacement: whether `choose` may take a candidate several times. Otherwise it is never asked for more than
            there are.
        needs: "targets" where `score` asks for the target set.
    """

    score: Callable[[PyTree, Signals, Request], tuple[PyTree, PyTree]] | None
    choose: Callable[[PyTree, Request, int], Choice] | None
    init: Callable[[Signals], PyTree] | None = None
    replacement: bool = False
    needs: frozenset[str] = frozenset()


class ScoreSource(NamedTuple):
    """Where the scores come from that an order goes by.

    Attributes:
        kind: "loss" of the current model; "selector": the active selector's; "field" of the record; "file" with one
            score a candidate (.npy or .jsonl); "none": the order needs no scores.
        name: the field's (dotted), or the file's path.
    """

    kind: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """What "loss", "selector", "field:NAME" or a file's path means."""
        if text in ("loss", "selector"):
            return cls(text)
        if text.startswith("field:"):
            return cls("field", text.removeprefix("field:"))
        return cls("file", text)

    def __str__(self) -> str:
        """The text that is parsed to this."""
        return {"field": f"field:{self.name}", "file": self.name}.get(self.kind, self.kind)


class Order(NamedTuple):
    """Decides in which order the chosen examples come.

    Attributes:
        arrange: (scores [n], key) -> permutation [n] of 0 to n-1, the first to come first. A pure permutation.
        scores: what to go by.
        dynamic: False: scores are computed once, before the first step; True: anew at each update, for the rows until
            the next one.
    """

    arrange: Callable[[Float[np.ndarray, " n"], PRNGKeyArray], Int[np.ndarray, " n"]]
    scores: ScoreSource = ScoreSource("none")
    dynamic: bool = False
