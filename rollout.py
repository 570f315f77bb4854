"""Sampling: G completions for each of P prompts; and the flat batch that training runs on.

What it does    `sample_slowly` says what sampling is: one completion after the other, every token
                from a forward pass over the whole text. `generate` gives the same completions, fast
                (see there). `flat_batch` lays prompts and completions end to end for training, each
                prompt once for its whole group.
Not here        the network (model.py), the fast sampler's cache (plumbing/engine.py), what a good
                completion is (rewards.py).
Run it alone    python rollout.py "Tom has 3 boxes of 4 pens. How many pens is that?" -n 4
Where to fork   `sample` draws the next token, for both samplers: add min-p or top-k there, and take
                what draws in CUDA's own way from `choose`. Hand a new setting on in `choose`,
                `sample_slowly`, `generate` and `sample_answers`, and to these in train.py
                (`sample`, `validate`) and plumbing/run.py (`try_largest_batch`); a flag is a line
                in plumbing/settings.py, for evaluate.py in evaluation/settings.py and in the
                settings that evaluation/answers.py keeps beside answers.

Axis letters: P prompts, G completions per prompt, R rows (completions in flight), N flat tokens,
M completion tokens among them, T positions, V vocabulary, U uniform numbers for one token.
"""
import argparse
import time
from array import array
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from tqdm import tqdm

from model import SharedPromptAttention
from plumbing.engine import sampler_for
from plumbing.fast_decode import draw_in_blocks
from plumbing.packed import segments
from plumbing.settings import check_sampling
from rewards import Problem, build_prompt

SORT_BELOW = 0.9  # chosen: a smaller top-p sorts, a larger one redraws
MAX_DRAWS = 8  # a draw misses a nucleus of 0.9 or more with probability ≤ 0.1, eight with ≤ 1e-8


# ------------------------------------------------------------------ sampling completions

@dataclass
class Rollout:
    """P prompts with G completions each: completions[p][g] is completion g of prompt p."""
    prompts: list      # [p]: token ids
    completions: list  # [p][g]: token ids, the stop token included
    logps: list        # [p][g]: a float a token, nats, full softmax at the sampling temperature
    finished: list     # [p][g]: whether it ended with a stop token, not cut at max_new_tokens
    seconds: float

    @property
    def n_tokens(self):
        return sum(len(ids) for group in self.completions for ids in group)


def sample_slowly(model, prompts, group_size=1, max_new_tokens=128, temperature=1.0, top_p=1.0,
                  seed=0, step=0, prompt_keys=None):
    """What sampling is: the Rollout that `generate` gives, computed the obvious way.

    Arguments as in `generate`. The whole text goes through the model for each new token.
    """
    began, completions = time.perf_counter(), []  # of each: ids, logps, finished
    for p, prompt in enumerate(prompts):
        key = p if prompt_keys is None else prompt_keys[p]
        for g in range(group_size):
            ids, logps = [], []
            u_TU = uniforms_for(seed, step, torch.tensor([key]), torch.tensor([g]), max_new_tokens,
                               top_p)[0].to(model.device)
            for t in range(max_new_tokens):
                text_N = torch.tensor(prompt + ids, device=model.device)
                attend = SharedPromptAttention([len(text_N)], [[]], model.device)  # one sequence
                with torch.no_grad():
                    hidden_NC = model(text_N, torch.arange(len(text_N)).to(model.device), attend)
                    logp_1V = model.log_probs(hidden_NC[-1:], temperature or 1.0)  # 0: greedy
                ids.append(sample(logp_1V, u_TU[t:t + 1], temperature, top_p).item())
                logps.append(logp_1V[0, ids[-1]].item())
                if ids[-1] in model.stop_ids:
                    break
            completions.append((ids, logps, ids[-1] in model.stop_ids))
    return rollout_of(prompts, completions, group_size, time.perf_counter() - began)


def rollout_of(prompts, completions, group_size, seconds):
    """A Rollout from one list of (ids, logps, finished), group after group."""
    groups = [completions[i:i + group_size] for i in range(0, len(completions), group_size)]
    return Rollout(list(prompts), *([[c[part] for c in group] for group in groups]
                                    for part in range(3)), seconds)


