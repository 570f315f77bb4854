"""Where the sampler's and the trainer's log-probs part in bf16: python -m experiments.gap [MODEL]

What it does    samples completions in bf16, computes their log-probs again as the trainer does, and
                in fp32 with the same weights (rounded to bf16, which both share). Then fp32 with
                bf16's rounding at one kind of place at a time: what each adds to the spread.
Not here        the gap of a run, which its metrics show: `sampler_gap_mean` (docs/metrics.md).
"""
import argparse
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from model import Qwen2, rotary_table, rotate
from plumbing.metrics import exact_log_probs
from rewards import build_prompt, load_problems
from rollout import flat_batch, generate

PLACES = {
    "norms": "what the norms give", "rotary": "rotated queries and keys",
    "attention": "what attention gives", "projections": "q, k, v, o, gate, up, down",
    "swiglu": "silu(gate) · up", "stream": "the residual stream, after each addition",
    "logits": "the logits"}


@torch.no_grad()
def log_probs(model, batch, temperature, places):
    """The batch's log-probs in fp32, rounded to bf16 at these places: (M,)."""
    def rounded(place, x):
        return x.bfloat16().float() if place in places else x

    def normed(x, norm):
        return rounded("norms", F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps))

    def projected(x, linear):
        return rounded("projections", linear(x))
    c = model.config
    D, H, K = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    rotary = rotary_table(batch.positions_N, c, torch.float32)
    x = F.embedding(batch.ids_N, model.model["embed_tokens"].weight)
    for number, layer in enumerate(model.model["layers"]):
        a, mlp = layer.self_attn, layer.mlp
        qkv = projected(normed(x, layer.input_layernorm), a.qkv_proj).view(len(x), -1, D)
        q, k, v = qkv.split([H, K, K], 1)
        q, k = rounded("rotary", rotate(q, rotary)), rounded("rotary", rotate(k, rotary))
        y = rounded("attention", batch.attend(number, q, k, v)).flatten(1)
        x = rounded("stream", x + projected(y, a.o_proj))
        gate, up = projected(normed(x, layer.post_attention_layernorm),
                             mlp.gate_up_proj).chunk(2, -1)
        x = rounded("stream", x + projected(rounded("swiglu", F.silu(gate) * up), mlp.down_proj))
    hidden_MC = normed(x, model.model["norm"]).index_select(0, batch.predictor_M)
    logits = rounded("logits", hidden_MC @ model.head_weight[:model.n_real_ids].T)
    return F.log_softmax(logits / temperature, -1).gather(1, batch.target_M[:, None]).squeeze(1)


def main():
    parser = argparse.ArgumentParser(description="Where sampler and trainer part in bf16.")
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--data", default="onestep")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args()
    model, T = Qwen2.from_pretrained(args.model, dtype="bf16"), 0.8
    with torch.no_grad():
        for p in model.parameters():  # both share this rounding, which makes no gap
            p.copy_(p.bfloat16())
    prompts = [build_prompt(model.tokenizer, problem)
               for problem in load_problems(args.data, "train")[:args.prompts]]
    rollout = generate(model, prompts, 4, args.new_tokens, T, progress="sampling")
    batch = flat_batch(prompts, rollout.completions)
    sampled = torch.tensor([x for group in rollout.logps for logps in group for x in logps])
    trained, _ = model.completion_log_probs(batch, T)
    exact = exact_log_probs(model, SimpleNamespace(batch=batch), T)
    model.compute_dtype = torch.float32
    plain = log_probs(model, batch, T, ())
    print(f"{len(exact):,} tokens; own forward beside the model's: "
          f"{(plain - exact).abs().max().item():.1e}\n\n| | mean | 99th percentile | variance |")
    print("|---|---:|---:|---:|")

    def line(name, difference):
        d = difference.abs().double()
        print(f"| {name} | {d.mean():.4f} | {d.quantile(0.99):.4f} | {d.square().mean():.2e} |",
              flush=True)
        return d.square().mean().item()
    total = sum(line(words, log_probs(model, batch, T, (place,)) - plain)
                for place, words in PLACES.items())
    print(f"| sum of these | | | {total:.2e} |")
    line("all of these together", log_probs(model, batch, T, PLACES) - plain)
    line("all but the logits", log_probs(model, batch, T, PLACES.keys() - {"logits"}) - plain)
    line("trainer, bf16, beside fp32", trained - exact)
    line("sampler, bf16, beside fp32", sampled - exact)
    line("sampler beside trainer", sampled - trained)


if __name__ == "__main__":
    main()
