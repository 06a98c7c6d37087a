"""A judge for what the rules of scoring leave open: a local model, or an OpenAI-compatible server."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

JUDGE = (
    "Does the response express the same meaning as the answer of the question?\nQuestion: {prompt}\nAnswer: {answer}\n"
    "Response: {output}\nReply with Yes or No only."
)


def ask_judge(judge: str, name: str | None, prompts: list[str]) -> Iterator[str | Exception]:
    """Greedy replies, in order, of an OpenAI-compatible API (judge is its URL; the key, if any, is OPENAI_API_KEY's) or of a HF
    model; where a call failed three times, the exception."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if not judge.startswith("http"):
        from torch.cuda import is_available
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(judge, dtype="auto"),
                AutoTokenizer.from_pretrained(judge),
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--judge {judge} is neither a URL nor a model here or on the hub: {error}"
            ) from error
        model.to("cuda" if is_available() else "cpu")
        for chat in chats:
            inputs = tokenizer.apply_chat_template(
                chat,
                add_generation_prompt=True,
                enable_thinking=False,
                return_tensors="pt",
                return_dict=True,
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=512, do_sample=False)
            yield tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        return

    def ask(chat: list[dict]) -> str | Exception:
        body = json.dumps({"model": name or "default", "temperature": 0, "messages": chat}).encode()
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
        }
        for pause in (1, 4, 0):
            try:
                request = urllib.request.Request(
                    f"{judge.rstrip('/')}/chat/completions", body, headers
                )
                with urllib.request.urlopen(request, timeout=300) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                failed = error
                time.sleep(pause)
        return failed

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(ask, chats)