def generate(model, prompts, group_size=1, max_new_tokens=128, temperature=1.0, top_p=1.0,
             seed=0, step=0, prompt_keys=None, max_rows=256, progress=None):
    """Sample `group_size` completions of every prompt with `model` (a Qwen2): a Rollout.

    The completions of `sample_slowly` (but where rounding tips a draw), faster in four ways, all in
    plumbing/engine.py: a token meets the keys and values of earlier tokens in a cache; a prompt is
    computed and cached once for its group; completions run side by side, and one that ends gives
    its place to one that waits; on CUDA a whole step is one captured graph. The header of that file
    draws rows, seats and places for two prompts with two completions each.

    prompts: lists of token ids. temperature ≥ 0 (0: greedy), top_p in (0, 1].
    seed, step, prompt_keys: what the draws are keyed by, beside sample and position; the keys are
        one int per prompt (default: its index), so a prompt draws alike in any company.
    max_rows: completions in flight at once.
    progress: label of a progress bar over tokens (a completion that ends early gives up the rest),
        or None.
    Raises ValueError where a prompt is empty or leaves no room for max_new_tokens, or max_rows does
        not hold one group.
    """
    refuse_what_does_not_fit(model, prompts, group_size, max_new_tokens, max_rows)
    began, keys = time.perf_counter(), list(range(len(prompts)) if prompt_keys is None else
                                            prompt_keys)
    bar = tqdm(total=len(prompts) * group_size * max_new_tokens, desc=progress, unit="token",
               unit_scale=True, leave=False, disable=progress is None, delay=2)
    on = torch.cuda.device(model.device) if model.on_cuda else nullcontext()
    chosen = partial(choose, temperature=temperature, top_p=top_p)  # a new setting goes here, too

    def uniforms(key_R, sample_R):
        return uniforms_for(seed, step, key_R, sample_R, max_new_tokens, top_p)
    with torch.inference_mode(), on:  # graphs are captured on the current device
        sampler = sampler_for(model, prompts, group_size, max_new_tokens, max_rows, n_draws(top_p),
                              chosen)
        completions = sampler.run(prompts, keys, uniforms, bar)
    bar.close()
    return rollout_of(prompts, completions, group_size, time.perf_counter() - began)


def refuse_what_does_not_fit(model, prompts, group_size, max_new_tokens, max_rows):
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= model.context - max_new_tokens:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens "
                             f"{max_new_tokens} expected 1 to {model.context - max_new_tokens} "
                             f"(the context is {model.context}); shorten it or lower "
                             "--max-new-tokens")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if group_size > max_rows:
        raise ValueError(f"max_rows {max_rows} does not hold one group of {group_size} completions")


def room_for(model, prompts, max_new_tokens):
    """max_new_tokens, or what the longest prompt leaves of the model's context if that is less."""
    longest = max(map(len, prompts))
    if longest >= model.context:
        raise ValueError(f"the longest prompt has {longest} tokens; the model's context holds "
                         f"{model.context}, prompt and completion together")
    return min(max_new_tokens, model.context - longest)


def sample_answers(model, problems, samples=1, temperature=0.0, top_p=1.0, max_new_tokens=512,
                   seed=0, step=0, max_rows=256, prompt_keys=None, progress="evaluate"):
    """Sample `samples` answers to every problem: a Rollout.

    Draws depend on (seed, step, the problem's index or its key, sample, position) alone. progress:
    as in `generate`.
    """
    prompts = [build_prompt(model.tokenizer, problem) for problem in problems]
    return generate(model, prompts, samples, room_for(model, prompts, max_new_tokens), temperature,
                    top_p, seed, step, prompt_keys, max_rows=max(max_rows, samples),
                    progress=progress)


# ------------------------------------------------------------------ drawing one token

