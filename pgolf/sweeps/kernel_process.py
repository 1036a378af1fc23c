"""Processes that execute notebooks: one per run of a sweep, `python -m pgolf.sweeps.kernel_process job.json`, and one
kernel for many report pages.

papermill's working directory is process-wide, so every notebook of a sweep gets a process of its own. This module
imports neither torch nor pandas: the kernel does, and loading them twice would add 2.5 s per run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from pgolf.processes import SWEEP_PID, end_with_sweep, kill_family
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write

HISTORY = "--HistoryManager.hist_file=:memory:"  # two kernels would wait for each other's file


def start(
    run_dir: Path, notebook: Path, parameters: dict, runs_root: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    """Start a process that executes a notebook into run_dir and ends with this process.

    It gets a session of its own, so Ctrl-C reaches only this process, which then ends it. Raises OSError.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "error.json").unlink(missing_ok=True)  # from an earlier attempt
    content = {"notebook": str(notebook), "output": str(run_dir / "notebook.ipynb"), "parameters": parameters}
    job_file = atomic_write(run_dir / "job.json", json.dumps(content, indent=1))
    # Absolute folders: the kernel has another working directory.
    own = {SWEEP_PID: str(os.getpid()), "PGOLF_RUNS": str(runs_root.resolve()), "PGOLF_ROOT": str(ROOT.resolve())}
    with open(run_dir / "kernel.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pgolf.sweeps.kernel_process", str(job_file.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, **own},
            start_new_session=True,  # POSIX
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
        )


def own_kernels() -> type:
    """Kernel manager that always starts this interpreter: a user's kernelspec `python3` may name another one."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class OwnKernel(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _no_installed_kernelspecs(self):
            return KernelSpecManager(kernel_dirs=[], parent=self)

    return OwnKernel


def execute(job: dict, cwd: str | None = None, **kernel) -> str | None:
    """Execute job's notebook with its parameters into job's output. Returns why it failed, in one line, or None.

    cwd: folder that this process, and so the kernel it starts, changes to. kernel: `km`, the manager of a kernel that
    stays, or `kernel_manager_class` for one that ends with the notebook.
    """
    # Imported here: kernels import this module for end_with_sweep and need neither.
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        papermill.execute_notebook(
            job["notebook"],
            job["output"],
            job["parameters"],
            kernel_name="python3",
            **kernel,
            progress_bar=False,
            cwd=cwd,
        )
    except papermill.PapermillExecutionError as error:
        return f"{error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        return "the kernel died; out of memory, or killed?"
    return None


class KernelProcess:
    """Executes notebooks one after another in one kernel, whose namespace is emptied before each.

    Starting a kernel takes longer than most report pages. Not for training: what one run leaves behind in its process
    must not reach the next.
    """

    def __enter__(self) -> Self:
        self._kernel = None
        self._thread = ThreadPoolExecutor(1)  # the kernel's channels belong to the event loop of one thread
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind and self._kernel:
            kill_family(self._kernel.provisioner.pid)
        self._thread.submit(self._end).result()
        self._thread.shutdown()

    def run(self, notebook: Path, output: Path, parameters: dict) -> str | None:
        """Execute a notebook and wait for it. Returns why it failed, in one line, or None."""
        job = {"notebook": str(notebook), "output": str(output), "parameters": parameters}
        return self._thread.submit(self._run, job).result()

    def _run(self, job: dict) -> str | None:
        from jupyter_core.utils import run_sync

        if self._kernel and not run_sync(self._kernel.is_alive)():
            self._end()
        if not self._kernel:
            self._kernel = own_kernels()(kernel_name="python3")
            run_sync(self._kernel.start_kernel)(
                cwd=str(Path(job["notebook"]).parent),
                env=os.environ | {SWEEP_PID: str(os.getpid())},  # it ends with this process
                extra_arguments=[HISTORY],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        run_sync(self._empty)()
        return execute(job, km=self._kernel)

    async def _empty(self) -> None:
        client = self._kernel.client()
        client.start_channels()
        await client.wait_for_ready()
        code = "from pgolf.processes import end_with_sweep; end_with_sweep()\n%reset -f"
        await client.execute_interactive(code, silent=True)
        client.stop_channels()

    def _end(self) -> None:
        from jupyter_core.utils import run_sync

        if self._kernel:
            run_sync(self._kernel.shutdown_kernel)(now=True)
            self._kernel = None


def main() -> int:
    end_with_sweep()
    os.environ[SWEEP_PID] = str(os.getpid())  # the kernel ends with this process
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    reason = execute(job, str(Path(job["notebook"]).parent), kernel_manager_class=own_kernels())
    if reason:
        print(reason, file=sys.stderr)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
