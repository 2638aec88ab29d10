"""
What a run tells: log.jsonl, lines and a bar on the terminal, wandb and TensorBoard if asked for, and loss.png.
"""
import importlib
import json
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

import checkpoint
import report


class Log:
    """log.jsonl, lines and a bar on the terminal, wandb or TensorBoard if asked. Silent on all ranks but the first."""

    def __init__(self, c, world, place):
        self.on, self.bar, self.out = world.rank == 0, None, []
        if not self.on:
            return
        self.path, steps = Path(c.out_dir) / "log.jsonl", sum(s["steps"] for s in c.stages.values())
        self.lines = [line for line in read_log(c.out_dir) if line["step"] <= place["total"]]  # later ones come again
        checkpoint.replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.bar = tqdm(total=steps, initial=place["total"], disable=None, unit="step")
        self.steps = steps
        if c.wandb_project:
            wandb = importlib.import_module("wandb")
            wandb.init(project=c.wandb_project, name=Path(c.out_dir).name, config=vars(c))
            self.out.append(lambda line: wandb.log(flat(line), step=line["step"]))
        if c.tensorboard:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(c.out_dir)
            self.out.append(lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in flat(line).items()])

    def write(self, line, text):
        self.lines.append(line)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            tqdm.write(f"{self.path}: {error}. Training goes on without this line", file=sys.stderr)
        for out in self.out:
            try:
                out(line)
            except Exception as error:  # of the network, say; log.jsonl has all
                tqdm.write(f"a line of the log was not sent on ({error}). Training goes on", file=sys.stderr)
        tqdm.write(text)

    def changed(self, line):
        if self.on and line["changed"]:
            changes = (f"{key}: {was!r} -> {now!r}" for key, (was, now) in line["changed"].items())
            self.write(line, f"   changed  {'  '.join(changes)}")

    def step(self, line):
        if not self.on:
            return
        self.bar.update(line["step"] - self.bar.n)
        if found := spikes(line, self.lines):
            line["spike"] = found
        left = (self.steps - line["step"]) * line["seconds"] / line["step"]
        losses = "  ".join(f"{k} {line[k + '_nll']:.3f}" for k in ("text", "speech") if line[k + "_nll"] is not None)
        rates = "  ".join(f"{k} {line[k]:.1e}" for k in ("learning_rate", "speech_learning_rate") if line[k])
        mfu = f"  mfu {100 * line['mfu']:.1f}%" if line["mfu"] else ""
        spike = "".join(f"  SPIKE {k} {line[k]:.3g}" for k in line.get("spike", {}))
        self.write(line, f"{line['stage']} {line['stage_step']:5d}  {losses}  {rates}  "
                         f"{line['tokens_per_second']:,.0f} tokens/s{mfu}  {left / 60:.1f} min left{spike}")

    def held_out(self, line):
        if self.on:
            text = "   held out"
            for kind, nll in line.get("nll", {}).items():
                text += f"  {kind}: " + " ".join(f"{m} {v:.3f}" for m, v in nll.items())
            if "topic_cloze" in line:
                text += "  cloze: " + " ".join(f"{k} {v['accuracy']:.0f}" for k, v in line["topic_cloze"].items())
            self.write(line, text)


def spikes(line, before, window=50, least=20, limit=5.0):
    """{loss or gradient norm: robust deviations above the median of its stage's last `window` lines}, those > limit."""
    found, before = {}, [x for x in before if x.get("stage") == line["stage"] and "tokens" in x][-window:]
    for key in ("text_nll", "speech_nll", "grad_norm"):
        past = [x[key] for x in before if x[key] is not None]
        if line[key] is not None and len(past) >= least:
            middle = statistics.median(past)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in past)  # of normal numbers: the standard one
            found[key] = round((line[key] - middle) / max(deviation, 0.01 * middle), 1)
    return {key: value for key, value in found.items() if value > limit}


def flat(line, prefix=""):
    """Nested numbers as one dict with names like held_out/text/speech."""
    found = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


def read_log(out_dir):
    path = Path(out_dir) / "log.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    try:
        return [json.loads(line) for line in lines[:-1]]  # what follows the last line end is empty, or torn by a crash
    except ValueError as error:
        raise SystemExit(f"{path}: a line in it is no json ({error}); mend or remove it") from None


def plot_loss(out_dir):
    """loss.png from log.jsonl: training loss by kind of target, held-out NLL by kind of sequence, Topic-Cloze."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    lines = read_log(out_dir)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), sharex=True, layout="constrained")
    colours = {"text": "#0072B2", "speech": "#D55E00"}  # Okabe and Ito's, told apart by colour-blind readers

    def curve(axis, value, *style, **options):
        points = [(x["step"], value(x)) for x in lines if value(x) is not None]
        if points:
            axis.plot(*zip(*points), *style, **options)

    for name, colour in colours.items():
        curve(axes[0], lambda x, k=f"{name}_nll": x.get(k), color=colour, label=f"{name} targets")
        curve(axes[1], lambda x, k=name: x.get("nll", {}).get(k, {}).get(k), "o-", color=colour, markersize=4,
              label=f"{name} sequences")
        curve(axes[1], lambda x, k=name: x.get("nll", {}).get("interleaved", {}).get(k), "s--", color=colour,
              markersize=4, label=f"{name} in interleaved sequences")
    for name, colour in report.COLOURS.items():
        curve(axes[2], lambda x, k=name: x.get("topic_cloze", {}).get(k, {}).get("accuracy"),
              "s--" if "->" in name else "o-", color=colour, markersize=4, label=name)
    stages = [(b["step"], b["stage"]) for a, b in zip([{}, *lines], lines) if a.get("stage") != b["stage"]]
    for axis, title, unit in zip(axes, ("training loss", "held-out loss", "Topic-Cloze along the way"),
                                 ("nats per target", "nats per target", "% right (chance: 50)")):
        for step, stage in stages:
            axis.axvline(step, color="0.8", linewidth=1, zorder=0)
            axis.text(step, 1.01, stage, color="0.4", fontsize=8, va="bottom", transform=axis.get_xaxis_transform())
        axis.set_title(title, pad=16)
        axis.set(xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(Path(out_dir) / "loss.png", dpi=110)
    plt.close(figure)
