"""The `report` and `film` commands of figures.py."""
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np

import data
import srpo
from data import UserError

matplotlib.use("agg")
from matplotlib import animation, collections, pyplot  # noqa: E402

# ------------------------------------------------------------------ report: Table 1, Fig. 6, 8 and 13 to 16

PAPER = """
BEAR 53.4 96.3 40.1 41.7 52.1 59.1 38.6 33.7 19.2 73.0 61.0 0.0 8.0 0.0 0.0
TD3+BC 90.7 98.0 110.1 48.3 59.3 83.7 44.6 60.9 81.8 78.6 71.4 10.6 3.0 0.2 0.0
IQL 86.7 91.5 109.6 47.4 66.3 78.3 44.2 94.7 73.9 87.5 62.2 71.2 70.0 39.6 47.5
SfBC 92.6 108.6 109.8 45.9 57.1 77.9 37.1 86.2 65.1 92.0 85.3 81.3 82.0 59.3 45.5
Diffuser 79.8 107.2 108.4 44.2 58.5 79.7 42.2 101.3 61.2 nan nan nan nan nan nan
Diffusion-QL 96.8 111.1 110.1 51.1 90.5 87.0 47.8 100.7 95.5 93.4 66.2 76.6 78.6 46.4 56.6
QGPO 93.5 108.0 110.7 54.1 98.0 86.0 47.6 96.9 84.4 96.4 74.4 83.6 83.8 66.6 64.8
IDQL 95.9 108.6 112.7 51.0 65.4 82.5 45.9 92.1 85.1 94.0 80.2 84.5 84.8 63.5 67.9
SRPO 92.2 100.1 114.0 60.4 95.5 84.4 51.4 101.2 84.6 97.1 82.1 80.7 75.0 53.6 53.6
± 3.0 13.9 2.1 0.8 2.0 4.4 3.4 1.0 7.1 2.7 10.8 7.1 12.3 12.5 6.3
"""  # Table 1 of the paper, its tasks in the order of Table 2: means of 6 seeds, SRPO's standard deviation
PAPER = {method: dict(zip(srpo.TABLE_2, map(float, values)))
         for method, *values in map(str.split, PAPER.strip().splitlines())}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
METHODS = ("srpo", "iql", "bc", "idql", "random")
REPORT = """# {out} beside the paper

Scores: mean over seeds ± standard deviation of the seeds' means, at the final step, or of `srpo.py evaluate`
where it was run. [ ]: 95 % bootstrap interval over each task's seeds, the paper's mean taken as exact.
Averages and interquartile mean hold D4RL's own data alone. The paper's averages are those of its rows (it
prints 51.9 for BEAR in locomotion, and elsewhere up to 0.5 more or less). ms: for one action, as `srpo.py
evaluate` timed it. Of several β, Table 1 takes the task's default, else the first. Ablations (Fig. 8, 14)
are runs with other settings. A seed diverged if a loss was not finite, or if the critic's |Q|, averaged over
a batch, was above what the largest reward can add up to (where that isn't known: 1 a step in mazes, 10
elsewhere).
"""


def default(task, name):
    return getattr(srpo.Settings().resolve(task), name)


