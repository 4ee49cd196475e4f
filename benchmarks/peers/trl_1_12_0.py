"""One PPO iteration of TRL 1.12.0's PPOTrainer on trivet's workload, timed by phase; writes JSON.

Runs in an environment of its own, made by `benchmarks/peers/side_by_side.py`, which also writes the workload; knows
nothing of trivet. The policy is a LoRA adapter of the same rank on all linear layers, its base is the reference;
reward and value model are classifiers on bases of their own, the value model trained whole, as the trainer does it.

A step is made for each minibatch, as it is in trivet: the trainer's accumulation would wait for all of them.

    python trl_1_12_0.py WORKLOAD.json OUTPUT.json
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Marks the phases of each iteration: sampled, whitened (the end of scoring), stepped."""

    def __init__(self):
        self.rounds = []
        self._marks = [time.monotonic()]
        self._after("batch_generation")
        self._after("masked_whiten")

    def _after(self, name):
        own = getattr(ppo_trainer, name)

        def marked(*arguments, **options):
            result = own(*arguments, **options)
            self._marks.append(time.monotonic())
            return result

        setattr(ppo_trainer, name, marked)

    def on_train_begin(self, *_, **__):
        self._marks = [time.monotonic()]

    def on_step_end(self, *_, **__):
        self._marks.append(time.monotonic())
        start, sampled, scored, stepped = self._marks
        self.rounds.append({"rollout": sampled - start, "score": scored - sampled, "update": stepped - scored})
        self._marks = [stepped]


def trainer_for(workload, folder, clock):
    """The trainer with its models; nothing of the checkpoint's own sampling settings is left."""
    count = len(workload["prompts"])
    bf16 = workload["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(workload["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def classifier():
        model = AutoModelForSequenceClassification.from_pretrained(workload["model"], num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    return PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=count,
            gradient_accumulation_steps=1,
            num_mini_batches=count // workload["minibatch_size"],
            num_ppo_epochs=workload["ppo_epochs"],
            local_rollout_forward_batch_size=count,
            response_length=workload["new_tokens"],
            total_episodes=count * (1 + workload["iterations"]),
            learning_rate=1e-5,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(workload["model"], dtype=torch.float32),
        ref_model=None,
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in workload["prompts"]]),
        eval_dataset=Dataset.from_list([{"input_ids": workload["prompts"][0]}]),
        peft_config=LoraConfig(
            r=workload["lora_rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )


def peak_memory_mb():
    """The process's largest resident size; on a GPU the largest that was allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def main():
    """Command line: see the module's docstring."""
    workload = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(workload, folder, clock)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, as trivet's does
        trainer.train()
    measured = clock.rounds[1:] or clock.rounds

    def median(values):
        return sorted(values)[len(values) // 2]

    seconds = median([sum(found.values()) for found in measured])
    result = {
        "seconds": round(seconds, 2),
        "seconds_per_phase": {
            phase: round(median([found[phase] for found in measured]), 2) for phase in ("rollout", "score", "update")
        },
        "samples_per_second": round(len(workload["prompts"]) / seconds, 3),
        "peak_memory_mb": round(peak_memory_mb()),
        "iterations_measured": workload["iterations"],
        "dtype": workload["dtype"],
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "peft", "accelerate")},
    }
    Path(sys.argv[2]).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
