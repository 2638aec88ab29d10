"""
One HTML page, without network or framework, that shows what a model makes of some spoken stories.

    python -m tools.page --checkpoint=assets/tiny/smoltolk --versus=assets/tiny/baseline --out=docs/page.html

The page plays a story. Words and units light up in time, beside the layer weights omega and the surprise of each unit.
Below, text and speech take turns, and two endings race in log-likelihood, as in Topic-Cloze. --versus adds a second
model. The stories are sounds with word times, as tools/assets.py makes them. tools/page.html is the template.
"""
import base64
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import report, storycloze
from benchmarks.hear import check_units
from configurator import configure
from evaluate import DEFAULTS as EVALUATION
from evaluate import newest_checkpoint, topic_cloze
from model import from_pretrained, make_layout
from runtime.checkpoint import demo_of, made_with
from runtime.datasets import open_set
from runtime.files import read_json
from runtime.tokenizer import Tokenizer

checkpoint = "assets/tiny/smoltolk"  # folder of a run or of a model
versus = ""                          # folder of a second model to compare with
stories = "assets/tiny/stories"      # folder with NUMBER.flac and NUMBER.json; NUMBER counts the documents of --data
data = ""                            # the paired set with these stories; "": the demo's test
cloze = ""                           # Topic-Cloze set, whose item NUMBER is cut from the story; "": the demo's
units = ""                           # folder of the speech units; "": the demo's
items = 500                          # Topic-Cloze items for the table of both models; 0: no such table
out = "page.html"                    # file to write
DEFAULTS = dict(checkpoint=checkpoint, versus=versus, stories=stories, data=data, cloze=cloze, units=units,
                items=items, out=out)
GUESSES = 4                          # most likely tokens that are shown at a switch to text


# ---------------------------------------------------------------------------------------------------------------------
# what a model says about a sequence

@torch.no_grad()
def read(model, ids):
    """(Output, surprise of ids[1:]) for a list of ids. The surprise is -ln p, and None for a switch token."""
    inputs, targets = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    layout = make_layout(inputs, targets, model.config)
    if max(ids) < model.config.vocab_size:
        layout = layout._replace(speech=None)
    out, surprise = model(inputs, targets, layout), [None] * (len(ids) - 1)
    for positions, nll in ((layout.text, out.text_nll), (layout.speech, out.speech_nll)):
        for position, value in zip([] if positions is None else positions.tolist(), nll.tolist()):
            surprise[position] = round(value, 4)
    return out, surprise


@torch.no_grad()
def best_tokens(model, out, position, tokenizer):
    """[[token, probability]] of the most likely text tokens after a position."""
    values, ids = model.text_logits(out.text[0, position]).softmax(-1).topk(GUESSES)
    labels = {model.config.eos_token_id: "(end)"}
    return [[labels.get(i, tokenizer.decode([i]).strip()), round(p, 3)] for p, i in zip(values.tolist(), ids.tolist())]


# ---------------------------------------------------------------------------------------------------------------------
# the parts of a story

class Story:
    """A document of a paired set with its sound.

    words      list of strings
    ends       the end of each word in seconds
    text       [[ids of word 1], [ids of word 2] ..], text tokens of each word
    speech     the same with units, in the model's id space
    """

    def __init__(self, sound, test, vocabulary, config):
        from speech.audio import read_audio

        about = read_json(sound.with_suffix(".json"))
        self.number, self.words, self.ends, self.opening = (about[k] for k in ("number", "words", "ends", "opening"))
        text, units, *offsets = test.document(self.number)
        [(heard, first_frames)] = vocabulary.encode([read_audio(sound)])
        if not np.array_equal(heard, units[:-1]):
            raise ValueError(f"{sound}: does not give the units of document {self.number} in {test.folder}")
        self.starts = (first_frames / vocabulary.rate).round(3).tolist()
        self.text, self.speech = ([part.tolist() for part in np.split(ids, edges[1:-2])] for ids, edges in
                                  zip((text[:-1].astype(int), units[:-1] + config.vocab_size), offsets))
        self.audio = f"data:audio/{sound.suffix[1:]};base64,{base64.b64encode(sound.read_bytes()).decode()}"

    def sentences(self):
        """[(first word, end)] of each sentence."""
        ends = [i + 1 for i, word in enumerate(self.words) if word.endswith((".", "!", "?"))]
        return list(zip([0, *ends], ends))

    def take_turns(self, first, config):
        """(ids, positions of switch tokens): its sentences in turn as text and as speech. first: the first modality."""
        ids, switches = [config.eos_token_id if first == "text" else config.speech_eos], []
        modalities = itertools.cycle(("text", "speech") if first == "text" else ("speech", "text"))
        for (start, end), modality in zip(self.sentences(), modalities):
            if start:
                switches.append(len(ids))
                ids.append(config.switch)
            ids += itertools.chain(*getattr(self, modality)[start:end])
        return ids, switches


