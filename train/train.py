"""Train the ACT policy straight from rosbags.

    python train/train.py                                   # reads train/config.yaml
    python train/train.py --config my.yaml training.steps=20000 data.fps=15
    python train/train.py --dry-run                         # reads and caches every bag, reports, does not train
    torchrun --standalone --nproc_per_node 8 train/train.py # one process per GPU

Exit codes: 0 trained; 3 trained, recordings with faults skipped (data.on_bad_bag=skip); 1 error to fix; 75 interrupted, run
the same command to resume.

Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", arXiv:2304.13705.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from act_model import ACT, act_loss
from config import Config, dump, load, to_dict
from dataset.augment import Augment
from dataset.batches import Batch, Dataset, batches
from dataset.build import older_caches
from dataset.cache import load_dataset
from dataset.normalize import Normalizer
from evaluation.report import judge_at_the_end
from faults import SKIPPED, Fault, Stopped, exit_with_message
from files import write_whole
from training import checkpoints, run_folder
from training.checkpoints import Figures, TrainingState
from training.log import Log
from training.precision import choose_precision, describe
from training.processes import Processes, choose_device, process_group, stop_signals
from training.run import Run, set_first_weights

VALIDATION_SAMPLES = 512  # spread evenly over the held-out ticks


def train(run: Run) -> Path:
    """Optimize from the newest checkpoint, or from the start, to the last step. Returns the last checkpoint."""
    config, dataset, processes = run.config, run.dataset, run.processes
    settings = config.training
    torch.manual_seed(settings.seed)
    processes.agree(
        **{"kind of device": run.device.type, "training": to_dict(settings)},
        **checkpoints.settings_to_keep(run),
    )
    normalizer = dataset.normalizer().to(run.device)
    first_step, model, optimizer, window, held_out = start(run)
    network: ACT | DistributedDataParallel = model
    if processes.world > 1:
        group = processes.gradient_group(run.device)
        network = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # constants: construction has sent them; the argument would not
    augment = Augment(settings.augment, config.data.image_size)
    compute = torch.compile(losses) if settings.compile else losses
    log = Log(config.output_dir, first_step, writes=processes.first)
    pin = run.device.type == "cuda"
    source = batches(dataset.train, config, first_step, processes.rank, processes.world, pin)
    bar = tqdm(total=settings.steps, initial=first_step, unit="step", desc="training", disable=not processes.first)

    with stop_signals() as stops, bar:
        for step, batch in enumerate(log.waiting(source), first_step + 1):
            seed_step(settings.seed, step, processes.rank)
            set_rates(optimizer, run, step)
            figures = training_step(compute, network, optimizer, normalizer, augment(batch.to(run.device)), run)
            window.append(torch.stack(figures).detach())

            stopping = processes.any(bool(stops))
            due = step == settings.steps or step % settings.save_every == 0
            logging, saving = step % settings.log_every == 0, due or stopping
            # not at a stop: a resumed run logs the same as one that never stopped
            validating = bool(dataset.validation.names) and (due or step % settings.evaluate_every == 0)
            if logging or saving:
                means = mean_figures(window, step, processes)
                bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
            if logging:
                log.line(step, means | {"lr": optimizer.param_groups[0]["lr"]} | log.rates(step))
                window.clear()
            if saving or validating:
                with log.paused():
                    error = None
                    if processes.first and validating:
                        error = validate(model, normalizer, run)
                        log.line(step, {"validation_l1": error})
                        held_out = {"mean L1 in standard deviations": error, "at step": step}
                    if processes.first and saving:
                        state = TrainingState(step, model, optimizer, window, held_out)
                        checkpoints.save(state, normalizer, run, error)
                    processes.wait()
            bar.update()
            if stopping:
                log.close()
                last = config.output_dir / run_folder.checkpoint_name(step)
                raise Stopped(f"stopped at step {step}; run the same command to resume from {last}")
    log.close()
    return config.output_dir / run_folder.checkpoint_name(max(first_step, settings.steps))


def training_step(
    compute: Callable[..., tuple[Tensor, Tensor, Tensor]],
    network: ACT | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    normalizer: Normalizer,
    batch: Batch,
    run: Run,
) -> Figures:
    """One optimizer step on a batch; `compute` is `losses`, compiled or not."""
    loss, l1, kl = compute(network, normalizer, batch, run)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    bound = run.config.training.grad_clip_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), bound)
    optimizer.step()
    return Figures(loss, l1, kl, grad_norm)


def losses(
    network: ACT | DistributedDataParallel, normalizer: Normalizer, batch: Batch, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch, its L1 term and its KL term."""
    action = normalizer.action.normalize(batch.action)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        output = network(
            normalizer.state.normalize(batch.state),
            normalizer.images(batch.images),
            action,
            batch.action_is_pad,
            batch.noise,
        )
    return act_loss(output, action, batch.action_is_pad, run.config.model.kl_weight, batch.real_steps)


@torch.no_grad()
def validate(model: ACT, normalizer: Normalizer, run: Run) -> float:
    """Mean L1 over held-out chunks in standard deviations, with a zero latent, as on the robot."""
    model.eval()
    split = run.dataset.validation
    ticks = torch.linspace(0, len(split.state) - 1, min(VALIDATION_SAMPLES, len(split.state))).round().long()
    total, count = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    for chosen in ticks.split(run.config.training.batch_size):
        batch = split.gather(chosen.numpy()).to(run.device)
        _, l1, _ = losses(model, normalizer, batch, run)
        real = (~batch.action_is_pad).sum()
        total, count = total + l1 * real, count + real
    model.train()
    return float(total / count)


