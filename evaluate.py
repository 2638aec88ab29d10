"""
Scores of a checkpoint: held-out negative log-likelihood by kind of sequence, and Topic-Cloze in four settings.

    python evaluate.py --checkpoint=out/train_tiny

Protocol. A document starts with the EOS of its modality, as in training, and the EOS at its end is not scored. A cloze
item is an opening, its true ending and the ending of another story; the score of an ending is its *mean* log-likelihood
per token given the opening, and an item counts 1 if the true ending scores higher, 1/2 for a tie. Opening and ending
are written (T) or spoken (S); one switch token stands between them where the modality changes.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
from configurator import configure
from model import from_pretrained

checkpoint = "out/train_tiny"    # folder of a run (its newest checkpoint is taken) or of a model
cloze = "data/demo/cloze"        # Topic-Cloze set; "" to skip
val_text = ["data/demo/val"]     # data sets for the held-out NLL; [] to skip
val_speech = ["data/demo/val"]
val_interleaved = ["data/demo/val"]
val_sequences = 256              # sequences of each kind
text_span = [10, 30]             # words of a text span in interleaved sequences, least and most
speech_span = [5, 15]
seed = 1                         # of the choice of these sequences
sequence_length = 256
batch_tokens = 16384             # positions scored at a time
device = "auto"                  # "cuda", "cpu", "mps", or the best there is
out = ""                         # json file for the results; default: evaluation.json beside the checkpoint

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (int, str, list)) and not k.startswith("_")}
VALIDATION = 1 << 32  # the stage number under which held-out sequences are drawn
SETTINGS = {"T": ("text", "text"), "S": ("speech", "speech"), "T->S": ("text", "speech"), "S->T": ("speech", "text")}


def log_likelihood(model, sequences, spans, batch_tokens=16384, progress=False):
    """Log-likelihood of one span of each sequence given all before it.

    sequences   lists of ids in the model's id space
    spans       (a, b) per sequence, 1 <= a < b: tokens a..b-1 are scored, switch tokens aside
    Returns (summed log-likelihoods in nats, numbers of scored tokens), float64 and int64 [n]. Padding has no effect: it
    stands to the right of all that is scored.
    """
    device = next(model.parameters()).device
    order = np.argsort([-b for _, b in spans], kind="stable")
    total, count = np.zeros(len(spans)), np.zeros(len(spans), np.int64)
    bar = tqdm(total=len(spans), desc="scoring", leave=False, disable=None if progress else True)
    at = 0
    while at < len(order):
        rows = max(1, batch_tokens // spans[order[at]][1])
        chosen, at = order[at:at + rows], at + rows
        tokens = np.zeros((len(chosen), spans[chosen[0]][1]), np.int64)
        targets = np.full_like(tokens, -1)
        for row, i in enumerate(chosen):
            a, b = spans[i]
            tokens[row, :b] = sequences[i][:b]
            targets[row, a:b] = tokens[row, a:b]
        with torch.inference_mode():
            logp = model(torch.from_numpy(tokens[:, :-1]).to(device), torch.from_numpy(targets[:, 1:]).to(device),
                         want=("logp",)).logp
        total[chosen] = logp.double().sum(1).cpu().numpy()
        count[chosen] = ((targets >= 0) & (targets != model.config.switch)).sum(1)
        bar.update(len(chosen))
    return total, count


def cloze_sequence(context, continuation, modalities, config):
    """(ids, span of the continuation): EOS, context, a switch token if the modality changes, continuation."""
    eos = config.eos_token_id if modalities[0] == "text" else config.speech_eos
    ids = [eos, *context] + [config.switch] * (modalities[0] != modalities[1])
    return [*ids, *continuation], (len(ids), len(ids) + len(continuation))


def topic_cloze(model, cloze_set, batch_tokens=16384, items=None):
    """{setting: float64 [items], 1 where the true ending scores higher, 0 where the other one does, 1/2 for a tie}.

    cloze_set   a paired set whose documents come in threes: opening, true ending, another story's ending
    items       which ones (indices), None: all
    """
    config, n = model.config, cloze_set.meta["documents"]
    if n % 3:
        raise data.DataError(f"{cloze_set.folder}: {n} documents; a cloze set has them in threes")
    documents = {}
    for i in (3 * item + j for item in (range(n // 3) if items is None else items) for j in range(3)):
        text, speech, _, _ = cloze_set.document(i)
        documents[i] = {"text": text[:-1], "speech": speech[:-1] + config.vocab_size}  # EOS stripped
    right = {}
    for name, (before, after) in SETTINGS.items():
        pairs = [cloze_sequence(documents[i - i % 3][before], documents[i][after], (before, after), config)
                 for i in documents if i % 3]
        total, count = log_likelihood(model, [s for s, _ in pairs], [span for _, span in pairs], batch_tokens)
        score = (total / count).reshape(-1, 2)
        right[name] = (np.sign(score[:, 0] - score[:, 1]) + 1) / 2
    return right


def cloze_table(sums):
    """{setting: {accuracy and its standard error in percent, items}} from {setting: (sum, sum of squares, number)}."""
    def row(s, squares, n):
        return dict(accuracy=100 * s / n, stderr=100 * max(0.0, (squares / n - (s / n) ** 2) / n) ** 0.5, items=int(n))
    return {name: row(*values) for name, values in sums.items()}


def cloze_sums(right):
    """{setting: (sum, sum of squares, number)} of topic_cloze's answers, which add up over processes."""
    return {name: (r.sum(), (r ** 2).sum(), len(r)) for name, r in right.items()}


