"""The work that is measured, done by the project's own functions, and what the machine could do.

Shapes with random weights, prompts with the lengths of GSM8K's, rewards that differ within every
group (real rewards of a random model are all equal, and nothing would train).
"""
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

import rollout
import train
from model import DTYPES, Qwen2, checked_config, write_json
from objectives import group_advantages
from rollout import generate

SHAPES = {  # width, MLP, layers, query heads, key/value heads, vocabulary
    "0.8m": (128, 384, 4, 4, 2, 96),
    "24.9m": (384, 1024, 8, 6, 2, 32000),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936)}
# Prompt lengths at the eighths of GSM8K's training problems under Qwen2.5's plain chat template,
# mean 105 as theirs: measured with its tokenizer.
PROMPT_LENGTHS = (75, 84, 92, 98, 105, 112, 124, 150)


def make_model(shape, device="cpu", dtype="fp32", seed=0):
    """A Qwen2 with random weights that never ends a completion by itself."""
    width, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    model = Qwen2(checked_config({
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": True,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0})).to(device)
    model.compute_dtype = DTYPES[dtype]
    return model


def make_prompts(n, vocabulary, seed=0, length=None):
    """n lists of random ids; lengths cycle through PROMPT_LENGTHS, or are all `length`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length or PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(n)]
    return [torch.randint(1, vocabulary - 1, (n,), generator=generator).tolist() for n in lengths]


def settings(**changed):
    """train.py's settings: the parser's defaults, two epochs of one optimizer step, and these."""
    s = SimpleNamespace(**vars(train.make_parser().parse_args([])))
    vars(s).update(epochs=2, minibatches=1, temperature=1.0, top_p=1.0, warmup_steps=0, steps=10**6,
                   learning_rate=1e-6, seed=0, beta=0.0)
    vars(s).update(changed)
    return s


def make_run(model, s):
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.learning_rate, betas=(0.9, 0.999),
                                  eps=1e-8, weight_decay=0.0, fused=True)
    return SimpleNamespace(model=model, reference=None, optimizer=optimizer,
                           state={"optimizer_steps": 0, "skipped_steps": 0})


def injected_rewards(n_prompts, group_size, seed=0):
    """(P, G) random numbers: never two alike in a group."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_prompts, group_size, dtype=torch.float64, generator=generator)


def sampling(run, prompts, s, step=1):
    return generate(run.model, prompts, s.group_size, s.max_new_tokens, s.temperature, s.top_p,
                    s.seed, step, max_rows=s.rollout_rows)


def updating(run, result, s, separate_old_pass=False):
    """Everything train.one_step does after scoring, without its metrics."""
    advantage_PG = group_advantages(
        injected_rewards(len(result.prompts), result.group_size), "std").float()
    minibatches = train.lay_out(result, advantage_PG, s, run.model.device)
    if separate_old_pass:
        for micro in (micro for minibatch in minibatches for micro in minibatch):
            micro.old_logp_M, _ = run.model.completion_log_probs(micro.batch, s.temperature,
                                                                 entropy=True)
    train.old_log_probs(run, minibatches, s)
    return train.update(run, minibatches, s)
