"""Tests of figures.py, to be merged into test_run.py."""

import json
import math
import os

import torch
from PIL import Image

import figures
import run
from srpo import Settings

torch.set_num_threads(1)
HOPPER = "hopper-medium-v2"

# ---------------- figures.py


def finished_run(folder, seeds=(0, 1), scores=(90, 94, 98, 102), **more):
    """A run's folder as training leaves it, with two episodes a seed; its config."""
    facts = {"kind": "D4RL", "step": 10**6, "loss": 0.5, "q": 0.0, "settings": {}}
    facts |= more
    settings = Settings(folder.name, episodes=2, **facts["settings"])
    config = run.describe(folder.name, settings, [*seeds], "cpu")
    config["data"] = {"sha256": "0f", "data_score": 50.0, "largest_reward": 10.0}
    config["data"]["kind"], rows = facts["kind"], []
    for beta in settings.beta:
        for i, score in enumerate(scores):
            row = "srpo", facts["step"], seeds[i // 2], beta, i % 2, 0, score
            rows.append(dict(zip(run.COLUMNS["scores"], row)))
    log = [dict.fromkeys(run.COLUMNS["log"], "") | {"seed": seed} for seed in seeds]
    log = [row | {"stage": "critic", "step": 1, "q": 5.0} for row in log]
    log[0]["value_loss"], log[-1]["q"] = facts["loss"], facts["q"]
    figures.write_csv(folder / "scores.csv", rows)
    figures.write_csv(folder / "log.csv", log)
    (folder / "config.json").write_text(json.dumps(config))
    return config | {"scores": [row | {"step": None} for row in rows]}


def test_report_compares_final_scores_on_d4rls_data_and_lists_what_it_cannot_use(
    tmp_path, capsys
):
    ours, other = "96.0 ± 5.7 (2 × 2)", {"settings": {"baseline": False}}
    sweep = {"settings": {"beta": (0.01, 0.05)}, "loss": math.nan, "q": 1001.0}
    runs = {  # 92 and 100 are the seeds' means, 95.5 the paper's; |Q| ≤ 10 / (1 − γ)
        HOPPER: ({}, ours, "0.05", "+0.5 [-3.5, +4.5]"),
        "walker2d-medium-v2": ({"kind": "any"}, f"{ours} (any data)", "0.05", ""),
        "walker2d-medium-expert-v2": ({"step": 50_000}, "unfinished", "0.1", ""),
        "walker2d-medium-replay-v2": (other, ours, "0.5 baseline False", ""),
        "halfcheetah-medium-replay-v2": (
            *({"seeds": [7], "scores": (90, 94)}, "92.0 (1 × 2)"),
            *("0.2", "+40.6 (one seed)"),
        ),
        "hopper-medium-replay-v2": ({"scores": (1, "1O", 2, 3)}, "not run", "", ""),
        f"no-baseline/{HOPPER}": (other,),
        f"sweep/{HOPPER}": (sweep,),
    }
    for name, (how, *_) in runs.items():
        finished_run(tmp_path / name, **how)
    assert figures.main(["report", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    table_1 = {line[0]: line[10:] for line in lines if len(line) == 13}
    runs["average, locomotion"] = {}, "2 of 9 tasks", "", ""
    for name, (_, *cells) in runs.items():
        assert not cells or table_1[name] == cells
    told = capsys.readouterr().out
    for text in "no-baseline/", "baseline False", "damaged or", "0 lost", "1 diverged":
        assert text in told
    for name in "curves", "critic", "sweep":
        assert {path.suffix for path in tmp_path.glob(f"{name}.*")} == {".png", ".pdf"}


def test_report_joins_seeds_of_other_folders_and_leaves_out_evaluations_of_another_run(
    tmp_path, capsys
):
    made = finished_run(tmp_path / HOPPER)
    finished_run(tmp_path / "more" / HOPPER, seeds=[2], scores=(10, 10))
    evaluation = tmp_path / HOPPER / "evaluation-srpo.json"
    for other in {}, {"settings": made["settings"] | {"tau": 0.8}}:
        evaluation.write_text(json.dumps(made | other))
        figures.report(tmp_path)
        told = capsys.readouterr().out
        assert "(3 × 2)" in told
        assert ("is another run's (tau)" in told) == bool(other)


def test_report_given_a_runs_own_folder_or_none_writes_nothing(tmp_path, capsys):
    finished_run(folder := tmp_path / HOPPER)
    before = os.listdir(folder)
    assert figures.main(["report", "--out", str(folder)]) == 2
    assert os.listdir(folder) == before
    (tmp_path / "none").mkdir()
    assert figures.main(["report", "--out", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert "is a run's folder" in told and "holds no run" in told


def test_bandit_draws_what_is_in_the_exact_support(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "QUICK", {"behavior_steps": 2, "behavior_batch": 8})
    monkeypatch.setattr(figures, "STEPS", 2)
    monkeypatch.setattr(figures, "log_likelihood", lambda *what, steps: what[2][..., 0])
    assert figures.main(["bandit", "--quick", "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "bandit.csv").read_text().splitlines()) > 30
    for name in "bandit.png", "bandit_ensemble.png":
        with Image.open(tmp_path / name) as image:
            assert image.width > image.height
    # the inside is what holds 99 % of the data, the middle of the ring is not in it
    ring = figures.behavior_distributions()["8 Gaussians"]
    data = ring.sample(20_000, seed=1)
    assert (ring.margin(data, ring.sample(5000, 0)) >= 0).float().mean() > 0.98
    assert ring.margin(torch.zeros(1, 2), data) < 0


def test_speed_times_every_way(tmp_path, monkeypatch):
    def few(task):
        return Settings(task, critic_batch=4, behavior_batch=4, policy_batch=4)

    monkeypatch.setattr(figures, "Settings", few)
    monkeypatch.setattr(figures, "compiled", lambda losses: losses)
    monkeypatch.setattr(figures, "TURNS", [None, (1, 1e-3)])
    where = ["--out", str(tmp_path)]
    assert figures.main(["speed", "--quick", "--seeds", "1", *where]) == 0
    text = (tmp_path / "speed.csv").read_text()
    for stage in "critic", "behavior", "srpo":
        assert f"{stage},eager" in text and f"{stage},compiled" in text


def test_film_shows_an_episode(tmp_path):
    folder, few = tmp_path / "maze2d-umaze-v1", {"beta": 1.0, "policy_width": 4}
    finished_run(folder, kind="stand-in", settings=few)
    settings = Settings(folder.name, **few)
    policies = run.Networks(run.srpo.builders(settings, 4, 2)["policy"], [0, 1], "", 1)
    torch.save({"policy": policies.network.state_dict()}, folder / "srpo.pt")
    assert figures.main(["film", str(folder), "--seed", "1"]) == 0
    with Image.open(folder / "film.gif") as film:
        assert film.width == 640 and film.n_frames > 1
