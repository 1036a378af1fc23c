"""`pgolf init` and the folder that every command finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf.cli.init import packaged_files
from pgolf.cli.main import main
from pgolf.machines import transfer
from pgolf.machines.pod import RemoteError
from pgolf.runs import directory
from pgolf_core import config
from pgolf_core.config import MARKER, ROOT, ConfigError, find_root


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An empty working directory, for a pgolf that was installed from a wheel."""
    monkeypatch.delenv("PGOLF_ROOT", raising=False)
    monkeypatch.setattr(config, "CHECKOUT", tmp_path / "site-packages")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_init_lays_down_every_file_and_the_marker(installed):
    assert main(["init", "golf"]) == 0
    made, files = installed / "golf", packaged_files()
    assert len(files) > 50 and all((made / name).read_bytes() == file.read_bytes() for name, file in files.items())
    assert all((made / folder).is_dir() for folder in ("notebooks/sweeps/schema", "data", "runs", "reports"))
    assert json.loads((made / MARKER).read_text())["made_by"].startswith("pgolf ")


def test_every_file_of_the_notebooks_folder_is_laid_down():
    listing = subprocess.run(["git", "ls-files", "notebooks"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    assert set(listing.stdout.split()) <= packaged_files().keys()


def test_init_again_keeps_what_was_edited_and_restores_what_is_missing(installed, capsys):
    main(["init", "golf"])
    edited, missing = (installed / "golf" / "notebooks" / "sweeps" / name for name in ("demo.yaml", "tour.yaml"))
    edited.write_text("mine")
    missing.unlink()
    assert main(["init", "golf"]) == 0
    assert edited.read_text() == "mine" and missing.is_file()
    assert "notebooks/sweeps/demo.yaml" in capsys.readouterr().out


def test_init_refuses_a_file_and_the_checkout(installed, capsys):
    Path("golf").write_text("mine")
    assert main(["init", "golf"]) == 2
    assert main(["init", str(ROOT)]) == 2
    assert Path("golf").read_text() == "mine" and not (ROOT / MARKER).exists()
    assert [line.startswith("pgolf: ") for line in capsys.readouterr().err.splitlines()] == [True, True]


def test_the_root_is_the_nearest_folder_of_init(installed, monkeypatch):
    assert find_root() is None
    main(["init", "golf"])
    monkeypatch.chdir("golf/notebooks/sweeps")
    assert find_root() == (installed / "golf").resolve()
    monkeypatch.setenv("PGOLF_ROOT", str(installed))
    assert find_root() == installed


def test_the_root_in_a_checkout_is_the_checkout(installed, monkeypatch):
    main(["init", "."])
    (installed / "clone" / "notebooks").mkdir(parents=True)
    (installed / "clone" / "pyproject.toml").touch()
    monkeypatch.setattr(config, "CHECKOUT", installed / "clone")
    assert find_root() == installed
    monkeypatch.chdir("clone/notebooks")
    assert find_root() == installed / "clone"
    monkeypatch.chdir(installed.parent)
    assert find_root() == installed / "clone"


@pytest.mark.parametrize("words", [["runs"], ["train", "-k", "track=nano"], ["demo"], ["report"]])
def test_a_command_without_a_folder_names_pgolf_init_and_writes_nothing(installed, words, capsys):
    assert main(words) == 2
    assert "pgolf init" in capsys.readouterr().err and not [*installed.iterdir()]


def test_an_entry_point_of_python_without_a_folder_names_pgolf_init(installed):
    import pgolf

    with pytest.raises(ConfigError, match="pgolf init"):
        pgolf.load_runs  # noqa: B018 - the attribute is what is loaded


@pytest.mark.parametrize("words", [["knobs", "muon_wd"], ["tracks"]])
def test_a_command_that_needs_no_folder_runs_anywhere(installed, words):
    assert main(words) == 0


def test_a_run_in_a_folder_of_init_belongs_to_no_commit(installed, monkeypatch):
    subprocess.run(["git", "init", "-q", "."], check=True)
    monkeypatch.setattr(directory, "ROOT", installed)
    assert directory.git("rev-parse", "--show-toplevel")
    main(["init", "."])
    assert directory.git("rev-parse", "--show-toplevel") is None


def test_a_folder_of_init_is_not_pushed_to_a_rented_machine(installed, monkeypatch):
    main(["init", "."])
    monkeypatch.setattr(transfer, "ROOT", installed)
    with pytest.raises(RemoteError, match="a checkout"):
        transfer.code_files()


@pytest.mark.slow
def test_a_wheel_works_without_its_checkout(tmp_path):
    """Built, unpacked and run from there: same code digest, same corpus, same sweep as in the checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True)

    environment = {name: value for name, value in os.environ.items() if not name.startswith("PGOLF_")}
    environment |= {"PYTHONPATH": str(tmp_path / "site")}

    def run(*words: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    refused = run("-m", "pgolf.cli.main", "runs")
    assert refused.returncode == 2 and "pgolf init" in refused.stderr and "Traceback" not in refused.stderr
    assert run("-m", "pgolf.cli.main", "init", "golf").returncode == 0
    golf = tmp_path / "golf"
    listed = run("-m", "pgolf.cli.main", "sweep", "notebooks/sweeps/demo.yaml", "--dry-run", cwd=golf)
    assert "momentum-s1339" in listed.stdout, listed.stderr
    script = (
        "from pgolf.runs.code import code_digest; from pgolf.data.embedded_corpus import embedded_documents, ROOT;"
        "import hashlib, pgolf; print(pgolf.__file__, ROOT, code_digest(['train.ipynb'], studies=True),"
        "hashlib.sha256(repr(embedded_documents()).encode()).hexdigest())"
    )
    here = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    place, root, *there = run("-c", script, cwd=golf).stdout.split()
    assert place.startswith(str(tmp_path / "site")) and root == str(golf.resolve())
    assert there == here.split()[2:]
