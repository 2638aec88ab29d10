"""evaluate.py and benchmarks/: scoring against plain forward passes, each task on data whose result is known."""
import csv
import io
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

import data
import evaluate
from benchmarks import hear, report, sblimp, storycloze
from model import Config, SmolTolk, from_pretrained, save_pretrained
from runtime import datasets
from runtime.distributed import ALONE
from runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
V, UNITS = 50, 10  # text ids 0..49, units 50..59, speech EOS 60, switch 61
TINY = Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, n_units=UNITS, initializer_range=0.2, max_position_embeddings=64)


def tiny_model(**overrides):
    torch.manual_seed(0)
    model = SmolTolk(Config(**{**vars(TINY), **overrides})).eval()
    for layer in [*model.input_adapter, *model.output_adapter]:  # they start as the identity, which would hide them
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.3)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.3)
    return model


@torch.no_grad()
def by_hand(model, sequence, span=None):
    """ln p of the tokens of a span, from the logits of a plain forward pass of this sequence; without switch tokens."""
    first, end = span or (1, len(sequence))
    out = model(torch.tensor([sequence[:end - 1]]))
    logits = model.text_logits(out.text[0]), model.speech_logits(out.speech[0])
    logp = torch.cat([of_modality.log_softmax(-1) for of_modality in logits], 1)  # its columns are in id order
    return [float(logp[t - 1, sequence[t]]) for t in range(first, end) if sequence[t] != model.config.switch]


@pytest.mark.parametrize("siblings", [1, 2, 4])
@pytest.mark.parametrize("row", [10, 60, 1000])
def test_sequences_in_one_row_score_as_alone(siblings, row, monkeypatch):
    """They share beginnings of any length. A row of theirs may be longer than the context of the model."""
    monkeypatch.setattr(evaluate, "ROW", row)
    model, rng = tiny_model(), np.random.default_rng(siblings)
    sequences, spans = [], []
    for _ in range(12):
        beginning = rng.integers(0, 62, 40).tolist()
        for _ in range(siblings):
            sequence = beginning[:rng.integers(0, 41)] + rng.integers(0, 62, rng.integers(2, 25)).tolist()
            first = int(rng.integers(1, len(sequence)))
            sequences.append(sequence)
            spans.append((first, int(rng.integers(first + 1, len(sequence) + 1))))
    sequences += sequences[-1:] * siblings + [[1, 2], [1, 2, 3], [1, 2, 3, 4]]  # one begins as the other ends
    spans += spans[-1:] * siblings + [(1, 2), (1, 3), (2, 4)]
    expected = [by_hand(model, sequence, span) for sequence, span in zip(sequences, spans)]
    for batch_tokens in (20, 1000):
        total, count = evaluate.log_likelihood(model, sequences, spans, batch_tokens)
        np.testing.assert_allclose(total, [sum(values) for values in expected], atol=1e-4)
        assert count.tolist() == [len(values) for values in expected]
        assert len(set(total[-siblings - 3:-3])) == 1  # equal sequences score exactly equal


def test_rows_read_each_beginning_once():
    """Each sequence is found on its path, each beginning of a row once, and a full row is followed by another."""
    sequences = [[0, 5, 6, 7], [0, 5, 8, 9], [0, 8, 2], [0, 5, 6, 7]]
    [row] = evaluate.make_rows(sequences, [(1, 4), (2, 4), (1, 3), (3, 4)], range(4))
    assert (row.ids, row.subtree_end) == ([0, 5, 6, 8, 8], [4, 3, 2, 3, 4])
    assert sorted(row.scored) == [(0, [0, 1, 2]), (1, [1, 3]), (2, [0, 4]), (3, [2])]
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 3, rng.integers(2, 12)).tolist() for _ in range(300)]
    spans = [(1, len(sequence)) for sequence in sequences]
    rows = evaluate.make_rows(sequences, spans, range(300))
    assert sum(len(row.ids) for row in rows) < sum(map(len, sequences)) / 2 and len(rows) > 1
    for row in rows:
        assert len(row.ids) <= evaluate.ROW + 2 * 10
        paths = [[i for i in range(at + 1) if row.subtree_end[i] >= at] for at in range(len(row.ids))]
        assert len({tuple(row.ids[i] for i in path) for path in paths}) == len(paths)
        assert all(positions == paths[positions[-1]] for _, positions in row.scored)
        assert all([row.ids[i] for i in positions] == sequences[number][:-1] for number, positions in row.scored)
    assert sorted(number for row in rows for number, _ in row.scored) == [*range(300)]


