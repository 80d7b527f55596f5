"""`btx import` and `btx push`: a model of another program comes in, an export goes out."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="fp32", show_default=True,
              help="Dtype of the weights made of a GGUF file; fp32 holds the file's values exactly.")  # fmt: skip
@click.option("--sha256", metavar="HEX", help="Refuse the file unless it has this SHA-256.")
def import_(file: Path, folder: Path, dtype: str, sha256: str | None) -> None:
    """Make a checkpoint folder, for use as a seed or an expert: of a GGUF file its dequantised model, of the folder of
    a model that sees or hears too its language model.
    """
    if file.is_dir():
        from btx.checkpoints.language import import_language_model

        import_language_model(file, folder, say=click.echo)
        return
    from btx.checkpoints.gguf import import_gguf

    import_gguf(file, folder, dtype=dtype, sha256=sha256, say=click.echo)


@click.command()
@click.argument("export", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a repository that only its owners see, if it is not there yet.")
@click.option("--revision", metavar="BRANCH", help="The branch to upload to; default: main.")
def push(export: Path, repository: str, private: bool, revision: str | None) -> None:
    """Upload an export, or what `btx moe` wrote, to the hub, after its files are checked against SHA256SUMS.

    The token is taken from the environment (HF_TOKEN), or from `hf auth login`.
    """
    from btx.checkpoints import hub
    from btx.export.proof import check_sums

    click.echo(f"{check_sums(export)} files are what SHA256SUMS says")
    address = hub.push(export, repository, private=private, revision=revision)
    name = repository.removeprefix(hub.SCHEME)
    click.echo(f"uploaded: {address}\nIts name in a recipe: {hub.SCHEME}{name}{f'@{revision}' if revision else ''}")
