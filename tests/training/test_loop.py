"""The hot loop: the host one step behind the device, nothing moved or compiled that was not asked for."""

import dataclasses

import jax
import numpy as np
import pytest

from dataflex_jax.training import loop
from dataflex_jax.training.setup import prepared
from tests.helpers import tiny

TRACED_OR_COMPILED = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@dataclasses.dataclass
class Watched:
    """Stands for the train step; notes what happens around its calls."""

    step: object
    events: list

    def __call__(self, state, batch):
        self.events.append(f"dispatch {sum('dispatch' in e for e in self.events) + 1}")
        # The first call compiles, which moves constants.
        guard = "disallow" if len(self.events) > 1 else "allow"
        with jax.transfer_guard(guard):
            return self.step(state, batch)


@pytest.fixture
def events(monkeypatch):
    events = []
    fetch = jax.device_get

    def device_get(values):
        fetched = fetch(values)
        if isinstance(values, dict) and "grad_norm" in values:
            events.append(f"read {sum('read' in e for e in events) + 1}")
        return fetched

    def compiled(name, seconds, **_):
        if name in TRACED_OR_COMPILED:
            events.append("compile")

    monkeypatch.setattr(jax, "device_get", device_get)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    yield events
    jax.monitoring.unregister_event_duration_listener(compiled)


@pytest.mark.parametrize(
    ("lag", "around_step_5"),
    [(1, ["dispatch 5", "read 4", "dispatch 6", "read 5"]), (0, ["dispatch 5", "read 5", "dispatch 6", "read 6"])],
)
def test_steps_follow_each_other_without_waiting_moving_or_compiling(root, tmp_path, events, lag, around_step_5):
    config = tiny.config(root, train_step=8, checkpoint_every=100, data__lag=lag)
    with prepared(config, tmp_path) as (job, state, position):
        watched = Watched(job.step, events)
        del events[:]
        loop.run(job._replace(step=watched), state, position, tmp_path)
    assert "compile" in events[events.index("dispatch 1") : events.index("dispatch 2")]
    assert "compile" not in events[events.index("dispatch 2") : events.index("read 7")]
    first = events.index("dispatch 5")
    assert events[first : first + 4] == around_step_5


def test_the_guard_of_the_test_above_does_guard(root, tmp_path):
    with prepared(tiny.config(root), tmp_path) as (job, state, position):
        plan, _ = job.draws.sampler.plan(position.sampler)
        batch = job.loader.load(job.draws.sequences.ids(plan), plan.drawn_with)
        state, _ = job.step(state, batch)
        from_host = dataclasses.replace(batch, domain=np.asarray(batch.domain))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"), jax.transfer_guard("disallow"):
            job.step(state, from_host)
