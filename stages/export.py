"""A finished adapter as a folder for other programs: as it is, merged, merged and quantized again, or as GGUF.

    adapter       the adapter's own files, which PEFT reads on the base
    merged        all weights in 16 bits (or 32), which transformers reads alone
    requantized   the same in bitsandbytes' NF4
    gguf          the same by llama.cpp's converter, in its own program

The folder is made beside its place and renamed when it is whole. What is not the adapter itself is compared with it,
see `stages.agreement`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pipeline
from pipeline.artifacts import Manifest, digest, folder_files, seal, unseal
from pipeline.disk import writing
from pipeline.errors import ArtifactError, OutputError
from pipeline.finished_run import FinishedRun
from pipeline.progress import say
from pipeline.run_directory import MANIFEST, StageName, read_json, replace_folder, sync_tree, write_json
from pipeline.scored_pairs import HELD_OUT

if TYPE_CHECKING:
    import torch

    from pipeline.roles import Role, Roles
    from stages.agreement import PolicyAgreement, RewardAgreement

Form = Literal["adapter", "merged", "requantized", "gguf"]
FORMS: tuple[Form, ...] = get_args(Form)
Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
EXPORT = "trivet_export.json"
"""In the folder of every export: what it is, where it comes from, and the digest of each file."""

_OUTTYPES: Mapping[Dtype, str] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "convert_hf_to_gguf")
_NOT_FOR_OTHERS = (MANIFEST, HELD_OUT)
"""Files of a stage that hold paths of this machine or rows of the data."""


@dataclass(frozen=True)
class ExportOrder:
    """What is wanted. `base_name` is what an exported adapter calls its base; None: what the run calls it.

    `converter` is llama.cpp's program, for gguf.
    """

    stage: StageName
    form: Form
    dtype: Dtype
    base_name: str | None = None
    converter: Path | None = None


@dataclass(frozen=True)
class Made:
    """An export that is whole: its content, and whether it was there before."""

    folder: Path
    about: Mapping[str, Any]
    is_new: bool


def require_possible(found: FinishedRun, order: ExportOrder) -> None:
    """Refuse what the stage's adapter cannot become, before anything is loaded.

    Raises:
        ArtifactError: the stage is not finished.
        OutputError: there is no such form of it.
    """
    if order.stage == "reward" and order.form == "gguf":
        raise OutputError(
            "a reward model has a scalar head, for which there is no place in a GGUF file",
            where="--form gguf",
            remedy="Export it with --form merged, as a sequence classifier of transformers, or with --form adapter.",
        )
    if order.base_name is not None and order.form != "adapter":
        raise OutputError(
            "only an adapter names a base; the other forms hold it", where="--base-name", remedy="Leave it out."
        )


def find_converter(named: Path | None) -> Path:
    """llama.cpp's program that writes GGUF files.

    Args:
        named: where it lies, or the folder of llama.cpp that it lies in. None: it is looked for in the folder that
            LLAMA_CPP names, and on the path.

    Raises:
        OutputError: it is not there.
    """
    folder = os.environ.get("LLAMA_CPP")
    for place in (named, Path(folder) if folder else None):
        for path in (place, place / _CONVERTERS[0]) if place is not None else ():
            if path.is_file():
                return path.resolve()
    on_path = next(filter(None, map(shutil.which, _CONVERTERS)), None)
    if named is None and on_path is not None:
        return Path(on_path)
    raise OutputError(
        "llama.cpp's converter is not there" if named is not None else "llama.cpp's converter is not installed",
        where=str(named or "--form gguf"),
        remedy="Name it with --converter llama.cpp/convert_hf_to_gguf.py, or its folder with LLAMA_CPP=...;"
        " git clone https://github.com/ggml-org/llama.cpp has it.",
    )


def find_made(folder: Path, identity: str) -> Mapping[str, Any] | None:
    """What an earlier export left in a folder, if it is this one and whole. None where the folder is not there.

    Raises:
        OutputError: something else lies there, or the export was changed since.
    """
    if not folder.exists():
        return None
    remedy = "Name another folder, or replace the old export with --force."
    try:
        about = unseal(read_json(folder / EXPORT), folder / EXPORT, remedy)
        files = folder_files(folder, besides=EXPORT)
    except (OSError, ValueError):
        raise OutputError(
            "something else lies there, which is no export of trivet",
            where=str(folder),
            remedy="Name a folder that does not exist.",
        ) from None
    if about.get("identity") != identity:
        raise OutputError("another export lies there", where=str(folder), remedy=remedy)
    if about.get("files") != files:
        raise OutputError("the export that lies there was changed since", where=str(folder), remedy=remedy)
    return about


def identity_of(found: FinishedRun, order: ExportOrder) -> str:
    """What an export follows from; two of the same identity are the same export."""
    wanted = {"form": order.form, "base_name": order.base_name}
    wanted |= {} if order.form == "adapter" else {"dtype": order.dtype}
    return digest({"adapter": found.adapters[order.stage].digest, "version": pipeline.__version__} | wanted)


def export(
    found: FinishedRun,
    order: ExportOrder,
    folder: Path,
    write_card: Callable[[Path, Mapping[str, Any], list[str]], None],
    *,
    force: bool,
) -> Made:
    """Make the export, unless it is there.

    Args:
        found: the run, with the stage finished.
        order: what is wanted.
        folder: where to; it must not exist, or hold an export.
        write_card: writes the model card into a folder, given what the export is and the comparison in words.
        force: replace another export.

    Raises:
        OutputError: the form is not possible, the place is taken, or the disk does not take it.
        DataError: there is nothing to compare the exported model by.
    """
    require_possible(found, order)
    identity = identity_of(found, order)
    if not (force and (folder / EXPORT).is_file()):
        about = find_made(folder, identity)
        if about is not None:
            return Made(folder, about, is_new=False)
    with _draft(folder) as draft:
        compared = _make(found, order, draft)
        lines = compared.lines() if compared is not None else []
        about = _about(found, order, identity) | {"agreement": compared.as_dict() if compared is not None else None}
        write_card(draft, about, lines)
        about = about | {"files": folder_files(draft, besides=EXPORT)}
        write_json(draft / EXPORT, seal(about))
    return Made(folder, about, is_new=True)


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A folder that takes its place when the block ends without an error; nothing is left of it otherwise."""
    with writing(folder, error=OutputError, elsewhere="name another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield draft
            for path in draft.iterdir():
                path.chmod(0o644)  # safetensors keeps what it writes to itself
            sync_tree(draft)
            draft.chmod(0o755)
            replace_folder(folder, draft, draft.with_name(f"{draft.name}-replaced"))
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _about(found: FinishedRun, order: ExportOrder, identity: str) -> dict[str, Any]:
    manifest = found.adapters[order.stage]
    return {
        "identity": identity,
        "stage": order.stage,
        "role": manifest.role,
        "form": order.form,
        "dtype": None if order.form == "adapter" else order.dtype,
        "adapter": manifest.digest,
        "base": {key: value for key, value in asdict(manifest.base).items() if key != "model"},
        "parents": dict(manifest.parents),
        "inputs_digest": manifest.inputs_digest,
        "data": dict(manifest.inputs.get("data") or {}),
        "reward_gain": manifest.reward_gain,
        "reward_bias": manifest.reward_bias,
        "code_version": manifest.code_version,
    }


# ---- the forms


def _make(found: FinishedRun, order: ExportOrder, draft: Path) -> PolicyAgreement | RewardAgreement | None:
    if order.form == "adapter":
        _copy_adapter(found, order, draft)
        return None
    converter = find_converter(order.converter) if order.form == "gguf" else None
    return _make_model(found, order, draft, converter)


def _copy_adapter(found: FinishedRun, order: ExportOrder, draft: Path) -> None:
    """The adapter's files byte for byte, but for the name of its base where another is wanted; and the tokenizer."""
    from pipeline.base_files import load_tokenizer

    source, manifest = found.run.stage(order.stage), found.adapters[order.stage]
    for name in manifest.files:
        if "/" not in name and name not in _NOT_FOR_OTHERS:
            shutil.copyfile(source / name, draft / name)
    _require_same_files(manifest, draft)
    if order.base_name is not None:
        config = read_json(draft / "adapter_config.json")
        write_json(draft / "adapter_config.json", config | {"base_model_name_or_path": order.base_name})
    load_tokenizer(found.base).save_pretrained(draft)


def _require_same_files(manifest: Manifest, draft: Path) -> None:
    for name, found in folder_files(draft).items():
        if manifest.files[name] != found:
            raise ArtifactError("a file changed while it was copied", where=name, remedy="Export again.")


def _make_model(
    found: FinishedRun, order: ExportOrder, draft: Path, converter: Path | None
) -> PolicyAgreement | RewardAgreement:
    import torch

    from pipeline.memory_budget import release_memory
    from pipeline.plain_model import save_merged
    from stages import agreement
    from stages.command import quiet

    quiet()
    dtype: torch.dtype = getattr(torch, order.dtype)
    roles, role = _loaded(found, order.stage)
    device, eos = roles.device, roles.base.chat.eos_token_id
    say("Asking the adapter ...")
    if order.stage == "reward":
        wanted: Any = agreement.scores_of_adapter(found, roles)
    else:
        wanted = agreement.answers_of_adapter(roles, role, agreement.comparison_prompts(found, roles))
    if order.form == "requantized":
        del roles
        release_memory()
        roles = _on_unquantized_base(found, order.stage, role)
    say("Merging ...")
    merged = draft / "merged" if order.form in ("requantized", "gguf") else draft
    save_merged(roles, role, dtype, merged)
    del roles  # base and exported model need not fit beside each other
    release_memory()
    if order.form == "merged":
        model = _reload(draft, dtype, device, order)
    else:
        model = _convert(found, order, merged, draft, dtype, device, converter)
        shutil.rmtree(merged)
    say("Comparing the exported model with the adapter ...")
    if order.stage == "reward":
        return agreement.compare_reward(wanted, model)
    return agreement.compare_policy(wanted, model, eos)


def _loaded(found: FinishedRun, stage: StageName) -> tuple[Roles, Role]:
    from pipeline.base_model import load_base
    from pipeline.roles import Roles

    roles = Roles(load_base(found.base))
    role: Role = "reward" if stage == "reward" else "policy"
    roles.add_from(role, found.run.stage(stage))
    roles.set_trainable()
    roles.disable_dropout()
    roles.inference_mode()
    return roles, role


def _on_unquantized_base(found: FinishedRun, stage: StageName, role: Role) -> Roles:
    """The adapter on the base before it was quantized, to be merged and quantized again.

    Dequantized weights lie on the grid that they would be rounded to, and an adapter's change is smaller than its
    steps: rounding would take nearly all of it back. Added to the weights before quantization, it moves as many of
    them over to the next step as it is large.
    """
    from pipeline.base_model import load_base
    from pipeline.roles import Roles

    roles = Roles(load_base(found.base.model_copy(update={"quantization": "none"})))
    roles.add_weights(role, found.run.stage(stage))  # `_loaded` has verified that it belongs to this base
    roles.set_trainable()
    return roles


def _reload(folder: Path, dtype: torch.dtype, device: torch.device, order: ExportOrder) -> Any:
    from pipeline.plain_model import load_plain

    return load_plain(folder, dtype, device, classifier=order.stage == "reward")


def _convert(
    found: FinishedRun,
    order: ExportOrder,
    merged: Path,
    draft: Path,
    dtype: torch.dtype,
    device: torch.device,
    converter: Path | None,
) -> Any:
    """From a merged checkpoint to one of the forms made of it; returns the model as it is loaded from there."""
    if converter is not None:
        file = draft / f"{found.state.name}-{order.stage}-{_OUTTYPES[order.dtype]}.gguf"
        say("Converting to GGUF ...")
        convert_to_gguf(converter, merged, file, order.dtype)
        from pipeline.base_files import read_gguf_model

        return read_gguf_model(file).to(device).eval()
    from pipeline.plain_model import save_requantized

    say("Quantizing ...")
    classifier = order.stage == "reward"
    double = found.base.double_quantization
    save_requantized(merged, dtype, device, double=double, classifier=classifier, folder=draft)
    for path in merged.iterdir():  # the tokenizer
        if path.suffix != ".safetensors" and not (draft / path.name).exists() and "index" not in path.name:
            shutil.copyfile(path, draft / path.name)
    return _reload(draft, dtype, device, order)


def convert_to_gguf(converter: Path, merged: Path, file: Path, dtype: Dtype) -> None:
    """Run llama.cpp's converter.

    Raises:
        OutputError: it fails, or writes no file; with the last lines that it printed.
    """
    program = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    command = [*program, str(merged), "--outfile", str(file), "--outtype", _OUTTYPES[dtype]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not file.is_file():
        last = "\n".join(done.stdout.strip().splitlines()[-6:]) or "it printed nothing"
        wrote = "a file" if file.is_file() else "no file"
        raise OutputError(
            f"llama.cpp's converter ended with code {done.returncode} and {wrote}:\n{last}",
            where=str(converter),
            remedy="It may not know this architecture; a newer llama.cpp may. --form merged needs no converter.",
        )
