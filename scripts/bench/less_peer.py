"""DataFlex's side of less.py, run by the Python of its own environment: its LessSelector, unmodified, on a CPU.

    python less_peer.py FOLDER

Reads FOLDER/model (Hugging Face), FOLDER/adapter (PEFT) and FOLDER/rows.npz; reads "go N" lines from stdin and answers
each with seconds and scores of a pass over the first N candidates as JSON.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator
from dataflex.train.selector.less_selector import LessSelector


class Rows(torch.utils.data.Dataset):
    """Unpadded rows of tokens; labels of -100 do not count."""

    def __init__(self, tokens: np.ndarray, mask: np.ndarray):
        self._tokens, self._mask = tokens, mask

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        length = int(np.flatnonzero(self._mask[i])[-1]) + 2
        tokens = torch.tensor(self._tokens[i, :length], dtype=torch.long)
        labels = tokens.clone()
        labels[0] = -100
        labels[1:][torch.tensor(self._mask[i, : length - 1]) == 0] = -100
        return {"input_ids": tokens, "labels": labels}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of one row."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def main() -> None:
    folder = Path(sys.argv[1])
    data = np.load(folder / "rows.npz")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, trust_remote_code=False
    )
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    model.train()  # as in the peer's trainer; there is no dropout
    optimizer_state = {
        p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, float(data["nu"]))}
        for p in model.parameters()
        if p.requires_grad
    }
    targets = Rows(data["target_tokens"], data["target_mask"])
    accelerator = Accelerator(cpu=True)
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        count = int(line.split()[1])
        rows = Rows(data["tokens"][:count], data["mask"][:count])
        with tempfile.TemporaryDirectory() as cache:
            selector = LessSelector(rows, targets, accelerator, collate, cache, proj_dim=int(data["proj_dim"]))
            started = time.perf_counter()
            selector.select(model, step_id=1, num_samples=count, optimizer_state=optimizer_state)
            seconds = time.perf_counter() - started
            train, wanted = (
                torch.load(Path(cache) / side / "1" / "all_projected_grads.pt") for side in ("train", "eval")
            )
        scores = (train @ wanted.T).mean(dim=1)
        print(json.dumps({"seconds": seconds, "scores": scores.tolist()}), flush=True)


if __name__ == "__main__":
    main()
