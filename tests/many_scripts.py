"""5,000 short texts in 44 scripts: letters, combining marks, digits, blanks, emoji, code, and several in one."""

import random
import unicodedata
from collections.abc import Iterator

# The code points of 44 scripts: letters, combining marks and digits.
SCRIPTS = {
    "Latin": "41-5a 61-7a c0-24f 1e00-1eff", "Greek": "370-3ff 1f00-1fff", "Cyrillic": "400-52f", "Armenian": "531-58a",
    "Hebrew": "591-5f4", "Arabic": "600-6ff 750-77f", "Syriac": "700-74f", "Thaana": "780-7b1", "NKo": "7c0-7fa",
    "Devanagari": "900-97f", "Bengali": "980-9fe", "Gurmukhi": "a01-a76", "Gujarati": "a81-aff", "Oriya": "b01-b77",
    "Tamil": "b82-bfa", "Telugu": "c00-c7f", "Kannada": "c80-cf2", "Malayalam": "d00-d7f", "Sinhala": "d81-df4",
    "Thai": "e01-e5b", "Lao": "e81-edf", "Tibetan": "f00-fda", "Myanmar": "1000-109f",
    "Georgian": "10a0-10ff 1c90-1cbf", "Hangul jamo": "1100-11ff", "Hangul": "ac00-d7a3", "Ethiopic": "1200-139f",
    "Cherokee": "13a0-13fd ab70-abbf", "Canadian": "1400-167f", "Ogham": "1680-169c", "Runic": "16a0-16f8",
    "Khmer": "1780-17f9", "Mongolian": "1800-18aa",
    "Tai Le": "1950-1974", "Balinese": "1b00-1b7e", "Tifinagh": "2d30-2d7f", "Hiragana": "3041-309f",
    "Katakana": "30a0-30ff ff66-ff9f", "Bopomofo": "3105-312f", "Han": "4e00-9fff 20000-2a6df", "Yi": "a000-a4c6",
    "Vai": "a500-a62b", "Gothic": "10330-1034a", "Adlam": "1e900-1e95f",
}  # fmt: skip
EMOJI = "🙂 👩‍🚀 👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇯🇵 1️⃣ ❤️ ☎︎ 🏴\U000e0067\U000e0062\U000e007f 🫠".split()
BLANKS = [
    " ", "  ", "    ", "\t", "\t\t ", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000", "\u2028", "\u200b",
    "\v",
]  # fmt: skip
CODE = [
    "def f(x: int = 0) -> None:\n    return x**2", "for(int i=0;i<10;++i){a[i]&=~0x1F;}", "#include <a.h>\r\n",
    '{"k": [1, 2.50e-3, null], "é": "\\u00e9"}', "SELECT * FROM t WHERE a != 'b';--", "x = y if z else\\\n\t\tw",
    "https://example.org/a?b=c%20d#e", "$\\frac{1}{2}\\alpha_{ij}$", "<a href='#'>&amp;</a>", "a->b::c<d>(e)[f]",
]  # fmt: skip
MIXED = [
    "I'm we'RE he'd they'll IT'S don’t", "1234567890 3.14 1,000,000 ½ ²³ ⅷ ٣٤ ๓", "e\u0301\u0323 a\u030a\u0301 \u0301x",
    "ﬁ Å Ω ㍿ ｱ", "\ufeffx\ufffdy\x00z\x7f", "\ue000\U0010fffd\uffff", "--==!!??...…—–",
    "_snake_case CamelCase kebab-case", "<|im_start|>user\nHi<|im_end|>\n<think>\n\n</think>", "< |im_end|> <think",
    "Ġ Ċ ▁ </w> ##x", "",
]  # fmt: skip


def characters(spans: str) -> list[str]:
    """The characters of a script that Python's Unicode knows."""
    bounds = [[int(end, 16) for end in span.split("-")] for span in spans.split()]
    points = [chr(point) for first, last in bounds for point in range(first, last + 1)]
    return [point for point in points if unicodedata.category(point) not in ("Cn", "Cs")]


def strings(each: int = 118) -> Iterator[str]:
    """`each` strings of every script: its words, alone and among digits, blanks, emoji, code and other scripts."""
    draw = random.Random(0)
    letters = {name: characters(spans) for name, spans in SCRIPTS.items()}

    def word(name: str) -> str:
        return "".join(draw.choices(letters[name], k=draw.randint(1, 7)))

    for name in SCRIPTS:
        for i in range(each):
            other = draw.choice([*EMOJI, *CODE, *MIXED, str(draw.randint(0, 10**6)), word(draw.choice(list(SCRIPTS)))])
            parts = [word(name), draw.choice(BLANKS), word(name), other if i % 2 else draw.choice(BLANKS)]
            draw.shuffle(parts)
            text = "".join(parts)
            yield unicodedata.normalize("NFD", text) if i % 5 == 0 else text


STRINGS = [*MIXED, *CODE, *EMOJI, *strings()]
