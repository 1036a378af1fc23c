"""The part of the build that pyproject.toml cannot say: a wheel holds the files of [tool.pgolf] workspace."""

import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PATTERNS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pgolf"]["workspace"]


class BuildWithWorkspace(build_py):
    """Copy the notebooks and sweeps to pgolf/workspace/; an editable install reads them where they are."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for pattern in PATTERNS:
            for file in sorted(ROOT.glob(pattern)):
                copy = Path(self.build_lib, "pgolf", "workspace", file.relative_to(ROOT))
                copy.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(file), str(copy))


setup(cmdclass={"build_py": BuildWithWorkspace})
