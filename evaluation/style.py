"""Style of one answer: does it leak the prompt, repeat itself, compute truly?

What it does    measures an answer's text; STYLE names the measures, their headings and formats.
Not here        what is correct (rewards.py), opinions (judge.py).
Run it alone    python -m evaluation.style TEXT …
Where to fork   a measure is a line in `style` and one in STYLE. Answers on disk are measured anew
                each time, so it costs no sampling.
"""
import operator
import re
import sys
from decimal import Decimal

from rewards import INSTRUCTION, answer_line

STYLE = {  # measure of one answer: (heading, format); docs/evaluate.md defines them
    "leakage": ("leakage", ".1%"), "n_tokens": ("tokens", ".1f"),
    "tokens_after": ("tokens after answer", ".1f"), "repeated": ("repeated 4-grams", ".1%"),
    "non_ascii": ("non-ASCII letters", ".1%"), "arithmetic": ("true arithmetic", ".1%")}

MARKED_LINE = re.compile("#{4,}([^\n]*)\n?")
ROLE = re.compile(r"<\|\w+\|>|^(?:system|user|human|assistant|q|question|problem)[ \t]*(?::|$)",
                  re.M | re.I)
OPERAND = r"[$€£]?(-?\d{1,15}(?:,\d{3})*(?:\.\d{1,10})?)"
STATEMENT = re.compile(rf"(?<![\d.,)^]){OPERAND} *([-+*/×x÷−·]) *{OPERAND} *= *{OPERAND}"
                       r"(?![\d,.]*\d)")
PLAIN_SIGN = str.maketrans("−×x·÷", "-***/")
COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def style(text):
    """Measure the style of one answer: a dict with what STYLE names, but for the tokens.

    leakage: True if the answer repeats six words of the instruction in a row, has a role marker or
        the heading of a new question, or asks something after its answer line.
    repeated: the share of word 4-grams that occurred before. non_ascii: the share of letters.
    statements: how many `a op b = c` the answer states; true_statements: how many of them hold.
        "arithmetic" in STYLE is their quotient over all answers to a problem.
    """
    words, letters = text.split(), [c for c in text if c.isalpha()]
    grams = list(zip(*(words[i:] for i in range(4))))
    instruction, own = (set(zip(*(w[i:] for i in range(6)))) for w in (
        re.findall(r"\w+", t.lower()) for t in (INSTRUCTION, text)))
    verdicts = [holds(match) for match in STATEMENT.finditer(text) if stands_alone(match)]
    return {"leakage": bool(instruction & own or ROLE.search(text) or "?" in after_answer(text)),
            "repeated": 1 - len(set(grams)) / len(grams) if grams else 0.0,
            "non_ascii": sum(not c.isascii() for c in letters) / max(len(letters), 1),
            "statements": len(verdicts), "true_statements": sum(verdicts)}


def after_answer(text):
    """What follows the `####` line with the answer; where there is none, the first one."""
    answer = answer_line(text, "number")
    for line in MARKED_LINE.finditer(text):
        if not answer or line[1].strip() == answer:
            return text[line.end():]
    return ""


def stands_alone(match):
    """Whether `a op b = c` is not part of a longer term, as it is in 2 + [3 * 4 = 12]."""
    before, after = match.string[:match.start()][-20:], match.string[match.end():][:20]
    return not (re.search(r"[\w)%] *[-+*/×x÷−·] *[$€£]?$", before)
                or re.match(r" *[-+*/×x÷−·] *[$€£(]?\d", after))


def holds(match):
    """Whether a statement is true when its left side is rounded to the digits that c has."""
    a, b, c = (Decimal(match[i].replace(",", "")) for i in (1, 3, 4))
    sign = match[2].translate(PLAIN_SIGN)
    if sign == "/" and not b:
        return False
    return abs(COMPUTE[sign](a, b) - c) <= Decimal(10) ** c.as_tuple().exponent / 2


if __name__ == "__main__":
    for answer in sys.argv[1:] or ["3 * 4 = 12\n#### 12\nHow many are left?"]:
        print(repr(answer), style(answer))
