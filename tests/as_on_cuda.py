"""What a CPU hides of CUDA, made visible: `make_cpu_like_cuda` is the fixture `as_on_cuda`.

Attention's kernels on CUDA return (B, H, T, D) laid out in memory as (B, T, H, D), the CPU's as
(B, H, T, D): a `view` that joins or splits H and T works on the CPU only.
"""
import torch.nn.functional as F


def make_cpu_like_cuda(monkeypatch):
    attention = F.scaled_dot_product_attention

    def laid_out_as_on_cuda(*arguments, **settings):
        out_BHTD = attention(*arguments, **settings)
        return out_BHTD.transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out_as_on_cuda)
