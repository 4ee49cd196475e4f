"""Breaks trivet on purpose, one line at a time, and shows that a test notices.

Each entry of the table undoes one thing that PPO on adapters must get right. The script copies the repository, applies
one mutation after the other to the copy, and runs the tests that should fail.

    python tests/mutations.py [WORDS]        only mutations whose description contains the words

Exit code 0: all tests pass without a mutation, and every mutation is noticed. It takes about ten seconds a mutation.
`test_mutations.py` keeps the table true to the source.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", "runs", "*.egg-info", "node_modules")

ROLES, GENERATION, SCORING = (f"tests/pipeline/test_{name}.py" for name in ("roles", "generation", "scoring"))
BATCHING, CHECKPOINT, REWARDS = (f"tests/pipeline/test_{name}.py" for name in ("batching", "checkpoint", "rewards"))
BASE, ARTIFACTS, RUN_DIRECTORY = (
    f"tests/pipeline/test_{name}.py" for name in ("base_model", "artifacts", "run_directory")
)
RUN_LOCK, DISK = (f"tests/pipeline/test_{name}.py" for name in ("run_lock", "disk"))
PPO, GATES, EVALUATE, PROCESSES = (f"tests/stages/test_{name}.py" for name in ("ppo", "gates", "evaluate", "processes"))
DATASETS = "tests/pipeline/test_datasets.py"
TRL_RESUME, TRL_PROCESSES = "tests/stages/test_trl_resume.py", "tests/stages/test_trl_processes.py"
WHOLE = "tests/stages/test_whole_batches.py"
PARITY = "tests/parity/test_ppo_step.py"
SFT, REWARD, TRL_OPTIONS, SCALAR_HEAD = (
    f"tests/{name}.py"
    for name in ("stages/test_sft", "stages/test_reward", "pipeline/test_trl_options", "pipeline/test_scalar_head")
)
REPORT, RUN_STATE = "tests/flows/test_report.py", "tests/pipeline/test_run_state.py"
JUDGE = "tests/stages/test_judge_pairs.py"
CURVE, CURVE_POINTS = "tests/flows/test_learning_curve.py", "tests/pipeline/test_learning_curve.py"
SHARDED = "tests/stages/test_sharded_stages.py"
CHAINED, TWO_MACHINES = "tests/stages/test_chained.py", "tests/flows/test_two_machines.py"
CHAT = "tests/flows/test_chat.py"
ANSWER_FILE, EXPORT = (f"tests/stages/test_{name}.py" for name in ("answer_file", "export"))
ENGINES = "tests/pipeline/test_engines.py"
ENDPOINT, TRACKERS = "tests/pipeline/test_endpoint_judge.py", "tests/pipeline/test_trackers.py"


@dataclass(frozen=True)
class Mutation:
    """One fault: in `file`, `old`, which occurs there once, becomes `new`; each of `tests` should fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


