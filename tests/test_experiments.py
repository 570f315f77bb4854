"""experiments/: every cell parses, a run leaves its row, tables and figures say what rows say."""
import itertools
import json
import math
import os
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import objectives
import train
from experiments import __main__ as entry
from experiments import cells, report
from experiments import replay as replays
from experiments import run as runs
from experiments.replay import (
    distance,
    equal_run,
    first_difference,
    live,
    replay,
    settings_of,
    trained,
)
from model import Qwen2
from plumbing import problems
from plumbing.files import read_rows
from plumbing.settings import read_settings

SMALL = ("--steps 2 --validate-every 2 --prompts-per-step 4 --group-size 4 --minibatches 2 "
         "--validation-problems 4")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ cells

def settings_of_cell(flags):
    special, rest = runs.special_flags().parse_known_args(flags.split())
    return special, read_settings([*cells.BASE.split(), *rest])[0]


def test_every_cell_is_a_run_that_train_would_make():
    seen = set()
    for name, experiment in cells.EXPERIMENTS.items():
        for label, flags in experiment.items():
            special, s = settings_of_cell(flags.removeprefix("--replay").removeprefix("--live"))
            assert s.threads == 1 and s.steps in (100, 200, 20, 1), (name, label)
            seen |= {key for key, value in vars(special).items() if value}
    assert seen == {"stale", "noise", "where", "unclipped", "hopeless"}
    stress = cells.EXPERIMENTS["stress"]
    assert len(set(stress.values())) == len(stress) == len(cells.ARMS)
    assert report.AGAINST.keys() <= cells.EXPERIMENTS.keys()
    assert cells.EXPERIMENTS.keys() <= report.TABLES.keys() | report.OWN_TABLES.keys()


def test_every_arm_of_an_experiment_makes_as_many_optimizer_steps():
    for name in ("mild", "stress", "alpha", "stale", "token", "noise"):
        counts = set()
        for flags in cells.EXPERIMENTS[name].values():
            _, s = settings_of_cell(flags)
            counts.add(s.steps * s.epochs * s.minibatches)
        assert len(counts) == 1, (name, counts)


def test_noise_of_that_size_moves_as_many_ratios_as_bf16_did_at_the_width_of_qwen():
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) * cells.NOISE
    assert ((x.exp() - 1).abs() > 0.1).double().mean().item() == pytest.approx(0.24, abs=0.005)


def test_log_pspo_is_bounded_where_pspo_is_not_and_nowhere_zero():
    log_ratio = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e6], dtype=torch.float64).log()
    for alpha in (0.1, 0.5):
        for sign in (1.0, -1.0):
            weight = objectives.gradient_weight(partial(cells.log_pspo, alpha=alpha),
                                                log_ratio.exp().tolist(), sign)
            ratio = log_ratio.exp()
            torch.testing.assert_close(weight, (1 - alpha) * ratio / ((1 - alpha) * ratio + alpha))
            assert (0 < weight).all() and (weight < 1).all()
        # at r = 1, where all objectives meet, it is PSPO's 1 − α
        assert weight[2].item() == pytest.approx(1 - alpha)
    # α = 0.1, r = 10: log 9.1
    ten, one = torch.tensor(10.0), torch.tensor(1.0)
    assert cells.log_pspo(ten, one).item() == pytest.approx(math.log(9.1))


# ------------------------------------------------------------------ runs

def test_a_run_leaves_its_row_and_no_folder():
    row, again, other = (runs.run_cell((SMALL, seed)) for seed in (3, 3, 0))
    assert row["kl_old_new"] != other["kl_old_new"]
    assert row | {"cpu_seconds": 0} == again | {"cpu_seconds": 0}  # CPU: bit for bit
    assert row["flags"] == SMALL and row["seed"] == 3 and row["failed"] is None
    assert 0 <= row["test_strict"] <= 1 and row["optimizer_steps"] == 8 and row["kl_old_new"] > 0
    assert row["on_the_way"] == {}  # of 2 steps no fifth
    assert [step for step, _ in row["validation"]] == [0, 2]
    assert os.listdir() == [] and json.loads(json.dumps(row)) == row


