"""`overdrive generate`: text from a checkpoint of `overdrive train`."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Annotated

import typer

from overdrive import models
from overdrive.cli.flags import count, number, parse_device
from overdrive.cli.train import MOST_SEED
from overdrive.train import CheckpointError, read_model


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="What overdrive train saved, such as delayed.pt.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, count("Bytes to write.", low=0)] = 400,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest byte (greedy).", parser=number(float, 0, 100), metavar="FLOAT")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest that make up this much.", parser=number(float, 0, 1), metavar="FLOAT")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", parser=number(int, 0, MOST_SEED), metavar="INT")] = 0,
    use_cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep keys and values, or compute all bytes anew for each.")
    ] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (the GPU where there is one).")] = None,
) -> None:
    """Write text with a model that `overdrive train` has saved, each byte as it comes."""
    try:
        model = read_model(checkpoint, parse_device(device))
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint="'CHECKPOINT'") from error
    given = prompt.encode("utf-8", "surrogateescape")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several bytes
    sys.stdout.write(decoder.decode(given))
    for byte in models.generate(model, given, tokens, temperature, top_p, seed, use_cache):
        sys.stdout.write(decoder.decode(bytes([byte])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
