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
import itertools
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
import warnings
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import files
import released
import remake
import srpo
from data import UserError
from diffusion import sample
from files import load_tensors, progress, reading, say
from seeds import Networks, compiled
from srpo import Settings

VERSION = 2  # of what a run's folder holds
STAGES = {"critic": srpo.Critic, "behavior": srpo.Behavior, "srpo": srpo.Extraction}
STAGES |= {"iql": srpo.WeightedRegression, "bc": srpo.BehaviorCloning}
POLICIES = ("srpo", "iql", "bc")  # the stages that train one
FILES = {"q_target": "critic", "value": "critic", "noise_model": "behavior"}
LOG = "stage step seed beta value_loss q_loss behavior_loss regression_loss q v grad_q"
SCORES = "method step seed beta episode return score"
COLUMNS = {"log": [*LOG.split(), "noise_gap"], "scores": SCORES.split()}
THREADS = torch.get_num_threads()  # of a compiled step on a CPU: PyTorch's own choice
TRIAL = 25  # steps on a CPU, by whose time is chosen whether the others are compiled
PATIENCE = 120  # seconds that eager steps may take
DEMO = {  # small networks and few steps: three seeds in minutes on two CPU cores
    **{"seeds": [0, 1, 2], "device": "cpu", "compile": False},
    **{"critic_steps": 20_000, "critic_lr": 1e-3, "critic_width": 128},
    **{"gamma": 0.98, "target_rate": 0.01},
    **{"behavior_steps": 2500, "behavior_batch": 256, "behavior_lr": 1e-3},
    **{"behavior_width": 64, "behavior_blocks": 2},
    **{"policy_steps": 3000, "policy_lr": 1e-3, "policy_width": 128, "beta": (0.4,)},
    **{"evaluations": 4, "episodes": 50, "also": ("iql", "bc")},
}

NAMES = [field.name for field in dataclasses.fields(Settings)]
LATER = NAMES[NAMES.index("beta") :]  # what critic and behavior model do not depend on

# ---------------- what a run is


def describe(task, settings, seeds, device):
    """What a run is made of, as config.json has it, but for its data."""
    cpu, commit, code = platform.machine(), "", Path(__file__).parent
    with contextlib.suppress(OSError):  # there may be no such file, and no git
        lines = Path("/proc/cpuinfo").read_text()
        cpu = ", ".join({*re.findall(r"model name\s*: (.*)", lines)}) or cpu
        git = "git describe --always --dirty --abbrev=40 --exclude=*".split()
        commit = subprocess.run(git, cwd=code, capture_output=True, text=True).stdout
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    config = {
        **{"version": VERSION, "task": task, "seeds": seeds},
        **{"settings": dataclasses.asdict(settings), "device": device, "gpu": gpu},
        **{"cpu": cpu, "commit": commit.strip() or None},
        **{"python": platform.python_version(), **versions},
    }
    return json.loads(json.dumps(config))  # with lists, as a file has them


def check_config(config):
    """A run's config; UserError if it is of another version of this code."""
    if config.get("version") != VERSION or not {*config["settings"]} <= {*NAMES}:
        made = f"commit {config.get('commit')}, PyTorch {config.get('torch')}"
        cure = "use that one for it, or another --out"
        raise UserError(f"that run is of another version of this code ({made}): {cure}")
    settings = Settings(data.check_task(config["task"]), **config["settings"])
    "".join([config["torch"], config["data"]["kind"], config["data"]["sha256"]])
    if {*map(type, config["seeds"])} != {int}:
        raise ValueError("seeds must be whole numbers")
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


def differences(config, other, free=()):
    """{key: text} of what is not the same in two configs, but for what is free."""

    def facts(config):  # the build of PyTorch, +cpu or +cu130, never matters
        named = {key: config[key] for key in ("task", "seeds", "device")}
        named |= {"data": config["data"]["sha256"]}
        return named | config["settings"] | {"torch": config["torch"].split("+")[0]}

    ours, theirs = facts(config), facts(other)
    keys = [key for key in ours if ours[key] != theirs[key] and key not in free]
    return {key: f"{key} {theirs[key]} instead of {ours[key]}" for key in keys}


