"""
Draw pictures (png): of the results of analyze.py, of the log of a training run, or of a recording.

    python -m tools.figures out/train_tiny/analysis/segmentation.json      draws segmentation.png in the same folder
    python -m tools.figures out/train_tiny/log.jsonl                       draws loss.png in the same folder

A json of analyze.py holds the command that wrote it, the settings, and the results for each model. A model has the same
colour in all pictures: the first model in --checkpoint has the first of COLOURS, and so on.
"""
import itertools
import json
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from runtime.files import reading
from runtime.log import flat, read_log

# The palette of Okabe and Ito. Colour-blind readers can tell its colours apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
TEXT, SPEECH = COLOURS[:2]
CLOZE_COLOURS = {"T": TEXT, "S": SPEECH, "T->S": COLOURS[4], "S->T": COLOURS[2]}
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.fontsize": 8,
                            "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})


def draw(path):
    """Draw the results in a json of analyze.py as a png in the same folder. Raises ValueError for any other file."""
    path = Path(path)
    with reading(path):
        results = json.loads(path.read_text())
    if not isinstance(results, dict) or results.get("command") not in FIGURES:
        raise ValueError(f"{path}: not a json of analyze.py, whose command is one of {', '.join(FIGURES)}")
    FIGURES[results["command"]](results).savefig(path.with_suffix(".png"), dpi=110)


def model_colours(results):
    return dict(zip(results["models"], itertools.cycle(COLOURS)))


def select(rows, **values):
    """The rows (dicts) that have all the given values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def column(rows, key):
    """The values under one key, float [rows]."""
    return np.array([row[key] for row in rows], float)


def whole_numbers(axis):
    """Put the ticks of an x or y axis at whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True))


