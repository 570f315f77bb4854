r"""Numbers as people write them, exactly: 18, -1,234.5, $18, 5/2, 2 1/2, 50%, 80k, 3 \times 10^5.

What it does    reads a text that is a number with or without a unit, and the last number of a
                longer text, as the exact quotient of two decimals; compares two of them. Also the
                authors' reading of a number, for comparison.
Not here        where in a completion the answer stands: rewards.py; Unicode in ASCII: latex.py.
Run it alone    python -m plumbing.number TEXT …     the number that each is as an answer

A number is     wrapping, sign, currency, value, scale, percent sign, unit, wrapping.
A value is      1,234.5 in groups of any usual kind · 2^{10}, and products such as 3 \times 10^5 ·
                a/b and \frac{a}{b}, also behind a whole number: 2 1/2 · 5 and a half
A scale is      million, dozen, … · k, K, M, B right behind the digits: 80k
A unit is       words, currencies and symbols that mean nothing in mathematics: 18 km/h, 72 cm^2

A text with anything else in it is no number: 5x, 2\pi, 3 + 4. So is a text that can be read in two
ways: 1,5 and 5m and 3 thirds. Such a text is unread, never guessed.

int and Fraction of Python raise above 4,300 digits and long floats compare as inf = inf; Decimal
does neither.
"""
import functools
import re
import sys
from decimal import Context, Decimal
from typing import NamedTuple

from plumbing.latex import spelled

LONGEST = 1000  # characters of a number or a `####` line, chosen; what is longer is no answer
DIGIT = re.compile("[0-9０-９¼-¾⅐-⅞𝟎-𝟿²³¹⁰-₉]")
# A gold with LaTeX's commands, powers or indices is LaTeX, \frac{14}{3} too; 3 p.m. is a time.
OTHER_GOLD = re.compile(r"\\(?![,;:$% ]|!(?! ))|\^|_(?![0-9]{3})|[0-9]\s*[ap]\.?m\b|o'clock", re.I)
EXACT = Context(prec=10 * LONGEST)  # products of numbers of LONGEST digits are not rounded


class Number(NamedTuple):
    """The exact value top / bottom, and whether a percent sign follows it."""
    top: Decimal
    bottom: Decimal
    percent: bool


# ---------------------------------------------------------------------------------- one spelling

