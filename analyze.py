"""
The paper's pictures and numbers from checkpoints and data: each command leaves a png, a csv and a json in --out.

    python analyze.py segmentation --checkpoint=out/train_tiny        Table 3: words found in the selector's weights
    python analyze.py weights      --checkpoint=out/train_tiny        Figures 5, 7, 8, 9: omega and phi
    python analyze.py dimension    --checkpoint=out/train_tiny,out/baseline_tiny     Figure 3: intrinsic dimension
    python analyze.py overlap      --checkpoint=out/train_tiny,out/baseline_tiny     Figure 4: shared subspaces
    python analyze.py scaling      --checkpoint=out/train_tiny,out/baseline_tiny     Figures 2, 6: any logged metric

--checkpoint names runs (their newest checkpoint is taken) or model folders; the first always has the first colour, and
so on, in all pictures. `python analyze.py --help` lists all settings.

Conventions. Layer 0 is the input to the backbone, layer L the last one after the final norm. The model reads the speech
EOS and then units; omega stands, as in Eq. 3, at the unit that was read last, and a peak there says that a word begins
with this unit (--omega_at=predicted: with the next one). Start and end of an utterance are no boundaries.
"""
import csv
import importlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.signal import find_peaks
from tqdm import tqdm

import data as datasets
from configurator import configure, nearest
from evaluate import made_with, newest_checkpoint, pick_device
from log import flat, read_log
from model import from_pretrained

checkpoint = "out/train_tiny"   # folders of runs or of models, separated by commas
data = "data/demo/test"         # paired set; for segmentation and weights also recordings, see corpus
val = "data/demo/val"           # the same, on which segmentation is tuned
text = ""                       # dimension: take text from this set, paired or text, and not from data
corpus = ""                     # timit, manifest ...: data and val are folders for corpora/NAME.py, with true times
units = ""                      # folder of the speech units: for corpus, and for how long units last on average
out = ""                        # folder for the results; default: analysis, in the folder of the first run
device = "auto"                 # "cuda", "cpu", "mps", or the best there is
batch_tokens = 8192             # positions in one forward pass
seed = 1
utterances = 2000               # segmentation, weights: read so many at most
tolerance = 1                   # segmentation: units that a boundary may be away from a true one
tolerance_ms = 40.0             # and milliseconds
omega_at = "read"               # "read": omega stands at the unit that was read last; "predicted": at the next one
utterance = 0                   # weights: which one of data is drawn
drawn_units = 120               # and how many units of it
words = 20                      # dimension, overlap: words of a subsequence, represented by its last token
points = 10_000                 # subsequences in a batch, or fewer where there are not so many
batches = 5                     # disjoint ones
clip = 0.95                     # elements are clipped at this quantile of their absolute values, layer by layer
max_rank = 2**13                # dimension: farthest neighbour
scale = 0                       # neighbour rank n, a power of 2, that the dimension is read at; 0: the plateau
components = 50                 # overlap: principal components
bootstrap = 50                  # overlap: drawings for the band
metrics = "nll/speech/speech,topic_cloze/S/accuracy,topic_cloze/T->S/accuracy,topic_cloze/S->T/accuracy"  # scaling

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (bool, int, float, str)) and not k.startswith("_")}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
PROMINENCES = np.arange(1, 16) / 100  # (0, 0.15] in steps of 0.01, Appendix C.2


# ---------------------------------------------------------------------------------------------------------------------
# word segmentation: matching and scores

def r_value(precision, recall):
    """The R-value (Räsänen et al. 2009), 1 for perfect, of precision and recall in 0..1 (arrays will do).

    Over-segmentation is recall / precision - 1, and -1 where there is no hit.
    """
    precision, recall = np.asarray(precision, float), np.asarray(recall, float)
    over = np.divide(recall, precision, out=np.zeros_like(recall * precision), where=precision > 0) - 1
    r1 = np.sqrt((1 - recall) ** 2 + over ** 2)
    r2 = (-over + recall - 1) / np.sqrt(2)
    return 1 - (np.abs(r1) + np.abs(r2)) / 2


def match(predicted, true, tolerance, one_to_one=False):
    """Which of two ascending arrays of positions have a partner in the other: (bool [predicted], bool [true]).

    By default a position is a hit if any of the others lies within the tolerance, so one may serve several (Kreuk et
    al. 2020). one_to_one: the largest matching in which each has at most one partner; going from left to right and
    joining the first two that are close enough finds it, because all tolerances are alike.
    """
    predicted, true = np.asarray(predicted, float), np.asarray(true, float)
    reach = tolerance + 1e-6  # far below a unit or a millisecond, far above rounding
    if not one_to_one:
        def near(a, b):
            return np.searchsorted(b, a + reach, side="right") > np.searchsorted(b, a - reach)
        return near(predicted, true), near(true, predicted)
    hit_p, hit_t = np.zeros(len(predicted), bool), np.zeros(len(true), bool)
    p, t, i, j = predicted.tolist(), true.tolist(), 0, 0
    while i < len(p) and j < len(t):
        if abs(p[i] - t[j]) <= reach:
            hit_p[i] = hit_t[j] = True
            i, j = i + 1, j + 1
        elif p[i] < t[j]:
            i += 1
        else:
            j += 1
    return hit_p, hit_t


class Axis(NamedTuple):
    """Utterances laid end to end on one axis, with gaps that no tolerance bridges, in units or in seconds."""
    position: np.ndarray  # float64, of every unit
    true: np.ndarray      # float64, of the boundaries
    edges: np.ndarray     # float64 [utterances + 1], in the gaps


def lay_out(utterances, unit, gap=1000):
    """Axis of a list of Utterance; unit "units" or "ms" (whose axis is in seconds)."""
    starts = [np.arange(len(u.units) + 1.0) if unit == "units" else u.starts for u in utterances]
    begin = np.cumsum([0, *(s[-1] + gap for s in starts)])
    true = [u.boundaries() if unit == "units" else u.times() for u in utterances]
    return Axis(np.concatenate([s[:-1] + b for s, b in zip(starts, begin)]),
                np.concatenate([t + b for t, b in zip(true, begin)]), begin - gap / 2)


