"""`pgolf init`: a folder to work in, for an installed pgolf without its repository."""

import argparse
import json
import tomllib
from importlib import metadata
from pathlib import Path

from pgolf.cli.arguments import add_command
from pgolf_core.config import CHECKOUT, MARKER, ConfigError
from pgolf_core.files import atomic_write

PACKAGED = Path(__file__).resolve().parents[1] / "workspace"  # in a wheel; setup.py copies it there


def add_commands(commands) -> None:
    text = "make a folder with the notebooks and sweeps, where every command then finds its runs, data and reports"
    sub = add_command(commands, init, "init", text, "pgolf init golf")
    sub.add_argument("folder", type=Path, metavar="DIR", help="new, or one that lacks some of the files")
    sub.set_defaults(anywhere=True)


def packaged_files() -> dict[str, Path]:
    """Path below the new folder -> the file it is a copy of, in the wheel or the checkout."""
    source, patterns = PACKAGED, ["**/*"]
    if not source.is_dir():
        source, project = CHECKOUT, tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
        patterns = project["tool"]["pgolf"]["workspace"]
    files = [file for pattern in patterns for file in sorted(source.glob(pattern)) if file.is_file()]
    return {file.relative_to(source).as_posix(): file for file in files}


def init(arguments: argparse.Namespace) -> int:
    """Copy what is missing; a file that is there stays as it is. The marker comes last."""
    folder = arguments.folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder")
    if (folder / "pyproject.toml").is_file() and (folder / "pgolf_core").is_dir():
        raise ConfigError(f"{folder}: is the checkout, which has all of it; name another folder")
    kept = []
    for name, source in packaged_files().items():
        target, content = folder / name, source.read_bytes()
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, content)
        elif target.read_bytes() != content:
            kept.append(name)
    for name in ("data", "reports"):
        (folder / name).mkdir(exist_ok=True)
    atomic_write(folder / MARKER, json.dumps({"made_by": f"pgolf {metadata.version('pgolf')}"}) + "\n")
    if kept:
        print(
            f"kept as they are, other than this version's: {', '.join(kept)}; delete one and init again to replace it"
        )
    print(f"{folder} is ready: cd {arguments.folder} && pgolf demo")
    return 0
