"""Text that a run's file writes: sampled from the model that was read back from disk."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pgolf.data.tokenizers import Tokenizer
from pgolf.runs.result import ARTIFACT, Result, RunError, finished_run
from pgolf.studies.reexport import derive, study
from pgolf.training.inputs import open_dataset
from pgolf_core.config import RunConfig
from pgolf_core.device import pick_device
from pgolf_core.export import load
from pgolf_core.export_inputs import model_of
from pgolf_core.model import GPT

PROMPTS = ("", "The ", "import ")


@torch.inference_mode()
def continue_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    window: int,
    temperature: float,
    generator: torch.Generator,
) -> str:
    """The prompt and up to `tokens` sampled tokens, each from the last `window`; ends where the model ends a document.

    temperature: logits are divided by it; 0 = always the likeliest token. A space that ends the prompt, which tokens
    do not spell alone, is the first sampled token's.
    """
    device = next(model.parameters()).device
    ids = tokenizer.encode([prompt])[0].astype("int64").tolist()
    owes_space = prompt[-1:] == " " and not tokenizer.decode([ids[1:]])[0].endswith(" ")
    for i in range(tokens):
        logits = model(torch.tensor([ids[-window:]], device=device))[0, -1].float().cpu()
        if owes_space and i == 0:
            spaced = [piece.leads or piece.text.startswith(b" ") for piece in tokenizer.pieces]
            logits[~torch.tensor(spaced)] = -torch.inf
        if temperature:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == tokenizer.bos:
            break
        ids.append(token)
    return tokenizer.decode([[token for token in ids if token != tokenizer.bos]])[0]


def sample(
    source_dir: str | Path,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 120,
    temperature: float = 0.7,
    seed: int = 1,
) -> list[dict]:
    """One row per prompt: prompt, and text, which begins with it. RunError if the run is incomplete or has no file."""
    source_dir = Path(source_dir)
    _, config = finished_run(source_dir)
    if not (source_dir / ARTIFACT).is_file():
        raise RunError(f"{source_dir}: has no {ARTIFACT}; it was run with final_roundtrip_eval=0, or the file is gone")
    device = pick_device(config.train)
    model, tokenizer = model_of(load(source_dir / ARTIFACT), config, device), open_dataset(config).tokenizer
    generator = torch.Generator().manual_seed(seed)
    rest = (tokens, config.train_seq_len, temperature, generator)
    return [{"prompt": prompt, "text": continue_text(model, tokenizer, prompt, *rest)} for prompt in prompts]


def store_sample(
    source_dir: str | Path, run_dir: str | Path, prompts: Sequence[str], tokens: int, temperature: float, **knobs
) -> Result:
    """A run whose table is the `sample` of source_dir's file. RunError if there is one of other prompts already."""

    def make(source: Result, trained: RunConfig, config: RunConfig) -> Result:
        rows = sample(source_dir, prompts, tokens, temperature, config.seed)
        return study("sample", source, config, rows, source.data_fingerprint)

    def answers(stored: Result) -> bool:
        if [row["prompt"] for row in stored.table] != list(prompts):
            raise RunError(f"{run_dir}: a sample of other prompts; choose another folder")
        return True

    return derive(source_dir, run_dir, knobs, make, answers)
