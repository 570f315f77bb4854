"""Whether two LaTeX formulas say the same: math-verify, in a process of its own.

What it does    unwraps formulas and compares them. The system ends the process when a comparison
                takes too long, because sympy can be kept busy for hours; its caller starts the next
                one.
Not here        where in a completion the formula stands: rewards.py.
Run it alone    python -m plumbing.latex GOLD ANSWER     same, different or unreadable

This file runs as a script, too, for the process: it imports nothing of the project.
"""
import functools
import itertools
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import unicodedata

LONGEST_BOXED = 1000  # characters of \boxed{…}, chosen; what is longer is no answer
LONGEST_LATEX = 400  # characters of a LaTeX answer, chosen; MATH-500's longest gold has 53
LATEX_LIMIT_S = 0.6  # of CPU time for one comparison, chosen: with the start of a new process
# behind it (0.4 s) it stays within a second; MATH-500's slowest needs 0.15. It is CPU time, so that
# a busy machine turns no right answer into a wrong one. What takes longer counts as wrong.
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
EXACT_DIGITS = 4000  # chosen; math-verify's own 6 takes 0.333333 for 1/3
BASE = re.compile(r"[0-9]_\{?([0-9]+)\}?$")
# Seconds to years of work for sympy: a factorial, an exponent in an exponent, a long exponent.
COSTLY = re.compile(r"(?<!\\)!|\^\s*(?:\{[^}]*|\([^)]*|\w+\s*)\^|\^[\s{(-]*[0-9]{5}")


# What Unicode's own tables do not give: characters that LaTeX, or a keyboard, spells otherwise.
AS_LATEX = {
    "∞": r"\infty ", "±": r"\pm ", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "∕": "/", "⁄": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "→": r"\to ", "⇒": r"\implies ", "∅": r"\emptyset ",
    "°": r"^{\circ}", "º": r"^{\circ}", "℃": r"^{\circ}C", "℉": r"^{\circ}F", "√": r"\sqrt",
    "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "µ": "μ", "−": "-", "➖": "-", "˗": "-", "٪": "%",
    "。": ". ", "、": ", ", "’": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "″": '"', "～": "〜"}
ROOT = re.compile(r"([√∛∜])\s*(?:([0-9]+(?:\.[0-9]+)?|[A-Za-zπ])|\(([^()]*)\))")


@functools.lru_cache(maxsize=4096)
def spell(character):
    """(how to wrap it, LaTeX) of a character: ("^", "2") of ², ("", "\\pi ") of π."""
    kind, name = unicodedata.category(character), unicodedata.name(character, "")
    if character in AS_LATEX:
        return "", AS_LATEX[character]
    if kind == "Zs":
        return "", " "
    if kind == "Pd" and character not in "—―〜〰":  # long dashes and waves are no minus signs
        return "", "-"
    if "\u200b" <= character <= "\u200f" or character in "\u2060\ufeff":
        return "", ""  # no width, no meaning
    greek = re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]{2,7})", name)
    if greek and character != "μ":
        letter = greek[2].replace("LAMDA", "LAMBDA")
        return "", f"\\{letter.lower() if greek[1] == 'SMALL' else letter.capitalize()} "
    tag, _, codes = unicodedata.decomposition(character).partition("> ")
    usual = "".join(chr(int(code, 16)) for code in codes.split())
    if tag == "<fraction" and usual[-1] != "⁄":  # ½
        return "", "\\frac{%s}{%s}" % tuple(usual.split("⁄"))
    if tag in ("<super", "<sub"):
        return "^" if tag == "<super" else "_", usual.replace("−", "-")
    return "", "\ufffd" if kind == "No" else character  # ① is no 1


def spelled(text):
    """A text with Unicode's notation in LaTeX's: 3R² is 3R^{2}, √3 \\sqrt{3}, ½ \\frac{1}{2}."""
    if text.isascii():
        return text
    text = ROOT.sub(lambda m: f"{m[1]}{{{m[2] or m[3]}}}", text)
    parts = []
    for wrap, run in itertools.groupby(map(spell, text), key=lambda pair: pair[0]):
        inside = "".join(latex for _, latex in run)
        parts.append(f"{wrap}{{{inside}}}" if wrap else inside)
    text = re.sub(r"\^\{([0-9]+)\}/_\{([0-9]+)\}", r"\\frac{\1}{\2}", "".join(parts))  # ¹⁄₂
    return unicodedata.normalize("NFKC", text)


def braced(text, start):
    """The text between the brace at `start` and the one that closes it; "" if none does."""
    depth = 0
    for i in range(start, min(len(text), start + LONGEST_BOXED)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start + 1:i]
    return ""


def last_box(text):
    """What stands in the last \\boxed{} of a text, or None without one."""
    parts = around_last_box(text)
    return parts[1] if parts else None