def read_csv(path, columns):
    """The rows of a run's CSV file, numbers as float, empty fields as None; without half a last line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = list(csv.DictReader([line for line in lines if line.endswith("\n")], restval="missing"))
    if any(tuple(row) != columns for row in rows):
        raise UserError(f"{path.name} has other columns")
    return [{key: x if key in ("stage", "method") else float(x) if x else None for key, x in row.items()}
            for row in rows]


def read_run(folder, name):
    """A run's config, its log, scores {(method, β, step): [seeds, episodes]}; any exception if it is none.

    final: {(method, β): scores}, a later evaluation's before those of the last step.
    """
    run = SimpleNamespace(**srpo.read_config(folder), name=name, scores={}, final={}, milliseconds={})
    task, given, kind, beta = run.task, run.settings, run.data["kind"], default(run.task, "beta")[0]
    run.mark, run.betas = "" if kind == "D4RL" else f" ({kind} data)", [*map(float, given["beta"])]
    run.data_score = float(run.data["data_score"])
    run.beta = beta if beta in run.betas else run.betas[0]
    run.other = ", ".join(f"{key} {x}" for key, x in given.items() if x != default(task, key)
                          and key not in ("beta", "also", "episodes", "evaluations", "any_data"))
    rows = [row for path in folder.glob("evaluation-*.csv") for row in read_csv(path, srpo.SCORES)]
    for row in read_csv(folder / "scores.csv", srpo.SCORES) + rows:
        key = row["method"], row["beta"], row["step"]
        run.scores.setdefault(key, {seed: [] for seed in run.seeds})[row["seed"]].append(row["score"])
    run.scores = {key: np.array([*cell.values()], float) for key, cell in run.scores.items()
                  if len({*map(len, cell.values())}) == 1}  # else half of it is still to come
    if not all(np.isfinite(scores).all() for scores in run.scores.values()):
        raise UserError("a score is not finite")
    for step in (given["policy_steps"], None):
        run.final.update({key[:2]: scores for key, scores in run.scores.items() if key[2] == step})
    for path in folder.glob("evaluation-*.json"):
        facts = json.loads(path.read_text())
        run.milliseconds[path.stem.split("-")[1]] = float(facts["milliseconds_per_action"])
    run.log = read_csv(folder / "log.csv", srpo.LOG)
    bound = run.data.get("largest_reward", 1 if "maze" in task else 10) / (1 - given["gamma"])
    diverged = {row["seed"] for row in run.log if row["alive"] == 0 or
                row["stage"] == "critic" and not abs(row["q"]) <= bound}
    run.q = {f"seed {seed}" + " diverged" * (seed in diverged): {
        float(row["step"]): [row["q"]] for row in run.log if (row["stage"], row["seed"]) == ("critic", seed)}
        for seed in run.seeds}
    whole = {("srpo", beta) for beta in run.betas} | {(method, None) for method in given["also"]}
    last = " ({stage}, step {step:,.0f})".format(**run.log[-1]) if run.log else ""
    run.status = ", ".join(["finished" if whole <= {*run.final} else "unfinished" + last,
                            *(name for name in run.q if "diverged" in name)])
    return run


def mean_std(scores):
    return f"{scores.mean():.1f} ± {scores.mean(1).std():.1f}"


def mean(tasks):
    return np.mean([means.mean(-1) for means in tasks], 0)


def interquartile_mean(tasks):
    """The mean of all runs' middle half, as rliable has it (Agarwal et al., 2021)."""
    means = np.sort(np.concatenate(tasks, -1), -1)
    cut = means.shape[-1] // 4
    return means[..., cut : means.shape[-1] - cut].mean(-1)


def with_interval(statistic, tasks, minus=None):
    """A statistic of the tasks' seed means, less a number, and its interval: seeds are drawn by task."""
    rng, sign, less = np.random.default_rng(0), "" if minus is None else "+", minus or 0
    drawn = statistic([rng.choice(means, (10_000, len(means))) for means in tasks]) - less
    interval = "[{:{s}.1f}, {:{s}.1f}]".format(*np.percentile(drawn, (2.5, 97.5)), s=sign)
    return f"{statistic(tasks) - less:{sign}.1f} {interval if min(map(len, tasks)) > 1 else '(one seed)'}"


def table_1(runs, wrong):
    """The paper's table with ours beside it."""
    ours, real = {run.name: run for run in runs if run.name == run.task}, {}
    rows = [["task", *list(PAPER)[:8], "SRPO (paper)", "SRPO (here)", "seeds × episodes", "here − paper",
             "β, other settings"]]
    for task in srpo.TABLE_2:
        *others, paper, std = (values[task] for values in PAPER.values())
        rows.append([task, *(f"{x:.1f}" for x in others), f"{paper:.1f} ± {std:.1f}"])
        if not (run := ours.get(task)) or ("srpo", run.beta) not in run.final:
            rows[-1] += ["damaged" if task in wrong else "unfinished" if run else "not run"]
            continue
        scores = run.final["srpo", run.beta]
        real.update({} if run.mark else {task: scores.mean(1)})
        difference = "" if run.mark else with_interval(mean, [real[task]], paper)
        rows[-1] += [mean_std(scores) + run.mark, "{} × {}".format(*scores.shape), difference,
                     f"{run.beta:g} {run.other}"]
    for name, group in (("locomotion", [*srpo.TABLE_2][:9]), ("AntMaze", data.ANTMAZE)):
        paper = [np.mean([values[task] for task in group]) for values in PAPER.values()][:9]
        here = [real[task] for task in group if task in real]
        rows.append([f"average, {name}", *(f"{x:.1f}" for x in paper), *(
            [with_interval(mean, here), "", with_interval(mean, here, paper[8])] if len(here) == len(group)
            else [f"incomplete ({len(here)} of {len(group)})"])])
    rows.append(["interquartile mean of all runs", *[""] * 9,
                 with_interval(interquartile_mean, [*real.values()]) if real else "not run"])
    return [[cell.replace("nan", "–") for cell in row] + [""] * (14 - len(row)) for row in rows]


