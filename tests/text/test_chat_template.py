"""Chat templates that read more than the conversation: the date, arguments; and copies of tokenizer and template.

The oracle is transformers, with the clock set.
"""

import json
import shutil
from datetime import datetime, timedelta

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from tests.support.checkpoints import make_checkpoint, make_tokenizer
from thinksafe.errors import UserError
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.text.chat import Chat
from thinksafe.text.tokenizer import SafeTokenizer

DAY = datetime(2031, 2, 3, 23, 59, 58)
NEXT_DAY = DAY + timedelta(seconds=5)

TURNS = (
    "{%- for turn in messages -%}{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
DATED = {
    "call": "{{- '<|im_start|>system\\nToday is ' + strftime_now('%Y-%m-%d') + '.<|im_end|>\\n' -}}" + TURNS,
    "variable": (
        "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
        "{%- set date_string = strftime_now('%d %b %Y') -%}{%- else -%}{%- set date_string = '26 Jul 2024' -%}"
        "{%- endif -%}{%- endif -%}{{- '<|im_start|>system\\nToday Date: ' + date_string + '<|im_end|>\\n' -}}" + TURNS
    ),
    "macro": (
        "{%- macro header() -%}<|im_start|>system\\nAt {{ strftime_now('%H:%M:%S on %A') }}<|im_end|>{%- endmacro -%}"
        "{{- header() -}}" + TURNS
    ),
    "after the turn": TURNS + "{%- if add_generation_prompt -%}{{- strftime_now('(%j)') -}}{%- endif -%}",
}

SWITCHED = {
    "on by default": TURNS
    + "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}",
    "closed by default": TURNS
    + "{%- if add_generation_prompt -%}{%- if enable_thinking is defined and enable_thinking is true -%}"
    "{{- '<think>\\n' -}}{%- else -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}",
    "off by default": "{%- if thinking -%}{{- '<|im_start|>system\\nThink first.<|im_end|>\\n' -}}{%- endif -%}"
    + TURNS,
    "always closed": TURNS + "{%- if add_generation_prompt -%}{{- '<think></think>' -}}{%- endif -%}",
}


@pytest.fixture
def folder_with(tmp_path):
    """Function that writes a Qwen3 tokenizer with another template to a folder, and returns the folder."""

    def write(template):
        make_tokenizer("qwen3").save_pretrained(tmp_path / "student")
        (tmp_path / "student" / "chat_template.jinja").write_text(template)
        return tmp_path / "student"

    return write


@pytest.fixture
def set_clock(monkeypatch):
    """Function that sets the clock which transformers reads for templates."""

    def set_now(now):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return now

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_now


# The date


@pytest.mark.parametrize("template", DATED.values(), ids=DATED)
def test_prompt_has_the_ids_of_transformers_on_the_given_day(folder_with, set_clock, template):
    folder = folder_with(template)
    set_clock(DAY)
    turns = [{"role": "user", "content": "How do I fold a boat?"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    set_clock(NEXT_DAY)
    assert Chat(SafeTokenizer(folder, DAY)).prompt_ids("How do I fold a boat?") == list(expected)
    assert Chat(SafeTokenizer(folder, NEXT_DAY)).prompt_ids("How do I fold a boat?") != list(expected)


@pytest.mark.parametrize("template", DATED.values(), ids=DATED)
def test_chat_keeps_its_day_over_midnight(folder_with, template):
    chat = Chat(SafeTokenizer(folder_with(template), DAY))
    assert chat.two_turns()[0] == chat.user_turn[0] and chat.template_strips is False
    assert (
        chat.fingerprint
        == Chat(SafeTokenizer(chat.folder, DAY)).fingerprint
        != Chat(SafeTokenizer(chat.folder, NEXT_DAY)).fingerprint
    )


def test_chat_without_a_day_has_the_present_one(folder_with):
    today = {f"Today is {datetime.now() + timedelta(seconds=s):%Y-%m-%d}." for s in (0, 600)}
    assert any(text in Chat(folder_with(DATED["call"])).user_turn[0] for text in today)


def test_guards_prompt_has_the_given_day(folder_with):
    folder = folder_with(DATED["call"])
    for template in (None, "Judge this. {prompt} {response}"):
        question = Question("harm", {"safe": "safe", "unsafe": "unsafe"})
        layout = GuardFormat((question,), template=template).layout
        assert "Today is 2031-02-03." in layout(SafeTokenizer(folder, DAY)).pieces[0][0]
        assert "Today is 2031-02-04." in layout(SafeTokenizer(folder, NEXT_DAY)).pieces[0][0]


# Arguments


def test_argument_reaches_the_template(folder_with):
    folder = folder_with(SWITCHED["closed by default"])
    chat = Chat(folder, {"enable_thinking": True})
    turns = [{"role": "user", "content": "Why?"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=True)["input_ids"]
    assert chat.prompt_ids("Why?") == list(expected) != Chat(folder).prompt_ids("Why?")
    assert chat.supplies_think and not Chat(folder).supplies_think


def test_argument_may_set_the_date(folder_with):
    chat = Chat(folder_with(DATED["variable"]), {"date_string": "1 Jan 2020"})
    assert "Today Date: 1 Jan 2020" in chat.user_turn[0]


@pytest.mark.parametrize("name", ["enable_thinkin", "think", "im_start", "content", "turn", "if", "strftime_now"])
def test_argument_that_the_template_does_not_read_is_an_error(folder_with, name):
    folder = folder_with(SWITCHED["on by default"] + "{# enable_thinkin #}")
    with pytest.raises(UserError) as error:
        Chat(folder, {"enable_thinking": True, name: True})
    assert f"template_arguments.{name}: " in str(error.value) and str(folder) in str(error.value)
    assert "it reads enable_thinking" in str(error.value)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tokenize", "tools", "max_length"])
def test_argument_that_is_not_the_templates_own_is_an_error(folder_with, name):
    with pytest.raises(UserError, match=f"template_arguments.{name}: is not an argument for recipes"):
        Chat(folder_with("{%- set x = " + name + " -%}" + TURNS), {name: "x"})


# Templates that leave out the thought


@pytest.mark.parametrize(
    "kind, arguments, note",
    [
        ("on by default", {}, ""),
        ("on by default", {"enable_thinking": True}, ""),
        ("on by default", {"enable_thinking": False}, "closes the think block in the prompt, so responses"),
        ("closed by default", {}, "closes the think block in the prompt; set template_arguments.enable_thinking=true"),
        ("closed by default", {"enable_thinking": True}, ""),
        ("off by default", {}, "leaves thinking off; set template_arguments.thinking=true"),
        ("off by default", {"thinking": False}, ""),
        ("always closed", {}, "closes the think block in the prompt, so responses"),
    ],
)
def test_note_says_that_the_template_leaves_out_the_thought(folder_with, kind, arguments, note):
    chat = Chat(folder_with(SWITCHED[kind]), arguments)
    assert note in chat.thinking_note and bool(note) == bool(chat.thinking_note) and "\n" not in chat.thinking_note


def test_switch_that_fails_gives_no_note(folder_with):
    template = "{%- if enable_thinking is true -%}{{- raise_exception('not a level') -}}{%- endif -%}" + TURNS
    assert Chat(folder_with(template)).thinking_note == ""


def test_closed_think_block_of_deepseek_stays_closed(tmp_path):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\\n", "</think>")
    tokenizer.save_pretrained(tmp_path)
    assert Chat(tmp_path).user_turn[1] == "<｜Assistant｜></think>"


# The end of the turn


@pytest.mark.parametrize("family, ends", [("qwen3", ["<|im_end|>", "<|endoftext|>"]), ("mistral", ["</s>"])])
def test_turn_end_is_stripped_from_a_response(tmp_path, family, ends):
    chat = Chat(make_checkpoint(family, tmp_path / family))
    text = "<think>\na\n</think>\n\nb"
    for end in [*ends, "".join(ends), ends[0] * 2]:
        for tail in (end, f"{end}\n", f"\n{end} {end}\n"):
            assert chat.without_turn_end(text + tail).rstrip() == text
            assert not chat.has_control_token(chat.without_turn_end(text + tail))
    for unchanged in (text, f"{text}\n", f"{text}{ends[0]} c", f"{ends[0]}{text}", "", "a <"):
        assert chat.without_turn_end(unchanged) == unchanged


# Copies


FILES = {"vocab.json": "{}", "merges.txt": "#version: 0.2\n", "tokenizer.model": "x", "added_tokens.json": "{}"}


def test_copy_holds_every_file_of_the_tokenizer(folder_with, tmp_path):
    folder = folder_with(TURNS)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "model.safetensors").write_text("weights")
    copy = tmp_path / "copy"
    copy.mkdir()
    Chat(folder).save(copy)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()} == files - {"model.safetensors"}
    assert AutoTokenizer.from_pretrained(copy).chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    assert Chat(copy).prompt_ids("Why?") == Chat(folder).prompt_ids("Why?")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_copy_that_differs_is_an_error(folder_with, tmp_path, monkeypatch, name):
    folder = folder_with(TURNS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3]}))
    real_copy = shutil.copy

    def damaged_copy(source, target):
        real_copy(source, target)
        if source.name == name:
            text = target.read_text()
            target.write_text(text.replace("[3]", "[4]").replace("im_end", "im_stop"))

    monkeypatch.setattr("thinksafe.text.tokenizer.shutil.copy", damaged_copy)
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(UserError, match=str(copy)):
        Chat(folder).save(copy)
