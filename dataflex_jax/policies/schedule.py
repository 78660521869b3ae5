"""When a policy's decision takes effect: the one schedule that every kind of policy shares."""

from typing import Generic, NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Policy = TypeVar("Policy")


class Schedule(NamedTuple):
    """Updates at `warmup_step` and every `update_step` steps after, at most `update_times` of them.

    Attributes:
        warmup_step: optimizer steps of plain training on the initial policy, >= 0.
        update_step: optimizer steps between updates, >= 1.
        update_times: how many updates there are; -1 for no limit.
    """

    warmup_step: int
    update_step: int
    update_times: int

    def is_update(self, step: int) -> bool:
        """Whether the policy decides anew once `step` optimizer steps are done."""
        since = step - self.warmup_step
        if since < 0 or since % self.update_step:
            return False
        return self.update_times < 0 or since // self.update_step < self.update_times

    def update_index(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """The number, from 0, of the last update at or before `step`; -1 before the first. Traceable."""
        since = step - self.warmup_step
        index = since // self.update_step
        if self.update_times >= 0:
            index = jnp.minimum(index, self.update_times - 1)
        return jnp.where(since < 0, -1, index)

    def active(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the policy is at work in step `step`, from the warm-up to the end of the last update. Traceable."""
        since = step - self.warmup_step
        active = since >= 1
        if self.update_times >= 0:
            active &= since <= min(self.update_times * self.update_step, jnp.iinfo(jnp.int32).max)
        return active

    def every(self, interval: int, step: int) -> bool:
        """Whether what comes every `interval` steps while the policy is at work is due once `step` steps are done."""
        since = step - self.warmup_step
        if since < 0 or since % interval:
            return False
        return self.update_times < 0 or since < self.update_times * self.update_step


class Scheduled(NamedTuple, Generic[Policy]):
    """A policy at work: its name, what it does and when."""

    name: str
    policy: Policy
    schedule: Schedule
