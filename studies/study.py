"""
The paper's claim in small: SmolTolk and vocabulary expansion on the same data, over seeds, and what each part does.

    python -m studies.study                                       all runs of the tiny study that are not there yet, then tables
    python -m studies.study --runs='["smoltolk","baseline"]' --seeds='[1]'                                   some of them
    python -m studies.study --make=false --pictures=true          the tables of what is there, and analyze.py's figures of it
    python -m studies.study --study=small --jobs=1 --seeds='[1]'  SmolLM2-135M, on one H100; studies/small/corpus.py makes its data

Each run is one command of train.py, printed before it starts, and one of evaluate.py, which keeps the score of every
item; a run that was cut off goes on from its checkpoint. In --out: a folder <run>-<seed> for each run, and study.md,
study.csv, study.json and study.png: mean and standard deviation over seeds, and by how much SmolTolk leads, with two
p-values: of the lead over seeds (t-test), and over items with these very models (McNemar or bootstrap, see report.py).
--pictures=true has analyze.py make its figures and tables in --out/pictures, of the runs with the first seed.
"""
import csv
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.stats import ttest_1samp

import evaluate
from benchmarks import report
from configurator import configure, nearest

study = "tiny"             # one of STUDIES below
runs = []                  # some of its runs; []: all
seeds = [1, 2, 3]
out = ""                   # default: out/study_<study>
make = True                # run what is missing
jobs = 1                   # so many runs at a time
options = ""               # more options for every train.py, e.g. "--device=cuda --compile=true"
scoring = ""               # and for every evaluate.py, e.g. "--dtype=bfloat16"
pictures = False           # make analyze.py's figures too
DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (bool, int, str, list)) and not k.startswith("_")}

