"""How we speak to a server that a user names: with which key, and what is said if it fails.

A key goes into a request's header and nowhere else: no file, no message, no list of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase
from requests.utils import get_environ_proxies, select_proxy

__all__ = ["OPTION", "VARIABLES", "ApiKey", "ask", "why_failed"]

OPTION = "--api-key"
VARIABLES = ("SGLANG_API_KEY", "OPENAI_API_KEY")
_WANTS_KEY = (401, 403)


@dataclass(frozen=True, slots=True)
class ApiKey(AuthBase):
    """The key of a server, or none.

    Attributes:
        source: the option or the variable that it is from; None without a key.
        value: what the server compares.
    """

    source: str | None = None
    value: str | None = field(default=None, repr=False)

    @classmethod
    def find(cls, given: str | None = None, environment: Mapping[str, str] | None = None) -> Self:
        """The key that an option gives, or else a variable.

        Args:
            given: value of ``--api-key``; None without it.
            environment: None for this process's.

        Raises:
            ValueError: it cannot stand in a header; the message does not show it.
        """
        found = os.environ if environment is None else environment
        places = {OPTION: given, **{name: found.get(name) for name in VARIABLES}}
        for source, value in places.items():
            if value:
                if not value.isascii() or not value.isprintable() or " " in value:
                    legal = "printable ASCII characters, no spaces"
                    raise ValueError(f"the key of {source} is none of HTTP's; legal: {legal}")
                return cls(source, value)
        return cls()

    def __call__(self, request: Any) -> Any:
        """Sign a request. As a header it would give way to an entry in ~/.netrc."""
        request.headers.update(self.headers)
        return request

    @property
    def headers(self) -> dict[str, str]:
        """For clients that are not requests."""
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a child process that speaks to the server."""
        return dict.fromkeys(VARIABLES, self.value) if self.value else {}

    def refusal(self, status: int) -> str:
        """What to say of an answer with status 401 or 403."""
        if self.source is None:
            where = " or ".join([OPTION, *VARIABLES])
            return f"the server answers {status}: it wants a key; legal: one in {where}"
        places = [OPTION, *VARIABLES]
        first = places[: places.index(self.source) + 1]
        return (
            f"the server answers {status}: the key of {self.source} is not its own; legal: "
            f"its key, in {' or '.join(first)}"
        )


def ask(url: str, key: ApiKey, *, timeout_s: float, method: str = "GET") -> requests.Response:
    """Ask a server.

    Raises:
        requests.RequestException: it does not answer, or with an error; see :func:`why_failed`.
    """
    answer = requests.request(method, url, auth=key if key.value else None, timeout=timeout_s)
    answer.raise_for_status()
    return answer


def why_failed(error: requests.RequestException, url: str, key: ApiKey) -> str:
    """What went wrong when a server was asked, in one line, with the proxy if there was one."""
    if error.response is not None and error.response.status_code in _WANTS_KEY:
        return key.refusal(error.response.status_code)
    reason = " ".join(str(error).split())
    proxy = _proxy_of(url)
    if proxy is None or not isinstance(error, requests.ConnectionError | requests.Timeout):
        return reason
    host = urlsplit(url).hostname
    return f"{reason}; asked through the proxy {proxy}, which no_proxy={host} would go around"


def _proxy_of(url: str) -> str | None:
    """The proxy that requests takes for a URL by the environment, without its password."""
    proxy: str | None = select_proxy(url, get_environ_proxies(url, no_proxy=None))
    if proxy is None:
        return None
    scheme, separator, place = proxy.rpartition("://")
    return f"{scheme}{separator}{place.rpartition('@')[2]}"
