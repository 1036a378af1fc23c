"""A machine that OpenSSH and rsync reach: the file that names it, scripts run there, files copied, what it has.

host: 203.0.113.7        # required; all other keys have these defaults
user: root
port: 22
key: ''                  # private key, from this file's folder or absolute; '' = ssh's own choice
dir: pgolf-remote        # folder there, absolute or from the user's home
gpus: 1                  # needed there; 0 = none
free_gb: 5               # of disk, beyond what code, data and runs are estimated to take
python: ''               # a python there that has the dependencies; '' = tools/install.py makes .venv there
setup: ''                # shell command, run there in the checkout before the job
data: push               # the folders of shards that the runs use; there = they are, or setup brings them
pull_seconds: 10
teardown: ''             # shell command, run here once everything there, of other jobs too, is home and verified
give_up_minutes: 30      # without a connection
ssh_options: [BatchMode=yes, ConnectTimeout=10, ServerAliveInterval=5, ServerAliveCountMax=3, …]
"""

import difflib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Line = Annotated[str, Field(pattern=r"^[^\r\n\x00]*$")]
MODULES = (  # what pyproject.toml's dependencies are imported as
    *("torch", "numpy", "sentencepiece", "huggingface_hub", "safetensors", "constriction", "brotli", "pydantic"),
    *("pydantic_settings", "yaml", "pandas", "scipy", "matplotlib", "tqdm", "filelock", "psutil", "papermill"),
    *("ipykernel", "nbconvert", "sympy", "networkx"),
)
CONNECTION_LOST = (10, 12, 30, 35, 255)  # rsync's exit statuses
VANISHED, PARTIAL = 24, 23


class RemoteError(ValueError):
    """Something of a remote job that cannot be as asked; the message says what would be right."""


class UnreachableError(RemoteError):
    """No connection, or one that broke."""


class Pod(BaseModel):
    """A machine, its folder, and what a job needs there; the module's docstring has each key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\[][A-Za-z0-9_.:%\]-]*$")]
    user: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$")] = "root"
    port: Annotated[int, Field(gt=0, lt=65536)] = 22
    key: Line = ""
    # No character that a shell or rsync would read as anything but itself.
    dir: Annotated[str, Field(pattern=r"^/?[A-Za-z0-9_.][A-Za-z0-9_.+=/-]*$")] = "pgolf-remote"
    gpus: Annotated[int, Field(ge=0)] = 1
    free_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    python: Annotated[str, Field(pattern=r"^(/[^\r\n\x00]*)?$")] = ""
    setup: str = ""
    data: Literal["push", "there"] = "push"
    pull_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    teardown: str = ""
    give_up_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    ssh_options: list[Line] = [
        *("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
        "StrictHostKeyChecking=accept-new",
    ]

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def address(self) -> str:
        """For people, and `ssh -p`."""
        return f"{self.login} port {self.port}"


def load_pod(path: str | Path) -> Pod:
    """Read and check a whole POD.yaml. RemoteError naming everything that is wrong with it."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RemoteError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise RemoteError(f"{path}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise RemoteError(f"{path}: a machine is a mapping with host:, not {type(content).__name__}")
    known = {str(key): value for key, value in content.items() if key in Pod.model_fields}
    problems = [_unknown(str(key)) for key in content if key not in Pod.model_fields]
    try:
        pod = Pod(**known)
    except ValidationError as error:
        problems += [_wrong(e) for e in error.errors()]
    if not problems and pod.key:
        pod = pod.model_copy(update={"key": str(path.parent.absolute() / Path(pod.key).expanduser())})
        problems += [] if Path(pod.key).is_file() else [f"key: no such file: {pod.key}"]
    if problems:
        raise RemoteError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return pod


def _unknown(key: str) -> str:
    nearest = difflib.get_close_matches(key, Pod.model_fields, n=1, cutoff=0.5)
    return f"{key}: no such key; " + (
        f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(Pod.model_fields)}"
    )


def _wrong(error: dict) -> str:
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{name}: is not there, and there is no default"
    expected = {
        "host": "a name or address, like 203.0.113.7",
        "dir": "a folder there, of letters, digits and . _ + = - / alone, absolute or from the user's home",
        "python": "an absolute path there, like /usr/bin/python3, or ''",
    }.get(name, error["msg"][0].lower() + error["msg"][1:])
    return f"{name}: {error['input']!r}: expected {expected.removeprefix('input should be ')}"


# Scripts and copies