TABLE = (
    # ---- tokens and rollouts
    Mutation(
        "padding is recognised by its id",
        "pipeline/batching.py",
        "length_mask(lengths_B, ids_BL.shape[1]).to(device)",
        "(ids_BL != _PADDING).to(device)",
        (f"{BATCHING}::test_padding_is_known_by_length_whatever_the_ids_are",),
    ),
    Mutation(
        "the mask hides every token that equals the pad token",
        "stages/experience.py",
        "mask_BT = length_mask(lengths_B, size)",
        "mask_BT = length_mask(lengths_B, size)"
        " & (pad_rows([torch.tensor(r.response) for r in episodes], size) != roles.base.chat.tokenizer.pad_token_id)",
        (f"{GENERATION}::test_what_the_pad_token_is_changes_nothing",),
    ),
    Mutation(
        "reward training sees another end than PPO",
        "pipeline/chat.py",
        "add([*self._encode_after(said), *([self.eos_token_id] if closed else [])], True)",
        "add([*self._encode_after(said)], True)",
        (f"{SCORING}::test_the_same_pair_gets_the_same_score_in_both_stages",),
    ),
    Mutation(
        "the sampler forgets the temperature in its log-probabilities",
        "pipeline/generation.py",
        "logits_BV = scores.float() / self._temperature",
        "logits_BV = scores.float()",
        (f"{GENERATION}::test_recorded_logprobs_are_the_trainers_own",),
    ),
    Mutation(
        "the update forgets the temperature",
        "stages/update.py",
        "batch, temperature=ppo.temperature, with_entropy=True",
        "batch, temperature=1.0, with_entropy=True",
        (f"{PPO}::test_the_first_round_has_no_kl_and_a_ratio_of_1", PARITY),
    ),
    Mutation(
        "samples are filtered",
        "pipeline/generation.py",
        "        if sampling.top_k > 0:\n            self._filters.append(TopKLogitsWarper(sampling.top_k))",
        "        self._filters.append(TopKLogitsWarper(20))",
        (f"{GENERATION}::test_samples_follow_the_tempered_softmax_of_the_role",),
    ),
    Mutation(
        "biased sampling is accepted silently",
        "pipeline/config.py",
        "if (ppo.top_p != 1.0 or ppo.top_k != 0) and not ppo.allow_biased_sampling:",
        "if False:",
        (f"{PPO}::test_a_filter_on_the_samples_is_refused_unless_asked_for",),
    ),
    Mutation(
        "what follows the first EOS is kept",
        "pipeline/generation.py",
        "length = ids.index(eos) + 1 if finished else len(ids)",
        "length = len(ids)",
        (f"{GENERATION}::test_a_response_ends_with_its_first_eos",),
    ),
    Mutation(
        "the EOS itself is cut off",
        "pipeline/generation.py",
        "length = ids.index(eos) + 1 if finished else len(ids)",
        "length = ids.index(eos) or 1 if finished else len(ids)",
        (f"{GENERATION}::test_a_response_ends_with_its_first_eos",),
    ),
    Mutation(
        "the score stands on the padding after the last token",
        "pipeline/advantages.py",
        "scatter_add(1, lengths_B[:, None] - 1,",
        "scatter_add(1, torch.full_like(lengths_B[:, None], rewards_BT.shape[1] - 1),",
        (f"{PPO}::test_the_reward_is_the_score_at_the_end_minus_the_kl_everywhere", PARITY),
    ),
    Mutation(
        "the reward model reads one token too early",
        "pipeline/scalar_head.py",
        "last_B = (positions_L * mask_BL.long()).argmax(dim=1)",
        "last_B = (positions_L * mask_BL.long()).argmax(dim=1) - 1",
        (f"{SCORING}::test_the_score_is_read_at_the_last_real_token",),
    ),
    Mutation(
        "a missing EOS costs nothing",
        "stages/experience.py",
        "clipped_B - ppo.missing_eos_penalty * (~finished_B).float()",
        "clipped_B",
        (f"{PPO}::test_scores_are_clipped_before_the_penalty_for_a_missing_eos", PARITY),
    ),
    Mutation(
        "dropout stays on",
        "pipeline/roles.py",
        "                module.p = 0.0",
        "                pass",
        (f"{ROLES}::test_no_dropout_of_base_or_adapter_is_left_in_training_mode",),
    ),
    Mutation(
        "all processes draw the same",
        "stages/experience.py",
        "range(world.rank * len(prompts), (world.rank + 1) * len(prompts))",
        "range(len(prompts))",
        (f"{PROCESSES}::test_two_processes_sample_together_what_one_does",),
    ),
    Mutation(
        "the sampler's log-probabilities are taken unchecked",
        "stages/experience.py",
        "world.maximum(compute(range(few))) <= most:",
        "world.maximum(compute(range(few))) <= 1e9:",
        (f"{PPO}::test_where_the_sampler_says_otherwise_the_trainer_computes_everything",),
    ),
    Mutation(
        "the value head reads the first state of a prompt",
        "pipeline/generation.py",
        "arguments[0][:, -1]",
        "arguments[0][:, 0] * 2",
        (f"{PPO}::test_the_samplers_figures_are_the_trainers_where_they_are_reused",),
    ),
    Mutation(
        "continuous batching draws every token with a response's first number",
        "pipeline/paged_engine.py",
        "return row * self._tokens + number if",
        "return row * self._tokens if",
        (f"{ENGINES}::test_paged_gives_what_generate_gives",),
    ),
    Mutation(
        "continuous batching seeds the global generator",
        "pipeline/paged_engine.py",
        '    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):\n        yield',
        "    yield",
        (f"{ENGINES}::test_paged_leaves_everything_as_it_was",),
    ),
    Mutation(
        "pages leave out the cap of an attention",
        "pipeline/paged_engine.py",
        '"attn_logit_softcapping", None) and not roles.uses_flash_attention',
        '"attn_logit_softcapping", None) and roles.uses_flash_attention',
        (f"{ENGINES}::test_paged_is_refused_where_it_would_compute_wrongly",),
    ),
    Mutation(
        "a failure of continuous batching is waited for",
        "pipeline/paged_engine.py",
        "                _require_success(manager, result.error)\n",
        "",
        (f"{ENGINES}::test_a_failure_of_the_paged_engine_is_named",),
    ),
    Mutation(
        "vLLM goes on with the adapter of the first round",
        "pipeline/vllm_engine.py",
        "yield Path(folder).name, Path(folder)",
        'yield "policy", Path(folder)',
        (f"{ENGINES}::test_vllm_samples_from_the_roles_own_weights[here-1.0]",),
    ),
    Mutation(
        "vLLM gives all responses one seed",
        "pipeline/vllm_engine.py",
        "derive_seed(*seed, number)) for",
        "derive_seed(*seed)) for",
        (f"{ENGINES}::test_vllm_samples_from_the_roles_own_weights[here-1.0]",),
    ),
    Mutation(
        "a response that vLLM cut short is taken",
        "pipeline/vllm_engine.py",
        "elif not ends and len(ids) < sampling.max_new_tokens:",
        "elif False:",
        (f"{ENGINES}::test_a_server_that_does_otherwise_is_refused",),
    ),
    Mutation(
        "values that an engine did not read are missed",
        "stages/experience.py",
        "if not (ppo.rollout.reuse_logprobs and has_all):",
        "if not ppo.rollout.reuse_logprobs:",
        (f"{ENGINES}::test_a_round_with_vllm_computes_what_vllm_does_not_say",),
    ),
    Mutation(
        "quantized weights are kept whatever they were made from",
        "pipeline/quantized_cache.py",
        '        "weights": identity.weights,\n',
        "",
        (f"{BASE}::test_what_a_base_is_quantized_from_and_how_makes_another_copy",),
    ),
    Mutation(
        "a copy of quantized weights is believed",
        "pipeline/base_model.py",
        " and kept.exists() and intact(kept):",
        " and kept.exists():",
        (f"{BASE}::test_a_copy_that_is_not_what_was_written_is_made_again",),
    ),
    Mutation(
        "what was quantized is quantized again at every start",
        "pipeline/base_model.py",
        "    if kept is not None and kept.exists() and intact(kept):",
        "    if False:",
        (f"{BASE}::test_a_second_start_does_not_quantize_again",),
    ),
    Mutation(
        "packed sequences see each other",
        "pipeline/roles.py",
        "position_ids_1N = (mask_BL.long().cumsum(dim=1) - 1)[mask_BL][None]",
        "position_ids_1N = torch.arange(int(mask_BL.sum()))[None]",
        (
            f"{SCORING}::test_packed_sequences_give_what_padded_ones_give",
            f"{GATES}::test_packed_sequences_that_see_each_other_are_refused",
        ),
    ),
    Mutation(
        "packed sequences are grouped as if they were padded",
        "pipeline/roles.py",
        "group_by_tokens(lengths, max_tokens, packed=self.packs)",
        "group_by_tokens(lengths, 10 * max_tokens, packed=self.packs)",
        (f"{SCORING}::test_packed_microbatches_are_filled_with_tokens_alone",),
    ),
    Mutation(
        "padding is told as its opposite",
        "pipeline/batching.py",
        "self._padding += size - sum(lengths)",
        "self._padding += sum(lengths)",
        (f"{PPO}::test_padding_is_what_the_passes_were_given",),
    ),
    Mutation(
        "every round draws the same",
        "stages/ppo.py",
        'seed=(config.seed, "rollout", iteration),',
        'seed=(config.seed, "rollout"),',
        (f"{PPO}::test_each_round_draws_anew",),
    ),
    Mutation(
        "draws depend on the batch",
        "pipeline/generation.py",
        "[numbers[index] for index in chosen]",
        "range(len(chosen))",
        (f"{GENERATION}::test_a_response_does_not_depend_on_those_beside_it",),
    ),
    Mutation(
        "sampling follows the global generator",
        "pipeline/generation.py",
        "            generator=torch.Generator().manual_seed(derive_seed(*seed, number)),\n",
        "",
        (f"{GENERATION}::test_draws_follow_from_the_seed_alone",),
    ),
    Mutation(
        "a token of probability 0 can be drawn",
        "pipeline/generation.py",
        "reached_B1, right=True",
        "reached_B1, right=False",
        (f"{GENERATION}::test_a_token_that_cannot_be_said_is_never_drawn",),
    ),
    Mutation(
        "the vocabulary is cumulated in float32",
        "pipeline/generation.py",
        "cumsum(dim=1, dtype=torch.float64)",
        "cumsum(dim=1)",
        (f"{GENERATION}::test_every_token_of_a_large_vocabulary_keeps_its_share",),
    ),
    Mutation(
        "adapters are multiplied in float32",
        "pipeline/lora_arithmetic.py",
        "            module.cast_input_dtype_enabled = False\n",
        "",
        ("tests/pipeline/test_lora_arithmetic.py::test_no_float32_copy_of_the_input_is_made",),
    ),
    Mutation(
        "an adapter is not scaled",
        "pipeline/lora_arithmetic.py",
        "alpha=module.scaling[active_adapter]",
        "alpha=1",
        ("tests/pipeline/test_lora_arithmetic.py::test_it_is_pefts_formula",),
    ),
    # ---- reward
    Mutation(
        "the head starts ten times too large",
        "pipeline/scalar_head.py",
        "std=1.0 / math.sqrt(self.in_features + 1)",
        "std=10.0 / math.sqrt(self.in_features + 1)",
        (f"{ROLES}::test_the_head_starts_as_the_paper_says",),
    ),
    Mutation(
        "the head is rounded when it is saved",
        "pipeline/roles.py",
        "tensors[_SCORE_KEY] = head.weight",
        "tensors[_SCORE_KEY] = head.weight.bfloat16().float()",
        (f"{ROLES}::test_load_save_load_keeps_every_bit_of_adapters_and_heads",),
    ),
    Mutation(
        "the head lives in 16 bits",
        "pipeline/scalar_head.py",
        "super().__init__(width, 1, bias=bias, device=device, dtype=torch.float32)",
        "super().__init__(width, 1, bias=bias, device=device, dtype=torch.bfloat16)",
        (f"{ROLES}::test_adapters_and_heads_are_float32_on_a_16_bit_base",),
    ),
    Mutation(
        "the stored gain and bias are not applied",
        "stages/ppo.py",
        "reward_model_scores(roles, calibration, budgets)",
        "reward_model_scores(roles, Calibration(), budgets)",
        (f"{PPO}::test_the_stage_applies_the_stored_calibration",),
    ),
    Mutation(
        "the calibration's bias has the wrong sign",
        "pipeline/rewards.py",
        "return cls(gain, -gain * float(raw_B.double().mean()))",
        "return cls(gain, gain * float(raw_B.double().mean()))",
        (f"{REWARDS}::test_calibrated_scores_have_mean_0_and_variance_1",),
    ),
    Mutation(
        "leaving the reference is rewarded",
        "pipeline/advantages.py",
        "torch.where(mask_BT, -kl_coefficient * kl_BT, 0)",
        "torch.where(mask_BT, kl_coefficient * kl_BT, 0)",
        (f"{PPO}::test_the_reward_is_the_score_at_the_end_minus_the_kl_everywhere", PARITY),
    ),
    Mutation(
        "the reference is the bare base",
        "stages/experience.py",
        'score_logprobs(roles, "reference", episodes',
        "score_logprobs(roles, None, episodes",
        (f"{PPO}::test_the_first_round_has_no_kl_and_a_ratio_of_1", PARITY),
    ),
    Mutation(
        "nobody checks that the KL is 0 at first",
        "stages/gates.py",
        'if measured["kl"] != 0.0:',
        "if False:",
        (
            f"{GATES}::test_a_policy_that_is_not_the_reference_is_refused",
            f"{GATES}::test_the_bare_base_as_the_reference_is_refused",
        ),
    ),
    Mutation(
        "nobody checks that the reward adapter scores as it did",
        "stages/gates.py",
        'if not difference <= _REWARD_TOLERANCE * (1 + abs(entry["score"])):',
        "if False:",
        (f"{GATES}::test_a_reward_that_scores_otherwise_is_refused",),
    ),
    # ---- value and advantages
    Mutation(
        "the critic's head does not start at zero",
        "stages/ppo.py",
        "nn.init.zeros_(head.weight)",
        "pass",
        (f"{PPO}::test_the_critic_starts_with_the_reward_models_adapter_and_predicts_nothing",),
    ),
    Mutation(
        "the critic's adapter is not the reward model's",
        "stages/ppo.py",
        '"reward" if "reward" in roles.heads else "reference"',
        '"reference"',
        (f"{PPO}::test_the_critic_starts_with_the_reward_models_adapter_and_predicts_nothing",),
    ),
    Mutation(
        "the policy moves in the critic's warm-up",
        "stages/update.py",
        "normalizer, step, critic_only=critic_only, first=first",
        "normalizer, step, critic_only=False, first=first",
        (f"{PPO}::test_in_the_critics_warm_up_the_policy_keeps_every_bit[head]",),
    ),
    Mutation(
        "gamma and lambda are swapped",
        "stages/experience.py",
        "gamma=ppo.gamma, lam=ppo.gae_lambda",
        "gamma=ppo.gae_lambda, lam=ppo.gamma",
        (PARITY,),
    ),
    Mutation(
        "values are read one token too late",
        "pipeline/scoring.py",
        "first = len(episode.prompt) - 1  #",
        "first = len(episode.prompt)  #",
        (f"{SCORING}::test_values_stand_before_each_response_token",),
    ),
    Mutation(
        "whitening with the flag inverted",
        "pipeline/masking.py",
        "whitened if shift_mean else whitened + mean",
        "whitened + mean if shift_mean else whitened",
        (f"{PPO}::test_whitening_has_the_property_it_is_named_for", PARITY),
    ),
    Mutation(
        "each process whitens for itself",
        "stages/experience.py",
        "shift_mean=True, all_reduce=world.sum",
        "shift_mean=True",
        (f"{PROCESSES}::test_the_number_of_processes_does_not_change_gradient_or_step",),
    ),
    Mutation(
        "the policy's ratio is not clipped",
        "stages/update.py",
        "clip_range=ppo.clip_range,",
        "clip_range=0.999,",
        (PARITY,),
    ),
    Mutation(
        "values are not clipped",
        "stages/update.py",
        "clip_range=self._ppo.value_clip_range,",
        "clip_range=None,",
        (PARITY,),
    ),
    # ---- optimisation
    Mutation(
        "each process divides by its own tokens",
        "stages/update.py",
        "normalizer = float(experience.lengths_B[minibatch].sum())",
        "normalizer = float(experience.lengths_B[experience.share(minibatch, self._world)].sum())",
        (f"{PROCESSES}::test_the_number_of_processes_does_not_change_gradient_or_step",),
    ),
    Mutation(
        "each process draws minibatches by itself",
        "stages/update.py",
        'derive_seed(self._seed, "minibatches", iteration, epoch, 0)',
        'derive_seed(self._seed, "minibatches", iteration, epoch, self._world.rank)',
        (f"{PROCESSES}::test_a_run_of_two_processes_gives_the_adapters_of_one",),
    ),
    Mutation(
        "processes learn from the same part of a minibatch",
        "stages/whole_round.py",
        "longest_first[world.rank :: world.size]",
        "longest_first[: len(minibatch) // world.size]",
        (f"{PROCESSES}::test_a_run_of_two_processes_gives_the_adapters_of_one",),
    ),
    Mutation(
        "sharding: layers that were gathered to sample stay gathered",
        "pipeline/sharding.py",
        "            self.give_up()\n\n    def give_up",
        "            pass\n\n    def give_up",
        ("tests/stages/test_sharding.py::test_a_process_holds_its_part_of_every_layer",),
    ),
    Mutation(
        "sharding: the base is not shared out",
        "pipeline/sharding.py",
        "            fully_shard(\n",
        "            (lambda *_, **__: None)(\n",
        ("tests/stages/test_sharding.py::test_a_process_holds_its_part_of_every_layer",),
    ),
    Mutation(
        "sharding: a merged copy reads weights that are given up again",
        "pipeline/merged_model.py",
        "copied = _copy(plain, adapter, dtype, share=False)",
        "copied = _copy(plain, adapter, dtype)",
        ("tests/stages/test_sharding.py::test_states_gradients_and_merged_copies_are_the_very_same",),
    ),
    Mutation(
        "sharding: a process makes fewer passes than the others wait for",
        "pipeline/sharding.py",
        "while len(groups) < wanted:",
        "while False:",
        ("tests/stages/test_sharding.py::test_processes_make_equally_many_passes",),
    ),
    Mutation(
        "sharding: common work is done again by one process",
        "pipeline/memory_budget.py",
        "if not self._alone:",
        "if False:",
        ("tests/stages/test_sharding.py::test_lack_of_memory_amid_common_work_is_an_error_with_the_size_to_set",),
    ),
    Mutation(
        "sharding: integers are loaded to be shared out",
        "pipeline/sharding.py",
        'if base.quantization == "int8" or (base.quantization == "nf4" and base.quant_storage == "uint8"):',
        "if False:",
        ("tests/stages/test_sharding.py::test_integers_are_refused_before_they_are_loaded",),
    ),
    Mutation(
        "sharding: a launcher file may share out what FSDP cannot",
        "stages/launcher_file.py",
        "    if faults:\n",
        "    if False:\n",
        (
            "tests/stages/test_launcher_file.py::"
            "test_weights_that_fsdp_cannot_share_out_are_refused_whoever_asks_for_it",
        ),
    ),
    Mutation(
        "sharding: SFT keeps the whole base",
        "stages/sft.py",
        "roles = Roles(base, share_out_to=share_out_to)",
        "roles = Roles(base)",
        (f"{SHARDED}::test_the_base_is_shared_out_where_the_launcher_asks_for_it",),
    ),
    Mutation(
        "sharding: the trainer leaves each process's gradient to itself",
        "stages/trl_trainer.py",
        "                self.world.sum_gradients(learning)",
        "                pass",
        (f"{SHARDED}::test_two_processes_train_the_adapter_that_one_trains",),
    ),
    Mutation(
        "sharding: a process with fewer held-out rows makes fewer passes",
        "stages/sft.py",
        "if roles.shards is not None and len(mine) <",
        "if roles.shards is None and len(mine) <",
        (f"{SHARDED}::test_two_processes_measure_what_one_measures",),
    ),
    Mutation(
        "held-out prompts that fill up the last processes count",
        "stages/selection.py",
        "counted = min(len(mine), len(few) - world.rank * len(mine))",
        "counted = len(mine)",
        (f"{PROCESSES}::test_a_run_of_two_processes_measures_what_one_measures",),
    ),
    Mutation(
        "held-out prompts that processes cannot share evenly are left out",
        "stages/selection.py",
        "world.share([*few, *few[: -len(few) % world.size]])",
        "world.share(few[: len(few) - len(few) % world.size])",
        (f"{PROCESSES}::test_a_run_of_two_processes_measures_what_one_measures",),
    ),
    Mutation(
        "a round is taken for that of another number of processes",
        "stages/rounds.py",
        ' or found.state["processes"] != self._world.size:',
        ":",
        (f"{CHAINED}::test_policy_and_critic_are_those_of_one_process_that_was_never_stopped",),
    ),
    Mutation(
        "the controller reacts a hundredth more slowly",
        "pipeline/kl.py",
        "self.coefficient *= 1 + error * samples / self.horizon",
        "self.coefficient *= 1 + 0.01 * error * samples / self.horizon",
        ("tests/stages/test_golden_curve.py",),
    ),
    Mutation(
        "long sequences take plain products on a CPU",
        "pipeline/base_model.py",
        'return "eager" if device.type == "cpu" and plain else None',
        'return "eager" if device.type == "cpu" else None',
        ("tests/pipeline/test_base_model.py::test_attention_on_a_cpu_is_plain_where_sequences_are_short",),
    ),
    Mutation(
        "the path that is printed knows nothing of float32's closer limit",
        "stages/experience.py",
        "return min(ppo.rollout.max_logprob_gap, ratio_tolerance(ppo, arithmetic) / 2)",
        "return ppo.rollout.max_logprob_gap",
        ("tests/stages/test_gates.py::test_the_samplers_figures_serve_where_a_round_would_take_them",),
    ),
    Mutation(
        "a process without a row waits for buffers",
        "stages/trl_trainer.py",
        "cast(Any, model)._ddp_params_and_buffers_to_ignore = ignored\n",
        "pass\n",
        (f"{TRL_PROCESSES}::test_a_process_that_never_has_a_row_takes_no_part",),
    ),
    Mutation(
        "an epoch's last batch is filled up with rows that count again",
        "stages/whole_batches.py",
        "yield from numbers + [_GAP] * (self._length - len(numbers))",
        "yield from (numbers * self._length)[: self._length]",
        (WHOLE,),
    ),
    Mutation(
        "rows of an incomplete batch are left out unasked",
        "stages/whole_batches.py",
        "batches = rows // batch_size if drop_last else",
        "batches = rows // batch_size if not drop_last else",
        (WHOLE,),
    ),
    Mutation(
        "rows of like length meet in a process's part of a batch",
        "stages/whole_batches.py",
        "        order.batch_size = batch_size  # it knows",
        "        pass  # it knows",
        (WHOLE,),
    ),
    Mutation(
        "the targets of a row in a gap's place are counted",
        "stages/whole_batches.py",
        'if microbatch.get(EXAMPLES) == 0 and "labels" in microbatch:',
        "if False:",
        (f"{WHOLE}::test_only_targets_of_rows_are_counted",),
    ),
    Mutation(
        "an order by length is another one after a resume",
        "stages/whole_batches.py",
        "        self._order.generator.manual_seed(self._seed + self._epoch)\n",
        "",
        (f"{WHOLE}::test_an_order_by_length_comes_again_for_its_epoch_whatever_else_was_drawn",),
    ),
    Mutation(
        "pairs of a smaller microbatch count for more",
        "stages/trl_trainer.py",
        "self.current_gradient_accumulation_steps = accumulated / (weight * share)",
        "self.current_gradient_accumulation_steps = accumulated / share",
        ("tests/stages/test_reward.py::test_a_step_does_not_depend_on_how_its_batch_is_divided",),
    ),
    Mutation(
        "a row in a gap's place is learned from",
        "stages/trl_trainer.py",
        "return loss if self._counts else loss * 0.0",
        "return loss",
        (f"{SHARDED}::test_two_processes_train_the_adapter_that_one_trains",),
    ),
    Mutation(
        "a row in a gap's place shows in the figures",
        "stages/trl_trainer.py",
        "        if not examples:\n            self._restore_figures(figures)\n",
        "",
        (f"{SHARDED}::test_two_processes_measure_what_one_measures",),
    ),
    Mutation(
        "each process's figures count the same, however many microbatches they are of",
        "stages/trl_trainer.py",
        "setdefault(name, []).extend(values)",
        "setdefault(name, []).append(sum(values) / len(values))",
        (f"{TRL_PROCESSES}::test_two_processes_write_one_result_with_the_same_figures",),
    ),
    Mutation(
        "more processes take over what each of fewer had summed up",
        "stages/trl_trainer.py",
        "            mine = mine | shared_anew(processes, self.world.rank, self.world.size)\n",
        "",
        (f"{CHAINED}::test_the_figures_are_those_of_one_process_that_was_never_stopped",),
    ),
    Mutation(
        "a launcher's mixed precision rounds what SFT's adapter computes",
        "pipeline/trl_options.py",
        '        arguments.mixed_precision = "no"\n',
        "",
        ("tests/stages/test_sft.py::test_a_launchers_mixed_precision_changes_nothing",),
    ),
    Mutation(
        "a launcher's arithmetic that is not the base's is passed over",
        "pipeline/base_model.py",
        "    if dtype != named:\n",
        "    if False:\n",
        (
            "tests/pipeline/test_base_model.py::test_an_arithmetic_that_only_the_launcher_asks_for_is_refused",
            "tests/stages/test_command.py::test_an_arithmetic_that_the_launcher_alone_asks_for_is_refused",
        ),
    ),
    Mutation(
        "a paged optimizer's counter comes back as a tensor",
        "pipeline/checkpoint.py",
        "            state[entry] = int(tensor)\n",
        "            state[entry] = tensor\n",
        ("tests/pipeline/test_checkpoint.py::test_an_optimizer_goes_on_bit_for_bit",),
    ),
    Mutation(
        "the plan promises another optimizer than PPO's",
        "pipeline/memory_plan.py",
        'self.static("ppo", adapters, trainable, ppo.optimizer, gradients=1)',
        'self.static("ppo", adapters, trainable, "adamw", gradients=1)',
        ("tests/pipeline/test_memory_plan.py::test_ppo_keeps_the_moments_that_its_optimizer_keeps",),
    ),
    Mutation(
        "sharding: a process with a smaller batch does less than the others wait for",
        "stages/parts.py",
        "items = list(islice(cycle(own or batches[0]), max(map(len, batches))))",
        "items = list(islice(own or batches[0], max(map(len, batches))))",
        (f"{SHARDED}::test_parts_that_take_all_processes_are_made_in_step",),
    ),
    Mutation(
        "gradients are not summed over processes",
        "stages/update.py",
        "            self._world.sum_gradients(parameters)\n",
        "",
        (f"{PROCESSES}::test_the_number_of_processes_does_not_change_gradient_or_step",),
    ),
    Mutation(
        "each microbatch divides by its own tokens",
        "stages/update.py",
        "                    _all_valid(new.logprobs_N),\n"
        "                    clip_range=ppo.clip_range,\n"
        "                    normalizer=normalizer,",
        "                    _all_valid(new.logprobs_N),\n"
        "                    clip_range=ppo.clip_range,\n"
        "                    normalizer=float(len(new.logprobs_N)),",
        (f"{PPO}::test_microbatches_do_not_change_loss_or_gradient",),
    ),
    Mutation(
        "every epoch has the same minibatches",
        "stages/update.py",
        'derive_seed(self._seed, "minibatches", iteration, epoch, 0)',
        'derive_seed(self._seed, "minibatches", iteration, 0)',
        (f"{PPO}::test_each_epoch_has_a_fresh_permutation_of_all_responses",),
    ),
    Mutation(
        "nobody checks that the ratio is 1 at first",
        "stages/update.py",
        "if not error <= tolerance:",
        "if False:",
        (
            f"{PPO}::test_a_ratio_that_is_not_1_at_first_is_refused",
            f"{PPO}::test_a_ratio_at_another_temperature_is_refused",
        ),
    ),
    Mutation(
        "Adam's epsilon is torch's",
        "stages/ppo.py",
        "eps=ppo.adam_epsilon, ",
        "",
        (f"{PPO}::test_learning_rates_are_each_roles_own_and_fall", PARITY),
    ),
    Mutation(
        "a gradient that is not finite is stepped with",
        "stages/update.py",
        'if norm != norm or norm == float("inf"):',
        "if False:",
        (f"{PPO}::test_what_is_not_finite_stops_before_the_step_and_is_named",),
    ),
    Mutation(
        "log-probabilities that are not finite are learned from",
        "stages/experience.py",
        "if world.maximum(float(not bool(tensor.isfinite().all()))):",
        "if False:",
        (f"{PPO}::test_nan_from_the_trunk_stops_the_round",),
    ),
    Mutation(
        "one process stops alone",
        "stages/experience.py",
        "if world.maximum(float(not bool(tensor.isfinite().all()))):",
        "if not bool(tensor.isfinite().all()):",
        (f"{PROCESSES}::test_what_is_not_finite_in_one_process_stops_both",),
    ),
    Mutation(
        "a reward that is not a number is learned from",
        "pipeline/rewards.py",
        "if not math.isfinite(number):",
        "if False:",
        (f"{REWARDS}::test_what_a_function_does_wrong_is_named_with_its_place",),
    ),
    Mutation(
        "a reward function's fault names no iteration",
        "stages/ppo.py",
        '        where = f"iteration {number}, {where}".removesuffix(", ")\n',
        "        pass\n",
        (f"{PPO}::test_a_reward_that_is_not_a_number_names_the_iteration_and_spares_the_checkpoint",),
    ),
    # ---- one base, many adapters
    Mutation(
        "a recomputation runs under whichever role is active",
        "pipeline/roles.py",
        "return nullcontext(), self.active(self._active)",
        "return nullcontext(), nullcontext()",
        (f"{ROLES}::test_a_recomputation_runs_under_its_own_role",),
    ),
    Mutation(
        "switching leaves requires_grad as PEFT sets it",
        "pipeline/roles.py",
        "        self._active = role\n        self._apply_requires_grad()",
        "        self._active = role",
        (f"{ROLES}::test_after_every_switch_exactly_the_declared_parameters_learn[adapter]",),
    ),
    Mutation(
        "nobody checks what learns",
        "stages/gates.py",
        "if learning != declared:",
        "if False:",
        (
            f"{GATES}::test_a_parameter_that_pefts_switching_froze_is_found",
            f"{GATES}::test_a_declaration_that_does_not_hold_is_found",
        ),
    ),
    Mutation(
        "a module of the base is taken for the role of its name",
        "pipeline/roles.py",
        'any(part == role and before.startswith("lora_") for before, part in pairwise(name.split(".")))',
        'role in name.split(".")',
        (f"{ROLES}::test_a_module_of_the_base_called_value_is_not_the_role",),
    ),
    Mutation(
        "a role without an adapter leaves the last one on",
        "pipeline/roles.py",
        "            tuner.disable_adapter_layers()",
        "            pass",
        (f"{ROLES}::test_no_role_is_the_bare_base_and_the_reference_is_not",),
    ),
    Mutation(
        "PPO does not look whether the base changed",
        "stages/ppo.py",
        "    require_unchanged(base, base_before)\n",
        "",
        (f"{PPO}::test_a_base_that_changed_is_not_published",),
    ),
    Mutation(
        "the evaluation does not look whether the base changed",
        "stages/evaluate.py",
        "    require_unchanged(base, base_before)\n",
        "",
        (f"{EVALUATE}::test_a_base_that_changed_is_not_published",),
    ),
    Mutation(
        "the fingerprint leaves out the quantization constants",
        "pipeline/base_model.py",
        ", *_quantization_constants(model)]:",
        "]:",
        (f"{BASE}::test_whatever_changes_in_the_base_shows",),
    ),
    Mutation(
        "4-bit storage may be repacked",
        "pipeline/base_model.py",
        "            module.support_avx512bf16_for_cpu = False",
        "            module.support_avx512bf16_for_cpu = True",
        (f"{BASE}::test_four_bit_storage_is_not_repacked",),
    ),
    Mutation(
        "an adapter of another base is loaded",
        "pipeline/roles.py",
        "        require_same_base(manifest, self.base.identity, folder)\n",
        "",
        (f"{ROLES}::test_an_adapter_of_another_base_is_refused_and_the_field_is_named",),
    ),
    Mutation(
        "the chat template is not compared",
        "pipeline/artifacts.py",
        'if entry.name != "model" and theirs != ours:',
        'if entry.name not in ("model", "chat_template") and theirs != ours:',
        (
            f"{ARTIFACTS}::test_a_base_that_differs_is_refused_with_both_values",
            f"{ROLES}::test_an_adapter_of_another_base_is_refused_and_the_field_is_named",
        ),
    ),
    Mutation(
        "files of a stage are not verified",
        "pipeline/artifacts.py",
        "        if found[name] != expected:",
        "        if False:",
        (f"{ARTIFACTS}::test_an_edited_or_missing_file_is_named",),
    ),
    # ---- what is often wrong
    Mutation(
        "clipping acts on the first step only: an exhausted iterator",
        "stages/update.py",
        'role: list(roles.parameters(role).values()) for role in ("policy", "value")',
        'role: iter(roles.parameters(role).values()) for role in ("policy", "value")',
        (f"{PPO}::test_clipping_acts_on_every_step_and_role",),
    ),
    Mutation(
        "the gradient-checkpointing switch does nothing",
        "pipeline/roles.py",
        "model.gradient_checkpointing_enable(options)",
        "pass",
        (
            f"{PPO}::test_the_checkpointing_switch_is_heeded",
            f"{ROLES}::test_checkpointing_really_recomputes_each_layer",
        ),
    ),
    Mutation(
        "metrics are diluted by padding",
        "stages/round_metrics.py",
        "tokens = float(world.sum(mask_BT.sum().double().cpu()))",
        "tokens = float(world.sum(torch.tensor(float(mask_BT.numel()))))",
        (f"{PPO}::test_metrics_count_real_tokens_and_nothing_else",),
    ),
    Mutation(
        "the critic is in no checkpoint",
        "stages/training_state.py",
        '        return {**self.roles.parameters("policy"), **self.roles.parameters("value")}',
        '        return self.roles.parameters("policy")',
        (f"{PPO}::test_an_interrupted_run_ends_with_the_same_bytes",),
    ),
    Mutation(
        "the critic is not in the result",
        "stages/ppo.py",
        '        roles.save("value", folder / "value")',
        "        pass",
        (f"{PPO}::test_a_whole_run_leaves_its_results_and_its_parents_as_they_should_be",),
    ),
    Mutation(
        "prompt positions get logits",
        "pipeline/scoring.py",
        "hidden_ND = hidden_BLD[batch.row_N, batch.column_N]\n    return token",
        "hidden_ND = hidden_BLD[batch.row_N, batch.column_N]\n"
        "    roles.logits(hidden_BLD.flatten(0, 1))\n"
        "    return token",
        (f"{SCORING}::test_prompt_positions_get_no_logits", f"{PPO}::test_only_response_tokens_get_logits"),
    ),
    Mutation(
        "a trainable role is left out of the optimizer",
        "stages/ppo.py",
        '{"params": list(roles.parameters("policy").values()), "peak": ppo.learning_rate},',
        '{"params": list(roles.parameters("reference").values()), "peak": ppo.learning_rate},',
        (f"{PPO}::test_only_policy_and_critic_move_and_both_do", f"{PPO}::test_ppo_learns_what_is_rewarded"),
    ),
    # ---- SFT and the reward model
    Mutation(
        "SFT learns the user's words too",
        "stages/sft.py",
        "token if said else IGNORED",
        "token",
        (f"{SFT}::test_the_loss_is_over_the_assistants_tokens_alone",),
    ),
    Mutation(
        "SFT's adapter is left in bfloat16",
        "stages/sft.py",
        "        parameter.data = exact[name]",
        "        pass",
        (f"{SFT}::test_the_adapter_stays_exact_and_in_float32",),
    ),
    Mutation(
        "nobody looks whether packed rows see each other",
        "stages/sft.py",
        "    require_separate_rows(roles, trainer)\n",
        "",
        (f"{SFT}::test_rows_that_would_see_each_other_are_refused",),
    ),
    Mutation(
        "nobody looks whether a stage changed the base",
        "pipeline/base_model.py",
        "    if after != before:",
        "    if False:",
        (f"{SFT}::test_a_base_that_changed_is_refused",),
    ),
    Mutation(
        "the weights are loaded before the data is looked at",
        "stages/sft.py",
        "    split = load_instructions(",
        "    load_base(config.base)\n    split = load_instructions(",
        (f"{SFT}::test_bad_data_is_told_before_the_weights_are_loaded",),
    ),
    Mutation(
        "SFT and reward training go on with a gradient that is not finite",
        "stages/trl_trainer.py",
        "        if not math.isfinite(float(nn.utils.get_total_norm(gradients))):",
        "        if False:",
        (f"{TRL_RESUME}::test_what_is_not_finite_stops_before_the_step",),
    ),
    Mutation(
        "SFT and reward training look at the loss of a step's last microbatch alone",
        "stages/trl_trainer.py",
        "not all(math.isfinite(loss) for loss in losses)",
        "not math.isfinite(losses[-1])",
        (f"{TRL_RESUME}::test_what_is_not_finite_stops_before_the_step",),
    ),
    Mutation(
        "an interrupted SFT run starts anew",
        "stages/trl_training.py",
        "folder = None if checkpoint is None else str(checkpoint.folder)",
        "checkpoint = folder = None",
        (f"{TRL_RESUME}::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",),
    ),
    Mutation(
        "SFT resumes from a checkpoint of other settings",
        "stages/sft.py",
        'open_checkpoints("sft", loaded, run, digest(inputs))',
        'open_checkpoints("sft", loaded, run, "sft")',
        (f"{SFT}::test_a_checkpoint_of_other_settings_is_not_resumed",),
    ),
    Mutation(
        "a resumed training draws other random numbers",
        "stages/trl_trainer.py",
        '            restore_random_states(self._after_step["random"])',
        "            pass",
        (f"{TRL_RESUME}::test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes[sft]",),
    ),
    Mutation(
        "a resumed training forgets its optimizer",
        "stages/trl_trainer.py",
        "            self.optimizer.load_state_dict(optimizer)",
        "            pass",
        (f"{TRL_RESUME}::test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes[sft]",),
    ),
    Mutation(
        "a resumed training forgets the figures since the last line",
        "stages/trl_trainer.py",
        "        self._restore_figures(mine)",
        "        pass",
        (f"{TRL_RESUME}::test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes[sft]",),
    ),
    Mutation(
        "a resumed training forgets the best adapter",
        "stages/trl_trainer.py",
        "            self._best = load_file(folder / _BEST)",
        "            pass",
        (f"{TRL_RESUME}::test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes[best]",),
    ),
    Mutation(
        "what a failed backward pass left in the gradients stays",
        "stages/trl_trainer.py",
        "                parameter.grad = None",
        "                pass",
        (f"{TRL_RESUME}::test_a_microbatch_that_does_not_fit_is_halved",),
    ),
    Mutation(
        "halves of a microbatch of pairs count twice",
        "stages/trl_trainer.py",
        "accumulated / (weight * share)",
        "accumulated / weight",
        (f"{TRL_RESUME}::test_a_microbatch_that_does_not_fit_is_halved[reward-forward]",),
    ),
    Mutation(
        "a resumed training forgets that a microbatch did not fit",
        "stages/trl_trainer.py",
        'min(self._budget.size, mine["microbatch_size"])',
        "self._budget.size",
        (f"{TRL_RESUME}::test_a_microbatch_that_does_not_fit_is_halved",),
    ),
    Mutation(
        "a process of SFT stops alone",
        "stages/interruption.py",
        "bool(world.maximum(float(requested())))",
        "requested()",
        ("tests/stages/test_trl_processes.py::test_processes_stop_together_and_go_on_to_the_same_bytes",),
    ),
    Mutation(
        "SFT and reward training stop without a checkpoint",
        "stages/trl_trainer.py",
        "            self._save(self._after_step)",
        "            pass",
        (f"{TRL_RESUME}::test_a_stage_that_is_asked_to_stop_writes_a_checkpoint",),
    ),
    Mutation(
        "TRL switches the adapter's dropout off",
        "pipeline/trl_options.py",
        'options["disable_dropout"] = config.lora.dropout == 0',
        'options["disable_dropout"] = True',
        (f"{TRL_OPTIONS}::test_the_adapters_dropout_is_kept_in_reward_training",),
    ),
    Mutation(
        "a step's rows are counted for one process",
        "pipeline/trl_options.py",
        "_accumulation_steps(stage, settings, World().size)",
        "_accumulation_steps(stage, settings, 1)",
        (f"{TRL_OPTIONS}::test_settings_reach_trl",),
    ),
    Mutation(
        "the scalar head reads in 16 bits",
        "pipeline/scalar_head.py",
        "return super().forward(hidden.float())",
        "return super().forward(hidden.bfloat16().float())",
        (f"{SCALAR_HEAD}::test_the_head_counts_in_float32_whatever_it_reads",),
    ),
    Mutation(
        "the scalar head starts from another distribution",
        "pipeline/scalar_head.py",
        "std=1.0 / math.sqrt(self.in_features + 1)",
        "std=0.02",
        (f"{SCALAR_HEAD}::test_the_head_starts_small_and_without_an_offset",),
    ),
    Mutation(
        "the reward model attends to padding",
        "pipeline/scalar_head.py",
        "self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)",
        "self.trunk(input_ids=input_ids.flip(1), attention_mask=attention_mask.flip(1), use_cache=False)",
        (f"{SCALAR_HEAD}::test_padding_changes_no_score",),
    ),
    Mutation(
        "nobody looks whether the reward adapter survives saving and loading",
        "stages/reward.py",
        "    require_same_scores(trained_scores,",
        "    print(trained_scores,",
        (f"{REWARD}::test_a_score_that_changes_by_loading_stops_the_stage",),
    ),
    Mutation(
        "the reward stage takes an SFT adapter of another base",
        "stages/reward.py",
        '    require_fitting_parents("reward", config, run, base_identity(config.base, chat, arguments.device))\n',
        "",
        (f"{REWARD}::test_an_sft_adapter_of_another_base_is_refused_before_training",),
    ),
    Mutation(
        "margins are not asked for",
        "stages/reward.py",
        "[margin or 0.0 for margin in margins]",
        "[0.0 for margin in margins]",
        (f"{REWARD}::test_the_loss_is_the_one_in_the_docstring",),
    ),
    Mutation(
        "the bare base answers the calibration prompts",
        "stages/reward.py",
        '"reference" if config.reward.calibrate_on == "sft" else None,',
        "None,",
        (f"{REWARD}::test_calibrated_scores_of_the_sft_policy_have_mean_0_and_variance_1",),
    ),
    Mutation(
        "the reward adapter starts afresh although it should start as SFT's",
        "pipeline/roles.py",
        'result = set_peft_model_state_dict(model, tensors, adapter_name="default")',
        "result = set_peft_model_state_dict(model, {name: 0 * tensor for name, tensor in tensors.items()})",
        (f"{REWARD}::test_it_starts_as_the_sft_policy_or_afresh",),
    ),
    # ---- files
    Mutation(
        "the same adapter is saved as other bytes by another process",
        "pipeline/roles.py",
        "config.target_modules = sorted(config.target_modules or ())",
        "config.target_modules = sorted(config.target_modules or (), reverse=True)",
        (f"{ROLES}::test_load_save_load_keeps_every_bit_of_adapters_and_heads",),
    ),
    Mutation(
        "a number of processes that cannot share a round is accepted",
        "stages/ppo.py",
        "        if number % world.size:",
        "        if False:",
        (f"{PPO}::test_processes_that_cannot_share_evenly_are_refused",),
    ),
    Mutation(
        "figures of a policy that was not trained are reported",
        "stages/update.py",
        'if "policy" not in self.gradient_norms:',
        "if False:",
        (f"{PPO}::test_nothing_is_said_of_a_policy_that_stands_still",),
    ),
    Mutation(
        "a torn checkpoint is resumed from",
        "pipeline/checkpoint.py",
        "            if not torn:\n",
        "            if True:\n",
        (f"{CHECKPOINT}::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",),
    ),
    Mutation(
        "a checkpoint of other settings is resumed from",
        "pipeline/checkpoint.py",
        'if content["inputs_digest"] != self._inputs_digest:',
        "if False:",
        (f"{CHECKPOINT}::test_checkpoints_of_other_inputs_do_not_count",),
    ),
    Mutation(
        "checkpoints of other settings push out new ones",
        "pipeline/checkpoint.py",
        "for old in later + earlier[self._keep_last :]:",
        "for old in list(self._folders())[self._keep_last :]:",
        (f"{CHECKPOINT}::test_later_checkpoints_of_other_inputs_do_not_push_out_new_ones",),
    ),
    Mutation(
        "every process publishes the result",
        "stages/ppo.py",
        "    if world.is_main:\n        extra = {",
        "    if True:\n        extra = {",
        (f"{PROCESSES}::test_a_stage_of_two_processes_has_one_result",),
    ),
    Mutation(
        "the old result goes before the new one is complete",
        "pipeline/run_directory.py",
        "            draft = Path(tempfile.mkdtemp(",
        "            shutil.rmtree(self.stage(name), ignore_errors=True)\n            draft = Path(tempfile.mkdtemp(",
        (f"{RUN_DIRECTORY}::test_a_crash_leaves_the_old_result_and_nothing_else",),
    ),
    Mutation(
        "a result that a kill left half replaced is thrown away",
        "pipeline/run_directory.py",
        "if left.name.endswith(_RETIRED) and not self.stage(name).exists():",
        "if False:",
        (f"{RUN_DIRECTORY}::test_a_result_that_a_kill_left_half_replaced_comes_back",),
    ),
    Mutation(
        "two processes work on one run",
        "pipeline/run_lock.py",
        "held.enter_context(_locked(path, fcntl.LOCK_EX, seconds, warn))",
        "held.enter_context(_locked(path, fcntl.LOCK_SH, seconds, warn))",
        (
            f"{RUN_LOCK}::test_a_second_holder_is_refused_and_told_who_the_first_is",
            "tests/stages/test_one_at_a_time.py::test_a_second_start_is_refused_before_anything_starts",
        ),
    ),
    Mutation(
        "a result is replaced while another stage reads it",
        "pipeline/run_lock.py",
        "for read in reads:\n",
        "for read in ():\n",
        (
            f"{RUN_LOCK}::test_what_is_read_stays_and_may_be_read_by_others",
            "tests/stages/test_one_at_a_time.py::test_a_second_start_is_refused_before_anything_starts",
        ),
    ),
    Mutation(
        "stages side by side: a signal stops one of them",
        "stages/side_by_side.py",
        "            self._processes.add(process)\n",
        "            self._processes = {process}\n",
        ("tests/stages/test_side_by_side.py::test_both_stop_in_order_when_asked",),
    ),
    Mutation(
        "stages side by side: the first that is through gives the device back",
        "stages/side_by_side.py",
        "                self._at_device -= 1\n                if self._at_device == 0:",
        "                self._at_device -= 1\n                if self._at_device <= 1:",
        (
            "tests/stages/test_side_by_side.py"
            "::test_they_wait_for_another_run_together_and_keep_it_out_until_both_are_through",
        ),
    ),
    Mutation(
        "stages side by side: one that waits for the device cannot be stopped",
        "stages/device_lock.py",
        "        between_tries()\n",
        "",
        ("tests/stages/test_side_by_side.py::test_asked_to_stop_they_no_longer_wait_for_the_device",),
    ),
    Mutation(
        "without SFT its policy is asked for the calibration all the same",
        "stages/reward.py",
        '"reference" if config.reward.calibrate_on == "sft" else None',
        '"reference"',
        (f"{REWARD}::test_without_sft_the_bare_base_calibrates",),
    ),
    Mutation(
        "a reward model that takes nothing from SFT is made again when SFT changes",
        "stages/inputs.py",
        'return ("sft",) if config.reward_needs_sft else ()',
        'return ("sft",)',
        ("tests/stages/test_inputs.py::test_a_reward_model_that_takes_nothing_from_sft_stays_when_sft_changes",),
    ),
    Mutation(
        "stages side by side: a stage that fails lets the other go on",
        "flows/tasks.py",
        "    order.beside.stop()\n    try:\n        wait(futures)",
        "    try:\n        wait(futures)",
        ("tests/flows/test_side_by_side.py::test_a_gate_that_one_misses_stops_the_other_in_order",),
    ),
    Mutation(
        "a start tidies away what another stage is writing",
        "pipeline/run_directory.py",
        "                if free:\n                    self._tidy_stage(name)",
        "                self._tidy_stage(name)",
        (f"{RUN_DIRECTORY}::test_a_start_leaves_a_stage_alone_that_somebody_is_at",),
    ),
    Mutation(
        "a stage works without the lock",
        "stages/command.py",
        "with directory.locked(stage, reads=parents, warn=say), writing(directory.root):",
        "with writing(directory.root):",
        ("tests/stages/test_one_at_a_time.py::test_a_second_start_is_refused_before_anything_starts",),
    ),
    Mutation(
        "pickled weights may be loaded",
        "pipeline/base_model.py",
        "            use_safetensors=True,\n",
        "",
        ("tests/test_architecture.py::test_a_model_is_loaded_from_safetensors_or_gguf_alone",),
    ),
    Mutation(
        "an index may name shards anywhere",
        "pipeline/base_source.py",
        "if absent := sorted(named - present):",
        "if absent := []:",
        (f"{BASE}::test_a_base_that_cannot_be_used_is_named",),
    ),
    Mutation(
        "a figure that somebody edited is believed",
        "pipeline/artifacts.py",
        "if checksum != found:",
        "if False:",
        (
            f"{ARTIFACTS}::test_a_figure_that_was_edited_by_hand_is_noticed",
            f"{CHECKPOINT}::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",
        ),
    ),
    Mutation(
        "a link in a stage's folder is followed",
        "pipeline/artifacts.py",
        "if path.is_symlink():",
        "if False:",
        (f"{ARTIFACTS}::test_a_link_is_no_file_of_the_stage",),
    ),
    Mutation(
        "half a line of metrics stays on a full disk",
        "pipeline/metrics.py",
        "                os.ftruncate(self._descriptor, before)\n",
        "",
        (f"{DISK}::test_metrics_on_a_full_disk_keep_their_whole_lines",),
    ),
    Mutation(
        "safetensors may fail in its own words",
        "pipeline/disk.py",
        "except (OSError, SafetensorError) as failure:",
        "except OSError as failure:",
        (f"{DISK}::test_a_limit_on_the_size_of_files_is_told_from_a_full_disk",),
    ),
    Mutation(
        "a part of other inputs is taken for a stage's own",
        "stages/parts.py",
        'if found["inputs_digest"] == self._inputs_digest:',
        "if True:",
        (f"{EVALUATE}::test_parts_of_other_inputs_are_made_again",),
    ),
    Mutation(
        "what an interrupted evaluation has done is done again",
        "stages/parts.py",
        '                return {"part": found["part"]}',
        "                pass",
        (f"{EVALUATE}::test_an_evaluation_that_is_killed_does_nothing_twice",),
    ),
    Mutation(
        "what the disk does not take of a log ends the stage",
        "stages/launch.py",
        "        except OSError as error:\n            if self._complete:",
        "        except ZeroDivisionError as error:\n            if self._complete:",
        ("tests/stages/test_full_disk.py::test_a_log_that_cannot_grow_is_said_once_and_ends_nothing",),
    ),
    Mutation(
        "a source without a row in the mix goes unnoticed",
        "pipeline/datasets.py",
        "        if share == 0:",
        "        if False:",
        ("tests/pipeline/test_datasets.py::test_a_mix_has_the_proportions_of_its_weights",),
    ),
    Mutation(
        "plain-text prompts for a policy that learned conversations go unnoticed",
        "stages/preflight.py",
        "    return list(warnings(instructions, prompts, preferences))",
        "    return []",
        ("tests/stages/test_preflight.py::test_what_is_seldom_meant_is_said_and_does_not_stop_the_run",),
    ),
    Mutation(
        "a config may hold half a surrogate pair",
        "pipeline/config_file.py",
        "    _check_values(tree, str(path))\n",
        "",
        ("tests/pipeline/test_config.py::test_a_broken_file_is_refused",),
    ),
    Mutation(
        "the reward model's calibration does not follow from how its answers were batched",
        "stages/inputs.py",
        'sections["sampling"]["rollout"] = rollout',
        "keys += []",
        ("tests/stages/test_inputs.py::test_a_setting_changes_the_stages_whose_result_follows_from_it",),
    ),
    Mutation(
        "metrics of any form are read",
        "pipeline/metrics.py",
        "        if not _is_row(row):",
        "        if False:",
        ("tests/fuzz/test_state_files.py::test_edited_metrics_are_read_or_refused",),
    ),
    Mutation(
        "a checkpoint's state of any form is read",
        "pipeline/checkpoint.py",
        "if step != int(folder.name) or not isinstance(state, dict):",
        "if False:",
        ("tests/fuzz/test_state_files.py::test_an_edited_checkpoint_is_passed_over",),
    ),
    Mutation(
        "equal policies do not get equal seeds",
        "stages/evaluate.py",
        'seed=(config.seed, "evaluate"),',
        'seed=(config.seed, "evaluate", name),',
        (f"{EVALUATE}::test_equal_policies_tie_everywhere",),
    ),
    # ---- flows
    Mutation(
        "a rate passes its gate with its value instead of its lower bound",
        "flows/gates.py",
        'low = metrics["held_out_accuracy"]["low"]',
        'low = metrics["held_out_accuracy"]["value"]',
        ("tests/flows/test_gates.py::test_the_pessimistic_end_decides",),
    ),
    Mutation(
        "a figure that was not measured passes its gate",
        "flows/gates.py",
        "return math.nan if value is None else",
        "return -math.inf if value is None else",
        ("tests/flows/test_gates.py::test_a_figure_that_is_none_does_not_pass",),
    ),
    Mutation(
        "the override of an unknown key is taken at submission",
        "flows/parameters.py",
        'return rf"^\\s*{_keys(PipelineConfig)}\\s*="',
        'return rf"^\\s*{_keys(PipelineConfig)}"',
        ("tests/flows/test_parameters.py::test_unknown_keys_do_not",),
    ),
    Mutation(
        "a damaged version becomes the current policy",
        "pipeline/registry.py",
        "            for folder in sorted(self._folder(version).iterdir()):\n                read_manifest(folder)\n",
        "",
        ("tests/pipeline/test_registry.py::test_a_damaged_version_does_not_become_current",),
    ),
    Mutation(
        "what is current is known before its copy is complete",
        "pipeline/registry.py",
        "            self._add(run, stages, version)\n",
        "            self._point_to(Event(version, 'promote', _now(), '', digest, {}))\n"
        "            self._add(run, stages, version)\n",
        ("tests/pipeline/test_registry.py::test_a_promotion_killed_before_its_last_step_changes_nothing",),
    ),
    Mutation(
        "the promoted policy is not what PPO starts from",
        "stages/ppo.py",
        'if ppo.start_from == "promoted" else None',
        "if False else None",
        ("tests/stages/test_promoted_start.py",),
    ),
    Mutation(
        "two runs have one device at the same time",
        "stages/device_lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("tests/stages/test_device_lock.py::test_the_second_waits_for_the_first",),
    ),
    Mutation(
        "secrets of the environment get into the log",
        "stages/launch.py",
        "map(hide_secrets, lines)",
        "lines",
        ("tests/stages/test_launch.py::test_a_stage_reports_to_its_parent",),
    ),
    # ---- resume
    Mutation(
        "resume: the optimizer starts anew",
        "stages/training_state.py",
        '        load_optimizer(checkpoint.folder / "optimizer.safetensors", self.optimizer, self.learning)\n',
        "",
        ("tests/resume/test_killed_anywhere.py::test_ppo_killed[before-collect-3]",),
    ),
    Mutation(
        "resume: the KL controller starts anew",
        "stages/training_state.py",
        '        self.kl.load_state_dict(state["kl"])\n',
        "",
        ("tests/resume/test_killed_anywhere.py::test_ppo_killed[before-collect-3]",),
    ),
    Mutation(
        "resume: the best policy so far is forgotten",
        "stages/training_state.py",
        'self.best, self.metrics = state["best"]',
        "self.best, self.metrics = None",
        ("tests/resume/test_killed_anywhere.py::test_ppo_killed[before-collect-3]",),
    ),
    Mutation(
        "resume: an iteration that was begun is begun again on the changed policy",
        "stages/training_state.py",
        "                return Position(iteration, statistics, sampled_by)\n",
        "                return Position(iteration)\n",
        ("tests/resume/test_killed_anywhere.py::test_ppo_asked_to_stop[SIGTERM-before-Updater._step-2]",),
    ),
    Mutation(
        "resume: a rollout that nobody has judged is sampled again",
        "stages/rounds.py",
        "        if self._world.maximum(float(found is None)):\n            sampled = make()",
        "        if True:\n            sampled = make()",
        ("tests/stages/test_training_state.py",),
    ),
    Mutation(
        "resume: a stop waits for the end of the scoring",
        "pipeline/scoring.py",
        "for episode in episodes], max_tokens):\n            roles.between_passes()\n",
        "for episode in episodes], max_tokens):\n",
        (
            "tests/stages/test_training_state.py::test_a_stop_amid_the_scoring_comes_between_two_passes_and_loses_no_rollout",
        ),
    ),
    Mutation(
        "resume: the evaluation forgets what fitted",
        "stages/parts.py",
        '                self.budgets.lower(found["budgets"])\n',
        "",
        (f"{EVALUATE}::test_what_an_evaluation_learned_of_memory_it_knows_after_an_interruption",),
    ),
    Mutation(
        "resume: responses of another policy are taken for this one's",
        "stages/rounds.py",
        'found.state["sampled_by"] != sampled_by or ',
        "",
        ("tests/stages/test_training_state.py",),
    ),
    Mutation(
        "resume: steps of an iteration are made twice",
        "stages/update.py",
        "in minibatches[statistics.steps :]:",
        "in minibatches:",
        ("tests/resume/test_killed_anywhere.py::test_ppo_asked_to_stop[SIGTERM-before-Updater._step-2]",),
    ),
    Mutation(
        "resume: metrics of iterations that are done again stay",
        "stages/ppo.py",
        "            log.truncate_after(position.iteration)\n",
        "",
        ("tests/resume/test_killed_anywhere.py::test_ppo_killed[after-MetricsWriter.write-3]",),
    ),
    Mutation(
        "resume: a stage that is asked to stop writes no checkpoint",
        "stages/ppo.py",
        "                checkpoints.save_unfinished(Position(iteration, statistics, sampled_by), state)\n",
        "",
        ("tests/stages/test_training_state.py",),
    ),
    Mutation(
        "resume: the manifest tells of data that came while the stage ran",
        "stages/result.py",
        "            inputs_digest=digest(inputs),",
        '            inputs_digest=digest(__import__("stages.inputs").inputs.stage_inputs(stage, loaded.config, run)),',
        ("tests/stages/test_ppo.py::test_rows_that_come_while_the_stage_runs_make_it_run_again",),
    ),
    Mutation(
        "resume: that a bound was left is forgotten",
        "stages/ppo.py",
        "    left = bounds_left(position.iteration, state.metrics, ppo)\n",
        "    left: list[str] = []\n",
        ("tests/resume/test_killed_anywhere.py::test_a_run_that_stops_early[before-finish-1]",),
    ),
    Mutation(
        "memory: gradients of a failed microbatch stay",
        "stages/update.py",
        "        self._optimizer.zero_grad(set_to_none=True)\n",
        "",
        ("tests/stages/test_ppo_memory.py",),
    ),
    Mutation(
        "selection: a policy beyond the bound on the KL may be the best",
        "stages/selection.py",
        'if guard.max_kl is not None and not found["held_out/kl"] <= guard.max_kl:',
        "if False:",
        ("tests/stages/test_selection.py",),
    ),
    Mutation(
        "selection: the last policy is published as the best",
        "stages/ppo.py",
        "            checkpoints.restore_best(state)\n",
        "",
        ("tests/stages/test_selection.py",),
    ),
    # ---- the report of a run
    Mutation(
        "report: what data and models say is HTML",
        "flows/report.py",
        "autoescape=True",
        "autoescape=False",
        (f"{REPORT}::test_no_text_becomes_an_element",),
    ),
    Mutation(
        "report: marked answers are not escaped",
        "flows/report_views.py",
        'Markup("<mark>{}</mark>{}").format(said, text[len(said) :])',
        'Markup(f"<mark>{said}</mark>{text[len(said) :]}")',
        (f"{REPORT}::test_no_text_becomes_an_element",),
    ),
    Mutation(
        "report: labels inside pictures are not escaped",
        "flows/pipeline_picture.py",
        "'. ' + escape(stage.reason) if",
        "'. ' + stage.reason if",
        (f"{REPORT}::test_no_text_becomes_an_element",),
    ),
    Mutation(
        "report: gaps are bridged",
        "flows/curves.py",
        "            if run:\n                yield run\n            run = []\n        else:",
        "            pass\n        else:",
        ("tests/flows/test_curves.py::test_a_figure_that_was_not_finite_leaves_a_gap",),
    ),
    Mutation(
        "report: spikes of long curves are dropped",
        "flows/curves.py",
        "chosen = {min(known)[1], max(known)[1]} if known else set()",
        "chosen = {0} if known else set()",
        ("tests/flows/test_curves.py::test_long_curves_are_thinned_and_keep_their_end_and_their_spikes",),
    ),
    Mutation(
        "report: the verdict goes by the value, not by its interval",
        "flows/verdict.py",
        "if self.win_rate.low > 0.5:",
        "if self.win_rate.value > 0.5:",
        ("tests/flows/test_verdict.py::test_the_verdict_is_the_interval_s",),
    ),
    Mutation(
        "report: the reward model decides over gold",
        "flows/verdict.py",
        'order = {"gold": 0, **dict.fromkeys(held_out, 1), "reward_model": 2}',
        'order = {"gold": 1, "reward_model": 0}',
        ("tests/flows/test_verdict.py::test_gold_decides_and_the_others_are_told",),
    ),
    Mutation(
        "report: an independent judge of another mind is not named",
        "flows/verdict.py",
        "independent = [one for one in (first, *others) if one.is_independent]",
        "independent = [one for one in (first,) if one.is_independent]",
        ("tests/flows/test_verdict.py::test_a_judge_of_another_mind_is_named_with_its_figure",),
    ),
    Mutation(
        "report: runs of one name have one curve",
        "flows/report_views.py",
        "compared({view.name: view.state for view in views})",
        "compared({view.state.name: view.state for view in views})",
        (f"{REPORT}::test_curves_of_runs_of_one_name_are_told_apart_however_deep_the_names_are_common",),
    ),
    Mutation(
        "report: score against KL is joined over its gaps",
        "flows/report_charts.py",
        "for row in rows if kl in row and score in row",
        "for row in rows if row.get(kl) is not None and row.get(score) is not None",
        (f"{REPORT}::test_a_round_without_score_or_kl_is_a_gap_in_score_against_kl",),
    ),
    Mutation(
        "report: figures of any size are drawn",
        "flows/curves.py",
        "(x, y) if y is not None and max(abs(x), abs(y)) <= _LARGEST else",
        "(x, y) if y is not None else",
        (
            "tests/flows/test_curves.py::test_figures_too_large_to_be_drawn_are_gaps",
            f"{REPORT}::test_extreme_figures_break_nothing",
        ),
    ),
    Mutation(
        "report: results that were replaced still count",
        "pipeline/run_state.py",
        "if now is not None and now.digest != wanted:",
        "if now is None and wanted:",
        (f"{RUN_STATE}::test_a_stage_made_from_a_result_that_was_replaced_is_outdated",),
    ),
    Mutation(
        "report: a verified stage is never verified again",
        "pipeline/run_state.py",
        "return status.st_size, status.st_mtime_ns",
        "return 0, 0",
        (f"{RUN_STATE}::test_a_file_that_changes_is_verified_again",),
    ),
    Mutation(
        "report: a run that goes on looks interrupted",
        "pipeline/run_lock.py",
        "    except BlockingIOError:\n        return _written_down(path)\n    except OSError:",
        "    except BlockingIOError:\n        return None\n    except OSError:",
        (f"{RUN_STATE}::test_the_stage_whose_process_holds_the_lock_is_going",),
    ),
    Mutation(
        "report: a page that cannot be written ends the run",
        "flows/report.py",
        "        except Exception as error:\n            if not self._complained:",
        "        except ImportError as error:\n            if not self._complained:",
        (f"{REPORT}::test_a_report_that_cannot_be_written_stops_nothing",),
    ),
    Mutation(
        "report: confidence is taken for the wrong answer",
        "pipeline/scored_pairs.py",
        "return max(pair.probability, 1.0 - pair.probability)",
        "return pair.probability",
        ("tests/pipeline/test_scored_pairs.py::test_the_calibration_error_is_its_definition",),
    ),
    Mutation(
        "report: the calibration error weighs bins equally",
        "pipeline/scored_pairs.py",
        "one.accuracy.n / total * abs(",
        "1 / len(bins) * abs(",
        ("tests/pipeline/test_scored_pairs.py::test_the_calibration_error_is_its_definition",),
    ),
    Mutation(
        "judge-pairs: plain text is judged without the template",
        "stages/judge_pairs.py",
        "if conversations and isinstance(pair.prompt, str)",
        "if not conversations and isinstance(pair.prompt, str)",
        (
            f"{JUDGE}::test_plain_text_takes_the_form_that_was_learnt",
            f"{JUDGE}::test_every_pair_is_scored_by_the_run_s_reward_adapter",
        ),
    ),
    Mutation(
        "judge-pairs: half of a file is held back",
        "stages/judge_pairs.py",
        "sorted([*split.train, *split.held_out], key",
        "sorted(split.train, key",
        (f"{JUDGE}::test_rows_files_and_names",),
    ),
    Mutation(
        "terminal: a model's words command the terminal",
        "flows/runs.py",
        'if letter.isprintable() or letter == "\\n")',
        "if letter)",
        ("tests/flows/test_runs.py::test_a_model_cannot_command_the_terminal",),
    ),
    Mutation(
        "terminal: the time left is that of what is done",
        "flows/runs.py",
        "whole * (1 - stage.done) - since",
        "whole * stage.done - since",
        ("tests/flows/test_runs.py::test_the_time_left_is_by_how_fast_the_share_grew_of_late",),
    ),
    Mutation(
        "terminal: a line for every look",
        "flows/runs.py",
        "if news != last and (",
        "if (",
        ("tests/flows/test_runs.py::test_a_line_is_printed_for_news_alone",),
    ),
    # ---- using a run
    Mutation(
        "use: an adapter is loaded without its manifest",
        "pipeline/finished_run.py",
        "adapters[stage] = read_manifest(state.root / stage)",
        "adapters[stage] = read_manifest(state.root / stage, with_files=False)",
        (f"{ANSWER_FILE}::test_an_adapter_that_was_edited_is_refused",),
    ),
    Mutation(
        "use: any base will do",
        "pipeline/finished_run.py",
        "if manifest.base.weights != weights and",
        "if False and",
        (f"{ANSWER_FILE}::test_another_base_is_refused",),
    ),
    Mutation(
        "chat: an answer appears when it is whole",
        "stages/answering.py",
        "        self._chat, self._on_text = chat, on_text",
        "        self._chat, self._on_text, self.add = chat, on_text, self.ids.append",
        (f"{CHAT}::test_a_talk_in_a_terminal",),
    ),
    Mutation(
        "chat: Ctrl-C does not reach the sampling",
        "stages/answering.py",
        "            if is_enough():",
        "            if is_enough() and False:",
        (f"{CHAT}::test_a_talk_in_a_terminal",),
    ),
    Mutation(
        "chat: every speaker hears its neighbour's answer",
        "flows/chat.py",
        "answers.get(who, first)",
        "first",
        (f"{CHAT}::test_what_was_said_is_known_to_all_or_to_each_its_own",),
    ),
    Mutation(
        "generate: an answer depends on its place in the batch",
        "stages/answer_file.py",
        "numbers=[chosen[index][0] for index in batch],",
        "numbers=None,",
        (f"{ANSWER_FILE}::test_the_batch_changes_nothing_and_the_seed_does",),
    ),
    Mutation(
        "generate: all answers to a prompt are the same one",
        "stages/answer_file.py",
        'seed=(order.seed, "generate", number))',
        'seed=(order.seed, "generate"))',
        (f"{ANSWER_FILE}::test_every_prompt_is_answered_by_everyone",),
    ),
    Mutation(
        "generate: what was done is done again",
        "stages/answer_file.py",
        "    try:\n        with _stopping_in_order(), _writing(output):",
        "    shutil.rmtree(kept, ignore_errors=True)\n    try:\n        with _stopping_in_order(), _writing(output):",
        (f"{ANSWER_FILE}::test_an_interrupted_start_goes_on_and_ends_with_the_same_bytes",),
    ),
    Mutation(
        "sampling: temperature 0 draws",
        "pipeline/generation.py",
        "self._greedy, self._temperature = sampling.temperature == 0,",
        "self._greedy, self._temperature = False,",
        ("tests/pipeline/test_generation.py::test_temperature_0_takes_the_likeliest_token_as_transformers_does",),
    ),
    Mutation(
        "export: the adapter is left out of the merged weights",
        "pipeline/plain_model.py",
        "return merged_layer(module, adapter, dtype)",
        "return merged_layer(module, None, dtype)",
        (f"{EXPORT}::test_merged_weights_say_what_the_adapter_says",),
    ),
    Mutation(
        "export: quantized layers of GPT-2 are not turned back",
        "pipeline/plain_model.py",
        'if key == "weight" and name in turned and not isinstance(layer, Conv1D):',
        'if key == "weight" and name in turned and False:',
        (f"{EXPORT}::test_merged_weights_say_what_the_adapter_says",),
    ),
    Mutation(
        "export: weights are quantized again on the grid that they lie on",
        "stages/export.py",
        'if order.form == "requantized":\n        del roles',
        "if False:\n        del roles",
        (f"{EXPORT}::test_quantizing_again_does_not_round_the_adapter_away",),
    ),
    Mutation(
        "export: a tied output head comes along",
        "pipeline/plain_model.py",
        "if head is None or head.weight is not embedding.weight:",
        "if True:",
        (f"{EXPORT}::test_tied_weights_stay_tied",),
    ),
    Mutation(
        "export: a classifier reads its score at the padding",
        "pipeline/plain_model.py",
        "        if token is not None and token not in ends:",
        "        if token is not None:",
        (f"{EXPORT}::test_a_reward_model_becomes_a_classifier",),
    ),
    Mutation(
        "export: another export is taken for this one",
        "stages/export.py",
        'if about.get("identity") != identity:',
        "if False:",
        (f"{EXPORT}::test_what_lies_there_stays",),
    ),
    Mutation(
        "export: an edited export counts as whole",
        "stages/export.py",
        'if about.get("files") != files:',
        "if False:",
        (f"{EXPORT}::test_what_lies_there_stays",),
    ),
    Mutation(
        "export: held-out rows go along",
        "stages/export.py",
        "_NOT_FOR_OTHERS = (MANIFEST, HELD_OUT)",
        "_NOT_FOR_OTHERS = (MANIFEST,)",
        (f"{EXPORT}::test_nothing_of_this_machine_and_no_row_of_the_data_is_in_it",),
    ),
    Mutation(
        "export: agreement is compared with itself",
        "stages/agreement.py",
        "found_TV = _logits_along(model, prompt, answer)",
        "found_TV = wanted_TV",
        (f"{EXPORT}::test_sixteen_bits_and_what_they_change_is_reported",),
    ),
    Mutation(
        "export: everybody sees what was uploaded",
        "flows/hub.py",
        "private=not public",
        "private=False",
        ("tests/flows/test_hub.py::test_the_whole_export_is_uploaded",),
    ),
    # ---- memory and launch
    Mutation(
        "the plan forgets the norms' outputs that adapters read",
        "pipeline/memory_plan.py",
        "return (16 if wide else 12) * shape.width + 4",
        "return (16 if wide else 8) * shape.width + 4",
        ("tests/pipeline/test_memory_plan.py::test_a_layer_keeps_what_the_formula_says",),
    ),
    Mutation(
        "the plan shares the quantization constants under FSDP",
        "pipeline/memory_plan.py",
        '"quantization constants": constant_bytes(shape, self.quantization, double=base.double_quantization),',
        '"quantization constants": constant_bytes(shape, self.quantization, double=base.double_quantization)'
        " // self.device.processes,",
        ("tests/pipeline/test_memory_plan.py::test_fsdp_shares_the_layers_and_nothing_else",),
    ),
    Mutation(
        "the plan forgets that layers are gathered to sample",
        "pipeline/memory_plan.py",
        'return self.layers if self.device.sharding == "fsdp" and small and not self.merged_copy() else 0',
        "return 0",
        (
            "tests/pipeline/test_memory_plan.py::"
            "test_a_base_that_is_shared_out_is_gathered_to_sample_where_it_is_small_beside_the_card",
        ),
    ),
    Mutation(
        "the plan forgets that FSDP loads the whole base first",
        "pipeline/memory_plan.py",
        'if device.sharding == "fsdp":\n            parts[',
        "if False:\n            parts[",
        ("tests/pipeline/test_memory_plan.py::test_weights_of_four_bits_are_whole_before_fsdp_shares_them",),
    ),
    Mutation(
        "changes are proposed that are not needed",
        "pipeline/memory_advice.py",
        "            taken = fewer\n",
        "            pass\n",
        (
            "tests/pipeline/test_memory_advice.py::test_what_is_proposed_does_make_it_fit_and_nothing_of_it_can_be_left_out",
        ),
    ),
    Mutation(
        "a card's name with any memory behind it stands for the card",
        "pipeline/cards.py",
        "0.9 * int(rest[1]) * GIB <= card.memory_bytes <= int(rest[1]) * GIB",
        "True",
        ("tests/pipeline/test_cards.py::test_a_name_that_says_too_little_or_is_wrong_comes_with_the_right_ones",),
    ),
    Mutation(
        "a setting is lowered as far as the search had come",
        "pipeline/memory_advice.py",
        "in reversed(taken[:-1]):",
        "in list(taken[:-1]):",
        ("tests/pipeline/test_memory_advice.py::test_a_setting_is_lowered_no_further_than_it_must",),
    ),
    Mutation(
        "the plan's table shows only what is there while the base loads",
        "flows/plan.py",
        "working = [plan.at(plan.working_moment)",
        "working = [plan.at(plan.peak_moment)",
        ("tests/flows/test_plan.py::test_what_takes_memory_at_work_is_seen_where_loading_decides",),
    ),
    Mutation(
        "a launcher file is told what the section could say",
        "flows/plan.py",
        "launcher_file=launcher_file)",
        "launcher_file=False)",
        ("tests/flows/test_plan.py::test_what_an_own_launcher_file_decides_is_not_proposed",),
    ),
    Mutation(
        "more processes than GPUs are started",
        "stages/launcher_file.py",
        "if gpus and launcher.processes > gpus:",
        "if False:",
        ("tests/stages/test_launcher_file.py::test_more_processes_than_gpus_are_refused",),
    ),
    Mutation(
        "machines wait for each other as long as torch likes",
        "stages/launch.py",
        '        *("--rdzv_conf", f"timeout={math.ceil(launch.timeout)}"),\n',
        "",
        (f"{TWO_MACHINES}::test_a_machine_that_stays_alone_says_so_in_time",),
    ),
    Mutation(
        "what the launcher killed has run out of memory",
        "stages/launch.py",
        "bool(killed - by_launcher)",
        "bool(killed)",
        ("tests/stages/test_launch.py::test_one_that_no_longer_answers_was_not_killed_for_want_of_memory",),
    ),
    Mutation(
        "torchrun is told nothing of FSDP",
        "stages/command.py",
        "        ask_as_accelerate(loaded.config)\n",
        "",
        (f"{TWO_MACHINES}::test_the_torchrun_commands_of_the_docs_run_a_stage_on_both",),
    ),
    Mutation(
        "the log of a machine has the section's rank, whatever its file says",
        "stages/launch.py",
        "run.log(stage, launcher.machine_rank)",
        "run.log(stage, launch.machine_rank)",
        ("tests/stages/test_launcher_file.py::test_the_log_of_a_machine_has_the_rank_that_its_file_gives",),
    ),
    Mutation(
        "processes wait for each other as long as torch likes",
        "stages/command.py",
        "        meet(loaded.config.launch.timeout)\n",
        "        meet(1e6)\n",
        (f"{TWO_MACHINES}::test_a_process_that_no_longer_answers_is_waited_for_only_so_long",),
    ),
    Mutation(
        "what another machine did is told as a fault of gloo",
        "stages/command.py",
        "    return as_lost_process(error) or error\n",
        "    return error\n",
        (f"{TWO_MACHINES}::test_a_process_that_dies_on_one_machine_ends_the_stage_on_both",),
    ),
    Mutation(
        "a stage alone is started whatever its launcher asks for",
        "stages/launch.py",
        "    launcher = require_launchable(loaded.config)\n",
        "    launcher = loaded.config.launch\n",
        ("tests/stages/test_launcher_file.py::test_a_stage_alone_is_refused_before_its_processes_start",),
    ),
    Mutation(
        "what no stage can do is started",
        "stages/launcher_file.py",
        "    if name in _NO_STAGE_CAN:\n",
        "    if False:\n",
        ("tests/stages/test_launcher_file.py::test_what_no_stage_can_do_is_refused",),
    ),
    Mutation(
        "a fault of a launcher file makes it no launcher file",
        "stages/launcher_file.py",
        "    except ConfigError:\n        raise\n",
        "",
        ("tests/stages/test_launcher_file.py::test_what_a_file_cannot_mean_is_named",),
    ),
    Mutation(
        "paging over a base that is shared out is refused only once it is loaded",
        "stages/launcher_file.py",
        '    if launcher.kind == "fsdp":\n        _require',
        "    if False:\n        _require",
        (
            "tests/stages/test_launcher_file.py::"
            "test_paging_over_a_copy_that_is_not_made_is_refused_before_the_base_is_loaded",
        ),
    ),
    Mutation(
        "DeepSpeed's ZeRO-3 keeps the whole base on each GPU",
        "stages/launcher_file.py",
        "zero.stage == 3",
        "zero.stage == 4",
        ("tests/stages/test_launcher_file.py::test_what_a_deepspeed_file_asks_for_is_done_with_pytorchs_own_means",),
    ),
    Mutation(
        "machines are not counted as processes",
        "pipeline/config.py",
        "return self.processes * self.machines",
        "return self.processes",
        ("tests/stages/test_launcher_file.py::test_the_section_says_what_accelerate_understands",),
    ),
    Mutation(
        "under FSDP packed weights stay integers",
        "pipeline/base_model.py",
        'return dtype if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true") else torch.uint8',
        "return torch.uint8",
        ("tests/pipeline/test_base_model.py::test_packed_weights_compute_the_same_whatever_they_are_kept_as",),
    ),
    # ---- judges, yardsticks and trackers
    Mutation(
        "judges: where an answer stands decides",
        "pipeline/endpoint_judge.py",
        "total = points[first] + 1 - points[second]",
        "total = 2 * points[first]",
        (f"{ENDPOINT}::test_a_judge_who_favours_a_position_decides_nothing",),
    ),
    Mutation(
        "judges: an endpoint that repeats the key is quoted",
        "pipeline/endpoint_judge.py",
        'return text.replace(self._key, "<key>") if self._key else text',
        "return text",
        (
            f"{ENDPOINT}::test_a_refused_key_is_not_tried_again_and_again",
            "tests/stages/test_judges.py::test_an_endpoint_judges_and_what_it_did_not_answer_is_said",
        ),
    ),
    Mutation(
        "judges: a redirect takes the key to another host",
        "pipeline/endpoint_judge.py",
        "_OPENER = urllib.request.build_opener(_NoRedirects)",
        "_OPENER = urllib.request.build_opener()",
        (f"{ENDPOINT}::test_the_key_does_not_follow_a_redirect",),
    ),
    Mutation(
        "judges: any refusal of one request ends the asking",
        "pipeline/endpoint_judge.py",
        "if error.code in _LASTING or error.code < 400:",
        "if error.code not in _WORTH_A_RETRY:",
        (f"{ENDPOINT}::test_what_the_endpoint_refuses_of_one_pair_costs_that_pair_alone",),
    ),
    Mutation(
        "judges: the last letter counts, whatever it stands in",
        "pipeline/endpoint_judge.py",
        "marked = concluded or marked or unmarked",
        "marked = {named[-1]}",
        (
            f"{ENDPOINT}::test_the_choice_is_told_from_its_reasons",
            f"{ENDPOINT}::test_a_reply_that_begins_with_one_and_ends_with_the_other_is_asked_for_again",
        ),
    ),
    Mutation(
        "judges: a reply that was cut off counts as if it were whole",
        "pipeline/endpoint_judge.py",
        "if not cut_off:",
        "if named:",
        (f"{ENDPOINT}::test_of_a_reply_that_was_cut_off_only_its_beginning_counts",),
    ),
    Mutation(
        "judges: pauses do not grow",
        "pipeline/endpoint_judge.py",
        "        return 2.0**attempt",
        "        return 1.0",
        (f"{ENDPOINT}::test_a_failure_that_passes_is_waited_for_longer_and_longer",),
    ),
    Mutation(
        "judges: length is not taken out",
        "pipeline/length_control.py",
        "rows = [(math.tanh(gap / scale), outcome)",
        "rows = [(0.0 * gap / scale, outcome)",
        ("tests/pipeline/test_length_control.py::test_a_judge_who_only_likes_length_sees_no_difference",),
    ),
    Mutation(
        "judges: another run's reward model is this run's own",
        "stages/judges.py",
        'make = partial(raw_scores, roles, found, parts.budgets, role="judge")',
        "make = partial(raw_scores, roles, found, parts.budgets)",
        ("tests/stages/test_judges.py::test_another_run_s_reward_model_judges",),
    ),
    Mutation(
        "yardsticks: the worst of n answers is taken",
        "stages/yardsticks.py",
        "return [max(range(start, start + n)",
        "return [min(range(start, start + n)",
        ("tests/stages/test_judges.py::test_the_best_of_n_is_the_best_by_the_reward",),
    ),
    Mutation(
        "data: a share of the rows is no part of their fingerprint",
        "pipeline/datasets.py",
        'content["fraction"] = data_set.fraction',
        "pass",
        (f"{DATASETS}::test_the_fingerprint_follows_what_the_records_follow_from",),
    ),
    Mutation(
        "data: a share after a limit takes the rows with the smallest hashes again",
        "pipeline/datasets.py",
        'return _hash("fraction", item.content), item.row.number',
        "return item.content, item.row.number",
        (f"{DATASETS}::test_a_share_is_an_even_sample_of_every_source_after_a_limit_too",),
    ),
    Mutation(
        "data: a share is taken of the held-out rows too",
        "pipeline/datasets.py",
        "kept = ordered[:count] + held\n",
        "kept = ordered[:count] + held[:count]\n",
        (f"{DATASETS}::test_a_smaller_share_lies_within_a_larger_one_and_the_held_out_rows_stay",),
    ),
    Mutation(
        "learning curve: equal scores count as wrong",
        "pipeline/learning_curve.py",
        "((pair.lead > 0) - (pair.lead < 0))",
        "((pair.lead > 0) - (pair.lead <= 0))",
        (f"{CURVE_POINTS}::test_points_are_compared_on_the_pairs_that_both_have_scored",),
    ),
    Mutation(
        "learning curve: a result that was replaced since is shown as the one that was measured",
        "pipeline/run_state.py",
        "if manifest.digest != share.reward:",
        "if not manifest.digest:",
        (f"{CURVE_POINTS}::test_a_result_that_was_replaced_since_is_no_part_of_the_curve",),
    ),
    Mutation(
        "learning curve: shares of another SFT stand beside the others",
        "flows/learning_curve.py",
        'return read_manifest(share.stage("sft")).digest == read_manifest(run.stage("sft")).digest',
        'return bool(read_manifest(share.stage("sft")).digest)',
        (
            f"{CURVE}::test_shares_of_another_sft_are_no_part_of_it",
            f"{CURVE}::test_the_copy_of_sft_follows_the_run_s",
        ),
    ),
    Mutation(
        "learning curve: a share is trained on all pairs",
        "flows/learning_curve.py",
        'f"{_SETTING}={fraction!r}"',
        'f"{_SETTING}=1"',
        (f"{CURVE}::test_shares_are_trained_once_by_the_real_stage_and_the_run_is_left_as_it_is",),
    ),
    Mutation(
        "lm-eval: scores stand side by side that were not asked alike",
        "pipeline/task_scores.py",
        'str(task.get("examples")),',
        '"None",',
        ("tests/stages/test_lm_tasks.py::test_scores_that_were_asked_alike_stand_side_by_side",),
    ),
    Mutation(
        "statistics: pairs of which none differ look certain",
        "pipeline/statistics.py",
        "variance = (gained + lost + 1) / (n + 2)",
        "variance = (gained + lost) / (n + 2)",
        ("tests/pipeline/test_statistics.py::test_paired_difference_covers_the_truth_as_often_as_it_says",),
    ),
    Mutation(
        "curves: a logarithmic axis is drawn as another one",
        "flows/curves.py",
        "(math.log(x) if self.chart.log_x else x for x in",
        "(x for x in",
        ("tests/flows/test_curves.py::test_equal_factors_are_equally_far_apart_where_the_axis_is_logarithmic",),
    ),
    Mutation(
        "trackers: what an interrupted stage wrote beyond its checkpoint stays",
        "pipeline/trackers.py",
        "purge_step=step + 1",
        "purge_step=None",
        (f"{TRACKERS}::test_a_resumed_stage_shows_no_step_twice",),
    ),
    Mutation(
        "trackers: a tracker that fails ends the training",
        "pipeline/trackers.py",
        "        self._tell(error)\n        return True",
        "        self._tell(error)\n        return False",
        (f"{TRACKERS}::test_a_tracker_that_fails_loses_no_training",),
    ),
    Mutation(
        "held-out answers of iterations that are done again stay",
        "stages/held_out_answers.py",
        "        if int(path.stem) > iteration:\n",
        "        if False:\n",
        ("tests/stages/test_held_out_answers.py::test_answers_of_iterations_that_are_done_again_are_dropped",),
    ),
    Mutation(
        "report: gold stands against the KL itself",
        "flows/report_charts.py",
        "(math.sqrt(max(0.0, float(kl))), gold)",
        "(max(0.0, float(kl)), gold)",
        (f"{REPORT}::test_gold_stands_against_the_square_root_of_kl",),
    ),
    Mutation(
        "held-out answers are kept under other prompts' numbers",
        "stages/selection.py",
        "first = len(prompts) - len(few) + world.rank * len(mine)",
        "first = world.rank * len(mine)",
        ("tests/stages/test_selection.py::test_the_held_out_figures_are_means_over_the_answers",),
    ),
)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and output of pytest in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return -1, "it did not end within ten minutes"
    return done.returncode, done.stdout


