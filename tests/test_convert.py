"""Files of other projects become ours, and nothing that is stored in them is executed."""
import json
import os
import pickle
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_units import Runs, hubert

import evaluate
import sample
from model import from_pretrained
from runtime.tokenizer import Tokenizer, byte_alphabet
from speech.units import load_units
from tools import convert

TALE = ("Once upon a time there was a little girl who lived in a small house near the forest. Every morning she walked"
        " to the river to fetch water for her grandmother. One day she met an old fox who could speak.")


# SmolLM2

def test_smollm2_opens_in_transformers_and_can_read(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        smollm2_folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.rms_norm_eps == 1e-5
    tokenizer = Tokenizer(smollm2_folder / "tokenizer.json")
    ids = torch.tensor([[tokenizer.eos] + tokenizer.encode(TALE)])
    with torch.no_grad():
        nll = model(ids, labels=ids).loss.item()
    assert nll < np.log(25)  # with the rows of q and k in the order of llama.cpp the perplexity is above 50


def test_rows_of_q_come_in_the_order_of_transformers():
    """llama.cpp keeps the rows of a head in the order 0, h/2, 1, h/2 + 1, and so on."""
    gguf = pytest.importorskip("gguf")
    rows = np.array([[0, 0], [2, 2], [1, 1], [3, 3]], np.float32)
    tensor = SimpleNamespace(name="blk.0.attn_q.weight", tensor_type=gguf.GGMLQuantizationType.F32, data=rows)
    config = dict(num_attention_heads=1, num_key_value_heads=1)
    assert convert.dequantise(tensor, config)[:, 0].tolist() == [0, 1, 2, 3]


# k-means

def dump(path, monkeypatch, **attributes):
    """A file as joblib writes it of scikit-learn's KMeans, which is not installed when the file is read."""
    joblib, module = pytest.importorskip("joblib"), types.ModuleType("sklearn.cluster._kmeans")
    module.KMeans = type("KMeans", (), {"__module__": module.__name__})
    model = module.KMeans()
    vars(model).update(attributes)
    with monkeypatch.context() as patch:
        for name in ("sklearn", "sklearn.cluster", module.__name__):
            patch.setitem(sys.modules, name, module)
        joblib.dump(model, path)
    return path


@pytest.mark.parametrize("order, dtype", [("C", "<f4"), ("F", "<f8"), ("C", ">f4")])
def test_kmeans_is_read_without_scikit_learn(tmp_path, monkeypatch, order, dtype):
    centroids = np.random.default_rng(0).standard_normal((20, 48)).astype(dtype)
    path = dump(tmp_path / "km.bin", monkeypatch, n_clusters=20, cluster_centers_=np.asarray(centroids, order=order),
                labels_=np.arange(7), random_state_=np.random.RandomState(0), inertia_=np.float64(3.0))
    assert np.array_equal(convert.read_kmeans(path), centroids)
    hubert(tmp_path / "hubert")
    convert.main(["units", f"--kmeans={path}", f"--hubert={tmp_path / 'hubert'}", "--layer=3",
                  f"--out={tmp_path / 'units'}"])
    assert np.array_equal(load_units(tmp_path / "units").centroids.numpy(), centroids.astype(np.float32))


@pytest.mark.parametrize("hostile", [
    lambda flag: Runs(os.system, f"touch {flag}"), lambda flag: Runs(os.mkdir, flag),
    lambda flag: Runs(eval, f"open({flag!r}, 'w')"),
    lambda flag: Runs(np.testing.runstring, f"open({flag!r}, 'w')", {})])
@pytest.mark.parametrize("wrap, message", [
    (lambda evil: evil, "not a KMeans"), (lambda evil: {"nested": [evil]}, "not a KMeans"),
    (lambda evil: np.array([evil, None], "O"), "holds an array of object"),
    (lambda evil: np.array([(evil,)], [("field", "O")]), "holds an array of")])
def test_a_hostile_pickle_does_not_run(tmp_path, monkeypatch, hostile, wrap, message):
    flag = tmp_path / "ran"
    path = dump(tmp_path / "km.bin", monkeypatch, cluster_centers_=wrap(hostile(str(flag))))
    with pytest.raises(ValueError, match=message):
        convert.read_kmeans(path)
    assert not flag.exists()
    pickle.loads(pickle.dumps(hostile(str(flag))))
    assert flag.exists()  # pickle itself would have run it


@pytest.mark.parametrize("command, source, message", [
    (convert.smollm2, "text.bin", "GGUF magic"), (convert.smollm2, "none.bin", "No such file"),
    (convert.smollm2, "qwen.gguf", "tokenizer.ggml.pre is 'qwen2', not 'smollm'"),
    (convert.units, "list.bin", "not a KMeans"), (convert.units, "none.bin", "No such file"),
    (convert.units, "nan.npy", "not finite floats"), (convert.units, "wide.npy", "is 47, .* needs 48")])
def test_files_that_cannot_be_converted_are_refused(tmp_path, command, source, message):
    writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / "qwen.gguf", "llama")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "text.bin").write_text("some text")
    (tmp_path / "list.bin").write_bytes(pickle.dumps([1, 2]))
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    np.save(tmp_path / "wide.npy", np.zeros((5, 47), np.float32))
    hubert(tmp_path / "hubert")
    others = (tmp_path / "hubert", 3) if command is convert.units else ()
    with pytest.raises(SystemExit, match=f"{source}: cannot be converted .*{message}") as error:
        command(tmp_path / "out", tmp_path / source, *others)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# the authors' checkpoints

