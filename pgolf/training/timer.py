"""The training clock: seconds of training as the device spends them, what stands apart from them, and when to stop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pgolf_core.distributed import Ranks

APART = ("warmup", "validation", "forecast", "resume files")  # what the challenge's clock does not count


class Clock:
    """Counts from start() on, but while it is `stopped`.

    of: seconds on the challenge's clock, 0 = none; reserve of them are not for training. trained: seconds up to the
    last stop. reading: when the last step ends, or is to end, the same on all ranks. ran_out: no further step.
    """

    def __init__(self, device: torch.device, of: float):
        self.device, self.of, self.reserve = device, of, 0.0
        self.trained, self.reading, self.ran_out = 0.0, 0.0, False
        self.apart = dict.fromkeys(APART, 0.0)
        self._started: float | None = None
        self._queued: torch.cuda.Event | None = None  # the end of the last step in the device's queue

    @property
    def limit(self) -> float:
        """Seconds of training, 0 = none."""
        return self.of and self.of - self.reserve

    def state(self) -> dict:
        """What a resume file keeps."""
        kept = {"elapsed": self.trained, "clock_ran_out": self.ran_out, "reserve": self.reserve}
        return kept | {"apart": dict(self.apart)}

    def resume(self, state: dict) -> None:
        """Go on where a resume file was written; what stood apart since is added."""
        self.trained = state["elapsed"]
        self.apart = {what: seconds + state["apart"][what] for what, seconds in self.apart.items()}
        # As it was decided then, since a reading is ahead of what was trained.
        self.ran_out = state.get("clock_ran_out", False) or 0 < self.limit <= self.trained

    def start(self) -> None:
        """From here on it counts."""
        self._started, self.reading = time.perf_counter(), self.trained

    def seconds(self) -> float:
        """Of training up to now, the device's queue finished."""
        if self._started is None:
            return self.trained
        self._queued = None
        return self.trained + seconds_since(self._started, self.device)

    @contextmanager
    def stopped(self, what: str) -> Iterator[None]:
        """While something of APART is done."""
        self.trained = self.seconds()
        began = time.perf_counter()
        yield
        self.apart[what] += seconds_since(began, self.device)
        if self._started is not None:
            self._started, self._queued = time.perf_counter(), mark(self.device)

    def read(self, step: int, ranks: Ranks) -> None:
        """After so many steps, the last of which may be in the device's queue still: it is counted, as long as they
        take. Nothing is waited for but the step before it, else the host would read steps ahead of the device."""
        if not self.limit:
            return
        before, self._queued = self._queued, mark(self.device)
        if before is not None:
            before.synchronize()
        seconds = self.trained + time.perf_counter() - self._started
        self.reading = ranks.clock(seconds * step / (step - 1) if before is not None else seconds)
        self.ran_out = self.reading >= self.limit

    def fraction(self, step: int, steps: int) -> float:
        """Of the training done after so many of the steps; 0 before the first."""
        share = self.reading / self.limit if self.limit else 0.0
        return min(1.0, max(step / steps, share)) if step else 0.0

    def budget(self, calibration: float = 0.0) -> dict:
        """Seconds on the challenge's clock: limit (0 = none), train and calibration, which reads training text too,
        their sum counted, and over, by how much that exceeds the limit (by up to a step, as the reference does);
        apart: what no clock counts. Export and the final score are apart too, see export_seconds and eval_seconds of
        a result.
        """
        counted = self.trained + calibration
        over = max(0.0, counted - self.of) if self.of else 0.0
        account = dict(limit=self.of, train=self.trained, calibration=calibration, counted=counted, over=over)
        return account | {"apart": dict(self.apart)}


def mark(device: torch.device) -> torch.cuda.Event | None:
    """The end of what is in the device's queue now; None where there is no queue."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_since(start: float, device: torch.device) -> float:
    """Host seconds since start, the device's queue finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