def count_hits(predicted, axis, tolerance, one_to_one=False):
    """Positions on the axis -> int64 [utterances, 4]: predicted ones that hit, all, true ones that hit, all of them."""
    hit_p, hit_t = match(predicted, axis.true, tolerance, one_to_one)
    return np.stack([np.histogram(x, axis.edges)[0] for x in
                     (predicted[hit_p], predicted, axis.true[hit_t], axis.true)], axis=1)


def scores(counts):
    """Precision, recall, F1 and R-value in percent from counts [..., 4] like those of count_hits."""
    hit_p, n_p, hit_t, n_t = np.moveaxis(np.asarray(counts, float), -1, 0)
    precision, recall = hit_p / np.maximum(1, n_p), hit_t / np.maximum(1, n_t)
    f1 = 2 * precision * recall / np.maximum(1e-12, precision + recall)
    return dict(precision=100 * precision, recall=100 * recall, f1=100 * f1, r_value=100 * r_value(precision, recall))


def segmenters(utterances, signals, rng):
    """{method: (settings to choose among, function: setting -> where on the axis of lay_out, as indices of units)}.

    signals: {method: a list of float [units]}: their peaks of a least prominence, set by the setting, are boundaries.
    Beside these stand methods that need no model: chance and, where the units' times are known, slow changes of units.
    """
    inside = np.concatenate([np.arange(len(u.units)) for u in utterances])
    first = np.flatnonzero(inside == 0)

    def at_peaks(signals, unit=1.0):
        found = [find_peaks(signal, prominence=0) for signal in signals]  # never at the ends of a signal
        where = np.concatenate([f + p for f, (p, _) in zip(first, found)])
        prominence = np.concatenate([about["prominences"] for _, about in found])
        return lambda least: where[prominence >= least * unit]

    methods = {name: (PROMINENCES, at_peaks(signal)) for name, signal in signals.items()}
    if utterances[0].starts is not None:  # 1 / rate of unit changes: how long the unit before lasted, in quarter frames
        lasted = [np.append(0, np.diff(u.starts)[:-1]) for u in utterances]
        methods["unit-change rate, where it falls"] = np.arange(1, 17), at_peaks(lasted, 0.01)
    draws = np.where(inside > 0, rng.random(len(inside)), 1)
    methods["random"] = np.arange(1, 21) / 40, lambda rate: np.flatnonzero(draws < rate)
    methods["every k units"] = np.arange(1, 21), lambda k: np.flatnonzero((inside % k == 0) & (inside > 0))
    methods["every unit change"] = np.ones(1), methods["every k units"][1]
    return methods


def tune_and_score(val, test, methods, tolerance, one_to_one, seed):
    """One row for each method: the setting with the best R-value on val, frozen, and its scores in percent on test.

    val, test: Axis; methods: {method: (settings, function on val, function on test)}. The standard error of the R-value
    is that over utterances drawn anew.
    """
    rows = []
    for name, (settings, on_val, on_test) in methods.items():
        curve = [float(scores(count_hits(val.position[on_val(s)], val, tolerance, one_to_one).sum(0))["r_value"])
                 for s in settings]
        best = settings[int(np.argmax(curve))]
        counts = count_hits(test.position[on_test(best)], test, tolerance, one_to_one)
        n = len(counts)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=200) @ counts
        rows.append(dict(method=name, setting=float(best), **{k: float(v) for k, v in scores(counts.sum(0)).items()},
                         r_value_stderr=float(scores(drawn)["r_value"].std()), predicted=int(counts[:, 1].sum()),
                         true=int(counts[:, 3].sum()), settings=settings, validation=curve))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# intrinsic dimension: GRIDE (Denti et al. 2022), as in dadapy

class Gride(NamedTuple):
    """One estimate for each pair of neighbour ranks (n, 2n)."""
    ids: np.ndarray      # intrinsic dimension; inf: above 1000
    errors: np.ndarray   # its standard error
    scales: np.ndarray   # mean distance of the two neighbours
    ranks: np.ndarray    # n
    points: int          # distinct points


