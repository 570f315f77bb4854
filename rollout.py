"""Attention patterns, key/value cache, sampler, and the flat batch that training scores.

What it does    `generate` samples G completions for each of P prompts: every prompt runs through
                the model once, its keys and values are stored once for its whole group, and rows
                that have finished make room for rows that wait. `flat_batch` lays prompts and
                completions end to end for scoring, again with each prompt once.
What it leaves  the network to model.py, what a good completion is to rewards.py.
Run it alone    python rollout.py "Tom has 3 boxes of 4 pens. How many pens is that?" -n 4
Where to fork   `sample` holds the choice of the next token (add min-p or top-k there);
                `SharedPromptAttention` holds who sees whom in training.

Axis letters: P prompts, G completions per prompt, B = P·G rows, R rows in flight, S seats beside
prompts, N flat tokens, M completion tokens, T positions (J those of keys), V vocabulary, H query
heads, K key/value heads, h = H/K query heads that share one, D head width.
"""
import argparse
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

# On Hopper torch prefers cuDNN's attention, whose backward with a mask can give NaN (issue 196678
# of pytorch) and which builds a plan for every new shape; here nearly every micro-batch is new.
torch.backends.cuda.enable_cudnn_sdp(False)

LOOK_EVERY = 4  # chosen: decode steps between looks at which rows have finished
REFILL = 16  # chosen: 1/16 of the places are filled together, so that new prompts are, too
LENGTH_STEP = 32  # chosen, on CUDA: graphs are captured for cached lengths of 32, 64, 96, … tokens
SORT_BELOW = 0.9  # chosen: a smaller top-p sorts; from here on 8 draws almost always suffice:
MAX_DRAWS = 8  # each misses the nucleus with probability ≤ 0.1, all of them with ≤ 1e-8


# ------------------------------------------------------------------ who may see which token

class PaddedSequences:
    """Index tensors that view flat tokens as padded sequences, inside attention only.

    Sequence i asks with its own tokens (rows `start … start + length` of the flat axis), and sees
    the tokens of its prefix followed by its own up to the one that asks. Without the prefix
    arguments no sequence has a prefix. All four are lists of ints, so that nothing here waits for
    a GPU.
    """

    def __init__(self, starts, lengths, prefix_starts=None, prefix_lengths=None, device="cpu"):
        def column(values):
            return torch.tensor(values, dtype=torch.int64, device=device)[:, None]
        start_B1, self.length_B = column(starts), column(lengths).squeeze(1)
        t_T = torch.arange(max(lengths), device=device)
        last_B1 = column([max(s + n - 1, 0) for s, n in zip(starts, lengths)])
        self.query_BT = torch.minimum(start_B1 + t_T, last_B1)
        self.key_BJ, self.mask = self.query_BT, None
        if prefix_starts is not None:
            prefix_B1 = column(prefix_lengths)
            j_J = torch.arange(max(map(sum, zip(prefix_lengths, lengths))), device=device)
            own_BJ = torch.minimum(start_B1 + j_J - prefix_B1, last_B1)
            self.key_BJ = torch.where(j_J < prefix_B1, column(prefix_starts) + j_J, own_BJ)
            self.visible_BTJ = j_J <= prefix_B1[:, :, None] + t_T[:, None]
        self.place_N = torch.tensor([b * len(t_T) + t for b, n in enumerate(lengths)
                                     for t in range(n)], dtype=torch.int64, device=device)

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
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out_BHTD = out.reshape(B, H, T, D)  # no view: CUDA's lies in memory as (B, hT, K, D)
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
        start_P = [0, *accumulate(prompt_lengths)]
        self.n_prompt_tokens = start_P[-1]
        self.prompts = PaddedSequences(start_P[:-1], prompt_lengths, device=device)
        self.completions = None
        lengths = [n for group in completion_lengths for n in group]
        if sum(lengths):
            prompt_of = [p for p, group in enumerate(completion_lengths) for _ in group]
            start_B = accumulate([self.n_prompt_tokens, *lengths[:-1]])
            self.completions = PaddedSequences(
                list(start_B), lengths, [start_P[p] for p in prompt_of],
                [prompt_lengths[p] for p in prompt_of], device)

    def __call__(self, layer, q_NHD, k_NKD, v_NKD):
        out = self.prompts.attend(q_NHD, k_NKD, v_NKD)
        if self.completions is None:
            return out
        return torch.cat([out, self.completions.attend(q_NHD, k_NKD, v_NKD)])


