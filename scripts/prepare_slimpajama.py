"""Builds the rows store of SlimPajama ahead of a run, in one pass over the data and on all cores.

From the Hugging Face hub (DKYoon/SlimPajama-6B; downloaded to the hub's own cache first):

    python scripts/prepare_slimpajama.py --tokenizer=Qwen/Qwen2.5-0.5B --cache_dir=/data/dataflex

From files in SlimPajama's format, {"text": ..., "meta": {"redpajama_set_name": ...}} as JSONL (.gz, .zst) or Parquet,
with the held-out documents in *.valid.jsonl or in a folder named validation:

    python scripts/prepare_slimpajama.py --source=local --root=/data/slimpajama --tokenizer=/models/qwen2.5 \\
        --cache_dir=/data/dataflex

A trainer given the same `data` options finds the store and starts at once; the last line names the file that holds
them. Killed at any moment, the same command goes on where it was. Documents, tokens and bytes of every domain are
printed and written to CACHE_DIR/slimpajama.json. Exit code 0: done; 2: bad input, in one line.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict

from dataflex_jax.data.store import DomainStore, open_stores
from dataflex_jax.errors import InputError, TrainingError

SET_NAMES = {
    "commoncrawl": "RedPajamaCommonCrawl",
    "c4": "RedPajamaC4",
    "github": "RedPajamaGithub",
    "book": "RedPajamaBook",
    "arxiv": "RedPajamaArXiv",
    "wikipedia": "RedPajamaWikipedia",
    "stackexchange": "RedPajamaStackExchange",
}

_SOURCE = flags.DEFINE_enum("source", "hub", ["hub", "local"], "Where the documents are.")
_ROOT = flags.DEFINE_string("root", "DKYoon/SlimPajama-6B", "Hub id, save_to_disk folder, or folder of local files.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Hub id, folder, tokenizer.json, bytes or train:VOCAB.", required=True
)
_EOS_TOKEN = flags.DEFINE_string("eos_token", None, "Token that ends a document (default: the tokenizer's own).")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Folder of the rows store (data.cache_dir).", required=True)
_DOMAINS = flags.DEFINE_list("domains", list(SET_NAMES), "Domains to build.")
_VALID_FRACTION = flags.DEFINE_float("valid_fraction", 0.01, "Held-out share where the data has no held-out split.")
_ON_BAD_RECORD = flags.DEFINE_enum("on_bad_record", "raise", ["raise", "skip"], "What to do with a malformed record.")


def data_config() -> ConfigDict:
    """The `config.data` fields of the flags."""
    for name in _DOMAINS.value:
        if name not in SET_NAMES:
            raise InputError(f"--domains: {name!r} is not a domain of SlimPajama; available: {', '.join(SET_NAMES)}")
    return ConfigDict(
        {
            "source": _SOURCE.value,
            "root": _ROOT.value,
            "domains": tuple(_DOMAINS.value),
            "domain_field": "meta.redpajama_set_name",
            "domain_values": tuple(SET_NAMES[name] for name in _DOMAINS.value),
            "hub_config": None,
            "hub_split": "train",
            "text_field": "text",
            "tokenizer": _TOKENIZER.value,
            "eos_token": _EOS_TOKEN.value,
            "valid_fraction": _VALID_FRACTION.value,
            "cache_dir": _CACHE_DIR.value,
            "on_bad_record": _ON_BAD_RECORD.value,
        }
    )


def summary(stores: Sequence[DomainStore]) -> dict[str, dict]:
    """Documents, tokens and UTF-8 bytes of each split, by domain."""
    return {
        store.name: {
            split: {"documents": array.num_documents, "tokens": array.num_tokens, "bytes": array.num_bytes}
            for split, array in (("train", store.train), ("valid", store.valid))
        }
        | {"skipped_records": store.skipped_records, "path": store.path}
        for store in stores
    }


def table(domains: dict[str, dict]) -> str:
    """The summary as aligned text, with a total."""
    columns = [(split, what) for split in ("train", "valid") for what in ("documents", "tokens", "bytes")]
    rows = [[name, *(d[split][what] for split, what in columns), d["skipped_records"]] for name, d in domains.items()]
    rows.append(["total", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))])
    header = ["domain", *(f"{split} {what}" for split, what in columns), "skipped"]
    texts = [header] + [[row[0], *(f"{number:,}" for number in row[1:])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        for row in texts
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    try:
        data = data_config()
        stores, _ = open_stores(data)
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    domains = summary(stores)
    path = Path(data.cache_dir).expanduser() / "slimpajama.json"
    path.write_text(json.dumps({"data": data.to_dict(), "domains": domains}, indent=2) + "\n")
    print(table(domains))
    print(f"written to {path}; train with the data options found there")


if __name__ == "__main__":
    app.run(main)