# runs {run: (what it is, its train.py command without seed and folder)}; leaders {run: the one whose lead over it is
# shown}, where that is not the first; options of evaluate.py; before: those for the text LM that all start from, scored
# once; commands of analyze.py, {run} being the run's folder
STUDIES = dict(
    tiny=dict(
        runs=dict(
            smoltolk=("SmolTolk", "config/train_tiny.py"),
            baseline=("vocabulary expansion, as in the paper: no stage 1", "config/baseline_tiny.py"),
            equal_steps=("the same, as many steps", "config/baseline_tiny.py --stages.stage2.steps=1000"),
            equal_flops=("the same, as much compute", "config/baseline_tiny.py --stages.stage2.steps=1595"),
            equal_parameters=("the same, as many steps and parameters",
                              "config/baseline_deep_tiny.py --stages.stage2.steps=1000"),
            no_input_adapter=("- input adapter", "config/ablation_no_input_adapter_tiny.py"),
            no_output_adapter=("- output adapter", "config/ablation_no_output_adapter_tiny.py"),
            no_adapters=("- adapters", "config/ablation_no_adapters_tiny.py"),
            no_layer_pooling=("- layer pooling", "config/ablation_no_layer_pooling_tiny.py"),
            no_dynamic_pooling=("- dynamic pooling", "config/ablation_no_dynamic_pooling_tiny.py"),
            no_residual=("- residual", "config/ablation_no_residual_tiny.py")),
        leaders={}, before="",
        evaluate="--tasks='[\"topic_cloze\"]'",
        pictures=["segmentation --checkpoint={smoltolk} --units=data/demo/units", "weights --checkpoint={smoltolk}",
                  "dimension --checkpoint={smoltolk},{baseline} --points=1000",
                  "overlap --checkpoint={smoltolk},{baseline} --points=1000",
                  "scaling --checkpoint={smoltolk},{equal_flops}"]),
    small=dict(
        runs=dict(
            smoltolk=("SmolTolk, 100M tokens", "config/train_small.py"),
            baseline=("vocabulary expansion, no stage 1", "config/baseline_small.py"),
            smoltolk_300m=("SmolTolk, 300M tokens", "config/train_small.py --stages.stage2.steps=2139"),
            baseline_300m=("vocabulary expansion, 300M tokens", "config/baseline_small.py --stages.stage2.steps=2289"),
            equal_flops=("vocabulary expansion, as much compute as SmolTolk",
                         "config/baseline_small.py --stages.stage2.steps=792"),
            no_input_adapter=("- input adapter", "config/ablation_no_input_adapter_small.py"),
            no_output_adapter=("- output adapter", "config/ablation_no_output_adapter_small.py"),
            no_adapters=("- adapters", "config/ablation_no_adapters_small.py"),
            no_layer_pooling=("- layer pooling", "config/ablation_no_layer_pooling_small.py"),
            no_dynamic_pooling=("- dynamic pooling", "config/ablation_no_dynamic_pooling_small.py"),
            no_residual=("- residual", "config/ablation_no_residual_small.py"),
            **{f"{run}_rate_{rate}": (f"{run}, stage 2 at learning rate {rate}, 20M tokens",
                                      f"config/{config}_small.py --stages.stage2.learning_rate={rate} {steps}")
               for rate in ("1e-4", "3e-4", "1e-3") for run, config, steps in (
                   ("smoltolk", "train", "--stages.stage1.steps=30 --stages.stage2.steps=123"),
                   ("baseline", "baseline", "--stages.stage2.steps=153"))}),
        leaders=dict(smoltolk_300m=None, baseline_300m="smoltolk_300m",
                     **{f"smoltolk_rate_{rate}": None for rate in ("1e-4", "3e-4", "1e-3")},
                     **{f"baseline_rate_{rate}": f"smoltolk_rate_{rate}" for rate in ("1e-4", "3e-4", "1e-3")}),
        evaluate="--tasks='[\"topic_cloze\",\"sblimp\",\"blimp\",\"mmlu\"]' --cloze=data/small/cloze "
                 "--units=data/small/units --sblimp=data/spoken_blimp --blimp=data/blimp --mmlu=data/mmlu.csv",
        before="--checkpoint=weights/smollm2-135m --tasks='[\"topic_cloze\",\"blimp\",\"mmlu\"]' "
               "--cloze=data/small/cloze --blimp=data/blimp --mmlu=data/mmlu.csv",
        pictures=["segmentation --checkpoint={smoltolk} --data=data/small/test --val=data/small/val --utterances=500 "
                  "--units=data/small/units", "weights --checkpoint={smoltolk} --data=data/small/test --utterances=500",
                  *(f"{what} --data=data/small/test --checkpoint={{smoltolk}},{{baseline}},{{no_adapters}},"
                    "{no_layer_pooling}" for what in ("dimension", "overlap")),
                  "scaling --checkpoint={smoltolk_300m},{baseline_300m}"]))
OTHER = ("BLIMP T", "BLIMP S", "MMLU")


def evaluation(folder):
    """(path, contents) of the newest evaluation.json of a run; (None, {}) if there is none."""
    there = sorted(folder.glob("checkpoint-*[0-9]/evaluation.json"))
    return (there[-1], json.loads(there[-1].read_text())) if there else (None, {})


def commands(run, seed, c):
    """The commands of one run that are still to be run: train.py and evaluate.py, the latter, or none."""
    folder, left = Path(c.out) / f"{run}-{seed}", []
    quoted = shlex.quote(str(folder))
    there = any(folder.glob("checkpoint-*[0-9]"))
    score = STUDIES[c.study]["evaluate"]
    wanted, _ = configure(evaluate.DEFAULTS, shlex.split(score))
    scored = evaluation(folder)[1]
    if not (folder / "results.json").exists():
        said = STUDIES[c.study]["runs"][run][1]
        train = f"train.py {said} --seed={seed} --out_dir={quoted} {c.options}"
        left.append(f"{train} --resume=true" if there else train)
    if left or set(wanted["tasks"]) - set(scored.get("made", {})):
        left.append(f"evaluate.py --checkpoint={quoted} {score} {c.scoring}")
    return [[sys.executable, *shlex.split(command)] for command in left]


