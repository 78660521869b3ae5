"""What the harness found as an evaluation, from dictionaries like its own."""

import math

import pytest

from dataflex_jax.harness.results import bits_of, evaluation, merged, table, with_bits


def choices(right, log_probs, texts):
    """A question as the harness logs it."""
    return {
        "target": right,
        "arguments": [("context", text) for text in texts],
        "resps": [[(log_prob, False)] for log_prob in log_probs],
    }


def found():
    """Of a group with a category of two subjects and one subject beside it."""
    samples = {
        "law": [choices(1, [-1.0, -2.0], [" A", " BB"]), choices(0, [-4.0, -3.0], [" A", " B"])],
        "art": [choices(0, [-1.0, -2.0], [" é", " B"])],
        "maths": [{"target": "12", "arguments": [("1", {})], "resps": [["12"]]}],
    }
    scores = {name: {"alias": name, "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9} for name in samples}
    scores["maths"] = {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "exact_match,loose": 1}
    groups = {name: {"acc,none": 0.25, "acc_stderr,none": 0.2} for name in ("all", "humanities")}
    return {
        "results": scores | groups,
        "groups": groups,
        "group_subtasks": {"all": ["humanities", "maths"], "humanities": ["law", "art"]},
        "n-samples": {name: {"original": 9, "effective": len(some)} for name, some in samples.items()},
        "samples": samples,
    }


def test_bits_are_of_the_right_answer_a_byte():
    assert bits_of(choices(1, [-1.0, -2.0], [" A", " BB"])) == (2 / math.log(2), 3)
    assert bits_of(choices(0, [-1.0, -2.0], [" é", " B"])) == (1 / math.log(2), 3)
    assert bits_of(choices("A", [-1.0, -2.0], [" A", " B"])) is None
    assert bits_of({"target": 0, "arguments": [("a", {}), ("b", {})], "resps": [["x"], ["y"]]}) is None


def test_subjects_and_categories_are_groups_and_the_whole_is_overall():
    record = evaluation("all", with_bits(found()))
    assert record["split"] == "all"
    assert list(record["domains"]) == ["humanities", "law", "art", "maths"]
    assert record["domains"]["maths"] == {"exact_match_strict": 0.25, "exact_match_loose": 1.0, "samples": 1}
    assert record["domains"]["art"]["bits_per_byte"] == pytest.approx(1 / math.log(2) / 3)
    # Of a group over the bytes of all its questions, not the mean of its subjects'.
    assert record["domains"]["humanities"]["bits_per_byte"] == pytest.approx((2 + 4 + 1) / math.log(2) / (3 + 2 + 3))
    assert record["overall"]["samples"] == 4
    assert record["overall"]["acc_stderr"] == 0.2


def test_samples_are_left_out_of_what_is_written():
    assert "samples" not in with_bits(found())


def test_several_calls_are_one_result():
    first = {"results": {"a": {"acc,none": 1.0}}, "versions": {"a": 1}, "lm_eval_version": "0.4"}
    second = {"results": {"b": {"acc,none": 0.0}}, "versions": {"b": 2}, "lm_eval_version": "0.4"}
    assert merged([first, second]) == {
        "results": {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.0}},
        "versions": {"a": 1, "b": 2},
        "lm_eval_version": "0.4",
    }


def test_tables_have_standard_errors():
    lines = table(evaluation("all", with_bits(found()))).splitlines()
    assert lines[0].split() == ["task", "acc", "bits_per_byte", "samples", "exact_match_strict", "exact_match_loose"]
    assert lines[2].split() == ["law", "0.5000", "±", "0.1000", "1.7312", "2"]
    assert lines[-1].startswith("all")
