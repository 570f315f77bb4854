"""Qwen2.5, Qwen3 and Llama from scratch: forward, log-probabilities, loading and saving.

What it does    `Qwen2.forward` takes the tokens of many sequences end to end on one flat axis. Only
                the function `attend` it is handed knows which token may see which, so one forward
                serves prefill, training and cached decoding, and nothing outside attention is
                ever padded.
                `SharedPromptAttention` is that function for training and prefill.
Not here        cached decoding (plumbing/engine.py), the loss (objectives.py), files
                (plumbing/hub.py).
Run it alone    python model.py [NAME_OR_FOLDER]     parameter table, difference from transformers
Where to fork   another family: `Attention` and `rotary_table` hold what differs between those here,
                by the `model_type` of config.json; FAMILIES in plumbing/hub.py names them; `decode`
                in plumbing/fast_decode.py is CUDA's second way through the layers.

Axis letters: N flat tokens, M completion tokens among them (within the head's loop: those of one
chunk), C model width, H query heads, K key/value heads, D head width, V vocabulary; inside
attention B sequences, T their own tokens, J the tokens they see, h = H/K query heads on one key.
"""
import argparse
import math
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing import fused_head, hub, parallel
from plumbing.compiled import compiled
from plumbing.files import read_json
from plumbing.onednn import product
from plumbing.packed import PackedSequences, packed_works, segments

HEAD_BYTES = {"cpu": 2**26, "cuda": 2**30}  # chosen: the fp32 (tokens, V) tensor of the chunked
# head, 110 and 1,769 tokens of Qwen2.5; each chunk adds once to the head's whole gradient
NOTHING = -1e30  # chosen: the logit of probability 0; −inf times a probability of 0 were NaN
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}  # of activations

# On Hopper torch prefers cuDNN's attention, whose backward with a mask can give NaN (issue 196678
# of pytorch) and which builds a plan for every new shape; here nearly every micro-batch is new.
torch.backends.cuda.enable_cudnn_sdp(False)