def test_a_row_is_of_the_last_weights_on_the_test_problems_and_of_its_parts_of_the_run(monkeypatch):
    monkeypatch.setattr(runs, "LAST", 1)
    monkeypatch.setattr(runs, "FIFTH", 2)
    worse, seen = iter(range(100)), {}  # each validation is worse: best/ is the start model

    def answer(model, problems, **_):
        seen.update(weights=model.state_dict(), problems=problems,
                    steps=read_rows(Path("runs/run/metrics.jsonl"))[1:],
                    last=Qwen2.from_pretrained("runs/run/checkpoints/step_2").state_dict(),
                    best=Qwen2.from_pretrained("runs/run/best").state_dict())
        return [{"strict": i % 4 == 0, "flexible": i % 2 == 0, "format": True, "finished": True,
                 "text": "#### 5"}
                for i in range(len(problems))]
    monkeypatch.setattr(runs, "answer_problems", answer)
    monkeypatch.setattr(train, "validate", lambda run, s: {
        "validation_reward": -next(worse), "validation_accuracy": 0.5})
    row = runs.run_cell((SMALL, 0))
    name = "model.embed_tokens.weight"
    assert seen["weights"][name].equal(seen["last"][name])
    assert not seen["weights"][name].equal(seen["best"][name])
    assert [problem.id for problem in seen["problems"]] == [f"tiny/test/{i}" for i in range(200)]
    assert (row["test_strict"], row["test_flexible"], row["test_leakage"]) == (0.25, 0.5, 0.0)
    assert (row["dtype"], row["device"]) == ("fp32", "cpu")
    first, second = seen["steps"]
    assert row["kl_old_new"] == second["kl_old_new"] != first["kl_old_new"]
    assert row["on_the_way"]["kl_old_new"] == first["kl_old_new"]


def test_a_run_that_fails_leaves_a_row_that_says_so_and_no_score():
    # a step of 1e20 leaves no number whole, so that a later step stops
    row = runs.run_cell((SMALL.replace("--steps 2", "--steps 4") + " --learning-rate 1e20", 0))
    assert "gradient norm" in row["failed"] and "test_strict" not in row
    rows = [{**row, "flags": cells.EXPERIMENTS["stress"]["sapo"]}]
    assert "| sapo | 1, 1 failed | – | – |" in report.table(rows, "stress")


def test_another_end_of_a_run_is_not_a_row():
    with pytest.raises(SystemExit):
        runs.run_cell((SMALL + " --model nowhere", 0))


def test_stale_rollouts_are_those_of_the_model_so_many_steps_ago(monkeypatch):
    seen = []

    def sample(run, s, step, chosen):
        seen.append((step, run.step, chosen))
        return step
    monkeypatch.setattr(train, "sample", sample)
    s = SimpleNamespace(prompts_per_step=2, seed=0)
    run = SimpleNamespace(problems=range(100), step=0)
    stale = runs.stale(3)
    trained_on = []
    for step in range(1, 6):  # a step trains and the model has then made it
        trained_on.append(stale(run, s, step, None))
        run.step = step
    assert trained_on == [1, 2, 3, 4, 5]
    # rollouts 1 to 4 are of the start model, 5 of the model after step 1, and so on
    assert [(n, model) for n, model, _ in seen] == [
        (1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 2), (7, 3), (8, 4)]
    assert [chosen for *_, chosen in seen] == [problems.prompt_order(100, 2, n, 0)
                                               for n in range(1, 9)]


def test_where_a_clip_takes_its_share_from():
    total = runs.Counter()
    ratio = torch.tensor([1.5, 1.5, 1.0, 0.5, 0.5, 2.0])  # two tokens, one, two and one
    advantage = torch.tensor([1.0, 1.0, 2.0, -1.0, -1.0, 1.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    sequence = torch.tensor([0, 0, 1, 2, 2, 5])
    arguments = (ratio.log(), torch.zeros(6), advantage, weight, sequence, objectives.noclip)
    loss, log_ratio = runs.where_clipped(total)(*arguments)
    assert loss == objectives.policy_loss(*arguments)[0] and log_ratio.equal(ratio.log())
    # Σ w·|A|·r of tokens 0, 2 and 5: 1.5 + 2 + 1, the clip takes 0 and 5; of 1, 3, 4: all of it
    assert total == pytest.approx({"gradient_first": 4.5, "removed_first": 2.5,
                                   "gradient_others": 2.5, "removed_others": 2.5})


def test_a_clip_on_some_tokens_only():
    logp = torch.tensor([1.5, 1.5, 1.5, 0.5, 0.5]).log().requires_grad_()  # all past a clip at 0.2
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])  # two answers: three tokens, and two
    rest = (torch.zeros(5), advantage, torch.ones(5), torch.tensor([7, 7, 7, 2, 2]),
            objectives.clip)
    for unclipped, weights in (("first", [1.5, 0, 0, 0, 0]), ("others", [0, 1.5, 1.5, -.5, -.5]),
                               ("every-first", [1.5, 0, 0, -.5, 0]),
                               ("every-later", [0, 1.5, 1.5, 0, -.5])):
        loss, _ = runs.partly_clipped(unclipped)(logp, *rest)
        (gradient,) = torch.autograd.grad(-loss, logp)
        assert gradient.tolist() == pytest.approx(weights)  # A·r where there is no clip


