"""PPO's parts on a tiny base: roles, finished SFT and reward stages, and one round's machinery without a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import loaded_tiny_base, tiny_base
from torch import Tensor

from pipeline.artifacts import Manifest
from pipeline.base_model import Base, load_base
from pipeline.config import LoraSettings, PPOSettings
from pipeline.config_file import LoadedConfig
from pipeline.distributed import World
from pipeline.records import Message, Origin, Prompt
from pipeline.rewards import Calibration, RewardSum
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory
from pipeline.scoring import score_rewards
from stages.experience import Budgets, Experience, collect, reward_model_scores, sample, sampling_settings
from stages.inputs import stage_inputs
from stages.ppo import add_critic, make_optimizer, set_learning_rates
from stages.result import StageClock, finish
from stages.update import Updater

LORA = LoraSettings(rank=4, alpha=8)
CALIBRATION = Calibration(gain=0.5, bias=0.25)


def perturb(roles: Roles, role: Role, scale: float = 0.05, seed: int = 1) -> None:
    """Move a role's parameters, head included, off where they are, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(roles.parameters(role).items()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def add_made_up(
    roles: Roles, role: Role, *, seed: int, scale: float = 0.05, head: bool = False, lora: LoraSettings = LORA
) -> None:
    """An adapter that does something, the same at every call with the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        roles.add_fresh(role, lora)
        if head:
            roles.add_head(role, bias=False)
    perturb(roles, role, scale, seed)


def favour_token(roles: Roles, token_id: int, amount: float) -> None:
    """Raise one token's logit in every distribution of the base, in sampling and in scoring alike."""

    def add(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        bias_V = torch.zeros(logits.shape[-1], dtype=logits.dtype)
        bias_V[token_id] = amount
        return logits + bias_V

    roles.base.model.get_output_embeddings().register_forward_hook(add)


def sharpen(folder: Path, factor: float = 20.0) -> Path:
    """Scale a saved base's output head: a random model's next-token distribution is almost flat otherwise."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = factor * tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def sharp_base(folder: Path, architecture: str = "llama", **options: Any) -> Base:
    """A tiny base with decided opinions about the next token."""
    path = folder / f"{architecture}-base"
    if not path.exists():
        sharpen(tiny_base(path, architecture))
    return loaded_tiny_base(folder, architecture, **options)


def prompts(count: int) -> list[Prompt]:
    """Prompts of different lengths."""
    words = ["sun", "a long winter", "sky", "an old oak in the yard", "elm", "fox", "owl and bee", "it"]
    return [
        Prompt((Message("user", words[row % len(words)] + "!" * (row // len(words))),), Origin("tiny", row + 1))
        for row in range(count)
    ]


def policy_roles(base: Base) -> Roles:
    """A perturbed SFT adapter as the reference, and the policy as its copy."""
    roles = Roles(base)
    add_made_up(roles, "reference", seed=1)
    roles.copy("reference", "policy")
    return roles


def ppo_roles(base: Base, critic: str = "adapter") -> Roles:
    """All roles as PPO starts with them; reference and reward are made up, and differ."""
    roles = policy_roles(base)
    add_made_up(roles, "reward", seed=2, head=True)
    add_critic(roles, PPOSettings.model_validate({"critic": critic}))
    if critic == "adapter":  # a critic that has learned something; `add_critic` leaves its head at zero
        with torch.no_grad():
            roles.heads["value"].weight.copy_(CALIBRATION.gain * roles.heads["reward"].weight)
            roles.heads["value"].bias.fill_(CALIBRATION.bias)
    roles.set_trainable("policy", "value")
    roles.disable_dropout()
    return roles


@dataclass
class Round:
    """What `stages.ppo.run` holds between two iterations."""

    roles: Roles
    ppo: PPOSettings
    optimizer: torch.optim.Optimizer
    rewards: RewardSum
    updater: Updater
    world: World
    budgets: Budgets

    def collect(
        self,
        iteration: int = 0,
        kl_coefficient: float = 0.05,
        asked: Sequence[Prompt] | None = None,
        **changes: Any,
    ) -> Experience:
        """Sample and score a round: this process's prompts, all eight of them by default."""
        asked, ppo = prompts(8) if asked is None else asked, self.ppo.model_copy(update=changes)
        shared: dict[str, Any] = {"world": self.world, "budgets": self.budgets}
        sampled = sample(
            self.roles,
            asked,
            seed=(0, "rollout", iteration, 0),
            sampling=sampling_settings(ppo),
            with_values=ppo.rollout.reuse_logprobs and ppo.critic == "head",
            **shared,
        )
        return collect(self.roles, self.rewards, asked, sampled, ppo, kl_coefficient=kl_coefficient, **shared)

    def parameters(self, role: Role) -> dict[str, Tensor]:
        """A copy of a role's parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.roles.parameters(role).items()}


def tiny_round(base: Base, *, roles: Roles | None = None, **settings: Any) -> Round:
    """Roles, optimizer and updater for 8 responses of at most 8 tokens, scored by the reward adapter."""
    ppo = PPOSettings.model_validate(
        {
            "prompts_per_iteration": 8,
            "minibatch_size": 4,
            "max_new_tokens": 8,
            "learning_rate": 1e-3,
            "epochs": 2,
            **settings,
        }
    )
    roles = roles or ppo_roles(base, ppo.critic)
    world = World()
    optimizer = make_optimizer(roles, ppo)
    set_learning_rates(optimizer, ppo, 0)

    budgets = Budgets.of(ppo)
    rewards = RewardSum(ppo.rewards, reward_model_scores(roles, CALIBRATION, budgets))
    updater = Updater(roles, optimizer, ppo, seed=0, world=world, budgets=budgets)
    return Round(roles, ppo, optimizer, rewards, updater, world, budgets)


def record_gradients(round_: Round, *, step: bool = True) -> list[dict[str, Tensor]]:
    """Each optimizer step's gradients, as the optimizer sees them, from now on."""
    seen: list[dict[str, Tensor]] = []
    make_step = round_.optimizer.step

    def stepping(*arguments: Any, **options: Any) -> Any:
        named = {**round_.roles.parameters("policy"), **round_.roles.parameters("value")}
        seen.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        return make_step(*arguments, **options) if step else None

    round_.optimizer.step = stepping  # type: ignore[method-assign]
    return seen


def publish_sft(loaded: LoadedConfig, *, scale: float = 0.05) -> RunDirectory:
    """A run whose SFT stage is finished; the adapter is made up."""
    run = RunDirectory.open(loaded)
    roles = Roles(load_base(loaded.config.base))
    add_made_up(roles, "policy", seed=1, scale=scale, lora=loaded.config.lora)
    publish("sft", "policy", roles, loaded, run)
    return run


def publish_reward(loaded: LoadedConfig, run: RunDirectory) -> None:
    """The same with the reward stage; its round-trip probe is one sequence."""
    roles = Roles(load_base(loaded.config.base))
    add_made_up(roles, "reward", seed=2, head=True, lora=loaded.config.lora)
    ids = [5, 6, 7, 8]
    probe = [{"ids": ids, "score": float(score_rewards(roles, [ids], max_tokens=1))}]
    publish("reward", "reward", roles, loaded, run, calibration=CALIBRATION, extra={"probe": probe})


def publish(stage: Any, role: Role, roles: Roles, loaded: LoadedConfig, run: RunDirectory, **options: Any) -> Manifest:
    """Publish a role as the result of a stage."""
    metrics = {"held_out_accuracy": 0.5} if stage == "reward" else {}
    return finish(
        stage,
        role,
        loaded,
        run,
        inputs=stage_inputs(stage, loaded.config, run),
        base=roles.base.identity,
        clock=StageClock(),
        metrics=metrics,
        save=lambda folder: roles.save(role, folder),
        **options,
    )


def with_tokenizer(base: Base, chat: Any) -> Base:
    """The same weights under another tokenizer."""
    return replace(base, chat=chat)
