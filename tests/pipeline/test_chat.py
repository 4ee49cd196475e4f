"""The chat format: prompt and completion as tokens, the loss mask, EOS, BOS, digests, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, Variant, tiny_tokenizer

from pipeline.chat import ChatFormat
from pipeline.errors import BaseModelError, DataError
from pipeline.records import Message, Messages, Text

EOS = "<|im_end|>"
WITH_EOS: tuple[Variant, ...] = ("chatml", "no_pad", "bos", "no_eos_in_template", "generation_tags")


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


FORMATS = {variant: ChatFormat(tiny_tokenizer(variant)) for variant in WITH_EOS}


def spoken(chat: ChatFormat, prompt: Text, completion: Text) -> str:
    """What the loss runs over, special tokens included."""
    example = chat.example(prompt, completion)
    return str(chat.tokenizer.decode([i for i, said in zip(example.ids, example.loss_mask, strict=True) if said]))


def whole(chat: ChatFormat, prompt: Text, completion: Text) -> str:
    return str(chat.tokenizer.decode(list(chat.example(prompt, completion).ids)))


# ---- against the template itself


def test_a_conversation_reads_as_its_template_writes_it_up_to_the_eos() -> None:
    chat = FORMATS["chatml"]
    prompt, completion = (user("Hi"),), (assistant("Yo"), user("And?"), assistant("Well."))
    expected = chat.tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in prompt + completion], tokenize=False
    )
    assert expected.endswith(f"Well.{EOS}\n")
    assert whole(chat, prompt, completion) == expected.removesuffix("\n")


def test_the_prompt_ends_with_the_opening_of_an_assistant_turn() -> None:
    chat = FORMATS["chatml"]
    assert chat.tokenizer.decode(chat.prompt_ids((user("Hi"),))).endswith(f"Hi{EOS}\n<|im_start|>assistant\n")


def test_the_mask_agrees_with_transformers_own_for_a_template_that_marks_the_assistant() -> None:
    chat = FORMATS["generation_tags"]
    prompt, completion = (user("Hi"),), (assistant("Yo"), user("And?"), assistant("Well."))
    independent = chat.tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in prompt + completion],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = chat.example(prompt, completion)
    assert list(example.ids) == independent["input_ids"][:-1]
    assert [int(said) for said in example.loss_mask] == independent["assistant_masks"][:-1]


def test_only_the_assistant_is_learnt_from_and_each_of_its_turns_ends() -> None:
    turns = (assistant("Yo"), user("And?"), assistant("Well."))
    assert spoken(FORMATS["chatml"], (user("Hi"),), turns) == f"Yo{EOS}Well.{EOS}"
    # A template without EOS gets one at the very end only.
    assert spoken(FORMATS["no_eos_in_template"], (user("Hi"),), turns) == f"YoWell.{EOS}"
    assert whole(FORMATS["no_eos_in_template"], (user("Hi"),), turns) == (
        f"user: Hi\nassistant: Yo\nuser: And?\nassistant: Well.{EOS}"
    )


def test_a_text_after_messages_is_an_assistant_turn() -> None:
    chat = FORMATS["chatml"]
    assert chat.example((user("Hi"),), "Yo") == chat.example((user("Hi"),), (assistant("Yo"),))


def test_plain_text_is_continued_and_ends() -> None:
    for chat in FORMATS.values():
        assert spoken(chat, "A review:", " good") == f" good{EOS}"
        assert chat.decode(chat.example("A review:", " good").ids) == "A review: good"


# ---- properties

words = st.text(alphabet=st.sampled_from("ab é\n.<|>\u4e2d🙂"), min_size=1, max_size=12)
conversations = st.builds(
    lambda system, turns: (*((Message("system", system),) if system else ()), *turns),
    st.none() | words,
    st.integers(0, 2).flatmap(
        lambda n: st.tuples(*(words for _ in range(2 * n + 1))).map(
            lambda texts: tuple(assistant(text) if i % 2 else user(text) for i, text in enumerate(texts))
        )
    ),
)
answers = st.integers(0, 2).flatmap(
    lambda n: st.tuples(*(words for _ in range(2 * n + 1))).map(
        lambda texts: tuple(user(text) if i % 2 else assistant(text) for i, text in enumerate(texts))
    )
)


@settings(max_examples=60, deadline=None)
@given(prompt=conversations, completion=answers, variant=st.sampled_from(WITH_EOS))
def test_prompt_and_completion_meet_where_ppo_sees_them_meet(
    prompt: Messages, completion: Messages, variant: Variant
) -> None:
    chat = FORMATS[variant]
    ids = chat.prompt_ids(prompt)
    example = chat.example(prompt, completion)
    assert list(example.ids[: len(ids)]) == ids
    assert not any(example.loss_mask[: len(ids)])
    assert len(example.ids) == len(example.loss_mask)
    assert example.ids[-1] == chat.eos_token_id and example.loss_mask[-1]
    assert example.ids[-2] != chat.eos_token_id
    said = [i for i, mask in zip(example.ids, example.loss_mask, strict=True) if mask]
    assert chat.decode(said) == "".join(turn.content for turn in completion if turn.role == "assistant")
    eos_turns = 1 if variant == "no_eos_in_template" else sum(turn.role == "assistant" for turn in completion)
    assert said.count(chat.eos_token_id) == eos_turns


@settings(max_examples=60, deadline=None)
@given(prompt=words, completion=words, variant=st.sampled_from(WITH_EOS))
def test_plain_texts_meet_there_too(prompt: str, completion: str, variant: Variant) -> None:
    chat = FORMATS[variant]
    ids = chat.prompt_ids(prompt)
    example = chat.example(prompt, completion)
    assert list(example.ids[: len(ids)]) == ids
    assert example.loss_mask == (False,) * len(ids) + (True,) * (len(example.ids) - len(ids))
    assert example.ids.count(chat.eos_token_id) == 1
    assert chat.decode(example.ids[len(ids) : -1]) == completion


def test_there_is_never_a_second_bos() -> None:
    chat = FORMATS["bos"]
    bos = chat.tokenizer.bos_token_id
    for prompt in ("Hi", "<|endoftext|>Hi", (user("Hi"),)):
        assert chat.prompt_ids(prompt)[0] == bos
        assert chat.example(prompt, "Yo").ids.count(bos) == 1
    assert FORMATS["chatml"].prompt_ids("Hi")[0] != bos


def test_padding_changes_nothing() -> None:
    prompt, completion = (user("Hi"),), (assistant("Yo"),)
    assert FORMATS["no_pad"].tokenizer.pad_token is None
    assert FORMATS["no_pad"].example(prompt, completion) == FORMATS["chatml"].example(prompt, completion)
    other = tiny_tokenizer()
    other.pad_token = "<|endoftext|>"
    other.backend_tokenizer.enable_padding(length=99)
    other.backend_tokenizer.enable_truncation(2)
    assert ChatFormat(other).tokenizer_digest == FORMATS["chatml"].tokenizer_digest
    assert ChatFormat(other).example(prompt, completion) == FORMATS["chatml"].example(prompt, completion)


# ---- tokenizers and templates of other families


def spaced_tokenizer() -> Any:
    """A tokenizer that, like Llama 2's, puts a space before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzYH[]/<>:\n"]
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_no_space_slips_in_between_prompt_and_completion() -> None:
    chat = ChatFormat(spaced_tokenizer())
    example = chat.example("ab", "cd")
    assert chat.tokenizer.convert_ids_to_tokens(list(example.ids)) == ["▁", "a", "b", "c", "d", "</s>"]
    assert chat.decode(example.ids) == "abcd"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # Gemma: turns end with a special token that is not the tokenizer's EOS.
        (CHATML.replace(EOS, "<|endoftext|>"), "Yo<|endoftext|>"),
        # Phi: the tokenizer's EOS once more at the very end of a conversation.
        (CHATML.replace(EOS, "<|endoftext|>") + "{% if not add_generation_prompt %}<|im_end|>{% endif %}", None),
        # Llama 2: a space before the EOS.
        (CHATML.replace(EOS, f" {EOS}"), f"Yo {EOS}"),
    ],
)
def test_a_response_ends_with_what_closes_the_templates_turns(template: str, text: str | None) -> None:
    chat = ChatFormat(tiny_tokenizer(), template)
    text = text or "Yo<|endoftext|>"
    ending = text[text.index("<") :]
    assert chat.tokenizer.convert_ids_to_tokens(chat.eos_token_id) == ending
    assert spoken(chat, (user("Hi"),), (assistant("Yo"),)) == text
    turns = (assistant("Yo"), user("And?"), assistant("Yo"))
    assert spoken(chat, (user("Hi"),), turns) == text * 2
    assert chat.example("plain", "text").ids[-1] == chat.eos_token_id


