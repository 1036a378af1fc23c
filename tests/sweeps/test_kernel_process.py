"""Notebooks that share a kernel: none sees the one before it, and none suffers by what that died of."""

import nbformat
import psutil
import pytest

from pgolf.sweeps.kernel_process import SharedKernel

KILLED = "import os, signal; os.kill({}, signal.SIGTERM if os.name == 'nt' else signal.SIGKILL)"


@pytest.fixture
def write(tmp_path):
    def write(source: str):
        cells = [nbformat.v4.new_code_cell("greeting = ''", metadata={"tags": ["parameters"]})]
        notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(source)])
        notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(notebook, tmp_path / "notebook.ipynb")
        return tmp_path / "notebook.ipynb", tmp_path / "executed.ipynb", {"greeting": "hello"}

    return write


def said(path) -> str:
    return "".join(out.text for cell in nbformat.read(path, 4).cells for out in cell.outputs if "text" in out)


def test_one_after_another(write, tmp_path):
    executed = tmp_path / "executed.ipynb"
    with SharedKernel() as process:
        assert process.run(*write("left = 1; import os; print(greeting, os.getpid())")) is None
        greeting, kernel = said(executed).split()
        assert greeting == "hello"
        assert process.run(*write("print('left' in globals()); import os; print(os.getpid())")) is None
        assert said(executed).split() == ["False", kernel]
        assert process.run(*write("1 / 0")) == "ZeroDivisionError: division by zero"
        assert "the kernel died" in process.run(*write(KILLED.format("os.getpid()")))
        assert process.run(*write("print(greeting)")) is None
        assert said(executed) == "hello\n"
        assert process.run(*write("import os; print(os.getpid())")) is None
        kernel = psutil.Process(int(said(executed)))
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
