"""studies/: which commands are left to run, and tables from finished runs that are made by hand."""
import csv
import json
import shlex
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

import analyze
import evaluate
import model
import train
from benchmarks import report
from configurator import configure
from studies import study
from studies.small.__main__ import STUDY as SMALL
from studies.tiny import STUDY as TINY

RUNS = dict(ours=study.Run("Ours", "config/train_tiny.py", leader="ours"),
            theirs=study.Run("Theirs", "config/baseline_tiny.py --beta=0.5", leader="ours"))
STUDY = study.Study("made_up", "python -m made_up run", "An hour.", RUNS, evaluate=dict(tasks=["topic_cloze"]),
                    pictures=["weights --checkpoint={ours}", "scaling --checkpoint={no}"],
                    before=dict(checkpoint="weights", tasks=["blimp"]))
SCORES = dict(parameters=7_000_000, blimp=dict(accuracy=77.1), made=dict(blimp={}))


def finish(folder, right=(1.0, 0.0), files=1, scored=True):
    """Write what train.py and evaluate.py leave behind. right: the answers, [items] or [settings, items]."""
    path = folder / "checkpoint-00000009/evaluation.json"
    path.with_suffix(".items").mkdir(parents=True, exist_ok=True)
    nll = dict.fromkeys(["speech", "interleaved"], dict(text=1.0, speech=2.0))
    (folder / "results.json").write_text(json.dumps(dict(flops=3e9, nll=nll)))
    made = dict(topic_cloze=dict(protocol={}, files=files))
    path.write_text(json.dumps(SCORES | dict(made=made if scored else {})))
    for setting, answers in zip(report.SETTINGS, np.broadcast_to(right, (4, np.shape(right)[-1]))):
        np.save(report.item_path(path, "topic_cloze", f"{setting}.right"), answers)


def test_tables_hold_means_over_seeds_leads_and_p_values(tmp_path):
    longer = dict(long=study.Run("Long", "a", leader=""), their_long=study.Run("Their long", "b", leader="long"))
    rng, answers = np.random.default_rng(0), {}
    for run, n_seeds, p in (("ours", 3, 0.9), ("theirs", 2, 0.7), ("long", 1, 1), ("their_long", 1, 0.96)):
        answers[run] = (rng.random((n_seeds, 4, 400)) < p).astype(float)
        for seed in range(n_seeds):
            finish(tmp_path / f"{run}-{seed + 1}", answers[run][seed])
    study.main(STUDY._replace(runs=RUNS | longer), ["tables", f"--out={tmp_path}"])
    rows = {row["run"]: row for row in json.loads((tmp_path / "study.json").read_text())["rows"]}
    ours, theirs, long, their_long = (row["settings"]["T->S"] for row in rows.values())
    scores = {run: 100 * right[:, 2].mean(1) for run, right in answers.items()}
    assert rows["ours"]["seeds"] == [1, 2, 3] and "lead" not in ours and "lead" not in long and long["std"] is None
    assert [ours["mean"], ours["std"]] == pytest.approx([scores["ours"].mean(), scores["ours"].std(ddof=1)])
    leads, lead = scores["ours"][:2] - scores["theirs"], theirs["lead"]
    assert [lead["mean"], lead["p_seeds"]] == pytest.approx([leads.mean(), ttest_1samp(leads, 0).pvalue])
    wrong, lead = round(4 * (100 - scores["their_long"][0])), their_long["lead"]
    assert [lead["mean"], lead["p_items"]] == pytest.approx([wrong / 4, binomtest(0, wrong).pvalue])
    assert lead["p_seeds"] is None and f" | {wrong / 4:.1f} (<0.001) | " in (tmp_path / "study.md").read_text()
    assert float(list(csv.DictReader(open(tmp_path / "study.csv")))[7]["accuracy"]) == scores["ours"][1]


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0, 6.5])
def test_the_number_of_seeds_that_a_lead_needs(std):
    """Made-up studies with so many seeds find a lead of 4 points in four of five cases, and those with fewer do not."""
    rng, n = np.random.default_rng(0), study.seeds_needed(std)
    found = [(ttest_1samp(rng.normal(4, std, (20_000, seeds)), 0, axis=1).pvalue < 0.05).mean()
             for seeds in (n, n - 1) if seeds > 1]
    assert found[0] > 0.79 and all(share < 0.81 for share in found[1:])
    assert n == {0.3: 2, 1.0: 3, 3.0: 7, 6.5: 23}[std]


def test_leads_that_are_equal_for_all_seeds():
    """Equal up to rounding: 20 of 500 items each."""
    theirs = [np.arange(500) < right for right in (300, 413, 262)]
    ours = [np.arange(500) < right for right in (320, 433, 282)]
    for first, second, mean, p in ((ours, theirs, 4, 0), (ours, ours, 0, 1)):
        cell = study.lead(first, second)
        assert cell["mean"] == pytest.approx(mean) and cell["p_seeds"] == p and cell["seeds_needed"] is None


def test_records_stand_for_finished_runs(tmp_path, started):
    """Tables come from the records alone. A run with a record is not made again, also not one with ties."""
    settings = [f"--out={tmp_path / 'runs'}", f"--results={tmp_path / 'kept'}", "--seeds=[1]"]
    finish(tmp_path / "runs/ours-1", (1.0, 0.5, 0.0))
    finish(tmp_path / "runs/theirs-1", (0.0, 0.5, 0.5))
    study.main(STUDY, ["tables", *settings])
    first = (tmp_path / "kept/study.json").read_text()
    shutil.rmtree(tmp_path / "runs")
    study.main(STUDY._replace(before={}), ["run", *settings])
    assert not started and (tmp_path / "kept/study.json").read_text() == first
    cell = json.loads(first)["rows"][1]["settings"]["S"]
    assert cell["mean"] == pytest.approx(100 / 3) and cell["lead"]["mean"] == pytest.approx(50 - 100 / 3)