def heldout_nll(model, sources, seed, n_sequences, length, spans=((10, 30), (5, 15)), batch_tokens=16384, rank=0,
                world_size=1):
    """{kind: summed (text nll, speech nll, text targets, speech targets)} over n_sequences held-out sequences each.

    spans: least and most words of a text and of a speech span in interleaved sequences. Sequences are shared among
    ranks, so the sums of all ranks, float64 [4] each, add up to the same total.
    """
    device, sums = next(model.parameters()).device, {}
    for kind, source in sources.items():
        sums[kind] = np.zeros(4)
        mine = np.arange(rank, n_sequences, world_size)
        for part in np.array_split(mine, max(1, -(-len(mine) * length // batch_tokens))):
            if len(part) == 0:
                continue
            rows, text_rows = data.sample({kind: source}, {kind: 1}, seed, VALIDATION, part, length + 1, model.config,
                                          *spans)
            tokens = torch.from_numpy(rows).to(device)
            with torch.inference_mode():
                out = model(tokens[:, :-1], tokens[:, 1:], text_rows)
            sums[kind] += [float(out.text_nll), float(out.speech_nll), out.n_text, out.n_speech]
    return sums


def nll_table(sums):
    """{kind: {text: nats per token, speech: nats per unit}} from heldout_nll's sums."""
    return {kind: {name: float(s[i] / s[i + 2]) for i, name in enumerate(("text", "speech")) if s[i + 2]}
            for kind, s in sums.items()}


def as_text(results):
    """The results as a small table for the terminal."""
    lines = []
    if results.get("nll"):
        lines += ["held-out NLL         text, nats/token   speech, nats/unit"]
        for kind, nll in results["nll"].items():
            cells = (f"{nll[m]:20.3f}" if m in nll else " " * 20 for m in ("text", "speech"))
            lines.append(f"  {kind:12}" + "".join(cells))
    if results.get("topic_cloze"):
        cells = results["topic_cloze"]
        lines += [f"Topic-Cloze, % of {next(iter(cells.values()))['items']} items" + "".join(f"{s:>14}" for s in cells)]
        lines += [" " * (len(lines[-1]) - 14 * len(cells)) +
                  "".join(f"{c['accuracy']:7.1f} ± {c['stderr']:<4.1f}" for c in cells.values())]
    return "\n".join(lines)


def newest_checkpoint(folder):
    """The newest complete checkpoint of a run, or the folder itself if it holds a model."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return folder
    found = sorted(folder.glob("checkpoint-*[0-9]"))
    if not found:
        raise SystemExit(f"{folder}: no checkpoint here; give --checkpoint=FOLDER of a run or of a model")
    return found[-1]


def pick_device(name):
    if name not in ("auto", "cuda", "cpu", "mps"):
        raise SystemExit(f"device={name}: choose auto, cuda, cpu or mps")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def made_with(folder):
    """(hash of the tokenizer, hash of the units) that a checkpoint was trained with; None where it does not say."""
    tokenizer, units = folder / "tokenizer.json", folder / "units.json"
    return (data.Tokenizer(tokenizer).hash if tokenizer.exists() else None,
            json.loads(units.read_text())["hash"] if units.exists() else None)


def main(argv):
    settings, _ = configure(DEFAULTS, argv)
    c, folder = SimpleNamespace(**settings), newest_checkpoint(settings["checkpoint"])
    path, vocabulary = Path(c.out or folder / "evaluation.json"), made_with(folder)
    sources = {kind: data.open_source(kind, settings[f"val_{kind}"], *vocabulary, c.sequence_length + 1)
               for kind in ("text", "speech", "interleaved") if settings[f"val_{kind}"]}
    cloze_set = data.open_set(c.cloze, *vocabulary) if c.cloze else None
    if not path.parent.is_dir():
        raise SystemExit(f"{path.parent}: no such folder; set --out to a file in one that is there")
    try:
        model = from_pretrained(folder).to(pick_device(c.device)).eval()
    except ValueError as e:  # says which file and what
        raise SystemExit(str(e)) from None

    results = dict(checkpoint=str(folder), settings=settings)
    results["nll"] = nll_table(heldout_nll(model, sources, c.seed, c.val_sequences, c.sequence_length,
                                           (c.text_span, c.speech_span), c.batch_tokens))
    if cloze_set:
        results["topic_cloze"] = cloze_table(cloze_sums(topic_cloze(model, cloze_set, c.batch_tokens)))
    print(as_text(results))
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
