"""How much memory each stage will take, by part, before anything is loaded: arithmetic on shapes and settings alone.

In the spirit of "A Study of Optimizations for Fine-tuning Large Language Models" (Singh et al. 2024, arXiv 2406.02290),
but counted for what trivet does: several adapters on one frozen base, logits in chunks, forward passes of a known
number of tokens. Every function is pure; the formula is in its docstring. `benchmarks/memory_plan.py` compares the
result with the peaks of real stages.

Legend: t tokens of a forward pass (padding included), n of them whose logits are wanted, B sequences, L tokens of a
sequence, D width, I inner width of the MLP, Hd = heads x head width, Kd = kv heads x head width, H heads, V vocabulary,
r rank, b bytes of the dtype that the base computes in, P linear parameters, N processes. All sizes are in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.cards import Card
from pipeline.config import PipelineConfig, TrainerSettings
from pipeline.model_shape import ModelShape
from pipeline.run_directory import StageName

Sharding = Literal["none", "ddp", "fsdp"]

NF4_BLOCK, NESTED_BLOCK = 64, 256
LOGIT_CHUNK_TOKENS = 256
"""As in `pipeline.scoring`, which imports torch; a test compares the two."""
TRL_TILE_TOKENS, TRL_TILE_VOCABULARY = 4096, 32_768
"""The tile of logits that TRL's fused loss keeps on a GPU."""
MERGED_SHARE = 0.25
"""As in `pipeline.merged_model`, which imports torch: a test compares the two."""
GATHERED_SHARE = 0.5
"""As in `pipeline.sharding`, likewise."""
CONTEXT_BYTES = 640 * 2**20
"""What CUDA, cuBLAS and bitsandbytes take of a card beside torch's tensors."""
FRAGMENTATION = 0.05
"""Share of the tensors' memory that the caching allocator may hold without using it."""
HEAP: Mapping[StageName, float] = {"sft": 0.44, "reward": 0.44, "ppo": 0.29, "evaluate": 0.44}
"""The same of the C library's allocator on a CPU, measured (docs/memory.md): PPO gives back what a phase has freed."""
QUANTIZED_IS_KEPT_FROM = 50_000_000
"""Parameters of a base; as in `pipeline.quantized_cache`, likewise."""
LIBRARIES_BYTES = 530 * 10**6
"""What a stage's process takes of main memory before it has loaded anything: torch, transformers, TRL."""


# ---- the base, the adapters, the optimizer


