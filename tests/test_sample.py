"""sample.py: caches against the uncached forward pass, generation against plain loops and transformers, prompts."""
import functools
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ABLATIONS, PAGE, TINY, both_logits, interleaved, make

import sample
from model import Config, SmolTolk, from_pretrained, new_cache, save_pretrained
from speech.mel import fit_mel_units, mel_frames, save_mel_units, voice
from speech.units import load_units, resynthesise

LENGTH = 30
built = functools.cache(lambda i: make(**ABLATIONS[i]))


# the cache

@functools.cache
def jumble(seed):
    """Rows that change modality at any place, with switch tokens or without."""
    rows, rng = interleaved(3, LENGTH, seed), np.random.default_rng(seed)
    if seed % 2:
        rows = torch.where(rows == TINY.switch, torch.from_numpy(rng.integers(0, 62, rows.shape)), rows)
    return rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(ABLATIONS) - 1), st.integers(0, 20), st.integers(0, 5),
       st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=3),
       st.sets(st.integers(1, LENGTH), max_size=4), st.integers(1, LENGTH))
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(ablation, seed, free, start, cuts, prompt):
    """Prompts of unlike lengths, padded on the left, in one or several chunks, and then symbol by symbol."""
    m, ids = built(ablation), jumble(seed)[:len(start)]
    padded = torch.randint(0, 62, ids.shape)  # the padding may be anything
    for row, n in enumerate(start):
        padded[row, n:] = ids[row, :LENGTH - n]
    cache = new_cache(m, torch.tensor(start), LENGTH + free)
    chunks = padded.tensor_split(sorted(cuts | set(range(prompt, LENGTH + 1))), 1)[:-1]  # the last one is empty
    parts = [both_logits(m, chunk, cache=cache) for chunk in chunks]
    assert cache.slot == LENGTH
    for cached, uncached in zip(zip(*parts), both_logits(m, ids)):
        cached = torch.cat(cached, 1)
        for row, n in enumerate(start):
            torch.testing.assert_close(cached[row, n:], uncached[row, :LENGTH - n], atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights, autocast, expected", [
    (torch.float32, False, torch.float32), (torch.float32, True, torch.bfloat16),
    (torch.bfloat16, False, torch.bfloat16)])