D, FFN, LAYERS, HEADS, KV_HEADS, UNITS = 32, 48, 3, 4, 2, 10
FULL = dict(n_audio_in_layers=2, n_audio_out_layers=2, layer_wa_audio=True, layer_selwa_audio=True,
            raw_speech_residual=True)


def backbone_folder(folder, tokenizer=None, **changes):
    """A SmolLM without weights: config.json, and the tokenizer.json of 256 bytes or a copy of another one."""
    folder.mkdir()
    if tokenizer is None:
        vocab = {"<|endoftext|>": 0} | {letter: 1 + i for i, letter in enumerate(byte_alphabet())}
        byte_level = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
        spec = dict(added_tokens=[dict(id=0, content="<|endoftext|>", special=True)], normalizer=None,
                    pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True),
                                                                       byte_level]),
                    model=dict(type="BPE", vocab=vocab, merges=[]))
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    else:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    config = dict(model_type="llama", vocab_size=Tokenizer(folder / "tokenizer.json").vocab_size, hidden_size=D,
                  intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                  num_key_value_heads=KV_HEADS, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10_000.0,
                  tie_word_embeddings=True, eos_token_id=0)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def authors_model(V, n_units=UNITS, backbone_dtype=torch.float32, **changes):
    """(model_args, tensors) as the authors' train.py saves them, with random weights. V: text tokens."""
    args = dict(audio_vocabsize=n_units + 2, audio_pad_token=n_units + 1, txt_vocabsize=V + 3, bop_token=V,
                eop_token=V + 1, swt_token=V + 2, n_codebooks=1, tie_audio_embeddings=True, block_size=2048,
                backbone="HuggingFaceTB/SmolLM-135M", rope_theta=100_000.0, selwa_in_layer=None, selwa_linear=True,
                selwa_downproj=0, selwa_downproj_linear=True, entropy_reg=0.0, torch_dtype=torch.bfloat16,
                attn_implementation="flash_attn", warm_init=True, freeze_backbone=False, freeze_txt_inout=False)
    args |= FULL | changes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, std=0.2, mean=0.0, dtype=torch.float32):
        return (mean + std * torch.randn(*shape, generator=generator)).to(dtype)

    def layer(prefix, dtype=torch.float32):
        d_kv = D // HEADS * KV_HEADS
        shapes = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
                          ((D, D), (d_kv, D), (d_kv, D), (D, D), (FFN, D), (FFN, D), (D, FFN))))
        weights = {f"{prefix}.{name}.weight": draw(*shape, dtype=dtype) for name, shape in shapes.items()}
        return weights | {f"{prefix}.{name}_layernorm.weight": draw(D, mean=1.0, dtype=dtype)
                          for name in ("input", "post_attention")}

    text, audio = draw(V + 3, D, dtype=backbone_dtype), draw(n_units + 2, D)
    tensors = {"txt_embed.weight": text, "txt_unembed.weight": text, "audio_embed.0.weight": audio,
               "audio_unembed.0.weight": audio, "context_model.norm.weight": draw(D, mean=1.0, dtype=backbone_dtype)}
    for i in range(LAYERS):
        tensors |= layer(f"context_model.layers.{i}", backbone_dtype)
    for side in ("in", "out"):
        for i in range(args[f"n_audio_{side}_layers"]):
            tensors |= layer(f"audio_{side}_layers.{i}")
    if args["layer_wa_audio"]:
        tensors["layer_weights"] = draw(LAYERS, 1, 1, 1, std=1.0)
    if args["layer_selwa_audio"]:
        tensors |= {"layer_selector.weight": draw(LAYERS, D), "layer_selector.bias": draw(LAYERS)}
    return args, tensors