def around_last_box(text):
    """What stands on the line of the last \\boxed{}, as (before, inside, behind), or None."""
    last = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    box = BOX.match(text, last) if last >= 0 else None
    if not box:
        return None
    inside = braced(text, box.end())
    before = text[text.rfind("\n", 0, last) + 1:last]
    behind = text[box.end() + len(inside) + 2:][:LONGEST_BOXED].partition("\n")[0]
    return before, inside.strip(), behind


def bare(latex):
    """LaTeX without the dollars, \\boxed{}, Markdown and full stop around it, in ASCII notation."""
    latex = spelled(latex[:LONGEST_BOXED]).replace(r"\degree", r"^{\circ}").replace("{,}", ",")
    if not re.search(r"[(\[]|\\\{", latex):  # 1,000\pi; but (1,000) may be a pair
        latex = re.sub(r"(?<![0-9,.])([1-9][0-9]{0,2})((?:,[0-9]{3})+)(?![0-9,])",
                       lambda m: m[1] + m[2].replace(",", ""), latex)
    latex = latex.replace(r"\$", "").replace("$", "").strip(" \n*")
    if latex.endswith(".") and not latex.endswith(".."):
        latex = latex[:-1].rstrip(" \n*")
    if latex[:2] + latex[-2:] in (r"\(\)", r"\[\]"):
        latex = latex[2:-2].strip()
    box = BOX.match(latex)
    if box and box.end() + len(braced(latex, box.end())) + 2 == len(latex):
        latex = latex[box.end() + 1:-1].strip()
    return latex


@functools.lru_cache(maxsize=4096)
def compare_latex(gold, answer):
    """"same", "different", or "unreadable" where the answer is no LaTeX or is refused."""
    if " ".join(gold.split()) == " ".join(answer.split()):
        return "same"
    bases = BASE.search(gold), BASE.search(answer)
    if all(bases) and bases[0][1] != bases[1][1]:
        return "different"  # math-verify reads 52 of 52_8 and of 52_9
    if COSTLY.search(gold) or COSTLY.search(answer):
        return "unreadable"
    with worker_lock:
        if not workers or workers[0].poll() is not None:
            start_worker()
        worker = workers[0]
        worker.stdin.write(json.dumps([gold, answer]) + "\n")
        worker.stdin.flush()
        verdict = worker.stdout.readline().strip()
        if not verdict:  # it ended at its limit, or crashed and left its traceback on stderr
            workers.pop().communicate()
            ungraded.append((gold, answer))
            print(f"no verdict on the LaTeX answer {answer!r:.80} for {gold!r:.80}: counted as "
                  f"wrong, {len(ungraded)} so far", file=sys.stderr)
    return verdict or "unreadable"


ungraded = []  # (gold, answer) of every comparison without a verdict, for whoever wants to log it
workers, worker_lock = [], threading.Lock()  # at most one worker, asked by one thread at a time


def start_worker():
    """Start the process that compares LaTeX and wait until it is ready, about 0.4 s.

    The process ends when its input closes, and so whenever the process that started it ends.
    """
    worker = subprocess.Popen([sys.executable, __file__, "--worker"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              start_new_session=True)  # Ctrl-C is the caller's to handle
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError("math-verify, which compares LaTeX answers, did not start; its error is "
                           "above (installed? python -m pip install math-verify)")
    workers[:] = [worker]


def serve():
    """Be the process behind `compare_latex`: read lines of JSON, write verdicts.

    The system ends the process (SIGPROF) when a comparison exceeds LATEX_LIMIT_S of CPU time.
    math-verify's own limit is an alarm signal: it replaces the caller's handler, fails outside the
    main thread and cannot interrupt one long operation on large integers.
    """
    from math_verify import LatexExtractionConfig, parse, verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limit is off

    def compare(gold, answer):
        # LatexExtractionConfig alone: the default also asks sympy's parser, which evaluates.
        parsed = [parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback",
                        parsing_timeout=None, raise_on_error=True) for latex in (gold, answer)]
        if not all(parsed):
            return "unreadable"
        same = verify(*parsed, float_rounding=EXACT_DIGITS, numeric_precision=EXACT_DIGITS,
                      timeout_seconds=None, raise_on_error=True)
        return "same" if same else "different"

    assert compare(r"\frac{1}{2}", "0.5") == "same", "math-verify does not know 1/2 = 0.5"
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, LATEX_LIMIT_S)
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--worker"]:
            serve()
        elif len(sys.argv) == 3:
            print(compare_latex(*sys.argv[1:]))
        else:
            sys.exit("usage: python -m plumbing.latex GOLD ANSWER")
    except KeyboardInterrupt:
        sys.exit(130)