def test_a_run_that_is_watched_is_the_same_run():
    plain, watched = runs.run_cell((SMALL, 0)), runs.run_cell((SMALL + " --where", 0))
    assert {**watched, **plain} | {"cpu_seconds": 0} == watched | {
        "cpu_seconds": 0, "flags": SMALL}
    assert 0 < watched["first_share"] < 1 and 0 <= watched["removed_first"] <= 1


def test_the_ratios_of_stale_rollouts_are_to_the_model_that_sampled_them():
    fresh = runs.run_cell((SMALL + " --steps 3 --learning-rate 1e-3", 0))
    stale = runs.run_cell((SMALL + " --steps 3 --learning-rate 1e-3 --stale 2", 0))
    assert stale["kl_old_new"] > 2 * fresh["kl_old_new"] > 0


def test_noise_leaves_the_first_pass_alone_and_reaches_the_gradient():
    old = torch.zeros(1000)
    advantage, weight, sequence = torch.ones(1000), torch.full((1000,), 1e-3), torch.zeros(1000)
    loss = runs.noisy(0.1, torch.Generator().manual_seed(0))
    rest = (advantage, weight, sequence, objectives.noclip)
    assert loss(old, old, *rest)[1].abs().max() == 0
    logp = torch.full((1000,), 1e-6, requires_grad=True)
    total, log_ratio = loss(logp, old, *rest)
    assert log_ratio.std().item() == pytest.approx(0.1, rel=0.1)
    total.backward()  # −w·A·r, with r = exp(log-ratio)
    torch.testing.assert_close(logp.grad, -1e-3 * log_ratio.exp())


def test_what_a_clip_removes_is_told_apart_by_hand():
    # advantages +, +, −, −; true ratios 1, 1.15, 1, 0.5; with rounding 1.15, 1.05, 0.85, 0.5
    exact = torch.tensor([1.0, 1.15, 1.0, 0.5]).log()
    rounded = torch.tensor([1.15, 1.05, 0.85, 0.5]).log()
    got = runs.noise_metrics(exact, rounded, torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4))
    # at 0.1 rounding removes the first and third, weights 1 and 1 of 3.65, and spares the second
    assert got["removed_0.1"] == 0.75 and got["removed_exact_0.1"] == 0.5
    assert got["lost_0.1"] == pytest.approx(2 / 3.65)
    assert got["removed_0.2"] == got["removed_exact_0.2"] == 0.25 and got["lost_0.2"] == 0


def test_a_noisy_run_says_how_much_of_what_a_clip_removes_is_noise(monkeypatch):
    monkeypatch.setattr(runs, "WATCHED", 1)
    row = runs.run_cell((SMALL + f" --noise {cells.NOISE}", 0))
    assert row["noise_sd"] == pytest.approx(cells.NOISE, rel=0.1) and row["moved_sd"] < 0.03
    # it reached the loss too, in whose last epoch KL(old‖new) is sd²/2 of it and little else
    assert row["kl_old_new"] == pytest.approx(cells.NOISE**2 / 2, rel=0.25)
    assert row["removed_0.1"] > 0.05 > row["removed_exact_0.1"]
    assert row["removed_0.1"] > row["removed_0.2"]
    bf16 = runs.run_cell((SMALL + " --dtype bf16", 0))
    assert 1e-4 < bf16["noise_sd"] < 0.05  # 8 bits of mantissa


