"""A judge for what the rules of scoring leave open: a model, or an OpenAI-compatible server."""

from collections.abc import Iterator

from served.client import Client, is_url

DEADLINE = 300  # seconds a call, at most

JUDGE = (
    "Does the response express the same meaning as the answer of the question?\n"
    "Question: {prompt}\nAnswer: {answer}\nResponse: {output}\nReply with Yes or No only."
)


def ask_judge(
    judge: str, name: str | None, prompts: list[str]
) -> Iterator[tuple[str, str | Exception]]:
    """(prompt, greedy reply) of a HF model, in order, or of a server whose URL `judge` is, as they
    end; where a call failed, the exception instead."""
    if not is_url(judge):
        yield from zip(prompts, ask_model(judge, prompts), strict=True)
        return
    client = Client(judge, name or "default", deadline=DEADLINE)

    async def ask(prompt: str) -> str:
        (reply,) = await client.replies([], prompt)
        return reply.output

    yield from client.as_they_end(prompts, ask)


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