def ssh_words(pod: Pod) -> list[str]:
    """The ssh command up to the host."""
    options = [word for option in pod.ssh_options for word in ("-o", option)]
    key = ["-i", pod.key, "-o", "IdentitiesOnly=yes"] if pod.key else []
    return ["ssh", *options, *key, "-p", str(pod.port)]


def run_script(pod: Pod, script: str, *words: str, more: str = "", timeout: float = 60) -> str:
    """What a POSIX sh script prints there; words are its $1 …, more is what it can read.

    UnreachableError without a connection, RemoteError for another exit status than 0, with the script's last words.
    """
    # As a word of the command, since from its input sh would read on after a connection broke in the middle of a line.
    command = [*ssh_words(pod), "-T", pod.login, "sh", "-c", shlex.quote(script), "sh", *map(shlex.quote, words)]
    try:
        done = subprocess.run(command, input=more.encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"{pod.address}: connected, and no answer for {timeout:.0f} s") from None
    except FileNotFoundError:
        raise RemoteError("ssh is not here; install OpenSSH") from None
    said = done.stderr.decode(errors="replace")
    if done.returncode == 255:
        raise UnreachableError(why_unreachable(pod, said))
    if done.returncode:
        why = _last_line(said) or _last_line(done.stdout.decode(errors="replace")) or f"exit status {done.returncode}"
        if "PTY" in why:  # what a provider's proxy says, on its output
            why += "; this address takes terminals alone: use the machine's own, of ssh over a TCP port"
        raise RemoteError(f"{pod.address}: {why}")
    return done.stdout.decode(errors="replace")


def rsync(
    pod: Pod, words: Sequence[str], cwd: Path, names: Sequence[str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run rsync over the pod's ssh in a folder here; `at` makes words of the pod's paths. Exit status 0 or PARTIAL.

    names: given to --files-from. Paths of this machine are to be relative: on Windows C: would be a host.
    """
    # rsync splits -e at spaces and knows quotes, of which one within is doubled; a shell's other ways it does not know.
    shell = " ".join("'" + word.replace("'", "''") + "'" for word in ssh_words(pod))
    listed = ["--files-from=-", "--from0"] if names is not None else []
    try:
        done = subprocess.run(
            ["rsync", "-e", shell, "--timeout=600", *listed, *words],
            cwd=cwd,
            input=b"\0".join(os.fsencode(name) for name in names or ()),
            capture_output=True,
        )
    except FileNotFoundError:
        raise RemoteError("rsync is not here; install it") from None
    said = done.stderr.decode(errors="replace")
    if done.returncode in (0, VANISHED):
        done.returncode = 0
        return done
    if "No space left on device" in said or "Disk quota exceeded" in said:
        where = cwd if words[-1] == "." else pod.address
        raise RemoteError(f"{where}: the disk is full; make room")
    if "command not found" in said or "rsync: not found" in said or done.returncode == 127:
        raise RemoteError(f"{pod.address}: rsync is not there; install it: apt-get install rsync")
    if done.returncode in CONNECTION_LOST:
        raise UnreachableError(why_unreachable(pod, said))
    if done.returncode == PARTIAL:
        return done
    raise RemoteError(f"{pod.address}: rsync: {_last_line(said) or f'exit status {done.returncode}'}")


def at(pod: Pod, *paths: str) -> list[str]:
    """Paths in the pod's folder as rsync's sources, the first with the host."""
    host = f"[{pod.host}]" if ":" in pod.host and not pod.host.startswith("[") else pod.host
    login = f"{pod.user}@{host}" if pod.user else host
    return [f"{login if i == 0 else ''}:{pod.dir}/{path}" for i, path in enumerate(paths)]


def why_unreachable(pod: Pod, said: str) -> str:
    """One line of what ssh said, with what would be right."""
    place = pod.address
    if "Permission denied" in said:
        key = pod.key or "that ssh offers"
        return f"{place}: the key {key} is not accepted; put its .pub into authorized_keys there, or set key: or user:"
    if "IDENTIFICATION HAS CHANGED" in said or "Host key verification failed" in said:
        name = f"[{pod.host}]:{pod.port}" if pod.port != 22 else pod.host
        return (
            f"{place}: another machine answers than the one known by this address; if the machine was replaced: "
            f"ssh-keygen -R '{name}'"
        )
    if "Could not resolve" in said:
        return f"{place}: no such host; look at host:"
    if "refused" in said:
        return f"{place}: nothing listens there; look at port:, and whether the machine is up"
    if "timed out" in said or "No route" in said or "unreachable" in said:
        return f"{place}: no answer; look at host: and port:, and whether the machine is up"
    broke = ("unexpectedly closed", "Broken pipe", "Connection reset", "Connection closed", "closed by remote host")
    return (
        f"{place}: the connection broke"
        if any(map(said.__contains__, broke)) or not said
        else f"{place}: {_last_line(said)}"
    )


def _last_line(text: str) -> str:
    """The last that says something: rsync ends with a line of its own about its source code."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Warning: Permanently added")]
    telling = [line for line in lines if not line.startswith("rsync error:")]
    return (telling or lines or [""])[-1]


