"""The settings of a run: every flag, the embedded model's own values, and what is refused.

What it does    turns a command line, and with --resume a run's config.json, into one namespace of
                settings that fit together, or ends in one line that says what does not.
Not here        what the settings do (train.py); an objective's own defaults (its signature).
Run it alone    python -m plumbing.settings [flags]     all settings of a run with these flags
Where to fork   a new setting is one line in `make_parser`, and one in docs/flags.md.
"""
import argparse
import importlib.util
import inspect
import math
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from model import DTYPES
from objectives import OBJECTIVES, RATIO_LEVELS, REDUCTIONS
from plumbing import parallel
from plumbing.files import read_json
from plumbing.reward_file import load_reward_file
from rewards import MODES

# The defaults in `make_parser` are the published recipe for Qwen2.5-0.5B and -1.5B, and of any
# model without a preset; docs/paper.md has the authors' other arms. The settings of the two presets
# are chosen: the embedded model learns in a minute of two cores, SmolLM2-135M-Instruct in a quarter
# of an hour, slowly enough to watch.
PRESETS = {
    "tiny": dict(
        data="tiny", prompts_per_step=8, group_size=8, minibatches=4, temperature=1.0, top_p=1.0,
        max_new_tokens=40, steps=100, learning_rate=1e-5, warmup_steps=0, validation_problems=100,
        validation_samples=2, validate_every=5, checkpoint_every=20, test_problems=200),
    "smollm2": dict(
        data="onestep", prompts_per_step=8, group_size=8, minibatches=2, temperature=0.8, top_p=1.0,
        max_new_tokens=48, steps=20, learning_rate=2e-5, warmup_steps=4, validation_problems=50,
        validation_samples=1, validate_every=5, checkpoint_every=10, test_problems=200)}

# What --resume may change, since it changes results by rounding at most
OF_THE_MACHINE = {"threads", "tokens_per_microbatch", "rollout_rows", "checkpoint_activations",
                  "fsdp"}