def test_a_given_template_replaces_the_tokenizers_own_and_leaves_the_tokenizer_alone() -> None:
    tokenizer = tiny_tokenizer("no_template")
    chat = ChatFormat(tokenizer, CHATML)
    assert chat.example((user("Hi"),), "Yo") == FORMATS["chatml"].example((user("Hi"),), "Yo")
    assert tokenizer.chat_template is None
    assert chat.has_template and not ChatFormat(tokenizer).has_template


def test_a_template_that_writes_the_date_always_writes_the_same() -> None:
    dated = "{{ strftime_now('%d %b %Y') }} {{ date_string }}" + CHATML
    chat = ChatFormat(tiny_tokenizer(), dated)
    assert chat.decode(chat.prompt_ids((user("Hi"),))).startswith("26 Jul 2024 26 Jul 2024")


# ---- refusals


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    # As Qwen3 does, which drops the thoughts of all answers but the last.
    rewriting = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatFormat(tiny_tokenizer(), rewriting)
    assert spoken(chat, (user("Hi"), assistant("Yo"), user("And?")), "So.") == f"<think></think>So.{EOS}"
    with pytest.raises(BaseModelError, match=r"differently once another follows(.|\n)*base\.chat_template"):
        chat.example((user("Hi"),), (assistant("Yo"), user("And?"), assistant("Well.")))


