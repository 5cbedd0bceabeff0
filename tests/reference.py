"""The checkpoint that nanochat trained (../shared/reference/nanochat_d4), read for comparison."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megachat.config import Config

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference" / "nanochat_d4"
needs_reference = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="../shared/reference/nanochat_d4 is absent: it comes with the developers' checkout"
)
CONFIG = {
    "model": {"depth": 4, "aspect_ratio": 32, "head_size": 32, "sequence_len": 512},
    "batch": {"tokens": 1024, "micro_rows": 1},
    "horizon": {"steps": 10},
    "optimizer": {"scale_to_batch": False},
    "precision": {"compute": "float32"},
}
VOCAB_SIZE = 1024
FIRST_STEP = 20


def config() -> Config:
    return Config.model_validate(CONFIG)


def expected() -> dict:
    return json.loads((FOLDER / "expected.json").read_text())


def weights() -> dict[str, torch.Tensor]:
    return torch.load(FOLDER / "model_000020.pt", weights_only=True)


def rows(step: int) -> torch.Tensor:
    """[2, 513] int64: the batch nanochat trained step `step` on."""
    return torch.from_numpy(np.load(FOLDER / "tokens.npy")[step].astype(np.int64))


def state() -> dict[str, torch.Tensor]:
    """Whole tensors under the names of megachat's checkpoints: weights, AdamW's moments, Muon's momentum and second
    moment.
    """
    saved = torch.load(FOLDER / "optim_000020_rank0.pt", weights_only=True)
    model = weights()
    whole = {f"model/{name}": tensor for name, tensor in model.items()}
    adamw = [
        "lm_head.weight",
        "transformer.wte.weight",
        "value_embeds.1.weight",
        "value_embeds.3.weight",
        "resid_lambdas",
        "x0_lambdas",
    ]
    adamw += ["smear_gate.weight", "smear_lambda", "backout_lambda"]
    for index, name in enumerate(adamw):
        for kind in ("exp_avg", "exp_avg_sq"):
            whole[f"adamw/{name}/{kind}"] = saved["state"][index][kind]
    matrices = [name for name in model if name.startswith("transformer.h.")]
    for group in saved["param_groups"]:
        if group["kind"] == "muon":
            stacked = saved["state"][group["params"][0]]
            members = [name for name in matrices if model[name].shape == stacked["momentum_buffer"].shape[1:]]
            for index, name in enumerate(members):
                whole[f"muon/{name}/momentum"] = stacked["momentum_buffer"][index]
                whole[f"muon/{name}/second_moment"] = stacked["second_momentum_buffer"][index]
    return whole
