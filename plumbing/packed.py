"""Attention of training and prefill by a kernel of CUDA that takes sequences end to end, unpadded.

What it does    `PackedSequences` gives what the PaddedSequences of model.py give, in bf16, by
                FlashAttention-2 (arXiv:2307.08691). `packed_works` compares the two, with their
                gradients, the first time that a process asks; where they differ or torch has no
                such kernel, the plain one stays.
Not here        who sees which token, in words and in plain torch: model.py.
"""
import sys
from functools import cache, partial
from itertools import accumulate

import torch

from plumbing.compiled import runs_on, why

# torch's own name for it: the public varlen_attn takes grouped heads from torch 2.12 on only.
flash_attention = torch.ops.aten._flash_attention_forward
LARGEST_DIFFERENCE = 0.1  # chosen: bf16 rounds what is near 4, the largest here, to 0.016


def segments(lengths):
    """Segments of these lengths lie end to end: of each place the number of its segment, and where
    in it, both (N,). [2, 1] -> [0, 0, 1], [0, 1, 0]."""
    length_B = torch.as_tensor(lengths, dtype=torch.int64)
    segment_N = torch.arange(len(lengths)).repeat_interleave(length_B)
    return segment_N, torch.arange(len(segment_N)) - (length_B.cumsum(0) - length_B)[segment_N]


class PackedSequences:
    """Sequences whose keys lie end to end, each with the tokens it sees before its own.

    One prompt of three tokens with completions of two and one (p0 p1 p2 c0 c1 d0 on the flat axis):

        p0 p1 p2 | p0 p1 p2 c0 c1 | p0 p1 p2 d0      keys; each sequence's queries are its last ones

    starts, lengths: of every sequence's own tokens, together the whole flat axis. prefix_starts,
    prefix_lengths: of the tokens before them (length 0: none). All are lists of ints.
    """

    def __init__(self, starts, lengths, prefix_starts, prefix_lengths, device):
        def ends(lengths):
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        n_keys = [n + m for n, m in zip(lengths, prefix_lengths)]
        self.sizes = ends(lengths), ends(n_keys), max(lengths), max(n_keys)
        sequence_J, j_J = segments(n_keys)
        start_J, prefix_start_J, prefix_J = torch.tensor(
            [starts, prefix_starts, prefix_lengths])[:, sequence_J]
        self.key_J = torch.where(j_J < prefix_J, prefix_start_J + j_J,
                                 start_J + j_J - prefix_J).to(device)

    def attend(self, q_NHD, k_NKD, v_NKD):
        """Causal attention, aligned at each sequence's last key: (N, H, D)."""
        k, v = torch.cat([k_NKD, v_NKD], 1).index_select(0, self.key_J).chunk(2, 1)
        no_dropout, causal, no_mask_back = 0.0, True, False
        return flash_attention(q_NHD, k, v, *self.sizes, no_dropout, causal, no_mask_back)[0]


@cache
def packed_works(plain, device):
    """Whether packed attention gives what padded attention gives on this device. plain: the class
    model.SharedPromptAttention, handed in since model.py imports this file."""
    if not runs_on(device):
        return False
    results = []
    try:
        with torch.inference_mode(False), torch.enable_grad():
            packed = PackedSequences([0, 5, 45, 48, 65], [5, 40, 3, 17, 33], [0, 0, 0, 0, 5],
                                     [0, 0, 5, 5, 40], device)
            padded = partial(plain([5, 40], [[3, 17], [33]], device, packs=False), 0)
            q, k, v, gradient = (torch.randn(98, heads, 64, device=device, dtype=torch.bfloat16)
                                 for heads in (6, 2, 2, 6))
            for attend in (padded, packed.attend):
                inputs = [x.clone().requires_grad_() for x in (q, k, v)]
                out = attend(*inputs)
                results.append([out, *torch.autograd.grad(out, inputs, gradient)])
        worst = max((a - b).abs().max().item() for a, b in zip(*results))
        reason = "" if worst <= LARGEST_DIFFERENCE else f"the two differ by {worst:.2g}"
    except RuntimeError as e:
        reason = why(e)
    if reason:
        print(f"attention pads its sequences on {device}: {reason}", file=sys.stderr)
    return not reason
