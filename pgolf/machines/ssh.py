"""Commands on a rented machine and copies to and from it, by OpenSSH and rsync."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pgolf.machines.pod import Pod, RemoteError

JOB_SCRIPT = Path(__file__).with_name("job.sh")
CONNECTION_LOST = (10, 12, 30, 35, 255)  # rsync's exit statuses
VANISHED, PARTIAL = 24, 23


class UnreachableError(RemoteError):
    """No connection, or one that broke."""


def ssh_words(pod: Pod) -> list[str]:
    """The ssh command up to the host."""
    options = [word for option in pod.ssh_options for word in ("-o", option)]
    key = ["-i", pod.key, "-o", "IdentitiesOnly=yes"] if pod.key else []
    return ["ssh", *options, *key, "-p", str(pod.port)]


def call(pod: Pod, command: str, *words: str, stdin: str = "", timeout: float = 60) -> str:
    """Run a command of job.sh on the machine; returns what it prints.

    Raises UnreachableError without a connection or without an answer in `timeout` seconds, RemoteError for another
    exit status than 0, with the script's last line.
    """
    # The script is an argument: read from stdin, a connection that breaks in the middle of a line would cut it there.
    script = [JOB_SCRIPT.read_text(encoding="utf-8"), "job.sh", command, pod.dir, *words]
    command_line = [*ssh_words(pod), "-T", pod.login, "sh", "-c", *map(shlex.quote, script)]
    try:
        done = subprocess.run(command_line, input=stdin.encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"{pod.address}: connected, and no answer for {timeout:.0f} s") from None
    said, printed = (text.decode(errors="replace") for text in (done.stderr, done.stdout))
    if done.returncode == 255:
        raise UnreachableError(why_unreachable(pod, said))
    if done.returncode:
        why = _last_line(said) or _last_line(printed) or f"exit status {done.returncode}"
        if "PTY" in why:  # a provider's proxy prints this on stdout
            why += "; this address takes terminals alone: use the machine's own ssh over a TCP port"
        raise RemoteError(f"{pod.address}: {why}")
    return printed


def rsync(pod: Pod, words: Sequence[str], cwd: Path, names: Sequence[str] | None = None) -> bool:
    """Run rsync over the pod's ssh in a local folder; whether every file could be read and written.

    words: options and paths; `at` makes them of the pod's paths. names: for --files-from. Local paths must be
    relative: on Windows, C: would be a host.
    """
    # rsync splits -e at spaces; within quotes it knows a doubled quote and nothing else of a shell's ways.
    shell = " ".join("'" + word.replace("'", "''") + "'" for word in ssh_words(pod))
    listed = ["--files-from=-", "--from0"] if names is not None else []
    command_line = ["rsync", "-e", shell, "--timeout=600", *listed, *words]
    done = subprocess.run(command_line, cwd=cwd, input=os.fsencode("\0".join(names or ())), capture_output=True)
    said = done.stderr.decode(errors="replace")
    if "No space left on device" in said or "Disk quota exceeded" in said:
        raise RemoteError(f"{cwd if words[-1] == '.' else pod.address}: No space left on device; make room")
    if done.returncode in CONNECTION_LOST:
        raise UnreachableError(why_unreachable(pod, said))
    if done.returncode not in (0, VANISHED, PARTIAL):
        raise RemoteError(f"{pod.address}: rsync: {_last_line(said) or f'exit status {done.returncode}'}")
    return done.returncode != PARTIAL


def at(pod: Pod, *paths: str) -> list[str]:
    """Paths in the pod's folder as rsync's words, the first with the host."""
    host = f"[{pod.host}]" if ":" in pod.host and not pod.host.startswith("[") else pod.host
    first, *others = (f":{pod.dir}/{path}" for path in paths)
    return [pod.login.removesuffix(pod.host) + host + first, *others]


def why_unreachable(pod: Pod, said: str) -> str:
    """ssh's error output in one line, with the keys of POD.yaml to look at."""
    if "verification failed" in said:
        known = f"[{pod.host}]:{pod.port}" if pod.port != 22 else pod.host
        why = f"another machine answers than the one known by this address; if it was replaced: ssh-keygen -R '{known}'"
    elif "Permission denied" in said:
        why = f"the key {pod.key or 'that ssh offers'} is not accepted; put its .pub into authorized_keys there"
    else:
        why = f"no connection ({_last_line(said)}); look at host: and port:, and whether the machine is up"
    return f"{pod.address}: {why}"


def _last_line(text: str) -> str:
    """The last informative line; rsync ends with one about its source code."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("rsync error:")]
    return lines[-1] if lines else ""