def write_authors(path, args, tensors, prefix=""):
    model = {prefix + name: tensor for name, tensor in tensors.items()}
    torch.save(dict(model=model, optimizer=dict(state={0: dict(step=torch.tensor(3.0))}), model_args=args, iter_num=7,
                    best_val_loss=2.5, config=dict(train_splits=["large"], dtype="bfloat16")), path)
    return path


def reference_of_authors(args, tensors, symbols, is_speech):
    """
    The authors' model once more, for one sequence: -> (ln p of text [T, V+3], of speech [T, units+2], omega [T, L]).

    symbols [T]: ids in the table of their modality; the switch token counts as text. Here ln p of speech includes the
    class for padding.
    """
    w, T = {name: tensor.float() for name, tensor in tensors.items()}, len(symbols)
    half = D // HEADS // 2
    angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(half) / half)
    turn = torch.polar(torch.ones(T, half), angle)  # [T, half]

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def heads_of(x, weight, rotates):
        x = (x @ weight.T).view(T, -1, 2, half)
        if rotates:
            x = torch.complex(x[:, :, 0], x[:, :, 1]) * turn[:, None]
            x = torch.stack([x.real, x.imag], 2)
        x = x.flatten(2).transpose(0, 1)                                        # [heads, T, 2 * half]
        return x.repeat_interleave(HEADS // len(x), 0)

    def layer(x, prefix, seen):
        def weight(name):
            return w[f"{prefix}.{name}.weight"]
        h = norm(x, weight("input_layernorm"))
        q, k, v = (heads_of(h, weight(f"self_attn.{letter}_proj"), letter in "qk") for letter in "qkv")
        scores = (q @ k.mT / (2 * half) ** 0.5).masked_fill(~seen, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ weight("self_attn.o_proj").T
        h = norm(x, weight("post_attention_layernorm"))
        gate, up = h @ weight("mlp.gate_proj").T, h @ weight("mlp.up_proj").T
        return x + (gate * gate.sigmoid() * up) @ weight("mlp.down_proj").T

    causal = torch.ones(T, T).tril().bool()
    segment = (is_speech[1:] != is_speech[:-1]).cumsum(0)
    segment = F.pad(segment, (1, 0))
    in_segment = causal & (segment[:, None] == segment) & is_speech | torch.eye(T).bool()
    raw = torch.stack([w["audio_embed.0.weight" if speech else "txt_embed.weight"][symbol]
                       for symbol, speech in zip(symbols, is_speech)])
    x = raw
    for i in range(args["n_audio_in_layers"]):
        x = layer(x, f"audio_in_layers.{i}", in_segment)
    x = torch.where(is_speech[:, None], x, raw)
    states = []
    for i in range(LAYERS):
        x = layer(x, f"context_model.layers.{i}", causal)
        states.append(x)
    context = norm(x, w["context_model.norm.weight"])
    states, omega = torch.stack([*states[:-1], context]), None                  # [L, T, D]
    speech = context
    if args["layer_wa_audio"]:
        speech = (w["layer_weights"].softmax(0)[:, 0] * states).sum(0)
    if args["layer_selwa_audio"]:
        omega = (speech @ w["layer_selector.weight"].T + w["layer_selector.bias"]).softmax(-1)
        speech = (omega.T[..., None] * states).sum(0)
    if args["raw_speech_residual"]:
        speech = speech + raw
    for i in range(args["n_audio_out_layers"]):
        speech = layer(speech, f"audio_out_layers.{i}", causal)
    text = context @ w["txt_unembed.weight"].T
    text[:, args["bop_token"]:args["bop_token"] + 3] = -torch.inf
    return text.log_softmax(-1), (speech @ w["audio_unembed.0.weight"].T).log_softmax(-1), omega


def convert_authors(tmp_path, prefix="", **changes):
    """(model_args, tensors, our model) of a checkpoint that was converted by the command."""
    backbone = backbone_folder(tmp_path / "backbone")
    args, tensors = authors_model(Tokenizer(backbone / "tokenizer.json").vocab_size, **changes)
    path = write_authors(tmp_path / "model_ckpt.pt", args, tensors, prefix)
    convert.main(["authors", f"--checkpoint={path}", f"--backbone={backbone}", f"--out={tmp_path / 'ours'}"])
    return args, tensors, from_pretrained(tmp_path / "ours").eval()


@pytest.mark.parametrize("changes", [
    {}, dict(prefix="_orig_mod."), dict(backbone_dtype=torch.bfloat16), dict(raw_speech_residual=False),
    dict(n_audio_in_layers=0), dict(n_audio_out_layers=1), dict(layer_selwa_audio=False), dict(future_option=None),
    dict.fromkeys(FULL, 0)], ids=str)
@torch.no_grad()
def test_a_checkpoint_of_the_authors_gives_their_numbers(tmp_path, capsys, changes):
    args, tensors, model = convert_authors(tmp_path, **changes)
    said = capsys.readouterr().out
    assert "rope_theta=10000 is that of" in said and "-ln(1 - p_pad)" in said and "HuggingFaceTB/SmolLM-135M" in said
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    assert files == {"config.json", "model.safetensors", "speech.safetensors", "tokenizer.json"}
    V, switch = args["bop_token"], args["swt_token"]
    rng = np.random.default_rng(0)
    for begins_with_speech in (True, False):
        symbols, is_speech = [], []
        for run in range(7):  # runs of both modalities, with a switch token between them
            speaks, n = (run % 2 == 0) == begins_with_speech, int(rng.integers(1, 9))
            symbols += [*rng.integers(0, UNITS + 1 if speaks else V, n), switch]
            is_speech += [speaks] * n + [False]
        symbols, is_speech = torch.tensor(symbols), torch.tensor(is_speech)
        ids = torch.where(is_speech, V + symbols, symbols)
        ids[~is_speech & (symbols == switch)] = model.config.switch
        text, speech, omega = reference_of_authors(args, tensors, symbols, is_speech)
        out = model(ids[None])
        close = dict(atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(model.text_logits(out.text[0]).log_softmax(-1), text[:, :V], **close)
        p_pad = speech[:, -1:].exp()
        assert p_pad.max() > 0.01
        ours = model.speech_logits(out.speech[0]).log_softmax(-1)
        torch.testing.assert_close(ours, speech[:, :-1] - torch.log1p(-p_pad), **close)  # as the docstring says
        assert (out.log_omega is None) == (omega is None)
        if omega is not None:
            torch.testing.assert_close(out.log_omega[0].exp(), omega, **close)


def test_the_programs_take_a_converted_checkpoint(demo_folder, tmp_path, capsys):
    """On the demo's units and tokenizer: generation in both modalities, held-out NLL, and Topic-Cloze."""
    soundfile = pytest.importorskip("soundfile")
    backbone = backbone_folder(tmp_path / "backbone", demo_folder / "tokenizer.json")
    args, tensors = authors_model(Tokenizer(backbone / "tokenizer.json").vocab_size, n_units=30)
    folder = convert.authors(tmp_path / "ours", write_authors(tmp_path / "a.pt", args, tensors), backbone)
    sample.main([f"--checkpoint={folder}", "--prompt=One day", "--to=speech:12,text:5,speech:9", "--temperature=0",
                 f"--units={demo_folder / 'units'}", f"--out={tmp_path / 'answer.wav'}", "--device=cpu"])
    assert soundfile.info(tmp_path / "answer-1.wav").frames > 0 and capsys.readouterr().out.strip()
    sets = [f"--val_{kind}={[str(demo_folder / 'val')]}" for kind in ("text", "speech", "interleaved")]
    evaluate.main([f"--checkpoint={folder}", f"--cloze={demo_folder / 'cloze'}", "--sequence_length=64",
                   "--val_sequences=4", f"--out={tmp_path / 'e.json'}", "--device=cpu", *sets])
    results = json.loads((tmp_path / "e.json").read_text())
    assert all(0 < nll < 50 for kinds in results["nll"].values() for nll in kinds.values())
    assert set(results["topic_cloze"]) >= {"T", "S", "T->S", "S->T"}


def drop(name):
    return lambda args, tensors: tensors.pop(name)


def put(**new):
    return lambda args, tensors: args.update(new)


def change(name, function):
    return lambda args, tensors: tensors.update({name: function(tensors[name])})


@pytest.mark.parametrize("edit, message", [
    (change("txt_unembed.weight", lambda t: t + 1e-3), "txt_embed.weight and txt_unembed.weight differ"),
    (change("audio_unembed.0.weight", lambda t: t * 1.01), "audio_embed.0.weight and audio_unembed.0.weight differ"),
    (put(n_codebooks=2), "n_codebooks in model_args is 2, only 1"),
    (put(selwa_downproj=64), "selwa_downproj in model_args is 64, only 0"),
    (put(selwa_in_layer=2), "selwa_in_layer in model_args is 2, only None"),
    (put(selwa_linear=False), "selwa_linear in model_args is False"),
    (put(layer_wa_audio=False), "layer_selwa_audio without layer_wa_audio"),
    (put(sliding_window=512), "sliding_window in model_args is 512, and its effect is not known here"),
    (put(audio_vocabsize=None), "audio_vocabsize in model_args is None, so it is not a model of speech"),
    (put(audio_pad_token=UNITS), "audio_pad_token in model_args is 10, only 11"),
    (put(bop_token=None), "bop_token in model_args is None, only 257 .* vocab_size=257 in .*backbone/config.json"),
    (put(n_audio_in_layers=3), "'audio_in_layers.2.*' has shape .missing., model_args and the backbone ask for"),
    (put(n_audio_out_layers=1), "'audio_out_layers.1.*' has shape .*, .* ask for no such tensor"),
    (drop("layer_weights"), "'layer_weights' has shape .missing., .* ask for .3, 1, 1, 1."),
    (drop("context_model.layers.1.mlp.up_proj.weight"), "'context_model.layers.1.mlp.up_proj.weight' .*missing"),
    (change("context_model.norm.weight", lambda t: t / 0), "'context_model.norm.weight' is not a tensor of finite"),
    (change("layer_selector.bias", lambda t: t.long()), "'layer_selector.bias' is not a tensor of finite floats"),
    (change("layer_selector.bias", lambda t: "text"), "'layer_selector.bias' is not a tensor of finite floats"),
    (lambda args, tensors: tensors.update(selwa_new=torch.ones(1)), "'selwa_new' .* ask for no such tensor"),
    (lambda args, tensors: tensors.clear(), "'audio_embed.0.weight' has shape .missing."),
])
def test_checkpoints_of_the_authors_that_ours_cannot_be_are_refused(tmp_path, edit, message):
    backbone = backbone_folder(tmp_path / "backbone")
    args, tensors = authors_model(257)
    edit(args, tensors)
    path = write_authors(tmp_path / "model_ckpt.pt", args, tensors)
    with pytest.raises(SystemExit, match=f"model_ckpt.pt: cannot be converted .*{message}") as error:
        convert.authors(tmp_path / "out", path, backbone)
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone", "model_ckpt.pt"]


@pytest.mark.parametrize("backbone, message", [
    (dict(num_hidden_layers=2), "'context_model.layers.2.* ask for no such tensor"),
    (dict(intermediate_size=64), "mlp.down_proj.weight' has shape .32, 48., .* ask for .32, 64."),
    (dict(vocab_size=300), "txt_vocabsize in model_args is 260, only 303 .* vocab_size=300 in .*backbone/config.json"),
    (dict(hidden_act="gelu"), "backbone/config.json: .*hidden_act is 'gelu'"),
    (None, "nowhere/config.json: cannot be read .No such file"),
])
def test_another_backbone_is_refused(tmp_path, backbone, message):
    path = write_authors(tmp_path / "model_ckpt.pt", *authors_model(257))
    folder = tmp_path / "nowhere" if backbone is None else backbone_folder(tmp_path / "backbone", **backbone)
    with pytest.raises(SystemExit, match=f"model_ckpt.pt: cannot be converted .*{message}") as error:
        convert.authors(tmp_path / "out", path, folder)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_files_that_are_no_checkpoint_of_the_authors_are_refused_and_run_nothing(tmp_path):
    backbone, flag = backbone_folder(tmp_path / "backbone"), tmp_path / "ran"
    args, tensors = authors_model(257)
    whole = write_authors(tmp_path / "whole.pt", args, tensors).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("some text")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(tensors, tmp_path / "tensors.pt")
    torch.save(dict(model=tensors, model_args=args), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(dict(model=tensors, model_args=Runs(os.mkdir, str(flag))), tmp_path / "evil.pt")
    for name, message in dict(half="not a complete file of torch.save", text="not a complete", old="not a complete",
                              list="holds no dict with the dicts model and model_args", tensors="holds no dict",
                              evil="more than tensors, numbers and text", none="No such file").items():
        with pytest.raises(SystemExit, match=f"{name}.pt: cannot be converted .*{message}") as error:
            convert.authors(tmp_path / "out", tmp_path / f"{name}.pt", backbone)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists() and not flag.exists()
    with pytest.raises(SystemExit, match="backbone: exists already; remove it or give another --out"):
        convert.authors(backbone, tmp_path / "whole.pt", backbone)


@pytest.mark.parametrize("argv, message", [
    (["smollm3"], "no such command; did you mean smollm2"), (["units"], "--kmeans is missing; give --kmeans=PATH"),
    (["whisper", "--model=a.bin", "--out=tests"], "tests: exists already; remove it or give another --out")])
def test_mistakes_in_the_command_are_one_line(argv, message, monkeypatch):
    monkeypatch.chdir(convert.Path(convert.__file__).parent.parent)
    with pytest.raises(SystemExit, match=message) as error:
        convert.main(argv)
    assert "\n" not in str(error.value)
