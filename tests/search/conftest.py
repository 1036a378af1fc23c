"""Searches of a surrogate: its score is known at once, or after a while and with a curve."""

import math
import time

import pytest
import yaml

from pgolf.runs import directory
from pgolf.search import driver
from pgolf.search.search_file import load_search
from pgolf.search.study import Outcome

SPACE = {
    "matrix_lr": {"low": 0.001, "high": 1.0, "log": True},
    "scalar_lr": {"low": 0.001, "high": 1.0, "log": True},
    "beta2": {"low": 0.0, "high": 0.99},
}  # fmt: skip
LEAST = 2.0  # bpb of the surrogate at its optimum


def surrogate_bpb(config) -> float:
    lr, scalar = math.log10(config.matrix_lr) + 1.5, math.log10(config.scalar_lr) + 0.7
    return LEAST + lr**2 + 0.5 * scalar**2 + 2 * (config.beta2 - 0.6) ** 2 + 0.5 * lr * scalar


class Surrogate:
    """An Evaluator. seconds: of a trial; log: a file to which each training appends its run."""

    def __init__(self, log=None, seconds=0.0, width=1, size=100_000):
        self.log, self.seconds, self.width, self.size, self.begun = log, seconds, width, size, {}
        self.pruned, self.stopped = [], []

    def has_room(self):
        return len(self.begun) < self.width

    def begin(self, run, config):
        self.begun[run] = config, time.monotonic()
        return self.ended(run) if not self.seconds else None

    def curve(self, run):
        return []

    def ended(self, run):
        config, since = self.begun[run]
        if time.monotonic() < since + self.seconds:
            return None
        del self.begun[run]
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{run}\n")
        return Outcome("complete", surrogate_bpb(config), self.size, -1.0, 3600.0)

    def prune(self, run, why):
        del self.begun[run]
        self.pruned.append(run)
        return Outcome("pruned", why=why)

    def stop(self, run):
        self.stopped.append(run)


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Write and load a search of these keys beside a runs root that holds nothing yet."""
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(driver, "POLL_SECONDS", 0.005)

    def write(**keys):
        path = tmp_path / f"{keys.get('name', 's')}.yaml"
        content = {"track": "nano", "space": SPACE, "trials": 12, "pruner": "off"} | keys
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return load_search(path)

    return write
