"""A trained policy on the robot: an observation in, the action of this tick out, in the robot's units.

    policy = Policy.load("outputs/train-rosbag-act/checkpoint_100000", fps=30, action_as="absolute", action_names=MY_JOINTS)
    policy.reset()                                                # before each episode
    while running:                                                # policy.fps times a second
        joints = robot.joint_states()                             # names in any order
        observation = {
            "state": dict(zip(joints.name, joints.position)),     # or an array in the order of policy.state_names
            "images": {"color": camera.rgb()},                    # (H, W, 3) uint8 RGB as the camera gives it
        }
        robot.command(policy.action_names, policy.act(observation))

Here torch, numpy, safetensors, cv2 and yaml are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from act_model import ACT, fold_norms
from dataset.normalize import Normalizer
from faults import Fault
from policy import pretrained
from recordings.images import resize

CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
FAST_FP32 = "avx512f" in CPU_FLAGS and "amx" not in CPU_FLAGS
UNKNOWN = "unknown"  # of LeRobot's own checkpoints, which do not say it


class Policy:
    """A network in evaluation mode with its statistics."""

    def __init__(
        self,
        model: ACT,
        normalizer: Normalizer,
        image_size: tuple[int, int],
        robot: dict[str, Any],
        n_action_steps: int = 1,
        ensemble: float | None = None,
    ) -> None:
        self.model = model.eval()
        self.normalizer = normalizer
        self.image_size = image_size  # height, width
        self.robot = robot  # robot.json: joint names, fps, cameras, how actions are meant; {} of LeRobot's own
        self.fps: float | None = robot.get("fps")
        self.state_names: tuple[str, ...] = tuple(robot["state"]["names"]) if robot else ()
        self.action_names: tuple[str, ...] = tuple(robot["action"]["names"]) if robot else ()
        # delta: to be added to the state at the tick of the action
        self.action_as: str = robot["action"]["as"] if robot else UNKNOWN
        # where in the state each action's joint is, if targets are to be made of deltas, or deltas of targets
        self._joints: list[int] | None = None
        self.cameras = tuple(normalizer.cameras)
        # height, width of the cameras that were recorded; LeRobot does not resize
        self.picture_sizes: dict[str, list[tuple[int, int]]] = {
            name: [(h, w) for h, w in robot["cameras"][name]["recorded"]] if robot else [image_size]
            for name in self.cameras
        }
        self.n_action_steps = n_action_steps
        self.ensembler = None if ensemble is None else Ensembler(ensemble, model.decoder_pos_embed.num_embeddings)
        self.reset()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        ensemble: float | None = None,
        *,
        fps: float | None = None,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
        action_as: str | None = None,
    ) -> Policy:
        """From a checkpoint or a pretrained_model folder, of ours or of LeRobot >= 0.4.0.

        `ensemble` is the coefficient of temporal ensembling (0.01 in ACT's paper), by default that of config.json; without
        it n_action_steps of a chunk are executed. What else is given is what the robot has, in the policy's order; `action_as` is what it expects: a policy
        of targets gives deltas, and one of deltas targets, by the present state. Raises Fault with all that differs.
        """
        found = pretrained.load(Path(path))
        if found.normalizer.cameras:
            fold_norms(found.model.backbone)
        try:
            model = found.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stubs lack it
            normalizer = found.normalizer.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:  # torch's own for a device that is not there
            raise Fault(f"device: {device!r} cannot be used ({str(error).splitlines()[0][:120]}); take cpu") from None
        ensemble = found.ensemble if ensemble is None else ensemble
        policy = cls(model, normalizer, found.image_size, found.robot, found.config.n_action_steps, ensemble)
        has: dict[str, tuple[Any, Any]] = {
            "fps": (fps, policy.fps),
            "state_names": (state_names and tuple(state_names), policy.state_names),
            "action_names": (action_names and tuple(action_names), policy.action_names),
            "action_as": (action_as, action_as if action_as and policy._can_give(action_as) else policy.action_as),
        }
        faults = [
            f"{path}: {name}: the robot has {here!r}, the policy {there!r}; expected the same: take another checkpoint, or "
            "change the robot's"
            if found.robot
            else f"{path}: {name}: the robot has {here!r}, the policy's is unknown (LeRobot's own checkpoint, no robot.json); "
            f"look up how it was trained and load it without {name}"
            for name, (here, there) in has.items()
            if here is not None and here != there
        ]
        if faults:
            raise Fault(*faults)
        return policy

    def _can_give(self, action_as: str) -> bool:
        """Give targets or deltas, whichever was trained, by the present state; whether that can be done."""
        names, known = self.action_names, self.state_names
        if (
            {action_as, self.action_as} == {"absolute", "delta"}
            and set(names) == set(known)
            and len(set(names)) == len(names)
        ):
            self.action_as, self._joints = action_as, [known.index(name) for name in names]
        return action_as == self.action_as

    def reset(self) -> None:
        """Forget the chunks of the episode before."""
        self._chunk = torch.empty(0)  # what is left of it
        if self.ensembler:
            self.ensembler.reset()

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (A,) float32 of this tick; action_as says whether it is a target or a delta from the present state.

        `observation` is {"state": (S,) numbers or {name: number}, "images": {camera: (H, W, 3) uint8 RGB}}, the pictures
        as the cameras give them. Raises Fault, gives no action and forgets its chunks, whose ticks go by, where the
        observation or what the network says of it is broken.
        """
        try:
            state, images = self._checked(observation)
            if self.ensembler:
                action = self.ensembler.update(self._look(state, images))
            else:
                if not len(self._chunk):
                    self._chunk = self._look(state, images)[: self.n_action_steps]
                action, self._chunk = self._chunk[0], self._chunk[1:]
        except BaseException:
            self.reset()
            raise
        if self._joints is None:
            return action.numpy()
        return action.numpy() + (1 if self.action_as == "absolute" else -1) * state[self._joints]

    def _look(self, state: np.ndarray, images: list[np.ndarray]) -> Tensor:
        """The chunk (T, A) for one observation."""
        pixels = torch.from_numpy(np.stack([resize(one, self.image_size) for one in images])[None]) if images else None
        return self.predict(torch.from_numpy(state)[None], pixels)[0]

    def _checked(self, observation: Mapping[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
        """State (S,) float32 in the policy's order, and the pictures in that of its cameras. Raises Fault with all faults."""
        faults: list[str] = []
        state = self._checked_state(observation.get("state"), faults)
        images = observation.get("images", {})
        if not isinstance(images, Mapping):
            faults.append(f"observation: images is a {type(images).__name__}; expected a picture by camera's name")
            images = {}
        elif set(images) != set(self.cameras):
            faults.append(f"observation: images of {sorted(images)}; expected one of each of {sorted(self.cameras)}")
        pictures = {name: _array(images[name]) for name in self.cameras if name in images}
        for name, picture in pictures.items():
            faults += self._faults_of(name, picture)
        if faults:
            raise Fault(*faults)
        return state, list(pictures.values())

    def _checked_state(self, state: Any, faults: list[str]) -> np.ndarray:
        """(S,) float32; faults are appended, and then what is returned is of no use."""
        size = len(self.normalizer.state.mean)
        if isinstance(state, Mapping):
            if len(set(self.state_names)) < size:
                named = f"{self.state_names} are not {size} names"
                faults.append(
                    f"observation: state by name, and {named}; give an array ({size},) in the order of training"
                )
                return np.zeros(0)
            if missing := sorted(set(self.state_names) - set(state)):  # a driver may publish more than was trained on
                faults.append(f"observation: state lacks {missing}; there are {sorted(state)}")
                return np.zeros(0)
            state = [state[name] for name in self.state_names]
        try:
            numbers = np.asarray(state)
            if numbers.dtype.kind not in "iuf" or numbers.shape != (size,):
                raise ValueError(f"an array {numbers.shape} of {numbers.dtype}")
        except (ValueError, TypeError) as error:  # TypeError of a tensor on a GPU
            faults.append(f"observation: state is {error}; expected ({size},) numbers: {', '.join(self.state_names)}")
            return np.zeros(0)
        with np.errstate(over="ignore"):
            numbers = numbers.astype(np.float32)
        for i in np.flatnonzero(~np.isfinite(numbers)):
            name = self.state_names[i] if self.state_names else f"number {i}"
            faults.append(f"observation: state of {name} is {numbers[i]}; expected a finite number: is its driver up?")
        return numbers

    def _faults_of(self, camera: str, picture: np.ndarray) -> list[str]:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            expected = "(H, W, 3) uint8 RGB as the camera gives it"
            return [f"observation: images {camera}: {picture.shape} {picture.dtype}; expected {expected}"]
        height, width = picture.shape[:2]
        if not any(height * w == width * h for h, w in self.picture_sizes[camera]):
            trained = ", ".join(f"{w}x{h}" for h, w in self.picture_sizes[camera])
            return [
                f"observation: images {camera}: {width}x{height}, and the policy was trained on {trained}, of another shape; "
                "set the camera as it was when recording"
            ]
        return []

    @torch.inference_mode()
    def predict(self, state: Tensor, images: Tensor | None = None) -> Tensor:
        """Action chunks (B, T, A) for states (B, S) float32 and pictures (B, C, H, W, 3) uint8 RGB at the training size.

        Raises Fault where the observation is not what the policy was trained on, or the chunk is not finite.
        """
        cameras = list(self.normalizer.cameras)
        expected = [(len(self.normalizer.state.mean),), (len(cameras), *self.image_size, 3) if cameras else None]
        found = [tuple(state.shape[1:]), None if images is None else tuple(images.shape[1:])]
        if found != expected or not state.isfinite().all():
            raise Fault(
                f"the observation: state and pictures of shapes {found}, finite: {bool(state.isfinite().all())}; expected "
                f"{expected}, the cameras in the order {cameras}; resize as images.resize does"
            )
        device = self.normalizer.state.mean.device
        pixels = None if images is None else images.to(device)
        with _fast_fp32(device):
            output = self.model(self.normalizer.state.normalize(state.to(device)), self.normalizer.images(pixels))
        chunk = self.normalizer.action.unnormalize(output.actions).cpu()
        if not chunk.isfinite().all():
            raise Fault(
                "the policy: its actions are not finite; expected numbers; is an observation far from all training?"
            )
        return chunk


def _array(picture: Any) -> np.ndarray:
    try:
        return np.asarray(picture)
    except (ValueError, TypeError):  # rows of several lengths, a tensor on a GPU
        return np.array(None)


@contextmanager
def _fast_fp32(device: torch.device) -> Iterator[None]:
    """Matrix products by oneDNN, twice as fast on some CPUs, where "medium" still is fp32 for want of bf16 units."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if FAST_FP32 and device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Ensembler:
    """The mean, for each coming tick, of all that was predicted for it: weights exp(-coefficient * i), i = 0 the oldest.

    ACT's temporal ensembling (algorithm 2 of arXiv:2304.13705), kept up online as LeRobot does; 0 weighs all the same,
    and a negative coefficient trusts the newest most.
    """

    def __init__(self, coefficient: float, chunk_size: int) -> None:
        self.weights = torch.exp(-coefficient * torch.arange(chunk_size))
        self.sums = self.weights.cumsum(0)
        if not self.sums.isfinite().all():
            raise Fault(f"ensemble: {coefficient} over {chunk_size} ticks is not finite; expected about 0.01")
        self.reset()

    def reset(self) -> None:
        self.mean = torch.empty(0)  # (T - 1, A) of the coming ticks
        self.count = torch.empty(0, dtype=torch.long)  # (T - 1,) of predictions in it

    def update(self, chunk: Tensor) -> Tensor:
        """The action (A,) of this tick, given the chunk (T, A) that was predicted at it."""
        known = len(self.count)  # nothing in the first tick, all but the chunk's last action later
        weight, before, after = (
            one[:, None] for one in (self.weights[self.count], self.sums[self.count - 1], self.sums[self.count])
        )
        mean = (self.mean.view(known, chunk.shape[1]) * before + chunk[:known] * weight) / after
        mean, count = (
            torch.cat([mean, chunk[known:]]),
            torch.cat([self.count + 1, torch.ones(len(chunk) - known).long()]),
        )
        self.mean, self.count = mean[1:], count[1:]
        return mean[0]
