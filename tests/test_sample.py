"""sample.py: caches against the uncached forward pass, generation against plain loops and transformers, prompts."""
import functools
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import ABLATIONS, PAGE, TINY, both_logits, interleaved, make

import sample
from model import Config, SmolTolk, from_pretrained, new_cache, save_pretrained
from speech.mel import fit_mel_units, mel_frames, save_mel_units, voice
from speech.units import load_units, resynthesise

LENGTH = 30
MODELS = [make(**overrides) for overrides in ABLATIONS]


# the cache

@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(seed):
    """Prompts of unlike lengths are padded on the left, read in several chunks and then symbol by symbol."""
    m, rng = MODELS[seed % len(MODELS)], np.random.default_rng(seed)
    ids = interleaved(3, LENGTH, seed)
    if seed % 3 == 0:  # rows that change modality anywhere, without switch tokens too
        ids = torch.from_numpy(rng.integers(0, 62, ids.shape))
    start = rng.integers(0, LENGTH, 3)
    padded = torch.from_numpy(rng.integers(0, 62, ids.shape))  # the padding may be anything
    for row, n in enumerate(start):
        padded[row, n:] = ids[row, :LENGTH - n]
    cache = new_cache(m, torch.from_numpy(start), LENGTH + int(rng.integers(0, 6)))
    cuts = sorted({*rng.integers(1, LENGTH, 3), *range(rng.integers(1, LENGTH), LENGTH)})
    parts = [both_logits(m, chunk, cache=cache) for chunk in padded.tensor_split(cuts, 1)]
    for cached, uncached in zip(zip(*parts), both_logits(m, ids)):
        cached = torch.cat(cached, 1)
        for row, n in enumerate(start):
            torch.testing.assert_close(cached[row, n:], uncached[row, :LENGTH - n], atol=1e-4, rtol=0)


# generation

def by_hand(m, opening, plan, pick):
    """One row without a cache: all is read again for each symbol. Returns the ids of each part."""
    ids, made = list(opening), []
    for part, (modality, n) in enumerate(plan):
        ids += [TINY.switch] * (part > 0)
        made.append([])
        for _ in range(n):
            with torch.no_grad():
                text_logits, speech_logits = both_logits(m, torch.tensor([ids]))
            symbol = int(pick((text_logits if modality == "text" else speech_logits)[:, -1]))
            if symbol == (TINY.eos_token_id if modality == "text" else TINY.n_units):
                break
            made[-1].append(symbol)
            ids.append(symbol if modality == "text" else TINY.vocab_size + symbol)
    return made


def collect(m, openings, plan, pick, **options):
    """The ids of each part of each row that sample.generate yields."""
    made = [[[] for _ in plan] for _ in openings]
    for part, symbols in sample.generate(m, openings, plan, pick, **options):
        for row, symbol in zip(made, symbols, strict=True):
            row[part] += [] if symbol is None else [symbol]
    return made


def test_generation_against_a_plain_loop():
    """Batches of unlike prompts. Parts end by EOS in some rows and by length in others."""
    ended = set()
    for seed in range(24):
        m, rng = MODELS[seed % len(MODELS)], np.random.default_rng(seed)
        plan = [(("text", "speech")[(seed + part) % 2], int(rng.integers(1, 10))) for part in range(1 + seed % 4)]
        openings = [interleaved(1, 20, seed + i)[0, :rng.integers(1, 20)].tolist() for i in range(1 + seed % 3)]
        words, units = (torch.from_numpy(rng.normal(0, 1, n)).float() for n in (50, 11))
        words[0] = words.max() - 1  # so that EOS is the likeliest at times

        def pick(logits, words=words, units=units):
            return (logits + (words if logits.size(-1) == 50 else units)).argmax(-1)
        made = collect(m, openings, plan, pick)
        assert made == [by_hand(m, opening, plan, pick) for opening in openings]
        ended.update((modality, len(ids) < n) for row in made for ids, (modality, n) in zip(row, plan))
    assert ended == {("text", True), ("text", False), ("speech", True), ("speech", False)}


def test_a_compiled_step_gives_the_same_symbols(monkeypatch):
    """One graph for each modality serves all steps of all parts."""
    graphs, compile_of_torch = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile_of_torch(f, backend=backend, **options))
    plan, openings = [("text", 9), ("speech", 8), ("text", 7), ("speech", 6)], [[1, 2, 3], [60, 52, 53, 61]]
    made = [collect(MODELS[0], openings, plan, lambda logits: logits[:, 1:-1].argmax(-1) + 1, compiled=compiled)
            for compiled in (False, True)]  # never EOS
    assert made[0] == made[1] and len(graphs) == 2


def test_greedy_text_is_that_of_transformers(smollm2_folder):
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM
    ids = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(PAGE).ids[:40]
    [[ours]] = collect(from_pretrained(smollm2_folder).eval(), [ids], [("text", 60)],
                       functools.partial(sample.draw, temperature=0))
    llama = LlamaForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    with torch.no_grad():  # the likeliest token after each beginning of our text is what it would generate itself
        theirs = llama(torch.tensor([ids + ours])).logits[0, len(ids) - 1:-1].argmax(-1)
    assert ours == theirs.tolist() and len(ours) == 60