@pytest.fixture
def started(monkeypatch):
    """The commands that a study has started. Nothing is run, but each leaves behind what it would make."""
    commands = []

    def start(command, **how):
        commands.append(command)
        path = Path(next(word for word in reversed(command) if "=/" in word).partition("=")[2])
        if path.name == "before.json":
            path.write_text(json.dumps(SCORES))
        elif command[0] != "analyze.py":
            finish(path, scored=command[0] == "evaluate.py")
        return Mock(**{"wait.return_value": 0})

    monkeypatch.setattr(study, "start", start)
    return commands


def test_only_what_is_missing_is_run(tmp_path, started, capsys):
    """A run with a checkpoint is resumed, one without the scores is scored. The text model is scored once."""
    finish(tmp_path / "ours-1")
    finish(tmp_path / "theirs-2", scored=False)
    (tmp_path / "theirs-1/checkpoint-00000004").mkdir(parents=True)
    settings = ["--seeds=[1, 2]", f"--out={tmp_path}", "--options=--device=cpu", "--scoring=--dtype=bfloat16"]
    study.main(STUDY, settings)
    assert f"3 of 4 runs are missing in {tmp_path}.\nAn hour." in capsys.readouterr().out and not started
    study.main(STUDY, ["run", *settings])
    theirs = f"train.py config/baseline_tiny.py --beta=0.5 --seed=1 --out_dir={tmp_path}/theirs-1 --device=cpu"
    ours = f"train.py config/train_tiny.py --seed=2 --out_dir={tmp_path}/ours-2 --device=cpu"
    score = f"evaluate.py --checkpoint={tmp_path}/%s --tasks=[\"topic_cloze\"] --dtype=bfloat16"
    before = f"evaluate.py --checkpoint=weights --tasks=[\"blimp\"] --dtype=bfloat16 --out={tmp_path}/before.json"
    assert [" ".join(command) for command in started] == [
        before, f"{theirs} --resume=true", score % "theirs-1", ours, score % "ours-2", score % "theirs-2"]
    assert "| before speech | 77.1 | – | – |\n| Ours | 77.1 ± 0.0 |" in (tmp_path / "study.md").read_text()
    study.main(STUDY, ["run", *settings])
    study.main(STUDY, ["pictures", *settings])
    assert started[6:] == [["analyze.py", "weights", f"--checkpoint={tmp_path}/ours-1", f"--out={tmp_path}/pictures"]]


@pytest.mark.parametrize("end", [lambda: 0, lambda: 1, lambda: signal.raise_signal(signal.SIGTERM)])
def test_the_study_and_training_end_together(tmp_path, monkeypatch, end):
    process = Mock()
    process.wait.side_effect = lambda: None if process.terminate.called else end()
    monkeypatch.setattr(study, "start", lambda command, **how: process)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="ours-1.txt: says why this command did not finish: python train.py|143"):
        study.main(STUDY._replace(before={}), ["run", f"--out={tmp_path}"])
    signal.signal(signal.SIGTERM, handler)
    assert process.mock_calls == [call.wait(), call.terminate(), call.wait()]


@pytest.mark.parametrize("line, message", [
    ("go", "go: no such command; write run, tables or pictures"),
    ("--runs=['our']", r"did you mean ours\?"), ("--seeds=[]", "give at least one seed"),
    ("run", r"nowhere.csv: no such file.*--mmlu\)"), ("tables --seeds=[3]", "no finished run of ours, theirs"),
    ("tables --seeds=[1,2]", "ours-2.*: other items, or scored in another way, than .*ours-1")])
def test_bad_settings_and_results_end_in_one_line(tmp_path, started, line, message):
    finish(tmp_path / "ours-1")
    finish(tmp_path / "ours-2", files=2)
    which = STUDY._replace(evaluate=dict(tasks=["topic_cloze"], mmlu="nowhere.csv"))
    with pytest.raises(SystemExit, match=message):
        study.main(which, [*line.split(), f"--out={tmp_path}"])
    assert not started


@pytest.mark.parametrize("known", [TINY, SMALL], ids=lambda known: known.name)
def test_every_command_of_the_studies_can_be_run(known):
    for run in known.runs.values():
        configure(train.DEFAULTS, run.train.split(), train.complete_stages)
        assert run.leader in ("", *known.runs)
    for options in (known.evaluate, known.before):
        configure(evaluate.DEFAULTS, study.as_options(options))
    for command in known.pictures:
        configure(analyze.DEFAULTS, shlex.split(command.format(**dict(zip(known.runs, known.runs))))[1:])


def flops(run):
    """FLOPs of a run of the small study. Interleaved sequences have 29% text and 69% units."""
    c, _ = configure(train.DEFAULTS, SMALL.runs[run].train.split(), train.complete_stages)
    shape = {field.name: c[field.name] for field in fields(model.Config) if c.get(field.name) is not None}
    config, length = model.Config(**shape | dict(vocab_size=49152, n_units=500, rope_theta=1e5)), c["sequence_length"]
    total = 0
    for stage in c["stages"].values():
        for kind, parts in stage["mixture"].items():
            n = stage["steps"] * c["batch_tokens"] * parts / sum(stage["mixture"].values())
            scored = dict(text=(False, n, 0), speech=(True, 0, n), interleaved=(True, 0.29 * n, 0.69 * n))[kind]
            backbone, new = model.forward_flops(config, n / length, length, *scored)
            total += backbone * (2 if stage["train"] == "new" else 3) + new * 3
    return total


def test_equal_compute_of_the_small_study():
    assert flops("equal_flops") == pytest.approx(flops("smoltolk"), rel=0.01)
