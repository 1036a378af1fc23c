"""Executing notebooks: one of a sweep in a process of its own, `python -m pgolf.sweeps.kernel_process job.json`, or
report pages in a shared kernel.

papermill's working directory is process-wide, so every notebook of a sweep gets a process of its own. This module
imports neither torch nor pandas: the kernel does, and loading them twice would add 2.5 s per run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook
from traitlets import default

from pgolf.processes import SWEEP_PID, end_with_sweep, kill_family
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write


def start(
    run_dir: Path, notebook: Path, parameters: dict, runs_root: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    """Start a process that executes a notebook into run_dir and ends with this process.

    It gets a session of its own, so Ctrl-C reaches only this process, which then ends it. Raises OSError.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "error.json").unlink(missing_ok=True)  # an earlier attempt's
    content = {"notebook": str(notebook), "output": str(run_dir / "notebook.ipynb"), "parameters": parameters}
    job_file = atomic_write(run_dir / "job.json", json.dumps(content, indent=1))
    # Absolute folders: the kernel has another working directory.
    own = {SWEEP_PID: str(os.getpid()), "PGOLF_RUNS": str(runs_root.resolve()), "PGOLF_ROOT": str(ROOT.resolve())}
    with open(run_dir / "kernel.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pgolf.sweeps.kernel_process", str(job_file.resolve())],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**environment, **own}, start_new_session=True,  # POSIX
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
        )  # fmt: skip


class OwnKernel(AsyncKernelManager):
    """Kernel manager that always starts this interpreter: a user's kernelspec `python3` may name another one."""

    @default("kernel_spec_manager")
    def _no_installed_kernelspecs(self):
        return KernelSpecManager(kernel_dirs=[], parent=self)


def execute(notebook: Path, output: Path, parameters: dict, **options) -> str | None:
    """Execute a notebook with its parameters into output. Returns why it failed, in one line, or None.

    options: papermill's `cwd`, and the kernel: `km`, a manager whose kernel stays, or `kernel_manager_class` for one
    that ends with the notebook.
    """
    import papermill  # slow, and a Dask worker only needs start

    options |= dict(kernel_name="python3", progress_bar=False, shutdown_kernel="immediate")  # nothing is left to write
    try:
        papermill.execute_notebook(str(notebook), str(output), parameters, **options)
    except papermill.PapermillExecutionError as error:
        return f"{error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        return "the kernel died; out of memory, or killed?"
    return None


class SharedKernel(AbstractContextManager):
    """Executes notebooks one after another in one kernel, whose namespace is emptied before each.

    Starting a kernel and its imports takes longer than most report pages. Not for training: what one run leaves behind
    in the kernel must not reach the next. Each thread may have one: none changes the working directory.
    """

    def __init__(self):
        self._start()

    def _start(self) -> None:
        self._kernel = OwnKernel(kernel_name="python3")
        run_sync(self._kernel.start_kernel)(stderr=subprocess.DEVNULL)  # the kernel's own warnings

    def __exit__(self, *_) -> None:
        run_sync(self._kernel.shutdown_kernel)(now=True)

    def kill(self) -> None:
        """End the kernel at once: a notebook that another thread executes in it fails."""
        kill_family(self._kernel.provisioner.pid)

    def run(self, notebook: Path, output: Path, parameters: dict) -> str | None:
        """Execute a notebook and wait for it. Returns why it failed, in one line, or None."""
        if not run_sync(self._kernel.is_alive)():
            run_sync(self._kernel.cleanup_resources)()  # its connection file
            self._start()
        reset = new_notebook(cells=[new_code_cell("%reset -f")])
        NotebookClient(reset, km=self._kernel).execute()
        return execute(notebook, output, parameters, km=self._kernel)


def main() -> None:
    end_with_sweep()
    os.environ[SWEEP_PID] = str(os.getpid())  # the kernel ends with this process
    job = json.loads(Path(sys.argv[1]).read_bytes())
    sys.exit(execute(**job, cwd=str(Path(job["notebook"]).parent), kernel_manager_class=OwnKernel))  # 1 and the reason


if __name__ == "__main__":
    main()
