"""A CPU's products with large matrices, by oneDNN.

What it does    `product` is what every linear layer and the head compute: torch's own product, but
                on an AMD processor, where torch's is slower, oneDNN's; `reorder_weights` puts a
                sampler's weights into the order in which oneDNN reads them fastest.
Not here        small matrices (the embedded model's) and GPUs: both are torch's.
"""
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

LARGE = 2**17  # chosen: numbers in a matrix; the embedded model's have up to 98,304


def product(x_NC, weight_DC, bias_D=None):
    """x · weightᵀ + bias: (N, D)."""
    if weight_DC.is_mkldnn:
        return by_onednn(x_NC, weight_DC, bias_D)
    if weight_DC.dtype == torch.float32 and is_large(weight_DC) and mkl_is_slow():
        return Product.apply(x_NC, weight_DC, bias_D)
    return F.linear(x_NC, weight_DC, bias_D)


def by_onednn(x_NC, weight_DC, bias_D=None):
    return torch.ops.mkldnn._linear_pointwise(x_NC, weight_DC, bias_D, "none", [], "")


class Product(torch.autograd.Function):
    """`by_onednn` with its gradients; for the weight's MKL is as fast."""

    @staticmethod
    def forward(ctx, x_NC, weight_DC, bias_D):
        ctx.save_for_backward(x_NC, weight_DC)
        return by_onednn(x_NC, weight_DC, bias_D)

    @staticmethod
    def backward(ctx, gradient_ND):
        x_NC, weight_DC = ctx.saved_tensors
        return (by_onednn(gradient_ND, weight_DC.T), gradient_ND.T @ x_NC,
                gradient_ND.sum(0) if ctx.needs_input_grad[2] else None)


def is_large(weight):
    """Whether this is a large matrix on a CPU for which oneDNN has fast products."""
    return (weight.numel() >= LARGE and weight.device.type == "cpu"
            and not weight.is_cuda  # in tests a CPU's tensor may say that it is
            and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
            and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@cache
def mkl_is_slow():
    """Whether this is an AMD processor: MKL, which torch takes for fp32, keeps its fastest code for
    Intel's."""
    return "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def reorder_weights(model):
    """Put a sampler's large matrices into oneDNN's own order: those of the layers in their place,
    the head as a copy, `reordered_head`.

    A product with few rows mostly reads weights. With 32 rows those of the layers take 0.55 to 0.75
    of the time, a head of 49,152 tokens 0.4; sums are added in another order.
    """
    for module in model.model["layers"].modules():
        if isinstance(module, nn.Linear) and is_large(module.weight):
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
    head_VC = model.head_weight[:model.n_head_rows]
    if is_large(head_VC):
        model.reordered_head = torch.ops.mkldnn._reorder_linear_weight(head_VC)
