"""Sweeps on a rented machine, which goes only when everything that it made is home, and whole.

The job there does not need us: whoever gives the same command again, at any time, finds it and goes on pulling, and
nothing starts twice. What dies is started again at once, and goes on from its resume files.
"""

import contextlib
import errno
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import filelock

from pgolf.machines import transfer
from pgolf.machines.preflight import check
from pgolf.machines.remote_job import (
    OF_A_TRY,
    Job,
    Look,
    again,
    is_known,
    look,
    not_home,
    note,
    now,
    place,
    read_state,
    start,
    went_with,
    write_state,
)
from pgolf.machines.ssh import RemoteError, UnreachableError
from pgolf.runs import directory
from pgolf.runs.directory import hold_lock
from pgolf.runs.result import TIME
from pgolf.sweeps.runner import missing

RESTARTS = 3  # at once, of a job that died and completed no run since it was started
LONGEST_WAIT = 30.0  # seconds between tries to reach the machine
LONGEST_TRY = 60.0  # seconds that one takes

Say = Callable[[str], None]


# From the start to the teardown


def run(job: Job, say: Say) -> int:
    """Start the job or find it there, pull until it ends, verify, tear down.

    Exit status: 0 all complete; 1 some runs failed, all there is of them is home; 2 the machine may not go yet, or is
    lost. RemoteError where nothing could be started.
    """
    with contextlib.ExitStack() as locks:
        _lock(job, locks)
        state = read_state(job.id)
        if state.get("verified"):
            here = state.get("verified_on") == place(job.pod)  # and on no other machine
            torn = here and (state.get("teardown") or {}).get("status") == 0
            if job.pod.teardown and not torn:
                if here and _is_still_home(job, say):
                    status = _teardown(job, say)
                    if read_state(job.id).get("verified"):
                        return status
            elif not any(any(missing(sweep)) for sweep in job.sweeps) and (torn or not _another_try(job)):
                say(f"all is home, verified at {state['verified']}; nothing to do")
                return 0
            state = read_state(job.id)
        found, fresh = None, not state.get("started") or state.get("verified")
        if fresh:
            check(job, say)
            found = look(job)
        else:
            with contextlib.suppress(UnreachableError):  # which _follow is patient with
                found = look(job)
        told = found is not None and found.kind == "ended" and found.number <= state.get("told", 0)
        if told and not fresh:  # it could not be verified; what was wrong may be right by now
            _bring(job, found)
            if _verified(job, found, say):
                return _teardown(job, say)
            check(job, say)
        if told or (fresh and found.kind == "none"):
            return _follow(job, say, max(found.number, state.get("number", 0)) + 1)
        if found is not None:
            say(f"found on {job.pod.address}: {found.kind}" + (f", try {found.number}" if found.number else ""))
        return _follow(job, say)


def _is_still_home(job: Job, say: Say) -> bool:
    """Whether nothing of what was verified was lost since; else it is noted that it is not verified."""
    ran = read_state(job.id).get("status") == 0
    problems = [problem for sweep in job.sweeps for problem in transfer.shortfalls(sweep, "", ran)[0]]
    if problems:
        say("no more home as it was verified:")
        for problem in problems:
            say(f"  - {problem}")
        write_state(job, state="unverified", told=0, **OF_A_TRY)
    return not problems


def _another_try(job: Job) -> bool:
    """Whether the machine, if it is there, has a try of the job that was not verified, which is noted then."""
    with contextlib.suppress(RemoteError):
        found, state = look(job), read_state(job.id)
        verified = ("ended", state.get("verified_number"), state.get("verified_on"))
        if found.kind != "none" and (found.kind, found.number, place(job.pod)) != verified:
            write_state(job, state=found.kind, told=0, **OF_A_TRY)
            return True
    return False


