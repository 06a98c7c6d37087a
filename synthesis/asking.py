"""Who is asked: a model in this process, or one behind a server.

Both have texts(what, requests, tokens, group, temperature) -> `group` replies to each request,
those of one together; None where there is none, which is counted.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from served.client import Client, NoServerError
from synthesis.photos import Photo


@dataclass
class Request:
    """Images and a question about them for the model."""

    photo: Photo  # where drops are counted
    key: object  # what its seed depends on
    images: list[Image.Image]
    prompt: str


def seed_of(seed: int, what: str, request: Request) -> int:
    key = repr((seed, what, request.key))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])


@dataclass
class Local:
    """A model in this process."""

    answers: Callable  # rollout.answers of it
    batches: object  # launch.batches.Batches: how many prompts fit at once
    seed: int

    def texts(
        self, what: str, requests: list[Request], tokens: int, group: int, temperature: float
    ) -> list[str | None]:
        """None where one alone does not fit in memory."""

        def reply(batch):
            replies = self.answers(
                [request.images for request in batch],
                [request.prompt for request in batch],
                max_new_tokens=tokens,
                seeds=[seed_of(self.seed, what, request) for request in batch],
                group=group,
                temperature=temperature,
            )
            return [reply.output for reply in replies]

        said = []
        for batch, texts in self.batches.run(requests, reply):
            if isinstance(texts, Exception):
                batch[0].photo.drop("out_of_memory")
                texts = [None] * group
            said += texts
        return said


@dataclass
class Served:
    """A server's model."""

    client: Client
    images: Path  # where the photographs lie
    seed: int

    def texts(
        self, what: str, requests: list[Request], tokens: int, group: int, temperature: float
    ) -> list[str | None]:
        """None where a call failed: its photograph is then not done. Raises NoServerError."""

        async def ask(i: int):
            request = requests[i]
            photo = request.photo
            fields = {"max_tokens": tokens, "n": group, "temperature": temperature}
            if temperature > 0:
                fields["seed"] = seed_of(self.seed, what, request)
            file = self.images / photo.file  # may travel as it is
            images = [file if image is photo.image else image for image in request.images]
            return await self.client.replies(images, request.prompt, **fields)

        said = {}
        for i, replies in self.client.as_they_end(range(len(requests)), ask):
            photo = requests[i].photo
            if isinstance(replies, NoServerError):
                raise replies
            if isinstance(replies, Exception):
                photo.failed = f"{what}: {replies}"
                said[i] = [None] * group
                continue
            said[i] = [reply.output for reply in replies]
            for reply in replies:
                photo.usage["tokens"] += reply.tokens or 0
                photo.usage["prompt_tokens"] += reply.prompt_tokens or 0
                photo.usage["shrunk"] += reply.shrunk
        return [text for i in range(len(requests)) for text in said[i]]
