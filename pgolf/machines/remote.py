"""Sweeps on a rented machine, which is torn down only after every file is local and verified.

The job there does not depend on this process: the same command, given again at any time, finds it and goes on
pulling, and nothing starts twice. A job that dies is started again and continues from its resume files.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator

import filelock

from pgolf.machines import job as jobs
from pgolf.machines import local_runs, state, transfer
from pgolf.machines.job import Job, Look, Say
from pgolf.machines.pod import RemoteError, UnreachableError
from pgolf.machines.preflight import check
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
        known, attempt = job.known(), 0
        torn = (known.get("teardown") or {}).get("status") == 0
        if not known or (known.get("verified") and (torn or not job.pod.teardown)):  # nothing is under way
            if not any(any(missing(sweep)) for sweep in job.sweeps):
                say(f"every run is complete here, nothing to do; the machine of {job.pod_file} is not asked")
                return 0
            check(job, say)
            found = job.ask("look")
            if found.kind == "none" or (found.kind == "ended" and found.number == known.get("number")):
                attempt = job.next_number(found)
        follower = Follower(job, say)
        try:
            return follower.follow(attempt)
        except GaveUp as trouble:
            return follower.give_up(trouble.__cause__)
        finally:
            for lock in follower.locks.values():
                lock.release()


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


def _pull(job: Job, found: Look, say: Say) -> bool:
    """Pull, and say what the job printed since the last pull; whether every file could be read there."""
    jobs.note(job, found)
    log = job.log(found.number)
    before = log.read_bytes() if log.exists() else b""
    whole, _ = transfer.pull(job.pod, job.id, job.names)
    lines = log.read_bytes() if log.exists() else b""
    for line in lines[before.rfind(b"\n") + 1 : lines.rfind(b"\n") + 1].decode(errors="replace").splitlines():
        say(f"  {line}")
    if not found.died:
        local_runs.forget_errors(job.run_dirs, interruptions_only=True)
    job.update(last_pull=state.now())
    return whole


def _complete(job: Job) -> int:
    return sum((run_dir / "result.json").exists() for run_dir in job.run_dirs)


def _counts(job: Job) -> str:
    return f"{_complete(job)} of {len(job.run_dirs)} runs complete here"


class GaveUp(Exception):
    """The machine was in trouble for give_up_minutes; the cause is the last error."""


class Follower:
    """Pulls until the job ends and is verified, however often the connection breaks or the job dies."""

    def __init__(self, job: Job, say: Say):
        self.job, self.say = job, say
        self.locks = {run_dir: filelock.FileLock(run_dir / ".lock") for run_dir in job.run_dirs}

    def follow(self, attempt: int) -> int:
        """Exit status, see run(). attempt: number of the one to start first; 0 = follow what is there."""
        job, push = self.job, True  # push: start with the code and data of now
        is_first = True  # no attempt was seen yet: one that ended before this command may be followed by another
        deaths: list[int] = []  # runs that were complete when the job died
        while True:
            if attempt:
                # The job may already have started before the connection dropped; start() then attaches to it.
                self._patiently(jobs.start, job, attempt, self.say, push)
                self.say(f"started on {job.pod.address}; it continues there whatever happens here")
                is_first = False
            found, may_go = self._patiently(self._look, retried=RemoteError)
            if may_go:
                return self._teardown()
            if is_first:
                self.say(f"found on {job.pod.address}: {found.kind}, attempt {found.number}")
            if found.kind == "running":
                attempt, is_first = 0, False
                self._hold_locks()
                time.sleep(job.pod.pull_seconds)
                continue
            if found.died:
                self._interrupt("died", DEATHS[found.kind])
                deaths.append(_complete(job))
                if (same := deaths.count(deaths[-1])) > RESTARTS:
                    self.say(f"the job died {same} times, and no run was completed meanwhile; the machine stays")
                    self.say(f"see {job.log(found.number)}. The same command tries again")
                    return 2
            elif not is_first or jobs.other_job(job, found):
                return 2
            attempt, push = job.next_number(found), found.kind == "none" or not found.died
            if push:  # a job that died goes on with its own code
                self._patiently(check, job, self.say)
            self.say("starting it again")

    def _patiently(self, action: Callable, *arguments: object, retried: type = UnreachableError) -> object:
        """The action's answer. These errors and OSError are waited out; GaveUp after give_up_minutes of them."""
        job, trouble, since = self.job, "", 0.0
        while True:
            try:
                answer = action(*arguments)
            except (retried, OSError) as error:
                now = time.monotonic()  # it stands still while this machine is suspended
                since = since if trouble else now
                if now - since > 60 * job.pod.give_up_minutes:
                    raise GaveUp from error
                if str(error) != trouble:  # reported once, however often it occurs in a row
                    self.say(f"{error}; trying again")
                trouble = str(error)
                time.sleep(job.pod.pull_seconds)
            else:
                if trouble:
                    self.say(f"pulling again; {_counts(job)}")
                return answer

    def give_up(self, error: Exception) -> int:
        """Exit status, see run(), after trouble that did not pass."""
        job = self.job
        if isinstance(error, UnreachableError):
            why = f"has not been reachable for {job.pod.give_up_minutes:g} minutes"
            self._interrupt("lost", f"{why}; last pull {job.known().get('last_pull') or 'none'}")
        else:
            job.update(state="unverified")
            self.say(f"NOT VERIFIED, so the machine must stay: {error}")
        self.say("it is still paid for if it exists. The same command continues, with another host: too")
        return 2

    def _look(self) -> tuple[Look, bool]:
        """How things stand there, once everything new is local; and whether the machine may go."""
        job = self.job
        try:
            found = job.ask("look")
        except UnreachableError:
            if self._was_torn_down():
                return Look("none"), True
            raise
        if found.kind != "none" and not _pull(job, found, self.say):
            raise OSError(f"{job.pod.address}: not every file can be read there")
        return found, found.kind == "ended" and not found.died and self._is_verified(found)

    def _hold_locks(self) -> None:
        """Hold the locks of runs that are under way there, as a local training would: the monitor shows them."""
        for run_dir, lock in self.locks.items():
            files = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
            if "config.json" not in files or files & {"result.json", "error.json"}:
                lock.release()
            elif not lock.is_locked:
                with contextlib.suppress(filelock.Timeout):  # a monitor takes it for an instant
                    lock.acquire(timeout=0)

    def _interrupt(self, kind: str, why: str) -> None:
        why = f"the machine {self.job.pod.host} {why}"
        marked = local_runs.interrupt(self.job.run_dirs, why)
        self.job.update(state=kind)
        self.say(f"{why}. Interrupted: {marked}; {_counts(self.job)}")

    def _is_verified(self, found: Look) -> bool:
        """Whether every file there is local, equal and complete; if so it is noted here and there. Says what is not."""
        job, log = self.job, self.job.log(found.number).read_text(encoding="utf-8", errors="replace")
        job.update(ended=state.now(), status=found.status)
        if not (found.status == 0 or (found.status == 1 and re.search(r"^pgolf: \d+ failed: ", log, re.MULTILINE))):
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "without a message")
            self._interrupt("failed", f"runs, and the job on it ended with exit status {found.status}: {last}")
            self.say(f"see {job.log(found.number)}; the machine stays, and the same command tries again")
            return False
        differ, failed = transfer.differing(job.pod, job.id, job.names), []
        problems = [f"{name}: not local as it is on the machine ({why})" for name, why in differ.items()]
        for sweep in job.sweeps:
            short, without = local_runs.shortfalls(sweep, found.status == 0)
            problems += short
            failed += without
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
        if not (known.get("verified") and known.get("teardown")):
            return False
        return not any(local_runs.shortfalls(sweep, known["status"] == 0)[0] for sweep in self.job.sweeps)

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
