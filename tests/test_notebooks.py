"""Every notebook runs from top to bottom on a CPU, quietly, and says what the code says.

    python tests/test_notebooks.py NOTEBOOK      runs one, and writes its pictures and texts to a folder to be looked at
"""

import base64
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

pytestmark = pytest.mark.usefixtures("optimized")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
SECONDS = 600  # for one cell
NEEDS = {"03_to_pytorch_and_engines": ("torch", "gguf"), "04_a_pod_without_a_pod": ("libtpu",)}  # the extras
# Shorter, where a notebook may be: the environment of its kernel.
SHORT = {"06_free_tpus": {"DLM_STEPS": "4", "DLM_WORKDIR": "run"}}


class ThisPython(AsyncKernelManager):
    """Starts kernels with the running interpreter, regardless of installed kernelspecs."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                          display_name="Python 3", language="python")


def execute(notebook: NotebookNode, directory: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs every cell on the CPU with `directory` as the working directory; fills in the outputs of `notebook`.

    Raises at the first error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        changes = {"JAX_PLATFORMS": "cpu", "TMPDIR": scratch, "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                   "PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm warns without widgets
        client = NotebookClient(notebook, kernel_manager_class=ThisPython, timeout=SECONDS, record_timing=False,
                                resources={"metadata": {"path": str(directory)}})
        client.execute(env=os.environ | changes | (environment or {}))


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """What the cells have printed and drawn."""
    for cell in notebook.cells:
        yield from cell.outputs if cell.cell_type == "code" else ()


def texts(notebook: NotebookNode, stream: str) -> list[str]:
    """The text that cells printed to 'stdout' or 'stderr'."""
    return [output.text for output in outputs(notebook) if output.output_type == "stream" and output.name == stream]


def run(file: Path, directory: Path, **environment: str) -> NotebookNode:
    """The notebook with its outputs."""
    for module in NEEDS.get(file.stem, ()):
        pytest.importorskip(module)
    notebook = nbformat.read(file, as_version=4)
    execute(notebook, directory, SHORT.get(file.stem, {}) | environment)
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_draws(file: Path, tmp_path: Path) -> None:
    notebook = run(file, tmp_path)
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    if file.stem not in SHORT:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_notebook_for_free_tpus_shares_the_work_among_eight_devices(tmp_path: Path) -> None:
    [file] = [file for file in NOTEBOOKS if file.stem == "06_free_tpus"]
    notebook = run(file, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert texts(notebook, "stdout")[1].startswith("8 x cpu")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_kept_without_outputs(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert list(outputs(notebook)) == []
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


def look(file: Path, out: Path) -> None:
    """Runs a notebook and writes what it shows to a folder."""
    notebook, number = nbformat.read(file, as_version=4), 0
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty, contextlib.ExitStack() as stack:
        stack.callback(lambda: (out / "texts").write_text("\n".join([*texts(notebook, "stdout"), "", "stderr:",
                                                                     *texts(notebook, "stderr")])))
        execute(notebook, empty, SHORT.get(file.stem))
    for number, output in enumerate(outputs(notebook)):
        if "image/png" in output.get("data", {}):
            (out / f"{number}.png").write_bytes(base64.b64decode(output.data["image/png"]))


if __name__ == "__main__":
    look(Path(sys.argv[1]), Path(sys.argv[2]))
