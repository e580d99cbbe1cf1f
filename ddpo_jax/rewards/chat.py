"""Questions about pictures to a model behind the OpenAI-compatible chat-completions protocol (vLLM, SGLang, ...).

What a server does can make a reply missing, but cannot hang or fill the process: each request, the whole batch and the
size of a body have their limits. The key is read when it is needed, and is in no setting, message or error.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
from collections.abc import Callable, Coroutine, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from ddpo_jax.errors import UserError

if TYPE_CHECKING:
    import httpx

MAX_BYTES = 1_000_000  # of a body; an answer of a few sentences has some thousand
USUAL_KEY = "OPENAI_API_KEY"
SHOWN = 200  # characters of a reply in a message
RETRIED = (408, 409, 429)  # and all from 500
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds before a retry: doubled each time, times 0.5 to 1 by chance
SECRET_LENGTH = 8  # a shorter key is a placeholder, such as EMPTY, and may well be a word of a reply
GRACE = 1.0  # seconds that requests have to end once they are cancelled


class Settings(NamedTuple):
    """The server and its limits, as in `config.reward` under the names with vlm_ before them."""

    url: str  # that /chat/completions is added to
    model: str
    key: str  # the name of an environment variable; "" or one that is not set: no key is sent
    concurrency: int  # requests at a time
    timeout: float  # seconds a request may take, all of its reply included
    retries: int  # of a request, after the first try
    max_tokens: int  # of a reply
    deadline: float  # seconds for all of an `ask`; what is missing then stays missing


class Message(NamedTuple):
    """One request: a picture and what is asked about it."""

    text: str
    jpeg: bytes


class Reply(NamedTuple):
    text: str | None  # None if there is none
    why: str  # there is none; empty if there is


Asker = Callable[[Sequence[Message]], list[Reply]]  # `ask` of one server


class Attempt(NamedTuple):
    """What came of one request."""

    reply: Reply
    again: bool = False  # whether another try may help
    wait: float = 0.0  # seconds that the server asks to wait before


class Session(NamedTuple):
    """What all requests of an `ask` share."""

    client: httpx.AsyncClient
    settings: Settings
    hide: Callable[[str], str]  # a text without the key: servers quote what they refuse


def check(settings: Settings) -> None:
    """Raises: UserError if no request can be made with these settings. It never shows what may be a secret."""
    if any(sign in settings.url for sign in "@?#"):
        raise UserError(
            "reward.vlm_url: expected no user, password, ? or # in it, as configs are written to files; a key is taken"
            " from the environment variable that reward.vlm_key names"
        )
    try:
        parts = urlsplit(settings.url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or re.search(r"\s", settings.url):
        raise UserError(
            f"reward.vlm_url={settings.url!r}: expected the address of a server of the OpenAI-compatible"
            " chat-completions protocol up to /chat/completions, such as http://localhost:8000/v1 (vLLM, SGLang)"
        )
    if not settings.model.strip():
        raise UserError(
            f"reward.vlm_model={settings.model!r}: expected the name that the server knows its model by, such as"
            " Qwen/Qwen2.5-VL-7B-Instruct; GET /v1/models lists it"
        )
    if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", settings.key):
        raise UserError("reward.vlm_key: expected the name of an environment variable with the key, never the key")
    if settings.key not in ("", USUAL_KEY, *os.environ):
        raise UserError(
            "reward.vlm_key: expected the name of an environment variable with the key, and there is none of the name"
            f" that is given; export it, or set '' for a server that wants none, or {USUAL_KEY}, which is sent if it is"
            " set"
        )
    for name, value, least in [
        ("concurrency", settings.concurrency, 1),
        ("retries", settings.retries, 0),
        ("max_tokens", settings.max_tokens, 1),
    ]:
        if value < least:
            raise UserError(f"reward.vlm_{name}={value}: expected {least} or more")
    if not settings.timeout > 0:
        raise UserError(f"reward.vlm_timeout={settings.timeout}: expected a positive number of seconds")


def ask(settings: Settings, messages: Sequence[Message]) -> list[Reply]:
    """The replies, in the order of the messages; those that are missing say why.

    At most `concurrency` requests run at a time. Timeouts, failures of the connection and the statuses 408, 409, 429
    and 5xx are tried again, later each time, or when the server says (Retry-After). After `deadline` seconds what is
    still open is cancelled. Answers are greedy: temperature 0.

    Raises: UserError if the key cannot be sent.
    """
    key = _read_key(settings.key)
    if not messages:
        return []
    return _run(_ask_all(settings, messages, key))


def cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _read_key(name: str) -> str:
    key = os.environ.get(name, "").strip() if name else ""
    if not re.fullmatch(r"[!-~]*", key):
        # httpx would show it.
        raise UserError(f"the environment variable {name}: a key has only printable ASCII characters, and no spaces")
    return key


def _run(job: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """asyncio.run without its wait for threads: a look-up of a name cannot be cancelled, and may hang."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(job)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _ask_all(settings: Settings, messages: Sequence[Message], key: str) -> list[Reply]:
    import httpx  # only where it is needed: it takes a tenth of a second

    # The body comes as it is, so that a small one cannot unpack into a large one.
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
    limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
    gate = asyncio.Semaphore(settings.concurrency)
    end = asyncio.get_running_loop().time() + settings.deadline
    last = [Reply(None, "nothing")] * len(messages)

    forms = {key, json.dumps(key)[1:-1], quote(key, safe="")} if len(key) >= SECRET_LENGTH else set()

    def hide(text: str) -> str:
        for form in forms:
            text = text.replace(form, "***")
        return text

    def tell(i: int, reply: Reply) -> None:
        last[i] = reply

    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as client:
        session = Session(client, settings, hide)
        tasks = [
            asyncio.create_task(_answer(session, message, gate, end=end, tell=partial(tell, i)))
            for i, message in enumerate(messages)
        ]
        done, late = await asyncio.wait(tasks, timeout=settings.deadline)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=GRACE)
    for task in done:
        task.result()  # raises what is no failure of the server
    return [_in_time(reply, task in late, settings.deadline) for reply, task in zip(last, tasks, strict=True)]


