"""Sweeps on a rented machine, which is torn down only after every file is local and verified.

The job there does not depend on this process: the same command, given again at any time, finds it and goes on
pulling, and nothing starts twice. A job that dies is started again and continues from its resume files.
"""

import contextlib
import errno
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from pgolf.machines import job as jobs
from pgolf.machines import local_runs, state, transfer
from pgolf.machines.job import Job, Look, Say
from pgolf.machines.pod import RemoteError
from pgolf.machines.preflight import check
from pgolf.machines.ssh import UnreachableError
from pgolf.runs import directory
from pgolf.runs.directory import hold_lock
from pgolf.runs.result import TIME
from pgolf.sweeps.runner import missing

RESTARTS = 3  # attempts after deaths without a completed run between them
LONGEST_WAIT = 30.0  # seconds between rounds in trouble
LONGEST_ROUND = 60.0  # seconds that a round without a connection takes


def run(job: Job, say: Say) -> int:
    """Start the job or find it, pull until it ends, verify, tear down.

    Exit status: 0 all complete; 1 some runs failed, and all their files are local; 2 the machine must stay, or is
    lost. Raises RemoteError if nothing could be started.
    """
    with _locked(job):
        known, found = job.known(), None
        verified, torn = bool(known.get("verified")), (known.get("teardown") or {}).get("status") == 0
        fresh = not known or (verified and (torn or not job.pod.teardown))
        if fresh and not any(any(missing(sweep)) for sweep in job.sweeps):
            say(f"every run is complete here, nothing to do; the machine of {job.pod_file} is not asked")
            return 0
        if fresh:
            check(job, say)
            found = job.ask("look")
        else:
            with contextlib.suppress(RemoteError):  # the follower waits for the machine
                found = job.ask("look")
        again = found and found.kind == "ended" and found.number == known.get("reported") and (fresh or not verified)
        if again and not fresh:
            check(job, say)
        if again or (fresh and found.kind == "none"):
            return Follower(job, say, job.next_number(found)).follow()
        if found:
            say(f"found on {job.pod.address}: {found.kind}" + (f", attempt {found.number}" if found.number else ""))
        return Follower(job, say).follow()


def pull_once(job: Job, say: Say) -> int:
    """Pull what is there now, and say how things stand."""
    with _locked(job):
        found = job.ask("look")
        if found.kind == "none":
            raise RemoteError(f"{job.pod.address}: no job {job.id} in {job.pod.dir}; `pgolf remote run` starts it")
        pulled = _pull(job, found)
        say(f"{found.kind} on {job.pod.address}; {len(pulled.changed)} files pulled, {_counts(job)}")
    return 0


@contextlib.contextmanager
def _locked(job: Job) -> Iterator[None]:
    with contextlib.ExitStack() as locks:
        for sweep in job.sweeps:
            sweep.directory.mkdir(parents=True, exist_ok=True)
            busy = f"{sweep.directory}: this sweep runs here already, or another process pulls it"
            locks.enter_context(hold_lock(sweep.directory / ".lock", 0, busy))
        yield


def _pull(job: Job, found: Look) -> transfer.Pulled:
    jobs.note(job, found)
    pulled = transfer.pull(job.pod, job.id, job.names)
    if not found.died:
        local_runs.forget_errors(job.sweeps, interruptions_only=True)
    job.update(last_pull=state.now())
    return pulled


def _complete(job: Job) -> int:
    return sum((run_dir / "result.json").exists() for run_dir in job.run_dirs)


def _counts(job: Job) -> str:
    return f"{_complete(job)} of {len(job.run_dirs)} runs complete here"


