"""Hiding of passwords and tokens in everything that is stored or shown.

Programs receive an address with a password only through their environment, because `ps` shows the
command lines of all users.
"""

import re
from urllib.parse import urlsplit

_HIDDEN = "***"
"""Replaces a login or a token."""

_LOGIN = re.compile(
    r"""(?P<scheme>\b[a-z][a-z0-9+.-]*://)
    (?: (?<!http://) (?<!https://) [^\s:/]* : \S*  # databases accept / and @ in a password
      | [^\s/?\#@:]+ : (?!\d*[/?\#]) [^\s@]*  # not a host with a port
      | [^\s/?\#:@]+ : (?!//) [^@\n"'`<>/?&=]* [^@\n"'`<>/?&=:,.]  # a space in the password
      | [^\s/?\#]* ) @(?=[\w.\[-])""",
    re.IGNORECASE | re.VERBOSE,
)

_SECRET = r"""(?:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key
    |credential|signature|auth(?:[_-]?string)?|odbc_connect)"""
"""End of the name of a secret value."""

_PARAMETER = re.compile(
    rf"""(?P<name>[?&;\#] (?: [\w.-]*{_SECRET} | sig | key ) =) [^\s&;'"`\#]+""",
    re.IGNORECASE | re.VERBOSE,
)

# In a variable, a connection string, JSON, or the text of a dictionary
_ASSIGNMENT = re.compile(
    rf"""(?P<name>\b[\w.-]*{_SECRET} (?: = | (?P<mark>['"])\s*:\s* ))
    (?!{re.escape(_HIDDEN)})
    (?: (?P<quote>['"])(?:(?!(?P=quote)).)* | \{{[^}}\n]*\}} | [^\s&;,'"`)}}\]<]+ )""",
    re.IGNORECASE | re.VERBOSE,
)

_HEADER = re.compile(
    r"(?P<name>\b(?:Bearer|Basic)\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,}", re.IGNORECASE
)

_TOKEN = re.compile(r"\b(?P<kind>hf_|pnu_|pnb_)[A-Za-z0-9]{16,}")
"""Tokens of the Hub, and keys of Prefect Cloud."""


def redacted(text: str) -> str:
    """Return `text` with *** in place of logins in addresses, passwords, keys and tokens."""
    text = _LOGIN.sub(rf"\g<scheme>{_HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<name>{_HIDDEN}", text)
    text = _ASSIGNMENT.sub(lambda found: f"{found['name']}{found['quote'] or ''}{_HIDDEN}", text)
    text = _HEADER.sub(rf"\g<name>{_HIDDEN}", text)
    return _TOKEN.sub(rf"\g<kind>{_HIDDEN}", text)


def without_login(url: str) -> str:
    """Return `url` without its login, as a link for a browser, which asks for the login."""
    return _LOGIN.sub(r"\g<scheme>", url)


def host(url: str) -> str:
    """Return the host and port of `url`."""
    return urlsplit(url).netloc.rpartition("@")[2]
