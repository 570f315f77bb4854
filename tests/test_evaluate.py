"""evaluate.py: statistics, style, tables, going on after a kill, comparison, others' models."""
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
from evaluation import answers, intervals
from evaluation.answers import AnswerFile
from evaluation.settings import setting_of
from evaluation.style import after_answer, style
from evaluation.summaries import compare, full_summary, majority, seed_summaries, summarise
from evaluation.tables import main_score
from model import Qwen2
from plumbing import checkpoint
from rewards import Problem, build_prompt, load_problems

ROOT = Path(evaluate.__file__).resolve().parent


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------ statistics

def test_pass_at_k_by_hand_and_by_counting():
    # 4 samples, 1 correct, 2 drawn: of the 6 pairs 3 hold it
    assert intervals.pass_at_k(4, 1, 2) == 0.5
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
                expected = sum(any(draw) for draw in draws) / len(draws)
                assert intervals.pass_at_k(n, c, k) == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected 0 ≤ c ≤ n"):
        intervals.pass_at_k(4, 5, 1)


def test_wilson_solves_its_equation():
    # its ends are the p at which c/n lies 1.96 standard errors of that p away
    for c, n in [(0, 10), (5, 10), (1, 3), (184, 200), (200, 200)]:
        for p, side in zip(intervals.wilson(c, n), (1, -1)):
            error = math.sqrt(p * (1 - p) / n)
            assert c / n - p == pytest.approx(side * 1.959964 * error, abs=1e-6)
    assert intervals.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)  # z² / (n + z²)


def test_the_bootstrap_of_zeros_and_ones_has_the_binomials_quantiles():
    n, p = 100, 0.3
    low, high = intervals.bootstrap([1.0] * 30 + [0.0] * 70)
    cdf = list(itertools.accumulate(math.comb(n, k) * p**k * (1 - p)**(n - k)
                                    for k in range(n + 1)))
    expected = [next(k for k, c in enumerate(cdf) if c >= q) / n for q in (0.025, 0.975)]
    assert (low, high) == pytest.approx(expected, abs=0.0101)
    assert intervals.bootstrap([0.5] * 9) == (0.5, 0.5)


def test_mcnemar_by_hand():
    for only, p in {(0, 5): 2 / 32, (5, 0): 2 / 32, (1, 9): 2 * 11 / 1024, (3, 3): 1, (0, 0): 1,
                    (2, 3): 1}.items():
        assert intervals.mcnemar(*only) == p


def test_students_t_and_the_intervals_over_seeds():
    for df, t in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 100: 1.984}.items():
        assert intervals.t_quantile(df) == pytest.approx(t, abs=2e-3)
    mean, (low, high) = intervals.over_seeds([1.0, 2.0, 3.0])  # s = 1
    assert (mean, low, high) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    difference, (low, high) = intervals.welch([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])  # s² 1 each: df 4
    assert (difference, low, high) == pytest.approx(
        (2, 2 - 2.776 * (2 / 3)**0.5, 2 + 2.776 * (2 / 3)**0.5), abs=2e-3)


def test_sign_flips_agree_with_mcnemar_and_with_counting_all_signs():
    assert intervals.sign_flips([1, 1, 1, 1, 0, 0, 0]) == intervals.mcnemar(0, 4) == 0.125
    few = [0.5, -0.25, 1.0, 0.25, 0.5, 0.75]
    for d, rounding in (few, 0), (few + few + [0.5], 0.005):  # more than 12: 10,000 draws
        sums = [abs(sum(s * x for s, x in zip(signs, d)))
                for signs in itertools.product((1, -1), repeat=len(d))]
        exact = sum(x >= sum(d) for x in sums) / 2**len(d)
        assert 0 < exact < 0.2 and intervals.sign_flips(d) == pytest.approx(exact, abs=rounding)
    assert intervals.sign_flips([0.25]) == 1
    assert intervals.sign_flips([0.0, 0.0]) == 1


