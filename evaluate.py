"""Accuracy of one or more models on one or more problem sets, greedy and sampled.

What it does    samples answers with rollout.py, grades them with rewards.py, and writes a table
                (results.md, results.json) and every completion (completions.jsonl).
What it leaves  sampling to rollout.py, what counts as correct to rewards.py.
Run it alone    python evaluate.py tiny runs/tiny-pspo-s0/best --data tiny
Where to fork   `grade` makes a row per completion, `summarise` one of the table: add columns there.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import DTYPES, Qwen2, model_folder
from rewards import build_prompt, has_format, is_correct, load_problems
from rollout import check_sampling, generate, room_for

COLUMNS = {  # of the Markdown table: heading -> key of `summarise`, format
    "model": ("model", "s"), "data": ("data", "s"), "n": ("n_problems", "d"),
    "T": ("temperature", "g"), "samples": ("samples", "d"), "strict": ("strict", ".1%"),
    "flexible": ("flexible", ".1%"), "format": ("format", ".1%"), "cut": ("truncated", ".1%"),
    "tokens": ("mean_tokens", ".1f")}


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them correct, hold a correct one: 1 − C(n−c, k)/C(n, k).

    Unbiased (arXiv:2107.03374, Eq. 1). Needs 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n {n}, c {c}, k {k}: expected 0 ≤ c ≤ n and 1 ≤ k ≤ n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def grade(rollout, problems, tokenizer, progress=None):
    """Grade every completion of a rollout, problems[p] being prompt p: a list of dicts, one a row.

    Rows hold problem (id), sample, text, gold, n_tokens, finished and the bools strict, flexible
    and format.
    """
    rows, G = [], rollout.group_size
    for b, ids in enumerate(tqdm(rollout.completions, desc=progress, unit="answer", leave=False,
                                 delay=2, disable=progress is None)):
        problem, finished = problems[b // G], rollout.finished[b]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        rows.append({"problem": problem.id, "sample": b % G, "text": text,
                     "gold": problem.gold, "n_tokens": len(ids), "finished": finished,
                     "strict": is_correct(text, problem.gold, "strict", finished),
                     "flexible": is_correct(text, problem.gold, "flexible", finished),
                     "format": has_format(text, finished, problem.gold)})
    return rows


def answer(model, problems, samples=1, temperature=0.0, top_p=1.0, max_new_tokens=512, seed=0,
           step=0, max_rows=256, progress="evaluate"):
    """Answer every problem `samples` times and grade each answer: rows as `grade` makes them.

    Draws depend on (seed, step, problem index, sample, position) alone.
    """
    prompts = [build_prompt(model.tokenizer, problem) for problem in problems]
    rollout = generate(model, prompts, samples,
                       room_for(model, prompts, max_new_tokens), temperature, top_p, seed, step,
                       max_rows=max(max_rows, samples), progress=progress)
    return grade(rollout, problems, model.tokenizer, progress and "grading")


def summarise(rows, samples):
    """Means over all rows, and pass@k for k = 1, 2, 4, … ≤ samples by flexible correctness."""
    n = len(rows)
    summary = {"n_problems": n // samples, "samples": samples,
               **{key: sum(r[key] for r in rows) / n for key in ("strict", "flexible", "format")},
               "truncated": sum(not r["finished"] for r in rows) / n,
               "mean_tokens": sum(r["n_tokens"] for r in rows) / n}
    correct = [sum(r["flexible"] for r in rows[i:i + samples]) for i in range(0, n, samples)]
    k = 1
    while k <= samples and samples > 1:
        summary[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in correct) / len(correct)
        k *= 2
    return summary


def markdown(summaries):
    """One Markdown table of `summarise` rows, aligned; pass@k columns where a row has them."""
    ks = sorted({key for s in summaries for key in s if key.startswith("pass@")},
                key=lambda key: int(key[5:]))
    columns = {**COLUMNS, **{key: (key, ".1%") for key in ks}}
    table = [list(columns)]
    for s in summaries:
        table.append([format(s[key], form) if key in s else "" for key, form in columns.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
                     for row in table)


def make_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage="python evaluate.py MODEL [MODEL …] --data SET [SET …] [flags]",
        description="Accuracy of models on problem sets; one table for all of them.")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="hub names or model folders")
    add("--data", nargs="+", required=True, help="gsm8k svamp asdiv math500 tiny, or a .jsonl file")
    add("--split", default="test", help="which rows of each set")
    add("--temperature", nargs="+", type=float, default=[0.0], help="≥ 0; 0 is greedy, once")
    add("--samples", type=int, default=1, help="answers per problem at temperature > 0")
    add("--top-p", type=float, default=1.0, help="nucleus mass, in (0, 1]")
    add("--max-new-tokens", type=int, default=512, help="per answer; less where the context ends")
    add("--limit", type=int, default=None, help="only the first problems of each set")
    add("--rollout-rows", type=int, default=256, help="completions in flight at once")
    add("--seed", type=int, default=0, help="of the sampler")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the computation")
    add("--out", type=Path, default=None, help="folder to write, new (evaluations/<time>)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    check_sampling(parser, args)
    if args.samples < 1 or args.rollout_rows < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--samples, --rollout-rows and --limit expect 1 or more")
    out = args.out or Path("evaluations") / time.strftime("%Y%m%d-%H%M%S")
    if out.exists():
        parser.error(f"--out {out} exists; name a new folder, nothing is overwritten")
    try:
        for name in args.models:  # a name that is wrong shows before the first model is evaluated
            model_folder(name)
        for data in args.data:
            if Path(data).is_file():
                print(f"{data}: a file has no splits, all its rows are used (a run that trained on "
                      "a file leaves the problems it held out in test.jsonl)", file=sys.stderr)
        if args.samples > 1 and not any(args.temperature):
            print("--samples is for --temperature above 0; greedy answers once", file=sys.stderr)
        sets = {data: load_problems(data, args.split)[:args.limit] for data in args.data}
        out.mkdir(parents=True)
        summaries = []
        with open(out / "completions.jsonl", "w", encoding="utf-8") as file:
            for name in args.models:
                model = Qwen2.from_pretrained(name, args.device, args.dtype)
                for data, problems in sets.items():
                    for temperature in args.temperature:
                        samples = 1 if temperature == 0 else args.samples
                        about = {"model": name, "data": data, "temperature": temperature}
                        rows = answer(model, problems, samples, temperature, args.top_p,
                                      args.max_new_tokens, args.seed, max_rows=args.rollout_rows,
                                      progress=f"{name} {data} T={temperature:g}")
                        for row in rows:
                            file.write(json.dumps({**about, **row}) + "\n")
                        summaries.append({**about, **summarise(rows, samples)})
                del model
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    table = markdown(summaries)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    (out / "results.json").write_text(json.dumps({"settings": settings, "results": summaries},
                                                 indent=2) + "\n", encoding="utf-8")
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    print(f"{table}\n\nwrote {out}/results.md, results.json and completions.jsonl")


if __name__ == "__main__":
    main()
