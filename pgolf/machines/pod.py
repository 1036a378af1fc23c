"""The file that names a rented machine, POD.yaml, and its checks.

setup and teardown are code: use a POD.yaml only if you would run it as a script.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Line = Annotated[str, Field(pattern=r"^[^\r\n\x00]*$")]
# Options of ssh_config(5) that start no command on this machine and forward nothing to the other one.
SSH_OPTIONS = (
    "AddressFamily BatchMode BindAddress BindInterface CertificateFile CheckHostIP Ciphers Compression "
    "ConnectionAttempts ConnectTimeout ControlMaster ControlPath ControlPersist GlobalKnownHostsFile "
    "HostKeyAlgorithms HostKeyAlias IdentitiesOnly IdentityAgent IPQoS KexAlgorithms LogLevel MACs "
    "NumberOfPasswordPrompts PreferredAuthentications ProxyJump PubkeyAcceptedAlgorithms RekeyLimit "
    "ServerAliveCountMax ServerAliveInterval StrictHostKeyChecking TCPKeepAlive UserKnownHostsFile"
)
PROXY_JUMP = re.compile(r"[\w][\w.@:,\[\]-]*")  # hosts alone: ssh makes a command of it
EXPECTED = {
    "host": "a name or address, like 203.0.113.7",
    "dir": "a folder named with letters, digits and . _ + = - / alone, absolute or relative to the user's home",
    "python": "an absolute path on the machine, like /usr/bin/python3, or ''",
}


class RemoteError(ValueError):
    """A remote job that cannot be done as asked; the message says what would be right."""


def _allowed(option: str) -> str:
    name, _, value = option.partition("=")
    if name.lower() not in SSH_OPTIONS.lower().split() or (
        name.lower() == "proxyjump" and not PROXY_JUMP.fullmatch(value)
    ):
        raise ValueError(
            "an option NAME=VALUE that runs no command on this machine; ProxyCommand, LocalCommand and their like are "
            "refused here: put them into ~/.ssh/config, under a Host that host: names"
        )
    return option


class Pod(BaseModel):
    """A machine, its folder, and what a job needs on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\[][A-Za-z0-9_.:%\]-]*$")]
    user: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$")] = "root"
    port: Annotated[int, Field(gt=0, lt=65536)] = 22
    key: Line = ""  # private key, relative to POD.yaml; '' = ssh's own choice
    # Absolute or relative to the user's home; only characters that neither a shell nor rsync interprets.
    dir: Annotated[str, Field(pattern=r"^/?[A-Za-z0-9_.][A-Za-z0-9_.+=/-]*$")] = "pgolf-remote"
    gpus: Annotated[int, Field(ge=0)] = 1  # needed on the machine
    free_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0  # beyond the estimate for code, data and runs
    python: Annotated[str, Field(pattern=r"^(/[^\r\n\x00]*)?$")] = ""  # has all dependencies; '' = .venv is made there
    setup: str = ""  # shell command, run there in the checkout before the job
    data: Literal["push", "there"] = "push"  # 'there': not pushed, setup brings it or it is there
    pull_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    teardown: str = ""  # shell command, run here once every file is verified
    give_up_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0  # without a connection
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
        return {"host": self.host, "port": self.port, "user": self.user, "dir": self.dir}


def load_pod(path: str | Path) -> Pod:
    """Read and check POD.yaml. Raises one RemoteError that names everything that is wrong with it."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RemoteError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise RemoteError(f"{path}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise RemoteError(f"{path}: expected a mapping with host:, found {type(content).__name__}")
    try:
        pod = Pod(**{str(key): value for key, value in content.items()})
    except ValidationError as error:
        problems = "\n".join(f"  - {_sentence(e)}" for e in error.errors())
        raise RemoteError(f"{path}:\n{problems}") from error
    if pod.key:
        pod = pod.model_copy(update={"key": str(path.parent.absolute() / Path(pod.key).expanduser())})
        if not Path(pod.key).is_file():
            raise RemoteError(f"{path}:\n  - key: no such file: {pod.key}")
    return pod


def _sentence(error: dict) -> str:
    """One line for one pydantic error."""
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(name, Pod.model_fields, n=1, cutoff=0.5)
        return f"{name}: no such key; the keys are {', '.join(Pod.model_fields)}" + (
            f"; did you mean {nearest[0]}?" if nearest else ""
        )
    if error["type"] == "missing":
        return f"{name}: is missing, and has no default"
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name}: {error['input']!r}: expected {EXPECTED.get(name, message)}"
