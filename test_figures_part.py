"""Tests of figures.py, to be merged into test_run.py."""

import itertools
import json
import math
import os

import numpy as np
import pytest
import torch

import figures
import run
from srpo import Settings

torch.set_num_threads(1)
HOPPER = "hopper-medium-v2"

# ---------------- figures.py: the report


def finished_run(
    folder, *, kind="D4RL", scores=(90, 94, 98, 102), seeds=(0, 1), **more
):
    """A run's folder as training leaves it: half of the scores are of each seed."""
    fact = {"step": 10**6, "loss": 0.5, "q": 0.0} | more
    settings = vars(Settings(folder.name, **{"episodes": 2} | more.get("settings", {})))
    info = {"kind": kind, "sha256": "0f", "data_score": 50.0, "largest_reward": 10.0}
    config = run.describe(folder.name, Settings(folder.name), [*seeds], info, "cpu")
    config["settings"] = settings
    each = itertools.product(settings["beta"], enumerate(scores))
    rows = [
        ["srpo", fact["step"], seeds[i * len(seeds) // len(scores)], beta, i % 2, 0, x]
        for beta, (i, x) in each
    ]
    rows = [dict(zip(run.COLUMNS["scores"], row)) for row in rows]
    log = [{"stage": "critic", "step": 1, "seed": seed, "q": 5.0} for seed in seeds]
    log[0]["value_loss"], log[-1]["q"] = fact["loss"], fact["q"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scores.csv").write_text(run.table_text("scores", rows))
    (folder / "log.csv").write_text(run.table_text("log", log))
    return config | {"scores": [row | {"step": None} for row in rows]}


def test_report_compares_final_scores_on_d4rls_data_and_lists_what_it_cannot_use(
    tmp_path, capsys
):
    no_baseline = {"settings": {"baseline": False}}
    runs = {  # 92 and 100 are the seeds' means, 95.5 the paper's; |Q| ≤ 10 / (1 − γ)
        HOPPER: ({}, "96.0 ± 5.7", "2 × 2", "+0.5 [-3.5, +4.5]"),
        "walker2d-medium-v2": (
            {"kind": "stand-in"},
            "96.0 ± 5.7 (stand-in data)",
            "2 × 2",
            "",
        ),
        "walker2d-medium-expert-v2": ({"step": 50_000}, "unfinished"),
        "walker2d-medium-replay-v2": (no_baseline, "96.0 ± 5.7", "2 × 2", ""),
        "halfcheetah-medium-replay-v2": (
            {"scores": (90, 94), "seeds": [7]},
            "92.0",
            "1 × 2",
            "+40.6 (one seed)",
        ),
        "hopper-medium-replay-v2": ({"scores": (1, "1O", 2, 3)}, "damaged"),
        f"no-baseline/{HOPPER}": (no_baseline,),
        f"sweep/{HOPPER}": (
            {"settings": {"beta": (0.01, 0.05)}, "loss": math.nan, "q": 1001.0},
        ),
    }
    for name, (how, *_) in runs.items():
        finished_run(tmp_path / name, **how)
    (tmp_path / "halfcheetah-medium-v2").mkdir()  # it ended before it began
    assert figures.main(["report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines()]
    table_1 = {line[0][2:]: line[10:13] for line in lines if len(line) == 14}
    runs["halfcheetah-medium-v2"] = {}, "not run"
    runs["average, locomotion"] = {}, "incomplete (2 of 9)"
    runs["interquartile mean of all runs"] = {}, "96.0 [92.0, 100.0]"
    for name, (_, *cells) in runs.items():
        if cells and "interquartile" not in name:
            assert table_1[name][: len(cells)] == cells
    told = capsys.readouterr().out
    words = (
        "no-baseline/",
        "baseline False",
        "config.json",
        "1O",
        "0 lost",
        "1 diverged",
    )
    assert all(x in told for x in words)
    drawn = {path.name for path in tmp_path.glob("*.p*")}
    kinds = "curves", "critic", "sweep"
    assert drawn == {f"{x}.{ending}" for x in kinds for ending in ("png", "pdf")}
    means = [np.array([0.0, 100, 5, -1, 4, 99]), np.array([5.0, 6, 7, 8, 3, 1e9])]
    middle = (4 + 5 + 5 + 6 + 7 + 8) / 6
    assert figures.interquartile_mean(means) == pytest.approx(middle)


def test_report_joins_other_seeds_and_refuses_evaluations_of_another_run(
    tmp_path, capsys
):
    made = finished_run(tmp_path / HOPPER)
    finished_run(tmp_path / "more" / HOPPER, scores=(10, 10), seeds=[2])
    for other, score in ({"seeds": [0, 1]}, "3 × 2"), ({"seeds": [0, 9]}, "3 × 2"):
        path = tmp_path / HOPPER / "evaluation-srpo.json"
        path.write_text(json.dumps(made | other))
        figures.report(tmp_path)
        told = capsys.readouterr().out
        assert score in told
        assert ("of another run (seeds)" in told) == (other["seeds"] != [0, 1])


def test_report_writes_nothing_into_a_runs_folder(tmp_path, capsys):
    finished_run(tmp_path / HOPPER)
    before = {*os.listdir(tmp_path / HOPPER)}
    assert figures.main(["report", "--out", str(tmp_path / HOPPER)]) == 2
    assert "is a run's folder" in capsys.readouterr().err
    assert {*os.listdir(tmp_path / HOPPER)} == before
