"""The answers of lm-evaluation-harness's own Hugging Face backend, on small questions that are made here."""

import csv
import json

import numpy as np
import pytest

from dataflex_jax import library
from dataflex_jax.harness.results import evaluation
from dataflex_jax.harness.tasks import Settings, Tasks
from dataflex_jax.models.hf.weights import save_pretrained
from dataflex_jax.sharding import make_mesh

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytestmark = pytest.mark.slow  # the harness reads thousands of files of tasks

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
MINE = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "b"], max_gen_toks: 40}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dev and val files of two subjects, and a task of one's own."""
    folder, rng = tmp_path_factory.mktemp("harness"), np.random.default_rng(0)
    for split, count in (("dev", 3), ("val", 6)):
        (folder / split).mkdir()
        for subject in ("virology", "anatomy"):
            with open(folder / split / f"{subject}_{split}.csv", "w", newline="") as file:
                for _ in range(count):
                    question, right = " ".join(rng.choice(WORDS, 6)), rng.choice(list("ABCD"))
                    csv.writer(file).writerow([question, *rng.choice(WORDS, 4), right])
    lines = [json.dumps({"question": word, "answer": "x"}) for word in WORDS[:3]]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    (folder / "mine.yaml").write_text(MINE.format(path=folder / "mine.jsonl"))
    return folder


@pytest.fixture(scope="module")
def example():
    return library.example(initializer_range=0.5, max_position_embeddings=700)


@pytest.fixture(scope="module")
def tasks(folder, example):
    settings = Settings(
        ("mmlu_virology", "mine"), num_fewshot=2, limit=5, include_path=str(folder), mmlu_root=str(folder)
    )
    return Tasks(settings, example[1], make_mesh({"fsdp": -1}))


def test_a_subject_of_local_files_has_the_harness_own_numbers(tasks, example, folder):
    model, asked = example[0], []
    ours = tasks.language_model
    ours.model = model
    answer = type(ours).loglikelihood
    ours.loglikelihood = lambda requests: asked.extend(requests) or answer(ours, requests)
    record = evaluation("mmlu_virology", tasks.results("mmlu_virology", model))
    del ours.loglikelihood
    assert record["overall"]["samples"] == 5
    assert len(asked) == 20
    dev, val = (list(csv.reader((folder / split / f"virology_{split}.csv").open())) for split in ("dev", "val"))

    def question(row):
        choices = (f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row[1:5], strict=True))
        return f"{row[0]}{''.join(choices)}\nAnswer:"

    prompt = "The following are multiple choice questions (with answers) about virology.\n\n"
    prompt += "".join(f"{question(row)} {row[5]}\n\n" for row in dev[:2])
    assert [request.args for request in asked[4:8]] == [(prompt + question(val[1]), f" {letter}") for letter in "ABCD"]
    scores = np.array([log_prob for log_prob, _ in ours.loglikelihood(asked)]).reshape(5, 4)
    right = ["ABCD".index(row[5]) for row in val[:5]]
    assert record["overall"]["acc"] == np.mean(scores.argmax(1) == right)
    assert record["overall"]["bits_per_byte"] == pytest.approx(-scores[np.arange(5), right].sum() / np.log(2) / 10)


def test_a_task_of_ones_own_generates(tasks, example):
    record = evaluation("mine", tasks.results("mine", example[0]))
    assert record["overall"] == {"exact_match": 0.0, "exact_match_stderr": 0.0, "samples": 3}


def test_everything_is_what_the_hugging_face_backend_says(tasks, example, tmp_path):
    pytest.importorskip("torch", reason="needs the extra torch")
    pytest.importorskip("accelerate", reason="the harness's Hugging Face backend needs it")
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = example
    tokenizer.save(tmp_path / "tokenizer")
    save_pretrained(tmp_path / "model", model.config, model.whole(), tmp_path / "tokenizer")
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    theirs = HFLM(str(tmp_path / "model"), tokenizer=loaded, dtype="float32", batch_size=4, device="cpu")
    ours = tasks.language_model
    ours.model = model

    def of(kind, *arguments):
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    contexts = ["", "One", "Trailing  ", " ".join(WORDS) * 3, " ".join(WORDS * 14)]
    pairs = of("loglikelihood", *((each, end) for each in contexts for end in (" A", " B", " two words", "\n\né")))
    mine, yours = (np.array(lm.loglikelihood(pairs, disable_tqdm=True)) for lm in (ours, theirs))
    np.testing.assert_allclose(mine, yours, atol=1e-4)
    # Of several windows, no two of them the same: of such its backend takes one's logits for the other.
    long = of("loglikelihood_rolling", ("short",), (" ".join(np.random.default_rng(1).choice(WORDS, 250)),))
    np.testing.assert_allclose(ours.loglikelihood_rolling(long), theirs.loglikelihood_rolling(long), rtol=1e-5)
    options = {"until": ["b", "\n"], "max_gen_toks": 50}
    asked = of("generate_until", *((each, options) for each in contexts[1:]), ("One", {"until": [], "max_gen_toks": 9}))
    texts = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked) == texts
    # Each token as the continuation: the same one is the greedy one.
    single = [((None, None), ours.tok_encode("One"), [token]) for token in range(257)]
    mine, yours = (np.array(lm._loglikelihood_tokens(single, disable_tqdm=True)) for lm in (ours, theirs))
    np.testing.assert_allclose(mine, yours, atol=1e-4)
    assert mine[:, 1].sum() == 1
