"""Captions from the web, cleaned as the reference cleans them before its text tower sees them.

What it does decides what a model was trained on, so its quirks are kept: the same rules in the
same order, the whole list twice. Some patterns are written otherwise than the reference's, with
equal results, so that a stranger's text takes time in proportion to its length.
"""

import html
import re
import urllib.parse
import warnings

import bs4
import ftfy

# Addresses, each with the parts of a site's name it knows; after a word boundary. Where a run of a
# site's letters holds no site, none of its parts does: group 1 takes the run, to be put back, up to
# a scheme, which may follow in it.
_SITE = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_WEB_ADDRESSES = [
    rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE}|((?:(?!{scheme}:)[a-zA-Z0-9.\-])+))"
    for scheme in ("https?", "www")
]
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# Group 1 takes a word without such a name, to be put back.
_FILE_NAME = rf"\S+\.(?:{_FILE_TYPES})|(\S+)"

# What goes before and after HTML is stripped: pattern, replacement.
_BEFORE_HTML = [("<person>", "person"), *((address, r"\1") for address in _WEB_ADDRESSES)]
_SYMBOLS = [
    (r"@[\w\d]+\b", ""),  # nicknames
    # CJK strokes, katakana extensions, enclosed and compatibility forms, extension A, hexagrams,
    # unified ideographs: one block
    ("[\u31c0-\u9fff]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # numbers of articles
    (r"\\n", " "),
    # "#12", "#123456", "123456"; "#1234" and "#12345" stay for what follows
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (_FILE_NAME, r"\1"),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),  # tried once for each run of spaces
]
_SHOP_TALK = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # part numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),  # j2d1a2a
    # 3x4.5, the second x being Cyrillic
    ("\\b\\d+(?:\\.\\d*)?[xх×]\\d+(?:\\.\\d*)?\\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_ENDS = [
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]
# Characters; the longest captions of real datasets have some thousands, and models read 77 tokens.
MAX_LENGTH = 50_000
_MAX_MARKUP = 5_000_000  # tags times characters: 250 tags in 20,000 characters
# What a text has in which a longer pattern can match: most texts have none of it
_DOMAIN = re.compile("[.](?:com|co|ru|net|org|edu|gov|it)|http|www:")
_HINTS = dict.fromkeys(_WEB_ADDRESSES, _DOMAIN)
_HINTS[_FILE_NAME] = re.compile(rf"\.(?:{_FILE_TYPES})")
# Text in which there is nothing to mend or to unescape
_PLAIN = re.compile("[ -%'-~]*")
# BeautifulSoup warns of captions that look like names of files or addresses
warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)


def clean(caption: str) -> str:
    """A caption in lower case without addresses, markup, CJK, shop talk and odd punctuation.

    Equal to the reference's, which is DeepFloyd IF's. The result may be empty.

    Raises:
      ValueError: markup that would take seconds to strip, such as 500 tags in 10,001 characters.
      Exception: the HTML parser passes on errors of its own.
    """
    return _clean_once(_clean_once(caption))


def _clean_once(text: str) -> str:
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _replace(text, _BEFORE_HTML)
    if "<" in text or "&" in text:  # no other text changes, and most have neither
        # Python's HTML parser reads on to the end of the text at each "<" that is not closed.
        if text.count("<") * len(text) > _MAX_MARKUP:
            raise ValueError("more markup than a caption has")
        text = bs4.BeautifulSoup(text, features="html.parser").text
    text = _replace(text, _SYMBOLS)
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    if not _PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = text.strip()
    return _replace(_replace(text, _SHOP_TALK), _ENDS).strip()


def _replace(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        hint = _HINTS.get(pattern)
        if hint is None or hint.search(text):
            text = re.sub(pattern, replacement, text)
    return text
