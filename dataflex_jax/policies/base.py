"""The protocols that policies follow.

A policy is a small set of pure functions over a state pytree, in the manner of an optax transformation: a factory takes
the hyperparameters and returns a NamedTuple of functions. The train step calls those of mixers and weighters inside its
one jitted function; selectors and orders decide between two steps.

Protocols, states and whatever else is passed around are NamedTuples; what checks itself when it is made, such as a
group of options, is a frozen dataclass.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dataflex_jax.policies.signals import Embed, Signals

LOSS_MEANS = ("tokens", "domains")
SCORE_KINDS = ("loss", "selector", "field", "file", "none")


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
        path: a run folder, the folder of one step in it, or a Hugging Face folder or hub id.
        losses: "model": computed in the step; "cached": read from a store that is computed once.
    """

    path: str
    losses: str


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
        refresh: (state, Signals) -> state, called before each step at which the schedule updates, for what is too
            expensive for every step; None: nothing to do.
        needs: what must be there for it, such as `TARGETS`.
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
    refresh: Callable[[PyTree, Signals], PyTree] | None = None
    needs: frozenset[Hashable] = frozenset()
    reference: Reference | None = None
    log: Callable[[PyTree], Mapping[str, PyTree]] | None = None


class RecordNumbers(NamedTuple):
    """Numbers >= 0 that the data's records have for a policy; where a record has none, it is 1.

    Attributes:
        field: what they are called.
        of: "record": one a record; "turns": one a message of the assistant's.
    """

    field: str
    of: str


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
        record_numbers: those of the weighter's `records`, of each token that its row or its turn has, and 0 in padding;
            None without them.
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
    record_numbers: Float[Array, "B T"] | None = None


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
        needs: what must be there for it, such as `TARGETS`.
        reference: the model of RowObservation.reference_losses; None: not wanted.
        embeds_whole: whether a row's last token, which is only predicted otherwise, is an input for `embed` too; then
            all rows have one more in the forward pass.
        records: what of the data's records RowObservation.record_numbers are; None: not wanted.
    """

    init: Callable[[int], PyTree]
    weigh: Callable[[PyTree, RowObservation], Float[Array, "B *T"]]  # noqa: F821 - a shape
    embed: Embed | None = None
    refresh: Callable[[PyTree, Signals], PyTree] | None = None
    refresh_interval: int = 1
    needs: frozenset[Hashable] = frozenset()
    reference: Reference | None = None
    embeds_whole: bool = False
    records: RecordNumbers | None = None


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


class Evidence(NamedTuple):
    """What a selector's choice depends on.

    Attributes:
        rows: arrays whose leading axis is the candidates'.
        shared: further arrays, the same for all candidates.
    """

    rows: PyTree
    shared: PyTree = None


class RowGradients(NamedTuple):
    """Inner products of the gradients g of R rows' token-mean losses.

    They are with respect to the adapters where there are any, else to the kernels of the blocks' linear layers.

    Attributes:
        gram: <g_i, g_j>.
        target: <g_i, mean gradient of some rows of the target set>.
        learning_rate: of the step.
    """

    gram: Float[Array, "R R"]
    target: Float[Array, " R"]
    learning_rate: Float[Array, ""]


class DrawnRows(NamedTuple):
    """What an online selector sees of the R rows that were drawn for a step, under the model before it.

    In evaluation mode, that is without dropout, and equal on every device.

    Attributes:
        step: number of the step, from 1.
        key: the run's policy key.
        losses: token-mean loss of each row; 0 without a token in the loss.
        token_losses: next-token cross-entropy in nats.
        mask: 1 where a token counts in the loss.
        domains: domain index of each row.
        reference_losses: `token_losses` under the selector's `Reference`; None without one.
        gradients: of the rows; None where no rows of the target set are wanted.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    losses: Float[Array, " R"]
    token_losses: Float[Array, "R T"]
    mask: Float[Array, "R T"]
    domains: Int[Array, " R"]
    reference_losses: Float[Array, "R T"] | None = None
    gradients: RowGradients | None = None


class Online(NamedTuple):
    """How a selector chooses inside the step: of more rows than are trained on.

    Attributes:
        pick: (DrawnRows, num) -> places of `num` distinct rows, in any order; traced into the step, `num` static.
        oversample: rows that are drawn for each one that is kept.
        target_rows: rows of the target set, other ones for every step, to compare gradients with; 0: no gradients are
            wanted. The selector needs `TARGETS` then.
        reference: the model of DrawnRows.reference_losses; None: not wanted.
    """

    pick: Callable[[DrawnRows, int], Int[Array, " num"]]
    oversample: int = 2
    target_rows: int = 0
    reference: Reference | None = None


class Selector(NamedTuple):
    """Decides which examples come next.

    Before `choose`, candidates with anything non-finite in their evidence are taken out; with a mixer, `choose` is
    called once a domain, with the evidence of that domain's rows.

    Attributes:
        score: (state, Signals, Request) -> (Evidence, state); runs on the host and asks for sweeps. None, as `choose`
            then is: there is nothing to choose between two steps, and the plain pool goes on with its epochs.
        choose: (Evidence, Request, num) -> Choice of `num` distinct candidates unless `replacement`; jitted, `num`
            static.
        init: Signals of the untrained model -> state, a dict of arrays that checkpoints hold; None: no state, {}.
        replacement: whether `choose` may take a candidate several times. Otherwise it is never asked for more than
            there are.
        needs: what must be there for `score`, such as `TARGETS`.
        online: what it chooses inside the step instead; None: nothing.
        by_group: Signals -> the score of each candidate for each target group [N, G], for who asks for them; None: its
            scores are not of groups.
    """

    score: Callable[[PyTree, Signals, Request], tuple[Evidence, PyTree]] | None
    choose: Callable[[Evidence, Request, int], Choice] | None
    init: Callable[[Signals], PyTree] | None = None
    replacement: bool = False
    needs: frozenset[Hashable] = frozenset()
    online: Online | None = None
    by_group: Callable[[Signals], Float[np.ndarray, "N G"]] | None = None


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
