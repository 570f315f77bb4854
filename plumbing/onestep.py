"""One-step word problems, within reach of a language model of 135M parameters: the set `onestep`.

What it does    fills wordings with numbers from 2 to 9; the same problems every time. A wording
                with its two numbers is in one split only, with one name in the validation and test
                problems, with three in the training problems.
Not here        two-step problems of a model that knows nothing else: tiny/make.py. No torch.
Run it alone    python -m plumbing.onestep      how many problems, and one of each wording
Where to fork   a wording is a line of `WORDINGS`.
"""
import random

SEED = 0
NUMBERS = range(2, 10)
SIZES = {"validation": 100, "test": 200}  # the other 324 wordings with numbers are for training
NAMES_IN_TRAINING = 3
NAMES = ["Alice", "Carlos", "Dana", "Emma", "George", "Hannah", "Jack", "Lena", "Nora", "Oscar",
         "Paul", "Rosa"]
THINGS = ["apples", "balls", "books", "cards", "cookies", "eggs", "flowers", "keys", "lemons",
          "marbles", "shells", "stickers"]
WORDINGS = [
    ("+", "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"),
    ("+", "{name} finds {a} {things} at home and {b} at school. How many {things} is that in all?"),
    ("+", "There are {a} {things} on a table. {name} adds {b} more. How many {things} are there?"),
    ("+", "{name} bought {a} {things} yesterday and {b} today. How many {things} is that?"),
    ("-", "{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?"),
    ("-", "There are {a} {things} in a box. {name} takes out {b}. How many {things} are left?"),
    ("-", "{name} had {a} {things} and lost {b}. How many {things} does {name} still have?"),
    ("-", "{name} needs {a} {things} and has {b}. How many more {things} does {name} need?"),
    ("*", "{name} has {a} bags with {b} {things} in each bag. How many {things} does {name} have?"),
    ("*", "{name} fills {a} shelves with {b} {things} each. How many {things} are on the shelves?"),
    ("*", "{name} buys {b} {things} a day for {a} days. How many {things} does {name} buy in all?"),
    ("*", "{name} gives {b} {things} to each of {a} children. How many {things} does {name} give?"),
]
RESULTS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def onestep_rows(split):
    """The rows of a split, {"question": text, "answer": "3 + 4 = 7\\n#### 7"}: 972 of "train", 100
    of "validation", 200 of "test"."""
    rng = random.Random(SEED)
    cells = [(sign, wording, a, b) for sign, wording in WORDINGS for a in NUMBERS for b in NUMBERS
             if sign != "-" or a > b]
    rng.shuffle(cells)
    splits, start = {}, 0
    for name, size in SIZES.items():
        splits[name], start = cells[start:start + size], start + size
    splits["train"] = cells[start:]
    rows = []
    for sign, wording, a, b in splits[split]:
        for name in rng.sample(NAMES, NAMES_IN_TRAINING if split == "train" else 1):
            question = wording.format(name=name, things=rng.choice(THINGS), a=a, b=b)
            x = RESULTS[sign](a, b)
            rows.append({"question": question, "answer": f"{a} {sign} {b} = {x}\n#### {x}"})
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    for split in ("train", "validation", "test"):
        print(f"{split}: {len(onestep_rows(split))} problems")
    for (_, wording), name, things in zip(WORDINGS, NAMES, THINGS):
        print(wording.format(name=name, things=things, a=7, b=3))
