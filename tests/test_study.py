"""study.py: what is left to run, and tables from runs made by hand."""
import csv
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks import report
from studies import study

STUDY = dict(runs=dict(ours=("Ours", "config/train_tiny.py"),
                       theirs=("Theirs", "config/baseline_tiny.py --beta=0.5")),
             leaders={}, before="", evaluate="--tasks='[\"topic_cloze\"]'",
             pictures=["weights --checkpoint={ours}", "scaling --checkpoint={no}"])


@pytest.fixture(autouse=True)
def small_study(monkeypatch):
    monkeypatch.setitem(study.STUDIES, "made_up", STUDY)


def finish(folder, right, nll=2.0):
    """What train.py and evaluate.py leave behind. right: {setting: answers}."""
    checkpoint = folder / "checkpoint-00000009"
    (checkpoint / "evaluation.items").mkdir(parents=True)
    kinds = dict(speech=dict(speech=nll), interleaved=dict(text=1.0, speech=nll))
    (folder / "results.json").write_text(json.dumps(dict(flops=3e9, nll=kinds)))
    (checkpoint / "files.json").write_text("{}")
    made = dict(topic_cloze=dict(protocol={}, files=dict(number=len(right))))
    (checkpoint / "evaluation.json").write_text(json.dumps(dict(parameters=7_000_000, made=made)))
    for setting, answers in right.items():
        np.save(report.item_path(checkpoint / "evaluation.json", "topic_cloze", f"{setting}.right"), answers)


def test_tables(tmp_path, capsys):
    rng = np.random.default_rng(0)
    answers = {(run, seed): {s: (rng.random(400) < p).astype(float) for s in report.SETTINGS}
               for run, p in (("ours", 0.9), ("theirs", 0.7)) for seed in (1, 2, 3)}
    for (run, seed), right in answers.items():
        if (run, seed) != ("theirs", 3):  # not finished yet
            finish(tmp_path / f"{run}-{seed}", right)
    study.main(["--study=made_up", f"--out={tmp_path}", "--make=false"])
    ours, theirs = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert ours["seeds"] == [1, 2, 3] and theirs["seeds"] == [1, 2] and "lead" not in ours["settings"]["S"]
    scores = [100 * answers["ours", seed]["S"].mean() for seed in (1, 2, 3)]
    assert ours["settings"]["S"]["mean"] == pytest.approx(sum(scores) / 3)
    assert ours["settings"]["S"]["std"] == pytest.approx((sum((x - sum(scores) / 3) ** 2 for x in scores) / 2) ** 0.5)
    lead = theirs["settings"]["T->S"]["lead"]
    wanted = [100 * (answers["ours", seed]["T->S"] - answers["theirs", seed]["T->S"]).mean() for seed in (1, 2)]
    assert lead["mean"] == pytest.approx(sum(wanted) / 2) and lead["seeds"] == 2 and lead["p_items"] < 0.01
    t = np.mean(wanted) / (np.std(wanted, ddof=1) / 2**0.5)
    assert lead["p_seeds"] == pytest.approx(2 * (0.5 - np.arctan(abs(t)) / np.pi))  # with one degree of freedom: Cauchy
    rows = list(csv.DictReader(open(tmp_path / "study.csv")))
    assert len(rows) == 5 * 4 and float(rows[0]["accuracy"]) == 100 * answers["ours", 1]["T"].mean()
    table = (tmp_path / "study.md").read_text()
    assert table in capsys.readouterr().out and "| Theirs | 2 | 7.00M | 3.0e+09 |" in table
    assert (tmp_path / "study.png").stat().st_size > 5000


def test_one_seed_is_tested_by_mcnemar(tmp_path):
    ours, theirs = np.repeat([1.0, 0.0], [30, 10]), np.repeat([0.0, 1.0], [12, 28])
    for run, right in (("ours", ours), ("theirs", theirs)):
        finish(tmp_path / f"{run}-1", dict.fromkeys(report.SETTINGS, right))
    study.main(["--study=made_up", f"--out={tmp_path}", "--make=false", "--seeds=[1]"])
    cell = json.loads((tmp_path / "study.json").read_text())["rows"][1]["settings"]["S"]
    assert cell["std"] is cell["lead"]["p_seeds"] is None
    assert cell["lead"]["p_items"] == pytest.approx(binomtest(12, 22).pvalue)


