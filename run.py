"""The command line and a run's folder; a reader of the paper may skip it.

    python run.py train TASK [--demo] [--seeds 0 1 2 3 4 5] [--out runs] [--beta X] ...
    python run.py evaluate runs/TASK [--method srpo] [--episodes N]

A run's folder has config.json, log.csv, scores.csv, a .pt file a stage, and
checkpoint.pt, from which the same command goes on.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import files
import srpo
from data import UserError
from diffusion import sample
from files import clock, load_tensors, progress, reading, say
from seeds import Networks, compiled
from srpo import Settings

VERSION = 2  # of what a run's folder holds
STAGES = {"critic": srpo.Critic, "behavior": srpo.Behavior, "srpo": srpo.Extraction}
STAGES |= {"iql": srpo.WeightedRegression, "bc": srpo.BehaviorCloning}
POLICIES = ("srpo", "iql", "bc")  # the stages that train one
LOG = "stage step seed beta value_loss q_loss behavior_loss regression_loss q v grad_q"
SCORES = "method step seed beta episode return score"
COLUMNS = {"log": [*LOG.split(), "noise_gap"], "scores": SCORES.split()}
THREADS = torch.get_num_threads()  # of a compiled step on a CPU: PyTorch's own choice
TRIAL = 25  # steps on a CPU, by whose time is chosen whether the others are compiled
PATIENCE = 120  # seconds that eager steps may take
DEMO = {  # small networks and few steps: three seeds in minutes on two CPU cores
    **{"seeds": [0, 1, 2], "device": "cpu", "compile": False},
    **{"critic_steps": 15_000, "critic_lr": 1e-3, "critic_width": 128},
    **{"gamma": 0.98, "target_rate": 0.01},
    **{"behavior_steps": 2500, "behavior_batch": 256, "behavior_lr": 1e-3},
    **{"behavior_width": 64, "behavior_blocks": 2},
    **{"policy_steps": 3000, "policy_lr": 1e-3, "policy_width": 128, "beta": (0.4,)},
    **{"evaluations": 4, "episodes": 50, "also": ("iql", "bc")},
}

# ---------------- what a run is, and its tables


def describe(task, settings, seeds, info, device):
    """What a run is made of, for config.json."""
    processor = platform.processor()
    with contextlib.suppress(OSError, TypeError):  # elsewhere there is no such line
        text = Path("/proc/cpuinfo").read_text()
        processor = re.search(r"model name\s*: (.*)", text)[1]
    config = {"version": VERSION, "task": task, "seeds": seeds, "data": info}
    config |= {"settings": dataclasses.asdict(settings), "device": device}
    config |= {"cpu": processor, "gpu": None, "commit": None}
    if device == "cuda":
        config["gpu"] = torch.cuda.get_device_name()
    git = f"git -C {Path(__file__).parent} describe --always --dirty --exclude=*"
    with contextlib.suppress(OSError):
        done = subprocess.run(git.split(), capture_output=True, text=True)
        config["commit"] = done.stdout.strip() or None
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    config |= {"python": platform.python_version(), **versions}
    return json.loads(json.dumps(config))  # with lists, as the file has them


def check_config(config):
    """A run's config, with all settings; an exception where it can't be one."""
    known = {field.name for field in dataclasses.fields(Settings)}
    if config.get("version") != VERSION or not {*config["settings"]} <= known:
        made = f"commit {config.get('commit')}, PyTorch {config.get('torch')}"
        raise UserError(f"the run is of another version of this code ({made})")
    settings = Settings(data.check_task(config["task"]), **config["settings"])
    if not config["seeds"] or any(type(seed) is not int for seed in config["seeds"]):
        raise ValueError("seeds must be whole numbers")
    facts = config["data"]
    float(facts["data_score"]), float(facts["largest_reward"])
    str.split(facts["kind"]), str.split(facts["sha256"]), str.split(config["torch"])
    return config | json.loads(json.dumps({"settings": vars(settings)}))


def read_config(folder):
    """A run folder's config.json; UserError where it is missing or damaged."""
    path = Path(folder, "config.json")
    if not path.exists():
        around = [path.parent.parent, *sorted(path.parent.glob("*"))]
        near = [str(one) for one in around if (one / "config.json").exists()]
        hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
        raise UserError(f"{folder} is no run's folder, it has no config.json{hint}")
    with reading(path):
        return check_config(json.loads(path.read_text()))


