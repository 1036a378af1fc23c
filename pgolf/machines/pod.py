"""The file that names a rented machine, POD.yaml, and its checks.

setup and teardown are code: use a POD.yaml only if you would run it as a script.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pgolf_core.config import did_you_mean

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


class RemoteError(ValueError):
    """A remote job that cannot be done as asked; the message says what would be right."""


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


def load_pod(path: str | Path) -> Pod:
    """Read and check POD.yaml. Raises one RemoteError that names everything that is wrong with it."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        pod = Pod.model_validate(content)
        if pod.key:
            pod = pod.model_copy(update={"key": str(path.parent.absolute() / Path(pod.key).expanduser())})
            if not Path(pod.key).is_file():
                raise RemoteError(f"{path}:\n  - key: no such file: {pod.key}")
    except ValidationError as error:
        raise RemoteError("\n  - ".join([f"{path}:", *map(_sentence, error.errors())])) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RemoteError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    return pod


def _sentence(error: dict) -> str:
    """One line for one pydantic error."""
    if not error["loc"]:
        return f"expected a mapping with host:, found {type(error['input']).__name__}"
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{name}: no such key; the keys are {', '.join(Pod.model_fields)}{did_you_mean(name, Pod.model_fields)}"
    if error["type"] == "missing":
        return f"{name}: is missing, and has no default"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name}: {error['input']!r}: expected {Pod.model_fields[name].description or expected}"
