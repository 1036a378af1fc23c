"""A process that executes one notebook of a sweep, `python -m pgolf.sweeps.kernel_process job.json`; or report pages.

papermill's working directory is process-wide, so every notebook of a sweep gets a process of its own. It
imports neither torch nor pandas: the kernel does, and a second time would cost some 2.5 s a run.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

from pgolf.processes import SWEEP_PID, end_with_sweep, kill_family


def own_kernels() -> type:
    """The manager of a kernel of this interpreter: a kernelspec `python3` in a user's folders may name another."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class OwnKernel(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _no_installed_kernelspecs(self):
            return KernelSpecManager(kernel_dirs=[], parent=self)

    return OwnKernel


def execute(job: dict, **kernel) -> str | None:
    """Execute job's notebook with its parameters into job's output; why it failed, in a line, or None.

    kernel: the manager, km, of one that stays, or kernel_manager_class of one that ends with the notebook.
    """
    # Imported here, not above: kernels import this module for end_with_sweep, and need none of these.
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
            cwd=str(Path(job["notebook"]).parent),
        )
    except papermill.PapermillExecutionError as error:
        return f"{error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        return "the kernel died; out of memory, or killed?"
    return None


class Slot:
    """A process that executes notebooks one after another in one kernel, emptied before each.

    To start it, papermill and a kernel takes longer than most pages of a report. Not for training: what one run
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
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - _end closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pgolf.sweeps.kernel_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=os.environ | {SWEEP_PID: str(os.getpid())},
        )

    def _end(self) -> str:
        """Wait for its end; its last words."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        status = self._process.wait()
        with self._said as said:
            said.seek(0)
            words = said.read().decode("utf-8", "replace").split("\n")
        return ([line.strip() for line in words if line.strip()] or [f"exit status {status}"])[-1]

    def run(self, notebook: Path, output: Path, parameters: dict) -> str | None:
        """Execute a notebook and wait for it; why it failed, in a line, or None."""
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
    """Answer jobs, a line each, until there are no more."""
    from jupyter_core.utils import run_sync

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a kernel prints is no answer
    kernel = None

    async def empty() -> None:
        client = kernel.client()
        client.start_channels()
        await client.wait_for_ready()
        await client.execute_interactive("%reset -f", silent=True)
        client.stop_channels()

    for line in sys.stdin:
        if kernel and not run_sync(kernel.is_alive)():
            run_sync(kernel.cleanup_resources)()  # the file of its ports
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
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    reason = execute(job, kernel_manager_class=own_kernels())
    if reason:
        print(reason, file=sys.stderr)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