@torch.inference_mode()
def neighbour_distances(x, ranks, device="cpu", at_once=1 << 24):
    """Distances of each point to its neighbours of given ranks (1: the nearest): [N, D] -> float64 [N, ranks].

    at_once: distances held in memory at a time. Matrix products in float32, and once more in float64 for points whose
    nearest neighbour is so close, against their distance from the centre, that rounding would show.
    """
    ranks = torch.as_tensor(ranks, device=device)

    def squares(x, norm, rows):  # |a - b|^2 = |b|^2 - 2ab + |a|^2, the last one added after sorting
        block = torch.addmm(norm[None], x[rows], x.T, alpha=-2)
        block[torch.arange(len(rows), device=device), rows] = -torch.inf  # a point is its own neighbour of rank 0
        if block.is_cuda:
            block = block.sort(dim=1).values
        else:
            block.numpy().sort(axis=1)  # in place, and many times faster than torch's on a CPU
        return (block[:, ranks] + norm[rows, None]).double()

    exact = torch.as_tensor(x, device=device).double()
    exact = exact - exact.mean(0)
    single, exact_norm, found = exact.float(), exact.square().sum(1), []
    norm = exact_norm.float()
    for rows in torch.arange(len(exact), device=device).split(max(1, at_once // len(exact))):
        found.append(squares(single, norm, rows))
        close = (found[-1][:, 0] < norm[rows] / 256).nonzero()[:, 0]
        for part in close.split(max(1, at_once // len(exact) // 2)):
            found[-1][part] = squares(exact, exact_norm, rows[part])
    return torch.cat(found).clamp(min=1e-30).sqrt().cpu().numpy()


def gride(x, max_rank=2**13, device="cpu"):
    """Intrinsic dimension of the points x [N, D] at all scales n = 1, 2, 4 .. max_rank / 2 -> Gride.

    Equal points are taken as one. Ranks end below the number of points. ValueError: not finite, or fewer than 3
    different points. With mu = r_2n / r_n the likelihood's maximum solves, for n1 = n, n2 = 2n,
        (N - 1)/d + (n2 - n1 - 1) sum ln(mu)/(1 - mu^-d) - (n2 - 1) sum ln(mu) = 0,
    whose left side falls with d. Far outliers of mu are left out of it, as in dadapy.
    """
    x = np.asarray(x)
    if not np.isfinite(x).all():
        raise ValueError(f"points {x.shape} hold values that are not finite")
    x = np.unique(x, axis=0)
    if len(x) < 3:
        raise ValueError(f"{len(x)} different points; the dimension needs 3 or more")
    top = int(np.log2(min(max_rank, len(x) - 1)))
    r = neighbour_distances(x, 2 ** np.arange(top + 1), device)
    found = [gride_at(r[:, i + 1] / r[:, i], 2**i) for i in range(top)]
    scales = (r[:, :-1] + r[:, 1:]).mean(0) / 2
    return Gride(*(np.array(v) for v in zip(*found)), scales, 2 ** np.arange(top), len(x))


def gride_at(mu, n):
    """(dimension, its standard error) from the ratios mu [N] of the distances to neighbours 2n and n."""
    mu = np.where(mu == 1, 1 + 10 * np.finfo(float).eps, mu)
    q50, q95 = np.quantile(mu, [0.5, 0.95])
    kept = mu[mu < 20 * (q95 - q50) + q50]
    log = np.log(kept if len(kept) > 1 else mu)

    def slope(d):  # -expm1 is 1 - mu^-d without the loss of digits
        return (len(log) - 1) / d + (n - 1) * (log / -np.expm1(-d * log)).sum() - (2 * n - 1) * log.sum()

    if slope(1e3) > 0 or slope(1e-3) < 0:
        return (np.inf if slope(1e3) > 0 else 0.0), np.nan
    d, log = brentq(slope, 1e-3, 1e3, xtol=1e-9), np.log(mu)
    curvature = len(mu) / d**2 + (n - 1) * ((log / np.expm1(-d * log)) ** 2 * np.exp(-d * log)).sum()
    return d, curvature ** -0.5


def plateau(ids, ranks, points):
    """Index of the scale in the middle of the flattest three neighbouring ones of the curve ids over ranks n.

    Where the outer neighbour 2n is beyond a quarter of the points the edge of the data is seen: left out. 0 if fewer
    than three scales, or only undefined ones, are left.
    """
    logs = np.log(np.asarray(ids, float)[2 * np.asarray(ranks) <= points / 4])
    rough = np.maximum(np.abs(logs[1:-1] - logs[:-2]), np.abs(logs[2:] - logs[1:-1]))
    return 1 + int(np.nanargmin(rough)) if np.isfinite(rough).any() else 0


def clip_outliers(x, quantile):
    """x [n, d] with its elements clipped at the given quantile of their absolute values (Appendix C.1)."""
    limit = np.quantile(np.abs(x), quantile)
    return np.clip(x, -limit, limit)


# ---------------------------------------------------------------------------------------------------------------------
# subspace overlap

def explained(points, k, weights=None):
    """{(whose variance, whose components): share in 0..1} of points {name: [n, d] tensor}: how much of the variance of
    one lies in the span of the top k principal components of another, or of its own. weights [n]: of the points.

    Each is centred on its own mean. ValueError if one has no variance.
    """
    covariance, top = {}, {}
    for name, x in points.items():
        w = torch.ones(len(x)).to(x) if weights is None else weights.to(x)
        centred = (x - (w @ x) / w.sum()) * w.sqrt()[:, None]
        covariance[name] = centred.T @ centred
        if not covariance[name].trace() > 0:
            raise ValueError(f"{name}: {len(x)} points without variance, nothing to explain")
        top[name] = torch.linalg.eigh(covariance[name])[1][:, -k:]  # eigenvalues ascend
    return {(a, b): float((top[b] * (covariance[a] @ top[b])).sum() / covariance[a].trace())
            for a in points for b in points}


# ---------------------------------------------------------------------------------------------------------------------
# models and data

class Model(NamedTuple):
    name: str
    folder: Path
    net: torch.nn.Module
    colour: str
    speaks: bool  # False: a text model's folder, the speech modules are random


def open_models(c):
    """One Model for each folder in --checkpoint."""
    folders = [newest_checkpoint(path) for path in c.checkpoint.split(",")]
    return [Model(name, folder, from_pretrained(folder).to(c.device).eval(), COLOURS[i % len(COLOURS)],
                  (folder / "speech.safetensors").exists())
            for i, (name, folder) in enumerate(zip(run_names(c), folders))]


def run_names(c):
    """A short name for each of c.checkpoint's folders; its whole path, where others have the same."""
    paths = [Path(path).resolve() for path in c.checkpoint.split(",")]
    names = [path.parent.name if path.name.startswith("checkpoint-") else path.name for path in paths]
    if len(set(paths)) < len(paths):
        raise ValueError(f"checkpoint={c.checkpoint}: the same folder twice")
    return names if len(set(names)) == len(names) else [str(path).strip("/").replace("/", "-") for path in paths]


def open_tokenizer(model):
    path = model.folder / "tokenizer.json"
    return datasets.Tokenizer(path) if path.exists() else None


def forward(net, sequences, want, batch_tokens, text=False):
    """Run sequences of ids, padded on the right, which changes nothing: yields (indices, lengths, Output)."""
    lengths = np.array([len(s) for s in sequences])
    order, at = np.argsort(-lengths, kind="stable"), 0
    while at < len(order):
        chosen = order[at:at + max(1, batch_tokens // lengths[order[at]])]
        ids = np.zeros((len(chosen), lengths[chosen[0]]), np.int64)
        for row, i in zip(ids, chosen):
            row[:lengths[i]] = sequences[i]
        with torch.inference_mode():
            ids = torch.from_numpy(ids).to(next(net.parameters()).device)
            yield chosen, lengths[chosen], net(ids, text_rows=len(ids) if text else 0, want=want)
        at += len(chosen)


def last_hidden(net, sequences, batch_tokens, text=False):
    """Hidden states at the last token of each sequence -> float32 [L + 1, n, d]. Layer 0 is the backbone's input."""
    found = np.empty((net.config.num_hidden_layers + 1, len(sequences), net.config.hidden_size), np.float32)
    for chosen, lengths, output in forward(net, sequences, ("hidden",), batch_tokens, text):
        rows, last = torch.arange(len(chosen)), torch.from_numpy(lengths - 1)
        found[:, chosen] = torch.stack([h[rows, last] for h in output.hidden]).float().cpu().numpy()
    return found


def layer_weights(net, utterances, batch_tokens, at):
    """omega of each utterance, a list of float32 [units, L]: row j where unit j was read last; at="predicted": where it
    comes next."""
    sequences = [[net.config.speech_eos, *(u.units + net.config.vocab_size)] for u in utterances]
    found = [None] * len(utterances)
    for chosen, lengths, output in forward(net, sequences, ("omega",), batch_tokens):
        for i, n, omega in zip(chosen, lengths, output.omega.float().cpu().numpy()):
            found[i] = omega[1:n] if at == "read" else omega[:n - 1]
    return found


class Utterance(NamedTuple):
    units: np.ndarray           # int64 [n]
    words: list                 # as written
    offsets: np.ndarray         # int64 [words + 1]: word i is units[offsets[i]:offsets[i + 1]]
    starts: np.ndarray | None   # float64 [n + 1]: where units start and the last one ends, in seconds
    ends: np.ndarray | None     # float64: where words end, in seconds; None: where their units do

    def boundaries(self):
        inner = np.unique(self.offsets[1:-1])
        return inner[(inner > 0) & (inner < len(self.units))]

    def times(self):
        """Boundaries in seconds."""
        inner = self.starts[self.boundaries()] if self.ends is None else np.unique(self.ends[:-1])
        return inner[(inner > self.starts[0]) & (inner < self.starts[-1])]


def read_utterances(folder, model, c):
    """Utterances of a paired set; of recordings, if --corpus is set. ValueError if none has two words."""
    found = read_recordings(folder, model, c) if c.corpus else read_paired(folder, model, c.units)
    found = list(itertools.islice((u for u in found if len(u.units) > 1), c.utterances))
    if not sum(len(u.boundaries()) for u in found):
        raise ValueError(f"{folder}: no word boundary inside any utterance")
    if max(u.units.max() for u in found) >= model.net.config.n_units:
        raise ValueError(f"{folder}: holds units beyond the {model.net.config.n_units} of {model.folder}")
    return found


def read_paired(folder, model, units_folder):
    """Utterances of a paired set, cut between words where they are longer than the model reads. Times are estimates
    from the mean durations of units, which units.json (of the folder or of its sound/, or beside the checkpoint) may
    know; else None."""
    tokenizer, folder_of_units = open_tokenizer(model), Path(units_folder or model.folder)
    paths = [folder_of_units / "units.json", folder_of_units / "sound/units.json"]
    known = [json.loads(path.read_text()) for path in paths if path.exists()]
    durations = np.array(next((about["durations"] for about in known if about.get("durations")), []))
    for shard in datasets.open_source("interleaved", [folder], *made_with(model.folder)).shards:
        for i in range(shard.meta["documents"]):
            ids, units, t, s = shard.document(i)
            first, n_words = 0, len(s) - 2  # the last word is the EOS
            while first < n_words:
                reach = s[first] + model.net.config.max_position_embeddings - 1
                last = max(first + 1, int(np.searchsorted(s[:n_words + 1], reach, side="right")) - 1)
                mine, edges = units[s[first]:s[last]], t[first:last + 1]
                words = [tokenizer.decode(ids[a:b]).strip() if tokenizer else "" for a, b in zip(edges, edges[1:])]
                lasted = durations[mine] / shard.meta["speech"]["rate"] if len(durations) else None
                starts = None if lasted is None else np.append(0, np.cumsum(lasted))
                yield Utterance(mine, words, s[first:last + 1] - s[first], starts, None)
                first = last


def read_recordings(source, model, c):
    """Utterances of the items that corpora/NAME.py finds, in true time. What cannot be used is left out, aloud."""
    import speech
    from corpora import common
    reader, vocabulary = importlib.import_module(f"corpora.{c.corpus}"), speech.load_units(c.units, c.device)
    if (wanted := made_with(model.folder)[1]) not in (None, vocabulary.hash):
        raise ValueError(f"{c.units}: not the units that {model.folder} was trained with ({wanted})")
    settings = dict(kind="paired", aligner="", max_seconds=300.0, mel=False, sa=False)
    for item in (item for path in reader.find(Path(source), settings) for item in reader.read(path, settings)):
        try:
            if isinstance(item, common.Bad):
                raise item.error
            heard = common.hear(item, settings, dict(read=0.0))
            [(ids, frame_start)] = speech.units([heard.waveform], vocabulary)
            n_frames, ends = speech.n_frames(heard.n_samples, vocabulary), np.array([end for _, end in heard.times])
            offsets = speech.word_units(ends, frame_start, n_frames, vocabulary.rate)
            starts = np.append(frame_start, n_frames) / vocabulary.rate
            if len(ids) >= (most := model.net.config.max_position_embeddings):
                raise ValueError(f"{item.id}: {len(ids)} units, the model reads {most - 1}")
            yield Utterance(ids.astype(np.int64), item.text.split(), offsets, starts, ends)
        except ValueError as error:
            print(f"left out: {error}")


def word_table(shard, stream, tokenizer, longest=1 << 24):
    """(offsets of words in a stream [w + 1], documents in words [d + 1]). In a text set words begin with a space."""
    if shard.text_words is not None:
        return (shard.text_words if stream == "text" else shard.speech_words), shard.documents
    ids, edges = np.asarray(shard.text[:longest]), shard.documents[shard.documents <= longest]
    begins = np.zeros(tokenizer.vocab_size, bool)
    for i in np.unique(ids):
        begins[i] = i == tokenizer.eos or tokenizer.decode_bytes([i])[:1].isspace()
    first = begins[ids]
    first[edges[edges < len(ids)]] = True
    offsets = np.append(np.flatnonzero(first), len(ids))
    return offsets, np.searchsorted(offsets, edges)


def subsequences(shards, streams, words, count, seed, tokenizer=None):
    """Up to `count` different subsequences of so many words, at random, none with the end of a document inside.

    Returns {stream: list of int64 arrays} as the shards hold them; in all streams of paired sets the same words.
    """
    tables = [{s: word_table(shard, s, tokenizer) for s in streams} for shard in shards]
    edges = np.cumsum([0, *(len(table[streams[0]][0]) - 1 for table in tables)])
    rng, found = np.random.default_rng(seed), {s: [] for s in streams}
    few = edges[-1] < 1 << 24
    for start in rng.permutation(edges[-1] if few else np.unique(rng.integers(edges[-1], size=16 * count))):
        shard = int(np.searchsorted(edges, start, side="right")) - 1
        first, documents = start - edges[shard], tables[shard][streams[0]][1]
        after = np.searchsorted(documents, first, side="right")  # the next document; before it is an EOS
        if len(found[streams[0]]) < count and after < len(documents) and first + words <= documents[after] - 1:
            for s in streams:
                offsets = tables[shard][s][0]
                found[s].append(getattr(shards[shard], s)[offsets[first]:offsets[first + words]].astype(np.int64))
    return found


def representations(model, folder, streams, c):
    """{stream: float32 [L + 1, n, d]}: clipped last-token states of random subsequences, n a multiple of --batches."""
    kind = "interleaved" if "speech" in streams else "text"
    shards, tokenizer = datasets.open_source(kind, [folder], *made_with(model.folder)).shards, open_tokenizer(model)
    if shards[0].text_words is None and tokenizer is None:
        raise ValueError(f"{folder}: a text set, and {model.folder} has no tokenizer.json to find its words with")
    found = subsequences(shards, streams, c.words, c.points * c.batches, c.seed, tokenizer)
    n = len(found[streams[0]]) // c.batches * c.batches
    if n < 3 * c.batches:
        raise ValueError(f"{folder}: {n} subsequences of {c.words} words, too few for {c.batches} batches")
    if not all(len(ids) for stream in found.values() for ids in stream):
        raise ValueError(f"{folder}: {c.words} words in a row without a unit; set --words higher")
    shift, states = dict(text=0, speech=model.net.config.vocab_size), {}
    for s in streams:
        states[s] = last_hidden(model.net, [ids + shift[s] for ids in found[s][:n]], c.batch_tokens, text=s == "text")
        for layer, x in enumerate(states[s]):
            states[s][layer] = clip_outliers(x, c.clip)
    return states


# ---------------------------------------------------------------------------------------------------------------------
# what the commands share

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.fontsize": 8,
                         "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(c, name, rows, results, figure):
    """OUT/name.png, .csv (rows: dicts of the same keys) and .json."""
    folder = Path(c.out)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110)
    pyplot().close(figure)
    with open(folder / f"{name}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    about = dict(settings=vars(c), **results)
    (folder / f"{name}.json").write_text(json.dumps(about, indent=1, default=lambda array: array.tolist()))
    print(f"written to {folder}/{name}.png, .csv, .json")


def with_selector(models):
    for m in models:
        if not m.speaks or m.net.config.layer_pooling != "dynamic":
            raise ValueError(f"{m.folder}: has no trained layer selector (layer_pooling='dynamic')")
    return models


def over_layers(axis, mean, low, high, colour, label, speech):
    """A line over layers 0..L with a band: solid with dots for speech, dashed with squares for text."""
    axis.plot(mean, "o-" if speech else "s--", color=colour, markersize=4, label=label)
    axis.fill_between(range(len(mean)), low, high, color=colour, alpha=0.2, linewidth=0)
    axis.xaxis.get_major_locator().set_params(integer=True)


# ---------------------------------------------------------------------------------------------------------------------
# the commands

def segmentation(c):
    """Table 3, with chance beside it."""
    rows, about = [], {}
    for m in with_selector(open_models(c)):
        found, last = [], m.net.config.num_hidden_layers
        for folder in (c.val, c.data):
            heard = read_utterances(folder, m, c)
            omega = layer_weights(m.net, heard, c.batch_tokens, c.omega_at)
            signals = {f"omega of layer {k}{', the last' * (k == last)}": [w[:, k - 1] for w in omega]
                       for k in range(last, 0, -1)}
            found.append((heard, segmenters(heard, signals, np.random.default_rng(c.seed))))
        (val, on_val), (test, on_test) = found
        methods = {name: (*on_val[name], on_test[name][1]) for name in on_val if name in on_test}
        timed = val[0].starts is not None and test[0].starts is not None
        for unit, matching in itertools.product(["units", "ms"][:1 + timed], ["nearest", "one-to-one"]):
            shown, tolerance = dict(units=(c.tolerance,) * 2, ms=(c.tolerance_ms, c.tolerance_ms / 1000))[unit]
            for row in tune_and_score(lay_out(val, unit), lay_out(test, unit), methods, tolerance,
                                      matching == "one-to-one", c.seed):
                own = row["method"].startswith("omega")  # the others are the same for all models
                if own or not about:
                    rows.append(dict(model=m.name if own else "", within=f"{shown:g} {unit}", matching=matching, **row))
        about[m.name] = dict(checkpoint=str(m.folder), utterances=len(test), validation_utterances=len(val),
                             times=timed and ("true" if c.corpus else "estimated: mean duration of each unit"))
    print_segmentation(rows)
    figure = draw_segmentation([r for r in rows if (r["within"], r["matching"]) == (rows[0]["within"], "nearest")], c)
    table = [{k: v for k, v in row.items() if k not in ("settings", "validation")} for row in rows]
    save(c, "segmentation", table, dict(models=about, rows=rows), figure)


def print_segmentation(rows):
    head = None
    for row in rows:
        if "omega" not in row["method"] or "last" in row["method"]:
            if head != (head := f"within {row['within']}, {row['matching']} matching, %"):
                print(f"\n{head:52}  setting  precision  recall     F1  R-value")
            print(f"{row['model']:20}{row['method']:32}{row['setting']:9.3g}{row['precision']:11.1f}{row['recall']:8.1f}"
                  f"{row['f1']:7.1f}{row['r_value']:9.1f} ± {row['r_value_stderr']:.1f}")


def draw_segmentation(rows, c):
    figure, (bars, tuning, layers) = pyplot().subplots(1, 3, figsize=(16, 4.5), layout="constrained",
                                                       width_ratios=[2, 1, 1])
    colours = dict(zip(run_names(c), COLOURS))
    main = [row for row in rows if "omega" not in row["method"] or "last" in row["method"]]
    for i, row in enumerate(main):
        bars.barh(i, max(0, row["r_value"]), xerr=row["r_value_stderr"], color=colours.get(row["model"], "0.78"))
        bars.text(1, i, f"{row['model']} {row['method']}:  R {row['r_value']:.1f}, F1 {row['f1']:.1f}".strip(),
                  va="center", fontsize=9, color="white" if row["model"] else "black")
    bars.invert_yaxis()
    bars.set(yticks=[], xlabel="R-value on the test split, % (± standard error)", xlim=(0, 100),
             title=f"word boundaries within {rows[0]['within']}, nearest matching; grey: no model")
    chance = max((row for row in main if not row["model"]), key=lambda row: row["r_value"])
    for name in dict.fromkeys(row["model"] for row in rows if row["model"]):
        mine, style = [row for row in rows if row["model"] == name], dict(color=colours[name], markersize=4, label=name)
        tuning.plot(mine[0]["settings"], mine[0]["validation"], "o-", **style)
        layers.plot(range(len(mine), 0, -1), [row["r_value"] for row in mine], "o-", **style)
    for axis, value in ((tuning, max(chance["validation"])), (layers, chance["r_value"])):
        axis.axhline(value, color="0.4", linestyle=":", label="best of the grey ones")
        axis.legend()
    tuning.set(xlabel="least prominence of a peak", ylabel="R-value, %", title="tuning: last layer, validation split")
    layers.set(xlabel="layer", ylabel="R-value, %", title="omega of each layer, test split")
    layers.xaxis.get_major_locator().set_params(integer=True)
    return figure


def weights(c):
    """omega along an utterance, phi, and the distribution of omega over layers: a picture for each model."""
    rows, about, models = [], {}, with_selector(open_models(c))
    for m in models:
        heard = read_utterances(c.data, m, c)
        if not 0 <= c.utterance < len(heard):
            raise ValueError(f"--utterance={c.utterance}: {c.data} has 0 to {len(heard) - 1}")
        omega, u = layer_weights(m.net, heard, c.batch_tokens, c.omega_at), heard[c.utterance]
        everywhere, phi = np.concatenate(omega), m.net.phi.detach().softmax(0).cpu().numpy()
        around = {shift: np.concatenate([w[at, -1] for v, w in zip(heard, omega) for at in [v.boundaries() + shift]
                                         for at in [at[(at >= 0) & (at < len(w))]]]) for shift in range(-4, 5)}
        rows += [dict(model=m.name, position=j, unit=int(u.units[j]), boundary=int(j in u.boundaries()),
                      word=u.words[np.searchsorted(u.offsets, j, side="right") - 1], layer=k + 1, omega=float(w))
                 for j, row in enumerate(omega[c.utterance]) for k, w in enumerate(row)]
        about[m.name] = dict(
            checkpoint=str(m.folder), phi=phi, omega_mean=everywhere.mean(0), units=len(everywhere),
            omega_quantiles={q: np.quantile(everywhere, q, axis=0) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
            entropy=-float((everywhere * np.log(everywhere + 1e-30)).sum(1).mean()),
            last_layer_around_boundaries={shift: float(w.mean()) for shift, w in around.items()})
        figure = draw_weights(m, u, omega[c.utterance][:c.drawn_units], phi, everywhere, around, c)
        if m is not models[-1]:
            save(c, f"weights-{m.name}", [row for row in rows if row["model"] == m.name], about[m.name], figure)
    save(c, "weights", rows, dict(models=about), figure)


def draw_weights(m, u, omega, phi, everywhere, around, c):
    (n, L), plt = omega.shape, pyplot()
    figure, axes = plt.subplot_mosaic([["map"] * 3, ["last"] * 3, ["phi", "spread", "around"]], figsize=(16, 9),
                                      layout="constrained", height_ratios=[min(4, 2 + L / 15), 2.5, 3])
    where = dict(read="the unit that was read last", predicted="the unit that comes next")[c.omega_at]
    image = axes["map"].imshow(omega.T, origin="lower", aspect="auto", extent=(-0.5, n - 0.5, 0.5, L + 0.5))
    figure.colorbar(image, ax=[axes["map"], axes["last"]], label="omega", pad=0.01)
    axes["map"].grid(False)
    axes["map"].set(ylabel="layer", title=f"{m.name}: the layer selector's weights along an utterance")
    axes["last"].plot(omega[:, -1], "o-", markersize=3, color=m.colour)
    axes["last"].set(ylabel=f"omega of layer {L}, the last", xlim=(-0.5, n - 0.5),
                     xlabel=f"position in units (omega stands at {where}; vertical lines: a word begins)")
    top = axes["last"].get_ylim()[1]
    for word, a, b in zip(u.words, u.offsets, u.offsets[1:]):
        if a < min(b, n):
            axes["map"].axvline(a - 0.5, color="white", linewidth=1)
            axes["last"].axvline(a - 0.5, color="0.4", linewidth=1)
            axes["last"].text(a - 0.4, top, word, fontsize=8, va="bottom", rotation=40)
    layers = np.arange(1, L + 1)
    axes["phi"].bar(layers, phi, color=m.colour)
    axes["phi"].axhline(1 / L, color="0.4", linestyle=":", label="uniform")
    axes["phi"].set(xlabel="layer", ylabel="softmax(phi)", title="phi: what the selector looks at")
    axes["phi"].legend()
    axes["spread"].boxplot(everywhere, positions=layers, whis=(5, 95), showfliers=False, patch_artist=True, widths=0.5,
                           manage_ticks=False, boxprops=dict(facecolor=m.colour, alpha=0.5),
                           medianprops=dict(color="black"))
    axes["spread"].set(xlabel="layer", ylabel="omega", title=f"omega over {len(everywhere):,} units: quartiles, 5-95%")
    axes["around"].errorbar(list(around), [w.mean() for w in around.values()],
                            [w.std() / len(w) ** 0.5 for w in around.values()], fmt="o-", color=m.colour)
    axes["around"].axhline(everywhere[:, -1].mean(), color="0.4", linestyle=":", label="mean over all units")
    axes["around"].set(xlabel="units after a word's first unit", ylabel=f"omega of layer {L}",
                       title="last layer around word boundaries (± standard error)")
    axes["around"].legend()
    for axis in (axes["map"].yaxis, axes["phi"].xaxis, axes["spread"].xaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure


def dimension(c):
    """Figure 3: GRIDE of text and of speech over layers, and the curves over scale that it is read off from."""
    rows, about, drawn = [], {}, []
    for m in open_models(c):
        about[m.name] = dict(checkpoint=str(m.folder))
        for stream, folder in [("text", c.text or c.data)] + [("speech", c.data)] * m.speaks:
            states = representations(m, folder, (stream,), c)[stream]
            layers = [over_scales(np.split(x, c.batches), c) for x in tqdm(states, desc=stream, disable=None)]
            about[m.name][stream], n = dict(points=states.shape[1] // c.batches), states.shape[1] // c.batches
            rows += [dict(model=m.name, modality=stream, layer=layer, n=int(curve.ranks[i]), distance=curve.scales[i],
                          dimension=curve.ids[i], deviation=deviation[i], error=curve.errors[i],
                          chosen=int(i == chosen), distinct=curve.points)
                     for layer, (curve, deviation, chosen) in enumerate(layers) for i in range(len(curve.ids))]
            drawn.append((m, stream, n, layers))
            values = " ".join(f"{curve.ids[chosen]:.1f}" for curve, _, chosen in layers)
            print(f"{m.name}, {stream}, {c.batches} batches of {n}: dimension of layers 0 to L: {values}")
    save(c, "dimension", rows, dict(models=about, rows=rows), draw_dimension(drawn))


def over_scales(batches, c):
    """GRIDE of one layer: (Gride of means over batches, deviation of the ids over batches, index of the chosen scale).

    Where a batch has fewer than 3 different points, as layer 0 of text may, the dimension is nan.
    """
    found = []
    for x in batches:
        distinct = len(np.unique(x, axis=0))
        nothing = Gride(*[np.full(1, np.nan)] * 3, np.ones(1, int), distinct)
        found.append(nothing if distinct < 3 else gride(x, c.max_rank, "cuda" if c.device == "cuda" else "cpu"))
    size, fewest = min(len(g.ids) for g in found), min(g.points for g in found)
    ids, errors, scales = (np.stack([g[i][:size] for g in found]) for i in range(3))
    mean = Gride(ids.mean(0), errors.mean(0), scales.mean(0), found[0].ranks[:size], fewest)
    chosen = min(size - 1, int(np.log2(c.scale))) if c.scale else plateau(mean.ids, mean.ranks, fewest)
    return mean, ids.std(0), chosen


def draw_dimension(drawn):
    plt, models = pyplot(), list(dict.fromkeys(m.name for m, *_ in drawn))
    figure = plt.figure(figsize=(13, 4.5 + 3.4 * len(models)), layout="constrained")
    grid = figure.add_gridspec(1 + len(models), 2, height_ratios=[4.5] + [3.4] * len(models))
    main = figure.add_subplot(grid[0, :])
    for m, stream, n, layers in drawn:
        at = np.array([(g.ids[i], deviation[i]) for g, deviation, i in layers]).T
        at[:, [2 * g.points < n for g, *_ in layers]] = np.nan  # mostly equal points: embeddings of the last token
        over_layers(main, at[0], at[0] - at[1], at[0] + at[1], m.colour, f"{m.name}, {stream}", stream == "speech")
        axis = figure.add_subplot(grid[1 + models.index(m.name), int(stream == "speech")])
        for layer, (g, _, i) in enumerate(layers):
            shade = plt.get_cmap("viridis")(0.9 * layer / max(1, len(layers) - 1))
            named = layer % -(-len(layers) // 6) == 0 or layer == len(layers) - 1
            axis.plot(g.ranks, g.ids, color=shade, label=f"layer {layer}" if named else None)
            axis.plot(g.ranks[i], g.ids[i], "o", color=shade)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="neighbour rank n", ylabel="intrinsic dimension", ylim=(0, None),
                 title=f"{m.name}, {stream}: over scale (dots: the scale chosen)")
        axis.legend(ncols=2)
    main.set(xlabel="layer (0: input to the backbone)", ylabel="intrinsic dimension", ylim=(0, None),
             title="GRIDE, at the plateau of each layer: mean and deviation over batches")
    main.legend()
    return figure


def overlap(c):
    """Figure 4: share of one modality's variance within the other's top principal components, over layers."""
    rows, models, rng = [], open_models(c), np.random.default_rng(c.seed)
    for m in models:
        if not m.speaks:
            raise ValueError(f"{m.folder}: a text model; overlap needs one that has learnt speech")
        states = representations(m, c.data, ("text", "speech"), c)
        n, d = states["text"].shape[1:]
        draws = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=c.bootstrap))
        for layer in tqdm(range(len(states["text"])), desc=m.name, disable=None):
            x = {stream: torch.from_numpy(states[stream][layer]).to(c.device) for stream in states}
            parts = [dict(zip(x, part)) for part in zip(*(points.chunk(c.batches) for points in x.values()))]
            batches = [explained(part, c.components) for part in parts]
            drawn = [explained(x, c.components, draw) for draw in draws]
            for pair, share in explained(x, c.components).items():
                spread = np.array([s[pair] for s in drawn] or [np.nan])  # its mean has a bias, which is taken off
                low, high = (share + np.quantile(spread - spread.mean(), [0.025, 0.975])).tolist()
                rows.append(dict(model=m.name, layer=layer, variance_of=pair[0], components_of=pair[1], share=share,
                                 low=low, high=high, batches_mean=float(np.mean([s[pair] for s in batches])),
                                 batches_deviation=float(np.std([s[pair] for s in batches])),
                                 random_subspace=min(1.0, c.components / d), pairs=n))
        for pair in (("speech", "text"), ("text", "speech")):
            mine = [r for r in rows if (r["model"], r["variance_of"], r["components_of"]) == (m.name, *pair)]
            print(f"{m.name}: % of {pair[0]} variance in {pair[1]}'s top {c.components}, layers 0 to L: "
                  + " ".join(f"{100 * row['share']:.1f}" for row in mine))
    checkpoints = {m.name: str(m.folder) for m in models}
    save(c, "overlap", rows, dict(checkpoints=checkpoints, rows=rows), draw_overlap(rows, models, c.components))


def draw_overlap(rows, models, k):
    figure, axes = pyplot().subplots(1, 2, figsize=(14, 4.8), layout="constrained", sharey=True)
    for axis, (a, b) in zip(axes, (("speech", "text"), ("text", "speech"))):
        for m in models:
            line, own = ([row for row in rows if (row["model"], row["variance_of"], row["components_of"]) == wanted]
                         for wanted in ((m.name, a, b), (m.name, a, a)))
            over_layers(axis, *([100 * row[key] for row in line] for key in ("share", "low", "high")), m.colour, m.name,
                        a == "speech")
            axis.plot([100 * row["share"] for row in own], ":", color=m.colour,
                      label=None if m is not models[0] else f"dotted: {a}'s own components")
        for share in sorted({row["random_subspace"] for row in rows}):
            axis.axhline(100 * share, color="0.4", linestyle="-.", label=f"a random subspace: {100 * share:.0f}%")
        axis.set(xlabel="layer (0: input to the backbone)", ylabel=f"% of {a} variance explained", ylim=(0, 103),
                 title=f"{a} variance in the top {k} components of {b} (band: 95% bootstrap)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)  # lines are high and low
    return figure


def scaling(c):
    """Figures 2 and 6: metrics of runs' log.jsonl against training FLOPs (model.forward_flops) and tokens."""
    names, rows, seen = c.metrics.split(","), [], set()
    for run, folder in zip(run_names(c), c.checkpoint.split(",")):
        lines = [flat(line) for line in read_log(folder)]
        spent = {key: np.array([0] + [line[key] for line in lines if "flops" in line], float)
                 for key in ("step", "tokens", "flops")}
        if len(spent["step"]) == 1:
            raise ValueError(f"{Path(folder) / 'log.jsonl'}: not there, or not the log of a training run")
        seen |= {key for line in lines for key in line}
        rows += [dict(run=run, metric=name, step=line["step"], value=line[name],
                      **{key: float(np.interp(line["step"], spent["step"], spent[key])) for key in ("tokens", "flops")})
                 for line in lines for name in names if name in line]
    for name in names:
        if name not in {row["metric"] for row in rows}:
            raise ValueError(f"--metrics: no run has logged {name!r}; did you mean {nearest(name, sorted(seen))}?")
    save(c, "scaling", rows, dict(rows=rows), draw_scaling(rows, names, run_names(c)))


def draw_scaling(rows, names, runs):
    plt = pyplot()
    figure, axes = plt.subplots(2, len(names), figsize=(4.2 * len(names), 7), layout="constrained", squeeze=False)
    for (i, name), (j, (key, unit)) in itertools.product(enumerate(names), enumerate((
            ("flops", "training compute, FLOPs"), ("tokens", "training tokens")))):
        axis, of_name = axes[j, i], [row for row in rows if row["metric"] == name and row[key] > 0]
        if not of_name:
            raise ValueError(f"--metrics: {name} was only logged before the first step")
        for run, colour in zip(runs, itertools.cycle(COLOURS)):
            line = [(row[key], row["value"]) for row in of_name if row["run"] == run]
            axis.plot(*zip(*line) if line else ([], []), "o-", color=colour, markersize=4, label=run)
        axis.set_xscale("log")
        wide = max(row[key] for row in of_name) > 100 * min(row[key] for row in of_name)
        axis.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e+", "e").replace(".0e", "e"))
        axis.xaxis.set_minor_formatter(lambda value, _: "")
        what = "nats per target" if "nll" in name else "% right" if "accuracy" in name else name
        axis.set(xlabel=unit, ylabel=what, title=name)
    axes[0, 0].legend()
    return figure


COMMANDS = dict(segmentation=segmentation, weights=weights, dimension=dimension, overlap=overlap, scaling=scaling)


def main(argv):
    if argv[:1] and argv[0] not in (*COMMANDS, "-h", "--help"):
        raise SystemExit(f"{argv[0]}: no such command; write one of {', '.join(COMMANDS)}")
    c = SimpleNamespace(**configure(DEFAULTS, argv[1:] if argv[:1] and argv[0] in COMMANDS else ["--help"])[0])
    if c.omega_at not in ("read", "predicted"):
        raise SystemExit(f"omega_at={c.omega_at}: choose read or predicted")
    for key in ("batch_tokens", "utterances", "drawn_units", "words", "points", "batches", "components", "bootstrap"):
        if getattr(c, key) < 1:
            raise SystemExit(f"{key}={getattr(c, key)}: give 1 or more")
    if c.max_rank < 4 or c.scale < 0 or c.scale & (c.scale - 1) or not 0 < c.clip <= 1:
        raise SystemExit(f"max_rank={c.max_rank}, scale={c.scale}, clip={c.clip}: give 4 or more; 0 or a power of 2; "
                         "from 0 to 1")
    if c.corpus and not (c.units and (Path(__file__).parent / f"corpora/{c.corpus}.py").is_file()):
        raise SystemExit(f"corpus={c.corpus}, units={c.units}: give the name of a script in corpora/, and a folder of "
                         "units")
    first = Path(c.checkpoint.split(",")[0])
    c.out = c.out or str((first.parent if first.name.startswith("checkpoint-") else first) / "analysis")
    c.device = pick_device(c.device)
    try:
        COMMANDS[argv[0]](c)
    except ValueError as error:  # says in one line what is wrong
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