def read_csv(path):
    """The rows of a run's log.csv or scores.csv; numbers, None for empty fields."""

    def value(text):
        with contextlib.suppress(ValueError):
            return int(text) if text.isdecimal() else float(text)
        return text or None

    with reading(path):
        rows = [*csv.DictReader(path.read_text().splitlines())]
        if any([*row] != COLUMNS[path.stem] for row in rows):
            raise ValueError("other columns")
        return [{key: value(text) for key, text in row.items()} for row in rows]


def load_networks(name, folder, settings, sizes, seeds):
    """Networks of all seeds from a run's folder: of FILES, or the policy of a stage."""
    part = "policy" if name in POLICIES else name
    kind, copies = {"q_target": "q"}.get(part, part), len(settings.beta)
    path = folder / f"{FILES.get(name, name)}.pt"
    weights = load_tensors(path)
    with reading(path):
        build = srpo.builders(settings, *sizes)[kind]
        networks = Networks(build, seeds, kind, copies if name == "srpo" else None)
        networks.network.load_state_dict(weights[part])
        return networks.requires_grad_(False)


# ---------------- scores


def mean_std(scores):
    """Of scores [seeds, episodes] the mean and, if there are several seeds, their
    means' standard deviation (N - 1), as text.
    """
    means = np.mean(scores, axis=1)
    told = f"{means.mean():.1f}"
    return told if len(means) == 1 else f"{told} ± {means.std(ddof=1):.1f}"


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


def members(method, settings, seeds):
    """The (seed, β) of a method's policies, in the order of its file."""
    betas = settings.beta if method == "srpo" else [None]
    return [*itertools.product(seeds, betas)]


def policies_of(method, weights, settings, seeds):
    """[(seed, β, policy to roll out)]; weights: of their network, seeds and β first."""
    arrays = [x.flatten(0, int(method == "srpo")).numpy() for x in weights.values()]
    policies = []
    for i, member in enumerate(members(method, settings, seeds)):
        layers = zip([x[i] for x in arrays[::2]], [x[i] for x in arrays[1::2]])
        policies.append((*member, data.NumpyPolicy(layers)))
    return policies


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
    if broken:
        say(f"{method}: MuJoCo gave up on {broken} episodes, which count until there")
    pairs, rows = np.stack([returns, data.normalized_score(task, returns)], -1), []
    for (seed, beta, _), results in zip(policies, pairs.tolist()):
        for episode, result in enumerate(results):
            row = method, step, seed, beta, episode, *result
            rows.append(dict(zip(COLUMNS["scores"], row)))
    return rows


# ---------------- a run


@contextlib.contextmanager
def locked(folder):
    """Makes the folder and keeps other processes out, if its file system can."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process") from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): train there only once")
        yield


def build_stage(name, settings, table, sizes, seeds, folder):
    """A stage; what a policy is made with is read from the folder."""
    if name not in POLICIES:
        return STAGES[name](settings, table, sizes, seeds)
    q_target, value, noise_model = (
        load_networks(part, folder, settings, sizes, seeds).to(table.device)
        for part in FILES
    )
    made_with = q_target, value
    if name == "srpo":
        made_with = lambda s, a: q_target(s, a).mean(-2), noise_model
    return STAGES[name](settings, table, sizes, seeds, *made_with)


def watch(stage):
    """What is worth watching beside the losses, on fixed rows, times and noises."""
    rows = stage.table[:: -(-len(stage.table) // 256)]
    s_dim, a_dim = stage.sizes
    s, a = rows[:, :s_dim], rows[:, s_dim : s_dim + a_dim]
    fixed = torch.Generator().manual_seed(0)
    t = 0.02 + 0.96 * torch.rand(len(s), generator=fixed).to(s)
    noise = torch.randn(a.shape, generator=fixed).to(s)
    lead = stage.sums.shape[1:]  # seeds, or seeds and β
    s, a, t, noise = (x.expand(*lead, *x.shape) for x in (s, a, t, noise))
    if stage.name == "critic":
        return {"q": stage.q(s, a).mean((-2, -1)), "v": stage.value(s).mean(-1)}
    if stage.name == "behavior":
        return {}
    a, (q, other) = stage.policy(s), stage.fixed
    if stage.name != "srpo":
        return {"q": q(s, a).mean((-2, -1))}
    gradient = partial(srpo.surrogate_gradient, q, other, s, a, t, noise)
    grad_q = gradient(beta=math.inf)
    gap = grad_q - gradient(beta=1.0, weighting="one")
    sizes = {"grad_q": grad_q.norm(dim=-1), "noise_gap": gap.norm(dim=-1)}
    return {name: x.mean(-1) for name, x in ({"q": q(s, a)} | sizes).items()}


def is_theirs(folder):
    """Whether a folder holds the authors' checkpoints."""
    return any(folder.glob("*-baseline-seed*"))