def test_each_run_is_compared_with_its_leader(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDY, "runs", STUDY["runs"] | dict(long=("Long", "a"), their_long=("Their long", "b")))
    monkeypatch.setitem(STUDY, "leaders", dict(long=None, their_long="long"))
    for i, run in enumerate(STUDY["runs"]):
        finish(tmp_path / f"{run}-1", dict.fromkeys(report.SETTINGS, np.arange(100) >= 10 * i))
    study.main(["--study=made_up", f"--out={tmp_path}", "--make=false", "--seeds=[1]"])
    rows = {row["run"]: row["settings"]["S"] for row in json.loads((tmp_path / "study.json").read_text())["rows"]}
    assert {run: cell.get("lead", {}).get("mean") for run, cell in rows.items()} == dict(
        ours=None, theirs=pytest.approx(10), long=None, their_long=pytest.approx(10))
    table = (tmp_path / "study.md").read_text()
    assert "| Ours | Theirs | 10.0 (0.002)" in table and "| Long | Their long | 10.0 (0.002)" in table


def test_runs_scored_on_other_items_are_not_compared(tmp_path):
    finish(tmp_path / "ours-1", dict.fromkeys(report.SETTINGS, np.ones(5)))
    finish(tmp_path / "theirs-1", dict.fromkeys([*report.SETTINGS, "more"], np.ones(5)))
    with pytest.raises(SystemExit, match="theirs-1.*: other items, or scored in another way, than .*ours-1"):
        study.main(["--study=made_up", f"--out={tmp_path}", "--make=false", "--seeds=[1]"])


def test_only_what_is_missing_is_run(tmp_path, monkeypatch):
    """Seed by seed; a run that has a checkpoint goes on, one that lacks only its scores is scored."""
    done = []

    def pretend(command, log, environment):
        done.append(command[1:])
        folder = next(x for x in command if "=/" in x).partition("=")[2]
        if command[1] == "train.py":
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "results.json").write_text("{}")
        else:
            shutil.rmtree(folder)
            finish(Path(folder), dict.fromkeys(report.SETTINGS, np.ones(5)))
        return SimpleNamespace(poll=lambda: 0, returncode=0, args=command)

    out = tmp_path / "out 1"
    for run in ("ours-1", "ours-2", "theirs-3"):
        finish(out / run, dict.fromkeys(report.SETTINGS, np.ones(5)))
    (out / "ours-2/checkpoint-00000009/evaluation.json").unlink()
    (out / "theirs-1/checkpoint-00000004").mkdir(parents=True)
    (out / "theirs-3/checkpoint-00000009/evaluation.json").write_text(json.dumps(dict(made=dict(blimp={}))))
    monkeypatch.setattr(study, "spawn", pretend)
    settings = ["--study=made_up", f"--out={out}", "--jobs=2", "--options=--device=cpu"]
    study.main([*settings, "--seeds=[1, 2]"])
    theirs = ["train.py", "config/baseline_tiny.py", "--beta=0.5"]
    score = '--tasks=["topic_cloze"]'
    assert sorted(done) == sorted([
        [*theirs, "--seed=1", f"--out_dir={out}/theirs-1", "--device=cpu", "--resume=true"],
        ["evaluate.py", f"--checkpoint={out}/theirs-1", score],
        ["evaluate.py", f"--checkpoint={out}/ours-2", score],
        [*theirs, "--seed=2", f"--out_dir={out}/theirs-2", "--device=cpu"],
        ["evaluate.py", f"--checkpoint={out}/theirs-2", score]])
    done.clear()
    study.main([*settings, "--seeds=[3]", "--runs=['theirs']"])  # it was scored in another task only
    assert done == [["evaluate.py", f"--checkpoint={out}/theirs-3", score]]


def test_training_that_was_told_to_end_is_not_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "spawn", lambda command, *_: SimpleNamespace(poll=lambda: 0, returncode=0, args=command))
    with pytest.raises(SystemExit, match="ours-1.txt: says why this did not come to its end: .*train.py"):
        study.main(["--study=made_up", f"--out={tmp_path}", "--seeds=[1]"])


def test_a_study_that_is_told_to_end_tells_its_runs(tmp_path):
    endless = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = (f"import sys; from studies import study; study.commands = lambda *_: [[sys.executable, '-c', {endless!r}]]; "
              f"study.main(['--out={tmp_path}', '--seeds=[1]'])")
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_a_failed_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "commands", lambda run, seed, c: [[sys.executable, "-c", "raise SystemExit('oh no')"]])
    with pytest.raises(SystemExit, match=r"ours-1.txt: says why this did not come to its end"):
        study.main(["--study=made_up", f"--out={tmp_path}", "--seeds=[1]"])
    assert "oh no" in (tmp_path / "ours-1.txt").read_text()


def test_the_text_model_is_scored_once(tmp_path, monkeypatch):
    called = []

    def score(command):
        called.append(command[1:])
        made = dict(blimp=dict(accuracy=77.1), mmlu=dict(acc_norm=dict(accuracy=28.0)), made=dict(blimp={}))
        Path(command[-1].partition("=")[2]).write_text(json.dumps(made))
        return SimpleNamespace(returncode=0)

    monkeypatch.setitem(STUDY, "before", "--checkpoint=weights --tasks='[\"blimp\"]'")
    monkeypatch.setattr(study.subprocess, "run", score)
    for run in ("ours-1", "theirs-1"):
        finish(tmp_path / run, dict.fromkeys(report.SETTINGS, np.ones(5)))
    for _ in range(2):
        study.main(["--study=made_up", f"--out={tmp_path}", "--seeds=[1]", "--scoring=--dtype=bfloat16"])
    assert called == [["evaluate.py", "--checkpoint=weights", '--tasks=["blimp"]', "--dtype=bfloat16",
                       f"--out={tmp_path}/before.json"]]
    assert "| before speech | 77.1 | – | 28.0 |" in (tmp_path / "study.md").read_text()


