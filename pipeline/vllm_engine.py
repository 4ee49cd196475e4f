"""Responses by vLLM, in this process or on a server. Only the adapter goes there: as a LoRA request, anew each time.

vLLM is not a dependency: `pip install trivet[vllm]`, or a server (`vllm serve BASE --enable-lora`, with
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` and `--logprobs-mode processed_logprobs`, and `--max-lora-rank` where the rank is
above 16). Written against the interface that its documentation describes.

It takes no uniform numbers. Each response has a seed of its own that follows from the round's seed and its number, but
what vLLM makes of it also depends on its version, its kernels and on what else is in the batch: samples do not follow
from the number alone. A run that is resumed goes on all the same, since finished rounds are kept on disk.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline.errors import BaseModelError, ConfigError
from pipeline.generation import Response, SamplingSettings, derive_seed
from pipeline.roles import Role, Roles

_POLL_SECONDS, _ANSWER_SECONDS, _CONNECT_SECONDS = 0.1, 3600.0, 10.0
_OURS = ("model", "tokenizer", "enable_lora", "max_lora_rank", "max_loras", "logprobs_mode", "skip_tokenizer_init")
"""Options of `LLM` that trivet sets."""


class _Backend(Protocol):
    """vLLM, wherever it runs."""

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        adapter: tuple[str, Path] | None,
        on_batch: Callable[[int], None],
        on_token: Callable[[], None],
    ) -> list[tuple[Sequence[int], Sequence[float]]]:
        """Token ids, and the log-probability of each, a response a prompt.

        Args:
            parameters: of each response, by the names that vLLM's `SamplingParams` and its server share.
            adapter: a name that was not used before, and the folder; None for the bare base.
        """
        ...


def require_vllm(server: str | None) -> None:
    """Refuse to start where there is no vLLM.

    Raises:
        ConfigError: it is not installed, or the server does not answer.
    """
    if server is not None:
        _Server(server)
    elif importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed",
            where="ppo.rollout.engine=vllm",
            remedy="pip install 'trivet[vllm]', or set ppo.rollout.server to a vLLM server, or another engine.",
        )


def sample_with_vllm(
    roles: Roles,
    role: Role | None,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    *,
    seed: tuple[int | str, ...],
    numbers: Sequence[int] | None = None,
    with_values: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_token: Callable[[], None] | None = None,
) -> list[Response]:
    """As `pipeline.generation.generate`, without values, and with chance of vLLM's own.

    `on_token` is called some times a second where vLLM runs on a server, else once a batch.

    Raises:
        ConfigError: vLLM is not there, or refuses its options.
        BaseModelError: it failed, or gave what does not belong to the request.
    """
    eos = roles.base.chat.eos_token_id
    numbers = range(len(prompts)) if numbers is None else numbers
    parameters = [_parameters(sampling, eos, derive_seed(*seed, number)) for number in numbers]
    backend = _backend(roles, sampling)
    with _adapter(roles, role) as adapter:
        found = backend.respond(
            prompts, parameters, adapter, on_batch or (lambda count: None), on_token or (lambda: None)
        )
    size = roles.base.model.get_input_embeddings().num_embeddings
    return [_response(ids, logprobs, sampling, eos, size) for ids, logprobs in found]


def _parameters(sampling: SamplingSettings, eos: int, seed: int) -> dict[str, Any]:
    """How one response is drawn, by the names that vLLM's `SamplingParams` and its server share."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,  # 0 is off there too
        "seed": seed,
        "stop_token_ids": [] if sampling.ignore_eos else [eos],
        "ignore_eos": True,  # the checkpoint's own; ours is a stop token
    }


def _response(
    ids: Sequence[int], logprobs: Sequence[float], sampling: SamplingSettings, eos: int, vocabulary: int
) -> Response:
    """What vLLM gave, if it is one response.

    Raises:
        BaseModelError: it is none: it goes on after an EOS, is too long or empty, has tokens that the base does not
            know, or lacks log-probabilities that are finite.
    """
    ends = [place for place, token in enumerate(ids) if token == eos] if not sampling.ignore_eos else []
    problem = None
    if not 0 < len(ids) <= sampling.max_new_tokens:
        problem = f"a response of {len(ids)} tokens, where 1 to {sampling.max_new_tokens} were asked for"
    elif len(logprobs) != len(ids):
        problem = f"{len(logprobs)} log-probabilities for {len(ids)} tokens"
    elif not all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
        problem = "a log-probability that is no finite number"
    elif not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
        problem = f"a token that is none of the base's {vocabulary}"
    elif ends and ends[0] != len(ids) - 1:
        problem = f"a response that goes on after its EOS, token {ends[0] + 1} of {len(ids)}"
    elif not ends and len(ids) < sampling.max_new_tokens:
        problem = f"a response that ends after {len(ids)} tokens without an EOS"
    if problem is not None:
        raise _failed(f"it gave {problem}")
    return Response(tuple(ids), tuple(logprobs), bool(ends))


@contextmanager
def _adapter(roles: Roles, role: Role | None) -> Iterator[tuple[str, Path] | None]:
    """The role's adapter in a folder that lasts as long as the block, under a name of its own; None for the base.

    vLLM keeps what it has loaded by name, so that new weights need a new one.
    """
    if role is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="trivet-adapter-") as folder:
        roles.save(role, Path(folder))
        yield Path(folder).name, Path(folder)


_BACKENDS: weakref.WeakKeyDictionary[Roles, _Backend] = weakref.WeakKeyDictionary()
"""vLLM loads its base once for all rounds."""


def _backend(roles: Roles, sampling: SamplingSettings) -> _Backend:
    if roles not in _BACKENDS:
        _BACKENDS[roles] = _InProcess(roles, sampling) if sampling.server is None else _Server(sampling.server)
    return _BACKENDS[roles]