def uniform(seed, step, prompt, sample, position, draw):
    """Numbers in [0, 1 − 2⁻²⁴], fp32, each a hash of six counters, ints or int64 tensors (at least
    `prompt`) that broadcast to one shape.

    Nothing else decides a number: not the batch a row runs in, nor its slot, nor earlier draws.
    Rounds are the 64-bit finaliser of SplitMix (Steele, Lea, Flood 2014), in wrapping int64
    arithmetic.
    """
    def mix(x):
        x = (x ^ (x >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
        x = (x ^ (x >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
        return x ^ (x >> 31 & 2**33 - 1)

    state = torch.zeros_like(prompt)
    for counter in (seed, step, prompt, sample, position, draw):
        state = mix((state ^ counter) - 0x61C8864680B583EB)  # + 0x9E3779B97F4A7C15 as int64
    return (state >> 40 & 2**24 - 1).float() * 2**-24


def uniforms_for(seed, step, key_R, sample_R, max_new_tokens, top_p):
    """The numbers behind all draws of these rows: (R, T, U), T = max_new_tokens. See `uniform`."""
    t_T1, draw_U = (torch.arange(n, device=key_R.device) for n in (max_new_tokens, n_draws(top_p)))
    return uniform(seed, step, key_R[:, None, None], sample_R[:, None, None], t_T1[:, None], draw_U)


def inverse_cdf(cdf_RV, u_R):
    """The token at u of cumulated probabilities: (R,) int64; never one of probability zero.

    Searching to the right of u·total keeps u = 0 off a leading token of probability zero; staying
    one float below the total keeps u next to 1 off a trailing one.
    """
    total_R1 = cdf_RV[:, -1:]
    target_R1 = torch.minimum(u_R[:, None] * total_R1, total_R1.nextafter(total_R1 * 0))
    return torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(1)


def choose(model, hidden_RC, u_RU, fast, temperature, top_p):
    """The next token of each row and its log-probability: (R,) int64, (R,) fp32.

    hidden_RC: what predicts it, of `model`. fast: a large rollout on CUDA, which has a way of its
    own for a temperature above 0 and a large top-p. The rest as in `sample`.
    """
    if fast and temperature > 0 and top_p >= SORT_BELOW:
        return draw_in_blocks(model.masked_logits(hidden_RC), u_RU, temperature, top_p)
    logp_RV = model.log_probs(hidden_RC, temperature or 1.0)  # 0: greedy
    token_R = sample(logp_RV, u_RU, temperature, top_p)
    return token_R, logp_RV.gather(1, token_R[:, None]).squeeze(1)


def sample(logp_RV, u_RU, temperature, top_p):
    """Choose the next token of each row: (R,) int64.

    logp_RV: (R, V) fp32 log-probabilities, already at this temperature; 0 takes the likeliest.
    top_p: draw from the nucleus, the smallest set of likeliest tokens whose mass reaches top_p
        (arXiv:1904.09751): those whose strictly likelier tokens hold less than top_p. A small
        top_p masks the others after a sort; a large one redraws until a token is inside.
    u_RU: (R, n_draws(top_p)) numbers in [0, 1), see `uniform`.
    """
    if temperature == 0:
        return logp_RV.argmax(-1)
    prob_RV = logp_RV.exp()
    if top_p >= SORT_BELOW:
        return draw(prob_RV, prob_RV.cumsum(-1), top_p, u_RU)
    sorted_RV = prob_RV.sort(-1, descending=True).values
    n_inside_R1 = (sorted_RV.cumsum(-1) - sorted_RV < top_p).sum(-1, keepdim=True)
    smallest_R1 = sorted_RV.gather(1, n_inside_R1 - 1)
    return inverse_cdf((prob_RV * (prob_RV >= smallest_R1)).cumsum(-1), u_RU[:, 0])


def n_draws(top_p):
    """How many uniform numbers `sample` may need for one token."""
    return MAX_DRAWS if SORT_BELOW <= top_p < 1 else 1


def draw(prob_RV, cdf_RV, top_p, u_RU):
    """Draw a token for each row; rows whose token is outside the nucleus draw again.

    At top_p ≥ 0.9 at most a tenth of the rows fail on average. A quarter of all rows, plus 8 since
    a small batch has larger fluctuations, holds the failed ones but for one case in 10⁸. The size
    of this part is fixed, so that the CPU never waits for the GPU to count them. A row that fails
    every time takes the likeliest token.
    """
    token_R = inverse_cdf(cdf_RV, u_RU[:, 0])
    if top_p >= 1:
        return token_R
    likelier_RV = torch.where(prob_RV > prob_RV.gather(1, token_R[:, None]), prob_RV, 0)
    outside_R = likelier_RV.sum(-1) >= top_p
    if not outside_R.is_cuda and not outside_R.any():  # on CUDA asking would cost a wait
        return token_R
    token_R = torch.where(outside_R, prob_RV.argmax(-1), token_R)
    if u_RU.shape[1] > 1:
        again = outside_R.float().topk(min(len(u_RU), len(u_RU) // 4 + 8)).indices
        drawn = draw(prob_RV[again], cdf_RV[again], top_p, u_RU[again, 1:])
        token_R[again] = torch.where(outside_R[again], drawn, token_R[again])
    return token_R


# ------------------------------------------------------------------ the batch of training

@dataclass
class FlatBatch:
    """Whole groups end to end, each prompt once: N tokens for all layers, M for the output head."""
    ids_N: torch.Tensor
    positions_N: torch.Tensor
    attend: SharedPromptAttention
    predictor_M: torch.Tensor  # the flat token whose hidden state predicts completion token m
    target_M: torch.Tensor     # that completion token's id
    sequence_M: torch.Tensor   # the completion it belongs to, 0, 1, 2, … in this batch
    lengths: list              # tokens of each completion

    def chunks(self, max_tokens):
        """Slices of M that hold whole completions, at most max_tokens each where one fits."""
        slices, start, stop = [], 0, 0
        for n in self.lengths:
            if stop > start and stop + n - start > max_tokens:
                slices.append(slice(start, stop))
                start = stop
            stop += n
        return slices + [slice(start, stop)]


def flat_batch(prompts, completions, device="cpu"):
    """Lay P prompts and their completions end to end, for their log-probabilities: a FlatBatch.

    prompts: P lists of ids; completions: P lists of lists of ids (group sizes may differ).
    A completion's first token is predicted by the last token of the prompt it shares.
    """
    length_P = torch.tensor([len(ids) for ids in prompts])
    group_lengths = [[len(ids) for ids in group]
                     for _, group in zip(prompts, completions, strict=True)]
    lengths = [n for group in group_lengths for n in group]
    sequence_M, t_M = segments(lengths)
    prompt_M = segments([len(group) for group in completions])[0][sequence_M]
    start = int(length_P.sum())  # where completions begin
    positions_N = torch.cat([segments(length_P)[1], length_P[prompt_M] + t_M])
    # the prompt's last token predicts token 0, token k − 1 predicts token k
    predictor_M = torch.where(t_M == 0, length_P.cumsum(0)[prompt_M],
                              start + torch.arange(len(t_M))) - 1
    attend = SharedPromptAttention(length_P.tolist(), group_lengths, device)
    ids_N = torch.frombuffer(array("q", chain(*prompts, *chain(*completions))),
                             dtype=torch.int64).to(device)
    return FlatBatch(ids_N, positions_N.to(device), attend, predictor_M.to(device), ids_N[start:],
                     sequence_M.to(device), lengths)


# ------------------------------------------------------------------ run alone

def main():
    from model import Qwen2
    from plumbing.hub import keep_freed_memory, use_threads
    keep_freed_memory()
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Sample from a model folder.")
    parser.add_argument("question", nargs="*", help="one or more questions",
                        default=["Tom has 3 boxes of 4 pens and finds 5 more pens. "
                                 "How many pens is that?"])
    parser.add_argument("--model", default="tiny", help="hub name or folder")
    parser.add_argument("-n", type=int, default=1, help="completions per question")
    parser.add_argument("--temperature", type=float, default=1.0, help="≥ 0; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus mass, in (0, 1]")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per completion")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check_sampling(parser, args)
    if args.n < 1:
        parser.error(f"-n is {args.n}; expected 1 or more")
    use_threads()
    try:
        model = Qwen2.from_pretrained(args.model, args.device)
        prompts = [build_prompt(model.tokenizer, Problem(str(i), q, "0", "number"))
                   for i, q in enumerate(args.question)]
        rollout = generate(model, prompts, args.n, room_for(model, prompts, args.max_new_tokens),
                           args.temperature, args.top_p, args.seed, max_rows=max(args.n, 256),
                           progress="sampling")
    except (ValueError, OSError) as e:
        parser.exit(1, f"error: {e}\n")
    for question, *group in zip(args.question, rollout.completions, rollout.logps,
                                rollout.finished):
        print(f"\n{question}")
        for ids, logps, finished in zip(*group):
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            print(f"  {len(ids):4} tokens, log-prob {sum(logps):8.2f}:  {text}"
                  + " [cut]" * (not finished))
    print(f"\n{rollout.n_tokens} tokens in {rollout.seconds:.2f} s")


if __name__ == "__main__":
    main()
