"""Attention patterns, key/value cache, sampler, and the flat batch that training scores.

What it does    `generate` samples G completions for each of P prompts: every prompt runs through
                the model once, its keys and values are stored once for its whole group, and rows
                that have finished leave the computation. `flat_batch` lays prompts and completions
                end to end for scoring, again with each prompt once.
What it leaves  the network to model.py, what a good completion is to rewards.py.
Run it alone    python rollout.py "Tom has 3 boxes of 4 pens. How many pens is that?" -n 4
Where to fork   `sample` holds the choice of the next token (add min-p or top-k there);
                `SharedPromptAttention` holds who sees whom in training.

Axis letters: P prompts, G completions per prompt, B = P·G rows, R rows still running, S places for
running rows beside one prompt, N flat tokens, M completion tokens, T positions (J those of keys),
V vocabulary, H query heads, K key/value heads, h = H/K query heads that share one, D head width.
"""
import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

# On Hopper torch prefers cuDNN's attention, whose backward with a mask can give NaN (issue 196678
# of pytorch) and which builds a plan for every new shape; here nearly every micro-batch is new.
torch.backends.cuda.enable_cudnn_sdp(False)

LOOK_EVERY = 4  # chosen: decode steps between looks at which rows have finished
SORT_BELOW = 0.9  # chosen: a smaller top-p sorts; from here on 8 draws almost always suffice:
MAX_DRAWS = 8  # each misses the nucleus with probability ≤ 0.1, all of them with ≤ 1e-8


# ------------------------------------------------------------------ who may see which token

