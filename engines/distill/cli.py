"""``fourstep distill``: train the demo models stage by stage, judge them, show them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Train a small world of few-step models from nothing, and measure them.",
    no_args_is_help=True,
)
WorkOption = Annotated[Path, typer.Option(help="Folder of samples, checkpoints and parts.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ...; auto: a GPU where there is one.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Fixes every random draw.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's own choice.")]
CompileOption = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile; default: if a compiler is there."),
]
ModelsOption = Annotated[Path, typer.Option(help="Folder of published models.")]
DataOption = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the recipe's samples: a quick trial.")
]
DEFAULT_WORK = Path("distill-work")
# In the order in which they need one another; `stages.py` has the courses and the code.
STAGES = {
    "vae": "the autoencoder: pictures to latents and back",
    "text": "the text encoder: what captions mean",
    "draft": "the teacher's first draft: what goes where",
    "base": "the teacher: many steps, classifier-free guidance",
    "lcm": "the student: 1 to 8 steps, the guidance embedded",
    "decoder": "the decoder again: sharper pictures from the same latents",
    "tiny-vae": "a tiny autoencoder of the same latents: pictures sooner",
    "tiny-decoder": "the tiny decoder again: on what the student draws",
    "lcm-lora": "the same acceleration as a LoRA on the teacher",
    "striped": "a style LoRA: light and dark stripes",
    "checkered": "a style LoRA: a chequered background",
    "motion": "a motion adapter on the student: clips of things that move",
    "critic": "the classifier whose features compare pictures",
}
SHIPPED = Path(__file__).parents[1] / "demo"


def _place(
    work: Path,
    device: str,
    seed: int,
    threads: int,
    compile_: bool | None,
    data_share: float = 1.0,
) -> Any:
    import torch

    from engines.distill.training import Place, TrainingError

    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"--device {device!r} cannot be used: {error}") from error
    has_compiler = shutil.which("g++") is not None or shutil.which("clang++") is not None
    compiles = has_compiler if compile_ is None else compile_
    return Place(work, torch.device(device), seed, compiles, data_share)


def _train(names: list[str], place: Any, changes: dict[str, Any]) -> None:
    from engines.distill.stages import run_stage

    for name in names:
        typer.echo(f"{name}: {STAGES[name]}", err=True)
        if not run_stage(name, place, changes):
            typer.echo(f"{name}: finished before, kept", err=True)


@app.command("all")
def train_all(
    work: WorkOption = DEFAULT_WORK,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    compile_: CompileOption = None,
    data_share: DataOption = 1.0,
) -> None:
    """Train every stage in order; a killed run goes on where it was."""
    _train(list(STAGES), _place(work, device, seed, threads, compile_, data_share), {})


def _command(name: str) -> Callable[..., None]:
    def train_one(
        work: WorkOption = DEFAULT_WORK,
        device: DeviceOption = "auto",
        seed: SeedOption = 0,
        threads: ThreadsOption = 0,
        compile_: CompileOption = None,
        data_share: DataOption = 1.0,
        num_steps: Annotated[int | None, typer.Option(min=1, help="Not the recipe's.")] = None,
        batch_size: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
        learning_rate: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    ) -> None:
        if learning_rate is not None and not 0 < learning_rate < 1:
            raise typer.BadParameter(f"--learning-rate is {learning_rate:g}; use 0 < rate < 1")
        options: dict[str, float | None] = {"num_steps": num_steps, "batch_size": batch_size}
        options |= {"learning_rate": learning_rate}
        changes = {key: value for key, value in options.items() if value is not None}
        _train([name], _place(work, device, seed, threads, compile_, data_share), changes)

    return train_one


for _name, _about in STAGES.items():
    app.command(_name, help=f"Train {_about}.")(_command(_name))


@app.command()
def publish(
    out: Annotated[Path, typer.Option(help="Folder of the models.")],
    work: WorkOption = DEFAULT_WORK,
) -> None:
    """Assemble what is trained into diffusers folders, float16."""
    from engines.distill.publish import publish as assemble

    for name in assemble(work, out):
        typer.echo(f"{out / name}")


@app.command()
def evaluate(
    models: ModelsOption = SHIPPED,
    num_prompts: Annotated[int, typer.Option(min=32, help="Half of them held out.")] = 256,
    only: Annotated[str, typer.Option(help="Models whose name contains this.")] = "",
    max_steps: Annotated[int, typer.Option(min=1, help="Leave slower rows out.")] = 50,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    seed: SeedOption = 1,
) -> None:
    """Print the table of accuracies as Markdown, from published weights."""
    from engines.distill.evaluate import Exam, contestants_of, examine, table
    from engines.distill.stages import load_critic

    place = _place(models, device, seed, threads, False)
    rows = [c for c in contestants_of(models) if only in c.name and c.num_steps <= max_steps]
    if not rows:
        raise typer.BadParameter(f"--models {models} has no model whose name contains {only!r}")
    exam = Exam.of(num_prompts, seed)
    scores = examine(models, rows, exam, load_critic(models / "critic"), place.device)
    typer.echo(table(scores), nl=False)


@app.command()
def evaluate_motion(
    models: ModelsOption = SHIPPED,
    num_prompts: Annotated[int, typer.Option(min=7, help="Half of them held out.")] = 84,
    max_steps: Annotated[int, typer.Option(min=1, help="Leave slower rows out.")] = 8,
    threads: ThreadsOption = 0,
    seed: SeedOption = 1,
) -> None:
    """Print the table of how things move in clips as Markdown, from published weights."""
    from engines.distill.clips import ClipExam, examine, table

    _place(models, "cpu", seed, threads, False)
    typer.echo(table(examine(models, ClipExam.of(num_prompts, seed), max_steps)), nl=False)


@app.command()
def sheet(
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG file to write.")],
    models: ModelsOption = SHIPPED,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    seed: SeedOption = 1,
) -> None:
    """Draw the contact sheet: rows are steps, then LoRAs; columns are prompts."""
    from engines.distill.evaluate import contestants_of
    from engines.distill.sheet import draw_sheet

    place = _place(models, device, seed, threads, False)
    all_rows = contestants_of(models)
    rows = [c for c in all_rows if c.model == "demo-lcm" and c.guidance_scale == 3]
    rows += [c for c in all_rows if c.num_steps == 4 and any(weight for _, weight in c.loras)]
    partial = out.with_name(f".{out.name}.partial")
    draw_sheet(models, rows, place.device, seed).save(partial, "PNG", optimize=True)
    partial.replace(out)
    typer.echo(f"{out}")
