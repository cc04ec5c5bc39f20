"""Train the ACT policy straight from rosbags.

    python train/train.py                                   # reads train/config.yaml
    python train/train.py --config my.yaml training.steps=20000 data.fps=15
    python train/train.py --dry-run                         # reads and caches every bag, reports, does not train
    torchrun --standalone --nproc_per_node 8 train/train.py # a process for each GPU

It ends with 0 when the policy is trained, 3 when it is, but without recordings that have faults (data.on_bad_bag=skip), 1
when there is something to mend, 75 when the same command goes on.

Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", arXiv:2304.13705.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from act_model import ACT, act_loss, load_imagenet_weights
from config import Config, Training, dump, load, to_dict
from dataset.augment import Augment
from dataset.batches import Batch, Dataset, batches
from dataset.cache import load_dataset
from dataset.normalize import Normalizer
from evaluate import judge_at_the_end
from faults import LEFT_OUT, Fault, Stopped, exit_with_message
from files import write_whole
from policy import pretrained
from recordings import plausibility
from training import checkpoints, run_folder
from training.checkpoints import FIGURES, TrainingState
from training.log import Log
from training.processes import Processes, process_group

VALIDATION_SAMPLES = 512  # spread evenly over the held-out ticks


def train(config: Config, dataset: Dataset, ranks: Processes = Processes()) -> Path:  # noqa: B008 -- a constant
    """Run the optimisation from the newest checkpoint, or from nothing, to the last step; the last checkpoint."""
    settings = config.training
    device = torch.device(_device(settings.device, ranks))
    torch.set_float32_matmul_precision(settings.matmul_precision)
    torch.manual_seed(settings.seed)
    normalizer = dataset.normalizer().to(device)
    precision = _precision(settings.precision, device)
    ranks.agree(
        **{"kind of device": device.type, "precision": str(precision), "training": to_dict(settings)},
        **checkpoints.settings_to_keep(config, dataset, ranks.world),
    )
    state = _start(config, dataset, device, ranks)
    model, optimizer, window, held_out = state.model, state.optimizer, state.window, state.held_out
    augment = Augment(settings.augment, config.data.image_size)
    shared: ACT | DistributedDataParallel = model
    if ranks.world > 1:
        # with its buffers, too: only the first process has the norms of the ImageNet weights
        shared = DistributedDataParallel(model, process_group=ranks.gradients(device), gradient_as_bucket_view=True)
    log = Log(config.output_dir, state.step, ranks.first)

    with (
        _stop_signals() as stopped,
        tqdm(total=settings.steps, initial=state.step, unit="step", desc="training", disable=not ranks.first) as bar,
    ):
        for step, batch in enumerate(
            log.waiting(batches(dataset.train, config, state.step, ranks.rank, ranks.world)), state.step + 1
        ):
            _seed(settings.seed, step, ranks)
            loss, figures = _loss(shared, normalizer, augment(batch.to(device)), config, precision)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip_norm or math.inf)
            _set_rates(optimizer, settings, step)
            optimizer.step()
            window.append(torch.stack([*figures, norm]).detach())

            stopping = ranks.any(bool(stopped))
            due = step == settings.steps or step % settings.save_every == 0
            saving = stopping or due
            if saving or step % settings.log_every == 0:
                means = _means(window, step, ranks)
                if step % settings.log_every == 0:
                    log.line(step, means | {"lr": optimizer.param_groups[0]["lr"]} | log.rates(step))
                    window.clear()
                bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
            # not for a stop, which may have seconds: the log is that of a run that was never stopped
            validating = bool(dataset.validation.names) and (due or step % settings.evaluate_every == 0)
            if saving or validating:
                with log.paused():
                    figure = None
                    if ranks.first and validating:
                        figure = validate(model, normalizer, dataset, config, precision)
                        log.line(step, {"validation_l1": figure})
                        held_out = {"mean L1 in standard deviations": figure, "at step": step}
                    if ranks.first and saving:
                        now = TrainingState(step, model, optimizer, window, held_out)
                        checkpoints.save(now, normalizer, config, dataset, ranks.world, figure)
                    ranks.wait()
            bar.update()
            if stopping:
                log.close()
                raise Stopped(
                    f"stopped at step {step}; the same command goes on from {config.output_dir / run_folder.checkpoint_name(step)}"
                )
    log.close()
    return config.output_dir / run_folder.checkpoint_name(max(state.step, settings.steps))


def _loss(
    model: ACT | DistributedDataParallel, normalizer: Normalizer, batch: Batch, config: Config, precision: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch, and the loss, its L1 and its KL term for the log."""
    action = normalizer.action.normalize(batch.action)
    with torch.autocast(batch.state.device.type, precision, enabled=precision != torch.float32):
        output = model(
            normalizer.state.normalize(batch.state),
            normalizer.images(batch.images),
            action,
            batch.action_is_pad,
            batch.noise,
        )
    loss, l1, kl = act_loss(output, action, batch.action_is_pad, config.model.kl_weight, batch.real_steps)
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
        batch = dataset.validation.gather(chosen.numpy()).to(device)
        _, (_, l1, _) = _loss(model, normalizer, batch, config, precision)
        real = (~batch.action_is_pad).sum()
        total, count = total + l1 * real, count + real
    model.train()
    return float(total / count)