def weight_bytes(parameters: int, quantization: str, dtype_bytes: int) -> int:
    """Linear weights: nf4 P / 2, int8 P, none b P."""
    return {"nf4": parameters // 2, "int8": parameters}.get(quantization, parameters * dtype_bytes)


def constant_bytes(shape: ModelShape, quantization: str, *, double: bool) -> int:
    """What quantized weights are scaled by.

    nf4: 4 P / 64; twice quantized P / 64 + 4 P / (64 x 256), and two tables of 16 and 256 float32 numbers a matrix.
    int8: 4 bytes an output row.
    """
    matrices = list(shape.linears.values())
    if quantization == "nf4":
        blocks = sum(math.ceil(inputs * outputs / NF4_BLOCK) for inputs, outputs in matrices)
        nested = sum(math.ceil(inputs * outputs / NF4_BLOCK / NESTED_BLOCK) for inputs, outputs in matrices)
        tables = 4 * (16 + 256 + 1) if double else 4 * 16
        return shape.layers * ((blocks + 4 * nested if double else 4 * blocks) + tables * len(matrices))
    if quantization == "int8":
        return shape.layers * sum(4 * outputs for _, outputs in matrices)
    return 0


def optimizer_bytes(parameters: int, optimizer: str) -> int:
    """Adam's two moments: 8 bytes a parameter in float32, 2 and two scales a block of 256 in 8 bits."""
    if "8bit" in optimizer:
        return 2 * parameters + 8 * parameters // 256
    return 8 * parameters


# ---- activations


def saved_bytes_per_token(shape: ModelShape, rank: int, dtype_bytes: int, *, eager_length: int = 0) -> int:
    """What one layer keeps of a token for its backward pass, without checkpointing.

    Of the two norms a float32 input, 8 D, and in 16 bits their outputs, which the adapters read, 4 D. Attention keeps
    queries, keys and values (repeated for every head where rows are padded) and its result, which an adapter reads
    too, 4 b Hd; a fused kernel 4 H of sums besides, plain products (eager) their weights L H, 4 in float32 and 2 in 16
    bits. The MLP keeps gate, activation, the product and its other side, 4 b I. Besides 7 b r between the matrices of
    the adapters, and 8 of the norms. In float32 the norms' inputs are the residual stream itself: 16 (D + Hd + I).

    Args:
        eager_length: L where attention is eager; 0 where it is fused.
    """
    wide = dtype_bytes == 4
    attention = (4 if wide else 6) * eager_length * shape.heads or 4 * shape.heads
    small = 7 * dtype_bytes * rank + 8
    return (16 if wide else 12) * shape.width + 4 * dtype_bytes * (shape.query_width + shape.inner) + attention + small


def rounded_adapter_bytes(adapter_parameters: int, shape: ModelShape, dtype_bytes: int) -> int:
    """The copies in the base's 16 bits that one layer's adapters compute with, kept for the backward pass."""
    return 0 if dtype_bytes == 4 else dtype_bytes * adapter_parameters // shape.layers


def mask_bytes(sequences: int, length: int, dtype_bytes: int) -> int:
    """The attention mask of padded rows as the kernel reads it, in every layer: b B L^2."""
    return dtype_bytes * sequences * length * length


def int8_kept_bytes_per_token(shape: ModelShape, dtype_bytes: int) -> int:
    """What int8 layers keep in spite of checkpointing, since bitsandbytes saves it outside of autograd's sight.

    The inputs of a layer's products: b (2 D + Hd + I).
    """
    return dtype_bytes * (2 * shape.width + shape.query_width + shape.inner)


def forward_bytes_per_token(shape: ModelShape, dtype_bytes: int, *, merged: bool = False, eager_length: int = 0) -> int:
    """The most that is alive of a token in a forward pass without gradients.

    In `up_proj`: the embedding's output, the layer's input, the residual stream and its norm, 4 b D; the activated
    gate, the base's product, and its sum with the adapter's, 3 b I (in a merged copy there is no such sum, 2 b I);
    where attention is eager, its weights, b L H, which the layer holds on to. Or in eager attention's softmax: queries,
    keys and values with what is left of the first, 3 b (D + Hd), and L H weights before, in float32, and after: 10,
    in float32 8.
    """
    b, length = dtype_bytes, eager_length
    in_mlp = b * (4 * shape.width + (2 if merged else 3) * shape.inner + length * shape.heads)
    in_softmax = 3 * b * (shape.width + shape.query_width) + (8 if b == 4 else 10) * length * shape.heads
    return max(in_mlp, in_softmax) if length else in_mlp


def layer_transient_bytes_per_token(shape: ModelShape, dtype_bytes: int) -> int:
    """What a layer's backward pass needs of a token beside what the layer saves.

    That of `down_proj`: the gradients from the adapter and from the base, 2 b I. What is left are gradients of the
    residual stream, 2 b D, less its copies that are free by then: in float32, -2 D.
    """
    return 2 * dtype_bytes * shape.inner + (-2 if dtype_bytes == 4 else 2) * shape.width


def norm_backward_bytes_per_token(shape: ModelShape) -> int:
    """The backward pass of the last norm: gradients of its states in float32 and what they are summed up from, 18 D."""
    return 18 * shape.width


def logit_bytes(tokens: int, vocabulary: int, dtype_bytes: int, *, entropy: bool) -> int:
    """Logits of one chunk, c = min(n, 256) tokens: c V times the floats that are alive at once.

    With entropy 20: scaled logits, log-probabilities, and three of the sum p log p. Without: the product, its float32
    copy and the scaled one, 10; in float32 there is no copy, 8. The slopes of the log-probabilities, found on the way,
    need less, and leave the backward pass no logits.
    """
    return min(tokens, LOGIT_CHUNK_TOKENS) * vocabulary * (20 if entropy else 8 if dtype_bytes == 4 else 10)


def trl_logit_bytes(tokens: int, shape: ModelShape, dtype_bytes: int) -> int:
    """TRL's fused loss on a GPU: one tile of 4096 tokens x 32768 words, and the gradient of the states in float32."""
    tile = min(tokens, TRL_TILE_TOKENS) * min(TRL_TILE_VOCABULARY, shape.vocabulary) * dtype_bytes
    return tile + 4 * tokens * shape.width


def kv_cache_bytes(shape: ModelShape, sequences: int, tokens: int, dtype_bytes: int) -> int:
    """Keys and values: 2 b B L Kd a layer, and one layer's keys twice while they grow by a token."""
    one = dtype_bytes * sequences * tokens * shape.kv_width
    return one * (2 * shape.layers + 1)


def sampling_bytes(shape: ModelShape, sequences: int, dtype_bytes: int) -> int:
    """The logits of a token of every sequence on their way to a sample.

    B V times the head's product, three float32 copies (raw, tempered, normalized), the probabilities, and their sums
    in float64: b + 4 x 4 + 8.
    """
    return sequences * shape.vocabulary * (dtype_bytes + 24)


def merging_bytes(inputs: int, outputs: int, dtype_bytes: int) -> int:
    """A weight on its way into a merged copy: as it is dequantized, and in float32 it, the adapter's part, the sum."""
    return inputs * outputs * (dtype_bytes + 12)


# ---- stages


@dataclass(frozen=True)
class Device:
    """What the arithmetic must know of where a stage runs.

    `dtype_bytes` is what the base computes in; `processes` share the work, with or without sharing the base.
    """

    dtype_bytes: int
    is_gpu: bool = True
    processes: int = 1
    sharding: Sharding = "none"
    offload: bool = False
    reshard: bool = True
    eager: bool = False
    """Attention by plain products, as on CPUs; else a fused kernel."""
    memory_bytes: int = 0
    """Of which `ppo.rollout.weights=auto` lets a merged copy take a quarter."""


@dataclass(frozen=True)
class Moment:
    """One point of a stage: what comes to life for it, by part.

    `only_base` says that of the static parts there is nothing yet but the base.
    """

    name: str
    parts: Mapping[str, int]
    only_base: bool = False


_BASE_PARTS = {"weights", "quantized weights", "quantization constants", "embeddings and head", "mapped file"}


@dataclass(frozen=True)
class StagePlan:
    """A stage's memory on one device.

    `static` is there for as long as the stage works, `moments` come and go; the largest one decides the peak.
    `host_bytes` is main memory that offloaded parts take, a process. `activations` are those of a forward and backward
    pass with gradient checkpointing ("recomputed") and without ("kept"), whichever is set; empty where nothing learns.
    """

    stage: StageName
    static: Mapping[str, int]
    moments: tuple[Moment, ...]
    host_bytes: int = 0
    activations: Mapping[str, int] = field(default_factory=dict)

    def at(self, moment: Moment) -> dict[str, int]:
        """Everything that is alive at a moment, by part."""
        parts = {name: size for name, size in self.static.items() if not moment.only_base or name in _BASE_PARTS}
        for name, size in moment.parts.items():
            parts[name] = parts.get(name, 0) + size
        return {name: size for name, size in parts.items() if size}

    def size_at(self, moment: Moment) -> int:
        """The same in all."""
        return sum(self.at(moment).values())

    @property
    def peak_moment(self) -> Moment:
        """The one that decides."""
        return max(self.moments, key=self.size_at)

    @property
    def loading_moment(self) -> Moment:
        """When there is nothing yet but the base."""
        return next(moment for moment in self.moments if moment.only_base)

    @property
    def working_moment(self) -> Moment:
        """The largest one after that."""
        return max((moment for moment in self.moments if not moment.only_base), key=self.size_at)

    @property
    def parts(self) -> dict[str, int]:
        """Everything that is alive at the peak, by part."""
        return self.at(self.peak_moment)

    @property
    def tensor_bytes(self) -> int:
        """The peak of torch's tensors on the device, as `torch.cuda.max_memory_allocated` counts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Reckoning:
    """One config on one device; the stages' plans share its sums."""

    config: PipelineConfig
    shape: ModelShape
    device: Device
    targets: tuple[str, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.config.lora.target_modules
        object.__setattr__(self, "targets", None if chosen == "all-linear" else tuple(chosen))

    @property
    def b(self) -> int:
        return self.device.dtype_bytes

    @property
    def quantization(self) -> str:
        return self.config.base.quantization

    @property
    def adapter(self) -> int:
        """Parameters of one adapter."""
        return self.shape.adapter_parameters(self.config.lora.rank, self.targets)

    @property
    def layers(self) -> int:
        """Bytes of all layers' weights."""
        return weight_bytes(self.shape.linear_parameters, self.quantization, self.b)

    @property
    def share(self) -> int:
        """Bytes of a process's share of them."""
        return self.layers // (self.device.processes if self.device.sharding == "fsdp" else 1)

    def static(
        self, stage: StageName, adapters: int, trainable: int, optimizer: str, *, gradients: int
    ) -> dict[str, int]:
        """Base, adapters, gradients and optimizer.

        Under FSDP each process holds 1/N of the weights of the layers, and all of the rest: see `pipeline.sharding`.

        Args:
            stage: for what of the weights' file it maps.
            adapters: how many there are; each is in float32.
            trainable: parameters that learn.
            gradients: how many copies of the gradients are alive at once.
        """
        shape, base = self.shape, self.config.base
        copies = gradients + (1 if self.device.sharding != "none" and trainable else 0)
        parts = {
            "quantized weights" if self.quantization != "none" else "weights": 0 if self.device.offload else self.share,
            "quantization constants": constant_bytes(shape, self.quantization, double=base.double_quantization),
            "embeddings and head": self.b * (shape.embedding_parameters + shape.other_parameters),
            "adapters": 4 * adapters * self.adapter,
            "gradients": 4 * copies * trainable,
            "optimizer": optimizer_bytes(trainable, optimizer),
            "FSDP buffers": self.fsdp_buffers(),
            "mapped file": self.mapped_file(stage),
        }
        return {name: size for name, size in parts.items() if size}

    def finds_quantized(self, stage: StageName) -> bool:
        """Whether a stage reads weights that an earlier one has kept as they were quantized; see `quantized_cache`."""
        base = self.config.base
        keeps = not self.device.is_gpu and base.quantization == "nf4" and not base.trust_remote_code
        return keeps and self.shape.parameters >= QUANTIZED_IS_KEPT_FROM and stage != "sft"

    def mapped_file(self, stage: StageName) -> int:
        """On a CPU: the pages of the weights' file that stay in memory, with all that was read of it.

        Weights that need no conversion are the file's own pages, and hold its mapping; these are not counted twice.
        """
        if self.device.is_gpu or self.shape.file_bytes_per_parameter != self.b or self.finds_quantized(stage):
            return 0
        shape = self.shape
        own = shape.embedding_parameters + shape.other_parameters
        own += shape.linear_parameters if self.quantization == "none" else 0
        return self.b * (shape.parameters - own)

    def loading(self, stage: StageName) -> Moment:
        """Reading the weights.

        On a CPU the whole file is mapped. On a GPU one matrix comes before it is quantized; under FSDP the whole
        base does, since each process loads and quantizes all of it before it keeps its share.
        """
        shape, device = self.shape, self.device
        if not device.is_gpu:
            counted = self.mapped_file(stage) or self.finds_quantized(stage)
            whole = 0 if counted else shape.file_bytes_per_parameter * shape.parameters
            return Moment("loading", {"mapped file": whole}, only_base=True)
        parts = {"a weight before it is quantized": self.largest_matrix()}
        if device.sharding == "fsdp":
            parts["the base before it is shared"] = self.layers - (0 if device.offload else self.share)
        return Moment("loading", parts, only_base=True)

    @property
    def host(self) -> int:
        """Main memory of the share that FSDP offloads, a process."""
        return self.share if self.device.offload else 0

    def fsdp_buffers(self) -> int:
        """What FSDP2 gathers: the layer in use, and the flat buffer that it arrives in.

        All layers where they are not resharded after the forward pass. Frozen, they send no gradients out.
        """
        if self.device.sharding != "fsdp":
            return 0
        return (2 if self.device.reshard else self.shape.layers + 1) * (self.layers // self.shape.layers)

    def largest_matrix(self) -> int:
        """The largest weight as it is multiplied with: quantized ones are unpacked, b x inputs x outputs."""
        if self.quantization == "none":
            return 0
        return self.b * max(inputs * outputs for inputs, outputs in self.shape.linears.values())

    def inference(self, name: str, sequences: int, length: int, *, logits: int = 0, merged: bool = False) -> Moment:
        """A forward pass without gradients, with the logits of `logits` tokens (0: of none)."""
        tokens = sequences * length
        eager = length if self.device.eager else 0
        per_token = forward_bytes_per_token(self.shape, self.b, merged=merged, eager_length=eager)
        unpacked = 0 if merged else self.largest_matrix()
        trunk = max(per_token * tokens, unpacked) + mask_bytes(sequences, length, self.b)
        states = 2 * self.b * self.shape.width * tokens
        chunk = logit_bytes(logits, self.shape.vocabulary, self.b, entropy=False) if logits else 0
        if states + chunk > trunk:
            return Moment(name, {"activations": states, "logits": chunk})
        return Moment(name, {"activations": trunk})

    def training(
        self, name: str, sequences: int, length: int, *, checkpointing: bool, logits: int, trl: bool = False
    ) -> Moment:
        """A forward and backward pass: the larger of its peak at the logits and of its peak in a layer.

        With checkpointing every layer keeps its input, b D; one at a time also what it saves, and its temporaries.

        Args:
            logits: tokens whose logits are wanted.
            trl: TRL's fused loss makes them, on a GPU.
        """
        shape, b = self.shape, self.b
        tokens = sequences * length
        int8 = self.quantization == "int8"
        eager = length if self.device.eager else 0
        layer = tokens * saved_bytes_per_token(shape, self.config.lora.rank, b, eager_length=eager)
        layer += rounded_adapter_bytes(self.adapter, shape, b)
        mask = mask_bytes(sequences, length, b)
        # A fused kernel makes the mask anew in every layer.
        layer += 0 if eager else mask
        if checkpointing:
            kept = shape.layers * tokens * (b * shape.width + (int8_kept_bytes_per_token(shape, b) if int8 else 0))
        else:
            kept = shape.layers * layer
        # The last norm's input in float32, its output, and the states that the head reads.
        states = tokens * shape.width * (4 + b) + b * logits * shape.width + (mask if eager else 0)
        if not logits:
            chunk = 0
        elif trl:
            chunk = trl_logit_bytes(logits, shape, b)
        else:
            chunk = logit_bytes(logits, shape.vocabulary, b, entropy=True)
        transient = tokens * layer_transient_bytes_per_token(shape, b)
        norm = tokens * norm_backward_bytes_per_token(shape)
        in_layer = max(transient, self.largest_matrix()) - 4 * tokens * shape.width
        if checkpointing:
            in_layer += layer
        top = max(chunk, in_layer, norm)
        parts = {"activations": kept + states + (0 if top == chunk else top), "logits": chunk if top == chunk else 0}
        return Moment(name, {key: size for key, size in parts.items() if size})

    def both_ways(self, sequences: int, length: int, *, logits: int, trl: bool = False) -> dict[str, int]:
        """Activations of a forward and backward pass, recomputed and kept; arguments as for `training`."""
        return {
            name: self.training(name, sequences, length, checkpointing=recomputed, logits=logits, trl=trl).parts[
                "activations"
            ]
            for name, recomputed in (("recomputed", True), ("kept", False))
        }

    def merged_copy(self) -> int:
        """The copy of the base in its arithmetic that `ppo.rollout.weights` samples from, b P; 0 where it does not."""
        weights, shape = self.config.ppo.rollout.weights, self.shape
        chosen = [sides for name, sides in shape.linears.items() if self.targets is None or name in self.targets]
        size = self.b * shape.layers * sum(inputs * outputs for inputs, outputs in chosen)
        small = size <= MERGED_SHARE * self.device.memory_bytes
        return 0 if weights == "adapter" or (weights == "auto" and not small) else size

    def gathered(self) -> int:
        """All layers, which a process gathers to sample under FSDP where it merges no copy and they are small."""
        small = self.layers <= GATHERED_SHARE * self.device.memory_bytes
        return self.layers if self.device.sharding == "fsdp" and small and not self.merged_copy() else 0

    def sampling(self, name: str, responses: int, prompt: int, new: int) -> tuple[Moment, ...]:
        """A batch of answers: the merged copy, if there is one, the pass over the prompts, and the last tokens."""
        shape = self.shape
        cache = kv_cache_bytes(shape, responses, prompt, self.b)
        whole = kv_cache_bytes(shape, responses, prompt + new, self.b)
        logits = sampling_bytes(shape, responses, self.b)
        copy, gathered = self.merged_copy(), self.gathered()
        prefill = self.inference(f"{name}: prompts", responses, prompt, merged=copy > 0).parts["activations"]
        unpacked = 0 if copy else self.largest_matrix()
        merging = max(merging_bytes(*sides, self.b) for sides in shape.linears.values()) if copy else 0
        return (
            Moment(f"{name}: merging", {"merged copy": copy, "activations": merging}),
            Moment(
                f"{name}: prompts",
                {"merged copy": copy, "gathered layers": gathered, "KV cache": cache, "activations": prefill},
            ),
            Moment(
                f"{name}: last tokens",
                {
                    "merged copy": copy,
                    "gathered layers": gathered,
                    "KV cache": whole,
                    "logits": logits,
                    "activations": unpacked,
                },
            ),
        )

    def step(self, trainable: int) -> Moment:
        """The optimizer's own temporaries: on a GPU one tensor as large as all trainable parameters."""
        return Moment("optimizer step", {"optimizer's temporaries": 4 * trainable if self.device.is_gpu else 0})

    # -- a plan each

    def trainer(self, stage: Literal["sft", "reward"]) -> StagePlan:
        """SFT: one adapter. Reward: one adapter and a head; two sequences a pair, no logits; then it samples."""
        config = self.config
        settings: TrainerSettings = getattr(config, stage)
        trainable = self.adapter + (self.shape.width if stage == "reward" else 0)
        optimizer = settings.optimizer
        if optimizer == "auto":
            optimizer = "paged_adamw_8bit" if self.device.is_gpu else "adamw_torch"
        steps = max(1, settings.batch_size // (settings.microbatch_size * self.device.processes))
        # What has been accumulated waits beside the gradients of the next microbatch.
        gradients = 1 if steps == 1 else 2
        rows, length = settings.microbatch_size, settings.max_length
        moments = [self.loading(stage), self.step(trainable)]
        if stage == "sft":
            # Packed rows come in sequences of max_length as well, so many at once.
            logits = rows * length
            activations = self.both_ways(rows, length, logits=logits, trl=self.device.is_gpu)
            moments += [
                self.training(
                    "forward and backward",
                    rows,
                    length,
                    checkpointing=settings.gradient_checkpointing,
                    logits=logits,
                    trl=self.device.is_gpu,
                ),
                self.inference("held-out loss", rows, length, logits=logits),
            ]
        else:
            prompt, new = config.ppo.max_prompt_tokens, config.ppo.max_new_tokens
            batch = min(config.ppo.rollout.batch_size, config.reward.calibration_prompts)
            activations = self.both_ways(2 * rows, length, logits=0)
            moments += [
                self.training(
                    "forward and backward",
                    2 * rows,
                    length,
                    checkpointing=settings.gradient_checkpointing,
                    logits=0,
                ),
                self.inference("scoring held-out pairs", rows, length),
                *self.sampling("calibration", batch, prompt, new),
            ]
        # After training the reward adapter stands beside the SFT policy's.
        adapters = 1 if stage == "sft" else 2
        return StagePlan(
            stage,
            self.static(stage, adapters, trainable, optimizer, gradients=gradients),
            tuple(moments),
            self.host,
            activations,
        )

    def ppo(self) -> StagePlan:
        """PPO: policy and reference, the reward adapter where a reward comes from it, the critic's with `adapter`."""
        config, ppo = self.config, self.config.ppo
        separate = ppo.critic == "adapter"
        adapters = 2 + config.needs_reward_model + separate
        trainable = self.adapter * (1 + separate) + self.shape.width + 1
        prompt, new = ppo.max_prompt_tokens, ppo.max_new_tokens
        length = prompt + new
        mine = max(1, config.responses_per_iteration // self.device.processes)
        fitting = max(1, ppo.microbatch_tokens // length)
        scored = min(mine, fitting)
        trained = min(max(1, ppo.minibatch_size // self.device.processes), fitting)
        moments = (
            self.loading("ppo"),
            *self.sampling("sampling", min(ppo.rollout.batch_size, mine), prompt, new),
            self.inference("scoring", scored, length, logits=scored * new),
            self.training(
                "update of the policy",
                trained,
                length,
                checkpointing=ppo.gradient_checkpointing,
                logits=trained * new,
            ),
            self.step(trainable),
        )
        return StagePlan(
            "ppo",
            self.static("ppo", adapters, trainable, ppo.optimizer, gradients=1),
            moments,
            self.host,
            self.both_ways(trained, length, logits=trained * new),
        )

    def evaluation(self) -> StagePlan:
        """The evaluation: frozen adapters, sampling and scoring."""
        config = self.config
        prompt, new = config.ppo.max_prompt_tokens, config.evaluation_max_new_tokens
        batch = min(config.evaluate.batch_size, -(-config.evaluate.prompts // self.device.processes))
        scored = min(batch, max(1, config.ppo.microbatch_tokens // (prompt + new)))
        moments = (
            self.loading("evaluate"),
            *self.sampling("sampling", batch, prompt, new),
            self.inference("scoring", scored, prompt + new, logits=scored * new),
        )
        adapters = 2 + config.trains_reward_model
        return StagePlan("evaluate", self.static("evaluate", adapters, 0, "", gradients=0), moments, self.host)


def plan_stages(config: PipelineConfig, shape: ModelShape, device: Device) -> dict[StageName, StagePlan]:
    """The plan of every stage that a run of the config has."""
    reckoning = _Reckoning(config, shape, device)
    plans: dict[StageName, StagePlan] = {"sft": reckoning.trainer("sft")}
    if config.trains_reward_model:
        plans["reward"] = reckoning.trainer("reward")
    plans |= {"ppo": reckoning.ppo(), "evaluate": reckoning.evaluation()}
    return plans


def samples_from_copy(config: PipelineConfig, shape: ModelShape, device: Device) -> bool:
    """Whether a merged copy is made to sample from, as `ppo.rollout.weights` says or `auto` comes to."""
    return _Reckoning(config, shape, device).merged_copy() > 0


def compute_bytes(dtype: str, *, bfloat16: bool, is_gpu: bool) -> int:
    """Bytes of the dtype that `base.dtype` means on a device: `auto` is float32 on CPUs without bfloat16 alone."""
    if dtype == "auto":
        return 2 if is_gpu or bfloat16 else 4
    return 4 if dtype == "float32" else 2


def device_bytes(plan: StagePlan, *, is_gpu: bool = True) -> int:
    """What a stage needs of its device: tensors, what the allocator may waste, and CUDA's or the libraries' share."""
    if not is_gpu:
        mapped = plan.parts.get("mapped file", 0)  # by the kernel, which wastes nothing
        return int((plan.tensor_bytes - mapped) * (1 + HEAP[plan.stage])) + mapped + LIBRARIES_BYTES
    return int(plan.tensor_bytes * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def fits(plan: StagePlan, card: Card) -> bool:
    """Whether a stage fits the card."""
    return device_bytes(plan, is_gpu=card.is_gpu) <= card.memory_bytes
