"""Judge a checkpoint on the recordings that were held out from its training.

    python train/evaluate.py outputs/train-rosbag-act/checkpoint_100000

Prints the error of each joint in the robot's units beside that of holding still, and with the camera blanked or of another
episode: a policy that looks is worse without its eyes. Writes errors.json and pictures into the run's evaluation/ folder.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, load
from dataset import Batch, Dataset, load_dataset
from faults import Fault, told_plainly
from policy import Policy

SAMPLES = 1024  # spread evenly over the held-out ticks
BATCH = 32


class Errors(NamedTuple):
    """Absolute errors in the robot's units, NaN beyond an episode's end. N samples, T ticks ahead, A actions."""

    policy: np.ndarray  # (N, T, A)
    holding_still: np.ndarray
    camera_blanked: np.ndarray | None = None  # without a camera
    camera_of_another: np.ndarray | None = None


def evaluate(policy: Policy, config: Config, dataset: Dataset) -> Errors:
    """The errors of a policy on the held-out recordings. Raises Fault where there are none."""
    split = dataset.validation
    if not split.names:
        raise Fault(
            "data.validation_fraction: no recording was held out, so there is nothing to judge by; record more, or raise it"
        )
    ticks = np.unique(np.linspace(0, len(split.state) - 1, SAMPLES).round().astype(int))
    found: dict[str, list[Tensor]] = {name: [] for name in Errors._fields}
    elsewhere = np.roll(ticks, len(ticks) // 2)  # half of the held-out time away
    for start in range(0, len(ticks), BATCH):
        batch = split.gather(ticks[start : start + BATCH], config.model.chunk_size, config.data.image_size)

        def error(chunk: Tensor, batch: Batch = batch) -> Tensor:
            return (chunk - batch.action).abs().masked_fill(batch.action_is_pad[..., None], torch.nan)

        found["policy"].append(error(policy.predict(batch.state, batch.images)))
        found["holding_still"].append(error(_holding_still(batch, config)))
        if batch.images is not None:
            other = split.gather(elsewhere[start : start + BATCH], 1, config.data.image_size)
            found["camera_blanked"].append(error(policy.predict(batch.state, torch.full_like(batch.images, 128))))
            found["camera_of_another"].append(error(policy.predict(batch.state, other.images)))
    return Errors(**{name: torch.cat(parts).numpy() for name, parts in found.items() if parts})


def _holding_still(batch: Batch, config: Config) -> Tensor:
    """Actions (B, T, A) that keep the arm where it is, or keep the command that is in force."""
    if config.data.action.as_ == "delta":
        return torch.zeros_like(batch.action)
    here = batch.state if config.data.action.from_ == "next_state" else batch.action[:, 0]
    return here[:, None].expand_as(batch.action)


def table(errors: Errors, names: tuple[str, ...]) -> str:
    """Mean absolute error by joint, in the robot's units."""
    columns = {
        name.replace("_", " "): np.nanmean(one, axis=(0, 1))
        for name, one in errors._asdict().items()
        if one is not None
    }
    wide = max(map(len, names), default=0)
    lines = [f"{'mean absolute error':{max(wide, 19)}}" + "".join(f"{name:>19}" for name in columns)]
    rows = {name: [column[i] for column in columns.values()] for i, name in enumerate(names)}
    rows["all"] = [column.mean() for column in columns.values()]
    for name, values in rows.items():
        lines.append(f"{name:{max(wide, 19)}}" + "".join(f"{value:19.4f}" for value in values))
    lines.append(
        f"{'of holding still':{max(wide, 19)}}" + "".join(f"{value / rows['all'][1]:19.0%}" for value in rows["all"])
    )
    return "\n".join(lines)


def draw(folder: Path, policy: Policy, errors: Errors, config: Config, dataset: Dataset) -> list[Path]:
    """joints.png: an episode with the chunks drawn; horizon.png: the error ahead; camera.png: what the policy saw there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    split, names, fps = dataset.validation, dataset.action_names, config.data.fps
    length = split.lengths[0]
    every = max(length // 6, 1)
    starts = np.arange(0, length, every)
    batch = split.gather(starts, config.model.chunk_size, config.data.image_size)
    chunks = policy.predict(batch.state, batch.images).numpy()
    rows = -(-len(names) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 2.2 * rows), sharex=True, squeeze=False, layout="constrained")
    for a, name in enumerate(names):
        axis = axes.flat[a]
        axis.plot(np.arange(length) / fps, split.action[:length, a], color="black", linewidth=2, label="recorded")
        for b, start in enumerate(starts):
            real = int((~batch.action_is_pad[b]).sum())
            axis.plot(
                (start + np.arange(real)) / fps,
                chunks[b, :real, a],
                linewidth=1.2,
                color=f"C{b % 10}",
                label="predicted chunks" if not b else None,
            )
            axis.plot(start / fps, chunks[b, 0, a], "o", markersize=4, color=f"C{b % 10}")
        axis.set_title(f"{name}, as recorded", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("time, s")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"held-out recording {split.names[0]}: action recorded and predicted")
    paths = [folder / "joints.png"]
    figure.savefig(paths[-1], dpi=110)

    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, one in errors._asdict().items():
        if one is not None:
            axis.plot((np.arange(one.shape[1]) + 1) / fps, np.nanmean(one, axis=(0, 2)), label=name.replace("_", " "))
    axis.set(
        xlabel="time ahead, s",
        ylabel="mean absolute error, as recorded",
        ylim=(0, None),
        title="error ahead, held-out recordings",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    paths.append(folder / "horizon.png")
    figure.savefig(paths[-1], dpi=110)

    if batch.images is not None:
        cameras = list(split.frames)
        figure, axes = plt.subplots(
            len(cameras),
            len(starts),
            figsize=(2 * len(starts), 1.9 * len(cameras)),
            squeeze=False,
            layout="constrained",
        )
        for c, camera in enumerate(cameras):
            for b, start in enumerate(starts):
                axes[c, b].imshow(batch.images[b, c].numpy())
                axes[c, b].set_title(f"{camera}, {start / fps:.1f} s", fontsize=8)
                axes[c, b].axis("off")
        paths.append(folder / "camera.png")
        figure.savefig(paths[-1], dpi=110)
    plt.close("all")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint_NNNNNN folder of a run")
    folder = parser.parse_args().checkpoint.resolve()
    with told_plainly():
        policy = Policy.load(folder / "pretrained_model")
        config = load(folder.parent / "config.yaml")
        # not a new choice: recordings may have come since, and none that was trained on may judge
        dataset = load_dataset(config, held_out=policy.robot["recordings"]["validation"])
        errors = evaluate(policy, config, dataset)
        moments, ahead = errors.policy.shape[:2]
        print(
            f"{len(dataset.validation.names)} held-out recordings, {moments} moments, {ahead} ticks ahead; units as recorded (joints: rad)"
        )
        print(table(errors, dataset.action_names))
        out = folder.parent / "evaluation" / folder.name
        out.mkdir(parents=True, exist_ok=True)
        means = {
            name: np.nanmean(one, axis=(0, 1)).tolist() for name, one in errors._asdict().items() if one is not None
        }
        (out / "errors.json").write_text(
            json.dumps({"actions": dataset.action_names, "mean_absolute_error": means}, indent=2) + "\n"
        )
        if find_spec("matplotlib"):
            print(
                "pictures: "
                + ", ".join(path.name for path in draw(out, policy, errors, config, dataset))
                + f" in {out}"
            )
        else:
            print("pictures: none, they need matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
