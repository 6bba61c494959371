"""Ours and other implementations of the same model behind one face: ``prefill`` and ``step`` (used by ``cpu.py``).

``prefill(tokens, last)`` reads tokens ``[b t]`` from the initial state and returns the logits of all of them or of the
last; ``step(token)`` reads one more token ``[b 1]``, after ``restart()`` from the initial state. All of them read the
same weights: a folder written by ``longstate.save(model, folder, family=...)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import longstate

NEEDED = {"transformers": ["transformers"], "mambapy": ["transformers", "mambapy"], "llama.cpp": ["llama_cpp", "gguf"]}
PACKAGES = {"llama_cpp": "llama-cpp-python"}


def missing(peer: str, dtype: str) -> str:
    """Return why a peer cannot be measured; "" if it can."""
    if dtype == "int8" and find_spec("longstate.compression") is None:
        return "not measured: this Longstate has no int8"
    absent = [PACKAGES.get(name, name) for name in NEEDED.get(peer, []) if find_spec(name) is None]
    return f"not measured: {' and '.join(absent)} not installed" if absent else ""


def versions() -> str:
    """Return the versions of everything that takes part."""
    found = []
    for name in ("torch", "transformers", "mambapy", "llama-cpp-python", "gguf"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


class Longstate:
    """Ours."""

    def __init__(self, folder: Path, dtype: str) -> None:
        if dtype == "int8":
            from longstate.compression import quantize

            model = longstate.load_pretrained(folder, dtype=torch.float32)
            self.model = quantize(model.eval(), "int8")
        else:
            self.model = longstate.load_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.restart()

    def restart(self) -> None:
        self.state = None

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor, last: bool) -> torch.Tensor:
        x, _ = self.model.backbone(tokens)
        return self.model.logits(x[:, -1:] if last else x)

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        logits, self.state = self.model(token, self.state)
        return logits


class Transformers:
    """transformers as installed, or with the scan of mambapy."""

    def __init__(self, folder: Path, dtype: str, mambapy: bool = False) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        options = {"use_mambapy": True} if mambapy else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
        self.restart()

    def restart(self) -> None:
        self.state = None

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor, last: bool) -> torch.Tensor:
        return self.model(tokens, logits_to_keep=int(last)).logits

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        output = self.model(token, cache_params=self.state, use_cache=True)
        self.state = output.cache_params
        return output.logits


class LlamaCpp:
    """llama.cpp through its C interface, one sequence."""

    def __init__(self, folder: Path, dtype: str, longest: int) -> None:
        import llama_cpp as api

        file = folder / f"{dtype}.gguf"
        if not file.exists():
            write_gguf(folder, file, dtype)
        self.api = api
        with silent():
            api.llama_backend_init()
            self.model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
            options = api.llama_context_default_params()
            options.n_ctx = options.n_batch = options.n_ubatch = longest
            options.n_threads = options.n_threads_batch = torch.get_num_threads()
            self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp does not open {file}")
        self.batch = api.llama_batch_init(longest, 0, 1)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.restart()

    def restart(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0

    def prefill(self, tokens: torch.Tensor, last: bool) -> torch.Tensor:
        self.restart()
        return self._decode(tokens, last)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self._decode(token, True)

    def _decode(self, tokens: torch.Tensor, last: bool) -> torch.Tensor:
        """Return the logits where llama.cpp keeps them: they are good until the next call."""
        (numbers,) = tokens.tolist()
        batch = self.batch
        batch.n_tokens = len(numbers)
        for i, number in enumerate(numbers):
            batch.token[i], batch.pos[i] = number, self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = not last or i == len(numbers) - 1
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.position += len(numbers)
        shape = (1 if last else len(numbers), self.vocabulary)
        return torch.from_numpy(np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape))[None]


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """Write a Mamba in the layout of transformers as llama.cpp reads it; ``dtype`` is "f32" or "f16"."""
    import gguf

    model = longstate.load_pretrained(folder)
    layer, layers = model.backbone.layers[0].mixer, len(model.backbone.layers)
    writer = gguf.GGUFWriter(file, "mamba")
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("no_vocab")  # numbers in, numbers out
    writer.add_context_length(2**20)
    writer.add_embedding_length(layer.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(layers)
    writer.add_ssm_conv_kernel(layer.conv1d.weight.shape[-1])
    writer.add_ssm_inner_size(layer.d_inner)
    writer.add_ssm_state_size(layer.d_state)
    writer.add_ssm_time_step_rank(layer.dt_rank)
    writer.add_layer_norm_rms_eps(model.config["norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == "lm_head.weight" and model.config["tie_embeddings"]:
            continue
        if name.endswith("A_log"):
            tensor = -torch.exp(tensor)
        elif "conv1d.weight" in name:
            tensor = tensor.squeeze(1)
        # As llama.cpp's own converter chooses: matrices narrow, all else in float32.
        narrow = dtype == "f16" and tensor.ndim == 2 and name.endswith(".weight") and "conv1d" not in name
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(new, (tensor.half() if narrow else tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what native code writes to standard error away."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by one set of names."""
    return {name.replace(".embeddings.", ".embedding."): p for name, p in model.named_parameters()}


def opened(folder: Path, peers: Sequence[tuple[str, str]], longest: int) -> tuple[dict, list[list[str]]]:
    """Return (name, type) → model of those that can be had, and rows that say why others cannot."""
    found, absent = {}, []
    for peer, dtype in peers:
        if why := missing(peer, dtype):
            absent.append([peer, dtype, why])
        elif peer == "Longstate":
            found[peer, dtype] = Longstate(folder, dtype)
        elif peer == "llama.cpp":
            found[peer, dtype] = LlamaCpp(folder, dtype, longest)
        else:
            found[peer, dtype] = Transformers(folder, dtype, mambapy=peer == "mambapy")
    return found, absent


def random_tokens(batch: int, length: int) -> torch.Tensor:
    """Return the same tokens every time."""
    return torch.randint(50280, (batch, length), generator=torch.Generator().manual_seed(1))