def make_parser():
    """Every flag on one line. A preset replaces the defaults of the flags it names."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage="python train.py [flags]   (all flags: python train.py --help)",
        description="Train a language model with GR-PSPO, clipped or plain GRPO. Defaults are "
                    "those of Qwen2.5; the embedded model (tiny) and smollm2 have some of their "
                    "own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    on_gpu = torch.cuda.is_available()

    def add(flag, **how):
        try:
            parser.add_argument(flag, **how)
        except argparse.ArgumentError:  # a setting in objectives.py is named like another
            parser.error(f"two settings are named {flag}; rename the one of the new objective")
    add("--model", default="Qwen/Qwen2.5-0.5B" if on_gpu else "tiny",
        help="hub name, folder, tiny or smollm2")
    add("--data", default="gsm8k",
        help="gsm8k svamp tiny onestep, or a .jsonl, .csv or .parquet file")
    add("--objective", choices=list(OBJECTIVES), default="pspo", help="what is maximised")
    users = {}  # of an objective's setting: its default, and the objectives that have it
    for name in OBJECTIVES:
        for setting, default in objective_settings(name).items():
            users.setdefault((setting, default), []).append(name)
    for (setting, default), names in users.items():
        add("--" + setting.replace("_", "-"), type=float, default=default,
            help=f"of --objective {', '.join(names)}")
    add("--ratio-level", choices=RATIO_LEVELS, default="token",
        help="one ratio a token, or one a completion (GSPO)")
    add("--reduction", choices=REDUCTIONS, default="token", help="what the loss averages over")
    add("--advantage-scale", choices=["std", "none"], default="std", help="divide by group's std")
    add("--beta", type=float, default=0.0, help="penalty on leaving the start model: its KL, ≥ 0")
    add("--reward", default="correct", help="correct, paper, noise, or a file of yours, mine.py, "
        "with a function reward(text, gold, finished)")
    add("--prompts-per-step", type=int, default=16, help="P, prompts per rollout")
    add("--group-size", type=int, default=4, help="G, completions per prompt, ≥ 2")
    add("--epochs", type=int, default=2, help="passes over one rollout")
    add("--minibatches", type=int, default=1, help="optimizer steps per epoch; divides P")
    add("--temperature", type=float, default=0.8, help="of sampling and of every log-prob, > 0")
    add("--top-p", type=float, default=0.9, help="nucleus mass, in (0, 1]")
    add("--max-new-tokens", type=int, default=128, help="tokens per completion, at most")
    add("--steps", type=int, default=1311,
        help="rollouts with their updates; 1,311 are three passes over 7,000 problems")
    add("--stop-after", type=int, default=None, help="end after this step, schedule unchanged")
    add("--optimizer", choices=["adamw", "adamw8bit", "sgd"], default="adamw",
        help="without weight decay; adamw8bit: a quarter of AdamW's state, needs bitsandbytes")
    add("--adam-epsilon", type=float, default=1e-8, help="in AdamW's divisor, > 0")
    add("--learning-rate", type=float, default=5e-7, help="peak")
    add("--warmup-steps", type=int, default=140, help="optimizer steps of linear warm-up")
    add("--max-grad-norm", type=float, default=1.0, help="gradient-norm limit, > 0; inf: none")
    add("--validation-problems", type=int, default=473, help="held out, unless the set has its own")
    add("--validation-samples", type=int, default=4, help="answers per validation problem")
    add("--validate-every", type=int, default=50, help="steps; best/ is the best of these")
    add("--checkpoint-every", type=int, default=50, help="steps; the last step always saves")
    add("--keep", type=int, default=2, help="newest checkpoints to keep")
    add("--test-problems", type=int, default=0, help="greedy test of base and best at the end")
    add("--seed", type=int, default=0, help="of the order of problems and sampling")
    add("--device", default="cuda" if on_gpu else "cpu", help="cpu or cuda")
    add("--dtype", choices=list(DTYPES), default="bf16" if on_gpu else "fp32",
        help="of the computation; weights and gradients stay fp32")
    add("--threads", type=int, default=None, help="CPU threads; as many as cores are free")
    add("--tokens-per-microbatch", type=int, default=None if on_gpu else 8192,
        help="flat tokens per forward/backward; on CUDA what free memory holds")
    add("--checkpoint-activations", action="store_true", help="less memory, more time")
    add("--fsdp", action="store_true", help="shard weights and optimizer over torchrun's processes")
    add("--rollout-rows", type=int, default=256, help="completions in flight at once")
    add("--name", default=None, help="folder under runs/ (<model>-<objective>-s<seed>)")
    add("--resume", action="store_true", help="go on from the newest checkpoint of the folder")
    add("--wandb", default=None, metavar="PROJECT", help="also log there; needs wandb installed")
    return parser


def objective_settings(name):
    """The settings of an objective and their defaults, as they stand in its signature. Ends the
    process where a default is no number."""
    parameters = list(inspect.signature(OBJECTIVES[name]).parameters.values())[2:]
    for p in parameters:
        if type(p.default) not in (int, float):
            sys.exit(f"error: objectives.py: the setting {p.name} of {name} needs a number as its "
                     "default")
    return {p.name: p.default for p in parameters}


def read_settings(argv, begins=True):
    """(settings, run folder): defaults, then the preset or the resumed run's, then given flags.
    begins: a run begins with them, so that its folder must not be there."""
    parser, quiet = make_parser(), make_parser()
    for action in quiet._actions:
        action.default = argparse.SUPPRESS  # so that it finds the flags that were given, no others
    defaults, given = vars(parser.parse_args([])), vars(quiet.parse_args(argv))
    if given.get("model") == "tiny/model":
        given["model"] = "tiny"

    preset = PRESETS.get(given.get("model", defaults["model"]), {})
    args = SimpleNamespace(**{**defaults, **preset, **given})
    if args.name == "":
        parser.error("--name is empty; expected a folder name, made under runs/")
    short = args.model.rstrip("/").split("/")[-1]
    own = "".join(f"-{key}{getattr(args, key):g}" for key, default in objective_settings(
        args.objective).items() if getattr(args, key) != default)
    args.name = args.name or f"{short}-{args.objective}{own}-s{args.seed}"
    folder = Path("runs") / args.name
    if args.name in (".", "..") or Path(args.name).name != args.name:
        parser.error(f"--name is {args.name!r}; expected a plain folder name, made under runs/")
    if args.resume:
        saved = folder / "config.json"
        if not saved.exists():
            parser.error(f"--resume: no run in {folder} (there is no {saved})")
        settings = saved_settings(saved)
        settings |= {"resume": True, "stop_after": args.stop_after, "wandb": args.wandb,
                     "name": args.name}
        for key in given.keys() & OF_THE_MACHINE:
            settings[key] = given[key]
        if "threads" not in given and settings["threads"]:  # this machine may have fewer
            settings["threads"] = min(settings["threads"], os.cpu_count() or 1)
        if "fsdp" not in given:
            settings["fsdp"] &= parallel.launched()
        for key, value in given.items():
            if settings[key] != value:
                flag = "--" + key.replace("_", "-")
                parser.error(f"--resume: {flag} was {settings[key]} in {folder}, now {value}; "
                             "leave it out, or start a new run with another --name")
        args = SimpleNamespace(**settings)
    check_settings(parser, args, given)
    try:
        if args.reward.endswith(".py"):
            load_reward_file(args.reward)
    except ValueError as e:
        parser.error(f"--reward {e}")
    if begins and not args.resume and folder.exists() and {p.name for p in folder.iterdir()} - {
            ".lock", "config.json.part"}:  # what a run leaves that was killed as it began
        parser.error(f"{folder} exists; continue it with --resume or choose another --name")
    return args, folder


def saved_settings(path):
    """The settings in a run's config.json, read as those of a command line are; what does not fit
    together ends the process with the file's name."""
    parser = make_parser()
    refuse = parser.error
    parser.error = lambda message: refuse(f"--resume: {path}: {message}")
    try:
        argv = ["--" + key.replace("_", "-") + ("" if value is True else f"={value}")
                for key, value in read_json(path)["settings"].items()
                if value != parser.get_default(key) and value is not None]
    except (ValueError, KeyError, AttributeError) as e:
        parser.error(f"it does not hold a run's settings ({e})")
    settings = parser.parse_args(argv)
    here = vars(settings) | {"threads": 1, "fsdp": False, "wandb": None}  # of the machine then
    check_settings(parser, SimpleNamespace(**here), {})
    return vars(settings)