def answers_of(outcomes):
    return [{"problem": str(i), "sample": 0, "flexible": bool(x), "strict": bool(x)}
            for i, x in enumerate(outcomes)]


def test_simulated_pairs_are_called_different_as_often_as_an_interval_promises():
    # A solves 55 of 100; B draws its luck anew in half of the problems, else has A's
    generator = torch.Generator().manual_seed(1)
    called = {}
    for p_b, keep in ((0.55, 0.5), (0.65, 0.6)):
        called[p_b], correlation = 0, []
        for _ in range(200):
            luck = torch.rand(2, 500, generator=generator)
            kept = torch.rand(500, generator=generator) < keep
            a, b = luck[0] < 0.55, torch.where(kept, luck[0], luck[1]) < p_b
            correlation.append(torch.corrcoef(torch.stack([a, b]).float())[0, 1].item())
            result = compare([answers_of(a)], [answers_of(b)], "flexible")
            called[p_b] += result["verdict"] != "no difference shown"
        assert sum(correlation) / 200 == pytest.approx(0.5, abs=0.03)
    assert 4 <= called[0.55] <= 17 and called[0.65] > 190, called


# ------------------------------------------------------------------ summaries and comparison

def row(problem, flexible, **others):
    return {"problem": problem, "strict": False, "flexible": flexible, "format": True,
            "finished": True, "n_tokens": 10, **others}


def test_the_summary_by_hand():
    # two problems, two samples: one of two right, none right
    rows = [row("a", True), row("a", False, n_tokens=20), row("b", False, finished=False),
            row("b", False, format=False)]
    found = summarise(rows, 2)
    assert found == {"n_problems": 2, "samples": 2, "strict": 0.0, "flexible": 0.25,
                     "format": 0.75, "truncated": 0.25, "pass@1": 0.25,
                     "pass@2": 0.5}


def test_the_majority_is_the_most_frequent_answer_the_first_of_equals():
    def votes(*answers):
        return [row("a", a == "5", answer=a) for a in answers]
    assert majority(votes("5", "7", "5", "7", "5")) and majority(votes("5", "7"))
    assert not majority(votes("7", "5"))
    assert not majority(votes("5", "7", "7")) and not majority(votes(None, None))
    halves = [row("a", True, answer=x) for x in ("1/2", "0.5", "50%")]
    assert majority([*votes("3", "3"), *halves])  # right answers count as one
    assert majority(votes(None, None, "5"))  # no answer is no vote


