"""The training program, from the text to the trained model."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import state as states
from .._files import replacing
from .._shapes import Tensor
from ..checkpoints import save as save_model
from ..data.text import (
    IGNORED,
    Batch,
    Corpus,
    pack,
    random_batch,
    read_documents,
    split,
    standard_library,
    stream_batch,
)
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..generate import Sampling, generate
from ..models import LanguageModel
from ..timeline import Timeline
from . import checkpoint
from .checkpoint import Progress
from .log import FILE_NAME as LOG_NAME
from .log import Display, LossLog, read_log
from .optimizer import adamw, rate_factor, set_rates
from .options import Options

OPTIONS_NAME = "options.yaml"


def train(options: Options, resume: bool = False) -> Path:
    """Train a language model and return the folder with everything about it.

    The folder holds the model as ``longstate.load`` reads it, ``options.yaml``, ``loss.csv``, ``loss.png``, TensorBoard
    logs, and the checkpoint. An interrupted run goes on with ``resume``; with ``steps`` alone, its numbers are those
    of a run that was never interrupted.

    Args:
        options: What to do.
        resume: Go on with the run in ``options.out``.

    Raises:
        FileExistsError: If the folder is in use and the run is not to be resumed.
        FileNotFoundError: If a text is not there, or there is no run to resume.
        ValueError: If the text, an option or the checkpoint cannot be used, or the loss is not finite.
        ModuleNotFoundError: If the packages of ``longstate[train]`` are not installed.
    """
    out = Path(options.out)
    with Display() as display, closing(_Run(options, resume, display)) as run:
        with _interruptible() as stopped:
            finished = run.go_on(stopped)
        if not finished:
            display.say(f"Stopped after step {run.progress.step:,}. Go on with: longstate train --out {out} --resume")
            return out
        run.plot()
        display.say(f"The model is in {out}, its losses in {out / LOG_NAME} and {out / 'loss.png'}.")
    if options.sample_tokens:
        display.say("A sample:\n")
        print(run.sample())
    return out


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event; a second one ends the process as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread may handle signals
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """A run between two steps: model, optimizer, data and progress."""

    def __init__(self, options: Options, resume: bool, display: Display) -> None:
        self.options, self.display, self.out = options, display, Path(options.out)
        # Everything that a user may have got wrong, or not installed, is looked at before anything is written.
        from ..analysis.curves import save_loss_plot

        self._save_plot = save_loss_plot
        self._check_folder(resume)
        self.tokenizer: Tokenizer = load_tokenizer(options.tokenizer)
        torch.manual_seed(options.seed)
        mlp = None if options.mlp is None else {"hidden": options.mlp}
        self.model = LanguageModel(self.tokenizer.vocab_size, options.d_model, options.layers, mlp)
        self.training, self.validation = self._read_text()
        self._batch(0)
        self.fabric = _fabric(options)
        self.optimizer = adamw(self.model, options.learning_rate, options.weight_decay)
        self.module, self.stepper = self.fabric.setup(self.model, self.optimizer)
        self.module.mark_forward_method("loss")
        self.carried: Any = None
        digest = hashlib.sha256(b"".join(x.tobytes() for x in (*self.training[:2], *self.validation[:2]))).hexdigest()
        self.progress = Progress(text=digest)

        self.out.mkdir(parents=True, exist_ok=True)
        with replacing(self.out / OPTIONS_NAME) as part:
            part.write_text(options.to_yaml(), encoding="utf-8")
        self.tokenizer.save(self.out)
        if resume and (self.out / checkpoint.FILE_NAME).exists():
            like = self.model.initial_state(options.batch_size) if options.carry_state else None
            self.progress, self.carried = checkpoint.load_checkpoint(self.out, self.model, self.optimizer, like)
            if self.progress.text != digest:
                raise ValueError(
                    "--resume: the text is not the one that the run began with. Put it back, or begin a new run."
                )
        self.log = LossLog(self.out / LOG_NAME, self.progress.log_size)
        self._begun = 0.0

    def _check_folder(self, resume: bool) -> None:
        if resume and not (self.out / OPTIONS_NAME).is_file():
            raise FileNotFoundError(f"{self.out}: there is no run to resume. Leave out --resume to begin one.")
        if not resume and self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise FileExistsError(f"{self.out} exists already. Give another --out, or go on with the run: --resume.")

    def _read_text(self) -> tuple[Corpus, Corpus]:
        documents = read_documents(self.options.text) if self.options.text else standard_library()
        source = ", ".join(self.options.text) or "the sources of Python's standard library"
        parts = split(documents, self.options.validation_fraction)
        training, validation = (pack(part, self.tokenizer) for part in parts)
        self.display.say(
            f"Text: {source}: {len(documents):,} documents, {(training.n_bytes + validation.n_bytes) / 1e6:.2f} MB, "
            f"of which {validation.n_bytes / 1e6:.2f} MB are held out."
        )
        return training, validation

    def part_done(self, step: int) -> float:
        """Return the part of the run that is over once this step is taken."""
        by_steps = step / self.options.steps if self.options.steps else 0.0
        by_time = self.progress.elapsed / 60 / self.options.minutes if self.options.minutes else 0.0
        return min(max(by_steps, by_time), 1.0)

    def go_on(self, stopped: threading.Event) -> bool:
        """Train to the end, or until stopped; the last thing is a checkpoint. Return whether the end was reached."""
        options, saved = self.options, time.monotonic()
        self._begun = saved - self.progress.elapsed
        n_parameters = sum(p.numel() for p in self.model.parameters())
        self.display.say(
            f"Model: {options.n_layers} layers ({options.model}), {n_parameters:,} parameters, {self.fabric.device}."
        )
        if not self.progress.step:
            self._save()
        while self.part_done(self.progress.step) < 1 and not stopped.is_set():
            self._step()
            step, part = self.progress.step, self.part_done(self.progress.step)
            validate = step % options.validate_every == 0 or part == 1
            if validate or step % options.log_every == 0:
                self._report(validate, part)
            if time.monotonic() - saved >= options.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        self._save()
        return self.part_done(self.progress.step) == 1

    def _batch(self, step: int) -> Batch:
        o = self.options
        if o.carry_state:
            return stream_batch(self.training, step, o.batch_size, o.context)
        return random_batch(self.training, o.seed, step, o.batch_size, o.context)

    def _loss(self, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        """Return the mean loss in nats per token, and the state."""
        tokens, targets, start = (x.to(self.fabric.device) for x in batch)
        # Most windows hold no document's beginning, and without masks they are quicker.
        timeline = Timeline(start=start) if batch.start.any() else None
        loss, state = self.module.loss(tokens, targets, state, timeline)
        return loss, state

    def _step(self) -> None:
        options, step = self.options, self.progress.step
        set_rates(self.optimizer.param_groups, rate_factor(self.part_done(step + 1), options.warmup))
        loss, state = self._loss(self._batch(step), self.carried)
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.module, self.stepper, max_norm=options.clip, error_if_nonfinite=False)
        self.stepper.step()
        self.stepper.zero_grad()
        if options.carry_state:
            self.carried = states.detach(state)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} at step {step + 1}. Begin again with a smaller --learning-rate.")
        self.progress = self.progress._replace(
            step=step + 1,
            elapsed=time.monotonic() - self._begun,
            loss_sum=self.progress.loss_sum + value,
            loss_count=self.progress.loss_count + 1,
        )

    @torch.no_grad()
    def _validate(self) -> float:
        """Return the loss on the held-out text, in nats per token."""
        o, corpus = self.options, self.validation
        rows = min(o.batch_size, max(len(corpus.tokens) // o.context, 1))
        total, count, state = 0.0, 0, None
        self.module.eval()
        for step in range(max(min(o.validation_tokens, len(corpus.tokens)) // (rows * o.context), 1)):
            batch = stream_batch(corpus, step, rows, o.context)
            loss, state = self._loss(batch, state if o.carry_state else None)
            predicted = int((batch.targets != IGNORED).sum())
            total, count = total + loss.item() * predicted, count + predicted
        self.module.train()
        return total / count

    def _report(self, validate: bool, part: float) -> None:
        """Write a row of the logs and show it."""
        options, progress = self.options, self.progress
        tokens_per_step = options.batch_size * options.context
        train_loss = progress.loss_sum / progress.loss_count
        row: dict[str, int | float] = {
            "step": progress.step,
            "tokens": progress.step * tokens_per_step,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": train_loss,
            "train_bits_per_byte": _bits_per_byte(train_loss, self.training),
        }
        if validate:
            row["validation_loss"] = loss = self._validate()
            row["validation_bits_per_byte"] = _bits_per_byte(loss, self.validation)
        self.log.write(row)
        self.progress = progress._replace(loss_sum=0.0, loss_count=0)
        rate = progress.step * tokens_per_step / progress.elapsed
        self.fabric.log_dict({**row, "tokens_per_second": rate, "minutes": progress.elapsed / 60}, progress.step)
        held_out = f", held out {row['validation_bits_per_byte']:.3f}" if validate else ""
        left = time.strftime("%H:%M:%S", time.gmtime(progress.elapsed * (1 / part - 1)))
        self.display.update(
            part,
            f"step {progress.step:,}  loss {train_loss:.3f}  {row['train_bits_per_byte']:.3f} bits/byte{held_out}  "
            f"{rate:,.0f} tokens/s  {left} left",
            validate,
        )

    def _save(self) -> None:
        self.progress = self.progress._replace(log_size=self.log.sync())
        checkpoint.save_checkpoint(self.out, self.progress, self.model, self.optimizer, self.carried)
        # For others to read; a resumed run reads the checkpoint alone.
        save_model(self.model, self.out)

    def close(self) -> None:
        """Close the logs."""
        self.log.close()
        self.fabric.logger.finalize("success")

    def plot(self) -> None:
        """Draw the losses into the run's folder."""
        self._save_plot(read_log(self.out / LOG_NAME), self.out / "loss.png")

    def sample(self) -> str:
        """Return the beginning of the held-out text, and how the model goes on."""
        prompt = self.tokenizer.decode(self.validation.tokens[:32].tolist())
        self.model.eval()
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=self.options.seed)
        steps = generate(
            self.model, [prompt], tokenizer=self.tokenizer, sampling=sampling, max_tokens=self.options.sample_tokens
        )
        return prompt + "".join(step.text[0] for step in steps)


def _bits_per_byte(loss: float, corpus: Corpus) -> float:
    return loss / math.log(2) / corpus.bytes_per_token


def _fabric(options: Options) -> Any:
    """Return Lightning's Fabric, which sees to device and precision."""
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device is 'cuda', but torch finds no CUDA device here. See `longstate doctor`, or use --device cpu."
        )
    precision: Any = {"float32": "32-true", "bfloat16": "bf16-mixed"}[options.precision]
    logger = TensorBoardLogger(options.out, name="tensorboard", version="")
    return Fabric(accelerator=options.device, devices=1, precision=precision, loggers=logger)
