"""Does a model fit a card? The memory of a run, added up from the code's own tensors.

What it does    makes the model, the copy that samples, both samplers and the gradients of a run on
                torch's meta device, where a tensor has a shape and no memory, runs a decode step
                and a micro-batch there as on CUDA, and counts the bytes of what is alive.
Not here        what CUDA itself takes, about 0.5 GiB, and memory that is free in pieces. Attention
                is counted as a CPU computes it and the decode step is the plain one: both are more.
Run it alone    python -m bench.fits qwen2.5-1.5b --optimizer adamw8bit --checkpoint-activations
Where to fork   a shape is one line in ours.SHAPES; the flags are those of train.py.
"""
import sys
from functools import partial
from unittest import mock

import torch

from bench import ours
from bench.report import table
from plumbing.engine import Sampler, places_for, prefill
from plumbing.run import STATE_BYTES, groups_that_fit
from plumbing.settings import make_parser
from rollout import choose, flat_batch, n_draws

PROMPT = 172  # tokens: GSM8K's training prompts with the system instruction have about as many
LONGEST = 384  # tokens: room for the longest of them
CARD_BYTES = 23 * 2**30  # what a card of 24 GB leaves to torch


def memory_of(shape, s, card_bytes=CARD_BYTES):
    """({what: bytes} during an update with train.py's settings `s`, n): n groups, at least one, are
    the micro-batch that train.py would choose on a card with so many bytes."""
    parts, G, T = {}, s.group_size, s.max_new_tokens
    chosen = partial(choose, temperature=s.temperature, top_p=s.top_p)
    work = (s.prompts_per_step, G), (s.validation_problems, s.validation_samples)
    with ours.LiveBytes() as live:
        def add(what):
            parts[what] = live.now - sum(parts.values())

        def peak_of(function, *arguments):
            live.peak = before = live.now
            function(*arguments)
            return live.peak - before

        model = ours.make_model(shape, "meta", s.dtype)
        model.checkpoint_activations = s.checkpoint_activations
        add("weights")
        twin = model.for_sampling()
        add("copy that samples")
        samplers = [Sampler(twin, LONGEST, *places_for(n, samples, s.rollout_rows), samples, T,
                            n_draws(s.top_p), chosen) for n, samples in work]
        add("caches of both samplers")

        def micro_batch(n):
            batch = flat_batch([[1] * PROMPT] * n, [[[1] * T] * G] * n, "meta")
            model.accumulate_gradients(batch, s.temperature, lambda logp, chunk: logp.sum())
        with mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)):
            steps = 0
            for sampler in samplers:
                sampler.resize(len(sampler.places))
                steps += peak_of(sampler.step, T)
            prompts = [[1] * PROMPT] * samplers[-1].attention.n_places
            while_sampling = peak_of(prefill, twin, prompts)
            micro_batch(1)
            add("gradients")
            n_parameters = sum(p.numel() for p in model.parameters())
            parts["the optimizer's state"] = int(STATE_BYTES[s.optimizer] * n_parameters)
            parts["captured decode steps"] = steps
            free = card_bytes - sum(parts.values())
            one, two = peak_of(micro_batch, 1), peak_of(micro_batch, 2)
            n = min(max(groups_that_fit(free, one, two), 1), s.prompts_per_step // s.minibatches)
            while (peak := peak_of(micro_batch, n)) > free and n > 1:
                n //= 2
            parts["a micro-batch"] = peak
    assert while_sampling < parts["gradients"] + parts["a micro-batch"]  # then neither is there
    return parts, n


def main(shape="qwen2.5-1.5b", *flags):
    if shape not in ours.SHAPES:
        sys.exit(f"{__doc__}\nshapes: {', '.join(ours.SHAPES)}")
    s = make_parser().parse_args(["--dtype", "bf16", *flags])
    (least, _), (parts, n) = memory_of(shape, s, 0), memory_of(shape, s)
    rows = zip([*parts, "all"], *([*x.values(), sum(x.values())] for x in (least, parts)))
    print(table([" ".join([shape, *flags]), "GiB, micro-batches of 1 group", f"of {n}"],
                [(what, *(f"{n_bytes / 2**30:.2f}" for n_bytes in row)) for what, *row in rows]))
    print(f"\n(of {n} groups where {CARD_BYTES / 2**30:.0f} GiB are free at first)")


if __name__ == "__main__":
    main(*sys.argv[1:])