def test_a_comparison_by_hand():
    a = answers_of([1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    b = answers_of([1, 1, 0, 1, 1, 1, 1, 1, 1, 0])  # solves six more
    found = compare([a], [b], "flexible")
    assert (found["a"], found["b"]) == (0.2, 0.8) and found["p"] == 2 / 64
    assert found["difference"] == pytest.approx(0.6) and found["verdict"] == "B higher"
    few = compare([a], [answers_of([1] * 6 + [0] * 4)], "flexible")
    assert few["interval"][0] > 0 and few["p"] == 0.125  # four of four differ: not enough
    assert few["verdict"] == "no difference shown"
    back = compare([b], [a], "flexible")
    assert back["verdict"] == "B lower" and back["interval"][1] == -found["interval"][0]
    assert compare([a], [a], "flexible")["verdict"] == "no difference shown"
    with pytest.raises(ValueError):  # other problems
        compare([a], [b[:9]], "flexible")


def test_runs_with_several_seeds_count_once_each():
    a, b = ([answers_of([1] * n + [0] * (10 - n)) for n in counts]
            for counts in ((1, 2, 3), (3, 4, 5)))
    found = compare(a, b, "flexible")
    assert found["interval"] == intervals.welch([0.1, 0.2, 0.3], [0.3, 0.4, 0.5])[1]
    assert found["p"] is None
    same = compare([a[0], a[0]], [b[0], b[0]], "flexible")  # no spread, no interval
    assert same["interval"] is None and same["verdict"] == "no difference shown"
    names = ["runs/tiny-pspo-s0/best", "runs/tiny-pspo-s12/best", "runs/tiny-clip-s0/best",
             "Qwen/Qwen2.5-0.5B", "runs/a-seed3"]
    assert [setting_of(name) for name in names] == [
        "runs/tiny-pspo-s*/best", "runs/tiny-pspo-s*/best", "runs/tiny-clip-s*/best",
        "Qwen/Qwen2.5-0.5B", "runs/a-seed*"]
    summaries = [{"model": f"r-s{i}", "data": "d", "temperature": 0.0, "strict": x, "flexible": x}
                 for i, x in enumerate([0.5, 0.7])] + [
        {"model": "other", "data": "d", "temperature": 0.0, "strict": 1.0, "flexible": 1.0}]
    (group,) = seed_summaries(summaries)
    assert group["model"] == "r-s*" and group["runs"] == 2 and group["flexible"] == 0.6
    assert group["flexible_interval"] == (0, 1)  # ± 12.7 standard errors, cut to what can be


# ------------------------------------------------------------------ style

@pytest.mark.parametrize("text, true, all_of_them", [
    ("3*4=12\n12+5=17\n#### 17", 2, 2), ("3 * 4 = 13", 0, 1), ("5 - 7 = -2", 1, 1),
    ("1,200 / 4 = $300.", 1, 1), ("10 / 3 = 3.33", 1, 1), ("10/3 = 3.3333", 1, 1),
    ("10 / 3 = 3.34", 0, 1), ("7 / 0 = 0", 0, 1), ("2 x 3 = 6 × 1", 0, 0),
    ("2 + 3 * 4 = 14", 0, 0),  # 3 * 4 = 14 is not what is said
    ("3 * 4 = 10 + 2", 0, 0), ("- 3 * 4 = 12", 1, 1), ("<<3*4=12>>12", 1, 1), ("x = 4", 0, 0),
    ("0.1 + 0.2 = 0.3", 1, 1), ("1−2=−1", 0, 0), ("(1+2)*3=9", 0, 0), ("3*4=12=12", 1, 1)])
def test_statements_of_arithmetic(text, true, all_of_them):
    found = style(text)
    assert (found["true_statements"], found["statements"]) == (true, all_of_them)


@pytest.mark.parametrize("text, leaks", [
    ("3*4=12\n#### 12", False), ("solve the problem step by step, and show it", True),
    ("Solve the problem step by hand", False), ("#### 12\nuser\nMia has 3", True),
    ("#### 12<|user|>", True), ("#### 12\nHow many are left?", True), ("Question: how", True),
    ("How many? 3*4", False), ("The question: none", False)])
def test_leakage(text, leaks):
    assert style(text)["leakage"] is leaks


def test_the_other_measures_of_style_by_hand():
    # abcd bcda cdab dabc abcd
    assert style("a b c d a b c d")["repeated"] == pytest.approx(1 / 5)
    assert style("a b c")["repeated"] == 0 and style("")["non_ascii"] == 0
    assert style("ab éè 12 ±")["non_ascii"] == 0.5
    assert after_answer("1\n#### 2\nmore") == "more"
    assert after_answer("#### 2") == after_answer("2\n") == ""


@pytest.mark.parametrize("text", ["1+" * 10**5, "1,111," * 10**5, "user\n" * 10**5, "<|a" * 10**5,
                                  "1 = " * 10**5, "9" * 10**6])
def test_style_is_quick_on_hostile_text(text):
    began = time.process_time()
    style(text)
    assert time.process_time() - began < 2


# ------------------------------------------------------------------ whole evaluations

SMALL = ["--data", "tiny", "--device", "cpu", "--limit", "6"]


def table_of(path):
    return Path(path, "results.md").read_text()


def test_one_table_for_two_models_and_everything_is_written(capsys):
    Qwen2.from_pretrained("tiny").save_pretrained("copy")
    evaluate.main(["tiny", "copy", *SMALL, "--temperature", "0", "0.8", "--samples", "4"])
    written = json.loads(Path("evaluations/results.json").read_text())
    results = written["results"]
    assert [(r["model"], r["temperature"], r["samples"]) for r in results] == [
        ("tiny", 0.0, 1), ("tiny", 0.8, 4), ("copy", 0.0, 1), ("copy", 0.8, 4)]
    numbers = [{k: v for k, v in r.items() if k != "model"} for r in results]
    assert numbers[:2] == numbers[2:]  # the same weights give the same answers
    assert results[1]["pass@1"] == pytest.approx(results[1]["flexible"])
    low, high = results[0]["flexible_interval"]
    assert low <= results[0]["flexible"] <= high
    files = sorted(Path("evaluations/answers").glob("*.jsonl"))
    assert sum(len(file.read_text().splitlines()) for file in files) == 4 + 2 * (6 + 24)
    text = table_of("evaluations")
    assert text in capsys.readouterr().out
    first = text.splitlines()[2]
    assert first.split()[1::2] == ["model", "data", "T", "n", "samples", "strict", "flexible",
                                   "paper", "format", "cut", "majority", "pass@2", "pass@4"]
    assert len({len(line) for line in text.splitlines()[2:8]}) == 1  # aligned
    assert Path("evaluations/accuracy.png").stat().st_size > 5000


def test_what_is_finished_is_not_repeated_and_what_changed_is(monkeypatch):
    Qwen2.from_pretrained("tiny").save_pretrained("copy")
    evaluate.main(["copy", *SMALL])
    first, calls = table_of("evaluations"), []
    sample = evaluate.sample_answers
    monkeypatch.setattr(evaluate, "sample_answers",
                        lambda *a, **k: calls.append(a) or sample(*a, **k))
    evaluate.main(["copy", *SMALL])
    assert not calls and table_of("evaluations") == first
    evaluate.main(["copy", "tiny", *SMALL])  # another model beside it
    assert len(calls) == 1
    model = Qwen2.from_pretrained("copy")
    with torch.no_grad():
        model.model["norm"].weight.mul_(0.5)
    model.save_pretrained("copy")  # other weights under the same name
    evaluate.main(["copy", *SMALL])
    assert len(calls) == 2
    evaluate.main(["copy", *SMALL, "--max-new-tokens", "9"])
    assert len(calls) == 3


def test_a_file_of_answers_cut_anywhere_gives_its_whole_chunks():
    settings = {"samples": 1, "problems_per_chunk": 3}
    rows = [{"problem": f"p/{i}", "sample": 0, "text": "", "n_tokens": 1, "tokens_after": 0,
             "finished": True} for i in range(7)]
    problems = [Problem(f"p/{i}", "?", "1", "number") for i in range(7)]
    lines = [json.dumps(line).encode() + b"\n" for line in [settings, *rows]]
    ends = [len(b"".join(lines[:n + 1])) for n in range(8)]
    path = Path("answers.jsonl")
    for cut in range(ends[-1] + 1):
        path.write_bytes(b"".join(lines)[:cut])
        n_lines = sum(end <= cut for end in ends) - 1  # whole rows
        n = 7 if n_lines == 7 else max(n_lines, 0) // 3 * 3  # chunks of three
        found = AnswerFile(path, settings, problems).read()
        assert found == (rows[:n], ends[n] if n else 0)
    with pytest.raises(OSError, match="under other settings"):
        AnswerFile(path, {**settings, "samples": 2}, problems).read()
    for damage in (b"gar\xffbage\n", b"[]\n", b'{"problem": "p/9", "sample": 0}\n',
                   b'{"problem": "p/4", "sample": 0}\n', lines[5].replace(b'""', b"null")):
        path.write_bytes(b"".join(lines[:5]) + damage + b"".join(lines[6:]))
        assert AnswerFile(path, settings, problems).read() == (rows[:3], ends[3])
    assert AnswerFile(Path("none"), settings, problems).read() == ([], 0)


def test_two_evaluations_do_not_write_one_file():
    settings = {"samples": 1, "problems_per_chunk": 1}
    with open("answers.jsonl", "ab") as other:
        checkpoint.fcntl.flock(other, checkpoint.fcntl.LOCK_EX)
        with pytest.raises(OSError, match="is being written by another evaluation"):
            AnswerFile(Path("answers.jsonl"), settings, load_problems("tiny")[:2]).complete(None)


def test_a_damaged_file_of_answers_is_kept_and_said(capsys):
    flags = ["tiny", "--data", "tiny", "--device", "cpu", "--limit", "9", "--rollout-rows", "1",
             "--max-new-tokens", "8"]
    evaluate.main(flags)
    (path,) = Path("evaluations/answers").iterdir()
    whole, expected = path.read_bytes(), table_of("evaluations")
    damaged = whole.replace(b'"tiny/test/1"', b'"tiny/test/x"')
    path.write_bytes(damaged)
    evaluate.main(flags)
    assert "is damaged in answer 1 or soon after it; 9 answers are sampled again" in \
        capsys.readouterr().err
    assert Path(f"{path}.damaged").read_bytes() == damaged
    assert path.read_bytes() == whole and table_of("evaluations") == expected


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 10])
def test_killed_at_random_moments_it_ends_with_the_same_table(n):
    command = [sys.executable, str(ROOT / "evaluate.py"), "tiny", "--data", "tiny", "--limit", "60",
               "--temperature", "0.7", "1", "--samples", "4", "--rollout-rows", "4", "--out"]
    whole = subprocess.run([*command, "whole"], capture_output=True, text=True, timeout=600)
    assert whole.returncode == 0, whole.stderr
    size = sum(p.stat().st_size for p in Path("whole/answers").iterdir())
    draw = random.Random(0)
    moments = sorted(draw.uniform(0, size) for _ in range(n))
    kills = 0
    for moment in moments:  # so many bytes, and then somewhere within the next chunk
        process = subprocess.Popen([*command, "cut"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if sum(p.stat().st_size for p in Path("cut").glob("answers/*")) >= moment:
                time.sleep(draw.uniform(0, 0.1))
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.003)
    assert kills >= 0.6 * n  # the last ones may come after its end
    last = subprocess.run([*command, "cut"], capture_output=True, text=True, timeout=600)
    assert last.returncode == 0, last.stderr
    assert table_of("cut") == table_of("whole")
    for path in Path("whole/answers").iterdir():
        assert Path("cut/answers", path.name).read_bytes() == path.read_bytes()


def test_compare_says_what_is_shown_and_what_is_not(capsys):
    model = Qwen2.from_pretrained("tiny")
    model.save_pretrained("same")
    with torch.no_grad():
        model.model["norm"].weight.mul_(0.02)  # next to random letters
    model.save_pretrained("broken")
    evaluate.main(["--compare", "tiny", "same", *SMALL])
    assert "tiny, T 0: no difference shown: flexible" in capsys.readouterr().out
    flags = ["--data", "tiny", "--limit", "60", "--temperature", "1"]
    evaluate.main(["--compare", "tiny", "broken", *flags])
    assert "tiny, T 1: B lower: flexible" in capsys.readouterr().out
    comparison = json.loads(Path("evaluations/results.json").read_text())["comparison"]
    assert {"flexible", "format", "tokens", "leakage"} <= {c["measure"] for c in comparison}
    for name in ("same-s0", "same-s1", "same-s2", "broken-s0", "broken-s1"):
        Path(name).symlink_to(name[:-3])
    evaluate.main(["--compare", "same-s*", "broken-s*", *flags])
    shown = capsys.readouterr().out
    assert "Over seeds, each run one value" in shown and "| same-s* " in shown
    for wrong, message in (
            (["tiny", "same-s*"], "A is 1 run.s. and B 3; give one run each or several"),
            (["same-s*", "*-s?"], "same-s0, same-s1, same-s2 is on both"),
            # an unquoted pattern, as the shell hands it over
            (["same-s0", "same-s1", "same-s2"], "are runs of one setting; quote patterns")):
        with pytest.raises(SystemExit, match=message):
            evaluate.main([*wrong[2:], "--compare", *wrong[:2], *flags])


def test_batches_change_no_answer():
    model, problems = Qwen2.from_pretrained("tiny"), load_problems("tiny")[:12]
    for temperature in (0.0, 1.0):
        rows = [evaluate.answer_problems(model, problems, 3, temperature, max_rows=n, progress=None)
                for n in (3, 256)]
        assert rows[0] == rows[1]


def test_a_folder_that_transformers_saved_answers_as_transformers_generate():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    network = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model")
    for name, p in network.named_parameters():  # trained elsewhere
        if "mlp" in name:
            p.data *= 1.1
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    network.save_pretrained("theirs")
    tokenizer.save_pretrained("theirs")
    evaluate.main(["theirs", *SMALL, "--limit", "20", "--max-new-tokens", "60"])
    (path,) = Path("evaluations/answers").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert len({row["text"] for row in rows}) > 5
    for problem, row in zip(load_problems("tiny"), rows):
        ids = torch.tensor([build_prompt(tokenizer, problem)])
        out = network.generate(ids, do_sample=False, max_new_tokens=60, pad_token_id=0)
        theirs = out[0, ids.shape[1]:].tolist()
        assert row["text"] == tokenizer.decode(theirs, skip_special_tokens=True)
        assert row["n_tokens"] == len(theirs)


def raw(problem, text):
    return {"problem": problem.id, "sample": 0, "text": text, "finished": True, "n_tokens": 9,
            "tokens_after": 0}


def test_a_set_with_some_latex_answers_gets_the_math_score_everywhere():
    problems = [Problem("m/0", "?", r"\frac{14}{3}", "latex"), Problem("m/1", "?", "18", "number")]
    texts = [r"so \boxed{\dfrac{14}{3}}", r"\boxed{18} in step 2"]
    rows = evaluate.grade_fully([raw(p, text) for p, text in zip(problems, texts)], problems)
    assert [row["math"] for row in rows] == [True, True]
    assert [row["flexible"] for row in rows] == [True, True]
    assert [row["paper"] for row in rows] == [True, False]  # it takes 3 for 14/3, and 2 for 18
    assert main_score(rows) == "math"
    assert full_summary(rows, 1)["math"] == 1.0
    rows = evaluate.grade_fully([raw(problems[1], texts[1])], problems[1:])
    assert "math" not in rows[0] and "math" not in full_summary(rows, 1)


def test_rows_in_flight_follow_memory(monkeypatch):
    tiny = ROOT / "tiny" / "model"
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 10**10}
    monkeypatch.setattr(answers.os, "sysconf", pages.get)
    assert answers.rows_that_fit(tiny, "cpu", "fp32", 100) == 256
    # a row: 768 tokens · 2 · 3 layers · 2 heads · 32 · 4 bytes, and 16 bytes for each of 259 logits
    row, weights = 768 * 2 * 3 * 2 * 32 * 4 + 16 * 259, (tiny / "model.safetensors").stat().st_size
    pages["SC_PHYS_PAGES"] = (3 * weights + 9 * row) / 0.8
    assert answers.rows_that_fit(tiny, "cpu", "fp32", 100) == 8
    pages["SC_PHYS_PAGES"] = 1
    assert answers.rows_that_fit(tiny, "cpu", "fp32", 100) == 1