def check_settings(parser, args, given):
    """Refuse, in one line, settings that contradict each other or mean nothing."""
    for name in OBJECTIVES:
        for setting in objective_settings(name).keys() - objective_settings(args.objective).keys():
            if setting in given:
                flag = "--" + setting.replace("_", "-")
                parser.error(f"{flag} is a setting of --objective {name}; this run has "
                             f"--objective {args.objective}, which does not use it")
    ratio = torch.ones(2, requires_grad=True)
    try:
        value = chosen_objective(args)(ratio, torch.ones(2))
    except (ValueError, TypeError) as e:
        parser.error(f"--objective {args.objective}: {e}")
    if value.shape != ratio.shape or not value.requires_grad:
        parser.error(f"--objective {args.objective}: expected a number for each ratio, with a "
                     "gradient")
    if args.reward not in MODES and not args.reward.endswith(".py"):
        parser.error(f"--reward is {args.reward!r}; expected {', '.join(MODES)}, or a .py file "
                     "with a function reward(text, gold, finished)")
    check_sampling(parser, args)
    if args.temperature == 0:
        parser.error("--temperature is 0; training needs samples that differ, a value above 0")
    if args.group_size < 2:
        parser.error(f"--group-size is {args.group_size}; expected 2 or more: the advantage of a "
                     "completion is its reward against the others of its group")
    for key in ("prompts_per_step", "epochs", "minibatches", "steps", "threads", "validate_every",
                "validation_problems", "validation_samples", "checkpoint_every", "keep",
                "tokens_per_microbatch"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')} is {getattr(args, key)}; expected 1 or more")
    if args.prompts_per_step % args.minibatches:
        parser.error(f"--minibatches {args.minibatches} does not divide --prompts-per-step "
                     f"{args.prompts_per_step}; a minibatch holds whole groups")
    if args.rollout_rows < args.group_size:
        parser.error(f"--rollout-rows {args.rollout_rows} does not hold one group of "
                     f"{args.group_size}")
    if args.stop_after is not None and args.stop_after < 1:
        parser.error(f"--stop-after is {args.stop_after}; expected 1 or more")
    if (args.threads or 1) > (os.cpu_count() or args.threads):
        parser.error(f"--threads is {args.threads}; this machine has {os.cpu_count()} cores")
    if args.optimizer == "adamw8bit" and args.fsdp:
        parser.error("--optimizer adamw8bit keeps its state whole in each process; leave --fsdp "
                     "away, or take --optimizer adamw")
    if args.fsdp and not parallel.launched():
        parser.error("--fsdp shards the model over several processes; start them with torchrun "
                     "--nproc-per-node N train.py …")
    if args.wandb is not None and importlib.util.find_spec("wandb") is None:
        parser.error("--wandb needs the package wandb: pip install wandb")
    if args.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--optimizer adamw8bit needs the package bitsandbytes: pip install "
                     "bitsandbytes")
    if not 0 < args.adam_epsilon < math.inf:
        parser.error(f"--adam-epsilon is {args.adam_epsilon}; expected a finite value above 0")
    if not args.max_grad_norm > 0:
        parser.error(f"--max-grad-norm is {args.max_grad_norm}; expected a value above 0, or inf "
                     "for no limit")
    for key in ("learning_rate", "beta", "warmup_steps", "test_problems"):
        if not 0 <= getattr(args, key) < math.inf:
            parser.error(f"--{key.replace('_', '-')} is {getattr(args, key)}; expected 0 or more, "
                         "finite")


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


def warn_of_slow_bf16(args):
    """Say so, before hours of it, where bf16 is computed on a processor that has no units for it.
    No refusal: the results are right, and a rounding can be studied on any machine."""
    has = torch.cpu.get_capabilities()
    if (args.dtype == "bf16" and args.device == "cpu" and has["architecture"] == "x86_64"
            and not (has.get("avx512_bf16") or has.get("amx_bf16"))):
        print("warning    this processor has neither avx512_bf16 nor amx_bf16: bf16 is several "
              "times slower on it than --dtype fp32", file=sys.stderr)


def chosen_objective(args):
    """The objective of these settings: (ratio, advantage) -> objective, elementwise."""
    settings = {key: getattr(args, key) for key in objective_settings(args.objective)}
    return partial(OBJECTIVES[args.objective], **settings)


if __name__ == "__main__":
    for key, value in vars(read_settings(sys.argv[1:], begins=False)[0]).items():
        print(f"--{key.replace('_', '-'):24} {value}")
