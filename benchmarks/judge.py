"""A judge for what the rules of scoring leave open: a model, or an OpenAI-compatible server."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

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
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    for pause in (1, 4, 0):
        try:
            url = f"{judge.rstrip('/')}/chat/completions"
            request = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(request, timeout=300) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            failed = error
            time.sleep(pause)
    return failed
