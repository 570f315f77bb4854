"""Whether two LaTeX formulas say the same: math-verify, in a process of its own.

What it does    unwraps formulas and compares them. The system ends the process when a comparison
                takes too long, because sympy can be kept busy for hours; its caller starts the next
                one.
Not here        where in a completion the formula stands: rewards.py.
Run it alone    python -m plumbing.latex GOLD ANSWER     same, different or unreadable

This file runs as a script, too, for the process: it imports nothing of the project.
"""
import functools
import json
import logging
import re
import signal
import subprocess
import sys
import threading

LONGEST_BOXED = 1000  # characters of \boxed{…}, chosen; what is longer is no answer
LONGEST_LATEX = 400  # characters of a LaTeX answer, chosen; MATH-500's longest gold has 53
LATEX_LIMIT_S = 0.6  # of CPU time for one comparison, chosen: with the start of a new process
# behind it (0.4 s) it stays within a second; MATH-500's slowest needs 0.15. It is CPU time, so that
# a busy machine turns no right answer into a wrong one. What takes longer counts as wrong.
BOXED = r"\boxed{"
# Seconds to years of work for sympy: a factorial, an exponent in an exponent, a long exponent.
COSTLY = re.compile(r"(?<!\\)!|\^\s*(?:\{[^}]*|\([^)]*|\w+\s*)\^|\^[\s{(-]*[0-9]{5}")


def braced(text, start):
    """The text from `start` to the brace that closes the first brace there; "" if none does."""
    depth = 0
    for i in range(start, min(len(text), start + LONGEST_BOXED)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth <= 0:
            return text[start:i + 1]
    return ""


def bare(latex):
    """LaTeX without the dollars, \\boxed{} and full stop around it."""
    latex = latex.replace(r"\$", "").replace("$", "").lstrip(" \n*").rstrip(" \n*.")
    if latex[:2] + latex[-2:] in (r"\(\)", r"\[\]"):
        latex = latex[2:-2].strip()
    if latex.startswith(BOXED) and braced(latex, 0) == latex:
        latex = latex[len(BOXED):-1].strip()
    return latex


@functools.lru_cache(maxsize=4096)
def compare_latex(gold, answer):
    """"same", "different", or "unreadable" where the answer is no LaTeX or is refused."""
    if " ".join(gold.split()) == " ".join(answer.split()):
        return "same"
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
        same = verify(*parsed, timeout_seconds=None, raise_on_error=True)
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
