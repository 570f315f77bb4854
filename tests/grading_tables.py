r"""Which completions are right, by hand: the tables of test_grading.py and of docs/scorers.md.

python tests/grading_tables.py > docs/scorers.md       writes the page, one example a line

A rule is what it says and examples: right by strict and flexible, right by flexible alone, wrong
by both. An example is a completion, " = " and a gold; ⏎ is a newline. Outside the first section
the completion stands behind "#### ".
"""
import re
import sys
from pathlib import Path

NUMBERS = "Numbers and their spellings"
PLACES = "Where the answer stands"
LATEX = "LaTeX golds"
SECTIONS = {
    PLACES: [
        ("the `####` line",
         r"""so 2 * 9 = 18⏎#### 18 = 18 | ####18 = 18 | #### 18⏎⏎Question: 3?⏎#### 5 = 18""",
         "",
         r"""#### 18⏎#### 5 = 5 | #### 5⏎#### 18 = 18 | #### 18 #### 18 = 18
             | 18⏎#### 2\pi = 18 | 18⏎#### \pi = 18 | 18⏎#### x = 18"""),
        ("a numbered heading is no answer line",
         r"""#### 1. Count the eggs⏎9 + 9 = 18⏎#### 18 = 18 | #### 1) Count⏎#### 18 = 18
             | #### (1) Count⏎#### 18 = 18 | #### 1: Count⏎#### 18 = 18
             | #### **1. Count**⏎#### 18 = 18 | #### 1\. Count⏎#### 18 = 18
             | #### 1、数⏎#### 18 = 18 | #### 1 Count the eggs⏎#### 18 = 18
             | #### 12. Add 3 and 4⏎#### 18 = 18 | #### Step 2: add⏎9 + 9 = 18⏎#### 18 = 18
             | #### **Step 1**⏎#### 18 = 18 | #### step one⏎#### 18 = 18
             | #### Part 3⏎#### 18 = 18 | #### a) Count⏎#### 18 = 18
             | #### II. Add⏎#### 18 = 18 | #### Solution⏎#### 18 = 18
             | #### The final answer:⏎#### 18 = 18 | ####⏎#### 18 = 18""",
         r"""#### Step 1⏎9 + 9 is 18 = 18 | ####⏎18 = 18 | #### Answer:⏎18 = 18""",
         r"""#### 1. Count⏎nothing = 1 | #### 1) Count⏎9 + 9 is 18 = 1
             | #### Step 2: add⏎#### 18 = 2 | #### Step 2⏎none = 1"""),
        ("what stands before `</think>` is no answer",
         r"""<think>⏎#### 7⏎</think>⏎#### 18 = 18""",
         r"""<think>7</think> It is 18 = 18""",
         r"""#### 18⏎</think>⏎It is 7 = 18 | <think>#### 18</think> = 18
             | <think>⏎#### 18⏎and = 18 | \boxed{18}</think>none = 18 | #### 18</think> = 18"""),
        ("without such a line, the last box",
         "",
         r"""Adding up gives \boxed{18} eggs for 7 days. = 18
             | \boxed{7}, no: \boxed{18}. = 18 | So \boxed{\text{18 eggs}}, or 2 a day. = 18
             | \boxed {18} 7 = 18 | \fbox{18} 7 = 18 | \boxed{x = 18} 7 = 18
             | \boxed{\boxed{18}} 7 = 18""",
         r"""\boxed{2\pi}, so 18 = 18 | \boxed{18} or \boxed{7} = 18 | \boxed{3, 5} = 5
             | \boxed{x} 18 = 18 | \boxed{3 + 4} = 4"""),
        ("what stands around a box belongs to it",
         "",
         r"""\boxed{1.5} million = 1500000 | x = -\boxed{18} = -18 | \boxed{80}k = 80000
             | \boxed{18} dozen = 216 | \boxed{18}^2 = 324 | \boxed{3}\frac{1}{2} = 3.5
             | **\boxed{18}** = 18 | The answer is \boxed{18} eggs. = 18 | \boxed{18}\% = 18""",
         r"""\boxed{18}\pi = 18 | \boxed{18} \times 10^3 = 18 | 2\boxed{18} = 18
             | \boxed{18}x = 18 | \frac{\boxed{18}}{2} = 18 | 2 + \boxed{18} = 18
             | \boxed{1.5} million = 1.5"""),
        ("without a box, the last number",
         "",
         r"""first 7, then 18. = 18 | it is 72, = 72 | at 1,234 km/h = 1234
             | the area is 25 cm^2 = 25 | x = 9 + 9 = <<9+9=18>>18 eggs to sell = 18
             | <answer>18</answer> = 18 | so $x = 18$. = 18 | so \(18\). = 18
             | Total: 18 eggs = 18 | in week 3 she has 18 left = 18
             | a 3-day trip costs $18 = 18""",
         r"""first 18, then 7 = 18 | none = 18 | is 9 + 9 = 9 | is 3 - 5 = 5 | is 9 x 9 = 9
             | is 9 × 9 = 9 | 9 divided by 3 = 3 | sqrt(18) = 18 | is \sqrt{18} = 18
             | is x^2 = 2 | so f(18) = 18 | x18 = 18 | cost - 18 = 18 | cost-18 = 18
             | so 3 and 5 = 5 | is 3 to 5 = 5 | is 3-5 = 5 | so (3, 5) = 5 | it is -5 = 5
             | it is negative 5 = 5 | 18 = x = 18 | 18x = 18 | is 18 \pi = 18"""),
    ],
    NUMBERS: [
        ("a number beside another script's letters, an underscore or a currency",
         r"""_18_ = 18 | __18__ = 18 | USD18 = 18 | USD 18 = 18 | 18USD = 18 | Rs.18 = 18
             | US$18 = 18 | 18个 = 18 | 18元 = 18 | 18개 = 18 | 18руб = 18 | €18 = 18 | 18€ = 18
             | ¥18 = 18 | 18千米 = 18""",
         r"""所以答案是18。 = 18 | 共18元 = 18 | 答案：18 = 18 | 답은18입니다 = 18
             | คำตอบคือ18บาท = 18
             | उत्तर18है = 18 | The answer is _18_. = 18 | costs USD18 = 18
             | ответ: 18 рублей = 18 | 共9个，18 = 18""",
         r"""Tom has 9 eggs. 所以一共有18个 = 9 | ABC18 = 18 | a_18 = 18 | 52_8 = 52 | 52_8 = 8
             | 18个半 = 18 | 3分之2 = 2 | ٣ = 3"""),
        ("a unit, or words, may follow",
         r"""18 dollars = 18 | 18 eggs. = 18 | 18 km/h = 18 | 18km = 18 | 18 m = 18
             | 72 cm^2 = 72 | 72cm² = 72 | 72\,\text{cm}^{2} = 72 | 18 m² = 18
             | 18 kg/m^3 = 18 | 18 m/s^2 = 18 | 90° = 90 | 90^\circ = 90 | 90^{\circ} = 90
             | 90\degree = 90 | 25 °C = 25 | $18.00 per day = 18 | $18 a day = 18
             | $18/hour = 18 | 18 (eggs) = 18 | 18-year-old = 18 | 18 t-shirts = 18
             | 18 quarters = 18 | 18 one-dollar bills = 18 | 18 times = 18 | 18 seconds = 18
             | 6 p.m. = 6 | 18 ㎡ = 18 | 18 µm = 18 | 18 piñatas = 18 | 18 кг = 18
             | 18 \text{ dollars} = 18 | 18 DVDs = 18 | 18 left over = 18""",
         "",
         r"""18 and 19 = 18 | 18 eggs and 2 hens = 18 | 18 \text{ if } x > 0 = 18
             | 18 m h g = 18"""),
        ("mathematics behind a number makes another number",
         r"""2^{10} = 1024 | 2^10 = 1024 | 2¹⁰ = 1024 | 10^3 = 1000 | 10^{-2} = 0.01
             | 10⁻² = 1/100 | 3 \times 10^5 = 300000 | 3×10⁵ = 300000 | 3 x 10^5 = 300000
             | 3*10^5 = 300000 | 2^3 \cdot 3^2 = 72 | 1e3 = 1000 | -2^2 = -4""",
         "",
         r"""2\pi = 2 | 5x = 5 | 5i = 5 | $288 \pi$ = 288 | 5r^5 = 5 | 11\sqrt2 = 11
             | 11√2 = 11 | 2^{10} = 2 | 3-\sqrt{x} = 3 | 3 + x = 3 | 4\cdot x = 4 | 2k = 2
             | 5m = 5 | 5 xy = 5 | 5 pi = 5 | 5! = 5 | 5² = 5 | 5² = 52 | 5π = 5 | 5θ = 5
             | 5𝑥 = 5 | 5/x = 5 | 18/h = 18 | (5)^2 = 5 | (5)x = 5 | \boxed{5}x = 5
             | \boxed{5}^2 = 5 | 5\text{x} = 5 | 5(x+1) = 5 | 5 mod 7 = 5 | 5 squared = 5
             | 5\% x = 5 | 5: 3 = 5 | 1/2^98 = 1/2 | 2^3^2 = 8 | 0^0 = 1 | 9^{99999} = 9
             | 5... = 5 | 5.\overline{3} = 5 | 18+ = 18 | 3^{x} = 3 | 52_{8} = 52
             | 5 \pmod 7 = 5 | 5 over x = 5 | 5 sin x = 5 | 5\ldots = 5 | 5\pm1 = 5"""),
        ("mathematics before it, too",
         r"""= 18 = 18 | +18 = 18""",
         r"""x = 18 = 18 | 3 + 4 = 7 = 7 | y \approx 18 = 18""",
         r""">3 = 3 | ≥3 = 3 | \ge 3 = 3 | != 3 = 3 | \neq 3 = 3 | ±3 = 3 | --3 = 3 | |3| = 3
             | \sqrt{3} = 3 | √3 = 3 | \frac{x}{3} = 3 | x+3 = 3 | x - 3 = 3 | \pi^3 = 3
             | 12:30 = 30 | 2:3 = 3 | \binom{6}{3} = 3"""),
        ("wrapping and Markdown",
         r"""**18** = 18 | **18** eggs = 18 | *18* = 18 | `18` = 18 | (18) = 18 | $18$ = 18
             | $$18$$ = 18 | \(18\) = 18 | \[18\] = 18 | \boxed{18} eggs = 18 | {18} = 18
             | "18" = 18 | \textbf{18} = 18 | \left(18\right) = 18 | \displaystyle 18 = 18
             | \$18 = 18 | $\$18$ = 18 | 72, = 72 | 18. = 18 | 18.00 = 18 | 007 = 7""",
         "",
         r"""(3, 5) = 5 | [3, 5) = 3 | (1,234) = 1234 | 18.. = 18"""),
        ("digit groups",
         r"""1,234,567 = 1234567 | 18 000 = 18000 | 18'000 = 18000 | 18’000 = 18000
             | 18_000 = 18000 | 18\ 000 = 18000 | 18~000 = 18000 | 18\,000 = 18000
             | 18{,}000 = 18000 | 12,34,567 = 1234567 | 1,234.50 = 1234.5 | １，２３４ = 1234"""
          " | 18\xa0000 = 18000 | 18\u202f000 = 18000 | 18\u2009000 = 18000",
         "",
         r"""1,5 = 1 | 1,5 = 5 | 1,5 = 15 | 1.234.567 = 1.234 | 0,500 = 500 | 12,34 = 1234
             | 1,2345 = 12345 | 1 23 = 123 | 1 2 3 = 123 | 3, 500 = 3500"""),
        ("every sign and percent sign",
         r"""−5 = -5 | –5 = -5 | －5 = -5 | ﹣5 = -5 | ‑5 = -5 | ➖5 = -5 | - 5 = -5
             | negative 5 = -5 | minus 5 = -5 | -$5 = -5 | $-5 = -5 | -(1/3) = -1/3
             | 50％ = 50% | 50 ٪ = 50 | 50\% = 50% | 50 percent = 50 | 50 per cent = 50
             | 50% = 0.5""",
         "",
         r"""−5 = 5 | negative 5 = 5 | minus 5 = 5 | —5 = 5 | - 5 = 5 | 0.5 = 50% | 5‰ = 5
             | 5% of 20 = 5"""),
        ("Unicode digits and fractions",
         r"""１８ = 18 | 𝟏𝟖 = 18 | ½ = 0.5 | 2½ = 2.5 | 2 ½ = 5/2 | ¾ = 0.75 | 1⁄2 = 0.5
             | ¹⁄₂ = 0.5 | 3∕4 = 0.75""",
         "",
         r"""①8 = 18 | ①8 = 8 | 2½ = 2 | 10³ = 103 | 8₁₀ = 8 | ١٨ = 18 | ５x = 5"""),
        ("fractions",
         r"""5/2 = 2.5 | 1/2 cup = 0.5 | \frac{5}{2} = 2.5 | -\frac{5}{2} = -2.5
             | \frac{-5}{2} = -2.5 | \frac12 = 0.5 | \frac 1 2 = 0.5 | \frac{ 1 }{ 2 } = 0.5
             | \dfrac12 = 0.5 | \cfrac{1}{2} = 0.5 | \tfrac1{2} = 0.5
             | \frac{1}{2^{3}} = 0.125""",
         "",
         r"""1/0 = 0 | 0.3333 = 1/3 | 1/2/3 = 1/2 | 1/2x = 1/2"""),
        ("mixed numbers",
         r"""2 1/2 = 2.5 | 2 2/3 = 8/3 | -2 2/3 = -8/3 | 2\frac{2}{3} = 8/3 | 2 \frac23 = 8/3
             | 2 and 2/3 = 8/3 | 2 1/2 cups = 2.5""",
         "",
         r"""2 2/3 = 4/3 | 2 2/3 = 2 | 2 2/3 = 2/3 | 2 3/2 = 3.5 | 2 3/2 = 3"""),
        ("scale words and letters",
         r"""1.5 million = 1500000 | 80k = 80000 | 80K = 80000 | $2.5M = 2500000
             | $2.5m = 2500000 | $2bn = 2000000000 | 4 thousand people = 4000
             | 2 dozen eggs = 24 | 5 hundred = 500 | 1/2 million = 500000
             | 2 hundred thousand = 200000 | 5 lakh = 500000 | 2 crore = 20000000
             | 18万 = 180000 | 1.5亿元 = 150000000""",
         "",
         r"""1.5 million = 1.5 | 80k = 80 | $2.5M = 2.5 | 4 thousand people = 4 | 5 grand = 5
             | 5 mil = 5 | 5 zillion = 5 | 5 B = 5 | 5m = 5000000 | 5 тыс. = 5 | 5千 = 5
             | 5 tenths = 5 | 3 thirds = 3 | 5-million = 5 | 1 half = 1"""),
        ("amounts in two parts or in words",
         r"""18 dollars and 50 cents = 18.5 | $18 and 50 cents = 18.5
             | 18 dollars 5 cents = 18.05 | -18 dollars and 50 cents = -18.5
             | 18 euros, 50 cents = 18.5 | 5 and a half = 5.5 | 5 and a half hours = 5.5
             | 5 and a quarter = 5.25""",
         r"""she has 18 dollars and 50 cents = 18.5""",
         r"""18 dollars and 50 cents = 18 | 18 dollars and 50 cents = 50
             | 2 hours and 30 minutes = 30 | 2h 30m = 30 | 2 hours, 30 minutes = 2
             | 5 feet 6 inches = 6 | 5 and a half = 5 | 5 hours and a half = 5
             | seventeen = 17 | it took 2 hours and 30 minutes = 30
             | it took 5 hours and a half = 5"""),
    ],
    LATEX: [
        ("a decimal or a fraction has one exact value",
         r"""14/3 = \frac{14}{3} | \frac{28}{6} = \frac{14}{3} | 2.5 = \frac52
             | 4 2/3 = \frac{14}{3} | 4⅔ = \frac{14}{3} | 1.8 = 1\frac{4}{5}
             | 2^{-99} = \frac{1}{2^{99}} | 1000 = 10^3 | 864 in² = 864 \mbox{ inches}^2
             | 5.4 = 5.4 \text{ cents} | 90 = 90^\circ""",
         "",
         r"""2 2/3 = \frac{4}{3} | 3 = \frac{14}{3} | \frac{1}{2^{98}} = \frac{1}{2^{99}}
             | 1/2^98 = \frac{1}{2^{99}} | 0.333333 = \frac{1}{3}
             | 0.3333333333333333 = \frac13"""),
        ("other LaTeX is compared by math-verify, to 4,000 decimal places",
         r"""\sqrt{12} = 2\sqrt{3} | -q + p = p - q | 0.5\pi = \frac{\pi}{2}
             | \frac{\sqrt3}{3} = \frac{1}{\sqrt3} | (3, 4] = (3,4]""",
         "",
         r"""3.14159265358979 = \pi | 1.414214 = \sqrt{2}
             | \frac{\pi}{2^{398}} = \frac{\pi}{2^{399}} | q - p = p - q
             | (0.3333333, 1) = (\frac13, 1) | 1+10^{-70} = 1+10^{-71} | 52_9 = 52_8
             | 2000 = 2k"""),
        ("Unicode's notation has its LaTeX meaning",
         r"""90° = 90^\circ | 90\degree = 90^\circ | ½ = \frac{1}{2} | 3R² = 3R^2 | 2π = 2\pi
             | 11√2 = 11\sqrt2 | √(13) = \sqrt{13} | √3/3 = \frac{\sqrt3}{3}
             | (2, ∞) = (2,\infty) | 52₈ = 52_8 | 1 ± √19 = 1 \pm \sqrt{19}
             | −π/6 = -\frac{\pi}{6} | x⁵ − x + 1 = x^5 - x + 1 | θ = \theta
             | (0,9) ∪ (9,36) = (0,9) \cup (9,36) | 6–5i = 6 - 5i""",
         "",
         r"""2ⁿ = 2n | 3R2 = 3R^2 | 52₉ = 52_8 | √2x = \sqrt{2x}"""),
    ],
}

