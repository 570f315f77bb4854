"""The files of a model in the hub's format, and what can be wrong with them.

What it does    finds a model's folder or fetches it from the hub, checks config.json, reads the
                weights, names the ids that end a completion; writes each file at once or not at
                all. Also what concerns memory and threads of the process.
Not here        the network, which is model.py's. This file does not import it.
Run it alone    python -m plumbing.hub [NAME or FOLDER …]     the folder and its fingerprint
Where to fork   another architecture: `FAMILIES` and `checked_config` say what is accepted.
"""
import ctypes
import gc
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plumbing.chat import end_of_turn
from plumbing.files import hash_file, hub_errors, read_json, write_json, write_whole
from plumbing.smollm2 import smollm2_folder

PROC_STAT = Path("/proc/stat")
TINY = Path(__file__).resolve().parent.parent / "tiny" / "model"
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",  # `model_type` in
            "llama": "LlamaForCausalLM"}  # config.json: what transformers calls the model
LLAMA3_ROPE = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "*.safetensors"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]


def fingerprint(folder):
    """A hash of all files of a model folder that decide what it says."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt"):
            total.update(path.name.encode())
            hash_file(total, path)
    return total.hexdigest()


def model_folder(name_or_path):
    """The folder itself, the embedded default for "tiny", what pip fetches for "smollm2", or a
    local copy of the hub's model."""
    if str(name_or_path) == "smollm2":
        return smollm2_folder()
    folder = TINY if str(name_or_path) == "tiny" else Path(name_or_path)
    if (folder / "config.json").is_file() and not (folder / "best").is_dir():
        return folder
    if (folder / "best").is_dir():
        raise FileNotFoundError(f"{folder} is a run; its models are {folder / 'best'} and "
                                f"{folder / 'checkpoints' / 'step_N'}")
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file; give the model folder that holds it")
    if folder.is_dir():
        raise FileNotFoundError(f"{folder}: no config.json in this folder; expected a model folder "
                                "in the hub's format (config.json, *.safetensors, tokenizer files)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    name = os.fspath(name_or_path)
    try:
        wanted = ["config.json", "generation_config.json", *WEIGHT_FILES, *TOKENIZER_FILES]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HFValidationError, RepositoryNotFoundError) as e:
        raise FileNotFoundError(f"{name}: neither a model folder here nor a model on the hub; give "
                                "a folder with config.json, or a name such as Qwen/Qwen2.5-0.5B"
                                ) from e
    except hub_errors() as e:
        raise ConnectionError(
            f"{name}: no such folder here, and the model hub did not deliver it "
            f"({type(e).__name__}: {' '.join(str(e).split())[:200]}); try again, allow access to "
            "the hub, or give a local model folder") from e


def read_config(folder):
    """The checked config.json of a folder; ValueError names the folder."""
    try:
        return checked_config(read_json(folder / "config.json"))
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from e


