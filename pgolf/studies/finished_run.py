"""A finished run by its name: its knobs, result, curves, model, text, scores of other text, exports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from pgolf.data.dataset import Dataset
from pgolf.disk import removed_on_error
from pgolf.runs import directory
from pgolf.runs.result import ARTIFACT, CHECKPOINT, Result, RunError, finished_run, read_result
from pgolf.runs.table import load_metrics
from pgolf.studies.reexport import export_checkpoint, scoring_config
from pgolf.studies.sample import PROMPTS, sample
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import load_checkpoint
from pgolf_core.config import RunConfig
from pgolf_core.device import autocast, pick_device, pick_dtype
from pgolf_core.export import load
from pgolf_core.export_inputs import model_of
from pgolf_core.model import GPT

EXPORTED = "exported"  # folder below runs/ for exports without a place of their own


@dataclass(frozen=True)
class FinishedRun:
    """A complete run: `pgolf.open("sweep/run")`."""

    directory: Path

    @cached_property
    def _read(self) -> tuple[Result, RunConfig]:
        return finished_run(self.directory)

    @property
    def result(self) -> Result:
        return self._read[0]

    @property
    def config(self) -> RunConfig:
        return self._read[1]

    @property
    def metrics(self) -> pd.DataFrame:
        """Curves: step, train_loss in nats per token, val_bpb, train_seconds, …"""
        return load_metrics(self.directory)

    @cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.config)

    def model(self, raw: bool = False) -> GPT:
        """The model that the run's file holds, read back from disk; raw: the unquantized checkpoint's."""
        device = pick_device(self.config.train)
        if raw:
            return model_of(load_checkpoint(self.directory / CHECKPOINT), self.config, device)
        if not (self.directory / ARTIFACT).is_file():
            raise RunError(f"{self.directory}: has no {ARTIFACT}; model(raw=True) is of the checkpoint")
        return model_of(load(self.directory / ARTIFACT), self.config, device)

    def generate(
        self, prompts: str | Sequence[str] = PROMPTS, tokens: int = 120, temperature: float = 0.7, seed: int = 1
    ) -> str | list[str]:
        """Texts that the file writes, each beginning with its prompt; one text for one prompt."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        written = [row["text"] for row in sample(self.directory, texts, tokens, temperature, seed)]
        return written[0] if isinstance(prompts, str) else written

    @torch.inference_mode()
    def bpb(self, text: str, raw: bool = False) -> float:
        """Bits per byte of any text, as a document of its own, by the file's model; raw: by the checkpoint's.

        Each token is predicted from those before it in its window of eval_seq_len tokens; windows stand side by side
        and the last may be shorter, so a sentence has a score too. Bytes are those that the tokens spell.
        """
        ids = torch.from_numpy(self.dataset.tokenizer.encode([text])[0].astype("int64"))
        if len(ids) < 2:
            raise RunError("bpb: the text is empty, so it has no bits per byte")
        model, window = self.model(raw).eval(), self.config.eval_window
        device, nats = next(model.parameters()).device, 0.0
        dtype = pick_dtype(self.config.train, device)
        for x, y in zip(ids[:-1].split(window), ids[1:].split(window), strict=True):
            with autocast(device, dtype):
                logits = model(x[None].to(device))[0].float()
            nats += F.cross_entropy(logits, y.to(device), reduction="sum").item()
        return nats / math.log(2) / self.dataset.byte_table.count(ids)

    def export(self, run_dir: str | Path = "", **knobs) -> Result:
        """The result of storing the run's checkpoint with other export or eval knobs, read back and scored.

        run_dir: default runs/exported/<sweep>_<run>-<hash of the knobs>. Returns the stored result if that is complete.
        Raises ConfigError on knobs of training, ExportError or AllocationError on what cannot be stored so.
        """
        run_dir = Path(run_dir or self.export_dir(**knobs))
        with removed_on_error(run_dir):
            return export_checkpoint(self.directory, run_dir, **knobs)

    def export_dir(self, **knobs) -> Path:
        """Where `export` of these knobs is stored without a place of its own."""
        config, name = scoring_config(self.config, knobs), f"{self.directory.parent.name}_{self.directory.name}"
        return directory.RUNS / EXPORTED / directory.folder_name(f"{name[:80]}-{config.hash}")


def open_run(name: str | Path) -> FinishedRun:
    """The finished run of that name: sweep/run below runs/, or a folder. RunError if it is none."""
    run = FinishedRun(directory.find_run(name))
    imported = read_result(run.directory)
    if imported is not None and imported.kind == "import":
        raise RunError(f"{name}: an imported log, which has figures and no weights; load_runs() has its figures")
    finished_run(run.directory)
    return run
