"""A decode step of fewer kernels, for CUDA in bf16: engine.py says what it computes.

What it does    `FlashCache` attends with one kernel a layer (FlashAttention-2, arXiv:2307.08691) to
                the keys of the prompts, each read once for its whole group, and to the rows' own;
                the two results are weighed by their log-sum-exps. `decode` is the model's
                forward for one token of each row, with the weights of `for_sampling`; what lies
                between matrix products and attention is a compiled function each.
                `draw_in_blocks` draws tokens in two passes over the vocabulary.
Not here        the plain step, which runs everywhere else and where `fast_works` finds that the
                two differ: engine.CachedAttention and model.Qwen2.forward.

Axis letters as in engine.py; E the width of queries, keys and values together; the vocabulary is
B blocks of X tokens.
"""
import sys

import torch
import torch.nn.functional as F

from model import NOTHING, rotary_table, rotate, swiglu
from plumbing.compiled import compiled, why
from plumbing.packed import flash_attention

BLOCK = 1024  # chosen: tokens of the vocabulary whose probabilities are added up together
LARGEST_DIFFERENCE = 0.05  # chosen, of hidden states beside their norm: bf16 rounds to 0.004


# ------------------------------------------------------------------ the model, for one token a row

def decode(model, ids_R, positions_R, cache):
    """The hidden states that predict the next token of each row: (R, width)."""
    eps, K = model.config["rms_norm_eps"], model.config["num_key_value_heads"]
    rotary = [x.index_select(0, positions_R) for x in cache.rotary]
    x = F.embedding(ids_R, model.model["embed_tokens"].weight)
    y = torch.zeros_like(x)
    for number, layer in enumerate(model.model["layers"]):
        attention, mlp = layer.self_attn, layer.mlp
        x, y = add_and_norm(x, y, layer.input_layernorm.weight, eps)
        q_RhKD = rotate_and_store(attention.qkv_proj(y), *rotary, *norm_weights(attention), eps,
                                  cache.own_k[number], cache.own_v[number], cache.t_R, K)
        y = attention.o_proj(cache.attend(number, q_RhKD))
        x, y = add_and_norm(x, y, layer.post_attention_layernorm.weight, eps)
        y = mlp.down_proj(swiglu(mlp.gate_up_proj(y)))
    return add_and_norm(x, y, model.model["norm"].weight, eps)[1]


def norm_weights(attention):
    has = attention.has_norms
    return (attention.q_norm.weight, attention.k_norm.weight) if has else (None, None)


@compiled
def add_and_norm(x, y, weight, eps):
    """The stream x with y added, and its RMSNorm."""
    x = x + y
    return x, F.rms_norm(x, x.shape[-1:], weight, eps)


@compiled
def rotate_and_store(qkv_RE, cos, sin, q_norm, k_norm, eps, own_k, own_v, t_R, K):
    """The queries, (R, h, K, D); the new keys and values go into the cache, (rows, T, K, D)."""
    R, D = len(qkv_RE), own_k.shape[3]
    qkv = qkv_RE.view(R, -1, D)
    q, k, v = qkv.split([qkv.shape[1] - 2 * K, K, K], 1)
    if q_norm is not None:
        q, k = F.rms_norm(q, (D,), q_norm, eps), F.rms_norm(k, (D,), k_norm, eps)
    row_R = torch.arange(R, device=t_R.device)
    rotated = rotate.__wrapped__  # as it is written, so that all of this becomes one kernel
    own_k[row_R, t_R] = rotated(k, (cos, sin))
    own_v[row_R, t_R] = v
    return rotated(q, (cos, sin)).view(R, K, -1, D).transpose(1, 2).contiguous()


