"""
The machinery of a study: make the runs that are missing, compare the finished ones over seeds, write tables.

studies/tiny.py and studies/small/__main__.py name the runs of a study and call main(). Each run is one command of
train.py and one of evaluate.py, and both are printed before they start. In --out there are a folder <run>-<seed> for
each run, and a file <run>-<seed>.txt with what it printed.

In --results a finished run leaves <run>-<seed>.json, with its scores and its answer to each item. From then on only
pictures need the folder with its weights. study.md, study.csv, study.json and study.png hold the tables: means and
standard deviations over seeds, and leads with two p-values. One is over seeds (paired t-test), the other over items,
for these very models (benchmarks/report.py).
"""
import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks import report
from configurator import configure, nearest
from runtime.files import replace_file

runs = []                  # names of runs; []: all of the study
seeds = [1, 2, 3]          # seeds of each run
out = ""                   # folder for runs; default: out/study_<name>
results = ""               # folder for scores and tables; default: studies/results/<name>, or --out if that is set
options = ""               # more options for every train.py, like "--device=cuda --compile=true"
scoring = ""               # more options for every evaluate.py, like "--dtype=bfloat16"
jobs = 1                   # runs to make at the same time; they share the cores
DEFAULTS = dict(runs=runs, seeds=seeds, out=out, results=results, options=options, scoring=scoring, jobs=jobs)

OTHER_SCORES = ("BLIMP T", "BLIMP S", "MMLU")
SMALL_LEAD = 4             # points; the tables say how many seeds it takes to find a lead of this size


class Run(NamedTuple):
    title: str                # its row in the tables
    train: str                # its options for train.py, without seed and folder
    leader: str = "smoltolk"  # the run that is compared with this one; "": none


class Study(NamedTuple):
    name: str
    help: str                 # how the study is called
    time: str                 # how long the runs take
    runs: dict                # {name: Run}
    evaluate: dict            # settings for evaluate.py: the tasks and where their data is
    pictures: list            # commands of analyze.py, in which {smoltolk} stands for the folder of that run
    before: dict = {}         # settings for evaluate.py to score the text LM that all runs start from; {}: none


def main(study, argv):
    """Do what the first word of argv says: run, tables or pictures. Without one, only say what is missing."""
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    if command not in ("", "run", "tables", "pictures"):
        raise SystemExit(f"{command}: no such command; write run, tables or pictures")
    c = SimpleNamespace(**configure(DEFAULTS, argv[1:] if command else argv, described_in=[__file__])[0])
    for run in c.runs:
        if run not in study.runs:
            raise SystemExit(f"runs: no {run} in study {study.name}; did you mean {nearest(run, study.runs)}?")
    if not c.seeds or c.jobs < 1:
        raise SystemExit(f"seeds={c.seeds}, jobs={c.jobs}: give at least one seed, like [1], and at least one job")
    as_planned = not (c.out or c.options or c.scoring)  # otherwise these are not the figures that the study stands for
    c.runs, c.out = c.runs or list(study.runs), Path(c.out or f"out/study_{study.name}")
    c.results = Path(c.results or (f"studies/results/{study.name}" if as_planned else c.out))

    if not command:
        print_plan(study, c)
    if command == "run":
        make_runs(study, c)
    if command in ("run", "tables"):
        write_tables(collect(study, c), study, c)
    if command == "pictures":
        make_pictures(study, c)


def print_plan(study, c):
    """Say which runs are missing, how long they take, and which commands there are."""
    missing = 0
    for run in c.runs:
        finished = finished_seeds(study, run, c)
        missing += len(c.seeds) - len(finished)
        print(f"{run}: {study.runs[run].title}\n    train.py {study.runs[run].train}\n    finished seeds: {finished}")
    print(f"\n{missing} of {len(c.runs) * len(c.seeds)} runs are missing in {c.out}.\n{study.time}")
    print(f"\nNothing was started. The commands are:\n{study.help}")


# ---------------------------------------------------------------------------------------------------------------------
# making the runs

def commands_left(study, run, seed, c):
    """The commands that a run still needs, as lists of words: train.py and evaluate.py, only evaluate.py, or none."""
    folder = c.out / f"{run}-{seed}"
    if record_of(run, seed, c).exists():
        return []
    score = ["evaluate.py", f"--checkpoint={folder}", *as_options(study.evaluate), *shlex.split(c.scoring)]
    if (folder / "results.json").exists():
        return [score] if lacks_tasks(newest_scores(folder), study.evaluate) else []
    train = ["train.py", *shlex.split(study.runs[run].train), f"--seed={seed}", f"--out_dir={folder}"]
    train += shlex.split(c.options)
    if any(folder.glob("checkpoint-*[0-9]")):
        train.append("--resume=true")
    return [train, score]


