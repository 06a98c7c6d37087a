"""Any model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`, the
makers' own): the one client of evaluate.py, synth.py and --judge. Needs no torch.

    client = Client("http://localhost:8000/v1", "Qwen/Qwen3.5-4B")
    ask = lambda row: client.replies([row.image], row.prompt, max_tokens=4096)
    for row, replies in client.as_they_end(rows, ask):
        print(row.id, replies if isinstance(replies, Exception) else replies[0].output)
"""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from urllib.parse import urlsplit

from tqdm import tqdm

from served.pictures import data_uri

RETRIES = 6  # of the package, with backoff or as Retry-After says: 429, 5xx, lost connections
PAUSES = (1, 4, 0)  # seconds after a call that came to no whole reply
CONNECT = 10  # seconds
NO_KEY = "none"  # what is sent where there is none
LARGEST = 20_000_000  # bytes of a reply
# Fields that some servers refuse, with 400 or 422; the last is then called by its newer name.
OPTIONAL = ("chat_template_kwargs", "n", "seed", "temperature", "max_tokens")
WITHOUT_TEXT = ("length", "content_filter")  # why an answer may have none


class NoServerError(ConnectionError):
    """No further call would do better: nobody answers, or the key or the model is refused."""


@dataclass
class ServedReply:
    """What a served model answered to one prompt."""

    output: str
    truncated: bool  # whether max_tokens cut it off
    tokens: int | None  # of the request's answers, by `usage`, its first one's alone; else 0
    prompt_tokens: int | None  # the same for the prompt; None: the server does not say
    answered_by: str | None  # the model, as the server calls it
    shrunk: int = 0  # images that were made smaller to be sent


def client_of(settings, url: str, model: str | None) -> "Client":
    """The client of a server's model, asked as a script's flags say."""
    return Client(
        url,
        model,
        settings.concurrency,
        settings.thinking,
        settings.deadline,
        settings.max_image_mb,
    )


def is_url(model: str | None) -> bool:
    return bool(model) and model.startswith(("http://", "https://"))


def api_key() -> str:
    """OPENAI_API_KEY, which is in no file and no message. Raises ValueError."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY is not one line of ASCII. Set it again.")
    return key or NO_KEY


@dataclass
class Client:
    """A server's model, and how it is asked."""

    url: str  # up to and with /v1
    model: str  # as the server calls it
    concurrency: int = 32  # requests in flight
    thinking: bool = False  # not asked not to
    deadline: float = 600  # seconds a call, its retries included
    max_image_mb: float = 20  # of a picture as it is sent; larger ones are made smaller

    def __post_init__(self):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                f"{self.url} is asked through a package that is not installed: pip install openai"
            ) from error
        parts = urlsplit(self.url)
        if parts.username or parts.query or not parts.hostname:
            raise ValueError(
                "A server's URL has a host, and neither a password nor a query. Expected such as "
                "http://localhost:8000/v1, and a key, if there is one, in OPENAI_API_KEY."
            )
        self.refused = set()  # OPTIONAL fields that the server does not take
        self.gone = None  # the NoServerError that ended it
        self.loop = asyncio.new_event_loop()
        self.package = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=api_key(),
            max_retries=RETRIES,
            timeout=openai.Timeout(self.deadline, connect=CONNECT),
            # The key is for this host alone, and no proxy's.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False, follow_redirects=False),
        )

    def as_they_end(self, items: Iterable, work: Callable[..., Awaitable]) -> Iterator[tuple]:
        """(item, await work(item), or the OSError or ValueError that it raised), `concurrency` of
        them at once, in the order in which they end."""
        waiting, running = iter(items), {}
        try:
            while True:
                for item in islice(waiting, self.concurrency - len(running)):
                    running[self.loop.create_task(work(item))] = item
                if not running:
                    return
                first = asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                ended, _ = self.loop.run_until_complete(first)
                for task in ended:
                    error = task.exception()
                    if error and not isinstance(error, OSError | ValueError):
                        raise error
                    yield running.pop(task), error or task.result()
        finally:
            for task in running:
                task.cancel()
            if running:
                self.loop.run_until_complete(asyncio.wait(running))

    async def replies(self, images: list, text: str | list, **fields) -> list[ServedReply]:
        """Answers to a question about images (paths or pictures), or to a chat that holds as many
        placeholders; greedy, one, and of any length, unless `fields` of the API (n, temperature,
        max_tokens, seed) say otherwise.

        Raises FileNotFoundError / ValueError for a picture that cannot be read and for what the
        server refuses or does not answer properly; NoServerError.
        """
        most = int(self.max_image_mb * 1e6)
        sent = [await asyncio.to_thread(data_uri, image, most) for image in images]
        wanted = fields.pop("n", 1)
        body = {"model": self.model, "messages": messages(text, sent), "temperature": 0} | fields
        if not self.thinking:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        replies = []
        while len(replies) < wanted:  # a server may take no n, or overlook it
            if wanted > 1:
                body["n"] = wanted - len(replies)
            said = await self.call(body)
            said[0].shrunk = sum(shrunk for _, shrunk in sent)
            replies += said
            if "seed" in body:
                body["seed"] += len(said)
        return replies[:wanted]

    async def call(self, body: dict) -> list[ServedReply]:
        """The answers to a request. What the server refuses is left out: for good, and said, once
        it has answered without."""
        from openai import APIConnectionError, APIStatusError

        without = set(self.refused)
        while True:
            try:
                if self.gone:
                    raise self.gone
                found = await self.whole_reply(sendable(body, without))
                break
            except APIConnectionError as error:
                reason = type(error.__cause__ or error).__name__
                if reason.startswith("Connect"):
                    self.give_up(f"does not answer ({reason})", error)
                raise OSError(f"{error} ({reason})") from error
            except APIStatusError as error:
                told = f"HTTP {error.status_code}: {error.message}"
                told = self.without_key(told)[:500]
                if error.status_code in (401, 404) or error.status_code < 400:
                    self.give_up(f"refuses {self.model!r} ({told})", error)
                more = refused_fields(told, body.keys() - without)
                if error.status_code not in (400, 422) or not more:
                    raise ValueError(told) from error
                without |= more
        for field in sorted(without - self.refused):
            tqdm.write(f"{self.url} takes no {field}: {self.model} is asked without it")
        self.refused |= without
        return found

    def without_key(self, text: str) -> str:
        key = self.package.api_key
        return text if key == NO_KEY else text.replace(key, "***")

    def give_up(self, reason: str, error: Exception):
        self.gone = NoServerError(
            f"{self.url} {reason}. What was answered is kept: mend that, and the same command goes "
            "on."
        )
        raise self.gone from error

    async def whole_reply(self, fields: dict) -> list[ServedReply]:
        """A request's answers; tried again where there is none after the deadline, or none that can
        be read."""
        from openai import OpenAIError

        for pause in PAUSES:
            try:
                async with asyncio.timeout(self.deadline):
                    return await self.post(fields)
            except OpenAIError:  # tried again already, where that may help
                raise
            except TimeoutError:
                failed = f"no whole reply within {self.deadline:g} seconds"
            except Exception as error:  # whatever a server and what it says can lead to
                failed = f"no reply that can be read: {error!r}"
            await asyncio.sleep(pause)
        raise ValueError(self.without_key(failed)[:300])

    async def post(self, fields: dict) -> list[ServedReply]:
        data = bytearray()
        create = self.package.chat.completions.with_streaming_response.create
        known = {key: fields[key] for key in ("model", "messages")}
        async with create(**known, extra_body=fields) as response:
            async for part in response.iter_bytes():
                data += part
                if len(data) > LARGEST:
                    raise ValueError(f"over {LARGEST:,} bytes")
        return read_replies(json.loads(data))


