"""A judge for what the rules of scoring leave open: a model, or an OpenAI-compatible server."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import urlsplit

DEADLINE = 300  # seconds a call, at most
PAUSES = (1, 4, 0)  # seconds after a call that failed
LARGEST = 1_000_000  # bytes of a reply

JUDGE = (
    "Does the response express the same meaning as the answer of the question?\n"
    "Question: {prompt}\nAnswer: {answer}\nResponse: {output}\nReply with Yes or No only."
)


def ask_judge(judge: str, name: str | None, prompts: list[str]) -> Iterator[str | Exception]:
    """Greedy replies, in order, of an OpenAI-compatible API (judge is its URL; the key, if any, is
    OPENAI_API_KEY's) or of a HF model; where a call failed three times, the exception."""
    if not judge.startswith("http"):
        yield from ask_model(judge, prompts)
        return
    if not api_key().isprintable():
        raise ValueError("OPENAI_API_KEY has line breaks inside. Set it again, without them.")
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(lambda prompt: ask_server(judge, name, prompt), prompts)


def ask_model(judge: str, prompts: list[str]) -> Iterator[str]:
    from torch.cuda import is_available
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(judge, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(judge)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--judge {judge} is neither a URL nor a model here or on the hub: {error}"
        ) from error
    model.to("cuda" if is_available() else "cpu")
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=512, do_sample=False)
        yield tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def ask_server(judge: str, name: str | None, prompt: str) -> str | Exception:
    chat = [{"role": "user", "content": prompt}]
    body = json.dumps({"model": name or "default", "temperature": 0, "messages": chat}).encode()
    for pause in PAUSES:
        try:
            reply = json.loads(post(f"{judge.rstrip('/')}/chat/completions", body))
            text = reply["choices"][0]["message"]["content"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError("a reply without text: was it cut off while thinking?")
            return text
        except Exception as error:  # whatever a server and what it says can lead to
            failed = error
            time.sleep(pause)
    return failed


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip() or "none"


def post(url: str, body: bytes) -> bytes:
    """A server's reply of at most LARGEST bytes, whole after DEADLINE seconds at the latest. No
    redirect is followed: the key is for this host alone."""
    place = urlsplit(url)
    connect = HTTPSConnection if place.scheme == "https" else HTTPConnection
    connection = connect(place.netloc, timeout=DEADLINE)
    key = api_key()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.connect()
    end = threading.Timer(DEADLINE, connection.sock.shutdown, [socket.SHUT_RDWR])
    end.start()
    try:
        connection.request("POST", place.path, body, headers)
        reply = connection.getresponse()
        data = reply.read(LARGEST + 1)
    finally:
        end.cancel()
        connection.close()
    if reply.status != 200 or len(data) > LARGEST:
        said = data.decode(errors="replace").replace(key, "***")[:200]
        raise OSError(f"HTTP {reply.status}, {len(data):,} bytes: {said!r}")
    return data