def test_what_leaves_no_room_or_exists_is_refused(capsys):
    with pytest.raises(SystemExit, match="longest prompt has .* tokens; the model's context"):
        Path("long.jsonl").write_text(json.dumps({"question": "x" * 300, "answer": "1"}))
        evaluate.main(["tiny", "--data", "long.jsonl", "--out", "a"])
    Path("exists").mkdir()
    Path("exists", "thesis.tex").touch()
    for flags, message in ((["tiny", "--out", "exists"], "exists and holds no evaluation"),
                           (["tiny", "--temperature", "-1"], "--temperature is -1.0; expected 0"),
                           (["tiny", "--samples", "0"], "--samples is 0; expected 1 or more"),
                           (["tiny", "--sample", "3"], "unrecognized arguments"),
                           (["tiny", "--seed", str(2**63)], "expected 0 to 2"),
                           (["tiny", "--judge-body", "[1]"], "expected a JSON object"),
                           (["tiny", "--judge-name", "x"], "--judge-name goes with --judge"),
                           (["tiny", "--judge", "http://127.0.0.1:9/v1"],
                            "name the model there with --judge-name"),
                           ([], "name one or more models")):
        with pytest.raises(SystemExit):
            evaluate.main([*flags, "--data", "tiny"])
        assert message in capsys.readouterr().err
    for name, message in (("no/such/model", "neither a model folder here nor"),
                          ("runs/none-s*", "no folder matches this pattern")):
        with pytest.raises(SystemExit, match=message):
            evaluate.main([name, "--data", "tiny", "--out", "b"])