def test_a_hopeless_run_trains_on_the_format_bonus_alone():
    paper = runs.run_cell((SMALL + " --hopeless --reward paper --prompts-per-step 16", 0))
    # one completion of four without the bonus: −0.0375 / (0.025 + 1e-4) = −1.494; a reward of 1
    # instead of 0.05 would give −0.75 / (0.5 + 1e-4) = −1.500
    assert 1.3 < paper["largest_advantage"] <= 0.0375 / 0.0251 + 1e-6
    assert 0 < paper["equal_groups"] < 1 and 0 <= paper["short_strict"] <= 1
    one = train.group_advantages(torch.tensor([[0.05, 0.05, 0.05, 0.0]]))
    assert one[0, 3].item() == pytest.approx(-1.494, abs=1e-3)


def test_what_a_hopeless_run_has_learned_by_hand():
    samples = [{"step": step, "advantage": a}
               for step, group in ((1, (1.0, -2.0)), (2, (0.0, 0.0)), (3, (0.5, -0.5)))
               for a in group]
    answers = [{"gold": "7", "strict": True}, {"gold": "5", "strict": False},
               {"gold": "12", "strict": True}]
    assert runs.what_was_learned([{"equal_groups": 0.5}, {"equal_groups": 1.0}], samples,
                                 answers) == {"equal_groups": 0.75, "short_strict": 0.5,
                                              "largest_advantage": (2 + 0.5) / 2}


# ------------------------------------------------------------------ replay

def test_a_replay_repeats_a_run_and_names_where_another_leaves_it():
    flags = SMALL.split() + ["--learning-rate", "1e-3", "--max-grad-norm", "1e9"]
    weights, rollouts, _ = trained([*flags, "--alpha", "0"])
    again, *_ = trained([*flags, "--objective", "noclip"], rollouts)  # α = 0 is noclip
    assert distance(weights, again) == 0
    other, *_ = trained([*flags, "--alpha", "0.5"], rollouts)
    assert 0 < distance(weights, other) < 0.1  # AdamW
    sgd = [*flags, "--optimizer", "sgd", "--epochs", "1", "--minibatches", "1", "--stop-after",
           "1"]
    full, rollouts, _ = trained([*sgd, "--alpha", "0"])
    half, *_ = trained([*sgd, "--alpha", "0.5"], rollouts)
    # one step of SGD, half as long: half of the way is missing
    assert distance(full, half) == pytest.approx(0.5, abs=1e-3)
    a, b = (SimpleNamespace(completions=[x]) for x in ([[1, 2], [3]], [[1, 2], [3, 4]]))
    assert first_difference([a, a], [a, b]) == (2, 2, 2)
    assert first_difference([a], [a]) is None


@pytest.mark.parametrize("flags", [
    "", "--beta 0.1", "--optimizer sgd --learning-rate 0.003 --beta 0.1"])
def test_smoothing_by_one_half_is_bit_for_bit_the_unsmoothed_run_that_the_rule_names(flags):
    # dividing by c = 1/2 only moves exponents
    flags = [*SMALL.split(), "--max-grad-norm", "1e9", *flags.split()]
    weights, rollouts, _ = trained([*flags, "--alpha", "0.5"])
    same, *_ = trained(equal_run(flags, 0.5), rollouts)
    assert distance(weights, same) == 0
    s, _ = settings_of(equal_run(flags, 0.5))
    given, _ = settings_of(flags)
    assert s.alpha == 0 and s.beta == 2 * given.beta
    if given.optimizer == "sgd":
        assert s.learning_rate == given.learning_rate / 2
    else:
        assert s.adam_epsilon == 2e-8 and s.learning_rate == given.learning_rate


@pytest.mark.parametrize("flags", ["", "--optimizer sgd --learning-rate 0.003"])
def test_the_rule_holds_where_the_gradient_limit_binds(flags):
    # up to the 1e-6 that clip_grad_norm_ adds to the norm
    flags = [*SMALL.split(), "--max-grad-norm", "0.3", *flags.split()]
    weights, rollouts, limited = trained([*flags, "--alpha", "0.5"])
    same, _, as_often = trained(equal_run(flags, 0.5), rollouts)
    assert distance(weights, same) < 1e-4
    free, *_ = trained([*flags, "--alpha", "0.5", "--max-grad-norm", "inf"], rollouts)
    assert distance(weights, free) > 1e-3  # the limit is not only counted
    assert limited == as_often > 0 and settings_of(equal_run(flags, 0.5))[0].max_grad_norm == 0.6


