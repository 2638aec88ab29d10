"""
Run docs/walkthrough.ipynb, write its outputs into it, and render it as docs/walkthrough.html.

    python -m tools.walkthrough             runs, writes the notebook and the page
    python -m tools.walkthrough --check     only runs; writes nothing

A cell that fails stops it, and so does a cell that prints to stderr, because a warning would end up in the notebook.
The same weights give the same files: times and versions are left out.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs/walkthrough.ipynb"
METADATA = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"),
                language_info=dict(name="python"))


def execute(notebook):
    """Run all cells from the root of the repository. SystemExit for an error or for output to stderr."""
    try:
        NotebookClient(notebook, timeout=300, record_timing=False, resources=dict(metadata=dict(path=ROOT)),
                       extra_arguments=["--IPKernelApp.log_level=40"]).execute()  # 40: only errors of the kernel itself
    except CellExecutionError as error:
        raise SystemExit(f"{NOTEBOOK.name}: {error}") from None
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise SystemExit(f"{NOTEBOOK.name}: cell {number} printed to stderr:\n{output.text}")
    notebook.metadata = nbformat.from_dict(METADATA)


def render(notebook):
    """The page as HTML. It has no scripts, so it loads nothing from the network."""
    page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def main(argv):
    if argv not in ([], ["--check"]):
        raise SystemExit("usage: python -m tools.walkthrough [--check]")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)
    if not argv:
        nbformat.write(notebook, NOTEBOOK)
        NOTEBOOK.with_suffix(".html").write_text(render(notebook))


if __name__ == "__main__":
    main(sys.argv[1:])