@compiled
def weigh(out_QhKD, lse_KQh, seat_R, alone_R):
    """Attention to a row's own tokens and to its prompt, put together: (R, K·h·D).

    The Q queries are those of all seats, about their prompts, then those of all rows, about their
    own tokens. alone_R: rows whose prompt is one token, which the row brings along.
    """
    n_seats = len(out_QhKD) - len(seat_R)
    log_odds = torch.where(alone_R[:, None], torch.inf, lse_KQh[:, n_seats:] - lse_KQh[:, seat_R])
    share_RKh1 = log_odds.sigmoid().transpose(0, 1)[..., None]
    own_RKhD = out_QhKD[n_seats:].transpose(1, 2).float()
    prompt_RKhD = out_QhKD.transpose(1, 2)[seat_R].float()
    mixed = prompt_RKhD + share_RKh1 * (own_RKhD - prompt_RKhD)
    return mixed.to(out_QhKD.dtype).flatten(1)


class FlashCache:
    """Keys and values as engine.CachedAttention keeps them, laid out for FlashAttention.

    k, v: per layer all tokens end to end, (P·T prompt tokens and R·T' own ones, K, D), of which
    prompt_k, own_k, … are the two parts, (P, T, K, D) and (R, T', K, D). Queries lie as (R, h, K,
    D), so that the h queries that share a key are h queries of one sequence: one kernel takes, as
    sequences, the queries of all seats beside each prompt, and those of each row.
    """

    def __init__(self, model, n_rows, n_prompts, group_size, longest_prompt, max_new_tokens):
        c, self.G = model.config, group_size
        K, D = c["num_key_value_heads"], c["head_dim"]
        self.first_own = n_prompts * longest_prompt  # where the rows' own tokens begin
        self.k, self.v = ([torch.zeros(self.first_own + n_rows * max_new_tokens, K, D,
                                       dtype=model.compute_dtype, device=model.device)
                           for _ in range(c["num_hidden_layers"])] for _ in range(2))
        self.prompt_k, self.prompt_v = ([x[:self.first_own].view(n_prompts, -1, K, D) for x in xs]
                                        for xs in (self.k, self.v))
        self.own_k, self.own_v = ([x[self.first_own:].view(n_rows, -1, K, D) for x in xs]
                                  for xs in (self.k, self.v))
        self.h = c["num_attention_heads"] // K
        positions = torch.arange(longest_prompt + max_new_tokens, device=model.device)
        self.rotary = rotary_table(positions, c, model.compute_dtype)
        self.ends = {}  # (rows, prompts): what of `look_at` depends on these alone
        self.n_cached_P = torch.zeros(n_prompts, dtype=torch.int32, device=model.device)
        self.row_S = torch.zeros(n_prompts * group_size, dtype=torch.int64, device=model.device)
        self.n_prompts, self.n_places, self.longest = n_prompts, n_prompts, longest_prompt

    def seat(self, seat_R, row_n):
        """Rows row_n now sit where seat_R says."""
        self.row_S.clamp_(max=len(seat_R) - 1)
        self.row_S[seat_R[row_n]] = row_n

    def look_at(self, seat_R, t_R, n_own):
        """As engine.CachedAttention."""
        R, P, G = len(t_R), self.n_prompts, self.G
        if (R, P) not in self.ends:
            self.ends[R, P] = self.ends_of(R, P)
        row_R, query_ends, key_starts = self.ends[R, P]
        self.seat_R, self.t_R = seat_R, t_R
        self.alone_R = (self.n_cached_P == 0)[seat_R // G]
        self.row_Q = torch.cat([self.row_S[:P * G], row_R])
        n_own_R = (t_R + 1).clamp(max=n_own).int()  # a row that has ended may be longer
        self.sizes = query_ends, key_starts, G * self.h, max(self.longest, n_own)
        self.n_keys = torch.cat([self.n_cached_P[:P], n_own_R])

    def ends_of(self, R, P):
        """Numbers of R rows; where the queries of each sequence end, and its keys begin."""
        def numbers(n):
            return torch.arange(n, dtype=torch.int32, device=self.row_S.device)
        h, G, T = self.h, self.G, self.own_k[0].shape[1]
        return (numbers(R).long(),
                torch.cat([numbers(P) * (G * h), P * G * h + numbers(R + 1) * h]),
                torch.cat([numbers(P) * self.longest, self.first_own + numbers(R + 1) * T]))

    def attend(self, number, q_RhKD):
        """The rows' attention: (R, K·h·D)."""
        q_QhKD = q_RhKD.index_select(0, self.row_Q)
        no_dropout, not_causal, no_mask_back = 0.0, False, False
        out, lse = flash_attention(q_QhKD.flatten(0, 1), self.k[number], self.v[number],
                                   *self.sizes, no_dropout, not_causal, no_mask_back,
                                   seqused_k=self.n_keys)[:2]
        return weigh(out.view(q_QhKD.shape), lse.view(len(lse), -1, self.h), self.seat_R,
                     self.alone_R)

    def store_prompts(self, places, length_n, keys, values):
        """As engine.CachedAttention: the last token of a prompt stays out."""
        T = keys[0].shape[2]
        for store, new in ((self.prompt_k, keys), (self.prompt_v, values)):
            for x_PTKD, x_nKTD in zip(store, new):
                x_PTKD[places, :T] = x_nKTD.transpose(1, 2)
        self.n_cached_P[places] = length_n.int() - 1

    def keep(self, row_n, n_own, prompt_n):
        """Move these rows and these prompts to the front; the others are gone."""
        for x in (*self.own_k, *self.own_v):
            x[:len(row_n), :n_own] = x[:, :n_own].index_select(0, row_n)
        self.n_prompts = len(prompt_n)
        for x in (*self.prompt_k, *self.prompt_v, self.n_cached_P):
            x[:self.n_prompts] = x.index_select(0, prompt_n)


# ------------------------------------------------------------------ drawing a token

def draw_in_blocks(logit_RV, u_RU, temperature, top_p):
    """As rollout.draw, from logits: of U draws of each row the first inside the nucleus, else the
    likeliest token; and its log-probability. Both (R,).

    Two passes over the vocabulary: one for the probability of each block, one for that of all
    tokens likelier than each draw. Sums are of blocks first, so that rounding can tip a draw.
    """
    top_RB, mass_RB = block_masses(logit_RV, temperature)
    token_RU, drawn_RU, top_R1, total_R1 = draws(logit_RV, u_RU, top_RB, mass_RB, temperature)
    if top_p >= 1:
        return (token_RU[:, 0],
                drawn_RU[:, 0] / temperature - top_R1[:, 0] - total_R1.log()[:, 0])
    likelier_RBU = likelier_masses(logit_RV, drawn_RU, top_R1, temperature)
    return first_inside(logit_RV, token_RU, drawn_RU, likelier_RBU, top_RB, top_R1, total_R1,
                        temperature, top_p)


@compiled
def block_masses(logit_RV, temperature):
    """Of each block the largest logit / temperature, and Σ exp(logit / temperature − largest)."""
    x_RBX = blocks(logit_RV) / temperature
    top_RB = x_RBX.amax(-1).clamp(min=NOTHING)
    return top_RB, (x_RBX - top_RB[..., None]).exp().sum(-1)


def draws(logit_RV, u_RU, top_RB, mass_RB, temperature):
    """For each u a token and its logit, (R, U); the largest logit / temperature, and Σ exp(logit /
    temperature − largest), (R, 1)."""
    top_R1 = top_RB.amax(-1, keepdim=True)
    mass_RB = mass_RB * (top_RB - top_R1).exp()
    cdf_RB = mass_RB.cumsum(-1)
    total_R1 = cdf_RB[:, -1:].contiguous()
    target_RU = torch.minimum(u_RU * total_R1, below(total_R1))
    block_RU = torch.searchsorted(cdf_RB, target_RU, right=True)
    rest_RU = target_RU - (cdf_RB.gather(1, block_RU) - mass_RB.gather(1, block_RU))
    logit_RUX = block_of(logit_RV, block_RU)
    cdf_RUX = (logit_RUX / temperature - top_R1[..., None]).exp().cumsum(-1)
    # rounding may put the rest beyond the block's last token that has probability
    rest_RU1 = torch.minimum(rest_RU[..., None], below(cdf_RUX[..., -1:])).clamp(min=0)
    inner_RU1 = torch.searchsorted(cdf_RUX, rest_RU1, right=True)
    drawn_RU = logit_RUX.gather(2, inner_RU1).squeeze(-1)
    return block_RU * BLOCK + inner_RU1.squeeze(-1), drawn_RU, top_R1, total_R1


@compiled
def likelier_masses(logit_RV, drawn_RU, top_R1, temperature):
    """Σ exp(logit / temperature − largest) of each block's tokens likelier than each draw. Logits
    are compared as they are: compiled, a division may round otherwise than in `draws`, and a token
    would be likelier than itself."""
    logit_RBX = blocks(logit_RV)
    prob_RBX = (logit_RBX / temperature - top_R1[..., None]).exp()
    return torch.stack([torch.where(logit_RBX > drawn_RU[:, u, None, None], prob_RBX, 0).sum(-1)
                        for u in range(drawn_RU.shape[1])], -1)


@compiled
def first_inside(logit_RV, token_RU, drawn_RU, likelier_RBU, top_RB, top_R1, total_R1, temperature,
                 top_p):
    """The first token inside the nucleus, or the likeliest, and its log-probability: both (R,)."""
    inside_RU = likelier_RBU.sum(1) < top_p * total_R1
    first_R1 = inside_RU.byte().argmax(1, keepdim=True)
    block_R1 = top_RB.argmax(1, keepdim=True)
    likeliest_R1 = block_R1 * BLOCK + block_of(logit_RV, block_R1)[:, 0].argmax(1, keepdim=True)
    any_R1 = inside_RU.any(1, keepdim=True)
    token_R1 = torch.where(any_R1, token_RU.gather(1, first_R1), likeliest_R1)
    own_R1 = torch.where(any_R1, drawn_RU.gather(1, first_R1) / temperature, top_R1)
    return token_R1[:, 0], (own_R1 - top_R1 - total_R1.log())[:, 0]


def block_of(logit_RV, block_RU):
    """The logits of some blocks, (R, U, BLOCK); what lies beyond V has no probability."""
    V = logit_RV.shape[1]
    token_RUX = block_RU[..., None] * BLOCK + torch.arange(BLOCK, device=logit_RV.device)
    inside_RUX = token_RUX < V
    logit_RUX = logit_RV.gather(1, token_RUX.clamp(max=V - 1).flatten(1)).view(token_RUX.shape)
    return torch.where(inside_RUX, logit_RUX, NOTHING)


def blocks(x_RV):
    """(R, V) as (R, B, BLOCK); what fills the last block has no probability."""
    return F.pad(x_RV, (0, -x_RV.shape[1] % BLOCK), value=NOTHING).view(len(x_RV), -1, BLOCK)


def below(x):
    """The next smaller float, of x > 0."""
    return x.nextafter(torch.zeros_like(x))


# ------------------------------------------------------------------ whether it is right here

def fast_works(model, plain_cache):
    """Whether `decode` gives what the model gives with plain_cache, engine.CachedAttention: the
    same hidden states for three tokens of four rows on two prompts, one of a single token."""
    lengths, G, longest, device = [21, 1], 2, 21, model.device
    seat_R, row_R = (torch.arange(4, device=device) for _ in range(2))
    K, D = model.config["num_key_value_heads"], model.config["head_dim"]
    keys, values = ([torch.randn(2, K, longest, D, device=device, dtype=model.compute_dtype)
                     for _ in model.model["layers"]] for _ in range(2))
    caches = [cache(model, 4, 2, G, longest, 4) for cache in (plain_cache, FlashCache)]
    try:
        for cache in caches:
            cache.store_prompts(row_R[:2], torch.tensor(lengths, device=device), keys, values)
            cache.seat(seat_R, row_R)
        for t in range(3):
            t_R, ids_R = torch.full_like(row_R, t), row_R + t
            for cache in caches:
                cache.look_at(seat_R, t_R, 4)
            plain = model(ids_R, t_R + longest, caches[0])
            fast = decode(model, ids_R, t_R + longest, caches[1])
            worst = ((fast - plain).norm(dim=-1) / plain.norm(dim=-1)).max().item()
            if not worst <= LARGEST_DIFFERENCE:
                raise RuntimeError(f"hidden states differ by {worst:.1%}")
    except Exception as e:  # a compiler fails in many ways; the plain step is there
        print(f"the plain decode step is used on {device}: {why(e)}", file=sys.stderr)
        return False
    return True