def test_alpha_is_what_epsilon_of_adam_leaves_of_it(monkeypatch):
    flags = SMALL.split() + ["--max-grad-norm", "1e9"]
    monkeypatch.setattr("experiments.replay.ALPHAS", (0.1,))
    monkeypatch.setattr("experiments.replay.STEPS", 2)
    usual = replay(flags)
    tiny = replay([*flags, "--adam-epsilon", "1e-15"])
    assert 1e-4 < usual["distance"]["0.1"] < 1e-2  # gradients near 1e-8 feel it
    # of 25 recorded runs two are 1.1e-4, where rounding turned the sign of a gradient near 0
    assert tiny["distance"]["0.1"] < 5e-4 and usual["rule"]["0.1"] < 5e-4
    assert tiny["distance"]["0.1"] < usual["distance"]["0.1"]
    assert usual["limited"] == {"0": 0, "0.1": 0}


def test_a_row_of_a_replay_is_of_its_own_seed(monkeypatch):
    monkeypatch.setattr(replays, "ALPHAS", (0.5,))
    monkeypatch.setattr(replays, "STEPS", 1)
    one, two = (replays.run_cell(("--replay " + SMALL, seed)) for seed in (0, 1))
    assert (one["flags"], one["seed"], two["seed"]) == ("--replay " + SMALL, 0, 1)
    assert one["distance"]["0.5"] != two["distance"]["0.5"]
    same = replays.run_cell((f"--live {SMALL} --learning-rate 0", 1))
    assert same["seed"] == 1 and same["first_difference"] is None and same["same"] == 1


def test_live_runs_that_never_part_have_no_first_difference():
    assert live([*SMALL.split(), "--learning-rate", "0"]) == {"first_difference": None, "same": 1.0}
    found = live([*SMALL.split(), "--optimizer", "sgd", "--learning-rate", "1", "--max-grad-norm",
                  "1e9"])
    assert found["first_difference"][0] == 2 and 0 <= found["same"] < 1


# ------------------------------------------------------------------ the entry

def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    monkeypatch.setattr(entry, "EXPERIMENTS", {"one": {"arm": SMALL}})
    monkeypatch.setattr(entry, "seeds", lambda name: range(2))
    path.write_text(json.dumps({"flags": SMALL, "seed": 0}) + "\n")
    cells = entry.missing(["one"], entry.recorded(path))
    assert cells == [(SMALL, 1)]
    entry.run_all(cells, path, 1)
    assert [row["seed"] for row in entry.recorded(path)] == [0, 1]
    assert entry.missing(["one"], entry.recorded(path)) == []
    with open(path, "a") as file:
        file.write('{"flags": "--st')
    with pytest.raises(SystemExit, match="line 3: not JSON"):
        entry.recorded(path)


def test_bf16_runs_come_last_and_the_others_seed_by_seed():
    todo = entry.missing(list(cells.EXPERIMENTS), [])
    bf16 = [seed for flags, seed in todo if "bf16" in flags]
    others = [seed for flags, seed in todo if "bf16" not in flags]
    assert [seed for _, seed in todo] == others + bf16 and len(bf16) == 10 + 18 + 20
    assert others == sorted(others) and bf16 == sorted(bf16)


def test_rows_are_made_by_functions_that_other_processes_find():
    assert entry.runner(("--live", 0)).__module__ == "experiments.replay"
    assert entry.runner((SMALL, 0)).__module__ == "experiments.run"


def test_the_entry_refuses_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    for argv, words in ((["strss"], "no experiment strss; there are mild, stress"),
                        (["--jobs", "0"], "--jobs is 0")):
        monkeypatch.setattr("sys.argv", ["experiments", *argv])
        with pytest.raises(SystemExit):
            entry.main()
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):  # and does not wait for ever
        entry.run_all([(SMALL + " --model nowhere", 0)], tmp_path / "rows.jsonl", 1)
    monkeypatch.setattr("sys.argv", ["experiments", "--draw", "--results", str(tmp_path / "no")])
    with pytest.raises(SystemExit, match="holds no row yet"):
        entry.main()