def start(run: Run) -> TrainingState:
    """The state of the newest checkpoint in the run's folder, or a new one."""
    config, folder, first = run.config, run.config.output_dir, run.processes.first
    newest = None
    if first:  # the others receive its state
        newest = checkpoints.newest_sound_checkpoint(folder)
        if config.training.resume == "must" and newest is None:
            raise Fault(
                f"training.resume: must, but {folder} has no checkpoint; set output_dir or training.resume=auto"
            )
        if config.training.resume == "never" and newest is not None:
            raise Fault(f"training.resume: never, but {folder} has {newest.name}; set another output_dir, or move it")
    model = run.new_model()
    if first and newest is None:
        set_first_weights(model, run)
    model.to(run.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # its stubs lack it
    backbone = [p for name, p in model.named_parameters() if name.startswith("backbone.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": others}, {"params": backbone}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.training.weight_decay, fused=True)
    state = TrainingState(0, model, optimizer, [], {})
    if newest is not None:
        state = checkpoints.restore(newest, state, run)
        print(f"resuming from {newest}", flush=True)
    if first:
        checkpoints.tidy(run)
        checkpoints.check_room(run, state.step)
    if run.processes.world > 1:
        state = checkpoints.receive(state, run)
    if first and (state.step < config.training.steps or not (folder / "config.yaml").exists()):
        write_whole(folder / "config.yaml", dump(config))
    return state


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout as a pure function of the step: a resumed run needs no generator state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def set_rates(optimizer: torch.optim.Optimizer, run: Run, step: int) -> None:
    """Set the learning rates as a pure function of the step: a resumed run needs no scheduler."""
    settings = run.config.training
    scale = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
    for group, rate in zip(optimizer.param_groups, (settings.lr, settings.lr_backbone), strict=True):
        group["lr"] = rate * scale


def mean_figures(window: list[Tensor], step: int, processes: Processes) -> dict[str, float]:
    """The mean figures since the last log line, over all processes; waits for the device. Raises Fault at NaN or Inf."""
    if processes.world > 1:
        window[:] = processes.mean(torch.stack(window).cpu()).to(window[0].device)
    rows = torch.stack(window).double().cpu()
    for offset, row in enumerate(rows):
        if not row.isfinite().all():
            values = ", ".join(f"{name} {value:g}" for name, value in zip(Figures._fields, row.tolist(), strict=True))
            raise Fault(
                f"step {step - len(window) + 1 + offset}: {values}; expected finite numbers; lower training.lr or set "
                "training.precision=fp32, and run the same command to resume from the last checkpoint"
            )
    return dict(zip(Figures._fields, rows.mean(0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"), metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="read and cache every bag, report, do not train")
    parser.add_argument("--no-evaluation", action="store_true", help="do not judge the policy at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as training.steps=20000")
    arguments = parser.parse_intermixed_args()
    with exit_with_message(), process_group() as processes:
        with processes.local_first():
            config = load(arguments.config, arguments.overrides)
        if arguments.dry_run:
            dataset = dry_run(config, processes)
        else:
            with run_folder.held(config.output_dir) if processes.first else nullcontext():
                dataset = train_and_judge(config, processes, not arguments.no_evaluation)
    if dataset.skipped:
        processes.end_with(SKIPPED)


def dry_run(config: Config, processes: Processes) -> Dataset:
    """Read and cache every bag, report, and draw the augmented pictures."""
    with processes.local_first():
        dataset = load_dataset(config)
    if processes.first:
        run = Run(config, dataset, processes=processes)
        run.check_memory()
        print("\n".join([run.report(), *older_caches(config.data)]))
        checkpoints.check_room(run, 0)
        if config.training.augment and config.data.cameras:
            picture = config.output_dir / "augmented.png"
            Augment(config.training.augment, config.data.image_size).draw(dataset.train, picture)
            print(f"augmented pictures: {picture}")
    return dataset


def train_and_judge(config: Config, processes: Processes, judges: bool) -> Dataset:
    """Choose device and precision, read every bag, train, judge the policy if `judges`."""
    device = choose_device(config.training.device, processes)
    precision, why = choose_precision(config, device, processes)
    if processes.first:
        print(f"device  {describe(device)}; processes: {processes.world}")
        print(f"numbers {precision}: {why}", flush=True)
    with processes.local_first():
        dataset = load_dataset(config)
    run = Run(config, dataset, device, processes, precision)
    run.check_memory()
    if processes.first:
        print(run.report(), flush=True)
    try:
        last = train(run)
    except torch.OutOfMemoryError as error:
        raise Fault(
            f"training.batch_size: {config.training.batch_size} samples do not fit into the GPU's memory "
            f"({str(error).splitlines()[0][:120]}); lower it, or data.image_size"
        ) from None
    if processes.first:
        print(f"policy: {last / 'pretrained_model'}", flush=True)
        if judges:
            judge_at_the_end(last, config, dataset, str(device))
    return dataset


if __name__ == "__main__":
    main()