def table_of_runs(runs, wrong):
    """A row for each run, in sweeps for each β, and for each other folder; without empty columns."""
    rows = [["run", "β", *METHODS, "data's mean", "data", "seeds × episodes", "status", "other settings"]]
    for run, beta in ((run, beta) for run in runs for beta in run.betas):
        cells, size = [], "–"
        for method in METHODS:
            scores = run.final.get((method, beta if method == "srpo" else None))
            time = f", {run.milliseconds[method]:.2f} ms" if method in run.milliseconds else ""
            cells.append("" if scores is None else mean_std(scores) + time)
            size = "{} × {}".format(*scores.shape) if scores is not None and method == "srpo" else size
        rows.append([run.name, f"{beta:g}", *cells, f"{run.data_score:.1f}", run.data["kind"], size,
                     run.status, run.other])
    rows += [[name, *[""] * 9, f"not used: {reason}", ""] for name, reason in wrong.items()]
    return [*zip(*(column for column in zip(*rows) if any(column[1:])))]


def picture(path, panels, xlabel, ylabel):
    """A PNG with a panel for each (run, {name: {x: seeds' values}}), as mean ± std; its line in Markdown."""
    path.unlink(missing_ok=True)
    if not panels:
        return ""
    across, down, legend = min(3, len(panels)), -(-len(panels) // 3), {}
    figure, grid = pyplot.subplots(down, across, squeeze=False, layout="constrained",
                                   figsize=(4 * across, 3.2 * down + 0.6))
    for axes in grid.flat[len(panels):]:
        axes.axis("off")
    for axes, (run, lines) in zip(grid.flat, panels):
        axes.set_title(f"{run.name}\n{run.mark}".strip(), fontsize="medium")
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if xlabel == "β" else "linear",
                 yscale="symlog" if any("diverged" in name for name in lines) else "linear")
        for color, (name, points) in zip(COLORS * len(lines), lines.items()):
            x, y = sorted(points), np.array([points[x] for x in sorted(points)], float)  # [x, seeds]
            look = "x--" if "diverged" in name else "o-" if xlabel == "β" else "-"
            axes.plot(x, y.mean(1), look, color=color, label=name, markersize=4)
            axes.fill_between(x, y.mean(1) - y.std(1), y.mean(1) + y.std(1), color=color, alpha=0.2, lw=0)
            if xlabel == "β":
                axes.plot(x, y, ".", color="gray")
                axes.axvline(default(run.task, "beta")[0], color="gray", ls=":", label="the task's default β")
        if ylabel == "score":
            axes.axhline(run.data_score, color="gray", ls="--", label="the data's mean")
            if run.task in srpo.TABLE_2:
                axes.axhline(PAPER["SRPO"][run.task], color="black", lw=1, label="SRPO in the paper")
        legend.update(zip(*axes.get_legend_handles_labels()[::-1]))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2 * across, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"![{path.stem}]({path.name})"


def report(out="runs"):
    """Writes out/report.md and its pictures from the runs in out/* and out/*/*, and prints all runs."""
    out, runs, wrong, text = Path(out), [], {}, []
    if not out.is_dir():
        raise UserError(f"{out} is not a folder; train a task first, or name another --out")
    found = {path.parent for depth in ("*", "*/*") for path in out.glob(f"{depth}/config.json")}
    inside = {folder.parent for folder in found}
    others = {folder for folder in out.glob("*") if folder.is_dir() and folder not in inside}
    for folder in sorted(found | others):
        name = folder.relative_to(out).as_posix()
        try:
            runs.append(read_run(folder, name))
        except Exception as error:  # whatever a folder holds, the report goes on without it
            wrong[name] = f"{type(error).__name__} {error}".removeprefix("UserError ")
    for table in (table_1(runs, wrong), table_of_runs(runs, wrong)):
        table = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in table]
        lines = [table[0], ["---"] * len(table[0]), *table[1:]]
        text.append("\n".join(f"| {' | '.join(row)} |" for row in lines))
    widths = [max(map(len, column)) for column in zip(*table)]
    print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table))
    curves, sweeps = [], []
    for run in runs:
        lines = {}
        for (method, beta, step), scores in run.scores.items():
            if step is not None and beta in (None, run.beta):
                lines.setdefault(method, {})[step] = scores.mean(1)
        points = {beta: scores.mean(1) for (_, beta), scores in run.final.items() if beta}
        curves += [(run, lines)] if lines else []
        sweeps += [(run, {"srpo": points})] if len(points) > 1 else []
    critics = [(run, run.q) for run in runs if all(run.q.values())]
    text += [picture(out / "curves.png", curves, "gradient steps", "score"),  # Fig. 6, 16
             picture(out / "critic.png", critics, "gradient steps", "the critic's mean Q"),  # Fig. 13
             picture(out / "sweep.png", sweeps, "β", "score")]  # Fig. 15
    (out / "report.md").write_text("\n\n".join([REPORT.format(out=out), *filter(None, text)]) + "\n")
    print(f"Table 1 and pictures: {out / 'report.md'}")