def _start(config: Config, dataset: Dataset, device: torch.device, ranks: Processes) -> TrainingState:
    """A new run, or the one in the first process's folder at its newest checkpoint."""
    newest = run_folder.newest_checkpoint(config.output_dir) if ranks.first else None
    for name, lack in run_folder.broken_checkpoints(config.output_dir).items() if ranks.first else ():
        print(f"{config.output_dir / name}: passed over, it is not whole: {lack}")
    resume = config.training.resume if ranks.first else "auto"
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
    starting = newest is None and ranks.first  # the others get its weights
    if starting and config.training.init_from:
        print(pretrained.start_from(config.training.init_from, model, config, dataset), flush=True)
    elif starting and config.model.pretrained_backbone and cameras:
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
    state = TrainingState(0, model, optimizer, [], {})
    if newest is not None:
        state = checkpoints.restore(newest, state, config, dataset, ranks.world)
        print(f"going on from {newest}", flush=True)
    if ranks.world > 1:
        state = checkpoints.receive(state, ranks)
    if not ranks.first or (state.step >= config.training.steps and (config.output_dir / "config.yaml").exists()):
        return state
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        for half in config.output_dir.glob(".checkpoint_*.tmp"):  # of a run that was killed
            shutil.rmtree(half)
        write_whole(config.output_dir / "config.yaml", dump(config))
    except OSError as error:
        raise Fault(f"output_dir: {config.output_dir} cannot be written ({error.strerror}); set another") from None
    return state


def _seed(seed: int, step: int, ranks: Processes) -> None:
    """The random numbers of a step, for dropout: a pure function, so that a resumed run needs only its step."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, ranks.rank)).generate_state(1, np.uint64)[0]))


def _set_rates(optimizer: torch.optim.Optimizer, settings: Training, step: int) -> None:
    """The learning rates of a step: a pure function, so that a resumed run needs no scheduler."""
    scale = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
    for group, rate in zip(optimizer.param_groups, (settings.lr, settings.lr_backbone), strict=True):
        group["lr"] = rate * scale


def _means(window: list[Tensor], step: int, ranks: Processes) -> dict[str, float]:
    """The mean figures since the last line of the log, over all processes: here the host waits for the device.

    Raises Fault if one is not finite.
    """
    if ranks.world > 1:
        window[:] = ranks.mean(torch.stack(window).cpu()).to(window[0].device)
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


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM puts its number into; a second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:  # torchrun sends SIGTERM twice
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device(wanted: str, ranks: Processes) -> str:
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world > 1 and device.startswith("cuda:"):
        raise Fault(f"training.device: {wanted}, and torchrun started {ranks.world} processes; set auto or cuda")
    if device == "cuda":
        device = f"cuda:{ranks.local}"
    if device.startswith("cuda") and (
        not torch.cuda.is_available() or int(device[5:] or 0) >= torch.cuda.device_count()
    ):
        raise Fault(
            f"training.device: {wanted}, process {ranks.local} of this machine, and torch sees {torch.cuda.device_count()} "
            "GPUs; set training.device=auto or cpu, start fewer processes, or install a torch for your driver"
        )
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return device


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]


def report(config: Config, dataset: Dataset) -> str:
    """What was found, in words: episodes, shapes, samples, sizes, and what is to be looked at."""
    data, batch_size, chunk = config.data, config.training.batch_size, config.model.chunk_size
    lines = [f"{name}: {note}" for name, notes in dataset.notes.items() for note in notes]
    lines += dataset.left_out_in_words()
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
    for name, ticks in dataset.ticks(data.action.as_ == "delta"):
        warnings = [*dataset.warnings[name], *plausibility.warnings(ticks, config)]
        lines += [f"warning: {name}: {warning}" for warning in warnings]
    return "\n".join(lines)


def _draw_augmented(config: Config, dataset: Dataset) -> Path:
    """A picture of what training.augment does to the first moment of the recordings."""
    first = dataset.train.gather(np.zeros(1, int))
    path = config.output_dir / "augmented.png"
    if first.images is not None:
        Augment(config.training.augment, config.data.image_size).draw(first.images[0], path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"), metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="read and cache every bag, report, do not train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as training.steps=20000")
    arguments = parser.parse_intermixed_args()
    with exit_with_message(), process_group() as ranks:
        with ranks.local_first():
            config = load(arguments.config, arguments.overrides)
            dataset = load_dataset(config)
        if ranks.first:
            print(report(config, dataset), flush=True)
            if config.training.augment and arguments.dry_run:
                print(f"pictures as augmented: {_draw_augmented(config, dataset)}")
        if not arguments.dry_run:
            try:
                last = train(config, dataset, ranks)
            except torch.OutOfMemoryError as error:
                raise Fault(
                    f"training.batch_size: {config.training.batch_size} samples do not fit into the GPU's memory "
                    f"({str(error).splitlines()[0][:120]}); lower it, or data.image_size"
                ) from None
            if ranks.first:
                print(f"policy: {last / 'pretrained_model'}", flush=True)
                judge_at_the_end(last, config, dataset, _device(config.training.device, ranks))
    if dataset.left_out:
        ranks.end_with(LEFT_OUT)


if __name__ == "__main__":
    main()
