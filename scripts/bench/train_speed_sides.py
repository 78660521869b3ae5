"""The two sides of train_speed.py: our train step and the peer's, each to be run in a process of its own.

Nothing is imported here that one of them does not need: it would count as the other's memory.
"""

import contextlib
import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contestants import Failed, Peak

_QWEN = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_LLAMA_3_2_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
    }


SHAPES = {  # contents of config.json, as their publishers have them but for "tiny"
    "tiny": _QWEN | _sizes(4096, 256, 1024, 4, 4, 2),
    "qwen2.5-0.5b": _QWEN | _sizes(151936, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _QWEN | _sizes(151936, 1536, 8960, 28, 12, 2),
    "llama-3.2-1b": _sizes(128256, 2048, 8192, 16, 32, 8)
    | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": _LLAMA_3_2_ROPE, "head_dim": 64}
    | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 131072},
}
_LEARNING_RATE, _BETAS, _EPSILON, _WEIGHT_DECAY, _CLIP_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0

Block = Callable[[int, str | None], float]  # (steps, folder for a profile or None) -> seconds


def random_tokens(task: dict[str, Any]) -> np.ndarray:
    """Ids int32 [batch, seq_len + 1], the same on both sides."""
    shape = (task["options"]["batch"], task["seq_len"] + 1)
    return np.random.default_rng(0).integers(0, task["config"]["vocab_size"], shape, np.int32)


@contextlib.contextmanager
def ours(task: dict[str, Any]) -> Iterator[tuple[Block, Callable[[], Peak]]]:
    """A block of our train steps, and its peak memory so far: (bytes, measure)."""
    import jax

    from dataflex_jax.configs import base
    from dataflex_jax.data.batch import Batch, on_devices
    from dataflex_jax.models import decoder
    from dataflex_jax.reporting import hardware
    from dataflex_jax.sharding import make_mesh
    from dataflex_jax.training import run_config, setup

    options, seq_len = task["options"], task["seq_len"]
    token_losses = decoder.token_losses

    def in_tiles(*args: Any, hooks: decoder.Hooks, **kwargs: Any) -> decoder.Decoded:
        return token_losses(*args, hooks=hooks._replace(tile_tokens=options["tile_tokens"]), **kwargs)

    # No recipe has this field: its default is meant to serve everywhere.
    decoder.token_losses = in_tiles
    with tempfile.TemporaryDirectory() as scratch:
        data, model = Path(scratch, "data"), Path(scratch, "model")
        data.mkdir()
        model.mkdir()
        (model / "config.json").write_text(json.dumps(task["config"]))
        (data / "text.jsonl").write_text("".join(json.dumps({"text": "x" * seq_len}) + "\n" for _ in range(64)))
        config = base.get_config("mixer=static")
        config.model.update(name_or_path=str(model), dtype=task["dtype"], remat=options["remat"])
        config.model.update(scan_layers=options["scan_layers"], attention=options["attention"])
        config.data.update(source="local", root=str(data), tokenizer="bytes", cache_dir=str(Path(scratch, "cache")))
        config.data.update(seq_len=seq_len, batch_size=options["batch"], valid_fraction=0.0)
        config.optim.update(learning_rate=_LEARNING_RATE, schedule="constant", weight_decay=_WEIGHT_DECAY)
        config.optim.update(b1=_BETAS[0], b2=_BETAS[1], eps=_EPSILON, clip_norm=_CLIP_NORM)
        config.mesh.update(data=1, fsdp=1, tensor=1)
        with setup.prepared(config, Path(scratch, "run")) as (job, state, _):
            rows = options["batch"]
            batch = Batch(
                tokens=random_tokens(task),
                mask=np.ones((rows, seq_len), np.float32),
                lengths=np.full(rows, seq_len, np.int32),
                domain=np.zeros(rows, np.int32),
                drawn_with=np.ones(1, np.float32),
            )
            batch = on_devices(make_mesh(config.mesh), batch)
            kept = [state]
            del state  # the step's are donated

            def block(steps: int, trace: str | None) -> float:
                profile = contextlib.nullcontext() if trace is None else jax.profiler.trace(trace)
                with profile:
                    start = time.perf_counter()
                    for _ in range(steps):
                        kept[0], metrics = job.step(kept[0], batch)
                    jax.block_until_ready((kept[0].params, metrics))
                    seconds = time.perf_counter() - start
                if not np.isfinite(metrics["loss"]):
                    raise Failed(f"the loss is {metrics['loss']}")
                return seconds

            task["about"] = {
                "resolved": run_config.resolved(config),
                "peak_flops": hardware.total_peak_flops(),
                "xla_flags": os.environ.get("XLA_FLAGS", ""),
            }
            yield block, lambda: tuple(hardware.peak_memory_bytes())


def _peer_attention(name: str) -> Callable[[], contextlib.AbstractContextManager]:
    """Makes the context in which SDPA takes that kernel alone, or says that it has none."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "auto":
        return contextlib.nullcontext
    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if name not in kernels:
        raise Failed(f"attention {name!r}: must be one of auto, {', '.join(kernels)}")
    return lambda: sdpa_kernel(kernels[name])


@contextlib.contextmanager
def peer(task: dict[str, Any]) -> Iterator[tuple[Block, Callable[[], Peak]]]:
    """A block of the peer's train steps, and its peak memory so far."""
    import torch
    import transformers

    options = task["options"]
    attention = _peer_attention(options["attention"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fields = {name: value for name, value in task["config"].items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(task["config"]["model_type"], **fields, use_cache=False)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.train()
    if options["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options["compile"]:
        # Layer by layer, the loss by itself: where `transformers` is traced as a whole it makes a mask of what is
        # causal anyway, which FlashAttention refuses and which makes other kernels slow.
        for layer in model.model.layers:
            layer.compile()
        model.loss_function = torch.compile(model.loss_function)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=_BETAS, eps=_EPSILON, weight_decay=_WEIGHT_DECAY, fused=True
    )
    tokens = torch.from_numpy(random_tokens(task)[:, :-1]).long().to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=task["dtype"] == "bfloat16")

    def block(steps: int, trace: str | None) -> float:
        del trace
        start = time.perf_counter()
        for _ in range(steps):
            with attention():
                with autocast:
                    loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()  # with the same kernels, where it computes again
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last = loss.item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if not math.isfinite(last):
            raise Failed(f"the loss is {last}")
        return seconds

    def peak() -> Peak:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(), "device"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"

    task["about"] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device.type}
    yield block, peak


SIDES = {"ours": ours, "peer": peer}