def check_data(c):
    """SystemExit if what the scores need is not there: before the training, not after it."""
    wanted, _ = configure(evaluate.DEFAULTS, shlex.split(STUDIES[c.study]["evaluate"]))
    for key in ("cloze", "units", "sblimp", "blimp", "mmlu"):
        if wanted[key] != evaluate.DEFAULTS[key] and not Path(wanted[key]).exists():
            raise SystemExit(f"{wanted[key]}: no such file or folder, and the study is scored with it (evaluate.py's "
                             f"--{key}); the README says how it is made")


def run_all(c):
    """Run what is missing, c.jobs runs at a time, seed by seed, so that early tables compare like with like."""
    waiting = [(run, seed) for seed in c.seeds for run in c.runs if commands(run, seed, c)]
    print(f"{len(waiting)} runs to go: {' '.join(f'{run}-{seed}' for run, seed in waiting)}", flush=True)
    threads = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // c.jobs))} if c.jobs > 1 else None
    busy = []  # (process, run, seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the end of this function
    try:
        while waiting or busy:
            while waiting and len(busy) < c.jobs:
                run, seed = waiting.pop(0)
                command = commands(run, seed, c)[0]
                busy.append((spawn(command, Path(c.out) / f"{run}-{seed}.txt", threads), run, seed))
            time.sleep(0.5)
            for job in [job for job in busy if job[0].poll() is not None]:
                process, run, seed = job
                busy.remove(job)
                left = commands(run, seed, c)
                if process.returncode != 0 or process.args in left or [*process.args, "--resume=true"] in left:
                    raise SystemExit(f"{c.out}/{run}-{seed}.txt: says why this did not come to its end: "
                                     f"{shlex.join(process.args)}")
                if left:
                    waiting.insert(0, (run, seed))
    finally:  # train.py writes a checkpoint when it is told to end
        for process, *_ in busy:
            process.terminate()
        for process, *_ in busy:
            process.wait()


def spawn(command, log, environment):
    print(shlex.join(["python", *command[1:]]), flush=True)
    with open(log, "a") as f:
        return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment)


def read_run(folder):
    """What a finished run came to: its results.json, parameters, and the items' answers {setting: float64 [items]}."""
    results = json.loads((folder / "results.json").read_text())
    path, made = evaluation(folder)
    right = {s: np.load(report.item_path(path, "topic_cloze", f"{s}.right")) for s in report.SETTINGS}
    scored = {key: made["made"]["topic_cloze"][key] for key in ("protocol", "files")}
    return SimpleNamespace(flops=results["flops"], parameters=made["parameters"], right=right, nll=results["nll"],
                           other=other_scores(made), path=path, scored=scored)


def other_scores(made):
    """{name: % right} of what an evaluation.json has of OTHER."""
    cells = made.get("blimp"), made.get("sblimp", {}).get("dev"), made.get("mmlu", {}).get("acc_norm")
    return {name: cell["accuracy"] for name, cell in zip(OTHER, cells) if cell}


def score_before(c):
    """Score the text LM that the study's runs start from, where there is one, in --out/before.json."""
    path, options = Path(c.out) / "before.json", shlex.split(STUDIES[c.study]["before"])
    wanted, _ = configure(evaluate.DEFAULTS, options)
    if set(wanted["tasks"]) - set(json.loads(path.read_text())["made"] if path.exists() else {}):
        command = [sys.executable, "evaluate.py", *options, *shlex.split(c.scoring), f"--out={path}"]
        print(shlex.join(["python", *command[1:]]), flush=True)
        if subprocess.run(command).returncode:
            raise SystemExit("evaluate.py says above why the text LM could not be scored")


