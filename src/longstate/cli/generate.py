"""``longstate generate``: text from a trained model, and what it has read as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .._errors import check_choice
from ..checkpoints import load_pretrained
from ..checkpoints.published import folder_of
from ..compression import quantize
from ..data.text import read_documents
from ..data.tokenizers import stop_tokens, tokenizer_of
from ..generate import Sampling, generate, load_memory, prompt_tokens, read, save_memory
from ..models import LanguageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": None}  # of the weights when they are read


def command(
    folder: Annotated[str, typer.Argument(help="Folder of a model, published ones too, or of a training run.")],
    prompt: Annotated[str | None, typer.Option(help="Text to write on from.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="File with one prompt a line, answered together.")] = None,
    document: Annotated[str | None, typer.Option(help="Text file to read before the prompts.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts as a user's message, and print the answers alone.")
    ] = False,
    state_in: Annotated[str | None, typer.Option(help="Begin with what was read into this file.")] = None,
    state_out: Annotated[str | None, typer.Option(help="Keep what was read and written in this file.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="The most tokens to write; 0 only reads.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token, 1 the model's probabilities.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from that many most likely tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens with this probability together.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens at least so likely beside the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens seen before become less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be given again.")] = None,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="'float32' or 'bfloat16' weights, or 'int8' ones of linear layers; else as they are."),
    ] = None,
) -> None:
    """Write on from a prompt.

    A long text can be read once and asked about later: keep it with --document and --state-out, and take it up with
    --state-in.
    """
    if dtype is not None:
        check_choice("generate", "dtype", dtype, DTYPES)
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    if prompt is not None and prompts_file is not None:
        raise ValueError("--prompt and --prompts-file both came. Give one of them.")
    prompts = read_documents([prompts_file])[0].splitlines() if prompts_file is not None else [prompt or ""]
    if prompts_file is not None and not all(prompts):
        raise ValueError(f"{prompts_file}: line {prompts.index('') + 1} is empty. Give one prompt a line.")
    if chat and (state_in is not None or document is not None):
        raise ValueError("--chat begins a conversation: it cannot follow --state-in or --document. Leave them out.")
    if chat and prompts == [""]:
        raise ValueError("--chat came without a message. Give --prompt or --prompts-file.")
    text = read_documents([document])[0] if document is not None else None
    if state_out is not None and not Path(state_out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--state-out {state_out}: there is no such folder. Make it first.")

    place = folder_of(folder)
    model = _load(place, device, dtype)
    tokenizer = tokenizer_of(place, model.vocab_size)
    memory = load_memory(model, state_in) if state_in is not None else None
    if text is not None:
        documents = [text] * (1 if memory is None else len(memory.token))
        memory = read(model, prompt_tokens(tokenizer, documents, begin=memory is None), memory)
    if memory is not None and len(prompts) == 1:
        prompts *= len(memory.token)
    asked = [_as_message(place, text) for text in prompts] if chat else prompts
    # A chat template writes itself what a sequence begins with.
    memory = read(model, prompt_tokens(tokenizer, asked, begin=memory is None and not chat), memory)
    steps = generate(
        model,
        tokenizer=tokenizer,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=stop or (),
        stop_tokens=stop_tokens(place),
        memory=memory,
    )
    written = [""] * len(prompts) if chat else list(prompts)
    streams = len(prompts) == 1
    typer.echo(written[0] if streams else "", nl=False)
    for step in steps:
        memory = step.memory
        written = [before + piece for before, piece in zip(written, step.text, strict=True)]
        typer.echo(step.text[0] if streams else "", nl=False)
    typer.echo("" if streams else "\n\n".join(f"[{i}] {text}" for i, text in enumerate(written, 1)))
    if state_out is not None:
        save_memory(memory, model, state_out)


def _load(folder: Path, device: str, dtype: str | None) -> LanguageModel:
    """Read a model, with its weights in a type."""
    model = load_pretrained(folder, device=device, dtype=DTYPES[dtype] if dtype else None).eval()
    return quantize(model) if dtype == "int8" else model


def _as_message(folder: Path, text: str) -> str:
    """Return what the model's chat template makes of a user's message."""
    from ..hf import render_chat  # here, because transformers takes seconds to import

    return render_chat(folder, [{"role": "user", "content": text}])