def test_scores_are_those_of_transformers(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer(smollm2_folder / "tokenizer.json")
    texts = ["Who should Derek hug after shocking Richard?", "Who should Derek hug Richard after shocking?"]
    sequences = [[0, *tokenizer.encode(text)] for text in texts]
    ours, spans = from_pretrained(smollm2_folder).eval(), [(1, len(sequence)) for sequence in sequences]
    total, _ = evaluate.log_likelihood(ours, sequences, spans)
    for sequence, score in zip(sequences, total):
        with torch.no_grad():
            logp = theirs(torch.tensor([sequence])).logits[0].log_softmax(-1)
        assert score == pytest.approx(float(logp[range(len(sequence) - 1), sequence[1:]].sum()), rel=1e-5)


# a model whose log-likelihoods are known

def nll_of(token):
    """-ln p of a token under `Known`, after any context."""
    return 1 + token % 7 / 8


class Known:
    """Stands in for a model: every token has a fixed NLL. Remembers all beginnings of the sequences that it read."""

    def __init__(self, config, nll=nll_of):
        self.config, self.nll, self.seen = config, nll, set()
        self.to = self.eval = lambda *_: self

    def parameters(self):
        yield torch.zeros(1)

    def named_parameters(self):
        yield "model.norm.weight", torch.zeros(1_000_000)

    def read(self, ids, subtree_end, speaks):
        for row, ends in zip(ids.tolist(), subtree_end.tolist()):
            for at in range(len(row)):
                self.seen.add(tuple(token for token, end in zip(row[:at + 1], ends) if end >= at))
        nothing = torch.zeros(*ids.shape, 1)
        return SimpleNamespace(text=nothing, speech=nothing)

    def text_logits(self, targets):
        """Not the logits but the NLL of these targets. The fixture replaces model.nll, which would call it."""
        return self.nll(targets)

    def speech_logits(self, targets):
        return self.nll(targets + self.config.vocab_size)


@pytest.fixture
def world(tmp_path, demo_folder, monkeypatch):
    """A checkpoint folder whose model is Known. Sound files hold their units as text: "5 6 7"."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("tokenizer.json", "units/units.json"):
        shutil.copy(demo_folder / file, folder)
    for stem in ("model", "speech"):
        (folder / f"{stem}.safetensors").touch()
    tokenizer = Tokenizer(folder / "tokenizer.json")
    known = Known(Config(vocab_size=tokenizer.vocab_size, n_units=30))

    def ids_of(units):
        return [known.config.vocab_size + int(unit) for unit in units.split()]

    def run(task, *arguments):
        """(results, items) of one task, by default on the files in tmp_path/task."""
        out, place = tmp_path / "e.json", [] if task in ("librispeech", "text") else [f"--{task}={tmp_path / task}"]
        evaluate.main([f"--checkpoint={folder}", f"--tasks=['{task}']", f"--out={out}", "--device=cpu", *place,
                       *arguments])
        results = json.loads(out.read_text())
        names = results["made"][task]["items"]
        return results, {name: np.load(report.item_path(out, task, name)) for name in names}

    def hear_units(evaluator, files):
        evaluator.used += files
        return [ids_of(Path(file).read_text()) for file in files]

    def write(files):
        """Write {path under tmp_path: text}."""
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    def score(text="", units=""):
        """Summed and mean log-likelihood of a text or of units."""
        values = [-nll_of(i) for i in tokenizer.encode(text) + ids_of(units)]
        return sum(values), sum(values) / len(values)

    monkeypatch.setattr(evaluate, "from_pretrained", lambda path: known)
    monkeypatch.setattr(evaluate, "nll", lambda x, head, n_symbols, targets: head(targets))
    monkeypatch.setattr(evaluate, "pack_weights", lambda model, rows: None)  # these models have no weights
    for module in (sblimp, storycloze):
        monkeypatch.setattr(module, "hear_files", hear_units)
    return SimpleNamespace(folder=folder, tmp=tmp_path, known=known, tokenizer=tokenizer, run=run, write=write,
                           score=score, ids_of=ids_of)


def better(a, b):
    return float(a > b) + 0.5 * float(a == b)


def as_csv(header, rows):
    file = io.StringIO()
    csv.writer(file).writerows([header.split(), *rows])
    return file.getvalue()


# the benchmarks

PAIRS = [("The cat sat.", "The cat sit.", "syntax", "a"), ("A dog runs", "A dog run", "syntax", "a"),
         ("same", "same", "morphology", "b"), ("One two three", "Two", "morphology", "b"),
         ("x y", "z", "semantics", "c")]


def blimp_files(pairs):
    files = {}
    for good, bad, field, uid in pairs:
        item = dict(sentence_good=good, sentence_bad=bad, field=field, linguistics_term="t", UID=uid)
        files[f"blimp/{uid}.jsonl"] = files.get(f"blimp/{uid}.jsonl", "") + json.dumps(item) + "\n"
    return files


def test_blimp(world):
    world.write(blimp_files(PAIRS))
    by_sum, by_mean = ([better(world.score(good)[m], world.score(bad)[m]) for good, bad, *_ in PAIRS] for m in (0, 1))
    assert by_sum != by_mean and by_sum[2] == by_mean[2] == 0.5
    results, items = world.run("blimp")
    blimp = results["blimp"]
    assert items["right"].tolist() == by_sum and blimp["items"] == 5
    assert blimp["accuracy"] == pytest.approx(100 * np.mean(by_sum))
    assert blimp["stderr"] == pytest.approx(100 * np.std(by_sum) / 5 ** 0.5)
    assert blimp["by_mean"] == pytest.approx(100 * np.mean(by_mean))
    assert blimp["by_paradigm"]["a"]["accuracy"] == pytest.approx(100 * np.mean(by_sum[:2]))
    assert (world.tokenizer.eos, *world.tokenizer.encode("A dog")) in world.known.seen
    for ties, tied in (("wrong", 0), ("first", 1)):
        _, items = world.run("blimp", "--protocol.blimp.score=mean", f"--protocol.blimp.ties={ties}")
        assert items["right"].tolist() == [tied if x == 0.5 else x for x in by_mean]


QUESTIONS = [("high_school_biology", "What runs?", "a cat", "the dog", "it", "stone and water", "B"),
             ("high_school_biology", "Why, then?", "no", "yes", "no", "it is so because it is so", "D"),
             ("anatomy", "Where \"is\" it?\nHere?", "in the knee", "one", "one", "a foot of 12", "2")]
MMLU = "subject question A B C D answer"


def test_mmlu(world):
    (world.tmp / "mmlu.csv.xz").write_bytes(lzma.compress(as_csv(MMLU, QUESTIONS).encode()))
    expected = {"acc": [], "acc_norm": []}
    for _, _, *choices, answer in QUESTIONS:
        sums = np.array([world.score(" " + choice)[0] for choice in choices])
        for name, scores in ("acc", sums), ("acc_norm", sums / [len(choice) for choice in choices]):
            best = [i for i in range(4) if scores[i] == max(scores)]
            expected[name].append(("ABCD0123".find(answer) % 4 in best) / len(best))
    assert expected["acc"] != expected["acc_norm"]
    results, items = world.run("mmlu", f"--mmlu={world.tmp / 'mmlu.csv.xz'}", f"--before={world.folder}")
    for name, right in expected.items():
        assert items[f"{name}.right"].tolist() == right
        over_subjects = (np.mean(right[:2]) + right[2]) / 2
        assert results["mmlu"][name]["accuracy"] == pytest.approx(100 * over_subjects)
    prompt = 'The following are questions about high school biology.\nQuestion: What runs?\nAnswer:'
    assert (*world.tokenizer.encode(prompt), *world.tokenizer.encode(" the")) in world.known.seen  # and no EOS
    value = results["mmlu"]["acc_norm"]["accuracy"]
    assert report.table_7_row(results)[-1] == f"{value:.1f} / {value:.1f}"  # after and before speech training


def sblimp_files(sentences):
    """sentences: (id, voice, type, correct, units). The names of the files are in another order than gold.csv."""
    files, rows = {}, []
    for i, (key, voice, kind, correct, units) in enumerate(sentences):
        files[f"sblimp/syntactic/dev/x{i * 37 % 101:03}.wav"] = units
        rows.append((key, f"x{i * 37 % 101:03}", voice, kind, "sub", correct, "some words"))
    return files | {GOLD: as_csv("id filename voice type subtype correct transcription", rows)}


GOLD = "sblimp/syntactic/dev/gold.csv"
SPOKEN = [(1, "A", "agreement", 1, "1 2 3"), (1, "A", "agreement", 0, "4 5 6 7"), (1, "B", "agreement", 0, "9 9"),
          (1, "B", "agreement", 1, "9 9"), (2, "A", "island", 0, "3 8 1"), (2, "A", "island", 1, "5 6 12 20 20 20"),
          (3, "A", "agreement", 1, "0 7"), (3, "A", "agreement", 0, "6 13 6")]


def test_sblimp(world):
    """A pair is averaged over its voices; then come means over pairs, over types and over voices."""
    world.write(sblimp_files(SPOKEN))
    means = [world.score(units=units)[1] for *_, units in SPOKEN]
    answers = [better(means[0], means[1]), 0.5, better(means[5], means[4]), better(means[6], means[7])]
    pairs = [(answers[0] + 0.5) / 2, answers[2], answers[3]]
    results, items = world.run("sblimp")
    dev = results["sblimp"]["dev"]
    assert sorted(items["dev.right"]) == sorted(pairs) and dev["items"] == 3
    assert dev["accuracy"] == pytest.approx(100 * np.mean(pairs))
    assert dev["by_type_mean"] == pytest.approx(100 * np.mean([np.mean([pairs[0], pairs[2]]), pairs[1]]))
    assert dev["by_voice"]["B"] == dict(accuracy=50, stderr=0, items=1) and dev["by_voice"]["A"]["items"] == 3
    submitted = dict(line.split(" ") for line in (world.tmp / "e.sblimp.dev.txt").read_text().splitlines())
    assert {name: float(score) for name, score in submitted.items()} == pytest.approx(
        {f"x{i * 37 % 101:03}": mean for i, mean in enumerate(means)})
    # EOS and all units but the last are read; the EOS at the end is not scored.
    assert (world.known.config.speech_eos, *world.ids_of("4 5 6")) in world.known.seen


STORIES = {"bear": [("A bear slept.", "1 2 3"), ("It was winter.", "4 5"), ("It sang to nobody", "6 6 7 8")],
           "fox": [("The fox ran.", "9"), ("Away.", "10 11 12"), ("Away.", "10 11 12")],
           "owl": [("An owl.", "3 2"), ("Night came on at ten", "13 13 6"), ("Day", "5")]}


def story_files():
    files = {}
    for name, parts in STORIES.items():
        for part, contents in zip(("mutual", "correct", "incorrect"), parts):
            files |= {f"tstorycloze/{name}_{part}{end}": text for end, text in zip((".txt", ".wav"), contents)}
    return files


def test_stories_of_twist(world):
    twist = {"0_story-0_a_correct.wav": "1 2 3 4", "1_story-0_a_incorrect.wav": "1 2 9 11 5", "2_correct.wav": "7 8",
             "3_incorrect.wav": "8 7", "4_c_correct.wav": "14 21 13 13", "5_c_incorrect.wav": "14 21 14"}
    world.write({f"sstorycloze/{name}": units for name, units in twist.items()})
    means = [world.score(units=units)[1] for units in twist.values()]
    results, items = world.run("sstorycloze")
    assert items["S.right"].tolist() == [better(*both) for both in zip(means[::2], means[1::2])]
    assert items["S.tokens"].tolist() == [4, 5, 2, 2, 4, 3]  # all of the story, and no EOS
    assert set(results["sstorycloze"]) == {"S"} and results["made"]["sstorycloze"]["notes"]["span"] == "whole"


def test_files_behind_links_and_with_other_endings(world):
    """Endings in capitals, a BOM, a blank line at the end; what is no part of a story is counted and named."""
    world.write({f"elsewhere/{name.split('/')[1].upper()}": text for name, text in story_files().items()})
    for path in (world.tmp / "elsewhere").iterdir():
        path.rename(path.with_stem(path.stem.lower()))
    (world.tmp / "tstorycloze").mkdir()
    (world.tmp / "tstorycloze/more").symlink_to(world.tmp / "elsewhere")
    world.write({"tstorycloze/README.txt": "Read me", "tstorycloze/notes.pdf": ""})
    results, items = world.run("tstorycloze")
    assert len(items["S.right"]) == len(items["T.right"]) == len(STORIES)
    left_out = results["made"]["tstorycloze"]["left_out"]
    assert left_out["number"] == 2 and {Path(path).name for path in left_out["first"]} == {"README.txt", "notes.pdf"}


def test_the_prefix_of_the_release(world):
    """S->T: the last ids of another story's text with its EOS, drawn anew for each ending, no EOS before, no switch."""
    config, stories = Config(vocab_size=50, n_units=10), []
    for i in range(4):
        stories.append([dict(text=[10 * i + part] * 7, speech=[50 + part]) for part in range(3)])
    protocol = dict(prefix=10, bos=True, span="continuation")
    drawn = set()
    for seed in range(20):
        sequences, spans = storycloze.story_sequences(stories, "S->T", protocol, config, seed)
        for number, (sequence, (a, b)) in enumerate(zip(sequences, spans)):
            i, which = divmod(number, 2)
            other = sequence[0] // 10
            assert other != i and sequence[:10] == [10 * other] * 2 + [10 * other + 1] * 7 + [0]
            assert sequence[10:] == [50, config.switch, *[10 * i + 1 + which] * 7] and sequence[a:b] == sequence[-7:]
            drawn.add((number, other))
    assert len(drawn) == 8 * 3  # each other story for each ending
    for setting in ("T", "S", "T->S"):
        assert storycloze.story_sequences(stories, setting, protocol, config) == \
            storycloze.story_sequences(stories, setting, protocol | dict(prefix=0), config)
    with pytest.raises(ValueError, match="prefix needs more than one story"):
        storycloze.story_sequences(stories[:1], "S->T", protocol, config)


def test_stories_in_four_settings(world):
    world.write(story_files())
    written, spoken = [], []
    for _, right, wrong in STORIES.values():
        written.append(better(world.score(" " + right[0])[1], world.score(" " + wrong[0])[1]))
        spoken.append(better(world.score(units=right[1])[1], world.score(units=wrong[1])[1]))
    results, items = world.run("tstorycloze")
    assert items["T.right"].tolist() == items["S->T.right"].tolist() == written and written[1] == 0.5
    assert items["S.right"].tolist() == items["T->S.right"].tolist() == spoken and spoken != written
    config, encode, units = world.known.config, world.tokenizer.encode, world.ids_of("1 2 3")
    expected = {(0, *encode("A bear slept."), *encode(" It")),
                (0, *encode("A bear slept."), config.switch, *world.ids_of("4")),
                (config.speech_eos, *units, config.switch, *encode(" It was")),
                (config.speech_eos, *units, *world.ids_of("4"))}
    assert expected <= world.known.seen
    world.known.seen.clear()
    assert report.table_7_row(results)[5:9] == [f"{100 * np.mean(x):.1f}" for x in (written, spoken, spoken, written)]
    documents = [([encode(" " * (i > 0) + text)], [[int(unit) for unit in units.split()]])
                 for parts in STORIES.values() for i, (text, units) in enumerate(parts)]
    datasets.write_set(world.tmp / "cloze", "paired", documents, world.tokenizer, dict(n_units=30, rate=25, hash="u"))
    cloze_set = datasets.open_set(world.tmp / "cloze")  # the same stories as a paired set
    answers = {setting: right.tolist() for setting, right in evaluate.topic_cloze(world.known, cloze_set).items()}
    assert answers == {"T": written, "S": spoken, "T->S": spoken, "S->T": written} and expected <= world.known.seen
    assert evaluate.topic_cloze(world.known, cloze_set, items=[2, 1])["T"].tolist() == [written[2], written[1]]
    (world.folder / "speech.safetensors").unlink()
    assert set(world.run("tstorycloze")[0]["tstorycloze"]) == {"T"}  # a text model does not listen


BAD_INPUT = [
    ("blimp", {"blimp/a.jsonl": '{"sentence_good": "a"}'}, "a.jsonl:1: not an item of BLiMP .sentence_bad"),
    ("mmlu", {"mmlu": as_csv(MMLU, [QUESTIONS[0], ("s", "q", "a", "", "c", "d", "A")])}, "item 2: not an item of MMLU"),
    ("sblimp", sblimp_files(SPOKEN + SPOKEN[:1]), "gold.csv:10: a second row for .* or .'agreement'"),
    ("sblimp", sblimp_files(SPOKEN[:-1]), "gold.csv: missing the counterpart of .'agreement'"),
    ("sblimp", {GOLD: sblimp_files(SPOKEN)[GOLD], "sblimp/syntactic/dev/x000.wav": "1"}, "x037.wav: missing, though"),
    ("sstorycloze", {"sstorycloze/1_correct.wav": "1"}, "1_correct.wav: misnamed"),
    ("tstorycloze", story_files() | {"tstorycloze/fox_correct.txt": " \n"}, "fox_correct.txt: empty text"),
    ("tstorycloze", story_files() | {"tstorycloze/a_mutual.wav": "1"}, "a_correct.wav: missing"),
    ("tstorycloze", story_files() | {"tstorycloze/a_correct.txt": "A"}, "a_mutual.txt: missing"),
    ("tstorycloze", story_files() | {f"tstorycloze/a_{part}.wav": "1" for part in ("mutual", "correct", "incorrect")},
     "a_correct: as .wav or as .txt alone"),
    ("blimp", {"blimp/a.jsonl": "\n"}, "blimp: no items in its .jsonl files"),
    ("text --protocol.sstorycloze.prefix=-1", {}, "protocol.sstorycloze.prefix=-1: give 0, or the number"),
    ("text --dtype=float16", {}, "dtype=float16: choose float32 or bfloat16"),
    ("text --protocol.blimp.ties=some", {}, "protocol.blimp.ties=some: choose share or wrong or first"),
    ("text --versus=nowhere", {}, "nowhere: no checkpoint here"), ("text", {}, "text has no data; set --text")]


@pytest.mark.parametrize("arguments, files, message", BAD_INPUT, ids=[message for *_, message in BAD_INPUT])
def test_bad_input_is_named(world, arguments, files, message):
    world.write(files)
    with pytest.raises(SystemExit, match=message):
        world.run(*arguments.split())


def test_nll_per_unit_and_per_token(world, demo_folder):
    world.known.config.max_position_embeddings = 48  # so that documents are read in windows
    units = dict(n_units=30, rate=25, hash=json.loads((world.folder / "units.json").read_text())["hash"])
    rng = np.random.default_rng(0)
    spoken = [rng.integers(0, 30, n).tolist() for n in (3, 47, 48, 49, 200)]
    datasets.write_set(world.tmp / "dev", "speech", spoken, units=units)
    results, items = world.run("librispeech", f"--librispeech=['{world.tmp / 'dev'}']")
    expected = [sum(nll_of(world.known.config.vocab_size + u) for u in document) for document in spoken]  # no EOS
    assert items["tokens"].tolist() == list(map(len, spoken)) and results["librispeech"]["documents"] == 5
    np.testing.assert_allclose(items["nll"], expected)
    assert results["librispeech"]["nll"] == pytest.approx(sum(expected) / sum(map(len, spoken)))
    assert max(map(len, world.known.seen)) == 48
    val = datasets.open_set(demo_folder / "val")
    mean = np.mean([nll_of(int(token)) for token in val.text if token != 0])
    results, _ = world.run("text", f"--text=['{demo_folder / 'val'}']")  # a paired set, by its text
    assert results["text"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)


@pytest.mark.parametrize("kind", ["text", "speech", "interleaved"])
def test_heldout_nll_is_that_of_plain_rows(demo_folder, kind):
    val = datasets.open_set(demo_folder / "val")
    model = tiny_model(vocab_size=val.meta["text"]["vocab_size"], n_units=30)
    source = data.open_source(kind, [demo_folder / "val"])
    parts = [evaluate.heldout_nll(model, {kind: source}, 1, 7, 24, batch_tokens=60, rank=rank, world_size=2)[kind]
             for rank in range(2)]
    rows = data.sample({kind: source}, {kind: 1}, 1, evaluate.VALIDATION, np.arange(7), 25, model.config)
    expected = np.zeros(4)
    for row in rows.tolist():
        targets = [token for token in row[1:] if token != model.config.switch]
        for target, logp in zip(targets, by_hand(model, row), strict=True):
            expected += [-logp, 0, 1, 0] if target < model.config.vocab_size else [0, -logp, 0, 1]
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-5)


