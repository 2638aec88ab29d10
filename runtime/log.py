"""
What a run tells: log.jsonl, lines and a bar on the terminal, wandb and TensorBoard if asked for.
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

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense, FLOP/s


class Log:
    """Adds up the losses of a run and writes them down. Only the first process writes."""

    def __init__(self, c, world, place):
        self.c, self.world, self.writes, self.sinks = c, world, world.rank == 0, []
        self.start()
        if not self.writes:
            return
        self.path, self.total = Path(c.out_dir) / "log.jsonl", sum(stage["steps"] for stage in c.stages.values())
        self.lines = [line for line in read_log(c.out_dir) if line["step"] <= place["total"]]  # later ones come again
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.bar = tqdm(total=self.total, initial=place["total"], disable=None, unit="step")
        if c.wandb_project:
            wandb = importlib.import_module("wandb")
            wandb.init(project=c.wandb_project, name=Path(c.out_dir).name, config=vars(c))
            self.sinks.append(lambda line: wandb.log(flat(line), step=line["step"]))
        if c.tensorboard:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(c.out_dir)
            self.sinks.append(lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in flat(line).items()])

    def start(self):
        """Begin to add up anew."""
        self.sums = torch.zeros(5, dtype=torch.double)  # text nll, speech nll, entropy; of all processes: targets
        self.norm, self.flops, self.steps, self.began = 0.0, 0, 0, time.perf_counter()

    def leave_out(self, seconds):
        """Do not count so many seconds, spent on something else, as time of training."""
        self.began += seconds

    def add(self, losses, counts, norm, flops):
        """Add one step. losses: this process's sums [text nll, speech nll, entropy]; counts: all text, speech targets.
        """
        self.sums += torch.tensor([*losses, *counts], dtype=torch.double)
        self.norm, self.flops, self.steps = max(self.norm, norm), self.flops + flops, self.steps + 1

    def step(self, place, stage_name, rates):
        """Write a line: means over the steps since the last one, and the largest gradient norm among them.

        rates: (learning rate of the backbone, of what is added), now
        """
        text_nll, speech_nll, entropy = all_sum(self.sums[:3], self.world).tolist()
        n_text, n_speech = self.sums[3:].tolist()
        seconds = time.perf_counter() - self.began
        place["seconds"] += seconds
        line = dict(
            step=place["total"], stage=stage_name, stage_step=place["step"], tokens=place["tokens"],
            flops=place["flops"], seconds=round(place["seconds"], 3), grad_norm=self.norm,
            text_nll=text_nll / n_text if n_text else None, speech_nll=speech_nll / n_speech if n_speech else None,
            entropy=entropy / n_speech if n_speech else None, learning_rate=rates[0], speech_learning_rate=rates[1],
            tokens_per_second=self.steps * self.c.batch_tokens / seconds,
            mfu=utilisation(self.flops / seconds / self.world.size, self.world.device))
        self.start()
        if not self.writes:
            return
        if found := spikes(line, self.lines):
            line["spike"] = found
        self.bar.update(line["step"] - self.bar.n)
        minutes_left = (self.total - line["step"]) * line["seconds"] / line["step"] / 60
        losses = "  ".join(f"{k} {line[k + '_nll']:.3f}" for k in ("text", "speech") if line[k + "_nll"] is not None)
        shown_rates = "  ".join(f"{k} {line[k]:.1e}" for k in ("learning_rate", "speech_learning_rate") if line[k])
        mfu = f"  mfu {100 * line['mfu']:.1f}%" if line["mfu"] else ""
        spike = "".join(f"  SPIKE {k} {line[k]:.3g}" for k in found)
        self.write(line, f"{stage_name} {line['stage_step']:5d}  {losses}  {shown_rates}  "
                         f"{line['tokens_per_second']:,.0f} tokens/s{mfu}  {minutes_left:.1f} min left{spike}")

    def held_out(self, line):
        if not self.writes:
            return
        text = "   held out"
        for kind, nll in line.get("nll", {}).items():
            text += f"  {kind}: " + " ".join(f"{modality} {value:.3f}" for modality, value in nll.items())
        if "topic_cloze" in line:
            text += "  cloze: " + " ".join(f"{k} {v['accuracy']:.0f}" for k, v in line["topic_cloze"].items())
        self.write(line, text)

    def changed(self, line):
        if self.writes and line["changed"]:
            changes = (f"{key}: {was!r} -> {now!r}" for key, (was, now) in line["changed"].items())
            self.write(line, f"   changed  {'  '.join(changes)}")

    def write(self, line, text):
        self.lines.append(line)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            tqdm.write(f"{self.path}: {error}. Training goes on without this line", file=sys.stderr)
        for sink in self.sinks:
            try:
                sink(line)
            except Exception as error:  # of the network, say; log.jsonl has all
                tqdm.write(f"a line of the log was not sent on ({error}). Training goes on", file=sys.stderr)
        tqdm.write(text)


def utilisation(flops_per_second, device):
    """Share of the peak bf16 rate of a known GPU, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAK_BF16.items() if key in name), None)
    return flops_per_second / peak if peak else None


def spikes(line, before, window=50, least=20, limit=5.0):
    """{loss or gradient norm: robust deviations above the median of its stage's last `window` lines}, those > limit."""
    found, before = {}, [x for x in before if x.get("stage") == line["stage"] and "tokens" in x][-window:]
    for key in ("text_nll", "speech_nll", "grad_norm"):
        past = [x[key] for x in before if x[key] is not None]
        if line[key] is not None and len(past) >= least:
            middle = statistics.median(past)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in past)  # equals that of normal numbers
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
    """The lines of a run's log.jsonl. A last line without its end, torn by a crash, is left out. SystemExit."""
    path = Path(out_dir) / "log.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise SystemExit(f"{path}: a line in it is not json ({error}); mend or remove it") from None