def collect(c):
    """A row for each run that has finished with some seed, over the seeds it has finished with."""
    known, rows, first = STUDIES[c.study], [], []

    @functools.cache
    def finished(run):
        there = {seed: read_run(Path(c.out) / f"{run}-{seed}") for seed in c.seeds if not commands(run, seed, c)}
        first.extend(there.values())
        for one in there.values():
            if one.scored != first[0].scored:
                raise SystemExit(f"{one.path}: other items, or scored in another way, than {first[0].path}; remove the "
                                 "one that is wrong")
        return there

    for run in c.runs:
        if not (there := finished(run)):
            continue
        one, leader = next(iter(there.values())), known["leaders"].get(run, next(iter(known["runs"])))
        row = dict(run=run, what=known["runs"][run][0], seeds=list(there), parameters=one.parameters, flops=one.flops,
                   leader=known["runs"][leader][0] if leader else None, settings={})
        row["other"] = {name: summary([r.other[name] for r in there.values() if name in r.other]) for name in one.other}
        ahead = finished(leader) if leader not in (None, run) else {}
        both = [seed for seed in there if seed in ahead]
        for s in report.SETTINGS:
            row["settings"][s] = cell = summary([100 * r.right[s].mean() for r in there.values()])
            cell["stderr"] = float(np.mean([100 * r.right[s].std() / len(r.right[s]) ** 0.5 for r in there.values()]))
            if both:
                cell["lead"] = lead(*([x[seed].right[s] for seed in both] for x in (ahead, there)))
        for kind, name in (("speech", "speech"), ("interleaved", "text"), ("interleaved", "speech")):
            row[f"nll {kind} {name}"] = float(np.mean([r.nll[kind][name] for r in there.values()]))
        rows.append(row)
    return rows


def lead(ours, theirs):
    """By how much ours are right more often, in points: two lists, of the same seeds, of answers float64 [items]."""
    differences = [100 * (a.mean() - b.mean()) for a, b in zip(ours, theirs)]
    over_seeds = None
    if len(differences) > 1:
        over_seeds = float(ttest_1samp(differences, 0).pvalue) if np.ptp(differences) else float(not differences[0])
    p_items = report.compare(np.mean(ours, 0), np.mean(theirs, 0))["p"]
    return summary(differences) | dict(seeds=len(differences), p_seeds=over_seeds, p_items=p_items)


def summary(scores):
    """Mean and standard deviation over seeds; None for one seed."""
    return dict(mean=float(np.mean(scores)), scores=scores,
                std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None)


def spread(cell):
    """mean ± standard deviation, in percent."""
    return f"{cell['mean']:.1f}" + (f" ± {cell['std']:.1f}" if cell["std"] is not None else "")


def as_markdown(rows, before):
    """Tables: Topic-Cloze, other scores if there are any, leads. before: {name: score} of the text LM, or {}."""
    def table(head, lines):
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
    scores = [[r["what"], str(len(r["seeds"])), f"{r['parameters'] / 1e6:.2f}M", f"{r['flops']:.1e}",
               *(spread(r["settings"][s]) for s in report.SETTINGS), f"{r['nll speech speech']:.3f}"] for r in rows]
    leads = [[r["leader"], r["what"], *map(spread_and_p, (r["settings"][s]["lead"] for s in report.SETTINGS))]
             for r in rows if "lead" in r["settings"]["S"]]
    errors = [f"{min(e):.1f} to {max(e):.1f}" if (e := [r["settings"][s]["stderr"] for r in rows]) else ""
              for s in report.SETTINGS]
    of_runs = [("before speech", {name: summary([score]) for name, score in before.items()})] * bool(before)
    of_runs += [(r["what"], r["other"]) for r in rows]
    other = [[what, *(spread(cells[name]) if name in cells else "–" for name in OTHER)] for what, cells in of_runs]
    return "\n\n".join([
        table(["Topic-Cloze, % right", "seeds", "parameters", "FLOPs", *report.SETTINGS, "speech NLL"], scores),
        "± is the standard deviation over seeds. The standard error over items, of a seed: "
        + ", ".join(f"{s} {e}" for s, e in zip(report.SETTINGS, errors)) + ".",
        *([table(["% right", *OTHER], other)] if any(cells for _, cells in of_runs) else []),
        "Leads, in points. In brackets p-values: over seeds (t-test: would others show it too?) and over items (would "
        "others, with these very models?).",
        table(["the lead of", "over", *report.SETTINGS], leads)]) + "\n"


