"""A trained policy on the robot: an observation in, the action of this tick out, in the robot's units.

    policy = Policy.load("outputs/train-rosbag-act/checkpoint_100000", fps=30, action_as="absolute", action_names=MY_JOINTS)
    policy.reset()                                                # before each episode
    while running:                                                # policy.fps times per second
        joints = robot.joint_states()                             # names in any order
        observation = {
            "state": dict(zip(joints.name, joints.position)),     # or an array in the order of policy.state_names
            "images": {"color": camera.rgb()},                    # (H, W, 3) uint8 RGB, as the camera gives it
        }                                                         # may be left out unless policy.needs_observation
        robot.command(policy.action_names, policy.act(observation))

Needs only torch, numpy, safetensors, cv2 and yaml.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import WHOLE
from dataset.normalize import EPS
from faults import Fault
from policy import pretrained
from policy.pretrained import Pretrained
from recordings.images import view

UNKNOWN = "unknown"  # for LeRobot's own checkpoints
FAR = 10  # standard deviations from the mean of training: degrees for radians are farther


class Policy:
    """A policy that acts tick by tick."""

    def __init__(self, policy: Pretrained, ensemble: float | None = None) -> None:
        robot = policy.robot
        self.pretrained = policy
        self.fps: float | None = robot.fps if robot else None
        self.state_names: tuple[str, ...] = tuple(robot.state_names) if robot else ()
        self.action_names: tuple[str, ...] = tuple(robot.action_names) if robot else ()
        self.action_as: str = robot.action_as if robot else UNKNOWN  # delta: add to the state at the action's tick
        self.cameras = tuple(policy.normalizer.cameras)
        # camera: (height, width) of the recorded pictures; LeRobot's have the network's size
        self.picture_sizes: dict[str, list[tuple[int, int]]] = {
            name: [(h, w) for h, w in robot.cameras[name].recorded] if robot else [policy.image_size]
            for name in self.cameras
        }
        self._parts = robot.parts if robot else [WHOLE] * len(self.cameras)
        # index in the state of each action's joint, to turn targets into deltas or deltas into targets
        self._joints: list[int] | None = None
        ensemble = policy.ensemble if ensemble is None else ensemble
        self._seen = [moment.cpu().numpy() for moment in policy.normalizer.state]  # mean and standard deviation
        self._named = self.state_names or [f"number {i}" for i in range(len(self._seen[0]))]
        self._far: set[int] = set()  # the numbers of the state that were warned of
        self.ensembler = None if ensemble is None else Ensembler(ensemble, policy.config.chunk_size)
        self.reset()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        ensemble: float | None = None,
        *,
        n_action_steps: int | None = None,
        fps: float | None = None,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
        action_as: str | None = None,
    ) -> Policy:
        """From a checkpoint or a pretrained_model folder, ours or of LeRobot >= 0.4.0.

        `ensemble` is the coefficient of temporal ensembling (0.01 in the paper), by default that of config.json; without
        it the robot executes `n_action_steps` of each chunk, by default those of config.json. The other keyword arguments
        say what the robot has. Give `action_as` to get targets from a policy of deltas, or deltas from one of targets.
        Raises Fault with everything that differs.
        """
        loaded = pretrained.load(Path(path), device)
        if n_action_steps is not None:
            longest = loaded.config.chunk_size
            if not isinstance(n_action_steps, int) or not 1 <= n_action_steps <= longest:
                raise Fault(f"n_action_steps: {n_action_steps!r}; expected 1 to {longest}, the length of a chunk")
            loaded = loaded._replace(config=replace(loaded.config, n_action_steps=n_action_steps))
        policy = cls(loaded, ensemble)
        has: dict[str, tuple[Any, Any]] = {
            "fps": (fps, policy.fps),
            "state_names": (state_names and tuple(state_names), policy.state_names),
            "action_names": (action_names and tuple(action_names), policy.action_names),
            "action_as": (action_as, action_as if action_as and policy._can_give(action_as) else policy.action_as),
        }
        faults = [
            f"{path}: {name}: the robot has {theirs!r}, the policy {ours!r}; expected the same; use another checkpoint or "
            "change the robot"
            if policy.pretrained.robot
            else f"{path}: {name}: the robot has {theirs!r}, LeRobot's checkpoint does not say; check how it was trained and "
            f"load it without {name}"
            for name, (theirs, ours) in has.items()
            if theirs is not None and theirs != ours
        ]
        if faults:
            raise Fault(*faults)
        return policy

    def _can_give(self, action_as: str) -> bool:
        """Whether the policy gives such actions; if needed, set up the conversion by the present state."""
        names, known = self.action_names, self.state_names
        same_joints = set(names) == set(known) and len(set(names)) == len(names)
        if {action_as, self.action_as} == {"absolute", "delta"} and same_joints:
            self.action_as, self._joints = action_as, [known.index(name) for name in names]
        return action_as == self.action_as

    def reset(self) -> None:
        """Forget the chunks of the last episode."""
        self._chunk = torch.empty(0)  # its actions that are still to come
        if self.ensembler:
            self.ensembler.reset()

    @property
    def needs_observation(self) -> bool:
        """Whether the next act() looks at the pictures; while a chunk is being executed it does not."""
        return self.ensembler is not None or not len(self._chunk)

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (A,) float32 of this tick: a target or a delta, see action_as.

        `observation` is {"state": (S,) numbers or {name: number}, "images": {camera: (H, W, 3) uint8 RGB}}, with pictures
        as the cameras give them. Raises Fault if the observation or the prediction is broken; then the policy also
        forgets its chunks, because their ticks pass.
        """
        try:
            state, images = self._checked(observation)
            if self.ensembler:
                action = self.ensembler.update(self._chunk_for(state, images))
            else:
                if not len(self._chunk):
                    self._chunk = self._chunk_for(state, images)[: self.pretrained.config.n_action_steps]
                action, self._chunk = self._chunk[0], self._chunk[1:]
        except BaseException:
            self.reset()
            raise
        if self._joints is None:
            return action.numpy()
        return action.numpy() + (1 if self.action_as == "absolute" else -1) * state[self._joints]

    def _chunk_for(self, state: np.ndarray, images: list[np.ndarray]) -> Tensor:
        """The chunk (T, A) for one observation."""
        size = self.pretrained.image_size
        views = [view(image, size, part) for image, part in zip(images, self._parts, strict=True)]
        pixels = torch.from_numpy(np.stack(views)[None]) if images else None
        return self.pretrained.predict(torch.from_numpy(state)[None], pixels)[0]

    def _checked(self, observation: Mapping[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
        """State (S,) float32 and pictures, in the policy's order. Raises Fault with all faults."""
        if not isinstance(observation, Mapping):
            raise Fault(f"observation: a {type(observation).__name__}; expected a mapping with state and images")
        faults: list[str] = []
        state = self._checked_state(observation.get("state"), faults)
        images = observation.get("images", {})
        if "images" not in observation and not self.needs_observation:
            if faults:
                raise Fault(*faults)
            return state, []
        if not isinstance(images, Mapping):
            faults.append(f"observation: images is a {type(images).__name__}; expected a mapping of camera to picture")
            images = {}
        elif set(images) != set(self.cameras):
            faults.append(f"observation: images of {sorted(images, key=str)}; expected {sorted(self.cameras)}")
        pictures = {name: _array(images[name]) for name in self.cameras if name in images}
        faults += [fault for name, picture in pictures.items() if (fault := self._picture_fault(name, picture))]
        if faults:
            raise Fault(*faults)
        return state, list(pictures.values())

    def _checked_state(self, state: Any, faults: list[str]) -> np.ndarray:
        """(S,) float32; useless if faults are appended."""
        size = len(self.pretrained.normalizer.state.mean)
        if isinstance(state, Mapping):
            if len(set(self.state_names)) < size:
                faults.append(
                    f"observation: state by name, but the policy has no {size} names; give an array ({size},)"
                )
                return np.zeros(0)
            if missing := sorted(set(self.state_names) - set(state)):  # a driver may publish more than needed
                faults.append(f"observation: state is missing {missing}; it has {sorted(state, key=str)}")
                return np.zeros(0)
            state = [state[name] for name in self.state_names]
        try:
            numbers = np.asarray(state)
            if numbers.dtype.kind not in "iuf" or numbers.shape != (size,):
                raise ValueError(f"an array {numbers.shape} of {numbers.dtype}")
        except (ValueError, TypeError) as error:  # TypeError: a tensor on a GPU
            faults.append(f"observation: state is {error}; expected ({size},) numbers: {', '.join(self.state_names)}")
            return np.zeros(0)
        with np.errstate(over="ignore"):
            numbers = numbers.astype(np.float32)
        for i in np.flatnonzero(~np.isfinite(numbers)):
            faults.append(
                f"observation: state of {self._named[i]} is {numbers[i]}; expected a finite number; is its driver running?"
            )
        if not faults:
            self._warn_of_far(numbers)
        return numbers

    def _warn_of_far(self, state: np.ndarray) -> None:
        """Warn once of each number that is far outside of what training saw; the policy acts all the same."""
        distances = np.abs(state - self._seen[0]) / (self._seen[1] + EPS)
        for i in set(np.flatnonzero(distances > FAR).tolist()) - self._far:
            self._far.add(i)
            warnings.warn(
                f"state of {self._named[i]} is {state[i]:g}, {distances[i]:.0f} standard deviations from its mean in training, "
                f"{self._seen[0][i]:g}; expected below {FAR}; has the robot the units and zeros of the recordings?",
                stacklevel=4,
            )

    def _picture_fault(self, camera: str, picture: np.ndarray) -> str:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            return f"observation: image {camera}: {picture.shape} {picture.dtype}; expected (H, W, 3) uint8 RGB"
        height, width = picture.shape[:2]
        if any(height * w == width * h for h, w in self.picture_sizes[camera]):
            return ""
        trained = ", ".join(f"{w}x{h}" for h, w in self.picture_sizes[camera])
        return f"observation: image {camera}: {width}x{height}; expected the aspect ratio of {trained}; set the camera as recorded"


def _array(picture: Any) -> np.ndarray:
    try:
        return np.asarray(picture)
    except (ValueError, TypeError):  # rows of several lengths, a tensor on a GPU
        return np.array(None)


class Ensembler:
    """Temporal ensembling (algorithm 2 of arXiv:2304.13705), updated online as LeRobot does.

    Each tick's action is the mean of all predictions for it, weighted by exp(-coefficient * i), i = 0 the oldest; 0 weighs
    all the same, a negative coefficient prefers the newest.
    """

    def __init__(self, coefficient: float, chunk_size: int) -> None:
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
            raise Fault(f"ensemble: {coefficient!r}; expected a number, about 0.01")
        self.weights = torch.exp(-coefficient * torch.arange(chunk_size))
        self.sums = self.weights.cumsum(0)
        if not self.sums.isfinite().all():
            raise Fault(f"ensemble: {coefficient} over {chunk_size} ticks is not finite; expected about 0.01")
        self.reset()

    def reset(self) -> None:
        self.mean = torch.empty(0)  # (T - 1, A) of the coming ticks
        self.count = torch.empty(0, dtype=torch.long)  # (T - 1,) of predictions in each mean

    def update(self, chunk: Tensor) -> Tensor:
        """The action (A,) of this tick, given the chunk (T, A) predicted at it."""
        known = len(self.count)  # 0 at the first tick, T - 1 later
        weight, before, after = self.weights[self.count], self.sums[self.count - 1], self.sums[self.count]
        mean = self.mean.view(known, chunk.shape[1]) * before[:, None] + chunk[:known] * weight[:, None]
        mean = torch.cat([mean / after[:, None], chunk[known:]])
        count = torch.cat([self.count + 1, torch.ones(len(chunk) - known).long()])
        self.mean, self.count = mean[1:], count[1:]
        return mean[0]
