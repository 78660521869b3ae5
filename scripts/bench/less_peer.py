"""DataFlex's side of less.py, run by the Python of its own environment: its LessSelector, unmodified, on a CPU.

    python less_peer.py FOLDER

Reads FOLDER/model (Hugging Face), FOLDER/adapter (PEFT) and FOLDER/rows.npz; reads "go N" lines from stdin and answers
each with seconds and scores of a pass over the first N candidates as JSON.

Where DataFlex is not installed, as on a lent GPU, `transcribed` does what its selector does with PyTorch alone, on the
GPU: one example at a time, and a dense projection whose signs are drawn anew for every few examples.
"""

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

_TOGETHER = 16  # gradients that are projected at a time
_SIGN_COLUMNS = 100  # of the projection that are in memory at a time
_B1, _B2, _EPSILON = 0.9, 0.999, 1e-8


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


def projected(model, rows: Rows, nu: float | None, proj_dim: int) -> torch.Tensor:
    """The rows' unit gradients [n, proj_dim] after a dense map of random signs; with `nu` preconditioned by Adam."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device, waiting, images = parameters[0].device, [], []
    for i in range(len(rows)):
        model(**{name: tensor.to(device) for name, tensor in collate([rows[i]]).items()}).loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        model.zero_grad(set_to_none=True)
        if nu is not None:
            second = _B2 * nu + (1 - _B2) * gradient**2
            gradient = (1 - _B1) * gradient / torch.sqrt(second + _EPSILON)
        waiting.append(gradient)
        if len(waiting) == _TOGETHER or i == len(rows) - 1:
            together = torch.stack(waiting)
            generator = torch.Generator(device).manual_seed(0)
            parts = []
            for start in range(0, proj_dim, _SIGN_COLUMNS):
                shape = (together.shape[1], min(_SIGN_COLUMNS, proj_dim - start))
                signs = torch.empty(shape, device=device).bernoulli_(generator=generator) * 2 - 1
                parts.append(together @ signs)
            images.append(torch.cat(parts, dim=1))
            waiting = []
    return torch.nn.functional.normalize(torch.cat(images), dim=1).cpu()


def transcribed(model, data, device: str):
    """A pass over rows and targets: both sides' images."""
    model, proj_dim = model.to(device), int(data["proj_dim"])

    def run(rows: Rows, targets: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        return projected(model, rows, float(data["nu"]), proj_dim), projected(model, targets, None, proj_dim)

    return run


def dataflex(model, data):
    """The same by DataFlex's selector."""
    from accelerate import Accelerator
    from dataflex.train.selector.less_selector import LessSelector

    optimizer_state = {
        p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, float(data["nu"]))}
        for p in model.parameters()
        if p.requires_grad
    }
    accelerator = Accelerator(cpu=True)

    def run(rows: Rows, targets: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        with tempfile.TemporaryDirectory() as cache:
            selector = LessSelector(rows, targets, accelerator, collate, cache, proj_dim=int(data["proj_dim"]))
            selector.select(model, step_id=1, num_samples=len(rows), optimizer_state=optimizer_state)
            return tuple(torch.load(Path(cache) / side / "1" / "all_projected_grads.pt") for side in ("train", "eval"))

    return run


def main() -> None:
    folder = Path(sys.argv[1])
    data = np.load(folder / "rows.npz")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, trust_remote_code=False
    )
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    model.train()  # as in the peer's trainer; there is no dropout
    targets = Rows(data["target_tokens"], data["target_mask"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if importlib.util.find_spec("dataflex"):
        run, about = dataflex(model, data), {"device": "cpu"}
    else:
        run, about = transcribed(model, data, device), {"dataflex": "transcribed", "device": device}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | about), flush=True)
    for line in sys.stdin:
        count = int(line.split()[1])
        started = time.perf_counter()
        train, wanted = run(Rows(data["tokens"][:count], data["mask"][:count]), targets)
        seconds = time.perf_counter() - started
        scores = (train @ wanted.T).mean(dim=1)
        print(json.dumps({"seconds": seconds, "scores": scores.tolist()}), flush=True)


if __name__ == "__main__":
    main()
