"""The `trivet` command. Imports lazily, so that help and typing mistakes are answered at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from stages.interruption import EXIT_INTERRUPTED, StoppedInOrder

if TYPE_CHECKING:
    from flows.display import Display
    from pipeline.config_file import LoadedConfig
    from pipeline.progress import ProgressUpdate
    from pipeline.run_directory import StageName

EXIT_USER_ERROR = 2
EXIT_ENDED_AT_ONCE = 130
_GOING_ON = ("run", "sft", "reward", "ppo", "evaluate", "learning-curve", "generate")
"""Commands that keep what they have done when they are cut off."""


class _Commands(typer.core.TyperGroup):
    """Shows errors that a user can put right without a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        from pipeline.errors import StageInterruptedError, TrivetError

        try:
            return super().invoke(ctx)
        except TrivetError as error:
            _print_error(error)
            stopped = isinstance(error, StageInterruptedError)
            raise typer.Exit(EXIT_INTERRUPTED if stopped else EXIT_USER_ERROR) from None
        except StoppedInOrder:
            print("Stopped in order. The same command goes on where this one stopped.", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in _GOING_ON
            more = " The same command goes on where this one stopped." if goes_on else ""
            print(f"Interrupted.{more}", file=sys.stderr)
            raise typer.Exit(EXIT_ENDED_AT_ONCE) from None


app = typer.Typer(
    name="trivet",
    cls=_Commands,
    help="Align a language model with human preferences: SFT, reward model and PPO as LoRA adapters on one base.",
    no_args_is_help=True,
    add_completion=False,
    # For faults of the program a plain traceback is the useful one.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings that replace the file's.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Run again although the finished result is current.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show all settings, the batches and the plan; run nothing.")]


def main() -> None:
    """Entry point of the `trivet` command."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    app(prog_name="trivet")


def _print_version(wanted: bool) -> None:
    if wanted:
        import pipeline

        print(f"trivet {pipeline.__version__}")
        raise typer.Exit


@app.callback()
def _trivet(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def run(config: Config, overrides: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Run the whole job: sft, reward, ppo, evaluate. Stages whose results are current are skipped."""
    loaded = _load(config, overrides)
    if dry_run:
        _print_plan(loaded, _stages(loaded), force=force)
        return
    _run_flow(loaded, force=force)


@app.command()
def sft(config: Config, overrides: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Stage 1: supervised fine-tuning on instructions."""
    _run_stage("sft", _load(config, overrides), force=force, dry_run=dry_run)


@app.command()
def reward(config: Config, overrides: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Stage 2: the reward model on preference pairs."""
    _run_stage("reward", _load(config, overrides), force=force, dry_run=dry_run)


@app.command()
def ppo(config: Config, overrides: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Stage 3: PPO from the SFT adapter against the reward."""
    _run_stage("ppo", _load(config, overrides), force=force, dry_run=dry_run)


@app.command()
def evaluate(config: Config, overrides: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Stage 4: the PPO policy against SFT on held-out prompts."""
    _run_stage("evaluate", _load(config, overrides), force=force, dry_run=dry_run)


@app.command()
def data(config: Config, overrides: Overrides = None) -> None:
    """Show what each data source gives: rows read, kept and dropped, and why. Loads no model."""
    from rich.console import Console

    loaded = _load(config, overrides)
    settings = loaded.config

    from pipeline.base_files import load_tokenizer
    from pipeline.chat import ChatFormat
    from pipeline.data_report import render_reports, warnings
    from pipeline.datasets import load_instructions, load_preferences, load_prompts

    chat = ChatFormat(load_tokenizer(settings.base))
    console = Console()
    instructions = preferences = prompts = None
    if settings.data.instructions.sources:
        instructions = load_instructions(settings.data, chat, settings.sft.max_length)
        console.print(*render_reports("Instructions", instructions), sep="\n")
    if settings.data.preferences.sources:
        preferences = load_preferences(settings.data, chat, settings.reward.max_length)
        console.print(*render_reports("Preferences", preferences), sep="\n")
    if settings.data.prompts.sources:
        prompts = load_prompts(settings.data, chat, settings.ppo.max_prompt_tokens)
        console.print(*render_reports("Prompts", prompts), sep="\n")
    for kind in ("instructions", "preferences", "prompts"):
        if not getattr(settings.data, kind).sources:
            console.print(f"data.{kind}: no sources in the config.", highlight=False)
    for warning in warnings(instructions, prompts, preferences):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/quickstart.", show_default=False),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, or its config.", show_default=False)]


@app.command()
def report(
    folders: Runs,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to. Default: report.html in the run's folder.", show_default=False),
    ] = None,
) -> None:
    """Write the page of a run, or of several beside each other, finished or not: one file, to open in a browser."""
    from flows.report import run_folder, write_report

    print(f"The report: {write_report([run_folder(folder) for folder in folders], output)}")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs lie.", show_default=False)] = Path(
        "runs"
    ),
) -> None:
    """List the runs in a folder (default: runs): which stages are finished, and which policy is better."""
    from rich.console import Console

    from flows.runs import show_runs

    show_runs(folder, Console())


