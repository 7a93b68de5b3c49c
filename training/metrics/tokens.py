"""Splits captions into words like the COCO caption evaluation, without Java.

The evaluation server runs Stanford's PTBTokenizer (CoreNLP 3.4.1) and then drops punctuation. These rules follow the
Penn Treebank as that tokenizer applies it to English captions: clitics are split off ("it 's", "is n't"), words with
hyphens or slashes are not split, an abbreviation keeps its full stop, brackets get names. The rules were derived by
comparison with that tokenizer's output on COCO's captions; the tests contain some of these captions. As in a lexer, the
longest match of all rules is used; if several matches are equally long, the first rule wins. Characters outside English
(emoji, combining marks, new scripts) follow the tables of ``characters.py``, which were made with that tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from blip2edge.training.metrics.characters import DELETED, LETTERS, SIGNS

DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that are dropped. Names of brackets are listed in capitals, but the tokenizer gives them in lower case, so the
evaluation does not drop them."""

# Words that keep their full stop: titles, days, months, states, companies.
_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif "
    "capt cf cie cmdr cols? colo comdr conn corp cos? cpl ct dak dec dept det drs? elec ens esq est etc ext feb "
    "fla fri ft ga gen govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt ltd maj mar "
    "md messrs mfg mich minn mlle mme mon? mont mrs? ms msgr mtg? natl neb nev nov oct okla penn pfc ph "
    "plc pres profs? pte ptys? pvt rd reps? rev rt sens? seq? sept? sfc sgt spc sq sr ste? supts? sys tel tenn "
    "thu thurs treas tues? univ va vs vt wed wis wisc wm wyo"
)
_CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # abbreviations only with a capital letter: "ore" is a word
_BEFORE_NUMBERS = "art ca figs? nos? op pp prop"  # abbreviations only before a number: "no. 7"
# Words that begin a sentence: a letter before them ("vitamin C. The …") is no initial, and loses its full stop.
_OPENERS = (
    "A About According After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other Our "
    "She Since So Some Such That The Their Then There These They This We What When While Yet You"
)


def _ranges(table: str) -> Iterator[tuple[int, int]]:
    """Yields (first, last), the code points of each range in a table."""
    for part in table.split():
        first, _, last = part.partition("-")
        yield int(first, 16), int(last or first, 16)


def _class(table: str) -> str:
    """Returns a table's ranges as the inside of a character class of a regular expression."""
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in _ranges(table))


_SEPARATOR = "\x1c"  # white space, and in no rule
_DELETED = re.compile(f"[{_class(DELETED)}\U00010000-\U0010ffff]")
_SOFT_HYPHEN = "\xad"  # vanishes inside a word, and is dropped as a hyphen elsewhere

_L = rf"(?:[^\W\d_{_class(SIGNS)}]|[{_class(LETTERS)}])"  # a letter
_W = rf"(?:[^\W_{_class(SIGNS)}]|[{_class(LETTERS)}])"  # a letter or digit
_APOS = "['’‘]"
_END = rf"(?!{_W})"  # the word ends here


def _one_of(words: str) -> str:
    return f"(?:{words.replace(' ', '|')})"


