"""Hidden states of rows that are padded in different ways, and transcriptions of the poolings."""

import numpy as np


def random_hidden(seed, rows=5, tokens=7, width=6):
    """(hidden [rows, tokens, width], mask): padded on the right, on the left, to one token, and not at all."""
    hidden = np.random.default_rng(seed).normal(size=(rows, tokens, width))
    mask = np.ones((rows, tokens))
    mask[0, 4:] = 0
    mask[1, :3] = 0
    mask[2, 1:] = 0
    return hidden, mask


def pooled(hidden, mask, how):
    """One row at a time, over its real tokens alone."""
    rows = []
    for states, real in zip(hidden, mask, strict=True):
        states = states[real > 0]
        places = np.arange(1, len(states) + 1)
        vector = {
            "position_weighted_mean": (places[:, None] * states).sum(0) / places.sum(),
            "mean": states.mean(0),
            "last_token": states[-1],
        }[how]
        rows.append(vector / np.linalg.norm(vector))
    return np.stack(rows)