def finished_seeds(study, run, c):
    return [seed for seed in c.seeds if not commands_left(study, run, seed, c)]


def record_of(run, seed, c):
    """The file with the scores of a finished run."""
    return c.results / f"{run}-{seed}.json"


def keep_scores(study, run, seed, c):
    """Write the record of a finished run, unless there is one. Answers are digits: 2 right, 0 wrong, 1 a tie."""
    folder, path = c.out / f"{run}-{seed}", record_of(run, seed, c)
    if path.exists():
        return
    results, newest = json.loads((folder / "results.json").read_text()), newest_scores(folder)
    scores, answers = json.loads(newest.read_text()), {}
    for setting in report.SETTINGS:
        right = np.load(report.item_path(newest, "topic_cloze", f"{setting}.right"))
        answers[setting] = "".join(f"{2 * answer:.0f}" for answer in right)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = dict(run=run, seed=seed, train=study.runs[run].train, options=c.options, scoring=c.scoring, commit=commit,
                  processor=processor(), seconds=results.get("seconds"), flops=results["flops"],
                  parameters=scores["parameters"], nll=results["nll"], other=other_scores(scores),
                  scored={key: scores["made"]["topic_cloze"][key] for key in ("protocol", "files")}, answers=answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=1))


def processor():
    """The name of the processor, as Linux knows it, or ""."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def as_options(settings):
    """["--key=value", ...] as the command line takes them."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def newest_scores(folder):
    """The path of a run's newest evaluation.json, or None."""
    return max(folder.glob("checkpoint-*[0-9]/evaluation.json"), default=None)


def lacks_tasks(path, wanted):
    """Whether the evaluation.json at `path` lacks a task that the settings `wanted` name."""
    made = json.loads(path.read_text())["made"] if path and path.exists() else {}
    return not made.keys() >= set(wanted["tasks"])