@pytest.mark.parametrize("options, kept", [
    (dict(), [0, 1, 2, 3, 4]), (dict(top_k=3), [0, 2, 3]), (dict(top_p=0.7), [2, 3]), (dict(top_k=2, top_p=0.5), [2])])
def test_draws_have_the_right_frequencies(options, kept):
    logits, n, state = torch.tensor([0.3, -1.0, 2.0, 1.5, -9.0]), 40_000, torch.get_rng_state()
    p = torch.zeros(5)
    p[kept] = (logits[kept] / 0.7).softmax(-1)
    one, again = (sample.draw(logits.expand(n, -1), 0.7, **options, generator=torch.Generator().manual_seed(1))
                  for _ in range(2))
    assert (one.bincount(minlength=5) / n - p).abs().max() < 0.012  # five standard errors
    assert set(one.tolist()) <= set(kept) and torch.equal(one, again)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


# the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights with tokenizer and mel units, a text model, and files of sound and of units."""
    demo, soundfile = pytest.importorskip("corpora.demo"), pytest.importorskip("soundfile")
    path, rng = tmp_path_factory.mktemp("sample"), np.random.default_rng(0)
    model = path / "model"
    model.mkdir()
    demo.train_tokenizer([PAGE, "Ünï ¿dé? 你好 😀"] * 3, 400, model / "tokenizer.json")
    noise = np.repeat(rng.normal(0, 0.2, 40), 1600)[:60_000].astype(np.float32)
    sounds = [noise * np.sin(np.arange(60_000, dtype=np.float32) * 2 * k) for k in (1, 2, 3)]
    for name, seed in (("other", 1), ("units", 0)):
        frames = [mel_frames(sound) for sound in sounds]
        save_mel_units(str(path / name), fit_mel_units(frames, 12, seed, voices=[voice(sounds[0])]))
    shutil.copy(path / "units/units.json", model)
    torch.manual_seed(0)
    vocab_size = sample.Tokenizer(model / "tokenizer.json").vocab_size
    config = Config(**{**vars(TINY), "vocab_size": vocab_size, "n_units": 12, "max_position_embeddings": 200})
    save_pretrained(SmolTolk(config), model)
    shutil.copytree(model, path / "text", ignore=shutil.ignore_patterns("speech.safetensors"))
    for name, sound in dict(said=sounds[0], hum=np.full(16000, 0.3), click=sounds[0][:300]).items():
        soundfile.write(path / f"{name}.wav", sound, 16000)  # a constant is silence too
    np.save(path / "units.npy", np.array([3, 3, 4, 11, 11, 0], np.uint16))
    for name, ids in dict(few=[5, 6, 7], high=[5, 12], long=[1, 2] * 100).items():
        (path / f"{name}.json").write_text(json.dumps(ids))
    for name in ("tale.txt", "tale"):
        (path / name).write_text("Once upon a time.")
    return path


def talk(folder, capsys, tmp_path, *args):
    """(standard output, standard error) of sample.py; its speech goes to tmp_path/answer*.wav."""
    sample.main([f"--checkpoint={folder / 'model'}", f"--units={folder / 'units'}", f"--out={tmp_path / 'answer.wav'}",
                 "--device=cpu", *(arg.replace("@", f"{folder}/") for arg in args)])
    return tuple(capsys.readouterr())


@pytest.mark.parametrize("prompt", [["--prompt=It is a truth"], ["--prompt=@said.wav"],
                                    ["--prompt=@units.npy", "--dtype=bfloat16"]])
def test_speech_comes_as_a_wav_and_its_units(folder, capsys, tmp_path, prompt):
    import soundfile
    text, _ = talk(folder, capsys, tmp_path, *prompt, "--to=speech:40", "--temperature=1.5")
    ids = json.loads((tmp_path / "answer.json").read_text())
    waveform, rate = soundfile.read(tmp_path / "answer.wav")
    assert 0 < len(ids) <= 40 and set(ids) <= set(range(12)) and text == ""
    assert rate == 16000 and len(waveform) == len(resynthesise(ids, load_units(folder / "units")))
    talk(folder, capsys, tmp_path, f"--prompt={tmp_path}/answer.json", "--to=text:3")  # and is a prompt again


def test_text_streams_in_whole_characters(folder, capsys, tmp_path, monkeypatch):
    tokenizer, pieces = sample.Tokenizer(folder / "model/tokenizer.json"), []
    ids = tokenizer.encode("é 😀 truth 你") + [tokenizer.encode("😀")[0]]  # the last character is cut
    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", lambda *_: [(0, [i]) for i in [*ids, None]])
        patch.setattr(sys, "stdout", SimpleNamespace(write=pieces.append, flush=lambda: None))
        talk(folder, capsys, tmp_path, "--to=text")
    assert "".join(pieces) == tokenizer.decode(ids) + "\n" == "é 😀 truth 你\ufffd\n"
    assert "😀" in pieces and sum("\ufffd" in piece for piece in pieces) == 1


