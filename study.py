"""
The paper's claim in small: SmolTolk and vocabulary expansion on the same data, over seeds, and what each part does.

    python study.py                                       all runs of the tiny study that are not there yet, then tables
    python study.py --runs='["smoltolk","baseline"]' --seeds='[1]'                                   some of them
    python study.py --make=false --pictures=true          the tables of what is there, and analyze.py's figures of it
    python study.py --study=small --jobs=1 --seeds='[1]'  SmolLM2-135M, on one H100; corpora/small.py makes its data

Each run is one command of train.py, printed before it starts, and one of evaluate.py, which keeps the score of every
item; a run that was cut off goes on from its checkpoint. In --out: a folder <run>-<seed> for each run, and study.md,
study.csv, study.json and study.png: mean and standard deviation over seeds, differences to the first run with p-values.
--pictures=true has analyze.py make its figures and tables in --out/pictures, of the runs with the first seed.
"""
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import evaluate
import report
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

# runs {run: (what it is, its train.py command without seed and folder)}, of which the first is what others are compared
# with; options of evaluate.py; commands of analyze.py, where {run} is the run's folder
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
            **{f"{run}_rate_{rate}": (f"{run}, learning rate {rate}, 20M tokens",
                                      f"config/{config}_small.py --stages.stage2.learning_rate={rate} {steps}")
               for rate in ("1e-4", "3e-4", "1e-3") for run, config, steps in (
                   ("smoltolk", "train", "--stages.stage1.steps=30 --stages.stage2.steps=123"),
                   ("baseline", "baseline", "--stages.stage2.steps=153"))}),
        evaluate="--tasks='[\"topic_cloze\",\"nll\",\"sblimp\",\"blimp\",\"mmlu\"]' --cloze=data/small/cloze "
                 "--val_text='[\"data/small/val\"]' --val_speech='[\"data/small/val\"]' "
                 "--val_interleaved='[\"data/small/val\"]' --sequence_length=1024 --units=data/small/units "
                 "--sblimp=data/spoken_blimp --blimp=data/blimp --mmlu=data/mmlu.csv --before=weights/smollm2-135m",
        pictures=["segmentation --checkpoint={smoltolk} --data=data/small/test --val=data/small/val --utterances=500 "
                  "--units=data/small/units", "weights --checkpoint={smoltolk} --data=data/small/test --utterances=500",
                  *(f"{what} --data=data/small/test --checkpoint={{smoltolk}},{{baseline}},{{no_adapters}},"
                    "{no_layer_pooling}" for what in ("dimension", "overlap")),
                  "scaling --checkpoint={smoltolk_300m},{baseline_300m}"]))
OTHER = ("BLIMP T", "BLIMP S", "MMLU", "MMLU before speech")
COLOURS = {"T": "#0072B2", "S": "#D55E00", "T->S": "#E69F00", "S->T": "#009E73"}  # Okabe and Ito's


def commands(run, seed, c):
    """The commands of one run that are still to be run: train.py, evaluate.py, or neither."""
    folder = Path(c.out) / f"{run}-{seed}"
    there = sorted(folder.glob("checkpoint-*[0-9]"))
    left = []
    if not (folder / "results.json").exists():
        said = STUDIES[c.study]["runs"][run][1]
        train = f"{sys.executable} train.py {said} --seed={seed} --out_dir={folder} {c.options}"
        left.append(f"{train} --resume=true" if there else train)
    if left or not (there and (there[-1] / "evaluation.json").exists()):
        score = STUDIES[c.study]["evaluate"]
        left.append(f"{sys.executable} evaluate.py --checkpoint={folder} {score} {c.scoring}")
    return [shlex.split(command) for command in left]