def line_over_layers(axes, mean, low, high, colour, label, speech):
    """Draw a line over layers 0..L with a band: solid with dots for speech, dashed with squares for text."""
    axes.plot(mean, "o-" if speech else "s--", color=colour, markersize=4, label=label)
    axes.fill_between(range(len(mean)), low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("layer (0: input to the backbone)")
    whole_numbers(axes.xaxis)


# ---------------------------------------------------------------------------------------------------------------------
# a recording

def utterance(path, waveform, vocabulary, words, ends, seconds=4.0):
    """Draw the first seconds of a recording: waveform, spectrogram, units and words on one time axis.

    waveform: float [n] at 16 kHz; vocabulary: from load_units; words: strings; ends: the end of each word in seconds.
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
    panels = figure.subplots(4, 1, sharex=True, gridspec_kw=dict(height_ratios=[2, 5, 1, 1]))
    wave, mel, row, names = panels
    wave.plot(np.arange(len(waveform)) / SAMPLE_RATE, waveform, linewidth=0.4)
    wave.set_title(textwrap.shorten(" ".join(words), 225, placeholder=" ..."), fontsize=9)
    extent = (0, len(energies) * STEP / SAMPLE_RATE, 0, energies.shape[1])
    mel.imshow(energies.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
    for unit, start, end in zip(ids.tolist(), times, times[1:]):
        row.axvspan(start, end, color=matplotlib.colormaps["tab20"](unit % 20))
        if start < seconds:
            row.text((start + min(end, seconds)) / 2, 0.5, str(unit), ha="center", va="center", fontsize=7)
    for word, start, end in zip(words, times[offsets], times[offsets[1:]]):
        if start < end and start < seconds:
            names.text((start + min(end, seconds)) / 2, 0.5, word, ha="center", va="center", fontsize=9)
        for axes in panels:
            axes.axvline(end, color="white" if axes is mel else "black", linewidth=1)
    for axes, label in zip(panels, ("waveform", "mel channel", "units", "words")):
        axes.set_ylabel(label)
        axes.grid(False)
    for axes in (row, names):
        axes.set_yticks([])
    names.set(xlabel="seconds", xlim=(0, seconds))
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# results of analyze.py: one function for each command, from its json as a dict to a Figure

def segmentation(results):
    """R-values of all methods, the tuning of the last layer's threshold, and the R-values of all layers."""
    within, colours = results["rows"][0]["within"], model_colours(results)
    rows = select(results["rows"], within=within, matching="nearest")
    best = max(select(rows, model=""), key=lambda row: row["r_value"])  # best method without a model
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    bars, tuning, layers = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    draw_r_values(bars, [row for row in rows if not row["model"] or "the last" in row["method"]], colours)
    bars.set_title(f"word boundaries within {within}, nearest matching; grey: no model")
    for name, colour in colours.items():
        by_layer = select(rows, model=name)  # from the last layer to the first
        style = dict(color=colour, markersize=4, label=name)
        tuning.plot(by_layer[0]["settings"], by_layer[0]["validation"], "o-", **style)
        layers.plot(range(len(by_layer), 0, -1), column(by_layer, "r_value"), "o-", **style)
    for axes, value in ((tuning, max(best["validation"])), (layers, best["r_value"])):
        axes.axhline(value, color="0.4", linestyle=":", label="best grey method")
        axes.legend()
    tuning.set(xlabel="least prominence of a peak", ylabel="R-value, %", title="tuning: last layer, validation split")
    layers.set(xlabel="layer", ylabel="R-value, %", title="omega of each layer, test split")
    whole_numbers(layers.xaxis)
    return figure


def draw_r_values(axes, rows, colours):
    """Draw a bar for each row, with the method on the left and the scores on the right."""
    for i, row in enumerate(rows):
        axes.barh(i, max(0, row["r_value"]), xerr=row["r_value_stderr"], color=colours.get(row["model"], "0.78"))
        axes.text(103, i, f"R {row['r_value']:.1f}, F1 {row['f1']:.1f}", va="center", fontsize=9)
    names = [f"{row['model']}\n{row['method']}".strip() for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set(xlabel="R-value on the test split, % (± standard error)", xlim=(0, 125), xticks=range(0, 101, 20))
    axes.grid(False, axis="y")
    axes.invert_yaxis()


def weights(results):
    """For each model: omega along an utterance, phi, and the distribution of omega (see SmolTolk.pool in model.py)."""
    colours, omega_at = model_colours(results), results["settings"]["omega_at"]
    unit = dict(read="the unit that was read last", predicted="the unit that comes next")[omega_at]
    figure = Figure(figsize=(16, 9 * len(colours)), layout="constrained")
    parts = figure.subfigures(len(colours), 1, squeeze=False)[:, 0]
    for part, (name, model) in zip(parts, results["models"].items()):
        height = min(4, 2 + len(model["phi"]) / 15)
        axes = part.subplot_mosaic([["map"] * 3, ["last"] * 3, ["phi", "spread", "around"]],
                                   height_ratios=[height, 2.5, 3])
        image = draw_omega(axes["map"], axes["last"], model["utterance"], colours[name])
        part.colorbar(image, ax=[axes["map"], axes["last"]], label="omega", pad=0.01)
        axes["map"].set_title(f"{name}: the layer selector's weights along an utterance")
        axes["last"].set_xlabel(f"position in units (omega belongs to {unit}; vertical lines: a word begins)")
        draw_statistics(axes["phi"], axes["spread"], axes["around"], model, colours[name])
    return figure


def draw_omega(above, below, utterance, colour):
    """Draw omega of all layers as an image, and of the last layer as a line below the words. Returns the image."""
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
        if begin < min(end, n):  # the word has units, and its first one is drawn
            above.axvline(begin - 0.5, color="white", linewidth=1)
            below.axvline(begin - 0.5, color="0.4", linewidth=1)
            below.text(begin - 0.4, top, word, fontsize=7, va="bottom", rotation=65)
    return image


def draw_statistics(phi, spread, around, model, colour):
    """Draw phi as bars, quantiles of omega as boxes, and the mean omega of the last layer near word boundaries."""
    layers = range(1, len(model["phi"]) + 1)
    phi.bar(layers, model["phi"], color=colour)
    phi.axhline(1 / len(layers), color="0.4", linestyle=":", label="uniform")
    phi.set(xlabel="layer", ylabel="softmax(phi)", title="phi: what the selector looks at")
    quantiles = zip(*model["omega_quantiles"].values())  # 0.05, 0.25, 0.5, 0.75 and 0.95 of each layer
    boxes = [dict(zip(["whislo", "q1", "med", "q3", "whishi"], values)) for values in quantiles]
    spread.bxp(boxes, positions=layers, showfliers=False, patch_artist=True, widths=0.5, manage_ticks=False,
               boxprops=dict(facecolor=colour, alpha=0.5), medianprops=dict(color="black"))
    spread.set(xlabel="layer", ylabel="omega", title=f"omega over {model['units']:,} units: quartiles, 5-95%")
    means, errors = model["last_layer_around_boundaries"], model["last_layer_around_boundaries_stderr"]
    around.errorbar([int(shift) for shift in means], means.values(), errors.values(), fmt="o-", color=colour)
    around.axhline(model["omega_mean"][-1], color="0.4", linestyle=":", label="mean over all units")
    around.set(xlabel="units after a word's first unit", ylabel=f"omega of layer {len(layers)}",
               title="last layer around word boundaries (± standard error)")
    for axes in (phi, spread):
        whole_numbers(axes.xaxis)
    for axes in (phi, around):
        axes.legend()


def dimension(results):
    """The intrinsic dimension over layers at the chosen scales; below, for each model and modality, over all scales."""
    colours = model_colours(results)
    figure = Figure(figsize=(13, 4.5 + 3.4 * len(colours)), layout="constrained")
    grid = figure.add_gridspec(1 + len(colours), 2, height_ratios=[4.5] + [3.4] * len(colours))
    main = figure.add_subplot(grid[0, :])
    for (i, name), modality in itertools.product(enumerate(colours, start=1), ["text", "speech"]):
        rows = select(results["rows"], model=name, modality=modality)
        title, speech = f"{name}, {modality}", modality == "speech"
        if not rows:  # a text model has no speech
            continue
        chosen = select(rows, chosen=1)  # a row for each layer
        mean, deviation = column(chosen, "dimension"), column(chosen, "deviation")
        # Where most points are equal, as embeddings of the last token may be, the dimension has no meaning.
        mean[2 * column(chosen, "distinct") < results["models"][name][modality]["points"]] = np.nan
        line_over_layers(main, mean, mean - deviation, mean + deviation, colours[name], title, speech)
        draw_scales(figure.add_subplot(grid[i, int(speech)]), rows, title)
    main.set(ylabel="intrinsic dimension", ylim=(0, None),
             title="GRIDE at the scale chosen for each layer: mean and standard deviation over batches")
    main.legend()
    return figure


def draw_scales(axes, rows, title):
    """The dimension over all scales, a line for each layer. The legend names at most seven of them."""
    last = rows[-1]["layer"]
    for layer in range(last + 1):
        of_layer, shade = select(rows, layer=layer), matplotlib.colormaps["viridis"](0.9 * layer / max(1, last))
        is_named = layer % (last // 6 + 1) == 0 or layer == last
        axes.plot(column(of_layer, "n"), column(of_layer, "dimension"), color=shade,
                  label=f"layer {layer}" if is_named else None)
        chosen = select(of_layer, chosen=1)
        axes.plot(column(chosen, "n"), column(chosen, "dimension"), "o", color=shade)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="neighbour rank n", ylabel="intrinsic dimension", ylim=(0, None),
             title=f"{title}: over scale (dots: the scale chosen)")
    axes.legend(ncols=2)


def overlap(results):
    """How much of one modality's variance the principal components of the other modality explain, over layers."""
    colours, k = model_colours(results), results["settings"]["components"]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    for axes, (a, b) in zip(figure.subplots(1, 2, sharey=True), [("speech", "text"), ("text", "speech")]):
        for name, colour in colours.items():
            other = select(results["rows"], model=name, variance_of=a, components_of=b)
            own = select(results["rows"], model=name, variance_of=a, components_of=a)
            share, low, high = (100 * column(other, key) for key in ("share", "low", "high"))
            line_over_layers(axes, share, low, high, colour, name, a == "speech")
            axes.plot(100 * column(own, "share"), ":", color=colour)
        axes.plot([], ":", color="0.4", label=f"{a}'s own components")
        for share in np.unique(column(results["rows"], "random_subspace")):
            axes.axhline(100 * share, color="0.4", linestyle="-.", label=f"a random subspace: {100 * share:.0f}%")
        axes.set(ylabel=f"% of {a} variance explained", ylim=(0, 103),
                 title=f"{a} variance in the top {k} components of {b} (band: 95% bootstrap)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)  # lines fill all corners
    return figure


def scaling(results):
    """Each metric against training FLOPs and against training tokens, a line for each run."""
    names, colours = results["settings"]["metrics"].split(","), model_colours(results)
    figure = Figure(figsize=(4.2 * len(names), 7), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False)
    labels = [("flops", "training compute, FLOPs"), ("tokens", "training tokens")]
    for axes, ((key, label), name) in zip(grid.flat, itertools.product(labels, names)):
        rows = [row for row in select(results["rows"], metric=name) if row[key] > 0]  # the axis is logarithmic
        for run, colour in colours.items():
            line = select(rows, run=run)
            axes.plot(column(line, key), column(line, "value"), "o-", color=colour, markersize=4, label=run)
        kind = "nats per target" if "nll" in name else "% right" if "accuracy" in name else name
        axes.set(xlabel=label, ylabel=kind, title=name, xscale="log")
        several_decades = column(rows, key).max() > 100 * column(rows, key).min()
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if several_decades else (1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+0", "e").replace("e+", "e"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].legend()
    return figure


def lens(results):
    """The mean reciprocal rank of each target over layers, with a panel for each model."""
    names, colours = list(results["models"]), [*COLOURS[:3], "0.4"]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)  # of panels
    figure = Figure(figsize=(max(7.5, 1 + 3.8 * columns), 1 + 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes, name in itertools.zip_longest(panels, names):
        if name is None:  # the last line is not full
            axes.remove()
            continue
        rows = select(results["rows"], model=name)
        for colour, target in zip(colours, dict.fromkeys(row["target"] for row in rows)):
            of_target = select(rows, target=target)
            mrr, error = column(of_target, "mrr"), column(of_target, "mrr_stderr")
            line_over_layers(axes, mrr, mrr - error, mrr + error, colour, target, target != "permutation")
        axes.set(title=name, ylim=(0, None))
    figure.supylabel("mean reciprocal rank of the first text token", fontsize=10)
    figure.suptitle("logit lens: what the text head finds at the last unit of a spoken word (band: ± standard error)",
                    fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# the curves of a training run

def loss_curves(out_dir):
    """Draw a run's log.jsonl as loss.png in the same folder."""
    losses(read_log(out_dir)).savefig(Path(out_dir) / "loss.png", dpi=110)


def losses(lines):
    """Training loss, held-out loss and Topic-Cloze over steps. lines: the lines of log.jsonl, as dicts."""
    lines = [flat(line) | dict(stage=line["stage"]) for line in lines]
    figure = Figure(figsize=(15, 4), layout="constrained")
    training, held_out, cloze = figure.subplots(1, 3, sharex=True)
    for name, colour in (("text", TEXT), ("speech", SPEECH)):
        draw_curve(training, lines, f"{name}_nll", "-", colour, f"{name} targets")
        draw_curve(held_out, lines, f"nll/{name}/{name}", "o-", colour, f"{name} sequences")
        draw_curve(held_out, lines, f"nll/interleaved/{name}", "s--", colour, f"{name} in interleaved sequences")
    for name, colour in CLOZE_COLOURS.items():
        draw_curve(cloze, lines, f"topic_cloze/{name}/accuracy", "s--" if "->" in name else "o-", colour, name)
    training.set(title="training loss", ylabel="nats per target")
    held_out.set(title="held-out loss", ylabel="nats per target")
    cloze.set(title="Topic-Cloze during training", ylabel="% right (chance: 50)")
    for axes in (training, held_out, cloze):
        axes.set_xlabel("optimizer step")
        axes.set_title(axes.get_title(), pad=16)  # above the names of stages
        mark_stages(axes, lines)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def draw_curve(axes, lines, key, style, colour, label):
    """Draw line[key] over steps, from the lines that have this key."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        axes.plot(*zip(*points), style, color=colour, markersize=4, label=label)


def mark_stages(axes, lines):
    """Draw a vertical line with the name of the stage wherever a stage of training begins."""
    for stage, of_stage in itertools.groupby(lines, key=lambda line: line["stage"]):
        step = next(of_stage)["step"]
        axes.axvline(step, color="0.8", linewidth=1, zorder=0)
        axes.text(step, 1.01, stage, color="0.4", fontsize=8, va="bottom", transform=axes.get_xaxis_transform())


def study_bars(rows, path):
    """Draw Topic-Cloze of the rows of study.json: a bar at each run's mean, and a point for each seed."""
    settings = [name for name in CLOZE_COLOURS if name != "T"]  # all runs solve T
    figure = Figure(figsize=(13, 1.6 + 0.38 * len(rows)), layout="constrained")
    lowest = min(score for row in rows for name in settings for score in row["settings"][name]["scores"])
    panels = figure.subplots(1, 3, sharey=True)
    for axes, name in zip(panels, settings):
        for y, row in enumerate(rows):
            cell = row["settings"][name]
            axes.barh(y, cell["mean"] - 50, left=50, color=CLOZE_COLOURS[name], alpha=0.35 if y else 0.7)
            axes.plot(cell["scores"], [y] * len(cell["scores"]), "o", color="black", markersize=3.5)
        axes.axvline(50, color="0.4", linewidth=1)
        axes.set(title=name, xlabel="% right (chance: 50)", xlim=(min(45, lowest - 2), 100))
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(rows)), [row["what"] for row in rows])
    panels[0].invert_yaxis()
    figure.suptitle("Topic-Cloze: mean over seeds (bars), each seed (points)")
    figure.savefig(path, dpi=110)


FIGURES = dict(segmentation=segmentation, weights=weights, dimension=dimension, overlap=overlap, scaling=scaling,
               lens=lens)


def main(argv):
    if not argv or {"-h", "--help"} & set(argv):
        return print(__doc__)
    if len(argv) != 1 or Path(argv[0]).suffix not in (".json", ".jsonl"):
        raise SystemExit("python -m tools.figures FILE   draws a json of analyze.py or the log.jsonl of a run")
    path = Path(argv[0])
    if not path.is_file():
        raise SystemExit(f"{path}: no such file")
    try:
        if path.suffix == ".json":
            draw(path)
        else:
            loss_curves(path.parent)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"drawn: {path.with_suffix('.png') if path.suffix == '.json' else path.with_name('loss.png')}")


if __name__ == "__main__":
    main(sys.argv[1:])
