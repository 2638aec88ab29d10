"""README and docs: what they link to and name is there."""
import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((ROOT / "docs/walkthrough.ipynb").read_text())
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("studies/**/*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link


@pages
def test_commands_name_scripts_modules_and_configs_that_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"(?:python |launch |torchrun )[^\n`]*?\b([a-z_/]+\.py)\b", text):
        assert (ROOT / file).exists(), file
    folders = "config|tests|benchmarks|corpora|runtime|speech|studies|tools"
    for file in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.]+\.\w+)", text):
        assert (ROOT / file).exists(), file


def test_the_table_from_paper_to_code_names_what_is_there():
    table = (ROOT / "README.md").read_text().partition("| paper | here |")[2].partition("\n\n")[0]
    for owner, name in re.findall(r"`(SmolTolk|model|data|train)\.([A-Za-z_]+)`", table):
        place = importlib.import_module("model").SmolTolk if owner == "SmolTolk" else importlib.import_module(owner)
        assert hasattr(place, name), f"{owner}.{name}"


def test_the_python_in_the_readme_runs(monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    found = {}
    torch.manual_seed(1)  # an answer may be empty
    exec(code, found)
    assert found["nats"].shape == (2,) and found["nats"][1] < found["nats"][0] < 0  # nobody bakes a clock
    assert 0 < len(found["answer"]) <= 60 and len(found["waveform"]) > 640


def test_the_first_conversation(tmp_path, monkeypatch, capsys):
    """The first commands of the README print what the comments below them say."""
    import sample
    block = next(block for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
                 if block.startswith("python sample.py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    lines = block.splitlines()
    for command, answer in zip(lines[::2], lines[1::2], strict=True):
        sample.main(shlex.split(command)[2:])
        expected, _, shortened = answer.removeprefix("# ").partition(" [...]")
        printed = "".join(capsys.readouterr()).strip()
        assert any(line.strip().startswith(expected) for line in printed.splitlines()), printed


def sources(kind):
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


def test_the_notebook_imports_names_that_exist():
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    found = 0
    for source in sources("code"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ours:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    is_module = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert is_module or hasattr(module, alias.name), f"{node.module}.{alias.name}"
                    found += 1
    assert found > 10


def test_the_notebook_was_run_without_faults_and_names_no_folders_of_a_machine():
    for number, cell in enumerate(NOTEBOOK["cells"]):
        if cell["cell_type"] == "code":
            assert cell["execution_count"], f"cell {number} was not run; python -m tools.walkthrough"
            for output in cell["outputs"]:
                assert output["output_type"] != "error" and output.get("name") != "stderr", number
                readable = {key: text for key, text in output.get("data", {}).items() if key == "text/plain"}
                shown = json.dumps([output.get("text"), readable])
                assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|opt|mnt|work|content|Users)/", shown), number
    page = (ROOT / "docs/walkthrough.html").read_text()
    assert "<script" not in page and str(ROOT) not in page


def test_the_notebook_links_to_files_that_exist():
    links = [link for source in sources("markdown") for link in re.findall(r"\]\(([^)\s]+)\)", source)]
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / "docs" / link).exists(), link
