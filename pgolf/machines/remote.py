"""Sweeps on a rented machine, which is torn down only after every file is local and verified.

The job there does not depend on this process: the same command, given again at any time, finds it and goes on
pulling, and nothing starts twice. A job that dies is started again and continues from its resume files.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator

import filelock

from pgolf.machines import job as jobs
from pgolf.machines import local_runs, state, transfer
from pgolf.machines.job import Job, Look, Say
from pgolf.machines.pod import RemoteError
from pgolf.machines.preflight import check
from pgolf.machines.ssh import UnreachableError
from pgolf.runs.directory import hold_lock
from pgolf.sweeps.runner import missing

RESTARTS = 3  # attempts after deaths without a completed run between them
DEATHS = {
    "none": "has no such job any more: its disk is another one, or was emptied",
    "dead": "runs, and the job on it died without an exit status",
    "ended": "runs, and the job on it was killed",
}


def run(job: Job, say: Say) -> int:
    """Start the job or find it, pull until it ends, verify, tear down.

    Exit status: 0 all complete; 1 some runs failed, and all their files are local; 2 the machine must stay, or is
    lost. Raises RemoteError if nothing could be started.
    """
    with _locked(job):
        known = job.known()
        torn = (known.get("teardown") or {}).get("status") == 0
        is_over = not known or bool(known.get("verified") and (torn or not job.pod.teardown))
        if is_over and not any(any(missing(sweep)) for sweep in job.sweeps):
            say(f"every run is complete here, nothing to do; the machine of {job.pod_file} is not asked")
            return 0
        follower = Follower(job, say)
        if is_over:
            check(job, say)
            found = job.ask("look")
            if found.kind == "none" or (found.kind == "ended" and found.number == known.get("number")):
                follower.attempt = job.next_number(found)
        return follower.follow()


def pull_once(job: Job, say: Say) -> int:
    """Pull what is there now, and say how things stand."""
    with _locked(job):
        found = job.ask("look")
        if found.kind == "none":
            raise RemoteError(f"{job.pod.address}: no job {job.id} in {job.pod.dir}; `pgolf remote run` starts it")
        _pull(job, found, say)
        say(f"{found.kind} on {job.pod.address}; pulled, {_counts(job)}")
    return 0


@contextlib.contextmanager
def _locked(job: Job) -> Iterator[None]:
    with contextlib.ExitStack() as locks:
        for sweep in job.sweeps:
            sweep.directory.mkdir(parents=True, exist_ok=True)
            busy = f"{sweep.directory}: this sweep runs here already, or another process pulls it"
            locks.enter_context(hold_lock(sweep.directory / ".lock", 0, busy))
        yield


def _pull(job: Job, found: Look, say: Say) -> transfer.Pulled:
    """Pull, and say what the job printed since the last pull."""
    jobs.note(job, found)
    log = job.log(found.number)
    before = log.read_bytes() if log.exists() else b""
    pulled = transfer.pull(job.pod, job.id, job.names)
    lines = log.read_bytes() if log.exists() else b""
    for line in lines[before.rfind(b"\n") + 1 : lines.rfind(b"\n") + 1].decode(errors="replace").splitlines():
        say(f"  {line}")
    if not found.died:
        local_runs.forget_errors(job.run_dirs, interruptions_only=True)
    job.update(last_pull=state.now())
    return pulled


def _complete(job: Job) -> int:
    return sum((run_dir / "result.json").exists() for run_dir in job.run_dirs)


def _counts(job: Job) -> str:
    return f"{_complete(job)} of {len(job.run_dirs)} runs complete here"


class Follower:
    """Pulls until the job ends and is verified, however often the connection breaks or the job dies."""

    def __init__(self, job: Job, say: Say):
        self.job, self.say = job, say
        self.attempt, self.push = 0, True  # number of the attempt to start next or 0; with code and data of now
        self.is_first = True  # no attempt was seen yet: one that ended before may be followed by another
        self.deaths: list[int] = []  # runs that were complete when the job died
        self.trouble, self.since = "", 0.0  # the problem reported last, and when problems began
        self.locks = {run_dir: filelock.FileLock(run_dir / ".lock") for run_dir in job.run_dirs}

    def follow(self) -> int:
        """Exit status, see run()."""
        try:
            while (status := self._round()) is None:
                time.sleep(self.job.pod.pull_seconds)
            return status
        finally:
            for lock in self.locks.values():
                lock.release()

    def _round(self) -> int | None:
        """Start, look, pull, and do what follows; the exit status once it is over."""
        job = self.job
        try:
            if self.attempt:
                # The job may already have started before the connection dropped; start() then attaches to it.
                jobs.start(job, self.attempt, self.say, self.push)
                self.say(f"started on {job.pod.address}; it continues there whatever happens here")
                self.attempt, self.is_first = 0, False
            found = job.ask("look")
            if self.is_first and not self.trouble:
                self.say(f"found on {job.pod.address}: {found.kind}, attempt {found.number}")
            if found.kind != "none" and not _pull(job, found, self.say).whole:
                raise OSError(f"{job.pod.address}: not every file can be read there")
            if self.trouble and (found.kind == "running" or found.died):
                self.say(f"pulling again; {_counts(job)}")
                self.trouble = ""
            if found.kind != "running":
                return self._end(found)
            self.is_first = False
            self._hold_locks()
        except (RemoteError, OSError) as error:
            if self.attempt and not isinstance(error, UnreachableError | OSError):
                raise  # it cannot be started as asked
            if isinstance(error, UnreachableError) and self._was_torn_down():
                return self._teardown()
            return self._in_trouble(error)
        return None

    def _hold_locks(self) -> None:
        """Hold the locks of runs that are under way there, as a local training would: the monitor shows them."""
        for run_dir, lock in self.locks.items():
            files = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
            if "config.json" not in files or files & {"result.json", "error.json"}:
                lock.release()
            elif not lock.is_locked:
                with contextlib.suppress(filelock.Timeout):  # a monitor takes it for an instant
                    lock.acquire(timeout=0)

    def _end(self, found: Look) -> int | None:
        """Verify and tear down. After an attempt that died, or ended before this command, start another."""
        job = self.job
        push = found.kind == "none" or not found.died  # a job that died goes on with its own code
        if not found.died and self._is_verified(found):
            return self._teardown()
        if found.died:
            self._interrupt("died", f"the machine {job.pod.host} {DEATHS[found.kind]}")
            self.deaths.append(_complete(job))
            if (deaths := self.deaths.count(self.deaths[-1])) > RESTARTS:
                self.say(f"the job died {deaths} times, and no run was completed meanwhile; the machine stays")
                self.say(f"see {job.log(found.number)}. The same command tries again")
                return 2
        elif not self.is_first or jobs.other_job(job, found):
            return 2
        self.attempt, self.push = job.next_number(found), push
        if push:
            check(job, self.say)
        self.say("starting it again")
        return None

    def _in_trouble(self, error: Exception) -> int | None:
        """Report a problem once, however often it occurs in a row; give up after give_up_minutes of it."""
        job, words, now = self.job, str(error), time.monotonic()  # it stands still while this machine is suspended
        self.since = self.since if self.trouble else now
        if now - self.since > 60 * job.pod.give_up_minutes:
            if isinstance(error, UnreachableError):
                last = job.known().get("last_pull") or "none"
                why = f"has not been reachable for {job.pod.give_up_minutes:g} minutes; last pull {last}"
                self._interrupt("lost", f"the machine {job.pod.host} {why}")
            else:
                job.update(state="unverified")
                self.say(f"NOT VERIFIED, so the machine must stay: {words}")
            self.say("it is still paid for if it exists. The same command continues, with another host: too")
            return 2
        if words != self.trouble:
            self.say(f"{words}; trying again")
        self.trouble = words
        return None

    def _interrupt(self, kind: str, why: str) -> None:
        marked = local_runs.interrupt(self.job.run_dirs, why)
        self.job.update(state=kind)
        self.say(f"{why}. Interrupted: {marked}; {_counts(self.job)}")

    def _is_verified(self, found: Look) -> bool:
        """Whether every file there is local, equal and complete; if so it is noted here and there. Says what is not."""
        job, log = self.job, self.job.log(found.number).read_text(encoding="utf-8", errors="replace")
        job.update(ended=state.now(), status=found.status)
        if not (found.status == 0 or (found.status == 1 and re.search(r"^pgolf: \d+ failed: ", log, re.MULTILINE))):
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "without a message")
            self._interrupt("failed", f"the job on {job.pod.host} ended with exit status {found.status}: {last}")
            self.say(f"see {job.log(found.number)}; the machine stays, and the same command tries again")
            return False
        problems, failed = [], []
        for name, why in transfer.differing(job.pod, job.id, job.names).items():
            problems.append(f"{name}: not local as it is on the machine" + (why and f" ({why})"))
        for sweep in job.sweeps:
            short, without = local_runs.shortfalls(sweep, log, found.status == 0)
            problems, failed = problems + short, failed + without
        for line in failed:
            self.say(f"  {line}")
        if not problems:
            os.sync()  # a power cut after the teardown must not lose what is only in memory
            now = job.ask("verified", str(found.number))
            problems += [] if now.verified else [f"attempt {now.number} of the job has begun there"]
            problems += filter(None, [jobs.other_job(job, now)])
        if problems:
            self.say("NOT VERIFIED, so the machine must stay:" + "".join(f"\n  - {line}" for line in problems))
            job.update(state="unverified", verified=None, teardown=None)
            return False
        job.update(state="verified", verified=state.now(), failed=failed)
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
            begun = {"command": command, "begun": state.now()}
            job.update(teardown=begun)
            code = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL).returncode
            job.update(teardown=begun | {"status": code})
            if code:
                self.say(f"TEARDOWN FAILED (exit status {code}): THE MACHINE IS STILL PAID FOR. By hand: {command}")
                self.say("or give the same command again, which tries it again")
                return 2
        self.say("torn down" if command else "no teardown: is set; stop the machine yourself")
        return 1 if known.get("failed") else 0
