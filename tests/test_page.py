"""tools/page.py: its numbers against evaluate.py, and the page itself in a browser without a screen."""
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import storycloze
from evaluate import DEFAULTS, log_likelihood
from model import from_pretrained
from runtime.datasets import open_set
from tools import page

ROOT = Path(__file__).resolve().parent.parent
BOX = ROOT / "assets/tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(path of a page with both shipped models, what it shows)"""
    path, before = tmp_path_factory.mktemp("page") / "page.html", Path.cwd()
    os.chdir(ROOT)
    try:
        page.main(["--versus=assets/tiny/baseline", "--items=20", f"--out={path}"])
    finally:
        os.chdir(before)
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return path, json.loads(found[1])


@pytest.fixture(scope="module")
def browser():
    """Chromium. Without it the tests are skipped, but not in CI."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not os.environ.get("CI"):
        pytest.importorskip("playwright", reason="playwright is not installed")
        if not chromium:
            pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


def open_page(browser, path, width):
    """(the page, its errors, the addresses that it asked for)"""
    opened, errors, asked = browser.new_page(viewport=dict(width=width, height=900)), [], []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(f"file://{path}")
    return opened, errors, asked


def scores_of(name, numbers):
    """{setting: mean log-likelihoods [stories, 2]} by evaluate.py's batches."""
    model, protocol = from_pretrained(BOX / name).eval(), DEFAULTS["protocol"]["topic_cloze"]
    stories, scores = storycloze.paired_stories(open_set(BOX / "cloze"), model.config, numbers), {}
    for setting in storycloze.MODALITIES:
        sequences, spans = storycloze.story_sequences(stories, setting, protocol, model.config)
        total, count = log_likelihood(model, sequences, spans, 512)
        scores[setting] = (total / count).reshape(-1, 2)
    return scores


def test_numbers_are_those_of_evaluate(made):
    numbers = [story["number"] for story in made[1]["stories"]]
    for m, name in enumerate(("smoltolk", "baseline")):
        for setting, expected in scores_of(name, numbers).items():
            ours = [[-np.mean(surprise) for surprise in story["views"][m]["race"][setting]]
                    for story in made[1]["stories"]]
            np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_accuracy_is_that_of_evaluate(made):
    for m, name in enumerate(("smoltolk", "baseline")):
        for setting, scores in scores_of(name, range(20)).items():
            assert made[1]["accuracy"]["right"][m][setting] == 100 * np.mean(scores[:, 0] > scores[:, 1])


def test_contents(made):
    """Words, units and weights fit together; the switch is never scored; all else is."""
    assert made[0].stat().st_size < 5e6 and made[1]["models"] == ["SmolTolk", "vocabulary expansion"]
    for story in made[1]["stories"]:
        n = len(story["units"])
        assert len(story["starts"]) == len(story["word_of_unit"]) == n and np.all(np.diff(story["starts"]) > 0)
        assert story["word_of_unit"][-1] == len(story["words"]) - 1 and np.all(np.diff(story["word_of_unit"]) >= 0)
        assert "".join(label for _, label in story["tokens"]) == " ".join(story["words"])
        assert np.allclose(np.sum(story["views"][0]["omega"], 1), 1, atol=2e-3)
        assert story["views"][1]["omega"] is None  # the baseline has no layer selector
        for view in story["views"]:
            assert len(view["speech"]) == n and min(view["speech"]) > 0
            for first, symbols in story["turns"].items():
                surprise = view["turns"][first]["surprise"]
                assert [value is None for value in surprise] == [kind == "switch" for kind, _ in symbols]
                assert sum(kind == "switch" for kind, _ in symbols) == 3  # four sentences


def test_wrong_sound(tmp_path):
    """A sound that is not that of the document is refused."""
    for name in ("29.json", "37.flac"):
        shutil.copy(BOX / "stories" / name, tmp_path / f"29{name[2:]}")
    with pytest.raises(SystemExit, match="29.flac: does not give the units of document 29"):
        page.main([f"--checkpoint={BOX / 'smoltolk'}", f"--stories={tmp_path}", f"--units={BOX / 'units'}",
                   f"--data={BOX / 'test'}", f"--cloze={BOX / 'cloze'}", f"--out={tmp_path / 'page.html'}"])


def test_in_a_browser(made, browser):
    """It loads from a file without errors or network, plays, switches, and shows evaluate.py's numbers."""
    path, contents = made
    opened, errors, asked = open_page(browser, path, 1200)
    numbers = [story["number"] for story in contents["stories"]]
    scores = [scores_of(name, numbers) for name in ("smoltolk", "baseline")]
    stories = opened.locator("#choose-story label")
    assert stories.count() == len(numbers)
    for n in range(len(numbers)):
        stories.nth(n).click()
        assert opened.inner_text("#story-text").strip("“”") == " ".join(contents["stories"][n]["words"])
        rows = opened.locator("#cloze-table tr").all_inner_texts()[1:]
        shown = [row.split("\t") for row in rows]
        for setting, model, true, other, right in shown:
            expected = scores[contents["models"].index(model)][setting][n]
            assert [float(true), float(other)] == pytest.approx(expected, abs=2e-3)
            assert right == ("yes" if expected[0] > expected[1] else "no")
        assert len(shown) == 8

    accuracy = contents["accuracy"]["right"]
    assert opened.locator("#all-table tr").all_inner_texts()[4] == f"S->T\t{accuracy[0]['S->T']}\t{accuracy[1]['S->T']}"
    opened.evaluate("document.getElementById('audio').play()")
    opened.wait_for_function("document.getElementById('audio').currentTime > 0.5")
    opened.wait_for_function("document.querySelector('.unit.on').dataset.unit > 2")
    opened.evaluate("document.getElementById('audio').pause()")
    opened.focus("#timeline")
    unit = int(opened.get_attribute(".unit.on", "data-unit"))
    opened.keyboard.press("ArrowRight")
    opened.wait_for_function(f"document.querySelector('.unit.on').dataset.unit > {unit}")
    unit, story = int(opened.get_attribute(".unit.on", "data-unit")), contents["stories"][-1]
    assert f"unit {story['units'][unit]} in “{story['words'][story['word_of_unit'][unit]]}”" in \
        opened.inner_text("#now")

    before = opened.inner_text("#turns")
    opened.locator("#choose-turn label").nth(1).click()
    assert opened.inner_text("#turns") != before and opened.locator("#turns .chip.switch").count() == 3
    before = opened.inner_text("#race")
    opened.locator("#choose-model label").nth(1).click()
    assert opened.inner_text("#race") != before
    opened.click("#race-button")
    opened.wait_for_function("document.getElementById('race-range').value == 100")
    assert not errors and all(url.startswith(("file:", "data:")) for url in asked)


def test_on_a_phone(made, browser):
    """Nothing is wider than the window, and everything can be reached by keyboard."""
    opened, errors, _ = open_page(browser, made[0], 360)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360 and not errors
    reached = set()
    for _ in range(30):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.name || document.activeElement.id"))
    assert {"story", "audio", "timeline", "turn", "model", "race-button", "race-range"} <= reached