@app.command()
def show(
    folder: Run,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until nothing works on it.")] = False,
) -> None:
    """Show one run: its stages, its key figures, the curves of PPO, and the last answer."""
    from rich.console import Console

    from flows.report import run_folder
    from flows.runs import show_run, watch_run

    (watch_run if watch else show_run)(run_folder(folder), Console())


@app.command(name="judge-pairs")
def judge_pairs(
    config: Config,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE... [key=value]...",
            help="Files of pairs (prompt, chosen, rejected, perhaps subset), or hub ids.",
            show_default=False,
        ),
    ],
    max_length: Annotated[
        int, typer.Option("--max-length", min=8, help="Tokens of prompt and answer; longer pairs are left out.")
    ] = 2048,
) -> None:
    """Judge a run's reward model on further pairs, such as RewardBench: accuracy by subset."""
    from flows.judging import judge_pairs as judge
    from flows.judging import split_arguments
    from pipeline.errors import ConfigError

    pairs, overrides = split_arguments(files)
    if not pairs:
        raise ConfigError("no file of pairs is named", where="judge-pairs", remedy="Name one after the config.")
    loaded = _load(config, overrides)
    with _shown() as display:
        judge(loaded, pairs, max_length, display)


@app.command(name="learning-curve")
def learning_curve(
    config: Config,
    overrides: Overrides = None,
    fractions: Annotated[
        str, typer.Option("--fractions", help="Shares of the training pairs, with commas between them.")
    ] = "0.125,0.25,0.5,1",
) -> None:
    """Train the reward model on growing shares of the pairs: would more of them help? What is current is skipped."""
    from flows.learning_curve import learning_curve as train
    from flows.learning_curve import read_fractions

    shares = read_fractions(fractions)
    loaded = _load(config, overrides)
    with _shown() as display:
        train(loaded, shares, display)


Who = Annotated[
    list[str] | None,
    typer.Option("--who", help="base, sft or policy. Default: the policy, or SFT before it is there."),
]
NewTokens = Annotated[
    int | None,
    typer.Option("--tokens", min=1, help="Tokens of an answer at the most. Default: as evaluated.", show_default=False),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0, help="0 takes the likeliest. Default: as evaluated.", show_default=False),
]
TopP = Annotated[float, typer.Option("--top-p", min=1e-6, max=1, help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample among the k likeliest tokens; 0 is off.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")]
System = Annotated[str | None, typer.Option("--system", help="A system turn before the prompt.", show_default=False)]


@app.command()
def chat(
    folder: Run,
    who: Annotated[
        str | None,
        typer.Option("--who", help="base, sft, policy; both or compare: side by side.", show_default=False),
    ] = None,
    system: System = None,
    tokens: NewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    turns: Annotated[
        bool | None,
        typer.Option("--turns/--plain", help="Turns, or one text. Default: as trained.", show_default=False),
    ] = None,
) -> None:
    """Talk with a run's policies in the terminal, one at a time or side by side."""
    from rich.console import Console

    from flows.chat import ChatSettings, speakers_of
    from flows.chat import chat as talk
    from flows.report import run_folder
    from pipeline.finished_run import open_run

    if who is not None:
        speakers_of(who)
    found = open_run(run_folder(folder))
    settings = ChatSettings(
        who=who or found.speakers[-1],
        max_new_tokens=tokens or found.config.evaluation_max_new_tokens,
        temperature=found.config.evaluation_temperature if temperature is None else temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        system=system,
    )
    talk(found, settings, turns, Console())


@app.command()
def generate(
    folder: Run,
    prompts: Annotated[str, typer.Argument(metavar="INPUT", help="A file of prompts, a hub id, FILE.py:FUNCTION.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file of answers, JSON lines.")],
    who: Who = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Answers to each prompt.")] = 1,
    system: System = None,
    tokens: NewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=1, help="Tokens of a batch, prompts and longest answers.")
    ] = 16_384,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="auto, merged, adapter: as ppo.rollout.weights.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an OUTPUT that is there.")] = False,
) -> None:
    """Answer a file of prompts; the file of answers appears when it is whole. The same command goes on."""
    from flows.generating import generate as answer
    from flows.generating import order_of
    from flows.report import run_folder
    from pipeline.finished_run import open_run

    found = open_run(run_folder(folder))
    order = order_of(
        found,
        who=who or (),
        count=count,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_tokens=batch_tokens,
        weights=weights,
        system=system,
    )
    with _shown() as display:
        answer(found, prompts, output, order, display, force=force)