# ------------------------------------------------------------------ the four sets, by their names

@pytest.mark.slow
def test_all_four_sets_are_evaluated_by_their_names(hub, tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), "Qwen/Qwen2.5-0.5B", "--data", "gsm8k",
               "svamp", "asdiv", "math500", "--limit", "2", "--max-new-tokens", "6", "--device",
               "cpu"]
    done = subprocess.run(command, env=hub, cwd=tmp_path, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluations/results.json").read_text())
    assert [(r["data"], r["n_problems"], "math" in r) for r in found["results"]] == [
        ("gsm8k", 2, False), ("svamp", 2, False), ("asdiv", 2, False), ("math500", 2, True)]
    assert {data: len(rows) for data, rows in found["dropped"].items()} == {"asdiv": 122}
    assert "Mrs. Hilt" in [gold for _, gold in found["dropped"]["asdiv"]]
    assert "left out 122 of 2215 problems" in done.stderr


REWRITE = r"""
import json, re
from decimal import Decimal
import rewards
from plumbing import number
from plumbing.problems import read_problems
problems, _ = read_problems("math500")
def rewritten(gold):
    yield gold.replace(r"\frac", r"\dfrac")
    yield re.sub(r"(?<![\^_{\\a-zA-Z])([-+=,])(?!\d{3})", r" \1 ", gold)
    if r"\left" in gold:
        yield gold.replace(r"\left", "").replace(r"\right", "")
    else:
        yield gold.replace("(", r"\left( ").replace(")", r" \right)")
    if number.gold_number(gold):
        yield gold + r" \text{ cm}"
wrong, collapsed = [], 0
for p in problems:
    if not all(rewards.is_correct(rf"so \boxed{{{x}}}", p.gold, "math")
               for x in rewritten(p.gold)):
        wrong.append(p.gold)
    collapsed += p.kind == "latex" and rewards.is_correct(
        "#### " + str(number.paper_number("#### " + p.gold)), p.gold, "paper")
print(json.dumps([len(problems), wrong, collapsed]))
"""


def test_harmless_rewriting_of_math_answers_changes_no_verdict(hub):
    done = subprocess.run([sys.executable, "-c", REWRITE], env=hub, cwd=ROOT, capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    n, wrong, collapsed = json.loads(done.stdout.splitlines()[-1])
    print(f"{n} problems, verdict changed for {wrong}; {collapsed} LaTeX golds collapse (paper)")
    assert n == 500 and len(wrong) <= 5
    # \frac{14}{3} is 3 for the authors' scorer: a bare number is then right
    assert 165 <= collapsed <= 177
