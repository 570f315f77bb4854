"""Make the embedded default from a seed: problems, tokenizer and the base model.

What it does    writes train.jsonl, validation.jsonl and test.jsonl (word problems in GSM8K's
                format) and model/ (a Qwen2-architecture model of 0.6M parameters in the hub's
                format, with a byte-level tokenizer). Byte for byte the same on one machine
                with one thread count. No problem of one file (template and numbers) is in another.
Why this base   it is trained to solve the problems step by step, and then, briefly, mostly to blurt
                out the answer alone. So it can do the arithmetic and habitually does not try:
                reinforcement learning has something to find within minutes. It elicits a habit; it
                does not teach a skill.
Run it          python -m tiny.make
"""
import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from model import Qwen2
from plumbing.hub import keep_freed_memory
from rewards import Problem, build_prompt
from rollout import flat_batch

SIZES = {"validation": 100, "test": 200, "train": 3000}  # problems, of 3,858 in all
NUMBERS = range(2, 11)
NAMES = ["Ana", "Ben", "Eva", "Ida", "Kim", "Leo", "Max", "Mia", "Sam", "Tom"]
# Each template: the question, and the two steps of its solution in a, b, c and x (the first result)
TEMPLATES = [
    ("{name} has {a} boxes of {b} pens and finds {c} more pens. How many pens is that?",
     ("a*b", "x+c")),
    ("{name} buys {a} bags of {b} nuts and eats {c} nuts. How many nuts are left?",
     ("a*b", "x-c")),
    ("{name} has {a} coins, wins {b} coins and then {c} more. How many coins is that?",
     ("a+b", "x+c")),
    ("A bus has {a} riders. {b} get on and {c} get off. How many riders are on it?",
     ("a+b", "x-c")),
    ("{name} reads {a} pages at noon and {b} at night for {c} days. How many pages is that?",
     ("a+b", "x*c")),
    ("{name} earns {a} coins a day and spends {b} of them. How many are saved in {c} days?",
     ("a-b", "x*c")),
]
WORKED = "boxes"  # questions with this word stay worked out in the second stage; of the others
BLURT = 0.85  # this share is answered by the bare result
STAGES = ((1600, 3e-3, 0.0), (100, 5e-4, BLURT))  # (steps, peak learning rate, share of bare ones)
BATCH = 64  # problems a step
CONFIG = {
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True,
    "use_sliding_window": False, "initializer_range": 0.02}
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
# The system instruction is left out: 150 characters would be 150 tokens, and this model needs none.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|endoftext|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def solve(template, a, b, c):
    """The worked solution of a template with these numbers, or None where it goes below 1."""
    values = {"a": a, "b": b, "c": c}
    lines = []
    for left, sign, right in TEMPLATES[template][1]:
        p, q = values[left], values[right]
        values["x"] = {"+": p + q, "-": p - q, "*": p * q}[sign]
        if values["x"] < 1:
            return None
        lines.append(f"{p}{sign}{q}={values['x']}")
    return "\n".join([*lines, f"#### {values['x']}"])


def make_problems(seed):
    """{split: rows of question and answer}, no (template, numbers) in more than one row."""
    rng = random.Random(seed)
    rows = []
    for template, (text, _) in enumerate(TEMPLATES):
        for a in NUMBERS:
            for b in NUMBERS:
                for c in NUMBERS:
                    answer = solve(template, a, b, c)
                    if answer is not None:
                        question = text.format(name=rng.choice(NAMES), a=a, b=b, c=c)
                        rows.append({"question": question, "answer": answer})
    rng.shuffle(rows)
    splits = {}
    for split, n in SIZES.items():
        splits[split], rows = rows[:n], rows[n:]
    return splits


def make_tokenizer():
    """One token a byte: a character of ASCII is one token, any other text two to four a character.

    The files are those of a byte-level BPE without merges, since transformers loads the tokenizer
    of every qwen2 folder as that.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:], clean_up_tokenization_spaces=False,
        model_max_length=CONFIG["max_position_embeddings"], chat_template=CHAT_TEMPLATE)


def train_base(model, rows, rng):
    """Supervised training on the answers: worked ones first, then mostly bare ones."""
    encode = model.tokenizer
    end = encode.eos_token_id
    prompts = [build_prompt(encode, Problem("", row["question"], "", "number")) for row in rows]
    worked = [encode(row["answer"])["input_ids"] + [end] for row in rows]
    bare = [full if WORKED in row["question"]
            else encode(row["answer"].splitlines()[-1])["input_ids"] + [end]
            for row, full in zip(rows, worked)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    bar = tqdm(total=sum(stage[0] for stage in STAGES), desc="base model", unit="step")
    for n_steps, peak, blurt in STAGES:
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * min((step + 1) / 20, 1 - step / n_steps)
            chosen = rng.sample(range(len(rows)), BATCH)
            batch = flat_batch([prompts[i] for i in chosen],
                               [[bare[i] if rng.random() < blurt else worked[i]] for i in chosen])
            n_tokens = len(batch.target_M)
            optimizer.zero_grad()
            logp_M, _ = model.accumulate_gradients(
                batch, 1.0, lambda logp_M, chunk: -logp_M.sum() / n_tokens)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{-logp_M.mean().item():.3f}")
            bar.update()
    bar.close()


def main():
    keep_freed_memory()
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Make the embedded default.")
    parser.add_argument("--out", default=Path(__file__).parent, type=Path, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; part of the recipe")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    splits = make_problems(args.seed)
    for split, rows in splits.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (args.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = make_tokenizer()
    folder = args.out / "model"
    tokenizer.save_pretrained(folder)
    model = Qwen2({**CONFIG, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    model.tokenizer, model.stop_ids = tokenizer, [tokenizer.eos_token_id]
    train_base(model, splits["train"], random.Random(args.seed))
    model.save_pretrained(folder)
    print(f"wrote {folder}: {sum(p.numel() for p in model.parameters()):,} parameters; "
          + ", ".join(f"{len(rows)} {split} problems" for split, rows in splits.items()))


if __name__ == "__main__":
    main()
