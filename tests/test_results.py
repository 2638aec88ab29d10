"""The tables of README.md and docs/results.md have the figures of the study that is kept in studies/results/tiny."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from studies import study
from studies.tiny import STUDY

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "studies/results/tiny"
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
SETTINGS = ["T", "S", "T->S", "S->T"]


def table_rows(page):
    """{first cell: other cells} of all tables of a page, without asterisks. The first of equal rows counts."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in reversed(rows)}


def accuracies(run, setting):
    """Those of all seeds, from the answers that the runs left behind."""
    answers = [json.loads(path.read_text())["answers"][setting] for path in sorted(KEPT.glob(f"{run}-[0-9]*.json"))]
    return np.array([100 * np.mean([int(digit) / 2 for digit in digits]) for digits in answers])


@pytest.mark.parametrize("page, some", [(README, 5), (RESULTS, len(STUDY.runs))], ids=["README", "results"])
def test_scores_are_those_of_the_runs(page, some):
    rows, found = table_rows(page), 0
    for name, run in STUDY.runs.items():
        if run.title in rows:
            scores = [accuracies(name, setting) for setting in SETTINGS]
            assert {len(its_scores) for its_scores in scores} == {5}
            expected = [f"{its_scores.mean():.1f} ± {its_scores.std(ddof=1):.1f}" for its_scores in scores]
            cells = rows[run.title]
            assert [cell for cell in cells if "±" in cell] == expected
            found += 1
    assert found == some


def test_tables_are_those_of_the_study(tmp_path):
    """study.md can be made again from the runs, and docs/results.md has each of its rows."""
    shutil.copytree(KEPT, tmp_path / "kept")
    study.main(STUDY, ["tables", "--seeds=[1,2,3,4,5]", f"--results={tmp_path}/kept", f"--out={tmp_path}"])
    tables = (KEPT / "study.md").read_text()
    assert (tmp_path / "kept/study.md").read_text() == tables
    missing = [line for line in tables.splitlines() if line[:1] == "|" and line not in RESULTS]
    assert not missing


def test_each_figure_with_an_error_in_readme_is_in_the_results():
    in_readme, in_results = (set(re.findall(r"-?\d+\.\d ± \d+\.\d", page)) for page in (README, RESULTS))
    assert len(in_readme) > 20 and not in_readme - in_results


def test_rows_about_the_weights_in_the_box_are_those_of_seed_1():
    rows = {"SmolTolk in float32 and in float16": "smoltolk", "vocabulary expansion in float32": "baseline"}
    for row, run in rows.items():
        assert table_rows(RESULTS)[row] == [f"{accuracies(run, setting)[0]:.1f}" for setting in SETTINGS]
