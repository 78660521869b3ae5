"""DataFlex's reorders as orders."""

from collections.abc import Mapping
from typing import Any

from dataflex_jax.moving.draft import Given

_LAYERS = ("layers", "folding_layer", "zigzag_layer")
_POLARITIES = {
    "higher_later": "higher_later",
    "higher_earlier": "higher_earlier",
    "higher_is_better": "higher_later",
    "lower_is_better": "higher_earlier",
}
_PATTERNS = {  # the order, and the number of cycles where none is given
    "shuffle": ("shuffle", None),
    "sorting": ("sorting", None),
    "folding": ("folding", 5),
    "zigzag": ("zigzag", 5),
    "segment": ("segment", None),
    "stair": ("cross_guidance", 2),
    "saw": ("cross_guidance", 2),
}
_SOURCES = ("precomputed", "model_loss", "cached_selection")


def order(given: Given, name: str) -> tuple[str, dict[str, Any], Mapping[str, str]]:
    """(the order, its hyperparameters, what behaves differently by parameter) of a reorder called `name`."""
    kind = given.one_of("kind", {"static": False, "dynamic": True}, name if name in ("static", "dynamic") else None)
    pattern = given.one_of("pattern", {each: each for each in _PATTERNS}, "sorting")
    policy, cycles = _PATTERNS[pattern]
    notes: dict[str, str] = {}
    for parameter in ("apply_at", "seed"):
        given.raw(parameter)
    if not given.flag("consume_once", True):
        given.refuse("consume_once", "a row comes once before any comes again; accepted: true")
    fields = {"dynamic": kind} | _pattern(given, pattern, cycles)
    scores = _scores(given, notes)
    polarity = given.one_of("polarity", _POLARITIES, "higher_earlier" if kind else "higher_later")
    ascending, window = given.flag("ascending", True), given.integer("window_size", 0)
    if policy == "shuffle":
        return policy, {"dynamic": kind}, {}
    return policy, fields | {"scores": scores, "polarity": polarity, "ascending": ascending, "jitter": window}, notes


def _pattern(given: Given, pattern: str, cycles: int | None) -> dict[str, Any]:
    own = given.mapping("pattern_params")
    count = next((own.integer(each) for each in _LAYERS if own.has(each)), cycles)
    for each in _LAYERS:
        own.raw(each)
    found: dict[str, Any] = {} if cycles is None else {"L": count}
    sections, ratio = own.integer("num_sections", 2), own.number("folding_ratio", 0.0)
    tails = {True: "high", False: "low"}
    first, last = own.number("x_pct", 10), own.number("y_pct", 10)
    front, back = own.flag("front_is_high"), own.flag("back_is_high", True)
    if left := own.left():
        own.refuse(left[0], f"no parameter of {pattern}")
    if pattern in ("stair", "saw"):
        mode = "folding" if pattern == "stair" else "zigzag"
        found |= {"sections": sections, "ratio": float(ratio), "mode": mode}
    if pattern == "segment":
        found |= {"x_pct": float(first), "y_pct": float(last), "front": tails[front], "back": tails[back]}
    return found


def _scores(given: Given, notes: dict[str, str]) -> str:
    source = given.one_of("score_source", {each: each for each in _SOURCES}, "precomputed")
    own = given.mapping("score_params")
    for parameter in ("batch_size", "num_workers", "metric_key", "cache_path"):
        own.raw(parameter)
    field, path, most = own.text("score_field", "score"), own.text("score_path"), own.integer("max_samples")
    if left := own.left():
        own.refuse(left[0], "no parameter of the scores")
    if source == "cached_selection":
        given.refuse("score_source", "with a selector, config.order.scores='selector' goes by its scores; no file")
    if most is not None:
        notes["score_params"] = "scored are the rows until the next update, whatever max_samples says"
    if source == "model_loss":
        return "loss"
    if path is None:
        return f"field:{field}"
    if not path.endswith((".npy", ".jsonl")):
        own.refuse("score_path", "a .npy or .jsonl file with a score a row is expected")
    return path
