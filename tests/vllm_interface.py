"""What vLLM's documentation says of its interface, on a tiny model: `LLM`, `SamplingParams`, `LoRARequest`, the server.

Written for the tests, since vLLM itself does not run here. Requests and responses have vLLM's shapes and names; what
it does not know it refuses, as vLLM does. Samples come from the real model with the adapter that was handed over, read
from its folder by PEFT: tokens and log-probabilities are those of weights that went the whole way.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    """The part of `vllm.SamplingParams` that trivet uses."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True


@dataclass(frozen=True)
class LoRARequest:
    """`vllm.lora.request.LoRARequest`."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass(frozen=True)
class Logprob:
    """`vllm.logprobs.Logprob`."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """`vllm.outputs.CompletionOutput`."""

    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """`vllm.outputs.RequestOutput`."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class Sampler:
    """Samples from a saved base, bare or with an adapter from a folder."""

    def __init__(self, model: str, logprobs_mode: str = "raw_logprobs") -> None:
        assert logprobs_mode in ("raw_logprobs", "processed_logprobs")
        self._folder, self._mode = model, logprobs_mode
        self._base = self._load()
        self._adapted: dict[str, Any] = {}

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()

    def load(self, name: str, path: str) -> None:
        """Read an adapter; a name that is known keeps what it has, as vLLM does."""
        if name not in self._adapted:
            self._adapted[name] = PeftModel.from_pretrained(self._load(), path).eval()

    def unload(self, name: str) -> None:
        """Forget it."""
        del self._adapted[name]

    @property
    def adapters(self) -> list[str]:
        """Names of what is loaded."""
        return list(self._adapted)

    @torch.no_grad()
    def respond(self, prompt: list[int], given: SamplingParams, adapter: str | None) -> tuple[list[int], list[float]]:
        """Token by token, without a cache."""
        model = self._base if adapter is None else self._adapted[adapter]
        generator = torch.Generator().manual_seed(given.seed if given.seed is not None else 0)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < given.max_tokens and not (ids and ids[-1] in given.stop_token_ids):
            raw_V = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1]
            tempered_V = (raw_V / given.temperature).log_softmax(-1)
            assert given.top_p == 1.0 and given.top_k in (0, -1), "filters are not imitated"
            token = int(torch.multinomial(tempered_V.exp(), 1, generator=generator))
            said_V = tempered_V if self._mode == "processed_logprobs" else raw_V.log_softmax(-1)
            ids.append(token)
            logprobs.append(float(said_V[token]))
        return ids, logprobs


class LLM:
    """`vllm.LLM` with the options that trivet sets; `made` lists all that were started."""

    made: list[LLM] = []  # noqa: RUF012

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        max_loras: int = 1,
        logprobs_mode: str = "raw_logprobs",
        skip_tokenizer_init: bool = False,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        assert enable_lora and skip_tokenizer_init and dtype in ("float32", "bfloat16")
        if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError(f"max_lora_rank ({max_lora_rank}) must be one of ...")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.sampler = Sampler(model, logprobs_mode)
        self.requests: list[LoRARequest | None] = []
        LLM.made.append(self)

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """Responses in the order of the prompts."""
        self.requests.append(lora_request)
        if lora_request is not None:
            assert lora_request.lora_int_id > 0
            self.sampler.load(lora_request.lora_name, lora_request.lora_path)
        found = []
        for number, (prompt, given) in enumerate(zip(prompts, sampling_params, strict=True)):
            assert not given.detokenize, "without a tokenizer there is no text"
            ids, logprobs = self.sampler.respond(
                prompt["prompt_token_ids"], given, lora_request and lora_request.lora_name
            )
            steps = [{token: Logprob(value)} for token, value in zip(ids, logprobs, strict=True)]
            reason = "stop" if ids[-1] in given.stop_token_ids else "length"
            output = CompletionOutput(0, ids, None if given.logprobs is None else steps, reason)
            found.append(RequestOutput(str(number), prompt["prompt_token_ids"], [output]))
        return found


def modules() -> dict[str, ModuleType]:
    """`vllm` and what trivet imports of it, for `sys.modules`."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, __path__=[])
    lora.__dict__.update(__path__=[])
    request.__dict__.update(LoRARequest=LoRARequest)
    return {"vllm": package, "vllm.lora": lora, "vllm.lora.request": request}


@contextmanager
def server(folder: Path, *, updates: bool = True, fault: str | None = None) -> Iterator[tuple[str, Sampler]]:
    """vLLM's server on a free port: its address, and what it has loaded.

    Args:
        updates: whether it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        fault: `no ids` for a server too old to give token ids, `short` for responses without their last token, `nan`
            and `beyond` for a log-probability and a token that are none, `no logprobs`, `no choice`, `words` for a
            server that is another program, `no base` for one that has adapters alone.
    """
    sampler, lock = Sampler(str(folder), "processed_logprobs"), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _say(self, code: int, body: Any) -> None:
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            if fault == "words":
                self._say(200, "Hello.")
                return
            adapters = [{"id": name, "object": "model", "parent": "base"} for name in sampler.adapters]
            base = [] if fault == "no base" else [{"id": "base", "object": "model", "parent": None}]
            self._say(200, {"object": "list", "data": [*base, *adapters]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                if self.path.endswith("lora_adapter") and not updates:
                    self._say(404, {"detail": "Not Found"})
                elif self.path == "/v1/load_lora_adapter":
                    sampler.load(body["lora_name"], body["lora_path"])
                    self._say(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
                elif self.path == "/v1/unload_lora_adapter":
                    sampler.unload(body["lora_name"])
                    self._say(200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")
                else:
                    assert self.path == "/v1/completions"
                    self._say(200, self._complete(body))

        def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
            name, prompt, return_ids = body.pop("model"), body.pop("prompt"), body.pop("return_token_ids", False)
            given = SamplingParams(**body, detokenize=False)
            ids, logprobs = sampler.respond(prompt, given, None if name == "base" else name)
            if fault == "short":
                ids, logprobs = ids[:-1], logprobs[:-1]
            if fault == "nan":
                logprobs = [*logprobs[:-1], float("nan")]
            if fault == "beyond":
                ids = [10_000_000, *ids[1:]]
            choice: dict[str, Any] = {
                "index": 0,
                "text": "",
                "logprobs": None
                if given.logprobs is None or fault == "no logprobs"
                else {"token_logprobs": logprobs, "tokens": [], "top_logprobs": []},
                "finish_reason": "stop" if ids and ids[-1] in given.stop_token_ids else "length",
            }
            if return_ids and fault != "no ids":
                choice |= {"token_ids": ids, "prompt_token_ids": prompt}
            choices = [] if fault == "no choice" else [choice]
            return {"id": "cmpl-1", "object": "text_completion", "model": name, "choices": choices}

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}", sampler
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
