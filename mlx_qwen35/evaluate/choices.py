"""What an answer says, found without a judge: a letter, a number, a few words, or the text of a page.

Where nothing is found the answer is wrong; nothing is guessed. A language model that reads answers, as published tables
use one, finds more of them, so that these scores are some points lower.
"""

import re
import string
from collections.abc import Sequence

import numpy as np

LETTERS = string.ascii_uppercase
# Where an answer announces itself; what follows the last of these is the answer.
_SAYS = re.compile(
    r'\\boxed\s*\{|"answer"\s*:|\b(?:final |correct |right |best )?(?:answer|option|choice)\b[*_ ]*(?:is|are|:|=)'
    r"(?:\s*(?:option|choice|approximately|about)\b)?",
    re.IGNORECASE,
)
_MARKS = re.compile(r"\*\*|__|`|\\\(|\\\)|\\\[|\\\]|\$|\\text\s*|\\mathrm\s*|\\[,;! ]")
_FRACTION = re.compile(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_LIST = re.compile(r"\[[^\[\]]*\]")


def said(answer: str) -> str:
    """The last thing that an answer announces as its answer, else its last line, without marks of Markdown and TeX."""
    found = [*_SAYS.finditer(answer)]
    if not found:
        lines = [line for line in answer.splitlines() if line.strip()]
        return _bare(lines[-1]) if lines else ""
    rest = answer[found[-1].end() :]
    if found[-1][0].startswith("\\boxed"):
        return _bare(_closed(rest))
    lines = [line for line in rest.splitlines() if _bare(line)]
    return _bare(lines[0]) if lines else ""


def _closed(rest: str) -> str:
    """The text in front of the brace that closes one that was opened before."""
    depth = 1
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return rest[:place]
    return rest


def _bare(text: str) -> str:
    text = _MARKS.sub("", _FRACTION.sub(r"\1/\2", text))
    return re.sub(r"^[\s:=\"'{]+|[\s\"'}]+$", "", text.replace("{", "").replace("}", ""))


def letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer chooses, "A" for the first choice; None where it is not told.

    choices: the texts of them; an answer may name one in the place of its letter. Empty texts where they are not known.
    """
    letters = LETTERS[: len(choices)]
    part = said(answer)
    # A letter alone, or in front of its text: "B", "(B)", "B.", "B) seven"
    if match := re.match(rf"\(?([{letters}])(?:\)|[.:,]|$|\s+(?=[(–-]))", part):
        return match[1]
    if (place := _named(part, choices)) is not None:
        return letters[place]
    whole = _MARKS.sub("", answer)
    alone = rf"(?<![\w'])([{letters}])(?<![AI])(?![\w'])"  # "A" and "I" are words too
    for pattern in (rf"\(([{letters}])\)", rf"(?m)^\s*([{letters}])[).:]?\s*$", alone):
        if found := re.findall(pattern, part) or re.findall(pattern, whole):
            return str(found[-1])
    return None


def _named(part: str, choices: Sequence[str]) -> int | None:
    """The choice that a text is, or the only one whose words it holds."""
    texts = [plain(choice) for choice in choices]
    if plain(part) and plain(part) in texts:
        return texts.index(plain(part))
    held = [place for place, text in enumerate(texts) if text and _holds(plain(part), text)]
    longest = [place for place in held if not any(texts[place] in texts[other] for other in held if other != place)]
    return longest[0] if len(longest) == 1 else None


def plain(text: str) -> str:
    """Without case, articles, marks at the ends and further blanks, to be compared."""
    words = _bare(text).casefold().split()
    words = words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words
    return " ".join(words).strip(string.punctuation.replace("%", "").replace("-", "") + " ")


def _holds(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def number(text: str) -> float | None:
    """The last number of a text, "1,200", "-3.5", "2e-3" and "3/4" among them; None where there is none."""
    found = [match[0] for match in _NUMBER.finditer(text) if any(sign.isdigit() for sign in match[0])]
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").replace("−", "-").partition("/")
    return float(above) / float(below) if below and float(below) else float(above)


def same_number(answer: str, right: str, places: int | None = None) -> bool:
    """Whether the number that an answer announces is the right one, rounded to so many decimal places.

    places: None: as many as `right` is written with, two at least.
    """
    found, wanted = number(said(answer)), number(right)
    if found is None or wanted is None:
        return False
    if places is None:
        places = max(2, len(right.strip().partition(".")[2]))
    return abs(found - wanted) <= 0.5 * 10.0**-places * (1 + 1e-9)


def same_list(answer: str, right: str) -> bool:
    """Whether the last list of an answer has the numbers of the right one."""
    wanted, found = _numbers(right), _numbers(answer)
    return wanted is not None and found == wanted


def _numbers(text: str) -> list[float] | None:
    written = _LIST.findall(text)
    try:
        return [round(float(one.strip(" '\"")), 6) for one in written[-1][1:-1].split(",")] if written else None
    except ValueError:
        return None


def same_text(answer: str, right: str) -> bool:
    """Whether an answer announces a number or words: the words may stand in a sentence."""
    if number(right) is not None and re.fullmatch(r"[-+−]?[\d.,]+(?:[eE][-+]?\d+)?(?:/\d+)?", right.strip()):
        return same_number(answer, right)
    words = plain(right)
    return bool(words) and _holds(plain(said(answer)), words)


# --- pages ------------------------------------------------------------------------------------------------------------

_TAKEN_OUT = (
    re.compile(r"<table.*?</table>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\\\[.*?\\\]|\$\$.*?\$\$|\\begin\{(equation|align|gather)\*?\}.*?\\end\{\1\*?\}", re.DOTALL),
    re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE),
    re.compile(r"!\[[^\]]*\]\([^)]*\)|^\s*```\w*\s*$", re.MULTILINE),
)
NEAR = 0.75  # similarity from which on a paragraph is taken for a text that does not count


def page_similarity(answer: str, blocks: Sequence[str], uncounted: Sequence[str] = ()) -> float:
    """1 - the edit distance between a page in Markdown and its text, over the longer of the two; 1 for the same text.

    blocks: of the page, in reading order. uncounted: further texts of the page, as its number; a paragraph that is one
    of them is taken out, as are tables, displayed formulas and images.
    """
    for pattern in _TAKEN_OUT:
        answer = pattern.sub("\n\n", answer)
    apart = [_joined(text) for text in uncounted]
    parts = (_joined(part) for part in re.split(r"\n\s*\n", answer))
    kept = [part for part in parts if part and not any(similarity(part, text) >= NEAR for text in apart)]
    return similarity("".join(kept), "".join(map(_joined, blocks)))


def _joined(text: str) -> str:
    """Characters alone: blanks, and marks of headings, lists and emphasis, are a matter of taste."""
    text = re.sub(r"^\s*(?:#{1,6}|[-*+>]|\d+\.(?=\s))\s*", "", text, flags=re.MULTILINE)
    return "".join(_MARKS.sub("", text).split())


def similarity(one: str, other: str) -> float:
    """1 - edit distance / length of the longer text; 1.0 for two empty ones."""
    longer = max(len(one), len(other))
    return 1.0 - edit_distance(one, other) / longer if longer else 1.0


def edit_distance(one: str, other: str) -> int:
    """Least number of characters to insert, delete or replace (Levenshtein), a row of the table at a time."""
    shorter, longer = sorted((one, other), key=len)
    signs = np.array([ord(sign) for sign in longer], np.int32)
    places = np.arange(len(longer) + 1)
    row = places
    for count, sign in enumerate(shorter, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (signs != ord(sign)))  # deletion, replacement
        # An insertion costs one more than the entry before: a running minimum, less the places.
        row = places + np.minimum.accumulate(np.concatenate(([count], best)) - places)
    return int(row[-1])
