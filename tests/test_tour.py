"""docs/tour.ipynb runs from the first cell to the last, and its committed outputs are those of a run."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"


def words(notebook):
    """Everything its cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_its_outputs_are_committed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in notebook.cells[4:] if cell.cell_type == "code")
    assert "/work" not in NOTEBOOK.read_text() and "/home" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_it_runs(tmp_path):
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = words(notebook)
    assert "'items': 600" in said and "distinct targets 12" in said and "item/loss" in said
    before, after = said.split("100 test users: ")[1].split(" after")[0].split(" before, ")
    assert float(after) > float(before) + 0.2
    assert said.count("cello") > 5
