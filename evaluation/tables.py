"""Tables of an evaluation, in Markdown.

What it does    formats what evaluate.py summarised and compared; each function is a table.
Not here        the numbers: summaries.py and intervals.py.
Where to fork   a column is an entry {heading: (key of a row, format)}.
"""
from evaluation.intervals import LEAST_P
from rewards import SCORERS

WHICH = {"model": ("model", "s"), "data": ("data", "s"), "T": ("temperature", "g")}


def main_score(rows):
    """The score that a set is compared by: "math" where it has LaTeX answers, else "flexible"."""
    return "math" if "math" in rows[0] else "flexible"


def cell(row, key, form):
    """The text of row[key], with its interval where there is one: "92.0% [87.4, 95.0]"."""
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None:
        return ""
    if not interval:
        return format(value, form)
    unit, plain = (100, form.replace("%", "f")) if form.endswith("%") else (1, form)
    return f"{value:{form}} [{', '.join(format(unit * x, plain) for x in interval)}]"


def table(rows, columns):
    """The table of these rows (dicts); columns: {heading: (key, format)}."""
    return table_of_texts([{heading: cell(row, key, form)
                            for heading, (key, form) in columns.items()} for row in rows])


def table_of_texts(rows):
    """The table of rows {heading: text}, all with the same headings; empty columns are left out."""
    headings = [heading for heading in (rows[0] if rows else ()) if any(r[heading] for r in rows)]
    widths = [max(len(text) for text in (h, *(row[h] for row in rows))) for h in headings]
    lines = [headings, ["-" * width for width in widths],
             *([row[heading] for heading in headings] for row in rows)]
    return "\n".join("| " + " | ".join(t.ljust(w) for t, w in zip(line, widths)) + " |"
                     for line in lines)


def score_table(summaries):
    ks = sorted(int(key[5:]) for key in {key for s in summaries for key in s if "@" in key})
    return table(summaries, {
        **WHICH, "n": ("n_problems", "d"), "samples": ("samples", "d"),
        **{key: (key, ".1%") for key in SCORERS}, "format": ("format", ".1%"),
        "cut": ("truncated", ".1%"), "majority": ("majority", ".1%"),
        **{f"pass@{k}": (f"pass@{k}", ".1%") for k in ks if k > 1}})  # pass@1 is flexible


def measure_table(summaries, measures):
    """measures: {key: (heading, format)}."""
    return table(summaries, {**WHICH, **{heading: (key, form)
                                         for key, (heading, form) in measures.items()}})


def seed_table(seeds):
    return table(seeds, {**WHICH, "runs": ("runs", "d"), **{key: (key, ".1%") for key in SCORERS}})


def p_value(row):
    if row["p"] is None:
        return ""
    return "≤ 0.0001" if row["p"] == LEAST_P else format(row["p"], ".2g")


def comparison_table(comparisons):
    """The table of the scores, and of all measures in which A and B differ anywhere."""
    rows = []
    for c in comparisons:
        if c["measure"] in SCORERS or c["difference"] or c["interval"] not in (None, (0, 0)):
            form = c["form"]
            ends = ", ".join(format(x, form) for x in c["interval"] or ())
            rows.append({"data": c["data"], "T": format(c["temperature"], "g"),
                         "measure": c["measure"], "A": format(c["a"], form),
                         "B": format(c["b"], form), "B − A": format(c["difference"], "+" + form),
                         "95 % interval": f"[{ends}]" if ends else "", "p": p_value(c),
                         "verdict": c["verdict"]})
    return table_of_texts(rows)


def verdict_lines(a, b, comparisons):
    """One line for each set and temperature: what the comparison of accuracies shows. a, b: the
    names of the two sides."""
    lines = []
    for c in comparisons:
        if c["measure"] in SCORERS:
            between = "" if c["interval"] is None else " [{:+.1f}, {:+.1f}]".format(
                *(100 * x for x in c["interval"]))
            p = f", p {p_value(c)}" if c["p"] is not None else ""
            lines.append(f"{c['data']}, T {c['temperature']:g}: {c['verdict']}: "
                         f"{c['measure']} {c['a']:.1%} of {a}, {c['b']:.1%} of "
                         f"{b}, {100 * c['difference']:+.1f} points{between}{p}")
    return lines