def run_all(c):
    """Run what is missing, c.jobs runs at a time, seed by seed, so that early tables compare like with like."""
    Path(c.out).mkdir(parents=True, exist_ok=True)
    waiting = [(run, seed) for seed in c.seeds for run in c.runs if commands(run, seed, c)]
    print(f"{len(waiting)} runs to go: {' '.join(f'{run}-{seed}' for run, seed in waiting)}", flush=True)
    threads = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // c.jobs))} if c.jobs > 1 else None
    busy = []
    try:
        while waiting or busy:
            while waiting and len(busy) < c.jobs:
                run, seed = waiting.pop(0)
                log = Path(c.out) / f"{run}-{seed}.txt"
                first, *left = commands(run, seed, c)
                busy.append((spawn(first, log, threads), left, log))
            time.sleep(0.5)
            for job in [job for job in busy if job[0].poll() is not None]:
                process, left, log = job
                busy.remove(job)
                if process.returncode != 0:
                    raise SystemExit(f"{log}: says why this failed: {shlex.join(process.args)}")
                if left:
                    busy.append((spawn(left[0], log, threads), left[1:], log))
    finally:
        for process, _, _ in busy:
            process.terminate()


def spawn(command, log, environment):
    print(shlex.join(["python", *command[1:]]), flush=True)
    with open(log, "a") as f:
        return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment)


def read_run(folder):
    """What a finished run came to: its results.json, parameters, and the items' answers {setting: float64 [items]}."""
    results = json.loads((folder / "results.json").read_text())
    path = evaluate.newest_checkpoint(folder) / "evaluation.json"
    made = json.loads(path.read_text())
    right = {s: np.load(report.item_path(path, "topic_cloze", f"{s}.right")) for s in report.SETTINGS}
    mmlu = [made.get(when, {}).get("acc_norm") for when in ("mmlu", "before")]
    other = dict(zip(OTHER, (made.get("blimp"), made.get("sblimp", {}).get("dev"), *mmlu)))
    return SimpleNamespace(flops=results["flops"], parameters=made["parameters"], right=right, nll=results["nll"],
                           other={name: cell["accuracy"] for name, cell in other.items() if cell})


def collect(c):
    """A row for each run that has finished with some seed, over the seeds it has finished with."""
    rows, first = [], {}
    for run in c.runs:
        there = {seed: read_run(Path(c.out) / f"{run}-{seed}") for seed in c.seeds if not commands(run, seed, c)}
        if not there:
            continue
        one = next(iter(there.values()))
        row = dict(run=run, what=STUDIES[c.study]["runs"][run][0], seeds=list(there), parameters=one.parameters,
                   flops=one.flops, settings={})
        row["other"] = {name: summary([r.other[name] for r in there.values() if name in r.other]) for name in one.other}
        first = first or there
        for s in report.SETTINGS:
            row["settings"][s] = cell = summary([100 * r.right[s].mean() for r in there.values()])
            cell["stderr"] = float(np.mean([100 * r.right[s].std() / len(r.right[s]) ** 0.5 for r in there.values()]))
            both = [seed for seed in there if seed in first]
            if first is not there and both:  # over the seeds that both have: the answers' mean item by item
                ours, theirs = (np.mean([x[seed].right[s] for seed in both], 0) for x in (first, there))
                differences = [100 * (first[seed].right[s].mean() - there[seed].right[s].mean()) for seed in both]
                cell["lead"] = summary(differences) | dict(seeds=len(both), p=report.compare(ours, theirs)["p"])
        for kind, name in (("speech", "speech"), ("interleaved", "text"), ("interleaved", "speech")):
            row[f"nll {kind} {name}"] = float(np.mean([r.nll[kind][name] for r in there.values()]))
        rows.append(row)
    return rows


def summary(scores):
    """Mean and standard deviation over seeds; None for one seed."""
    return dict(mean=float(np.mean(scores)), scores=scores,
                std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None)


def spread(cell):
    """mean ± standard deviation, in percent."""
    return f"{cell['mean']:.1f}" + (f" ± {cell['std']:.1f}" if cell["std"] is not None else "")


