"""Control: transformers' Decision Transformer swings gymnasium's pendulum up, dense and routed.

python -m examples.gallery.02_decision_transformer          about six minutes of one core a seed

It learns from episodes of a scripted policy, of which a share of steps, another in each episode, is random: returns
from the policy's own down to those of chance. At test it is asked for what the policy gets from the same start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from examples.gallery.dense_and_routed import Options, Task, compare, row
from examples.gallery.rows import here, keep

OPTIONS = Options(dense=1000, soft=100, hard=100, batch=64, rate=1e-3)
SIZES = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "n_inner": 256}
STEPS, CONTEXT, EPISODES, TESTED = 200, 20, 200, 60
RETURN_SCALE, STRONGEST = 500.0, 2.0  # of a return; of a torque
SPEED = np.array([1.0, 1.0, 1 / 8])  # of states: cosine and sine of the angle, and a speed up to 8

Array = NDArray[np.float64]
Policy = Callable[[Array], Array]  # states [n, 3] -> torques [n] in -1..1


class Episodes(NamedTuple):
    """[n, STEPS, ...]: states, scaled; actions in -1..1; returns to go, scaled."""

    states: Tensor
    actions: Tensor
    returns: Tensor


def swing_up(states: Array) -> Array:
    """Pumps energy until the pendulum can reach the top, and holds it there."""
    cosine, sine, speed = states.T
    missing = 15.0 * (1.0 - cosine) - speed**2 / 2  # energy that the top has more
    hold = -(10.0 * np.arctan2(sine, cosine) + 3.0 * speed)
    pump = np.sign(missing * speed + 1e-6) * STRONGEST
    torque: Array = np.where(cosine > 0.9, hold, pump)
    return (torque / STRONGEST).clip(-1.0, 1.0)


def play(act: Policy, n: int, seed: int, steps: int = STEPS) -> tuple[Array, Array, Array]:
    """n episodes side by side: states [n, steps, 3], actions [n, steps], rewards [n, steps]."""
    import gymnasium

    world: Any = gymnasium.make_vec("Pendulum-v1", num_envs=n, vectorization_mode="sync")
    states, actions, rewards = np.zeros((n, steps, 3)), np.zeros((n, steps)), np.zeros((n, steps))
    state, _ = world.reset(seed=seed)
    for step in range(steps):
        states[:, step], actions[:, step] = state, act(state)
        state, rewards[:, step], *_ = world.step((actions[:, step, None] * STRONGEST).astype(np.float32))
    world.close()
    return states, actions, rewards


def recorded(n: int, seed: int, steps: int = STEPS) -> Episodes:
    """Episodes of the scripted policy, each with a share of random steps of its own."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0, 1, n) ** 2  # more of them near the policy's own

    def noisy(states: Array) -> Array:
        return np.where(rng.uniform(size=n) < noise, rng.uniform(-1, 1, n), swing_up(states))

    states, actions, rewards = play(noisy, n, seed, steps)
    to_go = rewards[:, ::-1].cumsum(1)[:, ::-1] / RETURN_SCALE
    return Episodes(*(torch.tensor(x.copy(), dtype=torch.float32) for x in (states * SPEED, actions, to_go)))


def inputs(episodes: Episodes, rows: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """Windows of CONTEXT steps, as the model takes them."""
    times = starts[:, None] + torch.arange(CONTEXT)
    states, actions, returns = (part[rows[:, None], times] for part in episodes)
    return as_inputs(states, actions, returns, times)


def as_inputs(states: Tensor, actions: Tensor, returns: Tensor, times: Tensor) -> dict[str, Tensor]:
    return {"states": states, "actions": actions[..., None], "returns_to_go": returns[..., None], "timesteps": times}


def mean_return(model: nn.Module, seed: int, wanted: Array, steps: int = STEPS) -> float:
    """Of episodes that the model steers, each asked for a return of `wanted` [n]."""
    import gymnasium

    n = len(wanted)
    world: Any = gymnasium.make_vec("Pendulum-v1", num_envs=n, vectorization_mode="sync")
    states, actions, to_go = torch.zeros(n, steps, 3), torch.zeros(n, steps), torch.zeros(n, steps)
    state, _ = world.reset(seed=seed)
    reached, left = np.zeros(n), wanted
    for step in range(steps):
        states[:, step] = torch.tensor(state * SPEED)
        to_go[:, step] = torch.tensor(left / RETURN_SCALE)
        seen = slice(max(0, step + 1 - CONTEXT), step + 1)
        times = torch.arange(steps)[seen].expand(n, -1)
        with torch.no_grad():
            made = model(**as_inputs(states[:, seen], actions[:, seen], to_go[:, seen], times)).action_preds
        actions[:, step] = made[:, -1, 0]
        state, reward, *_ = world.step(actions[:, step, None].numpy() * np.float32(STRONGEST))
        reached, left = reached + reward, np.minimum(left - reward, 0.0)  # rewards are costs
    world.close()
    return float(reached.mean())


def task(episodes: Episodes, seed: int, options: Options, wanted: Array) -> Task:
    """wanted: returns [n] that the model is asked for at test."""
    torch.manual_seed(seed)
    config = DecisionTransformerConfig(
        state_dim=3,
        act_dim=1,
        max_ep_len=STEPS,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        **SIZES,
    )
    n, length = episodes.actions.shape

    def batch(step: int, size: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return inputs(
            episodes,
            torch.randint(n - n // 10, (size,), generator=g),
            torch.randint(length - CONTEXT + 1, (size,), generator=g),
        )

    def loss(model: nn.Module, step: int) -> Tensor:
        given = batch(step, options.batch)
        return nn.functional.mse_loss(model(**given).action_preds, given["actions"])

    last = torch.arange(n - n // 10, n).repeat_interleave(4)  # episodes that nothing is trained on
    starts = torch.arange(4).repeat(len(last) // 4) * ((length - CONTEXT) // 4)
    facts = {
        "example": "02_decision_transformer",
        "data": "gymnasium: Pendulum-v1",
        "model": "DecisionTransformerModel",
    }
    return Task(
        model=DecisionTransformerModel(config),
        loss=loss,
        score=lambda model: mean_return(model, 1000 + seed, wanted),
        batches=[batch(-1 - part, 64) for part in range(8)],
        held_out=[inputs(episodes, last, starts)],
        facts={**facts, "metric": "return", "seed": seed, **here("gymnasium")},
    )


def main(options: Options = OPTIONS) -> None:
    rows = []
    for seed in options.seeds:
        start = time.perf_counter()
        episodes = recorded(EPISODES, seed)
        scripted = play(swing_up, TESTED, 1000 + seed)[2].sum(1)
        work = task(episodes, seed, options, wanted=scripted)
        rows.append(row(work, side="scripted policy", value=scripted.mean(), seconds=time.perf_counter() - start))
        for found in compare(work, options):
            print(f"seed {seed} {found.side} {found.target:.0%} {found.stage}: {found.value:.1f}", flush=True)
            rows.append(found)
        keep(rows)


if __name__ == "__main__":
    main()
