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
      | [^\s/?\#]* ) @""",
    re.IGNORECASE | re.VERBOSE,
)

_PARAMETER = re.compile(
    r"(?P<name>[?&;][\w.-]*(?:password|passwd|pwd|secret|token|api_?key|signature|odbc_connect)=)"
    r"[^\s&;'\"`]+",
    re.IGNORECASE,
)

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def redacted(text: str) -> str:
    """Return `text` with *** instead of the login in every address, and of the Hub's tokens."""
    text = _LOGIN.sub(rf"\g<scheme>{_HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<name>{_HIDDEN}", text)
    return _HUB_TOKEN.sub(f"hf_{_HIDDEN}", text)


def without_login(url: str) -> str:
    """Return `url` without its login, as a link for a browser, which asks for the login."""
    return _LOGIN.sub(r"\g<scheme>", url)


def host(url: str) -> str:
    """Return the host and port of `url`."""
    return urlsplit(url).netloc.rpartition("@")[2]