def pull_once(job: Job, say: Say) -> int:
    """Bring home what is there now, and say how things stand."""
    with contextlib.ExitStack() as locks:
        _lock(job, locks)
        found = look(job)
        if found.kind == "none":
            raise RemoteError(f"{job.pod.address}: no job {job.id} in {job.pod.dir}; `pgolf remote run` starts it")
        pulled = _bring(job, found)
        say(f"{found.kind} on {job.pod.address}; {len(pulled.changed)} files came, {_counts(job)}")
    return 0


def _lock(job: Job, locks: contextlib.ExitStack) -> None:
    for sweep in job.sweeps:
        sweep.directory.mkdir(parents=True, exist_ok=True)
        busy = f"{sweep.directory}: this sweep runs here already, or another process pulls it"
        locks.enter_context(hold_lock(sweep.directory / ".lock", 0, busy))


def _bring(job: Job, found: Look) -> transfer.Pulled:
    if found.kind == "running" and not is_known(job, found):
        transfer.forget_errors(job.sweeps)  # of the try before; those of this one come
    pulled = transfer.pull(job.pod, job.id, job.names)
    if not found.died:  # whatever was thought when it could not be reached
        transfer.forget_errors(job.sweeps, interruptions=True)
    note(job, found, last_pull=now())
    return pulled


def _complete(job: Job) -> int:
    return sum((run_dir / "result.json").exists() for sweep in job.sweeps for run_dir in transfer.wanted(sweep))


def _counts(job: Job) -> str:
    return f"{_complete(job)} of {sum(len(transfer.wanted(sweep)) for sweep in job.sweeps)} runs complete here"


def _follow(job: Job, say: Say, number: int = 0) -> int:
    """Pull until the job ends and all is verified, however often the connection breaks or the job dies.

    number: of the try to start first; 0 = there is one.
    """
    held: dict[Path, filelock.BaseFileLock] = {}
    restarts, complete, push, found = 0, _complete(job), True, None
    lost_since, wait, trouble, said = None, job.pod.pull_seconds, "", _log_sizes(job)
    lost, last = 0.0, 0.0  # seconds without a connection, and when they were counted last
    stuck_since = None  # since when what is left there does not come home, though the job ended
    try:
        while True:
            try:
                if number:  # which may have begun where the connection broke: then it is found
                    start(job, number, say, push)
                    say(f"started on {job.pod.address}; it goes on there whatever becomes of us")
                    number = 0
                found = _may_pass(look, job)
                _may_pass(_bring_all, job, found, said, say)
                ended = found.kind == "ended" and not found.died
                if lost_since or (trouble and not ended):
                    say(f"pulling again; {_counts(job)}")
                lost_since, wait, trouble = None, job.pod.pull_seconds, trouble if ended else ""
                if ended:
                    verified = _may_pass(_verified, job, found, say)
                    break
                stuck_since = None
                if found.died:
                    restarts, complete = (restarts, complete) if _complete(job) == complete else (0, _complete(job))
                    _died(job, found, say)
                    if restarts == RESTARTS:
                        raise RemoteError(
                            f"{job.pod.address}: the job died {RESTARTS + 1} times, and no run became complete; "
                            f"see {_log(job, found.number)}. The same command tries again"
                        )
                    push = found.kind == "none"  # else with the code that it began with
                    if push:
                        _check_anew(job, say)
                    restarts += 1
                    say("starting it again")
                    number = max(found.number, read_state(job.id).get("number", 0)) + 1
                    continue
                _hold(job, held)
            except UnreachableError as error:
                instant = time.monotonic()
                # A try takes no longer than that: what is beyond it, this machine slept.
                lost = lost + min(instant - last, wait + LONGEST_TRY) if lost_since else 0.0
                lost_since, last = lost_since or time.time(), instant
                if lost > 60 * job.pod.give_up_minutes:
                    return _lost(job, lost_since, say)
                trouble = _once(str(error), trouble, say)
                wait = max(job.pod.pull_seconds, min(2 * wait, LONGEST_WAIT))
            except OSError as error:  # of this disk, mostly: full
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                words = f"{directory.RUNS}: the disk is full; make room" if full else str(error)
                ended = found is not None and found.kind == "ended" and not found.died
                stuck_since = (stuck_since or time.monotonic()) if ended else None
                if ended and time.monotonic() - stuck_since > 60 * job.pod.give_up_minutes:
                    write_state(job, state="unverified")
                    say(f"NOT VERIFIED, so the machine must not go: {words}. The same command tries again")
                    return 2
                trouble = _once(f"{words}; trying on", trouble, say)
                wait = max(job.pod.pull_seconds, min(2 * wait, LONGEST_WAIT))
            time.sleep(wait)
        return _teardown(job, say) if verified else 2
    finally:
        for lock in held.values():
            lock.release()