class PaddedSequences:
    """Index tensors that view flat tokens as padded sequences, inside attention only.

    Sequence i asks with its own tokens (rows `start … start + length` of the flat axis), and sees
    the tokens of its prefix followed by its own up to the one that asks. Without the prefix
    arguments no sequence has a prefix.
    """

    def __init__(self, start_B, length_B, prefix_start_B=None, prefix_length_B=None):
        t_T = torch.arange(int(length_B.max()), device=start_B.device)
        last_B1 = (start_B + length_B - 1).clamp(min=0)[:, None]
        self.query_BT = torch.minimum(start_B[:, None] + t_T, last_B1)
        self.key_BJ, self.mask = self.query_BT, None
        if prefix_start_B is not None:
            prefix_B1 = prefix_length_B[:, None]
            j_J = torch.arange(int((prefix_length_B + length_B).max()), device=start_B.device)
            own_BJ = torch.minimum(start_B[:, None] + j_J - prefix_B1, last_B1)
            self.key_BJ = torch.where(j_J < prefix_B1, prefix_start_B[:, None] + j_J, own_BJ)
            self.visible_BTJ = j_J <= prefix_B1[:, :, None] + t_T[:, None]
        self.place_N = (t_T < length_B[:, None]).flatten().nonzero().squeeze(1)

    def attend(self, q_NHD, k_NKD, v_NKD):
        """Attention of these sequences' own tokens, flat again: (their number, H, D)."""
        (B, T), J = self.query_BT.shape, self.key_BJ.shape[1]
        H, (K, D) = q_NHD.shape[1], k_NKD.shape[1:]
        q = q_NHD.index_select(0, self.query_BT.flatten()).view(B, T, H, D).transpose(1, 2)
        k = k_NKD.index_select(0, self.key_BJ.flatten()).view(B, J, K, D).transpose(1, 2)
        v = v_NKD.index_select(0, self.key_BJ.flatten()).view(B, J, K, D).transpose(1, 2)
        if self.key_BJ is self.query_BT:  # padding comes last, so causal order alone hides it
            k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
            out_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # heads that share keys are stacked along T: torch's fast kernels take no mask
            # beside grouped queries
            q = q.reshape(B, K, H // K * T, D)
            mask = self.stacked_mask(H // K, q.dtype)
            out_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, H, T, D)
        return out_BHTD.transpose(1, 2).reshape(B * T, H, D).index_select(0, self.place_N)

    def stacked_mask(self, h, dtype):
        """The additive mask (B, 1, h·T, J), made once for all layers; rows start at multiples of 8
        elements, as CUDA kernels want it."""
        if self.mask is None or self.mask.dtype != dtype:
            visible = F.pad(self.visible_BTJ, (0, -self.visible_BTJ.shape[2] % 8))
            visible = visible.repeat(1, h, 1)[:, None]
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self.mask = mask.masked_fill_(~visible, -torch.inf)[..., :self.visible_BTJ.shape[2]]
        return self.mask


class SharedPromptAttention:
    """Flat tokens: all prompts end to end, then all completions end to end, group by group.

    A prompt sees itself, causally; a completion sees its prompt and itself. Without completions
    these are independent sequences.
    prompt_lengths: P ints; completion_lengths: P lists of ints, in tokens.
    """

    def __init__(self, prompt_lengths, completion_lengths, device="cpu"):
        length_P = torch.tensor(prompt_lengths, device=device)
        start_P = length_P.cumsum(0) - length_P
        self.n_prompt_tokens = sum(prompt_lengths)
        self.prompts = PaddedSequences(start_P, length_P)
        self.completions = None
        lengths = [n for group in completion_lengths for n in group]
        if sum(lengths):
            prompt_B = torch.tensor([p for p, group in enumerate(completion_lengths)
                                     for _ in group], device=device)
            length_B = torch.tensor(lengths, device=device)
            start_B = self.n_prompt_tokens + length_B.cumsum(0) - length_B
            self.completions = PaddedSequences(start_B, length_B, start_P[prompt_B],
                                               length_P[prompt_B])

    def __call__(self, layer, q_NHD, k_NKD, v_NKD):
        out = self.prompts.attend(q_NHD, k_NKD, v_NKD)
        if self.completions is None:
            return out
        return torch.cat([out, self.completions.attend(q_NHD, k_NKD, v_NKD)])


def scores(q, k):
    """q·kᵀ in fp32 whatever their dtype: (…, …, S, D), (…, …, T, D) -> (…, …, S, T).

    Qwen2.5 has keys so large that scores rounded to bf16 would be another policy than the
    trainer's.
    """
    if q.dtype == torch.float32:
        return q @ k.transpose(2, 3)
    if q.is_cuda:
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.unflatten(0, q.shape[:2])
    return q.float() @ k.float().transpose(2, 3)


class CachedAttention:
    """One new token for each running row, against the cache; prompts are stored once per group.

    prompt_k, prompt_v: per layer (P, K, T, D); own_k, own_v: per layer (R, K, max_new_tokens, D).
    Row r runs beside prompt prompt_R[r]; `t` tokens of each running row are cached so far (whoever
    runs the model adds one after its last layer). To meet a prompt's keys without copying them for
    every row, the queries of the rows beside it are stacked into one long query (`by_prompt`) and
    what comes out is taken apart again (`by_row`).
    """

    def __init__(self, prompt_k, prompt_v, prompt_lengths, prompt_R, max_new_tokens):
        self.prompt_k, self.prompt_v, self.t = prompt_k, prompt_v, 0
        t_T = torch.arange(prompt_k[0].shape[2], device=prompt_R.device)
        padding_PT = t_T >= torch.tensor(prompt_lengths, device=prompt_R.device)[:, None]
        mask_PT = torch.zeros(padding_PT.shape, device=prompt_R.device)
        self.mask_P11T = mask_PT.masked_fill(padding_PT, -torch.inf)[:, None, None]
        K, D = prompt_k[0].shape[1], prompt_k[0].shape[3]
        shape = (len(prompt_R), K, max_new_tokens, D)
        self.own_k = [torch.empty(shape, dtype=k.dtype, device=k.device) for k in prompt_k]
        self.own_v = [torch.empty(shape, dtype=v.dtype, device=v.device) for v in prompt_v]
        self.seat(prompt_R)

    def seat(self, prompt_R):
        """Give each running row one of S places beside its prompt."""
        R = torch.arange(len(prompt_R), device=prompt_R.device)
        order = torch.argsort(prompt_R, stable=True)
        count_P = torch.bincount(prompt_R, minlength=len(self.mask_P11T))
        first_P = count_P.cumsum(0) - count_P
        place = torch.empty_like(R)
        place[order] = R - first_P[prompt_R[order]]
        S = int(count_P.max())
        self.place_R = prompt_R * S + place
        self.row_PS = torch.zeros(len(count_P) * S, dtype=torch.int64, device=prompt_R.device)
        self.row_PS[self.place_R] = R  # an empty place repeats row 0; nobody reads its result
        self.prompt_R, self.S = prompt_R, S

    def by_prompt(self, x_RKhX):
        """(R, K, h, X) -> (P, K, S·h, X), the rows of one prompt together."""
        _, K, h, X = x_RKhX.shape
        x = x_RKhX.index_select(0, self.row_PS).view(-1, self.S, K, h, X)
        return x.transpose(1, 2).reshape(-1, K, self.S * h, X)

    def by_row(self, x_PKSX, h):
        """The way back: (P, K, S·h, X) -> (R, K, h, X)."""
        P, K, _, X = x_PKSX.shape
        x = x_PKSX.view(P, K, self.S, h, X).transpose(1, 2).reshape(P * self.S, K, h, X)
        return x.index_select(0, self.place_R)

    def __call__(self, layer, q_RHD, k_RKD, v_RKD):
        (R, H, D), K, n_own = q_RHD.shape, k_RKD.shape[1], self.t + 1
        self.own_k[layer][:, :, self.t], self.own_v[layer][:, :, self.t] = k_RKD, v_RKD
        own_k, own_v = self.own_k[layer][:, :, :n_own], self.own_v[layer][:, :, :n_own]
        q = q_RHD.view(R, K, H // K, D)
        beside_prompt = scores(self.by_prompt(q), self.prompt_k[layer]) + self.mask_P11T
        logit = torch.cat([self.by_row(beside_prompt, H // K), scores(q, own_k)], -1)
        weight = (logit * D**-0.5).softmax(-1).to(q.dtype)
        w_prompt, w_own = weight[..., :-n_own], weight[..., -n_own:]
        out = self.by_row(self.by_prompt(w_prompt) @ self.prompt_v[layer], H // K)
        return (out + w_own @ own_v).view(R, H, D)

    def keep(self, row_R):
        """Drop every row but these, and the prompts nobody needs any more."""
        for cache in (self.own_k, self.own_v):
            for layer, old in enumerate(cache):
                cache[layer] = old.new_empty(len(row_R), *old.shape[1:])
                cache[layer][:, :, :self.t] = old[:, :, :self.t].index_select(0, row_R)
        kept_P, prompt_R = self.prompt_R[row_R].unique(return_inverse=True)
        if len(kept_P) < len(self.mask_P11T):
            self.mask_P11T = self.mask_P11T.index_select(0, kept_P)
            self.prompt_k = [k.index_select(0, kept_P) for k in self.prompt_k]
            self.prompt_v = [v.index_select(0, kept_P) for v in self.prompt_v]
        self.seat(prompt_R)


# ------------------------------------------------------------------ drawing one token

def uniform(seed, step, prompt_R, sample_R, position, draw):
    """A number in [0, 1 − 2⁻²⁴] per row, a hash of its six counters: (R,) fp32.

    Nothing else decides it: not the batch a row runs in, nor its slot, nor earlier draws. Rounds
    are the 64-bit finaliser of SplitMix (Steele, Lea, Flood 2014), in wrapping int64 arithmetic.
    """
    def mix(x):
        x = (x ^ (x >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
        x = (x ^ (x >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
        return x ^ (x >> 31 & 2**33 - 1)

    state = torch.zeros_like(prompt_R)
    for counter in (seed, step, prompt_R, sample_R, position, draw):
        state = mix((state ^ counter) - 0x61C8864680B583EB)  # + 0x9E3779B97F4A7C15 as int64
    return (state >> 40 & 2**24 - 1).float() * 2**-24


def inverse_cdf(cdf_RV, u_R):
    """The token at u of cumulated probabilities: (R,) int64; never one of probability zero.

    Searching to the right of u·total keeps u = 0 off a leading token of probability zero; staying
    one float below the total keeps u next to 1 off a trailing one.
    """
    total_R1 = cdf_RV[:, -1:]
    target_R1 = torch.minimum(u_R[:, None] * total_R1, total_R1.nextafter(total_R1 * 0))
    return torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(1)


def sample(logp_RV, temperature, top_p, counters):
    """Choose the next token of each row: (R,) int64.

    logp_RV: (R, V) fp32 log-probabilities, already at this temperature; 0 takes the likeliest.
    top_p: draw from the nucleus, the smallest set of likeliest tokens whose mass reaches top_p
        (arXiv:1904.09751): those whose strictly likelier tokens hold less than top_p. A small
        top_p masks the others after a sort; a large one redraws until a token is inside.
    counters: (seed, step, prompt_R, sample_R, position), see `uniform`.
    """
    if temperature == 0:
        return logp_RV.argmax(-1)
    prob_RV = logp_RV.exp()
    if top_p >= 1:
        return inverse_cdf(prob_RV.cumsum(-1), uniform(*counters, 0))
    if top_p < SORT_BELOW:
        sorted_RV = prob_RV.sort(-1, descending=True).values
        n_inside_R1 = (sorted_RV.cumsum(-1) - sorted_RV < top_p).sum(-1, keepdim=True)
        smallest_R1 = sorted_RV.gather(1, n_inside_R1 - 1)
        cdf_RV = (prob_RV * (prob_RV >= smallest_R1)).cumsum(-1)
        return inverse_cdf(cdf_RV, uniform(*counters, 0))
    cdf_RV = prob_RV.cumsum(-1)
    token_R = logp_RV.argmax(-1)  # what a row keeps if every draw fails; always in the nucleus
    waiting_R = torch.ones_like(token_R, dtype=torch.bool)
    for draw in range(MAX_DRAWS):
        drawn_R = inverse_cdf(cdf_RV, uniform(*counters, draw))
        likelier_RV = prob_RV > prob_RV.gather(1, drawn_R[:, None])
        inside_R = (prob_RV * likelier_RV).sum(-1) < top_p
        token_R = torch.where(waiting_R & inside_R, drawn_R, token_R)
        waiting_R = waiting_R & ~inside_R
        if not waiting_R.is_cuda and not waiting_R.any():  # on CUDA asking would cost a wait
            break
    return token_R


# ------------------------------------------------------------------ sampling completions

@dataclass
class Rollout:
    """P prompts with G completions each; row b = p·G + g is completion g of prompt p."""
    prompts: list       # P lists of token ids
    completions: list   # B lists of token ids, the stop token included
    logps: list         # B lists of floats: nats, full softmax at the sampling temperature
    finished: list      # B bools: ended with a stop token, not cut at max_new_tokens
    group_size: int
    seconds: float

    @property
    def n_tokens(self):
        return sum(map(len, self.completions))


def room_for(model, prompts, max_new_tokens):
    """max_new_tokens, or what the longest prompt leaves of the model's context if that is less."""
    longest = max(map(len, prompts))
    if longest >= model.context:
        raise ValueError(f"the longest prompt has {longest} tokens; the model's context holds "
                         f"{model.context}, prompt and completion together")
    return min(max_new_tokens, model.context - longest)


def generate(model, prompts, group_size=1, max_new_tokens=128, temperature=1.0, top_p=1.0,
             seed=0, step=0, prompt_keys=None, max_rows=256, progress=None):
    """Sample `group_size` completions of every prompt with `model` (a Qwen2): a Rollout.

    prompts: lists of token ids. temperature ≥ 0 (0: greedy), top_p in (0, 1].
    seed, step, prompt_keys: what the draws are keyed by, beside sample and position; the keys are
        one int per prompt (default: its index), so a prompt draws alike in any company.
    max_rows: completions in flight at once; more prompts run in waves of whole groups.
    progress: label of a progress bar over tokens, or None; a row that ends early gives up the rest.
    Raises ValueError where a prompt is empty or leaves no room for max_new_tokens, or max_rows does
        not hold one group.
    """
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= model.context - max_new_tokens:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens "
                             f"{max_new_tokens} expected 1 to {model.context - max_new_tokens} "
                             f"(the context is {model.context}); shorten it or lower "
                             "--max-new-tokens")
    keys = list(range(len(prompts))) if prompt_keys is None else list(prompt_keys)
    if group_size > max_rows:
        raise ValueError(f"max_rows {max_rows} does not hold one group of {group_size} completions")
    wave = max_rows // group_size
    rollout = Rollout(list(prompts), [], [], [], group_size, 0.0)
    model = model.for_sampling()
    bar = tqdm(total=len(prompts) * group_size * max_new_tokens, desc=progress, unit="token",
               unit_scale=True, leave=False, disable=progress is None, delay=2)
    for i in range(0, len(prompts), wave):
        result = decode(model, prompts[i:i + wave], keys[i:i + wave], group_size, max_new_tokens,
                        temperature, top_p, seed, step, bar)
        for whole, part in zip((rollout.completions, rollout.logps, rollout.finished), result):
            whole.extend(part)
    bar.close()
    rollout.seconds = time.perf_counter() - began
    return rollout


def prefill(model, prompts, device):
    """Run all prompts once: last hidden states (P, C), keys and values per layer (P, K, T, D)."""
    attention = SharedPromptAttention([len(p) for p in prompts], [[] for _ in prompts], device)
    padded_PT = attention.prompts.query_BT  # repeats the last token: no garbage in the padding
    keys, values = [], []

    def attend(layer, q_NHD, k_NKD, v_NKD):
        for store, x_NKD in ((keys, k_NKD), (values, v_NKD)):
            x = x_NKD.index_select(0, padded_PT.flatten()).unflatten(0, padded_PT.shape)
            store.append(x.transpose(1, 2).contiguous())
        return attention(layer, q_NHD, k_NKD, v_NKD)

    ids_N = torch.tensor([i for p in prompts for i in p], device=device)
    positions_N = torch.tensor([t for p in prompts for t in range(len(p))], device=device)
    hidden_NC = model(ids_N, positions_N, attend)
    return hidden_NC.index_select(0, padded_PT[:, -1]), keys, values


@torch.inference_mode()
def decode(model, prompts, keys, group_size, max_new_tokens, temperature, top_p, seed, step, bar):
    """One wave of `generate`: (completions, logps, finished), each a list with one entry a row."""
    device, B = model.device, len(prompts) * group_size
    hidden_PC, prompt_k, prompt_v = prefill(model, prompts, device)
    row_R = torch.arange(B, device=device)  # running row -> row of the wave
    prompt_R, sample_R = row_R // group_size, row_R % group_size
    key_R = torch.tensor(keys, device=device)[prompt_R]
    length_R = torch.tensor([len(p) for p in prompts], device=device)[prompt_R]
    cache = CachedAttention(prompt_k, prompt_v, [len(p) for p in prompts], prompt_R, max_new_tokens)
    del prompt_k, prompt_v  # the cache alone holds them, so that it can let go of them
    stop_ids = torch.tensor(model.stop_ids, device=device)
    token_BT = torch.zeros(B, max_new_tokens, dtype=torch.int64, device=device)
    logp_BT = torch.zeros(B, max_new_tokens, device=device)
    length_B = torch.zeros(B, dtype=torch.int64, device=device)
    finished_B = torch.zeros(B, dtype=torch.bool, device=device)

    logp_RV = model.log_probs(hidden_PC, temperature or 1.0).index_select(0, prompt_R)
    for t in range(max_new_tokens):
        token_R = sample(logp_RV, temperature, top_p, (seed, step, key_R, sample_R, t))
        token_BT[row_R, t] = token_R
        logp_BT[row_R, t] = logp_RV.gather(1, token_R[:, None]).squeeze(1)
        length_B[row_R] += ~finished_B[row_R]
        finished_B[row_R] |= torch.isin(token_R, stop_ids)
        if t + 1 == max_new_tokens:
            break
        if t % LOOK_EVERY == LOOK_EVERY - 1:
            keep = (~finished_B[row_R]).nonzero().squeeze(1)
            n_ended = len(row_R) - len(keep)
            bar.update(len(row_R) * LOOK_EVERY + n_ended * (max_new_tokens - t - 1))
            if len(keep) == 0:
                break
            if len(keep) < len(row_R):
                row_R, token_R, key_R, sample_R, length_R = (
                    x[keep] for x in (row_R, token_R, key_R, sample_R, length_R))
                cache.keep(keep)
        hidden_RC = model(token_R, length_R + t, cache)
        cache.t += 1
        logp_RV = model.log_probs(hidden_RC, temperature or 1.0)

    lengths = length_B.tolist()
    return ([row[:n] for row, n in zip(token_BT.tolist(), lengths)],
            [row[:n] for row, n in zip(logp_BT.tolist(), lengths)], finished_B.tolist())


# ------------------------------------------------------------------ the batch that training scores

@dataclass
class FlatBatch:
    """Whole groups end to end, each prompt once: N tokens for the body, M of them scored."""
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
    """Lay P prompts and their completions end to end for scoring: a FlatBatch.

    prompts: P lists of ids; completions: P lists of lists of ids (group sizes may differ).
    A completion's first token is predicted by the last token of the prompt it shares.
    """
    ids = [i for p in prompts for i in p] + [i for g in completions for c in g for i in c]
    positions = [t for p in prompts for t in range(len(p))]
    predictor, lengths = [], []
    prompt_end, start = 0, len(positions)
    for prompt, group in zip(prompts, completions, strict=True):
        prompt_end += len(prompt)
        for completion in group:
            n = len(completion)
            positions += range(len(prompt), len(prompt) + n)
            predictor += [prompt_end - 1, *range(start, start + n - 1)][:n]
            lengths.append(n)
            start += n
    attend = SharedPromptAttention([len(p) for p in prompts],
                                   [[len(c) for c in g] for g in completions], device)
    length_B = torch.tensor(lengths, device=device)
    sequence_M = torch.arange(len(lengths), device=device).repeat_interleave(length_B)
    ids_N = torch.tensor(ids, device=device)
    return FlatBatch(ids_N, torch.tensor(positions, device=device), attend,
                     torch.tensor(predictor, device=device), ids_N[attend.n_prompt_tokens:],
                     sequence_M, lengths)


def check_sampling(parser, args):
    """Refuse sampling settings and devices that mean nothing, with the parser's one-line error."""
    for temperature in args.temperature if type(args.temperature) is list else [args.temperature]:
        if not 0 <= temperature < float("inf"):
            parser.error(f"--temperature is {temperature}; expected 0 (greedy) or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p is {args.top_p}; expected a value in (0, 1]")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; expected 1 or more")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in ["cpu", *gpus, *(["cuda"] if gpus else [])]:
        parser.error(f"--device is {args.device}; expected cpu, or cuda where torch finds a GPU "
                     f"(it finds {torch.cuda.device_count()})")


def main():
    from model import Qwen2
    from rewards import Problem, build_prompt
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
    try:
        model = Qwen2.from_pretrained(args.model, args.device)
        prompts = [build_prompt(model.tokenizer, Problem(str(i), q, "0", "number"))
                   for i, q in enumerate(args.question)]
        rollout = generate(model, prompts, args.n, room_for(model, prompts, args.max_new_tokens),
                           args.temperature, args.top_p, args.seed, max_rows=max(args.n, 256),
                           progress="sampling")
    except (ValueError, OSError) as e:
        parser.exit(1, f"error: {e}\n")
    for b, (ids, logps) in enumerate(zip(rollout.completions, rollout.logps)):
        if b % args.n == 0:
            print(f"\n{args.question[b // args.n]}")
        end = "" if rollout.finished[b] else " [cut]"
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        print(f"  {len(ids):4} tokens, log-prob {sum(logps):8.2f}:  {text}{end}")
    print(f"\n{rollout.n_tokens} tokens in {rollout.seconds:.2f} s")


if __name__ == "__main__":
    main()
