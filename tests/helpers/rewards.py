"""Rewards that say something of what an untrained model says."""


def letters(prompt: str, response: str, reference: str) -> float:
    """How many different characters were said, beside those of the reference."""
    return len(set(response) | set(reference)) / 8