@torch.no_grad()
def test_the_cache_has_the_precision_of_the_keys(weights, autocast, expected):
    m, ids = make().to(weights), interleaved(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache, whole = new_cache(m, torch.tensor([0, 0]), LENGTH), both_logits(m, ids)
        cached = [both_logits(m, part, cache=cache) for part in ids.split(LENGTH // 2, 1)]
    tensors = [t for stack in cache[:3] for pair in stack for t in pair]
    assert len(tensors) == 2 * 7 and {t.dtype for t in tensors} == {expected}
    for exact, parts in zip(whole, zip(*cached)):
        assert (torch.cat(parts, 1) - exact).square().mean() < 0.01 * exact.square().mean()


def test_a_step_compiles_once(monkeypatch):
    """A graph for each modality, for all steps of all parts; the same logits as without."""
    from torch._dynamo.backends.debugging import aot_eager
    graphs, results, compile_of_torch = [], [], torch.compile
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def without_cpp(function, mode, **options):
        assert options == dict(fullgraph=True, dynamic=False)
        return compile_of_torch(function, backend=backend, **options)
    monkeypatch.setattr(torch, "compile", without_cpp)
    m, openings = make(num_hidden_layers=1), [[1, 2, 3], [TINY.speech_eos, 52, 53, 54, TINY.switch]]
    for compiled in (False, True):
        seen = []

        def pick(logits, seen=seen):
            seen.append(logits)
            return logits[:, 1:-1].argmax(-1) + 1  # never EOS
        collect(m, openings, [("text", 9), ("speech", 8), ("text", 7), ("speech", 6)], pick, compiled=compiled)
        results.append(seen)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert len(results[0]) == 9 + 8 + 7 + 6 and len(graphs) == 2


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


ENDED = set()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, len(ABLATIONS) - 1), st.integers(0, 99), st.integers(1, 4), st.booleans(),
       st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_generation_against_a_plain_loop(ablation, seed, rows, speech_first, lengths):
    """Batches of unlike prompts, parts that end by EOS in some rows and by length in others."""
    m, rng = built(ablation), np.random.default_rng(seed)
    plan = [("speech" if (i % 2 == 0) == speech_first else "text", n) for i, n in enumerate(lengths)]
    openings = [interleaved(1, 20, seed + i)[0, :rng.integers(1, 20)].tolist() for i in range(rows)]
    words = torch.from_numpy(rng.normal(0, 1, 50)).float()  # so that the likeliest symbol changes, and is EOS at times
    words[0], others = words.max() - 1, torch.from_numpy(rng.normal(0, 1, 11)).float()

    def pick(logits):
        return (logits + (words if logits.size(-1) == 50 else others)).argmax(-1)
    made = collect(m, openings, plan, pick)
    assert made == [by_hand(m, opening, plan, pick) for opening in openings]
    ENDED.update((modality, len(ids) < n) for row in made for ids, (modality, n) in zip(row, plan))


def test_both_ways_to_end_a_part_were_met():
    assert ENDED == {("text", True), ("text", False), ("speech", True), ("speech", False)}


def test_no_symbol_of_the_other_modality():
    generator = torch.Generator().manual_seed(0)
    pick = functools.partial(sample.draw, temperature=50.0, generator=generator)  # nearly uniform
    made = collect(make(), [[0]] * 30, [("text", 20), ("speech", 20), ("text", 20)], pick)
    assert {i for row in made for i in row[0] + row[2]} == set(range(1, 50))  # never EOS
    assert {i for row in made for i in row[1]} == set(range(10))


def test_greedy_text_is_that_of_transformers(smollm2_folder):
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM
    ids = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(PAGE).ids[:40]
    [[ours]] = collect(from_pretrained(smollm2_folder).eval(), [ids], [("text", 200)],
                       functools.partial(sample.draw, temperature=0))
    llama = LlamaForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    with torch.no_grad():  # the likeliest token after each beginning of our text is what it would generate itself
        theirs = llama(torch.tensor([ids + ours])).logits[0, len(ids) - 1:-1].argmax(-1)
    assert ours == theirs.tolist() and len(ours) == 200


# drawing

@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 3), st.integers(0, 14), st.floats(0.01, 1))
def test_draws_come_from_the_right_set(seed, temperature, top_k, top_p):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, 12)).float()
    p = np.exp((logits.double().numpy() - float(logits.max())) / temperature)
    order = np.argsort(-p)[:top_k or None]
    share = p[order] / p[order].sum()
    before = np.cumsum(share) - share
    allowed, doubtful = set(order[before < top_p - 1e-5]), set(order[np.abs(before - top_p) <= 1e-5])
    generator = torch.Generator().manual_seed(seed)
    drawn = sample.draw(logits.expand(400, -1), temperature, top_k, top_p, generator).tolist()
    assert set(drawn) <= allowed | doubtful | {order[0]}
    assert {i for i in allowed if p[i] / p[list(allowed)].sum() > 0.05} <= set(drawn)  # 0.95 ** 400 is 1e-9


def test_draws_have_the_right_frequencies():
    logits, n = torch.tensor([0.3, -1.0, 2.0, 1.5, -9.0]), 40_000
    for options, kept in ((dict(), [0, 1, 2, 3, 4]), (dict(top_k=3), [0, 2, 3]), (dict(top_p=0.7), [2, 3]),
                          (dict(top_k=2, top_p=0.5), [2])):
        p = torch.zeros(5)
        p[kept] = (logits[kept] / 0.7).softmax(-1)
        drawn = sample.draw(logits.expand(n, -1), 0.7, **options, generator=torch.Generator().manual_seed(1))
        assert (drawn.bincount(minlength=5) / n - p).abs().max() < 0.012  # five standard errors
    assert sample.draw(torch.tensor([[1.0, 3, 2], [9, 0, 0]]), 0).tolist() == [1, 0]