def take(folder, config):
    """What --reuse takes, {stage: (weights, rows of the log)}; UserError if they are
    not what this config would train.
    """
    if is_theirs(folder):
        sizes, seeds = data.space_sizes(config["task"]), config["seeds"]
        how = config["task"], seeds, Settings(**config["settings"]), sizes
        theirs = released.released_checkpoints(folder, *how)
        return {name: (weights, []) for name, weights in theirs.items()}
    free = ("device", "torch", *LATER)
    if differ := differences(config, read_config(folder), free):
        told = ", ".join([*differ.values()][:4])
        raise UserError(f"--reuse {folder}: that run has {told}")
    taken, log = {}, read_csv(folder / "log.csv")
    for name in ("critic", "behavior"):
        rows = [row for row in log if row["stage"] == name]
        taken[name] = load_tensors(folder / f"{name}.pt"), rows
    return taken


class Run:
    """A task's folder under way. Its checkpoint has the config, the names of finished
    stages, the rows of both tables, and all of the stage that is under way.
    """

    def __init__(self, folder, config, minutes, free, reused):
        """free: what may differ from the run that is there; reused: as of take."""
        self.folder, self.minutes, self.signal, self.told = folder, minutes, 0, set()
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self.saved = load_tensors(self.checkpoint, config["device"])
            with reading(self.checkpoint):
                theirs = check_config(self.saved["config"])
                also = {*config["settings"]["also"], *theirs["settings"]["also"]}
                differ = differences(config, theirs, ("also", *free))
                theirs["settings"]["also"] = sorted(also)  # a policy more is welcome
            self.refuse(differ)
            config = theirs
        elif left := [x for x in STAGES if (folder / f"{x}.pt").exists()]:
            raise UserError(f"{folder} has {left[0]}.pt, but no checkpoint.pt to go on")
        else:
            self.saved = {"finished": [], "under_way": {}, "log": [], "scores": []}
        self.saved["config"] = config
        self.save(self.saved["under_way"])
        content = json.dumps(config, indent=1).encode()
        files.write_atomically(folder / "config.json", content)
        for name, (weights, rows) in reused.items():
            if name not in self.saved["finished"]:
                others = [row for row in self.saved["log"] if row["stage"] != name]
                self.saved["log"] = others + rows
                self.finish(name, weights)

    def refuse(self, differ):
        """UserError if this folder's run isn't the one that is asked for."""
        if not differ:
            return
        told, ways = ", ".join([*differ.values()][:4]), ["another --out trains anew"]
        if not {*differ} - {*LATER, "torch"}:
            ways.append(f"with --reuse {self.folder}, policies only")
        if "seeds" in differ:
            ways.append("with --seeds of those it lacks, to be added in the report")
        if "episodes" in differ:
            ways.append(f"or score it anew: run.py evaluate {self.folder} --episodes")
        raise UserError(f"{self.folder} holds another run ({told}); {', '.join(ways)}")

    def write_tables(self):
        for name, columns in COLUMNS.items():
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.saved[name])
            content = text.getvalue().encode()
            files.write_atomically(self.folder / f"{name}.csv", content)

    def save(self, under_way):
        """Everything, so that a process that is killed at any moment can go on."""
        self.saved["under_way"] = under_way
        self.write_tables()
        files.save_tensors(self.checkpoint, self.saved)

    def finish(self, name, weights):
        """A stage's result: its file first, then the checkpoint, by which it counts."""
        files.save_tensors(self.folder / f"{name}.pt", weights)
        self.saved["finished"].append(name)
        self.save({})

    def save_stage(self, stage, **choices):
        generators = [generator.get_state() for generator in stage.generators]
        parts = {"stage": stage.state_dict(), "optimizer": stage.optimizer.state_dict()}
        self.save({"name": stage.name, "generators": generators, **parts, **choices})

    def resume(self, stage):
        """Puts what was saved into a stage; the step of its last evaluation, and
        whether it is compiled, None if that isn't chosen yet.
        """
        saved = self.saved["under_way"]
        if saved.get("name") != stage.name:
            return -1, None
        with reading(self.checkpoint):
            stage.load_state_dict(saved["stage"])
            stage.optimizer.load_state_dict(saved["optimizer"])
            for generator, state in zip(stage.generators, saved["generators"]):
                generator.set_state(state.cpu())
            stage.done = int(stage.count)
            say(f"{stage.name}: goes on at step {stage.done:,} of {stage.steps:,}")
            return saved["evaluated"], saved["compiled"]

    @contextlib.contextmanager
    def signals(self):
        """Within it SIGINT, SIGTERM and SIGUSR1 make the loop save and stop, a second
        Ctrl-C at once.
        """

        def ask(number, frame):
            if self.signal == number == signal.SIGINT:
                os._exit(128 + number)
            number = signal.SIGTERM if number == signal.SIGUSR1 else number
            self.signal = self.signal or number

        before = {number: signal.signal(number, ask) for number in data.SIGNALS}
        try:
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
        checkpoints; compiling: None for what is faster.
        """
        evaluated, chosen = self.resume(stage)
        must, compiling = compiling, chosen if compiling is None else compiling
        torch.set_num_threads(1)  # the same bits on any number of cores
        if compiling or compiling is None and stage.table.is_cuda:
            compiling = self.compile(stage, must)
        parts = stage.settings.evaluations if stage.name in POLICIES else 0
        marks = {round(i * stage.steps / parts) for i in range(parts + 1) if parts}
        every, saved_at = max(1, min(5000, stage.steps // 20)), time.monotonic()
        timed, seconds = 0, 0.0  # eager steps, but for the first
        with progress(stage.name, " steps", stage.steps, stage.done) as bar:
            while stage.done < stage.steps or evaluated < max(marks, default=-1):
                at, due = stage.done, time.monotonic() > saved_at + 60 * self.minutes
                if at in marks and evaluated < at:
                    due = self.evaluate(stage, workers)
                    evaluated = at if due else evaluated
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
                    say(f"{stage.name}: eager on 1 thread, {left / 60:.1f} minutes")
                    compiling = left > PATIENCE and self.compile(stage)
                    due = True  # the choice depends on the time, the bits on it
                if due or self.signal:
                    self.save_stage(stage, evaluated=evaluated, compiled=compiling)
                    saved_at = time.monotonic()
                if self.signal:
                    told = f"saved at step {stage.done:,} of {stage.name}"
                    say(f"{told}; the same command goes on from there")
                    raise SystemExit(128 + self.signal)
        self.finish(stage.name, stage.weights())

    def compile(self, stage, must=False):
        """Compiles a stage's losses; false, after a line, where that can't be done."""
        how = "" if stage.table.is_cuda else f", for {THREADS} threads"
        say(f"{stage.name}: compiling its steps{how}")
        states = [generator.get_state() for generator in stage.generators]
        torch.set_num_threads(THREADS)
        try:
            with warnings.catch_warnings():  # PyTorch's own, of itself
                warnings.filterwarnings("ignore", module="torch.jit")
                stage.losses = compiled(stage.losses)
                sum(x.sum() for x in stage.losses(*stage.batch())).backward()
            return True
        except torch.cuda.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:
            stage.__dict__.pop("losses", None)
            torch.set_num_threads(1)
            reason = " ".join(str(error).split("\n\nSet TORCHDYNAMO")[0].split())[-200:]
            reason += "" if shutil.which("g++") else "; install g++, a C++ compiler"
            if must:
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
            key: x.flatten().tolist() for key, x in (losses | watch(stage)).items()
        }
        bound = self.saved["config"]["data"]["largest_reward"]
        bound /= 1 - stage.settings.gamma
        for i, member in enumerate(members(stage.name, stage.settings, stage.seeds)):
            row = dict(zip(COLUMNS["log"], (stage.name, stage.done, *member)))
            row |= {key: values[i] for key, values in columns.items()}
            self.saved["log"].append(row)
            who = "seed {}, β = {}".format(*member).removesuffix(", β = None")
            if not finite[i]:
                told = f"{who} is lost: a loss of {stage.name} is not finite"
                self.tell(("lost", member[0]), told)
            elif stage.name == "critic" and abs(row["q"]) > bound:
                told = f"{who}: the critic diverges: Q > {bound:.3g}, any return"
                self.tell(("diverges", member[0]), told)
        if not any(finite):
            self.write_tables()
            say(f"no seed's {stage.name} loss is finite; see {self.folder / 'log.csv'}")
            raise SystemExit(3)
        return ", ".join(f"{key} {np.mean(x):.3g}" for key, x in columns.items())

    def tell(self, about, line):
        """Says the first line about something."""
        if about not in self.told:
            self.told.add(about)
            say(line)

    def evaluate(self, stage, workers):
        """Scores a stage's policies; false if a signal came before that was done."""
        what = stage.settings, stage.seeds
        policies = policies_of(stage.name, stage.weights()["policy"], *what)
        how = self.saved["config"]["task"], stage.name, stage.done, policies
        rows = roll_out(workers, *how, stage.settings.episodes, lambda: self.signal)
        self.saved["scores"] += rows
        for (method, beta), steps in by_policy(rows).items():
            name = f"{method}, β = {beta:g}" if beta else method
            mean = np.mean([*steps[stage.done].values()])
            say(f"{name}: mean score {mean:.1f} at step {stage.done:,}")
        return bool(rows)