_RULES = tuple(
    re.compile(rule, re.IGNORECASE)
    for rule in (
        # An HTML tag, a web or e-mail address, a user name.
        r"<[/!?]?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>",
        r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},;:\-]",
        r"www\.[^\s\"<>|()]+[^\s\"<>|.!?(){},;:\-]",
        r"[a-z0-9][^\s\"<>|()\\@]*@[^\s\"<>|()\\@.,]+(?:\.[^\s\"<>|()\\@.,]+)*",
        r"[@#][a-z_][a-z0-9_]*",
        # Words that contain an apostrophe, and clitics.
        rf"{_L}+n{_APOS}ts?{_END}",
        rf"n{_APOS}t{_END}",
        rf"{_APOS}(?:[smd]|re|ve|ll){_END}",
        rf"{_APOS}n{_APOS}",
        rf"{_APOS}(?:n|em|cause|till?|tis|twas|[2-9]0s){_END}",
        rf"(?:[dol]|(?-i:[A-HJ-XZ])){_APOS}{_L}{_W}+(?:[-_]{_W}+)*",
        rf"(?:ma{_APOS}am|cap{_APOS}n|s{_APOS}mores){_END}",
        rf"y{_APOS}(?={_L})",
        rf"{_L}+[aeiouy]{_APOS}[aeiou]{_L}*",
        # Abbreviations and initials.
        rf"{_one_of(_ABBREVIATIONS)}\.",
        rf"(?-i:{_one_of(_CAPITAL)}|{_one_of(_CAPITAL.upper())})\.",
        rf"{_one_of(_BEFORE_NUMBERS)}\.(?=\s?\d)",
        rf"{_L}\.(?!\s+(?-i:{_one_of(_OPENERS)}){_END}(?!\.)){_END}",
        rf"(?:{_L}(?:\.{_L})+|ph\.d)\.{_END}",
        # Numbers, and words joined by hyphens, slashes, full stops or an ampersand.
        r"\d+ \d+/\d+",
        r"[-+]?\d*(?:[.:,]?\d+)+",
        rf"\d*(?:[.,]?\d+)+(?:[-_/]{_W}+)+",
        rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)+",
        rf"{_W}+(?:[-_/]{_W}+)*",
        r"(?-i:[A-Z]+&[A-Z]+)",
        r"c\+\+|[cf]#",  # programming languages
        # Everything else: punctuation, emoticons, single signs.
        r"(?-i:US)\$",
        r"\(\d{3}\) ?\d{3}-\d{4}",
        r"[!?]{2,}",
        r"\*+|_+|<<|>>|\^_\^",
        r"\.{3,}",
        r"-{2,}",
        r"[:;=]-?[()dp]" + _END,
        r"&(?:amp|quot|lt|gt);",
        r"``|''",
        r"\S",
    )
)
_PLAIN = re.compile(r"[a-z]+(?=[ ,;]|$)")  # most words; no other rule matches a longer text at such a word

_TWO_WORDS = {  # the length of the first of two words written as one
    "cannot": 3,
    "gonna": 3,
    "wanna": 3,
    "gotta": 3,
    "gimme": 3,
    "lemme": 3,
    "'tis": 2,
    "'twas": 2,
}
_NOT = re.compile("n't(?:s?)$")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("’‘‛‹›\x91\x92", "'"),
        **dict.fromkeys("“”«»\x93\x94", '"'),
        **dict.fromkeys("–—―\x96\x97", "--"),
        **dict.fromkeys("€₠¤\x80", "$"),
        "£": "#",
        "…": "...",
        "¼": "1/4",
        "½": "1/2",
        "¾": "3/4",
        "⅓": "1/3",
        "⅔": "2/3",
    }
)
_NAMES = {
    '"': "''",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "&amp;": "&",
    "&quot;": "''",
    "&lt;": "<",
    "&gt;": ">",
    "¢": "cents",
}


def _written(token: str) -> list[str]:
    """Returns the tokens of one match, in lower case: a bracket becomes its name, some matches become two words."""
    token = token.lower().translate(_SIGNS)
    if token in _NAMES:
        return [_NAMES[token]]
    if not token.strip("-") and len(token) > 1:
        return ["--"]
    if not token.strip("."):
        return ["..."] if len(token) > 1 else ["."]
    cut = _TWO_WORDS.get(token, 0)
    negation = _NOT.search(token)
    if negation is not None:
        cut = negation.start()
    if cut:
        return [token[:cut], token[cut:]]
    return [token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0")]


def tokens(text: str) -> list[str]:
    """Splits a text into tokens, punctuation included. Opening and closing quotation marks give the same token.

    Args:
        text: One line of English.

    Returns:
        Tokens in lower case.
    """
    text = _DELETED.sub(_SEPARATOR, text.replace(_SOFT_HYPHEN, ""))
    found: list[str] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        plain = _PLAIN.match(text, at)
        if plain is not None:
            end = plain.end()
        else:
            end = max(match.end() for rule in _RULES if (match := rule.match(text, at)) is not None)
        found += _written(text[at:end])
        at = end
    return found


def words(caption: str) -> str:
    """Returns the words of a caption, without punctuation, separated by spaces.

    Args:
        caption: A caption; line ends count as spaces.

    Returns:
        The text that the scores compare; empty if the caption has only punctuation.
    """
    return " ".join(token for token in tokens(caption) if token not in DROPPED)


def all_words(captions: Iterable[str]) -> list[str]:
    """Applies :func:`words` to several captions."""
    return [words(caption) for caption in captions]