def test_what_scores_need_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDY, "evaluate", f"--tasks='[\"topic_cloze\", \"mmlu\"]' --mmlu={tmp_path}/mmlu.csv")
    monkeypatch.setattr(study, "spawn", None)
    with pytest.raises(SystemExit, match=r"mmlu.csv: no such file or folder.*--mmlu\)"):
        study.main(["--study=made_up", f"--out={tmp_path}", "--seeds=[1]"])


@pytest.mark.parametrize("line, message", [
    ("--study=tony", "did you mean tiny?"), ("--runs=['smoltalk']", "did you mean smoltolk?"),
    ("--seeds=[]", "give whole numbers"), ("--jobs=0", "1 job or more")])
def test_bad_settings(line, message):
    with pytest.raises(SystemExit, match=message.replace("?", r"\?")):
        study.main([line])


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_command_is_sound(name):
    """The studies' commands configure: their files are there, their keys exist; pictures are of runs that there are."""
    import analyze
    import evaluate
    import train
    from configurator import configure
    known = study.STUDIES[name]
    for _, command in known["runs"].values():
        settings, _ = configure(train.DEFAULTS, command.split(), train.complete_stages)
        assert settings["demo"] == "data/demo" or settings["speech"] == ["data/small/train"]
    configure(evaluate.DEFAULTS, shlex.split(known["before"]))
    settings, _ = configure(evaluate.DEFAULTS, shlex.split(known["evaluate"]))
    assert "topic_cloze" in settings["tasks"] and set(settings["tasks"]) <= set(evaluate.TASKS)
    for command in known["pictures"]:
        task, *options = shlex.split(command.format(**{run: run for run in known["runs"]}))
        assert task in analyze.COMMANDS
        configure(analyze.DEFAULTS, options)


def test_pictures_of_runs_that_are_there(tmp_path, monkeypatch, capsys):
    finish(tmp_path / "ours-1", dict.fromkeys(report.SETTINGS, np.ones(5)))
    called = []

    def analyse(command):
        called.append(command[1:])
        return SimpleNamespace(returncode=int(len(called) > 1))

    monkeypatch.setattr(study.subprocess, "run", analyse)
    study.main(["--study=made_up", f"--out={tmp_path}", "--seeds=[1]", "--make=false", "--pictures=true"])
    assert called == [["analyze.py", "weights", f"--checkpoint={tmp_path}/ours-1", f"--out={tmp_path}/pictures"]]
    assert "left out, for run 'no' is not there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="analyze.py says above why this failed"):
        study.main(["--study=made_up", f"--out={tmp_path}", "--seeds=[1]", "--make=false", "--pictures=true"])


def test_equal_tokens_and_equal_compute():
    """What the small study calls as many tokens or as much compute is so, to one percent."""
    import model
    import train
    from configurator import configure

    def cost(run):  # (tokens, FLOPs); interleaved sequences by their usual shares of 29% text and 69% units
        c, _ = configure(train.DEFAULTS, study.STUDIES["small"]["runs"][run][1].split(), train.complete_stages)
        shape = {f.name: c[f.name] for f in dataclasses.fields(model.Config) if f.name in c}
        config = model.Config(**shape | dict(vocab_size=49152, n_units=500))
        tokens = flops = 0
        for stage in c["stages"].values():
            tokens += stage["steps"] * c["batch_tokens"]
            for kind, parts in stage["mixture"].items():
                n = stage["steps"] * c["batch_tokens"] * parts / sum(stage["mixture"].values())
                rows = n / c["sequence_length"]
                scored = dict(text=(False, n, 0), speech=(True, 0, n), interleaved=(True, 0.29 * n, 0.69 * n))[kind]
                backbone, new = model.forward_flops(config, rows, c["sequence_length"], *scored)
                flops += backbone * (2 if stage["train"] == "new" else 3) + new * 3
        return tokens, flops

    costs = {run: cost(run) for run in ("smoltolk", "baseline", "equal_flops", "smoltolk_300m", "baseline_300m")}
    assert costs["smoltolk"][0] == costs["baseline"][0] >= 100e6
    assert costs["smoltolk_300m"][0] == costs["baseline_300m"][0] >= 300e6
    assert costs["equal_flops"][1] == pytest.approx(costs["smoltolk"][1], rel=0.01)