# ------------------------------------------------------------------ report

def test_a_table_says_what_the_rows_say(monkeypatch):
    monkeypatch.setattr(report, "EXPERIMENTS", {"mild": {"A": "a", "B": "b", "C": "c"}})
    monkeypatch.setattr(report, "AGAINST", {"mild": [(0, "A")]})
    monkeypatch.setattr(report, "TABLES", {"mild": [report.ACCURACY, report.LOST]})
    rows = [{"flags": flags, "seed": seed, "test_strict": x, "optimizer_steps": 8,
             "skipped_steps": 2, "failed": None}
            for flags, values in (("a", [0.5, 0.6, 0.7]), ("b", [0.4, 0.6]))
            for seed, x in enumerate(values)]
    rows.append({**rows[0], "flags": "a b", "test_strict": 0.0})  # no cell of this experiment
    # sd 0.1; the interval of three runs: 0.6 ± 4.3027·0.1/√3 = 0.3516 … 0.8484
    assert statistics.stdev([0.5, 0.6, 0.7]) == pytest.approx(0.1)
    # B − A of the seeds both have: −10 and 0; −5 ± 12.7062·√50/√2 = −68.5 … 58.5
    assert report.table(rows, "mild").splitlines() == [
        "| arm | seeds | accuracy (%) | above A (points) | optimizer steps lost (%) |",
        "|---|---:|---:|---:|---:|",
        "| A | 3 | 60.0 ± 10.0 [35.2, 84.8] |  | 25 ± 0 [25, 25] |",
        "| B | 2 | 50.0 ± 14.1 [-77.1, 177.1] | -5.0 [-68.5, +58.5], none shown | "
        "25 ± 0 [25, 25] |",
        "| C | 0 | – | – | – |"]


def test_differences_of_ten_seeds_have_a_p_that_one_collapse_does_not_blur():
    x, y = {i: 0.5 for i in range(5)}, {i: 0.505 - (i == 4) / 1000 for i in range(5)}
    assert report.difference(x, {**y, 4: 0.505}) == "-0.5 in every seed"  # whatever the last bits
    assert report.difference(x, y) == "-0.5 [-0.5, -0.4]"  # five seeds: no p can be below 1/16
    clip = dict.fromkeys(range(10), 0.9)
    # nine of ten seeds below, one at 0: the interval covers 0. Exact p by counting all signs
    low = [0.775, 0.795, 0.76, 0.825, 0.695, 0.0, 0.87, 0.82, 0.845, 0.91]
    d = torch.tensor(low, dtype=torch.float64) - 0.9
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)), dtype=torch.float64)
    exact = ((signs @ d).abs() >= d.sum().abs() - 1e-9).double().mean().item()
    text = report.difference(dict(enumerate(low)), clip)
    assert 0.001 < exact < 0.01 and "none shown" not in text and ", +" in text
    assert float(text.split("p ")[1]) == pytest.approx(exact, rel=0.05)  # two digits
    even = {i: 0.9 + (-1)**i * (i + 1) / 100 for i in range(10)}
    assert report.difference(even, clip).endswith(", none shown")


def test_a_cell_is_compared_with_those_that_differ_from_it_in_one_part(monkeypatch):
    monkeypatch.setattr(report, "EXPERIMENTS", {"noise": {
        "A | 1": "a1", "A | 2": "a2", "B | 1": "b1", "B | 2": "b2"}})
    monkeypatch.setattr(report, "AGAINST", {"noise": [(0, "A"), (1, "1")]})
    monkeypatch.setattr(report, "TABLES", {"noise": [report.ON_THE_WAY]})
    # after a fifth of 10 steps, step 2: not the last, which is 0.9 everywhere
    rows = [{"flags": flags, "seed": seed, "failed": None,
             "validation": [[0, 0.0], [2, x + seed / 8], [10, 0.9]]}
            for flags, x in (("a1", 0.0), ("a2", 0.125), ("b1", 0.25), ("b2", 0.5))
            for seed in range(2)]
    table = [line[2:-2].split(" | ") for line in report.table(rows, "noise").splitlines()]
    assert table[0] == ["arm", "log-probs", "seeds", "on the way (%)", "above A (points)",
                        "above 1 (points)"]
    ends = [line[4:] for line in table[2:]]
    assert ends[1:] == [["", "+12.5 in every seed"], ["+25.0 in every seed", ""],
                        ["+37.5 in every seed", "+25.0 in every seed"]]
    # 0.5 and 0.625: 56.25 ± 8.84, its interval 12.7062·8.84/√2 = 79.4 on either side
    assert table[-1][3] == "56.2 ± 8.8 [-23.2, 135.7]"