def test_mcnemar_and_bootstrap_agree_with_their_formulas():
    rng = np.random.default_rng(0)
    a, b = (rng.random((2, 40)) < [[0.7], [0.4]]).astype(float)
    only, other = int((a > b).sum()), int((a < b).sum())
    found = report.compare(a, b)
    p = min(1.0, 2 * binom.cdf(min(only, other), only + other, 0.5))
    assert found["test"] == "McNemar" and found["p"] == pytest.approx(p) and p < 1
    a, b = rng.normal(0.06, 1, 2000), rng.normal(0, 1, 2000)
    found, difference = report.compare(a, b, resamples=5000), a - b
    z = difference.mean() / (difference.std() / len(a) ** 0.5)
    assert found["test"] == "bootstrap" and found["p"] == pytest.approx(2 * norm.sf(abs(z)), abs=0.03)
    assert report.compare(a, a)["p"] == 1


def test_versus(world, monkeypatch):
    """The second model is scored too, or its results are read. Both must be scored in the same way."""
    world.write(blimp_files(PAIRS))
    ours = world.run("blimp")[1]["right"]
    models = {"model": world.known, "other": Known(world.known.config, lambda targets: 4 - nll_of(targets))}
    monkeypatch.setattr(evaluate, "from_pretrained", lambda path: models[path.name])
    monkeypatch.setattr(evaluate, "pack_weights", lambda model, rows: None)
    shutil.copytree(world.folder, world.tmp / "other")
    results, _ = world.run("blimp", f"--versus={world.tmp / 'other'}")
    theirs = np.load(world.tmp / "e.versus.items/blimp.right.npy")
    assert results["versus"]["scores"]["blimp"]["difference"] != 0
    assert results["versus"]["scores"]["blimp"]["difference"] == pytest.approx(100 * (ours - theirs).mean())
    with pytest.raises(SystemExit, match="blimp has other protocol"):
        world.run("blimp", f"--versus={world.tmp / 'e.versus.json'}", "--protocol.blimp.score=mean")