def table_text(name, rows):
    """The text of log.csv or scores.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS[name], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parse_table(name, text):
    """The rows of such a text; numbers as they were, empty fields None."""

    def value(column, x):
        if column in ("stage", "method"):
            return x
        if x == "" and (name == "log" or column == "beta"):
            return None
        return int(x) if x.lstrip("-").isdecimal() else float(x)

    header, *lines = csv.reader(text.splitlines())
    if header != COLUMNS[name] or any(len(line) != len(header) for line in lines):
        raise ValueError("other columns")
    return [{key: value(key, x) for key, x in zip(header, line)} for line in lines]


def read_csv(path):
    """The rows of a run's log.csv or scores.csv."""
    with reading(path):
        return parse_table(path.stem, path.read_text())


def differences(config, other, keys):
    """{key: what the configs have} of those of these facts and settings that differ."""

    def flat(config):
        facts = {"data": config["data"]["sha256"], "torch": config["torch"]}
        facts["torch"] = facts["torch"].split("+")[0]  # the build, +cpu, never matters
        return config | config["settings"] | facts

    ours, theirs = flat(config), flat(other)
    return {
        key: f"{key} {theirs[key]} there, {ours[key]} here"
        for key in keys
        if ours[key] != theirs[key]
    }


def shared_keys(config):
    """What a critic and a behavior model are made of."""
    keys = [key for key in config["settings"] if key.startswith(("critic", "behavior"))]
    return [*keys, "task", "seeds", "data", "tau", "gamma", "target_rate", "dropout"]


# ---------------- scores


def mean_std(scores):
    """Text: the mean and, of several seeds, the standard deviation (N - 1) of their
    means; scores: [seeds, episodes].
    """
    means = np.mean(scores, axis=1)
    return f"{means.mean():.1f}" + f" ± {means.std(ddof=1):.1f}" * (len(means) > 1)


def by_policy(rows):
    """{(method, beta): {step: {seed: [scores]}}} of rows of scores."""
    policies = {}
    for row in rows:
        steps = policies.setdefault((row["method"], row["beta"]), {})
        seeds = steps.setdefault(row["step"], {})
        seeds.setdefault(row["seed"], []).append(row["score"])
    return policies


def print_scores(config, rows):
    """A line a policy, of its scores at the last step."""
    kind = config["data"]["kind"]
    title = config["task"] + f" ({kind} data)" * (kind != "D4RL")
    for (method, beta), steps in by_policy(rows).items():
        scores = [*[*steps.values()][-1].values()]
        name = f"{method}, β = {beta:g}" if beta else method
        each = " ".join(f"{np.mean(one):.1f}" for one in scores)
        size = f"{len(scores)} seeds × {len(scores[0])} episodes"
        say(f"{title} {name}: {mean_std(scores)} over {size} ({each})")


def policies_of(weights, seeds, betas):
    """[(seed, β, policy to roll out)]; weights: a state dict, seeds and β first."""
    return [
        (seed, beta, data.NumpyPolicy([*zip(arrays[::2], arrays[1::2])]))
        for i, seed in enumerate(seeds)
        for j, beta in enumerate(betas)
        for arrays in [
            [
                x[i].numpy() if beta is None else x[i, j].numpy()
                for x in weights.values()
            ]
        ]
    ]


def roll_out(workers, task, method, step, policies, episodes, stopped=lambda: False):
    """Rows of scores of [(seed, β, policy)]; none if it was stopped."""
    pairs = [(seed, policy) for seed, _, policy in policies]
    futures = workers.roll_out(task, pairs, episodes)
    waiting = [future for row in futures for future in row]
    with progress(f"{method}'s evaluation", " episodes", len(waiting)) as bar:
        while waiting:
            if stopped():
                return []
            time.sleep(0.01)
            waiting = [future for future in waiting if not future.done()]
            bar.update(bar.total - bar.n - len(waiting))
    returns, broken = data.returns_of(futures)
    scores = data.normalized_score(task, returns)
    if broken:
        say(f"{method}: MuJoCo gave up on {broken} episodes, which count until there")
    return [
        dict(zip(COLUMNS["scores"], (method, step, seed, beta, episode, *result)))
        for (seed, beta, _), *results in zip(
            policies, returns.tolist(), scores.tolist()
        )
        for episode, result in enumerate(zip(*results))
    ]


# ---------------- a run


