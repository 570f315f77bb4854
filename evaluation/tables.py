"""Tables of an evaluation, in Markdown.

What it does    formats what evaluate.py summarised and compared.
What it leaves  every number to evaluate.py and intervals.py.
Where to fork   a column is an entry of the dictionary that `table` is given.
"""
from evaluation.intervals import LEAST_P
from rewards import SCORERS


def main_score(rows):
    """What a set is compared by: "math" where it has LaTeX answers, else "flexible"."""
    return "math" if "math" in rows[0] else "flexible"


def column(key, form="s"):
    """What formats a row's value of this key, with its interval where there is one: 92.0% [87.4,
    95.0]."""
    def text(row):
        value, interval = row.get(key), row.get(f"{key}_interval")
        if value is None:
            return ""
        if not interval:
            return format(value, form)
        unit, plain = (100, form.replace("%", "f")) if form.endswith("%") else (1, form)
        return f"{value:{form}} [{', '.join(format(unit * x, plain) for x in interval)}]"
    return text


WHICH = {"model": column("model"), "data": column("data"), "T": column("temperature", "g")}


def table(rows, columns):
    """A Markdown table, aligned; columns: heading -> text of a row. Empty columns are left out."""
    columns = {heading: list(map(text, rows)) for heading, text in columns.items()}
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    widths = [max(map(len, [heading, *cells])) for heading, cells in columns.items()]
    lines = [list(columns), ["-" * width for width in widths], *zip(*columns.values())]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
                     for line in lines)


def score_table(summaries):
    ks = sorted(int(key[5:]) for key in {key for s in summaries for key in s if "@" in key})
    return table(summaries, {
        **WHICH, "n": column("n_problems", "d"), "samples": column("samples", "d"),
        **{key: column(key, ".1%") for key in SCORERS}, "format": column("format", ".1%"),
        "cut": column("truncated", ".1%"), "majority": column("majority", ".1%"),
        **{f"pass@{k}": column(f"pass@{k}", ".1%") for k in ks if k > 1}})  # pass@1 is flexible


def measure_table(summaries, measures):
    return table(summaries, {**WHICH, **{heading: column(key, form)
                                         for key, (heading, form) in measures.items()}})


def seed_table(seeds):
    return table(seeds, {**WHICH, "runs": column("runs", "d"),
                         **{key: column(key, ".1%") for key in SCORERS}})


def p_value(row):
    if row["p"] is None:
        return ""
    return "≤ 0.0001" if row["p"] == LEAST_P else format(row["p"], ".2g")


def comparison_table(comparisons):
    """The scores, and all measures in which A and B differ anywhere."""
    def number(key, sign=""):
        return lambda row: format(row[key], sign + row["form"])

    def interval(row):
        ends = [format(x, row["form"]) for x in row["interval"] or ()]
        return f"[{', '.join(ends)}]" if ends else ""
    shown = [c for c in comparisons
             if c["measure"] in SCORERS or c["difference"] or c["interval"] not in (None, (0, 0))]
    return table(shown, {
        "data": column("data"), "T": column("temperature", "g"), "measure": column("measure"),
        "A": number("a"), "B": number("b"), "B − A": number("difference", "+"),
        "95 % interval": interval, "p": p_value, "verdict": column("verdict")})