def make_runs(study, c):
    """Make what is missing, all runs of one seed before those of the next. SystemExit if a command fails."""
    for key, path in study.evaluate.items():
        if key != "tasks" and not Path(path).exists():
            raise SystemExit(f"{path}: no such file or folder, but evaluate.py needs it (--{key}); "
                             f"studies/{study.name}/README.md says how it is made")
    c.out.mkdir(parents=True, exist_ok=True)
    before = c.out / "before.json"
    if study.before and lacks_tasks(before, study.before):
        command = ["evaluate.py", *as_options(study.before), *shlex.split(c.scoring), f"--out={before}"]
        if start(command).wait() != 0:
            raise SystemExit("The text LM could not be scored; evaluate.py says above why")

    waiting = [(run, seed) for seed in c.seeds for run in c.runs if commands_left(study, run, seed, c)]
    print(f"{len(waiting)} runs to go. {study.time}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes below are told to end as well
    pool, processes, stop = ThreadPoolExecutor(c.jobs), [], Event()
    try:
        names = pool.map(lambda job: make_run(study, *job, c, processes, stop), waiting)
        for n, name in enumerate(names, 1):
            print(f"{name} is finished; {len(waiting) - n} runs to go", flush=True)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()  # train.py writes a checkpoint first


def make_run(study, run, seed, c, processes, stop):
    """Train and score a run, as far as it is not done yet. Returns its name. SystemExit if a command fails.

    processes: collects what was started; stop: an Event after which nothing is started
    """
    name = f"{run}-{seed}"
    threads = dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // c.jobs))) if c.jobs > 1 else {}
    left = commands_left(study, run, seed, c)
    while left and not stop.is_set():
        command, *later = left
        with open(c.out / f"{name}.txt", "a") as file:
            process = start(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)
        processes.append(process)
        returncode, left = process.wait(), commands_left(study, run, seed, c)
        if returncode != 0 or len(left) > len(later):  # training that was told to end returns 0 as well
            stop.set()
            raise SystemExit(f"{c.out}/{name}.txt: says why this command did not finish: "
                             f"{shlex.join(['python', *command])}")
    if not left:
        keep_scores(study, run, seed, c)
    return name


def start(command, **how):
    """Print a command of this repository and start it."""
    print(shlex.join(["python", *command]), flush=True)
    return subprocess.Popen([sys.executable, *command], **how)


def make_pictures(study, c):
    """Let analyze.py draw the runs with the first seed. Figures of runs that are missing are left out."""
    finished = {run: f"{c.out}/{run}-{c.seeds[0]}" for run in study.runs
                if (c.out / f"{run}-{c.seeds[0]}/results.json").exists()}
    for command in study.pictures:
        try:
            words = [word.format(**finished) for word in shlex.split(command)]
        except KeyError as run:
            print(f"left out, because {c.out} has no finished run {run}: analyze.py {command}")
            continue
        if start(["analyze.py", *words, f"--out={c.out}/pictures"]).wait() != 0:
            raise SystemExit("analyze.py says above why this failed; the other figures were not begun")


# ---------------------------------------------------------------------------------------------------------------------
# comparing the finished runs

def collect(study, c):
    """A row for each run that has finished with some seed, over the seeds it has finished with. SystemExit if none."""
    leaders = {run: study.runs[run].leader for run in c.runs}
    results = {"": {}}  # {run: {seed: its results}}
    for run in [*leaders, *filter(None, leaders.values())]:
        results[run] = {}
        for seed in finished_seeds(study, run, c):
            keep_scores(study, run, seed, c)
            results[run][seed] = read_record(record_of(run, seed, c))
    every = [result for by_seed in results.values() for result in by_seed.values()]
    for result in every:
        if result.scored != every[0].scored:
            raise SystemExit(f"{result.path}: other items, or scored in another way, than {every[0].path}; remove the "
                             "one that is wrong")
    rows = [make_row(study, run, results[run], results[leader]) for run, leader in leaders.items() if results[run]]
    if not rows:
        raise SystemExit(f"{c.out}: no finished run of {', '.join(c.runs)}; the command `run` makes them")
    return rows


def read_record(path):
    """The record of a finished run. right: {setting: answers to the items of Topic-Cloze, float64 [items]}."""
    record = json.loads(path.read_text())
    right = {setting: np.array([int(digit) / 2 for digit in digits]) for setting, digits in record["answers"].items()}
    return SimpleNamespace(path=path, right=right, **record)


def other_scores(scores):
    """{name: % right} of those OTHER_SCORES that an evaluation.json has."""
    cells = scores.get("blimp"), scores.get("sblimp", {}).get("dev"), scores.get("mmlu", {}).get("acc_norm")
    return {name: cell["accuracy"] for name, cell in zip(OTHER_SCORES, cells) if cell}


def make_row(study, run, results, leading):
    """One row of the tables. results, leading: {seed: results} of the run and of its leader."""
    about, first = study.runs[run], next(iter(results.values()))
    row = dict(run=run, what=about.title, seeds=list(results), parameters=first.parameters, flops=first.flops,
               leader=study.runs[about.leader].title if about.leader else None, settings={}, other={})
    shared = [seed for seed in results if seed in leading and about.leader != run]
    for setting in report.SETTINGS:
        right = {seed: result.right[setting] for seed, result in results.items()}
        cell = summary([100 * answers.mean() for answers in right.values()])
        cell["stderr"] = float(np.mean([100 * answers.std() / len(answers) ** 0.5 for answers in right.values()]))
        if shared:
            cell["lead"] = lead([leading[seed].right[setting] for seed in shared], [right[seed] for seed in shared])
        row["settings"][setting] = cell
    for name in first.other:
        row["other"][name] = summary([result.other[name] for result in results.values() if name in result.other])
    for kind, modality in (("speech", "speech"), ("interleaved", "text"), ("interleaved", "speech")):
        row[f"nll {kind} {modality}"] = float(np.mean([result.nll[kind][modality] for result in results.values()]))
    return row


def lead(ours, theirs):
    """How many points more of our answers are right. ours, theirs: for the same seeds, answers float64 [items]."""
    differences = [100 * (a.mean() - b.mean()) for a, b in zip(ours, theirs)]
    cell, p_seeds, needed = summary(differences), None, None
    if len(differences) > 1 and cell["std"] < 1e-9:  # the t-test is not defined if all differences are equal
        p_seeds = float(abs(cell["mean"]) < 1e-9)
    elif len(differences) > 1:
        p_seeds, needed = float(stats.ttest_1samp(differences, 0).pvalue), seeds_needed(cell["std"])
    p_items = report.compare(np.mean(ours, 0), np.mean(theirs, 0))["p"]
    return cell | dict(seeds=len(differences), p_seeds=p_seeds, p_items=p_items, seeds_needed=needed)


def seeds_needed(std, points=SMALL_LEAD, power=0.8, level=0.05):
    """How many seeds a study needs to find a lead of so many points with this probability, in a paired t-test.

    std: the standard deviation of the lead over seeds. The t statistic then has a noncentral t distribution.
    """
    for n in itertools.count(2):
        largest = stats.t.ppf(1 - level / 2, n - 1)
        if stats.nct.sf(largest, n - 1, points / std * n ** 0.5) >= power:
            return n


def summary(scores):
    """Mean and standard deviation over seeds. The latter is None for one seed."""
    return dict(mean=float(np.mean(scores)), scores=scores,
                std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None)


# ---------------------------------------------------------------------------------------------------------------------
# tables

def write_tables(rows, study, c):
    """Write study.json, .csv, .md and .png, and print the tables."""
    from tools import figures  # matplotlib takes a second to import

    stem, path = c.results / "study", c.out / "before.json"
    before = other_scores(json.loads(path.read_text())) if path.exists() else {}
    contents = dict(study=study.name, seeds=c.seeds, before=before, rows=rows)
    stem.with_suffix(".json").write_text(json.dumps(contents, indent=1))
    with open(stem.with_suffix(".csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "setting", "seed", "accuracy", "parameters", "flops"])
        for row in rows:
            for setting, cell in row["settings"].items():
                for seed, score in zip(row["seeds"], cell["scores"]):
                    writer.writerow([row["run"], setting, seed, score, row["parameters"], row["flops"]])
    tables = as_markdown(rows, before)
    stem.with_suffix(".md").write_text(tables, encoding="utf-8")
    figures.study_bars(rows, stem.with_suffix(".png"))
    print(tables)
    print(f"written to {stem}.md, .csv, .json, .png")


def as_markdown(rows, before):
    """The tables: Topic-Cloze, other scores if there are any, leads. before: {name: score} of the text LM, or {}."""
    scores, leads, needed = [], [], []
    other = [["before speech", *(f"{before[name]:.1f}" if name in before else "" for name in OTHER_SCORES)]]
    for row in rows:
        cells, found = row["settings"].values(), row["other"]
        scores.append([row["what"], str(len(row["seeds"])), f"{row['parameters'] / 1e6:.2f}M", f"{row['flops']:.1e}",
                       *map(mean_and_std, cells), f"{row['nll speech speech']:.3f}"])
        other.append([row["what"], *(mean_and_std(found[name]) if name in found else "" for name in OTHER_SCORES)])
        if "lead" in row["settings"]["S"]:
            leads.append([row["leader"], row["what"], *(lead_and_p(cell["lead"]) for cell in cells)])
            needed.append([row["leader"], row["what"], *(str(cell["lead"]["seeds_needed"] or "") for cell in cells)])
    ranges = []
    for setting in report.SETTINGS:
        errors = [row["settings"][setting]["stderr"] for row in rows]
        ranges.append(f"{setting} {min(errors):.1f} to {max(errors):.1f}")

    lines = report.markdown_table(
        ["Topic-Cloze, % right", "seeds", "parameters", "FLOPs", *report.SETTINGS, "speech NLL"], *scores)
    lines += ["± is the standard deviation over seeds. The standard error over items, of a seed: "
              + ", ".join(ranges) + ".", ""]
    if before or any(row["other"] for row in rows):
        lines += report.markdown_table(["% right", *OTHER_SCORES], *(other if before else other[1:]))
    lines += ["Leads, in points. In brackets p-values: over seeds (t-test: would others show it too?) and over items "
              "(would others, with these very models?).", ""]
    lines += report.markdown_table(["the lead of", "over", *report.SETTINGS], *leads)
    lines += [f"So many seeds find a lead of {SMALL_LEAD} points in four of five studies (paired t-test, p < 0.05), if "
              "leads vary from seed to seed as they do here. The number is rough, because few seeds show this.", ""]
    lines += report.markdown_table(["the lead of", "over", *report.SETTINGS], *needed)
    return "\n".join(lines)


def mean_and_std(cell):
    return f"{cell['mean']:.1f}" + (f" ± {cell['std']:.1f}" if cell["std"] is not None else "")


def lead_and_p(lead):
    """A lead as the table shows it: its mean, standard deviation and p-values."""
    p_values = [p for p in (lead["p_seeds"], lead["p_items"]) if p is not None]
    return f"{mean_and_std(lead)} ({', '.join(f'{p:.2g}' if p >= 0.001 else '<0.001' for p in p_values)})"