async def _answer(session: Session, message: Message, gate: asyncio.Semaphore, *, end: float, tell: Callable) -> None:
    """Tells the reply of each try, the last one being what counts."""
    for tried in range(session.settings.retries + 1):
        async with gate:
            attempt = await _attempt(session, message)
        tell(attempt.reply)
        backoff = min(FIRST_WAIT * 2**tried, LONGEST_WAIT) * random.uniform(0.5, 1)
        wait = max(attempt.wait, backoff)
        hopeless = tried == session.settings.retries or asyncio.get_running_loop().time() + wait > end
        if hopeless or not attempt.again:
            return
        await asyncio.sleep(wait)


def _in_time(reply: Reply, late: bool, deadline: float) -> Reply:
    if not late:
        return reply
    return Reply(None, f"the {deadline:.3g} s for all requests were over (0.8 of reward.deadline); before: {reply.why}")


async def _attempt(session: Session, message: Message) -> Attempt:
    import httpx

    settings = session.settings
    try:
        async with asyncio.timeout(settings.timeout):  # around all of it: a server that drips gets no longer
            return await _exchange(session, message)
    except TimeoutError:
        return Attempt(
            Reply(None, f"{settings.url}: no whole reply within {settings.timeout:g} s (reward.vlm_timeout)"), True
        )
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        told = cut(session.hide(f"{settings.url}: {type(error).__name__}: {error}"))
        return Attempt(Reply(None, told), isinstance(error, httpx.TransportError | OSError))


async def _exchange(session: Session, message: Message) -> Attempt:
    url = session.settings.url.rstrip("/") + "/chat/completions"
    async with session.client.stream("POST", url, json=_payload(session.settings, message)) as response:
        data, whole = await _read(response)
    status, body = response.status_code, session.hide(data.decode("utf-8", "replace"))
    shown = f"status {status}: {cut(body)!r}"
    if status != 200:
        wait = _seconds(response.headers.get("Retry-After", ""))
        why = f"{shown}; it asks to wait {wait:g} s" if wait else shown
        return Attempt(Reply(None, why), again=status in RETRIED or status >= 500, wait=wait)
    if not whole:
        return Attempt(Reply(None, f"a body of more than {MAX_BYTES} bytes: {shown}"))
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        return Attempt(Reply(None, "status 200, but a compressed body, which was not asked for"))
    return Attempt(_parse(body, shown, session.hide))


async def _read(response: httpx.Response) -> tuple[bytes, bool]:
    """The body, and whether that is all of it: reading stops above MAX_BYTES."""
    body = bytearray()
    async for chunk in response.aiter_raw(chunk_size=65536):
        body += chunk
        if len(body) > MAX_BYTES:
            return bytes(body[:MAX_BYTES]), False
    return bytes(body), True


def _payload(settings: Settings, message: Message) -> dict[str, Any]:
    image = "data:image/jpeg;base64," + base64.b64encode(message.jpeg).decode()
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": message.text}]
    return {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": settings.max_tokens,
        "temperature": 0,
    }


def _parse(body: str, shown: str, hide: Callable[[str], str]) -> Reply:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError):
        return Reply(None, f"not JSON: {shown}")
    except (KeyError, IndexError, TypeError):
        return Reply(None, f"no choices[0].message.content: {shown}")
    if not isinstance(content, str):
        return Reply(None, f"the content is no text: {shown}")
    # JSON may hold half a character, which no tokenizer takes.
    text = content.encode("utf-8", "replace").decode().strip()
    return Reply(hide(text), "") if text else Reply(None, f"an empty answer: {shown}")


def _seconds(retry_after: str) -> float:
    """RFC 9110, Sec. 10.2.3: seconds, or a date; 0 for anything else."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0
