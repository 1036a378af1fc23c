"""A process that executes notebooks: one of a sweep, `python -m pgolf.sweeps.kernel_process job.json`, or report pages.

papermill's working directory is process-wide, so every notebook of a sweep gets a process of its own. This module
imports neither torch nor pandas: the kernel does, and loading them twice would add 2.5 s per run.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pgolf.processes import SWEEP_PID, end_with_sweep, kill_family
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write

COMMAND = [sys.executable, "-m", "pgolf.sweeps.kernel_process"]


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
            [*COMMAND, str(job_file.resolve())], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**environment, **own}, start_new_session=True,  # POSIX
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
        )  # fmt: skip


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


def execute(job: dict, **kernel) -> str | None:
    """Execute job's notebook with its parameters into job's output. Returns why it failed, in one line, or None.

    kernel: `km`, a manager whose kernel stays, or `kernel_manager_class` for one that ends with the notebook.
    """
    # Imported here: kernels import this module for end_with_sweep and need neither.
    import papermill
    from nbclient.exceptions import DeadKernelError

    options = dict(kernel_name="python3", progress_bar=False, cwd=str(Path(job["notebook"]).parent))
    try:
        papermill.execute_notebook(job["notebook"], job["output"], job["parameters"], **options, **kernel)
    except papermill.PapermillExecutionError as error:
        return f"{error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        return "the kernel died; out of memory, or killed?"
    return None


class KernelProcess:
    """Executes notebooks one after another in one kernel, whose namespace is emptied before each.

    Starting the process, papermill and a kernel takes longer than most report pages. Not for training: what one run
    leaves behind in its process must not reach the next.
    """

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind:
            kill_family(self._process.pid)
        self._end()

    def _start(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - _end closes it
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, encoding="utf-8",
            env=os.environ | {SWEEP_PID: str(os.getpid())},
        )  # fmt: skip

    def _end(self) -> str:
        """Wait until the process ends. Returns the last line it wrote to stderr."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        status = self._process.wait()
        with self._stderr as stderr:
            stderr.seek(0)
            lines = stderr.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}")

    def run(self, notebook: Path, output: Path, parameters: dict) -> str | None:
        """Execute a notebook and wait for it. Returns why it failed, in one line, or None."""
        job = {"notebook": str(notebook), "output": str(output), "parameters": parameters}
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if answer:
            return json.loads(answer)
        reason = self._end()
        self._start()
        return reason


def _serve() -> None:
    """Execute jobs from stdin, one per line; answer each with a line of JSON on stdout."""
    from jupyter_core.utils import run_sync

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of kernels goes to stderr
    kernel = None

    async def empty() -> None:
        client = kernel.client()
        client.start_channels()
        await client.wait_for_ready()
        await client.execute_interactive("%reset -f", silent=True)
        client.stop_channels()

    for line in sys.stdin:
        if kernel and not run_sync(kernel.is_alive)():
            run_sync(kernel.cleanup_resources)()  # its connection file
            kernel = None
        if kernel:
            run_sync(empty)()
        else:
            kernel = own_kernels()(kernel_name="python3")
        print(json.dumps(execute(json.loads(line), km=kernel)), file=answers, flush=True)
    if kernel:
        run_sync(kernel.shutdown_kernel)(now=True)


def main() -> int:
    end_with_sweep()
    os.environ[SWEEP_PID] = str(os.getpid())  # the kernel ends with this process
    if not sys.argv[1:]:
        _serve()
        return 0
    if reason := execute(json.loads(Path(sys.argv[1]).read_bytes()), kernel_manager_class=own_kernels()):
        print(reason, file=sys.stderr)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