class Follower:
    """Pulls until the job ends and is verified, however often the connection breaks or the job dies."""

    def __init__(self, job: Job, say: Say, attempt: int = 0):
        """attempt: number of the attempt to start first; 0 = there is one."""
        self.job, self.say, self.attempt, self.push = job, say, attempt, True
        self.restarts, self.complete = 0, _complete(job)
        # The problem reported last, when it began, how long it lasted without suspensions, and its last round.
        self.trouble, self.since, self.seconds, self.last = "", 0.0, 0.0, 0.0
        self.wait = job.pod.pull_seconds
        # Logs that are local already were shown.
        self.shown = {path: path.stat().st_size for path in state.folder(job.id).glob("attempt-*.log")}
        self.held: dict[Path, filelock.BaseFileLock] = {}

    def follow(self) -> int:
        """Exit status, see run()."""
        try:
            while (status := self._round()) is None:
                time.sleep(self.wait)
            return status
        finally:
            for lock in self.held.values():
                lock.release()

    def _round(self) -> int | None:
        """Start, look, pull, and do what follows; the exit status once it is over."""
        try:
            if self.attempt:
                # The job may already have started before the connection dropped; start() then attaches to it.
                jobs.start(self.job, self.attempt, self.say, self.push)
                self.say(f"started on {self.job.pod.address}; it continues there whatever happens here")
                self.attempt = 0
            found = self.job.ask("look")
            if found.kind != "none":
                pulled = _pull(self.job, found)
                self._show_log(found.number)
                if not pulled.whole:
                    raise OSError(f"{self.job.pod.address}: not every file can be read there")
            if found.kind == "ended" and not found.died:
                return self._teardown() if self._is_verified(found) else 2
            if self.trouble:
                self.say(f"pulling again; {_counts(self.job)}")
            self.trouble, self.wait = "", self.job.pod.pull_seconds
            if found.died:
                return self._restart(found)
            self._hold_locks()
        except (RemoteError, OSError) as error:
            if self.attempt and not isinstance(error, UnreachableError | OSError):
                raise  # it cannot be started as asked
            if isinstance(error, UnreachableError) and self._was_torn_down():
                return self._teardown()
            return self._in_trouble(error)
        return None

    def _restart(self, found: Look) -> int | None:
        complete = _complete(self.job)
        if complete != self.complete:
            self.restarts, self.complete = 0, complete
        what = {
            "none": "has no such job any more: its disk is another one, or was emptied",
            "dead": "runs, and the job on it died without an exit status",
            "ended": f"runs, and the job on it was killed (exit status {found.status})",
        }[found.kind]
        self._interrupt("died", f"the machine {self.job.pod.host} {what}")
        if self.restarts == RESTARTS:
            self.say(f"the job died {RESTARTS + 1} times, and no run was completed meanwhile; the machine stays")
            self.say(f"see {self._log(found.number)}. The same command tries again")
            return 2
        self.push = found.kind == "none"  # otherwise with the code that it began with
        if self.push:
            check(self.job, self.say)
        self.restarts += 1
        self.say("starting it again")
        self.attempt = self.job.next_number(found)
        return None

    def _in_trouble(self, error: Exception) -> int | None:
        """Report a problem once, however often it occurs in a row; give up after give_up_minutes of it."""
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        words, instant = f"{directory.RUNS}: the disk is full; make room" if full else str(error), time.monotonic()
        # A round cannot take longer than LONGEST_ROUND; any excess means that this machine was suspended.
        since_last = min(instant - self.last, self.wait + LONGEST_ROUND)
        self.seconds = self.seconds + since_last if self.trouble else 0.0
        self.since, self.last = self.since if self.trouble else time.time(), instant
        if self.seconds > 60 * self.job.pod.give_up_minutes:
            when = time.strftime(TIME, time.gmtime(self.since))
            if isinstance(error, UnreachableError):
                last = self.job.known().get("last_pull") or "none"
                why = f"the machine {self.job.pod.host} has not been reachable since {when}; last pull {last}"
                self._interrupt("lost", why)
            else:
                self.job.update(state="unverified")
                self.say(f"NOT VERIFIED, so the machine must stay: {words}")
            self.say("it is still paid for if it exists. The same command continues, with another host: too")
            return 2
        if words != self.trouble:
            self.say(f"{words}; trying again")
        self.trouble = words
        self.wait = max(self.job.pod.pull_seconds, min(2 * self.wait, LONGEST_WAIT))
        return None

    def _interrupt(self, kind: str, why: str) -> None:
        marked = local_runs.interrupt(self.job.sweeps, why)
        self.job.update(state=kind)
        self.say(f"{why}. Interrupted: {marked}; {_counts(self.job)}")

    def _log(self, number: int) -> Path:
        return state.folder(self.job.id) / f"attempt-{number}.log"

    def _show_log(self, number: int) -> None:
        """The lines that the job printed since the last pull."""
        path = self._log(number)
        if path.exists():
            with open(path, "rb") as f:
                f.seek(self.shown.get(path, 0))
                lines, newline, _ = f.read().rpartition(b"\n")
            for line in lines.decode(errors="replace").splitlines():
                self.say(f"  {line}")
            self.shown[path] = self.shown.get(path, 0) + len(lines + newline)

    def _hold_locks(self) -> None:
        """Hold the locks of runs that are under way there, as a local training would: the monitor shows them."""
        for run_dir in self.job.run_dirs:
            files = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
            active = "config.json" in files and not files & {"result.json", "error.json"}
            if active and run_dir not in self.held:
                lock = filelock.FileLock(run_dir / ".lock")
                with contextlib.suppress(filelock.Timeout):  # a monitor takes it for an instant
                    lock.acquire(timeout=0)
                    self.held[run_dir] = lock
            elif not active and run_dir in self.held:
                self.held.pop(run_dir).release()

    def _is_verified(self, found: Look) -> bool:
        """Whether every file there is local, equal and complete; if so it is noted here and there. Says what is not."""
        job, log = self.job, self._log(found.number).read_text(encoding="utf-8", errors="replace")
        job.update(ended=state.now(), status=found.status)
        if not (found.status == 0 or (found.status == 1 and re.search(r"^pgolf: \d+ failed: ", log, re.MULTILINE))):
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "without a message")
            self._interrupt("failed", f"the job on {job.pod.host} ended with exit status {found.status}: {last}")
            self.say(f"see {self._log(found.number)}; the machine stays, and the same command tries again")
            job.update(reported=found.number)
            return False
        problems, failed, reported = [], [], found.number
        for name, why in transfer.differing(job.pod, job.id, job.names).items():
            hint = ", where it is truncated: if nothing needs it, delete it there" if why == transfer.TRUNCATED else ""
            problems.append(f"{name}: not local as it is on the machine{hint}")
        for sweep in job.sweeps:
            short, without = local_runs.shortfalls(sweep, log, found.status == 0)
            problems, failed = problems + short, failed + without
        for line in failed:
            self.say(f"  {line}")
        if not problems:
            if hasattr(os, "sync"):
                os.sync()  # a power cut after the teardown must not lose what is only in memory
            now, reported = job.ask("verified", str(found.number)), None  # the next command verifies again
            problems += [] if now.verified else [f"attempt {now.number} of the job has begun there"]
            problems += filter(None, [jobs.other_job(job, now)])
        if problems:
            self.say("NOT VERIFIED, so the machine must stay:" + "".join(f"\n  - {line}" for line in problems))
            job.update(state="unverified", reported=reported, verified=None, teardown=None)
            return False
        job.update(state="verified", verified=state.now(), reported=found.number, failed=failed)
        self.say(f"{_counts(job)}, {len(failed)} failed; every file is local and verified: the machine may go")
        return True

    def _was_torn_down(self) -> bool:
        """Whether a teardown was begun that may have ended the machine, and every file is still local."""
        known = self.job.known()
        all_ran = known.get("status") == 0
        return bool(known.get("verified") and known.get("teardown")) and not any(
            local_runs.shortfalls(sweep, "", all_ran)[0] for sweep in self.job.sweeps
        )

    def _teardown(self) -> int:
        """Run the teardown of a verified job. The exit status, see run()."""
        job, known, command = self.job, self.job.known(), self.job.pod.teardown
        if not known.get("verified"):
            raise RuntimeError(f"{job.pod.address}: job {job.id} is not verified there, so it is not torn down")
        if command:
            self.say(f"teardown: {command}")
            job.update(teardown={"command": command, "begun": state.now()})
            code = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL).returncode
            job.update(teardown={"command": command, "begun": state.now(), "status": code})
            if code:
                self.say(f"TEARDOWN FAILED (exit status {code}): THE MACHINE IS STILL PAID FOR. By hand: {command}")
                self.say("or give the same command again, which tries it again")
                return 2
        self.say("torn down" if command else "no teardown: is set; stop the machine yourself")
        return 1 if known.get("failed") else 0
