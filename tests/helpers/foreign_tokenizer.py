"""A small tokenizer as others ship theirs: Llama 3's files, whose texts begin with a token of their own."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BEGIN, END, *_, TURN_END = range(len(TOKENS))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": TOKENS[BEGIN],
    "eos_token": TOKENS[END],
    "chat_template": TEMPLATE,
}


def write(folder: Path, *, begin: bool = True, **fields: Any) -> Path:
    """The folder, with tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        folder: where.
        begin: whether the post-processor puts the first token before every text.
        **fields: of tokenizer_config.json in place of `CONFIG`'s; None: without it.
    """
    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*TOKENS, *letters, "th", "the"))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.add_special_tokens(list(TOKENS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    added = processors.TemplateProcessing(single=f"{TOKENS[BEGIN]} $A", special_tokens=[(TOKENS[BEGIN], BEGIN)])
    backend.post_processor = processors.Sequence([byte_level, added]) if begin else byte_level
    backend.save(str(folder / "tokenizer.json"))
    config = {name: value for name, value in (CONFIG | fields).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, TURN_END], "top_p": 0.9}))
    return folder
