"""
The pictures of docs/walkthrough.ipynb, and readable names for its symbols. Nothing here belongs to the method.
"""
from itertools import groupby
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from model import Config
from runtime.tokenizer import Tokenizer
from speech.audio import SAMPLE_RATE
from speech.mel import log_mel
from tools.figures import COLOURS, SPEECH, TEXT, draw_omega

SMOLTOLK, GREY = COLOURS[2], "#444444"
plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "figure.constrained_layout.use": True})


class Symbols(NamedTuple):
    """What the ids of a model stand for."""
    config: Config
    tokenizer: Tokenizer

    def kind(self, i):
        """"text", "speech" or "switch"."""
        return "switch" if i == self.config.switch else "speech" if i >= self.config.vocab_size else "text"

    def name(self, i):
        special = {self.config.switch: "SWITCH", self.config.speech_eos: "speech EOS",
                   self.config.eos_token_id: "text EOS"}
        if i in special:
            return special[i]
        return repr(self.tokenizer.decode([i])) if self.kind(i) == "text" else f"unit {i - self.config.vocab_size}"

    def runs(self, ids):
        """(kind, ids) of each run of symbols of one kind."""
        return [(kind, list(run)) for kind, run in groupby(ids, self.kind)]


def recording(waveform, vocabulary, units, begins, words, offsets, seconds):
    """Waveform, spectrogram, units and words on one time axis. For units, begins and offsets see speech/units.py."""
    figure, panels = plt.subplots(4, 1, figsize=(10, 4), sharex=True, height_ratios=[2, 4, 1, 1])
    wave, mel, boxes, names = panels
    wave.plot(np.arange(len(waveform)) / SAMPLE_RATE, waveform, linewidth=0.4, color=GREY)
    mel.imshow(log_mel(waveform).T, origin="lower", aspect="auto", extent=(0, len(waveform) / SAMPLE_RATE, 0, 40),
               cmap="magma")
    times = np.append(begins / vocabulary.rate, len(waveform) / SAMPLE_RATE)
    for unit, start, end in zip(units.tolist(), times, times[1:]):
        boxes.axvspan(start, end, color=matplotlib.colormaps["tab20"](unit % 20))
        boxes.text((start + end) / 2, 0.5, str(unit), ha="center", va="center", fontsize=6, clip_on=True)
    for word, start, end in zip(words, times[offsets], times[offsets[1:]]):
        names.text((start + end) / 2, 0.5, word, ha="center", va="center", fontsize=8, clip_on=True)
        for axes in panels:
            axes.axvline(end, color="white" if axes is mel else "black", linewidth=1)
    for axes, label in zip(panels, ("waveform", "mel channel", "units", "words")):
        axes.set_ylabel(label)
        axes.grid(False)
    for axes in (wave, boxes, names):
        axes.set_yticks([])
    names.set(xlabel="seconds", xlim=(0, seconds))


def colour_runs(axes, ids, symbols):
    """Colour the background of a plot over positions by the kinds of symbols."""
    for i, symbol in enumerate(ids):
        if symbols.kind(symbol) != "switch":
            colour = TEXT if symbols.kind(symbol) == "text" else SPEECH
            axes.axvspan(i - 0.5, i + 0.5, color=colour, alpha=0.15, linewidth=0, zorder=0)
    axes.set(xlim=(-0.5, len(ids) - 0.5), xlabel="position (blue: text, orange: speech, white: switch token)")
    axes.grid(False)


def masks(seen, within_run, ids, symbols):
    """The two attention masks [T, T] side by side."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 4))
    for axes, mask, title in zip(panels, (seen, within_run), ("backbone and output adapter", "input adapter")):
        axes.imshow(mask, cmap=ListedColormap(["none", GREY]), interpolation="nearest", zorder=1)
        colour_runs(axes, ids, symbols)
        axes.set(title=f"{title} (dark: attends)", ylabel="position that attends",
                 xlabel="position that is attended to\n(blue: text, orange: speech)")


def bars(values, ids, symbols, label):
    """One bar for each position."""
    figure, axes = plt.subplots(figsize=(8, 2))
    axes.bar(range(len(values)), values, color=GREY, width=0.8)
    colour_runs(axes, ids, symbols)
    axes.set_ylabel(label)


def word_knowledge(by_model):
    """A line for each model, from z over z' to the last layer."""
    figure, axes = plt.subplots(figsize=(5, 2.6))
    for (name, values), style, colour in zip(by_model.items(), ("o-", "s--"), (SMOLTOLK, GREY)):
        labels = ["z", "z'", *(f"c({layer})" for layer in range(1, len(values) - 1))]
        axes.plot(labels, values, style, color=colour, label=name)
    axes.set(ylabel="nearest vector is\nthe same word, %", ylim=(0, 100))
    axes.legend()


def layer_weights(omega, phi, words, offsets, n_words):
    """omega [units, L] along the first words, and softmax(phi) [L]."""
    figure = plt.figure(figsize=(9, 3.4))
    axes = figure.subplot_mosaic([["map", "phi"], ["last", "phi"]], width_ratios=[5, 1])
    utterance = dict(omega=omega[:offsets[n_words]], words=words[:n_words], offsets=offsets[:n_words + 1])
    image = draw_omega(axes["map"], axes["last"], utterance, SMOLTOLK)
    figure.colorbar(image, ax=axes["map"], label="omega", pad=0.01)
    axes["last"].set(xlabel="position in units (vertical lines: a word begins)", ylabel=f"omega of layer {len(phi)}")
    layers = range(1, len(phi) + 1)
    axes["phi"].barh(layers, phi, color=SMOLTOLK)
    axes["phi"].set(title="softmax(phi)", ylabel="layer", yticks=layers, xlim=(0, 1))


def cloze(margins, accuracy):
    """Two panels of bars, from {model: {setting: value}}."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3))
    for axes, values in zip(panels, (margins, accuracy)):
        for shift, colour, (name, by_setting) in zip((-0.2, 0.2), (SMOLTOLK, GREY), values.items()):
            axes.bar(np.arange(4) + shift, by_setting.values(), 0.38, color=colour, label=name)
        axes.set_xticks(range(4), by_setting)
    panels[0].set(title="this item: true minus wrong ending", ylabel="nats per symbol")
    panels[0].axhline(0, color="black", linewidth=1)
    panels[1].set(title="the first 100 items", ylabel="% right")
    panels[1].axhline(50, color="black", linestyle=":", linewidth=1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