def name_symbols(ids, config, tokenizer):
    """[[modality, label]] of ids."""
    labels = []
    for i in ids:
        if i == config.switch:
            labels.append(["switch", ""])
        elif i < config.vocab_size:
            labels.append(["text", tokenizer.decode([i])])
        else:
            labels.append(["speech", str(i - config.vocab_size)])
    return labels


def view(model, story, endings, tokenizer):
    """What one model says about a story -> a dict for the page. endings: the story as an item of Topic-Cloze."""
    c = model.config
    heard, seen = ([eos, *itertools.chain(*parts)] for eos, parts in
                   ((c.speech_eos, story.speech), (c.eos_token_id, story.text)))
    out, speech = read(model, heard + [c.speech_eos])
    omega = None if out.log_omega is None else out.log_omega[0, 1:].exp().numpy().round(3).tolist()
    turns = {}
    for first in ("text", "speech"):
        ids, switches = story.take_turns(first, c)
        mixed, surprise = read(model, ids)
        turns[first] = dict(surprise=surprise, guesses={at: best_tokens(model, mixed, at, tokenizer) for at in switches
                                                        if ids[at + 1] < c.vocab_size})
    race = {}
    for setting in report.SETTINGS:
        sequences, spans = storycloze.story_sequences([endings], setting, EVALUATION["protocol"]["topic_cloze"], c)
        race[setting] = [read(model, ids)[1][a - 1:b - 1] for ids, (a, b) in zip(sequences, spans)]
    return dict(omega=omega, speech=speech[:-1], text=read(model, seen)[1], turns=turns, race=race)


def name_of(model, folder):
    """How the page calls a model."""
    c = model.config
    if not (c.input_adapter_layers or c.output_adapter_layers or c.residual) and c.layer_pooling == "last":
        return "vocabulary expansion"
    return "SmolTolk" if c.input_adapter_layers and c.output_adapter_layers else Path(folder).name


def collect(settings):
    """All that the page shows -> a dict. ValueError names the file and the fault."""
    from speech.units import load_units

    folders = [newest_checkpoint(folder) for folder in (settings.checkpoint, settings.versus) if folder]
    demo = demo_of(folders[0])
    units, hashes = settings.units or f"{demo}/units", made_with(folders[0])
    for folder in folders:
        check_units(units, folder)
    models, vocabulary = [from_pretrained(folder).eval() for folder in folders], load_units(units)
    tokenizer, config = Tokenizer(folders[0] / "tokenizer.json"), models[0].config
    test, cloze_set = (open_set(folder, *hashes) for folder in
                       (settings.data or f"{demo}/test", settings.cloze or f"{demo}/cloze"))
    sounds = sorted(path.with_suffix(".flac") for path in Path(settings.stories).glob("*.json"))
    if not sounds:
        raise ValueError(f"{settings.stories}: no NUMBER.json here; python -m tools.assets makes such a folder")
    shown = []
    for sound in sounds:
        story = Story(sound, test, vocabulary, config)
        [endings] = storycloze.paired_stories(cloze_set, config, [story.number])
        turns = {first: name_symbols(story.take_turns(first, config)[0][1:], config, tokenizer)
                 for first in ("text", "speech")}
        shown.append(dict(
            number=story.number, words=story.words, ends=story.ends, opening=story.opening, audio=story.audio,
            units=[i - config.vocab_size for i in itertools.chain(*story.speech)], starts=story.starts,
            word_of_unit=[w for w, ids in enumerate(story.speech) for _ in ids],
            tokens=name_symbols([*itertools.chain(*story.text)], config, tokenizer), turns=turns,
            endings=[tokenizer.decode(ending["text"]).strip() for ending in endings[1:]],
            views=[view(model, story, endings, tokenizer) for model in models]))
    items = min(settings.items, cloze_set.meta["documents"] // 3)
    answers = [topic_cloze(model, cloze_set, 512, range(items)) for model in models if items]
    right = [{setting: 100 * values.mean() for setting, values in by_setting.items()} for by_setting in answers]
    return dict(models=[name_of(*pair) for pair in zip(models, folders)], layers=config.num_hidden_layers,
                settings=report.SETTINGS, stories=shown, accuracy=dict(items=items, right=right),
                start=next((i for i, story in enumerate(shown) if models_differ(story["views"])), 0))


def models_differ(views):
    """Whether the models choose different endings in some setting. Such a story is shown first."""
    chosen = [[np.mean(right) < np.mean(wrong) for right, wrong in view["race"].values()] for view in views]
    return chosen.count(chosen[0]) < len(chosen)


def main(argv):
    settings = SimpleNamespace(**configure(DEFAULTS, argv, described_in=[__file__])[0])
    try:
        contents = collect(settings)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = template.replace("PAGE_DATA", json.dumps(contents).replace("<", "\\u003c"))  # no tag inside a script
    Path(settings.out).write_text(page, encoding="utf-8")
    print(f"{settings.out}: {len(contents['stories'])} stories, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