def rope_of(config):
    """The settings of rotary positions, as older or newer files spell them, with a rope_type."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters or rope_scaling is {rope!r:.80}; expected "
                         "an object")
    return {"rope_type": rope.get("type", "default"), **rope}


def checked_config(config):
    """Fill in the defaults of a config.json; refuse, by name, what is not computed here."""
    family = config.get("model_type")
    if family not in list(FAMILIES):
        raise ValueError(f"model_type is {family!r:.80}; expected {', '.join(map(repr, FAMILIES))}:"
                         " other architectures are not computed here")
    config = {k: v for k, v in config.items()
              if v is not None or k not in ("head_dim", "num_key_value_heads")}
    needed = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "vocab_size", "max_position_embeddings"]
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for key in (*needed, "num_key_value_heads", "head_dim"):
        if type(config.get(key, 1)) is not int or not 0 < config.get(key, 1) < 2**31:
            raise ValueError(f"config.json: {key} is {config[key]!r:.80}; expected a whole number "
                             "above 0")
    rope = rope_of(config)
    refused = {"rope_type": (rope["rope_type"], "default"),
               "partial_rotary_factor": (rope.get("partial_rotary_factor", 1), 1),
               "attention_bias": (family != "qwen2" and config.get("attention_bias", False), False),
               "mlp_bias": (config.get("mlp_bias", False), False),
               "hidden_act": (config.get("hidden_act", "silu"), "silu"),
               "use_sliding_window": (config.get("use_sliding_window", False), False)}
    for key, (value, expected) in refused.items():
        if value != expected and (key, value) != ("rope_type", "llama3"):
            raise ValueError(f"config.json: {key} is {value!r}; only {expected!r} is computed here")
    c = {"num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": 1e-6,
         "tie_word_embeddings": False,
         "rope_theta": rope.get("rope_theta", 10000.0), **config}
    c.setdefault("head_dim", 128 if family == "qwen3"
                 else c["hidden_size"] // c["num_attention_heads"])
    numbers = {key: c[key] for key in ("rms_norm_eps", "rope_theta")}
    if rope["rope_type"] == "llama3":
        numbers |= {key: rope.get(key) for key in LLAMA3_ROPE}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise ValueError(f"config.json: {key} is {value!r:.80}; expected a number above 0")
    c["rms_norm_eps"], c["rope_theta"] = float(c["rms_norm_eps"]), float(c["rope_theta"])
    if c["head_dim"] % 2 or c["num_attention_heads"] % c["num_key_value_heads"]:
        raise ValueError(f"config.json: head_dim {c['head_dim']}, num_attention_heads "
                         f"{c['num_attention_heads']}, num_key_value_heads "
                         f"{c['num_key_value_heads']}; expected an even width, and as many query "
                         "heads for each key/value head")
    return c


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def to_hub(weights, c):
    """Give a model's tensors the hub's names, and split the matrices that are joined here: q, k, v;
    gate, up. c: the model's config."""
    width = {"q_proj": c["num_attention_heads"] * c["head_dim"],
             "k_proj": c["num_key_value_heads"] * c["head_dim"],
             "v_proj": c["num_key_value_heads"] * c["head_dim"],
             "gate_proj": c["intermediate_size"], "up_proj": c["intermediate_size"]}
    hubs = {}
    for name, x in weights.items():
        joined = name.split(".")[-2]
        parts = FUSED.get(joined, [joined])
        widths = [width[part] for part in parts] if joined in FUSED else [len(x)]
        for part, piece in zip(parts, x.split(widths)):
            hubs[name.replace(joined, part)] = piece
    return hubs


def from_hub(weights):
    """Undo `to_hub`: join q, k and v, and gate and up, and give them the names used here."""
    for joined, (first, *others) in FUSED.items():
        for name in [name for name in weights if f".{first}." in name]:
            pieces = [weights.pop(name.replace(first, part)) for part in (first, *others)]
            weights[name.replace(first, joined)] = torch.cat(pieces)
    return weights


def load_weights(model, folder, device):
    """Fill `model` with the fp32 weights of every safetensors file of the folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(type(f) is str for f in files.values()):
            raise ValueError(f"{index}: expected a weight_map from names to files")
        files = sorted(set(files.values()))
    else:
        files = ["model.safetensors"]
    weights = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: weights are missing; expected safetensors")
        try:
            tensors = load_file(folder / file)
        except SafetensorError as e:
            raise ValueError(f"{folder / file}: damaged, not a whole safetensors file: {e}") from e
        for name, tensor in tensors.items():
            weights[name] = tensor.to(device, torch.float32)
    if model.config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    expected = {name: tuple(p.shape)
                for name, p in to_hub(model.state_dict(), model.config).items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit config.json, first "
                         f"{wrong[0]}: expected {expected.get(wrong[0])}, "
                         f"found {found.get(wrong[0])}")
    model.load_state_dict(from_hub(weights), assign=True)


def load_tokenizer(folder):
    """(the transformers tokenizer of a folder or None, the ids that its files name, {name: bytes}
    of these files)."""
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES
             if (folder / name).exists()}
    if not files:
        return None, set(), files
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.encode("1"):  # some damage shows only in use
            raise ValueError("it makes no token of '1'; is tokenizer.json there?")
        return tokenizer, named_ids(tokenizer, files), files
    except Exception as e:  # transformers raises whatever the damage led to
        raise ValueError(f"{folder}: its tokenizer files cannot be used; expected whole ones of "
                         f"the hub ({type(e).__name__}: {str(e)[:200]})") from e


def named_ids(tokenizer, files):
    """The ids of all tokens that stand in a tokenizer's files. The library has one more where it
    adds <|endoftext|> to a Qwen2 tokenizer that lacks this token."""
    whole, vocabulary, added, settings = (json.loads(files.get(name, "{}")) for name in (
        "tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json"))
    tokens = [*whole.get("added_tokens", ()), *settings.get("added_tokens_decoder", {}).values()]
    names = {*whole.get("model", {}).get("vocab", ()), *vocabulary, *added,
             *(token["content"] for token in tokens)}
    return {i for name, i in tokenizer.get_vocab().items() if name in names}


def real_ids(named, n_rows):
    """Of a head with n_rows: one more than the largest id that a token has, and the ids below it
    that none has, sorted. Where `named` holds none of the rows, all of them are real."""
    real = [i for i in range(n_rows) if i in named] or range(n_rows)
    return real[-1] + 1, sorted({*range(real[-1] + 1)} - {*real})


def find_stop_ids(tokenizer, config, generation_config):
    """Every id that ends a completion: eos ids of all three files and the chat's end of turn."""
    ids = set()
    for source in (config, generation_config):
        eos = source.get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        if not all(i is None or type(i) is int for i in eos):
            raise ValueError(f"eos_token_id is {eos!r:.80} in the model's config; expected the id "
                             "of a token, or a list of them")
        ids |= set(eos)
    if tokenizer is not None:
        ids.add(tokenizer.eos_token_id)
        if tokenizer.chat_template:
            ids.add(end_of_turn(tokenizer))
    return sorted(ids - {None})