def test_the_seed_decides_and_a_text_model_needs_no_speech_modules(folder, capsys, tmp_path):
    runs = ["--seed=1"], ["--seed=1"], ["--seed=2"], ["--seed=1", "--checkpoint=@text"]
    one, again, other, of_text_model = (talk(folder, capsys, tmp_path, "--to=text:30", *args)[0] for args in runs)
    assert one == again == of_text_model != other


def test_back_and_forth_and_a_batch(folder, capsys, tmp_path):
    """Each row of a batch says what it says alone. Files are numbered by row and part."""
    args = ["--temperature=0", "--to=speech:9,text:8,speech:7"]
    prompts = ["--prompt=It is", "--prompt=@said.wav", "--prompt=@few.json"]
    lines = talk(folder, capsys, tmp_path, *prompts, *args)[0].splitlines()
    for row, prompt in enumerate(prompts, 1):
        alone = tmp_path / str(row)
        alone.mkdir()
        assert f"[{row}] {talk(folder, capsys, alone, prompt, *args)[0]}" == lines[row - 1] + "\n"
        for part, at_most in ((1, 9), (3, 7)):
            one, batched = alone / f"answer-{part}.json", tmp_path / f"answer-{row}-{part}.json"
            assert one.exists() == batched.exists() == one.with_suffix(".wav").exists()
            if one.exists():
                ids = json.loads(one.read_text())
                assert ids == json.loads(batched.read_text()) and len(ids) <= at_most
    assert list(tmp_path.glob("answer-?-3.wav"))


@pytest.mark.parametrize("name, form", [("NOTE.WAV", "WAV"), ("note.oga", "OGG"), ("note.Aiff", "AIFF"), ("n.au", "AU"),
                                        ("note.caf", "CAF"), ("note", "FLAC"), ("Dear Anna.", "WAV"), ("n.mp3", "MP3")])
def test_a_file_of_sound_is_heard_whatever_its_name(folder, capsys, tmp_path, monkeypatch, name, form):
    import soundfile
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes((folder / "said.wav").read_bytes())
    said, _ = soundfile.read(folder / "said.wav")
    soundfile.write(tmp_path / name, said, 16000, format=form)
    heard, of_wav = (talk(folder, capsys, tmp_path, f"--prompt={file}", "--to=text:9") for file in (name, "@said.wav"))
    assert heard[0] == of_wav[0] or form in ("OGG", "MP3")  # these two change the sound
    assert sample.kind_of(name) == "sound" and sample.kind_of("no such file") == "text"


def test_ids_without_a_token_are_never_drawn():
    def last(logits):
        return torch.full([len(logits)], logits.size(-1) - 1)
    for n_tokens, wanted in ((None, 49), (40, 39)):
        made = list(sample.generate(MODELS[0], [[1]], [("text", 3), ("speech", 1)], last, n_tokens=n_tokens))
        assert [symbols for _, symbols in made] == [[wanted]] * 3 + [[None]]  # the last of speech is EOS


@pytest.mark.parametrize("args, message", [
    (["--prompt= \t"], "empty prompt: --prompt has no text in it"),
    (["--prompt=It is", "--prompt=@long.json"], "prompt too long: 202 symbols, 329 with .* has 200 positions"),
    (["--prompt=@hum.wav"], "silent audio: .*hum.wav stays below -80 dB"),
    (["--prompt=@click.wav"], "audio too short: .*click.wav has 300 samples"),
    (["--prompt=@nowhere.wav"], "nowhere.wav: no such file"), (["--prompt=@NOTE.OPUS"], "NOTE.OPUS: no such file"),
    (["--prompt=@nowhere.json"], "nowhere.json: no such file; a prompt with this ending names a file of units"),
    (["--prompt=@tale.txt"], "audio: .*tale.txt .*; for the text in this file write --prompt=.*cat "),
    (["--prompt=@tale"], "audio: .*tale .*; for the text in this file write --prompt=.*cat "),
    (["--prompt=@few.json", "--prompt=@high.json"], "high.json: not a list of units; .* each from 0 to 11"),
    (["--to=text,text"], "two parts of text in a row"),
    (["--to=speech:0"], "--to=speech:0: 'speech:0' is not"),
    (["--top_p=0"], "top_p=0.0: .*top_p must be more than 0"),
    (["--dtype=int4"], "dtype=int4: choose"),
    (["--out=@nowhere/answer.wav"], "nowhere/answer.wav: give a name .* in an existing folder"),
    (["--to=speech", "--units=@other"], "other: not the units that .*model was trained with"),
    (["--prompt=@few.json", "--checkpoint=@text"], "text: a text model"),
    (["--checkpoint=@nowhere"], "nowhere: no checkpoint here")])
def test_bad_input_is_one_clear_line(folder, capsys, tmp_path, args, message):
    with pytest.raises(SystemExit, match=message) as error:
        talk(folder, capsys, tmp_path, *args)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