class _InProcess:
    """vLLM's `LLM` beside the trainer."""

    def __init__(self, roles: Roles, sampling: SamplingSettings) -> None:
        require_vllm(None)
        if taken := sorted(set(sampling.vllm) & set(_OURS)):
            raise ConfigError(
                f"trivet sets vLLM's option '{taken[0]}' itself",
                where=f"ppo.rollout.vllm.{taken[0]}",
                remedy="Remove it.",
            )
        self._vllm: Any = __import__("vllm")
        self._requests: Any = __import__("vllm.lora.request", fromlist=["LoRARequest"])
        self._loaded = 0
        rank = max(config.r for config in roles.model.peft_config.values())
        tempered = sampling.top_k == 0 and sampling.top_p == 1.0
        options = {"dtype": str(roles.base.model.dtype).removeprefix("torch."), "seed": 0, **sampling.vllm}
        try:
            self._llm = self._vllm.LLM(
                model=str(roles.base.model.config._name_or_path),
                enable_lora=True,
                max_lora_rank=_allowed_rank(rank),
                max_loras=1,
                # Ours are of the tempered, unfiltered distribution; where both differ the config is refused.
                logprobs_mode="processed_logprobs" if tempered else "raw_logprobs",
                skip_tokenizer_init=True,
                **options,
            )
        except (TypeError, ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(
                f"vLLM does not start: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                where="ppo.rollout.engine=vllm",
                remedy="See its own lines above; ppo.rollout.vllm takes its options.",
            ) from error

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        adapter: tuple[str, Path] | None,
        on_batch: Callable[[int], None],
        on_token: Callable[[], None],
    ) -> list[tuple[Sequence[int], Sequence[float]]]:
        on_token()
        request = None
        if adapter is not None:
            self._loaded += 1
            name, folder = adapter
            request = self._requests.LoRARequest(name, self._loaded, str(folder))
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._vllm.SamplingParams(logprobs=0, detokenize=False, **given) for given in parameters],
            lora_request=request,
            use_tqdm=False,
        )
        on_batch(len(prompts))
        found = []
        for prompt, output in zip(prompts, outputs, strict=True):
            if list(output.prompt_token_ids) != list(prompt):
                raise _failed("its responses came in another order than the requests")
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            found.append((ids, [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]))
        return cast(list[tuple[Sequence[int], Sequence[float]]], found)


def _allowed_rank(rank: int) -> int:
    """The next of the ranks that vLLM has kernels for."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= allowed), rank)


class _Server:
    """vLLM's server, by HTTP."""

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        said = self._ask("/v1/models", None, seconds=_CONNECT_SECONDS)
        try:
            self._base = str(next(model["id"] for model in said["data"] if model.get("parent") is None))
        except (TypeError, KeyError, AttributeError, StopIteration):
            raise ConfigError(
                "what answers there names no base model as vLLM does",
                where=f"ppo.rollout.server={self._address}",
                remedy="Give the address of a vLLM server, such as http://localhost:8000, without a path.",
            ) from None

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        adapter: tuple[str, Path] | None,
        on_batch: Callable[[int], None],
        on_token: Callable[[], None],
    ) -> list[tuple[Sequence[int], Sequence[float]]]:
        if adapter is None:
            return self._complete(self._base, prompts, parameters, on_batch, on_token)
        name, folder = adapter
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        try:
            return self._complete(name, prompts, parameters, on_batch, on_token)
        finally:
            self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def _complete(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        on_batch: Callable[[int], None],
        on_token: Callable[[], None],
    ) -> list[tuple[Sequence[int], Sequence[float]]]:
        """A request a response, since each has a seed of its own; the server puts them into batches."""
        with ThreadPoolExecutor(max_workers=min(64, len(prompts))) as pool:
            asked = [
                pool.submit(self._one, model, prompt, given) for prompt, given in zip(prompts, parameters, strict=True)
            ]
            try:
                left = set(asked)
                while left:
                    done, left = wait(left, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                    on_token()
                    if done:
                        on_batch(len(done))
                return [future.result() for future in asked]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _one(
        self, model: str, prompt: Sequence[int], parameters: Mapping[str, Any]
    ) -> tuple[Sequence[int], Sequence[float]]:
        request = {"model": model, "prompt": list(prompt), "logprobs": 0, "return_token_ids": True, **parameters}
        said = self._ask("/v1/completions", request)
        try:
            choice = said["choices"][0]
            if not choice.get("token_ids"):
                raise _failed("the server gives no token ids; it needs vLLM 0.10.2 or newer")
            return list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
        except (TypeError, KeyError, IndexError, AttributeError):
            raise _failed("the server's answer lacks a completion, or its log-probabilities") from None

    def _ask(self, path: str, body: Mapping[str, Any] | None, *, seconds: float = _ANSWER_SECONDS) -> Any:
        """The server's answer as JSON; None where it says something else in words.

        Raises:
            ConfigError: it is not there, or refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                said = answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").partition("\n")[0][:200]
            raise ConfigError(
                f"the vLLM server answers {path} with {error.code}: {said}",
                where=f"ppo.rollout.server={self._address}",
                remedy="Start it with --enable-lora, --max-lora-rank of at least lora.rank and"
                " VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, where it sees this machine's folder for temporary files.",
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the vLLM server does not answer: {error}",
                where=f"ppo.rollout.server={self._address}",
                remedy="Start it (vllm serve BASE --enable-lora), or set another engine.",
            ) from None
        try:
            return json.loads(said)
        except ValueError:
            return None


def _failed(problem: str) -> BaseModelError:
    return BaseModelError(
        f"vLLM cannot be used: {problem}", where="ppo.rollout.engine=vllm", remedy="Set ppo.rollout.engine=generate."
    )