def _may_pass(attempt: Callable, *arguments: object):
    """What it returns, or OSError for what may be right by the next time; UnreachableError as it is."""
    try:
        return attempt(*arguments)
    except UnreachableError:
        raise
    except RemoteError as error:
        raise OSError(str(error)) from error


def _bring_all(job: Job, found: Look, said: dict[Path, int], say: Say) -> None:
    if found.kind != "none":
        pulled = _bring(job, found)
        _tell_log(job, found.number, said, say)
        if not pulled.whole:
            raise OSError(f"{job.pod.address}: not every file can be read there")


def _check_anew(job: Job, say: Say) -> None:
    """As check, of which nothing is said where nobody answers: that passes, or is said as such."""
    lines: list[str] = []
    try:
        check(job, lines.append)
    except UnreachableError:
        lines.clear()
        raise
    finally:
        for line in lines:
            say(line)


def _once(words: str, before: str, say: Say) -> str:
    if words != before:
        say(words)
    return words


def _log(job: Job, number: int) -> Path:
    return transfer.folder(job.id) / f"try-{number}.log"


def _log_sizes(job: Job) -> dict[Path, int]:
    """Of what is here already, and was shown."""
    return {path: path.stat().st_size for path in transfer.folder(job.id).glob("try-*.log")}


def _tell_log(job: Job, number: int, said: dict[Path, int], say: Say) -> None:
    """What the job said since, in whole lines."""
    path = _log(job, number)
    if path.exists():
        with open(path, "rb") as f:
            f.seek(said.get(path, 0))
            lines, _, _ = f.read().rpartition(b"\n")
        for line in lines.decode(errors="replace").splitlines():
            say(f"  {line}")
        said[path] = said.get(path, 0) + (len(lines) + 1 if lines else 0)


def _hold(job: Job, held: dict[Path, filelock.BaseFileLock]) -> None:
    """Hold the locks of runs that are under way there, as their training would here: so the monitor shows them."""
    for run_dir in (run_dir for sweep in job.sweeps for run_dir in transfer.wanted(sweep)):
        there = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
        active = "config.json" in there and not there & {"result.json", "error.json"}
        if active and run_dir not in held:
            lock = filelock.FileLock(run_dir / ".lock")
            with contextlib.suppress(filelock.Timeout):  # somebody looks at it, this very moment
                lock.acquire(timeout=0)
                held[run_dir] = lock
        elif not active and run_dir in held:
            held.pop(run_dir).release()


def _died(job: Job, found: Look, say: Say) -> None:
    what = {
        "none": "has no such job any more: its disk is another one, or was emptied",
        "dead": "runs, and the job on it died without an end",
        "ended": f"runs, and the job on it was killed (exit status {found.status})",
    }[found.kind]
    marked = [name for sweep in job.sweeps for name in transfer.interrupt(sweep, f"the machine {job.pod.host} {what}")]
    write_state(job, state="died")
    say(f"{job.pod.address} {what}; interrupted: {', '.join(marked) or 'no run'}")


def _lost(job: Job, since: float, say: Say) -> int:
    last = read_state(job.id).get("last_pull") or "none"
    when = time.strftime(TIME, time.gmtime(since))
    why = f"the machine {job.pod.host} has not been reachable since {when}; last pull {last}"
    marked = [name for sweep in job.sweeps for name in transfer.interrupt(sweep, why)]
    write_state(job, state="lost")
    say(f"{why}. Interrupted: {', '.join(marked) or 'no run'}; {_counts(job)}")
    say("if it is there it is still paid for: look. The same command goes on with it, or with another host:")
    return 2


