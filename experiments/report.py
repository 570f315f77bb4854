"""What the recorded rows say: tables, rewritten in place in two pages, and figures.

What it does    turns rows of results.jsonl into Markdown tables and figures. A number is a mean
                over seeds ± their standard deviation [95 % interval of the mean, Student's t].
                The tables stand in experiments/README.md; a short one stands in README.md.
Not here        making rows (run.py), intervals (evaluation/intervals.py).
Where to fork   a column is a line of TABLES; a figure a function.
"""
import re
import statistics
from pathlib import Path

from evaluation.intervals import over_seeds, sign_flips
from experiments.cells import AGES, ALPHAS, EPOCHS, EXPERIMENTS, FIFTH, FOUR, RATE, TIMES, seeds

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
FRONT_PAGE = HERE.parent / "README.md"
FOLDER = HERE.parent / "figures"


def on_the_way(row):
    """Validation accuracy after a fifth of the run's steps."""
    accuracy = dict(map(tuple, row["validation"]))
    return None if row["failed"] else accuracy[max(accuracy) // FIFTH]


# header, key of a row (or a function of it), factor, digits
ACCURACY = ("accuracy (%)", "test_strict", 100, 1)
FLEXIBLE = ("flexible (%)", "test_flexible", 100, 1)
ON_THE_WAY = ("on the way (%)", on_the_way, 100, 1)
COMPARED = (ACCURACY, ON_THE_WAY)  # columns that are followed by differences, and FLEXIBLE
KL = ("KL(old‖new) (10⁻³ nats)", "kl_old_new", 1e3, 2)
REMOVED = ("gradient a 0.2 clip removes (%)", "clip_removed", 100, 1)
NORM = ("gradient norm", "gradient_norm", 1, 2)
FORMAT = ("format (%)", "test_format", 100, 1)
LENGTH = ("tokens", "test_n_tokens", 1, 1)
LEAKAGE = ("leakage (%)", "test_leakage", 100, 1)
RATIO_LOW, RATIO_HIGH = ("r, 1st percentile", "ratio_p1", 1, 2), ("99th", "ratio_p99", 1, 2)
SAMPLE_SIZE = ("effective sample size (%)", "effective_sample_size", 100, 1)
SMOLLM2 = ("smollm2", "smollm2_reuse")
LOST = ("optimizer steps lost (%)", lambda row: None if row["failed"] else
        row["skipped_steps"] / row["optimizer_steps"], 100, 0)


def on_the_way_too(column):
    """The column of a metric, but of its mean over the first fifth of the run."""
    title, key, factor, digits = column
    return (f"on the way: {title}", lambda row: row["on_the_way"].get(key), factor, digits)


TABLES = {
    "mild": [ACCURACY, ON_THE_WAY, NORM, LOST],
    "stress": [ACCURACY, ON_THE_WAY, KL, REMOVED, NORM, LOST],
    "alpha": [ACCURACY, NORM],
    "reuse": [ACCURACY, KL, REMOVED, NORM, LOST],
    "stale": [ACCURACY, ON_THE_WAY, on_the_way_too(KL), on_the_way_too(REMOVED), LOST],
    "where": [("first tokens' share of the gradient (%)", "first_share", 100, 1),
              ("of it a 0.2 clip removes (%)", "removed_first", 100, 1),
              ("of other tokens' (%)", "removed_others", 100, 1)],
    "token": [ACCURACY, ON_THE_WAY],
    "noise": [ACCURACY, ON_THE_WAY],
    **{name: [ACCURACY, FLEXIBLE, ON_THE_WAY, FORMAT, LENGTH, LEAKAGE, LOST] for name in SMOLLM2},
    "hopeless": [ACCURACY,
                 ("groups with unequal rewards (%)", lambda row: 1 - row["equal_groups"], 100, 1),
                 ("largest |A| in them", "largest_advantage", 1, 2),
                 ("accuracy, answers of one digit (%)", "short_strict", 100, 1)]}
AGAINST = {  # which part of a cell's label is another in the cell compared with, and what it is
    "mild": [(0, "clip ε 0.2")], "stress": [(0, "clip ε 0.2")], "reuse": [(0, "clip ε 0.2")],
    "stale": [(0, "clip ε 0.2")], "token": [(0, "all"), (0, "none")],
    "noise": [(0, "noclip (α 0)"), (1, "fp32")],
    **{name: [(0, "clip ε 0.2"), (0, "noclip (α 0)")] for name in SMOLLM2},
    "alpha": [(0, "α 0")], "hopeless": [(0, "base model"), (0, "paper's reward")]}
LABELS = {  # what the parts of a cell's label are, where there are several
    "reuse": ["arm", "epochs", "rate ×"], "stale": ["arm", "steps ago", "rate ×"],
    "where": ["arm", "steps ago", "rate ×"], "token": ["tokens with a clip at 0.2", "rate ×"],
    "noise": ["arm", "log-probs"], **{name: ["arm", "epochs", "rate"] for name in SMOLLM2}}


# ------------------------------------------------------------------ numbers of cells

def values(rows, name, label, key="test_strict"):
    """{seed: value} of a cell, by key or by a function of the row; seeds without it left out. Those
    count, too, that another experiment with the same cell has made."""
    get = key if callable(key) else lambda row: row.get(key)
    flags = EXPERIMENTS[name][label]
    found = {row["seed"]: get(row) for row in rows if row["flags"] == flags}
    return {seed: found[seed] for seed in sorted(found) if found[seed] is not None}


def in_numbers(x, factor=1, digits=1):
    """"mean ± sd [interval]" of the values of the seeds."""
    x = [value * factor for value in x]
    if not x:
        return "–"
    if len(x) == 1:
        return f"{x[0]:.{digits}f}"
    mean, interval = over_seeds(x)
    low, high = interval or (mean, mean)
    return (f"{mean:.{digits}f} ± {statistics.stdev(x):.{digits}f} [{low:.{digits}f}, "
            f"{high:.{digits}f}]")


def numbers_of(rows, name, label, columns):
    """`in_numbers` of a cell in each of these columns."""
    return [in_numbers(values(rows, name, label, key).values(), factor, digits)
            for _, key, factor, digits in columns]


def difference(x, y):
    """What x is above y, in points, seed by seed: "mean [interval]", and whether that shows one;
    with six seeds or more also the p of `sign_flips` (of fewer it cannot be below 0.05), which then
    decides. x, y: {seed: share}."""
    d = [(x[seed] - y[seed]) * 100 for seed in sorted(x.keys() & y.keys())]
    if len(d) < 2:
        return "–"
    if len({round(points, 9) for points in d}) == 1:
        return f"{d[0]:+.1f} in every seed"
    mean, (low, high) = over_seeds(d)
    text, none_shown = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", low <= 0 <= high
    if len(d) >= 6:
        p = sign_flips(d)
        text, none_shown = f"{text}, p {p:.2g}", p >= 0.05
    return text + ", none shown" * none_shown


def markdown(header, lines):
    header = [title.replace("|", "\\|") for title in header]
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    return "\n".join(["| " + " | ".join(header) + " |", rule]
                     + ["| " + " | ".join(map(str, line)) + " |" for line in lines])


# ------------------------------------------------------------------ tables

def table(rows, name):
    """The table of an experiment, a line for each of its arms, or one of OWN_TABLES."""
    if name in OWN_TABLES:
        return OWN_TABLES[name](rows)
    columns = [(*column, AGAINST.get(name, []) if column in (*COMPARED, FLEXIBLE) else [])
               for column in TABLES[name]]
    header = [*LABELS.get(name, ["arm"]), "seeds"]
    for title, *_, against in columns:
        header += [title, *(f"above {other} (points)" for _, other in against)]
    lines = []
    for label in EXPERIMENTS[name]:
        parts = label.split(" | ")
        failed = sum(values(rows, name, label, lambda row: bool(row.get("failed"))).values())
        n = len(values(rows, name, label, "flags"))
        line = [*parts, f"{n}, {failed} failed" if failed else n]
        for _, key, factor, digits, against in columns:
            x = values(rows, name, label, key)
            line.append(in_numbers(x.values(), factor, digits))
            for i, part in against:
                other = " | ".join([*parts[:i], part, *parts[i + 1:]])
                line.append("" if label == other or other not in EXPERIMENTS[name] else
                            difference(x, values(rows, name, other, key)))
        lines.append(line)
    return markdown(header, lines)


def rounding_table(rows):
    """What clips at 0.1 and 0.2 remove where log-probs are rounded or noisy."""
    columns = [("sd of noise (nats)", "noise_sd", 1, 4)]
    for limit in (0.1, 0.2):
        columns += [(f"tokens a {limit} clip would remove (%)", f"removed_{limit}", 100, 1),
                    ("the same without noise (%)", f"removed_exact_{limit}", 100, 1),
                    ("gradient lost to noise (%)", f"lost_{limit}", 100, 1)]
    lines = [[*label.split(" | "), len(values(rows, "noise", label)),
              *numbers_of(rows, "noise", label, columns)]
             for label in EXPERIMENTS["noise"] if not label.endswith("fp32")]
    return markdown([*LABELS["noise"], "seeds", *(title for title, *_ in columns)], lines)


def ratio_table(rows):
    """Of a pretrained model in bf16: how far ratios spread on the way, and later how much of that
    is rounding."""
    columns = [*map(on_the_way_too, (KL, RATIO_LOW, RATIO_HIGH, SAMPLE_SIZE, REMOVED)),
               ("log-ratios, sd (nats)", "moved_sd", 1, 3),
               ("of rounding, sd (nats)", "noise_sd", 1, 3),
               ("gradient that a 0.2 clip loses to rounding (%)", "lost_0.2", 100, 1)]
    lines = [[*label.split(" | ")[:2], *numbers_of(rows, name, label, columns)]
             for name in SMOLLM2 for label in EXPERIMENTS[name]]
    return markdown(["arm", "epochs", *(title for title, *_ in columns)], lines)


def replay_table(rows):
    """Distance to the run with α = 0, as a share of the distance travelled, and the largest one to
    the run that the rule names, over all α and for α = 0.5."""
    header = ["settings", "seeds", *(f"α {alpha}" for alpha in ALPHAS),
              "steps at the limit, α 0 … 0.9", "to the rule's run: largest", "at α 0.5"]
    lines = []
    for label in EXPERIMENTS["replay"]:
        found = values(rows, "replay", label, "distance").values()
        rule = values(rows, "replay", label, "rule").values()
        limited = values(rows, "replay", label, "limited").values()
        line = [label, len(found)]
        for alpha in map(str, ALPHAS):
            line.append(small([distance[alpha] for distance in found]))
        ends = [statistics.fmean([share[alpha] for share in limited] or [0])
                for alpha in ("0", str(ALPHAS[-1]))]
        largest = max((d for distance in rule for d in distance.values()), default=0)
        half = max((distance["0.5"] for distance in rule), default=0)
        lines.append([*line, "{:.0%} … {:.0%}".format(*ends), f"{largest:.1e}", f"{half:.1e}"])
    return markdown(header, lines)


def small(x):
    """"mean [interval]" of small numbers."""
    if len(x) < 2:
        return "–"
    mean, interval = over_seeds(x)
    return f"{mean:.1e} [{', '.join(f'{end:.1e}' for end in interval or (mean, mean))}]"


def live_table(rows):
    """Where two runs that sample for themselves part."""
    (label,) = EXPERIMENTS["live"]
    where = values(rows, "live", label, "first_difference")
    same = values(rows, "live", label, "same")
    return markdown(["seed", "first token that differs", "equal completions, of 6,400"],
                    [[seed, "step {}, completion {}, token {}".format(*where[seed])
                      if seed in where else "none", f"{same[seed]:.1%}"] for seed in same])


def rate_table(rows):
    """Each arm at the learning rate of the grid with its best validation accuracy at the end, over
    the seeds that the whole grid has."""
    def own(arm, epochs, times, key="test_strict"):
        found = values(rows, "reuse", f"{arm} | {epochs} | {times}", key)
        return {seed: x for seed, x in found.items() if seed in seeds("reuse")}
    lines = []
    for epochs in EPOCHS:
        best = {}
        for arm in FOUR:
            found = {times: x for times in TIMES if (x := own(arm, epochs, times, last_validation))}
            if found:
                best[arm] = max(found, key=lambda times: statistics.fmean(found[times].values()))
        tests = {arm: own(arm, epochs, times) for arm, times in best.items()}
        for arm, x in tests.items():
            lines.append([arm, epochs, f"× {best[arm]}", len(x), in_numbers(x.values(), 100),
                          "" if arm == FOUR[0] else difference(x, tests.get(FOUR[0], {}))])
    return markdown(["arm", "epochs", "rate, chosen on validation", "seeds", "accuracy (%)",
                     f"above {FOUR[0]} (points)"], lines)


def last_validation(row):
    return None if row["failed"] else row["validation"][-1][1]


def cost(rows):
    """One sentence: how many runs, and how long they took one core."""
    larger = [row["device"] for row in rows if "smollm2" in row["flags"]]
    seconds = [row["cpu_seconds"] for row in rows if "smollm2" not in row["flags"]]
    return (f"{len(seconds)} runs, {sum(seconds) / 3600:.1f} hours of one core: half of that on two"
            + (f"; and {len(larger)} of a larger model, {sum(d != 'cpu' for d in larger)} of them "
               "on a GPU") * bool(larger) + ".")


# pairs of arms that are compared with each other: experiment, first, second
NULL = [(name, "pspo α 0.1" + rest, "noclip (α 0)" + rest) for name, rest in (
    *(("stale", f" | {steps} | {times}") for steps, times in AGES), ("noise", " | noise"),
    *(("reuse", f" | {epochs} | {times}") for epochs in EPOCHS for times in TIMES
      if epochs != 2))]
OTHERS = [("mild", "pspo α 0.1", "noclip, one pass"), ("mild", "pspo α 0.1", "clip ε 0.1"),
          ("stress", "pspo α 0.5", "sapo"), ("stress", "pspo α 0.5", "scopic τ 4"),
          ("stress", "log_pspo α 0.5", "cispo r ≤ 2"), ("stress", "log_pspo α 0.5", "scopic τ 4")]


# PSPO against its control and against the clip, on the front page: experiment, rest of the label
SHORT = [("stale", " | 0 | 1"), ("stale", " | 0 | 10"), ("stress", ""),
         ("stale", " | 8 | 1"), ("stale", " | 8 | 3"), ("stale", " | 8 | 10")]


def regime(name, label):
    """A regime in words, told by the flags of one of its cells: "2 epochs, × 1, 8 steps ago"."""
    flags = EXPERIMENTS[name][label].split()
    given = {key: value for key, value in zip(flags, flags[1:]) if key.startswith("--")}
    epochs, times = int(given["--epochs"]), float(given["--learning-rate"]) / RATE
    words = f"{epochs} epoch{'s' * (epochs > 1)}, × {times:g}"
    words += f", {given['--stale']} steps ago" if "--stale" in given else ""
    return words + ", noise" * ("--noise" in given)


def pair_table(rows, of):
    """Two arms against each other, in several regimes."""
    lines = []
    for name, first, second in of:
        pairs = [[values(rows, name, arm, key) for arm in (first, second)]
                 for _, key, *_ in COMPARED]
        lines.append([regime(name, first), first.split(" | ")[0], second.split(" | ")[0],
                      min(len(x.keys() & y.keys()) for x, y in pairs),
                      *(difference(x, y) for x, y in pairs)])
    return markdown(["regime", "first", "second", "seeds", "accuracy of the first above the second "
                     "(points)", "on the way (points)"], lines)


def short_table(rows):
    """PSPO with α 0.1 against its control and against the clip, at the end and on the way."""
    header = ["regime", "seeds", *(f"{when}: above the {other}" for when in (
        "at the end", "on the way") for other in ("control", "clip"))]
    lines = []
    for name, rest in SHORT:
        arms = [f"{arm}{rest}" for arm in ("pspo α 0.1", "noclip (α 0)", "clip ε 0.2")]
        line = [regime(name, arms[0]), len(values(rows, name, arms[0]))]
        for _, key, *_ in COMPARED:
            pspo, *others = (values(rows, name, arm, key) for arm in arms)
            line += [difference(pspo, other) for other in others]
        lines.append(line)
    return markdown(header, lines)


OWN_TABLES = {"null": lambda rows: pair_table(rows, NULL),
              "pairs": lambda rows: pair_table(rows, OTHERS), "short": short_table,
              "rounding": rounding_table, "ratios": ratio_table, "replay": replay_table,
              "live": live_table, "rates": rate_table, "cost": cost}


def write_readme(rows, path=README):
    """Put every table in its place: between <!-- table: NAME --> and <!-- end -->."""
    path.write_text(re.sub(
        r"(<!-- table: (\w+) -->\n)((?!<!--).*\n)*(?=<!-- end -->)",
        lambda found: found[1] + table(rows, found[2]) + "\n", path.read_text(encoding="utf-8")),
        encoding="utf-8")


# ------------------------------------------------------------------ figures

# color-blind safe, told apart by line and marker too
STYLES = [("#d55e00", "--", "s"), ("0.5", ":", "o"), ("#0072b2", "-", "^"), ("black", "-.", "D"),
          ("#009e73", (0, (5, 1, 1, 1, 1, 1)), "v"), ("#cc79a7", (0, (1, 1)), "P")]


def draw_arms(rows, plt):
    """Every seed as a circle, the mean as a tick, its interval as a bar: one line an arm."""
    arms = sorted(EXPERIMENTS["stress"], key=lambda arm: -statistics.fmean(
        values(rows, "stress", arm).values() or [0]))
    figure, axis = plt.subplots(figsize=(7.5, 0.33 * len(arms) + 1.2), layout="constrained")
    for y, arm in enumerate(arms):
        x = list(values(rows, "stress", arm).values())
        axis.plot(x, [y] * len(x), "o", color="0.45", markersize=5, markerfacecolor="none")
        if len(x) > 1:
            mean, interval = over_seeds(x)
            axis.plot([mean], [y], "|", color="black", markersize=15, markeredgewidth=2.5)
            axis.plot(interval or (mean, mean), [y, y], color="#0072b2", linewidth=3, zorder=0,
                      alpha=0.7)
    axis.set(yticks=range(len(arms)), yticklabels=arms, xlim=(-0.02, 1.02),
             xlabel="greedy strict accuracy, 200 test problems")
    axis.grid(axis="x", color="0.9")
    axis.invert_yaxis()
    return figure


def draw_stale(rows, plt):
    """Validation accuracy against the step, a panel for each age of the rollouts, a line an arm."""
    ages = ((0, 3), (8, 3), (8, 10))
    figure, axes = plt.subplots(1, len(ages), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (age, times) in zip(axes, ages):
        for arm, style in zip(FOUR, STYLES):
            curves = values(rows, "stale", f"{arm} | {age} | {times}", "validation").values()
            steps = [step for step, _ in next(iter(curves), [])]
            x = [[dict(map(tuple, curve))[step] for curve in curves] for step in steps]
            errorbar(axis, steps, x, arm, style, 0.8)
        when = f"rollouts of {age} steps ago" if age else "fresh rollouts"
        axis.set(title=f"{when}, rate × {times}", xlabel="step", ylim=(0, 1.02))
        axis.grid(axis="y", color="0.9")
    axes[0].set_ylabel("validation accuracy, sampled")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False,
                  loc="outside lower center", ncols=len(FOUR))
    return figure


def errorbar(axis, at, values_at, arm, style, apart):
    """A line through the means of the values at each place, whiskers of 95 %; the arms of FOUR a
    little apart."""
    color, line, marker = style
    shift = (FOUR.index(arm) - 1.5) * apart
    points = [(place + shift, *over_seeds(x)) for place, x in zip(at, values_at) if len(x) > 1]
    if points:
        x, means, intervals = zip(*points)
        halves = [0 if i is None else m - i[0] for m, i in zip(means, intervals)]
        axis.errorbar(x, means, halves, color=color, linestyle=line, marker=marker, capsize=3,
                      label=arm)


def draw_replay(rows, plt):
    """Distance to α = 0 against α, a line for each set of settings."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for label, (color, line, marker) in zip(EXPERIMENTS["replay"], STYLES):
        found = values(rows, "replay", label, "distance").values()
        if found:
            means = [statistics.fmean(d[str(alpha)] for d in found) for alpha in ALPHAS]
            axis.plot(ALPHAS, means, color=color, linestyle=line, marker=marker, label=label)
    axis.set(yscale="log", xlabel="α", ylabel="distance to the run with α = 0\n"
             "(share of the distance travelled)", xticks=ALPHAS,
             xticklabels=[str(alpha) for alpha in ALPHAS], ylim=(1e-6, 2))
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center",
                  ncols=2)
    return figure


def draw_reuse(rows, plt):
    """Accuracy against epochs, a panel for each learning rate, a line for each arm."""
    figure, axes = plt.subplots(1, len(TIMES), figsize=(10, 3.6), sharey=True,
                                layout="constrained")
    for axis, times in zip(axes, TIMES):
        for arm, style in zip(FOUR, STYLES):
            found = [list(values(rows, "reuse", f"{arm} | {n} | {times}").values()) for n in EPOCHS]
            errorbar(axis, range(len(EPOCHS)), found, arm, style, 0.06)
        axis.set(xticks=range(len(EPOCHS)), xticklabels=map(str, EPOCHS), ylim=(0, 1.02),
                 title=f"learning rate × {times}", xlabel="epochs per rollout")
        axis.grid(axis="y", color="0.9")
    axes[0].set_ylabel("greedy strict accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False,
                  loc="outside lower center", ncols=len(FOUR))
    return figure


FIGURES = {"arms": draw_arms, "reuse": draw_reuse, "stale": draw_stale, "replay": draw_replay}


def draw_figures(rows, folder=FOLDER):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for name, draw in FIGURES.items():
        figure = draw(rows, plt)
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)
        print(f"wrote {folder / name}.png")