# What is there

FIND_PYTHON = """
find_python() {
    for python in python3 python3.13 python3.12 python3.11; do
        "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return 0
    done
    return 1
}
"""
PROBE = (
    FIND_PYTHON
    + """
top=$1 needed=$2
echo "pgolf-probe"
echo "rsync=$(command -v rsync)"
echo "sums=$(command -v sha256sum || command -v shasum)"
echo "gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')"
there=$top
while [ ! -d "$there" ]; do there=$(dirname "$there"); done
echo "free=$(df -Pk "$there" | awk 'NR > 1 { print $(NF - 2) }' | tail -1)"
if [ -n "$needed" ]; then
    python=$needed
    echo "version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
    echo "lacks=$("$python" -c "$3" 2>/dev/null)"
else
    find_python && echo "version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
fi
mkdir -p "$top" 2>/dev/null && [ -w "$top" ] && echo "writable=yes"
exit 0
"""
)
LACKING = f"""
from importlib.util import find_spec
print(" ".join(name for name in {MODULES!r} if find_spec(name) is None))
"""


def probe(pod: Pod, needed_bytes: int) -> list[tuple[str, RemoteError | str]]:
    """(what was looked at, what is wrong with it or ''), in order; only the first where nobody answers."""
    try:
        said = run_script(pod, PROBE, pod.dir, pod.python, LACKING)
    except RemoteError as error:
        return [(f"{pod.address} answers", error)]
    first, _, rest = said.partition("\n")
    if first != "pgolf-probe":
        why = f"its shell prints {first!r} before any command, which breaks rsync; keep .bashrc silent there"
        return [(f"{pod.address} answers", f"{pod.address}: {why}")]
    found = dict(line.partition("=")[::2] for line in rest.splitlines())
    gpus, free = int(found.get("gpus") or 0), 1024 * int(found.get("free") or 0)
    needed = needed_bytes + int(1e9 * pod.free_gb)
    install = {"rsync": "rsync is not there; install it: apt-get install rsync"}
    python = ""
    if pod.python and not found.get("version"):
        python = f"{pod.python} is not there, or no python; set python: to one, or '' to have one set up"
    elif not found.get("version"):
        python = "no python3 of at least 3.11 with venv is there; apt-get install python3.11-venv, or set python:"
    elif tuple(map(int, found["version"].split("."))) < (3, 11):
        python = f"{pod.python} is Python {found['version']}, and pgolf needs 3.11; set python: to another, or to ''"
    elif found.get("lacks"):
        python = f"{pod.python} has no {', '.join(found['lacks'].split())}; install these, or set python: ''"
    return [
        (f"{pod.address} answers and accepts the key", ""),
        (f"{pod.dir} can be written there", "" if found.get("writable") else f"{pod.dir} cannot be made; set dir:"),
        ("rsync is there", "" if found.get("rsync") else install["rsync"]),
        ("sha256sum is there", "" if found.get("sums") else "neither sha256sum nor shasum is there; install coreutils"),
        (f"Python {found.get('version', '')} is there", python),
        (
            f"{gpus} GPUs there, {pod.gpus} needed",
            "" if gpus >= pod.gpus else f"{gpus} GPUs by nvidia-smi -L, and gpus: {pod.gpus}; take another machine",
        ),
        (
            f"{free / 1e9:.1f} GB free there, {needed / 1e9:.1f} GB needed",
            "" if free >= needed else f"{free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB needed; take a larger disk",
        ),
    ]


def local_tools() -> str:
    """'' where ssh and rsync are here, and rsync is one that pulls as `transfer` needs it."""
    absent = [name for name in ("ssh", "rsync") if not shutil.which(name)]
    if absent:
        windows = "; on Windows, work in WSL" if os.name == "nt" else ""
        return f"{' and '.join(absent)} not found here; install OpenSSH's client and rsync{windows}"
    try:
        done = subprocess.run(["rsync", "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"rsync --version: {error}"
    first = done.stdout.decode(errors="replace").partition("\n")[0].strip()
    if first.startswith("rsync  version 3."):
        return ""
    return (
        f"rsync here says {first!r}, and version 3 is needed: macOS's own rsync will not do: `brew install rsync`; "
        "on Windows, work in WSL"
    )