def save_model(folder, weights, config, generation_config, tokenizer_files):
    """Write a model's folder, fp32, each file at once or not at all; OSError where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in to_hub(weights, config).items()}
    part = folder / "model.safetensors.part"
    try:
        save_file(weights, part, metadata={"format": "pt"})
    except SafetensorError as e:  # a full disk, most often
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {part}: {e}") from e
    part.replace(folder / "model.safetensors")
    # Both spellings of the dtype: transformers 5 reads `dtype`, older readers `torch_dtype`.
    write_json(folder / "config.json", {**config, "dtype": "float32", "torch_dtype": "float32",
                                        "architectures": [FAMILIES[config["model_type"]]]})
    write_json(folder / "generation_config.json", generation_config)
    for name, content in tokenizer_files.items():
        write_whole(folder / name, content)


# ------------------------------------------------------------------ memory and threads

def keep_freed_memory():
    """Have this process keep the memory of freed tensors for the next ones.

    glibc hands every large tensor back to the system when it is freed, and the next one of its size
    waits for zeroed pages. Keeping them made CPU sampling and updates 1.1 to 1.3 times faster.
    Programs call this as they start; importing a file changes nothing in the process.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_memory_back():
    """Hand the system what `keep_freed_memory` kept, where one piece of work is over and the next
    has tensors of other sizes."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def use_threads(n=None):
    """Compute with n CPU threads; returns n. Without a number: as many as torch takes, but no more
    than there are cores that no program uses now, and at least one.

    Threads meet after every product of matrices. One that shares its core makes the others wait for
    it, and spin, which takes a core from it once more: beside one busy program two threads on two
    cores are slower than one. A number in OMP_NUM_THREADS, as torchrun sets it, stays.
    """
    most = torch.get_num_threads()
    if n is None and most > 1 and "OMP_NUM_THREADS" not in os.environ and PROC_STAT.exists():
        before, began = busy_seconds(), time.monotonic()
        time.sleep(0.2)  # chosen: 20 ticks of the kernel's clock
        n_busy = round((busy_seconds() - before) / (time.monotonic() - began))
        n = max(1, min(most, os.cpu_count() - n_busy))
        if n < most:
            print(f"threads    {n} instead of {most}: other programs keep {n_busy} of "
                  f"{os.cpu_count()} cores busy", file=sys.stderr)
    torch.set_num_threads(n or most)
    return n or most


def busy_seconds():
    """What all cores together have worked since the machine began; what runs under `nice`, which
    gives way, is not counted."""
    user, _, system, _, _, irq, softirq, steal = map(int, PROC_STAT.read_text().split()[1:9])
    return (user + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def is_out_of_memory(e):
    """Whether an exception means that memory did not suffice, of the GPU or the process."""
    words = "DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return (isinstance(e, (MemoryError, torch.OutOfMemoryError))
            or any(x in str(e) for x in words))


if __name__ == "__main__":
    for name in sys.argv[1:] or ["tiny"]:
        found = model_folder(name)
        print(f"{found}: {read_config(found)['model_type']}, fingerprint {fingerprint(found)}")
