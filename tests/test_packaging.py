"""pyproject.toml, constraints.txt, environment.yml and the install commands say the same thing."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(r) for r in [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["dev"]]]
DIRECT_IDS = [r.name for r in DIRECT]

_lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
_pairs = [line.split("==") for line in _lines if not line.startswith("#")]
PINS = {canonicalize_name(name): Version(version) for name, version in _pairs}

_spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
install = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(install)


@pytest.mark.parametrize("requirement", DIRECT, ids=DIRECT_IDS)
def test_a_dependency_is_pinned_within_its_range(requirement):
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment of tools/install.py")
@pytest.mark.parametrize("requirement", DIRECT, ids=DIRECT_IDS)
def test_the_pinned_version_is_the_installed_one(requirement):
    installed = Version(metadata.version(requirement.name)).public
    assert installed == str(PINS[canonicalize_name(requirement.name)])


def test_no_pin_names_a_build():
    assert [name for name, version in PINS.items() if version.local] == []
    assert install.pinned_torch((ROOT / "constraints.txt").read_text(encoding="utf-8")) == str(PINS["torch"])


def test_conda_installs_the_same_project():
    *packages, pip = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[lab,dev,search]"]}
    (python,) = (Requirement(p) for p in packages if p.startswith("python"))
    minors = [f"3.{n}" for n in range(30) if f"3.{n}" in python.specifier]
    assert minors and all(m in SpecifierSet(PROJECT["requires-python"]) for m in minors)


@pytest.mark.parametrize(("platform", "gpu"), [("linux", True), ("darwin", False), ("win32", False), ("win32", True)])
def test_the_default_torch_where_it_is_the_right_one(platform, gpu):
    ((command,),) = install.torch_attempts(platform, gpu, "1.2.3")
    assert command[1:4] == ["-m", "pip", "install"] and command[-1] == "torch==1.2.3"


def test_linux_without_a_gpu_takes_the_cpu_build():
    (by_pip,), (get_uv, by_uv) = install.torch_attempts("linux", False, "1.2.3")
    assert by_pip[-1] == "torch==1.2.3+cpu"
    assert by_pip[1:4] == get_uv[1:4] == ["-m", "pip", "install"] and get_uv[-1] == "uv"
    assert by_uv[1:5] == ["-m", "uv", "pip", "install"]
    assert by_uv[-3:] == ["--torch-backend", "cpu", "torch==1.2.3"]


def test_a_torch_of_ones_own_is_the_only_attempt():
    ((command,),) = install.torch_attempts("linux", False, "1.2.3", spec="torch==1.2.3+cu999")
    assert command[-1] == "torch==1.2.3+cu999"


def test_uv_is_tried_first_where_it_is_there_and_pip_where_it_fails():
    (by_uv,), (by_pip,) = install.torch_attempts("linux", False, "1.2.3", uv="/bin/uv")
    assert by_uv[:3] == ["/bin/uv", "pip", "install"] and "cpu" in by_uv and by_pip[-1] == "torch==1.2.3+cpu"
    (by_uv,), (by_pip,) = install.attempts("-e", ".[lab,dev,search]", uv="/bin/uv")
    assert by_uv[-2:] == by_pip[-2:] == ["-e", ".[lab,dev,search]"] and by_uv[0] == "/bin/uv" != by_pip[0]


@pytest.mark.skipif(sys.platform == "win32", reason="the commands of this test")
def test_an_attempt_that_fails_is_followed_by_the_next(capsys):
    assert install.first_that_works([[["false"]], [["true"]]]) == ""
    assert capsys.readouterr().out.count("failed after") == 1
    assert install.first_that_works([[["false"], ["true"]]]) != ""  # all commands of an attempt count


def test_ci_runs_the_readme_test_commands():
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-2:]
    assert commands == ["make test", "make test-long"]
    assert all(command in (ROOT / "README.md").read_text(encoding="utf-8") for command in commands)


def test_no_file_names_a_registry_host_or_a_path_of_one_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Put together here, so that this file does not contain them. Paths: only absolute ones.
    hosts = ["pypi" + ".org", "python" + "hosted.org", "download." + "pytorch", "registry." + "npmjs"]
    paths = ["/" + "work/", "/opt/" + "wheels", "/opt/" + "pypi"]
    forbidden = re.compile("|".join(map(re.escape, hosts)) + r"|(?<![\w.~)}>-])(?:" + "|".join(paths) + ")")
    files = [ROOT / name for name in names.split("\0") if (ROOT / name).is_file()]
    found = {
        file.relative_to(ROOT).as_posix(): match[0]
        for file in files
        if (match := forbidden.search(file.read_bytes().decode("latin-1")))
    }
    assert found == {}