@contextlib.contextmanager
def locked(folder):
    """Makes the folder and keeps other processes out, if its file system can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process") from None
        except OSError as error:
            say(
                f"{folder} can't be locked ({error.strerror}): let no other train there"
            )
        yield


def load_networks(folder, settings, sizes, seeds, device):
    """Networks q_target, value and noise_model of a run's critic.pt and behavior.pt."""
    networks = {}
    parts = ("critic", "q_target", "q"), ("critic", "value", "value")
    for stage, name, kind in (*parts, ("behavior", "noise_model", "noise_model")):
        weights = load_tensors(path := folder / f"{stage}.pt")
        with reading(path):
            one = Networks(srpo.builders(settings, *sizes)[kind], seeds, kind)
            one.network.load_state_dict(weights[name])
        networks[name] = one.requires_grad_(False).to(device)
    return networks


def watch(stage):
    """What is worth watching beside the losses, on fixed rows, times and noises."""
    rows = stage.table[:: -(-len(stage.table) // 256)]
    s_dim, a_dim = stage.sizes
    s, a = rows[:, :s_dim], rows[:, s_dim : s_dim + a_dim]
    generator = torch.Generator().manual_seed(0)
    t = 0.02 + 0.96 * torch.rand(len(s), generator=generator).to(s)
    noise = torch.randn(a.shape, generator=generator).to(s)
    lead = stage.sums.shape[1:]  # seeds, or seeds and β
    s, a, t, noise = (x.expand(*lead, *x.shape) for x in (s, a, t, noise))
    if stage.name == "critic":
        return {"q": stage.q(s, a).mean((-2, -1)), "v": stage.value(s).mean(-1)}
    if stage.name == "behavior":
        return {}
    a, (q, other) = stage.policy(s), stage.fixed
    if stage.name != "srpo":
        return {"q": q(s, a).mean((-2, -1))}
    how = {"weighting": "one"}
    grad_q = srpo.surrogate_gradient(q, other, s, a, t, noise, math.inf, **how)
    gap = grad_q - srpo.surrogate_gradient(q, other, s, a, t, noise, 1.0, **how)
    sizes = {"grad_q": grad_q.norm(dim=-1), "noise_gap": gap.norm(dim=-1)}
    return {name: x.mean(-1) for name, x in ({"q": q(s, a)} | sizes).items()}


class Run:
    """A task's folder under way. Its checkpoint has the config, the names of finished
    stages, the text of both tables, and all of the stage that is under way.
    """

    def __init__(self, folder, config, minutes, device_is_free, reused):
        """reused: what another run's stages have left, {name: weights}, and its log."""
        self.folder, self.minutes, self.signal, self.told = folder, minutes, None, set()
        path = self.checkpoint = folder / "checkpoint.pt"
        if path.exists():
            self.saved = load_tensors(path)
            with reading(path):
                self.config = check_config(self.saved["config"])
                self.tables = {x: parse_table(x, self.saved[x]) for x in COLUMNS}
                [STAGES[name] for name in self.saved["finished"]]
            self.refuse_another(config, device_is_free)
            also = {*config["settings"]["also"], *self.config["settings"]["also"]}
            self.config["settings"]["also"] = sorted(also)  # a policy more is welcome
        elif any((folder / f"{name}.pt").exists() for name in STAGES):
            raise UserError(f"{path}, by which this run goes on, is missing")
        else:
            weights, log = reused
            for name in weights:
                files.save_tensors(folder / f"{name}.pt", weights[name])
            self.config, self.tables = config, {"log": log, "scores": []}
            self.saved = {"finished": [*weights], "stage": ""}
        self.save()
        files.save_json(folder / "config.json", self.config)

    def refuse_another(self, config, device_is_free):
        """UserError if this folder's run isn't the one that is asked for."""
        free = {"also"} | ({"device", "precision"} if device_is_free else set())
        keys = {*config["settings"], "task", "data", "seeds", "torch", "device"} - free
        differ = differences(config, self.config, sorted(keys))
        if not differ:
            return
        cure = "to train anew: another --out"
        if "seeds" in differ:
            cure = "to add seeds: train these alone, with another --out"
        elif not {*differ} & {*shared_keys(config)}:
            cure = f"to keep its critic: --reuse {self.folder} and another --out"
        if "episodes" in differ:
            cure += f"; to score it with more: run.py evaluate {self.folder} --episodes"
        told = ", ".join([*differ.values()][:4])
        raise UserError(f"{self.folder} holds another run ({told}); {cure}")

    def save(self, stage=None, **progress):
        """Everything, so that a process that is killed at any moment can go on."""
        if stage:
            generators = [one.get_state() for one in stage.generators]
            progress |= {"stage": stage.name, "tensors": stage.state_dict()}
            progress |= {"optimizer": stage.optimizer.state_dict()}
            progress |= {"generators": generators}
        texts = {name: table_text(name, rows) for name, rows in self.tables.items()}
        for name, text in texts.items():
            files.write_atomically(self.folder / f"{name}.csv", text.encode())
        self.saved |= {"config": self.config, **texts, **progress}
        files.save_tensors(self.checkpoint, self.saved)

    def finish(self, stage):
        """A stage's result: its file first, then the checkpoint, by which it counts."""
        files.save_tensors(self.folder / f"{stage.name}.pt", stage.weights())
        for name in ("tensors", "optimizer", "generators"):
            self.saved.pop(name, None)
        self.save(finished=[*self.saved["finished"], stage.name], stage="")

    def resume(self, stage):
        """The saved state into a stage; the step of its last evaluation, and whether
        its steps are compiled (None: that isn't chosen yet).
        """
        if self.saved["stage"] != stage.name:
            return -1, None
        with reading(self.checkpoint):
            stage.load_state_dict(self.saved["tensors"])
            stage.optimizer.load_state_dict(self.saved["optimizer"])
            numbers = self.saved["generators"]
            for generator, state in zip(stage.generators, numbers, strict=True):
                generator.set_state(state.cpu())
            stage.done = int(stage.count)
            range(stage.steps + 1).index(stage.done)
            say(f"{stage.name}: goes on at step {stage.done:,}")
            return int(self.saved["evaluated"]), self.saved["compiled"]

    @contextlib.contextmanager
    def signals(self):
        """Within it SIGINT, SIGTERM and SIGUSR1 make the loop save and stop, a second
        Ctrl-C at once.
        """

        def ask(number, frame):
            if self.signal == number == signal.SIGINT:
                os._exit(128 + number)
            stop = signal.SIGTERM if number == signal.SIGUSR1 else number
            self.signal = self.signal or stop

        before = {}
        try:
            with contextlib.suppress(ValueError):  # a thread may not ask for signals
                for number in data.SIGNALS:
                    before[number] = signal.signal(number, ask)
            yield
        except BrokenExecutor:  # workers that were just starting got the signal too
            if self.signal:
                raise SystemExit(128 + self.signal) from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train(self, stage, workers, compiling):
        """Takes a stage from where it stands to its end, with logs, evaluations and
        checkpoints; compiling: true or false, or None for what is faster.
        """
        evaluated, chosen = self.resume(stage)
        required, compiling = compiling, chosen if compiling is None else compiling
        torch.set_num_threads(1)  # the same bits on any number of cores
        if compiling or compiling is None and stage.table.is_cuda:
            compiling = self.compile(stage, required)
        parts = stage.settings.evaluations if stage.name in POLICIES else 0
        marks = {round(i * stage.steps / parts) for i in range(parts + 1) if parts}
        every, saved_at = max(1, min(5000, stage.steps // 20)), time.monotonic()
        timed, seconds = 0, 0.0  # eager steps, but for the first
        with progress(stage.name, " steps", stage.steps, stage.done) as bar:
            while stage.done < stage.steps or evaluated < max(marks, default=-1):
                at, save = stage.done, False
                if at in marks and evaluated < at:
                    save = self.evaluate(stage, workers)
                    evaluated = at if save else evaluated
                else:
                    stops = {*marks, stage.steps, TRIAL, (at // every + 1) * every}
                    start = time.monotonic()
                    bar.update(stage.advance(min(x for x in stops if x > at) - at))
                    if at >= 5:
                        timed += stage.done - at
                        seconds += time.monotonic() - start
                    if stage.done % every == 0 or stage.done == stage.steps:
                        bar.note = self.log(stage)
                if compiling is None and stage.done == TRIAL:
                    left = seconds / timed * (stage.steps - TRIAL)
                    say(f"{stage.name}: eager, on 1 thread, it takes {clock(left)}")
                    compiling = left > PATIENCE and self.compile(stage)
                    save = True  # the choice depends on the time, the bits on it
                if (
                    save
                    or self.signal
                    or time.monotonic() - saved_at > 60 * self.minutes
                ):
                    self.save(stage, evaluated=evaluated, compiled=compiling)
                    saved_at = time.monotonic()
                if self.signal:
                    told = f"saved at step {stage.done:,} of {stage.name}"
                    say(f"{told}; the same command goes on from there")
                    raise SystemExit(128 + self.signal)
        self.finish(stage)

    def compile(self, stage, required=False):
        """Compiles a stage's losses; false, after a line, where that can't be done."""
        how = "" if stage.table.is_cuda else f", for {THREADS} threads"
        say(f"{stage.name}: compiling its steps{how}")
        states = [generator.get_state() for generator in stage.generators]
        torch.set_num_threads(THREADS)
        try:
            stage.losses = compiled(stage.losses)
            sum(x.sum() for x in stage.losses(*stage.rows(), *stage.noise())).backward()
            return True
        except torch.cuda.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:
            stage.__dict__.pop("losses", None)
            torch.set_num_threads(1)
            reason = " ".join(str(error).split("\n\nSet TORCHDYNAMO")[0].split())[-200:]
            reason += "" if shutil.which("g++") else "; install g++, a C++ compiler"
            if required:
                raise UserError(f"--compile cannot work here: {reason}") from None
            say(f"{stage.name}: not compiled, which costs speed only: {reason}")
            return False
        finally:
            for generator, state in zip(stage.generators, states):
                generator.set_state(state)

    def log(self, stage):
        """A row a seed and β: mean losses since the last, what is worth watching."""
        losses, _ = stage.read_losses()
        finite = torch.stack([*losses.values()]).isfinite().all(0).flatten().tolist()
        losses.pop("policy_loss", None)  # a number without a meaning
        columns = {
            name: x.flatten().tolist() for name, x in (losses | watch(stage)).items()
        }
        facts, settings = self.config["data"], stage.settings
        bound = facts["largest_reward"] / (1 - settings.gamma)
        betas = settings.beta if stage.name == "srpo" else [None]
        members = [(seed, beta) for seed in stage.seeds for beta in betas]
        for i, (seed, beta) in enumerate(members):
            row = dict(zip(COLUMNS["log"], (stage.name, stage.done, seed, beta)))
            row |= {name: values[i] for name, values in columns.items()}
            self.tables["log"].append(row)
            who = f"seed {seed}" + (f", β = {beta:g}" if beta else "")
            if not finite[i]:
                self.tell(f"{who}: a loss is not finite ({stage.name}); it is lost")
            elif stage.name == "critic" and abs(row["q"]) > bound:
                self.tell(f"{who}: the critic diverges: |Q| > {bound:.3g}, any return")
        if not any(finite):
            self.save()
            say(f"no seed's {stage.name} loss is finite; see {self.folder / 'log.csv'}")
            raise SystemExit(3)
        return ", ".join(f"{name} {np.mean(x):.3g}" for name, x in columns.items())

    def tell(self, line):
        """A line, the first time."""
        if line not in self.told:
            self.told.add(line)
            say(line)

    def evaluate(self, stage, workers):
        """Scores a stage's policies; false if a signal came before that was done."""
        betas = stage.settings.beta if stage.name == "srpo" else [None]
        policies = policies_of(stage.weights()["policy"], stage.seeds, betas)
        what = self.config["task"], stage.name, stage.done, policies
        episodes = stage.settings.episodes
        rows = roll_out(workers, *what, episodes, lambda: self.signal)
        self.tables["scores"] += rows
        for beta in betas if rows else ():
            mean = np.mean([row["score"] for row in rows if row["beta"] == beta])
            name = f"{stage.name}, β = {beta:g}" if beta else stage.name
            say(f"{name}: mean score {mean:.1f} at step {stage.done:,}")
        return bool(rows)


def build_stage(name, settings, table, sizes, seeds, folder):
    """A stage; what a policy is made with is read from the folder."""
    if name not in POLICIES:
        return STAGES[name](settings, table, sizes, seeds)
    fixed = load_networks(folder, settings, sizes, seeds, table.device)
    q_target = fixed["q_target"]
    made_with = q_target, fixed["value"]
    if name == "srpo":
        made_with = lambda s, a: q_target(s, a).mean(-2), fixed["noise_model"]
    return STAGES[name](settings, table, sizes, seeds, *made_with)


def take(folder, config, sizes):
    """What --reuse takes from another run: {stage: weights} and the rows of its log."""
    if differ := differences(config, read_config(folder), shared_keys(config)):
        told = ", ".join([*differ.values()][:4])
        raise UserError(f"--reuse {folder}: that run has another {told}")
    load_networks(folder, Settings(**config["settings"]), sizes, config["seeds"], "cpu")
    names = "critic", "behavior"
    log = [row for row in read_csv(folder / "log.csv") if row["stage"] in names]
    return {name: load_tensors(folder / f"{name}.pt") for name in names}, log


def train(task, settings, seeds, out, reuse, workers, **options):
    """Algorithm 1 on one task: trains what is not yet trained, in OUT/TASK."""
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if (out / "config.json").exists():
        raise UserError(f"--out {out} is a run's folder; its results are in OUT/TASK")
    if device == "cpu":
        settings = dataclasses.replace(settings, precision="exact")
    if task == data.DEMO and not data.data_file(task).exists():
        import remake

        remake.maze2d(data.stand_in_path(task))
    dataset = data.load(task, options["any_data"], log=say)
    config = describe(task, settings, seeds, dataset.info, device)
    say(f"{task}: training on {config['gpu'] or config['cpu'] or device}")
    reused = take(reuse, config, dataset.sizes) if reuse else ({}, [])
    with locked(folder := out / task):
        free = options["device"] is not None
        run = Run(folder, config, options["checkpoint_minutes"], free, reused)
        wanted = ("critic", "behavior", "srpo", *run.config["settings"]["also"])
        todo = [x for x in STAGES if x in wanted and x not in run.saved["finished"]]
        # the policy that is under way goes first
        todo.sort(key=lambda name: (name in POLICIES, name != run.saved["stage"]))
        with run.signals(), data.Workers(workers) as workers:
            table = torch.from_numpy(dataset.table).to(device)
            for name in todo:
                made = settings, table, dataset.sizes, seeds, folder
                run.train(build_stage(name, *made), workers, options["compile"])
    if not todo:
        more = f"--reuse {folder} --out OTHER, or run.py evaluate {folder} --episodes N"
        say(f"{folder} is finished: nothing to do; for more: {more}")
    print_scores(run.config, run.tables["scores"])


# ---------------- evaluate


class IDQL:
    """IDQL's policy (Hansen-Estruch et al., 2023): the best of several actions."""

    def __init__(self, noise_model, q, a_dim, candidates=32, steps=15):
        self.noise_model, self.q, self.steps = noise_model, q, steps
        self.shape = candidates, a_dim

    def __call__(self, obs, rng):
        noise = torch.from_numpy(rng.standard_normal(self.shape, np.float32))
        s = torch.as_tensor(obs, dtype=torch.float32).expand(len(noise), -1)
        with torch.no_grad():
            a = sample(self.noise_model, s, noise, self.steps).clamp(-1, 1)
            return a[self.q(s, a).amin(-2).argmax()].numpy()


def load_policies(folder, config, method):
    """A trained run's policies, [(seed, β, policy)]."""
    settings, seeds = Settings(**config["settings"]), config["seeds"]
    sizes = data.space_sizes(config["task"])
    build = srpo.builders(settings, *sizes)
    if method == "random":
        policy = partial(data.random_policy, sizes[1])
        return [(seed, None, policy) for seed in seeds]
    if method == "idql":
        networks, policies = load_networks(folder, settings, sizes, seeds, "cpu"), []
        for i, seed in enumerate(seeds):
            pair = build["noise_model"]().eval(), build["q"]()
            for one, name in zip(pair, ("noise_model", "q_target")):
                stacked = networks[name].network.state_dict()
                one.load_state_dict({key: x[i] for key, x in stacked.items()})
            policies.append((seed, None, IDQL(*pair, sizes[1])))
        return policies
    betas = settings.beta if method == "srpo" else [None]
    weights = load_tensors(path := folder / f"{method}.pt")
    with reading(path):
        copies = len(betas) if method == "srpo" else None
        networks = Networks(build["policy"], seeds, "policy", copies)
        networks.network.load_state_dict(weights["policy"])
    return policies_of(networks.network.state_dict(), seeds, betas)


def evaluate(folder, method, episodes, workers):
    """Scores a trained run's policies anew; writes evaluation-METHOD.json."""
    config = read_config(folder)
    policies = load_policies(folder, config, method)
    episodes = episodes or config["settings"]["episodes"]
    with data.Workers(workers) as workers:
        rows = roll_out(workers, config["task"], method, None, policies, episodes)
    print_scores(config, rows)
    path = folder / f"evaluation-{method}.json"
    files.save_json(path, config | {"scores": rows})


# ---------------- the command line


def beta(text):
    return text if text == "sweep" else float(text)


def device(text):
    if text not in ("cpu", "cuda"):
        hint = "cpu or cuda; which GPU: CUDA_VISIBLE_DEVICES=1 before the command"
        raise argparse.ArgumentTypeError(hint)
    if text == "cuda" and not torch.cuda.is_available():
        hint = "PyTorch sees no GPU; take --device cpu or torch's CUDA build"
        raise argparse.ArgumentTypeError(hint)
    return text


def parse(arguments):
    """What the command line gives; the settings' flags are made from the dataclass."""
    parser = files.Parser(prog="run.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tasks = f"tasks: {', '.join(data.TASKS)}; with --beta also D4RL's others"
    add = (training := commands.add_parser("train", epilog=tasks)).add_argument
    switch, out = argparse.BooleanOptionalAction, Path("runs")
    add("task", help="a task of D4RL, as listed below")
    help = "the demo's settings for what is not given; default: no"
    add("--demo", action="store_true", help=help)
    help = (
        "take critic, behavior model and what is not given from this run; default: no"
    )
    add("--reuse", type=files.folder, metavar="FOLDER", help=help)
    help = "trials; default: 0 1 2 3 4 5"
    add("--seeds", type=files.whole, nargs="+", default=argparse.SUPPRESS, help=help)
    add(
        "--out", type=files.folder, default=out, help="results: OUT/TASK; default: runs"
    )
    help = "cpu or cuda; default: cuda where there is one"
    add("--device", type=device, default=argparse.SUPPRESS, help=help)
    help = "default: on a GPU, and on a CPU where it saves minutes"
    add("--compile", action=switch, default=argparse.SUPPRESS, help=help)
    help = "the most that a crash loses; default: 5"
    add("--checkpoint-minutes", type=float, default=5, help=help)
    help = "accept a data file that is not D4RL's; default: no"
    add("--any-data", action="store_true", help=help)
    for field in dataclasses.fields(Settings):
        kind = files.whole if field.type is int else field.type
        how = {"type": kind, "choices": field.metadata["choices"]}
        if field.type is bool:
            how = {"action": switch}
        elif field.type is tuple:
            how |= {"nargs": "*", "type": str if how["choices"] else beta}
        told = {None: "by task", (): "none"}.get(field.default, field.default)
        how["help"] = f"{field.metadata['help']}; default: {told}"
        add(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **how)
    add = commands.add_parser("evaluate").add_argument
    add("folder", type=files.folder, help="a run's folder, OUT/TASK")
    methods = ("srpo", "idql", "iql", "bc", "random")
    add("--method", default="srpo", choices=methods, help="default: srpo")
    help = "episodes of each seed; default: the run's"
    add("--episodes", type=files.positive, help=help)
    for add in (training.add_argument, add):
        help = "evaluation processes; default: one a core"
        add("--workers", type=files.positive, help=help)
    return vars(parser.parse_args(arguments))


def command(arguments):
    given = parse(arguments)
    if given.pop("command") == "evaluate":
        return evaluate(**given)
    task = data.check_task(given.pop("task"))
    chosen = {"seeds": [0, 1, 2, 3, 4, 5], "device": None, "compile": None}
    if given["reuse"]:
        config = read_config(given["reuse"])
        chosen |= config["settings"] | {"seeds": config["seeds"]}
        del chosen["precision"]  # its machine's
    chosen |= (DEMO if given.pop("demo") else {}) | given
    names = [
        field.name for field in dataclasses.fields(Settings) if field.name in chosen
    ]
    try:
        settings = Settings(task, **{name: chosen.pop(name) for name in names})
    except ValueError as error:
        raise UserError(error) from None
    seeds = chosen["seeds"]
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
        raise UserError("--seeds must be different whole numbers from 0 to 2147483647")
    train(task, settings, **chosen)


def main(arguments=None):
    """The command line; returns 0, or 2 for what its user can mend."""
    return files.program("run", partial(command, arguments))


if __name__ == "__main__":
    for stopping in data.SIGNALS:  # before training, too: half a download is removed
        signal.signal(
            stopping,
            lambda number, frame: sys.exit(130 if number == signal.SIGINT else 143),
        )
    sys.exit(main())