class Linear(nn.Linear):
    """A linear layer whose master weights are cast to the dtype of what flows through it."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return product(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, none of the masking. Qwen2 has a bias on q, k
    and v; Qwen3 has none, and norms each head's query and key; Llama has neither."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.n_kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        width, self.head_width = c["hidden_size"], c["head_dim"]
        self.qkv_proj = Linear(width, (self.n_heads + 2 * self.n_kv_heads) * self.head_width,
                               bias=c["model_type"] == "qwen2")
        self.has_norms = c["model_type"] == "qwen3"
        if self.has_norms:
            self.q_norm, self.k_norm = (RMSNorm(self.head_width, c["rms_norm_eps"])
                                        for _ in range(2))
        self.o_proj = Linear(self.n_heads * self.head_width, width, bias=False)

    def queries_keys_values(self, x, rotary):
        """(N, H, D), (N, K, D), (N, K, D)."""
        H, K = self.n_heads, self.n_kv_heads
        qk, v = self.qkv_proj(x).view(-1, H + 2 * K, self.head_width).split([H + K, K], 1)
        if self.has_norms:
            qk = torch.cat([self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])], 1)
        return *rotate(qk, rotary).split([H, K], 1), v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = Linear(c["hidden_size"], 2 * c["intermediate_size"], bias=False)
        self.down_proj = Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_up_proj(x)))


@compiled
def swiglu(x):
    """silu(gate) · up of both in one tensor: (…, 2I) -> (…, I)."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Layer(nn.Module):
    """Attention, then MLP, each after a norm and added to the stream. `number` says which layer it
    is: `attend` finds its cache by it."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, rotary, attend, number):
        qkv = self.self_attn.queries_keys_values(self.input_layernorm(x), rotary)
        x = x + self.self_attn.o_proj(attend(number, *qkv).flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


def rotary_table(positions_N, c, dtype):
    """cos and ∓sin of position · theta^(−i/D), i = 0, 2, …, each (N, 1, D): fp32, then `dtype`.

    Llama 3.1 and later (arXiv:2407.21783) turn slow pairs `factor` times slower: those that make
    fewer than `low_freq_factor` turns in the context of pretraining, and in part those that make
    fewer than `high_freq_factor`.
    """
    i = torch.arange(0, c["head_dim"], 2, device=positions_N.device, dtype=torch.float32)
    speed, rope = c["rope_theta"] ** (-i / c["head_dim"]), hub.rope_of(c)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = speed * rope["original_max_position_embeddings"] / math.tau
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / rope["factor"])
    angle = (positions_N[:, None].float() * speed)[:, None]  # (N, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


@compiled
def rotate(x, rotary):
    """Rotate each pair (x_i, x_{i+D/2}) of a head by its position's angle (RoPE, 2104.09864)."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Qwen2(nn.Module):
    """Qwen2 and Qwen2.5 (arXiv:2412.15115), Qwen3 (2505.09388) or Llama (2407.21783), as config
    says. q, k and v are one matrix here, gate and up another (plumbing/hub.py converts from the
    hub's separate ones).

    config         dict, the fields of a hub `config.json`
    compute_dtype  dtype of the activations; the parameters are fp32 masters, cast where used
    n_real_ids     one more than the largest id of a token; the head's rows beyond it are padding,
                   and never given probability
    nameless_ids   (n,) int64, the ids below n_real_ids that no token has, mostly none; never given
                   probability either
    stop_ids       sorted list of every id that ends a completion
    tokenizer      the transformers tokenizer of the folder, or None
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = hub.checked_config(config)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "layers": nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            "norm": RMSNorm(c["hidden_size"], c["rms_norm_eps"])})
        if not c["tie_word_embeddings"]:
            self.lm_head = Linear(c["hidden_size"], c["vocab_size"], bias=False)
        self.compute_dtype = torch.float32
        self.checkpoint_activations = False  # keep each layer's input only, compute the rest twice
        self.n_real_ids = c["vocab_size"]
        self.register_buffer("nameless_ids", torch.empty(0, dtype=torch.int64), persistent=False)
        self.stop_ids, self.generation_config = [], {}
        self.tokenizer, self.tokenizer_files = None, {}
        self.kept_samplers = {}  # of plumbing/engine.py, on CUDA
        self.reordered_head = None  # of a CPU's sampler, by plumbing/onednn.py
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and not p.is_meta:  # each rollout makes a meta model
                nn.init.normal_(p, std=c.get("initializer_range", 0.02))

    @property
    def device(self):
        return self.model["embed_tokens"].weight.device

    @property
    def on_cuda(self):
        return self.model["embed_tokens"].weight.is_cuda

    @property
    def context(self):
        """The longest sequence, prompt and completion together, in tokens."""
        return self.config["max_position_embeddings"]

    def forward(self, ids_N, positions_N, attend):
        """Hidden states after the last norm.

        ids_N, positions_N: (N,) int64, tokens of all sequences end to end and where each stands
            in its own sequence.
        attend(layer, q_NHD, k_NKD, v_NKD) -> (N, H, D): attention among these tokens.
        Returns (N, C) in `compute_dtype`.
        """
        x = F.embedding(ids_N, self.model["embed_tokens"].weight).to(self.compute_dtype)
        rotary = rotary_table(positions_N, self.config, self.compute_dtype)
        for number, layer in enumerate(self.model["layers"]):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, attend, number, use_reentrant=False)
            else:
                x = layer(x, rotary, attend, number)
        return self.model["norm"](x)

    @property
    def head_weight(self):
        """(V, C): the output head, which is the embedding where the two are tied."""
        tied = self.config["tie_word_embeddings"]
        return self.model["embed_tokens"].weight if tied else self.lm_head.weight

    @property
    def n_head_rows(self):
        """V of log-probs: n_real_ids up to the next multiple of 8 (Qwen2.5: 151,672), since bf16
        products of another width take twice as long on an H100."""
        return min(-(-self.n_real_ids // 8) * 8, self.config["vocab_size"])

    def head_rows(self, dtype):
        """(V, C): the first `n_head_rows` of the head in this dtype; a CPU sampler's own."""
        if self.reordered_head is not None:
            return self.reordered_head
        return self.head_weight[:self.n_head_rows].to(dtype)

    def logits(self, hidden_NC):
        """(N, V) in the dtype of `hidden_NC`."""
        return F.linear(hidden_NC, self.head_weight.to(hidden_NC.dtype))

    def log_probs(self, hidden_NC, temperature=1.0):
        """log softmax(logits / temperature): (N, n_head_rows) fp32, nats.

        The one definition of probability: all policies and the entropy come from here or, in
        training, from `log_probs_of` (on CUDA a large rollout adds up the same logits in blocks,
        plumbing/fast_decode.py).
        """
        return log_softmax(self.masked_logits(hidden_NC), temperature)

    def masked_logits(self, hidden_NC, head_VC=None):
        """(N, n_head_rows) fp32; that of an id without a token is NOTHING.

        On CUDA they are fp32 whatever the dtype of what flows: rounded to bf16 they would be the
        largest part of the noise in a ratio. head_VC: `head_rows` in the dtype of `hidden_NC`,
        where the caller has them at hand.
        """
        if head_VC is None:
            head_VC = self.head_rows(hidden_NC.dtype)
        logits = product_in_fp32(hidden_NC, head_VC)
        logits[:, self.n_real_ids:].fill_(NOTHING)
        if len(self.nameless_ids):
            logits.index_fill_(1, self.nameless_ids, NOTHING)
        return logits

    @torch.no_grad()
    def completion_log_probs(self, batch, temperature=1.0, entropy=False):
        """Log-probabilities of a batch's completion tokens: logp_M and entropy_M (or None), fp32,
        nats, no grad. batch: rollout.FlatBatch."""
        hidden_MC = self.predicting_states(batch)
        head_VC = self.head_rows(hidden_MC.dtype)
        logps, entropies = [], []
        for chunk in self.head_chunks(batch):
            logp_M, entropy_M = log_probs_of(self.masked_logits(hidden_MC[chunk], head_VC),
                                             batch.target_M[chunk, None], temperature, entropy)[:2]
            logps.append(logp_M)
            entropies.append(entropy_M)
        return torch.cat(logps), torch.cat(entropies) if entropy else None

    @torch.no_grad()
    def accumulate_gradients(self, batch, temperature, loss, entropy=False):
        """Add ∂loss/∂weights to the gradients; returns what `completion_log_probs` does.

        The head is computed a few whole completions at a time: each chunk's logits make place for
        their gradient, g · (1[token] − softmax) / temperature with g = ∂loss/∂logp. One backward
        through the body follows. Equal to autograd, with (chunk, V) tensors instead of (M, V).

        loss(logp_chunk, chunk) -> scalar: called once per chunk, a slice of M; the losses of all
            chunks are added, so it must be a weighted sum, not a mean.
        """
        with torch.enable_grad():
            hidden_MC = self.predicting_states(batch)
        head_VC = self.head_rows(hidden_MC.dtype)
        logps, entropies, gradients = [], [], []
        for chunk in self.head_chunks(batch):
            target_M1 = batch.target_M[chunk, None]
            logp_M, entropy_M, rest = log_probs_of(self.masked_logits(hidden_MC[chunk], head_VC),
                                                   target_M1, temperature, entropy)
            logps.append(logp_M)
            entropies.append(entropy_M)
            g_M1 = gradient_of(loss, logp_M, chunk)[:, None] / temperature
            gradients.append(self.head_backward(
                logit_gradient(*rest, target_M1, g_M1, head_VC.dtype), hidden_MC[chunk], head_VC))
            del rest  # or it were there beside the next chunk's logits
        hidden_MC.backward(torch.cat(gradients))
        return torch.cat(logps), torch.cat(entropies) if entropy else None

    def predicting_states(self, batch):
        """(M, C): the hidden states that predict the completion tokens."""
        hidden_NC = self(batch.ids_N, batch.positions_N, batch.attend)
        return hidden_NC.index_select(0, batch.predictor_M)

    def head_chunks(self, batch):
        """Slices of M whose logits the head computes together."""
        chunk_bytes = HEAD_BYTES["cuda" if self.on_cuda else "cpu"]
        if self.on_cuda and self.checkpoint_activations:
            chunk_bytes //= 4
        return batch.chunks(max_tokens=chunk_bytes // (4 * self.n_real_ids))

    @torch.no_grad()
    def head_backward(self, gradient_MV, hidden_MC, head_VC):
        """Add the head's gradient to the fp32 one of its weight; return that of its input, (M, C).
        """
        if self.head_weight.grad is None:
            self.head_weight.grad = torch.zeros_like(self.head_weight)
        total_VC = self.head_weight.grad[:len(head_VC)]
        if hidden_MC.dtype == torch.float32:
            total_VC.addmm_(gradient_MV.T, hidden_MC)
        elif total_VC.is_cuda and fused_head.ON:
            fused_head.add_product(total_VC, gradient_MV.T, hidden_MC)
        else:
            total_VC += gradient_MV.T @ hidden_MC
        return product(gradient_MV, head_VC.T)

    def for_sampling(self):
        """The same model without gradients and with its weights cast once to `compute_dtype`.

        Weights already in that dtype are shared, not copied.
        """
        with torch.device("meta"):
            twin = Qwen2(self.config)
        weights = {k: parallel.unsharded(v.detach()).to(self.compute_dtype)
                   for k, v in self.state_dict().items()}
        twin.load_state_dict(weights, assign=True)
        for name in ("compute_dtype", "n_real_ids", "nameless_ids", "stop_ids", "tokenizer"):
            setattr(twin, name, getattr(self, name))
        return twin.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name_or_path, device="cpu", dtype="fp32"):
        """Load a folder in the hub's format, or a model of the hub by its name.

        Weights become fp32 masters on `device`; dtype (a key of DTYPES) is that of the computation.
        "tf32" is fp32 with matrix products in TF32, a setting of the whole process.
        Raises FileNotFoundError (no such folder, model or file), ConnectionError (hub out of
        reach) and ValueError (another architecture, wrong or missing tensors).
        """
        folder = hub.model_folder(name_or_path)
        config = hub.read_config(folder)
        with torch.device("meta"):
            model = cls(config)
        hub.load_weights(model, folder, device)
        model.compute_dtype = DTYPES[dtype]
        if dtype == "tf32":
            torch.set_float32_matmul_precision("high")
        if (folder / "generation_config.json").exists():
            model.generation_config = read_json(folder / "generation_config.json")
        model.tokenizer, named, model.tokenizer_files = hub.load_tokenizer(folder)
        model.n_real_ids, nameless = hub.real_ids(named, config["vocab_size"])
        model.nameless_ids = torch.tensor(nameless, dtype=torch.int64, device=device)
        model.stop_ids = hub.find_stop_ids(model.tokenizer, config, model.generation_config)
        return model

    def save_pretrained(self, folder, weights=None):
        """Write a folder in the hub's format: fp32 weights, configs and tokenizer.

        Each file is written at once or not at all. weights: a state dict to write instead of the
        model's own, as `parallel.collect` makes of a sharded model.
        Raises OSError where the folder cannot be written.
        """
        hub.save_model(Path(folder), weights or self.state_dict(), self.config,
                       {**self.generation_config, "eos_token_id": self.stop_ids},
                       self.tokenizer_files)


