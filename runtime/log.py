"""
The log of a training run: log.jsonl, lines and a progress bar on the terminal, and optionally wandb and TensorBoard.
"""
import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.distributed import all_sum
from runtime.files import replace_file

# Peak rates in dense bf16 from the data sheets, FLOP/s. The first key that the device's name contains counts.
PEAK_BF16 = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
             "A100": 312e12, "L40S": 362e12, "4090": 165e12}


class Log:
    """Adds up the losses of a run and logs their means. Only the first process writes."""

    def __init__(self, c, world, progress):
        self.c, self.world, self.writes, self.sinks = c, world, world.rank == 0, []
        self.start()
        if not self.writes:
            return
        self.path, self.total = Path(c.out_dir) / "log.jsonl", sum(stage["steps"] for stage in c.stages.values())
        # Lines after the checkpoint are dropped, because their steps will be run again.
        self.lines = [line for line in read_log(c.out_dir) if line["step"] <= progress["total"]]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.bar = tqdm(total=self.total, initial=progress["total"], disable=None, unit="step")
        if c.wandb_project:
            wandb = importlib.import_module("wandb")
            wandb.init(project=c.wandb_project, name=Path(c.out_dir).name, config=vars(c))
            self.sinks.append(lambda line: wandb.log(flat(line), step=line["step"]))
        if c.tensorboard:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(c.out_dir)
            self.sinks.append(lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in flat(line).items()])

    def start(self):
        """Set all sums to 0 for the next line."""
        self.sums = torch.zeros(6, dtype=torch.double)  # text NLL, speech NLL, entropy; the counts for their means
        self.norm, self.flops, self.steps, self.began = 0.0, 0, 0, time.perf_counter()

    def leave_out(self, seconds):
        """Do not count these seconds as training time."""
        self.began += seconds

    def add(self, losses, counts, norm, flops):
        """Add a step. losses: sums of this process [text NLL, speech NLL, entropy]. counts: numbers of text targets,
        speech targets and positions in all processes.
        """
        self.sums += torch.tensor([*losses, *counts], dtype=torch.double)
        self.norm, self.flops, self.steps = max(self.norm, norm), self.flops + flops, self.steps + 1

    def step(self, progress, stage_name, rates):
        """Write a line: means over the steps since the last line, and the largest gradient norm of these steps.

        rates: the present learning rates (of the backbone, of the new modules)
        """
        text_nll, speech_nll, entropy = all_sum(self.sums[:3], self.world).tolist()
        n_text, n_speech, n = self.sums[3:].tolist()
        seconds = time.perf_counter() - self.began
        progress["seconds"] += seconds
        line = dict(
            step=progress["total"], stage=stage_name, stage_step=progress["step"], tokens=progress["tokens"],
            flops=progress["flops"], seconds=round(progress["seconds"], 3), grad_norm=self.norm,
            text_nll=text_nll / n_text if n_text else None, speech_nll=speech_nll / n_speech if n_speech else None,
            entropy=entropy / n if entropy else None, learning_rate=rates[0], speech_learning_rate=rates[1],
            tokens_per_second=self.steps * self.c.batch_tokens / seconds,
            mfu=utilisation(self.flops / seconds / self.world.size, self.world.device))
        self.start()
        if self.writes:
            if found := spikes(line, self.lines):
                line["spike"] = found
            self.bar.update(line["step"] - self.bar.n)
            minutes_left = (self.total - line["step"]) * line["seconds"] / line["step"] / 60
            self.write(line, f"{describe_step(line)}  {minutes_left:.1f} min left")

    def held_out(self, line):
        """Write a line of held-out scores."""
        text = "   held out"
        for kind, nll in line.get("nll", {}).items():
            text += f"  {kind}: " + " ".join(f"{modality} {value:.3f}" for modality, value in nll.items())
        if "topic_cloze" in line:
            text += "  cloze: " + " ".join(f"{k} {v['accuracy']:.0f}" for k, v in line["topic_cloze"].items())
        self.write(line, text)

    def changed(self, line):
        """Write what has changed since the run began, if anything."""
        if line["changed"]:
            changes = (f"{key}: {was!r} -> {now!r}" for key, (was, now) in line["changed"].items())
            self.write(line, f"   changed  {'  '.join(changes)}")

    def write(self, line, text):
        """Write a line to log.jsonl, wandb and TensorBoard, and its text to the terminal. No error ends the run."""
        if not self.writes:
            return
        self.lines.append(line)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            tqdm.write(f"{self.path}: {error}. Training goes on without this line", file=sys.stderr)
        for sink in self.sinks:
            try:
                sink(line)
            except Exception as error:  # for example in the network; log.jsonl has the line
                tqdm.write(f"wandb or TensorBoard did not take a line ({error}). Training goes on", file=sys.stderr)
        tqdm.write(text)


def describe_step(line):
    """A logged step as text for the terminal."""
    losses = [f"{k} {line[k + '_nll']:.3f}" for k in ("text", "speech") if line[k + "_nll"] is not None]
    rates = [f"{k} {line[k]:.1e}" for k in ("learning_rate", "speech_learning_rate") if line[k]]
    parts = [*losses, *rates, f"{line['tokens_per_second']:,.0f} tokens/s"]
    parts += [f"mfu {100 * line['mfu']:.1f}%"] if line["mfu"] else []
    parts += [f"SPIKE {k} {line[k]:.3g}" for k in line.get("spike", {})]
    return f"{line['stage']} {line['stage_step']:5d}  " + "  ".join(parts)


def utilisation(flops_per_second, device):
    """Model FLOPs utilisation (mfu): the share of the device's peak bf16 rate. None for an unknown device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAK_BF16.items() if key in name), None)
    return flops_per_second / peak if peak else None


def spikes(line, before, window=50, least=20, limit=5.0):
    """{name: robust standard deviations above the median} of losses and norms far above the last lines of the stage."""
    found, before = {}, [x for x in before if x.get("stage") == line["stage"] and "tokens" in x][-window:]
    for key in ("text_nll", "speech_nll", "grad_norm"):
        past = [x[key] for x in before if x[key] is not None]
        if line[key] is not None and len(past) >= least:
            middle = statistics.median(past)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in past)  # sigma if normally distributed
            found[key] = round((line[key] - middle) / max(deviation, 0.01 * middle), 1)
    return {key: value for key, value in found.items() if value > limit}


def flat(line, prefix=""):
    """The numbers in nested dicts as one dict with names like nll/text/speech."""
    found = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


def read_log(out_dir):
    """The lines of a run's log.jsonl, without an incomplete last line, which a crash may leave. SystemExit."""
    path = Path(out_dir) / "log.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise SystemExit(f"{path}: a line in it is not json ({error}); mend or remove it") from None