def train(task, settings, seeds, out, reuse, workers, **options):
    """Algorithm 1 on one task: trains what is not yet trained, in OUT/TASK."""
    folder, device = out / task, options["device"]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    free = ("device", "precision") if options["device"] else ()
    if (out / "config.json").exists():
        raise UserError(f"--out {out} is a run's folder; the run goes to OUT/{task}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU; take --device cpu or torch's CUDA build")
    if device == "cpu":
        settings = dataclasses.replace(settings, precision="exact")
    config = describe(task, settings, seeds, device)
    say(f"{task}: training on {config['gpu'] or config['cpu']}")
    if task == data.DEMO and not data.data_file(task).exists():
        remake.maze2d(data.stand_in_path(task))
    table, sizes, config["data"] = data.load(task, options["any_data"], log=say)
    reused = take(reuse, config) if reuse else {}
    with locked(folder):
        run = Run(folder, config, options["checkpoint_minutes"], free, reused)
        saved, table = run.saved, torch.from_numpy(table).to(device)
        wanted = "critic", "behavior", "srpo", *saved["config"]["settings"]["also"]
        todo = [x for x in STAGES if x in wanted and x not in saved["finished"]]
        with run.signals(), data.Workers(workers) as workers:
            # the policy that is under way goes first
            begun = saved["under_way"].get("name")
            for name in sorted(todo, key=lambda x: (x in POLICIES, x != begun)):
                stage = build_stage(name, settings, table, sizes, seeds, folder)
                run.train(stage, workers, options["compile"])
    if not todo:
        say(
            f"{folder} is finished: nothing to do; for more: another --out with --reuse"
        )
    print_scores(saved["config"], saved["scores"])


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
    """A trained run's policies, [(seed, β, policy to roll out)]."""
    settings, seeds = Settings(**config["settings"]), config["seeds"]
    sizes = data.space_sizes(config["task"])

    def weights(name):
        networks = load_networks(name, folder, settings, sizes, seeds)
        return networks.network.state_dict()

    if method == "random":
        policy = partial(data.random_policy, sizes[1])
        return [(seed, None, policy) for seed in seeds]
    if method != "idql":
        return policies_of(method, weights(method), settings, seeds)
    policies, build = [], srpo.builders(settings, *sizes)
    stacked = weights("noise_model"), weights("q_target")
    for i, seed in enumerate(seeds):
        pair = build["noise_model"]().eval(), build["q"]()
        for network, tensors in zip(pair, stacked):
            network.load_state_dict({key: x[i] for key, x in tensors.items()})
        policies.append((seed, None, IDQL(*pair, sizes[1])))
    return policies


