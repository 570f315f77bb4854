"""Numbers as people write them, exactly: 18, -1,234.5, $18, 5/2, 2 1/2, 50%.

What it does    reads a number out of a text, or a gold that is a number with a unit, as the exact
                quotient of two decimals; compares two of them. Also the authors' reading of a
                number, for comparison.
Not here        where in a completion the answer stands: rewards.py.
Run it alone    python -m plumbing.number TEXT …     the number that each is as a gold

int and Fraction of Python raise above 4,300 digits and long floats compare as inf = inf; Decimal
does neither.
"""
import re
import sys
from decimal import Context, Decimal
from typing import NamedTuple

LONGEST = 1000  # characters of a number or a `####` line, chosen; what is longer is no answer
EXACT = Context(prec=10 * LONGEST)  # products of numbers of LONGEST digits are not rounded


class Number(NamedTuple):
    """The exact value top / bottom, and whether a percent sign follows it."""
    top: Decimal
    bottom: Decimal
    percent: bool


DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+"
NUMBER = re.compile(rf"""  # 18  -1,234.5  $18  .5  1e3  5/2  2 1/2  50%  50 percent
    (?<![\w^])(?<!\^[{{-])                          # not the 2 of m2, x^2, x^{{2}}, x^-2
    (?P<sign>[-+]?(?:[$€£¥][ ]?)?[-+]?)
    (?P<digits>{DIGITS})(?P<exponent>[eE][-+]?[0-9]{{1,2}}(?!\w))?
    (?:[ ]?/[ ]?(?P<over>[0-9]+)                    # 5/2
      |[ ](?P<part>[0-9]+)/(?P<parts>[0-9]+))?      # 2 1/2
    (?P<percent>[ ]?%|[ ]percent\b)?""", re.VERBOSE)
# What may follow the number in a gold: a unit in brackets or words, as in "9 (apples)", "12 cm²",
# "30°", "5 miles per hour"; not "6th", "3 p.m.", "2k".
UNIT = re.compile(r"°?(?:\s*\([^()]*\)|(?:\s+(?!(?:[ap]\.?m|pi|o'clock)\b)[^\W\d_]{2}"
                  r"[\w./'²³-]*)+)?\.?")
FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9.]+)\}\{([0-9.]+)\}")
PLAIN_SPELLING = [("\u2212", "-"), ("\u2013", "-"), ("\u00a0", " "), ("\u202f", " "),
                  (r"\!", ""), (r"\,", ""), (r"\$", "$"), (r"\%", "%"), ("{,}", ",")]


def plain(text):
    """A text with plain minus signs and spaces, without LaTeX's ways to write $, % and 10,000."""
    for odd, usual in PLAIN_SPELLING:
        text = text.replace(odd, usual)
    return text


def plain_answer(text):
    r"""As `plain`, and \frac{4}{5} becomes 4/5. (In a gold \frac stays: such a gold is LaTeX.)"""
    return plain(FRACTION.sub(r"\1/\2", re.sub(r"([0-9])(\\[dt]?frac)", r"\1 \2", text)))


def as_number(match):
    """The Number of a match of NUMBER; None if it divides by zero or is too long."""
    bottom = Decimal(match["over"] or match["parts"] or 1)
    if not bottom or len(match[0]) > LONGEST:
        return None
    top = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    if match["part"]:
        top = EXACT.add(EXACT.multiply(top, bottom), Decimal(match["part"]))
    sign = -1 if match["sign"].count("-") == 1 else 1
    return Number(EXACT.multiply(top, Decimal(sign)), bottom, bool(match["percent"]))


def gold_number(gold):
    """The Number that a gold is as a whole, with or without a unit; None for any other gold."""
    text = re.sub(r"^\$([^$]*)\$$", r"\1", plain(gold[:LONGEST + 1]).strip())  # $18$
    text = re.sub(r"^(-?)\(([^()]*)\)$", r"\1\2", text.strip())  # -(1/3)
    match = NUMBER.match(text)
    return as_number(match) if match and UNIT.fullmatch(text, match.end()) else None


def last_match(pattern, text, prepare=str):
    """The last number in a text, as a match of `pattern`, or None.

    Only LONGEST characters on either side of the last digit are searched, so that a long text
    costs no more than a short one; a number that begins before them is too long.
    """
    last = max(text.rfind(digit) for digit in "0123456789")
    start = max(0, last - LONGEST)
    match = None
    for match in pattern.finditer(prepare(text[start:last + LONGEST])) if last >= 0 else ():
        pass
    return match if match and (start == 0 or match.start() > 0) else None


def same_number(answer, gold):
    """Whether two Numbers are equal. The gold decides what a percent sign means.

    The sign is a unit: 50% answers a gold of 50, and 50 a gold of 50%. Where the gold has no sign,
    an answer's may also be a hundredth: 50% answers a gold of 0.5.
    """
    left, right = EXACT.multiply(answer.top, gold.bottom), EXACT.multiply(gold.top, answer.bottom)
    hundredth = answer.percent and not gold.percent
    return left == right or (hundredth and left == EXACT.multiply(right, Decimal(100)))


def as_text(number):
    """A Number as plain text, without separators and closing zeros: -1234.5, 5/2, 50%."""
    top, bottom = (f"{part:f}".rstrip("0").rstrip(".") if "." in f"{part:f}" else f"{part:f}"
                   for part in (number.top, number.bottom))
    return top + f"/{bottom}" * (bottom != "1") + "%" * number.percent


PAPER_LINE = re.compile(rf"\$?(-?(?:{DIGITS}))(?:/([0-9]+))?(%?)")
PAPER_NUMBER = re.compile(rf"-?(?:{DIGITS})")


def paper_number(text):
    """The number that the authors' scorer sees in a completion or a gold: a Decimal or None.

    The first `####` line, to its end, as number, a/b or percentage (50% is 0.5), else the last
    number of the whole text. A gold \\frac{14}{3} is therefore 3. For comparison only.
    """
    line = PAPER_LINE.fullmatch(text.partition("####")[2].partition("\n")[0][:LONGEST].strip())
    if line and Decimal(line[2] or 1):
        divisor = Decimal(line[2] or 1) * (100 if line[3] else 1)
        return Decimal(line[1].replace(",", "")) / divisor
    last = last_match(PAPER_NUMBER, text)
    return Decimal(last[0].replace(",", "")) if last else None


if __name__ == "__main__":
    for text in sys.argv[1:]:
        found = gold_number(text)
        print(f"{text!r}: {as_text(found) if found else 'no number'}")
