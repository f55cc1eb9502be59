"""Text that others wrote (a model, a dataset, a library's error) made fit for a terminal or a log.

`shown` is what every printed text goes through: characters that steer a terminal or hide text are
written out, and secrets are masked. `hidden_characters` finds the former where text is refused.
"""

from __future__ import annotations

import os
import re

MASK = "***"
MIN_SECRET = 8
"""Shortest value of an environment variable that is masked; "1" or "false" is no secret."""

_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|(?:^|_)KEYS?(?:_|$)", re.IGNORECASE
)
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
_ASSIGNED = re.compile(
    r"((?:(?:access|auth|api|hf)[_-]?token|secret|password|passwd|api_?key)[\"']?\s*[=:]\s*[\"']?)"
    r"(?!\*\*\*)[^\s\"',;&}\]]{8,}",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    """The text with every character but line ends that a terminal would not show written out.

    Example: printable("a\\x1b[2Jb") == "a\\\\x1b[2Jb". Escape codes, bidirectional overrides,
    zero-width characters and lone surrogates all become their Python escapes.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def redact(text: str) -> str:
    """The text with secrets masked: `user:password@` in an address, tokens of known forms, what is
    assigned to a name such as `token`, and the values of environment variables named like one.
    """
    for secret in _environment_secrets():
        text = text.replace(secret, MASK)
    text = _TOKEN.sub(MASK, _USERINFO.sub(MASK, text))
    return _ASSIGNED.sub(lambda match: match[1] + MASK, text)


def shown(text: object) -> str:
    """What may be printed of a text or an error: secrets masked, hidden characters written out."""
    return printable(redact(str(text)))


def hidden_characters(text: str) -> list[str]:
    """The distinct characters of a text that `printable` would write out, tabs excepted."""
    return sorted({char for char in text if not (char.isprintable() or char in "\n\t")})


def _environment_secrets() -> list[str]:
    """Values of secret-named variables, longest first, so that no part of one stays."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET and _SECRET_NAME.search(name)
    }
    return sorted(values, key=len, reverse=True)