def evaluate(folder, method, episodes, workers):
    """Scores a trained run's policies anew; writes evaluation-METHOD.json."""
    config = read_config(folder)
    policies = load_policies(folder, config, method)
    episodes = episodes or config["settings"]["episodes"]
    with data.Workers(workers) as workers:
        rows = roll_out(workers, config["task"], method, None, policies, episodes)
    print_scores(config, rows)
    content = json.dumps(config | {"scores": rows}, indent=1).encode()
    files.write_atomically(folder / f"evaluation-{method}.json", content)


# ---------------- the command line


def number_or_sweep(text):
    return text if text == "sweep" else float(text)


def parse(arguments):
    """What the command line gives; the settings' flags are made from the dataclass."""
    parser = files.Parser(prog="run.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tasks = f"tasks: {', '.join(data.TASKS)}; with --beta also D4RL's others"
    training = commands.add_parser("train", epilog=tasks, help="train and score a task")
    scoring = commands.add_parser("evaluate", help="score a trained run anew")

    def add(flag, help, to=training, **how):
        if flag.startswith(
            "--"
        ):  # what isn't given may be the demo's, or another run's
            how = {"default": argparse.SUPPRESS} | how
        to.add_argument(flag, help=help, **how)

    switch, path = argparse.BooleanOptionalAction, {"type": files.folder}
    no, count = {"action": "store_true", "default": False}, {"type": files.positive}
    reuse = "take critic, behavior model and what is not given from a run; default: no"
    places = "which GPU: CUDA_VISIBLE_DEVICES; default: cuda where there is one"
    compiling = "default: on a GPU, and on a CPU where it saves minutes"
    add("task", "one of those below")
    add("--demo", "the demo's settings for what is not given; default: no", **no)
    add("--reuse", reuse, metavar="FOLDER", default=None, **path)
    add("--seeds", "trials; default: 0 1 2 3 4 5", nargs="+", type=files.whole)
    add("--out", "results go to OUT/TASK; default: runs", default=Path("runs"), **path)
    add("--device", places, choices=("cpu", "cuda"))
    add("--compile", compiling, action=switch)
    minutes = {"type": float, "default": 5.0}
    add("--checkpoint-minutes", "a crash loses no more; default: 5", **minutes)
    add("--any-data", "take data that isn't D4RL's; default: no", **no)
    for field in dataclasses.fields(Settings):
        kind = files.whole if field.type is int else field.type
        how = {"type": kind, "choices": field.metadata["choices"]}
        if field.type is bool:
            how = {"action": switch}
        elif field.type is tuple:
            how |= {"nargs": "*", "type": str if how["choices"] else number_or_sweep}
        default = {None: "by task", (): "none"}.get(field.default, field.default)
        told = f"{field.metadata['help']}; default: {default}"
        add(f"--{field.name.replace('_', '-')}", told, **how)
    add("folder", "a run's folder, OUT/TASK", scoring, **path)
    methods = {"default": "srpo", "choices": ("srpo", "idql", "iql", "bc", "random")}
    add("--method", "default: srpo", scoring, **methods)
    add(
        "--episodes", "of each seed; default: the run's", scoring, default=None, **count
    )
    for one in (training, scoring):
        told = "evaluation processes; default: one a core"
        add("--workers", told, one, default=None, **count)
    return vars(parser.parse_args(arguments))


def command(arguments):
    given = parse(arguments)
    if given.pop("command") == "evaluate":
        return evaluate(**given)
    task = data.check_task(given.pop("task"))
    chosen = {"seeds": [0, 1, 2, 3, 4, 5], "device": None, "compile": None}
    if given["reuse"] and not is_theirs(given["reuse"]):
        config = read_config(given["reuse"])
        chosen |= config["settings"] | {"seeds": config["seeds"]}
        del chosen["precision"]  # its machine's
    chosen |= (DEMO if given.pop("demo") else {}) | given
    settings = {name: chosen.pop(name) for name in NAMES if name in chosen}
    seeds = chosen["seeds"]
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
        raise UserError("--seeds must be different whole numbers from 0 to 2147483647")
    try:
        settings = Settings(task, **settings)
    except ValueError as error:
        raise UserError(error) from None
    train(task, settings, **chosen)


def main(arguments=None):
    """The command line; returns 0, or 2 for what its user can mend."""
    return files.program("run", partial(command, arguments))


if __name__ == "__main__":
    for stopping in data.SIGNALS:  # before training, too: half a download is removed
        signal.signal(
            stopping, lambda number, frame: sys.exit(130 + 13 * (number != 2))
        )
    sys.exit(main())
