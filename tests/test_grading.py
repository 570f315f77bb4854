"""Grading by table: what is right and what is wrong, and every number gold under many spellings."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grading_tables import NUMBERS, page, rules

from rewards import extract_answer, has_format, is_correct, reward

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT.parent / "shared" / "grading" / "cases.jsonl"


@pytest.mark.parametrize("section, rule, cases", list(rules()),
                         ids=lambda x: x if type(x) is str else "")
def test_every_example_is_graded_as_the_table_says(section, rule, cases):
    wrong = []
    for text, gold, strict, flexible in cases:
        graded = [is_correct(text, gold, scorer) for scorer in ("strict", "flexible", "math")]
        if graded != [strict, flexible, flexible]:
            wrong.append((text, gold, graded))
        if section == NUMBERS and "boxed" not in text:  # a box is read as a line is
            boxed = f"So 7 or \\boxed{{{text[5:]}}}, in 7 days"
            if is_correct(boxed, gold) is not flexible:
                wrong.append((boxed, gold, not flexible))
    assert not wrong


def test_the_page_of_the_scorers_is_made_from_the_tables():
    assert (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8") == page(), \
        "python tests/grading_tables.py > docs/scorers.md"


def test_the_cases_of_public_bug_reports():
    if not CASES.is_file():
        pytest.skip(f"{CASES} is not there")
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    assert [(case["text"], scorer) for case in cases for scorer in case["scorers"]
            if is_correct(case["text"], case["gold"], scorer) is not case["right"]] == []


def test_an_answer_that_is_no_number_earns_no_bonus():
    for text in (r"#### 2\pi", "#### 5x", "#### >3", "#### 3 + 4", "#### 1,5", "#### Step 1"):
        assert not has_format(text, "2") and reward(text, "2") == 0
    assert reward("<think>#### 1</think>\n#### 18", "18") == 1.05  # the thought's line is none


@pytest.mark.parametrize("text, answer", [
    ("#### 80k", "80000"), ("#### 2 1/2", "5/2"), (r"#### 2^{-3}", "1/8"), ("#### $2.50", "2.5"),
    ("#### 18万", "180000"), (r"so \boxed{5 \text{ and a half}}", "11/2"), ("#### 50 %", "50%"),
    ("#### 5m", None), (r"\boxed{2\pi}", None), ("#### negative 5 degrees", "-5")])
def test_extract_answer_gives_the_value_in_plain_digits(text, answer):
    assert extract_answer(text) == answer


def test_a_gold_in_thousands_is_a_number_in_a_file_and_a_letter_in_latex(tmp_path):
    from plumbing.number import gold_number
    from plumbing.problems import read_problems
    file = tmp_path / "mine.jsonl"
    golds = ["80k", "$2.5M", "1.5 million", "2 dozen", "3 hundred people", "½", "18 000", "18万",
             "-5 m"]
    file.write_text("".join(json.dumps({"question": "?", "answer": g}) + "\n" for g in golds))
    assert [p.gold for p in read_problems(file)[0]] == [
        "80000", "2500000", "1500000", "24", "300", "1/2", "18000", "180000", "-5"]
    assert gold_number("2k") is None and gold_number("$2k").top == 2000
    assert is_correct("#### 2k", "2k") and not is_correct("#### 2000", "2k")


# Runs in a process of its own, which asks the hub.
EVERY_GOLD = r"""
import json
from plumbing.problems import load_problems
from rewards import is_correct
MATHEMATICS = [
    r"\pi", r" \pi", "x", " x", "i", "n", "^2", "^{10}", "^x", "!", r"\sqrt2", r"\sqrt{3}", "+x",
    "-x", " + x", " - 1", r"-\sqrt{x}", r"\cdot x", r"\times y", "/x", r"/\pi", "e^x", "_8",
    "_{10}", "_n", "(x+1)", "(2)", r"\ln 2", r" \log x", r"\sin x", " sin x", r"\theta", "θ", "π",
    "²", "√2", "½x", r"\infty", "∞", r"\pm 1", "±1", ":3", ", 5", "...", r"\ldots", "*x", "xy",
    " xy", " = x", r" \le x", " < 5", " or 5", "+", r"\,x", r"\left(x\right)", " mod 7",
    r"\pmod 7", "^{-1}", "^{1/2}", " squared", " factorial", " choose 2", " million", " dozen",
    "k", "M", " thirds", " and a half", r"\frac{x}{2}", "ⁿ", "₈", "𝑥", "万", r"\alpha",
    r"\mathbf{i}", r"\text{x}", r"\binom{5}{2}", "|x|", "‰", "e5", "'(x)", "f(x)", "i+j", "%x"]
HAVE_A_VALUE = {"^2", "^{10}", "²", "^{-1}", " million", " dozen", "k", "M", "万", "e5"}  # 1^2 is 1
places = {"####": "so it is 1 + 1\n#### %s", "dollars": "so\n#### $%s$",
          "box": r"thus \boxed{%s}", "prose": "thus it is %s."}


def groups(gold, mark):
    whole, point, rest = gold.partition(".")
    return f"{int(whole):,}".replace(",", mark) + point + rest