LAYOUT = [(re.compile(pattern), usual) for pattern, usual in [
    (r"(?<=[A-Za-z])(?=\\(?:text\w*|[mh]box|math(?:rm|bf|it|sf))\s*\{)", " "),  # \circ\text{C}
    (r"\\(?:text\w*|[mh]box|math(?:rm|bf|it|sf)|operatorname|emph|underline)\s*\{([^{}]*)\}",
     r"\1"),
    (r",\\!\s", ","),
    (r"\\(?:(?:left|right|displaystyle|bf|rm|[bB]igg?[lr]?|boxed|fbox)(?![A-Za-z])|!"
     r"|(?=[$%#&_]))", ""),
    (r"\\(?:[,;:> ]|(?:q?quad|thinspace)(?![A-Za-z]))", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])", "°")]]


def plain(text):
    r"""A text in one spelling, ASCII without LaTeX's layout: \text{2 cm²} becomes 2 cm^{2}."""
    text = spelled(text)
    for pattern, usual in LAYOUT if "\\" in text else ():
        text = pattern.sub(usual, text)
    return re.sub(r"[ \t\r~]+", " ", text.replace("{,}", ","))


# ---------------------------------------------------------------------------------- the grammar

# Groups of three; Indian ones (12,34,567). What begins with 0 is no group, but a decimal comma.
GROUPED = "|".join([rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+" for mark in (",", r"\ ", "'", "_")]
                   + ["[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}"])
DECIMAL = (rf"(?:(?:(?:{GROUPED})(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{{1,2}}(?!\w))?"
           r"|\.[0-9]+)")
FACTOR = rf"{DECIMAL}(?:\s?\^\s?(?:[0-9]+|\{{\s?-?[0-9]+\s?\}}|\(\s?-?[0-9]+\s?\)))?"
PRODUCT = rf"{FACTOR}(?:\s?(?:\*\s?|[xX]\s?(?=10\s?\^)){FACTOR})*"
VALUE = re.compile(rf"""
    (?:(?P<whole>{DECIMAL})(?:\ (?:and\ )?|(?=\\frac)))?                 # the 2 of 2 1/2
    (?:\\frac\s?(?:\{{\s?(?P<minus>-?)\s?(?P<top>{PRODUCT})\s?\}}|(?P<top1>[0-9]))
       \s?(?:\{{\s?(?P<bottom>{PRODUCT})\s?\}}|(?P<bottom1>[0-9]))
      |(?![0-9]+\ [0-9])(?P<over>{FACTOR})\s?/\s?(?![0-9]+\ [0-9])(?P<under>{FACTOR}))
  | (?P<product>{PRODUCT})(?P<more>\ and\ (?:a|one)\ (?:half|quarter|fourth|third)\b)?
    """, re.VERBOSE)
NO_MARKS = str.maketrans("", "", ", '_")
POWER = re.compile(rf"(?P<base>{DECIMAL})(?:\s?\^[\s{{(]*(?P<power>-?[0-9]+))?", re.VERBOSE)
CODES = "USD EUR GBP CNY RMB JPY INR CAD AUD CHF KRW HKD SGD NZD RUB MXN BRL ZAR SEK NOK PLN"
MONEY = (r"(?:(?:US|CA|AU|HK|NZ|[ACS])?\$|[¢£¥€₩₽₹₪₫₱₺฿]|Rs\.?|"
         rf"(?:{CODES.replace(' ', '|')})(?![A-Za-z]))")
OPEN = r"""(?:[\x00-\x20\s$*_`"'(\[{=【「]|\#(?!\#)|\\[(\[])*"""
HEAD = re.compile(rf"""{OPEN}(?P<sign>[-+]|(?:negative|minus)\s)?{OPEN}
                       (?P<money>{MONEY}\s?)?(?P<sign2>[-+])?""", re.VERBOSE | re.IGNORECASE)
CLOSE = " $*_`\"'】」,;|\\"
SCALES = {"dozen": Decimal(12)} | {word: Decimal(10) ** zeros for words, zeros in [
    ("hundred", 2), ("thousand k", 3), ("lakh", 5), ("million m mn", 6), ("crore", 7),
    ("billion b bn", 9), ("trillion t", 12), ("万 萬 만", 4), ("亿 億 억", 8)]
    for word in words.split()}
SCALE = re.compile(r"\s?(?:(dozen|hundred|thousand|lakh|million|crore|billion|trillion)s?"
                   r"(?![A-Za-z-])|([万萬만亿億억]))", re.IGNORECASE)
LETTER = re.compile(r"([kKMB])(?![A-Za-z0-9])")  # not m: 5m may be 5 metres
LETTER_OF_MONEY = re.compile(r"\s?([kKmMbBtT]|mn|bn)(?![A-Za-z0-9])")  # $2.5m
PERCENT = re.compile(r"\s?(?:%|per\s?cent(?:age)?(?:\ points?)?\b|pct\b)", re.IGNORECASE)
COINS = re.compile(rf"""({DECIMAL})(\ (?:dollars?|euros?|pounds?|bucks?))?
    ,?(?:\ and)?\ ([0-9]{{1,2}})\ ?(?:cents?|pence|¢)""", re.VERBOSE | re.IGNORECASE)

# ---------------------------------------------------------------------------------- units

LATIN = "A-Za-zÀ-ÖØ-öø-ɏḀ-ỿЀ-ԯ"  # and Cyrillic; Greek letters are mathematics
# Letters without capitals (个, 원), of which a single one is a word; not half, and no digits.
HAN = ("(?:(?!半|分之|(?<=分)之)[\u0590-\u065f\u066e-\u06ef\u06fa-\u07bf\u0900-\u0965\u0970-\u10ff"
       "\u1100-\u1c7f\u3040-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff])")
UNITS = ("km cm mm nm kg kgs mg ml cl dl cc ft in yd yds mi lb lbs oz hr hrs min mins sec secs wk "
         "wks mo yr yrs mph kph kmh kmph rpm mpg sq cu gal pt pts qt qts tsp tbsp pcs kb mb gb tb "
         "kw kwh hz khz mhz ghz kj kcal cal am pm μm μg μl μs deg day mile foot inch cup")
SHORT = "of to or be do go at on is it we he an as so by my us up if per dvds? cds? tvs?"
# Words of mathematics and of numbers: 5 pi, 5 squared, 5 dozen, 5 hundred thousand.
BEYOND = ("pi sin cos tan cot csc ln log exp sqrt root mod squared cubed factorial choose plus "
          "minus inf infinity alpha beta gamma delta theta lambda sigma omega phi psi rho tau mu "
          "nu abc xyz uvw half halves quarter dozens? hundreds? thousands? lakhs? crores? "
          r"\w*illions? \w*illi?[oó]n(?:en|es) mil mille mio mln mrd tausend grand gross score "
          r"myriad bil trill lacs? doz mega giga kilo permille milh\w+ milliard\w* miljo\w* milyon "
          r"juta ribu duizend tusen tys\w* doubled tripled halved itself remainder zero negative "
          r"тыс млн млрд тысяч\w* миллион\w* "
          "(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
          r"\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)(?!-(?:dollar|cent|pound|day))")
# Shares, right behind a number: 3 thirds, 1 third of it; but 5 (third graders) are five.
ORDINAL = ("(?:third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|"
           "(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)tie|hundred|thousand|"
           "[mbt]r?illion)th)")
SHARES = rf"quarters\s+of {ORDINAL}s {ORDINAL}(?![\s-]grade)"


def any_of(words):
    return rf"(?:(?i:{words.replace(' ', '|')})(?![{LATIN}]))"


CARET = r"(?:\s?\^\s?(?:[23]|\{\s?-?[123]\s?\}))?"  # of cm^2, s^{-1}
EXPONENT = rf"(?:[23](?![0-9])|{CARET})"  # of m3, too
WORD = rf"""(?!{any_of(BEYOND)})(?:
        {any_of(UNITS)}{EXPONENT} | {any_of(SHORT)} | (?=[{LATIN}]*[aeiouyAEIOUYÀ-ԯ])[{LATIN}]{{3,}}
      | [Ѐ-ԯ]{{2,}} | (?:[A-Z]\.){{2,}} | [A-Z]{{2,4}}s?(?=\ [a-z]{{3}})      # руб, U.S., DS games
      | [ap]\.\ ?m | [{LATIN}]{{1,2}}(?=-(?!{any_of(BEYOND)})[a-z]{{3}})      # p.m., t-shirts
    )(?:['-][{LATIN}]+)*\.?{CARET}"""
LETTER_UNIT = (rf"[mgLlhsмгс](?![{LATIN}'])(?!\s[A-Za-z](?![A-Za-z])){EXPONENT}"  # not in m h g
               r"(?!\s(?i:dollar|euro|pound))")
# What may stand right behind the digits, and what must not.
BEHIND = re.compile(rf"""
    (?!\s?(?:{any_of(SHARES)} | [十百万萬亿億만억多余餘几幾成折又] | 千(?![米克瓦])))
    (?:-?(?={any_of(UNITS)} | [{LATIN}]{{4}} | [Ѐ-ԯ]{{2}}){WORD}              # 18km, 18-year-old
      | (?:[*_"')\]}}$]|\\[)\]])+(?=[\s.,]|$))?                               # **18** eggs
    """, re.VERBOSE)
UNIT = re.compile(rf"""
    (?<=[{LATIN}.])\s?/\s?{LETTER_UNIT} | /\s?{WORD}                          # km/h, 18/hour
  | (?<=[\s(\[,;:"'&*_-])(?:{WORD} | {LETTER_UNIT} | [aI](?=\ [a-z]{{2}}))     # eggs, m, a day
  | °\s?[CF]?(?![A-Za-z]) | {HAN}+{CARET} | {MONEY} | [☀-➿🌀-🫿\ufe0f]+
  | [\s,;:()\[\]'"&]+ | \\[)\]] | -(?=\s) | (?<=\s)[*_]+(?=[{LATIN}]{{3}}) | [*_}}]+(?=[\s.,]|$)
    """, re.VERBOSE)


def is_unit(text, at):
    """Whether what stands in a text from `at` on, behind a value, is nothing, a unit, or words."""
    found = BEHIND.match(text, at)
    while found and found.end() < len(text):
        found = UNIT.match(text, found.end())
    return found is not None


# ---------------------------------------------------------------------------------- reading

TAGS = re.compile(r"\A\s*<([^<>]*)>\s*\Z|</?(?:number|answer)>")  # the prompt shows "#### <number>"
ONE = Decimal(1)


def product(text):
    """(top, bottom) of a product of decimals and their powers, 3*10^5; None for a monster."""
    top, bottom, size = ONE, ONE, 0
    for factor in POWER.finditer(text or ""):
        digits, power = factor["base"].translate(NO_MARKS), factor["power"] or "1"
        if len(power) > 4:
            return None
        base, power = Decimal(digits), int(power)
        size += (len(digits) + 99 * ("e" in digits.lower())) * abs(power)
        if size > LONGEST or (not base and power <= 0):
            return None
        if power > 0:
            top = EXACT.multiply(top, base if power == 1 else EXACT.power(base, power))
        elif power < 0:
            bottom = EXACT.multiply(bottom, EXACT.power(base, -power))
    return top, bottom


def quotient(value):
    """(top, bottom) of a match of VALUE, or None where it has no value or two."""
    over = product(value["product"] or value["top"] or value["top1"] or value["over"])
    if over and not value["product"]:
        under = product(value["bottom"] or value["bottom1"] or value["under"])
        if not under or not under[0]:
            return None
        over = EXACT.multiply(over[0], under[1]), EXACT.multiply(over[1], under[0])
    if over and value["whole"]:  # of 2 3/2 and 2.5 1/2 nobody knows what is meant
        parts = "".join(filter(None, value.groups()))
        if not 0 < over[0] < over[1] or re.search("[.eE]", parts.replace("and", "")):
            return None
        over = EXACT.add(EXACT.multiply(product(value["whole"])[0], over[1]), over[0]), over[1]
    if over and value["more"]:  # 5 and a half
        parts = Decimal({"half": 2, "third": 3}.get(value["more"].rpartition(" ")[2], 4))
        over = EXACT.add(EXACT.multiply(over[0], parts), over[1]), EXACT.multiply(over[1], parts)
    return (-over[0], over[1]) if over and value["minus"] else over


def scaled(text, at, pattern):
    """(factor, end) of the scale words from `at` on, or of one letter: 3 million, 80k."""
    factor, found = ONE, SCALE.match(text, at) or (pattern and pattern.match(text, at))
    while found and factor < 10**9:
        factor = EXACT.multiply(factor, SCALES[found[found.lastindex].lower()])
        at = found.end()
        found = SCALE.match(text, at)
    return factor, at


@functools.lru_cache(maxsize=4096)
def read_number(text, letters=True):
    """The Number that a text is as a whole, with or without a unit, or None: -$1.5 million, 18 cm².

    letters: whether 80k is 80,000. (In a gold of a set with LaTeX it is 80·k.)
    """
    if len(text) > LONGEST or not DIGIT.search(text):
        return None
    text = TAGS.sub(lambda m: m[1] or "", text)
    text = plain(text).replace("\n", " ")
    formula = text.rstrip(" .*").endswith("$")
    text = text.rstrip(CLOSE)
    if text.endswith(".") and text[-2:] != "..":
        text = text[:-1].rstrip(CLOSE)
    head = HEAD.match(text)
    at, money = head.end(), head["money"] or "$" in head[0] and not formula
    coins, found = COINS.fullmatch(text, at), VALUE.match(text, at)
    if coins and (coins[2] or money):  # 18 dollars and 50 cents
        top, bottom, at = Decimal(coins[1].translate(NO_MARKS)), ONE, len(text)
        top = EXACT.add(top, Decimal(coins[3]).scaleb(-2))
    elif value := found and quotient(found):
        letter = LETTER_OF_MONEY if money else LETTER if letters else None
        factor, at = scaled(text, found.end(), letter)
        top, bottom = EXACT.multiply(value[0], factor), value[1]
    else:
        return None
    percent = PERCENT.match(text, at)
    in_brackets = re.search(r"(?<!\\)[(\[]", head[0])  # (1,234) is a pair, an interval or a number
    two_ways = found and (found["over"] and not found["whole"]
                          or re.search(r"[*^xX]", found["product"] or ""))  # 20/5% is 4% or 400
    if (head["sign"] and head["sign2"]
            or in_brackets and "," in re.split(r"[)\]]", text, maxsplit=1)[0]
            or percent and two_ways
            or not is_unit(text, percent.end() if percent else at)):
        return None
    negative = (head["sign"] or head["sign2"] or "+")[0] in "-nNmM"  # -, negative, minus
    return Number(-top if negative else top, bottom, bool(percent))


def gold_number(gold, letters=False):
    """The Number that a gold is as a whole, with or without a unit; None for any other gold."""
    return None if OTHER_GOLD.search(gold) else read_number(gold, letters)


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


# ---------------------------------------------------------------------------------- the last number

# These join two numbers: neither of 3 and 4, 3 to 4, 12 divided by 4 is read.
JOINT = re.compile("and|or|plus|minus|times|over|to|by|divided|multiplied|of|out|in|for|less|than|"
                   "per|remainder", re.IGNORECASE)
TOKEN = re.compile(rf"""
    (?P<end>[;] | (?<![.A-Z])[.?](?=\s|$) | ,(?=\s*[^\W\d_]) | (?<=[^\W\d_]),  # not of 3, 5
      | (?<!\s):(?=\s|$) | (?<=[^\d\s]): | \|(?=\s|$) | (?<=\s)\| | —(?!\d)
      | >> | </?\|?\w+\|?>)
  | (?P<equals>[=-]{{1,3}}> | (?<![!<>])=+ | \\(?:approx|implies|to|[rR]ightarrow)(?![A-Za-z]))
  | (?P<command>\\[A-Za-z]+)
  | (?P<word>(?<![{LATIN}])(?!{MONEY}[0-9])(?:m(?=\s?\^)|[{LATIN}][{LATIN}0-9_]*)(?:['-][{LATIN}]+)*
      (?:(?:(?<=[{LATIN}][{LATIN}])|(?<=[/\s]m)|(?<=/[sh]))\s?\^\s?\{{?-?[0-9]+\}}?)?)
  | (?P<han>{HAN}+)
  | (?P<number>[0-9]+)""", re.VERBOSE)
TIME = r"(?:weeks?|days?|hours?|hrs?|h|minutes?|mins?|seconds?|secs?|years?|months?)"
LENGTH = r"(?:yards?|feet|foot|ft|inch(?:es)?|in|meters?|metres?|centimet(?:er|re)s?|cm|km|m|')"
WEIGHT = r"(?:pounds?|lbs?|ounces?|oz|kilograms?|kg|grams?|g)"
MORE = r"[\s,]+(?:and\s+)?[0-9.]+\s?"
TWO_PARTS = re.compile(rf"""(?<![0-9.,$-])(?:(?:negative|minus)\s)?[-$]{{0,2}}[0-9][0-9.,]*(?:
    \s?{TIME}{MORE}{TIME}|\s?{LENGTH}{MORE}{LENGTH}|\s?{WEIGHT}{MORE}{WEIGHT}
    |(?:\s(?:dollars?|euros?|pounds?|bucks?))?{MORE}(?:cents?|pence|¢))(?![A-Za-z])
    """, re.VERBOSE | re.IGNORECASE)  # 18 dollars and 50 cents; 2 hours and 30 minutes
NO_BOUNDARY = re.compile(rf"negative\b|{any_of(BEYOND)}|[{LATIN}]?(?![{LATIN}])", re.IGNORECASE)
HALF = re.compile(r"(?:半| and (?:a|one) (?:half|quarter|third))?")  # 5 hours and a half
NOTHING = "\ufffd"  # a phrase that is no number, and what a cut line begins or ends with


def last_phrase(line, to_end=False):
    """The last number of a line and what belongs to it, from the words before to the first word
    behind, or to_end: "it is 3 + 18 cm^2 in all" gives " 3 + 18 cm^2". None without a number."""
    words = start = 0  # where the words before end; where the number begins
    phrase = stop = None  # where what is returned begins and ends
    number = before = None  # the last number; the kind of the token before
    equals = dash = False  # whether a = stands before: behind it a minus sign is no dash
    for token in TOKEN.finditer(line):
        kind, text = token.lastgroup, token[0]
        if kind == "word" and before in ("number", "joint") and JOINT.fullmatch(text):
            kind = "joint"
        elif kind == "number":
            gap = line[number.end():token.start()] if before == "number" else ""
            if gap.isspace():  # 3 18 are two numbers; 3 000 and 3 1/2 are one
                one = len(text) == 3 or line[token.end():token.end() + 2].strip()[:1] in ("/", ".")
                start = words if one else token.start()
            phrase, stop, number, dash = start, None, token, not equals
        elif kind in ("end", "han") or (kind == "word" and not NO_BOUNDARY.match(text)
                                        and not line.startswith("(", token.end())):  # not f(5)
            if stop is None and not to_end:
                stop = token.start() if kind == "end" else HALF.match(line, token.end()).end()
            start = words = token.end()
            equals = False
        elif kind == "equals":  # of 18 = 9 + 9 the right side is read, of 18 = x nothing
            start, words, equals = token.end(), token.end(), True
        before = kind
    if phrase is None:
        return None
    for parts in TWO_PARTS.finditer(line):
        if parts.start() <= number.start() < parts.end():
            phrase = parts.start()
    found = line[phrase:stop]
    if (phrase and re.match(rf"[{LATIN}][-+*_/]", line[phrase - 1:])
            or dash and re.match(r"\s*[-+]\s|\s+\*\s", found)):
        return NOTHING  # cost-18, cost - 18, cost * 18
    return found


def last_number(text):
    """The last number of a text; None without one, or where mathematics stands around it.

    The line with the last digit is read, LONGEST characters on either side of that digit. A line
    whose digits all belong to units and names is passed over, for 2 * LONGEST characters at most.
    """
    backwards = text[::-1]
    digit = DIGIT.search(backwards)
    first = len(text) - digit.end() - 2 * LONGEST if digit else 0
    while digit and len(text) - digit.end() >= first:
        last = len(text) - digit.end()
        begin = max(text.rfind("\n", 0, last) + 1, last - LONGEST)
        end = text.find("\n", last) if "\n" in text[last:last + LONGEST] else last + LONGEST
        line = text[begin:end]
        if begin and text[begin - 1] != "\n":
            line = NOTHING + line
        if end < len(text) and text[end] != "\n":
            line += NOTHING
        line = plain(line)  # ½ becomes eleven characters
        phrase = last_phrase(line) if len(line) <= 4 * LONGEST else NOTHING
        if phrase is not None:
            return read_number(phrase)
        digit = DIGIT.search(backwards, len(text) - begin)
    return None


# What may stand before a box: nothing, words, =, a bracket, Markdown, and a minus sign behind =.
BEFORE_BOX = re.compile(r"(?:(?:^|[=($:])\s*(?P<minus>-)|(?:^|[\s=:($\[>]|[^\x00-\x7f]))$")
MATHEMATICS = re.compile(r"(?:[-+*/^_]|\\[A-Za-z]+)$")  # 2 + \boxed{3}
# What may stand behind it: the end, of a sentence too, other words in brackets, another number.
BEHIND_BOX = re.compile(r"\s*(?:[.,;:!?=|—(\[]|\\[\])]|\\(?:black)?square|$)|\s+[0-9$]")


def boxed_number(before, box, behind):
    r"""The Number in a box, with what stands on its line: -18, 80,000 and 2,000,000 of -\boxed{18},
    \boxed{80}k and \boxed{2} million; None of 2\boxed{5} and \boxed{5}x."""
    before, behind = plain(before[-LONGEST:]), plain(behind[:LONGEST])
    before = re.sub(r"(?:(?:\\(?:text|math)[a-z]*\s*)?\{)+$|(?<!\S)[*_]+$", "", before)  # **18
    start = BEFORE_BOX.search(before)
    if not start or not start["minus"] and MATHEMATICS.search(before.rstrip("\\([ ")):
        return None
    behind = re.sub(r"^(?:\s*[})\]$])*[*_]*(?=[\s.,;:!?]|$)", "", behind)
    if re.match(r"\s*[-+*/]", behind):
        return None
    number = read_number(box) or read_number(last_phrase(plain(box[:LONGEST]), to_end=True) or "")
    if number and not BEHIND_BOX.match(behind):
        found = re.match(r"(\s*\S+)(\s+[A-Za-z]\S*)?", behind)
        for words in (found[1], found[0]):
            if read_number("7" + words) == (7, 1, False):  # a unit, or a word: it changes nothing
                break
            if scaled_number := read_number(box + words):
                number = scaled_number
                break
        else:
            return None
    negative = number and start["minus"]
    return number._replace(top=-number.top) if negative else number


# ---------------------------------------------------------------------------------- the authors'

PAPER_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+"
PAPER_LINE = re.compile(rf"\$?(-?(?:{PAPER_DIGITS}))(?:/([0-9]+))?(%?)")
PAPER_NUMBER = re.compile(rf"-?(?:{PAPER_DIGITS})")


def paper_number(text):
    """The number that the authors' scorer sees in a completion or a gold: a Decimal or None.

    The first `####` line, to its end, as number, a/b or percentage (50% is 0.5), else the last
    number of the whole text. A gold \\frac{14}{3} is therefore 3. For comparison only.
    """
    line = PAPER_LINE.fullmatch(text.partition("####")[2].partition("\n")[0][:LONGEST].strip())
    if line and Decimal(line[2] or 1):
        divisor = Decimal(line[2] or 1) * (100 if line[3] else 1)
        return Decimal(line[1].replace(",", "")) / divisor
    last = max(text.rfind(digit) for digit in "0123456789")
    start, number = max(0, last - LONGEST), None
    for number in PAPER_NUMBER.finditer(text[start:last + LONGEST]) if last >= 0 else ():
        pass
    if number and (start == 0 or number.start() > 0):  # else it is too long
        return Decimal(number[0].replace(",", ""))
    return None


if __name__ == "__main__":
    for text in sys.argv[1:]:
        found = read_number(text)
        print(f"{text!r}: {as_text(found) if found else 'no number'}")