INTRODUCTION = """\
| scorer | what it reads |
|---|---|
| strict | the first `####` line that is no heading: the whole of it is a number, with or without \
a unit |
| flexible | that line as a whole, else the last number on it; without such a line the last \
`\\boxed{}` \
with what stands around it; without a box the last number. \
A completion that was cut off has an answer \
only on a `####` line that ends in a newline. The reward is by flexible |
| math | what flexible reads, under the name by which sets with LaTeX answers are compared |
| paper | the authors' scorer, for comparison: the first `####` line if it is a number, else the \
last number of all |

The first `####` line counts, as in GSM8K's own grader and in lm-evaluation-harness (verl's took the
first and later the last). A base model often answers and then writes a next question with an answer
of its own, which the last line would grade; and a policy cannot add a second answer to a first one.

A number is the **whole** of what stands there, less a unit. What can be read in two ways is unread
and never guessed (flexible then takes the last number of the line). Numbers are equal exactly:
`0.3333` is not `1/3`. A percent sign is a unit: 50% answers 50, and where the gold has no sign it
answers 0.5 too. A gold that is a number is compared as a number. Any other gold is LaTeX: two
numbers are compared as numbers, the rest by math-verify to 4,000 decimal places; the answer is the
`####` line, else the last box, else the last formula, else the last number. `k` in a gold is a
thousand in a set of number answers, as in `80k`; in a set with LaTeX it is a letter, as in `2k`.

⏎ is a newline. `python tests/grading_tables.py > docs/scorers.md` makes this page from the tables
of the tests, where each rule has more examples. The second row of a rule is what it refuses."""


