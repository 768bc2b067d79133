"""The routes of a vLLM server (0.32), and what becomes of a request that fails.

    GET  /v1/models              the name of the model and the most tokens that a request may have
    GET  /server_info            the server's config: data type, mode of log-probs
    POST /v1/completions         token ids in, token ids and log-probs out
    POST /collective_rpc         `reload_weights` from a directory that the server can read
    POST /v1/load_lora_adapter   an adapter from a directory, under a name; /v1/unload_lora_adapter takes it away
    POST /reset_prefix_cache     keys and values of older weights are forgotten
    POST /update_weight_version  names the weights; GET /weight_info tells the name, which a restarted server forgets

All but the completions, the models and the adapters need VLLM_SERVER_DEV_MODE=1 in the server's environment.
Left out on purpose: what the numbers in an answer mean.
"""

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

Answer = TypeVar("Answer")

_PAUSE, _LONGEST_PAUSE = 0.25, 10.0  # seconds between two tries; each pause is twice the pause before
_BUSY = {408, 425, 429, 500, 502, 503, 504}  # answers after which the same request may succeed
_IDLE = 2.0  # seconds after which a connection is not used again, because the server may be about to close it
_SAID = 300  # characters of the server's own words that a message repeats


class ServerError(ConnectionError):
    """The server does not do what is asked of it. One sentence says what, and what to do.

    status: of the answer by which the server refuses a request; None where there is no answer.
    """

    def __init__(self, said: str, *, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status


class BadAnswer(ServerError):
    """An answer that cannot be right, such as a row that is cut off. The same request may get a right answer."""


class Client:
    """Requests to the server at `url`.

    timeout: seconds that an answer may take. patience: seconds during which a request that fails is made again, with
    growing pauses. A request that the server refuses (4xx) is not made again. Any thread may make requests; each
    thread keeps its own connection.
    """

    def __init__(self, url: str, *, timeout: float, patience: float) -> None:
        parts = urlsplit(url)
        self.url, self._host, self._prefix = url.rstrip("/"), parts.netloc, parts.path.rstrip("/")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.timeout, self.patience = timeout, patience
        self._mine = threading.local()
        self._open: WeakSet[http.client.HTTPConnection] = WeakSet()
        self.stopped = threading.Event()  # a request has failed for good, so that no other is made again

    def get(self, route: str) -> Any:
        """The JSON of a route."""
        return self.ask("GET", route, None, lambda answer: answer)

    def post(
        self, route: str, body: dict[str, Any] | None = None, *, permanent: Collection[int] = (), plain: bool = False
    ) -> Any:
        """The JSON that the server answers to `body`. permanent, plain: as in `ask`."""
        return self.ask("POST", route, body or {}, lambda answer: answer, permanent=permanent, plain=plain)

    def ask(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], Answer],
        *,
        permanent: Collection[int] = (),
        plain: bool = False,
    ) -> Answer:
        """`read(answer)` of the first answer that `read` takes; `read` raises BadAnswer for another answer.

        permanent: statuses of 500 and above after which the request is not made again. plain: the answer is a text in
        place of JSON.
        Raises ServerError where no try within `patience` succeeds, and where the server refuses the request.
        """
        end, pause, why = time.monotonic() + self.patience, _PAUSE, ""
        while True:
            try:
                return read(self._once(method, route, body, permanent, plain))
            except (OSError, http.client.HTTPException, BadAnswer) as error:
                if isinstance(error, ServerError) and not isinstance(error, BadAnswer):
                    raise
                self._drop()
                why = _reason(error, self.timeout)
            left = end - time.monotonic()
            if left <= 0 or self.stopped.wait(min(left, pause * random.uniform(0.75, 1.25))):
                raise ServerError(
                    f"vllm_url: expected an answer from {self.url}{route}, got none in {self.patience:g} s of tries: "
                    f"{why}"
                )
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _once(
        self, method: str, route: str, body: dict[str, Any] | None, permanent: Collection[int], plain: bool
    ) -> Any:
        connection = getattr(self._mine, "connection", None)
        if connection is not None and time.monotonic() - self._mine.used > _IDLE:
            self._drop()
            connection = None
        if connection is None:
            connection = self._mine.connection = self._kind(self._host, timeout=self.timeout)
            self._open.add(connection)
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, self._prefix + route, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        self._mine.used = time.monotonic()
        if response.status in _BUSY and response.status not in permanent:
            raise BadAnswer(f"{response.status} {_said(text)}")
        if response.status >= 300:
            said = f"vllm_url: {self.url}{route} refuses the request: {response.status} {_said(text)}"
            raise ServerError(said, status=response.status)
        if plain:
            return text.decode(errors="replace")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise BadAnswer(f"no JSON but {text[:40]!r}") from error

    def break_off(self) -> None:
        """Ends the requests that other threads wait for; they raise ServerError."""
        self.stopped.set()
        for connection in list(self._open):
            if connection.sock is not None:
                with suppress(OSError):  # the server has closed it
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connections of all threads, which make no request now. A later request opens another."""
        for connection in list(self._open):
            connection.close()

    def _drop(self) -> None:
        """Closes this thread's connection, so that the next request opens another."""
        connection = getattr(self._mine, "connection", None)
        if connection is not None:
            connection.close()
            self._mine.connection = None


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, http.client.HTTPException):
        return f"the connection broke off ({type(error).__name__})"
    return str(error)


def _said(text: bytes) -> str:
    """The server's own words in one line."""
    try:
        found = json.loads(text)
        found = found.get("error", found)
        said = found.get("message") or found.get("detail") or found
    except (ValueError, AttributeError):
        said = text.decode(errors="replace")
    return " ".join(str(said).split())[:_SAID]
