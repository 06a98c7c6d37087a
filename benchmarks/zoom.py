"""The zoom-in tool of the paper (Appendix A): what looking twice would gain."""

import json
import math
import re
from collections.abc import Generator

from PIL import Image

TOOLS = """# Tools
You may call a function to assist with the question. Its signature:
{"name": "image_zoom_in_tool", \
"description": "Crop a region of the first image and return it enlarged.", "parameters": {"bbox_2d":
"[x1, y1, x2, y2] of the region, in thousandths of the image's width and height", \
"label": "what is looked for (optional)"}}
To call it, answer <tool_call>{"name": "image_zoom_in_tool", \
"arguments": {"bbox_2d": [...], "label": "..."}}</tool_call>"""

SUMMED = {"tokens", "prompt_tokens"}  # of all turns; of the rest the last one's counts


def answer_with_zoom(answer, images: list, texts: list[str], rounds: int) -> list[dict]:
    """As answer(images, chats) -> replies, `images` a list a row, but the model may call the tool
    at most `rounds` times a row. A dict a row, as `conversation` returns it. Every turn computes
    its whole prompt anew."""
    rows = [conversation(*row, rounds) for row in zip(images, texts, strict=True)]
    done = [None] * len(rows)
    asked = {i: next(row) for i, row in enumerate(rows)}
    while asked:
        replies = answer(*map(list, zip(*asked.values(), strict=True)))
        for i, reply in zip(list(asked), replies, strict=True):
            try:
                asked[i] = rows[i].send(reply)
            except StopIteration as end:
                done[i] = end.value
                del asked[i]
    return done


def conversation(images: list, text: str, rounds: int) -> Generator[tuple[list, list], object]:
    """About images, of which it is the first that can be zoomed into: yields (images, chat) of each
    turn, takes the reply to it, and returns a dict: output (the last turn), tokens (of all turns),
    truncated, calls, malformed ones. A call's region comes back as a further image, or an error
    that the model can react to."""
    views = list(images)
    system = {"role": "system", "content": TOOLS}
    chat = [system, from_user(*[{"type": "image"}] * len(images), words(text))]
    done = {"calls": 0, "malformed": 0}
    for left in range(rounds, -1, -1):
        reply = vars((yield views, chat))
        for key in SUMMED & reply.keys() & done.keys():
            reply[key] = (reply[key] or 0) + (done[key] or 0)
        done |= reply
        if not left or "<tool_call>" not in done["output"]:
            break
        said = neutralised(done["output"])
        done["calls"] += 1
        try:
            calls = re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", said, re.DOTALL)
            views.append(zoomed_region(calls[-1], images[0]))
            seen = {"type": "image"}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            done["malformed"] += 1
            wrong = (
                f"Error: {error!r}. Expected a call as described, 0 <= x1 < x2 <= 1000 and "
                "0 <= y1 < y2 <= 1000."
            )
            seen = words(neutralised(wrong))
        told = "This was the last call: answer now." if left == 1 else ""
        response = from_user(words("<tool_response>"), seen, words(told + "</tool_response>"))
        chat += [{"role": "assistant", "content": said}, response]
    return done


def neutralised(text: str) -> str:
    """Vision tokens that a model spells out would change the number of images."""
    return text.replace("<|", "< |")


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def from_user(*content: dict) -> dict:
    return {"role": "user", "content": list(content)}


def zoomed_region(call: str, image: Image.Image) -> Image.Image:
    """The crop that a tool call asks for, enlarged to at least 448 px along its longer side. Raises
    ValueError, LookupError, TypeError or RecursionError for anything but a well-formed call."""
    call = json.loads(call)
    box = call["arguments"]["bbox_2d"]
    x1, y1, x2, y2 = box
    ordered = 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
    numbers = all(type(v) in (int, float) for v in box)
    if call["name"] != "image_zoom_in_tool" or not numbers or not ordered:
        raise ValueError(f"{str(call['name'])[:80]} of {str(box)[:80]}")
    w, h = image.size
    left, top = math.floor(x1 * w / 1000), math.floor(y1 * h / 1000)
    crop = image.crop((left, top, math.ceil(x2 * w / 1000), math.ceil(y2 * h / 1000)))
    if max(crop.size) > 100 * min(crop.size):  # image processors refuse 200
        raise ValueError(f"the region has {crop.width} x {crop.height} pixels, which is too thin")
    scale = max(1, 448 / max(crop.size))
    size = (math.ceil(crop.width * scale), math.ceil(crop.height * scale))
    return crop.resize(size, Image.Resampling.BICUBIC)
