"""The verbs of `ejax` as one app."""

from typing import Annotated

import typer

from ejax.cli import answer, choose, measure, train
from ejax.cli.run import keep_programs

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    help="BERT classifiers that stop at the first layer that is sure.",
)
for verbs in (train, answer, measure, choose):
    app.add_typer(verbs.app)


@app.callback(invoke_without_command=True)
def version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib import metadata

        print(f"ejax {metadata.version('ejax')}")
        raise typer.Exit
    keep_programs()