@app.command(name="lm-eval")
def lm_eval(
    folder: Run,
    tasks: Annotated[str, typer.Option("--tasks", help="Names of tasks, with commas between them.")],
    who: Annotated[
        list[str] | None, typer.Option("--who", help="base, sft or policy; repeatable. Default: all there are.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows of each task, to try it out.", show_default=False)
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option("--fewshot", min=0, help="Examples in each prompt. Default: the task's.", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at once.")] = 8,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder of tasks of your own.", show_default=False)
    ] = None,
) -> None:
    """Score a run's base, SFT and policy on tasks of lm-evaluation-harness, which is an extra."""
    from flows.lm_tasks import lm_eval as score
    from flows.lm_tasks import order_of
    from flows.report import run_folder
    from pipeline.finished_run import open_run
    from stages.lm_tasks import require_harness

    require_harness()
    found = open_run(run_folder(folder))
    order = order_of(
        found,
        tasks=tasks,
        who=who or (),
        limit=limit,
        examples=examples,
        chat=chat,
        batch_size=batch_size,
        include_path=include_path,
    )
    with _shown() as display:
        score(found, order, display)


@app.command()
def export(
    folder: Run,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Whose adapter: sft, reward or ppo.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    form: Annotated[str, typer.Option("--form", help="adapter, merged, requantized or gguf.")] = "adapter",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of merged weights: bfloat16 (default), float16, float32.", show_default=False),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option("--base-name", help="What an adapter calls its base, such as a hub id.", show_default=False),
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option("--converter", help="For gguf: llama.cpp's convert_hf_to_gguf.py.", show_default=False),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload it too.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that is made is public.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another export.")] = False,
) -> None:
    """Make a folder for other programs of an adapter: as it is, merged, merged and quantized, or GGUF."""
    from flows.exporting import export_run, order_of
    from flows.report import run_folder
    from pipeline.finished_run import open_run

    order = order_of(stage, form, dtype, base_name, converter)
    found = open_run(run_folder(folder), (order.stage,))
    with _shown() as display:
        export_run(found, order, output, display, repository=push_to_hub, public=public, force=force)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    card: Annotated[
        str | None, typer.Option("--card", help="Plan for this card, such as 'RTX 4090'.", show_default=False)
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Plan for a card of this size, such as 24GB.", show_default=False)
    ] = None,
    as_data: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """Show how much memory each stage will take, whether it fits, and what would make it fit. Loads no model."""
    import json

    from flows.plan import as_json, examine_memory, plan_lines, side_by_side_lines

    settings = _load(config, overrides).config
    shape, chosen, verdict = examine_memory(settings, card, memory)
    if as_data:
        print(json.dumps(as_json(shape, chosen, verdict), indent=2))
        return
    for line in (*plan_lines(shape, chosen, verdict), *side_by_side_lines(settings, chosen, verdict)):
        print(line)


Note = Annotated[str, typer.Option("--note", help="Why, or by whom; kept in the history.")]


@app.command()
def promote(config: Config, overrides: Overrides = None, note: Note = "") -> None:
    """Make the policy of a finished run that passed its gates the registry's current one."""
    from flows.promotion import describe
    from flows.promotion import promote as promote_run

    event, new = promote_run(_load(config, overrides), note=note)
    print(describe(event, new=new))


