"""A byte-level tokenizer built in code: 256 bytes, three special tokens, a ChatML template."""

from __future__ import annotations

from typing import Any, Literal

Variant = Literal["chatml", "no_pad", "bos", "no_eos_in_template", "generation_tags", "no_template", "no_eos"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
CHATML_WITH_GENERATION_TAGS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_EOS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer(variant: Variant = "chatml") -> Any:
    """A `PreTrainedTokenizerFast` of 259 tokens, one a byte and then the special ones.

    Args:
        variant: `chatml`: pad = eos = <|im_end|>, no BOS; `no_pad`: without a pad token; `bos`: puts
            <|endoftext|> before every plain text, and so does its template; `no_eos_in_template`: turns end
            with a line break only; `generation_tags`: the template marks the assistant's words for
            transformers; `no_template`; `no_eos`: neither an EOS token nor one in the template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    template: str | None = CHATML
    if variant == "no_pad":
        del names["pad_token"]
    elif variant == "bos":
        template = CHATML_WITH_BOS
        names["bos_token"] = "<|endoftext|>"
        bos = [("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=bos
        )
    elif variant == "no_eos_in_template":
        template = WITHOUT_EOS
    elif variant == "generation_tags":
        template = CHATML_WITH_GENERATION_TAGS
    elif variant == "no_template":
        template = None
    elif variant == "no_eos":
        template = WITHOUT_EOS
        del names["eos_token"], names["pad_token"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