def as_markdown(rows):
    """Two tables: scores, and by how much the first run leads."""
    def table(head, lines):
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
    scores = [[r["what"], str(len(r["seeds"])), f"{r['parameters'] / 1e6:.2f}M", f"{r['flops']:.1e}",
               *(spread(r["settings"][s]) for s in report.SETTINGS), f"{r['nll speech speech']:.3f}"] for r in rows]
    leads = [[r["what"], *(f"{spread(lead)} (p {lead['p']:.1g})" if (lead := r["settings"][s].get("lead")) else "–"
                           for s in report.SETTINGS)] for r in rows[1:]]
    errors = [f"{min(e):.1f} to {max(e):.1f}" if (e := [r["settings"][s]["stderr"] for r in rows]) else ""
              for s in report.SETTINGS]
    other = [[r["what"], *(spread(r["other"][name]) if name in r["other"] else "–" for name in OTHER)] for r in rows]
    return "\n\n".join([
        table(["Topic-Cloze, % right", "seeds", "parameters", "FLOPs", *report.SETTINGS, "speech NLL"], scores),
        "± is the standard deviation over seeds. The standard error over items, of a seed: "
        + ", ".join(f"{s} {e}" for s, e in zip(report.SETTINGS, errors)) + ".",
        *([table(["% right", *OTHER], other)] if any(r["other"] for r in rows) else []),
        f"By how much {rows[0]['what']} leads, points:",
        table(["over", *report.SETTINGS], leads)]) + "\n"


def draw(rows, path):
    """One point for each seed, a bar at the mean, for each run and setting."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.6 + 0.38 * len(rows)), sharey=True, layout="constrained")
    for axis, s in zip(axes, report.SETTINGS[1:]):
        for y, row in enumerate(rows):
            cell = row["settings"][s]
            axis.barh(y, cell["mean"] - 50, left=50, color=COLOURS[s], alpha=0.35 if y else 0.7)
            axis.plot(cell["scores"], [y] * len(cell["scores"]), "o", color="black", markersize=3.5)
        axis.axvline(50, color="0.4", linewidth=1)
        axis.set(title=f"{s}", xlabel="% right (chance: 50)", xlim=(45, 100))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle("Topic-Cloze: mean over seeds (bars), each seed (points)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(rows, c):
    """study.json, .csv, .md and .png."""
    stem = Path(c.out) / "study"
    stem.with_suffix(".json").write_text(json.dumps(dict(study=c.study, seeds=c.seeds, rows=rows), indent=1))
    with open(stem.with_suffix(".csv"), "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["run", "setting", "seed", "accuracy", "parameters", "flops"])
        writer.writerows([r["run"], s, seed, score, r["parameters"], r["flops"]] for r in rows
                         for s in report.SETTINGS for seed, score in zip(r["seeds"], r["settings"][s]["scores"]))
    stem.with_suffix(".md").write_text(as_markdown(rows))
    draw(rows, stem.with_suffix(".png"))
    print(as_markdown(rows))
    print(f"written to {stem}.md, .csv, .json, .png")


def make_pictures(c):
    """analyze.py's figures, csv and json of the runs with the first seed; those of runs that are not there are left."""
    there = {run: f"{c.out}/{run}-{c.seeds[0]}" for run in STUDIES[c.study]["runs"]
             if not commands(run, c.seeds[0], c)}
    for command in STUDIES[c.study]["pictures"]:
        try:
            arguments = shlex.split(command.format(**there))
        except KeyError as run:
            print(f"left out, for run {run} is not there: analyze.py {command}")
            continue
        print(shlex.join(["python", "analyze.py", *arguments]), flush=True)
        subprocess.run([sys.executable, "analyze.py", *arguments, f"--out={c.out}/pictures"], check=True)


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
        run_all(c)
    rows = collect(c)
    if not rows:
        raise SystemExit(f"{c.out}: no finished run of {', '.join(c.runs)}; leave --make=false out")
    write(rows, c)
    if c.pictures:
        make_pictures(c)


if __name__ == "__main__":
    main(sys.argv[1:])
