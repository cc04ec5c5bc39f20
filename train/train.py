"""Train the ACT policy straight from rosbags.

    python train/train.py                                   # reads train/config.yaml
    python train/train.py --config my.yaml training.steps=20000 data.fps=15
    python train/train.py --dry-run                         # reads and caches every bag, reports, does not train

Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", arXiv:2304.13705.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from act_model import ACT, act_loss, load_imagenet_weights
from checkpoint import TrainingState
from config import Config, Training, dump, load
from dataset import Batch, Dataset, batches, load_dataset
from faults import Fault, told_plainly
from normalize import Normalizer

FIGURES = ("loss", "l1", "kl", "grad_norm")
VALIDATION_SAMPLES = 512  # spread evenly over the held-out ticks


def train(config: Config, dataset: Dataset) -> Path:
    """Run the optimisation from the newest checkpoint, or from nothing, to the last step; the last checkpoint."""
    settings = config.training
    device = torch.device(_device(settings.device))
    torch.set_float32_matmul_precision(settings.matmul_precision)
    torch.manual_seed(settings.seed)
    normalizer = dataset.normalizer().to(device)
    state = _start(config, dataset, device)
    model, optimizer, window = state.model, state.optimizer, state.window
    precision = _precision(settings.precision, device)
    log = Log(config.output_dir, state.step)
    last = checkpoint.newest_checkpoint(config.output_dir)

    with (
        _stop_signals() as stopped,
        tqdm(total=settings.steps, initial=state.step, unit="step", desc="training") as bar,
    ):
        for step, batch in enumerate(log.waiting(batches(dataset.train, config, state.step)), state.step + 1):
            loss, figures = _loss(model, normalizer, batch.to(device), config, precision)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip_norm or math.inf)
            _set_rates(optimizer, settings, step)
            optimizer.step()
            window.append(torch.stack([*figures, norm]).detach())

            ending = step == settings.steps or bool(stopped)
            saving = ending or step % settings.save_every == 0
            if saving or step % settings.log_every == 0:
                means = _means(window, step)
                if step % settings.log_every == 0:
                    log.line(step, means | {"lr": optimizer.param_groups[0]["lr"]} | log.rates(step))
                    window.clear()
                bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
            if dataset.validation.names and (step % settings.evaluate_every == 0 or step == settings.steps):
                with log.paused():
                    log.line(step, {"validation_l1": validate(model, normalizer, dataset, config, precision)})
            if saving:
                with log.paused():
                    last = checkpoint.save(TrainingState(step, model, optimizer, window), normalizer, config, dataset)
            bar.update()
            if stopped:
                log.close()
                raise SystemExit(f"stopped at step {step}; the same command goes on from {last}")
    log.close()
    assert last is not None
    return last


def _loss(
    model: ACT, normalizer: Normalizer, batch: Batch, config: Config, precision: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch, and the loss, its L1 and its KL term for the log."""
    action = normalizer.action.normalize(batch.action)
    with torch.autocast(batch.state.device.type, precision, enabled=precision != torch.float32):
        output = model(
            normalizer.state.normalize(batch.state), normalizer.images(batch.images), action, batch.action_is_pad
        )
    loss, l1, kl = act_loss(output, action, batch.action_is_pad, config.model.kl_weight)
    return loss, [loss, l1, kl]


@torch.no_grad()
def validate(model: ACT, normalizer: Normalizer, dataset: Dataset, config: Config, precision: torch.dtype) -> float:
    """Mean L1 over held-out chunks, in standard deviations, without the style latent: as the robot will run it."""
    model.eval()
    device = normalizer.state.mean.device
    ticks = (
        torch.linspace(0, len(dataset.validation.state) - 1, min(VALIDATION_SAMPLES, len(dataset.validation.state)))
        .round()
        .long()
    )
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for chosen in ticks.split(config.training.batch_size):
        batch = dataset.validation.gather(chosen.numpy(), config.model.chunk_size, config.data.image_size).to(device)
        _, (_, l1, _) = _loss(model, normalizer, batch, config, precision)
        real = (~batch.action_is_pad).sum()
        total, count = total + l1 * real, count + real
    model.train()
    return float(total / count)


def _start(config: Config, dataset: Dataset, device: torch.device) -> TrainingState:
    """A new run, or the one in the run's folder at its newest checkpoint."""
    newest = checkpoint.newest_checkpoint(config.output_dir)
    resume = config.training.resume
    if resume == "must" and newest is None:
        raise Fault(
            f"training.resume: must, and {config.output_dir} holds no checkpoint; set output_dir, or training.resume=auto"
        )
    if resume == "never" and newest is not None:
        raise Fault(
            f"training.resume: never, and {config.output_dir} holds {newest.name}; give another output_dir, or move it away"
        )
    cameras = len(config.data.cameras)
    model = ACT(config.model, len(dataset.state_names), len(dataset.action_names), cameras)
    if config.model.pretrained_backbone and cameras and newest is None:
        try:
            load_imagenet_weights(model)
        except Exception as error:  # torchvision that does not fit torch, no network, a damaged file
            raise Fault(
                f"model.pretrained_backbone: the ImageNet weights cannot be had ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:160]}); train once with a network, put torchvision's resnet18 file into "
                f"{torch.hub.get_dir()}/checkpoints, or set model.pretrained_backbone=false"
            ) from None
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # its stubs lack it
    backbone = [p for name, p in model.named_parameters() if name.startswith("backbone.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": backbone}], weight_decay=config.training.weight_decay, fused=True
    )
    state = TrainingState(0, model, optimizer, [])
    if newest is not None:
        state = checkpoint.restore(newest, state, config, dataset)
        print(f"going on from {newest}")
    if state.step >= config.training.steps:
        return state
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        for half in config.output_dir.glob(".checkpoint_*.tmp"):  # of a run that was killed
            shutil.rmtree(half)
        writing = config.output_dir / ".config.yaml.tmp"
        writing.write_text(dump(config))
        writing.rename(config.output_dir / "config.yaml")
    except OSError as error:
        raise Fault(f"output_dir: {config.output_dir} cannot be written ({error.strerror}); set another") from None
    return state