# ------------------------------------------------------------------------------------ film: a policy at work


def film(folder, seed=None, episode=0, frames=64):
    """folder/film.gif: an episode of the evaluation in 8 seconds; the first seed unless told, the first β."""
    folder, config = Path(folder), srpo.read_config(folder)
    task, seed = config["task"], config["seeds"][0] if seed is None else seed
    policies = dict(srpo.load_policies(folder, config, "srpo", None, None)[1][: len(config["seeds"])])
    if seed not in policies:
        raise UserError(f"{folder} has no seed {seed}, but {', '.join(map(str, policies))}")
    env, poses, maze = data._worker_env(task).unwrapped, [], "maze" in task  # the one of run_episodes
    model, state = (getattr(x, name, x) for x, name in ((env.sim.model, "_model"), (env.sim.data, "_data")))
    body, box, plane = model.geom_bodyid > 0, model.geom_type == 6, [0, 1 if maze else 2]  # mjGEOM_BOX
    capsule = model.geom_type[body, None] == 3  # mjGEOM_CAPSULE, along its z; others are spheres

    def watched(obs, rng):
        x, axis = state.geom_xpos[body], state.geom_xmat[body].reshape(-1, 3, 3)[..., 2]
        half = np.where(capsule, model.geom_size[body, 1:2] * axis, 1e-3)
        poses.append(np.stack([x - half, x + half], 1)[..., plane])  # [geoms, 2 ends, 2]
        return policies[seed](obs, rng)

    # The torso's path, and the picture's corners: around the torso, or the maze's.
    score = data.normalized_score(task, data.run_episodes(task, seed, watched, [episode]))[0]
    path, low, high = np.array(poses)[:, 0].mean(1), np.array([-2, -0.2]), np.array([2, 2])
    if maze:
        corner, extent = state.geom_xpos[box, :2] - model.geom_size[box, :2], 2 * model.geom_size[box, :2]
        low, high = corner.min(0), (corner + extent).max(0)
    inches = 4 * (high - low) / max(high - low)
    figure = pyplot.figure(figsize=inches)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.axis("off")
    if maze:
        for x, size in zip(corner, extent):
            axes.add_patch(pyplot.Rectangle(x, *size, color="#BBBBBB"))
        goal = np.add(env._target, 1.2) if task == data.DEMO else env.target_goal  # maze2d's origin: 1.2
        axes.add_patch(pyplot.Circle(goal, 0.5, color=COLORS[2], alpha=0.5))  # reached: closer than 0.5
    else:
        axes.vlines(np.arange(int(path.min()) - 3, path.max() + 3), -0.1, 0, color="gray")  # each meter
        axes.axhline(0, color="gray")
    (trail,) = axes.plot([], [], color=COLORS[1], lw=1)
    lw = 2 * model.geom_size[body, 0] * 72 * inches[0] / (high - low)[0]
    limbs = axes.add_collection(collections.LineCollection([], capstyle="round", color=COLORS[0], lw=lw))
    text = axes.text(0.02, 0.98, "", transform=axes.transAxes, va="top", fontsize=9)
    shown = np.linspace(0, len(poses) - 1, min(frames, len(poses))).astype(int)
    writer = animation.PillowWriter(fps=len(shown) / 8)
    with writer.saving(figure, folder / "film.gif", dpi=80):
        for step in shown:
            limbs.set_segments(poses[step])
            if maze:
                trail.set_data(*path[: step + 1].T)
            else:
                axes.set_xlim(path[step, 0] + low[0], path[step, 0] + high[0])
            text.set_text(f"{task} ({config['data']['kind']} data)\n"
                          f"step {step + 1} of {len(poses)}, the episode's score {score:.1f}")
            writer.grab_frame()
    pyplot.close(figure)
    print(f"{folder / 'film.gif'}: seed {seed}, episode {episode}, score {score:.1f}")
