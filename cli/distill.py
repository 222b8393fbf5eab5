"""`infopt distill`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt
from infopt.core.errors import UsageError

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.artifact.read import Artifact
    from infopt.core.reports.schema import Plan, Report


class Loss(StrEnum):
    forward_kl = "forward-kl"
    reverse_kl = "reverse-kl"
    jsd = "jsd"


class Init(StrEnum):
    teacher = "teacher"
    random = "random"


class Precision(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class MedusaTargets(StrEnum):
    greedy = "greedy"
    text = "text"


class MedusaStart(StrEnum):
    least_squares = "least-squares"
    copy_of_head = "copy"


class MedusaProjection(StrEnum):
    shared = "shared"
    own = "own"


def distill(
    model: opt.Model = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="Who teaches.", show_default="MODEL"),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="MODEL|SIZES",
            help="Who learns: a model, or sizes to cut out of the teacher, such as "
            "layers=6,hidden=0.5x,ffn=0.5x,heads=3.",
            show_default="MODEL, where --teacher is another",
        ),
    ] = None,
    student_init: Annotated[
        Init | None,
        typer.Option(
            "--student-init", help="What a cut student begins with.", show_default="teacher"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps.", show_default="1000")
    ] = None,
    loss: Annotated[
        Loss | None,
        typer.Option(
            "--loss", help="Divergence of student and teacher.", show_default="forward-kl"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Of both distributions.", show_default="1"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha",
            help="Share of the divergence in the loss; the rest is cross-entropy with the text.",
            show_default="1",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option("--beta", help="JSD: the teacher's share of the mixture.", show_default="0.5"),
    ] = None,
    hidden_weight: Annotated[
        float | None,
        typer.Option(
            "--hidden-weight", help="Weight of matching hidden states.", show_default="0, off"
        ),
    ] = None,
    attention_weight: Annotated[
        float | None,
        typer.Option(
            "--attention-weight", help="Weight of matching attention maps.", show_default="0, off"
        ),
    ] = None,
    on_policy: Annotated[
        float | None,
        typer.Option(
            "--on-policy",
            metavar="SHARE",
            help="Share of windows that the student goes on writing itself.",
            show_default="0, off",
        ),
    ] = None,
    sequence_level: Annotated[
        bool | None,
        typer.Option(
            "--sequence-level/--no-sequence-level",
            help="Learn from what the teacher goes on writing.",
            show_default="no-sequence-level",
        ),
    ] = None,
    sequence_temperature: Annotated[
        float | None,
        typer.Option(
            "--sequence-temperature",
            help="At which the teacher writes; 0 is greedy.",
            show_default="1",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", help="Compute the teacher once, keep this many likeliest tokens on disk."
        ),
    ] = None,
    medusa_heads: Annotated[
        int | None,
        typer.Option("--medusa-heads", help="Train this many Medusa heads instead of a student."),
    ] = None,
    medusa_layers: Annotated[
        int | None,
        typer.Option("--medusa-layers", help="Residual blocks of a head.", show_default="1"),
    ] = None,
    medusa_targets: Annotated[
        MedusaTargets | None,
        typer.Option(
            "--medusa-targets",
            help="What heads learn to guess: the model's own greedy tokens, or the text's.",
            show_default="greedy",
        ),
    ] = None,
    medusa_projection: Annotated[
        MedusaProjection | None,
        typer.Option(
            "--medusa-projection",
            help="To the vocabulary: the model's, or each head's own.",
            show_default="shared",
        ),
    ] = None,
    medusa_start: Annotated[
        MedusaStart | None,
        typer.Option(
            "--medusa-start",
            help="What an own projection begins as: lm_head after a linear guess at the state "
            "further on, or a copy of lm_head.",
            show_default="least-squares",
        ),
    ] = None,
    medusa_vocabulary: Annotated[
        int | None,
        typer.Option(
            "--medusa-vocabulary",
            help="Own projections choose among this many of the text's commonest tokens.",
            show_default="all",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="At its peak.", show_default="0.0003"),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Tokens of a step.", show_default="4096")
    ] = None,
    micro_tokens: Annotated[
        int | None,
        typer.Option("--micro-tokens", help="Tokens in memory at once.", show_default="1024"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", help="Tokens of a window.", show_default="256"),
    ] = None,
    warm_up: Annotated[
        float | None,
        typer.Option(
            "--warm-up",
            metavar="SHARE",
            help="Steps over which the learning rate rises.",
            show_default="0.05",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option("--weight-decay", help="AdamW's, of matrices.", show_default="0"),
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option("--clip", help="Largest norm of the gradient.", show_default="1"),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option("--precision", help="What the student computes in.", show_default="auto"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Less memory, more time.",
            show_default="no-gradient-checkpointing",
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            "--evaluate-every", help="Steps between looks at held-out text.", show_default="a tenth"
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option("--patience", help="Stop after this many looks without a new best."),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", help="Steps between saved states.", show_default="50"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="What to train on: default, shakespeare, a .txt or .jsonl file, "
            "or hub:NAME[/CONFIG]:SPLIT:COLUMN.",
            show_default="default",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the text through the chat template.",
            show_default="no-chat",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with interrupted work at the last saved step."),
    ] = False,
    recipe: opt.RecipeFile = None,
    output: opt.Output = None,
    device: opt.DeviceOption = None,
    dtype: opt.DTypeOption = None,
    seed: opt.Seed = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Teach a smaller model by a larger one, or train Medusa heads.

    Example: infopt distill --student layers=7 --steps 1000 --output smol-draft
    """
    from infopt.cli.verb import run_verb

    given: dict[str, Any] = {
        "teacher": teacher,
        "student": student,
        "student_init": student_init,
        "steps": steps,
        "loss": loss,
        "temperature": temperature,
        "alpha": alpha,
        "beta": beta,
        "hidden_weight": hidden_weight,
        "attention_weight": attention_weight,
        "on_policy": on_policy,
        "sequence_level": sequence_level,
        "sequence_temperature": sequence_temperature,
        "top_k": top_k,
        "medusa_heads": medusa_heads,
        "medusa_layers": medusa_layers,
        "medusa_targets": medusa_targets,
        "medusa_projection": medusa_projection,
        "medusa_start": medusa_start,
        "medusa_vocabulary": medusa_vocabulary,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "micro_tokens": micro_tokens,
        "sequence_length": sequence_length,
        "warm_up": warm_up,
        "weight_decay": weight_decay,
        "clip": clip,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "save_every": save_every,
        "text": text,
        "chat": chat,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("distill", model, given, common, perform, plan, resume=resume)


def output_of(work: "Work", teacher: "Artifact") -> Path:
    """Where to write if nobody said: a folder here, named for the teacher."""
    heads = work.settings.medusa_heads
    return work.output or Path(f"{teacher.name}-{'student' if heads is None else 'medusa'}")


def models(work: "Work") -> "tuple[Artifact, Artifact | None]":
    """Teacher and student; None where the student is cut out, or is not wanted.

    MODEL is the teacher; where another teacher is named, and no student, it is the student.
    """
    from infopt.core.recipe.distill import shape_of

    settings = work.settings
    teacher = work.artifact if settings.teacher is None else work.open(settings.teacher)
    complete = settings.teacher and (settings.student or settings.medusa_heads)
    if complete and isinstance(work.model, str):
        raise UsageError(
            f"MODEL {work.model!r} is not read: --teacher and the student are named already",
            "leave it out",
        )
    if settings.medusa_heads is not None:
        return teacher, None
    if settings.student is None:
        return teacher, work.artifact
    return teacher, None if shape_of(settings.student) else work.open(settings.student)


def perform(work: "Work") -> "Report":
    """Distill; of several processes (torchrun) the first one leads, and reports."""
    from infopt.core.distillation.distill import distill as door
    from infopt.core.distillation.distill import follow
    from infopt.core.training.devices import rank

    teacher, student = models(work)
    output = output_of(work, teacher)
    if rank() > 0:
        follow(teacher, output, work.settings, student=student)
        raise typer.Exit
    try:
        return door(
            teacher,
            output,
            work.settings,
            student=student,
            resume=work.resume,
            replace=work.replace,
            progress=work.screen.progress,
        )
    except KeyboardInterrupt:
        work.screen.note("what is finished is kept: the same command with --resume goes on")
        raise


def plan(work: "Work") -> "Plan":
    from infopt.core.distillation.plan import plan_distill

    teacher, student = models(work)
    return plan_distill(teacher, work.settings, student=student)
