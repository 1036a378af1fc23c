"""CaseOps: text whose capital letters are operators before lower-case letters, and the exact way back.

The transform of the public records, `lossless_caps_caseops_v1`. It knows the case of ASCII letters alone, which changes
no number of bytes. Operators of the text itself are escaped; so is U+2581, which SentencePiece would take for a space.
"""

import re

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = ("\ue001", "\ue002", "\ue003", "\ue004")
SPACE_MARK, ESCAPED_MARK = "\u2581", "_"  # U+2581 is spelled ESC _, any operator ESC and itself
ENCODE = re.compile("[A-Z][A-Za-z]*|[\ue001-\ue004\u2581]")  # the rest of a run of letters from its first capital on
DECODE = re.compile("\ue004(.?)|\ue002([a-z]*)|[\ue001\ue003]([a-z]?)", re.DOTALL)
CAPITAL = re.compile("[A-Z]")


def encode(text: str) -> str:
    """The text without ASCII capitals. A run of letters in capitals is ALLCAPS and the run, a capital at the start of a
    run TITLE and the letter, any other CAPNEXT and the letter."""
    return ENCODE.sub(_encode_run, text)


def decode(text: str) -> str:
    """The inverse of encode. Operators before nothing that they apply to, which only a model writes, are dropped."""
    return DECODE.sub(_decode_run, text)


def _encode_run(match: re.Match) -> str:
    run, text, start = match[0], match.string, match.start()
    if not run.isascii():
        return ESC + (ESCAPED_MARK if run == SPACE_MARK else run)
    begins = not (start and "a" <= text[start - 1] <= "z")
    if begins and len(run) > 1 and run.isupper():
        return ALLCAPS + run.lower()
    first = TITLE if begins else CAPNEXT
    return first + run[0].lower() + CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), run[1:])


def _decode_run(match: re.Match) -> str:
    escaped, run, letter = match.groups()
    if escaped is not None:
        return SPACE_MARK if escaped == ESCAPED_MARK else escaped
    return (run or letter or "").upper()
