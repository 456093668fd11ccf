"""How we speak to a server that a user names: with which key, and what is said if it fails.

A key goes into a request's header and nowhere else: no file, no message, no list of processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase
from requests.utils import get_environ_proxies, select_proxy

from sglang_prefix.files import MAX_READ_BYTES, parse_json

__all__ = ["OPTION", "VARIABLES", "ApiKey", "ask", "ask_json", "why_failed"]

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


def ask(url: str, key: ApiKey, *, timeout_s: float, method: str = "GET") -> bytes:
    """What a server answers, of up to `files.MAX_READ_BYTES`.

    Args:
        url: the server's own: nothing is asked elsewhere if it redirects.
        key: of the server.
        timeout_s: for the whole answer.
        method: of HTTP.

    Raises:
        requests.RequestException: it does not answer, or with an error; see :func:`why_failed`.
    """
    found: Future[bytes] = Future()

    def work() -> None:
        try:
            found.set_result(_receive(url, key, timeout_s, method))
        except BaseException as error:
            found.set_exception(error)

    # The timeout of requests is for each read: who sends a byte now and then could be waited for
    # without end.
    threading.Thread(target=work, daemon=True).start()
    try:
        return found.result(timeout_s)
    except TimeoutError:
        raise requests.Timeout(f"no whole answer within {timeout_s:g} s") from None


def _receive(url: str, key: ApiKey, timeout_s: float, method: str) -> bytes:
    with requests.request(
        method,
        url,
        auth=key if key.value else None,
        headers={"Accept-Encoding": "identity"},
        timeout=timeout_s,
        stream=True,
        allow_redirects=False,
    ) as answer:
        answer.raise_for_status()
        if answer.is_redirect:
            raise requests.TooManyRedirects(f"it redirects to {answer.headers['location']}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise requests.exceptions.ContentDecodingError("it is compressed, unasked")
        data = bytearray()
        for part in answer.iter_content(1 << 16):
            data += part
            if len(data) > MAX_READ_BYTES:
                raise requests.RequestException(f"it is larger than {MAX_READ_BYTES >> 20} MiB")
        return bytes(data)


def ask_json(url: str, key: ApiKey, *, timeout_s: float) -> Any:
    """The JSON that a server answers with, see :func:`ask`.

    Raises:
        requests.RequestException: it does not answer, or with something else.
    """
    data = ask(url, key, timeout_s=timeout_s)
    try:
        return parse_json(data.decode())
    except ValueError as error:
        raise requests.exceptions.InvalidJSONError(str(error)) from None


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