def product_in_fp32(x_NC, w_VC):
    """x wᵀ: (N, V) fp32; of bf16 on a CPU rounded to bf16 first."""
    if x_NC.is_cuda and x_NC.dtype == torch.bfloat16:
        return torch.mm(x_NC, w_VC.T, out_dtype=torch.float32)
    return product(x_NC, w_VC).float()


def log_softmax(logit_NV, temperature):
    """log softmax(logits / temperature), (N, V). On a CPU overwrites logit_NV."""
    if logit_NV.is_cuda:
        return fused_head.log_softmax(logit_NV, temperature)
    if temperature != 1:
        logit_NV.div_(temperature)
    return torch.log_softmax(logit_NV, -1, out=None if logit_NV.requires_grad else logit_NV)


def log_probs_of(logit_MV, target_M1, temperature, entropy):
    """Of softmax(logits / temperature): each target's log-prob and, where asked for, the entropies,
    (M,) nats. Third, for `logit_gradient`, x_MV, lse_M1 and a divisor: x / divisor − lse are all
    log-probs (where they exist they are x, with 0 and 1). On a CPU overwrites logit_MV."""
    if logit_MV.is_cuda and fused_head.ON:
        logp_M, entropy_M, lse_M1 = fused_head.log_probs_of(logit_MV, target_M1, temperature)
        return logp_M, entropy_M, (logit_MV, lse_M1, temperature)
    logp_MV = log_softmax(logit_MV, temperature)
    logp_M1 = logp_MV.gather(1, target_M1)
    return (logp_M1.squeeze(1), entropy_of(logp_MV) if entropy else None,
            (logp_MV, torch.zeros_like(logp_M1), 1.0))


