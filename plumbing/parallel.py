"""Several processes share one run: torchrun --nproc-per-node 8 train.py …

What it does    joins the processes that torchrun started, and offers what a step needs of them:
                their number, gather, a sum of gradients, a question to all. Also shards a model
                over the processes, and makes whole tensors of sharded ones.
Not here        which process samples and trains what: train.py. Without torchrun there is one
                process, and nothing here changes anything.
Run it alone    torchrun --nproc-per-node 2 -m plumbing.parallel    each process says who it is
Where to fork   `shard` is FSDP2 as PyTorch has it; tensor parallelism would begin there.

Every process must make the same calls in the same order, even one that has nothing to train.
Otherwise the processes wait for each other for ever.
"""
import datetime
import gc
import os
from dataclasses import replace

import torch
import torch.distributed as dist


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def largest_share(n):
    """How many of n things process 0 has, when they are dealt out in turn: the largest share."""
    return -(-n // n_processes())


def n_processes():
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched():
    """Whether torchrun started several processes, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(device):
    """Join the other processes, if torchrun started any, and return the device of this process.

    Raises ValueError where there are fewer GPUs than processes.
    """
    if launched() and not dist.is_initialized():
        if device.startswith("cuda"):
            n = int(os.environ["LOCAL_RANK"])
            if device != "cuda" or n >= torch.cuda.device_count():
                raise ValueError(f"--device is {device} in process {n} of a machine with "
                                 f"{torch.cuda.device_count()} GPUs; under torchrun expected cuda, "
                                 "and one GPU a process")
            device = f"cuda:{n}"
            torch.cuda.set_device(device)
        # gloo beside NCCL: what is gathered lies on the CPU
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    return device


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        gc.collect()  # a sharded model that outlives the group aborts now and then as Python ends
        dist.destroy_process_group()


def gather(value):
    """[value of process 0, value of process 1, …], for anything that pickles; CPU tensors."""
    if n_processes() == 1:
        return [value]
    found = [None] * n_processes()
    dist.all_gather_object(found, value)
    return found


def interleave(parts):
    """Undo dealing out in turn: [[a, c], [b, d]], gathered from two processes, is [a, b, c, d]."""
    n = len(parts)
    return [parts[i % n][i // n] for i in range(sum(map(len, parts)))]


def with_all_groups(rollout):
    """The Rollout of every process's groups, in the order of the problems."""
    parts = gather(rollout)
    return replace(rollout, seconds=max(part.seconds for part in parts), **{
        name: interleave([getattr(part, name) for part in parts])
        for name in ("prompts", "completions", "logps", "finished")})


def any_process(flag):
    """Whether `flag` is true in at least one process."""
    return any(gather(bool(flag)))


def sum_gradients(parameters):
    """Replace the gradient of every parameter by its sum over all processes.

    A process without a gradient counts as zero. The gradients of a sharded model stay: the backward
    pass has added them up.
    """
    if n_processes() > 1:
        for p in parameters:
            if hasattr(p, "full_tensor"):
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


# ------------------------------------------------------------------ a model in parts (FSDP2)

def shard(model, device):
    """Divide a model among the processes: each holds a part of every parameter (FSDP2,
    arXiv:2304.11277), and so of every gradient and moment of AdamW. A layer is whole while it
    computes. model: a Qwen2 on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.partition(":")[0], (n_processes(),))
    for module in (*model.model["layers"], model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum: the loss's weights are those of all tokens
        module.set_force_sum_reduction_for_comms(True)
    return model


def unsharded(tensor):
    """The whole of a tensor of which this process holds a part; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def refresh(policy, model):
    """Copy a sharded model's weights into the whole copy that samples."""
    for mine, sharded in zip(policy.parameters(), model.parameters(), strict=True):
        mine.copy_(unsharded(sharded))


def collect(state):
    """A sharded state dict with whole tensors on the CPU of process 0; other processes get empty
    tensors. A state dict that is not sharded stays as it is."""
    if isinstance(state, dict):
        return {key: collect(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = unsharded(state.detach())
    return tensor.cpu() if rank() == 0 else tensor.new_empty(0)


def distribute(optimizer_state, parameters):
    """Undo `collect` for a state dict of AdamW: shard each moment like its parameter."""
    for i, moments in optimizer_state["state"].items():
        p = parameters[i]
        if hasattr(p, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            for key in moments.keys() - {"step"}:
                moments[key] = distribute_tensor(moments[key].to(p.device), p.device_mesh,
                                                 p.placements, src_data_rank=None)
    return optimizer_state


if __name__ == "__main__":
    start("cpu")
    print(f"process {rank()} of {n_processes()}; all of them: {gather(os.getpid())}")
    stop()