def spellings(gold):
    if "/" in gold or "%" in gold:
        return [gold, f"**{gold}**", rf"\boxed{{{gold}}}", f"{gold}.", f"{gold} eggs"]
    wide = gold.translate({ord(a): b for a, b in zip("0123456789.-", "０１２３４５６７８９．－")})
    marks = [",", " ", "\xa0", "\u2009", "\u202f", "'", "’", "_", r"\,", r"\ ", "~", "{,}"]
    return [gold, wide, gold.replace("-", "−"), f"**{gold}**", f"_{gold}_", f"`{gold}`",
            f"${gold}$", rf"\({gold}\)", rf"\boxed{{{gold}}}", f"({gold})", f"{gold}.", f"{gold},",
            f"{gold} eggs",
            rf"{gold}\text{{ cm}}^2", f"{gold} km/h", f"{gold} m²", f"{gold}°", f"{gold}个",
            f"${gold}", f"{gold} dollars per day", f"USD {gold}",
            *(groups(gold, mark) for mark in marks if gold.partition(".")[0].strip("-0"))]


counts = dict(golds=0, suffixed=0, paid=0, harmless=0, missed=0)
seen = set()
for name, split in [("gsm8k", "train"), ("gsm8k", "test"), ("math500", "test")]:
    for problem in load_problems(name, split):
        gold = problem.gold
        if problem.kind != "number" or gold in seen:
            continue
        seen.add(gold)
        counts["golds"] += 1
        for n, suffix in enumerate(MATHEMATICS):
            if gold in ("0", "1", "-1") and suffix in HAVE_A_VALUE:
                continue
            for place in ("####", list(places)[1 + (n + len(seen)) % 3]):
                form = places[place]
                # prose ends at a word or a comma; a line and a box are read whole
                if place == "prose" and suffix in (" or 5", ", 5", " mod 7", "...", ":3", "|x|"):
                    continue
                text = form % (gold + suffix)
                counts["suffixed"] += 1
                if is_correct(text, gold) or is_correct(text, gold, "strict"):
                    counts["paid"] += 1
                    print("PAID", repr(text), gold)
        for spelling in spellings(gold):
            for text in (f"so\n#### {spelling}", rf"so \boxed{{{spelling}}} now"):
                counts["harmless"] += 1
                if not is_correct(text, gold):
                    counts["missed"] += 1
                    print("MISSED", repr(text), gold)
print(json.dumps(counts | {"suffixes": len(MATHEMATICS)}))
"""


def test_number_golds_are_paid_in_harmless_spellings_and_never_with_mathematics_behind(hub):
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", EVERY_GOLD], env=hub, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts, f"{time.monotonic() - begun:.0f} s")
    assert counts["suffixes"] >= 30 and counts["golds"] > 900, counts
    assert counts["paid"] == counts["missed"] == 0, done.stdout[:6000]


# ------------------------------------------------------------------ what a first adversary found

BOXES = {  # completions without a #### line: the gold that flexible takes, None for none
    "x = -\\boxed{18}": "-18", "\\boxed{1.5} million": "1500000", "\\boxed{80}k": "80000",
    "\\boxed{18}\\text{ million}": "18000000", "\\boxed{3}\\frac{1}{2}": "7/2",
    "\\boxed{18} dozen": "216", "$$\\boxed{18}$$": "18", "**\\boxed{18}**": "18",
    "\\(\\boxed{18}\\).": "18", "The answer is \\boxed{18} eggs.": "18", "\\boxed{18}^2": "324",
    "\\boxed{18}\\text{ cm}": "18", "\\boxed{18}\\%": "18%", "\\boxed{18} \\blacksquare": "18",
    "\\textbf{\\boxed{18}}": "18", "\\boxed{\\boxed{18}}": "18", "答案是\\boxed{18}。": "18",
    "\\boxed{18} a day": "18", "(\\boxed{18})": "18", "\\boxed{18} is 9 + 9": "18",
    **dict.fromkeys((
        "$\\boxed{18}\\pi$", "\\boxed{18}\\sqrt{2}", "\\boxed{18} \\times 10^3", "\\boxed{18}x",
        "2\\boxed{18}", "\\frac{\\boxed{18}}{2}", "2 + \\boxed{18}", "\\sqrt{\\boxed{18}}",
        "\\boxed{18} - 5", "x^\\boxed{18}", "cost -\\boxed{18}"))}


@pytest.mark.parametrize("text", BOXES)
def test_what_stands_around_a_box_belongs_to_it(text):
    found = extract_answer(text)
    assert found == BOXES[text]
    assert found in ("18", "18%") or not is_correct(text, "18")


LINES = {  # what stands on the #### line: (gold, right)
    "200 * 15%": ("3000", False), "18*5%": ("0.9", False), "20/5%": ("4", False),
    "2 1/2%": ("2.5", True), "(18, inf)": ("18", False), "5 twelfths": ("5", False),
    "3 third graders": ("3", True), "18 bil": ("18", False), "18 doubled": ("18", False),
    "25% of 80": ("80", False), "1 out of 18": ("18", False), "2 for $9": ("9", False),
    "25^\\circ\\text{C}": ("25", True), "<number>18</number>": ("18", True), "<18>": ("18", True),
    "3\\pi = 2\\pi": ("2\\pi", False), "x = 2\\pi": ("2\\pi", True),
    "\\sqrt{12} = 2\\sqrt{3}": ("2\\sqrt{3}", True), "1,000\\pi": ("1000\\pi", True),
    "1,000\\pi ": ("(1,0)", False)}


@pytest.mark.parametrize("line", LINES)
def test_lines_that_were_once_read_wrongly(line):
    gold, right = LINES[line]
    assert is_correct("#### " + line, gold) is right


@pytest.mark.parametrize("text, right", [
    ("<think>\n#### 18\nmore", False), ("<thinking>#### 5\n</thinking>\n#### 18", True),
    ("#### Calculate the total for 3 days:\n9 + 9 = 18\n#### 18", True),
    ("#### Week 1\n9 + 9 = 18\n#### 18", True)])
def test_thoughts_and_headings(text, right):
    assert is_correct(text, "18", "strict") is right and is_correct(text, "18") is right