@compiled
def entropy_of(logp_MV):
    """−Σ p·log p of each row: (M,) nats."""
    return -(logp_MV.exp() * logp_MV).sum(1)


def logit_gradient(x_MV, lse_M1, divisor, target_M1, g_M1, dtype):
    """g · (1[token] − softmax): (M, V) in dtype. The first three: as `log_probs_of` gives them. On
    a CPU overwrites x_MV, which are log-probs there."""
    if x_MV.is_cuda:
        return fused_head.logit_gradient(x_MV, lse_M1, divisor, target_M1, g_M1, dtype)
    return x_MV.exp_().mul_(-g_M1).scatter_add_(1, target_M1, g_M1).to(dtype)


def gradient_of(loss, logp_M, chunk):
    """∂loss/∂logp of one chunk: (M,) fp32."""
    with torch.enable_grad():
        leaf_M = logp_M.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf_M, chunk), leaf_M)[0]


# ------------------------------------------------------------------ who may see which token

class PaddedSequences:
    """Index tensors that view flat tokens as padded sequences, inside attention only.

    The queries of sequence b are its own tokens, `start … start + length` on the flat axis. A query
    sees the whole prefix of its sequence, and the sequence's own tokens up to itself. One prompt of
    three tokens with completions of two and one, on the flat axis p0 p1 p2 c0 c1 d0:

        query_BT  c0 c1       key_BJ  p0 p1 p2 c0 c1      (a repeated last token pads: d0 sees
                  d0 d0               p0 p1 p2 d0 d0       p0 p1 p2 d0, and not the pad)

    starts, lengths: lists of ints, so that nothing here waits for a GPU. prefix_starts,
    prefix_lengths: the same for the prefixes; without them no sequence has a prefix.
    """

    def __init__(self, starts, lengths, prefix_starts=None, prefix_lengths=None, device="cpu"):
        def column(values):
            return torch.tensor(values, dtype=torch.int64, device=device)[:, None]
        start_B1, self.length_B = column(starts), column(lengths).squeeze(1)
        t_T = torch.arange(max(lengths), device=device)
        last_B1 = column([max(s + n - 1, 0) for s, n in zip(starts, lengths)])
        self.query_BT = torch.minimum(start_B1 + t_T, last_B1)
        self.key_BJ, self.mask, self.has_prefix = self.query_BT, None, prefix_starts is not None
        if self.has_prefix:
            prefix_B1 = column(prefix_lengths)
            j_J = torch.arange(max(map(sum, zip(prefix_lengths, lengths))), device=device)
            own_BJ = torch.minimum(start_B1 + j_J - prefix_B1, last_B1)
            self.key_BJ = torch.where(j_J < prefix_B1, column(prefix_starts) + j_J, own_BJ)
            self.visible_BTJ = j_J <= prefix_B1[:, :, None] + t_T[:, None]
        sequence_N, t_N = segments(lengths)
        self.unpad = (sequence_N * len(t_T) + t_N).to(device)

    def attend(self, q_NHD, k_NKD, v_NKD):
        """Attention of these sequences' own tokens, flat again: (their number, H, D)."""
        (B, T), J = self.query_BT.shape, self.key_BJ.shape[1]
        H, (K, D) = q_NHD.shape[1], k_NKD.shape[1:]
        q = q_NHD.index_select(0, self.query_BT.flatten()).view(B, T, H, D).transpose(1, 2)
        k = k_NKD.index_select(0, self.key_BJ.flatten()).view(B, J, K, D).transpose(1, 2)
        v = v_NKD.index_select(0, self.key_BJ.flatten()).view(B, J, K, D).transpose(1, 2)
        if not self.has_prefix:  # padding comes last, so causal order alone hides it
            k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
            out_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # heads that share keys are stacked along T: torch's fast kernels take no mask
            # beside grouped queries
            q = q.reshape(B, K, H // K * T, D)
            mask = self.stacked_mask(H // K, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out_BHTD = out.reshape(B, H, T, D)  # no view: CUDA's lies in memory as (B, hT, K, D)
        return out_BHTD.transpose(1, 2).reshape(B * T, H, D).index_select(0, self.unpad)

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
    prompt_lengths: P ints; completion_lengths: P lists of ints, in tokens. packs: whether bf16 goes
    through plumbing/packed.py; by default where that was seen to work, on CUDA.
    """

    def __init__(self, prompt_lengths, completion_lengths, device="cpu", packs=None):
        start_P = [0, *accumulate(prompt_lengths)]
        lengths = [n for group in completion_lengths for n in group]
        prompt_of = [p for p, group in enumerate(completion_lengths) for _ in group]
        start_B = list(accumulate([start_P[-1], *lengths]))[:-1]
        prefixes = [start_P[p] for p in prompt_of], [prompt_lengths[p] for p in prompt_of]
        self.device, self.packed = device, None
        self.of_prompts = start_P[:-1], list(prompt_lengths)
        self.of_completions = start_B, lengths, *prefixes
        if packed_works(SharedPromptAttention, torch.device(device)) if packs is None else packs:
            none = [0] * len(prompt_lengths)
            self.packed = PackedSequences(*(a + b for a, b in zip(
                (*self.of_prompts, none, none), self.of_completions)), device)

    @cached_property
    def prompts(self):
        return PaddedSequences(*self.of_prompts, device=self.device)

    @cached_property
    def completions(self):
        return PaddedSequences(*self.of_completions, self.device)

    def __call__(self, layer, q_NHD, k_NKD, v_NKD):
        if self.packed and q_NHD.dtype == torch.bfloat16:
            return self.packed.attend(q_NHD, k_NKD, v_NKD)
        out = self.prompts.attend(q_NHD, k_NKD, v_NKD)
        if not sum(self.of_completions[1]):
            return out
        return torch.cat([out, self.completions.attend(q_NHD, k_NKD, v_NKD)])


# ------------------------------------------------------------------ run alone

def main():
    hub.keep_freed_memory()
    parser = argparse.ArgumentParser(description="Parameter table, and parity with transformers.")
    parser.add_argument("model", nargs="?", default="tiny", help="hub name or folder")
    name = parser.parse_args().model
    try:
        qwen = Qwen2.from_pretrained(name)
    except (ValueError, OSError) as e:
        parser.exit(1, f"error: {e}\n")
    for key, p in qwen.named_parameters():
        if ".layers." not in key or ".layers.0." in key:
            print(f"{key:50} {str(tuple(p.shape)):>18} {p.numel():>13,}")
    print(f"{qwen.config['num_hidden_layers']} layers, "
          f"{sum(p.numel() for p in qwen.parameters()):,} parameters, stop ids {qwen.stop_ids}")

    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(hub.model_folder(name), dtype=torch.float32)
    ids = torch.arange(32) * 997 % qwen.n_real_ids
    with torch.no_grad():
        ours = qwen.logits(qwen(ids, torch.arange(32), SharedPromptAttention([32], [[]])))
        difference = (ours - theirs(ids[None]).logits[0]).abs().max().item()
    print(f"logits of 32 tokens: maximum difference from transformers {difference:.2e}")


if __name__ == "__main__":
    main()