def test_draws_depend_on_the_seed_alone():
    logits, state = torch.randn(50, 20), torch.get_rng_state()
    one, again, other = (sample.draw(logits, generator=torch.Generator().manual_seed(i)).tolist() for i in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


# the command

@pytest.mark.parametrize("to, plan", [
    ("text", [("text", 9)]), ("speech:60,text, speech:3", [("speech", 60), ("text", 9), ("speech", 3)])])
def test_plan(to, plan):
    assert sample.read_plan(to, 9) == plan


@pytest.mark.parametrize("to", ["", "word", "text:", "text:0", "text:-3", "speech:1.5", "text,text", "text,,speech"])
def test_bad_plans(to):
    with pytest.raises(ValueError, match=f"--to={to}: "):
        sample.read_plan(to, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights with tokenizer and mel units, a SmolLM folder, sound and unit files."""
    demo, soundfile = pytest.importorskip("corpora.demo"), pytest.importorskip("soundfile")
    path, rng = tmp_path_factory.mktemp("sample"), np.random.default_rng(0)
    model = path / "model"
    model.mkdir()
    demo.train_tokenizer([PAGE, "Ünï ¿dé? 你好 😀"] * 3, 400, model / "tokenizer.json")
    noise = np.repeat(rng.normal(0, 0.2, 40), 1600)[:60_000].astype(np.float32)
    sounds = [noise * np.sin(np.arange(60_000, dtype=np.float32) * 2 * k) for k in (1, 2, 3)]
    codebook = fit_mel_units([mel_frames(x) for x in sounds], 12, 0, voices=[voice(sounds[0])])
    save_mel_units(str(path / "units"), codebook)
    shutil.copy(path / "units/units.json", model)
    torch.manual_seed(0)
    vocab_size = sample.Tokenizer(model / "tokenizer.json").vocab_size
    save_pretrained(SmolTolk(Config(**{**vars(TINY), "vocab_size": vocab_size, "n_units": 12,
                                       "max_position_embeddings": 200})), model)
    shutil.copytree(model, path / "text", ignore=shutil.ignore_patterns("speech.safetensors"))
    for name, sound in dict(said=sounds[0], silence=np.zeros(16000), hum=np.full(16000, 0.3), click=sounds[0][:300],
                            empty=np.zeros(0)).items():  # a constant is silence too
        soundfile.write(path / f"{name}.wav", sound, 16000)
    np.save(path / "units.npy", np.array([3, 3, 4, 11, 11, 0], np.uint16))
    np.save(path / "floats.npy", np.ones(3))
    for name, content in dict(few="[5, 6, 7]", high="[5, 12]", low="[5, -1]", none="[]", table="[[1, 2], [3, 4]]",
                              broken="[1, ", long=json.dumps([1, 2] * 100)).items():
        (path / f"{name}.json").write_text(content)
    return path


def talk(folder, capsys, tmp_path, *args, model="model"):
    """(standard output, standard error) of sample.py; its speech goes to tmp_path/answer*.wav."""
    sample.main([f"--checkpoint={folder / model}", f"--units={folder / 'units'}", f"--out={tmp_path / 'answer.wav'}",
                 "--device=cpu", *(arg.replace("@", f"{folder}/") for arg in args)])
    return tuple(capsys.readouterr())


@pytest.mark.parametrize("prompt", [[], ["--prompt=It is a truth"], ["--prompt=@said.wav"], ["--prompt=@units.npy"]])
def test_speech_comes_as_a_wav_and_its_units(folder, capsys, tmp_path, prompt):
    import soundfile
    text, said = talk(folder, capsys, tmp_path, *prompt, "--to=speech:40", "--temperature=1.5")
    ids = json.loads((tmp_path / "answer.json").read_text())
    waveform, rate = soundfile.read(tmp_path / "answer.wav")
    assert 0 < len(ids) <= 40 and set(ids) <= set(range(12)) and text == ""
    assert rate == 16000 and len(waveform) == len(resynthesise(ids, load_units(folder / "units")))
    assert "answer.wav" in said and f"{len(ids)} units" in said
    talk(folder, capsys, tmp_path, f"--prompt={tmp_path}/answer.json", "--to=text:3")  # and is a prompt again


def test_text_streams_in_whole_characters(folder, capsys, tmp_path, monkeypatch):
    """What is printed, piece by piece, is the text of the ids; the same seed says the same, another one does not."""
    pieces, tokenizer = [], sample.Tokenizer(folder / "model" / "tokenizer.json")
    ids = tokenizer.encode("é 😀 truth 你") + [tokenizer.encode("😀")[0]]  # the last character is cut
    assert len(ids) > 12

    def generate(*_):
        yield from ((0, [i]) for i in ids)
        yield 0, [None]

    class Out(io.StringIO):
        def write(self, piece):
            pieces.append(piece)
            return super().write(piece)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", generate)
        patch.setattr(sys, "stdout", Out())
        talk(folder, capsys, tmp_path, "--to=text")
    assert "".join(pieces) == tokenizer.decode(ids) + "\n" == "é 😀 truth 你\ufffd\n"
    assert "😀" in pieces and sum("\ufffd" in piece for piece in pieces) == 1
    one, again, other = (talk(folder, capsys, tmp_path, "--to=text:30", f"--seed={i}")[0] for i in (1, 1, 2))
    assert one == again != other


def test_back_and_forth_and_a_batch(folder, capsys, tmp_path):
    """Files are numbered by row and part; each row's text is what it says alone; parts have the lengths asked for."""
    args = ["--temperature=0", "--to=speech:9,text:8,speech:7"]
    prompts = ["--prompt=It is", "--prompt=@said.wav", "--prompt=@few.json"]
    text, said = talk(folder, capsys, tmp_path, *prompts, *args)
    lines = text.splitlines()
    for row, prompt in enumerate(prompts, 1):
        alone = tmp_path / str(row)
        alone.mkdir()
        text, _ = talk(folder, capsys, alone, prompt, *args)
        assert f"[{row}] {text}" == lines[row - 1] + "\n"
        for part, at_most in ((1, 9), (3, 7)):
            one, batched = alone / f"answer-{part}.json", tmp_path / f"answer-{row}-{part}.json"
            assert one.exists() == batched.exists() == one.with_suffix(".wav").exists()
            if one.exists():
                assert json.loads(one.read_text()) == json.loads(batched.read_text())
                assert len(json.loads(one.read_text())) <= at_most


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder, capsys, tmp_path, dtype):
    talk(folder, capsys, tmp_path, "--prompt=It is", "--to=speech:5,text:5", f"--dtype={dtype}")
    assert len(json.loads((tmp_path / "answer-1.json").read_text())) <= 5


def test_settings_from_a_file_and_a_plain_text_model(folder, capsys, tmp_path):
    """Without its speech modules, a model of text and speech writes the same text."""
    (tmp_path / "two.py").write_text('prompt = ["It is", "a wife"]\nmax_new = 5\nto = "text"\n')
    text, whole = (talk(folder, capsys, tmp_path, str(tmp_path / "two.py"), model=m)[0] for m in ("text", "model"))
    assert [line[:4] for line in text.splitlines()] == ["[1] ", "[2] "] and text == whole


@pytest.mark.parametrize("args, message", [
    (["--prompt= \t"], "empty prompt: --prompt has no text in it"),
    (["--prompt=It is", "--prompt=@long.json"], "prompt too long: 202 symbols, 329 with .* has 200 positions"),
    (["--prompt=@silence.wav"], r"silent audio: .*silence.wav stays below -60 dB"),
    (["--prompt=@hum.wav"], "silent audio: "),
    (["--prompt=@click.wav"], "audio too short: .*click.wav has 300 samples"),
    (["--prompt=@empty.wav"], "empty audio: .*empty.wav"),
    (["--prompt=@nowhere.wav"], "unreadable audio: .*nowhere.wav"),
    (["--prompt=@few.json", "--prompt=@high.json"], "high.json: not a list of units; .* each from 0 to 11"),
    (["--prompt=@low.json"], "low.json: not a list of units"),
    (["--prompt=@none.json"], "none.json: not a list of units; it needs one integer or more"),
    (["--prompt=@table.json"], "table.json: not a list of integers"),
    (["--prompt=@floats.npy"], "floats.npy: not a list of units"),
    (["--prompt=@broken.json"], "broken.json: no readable json"),
    (["--prompt=@nowhere.npy"], "nowhere.npy: cannot be read"),
    (["--to=text,text"], "two parts of text in a row"),
    (["--temperature=-1"], "temperature=-1.0, .*must not be negative"),
    (["--top_p=0"], "top_p=0.0: .*top_p must be more than 0"),
    (["--top_k=-1"], "top_k=-1, "),
    (["--max_new=0"], "--to=text: 'text' is not"),
    (["--dtype=int8"], "dtype=int8: choose"),
    (["--out=answer.json"], "out=answer.json: give a name that ends in .wav or .flac"),
    (["--out=@nowhere/answer.wav"], "nowhere/answer.wav: give a name .* in an existing folder"),
    (["--to=speech", "--units=@nowhere"], "nowhere: not a whole unit vocabulary"),
    (["--to=speech", "--vocoder=@nowhere"], "nowhere: not a whole vocoder"),
    (["--to=speech", "--checkpoint=@text"], "text: a text model without speech.safetensors"),
    (["--prompt=@few.json", "--checkpoint=@text"], "text: a text model"),
    (["--checkpoint=@nowhere"], "nowhere: no checkpoint here; give --checkpoint=FOLDER.* or train one with"),
    (["--promt=It is"], "no setting promt; did you mean prompt")])
def test_bad_input_is_one_clear_line(folder, capsys, tmp_path, args, message):
    with pytest.raises(SystemExit, match=message) as error:
        talk(folder, capsys, tmp_path, *args)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_units_of_another_vocabulary(folder, capsys, tmp_path):
    other = fit_mel_units([np.random.default_rng(1).normal(size=(99, 26)).astype(np.float32)], 12, 0)
    save_mel_units(str(tmp_path / "units"), other)
    with pytest.raises(SystemExit, match="units: not the units that .*model was trained with"):
        talk(folder, capsys, tmp_path, "--to=speech", f"--units={tmp_path / 'units'}")
