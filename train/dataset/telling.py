"""Do the joints alone tell what to do? Then few samples need the picture, and a policy learns late, or never, to look.

Measured on simulated tasks: where an arm goes straight for its goal 5 % of the samples need the picture, and a policy stayed
blind; where it first goes to one pose for all goals 12 to 15 %, and policies learned to look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataset.normalize import STD_FLOOR

EPISODES = 20  # the least to tell
TIMES, AHEAD = 40, 4  # moments of an episode, and of its chunk, that are looked at
RIDGE = 1e-4
FEW = 0.08


def needs_picture(state: np.ndarray, action: np.ndarray, lengths: Sequence[int], chunk_size: int) -> float | None:
    """The share of moments at which a linear probe of the state does not tell the coming chunk; None for few episodes.

    States are (N, S), actions (N, A), of episodes of some lengths. At each time since an episode's start the probe learns
    from four of five episodes how the chunk departs from its mean, and is judged by the others: it tells if it halves that.
    """
    count = len(lengths)
    if count < EPISODES:
        return None
    starts = np.cumsum([0, *lengths[:-1]])
    ends = (starts + lengths)[:, None]
    ahead = np.linspace(0, chunk_size - 1, AHEAD).astype(int)
    state, action = (rows / rows.std(axis=0).clip(STD_FLOOR) for rows in (state, action))
    learns = np.arange(count) % 5 > 0
    untold = []
    for time in np.linspace(0, min(lengths) - 1, TIMES).astype(int):
        x = state[starts + time].astype(np.float64)
        y = action[np.minimum(starts[:, None] + time + ahead, ends - 1)].reshape(count, -1).astype(np.float64)
        x, y = x - x[learns].mean(axis=0), y - y[learns].mean(axis=0)
        ridge = RIDGE * learns.sum() * np.eye(x.shape[1])
        weights = np.linalg.solve(x[learns].T @ x[learns] + ridge, x[learns].T @ y[learns])
        left, all_ = np.abs(y - x @ weights)[~learns].mean(), np.abs(y)[~learns].mean()
        untold.append(left > all_ / 2 and all_ > 0.05)  # of a standard deviation: else all episodes do the same
    return float(np.mean(untold))
