"""`cada-train`: source, adapt, self-train, ablation, evaluate. Recipes say what, options where."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from cada_deploy.errors import CadaError, UsageError

from . import ablation, processes
from .recipes import Recipe, read_recipe
from .stages import Data, Trained, Workplace, class_set, evaluate

PATH = click.Path(path_type=Path)
Command = Callable[..., Any]


def _shared(command: Command) -> Command:
    options = (
        click.option("--recipe", required=True, help="A TOML file, or the name of one of ours."),
        click.option("--out", type=PATH, required=True, help="Folder for every stage."),
        click.option("--data", type=PATH, default=Path("data"), show_default=True,
                     help="Folder of the data sets: {data} in the recipe."),
        click.option("--seed", type=click.IntRange(min=0), help="In place of the recipe's."),
        click.option("--device", default="cpu", show_default=True, help="cpu or cuda:N."),
        click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True,
                     help="On a CPU; another number changes the last bits."),
        click.option("--deterministic", is_flag=True, help="On a GPU: the same bits, slower."),
        click.option("--quiet", is_flag=True, help="No progress."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cada_train() -> None:
    """Train a segmentation network on labelled source frames and adapt it to unlabelled ones."""


@cada_train.command()
@_shared
def source(**options: Any) -> None:
    """Supervised training on the source. Where every adaptation begins.

    \b
    Example:
      cada-train source --recipe scenes --out runs/
    """
    _with_arms(options, lambda arms: arms.source())


@cada_train.command()
@_shared
def adapt(**options: Any) -> None:
    """Domain-adaptation training: Eq. 5, output and style discriminators.

    \b
    Example:
      cada-train adapt --recipe scenes --out runs/
    """
    _with_arms(options, lambda arms: arms.adapted())


@cada_train.command("self-train")
@click.option("--rounds", type=click.IntRange(min=1), help="In place of the recipe's.")
@_shared
def self_train(rounds: int | None, **options: Any) -> None:
    """Rounds of pseudo labels by cada-deploy and training on them: Eq. 5 with Eq. 6.

    \b
    Example:
      cada-train self-train --recipe scenes --out runs/
    """
    _with_arms(options, lambda arms: arms.self_trained(rounds)[0])


@cada_train.command("ablation")
@click.option("--seeds", default="1,2,3", show_default=True, help="Comma-separated.")
@click.option("--tables", default="2,3", show_default=True, help="Of the paper: 2, 3 or 2,3.")
@click.option("--export", "export_to", type=PATH,
              help="Folder for source-only.onnx and best.onnx of the first seed.")  # fmt: skip
@_shared
def ablation_command(seeds: str, tables: str, export_to: Path | None, **options: Any) -> None:
    """Tables 2 and 3 of the paper on the recipe's data, as Markdown, CSV and a plot.

    \b
    Example:
      cada-train ablation --recipe scenes --seeds 1,2,3,4,5 --out runs/
    """
    with _work(options) as (recipe, work):
        chosen = [_number(seed) for seed in seeds.split(",")]
        rows = ablation.run(recipe, chosen, tables.split(","), work)
        if processes.is_first():
            ablation.write_tables(rows, work.folder)
            click.echo(ablation.markdown(ablation.summary(rows)), nl=False)
        if export_to is not None and processes.is_first():
            ablation.export_models(recipe, chosen[0], rows, work, export_to)


@cada_train.command("evaluate")
@click.argument("checkpoint", type=PATH)
@_shared
def evaluate_command(checkpoint: Path, **options: Any) -> None:
    """IoU of a checkpoint on the recipe's evaluation set.

    \b
    Example:
      cada-train evaluate runs/source-0123456789abcdef/model.safetensors --recipe scenes --out runs/
    """
    with _work(options) as (recipe, work):
        matrix = evaluate(recipe, checkpoint, Data.of(recipe).evaluation, quiet=work.quiet)
        classes = class_set(recipe)
        for name, iou, count in zip(classes.names, matrix.iou, matrix.labelled):
            if count:
                click.echo(f"{name:<16} {100 * iou:6.2f}")
        click.echo(f"{'mean':<16} {100 * matrix.mean_iou:6.2f}")


class _work:
    """The recipe and the place of a command; errors end it as cada-deploy's do."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __enter__(self) -> tuple[Recipe, Workplace]:
        options = self._options
        torch.set_num_threads(options["threads"])
        if options["deterministic"]:
            torch.use_deterministic_algorithms(True)
        changes = {} if options["seed"] is None else {"seed": options["seed"]}
        recipe = read_recipe(options["recipe"], options["data"], **changes)
        self._joined = processes.joined(options["device"])
        device = self._joined.__enter__()
        say: Any = (lambda _: None) if options["quiet"] else (lambda t: click.echo(t, err=True))
        return recipe, Workplace(options["out"], device, options["quiet"], say)

    def __exit__(self, *error: Any) -> None:
        self._joined.__exit__(*error)


def _with_arms(options: dict[str, Any], train: Callable[[ablation.Arms], Trained]) -> None:
    with _work(options) as (recipe, work):
        data = Data.of(recipe)
        trained = train(ablation.Arms(recipe, data, work))
        if processes.is_first():
            click.echo(str(trained.model))
            matrix = evaluate(recipe, trained.model, data.validation, quiet=work.quiet)
            work.say(f"mIoU on the source's validation set: {100 * matrix.mean_iou:.2f} %")


def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise UsageError(f"--seeds: {text!r} is no number; expected such as 1,2,3")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    try:
        cada_train.main(arguments, prog_name="cada-train", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except CadaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