def messages(text: str | list, sent: list[tuple[str, bool]]) -> list[dict]:
    """A question about images, or a chat with a placeholder for each, as the API has it."""
    chat = text
    if isinstance(text, str):
        pictures = [{"type": "image"}] * len(sent)
        content = [*pictures, {"type": "text", "text": text}] if sent else text
        chat = [{"role": "user", "content": content}]
    uris = iter([uri for uri, _ in sent])
    filled = []
    for message in chat:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "image_url", "image_url": {"url": next(uris)}}
                if part["type"] == "image"
                else part
                for part in content
            ]
        filled.append(message | {"content": content})
    return filled


def sendable(body: dict, without: set[str]) -> dict:
    fields = {key: value for key, value in body.items() if key not in without}
    if "max_tokens" in without & body.keys():
        fields["max_completion_tokens"] = body["max_tokens"]
    return fields


def refused_fields(told: str, sent: set[str]) -> set[str]:
    """Which of the OPTIONAL fields that were sent an error names; where it names none, it may be
    the first of them."""
    candidates = [field for field in OPTIONAL if field in sent]
    named = [field for field in candidates if re.search(rf"(?<![\w\\]){field}(?!\w)", told)]
    if not named and OPTIONAL[0] in sent:
        named = [OPTIONAL[0]]
    return set(named)


def read_replies(found: dict) -> list[ServedReply]:
    """The answers in what a server replied. Raises ValueError, LookupError, TypeError or
    AttributeError for what is none."""
    usage = found.get("usage") or {}
    replies = []
    for choice in found["choices"]:
        message = choice["message"]
        reason = choice.get("finish_reason")
        text = message.get("content")
        if text is None:
            text = message.get("refusal")
        if text is None and reason in WITHOUT_TEXT:
            text = ""
        if not isinstance(text, str):
            raise ValueError("an answer without text: was it cut off while thinking?")
        first = not replies
        tokens = usage.get("completion_tokens") if first else 0
        prompt_tokens = usage.get("prompt_tokens") if first else 0
        truncated = reason == "length"
        replies.append(ServedReply(text, truncated, tokens, prompt_tokens, found.get("model")))
    if not replies:
        raise ValueError("no choices")
    return replies