def test_units_are_kept_by_content_not_by_place(tmp_path, monkeypatch):
    def encode(waves):
        assert not torch.is_autocast_enabled("cpu")  # units are made in fp32
        return [(np.full(wave, wave, np.uint16), None) for wave in waves]

    vocabulary = SimpleNamespace(hash="h", encode=encode)
    monkeypatch.setattr("speech.units.load_units", lambda *_: vocabulary)
    monkeypatch.setattr("speech.audio.read_audio", lambda path: int(path.read_text()))

    def units_in(*names):
        options = SimpleNamespace(cache=str(tmp_path / "cache"), units="u")
        evaluator = SimpleNamespace(settings=options, used=[], made_with=(None, "h"), world=ALONE,
                                    model=SimpleNamespace(config=TINY))
        with torch.autocast("cpu", torch.bfloat16):
            return hear.hear_files(evaluator, [tmp_path / name for name in names])

    for name, n in (("x/1", 3), ("y/0", 2), ("flat/1", 3), ("flat/0", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(str(n))
    assert units_in("x/1", "y/0") == [[V + 3] * 3, [V + 2] * 2]
    monkeypatch.setattr(vocabulary, "encode", None)  # from here on, only what was kept can be used
    assert units_in("flat/0", "flat/1") == [[V + 2] * 2, [V + 3] * 3]


def test_spoken_pairs_under_hiss(tmp_path):
    """Only the speakers that are named are used. Both sentences of a pair are as loud against their hiss."""
    soundfile = pytest.importorskip("soundfile")
    from corpora import demo
    from speech.espeak import espeak
    from studies.small import spoken_blimp

    for name, lines in blimp_files(PAIRS * 3).items():
        (tmp_path / "blimp").mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines)
    spoken_blimp.main([f"--source={tmp_path / 'blimp'}", f"--out={tmp_path / 'spoken'}", "--pairs=4", "--workers=1",
                       "--speakers=[1, 5]", "--hiss=true"])
    levels = {}
    for row in sblimp.read(tmp_path / "spoken/syntactic/dev/gold.csv"):
        heard, _ = soundfile.read(tmp_path / f"spoken/syntactic/dev/{row['filename']}.wav")
        clean, _ = espeak(row["transcription"], *demo.SPEAKERS[int(row["voice"][1:])])
        level = 10 * np.log10((clean**2).sum() / ((heard - clean) ** 2).sum())
        levels.setdefault((row["subtype"], row["id"], row["voice"]), []).append(level)
    assert {voice for *_, voice in levels} == {"s1", "s5"} and len(levels) == 8
    assert all(abs(a - b) < 0.5 and 4.5 < a < 15.5 for a, b in levels.values())
    assert np.std([a for a, _ in levels.values()]) > 1


def test_two_processes_score_as_one(world, demo_folder, monkeypatch):
    """On real sound, with torchrun: the same scores, and the same units in the cache."""
    pytest.importorskip("soundfile")
    monkeypatch.undo()
    model = tiny_model(vocab_size=world.tokenizer.vocab_size, n_units=30, max_position_embeddings=2048)
    save_pretrained(model, world.folder)
    world.write(blimp_files(PAIRS * 3) | sblimp_files(SPOKEN))
    for i, wav in enumerate(sorted((world.tmp / "sblimp/syntactic/dev").glob("*.wav"))):
        shutil.copy(demo_folder / f"wavs/{i % 4}.wav", wav)
    arguments = [f"--checkpoint={world.folder}", f"--blimp={world.tmp / 'blimp'}", f"--sblimp={world.tmp / 'sblimp'}",
                 f"--cloze={demo_folder / 'cloze'}", f"--units={demo_folder / 'units'}", "--device=cpu",
                 "--batch_tokens=200"]
    evaluate.main([*arguments, f"--out={world.tmp / '1.json'}", f"--cache={world.tmp / 'cache1'}"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "evaluate.py"), *arguments, f"--out={world.tmp / '2.json'}",
               f"--cache={world.tmp / 'cache2'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((world.tmp / f"{n}.json").read_text()) for n in (1, 2))
    assert set(one["made"]) == {"blimp", "sblimp", "topic_cloze"} and two["processes"] == 2
    for task, made in one["made"].items():
        assert made["files"] == two["made"][task]["files"]
        for name in made["items"]:
            a, b = (np.load(report.item_path(world.tmp / f"{n}.json", task, name)) for n in (1, 2))
            np.testing.assert_allclose(b, a, rtol=1e-6, err_msg=f"{task} {name}")
    [kept1], [kept2] = ([*(world.tmp / cache).iterdir()] for cache in ("cache1", "cache2"))
    assert kept1.name == kept2.name and kept1.read_bytes() == kept2.read_bytes()
