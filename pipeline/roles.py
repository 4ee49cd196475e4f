"""Role-named adapters on the one base: add, activate, freeze, save, load. The only module that touches PEFT.

Shape legend: B sequence, L token of a padded sequence, D width, V vocabulary, N token of any sequence.

Three things that PEFT does on its own are undone here, each a silent failure elsewhere: activating an adapter
turns its gradients on, loading one turns the others' off, and gradient checkpointing recomputes a layer with
whichever adapter is active by then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.artifacts import Manifest, read_manifest, require_same_base
from pipeline.base_model import Base
from pipeline.batching import PaddingTally, group_by_tokens
from pipeline.config import LoraSettings
from pipeline.distributed import World
from pipeline.errors import ArtifactError, ConfigError
from pipeline.lora_arithmetic import compute_in_the_bases_arithmetic
from pipeline.merged_model import copy_bytes, fits, merged_copy
from pipeline.scalar_head import RewardModel, ScalarHead, trunk_of, width_of
from pipeline.sharding import Shards
from pipeline.tensor_tree import save_tensors

SamplingWeights = Literal["auto", "merged", "adapter"]
Packing = Literal["auto", "always", "never"]
Role = Literal["policy", "reference", "reward", "value", "judge"]
ROLES: tuple[Role, ...] = get_args(Role)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD_WEIGHTS = "value_head.safetensors"
_SCORE_KEY = "base_model.model.score.weight"


class Roles:
    """The base and the adapters on it.

    Args:
        base: the loaded base; its model is wrapped in place.
        share_out_to: the processes that are to hold the base together; None where each keeps what it has.
        shards: the base, where it is shared out already.
    """

    def __init__(self, base: Base, share_out_to: World | None = None, shards: Shards | None = None) -> None:
        self.base = base
        self.heads: dict[Role, ScalarHead] = {}
        self._causal_model = base.model
        self._peft: PeftModel | None = None
        self._active: Role | None = None
        self._trainable: set[Role] = set()
        self._world = share_out_to
        self.shards = shards
        if shards is not None:
            shards.show_quantization()
        self.between_passes: Callable[[], None] = _go_on
        """Called before each forward pass that scores sequences; may raise to stop the work."""
        self.padding = PaddingTally()
        """Of all passes over microbatches."""
        self.packs = False
        """Whether the sequences of a pass stand one behind the other instead of padded."""

    # -- what there is

    @property
    def model(self) -> PeftModel:
        """The one PEFT model that holds every adapter."""
        assert self._peft is not None, "no role has been added yet"
        return self._peft

    @property
    def device(self) -> torch.device:
        return self.base.device

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The adapter's parameters, and its head's under `heads.ROLE.`, by name."""
        found = {name: parameter for name, parameter in self.model.named_parameters() if _belongs_to(role, name)}
        if role in self.heads:
            found |= {f"heads.{role}.{name}": parameter for name, parameter in self.heads[role].named_parameters()}
        return found

    def trainable_names(self) -> set[str]:
        """Names of all parameters that require a gradient right now."""
        names = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        for role, head in self.heads.items():
            names |= {f"heads.{role}.{name}" for name, parameter in head.named_parameters() if parameter.requires_grad}
        return names

    def declared_names(self) -> set[str]:
        """Names of the parameters that should require a gradient: those of the trainable roles."""
        return {name for role in self._trainable for name in self.parameters(role)}

    # -- add

    def add_fresh(self, role: Role, lora: LoraSettings) -> None:
        """A new adapter that changes nothing yet (its B matrices are zero)."""
        self._add(role, lora_config(lora, self._causal_model))

    def add_from(self, role: Role, folder: Path) -> Manifest:
        """An adapter from a finished stage's folder, with its scalar head if it has one.

        Raises:
            ArtifactError: the folder is incomplete, edited or corrupted.
            IncompatibleAdapterError: the adapter belongs to another base.
        """
        manifest = read_manifest(folder)
        require_same_base(manifest, self.base.identity, folder)
        self.add_weights(role, folder)
        return manifest

    def add_weights(self, role: Role, folder: Path) -> None:
        """An adapter from a folder in PEFT's format, without any check of where it comes from."""
        try:
            config = LoraConfig.from_pretrained(folder)
            tensors = load_file(folder / ADAPTER_WEIGHTS)
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"the adapter cannot be read: {error}", where=str(folder)) from None
        score = tensors.pop(_SCORE_KEY, None)
        config.modules_to_save, config.inference_mode, config.task_type = None, False, TaskType.CAUSAL_LM
        try:
            self._add(role, config)
        except ValueError as error:
            raise ArtifactError(
                f"the adapter does not fit this base: {error}",
                where=str(folder),
                remedy="It belongs to another architecture or to other target modules.",
            ) from None
        self._load_adapter(role, tensors, folder)
        if score is not None:
            self.add_head(role, bias=False)
            self._load_head(role, {"weight": score}, folder)
        elif (folder / HEAD_WEIGHTS).exists():
            head = load_file(folder / HEAD_WEIGHTS)
            self.add_head(role, bias="bias" in head)
            self._load_head(role, head, folder)

    def copy(self, source: Role, target: Role) -> None:
        """A new adapter `target` that equals `source`, its head included."""
        config = LoraConfig(**{**self.model.peft_config[source].to_dict(), "inference_mode": False})
        self._add(target, config)
        self._load_adapter(target, self._adapter_tensors(source), None)
        if source in self.heads:
            self.add_head(target, bias=self.heads[source].bias is not None)
            self.heads[target].load_state_dict(self.heads[source].state_dict())

    def remove(self, role: Role) -> None:
        """Take an adapter and its head away again; another may then come under the name."""
        if self._active == role:
            self._activate(next(name for name in self.model.peft_config if name != role))  # type: ignore[arg-type]
        active = self._active
        self.model.delete_adapter(role)
        self.heads.pop(role, None)
        self._trainable.discard(role)
        self._active = "removed"  # type: ignore[assignment]  # PEFT has activated whom it liked
        self._activate(active)

    def add_head(self, role: Role, *, bias: bool) -> ScalarHead:
        """A fresh scalar head for the role."""
        self.heads[role] = ScalarHead(width_of(self._causal_model), bias=bias, device=self.device)
        self._apply_requires_grad()
        return self.heads[role]

    def _add(self, role: Role, config: LoraConfig) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about bases without a hub id
            try:
                if self._peft is None:
                    self._peft = cast(PeftModel, get_peft_model(self._causal_model, config, adapter_name=role))
                else:
                    self._peft.add_adapter(role, config)
            except ValueError as error:
                raise ConfigError(
                    f"no adapter can be put on these modules: {error}",
                    where="lora.target_modules",
                    remedy="Name linear layers of this base, or set lora.target_modules=all-linear.",
                ) from None
            if self.shards is None and self._world is not None:
                self.shards = Shards(self._causal_model, trunk_of(self._causal_model), self._world)
        for parameter in self.parameters(role).values():
            # PEFT puts them where the base's weights are, which may be shares in main memory.
            parameter.data = parameter.data.to(self.device, torch.float32)
        if isinstance(self._causal_model.get_output_embeddings(), LoraLayer):
            raise ConfigError(
                "the output head has an adapter, but only the trunk's layers learn here",
                where="lora.target_modules",
                remedy="Leave the output head (lm_head) out of it.",
            )
        compute_in_the_bases_arithmetic(self._peft, role)
        self._activate(role)

    def _load_adapter(self, role: Role, tensors: Mapping[str, Tensor], folder: Path | None) -> None:
        wanted = self._adapter_parameters(role)
        odd = wanted.keys() ^ tensors.keys() or {key for key in wanted if wanted[key].shape != tensors[key].shape}
        if odd:
            raise ArtifactError(
                f"the adapter does not fit this base, {len(odd)} of its tensors differ in name or shape: {min(odd)}",
                where=None if folder is None else str(folder),
                remedy="It belongs to another architecture or to other target modules.",
            )
        with torch.no_grad():
            for key, parameter in wanted.items():
                parameter.copy_(tensors[key])

    def _load_head(self, role: Role, tensors: dict[str, Tensor], folder: Path) -> None:
        try:
            self.heads[role].load_state_dict(tensors)
        except RuntimeError as error:
            raise ArtifactError(f"the scalar head does not fit: {error}", where=str(folder)) from None

    # -- activate and freeze

    def set_trainable(self, *roles: Role) -> None:
        """Declare which roles learn; all others, and the base, stand still."""
        self._trainable = set(roles)
        self._apply_requires_grad()

    @contextmanager
    def active(self, role: Role | None) -> Iterator[None]:
        """Run the block with this role's adapter, or with the bare base for None; then switch back."""
        before = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, role: Role | None) -> None:
        if role == self._active:
            return  # a recomputation asks for every layer, and asking PEFT is slow
        tuner: Any = self.model.base_model
        if role is None:
            tuner.disable_adapter_layers()
        else:
            if self._active is None:
                tuner.enable_adapter_layers()
            self.model.set_adapter(role)
        self._active = role
        self._apply_requires_grad()

    def _apply_requires_grad(self) -> None:
        """Undo what PEFT does to requires_grad when it adds, loads or activates an adapter."""
        if self._peft is None:
            return
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(any(_belongs_to(role, name) for role in self._trainable))
        for role, head in self.heads.items():
            head.requires_grad_(role in self._trainable)

    # -- compute

    def hidden_states(self, input_ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The trunk's last hidden states [B, L, D] under the active role, for right-padded sequences."""
        trunk = trunk_of(self._causal_model)
        if self.packs:
            return _packed_states(trunk, input_ids_BL, mask_BL, told_the_kernel=self.uses_flash_attention)
        return cast(
            Tensor, trunk(input_ids=input_ids_BL, attention_mask=mask_BL.long(), use_cache=False).last_hidden_state
        )

    @property
    def uses_flash_attention(self) -> bool:
        """Whether the base's attention is a flash kernel, which needs no masks."""
        return "flash" in str(self._causal_model.config._attn_implementation)

    def pack(self, packing: Packing) -> None:
        """Choose whether the sequences of a pass are packed; `auto` does over flash attention."""
        self.packs = packing == "always" or (packing == "auto" and self.uses_flash_attention)

    @property
    def merged_bytes(self) -> int:
        """What a merged copy takes beside the base."""
        return copy_bytes(self._causal_model)

    def merges(self, weights: SamplingWeights) -> bool:
        """Whether to sample from a merged copy: `auto` does where the copy is small beside the device's memory."""
        return weights == "merged" or (weights == "auto" and fits(self._causal_model, self.device))

    @contextmanager
    def sampling_model(self, role: Role | None, weights: SamplingWeights) -> Iterator[PreTrainedModel | PeftModel]:
        """The model to sample a role with: a merged copy that lives as long as the block, or the role on the base.

        A base that is shared out is gathered for the block, unless processes are to sample in step.
        """
        if self.merges(weights):
            yield merged_copy(self._causal_model, role)
        else:
            gathers = self.shards is not None and self.shards.fits_whole
            with self.active(role), cast(Shards, self.shards).gathered() if gathers else nullcontext():
                yield self.model

    def samples_in_step(self, weights: SamplingWeights) -> bool:
        """Whether every token takes all processes: where the base is shared out, and too large to be gathered."""
        return self.shards is not None and not self.shards.fits_whole and not self.merges(weights)

    def microbatches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Sequences of these lengths as `group_by_tokens` groups them; as many groups in every process that must wait.

        Where the base is shared out, every process must come here with as many sequences.
        """
        groups = group_by_tokens(lengths, max_tokens, packed=self.packs)
        if self.shards is not None:
            groups = self.shards.in_step(groups)
        for group in groups:
            self.padding.count([lengths[index] for index in group], packed=self.packs)
        return groups

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The output head: hidden states [..., D] -> logits [..., V], with the architecture's own scaling."""
        output = self._causal_model.get_output_embeddings()
        logits = output(hidden_ND.to(output.weight.dtype))
        text_config = self._causal_model.config.get_text_config()
        if divisor := getattr(text_config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if factor := getattr(text_config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if cap := getattr(text_config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return cast(Tensor, logits)

    def head_values(self, role: Role, hidden: Tensor) -> Tensor:
        """The role's scalar head: hidden states [..., D] -> numbers [...] in float32."""
        return cast(Tensor, self.heads[role](hidden)).squeeze(-1)

    def training_mode(self, *, gradient_checkpointing: bool) -> None:
        """For updates: layers may recompute their activations; nothing drops out.

        A recomputation runs under the role that its forward ran under, whatever is active by then.
        """
        model: Any = self._causal_model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # renamed in transformers 5.23; the old name works in all of 5
            if gradient_checkpointing:
                options = {"use_reentrant": False, "context_fn": self._pinned_to_active_role}
                model.gradient_checkpointing_enable(options)
            else:
                model.gradient_checkpointing_disable()
        self.model.train()

    def inference_mode(self) -> None:
        """For sampling and scoring: the key-value cache works, nothing is recomputed."""
        self.model.eval()

    def _pinned_to_active_role(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.active(self._active)

    def disable_dropout(self) -> None:
        """Set every dropout of the base and of the adapters to 0 (PPO's ratios would otherwise be noise)."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "attn_dropout", "resid_dropout", "dropout", "hidden_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    # -- save

    def save(self, role: Role, folder: Path) -> None:
        """Write the adapter as plain PEFT reads it; a bias-free head goes in as a classifier's `score`.

        The folder then loads with `PeftModel.from_pretrained`, a reward adapter's also on
        `AutoModelForSequenceClassification`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._adapter_tensors(role)
        head = self.heads.get(role)
        config = LoraConfig(**{**self.model.peft_config[role].to_dict(), "inference_mode": True})
        config.base_model_name_or_path = self.base.identity.model
        if not isinstance(config.target_modules, str):  # a set, whose order changes from process to process
            config.target_modules = sorted(config.target_modules or ())
        config.revision = self.base.identity.revision
        if head is not None and head.bias is None:
            tensors[_SCORE_KEY] = head.weight
            config.modules_to_save, config.task_type = ["score"], TaskType.SEQ_CLS
        elif head is not None:
            self.save_head(role, folder)
        save_tensors(tensors, folder / ADAPTER_WEIGHTS)
        config.save_pretrained(folder)

    def save_head(self, role: Role, folder: Path) -> None:
        """Write the role's head alone, with its bias."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.heads[role].state_dict(), folder / HEAD_WEIGHTS)

    def _adapter_tensors(self, role: Role) -> dict[str, Tensor]:
        return {key: tensor.detach().cpu().clone() for key, tensor in sorted(self._adapter_parameters(role).items())}

    def _adapter_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The adapter's parameters under the names that PEFT saves them by: `...lora_A.weight`.

        PEFT's own functions look for the adapter's name anywhere, and lose a module of the base that is called so.
        """
        found = {}
        for name, parameter in self.model.named_parameters():
            if _belongs_to(role, name):
                before, _, after = name.rpartition(f".{role}.")
                found[f"{before}.{after}"] = parameter
        return found


def _packed_states(trunk: nn.Module, input_ids_BL: Tensor, mask_BL: Tensor, *, told_the_kernel: bool) -> Tensor:
    """The trunk's states of sequences that go through it one behind the other: [B, L, D], zeros at padding.

    Positions begin anew with each, by which transformers' masks keep them apart; a kernel without masks is told where
    each ends.
    """
    mask_BL = mask_BL.bool()
    position_ids_1N = (mask_BL.long().cumsum(dim=1) - 1)[mask_BL][None]
    told: dict[str, Any] = {}
    if told_the_kernel:
        lengths_B = mask_BL.sum(dim=1)
        ends = nn.functional.pad(lengths_B.cumsum(dim=0), (1, 0)).to(torch.int32)
        longest = int(lengths_B.max())
        told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    output = trunk(input_ids=input_ids_BL[mask_BL][None], position_ids=position_ids_1N, use_cache=False, **told)
    states_ND = cast(Tensor, output.last_hidden_state)[0]
    return states_ND.new_zeros(*mask_BL.shape, states_ND.shape[-1]).masked_scatter(mask_BL[..., None], states_ND)


def _belongs_to(role: Role, name: str) -> bool:
    """Whether a parameter is part of the role's adapter: `...lora_A.ROLE.weight`. A base may have a `value` too."""
    return any(part == role and before.startswith("lora_") for before, part in pairwise(name.split(".")))


def lora_config(lora: LoraSettings, causal_model: PreTrainedModel) -> LoraConfig:
    """PEFT's config for the settings; `all-linear` becomes the names of the trunk's linear layers."""
    if lora.target_modules == "all-linear":
        targets = sorted(
            {
                name.removesuffix(".base_layer").rpartition(".")[2]
                for name, module in trunk_of(causal_model).named_modules()
                if isinstance(module, (nn.Linear, Conv1D, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
                and "lora_" not in name  # an earlier role's
            }
        )
    else:
        targets = list(lora.target_modules)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rank_stabilized,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def reward_model_for_training(base: Base, lora: LoraSettings, start_from: Path | None) -> tuple[PeftModel, RewardModel]:
    """The reward model as TRL's RewardTrainer takes it: one trainable adapter and a float32 head on the base's trunk.

    Args:
        base: the loaded base; its output head is left out.
        lora: shape of a fresh adapter.
        start_from: folder of the adapter to start as a copy of; None for a fresh one.
    """
    config = lora_config(lora, base.model)
    tensors: dict[str, Tensor] | None = None
    if start_from is not None:
        config = LoraConfig.from_pretrained(start_from)
        config.inference_mode, config.lora_dropout = False, lora.dropout
        config.base_model_name_or_path = None  # PEFT would warn of the folder that the base was converted to
        tensors = load_file(start_from / ADAPTER_WEIGHTS)
    config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["score"]
    reward_model = RewardModel(base.model)
    if tensors is not None:
        tensors[_SCORE_KEY] = reward_model.score.weight.detach().clone()  # the head starts fresh all the same
    # PEFT asks for these marks to choose its layers for quantized bases, whose arithmetic PPO will use too. They come
    # off again, since TRL would take them as leave to round the adapter and the head to bfloat16.
    marks = {name: getattr(base.model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit")}
    for name, value in marks.items():
        setattr(reward_model, name, value)
    model = cast(PeftModel, get_peft_model(cast(Any, reward_model), config, adapter_name="default"))
    for name in marks:
        delattr(reward_model, name)
    if tensors is not None:
        result = set_peft_model_state_dict(model, tensors, adapter_name="default")
        assert not result.unexpected_keys, result.unexpected_keys
    compute_in_the_bases_arithmetic(model, "default")
    return model, reward_model


def _go_on() -> None:
    """Nobody asks the scoring to stop."""
