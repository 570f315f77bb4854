"""The flags of an evaluation, what is refused, and the models and problems that they name.

Not here        the evaluation: evaluate.py. Which flags there are is told in docs/evaluate.md.
Where to fork   a new flag is one line in `make_parser`.
"""
import argparse
import glob
import json
import re
import sys
from pathlib import Path

import torch

from evaluation import judge
from model import DTYPES
from plumbing.hub import model_folder
from plumbing.problems import read_problems, report_dropped
from plumbing.settings import check_sampling


def make_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage="python evaluate.py MODEL [MODEL …] --data SET [SET …] [flags]",
        description="Accuracy and style of models on problem sets; one table for all of them.")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="hub names, model folders, 'quoted/patterns*'")
    add("--data", nargs="+", required=True,
        help="gsm8k svamp asdiv math500 tiny onestep, or a .jsonl, .csv or .parquet file")
    add("--split", default="test", help="which rows of each set")
    add("--temperature", nargs="+", type=float, default=[0.0], help="≥ 0; 0 is greedy, once")
    add("--samples", type=int, default=1, help="answers per problem at temperature > 0")
    add("--top-p", type=float, default=1.0, help="nucleus mass, in (0, 1]")
    add("--max-new-tokens", type=int, default=512, help="per answer; less where the context ends")
    add("--limit", type=int, default=None, help="only the first problems of each set")
    add("--compare", nargs=2, metavar=("A", "B"), help="B against A, runs or patterns of seeds")
    add("--judge", default=None, help="model folder or hub name, or the URL of an "
        "OpenAI-compatible endpoint (key in OPENAI_API_KEY)")
    add("--judge-name", default=None, help="the model at that URL")
    add("--judge-body", default="{}", help="JSON of more or other fields of its requests; null "
        "takes one away: '{\"max_tokens\": null, \"max_completion_tokens\": 500}'")
    add("--judge-problems", type=int, default=100, help="of each set, one answer each")
    add("--judge-per-minute", type=float, default=0, help="requests at most; 0: no limit")
    add("--judge-timeout", type=float, default=120.0, help="seconds for one request")
    add("--rollout-rows", type=int, default=None, help="completions in flight at once; without it "
        "what memory allows, at most 1,024, on a CPU 256")
    add("--seed", type=int, default=0, help="of the sampler")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the computation")
    add("--out", type=Path, default=Path("evaluations"),
        help="folder; answers in it are used again")
    return parser


def read_settings(argv=None):
    """The flags of a command line; ends the process in one line where they mean nothing."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_sampling(parser, args)
    if args.judge and judge.is_address(args.judge) and not args.judge_name:
        parser.error("--judge is a URL; name the model there with --judge-name")
    if not args.models and not args.compare:
        parser.error("name one or more models, or two with --compare")
    try:
        if not isinstance(json.loads(args.judge_body), dict):
            raise ValueError("no object")
    except ValueError as e:
        parser.error(f"--judge-body is {args.judge_body}; expected a JSON object ({e})")
    if args.judge_per_minute < 0 or args.judge_name and not args.judge:
        parser.error("--judge-per-minute expects 0 or more, --judge-name goes with --judge URL")
    for flag in ("samples", "rollout_rows", "limit", "judge_problems", "judge_timeout"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            parser.error(f"--{flag.replace('_', '-')} is {value}; expected 1 or more")
    if args.samples > 1 and not any(args.temperature):
        print("--samples is for --temperature above 0; greedy answers once", file=sys.stderr)
    if args.out.exists() and not (args.out.is_dir() and (
            (args.out / "answers").is_dir() or not any(args.out.iterdir()))):
        parser.error(f"--out {args.out} exists and holds no evaluation; name another folder")
    return args


# ------------------------------------------------------------------ models and problems

SEED = re.compile(r"(?:(?<=[-_/])|^)(s|seed)[-_]?\d+(?=[-_/]|$)")


def setting_of(model):
    """A run's name without its seed: runs/tiny-pspo-s0/best -> runs/tiny-pspo-s*/best."""
    return SEED.sub(r"\1*", model)


def expand(name):
    """A model's name, or the folders that a pattern such as "runs/a-s*/best" stands for."""
    if Path(name).exists() or not glob.has_magic(name):
        return [name]
    found = glob.glob(name)
    if not found:
        raise ValueError(f"{name}: no folder matches this pattern")
    return sorted(found, key=lambda path: [int(x) if x.isdecimal() else x
                                           for x in re.split(r"(\d+)", path)])


def chosen_models(args):
    """(the two sides of --compare, the folder of every model by its name).

    Raises ValueError for sides that cannot be compared, and what `model_folder` raises: a wrong
    name shows at once.
    """
    sides = [expand(name) for name in args.compare or ()]
    sizes = [len(side) for side in sides]
    if sides and min(sizes) == 1 != max(sizes) or args.judge and len(set(sizes)) > 1:
        raise ValueError(f"--compare: A is {sizes[0]} run(s) and B {sizes[1]}; give one run each "
                         "or several each, with --judge as many")
    others = [m for name in args.models for m in expand(name)]
    if sides and (both := set(sides[0]) & set(sides[1])) and sides[0] != sides[1]:
        raise ValueError(f"--compare: {', '.join(sorted(both))} is on both sides")
    if sizes == [1, 1] and len({setting_of(m) for m in (*args.compare, *others)}) == 1 and others:
        raise ValueError("--compare: A, B and the models before it are runs of one setting; quote "
                         "patterns, as in --compare 'runs/a-s*/best' 'runs/b-s*/best'")
    return sides, {name: model_folder(name) for name in others + sum(sides, [])}


def chosen_problems(args):
    """({data: its problems}, {data: (id, gold) of those that cannot be graded}) of --data."""
    for data in args.data:
        if Path(data).is_file():
            print(f"{data}: a file has no splits, all its rows are used (a run that trained on "
                  "a file leaves the problems it held out in test.jsonl)", file=sys.stderr)
    sets, dropped = {}, {}
    for data in args.data:
        problems, left_out = read_problems(data, args.split)
        sets[data] = problems[:args.limit]
        if left_out:
            dropped[data] = left_out
            report_dropped(data, args.split, len(problems), left_out)
    return sets, dropped
