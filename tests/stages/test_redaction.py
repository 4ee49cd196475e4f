"""Secrets of the environment stay out of what is logged."""

from __future__ import annotations

from stages.redaction import redaction


def test_values_of_secret_variables_are_replaced() -> None:
    hide = redaction(
        {
            "HF_TOKEN": "hf_abcdefgh",
            "OTHER_TOKEN": "hf_abcdefgh-and-more",
            "PREFECT_API_AUTH_STRING": "user:pass.word",
            "TOKENIZERS_PARALLELISM": "false",
            "HOME": "/home/somebody",
            "EMPTY_SECRET": "",
            "BLANK_SECRET": "          ",
        }
    )
    assert hide("with hf_abcdefgh-and-more, hf_abcdefgh") == "with <OTHER_TOKEN>, <HF_TOKEN>"
    assert hide("user:pass.word user:passxword") == "<PREFECT_API_AUTH_STRING> user:passxword"
    assert hide("false /home/somebody          ") == "false /home/somebody          "


def test_without_secrets_nothing_changes() -> None:
    assert redaction({"HOME": "/home/somebody"})("/home/somebody") == "/home/somebody"
