"""The zoom-in tool of the paper (Appendix A): what looking twice would gain."""

import json
import math
import re

from PIL import Image

TOOLS = """# Tools
You may call a function to assist with the question. Its signature:
{"name": "image_zoom_in_tool", "description": "Crop a region of the first image and return it enlarged.", "parameters": {"bbox_2d":
"[x1, y1, x2, y2] of the region, in thousandths of the image's width and height", "label": "what is looked for (optional)"}}
To call it, answer <tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [...], "label": "..."}}</tool_call>"""


def zoomed(reply, images: list, texts: list[str], rounds: int) -> list[dict]:
    """reply(images, texts), which is `rollout.answers` with a model, but the model may call a zoom-in tool (paper, Appendix A) at most `rounds` times a row: the region
    comes back as a further image, or an error that it can react to. "output" is the last turn, "tokens" counts all of them, and
    the row also has "calls" and "malformed" (calls). Every turn computes its whole prompt anew."""
    views, done = (
        [[image] for image in images],
        [{"tokens": 0, "calls": 0, "malformed": 0} for _ in texts],
    )
    chats = [
        [
            {"role": "system", "content": TOOLS},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
        ]
        for text in texts
    ]
    active = range(len(texts))
    for left in range(rounds, -1, -1):
        replies = reply([views[i] for i in active], [chats[i] for i in active])
        for i, reply in zip(active, replies):
            done[i] |= reply | {"tokens": done[i]["tokens"] + reply["tokens"]}
        active = [i for i in active if left and "<tool_call>" in done[i]["output"]]
        if not active:
            break
        for i in active:
            said = done[i]["output"].replace("<|", "< |")  # spelled-out vision tokens
            content = [{"type": "text", "text": "This was the last call: answer now."}] * (
                left == 1
            )
            done[i]["calls"] += 1
            try:
                views[i].append(
                    region(
                        re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", said, re.S)[-1], images[i]
                    )
                )
                content = [{"type": "image"}, *content]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                done[i]["malformed"] += 1
                wrong = f"Error: {error!r}. Expected a call as described, 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000."
                content = [{"type": "text", "text": wrong.replace("<|", "< |")}, *content]
            content = [
                {"type": "text", "text": "<tool_response>"},
                *content,
                {"type": "text", "text": "</tool_response>"},
            ]
            chats[i] += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": content},
            ]
    return done


def region(call: str, image: Image.Image) -> Image.Image:
    """The crop that a tool call asks for, enlarged to at least 448 px along its longer side. Raises ValueError, LookupError,
    TypeError or RecursionError for anything but a well-formed call."""
    call = json.loads(call)
    box = x1, y1, x2, y2 = call["arguments"]["bbox_2d"]
    if (
        call["name"] != "image_zoom_in_tool"
        or not all(type(v) in (int, float) for v in box)
        or not (0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000)
    ):
        raise ValueError(f"{str(call['name'])[:80]} of {str(box)[:80]}")
    w, h = image.size
    crop = image.crop(
        (
            math.floor(x1 * w / 1000),
            math.floor(y1 * h / 1000),
            math.ceil(x2 * w / 1000),
            math.ceil(y2 * h / 1000),
        )
    )
    if max(crop.size) > 100 * min(crop.size):  # image processors refuse 200
        raise ValueError(f"the region has {crop.width} x {crop.height} pixels, which is too thin")
    scale = max(1, 448 / max(crop.size))
    return crop.resize(
        (math.ceil(crop.width * scale), math.ceil(crop.height * scale)), Image.Resampling.BICUBIC
    )
