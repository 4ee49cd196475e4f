"""The one configuration of a run: frozen, typed, every field with its unit and what None means.

`pipeline.config_file` reads it from YAML and `key=value` overrides. Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

KL_ERROR_CLIP = 0.2
"""Bound of the adaptive KL controller's proportional error (Ziegler et al. 2019)."""


EngineChoice = Literal["auto", "generate", "paged", "vllm"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused; values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class BaseSettings(Section):
    """The one base model that every adapter sits on."""

    model: str
    """A folder, a hub id, a GGUF file, or `package:NAME/FILE` for a file inside an installed package."""
    revision: str | None = None
    """Commit, tag or branch on the hub. None is the default branch."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the base's linear layers are stored."""
    double_quantization: bool = True
    """For nf4: quantize the quantization constants too (saves about 0.4 bits a parameter)."""
    quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = "auto"
    """For nf4: the dtype that packed weights are kept as, bit for bit the same. `auto`: uint8, and under FSDP, which
    shards no integers, what the base computes in."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the base computes in. `auto`: bfloat16 where the device has fast arithmetic for it, else float32."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel. `auto`: transformers' own choice on GPUs; on CPUs plain products (`eager`), which are faster up
    to 1,024 tokens a sequence, and its own choice where any stage's sequences may be longer."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template. None keeps the tokenizer's own."""
    cache_dir: str = "~/.cache/trivet"
    """Where a GGUF file's conversion is kept."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Leave it off for models that you have not read."""


class LoraSettings(Section):
    """The low-rank adapters (Hu et al. 2021). All roles have the same shape."""

    rank: int = Field(16, ge=1)
    """Rank r of the update."""
    alpha: float = Field(32.0, gt=0)
    """Numerator of the scale alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input in SFT and reward training; PPO always runs without."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names that get an adapter; `all-linear` is every linear layer but the output head."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(r) instead (Kalajdzievski 2023)."""


class DataSource(Section):
    """One place that rows come from."""

    path: str
    """A JSON, JSONL, CSV or Parquet file, `FILE.py:FUNCTION`, or a data set's hub id."""
    weight: float | None = Field(None, gt=0)
    """Share of this source in the mix, relative to the others. None on all sources: take every row."""
    limit: int | None = Field(None, ge=1)
    """At most this many rows, chosen by a hash of their content. None: all."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set. None: its default."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set. None is its default branch, which may change under you."""


class DataSet(Section):
    """Sources of one kind of record, and what is held out of training."""

    sources: tuple[DataSource, ...] = ()
    """Where the rows come from. A plain string stands for `{path: ...}`."""
    held_out: float | tuple[DataSource, ...] = 0.1
    """A fraction of the prompts (by a hash, so that it is the same everywhere), or sources of their own."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Share of the training rows that is used, chosen by a hash of their content: a smaller share lies within a larger
    one, and what is held out stays the same. None: all."""
    split_by: Literal["prompt", "row"] = "prompt"
    """What may not stand on both sides of the split. `row` is for data with one constant prompt."""

    @field_validator("sources", "held_out", mode="before")
    @classmethod
    def _plain_strings_are_paths(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                value = [value]
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value

    @field_validator("held_out")
    @classmethod
    def _fraction_is_a_fraction(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a held-out fraction lies between 0 and 1")
        return value


class DataSettings(Section):
    """The three kinds of data."""

    instructions: DataSet = DataSet()
    """For SFT: `messages`, `prompt`/`completion`, Alpaca or ShareGPT rows."""
    preferences: DataSet = DataSet()
    """For the reward model: `prompt`/`chosen`/`rejected`, or transcripts with an implicit prompt."""
    prompts: DataSet = DataSet()
    """For PPO and evaluation: `prompt` (text or messages) or `messages`. Other columns go to reward functions."""
    allow_special_tokens: bool = False
    """Keep rows whose text spells a special token (it could forge a turn). False drops and reports them."""


class TrainerSettings(Section):
    """What SFT and reward training share. Batches are global: they do not depend on the number of processes."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps at the most; overrides `epochs`. None: as many as the epochs need."""
    batch_size: int = Field(16, ge=1)
    """Rows (or pairs, or packed sequences) per optimizer step, over all processes."""
    microbatch_size: int = Field(4, ge=1)
    """Rows per forward pass and process; lower it when memory runs out."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    optimizer: str = "auto"
    """A name that transformers knows. `auto`: paged 8-bit AdamW on CUDA, AdamW elsewhere."""
    max_length: int = Field(1024, ge=8)
    """Tokens in a sequence at the most; longer rows are dropped and reported."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every: int = Field(5, ge=1)
    """Steps between two lines of metrics."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between two checkpoints to resume from."""
    keep_last: int = Field(2, ge=1)
    """How many checkpoints are kept."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """Any further option of TRL's own trainer config; a name it does not know, or that trivet sets, is refused."""


class SftSettings(TrainerSettings):
    """Supervised fine-tuning on instructions (stage 1)."""

    packing: bool = False
    """Put several rows into one sequence of `max_length` tokens without letting them see each other."""


class RewardSettings(TrainerSettings):
    """The reward model on preference pairs (stage 2)."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    start_from: Literal["sft", "base"] = "sft"
    """Whose adapter the reward model starts as: a copy of the SFT adapter, or a fresh one."""
    calibrate_on: Literal["sft", "base"] = "sft"
    """Whose answers have scores of mean 0 and variance 1, which is what PPO's settings about scores count from. With
    `base`, here and in `start_from`, the stage needs nothing of SFT, but PPO starts at whatever SFT has gained."""
    calibration_prompts: int = Field(64, ge=8)
    """Prompts that are answered to fix the gain and bias of the scores."""


class KLSettings(Section):
    """What leaving the reference costs."""

    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` steers the coefficient towards `target` (Ziegler et al. 2019)."""
    coefficient: float = Field(0.05, ge=0)
    """beta: reward lost per nat of KL; the initial value if adaptive."""
    target: float = Field(6.0, gt=0)
    """For `adaptive`: KL per response to aim for, in nats."""
    horizon: int = Field(10_000, ge=1)
    """For `adaptive`: samples over which the coefficient reacts."""


class RewardSource(Section):
    """One term of the reward."""

    function: str | None = None
    """`FILE.py:FUNCTION`, called with lists `prompts`, `completions` and the prompt rows' other columns.
    None: the reward adapter."""
    weight: float = 1.0
    """Factor of this term in the sum."""

    @property
    def name(self) -> str:
        """What metrics call this term: `model`, or the function's name."""
        return "model" if self.function is None else self.function.rpartition(":")[2]


class HeldOutSettings(Section):
    """How the policy is measured on held-out prompts while it learns."""

    every: int | None = Field(10, ge=1)
    """Iterations between two measurements; the last iteration is measured too. None: no measurement."""
    prompts: int = Field(64, ge=1)
    """How many held-out prompts are answered, at the most, over all processes."""


class GuardSettings(Section):
    """Bounds that a policy should not leave; None is no bound."""

    max_kl: float | None = Field(100.0, gt=0)
    """KL from the reference in nats a response."""
    max_ratio: float | None = Field(None, gt=1)
    """Largest probability ratio of an iteration's update."""
    min_entropy: float | None = Field(None, ge=0)
    """Mean entropy of the policy in nats a token."""
    max_entropy: float | None = Field(None, gt=0)
    """The same from above."""
    action: Literal["warn", "stop"] = "warn"
    """`stop` ends the stage where a bound is left, with the best policy so far."""


class RolloutSettings(Section):
    """How the policy samples."""

    engine: EngineChoice = "auto"
    """`generate`: transformers' own. `paged`: transformers' continuous batching: a finished response makes room for
    the next, and prompts share what they begin with. `vllm`: vLLM, in this process or on a `server`; chance is vLLM's
    own then. `auto`: paged over flash attention (`base.attention`) on CUDA, else generate."""
    server: str | None = Field(None, pattern=r"^https?://")
    """For `vllm`: address of a vLLM server that has the same base, and sees the folder for temporary files, through
    which it gets the adapter: `http://localhost:8000`. None: vLLM runs in this process."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """For `vllm` in this process: further options of its `LLM`, such as `gpu_memory_utilization: 0.3`."""
    weights: Literal["auto", "merged", "adapter"] = "auto"
    """`merged`: from a copy of the base in 16 bits (or its dtype) with the adapter merged in, which exists while it
    samples. `adapter`: from the quantized base with the adapter on it, slower and without the copy. `auto`: merged
    where the copy takes at most a quarter of the device's memory."""
    reuse_logprobs: bool = True
    """Let the sampler's log-probabilities be the old ones, and with `critic: head` its values too, where a sixteenth
    of each round's responses shows that the trainer finds the same; else a forward pass computes them again."""
    max_logprob_gap: float = Field(0.005, ge=0)
    """For `reuse_logprobs`: the mean absolute difference, in nats a token, up to which they are the same."""
    batch_size: int = Field(64, ge=1)
    """Responses that a process samples at once."""


class PPOSettings(Section):
    """Proximal policy optimization (stage 3; Schulman et al. 2017, Ouyang et al. 2022)."""

    start_from: Literal["sft", "promoted"] = "sft"
    """Where the policy starts: at SFT, or at the registry's current policy where there is one. The reference is SFT
    either way. Another policy being promoted does not by itself make PPO run again."""
    iterations: int = Field(100, ge=1)
    """Rounds of sampling and updating."""
    max_steps: int | None = Field(None, ge=1)
    """Iterations after which this run stops early (for trying things out). None: all."""
    prompts_per_iteration: int = Field(64, ge=1)
    """Prompts sampled in a round, over all processes."""
    responses_per_prompt: int = Field(1, ge=1)
    """Answers sampled for each prompt."""
    minibatch_size: int = Field(16, ge=1)
    """Responses per optimizer step, over all processes."""
    epochs: int = Field(2, ge=1)
    """Passes over a round's responses."""
    microbatch_tokens: int = Field(4096, ge=16)
    """Tokens (padding included) in one forward pass of a process; lower it when memory runs out."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Sequences of a forward pass stand one behind the other instead of padded to the longest. `auto`: where the base's
    attention is a flash kernel (`base.attention`); any other masks all pairs of a pass's tokens, which takes memory
    and time that grow with their square."""
    rollout: RolloutSettings = RolloutSettings()
    """How responses are sampled; the calibration of the reward model and the evaluation follow it."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Longer prompts are dropped and reported."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens after which sampling stops."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it in sampling and in every log-probability."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling. Anything but 1 biases the KL estimate: see `allow_biased_sampling`."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens only; 0 is off. Anything but 0 biases the KL estimate."""
    allow_biased_sampling: bool = False
    """Accept `top_p` and `top_k` all the same."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the policy."""
    critic_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the critic. None: the policy's."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How both learning rates fall over the iterations."""
    optimizer: Literal["adamw", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """Where AdamW keeps its two moments: on the device, or in pages that CUDA moves to main memory where room is short,
    with `_8bit` rounded to 8 bits as well. Paging is for CUDA alone, and for matrices of 100,000 numbers and more."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of Adam's two moments."""
    adam_epsilon: float = Field(1e-5, gt=0)
    """Added to Adam's denominator."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of each role are scaled down to this global norm."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of rewards, per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Decay of generalized advantage estimation (Schulman et al. 2016)."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """How far the probability ratio may move within a round."""
    value_clip_range: float | None = Field(0.2, gt=0)
    """How far values may move within a round. None: values are not clipped."""
    value_loss_coefficient: float = Field(0.5, gt=0)
    """Factor of the value loss where critic and policy share a trunk (`critic: head`)."""
    whiten_rewards: bool = False
    """Scale each round's rewards to variance 1 (the mean stays)."""
    whiten_advantages: bool = True
    """Scale and shift each round's advantages to mean 0 and variance 1."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score of a response that does not end by itself."""
    score_clip: float | None = Field(5.0, gt=0)
    """Scores are limited to plus or minus this. None: no limit."""
    rewards: tuple[RewardSource, ...] = (RewardSource(),)
    """The terms that a response's score is the weighted sum of."""
    kl: KLSettings = KLSettings()
    """The price of leaving the reference."""
    critic: Literal["adapter", "head"] = "adapter"
    """Where values come from: an adapter of its own that starts as the reward adapter, or a head on the policy."""
    critic_warmup_iterations: int = Field(0, ge=0)
    """First rounds in which only the critic learns."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    held_out: HeldOutSettings = HeldOutSettings()
    """Measurements on held-out prompts."""
    guard: GuardSettings = GuardSettings()
    """What is not to happen."""
    publish: Literal["best", "last"] = "best"
    """`best`: the policy with the best held-out score within `guard.max_kl`; the last one is kept beside it."""
    ratio_tolerance: float | None = Field(None, gt=0)
    """How far from 1 the probability ratios may be before a round's first update, in the mean over its tokens.
    None: 0.0001 in float32, 0.05 in 16 bits or int8."""
    checkpoint_every: int = Field(5, ge=1)
    """Iterations between two checkpoints to resume from."""
    keep_last: int = Field(2, ge=1)
    """How many checkpoints are kept."""


class JudgeSettings(Section):
    """A further judge of the evaluation: another reward model, or a model behind an endpoint. Training sees neither."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """What figures call it. None: the folder's name, or the model's."""
    reward_run: str | None = None
    """Folder of another run on the same base, or of its `reward` stage, relative to the working directory: its reward
    model judges."""
    endpoint: str | None = Field(None, pattern=r"^https?://[^\s?#@]+$")
    """Address of an OpenAI-compatible API, such as `http://127.0.0.1:8000/v1`, that is shown both answers, in either
    order."""
    model: str | None = None
    """For `endpoint`: the model's name there."""
    api_key_variable: str | None = None
    """For `endpoint`: the environment variable that holds the key. The key itself has no place in a config."""
    instructions: str | None = None
    """For `endpoint`: what the judge should look for. None: whom the answer serves better."""
    prompts: int | None = Field(None, ge=2)
    """For `endpoint`: ask about that many prompts at the most. None: all."""
    max_tokens: int = Field(16, ge=1)
    """For `endpoint`: tokens of its reply; more for a model that thinks first."""
    concurrency: int = Field(4, ge=1, le=64)
    """For `endpoint`: requests at a time."""
    retries: int = Field(4, ge=0)
    """For `endpoint`: attempts after one that failed, with pauses of 1, 2, 4, ... seconds, or what it asks for."""
    timeout: float = Field(60.0, gt=0)
    """For `endpoint`: seconds to wait for a reply."""

    @property
    def label(self) -> str:
        """What figures call it."""
        if self.name is not None:
            return self.name
        path = (self.reward_run or "").rstrip("/")
        last = path.removesuffix("/reward").rpartition("/")[2] if path else self.model or ""
        return re.sub(r"[^\w.-]", "-", last.rpartition("/")[2])


class EvaluateSettings(Section):
    """The judgement of the policy against SFT on held-out prompts (stage 4)."""

    prompts: int = Field(128, ge=2)
    """How many held-out prompts are answered, at the most."""
    batch_size: int = Field(64, ge=1)
    """Responses sampled at once."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Tokens after which sampling stops. None: `ppo.max_new_tokens`."""
    temperature: float | None = Field(None, gt=0)
    """Sampling temperature of both policies. None: `ppo.temperature`."""
    gold: str | None = None
    """`FILE.py:FUNCTION`, a measure that training never sees, called like a reward function. None: none."""
    samples: int = Field(8, ge=0)
    """Side-by-side answers that are shown."""
    judges: tuple[JudgeSettings, ...] = ()
    """Further judges, besides `gold` and whatever PPO is rewarded by."""
    opponents: tuple[Literal["sft", "base"], ...] = ("sft",)
    """Whom PPO is compared with. SFT always is; `base` is the model before any training, which answers then too."""
    best_of: int = Field(1, ge=1)
    """n: as a yardstick, the best of n answers of SFT by PPO's reward answers too. 1: no yardstick."""
    perplexity_rows: int = Field(64, ge=0)
    """Held-out rows of the instructions on which SFT's and PPO's perplexity is measured, to see what was forgotten.
    0: none."""


class LaunchSettings(Section):
    """How `accelerate launch` starts a stage."""

    processes: int = Field(1, ge=1)
    """Processes on this machine, one a GPU."""
    machines: int = Field(1, ge=1)
    """Machines that work together, each with `processes`. The same command runs on each, with its own rank."""
    machine_rank: int = Field(0, ge=0)
    """Number of this machine, from 0: best given on the command line, `launch.machine_rank=1`."""
    main_address: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]+$")
    """Name or address of machine 0. None: there is one machine."""
    main_port: int = Field(29500, ge=1, le=65535)
    """Where machine 0 listens for the others."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: `ddp` keeps the whole base on each GPU, `fsdp` (FSDP2) a share of it. `auto`: ddp where
    the stages fit each GPU that way, fsdp otherwise."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """What the base computes in, in Accelerate's words. `base.dtype` decides that: another one here, or in a file of
    your own, is refused. `no` says nothing. Adapters learn in float32 in any case."""
    cpu_offload: bool = False
    """For fsdp: keep each GPU's share in main memory and fetch it layer by layer; slower."""
    reshard_after_forward: bool = True
    """For fsdp: give a layer's gathered weights back after its forward pass and gather them again. False is faster."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that processes wait for another one, on this machine or another, before the stage ends with an error: at
    the start for it to come, later for it to take part. More than what one process may do alone."""
    card: str | None = None
    """The card that the run is meant for: a name such as `RTX 4090`, or its memory, `24GB`. None: what is there."""
    accelerate_config: str | None = None
    """An Accelerate YAML file of your own, which then decides everything. None: made from this section."""
    device: str | None = Field("auto", pattern=r"^[A-Za-z0-9._-]+$")
    """Runs on this machine that give the same name here wait for each other's stages. `auto`: `gpu` where there is
    one, else nothing is waited for. None: never wait."""
    side_by_side: bool = False
    """In a whole run, train SFT and the reward model at the same time, where neither needs the other. Each has GPUs of
    its own where there are two for each of `processes`; otherwise they share memory and time of the same ones."""

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines


class GateSettings(Section):
    """What a stage must reach before a whole run goes on to the next one. None: no such gate.

    Estimates pass with the pessimistic end of their 95% interval. No result depends on these settings.
    """

    max_sft_loss: float | None = Field(None, gt=0)
    """SFT: held-out loss at the end, in nats a token."""
    min_reward_accuracy: float | None = Field(None, ge=0, le=1)
    """Reward model: lower bound of the accuracy on held-out pairs."""
    max_kl: float | None = Field(None, gt=0)
    """PPO and evaluation: KL to SFT in nats an answer."""
    min_win_rate: float | None = Field(None, ge=0, le=1)
    """Evaluation: lower bound of the win rate against SFT."""
    judge: str | None = None
    """Whose win rate counts: `gold`, `reward_model` or a reward function's name. None: the first of these there is."""


class RegistrySettings(Section):
    """Where policies that passed all gates go. No result depends on these settings."""

    folder: str = "registry"
    """Folder of the registry, relative to the working directory, as `run_dir` is. Runs may share it."""
    promote: Literal["never", "passed", "approved"] = "never"
    """`passed`: a whole run that passed its gates makes its policy the current one. `approved`: if, besides, a person
    says so on Prefect's page. `never`: only `trivet promote` does."""
    approval_hours: float = Field(24.0, gt=0)
    """For `approved`: how long a run waits for the person."""


class PipelineConfig(Section):
    """Everything a run needs to know."""

    run_dir: str = Field(min_length=1)
    """Folder of the run, relative to the working directory. Stages find each other's results there."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random draw follows from it."""
    deterministic: bool = False
    """Ask torch for deterministic kernels: the same machine gives the same bytes."""
    trackers: Literal["auto"] | tuple[TrackerName, ...] = "auto"
    """Where figures go besides RUN/metrics: some of `tensorboard` (into RUN/tensorboard), `wandb`, `mlflow`, `trackio`.
    `auto`: TensorBoard where it is installed. No result depends on it."""
    base: BaseSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    sft: SftSettings = SftSettings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    launch: LaunchSettings = LaunchSettings()
    gates: GateSettings = GateSettings()
    registry: RegistrySettings = RegistrySettings()

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value != "auto" else value

    @property
    def judges(self) -> tuple[str, ...]:
        """Who judges in the evaluation, the one to trust most first."""
        functions = tuple(source.name for source in self.ppo.rewards if source.function is not None)
        gold = () if self.evaluate.gold is None else ("gold",)
        held_out = tuple(judge.label for judge in self.evaluate.judges)
        return (*gold, *held_out, *(("reward_model",) if self.trains_reward_model else ()), *functions)

    @property
    def gate_judge(self) -> str:
        """Whose win rate `gates.min_win_rate` is about."""
        return self.gates.judge or self.judges[0]

    @property
    def prefers_plain_attention(self) -> bool:
        """Whether sequences are so short in all stages that `base.attention: auto` means `eager` on a CPU.

        All stages together, since what one has trained another one scores.
        """
        new = max(self.ppo.max_new_tokens, self.evaluation_max_new_tokens)
        return max(self.sft.max_length, self.reward.max_length, self.ppo.max_prompt_tokens + new) <= 1024

    @property
    def evaluation_max_new_tokens(self) -> int:
        """Tokens per answer in the evaluation."""
        return self.evaluate.max_new_tokens or self.ppo.max_new_tokens

    @property
    def evaluation_temperature(self) -> float:
        """Sampling temperature of the evaluation."""
        return self.evaluate.temperature or self.ppo.temperature

    @property
    def needs_reward_model(self) -> bool:
        """Whether any term of PPO's reward is the reward adapter."""
        return any(source.function is None for source in self.ppo.rewards)

    @property
    def trains_reward_model(self) -> bool:
        """Whether there is a reward stage: PPO needs its adapter, or there are preferences to learn from."""
        return self.needs_reward_model or bool(self.data.preferences.sources)

    @property
    def reward_needs_sft(self) -> bool:
        """Whether the reward stage takes anything from the SFT stage."""
        return "sft" in (self.reward.start_from, self.reward.calibrate_on)

    def accumulation_steps(self, stage: Literal["sft", "reward"]) -> int:
        """Forward passes per process and optimizer step; exact, since `contradictions` saw to it."""
        section: TrainerSettings = getattr(self, stage)
        return section.batch_size // (section.microbatch_size * self.launch.world_size)

    @property
    def responses_per_iteration(self) -> int:
        """Responses sampled in a PPO round, over all processes."""
        return self.ppo.prompts_per_iteration * self.ppo.responses_per_prompt

    @property
    def minibatches_per_epoch(self) -> int:
        """Optimizer steps in one pass over a PPO round's responses."""
        return self.responses_per_iteration // self.ppo.minibatch_size

    def arithmetic(self) -> list[str]:
        """The derived batch sizes, a sentence a stage."""
        sentences = []
        for stage in ("sft", "reward"):
            section: TrainerSettings = getattr(self, stage)
            rows = "rows" if stage == "sft" else "pairs"
            sentences.append(
                f"{stage}: a step takes {section.batch_size} {rows} = {self.launch.world_size} process(es)"
                f" x {section.microbatch_size} at once x {self.accumulation_steps(stage)} accumulation step(s)."
            )
        ppo = self.ppo
        sentences.append(
            f"ppo: a round samples {self.responses_per_iteration} responses = {ppo.prompts_per_iteration} prompts"
            f" x {ppo.responses_per_prompt}, then makes {ppo.epochs * self.minibatches_per_epoch} steps"
            f" = {ppo.epochs} epoch(s) x {self.minibatches_per_epoch} minibatch(es) of {ppo.minibatch_size};"
            f" {ppo.iterations} rounds see {ppo.iterations * ppo.prompts_per_iteration} prompts."
        )
        sentences.append(
            f"evaluate: up to {self.evaluate.prompts} held-out prompts, answered by {self._contestants},"
            f" at most {self.evaluation_max_new_tokens} tokens each at temperature {self.evaluation_temperature:g}."
        )
        return sentences

    @property
    def _contestants(self) -> str:
        others = ["the base"] if "base" in self.evaluate.opponents else []
        if self.evaluate.best_of > 1:
            others.append(f"the SFT policy {self.evaluate.best_of} times over")
        return ", ".join(["the SFT and the PPO policy", *others])

    @property
    def _processes_key(self) -> str:
        return "launch.processes" if self.launch.machines == 1 else "launch.processes x launch.machines"

    def contradictions(self) -> Iterator[str]:
        """Settings that do not go together: what was found, what was expected, which key to change."""
        processes = self.launch.world_size
        for stage in ("sft", "reward"):
            section: TrainerSettings = getattr(self, stage)
            step = section.microbatch_size * processes
            if section.batch_size % step:
                yield (
                    f"{stage}.batch_size is {section.batch_size}, which is not a multiple of"
                    f" {stage}.microbatch_size x {self._processes_key}"
                    f" = {section.microbatch_size} x {processes} = {step};"
                    f" set {stage}.batch_size={-(-section.batch_size // step) * step}"
                )
        ppo = self.ppo
        if ppo.prompts_per_iteration % processes:
            yield (
                f"ppo.prompts_per_iteration is {ppo.prompts_per_iteration}, which {processes} processes cannot"
                f" share evenly; set it to a multiple of {self._processes_key}"
            )
        if self.responses_per_iteration % ppo.minibatch_size:
            yield (
                f"ppo.minibatch_size is {ppo.minibatch_size}, which does not divide the"
                f" {self.responses_per_iteration} responses of a round"
                f" (ppo.prompts_per_iteration x ppo.responses_per_prompt); choose a divisor of it"
            )
        if ppo.minibatch_size % processes:
            yield (
                f"ppo.minibatch_size is {ppo.minibatch_size}, which {processes} processes cannot share evenly;"
                f" set it to a multiple of {self._processes_key}"
            )
        if (ppo.top_p != 1.0 or ppo.top_k != 0) and not ppo.allow_biased_sampling:
            yield (
                f"ppo.top_p={ppo.top_p:g}, ppo.top_k={ppo.top_k} filter the samples, which biases the KL estimate;"
                " set ppo.top_p=1 and ppo.top_k=0, or ppo.allow_biased_sampling=true to accept that"
            )
        yield from self._rollout_contradictions()
        if not ppo.rewards:
            yield "ppo.rewards is empty: there is nothing to maximize; name a source, for example [{weight: 1.0}]"
        least = math.ceil(self.responses_per_iteration * KL_ERROR_CLIP) + 1
        if ppo.kl.controller == "adaptive" and ppo.kl.horizon < least:
            yield (
                f"ppo.kl.horizon is {ppo.kl.horizon}, in which the {self.responses_per_iteration} responses of a single"
                f" round could turn the coefficient negative; set it to {least} at least"
            )
        if ppo.held_out.every is not None and ppo.held_out.prompts < processes:
            yield (
                f"ppo.held_out.prompts is {ppo.held_out.prompts}, which {processes} processes cannot share;"
                f" set it to {processes} at least"
            )
        names = [source.name for source in ppo.rewards]
        for source in ppo.rewards:
            if source.function is not None and source.name in ("model", "reward_model", "gold"):
                yield f"ppo.rewards: figures call another judge '{source.name}'; rename the function {source.function}"
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield (
                f"ppo.rewards names the source '{name}' {names.count(name)} times; give one entry the sum of weights,"
                " or rename one of two functions of the same name"
            )
        if any(source.weight == 0 for source in ppo.rewards):
            yield "ppo.rewards has a source with weight 0; remove the entry, or give it a weight"
        if ppo.kl.controller == "adaptive" and ppo.kl.coefficient == 0:
            yield "ppo.kl.coefficient is 0, which the adaptive controller can never change; set a positive start value"
        if ppo.held_out.every is None and ppo.publish == "best" and "publish" in ppo.model_fields_set:
            yield "ppo.publish is 'best', but nothing is measured; set ppo.held_out.every, or ppo.publish=last"
        if ppo.held_out.every is None and ppo.guard.action == "stop":
            yield (
                "ppo.guard.action is 'stop', which publishes the best policy so far, but nothing is measured;"
                " set ppo.held_out.every, or ppo.guard.action=warn"
            )
        if ppo.critic_warmup_iterations >= ppo.iterations:
            yield (
                f"ppo.critic_warmup_iterations is {ppo.critic_warmup_iterations}, so that the policy would never learn"
                f" in {ppo.iterations} iterations; lower it or raise ppo.iterations"
            )
        if self.base.quantization != "nf4" and "double_quantization" in self.base.model_fields_set:
            yield (
                f"base.double_quantization is set, but base.quantization is '{self.base.quantization}';"
                " remove it, or set base.quantization=nf4"
            )
        yield from self._launch_contradictions()
        yield from self._order_contradictions()
        yield from self._judge_contradictions()
        if self.gates.judge is not None and self.gates.judge not in self.judges:
            yield f"gates.judge is '{self.gates.judge}', who does not judge here; choose of {', '.join(self.judges)}"
        if self.gates.min_reward_accuracy is not None and not self.trains_reward_model:
            yield "gates.min_reward_accuracy is set, but this config trains no reward model; remove it"
        for kind in ("instructions", "preferences", "prompts"):
            sources = getattr(self.data, kind).sources
            weighted = [source.weight is not None for source in sources]
            if any(weighted) and not all(weighted):
                yield f"data.{kind}.sources: some have a weight and some have none; give all of them one, or none"

    def _rollout_contradictions(self) -> Iterator[str]:
        ppo, rollout = self.ppo, self.ppo.rollout
        for key in ("server", "vllm"):
            if key in rollout.model_fields_set and getattr(rollout, key) and rollout.engine != "vllm":
                yield (
                    f"ppo.rollout.{key} is set, but ppo.rollout.engine is '{rollout.engine}';"
                    f" set ppo.rollout.engine=vllm, or remove ppo.rollout.{key}"
                )
        if rollout.engine == "vllm" and rollout.server is not None and rollout.vllm:
            yield "ppo.rollout.vllm is for vLLM in this process, and ppo.rollout.server is set too; remove one of them"
        if rollout.engine == "vllm" and "weights" in rollout.model_fields_set and rollout.weights != "adapter":
            yield (
                f"ppo.rollout.weights is '{rollout.weights}', but vLLM has weights of its own and takes the adapter;"
                " set ppo.rollout.weights=adapter, or remove it"
            )
        if rollout.engine == "vllm" and ppo.temperature != 1.0 and (ppo.top_p != 1.0 or ppo.top_k != 0):
            yield (
                "ppo.rollout.engine is 'vllm', whose log-probabilities are either tempered and filtered or neither, and"
                " ppo.temperature is set beside a filter; set ppo.temperature=1, or ppo.top_p=1 and ppo.top_k=0"
            )
        if rollout.engine == "paged" and rollout.weights == "adapter" and self.launch.strategy == "fsdp":
            yield (
                "ppo.rollout.engine is 'paged', which needs the base whole, and launch.strategy is 'fsdp';"
                " set ppo.rollout.engine=auto, or ppo.rollout.weights=merged"
            )
        if rollout.engine == "vllm" and self.launch.world_size > 1 and rollout.server is None:
            yield (
                f"ppo.rollout.engine is 'vllm', which each of {self.launch.world_size} processes would start on the"
                " same GPU; set ppo.rollout.server, or another engine"
            )

    def _order_contradictions(self) -> Iterator[str]:
        reward = self.reward
        if reward.start_from == "sft" and reward.calibrate_on == "base":
            yield (
                "reward.calibrate_on is 'base', which is for a reward model that does without SFT, but"
                " reward.start_from is 'sft'; set reward.start_from=base, or remove reward.calibrate_on"
            )
        if not self.launch.side_by_side:
            return
        if not self.trains_reward_model:
            yield "launch.side_by_side is true, but this config trains no reward model beside SFT; remove it"
        elif self.reward_needs_sft:
            needed = [key for key in ("start_from", "calibrate_on") if getattr(reward, key) == "sft"]
            yield (
                f"launch.side_by_side is true, but the reward model waits for SFT: reward.{needed[0]} is 'sft';"
                f" set {' and '.join(f'reward.{key}=base' for key in needed)}, or remove launch.side_by_side"
            )
        if self.launch.accelerate_config is not None:
            yield (
                "launch.side_by_side is true, but launch.accelerate_config decides which GPUs and ports both stages"
                " would take; remove one of them"
            )
        if self.launch.machines > 1:
            yield (
                f"launch.side_by_side is true, but launch.machines is {self.launch.machines}, which meet at one"
                " launch.main_port for one stage at a time; remove launch.side_by_side"
            )

    def _judge_contradictions(self) -> Iterator[str]:
        endpoint_only = {"model", "api_key_variable", "instructions", "prompts", "max_tokens", "concurrency"}
        endpoint_only |= {"retries", "timeout"}
        for number, judge in enumerate(self.evaluate.judges):
            key = f"evaluate.judges[{number}]"
            if (judge.reward_run is None) == (judge.endpoint is None):
                yield f"{key} names {'no judge' if judge.endpoint is None else 'two'}; give reward_run, or endpoint"
            elif judge.endpoint is not None and judge.model is None:
                yield f"{key}.endpoint is set, but not which model there; set {key}.model"
            elif judge.reward_run is not None and (surplus := sorted(endpoint_only & judge.model_fields_set)):
                yield f"{key}.{surplus[0]} is for an endpoint, and this judge is a reward model; remove it"
        names = self.judges
        for name in sorted({judge.label for judge in self.evaluate.judges if names.count(judge.label) > 1}):
            yield f"two judges of the evaluation are called '{name}'; give one in evaluate.judges another name"

    def _launch_contradictions(self) -> Iterator[str]:
        launch, base = self.launch, self.base
        decides = {"processes", "machines", "strategy", "mixed_precision", "cpu_offload", "reshard_after_forward"}
        if launch.accelerate_config is not None and (both := sorted(decides & launch.model_fields_set)):
            yield (
                f"launch.{both[0]} and launch.accelerate_config are both set, and the file decides;"
                f" remove {', '.join(f'launch.{key}' for key in both)}"
            )
        if launch.machine_rank >= launch.machines:
            yield (
                f"launch.machine_rank is {launch.machine_rank}, but there are {launch.machines} machine(s), numbered"
                " from 0; lower it, or raise launch.machines"
            )
        if launch.machines > 1 and launch.main_address is None:
            yield (
                f"launch.machines is {launch.machines}, and nobody knows where machine 0 is;"
                " set launch.main_address to its name or address"
            )
        if launch.strategy != "auto" and launch.world_size == 1:
            yield (
                f"launch.strategy is '{launch.strategy}', but there is one process;"
                " set launch.processes, or remove launch.strategy"
            )
        only_sharded = ["cpu_offload"] if launch.cpu_offload else []
        only_sharded += [] if launch.reshard_after_forward else ["reshard_after_forward"]
        if only_sharded and launch.strategy != "fsdp":
            yield (
                f"launch.{only_sharded[0]} is for FSDP alone, and launch.strategy is '{launch.strategy}';"
                f" set launch.strategy=fsdp, or remove {', '.join(f'launch.{key}' for key in only_sharded)}"
            )
        if launch.strategy == "fsdp" and base.quantization == "int8":
            yield (
                "launch.strategy is 'fsdp', which shards no integers, and base.quantization is 'int8';"
                " set base.quantization=nf4, or launch.strategy=ddp"
            )
        if base.quantization != "nf4" and base.quant_storage != "auto":
            yield (
                f"base.quant_storage is set, but base.quantization is '{base.quantization}';"
                " remove it, or set base.quantization=nf4"
            )
        if launch.strategy == "fsdp" and base.quantization == "nf4" and base.quant_storage == "uint8":
            yield (
                "base.quant_storage is 'uint8', which FSDP leaves whole on every GPU;"
                " set base.quant_storage=bfloat16, or remove it"
            )
        named = {"bf16": "bfloat16", "fp16": "float16"}.get(launch.mixed_precision)
        if named is not None and base.dtype not in ("auto", named):
            yield (
                f"launch.mixed_precision is '{launch.mixed_precision}', but the base computes in what base.dtype says,"
                f" '{base.dtype}'; set base.dtype={named}, or launch.mixed_precision=no"
            )
