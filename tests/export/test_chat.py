"""The texts of a conversation's messages, derived from chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="chat templates are rendered with jinja2")

import jinja2

from blip2edge.export.chat import Turn, conversation_texts

PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    f"{PARTS} {{% endfor %}}{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<s>system Be kind.</s>{% endif %}"
    f"<s>{{{{ message['role'] }}}} {PARTS}</s>{{% endfor %}}{{% if add_generation_prompt %}}<s>assistant {{% endif %}}"
)
IN_TURN = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ refuse('user and assistant must take turns') }}{% endif %}"
    f"{{% if message['role'] == 'user' %}}[I] {PARTS} [/I]{{% else %}} {PARTS}</s>{{% endif %}}{{% endfor %}}"
)
MERGED = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'][0]['text'] %}"
    "{% elif message['role'] == 'user' %}"
    f"[I] {{% if ns.system %}}<<{{{{ ns.system }}}}>> {{% set ns.system = '' %}}{{% endif %}}{PARTS} [/I]"
    f"{{% else %}} {PARTS}</s>{{% endif %}}{{% endfor %}}"
)
LAST_ALONE = (
    "{% for message in messages %}{% if loop.last %}USER: "
    f"{PARTS}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}} ASSISTANT:{{% endif %}}"
)
PLAIN_TEXTS = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"


def texts(template: str) -> dict[str, str]:
    environment: Any = jinja2.Environment()
    compiled = environment.from_string("{% set ns = namespace(system='') %}" + template)

    def refuse(problem: str) -> None:
        raise ValueError(problem)

    def render(turns: Sequence[Turn], begin: bool) -> str:
        messages = []
        for kind, text in turns:
            picture = [{"type": "image"}] if kind == "picture" else []
            role = "user" if kind == "picture" else kind
            messages.append({"role": role, "content": [*picture, {"type": "text", "text": text}]})
        text = compiled.render(messages=messages, add_generation_prompt=begin, refuse=refuse)
        return str(text).replace("<image>", "{image}")

    return conversation_texts(render)


def test_texts_of_messages() -> None:
    assert texts(VICUNA) == {
        "head": "",
        "system": "{prompt} ",
        "picture": "USER: {image}\n{prompt} ",
        "user": "USER: {prompt} ",
        "assistant": "ASSISTANT: {prompt} ",
        "start": "ASSISTANT:",
    }
    assert texts(CHATML) == {
        "head": "<s>system Be kind.</s>",
        "system": "<s>system {prompt}</s>",
        "picture": "<s>user {image}\n{prompt}</s>",
        "user": "<s>user {prompt}</s>",
        "assistant": "<s>assistant {prompt}</s>",
        "start": "<s>assistant ",
    }


@pytest.mark.parametrize("template", [IN_TURN, MERGED], ids=["refused", "merged into the user's message"])
def test_a_system_message_without_a_place_of_its_own(template: str) -> None:
    found = texts(template)
    assert set(found) == {"head", "picture", "user", "assistant", "start"}
    assert found["picture"] == "[I] {image}\n{prompt} [/I]"


@pytest.mark.parametrize("template", [LAST_ALONE, PLAIN_TEXTS], ids=["only the last", "no parts"])
def test_a_chat_template_without_places_for_earlier_messages(template: str) -> None:
    assert texts(template) == {}