def examples(text):
    """(completion, gold) of the examples in a cell of a table."""
    for example in filter(None, re.split(r"\s+\|\s+", text.strip())):
        completion, _, gold = example.rpartition(" = ")
        yield completion.replace("⏎", "\n"), gold


def rules():
    """(section, rule, [(completion, gold, strict, flexible)]) of every rule."""
    for section, table in SECTIONS.items():
        for rule, *cells in table:
            yield section, rule, [
                (completion if section == PLACES else f"#### {completion}", gold, strict, flexible)
                for cell, strict, flexible in zip(cells, (True, False, False), (True, True, False))
                for completion, gold in examples(cell)]


def page():
    """docs/scorers.md: of each rule the first right example and the first wrong one."""
    from rewards import is_correct
    lines = ["# What each scorer reads", "", *INTRODUCTION.splitlines()]
    told = None
    for section, rule, cases in rules():
        if section != told:
            lines += ["", f"## {section}", "",
                      "| rule | completion | gold | strict | flexible, math | paper |",
                      "|---|---|---|---|---|---|"]
        told = section
        shown = [next(case for case in cases if case[3] is right) for right in (True, False)]
        for words, (completion, gold, strict, flexible) in zip((rule, ""), shown):
            verdicts = (strict, flexible, is_correct(completion, gold, "paper"))
            code = [text.replace("\n", "⏎").replace("|", "\\|") for text in (completion, gold)]
            lines.append(f"| {words} | `{code[0]}` | `{code[1]}` | "
                         + " | ".join("right" if v else "wrong" for v in verdicts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    print(page(), end="")
