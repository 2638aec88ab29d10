"""
All drawing: from the json that a command of analyze.py wrote, or from a run's log.jsonl, to a png.

    python -m tools.figures out/train_tiny/analysis/segmentation.json      draws segmentation.png beside it
    python -m tools.figures out/train_tiny/log.jsonl                       draws loss.png beside it

A json says which command wrote it (command), with what settings, and about which models. A model has the same colour
in all pictures of the same --checkpoint: the first one the first colour, and so on.
"""
import itertools
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from runtime.log import read_log

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # of Okabe and Ito, who chose
TEXT, SPEECH = COLOURS[:2]                                                  # them for colour-blind readers
CLOZE_COLOURS = {"T": TEXT, "S": SPEECH, "T->S": COLOURS[4], "S->T": COLOURS[2]}
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.fontsize": 8,
                            "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})


def draw(path):
    """Draw the results in a json of analyze.py as a png beside it. ValueError if the file is of another kind."""
    path = Path(path)
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(results, dict) or results.get("command") not in FIGURES:
        raise ValueError(f"{path}: not a json of analyze.py, which says command: {', '.join(FIGURES)}")
    FIGURES[results["command"]](results).savefig(path.with_suffix(".png"), dpi=110)


def model_colours(results):
    return dict(zip(results["models"], itertools.cycle(COLOURS)))


def whole_numbers(axis):
    """Put the ticks of an x or y axis at whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True))


def line_over_layers(axes, mean, low, high, colour, label, speech):
    """A line over layers 0..L with a band: solid with dots for speech, dashed with squares for text."""
    axes.plot(mean, "o-" if speech else "s--", color=colour, markersize=4, label=label)
    axes.fill_between(range(len(mean)), low, high, color=colour, alpha=0.2, linewidth=0)
    whole_numbers(axes.xaxis)


def utterance(path, waveform, vocabulary, words, ends, seconds=4.0):
    """Draw the first seconds of a recording: waveform, spectrogram, units and words on one time axis.

    waveform: float [n] at 16 kHz; vocabulary: units as load_units gives them; words: strings; ends: of each, in s.
    """
    from speech.audio import SAMPLE_RATE
    from speech.mel import STEP, log_mel
    from speech.units import n_frames, word_units

    seconds = min(seconds, len(waveform) / SAMPLE_RATE)
    [(ids, frame_start)] = vocabulary.encode([waveform])
    total, energies = n_frames(len(waveform), vocabulary), log_mel(waveform)
    times = np.append(frame_start, total) / vocabulary.rate
    offsets = word_units(ends, frame_start, total, vocabulary.rate)
    figure = Figure(figsize=(16, 6), layout="constrained")
    wave, mel, row, names = figure.subplots(4, 1, sharex=True, gridspec_kw=dict(height_ratios=[2, 5, 1, 1]))
    wave.plot(np.arange(len(waveform)) / SAMPLE_RATE, waveform, linewidth=0.4)
    wave.set(ylabel="waveform")
    wave.set_title(" ".join(words), fontsize=9)
    extent = (0, len(energies) * STEP / SAMPLE_RATE, 0, energies.shape[1])
    mel.imshow(energies.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
    mel.set(ylabel="mel channel")
    colours = matplotlib.colormaps["tab20"]
    for unit, start, end in zip(ids.tolist(), times, times[1:]):
        row.axvspan(start, end, color=colours(unit % 20))
        if start < seconds:
            row.text((start + min(end, seconds)) / 2, 0.5, str(unit), ha="center", va="center", fontsize=7)
    row.set(ylabel="units", yticks=[])
    for word, start, end in zip(words, times[offsets], times[offsets[1:]]):
        if start < end and start < seconds:
            names.text((start + min(end, seconds)) / 2, 0.5, word, ha="center", va="center", fontsize=9)
        for axis in (wave, mel, row, names):
            axis.axvline(end, color="white" if axis is mel else "black", linewidth=1)
    names.set(ylabel="words", xlabel="seconds", yticks=[], xlim=(0, seconds))
    for axis in (wave, mel, row, names):
        axis.grid(False)
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# word segmentation

def segmentation(results):
    """R-values of all methods, the tuning of the last layer's threshold, and the R-values of all layers."""
    within, colours = results["rows"][0]["within"], model_colours(results)
    rows = [row for row in results["rows"] if row["within"] == within and row["matching"] == "nearest"]
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    bars, tuning, layers = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    draw_r_values(bars, [row for row in rows if not row["model"] or "the last" in row["method"]], colours)
    bars.set_title(f"word boundaries within {within}, nearest matching; grey: no model")
    for name, colour in colours.items():
        by_layer = [row for row in rows if row["model"] == name]  # the last layer first
        style = dict(color=colour, markersize=4, label=name)
        tuning.plot(by_layer[0]["settings"], by_layer[0]["validation"], "o-", **style)
        layers.plot(range(len(by_layer), 0, -1), [row["r_value"] for row in by_layer], "o-", **style)
    best = max((row for row in rows if not row["model"]), key=lambda row: row["r_value"])
    for axes, value in ((tuning, max(best["validation"])), (layers, best["r_value"])):
        axes.axhline(value, color="0.4", linestyle=":", label="best of the grey ones")
        axes.legend()
    tuning.set(xlabel="least prominence of a peak", ylabel="R-value, %", title="tuning: last layer, validation split")
    layers.set(xlabel="layer", ylabel="R-value, %", title="omega of each layer, test split")
    whole_numbers(layers.xaxis)
    return figure


