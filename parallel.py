"""Several processes share one run: torchrun --nproc-per-node 8 train.py …

What it does    starts torch.distributed where torchrun set it up, and offers the four things that
                a step needs: who am I, gather, sum the gradients, does anybody.
What it leaves  who samples and trains what to train.py. Without torchrun nothing happens here.
Run it alone    torchrun --nproc-per-node 2 parallel.py      each process says who it is
Where to fork   a model that does not fit whole on each device needs another `sum_gradients`.

Every process makes the same calls here in the same order, whatever its part of a rollout looks
like: that is what keeps them from waiting for each other for ever.
"""
import datetime
import os

import torch
import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device):
    """Join the other processes, if torchrun started any; returns this one's device. Raises
    ValueError where the GPUs do not suffice."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
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
    """Add up every parameter's gradient over all processes; those without one count as zero."""
    if n_processes() > 1:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


if __name__ == "__main__":
    start("cpu")
    print(f"process {rank()} of {n_processes()}; all of them: {gather(os.getpid())}")
    stop()
