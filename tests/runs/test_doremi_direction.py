"""Where DoReMi's weights go on planted data: to what can be learned and is seldom seen, not to what cannot be."""

import json
import random

import pytest

from tests.helpers import policy_runs, tiny

pytestmark = pytest.mark.slow

WORDS = {"common": ("one ", "two ", "six ", "ten "), "rare": ("alpha ", "beta ", "gamma ", "delta ")}
SAMPLED = {"common": 0.6, "noise": 0.3, "rare": 0.1}


def text(name, rng):
    if name == "noise":
        return "".join(chr(rng.randrange(32, 127)) for _ in range(200))
    return "".join(rng.choices(WORDS[name], k=50))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """Its reference saw all domains alike, and for twice as long; eta is small beside excess losses of nats."""
    folder = tmp_path_factory.mktemp("planted")
    root = folder / "domains"
    root.mkdir()
    for name in SAMPLED:
        rng = random.Random(name)
        lines = [json.dumps({"text": text(name, rng)}) + "\n" for _ in range(60)]
        (root / f"{name}.jsonl").write_text("".join(lines))
    reference = policy_runs.train(folder / "reference", root, train_step=120, data__batch_size=16)
    fields = {"reference": str(reference), "reference_losses": "cached", "eta": 0.1}
    fields |= {"sampling": "natural", "initial": "sampling"}
    return policy_runs.train(
        folder / "proxy",
        root,
        "doremi",
        train_step=60,
        warmup_step=20,
        data__batch_size=16,
        data__proportions=tuple(SAMPLED.values()),
        **{f"mixer__{name}": value for name, value in fields.items()},
    )


@pytest.mark.slow
def test_the_learnable_domain_rises_and_noise_is_not_chased(proxy):
    weights = json.loads((proxy / "domain_weights.json").read_text())["domains"]
    last = tiny.records(proxy, "policy.jsonl")[-1]["state"]["alpha"]
    for alpha in (weights, last):
        assert alpha["rare"] > 3 * SAMPLED["rare"]
        assert alpha["noise"] < 0.5 / 3


def test_the_noise_is_no_easier_for_the_reference(proxy):
    """What the mixer goes by: of the losses the noise's is the greatest, of the excess losses the least."""
    observed = [line["observed"] for line in tiny.records(proxy, "policy.jsonl")[20:50]]

    def mean(figure, name):
        seen = [values[figure][name] for values in observed if values[figure][name] is not None]
        return sum(seen) / len(seen)

    assert max(SAMPLED, key=lambda name: mean("domain_loss", name)) == "noise"
    assert min(SAMPLED, key=lambda name: mean("excess", name)) == "noise"