def verdict(folder: Path, mutation: Mutation) -> str | None:
    """Apply a mutation and run each of its tests; what is wrong with it, or None where all of them fail."""
    path = folder / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, f"{mutation.file} holds {mutation.old!r} {source.count(mutation.old)} times"
    path.write_text(source.replace(mutation.old, mutation.new))
    try:
        for test in mutation.tests:
            code, output = run_tests(folder, (test,))
            if code != 1:  # pytest: 0 all passed, 1 some failed, above that no test was run
                return f"{test} {'passes' if code == 0 else 'did not run'}\n{output[-1500:] if code else ''}"
    finally:
        path.write_text(source)
    return None


def main(words: str) -> int:
    """Run the table; returns the exit code."""
    chosen = [mutation for mutation in TABLE if words in mutation.what]
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="trivet-mutations-") as temporary:
        folder = Path(temporary) / "trivet"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        tests = tuple(sorted({test for mutation in chosen for test in mutation.tests}))
        code, output = run_tests(folder, tests)
        if code != 0:
            print(f"without any mutation the tests do not pass:\n{output[-3000:]}")
            return 1
        for mutation in chosen:
            problem = verdict(folder, mutation)
            unnoticed += problem is not None
            print(f"{'NOTICED  ' if problem is None else 'UNNOTICED'} {mutation.what}", flush=True)
            if problem is not None:
                print(f"          {problem}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} mutations are noticed")
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
