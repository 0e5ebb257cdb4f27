"""The notebook runs from top to bottom, and adaptation does what it says.

    python tests/test_notebook.py      runs the notebook and saves it with fresh outputs
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

pytestmark = pytest.mark.usefixtures("optimized")

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "01_adapt_and_watch.ipynb"
SECONDS = 120  # on two idle cores


class ThisPython(AsyncKernelManager):
    """Starts kernels with the running interpreter, regardless of installed kernelspecs."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                          display_name="Python 3", language="python")


def execute(notebook: NotebookNode, directory: str | Path) -> None:
    """Runs every cell on the CPU with `directory` as the working directory; fills in the outputs of `notebook`.

    Raises at the first error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        changes = {"JAX_PLATFORMS": "cpu", "TMPDIR": scratch,
                   "PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm warns without widgets
        client = NotebookClient(notebook, kernel_manager_class=ThisPython, timeout=5 * SECONDS, record_timing=False,
                                resources={"metadata": {"path": str(directory)}})
        client.execute(env=os.environ | changes)


def texts(notebook: NotebookNode, stream: str) -> list[str]:
    """The text that cells printed to 'stdout' or 'stderr'."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.text for output in outputs if output.output_type == "stream" and output.name == stream]


@pytest.mark.slow
def test_the_notebook_runs_and_adaptation_lowers_the_bound(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import time\nprint(before, after, time.process_time())"))
    execute(notebook, tmp_path)
    before, after, cpu_seconds = map(float, texts(notebook, "stdout")[-1].split())
    assert after < before - 0.5
    assert cpu_seconds < 2 * SECONDS
    assert texts(notebook, "stderr") == []
    assert list(tmp_path.iterdir()) == []


def test_the_saved_notebook_has_clean_and_light_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert texts(notebook, "stdout") and texts(notebook, "stderr") == []
    assert not any(place in text for text in texts(notebook, "stdout") for place in ("/tmp", "/home", "/work", "/usr"))
    assert NOTEBOOK.stat().st_size < 500_000


if __name__ == "__main__":
    book = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as empty:
        execute(book, empty)
    nbformat.write(book, NOTEBOOK)
