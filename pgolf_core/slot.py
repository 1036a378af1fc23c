"""One slot of a sweep: a process that executes one notebook, `python -m pgolf_core.slot job.json`.

papermill's working directory is process-wide, so every notebook of a sweep gets a process of its own. It
imports neither torch nor pandas: the kernel does, and a second time would cost some 2.5 s a run.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

SWEEP_PID = "PGOLF_SWEEP_PID"  # environment: the process to end with
POLL_SECONDS = 0.5


def end_with_sweep() -> None:
    """From now on, end this process and its children when the process that SWEEP_PID names is gone.

    Kernels outlive a killed parent: without this, one would go on training for a sweep that is no more. A
    slot watches the sweep, and a kernel its slot. Without SWEEP_PID, and from the second call on, nothing.
    """
    if pid := os.environ.get(SWEEP_PID):
        end_with(int(pid))


def end_with(pid: int) -> None:
    """The same for any process."""
    name = f"{SWEEP_PID} {pid}"
    if any(thread.name == name for thread in threading.enumerate()):
        return
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        _end()

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
                time.sleep(POLL_SECONDS)
        _end()

    threading.Thread(target=watch, name=name, daemon=True).start()


def _end() -> None:
    kill_family(os.getpid(), itself=False)
    os._exit(1)


def interactive() -> bool:
    """Whether somebody watches, whom a progress bar is for: a terminal, or a notebook that no sweep runs."""
    return SWEEP_PID not in os.environ and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def kill_family(pid: int, itself: bool = True) -> None:
    """Kill a process and all its children. Nothing is left half-written: files appear whole or not at all."""
    try:
        process = psutil.Process(pid)
        family = [*([process] if itself else []), *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def execute(job: dict) -> str | None:
    """Execute job's notebook with its parameters into job's output; why it failed, in a line, or None."""
    # Imported here, not above: kernels import this module for end_with_sweep, and need none of these.
    import papermill
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError
    from traitlets import default

    class OwnKernel(AsyncKernelManager):
        """A kernel of this interpreter: a kernelspec `python3` in a user's folders may name another."""

        @default("kernel_spec_manager")
        def _no_installed_kernelspecs(self):
            return KernelSpecManager(kernel_dirs=[], parent=self)

    try:
        papermill.execute_notebook(
            job["notebook"],
            job["output"],
            job["parameters"],
            kernel_name="python3",
            kernel_manager_class=OwnKernel,
            progress_bar=False,
            cwd=str(Path(job["notebook"]).parent),
        )
    except papermill.PapermillExecutionError as error:
        return f"{error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        return "the kernel died; out of memory, or killed?"
    return None


def run_alone(notebook: Path, output: Path, parameters: dict) -> str | None:
    """Execute a notebook in a slot of its own and wait for it; why it failed, in a line, or None."""
    job = {"notebook": str(notebook), "output": str(output), "parameters": parameters}
    job_file = output.with_suffix(".job.json")
    job_file.write_text(json.dumps(job), encoding="utf-8")
    slot = subprocess.run(
        [sys.executable, "-m", "pgolf_core.slot", str(job_file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {SWEEP_PID: str(os.getpid())},
    )
    words = [line.strip() for line in slot.stdout.splitlines() if line.strip()]
    return (words[-1] if words else f"exit status {slot.returncode}") if slot.returncode else None


def main() -> int:
    end_with_sweep()
    os.environ[SWEEP_PID] = str(os.getpid())  # the kernel ends with this process
    reason = execute(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if reason:
        print(reason, file=sys.stderr)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
