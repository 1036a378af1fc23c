"""Vectors recorded from the reference trainer, copied to tests/golden."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden"
GOLDEN = SHARED if SHARED.is_dir() else Path(__file__).parent / "golden"


def golden_path(name: str) -> Path:
    """The recorded file or folder of that name; in ../shared, where they were recorded, or our copy of it."""
    assert (GOLDEN / name).exists(), f"no golden vector {GOLDEN / name}"
    return GOLDEN / name


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    """(knobs and scalars, arrays) of NAME.json and NAME.npz."""
    with np.load(golden_path(f"{name}.npz")) as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return json.loads(golden_path(f"{name}.json").read_text()), tensors


def state_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("sd."): t for name, t in tensors.items() if name.startswith("sd.")}


def generated_state() -> dict[str, Tensor]:
    """The state dict that export.json and regularizers.json were recorded on."""
    recorded = json.loads(golden_path("export.json").read_text())
    rng = np.random.default_rng(recorded["state_seed"])
    state = {}
    for name, shape, formula in recorded["tensors"]:
        z = rng.standard_normal(shape).astype(np.float32)
        tenth = np.float32(0.1) * z
        if formula == "0.1*z, then [:,0] += 1":
            tenth[:, 0] += 1
        values = {
            "1 + 0.1*z": 1 + tenth,
            "1.5 + 0.1*z": np.float32(1.5) + tenth,
            "0.1*z, then [:,0] += 1": tenth,
            "z / sqrt(shape[1])": z / np.float32(np.sqrt(shape[-1])),
        }
        state[name] = torch.from_numpy(values[formula])
    return state
