"""The scales that the mixing recipes share, so that two mixers are compared on the same model, data and tokens."""

from ml_collections import ConfigDict

from dataflex_jax.configs import base
from dataflex_jax.errors import InputError

SLIMPAJAMA = {  # domain: (value of meta.redpajama_set_name, natural proportion)
    "commoncrawl": ("RedPajamaCommonCrawl", 0.541),
    "c4": ("RedPajamaC4", 0.287),
    "github": ("RedPajamaGithub", 0.042),
    "book": ("RedPajamaBook", 0.037),
    "arxiv": ("RedPajamaArXiv", 0.034),
    "wikipedia": ("RedPajamaWikipedia", 0.031),
    "stackexchange": ("RedPajamaStackExchange", 0.028),
}


def get_config(mixer: str, variant: str) -> ConfigDict:
    """A recipe with `mixer` at the scale `variant`, after which other policies may follow ("local,weighter=loss")."""
    scales = {
        "quickstart": quickstart,
        "local": local,
        "slimpajama-6b": slimpajama_6b,
        "slimpajama-30b": slimpajama_30b,
    }
    scale, policies = base.split(variant, "quickstart")
    if scale not in scales:
        raise InputError(f"unknown variant {scale!r} of the {mixer} recipe; known: {', '.join(scales)}")
    config = base.get_config(f"mixer={mixer},{policies}")
    scales[scale](config)
    return config


def quickstart(config: ConfigDict) -> None:
    """A small Qwen2 on text of the running Python installation: a few minutes on two CPU cores."""
    config.train_step = 300
    config.warmup_step = 30
    config.update_step = 5
    config.log_every = 5
    config.eval_every = 100
    config.eval_rows = 64
    config.checkpoint_every = 50
    config.model.update(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.06,
        dtype="float32",
        remat="attention",
    )
    config.data.update(tokenizer="train:2048", seq_len=128, batch_size=16, valid_fraction=0.05)
    config.optim.update(learning_rate=6e-3, warmup_ratio=0.1)


def local(config: ConfigDict) -> None:
    """The same model on a folder of NAME.jsonl files, a domain each, given by --config.data.root."""
    quickstart(config)
    config.train_step = 600
    config.data.update(source="local", tokenizer="train:4096", seq_len=256)


def slimpajama_6b(config: ConfigDict) -> None:
    """Qwen2.5-1.5B from random weights, one epoch of SlimPajama-6B: DataFlex's setting, on 8 GPUs.

    `--config.data.source=local --config.data.root=DIR` reads the same records from local files.
    """
    sets, proportions = zip(*SLIMPAJAMA.values(), strict=True)
    config.seed = 42
    config.train_step = 45_000  # 6e9 tokens / (64 rows of 2048)
    config.warmup_step = 2_000
    config.update_step = 100
    config.eval_every = 2_000
    config.checkpoint_every = 1_000
    config.model.update(name_or_path="Qwen/Qwen2.5-1.5B", from_scratch=True, dtype="bfloat16", scan_layers=False)
    config.data.update(
        source="hub",
        root="DKYoon/SlimPajama-6B",
        domains=tuple(SLIMPAJAMA),
        domain_field="meta.redpajama_set_name",
        domain_values=sets,
        tokenizer="Qwen/Qwen2.5-1.5B",
        seq_len=2048,
        batch_size=64,  # 8 a device on 8 devices
        proportions=proportions,
        valid_fraction=0.002,
    )
    config.optim.update(
        learning_rate=5e-5, schedule="linear", warmup_ratio=0.05, weight_decay=0.0, b2=0.999, clip_norm=1.0
    )


def slimpajama_30b(config: ConfigDict) -> None:
    """The same on 30 B tokens: a sample of SlimPajama-627B in local files, --config.data.root=DIR."""
    slimpajama_6b(config)
    config.train_step = 228_000
    config.data.update(source="local", root=None)
