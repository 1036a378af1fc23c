"""A rented machine: the file that names it, POD.yaml, commands on it by OpenSSH, and copies to and from it by rsync.

setup and teardown are code: use a POD.yaml only if you would run it as a script.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pgolf_core.config import did_you_mean, shown

Line = Annotated[str, Field(pattern=r"^[^\r\n\x00]*$")]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HOST = "a name or address, like 203.0.113.7"
DIR = "a folder named with letters, digits and . _ + = - / alone, absolute or relative to the user's home"
PYTHON = "an absolute path on the machine, like /usr/bin/python3, or ''"
# Options of ssh_config(5) that start no command on this machine and forward nothing to the other one.
SSH_OPTIONS = (
    "AddressFamily BatchMode BindAddress BindInterface CertificateFile CheckHostIP Ciphers Compression "
    "ConnectionAttempts ConnectTimeout ControlMaster ControlPath ControlPersist GlobalKnownHostsFile "
    "HostKeyAlgorithms HostKeyAlias IdentitiesOnly IdentityAgent IPQoS KexAlgorithms LogLevel MACs "
    "NumberOfPasswordPrompts PreferredAuthentications ProxyJump PubkeyAcceptedAlgorithms RekeyLimit "
    "ServerAliveCountMax ServerAliveInterval StrictHostKeyChecking TCPKeepAlive UserKnownHostsFile"
)
PROXY_JUMP = re.compile(r"[\w][\w.@:,\[\]-]*")  # hosts alone: ssh makes a command of it
JOB_SCRIPT = Path(__file__).with_name("job.sh")
CONNECTION_LOST = (10, 12, 30, 35, 255)  # exit statuses of rsync and ssh; job.sh has none of these, nor the next two
VANISHED, PARTIAL = 24, 23  # rsync: files were deleted meanwhile; not every file could be copied


class RemoteError(ValueError):
    """A remote job that cannot be done as asked; the message says what would be right."""


class UnreachableError(RemoteError):
    """No connection, or one that broke."""


def _allowed(option: str) -> str:
    name, _, value = option.lower().partition("=")
    if name not in SSH_OPTIONS.lower().split() or (name == "proxyjump" and not PROXY_JUMP.fullmatch(value)):
        raise ValueError(
            "an option NAME=VALUE that runs no command on this machine; ProxyCommand, LocalCommand and their like are "
            "refused here: put them into ~/.ssh/config, under a Host that host: names"
        )
    return option


class Pod(BaseModel):
    """A machine, its folder, and what a job needs on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\[][A-Za-z0-9_.:%\]-]*$", description=HOST)]
    user: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$")] = "root"
    port: Annotated[int, Field(gt=0, lt=65536)] = 22
    key: Line = ""  # private key, relative to POD.yaml; '' = ssh's own choice
    # Only characters that neither a shell nor rsync interprets.
    dir: Annotated[str, Field(pattern=r"^/?[A-Za-z0-9_.][A-Za-z0-9_.+=/-]*$", description=DIR)] = "pgolf-remote"
    gpus: Annotated[int, Field(ge=0)] = 1  # needed on the machine
    free_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0  # beyond the estimate for code, data and runs
    # It has all dependencies; '' = .venv is made there.
    python: Annotated[str, Field(pattern=r"^(/[^\r\n\x00]*)?$", description=PYTHON)] = ""
    setup: str = ""  # shell command, run there in the checkout before the job
    data: Literal["push", "there"] = "push"  # 'there': not pushed, setup brings it or it is there
    pull_seconds: Amount = 10.0
    teardown: str = ""  # shell command, run here once every file is verified
    give_up_minutes: Amount = 30.0  # without a connection
    ssh_options: list[Annotated[Line, AfterValidator(_allowed)]] = [
        *("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
        "StrictHostKeyChecking=accept-new",
    ]

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def address(self) -> str:
        """For messages, and for `ssh -p`."""
        return f"{self.login} port {self.port}"

    @property
    def place(self) -> dict:
        """The fields that distinguish a machine and its folder from others."""
        return self.model_dump(include={"host", "port", "user", "dir"})

    @property
    def ssh(self) -> list[str]:
        """The ssh command up to the host."""
        options = [word for option in self.ssh_options for word in ("-o", option)]
        key = ["-i", self.key, "-o", "IdentitiesOnly=yes"] if self.key else []
        return ["ssh", *options, *key, "-p", str(self.port)]

    def call(self, command: str, *words: str, stdin: str = "", timeout: float = 60) -> str:
        """Run a command of job.sh on the machine; returns what it prints.

        Raises UnreachableError without a connection or without an answer in `timeout` seconds, RemoteError for another
        exit status than 0, with the script's last line.
        """
        # The script is an argument: read from stdin, a connection that breaks within a line would cut it there.
        script = [JOB_SCRIPT.read_text(encoding="utf-8"), "job.sh", command, self.dir, *words]
        command_line = [*self.ssh, "-T", self.login, "sh", "-c", *map(shlex.quote, script)]
        return self._run(command_line, input=stdin.encode(), timeout=timeout).stdout.decode(errors="replace")

    def rsync(self, words: Sequence[str], cwd: Path, names: Sequence[str] | None = None) -> bool:
        """Run rsync over ssh in a local folder; whether every file could be read and written.

        words: options and paths; `at` makes them of paths on the machine. names: for --files-from. Local paths must be
        relative: on Windows, C: would be a host. Raises as `call` does.
        """
        # rsync splits -e at spaces; within quotes it knows a doubled quote and nothing else of a shell's ways.
        shell = " ".join("'" + word.replace("'", "''") + "'" for word in self.ssh)
        listed = ["--files-from=-", "--from0"] if names is not None else []
        command_line = ["rsync", "-e", shell, "--timeout=600", *listed, *words]
        return self._run(command_line, cwd=cwd, input=os.fsencode("\0".join(names or ()))).returncode != PARTIAL

    def at(self, *paths: str) -> list[str]:
        """Paths in the machine's folder as rsync's words, the first with the host."""
        host = f"[{self.host}]" if ":" in self.host and not self.host.startswith("[") else self.host
        first, *others = (f":{self.dir}/{path}" for path in paths)
        return [self.login.removesuffix(self.host) + host + first, *others]

    def _run(self, command_line: list[str], **options: object) -> subprocess.CompletedProcess:
        try:
            done = subprocess.run(command_line, capture_output=True, **options)
        except subprocess.TimeoutExpired as error:
            raise UnreachableError(f"{self.address}: connected, and no answer for {error.timeout:.0f} s") from None
        if done.returncode in (0, VANISHED, PARTIAL):
            return done
        said = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
        lines = [line for line in map(str.strip, said.splitlines()) if line and not line.startswith("rsync error:")]
        last = lines[-1] if lines else f"exit status {done.returncode}"  # rsync ends with one about its source code
        if full := [line for line in lines if "No space left on device" in line or "Disk quota exceeded" in line]:
            raise RemoteError(f"{self.address}: {full[0]}; make room")  # rsync names the side and the file
        if done.returncode in CONNECTION_LOST:
            where = "host:, port: and key:, and whether the machine is up"
            raise UnreachableError(f"{self.address}: no connection ({last}); look at {where}")
        if "PTY" in said:  # a provider's proxy
            last += "; this address takes terminals alone: use the machine's own ssh over a TCP port"
        raise RemoteError(f"{self.address}: {last}")


def load_pod(path: str | Path) -> Pod:
    """Read and check POD.yaml. Raises one RemoteError that names everything that is wrong with it."""
    path = Path(path)
    try:
        pod = Pod.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise RemoteError("\n  - ".join([f"{path}:", *map(_explain, error.errors())])) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not pod.key:
        return pod
    key = path.parent.absolute() / Path(pod.key).expanduser()
    if not key.is_file():
        raise RemoteError(f"{path}:\n  - key: no such file: {key}")
    return pod.model_copy(update={"key": str(key)})


def _explain(error: dict) -> str:
    """One of pydantic's problems: "port: input should be a valid integer, found 'many'"."""
    name, expected = str((error["loc"] or ["content"])[0]), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{name}: no such key; the keys are {', '.join(Pod.model_fields)}{did_you_mean(name, Pod.model_fields)}"
    if error["type"] == "string_pattern_mismatch":
        expected = Pod.model_fields[name].description or expected
    return f"{name}: {expected[0].lower()}{expected[1:]}, found {shown(error['input'])}"
