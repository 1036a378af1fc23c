"""Make .venv in the repository root and install pgolf there with the versions of constraints.txt.

    python3 tools/install.py
    python3 tools/install.py --test-tools   # Debian's openssh-server and rsync, which the tests of `pgolf remote` need

Standard library only, any platform, at once done when nothing has changed. uv installs where it is on the PATH, pip
elsewhere and where uv fails (it does not read pip's settings). TORCH_SPEC=... installs that requirement for torch
instead of the build chosen here; delete .venv to choose anew.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - no pip has checked requires-python yet
    sys.exit("pgolf needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info[:2]))

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "pgolf-installed"  # the key of what was installed last
PIP = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", "constraints.txt"]
UV_OPTIONS = ["pip", "install", "-q", "--python", str(PYTHON), "-c", "constraints.txt"]
UV_OF_PIP = [str(PYTHON), "-m", "uv", *UV_OPTIONS]

TORCH_HELP = """
torch {pinned} could not be installed. Either
  - set TORCH_SPEC to a build that pip can get here, e.g. TORCH_SPEC=torch=={pinned} (on Linux the
    CUDA build, several GB), or to the path of a torch wheel, or
  - point pip to a folder with a torch {pinned} wheel: PIP_FIND_LINKS=<folder>,
and run this again."""


def attempts(*words: str, uv: str | None) -> list[list[list[str]]]:
    """What to try in turn until `words` are installed; an attempt is a list of commands. uv: its path, or None."""
    return [[[uv, *UV_OPTIONS, *words]]] * bool(uv) + [[[*PIP, *words]]]


def torch_attempts(
    platform: str, has_gpu: bool, pinned: str, spec: str | None = None, uv: str | None = None
) -> list[list[list[str]]]:
    """attempts for torch."""
    if spec or has_gpu or platform != "linux":
        return attempts(spec or f"torch=={pinned}", uv=uv)
    # Linux's default wheel brings gigabytes of CUDA. Where pip is not set up to find the CPU build, uv
    # knows the place.
    of_uv = ["--torch-backend", "cpu", f"torch=={pinned}"]
    by_pip = [[*PIP, f"torch=={pinned}+cpu"]]
    return [[[uv, *UV_OPTIONS, *of_uv]], by_pip] if uv else [by_pip, [[*PIP, "uv"], [*UV_OF_PIP, *of_uv]]]


def has_nvidia_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and b"GPU" in subprocess.run([smi, "-L"], capture_output=True).stdout


def pinned_torch(constraints: str) -> str:
    return re.search(r"^torch==(\S+)", constraints, re.MULTILINE)[1]


def step(title: str, *command: str | Path) -> str:
    """Run a command as one printed line with its seconds; returns what it said if it failed, else ''."""
    print(f"{title} ...", end="", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    failed = done.returncode != 0
    print(f" {'failed after ' if failed else ''}{time.perf_counter() - start:.1f} s", flush=True)
    return f"\n{title}:\n{done.stdout}" if failed else ""


def first_that_works(attempts: list[list[list[str]]]) -> str:
    """'' once all commands of an attempt have succeeded, else what every attempt said."""
    troubles = ""
    for attempt in attempts:
        tool = "uv" if any(Path(word).stem == "uv" for word in attempt[-1][:3]) else "pip"
        steps = (step(f"{tool} install {command[-1]}", *command) for command in attempt)
        trouble = next(filter(None, steps), "")  # stops at the first that fails
        if not trouble:
            return ""
        troubles += trouble
    return troubles


def test_tools() -> None:
    """Install what the tests run and Python has not, where that can be done; elsewhere say what is left out."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"
    commands = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
    packages = [package for command, package in commands.items() if not shutil.which(command, path=path)]
    if not packages:
        return
    troubles = "no apt-get, or not root"
    if shutil.which("apt-get") and os.geteuid() == 0:
        troubles = step("apt-get update", "apt-get", "update", "-q") or step(
            f"apt-get install {' '.join(packages)}",
            "apt-get",
            "install",
            "-y",
            "-q",
            "--no-install-recommends",
            *packages,
        )
    if troubles:
        lines = troubles.strip().splitlines()
        print(f"{', '.join(packages)} not installed ({lines[-1]}): the tests of `pgolf remote` will be skipped")


def main() -> None:
    if sys.argv[1:] == ["--test-tools"]:
        test_tools()
        return
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    inputs = [
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        constraints,
        "{}.{}".format(*sys.version_info[:2]),
    ]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    spec = os.environ.get("TORCH_SPEC")
    if not spec and STAMP.exists() and STAMP.read_text() == key:
        return

    STAMP.unlink(missing_ok=True)
    if not PYTHON.exists() and (trouble := step("making .venv", sys.executable, "-m", "venv", str(VENV))):
        shutil.rmtree(VENV, ignore_errors=True)  # half made: without pip, and not made again next time
        sys.exit(f"{trouble}\nNo virtual environment (on Debian and Ubuntu: apt install python3-venv).")

    pinned, uv = pinned_torch(constraints), shutil.which("uv")
    if troubles := first_that_works(torch_attempts(sys.platform, has_nvidia_gpu(), pinned, spec, uv)):
        sys.exit(troubles + TORCH_HELP.format(pinned=pinned))
    if troubles := first_that_works(attempts("-e", ".[lab,dev,search]", uv=uv)):
        sys.exit(f"{troubles}\npgolf could not be installed.")
    STAMP.write_text(key)


if __name__ == "__main__":
    main()