def test_messages_without_a_template_are_refused_and_plain_text_is_not() -> None:
    chat = ChatFormat(tiny_tokenizer("no_template"))
    with pytest.raises(BaseModelError, match=r"no chat template(.|\n)*base\.chat_template"):
        chat.prompt_ids((user("Hi"),))
    assert chat.decode(chat.example("a", "b").ids) == "ab"


def test_a_tokenizer_without_eos_is_refused_unless_the_template_closes_turns() -> None:
    chat = ChatFormat(tiny_tokenizer("no_eos"))
    with pytest.raises(BaseModelError, match=r"no EOS token(.|\n)*base\.chat_template"):
        chat.example("a", "b")
    assert chat.prompt_ids("a")
    closing = ChatFormat(tiny_tokenizer("no_eos"), CHATML)
    assert spoken(closing, (user("Hi"),), "Yo") == f"Yo{EOS}"


def test_a_template_that_is_not_jinja_is_named_with_its_line() -> None:
    with pytest.raises(BaseModelError, match=r"line 2: the chat template is not valid Jinja"):
        ChatFormat(tiny_tokenizer(), "{{ messages }}\n{% if %}").prompt_ids((user("Hi"),))


def test_a_conversation_that_the_template_refuses_is_a_fault_of_the_data() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    chat = ChatFormat(tiny_tokenizer(), strict + CHATML)
    with pytest.raises(DataError, match=r"turns system, user: System role not supported"):
        chat.prompt_ids((Message("system", "S"), user("Hi")))


def test_programmers_errors_are_named() -> None:
    chat = FORMATS["chatml"]
    with pytest.raises(ValueError, match="starts and ends with an assistant turn"):
        chat.example((user("Hi"),), (assistant("Yo"), user("And?")))
    with pytest.raises(ValueError, match="needs a prompt of messages"):
        chat.example("Hi", (assistant("Yo"),))


# ---- identity


def test_the_digests_tell_tokenizers_and_templates_apart() -> None:
    chat = FORMATS["chatml"]
    again = ChatFormat(tiny_tokenizer())
    assert (chat.tokenizer_digest, chat.template_digest) == (again.tokenizer_digest, again.template_digest)
    assert chat.tokenizer_digest == FORMATS["no_pad"].tokenizer_digest
    others = [FORMATS["bos"].tokenizer_digest, ChatFormat(tiny_tokenizer("no_eos")).tokenizer_digest]
    grown = tiny_tokenizer()
    grown.add_tokens(["<new>"], special_tokens=True)
    others.append(ChatFormat(grown).tokenizer_digest)
    assert len({chat.tokenizer_digest, *others}) == 4
    templates = {ChatFormat(tiny_tokenizer(), template).template_digest for template in (None, "a", "b", "")}
    assert len(templates) == 4


def test_a_token_that_opens_a_turn_is_found_though_nobody_flagged_it() -> None:
    tokenizer = tiny_tokenizer("no_template")
    tokenizer.add_tokens(["<|ask|>", "<|say|>", "  "], special_tokens=False)
    template = (
        "{% for m in messages %}  {{ '<|ask|>' if m['role'] == 'user' else '<|say|>' }}{{ m['content'] }}{% endfor %}"
    )
    chat = ChatFormat(tokenizer, template)
    assert chat.special_tokens_in("hi<|say|>Sure.  <|ask|>do it") == ["<|say|>", "<|ask|>"]


def test_special_tokens_in_a_text_are_found() -> None:
    chat = FORMATS["chatml"]
    assert chat.special_tokens_in("a <|im_end|><|im_start|>user <|im_end|") == ["<|im_end|>", "<|im_start|>"]
    assert chat.special_tokens_in("nothing") == []


@pytest.mark.parametrize("template", ["hello", "{% for m in messages %}{{ m['role'] }}{% endfor %}"])
def test_a_template_that_ignores_what_is_said_is_refused(template):
    with pytest.raises(BaseModelError, match="leaves out what is said"):
        ChatFormat(tiny_tokenizer(), template).eos_token_id  # noqa: B018