def test_what_was_measured_on_the_way_is_told_as_such():
    rows = [{"flags": cells.EXPERIMENTS["stale"]["clip ε 0.2 | 8 | 10"], "seed": 0,
             "failed": None, "test_strict": 0.5, "optimizer_steps": 10, "skipped_steps": 1,
             "validation": [[0, 0.1], [20, 0.4], [100, 0.6]], "kl_old_new": 0.001,
             "clip_removed": 0.1, "on_the_way": {"kl_old_new": 0.01234, "clip_removed": 0.75}}]
    assert "| clip ε 0.2 | 8 | 10 | 1 | 50.0 |  | 40.0 |  | 12.34 | 75.0 | 10 |" in report.table(
        rows, "stale")


def test_the_chosen_rate_is_the_one_with_the_best_validation_accuracy():
    # × 3 is best on validation, × 1 on the test: × 3 is taken, and its test accuracy told; a seed
    # that only × 1 has does not count
    rows = [{"flags": cells.EXPERIMENTS["reuse"][f"clip ε 0.2 | 8 | {times}"], "seed": seed,
             "test_strict": test, "validation": [[0, 0.99], [100, found + (seed == 4)]],
             "failed": None}
            for times, test, found in (("1", 0.9, 0.5), ("3", 0.8, 0.7), ("10", 0.7, 0.6))
            for seed in ((0, 1, 4) if times == "1" else (0, 1))]
    assert report.rate_table(rows).splitlines()[2:] == [
        "| clip ε 0.2 | 8 | × 3 | 2 | 80.0 ± 0.0 [80.0, 80.0] |  |"]


def test_tables_of_replays_give_the_largest_distance_to_the_rules_run():
    (label, flags), *_ = cells.EXPERIMENTS["replay"].items()
    rows = [{"flags": flags, "seed": seed, "limited": {"0": 0.5, "0.9": 0.0},
             "distance": {str(alpha): alpha * (seed + 1) for alpha in cells.ALPHAS},
             "rule": {str(alpha): 1e-6 * (seed + 1) for alpha in cells.ALPHAS}}
            for seed in range(2)]
    line = report.replay_table(rows).splitlines()[2]
    # α 0.1: 0.1 and 0.2, so 0.15 ± 12.7062·0.0707/√2 = −0.485 … 0.785
    assert line.startswith(f"| {label} | 2 |") and "| 1.5e-01 [-4.9e-01, 7.9e-01] |" in line
    assert line.endswith("| 50% … 0% | 2.0e-06 | 2.0e-06 |")
    (flags,) = cells.EXPERIMENTS["live"].values()
    rows = [{"flags": flags, "seed": 0, "first_difference": [3, 2, 1], "same": 0.5},
            {"flags": flags, "seed": 1, "first_difference": None, "same": 1.0}]
    assert report.live_table(rows).splitlines()[2:] == [
        "| 0 | step 3, completion 2, token 1 | 50.0% |", "| 1 | none | 100.0% |"]


def test_a_table_goes_into_its_own_place_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table: live -->\nold\n<!-- end -->\nb\n<!-- table: cost -->\n"
                      "no end\n\n<!-- table: live -->\n<!-- end -->\n")
    report.write_readme([], readme)
    live = report.live_table([])
    assert readme.read_text() == (
        f"a\n<!-- table: live -->\n{live}\n<!-- end -->\nb\n<!-- table: cost -->\nno end\n\n"
        f"<!-- table: live -->\n{live}\n<!-- end -->\n")


