"""The work that is measured, done by the project's own functions, and what the machine could do.

Shapes with random weights, prompts with the lengths of GSM8K's, rewards that differ within every
group (real rewards of a random model are all equal, and nothing would train).
"""
import random
import weakref
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from model import DTYPES, Qwen2
from objectives import group_advantages
from plumbing import engine
from plumbing.engine import Sampler
from plumbing.hub import checked_config
from plumbing.metrics import clock
from plumbing.onednn import product
from plumbing.run import make_optimizer
from plumbing.settings import make_parser
from rollout import generate

SHAPES = {  # width, MLP, layers, query heads, key/value heads, vocabulary
    "0.8m": (128, 384, 4, 4, 2, 96),
    "24.9m": (384, 1024, 8, 6, 2, 32000),
    "135m": (576, 1536, 30, 9, 3, 49152),  # of SmolLM2
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936),
    "head": (896, 8, 1, 14, 2, 151936)}  # next to nothing but a head
REAL_IDS = 151_665  # of Qwen2.5's tokenizer; its head has more rows
# Chosen to resemble GSM8K's training prompts under Qwen2.5's tokenizer and a plain template, whose
# lengths have mean 104.6, and 78 and 146 as their 5th and 95th percentiles.
PROMPT_LENGTHS = (75, 84, 92, 98, 105, 112, 124, 150)


def make_model(shape, device="cpu", dtype="fp32", seed=0):
    """A Qwen2 with random weights that never ends a completion by itself."""
    width, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    config = checked_config({
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": True,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0})
    with torch.device(device):
        model = Qwen2(config)
    model.compute_dtype = DTYPES[dtype]
    model.n_real_ids = min(vocabulary, REAL_IDS)
    if dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    return model


def make_prompts(n, vocabulary, seed=0, length=None):
    """n lists of random ids; lengths cycle through PROMPT_LENGTHS, or are all `length`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length or PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(n)]
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def settings(**changed):
    """train.py's settings: the parser's defaults, two epochs of one optimizer step, and these."""
    s = SimpleNamespace(**vars(make_parser().parse_args([])))
    vars(s).update(epochs=2, minibatches=1, temperature=1.0, top_p=1.0, warmup_steps=0, steps=10**6,
                   learning_rate=1e-6, seed=0, beta=0.0, tokens_per_microbatch=8192)
    vars(s).update(changed)
    return s


def make_run(model, s):
    return SimpleNamespace(model=model, reference=None, optimizer=make_optimizer(model, s),
                           state={"optimizer_steps": 0, "skipped_steps": 0})


def injected_rewards(n_prompts, group_size, seed=0):
    """(P, G) random numbers: never two alike in a group."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_prompts, group_size, dtype=torch.float64, generator=generator)


def sampling(run, prompts, s, lengths=None):
    """One rollout; with `lengths` (one int a row) every completion ends there."""
    arguments = (run.model, prompts, s.group_size, s.max_new_tokens, s.temperature, s.top_p, 0, 1)
    if lengths is None:
        return generate(*arguments, max_rows=s.rollout_rows)
    Limited.lengths, engine.Sampler = lengths, Limited
    try:
        result = generate(*arguments, max_rows=s.rollout_rows)
    finally:
        engine.Sampler = Sampler
    assert [len(ids) for group in result.completions for ids in group] == lengths
    return result


class Limited(Sampler):
    """Random weights draw no sensible lengths, so they are given: a limit beside each row."""
    lengths = None

    def __init__(self, *settings):
        super().__init__(*settings)
        self.all_rows["limit"] = torch.zeros_like(self.all_rows["length"])

    def admit(self, *arguments):
        super().admit(*arguments)
        limits = [Limited.lengths[p * self.G + g] for p, g in self.row_at.values()]
        self.rows.limit[self.tensor(list(self.row_at))] = self.tensor(limits)

    def step(self, n_own):
        super().step(n_own)
        self.rows.running.logical_and_(self.rows.length < self.rows.limit)


def ragged_lengths(n, seed=0):
    draw = random.Random(seed)
    return [draw.randint(8, 256) for _ in range(n)]


def updating(run, result, s, separate_old_pass=False):
    """What train.train does between grading and metrics; optionally a pass for the old log-probs
    alone, which one minibatch an epoch does not need."""
    reward_PG = injected_rewards(len(result.prompts), len(result.completions[0]))
    minibatches = train.lay_out(result, group_advantages(reward_PG, "std").float(), s,
                                run.model.device)
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        if separate_old_pass:
            micro.old_logp_M, _ = run.model.completion_log_probs(micro.batch, s.temperature,
                                                                 entropy=True)
    train.update(run, minibatches, s, train.remember_old_policy(run, minibatches, s))
    return sum(len(micro.batch.ids_N) for minibatch in minibatches for micro in minibatch)


# ------------------------------------------------------------------ work and what could be done

class LiveBytes(TorchDispatchMode):
    """Counts, while it is on, the bytes of all tensors made and not yet freed; `peak` is the most.

    What a kernel uses inside is not seen. Repeatable to the byte, as the peak of a CPU process,
    which depends on what its allocator keeps, is not.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (place := x.untyped_storage()._cdata) \
                    not in self.known:
                storage = x.untyped_storage()
                self.known.add(place)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, place, storage.nbytes())
        return out

    def freed(self, place, n_bytes):
        self.known.discard(place)
        self.now -= n_bytes

def timed(function, device):
    """(seconds until the device is done, what the function returned)."""
    began = clock(str(device))
    value = function()
    return clock(str(device)) - began, value


def machine(device, dtype):
    """Measured ceilings: FLOP/s of a square matrix product (torch's or oneDNN's), bytes/s of a copy
    (read and write)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    big = torch.randn(64 * 2**20, device=device)
    copy = torch.empty_like(big)
    with torch.no_grad():
        flops = max(2 * n**3 / timed(lambda: multiply(a, b), device)[0]
                    for multiply in [torch.mm] + [product] * (device.type == "cpu")
                    for _ in range(5))
        copy.copy_(big)
        rate = max(8 * big.numel() / timed(lambda: copy.copy_(big), device)[0] for _ in range(5))
    return flops, rate


def forward_flops(model, n_body, n_head):
    """2 FLOP per weight and token: n_body tokens through the layers, n_head through the head
    (attention's own products are left out)."""
    head = model.head_weight.numel()
    body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2) - head
    return 2 * (body * n_body + head * n_head)
