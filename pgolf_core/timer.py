"""Training time as the device spends it: what counts toward the wallclock limit, what is excluded, when to stop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pgolf_core.distributed import Ranks

EXCLUDED = ("warmup", "validation", "forecast", "resume files")  # not counted, as in the challenge


class TrainTimer:
    """Counts training seconds from start() on, except inside `excluded` blocks.

    limit_s: wallclock limit, 0 = none. calibration_reserve_s: part of it kept for calibration after training.
    trained_s: seconds up to the last excluded block; cpu_s: CPU-seconds of this process in them. step_end_s: end of the
    last step, measured or extrapolated, equal on all ranks. expired: no further step fits.
    """

    def __init__(self, device: torch.device, limit_s: float):
        self.device, self.limit_s, self.calibration_reserve_s = device, limit_s, 0.0
        self.trained_s, self.cpu_s, self.step_end_s, self.expired = 0.0, 0.0, 0.0, False
        self.excluded_s = dict.fromkeys(EXCLUDED, 0.0)
        self._started: float | None = None
        self._cpu_started = 0.0
        self._queued: torch.cuda.Event | None = None  # end of the last step in the device's queue

    @property
    def train_limit_s(self) -> float:
        """Seconds of training, 0 = no limit."""
        return self.limit_s and self.limit_s - self.calibration_reserve_s

    def state_dict(self) -> dict:
        names = ("trained_s", "cpu_s", "expired", "calibration_reserve_s")
        return {name: getattr(self, name) for name in names} | {"excluded_s": dict(self.excluded_s)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a resume file; what this process has excluded so far is added."""
        self.trained_s, self.cpu_s = state["trained_s"], state["cpu_s"]
        self.calibration_reserve_s = state["calibration_reserve_s"]
        self.excluded_s = {what: seconds + state["excluded_s"][what] for what, seconds in self.excluded_s.items()}
        # Decided before the kill, since step_end_s was ahead of trained_s.
        self.expired = state["expired"] or 0 < self.train_limit_s <= self.trained_s

    def start(self) -> None:
        self._started, self.step_end_s = time.perf_counter(), self.trained_s
        self._cpu_started = time.process_time()

    def seconds(self) -> float:
        """Training seconds up to now, after the device's queue has finished."""
        if self._started is None:
            return self.trained_s
        self._queued = None
        return self.trained_s + seconds_since(self._started, self.device)

    @contextmanager
    def excluded(self, what: str) -> Iterator[None]:
        """Stop counting inside the block and add its seconds to excluded_s[what]."""
        self.trained_s = self.seconds()
        if self._started is not None:
            self.cpu_s += time.process_time() - self._cpu_started
        began = time.perf_counter()
        yield
        self.excluded_s[what] += seconds_since(began, self.device)
        if self._started is not None:
            self._started, self._queued = time.perf_counter(), mark(self.device)
            self._cpu_started = time.process_time()

    def update(self, step: int, ranks: Ranks) -> None:
        """After `step` steps, of which the last may still be in the device's queue: it counts as one mean step.

        Synchronize only with the previous step, so the host can enqueue at most one step ahead of the device.
        """
        if not self.train_limit_s:
            return
        before, self._queued = self._queued, mark(self.device)
        if before is not None:
            before.synchronize()
        seconds = self.trained_s + time.perf_counter() - self._started
        self.step_end_s = ranks.share_float(seconds * step / (step - 1) if before is not None else seconds)
        self.expired = self.step_end_s >= self.train_limit_s

    def fraction(self, step: int, steps: int) -> float:
        """Share of the training that `step` of `steps` steps are; 0 before the first step."""
        share = self.step_end_s / self.train_limit_s if self.train_limit_s else 0.0
        return min(1.0, max(step / steps, share)) if step else 0.0

    def budget(self, calibration_s: float = 0.0) -> dict:
        """The field `budget` of a result, in seconds.

        limit (0 = none); train; cpu: CPU-seconds of this process in training; calibration, which reads training text;
        counted: train + calibration; over: how far that exceeds the limit (up to one step, as in the reference); apart:
        excluded seconds by cause. Export and the final score are excluded as well, see export_seconds and eval_seconds.
        """
        counted = self.trained_s + calibration_s
        return {
            "limit": self.limit_s, "train": self.trained_s, "cpu": self.cpu_s, "calibration": calibration_s,
            "counted": counted,
            "over": max(0.0, counted - self.limit_s) if self.limit_s else 0.0, "apart": dict(self.excluded_s),
        }  # fmt: skip


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event at the end of the device's queue; None on devices without one."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_since(start: float, device: torch.device) -> float:
    """Seconds since start on the host's clock, after the device's queue has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