@app.command()
def rollback(
    config: Config,
    overrides: Overrides = None,
    to: Annotated[int | None, typer.Option("--to", min=1, help="Version to go back to; the one before.")] = None,
    note: Note = "",
) -> None:
    """Make an earlier version the registry's current one again."""
    from flows.promotion import describe
    from pipeline.registry import Registry

    registry = Registry(_load(config, overrides).config.registry.folder)
    print(describe(registry.rollback(to, note=note)))


@app.command()
def up(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where the page and its API listen.")] = 4200,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many runs go on at once.")] = 1,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--configs", help="A further folder whose configs runs may name; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Keep Prefect's server and a worker running on this machine, with the deployments of prefect.yaml."""
    from flows.up import up as keep_up

    keep_up(port=port, limit=limit, configs=configs or (), say=lambda line: print(line, flush=True))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check that this config loads.", show_default=False)
    ] = None,
) -> None:
    """Check the installation and the machine: versions, devices, bitsandbytes, Prefect, hub access, disk space."""
    from rich.console import Console

    from flows.doctor import examine

    if not examine(config, Console()):
        raise typer.Exit(1)


def _load(config: Path, overrides: list[str] | None) -> LoadedConfig:
    from pipeline.config_file import load_config

    return load_config(config, overrides or ())


def _stages(loaded: LoadedConfig) -> tuple[StageName, ...]:
    from stages.inputs import stages_of

    return stages_of(loaded.config)


def _print_plan(loaded: LoadedConfig, stages: tuple[StageName, ...], *, force: bool) -> None:
    from stages.command import plan
    from stages.preflight import require_good_input

    for line in plan(loaded, stages, force=force):
        print(line)
    require_good_input(loaded, stages)
    print(f"The input of {', '.join(stages)} is good: base, tokenizer, data, functions and TRL's options.")


def _run_stage(stage: StageName, loaded: LoadedConfig, *, force: bool, dry_run: bool) -> None:
    if dry_run:
        _print_plan(loaded, (stage,), force=force)
        return
    from flows.report import kept_up
    from pipeline.run_directory import RunDirectory
    from stages.launch import ensure_stage

    with _shown() as display:
        started, run = datetime.now(UTC), RunDirectory(loaded.config.run_dir)
        with kept_up(run.root, lambda warning: display.line(warning, "yellow")) as report:

            def on_progress(update: ProgressUpdate) -> None:
                display.progress(update)
                report.look()

            ensure_stage(stage, loaded, force=force, on_line=display.line, on_progress=on_progress)
            if stage == "evaluate":  # the last one: what `trivet run` ends with
                from flows.summary import finished_stages, show_summary, write_summary

                show_summary(write_summary(loaded, finished_stages(loaded), started), display.console)
        display.line(f"The report: {run.report}", "dim")


def _run_flow(loaded: LoadedConfig, *, force: bool) -> None:
    from flows.server import find_or_start_server
    from flows.summary import show_summary
    from pipeline.run_directory import RunDirectory

    RunDirectory.open(loaded)  # Not worth starting a server for, if the folder is another run's.
    with _shown() as display:
        display.line("Starting Prefect; the first time this takes a quarter of a minute ...", "dim")
        display.line(find_or_start_server(), "dim")
        # Our handler prints the run's log, in the place of Prefect's.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS", "flows.display.RunLogHandler")
        from flows.rlhf import rlhf

        try:
            summary = rlhf(str(loaded.path), list(loaded.overrides), force)
        except SystemExit:
            # Prefect made exceptions of its own of SIGTERM, and sent the signal again when the flow had ended.
            if StoppedInOrder.happened:
                raise StoppedInOrder from None
            raise
        show_summary(summary, display.console)
        run = RunDirectory(loaded.config.run_dir)
        display.line(f"All figures: {run.summary}")
        display.line(f"The report: {run.report}")


@contextmanager
def _shown() -> Iterator[Display]:
    from rich.console import Console

    from flows.display import Display, showing

    with showing(Display(Console())) as display:
        yield display


def _print_error(error: Exception) -> None:
    from rich.console import Console

    from stages.launch import StageProcessError

    # The last lines of a stage's log have just passed on this screen.
    text = error.summary if isinstance(error, StageProcessError) else str(error)
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that a stage's processes and Prefect's server are ended in order."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
