"""Random gradients of candidates and of three groups of targets, and a float64 transcription of the influences."""

import numpy as np

from tests.helpers.fake_signals import FakeRows, FakeSignals

GROUPS = [0, 1, 2, 0, 1, 0, 0, 2, 1, 1]
NAMES = ("algebra", "botany", "chemistry")
SIZE = 40


def signals(seed=0, n=23, scale=1.0):
    """Those of n candidates, and of targets whose gradients differ in length."""
    rng = np.random.default_rng(seed)
    gradients, preconditioned = scale * rng.normal(size=(n, SIZE)), rng.normal(size=(n, SIZE))
    targets = scale * rng.normal(size=(len(GROUPS), SIZE)) * rng.gamma(1.0, 1.0, (len(GROUPS), 1))
    return FakeSignals(
        FakeRows(gradients=gradients, preconditioned=preconditioned),
        FakeRows(gradients=targets, groups=GROUPS, names=NAMES),
    )


def cosine(x, y):
    return x @ y / np.sqrt(x @ x) / np.sqrt(y @ y)


def transcribed(candidates, targets, groups, target_agg):
    """[n, G] in float64, one pair at a time."""
    candidates, targets = np.asarray(candidates, np.float64), np.asarray(targets, np.float64)
    influences = np.zeros((len(candidates), max(groups) + 1))
    for i, z in enumerate(candidates):
        for group in range(max(groups) + 1):
            members = [t for t, g in zip(targets, groups, strict=True) if g == group]
            if target_agg == "mean_of_cos":
                influences[i, group] = np.mean([cosine(z, t) for t in members])
            else:
                influences[i, group] = cosine(z, np.mean(members, axis=0))
    return influences