def _set_rates(optimizer: torch.optim.Optimizer, settings: Training, step: int) -> None:
    """The learning rates of a step: a pure function, so that a resumed run needs no scheduler."""
    scale = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
    for group, rate in zip(optimizer.param_groups, (settings.lr, settings.lr_backbone), strict=True):
        group["lr"] = rate * scale


def _means(window: list[Tensor], step: int) -> dict[str, float]:
    """The mean figures since the last line of the log: here the host waits for the device. Raises Fault if one is not finite."""
    figures = torch.stack(window).double().cpu()
    finite = figures.isfinite().all(1)
    if not finite.all():
        at = step - len(window) + 1 + int((~finite).nonzero()[0])
        found = ", ".join(
            f"{name} {value:g}" for name, value in zip(FIGURES, figures[at - step - 1].tolist(), strict=True)
        )
        raise Fault(
            f"step {at}: {found}; expected finite numbers; nothing after the last checkpoint is kept: lower training.lr, "
            "or set training.precision=fp32, and run the same command again"
        )
    return dict(zip(FIGURES, figures.mean(0).tolist(), strict=True))


class Log:
    """metrics.jsonl, one line each time, and the same figures for TensorBoard where it is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.jsonl"
        writing = folder / ".metrics.jsonl.tmp"
        writing.write_text("".join(_lines_until(step, path)))
        writing.rename(path)
        self.file = path.open("a", buffering=1)
        self.board: Any = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.step, self.since, self.waited = step, time.perf_counter(), 0.0

    def waiting(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that the loop waits for them counted."""
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done here is not counted as the time of a step."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def rates(self, step: int) -> dict[str, float]:
        """Steps a second since the last call, and the share of that time in which the loop waited for data."""
        elapsed = time.perf_counter() - self.since
        rates = {"steps_per_s": (step - self.step) / elapsed, "waiting_for_data": self.waited / elapsed}
        self.step, self.since, self.waited = step, time.perf_counter(), 0.0
        return rates

    def line(self, step: int, figures: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def _lines_until(step: int, log: Path) -> Iterator[str]:
    """The lines of a log up to a checkpoint: what came after it is done again, and a line cut short by a kill is no line."""
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                yield line + "\n"
        except ValueError:
            continue


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM puts its number into; a second one stops at once."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device(wanted: str) -> str:
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and (
        not torch.cuda.is_available() or int(device[5:] or 0) >= torch.cuda.device_count()
    ):
        raise Fault(
            f"training.device: {wanted}, and torch sees {torch.cuda.device_count()} GPUs; set training.device=auto or cpu, "
            "or install a torch for your driver"
        )
    return device


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]


def report(config: Config, dataset: Dataset) -> str:
    """What was found, in words: episodes, shapes, samples, sizes."""
    data, batch_size, chunk = config.data, config.training.batch_size, config.model.chunk_size
    lines = [f"{name}: {note}" for name, notes in dataset.notes.items() for note in notes]
    for word, split in (("training", dataset.train), ("held out", dataset.validation)):
        lines.append(
            f"{word}: {len(split.names)} recordings, {len(split.lengths)} episodes, {len(split.state)} samples, "
            f"{len(split.state) / data.fps:.0f} s at {data.fps:g} Hz"
            if split.names
            else f"{word}: nothing, so the policy cannot be judged; record more, or raise data.validation_fraction"
        )
    height, width = data.image_size
    lines.append(f"state   ({batch_size}, {len(dataset.state_names)}) {', '.join(dataset.state_names)}")
    lines.append(
        f"images  ({batch_size}, {len(data.cameras)}, {height}, {width}, 3) uint8 {', '.join(data.cameras)}"
        if data.cameras
        else "images  none: a policy on the state alone, which LeRobot cannot load"
    )
    meaning = "state one tick later" if data.action.from_ == "next_state" else "commands"
    lines.append(
        f"action  ({batch_size}, {chunk}, {len(dataset.action_names)}) {data.action.as_}, {meaning}: {', '.join(dataset.action_names)}"
    )
    with torch.device("meta"):
        model = ACT(config.model, len(dataset.state_names), len(dataset.action_names), len(data.cameras))
    parameters = sum(p.numel() for p in model.parameters())
    lines.append(f"cache   {dataset.cache_bytes / 1e6:.0f} MB in {data.cache_dir}")
    lines.append(
        f"memory  {parameters / 1e6:.1f} M parameters: {parameters * 16 / 1e6:.0f} MB for weights, gradients and optimizer, "
        "besides the activations"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"), metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="read and cache every bag, report, do not train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as training.steps=20000")
    arguments = parser.parse_intermixed_args()
    with told_plainly():
        config = load(arguments.config, arguments.overrides)
        dataset = load_dataset(config)
        print(report(config, dataset), flush=True)
        if not arguments.dry_run:
            last = train(config, dataset)
            print(f"policy: {last / 'pretrained_model'}")


if __name__ == "__main__":
    main()
