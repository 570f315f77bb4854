"""Several processes share one run: torchrun --nproc-per-node 8 train.py …

What it does    starts torch.distributed where torchrun set it up, and offers what a step needs:
                who am I, gather, sum the gradients, does anybody; and a model that lies in parts
                with all processes (`shard`, `whole`).
What it leaves  who samples and trains what to train.py. Without torchrun nothing happens here.
Run it alone    torchrun --nproc-per-node 2 -m plumbing.parallel    each process says who it is
Where to fork   `shard` is FSDP2 as PyTorch has it; tensor parallelism would begin there.

Every process makes the same calls here in the same order, whatever its part of a rollout looks
like: that is what keeps them from waiting for each other for ever.
"""
import datetime
import gc
import os

import torch
import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def largest_share(n):
    """The most of n things that one process has, where each has every n_processes-th."""
    return -(-n // n_processes())


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def launched():
    """Whether torchrun started several processes, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(device):
    """Join the other processes, if torchrun started any; returns this one's device. Raises
    ValueError where the GPUs do not suffice."""
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
    """One list from what `gather` made of each process's every n-th item, in the items' order."""
    n = len(parts)
    return [parts[i % n][i // n] for i in range(sum(map(len, parts)))]


def anybody(flag):
    """Whether `flag` is true in any process."""
    return any(gather(bool(flag)))


def sum_gradients(parameters):
    """Add up every parameter's gradient over all processes; those without one count as zero. Of a
    sharded model they were added up in the backward pass."""
    if n_processes() > 1:
        for p in parameters:
            if hasattr(p, "full_tensor"):
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


# ------------------------------------------------------------------ a model in parts (FSDP2)

def shard(model, device):
    """Leave each process its part of every parameter, gradient and moment of AdamW; a layer is
    whole while it computes (FSDP2, arXiv:2304.11277). model: a Qwen2 on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.partition(":")[0], (n_processes(),))
    for module in (*model.model["layers"], model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum: the loss's weights are those of all tokens
        module.set_force_sum_reduction_for_comms(True)
    return model


def whole(tensor):
    """The tensor that a sharded one is a part of; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def refresh(policy, model):
    """Copy a sharded model's weights into the whole copy that samples."""
    for mine, sharded in zip(policy.parameters(), model.parameters(), strict=True):
        mine.copy_(whole(sharded))


def collect(state):
    """A state dict with whole tensors, on the CPU of process 0; the others get empty ones."""
    if isinstance(state, dict):
        return {key: collect(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = whole(state.detach())
    return tensor.cpu() if rank() == 0 else tensor.new_empty(0)


def distribute(optimizer_state, parameters):
    """The way back: a state dict of AdamW with its moments sharded like their parameters."""
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
