"""docs/exercises.md: the solutions run on assets/tiny and find what the page says."""
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/exercises.md").read_text()


@pytest.fixture
def solutions(tmp_path, monkeypatch):
    """A folder with the solutions, as files named in their first line, and with assets."""
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install -e '.[demo]'")
    if not (ROOT / "assets/tiny/smoltolk").exists():
        pytest.skip("assets/tiny is not there")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(code)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(name, run_name="__main__")


def printed(solution):
    """What the page says that a solution prints."""
    return re.search(rf"```text\n\$ python {solution}\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_reader_finds_the_units_of_the_test_set(solutions, monkeypatch, capsys):
    command = re.search(r"^python ex5\.py (.*?)(?<!\\)\n", PAGE, re.MULTILINE | re.DOTALL)[1]
    run(monkeypatch, "ex5.py", *shlex.split(command.replace("\\\n", " ")), "--workers=0")
    capsys.readouterr()
    run(monkeypatch, "ex5_check.py")
    assert capsys.readouterr().out == printed("ex5_check.py")


def test_beam_search_of_width_1_is_greedy_and_the_likeliest_answer_is_empty(solutions, monkeypatch, capsys):
    from evaluate import log_likelihood
    from sample import draw, generate

    found = run(monkeypatch, "ex6.py")
    assert len(capsys.readouterr().out.splitlines()) == len(printed("ex6.py").splitlines())
    model, row = found["model"], found["row"]
    greedy = [token for _, [token] in generate(model, [row], [("text", 60)], lambda x: draw(x, 0)) if token is not None]
    (nats, narrow), (more, wide) = (found["beam"](model, row, 60, width, 0) for width in (1, 4))
    assert narrow == greedy and wide == [] and more > nats
    whole = [*row, *greedy, model.config.eos_token_id]
    [expected], _ = log_likelihood(model, [whole], [(len(row), len(whole))])
    assert nats == pytest.approx(expected, abs=1e-3)


def test_words_are_known_in_speech_and_pronouns_are_not(solutions, monkeypatch, capsys):
    run(monkeypatch, "ex7.py")
    counts = [int(n) for n in re.findall(r"\d+", capsys.readouterr().out)]
    stated = [int(n) for n in re.findall(r"\d+", printed("ex7.py"))]
    assert len(counts) == len(stated) == 12 and all(abs(a - b) <= 2 for a, b in zip(counts, stated))


def test_a_run_takes_a_demo_with_other_parameters_and_says_so(demo_folder, tmp_path, capsys):
    from corpora.demo import find_or_make

    assert find_or_make(demo_folder)["parameters"]["n_units"] == 30
    assert "train=40" in (told := capsys.readouterr().out) and "n_units=30" in told and "version" not in told
    about = json.loads((demo_folder / "demo.json").read_text())
    about["parameters"]["version"] -= 1
    (tmp_path / "demo.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match="another version"):
        find_or_make(tmp_path)
