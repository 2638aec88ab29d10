"""README and docs: what they link to and name is there."""
import importlib
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_python_in_the_readme_runs(demo_folder, tmp_path, monkeypatch):
    from model import Config, SmolTolk, save_pretrained
    from runtime.tokenizer import Tokenizer
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/demo").symlink_to(demo_folder)
    vocab_size = Tokenizer(demo_folder / "tokenizer.json").vocab_size
    config = Config(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, n_units=30)
    torch.manual_seed(0)
    save_pretrained(SmolTolk(config), tmp_path / "out/train_tiny")
    shutil.copy(demo_folder / "tokenizer.json", tmp_path / "out/train_tiny")
    found = {}
    torch.manual_seed(1)  # an answer may be empty
    exec(code, found)
    assert found["nats"].shape == (2,) and (found["nats"] < 0).all() and 0 < len(found["answer"]) <= 60
    assert len(found["waveform"]) > 640