def scores(q, k):
    """q·k in fp32 (TF32 with --dtype tf32): (…, …, S, D), (…, …, D, T) -> (…, …, S, T).

    Qwen2.5 has keys so large that scores rounded to bf16 would be another policy than the
    trainer's.
    """
    if q.dtype == torch.float32:
        return q @ k
    if q.is_cuda:
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1), out_dtype=torch.float32)
        return flat.unflatten(0, q.shape[:2])
    return q.float() @ k.float()


class CachedAttention:
    """One new token for each of R rows against the cache; a prompt is stored once for its group.

    prompt_k, prompt_v: per layer (P, K, D, T) and (P, K, T, D), P places for prompts; own_k,
    own_v: (R, K, D, T) and (R, K, T, D), T = max_new_tokens. Keys lie as their product reads them.
    Row r sits on seat_R[r], a seat is place · G + sample; row_S is the way back (any row where a
    seat is empty). To meet a prompt's keys without copying them for every row, the queries of its
    G seats are stacked into one long query (`by_prompt`) and what comes out is taken apart again
    (`by_row`): each is one selection, whose indices `look_at` makes once for all layers.
    """

    def __init__(self, model, n_rows, n_prompts, group_size, longest_prompt, max_new_tokens):
        c, self.G = model.config, group_size

        def zeros(*shape):  # not empty: a weight of 0 times a NaN would be NaN
            return [torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
                    for _ in range(c["num_hidden_layers"])]
        K, D = c["num_key_value_heads"], c["head_dim"]
        self.prompt_k = zeros(n_prompts, K, D, longest_prompt)
        self.prompt_v = zeros(n_prompts, K, longest_prompt, D)
        self.own_k = zeros(n_rows, K, D, max_new_tokens)
        self.own_v = zeros(n_rows, K, max_new_tokens, D)
        self.mask_PT = torch.zeros(n_prompts, longest_prompt, device=model.device)
        self.row_S = torch.zeros(n_prompts * group_size, dtype=torch.int64, device=model.device)
        self.n_prompts = n_prompts  # places in use, the first ones

    def seat(self, seat_R, row_n):
        """Rows row_n now sit where seat_R says."""
        self.row_S.clamp_(max=len(seat_R) - 1)
        self.row_S[seat_R[row_n]] = row_n

    def look_at(self, seat_R, t_R, n_own):
        """Before each step: t_R tokens of each row are cached, n_own is more than any of them."""
        self.t_R, self.n_own = t_R, n_own
        self.row_R = torch.arange(len(t_R), device=t_R.device)
        K, G, P = self.own_k[0].shape[1], self.G, self.n_prompts
        k_K = torch.arange(K, device=t_R.device)
        row_PG = self.row_S[:P * G].view(P, G)
        place_R, sample_R = seat_R // G, seat_R % G
        self.row_and_head_PKG = (row_PG[:, None] * K + k_K[:, None]).flatten()
        self.place_head_sample_RK = ((place_R[:, None] * K + k_K) * G + sample_R[:, None]).flatten()
        future_RT = torch.arange(n_own, device=t_R.device) > t_R[:, None]
        own_RT = torch.zeros(future_RT.shape, device=t_R.device).masked_fill_(future_RT, -torch.inf)
        mask_RT = self.mask_PT.index_select(0, place_R)
        self.mask_R11J = torch.cat([mask_RT, own_RT], 1)[:, None, None]

    def by_prompt(self, x_RKhX):
        """(R, K, h, X) -> (P, K, G·h, X), the seats beside one prompt together."""
        _, K, h, X = x_RKhX.shape
        x = x_RKhX.reshape(-1, h * X).index_select(0, self.row_and_head_PKG)
        return x.view(self.n_prompts, K, self.G * h, X)

    def by_row(self, x_PKSX, h):
        """The way back: (P, K, G·h, X) -> (R, K, h, X)."""
        _, K, _, X = x_PKSX.shape
        x = x_PKSX.reshape(-1, h * X).index_select(0, self.place_head_sample_RK)
        return x.view(-1, K, h, X)

    def __call__(self, layer, q_RHD, k_RKD, v_RKD):
        (R, H, D), K, n_own = q_RHD.shape, k_RKD.shape[1], self.n_own
        own_k, own_v = self.own_k[layer], self.own_v[layer]
        own_k[self.row_R, :, :, self.t_R], own_v[self.row_R, :, self.t_R] = k_RKD, v_RKD
        own_k, own_v = own_k[:R, ..., :n_own], own_v[:R, :, :n_own]
        prompt_k = self.prompt_k[layer][:self.n_prompts]
        prompt_v = self.prompt_v[layer][:self.n_prompts]
        q = q_RHD.reshape(R, K, H // K, D)
        beside_prompt = self.by_row(scores(self.by_prompt(q), prompt_k), H // K)
        logit = torch.cat([beside_prompt, scores(q, own_k)], -1)
        weight = torch.add(self.mask_R11J, logit, alpha=D**-0.5).softmax(-1).to(q.dtype)
        w_prompt, w_own = weight[..., :-n_own], weight[..., -n_own:]
        out_prompt = self.by_row(self.by_prompt(w_prompt) @ prompt_v, H // K)
        return (w_own @ own_v + out_prompt).reshape(R, H, D)

    def store_prompts(self, places, length_n, keys, values):
        """Put prompts of these lengths (keys, values: per layer (n, K, T, D)) on these places.

        What follows a prompt's last token but one is hidden: the rows bring the last one along.
        """
        T, device = keys[0].shape[2], places.device
        for layer, (k_nKTD, v_nKTD) in enumerate(zip(keys, values)):
            self.prompt_k[layer][places, ..., :T] = k_nKTD.transpose(2, 3)
            self.prompt_v[layer][places, :, :T] = v_nKTD
        hidden_nT = torch.arange(self.mask_PT.shape[1], device=device) >= length_n[:, None] - 1
        mask_nT = torch.zeros(hidden_nT.shape, device=device).masked_fill_(hidden_nT, -torch.inf)
        self.mask_PT[places] = mask_nT

    def keep(self, row_n, n_own, prompt_n):
        """Move these rows and these prompts to the front; the others are gone."""
        for k, v in zip(self.own_k, self.own_v):
            k[:len(row_n), ..., :n_own] = k[..., :n_own].index_select(0, row_n)
            v[:len(row_n), :, :n_own] = v[:, :, :n_own].index_select(0, row_n)
        self.n_prompts = len(prompt_n)
        for x in (*self.prompt_k, *self.prompt_v, self.mask_PT):
            x[:self.n_prompts] = x.index_select(0, prompt_n)


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


def sample(logp_RV, temperature, top_p, u_RD):
    """Choose the next token of each row: (R,) int64.

    logp_RV: (R, V) fp32 log-probabilities, already at this temperature; 0 takes the likeliest.
    top_p: draw from the nucleus, the smallest set of likeliest tokens whose mass reaches top_p
        (arXiv:1904.09751): those whose strictly likelier tokens hold less than top_p. A small
        top_p masks the others after a sort; a large one redraws until a token is inside.
    u_RD: (R, n_draws(top_p)) numbers in [0, 1), see `uniform`.
    """
    if temperature == 0:
        return logp_RV.argmax(-1)
    prob_RV = logp_RV.exp()
    if top_p >= SORT_BELOW:
        return draw(prob_RV, prob_RV.cumsum(-1), top_p, u_RD)
    sorted_RV = prob_RV.sort(-1, descending=True).values
    n_inside_R1 = (sorted_RV.cumsum(-1) - sorted_RV < top_p).sum(-1, keepdim=True)
    smallest_R1 = sorted_RV.gather(1, n_inside_R1 - 1)
    return inverse_cdf((prob_RV * (prob_RV >= smallest_R1)).cumsum(-1), u_RD[:, 0])


def n_draws(top_p):
    """How many uniform numbers `sample` may need for one token."""
    return MAX_DRAWS if SORT_BELOW <= top_p < 1 else 1


def draw(prob_RV, cdf_RV, top_p, u_RD):
    """Draw; where the token is outside the nucleus draw again, from a quarter of the rows.

    At top_p ≥ 0.9 a draw fails for a tenth of the rows, so their quarter (and 8 more: a small
    batch has larger fluctuations) holds all of them but for one case in 10⁸. Its shape is fixed,
    so nobody waits to learn their number. What fails to the end takes the likeliest token.
    """
    token_R = inverse_cdf(cdf_RV, u_RD[:, 0])
    if top_p >= 1:
        return token_R
    likelier_RV = torch.where(prob_RV > prob_RV.gather(1, token_R[:, None]), prob_RV, 0)
    outside_R = likelier_RV.sum(-1) >= top_p
    if not outside_R.is_cuda and not outside_R.any():  # on CUDA asking would cost a wait
        return token_R
    token_R = torch.where(outside_R, prob_RV.argmax(-1), token_R)
    if u_RD.shape[1] > 1:
        again = outside_R.float().topk(min(len(u_RD), len(u_RD) // 4 + 8)).indices
        drawn = draw(prob_RV[again], cdf_RV[again], top_p, u_RD[again, 1:])
        token_R[again] = torch.where(outside_R[again], drawn, token_R[again])
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
    max_rows: completions in flight at once; a row that ends gives its place to one that waits.
    progress: label of a progress bar over tokens (a row that ends early gives up the rest); or a
        function of (rows that ended, their tokens, tokens of the others so far), called every few
        tokens; or None.
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if group_size > max_rows:
        raise ValueError(f"max_rows {max_rows} does not hold one group of {group_size} completions")
    bar = tqdm(total=len(prompts) * group_size * max_new_tokens, desc=str(progress), unit="token",
               unit_scale=True, leave=False, disable=not isinstance(progress, str), delay=2)

    def report(n_ended, tokens_of_ended, tokens_of_others):
        bar.update(n_ended * max_new_tokens + tokens_of_others - bar.n)
        if callable(progress):
            progress(n_ended, tokens_of_ended, tokens_of_others)
    on = torch.cuda.device(model.device) if model.on_cuda else nullcontext()
    with torch.inference_mode(), on:  # graphs are captured on the current device
        sampler = sampler_for(model, prompts, group_size, max_new_tokens, temperature, top_p,
                              max_rows)
        rows = sampler.run(prompts, keys, seed, step, report)
    bar.close()
    return Rollout(list(prompts), [ids for ids, _, _ in rows], [logps for _, logps, _ in rows],
                   [finished for _, _, finished in rows], group_size, time.perf_counter() - began)


def places_for(n_prompts, group_size, max_rows):
    """How many completions and how many prompts a Sampler has room for at once: (rows, prompts)."""
    n_rows = min(max_rows, n_prompts * group_size)
    return n_rows, min(n_prompts, 2 * -(-n_rows // group_size))


def sampler_for(model, prompts, group_size, max_new_tokens, temperature, top_p, max_rows):
    """A Sampler with room for this work, and the present weights of `model`.

    On CUDA the model keeps those it has, whose captured graphs serve the next call of their size:
    one for training, one for validation. Their weights are refreshed in place.
    """
    longest = max(map(len, prompts), default=1)
    settings = (*places_for(len(prompts), group_size, max_rows), group_size, max_new_tokens,
                temperature, top_p)
    if not model.on_cuda:
        return Sampler(model.for_sampling(), longest, *settings)
    key = (Sampler, *settings, model.compute_dtype, model.n_real_ids, *model.stop_ids)
    kept = model.kept_samplers
    if key not in kept or kept[key].attention.mask_PT.shape[1] < longest:
        kept.pop(key, None)
        while len(kept) > 1:
            kept.pop(next(iter(kept)))
        twin = next((sampler.model for sampler in kept.values()
                     if sampler.model.compute_dtype == model.compute_dtype), None)
        room = -(-longest // 128) * 128  # chosen: few prompts of a set are longer than its first
        kept[key] = Sampler(twin or model.for_sampling(), room, *settings)
    for twin, master in zip(kept[key].model.parameters(), model.parameters(), strict=True):
        if twin.data_ptr() != master.data_ptr():
            twin.copy_(master)
    return kept[key]


def prefill(model, prompts):
    """Run all prompts once: their lengths, keys and values, both per layer (P, K, T, D)."""
    attention = SharedPromptAttention([len(p) for p in prompts], [[] for _ in prompts],
                                      model.device)
    padded_PT = attention.prompts.query_BT  # repeats the last token: no garbage in the padding
    keys, values = [], []

    def attend(layer, q_NHD, k_NKD, v_NKD):
        for store, x_NKD in ((keys, k_NKD), (values, v_NKD)):
            x = x_NKD.index_select(0, padded_PT.flatten()).unflatten(0, padded_PT.shape)
            store.append(x.transpose(1, 2))
        return attention(layer, q_NHD, k_NKD, v_NKD)

    ids_N = torch.tensor([i for p in prompts for i in p], device=model.device)
    positions_N = torch.tensor([t for p in prompts for t in range(len(p))], device=model.device)
    model(ids_N, positions_N, attend)
    return attention.prompts.length_B, keys, values


class Sampler:
    """Rows that run together, each on a place in tensors of fixed shape.

    `step` gives every row its next token and never waits for the device. Every few steps `run`
    takes the rows that have ended away, gives their places to rows that wait and, once none waits,
    moves the rest together. A row begins with its prompt's last token, the tokens before it are
    computed once for its group.
    """

    def __init__(self, model, longest_prompt, n_rows, n_prompts, group_size, max_new_tokens,
                 temperature, top_p):
        self.model, self.G, self.T = model, group_size, max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        self.attention = CachedAttention(model, n_rows, n_prompts, group_size, longest_prompt,
                                         max_new_tokens)
        self.stop_ids = torch.tensor(model.stop_ids, device=model.device)
        self.places = torch.arange(n_rows, device=model.device)
        self.graphs = {}  # of step, on CUDA; they share one pool of memory and one stream
        if model.on_cuda:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(n_rows, *shape, dtype=dtype, device=model.device)
        self.all_rows = {
            "token": zeros(),    # the last one: of the prompt, then drawn
            "start": zeros(),    # its position at first
            "length": zeros(),   # tokens drawn so far
            "running": zeros(dtype=torch.bool), "finished": zeros(dtype=torch.bool),
            "seat": zeros(),     # in attention
            "u": zeros(max_new_tokens, n_draws(top_p), dtype=torch.float32),  # for every draw
            "tokens": zeros(max_new_tokens + 1),  # drawn; the last column is for rows that ended
            "logps": zeros(max_new_tokens + 1, dtype=torch.float32)}

    def step(self, n_own):
        """The next token of every row. n_own: more than the `length` of any row that runs."""
        r = self.rows
        t_R = r.length.clamp(max=self.T - 1)  # one that has ended goes on; nobody reads it
        self.attention.look_at(r.seat, t_R, n_own)
        hidden_RC = self.model(r.token, r.start + r.length, self.attention)
        logp_RV = self.model.log_probs(hidden_RC, self.temperature or 1.0)
        token_R = sample(logp_RV, self.temperature, self.top_p, r.u[self.places[:len(t_R)], t_R])
        column_R1 = torch.where(r.running, r.length, self.T)[:, None]
        r.tokens.scatter_(1, column_R1, token_R[:, None])
        r.logps.scatter_(1, column_R1, logp_RV.gather(1, token_R[:, None]))
        r.token.copy_(token_R)
        r.length.add_(r.running)
        r.finished.logical_or_((token_R[:, None] == self.stop_ids).any(1) & r.running)
        r.running.logical_and_(~r.finished & (r.length < self.T))

    def step_or_replay(self, n_own):
        """`step`; on CUDA captured once for each size as a graph, which replays without the host.

        Before the capture the step runs once, so that every kernel is loaded; then the rows are
        put back (what it cached is computed again). The stream is the sampler's own: with a graph,
        torch also frees cuBLAS's workspace of the stream that it was captured on, which no graph
        of another sampler may still use (issue 193402 of pytorch).
        """
        if not self.places.is_cuda:
            return self.step(n_own)
        n_own = min(-(-n_own // LENGTH_STEP) * LENGTH_STEP, self.T)
        size = len(self.rows.token), n_own, self.attention.n_prompts
        if size not in self.graphs:
            before = {name: x.clone() for name, x in vars(self.rows).items()}
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(n_own)
            torch.cuda.current_stream().wait_stream(self.stream)
            for name, x in before.items():
                getattr(self.rows, name).copy_(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.step(n_own)
            self.graphs[size] = graph
        self.graphs[size].replay()

    def run(self, prompts, keys, seed, step, report):
        """All completions of these prompts: (ids, logps, finished) of each row of a Rollout."""
        self.resize(len(self.places))
        self.attention.n_prompts = len(self.attention.mask_PT)
        rows = [(p, g) for p in range(len(prompts)) for g in range(self.G)]
        self.waiting, self.row_at, done = deque(rows), {}, {}  # row_at: place -> (prompt, sample)
        self.free = list(range(len(self.places)))[::-1]
        self.place_of, self.n_left = {}, {}  # prompt -> its place, its rows that have not ended
        self.free_prompts = list(range(self.attention.n_prompts))[::-1]
        self.n_collected, lengths = 0, [0] * len(self.places)
        while self.waiting or self.row_at:
            if self.waiting and len(self.free) >= len(self.places) / REFILL:
                self.admit(prompts, keys, seed, step, lengths)
            running = [lengths[i] for i in self.row_at]
            n_steps = min(LOOK_EVERY, self.T - min(running))
            for _ in range(n_steps):
                self.step_or_replay(min(max(running) + n_steps, self.T))
            before, lengths = lengths, self.rows.length.tolist()
            assert all(lengths[i] > before[i] for i in self.row_at), (before, lengths)
            self.collect(done, lengths)
            if self.row_at and not self.waiting:
                lengths = self.close_ranks(lengths)
            report(len(done), self.n_collected, sum(lengths[i] for i in self.row_at))
        return [done[row] for row in rows]

    def admit(self, prompts, keys, seed, step, lengths):
        """Give free places to rows that wait, and compute the prompts that are new."""
        rows, new = [], []
        while self.waiting and self.free:
            p, g = self.waiting[0]
            if p not in self.place_of:
                if not self.free_prompts:
                    break
                self.place_of[p], self.n_left[p] = self.free_prompts.pop(), self.G
                new.append(p)
            i = self.free.pop()
            self.row_at[i], lengths[i] = self.waiting.popleft(), 0
            rows.append((i, keys[p], g, self.seat_of(p, g), prompts[p][-1], len(prompts[p]) - 1))
        if not rows:  # rows are free, but every place for a prompt is taken
            return
        if new:
            self.attention.store_prompts(self.tensor([self.place_of[p] for p in new]),
                                         *prefill(self.model, [prompts[p] for p in new]))
        at, key, sample_n, seat, token, start = self.tensor(rows).unbind(1)
        t_T1, draw_D = (torch.arange(n, device=at.device) for n in self.rows.u.shape[1:])
        u = uniform(seed, step, key[:, None, None], sample_n[:, None, None], t_T1[:, None], draw_D)
        for name, x in dict(token=token, start=start, length=0, running=True, finished=False,
                            seat=seat, u=u).items():
            getattr(self.rows, name)[at] = x
        self.attention.seat(self.rows.seat, at)

    def collect(self, done, lengths):
        """Take away the rows that have ended; their places are free."""
        running = self.rows.running.tolist()
        ended = [i for i in self.row_at if not running[i]]
        results = (x.index_select(0, self.tensor(ended)).tolist()
                   for x in (self.rows.tokens, self.rows.logps, self.rows.finished))
        for i, ids, logps, finished in zip(ended, *results):
            p, g = self.row_at.pop(i)
            done[p, g] = ids[:lengths[i]], logps[:lengths[i]], finished
            self.n_collected += lengths[i]
            self.free.append(i)
            self.n_left[p] -= 1
            if self.n_left[p] == 0:
                self.free_prompts.append(self.place_of.pop(p))

    def close_ranks(self, lengths):
        """Move the rows that run, and their prompts, to the first places, once they need fewer."""
        n = size_for(len(self.row_at))
        if n >= len(self.rows.token):
            return lengths
        stay = padded(sorted(self.row_at), n)
        prompts = sorted(self.place_of.values())
        prompts = padded(prompts, min(size_for(len(prompts)), self.attention.n_prompts))
        self.attention.keep(self.tensor(stay), max(lengths), self.tensor(prompts))
        for x in self.all_rows.values():
            x[:n] = x.index_select(0, self.tensor(stay))
        self.resize(n)
        self.row_at = {i: self.row_at[old] for i, old in enumerate(stay) if old in self.row_at}
        self.place_of = {p: prompts.index(place) for p, place in self.place_of.items()}
        self.rows.seat[:len(self.row_at)] = self.tensor(
            [self.seat_of(*row) for row in self.row_at.values()])
        self.rows.seat[len(self.row_at):] = 0
        self.attention.seat(self.rows.seat, self.places[:len(self.row_at)])
        return [lengths[old] for old in stay]

    def resize(self, n):
        """Go on with the first n places."""
        self.rows = SimpleNamespace(**{name: x[:n] for name, x in self.all_rows.items()})

    def seat_of(self, p, g):
        return self.place_of[p] * self.G + g

    def tensor(self, integers):
        return torch.tensor(integers, dtype=torch.int64, device=self.places.device)


def padded(places, n):
    """These and enough others to make n."""
    return places + [i for i in range(n) if i not in places][:n - len(places)]


def size_for(n):
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … (2ⁱ and 3·2ⁱ) that holds n."""
    power = 1 << (n - 1).bit_length()
    return power // 4 * 3 if power >= 4 and n <= power // 4 * 3 else power


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
    predictor, sequence, lengths = [], [], []
    prompt_end, start = 0, len(positions)
    for prompt, group in zip(prompts, completions, strict=True):
        prompt_end += len(prompt)
        for completion in group:
            n = len(completion)
            positions += range(len(prompt), len(prompt) + n)
            predictor += [prompt_end - 1, *range(start, start + n - 1)][:n]
            sequence += [len(lengths)] * n
            lengths.append(n)
            start += n
    attend = SharedPromptAttention([len(p) for p in prompts],
                                   [[len(c) for c in g] for g in completions], device)
    ids_N = torch.tensor(ids, device=device)
    return FlatBatch(ids_N, torch.tensor(positions, device=device), attend,
                     torch.tensor(predictor, device=device, dtype=torch.int64),
                     ids_N[attend.n_prompt_tokens:],
                     torch.tensor(sequence, device=device, dtype=torch.int64), lengths)


def check_sampling(parser, args):
    """Refuse sampling settings and devices that mean nothing, with the parser's one-line error."""
    for temperature in args.temperature if type(args.temperature) is list else [args.temperature]:
        if not 0 <= temperature < float("inf"):
            parser.error(f"--temperature is {temperature}; expected 0 (greedy) or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p is {args.top_p}; expected a value in (0, 1]")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed is {args.seed}; expected 0 to 2⁶³ − 1")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; expected 1 or more")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in ["cpu", *gpus, *(["cuda"] if gpus else [])]:
        parser.error(f"--device is {args.device}; expected cpu, or cuda where torch finds a GPU "
                     f"(it finds {torch.cuda.device_count()})")


def main():
    from model import Qwen2
    from plumbing.hub import keep_freed_memory
    from rewards import Problem, build_prompt
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