def test_the_figure_of_the_arms_shows_every_run():
    import matplotlib.pyplot as plt
    rows = [{"flags": flags, "seed": seed, "test_strict": i / 100 + seed / 1000}
            for i, flags in enumerate(cells.EXPERIMENTS["stress"].values()) for seed in range(2)]
    figure = report.draw_arms(rows, plt)
    (axis,) = figure.axes
    arms = [label.get_text() for label in axis.get_yticklabels()]
    assert arms == list(cells.EXPERIMENTS["stress"])[::-1]  # the best on top
    dots = {arms[round(line.get_ydata()[0])]: list(line.get_xdata()) for line in axis.lines
            if line.get_marker() == "o"}
    assert dots == {arm: [i / 100, i / 100 + 0.001]
                    for i, arm in enumerate(cells.EXPERIMENTS["stress"])}
    ends = sorted(x for line in axis.lines if line.get_linewidth() == 3 for x in line.get_xdata())
    # of i/100 and i/100 + 0.001: 12.7062·0.000707/√2 on either side of the mean
    assert ends == pytest.approx(sorted(i / 100 + 0.0005 + half for i in range(len(arms))
                                        for half in (-0.00635, 0.00635)), abs=1e-5)
    plt.close(figure)


def test_the_figure_of_stale_rollouts_shows_means_at_their_steps():
    import matplotlib.pyplot as plt
    rows = [{"flags": cells.EXPERIMENTS["stale"]["pspo α 0.1 | 8 | 3"], "seed": seed,
             "validation": [[0, 0.1], [20, 0.4 + seed / 10], [100, 0.9]]} for seed in range(2)]
    figure = report.draw_stale(rows, plt)
    (drawn,) = [container for axis in figure.axes for container in axis.containers]
    shift = drawn[0].get_xdata()[0]  # the arms stand a little apart
    assert drawn.get_label() == "pspo α 0.1" and abs(shift) < 2
    assert list(drawn[0].get_xdata() - shift) == pytest.approx([0, 20, 100])
    assert list(drawn[0].get_ydata()) == pytest.approx([0.1, 0.45, 0.9])
    (whiskers,) = drawn[2]  # at step 20: 12.7062·0.0707/√2 on either side
    low, high = whiskers.get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((0.45 - 0.6353, 0.45 + 0.6353), abs=1e-3)
    plt.close(figure)


def recorded_names(rows):
    """The experiments that have rows."""
    flags = {row["flags"] for row in rows}
    return [name for name, cell in cells.EXPERIMENTS.items() if flags & {*cell.values()}]


def test_the_pages_hold_the_tables_of_the_recorded_rows(tmp_path):
    rows, written = entry.recorded(entry.RESULTS), ""
    for page in (report.README, report.FRONT_PAGE):
        copy = tmp_path / "README.md"
        copy.write_text(page.read_text())
        report.write_readme(rows, copy)
        assert copy.read_text() == page.read_text(), page
        written += copy.read_text()
    unrecorded = cells.EXPERIMENTS.keys() - set(recorded_names(rows))
    for name in (report.TABLES.keys() | report.OWN_TABLES.keys()) - unrecorded:
        assert f"<!-- table: {name} -->" in written, name


def test_the_short_table_says_the_same_as_the_long_ones():
    rows = entry.recorded(entry.RESULTS)
    short, null = ({line.split(" | ")[0]: line.split(" | ")[1:]
                    for line in report.OWN_TABLES[name](rows).splitlines()[2:]}
                   for name in ("short", "null"))
    assert len(short) == len(report.SHORT)
    for regime, (n, end, _, on_the_way, _) in short.items():
        assert [n, end, on_the_way + " |"] == null[regime][2:], regime
    mild = report.table(rows, "mild").splitlines()
    (line,) = (line.split(" | ") for line in mild if line.startswith("| pspo α 0.1 |"))
    assert [short["| 2 epochs, × 1"][2], short["| 2 epochs, × 1"][4]] == [line[3], line[5] + " |"]



def test_every_recorded_row_is_of_a_cell_and_every_cell_has_its_seeds():
    rows = entry.recorded(entry.RESULTS)
    there = [(row["flags"], row["seed"]) for row in rows]
    assert len(set(there)) == len(there)
    assert {flags for flags, _ in there} <= {
        flags for experiment in cells.EXPERIMENTS.values() for flags in experiment.values()}
    assert entry.missing(recorded_names(rows), rows) == []
    assert set(recorded_names(rows)) == cells.EXPERIMENTS.keys()
    assert not any(math.isnan(x) for row in rows for x in row.values() if isinstance(x, float))


def test_figures_are_drawn(tmp_path):
    report.draw_figures(entry.recorded(entry.RESULTS), tmp_path)
    for name in report.FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
