"""The notebooks, read and run."""

import ast
import json
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from tests.processes import ROOT

NAMES = ("1_see_it", "2_train_it", "3_understand_it", "4_measure_it")
SMALL_TRAINING = dict(STEPS=13, BATCH_SIZE=1, MAX_SEQ_LEN=128, LEARNING_RATE=8e-4, RESET_WEIGHT=20.0)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def names_set_in(source: str) -> set[str]:
    """What a cell of nothing but assignments sets."""
    statements = ast.parse(source).body
    assert all(isinstance(statement, ast.Assign) for statement in statements)
    targets = [target for statement in statements for target in ast.walk(statement.targets[0])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def run(
    name: str, folder: Path, results: str, *, python: Path | None = None, before: str = "", **parameters
) -> tuple[nbformat.NotebookNode, dict]:
    """Runs a notebook in a folder with other parameters; returns it, and what the expression `results` gives.

    python: whose kernel runs it; that of the tests if None
    before: a cell that runs before all others
    """
    notebook = read(name)
    cell = parameters_cell(notebook)
    assert parameters.keys() <= names_set_in(cell.source), "the notebook has other parameters"
    cell.source += "".join(f"\n{parameter} = {value!r}" for parameter, value in parameters.items())
    ask = f"import dataclasses\nimport json\n\nprint(json.dumps({results}, default=lambda array: array.tolist()))"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before, id="before"))
    notebook.cells.append(nbformat.v4.new_code_cell(ask, id="results"))
    with tempfile.TemporaryDirectory() as scratch:
        # Sockets are files: a port would be open to everybody on the machine.
        kernel = KernelManager(transport="ipc", ip=f"{scratch}/kernel", **_kernel(python, Path(scratch)))
        try:
            NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
        finally:  # a client leaves a kernel that it was given, with all its memory
            kernel.shutdown_kernel(now=True)
    return notebook, json.loads(printed(cells_by_id(notebook)["results"]))


def cells_by_id(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in notebook.cells}


def _kernel(python: Path | None, scratch: Path) -> dict:
    """Settings of a KernelManager for the kernel of this Python."""
    if python is None:
        return {"kernel_name": "python3"}
    (scratch / "chosen").mkdir()
    spec = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "chosen"}
    (scratch / "chosen" / "kernel.json").write_text(json.dumps(spec | {"language": "python"}))
    return {"kernel_name": "chosen", "kernel_spec_manager": KernelSpecManager(kernel_dirs=[str(scratch)])}


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def shown(cell: nbformat.NotebookNode, kind: str) -> list[str]:
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def drawn_by_widgets(notebook: nbformat.NotebookNode) -> list[str]:
    """The last text in every widget that holds outputs, as a notebook of bars does, where there is ipywidgets."""
    kept = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    outputs = [model["state"]["outputs"] for model in kept if model["model_name"] == "OutputModel"]
    return [each[-1]["data"]["text/plain"] for each in outputs if each]
