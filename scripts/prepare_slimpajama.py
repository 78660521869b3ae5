"""Builds the rows store of a recipe, such as SlimPajama's, ahead of a cluster run: in one pass, on all cores.

From the Hugging Face hub (downloaded to the hub's own cache first):

    python scripts/prepare_slimpajama.py --config=configs/odm.py:slimpajama-6b --config.data.cache_dir=/data/dataflex

From files in SlimPajama's format, {"text": ..., "meta": {"redpajama_set_name": ...}} as JSONL (.gz, .zst) or Parquet,
with the held-out documents in *.valid.jsonl or in a folder named validation (one named test is left out):

    python scripts/prepare_slimpajama.py --config=configs/odm.py:slimpajama-30b --config.data.root=/data/slimpajama \\
        --config.data.cache_dir=/data/dataflex

It takes the trainer's own --config and overrides; the trainer given the same finds the store and starts at once. Killed
at any moment, the same command goes on where it was. Documents, tokens and bytes of every domain are printed at the end
and written to rows_store.json in the cache folder. Exit code 0: done; 2: bad input, in one line.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import config_flags

from dataflex_jax import cli
from dataflex_jax import config as configuration
from dataflex_jax.data.stores.documents import open_document_stores
from dataflex_jax.data.stores.store import Store

config_flags.DEFINE_config_file("config", None, "The recipe whose data to prepare.")


def summary(stores: Sequence[Store]) -> dict[str, dict]:
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


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    config = cli.chosen_config()
    configuration.validate(config)
    stores, _ = open_document_stores(config.data)
    domains = summary(stores)
    path = Path(config.data.cache_dir) / "rows_store.json"
    path.write_text(json.dumps({"data": config.data.to_dict(), "domains": domains}, indent=2) + "\n")
    print(table(domains))
    print(f"Written to {path}.")


if __name__ == "__main__":
    cli.run(main)
