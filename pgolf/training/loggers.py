"""Loggers people already use, beside log.txt and metrics.jsonl: TensorBoard, Weights & Biases, trackio.

PGOLF_LOGGERS=tensorboard,wandb in the environment chooses them; each is an extra of the package. They change no bit of
a run, and none costs one: a logger that fails is left out from then on, and one line on the screen says so.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pgolf_core.config import RunConfig, did_you_mean

VARIABLE, PROJECT = "PGOLF_LOGGERS", "pgolf"


class Logger(NamedTuple):
    """log takes a row of metrics.jsonl, which has a step; close takes whether the run failed."""

    log: Callable[[dict[str, float]], None]
    close: Callable[[bool], None]


def tensorboard(run_dir: Path, step: int, config: RunConfig) -> Logger:
    """Event files in <run>/tensorboard; after a resume, events of later steps are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)
    writer.add_text("config", f"```\n{json.dumps(config.model_dump(), indent=1)}\n```", step)

    def log(row: dict[str, float]) -> None:
        for name in row.keys() - {"step"}:
            writer.add_scalar(name, row[name], row["step"])

    return Logger(log, lambda failed: writer.close())


def wandb(run_dir: Path, step: int, config: RunConfig) -> Logger:
    """A run of Weights & Biases, its files in <run>/wandb; offline without an API key or with WANDB_MODE=offline."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")  # it would ask for a key
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT, name=run_dir.name, group=run_dir.parent.name, mode=mode,
        config=config.model_dump(), dir=str(run_dir), settings=wandb.Settings(console="off"),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    return Logger(run.log, lambda failed: run.finish(exit_code=int(failed)))


def trackio(run_dir: Path, step: int, config: RunConfig) -> Logger:
    """A run of the local project pgolf, which `trackio show` opens; TRACKIO_SPACE_ID sends it to a Space."""
    import trackio

    name = f"{run_dir.parent.name}/{run_dir.name}"
    run = trackio.init(project=PROJECT, name=name, config=config.model_dump(), resume="allow", embed=False)

    def log(row: dict[str, float]) -> None:
        run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    return Logger(log, lambda failed: run.finish())


LOGGERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


class Loggers:
    """Those that PGOLF_LOGGERS names, as far as they work."""

    def __init__(self, run_dir: Path, step: int, config: RunConfig):
        """step: of the resume file, 0 without one."""
        self.open: dict[str, Logger] = {}
        names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
        for name in dict.fromkeys(filter(None, names)):
            if name in LOGGERS:
                self._try(name, lambda name=name: self.open.update({name: LOGGERS[name](run_dir, step, config)}))
            else:
                nearest = did_you_mean(name, LOGGERS) or f"; there are {', '.join(LOGGERS)}"
                tqdm.write(f"{VARIABLE}: {name}: no such logger{nearest}")

    def log(self, row: dict[str, float]) -> None:
        for name, logger in list(self.open.items()):
            self._try(name, lambda logger=logger: logger.log(row))

    def close(self, failed: bool) -> None:
        for name, logger in list(self.open.items()):
            self._try(name, lambda logger=logger: logger.close(failed))
        self.open = {}

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except ImportError as error:
            tqdm.write(f"{VARIABLE}: {name} is not installed: pip install pgolf[{name}] ({error})")
            self.open.pop(name, None)
        except Exception as error:
            tqdm.write(f"{VARIABLE}: {name} failed, the run goes on without it: {type(error).__name__}: {error}")
            self.open.pop(name, None)