def draw_r_values(axes, rows, colours):
    """A bar for each row, with its name on the left and its scores on the right."""
    for i, row in enumerate(rows):
        axes.barh(i, max(0, row["r_value"]), xerr=row["r_value_stderr"], color=colours.get(row["model"], "0.78"))
        axes.text(103, i, f"R {row['r_value']:.1f}, F1 {row['f1']:.1f}", va="center", fontsize=9)
    names = [f"{row['model']}\n{row['method']}".strip() for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set(xlabel="R-value on the test split, % (± standard error)", xlim=(0, 125), xticks=range(0, 101, 20))
    axes.grid(False, axis="y")
    axes.invert_yaxis()


# ---------------------------------------------------------------------------------------------------------------------
# layer weights

def weights(results):
    """For each model omega along an utterance, phi, and the distribution of omega."""
    colours, omega_at = model_colours(results), results["settings"]["omega_at"]
    figure = Figure(figsize=(16, 9 * len(colours)), layout="constrained")
    parts = figure.subfigures(len(colours), 1, squeeze=False)[:, 0]
    for part, (name, about) in zip(parts, results["models"].items()):
        height = min(4, 2 + len(about["phi"]) / 15)
        axes = part.subplot_mosaic([["map"] * 3, ["last"] * 3, ["phi", "spread", "around"]],
                                   height_ratios=[height, 2.5, 3])
        image = draw_utterance(axes["map"], axes["last"], about["utterance"], colours[name])
        part.colorbar(image, ax=[axes["map"], axes["last"]], label="omega", pad=0.01)
        axes["map"].set_title(f"{name}: the layer selector's weights along an utterance")
        unit = dict(read="the unit that was read last", predicted="the unit that comes next")[omega_at]
        axes["last"].set_xlabel(f"position in units (omega belongs to {unit}; vertical lines: a word begins)")
        draw_phi(axes["phi"], about["phi"], colours[name])
        draw_quantiles(axes["spread"], about, colours[name])
        draw_around_boundaries(axes["around"], about, colours[name])
    return figure


def draw_utterance(above, below, utterance, colour):
    """omega of all layers as an image, and of the last layer as a line with the words above it. Returns the image."""
    omega = np.array(utterance["omega"])  # [units, L]
    n, L = omega.shape
    image = above.imshow(omega.T, origin="lower", aspect="auto", extent=(-0.5, n - 0.5, 0.5, L + 0.5))
    above.grid(False)
    above.set_ylabel("layer")
    whole_numbers(above.yaxis)
    below.plot(omega[:, -1], "o-", markersize=3, color=colour)
    below.set(ylabel=f"omega of layer {L}, the last", xlim=(-0.5, n - 0.5))
    top, offsets = below.get_ylim()[1], utterance["offsets"]
    for word, begin, end in zip(utterance["words"], offsets, offsets[1:]):
        if begin < min(end, n):  # the word has units, and they are drawn
            above.axvline(begin - 0.5, color="white", linewidth=1)
            below.axvline(begin - 0.5, color="0.4", linewidth=1)
            below.text(begin - 0.4, top, word, fontsize=7, va="bottom", rotation=65)
    return image


def draw_phi(axes, phi, colour):
    axes.bar(range(1, len(phi) + 1), phi, color=colour)
    axes.axhline(1 / len(phi), color="0.4", linestyle=":", label="uniform")
    axes.set(xlabel="layer", ylabel="softmax(phi)", title="phi: what the selector looks at")
    axes.legend()
    whole_numbers(axes.xaxis)


def draw_quantiles(axes, about, colour):
    """A box for each layer, from its quantiles 0.05, 0.25, 0.5, 0.75 and 0.95."""
    keys = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [dict(zip(keys, values)) for values in zip(*about["omega_quantiles"].values())]
    axes.bxp(boxes, positions=range(1, len(boxes) + 1), showfliers=False, patch_artist=True, widths=0.5,
             manage_ticks=False, boxprops=dict(facecolor=colour, alpha=0.5), medianprops=dict(color="black"))
    axes.set(xlabel="layer", ylabel="omega", title=f"omega over {about['units']:,} units: quartiles, 5-95%")
    whole_numbers(axes.xaxis)


def draw_around_boundaries(axes, about, colour):
    means, errors = about["last_layer_around_boundaries"], about["last_layer_around_boundaries_stderr"]
    axes.errorbar([int(shift) for shift in means], means.values(), errors.values(), fmt="o-", color=colour)
    axes.axhline(about["omega_mean"][-1], color="0.4", linestyle=":", label="mean over all units")
    axes.set(xlabel="units after a word's first unit", ylabel=f"omega of layer {len(about['phi'])}",
             title="last layer around word boundaries (± standard error)")
    axes.legend()


# ---------------------------------------------------------------------------------------------------------------------
# intrinsic dimension

def dimension(results):
    """The chosen dimension over layers, and below it for each model and modality the curves over scale."""
    colours = model_colours(results)
    figure = Figure(figsize=(13, 4.5 + 3.4 * len(colours)), layout="constrained")
    grid = figure.add_gridspec(1 + len(colours), 2, height_ratios=[4.5] + [3.4] * len(colours))
    main = figure.add_subplot(grid[0, :])
    for i, (name, colour) in enumerate(colours.items()):
        for column, modality in enumerate(["text", "speech"]):
            rows = [row for row in results["rows"] if (row["model"], row["modality"]) == (name, modality)]
            layers = [list(of_layer) for _, of_layer in itertools.groupby(rows, key=lambda row: row["layer"])]
            if layers:  # a text model has no speech
                points = results["models"][name][modality]["points"]
                draw_dimension(main, layers, points, colour, f"{name}, {modality}", modality == "speech")
                draw_scales(figure.add_subplot(grid[1 + i, column]), layers, f"{name}, {modality}")
    main.set(xlabel="layer (0: input to the backbone)", ylabel="intrinsic dimension", ylim=(0, None),
             title="GRIDE, at the plateau of each layer: mean and deviation over batches")
    main.legend()
    return figure


def draw_dimension(axes, layers, points, colour, label, speech):
    """The dimension at the chosen scale. layers: the rows of each layer."""
    chosen = [row for rows in layers for row in rows if row["chosen"]]
    mean, deviation = (np.array([row[key] for row in chosen], float) for key in ("dimension", "deviation"))
    # Where most points are equal, as embeddings of the last token may be, the dimension says nothing.
    mean[[2 * row["distinct"] < points for row in chosen]] = np.nan
    line_over_layers(axes, mean, mean - deviation, mean + deviation, colour, label, speech)


def draw_scales(axes, layers, title):
    """The dimension over all scales, a line for each layer; six or seven of them are named."""
    for layer, rows in enumerate(layers):
        shade = matplotlib.colormaps["viridis"](0.9 * layer / max(1, len(layers) - 1))
        is_named = layer % -(-len(layers) // 6) == 0 or layer == len(layers) - 1
        axes.plot([row["n"] for row in rows], [row["dimension"] for row in rows], color=shade,
                  label=f"layer {layer}" if is_named else None)
        axes.plot(*[[row[key] for row in rows if row["chosen"]] for key in ("n", "dimension")], "o", color=shade)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="neighbour rank n", ylabel="intrinsic dimension", ylim=(0, None),
             title=f"{title}: over scale (dots: the scale chosen)")
    axes.legend(ncols=2)


# ---------------------------------------------------------------------------------------------------------------------
# subspace overlap

def overlap(results):
    """How much of one modality's variance the principal components of the other one explain, over layers."""
    colours, k = model_colours(results), results["settings"]["components"]
    shares = {}  # of each model and pair of modalities: the rows of all layers
    for row in results["rows"]:
        shares.setdefault((row["model"], row["variance_of"], row["components_of"]), []).append(row)
    random_shares = sorted({row["random_subspace"] for row in results["rows"]})
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    for axes, (a, b) in zip(figure.subplots(1, 2, sharey=True), [("speech", "text"), ("text", "speech")]):
        for i, (name, colour) in enumerate(colours.items()):
            share, low, high = ([100 * row[key] for row in shares[name, a, b]] for key in ("share", "low", "high"))
            line_over_layers(axes, share, low, high, colour, name, a == "speech")
            axes.plot([100 * row["share"] for row in shares[name, a, a]], ":", color=colour,
                      label=None if i else f"dotted: {a}'s own components")
        for share in random_shares:
            axes.axhline(100 * share, color="0.4", linestyle="-.", label=f"a random subspace: {100 * share:.0f}%")
        axes.set(xlabel="layer (0: input to the backbone)", ylabel=f"% of {a} variance explained", ylim=(0, 103),
                 title=f"{a} variance in the top {k} components of {b} (band: 95% bootstrap)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)  # no corner is free of lines
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# scaling

def scaling(results):
    """Each metric against training FLOPs and against training tokens."""
    names = results["settings"]["metrics"].split(",")
    figure = Figure(figsize=(4.2 * len(names), 7), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False)
    for of_axis, key, label in zip(grid, ("flops", "tokens"), ("training compute, FLOPs", "training tokens")):
        for axes, name in zip(of_axis, names):
            rows = [row for row in results["rows"] if row["metric"] == name and row[key] > 0]
            draw_metric(axes, rows, key, model_colours(results))
            kind = "nats per target" if "nll" in name else "% right" if "accuracy" in name else name
            axes.set(xlabel=label, ylabel=kind, title=name)
    grid[0, 0].legend()
    return figure


def draw_metric(axes, rows, key, colours):
    """A line for each run, over row[key] on a logarithmic axis."""
    for run, colour in colours.items():
        line = [row for row in rows if row["run"] == run]
        axes.plot([row[key] for row in line], [row["value"] for row in line], "o-", color=colour, markersize=4,
                  label=run)
    axes.set_xscale("log")
    spent = [row[key] for row in rows]
    several_decades = max(spent) > 100 * min(spent)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if several_decades else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+0", "e").replace("e+", "e"))
    axes.xaxis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------------------------------------------------------------
# the curves of a training run

def loss_curves(out_dir):
    """Draw a run's log.jsonl as loss.png beside it."""
    losses(read_log(out_dir)).savefig(Path(out_dir) / "loss.png", dpi=110)


def losses(lines):
    """Training loss, held-out loss and Topic-Cloze over steps. lines: those of log.jsonl, as dicts."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    training, held_out, cloze = figure.subplots(1, 3, sharex=True)
    for name, colour in (("text", TEXT), ("speech", SPEECH)):
        draw_curve(training, lines, [f"{name}_nll"], colour, f"{name} targets", style="-")
        draw_curve(held_out, lines, ["nll", name, name], colour, f"{name} sequences")
        draw_curve(held_out, lines, ["nll", "interleaved", name], colour, f"{name} in interleaved sequences", "s--")
    for name, colour in CLOZE_COLOURS.items():
        draw_curve(cloze, lines, ["topic_cloze", name, "accuracy"], colour, name, "s--" if "->" in name else "o-")
    training.set(title="training loss", ylabel="nats per target")
    held_out.set(title="held-out loss", ylabel="nats per target")
    cloze.set(title="Topic-Cloze along the way", ylabel="% right (chance: 50)")
    for axes in (training, held_out, cloze):
        axes.set_xlabel("optimizer step")
        axes.set_title(axes.get_title(), pad=16)  # above the names of stages
        mark_stages(axes, lines)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def draw_curve(axes, lines, keys, colour, label, style="o-"):
    """A curve over steps of line[keys[0]][keys[1]].., of those lines that have such a number."""
    points = []
    for line in lines:
        value = line
        for key in keys:
            value = value.get(key) if value else None
        if value is not None:
            points.append((line["step"], value))
    if points:
        axes.plot(*zip(*points), style, color=colour, markersize=4, label=label)


def mark_stages(axes, lines):
    """A vertical line with the name of the stage where a stage of training begins."""
    before = None
    for line in lines:
        if line["stage"] != before:
            before = line["stage"]
            axes.axvline(line["step"], color="0.8", linewidth=1, zorder=0)
            axes.text(line["step"], 1.01, before, color="0.4", fontsize=8, va="bottom",
                      transform=axes.get_xaxis_transform())


FIGURES = dict(segmentation=segmentation, weights=weights, dimension=dimension, overlap=overlap, scaling=scaling)


def main(argv):
    if len(argv) != 1 or Path(argv[0]).suffix not in (".json", ".jsonl"):
        raise SystemExit("python -m tools.figures FILE   draws a json of analyze.py or the log.jsonl of a run")
    path = Path(argv[0])
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise SystemExit(f"{path}: no such file")
        loss_curves(path.parent)
        print(f"drawn: {path.parent / 'loss.png'}")
        return
    try:
        draw(path)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"drawn: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main(sys.argv[1:])