def _verified(job: Job, found: Look, say: Say) -> bool:
    """Whether all that is there is home and whole, and told if not."""
    log = _log(job, found.number).read_text(encoding="utf-8", errors="replace")
    write_state(job, ended=now(), status=found.status, told=found.number)
    failures_told = re.search(r"^pgolf: \d+ failed: ", log, re.MULTILINE)
    if not (found.status == 0 or (found.status == 1 and failures_told)):
        words = [line for line in log.splitlines() if line.strip()] or ["without a word"]
        why = f"the job on {job.pod.host} ended with exit status {found.status}: {words[-1]}"
        for sweep in job.sweeps:
            transfer.interrupt(sweep, why)
        write_state(job, state="failed")
        say(why)
        say(f"see {_log(job, found.number)}; the machine stays, and the same command tries again")
        return False
    kept = transfer.pull(job.pod, job.id, job.names).kept
    torn = {name: ", where it is torn: if nothing needs it, delete it there"
            for name, why in kept.items() if why == transfer.TORN}  # fmt: skip
    differ = transfer.differing(job.pod, job.id, job.names, kept)
    problems, failed = [f"{name}: not home as it is there{torn.get(name, '')}" for name in differ], []
    for sweep in job.sweeps:
        short, without = transfer.shortfalls(sweep, log, found.status == 0)
        problems, failed = problems + short, failed + without
    for line in failed:
        say(f"  {line}")
    if problems:
        say("NOT VERIFIED, so the machine must not go:")
        for line in problems:
            say(f"  - {line}")
        write_state(job, state="unverified")
        return False
    if hasattr(os, "sync"):
        os.sync()  # on the disk, not in memory: a power cut here may be the machine's end there
    where = {"verified_on": place(job.pod), "verified_number": found.number}
    write_state(job, state="verified", verified=now(), **where, failed=failed)
    say(f"{_counts(job)}, {len(failed)} failed; all is home and verified: the machine may go")
    return True


def _teardown(job: Job, say: Say) -> int:
    """Once it is verified. It is done again only where it failed, or was cut short."""
    state, command = read_state(job.id), job.pod.teardown
    assert state["verified"] and state["verified_on"] == place(job.pod), job.id
    status = 1 if state.get("failed") else 0
    if not command:
        say("no teardown: is set; stop the machine yourself")
        return status
    before = state.get("teardown") or {}
    begun = bool(before.get("begun")) and not before.get("waits")
    try:
        others = not_home(job, begun)
    except RemoteError as error:
        if isinstance(error, UnreachableError) and (other := went_with(job)):
            say(f"{error}: the machine went with job {other}")
            write_state(job, teardown={"command": command, "begun": now(), "status": 0})
            return status
        others = {}
        say(
            f"{error}; so nobody knows what else runs there, and the machine stays. The same command tries again; "
            "if you ended the machine yourself, take teardown: out of the file"
        )
    else:
        if others.pop(job.id, None):
            write_state(job, state="unverified", told=0, **OF_A_TRY)
            say("a try of this job is there that was not verified; the same command goes on with it")
            return 2
        for other, names in others.items():
            say(f"job {other} ({names}) is there and not home, so the machine stays; {again(other, job)}")
        if not others:
            return _tear_down(job, command, status, say)
    if not begun:
        write_state(job, teardown={"command": command, "begun": now(), "waits": True})
    return 2


def _tear_down(job: Job, command: str, status: int, say: Say) -> int:
    say(f"teardown: {command}")
    write_state(job, teardown={"command": command, "begun": now()})
    code = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL).returncode
    write_state(job, teardown={"command": command, "begun": now(), "status": code})
    if code:
        say(f"TEARDOWN FAILED (exit status {code}): THE MACHINE IS STILL PAID FOR. By hand: {command}")
        say("or give the same command again, which tries it again")
        return 2
    say("torn down")
    return status