def spread_and_p(lead):
    """A lead as it stands in a table."""
    ps = [p for p in (lead["p_seeds"], lead["p_items"]) if p is not None]
    return f"{spread(lead)} ({', '.join(f'{p:.2g}' if p >= 0.001 else '<0.001' for p in ps)})"


def draw(rows, path):
    """One point for each seed, a bar at the mean, for each run and setting."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.6 + 0.38 * len(rows)), sharey=True, layout="constrained")
    lowest = min(score for row in rows for s in report.SETTINGS[1:] for score in row["settings"][s]["scores"])
    for axis, s in zip(axes, report.SETTINGS[1:]):
        for y, row in enumerate(rows):
            cell = row["settings"][s]
            axis.barh(y, cell["mean"] - 50, left=50, color=report.COLOURS[s], alpha=0.35 if y else 0.7)
            axis.plot(cell["scores"], [y] * len(cell["scores"]), "o", color="black", markersize=3.5)
        axis.axvline(50, color="0.4", linewidth=1)
        axis.set(title=f"{s}", xlabel="% right (chance: 50)", xlim=(min(45, lowest - 2), 100))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle("Topic-Cloze: mean over seeds (bars), each seed (points)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(rows, c):
    """study.json, .csv, .md and .png."""
    stem, path = Path(c.out) / "study", Path(c.out) / "before.json"
    before = other_scores(json.loads(path.read_text())) if path.exists() else {}
    about = dict(study=c.study, seeds=c.seeds, before=before, rows=rows)
    stem.with_suffix(".json").write_text(json.dumps(about, indent=1))
    with open(stem.with_suffix(".csv"), "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["run", "setting", "seed", "accuracy", "parameters", "flops"])
        writer.writerows([r["run"], s, seed, score, r["parameters"], r["flops"]] for r in rows
                         for s in report.SETTINGS for seed, score in zip(r["seeds"], r["settings"][s]["scores"]))
    tables = as_markdown(rows, before)
    stem.with_suffix(".md").write_text(tables)
    draw(rows, stem.with_suffix(".png"))
    print(tables)
    print(f"written to {stem}.md, .csv, .json, .png")


def make_pictures(c):
    """analyze.py's figures, csv and json of the runs with the first seed; those of runs that are not there are left."""
    there = {run: f"{c.out}/{run}-{c.seeds[0]}" for run in STUDIES[c.study]["runs"]
             if not commands(run, c.seeds[0], c)}
    for command in STUDIES[c.study]["pictures"]:
        try:
            arguments = [argument.format(**there) for argument in shlex.split(command)]
        except KeyError as run:
            print(f"left out, for run {run} is not there: analyze.py {command}")
            continue
        print(shlex.join(["python", "analyze.py", *arguments]), flush=True)
        if subprocess.run([sys.executable, "analyze.py", *arguments, f"--out={c.out}/pictures"]).returncode:
            raise SystemExit("analyze.py says above why this failed; the other figures were not begun")


def main(argv):
    c = SimpleNamespace(**configure(DEFAULTS, argv)[0])
    if c.study not in STUDIES:
        raise SystemExit(f"study={c.study}: no such study; did you mean {nearest(c.study, STUDIES)}?")
    known = STUDIES[c.study]["runs"]
    for run in c.runs:
        if run not in known:
            raise SystemExit(f"runs: no {run} in study {c.study}; did you mean {nearest(run, known)}?")
    if not c.seeds or not all(isinstance(seed, int) for seed in c.seeds) or c.jobs < 1:
        raise SystemExit(f"seeds={c.seeds}, jobs={c.jobs}: give whole numbers, like [1, 2, 3], and 1 job or more")
    c.runs, c.out = c.runs or list(known), c.out or f"out/study_{c.study}"
    if c.make:
        check_data(c)
        Path(c.out).mkdir(parents=True, exist_ok=True)
        score_before(c)
        run_all(c)
    rows = collect(c)
    if not rows:
        raise SystemExit(f"{c.out}: no finished run of {', '.join(c.runs)}; leave --make=false out")
    write(rows, c)
    if c.pictures:
        make_pictures(c)


if __name__ == "__main__":
    main(sys.argv[1:])
